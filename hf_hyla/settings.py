"""
The settings of recipes: their names by section, and what the value of each may be by itself.

The rows of `TRAINER` and `EXPECT` are what a recipe is checked by. Those of tasks and models repeat what their classes check. The
command line reads all of them to refuse a wrong name or value at once, so torch, whose import takes seconds, is not imported here.
A test compares the rows with the classes.
"""

import dataclasses
from typing import Any, Literal

from .typed_yaml import Argument, in_type, one_of


@dataclasses.dataclass(frozen=True)
class Setting:
    """
    What a value may be.

    Attributes:
        type: annotation of its types, see `in_type`.
        minimum, maximum, above, below: limits of a number, of which `above` and `below` are not allowed themselves.
        names: the texts that are known, if not all texts are.
        is_whole: whether a fraction is refused.
    """

    type: Any
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    names: tuple[str, ...] = ()
    is_whole: bool = False

    def check(self, where: str, value: Any) -> None:
        """
        Raises:
            ValueError: if a value of the right type is beyond the limits. The message names the value by `where`.
        """
        if self.names and value is not None:
            one_of(where, value, self.names)
        if not isinstance(value, (int, float)):
            return
        if self.minimum is not None and value < self.minimum:
            raise ValueError(f"{where} must be at least {self.minimum}, got {value}.")
        if self.maximum is not None and value > self.maximum:
            raise ValueError(f"{where} must be at most {self.maximum}, got {value}.")
        if self.above is not None and value <= self.above:
            raise ValueError(f"{where} must be larger than {self.above}, got {value}.")
        if self.below is not None and value >= self.below:
            raise ValueError(f"{where} must be less than {self.below}, got {value}.")
        if self.is_whole and value != int(value):
            raise ValueError(f"{where} must be a whole number, got {value}.")

    def read(self, where: str, text: str) -> Any:
        """
        The value of a text from the command line.

        Raises:
            ValueError: if it is of another type or beyond the limits.
        """
        value = in_type(where, Argument(text), self.type)
        self.check(where, value)
        return value


_TEXT, _YES_OR_NO = Setting(str), Setting(bool)
_OPTIONAL_TEXT, _OPTIONAL_YES_OR_NO = Setting(str | None), Setting(bool | None)
_WHEN = Setting(str, names=("no", "steps", "epoch"))
_LOG_LEVEL = Setting(str, names=("passive", "debug", "info", "warning", "error", "critical"))
# A value below 1 would mean a share of the run to transformers.
_STEPS = Setting(float, minimum=1, is_whole=True)
_RATE, _OPTIONAL_RATE = Setting(float, minimum=0), Setting(float | None, minimum=0)
_BETA = Setting(float, minimum=0, below=1)
# Sizes beyond which a run would fill the memory before its first step.
_BATCH, _BATCHES = 10**7, 10**6

