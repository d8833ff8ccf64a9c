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
The parts of the CPU kernels that work on one query and a tile of keys. numba compiles them into the kernels.

A tile of keys is held transposed, (heads, width, key), so that vectors run over keys. `scores[h, k]` are scores, which become
probabilities under softmax. RMSHead and dropout multiply the scores of a pair by `factor[k]`, so its code is
`scores[h, k] * factor[k]`. Heads and widths are padded by zeros to multiples of 4, and tiles are whole vectors.
"""

import numpy as np

from .attention_hyla import RMS_HEAD_EPS, RMS_HEAD_SCALE
from .vectors_cpu_hyla import (
    VECTOR_BYTES,
    add,
    divide,
    exp_float32,
    exp_float64,
    jit,
    load,
    multiply,
    multiply_add,
    rectify,
    square_root,
    store,
    store_totals,
    subtract,
    where_positive,
    widened,
    zeros,
)


NONE, RMS_HEAD, SOFTMAX = 0, 1, 2
# Under RMSHead, scores arrive multiplied by `RMS_HEAD_SCALE`, so epsilon is multiplied by its square.
_EPSILON = RMS_HEAD_EPS * RMS_HEAD_SCALE**2


@jit
def load_tile(x, b, start, count, relu, tile):
    """tile[h, d, k] = x[b, h, start + k, d], and zeros behind the end of x, which add nothing to any of the sums below."""
    for h in range(x.shape[1]):
        for d in range(x.shape[3]):
            for k in range(count):
                element = widened(x[b, h, start + k, d])
                tile[h, d, k] = 0 if relu and element < 0 else element
            for k in range(count, tile.shape[2]):
                tile[h, d, k] = 0


@jit
def load_row(x, b, i, scale, row):
    for h in range(x.shape[1]):
        for d in range(x.shape[3]):
            row[h, d] = widened(x[b, h, i, d]) * scale


@jit
def finite(a):
    """Whether all elements are finite. Only then can a masked tile be left out, since 0 times NaN or infinity is NaN."""
    total = a.dtype.type(0)
    for h in range(a.shape[0]):
        for d in range(a.shape[1]):
            for k in range(a.shape[2]):
                total += a[h, d, k] * 0
    return total == 0


@jit
def clear(a):
    for d in range(a.shape[0]):
        for k in range(a.shape[1]):
            a[d, k] = 0


@jit
def visible(mask, b, i, start, count, keep):
    """keep[k] = 1 where query i sees the key, else 0. Returns whether it sees any key of the tile."""
    if mask.shape[3] == 1:
        seen = mask[b, 0, i, 0]
        for k in range(keep.shape[0]):
            keep[k] = 1 if k < count and seen else 0
        return seen
    seen = False
    for k in range(keep.shape[0]):
        keep[k] = 1 if k < count and mask[b, 0, i, start + min(k, count - 1)] else 0
        seen |= keep[k] > 0
    return seen


@jit
def mix(x):
    """As in `attention_hyla.pair_dropout`. Words are below 2**32 before and after, and no product reaches 2**63."""
    x ^= x >> 16
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x ^= x >> 15
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


@jit
def drop(factor, threshold, survivor, row_word, column_words):
    for k in range(factor.shape[0]):
        factor[k] = factor[k] * survivor if mix(row_word ^ column_words[k]) >= threshold else 0


@jit
def score(scores, query, keys, bias, first, keep, masked):
    """scores[h, k] = query[h] · keys[h, :, k] + bias, and the constant `masked` where the key is not seen"""
    for h in range(bias.shape[0]):
        for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
            s = load(bias, (h, first + k))
            for d in range(keys.shape[1]):
                s = multiply_add(query[h, d], load(keys, (h, d, k)), s)
            store(scores, (h, k), where_positive(load(keep, (k,)), s, masked))


@jit
def _exponentiate(a, largest):
    """a[k] = exp(a[k] - largest)"""
    for k in range(a.shape[0]):
        a[k] = exp_float32(a[k] - largest) if a.itemsize == 4 else exp_float64(a[k] - largest)


@jit
def exponentiate_tile(scores, count, maximum):
    """scores[h, k] = exp(scores[h, k] - maximum[h]), and 0 behind the last key"""
    for h in range(maximum.shape[0]):
        _exponentiate(scores[h], maximum[h])
        for k in range(count, scores.shape[1]):
            scores[h, k] = 0


@jit
def survey_tile(scores, count, maximum, total):
    """
    Updates each head's largest score so far, and the sum of exponentials relative to it. The scores become these exponentials.
    """
    for h in range(maximum.shape[0]):
        before, largest = maximum[h], maximum[h]
        for k in range(count):
            largest = max(largest, scores[h, k])
        total[h] *= np.exp(before - largest)
        maximum[h] = largest
    exponentiate_tile(scores, count, maximum)
    for h in range(maximum.shape[0]):
        tile_total = scores.dtype.type(0)
        for k in range(scores.shape[1]):
            tile_total += scores[h, k]
        total[h] += tile_total


@jit
def divide_tile(scores, total):
    """Turns exponentials into probabilities."""
    for h in range(total.shape[0]):
        inverse = scores.dtype.type(1) / total[h]
        for k in range(scores.shape[1]):
            scores[h, k] *= inverse


@jit
def find_factors(scores, norm, num_heads, square, factor):
    """Finds the factors of the pairs, and for RMSHead the inverse mean squares `square`."""
    one = scores.dtype.type(1)
    for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
        total = zeros(scores)
        if norm == RMS_HEAD:
            for h in range(scores.shape[0]):
                s = load(scores, (h, k))
                total = multiply_add(s, s, total)
            inverse = divide(
                one, add(multiply(total, one / scores.dtype.type(num_heads)), scores.dtype.type(_EPSILON))
            )
            store(square, (k,), inverse)
            store(factor, (k,), square_root(inverse))
        else:
            store(factor, (k,), add(total, one))


@jit
def rectify_tile(a):
    """0 where a[d, k] < 0: NaN stays NaN"""
    for d in range(a.shape[0]):
        for k in range(a.shape[1]):
            a[d, k] = 0 if a[d, k] < 0 else a[d, k]


@jit
def scale_tile(a, factor):
    """a[d, k] *= factor[k]"""
    for d in range(a.shape[0]):
        for k in range(a.shape[1]):
            a[d, k] *= factor[k]


@jit
def derive_tile(gradient, a, relu):
    """gradient[d, k] *= φ'(·), which follows from a = φ(·)"""
    if relu:
        for d in range(a.shape[0]):
            for k in range(a.shape[1]):
                gradient[d, k] = gradient[d, k] if a[d, k] > 0 else 0


