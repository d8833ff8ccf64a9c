"""Tests of the paths that words on the command line name, of the nearest names in errors, and of advice on writing."""

import errno
import os

import pytest

from hf_hyla.cli import main
from hf_hyla.paths import find_file, find_model, find_recipe, find_record, find_run
from hf_hyla.utils import models_folder, recipes_folder, writing_advice


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("word", ["logic/hyla", "logic/hyla.yaml", "recipes/logic/hyla", "recipes/logic/hyla.yaml"])
def test_a_recipe_of_the_package_is_found_by_each_of_its_names(here, word):
    assert find_recipe(word) == recipes_folder() / "logic" / "hyla.yaml"


@pytest.mark.parametrize("word", ["hyla-logic", "hub_cards/hyla-logic"])
def test_a_model_of_the_package_is_found_by_each_of_its_names_unless_one_is_here(here, word):
    assert find_model(word) == str(models_folder() / "hyla-logic")
    (here / word).mkdir(parents=True)
    assert find_model(word) == word


def test_a_local_file_takes_precedence_over_one_of_the_package(here):
    (here / "recipes" / "logic").mkdir(parents=True)
    (here / "recipes" / "logic" / "hyla.yaml").touch()
    assert find_recipe("recipes/logic/hyla").resolve() == here / "recipes" / "logic" / "hyla.yaml"
    assert find_record("recipes/results") == recipes_folder() / "results"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("demo", r"There is no recipe demo \(did you mean logic/demo.yaml\?\)"),
        ("hyla.yaml", r"did you mean logic/hyla.yaml or sraven/hyla.yaml or text/hyla.yaml\?"),
        ("logic/hylla", r"did you mean logic/hyla.yaml\?"),
        ("sofmax", r"did you mean logic/softmax.yaml\?"),
        ("mine/fine", r"did you mean mine/fines.yaml\?"),
        ("recipes/logic", "is a folder: expected the YAML file of a recipe"),
        ("/dev/zero", "is not a regular file"),
        ("pipe", "pipe is not a regular file"),
        ("xyzzy", "There is no recipe xyzzy: expected a YAML file, or a name that `hyla recipes` lists"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_nearest_name(here, word, message):
    (here / "mine").mkdir()
    (here / "mine" / "fines.yaml").touch()
    os.mkfifo(here / "pipe")
    with pytest.raises(FileNotFoundError, match=message):
        find_recipe(word)


def test_a_link_that_leads_nowhere_is_not_called_its_own_nearest_name(here):
    (here / "mine.yaml").symlink_to("mine.yaml")
    for find in (find_recipe, find_model, find_run):
        with pytest.raises(FileNotFoundError) as refused:
            find("mine.yaml")
        assert "did you mean" not in str(refused.value)


def test_a_wrong_path_is_refused_with_the_nearest_name_beside_it_or_among_the_runs(here):
    (here / "runs" / "logic-demo").mkdir(parents=True)
    for word in ("runs/logic-deno", "logic-deno"):
        with pytest.raises(FileNotFoundError, match=rf"There is no run {word} \(did you mean runs/logic-demo\?\)"):
            find_run(word)
    with pytest.raises(FileNotFoundError, match="runs is a folder, expected a file of parameters"):
        find_file("runs", "file of parameters")


def test_models_of_the_package_are_runs_too(here, capsys):
    assert find_run("hyla-logic") == find_record("hub_cards/hyla-logic") == models_folder() / "hyla-logic"
    with pytest.raises(
        FileNotFoundError, match="no run nosuch: expected the folder of a finished run, or the file of its"
    ):
        find_record("nosuch")
    assert main(["card", "hyla-logic"]) == 2
    assert "hyla-logic comes with the package: name a folder for its card by --output" in capsys.readouterr().err


@pytest.mark.parametrize("find", [find_run, find_model])
@pytest.mark.parametrize("name", ["run.json", "model.safetensors"])
def test_a_file_in_a_runs_folder_is_refused_with_the_folder(here, find, name):
    (here / "runs" / "demo").mkdir(parents=True)
    for file in ("config.json", name):
        (here / "runs" / "demo" / file).touch()
    with pytest.raises(
        FileNotFoundError, match=rf"{name} is a file \(did you mean runs/demo\?\): expected the folder of a"
    ):
        find(f"runs/demo/{name}")


def test_the_hub_is_asked_once_for_a_model_that_is_not_here(here, hub_here):
    with pytest.raises(
        FileNotFoundError, match=r"no run or model nosuch: expected .* a repository on the Hub as ORG/NAME"
    ):
        find_model("nosuch")
    with pytest.raises(FileNotFoundError, match="no model org/nosuch that you can read"):
        find_model("org/nosuch")
    assert [asked for asked in hub_here.requests if "nosuch" in asked] == ["HEAD /org/nosuch/resolve/main/config.json"]
    (here / "runs" / "demo").mkdir(parents=True)
    assert find_model("runs/demo") == "runs/demo"
    with pytest.raises(FileNotFoundError, match=r"did you mean runs/demo\?\) here, and the Hub has no model"):
        find_model("runs/demoo")


def test_an_unreachable_hub_is_reported_without_retrying(here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}"
    )
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for another try"))
    with pytest.raises(FileNotFoundError, match="the Hub cannot be reached"):
        find_model("org/nosuch")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free some space"),
        (RuntimeError(f"Error while serializing: {os.strerror(errno.ENOSPC)} (os error 28)"), "free some space"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "check that the folder can be written to"),
    ],
)
def test_freeing_space_is_advised_where_the_disk_is_full(error, advice):
    assert writing_advice(error).startswith(advice)
