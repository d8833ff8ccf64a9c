"""The ideal observer against the generator's own definition, and its committed record."""

import collections
import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from hf_hyla.tasks import get_task
from hf_hyla.tasks.sraven import RULES, cells
from hf_hyla.tasks.sraven.ceiling import observe
from hf_hyla.tasks.sraven.observer import explain, posterior


PROJECT = Path(__file__).parents[2]
RECORD = PROJECT / "recipes" / "results" / "sraven-ideal-observer.json"


def made_rows(rule: str, num_values: int) -> dict[tuple[int, ...], Fraction]:
    """Probability of every nine cells, row by row, that a rule can make: all of its draws, one after the other."""
    values = range(num_values)
    if rule == "distribute three":
        draws = [
            sum(orders, ())
            for symbols in itertools.permutations(values, 3)
            for orders in itertools.product(list(itertools.permutations(symbols)), repeat=3)
        ]
    else:
        if rule in ("sum", "difference"):
            sign = 1 if rule == "sum" else -1
            rows = [(x, y, (x + sign * y) % num_values) for x in values for y in values]
        else:
            step = 0 if rule == "constant" else int(rule.split()[1])
            rows = [(x, (x + step) % num_values, (x + 2 * step) % num_values) for x in values]
        draws = [sum(three, ()) for three in itertools.product(rows, repeat=3)]
    return {cells: Fraction(count, len(draws)) for cells, count in collections.Counter(draws).items()}


def by_definition(puzzle: np.ndarray, task, combinations) -> dict[tuple[int, ...], float]:
    """Probability of each ninth panel given the others: over combinations, permutations and panels, all of them."""
    features = task.num_features
    tables = [made_rows(rule, task.num_values) for rule in RULES]
    orders = list(itertools.permutations(range(features))) if task.permute else [tuple(range(features))]
    weights = collections.defaultdict(Fraction)
    for panel in itertools.product(range(task.num_values), repeat=features):
        whole = puzzle.copy()
        whole[2, 2] = panel
        for permutations in itertools.product(orders, repeat=3):
            before = np.empty_like(whole)
            for column, order in enumerate(permutations):
                before[:, column, order] = whole[:, column]
            rows = [tuple(before[:, :, feature].ravel().tolist()) for feature in range(features)]
            likelihoods = [[table.get(row, 0) for table in tables] for row in rows]
            for rules in combinations if all(map(any, likelihoods)) else ():
                weights[panel] += math.prod(likelihoods[f][rule] for f, rule in enumerate(rules))
    total = sum(weights.values())
    return {panel: float(weight / total) for panel, weight in weights.items() if weight}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"num_features": 2, "num_values": 3}, 40),
        ({"num_features": 2, "num_values": 4, "permute": False}, 25),
        ({"num_features": 3, "num_values": 3}, 8),
    ],
)
def test_the_posterior_follows_from_the_definition_of_the_generator(settings, count):
    task = get_task("sraven", **settings)
    undecided = 0
    for split in ("test", "ood"):
        samples = task.samples(split, np.arange(count))
        puzzles = cells(samples["input_ids"], samples["labels"])
        for puzzle, explained in zip(puzzles, explain(puzzles, task.num_values, task.permute), strict=True):
            ours = posterior(explained, task.combinations(split), task.permute)
            assert ours == pytest.approx(by_definition(puzzle, task, task.combinations(split)), rel=1e-12)
            undecided += len(ours) > 1
    assert undecided > count / 10


def test_the_observer_does_not_see_the_ninth_panel():
    task = get_task("sraven", num_features=3)
    samples = task.samples("ood", np.arange(50))
    puzzles = cells(samples["input_ids"], samples["labels"])
    hidden = puzzles.copy()
    hidden[:, 2, 2] = 0
    assert explain(hidden, task.num_values, task.permute) == explain(puzzles, task.num_values, task.permute)


@pytest.fixture(scope="module")
def ood():
    return observe(get_task("sraven"), "ood", 51_200)


def test_the_observers_probabilities_are_calibrated(ood):
    for scores in (ood, observe(get_task("sraven", num_features=3, num_values=4), "test", 3000)):
        assert 0.5 < scores["accuracy"] < 0.99
        assert abs(scores["accuracy"] - scores["expected_accuracy"]) < 4 * scores["standard_error"]
        assert scores["accuracy_all_combinations"] <= scores["accuracy"] + 3 * scores["standard_error"]


def test_the_observer_solves_every_puzzle_with_a_unique_answer(ood):
    assert ood["accuracy_unique"] == 1.0
    assert ood["undecided"] <= ood["ambiguous_strict"]
    scores = observe(get_task("sraven", unambiguous=True), "test", 500)
    assert (scores["accuracy"], scores["ambiguous_strict"], scores["undecided"]) == (1.0, 0.0, 0.0)


def test_the_committed_record_holds_the_observers_scores(ood):
    record = json.loads(RECORD.read_text())
    assert record["task"] == {"name": "sraven", **get_task("sraven").settings}
    assert record["data_fingerprint"] == get_task("sraven").fingerprint()
    assert re.fullmatch(r"[0-9a-f]{40}", record["environment"]["git_commit"])
    assert set(record["splits"]) == {"test", "ood"} and record["splits"]["test"]["num_samples"] >= 1000
    assert record["splits"]["ood"] == pytest.approx(ood)
