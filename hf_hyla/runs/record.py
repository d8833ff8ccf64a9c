"""run.json: the record of a run, from which cards and tables are made; and what is computed of several records."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..utils import one_line, write_whole


RECORD_NAME = "run.json"
SCHEMA_VERSION = 1
# Keys of a recipe's section `trainer` that say where the finished run is published.
HUB_KEYS = ("push_to_hub", "hub_model_id", "hub_private_repo")
# The settings in which runs of one recipe may differ: seeds, where their samples are read from, and where they are published.
_OF_ONE_RUN = {"task.seed", "trainer.seed", "task.data", *(f"trainer.{key}" for key in HUB_KEYS)}
_PACKAGES = ("hf-hyla", "torch", "transformers", "accelerate", "datasets", "evaluate", "safetensors", "numpy")


@strict
@dataclasses.dataclass
class RunRecord:
    """
    The record of a run; a value of another type than it has here is refused.

    Attributes:
        name: of the recipe.
        recipe: the sections task, model, trainer and, where the run was expected to reach something, expect; overrides
            applied.
        seeds: `task`, of held-out combinations and samples; `trainer`, of initial weights and dropout.
        num_parameters: of the model.
        steps, samples_seen: updates made and training samples they used.
        seconds: wall time of training, including evaluations during it and what came before interruptions.
        metrics: per split, the scores and `num_samples`, the number of samples they were measured on.
        curve: log entries in order; each has `step` and `seconds`, training entries `loss` and `learning_rate`, evaluation
            entries scores named `split/metric`.
        environment, hardware: see `environment` and `hardware`.
        data_fingerprint: `Task.fingerprint`, which proves which data were trained and scored on; `None` in records that are
            older than it.
        schema_version: of this format; it rises when a field is removed or changes its meaning. New fields have a default, so
            that older records load.
    """

    name: str
    recipe: dict[str, dict[str, Any]]
    seeds: dict[str, int]
    num_parameters: int
    steps: int
    samples_seen: int
    seconds: int | float
    metrics: dict[str, dict[str, int | float]]
    curve: list[dict[str, int | float]]
    environment: dict[str, Any]
    hardware: dict[str, Any]
    data_fingerprint: str | None = None
    schema_version: int = SCHEMA_VERSION

    def save(self, folder: Path) -> None:
        """Writes run.json whole or not at all."""
        write_whole(folder / RECORD_NAME, json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "RunRecord":
        """
        The record in a run's folder, or in a JSON file.

        Raises:
            OSError: if there is no run.json.
            ValueError: if it is not a record of this schema.
        """
        path = Path(path) if Path(path).is_file() else Path(path) / RECORD_NAME
        try:
            record = cls(**json.loads(path.read_text(encoding="utf-8")))
            record._check()
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ValueError(
                f"{path} is not a run record of schema {SCHEMA_VERSION} ({one_line(error)}): train the run again, or update hf_hyla."
            ) from None
        return record

    def _check(self) -> None:
        """Checks what types cannot express."""
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {self.schema_version}")
        for section, key, kind in (("task", "name", str), ("trainer", "max_steps", int)):
            if not isinstance(self.recipe.get(section, {}).get(key), kind):
                raise ValueError(f"its recipe lacks {section}.{key}")
        if "model" not in self.recipe:
            raise ValueError("its recipe lacks the section model")


def by_key(settings: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings by `section.key`, without what is expected of its run, which may change with what is known."""
    return {
        f"{section}.{key}": value
        for section, values in settings.items()
        if section != "expect"
        for key, value in values.items()
    }


def first_difference(settings: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first `section.key` by which two runs with these settings differ; `None` if they are the same run."""
    ours, theirs = by_key(settings), by_key(other)
    missing = object()
    return next((key for key in ours | theirs if ours.get(key, missing) != theirs.get(key, missing)), None)


def tells_recipes_apart(key: str) -> bool:
    """Whether runs that differ in this `section.key` are runs of different recipes."""
    return key not in _OF_ONE_RUN and not key.startswith("expect.")


def without_seeds(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings by `section.key` that runs of one recipe share: runs with equal ones differ in their seeds only."""
    return {key: value for key, value in by_key(settings).items() if tells_recipes_apart(key)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of some values, and its standard error, which needs two."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def environment() -> dict[str, Any]:
    """Versions of Python and packages, and the git commit where the package is a checkout."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    # torch's own version also names what it was built for, which not every distribution's metadata does.
    return versions | {"torch": str(torch.__version__), "git_commit": _git_commit()}


def hardware() -> dict[str, Any]:
    """What the run runs on, without anything that names the machine."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _git_commit() -> str | None:
    """The commit of the checkout this package lies in, with `+changes` where files differ from it."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
