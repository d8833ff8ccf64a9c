"""Tests of whole runs of a few steps: their files, how they resume, and their refusals."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock, patch

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from hf_hyla.cli import main
from hf_hyla.tasks import get_task
from hf_hyla.training import HylaTrainer, RunRecord, evaluate, load_recipe, train
from hf_hyla.training.checkpoint import claimed, seal
from hf_hyla.training.run import _curve, check_before_start


SECTIONS = {
    "task": {"name": "logic", "num_examples": 4},
    "model": {"attention_type": "hyla", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16},
    "trainer": {
        "max_steps": 8, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "train_batch_size": 4,
        "eval_steps": 4, "save_steps": 4, "logging_steps": 2, "eval_samples": 16, "disable_tqdm": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_splits():
    with pytest.MonkeyPatch.context() as patch:
        sizes = property(lambda self: dict.fromkeys(self.splits, 64))
        patch.setattr(type(get_task("logic")), "num_samples", sizes)
        patch.setattr(type(get_task("sraven")), "num_samples", sizes)
        yield


def recipe_in(folder, **changes):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({name: {**section, **changes.get(name, {})} for name, section in SECTIONS.items()}))
    return load_recipe(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(recipe_in(folder), folder / "run")
    return folder / "run"


def test_a_run_writes_weights_code_recipe_and_record_but_no_pickle(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "modeling_hyla.py",
        "resolved_recipe.yaml",
        "run.json",
        "checkpoints",
    }
    assert not [path for path in finished.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_record_holds_the_recipe_and_the_scores(finished):
    record = RunRecord.load(finished)
    assert record.recipe["task"]["held_out"] == 0.5 and record.recipe["trainer"]["learning_rate"] == 1e-2
    assert (record.steps, record.samples_seen) == (8, 32)
    assert record.seeds == {"task": 0, "trainer": 0}
    assert set(record.metrics) == {"test", "ood", "extrapolation"}
    assert set(record.metrics["ood"]) == {"loss", "r2", "num_samples"} and record.metrics["ood"]["num_samples"] == 64
    assert [point["step"] for point in record.curve if "loss" in point] == [2, 4, 6, 8]
    assert [point["step"] for point in record.curve if "ood/r2" in point] == [4, 8]
    assert record.seconds >= record.curve[-1]["seconds"] > 0
    assert record.environment["torch"] == torch.__version__
    text = (finished / "run.json").read_text()
    assert str(finished.parent) not in text  # no path of the machine


def test_saved_weights_reach_the_scores_in_the_record(finished):
    model = AutoModelForSequenceClassification.from_pretrained(finished)
    task = get_task("logic", num_examples=4)
    for split, scores in RunRecord.load(finished).metrics.items():
        assert evaluate(model, task, split)["r2"] == pytest.approx(scores["r2"], abs=1e-6)


def test_the_same_recipe_gives_the_same_weights(finished, tmp_path):
    train(recipe_in(tmp_path), tmp_path / "run")
    first, second = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_compiled_model_reaches_the_scores_of_a_plain_one(finished, tmp_path):
    # By a backend that needs no C++ compiler. Arguments that ask for it say so in the environment.
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    with patch.dict(os.environ):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        record = train(recipe_in(tmp_path, trainer=compiled), tmp_path / "run")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    whole = RunRecord.load(finished)
    assert record.metrics["ood"]["r2"] == pytest.approx(whole.metrics["ood"]["r2"], abs=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "run"))
    assert before.keys() == after.keys()


def test_an_interrupted_run_resumes_to_the_same_result(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("run.json", "model.safetensors", "checkpoints/checkpoint-8/trainer_state.json"):
        (run / name).unlink()  # as if it had been killed while it wrote the checkpoint of step 8
    record = train(recipe_in(tmp_path), run)
    before, after = (load_file(folder / "model.safetensors") for folder in (finished, run))
    assert all(torch.equal(before[name], after[name]) for name in before)
    whole = RunRecord.load(finished)
    assert record.metrics == whole.metrics
    assert [(p["step"], p.get("loss"), p.get("ood/r2")) for p in record.curve] == [
        (p["step"], p.get("loss"), p.get("ood/r2")) for p in whole.curve
    ]
    assert record.seconds > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "holds a finished run"),
        (
            {"trainer": {"learning_rate": 5e-3}},
            "holds a run of another recipe, which differs in trainer.learning_rate:",
        ),
    ],
)
def test_a_run_is_not_overwritten_unless_asked(finished, tmp_path, changes, message):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=message):
        train(recipe_in(tmp_path, **changes), run)
    assert json.loads((run / "run.json").read_text()) == json.loads((finished / "run.json").read_text())
    record = train(recipe_in(tmp_path, trainer={"max_steps": 6, "learning_rate": 5e-3}), run, overwrite=True)
    assert record.steps == 6
    assert (run / "notes.txt").read_text() == "mine"


def test_overwriting_keeps_the_run_until_the_new_one_can_start(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    theirs = {run / "notes.txt", run / "probe/notes.txt", run / ".eval_results/notes.txt"}
    ours = ("README.md", "comparison.png", ".eval_results/logic.yaml", "probe/probe.json", "probe/scores.png")
    for name in (*ours, *theirs):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("of the run before")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    again = recipe_in(tmp_path, trainer={"max_steps": 6})
    for refuses in ("hf_hyla.training.run.initial_model", "hf_hyla.training.run.HylaTrainer"):
        with monkeypatch.context() as patched:
            patched.setattr(refuses, Mock(side_effect=ValueError("cannot be built")))
            with pytest.raises(ValueError, match="cannot be built"):
                train(again, run, overwrite=True)
        assert {path: path.read_bytes() for path in before} == before
    assert train(again, run, overwrite=True).steps == 6
    left = {path for path in run.rglob("*") if path.is_file() and path.read_bytes() == b"of the run before"}
    assert left == theirs


def test_overwriting_leaves_no_checkpoint_behind_a_link_and_says_what_cannot_be_removed(
    finished, tmp_path, monkeypatch
):
    run, disk = tmp_path / "run", tmp_path / "disk"
    shutil.copytree(finished, run)
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    (disk / "damaged-checkpoint-4").mkdir()
    again = recipe_in(tmp_path, trainer={"max_steps": 6})
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", Mock(side_effect=PermissionError(13, "Permission denied")))
        with pytest.raises(OSError, match=r"run cannot be removed whole \(Permission denied\): remove it, or choose"):
            train(again, run, overwrite=True)
    monkeypatch.setattr(HylaTrainer, "train", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(again, run, overwrite=True)
    assert (run / "checkpoints").is_symlink() and not list(disk.glob("*checkpoint*"))


def test_a_picture_that_cannot_be_drawn_costs_no_record(tmp_path, monkeypatch, capsys):
    recipe = recipe_in(tmp_path)
    recipe.name = r"cost$\alph$"  # which matplotlib would read as mathematics
    train(recipe, tmp_path / "run")
    assert (tmp_path / "run/learning_curve.png").stat().st_size > 1000
    monkeypatch.setattr("hf_hyla.training.run.learning_curve", Mock(side_effect=ValueError("no font")))
    train(recipe, tmp_path / "other")
    assert "learning_curve.png could not be drawn (no font): `hyla card" in capsys.readouterr().err
    assert RunRecord.load(tmp_path / "other").name == recipe.name


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("wandbb", "trainer.report_to must be one of .*got 'wandbb' .did you mean 'wandb'"),
        (["none", "none"], "is a list with 'all' or 'none' in it: write that word alone"),
        ("swanlab", "trainer.report_to names swanlab, which is not installed"),
    ],
)
def test_trackers_are_refused_before_the_run(tmp_path, report_to, message):
    with pytest.raises(ValueError, match=message):
        train(recipe_in(tmp_path, trainer={"report_to": report_to}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("report_to", [None, [], ["none"]])
def test_no_tracker_may_be_written_in_several_ways(tmp_path, report_to):
    recipe = recipe_in(tmp_path, trainer={"report_to": report_to})
    check_before_start(recipe)
    assert not recipe.training_arguments(tmp_path).report_to or not get_reporting_integration_callbacks(
        recipe.training_arguments(tmp_path).report_to
    )


def test_a_run_that_saves_and_logs_nothing_on_the_way_has_its_last_step_saved_and_its_time_recorded(tmp_path):
    quiet = {"save_strategy": "no", "eval_strategy": "no", "logging_steps": 200}
    record = train(recipe_in(tmp_path, trainer=quiet), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-8"]
    assert record.seconds > 0 and not [point for point in record.curve if "loss" in point]


def test_the_record_names_the_commit_that_the_run_began_with(tmp_path, monkeypatch):
    commits = iter(["0" * 40, "1" * 40])
    monkeypatch.setattr("hf_hyla.runs.environment._git_commit", lambda: next(commits))
    trains = HylaTrainer.train

    def while_somebody_commits(self, *args, **kwargs):
        trains(self, *args, **kwargs)
        next(commits)

    monkeypatch.setattr(HylaTrainer, "train", while_somebody_commits)
    assert train(recipe_in(tmp_path), tmp_path / "run").environment["git_commit"] == "0" * 40


def test_the_curve_tells_splits_apart_whose_names_begin_alike():
    entry = {
        "step": 4,
        "seconds": 1.0,
        "eval_ood_accuracy": 0.5,
        "eval_ood_far_accuracy": 0.25,
        "eval_ood_runtime": 9.0,
    }
    [point] = _curve([entry], ["ood", "ood_far"])
    assert point == {"step": 4, "seconds": 1.0, "ood/accuracy": 0.5, "ood_far/accuracy": 0.25}


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "recipe.yaml").write_text("mine too")
    with pytest.raises(FileExistsError, match="not empty and holds no run"):
        train(recipe_in(tmp_path / "recipe"), tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", [["--dry-run"], ["--output", "{folder}/run"]], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trainer.fp16": "true"},
            "trainer.fp16 needs a GPU, since accelerate would silently train in float32 on a CPU: write 'bf16: true', or leave",
        ),
        (
            {"trainer.cuda_graphs": "true"},
            "trainer.cuda_graphs needs an NVIDIA GPU, and this run would be on another device",
        ),
        (
            {"trainer.cuda_graphs": "true", "model.ffn_type": "moe", "model.output_router_logits": "true"},
            "cuda_graphs cannot record the load-balancing loss of a mixture of experts",
        ),
    ],
    ids=["fp16", "CUDA graphs", "CUDA graphs of experts"],
)
def test_what_a_machine_cannot_do_is_refused_before_anything_is_written(tmp_path, capsys, command, settings, message):
    recipe_in(tmp_path)
    command = [part.format(folder=tmp_path) for part in command]
    overrides = [part for name, value in settings.items() for part in (f"--{name}", value)]
    assert main(["train", str(tmp_path / "tiny.yaml"), *command, *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sraven_trains_and_scores_too(tmp_path):
    recipe = recipe_in(tmp_path)
    sections = {**SECTIONS, "task": {"name": "sraven", "num_features": 2}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sections))
    recipe = load_recipe(tmp_path / "tiny.yaml")
    record = train(recipe, tmp_path / "run")
    assert set(record.metrics) == {"test", "ood"}
    assert 0 <= record.metrics["ood"]["accuracy"] <= record.metrics["ood"]["feature_accuracy"] <= 1


def test_a_record_is_valid_json_even_if_no_puzzle_is_unique(tmp_path):
    recipe_in(tmp_path)
    sections = {**SECTIONS, "task": {"name": "sraven", "num_features": 8, "num_values": 3}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sections))
    assert main(["train", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)  # called for NaN
    assert "accuracy" in record["metrics"]["ood"] and "accuracy_unique" not in record["metrics"]["ood"]


def test_a_model_that_does_not_fit_the_task_is_refused(finished):
    model = AutoModelForSequenceClassification.from_pretrained(finished)
    with pytest.raises(ValueError, match="does not fit the task sraven: its vocab_size is None"):
        evaluate(model, get_task("sraven"), "ood")
    with pytest.raises(ValueError, match="input_size is 5"):
        evaluate(model, get_task("logic", num_variables=3), "ood")


@pytest.mark.parametrize("asked", [None, "tensorboard"])
def test_no_tracker_is_on_unless_the_recipe_names_it(tmp_path, monkeypatch, asked):
    # Whatever is installed: transformers looks for trackers where a recipe asks for all.
    monkeypatch.setattr(
        "transformers.training_args.get_available_reporting_integrations", lambda: ["trackio"], raising=False
    )
    args = recipe_in(tmp_path, trainer={"report_to": asked} if asked else {}).training_arguments(tmp_path / "run")
    assert args.report_to == ([asked] if asked else [])
    assert args.run_name == str(tmp_path / "run")


def test_the_samples_of_accumulated_batches_are_counted(tmp_path):
    recipe = recipe_in(tmp_path, trainer={"gradient_accumulation_steps": 3, "max_steps": 4, "warmup_steps": 1})
    record = train(recipe, tmp_path / "run")
    assert record.samples_seen == recipe.num_training_samples == 4 * 3 * 4


def test_the_record_includes_the_seconds_before_a_resume(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoints/checkpoint-8")
    state = run / "checkpoints/checkpoint-4/resume_state_000.pt"
    torch.save(torch.load(state, weights_only=True) | {"seconds": 1000.0}, state)
    seal(run / "checkpoints/checkpoint-4")
    assert 1000 < train(recipe_in(tmp_path), run).seconds < 1100


def test_a_resume_with_another_number_of_threads_is_reported(finished, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoints/checkpoint-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train(recipe_in(tmp_path), run)
    finally:
        torch.set_num_threads(threads)
    said = f"Resumes from checkpoint-4, which was written with {threads} thread{'s' * (threads > 1)}, while this run has {threads + 1}: "
    assert said + "the result will be equal up to rounding" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", '{"name": 3}'])
def test_a_run_with_a_damaged_record_is_not_finished(finished, tmp_path, content):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "run.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"run.json is not a run record .* or remove that file to resume the run from its checkpoints"
    ):
        train(recipe_in(tmp_path), run)
    (run / "run.json").unlink()
    assert train(recipe_in(tmp_path), run).metrics == RunRecord.load(finished).metrics


def test_two_threads_do_not_train_in_one_folder(tmp_path):
    with ThreadPoolExecutor(1) as pool, claimed(tmp_path):
        asked = pool.submit(lambda: claimed(tmp_path).__enter__())
        assert isinstance(asked.exception(), FileExistsError)
        assert "This process already trains in" in str(asked.exception())
    with claimed(tmp_path):
        pass


@pytest.mark.parametrize("how", [[], ["--json"], ["--by-combination"]])
def test_a_model_whose_answers_are_not_finite_has_no_score(finished, tmp_path, capsys, how):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    weights = load_file(run / "model.safetensors")
    weights["classifier.bias"].fill_(float("nan"))
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    assert main(["evaluate", str(run), *how]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "The model's answers on the split ood are not all finite" in err


def test_a_model_whose_config_asks_for_hidden_states_is_scored(finished):
    task = get_task("logic", num_examples=4)
    model = AutoModelForSequenceClassification.from_pretrained(finished)
    expected = evaluate(model, task, "ood")
    model.config.output_hidden_states = True
    assert evaluate(model, task, "ood") == pytest.approx(expected, rel=1e-5)
