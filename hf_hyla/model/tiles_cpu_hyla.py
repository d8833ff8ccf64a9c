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
The parts of the CPU kernels that work on a tile of keys, and on one query or two. numba compiles them into the kernels.

A tile of keys is held transposed, (heads, width, key), so that vectors run over keys. `scores[h, k]` are scores, which become
probabilities under softmax. RMSHead and dropout multiply the scores of a pair by `factor[k]`, so its code is
`scores[h, k] * factor[k]`. Heads and widths are padded by zeros to multiples of 4, and tiles are whole vectors.

What reads or adds to keys and values takes two queries at a time, `r`, since it waits for the cache more than it computes.
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
def load_four(a, n, d, k):
    """The vectors at a[n, d, k], a[n, d + 1, k], a[n, d + 2, k] and a[n, d + 3, k]."""
    return load(a, (n, d, k)), load(a, (n, d + 1, k)), load(a, (n, d + 2, k)), load(a, (n, d + 3, k))


@jit
def store_four(a, n, d, k, x):
    store(a, (n, d, k), x[0])
    store(a, (n, d + 1, k), x[1])
    store(a, (n, d + 2, k), x[2])
    store(a, (n, d + 3, k), x[3])


@jit
def add_four(x, factors, sums):
    """x times each of four vectors, added to one of the sums each."""
    return (
        multiply_add(x, factors[0], sums[0]),
        multiply_add(x, factors[1], sums[1]),
        multiply_add(x, factors[2], sums[2]),
        multiply_add(x, factors[3], sums[3]),
    )


