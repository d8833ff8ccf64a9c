"""Tests of sweeps: every point is a valid recipe and a run, finished runs are skipped, and the others resume."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml
from forks import ForkedCommand, in_children

from hf_hyla.cli import main
from hf_hyla.tasks import get_task
from hf_hyla.training import sweep as sweeps
from hf_hyla.training.sweep import load_sweep


FIGURES = sorted((Path(__file__).parents[2] / "recipes" / "figures").glob("*.yaml"))
BASE = {
    "task": {"name": "logic", "num_examples": 4},
    "model": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16},
    "trainer": {"max_steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "eval_samples": 16,
                "train_batch_size": 4, "disable_tqdm": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    sizes = property(lambda self: dict.fromkeys(self.splits, 64))
    monkeypatch.setattr(type(get_task("logic")), "num_samples", sizes)


def write(folder, base=BASE, **content):
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"base": "base.yaml", **content}))
    return folder / "tiny.yaml"


# Points: the product of the axes' lengths.
@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("logic-held-out", 3 * 3 * 4),
        ("logic-reference-split", 3),
        ("logic-table-a1", 13),
        ("sraven-features", 3 * 7),
        ("sraven-heads", 5),
        ("sraven-scale", 3 * 3 * 3 * 3),
        ("sraven-table-a1", 13),
    ],
)
def test_every_point_of_the_papers_figures_is_a_valid_recipe(name, points):
    path = next(path for path in FIGURES if path.stem == name)
    assert path.read_text().startswith(f"# {3 * points} runs")
    sweep = load_sweep(path)
    assert len(sweep.points) == 3 * points
    assert f"`figures/{name}.yaml`" in (path.parents[1] / "README.md").read_text()
    point = sweep.points[-1]
    assert point.recipe.task.seed == point.recipe.trainer["seed"] == 2


def test_every_sweep_is_tested():
    assert len(FIGURES) == 10  # three of which are no figures of the paper


@pytest.mark.parametrize(("name", "trials"), [("sraven-muon-trials", 11), ("logic-muon-trials", 4), ("logic-muon", 3)])
def test_the_trials_of_muon_are_the_same_for_every_attention(name, trials):
    points = [point.recipe for point in load_sweep(f"figures/{name}.yaml").points]
    by_type = {}
    for recipe in points:
        settings = {**recipe.settings["trainer"], **recipe.settings["model"]}
        by_type.setdefault(settings.pop("attention_type"), []).append(settings)
    assert list(map(len, by_type.values())) == 3 * [trials]
    assert by_type["hyla"] == by_type["softmax"] == by_type["linear"]


def test_heads_keep_their_total_width():
    for point in load_sweep("figures/sraven-heads.yaml").points:
        config = point.recipe.config
        assert config.num_attention_heads * config.head_dim == config.num_attention_heads * config.value_head_dim == 64


def test_a_sweep_skips_finished_runs_and_runs_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "Popen", ForkedCommand)
    path = write(tmp_path, grid={"model.attention_type": ["hyla", "softmax"]}, seeds=[0, 1])
    runs = tmp_path / "runs"
    (runs / "attention_type=softmax/1").mkdir(parents=True)
    (runs / "attention_type=softmax/1/precious.txt").write_text("mine")
    command = ["sweep", str(path), "--output", str(runs)]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "attention_type=hyla/0: finished" in printed
    assert "attention_type=softmax/1: failed: " in printed and "is not empty and holds no run" in printed
    assert (runs / "attention_type=softmax/1/precious.txt").read_text() == "mine"

    (runs / "attention_type=softmax/1/precious.txt").unlink()
    before = (runs / "attention_type=hyla/0/run.json").stat().st_mtime_ns
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 3 and "attention_type=softmax/1: finished" in printed
    assert (runs / "attention_type=hyla/0/run.json").stat().st_mtime_ns == before
    lines = printed.splitlines()[-2:]
    assert "base attention_type=hyla" in lines[0].replace(tmp_path.name + "-", "")
    assert all("(2)" in line for line in lines)  # two seeds each

    path = write(tmp_path, grid={"model.attention_type": ["hyla"]}, seeds=[0], base={
        **BASE, "trainer": {**BASE["trainer"], "max_steps": 8}})  # fmt: skip
    assert main(command) == 1
    assert "holds a run of another recipe, which differs in trainer.max_steps" in capsys.readouterr().out


# Ctrl-C in a terminal goes to every process of the group; its end, like a batch system, ends the sweep alone.
@pytest.mark.parametrize(
    ("number", "kill", "expected"),
    [(signal.SIGINT, os.killpg, 130), (signal.SIGHUP, os.kill, 129), (signal.SIGTERM, os.kill, 143)],
    ids=["ctrl-c", "terminal closed", "terminated"],
)
def test_a_stopped_sweep_stops_its_runs_after_they_have_saved(number, kill, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "Popen", ForkedCommand)
    base = {**BASE, "trainer": {**BASE["trainer"], "max_steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000}}
    path = write(tmp_path, grid={}, seeds=[0, 1], base=base)
    log, group = tmp_path / "runs/base/0.log", tmp_path / "group"

    def prepare(rank):
        os.setpgrp()
        # A shell that starts the tests in the background lets them ignore SIGINT, and nohup SIGHUP.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        group.write_text(str(os.getpgrp()))

    def interrupt():
        while not log.exists() or "loss" not in log.read_text():
            time.sleep(0.05)
        kill(int(group.read_text()), number)

    threading.Thread(target=interrupt, daemon=True).start()
    ((code, _),) = in_children(tmp_path, ["sweep", str(path), "--output", "runs"], prepare=prepare)
    assert code == expected
    assert "Stopped by SIGTERM after step" in log.read_text()
    assert list((tmp_path / "runs/base/0/checkpoints").glob("checkpoint-*/seal.json"))
    assert not (tmp_path / "runs/base/1").exists()


def test_a_damaged_record_fails_only_its_own_point(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "Popen", ForkedCommand)
    path = write(tmp_path, grid={}, seeds=[0, 1])
    damaged = tmp_path / "runs/base/0/run.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    assert main(["sweep", str(path), "--output", str(tmp_path / "runs")]) == 1
    printed = capsys.readouterr().out
    assert f"base/0: failed: {damaged} is not a run record" in printed and "base/1: finished" in printed
    assert "(1)" in printed.splitlines()[-1]


def test_only_the_expectation_of_a_run_may_change_between_sweeps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "Popen", ForkedCommand)
    command = ["sweep", str(write(tmp_path, grid={}, seeds=[0])), "--output", str(tmp_path / "runs")]
    assert main(command) == 0
    expect = {"metric": "ood/r2", "value": 0.8, "tolerance": 0.1, "source": "ours"}
    write(tmp_path, grid={}, seeds=[0], base={**BASE, "expect": expect})
    assert main(command) == 0
    assert "base/0: done before" in capsys.readouterr().out
    write(tmp_path, grid={}, seeds=[0], base={**BASE, "task": {**BASE["task"], "held_out": 0.4}})
    assert main(command) == 1
    assert "a run of another recipe, which differs in task.held_out" in capsys.readouterr().out


def test_a_sweep_uses_only_the_visible_gpus(tmp_path, monkeypatch):
    given = []

    class Command:
        def __init__(self, command, env, **streams):
            given.append(env["CUDA_VISIBLE_DEVICES"])

        def wait(self):
            return 0

    monkeypatch.setattr(sweeps, "Popen", Command)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    sweep = load_sweep(write(tmp_path, grid={}, seeds=[0, 1, 2, 3]))
    for inherited, names in ((None, {"0", "1"}), ("2,GPU-3", {"2", "GPU-3"})):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if inherited:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
        given.clear()
        assert {outcome for _, outcome in sweeps.run_sweep(sweep, tmp_path / "runs")} == {"finished"}
        assert set(given) <= names and len(given) == 4


def test_a_sweep_with_a_key_twice_is_refused(tmp_path):
    path = write(tmp_path, grid={}, seeds=[0])
    path.write_text(path.read_text() + "seeds: [1]\n")
    with pytest.raises(ValueError, match="not valid YAML: the key 'seeds' occurs twice"):
        load_sweep(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"grid": {}}, "lacks the key 'seeds'"),
        ({"grid": {}, "seeds": [0], "sedes": [0]}, "unknown key 'sedes' .did you mean 'seeds'"),
        ({"grid": {}, "seeds": 3}, "seeds must be a list of integers, got 3"),
        ({"grid": [], "seeds": [0]}, "grid must hold keys and values"),
        ({"grid": {"task.held_out": 0.5}, "seeds": [0]}, "the axis 'task.held_out' must be a list of values"),
        ({"grid": {"width": [16]}, "seeds": [0]}, "every value of the axis 'width' must hold keys and values, got 16"),
        ({"grid": {"task.held_uot": [0.5]}, "seeds": [0]}, "no key 'held_uot' .did you mean 'held_out'"),
        ({"grid": {"task.held_out": [0.5, 0.99]}, "seeds": [0]}, "must occur in training"),
        ({"grid": {"task.held_out": [0.5, 0.5]}, "seeds": [0]}, "names a point twice"),
        (
            {"grid": {"trainer.seed": [0, 1]}, "seeds": [7]},
            "the grid sets trainer.seed, which seeds sets for every point: list its values in seeds instead",
        ),
        (
            {"grid": {"trainer.hub_model_id": ["a/b"], "trainer.push_to_hub": [True]}, "seeds": [0, 1]},
            "the runs of a sweep would replace each other in one repository, but push_to_hub is set",
        ),
        (
            {"grid": {"model.hidden_size": [16], "w": [{"model.hidden_size": 8}]}, "seeds": [0]},
            "two axes of the grid set",
        ),
    ],
)
def test_a_wrong_sweep_is_refused_with_a_sentence(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_sweep(write(tmp_path, **content))


def test_points_stay_in_the_folder_of_the_sweep_under_names_that_a_file_system_takes(tmp_path):
    grid = {"trainer.run_name": ["../../up", "x" * 300, "😀"], "trainer.project": ["a b"]}
    points = load_sweep(write(tmp_path, grid=grid, seeds=[0])).points
    assert points[0].folder == "project=ab-run_name=.._.._up/0"
    assert all(len(part.encode()) < 200 and part != ".." for point in points for part in point.folder.split("/"))
    assert [point.recipe.trainer["run_name"] for point in points] == grid["trainer.run_name"]
