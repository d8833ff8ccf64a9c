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
"""
Inputs of models, checked before work starts: ids, values or embeddings, positions, the mask of pairs, and the places of answers.
"""

import warnings
from typing import cast

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import is_torchdynamo_compiling

from .attention_hyla import attended
from .configuration_hyla import HylaConfig


# What transformers calls the cache: version 5.24 has renamed it.
CACHE_NAME = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# transformers' functions return another type for flex attention only, which this family does not have.
_Mask = torch.Tensor | None


def check_given(expected: str, **inputs: torch.Tensor | None) -> None:
    """Raises a ValueError unless exactly one input is given: the one that the model reads, or embeddings."""
    given = [name for name, tensor in inputs.items() if tensor is not None]
    if given not in (["inputs_embeds"], [expected]):
        raise ValueError(
            f"This model reads exactly one of {expected} and inputs_embeds, got {' and '.join(given) or 'none of them'}."
        )


def check_width(name: str, tensor: torch.Tensor, width: int, field: str) -> None:
    """Raises a ValueError unless the tensor has the shape (batch, sequence, width)."""
    if tensor.ndim != 3 or tensor.shape[-1] != width:
        raise ValueError(
            f"{name} must have the shape (batch, sequence, {width}), got {tuple(tensor.shape)}: the last number is the config's "
            f"{field}."
        )


def check_ids(input_ids: torch.Tensor, table: nn.Module, vocab_size: int) -> None:
    """Raises a ValueError for ids of a wrong shape or dtype and, on the CPU, for ids that the table does not hold."""
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"input_ids must be int64 or int32 of the shape (batch, sequence), got {input_ids.dtype} of the shape "
            f"{tuple(input_ids.shape)}."
        )
    # On a GPU a look at the values would stall the queue of kernels; there torch itself reports the id. Under vmap there is none.
    unseen = is_torchdynamo_compiling() or is_functorch_wrapped_tensor(input_ids)
    if input_ids.device.type != "cpu" or unseen or not input_ids.numel():
        return
    least, largest = int(input_ids.min()), int(input_ids.max())
    # An adapter around the table has no size of its own.
    size = getattr(table, "num_embeddings", vocab_size)
    if least < 0 or largest >= size:
        raise ValueError(
            f"input_ids must lie in 0 to {size - 1}, got {least if least < 0 else largest}: encode the inputs for this "
            "model's vocabulary."
        )


def check_one_sequence_a_row(
    config: HylaConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    others: dict,
) -> None:
    """
    Raises a ValueError for rows of several sequences, which would attend to each other, and for `position_ids` of another
    shape than the tokens.

    `position_ids` may count up by one over the tokens of a row, from any number on. In a causal model without mask and cache
    they may also start again within a row. Then they say where a sequence begins, and `pair_mask` keeps sequences apart.
    """
    advice = "pass one sequence a row, padded, with an attention_mask (DataCollatorWithPadding)."
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        if others.get(name) is not None:
            raise ValueError(
                f"HYLA models do not read several sequences from one row, which {name} describes: {advice}"
            )
    if position_ids is None:
        return
    batch, length = hidden_states.shape[:2]
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"position_ids must have the shape ({batch}, {length}) or (1, {length}) of the tokens, got "
            f"{tuple(position_ids.shape)}."
        )
    if length < 2:
        return
    if config.is_causal:
        by_pair = attention_mask is not None and attention_mask.ndim == 4
        if by_pair or (attention_mask is None and cache is None) or is_torchdynamo_compiling():
            return
    if is_torchdynamo_compiling():
        raise ValueError("position_ids cannot be checked while a model is compiled or exported: leave them out.")
    continues = position_ids.diff(dim=-1) == 1
    if attention_mask is not None and attention_mask.ndim == 2:
        padding = attention_mask[:, -length:] == 0
        continues = continues | padding[:, 1:] | padding[:, :-1]
    if not bool(continues.all()):
        raise ValueError(
            f"position_ids must count up by one over the tokens of a row, since HYLA models do not read several sequences from "
            f"one row: {advice}"
        )


