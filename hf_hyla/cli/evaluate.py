"""`hyla evaluate`: scores of a run or a model."""

import argparse
import json

from ..paths import find_model
from .parser import whole
from .task import task_name, task_of_model


def add(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a run or a model on a split",
        description="Scores a run or a model on a split. The task is that of the run. It is also found for a checkpoint of "
        "a run, and for a repository that a run was published to. For any other model, --task names it, and its settings are given like --task.num_examples 32.",
    )
    parser.add_argument("model", help="folder of a run or a checkpoint, or a Hub repository")
    parser.add_argument("--task", type=task_name, help="name of the task (default: that of the model's run)")
    parser.add_argument("--split", help="split to score (default: ood, or test if the task has no ood)")
    parser.add_argument("--num-samples", type=whole(at_least=1), help="samples to score (default: the paper's number)")
    parser.add_argument("--batch-size", type=whole(at_least=1), help="samples per batch (default: the task's)")
    parser.add_argument(
        "--by-combination", action="store_true", help="score every combination of rules or terms separately"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, sections=("task",))


def run(arguments: argparse.Namespace) -> None:
    arguments.model = find_model(arguments.model)

    from ..runs.weights import load_model
    from ..training import evaluate

    task = task_of_model(arguments)
    arguments.split = arguments.split or task.headline_split
    model = load_model(arguments.model, task.auto_class)
    if arguments.by_combination:
        return _evaluate_by_combination(arguments, model, task)
    scores = evaluate(model, task, arguments.split, arguments.num_samples, arguments.batch_size)
    if arguments.json:
        print(
            json.dumps(
                {
                    "model": arguments.model,
                    "task": task.spec,
                    "split": arguments.split,
                    "metrics": scores,
                },
                allow_nan=False,
            )
        )
    else:
        for name, value in scores.items():
            print(
                f"{arguments.split}/{name}: {value:.4f}"
                if isinstance(value, float)
                else f"{arguments.split}/{name}: {value}"
            )


def _evaluate_by_combination(arguments: argparse.Namespace, model, task) -> None:
    from ..analysis.combinations import score_by_combination, table
    from ..runs.environment import environment

    batch_size = arguments.batch_size or task.eval_batch_size
    found = score_by_combination(model, task, arguments.split, arguments.num_samples, batch_size)
    if arguments.json:
        about = {"model": arguments.model, "task": task.spec, "split": arguments.split}
        print(json.dumps(about | {"combinations": found, "environment": environment()}, indent=1))
    else:
        print(table(found, task.metric_names[0]))
