"""Answers per second, by the model alone and by the pipeline that takes puzzles and tables as lists."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import set_seed

from ..model.modeling_hyla import HylaForSequenceClassification
from ..model.pipeline_hyla import GRID, SymbolicReasoningPipeline
from ..training import Recipe, load_recipe
from ..utils import recipes_folder
from .meter import SEED, Meter, Workload


# Numbers of questions that are asked at once.
BATCHES = (1, 1024)


def measure_inference(meter: Meter, name: str, threads: int, overrides: dict[str, str] | None) -> None:
    """Times a recipe's untrained model, and the pipeline around it, with `threads` threads of the CPU."""
    recipe = load_recipe(recipes_folder() / name / "hyla.yaml", overrides)
    set_seed(SEED)
    model: Any = HylaForSequenceClassification(recipe.config)
    model.to(meter.device).eval()
    pipeline = SymbolicReasoningPipeline(model=model, device=meter.device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch_size in BATCHES:
            inputs, questions = _inputs(recipe, batch_size)
            inputs = {column: tensor.to(meter.device) for column, tensor in inputs.items()}
            workloads: dict[str, Workload] = {
                "model": torch.inference_mode()(partial(_logits, model, inputs)),
                "pipeline": partial(pipeline, questions, batch_size=batch_size),
            }
            on = f"{threads} {'thread' if threads == 1 else 'threads'}"
            facts: dict[str, Any] = {"part": "inference", "work": f"{name}, batch of {batch_size}, {on}"}
            for row in meter.compare(workloads, against=("model",), facts=facts).values():
                row["samples_per_second"] = batch_size / row["seconds"]
    finally:
        torch.set_num_threads(before)


def _logits(model: Callable, inputs: dict[str, torch.Tensor]) -> list:
    return model(**inputs).logits.tolist()


def _inputs(recipe: Recipe, batch_size: int) -> tuple[dict[str, torch.Tensor], list]:
    """The same samples twice: as tensors for the model, and as a list of puzzles or truth tables for the pipeline."""
    batch = recipe.task.collate(recipe.task.dataset("test").__getitems__(range(batch_size)))
    inputs = {column: batch[column] for column in recipe.task.model_columns if column in ("input_ids", "input_values")}
    (samples,) = inputs.values()
    if "input_ids" in inputs:
        questions = samples.reshape(batch_size, GRID, GRID, -1).tolist()
        for puzzle in questions:
            puzzle[-1][-1] = None
    else:
        questions = samples.tolist()
        for table in questions:
            table[-1][-1] = None
    return inputs, questions
