"""Tests of scores by combination: each is computed on the right samples and has the right name."""

import json

import numpy as np
import pytest
import torch

from hf_hyla.analysis import score_by_combination, task_batches
from hf_hyla.cli import main
from hf_hyla.training import evaluate


@pytest.mark.parametrize("name", ["logic", "sraven"])
def test_scores_by_combination_agree_with_the_score_of_the_split(build, request, name, monkeypatch):
    # A kernel would take seconds to compile for these heads.
    monkeypatch.setattr("hf_hyla.model.backends_hyla._EAGER_ELEMENTS", 2**30)
    task = request.getfixturevalue(name)
    model = build(task)
    found = score_by_combination(model, task, "ood", 300, batch_size=128)
    metric = task.metric_names[0]
    assert [tuple(one["parts"]) for one in sorted(found, key=lambda one: one["parts"])] == task.combinations("ood")
    together = sum(one["num_samples"] * one["scores"][metric] for one in found) / 300
    assert together == pytest.approx(evaluate(model, task, "ood", 300)[metric], rel=1e-4, abs=1e-6)
    assert found == sorted(found, key=lambda one: one["scores"][metric])

    columns = next(task_batches(task, "ood", 300, batch_size=300))
    parts = columns["terms" if name == "logic" else "rules"].sort(dim=1).values
    worst = found[0]
    rows = (parts == torch.tensor(worst["parts"])).all(dim=1)
    assert rows.sum() == worst["num_samples"]
    inputs = columns["input_values" if name == "logic" else "input_ids"][rows]
    with torch.no_grad():
        logits = model(**{model.main_input_name: inputs}).logits.numpy()
    expected = task.metrics(logits, columns["labels"][rows].numpy(), inputs.numpy())
    assert worst["scores"] == pytest.approx(expected, nan_ok=True)
    train = np.array(task.combinations("train"))
    assert worst["trained"] == [int((train == part).any(axis=1).sum()) for part in worst["parts"]]


def test_the_command_prints_every_combination_and_means_by_the_rarest_part(build, logic, tmp_path, capsys):
    build(logic).save_pretrained(tmp_path / "model")
    command = ["evaluate", str(tmp_path / "model"), "--task", "logic", "--task.num_variables", "3"]
    command += ["--task.num_examples", "6", "--num-samples", "200", "--by-combination"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "git_commit" in found["environment"] and found["split"] == "ood"
    assert main(command) == 0
    text = capsys.readouterr().out
    for one in found["combinations"]:
        parts = " ".join(map(str, one["parts"]))
        assert any(line.startswith(f"{parts} ") and f"{one['scores']['r2']:.4f}" in line for line in text.splitlines())
    rarest = [min(one["trained"]) for one in found["combinations"]]
    scores = np.array([one["scores"]["r2"] for one in found["combinations"]])
    for times in set(rarest):
        chosen = scores[np.array(rarest) == times]
        assert (
            f"r2 {chosen.mean():.4f} over the {len(chosen)} combinations whose rarest part is in {times} of the trained ones"
            in text
        )
