"""Autograd of softmax cross entropy.

Saved for backward: the logits and target that came in, two numbers a row (one more for probability targets, and for
entropies) and two for the whole; never probabilities. What torch is to transform, or to differentiate more than once,
is computed by the kernels' formulas in torch's own operations (:mod:`torchce.softmax_ce_formulas`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchce import calls, inplace, ops
from torchce.composites import decompose_for_onnx, differentiate, differentiate_by, sum_of_rows
from torchce.softmax_ce_formulas import (
    Gradients,
    OfInputs,
    Options,
    Wanted,
    composite,
    composite_outputs,
    decomposition,
    gradients,
    mean_divisor,
    outputs_decomposition,
    outputs_gradients,
    row_weights,
)
from torchce.transforms import differentiates_backward, transformed

__all__ = ["Options", "Wanted", "eager_softmax_ce", "mean_divisor", "row_weights", "softmax_ce", "softmax_ce_outputs"]

_SUM = 2


def _backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a plain loss's logits and of a probability target, where they are needed."""
    if grad_output is None:  # autograd's word for zero, where gradients are not materialized
        return None, None
    overwritten = ctx.overwritten
    if overwritten is not None:
        overwritten = overwritten.checked(grad_output)
    logits, target, weight, statistics, totals = ctx.saved_tensors
    options: Sequence[Any] = ctx.options
    needs_logits, needs_target = ctx.needs_input_grad[:2]
    grad_target = None
    if differentiates_backward(grad_output, logits, target, weight):
        grad_logits, grad_target = gradients(Gradients(grad_output), logits, target, weight, Options(*options))
        return grad_logits if needs_logits else None, grad_target if needs_target else None
    # Compiled autograd is traced by Dynamo, which cannot step below autograd (ops.below_autograd).
    compiling = torch.compiler.is_compiling()
    if needs_target:  # first: the logits it reads may be overwritten next
        target_op = ops.softmax_ce_backward_target if compiling else ops.eager_softmax_ce_backward_target
        grad_target = target_op(grad_output, logits, target, weight, None, statistics, totals, *options)
    if not needs_logits:
        return None, grad_target
    arguments = (grad_output, logits, target, weight, statistics, totals, *options)
    if overwritten is not None:
        ops.softmax_ce_backward_(*inplace.apart(logits, arguments))
        return overwritten.mark(logits), grad_target
    op = ops.softmax_ce_backward if compiling else ops.eager_softmax_ce_backward
    return op(*arguments), grad_target


def _outputs_backward(ctx: Any, grads: Gradients) -> tuple[Tensor | None, ...]:
    """Gradients of logits, target, weight (none) and scale, where they are needed.

    Of loss, lse and entropy some may have led to nothing; the target has no part but in the loss.
    """
    given = [grad for grad in grads if grad is not None]
    if not given:
        return None, None, None, None
    overwritten = ctx.overwritten
    if overwritten is not None:
        overwritten = overwritten.checked(given[0])
    logits, target, weight, scale, statistics, totals = ctx.saved_tensors
    options: Options = ctx.options
    needs_logits, needs_target, _, needs_scale = ctx.needs_input_grad[:4]
    if differentiates_backward(*grads, logits, target, weight, scale):
        of_inputs = outputs_gradients(grads, logits, target, weight, scale, options)
        of_scale = None if of_inputs.scale is None else sum_of_rows(of_inputs.scale).to(scale.dtype)
        found = of_inputs.logits, of_inputs.target, None, of_scale
        return tuple(grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=False))
    if grads.output is None:
        needs_target = False
        grads = grads._replace(output=given[0].new_zeros(()))
        options = options._replace(reduction=_SUM)  # a mean's divisor may be 0
    saved = (logits, target, weight, scale, statistics, totals, *options)
    compiling = torch.compiler.is_compiling()  # as in _backward
    grad_logits = grad_target = grad_scale = None
    if needs_target:  # first, as the scale's: the logits they read may be overwritten next
        target_op = ops.softmax_ce_backward_target if compiling else ops.eager_softmax_ce_backward_target
        grad_target = target_op(grads.output, *saved)
    if needs_scale:
        scale_op = ops.softmax_ce_backward_scale if compiling else ops.eager_softmax_ce_backward_scale
        grad_scale = sum_of_rows(scale_op(*grads, *saved)).to(scale.dtype)
    if needs_logits and overwritten is not None:
        ops.softmax_ce_backward_outputs_(*inplace.apart(logits, (*grads, *saved)))
        grad_logits = overwritten.mark(logits)
    elif needs_logits:
        op = ops.softmax_ce_backward_outputs if compiling else ops.eager_softmax_ce_backward_outputs
        grad_logits = op(*grads, *saved)
    return grad_logits, grad_target, None, grad_scale


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
        return *_backward(ctx, grad_output), None, None, None, None


