"""`hyla compare`: runs beside their expectations and the paper's results."""

import argparse
from pathlib import Path

from ..paths import find_record


def add(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare runs with their expectations and with the paper",
        description="Prints for each recipe the mean ± standard error of its runs and their number, the expected value, the "
        "paper's value, the share of the budget and a verdict. Exits with 1 if an expectation was missed. With --output, also "
        "draws the runs of one task, with the paper's values and the ideal observer's.",
    )
    parser.add_argument("runs", nargs="+", help="folders of runs, record files, or folders of them")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument(
        "--output",
        metavar="FILE.png",
        type=Path,
        help="also draw the headline scores over training samples into this file",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    paths = [find_record(word) for word in arguments.runs]
    output = arguments.output
    if output and output.suffix != ".png":
        raise ValueError(f"--output must name a picture that ends with .png, got {output}.")

    from ..runs.compare import MISSED, as_json, compare, find_records, grouped, table
    from ..runs.plots import over_samples

    records = find_records(paths)
    comparisons = compare(records)
    if output:
        picture = over_samples(grouped(records))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(picture)
    print(as_json(comparisons) if arguments.json else table(comparisons))
    return int(any(one.verdict == MISSED for one in comparisons))
