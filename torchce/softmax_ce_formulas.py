"""Softmax cross entropy and its gradients in torch's own operations, and the options that they and the kernels know.

They serve what torch is to transform, to differentiate more than once, or to trace for backends without our kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchce import ops
from torchce.composites import product_in_range, reduced, times
from torchce.transforms import all_finite, all_true

N_PLAIN = 3


class Options(NamedTuple):
    """What a call asks for beside its tensors, in the order of ``csrc/schemas.h``; a new one comes last."""

    reduction: int
    """torch's number: 0 none, 1 mean, 2 sum."""
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    """0: none."""
    logit_scale: float = 1.0


class Wanted(NamedTuple):
    """What a call asks for of each row beside its loss, in the order of ``csrc/schemas.h``."""

    lse: bool = False
    predictions: bool = False
    entropy: bool = False


class Gradients(NamedTuple):
    """The gradients of what a call gave, in the order of ``csrc/schemas.h``; None of what led to nothing."""

    output: Tensor | None
    lse: Tensor | None = None
    entropy: Tensor | None = None


# Functions, not properties: the Dynamo of torch 2.10 evaluates none of a named tuple.
def plain_options(options: Options) -> tuple[Any, ...]:
    """Torch's own, which the ops for plain losses take: a small loss notices each one more."""
    return options[:N_PLAIN]


def are_plain(options: Options) -> bool:
    """Whether those that torch has not are off."""
    return options.z_loss == 0 and options.softcap == 0 and options.logit_scale == 1


def composite(
    logits: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype | None, *options: Any
) -> Tensor:
    """The loss of ``softmax_ce_forward``, of the same arguments, from differentiable operations.

    An ignored row's logits are masked before the softmax, not its loss after: a NaN or an infinity among them would
    still reach the second derivatives. Where there is none, the pass over all logits is spared, if that can be seen.
    """
    reduction, ignore_index, label_smoothing, z, *_ = Options(*options)
    acc = ops.softmax_ce_accumulation(logits, target, weight)
    x = logits.to(acc)
    class_dim = min(1, x.dim() - 1)
    along_classes = [-1 if d == class_dim else 1 for d in range(x.dim())]
    w = None if weight is None else weight.to(acc).view(along_classes)
    classes = x.shape[class_dim]

    if target.is_floating_point():
        x, u = _values(x, Options(*options)), target.to(acc)
        if label_smoothing != 0:
            u = (1 - label_smoothing) * u + label_smoothing / classes
        rows = -_over_classes(u, w, torch.log_softmax(x, class_dim), class_dim)
        if z != 0:
            rows = rows + _z_loss(z, _lse(x, class_dim))
        return reduced(rows, reduction).to(dtype or logits.dtype)

    index = target.to(torch.int64)
    kept = index != ignore_index
    if not all_true(kept):
        x = torch.where(kept.unsqueeze(class_dim), x, 0)
    x = _values(x, Options(*options))
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
    if z != 0:
        rows = rows + _z_loss(z, _lse(x, class_dim))
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


def _values(x: Tensor, options: Options) -> Tensor:
    """What the loss is of, in place of logits x (``csrc/softmax_ce_logit.h``)."""
    if options.softcap != 0:
        return options.softcap * torch.tanh(x * (options.logit_scale / options.softcap))
    return x if options.logit_scale == 1 else options.logit_scale * x


def _of_logits(gradient: Tensor, values: Tensor, options: Options) -> Tensor:
    """The gradient of logits, from that of their values."""
    if options.softcap != 0:
        return options.logit_scale * (1 - (values / options.softcap).square()) * gradient
    return gradient if options.logit_scale == 1 else options.logit_scale * gradient


def _lse(x: Tensor, class_dim: int) -> Tensor:
    """``torch.logsumexp``, but NaN of a row with an infinite logit, as its loss is.

    Its gradient is softmax for logits of any size; torch's is exp(x - lse), in which lse has been rounded.
    """
    largest = x.amax(class_dim, keepdim=True).detach()
    largest = torch.where(largest == -torch.inf, 0, largest)
    return (x - largest).exp().sum(class_dim).log() + largest.squeeze(class_dim)


def _z_loss(z: float, lse: Tensor) -> Tensor:
    return z * lse * lse


