"""Stopping at numbers from which a run does not come back."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


# Devices whose numbers are there as soon as they are asked for.
_READ_AT_ONCE = ("cpu",)
# A run whose mean loss grows to this many times that of its beginning will not come back.
_DIVERGED = 100
INTACT = "checkpoints before this step are intact"


class Guard(TrainerCallback):
    """
    Stops a run whose loss, gradient, weights or moments are not finite, or whose loss grows a hundredfold. The gradient is
    looked at before the update, so that weights stay those of the step before.
    """

    def __init__(self):
        # On an accelerator, where looking at a number waits for it: the first step at fault, and the number.
        self._at_fault: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._at_fault = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:  # the scaler of its gradients skips such updates itself
            return
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        self.watch("norm of the gradient", norm.full_tensor() if isinstance(norm, DTensor) else norm, state)

    def watch(self, what: str, number: torch.Tensor, state) -> None:
        """Stops at a number that is not finite: at once where looking costs nothing, elsewhere when `check` is called."""
        step = state.global_step + 1
        if number.device.type in _READ_AT_ONCE:
            if not torch.isfinite(number):
                raise _not_finite(what, number.item(), step)
            return
        found = torch.stack([torch.full_like(number, step), number]).detach()
        known = self._at_fault.get(what, torch.zeros_like(found))
        self._at_fault[what] = torch.where((known[0] > 0) | torch.isfinite(number), known, found)

    def check(self) -> None:
        """
        Raises:
            FloatingPointError: if a number that was watched was not finite.
        """
        for what, found in self._at_fault.items():
            step, number = found.tolist()
            if step:
                raise _not_finite(what, number, int(step))

    def check_growth(self, loss: float, state) -> None:
        """
        Raises:
            FloatingPointError: if the loss of a log entry is a hundred times that of the first. Only a positive loss grows
                so: others say nothing by their ratio.
        """
        first = next((entry["loss"] for entry in state.log_history if "loss" in entry), loss)
        if loss > _DIVERGED * first > 0:
            raise FloatingPointError(
                f"The loss is {loss:.4g} in step {state.global_step}, more than {_DIVERGED} times the {first:.4g} of the "
                f"first log entry: training diverges, lower the learning rate; {INTACT}."
            )

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Weights and moments that are not finite are in no whole checkpoint, whatever the loss has been."""
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


def _not_finite(what: str, number: float, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"The {what} is {number} in step {step}: look for numbers in the inputs that are not finite, or lower the learning "
        f"rate; {INTACT}."
    )
