# Copyright 2026 The hf_hyla authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a HylaConfig may hold: limits, settings that contradict each other, and the nearest name of a misspelt one."""

import difflib
import math

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging


logger = logging.get_logger(__name__)

FORMAT_VERSION = 1

# Other ways to say what `rope_parameters` says, which transformers puts there.
ROPE_KEYWORDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")

# Keywords that transformers itself puts into a config without declaring them as fields.
UNDECLARED_KEYWORDS = frozenset((
    "num_labels", "name_or_path", "attn_implementation", "experts_implementation", "output_attentions",
    "per_layer_config", "torch_dtype", "model_type", "auto_map", "custom_pipelines", "quantization_config",
    "tie_last_hidden_states", "tokenizer_class", "sep_token_id", "cls_token_id", "mask_token_id", "_commit_hash",
    *ROPE_KEYWORDS,
))  # fmt: skip

# What models of other families call a field of this one.
_OTHER_NAMES = {
    "d_model": "hidden_size", "n_embd": "hidden_size", "dim": "hidden_size", "embed_dim": "hidden_size",
    "n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers", "depth": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_heads": "num_attention_heads", "nhead": "num_attention_heads",
    "heads": "num_attention_heads", "num_head": "num_attention_heads", "layers": "num_hidden_layers",
    "dim_feedforward": "intermediate_size", "d_ff": "intermediate_size", "n_inner": "intermediate_size", "ffn_dim": "intermediate_size",
    "dropout": "attention_dropout", "attention_probs_dropout_prob": "attention_dropout",
    "layer_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps", "is_decoder": "is_causal",
    "hidden_activation": "hidden_act", "activation_function": "hidden_act",
}  # fmt: skip

# Entries of a stored config whose type transformers does not check.
_CONTAINERS = {
    "id2label": (dict, "an object of ids and names"),
    "label2id": (dict, "an object of names and ids"),
    "auto_map": (dict, "an object of Auto classes and the classes they stand for"),
    "quantization_config": (dict, "an object of settings"),
    "architectures": (list, "a list of names of classes"),
    "output_hidden_states": (bool, "true or false"),
    "chunk_size_feed_forward": (int, "a whole number"),
}

_MAX_SIZE = 10**7
_LARGEST = {"num_hidden_layers": 1000, "num_labels": 10**6}  # a layer takes time to build, and a label has a name
_MAX_WEIGHTS = 10**11

_MINIMUM = {
    "vocab_size": 1,
    "input_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 1,
    "value_head_dim": 1,
    "intermediate_size": 1,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "router_aux_loss_coef": 0,
    "num_answers": 1,
    "max_position_embeddings": 1,
    "sliding_window": 2,
    "norm_eps": 0,
}
# Factors beyond this overflow in float32, together with what they are multiplied by.
_MAX_FACTOR = 1e30
_PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


def check_settings(config) -> None:
    """
    Raises:
        ValueError: for settings out of range or that contradict each other.
    """
    if (config.vocab_size is None) == (config.input_size is None):
        raise ValueError(
            f"Exactly one of vocab_size (for input_ids) and input_size (for input_values) must be set, got "
            f"vocab_size={config.vocab_size} and input_size={config.input_size}: set the other one to None."
        )
    for name, minimum in _MINIMUM.items():
        value = getattr(config, name)
        if value is not None and not (value >= minimum and math.isfinite(value)):
            finite = "" if isinstance(value, int) else " and finite"
            raise ValueError(f"{name} must be at least {minimum}{finite}, got {value}.")
        refuse_too_large(name, value)
    refuse_too_large("relative_attention_num_buckets", config.relative_attention_num_buckets)
    _refuse_too_many_weights(config)
    if config.position_type == "relative" and config.relative_attention_num_buckets < 2:
        raise ValueError(
            f"relative_attention_num_buckets must be at least 2, got {config.relative_attention_num_buckets}."
        )
    if config.position_type == "rotary":
        _check_rotary(config)
    if config.sliding_window is not None and not config.is_causal:
        raise ValueError(
            f"sliding_window={config.sliding_window} needs a causal model: set is_causal=True or sliding_window=None."
        )
    if not config.num_labels:
        raise ValueError(f"num_labels must be at least 1, got {config.num_labels}.")
    if config.problem_type not in _PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {_PROBLEM_TYPES}, got {config.problem_type!r}.")
    if config.format_version != FORMAT_VERSION:
        # If the package is installed, transformers uses it in place of the code beside the weights.
        logger.warning_once(
            f"This model was saved in format {config.format_version}, but the code in use, "
            f"{'which lies beside the weights' if is_remote_code() else 'the installed package hf_hyla'}, reads format "
            f"{FORMAT_VERSION} and may misread it: use the version of hf_hyla that saved the model."
        )
    for name in ("norm_eps", "router_aux_loss_coef", "attention_out_multiplier"):
        if getattr(config, name) > _MAX_FACTOR:
            raise ValueError(f"{name} must be at most {_MAX_FACTOR:.0e}, got {getattr(config, name)!s:.40}.")
    if not 0 <= config.attention_dropout < 1:
        raise ValueError(f"attention_dropout must lie in [0, 1), got {config.attention_dropout}.")
    if not 0 < config.attention_out_multiplier < math.inf:
        raise ValueError(
            f"attention_out_multiplier must be positive and finite, got {config.attention_out_multiplier}."
        )
    for name in ("answer_token_id", "pad_token_id"):
        token = getattr(config, name)
        if token is not None and config.vocab_size is not None and not 0 <= token < config.vocab_size:
            raise ValueError(
                f"{name} must be one of the ids 0 to {config.vocab_size - 1} (vocab_size={config.vocab_size}), got "
                f"{token}: set {name}=None if there is no such token."
            )
    if config.answer_token_id is not None and config.answer_token_id + 1 != config.vocab_size:
        logger.warning_once(
            f"Token id {config.answer_token_id} is the answer slot and its embedding is held at zero; set "
            "answer_token_id=None if it is an ordinary token."
        )
    if config.answer_token_id is not None and config.answer_token_id == config.pad_token_id:
        raise ValueError(f"pad_token_id and answer_token_id are both {config.pad_token_id}: give them different ids.")
    for name, also in (("value_activation", {"none"}), ("hidden_act", set())):
        value = getattr(config, name)
        if value is not None and value not in ACT2FN and value not in also:
            raise ValueError(
                f"{name}={value!r} is not an activation that transformers knows{nearest(value, [*ACT2FN, *also])}."
            )
    if config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"num_experts_per_tok={config.num_experts_per_tok} is more than num_experts={config.num_experts}: a token goes to "
            "each expert once at most."
        )
    generated = config.attention_type == "hyla"
    if config.value_depth == 2 and not generated:
        raise ValueError(
            f"value_depth=2 needs a generated value network, but attention_type={config.attention_type!r} mixes "
            "values: set attention_type='hyla' or value_depth=1."
        )
    if not generated and (config.attention_type == "softmax") != (config.effective_score_norm == "softmax"):
        raise ValueError(
            f"score_norm={config.score_norm!r} does not go with attention_type={config.attention_type!r}: softmax scores "
            "with mixed values are attention_type='softmax', all others are 'linear'."
        )


def _check_rotary(config) -> None:
    parameters, width = config.rope_parameters or {}, config.head_dim or 0
    rope_type = parameters.get("rope_type", "default")
    known = ["default", *ROPE_INIT_FUNCTIONS]
    if not isinstance(rope_type, str) or rope_type not in known:
        raise ValueError(
            f"rope_parameters has rope_type={rope_type!r}, which transformers does not know{nearest(str(rope_type), known)}: "
            f"expected one of {', '.join(known)}."
        )
    for name, value in parameters.items():
        each = value if name in ("short_factor", "long_factor") and isinstance(value, list) else [value]
        is_name = name in ("rope_type", "type", "truncate")  # not numbers: two names of a type, and a switch
        is_left_out = value is None and name not in ("rope_theta", "partial_rotary_factor", "factor")
        if not (is_name or is_left_out or all(type(one) in (int, float) and 0 < one <= _MAX_FACTOR for one in each)):
            raise ValueError(
                f"rope_parameters has {name}={value!r:.40}, expected a number above 0, at most {_MAX_FACTOR:.0e}."
            )
    rotated = int(width * parameters.get("partial_rotary_factor", 1.0))
    if rotated % 2 or not 0 < rotated <= width:
        raise ValueError(
            f"Rotary positions rotate pairs of elements, but here {rotated} of head_dim={width} are rotated: make it "
            "an even number, at least 2 and at most head_dim."
        )
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if factors is not None and (not isinstance(factors, list) or len(factors) != rotated // 2):
            raise ValueError(f"rope_parameters has {name}={factors!r:.40}, expected a list of {rotated // 2} numbers.")


def _refuse_too_many_weights(config) -> None:
    # Checked before memory is allocated, since a file may ask for anything. The largest matrices of every layer are counted.
    heads = config.num_attention_heads * ((config.head_dim or 0) * 2 + (config.value_head_dim or 0) * 2)
    experts = config.num_experts if config.ffn_type == "moe" else 1
    layer = config.hidden_size * (heads + 2 * experts * config.intermediate_size)
    layer += config.num_attention_heads * (config.relative_attention_num_buckets or 0)
    ends = config.hidden_size * ((config.vocab_size or config.input_size or 0) + (config.num_labels or 0))
    weights = config.num_hidden_layers * layer + ends
    if weights > _MAX_WEIGHTS:
        raise ValueError(
            f"This config asks for {weights:.1e} weights, more than the {_MAX_WEIGHTS:.0e} that a model of this family may "
            "have: make its sizes smaller."
        )


def check_containers(entries: dict) -> None:
    """Refuses entries of a stored config, by their names, that are not the kind of object that transformers reads."""
    for name, (kind, words) in _CONTAINERS.items():
        value = entries.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} must be {words}, got {value!r:.60}.")


def check_dtype(dtype) -> None:
    """Refuses a dtype that weights cannot have, before transformers looks it up among all that torch has."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype must name a floating-point type of torch, such as 'float32', got {dtype!r:.40}.")


def refuse_too_large(name: str, value) -> None:
    """Refuses a size that no model of this family has, before memory is allocated for it."""
    largest = _LARGEST.get(name, _MAX_SIZE)
    if isinstance(value, int) and value > largest:
        raise ValueError(f"{name} must be at most {largest}, got {value}.")


def nearest(name: str, known) -> str:
    """The end of a sentence about an unknown name: the known one that was probably meant, or nothing."""
    if _OTHER_NAMES.get(name) in known:
        return f"; did you mean {_OTHER_NAMES[name]!r}?"
    # A part of a field's name, such as num_heads, may have few letters in common with it.
    longer = [field for field in known if set(name.split("_")) < set(field.split("_"))]
    if "_" in name and longer:
        return f"; did you mean {min(longer, key=len)!r}?"
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else ""


def report_unknown_keywords(kwargs: dict, known) -> None:
    """Refuses keywords that are nearly those of a field, and warns of all others that nothing reads."""
    # transformers stores keywords that it does not know, so a typo would silently train the default.
    known = {*known, *UNDECLARED_KEYWORDS}
    for name in kwargs:
        if name in known or name.startswith("_"):
            continue
        if suggestion := nearest(name, known):
            raise ValueError(f"HylaConfig has no field {name!r}{suggestion}")
        logger.warning(f"HylaConfig has no field {name!r}; it is stored, but nothing reads it.")


def is_remote_code() -> bool:
    """Whether this code lies beside the weights, rather than in the installed package."""
    return __name__.startswith("transformers_modules.")
