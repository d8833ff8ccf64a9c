"""Tests of ambiguity against the official check's verdicts and searches through all permutations."""

import itertools
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_hyla.tasks import get_task
from hf_hyla.tasks.sraven import cells
from hf_hyla.tasks.sraven.ambiguity import ambiguity


def predictions(a: list[int], b: list[int], c: list[int], num_values: int) -> set[int]:
    """What the rules that fit say of c[2], from the definitions; a, b and c are one feature of each column, over rows."""
    said = set()
    for step in (0, 1, 2, -1, -2):
        starts = all((b[i] - a[i] - step) % num_values == 0 for i in range(3))
        if starts and all((c[i] - b[i] - step) % num_values == 0 for i in range(2)):
            said.add((b[2] + step) % num_values)
    for sign in (1, -1):
        if all((a[i] + sign * b[i] - c[i]) % num_values == 0 for i in range(2)):
            said.add((a[2] + sign * b[2]) % num_values)
    symbols = sorted([a[0], b[0], c[0]])
    if symbols == sorted([a[1], b[1], c[1]]) and a[2] in symbols and b[2] in symbols:
        used = [(a[2] == symbol) + (b[2] == symbol) for symbol in symbols]
        said.add(symbols[used.index(min(used))])
    return said


def triples(puzzle: np.ndarray, num_values: int) -> dict[tuple[int, int, int], set[int]]:
    columns = puzzle.astype(int).transpose(1, 2, 0).tolist()
    return {
        (a, b, c): predictions(columns[0][a], columns[1][b], columns[2][c], num_values)
        for a, b, c in itertools.product(range(puzzle.shape[-1]), repeat=3)
    }


def by_all_permutations(puzzle: np.ndarray, num_values: int, permute: bool = True) -> tuple[int, int]:
    """How many of the permutations of all three columns make the puzzle officially and strictly ambiguous."""
    said, truth, features = triples(puzzle, num_values), puzzle[2, 2].tolist(), puzzle.shape[-1]
    orders = list(itertools.permutations(range(features))) if permute else [tuple(range(features))]
    official = strict = 0
    for columns in itertools.product(orders, repeat=3):
        explained = [(said[triple], truth[triple[2]]) for triple in zip(*columns, strict=True)]
        if all(values for values, _ in explained):
            wrong = [bool(values - {true}) for values, true in explained]
            official += all(wrong)
            strict += any(wrong)
    return official, strict


def by_search(puzzle: np.ndarray, num_values: int) -> tuple[bool, bool]:
    """The same verdicts for many features: pairings are built up triple by triple, and dropped once nothing fits."""
    said, truth, features = triples(puzzle, num_values), puzzle[2, 2].tolist(), puzzle.shape[-1]

    def pairings(c, used_a, used_b):
        if c == features:
            yield []
            return
        for a, b in itertools.product(set(range(features)) - used_a, set(range(features)) - used_b):
            if said[a, b, c]:
                for rest in pairings(c + 1, used_a | {a}, used_b | {b}):
                    yield [bool(said[a, b, c] - {truth[c]}), *rest]

    found = list(pairings(0, set(), set()))
    return any(map(all, found)), any(map(any, found))


def our_puzzles(count: int, split: str = "train", **settings) -> np.ndarray:
    samples = get_task("sraven", **settings).samples(split, np.arange(count))
    return cells(samples["input_ids"], samples["labels"])


@pytest.fixture(scope="module")
def official(golden):
    return load_file(golden / "sraven_instances.safetensors")


def test_the_official_verdict_equals_the_official_check_on_every_official_instance(official):
    answers, _ = ambiguity(official["train.instances"], 8)
    assert np.array_equal(answers, official["train.ambiguous"] > 0) and answers.sum() == 3


def test_a_quarter_of_the_official_instances_has_no_unique_answer(official):
    assert ambiguity(official["train.instances"], 8)[1].sum() == 135  # of 512


def test_verdicts_are_those_of_all_13824_permutations(official):
    puzzles = np.concatenate(
        [official["train.instances"][:40], official["train.instances"][official["train.ambiguous"] > 0]]
    )
    counts = np.array([by_all_permutations(puzzle, 8) for puzzle in puzzles])
    assert np.array_equal(counts[40:, 0], [24, 48, 24])  # the official check's own counts
    assert 5 < (counts[:, 1] > 0).sum() < 35
    assert np.array_equal(np.array(ambiguity(puzzles, 8)).T, counts > 0)


