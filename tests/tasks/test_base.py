"""Tests of every task: samples by index, fingerprints, batches that any loader can use, and their speed."""

import hashlib
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.benchmark.data import data_throughput
from hf_hyla.tasks import TASKS, get_task


# The tasks whose samples are drawn.
PAPERS = [name for name, task in TASKS.items() if task.paper]
# The samples behind committed results: a change of one bit shows here.
FINGERPRINTS = {
    "sraven": "sha256:11f53cc4682f9967275a8270634ff543dcded649853ad6419b30b5cb7c06b518",
    "logic": "sha256:80bfcf73af749aa0b04ef9934f5fef7db6f3f7e4f91dc3e7deb2df8f119ed520",
}


@pytest.mark.parametrize("name", PAPERS)
def test_fingerprints_are_pinned(name):
    assert get_task(name).fingerprint() == FINGERPRINTS[name]


@pytest.mark.parametrize("name", PAPERS)
def test_the_fingerprint_can_be_recomputed_from_its_definition(name):
    task = get_task(name)
    parts = []
    for split in task.splits:
        items = [task.samples(split, [i]) for i in [*range(64), *range(19_999_936, 20_000_000)]]
        for column in items[0]:
            values = np.concatenate([item[column] for item in items])
            parts.append(f"{split}/{column} {values.dtype} {values.shape}\n".encode())
            parts.append(values.astype(values.dtype.newbyteorder("<")).tobytes())
    assert task.fingerprint() == "sha256:" + hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sraven", {"seed": 1}),
        ("sraven", {"held_out": 0.3}),
        ("sraven", {"permute": False}),
        ("sraven", {"num_values": 9}),
        ("sraven", {"unambiguous": True}),
        ("logic", {"seed": 1}),
        ("logic", {"held_out": 0.3}),
        ("logic", {"num_examples": 17}),
    ],
)
def test_different_settings_have_different_fingerprints(name, changes):
    assert get_task(name, **changes).fingerprint() != FINGERPRINTS[name]


@pytest.mark.parametrize("name", PAPERS)
def test_no_word_is_shared_between_splits(name):
    task = get_task(name)
    words = [task.random_words(split, np.arange(500), 50) for split in task.splits]
    assert len(np.unique(np.concatenate(words))) == len(task.splits) * 500 * 50


@pytest.mark.parametrize("name", PAPERS)
def test_the_last_of_twenty_million_samples_is_drawn_at_once(name):
    dataset = get_task(name).dataset("train", 20_000_000)
    dataset[0]
    started = time.process_time()
    dataset[19_999_999]
    assert time.process_time() - started < 0.05


@pytest.mark.parametrize("name", PAPERS)
def test_batches_are_sequences_of_samples(name):
    task = get_task(name)
    batch = task.dataset("ood").__getitems__([3, 1, 8])
    samples = list(batch)
    assert len(batch) == len(samples) == 3 and len(batch[1:]) == 2
    for index, sample in zip([3, 1, 8], samples, strict=True):
        alone = task.dataset("ood")[index]
        assert alone.keys() == sample.keys() and all(np.array_equal(alone[key], sample[key]) for key in alone)
    assert all(np.array_equal(batch[-1][key], samples[2][key]) for key in samples[2])
    with pytest.raises(IndexError):
        batch[3]
    whole, one_by_one = task.collate(batch), task.collate(samples)
    assert whole.keys() == one_by_one.keys() and all(torch.equal(whole[key], one_by_one[key]) for key in whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_other_collators_and_loaders_can_use_the_batches(workers):
    task = get_task("sraven")
    loader = DataLoader(
        Subset(task.dataset("test"), range(10, 20)), 4, collate_fn=default_data_collator, num_workers=workers
    )
    batches = list(loader)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    expected = task.samples("test", np.arange(10, 20))
    for key in ("input_ids", "labels", "rules"):
        assert np.array_equal(torch.cat([batch[key] for batch in batches]).numpy(), expected[key])
    plain = next(iter(DataLoader(task.dataset("test"), 4)))  # torch's own collator
    assert torch.equal(plain["input_ids"], torch.from_numpy(task.samples("test", np.arange(4))["input_ids"]))


def test_transformers_own_trainer_can_use_a_task(tmp_path):
    # With its defaults: it removes columns that the model does not take, and collates by itself.
    task = get_task("sraven", num_features=2)
    config = HylaConfig(**task.model_defaults | {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16})
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(HylaForSequenceClassification(config), args, train_dataset=task.dataset("train", 64))
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize(("name", "floor"), [("sraven", 252_000), ("logic", 520_000)])
def test_batches_are_drawn_fast_even_on_a_busy_machine(name, floor):
    # `floor` is four times the reference's speed, on a quiet machine; the margins are for one that is not.
    rates = data_throughput(get_task(name), seconds=0.2)
    assert rates["batch_size"] == 128 and rates["batches"] > 10
    assert rates["sequential"] > floor / 4 and rates["shuffled"] > floor / 12
