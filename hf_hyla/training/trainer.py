"""HylaTrainer: transformers' Trainer with the reference's optimiser groups and learning-rate curve."""

import functools
import math
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback


@dataclass
class HylaTrainingArguments(TrainingArguments):
    """
    transformers' `TrainingArguments` with the reference's settings as defaults (AdamW 0.9 / 0.999 / 1e-8, batch 128, no
    gradient clipping) and one more argument.

    Args:
        eval_samples (`int`, *optional*, defaults to 2048):
            Samples per split for the curve during training. The evaluation at the end uses the paper's number.
    """

    eval_samples: int = 2048

    seed: int = 0
    per_device_train_batch_size: int = 128
    per_device_eval_batch_size: int = 1024
    max_grad_norm: float = 0.0
    # Tasks draw their samples at random; shuffling 20 million indices would cost a gigabyte and change nothing.
    train_sampling_strategy: str = "sequential"
    # Collators of tasks keep what the model reads, and need whole samples.
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = torch.cuda.is_available()
    # The metric of the fuzzy-logic task needs the values shown in the context.
    include_for_metrics: list[str] = field(default_factory=lambda: ["inputs"])
    eval_strategy: str = "steps"
    eval_steps: float | None = 1000
    logging_strategy: str = "steps"
    logging_steps: float = 200
    save_strategy: str = "steps"
    save_steps: float = 1000
    save_total_limit: int | None = 2
    logging_nan_inf_filter: bool = False
    report_to: str | list[str] | None = "none"


def check_schedule(warmup_steps: float, max_steps: int) -> None:
    """
    Raises:
        ValueError: unless warm-up and cosine fit into the run.
    """
    if max_steps <= 2 * warmup_steps:
        raise ValueError(
            f"max_steps must be larger than twice warmup_steps, got {max_steps} and {warmup_steps}: the rate rises for "
            "warmup_steps, and reaches its floor that long before the end."
        )


def reference_schedule(step: int, warmup_steps: int, max_steps: int) -> float:
    """
    Factor of the learning rate in update `step`, counted from 0: linear from 0 to 1 over the warm-up, then a cosine to
    0.1 at `max_steps - warmup_steps`, then 0.1. The first update moves nothing.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (max_steps - 2 * warmup_steps))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


class HylaTrainer(Trainer):
    """
    `Trainer` with the reference's choice of decayed parameters and its learning-rate curve; it stops at a loss that is
    not finite, and notes the seconds spent in every log entry.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._start_clock()

    def _start_clock(self) -> None:
        self._started = time.perf_counter()
        self._seconds_before: float | None = None

    def train(self, *args, **kwargs):
        self._start_clock()
        return super().train(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """
        What the reference decays: every array of its that is not one-dimensional. These are all kernels, embeddings and
        tables, and the biases of queries, keys and values, which it stores as heads x width.
        """
        headwise_bias = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
        return [name for name, p in model.named_parameters() if p.ndim > 1 or name.endswith(headwise_bias)]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            check_schedule(warmup_steps, num_training_steps)
            schedule = functools.partial(reference_schedule, warmup_steps=warmup_steps, max_steps=num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedule)  # type: ignore[arg-type]
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}: look for numbers in the inputs that are "
                "not finite, or lower the learning rate; checkpoints before this step are intact."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._seconds_before is None:
            # After a resume the history is the checkpoint's.
            self._seconds_before = max((entry.get("seconds", 0.0) for entry in self.state.log_history), default=0.0)
        logs["seconds"] = round(self._seconds_before + time.perf_counter() - self._started, 3)
        super().log(logs, start_time)


class RunProgress(ProgressCallback):
    """transformers' progress bar, with one readable line for each log entry, and redrawn seldom where nobody watches."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            seconds = 0.5 if sys.stderr.isatty() else 15.0
            self.training_bar = tqdm(  # type: ignore[assignment]
                total=state.max_steps, initial=state.global_step, mininterval=seconds, unit="step"
            )
        self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.training_bar is None:  # the evaluations of the curve are short and have none of their own
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs or "train_runtime" in logs:
            return
        shown = {name.removeprefix("eval_"): value for name, value in logs.items() if not name.endswith(_NOT_SHOWN)}
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.training_bar.write(f"step {state.global_step:>6}  {numbers}")


_NOT_SHOWN = ("_runtime", "_per_second", "_time", "epoch", "seconds", "grad_norm")
