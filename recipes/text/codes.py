"""
Probes what the latent codes of a language model of bytes tell of Python's syntax:

    python recipes/text/codes.py RUN [--rows 400] [--json FILE]

The code of a byte is that of its pairs with itself and with the byte before. Linear probes read from it which kind of token the
byte belongs to, on held-out documents. Two bytes alone tell much of that, so they are probed too, beside the codes.
"""

import argparse
import json
import keyword
import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import hf_hyla  # noqa: F401  registers the model with transformers
from hf_hyla.analysis import collect_codes, probe, task_batches
from hf_hyla.runs import Run
from hf_hyla.runs.environment import environment, hardware
from hf_hyla.runs.folder import weights_digest


BYTES_PER_ROW = 16
BATCH_SIZE = 16
KINDS = ("comment", "string", "number", "keyword", "name", "indentation", "space", "operator")
# A row may begin inside a string, whose end is then taken for a beginning.
TOKEN = re.compile(
    rb"(?P<comment>#[^\n]*)|(?P<string>\"[^\"\n]*\"?|'[^'\n]*'?)|(?P<number>\d[\w.]*)|(?P<name>[A-Za-z_]\w*)"
    rb"|(?P<indentation>(?<=\n)[ \t]+)|(?P<space>\s)|(?P<operator>.)"
)
KEYWORDS = {word.encode() for word in keyword.kwlist}


def kinds_of(row: bytes) -> np.ndarray:
    """For each byte of a row, the index in `KINDS` of the token that holds it."""
    kinds = np.empty(len(row), dtype=np.int64)
    for token in TOKEN.finditer(row):
        kind = "keyword" if token.group() in KEYWORDS else token.lastgroup
        kinds[token.start() : token.end()] = KINDS.index(kind)
    return kinds


def collected(model, task, split: str, num_rows: int, seed: int):
    """The codes of some bytes of each row, their kinds (bytes,), and one-hot features (bytes, 512) of two bytes each."""
    draw, kinds, pairs = np.random.default_rng(seed), [], []

    def batches():
        for batch in task_batches(task, split, num_rows, BATCH_SIZE):
            places = []
            for ids, labels in zip(batch["input_ids"].numpy(), batch["labels"].numpy(), strict=True):
                predicted = np.flatnonzero(labels != -100)
                chosen = np.sort(draw.choice(predicted, BYTES_PER_ROW, replace=len(predicted) < BYTES_PER_ROW))
                # The end token, which is no byte, reads as the end of a line.
                row = np.where(ids < 256, ids, ord("\n")).astype(np.uint8)
                kinds.append(kinds_of(row.tobytes())[chosen])
                pairs.append(np.stack([row[chosen], row[chosen - 1]], axis=1))
                places.append(chosen)
            yield {"input_ids": batch["input_ids"], "places": torch.tensor(np.array(places))}

    codes = collect_codes(
        model,
        batches(),
        keys=lambda batch: torch.stack([batch["places"], batch["places"] - 1], dim=-1),
        queries=lambda batch: batch["places"],
    )
    two_bytes = np.eye(256, dtype=np.float32)[np.concatenate(pairs)].reshape(-1, 512)
    return codes, np.concatenate(kinds), two_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run of the task text, by bytes")
    parser.add_argument("--rows", type=int, default=400, help="rows to fit on, and to score on (default: 400)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the scores into this file")
    arguments = parser.parse_args()
    if arguments.rows < 1:
        parser.error(f"--rows must be at least 1, got {arguments.rows}.")
    run = Run.load(arguments.run)
    if run.task.name != "text" or run.task.tokenizer != "bytes":
        parser.error(f"{arguments.run} is not a language model of bytes: give a run of a recipe in recipes/text.")
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    rows = min(arguments.rows, run.task.num_samples["test"])
    train, train_kinds, train_bytes = collected(model, run.task, "train", rows, seed=0)
    test, test_kinds, test_bytes = collected(model, run.task, "test", rows, seed=1)
    groups = np.arange(rows).repeat(BYTES_PER_ROW)  # bytes of a row are not independent

    print(f"kind of token, {len(test_kinds):,} bytes of {rows} held-out rows\n")
    print(f"{'read from':<12}{'f1':>17}{'shuffled':>10}")
    layers = [*range(model.config.num_hidden_layers), None]
    sources = [("two bytes", train_bytes, test_bytes)]
    sources += [("all layers" if n is None else f"layer {n + 1}", train.features(n), test.features(n)) for n in layers]
    scores = {}
    for name, fitted, scored in sources:
        result = probe(fitted, train_kinds, scored, test_kinds, groups=groups, num_shuffles=2)
        f1, shuffled = result["scores"]["f1"], result["control"]["f1"]["value"]
        scores[name] = {"f1": f1, "shuffled": shuffled}
        print(f"{name:<12}{f1['value']:>9.3f} ± {f1['standard_error']:.3f}{shuffled:>10.3f}")
    by_kind = {KINDS[kind]: f1 for kind, f1 in result["f1_by_class"].items()}
    print("\nall layers, by kind: " + ", ".join(f"{kind} {f1:.2f}" for kind, f1 in by_kind.items()))
    if arguments.json:
        report = {
            "recipe": run.record.name,
            "weights": weights_digest(run.folder),
            "rows": rows,
            "bytes": len(test_kinds),
            "scores": scores,
            "all_layers_by_kind": by_kind,
            "environment": environment(),
            "hardware": hardware(),
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
