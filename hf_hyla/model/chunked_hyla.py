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
"""The eager implementation for one chunk of queries at a time, for any device and length."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .attention_hyla import dropout_seed, eager_attention_forward, largest_intermediate, layer_with, position_of_first
from .gradients_hyla import RefuseGradient


# The chunked implementation computes about this many elements at a time. Where the eager one would compute more and no faster one
# serves the call, the default takes the chunked one.
CHUNK_ELEMENTS = 2**22


@torch.compiler.disable(reason="its gradients are computed chunk by chunk, outside of compiled graphs")
def chunked_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The eager implementation for one chunk of queries at a time, computed again in the backward. Arguments are those of
    `eager_attention_forward`. It serves every device and attention type. Its memory grows with the length, not with its square.
    Half precision is computed in float32.

    Returns:
        The output (batch, query, heads, value_head_dim).
    """
    seed = dropout_seed(query.device) if dropout > 0.0 else None
    position = position_of_first(query, key)
    # Queries are divided along the third of four axes.
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    if bias is not None and bias.ndim == 3:
        bias = bias[None]
    activation = module.value_activation
    parameters = {} if activation is None else dict(activation.named_parameters())

    def attend(first: int, query, key, value, mask, bias, mixing, *values) -> torch.Tensor:
        widened = dict(zip(parameters, values, strict=True))
        layer = layer_with(
            module,
            value_activation=activation and (lambda x: torch.func.functional_call(activation, widened, (x,))),
            value_mixing=mixing,
        )
        output, _ = eager_attention_forward(
            layer, query, key, value, mask, scaling, dropout, bias, seed=seed, first_query=position + first
        )
        return output

    rows = max(CHUNK_ELEMENTS // max(largest_intermediate(module, query[:, :, :1], key, value), 1), 1)
    return _Chunked.apply(attend, rows, query, key, value, mask, bias, module.value_mixing, *parameters.values())


class _Chunked(torch.autograd.Function):
    """
    Calls `attend` for `rows` queries at a time, and once more in the backward.

    Every tensor that outlives a chunk is allocated before the first chunk. A small tensor between the large temporaries of two
    chunks would keep the C library from reusing their memory, which would then grow with the square of the length.
    """

    @staticmethod
    def forward(ctx, attend, rows, query, key, value, *others):
        inputs = (query, key, value, *others)
        ctx.attend, ctx.rows = attend, rows
        ctx.save_for_backward(*inputs)
        batch, heads, query_length, _ = query.shape
        output = query.new_empty(batch, query_length, heads, value.shape[-1])
        with _autocast_off(query.device.type):
            for first, parts, _ in _chunks(rows, *map(_widened, inputs)):
                output[:, first : first + rows] = attend(first, *parts)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        with torch.no_grad():
            gradients = _Chunked._gradients(ctx, grad_output)
        # torch's `once_differentiable` would cut these gradients off from what the output's gradient depends on.
        return RefuseGradient.apply(len(gradients), *gradients, grad_output) if torch.is_grad_enabled() else gradients

    @staticmethod
    def _gradients(ctx, grad_output):
        inputs = ctx.saved_tensors
        wide: list[Any] = [_widened(tensor) for tensor in inputs]
        needed = [n for n, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        sums = {n: torch.zeros_like(wide[n]) for n in needed}
        for first, parts, where in _chunks(ctx.rows, *wide):
            with torch.enable_grad(), _autocast_off(grad_output.device.type):
                parts = [part if part is None else part.detach() for part in parts]
                leaves = [parts[n].requires_grad_() for n in needed]
                output = ctx.attend(first, *parts)
            grad_chunk = grad_output[:, first : first + ctx.rows].to(output.dtype)
            for n, gradient in zip(needed, torch.autograd.grad(output, leaves, grad_chunk), strict=True):
                sums[n][where.get(n, ...)] += gradient
        return None, None, *(sums[n].to(x.dtype) if n in sums else None for n, x in enumerate(inputs))


def _chunks(rows: int, query, key, value, mask, bias, *others) -> Iterator[tuple[int, list, dict[int, tuple]]]:
    """
    Yields for every chunk its first query, the arguments of `attend`, and the indices of those arguments that are divided, by
    their place among the arguments.
    """
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
        arguments = enumerate((query, key, value, mask, bias, *others))
        yield first, [tensor[where[n]] if n in where else tensor for n, tensor in arguments], where


def _widened(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, in float32 if it is in half precision."""
    if tensor is None or tensor.dtype not in (torch.float16, torch.bfloat16):
        return tensor
    return tensor.float()


def _autocast_off(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
