"""`hyla compare`: runs beside their expectations and the paper's results."""

import argparse

from ..paths import find_existing


def add(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare runs with their expectations and with the paper",
        description="Prints for each recipe the mean ± standard error of its runs and their number, the expected value, the "
        "paper's value, the share of the budget and a verdict. Exits with 1 if an expectation was missed.",
    )
    parser.add_argument("runs", nargs="+", help="folders of runs, record files, or folders of them")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    paths = [find_existing(word, "run") for word in arguments.runs]

    from ..runs.compare import MISSED, as_json, compare, find_records, table

    comparisons = compare(find_records(paths))
    print(as_json(comparisons) if arguments.json else table(comparisons))
    return int(any(one.verdict == MISSED for one in comparisons))