@jit
def generate(hidden, scores, factor, values, relu):
    """hidden[d, k] = φ(Σ_h code[h, k] · values[h, d, k]), equation 6 of the paper"""
    for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
        f = load(factor, (k,))
        for d in range(0, values.shape[1], 4):
            a0 = a1 = a2 = a3 = zeros(scores)
            for h in range(scores.shape[0]):
                s = load(scores, (h, k))
                a0 = multiply_add(s, load(values, (h, d, k)), a0)
                a1 = multiply_add(s, load(values, (h, d + 1, k)), a1)
                a2 = multiply_add(s, load(values, (h, d + 2, k)), a2)
                a3 = multiply_add(s, load(values, (h, d + 3, k)), a3)
            a0, a1, a2, a3 = multiply(a0, f), multiply(a1, f), multiply(a2, f), multiply(a3, f)
            if relu:
                a0, a1, a2, a3 = rectify(a0), rectify(a1), rectify(a2), rectify(a3)
            store(hidden, (d, k), a0)
            store(hidden, (d + 1, k), a1)
            store(hidden, (d + 2, k), a2)
            store(hidden, (d + 3, k), a3)


@jit
def read_out(read, scores, factor, hidden):
    """read[h, d] = Σ_k code[h, k] · hidden[d, k]; hidden becomes hidden · factor"""
    scale_tile(hidden, factor)
    for h in range(read.shape[0]):
        for d in range(0, hidden.shape[0], 4):
            a0 = a1 = a2 = a3 = zeros(scores)
            for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
                s = load(scores, (h, k))
                a0 = multiply_add(s, load(hidden, (d, k)), a0)
                a1 = multiply_add(s, load(hidden, (d + 1, k)), a1)
                a2 = multiply_add(s, load(hidden, (d + 2, k)), a2)
                a3 = multiply_add(s, load(hidden, (d + 3, k)), a3)
            store_totals(read, (h, d), a0, a1, a2, a3)


