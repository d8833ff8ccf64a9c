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
"""One tile of HYLA attention in Triton, for the walks over tiles in `kernels_triton_hyla.py`.

A program holds one tile of 16 queries by 16 keys for all heads at once, since a code couples the heads. Products are
three-dimensional `tl.dot`s, batched over

- heads: scores[h] = query[h] (16 x head_dim) · key[h]ᵀ, and the gradients of queries and keys;
- keys: hidden[k] = codes[k] (16 queries x heads) · value[k] (heads x value_head_dim), and back to codes and values;
- queries: output[q] += codes[q] (heads x 16 keys) · hidden[q] (16 keys x value_head_dim), and back likewise.

Half precision therefore runs on tensor cores throughout. In exchange `hidden`, a result of the second kind and an operand
of the third, changes its layout through shared memory in every tile. Single precision is multiplied exactly, without tensor
cores. Head counts and widths are padded to powers of two of at least 16.
"""

from typing import Any, NamedTuple

from torch import Tensor


try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # `triton_problem` reports it
    triton = tl = constexpr = None


class View(NamedTuple):
    """A tensor as kernels see it: its pointer, and its strides in the order (batch, heads, sequence, width)."""

    pointer: Any
    strides: Any


class Inputs(NamedTuple):
    """The inputs of every kernel. Those that a call does not have are `None`."""

    query: View
    key: View
    value: View
    gradient: View | None  # of the output
    mask: View | None
    position_bias: Tensor | None
    value_mixing: Tensor | None
    dropout_seed: Tensor | None
    maximum: Tensor | None  # softmax: largest score of a row, (batch, heads, query)
    inverse_sum: Tensor | None  # softmax: inverse sum of the exponentials of a row
    delta: Tensor | None  # softmax, backward: subtracted from the gradients of a row
    query_length: int
    key_length: int
    first_query: int  # position of the first query in the sequence, which pair dropout needs


class Constants(NamedTuple):
    """The values for which a kernel is compiled."""

    heads: int
    head_dim: int
    value_head_dim: int
    scaling: float
    score_norm: str
    relu: bool
    generated: bool
    threshold: int  # pair dropout: a pair is kept if its random word is not below this; 0 keeps all
    keep_scale: float
    head_block: Any  # heads, padded
    head_dim_block: Any  # widths are padded, and divided into chunks where a tile would not fit into registers
    head_dim_chunks: int
    value_block: Any
    value_chunks: int
    operand: Any  # dtype of the operands of products
    total: Any  # dtype of their sums
    lowest: float  # lowest number of the dtype of sums
    index: Any  # dtype of offsets within a batch row
    block: Any  # queries and keys of a tile
    score_scale: float  # of rms_head, see `attention_hyla.RMS_HEAD_SCALE`
    epsilon: float  # of rms_head


def jit(function):
    return function if triton is None else triton.jit(function)


@jit
def dot(left, right, total, const: constexpr):
    return tl.dot(
        left.to(const.operand), right.to(const.operand), total, input_precision="ieee", out_dtype=const.total
    )


@jit
def activated(x, const: constexpr):
    if const.relu:
        return tl.where(x < 0, 0.0, x)  # keeps NaN, as torch does
    else:
        return x


@jit
def gated(gradient, x, const: constexpr):
    if const.relu:
        return tl.where(x <= 0, 0.0, gradient)
    else:
        return gradient


@jit
def _pointers(view, batch, positions, length, chunk, width, size: constexpr, const: constexpr):
    """Pointers to (heads, positions, one chunk of the width), and which are valid."""
    heads = tl.arange(0, const.head_block)[:, None, None].to(const.index)
    rows = positions[None, :, None].to(const.index)
    columns = (chunk * size + tl.arange(0, size)[None, None, :]).to(const.index)
    strides = view.strides
    offsets = heads * strides[1] + rows * strides[2] + columns * strides[3]
    valid = (heads < const.heads) & (rows < length) & (columns < width)
    return view.pointer + batch * strides[0] + offsets, valid


@jit
def load(view, batch, positions, length, chunk, width, size: constexpr, const: constexpr):
    pointers, valid = _pointers(view, batch, positions, length, chunk, width, size, const)
    return tl.load(pointers, mask=valid, other=0.0)


@jit
def store(view, tile, batch, positions, length, chunk, width, size: constexpr, const: constexpr):
    pointers, valid = _pointers(view, batch, positions, length, chunk, width, size, const)
    tl.store(pointers, tile.to(view.pointer.dtype.element_ty), mask=valid)


@jit
def row_offsets(x, batch, rows, const: constexpr):
    """Offsets and validity of (heads, rows) in a contiguous (batch, heads, query)."""
    heads = tl.arange(0, const.head_block)[:, None]
    offsets = (batch * const.heads + heads) * x.query_length + rows[None, :]
    return offsets, (heads < const.heads) & (rows < x.query_length)[None, :]


