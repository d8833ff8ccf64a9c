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
Attention of all types in one loop over (query, key) pairs, compiled for the CPU by numba.

A tile of keys is held transposed, (heads, width, key), so that every inner loop runs over keys and becomes vector
instructions; a query's scores against the tile, their norm over heads, the generated network and what is read out of it
never leave the first-level cache. The backward computes scores and network again. Nothing of size query * key is stored.

Notation, for one query and a tile of keys: `scores[h, k]`, which become probabilities under softmax; `factor[k]`, what
RMSHead and dropout multiply a pair's scores with; the code of a pair is `scores[h, k] * factor[k]`.

Half precision is only how tensors are stored: tiles are widened to float32 as they are loaded, all sums are of float32, and a
row of the batch is rounded once, when it is complete. numba knows neither format, so bfloat16 comes as int16 and float16 as
uint16.

All of it lies in one file: numba takes what it has compiled for up to date as long as the file of the outermost function is.
"""

import math
from functools import cache

import numpy as np


try:
    import numba
except ImportError:  # another implementation takes over, see `cpu_problem`
    numba = None

NONE, RMS_HEAD, SOFTMAX = 0, 1, 2
_EPSILON = 1e-6  # of RMSHead
# By torch's name of a dtype: the type in which elements are stored, and the one they are computed in.
_TYPES = {
    "float64": ("float64", "float64"),
    "float32": ("float32", "float32"),
    "bfloat16": ("int16", "float32"),
    "float16": ("uint16", "float32"),
}
# Sums may be reordered, which vector instructions need; infinities and NaN keep their meaning.
OPTIONS = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True, "error_model": "numpy"}


def _jit(function):
    return numba.njit(forceinline=True, **OPTIONS)(function) if numba else function


def jit_in_order(function):
    """Sums stay in the order they are written in, for what depends on how it rounds."""
    options = OPTIONS | {"fastmath": {"contract"}}
    return numba.njit(forceinline=True, **options)(function) if numba else function


def _overload(function):
    """Of the decorated function, which takes types, the result for the types of the arguments is compiled."""
    if numba is None:
        return lambda choose: choose
    return numba.extending.overload(function, jit_options={"forceinline": True, **OPTIONS})


def _widened(x):
    """A stored element as a number to compute with."""
    raise NotImplementedError("compiled only")


def _rounded(x, stored):
    """The nearest number of the format that the array `stored` has, of two the even one: its bits."""
    raise NotImplementedError("compiled only")


def _finish_row(sums, rows, first, step):
    """Rounds the sums of every `step`-th token into `rows`, and sets them to zero; nothing where both are one array."""
    raise NotImplementedError("compiled only")


# Every integer below has its type written out: in loops of one width the compiler finds vector instructions.
@_overload(_widened)
def _choose_widened(x):
    if x == numba.types.int16:  # bfloat16: the upper half of a float32
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    if x == numba.types.uint16:

        def widened(x):
            bits = np.int32(x)
            magnitude = np.int32(np.int32(bits & np.int32(0x7FFF)) << np.int32(13))
            # Exponents differ by 112, but the largest stands for infinity and NaN in both. Exact below the normal numbers, too.
            wide = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.int32)
            special = np.int32(0x7F800000) if magnitude >= np.int32(0x7C00 << 13) else np.int32(0)
            sign = np.int32(np.int32(bits & np.int32(0x8000)) << np.int32(16))
            return np.int32(wide | special | sign).view(np.float32)

        return widened
    return lambda x: x


@_overload(_rounded)
def _choose_rounded(x, stored):
    if stored.dtype == numba.types.int16:

        def rounded(x, stored):
            bits = np.float32(x).view(np.int32)
            odd = np.int32(bits >> np.int32(16)) & np.int32(1)
            nearest = np.int32(np.int32(bits + np.int32(0x7FFF) + odd) >> np.int32(16))
            return np.int16(nearest if x == x else np.int32(0x7FC0))

        return rounded

    def rounded(x, stored):
        bits = np.float32(x).view(np.int32)
        size = bits & np.int32(0x7FFFFFFF)
        odd = np.int32(bits >> np.int32(13)) & np.int32(1)
        nearest = np.int32(np.int32(size + np.int32(0xFFF) + odd) >> np.int32(13)) - np.int32(112 << 10)
        nearest = min(nearest, np.int32(0x7C00))  # infinity
        # From 1/2 to 1, float32 has steps of 2**-24, those of float16 below its normal numbers.
        small = np.float32(abs(x) + np.float32(0.5)).view(np.int32) - np.int32(0x3F000000)
        nearest = small if size < np.int32(113 << 23) else nearest
        nearest = nearest if x == x else np.int32(0x7E00)
        return np.uint16(nearest | np.int32(np.int32(bits >> np.int32(16)) & np.int32(0x8000)))

    return rounded


@_overload(_finish_row)
def _choose_finish_row(sums, rows, first, step):
    if sums.dtype == rows.dtype:
        return lambda sums, rows, first, step: None

    def finish_row(sums, rows, first, step):
        for i in range(first, rows.shape[0], step):
            for h in range(rows.shape[1]):
                for d in range(rows.shape[2]):
                    rows[i, h, d] = _rounded(sums[i, h, d], rows)
                    sums[i, h, d] = 0

    return finish_row


@_jit
def _load(x, b, start, count, relu, tile):
    """tile[h, d, k] = x[b, h, start + k, d], zero where x ends: zeros add nothing to any of the sums below."""
    for h in range(x.shape[1]):
        for d in range(x.shape[3]):
            for k in range(count):
                element = _widened(x[b, h, start + k, d])
                tile[h, d, k] = 0 if relu and element < 0 else element
            for k in range(count, tile.shape[2]):
                tile[h, d, k] = 0


@_jit
def _load_row(x, b, i, scale, row):
    for h in range(x.shape[1]):
        for d in range(x.shape[3]):
            row[h, d] = _widened(x[b, h, i, d]) * scale


@_jit
def _copy(matrices, out):
    """Copies as much of the matrices as both have."""
    for h in range(min(out.shape[0], matrices.shape[0])):
        for e in range(min(out.shape[1], matrices.shape[1])):
            for d in range(min(out.shape[2], matrices.shape[2])):
                out[h, e, d] = matrices[h, e, d]


@_jit
def _clear(a):
    for d in range(a.shape[0]):
        for k in range(a.shape[1]):
            a[d, k] = 0


@_jit
def _add_dots(out, row, tile):
    """out[k] += Σ_d row[d] · tile[d, k]"""
    for d in range(tile.shape[0]):
        r = row[d]
        for k in range(tile.shape[1]):
            out[k] += r * tile[d, k]


@_jit
def _add_products(out, a, tile):
    """out[k] += Σ_d a[d, k] · tile[d, k]"""
    for d in range(tile.shape[0]):
        for k in range(tile.shape[1]):
            out[k] += a[d, k] * tile[d, k]


@_jit
def _add_scaled(out, coefficient, tile):
    """out[d, k] += coefficient[k] · tile[d, k]"""
    for d in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[d, k] += coefficient[k] * tile[d, k]


@_jit
def _add_outer(out, row, coefficient):
    """out[d, k] += row[d] · coefficient[k]"""
    for d in range(out.shape[0]):
        r = row[d]
        for k in range(out.shape[1]):
            out[d, k] += r * coefficient[k]


@_jit
def _sum_scaled(out, coefficients, tiles):
    """out[d, k] = Σ_h coefficients[h, k] · tiles[h, d, k]"""
    _clear(out)
    for h in range(0, tiles.shape[0], 4):
        for d in range(out.shape[0]):
            for k in range(out.shape[1]):
                out[d, k] += (
                    coefficients[h, k] * tiles[h, d, k]
                    + coefficients[h + 1, k] * tiles[h + 1, d, k]
                    + coefficients[h + 2, k] * tiles[h + 2, d, k]
                    + coefficients[h + 3, k] * tiles[h + 3, d, k]
                )


@_jit
def _sum_outer(out, rows, coefficients):
    """out[d, k] = Σ_h rows[h, d] · coefficients[h, k]"""
    _clear(out)
    for h in range(0, rows.shape[0], 4):
        for d in range(out.shape[0]):
            r0, r1, r2, r3 = rows[h, d], rows[h + 1, d], rows[h + 2, d], rows[h + 3, d]
            for k in range(out.shape[1]):
                out[d, k] += (
                    r0 * coefficients[h, k]
                    + r1 * coefficients[h + 1, k]
                    + r2 * coefficients[h + 2, k]
                    + r3 * coefficients[h + 3, k]
                )


@_jit
def _add_sums(out, coefficient, tile):
    """out[d] += Σ_k coefficient[k] · tile[d, k]"""
    for d in range(0, tile.shape[0], 4):
        s0 = s1 = s2 = s3 = coefficient.dtype.type(0)
        for k in range(tile.shape[1]):
            c = coefficient[k]
            s0 += c * tile[d, k]
            s1 += c * tile[d + 1, k]
            s2 += c * tile[d + 2, k]
            s3 += c * tile[d + 3, k]
        out[d] += s0
        out[d + 1] += s1
        out[d + 2] += s2
        out[d + 3] += s3


@_jit
def _rectify(a, factor, relu):
    """a[d, k] = φ(a[d, k] · factor[k])"""
    for d in range(a.shape[0]):
        for k in range(a.shape[1]):
            x = a[d, k] * factor[k]
            a[d, k] = 0 if relu and x < 0 else x


@_jit
def _derive(gradient, a, relu):
    """gradient[d, k] *= φ'(·), which a = φ(·) shows"""
    if relu:
        for d in range(a.shape[0]):
            for k in range(a.shape[1]):
                gradient[d, k] = gradient[d, k] if a[d, k] > 0 else 0


