"""Autograd of softmax cross entropy.

Saved for backward: the logits and target that came in, two numbers a row (three for probability targets) and two for
the whole; never probabilities. What torch is to transform, or to differentiate more than once, is computed by
:func:`composite` and :func:`gradients`, the kernels' formulas in torch's own operations.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from torchce import calls, inplace, ops
from torchce.composites import decompose_for_onnx, differentiate, differentiate_by, product_in_range, reduced, times
from torchce.transforms import all_finite, all_true, differentiates_backward, transformed


class Options(NamedTuple):
    """What a call asks for beside its tensors, in the order of ``csrc/schemas.h``; a new one comes last."""

    reduction: int
    """torch's number: 0 none, 1 mean, 2 sum."""
    ignore_index: int = -100
    label_smoothing: float = 0.0


@functools.lru_cache
def known_options(*fields: Any) -> tuple[Any, ...]:
    """Options as a plain tuple, and made once: a small loss would notice the time to make and to unpack the other."""
    return tuple(Options(*fields))


def composite(
    logits: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype | None, *options: Any
) -> Tensor:
    """The loss of ``softmax_ce_forward``, of the same arguments, from differentiable operations.

    An ignored row's logits are masked before the softmax, not its loss after: a NaN or an infinity among them would
    still reach the second derivatives. Where there is none, the pass over all logits is spared, if that can be seen.
    """
    reduction, ignore_index, label_smoothing = Options(*options)
    acc = ops.softmax_ce_accumulation(logits, target, weight)
    x = logits.to(acc)
    class_dim = min(1, x.dim() - 1)
    along_classes = [-1 if d == class_dim else 1 for d in range(x.dim())]
    w = None if weight is None else weight.to(acc).view(along_classes)
    classes = x.shape[class_dim]

    if target.is_floating_point():
        u = target.to(acc)
        if label_smoothing != 0:
            u = (1 - label_smoothing) * u + label_smoothing / classes
        rows = -_over_classes(u, w, torch.log_softmax(x, class_dim), class_dim)
        return reduced(rows, reduction).to(dtype or logits.dtype)

    index = target.to(torch.int64)
    kept = index != ignore_index
    if not all_true(kept):
        x = torch.where(kept.unsqueeze(class_dim), x, 0)
    log_p = torch.log_softmax(x, class_dim)
    is_class = (index >= 0) & (index < classes)
    a_class = torch.where(is_class, index, 0)
    row_weight = kept.to(acc)
    if w is not None:
        row_weight = w.expand_as(x).gather(class_dim, a_class.unsqueeze(class_dim)).squeeze(class_dim)
    # nll_loss does not serve: inside vmap its gradient is 0 times an infinite weight, NaN, for the other classes.
    log_p_of_target = log_p.gather(class_dim, a_class.unsqueeze(class_dim)).squeeze(class_dim)
    rows = -times((1 - label_smoothing) * row_weight, log_p_of_target)
    if label_smoothing != 0:
        # The share is within the sum, which is in range then wherever its terms are.
        share = label_smoothing / classes
        shared, terms = (None, share * log_p) if w is None else (share * w, log_p)
        rows = rows - _over_classes(None, shared, terms, class_dim)
    if x.is_cpu:  # nll_loss raises for a bad index and is 0 in an ignored row
        rows = torch.where(kept, rows, F.nll_loss(log_p.detach(), index, ignore_index=ignore_index, reduction="none"))
    else:  # there it would take the process with it: the row becomes NaN instead
        rows = torch.where(kept, torch.where(is_class, rows, torch.nan), 0)
    loss = rows if reduction == 0 else rows.sum()
    if reduction == 1:  # NaN without a row, but with the gradient and the tangent 0
        has_rows = kept.any()
        loss = loss / torch.where(has_rows, torch.where(kept, row_weight, 0).sum(), 1)
        loss = torch.where(has_rows, loss, torch.nan)
    return loss.to(dtype or logits.dtype)


