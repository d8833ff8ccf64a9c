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
The processor's vectors as values in code for numba, and the half-precision formats, which numba does not know.

numba leaves it to LLVM to find vector instructions in a loop, and LLVM keeps a dozen running sums in memory. With vectors as
values, the sums are local variables and stay in registers. The functions here take arrays by element: `load(a, (h, d, k))` is
the vector whose first element is `a[h, d, k]`. A number beside vectors stands for a vector filled with it.

Half precision is only a format of storage. bfloat16 arrives as int16 and float16 as uint16, and both are computed in float32.
"""

import math
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np


try:
    import numba
    from llvmlite import binding, ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic, models, overload, register_model
except ImportError:  # another implementation takes over, see `cpu_problem`
    numba = None

# Sums may be reordered, which vector instructions need; infinities and NaN keep their meaning.
OPTIONS = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True, "error_model": "numpy"}
# The type in which numba sees the elements of a dtype, by torch's name of the dtype.
STORED = {"float64": "float64", "float32": "float32", "bfloat16": "int16", "float16": "uint16"}
_FLAGS = ("contract", "nsz", "arcp")
# Functions that become a part of those that call them. numba makes no entries for Python and for C, which would take time, so
# a call from Python would crash.
_INNER = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def jit(function):
    return numba.njit(**_INNER, **OPTIONS)(function) if numba else function


def jit_in_order(function):
    """Keeps sums in the order in which they are written, for functions that depend on how they round."""
    options = OPTIONS | {"fastmath": {"contract"}}
    return numba.njit(**_INNER, **options)(function) if numba else function


def compiled_by_type(function):
    """Compiles for `function` what the decorated function returns for the types of the arguments."""
    if numba is None:
        return lambda choose: choose
    return overload(function, jit_options=_INNER | OPTIONS)


def compiled(signature, function):
    """
    The function compiled for these types. It is read from the cache on disk; where that cannot be written, every process
    compiles it anew.
    """
    # numba compiles anew when the function's own file has changed. The checksum in the name stands for the other files.
    function.__qualname__ = f"{function.__name__}_{_sources():08x}"
    try:
        return numba.njit(signature, cache=True, **OPTIONS)(function)
    except (RuntimeError, OSError):  # from numba, and from the file system
        return numba.njit(signature, **OPTIONS)(function)


@cache
def _sources() -> int:
    """A checksum of the files that kernels are made of."""
    folder = Path(__file__).parent
    paths = [folder / "attention_hyla.py", *sorted(folder.glob("*_cpu_hyla.py"))]
    return zlib.crc32(b"".join(path.read_bytes() for path in paths))


def _vector_bytes() -> int:
    """Bytes of a vector: the processor's widest with AVX-512, and half of that on all others."""
    return 64 if numba and binding.get_host_cpu_features().get("avx512f") else 32


VECTOR_BYTES = _vector_bytes()


if numba:

    class _Vector(types.Type):
        """As many elements as `VECTOR_BYTES` holds."""

        def __init__(self, element):
            self.element = element
            super().__init__(f"Vector({element}, {VECTOR_BYTES})")

    @register_model(_Vector)
    class _VectorModel(models.PrimitiveModel):
        def __init__(self, manager, vector):
            super().__init__(manager, vector, _ir_type(manager.lookup(vector.element).get_value_type()))


def _ir_type(element):
    return ir.VectorType(element, VECTOR_BYTES * 8 // (32 if element == ir.FloatType() else 64))


def _spread(builder, x):
    """`x` as a vector. A number is repeated in every element."""
    if isinstance(x.type, ir.VectorType):
        return x
    vector = _ir_type(x.type)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, x, ir.IntType(32)(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None))


def _pointer(context, builder, array_type, array, index_type, index):
    fields = context.make_array(array_type)(context, builder, array)
    indices = [
        context.cast(builder, position, position_type, types.intp)
        for position, position_type in zip(cgutils.unpack_tuple(builder, index), index_type, strict=True)
    ]
    pointer = cgutils.get_item_pointer2(
        context, builder, fields.data, cgutils.unpack_tuple(builder, fields.shape),
        cgutils.unpack_tuple(builder, fields.strides), array_type.layout, indices, wraparound=False, boundscheck=False,
    )  # fmt: skip
    return builder.bitcast(pointer, _ir_type(context.get_data_type(array_type.dtype)).as_pointer())


def _operation(build: Callable, arguments: int):
    """A function of vectors and numbers, at least one of them a vector. `build(builder, *vectors)` makes its code."""
    if numba is None:
        return build

    def typed(*operands):
        vector = next(operand for operand in operands if isinstance(operand, _Vector))

        def generate(context, builder, signature, values):
            return build(builder, *(_spread(builder, value) for value in values))

        return vector(*operands), generate

    # numba needs the names of the arguments.
    by_count = {
        1: lambda typing, x: typed(x),
        2: lambda typing, x, y: typed(x, y),
        3: lambda typing, x, y, z: typed(x, y, z),
    }
    return intrinsic(by_count[arguments])


