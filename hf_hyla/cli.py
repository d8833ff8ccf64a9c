"""The `hyla` command. Each command imports what it needs; bad input ends with one sentence and exit code 2."""

import argparse
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any


def parse(argv: list[str]) -> argparse.Namespace:
    """
    The arguments of a command; `run` is its function, and `overrides` its `--section.key value` by key.

    Raises:
        ValueError: for an unknown argument. argparse exits by itself for a missing one.
    """
    parser = argparse.ArgumentParser(prog="hyla", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adds = (
        _add_train,
        _add_evaluate,
        _add_probe,
        _add_compare,
        _add_sweep,
        _add_data,
        _add_ceiling,
        _add_bench,
        _add_card,
        _add_publish,
        _add_convert,
        _add_env,
    )
    for add in adds:
        add(commands)
    rest, overrides = _split_overrides(argv)
    arguments, unknown = parser.parse_known_args(rest)
    accepted = getattr(arguments, "sections", ())
    unknown += [f"--{key}" for key in overrides if key.partition(".")[0] not in accepted]
    if unknown:
        expected = " or ".join(f"--{section}.key value" for section in accepted)
        raise ValueError(
            f"Unknown argument {unknown[0]!r}" + (f": expected {expected}." if expected else "; see --help.")
        )
    arguments.overrides = overrides
    return arguments


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return arguments.run(arguments) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"hyla: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hyla: interrupted", file=sys.stderr)
        return 130


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
        "is given again. SIGTERM saves, stops and ends with exit code 143; --max-minutes saves, stops and ends with 0.",
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

    from .training import Stopped, load_recipe, train
    from .training.dry_run import dry_run
    from .training.processes import check_launch

    check_launch()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.max_minutes is not None and not arguments.max_minutes > 0:
        raise ValueError(f"--max-minutes must be larger than 0, got {arguments.max_minutes}.")
    if arguments.dry_run:
        PartialState().print(dry_run(recipe))
        return 0
    slug = "".join(f"-{key}={value}" for key, value in arguments.overrides.items())
    output = arguments.output or Path("runs") / (recipe.name + slug.replace("/", "_"))
    # Of several processes one prints.
    PartialState().print(
        f"{recipe.name}: {recipe.config.attention_type} attention on {recipe.task.name}, into {output}", flush=True
    )
    try:
        record = train(recipe, output, overwrite=arguments.overwrite, max_minutes=arguments.max_minutes)
    except Stopped as stopped:
        PartialState().print(stopped, file=sys.stderr)
        return 143 if stopped.by_signal else 0
    PartialState().print(f"{_report(recipe, record)}\nWeights, code and run.json are in {output}")
    return 0


def _report(recipe, record) -> str:
    """Scores per split beside the paper's, and what share of the paper's budget they took."""
    from .paper import paper_result

    # The paper has no run that starts from a checkpoint.
    paper = None if "model_name_or_path" in recipe.settings["model"] else paper_result(recipe.task, recipe.config)
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
    parser.add_argument(
        "--by-combination", action="store_true", help="score every combination of rules or terms by itself"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_evaluate, sections=("task",))


def _evaluate(arguments: argparse.Namespace) -> None:
    from .training import evaluate
    from .training.weights import load_model

    task = _task_of_model(arguments)
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
    from .analysis.combinations import score_by_combination, table
    from .training.record import environment

    found = score_by_combination(model, task, arguments.split, arguments.num_samples, arguments.batch_size)
    if arguments.json:
        about = {"model": arguments.model, "task": task.settings, "split": arguments.split}
        print(json.dumps(about | {"combinations": found, "environment": environment()}, indent=1))
    else:
        print(table(found, task.metric_names[0]))


def _task_of_model(arguments: argparse.Namespace):
    """The task of the run that `arguments.model` is, or that `--task` names, with the settings among the overrides."""
    from .training import RunRecord
    from .training.recipe import checked_task

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


def _add_probe(commands) -> None:
    parser = commands.add_parser(
        "probe",
        help="what the latent codes of a run or a model tell",
        description="Fits probes on the latent codes of training tasks and scores them on another split: which rule or "
        "terms, and which value, the code of an answer token tells. Writes probe.json and figures. A run knows its task; "
        "for any other model name it, with its settings as --task.num_examples 32.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder of a run or a checkpoint, or a Hub repository")
    parser.add_argument("--task", help="name of the task (default: the run's)")
    parser.add_argument("--split", default="ood", help="split to score on (default: ood)")
    parser.add_argument("--train-samples", type=int, default=5_000, help="samples to fit probes on (default: 5000)")
    parser.add_argument("--num-samples", type=int, default=5_000, help="samples to score on (default: 5000)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to write (default: probe/ in a run's folder, where its card finds it, or runs/probe- and the model's name)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of controls, standard errors and maps (default: 0)")
    parser.add_argument(
        "--ablate", action="store_true", help="also score the model with each head's code averaged away"
    )
    parser.add_argument(
        "--fixed-query", action="store_true", help="ask all functions of fuzzy logic for the same point"
    )
    parser.set_defaults(run=_probe, sections=("task",))


