"""Whole training steps, the matrix products in them, and the drawing of their data."""

import copy
import itertools
import tempfile
from functools import partial

import torch
from torch import nn
from transformers import set_seed

from ..model.modeling_hyla import HylaForSequenceClassification
from ..tasks import Task
from ..tasks.throughput import data_throughput
from ..training import HylaTrainer, HylaTrainingArguments, Recipe, load_recipe
from .meter import SEED, Meter, Work, in_a_line


def measure_steps(meter: Meter, name: str, batch_size: int, overrides: dict[str, str] | None) -> None:
    recipe, softmax = (load_recipe(f"recipes/{name}/{kind}.yaml", overrides) for kind in ("hyla", "softmax"))
    with tempfile.TemporaryDirectory() as folder:
        step = partial(_TrainingStep, folder=folder, batch_size=batch_size)
        first = step(recipe, "hyla")
        works: dict[str, Work] = {
            "eager": step(recipe, "eager"),
            "eager, answers only": step(recipe, "eager", answers_only=True),
            "hyla": first,
            "softmax": step(softmax, "hyla"),
        }
        modes = {"hyla, compiled": "default"}
        if meter.device.type == "cuda":
            modes["hyla, CUDA graphs"] = "reduce-overhead"
        for subject, mode in modes.items():
            meter.say(f"{name}: compiles the step of {subject!r}")
            compiled = step(recipe, "hyla", compile_mode=mode)
            try:
                compiled()
                works[subject] = compiled
            except Exception as error:  # such as where there is no C++ compiler; compilers raise what they like
                meter.skip(f"{name}, {subject}", in_a_line(error))
        matrix = torch.randn(1024, 1024, device=meter.device)
        works["matrix products"] = partial(torch.mm, matrix, matrix)
        rows = meter.compare(
            works,
            against=("eager", "eager, answers only", "hyla", "softmax", "matrix products"),
            factors={"matrix products": first.matrix_flop / (2 * 1024**3)},
            facts={"part": name, "work": f"training step of {batch_size}"},
        )
        rows["matrix products"] |= {"peak_bytes": None, "flop": first.matrix_flop}


class _TrainingStep:
    """
    A step of a recipe's training, each with another batch: forward, loss, backward and the recipe's optimiser. The eager form
    computes all tokens of the last layer; with `answers_only` those that are read, as the others do.
    """

    def __init__(
        self,
        recipe: Recipe,
        implementation: str,
        *,
        folder: str,
        batch_size: int,
        compile_mode: str | None = None,
        answers_only: bool = False,
    ):
        set_seed(SEED)
        # A config of its own: the implementation is noted there, and layers look it up at every call.
        config = copy.deepcopy(recipe.config)
        model = HylaForSequenceClassification._from_config(config, attn_implementation=implementation)
        if answers_only:
            model._num_last = lambda *_: config.num_answers
        args = HylaTrainingArguments(
            **recipe.trainer | {"output_dir": folder, "eval_strategy": "no", "report_to": "none"}
        )
        trainer = HylaTrainer(model=model, args=args)
        self._optimizer = trainer.create_optimizer()
        self._device, self._batch_size = trainer.args.device, batch_size
        batches = _batches(recipe.task, batch_size)
        sequence = batches[0][recipe.task.model_columns[0]].shape[1]
        self.matrix_flop = _matrix_flop(model, batch_size * sequence, batch_size * recipe.config.num_answers)
        self._batches = itertools.cycle(batches)
        self._model = torch.compile(model.train(), mode=compile_mode) if compile_mode else model.train()

    def __call__(self) -> None:
        batch = {name: column.to(self._device) for name, column in next(self._batches).items()}
        self._model(**batch).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def _batches(task: Task, batch_size: int) -> list[dict[str, torch.Tensor]]:
    dataset = task.dataset("train")
    return [task.collate(dataset.__getitems__(range(n * batch_size, (n + 1) * batch_size))) for n in range(8)]


def _matrix_flop(model: HylaForSequenceClassification, tokens: int, answers: int) -> int:
    """
    Floating-point operations of a step's products with weights: one product in the forward and two in the backward, two
    operations for each weight and token. Products within attention, of pairs of tokens, are not among them; those of the
    last layer are counted for all tokens, though only the eager form computes them.
    """
    weights = {
        part: sum(module.weight.numel() for module in part.modules() if isinstance(module, nn.Linear))
        for part in (model.model, model.classifier)
    }
    return 6 * (weights[model.model] * tokens + weights[model.classifier] * answers)


def measure_data(meter: Meter, name: str, batch_size: int, overrides: dict[str, str] | None) -> None:
    recipe = load_recipe(f"recipes/{name}/hyla.yaml", overrides)
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
