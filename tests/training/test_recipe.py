import json
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer

from hf_hyla.runs import RunRecord
from hf_hyla.runs.paper import paper_result
from hf_hyla.training import load_recipe


RECIPES = Path(__file__).parents[2] / "recipes"
ALL = sorted(path for part in ("logic", "sraven") for path in RECIPES.glob(f"{part}/*.yaml"))
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
    assert f"`{path.parent.name}/{path.name}`" in (RECIPES / "README.md").read_text()
    if path.stem == "demo":
        return
    paper = paper_result(recipe.settings)
    runs = [RunRecord.load(record) for record in sorted((RECIPES / "results" / recipe.name).glob("*.json"))]
    if path.stem.endswith("-muon") and not runs:
        assert recipe.expect is None  # the paper has no result with Muon
        return
    # What runs of the recipe reached, where there are some, or else the paper's.
    split, _, score = paper.metric.partition("/")
    reached = statistics.fmean(run.metrics[split][score] for run in runs) if runs else paper.mean
    samples = recipe.trainer["max_steps"] * 128
    assert recipe.expect.metric == paper.metric and recipe.expect.value == pytest.approx(reached, abs=5e-5)
    assert recipe.expect.budget == samples and (runs or samples == paper.num_samples)


def test_the_papers_numbers_are_only_quoted_for_the_papers_models(tmp_path):
    recipe = load_recipe(RECIPES / "logic/hyla.yaml")
    assert paper_result(recipe.settings).mean == 0.8113
    for key, value in (
        ("model.num_attention_heads", "4"),
        ("model.hidden_size", "16"),
        ("model.norm_type", "rms_norm"),
        ("model.is_causal", "true"),
        ("task.num_examples", "16"),
        ("task.held_out", "0.3"),
    ):
        other = load_recipe(RECIPES / "logic/hyla.yaml", {key: value})
        assert paper_result(other.settings) is None, key
    how_it_is_trained = {
        "model.attention_dropout": "0.0",
        "model.attention_out_multiplier": "0.5",
        "trainer.optim": "muon",
    }
    other = load_recipe(RECIPES / "logic/hyla.yaml", how_it_is_trained | {"trainer.muon_learning_rate": "0.004"})
    assert paper_result(other.settings).mean == 0.8113


def test_values_have_the_types_of_their_fields(tmp_path):
    text = yaml.safe_dump(GOOD).replace("learning_rate: 0.001", "learning_rate: 3e-3")
    recipe = load_recipe(write(tmp_path, text), {"trainer.weight_decay": "1", "model.qk_norm": "true"})
    assert recipe.trainer["learning_rate"] == 0.003  # which YAML reads as text
    assert recipe.trainer["weight_decay"] == 1.0 and recipe.config.qk_norm is True
    assert recipe.settings["task"]["held_out"] == 0.5  # what a recipe leaves out is recorded too


