"""`hyla sweep`: a recipe over a grid of settings and seeds."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from ..paths import find_recipe
from .parser import whole


def add(commands) -> None:
    parser = commands.add_parser(
        "sweep",
        help="run a base recipe over a grid of settings and seeds",
        description="Runs a base recipe over a grid of settings and seeds, each point in a separate folder, and compares "
        "them at the end. The same command skips finished runs and resumes the others. Exits with 1 if a run failed.",
    )
    parser.add_argument("sweep", help="YAML file, or a name that `hyla recipes` lists")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: runs/NAME)")
    parser.add_argument("--jobs", type=whole(at_least=1), help="runs at a time (default: one per GPU, or one)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs; start nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    path = find_recipe(arguments.sweep)

    from ..runs.compare import compare, find_records, table
    from ..training.sweep import load_sweep, run_sweep

    sweep = load_sweep(path)
    output = arguments.output or Path("runs") / sweep.name
    print(f"{sweep.name}: {len(sweep.points)} runs of {sweep.base}, into {output}", flush=True)
    if arguments.dry_run:
        print("\n".join(point.folder for point in sweep.points))
        return 0
    done: list[Path] = []
    with _signals_raise():
        for point, outcome in run_sweep(sweep, output, arguments.jobs):
            print(f"{point.folder}: {outcome}", flush=True)
            if not outcome.startswith("failed"):
                done.append(output / point.folder)
    if done:
        print(table(compare(find_records(done))))
    return int(len(done) < len(sweep.points))


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Within the context, a signal that would stop a run raises an exception, so that the sweep can stop its runs first."""
    from ..training.stopping import stop_signals

    before = {number: signal.signal(number, lambda number, frame: sys.exit(128 + number)) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
