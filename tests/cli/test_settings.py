"""Tests of the settings that the command line knows without importing torch."""

import json
import sys
import types

import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_hyla.benchmark import PARTS
from hf_hyla.cli import bench
from hf_hyla.cli.settings import check_settings, unknown_argument
from hf_hyla.model import HylaConfig
from hf_hyla.settings import EXPECT, MODEL, REFUSED, SECTIONS, TASKS, TRAINER
from hf_hyla.tasks import TASKS as CLASSES
from hf_hyla.training import HylaTrainingArguments, recipe
from hf_hyla.training.weights import CHECKPOINT_KEYS
from hf_hyla.typed_yaml import Argument, field_types, in_type, in_types


# One value of each type that YAML has.
VALUES = (0, 1, -1, 3, 0.5, True, "text", None, ["text"], {"key": 1})


def fields(cls) -> dict[str, object]:
    return field_types(cls)


def is_refused(check, *arguments) -> bool:
    try:
        check(*arguments)
    except (ValueError, StrictDataclassError):
        return True
    return False


def test_the_names_of_settings_are_those_that_recipes_take():
    assert {name: set(rows) for name, rows in TASKS.items()} == {name: {*fields(cls)} for name, cls in CLASSES.items()}
    assert set(MODEL) == fields(HylaConfig).keys() - REFUSED["model"].keys() | {"num_labels", *CHECKPOINT_KEYS}
    assert set(EXPECT) == fields(recipe.Expectation).keys()
    assert fields(HylaTrainingArguments).keys() >= TRAINER.keys() - {"train_batch_size"}
    assert fields(HylaTrainingArguments).keys() <= TRAINER.keys() | recipe._REFUSED_TRAINER.keys()
    assert not TRAINER.keys() & recipe._REFUSED_TRAINER.keys()
    assert tuple(SECTIONS) == ("task", "model", "trainer", "expect") and bench.PARTS == PARTS


@pytest.mark.parametrize(
    ("rows", "cls", "others"),
    [
        (MODEL, HylaConfig, {"num_labels": int, **CHECKPOINT_KEYS}),
        (TRAINER, HylaTrainingArguments, {"train_batch_size": int, "optim": str}),
        (EXPECT, recipe.Expectation, {}),
        *((rows, CLASSES[name], {}) for name, rows in TASKS.items()),
    ],
    ids=["model", "trainer", "expect", *TASKS],
)
def test_settings_have_the_types_of_their_classes(rows, cls, others):
    annotations = fields(cls) | others
    for name, row in rows.items():
        for value in VALUES:
            by_row, by_class = (is_refused(in_type, name, value, one) for one in (row.type, annotations[name]))
            # The types of transformers' own fields depend on its version. What a class takes must never be refused.
            assert by_row == by_class or (by_class and name not in cls.__annotations__), (name, value)


def limits(rows):
    """Each limit of each setting as a value that is refused beside the nearest that is not."""
    for name, row in rows.items():
        step = 1 if row.type in (int, int | None) or row.is_whole else 1e-9
        if row.minimum is not None:
            yield name, row.minimum - step, row.minimum
        if row.maximum is not None:
            yield name, row.maximum * (1 if step == 1 else 1 + 1e-9) + step, row.maximum
        if row.above is not None:
            yield name, row.above, row.above + 1e-9
        if row.below is not None:
            yield name, row.below, row.below - step


def message_of(build, **settings) -> str:
    """What a class says against a setting, and nothing if it takes it."""
    try:
        build(**settings)
    except (ValueError, StrictDataclassError) as error:
        return str(error.__cause__ or error)
    return ""


NEEDS = {"sliding_window": {"is_causal": True}, "input_size": {"vocab_size": None}}


@pytest.mark.parametrize(
    ("build", "rows"),
    [(HylaConfig, MODEL), *((CLASSES[name], rows) for name, rows in TASKS.items())],
    ids=["model", *TASKS],
)
def test_settings_have_the_limits_of_their_classes(build, rows):
    found = list(limits(rows))
    assert len(found) > 3
    for name, beyond, fine in found:
        assert f"{name} must" in message_of(build, **NEEDS.get(name, {}), **{name: beyond}), (name, beyond)
        # At the limit, a class may object to something else, such as the memory that so many weights take.
        assert f"{name} must" not in message_of(build, **NEEDS.get(name, {}), **{name: fine}), (name, fine)