@_jit
def _visible(mask, b, i, start, count, keep):
    """keep[k] = 1 where query i sees the key; whether it sees any of the tile"""
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


@_jit
def _mix(x):
    """See `attention_hyla.pair_dropout`; below 2**32 in and out, and no product reaches 2**63."""
    x ^= x >> 16
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x ^= x >> 15
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


@_jit
def _score(scores, query, keys, bias, first, keep, masked):
    """scores[h, k] = query[h] · keys[h, :, k] + bias, and the constant `masked` where the key is not seen"""
    for h in range(bias.shape[0]):
        near = bias[h, first : first + scores.shape[1]]
        for k in range(scores.shape[1]):
            scores[h, k] = near[k]
        _add_dots(scores[h], query[h], keys[h])
        for k in range(scores.shape[1]):
            scores[h, k] = scores[h, k] if keep[k] > 0 else masked


# The exponential of x is 2^n exp(r), with the integer n nearest to x / ln 2 and a polynomial, Taylor's, for exp(r): terms are
# below the rounding where they end. ln 2 is the sum of two numbers, of which n times the first is exact.
_PER_LN2, _LN2_HIGH, _LN2_LOW = 1 / math.log(2), 0.693145751953125, 1.4286068203094172e-06
_TAYLOR = tuple(1 / math.factorial(n) for n in range(14))


