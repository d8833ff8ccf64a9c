"""`hyla bench`: time and memory."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .parser import one_of, whole


# Those of `hf_hyla.benchmark`, which is slow to import.
PARTS = ("attention", "sraven", "logic", "data")


def add(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time and memory of attention, training steps and data",
        description="Measures attention by every backend and by torch's softmax attention, the training steps of the SRAVEN "
        "and logic recipes, and how fast data are made, in turn in one run. A backend that does not compute what the "
        "definition says gets no speed; the others are measured, and the exit code is 1. Takes some minutes.",
    )
    parser.add_argument("--task", type=one_of(PARTS), help="attention, sraven, logic or data (default: all)")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="write JSON, into FILE or to standard output"
    )
    parser.add_argument("--output", type=Path, help="folder to write bench.json and the curves bench.png into")
    parser.add_argument("--threads", type=whole(at_least=1), help="threads of the CPU (default: torch's number)")
    parser.add_argument(
        "--repeats", type=whole(at_least=1), help="measurements of each (default: as fit into 10 seconds, 5 to 100)"
    )
    parser.add_argument(
        "--lengths", type=whole(at_least=1), nargs="+", help="tokens of the attention curves (default: 128 to 4096)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..benchmark import LENGTHS, as_table, benchmark
    from ..runs.plots import can_draw, length_curves
    from ..utils import write_whole

    output, file = arguments.output, Path(arguments.json or "-")
    if file.is_dir():
        raise ValueError(f"--json must name a file, but {file} is a folder.")
    for folder in (output, file.parent):  # before minutes of work
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    files = ([output / "bench.json"] if output else []) + ([file] if arguments.json not in (None, "-") else [])

    def save(result: dict[str, Any]) -> None:
        for path in files:
            write_whole(path, json.dumps(result, indent=2) + "\n")

    result = benchmark(
        (arguments.task,) if arguments.task else PARTS,
        threads=arguments.threads,
        repeats=arguments.repeats,
        lengths=tuple(arguments.lengths or LENGTHS),
        say=lambda line: print(line, file=sys.stderr, flush=True),
        save=save,
    )
    print(json.dumps(result, indent=2) if arguments.json == "-" else as_table(result))
    if output:
        if can_draw() and (curves := length_curves(result["rows"])):
            (output / "bench.png").write_bytes(curves)
        else:
            print("bench.png is not drawn: it takes matplotlib and rows of attention.", file=sys.stderr)
    for sentence in result["failed"]:
        print(f"hyla: {sentence}", file=sys.stderr)
    return int(bool(result["failed"]))
