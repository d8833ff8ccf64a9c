"""The ideal observer of SRAVEN, which knows the generator and answers with the most probable panel."""

import math
from collections import Counter, defaultdict

import numpy as np

from .rules import DISTRIBUTE_THREE, GRID, RULES, SIGN, rule_fits


Panel = tuple[int, ...]
Rules = tuple[int, ...]


def explain(puzzles: np.ndarray, num_values: int, permute: bool) -> list[dict[tuple[Rules, Panel], int]]:
    """
    All explanations of the eight panels of each puzzle.

    An explanation matches the features of the three columns one to one, and gives every triple a rule that could have made
    it. Explanations with the same rules and the same ninth panel are added up. Time and memory grow with their number, which
    is a handful with the paper's settings and millions if many features have few values.

    Args:
        puzzles: (puzzles, row, column, features), as `cells` makes them. The ninth panel is not read.
        num_values, permute: settings of the task that made the puzzles.

    Returns:
        For each puzzle, a likelihood by (rules of the features of the third column, ninth panel). It is the likelihood of the
        eight panels given these rules, up to a constant factor, as an integer, so that equal likelihoods compare as equal.
    """
    features, likelihood = puzzles.shape[-1], _likelihood(num_values)
    triples: list[list[list[tuple[int, int, int, int]]]] = [[[] for _ in range(features)] for _ in puzzles]
    for rule, (fits, predictions) in enumerate(rule_fits(puzzles, num_values, permute)):
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