@jit
def finish_four(sums, x, relu):
    """Four sums times x, and their ReLU if `relu`."""
    a, b, c, d = multiply(sums[0], x), multiply(sums[1], x), multiply(sums[2], x), multiply(sums[3], x)
    return (rectify(a), rectify(b), rectify(c), rectify(d)) if relu else (a, b, c, d)


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
def load_rows(x, b, i, step, count, scale, rows):
    """rows[r, h, d] = x[b, h, i + r · step, d] · scale, for `count` rows"""
    for r in range(count):
        for h in range(x.shape[1]):
            for d in range(x.shape[3]):
                rows[r, h, d] = widened(x[b, h, i + r * step, d]) * scale


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
def visible(mask, b, i, step, queries, start, count, keep):
    """keep[r, k] = 1 where query i + r · step sees the key, else 0. Returns whether any query sees any key of the tile."""
    seen = False
    for r in range(queries):
        row = mask[b, 0, i + r * step]
        for k in range(keep.shape[1]):
            keep[r, k] = 1 if k < count and row[min(start + k, row.shape[0] - 1)] else 0
            seen |= keep[r, k] > 0
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
def score(scores, query, keys, bias, first, second, keep, masked):
    """scores[r, h, k] = query[r, h] · keys[h, :, k] + bias, and the constant `masked` where the key is not seen"""
    for h in range(bias.shape[0]):
        for k in range(0, scores.shape[2], VECTOR_BYTES // scores.itemsize):
            a0, b0 = load(bias, (h, first + k)), load(bias, (h, second + k))
            a1 = b1 = zeros(scores)
            for d in range(0, keys.shape[1], 2):
                key = load(keys, (h, d, k))
                a0 = multiply_add(query[0, h, d], key, a0)
                b0 = multiply_add(query[1, h, d], key, b0)
                key = load(keys, (h, d + 1, k))
                a1 = multiply_add(query[0, h, d + 1], key, a1)
                b1 = multiply_add(query[1, h, d + 1], key, b1)
            store(scores, (0, h, k), where_positive(load(keep, (0, k)), add(a0, a1), masked))
            store(scores, (1, h, k), where_positive(load(keep, (1, k)), add(b0, b1), masked))


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
    """hidden[r, d, k] = φ(Σ_h code[r, h, k] · values[h, d, k]), equation 6 of the paper"""
    for k in range(0, scores.shape[2], VECTOR_BYTES // scores.itemsize):
        for d in range(0, values.shape[1], 4):
            zero = zeros(scores)
            a = b = (zero, zero, zero, zero)
            for h in range(scores.shape[1]):
                value = load_four(values, h, d, k)
                a, b = add_four(load(scores, (0, h, k)), value, a), add_four(load(scores, (1, h, k)), value, b)
            store_four(hidden, 0, d, k, finish_four(a, load(factor, (0, k)), relu))
            store_four(hidden, 1, d, k, finish_four(b, load(factor, (1, k)), relu))


@jit
def read_out(read, scores, factor, hidden):
    """read[h, d] = Σ_k code[h, k] · hidden[d, k], for an even number of heads; hidden becomes hidden · factor"""
    scale_tile(hidden, factor)
    for h in range(0, read.shape[0], 2):
        for d in range(0, hidden.shape[0], 4):
            zero = zeros(scores)
            a = b = (zero, zero, zero, zero)
            for k in range(0, scores.shape[1], VECTOR_BYTES // scores.itemsize):
                last = (
                    load(hidden, (d, k)),
                    load(hidden, (d + 1, k)),
                    load(hidden, (d + 2, k)),
                    load(hidden, (d + 3, k)),
                )
                a, b = add_four(load(scores, (h, k)), last, a), add_four(load(scores, (h + 1, k)), last, b)
            store_totals(read, (h, d), a[0], a[1], a[2], a[3])
            store_totals(read, (h + 1, d), b[0], b[1], b[2], b[3])


@jit
def mix_values(read, scores, factor, values):
    """read[r, h, d] = Σ_k code[r, h, k] · values[h, d, k]"""
    for h in range(values.shape[0]):
        for d in range(0, values.shape[1], 4):
            zero = zeros(scores)
            a = b = (zero, zero, zero, zero)
            for k in range(0, scores.shape[2], VECTOR_BYTES // scores.itemsize):
                value = load_four(values, h, d, k)
                a = add_four(multiply(load(scores, (0, h, k)), load(factor, (0, k))), value, a)
                b = add_four(multiply(load(scores, (1, h, k)), load(factor, (1, k))), value, b)
            store_totals(read, (0, h, d), a[0], a[1], a[2], a[3])
            store_totals(read, (1, h, d), b[0], b[1], b[2], b[3])


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
    grad_codes[r, h, k] = grad_read[r, h] · last[r, :, k] + grad_hidden[r, :, k] · values[h, :, k], with `onto` added to what is
    there; grad_values[h, d, k] += Σ_r code[r, h, k] · grad_hidden[r, d, k]
    """
    for k in range(0, scores.shape[2], VECTOR_BYTES // scores.itemsize):
        f, g = load(factor, (0, k)), load(factor, (1, k))
        for d in range(0, last.shape[1], 2):
            m0, m1 = load(last, (0, d, k)), load(last, (0, d + 1, k))
            n0, n1 = load(last, (1, d, k)), load(last, (1, d + 1, k))
            p0, p1 = load(grad_hidden, (0, d, k)), load(grad_hidden, (0, d + 1, k))
            q0, q1 = load(grad_hidden, (1, d, k)), load(grad_hidden, (1, d + 1, k))
            for h in range(scores.shape[1]):
                a = load(grad_codes, (0, h, k)) if onto or d > 0 else zeros(scores)
                b = load(grad_codes, (1, h, k)) if onto or d > 0 else zeros(scores)
                v0, v1 = load(values, (h, d, k)), load(values, (h, d + 1, k))
                a = multiply_add(grad_read[0, h, d], m0, multiply_add(p0, v0, a))
                b = multiply_add(grad_read[1, h, d], n0, multiply_add(q0, v0, b))
                a = multiply_add(grad_read[0, h, d + 1], m1, multiply_add(p1, v1, a))
                b = multiply_add(grad_read[1, h, d + 1], n1, multiply_add(q1, v1, b))
                store(grad_codes, (0, h, k), a)
                store(grad_codes, (1, h, k), b)
                s, t = multiply(load(scores, (0, h, k)), f), multiply(load(scores, (1, h, k)), g)
                v0 = multiply_add(s, p0, multiply_add(t, q0, load(grad_values, (h, d, k))))
                v1 = multiply_add(s, p1, multiply_add(t, q1, load(grad_values, (h, d + 1, k))))
                store(grad_values, (h, d, k), v0)
                store(grad_values, (h, d + 1, k), v1)


@jit
def mixed_gradients(grad_codes, grad_values, scores, factor, grad_read, values):
    """
    grad_codes[r, h, k] = grad_read[r, h] · values[h, :, k]; grad_values[h, d, k] += Σ_r code[r, h, k] · grad_read[r, h, d]
    """
    for h in range(scores.shape[1]):
        for k in range(0, scores.shape[2], VECTOR_BYTES // scores.itemsize):
            a0 = a1 = b0 = b1 = zeros(scores)
            s = multiply(load(scores, (0, h, k)), load(factor, (0, k)))
            t = multiply(load(scores, (1, h, k)), load(factor, (1, k)))
            for d in range(0, values.shape[1], 2):
                value, gradient = load(values, (h, d, k)), load(grad_values, (h, d, k))
                a0 = multiply_add(grad_read[0, h, d], value, a0)
                b0 = multiply_add(grad_read[1, h, d], value, b0)
                gradient = multiply_add(grad_read[0, h, d], s, multiply_add(grad_read[1, h, d], t, gradient))
                store(grad_values, (h, d, k), gradient)
                value, gradient = load(values, (h, d + 1, k)), load(grad_values, (h, d + 1, k))
                a1 = multiply_add(grad_read[0, h, d + 1], value, a1)
                b1 = multiply_add(grad_read[1, h, d + 1], value, b1)
                gradient = multiply_add(grad_read[0, h, d + 1], s, multiply_add(grad_read[1, h, d + 1], t, gradient))
                store(grad_values, (h, d + 1, k), gradient)
            store(grad_codes, (0, h, k), add(a0, a1))
            store(grad_codes, (1, h, k), add(b0, b1))


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
def add_score_gradients(grad_bias, grad_keys, grad_row, grad_scores, first, second, row, keys):
    """
    grad_bias[h, first + k] += grad_scores[0, h, k], and for the second query; grad_keys[h, d, k] += Σ_r row[r, h, d] ·
    grad_scores[r, h, k]; grad_row[r, h, d] = Σ_k grad_scores[r, h, k] · keys[h, d, k]
    """
    for h in range(grad_bias.shape[0]):
        for k in range(0, grad_scores.shape[2], VECTOR_BYTES // grad_scores.itemsize):
            store(grad_bias, (h, first + k), add(load(grad_bias, (h, first + k)), load(grad_scores, (0, h, k))))
            store(grad_bias, (h, second + k), add(load(grad_bias, (h, second + k)), load(grad_scores, (1, h, k))))
        for d in range(0, keys.shape[1], 4):
            p = row[0, h, d], row[0, h, d + 1], row[0, h, d + 2], row[0, h, d + 3]
            q = row[1, h, d], row[1, h, d + 1], row[1, h, d + 2], row[1, h, d + 3]
            zero = zeros(keys)
            a = b = (zero, zero, zero, zero)
            for k in range(0, grad_scores.shape[2], VECTOR_BYTES // grad_scores.itemsize):
                s, t = load(grad_scores, (0, h, k)), load(grad_scores, (1, h, k))
                store_four(grad_keys, h, d, k, add_four(s, p, add_four(t, q, load_four(grad_keys, h, d, k))))
                key = load_four(keys, h, d, k)
                a, b = add_four(s, key, a), add_four(t, key, b)
            store_totals(grad_row, (0, h, d), a[0], a[1], a[2], a[3])
            store_totals(grad_row, (1, h, d), b[0], b[1], b[2], b[3])
