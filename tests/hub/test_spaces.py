"""The Space of a model holds the page of `hyla demo` and all that it needs, with metadata that the Hub takes."""

import re
import subprocess
import sys

import pytest
from huggingface_hub import SpaceCard

from hf_hyla.cli import main
from hf_hyla.hub import spaces
from hf_hyla.hub.cards import dataset_repo
from hf_hyla.hub.repository import plan
from hf_hyla.runs import Run
from hf_hyla.tasks import LogicTask, Words, get_task


# https://huggingface.co/docs/hub/spaces-config-reference
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


@pytest.mark.parametrize("task", ["logic", "sraven"])
def test_the_metadata_of_spaces_are_what_the_hub_takes(task):
    task = get_task(task)
    for files in (spaces.demo_files(task, "org/x", ["other/y"]), spaces.metric_files(task, "org/x")):
        data = SpaceCard(files["README.md"]).data.to_dict()
        assert data["sdk"] == "gradio" and re.fullmatch(r"\d+\.\d+\.\d+", data["sdk_version"])
        assert {data["colorFrom"], data["colorTo"]} <= COLOURS and data["emoji"]
        assert 10 <= len(data["short_description"]) <= 60
    data = SpaceCard(spaces.demo_files(task, "org/x", ["other/y"])["README.md"]).data
    assert data.models == ["org/x", "other/y"] and data.datasets == [dataset_repo(task, "org/x")]


# Runs the app of a Space from its folder alone. The widgets are stand-ins, the models and probes are real.
RUN_SPACE = """
import sys
from pathlib import Path
from unittest.mock import MagicMock
sys.path.insert(0, str(Path.cwd()))
sys.modules["gradio"] = MagicMock()
for name in ("matplotlib", "evaluate", "datasets", "accelerate"):
    sys.modules[name] = None
import app, hf_hyla
assert Path(hf_hyla.__file__).parent == Path.cwd() / "hf_hyla", hf_hyla.__file__
assert not any(name.startswith(("hf_hyla.training", "hf_hyla.cli")) for name in sys.modules)
print([tab.kwargs["id"] for tab in sys.modules["gradio"].Tab.call_args_list])
"""


def test_the_space_holds_all_the_code_that_its_page_needs(sraven_run, tmp_path):
    files = spaces.demo_files(get_task("sraven"), "org/x")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    app = (tmp_path / "app.py").read_text()
    assert 'MODELS = "org/x"' in app
    (tmp_path / "app.py").write_text(app.replace('"org/x"', f'"{sraven_run}"'))
    words = [sys.executable, "-c", RUN_SPACE]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['sraven']"
    other = spaces.demo_files(get_task("logic"), "org/x")
    assert {name for name in files if files[name] != other[name]} == {"README.md"}


def test_a_space_shows_the_models_that_are_named_beside_it(sraven_run, capsys):
    [_, space] = plan(Run.load(sraven_run), "org/x", space=True, beside=["other/y"])
    assert b'MODELS = "org/x, other/y"' in space.files["app.py"]
    with pytest.raises(ValueError, match="not an id"):
        plan(Run.load(sraven_run), "org/x", space=True, beside=["not an id"])
    assert main(["publish", str(sraven_run), "--repo-id", "org/x", "--beside", "other/y", "--dry-run"]) == 2
    assert "add --space" in capsys.readouterr().err


def test_a_space_for_a_task_without_a_page_is_refused(monkeypatch):
    monkeypatch.setattr(LogicTask, "words", Words)
    with pytest.raises(ValueError, match="There is no page for trying models of the task logic: leave out --space"):
        spaces.demo_files(get_task("logic"), "org/x")