@jit_in_order
def _exponentiate(a, largest):
    """
    a[k] = exp(a[k] - largest), which is 0 below the normal numbers. As vector instructions, which a call of the C library in
    the loop would prevent.
    """
    number = a.dtype.type
    least = number(-87) if a.itemsize == 4 else number(-708)
    for k in range(a.shape[0]):
        x = a[k] - largest
        inside = least if x < least else x  # NaN stays NaN
        n = np.int32(inside * number(_PER_LN2) - number(0.5))  # towards 0, and x is not positive
        r = inside - number(n) * number(_LN2_HIGH) - number(n) * number(_LN2_LOW)
        y = number(_TAYLOR[7])
        if a.itemsize == 8:
            y = number(_TAYLOR[13])
            y = y * r + number(_TAYLOR[12])
            y = y * r + number(_TAYLOR[11])
            y = y * r + number(_TAYLOR[10])
            y = y * r + number(_TAYLOR[9])
            y = y * r + number(_TAYLOR[8])
            y = y * r + number(_TAYLOR[7])
        y = y * r + number(_TAYLOR[6])
        y = y * r + number(_TAYLOR[5])
        y = y * r + number(_TAYLOR[4])
        y = y * r + number(_TAYLOR[3])
        y = y * r + number(_TAYLOR[2])
        y = y * r + number(_TAYLOR[1])
        y = y * r + number(_TAYLOR[0])
        # 2^n by its bits. Every integer has its type written out: a loop of two widths is not vectorised.
        if a.itemsize == 4:
            power = np.int32(np.int32(n + np.int32(127)) << np.int32(23)).view(np.float32)
        else:
            power = np.int64(np.int64(np.int64(n) + np.int64(1023)) << np.int64(52)).view(np.float64)
        a[k] = number(0) if x < least else y * power


