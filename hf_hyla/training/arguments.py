"""HylaTrainingArguments: transformers' TrainingArguments with the reference's settings."""

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..settings import DEFAULT_BATCH_SIZE
from ..utils import nearest
from .schedule import REFERENCE_FLOOR


# The name of the optimiser of optimizers.py, beside transformers' own.
MUON = "muon"
# The name of the schedule of schedule.py, beside transformers' own.
REFERENCE_SCHEDULE = "reference"
# The optim_args that transformers reads for these optimisers. It silently ignores others, and weight_decay has an argument of its
# own.
_OPTIM_ARGS: dict[str, dict[str, str]] = {
    "sgd": {"momentum": "a number", "dampening": "a number", "nesterov": "true or false"},
    "adagrad": {"lr_decay": "a number", "eps": "a number"},
    "rmsprop": {"momentum": "a number", "alpha": "a number", "eps": "a number", "centered": "true or false"},
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "adafactor": {},
}
FP16_ON_A_CPU = "fp16 needs a GPU, since accelerate would silently train in float32 on a CPU: write 'bf16: true', or leave fp16 out."


@dataclass
class HylaTrainingArguments(TrainingArguments):
    """
    transformers' `TrainingArguments` with the reference's settings as defaults (AdamW 0.9 / 0.999 / 1e-8, the reference's
    learning-rate curve, batches of 128 per device, no gradient clipping) and with these arguments.

    Args:
        optim (`str`, *optional*):
            `"muon"`, or an optimiser of transformers. Muon (torch.optim.Muon, momentum 0.95) trains the matrices inside the
            layers, see `muon_parameters`. AdamW trains everything else, by `learning_rate` and the `adam_*` arguments. Logs
            show AdamW's learning rate. The schedule multiplies both learning rates by the same factor.
        muon_learning_rate (`float`, *optional*):
            Muon's learning rate. It is about the spectral norm of an update, which is larger by a factor of
            sqrt(rows / columns) for a matrix with more rows than columns.
        muon_learning_rate_qk (`float`, *optional*, defaults to `muon_learning_rate`):
            Muon's learning rate for the projections of queries and keys.
        lr_scheduler_type (`str`, *optional*, defaults to `"reference"`):
            `"reference"`, see `reference_schedule`, or a schedule of transformers.
        schedule_floor (`float`, *optional*, defaults to 0.1):
            The last learning rate of the reference's schedule, as a share of the largest, from 0 to 1. The reference has 0.1.
        eval_samples (`int`, *optional*, defaults to 2048):
            Samples per split for the curve during training. The evaluation at the end uses the paper's number.
        cuda_graphs (`bool`, *optional*, defaults to `False`):
            Record a training step as CUDA graphs and replay it, see `Recorded`. For one NVIDIA GPU and batches of one shape, and
            not for padded batches of a classifier or the load-balancing loss of experts. The result is the same up to rounding.
            What a callback changes in the model after the first steps, such as frozen layers or a rate of dropout, has no
            effect.

    Raises:
        ValueError: for settings that contradict each other.
    """

    muon_learning_rate: float | None = None
    muon_learning_rate_qk: float | None = None
    schedule_floor: float = REFERENCE_FLOOR
    eval_samples: int = 2048
    cuda_graphs: bool = False

    seed: int = 0
    per_device_train_batch_size: int = DEFAULT_BATCH_SIZE
    per_device_eval_batch_size: int = 1024
    max_grad_norm: float = 0.0
    lr_scheduler_type: SchedulerType | str = REFERENCE_SCHEDULE
    # Collators of tasks keep what the model reads, and need whole samples.
    remove_unused_columns: bool = False
    # Every loss depends on all parameters, and a search for unused ones takes time in every step.
    ddp_find_unused_parameters: bool | None = False
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

    def __post_init__(self) -> None:
        takes_muon, takes_reference = self.optim == MUON, self.lr_scheduler_type == REFERENCE_SCHEDULE
        self._check_optimizer(takes_muon)
        self._check_schedule(takes_reference)
        if self.cuda_graphs:
            self.check_graphs()
        if self.report_to is None:  # which transformers reads as the name of a tracker
            self.report_to = "none"
        # Without an accelerator, transformers takes bfloat16 only from those who say that they train on the CPU.
        if (self.bf16 or self.bf16_full_eval) and not torch.accelerator.is_available():
            self.use_cpu = True
        # transformers takes the names of its own optimisers and schedules only.
        if takes_muon:
            self.optim = OptimizerNames.ADAMW_TORCH
        if takes_reference:
            self.lr_scheduler_type = SchedulerType.LINEAR
        super().__post_init__()
        if takes_muon:
            self.optim = MUON
        if takes_reference:
            self.lr_scheduler_type = REFERENCE_SCHEDULE

    def check_graphs(self) -> None:
        """
        Raises:
            ValueError: for settings that a recorded step would not follow, or that no step has been recorded with.
        """
        optimizer = str(getattr(self.optim, "value", self.optim))
        followed = {
            "gradient_accumulation_steps": self.gradient_accumulation_steps == 1,
            "auto_find_batch_size": not self.auto_find_batch_size,
            "torch_empty_cache_steps": not self.torch_empty_cache_steps,
            "gradient_checkpointing": not self.gradient_checkpointing,
            "full_determinism": not self.full_determinism,
            # These make CUDA graphs of their own.
            "torch_compile_mode": self.torch_compile_mode not in ("reduce-overhead", "max-autotune"),
            "torch_compile_backend": self.torch_compile_backend != "cudagraphs",
            # The updates or modes of these are part of a step.
            "optim": not optimizer.startswith(("lomo", "adalomo", "schedule_free")),
        }
        if missed := [name for name, fine in followed.items() if not fine]:
            value = getattr(self, missed[0])
            raise ValueError(
                f"cuda_graphs records a training step once and replays it, which {missed[0]} {getattr(value, 'value', value)!r} "
                "does not allow: leave one of them out."
            )

    def _check_optimizer(self, takes_muon: bool) -> None:
        rates = {name: getattr(self, name) for name in ("muon_learning_rate", "muon_learning_rate_qk")}
        given = [name for name, rate in rates.items() if rate is not None]
        if given and not takes_muon:
            raise ValueError(
                f"{given[0]} belongs to optim 'muon', but optim is {self.optim!s}: set optim, or remove it."
            )
        for name in given:
            rate = rates[name]
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {rate!r}.")
        if takes_muon and self.muon_learning_rate is None:
            raise ValueError("optim 'muon' needs muon_learning_rate, such as 4e-3: learning_rate is AdamW's.")
        for name in ("optim_args", "optim_target_modules"):
            if takes_muon and getattr(self, name):
                raise ValueError(f"{name} has no effect with optim 'muon', got {getattr(self, name)!r}: remove it.")
        optimizer = str(getattr(self.optim, "value", self.optim))
        if self.optim_args and optimizer in _OPTIM_ARGS:
            _check_optim_args(optimizer, self.optim_args)

    def _check_schedule(self, takes_reference: bool) -> None:
        if takes_reference and self.lr_scheduler_kwargs:
            raise ValueError(
                f"lr_scheduler_kwargs has no effect with lr_scheduler_type 'reference', got {self.lr_scheduler_kwargs!r}: "
                "remove it, or name a schedule of transformers."
            )
        if not takes_reference and self.schedule_floor != REFERENCE_FLOOR:
            raise ValueError(
                f"schedule_floor belongs to lr_scheduler_type 'reference', but lr_scheduler_type is {self.lr_scheduler_type!s}: "
                "remove one of them."
            )
        if not 0 <= self.schedule_floor <= 1:
            raise ValueError(f"schedule_floor must lie between 0 and 1, got {self.schedule_floor}.")


def _check_optim_args(optimizer: str, text: str) -> None:
    known = _OPTIM_ARGS[optimizer]
    if not known:
        raise ValueError(f"optim_args has no effect with optim {optimizer!r}, got {text!r}: remove it.")
    for part in text.replace(" ", "").split(","):
        key, _, value = part.partition("=")
        if key not in known:
            raise ValueError(
                f"optim_args has no {key!r}{nearest(key, known)}: expected {' or '.join(known)} for optim {optimizer!r}, as in "
                "'key=value,key=value'."
            )
        if not _is(known[key], value):
            raise ValueError(f"optim_args: {key} must be {known[key]}, got {value!r}.")


def _is(kind: str, value: str) -> bool:
    if kind == "true or false":
        return value.lower() in ("true", "false")
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False
