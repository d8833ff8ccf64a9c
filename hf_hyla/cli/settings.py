"""
The names of the settings that the command line takes as `--section.key value`, and the errors for unknown ones.

Settings are declared where they are used: in `HylaConfig`, the tasks and `HylaTrainingArguments`. Their names are repeated
here to report a misspelt one at once, before torch is imported, which takes seconds. A test compares the lists.
"""

import difflib
from collections.abc import Collection


_NAMES = {
    "logic": "num_variables num_terms num_examples held_out reference_split seed",
    "sraven": "num_features num_values held_out permute unambiguous reference_split seed",
    "text": """
        files dataset_name dataset_config_name dataset_split dataset_test_split text_column held_out tokenizer
        sequence_length reference_split seed
    """,
    "model": """
        attention_type score_norm value_activation value_depth vocab_size input_size answer_token_id embedding_bias
        pad_token_id hidden_size num_hidden_layers num_attention_heads head_dim value_head_dim qk_norm position_type
        relative_attention_num_buckets is_causal attention_dropout attention_out_multiplier ffn_type intermediate_size
        hidden_act num_experts num_experts_per_tok output_router_logits router_aux_loss_coef norm_type norm_eps num_answers num_labels id2label
        label2id problem_type output_hidden_states chunk_size_feed_forward model_name_or_path revision bos_token_id
        eos_token_id lm_head_bias max_position_embeddings rope_parameters scale_logits sliding_window
        tie_word_embeddings use_cache
    """,
    "trainer": """
        max_steps learning_rate warmup_steps weight_decay max_grad_norm seed full_determinism optim optim_args
        muon_learning_rate muon_learning_rate_qk schedule_floor adam_beta1 adam_beta2 adam_epsilon train_batch_size gradient_accumulation_steps train_sampling_strategy
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor bf16 fp16
        tf32 use_cpu gradient_checkpointing torch_empty_cache_steps cuda_graphs torch_compile torch_compile_backend
        torch_compile_mode ddp_backend ddp_timeout eval_strategy eval_steps eval_delay eval_samples
        per_device_eval_batch_size eval_accumulation_steps save_strategy save_steps save_total_limit logging_strategy
        logging_steps logging_first_step log_level log_level_replica disable_tqdm report_to run_name project
        trackio_space_id trackio_bucket_id push_to_hub hub_model_id hub_private_repo
    """,
    "expect": "metric value tolerance source budget",
}
TASKS = {name: _NAMES[name].split() for name in ("logic", "sraven", "text")}
SETTINGS = {
    "task": ["name", "data", *dict.fromkeys(name for names in TASKS.values() for name in names)],
    **{section: _NAMES[section].split() for section in ("model", "trainer", "expect")},
}
# A name that is this similar to a known one is taken to be misspelt. Keys that a recipe refuses for other reasons are less
# similar to any known name.
_MISSPELT = 0.9


def unknown_argument(word: str, options: Collection[str], sections: Collection[str]) -> str:
    """The error message for an unknown argument of a command that has these options and sections of settings."""
    if not word.startswith("-"):
        return f"Unknown argument {word!r}; see --help."
    section, dot, name = word.partition("=")[0].lstrip("-").partition(".")
    key = section.replace("-", "_")
    if dot:
        name = name.replace("-", "_")
        near = [f"--{close}.{name}" for close in difflib.get_close_matches(section.lower(), sections, n=1)]
    else:
        near = _near_option(key, options) or _near_settings(key, sections)
    if near:
        return f"Unknown argument {word!r} (did you mean {' or '.join(near)}?)."
    expected = " or ".join(f"--{one}.key value" for one in sections)
    return f"Unknown argument {word!r}" + (f": expected {expected}." if expected else "; see --help.")


def _near_option(key: str, options: Collection[str]) -> list[str]:
    by_key = {option.strip("-").replace("-", "_"): option for option in options}
    return [by_key[close] for close in difflib.get_close_matches(key, by_key, n=1, cutoff=0.75)]


def _near_settings(key: str, sections: Collection[str]) -> list[str]:
    """The settings with this name, or else those whose names contain it, or else the one with the nearest name."""
    names = [name for section in sections for name in SETTINGS[section]]
    chosen = (
        [name for name in names if name == key]
        or [name for name in names if len(key) > 3 and key in name][:2]
        or difflib.get_close_matches(key, names, n=1)
    )
    return [f"--{section}.{name}" for section in sections for name in SETTINGS[section] if name in chosen]


def check_settings(overrides: dict[str, str]) -> None:
    """
    Raises:
        ValueError: for a misspelt setting. Other unknown settings are left to the recipe, which knows why it refuses them.
    """
    for full in overrides:
        section, _, name = full.partition(".")
        near = difflib.get_close_matches(name.lower(), SETTINGS[section], n=1, cutoff=_MISSPELT)
        if near and name not in SETTINGS[section]:
            raise ValueError(f"There is no setting --{full} (did you mean --{section}.{near[0]}?).")
