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
"""The layers of HYLA models: positions, attention, feed-forward, the pre-norm block of the two, and how they are initialised."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_hyla import activation_or_none, eager_attention_forward, relative_position_buckets, rotated
from .backends_hyla import BACKENDS
from .configuration_hyla import HylaConfig
from .functions_cpu_hyla import activated_linear, cpu_functions
from .inputs_hyla import check_is_0_or_1


class HylaRotaryEmbedding(nn.Module):
    """The angles of rotary positions, by transformers' rope utilities, which compute and update the frequencies."""

    def __init__(self, config: HylaConfig):
        super().__init__()
        if not config.rope_parameters:  # `position_type` was set after the config was made
            config.convert_rope_params_to_dict()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def frequencies(self) -> tuple[torch.Tensor, float]:
        """Radians per token (rotated / 2,), and what cosines and sines are multiplied by."""
        if self.rope_type != "default":
            return ROPE_INIT_FUNCTIONS[self.rope_type](self.config)
        parameters = self.config.rope_parameters
        size = int(self.config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        return parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float) / size), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (batch, sequence, rotated) of positions (batch, sequence), in the dtype of `x`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device).float()
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


# What other attention layers call an argument of `HylaAttention`, or what it lacks.
_NAMES_ELSEWHERE = {
    **dict.fromkeys(("past_key_values", "past_key_value", "layer_past"), "pass the cache as cache"),
    **dict.fromkeys(("key_value_states", "encoder_hidden_states"), "it is self-attention, so leave it out"),
    "need_weights": "pass output_attentions=True",
    "position_ids": "pass position_embeddings, as HylaRotaryEmbedding computes them",
}


