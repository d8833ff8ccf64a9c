# Copyright 2026 The hf_hyla authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The ways to compute what `eager_attention_forward` defines, and the choice among them.

Every function here has the signature of transformers' attention functions and is registered with transformers under its
name in `BACKENDS`, for `attn_implementation`. `"hyla"` is the default: the fastest exact one for the device, the attention
type and the size. None but the eager form returns codes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from .attention_hyla import (
    attended,
    by_pair,
    dropout_seed,
    eager_attention_forward,
    position_of_first,
)
from .ops_cpu_hyla import cpu_attention, cpu_problem
from .ops_triton_hyla import triton_attention, triton_problem


logger = logging.get_logger(__name__)

# Numbers of its largest intermediate result up to which the eager form is as fast: the others cost some calls from Python
# more, the compiled kernel also seconds of compilation for every new size of heads.
_SMALL = 2**18
# Numbers that the lean form computes at a time, and above which the default avoids the eager form's memory.
_BLOCK = 2**22


@torch.compiler.disable(reason="its gradients are taken block by block, between the graphs of the rest")
def lean_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    The eager form for a block of queries at a time, computed again in the backward: on any device, of any type, with
    memory that grows with the length and not with its square.
    """
    seed = dropout_seed(query.device) if dropout > 0.0 else None
    position = position_of_first(query, key)
    # Blocks of queries are taken of the third of four axes.
    if attention_mask is not None:
        attention_mask = attention_mask[(None,) * (4 - attention_mask.ndim)]
    if position_bias is not None and position_bias.ndim == 3:
        position_bias = position_bias[None]

    def attend(first: int, query, key, value, mask, bias, mixing) -> torch.Tensor:
        layer = SimpleNamespace(
            attention_type=module.attention_type,
            score_norm=module.score_norm,
            value_activation=module.value_activation,
            value_mixing=mixing,
        )
        return eager_attention_forward(layer, query, key, value, mask, scaling, dropout, bias, seed, position + first)[
            0
        ]

    rows = max(_BLOCK // max(largest_intermediate(module, query[:, :, :1], key, value), 1), 1)
    of_activation = [] if module.value_activation is None else module.value_activation.parameters()
    output = _InBlocks.apply(
        attend, rows, query, key, value, attention_mask, position_bias, module.value_mixing, *of_activation
    )
    return output, None


class _InBlocks(torch.autograd.Function):
    """
    `attend` for so many rows of the queries at a time, and again in the backward.

    All that outlives a block is there before the first: between the large temporaries of two blocks a small tensor would
    keep the C library from using their memory again, and it would grow with the square of the length after all.
    """

    @staticmethod
    def forward(ctx, attend, rows, query, key, value, *others):
        inputs = (query, key, value, *others)
        ctx.attend, ctx.rows, ctx.autocast = attend, rows, _autocast_as_here(query.device.type)
        ctx.save_for_backward(*inputs)
        batch, heads, query_length, _ = query.shape
        output = query.new_empty(batch, query_length, heads, value.shape[-1])
        for first, parts, _ in _blocks(rows, *inputs):
            output[:, first : first + rows] = attend(first, *parts)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        inputs = ctx.saved_tensors
        needed = [n for n, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        # Half precision would round after every block.
        sums = {
            n: torch.zeros_like(inputs[n], dtype=torch.promote_types(inputs[n].dtype, torch.float32)) for n in needed
        }
        for first, parts, where in _blocks(ctx.rows, *inputs):
            with torch.enable_grad(), ctx.autocast():
                parts = [part if part is None else part.detach() for part in parts]
                leaves = [parts[n].requires_grad_() if n < len(parts) else inputs[n] for n in needed]
                output = ctx.attend(first, *parts)
            gradients = torch.autograd.grad(output, leaves, grad_output[:, first : first + ctx.rows])
            for n, gradient in zip(needed, gradients, strict=True):
                sums[n][where.get(n, ...)] += gradient
        return None, None, *(sums[n].to(tensor.dtype) if n in sums else None for n, tensor in enumerate(inputs))


def _blocks(rows: int, query, key, value, mask, bias, mixing, *_) -> Iterator[tuple[int, list, dict[int, tuple]]]:
    """Of every block its first query, the arguments of `attend`, and which part of those that are divided, by number."""
    everything, length = slice(None), query.shape[2]
    for first in range(0, length, rows):
        last = min(first + rows, length)
        of_queries = (everything, everything, slice(first, last))
        where: dict[int, tuple] = {0: of_queries}
        if mask is not None and mask.shape[2] > 1:
            where[3] = of_queries
        if bias is not None and bias.ndim == 2:
            where[4] = (everything, slice(length - last, bias.shape[1] - first))
        elif bias is not None and bias.shape[2] > 1:
            where[4] = of_queries
        arguments = enumerate((query, key, value, mask, bias, mixing))
        yield first, [tensor[where[n]] if n in where else tensor for n, tensor in arguments], where


def _autocast_as_here(device: str) -> Callable[[], AbstractContextManager]:
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def sdpa_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    torch's scaled_dot_product_attention, with the position bias. It knows softmax attention and no dropout of whole pairs.

    Raises:
        ValueError: for another attention type, a value activation, or dropout.
    """
    if problem := _sdpa_problem(module, dropout):
        raise ValueError(f"scaled_dot_product_attention cannot compute this layer: {problem}.")
    bias = position_bias
    if bias is not None and bias.ndim == 2:
        bias = by_pair(bias, query.shape[2], key.shape[2])[None]
    if attention_mask is not None:
        # Of numbers, not booleans: with those a row that sees nothing would be 0 instead of the uniform mean.
        seen = attended(attention_mask)
        bias = torch.where(seen, query.new_zeros(()) if bias is None else bias, torch.finfo(query.dtype).min)
        # Nor does such a row give a gradient to queries and keys.
        query = query * seen.any(dim=-1, keepdim=True)
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    return output.transpose(1, 2), None


