"""Stopping a run early, by a signal or a time limit, at the end of a step and with a checkpoint saved."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from time import monotonic

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback


# Several processes ask each other whether to stop only every so many steps, since all of them wait for the answer.
_STEPS_PER_QUESTION = 10
# Reasons to stop, in the words of the message, with their exit codes. A later one takes precedence.
_OUT_OF_TIME = "at --max-minutes"
_REASONS = {_OUT_OF_TIME: 0, "by SIGHUP": 129, "by SIGINT": 130, "by SIGTERM": 143}


class Stopped(Exception):
    """Raised when a run was stopped before its end. The same command resumes it."""

    def __init__(self, reason: str, step: int, max_steps: int):
        share = f"{step / max_steps:.0%}"
        super().__init__(
            f"Stopped {reason} after step {step:,} of {max_steps:,} ({share}), whose checkpoint is saved: the same command "
            "resumes from there."
        )
        self.exit_code = _REASONS[reason]


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP where the system has it and it is not ignored, as under nohup."""
    hangs_up = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGHUP] if hangs_up else [signal.SIGTERM]


class StopRequests(TrainerCallback):
    """
    Saves and stops at the end of a step when the process was sent one of `stop_signals` or SIGINT, which is Ctrl-C, or when
    `max_minutes` would pass before the next step ends. A second Ctrl-C interrupts at once. transformers' own callback for
    SIGTERM saves in the middle of a step, from where a run does not resume exactly.
    """

    def __init__(self, max_minutes: float | None = None):
        self.reason: str | None = None
        self._signalled: str | None = None  # separate from `reason`, so that a signal cannot be lost in a race
        self.step = self.max_steps = 0
        self._in_training = True
        self._deadline = float("inf") if max_minutes is None else monotonic() + 60 * max_minutes
        self._last = monotonic()
        self._longest = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turns signals into requests within the block. Python lets only the main thread handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        # Whoever handles or ignores Ctrl-C already, such as a shell for what it starts in the background, continues to do so.
        interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        numbers = stop_signals() + [signal.SIGINT] * interrupts
        before = {number: signal.signal(number, self._requested) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _requested(self, number, frame) -> None:
        again, self._signalled = self._signalled, f"by {signal.Signals(number).name}"
        if number == signal.SIGINT:
            if again:
                raise KeyboardInterrupt
            if self._in_training:
                os.write(2, b"\nSaves after this step and stops; Ctrl-C again stops at once.\n")
        if self._signalled == "by SIGHUP":
            # Messages on the way to the end would fail, since the terminal is gone.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in self._terminals:
                os.dup2(nowhere, stream)
        if not self._in_training:
            raise Stopped(self._signalled, self.step, self.max_steps)

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now = monotonic()
        # Evaluations and checkpoints count as part of the step before them.
        self._longest, self._last = max(self._longest, now - self._last), now
        # What follows training may be stopped or fail, so the last step is saved even if `save_strategy` is "no".
        control.should_save |= state.global_step >= state.max_steps
        processes = PartialState()
        steps = 1 if processes.num_processes == 1 else _STEPS_PER_QUESTION
        if state.global_step % steps:
            return
        out_of_time = now + (steps + 1) * self._longest > self._deadline
        wish = self._signalled or (_OUT_OF_TIME if out_of_time else None)
        self.reason = wish if processes.num_processes == 1 else self._agreed(wish, processes)
        if self.reason and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._in_training:  # evaluations of the curve count as part of the step before them
            return
        out_of_time = _OUT_OF_TIME if monotonic() > self._deadline else None
        processes = PartialState()
        if processes.num_processes > 1:
            out_of_time = self._agreed(out_of_time, processes)
        if out_of_time:
            raise Stopped(out_of_time, self.step, self.max_steps)

    def _agreed(self, wish: str | None, processes: PartialState) -> str | None:
        """The strongest request among the processes, which all then follow at the same step."""
        wishes = (None, *_REASONS)
        strongest = reduce(torch.tensor(wishes.index(wish), device=processes.device), reduction="max")
        return wishes[int(strongest)]

    def check(self, state) -> None:
        """
        Call this after training, whose last checkpoint is saved. From here on, signals and the time limit stop the run at once.

        Raises:
            Stopped: if training was stopped before its end.
        """
        self.step, self.max_steps = state.global_step, state.max_steps
        self._in_training = False
        reason = self.reason if self.step < self.max_steps else self._signalled
        if reason:
            raise Stopped(reason, self.step, self.max_steps)