def test_a_key_may_be_null_if_its_field_may_be_none(tmp_path):
    sections = changed(trainer={"eval_strategy": "no", "eval_steps": None})
    assert load_recipe(write(tmp_path, sections)).trainer["eval_steps"] is None


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
        (
            changed(model={"attention_type": "hylq"}),
            "must be one of hyla, linear, softmax, got 'hylq' .did you mean 'hyla'",
        ),
        (changed(model={"score_norm": "nothing"}), "score_norm must be one of rms_head, softmax, none, got 'nothing'"),
        (changed(model={"hidden_size": 0}), r"recipe\.yaml: model: hidden_size must be at least 1, got 0"),
        (changed(model={"input_size": 7}), "its input_size is 7"),
        (changed(trainer={"learnig_rate": 1}), "did you mean 'learning_rate'"),
        (changed(trainer={"learning_rate": "fast"}), "learning_rate must be float, got 'fast'"),
        (changed(trainer={"max_steps": 2.5}), "max_steps must be int, got 2.5"),
        (changed(trainer={"max_steps": True}), "max_steps must be int, got True"),
        (changed(trainer={"output_dir": "x"}), "'output_dir', which is set by --output"),
        (changed(trainer={"push_to_hub": True}), "push_to_hub needs trainer.hub_model_id"),
        (changed(trainer={"hub_strategy": "checkpoint"}), "never its checkpoints, which hold pickles"),
        (changed(trainer={"hub_token": "x"}), "must never be stored in a file"),
        (changed(trainer={"num_train_epochs": 3}), "'num_train_epochs', which has no effect"),
        (changed(trainer={"optim": "muon"}), "trainer: optim 'muon' needs muon_learning_rate"),
        (
            changed(trainer={"muon_learning_rate": 1e-3}),
            "trainer: muon_learning_rate belongs to optim 'muon', but optim is",
        ),
        (changed(trainer={"optim": "muon", "muon_learning_rate": -1.0}), "muon_learning_rate must be at least 0"),
        (changed(trainer={"schedule_floor": 2}), "trainer.schedule_floor must be at most 1, got 2"),
        (changed(trainer={"optim": "adamw_torhc"}), "got 'adamw_torhc' .did you mean 'adamw_torch'"),
        (
            changed(trainer={"train_sampling_strategy": "sequentail"}),
            "must be one of sequential, random, got 'sequentail' .did you mean 'sequential'",
        ),
        (changed(trainer={"eval_strategy": False}), "must be str, got False"),
        (changed(trainer={"save_strategy": "best"}), "save_strategy must be one of no, steps, epoch, got 'best'"),
        (changed(trainer={"torch_compile_mode": "max"}), "torch_compile_mode must be one of default, reduce-overhead"),
        (changed(trainer={"report_to": ["none", 1]}), "report_to must be list of str or null or str"),
        (
            changed(trainer={"neftune_noise_alpha": 5.0}),
            "'neftune_noise_alpha', which is not supported: no run has been",
        ),
        *(
            (changed(trainer={key: value}), f"'{key}', which is not supported: scores would be of other samples")
            for key, value in {
                "dataloader_drop_last": True,
                "label_names": ["labels"],
                "label_smoothing_factor": 0.1,
                "accelerator_config": {"split_batches": True},
                "eval_do_concat_batches": False,
                "batch_eval_metrics": True,
                "prediction_loss_only": True,
                "bf16_full_eval": True,
            }.items()
        ),
        *(
            (changed(trainer={key: value}), rf"trainer\.{key} must be a finite number, got {value}")
            for key in (
                "learning_rate",
                "weight_decay",
                "max_grad_norm",
                "warmup_steps",
                "save_steps",
                "logging_steps",
            )
            for value in (float("nan"), float("inf"))
        ),
        (changed(trainer={"adam_beta1": 2.0}), "adam_beta1 must be less than 1, got 2.0"),
        (changed(trainer={"seed": 2**32}), "seed must be less than 4294967296"),
        (changed(trainer={"warmup_steps": 0.6}), "warmup_steps must be a whole number, got 0.6"),
        (changed(trainer={"save_steps": 1.5}), "save_steps must be a whole number, got 1.5"),
        (changed(trainer={"learning_rate": 10**400}), "learning_rate must be float, got 1000"),
        (changed(task={"held_out": float("inf")}), r"task\.held_out must be a finite number, got inf"),
        (changed(task={"held_out": float("nan")}), r"task\.held_out must be a finite number, got nan"),
        *(
            (
                {**GOOD, "expect": {"metric": "ood/r2", "value": 1, "tolerance": 1, "source": "x", key: float("nan")}},
                rf"expect\.{key} must be a finite number, got nan",
            )
            for key in ("value", "tolerance")
        ),
        ("task:\n  name: logic\n  name: sraven\n", "not valid YAML: the key 'name' occurs twice.*line 3"),
        ("task: {}\ntask: {}\n", "not valid YAML: the key 'task' occurs twice"),
        ("task: \x00", "not valid YAML"),
        (changed(trainer={"train_batch_size": 0}), "train_batch_size must be at least 1, got 0"),
        (changed(trainer={"learning_rate": -1.0}), "learning_rate must be at least 0"),
        (changed(trainer={"dataloader_prefetch_factor": 0}), "dataloader_prefetch_factor must be at least 1, got 0"),
        (
            changed(trainer={"per_device_train_batch_size": 8}),
            "is replaced by train_batch_size, the samples of all processes; remove it",
        ),
        (changed(model={"value_depth": 3}), "model.value_depth must be one of 1, 2, got 3"),
        (changed(model={"value_depth": True}), "model.value_depth must be one of 1, 2, got True"),
        (changed(trainer={"save_total_limit": 1}), "save_total_limit must be at least 2, got 1"),
        ({**GOOD, "task": {"name": ["logic"]}}, "There is no task"),
        (
            {**GOOD, "expect": {"metric": "ood/r3", "value": 1, "tolerance": 1, "source": "x"}},
            "must be one of test/r2, ood/r2",
        ),
        (changed(trainer={"fsdp": "full_shard"}), "'fsdp', which belongs to the launch"),
        (
            changed(trainer={"save_only_model": True}),
            "'save_only_model', which is not supported: an interrupted run would",
        ),
        (changed(trainer={"load_best_model_at_end": True}), "scored with the weights of its last step"),
        (
            {**GOOD, "expect": {"metric": "ood/r2", "value": 1, "tolerance": -1, "source": "x"}},
            "expect.tolerance must be at least 0, got -1",
        ),
        (
            {**GOOD, "expect": {"metric": "ood/r2", "value": 1, "tolerance": 1, "source": "x", "budget": 0}},
            "expect.budget must be at least 1, got 0",
        ),
        (changed(trainer={"warmup_steps": 5}), "larger than twice warmup_steps"),
        ({**GOOD, "trainer": {"max_steps": 10}}, "lacks trainer.learning_rate"),
        ({**GOOD, "expect": {"metric": "ood/r2"}}, "lacks expect.value"),
        (
            {**GOOD, "expect": {"metric": "odd/r2", "value": 1, "tolerance": 1, "source": "x"}},
            "must be one of test/r2",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_a_sentence(tmp_path, sections, message):
    with pytest.raises(ValueError, match=message) as refused:
        load_recipe(write(tmp_path, sections))
    assert "\n" not in str(refused.value)


def test_a_recipe_of_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/logic/demo.yaml").name == load_recipe("logic/demo.yaml").name == "logic-demo"
    with pytest.raises(FileNotFoundError, match=r"logic/dem\.yaml"):
        load_recipe("logic/dem.yaml")


@pytest.mark.parametrize(
    "settings",
    [
        {"torch_compile": True, "torch_compile_backend": "inductor", "torch_compile_mode": "default"},
        {"train_sampling_strategy": "random", "eval_strategy": "no", "report_to": ["none"], "optim": "sgd"},
        {"optim": "muon", "muon_learning_rate": 4e-3, "muon_learning_rate_qk": 1e-3, "schedule_floor": 0.0},
        {"ddp_backend": "gloo"},  # of a launch of several processes, also while there is one
    ],
)
def test_settings_that_resume_exactly_are_accepted(tmp_path, settings):
    assert load_recipe(write(tmp_path, changed(trainer=settings))).trainer.items() >= settings.items()


def test_a_key_that_overrides_a_merged_one_is_not_a_duplicate(tmp_path):
    text = yaml.safe_dump(GOOD).replace("trainer:\n", "trainer:\n  <<: {max_steps: 9, seed: 3}\n")
    assert load_recipe(write(tmp_path, text)).trainer["max_steps"] == 10


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("trainer.eval_strategy", "no", "no"),
        ("trainer.run_name", "007", "007"),
        ("trainer.run_name", "a: [b #c", "a: [b #c"),
        ("trainer.run_name", "'quoted'", "quoted"),
        ("trainer.run_name", "null", None),
        ("trainer.report_to", "[none]", ["none"]),
        ("trainer.report_to", "none", "none"),
        ("trainer.disable_tqdm", "yes", True),
        ("trainer.bf16", "off", False),
        ("trainer.max_steps", "20_000", 20_000),
        ("trainer.learning_rate", "3e-3", 0.003),
    ],
)
def test_the_text_of_an_override_is_read_by_the_type_of_its_setting(tmp_path, key, text, value):
    recipe = load_recipe(write(tmp_path, GOOD), {key: text})
    section, name = key.split(".")
    found = recipe.settings[section][name]
    assert (found, type(found)) == (value, type(value))
    assert yaml.safe_load(yaml.safe_dump(recipe.settings)) == recipe.settings


