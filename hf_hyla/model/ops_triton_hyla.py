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
"""HYLA attention fused for GPUs, in Triton: exact, deterministic, and nothing of size query x key is stored.

`tiles_triton_hyla.py` says how a tile is computed, and `kernels_triton_hyla.py` at what cost. This file divides the work into
programs, launches them, and makes forward and backward operators of torch. No sum depends on the order in which programs run.
Where several programs add to one gradient (of the position bias and of value_mixing), each stores a part per diagonal or block of
keys, and the parts are added.
"""

import torch
from torch import Tensor

from .attention_hyla import RMS_HEAD_EPS, RMS_HEAD_SCALE, position_of_first
from .kernels_triton_hyla import (
    bias_gradient_kernel,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    softmax_delta_kernel,
    softmax_statistics_kernel,
    value_gradient_kernel,
)
from .tiles_triton_hyla import Constants, Inputs, View


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


BLOCK = 16  # the smallest tile that tensor cores multiply; larger tiles of all heads would not fit into registers
NUM_WARPS = 8
NUM_STAGES = 1  # with a second stage of loads, the widest key gradients would exceed the shared memory
MAX_HEADS = 64
# The most elements, heads times width, that a tile holds without many register spills. Wider heads are processed in chunks.
MAX_TILE = {torch.float16: 1024, torch.bfloat16: 1024, torch.float32: 512, torch.float64: 256}
# Bytes of shared memory per element, heads times width, that any kernel takes at most. The key gradient of HYLA+ takes the most,
# compiled by Triton 3.6; versions up to 3.9 take less.
SHARED_BYTES = {torch.float16: 160, torch.bfloat16: 160, torch.float32: 336, torch.float64: 672}
OLDEST_CAPABILITY = (8, 0)  # the oldest NVIDIA GPUs that Triton compiles for; older ones lack bfloat16 too


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _widest_chunk(query: Tensor) -> int:
    """The widest chunk, a power of two. If it is below 16, the minimum of tensor cores, the device has too little shared memory."""
    heads = _padded(query.shape[1])
    widest = max(16, MAX_TILE[query.dtype] // heads)
    if query.is_cuda:
        _, available = _gpu(query.device.index)
        while widest * heads * SHARED_BYTES[query.dtype] > available:
            widest //= 2
    return widest


@torch.compiler.assume_constant_result
def _gpu(index: int) -> tuple[tuple[int, int], int]:
    """The compute capability of a GPU, and the bytes of shared memory that one program can have."""
    found = torch.cuda.get_device_properties(index)
    usual = found.shared_memory_per_block
    return (found.major, found.minor), getattr(found, "shared_memory_per_block_optin", usual)


def _constants(query, key, value, mask, scaling, score_norm, activation, generated, dropout) -> Constants:
    heads, head_dim, value_head_dim = query.shape[1], query.shape[3], value.shape[3]
    head_block = _padded(heads)
    head_dim_block = min(_padded(head_dim), _widest_chunk(query))
    value_block = min(_padded(value_head_dim), _widest_chunk(query))
    total = tl.float64 if query.dtype == torch.float64 else tl.float32
    operand = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(query.dtype, total)
    last_offset = max(*map(_span, (query, key, value)), heads * query.shape[2] * value_head_dim)
    if mask is not None:
        last_offset = max(last_offset, _span(_for_pairs(mask, query, key)))
    # As sizes of tensors, Triton 3.6 does not take plain integers from a tuple, and its interpreter takes nothing else.
    size = int if INTERPRETED else tl.constexpr
    return Constants(
        heads=heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        scaling=scaling,
        score_norm=score_norm,
        relu=activation == "relu",
        generated=generated,
        threshold=int(dropout * 2**32),
        keep_scale=1.0 / (1.0 - dropout),
        head_block=size(head_block),
        head_dim_block=size(head_dim_block),
        head_dim_chunks=-(-head_dim // head_dim_block),
        value_block=size(value_block),
        value_chunks=-(-value_head_dim // value_block),
        operand=total if INTERPRETED else operand,  # the interpreter's bfloat16 products are wrong
        total=total,
        lowest=torch.finfo(torch.promote_types(query.dtype, torch.float32)).min,
        index=tl.int64 if last_offset >= 2**31 else tl.int32,
        block=size(BLOCK),
        score_scale=RMS_HEAD_SCALE,
        epsilon=RMS_HEAD_EPS,
    )


def _inputs(query, key, value, *, mask, position_bias, value_mixing, dropout_seed, maximum, inverse_sum) -> Inputs:
    if mask is not None:
        mask = _for_pairs(mask, query, key).view(torch.uint8)
    return Inputs(
        query=_view(query),
        key=_view(key),
        value=_view(value),
        gradient=None,
        mask=None if mask is None else _view(mask),
        position_bias=None if position_bias is None else position_bias.contiguous(),
        value_mixing=None if value_mixing is None else value_mixing.contiguous(),
        dropout_seed=dropout_seed,
        maximum=maximum,
        inverse_sum=inverse_sum,
        delta=None,
        query_length=query.shape[2],
        key_length=key.shape[2],
        first_query=position_of_first(query, key),
    )


def _for_pairs(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return mask.expand(query.shape[0], 1, query.shape[2], key.shape[2])


def _span(tensor: Tensor) -> int:
    """The distance between the first and the last element of a batch row, in elements."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _view(tensor: Tensor) -> View:
    return View(tensor, tensor.stride())


def _launch(kernel, programs: int, chunks: int, const: Constants, *arguments) -> None:
    if programs > 0:
        kernel[(programs, chunks)](*arguments, const=const, num_warps=NUM_WARPS, num_stages=NUM_STAGES)


def _forward(query, key, value, mask, position_bias, value_mixing, dropout_seed, *options):
    """The output (batch, query, heads, value_head_dim), and the statistics that softmax keeps for the backward."""
    const = _constants(query, key, value, mask, *options)
    programs = query.shape[0] * -(-query.shape[2] // BLOCK)
    output, maximum, inverse_sum = _empty_outputs(query, value, const.score_norm)
    x = _inputs(
        query, key, value, mask=mask, position_bias=position_bias, value_mixing=value_mixing, dropout_seed=dropout_seed,
        maximum=maximum, inverse_sum=inverse_sum,
    )  # fmt: skip
    with torch.cuda.device_of(query):
        if const.score_norm == "softmax":
            _launch(softmax_statistics_kernel, programs, 1, const, x)
        _launch(forward_kernel, programs, const.value_chunks, const, x, _view(output.transpose(1, 2)))
    return output, maximum, inverse_sum


def _empty_outputs(query, value, score_norm):
    batch, heads, length, _ = query.shape
    rows = (batch, heads, length) if score_norm == "softmax" else (0,)
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(batch, length, heads, value.shape[3])
    return output, query.new_empty(rows, dtype=dtype), query.new_empty(rows, dtype=dtype)


def _backward(
    gradient,
    query,
    key,
    value,
    mask,
    position_bias,
    value_mixing,
    dropout_seed,
    maximum,
    inverse_sum,
    wanted,
    *options,
):
    """Gradients of query, key, value, position_bias and value_mixing; empty where not wanted."""
    const = _constants(query, key, value, mask, *options)
    x = _inputs(
        query, key, value, mask=mask, position_bias=position_bias, value_mixing=value_mixing, dropout_seed=dropout_seed,
        maximum=maximum, inverse_sum=inverse_sum,
    )  # fmt: skip
    x = x._replace(gradient=_view(gradient.contiguous().transpose(1, 2)), delta=torch.empty_like(maximum))
    batch, heads, length, _ = query.shape
    row_blocks, column_blocks = -(-length // BLOCK), -(-key.shape[2] // BLOCK)
    results = _empty_gradients(query, key, value, position_bias, value_mixing, wanted)
    total = torch.promote_types(query.dtype, torch.float32)
    with torch.cuda.device_of(query):
        if const.score_norm == "softmax":
            _launch(softmax_delta_kernel, batch * row_blocks, 1, const, x)
        if wanted[0]:
            _launch(query_gradient_kernel, batch * row_blocks, const.head_dim_chunks, const, x, _view(results[0]))
        if wanted[1]:
            _launch(key_gradient_kernel, batch * column_blocks, const.head_dim_chunks, const, x, _view(results[1]))
        if wanted[2] or wanted[4]:
            values = results[2] if wanted[2] else torch.empty_like(value)
            parts = query.new_zeros(batch * column_blocks, *value_mixing.shape, dtype=total) if wanted[4] else None
            _launch(value_gradient_kernel, batch * column_blocks, const.value_chunks, const, x, _view(values), parts)
            if parts is not None:
                results[4].copy_(parts.sum(0))
        if wanted[3]:
            diagonals = row_blocks + column_blocks - 1
            tiles = query.new_empty(batch, diagonals, heads, BLOCK, BLOCK, dtype=total)
            _launch(bias_gradient_kernel, batch * diagonals, 1, const, x, tiles)
            results[3].copy_(_sum_diagonals(tiles.sum(0), BLOCK * row_blocks - length, results[3].shape[1]))
    return results


def _sum_diagonals(tiles: Tensor, skipped: int, length: int) -> Tensor:
    """Entry m of (heads, length) sums the places (i, j) of tile t where BLOCK * (t + 1) - 1 - i + j = m + skipped."""
    count, heads = tiles.shape[:2]
    # Rows are padded to twice their length and then read as one element shorter, so each is shifted by one against the row before.
    skewed = torch.nn.functional.pad(tiles.flip(2), (0, BLOCK)).flatten(2)[..., :-BLOCK]
    windows = skewed.unflatten(2, (BLOCK, 2 * BLOCK - 1)).sum(2).transpose(0, 1)
    windows = torch.nn.functional.pad(windows, (0, 1))
    result = tiles.new_zeros(heads, BLOCK * (count + 1))
    result[:, :-BLOCK] += windows[..., :BLOCK].reshape(heads, -1)
    result[:, BLOCK:] += windows[..., BLOCK:].reshape(heads, -1)
    return result[:, skipped : skipped + length]


def _empty_gradients(query, key, value, position_bias, value_mixing, wanted):
    tensors = (query, key, value, position_bias, value_mixing)
    return [torch.empty_like(t) if w else query.new_empty(0) for t, w in zip(tensors, wanted, strict=True)]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.options = inputs[7:]


def _differentiate(ctx, gradient, *_):
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)]
    results = torch.ops.hyla.triton_backward(gradient, *ctx.saved_tensors, wanted, *ctx.options)
    query, key, value, bias, mixing = (g if w else None for g, w in zip(results, wanted, strict=True))
    return query, key, value, None, bias, mixing, None, None, None, None, None, None


TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? position_bias, Tensor? value_mixing, Tensor? dropout_seed"
OPTIONS = "float scaling, str score_norm, str activation, bool generated, float dropout"


def _register() -> None:
    """Registers each pass as one operator, a single node for torch.compile and torch.export."""
    forward = torch.library.custom_op(
        "hyla::triton_forward", _forward, mutates_args=(), schema=f"({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)"
    )
    forward.register_fake(
        lambda query, key, value, mask, bias, mixing, seed, scaling, score_norm, *options: _empty_outputs(
            query, value, score_norm
        )
    )
    forward.register_autograd(_differentiate, setup_context=_save)
    backward = torch.library.custom_op(
        "hyla::triton_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor gradient, {TENSORS}, Tensor maximum, Tensor inverse_sum, bool[] wanted, {OPTIONS}) -> Tensor[]",
    )
    backward.register_fake(
        lambda _, query, key, value, mask, bias, mixing, seed, maximum, inverse_sum, wanted, *options: (
            _empty_gradients(query, key, value, bias, mixing, wanted)
        )
    )


INTERPRETED = triton is not None and not isinstance(forward_kernel, triton.JITFunction)
# Code from a repository and the installed package may both be imported; the first one's operators serve both.
if triton is not None and not hasattr(torch.ops.hyla, "triton_forward"):
    _register()


def triton_problem(
    query: Tensor, key: Tensor | None = None, value: Tensor | None = None, value_mixing: Tensor | None = None
) -> str | None:
    """Why `triton_attention` cannot take these tensors here, or `None` if it can."""
    if triton is None:
        return "triton is not installed (pip install hf-hyla[triton], or torch for CUDA, which brings it)"
    if not query.is_cuda and not INTERPRETED:
        return f"the kernel runs on CUDA, not on {query.device.type}"
    if query.dtype not in MAX_TILE:
        return f"the kernel computes in {', '.join(map(str, MAX_TILE))}, not in {query.dtype}"
    if query.shape[1] > MAX_HEADS:
        return f"the kernel takes at most {MAX_HEADS} heads, not {query.shape[1]}"
    if query.is_cuda:
        capability, available = _gpu(query.device.index)
        if capability < OLDEST_CAPABILITY:
            return "the kernel needs a GPU of compute capability {}.{}, not {}.{}".format(
                *OLDEST_CAPABILITY, *capability
            )
        if _widest_chunk(query) < 16:
            return (
                f"with {query.shape[1]} heads in {query.dtype} the kernel needs more shared memory than the "
                f"{available // 1024} KiB that this GPU gives a program"
            )
    if value_mixing is not None and value_mixing.shape[2] > _widest_chunk(query):
        return (
            f"with {query.shape[1]} heads in {query.dtype} the kernel takes a second value layer up to a value_head_dim of "
            f"{_widest_chunk(query)}, not {value_mixing.shape[2]}"
        )
    return None


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    value_mixing: Tensor | None = None,
    seed: Tensor | None = None,
    scaling: float,
    score_norm: str,
    activation: str,
    generated: bool,
    dropout: float,
) -> Tensor:
    """
    Attention as `eager_attention_forward` defines it, without ever holding a (query, key) matrix. Call it only where
    `triton_problem` is `None`.

    Args:
        query (`torch.Tensor`): (batch, heads, query, head_dim). All tensors may have any strides.
        key (`torch.Tensor`): (batch, heads, key, head_dim).
        value (`torch.Tensor`): (batch, heads, key, value_head_dim).
        mask (`torch.Tensor`, *optional*): bool, broadcastable to (batch, 1, query, key); True attends.
        position_bias (`torch.Tensor`, *optional*): (heads, query + key - 1), by diagonal: entry m is added to the score
            of every pair with `key_index - query_index = m - (query - 1)`. Beside queries in half precision it may be in
            float32, and its gradient then is too.
        value_mixing (`torch.Tensor`, *optional*): (heads, value_head_dim, value_head_dim), the second layer of HYLA+, in the
            same dtypes as `position_bias`.
        seed (`torch.Tensor`, *optional*): two int64 numbers in [0, 2³¹), the seed of `pair_dropout`; `None` if `dropout` is 0.
        scaling (`float`): multiplies query · key.
        score_norm (`str`): `"rms_head"`, `"softmax"` or `"none"`.
        activation (`str`): `"relu"` or `"none"`.
        generated (`bool`): whether codes generate value networks (HYLA) or mix values (linear, softmax).
        dropout (`float`): share of the pairs that are dropped, the same pairs for the whole batch and all heads.

    Returns:
        `torch.Tensor` of shape (batch, query, heads, value_head_dim), contiguous, in the queries' dtype.
    """
    options = (scaling, score_norm, activation, generated, dropout)
    tensors = (query, key, value, mask, position_bias, value_mixing, seed)
    output, _, _ = torch.ops.hyla.triton_forward(*tensors, *options)
    return output