def composite_outputs(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype | None,
    returns_lse: bool,
    returns_predictions: bool,
    returns_entropy: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, predictions and entropy of ``softmax_ce_forward_outputs``, from differentiable operations."""
    class_dim = min(1, logits.dim() - 1)
    acc = ops.softmax_ce_accumulation(logits, target, weight)
    predictions = logits.argmax(class_dim) if returns_predictions else logits.new_empty(0, dtype=torch.int64)
    dtype = dtype or logits.dtype
    if scale is not None:
        logits = scaled(logits.to(acc), scale)
    loss = composite(logits, target, weight, dtype, *options)
    lse = entropy = logits.new_empty(0, dtype=acc)
    if returns_lse or returns_entropy:
        x = logits.to(acc)
        lse_of_all = _lse(_values(x.detach(), Options(*options)), class_dim)
        is_read = _reads_outputs(lse_of_all, target, Options(*options).ignore_index)
        read = _values(torch.where(is_read.unsqueeze(class_dim), x, 0), Options(*options))
        if returns_lse:
            lse = torch.where(is_read, _lse(read, class_dim), lse_of_all)
        if returns_entropy:
            entropy = torch.where(is_read, _entropy(read, class_dim), torch.nan)
    return loss, lse, predictions, entropy


def scaled(logits: Tensor, scale: Tensor) -> Tensor:
    """Their product, NaN unless the scale is positive; infinite logits have no part in the scale's gradient."""
    finite = logits.isfinite()
    scale = torch.where(scale > 0, scale, torch.nan)
    return scale * torch.where(finite, logits, 0) + torch.where(finite, 0, scale.detach() * logits)


def _entropy(x: Tensor, class_dim: int) -> Tensor:
    """That of softmax(x)."""
    gap = _gap(x, class_dim)
    return gap.exp().sum(class_dim).log() - (torch.softmax(x, class_dim) * gap).sum(class_dim)


def _gap(x: Tensor, class_dim: int) -> Tensor:
    """How far each value lies below the largest, which is a constant here: whatever it is, entropies are the same.

    No further than where the exponential is 0 in every dtype: a product with infinity would be NaN.
    """
    gap = x - x.amax(class_dim, keepdim=True).detach()
    return torch.where(gap < -1000, -1000, gap)


def _reads_outputs(lse: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Which rows' lse and entropy have a derivative: an ignored row without a softmax has the gradient 0."""
    if target.is_floating_point():
        return torch.ones_like(lse, dtype=torch.bool)
    return lse.isfinite() | (target.to(torch.int64) != ignore_index)


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
    return row_weights(target, weight, ignore_index, classes, dtype).sum().to(dtype)


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises the CPU kernels' IndexError for the first class index that is no class; waits for the device to know."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        value = int(target.flatten()[row])
        raise IndexError(f"Target {value} is out of bounds. (row {row} of {target.numel()}, {classes} classes)")


def row_weights(target: Tensor, weight: Tensor | None, ignore_index: int, classes: int, dtype: torch.dtype) -> Tensor:
    """What each row's loss counts in a mean: the weight of its class index, where there are none whether it counts,
    as a bool. Ignored rows and bad indices do not. Shaped as ``target``."""
    index = target.to(torch.int64)
    if ignore_index >= 0:  # it may be a class
        index = torch.where(index == ignore_index, -1, index)
    if weight is None:
        return index.clamp(0, classes - 1) == index
    beyond = weight.new_zeros(1, dtype=dtype)  # on either side of the classes: one pass less than to compare twice
    weights = torch.cat([beyond, weight.to(dtype), beyond])
    return weights.index_select(0, (index.clamp(-1, classes) + 1).flatten()).view(target.shape)


def gradients(
    grads: Gradients,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Gradients for the logits and for target probabilities, from differentiable operations.

    With p = softmax(x), coefficients u_k of all classes and h of the target class (``csrc/math/softmax_ce.h``)::

        d loss / d x_j = p_j (h + sum_k u_k + 2 z_loss lse) - u_j - h [j == y]
        d loss / d t_j = -(1 - label_smoothing) w_j log p_j
        d lse / d x_j = p_j
        d entropy / d x_j = -p_j (log p_j + entropy)

    Without ``grads.output`` those of lse and entropy alone.
    """
    reduction, ignore_index, label_smoothing, z, *_ = options
    grad_output, grad_lse, grad_entropy = grads
    if logits.dim() == 1:
        of_rows = [None if grad is None else grad.unsqueeze(0) for grad in (grad_lse, grad_entropy)]
        if reduction == 0 and grad_output is not None:
            grad_output = grad_output.unsqueeze(0)
        batched = logits.unsqueeze(0), target.unsqueeze(0), weight
        unbatched = gradients(Gradients(grad_output, *of_rows), *batched, options)
        return unbatched[0].squeeze(0), None if unbatched[1] is None else unbatched[1].squeeze(0)

    acc = ops.softmax_ce_accumulation(logits, target, weight)
    logits, dtype = logits.to(acc), logits.dtype
    x = _values(logits, options)
    classes = x.shape[1]
    w = (x.new_ones(classes) if weight is None else weight).view(classes, *[1] * (x.dim() - 2))
    of_outputs: Tensor | int = 0
    if grad_lse is not None or grad_entropy is not None:
        is_read = _reads_outputs(torch.logsumexp(x.detach(), 1), target, ignore_index).unsqueeze(1)
        values = _values(torch.where(is_read, logits, 0), options)
        p, of_values = torch.softmax(values, 1), torch.zeros_like(values)
        if grad_lse is not None:
            of_values = of_values + p * torch.where(is_read, grad_lse.unsqueeze(1), 0)
        if grad_entropy is not None:
            gap = _gap(values, 1)
            from_mean = (p * gap).sum(1, keepdim=True) - gap
            of_values = of_values + p * from_mean * torch.where(is_read, grad_entropy.unsqueeze(1), 0)
        of_outputs = _of_logits(of_values, values, options)
        if grad_output is None:
            return of_outputs.to(dtype), None
    assert grad_output is not None
    g = grad_output.to(acc)
    if reduction == 0:
        g = g.unsqueeze(1)

    if target.is_floating_point():
        if reduction == 1:
            g = g / (x.numel() // classes)
        u = w * (target.to(acc) * (1 - label_smoothing) + label_smoothing / classes)
        grad_logits = g * (torch.softmax(x, 1) * u.sum(1, keepdim=True) - u)
        if z != 0:
            grad_logits = grad_logits + g * (2 * z * torch.softmax(x, 1) * _lse(x, 1).unsqueeze(1))
        grad_target = product_in_range((label_smoothing - 1) * torch.log_softmax(x, 1), g, w)
        return (_of_logits(grad_logits, x, options) + of_outputs).to(dtype), grad_target.to(target.dtype)

    index = target.to(torch.int64).unsqueeze(1)
    kept = index != ignore_index
    is_class = (index >= 0) & (index < classes)
    g = torch.where(is_class | ~kept, g, torch.nan)  # a bad index, which on the CPU the forward has refused
    index = torch.where(kept & is_class, index, 0)
    x = _values(torch.where(kept, logits, 0), options)  # masked before, as in `composite`
    p = torch.softmax(x, 1)
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
    if z != 0:
        grad_logits = grad_logits + p * (g * (2 * z / rest) * _lse(x, 1).unsqueeze(1))
    return (torch.where(kept, _of_logits(grad_logits, x, options), 0) + of_outputs).to(dtype), None


class OfInputs(NamedTuple):
    """Gradients of what went into ``softmax_ce_forward_outputs``."""

    logits: Tensor
    target: Tensor | None
    scale: Tensor | None
    """Of each row its part."""


def outputs_gradients(
    grads: Gradients,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    options: Options,
) -> OfInputs:
    """Those of :func:`gradients` where a scale may multiply the logits."""
    if scale is None:
        return OfInputs(*gradients(grads, logits, target, weight, options), None)
    x = logits.to(ops.softmax_ce_accumulation(logits, target, weight))
    grad, grad_target = gradients(grads, scaled(x, scale), target, weight, options)
    of_scale = (grad * torch.where(x.isfinite(), x, 0)).sum(min(1, x.dim() - 1))
    return OfInputs((scale * grad).to(logits.dtype), grad_target, of_scale)


def decomposition(
    logits: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op in torch's own operations, for backends that know no others."""
    _, ignore_index, label_smoothing, *_ = Options(*options)
    loss = composite(logits, target, weight, dtype, *options)
    x = _values(logits.to(ops.softmax_ce_accumulation(logits, target, weight)), Options(*options))
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


def outputs_decomposition(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype | None,
    returns_lse: bool,
    returns_predictions: bool,
    returns_entropy: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    wanted = Wanted(returns_lse, returns_predictions, returns_entropy)
    outputs = composite_outputs(logits, target, weight, scale, dtype, *wanted, *options)
    x = logits.to(ops.softmax_ce_accumulation(logits, target, weight))
    x = x if scale is None else scaled(x, scale)
    _, statistics, totals = decomposition(x, target, weight, dtype, *options)
    if returns_entropy:
        mean_gap = statistics[1].log() - outputs[3].flatten()
        statistics = torch.cat([statistics, mean_gap.unsqueeze(0)])
    return *outputs, statistics, totals
