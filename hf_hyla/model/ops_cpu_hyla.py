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
"""The fused CPU kernels as operators of torch, with their threads, their gradients, and what they cannot compute."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise

import numpy as np
import torch

from .attention_hyla import RMS_HEAD_SCALE
from .kernels_cpu_hyla import compiled_backward, compiled_forward
from .tiles_cpu_hyla import NONE, RMS_HEAD, SOFTMAX
from .vectors_cpu_hyla import VECTOR_BYTES, numba


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# Keys per tile, where all fit into one. A query's scores then stay in the first-level cache.
_TILES = (16, 24, 32, 40, 48)
# Keys per tile of longer sequences. Larger tiles share the cost of adding up vectors, and waste more where a mask ends.
_TILE_OF_LONGER = 64
_NORMS = {"none": NONE, "rms_head": RMS_HEAD, "softmax": SOFTMAX}
# The integer dtype of equal size in which numba sees the elements of a dtype; `None` for dtypes that numba knows.
_INTEGERS = {torch.float16: torch.uint16, torch.bfloat16: torch.int16, torch.float32: None, torch.float64: None}


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _tile(key_length: int, dtype: torch.dtype) -> int:
    """Keys per tile, a multiple of the keys in a vector."""
    vector = VECTOR_BYTES // _computed_in(dtype).itemsize
    return next((tile for tile in _TILES if tile >= key_length and tile % vector == 0), _TILE_OF_LONGER)


def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int, int, str]:
    """The sizes and the dtype that the kernels are compiled for."""
    heads, head_dim, value_dim = query.shape[1], _round_up(query.shape[-1], 4), _round_up(value.shape[-1], 4)
    return heads, head_dim, value_dim, _tile(key.shape[2], query.dtype), str(query.dtype).removeprefix("torch.")


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of this dtype are computed."""
    return torch.promote_types(dtype, torch.float32)