@jit
def find_scores(x, batch, rows, columns, const: constexpr):
    """Scores (heads, rows, columns), masked as the norm requires, and which pairs attend (rows, columns)."""
    scores = tl.zeros([const.head_block, const.block, const.block], const.total)
    for chunk in range(const.head_dim_chunks):
        query = load(x.query, batch, rows, x.query_length, chunk, const.head_dim, const.head_dim_block, const)
        key = load(x.key, batch, columns, x.key_length, chunk, const.head_dim, const.head_dim_block, const)
        scores = dot(query, key.permute(0, 2, 1), scores, const)
    scores *= const.scaling
    attends = (rows < x.query_length)[:, None] & (columns < x.key_length)[None, :]
    if x.position_bias is not None:
        heads = tl.arange(0, const.head_block)[:, None, None]
        diagonals = columns[None, :] - rows[:, None] + x.query_length - 1
        offsets = heads * (x.query_length + x.key_length - 1) + diagonals[None, :, :]
        valid = (heads < const.heads) & attends[None, :, :]
        scores += tl.load(x.position_bias + offsets, mask=valid, other=0.0).to(const.total)
    if x.mask is not None:
        strides = x.mask.strides
        offsets = rows[:, None].to(const.index) * strides[2] + columns[None, :].to(const.index) * strides[3]
        attends = tl.load(x.mask.pointer + batch * strides[0] + offsets, mask=attends, other=0) != 0
    if const.score_norm == "softmax":
        # The masked score is finite, so that a fully masked row becomes uniform over all keys.
        scores = tl.where(attends[None, :, :], scores, const.lowest)
        scores = tl.where((columns < x.key_length)[None, None, :], scores, float("-inf"))
    else:
        scores = tl.where(attends[None, :, :], scores, 0.0)
    return scores, attends


@jit
def find_codes(x, batch, rows, columns, const: constexpr):
    """Codes (heads, rows, columns), which pairs attend, and for rms_head the inverse root mean square (or 1)."""
    scores, attends = find_scores(x, batch, rows, columns, const)
    inverse = 1.0
    if const.score_norm == "rms_head":
        scores *= const.score_scale
        epsilon = const.epsilon * const.score_scale * const.score_scale
        inverse = tl.rsqrt(tl.sum(scores * scores, 0) / const.heads + epsilon)[None, :, :]
        scores *= inverse
        inverse *= const.score_scale
    elif const.score_norm == "softmax":
        offsets, valid = row_offsets(x, batch, rows, const)
        maximum = tl.load(x.maximum + offsets, mask=valid, other=0.0)[:, :, None]
        inverse_sum = tl.load(x.inverse_sum + offsets, mask=valid, other=0.0)[:, :, None]
        scores = tl.exp(scores - maximum) * inverse_sum
    return scores, attends, inverse


@jit
def _mix(word):
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    return word ^ (word >> 15)


@jit
def dropped(tile, x, rows, columns, const: constexpr):
    """The tile (heads, rows, columns) after pair dropout, whose words depend on the pair alone, so kernels agree."""
    if const.threshold > 0:
        row_words = _mix((rows + x.first_query).to(tl.uint32) ^ tl.load(x.dropout_seed).to(tl.uint32))
        column_words = _mix(columns.to(tl.uint32) ^ tl.load(x.dropout_seed + 1).to(tl.uint32))
        words = _mix(row_words[:, None] ^ column_words[None, :])
        tile = tl.where((words.to(tl.int64) >= const.threshold)[None, :, :], tile * const.keep_scale, 0.0)
    return tile


@jit
def head_column(by_key, head, const: constexpr):
    """The codes of one head, (columns · rows, 1), from those of all heads, (columns, rows, heads)."""
    heads = tl.arange(0, const.head_block)[None, None, :]
    return tl.reshape(tl.sum(tl.where(heads == head, by_key, 0.0), 2), [const.block * const.block, 1])


@jit
def mixing_offsets(head, const: constexpr):
    """Offsets and validity of the matrix of one head, (to, from), in a contiguous value_mixing."""
    width = tl.arange(0, const.value_block)
    offsets = (head * const.value_head_dim + width[:, None]) * const.value_head_dim + width[None, :]
    return offsets, (width < const.value_head_dim)[:, None] & (width < const.value_head_dim)[None, :]


@jit
def second_layer(x, by_key, hidden, const: constexpr):
    """HYLA+: Σ_h codes[h] · W[h] hidden before its activation, (columns · rows, value_head_dim)."""
    second = tl.zeros([const.block * const.block, const.value_block], const.total)
    for head in range(const.heads):
        offsets, valid = mixing_offsets(head, const)
        weight = tl.load(x.value_mixing + offsets, mask=valid, other=0.0)
        mixed = dot(hidden, weight.permute(1, 0), tl.zeros_like(second), const)
        second += head_column(by_key, head, const) * mixed
    return second


