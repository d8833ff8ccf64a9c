"""Whole training steps, their matrix products alone, and the drawing of their data."""

import copy
import itertools
import tempfile
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, set_seed

from ..tasks import Task
from ..training import HylaTrainer, Recipe, load_recipe
from ..training.graphs import WARM_UP_CALLS, GraphedStep
from ..utils import recipes_folder
from .data import data_throughput
from .meter import SEED, Meter, Workload, in_a_line
from .products import LinearShape, fastest_products, linear_shapes, size_of_linear_layers


def measure_steps(meter: Meter, name: str, batch_size: int, overrides: dict[str, str] | None) -> None:
    """Times the training steps of a task's HYLA and softmax recipes, and the matrix products of the HYLA step."""
    recipe, softmax = (
        load_recipe(recipes_folder() / name / f"{kind}.yaml", overrides) for kind in ("hyla", "softmax")
    )
    with tempfile.TemporaryDirectory() as folder:
        step = partial(_TrainingStep, folder=folder, batch_size=batch_size)
        first = step(recipe, "hyla")
        workloads: dict[str, Workload] = {
            "eager": step(recipe, "eager"),
            "eager, answers only": step(recipe, "eager", answers_only=True),
            "hyla": first,
            "softmax": step(softmax, "hyla"),
        }
        prepared = {"hyla, compiled": step(recipe, "hyla", compiled=True)}
        if meter.device.type == "cuda":
            prepared["hyla, CUDA graphs"] = step(recipe, "hyla", cuda_graphs=True)
        for subject, workload in prepared.items():
            meter.say(f"{name}: compiles or records the step of {subject!r}")
            try:
                for _ in range(WARM_UP_CALLS + 1):
                    workload()
                workloads[subject] = workload
            except Exception as error:  # compilers raise errors of any type, for example without a C++ compiler
                meter.skip(f"{name}, {subject}", in_a_line(error))
        meter.say(f"{name}: measures the fastest path of each matrix product")
        shapes = first.linear_shapes()
        workloads["matrix products"], implementations = fastest_products(shapes, meter.device)
        matrix = torch.randn(1024, 1024, device=meter.device)
        workloads["at the rate of 1024"] = partial(torch.mm, matrix, matrix)
        all_tokens = first.flop_of_all_tokens()
        rows = meter.compare(
            workloads,
            against=("eager", "eager, answers only", "hyla", "softmax", "matrix products", "at the rate of 1024"),
            factors={"at the rate of 1024": all_tokens / (2 * 1024**3)},
            facts={"part": name, "work": f"training step of {batch_size}"},
        )
        notes: dict[str, dict[str, Any]] = {
            "matrix products": {"flop": sum(shape.flop for shape in shapes), "implementations": implementations},
            "at the rate of 1024": {"flop": all_tokens},
            "hyla, CUDA graphs": {},  # a graph keeps its memory between the steps
        }
        for subject in notes.keys() & rows.keys():
            rows[subject] |= {"peak_bytes": None, **notes[subject]}


class _TrainingStep:
    """
    Every call is one step of a recipe's training, with the next batch: forward, loss, backward and the recipe's optimiser.

    The eager implementation computes all tokens of the last layer. With `answers_only` it computes only those that are read,
    as the other implementations do.
    """

    def __init__(
        self,
        recipe: Recipe,
        implementation: str,
        *,
        folder: str,
        batch_size: int,
        compiled: bool = False,
        cuda_graphs: bool = False,
        answers_only: bool = False,
    ):
        set_seed(SEED)
        # Each step has a config of its own, since layers look up their implementation there in every call.
        config = copy.deepcopy(recipe.config)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
        if answers_only:
            model.model.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"num_last": config.num_answers}), with_kwargs=True
            )
        args = recipe.training_arguments(folder, eval_strategy="no", report_to="none")
        trainer = HylaTrainer(model=model, args=args)
        self._optimizer = trainer.create_optimizer()
        self._device, self._batch_size = trainer.args.device, batch_size
        batches = _batches(recipe.task, batch_size)
        self._tokens = batch_size * batches[0][recipe.task.model_columns[0]].shape[1]
        self._batches = itertools.cycle(batches)
        self._uncompiled = model.train()
        self._model: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
        self._graphed = GraphedStep(_forward_and_backward) if cuda_graphs else _forward_and_backward

    def __call__(self) -> None:
        self._graphed(self._model, self._batch(), None)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _batch(self) -> dict[str, torch.Tensor]:
        return {name: column.to(self._device) for name, column in next(self._batches).items()}

    def linear_shapes(self) -> list[LinearShape]:
        """The shape of every call of a linear layer in a step."""
        return linear_shapes(self._uncompiled, self._batch())

    def flop_of_all_tokens(self) -> int:
        """
        Floating-point operations of a step's products with weights, if all layers computed all tokens. Every linear layer has
        one product in the forward and two in the backward. The default computes fewer tokens.
        """
        model = self._uncompiled
        answers = self._batch_size * model.config.num_answers
        return 6 * (
            size_of_linear_layers(model.model) * self._tokens + size_of_linear_layers(model.classifier) * answers
        )


def _forward_and_backward(model: nn.Module, batch: dict[str, torch.Tensor], num_items) -> torch.Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def _batches(task: Task, batch_size: int) -> list[dict[str, torch.Tensor]]:
    dataset = task.dataset("train")
    return [task.collate(dataset.__getitems__(range(n * batch_size, (n + 1) * batch_size))) for n in range(8)]


def measure_data(meter: Meter, name: str, batch_size: int, overrides: dict[str, str] | None) -> None:
    """Measures how fast a task's data are drawn, beside the training step that they are for."""
    recipe = load_recipe(recipes_folder() / name / "hyla.yaml", overrides)
    facts = {"part": "data", "work": f"{name}, batch of {batch_size}"}
    with tempfile.TemporaryDirectory() as folder:
        step = _TrainingStep(recipe, "hyla", folder=folder, batch_size=batch_size)
        rows = meter.compare({"training step": step}, against=(), facts=facts)
    found = data_throughput(recipe.task, batch_size)
    for order in ("sequential", "shuffled"):
        seconds = batch_size / found[order]
        meter.rows.append({
            **facts,
            "subject": order,
            "seconds": seconds,
            "quartiles": None,
            "repeats": found["batches"],
            "peak_bytes": None,
            "ratios": {subject: seconds / row["seconds"] for subject, row in rows.items()},
            "samples_per_second": found[order],
        })  # fmt: skip
