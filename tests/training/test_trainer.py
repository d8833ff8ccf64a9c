"""Tests of the trainer: parameter groups, learning-rate curve and updates follow the reference, and faults stop it."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import make_trainer
from transformers import TrainerCallback

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.tasks import get_task
from hf_hyla.training import HylaTrainer, HylaTrainingArguments
from hf_hyla.training.checkpoint import fault, last_whole, newest_whole, seal
from hf_hyla.training.schedule import reference_schedule


def test_the_schedule_has_the_shape_of_the_references():
    peak, warmup, total = 1.0, 100, 1000
    factor = [reference_schedule(step, warmup, total) for step in range(total + 1)]
    assert factor[0] == 0 and factor[warmup] == peak
    np.testing.assert_allclose(factor[:warmup], np.arange(warmup) / warmup)
    middle = (warmup + total - warmup) // 2
    assert factor[middle] == pytest.approx(0.55)  # half-way between 1 and 0.1
    quarter = warmup + (total - 2 * warmup) // 4
    assert factor[quarter] == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)))
    np.testing.assert_allclose(factor[total - warmup :], 0.1)
    assert all(later <= earlier for earlier, later in zip(factor[warmup:], factor[warmup + 1 :], strict=False))


def test_decay_applies_to_parameters_that_the_reference_stores_with_more_than_one_axis(tmp_path):
    config = HylaConfig(qk_norm=True, value_depth=2, num_hidden_layers=1)
    trainer = make_trainer(tmp_path, model=HylaForSequenceClassification(config))
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    layer = "model.layers.0"
    not_decayed = {name for name, _ in trainer.model.named_parameters()} - decayed
    assert not_decayed == {
        "model.embed_bias", "model.norm.weight", "model.norm.bias", "classifier.bias",
        f"{layer}.input_layernorm.weight", f"{layer}.input_layernorm.bias",
        f"{layer}.post_attention_layernorm.weight", f"{layer}.post_attention_layernorm.bias",
        f"{layer}.self_attn.o_proj.bias", f"{layer}.self_attn.q_norm.weight", f"{layer}.self_attn.k_norm.weight",
        f"{layer}.mlp.up_proj.bias", f"{layer}.mlp.down_proj.bias",
    }  # fmt: skip
    assert f"{layer}.self_attn.q_proj.bias" in decayed and f"{layer}.self_attn.relative_attention_bias" in decayed


def adamw_loop(model, batches, decayed, schedule, peak, decay):
    """The reference's optimiser, one parameter at a time: AdamW 0.9 / 0.999 / 1e-8 with decoupled decay, no clipping."""
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step, batch in enumerate(batches):
        model.zero_grad()
        model(**batch).loss.backward()
        rate = peak * schedule(step)
        with torch.no_grad():
            for name, p in model.named_parameters():
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.999 * second[name] + 0.001 * p.grad**2
                m = first[name] / (1 - 0.9 ** (step + 1))
                v = second[name] / (1 - 0.999 ** (step + 1))
                p -= rate * (m / (v.sqrt() + 1e-8) + (decay if name in decayed else 0.0) * p)


def test_trained_weights_equal_a_plain_loop_of_the_references_optimiser(tmp_path):
    task = get_task("logic", num_examples=4)
    torch.manual_seed(0)
    model = HylaForSequenceClassification(HylaConfig(**task.model_defaults, attention_dropout=0.0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases too, so that their decay shows
    by_hand = copy.deepcopy(model).train()
    trainer = make_trainer(tmp_path, task=task, model=model)
    decayed = set(trainer.get_decay_parameter_names(model))
    trainer.train()

    dataset = task.dataset("train")
    batches = [task.collate(dataset.__getitems__(range(8 * step, 8 * step + 8))) for step in range(6)]
    adamw_loop(by_hand, batches, decayed, lambda step: reference_schedule(step, 2, 6), peak=1e-2, decay=0.5)
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=name)


def test_the_first_update_does_not_change_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, warmup_steps=2)
    before = copy.deepcopy(trainer.model.state_dict())
    after_step: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            after_step.append(all(torch.equal(before[name], value) for name, value in model.state_dict().items()))

    trainer.add_callback(Watch)
    trainer.train()
    assert after_step == [True, False, False, False, False]


def test_a_run_shorter_than_its_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="larger than twice warmup_steps, got 4 and 2"):
        make_trainer(tmp_path, max_steps=4, warmup_steps=2).train()


def test_a_trainer_evaluates_before_it_trains(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.evaluate(get_task("logic", num_examples=4).dataset("test", 8))["eval_loss"] > 0


def test_a_loss_that_is_not_finite_stops_training_at_its_step(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The loss is nan in step 1"):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    trainer = make_trainer(tmp_path)
    weights = copy.deepcopy(trainer.model.state_dict())
    trainer.model.classifier.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"The norm of the gradient is .* in step 1:"):
        trainer.train()
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())


