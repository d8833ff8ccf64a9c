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
"""Gradients of fused attention, which refuse to be differentiated once more."""

import torch


class DifferentiatedOnce(torch.autograd.Function):
    """Returns its arguments unchanged. Their gradients refuse to be differentiated."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        outputs = tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)
        pairs = zip(outputs, ctx.needs_input_grad, strict=True)
        ctx.mark_non_differentiable(*(x for x, needs in pairs if x is not None and not needs))
        return outputs

    @staticmethod
    def backward(ctx, *gradients):
        if not torch.is_grad_enabled():
            return gradients
        return RefuseGradient.apply(len(gradients), *gradients, *ctx.saved_tensors)


class RefuseGradient(torch.autograd.Function):
    """
    Returns the first `count` tensors, and raises when they are differentiated. It takes all tensors that they depend on, so
    that no derivative bypasses it.
    """

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "Fused attention has no gradient of its gradient: set attn_implementation='eager' for gradient penalties and "
            "Hessians."
        )
