"""`hyla ceiling`: the scores of an ideal observer on SRAVEN."""

import argparse
import json
from pathlib import Path

from .parser import whole
from .task import task_of


def add(commands) -> None:
    parser = commands.add_parser(
        "ceiling",
        help="score an ideal observer on SRAVEN",
        description="Scores the ideal observer of SRAVEN, which knows how puzzles are made and answers with the most probable "
        "panel. No model can expect a higher accuracy. Settings of the task are given like --task.num_features 3.",
    )
    parser.add_argument(
        "--num-samples", type=whole(at_least=1), default=51_200, help="puzzles per split (default: 51200)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write the record into")
    parser.set_defaults(run=run, sections=("task",))


def run(arguments: argparse.Namespace) -> None:
    from ..runs.environment import environment
    from ..tasks.sraven.ceiling import observer_record

    task = task_of("sraven", arguments.overrides)
    if arguments.output:  # checked now, so that an error here does not cost the work
        if arguments.output.is_dir():
            raise ValueError(f"--output must name a file, but {arguments.output} is a folder.")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = observer_record(task, arguments.num_samples) | {"environment": environment()}
    for split, scores in record["splits"].items():
        print(
            f"{split}: accuracy {scores['accuracy']:.4f} ± {scores['standard_error']:.4f}, {arguments.num_samples} puzzles"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
