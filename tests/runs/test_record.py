"""Run records are read back as they were written, and anything else is refused with a sentence."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from hf_hyla.hub.checks import check_committed
from hf_hyla.runs import RunRecord
from hf_hyla.runs.environment import environment, hardware


RECORD = json.loads((Path(__file__).parents[2] / "recipes" / "results" / "logic-demo" / "0.json").read_text())


def without(section: str, key: str) -> dict:
    held = {name: value for name, value in RECORD["recipe"][section].items() if name != key}
    return RECORD | {"recipe": RECORD["recipe"] | {section: held}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RECORD | {"schema_version": 99}, "its schema_version is 99"),
        (RECORD | {"recipe": {"task": "logic"}}, "'recipe'"),
        (RECORD | {"recipe": {}}, "its recipe lacks task.name"),
        (without("task", "name"), "its recipe lacks task.name"),
        (without("trainer", "max_steps"), "its recipe lacks trainer.max_steps"),
        (
            RECORD | {"recipe": {"task": RECORD["recipe"]["task"], "trainer": {"max_steps": 1}}},
            "lacks the section model",
        ),
        (RECORD | {"metrics": {"ood": {"r2": None}}}, "'metrics'"),
        (RECORD | {"curve": [1]}, "'curve'"),
        (RECORD | {"steps": "many"}, "'steps'"),
        (RECORD | {"environment": None}, "'environment'"),
        (RECORD | {"extra": 1}, "'extra'"),
        ({name: value for name, value in RECORD.items() if name != "seeds"}, "'seeds'"),
        ([RECORD], "must be a mapping"),
        (
            RECORD | {"recipe": RECORD["recipe"] | {"task": {"name": "logic", "seed": [1]}}},
            "Field 'seed' expected int, got list",
        ),
    ],
)
def test_an_invalid_record_is_refused_with_a_sentence(tmp_path, content, message):
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"run\.json is not a run record of schema 1") as refused:
        RunRecord.load(tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", json.dumps(RECORD)[:-1].encode() + b', "steps": 1}'])
def test_invalid_json_is_refused_with_a_sentence(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json is not a run record of schema 1"):
        RunRecord.load(tmp_path)


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    record = RunRecord(**RECORD)
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_names_no_accelerator(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "some GPU")
    assert hardware(torch.device("cpu"))["accelerator"] is None
    assert hardware()["accelerator"] == hardware(torch.device("cuda"))["accelerator"] == "some GPU"


def test_a_checkout_whose_commit_git_does_not_tell_is_not_taken_for_an_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_hyla.runs.environment.CHECKOUT", tmp_path)
    monkeypatch.setattr("hf_hyla.utils.CHECKOUT", tmp_path)
    assert environment()["git_commit"] is None
    (tmp_path / ".git").mkdir()  # no repository, so git fails
    assert environment()["git_commit"] == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert environment()["git_commit"] == "unknown"
    with pytest.raises(ValueError, match="made by a checkout whose commit git did not tell"):
        check_committed("unknown", "This run")


def test_a_record_names_this_checkout_whatever_repository_git_is_told_of(monkeypatch, tmp_path):
    commit = environment()["git_commit"]
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert environment()["git_commit"] == commit