class SpoilLoss(TrainerCallback):
    """Makes the loss of one step, and of every later one, not a number."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.classifier.bias.fill_(float("nan"))


def test_the_failed_step_is_named_and_the_checkpoint_before_it_kept(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(SpoilLoss(4))
    with pytest.raises(
        FloatingPointError, match=r"The loss is nan in step 4:.*checkpoints before this step are intact"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert fault(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("looks", ["log", "_save_checkpoint"])
def test_the_step_is_named_even_if_an_accelerator_is_checked_rarely(tmp_path, monkeypatch, looks):
    monkeypatch.setattr("hf_hyla.training.guard._READ_AT_ONCE", ())
    settings = {"log": {"logging_steps": 5}, "_save_checkpoint": {"save_strategy": "steps", "save_steps": 5}}[looks]
    trainer = make_trainer(tmp_path, **settings)
    trainer.add_callback(SpoilLoss(3))
    with pytest.raises(FloatingPointError, match="The loss is nan in step 3:"):
        trainer.train()
    assert trainer.state.global_step == 5 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_weights_that_are_not_finite_are_never_saved_even_with_a_finite_loss(tmp_path, part):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=3, max_grad_norm=0.0)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            if state.global_step == 3:
                weight = model.classifier.weight
                spoilt = weight if part == "weight" else optimizer.state[weight]["exp_avg_sq"]
                with torch.no_grad():
                    spoilt.view(-1)[0] = float("inf")

    trainer.add_callback(Spoil)
    with pytest.raises(FloatingPointError, match="After step 3 a weight or a moment of the optimiser is not finite"):
        trainer.train()
    assert not list(tmp_path.iterdir())


def test_a_loss_that_grows_a_hundredfold_stops_training(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=100.0, logging_steps=1, max_steps=20)
    with pytest.raises(FloatingPointError, match=r"in step \d+, more than 100 times the .* of the first log entry"):
        trainer.train()


@pytest.mark.parametrize("name", ["logic", "sraven"])
def test_accumulating_four_batches_equals_one_large_batch(tmp_path, name):
    task = get_task(name)
    weights = []
    for batch, accumulation in ((32, 1), (8, 4)):
        torch.manual_seed(0)
        model = HylaForSequenceClassification(
            HylaConfig(**{**task.model_defaults, "num_hidden_layers": 1, "attention_dropout": 0.0})
        )
        trainer = make_trainer(
            tmp_path, task=task, model=model, max_steps=5, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, logging_steps=1,
        )  # fmt: skip
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        weights.append((norms, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-3)
    torch.testing.assert_close(weights[0][1], weights[1][1], atol=1e-3, rtol=1e-3)


def own_trainer(folder, **settings):
    """A trainer on samples of one's own, four classes by their first token, with nothing of a task."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 9, (32, 6), generator=draw)
    samples = [{"input_ids": row, "labels": row[0] % 4} for row in ids]
    arguments = {
        "max_steps": 8,
        "learning_rate": 1e-2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer_settings = {name: settings.pop(name) for name in list(settings) if name not in FIELDS}
    args = HylaTrainingArguments(
        str(folder), **{**arguments, "per_device_train_batch_size": 4, "remove_unused_columns": True, **settings}
    )
    torch.manual_seed(0)
    config = HylaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16, num_answers=1, num_labels=4
    )
    model = HylaForSequenceClassification(config)
    return HylaTrainer(model, args, train_dataset=samples, eval_dataset=samples[:10], **trainer_settings)


FIELDS = {field.name for field in dataclasses.fields(HylaTrainingArguments)}


def test_a_users_own_data_are_shuffled(tmp_path):
    trainer = own_trainer(tmp_path)
    drawn = torch.cat([batch["input_ids"] for batch in trainer.get_train_dataloader()])
    stored = torch.stack([sample["input_ids"] for sample in trainer.train_dataset])
    assert not torch.equal(drawn, stored) and torch.equal(drawn.unique(dim=0), stored.unique(dim=0))


@pytest.mark.parametrize("save_total_limit", [2, 3])
def test_the_best_weights_are_loaded_at_the_end_and_their_checkpoint_stays(tmp_path, save_total_limit):
    scores = iter([0.1, 0.9, 0.2, 0.3])
    trainer = own_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="score", save_total_limit=save_total_limit,
        compute_metrics=lambda prediction: {"score": next(scores)},
    )  # fmt: skip
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best) and fault(best) is None
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.state_dict().items())
    assert not all(
        torch.equal(value, saved[name])
        for name, value in load_file(tmp_path / "checkpoint-8/model.safetensors").items()
    )


def test_a_schedule_of_transformers_is_followed(tmp_path):
    trainer = own_trainer(tmp_path, lr_scheduler_type="constant", logging_steps=1)
    trainer.train()
    assert {entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry} == {1e-2}


