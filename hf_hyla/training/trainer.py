"""HylaTrainer: transformers' Trainer with the reference's optimiser groups and learning-rate curve."""

import functools
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from ..utils import one_line
from .arguments import MUON, REFERENCE_FLOOR
from .checkpoint import UNFINISHED, publish
from .optimizers import muon_adamw, refuse_shards
from .processes import keep_freed_memory


# Devices whose numbers are there as soon as they are asked for.
_READ_AT_ONCE = ("cpu",)
# A run whose mean loss grows to this many times that of its beginning will not come back.
_DIVERGED = 100
_INTACT = "checkpoints before this step are intact"
# Of a log entry, what the progress bar leaves out.
_NOT_SHOWN = ("_runtime", "_per_second", "_time", "epoch", "seconds", "grad_norm")


def check_schedule(warmup_steps: float, max_steps: int) -> None:
    """
    Raises:
        ValueError: unless warm-up and cosine fit into the run.
    """
    if max_steps <= 2 * warmup_steps:
        raise ValueError(
            f"max_steps must be larger than twice warmup_steps, got {max_steps} and {warmup_steps:g}: the learning rate rises "
            f"for warmup_steps, and reaches its floor that long before the end. Set warmup_steps to {max(0, max_steps - 1) // 2} "
            f"or less, or max_steps to {2 * warmup_steps + 1:g} or more; `hyla train RECIPE --quick` fits both."
        )


