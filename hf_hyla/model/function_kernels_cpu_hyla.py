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
The kernels of `functions_cpu_hyla.py`, compiled for the CPU by numba: GELU, its gradient, and transposed copies.

The tanh approximation of GELU, `x · (1 + tanh(u / 2)) / 2`, equals `x · σ(u)`. That takes one exponential, whose argument is
never positive, and one division.
"""

import math
from functools import cache

import numpy as np

from .vectors_cpu_hyla import (
    STORED,
    VECTOR_BYTES,
    compiled,
    exp_float32,
    jit_in_order,
    numba,
    rounded,
    store_transposed,
    widened,
)


_LINEAR, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # u = _LINEAR · (x + _CUBIC · x³)


@jit_in_order
def _gelu_parts(x):
    """u, exp(-|u|) and σ(|u|)"""
    number = np.float32
    u = number(_LINEAR) * x * (number(1) + number(_CUBIC) * x * x)
    small = exp_float32(-abs(u))
    return u, small, number(1) / (number(1) + small)


def _gelu(x, y):
    for i in range(x.shape[0]):
        a = widened(x[i])
        u, small, larger = _gelu_parts(a)
        y[i] = rounded(a * (larger if u >= 0 else small * larger), y)


def _gelu_backward(x, grad_y, grad_x):
    number = np.float32
    for i in range(x.shape[0]):
        a = widened(x[i])
        u, small, larger = _gelu_parts(a)
        slope = number(_LINEAR) * (number(1) + number(3 * _CUBIC) * a * a)
        bend = a * slope * small * larger * larger if small > 0 else number(0)  # the slope may be infinite
        grad_x[i] = rounded(widened(grad_y[i]) * ((larger if u >= 0 else small * larger) + bend), grad_x)


def _signature(dtype_name: str, arrays: int):
    return numba.void(*[getattr(numba.types, STORED[dtype_name])[::1]] * arrays)


@cache
def compiled_gelu(dtype_name: str):
    """`gelu(x, y)` for flat arrays of the dtype, as `vectors_cpu_hyla.STORED` stores it."""
    return compiled(_signature(dtype_name, 2), _gelu)


@cache
def compiled_gelu_backward(dtype_name: str):
    """`gelu_backward(x, grad_y, grad_x)`, likewise."""
    return compiled(_signature(dtype_name, 3), _gelu_backward)


def _transpose(source, target, first, last):
    side, rows, columns = VECTOR_BYTES // source.itemsize, source.shape[0], source.shape[1]
    whole = columns - columns % side
    for row in range(first, last, side):
        if row + side <= rows:
            for column in range(0, whole, side):
                store_transposed(target, (column, row), source, (row, column))
        for column in range(whole if row + side <= rows else 0, columns):
            for k in range(row, min(row + side, rows)):
                target[column, k] = source[k, column]


@cache
def compiled_transpose():
    """
    `transpose(source, target, first, last)` copies rows `first` to `last` of a float32 matrix into columns. Both numbers are
    multiples of the elements in a vector.
    """
    matrix, number = numba.types.float32[:, ::1], numba.types.int64
    return compiled(numba.void(matrix, matrix, number, number), _transpose)
