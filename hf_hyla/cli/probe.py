"""`hyla probe`: what latent codes tell."""

import argparse
from pathlib import Path

from ..paths import find_model
from .parser import whole
from .task import task_name, task_of_model


def add(commands) -> None:
    parser = commands.add_parser(
        "probe",
        help="what the latent codes of a run or a model tell",
        description="Fits probes on the latent codes of training tasks and scores them on another split: which rule or "
        "terms, and which value, the code of an answer token tells. Writes probe.json and figures. A run knows its task; "
        "for any other model name it, with its settings as --task.num_examples 32.",
    )
    parser.add_argument("model", help="folder of a run or a checkpoint, or a Hub repository")
    parser.add_argument("--task", type=task_name, help="name of the task (default: the run's)")
    parser.add_argument("--split", default="ood", help="split to score on (default: ood)")
    parser.add_argument(
        "--train-samples", type=whole(at_least=1), default=5_000, help="samples to fit probes on (default: 5000)"
    )
    parser.add_argument(
        "--num-samples", type=whole(at_least=1), default=5_000, help="samples to score on (default: 5000)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to write (default: probe/ in a run's folder, where its card finds it, or runs/probe- and the model's name)",
    )
    parser.add_argument(
        "--seed", type=whole(at_least=0), default=0, help="of controls, standard errors and maps (default: 0)"
    )
    parser.add_argument(
        "--ablate", action="store_true", help="also score the model with each head's code averaged away"
    )
    parser.add_argument(
        "--fixed-query", action="store_true", help="ask all functions of fuzzy logic for the same point"
    )
    parser.set_defaults(run=run, sections=("task",))


def run(arguments: argparse.Namespace) -> None:
    find_model(arguments.model)

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
        split=arguments.split,
        train_samples=arguments.train_samples,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        ablate=arguments.ablate,
        fixed_query=arguments.fixed_query,
        output=output,
        progress=True,
        about=about | {"environment": environment(), "hardware": hardware()},
    )
    print(f"{table(report)}\n{len(report['figures'])} figures and probe.json are in {output}")