def _call(builder, name: str, vector):
    suffix = f"v{vector.type.count}f{32 if vector.type.element == ir.FloatType() else 64}"
    function = ir.FunctionType(vector.type, [vector.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.{suffix}"), [vector])


def _zero(vector):
    return ir.Constant(vector.type, None)


add = _operation(lambda b, x, y: b.fadd(x, y, flags=_FLAGS), 2)
subtract = _operation(lambda b, x, y: b.fsub(x, y, flags=_FLAGS), 2)
multiply = _operation(lambda b, x, y: b.fmul(x, y, flags=_FLAGS), 2)
divide = _operation(lambda b, x, y: b.fdiv(x, y, flags=_FLAGS), 2)
# x · y + z
multiply_add = _operation(lambda b, x, y, z: b.fadd(b.fmul(x, y, flags=_FLAGS), z, flags=_FLAGS), 3)
square_root = _operation(lambda b, x: _call(b, "sqrt", x), 1)
# 0 where x < 0, else x: NaN stays NaN
rectify = _operation(lambda b, x: b.select(b.fcmp_ordered("<", x, _zero(x)), _zero(x), x), 1)
# y where x > 0, else z
where_positive = _operation(lambda b, x, y, z: b.select(b.fcmp_ordered(">", x, _zero(x)), y, z), 3)


if numba:

    @intrinsic
    def load(typing, array, index):
        def generate(context, builder, signature, values):
            loaded = builder.load(_pointer(context, builder, array, values[0], index, values[1]))
            loaded.align = array.dtype.bitwidth // 8
            return loaded

        return _Vector(array.dtype)(array, index), generate

    @intrinsic
    def store(typing, array, index, vector):
        def generate(context, builder, signature, values):
            pointer = _pointer(context, builder, array, values[0], index, values[1])
            builder.store(values[2], pointer).align = array.dtype.bitwidth // 8
            return context.get_dummy_value()

        return types.void(array, index, vector), generate

    @intrinsic
    def zeros(typing, array):
        """A vector of zeros of the array's dtype."""
        vector = _Vector(array.dtype)
        return vector(array), lambda context, builder, *_: ir.Constant(context.get_data_type(vector), None)

    @intrinsic
    def store_totals(typing, array, index, w, x, y, z):
        """Stores four numbers side by side: the sum of the elements of each vector."""

        def generate(context, builder, signature, values):
            parts = _totals(builder, values[2:])
            pointer = _pointer(context, builder, array, values[0], index, values[1])
            builder.store(parts, builder.bitcast(pointer, parts.type.as_pointer())).align = array.dtype.bitwidth // 8
            return context.get_dummy_value()

        return types.void(array, index, w, x, y, z), generate

    @intrinsic
    def store_transposed(typing, target, target_index, source, source_index):
        """Copies a square, as wide as a vector, from one matrix to the other, transposed."""

        def generate(context, builder, signature, values):
            count = _ir_type(context.get_data_type(source.dtype)).count

            def pointer(array_type, array, index_type, index, row):
                first, second = cgutils.unpack_tuple(builder, index)
                index = cgutils.pack_array(builder, [builder.add(first, first.type(row)), second])
                return _pointer(context, builder, array_type, array, index_type, index)

            rows = [builder.load(pointer(source, values[2], source_index, values[3], row)) for row in range(count)]
            for row in rows:
                row.align = source.dtype.bitwidth // 8
            for row, vector in enumerate(_transposed(builder, rows)):
                place = pointer(target, values[0], target_index, values[1], row)
                builder.store(vector, place).align = target.dtype.bitwidth // 8
            return context.get_dummy_value()

        return types.void(target, target_index, source, source_index), generate
else:
    load = store = zeros = store_totals = store_transposed = None


def _transposed(builder, rows):
    """The columns of a square of vectors. Blocks of size 1, 2, 4, ... are exchanged across the diagonal."""
    count, size = len(rows), 1
    while size < count:
        upper = [place if not place & size else count + place - size for place in range(count)]
        lower = [place + size if not place & size else count + place for place in range(count)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), count), places) for places in (upper, lower)]
        pairs = {row: (rows[row & ~size], rows[row | size]) for row in range(count)}
        rows = [builder.shuffle_vector(*pairs[row], masks[bool(row & size)]) for row in range(count)]
        size *= 2
    return rows


