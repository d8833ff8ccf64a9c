"""The progress bar of a run."""

import sys

from tqdm import tqdm
from transformers.trainer_callback import ProgressCallback


# The progress bar leaves out names that end like this.
_NOT_SHOWN = ("_runtime", "_per_second", "_time", "epoch", "seconds", "grad_norm")


class RunProgress(ProgressCallback):
    """transformers' progress bar with one readable line per log entry. It is redrawn rarely if the output is not a terminal."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            seconds = 0.5 if sys.stderr.isatty() else 15.0
            self.training_bar = tqdm(  # type: ignore[assignment]
                total=state.max_steps, initial=state.global_step, mininterval=seconds, unit="step"
            )
        self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.training_bar is None:  # evaluations of the curve are short and have no bar
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs or "train_runtime" in logs:
            return
        shown = {name.removeprefix("eval_"): value for name, value in logs.items() if not name.endswith(_NOT_SHOWN)}
        entry = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.training_bar.write(f"step {state.global_step:>6}  {entry}")
