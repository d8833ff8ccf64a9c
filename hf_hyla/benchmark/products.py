"""The matrix products of a training step alone, by the fastest path that the machine has: the floor of its time."""

import collections
import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..model.functions_cpu_hyla import onednn_is_available, onednn_product
from .meter import SEED, Work


# Calls of each path of a product, of which the fastest counts.
_CALLS = 7

# Computes a · bᵀ for a of shape (m, k) and b of shape (n, k).
_Path = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LinearShape(NamedTuple):
    """One call of a linear layer: rows and features, and whether the gradient of its input is needed."""

    rows: int
    inputs: int
    outputs: int
    input_gradient: bool

    @property
    def flop(self) -> int:
        """Floating-point operations of its two or three products: two for each multiply-add."""
        return 2 * self.rows * self.inputs * self.outputs * (2 + self.input_gradient)

    def factors(self, generator: torch.Generator, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Factors (a, b) of the products a · bᵀ, with the strides they have in a step: x · Wᵀ of the forward, gᵀ · x, which is
        the weight's gradient, and g · W, the input's.
        """
        x, weight, gradient = (
            torch.randn(*size, generator=generator).to(device)
            for size in ((self.rows, self.inputs), (self.outputs, self.inputs), (self.rows, self.outputs))
        )
        products = [(x, weight), (gradient.mT, x.mT), (gradient, weight.mT)]
        return products if self.input_gradient else products[:2]


def linear_shapes(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[LinearShape]:
    """
    Of every call of a linear layer that the model makes for the batch: what it computes, not what its sizes would allow. So a
    last layer that computes some tokens only counts for these. Products between tokens, within attention, are not among them.
    """
    shapes = []

    def note(module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        rows = inputs[0].numel() // module.in_features
        shapes.append(LinearShape(rows, module.in_features, module.out_features, inputs[0].requires_grad))

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_hook(note).remove)
        model(**batch)
    return shapes


def fastest_products(shapes: list[LinearShape], device: torch.device) -> tuple[Work, dict[str, int]]:
    """
    A work that computes all products of these calls in float32, each by the path that is fastest for it here, and how many
    take which path.
    """
    generator = torch.Generator().manual_seed(SEED)
    calls: list[tuple[_Path, torch.Tensor, torch.Tensor]] = []
    chosen: collections.Counter[str] = collections.Counter()
    for shape, number in collections.Counter(shapes).items():
        for a, b in shape.factors(generator, device):
            name, path = _fastest(a, b)
            calls += [(path, a, b)] * number
            chosen[name] += number

    def work() -> None:
        for path, a, b in calls:
            path(a, b)

    return work, dict(chosen)


def _paths(device: torch.device) -> dict[str, list[_Path]]:
    """By the name of the implementation. oneDNN may take the two factors in either order."""
    paths: dict[str, list[_Path]] = {"torch": [lambda a, b: torch.mm(a, b.mT)]}
    if device.type == "cpu" and onednn_is_available():
        paths["oneDNN"] = [onednn_product, lambda a, b: onednn_product(b, a).mT]
    return paths


def _fastest(a: torch.Tensor, b: torch.Tensor) -> tuple[str, _Path]:
    """The path, and its implementation, of the shortest call; all are called in turn."""
    candidates = [(name, path) for name, paths in _paths(a.device).items() for path in paths]
    shortest = dict.fromkeys(range(len(candidates)), float("inf"))
    for _ in range(_CALLS):
        for number, (_, path) in enumerate(candidates):
            _wait(a.device)
            started = time.perf_counter()
            path(a, b)
            _wait(a.device)
            shortest[number] = min(shortest[number], time.perf_counter() - started)
    return candidates[min(shortest, key=shortest.__getitem__)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
