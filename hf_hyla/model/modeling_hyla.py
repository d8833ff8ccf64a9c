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
"""HYLA models: inputs, masks, the stack of layers, initialisation, and a classification head."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_hyla import attended, relative_position_buckets
from .backends_hyla import BACKENDS
from .card_hyla import fill_in_card
from .configuration_hyla import HylaConfig
from .layers_hyla import HylaAttention, HylaLayer, HylaMoE, HylaRouter
from .pipeline_hyla import SymbolicReasoningPipeline


# What transformers-mlinter would have otherwise, here and below. TRF057: docstrings are written by hand, with shapes and
# the paper's equations. TRF041: each of these fields is a row of the paper's Table A1, one of its two tasks, or an option of
# the official implementation. TRF051: the eager form is asked for by those who want every token computed.
# trf-ignore: TRF041 config.vocab_size, config.embedding_bias, config.position_type, config.is_causal, config.num_answers


# trf-ignore: TRF057
@dataclass
class HylaModelOutput(BaseModelOutput):
    """`BaseModelOutput` and, for mixtures of experts on request, `router_logits`: (batch * sequence, experts) a layer."""

    router_logits: tuple[torch.FloatTensor, ...] | None = None


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
    # HYLA mixes heads and RMSHead normalises over them, so that neither heads nor sequence can be split over devices.
    _supports_context_parallel = False

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """
        The default is `"hyla"`, the fastest exact form; transformers' own functions would compute other attention.

        Raises:
            ValueError: for anything but the names of `BACKENDS`.
        """
        name = "hyla" if requested_attention is None else requested_attention
        if name not in BACKENDS:
            raise ValueError(
                f"HYLA models have no attn_implementation {name!r}: expected one of {', '.join(BACKENDS)}."
            )
        return name

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        # Private, but the one step between transformers' empty card and the Hub, in push_to_hub and in save_pretrained.
        fill_in_card(working_dir, repo_id, self)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    # Every kind of module in this file is initialised here, none by the base class.
    # trf-ignore: TRF018
    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
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
            if self.config.embedding_bias:
                # A dense layer on one-hot symbols; the answer slot is no symbol.
                _lecun_normal(module.weight, fan_in=module.num_embeddings - (module.padding_idx is not None))
            else:
                init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, HylaModel):
            if module.embed_bias is not None:
                init.zeros_(module.embed_bias)
        elif isinstance(module, HylaMoE):
            _lecun_normal(module.up_proj, fan_in=module.up_proj.shape[-1])
            _lecun_normal(module.down_proj, fan_in=module.down_proj.shape[-1])
        elif isinstance(module, HylaAttention):
            if module.relative_attention_bias is not None:
                # Of a table (heads, buckets) the reference takes the last axis for the fan-in.
                init.normal_(module.relative_attention_bias, std=module.relative_attention_bias.shape[1] ** -0.5)
            if module.value_mixing is not None:
                _lecun_normal(module.value_mixing, fan_in=module.value_head_dim)


def _lecun_normal(tensor: torch.Tensor, fan_in: int) -> None:
    # Cut off at two deviations, and widened by what the cut takes away, so that the deviation is 1/sqrt(fan_in).
    # `init.lecun_normal_` widens, but cuts off at the numbers -2 and 2: its deviation is 14 % too large.
    std = max(fan_in, 1) ** -0.5 / 0.87962566103423978
    init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def _refuse_packed_rows(attention_mask, kwargs) -> None:
    """
    Several sequences in one row would attend to each other. Positions follow from where tokens stand, so that `position_ids` may
    be given that count up by one over the tokens of a row, from any number on.
    """
    advice = "pass one sequence a row, padded, with an attention_mask (DataCollatorWithPadding)."
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"HYLA models do not read several sequences from one row, which {name} describes: {advice}"
            )
    position_ids = kwargs.pop("position_ids", None)
    if position_ids is None:
        return
    if is_torchdynamo_compiling():
        raise ValueError("position_ids cannot be checked while a model is compiled or exported: leave them out.")
    continues = position_ids.diff(dim=-1) == 1
    if attention_mask is not None and attention_mask.ndim == 2:
        padding = attention_mask == 0
        continues = continues | padding[:, 1:] | padding[:, :-1]
    if not bool(continues.all()):
        raise ValueError(
            f"position_ids must count up by one over the tokens of a row, since HYLA models do not read several sequences from "
            f"one row: {advice}"
        )


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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape (batch, sequence), *optional*):
                Token ids, for models with `vocab_size`.
            attention_mask (`torch.Tensor`, *optional*):
                (batch, sequence), 1 for tokens and 0 for padding; or (batch, 1, query, key): True, the integer 1 or
                the float 0.0 attends; False, the integer 0 or a negative float does not. Causal models mask later
                keys besides.
            inputs_embeds (`torch.FloatTensor` of shape (batch, sequence, hidden_size), *optional*):
                What `get_input_embeddings()` would return for the inputs.
            input_values (`torch.FloatTensor` of shape (batch, sequence, input_size), *optional*):
                Continuous tokens, for models with `input_size`.
            num_last (`int`, *optional*):
                Compute the last layer for that many last tokens only, where nobody reads the others.

        Returns:
            `HylaModelOutput` with `last_hidden_state` (batch, sequence or num_last, hidden_size); on request `hidden_states`,
            `attentions`, a tuple of the latent codes of each layer (batch, heads, query, key), and `router_logits`.
        """
        _refuse_packed_rows(attention_mask, kwargs)
        hidden_states = self._embed(input_ids, input_values, inputs_embeds)
        mask = self._pair_mask(hidden_states, attention_mask)
        position_buckets = None
        if self.config.position_type == "relative":
            length = hidden_states.shape[1]
            position_buckets = relative_position_buckets(
                length, length, self.config.relative_attention_num_buckets, hidden_states.device
            )
        for number, layer in enumerate(self.layers, start=1):
            last = num_last if number == len(self.layers) else None
            hidden_states = layer(
                hidden_states, attention_mask=mask, position_buckets=position_buckets, num_last=last, **kwargs
            )
        return HylaModelOutput(last_hidden_state=self.norm(hidden_states))

    def _pair_mask(self, hidden_states, attention_mask) -> torch.Tensor | None:
        """Mask (batch, 1, query, key) of padding, of the user and of causality; `None` where nothing is masked."""
        length = hidden_states.shape[1]
        if attention_mask is None or attention_mask.ndim == 2:
            if attention_mask is not None and attention_mask.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"attention_mask must have the shape {tuple(hidden_states.shape[:2])} of the inputs, got "
                    f"{tuple(attention_mask.shape)}."
                )
            if self.config.is_causal:
                return create_causal_mask(self.config, hidden_states, attention_mask, past_key_values=None)
            return create_bidirectional_mask(self.config, hidden_states, attention_mask)
        if attention_mask.ndim != 4 or attention_mask.shape[-2:] != (length, length):
            raise ValueError(
                f"attention_mask must have the shape (batch, {length}) or (batch, 1, {length}, {length}), got "
                f"{tuple(attention_mask.shape)}."
            )
        if attention_mask.is_floating_point() and not is_torchdynamo_compiling() and bool((attention_mask > 0).any()):
            raise ValueError(
                "A float attention_mask is added to scores in transformers: 0.0 attends and a negative number does not, "
                "but this one has positive numbers; pass booleans or integers to say 1 attends."
            )
        mask = attended(attention_mask)
        if self.config.is_causal:
            mask = mask & mask.new_ones(length, length).tril()
        return mask

    def _embed(self, input_ids, input_values, inputs_embeds) -> torch.Tensor:
        """Hidden states (batch, sequence, hidden_size) before the first layer, of the one kind of input that is given."""
        inputs = {"input_ids": input_ids, "input_values": input_values, "inputs_embeds": inputs_embeds}
        given = [name for name, tensor in inputs.items() if tensor is not None]
        if given != ["inputs_embeds"] and given != [self.main_input_name]:
            raise ValueError(
                f"This model reads exactly one of {self.main_input_name} and inputs_embeds, got "
                f"{' and '.join(given) or 'none of them'}."
            )
        if input_values is not None:
            if input_values.ndim != 3 or input_values.shape[-1] != self.config.input_size:
                raise ValueError(
                    f"input_values must have the shape (batch, sequence, {self.config.input_size}), got "
                    f"{tuple(input_values.shape)}: the last number is the config's input_size."
                )
            # Of a norm, which no quantisation touches: weights of the projection may be integers, or no tensor at all.
            return self.input_proj(input_values.to(self.norm.weight.dtype))
        if input_ids is not None:
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        elif inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds must have the shape (batch, sequence, {self.config.hidden_size}), got "
                f"{tuple(inputs_embeds.shape)}: the last number is the config's hidden_size."
            )
        if self.embed_bias is None:
            return inputs_embeds
        # A device map may put the bias, which belongs to no submodule, on another device than the table.
        return inputs_embeds + self.embed_bias.to(inputs_embeds.device)

    def _check_ids(self, input_ids) -> None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be integers of the shape (batch, sequence), got {input_ids.dtype} of the shape "
                f"{tuple(input_ids.shape)}."
            )
        # On a GPU a look at the values would stall the queue of kernels; there torch itself reports the id.
        if input_ids.device.type != "cpu" or is_torchdynamo_compiling() or not input_ids.numel():
            return
        least, largest = int(input_ids.min()), int(input_ids.max())
        # An adapter around the table has no size of its own.
        size = getattr(self.embed_tokens, "num_embeddings", self.config.vocab_size)
        if least < 0 or largest >= size:
            raise ValueError(
                f"input_ids must lie in 0 to {size - 1}, got "
                f"{least if least < 0 else largest}: encode the inputs for this model's vocabulary."
            )


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
                may leave its last axis out. Class -100 is ignored.
            num_items_in_batch (`int`, *optional*):
                Number of labels in all batches that are accumulated into one update; the loss is the sum over this
                batch divided by it. Without it the loss is the mean.

        Returns:
            `HylaSequenceClassifierOutput` with `logits` of shape (batch, num_labels), or (batch, num_answers, num_labels)
            where `num_answers` is larger than 1.

        Raises:
            ValueError: if a sequence is shorter than `num_answers`, or labels do not fit the logits.
        """
        outputs: HylaModelOutput = self.model(
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
        aux_loss = self._balancing_loss(outputs.router_logits, attention_mask)
        if aux_loss is not None and loss is not None:
            # This batch's part of an update, so that accumulating batches does not multiply it.
            share = 1.0 if num_items_in_batch is None else (labels != -100).sum() / num_items_in_batch
            loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
        return HylaSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits or None,
        )

    def _num_last(self, input_ids, attention_mask, kwargs) -> int | None:
        """
        How many last tokens of the last layer are read; `None` where padding may follow, where all were asked for, and in
        the eager form, which takes no shortcut.
        """
        padded = (attention_mask is not None and attention_mask.ndim == 2) or (
            self.config.pad_token_id is not None and input_ids is not None
        )
        recorded = any(
            kwargs.get(name, getattr(self.config, name))
            for name in ("output_hidden_states", "output_attentions", "output_router_logits")
        )
        # trf-ignore: TRF051
        plain = self.config._attn_implementation == "eager"
        return None if padded or recorded or plain else self.config.num_answers

    def _balancing_loss(self, router_logits, attention_mask) -> torch.Tensor | None:
        """The load-balancing loss of a mixture of experts; `None` where there are no router logits."""
        if not router_logits:  # empty where a model without routers is asked for them
            return None
        is_token = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        aux_loss = load_balancing_loss_func(
            router_logits, self.config.num_experts, self.config.num_experts_per_tok, is_token
        )
        recomputing = self.model.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputing and not aux_loss.requires_grad:
            raise ValueError(
                "Gradient checkpointing with use_reentrant=True loses the gradient of the load-balancing loss: set "
                "use_reentrant=False, or output_router_logits=False."
            )
        return aux_loss

    def loss_function(self, logits, labels, num_items_in_batch=None) -> torch.Tensor:
        # transformers' ForSequenceClassificationLoss squeezes, writes into the config, knows no axis of answers, and
        # its callers drop num_items_in_batch, which makes gradients grow with accumulation and world size.
        problem_type = self.config.problem_type
        if problem_type is None:
            if self.num_labels == 1:
                problem_type = "regression"
            else:
                problem_type = (
                    "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
                )

        expected = logits.shape[:-1] if problem_type == "single_label_classification" else logits.shape
        if problem_type == "regression" and labels.shape == logits.shape[:-1] and self.num_labels == 1:
            labels = labels.unsqueeze(-1)
        if labels.shape != expected:
            raise ValueError(
                f"For problem_type={problem_type!r} the labels must have the shape {tuple(expected)}, got "
                f"{tuple(labels.shape)}."
            )
        reduction = "mean" if num_items_in_batch is None else "sum"
        if problem_type == "single_label_classification":
            if labels.is_floating_point():
                raise ValueError(
                    f"Classes must be integers, got labels of dtype {labels.dtype}: set problem_type='regression' in "
                    "the config to fit numbers."
                )
            loss = nn.functional.cross_entropy(
                logits.flatten(0, -2).float(), labels.flatten().long(), reduction=reduction
            )
        elif problem_type == "regression":
            loss = nn.functional.mse_loss(logits, labels.to(logits.dtype), reduction=reduction)
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction=reduction)
        if num_items_in_batch is not None:
            loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
        return loss


def answer_states(config: HylaConfig, hidden_states, input_ids, attention_mask) -> torch.Tensor:
    """Hidden states (batch, num_answers, hidden_size) of each row's last `num_answers` tokens."""
    num_answers, length = config.num_answers, hidden_states.shape[1]
    if length < num_answers:
        raise ValueError(
            f"The model reads its answers at the last {num_answers} tokens (num_answers), but the sequences have "
            f"{length}: append the answer slots."
        )
    if attention_mask is not None and attention_mask.ndim == 2:
        is_token = attention_mask.bool()
    elif config.pad_token_id is not None and input_ids is not None:
        is_token = input_ids != config.pad_token_id
    else:
        return hidden_states[:, length - num_answers :]
    is_token = is_token.to(hidden_states.device)
    if not is_torchdynamo_compiling() and bool((is_token.sum(-1) < num_answers).any()):
        raise ValueError(
            f"The model reads its answers at the last {num_answers} tokens (num_answers), but a row has only "
            f"{int(is_token.sum(-1).min())} that are not padding."
        )
    position = torch.arange(length, device=hidden_states.device)
    last = torch.where(is_token, position, -1).topk(num_answers, dim=-1).values.flip(-1).clamp(min=0)
    return hidden_states.gather(1, last.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


# The names under which saving copies this file, and everything it imports, beside the weights.
HylaModel.register_for_auto_class("AutoModel")
HylaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

# The pipeline is of no use here, but what this file imports is saved with every model.
__all__ = ["HylaForSequenceClassification", "HylaModel", "HylaPreTrainedModel", "SymbolicReasoningPipeline"]