@_jit
def _exponentiate_tile(scores, count, maximum):
    """scores[h, k] = exp(scores[h, k] - maximum[h]), and 0 for what is no key"""
    for h in range(maximum.shape[0]):
        _exponentiate(scores[h], maximum[h])
        for k in range(count, scores.shape[1]):
            scores[h, k] = 0


@_jit
def _survey(scores, count, maximum, total):
    """
    Brings each head's largest score so far, and the sum of exponentials relative to it, up to date; scores become these
    exponentials.
    """
    for h in range(maximum.shape[0]):
        before, largest = maximum[h], maximum[h]
        for k in range(count):
            largest = max(largest, scores[h, k])
        total[h] *= np.exp(before - largest)
        maximum[h] = largest
    _exponentiate_tile(scores, count, maximum)
    for h in range(maximum.shape[0]):
        tile_total = scores.dtype.type(0)
        for k in range(scores.shape[1]):
            tile_total += scores[h, k]
        total[h] += tile_total


@_jit
def _divide(scores, total):
    """Exponentials become probabilities."""
    for h in range(total.shape[0]):
        inverse = scores.dtype.type(1) / total[h]
        for k in range(scores.shape[1]):
            scores[h, k] *= inverse


@_jit
def _factors(scores, norm, num_heads, square, factor):
    """Factors of the pairs, with the inverse mean square of RMSHead in `square`."""
    one = scores.dtype.type(1)
    if norm == RMS_HEAD:
        share = one / scores.dtype.type(num_heads)
        for k in range(scores.shape[1]):
            square[k] = 0
        for h in range(scores.shape[0]):
            for k in range(scores.shape[1]):
                square[k] += scores[h, k] * scores[h, k]
        for k in range(scores.shape[1]):
            square[k] = one / (square[k] * share + scores.dtype.type(_EPSILON))
            factor[k] = np.sqrt(square[k])
    else:
        for k in range(scores.shape[1]):
            factor[k] = one


@_jit
def _drop(factor, threshold, survivor, row_word, column_words):
    for k in range(factor.shape[0]):
        factor[k] = factor[k] * survivor if _mix(row_word ^ column_words[k]) >= threshold else 0


@_jit
def _generate(hidden, scores, factor, values, relu):
    """hidden[d, k] = φ(Σ_h code[h, k] · values[h, d, k]), equation 6 of the paper"""
    _sum_scaled(hidden, scores, values)
    _rectify(hidden, factor, relu)


@_jit
def _project(out, matrix, hidden):
    """out[e, k] = Σ_d matrix[e, d] · hidden[d, k]"""
    _clear(out)
    for e in range(out.shape[0]):
        _add_dots(out[e], matrix[e], hidden)


@_jit
def _generate_again(deep, scores, factor, mixing, hidden, projected, relu):
    """deep[e, k] = φ(Σ_h code[h, k] · (mixing[h] hidden[:, k])[e]), the second hidden layer of HYLA+"""
    _clear(deep)
    for h in range(scores.shape[0]):
        _project(projected, mixing[h], hidden)
        _add_scaled(deep, scores[h], projected)
    _rectify(deep, factor, relu)


def compiled(signature, function):
    """From the cache on disk, or where there is none that can be written, compiled anew by every process."""
    try:
        return numba.njit(signature, cache=True, **OPTIONS)(function)
    except (RuntimeError, OSError):  # numba's, and the system's
        return numba.njit(signature, **OPTIONS)(function)


