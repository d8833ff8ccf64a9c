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
HYLA attention for one query, as a language model asks for with every token that it generates: one pass over keys and values,
compiled for the CPU by numba, once for all sizes.
"""

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .attention_hyla import RMS_HEAD_EPS, RMS_HEAD_SCALE
from .ops_cpu_hyla import as_array, run_jobs, shares
from .vectors_cpu_hyla import STORED, compiled, numba, widened


_KEYS_PER_THREAD = 512  # with fewer, waking a thread takes longer than its share of the work


def _step(query, key, value, seen, bias, rms_head, relu, scaling, epsilon, first, last, output):
    batch, heads, width = query.shape
    codes = np.empty(heads, output.dtype)
    hidden = np.empty(value.shape[3], output.dtype)
    for b in range(batch):
        for k in range(first, last):
            if not seen[b, k]:
                continue
            for h in range(heads):
                score = codes.dtype.type(0)
                for d in range(width):
                    score += widened(query[b, h, d]) * widened(key[b, h, k, d])
                codes[h] = score * scaling + bias[h, k]
            if rms_head:
                squares = epsilon
                for h in range(heads):
                    squares += codes[h] * codes[h] / heads
                for h in range(heads):
                    codes[h] /= np.sqrt(squares)
            hidden[:] = 0
            for h in range(heads):
                code = codes[h]
                for d in range(hidden.shape[0]):
                    hidden[d] += code * widened(value[b, h, k, d])
            if relu:
                for d in range(hidden.shape[0]):
                    hidden[d] = max(hidden[d], 0)
            for h in range(heads):
                code = codes[h]
                for d in range(hidden.shape[0]):
                    output[b, h, d] += code * hidden[d]


@cache
def _compiled_step(dtype_name: str):
    """`_step` for queries, keys and values of the dtype, as `vectors_cpu_hyla.STORED` stores it; `None` where it cannot be compiled."""
    if numba is None:
        return None
    types = numba.types
    stored = getattr(types, STORED[dtype_name])
    number = types.float64 if dtype_name == "float64" else types.float32
    arrays = stored[:, :, ::1], stored[:, :, :, ::1], stored[:, :, :, ::1], types.boolean[:, :], number[:, :]
    others = types.boolean, types.boolean, number, number, types.int64, types.int64, number[:, :, ::1]
    try:
        return compiled(numba.void(*arrays, *others), _step)
    except (
        Exception
    ):  # numba, LLVM and the cache's file system raise errors of many types; another implementation takes over
        return None


def step_problem(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_bias: torch.Tensor | None
) -> str | None:
    """Why `step_attention` cannot compute this layer here, or `None` where it can."""
    if module.attention_type != "hyla" or module.score_norm == "softmax" or module.value_mixing is not None:
        return "it computes HYLA attention, whose codes depend on single pairs, with one hidden layer"
    if module.value_activation is not None and not isinstance(module.value_activation, nn.ReLU):
        return f"its value activation is relu or none, not {type(module.value_activation).__name__}"
    if torch.compiler.is_compiling():
        return "it is no operator of torch"
    if any(
        type(x) is not torch.Tensor or x.device.type != "cpu" or x.dtype != query.dtype for x in (query, key, value)
    ):
        return "it takes ordinary tensors of one dtype on the CPU"
    differentiated = (x for x in (query, key, value, position_bias) if x is not None)
    if torch.is_grad_enabled() and any(x.requires_grad for x in differentiated):
        return "it has no gradient"
    name = str(query.dtype).removeprefix("torch.")
    if name not in STORED or _compiled_step(name) is None:
        return "numba is not installed or cannot compile it"
    return None


def step_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    position_bias: torch.Tensor | None,
) -> torch.Tensor:
    """
    What `eager_attention_forward` defines, for one query.

    Args:
        module: the layer, as `eager_attention_forward` describes it.
        query, key, value: (batch, heads, 1 or key, head_dim or value_head_dim), of one dtype; summed in float32 at least.
        mask: booleans broadcastable to (batch, 1, 1, key), True where the query attends.
        position_bias: (heads, key).

    Returns:
        (batch, 1, heads, value_head_dim), in the dtype of the queries.
    """
    batch, heads, num_keys, _ = key.shape
    number = torch.promote_types(query.dtype, torch.float32)
    real = torch.empty((), dtype=number).numpy().dtype.type
    rms_head = module.score_norm == "rms_head"
    # Scores are scaled as in the other kernels, so that large ones do not overflow.
    scale = RMS_HEAD_SCALE if rms_head else 1.0
    bias = torch.zeros((), dtype=number) if position_bias is None else position_bias.detach().to(number) * scale
    seen = torch.ones((), dtype=torch.bool) if mask is None else mask[:, 0, 0]
    threads = max(min(torch.get_num_threads(), batch * num_keys // _KEYS_PER_THREAD, num_keys), 1)
    outputs = torch.zeros(threads, batch, heads, value.shape[3], dtype=number)
    step = partial(
        _compiled_step(str(query.dtype).removeprefix("torch.")),
        as_array(query[:, :, 0].contiguous()),
        as_array(key.contiguous()),
        as_array(value.contiguous()),
        seen.expand(batch, num_keys).numpy(),
        bias.expand(heads, num_keys).numpy(),
        rms_head,
        module.value_activation is not None,
        real(scaling * scale),
        real(RMS_HEAD_EPS * scale**2),
    )
    run_jobs([partial(step, *share, outputs[n].numpy()) for n, share in enumerate(shares(num_keys, threads))])
    output = outputs[0] if threads == 1 else outputs.sum(0)
    return output.to(query.dtype).unsqueeze(1)