def test_files_of_a_text_are_named_without_inner_quotes(tmp_path):
    recipe = load_recipe("text/hyla.yaml", {"task.files": "*.md"})
    assert recipe.settings["task"]["files"] == "*.md"


@pytest.mark.parametrize("text", ["eval_strategy: no", "disable_tqdm: yes", "seed: 3"])
def test_a_word_in_a_recipe_needs_no_quotes(tmp_path, text):
    path = write(tmp_path, yaml.safe_dump(GOOD).replace("trainer:\n", f"trainer:\n  {text}\n"))
    name, _, word = text.partition(": ")
    assert load_recipe(path).trainer[name] == {"no": "no", "yes": True, "3": 3}[word]


@pytest.mark.parametrize("text", ["010", "1:30"])
def test_a_number_that_yaml_used_to_read_as_another_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=rf"trainer\.max_steps must be int, got '{text}'"):
        load_recipe(write(tmp_path, GOOD), {"trainer.max_steps": text})


def test_settings_are_those_that_the_records_json_gives_back(tmp_path):
    recipe = load_recipe(write(tmp_path, changed(model={"id2label": {0: "value"}})))
    assert json.loads(json.dumps(recipe.settings)) == recipe.settings
    assert recipe.config.id2label == {0: "value"}
    with pytest.raises(ValueError, match=r"holds a value that no JSON file could hold|Field 'id2label'"):
        load_recipe(write(tmp_path, changed(model={"id2label": {0: float("nan")}})))


