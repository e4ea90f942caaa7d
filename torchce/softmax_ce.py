"""Autograd of softmax cross entropy.

Saved for backward: the logits and target that came in, two numbers a row (three for probability targets) and two for
the whole; never probabilities. What torch is to transform, or to differentiate more than once, is computed by the
kernels' formulas in torch's own operations (:mod:`torchce.softmax_ce_formulas`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchce import calls, inplace, ops
from torchce.composites import decompose_for_onnx, differentiate, differentiate_by
from torchce.softmax_ce_formulas import (
    N_PLAIN,
    Options,
    composite,
    composite_outputs,
    decomposition,
    gradients,
    mean_divisor,
    outputs_decomposition,
    row_weights,
)
from torchce.transforms import differentiates_backward, transformed

__all__ = ["Options", "eager_softmax_ce", "mean_divisor", "row_weights", "softmax_ce", "softmax_ce_outputs"]

_SUM = 2


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the logits and of a probability target, where they are needed.

    Of loss and lse either may have led to nothing; the target has no part in lse.
    """
    upstream = grad_lse if grad_output is None else grad_output
    if upstream is None:  # autograd's word for zero, where gradients are not materialized
        return None, None
    overwritten = ctx.overwritten
    if overwritten is not None:
        overwritten = overwritten.checked(upstream)
    logits, target, weight, statistics, totals = ctx.saved_tensors
    options: Sequence[Any] = ctx.options
    needs_logits, needs_target = ctx.needs_input_grad[:2]
    grad_target = None
    if differentiates_backward(grad_output, grad_lse, logits, target, weight):
        grad_logits, grad_target = gradients(grad_output, grad_lse, logits, target, weight, Options(*options))
        return grad_logits if needs_logits else None, grad_target if needs_target else None
    if grad_output is None:
        needs_target = False
        grad_output, options = upstream.new_zeros(()), (_SUM, *options[1:])  # a mean's divisor may be 0
    saved = (logits, target, weight, statistics, totals, *options)
    # Compiled autograd is traced by Dynamo, which cannot step below autograd (ops.below_autograd).
    compiling = torch.compiler.is_compiling()
    if needs_target:  # first: the logits it reads may be overwritten next
        target_op = ops.softmax_ce_backward_target if compiling else ops.eager_softmax_ce_backward_target
        grad_target = target_op(grad_output, *saved)
    if not needs_logits:
        return None, grad_target
    is_plain = len(options) == N_PLAIN
    arguments = (grad_output, *saved) if is_plain else (grad_output, grad_lse, *saved)
    if overwritten is not None:
        in_place = ops.softmax_ce_backward_ if is_plain else ops.softmax_ce_backward_outputs_
        in_place(*inplace.apart(logits, arguments))
        return overwritten.mark(logits), grad_target
    if is_plain:
        op = ops.softmax_ce_backward if compiling else ops.eager_softmax_ce_backward
    else:
        op = ops.softmax_ce_backward_outputs if compiling else ops.eager_softmax_ce_backward_outputs
    return op(*arguments), grad_target


class SoftmaxCE(Function):
    """The classic form of Function: the ``setup_context`` form costs a ``inspect.signature`` at every call."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype | None,
        options: tuple[Any, ...],
        inplace_backward: bool,
    ) -> Tensor:
        loss, statistics, totals = ops.eager_softmax_ce_forward(logits, target, weight, dtype, *options)
        ctx.save_for_backward(logits, target, weight, statistics, totals)
        ctx.options = options
        ctx.overwritten = inplace.Overwritten() if inplace_backward else None
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_backward(ctx, grad_output, None), None, None, None, None


class SoftmaxCEOutputs(Function):
    """The loss with what else a row has, of which lse is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype | None,
        returns_lse: bool,
        returns_predictions: bool,
        options: Options,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, lse, predictions, *saved = ops.eager_softmax_ce_forward_outputs(
            logits, target, weight, dtype, returns_lse, returns_predictions, *options
        )
        ctx.save_for_backward(logits, target, weight, *saved)
        ctx.options = options
        ctx.overwritten = inplace.Overwritten() if inplace_backward else None
        ctx.mark_non_differentiable(predictions, *([] if returns_lse else [lse]))
        ctx.set_materialize_grads(False)
        return loss, lse, predictions

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grad_loss, grad_lse), None, None, None, None, None, None


