"""Tests of the command line as users see it: results on standard output, one sentence and exit code 2 for bad input."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.cli import main
from hf_hyla.tasks import get_task


PROJECT = Path(__file__).parents[2]
TINY = {
    "task": {"name": "logic", "num_examples": 4},
    "model": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16},
    "trainer": {"max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 1, "weight_decay": 0.1, "eval_samples": 16},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def run(recipe) -> Path:
    output = recipe.parent / "run"
    assert main(["train", str(recipe), "--output", str(output)]) == 0
    return output


def test_train_prints_every_split_and_an_override_changes_the_model(recipe, run, capsys):
    output = recipe.parent / "softmax"
    assert (
        main(["train", str(recipe), "--output", str(output), "--model.attention_type", "softmax", "--trainer.seed=3"])
        == 0
    )
    printed = capsys.readouterr().out
    assert all(split in printed for split in ("test", "ood", "extrapolation"))
    record = json.loads((output / "run.json").read_text())
    assert record["recipe"]["model"]["attention_type"] == "softmax" and record["recipe"]["trainer"]["seed"] == 3


def test_a_dry_run_describes_the_run_and_writes_nothing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "--dry-run", "--trainer.max_steps", "4000"]) == 0
    printed = capsys.readouterr().out
    settings = yaml.safe_load(printed.partition("\n\n")[0])
    assert settings["trainer"]["max_steps"] == 4000 and settings["task"]["held_out"] == 0.5
    run = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in printed.partition("\n\n")[2].splitlines())
    assert run["steps"] == "4,000 of 128 samples" and run["training samples"] == "512,000"
    task = get_task("logic", num_examples=4)
    model = HylaForSequenceClassification(HylaConfig(**{**task.model_defaults, **TINY["model"]}))
    assert run["parameters"] == f"{model.num_parameters():,}"
    minutes, milliseconds = map(float, re.findall(r"[\d.]+", run["estimated time"]))
    assert minutes == pytest.approx(4000 * milliseconds / 60_000, abs=0.1) and milliseconds > 0
    assert 50 < float(re.match(r"[\d,]+", run["peak memory"]).group().replace(",", "")) < 50_000
    assert not list(tmp_path.iterdir())


def test_a_dry_run_measures_few_batches_of_a_step_that_accumulates_many(recipe, capsys):
    before = time.monotonic()
    assert main(["train", str(recipe), "--dry-run", "--trainer.gradient_accumulation_steps", "1000000"]) == 0
    assert "of 128,000,000 samples" in capsys.readouterr().out and time.monotonic() - before < 60


def test_evaluate_takes_the_task_from_the_run_or_from_the_command_line(run, capsys):
    assert main(["evaluate", str(run), "--split", "test", "--num-samples", "64", "--json"]) == 0
    from_run = json.loads(capsys.readouterr().out)
    assert from_run["task"]["num_examples"] == 4 and from_run["metrics"]["num_samples"] == 64
    (run / "run.json").rename(run / "away.json")
    try:
        arguments = ["evaluate", str(run), "--task", "logic", "--task.num_examples", "4", "--split", "test", "--json"]
        assert main([*arguments, "--num-samples", "64"]) == 0
        assert json.loads(capsys.readouterr().out)["metrics"] == from_run["metrics"]
        assert main(["evaluate", str(run)]) == 2
        assert "pass --task with one of logic" in capsys.readouterr().err
    finally:
        (run / "away.json").rename(run / "run.json")


def test_a_checkpoint_is_scored_on_the_task_of_its_run(run, tmp_path, monkeypatch, capsys):
    [checkpoint, *_] = sorted((run / "checkpoints").glob("checkpoint-*"))
    monkeypatch.chdir(checkpoint.parent)
    for name in (str(checkpoint), checkpoint.name):
        assert main(["evaluate", name, "--split", "test", "--num-samples", "64", "--json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["task"]["num_examples"] == 4 and "assumed" not in said.err
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / checkpoint.name)
    (tmp_path / "resolved_recipe.yaml").write_text("[1]")
    assert main(["evaluate", str(tmp_path / "checkpoints" / checkpoint.name)]) == 2
    assert "resolved_recipe.yaml is not a recipe" in capsys.readouterr().err


def test_a_published_run_is_scored_on_its_task(run, hub_here, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    assert main(["evaluate", str(run), "--split", "test", "--num-samples", "64", "--json"]) == 0
    of_folder = json.loads(capsys.readouterr().out)
    api = HfApi()
    api.create_repo("org/x")
    for name in ("config.json", "model.safetensors", "run.json"):
        api.upload_file(repo_id="org/x", path_or_fileobj=run / name, path_in_repo=name)
    assert main(["evaluate", "org/x", "--split", "test", "--num-samples", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == of_folder | {"model": "org/x"}
    probe = ["probe", "org/x", "--train-samples", "400", "--num-samples", "200", "--output", str(tmp_path / "probe")]
    assert main(probe) == 0
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["task"]["num_examples"] == 4


def test_a_record_that_cannot_be_fetched_is_not_taken_for_one_that_is_not_there(run, hub_here, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    api = HfApi()
    api.create_repo("org/bare")
    for name in ("config.json", "model.safetensors"):
        api.upload_file(repo_id="org/bare", path_or_fileobj=run / name, path_in_repo=name)
    command = [
        "evaluate",
        "org/bare",
        "--task",
        "logic",
        "--task.num_examples",
        "4",
        "--split",
        "test",
        "--num-samples",
        "16",
    ]
    assert main(command) == 0
    assert "org/bare has no run.json of the task logic, so these settings are assumed" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(command) == 2
    said = capsys.readouterr()
    assert "The run.json of org/bare, which says what the model was trained on, cannot be fetched" in said.err
    assert not said.out


def test_settings_of_a_task_that_are_assumed_are_printed(run, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, tmp_path)
    command = ["evaluate", str(tmp_path), "--task", "logic", "--split", "test", "--num-samples", "16", "--json"]
    assert main([*command, "--task.num_examples", "4"]) == 0
    said = capsys.readouterr()
    assert "has no run.json of the task logic, so these settings are assumed" in said.err
    task = json.loads(said.out)["task"]
    assert task.pop("name") == "logic"
    assert all(f"{name} {value}" in said.err for name, value in task.items()) and "seed 0" in said.err
    assert main(["evaluate", str(run), *command[2:]]) == 0
    assert "assumed" not in capsys.readouterr().err


def test_convert_writes_a_model_that_evaluate_scores(golden, tmp_path, capsys):
    case = ["--params", str(golden / "raven_params.safetensors"), "--config", str(golden / "raven_linear_hypatt.json")]
    assert main(["convert", *case, "--output", str(tmp_path / "model")]) == 0
    arguments = ["evaluate", str(tmp_path / "model"), "--task", "sraven", "--num-samples", "32", "--json"]
    assert main(arguments) == 0
    assert "accuracy" in json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]


def test_data_writes_a_folder_and_prints_its_content(tmp_path, capsys):
    arguments = ["data", "logic", "--split", "test", "ood", "--num-examples", "20", "--task.num_examples", "3"]
    assert main([*arguments, "--output", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    assert "ood: 20 examples" in printed and "Fingerprint sha256:" in printed
    assert json.loads((tmp_path / "data" / "task.json").read_text())["task"]["num_examples"] == 3
    arguments[arguments.index("20")] = "30"
    assert main([*arguments, "--output", str(tmp_path / "data")]) == 2
    assert "already holds the split test with 20 examples, but 30 were requested" in capsys.readouterr().err


def test_ceiling_prints_and_records_the_ideal_observers_scores(tmp_path, capsys):
    output = tmp_path / "results" / "record.json"
    assert main(["ceiling", "--num-samples", "50", "--task.num_features", "2", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    printed = capsys.readouterr().out
    for split in ("test", "ood"):
        assert f"{split}: accuracy {record['splits'][split]['accuracy']:.4f}" in printed
    assert record["task"]["num_features"] == 2 and "git_commit" in record["environment"]


def test_env_prints_json(capsys):
    assert main(["env"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)["environment"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no-such.yaml"], "no-such.yaml"),
        (["train", "{recipe}", "--model.atention_type", "hyla"], "did you mean --model.attention_type?"),
        (["train", "{recipe}", "--model.attention_type"], "lacks a value"),
        (["train", "{recipe}", "--modle.x", "1"], "Unknown argument '--modle.x'"),
        (["train", "{recipe}", "--overwrit"], "Unknown argument '--overwrit'"),
        (["train", "{recipe}", "--task.held_out", "0.99"], "must occur in training"),
        (["train", "{recipe}", "--output", "{run}"], "holds a finished run"),
        (["train", "{recipe}", "--max-minutes", "0"], "--max-minutes must be larger than 0"),
        (
            ["train", "{recipe}", "--output", "{run}", "--trainer.report_to", "clearml"],
            "clearml, which is not installed",
        ),
        (["train", "{recipe}", "--dry-run", "--task.data", "{run}-2"], "holds no data of a task"),
        (["train", "{recipe}", "--dry-run", "--trainer.report_to", "clearml"], "clearml, which is not installed"),
        (["evaluate", "{run}-2", "--task", "logic"], "There is no run or model {run}-2"),
        (["evaluate", "{run}/checkpoints"], "checkpoints holds no model: expected a folder with config.json"),
        (["evaluate", "{run}", "--split", "odd"], "has no split 'odd'"),
        (["evaluate", "{run}", "--task", "sraven"], "does not fit the task sraven"),
        (["evaluate", "{recipe.parent}", "--task", "logic"], "holds no model"),
        (["evaluate", "{run}", "--task.num_examples", "["], "is not valid YAML"),
        (["evaluate", ""], "The argument after 'evaluate' is empty"),
        (["evaluate", "{run}/model.safetensors"], "model.safetensors is a file (did you mean {run}?)"),
        (["card", "{run}", "--output", "{recipe}"], "tiny.yaml cannot be used (File exists): choose another path"),
        (["compare", "{run}", " "], "is empty: give it a value or leave it out"),
        (["train", "{recipe}", "--output="], "The argument after '--output' is empty"),
        (["train", "{recipe}", "--trainer.run_name", "--dry-run"], "--trainer.run_name lacks a value"),
        (["train", "{recipe}", "--model.hidden-size", "8"], "did you mean --model.hidden_size?"),
        (["train", "{recipe}", "--model.HIDDEN_SIZE", "8"], "did you mean --model.hidden_size?"),
        (["train", "{recipe}", "--trainer.ddp_backend", "gloe"], "trainer.ddp_backend must be one of nccl, gloo"),
        (["train", "{recipe}", "--trainer.torch_compile_backend", "x"], "torch_compile_backend must be one of"),
        (["train", "{recipe}", "--trainer.dataloader_persistent_workers", "true"], "needs trainer.dataloader_num_w"),
        (["train", "."], ". is a folder: expected the YAML file of a recipe"),
        (["train", "figures/logic-muon"], "logic-muon.yaml is a sweep: give it to `hyla sweep`"),
        (["sweep", "{recipe}"], "is a recipe: give it to `hyla train`"),
        (["evaluate", "{run}", "--num-samples", "9" * 20], "--num-samples must be at most 1000000000, got 9999"),
        (["evaluate", "{run}", "--num-samples", "9" * 5000], "--num-samples must be an integer of at least 1"),
        (["evaluate", "{run}", "--task.name", "sraven"], "--task.name is a setting of recipes"),
        (["data", "logic", "--task.name", "sraven", "--output", "{run}-2"], "--task.name is a setting of recipes"),
        (["ceiling", "--task.name", "logic"], "--task.name is a setting of recipes"),
        (["ceiling", "--num-samples", "1", "--output", "{run}"], "--output must name a file, but {run} is a folder"),
        (["bench", "--against", "HEAD", "--lengths", "8"], "--against, which has workloads of its own: leave it out"),
        (["bench", "--threads", "100000000"], "--threads must be at most 1024"),
        (["train", "{recipe}", "--task.seed", ""], "The argument after '--task.seed' is empty"),
        (["env", "--task.num_examples", "4"], "Unknown argument '--task.num_examples'"),
        (["evaluate", "{run}", "--num-samples", "0"], "--num-samples must be an integer of at least 1, got 0"),
        (["data", "ravens", "--output", "{run}"], "did you mean 'sraven'?"),
        (["data", "sraven", "--split", "odd", "--output", "{run}"], "has no split 'odd'"),
        (
            ["data", "sraven", "--num-examples", "0", "--output", "{run}"],
            "--num-examples must be an integer of at least 1",
        ),
        (["data", "sraven", "--num-examples", "1", "--output", "{run}"], "is not empty and holds no data"),
        (["ceiling", "--num-samples", "0"], "--num-samples must be an integer of at least 1"),
        (["train", "{recipe}", "--task.data", "{run}", "--output", "{run}-2"], "holds no data of a task"),
        (
            ["convert", "--params", "{recipe}", "--config", "b", "--output", "c"],
            "There is no file with the official config b",
        ),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(recipe, run, capsys, arguments, message):
    assert main([argument.format(recipe=recipe, run=run) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hyla: ") and message.format(run=run) in error


@pytest.mark.parametrize("command", ["ceiling", "data", "evaluate", "probe"])
def test_the_help_of_a_command_that_takes_settings_of_the_task_says_so(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "given like --task.num_" in " ".join(capsys.readouterr().out.split())


def test_a_full_disk_is_called_so_and_costs_no_later_run(monkeypatch, tmp_path, capsys):
    def fill(source, target):
        Path(target).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    copy = ["recipes", "logic/demo", "--output", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", fill)
        assert main(copy) == 2
    assert re.search(r"no space left for .*demo\.yaml\S*: free some", capsys.readouterr().err)
    assert (
        main(copy) == 0
        and (tmp_path / "logic" / "demo.yaml").read_bytes()
        == (PROJECT / "recipes" / "logic" / "demo.yaml").read_bytes()
    )


def test_a_terminal_without_a_sign_shows_a_question_mark_and_the_result(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    assert main(["compare", str(PROJECT / "recipes" / "results" / "logic-linear")]) == 0
    assert b"mean ? se" in printed.getvalue() and b"0.6868 (1)" in printed.getvalue()


def test_a_path_at_home_is_found_behind_an_equals_sign_too(recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(recipe.parent))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "sraven", "--num-examples", "1", "--output=~/run"]) == 2
    assert f"{recipe.parent / 'run'} is not empty" in capsys.readouterr().err
    assert main(["compare", "~/run"]) == 0 and not list(tmp_path.iterdir())


def test_weights_that_miss_a_layer_are_refused(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    tensors = load_file(run / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "q_proj" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert main(["evaluate", str(tmp_path), "--task", "logic", "--task.num_examples", "4"]) == 2
    assert "lacks weights, model.layers.0.self_attn.q_proj.bias" in capsys.readouterr().err


def test_damaged_weights_are_refused(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:500])
    assert main(["evaluate", str(tmp_path), "--task", "logic"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_a_model_of_another_family_is_refused(tmp_path, capsys):
    BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    assert main(["evaluate", str(tmp_path), "--task", "sraven"]) == 2
    assert "does not fit the task sraven: its answer_token_id is None" in capsys.readouterr().err


def test_a_folder_without_weights_is_refused(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert main(["evaluate", str(tmp_path), "--task", "logic"]) == 2
    assert "holds no weights" in capsys.readouterr().err


def test_a_recipe_may_be_named_without_its_suffix_and_folder(recipe, monkeypatch, tmp_path, capsys):
    assert main(["train", str(recipe.with_suffix("")), "--dry-run"]) == 0
    monkeypatch.chdir(tmp_path)
    small = ["--model.num_hidden_layers=1", "--model.hidden_size=16", "--task.num_examples=4"]
    assert main(["train", "logic/demo", "--dry-run", *small]) == 0
    assert "training samples     512,000" in capsys.readouterr().out


def test_records_that_come_with_the_package_are_compared_from_anywhere(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "recipes/results"]) == 0
    assert "logic-hyla" in capsys.readouterr().out


def test_a_quick_run_fits_the_schedule_and_scores_few_samples(recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    warm = tmp_path / "warm.yaml"
    warm.write_text(yaml.safe_dump({**TINY, "trainer": {**TINY["trainer"], "max_steps": 5000, "warmup_steps": 1000}}))
    assert main(["train", str(warm), "--trainer.max_steps", "10"]) == 2
    said = capsys.readouterr().err
    assert "got 10 and 1000" in said and "warmup_steps to 4 or less" in said and "--quick" in said
    assert main(["train", str(warm), "--quick", "--trainer.max_steps", "20", "--trainer.seed", "3"]) == 0
    [run] = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    assert "-quick" in run.name and record["steps"] == 20 and record["samples_seen"] == 20 * 128
    assert record["recipe"]["trainer"]["warmup_steps"] == 2 and record["recipe"]["trainer"]["seed"] == 3
    assert {scores["num_samples"] for scores in record["metrics"].values()} == {1024}
    assert main(["train", str(warm), "--quick", "--trainer.max_steps", "2_000", "--dry-run"]) == 0
    assert "warmup_steps: 200" in capsys.readouterr().out
    assert main(["train", str(warm), "--quick", "--dry-run"]) == 0
    assert "steps                100 of 128 samples" in capsys.readouterr().out


def test_a_quick_run_is_published_only_on_request(recipe, monkeypatch, tmp_path, capsys):
    published = []
    monkeypatch.setattr("hf_hyla.hub.publish.publish_run", lambda *run: published.append(run) or "published")
    monkeypatch.setattr("hf_hyla.hub.publish.environment", lambda: {"git_commit": None})
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    trainer = {**TINY["trainer"], "push_to_hub": True, "hub_model_id": "org/real"}
    (tmp_path / "push.yaml").write_text(yaml.safe_dump({**TINY, "trainer": trainer}))
    command = ["train", str(tmp_path / "push.yaml"), "--quick", "--trainer.max_steps", "4", "--output"]
    assert main([*command, str(tmp_path / "quick")]) == 0 and published == []
    assert main([*command, str(tmp_path / "pushed"), "--trainer.push_to_hub", "true"]) == 0
    assert published == [(tmp_path / "pushed", "org/real", None)]
    capsys.readouterr()
    assert main(["train", str(recipe), "--quick", "--dry-run"]) == 0
    assert "push_to_hub" not in capsys.readouterr().out  # only where the recipe has it


def test_a_run_whose_settings_give_no_repository_name_trains_and_gets_a_card(
    recipe, run, monkeypatch, tmp_path, capsys
):
    assert main(["train", str(recipe), "--dry-run", "--task.seed", "-1"]) == 0
    monkeypatch.chdir(tmp_path)
    changed = {"num_variables": 3, "num_terms": 2, "num_examples": 5, "held_out": 0.25, "seed": -1}
    words = [f"--task.{name}={value}" for name, value in changed.items()]
    words += ["--trainer.learning_rate=0.00123456789", "--trainer.weight_decay=0.0123456789", "--model.norm_eps=1e-6"]
    assert (
        main(["train", str(recipe), *words, "--trainer.adam_epsilon=0.0000000123", "--trainer.adam_beta2=0.98"]) == 0
    )
    [folder] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r".*-tiny-[0-9a-f]{8}", folder.name)
    assert main(["card", str(folder), "--repo-id", "org/name"]) == 0
    assert re.search(r"\borg/logic-[0-9a-f]{8}\b", (folder / "README.md").read_text())


def test_recipes_are_listed_and_copied_and_nothing_is_overwritten(monkeypatch, tmp_path, capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^logic/demo.yaml +Two CPU cores", listed, re.MULTILINE) and "accelerate/ddp_cpu.yaml" in listed
    assert main(["recipes", "recipes/logic"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < len(listed.splitlines())
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "--output", "recipes"]) == 0
    assert Path("recipes/accelerate/ddp_cpu.yaml").exists() and list(Path("recipes/results").rglob("0.json"))
    assert main(["recipes", "logic/demo", "--output", "recipes"]) == 0
    Path("recipes/logic/demo.yaml").write_text("mine")
    assert main(["recipes", "logic/demo", "--output", "recipes"]) == 2
    assert "has been changed" in capsys.readouterr().err and Path("recipes/logic/demo.yaml").read_text() == "mine"
    assert main(["recipes", str(tmp_path / "recipes" / "logic")]) == 2
    assert "does not come with the package" in capsys.readouterr().err


def test_an_installed_package_finds_its_recipes_from_anywhere(tmp_path):
    # As the wheel has it, recipes inside.
    package = tmp_path / "site" / "hf_hyla"
    shutil.copytree(PROJECT / "hf_hyla", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "recipes", package / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    (here := tmp_path / "here").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    asked = {
        "accelerate/ddp_cpu.yaml": ["recipes"],
        "logic-hyla": ["compare", "recipes/results"],
        "runs of logic/hyla.yaml": ["sweep", "recipes/figures/logic-held-out.yaml", "--dry-run"],
        "Copied": ["recipes", "accelerate", "--output", "recipes"],
    }
    script = f"from hf_hyla.cli import main\nfor words in {list(asked.values())}: print('exit code', main(words))"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=here, env=environment)
    *printed, rest = result.stdout.split("exit code 0\n")
    assert (result.returncode, rest) == (0, ""), result.stderr
    assert all(shown in text for shown, text in zip(asked, printed, strict=True))
    assert (here / "recipes" / "accelerate" / "ddp_cpu.yaml").exists()


def test_a_closed_pipe_ends_the_command_silently():
    command = [sys.executable, "-m", "hf_hyla", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 141


def test_the_installed_command_and_the_module_answer():
    for command in ([sys.executable, "-m", "hf_hyla"], [str(Path(sys.executable).parent / "hyla")]):
        result = subprocess.run([*command, "train", "missing.yaml"], capture_output=True, text=True, timeout=120)
        assert result.returncode == 2 and "Traceback" not in result.stderr and "missing.yaml" in result.stderr
