"""Tests of the names of settings, which the command line knows without importing torch."""

import dataclasses

import pytest

from hf_hyla.benchmark import PARTS
from hf_hyla.cli import bench
from hf_hyla.cli.settings import SETTINGS, TASKS, check_settings, unknown_argument
from hf_hyla.model import HylaConfig
from hf_hyla.tasks import TASKS as CLASSES
from hf_hyla.training import recipe
from hf_hyla.training.weights import CHECKPOINT_KEYS


def fields(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(cls) if field.init}


def test_the_names_of_settings_are_those_that_recipes_take():
    assert {name: set(names) for name, names in TASKS.items()} == {name: fields(cls) for name, cls in CLASSES.items()}
    assert set(SETTINGS["task"]) == {"name", "data"}.union(*map(fields, CLASSES.values()))
    assert set(SETTINGS["model"]) == fields(HylaConfig) - recipe._REFUSED_MODEL.keys() | {
        "num_labels",
        *CHECKPOINT_KEYS,
    }
    assert set(SETTINGS["trainer"]) == recipe._ALLOWED_TRAINER
    assert set(SETTINGS["expect"]) == fields(recipe.Expectation)
    assert tuple(SETTINGS) == recipe.SECTIONS and bench.PARTS == PARTS


def test_settings_that_a_recipe_refuses_with_a_reason_are_left_to_the_recipe():
    refused = {"model": recipe._REFUSED_MODEL, "trainer": recipe._REFUSED_TRAINER}
    check_settings({f"{section}.{name}": "1" for section, names in refused.items() for name in names})
    with pytest.raises(ValueError, match=r"did you mean --trainer\.warmup_steps\?"):
        check_settings({"trainer.warmupsteps": "1"})


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
    assert unknown_argument(word, options, recipe.SECTIONS).endswith(f"(did you mean {near}?).")