# The key for the samples of a batch, which all processes share, and its default.
BATCH_SIZE_KEY, DEFAULT_BATCH_SIZE = "train_batch_size", 128
# Where the finished run is published. `hyla train` reads these when the run is finished, and the Trainer never.
HUB_KEYS = ("push_to_hub", "hub_model_id", "hub_private_repo")
# With any of these, a run resumes exactly and is scored on all samples. transformers has a hundred more, some of which would change
# a score silently.
TRAINER = {
    "max_steps": Setting(int, minimum=1, maximum=10**9),
    "learning_rate": _RATE,
    "warmup_steps": Setting(float, minimum=0, is_whole=True),
    "weight_decay": _RATE,
    BATCH_SIZE_KEY: Setting(int, minimum=1, maximum=_BATCH),
    "gradient_accumulation_steps": Setting(int, minimum=1, maximum=_BATCHES),
    "max_grad_norm": _RATE,
    "seed": Setting(int, minimum=0, below=2**32),
    "full_determinism": _YES_OR_NO,
    # Those that need no further package.
    "optim": Setting(
        str, names=("muon", "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
    ),
    "optim_args": _OPTIONAL_TEXT,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _RATE,
    "muon_learning_rate": _OPTIONAL_RATE,
    "muon_learning_rate_qk": _OPTIONAL_RATE,
    "schedule_floor": Setting(float, minimum=0, maximum=1),
    # Grouping by length is left out, since all samples of a task have the same length.
    "train_sampling_strategy": Setting(str, names=("sequential", "random")),
    "dataloader_num_workers": Setting(int, minimum=0, maximum=1024),
    "dataloader_pin_memory": _YES_OR_NO,
    "dataloader_persistent_workers": _YES_OR_NO,
    "dataloader_prefetch_factor": Setting(int | None, minimum=1, maximum=_BATCHES),
    "bf16": _YES_OR_NO,
    "fp16": _YES_OR_NO,
    "tf32": _OPTIONAL_YES_OR_NO,
    "use_cpu": _YES_OR_NO,
    "gradient_checkpointing": _OPTIONAL_YES_OR_NO,
    "torch_empty_cache_steps": Setting(int | None, minimum=1),
    "cuda_graphs": _YES_OR_NO,
    "torch_compile": _YES_OR_NO,
    "torch_compile_backend": _OPTIONAL_TEXT,
    "torch_compile_mode": Setting(
        str | None, names=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    ),
    "ddp_backend": Setting(str | None, names=("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl")),
    "ddp_timeout": Setting(int, minimum=1, maximum=10**9),
    "eval_strategy": _WHEN,
    "eval_steps": Setting(float | None, minimum=1, is_whole=True),
    "eval_delay": _RATE,
    "eval_samples": Setting(int, minimum=1, maximum=_BATCH),
    "per_device_eval_batch_size": Setting(int, minimum=1, maximum=_BATCH),
    "eval_accumulation_steps": Setting(int | None, minimum=1, maximum=_BATCHES),
    "save_strategy": _WHEN,
    "save_steps": _STEPS,
    # A single checkpoint would be removed before the next one is whole.
    "save_total_limit": Setting(int | None, minimum=2),
    "logging_strategy": _WHEN,
    "logging_steps": _STEPS,
    "logging_first_step": _YES_OR_NO,
    "log_level": _LOG_LEVEL,
    "log_level_replica": _LOG_LEVEL,
    "disable_tqdm": _OPTIONAL_YES_OR_NO,
    "report_to": Setting(str | list[str] | None),
    "run_name": _OPTIONAL_TEXT,
    "project": _TEXT,
    "trackio_space_id": _OPTIONAL_TEXT,
    "trackio_bucket_id": _OPTIONAL_TEXT,
    "push_to_hub": _YES_OR_NO,
    "hub_model_id": _OPTIONAL_TEXT,
    "hub_private_repo": _OPTIONAL_YES_OR_NO,
}

EXPECT = {
    "metric": _TEXT,
    "value": Setting(float),
    "tolerance": Setting(float, minimum=0),
    "source": _TEXT,
    "budget": Setting(int | None, minimum=1),
}

_SHARE = Setting(float | int, above=0, below=1)
_SEED = Setting(int)
# The settings of each task.
TASKS = {
    "logic": {
        "num_variables": Setting(int, minimum=2, maximum=8),
        "num_terms": Setting(int, minimum=1),
        "num_examples": Setting(int, minimum=2, maximum=10_000),
        "held_out": _SHARE,
        "reference_split": _YES_OR_NO,
        "seed": _SEED,
    },
    "sraven": {
        "num_features": Setting(int, minimum=2, maximum=8),
        "num_values": Setting(int, minimum=3, maximum=1000),
        "held_out": _SHARE,
        "permute": _YES_OR_NO,
        "unambiguous": _YES_OR_NO,
        "reference_split": _YES_OR_NO,
        "seed": _SEED,
    },
    "text": {
        "files": _OPTIONAL_TEXT,
        "dataset_name": _OPTIONAL_TEXT,
        "dataset_config_name": _OPTIONAL_TEXT,
        "dataset_split": _TEXT,
        "dataset_test_split": _OPTIONAL_TEXT,
        "text_column": _TEXT,
        "held_out": _SHARE,
        "tokenizer": _TEXT,
        "sequence_length": Setting(int, minimum=2, maximum=1_000_000),
        "reference_split": _YES_OR_NO,
        "seed": _SEED,
    },
}

_SIZE, _OPTIONAL_SIZE = Setting(int, minimum=1, maximum=10**7), Setting(int | None, minimum=1, maximum=10**7)
_OPTIONAL_INTEGER = Setting(int | None)
_ANYTHING = Setting(Any)
MODEL = {
    "attention_type": Setting(Literal["hyla", "linear", "softmax"]),
    "score_norm": Setting(Literal["rms_head", "softmax", "none"] | None),
    "value_activation": _OPTIONAL_TEXT,
    "value_depth": Setting(Literal[1, 2]),
    "vocab_size": _OPTIONAL_SIZE,
    "input_size": _OPTIONAL_SIZE,
    "answer_token_id": _OPTIONAL_INTEGER,
    "embedding_bias": _YES_OR_NO,
    "pad_token_id": _OPTIONAL_INTEGER,
    "bos_token_id": _OPTIONAL_INTEGER,
    "eos_token_id": _ANYTHING,
    "hidden_size": _SIZE,
    "num_hidden_layers": Setting(int, minimum=1, maximum=1000),
    "num_attention_heads": _SIZE,
    "head_dim": _OPTIONAL_SIZE,
    "value_head_dim": _OPTIONAL_SIZE,
    "qk_norm": _YES_OR_NO,
    "position_type": Setting(Literal["relative", "rotary", "none"]),
    "relative_attention_num_buckets": Setting(int, maximum=10**7),
    "rope_parameters": _ANYTHING,
    "max_position_embeddings": _SIZE,
    "is_causal": _YES_OR_NO,
    "sliding_window": Setting(int | None, minimum=2, maximum=10**7),
    "attention_dropout": Setting(float | int, minimum=0, below=1),
    "attention_out_multiplier": Setting(float | int, above=0, maximum=1e30),
    "ffn_type": Setting(Literal["mlp", "swiglu", "moe"]),
    "intermediate_size": _SIZE,
    "hidden_act": _OPTIONAL_TEXT,
    "num_experts": _SIZE,
    "num_experts_per_tok": _SIZE,
    "output_router_logits": _YES_OR_NO,
    "router_aux_loss_coef": Setting(float | int, minimum=0, maximum=1e30),
    "norm_type": Setting(Literal["layer_norm", "rms_norm"]),
    "norm_eps": Setting(float | int, minimum=0, maximum=1e30),
    "num_answers": _SIZE,
    "num_labels": Setting(int, minimum=1, maximum=10**6),
    "id2label": _ANYTHING,
    "label2id": _ANYTHING,
    "problem_type": Setting(Literal["regression", "single_label_classification", "multi_label_classification"] | None),
    "output_hidden_states": _OPTIONAL_YES_OR_NO,
    "chunk_size_feed_forward": Setting(int),
    "model_name_or_path": _TEXT,
    "revision": _TEXT,
    "lm_head_bias": _YES_OR_NO,
    "scale_logits": _OPTIONAL_YES_OR_NO,
    "tie_word_embeddings": _YES_OR_NO,
    "use_cache": _YES_OR_NO,
}

SECTIONS = {
    "task": ["name", "data", *dict.fromkeys(name for settings in TASKS.values() for name in settings)],
    "model": list(MODEL),
    "trainer": list(TRAINER),
    "expect": list(EXPECT),
}

# Why other keys are refused, as the end of a sentence.
_BY_THE_RUN = "is set by the run itself"
_BY_MAX_STEPS = "has no effect: a run is max_steps long and follows the reference's schedule"
_PUBLISHED_ONCE = (
    "has no effect: a run is published once, when it is finished, and never its checkpoints, which hold pickles"
)
_BY_THE_LAUNCH = "belongs to the launch: write it into the --config_file of accelerate launch"
_NOT_EXACT = "is not supported: an interrupted run would not resume exactly"
_OTHER_SCORES = "is not supported: scores would be of other samples, or mean something else"
REFUSED = {
    "trainer": {
        "output_dir": "is set by --output",
        "per_device_train_batch_size": f"is replaced by {BATCH_SIZE_KEY}, the samples of all processes",
        **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), _BY_THE_LAUNCH),
        **dict.fromkeys(
            (
                "save_only_model",
                "ignore_data_skip",
                "eval_on_start",
                "auto_find_batch_size",
                "restore_callback_states_from_checkpoint",
                "enable_jit_checkpoint",
                "dataloader_in_order",
            ),
            _NOT_EXACT,
        ),
        **dict.fromkeys(
            (
                "dataloader_drop_last",
                "label_names",
                "label_smoothing_factor",
                "accelerator_config",
                "eval_do_concat_batches",
                "batch_eval_metrics",
                "prediction_loss_only",
                "bf16_full_eval",
                "fp16_full_eval",
            ),
            _OTHER_SCORES,
        ),
        "load_best_model_at_end": "is not supported: a run is scored with the weights of its last step",
        **dict.fromkeys(("resume_from_checkpoint", "include_for_metrics", "remove_unused_columns"), _BY_THE_RUN),
        **dict.fromkeys(
            ("num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio"), _BY_MAX_STEPS
        ),
        **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), _PUBLISHED_ONCE),
        "hub_token": "must never be stored in a file: log in by `hf auth login`, or set HF_TOKEN",
    },
    "model": dict.fromkeys(
        ("architectures", "transformers_version", "dtype", "return_dict", "is_encoder_decoder", "format_version"),
        "says what was saved, not what to build",
    ),
    "task": {},
    "expect": {},
}
