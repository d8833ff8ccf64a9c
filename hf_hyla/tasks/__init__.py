"""The paper's compositional tasks."""

import dataclasses
import difflib
from typing import Any

from .base import Task, TaskDataset
from .logic import LogicTask
from .sraven import SravenTask


TASKS: dict[str, type[Task]] = {task.name: task for task in (LogicTask, SravenTask)}


def get_task(name: str, **settings: Any) -> Task:
    """
    The task of that name.

    Args:
        name: `"logic"` or `"sraven"`.
        settings: see `LogicTask` and `SravenTask`.

    Raises:
        ValueError: for an unknown task or setting, with the nearest name, and for settings that make no sense.
        TypeError: for a setting of the wrong type.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}{nearest(name, TASKS)}: expected one of {', '.join(TASKS)}.")
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"The task {name} has no setting {setting!r}{nearest(setting, known)}: expected {', '.join(known)}."
            )
    return TASKS[name](**settings)


def nearest(name: str, known) -> str:
    """`", did you mean 'x'?"`, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


__all__ = ["TASKS", "LogicTask", "SravenTask", "Task", "TaskDataset", "get_task"]
