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

from .kernels_cpu_hyla import NONE, RMS_HEAD, SOFTMAX, compiled_backward, compiled_forward, numba


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# Whole vectors of the machines there are, and small enough for a query's scores to stay in the first-level cache.
_TILES = (16, 24, 32, 40, 48, 64, 96, 128)
_NORMS = {"none": NONE, "rms_head": RMS_HEAD, "softmax": SOFTMAX}


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _tile(key_length: int) -> int:
    """
    Keys per tile: of a few sizes, since each is compiled, the one by which least is computed beyond the keys. What every tile
    costs besides is worth some 32 keys.
    """
    return min(_TILES, key=lambda tile: -(-key_length // tile) * (tile + 32))


def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[int, int, int, int, str]:
    """What a compilation is for."""
    heads, head_dim, value_dim = query.shape[1], _round_up(query.shape[-1], 4), _round_up(value.shape[-1], 4)
    return heads, head_dim, value_dim, _tile(key.shape[2]), str(query.dtype).removeprefix("torch.")


def _prepare(
    query, key, value, mask, position_bias, value_mixing, seed, scaling, score_norm, activation, generated, dropout
):
    """The arguments that forward and backward share, splits, and the first and last task of each worker."""
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    tile = _tile(key_length)

    bias = query.new_zeros(heads, query_length + key_length - 1 + tile)
    if position_bias is not None:
        bias[:, :-tile] = position_bias
    shape = (batch, 1, query_length, key_length)
    seen = torch.ones((1, 1, 1, 1), dtype=torch.bool) if mask is None else mask
    seed = torch.zeros(2, dtype=torch.int64) if seed is None else seed
    mixing = query.new_zeros(heads, 0, 0) if value_mixing is None else value_mixing
    tensors = (query, key, value, seen.expand(shape), bias, mixing, seed)
    settings = (
        _NORMS[score_norm],
        activation == "relu",
        generated,
        value_mixing is not None,
        mask is not None,
        int(dropout * 2**32),
        query.numpy().dtype.type(1 / (1 - dropout)),
        query.numpy().dtype.type(scaling),
    )
    arguments = tuple(tensor.detach().numpy() for tensor in tensors) + settings
    # A row of the batch is one task; where rows are few, several tasks share a row, each with its own queries.
    threads = torch.get_num_threads()
    splits = 1 if batch >= 4 * threads else min(threads, query_length)
    bounds = np.linspace(0, batch * splits, min(threads, batch * splits) + 1).astype(int).tolist()
    return arguments, splits, list(pairwise(bounds))


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
        return query.new_zeros(1, 1, 3, 1)
    statistics = query.new_zeros(batch, query_length, 3, heads)
    statistics[:, :, 0] = -torch.inf
    return statistics


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
        query, key, value, mask, position_bias, value_mixing, seed, scaling, score_norm, activation, generated, dropout
    )
    rows = statistics.expand(batch, query_length, 3, heads).numpy()
    run_jobs([partial(forward, *arguments, rows, splits, *worker, output.numpy()) for worker in workers])
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
        query, key, value, mask, position_bias, value_mixing, seed, scaling, score_norm, activation, generated, dropout
    )
    bias, mixing = arguments[4], arguments[5]
    grad_query = query.new_zeros(batch, query_length, heads, head_dim)
    grad_key = query.new_empty(splits, batch, key_length, heads, head_dim)
    grad_value = query.new_empty(splits, batch, key_length, heads, value_dim)
    grad_bias = query.new_zeros(len(workers), *bias.shape)
    grad_mixing = query.new_zeros(len(workers), *mixing.shape)
    rows = statistics.clone().expand(batch, query_length, 3, heads).numpy()
    gradients = [x.numpy() for x in (grad_output.transpose(1, 2), grad_query, grad_key, grad_value)]
    run_jobs([
        partial(backward, *arguments, rows, splits, *worker, *gradients, grad_bias[n].numpy(), grad_mixing[n].numpy())
        for n, worker in enumerate(workers)
    ])  # fmt: skip
    # Sums in a fixed order: the same numbers for the same count of threads.
    return (
        grad_query.transpose(1, 2),
        (grad_key[0] if splits == 1 else grad_key.sum(0)).transpose(1, 2),
        (grad_value[0] if splits == 1 else grad_value.sum(0)).transpose(1, 2),
        grad_bias.sum(0)[:, : query_length + key_length - 1].contiguous(),
        grad_mixing.sum(0),
    )


def _fake_forward(query, key, value, mask, position_bias, value_mixing, seed, scaling, score_norm, *settings):
    batch, heads, query_length, _ = query.shape
    rows = (batch, query_length, 3, heads) if score_norm == "softmax" else (1, 1, 3, 1)
    return query.new_empty(batch, query_length, heads, value.shape[-1]), query.new_empty(rows)


def _fake_backward(grad_output, statistics, query, key, value, mask, position_bias, value_mixing, *settings):
    heads, pairs = query.shape[1], query.shape[2] + key.shape[2] - 1

    def like(tensor):
        return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)

    mixing = query.new_empty(heads, 0, 0) if value_mixing is None else torch.empty_like(value_mixing)
    return like(query), like(key), like(value), query.new_empty(heads, pairs), mixing


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
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    value_mixing: torch.Tensor | None,
    seed: torch.Tensor | None,
    *,
    scaling: float,
    score_norm: str,
    activation: str,
    generated: bool,
    dropout: float,
) -> torch.Tensor:
    """
    Attention of one layer. Deterministic for a given number of threads (`torch.set_num_threads`).

    Args:
        query, key, value: (batch, heads, query or key, head_dim or value_head_dim), of any strides.
        mask: booleans broadcastable to (batch, 1, query, key), True where a query attends.
        position_bias: (heads, query + key - 1), by diagonal, see `attention_hyla.by_pair`.
        value_mixing: (heads, value_head_dim, value_head_dim), of HYLA+.
        seed: of `attention_hyla.pair_dropout`, needed where `dropout` is above 0.
        score_norm: "rms_head", "softmax" or "none".
        activation: of the value network, "relu" or "none".
        generated: whether codes generate the value network (HYLA) or mix values.

    Returns:
        (batch, query, heads, value_head_dim).
    """
    return torch.ops.hyla.cpu_forward(
        query, key, value, mask, position_bias, value_mixing, seed, scaling, score_norm, activation, generated, dropout
    )[0]


def cpu_problem(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernel cannot serve these queries, keys and values here, or `None` where it can."""
    if numba is None:
        return "numba is not installed (pip install hf-hyla[cpu])"
    if query.device.type != "cpu":
        return f"the kernel runs on the CPU, not on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float64):
        return f"the kernel computes in float32 and float64, not in {query.dtype}"
    if torch.compiler.is_compiling():
        return None
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
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
