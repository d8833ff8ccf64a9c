"""A run, top to bottom: recipe → data → model → training → evaluation → run.json."""

import contextlib
import math
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import EvalPrediction, PreTrainedModel, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import ProgressCallback

from ..model import HylaConfig
from ..runs.environment import environment, hardware
from ..runs.folder import CHECKPOINTS, CURVE_NAME
from ..runs.plots import can_draw, learning_curve
from ..runs.record import RunRecord, digests
from ..tasks import Task, TaskDataset
from ..typed_yaml import one_of
from ..utils import no_score, one_line, writing_advice
from .arguments import FP16_ON_A_CPU, HylaTrainingArguments
from .graphs import refuse_balancing_loss
from .processes import check_launch, on_main
from .progress import RunProgress
from .recipe import Recipe
from .resume_state import resume_states
from .run_folder import prepare_folder, replace_run
from .stopping import StopRequests
from .trainer import HylaTrainer
from .weights import initial_model


# Metrics of the Trainer that are not scores.
_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def train(
    recipe: Recipe,
    output: Path,
    overwrite: bool = False,
    max_minutes: float | None = None,
    num_samples: int | None = None,
) -> RunRecord:
    """
    Trains the recipe's model, evaluates every split but the one it trained on, and writes weights, code, recipe,
    run.json and learning_curve.png into `output`. Several processes share the recipe's batch. Nothing is published here:
    `hyla train` publishes the finished run where the recipe says `push_to_hub`.

    A run that was interrupted resumes from its last whole checkpoint, under `output/checkpoints`.

    Args:
        max_minutes: training saves a checkpoint and stops before it has taken so many minutes.
        num_samples: samples per split of the evaluation at the end; `None` for the paper's number.

    Raises:
        FileExistsError: if `output` holds a finished run, or one of another recipe, and `overwrite` is not set.
        ValueError, OSError: if something cannot be used or written.
        FloatingPointError: if loss, gradient or weights are not finite, or the loss grows a hundredfold.
        Stopped: if it was stopped by SIGTERM, SIGHUP, Ctrl-C or `max_minutes`; the same call resumes.
    """
    check_launch()
    stop = StopRequests(max_minutes)
    task = recipe.task
    check_before_start(recipe)
    args = recipe.training_arguments(output / CHECKPOINTS, PartialState().num_processes)
    train_dataset = training_data(recipe)
    with contextlib.ExitStack() as until_the_end:
        resume_from = on_main(lambda: prepare_folder(recipe, output, overwrite, until_the_end))
        set_seed(args.seed)
        model = initial_model(recipe.settings["model"], recipe.config, task.auto_class)
        evaluated = [split for split in task.splits if split != "train"]
        trainer = HylaTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset={split: task.dataset(split, args.eval_samples) for split in evaluated},
            data_collator=task.collate,
            compute_metrics=_metrics_of(task, model),
            preprocess_logits_for_metrics=_predictions_of(task),
            callbacks=[stop],
        )
        if not args.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(RunProgress)
        if resume_from:
            _say_how_it_resumes(resume_from, args.world_size)
        elif task.reference != task.name:  # a user's
            _rehearse(trainer, task, evaluated)
        if overwrite:  # only now, when everything that could be refused has been checked
            on_main(lambda: replace_run(recipe, output))
        # Taken now, since the checkout may hold other code when the run ends.
        begun_in, begun_on = environment(), hardware(args.device)
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            stop.check(trainer.state)
            metrics = {split: _evaluate_split(trainer, task, split, num_samples) for split in evaluated}
        curve = _curve(trainer.state.log_history, evaluated)
        record = RunRecord(
            name=recipe.name,
            recipe=recipe.settings,
            seeds={"task": task.seed, "trainer": args.seed},
            num_parameters=model.num_parameters(),
            steps=trainer.state.global_step,
            samples_seen=recipe.num_training_samples,
            seconds=max(entry.get("seconds", 0.0) for entry in trainer.state.log_history),
            metrics=metrics,
            curve=curve,
            environment=begun_in,
            hardware=begun_on,
            data_fingerprint=task.fingerprint(),
        )
        _write_results(trainer, record, task.processing_class, output)
    return record


