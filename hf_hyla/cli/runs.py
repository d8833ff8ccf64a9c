"""`hyla train`, `evaluate`, `compare` and `sweep`."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a recipe's model and evaluate it on every split",
        description="Trains a recipe's model, evaluates it on every split, and writes weights and run.json. Any value of the "
        "recipe can be overridden: --model.attention_type softmax. A run that was interrupted goes on when the same command "
        "is given again. SIGTERM and the end of the terminal save, stop and end with exit code 143 and 129; --max-minutes saves, "
        "stops and ends with 0.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="YAML file, see recipes/README.md")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/ and the recipe's name)")
    parser.add_argument("--overwrite", action="store_true", help="remove a run that the folder already holds")
    parser.add_argument("--max-minutes", type=float, help="save and stop before training has taken so long")
    parser.add_argument(
        "--dry-run", action="store_true", help="print recipe, parameters, steps, time and memory; write nothing"
    )
    parser.set_defaults(run=_train, sections=("task", "model", "trainer", "expect"))


def _train(arguments: argparse.Namespace) -> int:
    from accelerate import PartialState

    from ..hub.publish import check_before_training, publish_run
    from ..training import Stopped, load_recipe, train
    from ..training.dry_run import dry_run
    from ..training.processes import check_launch

    check_launch()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.max_minutes is not None and not arguments.max_minutes > 0:
        raise ValueError(f"--max-minutes must be larger than 0, got {arguments.max_minutes}.")
    check_before_training(recipe.name, recipe.settings, recipe.task, recipe.config)
    if arguments.dry_run:
        PartialState().print(dry_run(recipe))
        return 0
    slug = "".join(f"-{key}={value}" for key, value in arguments.overrides.items())
    output = arguments.output or Path("runs") / (recipe.name + slug.replace("/", "_"))
    # Of several processes one prints.
    PartialState().print(
        f"{recipe.name}: {recipe.config.attention_type} attention on {recipe.task.name}, into {output}", flush=True
    )
    code = 0
    try:
        record = train(recipe, output, overwrite=arguments.overwrite, max_minutes=arguments.max_minutes)
        PartialState().print(f"{_report(recipe, record)}\nWeights, code and run.json are in {output}")
        if recipe.trainer.get("push_to_hub") and PartialState().is_main_process:
            print(publish_run(output, recipe.trainer["hub_model_id"], recipe.trainer.get("hub_private_repo")))
    except Stopped as stopped:
        PartialState().print(stopped, file=sys.stderr)
        code = stopped.exit_code
    # Its threads may abort a process that ends before them.
    PartialState().destroy_process_group()
    return code


def _report(recipe, record) -> str:
    """Scores per split beside the paper's, and what share of the paper's budget they took."""
    from ..runs.paper import paper_result

    paper = paper_result(recipe.settings)
    metric_names = recipe.task.metric_names
    lines = [f"{'split':<15}" + "".join(f"{name:>18}" for name in metric_names) + f"{'paper, full budget':>22}"]
    for split, scores in record.metrics.items():
        theirs = "-"
        if paper and paper.metric.startswith(f"{split}/"):
            theirs = f"{paper.metric.partition('/')[2]} {paper.mean:.4f} ± {paper.standard_error:.4f}"
        # A score that has no sample to be measured on is left out.
        ours = [f"{scores[name]:.4f}" if name in scores else "-" for name in metric_names]
        lines.append(f"{split:<15}" + "".join(f"{score:>18}" for score in ours) + f"{theirs:>22}")
    minutes = f"{record.seconds / 60:.1f} minutes of training"
    if paper:
        share = record.samples_seen / paper.num_samples
        lines.append(f"{record.samples_seen:,} training samples, {share:.1%} of the paper's budget, in {minutes}")
    else:
        lines.append(f"{record.samples_seen:,} training samples in {minutes}; the paper has no such run")
    if recipe.expect:
        split, _, name = recipe.expect.metric.partition("/")
        lines.append(
            f"Expected: {recipe.expect.metric} = {recipe.expect.value} ± {recipe.expect.tolerance} ({recipe.expect.source}); "
            f"reached {record.metrics[split][name]:.4f}"
        )
    return "\n".join(lines)


def add_evaluate(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a run or a model on a split",
        description="Scores a run or a model on a split. A run knows its task; for any other model name it, with its settings "
        "as --task.num_examples 32.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder of a run or a checkpoint, or a Hub repository")
    parser.add_argument("--task", help="name of the task (default: the run's)")
    parser.add_argument("--split", default="ood", help="split to score (default: ood)")
    parser.add_argument("--num-samples", type=int, help="samples to score (default: the paper's number)")
    parser.add_argument("--batch-size", type=int, default=1024, help="samples per batch (default: 1024)")
    parser.add_argument(
        "--by-combination", action="store_true", help="score every combination of rules or terms by itself"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_evaluate, sections=("task",))


def _evaluate(arguments: argparse.Namespace) -> None:
    from ..training import evaluate
    from ..training.weights import load_model

    task = task_of_model(arguments)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}.")
    model = load_model(arguments.model)
    if arguments.by_combination:
        return _evaluate_by_combination(arguments, model, task)
    scores = evaluate(model, task, arguments.split, arguments.num_samples, arguments.batch_size)
    if arguments.json:
        print(
            json.dumps(
                {"model": arguments.model, "task": task.settings, "split": arguments.split, "metrics": scores},
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
    from ..runs.record import environment

    found = score_by_combination(model, task, arguments.split, arguments.num_samples, arguments.batch_size)
    if arguments.json:
        about = {"model": arguments.model, "task": task.settings, "split": arguments.split}
        print(json.dumps(about | {"combinations": found, "environment": environment()}, indent=1))
    else:
        print(table(found, task.metric_names[0]))


def task_of_model(arguments: argparse.Namespace):
    """The task of the run that `arguments.model` is, or that `--task` names, with the settings among the overrides."""
    from ..runs import RunRecord
    from ..training.recipe import checked_task

    settings: dict[str, Any] = {}
    folder = Path(arguments.model)
    if (folder / "run.json").exists():
        settings = dict(RunRecord.load(folder).recipe.get("task", {}))
    if arguments.task and arguments.task != settings.get("name"):
        settings = {"name": arguments.task}
    if not settings:
        raise ValueError(f"{arguments.model} has no run.json that names a task: pass --task logic or --task sraven.")
    return checked_task(
        "--task", settings, {key.partition(".")[2]: value for key, value in arguments.overrides.items()}
    )


def add_compare(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare runs with what was expected of them, and with the paper",
        description="Prints for each recipe what its runs reached over their seeds (mean ± standard error, number of runs), "
        "what was expected, the paper's value, the share of the budget and a verdict. Exits with 1 if an expectation was "
        "missed.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, record files, or folders of them")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from ..runs.compare import MISSED, as_json, compare, find_records, table

    comparisons = compare(find_records(arguments.runs))
    print(as_json(comparisons) if arguments.json else table(comparisons))
    return int(any(one.verdict == MISSED for one in comparisons))


def add_sweep(commands) -> None:
    parser = commands.add_parser(
        "sweep",
        help="run a base recipe over a grid of settings and seeds",
        description="Runs a base recipe over a grid of settings and seeds, each point in a folder of its own, and compares "
        "them at the end. Given again, it skips what is finished and goes on with what is not. Exits with 1 if a run failed.",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", type=Path, help="YAML file, see recipes/README.md")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: runs/ and the sweep's name)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one for each GPU, or one)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs; start nothing")
    parser.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    from ..runs.compare import compare, find_records, table
    from ..sweep import load_sweep, run_sweep

    sweep = load_sweep(arguments.sweep)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {arguments.jobs}.")
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
    """Within it what would stop a run is an exception, so that the runs of a sweep are stopped with it."""
    from ..training.stopping import stop_signals

    before = {number: signal.signal(number, lambda number, frame: sys.exit(128 + number)) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
