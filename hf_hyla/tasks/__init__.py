"""The paper's compositional tasks."""

import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..utils import nearest, one_line
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
        ValueError: for an unknown task or setting, with the nearest name, and for settings of the wrong type or that
            make no sense.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"There is no task {name!r}{nearest(str(name), TASKS)}: expected one of {', '.join(TASKS)}.")
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"The task {name} has no setting {setting!r}{nearest(setting, known)}: expected {', '.join(known)}."
            )
    try:
        return TASKS[name](**settings)
    except StrictDataclassError as error:
        raise ValueError(f"Task {name}: {one_line(error)}") from None


__all__ = ["TASKS", "LogicTask", "SravenTask", "Task", "TaskDataset", "get_task"]
