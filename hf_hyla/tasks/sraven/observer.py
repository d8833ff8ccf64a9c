"""The ideal observer of SRAVEN, which knows how puzzles are made and answers with the most probable panel."""

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from .rules import DISTRIBUTE_THREE, GRID, RULES, SIGN, rule_fits
from .samples import SravenTask, cells


_CHUNK = 2048
Panel = tuple[int, ...]
Rules = tuple[int, ...]


def explain(puzzles: np.ndarray, task: SravenTask) -> list[dict[tuple[Rules, Panel], int]]:
    """
    Every explanation of the eight panels of each puzzle, exactly.

    An explanation pairs the features of the three columns, one to one, and gives every triple a rule that could have
    made it. Explanations with the same rules and the same ninth panel are added up. Time and memory grow with their number: a
    handful with the paper's settings, millions where many features have few values.

    Args:
        puzzles: (puzzles, 3, 3, features) as `cells` makes them; the ninth panel is not read.
        task: whose generator made them.

    Returns:
        For each puzzle, by (rules of the features of the third column, ninth panel), the likelihood of the eight panels up
        to a constant factor, given these rules: an integer, so that equal likelihoods are equal.
    """
    features, likelihood = task.num_features, _likelihood(task.num_values)
    triples: list[list[list[tuple[int, int, int, int]]]] = [[[] for _ in range(features)] for _ in puzzles]
    for rule, (fits, predictions) in enumerate(rule_fits(puzzles, task.num_values, task.permute)):
        found = np.nonzero(fits)
        values = np.broadcast_to(predictions, fits.shape)[found]
        for a, b, c, puzzle, value in zip(*(axis.tolist() for axis in (*found, values)), strict=True):
            triples[puzzle][c].append((a, b, rule, value))

    explained = []
    for of_puzzle in triples:
        # Features that the first and the second column have used up, rules and values so far → likelihood.
        states: dict[tuple[frozenset, frozenset, Rules, Panel], int] = {(frozenset(), frozenset(), (), ()): 1}
        for of_feature in of_puzzle:
            extended: dict[tuple[frozenset, frozenset, Rules, Panel], int] = defaultdict(int)
            for (used_a, used_b, rules, panel), weight in states.items():
                for a, b, rule, value in of_feature:
                    if a not in used_a and b not in used_b:
                        state = used_a | {a}, used_b | {b}, (*rules, rule), (*panel, value)
                        extended[state] += weight * likelihood[rule]
            states = extended
        explained.append({(rules, panel): weight for (_, _, rules, panel), weight in states.items()})
    return explained


def posterior(
    explained: dict[tuple[Rules, Panel], int], combinations: list[Rules], permute: bool
) -> dict[Panel, float]:
    """
    Probability of each ninth panel, if all rule combinations are equally probable beforehand.

    Args:
        explained: of one puzzle, from `explain`.
        combinations: sorted tuples of rule ids, as `Task.combinations` gives them.
        permute: whether features are permuted from column to column, all ways equally often.
    """
    possible = set(combinations)
    panels: dict[Panel, int] = defaultdict(int)
    for (rules, panel), weight in explained.items():
        # Without permutations the features have the combination's order. With them, exchanging features of one rule
        # makes the same puzzle by other permutations: this many of them lead to it.
        combination = tuple(sorted(rules)) if permute else rules
        if combination in possible:
            panels[panel] += weight * (math.prod(map(math.factorial, Counter(rules).values())) if permute else 1)
    total = sum(panels.values())
    return {panel: weight / total for panel, weight in panels.items() if weight}


def observer_record(task: SravenTask, num_samples: int) -> dict[str, Any]:
    """`observe` on the splits that models are scored on, beside the task's settings and fingerprint."""
    splits = {split: observe(task, split, num_samples) for split in ("test", "ood")}
    return {"task": task.spec, "data_fingerprint": task.fingerprint(), "splits": splits}


def observe(task: SravenTask, split: str, num_samples: int) -> dict[str, Any]:
    """
    Scores of the ideal observer on the first samples of a split: the highest that any model can expect there.

    It knows the generator and the rule combinations of that split (those of training for `test`, the held-out ones for
    `ood`), sees the eight panels, and answers with the most probable ninth, and with the smallest of equally probable ones.

    Returns:
        `num_samples`; `accuracy`, its `standard_error`, and `expected_accuracy`, the mean probability that the observer
        gives its answers, which estimates the same with less noise; `feature_accuracy` of the same answers;
        `accuracy_all_combinations`, where the observer holds every combination of rules possible and not only the
        split's; `accuracy_unique`, where the answer is strictly unique, if any is; `undecided`, the fraction of puzzles
        that leave the observer more than one answer; `ambiguous_official` and `ambiguous_strict`, see `ambiguity`.

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
        for explained, label in zip(explain(puzzles, task), samples["labels"].tolist(), strict=True):
            panels = posterior(explained, combinations, task.permute)
            answer = _most_probable(panels)
            columns["right"].append([value == true for value, true in zip(answer, label, strict=True)])
            columns["probability"].append(panels[answer])
            columns["undecided"].append(len(panels) > 1)
            columns["right_all"].append(_most_probable(posterior(explained, everything, task.permute)) == tuple(label))
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


def _most_probable(panels: dict[Panel, float]) -> Panel:
    return min(panels, key=lambda panel: (-panels[panel], panel))


def _likelihood(num_values: int) -> list[int]:
    """
    Of each rule, the probability that it makes the eight cells of a triple that it fits, times a constant that makes all
    of them integers.

    A row without a free second cell is one of `num_values`, another one of their square; and three rows of the same
    three symbols are one of n (n - 1) (n - 2) in the first row and of six in each of the others.
    """
    distributions = num_values * (num_values - 1) * (num_values - 2) * 36
    constant = distributions * num_values ** (2 * GRID)
    rows = [num_values ** (GRID * (2 if sign else 1)) for sign in SIGN.tolist()]
    rows[DISTRIBUTE_THREE] = distributions
    return [constant // rows[rule] for rule in range(len(RULES))]
