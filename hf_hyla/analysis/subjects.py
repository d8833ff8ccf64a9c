"""The inputs of probes that a task provides: batches, subjects, and the number of samples that a probe needs."""

from collections.abc import Iterator

import numpy as np
import torch

from ..tasks import Subject, Task
from .latents import Batch


# A probe is fitted and scored on at least this many examples of every class.
MIN_PER_CLASS = 10
# The number of samples of a split that are searched to find how many a probe needs.
_SEARCHED = 20_000
# The number of bins for a numeric answer that a probe reads as one-hot features.
_ANSWER_BINS = 16


def task_batches(
    task: Task, split: str, num_samples: int, batch_size: int = 512, query: np.ndarray | None = None
) -> Iterator[Batch]:
    """
    The first samples of a split in batches, with the columns that describe them. With `query`, a point from
    `Task.query_point`, all samples are queried at that point.
    """
    for first in range(0, num_samples, batch_size):
        samples = task.samples(split, np.arange(first, min(first + batch_size, num_samples)))
        if query is not None:
            samples = task.ask(samples, query)
        yield {name: torch.from_numpy(column) for name, column in samples.items()}


def subjects(task: Task, columns: dict[str, np.ndarray]) -> list[Subject]:
    """
    The properties that probes read from the codes of a task's answer tokens, see `Task.subjects`.

    Raises:
        ValueError: if the columns lack the labels or the parts of the samples.
    """
    if missing := [name for name in (task.parts_column, "labels") if name not in columns]:
        raise ValueError(
            f"These samples of {task.name} cannot be probed: they lack {', '.join(missing)}; use samples of the task."
        )
    return task.subjects(columns)


def combinations_of(task: Task, columns: dict[str, np.ndarray]) -> np.ndarray:
    """For each sample an integer (samples,) that stands for its combination of parts."""
    return np.unique(np.sort(columns[task.parts_column], axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def answer_features(train_target: Subject, target: Subject) -> tuple[np.ndarray, np.ndarray]:
    """
    One-hot features (rows, bins) of training and other samples that hold only the right answer. Probes of codes are compared
    with a probe of these, since an answer alone says something about the parts.

    The bins of numeric answers are bounded by quantiles of the training samples' answers.
    """
    edges = np.unique(np.quantile(train_target.values, np.arange(1, _ANSWER_BINS) / _ANSWER_BINS))
    if target.names:
        edges = np.arange(1, len(target.names))
    train, other = (np.searchsorted(edges, one.values, side="right") for one in (train_target, target))
    return np.eye(len(edges) + 1)[train], np.eye(len(edges) + 1)[other]


def check_sizes(task: Task, split: str, train_samples: int, num_samples: int) -> None:
    """
    Raises:
        ValueError: for a split that cannot be probed, or for fewer samples than a probe needs. The message says how many
            those are.
    """
    if split == "train":
        raise ValueError("A probe is fitted on the split train: score it on another, such as ood.")
    # `task.dataset` refuses unknown splits and sizes below 1.
    task.dataset(split, num_samples), task.dataset("train", train_samples)
    known = {part for combination in task.combinations("train") for part in combination}
    if not known & {part for combination in task.combinations(split) for part in combination}:
        raise ValueError(
            f"No probe can be scored on the split {split} of {task.name}: none of its parts occurs in training; choose ood or "
            "test."
        )
    for name, where, count in (("train_samples", "train", train_samples), ("num_samples", split, num_samples)):
        needed = _samples_needed(task, where)
        if count < needed:
            raise ValueError(
                f"{name} must be at least {needed}, so that the split {where} shows each class of a probe "
                f"{MIN_PER_CLASS} times, got {count}."
            )


def _samples_needed(task: Task, split: str) -> int:
    """The number of first samples of a split in which every class that occurs at all occurs often enough for a probe."""
    needed = 1
    for subject in subjects(task, task.samples(split, np.arange(_SEARCHED))):
        if subject.kind == "number":
            continue
        shown = subject.values
        if subject.kind == "classes":
            shown = shown[:, None] == np.arange(len(subject.names))
        by_sample = shown.reshape(_SEARCHED, -1, shown.shape[-1]).sum(axis=1).cumsum(axis=0)
        enough = by_sample >= np.minimum(MIN_PER_CLASS, by_sample[-1])
        needed = max(needed, int(enough.all(axis=1).argmax()) + 1)
    return needed
