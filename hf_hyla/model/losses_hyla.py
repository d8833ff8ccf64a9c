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
"""The losses of a classification head and of a mixture of experts. That of a language model is transformers' own."""

from typing import cast

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .configuration_hyla import HylaConfig


def classification_loss(
    config: HylaConfig,
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    The loss of `config.problem_type` or, if that is `None`, of the type that follows from the labels' dtype. It is the mean or,
    with `num_items_in_batch`, the sum divided by that number.

    transformers' ForSequenceClassificationLoss squeezes, writes into the config, knows no axis of answers, and its callers
    drop `num_items_in_batch`, which makes gradients grow with accumulation and world size.

    Raises:
        ValueError: if labels do not fit the logits (..., num_labels).
    """
    problem_type = config.problem_type
    if problem_type is None:
        if config.num_labels == 1:
            problem_type = "regression"
        else:
            problem_type = (
                "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            )

    expected = logits.shape[:-1] if problem_type == "single_label_classification" else logits.shape
    if problem_type == "regression" and labels.shape == logits.shape[:-1] and config.num_labels == 1:
        labels = labels.unsqueeze(-1)
    if labels.shape != expected:
        one_answer = (
            config.num_answers > 1 and labels.shape[:1] == logits.shape[:1] and labels.ndim == len(expected) - 1
        )
        advice = (
            f" The model has num_answers={config.num_answers}: set num_answers=1 for one answer." if one_answer else ""
        )
        if problem_type == "single_label_classification" and labels.shape == logits.shape:
            advice = " For several classes at once, set problem_type='multi_label_classification' in the config."
        raise ValueError(
            f"For problem_type={problem_type!r} the labels must have the shape {tuple(expected)}, got "
            f"{tuple(labels.shape)}.{advice}"
        )
    reduction = "mean" if num_items_in_batch is None else "sum"
    # Sums overflow in half precision.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type == "single_label_classification":
        if labels.is_floating_point():
            raise ValueError(
                f"Classes must be integers, got labels of dtype {labels.dtype}: set problem_type='regression' in "
                "the config to fit numbers."
            )
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), reduction=reduction)
    elif problem_type == "regression":
        loss = nn.functional.mse_loss(logits, labels.to(logits.dtype), reduction=reduction)
    else:
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction=reduction)
    if num_items_in_batch is not None:
        loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
    return loss


def balancing_loss(model: PreTrainedModel, router_logits, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """
    The load-balancing loss of a mixture of experts; `None` if there are no router logits, or no tokens.

    Args:
        router_logits (tuple of `torch.Tensor` of shape (batch * sequence, experts)): one tensor for each layer.
        attention_mask: the mask of padding, (batch, key), of which the tokens are the last keys. A mask of another shape is
            ignored.

    Raises:
        ValueError: if gradient checkpointing loses its gradient.
    """
    # A model without routers that is asked for their logits gives an empty tuple.
    if not router_logits or not len(router_logits[0]):
        return None
    config = model.config
    is_token = None
    if attention_mask is not None and attention_mask.ndim == 2:
        is_token = attention_mask[:, -(len(router_logits[0]) // len(attention_mask)) :]
    found = load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, is_token)
    loss = cast(torch.Tensor, found)
    recomputing = model.gradient_checkpointing and model.training and torch.is_grad_enabled()
    if recomputing and not loss.requires_grad:
        raise ValueError(
            "Gradient checkpointing with use_reentrant=True loses the gradient of the load-balancing loss: set "
            "use_reentrant=False, or output_router_logits=False."
        )
    return loss


def add_balancing_loss(
    config: HylaConfig, loss: torch.Tensor, of_experts: torch.Tensor, labels: torch.Tensor, num_items_in_batch
) -> torch.Tensor:
    """The loss plus this batch's share of an update's balancing loss, which accumulation of batches must not multiply."""
    share = 1.0 if num_items_in_batch is None else (labels != -100).sum() / num_items_in_batch
    return loss + config.router_aux_loss_coef * share * of_experts.to(loss.device)
