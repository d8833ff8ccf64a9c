"""Stopping a run that cannot recover: values that are not finite, or a diverging loss."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


# Devices on which reading a value does not wait for a queue of work.
_READ_AT_ONCE = ("cpu",)
# A run is taken to diverge when its mean loss reaches this multiple of the first log entry's.
_DIVERGED = 100
INTACT = "checkpoints before this step are intact"


class Guard(TrainerCallback):
    """
    Stops a run whose loss, gradient, weights or moments are not finite, or whose loss grows a hundredfold.

    On a CPU, loss and gradient are checked in every step, the gradient before the update, so that the weights stay those of the
    step before. On an accelerator they are read at log entries and checkpoints, since reading a value waits for the queue of work.
    """

    def __init__(self):
        # For accelerators: by quantity, the first step whose value was not finite, and that value. It is read in `check`.
        self._at_fault: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._at_fault = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:  # the scaler of its gradients skips such updates itself
            return
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        self.watch("norm of the gradient", norm.full_tensor() if isinstance(norm, DTensor) else norm, state)

    def watch(self, what: str, value: torch.Tensor, state) -> None:
        """Raises if the value is not finite: at once on a CPU, and in the next `check` on an accelerator."""
        step = state.global_step + 1
        if value.device.type in _READ_AT_ONCE:
            if not torch.isfinite(value):
                raise _not_finite(what, value.item(), step)
            return
        found = torch.stack([torch.full_like(value, step), value]).detach()
        known = self._at_fault.get(what, torch.zeros_like(found))
        self._at_fault[what] = torch.where((known[0] > 0) | torch.isfinite(value), known, found)

    def check(self) -> None:
        """
        Raises:
            FloatingPointError: if a watched value was not finite.
        """
        for what, found in self._at_fault.items():
            step, value = found.tolist()
            if step:
                raise _not_finite(what, value, int(step))

    def check_growth(self, loss: float, state) -> None:
        """
        Raises:
            FloatingPointError: if the loss of a log entry is more than a hundred times that of the first. Losses that are
                not positive are not compared, since their ratio means nothing.
        """
        first = next((entry["loss"] for entry in state.log_history if "loss" in entry), loss)
        if loss > _DIVERGED * first > 0:
            raise FloatingPointError(
                f"The loss is {loss:.4g} in step {state.global_step}, more than {_DIVERGED} times the {first:.4g} of the "
                f"first log entry: training diverges, lower the learning rate; {INTACT}."
            )

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Refuses to seal a checkpoint whose weights or moments are not finite."""
        self.check()
        moments = [value for moment in optimizer.state.values() for value in moment.values()]
        tensors = [value for value in (*model.parameters(), *moments) if torch.is_tensor(value)]
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        finite = torch.stack([torch.isfinite(t).all().to(args.device) for t in local]).all()
        if not finite:
            raise FloatingPointError(
                f"After step {state.global_step} a weight or a moment of the optimiser is not finite: lower the "
                f"learning rate; {INTACT}."
            )


def _not_finite(what: str, value: float, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"The {what} is {value} in step {step}: look for inputs that are not finite, or lower the learning "
        f"rate; {INTACT}."
    )
