"""What SRAVEN's ideal observer reaches on a split, which no model can expect to exceed."""

import math
from collections import defaultdict
from typing import Any

import numpy as np

from .observer import explain, most_probable, posterior
from .rules import cells
from .samples import SravenTask


_CHUNK = 2048


def observer_record(task: SravenTask, num_samples: int) -> dict[str, Any]:
    """The observer's scores on `test` and `ood`, with the task's settings and fingerprint."""
    splits = {split: observe(task, split, num_samples) for split in ("test", "ood")}
    return {"task": task.spec, "data_fingerprint": task.fingerprint(), "splits": splits}


def observe(task: SravenTask, split: str, num_samples: int) -> dict[str, Any]:
    """
    Scores of the ideal observer on the first samples of a split. No model can expect a higher accuracy there.

    The observer knows the generator and the rule combinations of the split, which are the trained ones for `test` and the
    held-out ones for `ood`. It sees the eight panels and answers with the most probable ninth panel, or with the smallest of
    equally probable ones.

    Returns:
        - `num_samples`;
        - `accuracy` and its `standard_error`;
        - `expected_accuracy`, the mean probability of the observer's answers, which estimates the accuracy with less noise;
        - `feature_accuracy` of the same answers;
        - `accuracy_all_combinations`, the accuracy if the observer takes every combination of rules to be possible;
        - `accuracy_unique`, the accuracy on puzzles that are not strictly ambiguous, if there are any;
        - `undecided`, the fraction of puzzles with more than one possible answer;
        - `ambiguous_official` and `ambiguous_strict`, the fractions of ambiguous puzzles, see `ambiguity`.

    Raises:
        ValueError: for an unknown split or no samples.
    """
    task.dataset(split, num_samples)  # refuses unknown splits and lengths below 1
    combinations = task.combinations(split)
    everything = sorted({combination for name in task.splits for combination in task.combinations(name)})
    columns: dict[str, list] = defaultdict(list)
    for start in range(0, num_samples, _CHUNK):
        samples = task.samples(split, np.arange(start, min(start + _CHUNK, num_samples)))
        official, strict = task.ambiguous(samples["input_ids"], samples["labels"])
        columns["official"] += official.tolist()
        columns["strict"] += strict.tolist()
        puzzles = cells(samples["input_ids"], samples["labels"])
        for explained, label in zip(
            explain(puzzles, task.num_values, task.permute), samples["labels"].tolist(), strict=True
        ):
            panels = posterior(explained, combinations, task.permute)
            answer = most_probable(panels)
            columns["right"].append([value == true for value, true in zip(answer, label, strict=True)])
            columns["probability"].append(panels[answer])
            columns["undecided"].append(len(panels) > 1)
            columns["right_all"].append(most_probable(posterior(explained, everything, task.permute)) == tuple(label))
    results = {name: np.array(column) for name, column in columns.items()}
    solved = np.asarray(results["right"].all(axis=1))
    strict = results["strict"]
    return {
        "num_samples": num_samples,
        "accuracy": float(solved.mean()),
        "standard_error": float(solved.std() / math.sqrt(num_samples)),
        "expected_accuracy": float(results["probability"].mean()),
        "feature_accuracy": float(results["right"].mean()),
        "accuracy_all_combinations": float(results["right_all"].mean()),
        **({} if strict.all() else {"accuracy_unique": float(solved[~strict].mean())}),
        "undecided": float(results["undecided"].mean()),
        "ambiguous_official": float(results["official"].mean()),
        "ambiguous_strict": float(strict.mean()),
    }
