"""Attention by every implementation: whether they agree, and what they cost."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model.attention_hyla import by_pair, eager_attention_forward, largest_intermediate
from ..model.backends_hyla import BACKENDS, IMPLEMENTATIONS, Call
from ..model.configuration_hyla import HylaConfig
from ..model.layers_hyla import HylaAttention
from .meter import SEED, Meter, available_bytes, in_a_line


# The largest error in float32 of the output, and of a gradient, as a share of its norm.
_OUTPUT_TOLERANCE, _GRADIENT_TOLERANCE = 1e-5, 1e-4
# A hidden unit is at the kink of ReLU, where rounding decides its gradient, if it is closer to 0 than this share of the root mean
# square of all hidden units.
_AT_KINK = 1e-5
# In half precision, rounding decides so often that errors are compared with those of the eager implementation. The error of
# another implementation may be this many times as large, plus one rounding.
_TIMES_EAGER = 1.5
# Elements of the largest intermediate result that the definition in float64 may have at a time.
_BLOCK = 2**24

# By the name of a quantity: its right value in float64, and the error that is allowed.
_Bounds = dict[str, tuple[torch.Tensor, float]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of attention: queries, keys and values are each (batch, heads, length, width)."""

    batch: int
    length: int
    heads: int
    width: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch} x {self.length} x {self.heads} heads x {self.width}, {dtype}"

    @property
    def eager_bytes(self) -> int:
        """About the memory that the eager implementation takes for forward and backward, found in float32."""
        return self.batch * self.length**2 * (10 * self.heads + 3 * self.width) * self.dtype.itemsize

    @property
    def bias_bytes(self) -> int:
        """About the memory of a position bias by pair of tokens, which SDPA takes, and of its gradient."""
        return (self.batch + 2) * self.heads * self.length**2 * self.dtype.itemsize


# Where flash attention is measured.
FLASH_SHAPE = Shape(8, 2048, 16, 64, torch.bfloat16)


def measure_attention(meter: Meter, shape: Shape) -> None:
    """Checks every implementation on this shape, and times those that agree with the definition."""
    what, device = f"attention, {shape}", meter.device
    hyla, softmax = _layer(shape, "hyla").to(device), _layer(shape, "softmax").to(device)
    inputs = _inputs(shape, device)
    if shape.dtype == torch.float32:
        inputs = _without_kinks(hyla, inputs)
    plain = {name: tensor for name, tensor in inputs.items() if name != "position_bias"}
    fused = {"cpu": "hyla_cpu", "cuda": "hyla_triton"}[device.type]
    backends: Any = BACKENDS  # mypy takes partial functions for objects
    available = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_bytes()
    hyla_subjects = {"eager": (backends["eager"], inputs), "chunked": (backends["hyla_chunked"], inputs)}
    if problem := _memory_problem(shape.eager_bytes, available):
        del hyla_subjects["eager"]
        meter.skip(f"{what}, eager", problem)
        if shape.dtype != torch.float32:
            return meter.skip(what, "in half precision the others are held to the errors of the eager implementation.")
    if problem := kernel_problem(fused, hyla, inputs):
        meter.skip(f"{what}, fused", f"{problem}.")
    else:
        hyla_subjects["fused"] = (backends[fused], inputs)
    groups = [(hyla, inputs, hyla_subjects)]
    if problem := _memory_problem(shape.bias_bytes, available):
        meter.skip(f"{what}, sdpa", problem)
    else:
        with torch.no_grad():
            pairs = by_pair(inputs["position_bias"], shape.length, shape.length)[None].contiguous()
        sdpa, fixed = backends["hyla_sdpa"], inputs | {"position_bias": pairs}
        groups.append((softmax, inputs, {"sdpa": (sdpa, inputs), "sdpa, fixed bias": (sdpa, fixed)}))
    if shape.dtype == torch.bfloat16:
        groups.append((softmax, plain, {"flash, no bias": (_flash_attention, plain)}))

    meter.say(f"{what}: checks every implementation against the definition")
    workloads = {}
    for layer, defining, subjects in groups:
        bounds = _bounds(layer, defining)
        for name, (attention, given) in subjects.items():
            if problem := _problem(bounds, attention, layer, given):
                meter.fail(
                    f"{name} does not compute what it should on {shape}: {problem}, so its speed is not reported; repair it "
                    "first, or do not use it."
                )
            else:
                workloads[name] = (attention, layer, given)
    for workload, run in {"forward": _forward, "forward + backward": _differentiated}.items():
        meter.compare(
            {name: partial(run, *arguments) for name, arguments in workloads.items()},
            against=("eager", "sdpa", "sdpa, fixed bias", "flash, no bias"),
            facts={"part": "attention", "work": workload, "shape": str(shape)}
            | ({"length": shape.length} if shape.batch == 1 else {}),
        )


def _memory_problem(needed: int, available: int | None) -> str | None:
    """Why something that needs so many bytes is not measured, or `None` if they are there. `available` may be unknown."""
    if available is None or needed <= available / 2:
        return None
    return f"it needs about {needed / 2**30:.1f} GiB, more than half of the {available / 2**30:.1f} GiB that are free."


def _layer(shape: Shape, attention_type: Literal["hyla", "softmax"]) -> HylaAttention:
    config = HylaConfig(
        attention_type=attention_type,
        num_attention_heads=shape.heads,
        head_dim=shape.width,
        value_head_dim=shape.width,
    )
    return HylaAttention(config, layer_idx=0)


