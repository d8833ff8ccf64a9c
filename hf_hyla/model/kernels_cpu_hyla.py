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

A query's scores against a tile of keys, their norm over heads, the generated network and its output never leave the first-level
cache. `tiles_cpu_hyla.py` says how they are computed and named. The backward computes scores and network again. Nothing of size
query * key is stored. Half precision is widened to float32 when it is loaded, summed in float32, and rounded once, when a row of
the batch is complete.
"""

from functools import cache

import numpy as np

from .tiles_cpu_hyla import (
    SOFTMAX,
    add_score_gradients,
    clear,
    derive_tile,
    divide_tile,
    drop,
    exponentiate_tile,
    find_factors,
    finite,
    generate,
    generated_gradients,
    hidden_gradient,
    load_rows,
    load_tile,
    mix,
    mix_values,
    mixed_gradients,
    read_out,
    rectify_tile,
    score,
    score_gradients,
    softmax_gradients,
    survey_tile,
    visible,
)
from .vectors_cpu_hyla import STORED, compiled, compiled_by_type, jit, numba, rounded


# Queries that the kernels compute at a time, so that each key and value is loaded for all of them at once.
QUERIES = 2


def _finish_row(sums, rows, first, step):
    """Rounds the sums of every `step`-th token into `rows` and sets them to zero. Does nothing if both are one array."""
    raise NotImplementedError("compiled only")


@compiled_by_type(_finish_row)
def _choose_finish_row(sums, rows, first, step):
    if sums.dtype == rows.dtype:
        return lambda sums, rows, first, step: None

    def finish_row(sums, rows, first, step):
        for i in range(first, rows.shape[0], step):
            for h in range(rows.shape[1]):
                for d in range(rows.shape[2]):
                    rows[i, h, d] = rounded(sums[i, h, d], rows)
                    sums[i, h, d] = 0

    return finish_row


@jit
def copy_matrices(matrices, out):
    """Copies the part of the matrices that both arrays hold."""
    for h in range(min(out.shape[0], matrices.shape[0])):
        for e in range(min(out.shape[1], matrices.shape[1])):
            for d in range(min(out.shape[2], matrices.shape[2])):
                out[h, e, d] = matrices[h, e, d]


@jit
def add_dots(out, row, tile):
    """out[k] += Σ_d row[d] · tile[d, k]"""
    for d in range(tile.shape[0]):
        r = row[d]
        for k in range(tile.shape[1]):
            out[k] += r * tile[d, k]


@jit
def add_products(out, a, tile):
    """out[k] += Σ_d a[d, k] · tile[d, k]"""
    for d in range(tile.shape[0]):
        for k in range(tile.shape[1]):
            out[k] += a[d, k] * tile[d, k]


@jit
def add_scaled(out, coefficient, tile):
    """out[d, k] += coefficient[k] · tile[d, k]"""
    for d in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[d, k] += coefficient[k] * tile[d, k]


@jit
def add_outer(out, row, coefficient):
    """out[d, k] += row[d] · coefficient[k]"""
    for d in range(out.shape[0]):
        r = row[d]
        for k in range(out.shape[1]):
            out[d, k] += r * coefficient[k]


@jit
def add_sums(out, coefficient, tile):
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


@jit
def project(out, matrix, hidden):
    """out[e, k] = Σ_d matrix[e, d] · hidden[d, k]"""
    clear(out)
    for e in range(out.shape[0]):
        add_dots(out[e], matrix[e], hidden)


@jit
def find_codes(code, scores, factor):
    """code[k] = scores[k] · factor[k]"""
    for k in range(code.shape[0]):
        code[k] = scores[k] * factor[k]


@jit
def generate_second(deep, scores, factor, mixing, hidden, code, projected, relu):
    """deep[e, k] = φ(Σ_h code[h, k] · (mixing[h] hidden[:, k])[e]), the second hidden layer of HYLA+"""
    clear(deep)
    for h in range(scores.shape[0]):
        project(projected, mixing[h], hidden)
        find_codes(code, scores[h], factor)  # first, since scores times a small layer may underflow
        add_scaled(deep, code, projected)
    if relu:
        rectify_tile(deep)


def _signature(dtype_name: str, gradients: bool):
    """The types of the arguments. Arrays of any strides then share one compilation."""
    stored = getattr(numba.types, STORED[dtype_name])
    number = numba.types.float64 if dtype_name == "float64" else numba.types.float32
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
    The forward for these sizes. They are constants to the compiler, which unrolls loops over them and knows that arrays do not
    overlap. Widths are multiples of 4, and `tile` is a multiple of the keys in a vector. Heads are padded by zeros to a multiple
    of 4.

    The output is added up in `sums` (batch, query, heads, width), which starts as zeros. In half precision all rows of the batch
    share the memory of one row, which is rounded into `output`. Otherwise both are one array.
    """
    padded = -(-heads // 4) * 4

    def forward(query, key, value, mask, bias, mixing, seed, norm, relu, generated, deep, masked, threshold, survivor,
                scaling, statistics, splits, first_task, last_task, sums, output):  # fmt: skip
        dtype = bias.dtype
        query_length, key_length = query.shape[2], key.shape[2]
        keys = np.zeros((padded, head_dim, tile), dtype)
        values = np.zeros((padded, value_dim, tile), dtype)
        scores = np.zeros((QUERIES, padded, tile), dtype)
        hidden = np.zeros((QUERIES, value_dim, tile), dtype)
        hidden_2 = np.zeros((QUERIES, value_dim, tile), dtype)
        projected = np.zeros((value_dim, tile), dtype)
        factor = np.zeros((QUERIES, tile), dtype)
        code = np.zeros(tile, dtype)
        square = np.zeros((QUERIES, tile), dtype)
        keep = np.zeros((QUERIES, tile), dtype)
        column_words = np.zeros(tile, np.int64)
        row = np.zeros((QUERIES, padded, head_dim), dtype)
        read = np.zeros((QUERIES, padded, value_dim), dtype)
        matrices = np.zeros((padded, value_dim, value_dim), dtype)
        copy_matrices(mixing, matrices)
        masked_score = dtype.type(np.finfo(dtype).min if norm == SOFTMAX else 0)
        first_query = max(key_length - query_length, 0)  # its position, see `attention_hyla.position_of_first`

        for task in range(first_task, last_task):
            b, split = task // splits, task % splits
            # Softmax needs every score before it can normalise one. A pass of its own surveys them, unless one tile holds all.
            for survey in range(norm == SOFTMAX and key_length > tile, -1, -1):
                for start in range(0, key_length, tile):
                    count = min(tile, key_length - start)
                    load_tile(key, b, start, count, False, keys)
                    load_tile(value, b, start, count, relu and not generated, values)
                    omissible = masked and norm != SOFTMAX and finite(values)
                    for k in range(tile):
                        keep[0, k] = keep[1, k] = 1 if k < count else 0
                        column_words[k] = mix((start + k) ^ seed[1])
                    for i in range(split, query_length, QUERIES * splits):
                        rows = 2 if i + splits < query_length else 1
                        if masked and not visible(mask, b, i, splits, rows, start, count, keep) and omissible:
                            continue
                        load_rows(query, b, i, splits, rows, scaling, row)
                        first = query_length - 1 - i + start
                        score(scores, row, keys, bias, first, first - (rows - 1) * splits, keep, masked_score)
                        for r in range(rows):
                            maximum, total = statistics[b, i + r * splits, 0], statistics[b, i + r * splits, 1]
                            if norm == SOFTMAX:
                                if survey or key_length <= tile:
                                    survey_tile(scores[r], count, maximum, total)
                                else:
                                    exponentiate_tile(scores[r], count, maximum)
                                if survey:
                                    continue
                                divide_tile(scores[r], total)
                            find_factors(scores[r], norm, heads, square[r], factor[r])
                            if threshold > 0:
                                row_word = mix((first_query + i + r * splits) ^ seed[0])
                                drop(factor[r], threshold, survivor, row_word, column_words)
                        if survey:
                            continue
                        if generated:
                            generate(hidden, scores, factor, values, relu)
                            for r in range(rows):
                                last = hidden[r]
                                if deep:
                                    last = hidden_2[r]
                                    generate_second(
                                        last, scores[r], factor[r], matrices, hidden[r], code, projected, relu
                                    )
                                read_out(read[r], scores[r], factor[r], last)
                        else:
                            mix_values(read, scores, factor, values)
                        for r in range(rows):
                            for h in range(heads):
                                for d in range(sums.shape[3]):
                                    sums[b, i + r * splits, h, d] += read[r, h, d]
            _finish_row(sums[b], output[b], split, splits)

    return compiled(_signature(dtype_name, gradients=False), forward)


@cache
def compiled_backward(heads: int, head_dim: int, value_dim: int, tile: int, dtype_name: str):
    """
    The backward for these sizes, see `compiled_forward`. Every split adds up gradients of keys and values of its own, (split,
    batch, key, heads, width). They are rounded here if there is one split.
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
        scores = np.zeros((QUERIES, padded, tile), dtype)
        grad_codes = np.zeros((QUERIES, padded, tile), dtype)
        hidden = np.zeros((QUERIES, value_dim, tile), dtype)
        hidden_2 = np.zeros((QUERIES, value_dim, tile), dtype)
        grad_hidden = np.zeros((QUERIES, value_dim, tile), dtype)
        grad_hidden_2 = np.zeros((QUERIES, value_dim, tile), dtype)
        projected = np.zeros((value_dim, tile), dtype)
        factor = np.zeros((QUERIES, tile), dtype)
        code = np.zeros(tile, dtype)
        square = np.zeros((QUERIES, tile), dtype)
        keep = np.zeros((QUERIES, tile), dtype)
        column_words = np.zeros(tile, np.int64)
        row = np.zeros((QUERIES, padded, head_dim), dtype)
        grad_row = np.zeros((QUERIES, padded, head_dim), dtype)
        grad_read = np.zeros((QUERIES, padded, value_dim), dtype)
        matrices = np.zeros((padded, value_dim, value_dim), dtype)
        copy_matrices(mixing, matrices)
        grad_matrices = np.zeros((heads, value_dim, value_dim), dtype)
        one = dtype.type(1)
        first_query = max(key_length - query_length, 0)
        masked_score = dtype.type(np.finfo(dtype).min if norm == SOFTMAX else 0)

        for task in range(first_task, last_task):
            b, split = task // splits, task % splits
            # The gradient of softmax first needs the sum over keys of each code times its gradient, also in a pass of its own.
            for survey in range(norm == SOFTMAX and key_length > tile, -1, -1):
                for start in range(0, key_length, tile):
                    count = min(tile, key_length - start)
                    load_tile(key, b, start, count, False, keys)
                    load_tile(value, b, start, count, relu and not generated, values)
                    omissible = masked and norm != SOFTMAX and finite(values) and finite(keys)
                    for h in range(heads):
                        clear(grad_keys[h])
                        clear(grad_values[h])
                    for k in range(tile):
                        keep[0, k] = keep[1, k] = 1 if k < count else 0
                        column_words[k] = mix((start + k) ^ seed[1])
                    for i in range(split, query_length, QUERIES * splits):
                        rows = 2 if i + splits < query_length else 1
                        if masked and not visible(mask, b, i, splits, rows, start, count, keep) and omissible:
                            continue
                        load_rows(query, b, i, splits, rows, scaling, row)
                        load_rows(grad_output, b, i, splits, rows, one, grad_read)
                        first = query_length - 1 - i + start
                        second = first - (rows - 1) * splits
                        score(scores, row, keys, bias, first, second, keep, masked_score)
                        for r in range(rows):
                            if norm == SOFTMAX:
                                exponentiate_tile(scores[r], count, statistics[b, i + r * splits, 0])
                                divide_tile(scores[r], statistics[b, i + r * splits, 1])
                            find_factors(scores[r], norm, heads, square[r], factor[r])
                            if threshold > 0:
                                row_word = mix((first_query + i + r * splits) ^ seed[0])
                                drop(factor[r], threshold, survivor, row_word, column_words)
                        # A query without a partner is one with a partner of zeros, which adds nothing to any sum.
                        if rows == 1:
                            clear(scores[1])
                            clear(factor[1:])
                            clear(row[1])
                            clear(grad_read[1])

                        # Gradients of the codes and of the values.
                        if generated:
                            generate(hidden, scores, factor, values, relu)
                            last, grad_last = hidden, grad_hidden
                            if deep:
                                last, grad_last = hidden_2, grad_hidden_2
                            for r in range(QUERIES):
                                if deep:
                                    generate_second(
                                        hidden_2[r], scores[r], factor[r], matrices, hidden[r], code, projected, relu
                                    )
                                hidden_gradient(grad_last[r], scores[r], factor[r], grad_read[r], last[r], relu)
                                if deep:
                                    clear(grad_hidden[r])
                                    clear(grad_codes[r])
                                    for h in range(heads):
                                        project(projected, matrices[h], hidden[r])
                                        add_products(grad_codes[r, h], grad_hidden_2[r], projected)
                                        find_codes(code, scores[r, h], factor[r])
                                        clear(projected)
                                        add_scaled(projected, code, grad_hidden_2[r])
                                        for e in range(value_dim):
                                            if not survey:
                                                add_sums(grad_matrices[h, e], projected[e], hidden[r])
                                            add_outer(grad_hidden[r], matrices[h, e], projected[e])
                                    derive_tile(grad_hidden[r], hidden[r], relu)
                            generated_gradients(
                                grad_codes, grad_values, scores, factor, grad_read, last, grad_hidden, values, deep
                            )
                        else:
                            mixed_gradients(grad_codes, grad_values, scores, factor, grad_read, values)

                        # Gradients of the scores, which replace those of the codes.
                        for r in range(rows):
                            if norm == SOFTMAX:
                                add_up, sums = survey or key_length <= tile, statistics[b, i + r * splits, 2]
                                softmax_gradients(grad_codes[r], scores[r], factor[r], keep[r], sums, add_up)
                            else:
                                score_gradients(grad_codes[r], scores[r], norm, heads, square[r], factor[r], keep[r])
                        if survey:
                            continue
                        if rows == 1:
                            clear(grad_codes[1])

                        add_score_gradients(grad_bias, grad_keys, grad_row, grad_codes, first, second, row, keys)
                        for r in range(rows):
                            for h in range(heads):
                                for d in range(query.shape[3]):
                                    grad_query[b, i + r * splits, h, d] += grad_row[r, h, d] * scaling
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
        copy_matrices(grad_matrices, grad_mixing)

    return compiled(_signature(dtype_name, gradients=True), backward)