def _signature(dtype_name: str, gradients: bool):
    """Types of the arguments; with them given, arrays of any strides share one compilation."""
    stored, number = (getattr(numba.types, name) for name in _TYPES[dtype_name])
    boolean, integer = numba.types.boolean, numba.types.int64

    def strided(ndim, element=number):
        return numba.types.Array(element, ndim, "A")

    whole, rows = numba.types.Array(number, 2, "C"), strided(4, stored)
    mask, seed = numba.types.Array(boolean, 4, "A"), numba.types.Array(integer, 1, "C")
    inputs = [rows, rows, rows, mask, whole, strided(3), seed]
    settings = [integer, boolean, boolean, boolean, boolean, integer, number, number]
    tasks = [strided(4), integer, integer, integer]
    outputs = [strided(4), rows]
    if gradients:
        outputs = [rows, strided(4), strided(5), strided(5), whole, strided(3), rows, rows, rows]
    return numba.void(*inputs, *settings, *tasks, *outputs)


@cache
def compiled_forward(heads: int, head_dim: int, value_dim: int, tile: int, dtype_name: str):
    """
    The forward for these sizes, which are constants to the compiler: loops over them vanish, and pointers are known to be
    apart. Widths are multiples of 4, `tile` of 8; heads of zeros fill up to a multiple of 4.

    The output is added up in `sums`, (batch, query, heads, width) of zeros. In half precision all rows of the batch share the
    memory of one, which is rounded into `output`; otherwise both are one array.
    """
    padded = -(-heads // 4) * 4

    def forward(query, key, value, mask, bias, mixing, seed, norm, relu, generated, deep, masked, threshold, survivor,
                scaling, statistics, splits, first_task, last_task, sums, output):  # fmt: skip
        dtype = bias.dtype
        query_length, key_length = query.shape[2], key.shape[2]
        keys = np.zeros((padded, head_dim, tile), dtype)
        values = np.zeros((padded, value_dim, tile), dtype)
        scores = np.zeros((padded, tile), dtype)
        hidden = np.zeros((value_dim, tile), dtype)
        hidden_2 = np.zeros((value_dim, tile), dtype)
        projected = np.zeros((value_dim, tile), dtype)
        factor = np.zeros(tile, dtype)
        square = np.zeros(tile, dtype)
        keep = np.zeros(tile, dtype)
        column_words = np.zeros(tile, np.int64)
        row = np.zeros((padded, head_dim), dtype)
        read = np.zeros((heads, value_dim), dtype)
        matrices = np.zeros((padded, value_dim, value_dim), dtype)
        _copy(mixing, matrices)
        masked_score = dtype.type(np.finfo(dtype).min if norm == SOFTMAX else 0)
        first_query = max(key_length - query_length, 0)  # its position, see `attention_hyla.position_of_first`

        for task in range(first_task, last_task):
            b, split = task // splits, task % splits
            # Softmax looks at every score before it can normalise one: in a pass of its own, unless one tile holds them all.
            for survey in range(norm == SOFTMAX and key_length > tile, -1, -1):
                for start in range(0, key_length, tile):
                    count = min(tile, key_length - start)
                    _load(key, b, start, count, False, keys)
                    _load(value, b, start, count, relu and not generated, values)
                    for k in range(tile):
                        keep[k] = 1 if k < count else 0
                        column_words[k] = _mix((start + k) ^ seed[1])
                    for i in range(split, query_length, splits):
                        if masked and not _visible(mask, b, i, start, count, keep) and norm != SOFTMAX:
                            continue
                        _load_row(query, b, i, scaling, row)
                        _score(scores, row, keys, bias, query_length - 1 - i + start, keep, masked_score)
                        maximum, total = statistics[b, i, 0], statistics[b, i, 1]
                        if norm == SOFTMAX:
                            if survey or key_length <= tile:
                                _survey(scores, count, maximum, total)
                            else:
                                _exponentiate_tile(scores, count, maximum)
                            if survey:
                                continue
                            _divide(scores, total)
                        _factors(scores, norm, heads, square, factor)
                        if threshold > 0:
                            _drop(factor, threshold, survivor, _mix((first_query + i) ^ seed[0]), column_words)
                        _clear(read)
                        if generated:
                            _generate(hidden, scores, factor, values, relu)
                            if deep:
                                _generate_again(hidden_2, scores, factor, matrices, hidden, projected, relu)
                            last = hidden_2 if deep else hidden
                            for d in range(value_dim):
                                for k in range(tile):
                                    last[d, k] *= factor[k]
                            for h in range(heads):
                                _add_sums(read[h], scores[h], last)
                        else:
                            for h in range(heads):
                                for k in range(tile):
                                    scores[h, k] *= factor[k]
                                _add_sums(read[h], scores[h], values[h])
                        for h in range(heads):
                            for d in range(sums.shape[3]):
                                sums[b, i, h, d] += read[h, d]
            _finish_row(sums[b], output[b], split, splits)

    return compiled(_signature(dtype_name, gradients=False), forward)


@cache
def compiled_backward(heads: int, head_dim: int, value_dim: int, tile: int, dtype_name: str):
    """
    The backward for these sizes, see `compiled_forward`. Gradients of keys and values are added up apart for every split,
    (split, batch, key, heads, width), and rounded here where there is one.
    """
    padded = -(-heads // 4) * 4

    def backward(query, key, value, mask, bias, mixing, seed, norm, relu, generated, deep, masked, threshold, survivor,
                 scaling, statistics, splits, first_task, last_task, grad_output, grad_query, grad_key, grad_value,
                 grad_bias, grad_mixing, query_out, key_out, value_out):  # fmt: skip
        dtype = bias.dtype
        query_length, key_length = query.shape[2], key.shape[2]
        keys = np.zeros((padded, head_dim, tile), dtype)
        values = np.zeros((padded, value_dim, tile), dtype)
        grad_keys = np.zeros((padded, head_dim, tile), dtype)
        grad_values = np.zeros((padded, value_dim, tile), dtype)
        scores = np.zeros((padded, tile), dtype)
        grad_codes = np.zeros((padded, tile), dtype)
        hidden = np.zeros((value_dim, tile), dtype)
        hidden_2 = np.zeros((value_dim, tile), dtype)
        grad_hidden = np.zeros((value_dim, tile), dtype)
        grad_hidden_2 = np.zeros((value_dim, tile), dtype)
        projected = np.zeros((value_dim, tile), dtype)
        factor = np.zeros(tile, dtype)
        square = np.zeros(tile, dtype)
        keep = np.zeros(tile, dtype)
        along = np.zeros(tile, dtype)
        column_words = np.zeros(tile, np.int64)
        row = np.zeros((padded, head_dim), dtype)
        grad_row = np.zeros((padded, head_dim), dtype)
        grad_read = np.zeros((padded, value_dim), dtype)
        matrices = np.zeros((padded, value_dim, value_dim), dtype)
        _copy(mixing, matrices)
        grad_matrices = np.zeros((heads, value_dim, value_dim), dtype)
        one, share, epsilon = dtype.type(1), dtype.type(1) / dtype.type(heads), dtype.type(_EPSILON)
        first_query = max(key_length - query_length, 0)
        masked_score = dtype.type(np.finfo(dtype).min if norm == SOFTMAX else 0)

        for task in range(first_task, last_task):
            b, split = task // splits, task % splits
            # The gradient of softmax needs the sum over keys of code times its gradient first, likewise.
            for survey in range(norm == SOFTMAX and key_length > tile, -1, -1):
                for start in range(0, key_length, tile):
                    count = min(tile, key_length - start)
                    _load(key, b, start, count, False, keys)
                    _load(value, b, start, count, relu and not generated, values)
                    for h in range(heads):
                        _clear(grad_keys[h])
                        _clear(grad_values[h])
                    for k in range(tile):
                        keep[k] = 1 if k < count else 0
                        column_words[k] = _mix((start + k) ^ seed[1])
                    for i in range(split, query_length, splits):
                        if masked and not _visible(mask, b, i, start, count, keep) and norm != SOFTMAX:
                            continue
                        first = query_length - 1 - i + start
                        _load_row(query, b, i, scaling, row)
                        _load_row(grad_output, b, i, one, grad_read)
                        _score(scores, row, keys, bias, first, keep, masked_score)
                        if norm == SOFTMAX:
                            _exponentiate_tile(scores, count, statistics[b, i, 0])
                            _divide(scores, statistics[b, i, 1])
                        _factors(scores, norm, heads, square, factor)
                        if threshold > 0:
                            _drop(factor, threshold, survivor, _mix((first_query + i) ^ seed[0]), column_words)

                        # Gradients of the codes, and of the values.
                        _clear(grad_codes)
                        if generated:
                            _generate(hidden, scores, factor, values, relu)
                            last, grad_last = hidden, grad_hidden
                            if deep:
                                _generate_again(hidden_2, scores, factor, matrices, hidden, projected, relu)
                                last, grad_last = hidden_2, grad_hidden_2
                            _sum_outer(grad_last, grad_read, scores)
                            for h in range(heads):
                                _add_dots(grad_codes[h], grad_read[h], last)
                            _rectify(grad_last, factor, False)
                            _derive(grad_last, last, relu)
                            if deep:
                                _clear(grad_hidden)
                                for h in range(heads):
                                    _project(projected, matrices[h], hidden)
                                    _add_products(grad_codes[h], grad_hidden_2, projected)
                                    for k in range(tile):
                                        along[k] = scores[h, k] * factor[k]
                                    _clear(projected)
                                    _add_scaled(projected, along, grad_hidden_2)
                                    for e in range(value_dim):
                                        if not survey:
                                            _add_sums(grad_matrices[h, e], projected[e], hidden)
                                        _add_outer(grad_hidden, matrices[h, e], projected[e])
                                _derive(grad_hidden, hidden, relu)
                            for h in range(heads):
                                _add_products(grad_codes[h], grad_hidden, values[h])
                            _rectify(grad_hidden, factor, False)
                            if not survey:
                                for h in range(heads):
                                    _add_scaled(grad_values[h], scores[h], grad_hidden)
                        else:
                            for h in range(heads):
                                _add_dots(grad_codes[h], grad_read[h], values[h])
                                if not survey:
                                    for k in range(tile):
                                        along[k] = scores[h, k] * factor[k]
                                    _add_outer(grad_values[h], grad_read[h], along)

                        # Gradients of the scores, in the place of the codes'.
                        sums = statistics[b, i, 2]
                        if norm == RMS_HEAD and heads > 1:
                            for k in range(tile):
                                along[k] = 0
                            for h in range(heads):
                                for k in range(tile):
                                    along[k] += grad_codes[h, k] * scores[h, k]
                            for k in range(tile):
                                along[k] *= square[k] * factor[k] * share
                        for h in range(heads):
                            if norm == RMS_HEAD and heads == 1:
                                # The difference below, of numbers that are equal but for epsilon.
                                for k in range(tile):
                                    grad_codes[h, k] *= factor[k] * square[k] * epsilon
                            elif norm == RMS_HEAD:
                                for k in range(tile):
                                    grad_codes[h, k] = factor[k] * grad_codes[h, k] - scores[h, k] * along[k]
                            elif norm == NONE:
                                for k in range(tile):
                                    grad_codes[h, k] *= factor[k]
                            else:
                                if survey or key_length <= tile:
                                    for k in range(tile):
                                        sums[h] += factor[k] * grad_codes[h, k] * scores[h, k]
                                mean = sums[h]
                                for k in range(tile):
                                    grad_codes[h, k] = scores[h, k] * (factor[k] * grad_codes[h, k] - mean)
                            for k in range(tile):
                                grad_codes[h, k] = grad_codes[h, k] if keep[k] > 0 else 0
                        if survey:
                            continue

                        _clear(grad_row)
                        for h in range(heads):
                            near = grad_bias[h, first : first + tile]
                            for k in range(tile):
                                near[k] += grad_codes[h, k]
                            _add_outer(grad_keys[h], row[h], grad_codes[h])
                            _add_sums(grad_row[h], grad_codes[h], keys[h])
                            for d in range(query.shape[3]):
                                grad_query[b, i, h, d] += grad_row[h, d] * scaling
                    if survey:
                        continue
                    for h in range(heads):
                        for k in range(count):
                            for d in range(key.shape[3]):
                                grad_key[split, b, start + k, h, d] = grad_keys[h, d, k]
                            for d in range(value.shape[3]):
                                passes = generated or not relu or values[h, d, k] > 0
                                grad_value[split, b, start + k, h, d] = grad_values[h, d, k] if passes else 0
            _finish_row(grad_query[b], query_out[b], split, splits)
            if splits == 1:
                _finish_row(grad_key[0, b], key_out[b], 0, 1)
                _finish_row(grad_value[0, b], value_out[b], 0, 1)
        _copy(grad_matrices, grad_mixing)

    return compiled(_signature(dtype_name, gradients=True), backward)