def check_before_start(recipe: Recipe) -> None:
    """
    Raises:
        ValueError: if the recipe asks for something that this machine lacks.
    """
    on_cpu = recipe.trainer.get("use_cpu") or PartialState().device.type == "cpu"
    if recipe.trainer.get("fp16") and on_cpu:
        raise ValueError(f"trainer.{FP16_ON_A_CPU}")
    if recipe.trainer.get("cuda_graphs"):
        refuse_balancing_loss(recipe.config)
        if on_cpu or PartialState().device.type != "cuda":
            raise ValueError(
                "trainer.cuda_graphs needs an NVIDIA GPU, and this run would be on another device: leave it out."
            )
        if PartialState().num_processes > 1:
            raise ValueError("trainer.cuda_graphs is for a single process: leave it out, or launch one.")
    asked = recipe.trainer.get("report_to") or []
    _check_trackers([asked] if isinstance(asked, str) else asked)


def _check_trackers(names: list[str]) -> None:
    alone = ("all", "none")
    if len(names) > 1 and any(name in alone for name in names):
        raise ValueError(
            f"trainer.report_to is a list with 'all' or 'none' in it: write that word alone, got {names}."
        )
    for name in names:
        if name not in alone:
            one_of("trainer.report_to", name, [*alone, *INTEGRATION_TO_CALLBACK])
        if name not in (*alone, *get_available_reporting_integrations()):
            raise ValueError(f"trainer.report_to names {name}, which is not installed: install it, or write 'none'.")


def evaluate(
    model: PreTrainedModel,
    task: Task,
    split: str,
    num_samples: int | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """
    The scores of a model on a split.

    Args:
        num_samples: the samples to score; `None` for the paper's number.
        batch_size: samples per batch; `None` for the task's number.

    Raises:
        ValueError: if model and task do not fit.
    """
    task.check_model(model.config)
    with tempfile.TemporaryDirectory() as folder:
        args = HylaTrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size or task.eval_batch_size,
            label_names=list(task.label_columns),
            eval_strategy="no",
        )
        trainer = HylaTrainer(
            model=model,
            args=args,
            data_collator=task.collate,
            compute_metrics=_metrics_of(task, model),
            preprocess_logits_for_metrics=_predictions_of(task),
        )
        return _evaluate_split(trainer, task, split, num_samples)


def _write_results(trainer: HylaTrainer, record: RunRecord, tokenizer: Any, output: Path) -> None:
    """Writes weights, code, curve and record. Every process must call it, since each may hold a part of the weights."""
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return
    try:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(output, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
        record.digests = digests(output)
        record.save(output)  # after the weights: it says that the run is finished
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Training has ended, but its results could not be written to {output} ({one_line(error).rstrip('.')}): "
            f"{writing_advice(error)}, and give the same command again; the checkpoints are intact."
        ) from error
    if not can_draw():
        return _say(f"{CURVE_NAME} is not drawn: it takes matplotlib, pip install 'hf-hyla[analysis]'.")
    config = cast(HylaConfig, trainer.model.config)  # type: ignore[union-attr]
    try:
        (output / CURVE_NAME).write_bytes(learning_curve(record, with_dropout=config.attention_dropout > 0))
    except (OSError, ValueError) as error:
        _say(f"{CURVE_NAME} could not be drawn ({one_line(error).rstrip('.')}): `hyla card {output}` draws it again.")


def _say_how_it_resumes(checkpoint: Path, num_processes: int) -> None:
    before = resume_states(checkpoint)
    threads = torch.get_num_threads()
    # Older checkpoints do not say how many threads wrote them.
    threads_before = before[0].get("threads", threads) if before else threads
    if len(before) != num_processes:
        then, now = f"{len(before)} process{'es' * (len(before) != 1)}", str(num_processes)
    elif threads_before != threads:
        then, now = f"{threads_before} thread{'s' * (threads_before != 1)}", str(threads)
    else:
        _say(f"Resumes from {checkpoint.name}.")
        return
    _say(
        f"Resumes from {checkpoint.name}, which was written with {then}, while this run has {now}: the result will be equal up "
        "to rounding, not bit for bit."
    )


