"""`hyla publish`: publishing a finished run on the Hub."""

import argparse
from pathlib import Path

from .card import add_run_arguments, find_runs


def add(commands) -> None:
    parser = commands.add_parser(
        "publish",
        help="publish a finished run on the Hub, with its card",
        description="Publishes a finished run on the Hub: weights, code, card, pictures, record and recipe, in one commit. "
        "Repeating the command changes nothing that is already there. With --output, everything is written into a folder "
        "instead, from which it can also be published.",
    )
    add_run_arguments(parser)
    parser.add_argument("--repo-id", required=True, help="ORG/NAME of the model's repository")
    parser.add_argument(
        "--dataset", metavar="DIR", type=Path, help="also publish this folder, which `hyla data` wrote"
    )
    parser.add_argument("--metric", action="store_true", help="also publish the task's metric")
    parser.add_argument("--space", action="store_true", help="also publish a page for trying the model")
    parser.add_argument(
        "--beside",
        metavar="MODEL",
        nargs="+",
        default=(),
        help="other published models that the page of --space shows too",
    )
    parser.add_argument("--collection", metavar="TITLE", help="put all published repositories into this collection")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="make new repositories private (default: what trainer.hub_private_repo of the run's recipe says)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and send nothing")
    parser.add_argument(
        "--output", type=Path, help="write each repository into a folder of its name inside this folder; send nothing"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    folder, others = find_runs(arguments)
    if arguments.beside and not arguments.space:
        raise ValueError("--beside names models for the page that --space publishes: add --space.")

    from ..hub.publish import publish
    from ..hub.repository import plan, write_all
    from ..runs import Run

    finished = Run.load(folder)
    repositories = plan(
        finished,
        arguments.repo_id,
        dataset=arguments.dataset,
        metric=arguments.metric,
        space=arguments.space,
        beside=arguments.beside,
        others=others,
    )
    print("\n".join(repository.listing() for repository in repositories), flush=True)
    if arguments.output:
        write_all(repositories, arguments.output)
    elif not arguments.dry_run:
        private = arguments.private
        if private is None:
            private = finished.record.recipe["trainer"].get("hub_private_repo")
        print("\n".join(publish(repositories, private=private, collection=arguments.collection)))
