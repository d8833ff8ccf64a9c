"""The `hyla` command. Each command imports what it needs; bad input ends with one sentence and exit code 2."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hyla", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_train, _add_evaluate, _add_convert, _add_env):
        add(commands)
    try:
        rest, overrides = _split_overrides(sys.argv[1:] if argv is None else argv)
        arguments, unknown = parser.parse_known_args(rest)
        accepted = getattr(arguments, "sections", ())
        unknown += [f"--{key}" for key in overrides if key.partition(".")[0] not in accepted]
        if unknown:
            expected = " or ".join(f"--{section}.key value" for section in accepted)
            raise ValueError(
                f"Unknown argument {unknown[0]!r}" + (f": expected {expected}." if expected else "; see --help.")
            )
        arguments.overrides = overrides
        arguments.run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"hyla: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hyla: interrupted", file=sys.stderr)
        return 130
    return 0


def _split_overrides(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--section.key value` and `--section.key=value` out of the words, wherever they stand."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    left = iter(words)
    for word in left:
        key, has_value, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"--\w+\.[\w.]+", "--" + key) or not word.startswith("--"):
            rest.append(word)
            continue
        overrides[key] = value if has_value else next(left, "")
        if not overrides[key]:
            raise ValueError(f"--{key} lacks a value: write --{key} VALUE.")
    return rest, overrides


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a recipe's model and evaluate it on every split",
        description="Trains a recipe's model, evaluates it on every split, and writes weights and run.json. Any value of the "
        "recipe can be overridden: --model.attention_type softmax. A run that was interrupted goes on when the same command "
        "is given again.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="YAML file, see recipes/README.md")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/ and the recipe's name)")
    parser.add_argument("--overwrite", action="store_true", help="remove a run that the folder already holds")
    parser.set_defaults(run=_train, sections=("task", "model", "trainer", "expect"))


def _train(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    from .training import load_recipe, train

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    slug = "".join(f"-{key}={value}" for key, value in arguments.overrides.items())
    output = arguments.output or Path("runs") / (recipe.name + slug.replace("/", "_"))
    # Of several processes one prints.
    PartialState().print(
        f"{recipe.name}: {recipe.config.attention_type} attention on {recipe.task.name}, into {output}", flush=True
    )
    record = train(recipe, output, overwrite=arguments.overwrite)
    PartialState().print(f"{_report(recipe, record)}\nWeights, code and run.json are in {output}")


def _report(recipe, record) -> str:
    """Scores per split beside the paper's, and what share of the paper's budget they took."""
    from .paper import paper_result

    paper = paper_result(recipe.task, recipe.config)
    metric_names = recipe.task.metric_names
    lines = [f"{'split':<15}" + "".join(f"{name:>18}" for name in metric_names) + f"{'paper, full budget':>22}"]
    for split, scores in record.metrics.items():
        theirs = "-"
        if paper and paper.metric.startswith(f"{split}/"):
            theirs = f"{paper.metric.partition('/')[2]} {paper.mean:.4f} ± {paper.standard_error:.4f}"
        lines.append(f"{split:<15}" + "".join(f"{scores[name]:>18.4f}" for name in metric_names) + f"{theirs:>22}")
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


def _add_evaluate(commands) -> None:
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_evaluate, sections=("task",))


def _evaluate(arguments: argparse.Namespace) -> None:
    from .training import RunRecord, evaluate
    from .training.recipe import checked_task

    settings: dict[str, Any] = {}
    folder = Path(arguments.model)
    if (folder / "run.json").exists():
        settings = dict(RunRecord.load(folder).recipe.get("task", {}))
    if arguments.task and arguments.task != settings.get("name"):
        settings = {"name": arguments.task}
    if not settings:
        raise ValueError(f"{arguments.model} has no run.json that names a task: pass --task logic or --task sraven.")
    task = checked_task(
        "--task", settings, {key.partition(".")[2]: value for key, value in arguments.overrides.items()}
    )
    model = _load_model(arguments.model)
    scores = evaluate(model, task, arguments.split, arguments.num_samples, arguments.batch_size)
    if arguments.json:
        print(
            json.dumps({"model": arguments.model, "task": task.settings, "split": arguments.split, "metrics": scores})
        )
    else:
        for name, value in scores.items():
            print(
                f"{arguments.split}/{name}: {value:.4f}"
                if isinstance(value, float)
                else f"{arguments.split}/{name}: {value}"
            )


def _load_model(name: str):
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").exists():
        raise ValueError(f"{name} holds no model: expected a folder with config.json and model.safetensors.")
    if folder.exists() and not list(folder.glob("*.safetensors")):
        raise ValueError(f"{name} holds no weights: expected model.safetensors beside config.json.")
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (SafetensorError, StrictDataclassError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name} lacks weights, {missing[0]} among them: its scores would be those of random numbers."
        )
    return model


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="make a checkpoint of the official implementation's parameters",
        description="Makes a folder that from_pretrained loads of the official JAX implementation's parameters.",
        allow_abbrev=False,
    )
    parser.add_argument("--params", type=Path, required=True, help="safetensors file with tensors named params.<path>")
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the official config and loss_fn")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-answers", type=int, help="last tokens that carry an answer (default: by the loss)")
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import convert_files

    convert_files(arguments.params, arguments.config, arguments.output, arguments.num_answers)
    print(f"Wrote {arguments.output}")


def _add_env(commands) -> None:
    parser = commands.add_parser(
        "env", help="print versions and hardware", description="Prints versions and hardware as JSON."
    )
    parser.set_defaults(run=_env)


def _env(arguments: argparse.Namespace) -> None:
    from .training.record import environment, hardware

    print(json.dumps({"environment": environment(), "hardware": hardware()}, indent=2))
