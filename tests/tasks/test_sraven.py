"""Tests of SRAVEN: rules, permutations, splits and statistics, compared with the official generator's samples."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_hyla import HylaConfig
from hf_hyla.tasks import get_task
from hf_hyla.tasks.sraven import RULES, cells


NUM_RULES = len(RULES)


def holds(rule: int, rows: np.ndarray, num_values: int) -> bool:
    """Whether the rule governs these rows (row, column), straight from the definitions."""
    name = RULES[rule]
    if name == "distribute three":
        return len(set(rows[0])) == 3 and all(sorted(row) == sorted(rows[0]) for row in rows)
    for a, b, c in rows.tolist():
        if name == "constant":
            right = a == b == c
        elif name.startswith("progression"):
            step = int(name.split()[1])
            right = (b - a - step) % num_values == 0 and (c - b - step) % num_values == 0
        elif name == "sum":
            right = (a + b - c) % num_values == 0
        else:
            right = (a - b - c) % num_values == 0
        if not right:
            return False
    return True


def unpermuted(panels: np.ndarray, permutations: np.ndarray) -> np.ndarray:
    """Panels (row, column, feature) before their columns were permuted."""
    before = np.empty_like(panels)
    for column in range(3):
        for j, source in enumerate(permutations[column]):
            before[:, column, source] = panels[:, column, j]
    return before


def our_puzzles(task, split, count):
    samples = task.samples(split, np.arange(count))
    cells = np.concatenate([samples["input_ids"][:, : -task.num_features], samples["labels"]], axis=1)
    return cells.reshape(count, 3, 3, task.num_features), samples["rules"], samples["permutations"]


def official_puzzles(golden):
    official = load_file(golden / "sraven_instances.safetensors")
    return official["train.instances"], official["train.latents"], official["train.perms"]


def test_official_samples_follow_our_rules_and_permutations(golden):
    for panels, rules, permutations in zip(*official_puzzles(golden), strict=True):
        before = unpermuted(panels.astype(int), permutations)
        assert all(holds(rule, before[:, :, feature], 8) for feature, rule in enumerate(rules))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"permute": False},
        {"num_features": 2},
        {"num_features": 8},
        {"num_values": 3},
        {"num_values": 40},
        {"seed": 7},
    ],
)
def test_our_samples_follow_the_rules_that_they_name(settings):
    task = get_task("sraven", **settings)
    for split in task.splits:
        for panels, rules, permutations in zip(*our_puzzles(task, split, 200), strict=True):
            assert panels.min() >= 0 and panels.max() < task.num_values
            assert task.permute or (permutations == np.arange(task.num_features)).all()
            before = unpermuted(panels, permutations)
            for feature, rule in enumerate(rules):
                assert holds(rule, before[:, :, feature], task.num_values), RULES[rule]


def test_every_rule_draws_every_row_it_allows_equally_often():
    task = get_task("sraven", num_values=5)
    puzzles, rules, permutations = our_puzzles(task, "train", 12_000)
    rows_of_rule = {rule: [] for rule in range(NUM_RULES)}
    for panels, ids, permutation in zip(puzzles, rules, permutations, strict=True):
        before = unpermuted(panels, permutation)
        for feature, rule in enumerate(ids):
            rows_of_rule[rule].append(before[1, :, feature])
    for rule, rows in rows_of_rule.items():
        allowed = [
            row for row in itertools.product(range(5), repeat=3)
            if holds(rule, np.array([row, row, row]), 5)
        ]  # fmt: skip
        counts = np.array([sum(map(np.array_equal, rows, itertools.repeat(row))) for row in allowed[:5]])
        expected = len(rows) / len(allowed)
        assert (abs(counts - expected) < 6 * expected**0.5).all(), RULES[rule]


def test_distribute_three_draws_each_of_its_six_orders_equally_often_anew_in_every_row():
    """
    The symbols come in a random order themselves, so what can be seen is how one row is ordered after another: each of the six
    ways has the chance 1/6. If one order were never drawn, two rows would agree with the chance 1/5.
    """
    puzzles, rules, _ = our_puzzles(get_task("sraven", num_features=2, permute=False), "train", 40_000)
    sample, feature = np.nonzero(rules == RULES.index("distribute three"))
    rows = puzzles[sample, :, :, feature]  # (draws, row, column)
    expected = len(rows) / 6
    deviation = (expected * 5 / 6) ** 0.5  # of a binomial count
    assert len(rows) / 30 > 8 * deviation  # what one order that is missing would change
    for one, other in itertools.combinations(range(3), 2):
        # Where each symbol of the one row stands in the other.
        moved = (rows[:, one, :, None] == rows[:, other, None]).argmax(axis=-1)
        found, counts = np.unique(moved, axis=0, return_counts=True)
        assert found.tolist() == sorted(map(list, itertools.permutations(range(3))))
        assert (abs(counts - expected) < 5 * deviation).all()


def test_statistics_match_the_official_generator(golden):
    """Frequencies of values, of permutations and of equal neighbours, each within sampling error of 512 instances."""
    theirs, _, their_permutations = official_puzzles(golden)
    ours, _, our_permutations = our_puzzles(get_task("sraven"), "train", 20_000)
    theirs = theirs.astype(int)

    def statistics(panels, permutations):
        yield from np.bincount(panels.ravel(), minlength=8) / panels.size
        yield from (panels[:, :, 0, 0] == panels[:, :, 1, 0]).mean(axis=0)
        yield from (permutations[:, :, 0] == 0).mean(axis=0)
        yield (np.sort(panels[:, 0, 0], axis=-1) == np.sort(panels[:, 0, 1], axis=-1)).all(axis=-1).mean()

    for left, right in zip(statistics(theirs, their_permutations), statistics(ours, our_permutations), strict=True):
        assert abs(left - right) < 5 * (max(right, 0.01) / 512) ** 0.5


def chi_square_is_small(theirs: np.ndarray, ours: np.ndarray, categories: int) -> bool:
    """Whether two samples of category numbers may come from one distribution: chi-square within five deviations."""
    counts = np.array([np.bincount(values.ravel(), minlength=categories) for values in (theirs, ours)], dtype=float)
    counts = counts[:, counts.sum(axis=0) > 0]
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
    freedom = counts.shape[1] - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_rules_values_and_permutations_are_as_frequent_as_in_the_official_generator(golden):
    theirs, ours = official_puzzles(golden), our_puzzles(get_task("sraven"), "train", 20_000)
    for rule in range(NUM_RULES):
        assert chi_square_is_small((theirs[1] == rule).sum(axis=1), (ours[1] == rule).sum(axis=1), 5)
        # The comparison can tell: were every first rule this one, it would fail.
        changed = np.where(np.arange(4) == 0, rule, ours[1])
        assert not chi_square_is_small((theirs[1] == rule).sum(axis=1), (changed == rule).sum(axis=1), 5)
    orders = np.array([64, 16, 4, 1])
    for column in range(3):
        assert chi_square_is_small(theirs[2][:, column] @ orders, ours[2][:, column] @ orders, 256)

    def by_rule(panels, rules, permutations):
        """Of each feature before it was permuted: its rule, and its nine cells."""
        before = np.empty_like(panels, dtype=int)
        np.put_along_axis(before, permutations[:, None].astype(int), panels.astype(int), axis=-1)
        return rules.ravel(), before.transpose(0, 3, 1, 2).reshape(-1, 3, 3)

    (their_rules, their_cells), (our_rules, our_cells) = by_rule(*theirs), by_rule(*ours)
    for rule in range(NUM_RULES):
        left, right = their_cells[their_rules == rule], our_cells[our_rules == rule]
        # Values of each cell, and how two rows and two columns go together.
        for row, column in itertools.product(range(3), repeat=2):
            assert chi_square_is_small(left[:, row, column], right[:, row, column], 8)
        assert chi_square_is_small(left[:, 0, :2] @ [8, 1], right[:, 0, :2] @ [8, 1], 64)
        assert chi_square_is_small(left[:, :2, 0] @ [8, 1], right[:, :2, 0] @ [8, 1], 64)


def test_splits_are_disjoint_sorted_and_of_the_papers_sizes():
    task = get_task("sraven")
    train, ood = task.combinations("train"), task.combinations("ood")
    assert (len(train), len(ood)) == (248, 82)
    assert not set(train) & set(ood)
    assert task.combinations("test") == train
    assert set(train) | set(ood) == set(itertools.combinations_with_replacement(range(NUM_RULES), 4))
    for split in task.splits:
        assert {tuple(rules) for rules in task.samples(split, np.arange(3000))["rules"]} <= set(
            task.combinations(split)
        )


def test_no_puzzle_of_test_is_in_the_beginning_of_train():
    task = get_task("sraven")
    train, test = (task.samples(split, np.arange(5000))["input_ids"] for split in ("train", "test"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


@pytest.mark.parametrize("num_features", range(2, 9))
def test_no_combination_of_ood_is_drawn_in_train_or_test(num_features):
    task = get_task("sraven", num_features=num_features)
    drawn = {split: {tuple(rules) for rules in task.samples(split, np.arange(2000))["rules"]} for split in task.splits}
    assert not drawn["ood"] & (drawn["train"] | drawn["test"])


@pytest.mark.parametrize("held_out", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("num_features", [2, 4, 8])
def test_every_rule_occurs_in_train_for_every_held_out_fraction(held_out, num_features):
    for seed in range(3):
        task = get_task("sraven", num_features=num_features, held_out=held_out, seed=seed)
        assert set(itertools.chain(*task.combinations("train"))) == set(range(NUM_RULES))


def test_samples_are_pinned():
    # A change here changes every sample: committed results would no longer be reproducible.
    sample = get_task("sraven").dataset("train")[19_999_999]
    assert sample["input_ids"].tolist() == PINNED


PINNED = [1, 1, 2, 3, 2, 4, 5, 7, 6, 5, 3, 7, 2, 5, 6, 6, 3, 0, 0, 3, 2, 1, 4, 2, 1, 3, 3, 2, 2, 5, 4, 1, 8, 8, 8, 8]


def test_items_have_the_documented_shapes_alone_and_in_batches():
    dataset = get_task("sraven").dataset("ood")
    assert len(dataset) == 51_200 and len(get_task("sraven").dataset("train")) == 20_000_000
    batch = dataset.__getitems__([5, 0, 51_199])
    assert len(batch) == 3
    for index, item in zip([5, 0, 51_199], batch, strict=True):
        alone = dataset[index]
        assert set(alone) == {"input_ids", "labels", "rules", "permutations"}
        assert all(np.array_equal(alone[name], item[name]) for name in alone)
    assert item["input_ids"].shape == (36,) and item["input_ids"].dtype == np.int64
    assert item["labels"].shape == (4,) and (item["input_ids"][-4:] == 8).all()
    with pytest.raises(IndexError, match="0 to 51199"):
        dataset[51_200]
    with pytest.raises(TypeError):
        dataset[1.5]


def test_answers_are_called_by_their_values():
    config = HylaConfig(**get_task("sraven", num_values=5).model_defaults)
    assert config.id2label == dict(enumerate("01234")) and config.label2id == {str(value): value for value in range(5)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_features": 9}, "num_features must be 2 to 8"),
        ({"num_values": 2}, "num_values must be 3 to 1000"),
        ({"held_out": 1}, "held_out must lie between 0 and 1, got 1"),
        ({"held_out": 1.5}, "held_out must lie between 0 and 1, got 1.5"),
        ({"held_out": 0.001}, "holds out 0 and leaves 330"),
        ({"held_out": "half"}, "held_out"),
        ({"num_feature": 4}, "did you mean 'num_features'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get_task("sraven", **settings)


def test_samples_with_other_rules_keep_all_that_does_not_depend_on_them():
    task = get_task("sraven")
    indices = np.arange(50)
    drawn = task.samples("ood", indices)
    same = task.with_rules("ood", indices, drawn["rules"])
    assert all(np.array_equal(same[name], drawn[name]) for name in drawn)
    rules = drawn["rules"].copy()
    rules[:, 0] = (rules[:, 0] + 1) % len(RULES)
    other = task.with_rules("ood", indices, rules)
    assert np.array_equal(other["permutations"], drawn["permutations"]) and np.array_equal(other["rules"], rules)
    before, after = (cells(one["input_ids"], one["labels"]) for one in (drawn, other))
    # The feature of every cell before the columns were permuted.
    feature = np.broadcast_to(drawn["permutations"][:, None], before.shape)
    assert np.array_equal(before[feature > 0], after[feature > 0])
    assert ((before != after) & (feature == 0)).any(axis=(1, 2, 3)).mean() > 0.9
    with pytest.raises(ValueError, match="no split 'odd'"):
        task.with_rules("odd", indices, rules)
