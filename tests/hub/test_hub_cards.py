"""The trained models in hub_cards/: their files are what would be published, and score what their cards say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_hyla.hub.publish import plan
from hf_hyla.runs import RunRecord
from hf_hyla.runs.folder import weights_digest
from hf_hyla.tasks import get_task
from hf_hyla.training import evaluate


PROJECT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in PROJECT.glob("hub_cards/*/run.json"))
# Whose repository the committed cards are for.
ORGANISATION = "hf-hyla"
# What is probed besides the answer.
RULE_OR_TERM = {"sraven": "rule", "logic": "term"}

trained = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def results_of(folder: Path) -> list[Path]:
    return sorted((PROJECT / "recipes" / "results" / RunRecord.load(folder).name).glob("*.json"))


def test_there_are_trained_models():
    expected = {"hyla-logic", "softmax-logic", "linear-logic", "hyla-sraven", "softmax-sraven"}
    assert expected <= {folder.name for folder in FOLDERS}


@trained
def test_the_folder_holds_what_would_be_published(folder):
    [repository] = plan(folder, f"{ORGANISATION}/{folder.name}", others=results_of(folder))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == set(repository.files)
    # Pictures depend on the version of what draws them.
    for name in (name for name in files if not name.endswith(".png")):
        content = repository.files[name]
        assert files[name].read_bytes() == (content.read_bytes() if isinstance(content, Path) else content), name
    assert max(path.stat().st_size for path in files.values()) < 4_000_000


@trained
def test_the_code_beside_the_weights_is_the_packages(folder):
    code = {path.name: path.read_text() for path in (PROJECT / "hf_hyla" / "model").glob("*_hyla.py")}
    assert {path.name: path.read_text() for path in folder.glob("*_hyla.py")} == code, (
        "make hub-cards brings it up to date"
    )


@trained
def test_the_record_is_among_the_results(folder):
    assert RunRecord.load(folder) in [RunRecord.load(path) for path in results_of(folder)]


@trained
def test_the_weights_score_what_the_record_says(folder):
    record = RunRecord.load(folder)
    task = get_task(**record.recipe["task"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    metric = task.metric_names[0]
    for split in record.metrics:
        # The curve's last entry is of the finished weights, on fewer samples than the results.
        last = next(entry for entry in reversed(record.curve) if f"{split}/{metric}" in entry)
        assert last["step"] == record.steps
        scores = evaluate(model, task, split, record.recipe["trainer"].get("eval_samples", 2048))
        assert scores[metric] == pytest.approx(last[f"{split}/{metric}"], abs=2e-3), split


@trained
def test_the_weights_score_as_well_on_puzzles_of_another_generator(folder, golden):
    """The official generator's puzzles, or truth tables at points that no code of this package has drawn."""
    record = RunRecord.load(folder)
    task = get_task(**record.recipe["task"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    draw = {"sraven": official_puzzles, "logic": fresh_truth_tables}[task.name]
    combinations, inputs, answers = draw(task, golden)
    with torch.no_grad():
        logits = model(**inputs).logits
    if task.name == "sraven":
        scores = (logits.argmax(-1) == answers).all(-1).double()
    else:
        scores = 1 - (logits - answers[:, -1]).squeeze(-1).double() ** 2 / answers.squeeze(-1).double().var(
            1, correction=0
        )
    for split in ("test", "ood"):
        known = set(task.combinations("train" if split == "test" else "ood"))
        own = scores[torch.tensor([combination in known for combination in combinations])]
        standard_error = own.std() / len(own) ** 0.5
        assert len(own) > 40 and standard_error < 0.1
        assert abs(own.mean() - record.metrics[split][task.metric_names[0]]) < 4 * standard_error, split


def official_puzzles(task, golden):
    """The official generator's 512 puzzles, as it drew them."""
    official = load_file(golden / "sraven_instances.safetensors")
    panels = official["train.instances"].long().flatten(1, 2)
    ids = torch.cat([panels[:, :8].flatten(1), torch.full((len(panels), 4), 8)], dim=1)
    return [tuple(sorted(rules)) for rules in official["train.latents"].tolist()], {"input_ids": ids}, panels[:, 8]


def fresh_truth_tables(task, golden):
    """Every function of the splits 64 times, at points that no code of this package has drawn."""
    combinations = [*task.combinations("train"), *task.combinations("ood")] * 64
    places = torch.tensor([8, 4, 2, 1])
    plain = torch.tensor(combinations)[..., None] // places % 2 == 1  # (tasks, terms, variables)
    points = torch.from_numpy(np.random.default_rng(0).random((len(plain), 32, 4), dtype=np.float32))
    values = torch.where(plain[:, None], points[:, :, None], 1 - points[:, :, None]).amin(-1).amax(-1, keepdim=True)
    shown = values.clone()
    shown[:, -1] = 0
    return combinations, {"input_values": torch.cat([points, shown], dim=-1)}, values


@trained
def test_the_probe_found_structure_and_its_control_is_at_chance(folder):
    report = json.loads((folder / "probe" / "probe.json").read_text())
    for result in report["probes"]:
        for metric, control in result["control"].items():
            distance = abs(control["value"] - result["chance"][metric])
            assert distance < 0.02 + 4 * control["standard_error"], (result["subject"], result["layer"], metric)
    everything = [result for result in report["probes"] if result["layer"] is None]
    assert {result["subject"] for result in everything} == {RULE_OR_TERM[report["task"]["name"]], "target"}
    for result in everything:
        for metric, score in result["scores"].items():
            # Of some dozens of combinations, which is what the standard error is over.
            assert score["value"] > result["chance"][metric] + 2 * score["standard_error"], (result["subject"], metric)
    assert report["weights"] == weights_digest(folder)