def kernel_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    *,
    kernel: str,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    A fused kernel, of the name in `BACKENDS`.

    Raises:
        ValueError: if it cannot compute this layer here, saying why.
    """
    if problem := kernel_problem(kernel, module, query, key, value, attention_mask, position_bias):
        raise ValueError(f"{kernel} cannot compute this layer: {problem}.")
    output = {"hyla_cpu": cpu_attention, "hyla_triton": triton_attention}[kernel](
        query,
        key,
        value,
        None if attention_mask is None else attended(attention_mask),
        position_bias,
        module.value_mixing,
        dropout_seed(query.device) if dropout > 0.0 else None,
        scaling=scaling,
        score_norm=module.score_norm,
        activation="none" if module.value_activation is None else "relu",
        generated=module.attention_type == "hyla",
        dropout=dropout,
    )
    return output, None


def hyla_attention_forward(module: Any, query: torch.Tensor, key: torch.Tensor, *args, **kwargs):
    """The fastest exact form for the device, the attention type and the size; see `fastest_backend`."""
    backend = fastest_backend(module, query, key, *args, **kwargs)
    return BACKENDS[backend](module, query, key, *args, **kwargs)


BACKENDS: dict[str, Callable] = {
    "eager": eager_attention_forward,
    "hyla": hyla_attention_forward,
    "hyla_lean": lean_attention_forward,
    "hyla_cpu": partial(kernel_attention_forward, kernel="hyla_cpu"),
    "hyla_triton": partial(kernel_attention_forward, kernel="hyla_triton"),
    "hyla_sdpa": sdpa_attention_forward,
}


def fastest_backend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> str:
    """The name in `BACKENDS` of the form that the default takes."""
    if torch.compiler.is_exporting():
        return "eager"  # operators that every runtime has
    numbers = largest_intermediate(module, query, key, value)
    if numbers <= _SMALL:
        return "eager"
    if not module.training and _sdpa_problem(module, dropout) is None:
        return "hyla_sdpa"  # the gradient of the position bias makes it slow in training
    kernel = {"cpu": "hyla_cpu", "cuda": "hyla_triton"}.get(query.device.type)
    problem: str | None = f"there is none for {query.device.type}"
    if kernel:
        problem = kernel_problem(kernel, module, query, key, value, attention_mask, position_bias)
    if kernel and problem is None:
        return kernel
    if not torch.compiler.is_compiling():
        logger.warning_once(f"Attention is computed without a fused kernel: {problem}.")
    return "hyla_lean" if numbers > _BLOCK else "eager"


def largest_intermediate(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Numbers of the largest intermediate result of the eager form: codes, hidden layers, or HYLA+'s for every head."""
    pairs = query.shape[0] * query.shape[2] * key.shape[2]
    heads, width = query.shape[1], value.shape[3]
    if module.attention_type != "hyla":
        return pairs * heads
    return pairs * (max(heads, width) if module.value_mixing is None else heads * width)


def _sdpa_problem(module: Any, dropout: float) -> str | None:
    if module.attention_type != "softmax" or module.value_activation is not None:
        return "it mixes plain values by softmax scores only"
    if dropout > 0.0:
        return "it cannot drop the same pairs for the whole batch and all heads"
    return None


def kernel_problem(kernel: str, module: Any, query, key, value, attention_mask, position_bias) -> str | None:
    """Why the kernel cannot compute this layer here, or `None` where it can."""
    if module.value_activation is not None and not isinstance(module.value_activation, nn.ReLU):
        return f"its value activation is relu or none, not {type(module.value_activation).__name__}"
    if problem := _misfit(query, key, value, attention_mask, position_bias, module.value_mixing):
        return problem
    if kernel == "hyla_cpu":
        return cpu_problem(query, key, value)
    return triton_problem(query, module.value_mixing)


def _misfit(query, key, value, mask, bias, mixing) -> str | None:
    """What the kernels, which take sizes from the first tensor that has them, would compute wrongly; they broadcast nothing."""
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[2:]
    tensors = {"keys": key, "values": value, "position biases": bias, "value_mixing": mixing}
    fitting = {
        "keys": (batch, heads, keys, width),
        "values": (batch, heads, keys, value_width),
        "position biases": (heads, queries + keys - 1),
        "value_mixing": (heads, value_width, value_width),
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != fitting[name]:
            return f"it takes {name} of shape {fitting[name]}, not {tuple(tensor.shape)}"
        if tensor.dtype != query.dtype:
            return f"it takes {name} in the dtype of the queries, {query.dtype}, not {tensor.dtype}"
    if mask is not None and mask.ndim == 4 and mask.shape[1] != 1:
        return "it takes one mask for all heads"
    differentiated = (query, key, value, bias, mixing)
    if not torch.compiler.is_compiling() and any(
        x is not None and unpack_dual(x).tangent is not None for x in differentiated
    ):
        return "it has no forward-mode gradient"
    return None


def _pair_mask(**kwargs) -> torch.Tensor | None:
    # In booleans; a causal mask is never left out, as it may be for torch's SDPA, which knows causality by itself.
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})


for _name, _function in BACKENDS.items():
    if _name != "eager":  # transformers' word for the function beside the model
        AttentionInterface.register(_name, _function)
        AttentionMaskInterface.register(_name, _pair_mask)
