"""Helpers for tests of training: a small recipe, short splits, a trainer, and kills at chosen places."""

import hashlib
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import Trainer
from transformers import trainer as transformers_trainer

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.tasks import get_task
from hf_hyla.training import HylaTrainer, HylaTrainingArguments, RunRecord


STEPS = 12
SECTIONS = {
    "task": {"name": "logic", "num_examples": 4},
    "model": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16},  # attention dropout is on
    "trainer": {
        "max_steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "disable_tqdm": True,
        "train_batch_size": 4, "eval_samples": 16, "eval_steps": 4, "save_steps": 2, "logging_steps": 3,
    },
}  # fmt: skip
# Where a run can die: at the n-th call of one of these.
PLACES = {
    "step": (Trainer, "training_step"),
    "save": (torch, "save"),
    "hash": (hashlib, "file_digest"),
    "rename": (Path, "replace"),
    "rotate": (transformers_trainer, "rotate_checkpoints"),
    "weights": (HylaForSequenceClassification, "save_pretrained"),
    "predict": (Trainer, "predict"),
    "record": (RunRecord, "save"),
}


@pytest.fixture(scope="module", autouse=True)
def short_splits():
    with pytest.MonkeyPatch.context() as patch:
        sizes = property(lambda self: dict.fromkeys(self.splits, 64))
        patch.setattr(type(get_task("logic")), "num_samples", sizes)
        yield


def signalling(place: str, count: int, number: signal.Signals):
    """Makes the `count`-th call at that place send this process a signal."""
    return lambda: at_call(place, count, lambda: os.kill(os.getpid(), number))


def at_call(place: str, count: int, function) -> None:
    """Has `function` called before the `count`-th call at that place."""
    owner, name = PLACES[place]
    replaced = getattr(owner, name)
    calls = itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == count:
            function()
        return replaced(*args, **kwargs)

    setattr(owner, name, call)


def make_trainer(folder, task=None, model=None, **arguments):
    task = task or get_task("logic", num_examples=4)
    model = model or HylaForSequenceClassification(HylaConfig(**task.model_defaults))
    defaults = {"max_steps": 6, "warmup_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.5, "eval_strategy": "no",
                "save_strategy": "no", "per_device_train_batch_size": 8, "disable_tqdm": True,
                "train_sampling_strategy": "sequential"}  # fmt: skip
    args = HylaTrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return HylaTrainer(model=model, args=args, train_dataset=task.dataset("train"), data_collator=task.collate)