@jit
def mix_values(read, scores, factor, values):
    """read[h, d] = Σ_k code[h, k] · values[h, d, k]"""
    for h in range(read.shape[0]):
        for d in range(0, values.shape[1], 4):
            a0 = a1 = a2 = a3 = zeros(scores)
            for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
                s = multiply(load(scores, (h, k)), load(factor, (k,)))
                a0 = multiply_add(s, load(values, (h, d, k)), a0)
                a1 = multiply_add(s, load(values, (h, d + 1, k)), a1)
                a2 = multiply_add(s, load(values, (h, d + 2, k)), a2)
                a3 = multiply_add(s, load(values, (h, d + 3, k)), a3)
            store_totals(read, (h, d), a0, a1, a2, a3)


@jit
def hidden_gradient(gradient, scores, factor, grad_read, hidden, relu):
    """gradient[d, k] = φ'(·) · factor[k] · Σ_h grad_read[h, d] · scores[h, k], where hidden = φ(·)"""
    for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
        f = load(factor, (k,))
        for d in range(0, hidden.shape[0], 4):
            a0 = a1 = a2 = a3 = zeros(scores)
            for h in range(scores.shape[0]):
                s = load(scores, (h, k))
                a0 = multiply_add(s, grad_read[h, d], a0)
                a1 = multiply_add(s, grad_read[h, d + 1], a1)
                a2 = multiply_add(s, grad_read[h, d + 2], a2)
                a3 = multiply_add(s, grad_read[h, d + 3], a3)
            store(gradient, (d, k), multiply(a0, f))
            store(gradient, (d + 1, k), multiply(a1, f))
            store(gradient, (d + 2, k), multiply(a2, f))
            store(gradient, (d + 3, k), multiply(a3, f))
    derive_tile(gradient, hidden, relu)


@jit
def generated_gradients(grad_codes, grad_values, scores, factor, grad_read, last, grad_hidden, values, onto):
    """
    grad_codes[h, k] = grad_read[h] · last[:, k] + grad_hidden[:, k] · values[h, :, k], with `onto` added to what is there;
    grad_values[h, d, k] += code[h, k] · grad_hidden[d, k]
    """
    for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
        f = load(factor, (k,))
        for d in range(0, last.shape[0], 4):
            l0, l1, l2, l3 = load(last, (d, k)), load(last, (d + 1, k)), load(last, (d + 2, k)), load(last, (d + 3, k))
            g0, g1 = load(grad_hidden, (d, k)), load(grad_hidden, (d + 1, k))
            g2, g3 = load(grad_hidden, (d + 2, k)), load(grad_hidden, (d + 3, k))
            for h in range(scores.shape[0]):
                a = load(grad_codes, (h, k)) if onto or d > 0 else zeros(scores)
                a = multiply_add(grad_read[h, d], l0, a)
                a = multiply_add(grad_read[h, d + 1], l1, a)
                a = multiply_add(grad_read[h, d + 2], l2, a)
                a = multiply_add(grad_read[h, d + 3], l3, a)
                e = multiply(g0, load(values, (h, d, k)))
                e = multiply_add(g1, load(values, (h, d + 1, k)), e)
                e = multiply_add(g2, load(values, (h, d + 2, k)), e)
                e = multiply_add(g3, load(values, (h, d + 3, k)), e)
                store(grad_codes, (h, k), add(a, e))
                s = multiply(load(scores, (h, k)), f)
                store(grad_values, (h, d, k), multiply_add(s, g0, load(grad_values, (h, d, k))))
                store(grad_values, (h, d + 1, k), multiply_add(s, g1, load(grad_values, (h, d + 1, k))))
                store(grad_values, (h, d + 2, k), multiply_add(s, g2, load(grad_values, (h, d + 2, k))))
                store(grad_values, (h, d + 3, k), multiply_add(s, g3, load(grad_values, (h, d + 3, k))))


