"""`hyla train`: trains and evaluates the model of a recipe."""

import argparse
import sys
from pathlib import Path

from ..paths import find_recipe
from ..settings import TRAINER
from ..utils import folder_name
from .parser import positive


_QUICK_STEPS, _QUICK_SAMPLES = 100, 1024


def add(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a recipe's model and evaluate it on every split",
        description="Trains a recipe's model, evaluates it on every split, and writes weights and run.json. Any value of the "
        "recipe can be overridden, like --model.attention_type softmax. The same command resumes a run that was "
        "interrupted. A run that is stopped saves first. Its exit code is 130 after Ctrl-C, 143 after SIGTERM, 129 after the end "
        "of the terminal, and 0 after --max-minutes.",
    )
    parser.add_argument("recipe", help="YAML file, or a name that `hyla recipes` lists")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/ with recipe and overrides)")
    parser.add_argument("--overwrite", action="store_true", help="remove a run that is already in the folder")
    parser.add_argument("--max-minutes", type=positive, help="save and stop before training takes longer than this")
    parser.add_argument(
        "--dry-run", action="store_true", help="print recipe, parameters, steps, time and memory; write nothing"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"make a whole run in about a minute: {_QUICK_STEPS} steps with a fitted schedule, and few samples to score; it is "
        "published only if --trainer.push_to_hub true is given too",
    )
    parser.set_defaults(run=run, sections=("task", "model", "trainer", "expect"))


def run(arguments: argparse.Namespace) -> int:
    path = find_recipe(arguments.recipe)

    from accelerate import PartialState

    from ..hub.publish import check_before_training, publish_run
    from ..training import Stopped, load_recipe, train
    from ..training.dry_run import dry_run
    from ..training.processes import check_launch

    check_launch()
    overrides = (_quick(arguments.overrides) if arguments.quick else {}) | arguments.overrides
    recipe = load_recipe(path, overrides)
    if arguments.quick and recipe.trainer.get("push_to_hub") and "trainer.push_to_hub" not in arguments.overrides:
        # A quick run must not replace a trained model on the Hub.
        recipe = load_recipe(path, overrides | {"trainer.push_to_hub": "false"})
    check_before_training(recipe.name, recipe.settings, recipe.task, recipe.config)
    if arguments.dry_run:
        PartialState().print(dry_run(recipe))
        return 0
    output = arguments.output or Path("runs") / _run_name(recipe.name, arguments.quick, arguments.overrides)
    # Only one of several processes prints.
    PartialState().print(
        f"{recipe.name}: {recipe.config.attention_type} attention on {recipe.task.name}, into {output}", flush=True
    )
    code = 0
    try:
        record = train(
            recipe,
            output,
            overwrite=arguments.overwrite,
            max_minutes=arguments.max_minutes,
            num_samples=_QUICK_SAMPLES if arguments.quick else None,
        )
        PartialState().print(f"{_report(recipe, record)}\nWeights, code and run.json are in {output}")
        if recipe.trainer.get("push_to_hub") and PartialState().is_main_process:
            print(publish_run(output, recipe.trainer["hub_model_id"], recipe.trainer.get("hub_private_repo")))
    except Stopped as stopped:
        again = " Give it without --overwrite, which would start over." if arguments.overwrite else ""
        PartialState().print(f"{stopped}{again}", file=sys.stderr)
        code = stopped.exit_code
    # Without this, the threads of the process group may abort the process at exit.
    PartialState().destroy_process_group()
    return code


def _quick(overrides: dict[str, str]) -> dict[str, str]:
    """The settings that make a quick run of any recipe. The number of steps may be overridden."""
    text = overrides.get("trainer.max_steps", str(_QUICK_STEPS))
    steps = TRAINER["max_steps"].read("--trainer.max_steps", text)
    tenth = str(max(1, steps // 10))
    return {
        "trainer.max_steps": str(steps),
        "trainer.warmup_steps": str(steps // 10),
        "trainer.logging_steps": tenth,
        "trainer.eval_steps": str(max(1, steps // 2)),
        "trainer.save_steps": str(max(1, steps // 2)),
        "trainer.eval_samples": str(_QUICK_SAMPLES),
    }


def _run_name(recipe: str, quick: bool, overrides: dict[str, str]) -> str:
    """The name of a run's folder, made of the recipe and the overrides, or a digest of them if they are long."""
    changed = "-".join(f"{key}={value}" for key, value in overrides.items())
    return recipe + "-quick" * quick + (changed and f"-{folder_name(changed)}")


def _report(recipe, record) -> str:
    """A table of the scores per split and, for the paper's tasks, the paper's and the share of its budget that was used."""
    from ..runs.paper import paper_result

    paper = paper_result(recipe.settings)
    metric_names = recipe.task.metric_names
    heading = f"{'paper, full budget':>22}" if recipe.task.paper else ""
    lines = [f"{'split':<15}" + "".join(f"{name:>18}" for name in metric_names) + heading]
    for split, scores in record.metrics.items():
        theirs = "-"
        if paper and paper.metric.startswith(f"{split}/"):
            theirs = f"{paper.metric.partition('/')[2]} {paper.mean:.4f} ± {paper.standard_error:.4f}"
        # A score that could not be computed on any sample is missing from the record.
        ours = [f"{scores[name]:.4f}" if name in scores else "-" for name in metric_names]
        lines.append(f"{split:<15}" + "".join(f"{score:>18}" for score in ours) + (f"{theirs:>22}" if heading else ""))
    minutes = f"{record.seconds / 60:.1f} minutes of training"
    if paper:
        share = record.samples_seen / paper.num_samples
        lines.append(f"{record.samples_seen:,} training samples, {share:.1%} of the paper's budget, in {minutes}")
    else:
        why = "; the paper has no such run" if recipe.task.paper else ""
        lines.append(f"{record.samples_seen:,} training samples in {minutes}{why}")
    if recipe.expect:
        split, _, name = recipe.expect.metric.partition("/")
        lines.append(
            f"Expected: {recipe.expect.metric} = {recipe.expect.value} ± {recipe.expect.tolerance} ({recipe.expect.source}); "
            f"reached {record.metrics[split][name]:.4f}"
        )
    return "\n".join(lines)
