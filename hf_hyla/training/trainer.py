"""HylaTrainer: transformers' Trainer with the reference's optimiser groups and learning-rate curve."""

import functools
import os
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..utils import one_line
from .arguments import FP16_ON_A_CPU, MUON, REFERENCE_SCHEDULE
from .checkpoint import newest_whole
from .graphs import GraphedStep, refuse_balancing_loss
from .guard import Guard
from .optimizers import muon_adamw, refuse_shards
from .processes import keep_freed_memory, on_main
from .resume_state import ResumeState
from .schedule import REFERENCE_FLOOR, check_schedule, reference_schedule


class HylaTrainer(Trainer):
    """
    `Trainer` with the reference's choice of decayed parameters and, for `HylaTrainingArguments`, its learning-rate curve.

    It stops when a loss, gradient or weight is not finite. Every log entry holds the seconds of training so far. A checkpoint
    counts only when it is whole, and holds all that an exact resume needs. The trainer publishes nothing: publishing reads the
    folder of a finished run. On a CPU the process keeps freed memory, see `keep_freed_memory`.

    Raises:
        ValueError: for arguments that it would not follow: `push_to_hub`, `enable_jit_checkpoint`, `save_total_limit` 1,
            sharded parameters with `optim="muon"`, and `cuda_graphs` without a GPU, on several, or with a load-balancing loss.
    """

    def __init__(self, model=None, args: TrainingArguments | None = None, *rest, **kwargs):
        if args is not None:
            _refuse(args)
        self._guard, self._resume_state = Guard(), ResumeState()
        self._operations: dict[int, int] = {}  # of a batch, by the size of its input
        super().__init__(model, args, *rest, **kwargs)
        if self.args.fp16 and self.args.device.type == "cpu":
            raise ValueError(FP16_ON_A_CPU)
        refuse_shards(self._takes_muon() and (self.is_fsdp_enabled or self.is_deepspeed_enabled))
        self._graphed = None
        if getattr(self.args, "cuda_graphs", False):
            self._check_graphs()
            self._graphed = GraphedStep(super().training_step)
        if self.args.device.type == "cpu":
            keep_freed_memory()
        # In this order, a checkpoint with weights that are not finite is never sealed.
        self.add_callback(self._guard)
        self.add_callback(self._resume_state)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Trains, and resumes where `resume_from_checkpoint` says: the path of a checkpoint, or `True` for the last one in
        `output_dir` that is whole.

        Raises:
            ValueError: if no checkpoint is whole.
            OSError: if a checkpoint cannot be written.
            FloatingPointError: if loss, gradient, weights or moments are not finite, or the loss grows a hundredfold.
        """
        self._operations = {}
        if resume_from_checkpoint is True:
            resume_from_checkpoint = on_main(lambda: _last_checkpoint(self.args.output_dir))
        self._resume_state.resume_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            self._resume_state.remove_unsealed(error, self.args, self.state)
            raise

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """
        Names of the parameters that the reference decays, which are all of its arrays but the one-dimensional ones: weights
        of linear maps, embeddings and tables, and the biases of queries, keys and values, which it stores as heads x width.
        """
        headwise_bias = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
        return [name for name, p in model.named_parameters() if p.ndim > 1 or name.endswith(headwise_bias)]

    def _check_graphs(self) -> None:
        self.args.check_graphs()  # type: ignore[attr-defined]  # again, since an accelerator_config may have changed them
        refuse_balancing_loss(getattr(self.model, "config", None))
        if self.args.device.type != "cuda":
            raise ValueError(
                f"cuda_graphs needs an NVIDIA GPU, but training is on the {self.args.device.type}: leave it out."
            )
        parallel = self.is_model_parallel or self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.world_size > 1 or self.args.n_gpu > 1 or parallel:
            raise ValueError(
                "cuda_graphs records the step of a whole model on one GPU, but several GPUs, FSDP or DeepSpeed were asked for: "
                "leave cuda_graphs out, or name one GPU in CUDA_VISIBLE_DEVICES."
            )

    def _takes_muon(self) -> bool:
        # An optimiser or optimiser class that the caller passed takes precedence over `optim`.
        return self.args.optim == MUON and self.optimizer is None and self.optimizer_cls_and_kwargs is None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self._takes_muon():
            of_model: nn.Module = self.model if model is None else model  # type: ignore[assignment]
            decayed = self.get_decay_parameter_names(of_model)
            self.optimizer = muon_adamw(of_model, self.args, decayed)  # type: ignore[arg-type]
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != REFERENCE_SCHEDULE:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        check_schedule(warmup_steps, num_training_steps)
        schedule = functools.partial(
            reference_schedule,
            warmup_steps=warmup_steps,
            max_steps=num_training_steps,
            floor=getattr(self.args, "schedule_floor", REFERENCE_FLOOR),
        )
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedule)  # type: ignore[arg-type]
        # Private, for transformers 5.17 and later: it tells them that a second call of `train` needs a new schedule.
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        step = self._graphed or super().training_step
        loss = step(model, inputs, num_items_in_batch)
        filtered = self.args.logging_nan_inf_filter  # set by users who want training to continue
        if not filtered:
            self._guard.watch("loss", loss, self.state)
        self._resume_state.add(loss, filtered, self.state)
        return loss

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        # transformers counts the parameters in every step, which takes a noticeable part of a small step on a GPU.
        name = getattr(self.model, "main_input_name", "input_ids")
        size = inputs[name].numel() if name in inputs else 0
        if size not in self._operations:
            self._operations[size] = super().floating_point_ops(inputs)
        return self._operations[size]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._guard.check()
        if {"loss", "learning_rate"} <= logs.keys():  # transformers' own, of training
            logs["loss"] = self._resume_state.logged(logs["loss"], self.state)
            self._guard.check_growth(logs["loss"], self.state)
        logs["seconds"] = round(self._resume_state.seconds, 3)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # The weights are the first file of a checkpoint, and no callback says that one is begun. A call of transformers' own says
        # so by its private argument, since 5.17 and later; a user's call writes no checkpoint.
        if _internal_call and output_dir:
            self._resume_state.writing = Path(output_dir)
        super().save_model(output_dir, _internal_call)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """
        Private, for transformers 5.17 and later, which have no hook between loading the optimiser and the first step.

        Raises:
            ValueError: if the checkpoint's optimiser is another one, or trained other groups of parameters.
        """
        groups = [set(group) for group in self.optimizer.param_groups]  # type: ignore[union-attr]
        try:
            self._load_states(checkpoint)
            # torch takes over the groups of any optimiser, and would miss settings of this one in the next step.
            loaded = self.optimizer.param_groups  # type: ignore[union-attr]
            missing = [key for own, group in zip(groups, loaded, strict=True) for key in sorted(own - group.keys())]
            if missing:
                raise ValueError(f"it lacks {missing[0]}")
        except ValueError as error:
            raise ValueError(
                f"The optimiser in {checkpoint} does not fit this one ({one_line(error)}), so it is of another Trainer, optim or "
                "model: load the weights there by from_pretrained, and train without resume_from_checkpoint."
            ) from None

    def _load_states(self, checkpoint: str | None) -> None:
        # For transformers 5.17 to 5.22: with several processes on a CPU they ask for the device cpu:0 here, which
        # torch cannot load onto. To go when 5.23 is the oldest that is supported.
        if checkpoint is None or self.args.device.type != "cpu" or self.args.world_size == 1:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            state = torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True)
            part.load_state_dict(state)  # type: ignore[union-attr]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Refuses the argument `push_to_hub=True`, for which transformers calls this."""
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


def _refuse(args: TrainingArguments) -> None:
    if getattr(args, "enable_jit_checkpoint", False):
        raise ValueError(
            "enable_jit_checkpoint saves in the middle of a step, from where a HylaTrainer cannot resume exactly: leave it out, "
            "and train by `hyla train`, which saves at the end of a step when it gets SIGTERM."
        )
    if args.save_total_limit == 1 and args.save_strategy != "no":
        raise ValueError(
            "save_total_limit=1 would remove the only whole checkpoint before the next one is sealed: set it to 2 or more."
        )


def _last_checkpoint(output_dir: str | None) -> str:
    checkpoint = newest_whole(Path(output_dir or "."))
    if checkpoint is None:
        raise ValueError(
            f"{output_dir} holds no whole checkpoint of a HylaTrainer: pass the path of a checkpoint of another Trainer, or leave "
            "resume_from_checkpoint out."
        )
    return str(checkpoint)