class HylaAttention(nn.Module):
    """
    Multi-head attention read as a hypernetwork (arXiv 2406.05816, equations 1 to 7), as a layer of HYLA models and as a part
    of any other model: hidden states (batch, sequence, hidden_size) in, the same shape out. It has no residual connection
    and no norm of its input.

    Position biases start at zero and `value_mixing` at the identity. The models of this package initialise all weights again, as
    the reference does.

    Args:
        config (`HylaConfig`): `hidden_size`, `num_attention_heads`, `head_dim` and `value_head_dim` are the sizes. They do
            not depend on each other: `None` for a head's width means `hidden_size / num_attention_heads`. `attention_type`,
            `score_norm`, `value_activation`, `value_depth` and `qk_norm` (with `norm_eps`) say which attention it is.
            `attention_dropout`, 0.1 by default, drops pairs in training. `is_causal` hides later tokens, and
            `sliding_window` all but the nearest earlier ones. With `position_type="relative"`, the default, every head
            learns a bias for each of `relative_attention_num_buckets` distances. `"rotary"` needs `position_embeddings` in
            every call. `"none"` leaves positions to the surrounding model. `attn_implementation` names the implementation, by
            default the fastest. `output_attentions` asks for the codes in every call. The remaining fields concern whole
            models.
        layer_idx (`int`, *optional*, defaults to 0): the number of the layer.

    Raises:
        ValueError: for an `attn_implementation` that HYLA does not have.

    ```python
    >>> import torch
    >>> from hf_hyla import HylaAttention, HylaConfig

    >>> config = HylaConfig(hidden_size=64, num_attention_heads=8, head_dim=None, value_head_dim=None)
    >>> attention = HylaAttention(config)
    >>> tokens = torch.randn(2, 10, 64)
    >>> padding = torch.tensor([[1] * 10, [1] * 7 + [0] * 3])
    >>> output, _ = attention(tokens, attention_mask=padding)
    >>> output.shape
    torch.Size([2, 10, 64])
    >>> _, codes = attention(tokens, attention_mask=padding, output_attentions=True)
    >>> codes.shape  # (batch, heads, query, key)
    torch.Size([2, 8, 10, 10])

    ```
    """

    def __init__(self, config: HylaConfig, layer_idx: int = 0):
        super().__init__()
        if config._attn_implementation not in (None, *BACKENDS):
            # transformers' own would compute softmax attention.
            raise ValueError(
                f"HylaAttention has no attn_implementation {config._attn_implementation!r}: expected one of "
                f"{', '.join(BACKENDS)}."
            )
        self.config = config
        self.layer_idx = layer_idx
        self.attention_type = config.attention_type
        self.score_norm = config.effective_score_norm
        self.value_activation = activation_or_none(config.effective_value_activation)
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.value_head_dim = config.value_head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal

        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, self.num_heads * self.value_head_dim)
        self.o_proj = nn.Linear(self.num_heads * self.value_head_dim, config.hidden_size)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=config.norm_eps, bias=False) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=config.norm_eps, bias=False) if config.qk_norm else nn.Identity()
        self.relative_attention_bias = (
            nn.Parameter(torch.zeros(self.num_heads, config.relative_attention_num_buckets))
            if config.position_type == "relative"
            else None
        )
        self.value_mixing = (
            nn.Parameter(torch.eye(self.value_head_dim).repeat(self.num_heads, 1, 1))
            if config.value_depth == 2
            else None
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_buckets: torch.Tensor | None = None,
        num_last: int | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape (batch, sequence, hidden_size)): the tokens.
            attention_mask (`torch.Tensor`, *optional*): (batch, key), 1 for tokens and 0 for padding; or
                (batch or 1, 1, query, key), see `attended`. A mask of four axes must also hide later tokens in a causal layer.
            position_buckets (`torch.LongTensor` of shape (query + key - 1,), *optional*): see `relative_position_buckets`;
                models compute them once for all layers.
            num_last (`int`, *optional*): the queries are the last `num_last` tokens; by default they are all tokens.
            position_embeddings (*optional*): cosines and sines of rotary positions, as `HylaRotaryEmbedding` computes them.
            cache (`Cache`, *optional*): keys and values of earlier tokens, to which those of the new tokens are added.

        Returns:
            Output (batch, query, hidden_size), and the codes (batch, heads, query, key) with `output_attentions=True`,
            otherwise `None`.

        Raises:
            ValueError: for a mask of the wrong shape, with values other than 0 and 1, or under another name; for arguments of
                other attention layers that this one lacks; and for rotary positions without `position_embeddings`.
        """
        self._check(hidden_states, position_buckets, kwargs)
        batch, length, _ = hidden_states.shape
        queries = hidden_states if num_last is None else hidden_states[:, -num_last:]
        with cpu_functions(hidden_states):
            query, key, value = self.q_proj(queries), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query = self.q_norm(query.view(*queries.shape[:2], self.num_heads, self.head_dim)).transpose(1, 2)
        key = self.k_norm(key.view(batch, length, self.num_heads, self.head_dim)).transpose(1, 2)
        value = value.view(batch, length, self.num_heads, self.value_head_dim).transpose(1, 2)
        if self.config.position_type == "rotary" and position_embeddings is None:
            raise ValueError(
                "A HylaAttention with position_type='rotary' needs position_embeddings, cosines and sines as HylaRotaryEmbedding "
                "computes them: pass them, or choose another position_type."
            )
        if position_embeddings is not None:
            of_queries = tuple(part[:, -queries.shape[1] :] for part in position_embeddings)
            query, key = rotated(query, of_queries), rotated(key, position_embeddings)
        if cache is not None:
            # RMSHead normalises every pair by itself, so keys and values are all that later tokens need.
            key, value = cache.update(key, value, self.layer_idx)

        position_bias = None
        if self.relative_attention_bias is not None:
            if position_buckets is None:
                num_buckets = self.relative_attention_bias.shape[1]
                position_buckets = relative_position_buckets(length, key.shape[2], num_buckets, hidden_states.device)
            # Biases are stored by diagonal. The last queries need the first of them, which count from the last key.
            position_bias = self.relative_attention_bias[:, position_buckets[: queries.shape[1] + key.shape[2] - 1]]
        if attention_mask is None or attention_mask.ndim != 4:
            attention_mask = self._pair_mask(hidden_states, attention_mask, key.shape[2])
        if num_last is not None and attention_mask is not None and attention_mask.shape[2] > 1:
            attention_mask = attention_mask[:, :, -num_last:]

        # Only the eager implementation returns the codes.
        codes_wanted = kwargs.get("output_attentions", self.config.output_attentions)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            "eager" if codes_wanted else self.config._attn_implementation or "hyla", eager_attention_forward
        )
        output, codes = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            position_bias=position_bias,
            **kwargs,
        )
        output = output.flatten(2)
        with cpu_functions(output):
            return self.o_proj(output), codes

    def _check(self, hidden_states, position_buckets, kwargs) -> None:
        if hidden_states.ndim != 3:
            raise ValueError(
                f"HylaAttention takes hidden_states of shape (batch, tokens, {self.config.hidden_size}), got "
                f"{tuple(hidden_states.shape)}."
            )
        if position_buckets is not None and position_buckets.is_floating_point():
            raise ValueError(
                "HylaAttention is self-attention, so it takes hidden_states alone: queries, keys and values are made of them. "
                "Name the other arguments."
            )
        # Arguments by the names that other layers give them would be ignored.
        for name in (name for name, given in kwargs.items() if given is not None):
            if name == "key_padding_mask":
                raise ValueError(
                    "HylaAttention takes padding as attention_mask, where True is a token and not padding: pass "
                    "attention_mask=~key_padding_mask."
                )
            if "mask" in name:
                raise ValueError(f"HylaAttention has no {name}: its only mask is attention_mask, where True attends.")
            if name in _NAMES_ELSEWHERE:
                raise ValueError(f"HylaAttention has no {name}: {_NAMES_ELSEWHERE[name]}.")
        if kwargs.get("is_causal") not in (None, self.is_causal):
            raise ValueError(
                f"This HylaAttention was built with is_causal={self.is_causal}, got is_causal={kwargs['is_causal']}: set it in the "
                "config."
            )

    def _pair_mask(self, hidden_states, attention_mask, num_keys: int) -> torch.Tensor | None:
        """Padding, causality and window as a mask (batch or 1, 1, query or 1, key), which models make once for all layers."""
        batch, length, _ = hidden_states.shape
        if attention_mask is not None:
            if attention_mask.shape != (batch, num_keys):
                raise ValueError(
                    f"attention_mask must have the shape ({batch}, {num_keys}) of the tokens or (batch, 1, query, key), got "
                    f"{tuple(attention_mask.shape)}."
                )
            check_is_0_or_1(attention_mask)
            attention_mask = attention_mask.bool()[:, None, None]
        window = self.config.sliding_window or num_keys
        sees_all = length == 1 and num_keys <= window  # a single query is the last token
        if not self.is_causal or sees_all:
            return attention_mask
        past = num_keys - length
        causal = torch.ones(1, 1, length, num_keys, dtype=torch.bool, device=hidden_states.device)
        causal = causal.tril(past).triu(past - window + 1)
        return causal if attention_mask is None else attention_mask & causal


class HylaMLP(nn.Module):
    def __init__(self, config: HylaConfig):
        super().__init__()
        gated = config.ffn_type == "swiglu"
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=not gated)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False) if gated else None
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=not gated)
        self.act_fn = ACT2FN[config.effective_hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with cpu_functions(hidden_states):
            if self.gate_proj is None:
                return self.down_proj(activated_linear(self.up_proj, self.act_fn, hidden_states))
            return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class HylaRouter(nn.Module):
    """Chooses the experts of every token and their weights, which sum to 1."""

    def __init__(self, config: HylaConfig):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (batch * sequence, experts), and weights (batch, sequence, experts), 0 for experts that were not chosen."""
        logits = self.gate(hidden_states)
        probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        chosen = probabilities.topk(self.num_experts_per_tok, dim=-1)
        shares = chosen.values / chosen.values.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(-1, chosen.indices, shares)
        return logits.flatten(0, 1), weights.to(hidden_states.dtype)


