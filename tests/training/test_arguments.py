"""Every field of TrainingArguments does for a HylaTrainer what it does for transformers' Trainer, or is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.training import HylaTrainer, HylaTrainingArguments


# Rows of fields that are tried together, with values other than the defaults of either class.
SERVED = [
    {
        "output_dir": "elsewhere", "max_steps": 5, "learning_rate": 3e-3, "warmup_steps": 2, "disable_tqdm": False,
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
    },
    {
        "optim": "adamw_torch", "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-3,
        "gradient_accumulation_steps": 2, "average_tokens_across_devices": False, "max_grad_norm": 0.01,
    },
    {"num_train_epochs": 1.5, "per_device_train_batch_size": 3, "dataloader_drop_last": True, "label_names": ["labels"]},
    {
        "seed": 3, "data_seed": 7, "use_cpu": True, "neftune_noise_alpha": 5.0, "torch_empty_cache_steps": 2,
        "label_smoothing_factor": 0.1, "remove_unused_columns": False,
    },
    {"bf16": True, "use_cpu": True, "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False, "run_name": "x", "project": "x", "report_to": [],
    },
    {"bf16_full_eval": True, "use_cpu": True, "use_cache": True, "include_num_input_tokens_seen": "all", "auto_find_batch_size": True},
    {
        "logging_strategy": "epoch", "logging_first_step": True, "logging_nan_inf_filter": False, "eval_strategy": "epoch",
        "prediction_loss_only": True, "eval_accumulation_steps": 1, "save_strategy": "epoch",
    },
    {"logging_steps": 2, "eval_steps": 3, "eval_delay": 1, "eval_on_start": True, "per_device_eval_batch_size": 3},
    {"eval_do_concat_batches": False, "include_for_metrics": ["inputs", "loss"], "save_only_model": True},
    {"eval_steps": 2, "save_steps": 2, "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "accuracy"},
    {"save_strategy": "best", "metric_for_best_model": "eval_loss", "greater_is_better": False, "batch_eval_metrics": True},
    {
        "dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1,
        "dataloader_multiprocessing_context": "fork", "dataloader_in_order": False,
    },
]  # fmt: skip
REFUSED = {
    "push_to_hub": (True, "would upload pickles"),
    "enable_jit_checkpoint": (True, "enable_jit_checkpoint saves in the middle of a step"),
    "save_total_limit": (1, "save_total_limit=1 would remove the only whole checkpoint"),
}
_NOT_HERE = "takes hardware or a package that tests do not ask for, and HylaTrainer does nothing with it"
_LAUNCH = "is of several processes, see test_ranks.py and test_sharding.py"
_HUB = "has no effect without push_to_hub"
_RESUME = "is of a resume, see test_resume.py"
_SCRIPTS = "is for scripts, and no Trainer reads it"
_PROCESS = "changes or reports the whole process"
UNTRIED = {
    **dict.fromkeys(("fp16", "fp16_full_eval", "tf32", "use_liger_kernel", "liger_kernel_config"), _NOT_HERE),
    **dict.fromkeys(("optim_args", "optim_target_modules", "trackio_space_id", "trackio_bucket_id"), _NOT_HERE),
    **dict.fromkeys(("trackio_static_space_id", "train_sampling_strategy", "length_column_name"), _NOT_HERE),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "see test_run.py"),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerator_config"), _LAUNCH),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), _LAUNCH),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank", "save_on_each_node"), _LAUNCH),
    **dict.fromkeys(("log_on_each_node", "eval_use_gather_object"), _LAUNCH),
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"), _HUB),
    **dict.fromkeys(("hub_revision",), _HUB),
    **dict.fromkeys(("ignore_data_skip", "restore_callback_states_from_checkpoint"), _RESUME),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "resume_from_checkpoint"), _SCRIPTS),
    **dict.fromkeys(("full_determinism", "log_level", "log_level_replica", "debug", "skip_memory_metrics"), _PROCESS),
}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
_TIMES = ("runtime", "per_second", "seconds", "preparation_time")


def test_every_field_is_in_the_table():
    tried = {name for row in SERVED for name in row}
    assert FIELDS.keys() <= tried | REFUSED.keys() | UNTRIED.keys()


class WithTheReferencesDecay(Trainer):
    get_decay_parameter_names = HylaTrainer.get_decay_parameter_names


def samples():
    draw = torch.Generator().manual_seed(1)
    for _ in range(16):
        ids = torch.randint(0, 9, (6,), generator=draw)
        yield {"input_ids": ids, "labels": ids[0] % 3}


def accuracy(prediction, compute_result=True):
    logits, labels = (
        np.concatenate([np.asarray(part) for part in parts]) if isinstance(parts, list) else np.asarray(parts)
        for parts in (prediction.predictions, prediction.label_ids)
    )
    seen = float(np.sum([np.sum(part) for part in prediction.inputs])) if prediction.inputs is not None else 0.0
    return {"accuracy": float((logits.argmax(-1) == labels).mean()), "seen": seen}


def trained(trainer_class, args_class, folder, **settings):
    """Weights, log without times and files that training leaves behind."""
    # Every default that differs between the classes is transformers'.
    defaults = {
        name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for name, field in FIELDS.items()
        if name in HylaTrainingArguments.__annotations__ and name != "report_to"
    }
    base = {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "learning_rate": 1e-2,
            "num_train_epochs": 2, "per_device_train_batch_size": 4, "disable_tqdm": True, "report_to": "none"}  # fmt: skip
    folder = folder / settings.get("output_dir", "out")
    args = args_class(**{**defaults, **base, **settings, "output_dir": str(folder)})
    set_seed(0)
    config = HylaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16, num_answers=1, num_labels=3
    )
    model = HylaForSequenceClassification(config)
    data = list(samples())
    trainer = trainer_class(model, args, train_dataset=data, eval_dataset=data[:7], compute_metrics=accuracy)
    trainer.train()
    log = [
        {key: value for key, value in entry.items() if not key.endswith(_TIMES)} for entry in trainer.state.log_history
    ]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    own = {name for name in files if name.endswith("/seal.json") or "/resume_state_" in name}
    return trainer.model.state_dict(), log, files - own


@pytest.mark.parametrize("row", SERVED, ids=[" ".join(row) for row in SERVED])
def test_a_field_has_the_effect_that_it_has_in_transformers_trainer(tmp_path, row):
    row = {name: value for name, value in row.items() if name in FIELDS}  # older versions have fewer
    expected, log, files = trained(WithTheReferencesDecay, TrainingArguments, tmp_path / "theirs", **row)
    for args_class in (TrainingArguments, HylaTrainingArguments):
        found = trained(HylaTrainer, args_class, tmp_path / args_class.__name__, **row)
        assert all(torch.equal(found[0][name], value) for name, value in expected.items())
        assert found[1] == log and found[2] == files


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("args_class", [TrainingArguments, HylaTrainingArguments])
def test_unsupported_arguments_are_refused_at_construction(tmp_path, args_class, name):
    value, message = REFUSED[name]
    args = args_class(str(tmp_path), eval_strategy="no", report_to="none", **{name: value})
    with pytest.raises(ValueError, match=message):
        HylaTrainer(HylaForSequenceClassification(HylaConfig(num_hidden_layers=1)), args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs has no effect with lr_scheduler_type 'ref"),
        ({"lr_scheduler_type": "linear", "schedule_floor": 0.2}, "schedule_floor belongs to lr_scheduler_type 'reference'"),
        ({"optim": "muon", "muon_learning_rate": 1.0, "optim_args": "a=1"}, "optim_args has no effect with optim 'muon'"),
        ({"optim": "muon", "muon_learning_rate": 1.0, "optim_target_modules": "all-linear"}, "optim_target_modules has"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        HylaTrainingArguments(str(tmp_path), **settings)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="takes a machine without an accelerator")
@pytest.mark.parametrize("args_class", [TrainingArguments, HylaTrainingArguments])
def test_float16_on_a_cpu_is_refused_instead_of_trained_in_float32(tmp_path, args_class):
    args = args_class(str(tmp_path), eval_strategy="no", report_to="none", fp16=True)
    with pytest.raises(
        ValueError, match="fp16 needs a GPU, since accelerate would silently train in float32 on a CPU"
    ):
        HylaTrainer(HylaForSequenceClassification(HylaConfig(num_hidden_layers=1)), args)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="takes a machine without an accelerator")
@pytest.mark.parametrize("name", ["bf16", "bf16_full_eval"])
def test_bfloat16_on_a_machine_without_an_accelerator_is_computed_on_its_cpu(tmp_path, name):
    assert HylaTrainingArguments(output_dir=str(tmp_path), **{name: True}).device.type == "cpu"