def test_what_a_setting_may_be_is_checked_by_the_command_line_and_in_a_recipe_alike():
    sections = {
        "task": {"name": "logic"},
        "model": {},
        "trainer": {**dict.fromkeys(recipe._REQUIRED_TRAINER, 0), "max_steps": 9},
    }
    recipe.check_recipe(sections, "name", "file")
    for name, beyond, _ in limits(TRAINER):
        changed = sections | {"trainer": sections["trainer"] | {name: beyond}}
        with pytest.raises(ValueError, match=f"file: trainer.{name} must be") as in_recipe:
            recipe.check_recipe(changed, "name", "file")
        with pytest.raises(ValueError, match=f"--trainer.{name} must be") as on_command_line:
            check_settings({f"trainer.{name}": json.dumps(beyond)}, "logic")
        assert str(in_recipe.value).removeprefix("file: ") == str(on_command_line.value).removeprefix("--")


def test_annotations_that_a_module_writes_as_text_are_types(monkeypatch):
    module = types.ModuleType("with_text")
    monkeypatch.setitem(sys.modules, "with_text", module)
    code = """
from __future__ import annotations
import dataclasses, typing
if typing.TYPE_CHECKING:
    from nowhere import Unknown
@dataclasses.dataclass
class Settings:
    carry: bool = True
    share: float | None = None
    files: str = "a"
    unknown: Unknown | None = None
@dataclasses.dataclass
class Own(Settings):
    count: int = 1
"""
    exec(compile(code, "with_text.py", "exec", dont_inherit=True), vars(module))
    found = field_types(module.Own)
    assert found == {"carry": bool, "share": float | None, "files": str, "unknown": "Unknown | None", "count": int}
    given = {"carry": Argument("no"), "share": Argument("2e-1"), "files": Argument("*.txt"), "count": Argument("3")}
    assert in_types("x", given, module.Own) == {"carry": False, "share": 0.2, "files": "*.txt", "count": 3}
    with pytest.raises(ValueError, match=r"x\.count must be int, got 'four'"):
        in_types("x", {"count": "four"}, module.Own)


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_hidden_states", "maybe"), ("chunk_size_feed_forward", "1e3"), ("output_hidden_states", 2)],
)
def test_settings_of_transformers_have_their_types_too(name, value):
    sections = {"task": {"name": "logic"}, "trainer": dict.fromkeys(recipe._REQUIRED_TRAINER, 0) | {"max_steps": 9}}
    with pytest.raises(ValueError, match=f"model.{name} must be"):
        recipe.check_recipe(sections | {"model": {name: value}}, "name", "file")
    with pytest.raises(ValueError, match=f"{name} must be"):
        HylaConfig(**{name: value})
    read = recipe.check_recipe(sections | {"model": {"output_hidden_states": "no"}}, "name", "file")
    assert read.config.output_hidden_states is False


def test_settings_of_a_users_task_are_left_to_the_task():
    check_settings({"task.held_out": "3", "task.held_outs": "1"}, "my_module:MyTask")
    check_settings({"task.held_out": "3"}, None)
    with pytest.raises(ValueError, match=r"did you mean --task\.held_out\?"):
        check_settings({"task.held_outs": "1"}, None)


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--lerning_rate", "--trainer.learning_rate"),
        ("--learning-rate=1", "--trainer.learning_rate"),
        ("--seed", "--task.seed or --trainer.seed"),
        ("--batch_size", "--trainer.train_batch_size or --trainer.per_device_eval_batch_size"),
        ("--atention_type", "--model.attention_type"),
        ("--max_minute", "--max-minutes"),
        ("--trianer.seed", "--trainer.seed"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_nearest_name(word, near):
    options = ["--help", "--output", "--max-minutes"]
    assert unknown_argument(word, options, SECTIONS).endswith(f"(did you mean {near}?).")