@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("sgd", "momentum", "optim_args: momentum must be a number, got ''"),
        ("sgd", "momentum=inf", "optim_args: momentum must be a number, got 'inf'"),
        ("sgd", "momentun=0.9", "optim_args has no 'momentun' .did you mean 'momentum'"),
        ("sgd", "momentum=0.9,nesterov=maybe", "nesterov must be true or false, got 'maybe'"),
        ("sgd", "nesterov=true", "Nesterov momentum requires a momentum"),
        ("sgd", "momentum=-1", "Invalid momentum value"),
        ("rmsprop", "dampening=1", "optim_args has no 'dampening'.*expected momentum or alpha or eps or centered"),
        ("adamw_torch", "beta1=0.5", "optim_args has no effect with optim 'adamw_torch', got 'beta1=0.5': remove it"),
    ],
)
def test_arguments_that_the_optimiser_would_drop_or_fail_at_are_refused(tmp_path, optim, optim_args, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, changed(trainer={"optim": optim, "optim_args": optim_args})))


def test_arguments_of_the_optimiser_reach_it(tmp_path):
    recipe = load_recipe(
        write(tmp_path, changed(trainer={"optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"}))
    )
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(recipe.training_arguments(tmp_path))
    assert optimizer is torch.optim.SGD and settings["momentum"] == 0.9 and settings["nesterov"]


def test_an_override_that_is_not_yaml_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.qk_norm is not valid YAML"):
        load_recipe(write(tmp_path, GOOD), {"model.qk_norm": "["})


def test_an_override_of_an_unknown_section_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Cannot override 'modle\.x' \(did you mean 'model'"):
        load_recipe(write(tmp_path, GOOD), {"modle.x": "1"})
