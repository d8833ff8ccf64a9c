"""CUDA graphs of a training step: one launch instead of one for each kernel."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..utils import one_line


# Calls that are computed as usual before one is recorded: the first ones compile kernels and set up libraries.
WARM_UP_CALLS = 3
_NUM_ITEMS = "num_items_in_batch"

Result = TypeVar("Result")


def refuse_balancing_loss(config: PreTrainedConfig | None) -> None:
    """
    Raises:
        ValueError: if the loss of a model with this config cannot be recorded.
    """
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "cuda_graphs cannot record the load-balancing loss of a mixture of experts, for which transformers copies a tensor "
            "from the CPU: leave cuda_graphs out, or set the model's output_router_logits to false."
        )


class Recorded:
    """
    Work on a GPU that is computed as usual at first, then recorded as a CUDA graph, and replayed from then on. A replay takes one
    launch, and the launches take most of the time where tensors are small.

    A replay reads and writes the memory of the call that was recorded, and returns the same tensors. A call whose tensors lie
    elsewhere is computed as usual. If the tensors of the next calls stay there, it is recorded anew, in place of the earlier one.
    """

    def __init__(self):
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None
        self._places_recorded: list[int] = []
        self._places: list[int] = []
        self._calls = 0  # in a row, with the tensors in these places

    def __call__(self, work: Callable[[], Result], tensors: Iterable[torch.Tensor]) -> Result:
        """
        Args:
            work: launches kernels and returns their results. It must not wait for a value from the GPU, and must do the same in
                every call.
            tensors: what `work` reads or writes and does not make itself.

        Raises:
            RuntimeError: if `work` cannot be recorded.
        """
        places = [tensor.data_ptr() for tensor in tensors]
        if self._graph is None or places != self._places_recorded:
            self._calls = self._calls + 1 if places == self._places else 1
            self._places = places
            if self._calls <= WARM_UP_CALLS:
                return self._as_usual(work)
            self._record(work)
        self._graph.replay()  # type: ignore[union-attr]
        return self._result

    def _record(self, work: Callable[[], Any]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on meanwhile: that of the data loader reserves pinned memory.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"A training step could not be recorded as a CUDA graph ({one_line(error).rstrip('.')}), probably since it waits "
                "for a value from the GPU: leave cuda_graphs out."
            ) from error
        self._graph, self._places_recorded = graph, self._places

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
        step: computes the loss of a model for a batch and the number of its labels, adds its gradients to those of the
            parameters, and returns it.
    """

    def __init__(self, step: Callable[[nn.Module, dict[str, torch.Tensor], torch.Tensor | None], torch.Tensor]):
        self._step = step
        self._recorded = Recorded()
        self._inputs: dict[str, torch.Tensor] = {}

    def __call__(
        self, model: nn.Module, batch: dict[str, torch.Tensor], num_items: torch.Tensor | None
    ) -> torch.Tensor:
        """
        The loss. The gradients are those of this batch alone, in tensors that the next call overwrites.

        Raises:
            ValueError: if the batch holds anything but tensors.
            RuntimeError: if the step cannot be recorded.
        """
        given = {**batch} if num_items is None else {**batch, _NUM_ITEMS: torch.as_tensor(num_items)}
        if others := [name for name, value in given.items() if not torch.is_tensor(value)]:
            raise ValueError(
                f"cuda_graphs needs batches of tensors, but {others[0]} is of type {type(given[others[0]]).__name__}: leave "
                "cuda_graphs out, or have the collator leave that column out."
            )
        parameters = list(model.parameters())
        if not self._inputs:
            self._inputs = {
                name: torch.empty_like(value, device=parameters[0].device) for name, value in given.items()
            }
        if _shapes_and_dtypes(given) != _shapes_and_dtypes(self._inputs):
            return self._step(model, batch, num_items)
        for name, tensor in self._inputs.items():
            tensor.copy_(given[name], non_blocking=True)
        tensors = (*self._inputs.values(), *parameters)
        loss, gradients = self._recorded(lambda: self._loss_and_gradients(model), tensors)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return loss.clone()

    def _loss_and_gradients(self, model: nn.Module):
        model.zero_grad(set_to_none=True)
        batch = {name: tensor for name, tensor in self._inputs.items() if name != _NUM_ITEMS}
        loss = self._step(model, batch, self._inputs.get(_NUM_ITEMS))
        return loss, [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]


def _shapes_and_dtypes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
