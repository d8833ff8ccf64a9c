"""Conversion of the official JAX implementation's parameters into a HYLA checkpoint.

The official release (github.com/smonsays/hypernetwork-attention, commit af9805f) stores a flat tree of arrays named by
module, and a `TransformerConfig`. Its kernels are (input, output), with heads as a separate axis.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

from .model import HylaConfig, HylaForCausalLM, HylaForSequenceClassification
from .reading import read_json


PREFIX = "params."

# The settings of HylaConfig for each official name of an attention in Table A1.
SEQUENCE_MIXERS: dict[str, dict[str, str]] = {
    "softmax_attention": {"attention_type": "softmax"},
    "linear_attention": {"attention_type": "linear"},
    "linear_attention_rms_head": {"attention_type": "linear", "score_norm": "rms_head"},
    "linear_hypatt": {"attention_type": "hyla"},
    "linear_hypatt_no_rms_head": {"attention_type": "hyla", "score_norm": "none"},
    "linear_hypatt_mlp_linear": {"attention_type": "hyla", "value_activation": "none"},
    "linear_hypatt_mlp_linear_no_rms_head": {
        "attention_type": "hyla",
        "score_norm": "none",
        "value_activation": "none",
    },
    "softmax_hypatt": {"attention_type": "hyla", "score_norm": "softmax"},
}
STATE_MIXERS = {"gelu_mlp": "mlp", "swiglu": "swiglu"}
NORMS = {"layer": "layer_norm", "rms": "rms_norm"}

# The model of each official loss.
LOSSES = {
    "SymbolicRavenLoss": HylaForSequenceClassification,
    "FuzzyLogicLoss": HylaForSequenceClassification,
    "AutoregressiveCrossEntropy": HylaForCausalLM,
}

# Fields with a limited choice of supported values, and the reason that an error gives for it.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "block_type": (("default",), "other block types have no counterpart in HylaModel"),
    "use_absolute_position": ((False,), "absolute positions are not supported"),
    "share_params_over_layers": ((False,), "layers that share parameters are not supported"),
    "dropout_rate": ((0, 0.0), "only attention_dropout_rate is supported"),
    "moe_num": ((None, -1), "mixtures of experts are not supported"),
    "moe_top_k": ((None, -1), "mixtures of experts are not supported"),
}


def convert_config(
    official: Mapping[str, Any], *, loss_fn: str, embedding_rows: int, num_answers: int | None = None
) -> HylaConfig:
    """
    The `HylaConfig` for an official `TransformerConfig`.

    Args:
        official: the fields of the official config by name.
        loss_fn: the official loss, one of `LOSSES`, which determines the model's task.
        embedding_rows: input width of the official embedding layer.
        num_answers: number of last tokens that carry an answer; `None` for 4 on SRAVEN and 1 on logic. A language model has
            none.

    Raises:
        ValueError: for a missing field or an unsupported value. The message names the field.
    """
    for name, (allowed, why) in _ONLY.items():
        value = official.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"The official config has {name}={value!r}, but {why}: only {allowed[0]!r} can be converted."
            )

    def field(name: str) -> Any:
        if name not in official:
            raise ValueError(
                f"The official config lacks the field {name!r}: pass all fields of its TransformerConfig."
            )
        return official[name]

    def count(name: str) -> int:
        value = field(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"The official config has {name}={value!r}, but it must be a positive integer.")
        return value

    def one_of(name: str, known: Mapping[str, Any]) -> Any:
        value = field(name)
        if not isinstance(value, str) or value not in known:
            raise ValueError(
                f"The official config has {name}={value!r}, which is not supported: expected {_any_of(known)}."
            )
        return known[value]

    num_heads = count("num_heads")
    for name in ("qk_dim", "v_dim"):
        if count(name) % num_heads:
            raise ValueError(
                f"The official config has {name}={field(name)}, which does not divide into num_heads={num_heads} heads."
            )
    if not isinstance(loss_fn, str) or loss_fn not in LOSSES:
        raise ValueError(f"loss_fn={loss_fn!r} is not supported: expected {_any_of(LOSSES)}.")
    is_language = LOSSES[loss_fn] is HylaForCausalLM
    is_untied = is_language and type(field("output_dim")) is int and field("output_dim") > 0
    for name, must, needed in (
        ("vocab_size", is_language, bool(official.get("vocab_size"))),
        ("use_causal_mask", True, not is_language or field("use_causal_mask")),
    ):
        if must != needed:
            raise ValueError(
                f"The official config has {name}={official.get(name)!r}, which does not go with loss_fn={loss_fn!r}."
            )
    if is_language and num_answers is not None:
        raise ValueError(
            f"num_answers={num_answers} is for puzzles and truth tables, but {loss_fn} belongs to a language model."
        )
    if is_untied and field("output_dim") != count("vocab_size"):
        raise ValueError(
            f"The official config has output_dim={field('output_dim')} and vocab_size={field('vocab_size')}, but a language model "
            "answers with the tokens that it reads: only equal numbers, or output_dim=-1, can be converted."
        )
    head: dict[str, Any]
    if is_language:
        head = {
            "vocab_size": count("vocab_size"),
            "answer_token_id": None,
            "embedding_bias": False,
            "bos_token_id": 0,  # what the loss puts before a text
            # The official head is either the table, with its logits divided, or a dense layer of its own with a bias.
            "tie_word_embeddings": not is_untied,
            "lm_head_bias": is_untied,
        }
    elif loss_fn == "FuzzyLogicLoss":
        head = {
            "vocab_size": None,
            "input_size": embedding_rows,
            "num_answers": 1 if num_answers is None else num_answers,
            "problem_type": "regression",
            "num_labels": count("output_dim"),
        }
    else:
        head = {
            "vocab_size": embedding_rows + 1,
            "answer_token_id": embedding_rows,
            "num_answers": 4 if num_answers is None else num_answers,
            "problem_type": "single_label_classification",
            "num_labels": count("output_dim"),
            "id2label": {value: str(value) for value in range(count("output_dim"))},
            "label2id": {str(value): value for value in range(count("output_dim"))},
        }
    positions: dict[str, Any] = {"position_type": "none"}
    if field("use_relative_position"):
        positions = {
            "position_type": "relative",
            "relative_attention_num_buckets": count("relative_position_max_dist"),
        }
    try:
        return HylaConfig(
            **head,
            **one_of("sequence_mixer", SEQUENCE_MIXERS),
            **positions,
            architectures=[LOSSES[loss_fn].__name__],
            hidden_size=count("emb_dim"),
            num_hidden_layers=count("num_layers"),
            num_attention_heads=num_heads,
            head_dim=field("qk_dim") // num_heads,
            value_head_dim=field("v_dim") // num_heads,
            qk_norm=field("normalize_qk"),
            is_causal=field("use_causal_mask"),
            attention_dropout=field("attention_dropout_rate"),
            ffn_type=one_of("state_mixer", STATE_MIXERS),
            intermediate_size=count("mlp_dim"),
            norm_type=one_of("norm", NORMS),
        )
    except StrictDataclassError as error:
        raise ValueError(f"The official config cannot be converted: {' '.join(str(error).split())}") from None


def convert_parameters(params: Mapping[str, torch.Tensor], config: HylaConfig) -> dict[str, torch.Tensor]:
    """
    The state dict of the model that `config.architectures` names, from official parameters.

    The conversion only reshapes, transposes and pads. Gradients flow through it, and gradients can be converted like
    parameters.

    Args:
        params: official tensors by path, without prefix, such as `"transformer_block_0.norm1.scale"`.

    Raises:
        ValueError: for a missing, unexpected or wrongly shaped tensor. The message gives its official name.
    """
    left = dict(params)

    def take(path: str, axes: int = 1) -> torch.Tensor:
        if path not in left:
            raise ValueError(f"The official parameters lack {PREFIX}{path}, which this config needs.")
        tensor = left.pop(path)
        if tensor.ndim != axes:
            raise ValueError(f"{PREFIX}{path} must have {axes} axes, got the shape {tuple(tensor.shape)}.")
        return tensor

    def dense(theirs: str, ours: str, bias: bool = True, inputs: int = 1, outputs: int = 1) -> dict[str, torch.Tensor]:
        # Official kernels are (inputs..., outputs...), with heads as a separate axis. Ours are (outputs, inputs).
        kernel = take(f"{theirs}.kernel", axes=inputs + outputs)
        state = {f"{ours}.weight": kernel.flatten(0, inputs - 1).flatten(1).T}
        if bias:
            state[f"{ours}.bias"] = take(f"{theirs}.bias", axes=outputs).flatten()
        return state

    def norm(theirs: str, ours: str, bias: bool = True) -> dict[str, torch.Tensor]:
        state = {f"{ours}.weight": take(f"{theirs}.scale")}
        if bias:
            state[f"{ours}.bias"] = take(f"{theirs}.bias")
        return state

    state: dict[str, torch.Tensor] = {}
    model_class = model_of(config)
    if model_class is HylaForCausalLM:
        state["model.embed_tokens.weight"] = take("embedding.embedding", axes=2)
    elif config.vocab_size is None:
        state |= dense("embedding", "model.input_proj")
    else:
        table = take("embedding.kernel", axes=2)
        state["model.embed_tokens.weight"] = torch.cat([table, table.new_zeros(1, table.shape[1])])
        state["model.embed_bias"] = take("embedding.bias")
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"transformer_block_{layer}", f"model.layers.{layer}"
        has_bias = config.norm_type == "layer_norm"
        state |= norm(f"{theirs}.norm1", f"{ours}.input_layernorm", bias=has_bias)
        state |= norm(f"{theirs}.norm2", f"{ours}.post_attention_layernorm", bias=has_bias)
        if config.position_type == "relative":
            state[f"{ours}.self_attn.relative_attention_bias"] = take(
                f"{theirs}.relative_embedding.rel_embedding", axes=2
            )
        for their_name, our_name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            state |= dense(f"{theirs}.sequence_mixer.{their_name}", f"{ours}.self_attn.{our_name}", outputs=2)
        state |= dense(f"{theirs}.sequence_mixer.out", f"{ours}.self_attn.o_proj", inputs=2)
        if config.qk_norm:
            state |= norm(f"{theirs}.sequence_mixer.query_ln", f"{ours}.self_attn.q_norm", bias=False)
            state |= norm(f"{theirs}.sequence_mixer.key_ln", f"{ours}.self_attn.k_norm", bias=False)
        if config.ffn_type == "mlp":
            state |= dense(f"{theirs}.state_mixer.Dense_0", f"{ours}.mlp.up_proj")
            state |= dense(f"{theirs}.state_mixer.Dense_1", f"{ours}.mlp.down_proj")
        else:
            state |= dense(f"{theirs}.state_mixer.Dense_0", f"{ours}.mlp.gate_proj", bias=False)
            state |= dense(f"{theirs}.state_mixer.Dense_1", f"{ours}.mlp.up_proj", bias=False)
            state |= dense(f"{theirs}.state_mixer.Dense_2", f"{ours}.mlp.down_proj", bias=False)
    state |= norm("decoder_norm", "model.norm")
    if model_class is not HylaForCausalLM:
        state |= dense("logitdense", "classifier")
    elif config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    else:
        state |= dense("logitdense", "lm_head")
    if left:
        raise ValueError(
            f"The config has no place for the official parameter {PREFIX}{min(left)}: do the two belong together?"
        )

    with torch.device("meta"):
        expected = model_class(config).state_dict()
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"The official parameter for {name} has the shape {tuple(tensor.shape)} after conversion, but the config "
                f"makes it {tuple(expected[name].shape)}: do the two belong together?"
            )
    return {name: tensor.contiguous() for name, tensor in state.items()}


def model_of(config: HylaConfig) -> type[HylaForSequenceClassification] | type[HylaForCausalLM]:
    """The class of the model that a converted config describes."""
    return HylaForCausalLM if config.architectures == [HylaForCausalLM.__name__] else HylaForSequenceClassification


def convert(
    params: Mapping[str, Any], config: Mapping[str, Any], *, loss_fn: str, num_answers: int | None = None
) -> tuple[HylaConfig, dict[str, torch.Tensor]]:
    """
    Converts official parameters and config fields into `(HylaConfig, state_dict)`.

    Args:
        params: arrays or tensors named `params.<path>`. Other names are ignored.
        config: the fields of the official `TransformerConfig`.
        loss_fn, num_answers: see [`convert_config`].

    Raises:
        ValueError: see [`convert_config`] and [`convert_parameters`].
    """
    official = {
        name.removeprefix(PREFIX): torch.as_tensor(array) for name, array in params.items() if name.startswith(PREFIX)
    }
    if not official:
        raise ValueError(f"There are no official parameters: no tensor's name begins with {PREFIX!r}.")
    table = "embedding.embedding" if LOSSES.get(loss_fn) is HylaForCausalLM else "embedding.kernel"
    if table not in official:
        raise ValueError(f"The official parameters lack {PREFIX}{table}, which a model with loss_fn={loss_fn!r} has.")
    if official[table].ndim != 2:
        raise ValueError(f"{PREFIX}{table} must have 2 axes, got {tuple(official[table].shape)}.")
    hyla_config = convert_config(
        config, loss_fn=loss_fn, embedding_rows=official[table].shape[0], num_answers=num_answers
    )
    return hyla_config, convert_parameters(official, hyla_config)


def convert_files(params: Path, config: Path, output: Path, num_answers: int | None = None) -> None:
    """
    Converts files into a folder that `from_pretrained` loads.

    Args:
        params: safetensors file with tensors `params.<path>`.
        config: JSON file with the official fields under `config` and the name of the loss under `loss_fn`. If `params` holds
            no parameters, the error names this file's `params_file`.
        output: folder to write.
        num_answers: see [`convert_config`].

    Raises:
        ValueError: see [`convert`].
        OSError: if a file cannot be read or written.
    """
    try:
        description = read_json(config)
        tensors = load_file(params)
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}.") from None
    except SafetensorError as error:
        raise ValueError(f"{params} is not a safetensors file: {error}.") from None
    for key, kind in (("config", dict), ("loss_fn", str)):
        if not isinstance(description, dict) or not isinstance(description.get(key), kind):
            raise ValueError(
                f"{config} has no {key!r}: expected the official config under 'config' and its 'loss_fn'."
            )
    if not any(name.startswith(PREFIX) for name in tensors):
        hint = f": they are in {description['params_file']}" if description.get("params_file") else ""
        raise ValueError(f"{params} holds no tensor named {PREFIX}<path>{hint}; pass the file with the parameters.")
    hyla_config, state_dict = convert(
        tensors, description["config"], loss_fn=description["loss_fn"], num_answers=num_answers
    )
    output.mkdir(parents=True, exist_ok=True)
    model = model_of(hyla_config)(hyla_config)
    model.load_state_dict(state_dict)
    model.save_pretrained(output)


def _any_of(names) -> str:
    return "one of " + ", ".join(repr(name) for name in names)
