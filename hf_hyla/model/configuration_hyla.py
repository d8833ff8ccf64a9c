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
"""HylaConfig: every choice that makes a HYLA, linear or softmax attention model."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .card_hyla import fill_in_card
from .config_checks_hyla import (
    FORMAT_VERSION,
    ROPE_KEYWORDS,
    UNDECLARED_KEYWORDS,
    check_containers,
    check_dtype,
    check_settings,
    is_remote_code,
    nearest,
    refuse_too_large,
    report_unknown_keywords,
)


logger = logging.get_logger(__name__)


# The docstring is written by hand, with the paper's terms.
# trf-ignore: TRF057
@strict
class HylaConfig(PreTrainedConfig):
    r"""
    Configuration of the HYLA family of "Attention as a Hypernetwork" (arXiv 2406.05816). The defaults give the paper's
    SRAVEN model with HYLA attention: 402,952 parameters, of which 128 are the answer slot's row of zeros.

    The three attentions and all other rows of the paper's Table A1 are settings of `attention_type`, `score_norm`,
    `value_activation`, `value_depth` and `ffn_type`.

    Args:
        attention_type (`str`, *optional*, defaults to `"hyla"`):
            `"hyla"`: the scores over heads generate a value network per (query, key) pair. `"linear"` and `"softmax"`:
            values are mixed over keys as in ordinary multi-head attention.
        score_norm (`str`, *optional*):
            How scores become codes: `"rms_head"` (divided by their root mean square over heads, for every pair),
            `"softmax"` (over keys) or `"none"`. `None` follows the type: hyla `rms_head`, linear `none`, softmax
            `softmax`.
        value_activation (`str`, *optional*):
            Nonlinearity of the value network, a name known to transformers such as `"relu"`, or `"none"`. `None`
            follows the type: hyla `relu`, the others `none`.
        value_depth (`int`, *optional*, defaults to 1):
            Hidden layers of the generated value network; 2 is the paper's HYLA+.
        vocab_size (`int`, *optional*, defaults to 9):
            Number of token ids, for models that read `input_ids`. Exactly one of `vocab_size` and `input_size` is set.
            A language model needs it.
        input_size (`int`, *optional*):
            Width of one token, for models that read continuous `input_values`.
        answer_token_id (`int`, *optional*, defaults to 8):
            Id of the slot in which an answer is to appear; its embedding is held at zero. `None` for text. Without
            effect where `vocab_size` is `None` and in a language model.
        embedding_bias (`bool`, *optional*, defaults to `True`):
            Whether one bias is added to the embedding of every token, which makes the table equal to a dense layer
            on one-hot symbols. `False` for text. Without effect where `vocab_size` is `None` and in a language model.
        pad_token_id (`int`, *optional*):
            Id of padding. Tells the classification head where a sequence ends when no attention mask is given.
        bos_token_id (`int`, *optional*):
            Id with which a text begins, for `generate`.
        eos_token_id (`int` or `list[int]`, *optional*):
            Id, or ids, at which `generate` ends a text.
        hidden_size (`int`, *optional*, defaults to 128):
            Width of the residual stream.
        num_hidden_layers (`int`, *optional*, defaults to 4):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of heads, which is the width of the latent code.
        head_dim (`int`, *optional*, defaults to 4):
            Width of queries and keys per head. `None` means `hidden_size / num_attention_heads`.
        value_head_dim (`int`, *optional*, defaults to 4):
            Width of values per head. `None` means `hidden_size / num_attention_heads`.
        qk_norm (`bool`, *optional*, defaults to `False`):
            Whether queries and keys pass a LayerNorm without bias over the head width, its scale shared by all heads.
        position_type (`str`, *optional*, defaults to `"relative"`):
            `"relative"`: every layer adds a learnt bias per head and distance bucket to its scores. `"rotary"`: queries
            and keys are rotated by angles that grow with their position. `"none"`: no positions.
        relative_attention_num_buckets (`int`, *optional*, defaults to 36):
            Number of distance buckets. All distances from this number on share the last bucket.
        rope_parameters (`dict`, *optional*):
            Parameters of rotary positions, as everywhere in transformers: `rope_theta` (defaults to 10,000), `rope_type`
            (`"default"` or a scaling type such as `"linear"`, `"dynamic"`, `"yarn"`, `"longrope"` or `"llama3"`) and what
            that type needs. `partial_rotary_factor` is the share of each head that is rotated.
        max_position_embeddings (`int`, *optional*, defaults to 2048):
            Number of tokens that rotary positions are meant for, which the scaling types start from. Other positions have
            no limit.
        is_causal (`bool`, *optional*, defaults to `False`):
            Whether a query sees only its own and earlier keys. Always `True` in a language model.
        sliding_window (`int`, *optional*):
            Number of keys, including its own, that a query of a causal model sees. A cache then keeps no more keys. `None`
            means all.
        attention_dropout (`float`, *optional*, defaults to 0.1):
            Probability of dropping a (query, key) pair, for the whole batch and all heads at once.
        attention_out_multiplier (`float`, *optional*, defaults to 1.0):
            Factor by which the output of attention is multiplied before it is added to the hidden states. It is not in the
            paper. If scores are not normalised over keys, outputs grow with the number of keys and heads. In the
            paper's model, the outputs of HYLA are tens of times as large as those of softmax attention when training starts.
        ffn_type (`str`, *optional*, defaults to `"mlp"`):
            Feed-forward: `"mlp"` (with biases), `"swiglu"` (without), or `"moe"`, a mixture of experts (without).
        intermediate_size (`int`, *optional*, defaults to 256):
            Width of the feed-forward, and of every expert.
        hidden_act (`str`, *optional*):
            Nonlinearity of the feed-forward. `None` follows `ffn_type`: swiglu `silu`, the others `gelu_pytorch_tanh`.
        num_experts (`int`, *optional*, defaults to 4):
            Number of experts of a mixture. The paper gives neither this nor the next number, so both are our choice.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Number of experts that a token is sent to.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether a mixture returns the routers' logits and the load-balancing loss, and adds the latter to the loss.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the load-balancing loss.
        norm_type (`str`, *optional*, defaults to `"layer_norm"`):
            Norm inside the layers, `"layer_norm"` or `"rms_norm"`. The final norm is always a LayerNorm.
        norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of every LayerNorm and RMSNorm. RMSHead has its own, 1e-6.
        num_answers (`int`, *optional*, defaults to 4):
            How many of the last tokens carry an answer of the classification head.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether a language model's head shares its weights with the token embeddings.
        lm_head_bias (`bool`, *optional*, defaults to `False`):
            Whether the head of a language model adds a bias.
        scale_logits (`bool`, *optional*):
            Whether the logits of a language model are divided by the square root of `hidden_size`. `None` follows
            `tie_word_embeddings`, as in the reference.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether a causal model returns the keys and values of its layers for later tokens. In training it does so only if
            it is given a cache.
        format_version (`int`, *optional*, defaults to 1):
            Version of the weights' layout and meaning. It rises when older code would misread newer weights.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for settings of the wrong type or that contradict each other.
        ValueError: for a misspelt field, with the nearest name.

    ```python
    >>> from hf_hyla import HylaConfig, HylaForSequenceClassification

    >>> model = HylaForSequenceClassification(HylaConfig())
    >>> model.num_parameters()
    402952

    ```"""

    model_type = "hyla"
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}  # which every type takes
    keys_to_ignore_at_inference = ["aux_loss", "router_logits", "cache", "past_key_values"]

    attention_type: Literal["hyla", "linear", "softmax"] = "hyla"
    score_norm: Literal["rms_head", "softmax", "none"] | None = None
    value_activation: str | None = None
    value_depth: Literal[1, 2] = 1

    vocab_size: int | None = 9
    input_size: int | None = None
    answer_token_id: int | None = 8
    embedding_bias: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 16
    head_dim: int | None = 4
    value_head_dim: int | None = 4
    qk_norm: bool = False
    position_type: Literal["relative", "rotary", "none"] = "relative"
    relative_attention_num_buckets: int = 36
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    is_causal: bool = False
    sliding_window: int | None = None
    attention_dropout: float | int = 0.1
    attention_out_multiplier: float | int = 1.0

    ffn_type: Literal["mlp", "swiglu", "moe"] = "mlp"
    intermediate_size: int = 256
    hidden_act: str | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 2
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.01
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float | int = 1e-6

    num_answers: int = 4
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    scale_logits: bool | None = None
    use_cache: bool = True
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        report_unknown_keywords(kwargs, known=self.__dataclass_fields__)
        names = ("id2label", "label2id", "output_hidden_states", "chunk_size_feed_forward")
        check_containers({name: getattr(self, name) for name in names})
        ids = list(self.id2label or ())
        if not all(str(key).isdecimal() for key in ids):
            raise ValueError(f"id2label must have ids as its keys, got {ids!s:.60}: does it hold label2id?")
        for dtype in (self.dtype, kwargs.get("torch_dtype")):
            check_dtype(dtype)
        if self.id2label is None:
            num_labels = kwargs.setdefault("num_labels", 8)
            if type(num_labels) is not int or num_labels < 1:
                raise ValueError(f"num_labels must be at least 1, and a whole number, got {num_labels!r:.40}.")
            refuse_too_large("num_labels", num_labels)
        if self.vocab_size is None:
            self.answer_token_id, self.embedding_bias = None, False
        # Every class can be loaded from every repository, whichever class was saved. The entries are set each time, since
        # transformers points those of a downloaded config back to the repository that they came from.
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_hyla.HylaConfig",
            "AutoModel": "modeling_hyla.HylaModel",
            "AutoModelForCausalLM": "modeling_hyla.HylaForCausalLM",
            "AutoModelForSequenceClassification": "modeling_hyla.HylaForSequenceClassification",
        }
        # transformers would ask for permission to run the repository's pipeline even if the package has registered its own.
        kwargs.pop("custom_pipelines", None)
        if is_remote_code():
            kwargs["custom_pipelines"] = _custom_pipelines()
        super().__post_init__(**kwargs)

        for name in ("head_dim", "value_head_dim"):
            if getattr(self, name) is None:
                if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                    raise ValueError(
                        f"{name}=None means hidden_size / num_attention_heads, but {self.hidden_size} is not a multiple "
                        f"of {self.num_attention_heads}: set {name}, or change one of the two."
                    )
                setattr(self, name, self.hidden_size // self.num_attention_heads)

    def convert_rope_params_to_dict(self, **kwargs) -> dict:
        """As transformers', for rotary positions; the others have no such parameters."""
        if self.position_type == "rotary":
            # A copy, since transformers writes defaults into it.
            self.rope_parameters = dict(self.rope_parameters or {})
            return super().convert_rope_params_to_dict(**kwargs)
        given = [name for name in ROPE_KEYWORDS if kwargs.get(name) is not None]
        if self.rope_parameters or given:
            raise ValueError(
                f"{(given or ['rope_parameters'])[0]} is for rotary positions, but position_type={self.position_type!r}: set "
                "position_type='rotary', or leave it out."
            )
        return kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        As transformers'. Entries that are no fields are kept as attributes, with a warning, since a config stores every attribute
        that was set on it.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"A config must be an object of names and values, got {type(config_dict).__name__}.")
        check_containers(config_dict)
        for name in config_dict:
            if callable(getattr(cls, name, None)):
                raise ValueError(f"A config cannot set {name!r}, which is a method of HylaConfig: remove it.")
        known = {*cls.__dataclass_fields__, *UNDECLARED_KEYWORDS}
        unread = {name: value for name, value in config_dict.items() if name not in known and name[:1] != "_"}
        config_dict = {name: value for name, value in config_dict.items() if name not in unread}
        found = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        for name, value in unread.items():
            logger.warning(
                f"HylaConfig has no field {name!r}{nearest(name, known)}; it is kept, but nothing reads it."
            )
            setattr(config, name, value)
        return found

    def to_dict(self) -> dict:
        # transformers puts classes, which are not JSON, into the entry of the config that it loads a pipeline by.
        return super().to_dict() | {"custom_pipelines": _custom_pipelines()}

    def to_diff_dict(self) -> dict:
        # transformers does not write its default of two labels, and reading would then give our default of eight.
        return super().to_diff_dict() | {"id2label": self.id2label, "label2id": self.label2id}

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        fill_in_card(working_dir, repo_id, self)  # private, see HylaPreTrainedModel
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @property
    def effective_score_norm(self) -> str:
        """`score_norm`, or what follows from `attention_type` where it is `None`."""
        return self.score_norm or {"hyla": "rms_head", "linear": "none", "softmax": "softmax"}[self.attention_type]

    @property
    def effective_value_activation(self) -> str:
        """`value_activation`, or what follows from `attention_type` where it is `None`; `"none"` is the identity."""
        return self.value_activation or ("relu" if self.attention_type == "hyla" else "none")

    @property
    def effective_hidden_act(self) -> str:
        """`hidden_act`, or what follows from `ffn_type` where it is `None`."""
        return self.hidden_act or ("silu" if self.ffn_type == "swiglu" else "gelu_pytorch_tanh")

    @property
    def effective_scale_logits(self) -> bool:
        """`scale_logits`, or what follows from `tie_word_embeddings` where it is `None`."""
        return self.tie_word_embeddings if self.scale_logits is None else self.scale_logits

    def validate_architecture(self):
        """Called by `@strict` after every construction; refuses settings that contradict each other."""
        check_settings(self)

    def validate_rope(self):
        """As transformers', but a missing parameter raises a ValueError, which callers expect, in place of a KeyError."""
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: add them.") from None


def _custom_pipelines() -> dict[str, dict]:
    implementation = "pipeline_hyla.SymbolicReasoningPipeline"
    return {"symbolic-reasoning": {"impl": implementation, "pt": ["AutoModelForSequenceClassification"]}}


HylaConfig.register_for_auto_class()

__all__ = ["HylaConfig"]
