"""The optimiser's groups, the learning-rate curve and the update, against the reference's rules written out."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.tasks import get_task
from hf_hyla.training import HylaTrainer, HylaTrainingArguments
from hf_hyla.training.checkpoint import fault
from hf_hyla.training.trainer import reference_schedule


def make_trainer(folder, task=None, model=None, **arguments):
    task = task or get_task("logic", num_examples=4)
    model = model or HylaForSequenceClassification(HylaConfig(**task.model_defaults))
    defaults = {"max_steps": 6, "warmup_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.5, "eval_strategy": "no",
                "save_strategy": "no", "per_device_train_batch_size": 8, "disable_tqdm": True}  # fmt: skip
    args = HylaTrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return HylaTrainer(model=model, args=args, train_dataset=task.dataset("train"), data_collator=task.collate)


def test_schedule_has_the_references_shape():
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


def test_decayed_are_the_parameters_that_the_reference_stores_with_more_than_one_axis(tmp_path):
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


def test_the_first_update_moves_nothing(tmp_path):
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


def test_the_step_at_fault_is_named_and_the_checkpoint_before_it_kept(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(SpoilLoss(4))
    with pytest.raises(
        FloatingPointError, match=r"The loss is nan in step 4:.*checkpoints before this step are intact"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert fault(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("looks", ["log", "_save_checkpoint"])
def test_an_accelerator_is_asked_seldom_and_names_the_step_all_the_same(tmp_path, monkeypatch, looks):
    monkeypatch.setattr("hf_hyla.training.trainer._READ_AT_ONCE", ())
    settings = {"log": {"logging_steps": 5}, "_save_checkpoint": {"save_strategy": "steps", "save_steps": 5}}[looks]
    trainer = make_trainer(tmp_path, **settings)
    trainer.add_callback(SpoilLoss(3))
    with pytest.raises(FloatingPointError, match="The loss is nan in step 3:"):
        trainer.train()
    assert trainer.state.global_step == 5 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_what_is_not_finite_is_never_saved_even_with_a_finite_loss(tmp_path, part):
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
