"""A run, top to bottom: recipe → data → model → training → evaluation → run.json."""

import inspect
import shutil
import tempfile
from pathlib import Path

import numpy as np
import yaml
from accelerate import PartialState
from transformers import EvalPrediction, set_seed
from transformers.trainer_callback import ProgressCallback

from ..model import HylaForSequenceClassification
from ..tasks import Task
from .recipe import Recipe
from .record import RECORD_NAME, RunRecord, environment, hardware
from .trainer import HylaTrainer, HylaTrainingArguments, RunProgress


RECIPE_NAME = "resolved_recipe.yaml"
CHECKPOINTS = "checkpoints"


def train(recipe: Recipe, output: Path, overwrite: bool = False) -> RunRecord:
    """
    Trains the recipe's model, evaluates every split but the one it trained on, and writes weights, code, recipe and
    run.json into `output`.

    A run that was interrupted goes on from its last whole checkpoint, under `output/checkpoints`.

    Raises:
        FileExistsError: if `output` holds a finished run, or one of another recipe, and `overwrite` is not set.
        ValueError, OSError: if something cannot be used or written.
        FloatingPointError: if the loss is not finite.
    """
    task = recipe.task
    args = HylaTrainingArguments(output_dir=str(output / CHECKPOINTS), **recipe.trainer)
    processes = PartialState()
    with processes.main_process_first():
        resume_from = _prepare_folder(recipe, output, overwrite and processes.is_main_process)

    set_seed(args.seed)
    model = HylaForSequenceClassification(recipe.config)
    evaluated = [split for split in task.splits if split != "train"]
    trainer = HylaTrainer(
        model=model,
        args=args,
        train_dataset=task.dataset("train", num_samples=_training_samples(args)),
        eval_dataset={split: task.dataset(split, args.eval_samples) for split in evaluated},
        data_collator=task.collate,
        compute_metrics=_metrics_of(task),
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RunProgress)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    metrics = {split: _evaluate_split(trainer, task, split) for split in evaluated}
    curve = _curve(trainer.state.log_history, evaluated)
    record = RunRecord(
        name=recipe.name,
        recipe=recipe.settings,
        seeds={"task": task.seed, "trainer": args.seed},
        num_parameters=model.num_parameters(),
        steps=trainer.state.global_step,
        samples_seen=_training_samples(args),
        seconds=max((entry["seconds"] for entry in curve), default=0.0),
        metrics=metrics,
        curve=curve,
        environment=environment(),
        hardware=hardware(),
    )
    if trainer.is_world_process_zero():
        model.save_pretrained(output)
        record.save(output)
    return record


def evaluate(
    model: HylaForSequenceClassification,
    task: Task,
    split: str,
    num_samples: int | None = None,
    batch_size: int = 1024,
) -> dict[str, float]:
    """
    Scores of a model on a split, of the paper's length where `num_samples` is `None`.

    Raises:
        ValueError: if model and task do not fit.
    """
    task.check_model(model.config)
    with tempfile.TemporaryDirectory() as folder:
        args = HylaTrainingArguments(output_dir=folder, per_device_eval_batch_size=batch_size, eval_strategy="no")
        trainer = HylaTrainer(model=model, args=args, data_collator=task.collate, compute_metrics=_metrics_of(task))
        return _evaluate_split(trainer, task, split, num_samples)


def _prepare_folder(recipe: Recipe, output: Path, overwrite: bool) -> Path | None:
    """Makes the folder and writes the recipe into it; the checkpoint to go on from, if there is one."""
    written = output / RECIPE_NAME
    if output.exists() and not written.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty and holds no run: choose another --output.")
    if overwrite:
        _remove_run(output)
    elif written.exists() and yaml.safe_load(written.read_text()) != recipe.settings:
        raise FileExistsError(f"{output} holds a run of another recipe: choose another --output, or pass --overwrite.")
    elif (output / RECORD_NAME).exists():
        raise FileExistsError(f"{output} holds a finished run: choose another --output, or pass --overwrite.")
    output.mkdir(parents=True, exist_ok=True)
    written.write_text(yaml.safe_dump(recipe.settings, sort_keys=False))

    # The Trainer writes its state last: without it a checkpoint is not whole.
    whole = [state.parent for state in (output / CHECKPOINTS).glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _remove_run(output: Path) -> None:
    """Removes what a run writes, and nothing else."""
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    code = [path.name for path in Path(inspect.getfile(HylaForSequenceClassification)).parent.glob("*_hyla.py")]
    for name in (RECORD_NAME, "config.json", "model.safetensors", *code, RECIPE_NAME):
        (output / name).unlink(missing_ok=True)


def _training_samples(args: HylaTrainingArguments) -> int:
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _metrics_of(task: Task):
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return task.metrics(*map(np.asarray, (prediction.predictions, prediction.label_ids, prediction.inputs)))

    return compute_metrics


def _evaluate_split(trainer: HylaTrainer, task: Task, split: str, num_samples: int | None = None) -> dict[str, float]:
    dataset = task.dataset(split, num_samples)
    # Not `trainer.evaluate`, which would log the scores into the curve.
    output = trainer.predict(dataset, metric_key_prefix=split)
    scores = {name.removeprefix(f"{split}_"): value for name, value in (output.metrics or {}).items()}
    scored = {name: value for name, value in scores.items() if name not in _TIMINGS}
    return {**scored, "num_samples": len(dataset)}


_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def _curve(history: list[dict], splits: list[str]) -> list[dict[str, float]]:
    """The Trainer's log as entries of a run record."""
    curve = []
    for entry in history:
        point = {
            name: entry[name] for name in ("step", "seconds", "loss", "learning_rate", "grad_norm") if name in entry
        }
        for split in splits:
            prefix = f"eval_{split}_"
            for name, value in entry.items():
                if name.startswith(prefix) and name.removeprefix(prefix) not in _TIMINGS:
                    point[f"{split}/{name.removeprefix(prefix)}"] = value
        if len(point) > 2:
            curve.append(point)
    return curve
