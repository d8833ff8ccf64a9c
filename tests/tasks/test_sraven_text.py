"""SRAVEN as text: prompts hold the puzzle and nothing of its answer, and lm-evaluation-harness scores a model by them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import load_dataset

from hf_hyla.cli import main
from hf_hyla.tasks import get_task
from hf_hyla.tasks.data import FolderDataset, Manifest
from hf_hyla.tasks.sraven.ceiling import observe
from hf_hyla.tasks.sraven.text import instruction


TASK = get_task("sraven", num_features=3)
LM_EVAL = Path(__file__).parents[2] / "recipes" / "lm_eval"
COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "data" / "sraven-text"
    words = ["data", "sraven", "--format", "text", "--task.num_features", "3", "--num-examples", str(COUNT)]
    assert main([*words, "--split", "train", "ood", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory) -> list[dict]:
    return load_dataset(str(folder), split="ood", cache_dir=str(tmp_path_factory.mktemp("cache"))).to_list()


def puzzle(row: dict) -> str:
    panels = [" ".join(map(str, panel)) for panel in row["panels"]] + ["?"]
    return "\n".join(" | ".join(panels[i : i + 3]) for i in (0, 3, 6)) + "\nAnswer:"


def test_a_prompt_is_the_instruction_and_the_puzzle_without_its_answer(rows):
    assert len(rows) == COUNT
    for row in rows:
        assert row["prompt"] == f"{instruction(TASK.num_features, TASK.num_values, TASK.permute)}\n{puzzle(row)}"
        assert row["answer_text"] == " ".join(map(str, row["answer"]))
    text = instruction(TASK.num_features, TASK.num_values, TASK.permute)
    assert "3 numbers from 0 to 7" in text and "After 7 comes 0" in text and "distribute three" in text
    assert "an order of its own" in text
    assert "an order of its own" not in instruction(4, 8, permute=False)


def test_worked_examples_are_solved_puzzles_of_train(rows):
    for index, row in enumerate(rows):
        _, *worked, asked = row["prompt_with_examples"].split("\n\n")
        assert asked == puzzle(row) and len(worked) == 3
        shown = TASK.samples("train", np.arange(3) + 3 * index + 2)
        for text, ids, label in zip(worked, shown["input_ids"], shown["labels"], strict=True):
            panels = {"panels": ids[:-3].reshape(8, 3).tolist()}
            assert text.strip() == f"{puzzle(panels)} {' '.join(map(str, label))}"


def test_the_ideal_observer_is_that_of_hyla_ceiling(rows):
    right = [row["observer_right"] for row in rows]
    assert np.mean(right) == observe(TASK, "ood", COUNT)["accuracy"]
    assert 0 < sum(right) < COUNT or all(row["observer_right"] or row["ambiguous_strict"] for row in rows)


def test_such_a_folder_still_holds_the_samples_of_training(folder):
    read, drawn = FolderDataset(folder, TASK, "train", COUNT), TASK.dataset("train", COUNT)
    for name, column in drawn[3].items():
        np.testing.assert_array_equal(read[3][name], column)
    assert Manifest.load(folder).splits["ood"]["means"].keys() >= {"ambiguous_strict", "observer_right"}


def test_formats_are_not_mixed_and_a_task_without_text_is_refused(folder, tmp_path, capsys):
    words = ["data", "sraven", "--task.num_features", "3", "--num-examples", "4", "--split", "test"]
    assert main([*words, "--output", str(folder)]) == 2
    assert "was written with --format text" in capsys.readouterr().err
    assert main(["data", "logic", "--format", "text", "--output", str(tmp_path / "logic")]) == 2
    assert (
        "The task logic cannot be written as text, since it has no text_features: leave out --format text"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "logic").exists()
    assert main([*words, "--format", "txt", "--output", str(tmp_path)]) == 2
    assert "did you mean 'text'?" in capsys.readouterr().err


def test_the_card_shows_both_ways_to_use_the_folder(folder):
    card = (folder / "README.md").read_text()
    assert "## For language models" in card and "`prompt_with_examples` | text" in card
    assert "--format text --output folder" in card and "`task.data` of a recipe" in card


@pytest.fixture(scope="module")
def scores():
    spec = importlib.util.spec_from_file_location("scores", LM_EVAL / "scores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.process_results


@pytest.mark.parametrize(
    ("answer", "solved", "features"),
    [
        (" 3 0 7", 1, 1), ("3 0 7\nRow", 1, 1), (" 3, 0, 7.", 1, 1), (" 3 0 1", 0, 2 / 3), (" 0 3 7", 0, 1 / 3),
        ("", 0, 0), (" none", 0, 0), ("\n\n 3 0 7 because", 1, 1), (" 3", 0, 1 / 3), (" 30 7", 0, 0), (" 3 0 7 5", 1, 1),
    ],
)  # fmt: skip
def test_an_answer_counts_only_if_every_number_is_right(scores, answer, solved, features):
    doc = {"answer_text": "3 0 7", "ambiguous_strict": False, "observer_right": True}
    found = scores(doc, [answer])
    assert found == {
        "accuracy": solved, "accuracy_unique": solved, "ideal_observer": 1, "feature_accuracy": pytest.approx(features)
    }  # fmt: skip
    assert "accuracy_unique" not in scores(doc | {"ambiguous_strict": True}, [answer])


def test_the_task_files_name_columns_that_are_there(rows):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.load((LM_EVAL / "sraven.yaml").read_text(), Loader)  # noqa: S506  a SafeLoader
    other = yaml.load((LM_EVAL / "sraven_examples.yaml").read_text(), Loader)  # noqa: S506
    assert other["include"] == "sraven.yaml" and {task["doc_to_text"], other["doc_to_text"]} <= rows[0].keys()
    assert re.findall(r"\{\{(\w+)\}\}", task["doc_to_target"]) == ["answer_text"]
    assert task["process_results"] == "scores.process_results"
    assert {one["metric"] for one in task["metric_list"]} == {
        "accuracy", "feature_accuracy", "accuracy_unique", "ideal_observer"
    }  # fmt: skip


# Scores a tiny model with random weights, without network.
HARNESS = """
import json, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

characters = [chr(i) for i in range(32, 127)] + ["\\n", "<end>"]
raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
model = GPT2LMHeadModel(GPT2Config(vocab_size=len(characters), n_positions=2048, n_embd=16, n_layer=1, n_head=2))
found = lm_eval.simple_evaluate(
    model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=2048, device="cpu"),
    tasks=["sraven", "sraven_examples"], task_manager=TaskManager(include_path=sys.argv[1], include_defaults=False),
    limit=6, bootstrap_iters=0, log_samples=True,
)
shown = {name: samples[0]["arguments"][0][0] for name, samples in found["samples"].items()}
print("FOUND", json.dumps([found["results"], shown]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install lm_eval"
)
def test_the_harness_scores_a_model(folder, rows, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", HARNESS, str(LM_EVAL)],
        cwd=folder.parents[1], env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found, shown = json.loads(result.stdout.rpartition("FOUND ")[2])
    assert shown["sraven"].startswith(rows[0]["prompt"][:200])
    assert shown["sraven_examples"].startswith(rows[0]["prompt_with_examples"][:200])
    for scores in found.values():
        assert scores["ideal_observer,none"] == pytest.approx(np.mean([row["observer_right"] for row in rows[:6]]))
        assert scores["accuracy,none"] == 0 and "accuracy_unique,none" in scores