def _totals(builder, vectors):
    """The sums of the elements of four vectors, as a vector of four."""
    count = vectors[0].type.count

    def pick(x, y, places):
        return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places)))

    def folded(x, y, size):
        """Halves every run of `size` elements by adding its two halves, in both vectors at once."""
        runs = range(0, 2 * count, size)
        low = [first + k for first in runs for k in range(size // 2)]
        return builder.fadd(pick(x, y, low), pick(x, y, [k + size // 2 for k in low]), flags=_FLAGS)

    first, second = folded(vectors[0], vectors[1], count), folded(vectors[2], vectors[3], count)
    total, size = folded(first, second, count // 2), count // 4
    while size > 1:
        runs = range(0, total.type.count, size)
        low = [first + k for first in runs for k in range(size // 2)]
        total = builder.fadd(pick(total, total, low), pick(total, total, [k + size // 2 for k in low]), flags=_FLAGS)
        size //= 2
    return total


# The exponential of x is 2^n · exp(r), where n is the integer nearest to x / ln 2. exp(r) is Taylor's polynomial, which ends where
# terms fall below the rounding. ln 2 is the sum of two numbers, and n times the first is exact. 2^n is made from its bits. Calls of
# the C library, or integers of two widths, would keep a loop from becoming vector instructions, so every integer has its type
# written out.
_PER_LN2, _LN2_HIGH, _LN2_LOW = 1 / math.log(2), 0.693145751953125, 1.4286068203094172e-06
_TAYLOR = tuple(1 / math.factorial(n) for n in range(14))


@jit_in_order
def exp_float32(x):
    """The exponential of a float32 that is not positive, or 0 where that lies below the normal numbers."""
    number, lowest = np.float32, np.float32(-87)
    inside = lowest if x < lowest else x  # NaN stays NaN
    n = np.int32(inside * number(_PER_LN2) - number(0.5))  # towards 0
    r = inside - number(n) * number(_LN2_HIGH) - number(n) * number(_LN2_LOW)
    y = number(_TAYLOR[7])
    y = y * r + number(_TAYLOR[6])
    y = y * r + number(_TAYLOR[5])
    y = y * r + number(_TAYLOR[4])
    y = y * r + number(_TAYLOR[3])
    y = y * r + number(_TAYLOR[2])
    y = y * r + number(_TAYLOR[1])
    y = y * r + number(_TAYLOR[0])
    power = np.int32(np.int32(n + np.int32(127)) << np.int32(23)).view(np.float32)
    return number(0) if x < lowest else y * power


@jit_in_order
def exp_float64(x):
    """The exponential of a float64 that is not positive, likewise."""
    lowest = -708.0
    inside = lowest if x < lowest else x
    n = np.int32(inside * _PER_LN2 - 0.5)
    r = inside - n * _LN2_HIGH - n * _LN2_LOW
    y = _TAYLOR[13]
    y = y * r + _TAYLOR[12]
    y = y * r + _TAYLOR[11]
    y = y * r + _TAYLOR[10]
    y = y * r + _TAYLOR[9]
    y = y * r + _TAYLOR[8]
    y = y * r + _TAYLOR[7]
    y = y * r + _TAYLOR[6]
    y = y * r + _TAYLOR[5]
    y = y * r + _TAYLOR[4]
    y = y * r + _TAYLOR[3]
    y = y * r + _TAYLOR[2]
    y = y * r + _TAYLOR[1]
    y = y * r + _TAYLOR[0]
    power = np.int64(np.int64(np.int64(n) + np.int64(1023)) << np.int64(52)).view(np.float64)
    return 0.0 if x < lowest else y * power


def widened(x):
    """A stored element as a number to compute with."""
    raise NotImplementedError("compiled only")


def rounded(x, stored):
    """The bits of `x` in the format of the array `stored`, rounded to the nearest number, and to even between two."""
    raise NotImplementedError("compiled only")


# Every integer below has its type written out, since the compiler finds vector instructions only in loops of one width.
@compiled_by_type(widened)
def _choose_widened(x):
    if x == types.int16:  # bfloat16: the upper half of a float32
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    if x == types.uint16:

        def widened(x):
            bits = np.int32(x)
            magnitude = np.int32(np.int32(bits & np.int32(0x7FFF)) << np.int32(13))
            # Exponents differ by 112, but the largest stands for infinity and NaN in both. Subnormal numbers are exact too.
            wide = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.int32)
            special = np.int32(0x7F800000) if magnitude >= np.int32(0x7C00 << 13) else np.int32(0)
            sign = np.int32(np.int32(bits & np.int32(0x8000)) << np.int32(16))
            return np.int32(wide | special | sign).view(np.float32)

        return widened
    return lambda x: x


@compiled_by_type(rounded)
def _choose_rounded(x, stored):
    if stored.dtype in (types.float32, types.float64):
        return lambda x, stored: x
    if stored.dtype == types.int16:

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
        # From 1/2 to 1, float32 has steps of 2**-24, as float16 has below its normal numbers.
        small = np.float32(abs(x) + np.float32(0.5)).view(np.int32) - np.int32(0x3F000000)
        nearest = small if size < np.int32(113 << 23) else nearest
        nearest = nearest if x == x else np.int32(0x7E00)
        return np.uint16(nearest | np.int32(np.int32(bits >> np.int32(16)) & np.int32(0x8000)))

    return rounded
