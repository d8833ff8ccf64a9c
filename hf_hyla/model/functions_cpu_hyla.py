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
Faster implementations for the CPU of float32 products of linear layers, and of the tanh approximation of GELU.

In the context `cpu_functions`, `torch.nn.functional.linear` and `gelu` are computed by these implementations, which agree with
torch's to rounding. torch computes the calls that they do not support. Modules stay as they are, so hooks, adapters, quantised
layers and exporters do not notice.
"""

import inspect
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.activations import ACT2FN

from .function_kernels_cpu_hyla import compiled_gelu, compiled_gelu_backward, compiled_transpose
from .ops_cpu_hyla import as_array, run_jobs, shares
from .vectors_cpu_hyla import VECTOR_BYTES, numba


# The fewest multiply-adds of a product, and elements of an activation, that are worth the calls from Python.
_SMALLEST_PRODUCT = 2**21
_SMALLEST_ACTIVATION = 2**15
# With fewer elements of the hidden states no call is that large, and the context would cost more than it saves.
_SMALLEST_STATES = 2**13
_TANH_GELU = type(ACT2FN["gelu_pytorch_tanh"])


def cpu_functions(hidden_states: torch.Tensor) -> AbstractContextManager:
    """
    The context for layers that compute with `hidden_states`. Compilers, exporters and whatever else watches torch's operators
    get torch's own functions.
    """
    if _is_watched() or hidden_states.device.type != "cpu" or hidden_states.numel() < _SMALLEST_STATES:
        return nullcontext()
    return _CpuFunctions()


def _is_watched() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()


def activated_linear(linear: Any, activation: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """
    `activation(linear(input))`. If there is no gradient to record, oneDNN computes a large float32 product and its GELU in one
    pass over the output, on processors where that is the fastest. The two modules must then be plain, without hooks or adapters,
    since they are not called.
    """
    fits = (
        not _is_watched()
        and not torch.is_grad_enabled()
        and onednn_fuses_gelu()
        and _is_plain(linear, nn.Linear)
        and _is_plain(activation, _TANH_GELU)
        and _are_ordinary(input, linear.weight, linear.bias)
        and input.numel() * linear.weight.shape[0] >= _SMALLEST_PRODUCT
        and linear.weight.ndim == 2
        and input.shape[-1] == linear.weight.shape[1]
        and _is_a_bias(linear.bias, linear.weight)
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not any(_is_transformed(tensor) for tensor in (input, linear.weight, linear.bias))
    )
    return onednn_gelu(input, linear.weight, linear.bias) if fits else activation(linear(input))


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does what its class says, and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()
    return type(module) is kind and not hooks and "forward" not in vars(module)


def _is_transformed(tensor: torch.Tensor | None) -> bool:
    """Whether a transform of functions, such as `vmap`, or a forward derivative goes through the tensor."""
    return tensor is not None and (is_functorch_wrapped_tensor(tensor) or unpack_dual(tensor).tangent is not None)


class _CpuFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    fits = (
        onednn_is_faster()
        and _are_ordinary(input, weight, bias)
        and weight.ndim == 2
        and input.numel() * weight.shape[0] >= _SMALLEST_PRODUCT
        and input.shape[-1] == weight.shape[1]
        and _is_a_bias(bias, weight)
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )
    return _Linear.apply(input, weight, bias) if fits else nn.functional.linear(input, weight, bias)


def _is_a_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """oneDNN reads a bias as contiguous memory of one number for each output, whatever its shape and strides are."""
    return bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())


def _gelu(input: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    fits = (
        approximate == "tanh"
        and _are_ordinary(input, dtypes=(torch.float32, torch.bfloat16, torch.float16))
        and input.numel() >= _SMALLEST_ACTIVATION
        and input.is_contiguous()
        and _kernels_of_gelu(input.dtype) is not None
    )
    return _Gelu.apply(input) if fits else nn.functional.gelu(input, approximate=approximate)


_REPLACEMENTS: dict[Callable, Callable] = {nn.functional.linear: _linear, nn.functional.gelu: _gelu}


def _are_ordinary(*tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether all are ordinary tensors in memory, not quantised, sharded or fake, and of one of these dtypes."""
    return all(
        tensor is None
        or (
            type(tensor) in (torch.Tensor, nn.Parameter)
            and tensor.dtype in dtypes
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
        )
        for tensor in tensors
    )


