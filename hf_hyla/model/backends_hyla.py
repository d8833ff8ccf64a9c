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
The implementations of attention, one row of `IMPLEMENTATIONS` each, and the choice among them. All compute what
`eager_attention_forward` defines.

Every function in `BACKENDS` has the signature of transformers' attention functions and is registered with transformers under
its name, for `attn_implementation`. `"hyla"`, the default, is the fastest exact implementation for the device, the attention
type and the size. Only the eager implementation returns codes.

Under `torch.autocast`, queries, keys and values arrive in half precision, or in float32 after a normalisation. They are
multiplied in autocast's dtype, as torch's own products are. Position biases and `value_mixing` stay in float32, and so do
their gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from .attention_hyla import attended, by_pair, dropout_seed, eager_attention_forward, largest_intermediate, layer_with
from .chunked_hyla import CHUNK_ELEMENTS, chunked_attention
from .gradients_hyla import DifferentiatedOnce
from .ops_cpu_hyla import cpu_attention, cpu_problem
from .ops_triton_hyla import triton_attention, triton_problem
from .step_cpu_hyla import step_attention, step_problem


logger = logging.get_logger(__name__)

# The eager implementation is as fast as the others while its largest intermediate result has no more elements than this. The
# others take a few calls from Python more, and a compiled kernel takes seconds to compile for every new size of heads.
_EAGER_ELEMENTS = 2**18
# The same for a single query on a CPU, whose kernel is compiled once for all sizes.
_EAGER_STEP_ELEMENTS = 2**12


class Call(NamedTuple):
    """One call of an attention function: the layer, and the arguments as `eager_attention_forward` describes them."""

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: torch.Tensor | None
    scaling: float
    dropout: float = 0.0
    position_bias: torch.Tensor | None = None


class Implementation(NamedTuple):
    """One way to compute attention."""

    # Why it cannot compute this call here, or `None` if it can.
    problem: Callable[[Call], str | None]
    # The output (batch, query, heads, value_head_dim), if there is no problem.
    compute: Callable[[Call], torch.Tensor]


def _differentiable_once(
    own_problem: Callable[[Call], str | None], compute: Callable[[Call], torch.Tensor]
) -> Implementation:
    """An implementation that can be differentiated once, by `backward` or `torch.autograd.grad`."""

    def compute_once(call: Call) -> torch.Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return compute(call)
        query, key, value, bias, mixing = DifferentiatedOnce.apply(*_differentiable(call))
        layer = layer_with(call.module, value_mixing=mixing)
        return compute(call._replace(module=layer, query=query, key=key, value=value, position_bias=bias))

    return Implementation(lambda call: _transform_problem(call) or own_problem(call), compute_once)


def _no_problem(call: Call) -> None:
    return None


def _transform_problem(call: Call) -> str | None:
    """
    Why only the eager implementation can compute a call that is transformed by torch.func or differentiated in forward mode, or
    `None` for other calls.
    """
    if torch.compiler.is_compiling():
        return None
    if any(map(is_functorch_wrapped_tensor, filter(torch.is_tensor, (*call[1:5], *_differentiable(call))))):
        return "it cannot be transformed by torch.func (vmap, grad, jvp); attn_implementation='eager' can"
    if any(tensor is not None and unpack_dual(tensor).tangent is not None for tensor in _differentiable(call)):
        return "it has no forward-mode gradient; attn_implementation='eager' has one"
    return None


def _differentiable(call: Call) -> tuple[torch.Tensor | None, ...]:
    return call.query, call.key, call.value, call.position_bias, call.module.value_mixing


def _eager(call: Call) -> torch.Tensor:
    output, _ = eager_attention_forward(*call)
    return output


def _chunked(call: Call) -> torch.Tensor:
    return chunked_attention(*call)


def _sdpa(call: Call) -> torch.Tensor:
    """torch's scaled_dot_product_attention, which takes the position bias as a mask, in the dtype of the queries."""
    query, key, bias = call.query, call.key, call.position_bias
    if bias is not None:
        bias = by_pair(bias, query.shape[2], key.shape[2])[None] if bias.ndim == 2 else bias
        bias = bias.to(query.dtype)
    if call.attention_mask is not None:
        # A mask of floats. Under one of booleans, a row that sees nothing would be 0 instead of the uniform mean.
        seen = attended(call.attention_mask)
        bias = torch.where(seen, query.new_zeros(()) if bias is None else bias, torch.finfo(query.dtype).min)
        # Such a row gets a query of 0 and scores of 0, which give no gradient to queries and keys. Scores of the minimum would not
        # do: SDPA's gradient finds the codes from the logarithm of their sum, which would be rounded away beside the minimum.
        sees = seen.any(dim=-1, keepdim=True)
        bias, query = torch.where(sees, bias, 0.0), torch.where(sees, query, 0.0)
        # A key that no query sees has scores of 0 too, even if it is NaN.
        key = torch.where(seen.any(dim=-2).unsqueeze(-1), key, 0.0)
    output = nn.functional.scaled_dot_product_attention(query, key, call.value, attn_mask=bias, scale=call.scaling)
    return output.transpose(1, 2)


def _sdpa_problem(call: Call) -> str | None:
    if call.module.attention_type != "softmax" or call.module.value_activation is not None:
        return "it only mixes values by softmax scores, without a value activation"
    if call.dropout > 0.0:
        return "it cannot drop the same pairs for the whole batch and all heads"
    return None


def _kernel(attention: Callable[..., torch.Tensor], call: Call) -> torch.Tensor:
    """A fused kernel: `cpu_attention` or `triton_attention`."""
    module = call.module
    return attention(
        call.query,
        call.key,
        call.value,
        mask=None if call.attention_mask is None else attended(call.attention_mask),
        position_bias=call.position_bias,
        value_mixing=module.value_mixing,
        seed=dropout_seed(call.query.device) if call.dropout > 0.0 else None,
        scaling=call.scaling,
        score_norm=module.score_norm,
        activation="none" if module.value_activation is None else "relu",
        generated=module.attention_type == "hyla",
        dropout=call.dropout,
    )


def _kernel_problem(own_problem: Callable[..., str | None], call: Call) -> str | None:
    """
    Why a kernel cannot compute this call. Kernels broadcast nothing and take each size from the first tensor that has it, so
    other shapes are refused here. `cpu_problem` or `triton_problem` is asked last.
    """
    module, query, key, value = call.module, call.query, call.key, call.value
    mask, bias = call.attention_mask, call.position_bias
    if module.value_activation is not None and not isinstance(module.value_activation, nn.ReLU):
        return f"its value activation is relu or none, not {type(module.value_activation).__name__}"
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[2:]
    # Parameters may be in float32 beside queries in half precision, as they are under autocast.
    dtypes, parameter_dtypes = {query.dtype}, {query.dtype, torch.promote_types(query.dtype, torch.float32)}
    for name, tensor, shape, allowed in (
        ("keys", key, (batch, heads, keys, width), dtypes),
        ("values", value, (batch, heads, keys, value_width), dtypes),
        ("position biases", bias, (heads, queries + keys - 1), parameter_dtypes),
        ("value_mixing", module.value_mixing, (heads, value_width, value_width), parameter_dtypes),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            return f"it takes {name} of shape {shape}, not {tuple(tensor.shape)}"
        if tensor.dtype not in allowed:
            wide = " or torch.float32" if len(allowed) > 1 else ""
            return f"it takes {name} in the dtype of the queries, {query.dtype}{wide}, not {tensor.dtype}"
    if mask is not None and mask.ndim == 4 and mask.shape[1] != 1:
        return "it takes one mask for all heads"
    return own_problem(query, key, value, module.value_mixing)


def _step(call: Call) -> torch.Tensor:
    mask = None if call.attention_mask is None else attended(call.attention_mask)
    return step_attention(call.module, call.query, call.key, call.value, mask, call.scaling, call.position_bias)


def _step_problem(call: Call) -> str | None:
    if call.query.shape[2] != 1 or call.dropout:
        return "it computes a single query without dropout"
    bias, mask = call.position_bias, call.attention_mask
    if bias is not None and bias.shape != (call.query.shape[1], call.key.shape[2]):
        return "it takes position biases by diagonal"
    if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1):
        return "it takes one mask for all heads"
    return _transform_problem(call) or step_problem(call.module, call.query, call.key, call.value, bias)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "eager": Implementation(_no_problem, _eager),
    "hyla_chunked": _differentiable_once(_no_problem, _chunked),
    "hyla_cpu": _differentiable_once(partial(_kernel_problem, cpu_problem), partial(_kernel, cpu_attention)),
    "hyla_step": Implementation(_step_problem, _step),
    "hyla_triton": _differentiable_once(partial(_kernel_problem, triton_problem), partial(_kernel, triton_attention)),
    "hyla_sdpa": _differentiable_once(_sdpa_problem, _sdpa),
}


