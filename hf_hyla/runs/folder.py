"""The folder of a run: the names of its files, and their content, which is read once."""

import dataclasses
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError, StrictDataclassError

from ..model import HylaConfig
from ..reading import read_json, read_yaml
from ..tasks import Task, get_task
from ..utils import one_line
from .paper import PaperResult, paper_result
from .record import RECORD_NAME, RunRecord, file_digest


RECIPE_NAME = "resolved_recipe.yaml"
CURVE_NAME = "learning_curve.png"
CHECKPOINTS = "checkpoints"
# The report of `hyla probe`, which the card shows.
PROBE_NAME = "probe/probe.json"
# What `hyla card` writes.
CARD_NAME = "README.md"
COMPARISON_NAME = "comparison.png"
EVAL_RESULTS = ".eval_results"


@dataclasses.dataclass
class Run:
    """
    A run's folder and its record. Everything else is read from the folder on first use, and kept.

    Attributes:
        folder: the run's folder.
        record: the run's record.
    """

    folder: Path
    record: RunRecord

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """
        The finished run in a folder.

        Raises:
            ValueError: if the run is not finished, or has no results.
            OSError: if its record cannot be read.
        """
        folder = Path(folder)
        if not (folder / RECORD_NAME).exists():
            raise FileNotFoundError(
                f"{folder} holds no finished run: expected {RECORD_NAME}; run the command that trains it (again)."
            )
        run = cls(folder, RunRecord.load(folder))
        run.check_finished()
        return run

    @cached_property
    def task(self) -> Task:
        """The task that the run was trained on."""
        return get_task(**self.record.recipe["task"])

    @cached_property
    def config(self) -> HylaConfig:
        """
        The config of the run's model.

        Raises:
            ValueError: if config.json is not the config of a HYLA model.
            OSError: if it is missing.
        """
        try:
            # transformers would wait for a pipe, crash at content that is nested too deep, and take another model's config.
            found = read_json(self.folder / "config.json")
            kind = found.get("model_type") if isinstance(found, dict) else None
            if kind != HylaConfig.model_type:
                raise ValueError(
                    f"its model_type is {kind!r:.80}, expected {HylaConfig.model_type!r}; copy the run again"
                )
            return HylaConfig.from_pretrained(self.folder)
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.folder / 'config.json'} is not the config of a model: {one_line(error)}"
            ) from None

    @cached_property
    def paper(self) -> PaperResult | None:
        """See `paper_result`."""
        return paper_result(self.record.recipe)

    @cached_property
    def weights_digest(self) -> str:
        """See `weights_digest`."""
        return weights_digest(self.folder)

    @property
    def base_model(self) -> str | None:
        """The folder or repository that training started from; `None` where it started from random weights."""
        return self.record.recipe["model"].get("model_name_or_path")

    @property
    def base_repository(self) -> str | None:
        """The repository that training started from: the recipe then has its commit, see `config_of_checkpoint`."""
        return self.base_model if "revision" in self.record.recipe["model"] else None

    @property
    def budget_share(self) -> float:
        """The number of training samples, as a share of the paper's."""
        return self.record.samples_seen / self.task.num_samples["train"]

    def check_finished(self) -> None:
        """
        Raises:
            ValueError: if the run is not finished, or lacks a result.
        """
        record, max_steps = self.record, self.record.recipe["trainer"]["max_steps"]
        if record.steps < max_steps:
            raise ValueError(
                f"{self.folder} is not finished: it made {record.steps} of {max_steps} updates; train it to its end."
            )
        expected = [split for split in self.task.splits if split != "train"]
        if others := sorted(record.metrics.keys() - expected):
            raise ValueError(
                f"{self.folder / RECORD_NAME} has scores of the split {others[0]!r}, which the task {self.task.name} lacks: train "
                "the run again."
            )
        for split in expected:
            scores = record.metrics.get(split, {})
            # Other scores may be missing, if they cannot be computed on any sample.
            for name in dict.fromkeys((self.task.metric_names[0], "num_samples", *scores)):
                if not math.isfinite(scores.get(name, math.nan)):
                    raise ValueError(
                        f"{self.folder / RECORD_NAME} has no result {split}/{name}, got {scores.get(name)}: train the run to "
                        "its end."
                    )


def record_of(name: str | Path) -> RunRecord:
    """
    The record of the run in a folder, or of the run that was published to a repository on the Hub.

    Raises:
        FileNotFoundError: if there is no record.
        OSError: if it cannot be fetched.
        ValueError: if it is not a record.
    """
    path = Path(name) / RECORD_NAME
    if not Path(name).exists():
        try:
            path = Path(hf_hub_download(str(name), RECORD_NAME))
        except (HTTPError, OSError, ValueError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise FileNotFoundError(f"{name} has no {RECORD_NAME}: expected a published run.") from None
            raise OSError(
                f"The {RECORD_NAME} of {name}, which says what the model was trained on, cannot be fetched "
                f"({type(error).__name__}): check the name and the connection, or give the folder of a copy of the run."
            ) from None
    if not path.exists():
        raise FileNotFoundError(f"{name} has no {RECORD_NAME}, which names its task: expected the folder of a run.")
    return RunRecord.load(path)


def trained_task(name: str | Path) -> dict[str, Any]:
    """
    The settings of the task that a model was trained on, by the record of its run or, for a checkpoint, by the recipe of its run;
    empty where neither is there.

    Raises:
        ValueError: if the record is not a record, or the recipe is not a recipe.
        OSError: if the record cannot be fetched, so that it is unknown whether there is one.
    """
    checkpoints = Path(name).resolve().parent
    recipe = checkpoints.parent / RECIPE_NAME
    if Path(name).exists() and checkpoints.name == CHECKPOINTS and recipe.exists():
        try:
            return dict(read_yaml(recipe)["task"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{recipe} is not a recipe ({one_line(error)}): train the run again.") from None
    try:
        return dict(record_of(name).recipe["task"])
    except FileNotFoundError:
        return {}


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's weights, which says whether a report is about these weights or about others."""
    return file_digest(sorted(folder.glob("model*.safetensors")))
