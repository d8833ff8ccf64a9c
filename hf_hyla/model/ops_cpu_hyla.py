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
"""The fused CPU kernels as operators of torch: their threads, their gradients, and what they cannot compute."""

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
# Whole vectors of the machines there are, and small enough for a query's scores to stay in the first-level cache.
_TILES = (16, 24, 32, 40, 48)
_TILE_OF_MANY = 32
_NORMS = {"none": NONE, "rms_head": RMS_HEAD, "softmax": SOFTMAX}
# By dtype: the integers of equal size as which numba sees the elements, or `None` where it knows them.
_BITS = {torch.float16: torch.uint16, torch.bfloat16: torch.int16, torch.float32: None, torch.float64: None}


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _tile(key_length: int, dtype: torch.dtype) -> int:
    """Keys per tile: all where they fit into one, otherwise so few that the tile and its gradients stay in the nearest cache."""
    whole = VECTOR_BYTES // _wide(dtype).itemsize
    return next((tile for tile in _TILES if tile >= key_length and tile % whole == 0), _TILE_OF_MANY)


def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int, int, str]:
    """What the kernels are compiled for."""
    heads, head_dim, value_dim = query.shape[1], _round_up(query.shape[-1], 4), _round_up(value.shape[-1], 4)
    return heads, head_dim, value_dim, _tile(key.shape[2], query.dtype), str(query.dtype).removeprefix("torch.")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of this one are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _score_scale(score_norm: str) -> float:
    """What the kernels have scores multiplied by."""
    return RMS_HEAD_SCALE if score_norm == "rms_head" else 1.0


def as_array(tensor: torch.Tensor) -> np.ndarray:
    bits, tensor = _BITS[tensor.dtype], tensor.detach()
    return tensor.numpy() if bits is None else tensor.view(bits).numpy()


def _prepare(
    query, key, value, *, mask, position_bias, value_mixing, seed, scaling, score_norm, activation, generated, dropout
):
    """The arguments that forward and backward share, splits, and the first and last task of each worker."""
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    tile = _tile(key_length, query.dtype)

    number = _wide(query.dtype)
    bias = query.new_zeros(heads, query_length + key_length - 1 + tile, dtype=number)
    # Keys are multiplied by the same query in the backward, so that their gradient, and likewise the queries', is right.
    scale = _score_scale(score_norm)
    if position_bias is not None:
        bias[:, :-tile] = position_bias.to(number) * scale
    shape = (batch, 1, query_length, key_length)
    seen = torch.ones((1, 1, 1, 1), dtype=torch.bool) if mask is None else mask
    seed = torch.zeros(2, dtype=torch.int64) if seed is None else seed
    mixing = bias.new_zeros(heads, 0, 0) if value_mixing is None else value_mixing.detach().to(number)
    settings = (
        _NORMS[score_norm],
        activation == "relu",
        generated,
        value_mixing is not None,
        mask is not None,
        int(dropout * 2**32),
        bias.numpy().dtype.type(1 / (1 - dropout)),
        bias.numpy().dtype.type(scaling * scale),
    )
    tensors = (seen.expand(shape), bias, mixing, seed)
    arguments = (*map(as_array, (query, key, value)), *(tensor.numpy() for tensor in tensors), *settings)
    # A row of the batch is one task; where rows are few, several tasks share a row, each with its own queries.
    threads = torch.get_num_threads()
    splits = 1 if batch >= 4 * threads else min(threads, query_length)
    return arguments, splits, shares(batch * splits, min(threads, batch * splits))


