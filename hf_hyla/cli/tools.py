"""What comes before and after runs: data, probes, benchmarks, cards, publishing, conversion."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .runs import task_of_model


def add_probe(commands) -> None:
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
    from ..analysis.report import probe_report, table
    from ..runs.folder import PROBE_NAME, weights_digest
    from ..runs.record import RECORD_NAME, environment, hardware
    from ..training.weights import load_model

    task = task_of_model(arguments)
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


def add_bench(commands) -> None:
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
    from ..benchmark import LENGTHS, PARTS, as_table, benchmark
    from ..runs.plots import can_draw, length_curves
    from ..utils import nearest, write_whole

    if arguments.task not in (None, *PARTS):
        raise ValueError(
            f"--task must be one of {', '.join(PARTS)}, got {arguments.task!r}{nearest(arguments.task, PARTS)}."
        )
    output, file = arguments.output, Path(arguments.json or "-")
    if file.is_dir():
        raise ValueError(f"--json must name a file, but {file} is a folder.")
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


def add_card(commands) -> None:
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
    from ..hub.model_card import write_card

    output = arguments.output or arguments.folder
    for path in write_card(arguments.folder, output, arguments.repo_id, arguments.others):
        print(f"Wrote {path}")


def add_publish(commands) -> None:
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
    from ..hub.publish import plan, publish

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


def add_data(commands) -> None:
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
    from ..hub.dataset_card import write_dataset_card
    from ..tasks.data import write_data

    task = _task_of(arguments.task, arguments.overrides)
    splits = list(dict.fromkeys(arguments.split or task.splits))
    manifest = write_data(task, splits, arguments.num_examples, arguments.output)
    write_dataset_card(task, arguments.output)
    for split in splits:
        print(f"{split}: {manifest.splits[split]['num_examples']:,} examples")
    print(f"Fingerprint {manifest.data_fingerprint}\nParquet files, task.json and card are in {arguments.output}")


def add_ceiling(commands) -> None:
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
    from ..runs.record import environment
    from ..tasks.observer import observer_record

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
    from ..training.recipe import checked_task

    return checked_task("--task", {"name": name}, {key.partition(".")[2]: value for key, value in overrides.items()})


def add_convert(commands) -> None:
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
    from ..convert import convert_files

    convert_files(arguments.params, arguments.config, arguments.output, arguments.num_answers)
    print(f"Wrote {arguments.output}")


def add_env(commands) -> None:
    parser = commands.add_parser(
        "env", help="print versions and hardware", description="Prints versions and hardware as JSON."
    )
    parser.set_defaults(run=_env)


def _env(arguments: argparse.Namespace) -> None:
    from ..runs.record import environment, hardware

    print(json.dumps({"environment": environment(), "hardware": hardware()}, indent=2))
