"""`hyla compare`: runs beside what was expected of them and the paper."""

import argparse

from ..paths import find_existing


def add(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare runs with what was expected of them, and with the paper",
        description="Prints for each recipe what its runs reached over their seeds (mean ± standard error, number of runs), "
        "what was expected, the paper's value, the share of the budget and a verdict. Exits with 1 if an expectation was "
        "missed.",
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
