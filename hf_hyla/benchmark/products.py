"""The matrix products of a training step alone, by the machine's fastest path: the minimum of the step's time."""

import collections
import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..model.functions_cpu_hyla import onednn_is_available, onednn_product
from ..model.layers_hyla import HylaMoE
from .meter import SEED, Workload, seconds_of


# Calls of each path of a product. The fastest one counts.
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
        Factors (a, b) of the products a · bᵀ, with the strides they have in a step: x · Wᵀ of the forward, gᵀ · x of the
        weight's gradient, and g · W of the input's gradient.
        """
        x, weight, gradient = (
            torch.randn(*size, generator=generator).to(device)
            for size in ((self.rows, self.inputs), (self.outputs, self.inputs), (self.rows, self.outputs))
        )
        products = [(x, weight), (gradient.mT, x.mT), (gradient, weight.mT)]
        return products if self.input_gradient else products[:2]


def linear_shapes(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[LinearShape]:
    """
    The shape of every call of a linear layer that the model makes for the batch. Calls are counted, not layers: a last layer
    that computes only some tokens counts only those. The experts of a mixture are two wide layers. Products between tokens,
    inside attention, are not included.
    """
    shapes = []

    def note(module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        rows = inputs[0].numel() // module.in_features
        shapes.append(LinearShape(rows, module.in_features, module.out_features, inputs[0].requires_grad))

    def note_experts(module: HylaMoE, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        experts, width, hidden_size = module.up_proj.shape
        rows = inputs[0].numel() // hidden_size
        shapes.append(LinearShape(rows, hidden_size, experts * width, inputs[0].requires_grad))
        shapes.append(LinearShape(rows, experts * width, hidden_size, True))

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_hook(note).remove)
            elif isinstance(module, HylaMoE):
                hooks.callback(module.register_forward_hook(note_experts).remove)
        model(**batch)
    return shapes


def size_of_linear_layers(model: nn.Module) -> int:
    """The number of weights of the model's linear layers, without biases."""
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    experts = (module for module in model.modules() if isinstance(module, HylaMoE))
    return linear + sum(module.up_proj.numel() + module.down_proj.numel() for module in experts)


def fastest_products(shapes: list[LinearShape], device: torch.device) -> tuple[Workload, dict[str, int]]:
    """
    A workload that computes all products of these calls in float32, each by its fastest path on this machine, and the number
    of products by the name of their path.
    """
    generator = torch.Generator().manual_seed(SEED)
    calls: list[tuple[_Path, torch.Tensor, torch.Tensor]] = []
    chosen: collections.Counter[str] = collections.Counter()
    for shape, count in collections.Counter(shapes).items():
        for a, b in shape.factors(generator, device):
            name, path = _fastest(a, b)
            calls += [(path, a, b)] * count
            chosen[name] += count

    def workload() -> None:
        for path, a, b in calls:
            path(a, b)

    return workload, dict(chosen)


def _paths(device: torch.device) -> dict[str, list[_Path]]:
    """The paths by the name of their implementation. oneDNN may take the two factors in either order."""
    paths: dict[str, list[_Path]] = {"torch": [lambda a, b: torch.mm(a, b.mT)]}
    if device.type == "cpu" and onednn_is_available():
        paths["oneDNN"] = [onednn_product, lambda a, b: onednn_product(b, a).mT]
    return paths


def _fastest(a: torch.Tensor, b: torch.Tensor) -> tuple[str, _Path]:
    """The name of the fastest implementation, and its path. All are called in turn, and the shortest call of each counts."""
    candidates = [(name, path) for name, paths in _paths(a.device).items() for path in paths]
    shortest = dict.fromkeys(range(len(candidates)), float("inf"))
    for _ in range(_CALLS):
        for index, (_, path) in enumerate(candidates):
            shortest[index] = min(shortest[index], seconds_of(partial(path, a, b), a.device))
    return candidates[min(shortest, key=shortest.__getitem__)]
