"""The latent codes of answer tokens, or of others, collected batch by batch; no attention tensor is kept."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from ..model.inputs_hyla import answer_states
from ..model.layers_hyla import HylaAttention
from ..model.modeling_hyla import HylaModel


# Entries of a batch that a model reads. The others describe the samples.
_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "input_values")

Batch = dict[str, torch.Tensor]


@dataclasses.dataclass
class Codes:
    """
    Attributes:
        codes: float32 (samples, layers, answers, keys, heads). Answers are the queries: the answer tokens, or those asked for.
        columns: the other entries of the batches, joined, such as labels, rules or terms.
    """

    codes: np.ndarray
    columns: dict[str, np.ndarray]

    def features(self, layer: int | None = None) -> np.ndarray:
        """
        Codes (samples · answers, keys · heads) of one layer, as probes read them. If `layer` is `None`, those of all layers
        side by side, (samples · answers, layers · keys · heads).
        """
        chosen = self.codes if layer is None else self.codes[:, [layer]]
        by_answer = chosen.transpose(0, 2, 1, 3, 4)
        return by_answer.reshape(by_answer.shape[0] * by_answer.shape[1], -1)


def collect_codes(
    model: nn.Module,
    batches: Iterable[Batch],
    keys: Callable[[Batch], torch.Tensor | None] | None = None,
    total: int | None = None,
    progress: bool = False,
    *,
    queries: Callable[[Batch], torch.Tensor] | None = None,
) -> Codes:
    """
    The latent codes between the answer tokens and some keys, in every layer (arXiv 2406.05816, section 2).

    The queries are the tokens that the classification head reads, the last `num_answers`, unless others are asked for. The result
    takes 4 · samples · layers · answers · keys · heads bytes, and up to twice as much while it grows. For 50,000 samples these are
    3 MB with the paper's fuzzy-logic model and 102 MB with its SRAVEN model. The full codes of one layer and one batch are in
    memory besides.

    Args:
        model: a `HylaModel`, or a model that holds one, of any attention type. It is run without dropout.
        batches: dicts with the model's inputs as tensors, and any other columns that numpy can make an array of. The first
            axis of each is that of the samples.
        keys: a function from a batch to the positions (batch, answers, keys) of its keys. If it is `None` or returns `None`,
            each query is its own key.
        total: number of batches, for the progress bar.
        progress: whether to show a progress bar.
        queries: a function from a batch to the positions (batch, answers) of its queries, such as tokens of a language model. If
            it is `None`, they are the answer tokens.

    Raises:
        ValueError: if the model has no attention of this family, there are no batches, or a column changes its shape.
    """
    kept = _Rows("the codes")
    columns: dict[str, _Rows] = {}
    for batch in tqdm(batches, total=total, desc="Collecting codes", disable=not progress):
        at_queries = queries(batch) if queries else _answer_positions(model, batch)
        asked = keys(batch) if keys else None
        at_keys = at_queries.unsqueeze(-1) if asked is None else asked
        picked: list[torch.Tensor] = []

        def pick(layer: int, codes: torch.Tensor, picked=picked, at_queries=at_queries, at_keys=at_keys) -> None:
            sample = torch.arange(len(codes))[:, None, None]
            picked.append(codes[sample, :, at_queries.unsqueeze(-1), at_keys].float().cpu())

        with watching(model, pick):
            run(model, batch)
        kept.append(torch.stack(picked, dim=1).numpy())
        for name, column in batch.items():
            if name not in _INPUTS:
                columns.setdefault(name, _Rows(f"the column {name}")).append(_as_array(column))
    if not kept.count:
        raise ValueError("There are no codes to collect: the batches hold no samples.")
    return Codes(kept.array(), {name: column.array() for name, column in columns.items()})


def _as_array(column: Any) -> np.ndarray:
    if not torch.is_tensor(column):
        return np.asarray(column)
    column = column.detach().cpu()
    return (column.float() if column.dtype == torch.bfloat16 else column).numpy()  # numpy has no bfloat16


class _Rows:
    """
    Rows that arrive in batches, in one array that doubles when it is full. Many small arrays would lie between freed tensors
    and keep the allocator from returning that memory to the system.
    """

    def __init__(self, name: str):
        self.name, self.count = name, 0

    def append(self, rows: np.ndarray) -> None:
        end = self.count + len(rows)
        if not self.count:
            self._array = np.empty(rows.shape, rows.dtype)
        if rows.shape[1:] != self._array.shape[1:]:
            raise ValueError(
                f"The batches have rows of different shapes in {self.name}, {self._array.shape[1:]} and {rows.shape[1:]}: pad them to "
                "one length, or leave them out."
            )
        self._array = self._array.astype(np.result_type(self._array, rows), copy=False)
        if end > len(self._array):
            self._array.resize((2 * end, *rows.shape[1:]), refcheck=False)
        self._array[self.count : end] = rows
        self.count = end

    def array(self) -> np.ndarray:
        self._array.resize((self.count, *self._array.shape[1:]), refcheck=False)
        return self._array


@contextmanager
def watching(model: nn.Module, see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Within the context, every layer that is computed calls `see(layer, codes)` with its codes (batch, heads, query, key)."""
    layers = range(len(attention_layers(model)))
    with code_hooks(model, {layer: lambda _, __, ___, output, layer=layer: see(layer, output[1]) for layer in layers}):
        yield


@contextmanager
def code_hooks(model: nn.Module, hooks: dict[int, Callable]) -> Iterator[None]:
    """
    Within the context, the attention of these layers returns (output, codes) of all tokens to its forward hook,
    `hook(attention, args, kwargs, returned)`. Each layer is asked for its codes, since a model that is asked keeps the codes
    of all layers. The last layer computes all tokens, also those that nothing reads.

    Raises:
        IndexError: if there is no such layer.
    """
    layers = attention_layers(model)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, HylaModel):
                stack.enter_context(_with_arguments(module, num_last=None))
        for layer, hook in hooks.items():
            stack.enter_context(_with_arguments(layers[layer], output_attentions=True))
            stack.enter_context(layers[layer].register_forward_hook(hook, with_kwargs=True))
        yield


def attention_layers(model: nn.Module) -> list[HylaAttention]:
    """
    Raises:
        ValueError: if the model has no attention layers.
    """
    layers = [module for module in model.modules() if isinstance(module, HylaAttention)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no latent codes: expected a HylaModel, or a model that holds one."
        )
    return layers


def _with_arguments(module: nn.Module, **changed: Any) -> RemovableHandle:
    """A context in which the module's forward gets these keyword arguments."""
    return module.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | changed), with_kwargs=True)


@torch.no_grad()
def run(model: nn.Module, batch: Batch):
    """The model's output on a batch, without dropout. Entries that are not inputs are ignored."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in _INPUTS if name in batch}
    training = [module for module in model.modules() if module.training]  # some may be in evaluation mode
    model.eval()
    try:
        return model(**inputs, output_attentions=False)
    finally:
        for module in training:
            module.training = True


def _answer_positions(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Positions (batch, answers) of the tokens that the classification head reads, found by its own function."""
    tokens = next((batch[name] for name in ("input_ids", "input_values", "inputs_embeds") if name in batch), None)
    if tokens is None:
        raise ValueError(f"A batch must hold input_ids, input_values or inputs_embeds, got {', '.join(batch)}.")
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape[:2]).unsqueeze(-1)
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    return answer_states(attention_layers(model)[0].config, positions, ids, mask).squeeze(-1)
