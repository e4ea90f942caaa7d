"""Autograd of divergences between two Bernoulli distributions, and of the entropy of one, elementwise.

Saved for backward: the operands that came in, nothing else. What torch is to transform, or to differentiate more than
once, is computed by :func:`composite` and :func:`gradients`, in torch's own operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from torchce import calls, ops
from torchce.composites import decompose_for_onnx, differentiate, differentiate_by, reduced
from torchce.divergence_formulas import Distribution, finite_log, kl_terms
from torchce.sigmoid_bce import log_sigmoid
from torchce.transforms import differentiates_backward, transformed


class Options(NamedTuple):
    """What a call asks for beside its tensors, in the order of ``csrc/schemas.h``; a new one comes last."""

    reduction: int
    """torch's number: 0 none, 1 mean, 2 sum."""
    target_logits: bool


def _sigmoid(x: Tensor) -> Tensor:
    """The sigmoid, by a formula whose derivatives keep their digits where it is nearly 1."""
    return log_sigmoid(x).exp()


def _probability_or_logit(t: Tensor, is_logit: bool) -> Tensor:
    """``t``, or NaN for what is no probability."""
    return t if is_logit else torch.where((t < 0) | (t > 1), torch.nan, t)


def _labels(x: Tensor) -> tuple[Distribution, Distribution]:
    """Yes and no, of a logit."""
    yes, no = (Distribution(_sigmoid(y), log_sigmoid(y), is_known=False) for y in (x, -x))
    return yes, no


def composite(
    input: Tensor, target: Tensor | None, dtype: torch.dtype | None, reduction: int, target_logits: bool
) -> Tensor:
    """The loss of ``binary_divergence_forward``, of the same arguments, from differentiable operations."""
    acc = ops.divergence_accumulation(input, target)
    student = _labels(input.to(acc))
    if target is None:
        losses = -sum((label.p * finite_log(label) for label in student), start=student[0].p.new_zeros(()))
    else:
        t = _probability_or_logit(target.to(acc), target_logits)
        teacher = _labels(t) if target_logits else tuple(Distribution(p, p.log(), is_known=True) for p in (t, 1 - t))
        yes, no = (kl_terms(*of_label) for of_label in zip(teacher, student, strict=True))
        losses = yes + no
    return reduced(losses, reduction).to(dtype or input.dtype)


def gradients(
    grad_output: Tensor, input: Tensor, target: Tensor | None, reduction: int, target_logits: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients for the input and for the target, from differentiable operations (``csrc/math/binary_divergence.h``).

    With the student's logit b and q = sigmoid(b), the teacher's a and p::

        d KL / d b = q - p,  d KL / d a = p (1 - p) (a - b),  d KL / d p = a - b,  d H / d b = -b q (1 - q)
    """
    acc = ops.divergence_accumulation(input, target)
    b, g = input.to(acc), grad_output.to(acc)
    if reduction == 1:
        g = g / input.numel()
    if target is None:
        finite = torch.where(b.isinf(), 0, b)
        return (g * (-finite * _sigmoid(b) * _sigmoid(-b))).to(input.dtype), None
    t = _probability_or_logit(target.to(acc), target_logits)
    p = _sigmoid(t) if target_logits else t
    grad_input = g * (_sigmoid(b) - p)
    if target_logits:
        gap = torch.where(t == b, 0, t - b).clamp(torch.finfo(acc).min, torch.finfo(acc).max)
        grad_target = g * (p * _sigmoid(-t) * gap)
    else:
        grad_target = g * ((p.log() - (-p).log1p()) - b)
    return grad_input.to(input.dtype), grad_target.to(target.dtype)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the target, where they are needed."""
    saved = (grad_output, *ctx.saved_tensors, *ctx.options)
    needs_input, needs_target = ctx.needs_input_grad[:2]
    if differentiates_backward(*saved[:3]):
        grad_input, grad_target = gradients(*saved)
        return grad_input if needs_input else None, grad_target if needs_target else None
    # Compiled autograd is traced by Dynamo, which cannot step below autograd (ops.below_autograd).
    compiling = torch.compiler.is_compiling()
    of_input = ops.binary_divergence_backward if compiling else ops.eager_binary_divergence_backward
    of_target = ops.binary_divergence_backward_target if compiling else ops.eager_binary_divergence_backward_target
    return of_input(*saved) if needs_input else None, of_target(*saved) if needs_target else None


class BinaryDivergence(Function):
    """The classic form of Function: the ``setup_context`` form costs a ``inspect.signature`` at every call."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor | None, dtype: torch.dtype | None, options: Options) -> Tensor:
        ctx.save_for_backward(input, target)
        ctx.options = options
        loss: Tensor = ops.eager_binary_divergence_forward(input, target, dtype, *options)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_backward(ctx, grad_output), None, None


def binary_divergence(input: Tensor, target: Tensor | None, dtype: torch.dtype | None, options: Options) -> Tensor:
    """The loss of checked inputs, as ``binary_divergence_forward`` takes them, differentiable."""
    arguments = (input, target, dtype)
    if transformed(input, target):
        calls.note_composite()
        return composite(*arguments, *options)
    if torch.compiler.is_compiling():  # a graph keeps the op with its autograd formula; an exported one, no Function
        forward: Tensor = ops.binary_divergence_forward(*arguments, *options)
        return forward
    if torch.is_grad_enabled() and (input.requires_grad or (target is not None and target.requires_grad)):
        loss: Tensor = BinaryDivergence.apply(*arguments, options)  # type: ignore[no-untyped-call]
        return loss
    forward = ops.eager_binary_divergence_forward(*arguments, *options)
    return forward


# --- the ops themselves, in graphs whose Functions have been traced away -------------------------------------------


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = Options(*inputs[3:])


def _op_backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, grad_loss), *(None,) * (len(ctx.needs_input_grad) - 2)


def _gradient_of_target(*saved: Any) -> Tensor:
    gradient = gradients(*saved)[1]
    assert gradient is not None  # the op has refused that
    return gradient


differentiate("binary_divergence_forward", composite, _set_up, _op_backward)
differentiate_by("binary_divergence_backward", lambda *saved: gradients(*saved)[0])
differentiate_by("binary_divergence_backward_target", _gradient_of_target)
decompose_for_onnx("binary_divergence_forward", composite)