def onednn_is_available() -> bool:
    """Whether this build of torch has `onednn_product`."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def onednn_is_faster() -> bool:
    """
    Whether oneDNN multiplies float32 matrices faster than MKL, which torch calls. MKL uses AVX-512 on Intel's processors only,
    and oneDNN on all that have it. A rule decides, not a measurement, so that a run gives the same bits every time.
    """
    return (
        onednn_is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in _vendor()
    )


@cache
def onednn_fuses_gelu() -> bool:
    """Whether a product with its GELU is one operator, and faster than the two by themselves. They were compared with AVX-512 only."""
    return onednn_is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("vendor_id"))
    except (OSError, StopIteration):  # another system than Linux
        return platform.processor()


def onednn_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a · bᵀ + bias, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def onednn_gelu(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The tanh approximation of GELU of a · bᵀ + bias, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "gelu", [], "tanh")


def _needs_torch(grad_output: torch.Tensor) -> bool:
    """Whether torch's own operators must compute a gradient: it may be differentiated again, or belongs to a batch of gradients."""
    batched = is_functorch_wrapped_tensor(grad_output) or is_legacy_batchedtensor(grad_output)
    return torch.is_grad_enabled() or batched


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(input, weight, bias):
        return onednn_product(input, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        gradient = grad_output.reshape(-1, grad_output.shape[-1])
        rows = input.reshape(-1, input.shape[-1])
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        if _needs_torch(grad_output):
            grad_input = gradient @ weight if needs_input else None
            grad_weight = gradient.mT @ rows if needs_weight else None
        else:
            gradient = gradient.contiguous()
            grad_input = onednn_product(gradient, weight.mT) if needs_input else None
            grad_weight = _product_over_rows(gradient, rows) if needs_weight else None
        return (
            None if grad_input is None else grad_input.reshape(input.shape),
            grad_weight,
            gradient.sum(0) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent):
        input, weight = ctx.saved_tensors
        parts = [
            None if input_tangent is None else input_tangent @ weight.mT,
            None if weight_tangent is None else input @ weight_tangent.mT,
            bias_tangent,
        ]
        return sum(part for part in parts if part is not None)

    @staticmethod
    def vmap(info, in_dims, input, weight, bias):
        return torch.vmap(nn.functional.linear, in_dims)(input, weight, bias), 0


def _product_over_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """aᵀ · b. oneDNN needs its first operand to be contiguous, so the narrower of the two is copied."""
    if a.shape[1] <= b.shape[1]:
        return onednn_product(_transposed(a), b.mT)
    return onednn_product(_transposed(b), a.mT).mT


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """A transposed copy of the matrix. torch's own copy uses one thread."""
    transpose = _kernel_of_transpose()
    if transpose is None or not matrix.is_contiguous():
        return matrix.mT.contiguous()
    target = matrix.new_empty(matrix.shape[::-1])
    source, copy = matrix.detach().numpy(), target.numpy()
    side = VECTOR_BYTES // matrix.itemsize
    run_jobs([
        partial(transpose, source, copy, first * side, last * side)
        for first, last in shares(-(-matrix.shape[0] // side), torch.get_num_threads())
    ])  # fmt: skip
    return target


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(input):
        output = torch.empty_like(input)
        _elementwise(_kernels_of_gelu(input.dtype)[0], input, output)
        return output

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        if _needs_torch(grad_output):
            return torch.ops.aten.gelu_backward(grad_output, input, approximate="tanh")
        gradient = torch.empty_like(input)
        _elementwise(_kernels_of_gelu(input.dtype)[1], input, grad_output.contiguous(), gradient)
        return gradient

    @staticmethod
    def jvp(ctx, tangent):
        return torch.ops.aten.gelu_backward(tangent, *ctx.saved_tensors, approximate="tanh")

    @staticmethod
    def vmap(info, in_dims, input):
        return nn.functional.gelu(input, approximate="tanh"), in_dims[0]


@cache
def _kernels_of_gelu(dtype: torch.dtype) -> Any:
    """GELU and its gradient, compiled for a dtype; `None` where numba is missing or cannot compile them."""
    name = str(dtype).removeprefix("torch.")
    return _compiled_or_none(lambda: (compiled_gelu(name), compiled_gelu_backward(name)))


@cache
def _kernel_of_transpose() -> Any:
    """The kernel of the transposed copy; `None` where numba is missing or cannot compile it."""
    return _compiled_or_none(compiled_transpose)


def _compiled_or_none(compile_kernels: Callable[[], Any]) -> Any:
    if numba is None:
        return None
    try:
        return compile_kernels()
    except Exception:  # numba, LLVM and the cache's file system raise errors of many types
        return None


def _elementwise(kernel: Callable, *tensors: torch.Tensor) -> None:
    """Calls the kernel in each thread with an equal share of the flattened tensors."""
    arrays = [as_array(tensor.view(-1)) for tensor in tensors]
    run_jobs([
        partial(kernel, *(array[first:last] for array in arrays))
        for first, last in shares(arrays[0].size, torch.get_num_threads())
    ])  # fmt: skip


# `apply` needs the signature of `forward` in every call, and finds it anew unless it is stored there.
for _function in (_Linear, _Gelu):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore
