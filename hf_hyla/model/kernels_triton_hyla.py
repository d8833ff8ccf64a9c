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
"""One tile of HYLA attention in Triton, and the walks over tiles that `ops_triton_hyla.py` launches.

A program holds one tile of 16 queries by 16 keys for all heads at once, since a code couples the heads, and walks over
the tiles of its row (output, query gradient), its column (key and value gradients) or its diagonal (gradient of the
position bias), recomputing the codes. Products are three-dimensional `tl.dot`s, batched over

- heads: scores[h] = query[h] (16 x head_dim) · key[h]ᵀ, and the gradients of queries and keys;
- keys: hidden[k] = codes[k] (16 queries x heads) · value[k] (heads x value_head_dim), and back to codes and values;
- queries: output[q] += codes[q] (heads x 16 keys) · hidden[q] (16 keys x value_head_dim), and back likewise.

So half precision runs on tensor cores throughout; in exchange `hidden`, result of the second kind and operand of the
third, changes its layout through shared memory in every tile. Single precision is multiplied without them, exactly.
Per pair, in units of heads x width multiply-adds at equal widths: 3 forward, where softmax attention needs 2; backward
6 + 6 + 4 for queries, keys and values and 5 for a position bias, where it needs 5. HYLA+ adds heads x width² forward
and two to three times that in each walk backward. Head counts and widths are padded to powers of two of at least 16.
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
    """A tensor as kernels see it: pointer, and strides in the order (batch, heads, sequence, width)."""

    pointer: Any
    strides: Any


class Inputs(NamedTuple):
    """What every kernel reads; what a request lacks is `None`."""

    query: View
    key: View
    value: View
    gradient: View | None  # of the output
    mask: View | None
    position_bias: Tensor | None
    value_mixing: Tensor | None
    dropout_seed: Tensor | None
    maximum: Tensor | None  # softmax: largest score of a row, (batch, heads, query)
    inverse_sum: Tensor | None  # softmax: of the exponentials of a row
    delta: Tensor | None  # softmax, backward: what is subtracted from the gradients of a row
    query_length: int
    key_length: int
    first_query: int  # its position in the sequence, by which pairs are dropped


class Form(NamedTuple):
    """What is fixed when a kernel is compiled."""

    heads: int
    head_dim: int
    value_head_dim: int
    scaling: float
    score_norm: str
    relu: bool
    generated: bool
    threshold: int  # pair dropout: kept if its random word is not below; 0 keeps all
    keep_scale: float
    head_block: Any  # heads, padded
    head_dim_block: Any  # widths are padded, and divided into chunks where a tile would not fit into registers
    head_dim_chunks: int
    value_block: Any
    value_chunks: int
    operand: Any  # dtype of the operands of products
    total: Any  # dtype of their sums
    lowest: float  # number of that dtype
    index: Any  # dtype of offsets within a batch row
    block: Any  # queries and keys of a tile
    score_scale: float  # of rms_head, see `attention_hyla.RMS_HEAD_SCALE`
    epsilon: float  # of rms_head


def _kernel(function):
    return function if triton is None else triton.jit(function)


@_kernel
def _dot(left, right, total, form: constexpr):
    return tl.dot(left.to(form.operand), right.to(form.operand), total, input_precision="ieee", out_dtype=form.total)


@_kernel
def _activated(x, form: constexpr):
    if form.relu:
        return tl.where(x < 0, 0.0, x)  # keeps NaN, as torch does
    else:
        return x


@_kernel
def _gated(gradient, x, form: constexpr):
    if form.relu:
        return tl.where(x <= 0, 0.0, gradient)
    else:
        return gradient


@_kernel
def _pointers(view, batch, positions, length, chunk, width, size: constexpr, form: constexpr):
    """Pointers to (heads, positions, one chunk of the width), and which are valid."""
    heads = tl.arange(0, form.head_block)[:, None, None].to(form.index)
    rows = positions[None, :, None].to(form.index)
    columns = (chunk * size + tl.arange(0, size)[None, None, :]).to(form.index)
    strides = view.strides
    offsets = heads * strides[1] + rows * strides[2] + columns * strides[3]
    valid = (heads < form.heads) & (rows < length) & (columns < width)
    return view.pointer + batch * strides[0] + offsets, valid


@_kernel
def _load(view, batch, positions, length, chunk, width, size: constexpr, form: constexpr):
    pointers, valid = _pointers(view, batch, positions, length, chunk, width, size, form)
    return tl.load(pointers, mask=valid, other=0.0)


@_kernel
def _store(view, tile, batch, positions, length, chunk, width, size: constexpr, form: constexpr):
    pointers, valid = _pointers(view, batch, positions, length, chunk, width, size, form)
    tl.store(pointers, tile.to(view.pointer.dtype.element_ty), mask=valid)


@_kernel
def _row_offsets(x, batch, rows, form: constexpr):
    """Offsets and validity of (heads, rows) in a contiguous (batch, heads, query)."""
    heads = tl.arange(0, form.head_block)[:, None]
    offsets = (batch * form.heads + heads) * x.query_length + rows[None, :]
    return offsets, (heads < form.heads) & (rows < x.query_length)[None, :]


@_kernel
def _scores(x, batch, rows, columns, form: constexpr):
    """Scores (heads, rows, columns), masked as the norm wants it, and which pairs attend (rows, columns)."""
    scores = tl.zeros([form.head_block, form.block, form.block], form.total)
    for chunk in range(form.head_dim_chunks):
        query = _load(x.query, batch, rows, x.query_length, chunk, form.head_dim, form.head_dim_block, form)
        key = _load(x.key, batch, columns, x.key_length, chunk, form.head_dim, form.head_dim_block, form)
        scores = _dot(query, key.permute(0, 2, 1), scores, form)
    scores *= form.scaling
    attends = (rows < x.query_length)[:, None] & (columns < x.key_length)[None, :]
    if x.position_bias is not None:
        heads = tl.arange(0, form.head_block)[:, None, None]
        diagonals = columns[None, :] - rows[:, None] + x.query_length - 1
        offsets = heads * (x.query_length + x.key_length - 1) + diagonals[None, :, :]
        valid = (heads < form.heads) & attends[None, :, :]
        scores += tl.load(x.position_bias + offsets, mask=valid, other=0.0).to(form.total)
    if x.mask is not None:
        strides = x.mask.strides
        offsets = rows[:, None].to(form.index) * strides[2] + columns[None, :].to(form.index) * strides[3]
        attends = tl.load(x.mask.pointer + batch * strides[0] + offsets, mask=attends, other=0) != 0
    if form.score_norm == "softmax":
        # Finite, so that a row in which nothing attends becomes uniform over all keys.
        scores = tl.where(attends[None, :, :], scores, form.lowest)
        scores = tl.where((columns < x.key_length)[None, None, :], scores, float("-inf"))
    else:
        scores = tl.where(attends[None, :, :], scores, 0.0)
    return scores, attends


@_kernel
def _codes(x, batch, rows, columns, form: constexpr):
    """Codes (heads, rows, columns), which pairs attend, and for rms_head the inverse root mean square (or 1)."""
    scores, attends = _scores(x, batch, rows, columns, form)
    inverse = 1.0
    if form.score_norm == "rms_head":
        scores *= form.score_scale
        epsilon = form.epsilon * form.score_scale * form.score_scale
        inverse = tl.rsqrt(tl.sum(scores * scores, 0) / form.heads + epsilon)[None, :, :]
        scores *= inverse
        inverse *= form.score_scale
    elif form.score_norm == "softmax":
        offsets, valid = _row_offsets(x, batch, rows, form)
        maximum = tl.load(x.maximum + offsets, mask=valid, other=0.0)[:, :, None]
        inverse_sum = tl.load(x.inverse_sum + offsets, mask=valid, other=0.0)[:, :, None]
        scores = tl.exp(scores - maximum) * inverse_sum
    return scores, attends, inverse


@_kernel
def _mix(word):
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    return word ^ (word >> 15)


@_kernel
def _dropped(tile, x, rows, columns, form: constexpr):
    """The tile (heads, rows, columns) after pair dropout: counted, not drawn, so that every kernel sees the same."""
    if form.threshold > 0:
        row_words = _mix((rows + x.first_query).to(tl.uint32) ^ tl.load(x.dropout_seed).to(tl.uint32))
        column_words = _mix(columns.to(tl.uint32) ^ tl.load(x.dropout_seed + 1).to(tl.uint32))
        words = _mix(row_words[:, None] ^ column_words[None, :])
        tile = tl.where((words.to(tl.int64) >= form.threshold)[None, :, :], tile * form.keep_scale, 0.0)
    return tile


@_kernel
def _head_column(by_key, head, form: constexpr):
    """The codes of one head, (columns · rows, 1), out of (columns, rows, heads)."""
    heads = tl.arange(0, form.head_block)[None, None, :]
    return tl.reshape(tl.sum(tl.where(heads == head, by_key, 0.0), 2), [form.block * form.block, 1])


@_kernel
def _mixing_offsets(head, form: constexpr):
    """Offsets and validity of the matrix of one head, (to, from), in a contiguous value_mixing."""
    width = tl.arange(0, form.value_block)
    offsets = (head * form.value_head_dim + width[:, None]) * form.value_head_dim + width[None, :]
    return offsets, (width < form.value_head_dim)[:, None] & (width < form.value_head_dim)[None, :]


@_kernel
def _second_layer(x, by_key, hidden, form: constexpr):
    """HYLA+: Σ_h codes[h] · W[h] hidden before its activation, (columns · rows, value_head_dim)."""
    second = tl.zeros([form.block * form.block, form.value_block], form.total)
    for head in range(form.heads):
        offsets, valid = _mixing_offsets(head, form)
        weight = tl.load(x.value_mixing + offsets, mask=valid, other=0.0)
        mixed = _dot(hidden, weight.permute(1, 0), tl.zeros_like(second), form)
        second += _head_column(by_key, head, form) * mixed
    return second


@_kernel
def _first_layer(by_key, value, form: constexpr):
    """The hidden layer before its activation, (columns, rows, value_head_dim)."""
    zeros = tl.zeros([form.block, form.block, form.value_block], form.total)
    return _dot(by_key, value.permute(1, 0, 2), zeros, form)


@_kernel
def _network_gradient(x, used, value, gradient, form: constexpr):
    """
    Backward through the value networks of a tile, for one chunk of the width.

    Returns the gradients of the codes by query (rows, heads, columns) and by key (columns, rows, heads), those of the
    layers before their activation, first and second, and the first hidden layer; all but the codes' (columns, rows,
    width), flattened to (columns · rows, width) in the second layer and the last.
    """
    pairs: constexpr = form.block * form.block
    by_key = used.permute(2, 1, 0)
    by_query = gradient.permute(1, 0, 2)
    first = _first_layer(by_key, value, form)
    hidden = _activated(first, form)
    zeros = tl.zeros([form.block, form.block, form.value_block], form.total)
    layer_gradient = _dot(used.permute(1, 2, 0), by_query, zeros, form).to(form.operand).permute(1, 0, 2)
    code_gradient_by_key = tl.zeros([form.block, form.block, form.head_block], form.total)
    flat = tl.reshape(hidden, [pairs, form.value_block])
    second_gradient = flat
    if x.value_mixing is not None:
        second = _second_layer(x, by_key, flat, form)
        hidden = tl.reshape(_activated(second, form), [form.block, form.block, form.value_block])
        second_gradient = _gated(tl.reshape(layer_gradient, [pairs, form.value_block]).to(form.total), second, form)
        flat_gradient = tl.zeros([pairs, form.value_block], form.total)
        heads = tl.arange(0, form.head_block)[None, None, :]
        for head in range(form.heads):
            offsets, valid = _mixing_offsets(head, form)
            weight = tl.load(x.value_mixing + offsets, mask=valid, other=0.0)
            back = _dot(second_gradient, weight, tl.zeros_like(flat_gradient), form)
            code_gradient = tl.reshape(tl.sum(back * flat, 1), [form.block, form.block, 1])
            code_gradient_by_key += tl.where(heads == head, code_gradient, 0.0)
            flat_gradient += _head_column(by_key, head, form) * back
        layer_gradient = tl.reshape(flat_gradient, [form.block, form.block, form.value_block])
    first_gradient = _gated(layer_gradient.to(form.total), first, form)
    code_gradient_by_key = _dot(first_gradient, value.permute(1, 2, 0), code_gradient_by_key, form)
    zeros = tl.zeros([form.block, form.head_block, form.block], form.total)
    code_gradient_by_query = _dot(by_query, hidden.to(form.operand).permute(1, 2, 0), zeros, form)
    return code_gradient_by_query, code_gradient_by_key, first_gradient, second_gradient, flat


@_kernel
def _code_gradient(x, codes, batch, rows, columns, form: constexpr):
    """Gradient of the codes before dropout, (heads, rows, columns)."""
    used = _dropped(codes, x, rows, columns, form)
    result = tl.zeros_like(codes)
    for chunk in range(form.value_chunks):
        value = _load(x.value, batch, columns, x.key_length, chunk, form.value_head_dim, form.value_block, form)
        output = _load(x.gradient, batch, rows, x.query_length, chunk, form.value_head_dim, form.value_block, form)
        if form.generated:
            by_query, by_key, _, _, _ = _network_gradient(x, used, value, output, form)
            result += by_query.permute(1, 0, 2) + by_key.permute(2, 1, 0)
        else:
            result = _dot(output, _activated(value, form).permute(0, 2, 1), result, form)
    return _dropped(result, x, rows, columns, form)


@_kernel
def _score_gradient(x, batch, rows, columns, form: constexpr):
    """Gradient of the scores, (heads, rows, columns): zero where a pair does not attend."""
    codes, attends, inverse = _codes(x, batch, rows, columns, form)
    result = _code_gradient(x, codes, batch, rows, columns, form)
    if form.score_norm == "rms_head" and form.heads == 1:
        result *= inverse * inverse * inverse * form.epsilon  # the difference below, of numbers equal but for epsilon
    elif form.score_norm == "rms_head":
        result = inverse * (result - codes * (tl.sum(result * codes, 0) / form.heads)[None, :, :])
    elif form.score_norm == "softmax":
        offsets, valid = _row_offsets(x, batch, rows, form)
        result = codes * (result - tl.load(x.delta + offsets, mask=valid, other=0.0)[:, :, None])
    return tl.where(attends[None, :, :], result, 0.0)


@_kernel
def _program(length, form: constexpr):
    """Batch row of this program, and the positions of its block."""
    blocks = tl.cdiv(length, form.block)
    block = tl.program_id(0) % blocks
    return (tl.program_id(0) // blocks).to(tl.int64), block * form.block + tl.arange(0, form.block)


@_kernel
def softmax_statistics_kernel(x, form: constexpr):
    """Row walk: maximum and inverse sum of exponentials of every row of scores, apart so that neither loses digits."""
    batch, rows = _program(x.query_length, form)
    maximum = tl.full([form.head_block, form.block], float("-inf"), form.total)
    total = tl.zeros([form.head_block, form.block], form.total)
    for start in range(0, x.key_length, form.block):
        scores, _ = _scores(x, batch, rows, start + tl.arange(0, form.block), form)
        larger = tl.maximum(maximum, tl.max(scores, 2))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(scores - larger[:, :, None]), 2)
        maximum = larger
    offsets, valid = _row_offsets(x, batch, rows, form)
    tl.store(x.maximum + offsets, maximum, mask=valid)
    tl.store(x.inverse_sum + offsets, 1.0 / total, mask=valid)


@_kernel
def softmax_delta_kernel(x, form: constexpr):
    """Row walk: delta = Σ_keys codes · their gradient, which softmax subtracts from every gradient of its row."""
    batch, rows = _program(x.query_length, form)
    delta = tl.zeros([form.head_block, form.block], form.total)
    for start in range(0, x.key_length, form.block):
        columns = start + tl.arange(0, form.block)
        codes, _, _ = _codes(x, batch, rows, columns, form)
        delta += tl.sum(codes * _code_gradient(x, codes, batch, rows, columns, form), 2)
    offsets, valid = _row_offsets(x, batch, rows, form)
    tl.store(x.delta + offsets, delta, mask=valid)


@_kernel
def forward_kernel(x, output, form: constexpr):
    """Row walk: one chunk of the output of a block of queries."""
    batch, rows = _program(x.query_length, form)
    chunk = tl.program_id(1)
    if form.generated:
        total = tl.zeros([form.block, form.head_block, form.value_block], form.total)
    else:
        total = tl.zeros([form.head_block, form.block, form.value_block], form.total)
    for start in range(0, x.key_length, form.block):
        columns = start + tl.arange(0, form.block)
        codes, _, _ = _codes(x, batch, rows, columns, form)
        used = _dropped(codes, x, rows, columns, form)
        value = _load(x.value, batch, columns, x.key_length, chunk, form.value_head_dim, form.value_block, form)
        if form.generated:
            by_key = used.permute(2, 1, 0)
            hidden = _activated(_first_layer(by_key, value, form), form)
            if x.value_mixing is not None:
                flat = tl.reshape(hidden, [form.block * form.block, form.value_block])
                second = _activated(_second_layer(x, by_key, flat, form), form)
                hidden = tl.reshape(second, [form.block, form.block, form.value_block])
            total = _dot(used.permute(1, 0, 2), hidden.to(form.operand).permute(1, 0, 2), total, form)
        else:
            total = _dot(used, _activated(value, form), total, form)
    if form.generated:
        total = total.permute(1, 0, 2)
    _store(output, total, batch, rows, x.query_length, chunk, form.value_head_dim, form.value_block, form)


@_kernel
def query_gradient_kernel(x, result, form: constexpr):
    """Row walk: one chunk of the gradient of a block of queries."""
    batch, rows = _program(x.query_length, form)
    chunk = tl.program_id(1)
    total = tl.zeros([form.head_block, form.block, form.head_dim_block], form.total)
    for start in range(0, x.key_length, form.block):
        columns = start + tl.arange(0, form.block)
        scores = _score_gradient(x, batch, rows, columns, form)
        key = _load(x.key, batch, columns, x.key_length, chunk, form.head_dim, form.head_dim_block, form)
        total = _dot(scores, key, total, form)
    total *= form.scaling
    _store(result, total, batch, rows, x.query_length, chunk, form.head_dim, form.head_dim_block, form)


@_kernel
def key_gradient_kernel(x, result, form: constexpr):
    """Column walk: one chunk of the gradient of a block of keys."""
    batch, columns = _program(x.key_length, form)
    chunk = tl.program_id(1)
    total = tl.zeros([form.head_block, form.block, form.head_dim_block], form.total)
    for start in range(0, x.query_length, form.block):
        rows = start + tl.arange(0, form.block)
        scores = _score_gradient(x, batch, rows, columns, form)
        query = _load(x.query, batch, rows, x.query_length, chunk, form.head_dim, form.head_dim_block, form)
        total = _dot(scores.permute(0, 2, 1), query, total, form)
    total *= form.scaling
    _store(result, total, batch, columns, x.key_length, chunk, form.head_dim, form.head_dim_block, form)


@_kernel
def value_gradient_kernel(x, result, mixing_gradient, form: constexpr):
    """Column walk: one chunk of the gradient of a block of values; the block's part of that of value_mixing."""
    batch, columns = _program(x.key_length, form)
    chunk = tl.program_id(1)
    value = _load(x.value, batch, columns, x.key_length, chunk, form.value_head_dim, form.value_block, form)
    if form.generated:
        total = tl.zeros([form.block, form.head_block, form.value_block], form.total)
    else:
        total = tl.zeros([form.head_block, form.block, form.value_block], form.total)
    for start in range(0, x.query_length, form.block):
        rows = start + tl.arange(0, form.block)
        codes, _, _ = _codes(x, batch, rows, columns, form)
        used = _dropped(codes, x, rows, columns, form)
        output = _load(x.gradient, batch, rows, x.query_length, chunk, form.value_head_dim, form.value_block, form)
        if form.generated:
            _, _, first, second, hidden = _network_gradient(x, used, value, output, form)
            total = _dot(used.permute(2, 0, 1), first, total, form)
            if mixing_gradient is not None:
                for head in range(form.heads):
                    scaled = _head_column(used.permute(2, 1, 0), head, form) * hidden
                    zeros = tl.zeros([form.value_block, form.value_block], form.total)
                    part = _dot(second.permute(1, 0), scaled, zeros, form)
                    offsets, valid = _mixing_offsets(tl.program_id(0).to(tl.int64) * form.heads + head, form)
                    # Only this program adds here, so the sum has one order.
                    tl.atomic_add(mixing_gradient + offsets, part, mask=valid, sem="relaxed")
        else:
            total = _dot(used.permute(0, 2, 1), output, total, form)
    total = total.permute(1, 0, 2) if form.generated else _gated(total, value, form)
    _store(result, total, batch, columns, x.key_length, chunk, form.value_head_dim, form.value_block, form)


@_kernel
def bias_gradient_kernel(x, result, form: constexpr):
    """Diagonal walk: all tiles of a diagonal hold the same pair distances at the same places, so they add up."""
    row_blocks = tl.cdiv(x.query_length, form.block)
    column_blocks = tl.cdiv(x.key_length, form.block)
    diagonals = row_blocks + column_blocks - 1
    batch = (tl.program_id(0) // diagonals).to(tl.int64)
    shift = tl.program_id(0) % diagonals - row_blocks + 1
    total = tl.zeros([form.head_block, form.block, form.block], form.total)
    for block in range(tl.maximum(0, -shift), tl.minimum(row_blocks, column_blocks - shift)):
        rows = block * form.block + tl.arange(0, form.block)
        columns = rows + shift * form.block
        total += _score_gradient(x, batch, rows, columns, form)
    heads = tl.arange(0, form.head_block)[:, None, None]
    place = tl.arange(0, form.block)[None, :, None] * form.block + tl.arange(0, form.block)[None, None, :]
    offsets = (tl.program_id(0).to(tl.int64) * form.heads + heads) * form.block * form.block + place
    tl.store(result + offsets, total, mask=heads < form.heads)
