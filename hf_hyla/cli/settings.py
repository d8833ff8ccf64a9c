"""The settings that the command line takes as `--section.key value`: errors for wrong names and values, before torch is imported."""

import argparse
import difflib
from collections.abc import Collection

from ..paths import find_recipe
from ..reading import read_yaml
from ..settings import EXPECT, MODEL, REFUSED, SECTIONS, TASKS, TRAINER
from ..utils import nearest


# A name that is this similar to a known one is taken to be misspelt. Keys that a recipe refuses for other reasons are less
# similar to any known name.
_MISSPELT = 0.9


def unknown_argument(word: str, options: Collection[str], sections: Collection[str]) -> str:
    """The error message for an unknown argument of a command that has these options and sections of settings."""
    if not word.startswith("-"):
        return f"Unknown argument {word!r}; see --help."
    section, dot, name = word.partition("=")[0].lstrip("-").partition(".")
    key = section.replace("-", "_")
    if dot:
        name = name.replace("-", "_")
        near = [f"--{close}.{name}" for close in difflib.get_close_matches(section.lower(), sections, n=1)]
    else:
        near = _near_option(key, options) or _near_settings(key, sections)
    if near:
        return f"Unknown argument {word!r} (did you mean {' or '.join(near)}?)."
    expected = " or ".join(f"--{one}.key value" for one in sections)
    return f"Unknown argument {word!r}" + (f": expected {expected}." if expected else "; see --help.")


def _near_option(key: str, options: Collection[str]) -> list[str]:
    by_key = {option.strip("-").replace("-", "_"): option for option in options}
    return [by_key[close] for close in difflib.get_close_matches(key, by_key, n=1, cutoff=0.75)]


def _near_settings(key: str, sections: Collection[str]) -> list[str]:
    """The settings with this name, or else those whose names contain it, or else the one with the nearest name."""
    names = [name for section in sections for name in SECTIONS[section]]
    chosen = (
        [name for name in names if name == key]
        or [name for name in names if len(key) > 3 and key in name][:2]
        or difflib.get_close_matches(key, names, n=1)
    )
    return [f"--{section}.{name}" for section in sections for name in SECTIONS[section] if name in chosen]


def check_settings(overrides: dict[str, str], task: str | None) -> None:
    """
    Args:
        task: the name of the task, or `None` if it is not known yet.

    Raises:
        ValueError: for a name or a value that no recipe may have. What depends on other settings or on installed packages, and the
            settings of users' tasks, are left to the recipe.
    """
    of_task = TASKS.get(task or "", {})
    rows = {"task": of_task, "model": MODEL, "trainer": TRAINER, "expect": EXPECT}
    for full, text in overrides.items():
        section, _, name = full.partition(".")
        if name in rows[section]:
            rows[section][name].read(f"--{full}", text)
        elif reason := REFUSED[section].get(name):
            raise ValueError(f"--{full} {reason}; leave it out.")
        elif section == "task" and task is not None:
            if of_task and name not in ("name", "data"):
                raise ValueError(
                    f"The task {task} has no setting --{full}{nearest(name, of_task)}: expected {', '.join(of_task)}."
                )
        elif near := _misspelt(name, SECTIONS[section]):
            raise ValueError(f"There is no setting --{full} (did you mean --{section}.{near}?).")


def _misspelt(name: str, known: Collection[str]) -> str | None:
    """The known setting that this name probably misspells, or `None`."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=_MISSPELT)
    return near[0] if near and name not in known else None


def task_named(arguments: argparse.Namespace, overrides: dict[str, str]) -> str | None:
    """The name of the task that a command is about, or `None` if only a model's record or the recipe's own checks can tell."""
    if "task" not in arguments.sections or not hasattr(arguments, "recipe"):
        return getattr(arguments, "task", None)
    try:
        name = overrides.get("task.name") or read_yaml(find_recipe(arguments.recipe))["task"]["name"]
    except (ValueError, TypeError, KeyError):  # which `load_recipe` reports
        return None
    return name if isinstance(name, str) else None