def _needs_composite(logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    return (weight is not None and weight.requires_grad and torch.is_grad_enabled()) or transformed(
        logits, target, weight
    )


def softmax_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    options: tuple[Any, ...],
    inplace_backward: bool,
) -> Tensor:
    """The loss of checked inputs, as ``softmax_ce_forward`` takes them, differentiable; of plain options."""
    if _needs_composite(logits, target, weight):
        calls.note_composite()
        return composite(logits, target, weight, dtype, *options)
    if torch.compiler.is_compiling():  # a graph keeps the op with its autograd formula; an exported one, no Function
        forward: Tensor = ops.softmax_ce_forward(logits, target, weight, dtype, *options)[0]
        return forward
    return eager_softmax_ce(logits, target, weight, dtype, options, inplace_backward)


def eager_softmax_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    options: tuple[Any, ...],
    inplace_backward: bool,
) -> Tensor:
    """The loss where nothing transforms or compiles it, of inputs that may be unchecked: the op checks them."""
    if torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad):
        loss: Tensor = SoftmaxCE.apply(logits, target, weight, dtype, options, inplace_backward)  # type: ignore[no-untyped-call]
        return loss
    forward: Tensor = ops.eager_softmax_ce_forward(logits, target, weight, dtype, *options)[0]
    return forward


def softmax_ce_outputs(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    returns_lse: bool,
    returns_predictions: bool,
    options: Options,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss with every option, lse and predictions, of what ``softmax_ce_forward_outputs`` takes."""
    arguments = (logits, target, weight, dtype, returns_lse, returns_predictions)
    if _needs_composite(logits, target, weight):
        calls.note_composite()
        return composite_outputs(*arguments, *options)
    if torch.compiler.is_compiling():  # as in softmax_ce
        loss, lse, predictions, *_ = ops.softmax_ce_forward_outputs(*arguments, *options)
    elif torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad):
        loss, lse, predictions = SoftmaxCEOutputs.apply(*arguments, options, inplace_backward)  # type: ignore[no-untyped-call]
    else:
        loss, lse, predictions, *_ = ops.eager_softmax_ce_forward_outputs(*arguments, *options)
    return loss, lse, predictions


# --- the ops themselves, in graphs whose Functions have been traced away -------------------------------------------


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, _, *options = inputs
    _, *saved = output
    ctx.save_for_backward(logits, target, weight, *saved)
    ctx.options = options
    ctx.overwritten = None
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _set_up_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, dtype, returns_lse, _, *options = inputs
    loss, lse, predictions, *saved = output
    _set_up(ctx, (logits, target, weight, dtype, *Options(*options)), (loss, *saved))  # a graph drops defaults
    ctx.mark_non_differentiable(predictions, *saved, *([] if returns_lse else [lse]))


def _op_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _op_outputs_backward(ctx, grad_loss, None)


def _op_outputs_backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[2] and not (grad_loss is None and grad_lse is None):
        raise RuntimeError("weight: expected a tensor that does not require grad: no gradient leads to it here")
    return *_backward(ctx, grad_loss, grad_lse), *(None,) * (len(ctx.needs_input_grad) - 2)


def _gradient(grad_output: Tensor, *saved: Any) -> Tensor:
    """What ``softmax_ce_backward`` computes, of the same arguments."""
    return _outputs_gradient(grad_output, None, *saved)


def _outputs_gradient(grad_output: Tensor, grad_lse: Tensor | None, *saved: Any) -> Tensor:
    """What ``softmax_ce_backward_outputs`` computes, of the same arguments."""
    logits, target, weight, _statistics, _totals, *options = saved
    return gradients(grad_output, grad_lse, logits, target, weight, Options(*options))[0]


def _target_gradient(*saved: Any) -> Tensor:
    """What ``softmax_ce_backward_target`` computes, of the same arguments."""
    grad_output, logits, target, weight, _statistics, _totals, *options = saved
    grad_target = gradients(grad_output, None, logits, target, weight, Options(*options))[1]
    assert grad_target is not None  # of probabilities
    return grad_target


differentiate("softmax_ce_forward", decomposition, _set_up, _op_backward)
differentiate("softmax_ce_forward_outputs", outputs_decomposition, _set_up_outputs, _op_outputs_backward)
differentiate_by("softmax_ce_backward", _gradient)
differentiate_by("softmax_ce_backward_outputs", _outputs_gradient)
differentiate_by("softmax_ce_backward_target", _target_gradient)
decompose_for_onnx("softmax_ce_forward", decomposition)
decompose_for_onnx("softmax_ce_forward_outputs", outputs_decomposition)
