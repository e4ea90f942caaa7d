"""Autograd of divergences between two distributions, and of the entropy of one.

Saved for backward: the operands that came in, and up to six numbers a row; never probabilities. What torch is to
transform, or to differentiate more than once, is computed by the kernels' formulas in torch's own operations
(:mod:`torchce.divergence_formulas`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchce import calls, ops
from torchce.composites import decompose_for_onnx, differentiate, differentiate_by
from torchce.divergence_formulas import ENTROPY, JS, KL, REVERSE_KL, Options, composite, decomposition, gradients
from torchce.transforms import differentiates_backward, transformed

__all__ = ["ENTROPY", "JS", "KL", "REVERSE_KL", "Options", "divergence"]


def _backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of the target, where they are needed."""
    if grad_output is None:  # autograd's word for zero, where gradients are not materialized
        return None, None
    input, target, mask, statistics, totals = ctx.saved_tensors
    options: Options = ctx.options
    needs_input, needs_target = ctx.needs_input_grad[:2]
    if differentiates_backward(grad_output, input, target):
        grad_input, grad_target = gradients(grad_output, input, target, mask, options)
    else:
        # Compiled autograd is traced by Dynamo, which cannot step below autograd (ops.below_autograd).
        op = ops.divergence_backward if torch.compiler.is_compiling() else ops.eager_divergence_backward
        needs = (needs_input, needs_target)
        grad_input, grad_target = op(grad_output, input, target, mask, statistics, totals, *needs, *options)
    return grad_input if needs_input else None, grad_target if needs_target else None


class Divergence(Function):
    """The classic form of Function: the ``setup_context`` form costs a ``inspect.signature`` at every call."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor | None,
        mask: Tensor | None,
        dtype: torch.dtype | None,
        options: Options,
    ) -> Tensor:
        loss, statistics, totals = ops.eager_divergence_forward(input, target, mask, dtype, *options)
        ctx.save_for_backward(input, target, mask, statistics, totals)
        ctx.options = options
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_backward(ctx, grad_output), None, None, None


def divergence(
    input: Tensor, target: Tensor | None, mask: Tensor | None, dtype: torch.dtype | None, options: Options
) -> Tensor:
    """The loss of checked inputs, as ``divergence_forward`` takes them, differentiable."""
    arguments = (input, target, mask, dtype)
    if transformed(input, target):
        calls.note_composite()
        return composite(*arguments, *options)
    if torch.compiler.is_compiling():  # a graph keeps the op with its autograd formula; an exported one, no Function
        forward: Tensor = ops.divergence_forward(*arguments, *options)[0]
        return forward
    if torch.is_grad_enabled() and (input.requires_grad or (target is not None and target.requires_grad)):
        loss: Tensor = Divergence.apply(*arguments, options)  # type: ignore[no-untyped-call]
        return loss
    forward = ops.eager_divergence_forward(*arguments, *options)[0]
    return forward


# --- the ops themselves, in graphs whose Functions have been traced away -------------------------------------------


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, mask, _dtype, *options = inputs
    _, *saved = output
    ctx.save_for_backward(input, target, mask, *saved)
    ctx.options = Options(*options)  # a graph drops defaults
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    found = _backward(ctx, grad_loss)
    return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    _statistics: Tensor,
    _totals: Tensor,
    needs_input: bool,
    needs_target: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """What ``divergence_backward`` computes, of the same arguments."""
    grad_input, grad_target = gradients(grad_output, input, target, mask, Options(*options))
    unwanted = input if target is None else target
    return (
        grad_input if needs_input else input.new_empty(0),
        unwanted.new_empty(0) if grad_target is None or not needs_target else grad_target,
    )


differentiate("divergence_forward", decomposition, _set_up, _op_backward)
differentiate_by("divergence_backward", _gradients)
decompose_for_onnx("divergence_forward", decomposition)
