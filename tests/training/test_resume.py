"""Tests of resuming: a run that was killed at any moment reaches the weights, curve and scores of an uninterrupted one."""

import functools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
import yaml
from forks import in_children
from safetensors.torch import load_file
from training_helpers import SECTIONS, STEPS, at_call, short_splits, signalling  # noqa: F401  the fixture
from transformers import modeling_utils

from hf_hyla import HylaForSequenceClassification
from hf_hyla.training import RunRecord, Stopped, load_recipe, train
from hf_hyla.training import checkpoint as checkpoints
from hf_hyla.training.trainer import HylaTrainer


def recipe_in(folder: Path, **trainer):
    sections = {**SECTIONS, "trainer": {**SECTIONS["trainer"], **trainer}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return load_recipe(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(recipe_in(folder), folder / "run")
    yield folder / "run"
    torch.set_num_threads(threads)


def in_child(folder: Path, prepare) -> tuple[int, str]:
    (result,) = in_children(folder, ["train", "recipe.yaml", "--output", "run"], prepare=lambda rank: prepare())
    return result


def assert_same_run(run: Path, expected: Path):
    weights, others = (load_file(folder / "model.safetensors") for folder in (run, expected))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    record, other = RunRecord.load(run), RunRecord.load(expected)
    assert record.metrics == other.metrics and record.steps == other.steps == STEPS
    assert without_seconds(record.curve) == without_seconds(other.curve)


def without_seconds(curve):
    return [{name: value for name, value in point.items() if name != "seconds"} for point in curve]


# In the middle of a step, between the files of a checkpoint, before its seal, before the seal has its name, before the old
# checkpoints are removed, and between training and record.
@pytest.mark.parametrize(
    ("place", "count"),
    [("step", 6), ("save", 8), ("hash", 12), ("rename", 3), ("rotate", 3), ("weights", STEPS // 2 + 1), ("record", 1)],
)
def test_a_killed_run_resumes_to_the_result_of_an_uninterrupted_one(uninterrupted, tmp_path, place, count):
    recipe = recipe_in(tmp_path)
    code, errors = in_child(tmp_path, signalling(place, count, signal.SIGKILL))
    assert code == -signal.SIGKILL, errors
    assert not (tmp_path / "run/run.json").exists()
    train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_killed_run_with_muon_resumes_to_the_result_of_an_uninterrupted_one(uninterrupted, tmp_path):
    muon = {"optim": "muon", "muon_learning_rate": 2e-2, "schedule_floor": 0.0}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    expected = train(recipe_in(tmp_path / "whole", **muon), tmp_path / "whole" / "run")
    assert expected.metrics != RunRecord.load(uninterrupted).metrics
    recipe = recipe_in(tmp_path / "killed", **muon)
    # After a first checkpoint, and while the third is written.
    for place, count, whole in (("step", 4, "checkpoint-2"), ("save", 8, "checkpoint-4")):
        code, errors = in_child(tmp_path / "killed", signalling(place, count, signal.SIGKILL))
        assert code == -signal.SIGKILL, errors
        assert (tmp_path / "killed/run/checkpoints" / whole).is_dir()
    train(recipe, tmp_path / "killed" / "run")
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


@pytest.mark.parametrize("seed", range(int(os.environ.get("HYLA_SOAK", "1"))))
def test_a_run_killed_repeatedly_at_random_times_resumes_to_the_result_of_an_uninterrupted_one(
    uninterrupted, tmp_path, seed
):
    """HYLA_SOAK=N does this for N seeds."""
    recipe = recipe_in(tmp_path)
    draw = random.Random(seed)
    whole = RunRecord.load(uninterrupted).seconds  # of training, before which and after which there is more to kill
    for _ in range(3):
        # The alarm kills like SIGKILL: nothing handles it.
        delay = draw.uniform(0.05, whole)
        code, errors = in_child(tmp_path, functools.partial(signal.setitimer, signal.ITIMER_REAL, delay))
        assert code in (-signal.SIGALRM, 0), errors
        if (tmp_path / "run/run.json").exists():
            break
    if not (tmp_path / "run/run.json").exists():
        train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_sigterm_saves_names_the_step_and_exits_with_143(uninterrupted, tmp_path):
    recipe = recipe_in(tmp_path)
    code, errors = in_child(tmp_path, signalling("step", 5, signal.SIGTERM))
    assert code == 143, errors
    assert "Stopped by SIGTERM after step 5 of 12 (42%)" in errors
    assert (tmp_path / "run/checkpoints/checkpoint-5").is_dir()  # neither a step that logs nor one that saves
    train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_an_interrupt_saves_and_exits_with_130_and_a_second_one_stops_at_once(uninterrupted, tmp_path):
    def prepare(step, signals):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which the shell of a background job ignores
        at_call("step", step, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(signals)])

    recipe = recipe_in(tmp_path)
    code, errors = in_child(tmp_path, functools.partial(prepare, 5, 1))
    assert code == 130, errors
    assert "Saves after this step and stops; Ctrl-C again stops at once." in errors
    assert "Stopped by SIGINT after step 5 of 12 (42%)" in errors
    code, errors = in_child(tmp_path, functools.partial(prepare, 3, 2))
    assert code == 130 and "hyla: interrupted" in errors, errors
    train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_closing_the_terminal_saves_and_exits_with_129(uninterrupted, tmp_path):
    recipe = recipe_in(tmp_path)

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
        other_end, terminal = os.openpty()
        os.login_tty(terminal)
        at_call("step", 5, lambda: os.close(other_end))

    code, _ = in_child(tmp_path, prepare)
    assert code == 129
    assert (tmp_path / "run/checkpoints/checkpoint-5").is_dir()
    train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_sigterm_during_the_last_evaluation_stops_at_once(uninterrupted, tmp_path):
    recipe = recipe_in(tmp_path)
    code, errors = in_child(tmp_path, signalling("predict", 2, signal.SIGTERM))
    assert code == 143, errors
    assert "after step 12 of 12 (100%)" in errors
    train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_time_limit_saves_and_stops_without_changing_the_result(uninterrupted, tmp_path, monkeypatch):
    recipe = recipe_in(tmp_path)
    clock = [0.0]
    step = HylaTrainer.training_step

    def minute_long_step(*args, **kwargs):
        clock[0] += 60
        return step(*args, **kwargs)

    monkeypatch.setattr("hf_hyla.training.stopping.monotonic", lambda: clock[0])
    monkeypatch.setattr(HylaTrainer, "training_step", minute_long_step)
    for reached in (3, 6, 9):
        clock[0] = 0.0
        with pytest.raises(Stopped, match=f"Stopped at --max-minutes after step {reached} of 12") as stopped:
            train(recipe, tmp_path / "run", max_minutes=4.5)
        assert stopped.value.exit_code == 0
    clock[0] = 0.0
    train(recipe, tmp_path / "run", max_minutes=4.5)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_time_limit_also_stops_the_last_evaluation(uninterrupted, tmp_path, monkeypatch):
    recipe = recipe_in(tmp_path)
    clock, predict = [0.0], HylaTrainer.predict

    def late(*args, **kwargs):
        clock[0] += 60
        return predict(*args, **kwargs)

    monkeypatch.setattr("hf_hyla.training.stopping.monotonic", lambda: clock[0])
    monkeypatch.setattr(HylaTrainer, "predict", late)
    with pytest.raises(Stopped, match="Stopped at --max-minutes after step 12 of 12"):
        train(recipe, tmp_path / "run", max_minutes=1.5)
    monkeypatch.setattr(HylaTrainer, "predict", predict)
    train(recipe, tmp_path / "run", max_minutes=1.5)
    assert_same_run(tmp_path / "run", uninterrupted)


def truncate(folder):
    (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:100])


def flip_a_bit(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "holds 100 of the"),
        (flip_a_bit, "holds a model.safetensors whose bytes have changed"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "lacks rng_state.pth"),
        (lambda folder: (folder / checkpoints.SEAL).unlink(), "has no seal.json"),
        (lambda folder: (folder / checkpoints.SEAL).write_text("{"), "has a damaged seal.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(uninterrupted, tmp_path, capfd, damage, said):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "run.json").unlink()
    damage(run / "checkpoints" / f"checkpoint-{STEPS}")
    train(recipe_in(tmp_path), run)
    lines = capfd.readouterr().err.splitlines()
    assert any(f"checkpoint-{STEPS} is damaged and not used: it {said}" in line for line in lines)
    assert f"Resumes from checkpoint-{STEPS - 2}." in lines
    assert_same_run(run, uninterrupted)
    aside = run / "checkpoints" / f"damaged-checkpoint-{STEPS}"
    assert aside.name in lines[0] and (aside / "trainer_state.json").exists()


def test_without_a_whole_checkpoint_a_run_reports_that_it_starts_again(uninterrupted, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "run.json").unlink()
    for checkpoint in (run / "checkpoints").iterdir():
        truncate(checkpoint)
    train(recipe_in(tmp_path), run)
    assert "No checkpoint is whole: training starts from the beginning." in capfd.readouterr().err.splitlines()
    assert_same_run(run, uninterrupted)


def test_the_last_checkpoints_stay_and_are_whole(uninterrupted):
    folder = uninterrupted / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-12"]
    assert [checkpoints.fault(path) for path in folder.iterdir()] == [None, None]


def test_a_full_disk_is_reported_in_a_sentence_and_the_checkpoint_before_it_used(uninterrupted, tmp_path):
    save = HylaTrainer._save_checkpoint

    def full(self, model, trial):
        if self.state.global_step == 4:  # below the size of optimizer.pt, above that of the small files
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        save(self, model, trial)

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        HylaTrainer._save_checkpoint = full

    recipe = recipe_in(tmp_path)
    code, errors = in_child(tmp_path, prepare)
    assert code == 2, errors
    assert "hyla: The checkpoint of step 4 could not be written (" in errors.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-2"]
    train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


# Where the results of a finished run are written: code is copied, then the weights.
@pytest.mark.parametrize(
    ("owner", "name"), [(HylaForSequenceClassification, "save_pretrained"), (modeling_utils, "safe_save_file")]
)
def test_a_disk_that_is_full_after_training_is_reported_in_a_sentence_and_nothing_is_lost(
    uninterrupted, tmp_path, owner, name
):
    save = getattr(owner, name)

    def full(*args, **kwargs):
        if "checkpoints" not in str(args[1]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
        return save(*args, **kwargs)

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        setattr(owner, name, full)

    recipe = recipe_in(tmp_path)
    code, errors = in_child(tmp_path, prepare)
    assert code == 2, errors
    said = errors.splitlines()[-1]
    assert said.startswith("hyla: Training has ended, but its results could not be written to run (")
    assert "has space, and give the same command again" in said
    assert not (tmp_path / "run/run.json").exists()
    train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("damage", ["", "task: [", "task: {}", "\x00\x00"])
def test_a_damaged_recipe_in_a_runs_folder_is_named(uninterrupted, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "resolved_recipe.yaml").write_text(damage)
    with pytest.raises(ValueError, match=r"run/resolved_recipe\.yaml is damaged.*or pass --overwrite"):
        train(recipe_in(tmp_path), run)


def test_a_run_resumes_when_only_its_expectation_has_changed(uninterrupted, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "run.json").unlink()
    expect = {"metric": "ood/r2", "value": 0.8, "tolerance": 0.1, "source": "ours"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**SECTIONS, "expect": expect}))
    record = train(load_recipe(tmp_path / "recipe.yaml"), run)
    assert f"Resumes from checkpoint-{STEPS}." in capfd.readouterr().err
    assert record.recipe["expect"]["value"] == 0.8
    assert_same_run(run, uninterrupted)


def test_a_failed_run_releases_its_folder_even_while_its_error_is_kept(tmp_path, monkeypatch):
    recipe = recipe_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(HylaTrainer, "training_step", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError) as failed:
            train(recipe, tmp_path / "run")
    # A lock of a process is free to the process itself: another one has to ask.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(can_claim, (tmp_path / "run",)), failed.value


def can_claim(folder) -> bool:
    try:
        with checkpoints.claimed(folder):
            return True
    except FileExistsError:
        return False


def test_a_folder_in_which_another_process_trains_is_refused_until_that_process_ends(uninterrupted, tmp_path):
    recipe = recipe_in(tmp_path)
    ready, write = os.pipe()
    other = os.fork()
    if other == 0:
        HylaTrainer.training_step = lambda *args, **kwargs: (os.write(write, b"."), signal.pause())
        try:
            train(recipe, tmp_path / "run")
        finally:
            os._exit(99)
    os.read(ready, 1)
    with pytest.raises(FileExistsError, match="Another process trains in"):
        train(recipe, tmp_path / "run", overwrite=True)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    train(recipe, tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="takes the right to give up rights")
@pytest.mark.skipif(
    not all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(__file__).parents),
    reason="another user cannot read this checkout",
)
def test_a_folder_without_write_permission_is_refused(tmp_path):
    recipe = recipe_in(tmp_path)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(OSError, match=r"run cannot be used \(Permission denied\): choose another --output"):
            train(recipe, tmp_path / "run")
    finally:
        os.seteuid(0)
    assert not (tmp_path / "run").exists()


def test_a_folder_inside_a_file_is_refused(tmp_path):
    recipe = recipe_in(tmp_path)
    with pytest.raises(OSError, match=r"cannot be used \(Not a directory\): choose another --output"):
        train(recipe, tmp_path / "recipe.yaml" / "run")
