"""What is probed of each task: its batches, the keys whose codes count, and the values that the codes may tell."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..tasks import LogicTask, Task
from ..tasks.logic import disjunction
from ..tasks.rules import GRID, RULES
from .latents import Batch


# A probe is fitted and scored on at least so many examples of every class.
LEAST_PER_CLASS = 10
# How far the samples of a split are searched for the number that would be enough.
_SEARCHED = 20_000
# Into how many classes numbers are divided where a probe reads the answer.
_ANSWER_BINS = 16


@dataclasses.dataclass
class Subject:
    """
    What codes are asked for.

    Attributes:
        name: of the property.
        values: per answer token: classes (rows,) as integers, several at a time (rows, names) as booleans, or numbers (rows,).
        names: of the classes; empty for numbers.
    """

    name: str
    values: np.ndarray
    names: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        if not self.names:
            return "number"
        return "labels" if self.values.dtype == bool else "classes"

    @property
    def counts(self) -> np.ndarray:
        """How often each class occurs."""
        if self.kind == "labels":
            return self.values.sum(axis=0)
        return np.bincount(self.values, minlength=len(self.names))


def task_batches(
    task: Task, split: str, num_samples: int, batch_size: int = 512, query: np.ndarray | None = None
) -> Iterator[Batch]:
    """
    The first samples of a split in batches, with the columns that describe them: rules and permutations, or terms.

    Fuzzy logic may ask for one point in all of them, `query` (variables,); `base_mse` then is left out.
    """
    for first in range(0, num_samples, batch_size):
        samples = task.samples(split, np.arange(first, min(first + batch_size, num_samples)))
        if query is not None:
            samples["input_values"][:, -1, :-1] = query
            samples["labels"] = disjunction(samples["terms"], samples["input_values"][:, -1:, :-1])[:, 0]
            del samples["base_mse"]
        yield {name: torch.from_numpy(column) for name, column in samples.items()}


def query_point(task: Task, seed: int) -> np.ndarray:
    """
    A point (variables,) at which all functions of fuzzy logic can be asked.

    Raises:
        ValueError: if the task asks for no point.
    """
    if not isinstance(task, LogicTask):
        raise ValueError(f"The task {task.name} asks for no point that could be fixed: leave fixed_query out.")
    return np.random.default_rng(seed).random(task.num_variables).astype(np.float32)


def answer_keys(task: Task) -> Callable[[Batch], torch.Tensor] | None:
    """
    The keys of which `collect_codes` keeps the codes, as in the official analysis.

    Fuzzy logic: the answer token itself (`None`), the point that is asked for. SRAVEN: the two cells of the last row that
    show the feature which the answer token is asked for, wherever the columns' permutations put it; a rule says how
    the answer follows from these two.
    """
    return {"sraven": _cells_of_the_feature, "logic": None}[task.name]


def subjects(task: Task, columns: dict[str, np.ndarray]) -> list[Subject]:
    """
    What the codes of a task's answer tokens are asked for: the rule of the answer's feature and its value, or the terms of
    the function and its value.

    Terms are named by their binary digits, one per variable, 1 for plain and 0 for negated.

    Raises:
        ValueError: if the columns lack what describes the samples.
    """
    needed = {"sraven": ("rules", "permutations", "labels"), "logic": ("terms", "labels")}[task.name]
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(
            f"These samples of {task.name} cannot be probed: they lack {', '.join(missing)}; use samples of the task."
        )
    if task.name == "sraven":
        rules = np.take_along_axis(columns["rules"], columns["permutations"][:, GRID - 1], axis=1)
        values = tuple(map(str, range(task.num_values)))  # type: ignore[attr-defined]
        return [Subject("rule", rules.ravel(), RULES), Subject("target", columns["labels"].ravel(), values)]
    trained = sorted({term for combination in task.combinations("train") for term in combination})
    names = tuple(f"{term:0{task.num_variables}b}" for term in trained)  # type: ignore[attr-defined]
    present = (columns["terms"][..., None] == np.array(trained)).any(axis=1)
    return [Subject("term", present, names), Subject("target", columns["labels"])]


def combinations_of(columns: dict[str, np.ndarray]) -> np.ndarray:
    """A number (samples,) for each sample that samples of the same combination of rules or terms have too."""
    parts = columns["rules"] if "rules" in columns else np.sort(columns["terms"], axis=1)
    return np.unique(parts, axis=0, return_inverse=True)[1].reshape(-1)


def answer_features(train_target: Subject, target: Subject) -> tuple[np.ndarray, np.ndarray]:
    """
    Features (rows, bins) of training and other samples that hold the right answer and nothing else, one-hot: what a probe is
    to be compared with, since codes that tell the answer tell of the rules or terms what the answer tells of them.

    Numbers are told apart by the quantiles of the training samples' numbers.
    """
    edges = np.unique(np.quantile(train_target.values, np.arange(1, _ANSWER_BINS) / _ANSWER_BINS))
    if target.names:
        edges = np.arange(1, len(target.names))
    train, other = (np.searchsorted(edges, one.values, side="right") for one in (train_target, target))
    return np.eye(len(edges) + 1)[train], np.eye(len(edges) + 1)[other]


def check_sizes(task: Task, split: str, train_samples: int, num_samples: int) -> None:
    """
    Raises:
        ValueError: for a split that cannot be probed, or fewer samples than a probe needs, saying how many it needs.
    """
    if split == "train":
        raise ValueError("A probe is fitted on the split train: score it on another, such as ood.")
    task.dataset(split, num_samples), task.dataset("train", train_samples)  # refuse unknown splits and sizes below 1
    known = {part for combination in task.combinations("train") for part in combination}
    if not known & {part for combination in task.combinations(split) for part in combination}:
        raise ValueError(
            f"No probe can be scored on the split {split} of {task.name}: training shows none of its terms; choose ood or test."
        )
    for name, where, count in (("train_samples", "train", train_samples), ("num_samples", split, num_samples)):
        needed = _samples_needed(task, where)
        if count < needed:
            raise ValueError(
                f"{name} must be at least {needed}, so that the split {where} shows each class of a probe "
                f"{LEAST_PER_CLASS} times, got {count}."
            )


def _samples_needed(task: Task, split: str) -> int:
    """Samples of a split after which all classes that occur in it at all have occurred often enough for a probe."""
    needed = 1
    for subject in subjects(task, task.samples(split, np.arange(_SEARCHED))):
        if subject.kind == "number":
            continue
        shown = subject.values
        if subject.kind == "classes":
            shown = shown[:, None] == np.arange(len(subject.names))
        by_sample = shown.reshape(_SEARCHED, -1, shown.shape[-1]).sum(axis=1).cumsum(axis=0)
        enough = by_sample >= np.minimum(LEAST_PER_CLASS, by_sample[-1])
        needed = max(needed, int(enough.all(axis=1).argmax()) + 1)
    return needed


def _cells_of_the_feature(batch: Batch) -> torch.Tensor:
    permutations = batch["permutations"]
    features = permutations.shape[-1]
    place = permutations.argsort(dim=-1)  # of each feature in each column
    asked = permutations[:, GRID - 1]
    panels = GRID * (GRID - 1)
    cells = [(panels + column) * features + place[:, column].gather(1, asked) for column in range(GRID - 1)]
    return torch.stack(cells, dim=-1)
