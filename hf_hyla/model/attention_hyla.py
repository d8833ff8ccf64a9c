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
"""The mathematics of attention as a hypernetwork (arXiv 2406.05816, section 2), plainly written.

Shapes throughout: queries (batch, heads, query, head_dim), keys (batch, heads, key, head_dim), values
(batch, heads, key, value_head_dim), scores and codes (batch, heads, query, key). `eager_attention_forward` defines what
every implementation computes.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN


RMS_HEAD_EPS = 1e-6
# RMSHead multiplies scores by this before it squares them, and epsilon by its square, so that squares of scores of 1e30 stay
# finite in float32. A power of two rounds nothing.
RMS_HEAD_SCALE = 2.0**-42


def relative_position_buckets(
    query_length: int,
    key_length: int,
    num_buckets: int,
    device=None,
    first_query: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Distance buckets after T5 in its unidirectional form, which the reference uses for non-causal tasks too: all later
    keys share bucket 0 with the query itself.

    Distances up to `num_buckets // 2` have a bucket each; beyond, buckets widen logarithmically until distance
    `num_buckets`, from which on all share the last one.

    Args:
        first_query (`int` or `torch.LongTensor` of shape (), *optional*): position of the first query among the keys. If `None`,
            the last query is aligned with the last key.

    Returns:
        `torch.LongTensor` of shape (query + key - 1,), values 0 to `num_buckets - 1`, by diagonal as in `by_pair`.
    """
    last_query = key_length - 1 if first_query is None else first_query + query_length - 1
    distance = (last_query - torch.arange(query_length + key_length - 1, device=device)).clamp(min=0)
    num_exact = num_buckets // 2
    # Where the argument is below 1 the value is not used; the clamp keeps the logarithm finite there.
    relative = (distance.float() / num_exact).clamp(min=1.0)
    logarithmic = num_exact + (relative.log() / math.log(num_buckets / num_exact) * (num_buckets - num_exact)).long()
    return torch.where(distance < num_exact, distance, logarithmic.clamp(max=num_buckets - 1))


def by_pair(by_diagonal: torch.Tensor, query_length: int, key_length: int) -> torch.Tensor:
    """
    Writes out, for every (query, key) pair, values that depend on key - query alone.

    Args:
        by_diagonal (`torch.Tensor` of shape (..., query + key - 1)): entry `key - query + query_length - 1` is the
            value of the pair.

    Returns:
        `torch.Tensor` of shape (..., query, key).
    """
    if query_length == 1:
        return by_diagonal.unsqueeze(-2)
    query = torch.arange(query_length, device=by_diagonal.device)
    key = torch.arange(key_length, device=by_diagonal.device)
    return by_diagonal[..., key[None, :] - query[:, None] + query_length - 1]