def _probe(arguments: argparse.Namespace) -> None:
    from .analysis.report import probe_report, table
    from .training.record import PROBE_NAME, RECORD_NAME, environment, hardware, weights_digest
    from .training.weights import load_model

    task = _task_of_model(arguments)
    folder = Path(arguments.model)
    of_a_run = folder / PROBE_NAME if (folder / RECORD_NAME).exists() else None
    output = arguments.output or (of_a_run.parent if of_a_run else Path("runs") / f"probe-{folder.name}")
    model = load_model(arguments.model)
    about = {
        "model": arguments.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_digest(folder) if folder.is_dir() else None,
    }
    report = probe_report(
        model,
        task,
        arguments.split,
        arguments.train_samples,
        arguments.num_samples,
        arguments.seed,
        arguments.ablate,
        arguments.fixed_query,
        output,
        progress=True,
        about=about | {"environment": environment(), "hardware": hardware()},
    )
    print(f"{table(report)}\n{len(report['figures'])} figures and probe.json are in {output}")


def _add_compare(commands) -> None:
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
    from .compare import MISSED, as_json, compare, find_records, table

    comparisons = compare(find_records(arguments.runs))
    print(as_json(comparisons) if arguments.json else table(comparisons))
    return int(any(one.verdict == MISSED for one in comparisons))


def _add_sweep(commands) -> None:
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
    from .compare import compare, find_records, table
    from .sweep import load_sweep, run_sweep

    sweep = load_sweep(arguments.sweep)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {arguments.jobs}.")
    output = arguments.output or Path("runs") / sweep.name
    print(f"{sweep.name}: {len(sweep.points)} runs of {sweep.base}, into {output}", flush=True)
    if arguments.dry_run:
        print("\n".join(point.folder for point in sweep.points))
        return 0
    done: list[Path] = []
    # As an exception, so that the runs are stopped with the sweep.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        for point, outcome in run_sweep(sweep, output, arguments.jobs):
            print(f"{point.folder}: {outcome}", flush=True)
            if not outcome.startswith("failed"):
                done.append(output / point.folder)
    finally:
        signal.signal(signal.SIGTERM, before)
    if done:
        print(table(compare(find_records(done))))
    return int(len(done) < len(sweep.points))


def _add_bench(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time and memory of attention, training steps and data",
        description="Measures attention by every backend and by torch's softmax attention, the training steps of the SRAVEN "
        "and logic recipes, and how fast data are made, in turn in one run. A backend that does not compute what the "
        "definition says gets no speed; the others are measured, and the exit code is 1. Takes some minutes.",
        allow_abbrev=False,
    )
    parser.add_argument("--task", help="attention, sraven, logic or data (default: all)")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="write JSON, into FILE or to standard output"
    )
    parser.add_argument("--output", type=Path, help="folder to write bench.json and the curves bench.png into")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's number)")
    parser.add_argument("--repeats", type=int, help="measurements of each (default: as fit into 10 seconds, 5 to 100)")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the attention curves (default: 128 to 4096)")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from .benchmark import LENGTHS, PARTS, as_table, benchmark
    from .plots import can_draw, length_curves
    from .tasks import nearest
    from .training.checkpoint import write_whole

    if arguments.task not in (None, *PARTS):
        raise ValueError(
            f"--task must be one of {', '.join(PARTS)}, got {arguments.task!r}{nearest(arguments.task, PARTS)}."
        )
    output, file = arguments.output, Path(arguments.json or "-")
    for folder in (output, file.parent):  # before minutes of work
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    files = ([output / "bench.json"] if output else []) + ([file] if arguments.json not in (None, "-") else [])

    def save(result: dict[str, Any]) -> None:
        for path in files:
            write_whole(path, json.dumps(result, indent=2) + "\n")

    result = benchmark(
        (arguments.task,) if arguments.task else PARTS,
        threads=arguments.threads,
        repeats=arguments.repeats,
        lengths=tuple(arguments.lengths or LENGTHS),
        say=lambda line: print(line, file=sys.stderr, flush=True),
        save=save,
    )
    print(json.dumps(result, indent=2) if arguments.json == "-" else as_table(result))
    if output:
        if can_draw() and (curves := length_curves(result["rows"])):
            (output / "bench.png").write_bytes(curves)
        else:
            print("bench.png is not drawn: it takes matplotlib and rows of attention.", file=sys.stderr)
    for sentence in result["failed"]:
        print(f"hyla: {sentence}", file=sys.stderr)
    return int(bool(result["failed"]))


