"""Tests of runs that start from a checkpoint: its weights, its shape, and refused combinations."""

import json
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.tasks import get_task
from hf_hyla.training import load_recipe, train
from hf_hyla.training.weights import initial_model, load_model


PROJECT = Path(__file__).parents[2]
TRAINER = {
    "max_steps": 4, "learning_rate": 0.0, "warmup_steps": 1, "weight_decay": 0.1, "train_batch_size": 4,
    "eval_steps": 4, "save_steps": 4, "logging_steps": 2, "eval_samples": 8, "disable_tqdm": True,
}  # fmt: skip
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of puzzles with two features."""
    task = get_task("sraven", num_features=2)
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    HylaForSequenceClassification(HylaConfig(**task.model_defaults | SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(checkpoint, tmp_path):
    """Makes a recipe that starts from the checkpoint, by `recipe(task, **changes of the model section)`."""

    def make(task=None, **model):
        path = tmp_path / "tiny.yaml"
        model = {"model_name_or_path": str(checkpoint), **model}
        path.write_text(yaml.safe_dump({"task": task or PUZZLES, "model": model, "trainer": TRAINER}))
        return load_recipe(path)

    return make


PUZZLES = {"name": "sraven", "num_features": 3}


def test_a_run_starts_from_the_checkpoints_weights_and_keeps_its_shape(recipe, checkpoint, tmp_path, monkeypatch):
    sizes = property(lambda self: dict.fromkeys(self.splits, 16))
    monkeypatch.setattr(type(get_task("sraven")), "num_samples", sizes)
    record = train(recipe(attention_dropout=0.3), tmp_path / "run")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "run"))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert record.recipe["model"] == {"model_name_or_path": str(checkpoint), "attention_dropout": 0.3}
    config = HylaConfig.from_pretrained(tmp_path / "run")
    assert (config.num_answers, config.attention_dropout, config.relative_attention_num_buckets) == (3, 0.3, 18)


@pytest.mark.parametrize("inside", ["", "checkpoints/checkpoint-3"])
def test_overwrite_keeps_the_weights_that_the_run_starts_from(inside, recipe, checkpoint, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / inside)
    (run / "resolved_recipe.yaml").touch()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"starts from the weights in .*, which --overwrite would remove"):
        train(recipe(model_name_or_path=str(run / inside)), run, overwrite=True)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_fine_tuning_script_takes_a_folder_and_compares(checkpoint, tmp_path, monkeypatch, capsys):
    sizes = property(lambda self: dict.fromkeys(self.splits, 16))
    monkeypatch.setattr(type(get_task("sraven")), "num_samples", sizes)
    monkeypatch.setattr("hf_hyla.runs.environment._git_commit", lambda: "0" * 40)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("somebody was called"))
    changes = [f"trainer.{name}={value}" for name, value in (TRAINER | {"learning_rate": 0.1}).items()]
    script = PROJECT / "recipes" / "sraven" / "finetune.py"
    monkeypatch.setattr("sys.argv", [str(script), str(checkpoint), str(tmp_path / "run"), *changes])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    scores = re.findall(r"^(?:test|ood) +(?:feature_)?accuracy +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert len(scores) == 4 and any(before != after for before, after in scores)
    assert HylaConfig.from_pretrained(tmp_path / "run").num_answers == 5


def start(recipe):
    return initial_model(recipe.settings["model"], recipe.config)


def test_a_checkpoint_in_half_precision_is_trained_in_single_precision(recipe, checkpoint, tmp_path):
    half = HylaForSequenceClassification.from_pretrained(checkpoint).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    model = start(recipe(model_name_or_path=str(tmp_path / "half")))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.classifier.weight, half.classifier.weight.float())


def test_settings_that_agree_with_the_checkpoint_may_be_repeated(recipe):
    config = recipe(attention_type="hyla", score_norm="rms_head", hidden_size=16).config
    assert (config.effective_score_norm, config.hidden_size) == ("rms_head", 16)


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        (None, {"attention_type": "softmax"}, "model.attention_type is 'softmax', but the weights of .* with 'hyla'"),
        (None, {"score_norm": "none"}, "model.score_norm is 'none', but the weights of .* with 'rms_head'"),
        (None, {"hidden_size": 32}, "model.hidden_size is 32, but the weights of .* with 16"),
        (None, {"hiden_size": 32}, "has no key 'hiden_size'"),
        (None, {"num_answers": 5}, "its num_answers is 5"),
        (PUZZLES | {"num_values": 6}, {}, "does not fit the task sraven: its vocab_size is 9"),
        ({"name": "logic"}, {}, "does not fit the task logic"),
        (None, {"model_name_or_path": "no/such-model"}, "no/such-model cannot be loaded"),
        (None, {"model_name_or_path": 3}, "must be str"),
        (None, {"revision": "main"}, "is a folder, and only repositories have revisions"),
        (None, {"attention_dropout": 1.5}, "attention_dropout must lie in"),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_refused(recipe, monkeypatch, task, model, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as refused:
        recipe(task, **model)
    assert "\n" not in str(refused.value)


def test_a_classifier_with_another_shape_is_refused(recipe, tmp_path):
    HylaForSequenceClassification(HylaConfig(**get_task("logic").model_defaults | SMALL)).save_pretrained(
        tmp_path / "logic"
    )
    with pytest.raises(ValueError, match="The model does not fit the task sraven: its vocab_size is None, expected 9"):
        recipe(model_name_or_path=str(tmp_path / "logic"))
    config = HylaConfig(**get_task("sraven").model_defaults | SMALL | {"num_labels": 5})
    HylaForSequenceClassification(config).save_pretrained(tmp_path / "five")
    with pytest.raises(ValueError, match="its num_labels is 5, expected 8"):
        recipe(model_name_or_path=str(tmp_path / "five"))


def test_other_models_missing_weights_and_a_revision_without_a_model_are_refused(recipe, checkpoint, tmp_path):
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **tiny)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert model, expected a hyla model"):
        recipe(model_name_or_path=str(tmp_path / "bert"))
    HylaConfig.from_pretrained(checkpoint).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="holds no weights"):
        start(recipe(model_name_or_path=str(tmp_path / "bare")))
    path = tmp_path / "fresh.yaml"
    path.write_text(yaml.safe_dump({"task": PUZZLES, "model": {"revision": "main"}, "trainer": TRAINER}))
    with pytest.raises(ValueError, match="revision belongs to a model_name_or_path, which is missing"):
        load_recipe(path)


def save_as_pickle(checkpoint, folder):
    model = HylaForSequenceClassification.from_pretrained(checkpoint)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def test_pickled_weights_are_not_loaded(checkpoint, tmp_path):
    save_as_pickle(checkpoint, tmp_path)
    with pytest.raises(ValueError, match=r"holds no weights: expected model\.safetensors"):
        load_model(tmp_path)
    # A file that satisfies the first look leaves from_pretrained to refuse them, as it does those of the Hub.
    (tmp_path / "other.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises((ValueError, OSError), match="safetensors"):
        load_model(tmp_path)


def test_code_beside_weights_is_not_run(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    entry = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": entry}))
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedConfig\nclass OwnConfig(PreTrainedConfig):\n    model_type = 'own'\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever sits there would allow it
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(checkpoint, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        load_model(folder)


def test_weights_of_other_shapes_than_the_config_are_called_so(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_size": 2 * settings["hidden_size"]}))
    with pytest.raises(ValueError, match=r"its weights have other shapes than its config\.json says"):
        load_model(folder)


@pytest.mark.parametrize("wrong", [{"auto_map": -1}, {"model_type": []}, {"dtype": 1e308}, {"norm_eps": "x"}])
def test_a_recipe_that_starts_from_a_config_of_wrong_types_is_refused(recipe, checkpoint, tmp_path, wrong):
    settings = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | wrong))
    with pytest.raises(ValueError, match=r"model_name_or_path: [^\n]+ cannot be loaded"):
        recipe(model_name_or_path=str(tmp_path))


@pytest.mark.parametrize(
    "content", ["[" * 20_000, "{", '{"model_type": "hyla", "num_labels": "' + "x" * 10 + '"}', "null", "[1]"]
)
def test_a_config_that_is_none_ends_in_one_sentence(checkpoint, tmp_path, content):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        load_model(folder)
