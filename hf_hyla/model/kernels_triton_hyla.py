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
"""The walks over tiles of HYLA attention in Triton, which `ops_triton_hyla.py` launches.

A program walks over the tiles of its row (output, query gradient), its column (key and value gradients) or its diagonal
(gradient of the position bias), and computes the codes again in every walk. `tiles_triton_hyla.py` says how a tile is
computed.

The cost per pair, in units of heads x width multiply-adds at equal widths, is 3 in the forward, where softmax attention
takes 2. In the backward it is 6 + 6 + 4 for queries, keys and values and 5 for a position bias, where softmax attention
takes 5. HYLA+ adds heads x width² to the forward, and two to three times that to each walk of the backward.
"""

from .tiles_triton_hyla import (
    activated,
    code_gradient,
    dot,
    dropped,
    find_codes,
    find_scores,
    first_layer,
    gated,
    head_column,
    jit,
    load,
    mixing_offsets,
    network_gradient,
    program,
    row_offsets,
    score_gradient,
    second_layer,
    store,
)


try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # `triton_problem` reports it
    tl = constexpr = None


@jit
def softmax_statistics_kernel(x, const: constexpr):
    """Row walk: maximum and inverse sum of exponentials of every row of scores, stored apart so that neither loses digits."""
    batch, rows = program(x.query_length, const)
    maximum = tl.full([const.head_block, const.block], float("-inf"), const.total)
    total = tl.zeros([const.head_block, const.block], const.total)
    for start in range(0, x.key_length, const.block):
        scores, _ = find_scores(x, batch, rows, start + tl.arange(0, const.block), const)
        larger = tl.maximum(maximum, tl.max(scores, 2))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(scores - larger[:, :, None]), 2)
        maximum = larger
    offsets, valid = row_offsets(x, batch, rows, const)
    tl.store(x.maximum + offsets, maximum, mask=valid)
    tl.store(x.inverse_sum + offsets, 1.0 / total, mask=valid)


@jit
def softmax_delta_kernel(x, const: constexpr):
    """Row walk: delta = Σ_keys code · its gradient, which softmax subtracts from every gradient of the row."""
    batch, rows = program(x.query_length, const)
    delta = tl.zeros([const.head_block, const.block], const.total)
    for start in range(0, x.key_length, const.block):
        columns = start + tl.arange(0, const.block)
        codes, _, _ = find_codes(x, batch, rows, columns, const)
        delta += tl.sum(codes * code_gradient(x, codes, batch, rows, columns, const), 2)
    offsets, valid = row_offsets(x, batch, rows, const)
    tl.store(x.delta + offsets, delta, mask=valid)


@jit
def forward_kernel(x, output, const: constexpr):
    """Row walk: one chunk of the output of a block of queries."""
    batch, rows = program(x.query_length, const)
    chunk = tl.program_id(1)
    if const.generated:
        total = tl.zeros([const.block, const.head_block, const.value_block], const.total)
    else:
        total = tl.zeros([const.head_block, const.block, const.value_block], const.total)
    for start in range(0, x.key_length, const.block):
        columns = start + tl.arange(0, const.block)
        codes, _, _ = find_codes(x, batch, rows, columns, const)
        used = dropped(codes, x, rows, columns, const)
        value = load(x.value, batch, columns, x.key_length, chunk, const.value_head_dim, const.value_block, const)
        if const.generated:
            by_key = used.permute(2, 1, 0)
            hidden = activated(first_layer(by_key, value, const), const)
            if x.value_mixing is not None:
                flat = tl.reshape(hidden, [const.block * const.block, const.value_block])
                second = activated(second_layer(x, by_key, flat, const), const)
                hidden = tl.reshape(second, [const.block, const.block, const.value_block])
            total = dot(used.permute(1, 0, 2), hidden.to(const.operand).permute(1, 0, 2), total, const)
        else:
            total = dot(used, activated(value, const), total, const)
    if const.generated:
        total = total.permute(1, 0, 2)
    store(output, total, batch, rows, x.query_length, chunk, const.value_head_dim, const.value_block, const)


