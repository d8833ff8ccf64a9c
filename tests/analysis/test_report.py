"""Tests of `hyla probe`: its report and figures, its repeatability, and its refusals before any work."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from hf_hyla.analysis import Codes, ablated, mean_codes, plots, probe_report, task_batches
from hf_hyla.analysis.report import _ablation, table
from hf_hyla.analysis.subjects import answer_features, check_sizes, combinations_of, subjects
from hf_hyla.cli import main
from hf_hyla.tasks import Subject, get_task
from hf_hyla.tasks.sraven import RULES
from hf_hyla.training import evaluate


SIZES = ["--train-samples", "150", "--num-samples", "120"]
LOGIC = ["--task", "logic", "--task.num_variables", "3", "--task.num_examples", "6"]
SRAVEN = ["--task", "sraven", "--task.num_features", "2"]


@pytest.fixture
def saved(build, logic, sraven, tmp_path):
    for name, task, attention_type in (("logic", logic, "hyla"), ("sraven", sraven, "softmax")):
        build(task, attention_type=attention_type).save_pretrained(tmp_path / name)
    return tmp_path


def test_a_logic_report_holds_scores_controls_and_figures(saved, capsys):
    command = ["probe", str(saved / "logic"), *LOGIC, *SIZES, "--ablate", "--output"]
    assert main([*command, str(saved / "once")]) == 0
    captured = capsys.readouterr()
    report = json.loads((saved / "once" / "probe.json").read_text())
    assert {(r["subject"], r["layer"]) for r in report["probes"]} == {
        (subject, layer) for subject in ("term", "target") for layer in (0, 1, None)
    }
    term = report["probes"][0]
    assert {"scores", "control", "chance", "f1_by_class"} <= term.keys() and set(term["f1_by_class"]) <= {
        f"{i:03b}" for i in range(6)
    }
    matrix = np.array(report["similarity"]["term"]["layers"][1])
    np.testing.assert_allclose(matrix.diagonal(), 1)
    assert (
        np.array(report["ablation"]["without"]).shape == np.array(report["ablation"]["standard_error"]).shape == (2, 4)
    )
    assert report["codes"] == {"layers": 2, "answers": 1, "keys": 1, "heads": 4}
    assert report["task"]["num_variables"] == 3 and report["num_samples"] == {"train": 150, "ood": 120}
    assert report["data_fingerprint"].startswith("sha256:") and report["model"] == str(saved / "logic")
    assert "git_commit" in report["environment"] and report["schema_version"] == 1
    figures = {"probes.png", "similarity.png", "ablation.png", "map_layer_1.png", "map_layer_2.png"}
    assert set(report["figures"]) == figures == {path.name for path in (saved / "once").glob("*.png")}
    assert "Collecting codes" in captured.err and f"{term['scores']['f1']['value']:.3f}" in captured.out

    assert main([*command, str(saved / "again")]) == 0
    for path in (saved / "once").iterdir():
        assert path.read_bytes() == (saved / "again" / path.name).read_bytes(), path.name


def test_a_sraven_report_of_a_softmax_model_has_scores_of_rules(saved, monkeypatch):
    monkeypatch.chdir(saved)
    assert main(["probe", str(saved / "sraven"), *SRAVEN, *SIZES, "--split", "test"]) == 0
    report = json.loads((saved / "runs" / "probe-sraven" / "probe.json").read_text())
    assert report["attention_type"] == "softmax" and report["ablation"] is None
    assert report["similarity"]["rule"]["names"] == list(RULES)
    assert [r["kind"] for r in report["probes"]] == ["classes"] * 6
    assert set(report["probes"][0]["f1_by_class"]) == set(RULES)


def test_a_report_is_of_the_tasks_headline_split_unless_another_is_named(build, logic, monkeypatch):
    monkeypatch.setattr(type(logic), "headline_split", "test")
    report = probe_report(build(logic), logic, train_samples=150, num_samples=120)
    assert report["split"] == "test" and report["num_samples"] == {"train": 150, "test": 120}


def test_the_effect_of_a_head_is_a_mean_over_samples_with_an_error_over_combinations(build, logic, monkeypatch):
    model = build(logic)
    report = probe_report(model, logic, train_samples=150, num_samples=120, ablate=True)["ablation"]
    assert report["whole"] == pytest.approx(evaluate(model, logic, "ood", 120)["r2"], rel=1e-5)
    means = mean_codes(model, task_batches(logic, "train", 150))
    with ablated(model, 1, [2], means[1]):
        assert report["without"][1][2] == pytest.approx(evaluate(model, logic, "ood", 120)["r2"], rel=1e-4)

    # Two combinations, of 1 and 3 samples, that lose 1 and 5: 4 in the mean.
    scores = iter([[(1, 0.0), (3, 0.0)]] + 8 * [[(1, -1.0), (3, -5.0)]])
    monkeypatch.setattr(
        "hf_hyla.analysis.report.score_by_combination",
        lambda *_: [
            {"parts": [part], "num_samples": size, "scores": {"r2": score}}
            for part, (size, score) in enumerate(next(scores))
        ],
    )
    found = _ablation(model, logic, "ood", train_samples=150, num_samples=4, progress=False)
    assert found["whole"] == 0 and found["without"][0][0] == -4
    assert found["standard_error"][0][0] == pytest.approx((2 * ((0.25 * 3) ** 2 + (0.75 * 1) ** 2)) ** 0.5)


def test_the_figures_of_a_report_show_differences_and_similarities_at_a_cards_width(build, logic, monkeypatch):
    report = probe_report(build(logic), logic, train_samples=150, num_samples=120, ablate=True)
    report["ablation"] |= {"without": [[0.5, 0.2, 0.5, 0.4987]] * 2, "whole": 0.5, "p_value": [[1, 0.01, 0.06, 1]] * 2}
    figure = plots._ablation(report)
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts[:4]] == [".000", "−.300", ".000", "−.001"]
    assert [text.get_fontweight() for text in texts[:4]] == ["normal", "bold", "normal", "normal"]
    assert "Holm" in figure.get_suptitle() and "difference of r2" in figure.axes[1].get_ylabel()
    similarity = plots._similarity(report)
    assert "mean of all removed" in similarity.get_suptitle()
    shown = [axes.images[0].get_array() for axes in similarity.axes if axes.get_title().startswith("layer")]
    assert len(shown) == 2 and np.array_equal(shown, report["similarity"]["term"]["centred"])
    assert figure.get_figwidth() == similarity.get_figwidth() == plots._probes(report).get_figwidth() == 8


def test_the_rules_that_models_mix_up_have_colours_that_differ_clearly():
    colours = dict(zip(RULES, map(to_rgb, plots._COLOURS), strict=True))
    for one, other in itertools.combinations(("sum", "difference", "distribute three"), 2):
        assert np.linalg.norm(np.subtract(colours[one], colours[other])) > 0.6, (one, other)


def test_scores_are_kept_when_a_figure_fails(build, logic, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("hf_hyla.analysis.plots.draw", fail)
    with pytest.raises(OSError, match="disk full"):
        probe_report(build(logic), logic, train_samples=150, num_samples=120, output=tmp_path)
    assert json.loads((tmp_path / "probe.json").read_text())["probes"]


def test_the_rule_of_an_answer_is_that_of_its_feature_after_the_permutation():
    task = get_task("sraven")
    columns = task.samples("ood", np.arange(200))
    rules = subjects(task, columns)[0].values.reshape(200, 4)
    fixed = get_task("sraven", permute=False).samples("ood", np.arange(200))
    np.testing.assert_array_equal(
        subjects(get_task("sraven", permute=False), fixed)[0].values.reshape(200, 4), fixed["rules"]
    )
    # A constant feature has its answer in the first column of the last row too.
    cells = columns["input_ids"].reshape(200, 9, 4)
    place = columns["permutations"].argsort(axis=-1)
    for sample in range(200):
        for answer in range(4):
            feature = columns["permutations"][sample, 2, answer]
            if rules[sample, answer] == RULES.index("constant"):
                assert cells[sample, 6, place[sample, 0, feature]] == columns["labels"][sample, answer]


def test_probed_terms_are_those_of_the_function(logic):
    columns = logic.samples("ood", np.arange(20))
    term, target = subjects(logic, columns)
    for row, terms in zip(term.values, columns["terms"], strict=True):
        assert {term.names[i] for i in np.flatnonzero(row)} == {f"{t:03b}" for t in terms}
    np.testing.assert_array_equal(target.values, columns["labels"])
    with pytest.raises(ValueError, match="lack terms"):
        subjects(logic, {"labels": columns["labels"]})


def test_a_fixed_query_is_the_same_point_for_every_function(build, logic, tmp_path):
    query = logic.query_point(seed=3)
    batch = next(task_batches(logic, "ood", 50, query=query))
    plain = next(task_batches(logic, "ood", 50))
    assert torch.equal(batch["input_values"][:, :-1], plain["input_values"][:, :-1])
    assert (batch["input_values"][:, -1, :3] == torch.from_numpy(query)).all() and not batch["input_values"][
        :, -1, 3
    ].any()
    for terms, label in zip(batch["terms"].tolist(), batch["labels"].tolist(), strict=True):
        literals = [[x if f"{term:03b}"[i] == "1" else 1 - x for i, x in enumerate(query)] for term in terms]
        assert label == pytest.approx(max(map(min, literals)))
    sizes = {"train_samples": 150, "num_samples": 120}
    report = probe_report(build(logic), logic, **sizes, seed=3, fixed_query=True, output=tmp_path)
    assert report["fixed_query"] == query.tolist()
    # In the first layer the answer token knows of nothing but the point.
    assert report["figures"] == ["probes.png", "similarity.png", "map_layer_2.png"]


def test_the_report_compares_codes_with_the_answer_alone(build, logic, tmp_path):
    report = probe_report(build(logic), logic, train_samples=600, num_samples=600, fixed_query=True, output=tmp_path)
    # One point has few answers, and each is the value of its larger term: they tell more of the terms than nothing does.
    term = next(result for result in report["probes"] if (result["subject"], result["layer"]) == ("term", None))
    assert list(report["answer_alone"]) == ["term"]
    alone = report["answer_alone"]["term"]["f1"]["value"]
    assert alone > term["chance"]["f1"] + 0.05
    assert f"{alone:.3f}" in table(report) and "from the answer alone" in table(report)


def test_numeric_answers_are_divided_by_their_quantiles():
    numbers = Subject("target", np.arange(1600) / 1600), Subject("target", np.array([-1.0, 0.0, 0.5, 2.0]))
    train, other = answer_features(*numbers)
    np.testing.assert_array_equal(train.sum(axis=0), np.full(16, 100))
    np.testing.assert_array_equal(other.argmax(axis=1), [0, 0, 8, 15])
    few = Subject("target", np.repeat([0.25, 0.75], [10, 990])), Subject("target", np.array([0.25, 0.75, 0.75]))
    train, other = answer_features(*few)
    assert len(np.unique(train, axis=0)) == 2 and (other[0] != other[1]).any()
    classes = (
        Subject("target", np.array([0, 2, 1]), ("0", "1", "2")),
        Subject("target", np.array([2]), ("0", "1", "2")),
    )
    train, other = answer_features(*classes)
    np.testing.assert_array_equal(train, np.eye(3)[[0, 2, 1]])
    np.testing.assert_array_equal(other, np.eye(3)[[2]])


def test_samples_of_one_combination_count_as_one_observation(logic, sraven):
    columns = logic.samples("ood", np.arange(200))
    expected = {frozenset(terms) for terms in columns["terms"].tolist()}
    groups = combinations_of(logic, columns)
    assert len(np.unique(groups)) == len(expected)
    for group in np.unique(groups):
        assert len({frozenset(terms) for terms in columns["terms"][groups == group].tolist()}) == 1
    assert len(np.unique(combinations_of(sraven, sraven.samples("ood", np.arange(500))))) == len(
        sraven.combinations("ood")
    )


def test_the_number_of_samples_that_an_error_names_is_enough(logic):
    def refused(train: int, other: int) -> str | None:
        try:
            check_sizes(logic, "ood", train, other)
        except ValueError as error:
            return str(error)

    message = refused(1, 500)
    needed = int(message.partition("at least ")[2].partition(",")[0])
    assert (
        "train_samples" in message
        and refused(needed, 500) is None
        and refused(needed - 1, 500) == message.replace("got 1", f"got {needed - 1}")
    )
    counts = subjects(logic, logic.samples("train", np.arange(needed)))[0].counts
    assert counts.min() == 10
    assert "num_samples must be at least" in refused(500, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["logic", *SRAVEN], "does not fit the task sraven"),
        (["logic", *LOGIC, "--split", "odd"], "has no split 'odd'"),
        (["logic", *LOGIC, "--split", "train"], "score it on another, such as ood"),
        (["logic", *LOGIC, "--split", "extrapolation"], "none of its parts occurs in training"),
        (["logic", *LOGIC, "--num-samples", "3"], "num_samples must be at least"),
        (["sraven", *SRAVEN, "--train-samples", "3"], "train_samples must be at least"),
        (["sraven", *SRAVEN, "--num-samples", "0"], "--num-samples must be an integer of at least 1"),
        (["sraven", *SRAVEN, "--seed", "-1"], "--seed must be an integer of at least 0"),
        (["sraven", *SRAVEN, "--seed", "5000000000"], "--seed must be at most 4294967295, got 5000000000"),
        (["sraven", *SRAVEN, "--fixed-query"], "have no query point to fix"),
        (["sraven"], "pass --task with one of logic"),
        (["logic", *LOGIC, "--output", "{saved}/logic/config.json"], "config.json"),
    ],
)
def test_bad_input_ends_with_one_sentence_before_anything_is_computed(saved, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(saved)
    monkeypatch.setattr("hf_hyla.analysis.report.collect_codes", lambda *_, **__: pytest.fail("computed"))
    assert main(["probe", *(argument.format(saved=saved) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hyla: ") and message in error
    assert not list(saved.rglob("probe.json"))


@pytest.mark.parametrize("ablate", [True, False])
def test_a_split_of_one_combination_is_refused_before_anything_is_computed(build, monkeypatch, ablate):
    monkeypatch.setattr("hf_hyla.analysis.report.collect_codes", lambda *_, **__: pytest.fail("computed"))
    task = get_task("sraven", num_features=2, held_out=0.03)
    assert len(task.combinations("ood")) == 1
    with pytest.raises(ValueError, match="the split ood has one: choose another split"):
        probe_report(build(task), task, train_samples=1000, num_samples=1000, ablate=ablate)


def test_cells_lose_only_the_zero_before_the_point():
    axes = Figure().subplots()
    matrix = np.array([[0.5, -0.25, 10.25], [-10.123, 100.5, -0.001]])
    plots._write(axes, matrix, np.zeros_like(matrix, dtype=bool))
    shown = [text.get_text() for text in axes.texts]
    assert shown == [".50", "−.25", "10.25", "−10.12", "100.50", ".00"]


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_a_missing_extra_is_named(saved, capsys, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["probe", str(saved / "logic"), *LOGIC]) == 2
    assert (
        f"Probing needs {package}, which is not installed: pip install hf-hyla[analysis]." in capsys.readouterr().err
    )


def test_shuffled_labels_are_at_chance_for_a_whole_model(build, sraven):
    report = probe_report(build(sraven), sraven, train_samples=1000, num_samples=1000)
    for result in report["probes"]:
        for metric, control in result["control"].items():
            assert abs(control["value"] - result["chance"][metric]) < 5 * control["standard_error"] + 0.03


def test_a_rule_written_into_the_codes_is_read_out(monkeypatch, build, sraven):
    """The whole report on codes of which the truth is known: head r speaks for rule r, in the second layer."""

    def planted(model, batches, *_, **__):
        columns: dict[str, list] = {}
        for batch in batches:
            for name, column in batch.items():
                columns.setdefault(name, []).append(column.numpy())
        joined = {name: np.concatenate(column) for name, column in columns.items()}
        rules = subjects(sraven, joined)[0].values.reshape(-1, 2)
        codes = torch.randn(len(rules), 2, 2, 1, 8, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
        codes[:, 1, :, 0] += np.eye(8)[rules]
        return Codes(codes, joined)

    monkeypatch.setattr("hf_hyla.analysis.report.collect_codes", planted)
    report = probe_report(build(sraven), sraven, train_samples=300, num_samples=300)
    by_layer = {r["layer"]: r["scores"]["accuracy"]["value"] for r in report["probes"] if r["subject"] == "rule"}
    assert by_layer[1] > 0.99 and by_layer[None] > 0.99 and by_layer[0] < 0.4
    similarity = np.array(report["similarity"]["rule"]["layers"][1])
    np.testing.assert_allclose(similarity, np.eye(8), atol=0.1)
