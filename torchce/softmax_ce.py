"""Autograd of softmax cross entropy.

Saved for backward: the logits and target that came in, two numbers a row (three for probability targets) and two for
the whole; never probabilities. A gradient that will itself be differentiated (``create_graph=True``) or that comes in
batches (``is_grads_batched``) is computed by :func:`gradients`, the kernels' formula in torch's own operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchce import ops
from torchce.inplace import Overwritten
from torchce.transforms import differentiates_backward

Options = tuple[int, int, float]
"""reduction, ignore_index and label_smoothing, as the ops take them."""


def gradients(
    grad_output: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Gradients for the logits and for target probabilities, from differentiable operations.

    With p = softmax(x), coefficients u_k of all classes and h of the target class (``csrc/math/softmax_ce.h``)::

        d loss / d x_j = p_j (h + b sum_k u_k) - b u_j - h [j == y]
        d loss / d t_j = -(1 - label_smoothing) w_j log p_j
    """
    reduction, ignore_index, label_smoothing = options
    if logits.dim() == 1:
        unbatched = gradients(
            grad_output.unsqueeze(0) if reduction == 0 else grad_output,
            logits.unsqueeze(0),
            target.unsqueeze(0),
            weight,
            options,
        )
        return unbatched[0].squeeze(0), None if unbatched[1] is None else unbatched[1].squeeze(0)

    acc = ops.accumulation_dtype(logits.dtype)
    x = logits.to(acc)
    p = torch.softmax(x, 1)
    classes = x.shape[1]
    w = (x.new_ones(classes) if weight is None else weight).view(classes, *[1] * (x.dim() - 2))
    g = grad_output.to(acc)
    if reduction == 0:
        g = g.unsqueeze(1)
    spread = label_smoothing / classes

    if target.is_floating_point():
        if reduction == 1:
            g = g / (x.numel() // classes)
        u = w * (target.to(acc) * (1 - label_smoothing) + spread)
        grad_logits = g * (p * u.sum(1, keepdim=True) - u)
        grad_target = (label_smoothing - 1) * g * w * torch.log_softmax(x, 1)
        return grad_logits.to(logits.dtype), grad_target.to(target.dtype)

    index = target.to(torch.int64).unsqueeze(1)
    kept = index != ignore_index
    index = torch.where(kept, index, 0)
    row_weight = w.expand_as(x).gather(1, index)
    if reduction == 1:
        g = g / torch.where(kept, row_weight, 0).sum()
    hot = (1 - label_smoothing) * row_weight
    one_hot = torch.zeros_like(x).scatter(1, index, 1.0)
    grad_logits = g * (p * (hot + spread * w.sum()) - spread * w - hot * one_hot)
    return torch.where(kept, grad_logits, 0).to(logits.dtype), None


class SoftmaxCE(Function):
    """The classic form of Function: the ``setup_context`` form costs a ``inspect.signature`` at every call."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        dtype: torch.dtype | None,
        inplace_backward: bool,
    ) -> Tensor:
        loss, statistics, totals = ops.softmax_ce_forward(logits, target, weight, *options, dtype)
        ctx.save_for_backward(logits, target, weight, statistics, totals)
        ctx.options = options
        ctx.overwritten = Overwritten() if inplace_backward else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        overwritten = ctx.overwritten
        if overwritten is not None:
            overwritten.check()
        logits, target, weight, statistics, totals = ctx.saved_tensors
        options = ctx.options
        needs = ctx.needs_input_grad
        grad_logits = grad_target = None
        if differentiates_backward():
            grad_logits, grad_target = gradients(grad_output, logits, target, weight, options)
            return grad_logits if needs[0] else None, grad_target if needs[1] else None, None, None, None, None
        saved = (grad_output, logits, target, weight, statistics, totals)
        if needs[1]:  # first: the logits it reads may be overwritten next
            reduction, _, label_smoothing = options
            grad_target = ops.softmax_ce_backward_target(*saved, reduction, label_smoothing)
        if needs[0]:
            if overwritten is None:
                grad_logits = ops.softmax_ce_backward(*saved, *options)
            else:
                ops.softmax_ce_backward_(*saved, *options)
                grad_logits = overwritten.mark(logits)
        return grad_logits, grad_target, None, None, None, None


def softmax_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype | None,
    inplace_backward: bool,
) -> Tensor:
    """The loss of checked inputs, as :func:`torchce.ops.softmax_ce_forward` takes them, differentiable."""
    if torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad):
        options = (reduction, ignore_index, label_smoothing)
        loss: Tensor = SoftmaxCE.apply(logits, target, weight, options, dtype, inplace_backward)  # type: ignore[no-untyped-call]
        return loss
    return ops.softmax_ce_forward(logits, target, weight, reduction, ignore_index, label_smoothing, dtype)[0]
