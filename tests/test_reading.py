"""Recipes, records and configs that somebody else may have written end in one sentence, whatever they are."""

import json
import os
import time

import pytest
import yaml

from hf_hyla.cli import main
from hf_hyla.reading import parse_yaml, read_json, read_yaml
from hf_hyla.runs import RunRecord
from hf_hyla.runs.compare import find_records
from hf_hyla.tasks.data import Manifest
from hf_hyla.training import load_recipe


DEEP = 20_000
# Made in place of a file; a pipe would be waited for, and a device has no end.
PLACES = {
    "a pipe": (lambda path: os.mkfifo(path), "it is not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
    "a folder": (lambda path: path.mkdir(), "it is a folder"),
    "a huge file": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**10), "it is larger than"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "decode"),
    "nested lists": (lambda path: path.write_text("[" * DEEP + "]" * DEEP), "it is nested deeper than 50 levels"),
    "nested objects": (
        lambda path: path.write_text('{"":' * (DEEP // 2) + "1" + "}" * (DEEP // 2)),
        "it is nested deeper than 50",
    ),
    "nested a little": (lambda path: path.write_text("[" * 60 + "]" * 60), "it is nested deeper than 50 levels"),
}


@pytest.fixture(params=PLACES)
def made(request, tmp_path):
    """A function that makes a file of a name; and what is wrong with it."""
    make, reason = PLACES[request.param]

    def at(name):
        path = tmp_path / name
        make(path)
        return path

    started = time.monotonic()
    yield at, reason
    assert time.monotonic() - started < 20


def test_a_file_that_is_no_text_of_a_bounded_size_and_depth_is_not_read(made):
    at, reason = made
    for read, name in ((read_json, "x.json"), (read_yaml, "x.yaml")):
        with pytest.raises(ValueError, match=reason):
            read(at(name))


def test_as_a_recipe_it_ends_in_one_sentence(made, capsys):
    at, reason = made
    path = at("recipe.yaml")
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 500
    if path.is_file():  # what is no file is refused before it is opened
        assert reason in error


def test_as_a_record_it_ends_in_one_sentence(made, capsys):
    at, reason = made
    folder = at("run.json").parent
    with pytest.raises(ValueError, match=r"run\.json is not a run record of schema 1 .*" + reason):
        RunRecord.load(folder)
    with pytest.raises((ValueError, OSError), match=rf"{reason}|run\.json"):
        find_records([folder])
    for command in (["compare"], ["card"], ["publish", "--repo-id", "org/x"], ["evaluate"]):
        assert main([command[0], str(folder), *command[1:]]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and len(error) < 500


def test_as_the_file_of_a_record_and_as_a_manifest_it_ends_in_one_sentence(made):
    at, reason = made
    path = at("0.json")
    if not path.is_dir():
        with pytest.raises(ValueError, match=r"0\.json is not a run record of schema 1 .*" + reason):
            RunRecord.load(path)
    with pytest.raises(ValueError, match=r"holds no data of a task \(task\.json: .*" + reason):
        Manifest.load(at("task.json").parent)


def test_aliases_which_make_gigabytes_of_a_few_lines_are_not_read(tmp_path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert "the alias *a0 is not read, write its value out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: !!python/object:os.system x",
        "a: !!int x",
        "a: !!bool maybe",
        "a: !!int ''",
        "a: !!set [1]",
        "a: !!binary aGk=",
        "! a",
        "a: " + "9" * 5000,
        "{[1]: 2}",
    ],
)
def test_what_yaml_cannot_make_is_one_sentence(text):
    with pytest.raises(ValueError) as refused:
        parse_yaml(text)
    assert "\n" not in str(refused.value)


def test_plain_words_of_yaml_are_what_they_look_like():
    words = {
        "no": "no", "Yes": "Yes", "off": "off", "true": True, "False": False, "null": None, "~": None, "''": "",
        "010": "010", "1:30": "1:30", "1:30.5": "1:30.5", "2024-01-02": "2024-01-02", "=": "=", "1.0e+3": 1000.0, "1e3": "1e3", "3e-3": "3e-3",
        "-.5": "-.5", ".5": 0.5, "1.": 1.0, "20_000": 20000, "+7": 7, "0": 0, "0x1F": 31, "0.5": 0.5, "-0": 0, "-": [None],
    }  # fmt: skip
    for text, value in words.items():
        found = parse_yaml(text)
        assert (found, type(found)) == (value, type(value)), text
    assert parse_yaml("[.inf, -.INF]") == [float("inf"), float("-inf")] and parse_yaml(".nan") != parse_yaml(".nan")


def test_whatever_is_written_as_yaml_is_read_as_it_was():
    values: list = [
        "no", "yes", "on", "010", "1:30", "2024-01-02", "3e-3", "1e3", ".inf",
        "null", "", "<<", "=", "0x1f", "~", "1_0", " a", "-.5",
    ]  # fmt: skip
    values += [True, None, 0, -8, 1e-9, 1e300, 0.1, 12345678901234567890, {"a": [1, "b"]}, float("inf")]
    assert parse_yaml(yaml.safe_dump(values)) == values


def test_a_key_that_stands_twice_in_json_is_refused_at_any_depth(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [{"b": 1, "b": 2}]}')
    with pytest.raises(ValueError, match="the key 'b' occurs twice"):
        read_json(tmp_path / "x.json")


def test_what_python_can_write_is_read(tmp_path):
    content = {"a": [1, 2.5, None, True, "x|y"], "b": {"c": {}}}
    (tmp_path / "x.json").write_text(json.dumps(content))
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    assert read_json(tmp_path / "x.json") == read_yaml(tmp_path / "x.yaml") == content


@pytest.mark.parametrize("size", [10**9, 10**30])
@pytest.mark.parametrize(
    "key",
    [
        "task.num_examples", "task.num_variables", "task.num_terms", "trainer.train_batch_size", "trainer.max_steps",
        "trainer.per_device_eval_batch_size", "trainer.dataloader_num_workers", "trainer.gradient_accumulation_steps",
        "trainer.eval_samples", "model.hidden_size", "model.num_hidden_layers", "model.relative_attention_num_buckets",
    ],
)  # fmt: skip
def test_sizes_of_a_billion_are_refused_before_memory_is_asked_for(key, size):
    started = time.monotonic()
    if key == "trainer.max_steps":
        size += 1
    with pytest.raises(ValueError, match=key.rpartition(".")[2]) as refused:
        load_recipe("logic/demo.yaml", {key: str(size)})
    assert "\n" not in str(refused.value) and time.monotonic() - started < 10