class SoftmaxCEOutputs(Function):
    """The loss with what else a row has, of which lse and entropy are differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        scale: Tensor | None,
        dtype: torch.dtype | None,
        wanted: Wanted,
        options: Options,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, lse, predictions, entropy, *saved = ops.eager_softmax_ce_forward_outputs(
            logits, target, weight, scale, dtype, *wanted, *options
        )
        ctx.save_for_backward(logits, target, weight, scale, *saved)
        ctx.options = options
        ctx.overwritten = inplace.Overwritten() if inplace_backward else None
        ctx.mark_non_differentiable(*_without_gradient(wanted, lse, predictions, entropy))
        ctx.set_materialize_grads(False)
        return loss, lse, predictions, entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return *_outputs_backward(ctx, Gradients(grad_loss, grad_lse, grad_entropy)), None, None, None, None


def _without_gradient(wanted: Wanted, lse: Tensor, predictions: Tensor, entropy: Tensor) -> list[Tensor]:
    return [predictions, *([] if wanted.lse else [lse]), *([] if wanted.entropy else [entropy])]


def _needs_composite(logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor | None = None) -> bool:
    return (weight is not None and weight.requires_grad and torch.is_grad_enabled()) or transformed(
        logits, target, weight, scale
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
    scale: Tensor | None,
    dtype: torch.dtype | None,
    wanted: Wanted,
    options: Options,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss with every option, lse, predictions and entropy, of what ``softmax_ce_forward_outputs`` takes."""
    arguments = (logits, target, weight, scale, dtype)
    if _needs_composite(logits, target, weight, scale):
        calls.note_composite()
        return composite_outputs(*arguments, *wanted, *options)
    needs_grad = logits.requires_grad or target.requires_grad or (scale is not None and scale.requires_grad)
    if torch.compiler.is_compiling():  # as in softmax_ce
        loss, lse, predictions, entropy, *_ = ops.softmax_ce_forward_outputs(*arguments, *wanted, *options)
    elif torch.is_grad_enabled() and needs_grad:
        loss, lse, predictions, entropy = SoftmaxCEOutputs.apply(*arguments, wanted, options, inplace_backward)  # type: ignore[no-untyped-call]
    else:
        loss, lse, predictions, entropy, *_ = ops.eager_softmax_ce_forward_outputs(*arguments, *wanted, *options)
    return loss, lse, predictions, entropy


# --- the ops themselves, in graphs whose Functions have been traced away -------------------------------------------


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, _dtype, *options = inputs
    _, *saved = output
    ctx.save_for_backward(logits, target, weight, *saved)
    ctx.options = options
    ctx.overwritten = None
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _set_up_outputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, scale, _dtype, lse, predictions, entropy, *options = inputs
    _, *outputs, statistics, totals = output
    ctx.save_for_backward(logits, target, weight, scale, statistics, totals)
    ctx.options = Options(*options)  # a graph drops defaults
    ctx.overwritten = None
    wanted = Wanted(lse, predictions, entropy)
    ctx.mark_non_differentiable(*_without_gradient(wanted, *outputs), statistics, totals)
    ctx.set_materialize_grads(False)


def _refuse_weight(ctx: Any, *grads: Tensor | None) -> None:
    if ctx.needs_input_grad[2] and any(grad is not None for grad in grads):
        raise RuntimeError("weight: expected a tensor that does not require grad: no gradient leads to it here")


def _op_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    _refuse_weight(ctx, grad_loss)
    found = _backward(ctx, grad_loss)
    return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _op_outputs_backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None, grad_entropy: Tensor | None, *__: None
) -> tuple[Tensor | None, ...]:
    grads = Gradients(grad_loss, grad_lse, grad_entropy)
    _refuse_weight(ctx, *grads)
    found = _outputs_backward(ctx, grads)
    return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _gradient(grad_output: Tensor, *saved: Any) -> Tensor:
    """What ``softmax_ce_backward`` computes, of the same arguments."""
    logits, target, weight, _statistics, _totals, *options = saved
    return gradients(Gradients(grad_output), logits, target, weight, Options(*options))[0]


def _of_inputs(grads: Gradients, *saved: Any) -> OfInputs:
    logits, target, weight, scale, _statistics, _totals, *options = saved
    return outputs_gradients(grads, logits, target, weight, scale, Options(*options))


def _outputs_gradient(*arguments: Any) -> Tensor:
    """What ``softmax_ce_backward_outputs`` computes, of the same arguments."""
    return _of_inputs(Gradients(*arguments[:3]), *arguments[3:]).logits


def _scale_gradient(*arguments: Any) -> Tensor:
    """What ``softmax_ce_backward_scale`` computes, of the same arguments."""
    of_scale = _of_inputs(Gradients(*arguments[:3]), *arguments[3:]).scale
    assert of_scale is not None  # there is one
    return of_scale


def _target_gradient(grad_output: Tensor, *saved: Any) -> Tensor:
    """What ``softmax_ce_backward_target`` computes, of the same arguments."""
    of_target = _of_inputs(Gradients(grad_output), *saved).target
    assert of_target is not None  # of probabilities
    return of_target


differentiate("softmax_ce_forward", decomposition, _set_up, _op_backward)
differentiate("softmax_ce_forward_outputs", outputs_decomposition, _set_up_outputs, _op_outputs_backward)
differentiate_by("softmax_ce_backward", _gradient)
differentiate_by("softmax_ce_backward_outputs", _outputs_gradient)
differentiate_by("softmax_ce_backward_scale", _scale_gradient)
differentiate_by("softmax_ce_backward_target", _target_gradient)
decompose_for_onnx("softmax_ce_forward", decomposition)
decompose_for_onnx("softmax_ce_forward_outputs", outputs_decomposition)
