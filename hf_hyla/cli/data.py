"""`hyla data`: a task's samples as a dataset."""

import argparse
from pathlib import Path

from .parser import one_of, whole
from .task import task_name, task_of


def add(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="write a task's samples as a dataset",
        description="Writes the first samples of splits as Parquet files with a dataset card, into a folder that load_dataset "
        "reads. Settings of the task are given like --task.num_features 3. A folder may be filled split by split.",
    )
    parser.add_argument("task", type=task_name, help="name of the task")
    parser.add_argument("--split", nargs="+", help="splits to write (default: all)")
    parser.add_argument(
        "--num-examples", type=whole(at_least=1), help="examples per split (default: the paper's number)"
    )
    parser.add_argument(
        "--format",
        type=one_of(("samples", "text")),
        default="samples",
        help="text adds columns with prompts and answers for language models (SRAVEN; default: samples)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.set_defaults(run=run, sections=("task",))


def run(arguments: argparse.Namespace) -> None:
    from ..hub.dataset_card import write_dataset_card
    from ..tasks.data import write_data

    task = task_of(arguments.task, arguments.overrides)
    splits = list(dict.fromkeys(arguments.split or task.splits))
    manifest = write_data(task, splits, arguments.num_examples, arguments.output, text=arguments.format == "text")
    write_dataset_card(task, arguments.output)
    for split in splits:
        print(f"{split}: {manifest.splits[split]['num_examples']:,} examples")
    print(f"Fingerprint {manifest.data_fingerprint}\nParquet files, task.json and card are in {arguments.output}")
