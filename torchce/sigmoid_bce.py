"""Autograd of sigmoid binary cross entropy.

Saved for backward: the logits, target and weights that came in, nothing else. A gradient that will itself be
differentiated (``create_graph=True``) or that comes in batches (``is_grads_batched``) is computed by :func:`gradients`,
the kernels' formula in torch's own operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from torchce import ops
from torchce.inplace import Overwritten
from torchce.transforms import differentiates_backward


def gradients(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """Gradients for the logits and for the target, from differentiable operations.

    With p = sigmoid(x) and c = pos_weight (``csrc/math/sigmoid_bce.h``)::

        d loss / d x = w ((1 - t) p - c t (1 - p))
        d loss / d t = w ((c - 1) softplus(-x) - x)
    """
    acc = ops.accumulation_dtype(logits.dtype)
    x, t, g = logits.to(acc), target.to(acc), grad_output.to(acc)
    if reduction == 1:
        g = g / logits.numel()
    if weight is not None:
        g = g * weight
    positive = t if pos_weight is None else pos_weight * t
    grad_logits = g * ((1 - t) * torch.sigmoid(x) - positive * torch.sigmoid(-x))
    curved = 0 if pos_weight is None else (pos_weight - 1) * F.softplus(-x)
    grad_target = g * (curved - x)
    return grad_logits.to(logits.dtype), grad_target.to(target.dtype)


class SigmoidBCE(Function):
    """The classic form of Function: the ``setup_context`` form costs a ``inspect.signature`` at every call."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        reduction: int,
        dtype: torch.dtype | None,
        inplace_backward: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, target, weight, pos_weight)
        ctx.reduction = reduction
        ctx.overwritten = Overwritten() if inplace_backward else None
        return ops.sigmoid_bce_forward(logits, target, weight, pos_weight, reduction, dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.overwritten is not None:
            ctx.overwritten.check()
        saved = (grad_output, *ctx.saved_tensors, ctx.reduction)
        logits = saved[1]
        needs_logits, needs_target = ctx.needs_input_grad[:2]
        grad_logits = grad_target = None
        if differentiates_backward():
            grad_logits, grad_target = gradients(*saved)
        else:
            if needs_target:  # first: the logits it reads may be overwritten next
                grad_target = ops.sigmoid_bce_backward_target(*saved)
            if not needs_logits:
                pass
            elif ctx.overwritten is None:
                grad_logits = ops.sigmoid_bce_backward(*saved)
            else:
                ops.sigmoid_bce_backward_(*saved)
                grad_logits = ctx.overwritten.mark(logits)
        return grad_logits if needs_logits else None, grad_target if needs_target else None, *[None] * 5


def sigmoid_bce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: int,
    dtype: torch.dtype | None,
    inplace_backward: bool,
) -> Tensor:
    """The loss of checked inputs, as :func:`torchce.ops.sigmoid_bce_forward` takes them, differentiable."""
    if torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad):
        arguments = (logits, target, weight, pos_weight, reduction, dtype, inplace_backward)
        loss: Tensor = SigmoidBCE.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss
    return ops.sigmoid_bce_forward(logits, target, weight, pos_weight, reduction, dtype)
