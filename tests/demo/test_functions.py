"""The curve of a fuzzy logic function is its truth, and answers are those of the model for the points that show it."""

import json
import shutil

import numpy as np
import pytest
import torch

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.demo import pages
from hf_hyla.demo.functions import curve, status, term_names
from hf_hyla.demo.shown import Shown, load
from hf_hyla.runs import RunRecord
from hf_hyla.tasks import get_task
from hf_hyla.utils import DEMO_MODELS, models_folder


TASK = get_task("logic", num_examples=8, held_out=0.7)


@pytest.fixture(scope="module")
def models() -> list[Shown]:
    record = RunRecord.load(models_folder() / "hyla-logic")
    torch.manual_seed(0)
    made = []
    for title, kind in (("HYLA", "hyla"), ("Softmax attention", "softmax")):
        config = HylaConfig(
            **TASK.model_defaults | {"attention_type": kind, "hidden_size": 16, "intermediate_size": 16}
        )
        made.append(Shown(kind, title, HylaForSequenceClassification(config).eval(), record))
    return made


def truth(terms: list[str], point) -> float:
    """By a plain loop over the digits of the terms."""
    return max(min(x if bit == "1" else 1 - x for bit, x in zip(term, point, strict=True)) for term in terms)


def test_the_truth_and_the_answers_are_those_of_the_function_along_the_variable(models):
    found = curve(TASK, models, (3, 9), index=5, variable=2)
    shown = TASK.samples("ood", [5])["input_values"][0, :-1, :-1]
    for i in (0, 17, 80):
        point = found.point.copy()
        point[2] = found.x[i]
        assert found.truth[i] == pytest.approx(truth(["0011", "1001"], point), abs=1e-6)
        rows = [[*row, truth(["0011", "1001"], row)] for row in shown] + [[*point, 0.0]]
        for model in models:
            with torch.no_grad():
                right = model.model(input_values=torch.tensor([rows], dtype=torch.float32)).logits.item()
            assert found.answers[model.title][i] == pytest.approx(right, abs=1e-5)
    assert found.x[0] == 0 and found.x[-1] == 1 and np.ptp(found.truth) > 0.3


def test_r2_is_one_for_a_model_that_knows_the_function(models):
    class Knows(torch.nn.Module):
        def forward(self, input_values):
            x = input_values[:, -1, :-1].numpy()
            values = [truth(["0011", "1001"], point) for point in x]
            return type("Output", (), {"logits": torch.tensor(values)[:, None]})()

    found = curve(TASK, [Shown("knows", "Knows", Knows(), models[0].record)], (3, 9), index=5, variable=0)
    assert found.r2["Knows"] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found.answers["Knows"], found.truth, atol=1e-6)


def test_a_term_that_is_chosen_twice_is_refused(models):
    with pytest.raises(ValueError, match="A function has 2 different terms: choose another one"):
        curve(TASK, models, (3, 3), index=0, variable=0)


def test_terms_are_named_and_their_combinations_told_apart():
    names = term_names(TASK)
    assert len(names) == 16 and names[9] == "x1 and not x2 and not x3 and x4"
    assert status(TASK, TASK.combinations("train")[0][::-1]).startswith("Models were trained")
    assert status(TASK, TASK.combinations("ood")[0]).startswith("Unseen combination")
    assert status(TASK, (0, 15)).startswith("At least one of these terms was set aside")
    papers = get_task("logic", num_examples=32, held_out=0.7, reference_split=True, seed=2)
    trained = {term for terms in papers.combinations("train") for term in terms}
    lacking = [terms for terms in papers.combinations("ood") if not trained.issuperset(terms)]
    assert lacking and {status(papers, terms) for terms in lacking} == {
        "Unseen combination, with a term that no training function has."
    }


def test_the_page_names_models_points_and_scores(models):
    found = curve(TASK, models, (3, 9), index=5, variable=2)
    text = pages.function(TASK, models, (3, 9), found, 2)
    assert all(f"<b>{one.title}</b>: R² {found.r2[one.title]:.3f}" in text for one in models)
    assert f"x3, with x1 = {found.point[0]:.2f}" in text


def test_models_are_grouped_by_task_and_say_how_good_they_are():
    (sraven, puzzlers), (logic, others) = load([str(models_folder() / name) for name in DEMO_MODELS])
    assert (sraven.name, logic.name) == ("sraven", "logic")
    assert [one.title for one in puzzlers] == [one.title for one in others] == ["HYLA", "Softmax attention"]
    record = RunRecord.load(models_folder() / "hyla-logic")
    assert f"R² {record.metrics['ood']['r2']:.3f} on unseen" in others[0].accuracy()


def test_models_of_one_attention_are_told_apart_by_their_names():
    folder = str(models_folder() / "hyla-logic")
    [(_, models)] = load([folder, f"{folder}/../hyla-logic"])
    assert [one.title for one in models] == [f"HYLA ({folder})", f"HYLA ({folder}/../hyla-logic)"]


def test_what_the_demo_cannot_show_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no run\.json, which names its task"):
        load([str(tmp_path)])
    record = RunRecord.load(models_folder() / "hyla-logic")
    for name, settings in (("other", {"seed": 1}), ("own", {"name": "mine:Task"})):
        (tmp_path / name).mkdir()
        recipe = record.recipe | {"task": record.recipe["task"] | settings}
        RunRecord(**vars(record) | {"recipe": recipe}).save(tmp_path / name)
    with pytest.raises(ValueError, match="was trained on the task mine:Task, and the demo shows logic and sraven"):
        load([str(tmp_path / "own")])
    with pytest.raises(ValueError, match="other settings of the task logic than"):
        load([str(models_folder() / "hyla-logic"), str(tmp_path / "other")])


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    shutil.copytree(models_folder() / "hyla-logic", tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    for change in ({"steps": 5}, {"metrics": {"test": record["metrics"]["test"]}}):
        (tmp_path / "run/run.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=r"is not finished|has no result ood/r2"):
            load([str(tmp_path / "run")])