@jit
def query_gradient_kernel(x, result, const: constexpr):
    """Row walk: one chunk of the gradient of a block of queries."""
    batch, rows = program(x.query_length, const)
    chunk = tl.program_id(1)
    total = tl.zeros([const.head_block, const.block, const.head_dim_block], const.total)
    for start in range(0, x.key_length, const.block):
        columns = start + tl.arange(0, const.block)
        scores = score_gradient(x, batch, rows, columns, const)
        key = load(x.key, batch, columns, x.key_length, chunk, const.head_dim, const.head_dim_block, const)
        total = dot(scores, key, total, const)
    total *= const.scaling
    store(result, total, batch, rows, x.query_length, chunk, const.head_dim, const.head_dim_block, const)


@jit
def key_gradient_kernel(x, result, const: constexpr):
    """Column walk: one chunk of the gradient of a block of keys."""
    batch, columns = program(x.key_length, const)
    chunk = tl.program_id(1)
    total = tl.zeros([const.head_block, const.block, const.head_dim_block], const.total)
    for start in range(0, x.query_length, const.block):
        rows = start + tl.arange(0, const.block)
        scores = score_gradient(x, batch, rows, columns, const)
        query = load(x.query, batch, rows, x.query_length, chunk, const.head_dim, const.head_dim_block, const)
        total = dot(scores.permute(0, 2, 1), query, total, const)
    total *= const.scaling
    store(result, total, batch, columns, x.key_length, chunk, const.head_dim, const.head_dim_block, const)


@jit
def value_gradient_kernel(x, result, mixing_gradient, const: constexpr):
    """Column walk: one chunk of the gradient of a block of values, and the block's part of the gradient of value_mixing."""
    batch, columns = program(x.key_length, const)
    chunk = tl.program_id(1)
    value = load(x.value, batch, columns, x.key_length, chunk, const.value_head_dim, const.value_block, const)
    if const.generated:
        total = tl.zeros([const.block, const.head_block, const.value_block], const.total)
    else:
        total = tl.zeros([const.head_block, const.block, const.value_block], const.total)
    for start in range(0, x.query_length, const.block):
        rows = start + tl.arange(0, const.block)
        codes, _, _ = find_codes(x, batch, rows, columns, const)
        used = dropped(codes, x, rows, columns, const)
        output = load(x.gradient, batch, rows, x.query_length, chunk, const.value_head_dim, const.value_block, const)
        if const.generated:
            _, _, first, second, hidden = network_gradient(x, used, value, output, const)
            total = dot(used.permute(2, 0, 1), first, total, const)
            if mixing_gradient is not None:
                for head in range(const.heads):
                    scaled = head_column(used.permute(2, 1, 0), head, const) * hidden
                    zeros = tl.zeros([const.value_block, const.value_block], const.total)
                    part = dot(second.permute(1, 0), scaled, zeros, const)
                    offsets, valid = mixing_offsets(tl.program_id(0).to(tl.int64) * const.heads + head, const)
                    # Only this program adds here, so the sum has one order.
                    tl.atomic_add(mixing_gradient + offsets, part, mask=valid, sem="relaxed")
        else:
            total = dot(used.permute(0, 2, 1), output, total, const)
    total = total.permute(1, 0, 2) if const.generated else gated(total, value, const)
    store(result, total, batch, columns, x.key_length, chunk, const.value_head_dim, const.value_block, const)


@jit
def bias_gradient_kernel(x, result, const: constexpr):
    """Diagonal walk: all tiles of a diagonal have the same distances at the same places, so their gradients are added."""
    row_blocks = tl.cdiv(x.query_length, const.block)
    column_blocks = tl.cdiv(x.key_length, const.block)
    diagonals = row_blocks + column_blocks - 1
    batch = (tl.program_id(0) // diagonals).to(tl.int64)
    shift = tl.program_id(0) % diagonals - row_blocks + 1
    total = tl.zeros([const.head_block, const.block, const.block], const.total)
    for block in range(tl.maximum(0, -shift), tl.minimum(row_blocks, column_blocks - shift)):
        rows = block * const.block + tl.arange(0, const.block)
        columns = rows + shift * const.block
        total += score_gradient(x, batch, rows, columns, const)
    heads = tl.arange(0, const.head_block)[:, None, None]
    place = tl.arange(0, const.block)[None, :, None] * const.block + tl.arange(0, const.block)[None, None, :]
    offsets = (tl.program_id(0).to(tl.int64) * const.heads + heads) * const.block * const.block + place
    tl.store(result + offsets, total, mask=heads < const.heads)
