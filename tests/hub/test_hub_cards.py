"""Tests of the trained models in hub_cards/: they can be published, and reach the scores on their cards."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_hyla.hub.repository import CODE, Repository, plan
from hf_hyla.runs import Run, RunRecord
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
    """
    The records of the model's recipe, and of the recipes that are named like it but for the attention and the number of steps,
    as in the Makefile.
    """
    name, results = RunRecord.load(folder).name, PROJECT / "recipes" / "results"
    names = [re.sub("hyla|softmax|linear", attention, name) for attention in ("hyla", "softmax", "linear")]
    folders = [one for name in names for one in (results / name, *sorted(results.glob(f"{name}-max_steps=*")))]
    return [path for folder in folders for path in sorted(folder.glob("*.json"))]


@functools.cache
def planned(folder: Path) -> Repository:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_hyla.hub.checks._SCORED_AGAIN", 1024)  # all of them take minutes
        patch.setattr("hf_hyla.hub.checks._AT_A_TIME", 32)
        [repository] = plan(Run.load(folder), f"{ORGANISATION}/{folder.name}", others=results_of(folder))
    return repository


def test_there_are_trained_models():
    expected = {"hyla-logic", "softmax-logic", "linear-logic", "hyla-sraven", "softmax-sraven"}
    assert expected <= {folder.name for folder in FOLDERS}


@trained
def test_the_folder_holds_every_published_file_except_the_code(folder):
    repository = planned(folder)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == set(repository.files) - set(CODE)
    # Pictures depend on the version of what draws them.
    for name in (name for name in files if not name.endswith(".png")):
        content = repository.files[name]
        assert files[name].read_bytes() == (content.read_bytes() if isinstance(content, Path) else content), name
    assert max(path.stat().st_size for path in files.values()) < 4_000_000


def test_the_card_without_weights_shows_the_scores_of_the_records():
    card = (PROJECT / "hub_cards" / "hyla-text" / "README.md").read_text()
    row = r"^\| (?:\*\*)?(\w+)\b[^|]*\| 1 \| 24,000 \| (\d\.\d{4}) \|$"
    names = {"HYLA": "hyla", "softmax": "softmax", "linear": "linear"}
    found = {names[title]: score for title, score in re.findall(row, card, flags=re.MULTILINE)}
    for kind in names.values():
        record = json.loads((PROJECT / "recipes" / "results" / f"text-{kind}" / "0.json").read_text())
        assert found.pop(kind) == f"{record['metrics']['test']['bits_per_byte']:.4f}"
    assert not found


# Loads folders where the package cannot be imported, and prints the logits of the inputs that lie beside them.
WITHOUT_PACKAGE = """
import json, sys
sys.modules["hf_hyla"] = None  # any import of the package fails
import torch
from transformers import AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    except OSError as error:
        print(json.dumps(str(error)))
        continue
    assert type(model).__module__.startswith("transformers_modules.")
    inputs = {name: torch.tensor(values) for name, values in json.load(open(folder + "/inputs.json")).items()}
    with torch.no_grad():
        print(json.dumps(model(**inputs).logits.tolist()))
"""


def without_package(folders, home: Path) -> list:
    words = [sys.executable, "-c", WITHOUT_PACKAGE, *map(str, folders)]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    loaded = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment, cwd=home)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    return list(map(json.loads, loaded.stdout.splitlines()))


def test_each_folders_repository_loads_without_the_package_and_computes_the_same(tmp_path):
    expected = []
    for folder in FOLDERS:
        built = tmp_path / folder.name
        planned(folder).write(built)
        task = get_task(**RunRecord.load(folder).recipe["task"])
        batch = task.collate(task.dataset("ood", 8).__getitems__(range(8)))
        inputs = {name: column for name, column in batch.items() if name != "labels"}
        (built / "inputs.json").write_text(json.dumps({name: values.tolist() for name, values in inputs.items()}))
        # As the package computes it, by the weights in the checkout.
        with torch.no_grad():
            expected.append(
                AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs).logits.tolist()
            )
    assert without_package([tmp_path / folder.name for folder in FOLDERS], tmp_path) == expected


def test_without_the_package_the_error_names_the_missing_code_file(tmp_path):
    [said] = without_package([FOLDERS[0]], tmp_path)
    assert f"{FOLDERS[0]} does not appear to have a file named configuration_hyla.py" in said
    assert (
        "does not appear to have a file named configuration_hyla.py" in (PROJECT / "hub_cards/README.md").read_text()
    )


@trained
def test_labels_have_the_names_that_the_task_gives_them(folder):
    record = RunRecord.load(folder)
    defaults = get_task(**record.recipe["task"]).model_defaults
    config = json.loads((folder / "config.json").read_text())
    names = defaults.get("id2label", {0: "LABEL_0"})
    assert config["id2label"] == {str(label): name for label, name in names.items()}


@trained
def test_the_record_is_among_the_results(folder):
    assert RunRecord.load(folder) in [RunRecord.load(path) for path in results_of(folder)]


@trained
def test_the_weights_reach_the_scores_in_the_record(folder):
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
def test_the_weights_score_equally_well_on_puzzles_of_another_generator(folder, golden):
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
