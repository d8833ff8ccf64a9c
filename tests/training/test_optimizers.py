"""Tests of Muon and AdamW as one optimiser, compared with plain loops: updates, parameters, state, schedule, refusals."""

import copy
import io
import math
import re

import pytest
import torch
from forks import on_ranks
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Muon
from training_helpers import make_trainer

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.model.layers_hyla import HylaLayer
from hf_hyla.tasks import get_task
from hf_hyla.training import HylaTrainer, HylaTrainingArguments
from hf_hyla.training.optimizers import StackedMuon, muon_parameters


MUON = {"optim": "muon", "muon_learning_rate": 2e-2}
LINEAR_MAPS = re.compile(r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(up|down|gate)_proj)\.weight")
KINDS = {
    "hyla": {},
    "softmax": {"attention_type": "softmax"},
    "linear": {"attention_type": "linear"},
    "swiglu": {"ffn_type": "swiglu", "norm_type": "rms_norm"},
    "mixture": {"ffn_type": "moe"},
    "deep values": {"value_depth": 2, "qk_norm": True},
    "input_values": {},
}


@pytest.fixture
def exact(monkeypatch):
    """Muon's orthogonalisation in the precision of its gradients: torch rounds them to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def task_of(kind):
    return get_task("logic", num_examples=4) if kind == "input_values" else get_task("sraven", num_features=2)


def model_of(kind, dropout=0.0, scale=0.1):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    settings = {**task_of(kind).model_defaults, **sizes, "attention_dropout": dropout, **KINDS[kind]}
    model = HylaForSequenceClassification(HylaConfig(**settings)).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))  # biases too, so that their decay shows
    return model


def batches_of(kind, number, dtype=torch.float32):
    task, dataset = task_of(kind), task_of(kind).dataset("train")
    batches = [task.collate(dataset.__getitems__(range(8 * step, 8 * step + 8))) for step in range(number)]
    return [
        {key: value.to(dtype) if torch.is_floating_point(value) else value for key, value in batch.items()}
        for batch in batches
    ]


def update(model, batch, optimizer, scheduler=None):
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def orthogonalised(matrix):
    """Five times the odd polynomial of Newton and Schulz, on the singular values."""
    u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def plain_loop(model, batches, decayed, schedule, rates, decay):
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = copy.deepcopy(momentum)
    for step, batch in enumerate(batches):
        model.zero_grad()
        model(**batch).loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if LINEAR_MAPS.fullmatch(name):
                    rate = schedule(step) * rates["qk" if "q_proj" in name or "k_proj" in name else "muon"]
                    momentum[name] = 0.95 * momentum[name] + 0.05 * p.grad
                    direction = orthogonalised(0.05 * p.grad + 0.95 * momentum[name])
                    p *= 1 - rate * decay
                    p -= rate * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * direction
                else:
                    rate = schedule(step) * rates["adamw"]
                    momentum[name] = 0.8 * momentum[name] + 0.2 * p.grad
                    second[name] = 0.99 * second[name] + 0.01 * p.grad**2
                    m, v = momentum[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.99 ** (step + 1))
                    p *= 1 - rate * (decay if name in decayed else 0.0)
                    p -= rate * m / (v.sqrt() + 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_equal_a_plain_loop_of_muon_and_adamw(tmp_path, exact, kind):
    model = model_of(kind).double()
    by_hand = copy.deepcopy(model)
    batches = batches_of(kind, 5, torch.float64)
    trainer = make_trainer(
        tmp_path, task=task_of(kind), model=model, **MUON, muon_learning_rate_qk=1e-2, learning_rate=3e-3,
        weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-7, schedule_floor=0.0,
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    for batch in batches:
        update(model, batch, trainer.optimizer, trainer.lr_scheduler)
    # Warm-up over two steps, and a cosine to nought over two more.
    plain_loop(
        by_hand, batches, set(trainer.get_decay_parameter_names(by_hand)), [0.0, 0.5, 1.0, 0.5, 0.0].__getitem__,
        rates={"muon": 2e-2, "qk": 1e-2, "adamw": 3e-3}, decay=0.5,
    )  # fmt: skip
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_taken_once_and_the_linear_maps_of_layers_by_muon(tmp_path, kind):
    model = model_of(kind)
    optimizer = make_trainer(tmp_path, task=task_of(kind), model=model, **MUON).create_optimizer()
    names = {p: name for name, p in model.named_parameters()}
    taken = [(names[p], group["algorithm"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in taken) == sorted(names.values())
    by_muon = {name for name, algorithm in taken if algorithm == "muon"}
    assert by_muon == {name for name in names.values() if LINEAR_MAPS.fullmatch(name)}
    assert len(by_muon) == 2 * {"mixture": 4, "swiglu": 7}.get(kind, 6)


def test_one_schedule_moves_all_rates_and_logs_adamws(tmp_path):
    trainer = make_trainer(
        tmp_path, **MUON, muon_learning_rate_qk=1e-2, learning_rate=3e-3, schedule_floor=0.25, logging_steps=1
    )
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [3e-3, 3e-3, 2e-2, 1e-2]
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([0.25 * rate for rate in (3e-3, 3e-3, 2e-2, 1e-2)])
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([3e-3 * share for share in (0, 0.5, 1, 0.625, 0.25, 0.25)])


@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [("polynomial", {"lr_end": 1e-3, "power": 1.0}, 1 / 3), ("cosine_with_min_lr", {"min_lr": 1e-3}, 1 / 3)],
)
def test_a_schedule_that_ends_at_a_rate_takes_it_for_adamws_and_muon_follows(tmp_path, name, settings, share):
    schedule = {"lr_scheduler_type": name, "lr_scheduler_kwargs": settings, "warmup_steps": 0}
    trainer = make_trainer(tmp_path, **MUON, learning_rate=3e-3, **schedule)
    trainer.train()
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([share * rate for rate in (3e-3, 3e-3, 2e-2, 2e-2)])


def test_a_matrix_that_two_layers_share_is_taken_once(tmp_path):
    model = model_of("hyla")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    optimizer = make_trainer(tmp_path, task=task_of("hyla"), model=model, **MUON).create_optimizer()
    taken = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(taken) == len(set(map(id, taken))) == len(list(model.parameters()))


def test_queries_and_keys_have_muons_rate_by_default(tmp_path):
    optimizer = make_trainer(tmp_path, **MUON).create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups if group["algorithm"] == "muon"} == {2e-2}


def test_a_loaded_state_continues_with_the_same_bits(tmp_path):
    model, batches = model_of("hyla"), batches_of("hyla", 5)
    optimizer = make_trainer(tmp_path, task=task_of("hyla"), model=model, **MUON).create_optimizer()
    for batch in batches[:3]:
        update(model, batch, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    loaded = make_trainer(tmp_path, task=task_of("hyla"), model=other, **{**MUON, "muon_learning_rate": 1.0})
    loaded.create_optimizer().load_state_dict(torch.load(file, weights_only=True))
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    for batch in batches[3:]:
        update(model, batch, optimizer)
        update(other, batch, loaded.optimizer)
        update(copied, batch, copied_optimizer)
    assert torch.equal(weights_of(model), weights_of(other))
    assert torch.equal(weights_of(model), weights_of(copied))
    state = [value for part in optimizer.state.values() for value in part.values()]
    other_state = [value for part in loaded.optimizer.state.values() for value in part.values()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(state, other_state, strict=True))


def test_a_closure_is_called_once_with_gradients_and_its_loss_is_returned(tmp_path):
    model, (batch,) = model_of("hyla"), batches_of("hyla", 1)
    other = copy.deepcopy(model)
    optimizer, expected = (
        make_trainer(tmp_path, task=task_of("hyla"), model=one, **MUON).create_optimizer() for one in (model, other)
    )
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0] and len(losses) == 1
    update(other, batch, expected)
    assert torch.equal(weights_of(model), weights_of(other))


def test_scaled_gradients_are_unscaled_and_those_that_are_not_finite_skipped(tmp_path):
    model, batches = model_of("hyla"), batches_of("hyla", 2)
    other = copy.deepcopy(model)
    optimizer, expected = (
        make_trainer(tmp_path, task=task_of("hyla"), model=one, **MUON).create_optimizer() for one in (model, other)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for spoilt in (False, True):
        optimizer.zero_grad()
        scaler.scale(model(**batches[0]).loss).backward()
        if spoilt:
            model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    update(other, batches[0], expected)
    assert torch.equal(weights_of(model), weights_of(other))  # a power of two rounds nothing
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("part", ["exp_avg_sq", "momentum_buffer"])
def test_a_moment_of_either_part_that_is_not_finite_is_never_saved(tmp_path, part):
    trainer = make_trainer(tmp_path, **MUON, save_strategy="steps", save_steps=3)
    step = trainer.training_step

    def spoiling(*args, **kwargs):
        if trainer.state.global_step == 2:
            moment = next(state[part] for state in trainer.optimizer.state.values() if part in state)
            moment.view(-1)[0] = float("inf")
        return step(*args, **kwargs)

    trainer.training_step = spoiling
    with pytest.raises(FloatingPointError, match="After step 3 a weight or a moment of the optimiser is not finite"):
        trainer.train()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["hyla", "input_values"])
def test_accumulating_batches_equals_one_large_batch(tmp_path, exact, kind):
    weights, norms = [], []
    for batch, accumulation in ((8, 1), (4, 2)):
        model = model_of(kind, scale=0.0)
        trainer = make_trainer(
            tmp_path, task=task_of(kind), model=model, **MUON, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, logging_steps=1,
        )  # fmt: skip
        trainer.train()
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        weights.append(weights_of(model))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    torch.testing.assert_close(*weights, atol=1e-3, rtol=1e-3)


def test_muon_takes_the_matrices_of_an_adapter_and_no_frozen_parameter(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(model_of("hyla"), lora)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = make_trainer(tmp_path, task=task_of("hyla"), model=model, **MUON, muon_learning_rate_qk=1e-2)
    groups = [[names[p] for p in group["params"]] for group in optimizer.create_optimizer().param_groups]
    assert {name for group in groups for name in group} == {names[p] for p in model.parameters() if p.requires_grad}
    adamw, muon, of_queries = [*groups[0], *groups[1]], groups[2], groups[3]
    assert all("classifier" in name for name in adamw) and len(adamw) == 2
    assert len(muon) == 4 and all("v_proj.lora_" in name for name in muon)
    assert len(of_queries) == 4 and all("q_proj.lora_" in name for name in of_queries)
    optimizer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"muon_learning_rate": 1e-3}, "muon_learning_rate belongs to optim 'muon', but optim is"),
        ({"muon_learning_rate_qk": 1e-3}, "muon_learning_rate_qk belongs to optim 'muon', but optim is"),
        ({"optim": "muon"}, "optim 'muon' needs muon_learning_rate"),
        ({"optim": "muon", "muon_learning_rate_qk": 1e-3}, "optim 'muon' needs muon_learning_rate"),
        ({**MUON, "optim_args": "momentum=0.9"}, "optim_args has no effect with optim 'muon'"),
        ({**MUON, "muon_learning_rate": -2e-2}, "muon_learning_rate must be a number of at least 0, got -0.02"),
        ({**MUON, "muon_learning_rate": "2e-2"}, "muon_learning_rate must be a number of at least 0, got '2e-2'"),
        ({**MUON, "muon_learning_rate_qk": math.nan}, "muon_learning_rate_qk must be a number of at least 0, got nan"),
        ({"schedule_floor": -0.1}, "schedule_floor must lie between 0 and 1, got -0.1"),
        ({"schedule_floor": 1.1}, "schedule_floor must lie between 0 and 1, got 1.1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        HylaTrainingArguments(output_dir=str(tmp_path), **settings)
    assert "\n" not in str(refused.value)


def test_a_model_without_layers_of_ours_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, model=torch.nn.Linear(3, 3), **MUON)
    with pytest.raises(ValueError, match="optim='muon' found no trained matrix inside a HylaLayer"):
        trainer.create_optimizer()


def test_a_group_without_an_algorithm_is_refused_and_one_with_it_trained(tmp_path):
    optimizer = make_trainer(tmp_path, **MUON).create_optimizer()
    more = torch.nn.Parameter(torch.ones(3))
    more.grad = torch.ones(3)
    with pytest.raises(ValueError, match="needs the key 'algorithm', which is 'muon' or 'adamw', got None"):
        optimizer.add_param_group({"params": [more]})
    with pytest.raises(ValueError, match=r"Muon takes matrices, got a parameter of the shape \(3,\)"):
        optimizer.add_param_group({"params": more, "algorithm": "muon"})
    optimizer.add_param_group({"params": [more], "algorithm": "adamw", "lr": 0.5, "weight_decay": 0.0})
    optimizer.step()
    torch.testing.assert_close(more.detach(), torch.full((3,), 0.5))


def test_an_optimizer_that_is_passed_takes_precedence_over_muon(tmp_path):
    trainer = make_trainer(tmp_path, **MUON)
    trainer.optimizer_cls_and_kwargs = (SGD, {"lr": 1.0})
    assert type(trainer.create_optimizer()) is SGD


def refused_for_shards(folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
    model = model_of("hyla")
    for layer in model.modules():
        if isinstance(layer, HylaLayer):
            fully_shard(layer)
    fully_shard(model)
    assert len(muon_parameters(model)) == 12
    make_trainer(folder, task=task_of("hyla"), model=model, **MUON).create_optimizer()


def test_sharded_parameters_are_refused(tmp_path):
    ((code, errors),) = on_ranks(tmp_path, lambda rank: refused_for_shards(tmp_path), 1)
    assert code == 99
    assert "ValueError: optim='muon' needs whole matrices, but FSDP" in errors.splitlines()[-1], errors


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_launch_with_sharding_is_refused_at_construction(tmp_path, monkeypatch, flag):
    create = HylaTrainer.create_accelerator_and_postprocess

    def sharding(self):  # which takes an accelerator
        create(self)
        setattr(self, flag, True)

    monkeypatch.setattr(HylaTrainer, "create_accelerator_and_postprocess", sharding)
    with pytest.raises(ValueError, match="needs whole matrices, but FSDP, DeepSpeed or a device mesh shards them"):
        make_trainer(tmp_path, **MUON)


def muon_steps(cls, state=None):
    """Weights and state after three steps on matrices of several shapes, one of which has no gradient in one step."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(16, 24), (24, 16), (16, 24), (16, 16), (24, 16), (16, 24)]
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    groups = [{"params": matrices[:4], "lr": 0.1}, {"params": matrices[4:], "lr": 0.3}]
    optimizer = cls(groups, weight_decay=0.2, momentum=0.95, adjust_lr_fn="original")
    if state:
        optimizer.load_state_dict(copy.deepcopy(state))
    for step in range(3):
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=draw)
        if step == 1:
            matrices[2].grad = None
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in matrices]), optimizer.state_dict()


def test_stacked_matrices_move_as_torchs_muon_moves_each(exact):
    (ours, state), (theirs, their_state) = muon_steps(StackedMuon), muon_steps(Muon)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (
        state["param_groups"] == their_state["param_groups"] and state["state"].keys() == their_state["state"].keys()
    )
    for number, values in their_state["state"].items():
        assert torch.equal(state["state"][number]["momentum_buffer"], values["momentum_buffer"])
    resumed, expected = muon_steps(StackedMuon, their_state)[0], muon_steps(Muon, their_state)[0]
    torch.testing.assert_close(resumed, expected, rtol=1e-5, atol=1e-5)


def test_stacked_matrices_move_as_torchs_to_the_rounding_of_bfloat16():
    ours, theirs = muon_steps(StackedMuon)[0], muon_steps(Muon)[0]
    # A direction has elements below 1, of which bfloat16 keeps 8 bits; three steps at a rate of 0.3 and less.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3 * 0.3 * 2**-7)