def _score_scale(score_norm: str) -> float:
    """The factor of the scores inside the kernels."""
    return RMS_HEAD_SCALE if score_norm == "rms_head" else 1.0


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as numba sees it."""
    integer, tensor = _INTEGERS[tensor.dtype], tensor.detach()
    return tensor.numpy() if integer is None else tensor.view(integer).numpy()


def _prepare(
    query, key, value, *, mask, position_bias, value_mixing, seed, scaling, score_norm, activation, generated, dropout
):
    """The arguments that forward and backward share, by name, and the first and last task of each worker."""
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    tile = _tile(key_length, query.dtype)

    dtype = _computed_in(query.dtype)
    bias = query.new_zeros(heads, query_length + key_length - 1 + tile, dtype=dtype)
    # The backward multiplies by `scaling * scale` too, so the gradients of queries and keys need no other factor.
    scale = _score_scale(score_norm)
    if position_bias is not None:
        bias[:, :-tile] = position_bias.to(dtype) * scale
    shape = (batch, 1, query_length, key_length)
    seen = torch.ones((1, 1, 1, 1), dtype=torch.bool) if mask is None else mask
    seed = torch.zeros(2, dtype=torch.int64) if seed is None else seed
    mixing = bias.new_zeros(heads, 0, 0) if value_mixing is None else value_mixing.detach().to(dtype)
    # A row of the batch is one task. Where rows are few and cannot be shared out evenly, several tasks share a row, each with
    # its own queries.
    threads = torch.get_num_threads()
    splits = 1 if batch >= 4 * threads or batch % threads == 0 else min(threads, query_length)
    number = bias.numpy().dtype.type
    arguments = {
        "query": as_array(query),
        "key": as_array(key),
        "value": as_array(value),
        "mask": seen.expand(shape).numpy(),
        "bias": bias.numpy(),
        "mixing": mixing.numpy(),
        "seed": seed.numpy(),
        "norm": _NORMS[score_norm],
        "relu": activation == "relu",
        "generated": generated,
        "deep": value_mixing is not None,
        "masked": mask is not None,
        "threshold": int(dropout * 2**32),
        "survivor": number(1 / (1 - dropout)),
        "scaling": number(scaling * scale),
        "splits": splits,
    }
    return arguments, shares(batch * splits, max(1, min(threads, batch * splits)))


def shares(count: int, parts: int) -> list[tuple[int, int]]:
    """Divides `count` items into parts of about equal size: the first item of each part, and the one after its last."""
    return list(pairwise(count * part // parts for part in range(parts + 1)))


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded if it is GNU's, otherwise `None`."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except (OSError, AttributeError):  # another runtime, or a system without RTLD_NOLOAD
        return None


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="hyla")


def run_jobs(jobs) -> None:
    """
    Calls every job in a thread of its own. The jobs release Python's lock.

    The threads are torch's own where possible, since those spin while they wait for work and would take the cores from others.
    """
    openmp = _openmp()
    if openmp is None or len(jobs) < 2:
        others = [_pool(os.getpid()).submit(job) for job in jobs[1:]]
        for job in jobs[:1]:
            job()
        for other in others:
            other.result()
        return
    errors = []

    def run_share(_):
        # Inside another parallel region one thread runs all jobs.
        for job in jobs[openmp.omp_get_thread_num() :: openmp.omp_get_num_threads()]:
            try:
                job()
            except BaseException as error:  # an exception cannot pass through C
                errors.append(error)

    openmp.GOMP_parallel(_CALLBACK(run_share), None, len(jobs), 0)
    if errors:
        raise errors[0]


def _statistics(query: torch.Tensor, score_norm: str) -> torch.Tensor:
    """For softmax, per query and head: the maximum, the sum of exponentials, and space for a sum of the backward."""
    batch, heads, query_length, _ = query.shape
    if score_norm != "softmax":
        return query.new_zeros(1, 1, 3, 1, dtype=_computed_in(query.dtype))
    statistics = query.new_zeros(batch, query_length, 3, heads, dtype=_computed_in(query.dtype))
    statistics[:, :, 0] = -torch.inf
    return statistics


def _sums(result: torch.Tensor, workers: int) -> list[np.ndarray]:
    """
    For every worker, the array in which it adds up `result` (batch, ...). That is `result` itself, unless every addition there
    would be rounded to half precision. Then it is one row in float32, which all rows of the batch share.
    """
    if result.dtype == _computed_in(result.dtype):
        return [result.numpy()] * workers
    rows = result.new_zeros(workers, 1, *result.shape[1:], dtype=_computed_in(result.dtype))
    return [row.expand(result.shape).numpy() for row in rows]


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    position_bias: torch.Tensor | None, value_mixing: torch.Tensor | None, seed: torch.Tensor | None,
    scaling: float, score_norm: str, activation: str, generated: bool, dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, heads, query_length, _ = query.shape
    output = query.new_zeros(batch, query_length, heads, value.shape[-1])
    statistics = _statistics(query, score_norm)
    forward = compiled_forward(*_sizes(query, key, value))
    arguments, workers = _prepare(
        query, key, value, mask=mask, position_bias=position_bias, value_mixing=value_mixing, seed=seed, scaling=scaling,
        score_norm=score_norm, activation=activation, generated=generated, dropout=dropout,
    )  # fmt: skip
    arguments["statistics"] = statistics.expand(batch, query_length, 3, heads).numpy()
    run_jobs([
        partial(forward, **arguments, first_task=first, last_task=last, sums=sums, output=as_array(output))
        for (first, last), sums in zip(workers, _sums(output, len(workers)), strict=True)
    ])  # fmt: skip
    return output, statistics


def _backward(
    grad_output: torch.Tensor, statistics: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor | None, position_bias: torch.Tensor | None, value_mixing: torch.Tensor | None,
    seed: torch.Tensor | None, scaling: float, score_norm: str, activation: str, generated: bool, dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, heads, query_length, head_dim = query.shape
    key_length, value_dim = value.shape[2:]
    backward = compiled_backward(*_sizes(query, key, value))
    arguments, workers = _prepare(
        query, key, value, mask=mask, position_bias=position_bias, value_mixing=value_mixing, seed=seed, scaling=scaling,
        score_norm=score_norm, activation=activation, generated=generated, dropout=dropout,
    )  # fmt: skip
    splits = arguments["splits"]
    grad_query = query.new_zeros(batch, query_length, heads, head_dim)
    grad_key = query.new_empty(batch, key_length, heads, head_dim)
    grad_value = query.new_empty(batch, key_length, heads, value_dim)
    grad_bias = statistics.new_zeros(len(workers), *arguments["bias"].shape)
    grad_mixing = statistics.new_zeros(len(workers), *arguments["mixing"].shape)
    results = (grad_query, grad_key, grad_value)
    # Where tasks share a row of the batch, each has a part of its own for the gradients of keys and values.
    parts = [statistics.new_empty(splits, *x.shape) if splits > 1 else None for x in (grad_key, grad_value)]
    sums = [_sums(grad_query, len(workers))] + [
        [x[None] for x in _sums(result, len(workers))] if part is None else [part.numpy()] * len(workers)
        for result, part in zip(results[1:], parts, strict=True)
    ]
    arguments |= {
        "statistics": statistics.clone().expand(batch, query_length, 3, heads).numpy(),
        "grad_output": as_array(grad_output.transpose(1, 2)),
        "query_out": as_array(grad_query),
        "key_out": as_array(grad_key),
        "value_out": as_array(grad_value),
    }
    run_jobs([
        partial(
            backward, **arguments, first_task=first, last_task=last, grad_query=query_sums, grad_key=key_sums,
            grad_value=value_sums, grad_bias=bias_sums, grad_mixing=mixing_sums,
        )
        for (first, last), query_sums, key_sums, value_sums, bias_sums, mixing_sums in zip(
            workers, *sums, grad_bias.numpy(), grad_mixing.numpy(), strict=True
        )
    ])  # fmt: skip
    # The sum has a fixed order, so the same number of threads gives the same bits.
    for result, part in zip(results[1:], parts, strict=True):
        if part is not None:
            result.copy_(part.sum(0))
    bias = grad_bias.sum(0)[:, : query_length + key_length - 1] * _score_scale(score_norm)
    return (
        grad_query.transpose(1, 2),
        grad_key.transpose(1, 2),
        grad_value.transpose(1, 2),
        bias.to(_dtype_of(position_bias, statistics)),
        grad_mixing.sum(0).to(_dtype_of(value_mixing, statistics)),
    )


def _dtype_of(parameter: torch.Tensor | None, otherwise: torch.Tensor) -> torch.dtype:
    return otherwise.dtype if parameter is None else parameter.dtype


def _fake_forward(query, key, value, mask, position_bias, value_mixing, seed, scaling, score_norm, *settings):
    batch, heads, query_length, _ = query.shape
    rows = (batch, query_length, 3, heads) if score_norm == "softmax" else (1, 1, 3, 1)
    output = query.new_empty(batch, query_length, heads, value.shape[-1])
    return output, query.new_empty(rows, dtype=_computed_in(query.dtype))


def _fake_backward(grad_output, statistics, query, key, value, mask, position_bias, value_mixing, *settings):
    heads, pairs = query.shape[1], query.shape[2] + key.shape[2] - 1

    def like(tensor):
        return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)

    bias = query.new_empty(heads, pairs, dtype=_dtype_of(position_bias, statistics))
    mixing = statistics.new_empty(heads, 0, 0) if value_mixing is None else torch.empty_like(value_mixing)
    return like(query), like(key), like(value), bias, mixing


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.settings = inputs[7:]


def _differentiate(ctx, grad_output, _):
    statistics, *inputs = ctx.saved_tensors
    query, key, value, bias, mixing = torch.ops.hyla.cpu_backward(
        grad_output.contiguous(), statistics, *inputs, *ctx.settings
    )
    bias, mixing = (None if inputs[4] is None else bias), (None if inputs[5] is None else mixing)
    return query, key, value, None, bias, mixing, None, *[None] * len(ctx.settings)


# Code from a repository and the installed package may both be imported; the first one's operators serve both.
if not hasattr(torch.ops.hyla, "cpu_forward"):
    _operator = torch.library.custom_op("hyla::cpu_forward", _forward, mutates_args=(), device_types="cpu")
    _operator.register_fake(_fake_forward)
    _operator.register_autograd(_differentiate, setup_context=_setup_context)
    torch.library.custom_op("hyla::cpu_backward", _backward, mutates_args=(), device_types="cpu").register_fake(
        _fake_backward
    )


def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    value_mixing: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    scaling: float,
    score_norm: str,
    activation: str,
    generated: bool,
    dropout: float,
) -> torch.Tensor:
    """
    Attention of one layer. Deterministic for a given number of threads (`torch.set_num_threads`).

    Args:
        query, key, value: (batch, heads, query or key, head_dim or value_head_dim), with any strides and of one dtype.
        mask: booleans broadcastable to (batch, 1, query, key), True where a query attends.
        position_bias: (heads, query + key - 1), by diagonal, see `attention_hyla.by_pair`. Beside queries in half precision it
            may be in float32, and its gradient then is too.
        value_mixing: (heads, value_head_dim, value_head_dim), the second layer of HYLA+, in the same dtypes as position_bias.
        seed: the seed of `attention_hyla.pair_dropout`, needed if `dropout` is above 0.
        score_norm: "rms_head", "softmax" or "none".
        activation: the activation of the value network, "relu" or "none".
        generated: whether codes generate the value network (HYLA) or mix values.

    Returns:
        (batch, query, heads, value_head_dim), in the dtype of the queries.
    """
    return torch.ops.hyla.cpu_forward(
        query, key, value, mask, position_bias, value_mixing, seed, scaling, score_norm, activation, generated, dropout
    )[0]


def cpu_problem(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, value_mixing: torch.Tensor | None = None
) -> str | None:
    """Why `cpu_attention` cannot take these tensors here, or `None` if it can."""
    if numba is None:
        return "numba is not installed (pip install hf-hyla[cpu])"
    if query.device.type != "cpu":
        return f"the kernel runs on the CPU, not on {query.device.type}"
    if query.dtype not in _INTEGERS:
        return f"the kernel computes in {', '.join(map(str, _INTEGERS))}, not in {query.dtype}"
    if torch.compiler.is_compiling():
        return None
    differentiated = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, value_mixing)
    )
    return _compile_problem(differentiated, *_sizes(query, key, value))


@cache
def _compile_problem(differentiated: bool, *sizes) -> str | None:
    try:
        compiled_forward(*sizes)
        if differentiated:
            compiled_backward(*sizes)
    except Exception as error:  # numba, LLVM and the cache's file system raise errors of many types
        return f"numba cannot compile the kernel ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None
