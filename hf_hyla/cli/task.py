"""The task that a command works on."""

import argparse
import sys
from pathlib import Path

from ..settings import TASKS
from .parser import one_of


def task_name(text: str) -> str:
    """An argument type for the name of a task, or `module:Class` for a user's own task."""
    return text if ":" in text else one_of(TASKS)(text)


def task_of(name: str, overrides: dict[str, str]):
    """
    The task with this name and the settings in the overrides.

    Raises:
        ValueError: for settings that are wrong, and for a `task.name` among them.
    """
    from ..training.recipe import checked_task

    return checked_task("--task", {"name": name}, _by_key(overrides), may_import=True)


def task_of_model(arguments: argparse.Namespace):
    """
    The task that `--task` names, or else that of the run that made `arguments.model`, with the settings in the overrides. Settings
    that nothing names are the defaults, and are printed.

    Raises:
        ValueError: if neither names a task.
        FileNotFoundError: if the folder holds no model.
    """
    from ..runs.folder import trained_task
    from ..runs.record import RECORD_NAME
    from ..training.recipe import checked_task

    folder = Path(arguments.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: expected a folder with config.json and model.safetensors.")
    settings = trained_task(arguments.model)
    is_assumed = bool(arguments.task) and arguments.task != settings.get("name")
    if is_assumed:
        settings = {"name": arguments.task}
    if not settings:
        raise ValueError(
            f"{arguments.model} has no {RECORD_NAME} that names a task: pass --task with one of {', '.join(TASKS)}."
        )
    # A record may have been downloaded, so only a task that the user has named is imported.
    task = checked_task("--task", settings, _by_key(arguments.overrides), may_import=bool(arguments.task))
    if is_assumed:
        used = ", ".join(f"{name} {value}" for name, value in task.settings.items())
        print(
            f"{arguments.model} has no {RECORD_NAME} of the task {task.name}, so these settings are assumed, and "
            f"--task.NAME VALUE gives others: {used}.",
            file=sys.stderr,
        )
    return task


def _by_key(overrides: dict[str, str]) -> dict[str, str]:
    settings = {key.partition(".")[2]: value for key, value in overrides.items()}
    if "name" in settings:
        raise ValueError(
            "--task.name is a setting of recipes, but the command names its task itself: leave it out, see --help."
        )
    return settings
