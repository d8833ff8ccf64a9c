"""Loss scaling: accumulation and number of processes change neither loss nor gradient, for every kind of head."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from forks import on_ranks
from safetensors.torch import load_file

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.training import HylaTrainer, HylaTrainingArguments, processes


HEADS = {
    "several answers": {"num_answers": 2, "num_labels": 8},
    "one class": {"num_answers": 1, "num_labels": 3},
    "one number": {"num_answers": 1, "num_labels": 1},
    "several numbers": {"num_answers": 1, "num_labels": 3, "problem_type": "regression"},
    "several labels": {"num_answers": 2, "num_labels": 3, "problem_type": "multi_label_classification"},
}


class Samples(torch.utils.data.Dataset):
    def __init__(self, head):
        self.head = head

    def __len__(self):
        return 64

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        head = self.head
        shape = (head["num_answers"],) if head["num_answers"] > 1 else ()
        if head["num_labels"] == 1:
            labels = torch.rand(shape, generator=draw)
        elif "problem_type" in head:
            labels = torch.randint(0, 2, (*shape, head["num_labels"]), generator=draw).float()
        else:
            labels = torch.randint(0, head["num_labels"], shape, generator=draw)
            if shape and index % 3 == 0:
                labels[0] = -100  # so that batches hold different numbers of labels
        return {"input_ids": torch.randint(0, 9, (10,), generator=draw), "labels": labels}


def train_every_head(folder, batch, accumulation) -> int:
    """Four updates of 16 samples, however they are cut up; writes weights and log."""
    for kind, head in HEADS.items():
        torch.manual_seed(0)
        config = HylaConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=16,
            attention_dropout=0.0,
            **head,
        )
        args = HylaTrainingArguments(
            output_dir=str(folder), max_steps=4, learning_rate=1e-2, warmup_steps=1, weight_decay=0.1, logging_steps=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, eval_strategy="no",
            save_strategy="no", disable_tqdm=True, use_cpu=True, optim="sgd",
        )  # fmt: skip
        trainer = HylaTrainer(model=HylaForSequenceClassification(config), args=args, train_dataset=Samples(head))
        trainer.train()
        if trainer.is_world_process_zero():
            trainer.model.save_pretrained(folder / kind)
            log = [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry]
            (folder / kind / "log.json").write_text(json.dumps(log))
    # Together, since a process that ends first can make torch abort the other one.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    return 0


def train(folder, batch, accumulation, processes):
    folder.mkdir()
    for code, errors in on_ranks(folder, lambda rank: train_every_head(folder, batch, accumulation), processes):
        assert code == 0, errors
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "whole": train(folder / "whole", batch=16, accumulation=1, processes=1),
        "accumulated": train(folder / "accumulated", batch=4, accumulation=4, processes=1),
        "two processes": train(folder / "two", batch=8, accumulation=1, processes=2),
    }


@pytest.mark.parametrize("way", ["accumulated", "two processes"])
@pytest.mark.parametrize("kind", HEADS)
def test_accumulation_and_processes_change_neither_loss_nor_gradient(runs, kind, way):
    expected_log, log = (json.loads((runs[run] / kind / "log.json").read_text()) for run in ("whole", way))
    torch.testing.assert_close(torch.tensor(log), torch.tensor(expected_log), rtol=1e-4, atol=1e-5)
    expected, weights = (load_file(runs[run] / kind / "model.safetensors") for run in ("whole", way))
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], rtol=1e-4, atol=1e-5)


def test_the_memory_of_training_is_reserved_once(monkeypatch):
    reserved = []
    monkeypatch.setattr(processes, "_ask_for_huge_pages", lambda libc, largest: reserved.append(largest))
    processes.keep_freed_memory.cache_clear()
    for _ in range(3):
        processes.keep_freed_memory()
    assert len(reserved) == (sys.platform == "linux")


# Prints how many pages a step takes anew, as a share of those before, and the MiB in huge pages while it holds 128.
MEMORY = """
import re, resource, torch
from pathlib import Path
from hf_hyla.training.processes import keep_freed_memory

def pages_of_steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.ones(2**21) for _ in range(4)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages_of_steps()
without = pages_of_steps()
keep_freed_memory()
pages_of_steps()
print(pages_of_steps() / max(without, 1))  # now and then glibc keeps the memory by itself
tensors = [torch.ones(2**21) for _ in range(16)]
rollup = Path("/proc/self/smaps_rollup")
print(int(re.findall(r"AnonHugePages: *(\\d+) kB", rollup.read_text())[0]) / 1024 if rollup.exists() else 0)
"""


@pytest.fixture(scope="module")
def memory() -> list[float]:
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    return [float(line) for line in result.stdout.splitlines()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_next_step_reuses_the_memory_that_a_step_frees(memory):
    assert memory[0] < 0.1


def huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text() if setting.exists() else "[never]"


@pytest.mark.skipif("[never]" in huge_pages(), reason="this system has no transparent huge pages")
def test_the_memory_of_a_step_is_in_huge_pages(memory):
    assert memory[1] > 64