@pytest.mark.parametrize(("features", "values"), [(2, 3), (2, 8), (3, 3), (3, 5)])
@pytest.mark.parametrize("permute", [True, False])
def test_verdicts_on_small_settings_are_those_of_all_permutations(features, values, permute):
    puzzles = our_puzzles(150, num_features=features, num_values=values, permute=permute)
    expected = np.array([by_all_permutations(puzzle, values, permute) for puzzle in puzzles]) > 0
    assert 0 < expected.sum() < expected.size
    assert np.array_equal(np.array(ambiguity(puzzles, values, permute)).T, expected)


@pytest.mark.parametrize(("features", "values", "count"), [(5, 4, 40), (6, 8, 100), (8, 8, 60)])
def test_verdicts_for_many_features_are_those_of_a_search(features, values, count):
    puzzles = our_puzzles(count, num_features=features, num_values=values)
    expected = np.array([by_search(puzzle, values) for puzzle in puzzles])
    assert 0 < expected[:, 1].sum() < count
    assert np.array_equal(np.array(ambiguity(puzzles, values)).T, expected)


def test_verdicts_do_not_depend_on_the_other_puzzles(official):
    puzzles = np.tile(official["train.instances"], (9, 1, 1, 1))  # more than are looked at together
    whole = np.array(ambiguity(puzzles, 8))
    assert np.array_equal(whole[:, :512], whole[:, -512:])
    assert np.array_equal(np.array(ambiguity(puzzles[7:8], 8)), whole[:, 7:8])
    assert np.array(ambiguity(puzzles[:0], 8)).shape == (2, 0)
    with pytest.raises(ValueError, match=r"\(puzzles, 3, 3, features\), got shape \(36,\)"):
        ambiguity(np.zeros(36, int), 8)


def test_twenty_thousand_puzzles_are_checked_in_a_second():
    puzzles = our_puzzles(8192)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        ambiguity(puzzles, 8)
        seconds.append(time.process_time() - started)
    assert len(puzzles) / min(seconds) > 20_000


def test_unambiguous_tasks_draw_only_unique_puzzles_each_a_function_of_its_index():
    task = get_task("sraven", unambiguous=True)
    indices = np.r_[0:200, 19_999_900:20_000_000]
    for split in task.splits:
        samples = task.samples(split, indices)
        assert not ambiguity(cells(samples["input_ids"], samples["labels"]), 8)[1].any()
        assert set(map(tuple, samples["rules"])) <= set(task.combinations(split))
        order = np.random.default_rng(0).permutation(len(indices))
        shuffled = task.samples(split, indices[order])
        assert all(np.array_equal(shuffled[name], samples[name][order]) for name in samples)
        for position in (0, 17, 250):
            alone = task.samples(split, indices[position : position + 1])
            assert all(np.array_equal(alone[name][0], samples[name][position]) for name in samples)


def test_unambiguous_tasks_keep_unique_puzzles_and_replace_the_others():
    plain = get_task("sraven").samples("ood", np.arange(2000))
    unique = get_task("sraven", unambiguous=True).samples("ood", np.arange(2000))
    ambiguous = ambiguity(cells(plain["input_ids"], plain["labels"]), 8)[1]
    same = (plain["input_ids"] == unique["input_ids"]).all(axis=1)
    assert np.array_equal(same, ~ambiguous)


def test_settings_under_which_no_puzzle_is_unique_are_refused_at_once():
    with pytest.raises(ValueError, match="none of the first 512 of train is one: choose a larger num_values"):
        get_task("sraven", num_features=8, num_values=3, unambiguous=True)


def test_accuracy_on_unique_puzzles_leaves_the_others_out():
    task = get_task("sraven")
    samples = task.samples("ood", np.arange(400))
    ambiguous = task.ambiguous(samples["input_ids"], samples["labels"])[1]
    answers = samples["labels"].copy()
    answers[ambiguous, 0] += 1  # wrong on all ambiguous puzzles
    wrong = np.flatnonzero(~ambiguous)[:30]  # and on thirty others
    answers[wrong, 1] += 1
    logits = np.eye(9)[answers]
    scores = task.metrics(logits, samples["labels"], samples["input_ids"])
    assert tuple(scores) == task.metric_names
    assert scores["accuracy"] == pytest.approx(1 - (30 + ambiguous.sum()) / 400)
    assert scores["accuracy_unique"] == pytest.approx(1 - 30 / (~ambiguous).sum())
    none_unique = [column[ambiguous] for column in (logits, samples["labels"], samples["input_ids"])]
    assert set(task.metrics(*none_unique)) == {"accuracy", "feature_accuracy"}
