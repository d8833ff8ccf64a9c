#!/usr/bin/env bash
# The script of `make gpu`: benchmark, training and tests on a machine with a GPU, or without one if REHEARSAL=1. It needs only
# torch, transformers and accelerate. The tests come last, since they compile for many minutes, and the benchmark has already
# checked the kernels at its own sizes. If a part fails, the next one still runs, and the exit code is 1. The results of a part are
# in OUT when it ends.
#
#   OUT           folder of the results: at most 8 files, none over 16 MiB
#   RUN           folder of the training run
#   MAX_MINUTES   training saves and stops within this time; the same command resumes
#   FROM          checkpoint.tar of an earlier OUT, to resume from if RUN is lost
#   TRAIN         more arguments of `hyla train`, the same every time (default: a step is replayed as CUDA graphs)
#   PARTS         which of: bench train tests
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
REHEARSAL=${REHEARSAL:-}
OUT=${OUT:-runs/gpu}
RUN=${RUN:-runs/gpu-run}
MAX_MINUTES=${MAX_MINUTES:-30}
FROM=${FROM:-$OUT/checkpoint.tar}
PARTS=${PARTS:-bench train tests}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

tests=(-k "not interpreter")
bench=()
if [ "$REHEARSAL" ]; then
    TRAIN=${TRAIN:---trainer.cuda_graphs false}
    tests=(-k "interpreter")
    bench=(--repeats 1 --lengths 64 128)
fi

TRAIN=${TRAIN:---trainer.cuda_graphs true}

run_tests() {
    if ! "$PYTHON" -c 'import pytest' 2>/dev/null; then
        echo "Tests are left out: pytest is not installed."
        return 0
    fi
    "$PYTHON" -m pytest -p no:cacheprovider -rs "${tests[@]}" tests/model/test_triton.py tests/training/test_graphs.py
}

run_bench() {
    "$PYTHON" -m hf_hyla bench --output "$OUT" "${bench[@]}"
}

run_train() {
    if [ -e "$RUN/run.json" ]; then
        echo "The run in $RUN is finished."
        return 0
    fi
    if [ ! -d "$RUN" ] && [ -f "$FROM" ]; then
        echo "Resumes from $FROM."
        mkdir -p "$RUN" && tar -xf "$FROM" -C "$RUN" || return
    fi
    local more
    read -ra more <<<"$TRAIN"
    echo "Trains with ${more[*]}."
    "$PYTHON" -m hf_hyla train recipes/sraven/hyla.yaml --output "$RUN" --max-minutes "$MAX_MINUTES" \
        --trainer.disable_tqdm true "${more[@]}"
}

# Copies the results and the last checkpoint of the run's folder, which also holds code and older checkpoints.
pack() {
    local last name status=0
    cp "$RUN"/{run.json,model.safetensors,config.json,learning_curve.png} "$OUT" 2>/dev/null
    last=$(ls -d "$RUN"/checkpoints/checkpoint-* 2>/dev/null | sort -V | tail -1)
    if [ "$last" ]; then
        tar -cf "$OUT/checkpoint.tar.new" -C "$RUN" resolved_recipe.yaml "checkpoints/${last##*/}" &&
            mv "$OUT/checkpoint.tar.new" "$OUT/checkpoint.tar" || return
    fi
    for name in checkpoint.tar model.safetensors; do
        if [ "$(find "$OUT/$name" -size +16384k 2>/dev/null)" ]; then
            echo "$OUT/$name is over 16 MiB and removed."
            rm "$OUT/$name"
            status=1
        fi
    done
    return "$status"
}

main() {
    local failed=0 part
    for part in $PARTS; do
        echo "== $part"
        SECONDS=0
        if "run_$part"; then
            echo "== $part: done in $SECONDS seconds"
        else
            echo "== $part: FAILED in $SECONDS seconds"
            failed=1
        fi
        pack || failed=1
    done
    return "$failed"
}

mkdir -p "$OUT"
main 2>&1 | tee -a "$OUT/report.txt"