def one_cache(
    config: HylaConfig, layers: nn.ModuleList, cache: Cache | None, past_key_values: Cache | None
) -> Cache | None:
    """
    The cache by whichever of its two names it was given.

    Raises:
        ValueError: for two caches, for a model that is not causal, and for training with gradient checkpointing, which computes
            each layer twice and would add the tokens twice.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one input: pass one of them.")
    if past_key_values is not None and CACHE_NAME == "cache" and not is_torchdynamo_compiling():
        warnings.warn("`past_key_values` is deprecated: pass the cache as `cache`.", FutureWarning, stacklevel=3)
    cache = past_key_values if cache is None else cache
    if cache is not None and not config.is_causal:
        raise ValueError(
            "A cache belongs to a causal model: set is_causal=True in the config, or leave the cache out."
        )
    twice = torch.is_grad_enabled() and any(layer.gradient_checkpointing and layer.training for layer in layers)
    if cache is not None and twice:
        raise ValueError(
            "Gradient checkpointing computes each layer twice and would add its tokens to the cache twice: leave the cache "
            "out, or call gradient_checkpointing_disable()."
        )
    return cache


def first_query(hidden_states: torch.Tensor, cache: Cache | None) -> tuple[int | torch.Tensor, int]:
    """The place of the first of these tokens among all keys, and how many keys there are."""
    length = hidden_states.shape[1]
    if cache is None:
        return 0, length
    # All layers keep the same keys, those of a sliding window only the last.
    num_keys, first_key = cache.get_mask_sizes(length, 0)
    place = cache.get_query_offset(0)
    return (place.to(hidden_states.device) if isinstance(place, torch.Tensor) else place) - first_key, num_keys


def pair_mask(
    config: HylaConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> torch.Tensor | None:
    """
    Mask (batch, 1, query, key) of padding, of the user, of causality and of the window; `None` where nothing is masked.

    Raises:
        ValueError: for a mask of another shape than (batch, key) or (batch or 1, 1, query, key), and for one that adds to scores.
    """
    if attention_mask is None or attention_mask.ndim == 2:
        if attention_mask is not None:
            _check_padding(attention_mask, hidden_states, cache)
        if _sees_all(config, hidden_states, attention_mask, cache):
            return None
        if not config.is_causal:
            return cast(_Mask, create_bidirectional_mask(config, hidden_states, attention_mask))
        create = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
        return cast(_Mask, create(config, hidden_states, attention_mask, cache, position_ids=position_ids))
    place, num_keys = first_query(hidden_states, cache)
    batch, length = hidden_states.shape[:2]
    by_pair = (1, length, num_keys)
    if tuple(attention_mask.shape) not in ((batch, *by_pair), (1, *by_pair)):
        raise ValueError(
            f"attention_mask must have the shape ({batch}, {num_keys}) or ({batch}, 1, {length}, {num_keys}), got "
            f"{tuple(attention_mask.shape)}."
        )
    if attention_mask.is_floating_point() and not is_torchdynamo_compiling() and bool((attention_mask > 0).any()):
        raise ValueError(
            "A float attention_mask is added to scores in transformers: 0.0 attends and a negative number does not, "
            "but this one has positive numbers; pass booleans, or integers of which 1 attends."
        )
    mask = attended(attention_mask)
    if config.is_causal:
        queries = place + torch.arange(length, device=mask.device)[:, None]
        keys = torch.arange(num_keys, device=mask.device)[None, :]
        mask = mask & (keys <= queries)
        if config.sliding_window is not None:
            mask = mask & (keys > queries - config.sliding_window)
    return mask


def _sees_all(config: HylaConfig, hidden_states, attention_mask, cache: Cache | None) -> bool:
    """Whether there is a single query that sees every key in the cache."""
    if not config.is_causal or cache is None or hidden_states.shape[1] != 1 or is_torchdynamo_compiling():
        return False
    if isinstance(cache.get_seq_length(), torch.Tensor):  # a static cache, which has empty places
        return False
    _, num_keys = first_query(hidden_states, cache)
    if config.sliding_window is not None and num_keys > config.sliding_window:  # a cache may keep more
        return False
    # On a GPU a look at the mask would stall the queue of kernels.
    return attention_mask is None or (attention_mask.device.type == "cpu" and bool(attention_mask.all()))


def check_is_0_or_1(attention_mask: torch.Tensor) -> None:
    """
    Raises a ValueError, on the CPU, for a mask of padding with other values, such as sequence numbers of packed rows, or an
    additive mask.
    """
    # On a GPU a look at the values would stall the queue of kernels.
    if attention_mask.dtype == torch.bool or attention_mask.device.type != "cpu" or is_torchdynamo_compiling():
        return
    other = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
    if other.numel():
        raise ValueError(
            f"An attention_mask (batch, key) holds 1 for tokens and 0 for padding, but this one holds {other[0].item():g}: pass one "
            "sequence a row and such a mask, or a mask of the shape (batch, 1, query, key)."
        )


def _check_padding(attention_mask: torch.Tensor, hidden_states: torch.Tensor, cache: Cache | None) -> None:
    check_is_0_or_1(attention_mask)
    batch, length = hidden_states.shape[:2]
    seen = 0 if cache is None else cache.get_seq_length()
    if isinstance(seen, torch.Tensor):
        # The cache is static, and its mask may be as long as the cache. On a GPU, reading `seen` would stall the queue of kernels.
        if is_torchdynamo_compiling() or seen.device.type != "cpu":
            return
        fits = attention_mask.shape[1] >= int(seen) + length
    else:
        fits = attention_mask.shape[1] == seen + length
    if not fits or attention_mask.shape[0] != batch:
        tokens = f"all tokens, of which {int(seen)} are in the cache" if seen else "the inputs"
        raise ValueError(
            f"attention_mask must have the shape ({batch}, {int(seen) + length}) of {tokens}, got "
            f"{tuple(attention_mask.shape)}."
        )


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
