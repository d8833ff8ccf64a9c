"""The base class of tasks: splits, samples and batches, the scores of answers, the subjects of probes, and the words of cards."""

import dataclasses
import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from .reference_split import reference_order
from .sampling import draw_words, stream_key
from .subject import Subject
from .words import Words


if TYPE_CHECKING:
    import datasets


# The maximum number of draws of the held-out combinations. After them a split is refused: every draw left some part untrained.
_MAX_SPLIT_DRAWS = 20_000
# The maximum number of combinations in all of these draws together. A draw of many combinations takes longer, and hardly ever
# leaves a part untrained.
_MAX_DRAWN_COMBINATIONS = 10_000_000
# The fingerprint covers these samples of every split: its first 64, and the last 64 of 20 million.
_FINGERPRINT_INDICES = np.r_[0:64, 19_999_936:20_000_000]


@dataclasses.dataclass(frozen=True)
class PaperRuns:
    """
    The paper's results for a task.

    Attributes:
        settings: the task's settings in the paper's Table A1.
        table_a1: mean and standard error of the headline metric on `ood` over three seeds, by the names of the table's rows,
            see `hf_hyla.runs.paper`.
    """

    settings: dict[str, Any]
    table_a1: dict[str, tuple[float, float]]


@dataclasses.dataclass
class Task(ABC):
    """
    A compositional task. Every sample is made from a combination of parts (rules or terms), and some combinations are held
    out of training.

    A subclass is a dataclass whose fields are the task's settings, each with a default. Equal settings give equal samples,
    bit for bit, on every platform and for every batch size and order.
    """

    # In lower case, since it is part of the names of repositories.
    name: ClassVar[str]
    # The class of transformers that makes and loads a model for this task.
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    # What each split holds. A split of the same kind has the same name in every task.
    splits: ClassVar[dict[str, str]] = {
        "train": "training samples",
        "test": "fresh samples of the trained combinations",
        "ood": "combinations that were held out",
    }
    # The split whose headline metric is compared.
    headline_split: ClassVar[str] = "ood"
    # The columns of `samples` that a model reads, including the labels. The other columns describe a sample.
    model_columns: ClassVar[tuple[str, ...]]
    # The model's columns that `metrics` takes as labels. The model computes its loss from the first, and ignores the others.
    label_columns: ClassVar[tuple[str, ...]] = ("labels",)
    # The column of `samples` with the ids (samples, parts) of each sample's parts.
    parts_column: ClassVar[str] = "parts"
    # The names of the scores that `metrics` returns. The first is the headline metric.
    metric_names: ClassVar[tuple[str, ...]]
    # Whether a larger headline metric is better.
    greater_is_better: ClassVar[bool] = True
    # The default number of samples in a batch that is scored.
    eval_batch_size: ClassVar[int] = 1024
    # The task's texts for cards.
    words: ClassVar[type[Words]] = Words
    # The paper's results, if the task is one of the paper's.
    paper: ClassVar[PaperRuns | None] = None

    reference_split: bool = False
    seed: int = 0

    @property
    @abstractmethod
    def num_samples(self) -> dict[str, int]:
        """Samples per split in a whole run. The paper's tasks have the paper's numbers."""

    @property
    @abstractmethod
    def model_interface(self) -> dict[str, Any]:
        """Fields of `HylaConfig`, and the values that they must have in a model for this task."""

    @property
    @abstractmethod
    def model_defaults(self) -> dict[str, Any]:
        """Fields of `HylaConfig` for the task's default model, including those of `model_interface`."""

    @cached_property
    @abstractmethod
    def split_combinations(self) -> dict[str, np.ndarray]:
        """Combinations per split, each an array (combinations, parts) of sorted ids; see `hold_out`."""

    @abstractmethod
    def draw(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The samples with these indices as columns, which are arrays (samples, ...); see `random_words`."""

    @abstractmethod
    def metrics(self, logits: np.ndarray, labels: Any, inputs: np.ndarray) -> dict[str, float]:
        """
        Scores by `metric_names` for a model's logits on samples with these labels and inputs. A score that cannot be computed
        on these samples is left out.

        Args:
            logits: what `predictions` returns for all samples.
            labels: the column of `label_columns`, or a tuple if there are several.
            inputs: what the model has read.
        """

    def predictions(self, logits: torch.Tensor, labels: Any) -> torch.Tensor:
        """
        What `metrics` needs of a batch's logits; by default all of them. If the logits of a whole split do not fit into memory,
        a task returns less here, and its `metrics` includes the `loss`.
        """
        return logits

    def labels_of(self, columns: dict[str, Any]) -> Any:
        """The labels among these columns, as `metrics` takes them."""
        labels = tuple(columns[name] for name in self.label_columns)
        return labels if len(labels) > 1 else labels[0]

    @property
    def processing_class(self) -> Any:
        """The tokenizer that is saved beside a trained model; `None` for a task without text."""
        return None

    def features(self) -> "datasets.Features":
        """The types of the columns that `to_table` returns; by default those of `samples`."""
        from datasets import Features, List, Value

        def feature(column: np.ndarray):
            inner = Value(str(column.dtype))
            for length in reversed(column.shape[1:]):
                inner = List(inner, length=length)
            return inner

        return Features({name: feature(column) for name, column in self.samples("train", [0]).items()})

    def to_table(self, samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The columns that `features` names. They describe the samples for readers who do not train our models."""
        return samples

    def from_table(self, table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """
        The samples behind a table; the inverse of `to_table`. Both are columns of arrays, and a table's may be lists. A dataset of
        `hyla data` becomes what a model reads by:

        ```python
        rows = datasets.load_dataset(folder, split="train").with_format("numpy")
        samples = rows.map(task.from_table, batched=True, remove_columns=rows.column_names)
        ```
        """
        return table

    def text_features(self) -> "datasets.Features":
        """The types of the columns that `text_columns` returns; by default none, since most tasks cannot be written as text."""
        from datasets import Features

        return Features()

    def text_columns(self, split: str, indices: np.ndarray, samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """
        Samples of a split as text for language models, which `hyla data --format text` writes.

        Args:
            indices: (samples,), the indices of the samples in the split.
            samples: the columns of these samples, as `samples` gives them.
        """
        return {}

    def show(self, sample: dict[str, np.ndarray]) -> str:
        """One sample as a few lines of text."""
        return "\n".join(f"{name}: {column.tolist()}" for name, column in sample.items())

    def subjects(self, columns: dict[str, np.ndarray]) -> list[Subject]:
        """
        The properties that probes read from the codes of answer tokens. The last one is the answer itself. By default the
        only other one is the parts of the sample's combination.

        Args:
            columns: the labels, and the columns of `samples` that describe the samples.
        """
        labels = columns["labels"]
        trained = sorted({part for combination in self.combinations("train") for part in combination})
        present = (columns[self.parts_column][..., None] == np.array(trained)).any(axis=1)
        numeric = labels.dtype.kind == "f"
        answers = () if numeric else tuple(map(str, range(self.model_interface["num_labels"])))
        return [
            Subject("part", present.repeat(labels[0].size, axis=0), tuple(map(self.part_name, trained))),
            Subject("target", labels.reshape(-1), answers),
        ]

    def part_name(self, part: int) -> str:
        """The name of a part in reports."""
        return str(part)

    def answer_keys(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """
        Positions (batch, answers, keys) of the keys whose codes are probed in a batch. `None` stands for each answer token
        as its own key.
        """
        return None

    def query_point(self, seed: int) -> np.ndarray:
        """
        A point at which every sample can be queried, so that codes differ only by the combination.

        Raises:
            ValueError: if samples of the task have no query point.
        """
        raise ValueError(f"Samples of the task {self.name} have no query point to fix: leave fixed_query out.")

    def ask(self, samples: dict[str, np.ndarray], point: np.ndarray) -> dict[str, np.ndarray]:
        """The samples, queried at a point from `query_point`."""
        raise NotImplementedError(f"{type(self).__name__} defines query_point without ask: define both or neither.")

    @property
    def reference(self) -> str:
        """The name by which `get_task` finds the task: its own, or `module:Class` for a user's task."""
        is_users_own = not type(self).__module__.startswith(__package__ or "")
        return f"{type(self).__module__}:{type(self).__qualname__}" if is_users_own else self.name

    @property
    def spec(self) -> dict[str, Any]:
        """`name` and settings, from which `get_task` makes this task again."""
        return {"name": self.reference, **self.settings}

    @property
    def settings(self) -> dict[str, Any]:
        """
        The settings by name, as `get_task` takes them. They include `reference_split` only if it is set, so that they equal
        those in older records.
        """
        settings = dataclasses.asdict(self)
        if not self.reference_split:
            del settings["reference_split"]
        return settings

    def fingerprint(self) -> str:
        """
        A digest of the data, by which two machines can tell that they draw the same data. It is `"sha256:"` followed by the
        hexadecimal digest of the bytes below.

        The bytes cover every split in the order of `splits`, and in each split the columns of `samples(split, indices)` in
        their order, for the indices 0 to 63 and 19,999,936 to 19,999,999. Each column contributes a line of ASCII text,
        `split/column dtype shape`, such as `train/labels int64 (128, 4)`, and then its little-endian elements in C order.
        """
        digest = hashlib.sha256()
        for split in self.splits:
            for name, column in self.samples(split, _FINGERPRINT_INDICES).items():
                digest.update(f"{split}/{name} {column.dtype} {column.shape}\n".encode("ascii"))
                digest.update(column.astype(column.dtype.newbyteorder("<")).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def combinations(self, split: str) -> list[tuple[int, ...]]:
        """The combinations of a split, each a sorted tuple of ids."""
        self._check_split(split)
        return [tuple(map(int, row)) for row in self.split_combinations[split]]

    def samples(self, split: str, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """
        The samples with these indices as columns, which are arrays (samples, ...).

        Raises:
            ValueError: for an unknown split.
            IndexError: for a negative index.
        """
        self._check_split(split)
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(indices) and indices.min() < 0:
            raise IndexError(f"Samples are numbered from 0, got index {indices.min()}.")
        return self.draw(split, indices)

    def dataset(self, split: str, num_samples: int | None = None) -> "TaskDataset":
        """A map-style dataset that stores nothing. Its length is the paper's if `num_samples` is `None`."""
        self._check_split(split)
        return TaskDataset(self, split, self.num_samples[split] if num_samples is None else num_samples)

    def collate(self, samples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """
        The columns that the model reads, as a batch of tensors.

        Raises:
            ValueError: if a value in a sample is not finite.
        """
        batch = {}
        for name in self.model_columns:
            # A `SampleList` still has its columns whole.
            column = samples.columns[name] if isinstance(samples, SampleList) else np.stack([s[name] for s in samples])
            if column.dtype.kind == "f" and not np.isfinite(column).all():
                row = int(np.flatnonzero(~np.isfinite(column.reshape(len(column), -1)).all(axis=1))[0])
                raise ValueError(f"{name} of sample {row} of the batch is not finite: remove or repair that sample.")
            batch[name] = torch.from_numpy(np.ascontiguousarray(column))
        return batch

    def check_model(self, config) -> None:
        """
        Raises:
            ValueError: if a model with this `HylaConfig` does not fit the task. The message names the field.
        """
        for name, expected in self.model_interface.items():
            found = getattr(config, name, None)
            if found != expected:
                settings = ", ".join(f"{setting} {value}" for setting, value in self.settings.items())
                raise ValueError(
                    f"The model does not fit the task {self.name}: its {name} is {found!r}, expected {expected!r}; the "
                    f"task's settings are {settings}."
                )

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"The task {self.name} has no split {split!r}: expected one of {', '.join(self.splits)}.")

    def random_words(self, split: str, indices: np.ndarray, count: int) -> np.ndarray:
        """
        `count` random words for each of these samples. They are a pure function of task, seed, split and index; see
        `sampling`.
        """
        return draw_words(stream_key(self.name, self.seed, split), indices, count)

    def hold_out(self, combinations: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
        """
        The combinations divided at random into (train, held out).

        Every part occurs in `train`, so that the held-out combinations are new combinations of *known* parts. With
        `reference_split` there is one draw, as in the reference, which may leave parts untrained.

        Raises:
            ValueError: if there is no such division.
        """
        if not 0 < held_out < 1:  # NaN is refused too
            raise ValueError(f"held_out must lie between 0 and 1, got {held_out}.")
        parts = np.unique(combinations)
        count = int(len(combinations) * held_out)
        if self.reference_split and 0 < count < len(combinations):
            order = reference_order(self.seed, len(combinations))
            return combinations[np.sort(order[count:])], combinations[np.sort(order[:count])]
        key = stream_key(self.name, self.seed, "held out")
        possible = 0 < count < len(combinations) and (len(combinations) - count) * combinations.shape[1] >= len(parts)
        draws = min(_MAX_SPLIT_DRAWS, _MAX_DRAWN_COMBINATIONS // len(combinations) + 1)
        for draw in range(draws if possible else 0):
            order = np.argsort(draw_words(key, np.array([draw]), len(combinations))[0], kind="stable")
            train = combinations[np.sort(order[count:])]
            if len(np.unique(train)) == len(parts):
                return train, combinations[np.sort(order[:count])]
        raise ValueError(
            f"held_out={held_out} of {len(combinations)} combinations holds out {count} and leaves "
            f"{len(combinations) - count} for training, but at least one must be held out and each of the {len(parts)} parts "
            "must occur in training: choose another held_out."
        )


class SampleList(Sequence):
    """
    The samples of a batch. Each is a dict of views into `columns`, made when it is asked for: `Task.collate` reads whole
    columns, and making the dicts takes longer than drawing the samples.
    """

    def __init__(self, columns: dict[str, np.ndarray]):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return SampleList({name: column[index] for name, column in self.columns.items()})
        return {name: column[index] for name, column in self.columns.items()}


class TaskDataset(Dataset):
    """
    The first `num_samples` samples of a split, drawn on demand.

    Items are dicts of numpy arrays. Data loaders call `__getitems__`, which draws a whole batch at once.
    """

    def __init__(self, task: Task, split: str, num_samples: int):
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        self.task = task
        self.split = split
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([operator.index(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> SampleList:
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= self.num_samples):
            raise IndexError(f"Indices must lie in 0 to {self.num_samples - 1}, got {chosen.min()} to {chosen.max()}.")
        return SampleList(self._samples(chosen))

    def _samples(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.task.samples(self.split, indices)
