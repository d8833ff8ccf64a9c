"""CUDA graphs of a training step: one launch instead of one for each kernel."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn


# Calls that are computed as usual before one is recorded: the first ones compile kernels and set up libraries.
WARM_UP_CALLS = 3

Result = TypeVar("Result")


class Recorded:
    """
    Work on a GPU that is computed as usual at first, then recorded as a CUDA graph, and replayed from then on. A replay takes one
    launch, and the launches take most of the time where tensors are small.

    A replay reads and writes the memory of the call that was recorded. So it needs the same tensors, and returns the same ones.
    A call with other tensors is computed as usual.
    """

    def __init__(self):
        self._stream = torch.cuda.Stream()
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._reads: Sequence[torch.Tensor] = ()
        self._result = None

    def __call__(self, work: Callable[[], Result], reads: Sequence[torch.Tensor]) -> Result:
        """
        Args:
            work: launches kernels and returns their results. It must not wait for a value from the GPU, and must do the same in
                every call.
            reads: the tensors that `work` reads and that may be others in the next call.
        """
        same = len(reads) == len(self._reads) and all(a is b for a, b in zip(reads, self._reads, strict=True))
        if self._graph is None and same and self._calls >= WARM_UP_CALLS:
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on meanwhile: that of the data loader reserves pinned memory.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = work()
            self._graph = graph
        if self._graph is not None and same:
            self._graph.replay()
            return self._result  # type: ignore[return-value]
        if self._graph is None:
            self._reads = reads
            self._calls += 1
        return self._as_usual(work)

    def _as_usual(self, work: Callable[[], Result]) -> Result:
        # On the stream that records, since autograd keeps the stream on which it first saw a parameter.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result


class GraphedStep:
    """
    Forward and backward pass of a training step, recorded as a CUDA graph. Batches of other shapes than the first, such as the
    last one of an epoch, are computed as usual.

    Args:
        step: adds the gradients of a model for a batch and the number of its labels to those that there are, and returns the
            loss.
    """

    def __init__(self, step: Callable[[nn.Module, dict[str, torch.Tensor], torch.Tensor | None], torch.Tensor]):
        self._step = step
        self._recorded = Recorded()
        self._inputs: dict[str, torch.Tensor] = {}

    def __call__(
        self, model: nn.Module, batch: dict[str, torch.Tensor], num_items: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss. The gradients are those of this batch alone, in tensors that the next call overwrites."""
        given = batch if num_items is None else batch | {_NUM_ITEMS: torch.as_tensor(num_items)}
        device = next(model.parameters()).device
        if not self._inputs:
            self._inputs = {name: torch.empty_like(tensor, device=device) for name, tensor in given.items()}
        if _form(given) != _form(self._inputs):
            return self._step(model, batch, num_items)
        for name, tensor in self._inputs.items():
            tensor.copy_(given[name], non_blocking=True)
        loss, gradients = self._recorded(lambda: self._loss_and_gradients(model), list(self._inputs.values()))
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return loss.clone()

    def _loss_and_gradients(self, model: nn.Module):
        model.zero_grad(set_to_none=True)
        batch = {name: tensor for name, tensor in self._inputs.items() if name != _NUM_ITEMS}
        loss = self._step(model, batch, self._inputs.get(_NUM_ITEMS))
        return loss, [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]


_NUM_ITEMS = "num_items_in_batch"


def _form(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