def _inputs(shape: Shape, device: torch.device) -> dict[str, torch.Tensor]:
    """Queries, keys and values with the strides they have in a layer, the position bias by diagonal, and the gradient."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, shape.dtype)

    size = (shape.batch, shape.length, shape.heads, shape.width)
    leaves = {name: draw(*size).transpose(1, 2) for name in ("query", "key", "value")}
    leaves["position_bias"] = draw(shape.heads, 2 * shape.length - 1)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()} | {"gradient": draw(*size)}


def kernel_problem(kernel: str, layer: HylaAttention, inputs: dict[str, torch.Tensor]) -> str | None:
    """Why the kernel cannot compute this layer here, or `None` if it can."""
    query, key, value, bias = (inputs[name] for name in ("query", "key", "value", "position_bias"))
    call = Call(layer, query, key, value, attention_mask=None, scaling=layer.scaling, position_bias=bias)
    return IMPLEMENTATIONS[kernel].problem(call)


def _apply(attention: Callable, layer: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return attention(
        layer,
        inputs["query"],
        inputs["key"],
        inputs["value"],
        None,
        scaling=layer.scaling,
        position_bias=inputs.get("position_bias"),
    )[0]


def _forward(attention: Callable, layer: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return _apply(attention, layer, inputs)


def _differentiated(attention: Callable, layer: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output, and the gradients of those inputs that have one."""
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    output = _apply(attention, layer, inputs)
    gradients = torch.autograd.grad(output, list(leaves.values()), inputs["gradient"])
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def _flash_attention(layer: nn.Module, query, key, value, mask, scaling: float, position_bias=None):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None


def _definition(layer: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `_differentiated` gives for the eager implementation in float64."""
    wide = {name: tensor.detach().double() for name, tensor in inputs.items()}
    result = {"output": torch.empty_like(wide["gradient"])}
    result |= {name: torch.zeros_like(tensor) for name, tensor in wide.items() if name != "gradient"}
    for rows, columns, where in _parts(layer, wide):
        part = {name: wide[name][index].requires_grad_() for name, index in where.items()}
        part["gradient"] = wide["gradient"][rows, columns]
        found = _differentiated(eager_attention_forward, layer, part)
        result["output"][rows, columns] = found["output"]
        for name, index in where.items():
            result[name][index] += found[name]
    return result


def _without_kinks(layer: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The inputs, with an output's gradient of 0 for queries that have a hidden unit at the kink of ReLU. The side that rounding
    chooses there then changes nothing, and all other gradients can be held to the accuracy of float32.
    """
    wide = {name: tensor.detach().double() for name, tensor in inputs.items()}
    gradient = inputs["gradient"].clone()
    seen: list[torch.Tensor] = []
    with layer.value_activation.register_forward_pre_hook(lambda _, args: seen.append(args[0])):  # type: ignore[union-attr]
        for rows, columns, where in _parts(layer, wide):
            _forward(eager_attention_forward, layer, {name: wide[name][index] for name, index in where.items()})
            hidden = seen.pop()  # (batch, query, key, width)
            at_kink = (hidden.abs() < _AT_KINK * hidden.square().mean().sqrt()).any(dim=(2, 3))
            gradient[rows, columns] *= ~at_kink[:, :, None, None]
    return inputs | {"gradient": gradient}


def _parts(layer: nn.Module, wide: dict[str, torch.Tensor]) -> Iterator[tuple[slice, slice, dict[str, tuple]]]:
    """
    Divides the batch and the queries, which are independent of each other, so that the eager implementation in float64 fits into
    memory. Yields the rows of the batch, the queries, and the indices of the inputs that they need.
    """
    batch, _, length, _ = wide["query"].shape
    per_query = largest_intermediate(layer, wide["query"][:1, :, :1], wide["key"], wide["value"])
    queries = min(max(_BLOCK // per_query, 1), length)
    sequences = max(_BLOCK // (per_query * queries), 1)
    for row, first in itertools.product(range(0, batch, sequences), range(0, length, queries)):
        last = min(first + queries, length)
        rows, columns = slice(row, row + sequences), slice(first, last)
        where = {
            "query": (rows, slice(None), columns),
            "key": (rows,),
            "value": (rows,),
            "position_bias": (slice(None), slice(length - last, 2 * length - first - 1)),
        }
        yield rows, columns, {name: index for name, index in where.items() if name in wide}


def _bounds(layer: nn.Module, inputs: dict[str, torch.Tensor]) -> _Bounds:
    """For the output and each gradient: the definition's value, and the allowed error as a share of its norm."""
    expected = _definition(layer, inputs)
    dtype = inputs["query"].dtype
    if dtype == torch.float32:
        return {
            name: (tensor, _OUTPUT_TOLERANCE if name == "output" else _GRADIENT_TOLERANCE)
            for name, tensor in expected.items()
        }
    eager = _differentiated(eager_attention_forward, layer, inputs)
    rounding = torch.finfo(dtype).eps
    return {name: (tensor, _TIMES_EAGER * _error(eager[name], tensor) + rounding) for name, tensor in expected.items()}


def _problem(bounds: _Bounds, attention: Callable, layer: nn.Module, inputs: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with the output or a gradient, or `None` where all agree with the definition."""
    try:
        for name, tensor in _differentiated(attention, layer, inputs).items():
            expected, allowed = bounds[name]
            error = _error(tensor, expected)
            if not error <= allowed:  # a NaN is refused too
                quantity = "output" if name == "output" else f"gradient of the {name}"
                return f"its {quantity} is off by {error:.1e} of its norm, where {allowed:.0e} is allowed"
    except Exception as error:  # compilers and drivers raise errors of any type
        return f"it cannot be run ({in_a_line(error)})"
    return None


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()
