"""Tests of probes on codes with known content, and of their control."""

import sys

import numpy as np
import pytest

from hf_hyla.analysis import code_similarity, probe
from hf_hyla.analysis.probes import fit_probe


RNG = np.random.default_rng(0)
DIRECTIONS = RNG.normal(size=(5, 8))


def planted(kind: str, count: int, noise: float, seed: int):
    """Codes (count, 8) in which values of a kind lie as directions under noise."""
    rng = np.random.default_rng(seed)
    if kind == "classes":
        values = rng.choice(5, size=count, p=[0.4, 0.3, 0.1, 0.1, 0.1])
        codes = DIRECTIONS[values]
    elif kind == "labels":
        values = rng.random((count, 5)) < 0.25
        codes = values @ DIRECTIONS
    else:
        values = rng.random(count).astype(np.float32)
        codes = values[:, None] * DIRECTIONS[0]
    return (codes + rng.normal(size=(count, 8)) * noise).astype(np.float32), values


def probed(kind: str, noise: float = 0.3, **settings):
    return probe(*planted(kind, 1500, noise, 1), *planted(kind, 1500, noise, 2), **settings)


@pytest.mark.parametrize(("kind", "metric"), [("classes", "accuracy"), ("labels", "f1"), ("number", "r2")])
def test_a_planted_code_is_decoded_and_the_control_is_at_chance(kind, metric):
    result = probed(kind, num_shuffles=20)
    score, control, chance = result["scores"], result["control"], result["chance"]
    assert score[metric]["value"] > 0.7
    for name in score:
        assert abs(control[name]["value"] - chance[name]) < 5 * control[name]["standard_error"] + 0.01
        assert chance[name] < 0.6 < score[name]["value"]


@pytest.mark.parametrize("kind", ["classes", "labels", "number"])
def test_codes_without_information_score_chance(kind):
    train, values = planted(kind, 1500, 0.3, 1)
    other, asked = planted(kind, 1500, 0.3, 2)
    noise = np.random.default_rng(3)
    result = probe(noise.normal(size=train.shape), values, noise.normal(size=other.shape), asked)
    for name, score in result["scores"].items():
        assert abs(score["value"] - result["chance"][name]) < 5 * score["standard_error"] + 0.01


def test_scores_are_those_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import accuracy_score, f1_score, r2_score
    from sklearn.preprocessing import StandardScaler

    for kind, model in (
        ("classes", LogisticRegression(class_weight="balanced", max_iter=1000)),
        ("labels", LogisticRegression(class_weight="balanced", max_iter=1000)),
        ("number", Ridge()),
    ):
        (train, values), (other, asked) = planted(kind, 1500, 1.0, 1), planted(kind, 1500, 1.0, 2)
        result = probed(kind, noise=1.0)
        scaler = StandardScaler().fit(train)
        train, other = scaler.transform(train), scaler.transform(other)
        columns = values.T if kind == "labels" else [values]
        predicted = np.stack([model.fit(train, column).predict(other) for column in columns], axis=-1)
        predicted = predicted if kind == "labels" else predicted[:, 0]
        if kind == "number":
            expected = {"r2": r2_score(asked, predicted)}
        else:
            expected = {"f1": f1_score(asked, predicted, average="macro")}
            expected["accuracy"] = (
                (asked == predicted).mean() if kind == "labels" else accuracy_score(asked, predicted)
            )
            by_class = f1_score(asked, predicted, average=None)
            assert list(result["f1_by_class"].values()) == pytest.approx(by_class)
        assert {name: score["value"] for name, score in result["scores"].items()} == pytest.approx(expected)


def test_standard_errors_equal_the_spread_over_new_samples():
    train = planted("classes", 1500, 1.0, 1)
    results = [probe(*train, *planted("classes", 400, 1.0, seed), num_shuffles=2) for seed in range(2, 42)]
    spread = np.std([result["scores"]["accuracy"]["value"] for result in results])
    stated = np.mean([result["scores"]["accuracy"]["standard_error"] for result in results])
    assert stated == pytest.approx(spread, rel=0.35)
    # Rows that say the same are one observation, wherever they stand.
    codes, values = planted("classes", 400, 1.0, 2)
    rows = np.random.default_rng(0).permutation(np.arange(400).repeat(4))
    twice = probe(*train, codes[rows], values[rows], groups=rows, num_shuffles=2)
    assert twice["scores"]["accuracy"]["standard_error"] == pytest.approx(stated, rel=0.35)


def test_the_seed_makes_a_probe_repeatable():
    assert probed("labels", seed=1) == probed("labels", seed=1)
    assert probed("labels", seed=1)["control"] != probed("labels", seed=2)["control"]