def _cast_for_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors in the dtype in which autocast, if it is on, would multiply them. float64 stays float64."""
    device = query.device.type
    # What is compiled runs on a device that has autocast, and torch 2.11 cannot compile the question.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    return query, key, value


def hyla_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    *,
    implementation: str | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention by the implementation of this name, or by default by the one that suits the device, the attention type and the size.

    Raises:
        ValueError: if the implementation that was named cannot compute this layer here. The message says why.
    """
    call = Call(module, *_cast_for_products(query, key, value), attention_mask, scaling, dropout, position_bias)
    if implementation is None:
        implementation = fastest_implementation(call)
    elif reason := IMPLEMENTATIONS[implementation].problem(call):
        raise ValueError(f"{implementation} cannot compute this layer: {reason}.")
    return IMPLEMENTATIONS[implementation].compute(call), None


def fastest_implementation(call: Call) -> str:
    """The name in `IMPLEMENTATIONS` of the implementation that the default takes. Each candidate is asked at most once."""
    if torch.compiler.is_exporting():
        return "eager"  # operators that every runtime has
    elements = largest_intermediate(call.module, call.query, call.key, call.value)
    if elements > _EAGER_STEP_ELEMENTS and IMPLEMENTATIONS["hyla_step"].problem(call) is None:
        return "hyla_step"
    if elements <= _EAGER_ELEMENTS:
        return "eager"
    # SDPA is slow in training, since its position bias needs a gradient.
    if not call.module.training and IMPLEMENTATIONS["hyla_sdpa"].problem(call) is None:
        return "hyla_sdpa"
    device = call.query.device.type
    kernel = {"cpu": "hyla_cpu", "cuda": "hyla_triton"}.get(device)
    problem = IMPLEMENTATIONS[kernel].problem(call) if kernel else f"there is none for {device}"
    if kernel and problem is None:
        return kernel
    if not torch.compiler.is_compiling():
        logger.warning_once(f"Attention is computed without a fused kernel: {problem}.")
    chunked = elements > CHUNK_ELEMENTS and IMPLEMENTATIONS["hyla_chunked"].problem(call) is None
    return "hyla_chunked" if chunked else "eager"


# The definition has its own function, and no model has single queries only.
_NOT_BY_NAME = ("eager", "hyla_step")
BACKENDS: dict[str, Callable] = {
    "eager": eager_attention_forward,
    "hyla": hyla_attention_forward,
    **{
        name: partial(hyla_attention_forward, implementation=name)
        for name in IMPLEMENTATIONS
        if name not in _NOT_BY_NAME
    },
}
FORMER_NAME = "hyla_lean"  # of `hyla_chunked`, up to version 0.1
BACKENDS[FORMER_NAME] = BACKENDS["hyla_chunked"]


def _pair_mask(**kwargs) -> torch.Tensor | None:
    # A mask of booleans. A causal one is never left out, as it may be for torch's own SDPA, which can mask causally by itself.
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})


for _name, _function in BACKENDS.items():
    if _name != "eager":  # by this name transformers means the function beside the model
        AttentionInterface.register(_name, _function)
        AttentionMaskInterface.register(_name, _pair_mask)
