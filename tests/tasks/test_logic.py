"""Tests of fuzzy logic: operators, splits and targets, compared with the official generator's samples."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hf_hyla.tasks import get_task
from hf_hyla.tasks.logic import disjunction


def truth(terms: list[list[int]], x: list[float]) -> float:
    """max of min of x or 1 - x, with terms as lists of bits."""
    return max(min(v if bit else 1 - v for bit, v in zip(term, x, strict=True)) for term in terms)


def test_official_targets_are_our_disjunction(golden):
    official = load_file(golden / "logic_samples.safetensors")
    ids = official["train.latents"].astype(int) @ np.array([8, 4, 2, 1])
    ours = disjunction(ids, official["train.inputs"])
    np.testing.assert_allclose(ours, official["train.targets"][..., 0], atol=1e-7)


@pytest.mark.parametrize(("variables", "terms"), [(3, 2), (4, 2), (5, 3)])
def test_samples_are_values_of_the_functions_that_they_name(variables, terms):
    task = get_task("logic", num_variables=variables, num_terms=terms, num_examples=7)
    for split in task.splits:
        samples = task.samples(split, np.arange(100))
        assert samples["input_values"].shape == (100, 7, variables + 1)
        assert (samples["input_values"][:, -1, -1] == 0).all()
        for values, label, ids, base in zip(
            samples["input_values"], samples["labels"], samples["terms"], samples["base_mse"], strict=True
        ):
            bits = [[int(digit) for digit in f"{term:0{variables}b}"] for term in ids]
            expected = [truth(bits, row[:-1].tolist()) for row in values]
            np.testing.assert_allclose([*values[:-1, -1], label], expected, atol=1e-6)
            assert base == pytest.approx(np.var(expected), rel=1e-4)
            assert tuple(ids) in task.combinations(split)


def test_splits_are_disjoint_and_of_the_papers_sizes():
    task = get_task("logic", num_examples=32, held_out=0.7)
    splits = {split: task.combinations(split) for split in task.splits}
    assert {split: len(c) for split, c in splits.items()} == {"train": 20, "test": 20, "ood": 46, "extrapolation": 6}
    assert splits["test"] == splits["train"]
    assert set(splits["train"]) | set(splits["ood"]) == set(itertools.combinations(range(12), 2))
    assert not set(splits["train"]) & set(splits["ood"])
    assert set(splits["extrapolation"]) == set(itertools.combinations(range(12, 16), 2))


@pytest.mark.parametrize("seed", range(8))
def test_every_term_of_ood_occurs_in_train(seed):
    task = get_task("logic", held_out=0.7, seed=seed)
    assert set(itertools.chain(*task.combinations("ood"))) <= set(itertools.chain(*task.combinations("train")))


def test_no_combination_of_one_split_is_drawn_in_another():
    task = get_task("logic", held_out=0.7)
    drawn = {split: {tuple(terms) for terms in task.samples(split, np.arange(3000))["terms"]} for split in task.splits}
    assert drawn["test"] == drawn["train"] == set(task.combinations("train"))
    assert not drawn["train"] & drawn["ood"] and not (drawn["train"] | drawn["ood"]) & drawn["extrapolation"]


def test_points_and_targets_are_distributed_as_in_the_official_generator(golden):
    official = load_file(golden / "logic_samples.safetensors")
    ours = get_task("logic").samples("train", np.arange(10_000))["input_values"][:, :-1]
    # 256 tasks: the greatest distance of two distribution functions, points being independent and values of a task not.
    for theirs, drawn, bound in (
        (official["train.inputs"], ours[..., :-1], 2 / official["train.inputs"].size ** 0.5),
        (official["train.targets"], ours[..., -1], 2 / 256**0.5),
    ):
        grid = np.linspace(0, 1, 101)
        left, right = (np.searchsorted(np.sort(values.ravel()), grid) / values.size for values in (theirs, drawn))
        assert np.abs(left - right).max() < bound


def test_points_are_fresh_in_every_split():
    task = get_task("logic")
    points = [task.samples(split, np.arange(500))["input_values"][:, 0, 0] for split in task.splits]
    assert len(np.unique(np.concatenate(points))) > 0.999 * 4 * 500


def test_samples_are_pinned():
    # A change here changes every sample: committed results would no longer be reproducible.
    sample = get_task("logic").dataset("train")[0]
    assert sample["input_values"][0].astype(float).tolist() == PINNED


PINNED = [0.9784448742866516, 0.7785888910293579, 0.9521979689598083, 0.7943080067634583, 0.02155512571334839]


def test_batches_hold_what_the_model_reads():
    task = get_task("logic", num_examples=5)
    batch = task.collate(task.dataset("train").__getitems__([0, 1, 2]))
    assert set(batch) == {"input_values", "labels"}
    assert batch["input_values"].shape == (3, 5, 5) and batch["input_values"].dtype == torch.float32
    assert batch["labels"].shape == (3,)
    plain = task.collate([task.dataset("train")[index] for index in range(3)])
    assert all(torch.equal(batch[name], plain[name]) for name in batch)


def test_a_value_that_is_not_finite_is_refused_before_training():
    task = get_task("logic")
    samples = [task.dataset("train")[index] for index in range(3)]
    samples[1]["input_values"][2, 0] = np.nan
    with pytest.raises(ValueError, match="input_values of sample 1 of the batch is not finite"):
        task.collate(samples)


def test_the_metric_is_a_mean_of_ratios_and_includes_the_last_value():
    task = get_task("logic", num_examples=6)
    samples = task.samples("ood", np.arange(50))
    guess = samples["labels"] + np.linspace(-0.2, 0.2, 50)
    scores = task.metrics(guess[:, None], samples["labels"], samples["input_values"])
    expected = np.mean(1 - (guess - samples["labels"]) ** 2 / samples["base_mse"])
    assert scores["r2"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_variables": 1}, "num_variables must be 2 to 8"),
        ({"num_examples": 1}, "num_examples must be 2 to 10000"),
        ({"num_terms": 5}, "num_terms must be 1 to 4"),
        ({"held_out": 0.99}, "must occur in training"),
        *(
            ({"held_out": value}, f"held_out must lie between 0 and 1, got {value}")
            for value in (-0.5, float("inf"), float("nan"))
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get_task("logic", **settings)


def test_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'sraven'"):
        get_task("raven")