def _add_card(commands) -> None:
    parser = commands.add_parser(
        "card",
        help="write the card of a finished run",
        description="Writes the card of a finished run: README.md, its pictures and .eval_results/. Needs no network.",
        allow_abbrev=False,
    )
    _add_card_arguments(parser)
    parser.add_argument("--repo-id", help="ORG/NAME that the card is for (default: it loads the model from RUN)")
    parser.add_argument("--output", type=Path, help="folder to write into (default: RUN)")
    parser.set_defaults(run=_card)


def _add_card_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--with",
        dest="others",
        metavar="RUN",
        nargs="+",
        type=Path,
        default=(),
        help="runs of the same recipe with other seeds (folders, or records as JSON), for the spread",
    )


def _card(arguments: argparse.Namespace) -> None:
    from .hub.card import write_card

    output = arguments.output or arguments.folder
    for path in write_card(arguments.folder, output, arguments.repo_id, arguments.others):
        print(f"Wrote {path}")


def _add_publish(commands) -> None:
    parser = commands.add_parser(
        "publish",
        help="publish a finished run on the Hub, with its card",
        description="Publishes a finished run on the Hub: weights, code, card, pictures, record and recipe, in one commit. "
        "Given again, the command changes nothing that is there already. With --output everything is written into a folder "
        "instead, from where it can be published too.",
        allow_abbrev=False,
    )
    _add_card_arguments(parser)
    parser.add_argument("--repo-id", required=True, help="ORG/NAME of the model's repository")
    parser.add_argument("--dataset", metavar="DIR", type=Path, help="publish this folder of `hyla data` too")
    parser.add_argument("--metric", action="store_true", help="publish the task's metric too")
    parser.add_argument("--space", action="store_true", help="publish a page that asks the model too")
    parser.add_argument("--collection", metavar="TITLE", help="put all of them into this collection")
    parser.add_argument("--private", action="store_true", default=None, help="make new repositories private")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and send nothing")
    parser.add_argument(
        "--output", type=Path, help="folder to write repositories into, each by its name; send nothing"
    )
    parser.set_defaults(run=_publish)


def _publish(arguments: argparse.Namespace) -> None:
    from .hub.publish import plan, publish

    repositories = plan(
        arguments.folder,
        arguments.repo_id,
        dataset=arguments.dataset,
        metric=arguments.metric,
        space=arguments.space,
        others=arguments.others,
    )
    print("\n".join(repository.listing() for repository in repositories), flush=True)
    if arguments.output:
        for repository in repositories:
            repository.write(arguments.output / repository.repo_id.partition("/")[2])
    elif not arguments.dry_run:
        print("\n".join(publish(repositories, private=arguments.private, collection=arguments.collection)))


def _add_data(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="write a task's samples as a dataset",
        description="Writes the first samples of splits as Parquet files with a dataset card, a folder that load_dataset "
        "reads. Settings of the task as --task.num_features 3. A folder may be filled split by split.",
        allow_abbrev=False,
    )
    parser.add_argument("task", help="name of the task")
    parser.add_argument("--split", nargs="+", help="splits to write (default: all)")
    parser.add_argument("--num-examples", type=int, help="examples per split (default: the paper's number)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.set_defaults(run=_data, sections=("task",))


def _data(arguments: argparse.Namespace) -> None:
    from .tasks.data import write_data

    task = _task_of(arguments.task, arguments.overrides)
    splits = list(dict.fromkeys(arguments.split or task.splits))
    manifest = write_data(task, splits, arguments.num_examples, arguments.output)
    for split in splits:
        print(f"{split}: {manifest.splits[split]['num_examples']:,} examples")
    print(f"Fingerprint {manifest.data_fingerprint}\nParquet files, task.json and card are in {arguments.output}")


def _add_ceiling(commands) -> None:
    parser = commands.add_parser(
        "ceiling",
        help="what an ideal observer reaches on SRAVEN",
        description="Scores the ideal observer of SRAVEN, who knows how puzzles are made and answers with the most probable "
        "panel: the highest accuracy that any model can expect.",
        allow_abbrev=False,
    )
    parser.add_argument("--num-samples", type=int, default=51_200, help="puzzles per split (default: 51200)")
    parser.add_argument("--output", type=Path, help="JSON file to write the record into")
    parser.set_defaults(run=_ceiling, sections=("task",))


def _ceiling(arguments: argparse.Namespace) -> None:
    from .tasks.observer import observer_record
    from .training.record import environment

    task = _task_of("sraven", arguments.overrides)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    record = observer_record(task, arguments.num_samples) | {"environment": environment()}
    for split, scores in record["splits"].items():
        print(
            f"{split}: accuracy {scores['accuracy']:.4f} ± {scores['standard_error']:.4f}, {arguments.num_samples} puzzles"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def _task_of(name: str, overrides: dict[str, str]):
    """The task of that name, with the settings among the overrides."""
    from .training.recipe import checked_task

    return checked_task("--task", {"name": name}, {key.partition(".")[2]: value for key, value in overrides.items()})


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
