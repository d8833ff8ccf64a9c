"""`hyla card`: the card of a finished run."""

import argparse
from pathlib import Path

from ..paths import find_record, find_run


def add(commands) -> None:
    parser = commands.add_parser(
        "card",
        help="write the card of a finished run",
        description="Writes the card of a finished run: README.md, its pictures and .eval_results/. Needs no network.",
    )
    add_run_arguments(parser)
    parser.add_argument("--repo-id", help="ORG/NAME that the card's snippet loads (default: RUN)")
    parser.add_argument("--output", type=Path, help="folder to write into (default: RUN)")
    parser.set_defaults(run=run)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--with",
        dest="others",
        metavar="RUN",
        nargs="+",
        default=(),
        help="runs (folders or JSON records) of the same recipe with other seeds, for means and standard errors, and of other "
        "recipes for the same task, such as those of another attention, for the comparison",
    )


def find_runs(arguments: argparse.Namespace) -> tuple[Path, list[Path]]:
    """The folder of the run, and the other runs that `--with` names."""
    return find_run(arguments.folder), [find_record(word) for word in arguments.others]


def run(arguments: argparse.Namespace) -> None:
    folder, others = find_runs(arguments)
    if arguments.output is None and not Path(arguments.folder).exists():
        raise ValueError(f"{arguments.folder} comes with the package: name a folder for its card by --output.")

    from ..hub.model_card import write_card

    output = arguments.output or folder
    for path in write_card(folder, output, arguments.repo_id, others):
        print(f"Wrote {path}")
