"""What a checkpoint holds besides transformers' files, for an exact resume, and when a checkpoint counts as whole."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils import one_line, writing_advice
from .checkpoint import seal
from .guard import INTACT


class ResumeState(TrainerCallback):
    """
    Adds to every checkpoint what transformers leaves out, and seals the checkpoint when all of its files are written. It adds

    - the sum of the losses since the last log entry, which makes the curve independent of interruptions;
    - the seconds of training;
    - the random state that attention dropout is drawn from, which is the same on every process.

    Attributes:
        resume_from (`Path`, *optional*): the checkpoint that training resumes from.
        writing (`Path`, *optional*): the checkpoint that is being written.
    """

    def __init__(self):
        self.resume_from: Path | None = None
        self._begin()

    def _begin(self) -> None:
        self.writing: Path | None = None
        self._started = time.perf_counter()
        self._seconds_before = 0.0
        self._loss: torch.Tensor | None = None
        self._last_logged = 0
        self._carried = False
        self._random: torch.Tensor | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin()
        # After a resume the history is the checkpoint's.
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._last_logged = state.global_step
        found = resume_states(self.resume_from) if self.resume_from else []
        if not found:  # a fresh start, or a checkpoint of another Trainer
            return
        if len(found) == args.world_size:
            own = found[args.process_index]
        else:
            # What is logged is the mean over processes.
            own = found[0] | {"loss": torch.stack([state["loss"] for state in found]).mean()}
            self._random = own["random"]
        self._loss, self._last_logged = own["loss"].to(args.device), own["last_logged"]
        self._seconds_before, self._carried = own["seconds"], True

    def on_step_begin(self, args, state, control, **kwargs):
        if self._random is not None:  # after transformers has restored what it can
            torch.random.set_rng_state(self._random)
            self._random = None

    @property
    def seconds(self) -> float:
        """Seconds of training, including those before interruptions."""
        return self._seconds_before + time.perf_counter() - self._started

    def add(self, loss: torch.Tensor, skip_not_finite: bool, state) -> None:
        """Adds the loss of a batch. Like transformers, it can count a loss that is not finite as the mean so far."""
        so_far = torch.zeros((), device=loss.device) if self._loss is None else self._loss
        if skip_not_finite:
            loss = torch.where(torch.isfinite(loss), loss, so_far / (1 + state.global_step - self._last_logged))
        self._loss = so_far + loss

    def logged(self, loss: float, state) -> float:
        """
        The loss of a log entry. It is transformers' own, except that the first entry after a resume includes the steps since
        the last entry before it.
        """
        if self._carried and self._loss is not None:
            loss = gather(self._loss[None]).mean().item() / (state.global_step - self._last_logged)
        self._loss, self._last_logged, self._carried = None, state.global_step, False
        return loss

    def on_save(self, args, state, control, **kwargs):
        if self.writing is None:
            return
        if not args.save_only_model:
            # Each process writes its own, beside its random state.
            resume_state = {
                "loss": torch.zeros(()) if self._loss is None else self._loss.cpu(),
                "last_logged": self._last_logged,
                "seconds": self.seconds,
                "random": torch.random.get_rng_state(),
                "threads": torch.get_num_threads(),
            }
            torch.save(resume_state, self.writing / f"resume_state_{args.process_index:03}.pt")
        processes = PartialState()
        processes.wait_for_everyone()
        if args.should_save:
            seal(self.writing)
        self.writing = None
        processes.wait_for_everyone()

    def remove_unsealed(self, error: Exception, args, state) -> None:
        """
        After an error, removes the checkpoint that was being written.

        Raises:
            OSError: if it was the writing that failed.
        """
        checkpoint, self.writing = self.writing, None
        if checkpoint is None or checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}":
            return
        if args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)
        # torch raises a RuntimeError that names one of its C++ files where it cannot write.
        from_torch = isinstance(error, RuntimeError) and (
            "inline_container" in str(error) or "StreamWriter" in str(error)
        )
        if from_torch or isinstance(error, (OSError, SafetensorError)):
            raise OSError(
                f"The checkpoint of step {state.global_step} could not be written ({one_line(error).rstrip('.')}): "
                f"{writing_advice(error)}, or choose another --output; {INTACT}."
            ) from error


def resume_states(checkpoint: Path) -> list[dict[str, Any]]:
    """The resume states of the processes that wrote a checkpoint, in order of their index."""
    return [
        torch.load(path, weights_only=True, map_location="cpu")
        for path in sorted(checkpoint.glob("resume_state_*.pt"))
    ]
