"""Tests of runs of two processes, which equal those of one up to rounding and draw every sample once."""

import json
import signal
import time
from collections import Counter

import pytest
import torch
import yaml
from forks import in_children
from safetensors.torch import load_file
from training_helpers import SECTIONS, STEPS, short_splits, signalling  # noqa: F401  the fixture
from transformers import Trainer

from hf_hyla.tasks.base import TaskDataset
from hf_hyla.training import RunRecord
from hf_hyla.training.processes import check_devices, check_launch, share_of_batch


COMMAND = ["train", "recipe.yaml", "--output", "run"]
BATCH = SECTIONS["trainer"]["train_batch_size"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_recipe(folder, **trainer):
    # Batches of evaluation that divide neither the samples nor their share.
    sections = {**SECTIONS, "trainer": {**SECTIONS["trainer"], "per_device_eval_batch_size": 7, **trainer}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    write_recipe(folder)
    ((code, errors),) = in_children(folder, COMMAND)
    assert code == 0, errors
    return folder / "run"


def assert_equal_to_rounding(run, expected):
    weights, others = (load_file(folder / "model.safetensors") for folder in (run, expected))
    for name in others:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-5)
    record, other = RunRecord.load(run), RunRecord.load(expected)
    assert (record.steps, record.samples_seen) == (other.steps, other.samples_seen)
    for split, scores in other.metrics.items():
        assert record.metrics[split] == pytest.approx(scores, rel=1e-3, abs=1e-4)
    assert len(record.curve) == len(other.curve)
    for point, theirs in zip(record.curve, other.curve, strict=True):
        assert {**point, "seconds": 0} == pytest.approx({**theirs, "seconds": 0}, rel=1e-3, abs=1e-4)


def test_two_processes_give_the_result_of_one_and_see_every_sample_once(one, tmp_path):
    write_recipe(tmp_path)
    draw = TaskDataset.__getitems__

    def recording(rank):
        def drawn(self, indices):
            with (tmp_path / f"drawn{rank}.txt").open("a") as file:
                file.write(json.dumps([self.split, list(indices)]) + "\n")
            return draw(self, indices)

        TaskDataset.__getitems__ = drawn

    for code, errors in in_children(tmp_path, COMMAND, processes=2, prepare=recording):
        assert code == 0, errors
    assert_equal_to_rounding(tmp_path / "run", one)
    assert RunRecord.load(tmp_path / "run").hardware["num_processes"] == 2

    shares = []
    for rank in (0, 1):
        lines = [json.loads(line) for line in (tmp_path / f"drawn{rank}.txt").read_text().splitlines()]
        shares.append([index for split, indices in lines if split == "train" for index in indices])
    assert Counter(shares[0] + shares[1]) == Counter(range(STEPS * BATCH))
    assert len(shares[0]) == len(shares[1])


def test_two_processes_with_muon_give_the_result_of_one(tmp_path):
    def in_single_precision(rank):
        torch.Tensor.bfloat16 = torch.Tensor.clone  # to which torch's Muon rounds gradients

    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        write_recipe(folder, optim="muon", muon_learning_rate=2e-2)
        for code, errors in in_children(folder, COMMAND, processes=processes, prepare=in_single_precision):
            assert code == 0, errors
    assert_equal_to_rounding(tmp_path / "2" / "run", tmp_path / "1" / "run")


def test_a_rank_that_dies_ends_the_run_with_its_error_and_one_process_resumes_it(one, tmp_path):
    write_recipe(tmp_path)
    step = Trainer.training_step

    def failing(rank):
        def training_step(self, *args, **kwargs):
            if rank == 1 and self.state.global_step == 6:
                raise ValueError("rank 1 has had enough")
            return step(self, *args, **kwargs)

        Trainer.training_step = training_step

    started = time.monotonic()
    first, second = in_children(tmp_path, COMMAND, processes=2, prepare=failing)
    assert time.monotonic() - started < 60
    assert second[0] == 2 and "hyla: rank 1 has had enough" in second[1]
    assert first[0] != 0
    ((code, errors),) = in_children(tmp_path, COMMAND)
    assert code == 0, errors
    assert (
        "Resumes from checkpoint-6, which was written with 2 processes, while this run has 1: the result will be equal up to rounding"
        in errors
    )
    assert_equal_to_rounding(tmp_path / "run", one)


def test_two_processes_resume_the_run_of_one(one, tmp_path):
    write_recipe(tmp_path)
    kill = signalling("step", 6, signal.SIGKILL)
    ((code, errors),) = in_children(tmp_path, COMMAND, prepare=lambda rank: kill())
    assert code == -signal.SIGKILL, errors
    (code, errors), (other, _) = in_children(tmp_path, COMMAND, processes=2)
    assert (code, other) == (0, 0), errors
    assert (
        "Resumes from checkpoint-4, which was written with 1 process, while this run has 2: the result will be equal up to rounding"
        in errors
    )
    assert_equal_to_rounding(tmp_path / "run", one)


def test_sigterm_to_one_of_two_stops_both_at_the_same_step(one, tmp_path):
    write_recipe(tmp_path)
    stop = signalling("step", 3, signal.SIGTERM)
    results = in_children(tmp_path, COMMAND, processes=2, prepare=lambda rank: rank and stop())
    assert [code for code, _ in results] == [143, 143], results
    assert "Stopped by SIGTERM after step 10 of 12" in results[0][1]
    for code, errors in in_children(tmp_path, COMMAND, processes=2):
        assert code == 0, errors
    assert_equal_to_rounding(tmp_path / "run", one)


def test_all_processes_end_with_the_error_of_the_first(one, tmp_path):
    write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    for code, errors in in_children(tmp_path, COMMAND, processes=2):
        assert code == 2 and errors.splitlines()[-1].startswith("hyla: run is not empty and holds no run")


def test_a_batch_that_cannot_be_shared_is_refused():
    assert share_of_batch(128, 4) == 32
    with pytest.raises(ValueError, match="3 processes cannot share batches of 128 samples evenly"):
        share_of_batch(128, 3)
    with pytest.raises(ValueError, match="This process sees 2 devices"):
        check_devices(2)


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_sharding_without_an_accelerator_is_refused(monkeypatch, variable, name):
    check_launch()
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=f"{name} needs an accelerator, and there is none here"):
        check_launch()