def rotated(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """
    Rotary positions: element i of the first half of a head and element i of its second half are a point in a plane, turned
    by the i-th angle of the token. The product of a query and a key then depends on how far apart they stand.

    Args:
        x (`torch.Tensor` of shape (batch, heads, sequence, head_dim)): queries or keys.
        angles (pair of `torch.Tensor` of shape (batch or 1, sequence, rotated)): cosines and sines, those of the first half
            once more for the second. Elements beyond the `rotated` first ones stay as they are.
    """
    cos, sin = (part.unsqueeze(1) for part in angles)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned


def pair_dropout(
    queries: torch.Tensor, keys: torch.Tensor, seed: torch.Tensor, dropout: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """
    The factors by which dropout multiplies the codes of pairs: 0 or 1 / (1 - dropout). As in the reference, a pair has one
    factor for the whole batch and all heads, so it is kept or dropped as a whole.

    The factor is a pure function of the seed and the pair. Every implementation, and every process that draws the same seed,
    therefore drops the same pairs, and nothing of size query * key has to be kept for the backward.

    Args:
        queries, keys (`torch.LongTensor` of shapes (query,) and (key,)): positions in the sequence. Fewer queries than
            keys have the positions of the last tokens.
        seed (`torch.LongTensor` of shape (2,)): two integers from 0 to 2**31 - 1.

    Returns:
        `torch.Tensor` of shape (query, key).
    """
    words = _mix(_mix(queries ^ seed[0])[:, None] ^ _mix(keys ^ seed[1])[None, :])
    return (words >= int(dropout * 2**32)).to(dtype) / (1 - dropout)


def _mix(words: torch.Tensor) -> torch.Tensor:
    # Permutes 32-bit words, like the last step of MurmurHash3. Products do not overflow in 64 bits.
    words = words ^ (words >> 16)
    words = (words * 0x21F0AAAD) & 0xFFFFFFFF
    words = words ^ (words >> 15)
    words = (words * 0x735A2D97) & 0xFFFFFFFF
    return words ^ (words >> 15)


def position_of_first(query: torch.Tensor, key: torch.Tensor) -> int:
    """The first query's position in the sequence. The last query is the last token, unless there are more queries than keys."""
    return max(key.shape[2] - query.shape[2], 0)


def dropout_seed(device) -> torch.Tensor:
    """A seed for `pair_dropout`, drawn by the device's generator once per layer and step, whatever the size of the batch."""
    return torch.randint(2**31, (2,), device=device)


def attended(attention_mask: torch.Tensor) -> torch.Tensor:
    """
    The mask as booleans, True where a query attends to a key. In a mask of integers, 1 attends and 0 does not. In a mask of
    floats, as transformers makes them, 0.0 attends and negative values do not.

    Biases are not masks. They belong in `position_bias`.
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask >= 0 if attention_mask.is_floating_point() else attention_mask != 0


def attention_codes(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    score_norm: str,
    attention_mask: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Latent codes: the scores `query · key * scaling + position_bias`, normalised.

    `"rms_head"` divides the vector of scores over heads by its root mean square, separately for every (query, key)
    pair. `"softmax"` normalises over keys. `"none"` leaves the scores as they are. Masked scores are exactly 0 before
    `"rms_head"` and `"none"`, so a fully masked row is all zeros. Under `"softmax"` they are the dtype's minimum, so a
    fully masked row is uniform.

    Args:
        attention_mask (`torch.Tensor`, *optional*): broadcastable to (batch, 1, query, key), see `attended`.
        position_bias (`torch.Tensor`, *optional*): (heads, query + key - 1), by diagonal as in `by_pair`, or broadcastable
            to (batch, heads, query, key).

    Returns:
        `torch.Tensor` of shape (batch, heads, query, key), in the queries' dtype.
    """
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if position_bias is not None:
        scores = scores + (by_pair(position_bias, *scores.shape[-2:]) if position_bias.ndim == 2 else position_bias)
    # Squares and exponentials overflow in half precision, so they are computed in float32 at least.
    norm_dtype = torch.promote_types(scores.dtype, torch.float32)
    if score_norm == "softmax":
        if attention_mask is not None:
            scores = scores.masked_fill(~attended(attention_mask), torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1, dtype=norm_dtype).to(query.dtype)
    if attention_mask is not None:
        scores = scores.masked_fill(~attended(attention_mask), 0.0)
    if score_norm == "rms_head":
        # The scaled epsilon is so small that ONNX's optimiser takes it for 0 and removes it.
        scale = 1.0 if torch.compiler.is_exporting() else RMS_HEAD_SCALE
        scaled = scores.to(norm_dtype) * scale
        mean_square = scaled.square().mean(dim=1, keepdim=True) + RMS_HEAD_EPS * scale**2
        # Not rsqrt: its gradient contains the cube of the result, which is 0 for large scores.
        scores = scaled * mean_square.sqrt().reciprocal()
    return scores.to(query.dtype)


def mixed_values(codes: torch.Tensor, value: torch.Tensor, activation: nn.Module | None) -> torch.Tensor:
    """
    Ordinary attention: `out[q, h] = Σ_k codes[h, q, k] · φ(value[k, h])`.

    Returns:
        `torch.Tensor` of shape (batch, heads, query, value_head_dim).
    """
    return torch.matmul(codes, value if activation is None else activation(value))


def generated_values(
    codes: torch.Tensor, value: torch.Tensor, activation: nn.Module | None, value_mixing: torch.Tensor | None = None
) -> torch.Tensor:
    """
    HYLA: the code of a (query, key) pair generates the weights of that pair's value network.

    `hidden[q, k] = φ(Σ_h codes[h, q, k] · value[k, h])`, then `out[q, h] = Σ_k codes[h, q, k] · hidden[q, k]`. HYLA+ has
    `value_mixing` W (heads, value_head_dim, value_head_dim), the weights of a second hidden layer between the two:
    `hidden2[q, k] = φ(Σ_h codes[h, q, k] · W[h] hidden[q, k])`.

    Returns:
        `torch.Tensor` of shape (batch, heads, query, value_head_dim).
    """
    hidden = torch.einsum("bhqk,bhkd->bqkd", codes, value)
    if activation is not None:
        hidden = activation(hidden)
    if value_mixing is not None:
        # Both contractions are cheap in this order: an outer product per pair, then one large matrix product.
        hidden = torch.einsum("bhqk,bqkd->bqkhd", codes, hidden)
        hidden = torch.einsum("bqkhd,hed->bqke", hidden, value_mixing)
        if activation is not None:
            hidden = activation(hidden)
    return torch.einsum("bhqk,bqkd->bhqd", codes, hidden)


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    first_query: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The definition of all attention types, in the signature of transformers' attention functions.

    It is a function of its arguments alone, so that a module with projections of its own can call it.

    Args:
        module (`Any`): says which attention it is, by four attributes, as `HylaAttention` has them: `attention_type`;
            `score_norm`, never `None`; `value_activation`, a module or `None`; and `value_mixing` (heads, value_head_dim,
            value_head_dim), of HYLA+, or `None`.
        query (`torch.Tensor` of shape (batch, heads, query, head_dim)): what the output is for.
        key (`torch.Tensor` of shape (batch, heads, key, head_dim)): what queries are compared with.
        value (`torch.Tensor` of shape (batch, heads, key, value_head_dim)): what the output is made of.
        attention_mask (`torch.Tensor`, *optional*): broadcastable to (batch, 1, query, key), see `attended`. Causality is a
            mask too.
        scaling (`float`): what products of queries and keys are multiplied by, `head_dim**-0.5` in HYLA models.
        dropout (`float`, *optional*, defaults to 0.0): the probability of dropping a pair, see `pair_dropout`.
        position_bias (`torch.Tensor`, *optional*): added to the scores; (heads, query + key - 1), by diagonal as in
            `by_pair`, or broadcastable to (batch, heads, query, key).
        seed (`torch.LongTensor` of shape (2,), *optional*): that of `pair_dropout`; drawn here where it is `None`.
        first_query (`int`, *optional*): the position of the first query; by default the last query is the last token.

    Returns:
        Output of shape (batch, query, heads, value_head_dim), and the codes (batch, heads, query, key) before dropout.

    ```python
    >>> from types import SimpleNamespace
    >>> import torch
    >>> from hf_hyla import eager_attention_forward

    >>> hyla = SimpleNamespace(
    ...     attention_type="hyla", score_norm="rms_head", value_activation=torch.nn.ReLU(), value_mixing=None
    ... )
    >>> query, key, value = torch.randn(3, 2, 8, 10, 4)  # (batch, heads, sequence, width) each
    >>> causal = torch.ones(10, 10, dtype=torch.bool).tril()[None, None]
    >>> output, codes = eager_attention_forward(hyla, query, key, value, causal, scaling=4**-0.5)
    >>> output.shape, codes.shape
    (torch.Size([2, 10, 8, 4]), torch.Size([2, 8, 10, 10]))

    ```
    """
    codes = attention_codes(query, key, scaling, module.score_norm, attention_mask, position_bias)
    used = codes
    if dropout > 0.0:
        seed = dropout_seed(codes.device) if seed is None else seed
        queries, keys = (torch.arange(length, device=codes.device) for length in codes.shape[-2:])
        first_query = position_of_first(query, key) if first_query is None else first_query
        used = codes * pair_dropout(queries + first_query, keys, seed, dropout, codes.dtype)
    if module.attention_type == "hyla":
        output = generated_values(used, value, module.value_activation, module.value_mixing)
    else:
        output = mixed_values(used, value, module.value_activation)
    return output.transpose(1, 2), codes


def activation_or_none(name: str) -> nn.Module | None:
    """The activation of that name; `None`, the identity, for `"none"`."""
    return None if name == "none" else ACT2FN[name]


def largest_intermediate(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """
    Elements of the largest intermediate result of the eager implementation: the codes, the hidden layers, or in HYLA+ the hidden
    layers of every head.
    """
    pairs = query.shape[0] * query.shape[2] * key.shape[2]
    heads, width = query.shape[1], value.shape[3]
    if module.attention_type != "hyla":
        return pairs * heads
    return pairs * (max(heads, width) if module.value_mixing is None else heads * width)


def layer_with(module: Any, **replaced) -> SimpleNamespace:
    """What the definition reads of an attention layer, with some of it replaced."""
    names = ("attention_type", "score_norm", "value_activation", "value_mixing")
    return SimpleNamespace(**{name: getattr(module, name) for name in names} | replaced)
