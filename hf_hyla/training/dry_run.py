"""What a recipe would do: its settings, and what a few of its steps take. Writes nothing."""

import statistics
import sys
import tempfile
import time
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .recipe import Recipe
from .run import check_before_start, training_data
from .trainer import HylaTrainer
from .weights import initial_model


# The first steps are slower: they warm caches up and take memory.
_WARM_UP_STEPS = 2
_MEASURED_STEPS = 8
_MEASURED_BATCHES = 4


def dry_run(recipe: Recipe) -> str:
    """
    The resolved recipe, parameters, steps, samples, estimated minutes and peak memory, as text.

    Raises:
        ValueError, OSError: if `train` would refuse the recipe for every output folder.
    """
    check_before_start(recipe)
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        # A step that accumulates many batches would take too long: a few are measured, and the time is scaled up.
        accumulated = recipe.trainer.get("gradient_accumulation_steps", 1)
        measured = min(accumulated, _MEASURED_BATCHES)
        quiet["gradient_accumulation_steps"] = measured
        args = recipe.training_arguments(folder, PartialState().num_processes, **quiet)
        set_seed(args.seed)
        model = initial_model(recipe.settings["model"], recipe.config, recipe.task.auto_class)
        watch = _StopWatch()
        trainer = HylaTrainer(
            model=model,
            args=args,
            train_dataset=training_data(recipe),
            data_collator=recipe.task.collate,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    num_samples = recipe.num_training_samples
    seconds = statistics.median(watch.seconds[_WARM_UP_STEPS:] or watch.seconds) * accumulated / measured
    return (
        f"{yaml.safe_dump(recipe.settings, sort_keys=False, allow_unicode=True)}\n"
        f"parameters           {model.num_parameters():,}\n"
        f"steps                {args.max_steps:,} of {num_samples // args.max_steps:,} samples\n"
        f"training samples     {num_samples:,}\n"
        f"estimated time       {args.max_steps * seconds / 60:.1f} minutes at {1000 * seconds:.1f} ms a step, evaluations "
        f"not counted\n"
        f"peak memory          {_peak_memory(args.device) / 2**20:,.0f} MiB on {args.device.type}, in {len(watch.seconds)} "
        "steps"
    )


class _StopWatch(TrainerCallback):
    """Times the steps, and stops after the last one that is measured."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._started)
        if len(self.seconds) == _WARM_UP_STEPS + _MEASURED_STEPS:
            control.should_training_stop = True


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator's tensors, or on a CPU of this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