def test_an_untrained_class_counts_as_wrong_and_one_that_is_not_scored_has_no_f1():
    train, values = planted("classes", 1000, 0.3, 1)
    other, asked = planted("classes", 1000, 0.3, 2)
    seen = probe(train, values, other[asked != 4], asked[asked != 4])
    assert set(seen["f1_by_class"]) == {0, 1, 2, 3} and seen["scores"]["f1"]["value"] > 0.8
    unseen = probe(train[values != 4], values[values != 4], other, asked)
    assert unseen["scores"]["accuracy"]["value"] <= (asked != 4).mean()
    assert unseen["f1_by_class"][4] == 0.0


def test_classes_may_be_any_integers():
    train, values = planted("classes", 1000, 0.3, 1)
    other, asked = planted("classes", 1000, 0.3, 2)
    plain, moved = (probe(train, values - shift, other, asked - shift) for shift in (0, 100))
    assert list(moved.pop("f1_by_class")) == [-100, -99, -98, -97, -96]
    del plain["f1_by_class"]
    assert moved == plain


def test_differences_of_mean_codes_within_chance_count_as_zero():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, size=6000)
    codes = 1 + rng.normal(size=(6000, 8)) @ rng.normal(size=(8, 8))
    assert not code_similarity(codes, values, 6, centred=True).any()
    codes[values == 2] += 1.0
    found = code_similarity(codes, values, 6, centred=True)
    assert found[2, 2] == pytest.approx(1) and (np.delete(np.diagonal(found), 2) >= 0).all()


def test_code_similarity_is_1_for_equal_means_and_minus_1_for_opposite_ones():
    values = np.repeat([0, 1, 2, 3], 10)
    codes = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])[values]
    expected = [[1, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]]
    np.testing.assert_allclose(code_similarity(codes, values, 4), expected, atol=1e-12)
    several = values[:, None] == np.arange(4)
    np.testing.assert_allclose(code_similarity(codes, several, 4), expected, atol=1e-12)
    shifted = codes + 100
    assert code_similarity(shifted, values, 4).min() > 0.99
    np.testing.assert_allclose(
        code_similarity(shifted, values, 4, centred=True), code_similarity(codes - codes.mean(axis=0), values, 4)
    )
    rounded = (100 + 1e-6 * codes).astype(np.float32)
    np.testing.assert_array_equal(code_similarity(rounded, values, 4, centred=True), np.zeros((4, 4)))
    with pytest.raises(ValueError, match="Class 4 has no code"):
        code_similarity(codes, values, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (np.zeros((4, 2)), np.zeros(3, int), np.zeros((4, 2)), np.zeros(4, int)),
            "a row for each of the 3 train_values",
        ),
        ((np.zeros((4, 2)), np.zeros(4, int), np.zeros((4, 2)), np.zeros(4)), "differ in kind"),
        ((np.zeros((4, 2)), np.zeros(4, int), np.zeros((4, 2)), np.zeros(4, int)), "Too few samples for a probe"),
        ((np.zeros((4, 2)), np.zeros((4, 1), bool), np.zeros((4, 2)), np.zeros((4, 1), bool)), "Too few samples"),
        ((np.zeros((1, 2)), np.zeros(1), np.zeros((4, 2)), np.zeros(4)), "Too few samples"),
        (
            (np.eye(4), np.eye(4, dtype=bool)[0], np.eye(4), np.eye(4, dtype=bool)[0]),
            "must be integers .rows,., booleans",
        ),
        ((np.eye(4), np.array(list("abcd")), np.eye(4), np.array(list("abcd"))), "must be integers"),
        ((np.eye(4), np.eye(4, dtype=int), np.eye(4), np.eye(4, dtype=int)), r"int64 \(4, 4\)"),
        ((np.eye(4), np.arange(4), np.eye(4)[:, :3], np.arange(4)), "same columns, got 4 and 3"),
        ((np.eye(4), np.arange(4), np.eye(4), np.arange(4), None, 1), "num_shuffles must be at least 2"),
        ((np.eye(4), np.arange(4), np.eye(4), np.arange(4), np.zeros(4, int)), "but all are of one: leave out groups"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        probe(*arguments)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install hf-hyla\[analysis\]"):
        probed("number")


@pytest.mark.parametrize(("kind", "metric"), [("classes", "accuracy"), ("number", "r2")])
def test_a_fitted_probe_is_the_one_that_is_scored(kind, metric):
    features, values = planted(kind, 1500, 0.3, 2)
    fitted = fit_probe(*planted(kind, 1500, 0.3, 1))
    assert fitted.score(features, values) == pytest.approx(probed(kind)["scores"][metric]["value"], abs=1e-6)


def test_a_fitted_probe_names_several_labels_at_once():
    features, values = planted("labels", 1500, 0.1, 2)
    told = fit_probe(*planted("labels", 1500, 0.1, 1)).predict(features)
    assert (told.astype(bool) == values).mean() > 0.9
