"""The split of the official implementation, against JAX's own permutations and the two generators' use of them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_hyla.runs.paper import differing_settings, paper_result
from hf_hyla.tasks import TASKS, get_task
from hf_hyla.tasks.reference_split import reference_order


PAPERS = [name for name, task in TASKS.items() if task.paper]
PERMUTATIONS = load_file(Path(__file__).parents[1] / "golden" / "official_permutations.safetensors")


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_the_order_equals_that_of_jax(name):
    count, seed = map(int, name.split("."))
    np.testing.assert_array_equal(reference_order(seed, count), PERMUTATIONS[name])


@pytest.mark.parametrize("seed", [0, 1, 2, 2024])
@pytest.mark.parametrize(("name", "held_out", "count"), [("logic", 0.7, 46), ("sraven", 0.25, 82)])
def test_the_first_combinations_of_the_official_order_are_held_out(name, held_out, count, seed):
    if name == "logic":
        combinations = list(itertools.combinations(range(12), 2))
    else:
        combinations = list(itertools.combinations_with_replacement(range(8), 4))
    order = PERMUTATIONS[f"{len(combinations)}.{seed}"]
    task = get_task(name, held_out=held_out, seed=seed, reference_split=True)
    assert task.combinations("ood") == sorted(combinations[i] for i in order[:count])
    assert task.combinations("train") == sorted(combinations[i] for i in order[count:])
    assert task.combinations("test") == task.combinations("train")


@pytest.mark.parametrize(("seed", "untrained"), [(0, set()), (1, set()), (2, {5, 6})])
def test_one_of_the_papers_three_draws_of_fuzzy_logic_leaves_two_terms_untrained(seed, untrained):
    task = get_task("logic", held_out=0.7, seed=seed, reference_split=True)
    assert set(range(12)) - set(itertools.chain(*task.combinations("train"))) == untrained


@pytest.mark.parametrize("name", PAPERS)
def test_reference_split_changes_only_the_held_out_combinations_and_is_recorded_only_if_set(name):
    usual, reference = get_task(name), get_task(name, reference_split=True)
    assert usual.settings == {key: value for key, value in reference.settings.items() if key != "reference_split"}
    assert get_task(name, **reference.settings) == reference != usual
    assert sorted(usual.combinations("train") + usual.combinations("ood")) == sorted(
        reference.combinations("train") + reference.combinations("ood")
    )
    assert usual.combinations("ood") != reference.combinations("ood")
    assert reference.fingerprint() != usual.fingerprint()
    assert differing_settings(reference)["reference_split"] is True


def test_the_papers_result_is_shown_beside_runs_on_its_own_split():
    task = get_task("logic", num_examples=32, held_out=0.7, reference_split=True)
    assert paper_result({"task": {"name": task.name, **task.settings}, "model": {}}).mean == 0.8113


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_jax_does_not_take_is_refused(name, seed):
    with pytest.raises(ValueError, match=f"takes seeds 0 to 2147483647, got {seed}"):
        get_task(name, reference_split=True, seed=seed)


@pytest.mark.parametrize("name", PAPERS)
def test_a_split_that_holds_out_nothing_is_refused(name):
    with pytest.raises(ValueError, match="holds out 0"):
        get_task(name, reference_split=True, held_out=0.001)


@pytest.mark.parametrize("name", ["logic", "sraven"])
def test_texts_promise_trained_parts_only_where_the_split_does(name):
    for reference_split in (False, True):
        task = get_task(name, reference_split=reference_split)
        words = task.words(task)
        assert ("occurs in training" in words.splits()) == (not reference_split)
        assert any("parts that may not all occur" in sentence for sentence in words.limits()) == reference_split
