from pathlib import Path

import pytest
import yaml

from hf_hyla.paper import paper_result
from hf_hyla.training import load_recipe


RECIPES = Path(__file__).parents[2] / "recipes"
ALL = sorted(RECIPES.glob("*/*.yaml"))
GOOD = {
    "task": {"name": "logic", "num_examples": 4},
    "model": {"attention_type": "hyla"},
    "trainer": {"max_steps": 10, "learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1},
}


def write(folder, sections) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(sections if isinstance(sections, str) else yaml.safe_dump(sections))
    return path


def changed(**sections):
    return {name: {**GOOD.get(name, {}), **section} for name, section in {**GOOD, **sections}.items()}


@pytest.mark.parametrize("path", ALL, ids=[f"{path.parent.name}/{path.stem}" for path in ALL])
def test_every_recipe_loads_and_names_its_hardware_first(path):
    recipe = load_recipe(path)
    assert path.read_text().startswith("# ")
    index = (RECIPES / "README.md").read_text()
    assert f"{path.parent.name}/{path.name}" in index
    assert recipe.expect is None or recipe.expect.metric.partition("/")[0] in recipe.task.splits


@pytest.mark.parametrize("task", ["logic", "sraven"])
@pytest.mark.parametrize("attention_type", ["hyla", "softmax", "linear"])
def test_the_papers_recipes_are_runs_of_table_a1_at_its_full_budget(task, attention_type):
    recipe = load_recipe(RECIPES / task / f"{attention_type}.yaml")
    paper = paper_result(recipe.task, recipe.config)
    assert recipe.config.attention_type == attention_type
    assert recipe.trainer["max_steps"] * 128 == paper.num_samples


def test_the_papers_numbers_are_only_quoted_for_the_papers_models(tmp_path):
    recipe = load_recipe(RECIPES / "logic/hyla.yaml")
    assert paper_result(recipe.task, recipe.config).mean == 0.8113
    wider = load_recipe(RECIPES / "logic/hyla.yaml", {"model.num_attention_heads": "4"})
    assert paper_result(wider.task, wider.config) is None
    shorter = load_recipe(RECIPES / "logic/hyla.yaml", {"task.num_examples": "16"})
    assert paper_result(shorter.task, shorter.config) is None


def test_values_come_in_the_types_of_their_fields(tmp_path):
    text = yaml.safe_dump(GOOD).replace("learning_rate: 0.001", "learning_rate: 3e-3")
    recipe = load_recipe(write(tmp_path, text), {"trainer.weight_decay": "1", "model.qk_norm": "true"})
    assert recipe.trainer["learning_rate"] == 0.003  # which YAML reads as text
    assert recipe.trainer["weight_decay"] == 1.0 and recipe.config.qk_norm is True
    assert recipe.settings["task"]["held_out"] == 0.5  # what a recipe leaves out is recorded too


def test_overrides_drop_what_the_recipe_expects_of_another_run(tmp_path):
    expect = {"metric": "ood/r2", "value": 0.8, "tolerance": 0.1, "source": "ours"}
    path = write(tmp_path, {**GOOD, "expect": expect})
    assert load_recipe(path).expect.value == 0.8
    assert load_recipe(path, {"model.attention_type": "softmax"}).expect is None


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ("task: [", "is not valid YAML"),
        ("- a", "must hold the sections"),
        ({**GOOD, "modle": {}}, "unknown section 'modle' .did you mean 'model'"),
        ({"task": GOOD["task"], "trainer": GOOD["trainer"]}, "lacks the section 'model'"),
        ({**GOOD, "model": None}, "'model' must hold keys and values"),
        ({**GOOD, "task": {"num_examples": 4}}, "lacks the key 'name'"),
        ({**GOOD, "task": {"name": "logics"}}, "did you mean 'logic'"),
        (changed(task={"num_exmples": 4}), "no key 'num_exmples' .did you mean 'num_examples'"),
        (changed(task={"num_examples": "many"}), "num_examples must be int, got 'many'"),
        (changed(task={"held_out": 0.99}), "must occur in training"),
        (changed(model={"atention_type": "hyla"}), "no key 'atention_type' .did you mean 'attention_type'"),
        (changed(model={"attention_type": "quadratic"}), "expected one of"),
        (changed(model={"input_size": 7}), "its input_size is 7"),
        (changed(trainer={"learnig_rate": 1}), "did you mean 'learning_rate'"),
        (changed(trainer={"learning_rate": "fast"}), "learning_rate must be float, got 'fast'"),
        (changed(trainer={"max_steps": 2.5}), "max_steps must be int, got 2.5"),
        (changed(trainer={"max_steps": True}), "max_steps must be int, got True"),
        (changed(trainer={"output_dir": "x"}), "no key 'output_dir'"),
        (changed(trainer={"warmup_steps": 5}), "larger than twice warmup_steps"),
        ({**GOOD, "trainer": {"max_steps": 10}}, "lacks trainer.learning_rate"),
        ({**GOOD, "expect": {"metric": "ood/r2"}}, "lacks expect.value"),
        (
            {**GOOD, "expect": {"metric": "odd/r2", "value": 1, "tolerance": 1, "source": "x"}},
            "the splits are train, test, ood",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_a_sentence(tmp_path, sections, message):
    with pytest.raises(ValueError, match=message) as refused:
        load_recipe(write(tmp_path, sections))
    assert "\n" not in str(refused.value)


def test_an_override_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Cannot override 'modle\.x' \(did you mean 'model'"):
        load_recipe(write(tmp_path, GOOD), {"modle.x": "1"})