def _over_classes(u: Tensor | None, weight: Tensor | None, log_p: Tensor, class_dim: int) -> Tensor:
    """``sum_k weight_k u_k log_p_k``, infinite with a weight, even where the log_p beside it is rounded to 0.

    Of a single class log_p is 0 itself, and the sum NaN.
    """
    if weight is not None and not all_finite(weight):
        rounded = weight.isinf() & (log_p == 0)
        log_p = log_p - (log_p.shape[class_dim] - 1) * rounded.to(log_p.dtype)
    if u is not None:
        return times(u, log_p, weight).sum(class_dim)
    return (log_p if weight is None else times(weight, log_p)).sum(class_dim)


def mean_divisor(target: Tensor, weight: Tensor | None, ignore_index: int, classes: int, dtype: torch.dtype) -> Tensor:
    """What a mean divides the sum of all losses by; it needs no logits, nor waits for a device.

    For class indices that is the sum of their weights, to which ignored rows and bad indices add nothing; for
    probabilities, the number of rows. :func:`torchce.ops.softmax_ce_forward_backward_` makes no mean by itself:
    ``grad_output`` and the loss are to be divided by this.

    Shape:
        - target: class indices of any shape, or probabilities with ``classes`` in one of their dimensions
        - weight: ``[classes]``
        - output: a scalar of ``dtype``, the accumulation dtype
    """
    if target.is_floating_point():
        return target.new_full((), target.numel() // classes, dtype=dtype)
    index = target.to(torch.int64)
    if ignore_index >= 0:  # it may be a class
        index = torch.where(index == ignore_index, -1, index)
    if weight is None:
        return (index.clamp(0, classes - 1) == index).sum().to(dtype)
    beyond = weight.new_zeros(1, dtype=dtype)  # on either side of the classes: one pass less than to compare twice
    weights = torch.cat([beyond, weight.to(dtype), beyond])
    return weights.index_select(0, (index.clamp(-1, classes) + 1).flatten()).sum()


def gradients(
    grad_output: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Gradients for the logits and for target probabilities, from differentiable operations.

    With p = softmax(x), coefficients u_k of all classes and h of the target class (``csrc/math/softmax_ce.h``)::

        d loss / d x_j = p_j (h + sum_k u_k) - u_j - h [j == y]
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

    acc = ops.softmax_ce_accumulation(logits, target, weight)
    x = logits.to(acc)
    classes = x.shape[1]
    w = (x.new_ones(classes) if weight is None else weight).view(classes, *[1] * (x.dim() - 2))
    g = grad_output.to(acc)
    if reduction == 0:
        g = g.unsqueeze(1)

    if target.is_floating_point():
        if reduction == 1:
            g = g / (x.numel() // classes)
        u = w * (target.to(acc) * (1 - label_smoothing) + label_smoothing / classes)
        grad_logits = g * (torch.softmax(x, 1) * u.sum(1, keepdim=True) - u)
        grad_target = product_in_range((label_smoothing - 1) * torch.log_softmax(x, 1), g, w)
        return grad_logits.to(logits.dtype), grad_target.to(target.dtype)

    index = target.to(torch.int64).unsqueeze(1)
    kept = index != ignore_index
    is_class = (index >= 0) & (index < classes)
    g = torch.where(is_class | ~kept, g, torch.nan)  # a bad index, which on the CPU the forward has refused
    index = torch.where(kept & is_class, index, 0)
    p = torch.softmax(torch.where(kept, x, 0), 1)  # masked before, as in `composite`
    row_weight = w.expand_as(x).gather(1, index)
    rest: Tensor | int = 1  # what has still to divide the coefficients: g itself would be infinite, as of tiny weights
    if reduction == 1:
        divisor = torch.where(kept & is_class, row_weight, 0).sum()
        quotient = g / divisor
        divided = quotient.isfinite() | ~g.isfinite()
        g, rest = torch.where(divided, quotient, g), torch.where(divided, 1, divisor)
    is_target = torch.zeros_like(x, dtype=torch.bool).scatter(1, index, True)
    h = g * ((1 - label_smoothing) * row_weight / rest)
    grad_logits = p * h - torch.where(is_target, h, 0)  # a product with 0 would be NaN where h is infinite
    if label_smoothing != 0:
        even_share = label_smoothing / classes
        grad_logits = grad_logits + p * (g * ((w * even_share).sum() / rest)) - g * even_share / rest * w
    return torch.where(kept, grad_logits, 0).to(logits.dtype), None


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the logits and of a probability target, where they are needed."""
    overwritten = ctx.overwritten
    if overwritten is not None:
        overwritten = overwritten.checked(grad_output)
    logits, target, weight, statistics, totals = ctx.saved_tensors
    options = ctx.options
    needs_logits, needs_target = ctx.needs_input_grad[:2]
    grad_logits = grad_target = None
    if differentiates_backward(grad_output, logits, target, weight):
        grad_logits, grad_target = gradients(grad_output, logits, target, weight, options)
        return grad_logits if needs_logits else None, grad_target if needs_target else None
    saved = (grad_output, logits, target, weight, statistics, totals, *options)
    # Compiled autograd is traced by Dynamo, which cannot step below autograd (ops.below_autograd).
    compiling = torch.compiler.is_compiling()
    if needs_target:  # first: the logits it reads may be overwritten next
        target_op = ops.softmax_ce_backward_target if compiling else ops.eager_softmax_ce_backward_target
        grad_target = target_op(*saved)
    if needs_logits and overwritten is None:
        logits_op = ops.softmax_ce_backward if compiling else ops.eager_softmax_ce_backward
        grad_logits = logits_op(*saved)
    elif needs_logits:
        ops.softmax_ce_backward_(*inplace.apart(logits, saved))
        grad_logits = overwritten.mark(logits)
    return grad_logits, grad_target


class SoftmaxCE(Function):
    """The classic form of Function: the ``setup_context`` form costs a ``inspect.signature`` at every call."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype | None,
        options: Options,
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


def softmax_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    options: Options,
    inplace_backward: bool,
) -> Tensor:
    """The loss of checked inputs, as ``softmax_ce_forward`` takes them, differentiable."""
    if (weight is not None and weight.requires_grad and torch.is_grad_enabled()) or transformed(logits, target, weight):
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


# --- the ops themselves, in graphs whose Functions have been traced away -------------------------------------------


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, weight, _, *options = inputs
    ctx.save_for_backward(logits, target, weight, *output[1:])
    ctx.options = Options(*options)
    ctx.overwritten = None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:  # autograd's word for zero, where gradients are not materialized
        return (None,) * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[2]:
        raise RuntimeError("weight: expected a tensor that does not require grad: no gradient leads to it here")
    return *_backward(ctx, grad_loss), *(None,) * (len(ctx.needs_input_grad) - 2)


def _decomposition(
    logits: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op in torch's own operations, for backends that know no others."""
    _, ignore_index, label_smoothing = Options(*options)
    loss = composite(logits, target, weight, dtype, *options)
    x = logits.to(ops.softmax_ce_accumulation(logits, target, weight))
    class_dim = min(1, x.dim() - 1)
    w = x.new_ones(x.shape[class_dim]) if weight is None else weight
    largest = x.amax(class_dim, keepdim=True)
    statistics = [largest.squeeze(class_dim), (x - largest).exp().sum(class_dim)]
    if target.is_floating_point():
        u = target.to(x.dtype) * (1 - label_smoothing) + label_smoothing / w.numel()
        statistics.append((u.movedim(class_dim, -1) * w).sum(-1))
    divisor = mean_divisor(target, weight, ignore_index, w.numel(), x.dtype)
    has_even_shares = not target.is_floating_point() and w.numel() > 1
    of_smoothing = (w * (label_smoothing / w.numel() if has_even_shares else 0)).sum()
    return loss, torch.stack([rows.flatten() for rows in statistics]), torch.stack([divisor, of_smoothing])


def _gradient(*saved: Any) -> Tensor:
    """What ``softmax_ce_backward`` computes, of the same arguments."""
    grad_output, logits, target, weight, _statistics, _totals, *options = saved
    return gradients(grad_output, logits, target, weight, Options(*options))[0]


def _target_gradient(*saved: Any) -> Tensor:
    """What ``softmax_ce_backward_target`` computes, of the same arguments."""
    grad_output, logits, target, weight, _statistics, _totals, *options = saved
    grad_target = gradients(grad_output, logits, target, weight, Options(*options))[1]
    assert grad_target is not None  # of probabilities
    return grad_target


differentiate("softmax_ce_forward", _decomposition, _set_up, _op_backward)
differentiate_by("softmax_ce_backward", _gradient)
differentiate_by("softmax_ce_backward_target", _target_gradient)
decompose_for_onnx("softmax_ce_forward", _decomposition)
