"""`hyla probe`: probes of latent codes."""

import argparse
from pathlib import Path

from ..paths import find_model
from .parser import whole
from .task import task_name, task_of_model


def add(commands) -> None:
    parser = commands.add_parser(
        "probe",
        help="probe the latent codes of a run or a model",
        description="Fits linear probes on the latent codes of training samples and scores them on another split. The probes "
        "read the rule or the terms, and the value of the answer, from the codes of answer tokens. Writes probe.json and "
        "figures. The task is that of the run. It is also found for a checkpoint of a run, and for a repository that a run was "
        "published to. For any other model, --task names it, and its settings are given like --task.num_examples 32.",
    )
    parser.add_argument("model", help="folder of a run or a checkpoint, or a Hub repository")
    parser.add_argument("--task", type=task_name, help="name of the task (default: that of the model's run)")
    parser.add_argument("--split", help="split to score on (default: ood, or test if the task has no ood)")
    parser.add_argument(
        "--train-samples", type=whole(at_least=1), default=5_000, help="samples to fit probes on (default: 5000)"
    )
    parser.add_argument(
        "--num-samples", type=whole(at_least=1), default=5_000, help="samples to score on (default: 5000)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to write (default: probe/ in a run's folder, where its card finds it, or else runs/probe-NAME)",
    )
    parser.add_argument(
        "--seed",
        type=whole(at_least=0, at_most=2**32 - 1),
        default=0,
        help="seed of controls, standard errors and maps (default: 0)",
    )
    parser.add_argument(
        "--ablate", action="store_true", help="also score the model with each head's code replaced by its mean"
    )
    parser.add_argument(
        "--fixed-query", action="store_true", help="query all functions of fuzzy logic at the same point"
    )
    parser.set_defaults(run=run, sections=("task",))


def run(arguments: argparse.Namespace) -> None:
    named, arguments.model = arguments.model, find_model(arguments.model)

    from ..analysis.report import probe_report, table
    from ..runs.environment import environment, hardware
    from ..runs.folder import PROBE_NAME, weights_digest
    from ..runs.record import RECORD_NAME
    from ..runs.weights import load_model

    task = task_of_model(arguments)
    folder = Path(arguments.model)
    # Nothing is written into the installed package.
    own = arguments.model == named and (folder / RECORD_NAME).exists()
    of_a_run = folder / PROBE_NAME if own else None
    output = arguments.output or (of_a_run.parent if of_a_run else Path("runs") / f"probe-{folder.name}")
    model = load_model(arguments.model, task.auto_class)
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