def shares(count: int, parts: int) -> list[tuple[int, int]]:
    """The first and last of `count` things that each of so many parts takes."""
    return list(pairwise(count * part // parts for part in range(parts + 1)))


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, where it is GNU's."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except (OSError, AttributeError):  # another runtime, or a system without RTLD_NOLOAD
        return None


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="hyla")


def run_jobs(jobs) -> None:
    """
    Calls every job, each in a thread, by torch's own threads where possible: those wait for their next work by spinning,
    and would take the cores from any others. The jobs release Python's lock.
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

    def share(_):
        # Inside another parallel region there is one thread for all jobs.
        for job in jobs[openmp.omp_get_thread_num() :: openmp.omp_get_num_threads()]:
            try:
                job()
            except BaseException as error:  # it cannot pass through C
                errors.append(error)

    openmp.GOMP_parallel(_CALLBACK(share), None, len(jobs), 0)
    if errors:
        raise errors[0]


def _statistics(query: torch.Tensor, score_norm: str) -> torch.Tensor:
    """Per query and head under softmax: maximum, sum of exponentials, and room for a sum of the backward."""
    batch, heads, query_length, _ = query.shape
    if score_norm != "softmax":
        return query.new_zeros(1, 1, 3, 1, dtype=_wide(query.dtype))
    statistics = query.new_zeros(batch, query_length, 3, heads, dtype=_wide(query.dtype))
    statistics[:, :, 0] = -torch.inf
    return statistics


def _sums(result: torch.Tensor, workers: int) -> list[np.ndarray]:
    """
    For every worker, where it adds up what becomes `result`, (batch, ...): that itself or, where this would round every time,
    one row for all of the batch.
    """
    if result.dtype == _wide(result.dtype):
        return [result.numpy()] * workers
    rows = result.new_zeros(workers, 1, *result.shape[1:], dtype=_wide(result.dtype))
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
    arguments, splits, workers = _prepare(
        query, key, value, mask=mask, position_bias=position_bias, value_mixing=value_mixing, seed=seed, scaling=scaling,
        score_norm=score_norm, activation=activation, generated=generated, dropout=dropout,
    )  # fmt: skip
    rows = statistics.expand(batch, query_length, 3, heads).numpy()
    sums = _sums(output, len(workers))
    run_jobs([
        partial(forward, *arguments, rows, splits, *worker, sums[n], as_array(output)) for n, worker in enumerate(workers)
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
    arguments, splits, workers = _prepare(
        query, key, value, mask=mask, position_bias=position_bias, value_mixing=value_mixing, seed=seed, scaling=scaling,
        score_norm=score_norm, activation=activation, generated=generated, dropout=dropout,
    )  # fmt: skip
    bias, mixing = arguments[4], arguments[5]
    grad_query = query.new_zeros(batch, query_length, heads, head_dim)
    grad_key = query.new_empty(batch, key_length, heads, head_dim)
    grad_value = query.new_empty(batch, key_length, heads, value_dim)
    grad_bias = statistics.new_zeros(len(workers), *bias.shape)
    grad_mixing = statistics.new_zeros(len(workers), *mixing.shape)
    results = (grad_query, grad_key, grad_value)
    # Where tasks share a row of the batch, each has its own part of the gradients of keys and values.
    parts = [statistics.new_empty(splits, *x.shape) if splits > 1 else None for x in (grad_key, grad_value)]
    sums = [_sums(grad_query, len(workers))] + [
        [x[None] for x in _sums(result, len(workers))] if part is None else [part.numpy()] * len(workers)
        for result, part in zip(results[1:], parts, strict=True)
    ]
    rows = statistics.clone().expand(batch, query_length, 3, heads).numpy()
    grad_rows = as_array(grad_output.transpose(1, 2))
    of_workers = zip(workers, *sums, grad_bias.numpy(), grad_mixing.numpy(), strict=True)
    run_jobs([
        partial(backward, *arguments, rows, splits, *worker, grad_rows, *of_worker, *map(as_array, results))
        for worker, *of_worker in of_workers
    ])  # fmt: skip
    # Sums in a fixed order: the same numbers for the same count of threads.
    for result, part in zip(results[1:], parts, strict=True):
        if part is not None:
            result.copy_(part.sum(0))
    of_bias = grad_bias.sum(0)[:, : query_length + key_length - 1] * _score_scale(score_norm)
    return (
        grad_query.transpose(1, 2),
        grad_key.transpose(1, 2),
        grad_value.transpose(1, 2),
        of_bias.to(_dtype_of(position_bias, statistics)),
        grad_mixing.sum(0).to(_dtype_of(value_mixing, statistics)),
    )


def _dtype_of(parameter: torch.Tensor | None, otherwise: torch.Tensor) -> torch.dtype:
    return otherwise.dtype if parameter is None else parameter.dtype


def _fake_forward(query, key, value, mask, position_bias, value_mixing, seed, scaling, score_norm, *settings):
    batch, heads, query_length, _ = query.shape
    rows = (batch, query_length, 3, heads) if score_norm == "softmax" else (1, 1, 3, 1)
    output = query.new_empty(batch, query_length, heads, value.shape[-1])
    return output, query.new_empty(rows, dtype=_wide(query.dtype))


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
        query, key, value: (batch, heads, query or key, head_dim or value_head_dim), of any strides and of one dtype.
        mask: booleans broadcastable to (batch, 1, query, key), True where a query attends.
        position_bias: (heads, query + key - 1), by diagonal, see `attention_hyla.by_pair`; beside queries in half precision
            also in float32, and so is its gradient.
        value_mixing: (heads, value_head_dim, value_head_dim), of HYLA+; likewise.
        seed: of `attention_hyla.pair_dropout`, needed where `dropout` is above 0.
        score_norm: "rms_head", "softmax" or "none".
        activation: of the value network, "relu" or "none".
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
    """Why `cpu_attention` cannot take these tensors here, or `None` where it can."""
    if numba is None:
        return "numba is not installed (pip install hf-hyla[cpu])"
    if query.device.type != "cpu":
        return f"the kernel runs on the CPU, not on {query.device.type}"
    if query.dtype not in _BITS:
        return f"the kernel computes in {', '.join(map(str, _BITS))}, not in {query.dtype}"
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
    except Exception as error:  # whatever numba, LLVM or the file system of its cache come up with
        return f"numba cannot compile the kernel ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None
