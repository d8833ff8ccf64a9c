"""The paper's compositional tasks, language, and users' own tasks."""

import dataclasses
import importlib
import re
import sys
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..utils import nearest, one_line
from .base import PaperRuns, Task, TaskDataset
from .logic import LogicTask
from .sraven import SravenTask
from .subject import Subject
from .text import TextTask
from .words import HubMetric, Words


TASKS: dict[str, type[Task]] = {task.name: task for task in (LogicTask, SravenTask, TextTask)}


def get_task(name: str, **settings: Any) -> Task:
    """
    The task with this name and these settings.

    Args:
        name: `"logic"`, `"sraven"`, `"text"`, or `"module:Class"` for a user's own task, whose module must have been imported.
        settings: see `LogicTask`, `SravenTask` and `TextTask`.

    Raises:
        ValueError: for an unknown task or setting, with the nearest name, and for a setting of the wrong type or with an
            impossible value.
    """
    task = find_task(name)
    known = [field.name for field in dataclasses.fields(task)]
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"The task {name} has no setting {setting!r}{nearest(setting, known)}: expected {', '.join(known)}."
            )
    try:
        return task(**settings)
    except StrictDataclassError as error:
        raise ValueError(f"Task {name}: {one_line(error)}") from None


def find_task(name: str, may_import: bool = False) -> type[Task]:
    """
    The class of the task with this name, see `get_task`.

    Args:
        may_import:
            whether `"module:Class"` may import its module, which runs the module's code. Allow it only where the user has
            written the name, never where the name comes from a record or another file that may have been downloaded.

    Raises:
        ValueError: if there is no such task, or the module may not be imported.
    """
    if not isinstance(name, str) or (name not in TASKS and not re.fullmatch(r"[\w.]+:\w+", name)):
        raise ValueError(
            f"There is no task {name!r:.80}{nearest(str(name), TASKS)}: expected one of {', '.join(TASKS)}, or module:Class for "
            "a task of your own."
        )
    if name in TASKS:
        return TASKS[name]
    module, _, class_name = name.partition(":")
    if module not in sys.modules and not may_import:
        raise ValueError(
            f"The task {name} is code in the module {module}, and a name in a file is not enough to run it: if you trust the "
            f"module, import it first, on the command line by `hyla --import {module}` before the command."
        )
    import_module(module)
    task = getattr(sys.modules[module], class_name, None)
    if not isinstance(task, type) or not issubclass(task, Task):
        raise ValueError(f"{name} is not a task: expected a subclass of hf_hyla.tasks.Task.")
    _check_users_task(name, task)
    return task


def _check_users_task(name: str, task: type[Task]) -> None:
    if "__dataclass_fields__" not in vars(task):
        # Its settings would be attributes that no record holds.
        raise ValueError(f"The task {name} is not a dataclass: put @dataclasses.dataclass before the class.")
    names = [attribute for attribute in ("model_columns", "metric_names") if not getattr(task, attribute, None)]
    if left := sorted(task.__abstractmethods__) + names:
        raise ValueError(f"The task {name} is incomplete: it lacks {', '.join(left)}.")
    if not re.fullmatch("[a-z][a-z0-9_]*", getattr(task, "name", "")) or task.name in TASKS:
        raise ValueError(
            f"The task {name} needs a name in lower case and without spaces, such as {task.__name__.lower()!r}; "
            f"{', '.join(TASKS)} are taken."
        )
    if task.headline_split not in task.splits or "train" not in task.splits:
        raise ValueError(
            f"The task {name} has the splits {', '.join(task.splits)}, but its splits must include train and its "
            f"headline_split, which is {task.headline_split}."
        )


def import_module(module: str) -> None:
    """
    Imports a module that holds tasks.

    Raises:
        ValueError: if it cannot be imported.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the module's code raises
        raise ValueError(
            f"The module {module} cannot be imported ({type(error).__name__}: {one_line(error)}): if it is in this folder, put "
            "PYTHONPATH=. before the command."
        ) from error


__all__ = [
    "TASKS",
    "HubMetric",
    "LogicTask",
    "PaperRuns",
    "SravenTask",
    "Subject",
    "Task",
    "TaskDataset",
    "TextTask",
    "Words",
    "find_task",
    "get_task",
]
