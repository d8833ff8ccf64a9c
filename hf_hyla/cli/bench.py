"""`hyla bench`: benchmarks of time and memory."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..paths import find_recipe, find_version
from .parser import one_of, whole


# The parts of `hf_hyla.benchmark`, repeated here since that is slow to import.
PARTS = ("attention", "inference", "sraven", "logic", "data")
# Beyond these, torch crashes, or the scores of a single layer fill the memory of any machine.
_MAX_THREADS, _MAX_LENGTH = 1024, 2**20


def add(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure time and memory of attention, training steps, answers and data",
        description="Measures all implementations of attention beside torch's softmax attention, training steps of the SRAVEN "
        "and logic recipes, answers per second of model and pipeline, and samples per second of the tasks. Workloads that are "
        "compared take turns in one process. An implementation whose result differs from the definition is not timed; the "
        "others are, and the exit code is 1. Takes some minutes. With --against, training steps and attention are compared "
        "with another version instead.",
    )
    parser.add_argument("--task", type=one_of(PARTS), help=f"one of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="write JSON, into FILE or to standard output"
    )
    parser.add_argument("--output", type=Path, help="folder to write bench.json and the curves bench.png into")
    parser.add_argument(
        "--threads",
        type=whole(at_least=1, at_most=_MAX_THREADS),
        help="threads of the CPU (default: torch's number; inference on a CPU is measured with one and with two)",
    )
    parser.add_argument(
        "--repeats",
        type=whole(at_least=1),
        help="measurements of each workload (default: as many as fit into 10 seconds, 5 to 100)",
    )
    parser.add_argument(
        "--lengths",
        type=whole(at_least=1, at_most=_MAX_LENGTH),
        nargs="+",
        help="tokens of the attention curves (default: 128 to 4096)",
    )
    parser.add_argument(
        "--against",
        metavar="COMMIT_OR_FOLDER",
        help="compare training steps and attention of this checkout with those of one of its commits, or of another checkout",
    )
    parser.add_argument("--recipe", help="with --against: the recipe whose steps are compared (default: sraven/hyla)")
    parser.add_argument("--bf16", action="store_true", help="with --against: compute in bfloat16 under autocast")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from ..benchmark import LENGTHS, as_table, benchmark, compare_with
    from ..runs.plots import can_draw, length_curves
    from ..utils import write_whole

    output, file = arguments.output, Path(arguments.json or "-")
    if file.is_dir():
        raise ValueError(f"--json must name a file, but {file} is a folder.")
    for folder in (output, file.parent):  # created now, so that an error here does not cost minutes of work
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    files = ([output / "bench.json"] if output else []) + ([file] if arguments.json not in (None, "-") else [])

    def save(result: dict[str, Any]) -> None:
        for path in files:
            write_whole(path, json.dumps(result, indent=2) + "\n")

    how = {
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "say": lambda line: print(line, file=sys.stderr, flush=True),
    }
    if arguments.against:
        result = compare_with(arguments.against, recipe=arguments.recipe, bf16=arguments.bf16, **how)
        save(result)
    else:
        parts = (arguments.task,) if arguments.task else PARTS
        result = benchmark(parts, lengths=tuple(arguments.lengths or LENGTHS), save=save, **how)
    print(json.dumps(result, indent=2) if arguments.json == "-" else as_table(result))
    if output:
        if can_draw() and (curves := length_curves(result["rows"])):
            (output / "bench.png").write_bytes(curves)
        else:
            print("bench.png is not drawn, since it needs matplotlib and rows of attention.", file=sys.stderr)
    for sentence in result["failed"]:
        print(f"hyla: {sentence}", file=sys.stderr)
    return int(bool(result["failed"]))


def _check(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for arguments that exclude each other, or if there is no such version.
        OSError: if there is no such recipe.
    """
    if arguments.against:
        arguments.recipe = arguments.recipe or "sraven/hyla"
        for name in ("task", "lengths"):
            if getattr(arguments, name):
                raise ValueError(
                    f"--{name} cannot be used with --against, which has workloads of its own: leave it out."
                )
        find_recipe(arguments.recipe)
        find_version(arguments.against)
    else:
        for name in ("recipe", "bf16"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} belongs to --against COMMIT_OR_FOLDER, which is missing.")