class HylaMoE(nn.Module):
    """A mixture of experts. All experts see all tokens, which compiles, and is cheaper at these sizes than sorting tokens."""

    def __init__(self, config: HylaConfig):
        super().__init__()
        self.router = HylaRouter(config)
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, config.intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.intermediate_size))
        self.act_fn = ACT2FN[config.effective_hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, weights = self.router(hidden_states)
        # Side by side, the experts are one wide layer.
        up_proj, down_proj = self.up_proj.flatten(0, 1), self.down_proj.transpose(0, 1).flatten(1)
        with cpu_functions(hidden_states):
            hidden = self.act_fn(nn.functional.linear(hidden_states, up_proj))
            hidden = hidden.unflatten(-1, self.up_proj.shape[:2]) * weights.unsqueeze(-1)
            return nn.functional.linear(hidden.flatten(-2), down_proj)


class HylaLayer(GradientCheckpointingLayer):
    def __init__(self, config: HylaConfig, layer_idx: int):
        super().__init__()
        norm = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[config.norm_type]
        self.input_layernorm = norm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = HylaAttention(config, layer_idx)
        self.post_attention_layernorm = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = HylaMoE(config) if config.ffn_type == "moe" else HylaMLP(config)
        self.attention_out_multiplier = config.attention_out_multiplier

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_last: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Hidden states of all tokens, or of the last `num_last`, which see all."""
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, num_last=num_last, **kwargs
        )
        if num_last is not None:
            hidden_states = hidden_states[:, -num_last:]
        hidden_states = torch.add(hidden_states, attention_output, alpha=self.attention_out_multiplier)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@torch.no_grad()
def init_weights(module: nn.Module, config: HylaConfig) -> None:
    """The reference's initialisation: lecun normal kernels, biases 0, embeddings normal with 1/sqrt(width)."""
    if isinstance(module, nn.Linear):
        _lecun_normal(module.weight, fan_in=module.in_features)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        if config.embedding_bias:
            # A dense layer on one-hot symbols; the answer slot is no symbol.
            _lecun_normal(module.weight, fan_in=module.num_embeddings - (module.padding_idx is not None))
        else:
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
            init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, HylaRotaryEmbedding):
        frequencies, _ = module.frequencies()
        init.copy_(module.inv_freq, frequencies)
        init.copy_(module.original_inv_freq, frequencies)
    elif isinstance(module, HylaMoE):
        _lecun_normal(module.up_proj, fan_in=module.up_proj.shape[-1])
        _lecun_normal(module.down_proj, fan_in=module.down_proj.shape[-1])
    elif isinstance(module, HylaAttention):
        if module.relative_attention_bias is not None:
            # The reference takes the last axis of the table (heads, buckets) for the fan-in.
            init.normal_(module.relative_attention_bias, std=module.relative_attention_bias.shape[1] ** -0.5)
        if module.value_mixing is not None:
            _lecun_normal(module.value_mixing, fan_in=module.value_head_dim)


def _lecun_normal(tensor: torch.Tensor, fan_in: int) -> None:
    # Cut off at two deviations, and widened by what the cut takes away, so that the deviation is 1/sqrt(fan_in).
    # `init.lecun_normal_` widens, but cuts off at the numbers -2 and 2: its deviation is 14 % too large.
    std = max(fan_in, 1) ** -0.5 / 0.87962566103423978
    init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)