def test_a_second_training_follows_the_schedule_from_its_beginning(tmp_path):
    trainer = own_trainer(tmp_path, warmup_steps=2, logging_steps=1)
    rates = []
    for _ in range(2):
        trainer.train()
        rates.append([entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry])
    assert rates[0] == rates[1] and len(set(rates[0])) > 3


def test_the_loss_of_an_evaluation_is_that_of_training(tmp_path):
    def loss_of_ones_own(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean() + 5

    trainer = own_trainer(tmp_path, compute_loss_func=loss_of_ones_own)
    logits = torch.from_numpy(trainer.predict(trainer.eval_dataset).predictions)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logits.square().mean().item() + 5, rel=1e-5)


def test_an_evaluation_may_reduce_logits_and_return_hidden_states(tmp_path):
    trainer = own_trainer(tmp_path, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (10,)
    trainer = own_trainer(tmp_path)
    trainer.model.config.output_hidden_states = True
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions[0].shape == (10, 4) and np.isfinite(output.metrics["test_loss"])


@pytest.mark.parametrize("first", [-3.0, 0.0])
def test_a_loss_that_begins_at_zero_or_below_does_not_count_as_divergence(tmp_path, first):
    steps = itertools.count()

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum() * 0 + first + next(steps)

    trainer = own_trainer(tmp_path, compute_loss_func=loss, logging_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [first + step for step in range(8)]


def test_checkpoints_are_ordered_by_their_steps(tmp_path):
    for step in (8, 9, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if step != 100:
            seal(folder)
    assert newest_whole(tmp_path).name == "checkpoint-10"
    checkpoint, said = last_whole(tmp_path)
    assert checkpoint.name == "checkpoint-10" and "checkpoint-100 is damaged" in said[0]


@pytest.mark.parametrize("content", ["{}", '{"model.safetensors": {"size": 1, "sha256": ""}}'])
def test_a_checkpoint_whose_seal_leaves_files_out_is_not_whole(tmp_path, content):
    (tmp_path / "seal.json").write_text(content)
    assert fault(tmp_path) == "has a seal.json that leaves out trainer_state.json"


@pytest.mark.parametrize(
    "optim", [{"optim": "sgd"}, {"optim": "adafactor"}, {"optim": "muon", "muon_learning_rate": 1e-2}]
)
def test_resuming_with_another_optimiser_is_refused_before_a_step(tmp_path, optim):
    own_trainer(tmp_path, save_strategy="steps", save_steps=8).train()
    resumed = own_trainer(tmp_path, max_steps=9, **optim)
    with pytest.raises(ValueError, match=r"checkpoint-8 does not fit this one \([^\n]+ load the weights there"):
        resumed.train(resume_from_checkpoint=True)


def test_resuming_takes_the_last_whole_checkpoint_and_leaves_those_of_other_trainers(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 4, "logging_steps": 3}
    whole = own_trainer(tmp_path / "a", **settings)
    whole.train()
    expected = copy.deepcopy(whole.model.state_dict())
    (tmp_path / "a/checkpoint-8/seal.json").unlink()
    (tmp_path / "a/checkpoint-6/optimizer.pt").write_bytes(b"")
    resumed = own_trainer(tmp_path / "a", **settings)
    steps = []
    resumed.add_callback(OnStep(lambda state: steps.append(state.global_step)))
    resumed.train(resume_from_checkpoint=True)
    assert steps == [5, 6, 7, 8]
    assert all(torch.equal(expected[name], value) for name, value in resumed.model.state_dict().items())

    for seal_file in (tmp_path / "a").glob("*/seal.json"):
        seal_file.unlink()
    failing = own_trainer(tmp_path / "a", **settings)
    with pytest.raises(ValueError, match="holds no whole checkpoint of a HylaTrainer"):
        failing.train(resume_from_checkpoint=True)
    failing.add_callback(OnStep(lambda state: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        failing.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-6"))
    assert len(list((tmp_path / "a").iterdir())) == 4


def test_weights_that_a_user_saves_are_no_checkpoint(tmp_path):
    trainer = own_trainer(tmp_path / "a", max_steps=4, save_strategy="steps", save_steps=2)

    class Latest(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            trainer.save_model(str(tmp_path / "latest"))

    trainer.callback_handler.callbacks.insert(0, Latest())  # before those that seal
    trainer.train()
    assert not (tmp_path / "latest/seal.json").exists()
    assert all(fault(tmp_path / f"a/checkpoint-{step}") is None for step in (2, 4))
    mine = tmp_path / "mine/checkpoint-4"
    trainer.save_model(str(mine))
    with pytest.raises(ValueError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    assert (mine / "model.safetensors").exists()


class OnStep(TrainerCallback):
    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state)


def test_an_error_while_saving_that_is_not_the_disks_is_raised_unchanged(tmp_path, monkeypatch):
    trainer = own_trainer(tmp_path, save_strategy="steps", save_steps=2)
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not list(tmp_path.iterdir())
