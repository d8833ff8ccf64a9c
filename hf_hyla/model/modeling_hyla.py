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
"""HYLA models: the stack of layers, and its two heads, for classification and for language."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.compiler import is_exporting
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_hyla import relative_position_buckets
from .backends_hyla import BACKENDS, FORMER_NAME
from .card_hyla import fill_in_card
from .config_checks_hyla import check_settings
from .configuration_hyla import HylaConfig
from .functions_cpu_hyla import cpu_functions
from .inputs_hyla import (
    CACHE_NAME,
    answer_states,
    check_given,
    check_ids,
    check_one_sequence_a_row,
    check_width,
    first_query,
    one_cache,
    pair_mask,
)
from .layers_hyla import HylaAttention, HylaLayer, HylaRotaryEmbedding, HylaRouter, init_weights
from .losses_hyla import add_balancing_loss, balancing_loss, classification_loss
from .pipeline_hyla import SymbolicReasoningPipeline


logger = logging.get_logger(__name__)

# Deliberate deviations from transformers-mlinter's rules, here and below. TRF057: docstrings are written by hand, with shapes and
# the paper's equations. TRF041: each of these fields is a row of the paper's Table A1, one of its two tasks, or an option of
# the official implementation. TRF051: whoever asks for the eager implementation wants every token computed.
# trf-ignore: TRF041 config.vocab_size, config.embedding_bias, config.position_type, config.is_causal, config.num_answers, config.scale_logits


# trf-ignore: TRF057
@dataclass
class HylaSequenceClassifierOutput(SequenceClassifierOutput):
    """`SequenceClassifierOutput` and, for mixtures of experts on request, `router_logits` and their balancing loss."""

    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


# trf-ignore: TRF057
class HylaPreTrainedModel(PreTrainedModel):
    config: HylaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HylaLayer"]
    _can_record_outputs = {
        "hidden_states": HylaLayer,
        "attentions": HylaAttention,
        "router_logits": OutputRecorder(HylaRouter, index=0),
    }
    # HYLA mixes heads and RMSHead normalises over them, so neither heads nor sequence can be split over devices.
    _supports_context_parallel = False
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _can_compile_fullgraph = True

    def __init__(self, config: HylaConfig, *args, **kwargs):
        # Again, since `from_pretrained` and users change a config that has been built, and saving would refuse it only later.
        check_settings(config)
        super().__init__(config, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """
        The default is `"hyla"`, which chooses one of the others. transformers' own functions would compute a different attention.

        Raises:
            ValueError: for a name that is not in `BACKENDS`.
        """
        name = "hyla" if requested_attention is None else requested_attention
        if name not in BACKENDS:
            raise ValueError(
                f"HYLA models have no attn_implementation {name!r}: expected one of {', '.join(BACKENDS)}."
            )
        if name == FORMER_NAME:
            logger.warning_once(f"The name {name!r} is deprecated: write 'hyla_chunked'.")
        return name

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        See `PreTrainedModel.resize_token_embeddings`.

        Raises:
            ValueError: if the token of the answers would go.
        """
        answer = self.config.answer_token_id
        kept = new_num_tokens if new_num_tokens is not None else self.config.vocab_size
        if pad_to_multiple_of and kept is not None:
            kept = -(-kept // pad_to_multiple_of) * pad_to_multiple_of
        if answer is not None and kept is not None and kept <= answer:
            raise ValueError(
                f"{kept} tokens would leave out the token {answer} that marks the answers (answer_token_id): keep at least "
                f"{answer + 1}."
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        # Private to transformers (5.17 and later). No other step before the upload is shared by push_to_hub and save_pretrained.
        fill_in_card(working_dir, repo_id, self.config, self)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    # Every kind of module is initialised by `init_weights`, none by the base class.
    # trf-ignore: TRF018
    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        init_weights(module, self.config)
        if isinstance(module, HylaModel) and module.embed_bias is not None:
            init.zeros_(module.embed_bias)

    def _computes_last_only(self, kwargs) -> bool:
        """
        Whether the last layer may be computed for the last tokens alone. It may not if all tokens were asked for, and not in the
        eager implementation, which takes no shortcut.
        """
        recorded = any(
            kwargs.get(name, getattr(self.config, name))
            for name in ("output_hidden_states", "output_attentions", "output_router_logits")
        )
        # trf-ignore: TRF051
        return not recorded and self.config._attn_implementation != "eager"


# trf-ignore: TRF057
class HylaModel(HylaPreTrainedModel):
    """The stack of layers with its final LayerNorm, without a head."""

    def __init__(self, config: HylaConfig):
        super().__init__(config)
        self.embed_tokens = self.input_proj = self.embed_bias = None
        if config.vocab_size is not None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.answer_token_id)
            if config.embedding_bias:
                self.embed_bias = nn.Parameter(torch.zeros(config.hidden_size))
        else:
            self.main_input_name = "input_values"
            self.input_proj = nn.Linear(config.input_size, config.hidden_size)
        self.layers = nn.ModuleList([HylaLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.rotary_emb = HylaRotaryEmbedding(config) if config.position_type == "rotary" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens if self.embed_tokens is not None else self.input_proj

    def set_input_embeddings(self, value: nn.Module):
        if self.embed_tokens is not None:
            self.embed_tokens = value
        else:
            self.input_proj = value

    # trf-ignore: TRF057
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        num_last: int | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape (batch, sequence), *optional*):
                Token ids, for models with `vocab_size`.
            attention_mask (`torch.Tensor`, *optional*):
                (batch, key), 1 for tokens and 0 for padding; or (batch, 1, query, key): True, the integer 1 or
                the float 0.0 attends; False, the integer 0 or a negative float does not. Causal models also mask
                later keys. The keys are the tokens in the cache, if there is one, and the new tokens.
            inputs_embeds (`torch.FloatTensor` of shape (batch, sequence, hidden_size), *optional*):
                What `get_input_embeddings()` would return for the inputs.
            input_values (`torch.FloatTensor` of shape (batch, sequence, input_size), *optional*):
                Continuous tokens, for models with `input_size`.
            num_last (`int`, *optional*):
                Compute the last layer only for this many last tokens, if nothing reads the other ones.
            position_ids (`torch.LongTensor` of shape (batch or 1, sequence), *optional*):
                Positions of the tokens, which count up by one. In a causal model without mask and cache they may start
                again within a row, where another sequence begins. Rotary positions are taken from here; without
                `position_ids` they count from the first token of the row. Relative positions are always distances
                within the row.
            cache (`Cache`, *optional*):
                Keys and values of earlier tokens, for a causal model. Those of the new tokens are added to it.
            use_cache (`bool`, *optional*):
                Whether a causal model returns a cache if it is not given one. By default the config's `use_cache`. In
                training and in exported programs it never does.
            past_key_values (`Cache`, *optional*):
                What `cache` is called before transformers 5.24. Both names are accepted with every version.

        Returns:
            `MoeModelOutputWithPast` with `last_hidden_state` (batch, sequence or num_last, hidden_size), and the cache of a
            causal model, as `cache` or, before transformers 5.24, `past_key_values`; on request `hidden_states`,
            `attentions`, a tuple of the latent codes of each layer (batch, heads, query, key), and `router_logits`.

        Raises:
            ValueError: for inputs that are missing or do not fit. The message says which were expected.
        """
        cache = one_cache(self.config, self.layers, cache, past_key_values)
        hidden_states = self._embed(input_ids, input_values, inputs_embeds)
        check_one_sequence_a_row(self.config, hidden_states, attention_mask, position_ids, cache, kwargs)
        mask = pair_mask(self.config, hidden_states, attention_mask, position_ids, cache)
        positions = self._positions(hidden_states, position_ids, cache)
        if use_cache and cache is None and self.config.is_causal and not self.training and not is_exporting():
            cache = DynamicCache(config=self.config)
        for number, layer in enumerate(self.layers, start=1):
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                num_last=num_last if number == len(self.layers) else None,
                cache=cache,
                **positions,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _positions(self, hidden_states, position_ids, cache) -> dict[str, torch.Tensor | tuple]:
        """The layers' arguments for positions: buckets of distances by diagonal, or angles."""
        if self.config.position_type == "relative":
            place, num_keys = first_query(hidden_states, cache)
            num_buckets = self.config.relative_attention_num_buckets
            length, device = hidden_states.shape[1], hidden_states.device
            return {"position_buckets": relative_position_buckets(length, num_keys, num_buckets, device, place)}
        if self.rotary_emb is None:
            return {}
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        return {"position_embeddings": self.rotary_emb(hidden_states, position_ids)}

    def _embed(self, input_ids, input_values, inputs_embeds) -> torch.Tensor:
        """Hidden states (batch, sequence, hidden_size) before the first layer, of the one kind of input that is given."""
        check_given(self.main_input_name, input_ids=input_ids, input_values=input_values, inputs_embeds=inputs_embeds)
        if input_values is not None:
            check_width("input_values", input_values, self.config.input_size, "input_size")
            # The dtype is that of a norm, since quantisation leaves norms alone. Weights of the projection may be integers.
            return self.input_proj(input_values.to(self.norm.weight.dtype))
        if input_ids is not None:
            check_ids(input_ids, self.embed_tokens, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        else:
            check_width("inputs_embeds", inputs_embeds, self.config.hidden_size, "hidden_size")
        if self.embed_bias is None:
            return inputs_embeds
        # A device map may put the bias, which belongs to no submodule, on another device than the table.
        return inputs_embeds + self.embed_bias.to(inputs_embeds.device)


# trf-ignore: TRF057
class HylaForSequenceClassification(HylaPreTrainedModel):
    """
    A linear head on the last `num_answers` tokens: SRAVEN's four answer slots, the query of a truth table, or the end
    of a text.
    """

    def __init__(self, config: HylaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HylaModel(config)
        self.main_input_name = self.model.main_input_name
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds, input_values:
                See [`HylaModel.forward`].
            labels (`torch.Tensor`, *optional*):
                Classes (batch,), or numbers (batch, num_labels) for regression and multi-label classification; with
                several answers (batch, num_answers) and (batch, num_answers, num_labels). A single regression label
                may lack the last axis. Class -100 is ignored.
            num_items_in_batch (`int`, *optional*):
                Number of labels in all batches that are accumulated into one update; the loss is the sum over this
                batch divided by it. Without it the loss is the mean.

        Returns:
            `HylaSequenceClassifierOutput` with `logits` of shape (batch, num_labels), or (batch, num_answers, num_labels)
            where `num_answers` is larger than 1.

        Raises:
            ValueError: if a sequence is shorter than `num_answers`, or labels do not fit the logits.
        """
        kwargs.setdefault("use_cache", False)
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            num_last=self._num_last(input_ids, attention_mask, kwargs),
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(answer_states(self.config, outputs.last_hidden_state, input_ids, attention_mask))
        if self.config.num_answers == 1:
            logits = logits[:, 0]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels.to(logits.device), num_items_in_batch)
        aux_loss = balancing_loss(self.model, outputs.router_logits, attention_mask)
        if aux_loss is not None and loss is not None:
            loss = add_balancing_loss(self.config, loss, aux_loss, labels, num_items_in_batch)
        return HylaSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits or None,
        )

    def _num_last(self, input_ids, attention_mask, kwargs) -> int | None:
        """How many last tokens of the last layer are read; `None` if padding may follow them or if all are computed."""
        padded = (attention_mask is not None and attention_mask.ndim == 2) or (
            self.config.pad_token_id is not None and input_ids is not None
        )
        return self.config.num_answers if not padded and self._computes_last_only(kwargs) else None

    def loss_function(self, logits, labels, num_items_in_batch=None) -> torch.Tensor:
        return classification_loss(self.config, logits, labels, num_items_in_batch)


# trf-ignore: TRF057
class HylaForCausalLM(HylaPreTrainedModel, GenerationMixin):
    """
    A language model: logits of the next token, for every token. It is causal, and has neither an answer slot nor a bias of
    embeddings, whatever the config says: the model changes a copy of it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HylaConfig):
        if config.vocab_size is None:
            raise ValueError("A language model reads and writes token ids: set vocab_size, and input_size=None.")
        config = copy.deepcopy(config)
        config.is_causal, config.answer_token_id, config.embedding_bias = True, None, False
        config.num_answers = 1  # of a classifier that is made of this model
        # Written down, since peft unties the head of a model that it has merged, and its logits must stay what they were.
        config.scale_logits = config.effective_scale_logits
        super().__init__(config)
        self.model = HylaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def _get_static_cache_init_shape(self):
        # transformers would give values the width of keys; without a shape the cache takes it from the first of them.
        same = self.config.head_dim == self.config.value_head_dim
        return super()._get_static_cache_init_shape() if same else None

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, past_key_values:
                See [`HylaModel.forward`].
            labels (`torch.LongTensor` of shape (batch, sequence), *optional*):
                The tokens themselves. They are shifted here: each is compared with the logits of the token before it.
                Label -100 is ignored.
            logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0):
                Compute the logits only of this many last tokens, or of the tokens with these indices; 0 means all.
            num_items_in_batch (`int`, *optional*):
                Number of labels in all batches that are accumulated into one update; the loss is the sum over this
                batch divided by it. Without it the loss is the mean.

        Returns:
            `MoeCausalLMOutputWithPast` with `logits` (batch, sequence or those kept, vocab_size), and the cache.

        Raises:
            ValueError: if labels do not fit the logits.
        """
        last = logits_to_keep if isinstance(logits_to_keep, int) and self._computes_last_only(kwargs) else 0
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_last=last or None,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        if self.config.scale_logits:
            hidden_states = hidden_states * self.config.hidden_size**-0.5
        with cpu_functions(hidden_states):
            logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            if not isinstance(logits_to_keep, int):
                raise ValueError(
                    "The loss of a token needs the logits of the token before it, which an index tensor logits_to_keep may leave "
                    "out: pass a number of last tokens, or leave out the labels."
                )
            if labels.shape != logits.shape[:-1]:
                raise ValueError(
                    f"labels must have the shape {tuple(logits.shape[:-1])} of the tokens with logits, got "
                    f"{tuple(labels.shape)}."
                )
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        aux_loss = balancing_loss(self.model, outputs.router_logits, attention_mask)
        if aux_loss is not None and loss is not None:
            loss = add_balancing_loss(self.config, loss, aux_loss, labels[:, 1:], kwargs.get("num_items_in_batch"))
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits or None,
        )


# The names under which saving copies this file, and everything it imports, beside the weights.
HylaModel.register_for_auto_class("AutoModel")
HylaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
HylaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

# With label smoothing, Trainer shifts labels only for models that are named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HylaConfig.model_type] = "HylaForCausalLM"

# The pipeline is of no use here, but what this file imports is saved with every model.
__all__ = [
    "HylaForCausalLM",
    "HylaForSequenceClassification",
    "HylaModel",
    "HylaPreTrainedModel",
    "SymbolicReasoningPipeline",
]
