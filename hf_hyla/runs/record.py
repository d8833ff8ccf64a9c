"""run.json, the record of a run, from which cards and tables are made; and what is computed from several records."""

import dataclasses
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..reading import read_json
from ..settings import HUB_KEYS
from ..tasks import TASKS, get_task
from ..utils import one_line, write_whole


RECORD_NAME = "run.json"
SCHEMA_VERSION = 1
# The settings in which runs of one recipe may differ: seeds, and what does not change the result. That is where samples are read
# from and how, what is printed, tracked and saved, where a run is published, and whether a GPU replays its steps.
_OF_ONE_RUN = {
    *("task.seed", "trainer.seed", "task.data"),
    *(f"trainer.dataloader_{key}" for key in ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")),
    *(f"trainer.{key}" for key in ("disable_tqdm", "log_level", "log_level_replica", "logging_first_step")),
    *(f"trainer.{key}" for key in ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id")),
    *(f"trainer.{key}" for key in ("save_strategy", "save_steps", "save_total_limit", *HUB_KEYS, "cuda_graphs")),
}
# The files whose digests a record holds.
_DIGESTED = ("config.json", "tokenizer.json", "*.safetensors", "*_hyla.py")
_MAX_NAME_LENGTH = 1000
_NUMBER_LIMIT = 10**30


@strict
@dataclasses.dataclass
class RunRecord:
    """
    The record of a run; a value of another type than it has here is refused.

    Attributes:
        name: the recipe's name.
        recipe: the recipe's sections task, model, trainer and, if it has one, expect, with overrides applied.
        seeds: `task`, the seed of held-out combinations and samples, and `trainer`, the seed of initial weights and dropout.
        num_parameters: the number of the model's parameters.
        steps, samples_seen: the number of updates, and of the training samples that they used.
        seconds: the wall time of training, including evaluations during it and the time before interruptions.
        metrics: per split, the scores and `num_samples`, the number of samples they were measured on.
        curve: log entries in order. Each has `step` and `seconds`; training entries have `loss` and `learning_rate`, and
            evaluation entries have scores named `split/metric`.
        environment, hardware: see `environment` and `hardware`.
        data_fingerprint: `Task.fingerprint`, which proves which data were trained and scored on; `None` in records from before
            this field.
        digests: the digests of the weights, the config and the model's code when the run was finished, see `digests`; `None` in
            records from before this field.
        schema_version: the version of this format. It rises when a field is removed or changes its meaning. New fields have a
            default, which lets older records load.
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
    digests: dict[str, str] | None = None
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
        path = Path(path) / RECORD_NAME if Path(path).is_dir() else Path(path)
        try:
            record = cls(**read_json(path))
            record._check()
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ValueError(
                f"{path} is not a run record of schema {SCHEMA_VERSION} ({one_line(error):.300}): train the run again, or update hf_hyla."
            ) from None
        return record

    @property
    def identity(self) -> str:
        """A text that is equal for two copies of one run's record: the run's seeds, data and results."""
        results = {
            split: {name: float(value) for name, value in scores.items()} for split, scores in self.metrics.items()
        }
        return json.dumps([self.seeds, self.data_fingerprint, results], sort_keys=True)

    def _check(self) -> None:
        """Checks what types cannot express."""
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"its schema_version is {self.schema_version}")
        if len(self.name) > _MAX_NAME_LENGTH:
            raise ValueError(f"its name has more than {_MAX_NAME_LENGTH} characters")
        for section, key, kind in (("task", "name", str), ("trainer", "max_steps", int)):
            if type(self.recipe.get(section, {}).get(key)) is not kind:
                raise ValueError(f"its recipe lacks {section}.{key}")
        if self.recipe["task"]["name"] in TASKS:  # a task of somebody's own is built where it is needed
            get_task(**self.recipe["task"])
        if "model" not in self.recipe:
            raise ValueError("its recipe lacks the section model")
        for key in ("model_name_or_path", "revision"):
            if not isinstance(self.recipe["model"].get(key), (str, type(None))):
                raise ValueError(f"its recipe's model.{key} is not text")
        self._check_expected()
        for key in ("task", "trainer"):
            if key not in self.seeds:
                raise ValueError(f"its seeds lack {key}")
        counts = ("num_parameters", "steps", "samples_seen")
        _check_numbers({name: getattr(self, name) for name in counts}, at_least=1)
        _check_numbers({"seconds": self.seconds}, at_least=0)
        for split, scores in self.metrics.items():
            if type(scores.get("num_samples")) is not int:
                raise ValueError(f"its metrics of {split!r} lack num_samples")
            _check_numbers({"num_samples": scores["num_samples"]}, at_least=1)
            # A score may be NaN in a record that was not made by a finished run.
            _check_numbers({name: value for name, value in scores.items() if value == value})
        for number, point in enumerate(self.curve):
            if type(point.get("step")) is not int or "seconds" not in point:
                raise ValueError(f"entry {number} of its curve lacks step or seconds")
            _check_numbers(point)
            _check_numbers({"step": point["step"]}, at_least=0)
        for name, value in {**self.environment, **self.hardware}.items():
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise ValueError(f"its {name} is neither text nor a number")
        if not isinstance(self.environment.get("git_commit"), (str, type(None))):
            raise ValueError("its git_commit is not text")
        processes = self.hardware.get("num_processes", 1)
        if type(processes) is not int or processes < 1:
            raise ValueError(f"its num_processes is {processes!r:.40}")
        for digest in (self.data_fingerprint, *(self.digests or {}).values()):
            if digest is not None and not re.fullmatch("sha256:[0-9a-f]{64}", digest):
                raise ValueError(f"{digest!r:.40} is not a sha256 digest")

    def _check_expected(self) -> None:
        expect = self.recipe.get("expect")
        if not expect:
            return
        for key, kind in (("metric", str), ("source", str), ("value", (int, float)), ("tolerance", (int, float))):
            if not isinstance(expect.get(key), kind):
                raise ValueError(f"its recipe lacks expect.{key}")
        if not re.fullmatch(r"[\w-]+/[\w-]+", expect["metric"]):
            raise ValueError(f"its expect.metric is {expect['metric']!r:.80}, expected a split, a / and a metric")
        budget = expect.get("budget")
        if budget is not None and type(budget) is not int:
            raise ValueError("its expect.budget is not a whole number")
        numbers = ("value", "tolerance", "budget")
        _check_numbers({f"expect.{key}": expect[key] for key in numbers if expect.get(key) is not None})


def _check_numbers(numbers: dict[str, int | float], at_least: int | None = None) -> None:
    for name, number in numbers.items():
        if not abs(number) < _NUMBER_LIMIT:  # NaN is refused too
            raise ValueError(f"its {name} is {number!s:.20}")
        if at_least is not None and number < at_least:
            raise ValueError(f"its {name} must be at least {at_least}, got {number}")


def digests(folder: Path) -> dict[str, str]:
    """The digest of each file of a model in a folder, by name: its weights, config, tokenizer and code."""
    files = sorted({path for pattern in _DIGESTED for path in folder.glob(pattern) if path.is_file()})
    return {path.name: file_digest([path]) for path in files}


def file_digest(paths: Iterable[Path]) -> str:
    """`"sha256:"` and the digest of the bytes of these files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def by_key(settings: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings by `section.key`, without `expect`, since what is expected of a run may change later."""
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
    """The settings by `section.key` that all runs of one recipe share. Runs for which they are equal differ only in their seeds."""
    return {key: value for key, value in by_key(settings).items() if tells_recipes_apart(key)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of some values and its standard error, which is `None` for a single value."""
    if not all(map(math.isfinite, values)):  # of which there is no standard deviation
        return math.nan, None
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error
