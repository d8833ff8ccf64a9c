"""Tests of training steps as CUDA graphs: on a GPU where there is one, and by a recording of torch's operations elsewhere."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import make_trainer

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.tasks import get_task
from hf_hyla.training import HylaTrainer, HylaTrainingArguments
from hf_hyla.training.graphs import WARM_UP_CALLS, GraphedStep, Recorded


class Operations(TorchDispatchMode):
    """
    Stands for `torch.cuda.CUDAGraph` on a CPU. It records the operations of a block and undoes them, and its `replay` computes
    them again in the same tensors.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.replays = [], [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        written = [arg for arg in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(arg)]
        if function._schema.is_mutable:
            self.before += [(tensor, tensor.clone()) for tensor in written]
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(*map(torch.utils._pytree.tree_leaves, (result, again)), strict=True):
                    if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are recorded, on a machine that is taken to have a GPU."""
    made = []

    @contextlib.contextmanager
    def record(graph, stream, capture_error_mode):
        made.append(graph)
        state = torch.get_rng_state()
        with graph:
            yield
        torch.set_rng_state(state)
        for tensor, value in reversed(graph.before):
            tensor.data.copy_(value)

    class Stream:
        def wait_stream(self, other): ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Operations)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


def test_the_first_calls_are_computed_as_usual_and_the_later_ones_replayed(graphs):
    recorded, x, calls = Recorded(), torch.zeros(3), []

    def work():
        calls.append(1)
        return x * 2

    for step in range(WARM_UP_CALLS + 4):
        x.fill_(step)
        assert recorded(work, [x]).tolist() == [2 * step] * 3
    assert len(calls) == WARM_UP_CALLS + 1
    assert [graph.replays for graph in graphs] == [4]


def test_other_tensors_are_computed_as_usual(graphs):
    recorded, x = Recorded(), torch.ones(3)
    for _ in range(WARM_UP_CALLS + 2):
        recorded(lambda: x * 2, [x])
    other = torch.full((3,), 5.0)
    assert recorded(lambda: other * 2, [other]).tolist() == [10.0] * 3
    x.fill_(7)
    assert recorded(lambda: x * 2, [x]).tolist() == [14.0] * 3
    assert [graph.replays for graph in graphs] == [3]


def test_tensors_that_have_moved_for_good_are_recorded_again(graphs):
    recorded, x = Recorded(), torch.ones(3)
    for _ in range(WARM_UP_CALLS + 2):
        recorded(lambda: x * 2, [x])
    x.data = torch.full((3,), 5.0)
    for _ in range(WARM_UP_CALLS + 2):
        assert recorded(lambda: x * 2, [x]).tolist() == [10.0] * 3
    assert [graph.replays for graph in graphs] == [2, 2]


def test_work_that_cannot_be_recorded_is_named(graphs, monkeypatch):
    @contextlib.contextmanager
    def refuse(graph, stream, capture_error_mode):
        yield
        raise RuntimeError(
            "CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA."
        )

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    recorded, x = Recorded(), torch.ones(3)
    for _ in range(WARM_UP_CALLS):
        recorded(lambda: x * 2, [x])
    with pytest.raises(RuntimeError, match=r"could not be recorded as a CUDA graph .*: leave cuda_graphs out\.$"):
        recorded(lambda: x * 2, [x])


def small(dropout, implementation="eager"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = HylaConfig(**{**get_task("sraven", num_features=2).model_defaults, **sizes, "attention_dropout": dropout})
    return HylaForSequenceClassification._from_config(config, attn_implementation=implementation).train()


def trained(folder, graphed, steps=12, sizes=(8,), device="cpu", **settings):
    """Losses and weights after some steps of a trainer, with batches of these sizes in turn."""
    task = get_task("sraven", num_features=2)
    dataset = task.dataset("train")
    model = small(settings.pop("dropout", 0.1), "eager" if device == "cpu" else "hyla").to(device)
    trainer = make_trainer(folder, model=model, use_cpu=device == "cpu", **settings)
    trainer._graphed = GraphedStep(super(HylaTrainer, trainer).training_step) if graphed else None
    optimizer = trainer.create_optimizer()
    if graphed and hasattr(optimizer, "_parts"):
        optimizer._parts["muon"].recorded = Recorded()
    losses, first = [], 0
    torch.manual_seed(1)
    for step in range(steps):
        size = sizes[step % len(sizes)]
        batch = {
            name: t.to(device) for name, t in task.collate(dataset.__getitems__(range(first, first + size))).items()
        }
        losses.append(trainer.training_step(model, batch, batch["labels"].ne(-100).sum()).item())
        optimizer.step()
        model.zero_grad()
        first += size
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


MUON = {"optim": "muon", "muon_learning_rate": 1e-2}


@pytest.mark.parametrize("settings", [{}, MUON, {"bf16": True}], ids=["adamw", "muon", "bf16"])
def test_a_replayed_step_trains_as_a_usual_one(tmp_path, graphs, settings):
    losses, weights = trained(tmp_path, graphed=False, **settings)
    replayed, found = trained(tmp_path, graphed=True, **settings)
    assert replayed == losses
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert graphs[0].replays == 12 - WARM_UP_CALLS
    # Gradients lie in the same places from the first replay on. Muon needs some calls of its own then.
    assert len(graphs) == 1 or graphs[1].replays >= 12 - 2 * WARM_UP_CALLS
    assert len(graphs) == (2 if "optim" in settings else 1)


def test_a_batch_of_another_shape_is_computed_as_usual(tmp_path, graphs):
    losses, weights = trained(tmp_path, graphed=False, sizes=(8, 8, 5), **MUON)
    replayed, found = trained(tmp_path, graphed=True, sizes=(8, 8, 5), **MUON)
    assert replayed == losses
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert graphs[0].replays == 12 - 12 // 3 - WARM_UP_CALLS


def test_another_model_is_recorded_anew(graphs):
    step = GraphedStep(lambda model, batch, num_items: (loss := model(**batch).loss).backward() or loss.detach())
    task = get_task("sraven", num_features=2)
    batch = task.collate(task.dataset("train").__getitems__(range(8)))
    for seed in (0, 1):
        model = small(0.0)
        with torch.no_grad():
            model.classifier.weight.add_(seed)
        expected = model(**batch).loss
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        for _ in range(WARM_UP_CALLS + 3):
            model.zero_grad()
            assert torch.equal(step(model, batch, None), expected)
            assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert [graph.replays for graph in graphs] == [3, 3]


def test_a_batch_that_is_not_of_tensors_is_refused(graphs):
    step = GraphedStep(lambda model, batch, num_items: model(**batch).loss)
    with pytest.raises(ValueError, match="cuda_graphs needs batches of tensors, but names is of type list: leave"):
        step(small(0.0), {"input_ids": torch.zeros(2, 3), "names": ["a", "b"]}, None)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("gradient_accumulation_steps", 2),
        ("auto_find_batch_size", True),
        ("torch_empty_cache_steps", 3),
        ("gradient_checkpointing", True),
        ("full_determinism", True),
        ("torch_compile_mode", "reduce-overhead"),
        ("torch_compile_backend", "cudagraphs"),
        ("optim", "schedule_free_adamw"),
    ],
)
def test_settings_that_a_recorded_step_would_not_follow_are_refused(tmp_path, setting, value):
    with pytest.raises(
        ValueError, match=rf"replays it, which {setting} '?{value}'? does not allow: leave one of them out\."
    ):
        HylaTrainingArguments(output_dir=tmp_path, cuda_graphs=True, **{setting: value})


def test_refused_without_a_gpu_and_with_accumulation_by_another_name(tmp_path):
    with pytest.raises(ValueError, match="cuda_graphs needs an NVIDIA GPU, but training is on the cpu"):
        make_trainer(tmp_path, model=small(0.0), cuda_graphs=True, use_cpu=True)
    accumulating = {"gradient_accumulation_kwargs": {"num_steps": 4}}
    with pytest.raises(ValueError, match="which gradient_accumulation_steps 4 does not allow"):
        make_trainer(tmp_path, model=small(0.0), cuda_graphs=True, use_cpu=True, accelerator_config=accumulating)


def test_the_loss_of_routers_is_refused(tmp_path):
    model = small(0.0)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="cuda_graphs cannot record the load-balancing loss of a mixture of experts"):
        make_trainer(tmp_path, model=model, cuda_graphs=True, use_cpu=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    @pytest.mark.parametrize(
        "settings", [{"dropout": 0.0}, {"dropout": 0.1}, {**MUON, "dropout": 0.0}, {"bf16": True}], ids=str
    )
    def test_a_replayed_step_trains_as_a_usual_one(self, tmp_path, settings):
        runs = [trained(tmp_path, graphed, steps=30, device="cuda", **settings) for graphed in (False, True, False)]
        (losses, _), (replayed, _), (again, _) = runs
        between = lambda some, others: max(abs(a - b) for a, b in zip(some, others, strict=True))  # noqa: E731
        # Sums on a GPU have no fixed order.
        assert between(losses, replayed) <= max(2e-5 if "bf16" not in settings else 5e-3, 4 * between(losses, again))

    def test_trained_by_the_trainer(self, tmp_path):
        task = get_task("sraven", num_features=2)
        found = []
        for graphed in (False, True):
            args = HylaTrainingArguments(
                output_dir=tmp_path / str(graphed), cuda_graphs=graphed, max_steps=20, warmup_steps=2, learning_rate=1e-3,
                per_device_train_batch_size=16, save_strategy="no", eval_strategy="no", logging_steps=1, **MUON,
            )  # fmt: skip
            trainer = HylaTrainer(
                small(0.0, "hyla"), args, train_dataset=task.dataset("train"), data_collator=task.collate
            )
            trainer.train()
            found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert found[0] == pytest.approx(found[1], abs=2e-3)
