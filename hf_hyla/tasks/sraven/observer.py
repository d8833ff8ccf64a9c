"""The ideal observer of SRAVEN, which knows the generator and answers with the most probable panel."""

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
    All explanations of the eight panels of each puzzle.

    An explanation matches the features of the three columns one to one, and gives every triple a rule that could have made
    it. Explanations with the same rules and the same ninth panel are added up. Time and memory grow with their number, which
    is a handful with the paper's settings and millions if many features have few values.

    Args:
        puzzles: (puzzles, row, column, features), as `cells` makes them. The ninth panel is not read.
        task: the task that made the puzzles.

    Returns:
        For each puzzle, a likelihood by (rules of the features of the third column, ninth panel). It is the likelihood of the
        eight panels given these rules, up to a constant factor, as an integer, so that equal likelihoods compare as equal.
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
        # Likelihood by state: the used features of the first and of the second column, and the rules and values so far.
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
    Probability of each ninth panel if all rule combinations have the same prior probability.

    Args:
        explained: the explanations of one puzzle, from `explain`.
        combinations: sorted tuples of rule ids, as `Task.combinations` gives them.
        permute: whether features are permuted from column to column, with equal probability for all permutations.
    """
    possible = set(combinations)
    panels: dict[Panel, int] = defaultdict(int)
    for (rules, panel), weight in explained.items():
        # Without permutations the features are in the order of the combination. With permutations, exchanging features that
        # have the same rule gives the same puzzle, so the product below counts the permutations that lead to it.
        combination = tuple(sorted(rules)) if permute else rules
        if combination in possible:
            panels[panel] += weight * (math.prod(map(math.factorial, Counter(rules).values())) if permute else 1)
    total = sum(panels.values())
    return {panel: weight / total for panel, weight in panels.items() if weight}


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
        for explained, label in zip(explain(puzzles, task), samples["labels"].tolist(), strict=True):
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


def most_probable(panels: dict[Panel, float]) -> Panel:
    """The observer's answer: the most probable panel of `posterior`, and the smallest of equally probable ones."""
    return min(panels, key=lambda panel: (-panels[panel], panel))


def _likelihood(num_values: int) -> list[int]:
    """
    For each rule, the probability of the eight cells of a triple that it fits, times a constant that makes all of these
    probabilities integers.

    With n = `num_values`, a row has n possibilities if the increment makes it, and n² if its second cell is free. Three rows of
    "distribute three" have n (n - 1) (n - 2) possibilities for the first row and six for each of the others.
    """
    distributions = num_values * (num_values - 1) * (num_values - 2) * 36
    constant = distributions * num_values ** (2 * GRID)
    rows = [num_values ** (GRID * (2 if sign else 1)) for sign in SIGN.tolist()]
    rows[DISTRIBUTE_THREE] = distributions
    return [constant // rows[rule] for rule in range(len(RULES))]