def _say(line: str) -> None:
    PartialState().print(line, file=sys.stderr, flush=True)


def training_data(recipe: Recipe) -> TaskDataset:
    """
    The samples that the recipe's run is trained on.

    Raises:
        ValueError: if they are to be read from a folder that does not hold them.
    """
    if recipe.data is None:
        return recipe.task.dataset("train", recipe.num_training_samples)
    # Imported here because datasets is slow to import.
    from ..tasks.data import FolderDataset

    return FolderDataset(recipe.data, recipe.task, "train", recipe.num_training_samples)


def _metrics_of(task: Task, model: PreTrainedModel):
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = _logits(prediction.predictions), prediction.label_ids
        if not np.isfinite(logits).all():
            return {}  # a run ends at such weights, and `_evaluate_split` refuses them
        scores = task.metrics(logits, labels, cast(np.ndarray, prediction.inputs))
        if unknown := sorted(scores.keys() - {"loss", *task.metric_names}):
            raise ValueError(
                f"The metrics of the task {task.name} include {unknown[0]}, which its metric_names lack: add the name there, or "
                "leave the score out."
            )
        if "loss" in scores:
            return scores
        # The Trainer's own loss is a mean over batches. The last batch may be shorter or, with several processes, repeat
        # samples.
        first = labels[0] if isinstance(labels, tuple) else labels
        loss = model.loss_function(torch.from_numpy(logits), torch.from_numpy(first)).item()
        return {"loss": loss, **scores}

    return compute_metrics


def _predictions_of(task: Task):
    return lambda logits, labels: task.predictions(_logits(logits), labels)


def _logits(predictions) -> Any:
    """The logits, which are the first of a model's outputs if its config also asks for hidden states."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def _rehearse(trainer: HylaTrainer, task: Task, splits: list[str]) -> None:
    """Evaluates a user's task on two samples of each split, so that a mistake in it shows before the training."""
    for split in splits:
        try:
            trainer.predict(task.dataset(split, 2))
        except Exception as error:  # whatever the user's code raises
            raise ValueError(
                f"The task {task.name} cannot be evaluated on its split {split} ({type(error).__name__}: {one_line(error)}): "
                "correct the task, and give the same command again."
            ) from error


def _evaluate_split(trainer: HylaTrainer, task: Task, split: str, num_samples: int | None = None) -> dict[str, float]:
    dataset = task.dataset(split, num_samples)
    # Not `trainer.evaluate`, which would log the scores into the curve.
    output = trainer.predict(dataset, metric_key_prefix=split)
    if not np.isfinite(_logits(output.predictions)).all():
        raise no_score(split)
    scores = {name.removeprefix(f"{split}_"): value for name, value in (output.metrics or {}).items()}
    # JSON cannot hold NaN and infinity.
    scored = {name: value for name, value in scores.items() if name not in _TIMINGS and math.isfinite(value)}
    return {**scored, "num_samples": len(dataset)}


def _curve(history: list[dict], splits: list[str]) -> list[dict[str, float]]:
    """The Trainer's log as entries of a run record."""
    curve = []
    for entry in history:
        point = {
            name: entry[name] for name in ("step", "seconds", "loss", "learning_rate", "grad_norm") if name in entry
        }
        for name, value in entry.items():
            # The name of a split may begin with that of another.
            split = max((split for split in splits if name.startswith(f"eval_{split}_")), key=len, default=None)
            metric = name.removeprefix(f"eval_{split}_")
            if split is not None and metric not in _TIMINGS:
                point[f"{split}/{metric}"] = value
        if len(point) > 2:  # more than step and seconds
            curve.append({name: value for name, value in point.items() if math.isfinite(value)})
    return curve