@jit
def first_layer(by_key, value, const: constexpr):
    """The hidden layer before its activation, (columns, rows, value_head_dim)."""
    zeros = tl.zeros([const.block, const.block, const.value_block], const.total)
    return dot(by_key, value.permute(1, 0, 2), zeros, const)


@jit
def network_gradient(x, used, value, gradient, const: constexpr):
    """
    Backward through the value networks of a tile, for one chunk of the width.

    Returns two gradients of the codes, which are to be added: by query (rows, heads, columns), and by key (columns, rows,
    heads). Then the gradients of the two layers before their activation, the first (columns, rows, width) and the second
    (columns · rows, width). Then the first hidden layer (columns · rows, width).
    """
    pairs: constexpr = const.block * const.block
    by_key = used.permute(2, 1, 0)
    by_query = gradient.permute(1, 0, 2)
    first = first_layer(by_key, value, const)
    hidden = activated(first, const)
    zeros = tl.zeros([const.block, const.block, const.value_block], const.total)
    layer_gradient = dot(used.permute(1, 2, 0), by_query, zeros, const).to(const.operand).permute(1, 0, 2)
    code_gradient_by_key = tl.zeros([const.block, const.block, const.head_block], const.total)
    flat = tl.reshape(hidden, [pairs, const.value_block])
    second_gradient = flat
    if x.value_mixing is not None:
        second = second_layer(x, by_key, flat, const)
        hidden = tl.reshape(activated(second, const), [const.block, const.block, const.value_block])
        second_gradient = gated(tl.reshape(layer_gradient, [pairs, const.value_block]).to(const.total), second, const)
        flat_gradient = tl.zeros([pairs, const.value_block], const.total)
        heads = tl.arange(0, const.head_block)[None, None, :]
        for head in range(const.heads):
            offsets, valid = mixing_offsets(head, const)
            weight = tl.load(x.value_mixing + offsets, mask=valid, other=0.0)
            back = dot(second_gradient, weight, tl.zeros_like(flat_gradient), const)
            code_gradient = tl.reshape(tl.sum(back * flat, 1), [const.block, const.block, 1])
            code_gradient_by_key += tl.where(heads == head, code_gradient, 0.0)
            flat_gradient += head_column(by_key, head, const) * back
        layer_gradient = tl.reshape(flat_gradient, [const.block, const.block, const.value_block])
    first_gradient = gated(layer_gradient.to(const.total), first, const)
    code_gradient_by_key = dot(first_gradient, value.permute(1, 2, 0), code_gradient_by_key, const)
    zeros = tl.zeros([const.block, const.head_block, const.block], const.total)
    code_gradient_by_query = dot(by_query, hidden.to(const.operand).permute(1, 2, 0), zeros, const)
    return code_gradient_by_query, code_gradient_by_key, first_gradient, second_gradient, flat


@jit
def code_gradient(x, codes, batch, rows, columns, const: constexpr):
    """Gradient of the codes before dropout, (heads, rows, columns)."""
    used = dropped(codes, x, rows, columns, const)
    result = tl.zeros_like(codes)
    for chunk in range(const.value_chunks):
        value = load(x.value, batch, columns, x.key_length, chunk, const.value_head_dim, const.value_block, const)
        output = load(x.gradient, batch, rows, x.query_length, chunk, const.value_head_dim, const.value_block, const)
        if const.generated:
            by_query, by_key, _, _, _ = network_gradient(x, used, value, output, const)
            result += by_query.permute(1, 0, 2) + by_key.permute(2, 1, 0)
        else:
            result = dot(output, activated(value, const).permute(0, 2, 1), result, const)
    return dropped(result, x, rows, columns, const)


@jit
def score_gradient(x, batch, rows, columns, const: constexpr):
    """Gradient of the scores, (heads, rows, columns): zero where a pair does not attend."""
    codes, attends, inverse = find_codes(x, batch, rows, columns, const)
    result = code_gradient(x, codes, batch, rows, columns, const)
    if const.score_norm == "rms_head" and const.heads == 1:
        result *= (
            inverse * inverse * inverse * const.epsilon
        )  # the difference below, whose two terms differ by epsilon alone
    elif const.score_norm == "rms_head":
        result = inverse * (result - codes * (tl.sum(result * codes, 0) / const.heads)[None, :, :])
    elif const.score_norm == "softmax":
        offsets, valid = row_offsets(x, batch, rows, const)
        result = codes * (result - tl.load(x.delta + offsets, mask=valid, other=0.0)[:, :, None])
    return tl.where(attends[None, :, :], result, 0.0)


@jit
def program(length, const: constexpr):
    """The batch row of this program, and the positions of its block."""
    blocks = tl.cdiv(length, const.block)
    block = tl.program_id(0) % blocks
    return (tl.program_id(0) // blocks).to(tl.int64), block * const.block + tl.arange(0, const.block)
