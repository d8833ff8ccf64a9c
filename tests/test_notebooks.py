"""The notebooks run from top to bottom, in any folder, and are committed without outputs."""

import contextlib
import io
import json
import re
import sys
import types
from pathlib import Path

import pytest


NOTEBOOKS = sorted((Path(__file__).parents[1] / "recipes" / "notebooks").glob("*.ipynb"))


def cells(notebook: Path) -> list[str]:
    """The code of its cells."""
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a notebook's cells in an empty folder, by `run(name)`: its variables, and what it prints."""
    monkeypatch.chdir(tmp_path)
    # What only a notebook can show.
    display = types.ModuleType("IPython.display")
    display.HTML = str
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)

    def run(name: str) -> tuple[dict, str]:
        variables: dict = {"__name__": "__main__"}
        printed = io.StringIO()
        [notebook] = [one for one in NOTEBOOKS if one.stem == name]
        with contextlib.redirect_stdout(printed):
            for number, code in enumerate(cells(notebook)):
                exec(compile(code, f"{name}, cell {number}", "exec"), variables)
        return variables, printed.getvalue()

    return run


def test_a_model_is_asked(run):
    _, printed = run("ask")
    assert re.search(r"answer \[\d, \d, \d, \d\] right is \[\d, \d, \d, \d\]", printed)
    assert "(4, 16, 4, 36)" in printed and re.search(r"the model answers \d\.\d\d", printed)


def test_a_model_of_four_features_learns_five(run):
    variables, _ = run("finetune")
    assert variables["after"]["eval_loss"] < variables["before"]["eval_loss"]
    assert variables["model"].config.num_answers == 5


def test_a_text_classifier_learns(run):
    variables, _ = run("text_classifier")
    assert variables["accuracy"] > 0.8  # chance is 0.5
    good, bad = variables["logits"].argmax(-1).tolist()
    assert (good, bad) == (1, 0)


def test_a_task_of_ones_own_is_trained(run):
    variables, printed = run("own_task")
    assert variables["scores"]["test"] > 0.5  # chance is 1 in 7
    assert "40 combinations are trained, 9 are held out" in printed


def test_codes_tell_the_rules(run):
    variables, _ = run("codes")
    right = variables["told"] == variables["scored"].values
    assert right.mean() > 0.4  # chance is 1 in 8
    *own, _, _, _, _ = variables["pictures"]
    assert own[0] != variables["pictures"][4] and len(variables["pictures"]) == 8


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared_and_each_notebook_is_run_here(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert f'run("{notebook.stem}")' in Path(__file__).read_text()
