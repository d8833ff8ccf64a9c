"""Tests of language models from recipe to card: training, exact resume, scores, comparison, generation, publishing."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_hyla.cli import main
from hf_hyla.runs import RunRecord
from hf_hyla.runs.compare import EXCEEDED, MISSED, REACHED, compare
from hf_hyla.tasks import get_task
from hf_hyla.tasks.text import byte_tokenizer
from hf_hyla.training import evaluate, load_recipe, train


RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TRAINER = {
    "max_steps": 8, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "train_batch_size": 4,
    "eval_steps": 4, "save_steps": 4, "logging_steps": 2, "eval_samples": 16, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def committed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_hyla.runs.environment._git_commit", lambda: "0" * 40)
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"text number {number}\n" * (1 + number % 7))
    return folder


def recipe_in(folder, texts, **changes):
    folder.mkdir(exist_ok=True, parents=True)
    task = {"name": "text", "files": str(texts), "held_out": 0.3, "sequence_length": 16}
    sections = {"task": task, "model": SMALL, "trainer": TRAINER}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({name: {**section, **changes.get(name, {})} for name, section in sections.items()}))
    return load_recipe(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("finished")
    train(recipe_in(folder, texts), folder / "run")
    return folder / "run"


def test_a_run_writes_a_language_model_its_tokenizer_and_the_datas_fingerprint(finished, texts):
    record = RunRecord.load(finished)
    task = get_task("text", files=str(texts), held_out=0.3, sequence_length=16)
    assert record.data_fingerprint == task.fingerprint()
    assert record.metrics.keys() == {"test"}
    assert record.metrics["test"].keys() == {"loss", "bits_per_byte", "perplexity", "num_samples"}
    assert record.metrics["test"]["num_samples"] == task.num_samples["test"]
    assert [point["step"] for point in record.curve if "test/bits_per_byte" in point] == [4, 8]
    assert json.loads((finished / "config.json").read_text())["architectures"] == ["HylaForCausalLM"]
    assert AutoTokenizer.from_pretrained(finished)("é")["input_ids"] == [256, 0xC3, 0xA9]
    assert "tokenizer.json" in record.digests


def test_saved_weights_reach_the_scores_in_the_record(finished, capsys):
    record = RunRecord.load(finished)
    model = AutoModelForCausalLM.from_pretrained(finished)
    scores = evaluate(model, get_task(**record.recipe["task"]), "test", batch_size=7)
    assert scores == pytest.approx(record.metrics["test"], rel=1e-5)
    assert main(["evaluate", str(finished)]) == 0
    [found] = re.findall(r"test/bits_per_byte: (\S+)", capsys.readouterr().out)
    assert float(found) == pytest.approx(scores["bits_per_byte"], abs=1e-4)


def test_a_run_that_was_killed_resumes_to_the_same_bits(finished, texts, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("run.json", "model.safetensors", "checkpoints/checkpoint-8/trainer_state.json"):
        (run / name).unlink()  # as if it had been killed while it wrote the checkpoint of step 8
    record = train(recipe_in(tmp_path, texts), run)
    before, after = (load_file(folder / "model.safetensors") for folder in (finished, run))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record.metrics == RunRecord.load(finished).metrics


def test_a_model_whose_weights_are_not_finite_has_no_score(finished, texts, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(finished)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="answers on the split test are not all finite, so they have no score"
    ):
        evaluate(model, recipe_in(tmp_path, texts).task, "test")


def test_the_curve_does_not_speak_of_dropout_that_the_model_lacks(texts, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        "hf_hyla.training.run.learning_curve", lambda record, with_dropout: said.append(with_dropout) or b""
    )
    for dropout in (0.0, 0.1):
        changes = {"model": {"attention_dropout": dropout} if dropout else {}, "trainer": {"max_steps": 5}}
        train(recipe_in(tmp_path / str(dropout), texts, **changes), tmp_path / str(dropout) / "run")
    assert said == [False, True]


def test_a_lower_score_exceeds_what_was_expected(finished):
    record = RunRecord.load(finished)
    reached = record.metrics["test"]["bits_per_byte"]
    for value, verdict in ((reached, REACHED), (reached + 1, EXCEEDED), (reached - 1, MISSED)):
        expect = {"metric": "test/bits_per_byte", "value": value, "tolerance": 0.1, "source": "x", "budget": None}
        record.recipe["expect"] = expect
        [compared] = compare([record])
        assert (compared.metric, compared.verdict, compared.paper) == ("test/bits_per_byte", verdict, None)


def test_the_card_and_the_repository_of_a_language_model(finished, tmp_path, capsys):
    assert main(["publish", str(finished), "--repo-id", "org/writer", "--output", str(tmp_path)]) == 0
    files = {path.name for path in (tmp_path / "writer").iterdir()}
    assert files >= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "modeling_hyla.py", "run.json"}
    assert ".eval_results" not in files
    card = (tmp_path / "writer" / "README.md").read_text()
    head, _, text = card.removeprefix("---").partition("---")
    metadata = yaml.safe_load(head)
    assert metadata["pipeline_tag"] == "text-generation" and "datasets" not in metadata
    assert metadata["metrics"] == ["bits_per_byte", "perplexity"]
    score = RunRecord.load(finished).metrics["test"]["bits_per_byte"]
    assert f"| {score:.4f} |" in text and "It reads the bytes of a text in UTF-8" in text
    assert "`AutoModelForCausalLM.from_pretrained`" in text
    assert not re.search("synthetic|combinations|`ood`", text)
    [code, printed] = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)\n```", text, flags=re.DOTALL).groups()
    assert 'pipeline("text-generation"' in code and printed.startswith("text number ")


def test_what_a_language_model_lacks_is_refused_with_a_sentence(finished, tmp_path, capsys):
    for command, message in (
        (["probe", str(finished), "--split", "test"], "has no combinations of parts"),
        (["evaluate", str(finished), "--by-combination"], "has no combinations of parts"),
        (["evaluate", str(finished), "--split", "ood"], "has no split 'ood'"),
        (["data", "text", "--output", str(tmp_path / "data")], "is not written as a dataset"),
        (["publish", str(finished), "--repo-id", "org/x", "--metric", "--dry-run"], "leave out --metric"),
        (["publish", str(finished), "--repo-id", "org/x", "--space", "--dry-run"], "leave out --space"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_altered_weights_and_tokenizers_are_not_published(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run)
    tokenizer.add_tokens(["number"])
    tokenizer.save_pretrained(run)
    assert main(["publish", str(run), "--repo-id", "org/x", "--dry-run"]) == 2
    assert "tokenizer.json is not what the run has written" in capsys.readouterr().err


def test_documents_that_have_changed_are_noticed(finished, texts, tmp_path, capsys):
    path = texts / "3.txt"
    before = path.read_text()
    path.write_text(before.upper())
    try:
        assert main(["card", str(finished), "--output", str(tmp_path)]) == 2
    finally:
        path.write_text(before)
    assert "was trained and scored on other data" in capsys.readouterr().err


def test_a_run_starts_from_the_weights_of_another_and_keeps_a_tokenizer_of_its_own(finished, texts, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe = recipe_in(tmp_path, texts, task={"tokenizer": str(tmp_path / "tokenizer")})
    other = load_recipe(
        tmp_path / "tiny.yaml",
        {"model.model_name_or_path": str(finished), "trainer.max_steps": "3", "trainer.warmup_steps": "1"},
    )
    assert other.config.vocab_size == recipe.config.vocab_size == 257
    record = train(other, tmp_path / "run")
    assert record.metrics["test"]["bits_per_byte"] < 8
    assert (tmp_path / "run" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["hyla", "softmax", "linear", "c4-50m"])
def test_every_recipe_of_text_runs_dry(name, texts, tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    of_c4 = {
        "task.dataset_name": "null", "task.dataset_config_name": "null", "task.dataset_split": "train",
        "task.dataset_test_split": "null", "task.tokenizer": str(tmp_path / "gpt2"), "trainer.bf16": "false",
        "trainer.gradient_accumulation_steps": "1",
    }  # fmt: skip
    overrides = {
        "task.files": str(texts), "task.held_out": "0.3", "task.sequence_length": "16", "trainer.train_batch_size": "2",
        **{f"model.{key}": str(value) for key, value in SMALL.items()}, **(of_c4 if name == "c4-50m" else {}),
    }  # fmt: skip
    path = RECIPES / "text" / f"{name}.yaml"
    words = [word for key, value in overrides.items() for word in (f"--{key}", value)]
    assert main(["train", str(path), "--dry-run", *words]) == 0
    assert "estimated time" in capsys.readouterr().out
    assert path.read_text().startswith("# ") and f"`text/{name}.yaml`" in (RECIPES / "README.md").read_text()


def test_the_three_recipes_differ_in_the_attention_alone_and_have_equal_parameters():
    recipes = [load_recipe(RECIPES / "text" / f"{name}.yaml") for name in ("hyla", "softmax", "linear")]
    multiplied = {"attention_out_multiplier": 0.03125}
    assert [recipe.settings["model"] for recipe in recipes] == [
        {"attention_type": name, **more, "scale_logits": False}
        for name, more in (("hyla", multiplied), ("softmax", {}), ("linear", multiplied))
    ]
    assert all(recipe.settings["task"] == recipes[0].settings["task"] for recipe in recipes)
    assert all(recipe.trainer == recipes[0].trainer for recipe in recipes)
    with torch.device("meta"):
        sizes = {AutoModelForCausalLM.from_config(recipe.config).num_parameters() for recipe in recipes}
    assert sizes == {10_734_720}


def test_the_probe_of_python_names_the_kind_of_every_byte():
    module = runpy.run_path(str(RECIPES / "text" / "codes.py"))
    row = b"if iffy:\n    x = 'if' + \"a\" * 12.5  # if 1\n\n\ty()"
    expected = "kk nnnno iiiin o ssss o sss o dddd  cccccc  inoo"
    letters = dict(zip(module["KINDS"], "csdkni o", strict=True))
    found = "".join(letters[module["KINDS"][kind]] for kind in module["kinds_of"](row))
    assert found == expected


def test_the_probe_of_python_reads_codes_of_a_run(finished, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["codes.py", str(finished), "--json", str(tmp_path / "codes.json")])
    runpy.run_path(str(RECIPES / "text" / "codes.py"), run_name="__main__")
    scores = dict(
        re.findall(r"^(two bytes|layer 1|all layers) +(\d\.\d+) ±", capsys.readouterr().out, flags=re.MULTILINE)
    )
    assert scores.keys() == {"two bytes", "layer 1", "all layers"} and scores["layer 1"] == scores["all layers"]
    assert float(scores["two bytes"]) > 0.9  # numbers, names and spaces
    report = json.loads((tmp_path / "codes.json").read_text())
    assert report["weights"] == RunRecord.load(finished).digests["model.safetensors"]
    assert {source: f"{of['f1']['value']:.3f}" for source, of in report["scores"].items()} == scores