def reference_schedule(step: int, warmup_steps: int, max_steps: int, floor: float = REFERENCE_FLOOR) -> float:
    """
    Factor of the learning rate in update `step`, counted from 0: linear from 0 to 1 over the warm-up, then a cosine to
    `floor` at `max_steps - warmup_steps`, then `floor`. The first update moves nothing.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (max_steps - 2 * warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class HylaTrainer(Trainer):
    """
    `Trainer` with the reference's choice of decayed parameters and its learning-rate curve. It stops at numbers that are
    not finite, notes the seconds spent in every log entry, and its checkpoints are whole or not there and hold all that
    an exact continuation needs. It publishes nothing: what follows a finished run reads its folder. On a CPU its process
    keeps freed memory, see `keep_freed_memory`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_shards(self._takes_muon() and (self.is_fsdp_enabled or self.is_deepspeed_enabled))
        if self.args.device.type == "cpu":
            keep_freed_memory()
        self._writing_aside = False
        self._start_clock()

    def _start_clock(self) -> None:
        self._started = time.perf_counter()
        self._seconds_before: float | None = None
        # On an accelerator, where looking at a number waits for it: the first step at fault, and the number.
        self._at_fault: dict[str, torch.Tensor] = {}

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

    def _takes_muon(self) -> bool:
        # An optimiser that was handed over, or its class, goes before `optim`.
        return self.args.optim == MUON and self.optimizer is None and self.optimizer_cls_and_kwargs is None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self._takes_muon():
            of_model: nn.Module = self.model if model is None else model  # type: ignore[assignment]
            decayed = self.get_decay_parameter_names(of_model)
            self.optimizer = muon_adamw(of_model, self.args, decayed)  # type: ignore[arg-type]
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            check_schedule(warmup_steps, num_training_steps)
            schedule = functools.partial(
                reference_schedule,
                warmup_steps=warmup_steps,
                max_steps=num_training_steps,
                # transformers' own arguments, which serve too, have none.
                floor=getattr(self.args, "schedule_floor", REFERENCE_FLOOR),
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedule)  # type: ignore[arg-type]
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch("loss", loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        # Called in every step, before the update: weights are still those of the step before.
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # which skips such updates itself
            self._watch("norm of the gradient", torch.as_tensor(norm))
        return norm

    def _watch(self, what: str, number: torch.Tensor) -> None:
        step = self.state.global_step + 1
        if number.device.type in _READ_AT_ONCE:
            if not torch.isfinite(number):
                raise _not_finite(what, number.item(), step)
            return
        found = torch.stack([torch.full_like(number, step), number]).detach()
        known = self._at_fault.get(what, torch.zeros_like(found))
        self._at_fault[what] = torch.where((known[0] > 0) | torch.isfinite(number), known, found)

    def _check_watched(self) -> None:
        for what, found in self._at_fault.items():
            step, number = found.tolist()
            if step:
                raise _not_finite(what, number, int(step))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_watched()
        if "loss" in logs:
            first = next((entry["loss"] for entry in self.state.log_history if "loss" in entry), logs["loss"])
            if logs["loss"] > _DIVERGED * first:
                raise FloatingPointError(
                    f"The loss is {logs['loss']:.4g} in step {self.state.global_step}, more than {_DIVERGED} times the "
                    f"{first:.4g} of the first log entry: training diverges, lower the learning rate; {_INTACT}."
                )
        logs["seconds"] = round(self._seconds(), 3)
        super().log(logs, start_time)

    def _seconds(self) -> float:
        if self._seconds_before is None:
            # After a resume the history is the checkpoint's.
            self._seconds_before = max((entry.get("seconds", 0.0) for entry in self.state.log_history), default=0.0)
        return self._seconds_before + time.perf_counter() - self._started

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        # The Trainer's loss is a mean over batches, of which the last may be shorter or, with several processes, hold
        # samples twice.
        if output.label_ids is not None and output.metrics is not None:
            model = self.accelerator.unwrap_model(self.model)
            logits, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = model._loss(
                logits, labels, None
            ).item()
        return output

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writing_aside else folder

    def _save_checkpoint(self, model, trial) -> None:
        self._check_watched()
        self._check_state(model)
        folder = Path(self._get_output_dir(trial))
        aside = folder / UNFINISHED
        try:
            self._writing_aside = True
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                name = f"checkpoint-{self.state.global_step}"
                publish(aside / name, folder / name)
                aside.rmdir()
                rotate_checkpoints(str(folder), self.args.save_total_limit)
        except Exception as error:  # the libraries that write raise what they like when a disk is full
            shutil.rmtree(aside, ignore_errors=True)
            reason = one_line(error).rstrip(".")
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written ({reason}): free some space or "
                f"choose another --output; {_INTACT}."
            ) from error
        finally:
            self._writing_aside = False
        self.accelerator.wait_for_everyone()

    def _check_state(self, model: nn.Module) -> None:
        """Weights and moments that are not finite are never saved, whatever the loss has been."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]  # type: ignore[union-attr]
        tensors = [value for value in (*model.parameters(), *moments) if torch.is_tensor(value)]
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        finite = torch.stack([torch.isfinite(t).all().to(self.args.device) for t in local]).all()
        if not finite:
            raise FloatingPointError(
                f"After step {self.state.global_step} a weight or a moment of the optimiser is not finite: lower the "
                f"learning rate; {_INTACT}."
            )

    def _save_rng_state(self, output_dir: str) -> None:
        # Each process writes this, beside its random state: the losses since the last log entry, which the Trainer
        # forgets; and the state that attention dropout is drawn from, which is the same on every process.
        super()._save_rng_state(output_dir)
        sitting = {
            "loss": self._tr_loss.cpu(),
            "last_logged": self._globalstep_last_logged,
            "seconds": self._seconds(),
            "random": torch.random.get_rng_state(),
        }
        torch.save(sitting, os.path.join(output_dir, f"sitting_{self.args.process_index}.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.args.device.type != "cpu" or self.args.world_size == 1:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # transformers before 5.23 asks for the device cpu:0 here, which torch cannot load onto.
        for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            state = torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True)
            part.load_state_dict(state)  # type: ignore[union-attr]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        paths = sorted(Path(checkpoint or "").glob("sitting_*.pt"))
        sittings = [torch.load(path, weights_only=True, map_location="cpu") for path in paths]
        if not sittings:  # a checkpoint of another Trainer
            return
        if len(sittings) == self.args.world_size:
            own = sittings[paths.index(Path(checkpoint or "") / f"sitting_{self.args.process_index}.pt")]
        else:
            own = sittings[0]
            # What is logged is the mean over processes.
            own["loss"] = torch.stack([sitting["loss"] for sitting in sittings]).mean()
            torch.random.set_rng_state(own["random"])
        self._tr_loss.copy_(own["loss"])
        self._globalstep_last_logged = own["last_logged"]
        self._seconds_before = own["seconds"]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Refuses `push_to_hub` among the arguments, as `push_to_hub` refuses itself."""
        self.push_to_hub()

    def push_to_hub(self, *args, **kwargs) -> str:  # type: ignore[override]
        """
        Raises:
            ValueError: always. transformers would upload checkpoints, which hold pickles, and weights without results.
        """
        raise ValueError(
            "A HylaTrainer publishes nothing, since transformers would upload pickles beside weights that have no results: "
            "train a recipe by `hyla train`, and publish the finished run by `hyla publish` or by `push_to_hub` in the recipe."
        )

    def create_model_card(self, *args, **kwargs) -> None:
        """
        Raises:
            ValueError: always. A card is made from the record of a finished run.
        """
        raise ValueError("A card is made from the record of a finished run: call `hyla card` with the run's folder.")


def _not_finite(what: str, number: float, step: int) -> FloatingPointError:
    return FloatingPointError(
        f"The {what} is {number} in step {step}: look for numbers in the inputs that are not finite, or lower the learning "
        f"rate; {_INTACT}."
    )


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
