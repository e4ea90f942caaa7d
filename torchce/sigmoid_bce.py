"""Autograd of sigmoid binary cross entropy.

Saved for backward: the logits, target and weights that came in, nothing else. What torch is to transform, or to
differentiate more than once, is computed by :func:`composite` and :func:`gradients`, the kernels' formulas in torch's
own operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from torchce import calls, inplace, ops
from torchce.composites import decompose_for_onnx, differentiate, differentiate_by, product_in_range, reduced, times
from torchce.transforms import differentiates_backward, transformed


def log_sigmoid(x: Tensor) -> Tensor:
    """``F.logsigmoid``, except in an ONNX export."""
    if torch.onnx.is_in_onnx_export():
        # ONNX's exporters write logsigmoid as log(sigmoid(x)): -inf where onnxruntime rounds the sigmoid to 0, from
        # x = -18 on. What takes its place here has no right second derivative at 0.
        return x.clamp(max=0) - x.abs().neg().exp().log1p()
    return F.logsigmoid(x)


class Options(NamedTuple):
    """What a call asks for beside its tensors, in the order of ``csrc/schemas.h``; a new one comes last."""

    reduction: int
    """torch's number: 0 none, 1 mean, 2 sum."""


# For each reduction, made once: a small loss would notice the time to make a NamedTuple, and to unpack one.
PLAIN_OPTIONS = tuple(tuple(Options(reduction)) for reduction in range(3))


def composite(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    dtype: torch.dtype | None,
    *options: Any,
) -> Tensor:
    """The loss of ``sigmoid_bce_forward``, of the same arguments, from differentiable operations.

    With c = pos_weight it is ``w (c t softplus(-x) + (1 - t) softplus(x))``.
    """
    acc = ops.accumulation_dtype(logits.dtype)
    x, t = logits.to(acc), target.to(acc)
    loss = -(times(t, log_sigmoid(x), pos_weight) + times(1 - t, log_sigmoid(-x)))
    if weight is not None:
        loss = weight * loss
    return reduced(loss, Options(*options).reduction).to(dtype or logits.dtype)


def gradients(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients for the logits and for the target, from differentiable operations.

    With p = sigmoid(x) and c = pos_weight (``csrc/math/sigmoid_bce.h``)::

        d loss / d x = w ((1 - t) p - c t (1 - p))
        d loss / d t = w (b |x| + (c - 1) log1p(exp(-|x|))),  b = -1 where x >= 0, c where x < 0
    """
    acc = ops.accumulation_dtype(logits.dtype)
    x, t, g = logits.to(acc), target.to(acc), grad_output.to(acc)
    mean, weighted = Options(*options).reduction == 1, weight is not None or pos_weight is not None
    if mean and not weighted:
        g = g / logits.numel()

    def of_loss(gradient: Tensor) -> Tensor:
        """With upstream gradient, weight and a mean's N."""
        gradient = gradient * g if weight is None else product_in_range(gradient, g, weight)
        return gradient / logits.numel() if mean and weighted else gradient

    positive = t if pos_weight is None else pos_weight * t
    grad_logits = of_loss((1 - t) * torch.sigmoid(x) - positive * torch.sigmoid(-x))
    slope = -x
    if pos_weight is not None:
        negative = x < 0
        slope = torch.where(negative, -times(pos_weight, x), slope)
        curved = (1 - pos_weight) * F.logsigmoid(torch.where(negative, -x, x))
        slope = slope + torch.where(negative & pos_weight.isinf(), 0, curved)  # the linear part is infinite there
    grad_target = of_loss(slope)
    return grad_logits.to(logits.dtype), grad_target.to(target.dtype)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the logits and of the target, where they are needed."""
    overwritten = ctx.overwritten
    if overwritten is not None:
        overwritten = overwritten.checked(grad_output)
    tensors = (grad_output, *ctx.saved_tensors)  # unpacked once: hooks may refuse a second time
    logits, saved = tensors[1], (*tensors, *ctx.options)
    needs_logits, needs_target = ctx.needs_input_grad[:2]
    grad_logits = grad_target = None
    if differentiates_backward(*tensors):
        grad_logits, grad_target = gradients(*saved)
        return grad_logits if needs_logits else None, grad_target if needs_target else None
    # Compiled autograd is traced by Dynamo, which cannot step below autograd (ops.below_autograd).
    compiling = torch.compiler.is_compiling()
    if needs_target:  # first: the logits it reads may be overwritten next
        target_op = ops.sigmoid_bce_backward_target if compiling else ops.eager_sigmoid_bce_backward_target
        grad_target = target_op(*saved)
    if needs_logits and overwritten is None:
        logits_op = ops.sigmoid_bce_backward if compiling else ops.eager_sigmoid_bce_backward
        grad_logits = logits_op(*saved)
    elif needs_logits:
        ops.sigmoid_bce_backward_(*inplace.apart(logits, saved))
        grad_logits = overwritten.mark(logits)
    return grad_logits, grad_target


class SigmoidBCE(Function):
    """The classic form of Function: the ``setup_context`` form costs a ``inspect.signature`` at every call."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        dtype: torch.dtype | None,
        options: Options,
        inplace_backward: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, target, weight, pos_weight)
        ctx.options = options
        ctx.overwritten = inplace.Overwritten() if inplace_backward else None
        loss: Tensor = ops.eager_sigmoid_bce_forward(logits, target, weight, pos_weight, dtype, *options)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_backward(ctx, grad_output), None, None, None, None, None


def sigmoid_bce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    dtype: torch.dtype | None,
    options: tuple[Any, ...],
    inplace_backward: bool,
) -> Tensor:
    """The loss of checked inputs, as ``sigmoid_bce_forward`` takes them, differentiable."""
    arguments = (logits, target, weight, pos_weight, dtype, *options)
    if transformed(logits, target, weight, pos_weight):
        calls.note_composite()
        return composite(*arguments)
    if torch.compiler.is_compiling():  # a graph keeps the op with its autograd formula; an exported one, no Function
        forward: Tensor = ops.sigmoid_bce_forward(*arguments)
        return forward
    if torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad):
        loss: Tensor = SigmoidBCE.apply(*arguments[:5], options, inplace_backward)  # type: ignore[no-untyped-call]
        return loss
    forward = ops.eager_sigmoid_bce_forward(*arguments)
    return forward


# --- the ops themselves, in graphs whose Functions have been traced away -------------------------------------------


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = Options(*inputs[5:])
    ctx.overwritten = None


def _op_backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[2:4]):
        raise RuntimeError("weight, pos_weight: expected tensors that do not require grad: no gradient leads to them")
    return *_backward(ctx, grad_loss), *(None,) * (len(ctx.needs_input_grad) - 2)


differentiate("sigmoid_bce_forward", composite, _set_up, _op_backward)
differentiate_by("sigmoid_bce_backward", lambda *saved: gradients(*saved)[0])
differentiate_by("sigmoid_bce_backward_target", lambda *saved: gradients(*saved)[1])
decompose_for_onnx("sigmoid_bce_forward", composite)