@jit
def mixed_gradients(grad_codes, grad_values, scores, factor, grad_read, values):
    """grad_codes[h, k] = grad_read[h] · values[h, :, k]; grad_values[h, d, k] += code[h, k] · grad_read[h, d]"""
    for h in range(scores.shape[0]):
        for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
            a = zeros(scores)
            s = multiply(load(scores, (h, k)), load(factor, (k,)))
            for d in range(values.shape[1]):
                a = multiply_add(grad_read[h, d], load(values, (h, d, k)), a)
                store(grad_values, (h, d, k), multiply_add(grad_read[h, d], s, load(grad_values, (h, d, k))))
            store(grad_codes, (h, k), a)


@jit
def score_gradients(grad_codes, scores, norm, num_heads, square, factor, keep):
    """Without softmax: turns gradients of the codes into those of the scores."""
    number = scores.dtype.type
    for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
        f, kept, along = load(factor, (k,)), load(keep, (k,)), zeros(scores)
        if norm == RMS_HEAD and num_heads == 1:
            # The difference below, whose two terms differ by epsilon alone.
            f = multiply(f, multiply(load(square, (k,)), number(_EPSILON)))
        elif norm == RMS_HEAD:
            for h in range(scores.shape[0]):
                along = multiply_add(load(grad_codes, (h, k)), load(scores, (h, k)), along)
            along = multiply(multiply(along, load(square, (k,))), multiply(f, number(1) / number(num_heads)))
        for h in range(scores.shape[0]):
            a = subtract(multiply(f, load(grad_codes, (h, k))), multiply(load(scores, (h, k)), along))
            store(grad_codes, (h, k), where_positive(kept, a, number(0)))


@jit
def softmax_gradients(grad_codes, scores, factor, keep, sums, add_up):
    """With softmax: the same. `sums[h]` is the sum over keys of probability times its gradient; `add_up` adds this tile first."""
    for h in range(sums.shape[0]):
        if add_up:
            total = scores.dtype.type(0)
            for k in range(scores.shape[1]):
                total += factor[k] * grad_codes[h, k] * scores[h, k]
            sums[h] += total
        mean = sums[h]
        for k in range(scores.shape[1]):
            gradient = scores[h, k] * (factor[k] * grad_codes[h, k] - mean)
            grad_codes[h, k] = gradient if keep[k] > 0 else 0


@jit
def add_score_gradients(grad_bias, grad_keys, grad_row, grad_scores, first, row, keys):
    """
    grad_bias[h, first + k] += grad_scores[h, k]; grad_keys[h, d, k] += row[h, d] · grad_scores[h, k];
    grad_row[h, d] = Σ_k grad_scores[h, k] · keys[h, d, k]
    """
    for h in range(grad_bias.shape[0]):
        for k in range(0, grad_scores.shape[1], VECTOR_BYTES // grad_scores.itemsize):
            store(grad_bias, (h, first + k), add(load(grad_bias, (h, first + k)), load(grad_scores, (h, k))))
        for d in range(0, keys.shape[1], 4):
            r0, r1, r2, r3 = row[h, d], row[h, d + 1], row[h, d + 2], row[h, d + 3]
            a0 = a1 = a2 = a3 = zeros(keys)
            for k in range(0, grad_scores.shape[1], VECTOR_BYTES // grad_scores.itemsize):
                s = load(grad_scores, (h, k))
                store(grad_keys, (h, d, k), multiply_add(r0, s, load(grad_keys, (h, d, k))))
                store(grad_keys, (h, d + 1, k), multiply_add(r1, s, load(grad_keys, (h, d + 1, k))))
                store(grad_keys, (h, d + 2, k), multiply_add(r2, s, load(grad_keys, (h, d + 2, k))))
                store(grad_keys, (h, d + 3, k), multiply_add(r3, s, load(grad_keys, (h, d + 3, k))))
                a0 = multiply_add(s, load(keys, (h, d, k)), a0)
                a1 = multiply_add(s, load(keys, (h, d + 1, k)), a1)
                a2 = multiply_add(s, load(keys, (h, d + 2, k)), a2)
                a3 = multiply_add(s, load(keys, (h, d + 3, k)), a3)
            store_totals(grad_row, (h, d), a0, a1, a2, a3)
