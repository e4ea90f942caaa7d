"""The formulas of both losses in float64, written out: the oracle of the whole suite.

Nothing here calls a loss, a softmax or autograd, so a slip of torch's cannot hide one of ours.
A zero coefficient kills an infinite term (0 * inf = 0): every value is the limit wherever the limit is finite.

Each value comes with its `condition`: how much one unit of *relative* rounding error inside the formula can move it.
It is the sum of the magnitudes of the terms that are added, so a difference that cancels (p - 1 at the target class) is
judged against what was subtracted, and exp(a) counts |a| + 1 times, because a itself has been rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truth(NamedTuple):
    value: Tensor  # float64, on the CPU
    condition: Tensor  # float64, same shape, >= |value| up to rounding
    # The largest sum or quotient of finite terms that a formula forms before it has the value, such as a sum of losses
    # before the mean.
    partial: Tensor | None = None
    # The value's change where every coefficient, exponential or product of them that is subnormal in float32, and every
    # exponential or quotient that is 0 there, is larger by 1.
    subnormal: Tensor | None = None
    # The magnitudes of what its positive and its negative terms add up to, if it is of terms of both signs, else 0.
    of_signs: tuple[Tensor, Tensor] | None = None


class SoftmaxCE(NamedTuple):
    loss: Truth
    grad_logits: Truth
    grad_target: Truth | None  # None for class indices


class SigmoidBCE(NamedTuple):
    loss: Truth
    grad_logits: Truth
    grad_target: Truth


def times(a: Tensor, b: Tensor) -> Tensor:
    """a * b, where a factor of exactly 0 wins over an infinite one (and never over NaN)."""
    product = a * b
    killed = ((a == 0) & b.isinf()) | ((b == 0) & a.isinf())
    return torch.where(killed, torch.zeros_like(product), product)


def terms_of_loss(coefficient: Tensor, negative_log_p: Tensor) -> Tensor:
    """Of each class: one without a coefficient costs nothing, one of infinite coefficient and certainty is NaN."""
    without = (coefficient == 0) & negative_log_p.isinf()
    return torch.where(without, torch.zeros_like(coefficient), coefficient * negative_log_p)


def float64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.float64)


def softmax_ce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    grad_output: Tensor | None = None,
    grad_lse: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> SoftmaxCE:
    """Softmax cross entropy and its gradients.

    Args:
        logits: [C], [N, C] or [N, C, d1..dk]
        target: indices [], [N] or [N, d1..dk], or probabilities of the logits' shape
        weight: [C]
        sample_weight, grad_lse, grad_entropy: shaped as an index target
        grad_output: the loss's own gradient, of the loss's shape; 1 if not given
        grad_lse, grad_entropy: the gradients of the rows' lse and entropy; 0 if not given
    """
    x = float64(logits)
    # softcap tanh(logit_scale x / softcap) in place of x, with its slope and what one unit of rounding error moves both
    slope_of_x = slope_of_x_condition = moved_x = torch.zeros_like(x)
    transforms = softcap is not None or logit_scale is not None
    logit_scale = 1.0 if logit_scale is None else float(logit_scale)
    if transforms:
        x = logit_scale * x
        slope_of_x = slope_of_x_condition = torch.full_like(x, logit_scale)
        if softcap is not None:
            tanh = torch.tanh(x / softcap)
            x = softcap * tanh
            slope_of_x_condition = slope_of_x * (1 + 2 * tanh.square())
            slope_of_x = slope_of_x * (1 - tanh.square())
        moved_x = x.abs().nan_to_num(posinf=0.0)
    k = 0 if x.dim() == 1 else 1  # the class dimension
    classes = x.size(k)
    along_classes = [1] * x.dim()
    along_classes[k] = classes
    w = torch.ones(classes, dtype=torch.float64) if weight is None else float64(weight)
    w = w.reshape(along_classes)
    of_rows = torch.ones((), dtype=torch.float64) if sample_weight is None else float64(sample_weight).unsqueeze(k)
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0

    # coefficient: what multiplies -log p_k in the loss; kept: rows that count
    by_index = not target.is_floating_point()
    if by_index:
        y = target.detach().cpu().to(torch.int64).unsqueeze(k)
        kept = y != ignore_index
        y = torch.where(kept, y, torch.zeros_like(y))
        one_hot = (torch.arange(classes).reshape(along_classes) == y).to(torch.float64)
        distribution = one_hot * (1 - smoothing) + smoothing / classes
        coefficient = torch.where(distribution == 0, torch.zeros_like(distribution), w * distribution)
        w_y = w.flatten()[y]
        total = times(of_rows, torch.where(kept, w_y, torch.zeros_like(w_y))).sum()
    else:
        distribution = float64(target) * (1 - smoothing) + smoothing / classes
        row_shape = [*x.shape[:k], 1, *x.shape[k + 1 :]]
        kept = torch.ones(row_shape, dtype=torch.bool)
        total = of_rows.expand(row_shape).sum()
        coefficient = w * distribution  # as torch: NaN where the target excludes a class of infinite weight

    if divisor is not None:
        total = torch.as_tensor(divisor, dtype=torch.float64, device="cpu").detach()

    largest = x.amax(k, keepdim=True)
    below = largest - x  # how far each logit lies below its row's largest
    exponential = torch.exp(-below)
    exponential_sum = exponential.sum(k, keepdim=True)
    p = exponential / exponential_sum
    moved_x = moved_x + moved_x.amax(k, keepdim=True)
    p_condition = times(p, 1 + below + moved_x)
    negative_log_p = below + torch.log(exponential_sum)

    def only_kept(rows: Tensor) -> Tensor:
        return torch.where(kept, rows, torch.zeros_like(rows))

    # z_loss lse^2 and its derivative by lse, and what one unit of rounding error moves them: lse is itself a sum
    lse = largest + torch.log(exponential_sum)
    lse_condition = largest.abs() + torch.log(exponential_sum) + 1
    of_lse, of_lse_condition = z_loss * lse.square(), 3 * z_loss * (lse.abs() + 1) * lse_condition
    slope, slope_condition = 2 * z_loss * lse, 2 * z_loss * lse_condition
    if z_loss == 0:  # times an lse whose square is beyond every number
        of_lse = of_lse_condition = slope = slope_condition = torch.zeros_like(lse)

    terms = terms_of_loss(coefficient, negative_log_p)
    row_loss = only_kept(times(of_rows, terms.sum(k, keepdim=True) + of_lse))

    def of_loss(magnitude: Tensor) -> Tensor:
        """What the rows' losses are if their coefficients are as large as that, and the roundings of a sum near 1."""
        return only_kept(times(of_rows.abs() * magnitude, negative_log_p + 1 + moved_x).sum(k, keepdim=True))

    condition = of_loss(coefficient.abs()) + only_kept(of_rows.abs() * of_lse_condition)
    loss, g = _reduce(row_loss, condition, total, reduction, grad_output, class_dim=k)
    g = g * of_rows
    least = torch.finfo(torch.float32).smallest_normal

    def is_subnormal(factor: Tensor) -> Tensor:
        return ((factor != 0) & (factor.abs() < least)).double()

    subnormal = is_subnormal(coefficient)
    moved = _reduce(of_loss(subnormal), of_loss(subnormal), total, reduction, None, class_dim=k)[0]
    finite = only_kept(times(coefficient.abs(), negative_log_p + 1).nan_to_num(posinf=0.0).sum(k, keepdim=True))
    partial = finite.squeeze(k) if reduction == "none" else finite.sum()
    positive, negative = (only_kept(part.clamp_min(0).sum(k, keepdim=True)).squeeze(k) for part in (terms, -terms))
    mixed = (positive > 0) & (negative > 0)
    positive, negative = (torch.where(mixed, rows, 0.0) for rows in (positive, negative))
    if reduction != "none":
        positive, negative = (rows.max() if rows.numel() else rows.sum() for rows in (positive, negative))
    loss = loss._replace(partial=partial, subnormal=moved.condition, of_signs=(positive, negative))

    # d loss / d x_j = p_j * (sum of coefficients + d loss / d lse) - coefficient_j
    coefficient_sum = coefficient.sum(k, keepdim=True)
    grad_logits = only_kept(g * (p * (coefficient_sum + slope) - coefficient))
    coefficient_magnitude = coefficient.abs().sum(k, keepdim=True) + slope_condition
    grad_condition = only_kept(g.abs() * (p_condition * coefficient_magnitude + coefficient.abs()))
    if grad_lse is not None:
        own = float64(grad_lse).unsqueeze(k)
        grad_logits = grad_logits + own * p
        grad_condition = grad_condition + own.abs() * p_condition
    if grad_entropy is not None:  # -p_j (log p_j + entropy) = p_j (below_j - the mean of below)
        own = float64(grad_entropy).unsqueeze(k)
        mean_below = times(p, below).sum(k, keepdim=True)
        grad_logits = grad_logits + own * (times(p, below) - p * mean_below)
        of_mean = times(p_condition, below).sum(k, keepdim=True) + mean_below + 1
        grad_condition = grad_condition + own.abs() * (times(p_condition, below) + p_condition * (1 + of_mean))
    if transforms:
        grad_logits = slope_of_x * grad_logits
        grad_condition = slope_of_x_condition * grad_condition

    grad_subnormal = g.abs() * (
        p * subnormal.sum(k, keepdim=True) + subnormal + times((p < least).double(), coefficient_magnitude)
    )
    if reduction == "mean":  # g is a quotient
        grad_subnormal = grad_subnormal + times(is_subnormal(g), p * coefficient_magnitude + coefficient.abs())
    if by_index:  # and the factor that class weights have in common
        grad_subnormal = grad_subnormal + times(is_subnormal(g * smoothing / classes), w.abs())
    grad_subnormal = only_kept(grad_subnormal)

    grad_target = None
    if not by_index:
        scale = g * (1 - smoothing) * w
        subnormal = (w.abs() < least).double() * g.abs() + is_subnormal(scale)
        grad_target = Truth(
            scale * negative_log_p,
            scale.abs() * (negative_log_p + 1 + moved_x),
            subnormal=times(subnormal, negative_log_p + 1),
        )
    # g over the sum of the weights is formed before a weight below 1 multiplies it.
    grad_partial = (g.abs() * coefficient_magnitude.clamp_min(1)).expand_as(x)
    return SoftmaxCE(loss, Truth(grad_logits, grad_condition, grad_partial, grad_subnormal), grad_target)


def entropy(logits: Tensor) -> Truth:
    """Each row's entropy of softmax."""
    x = float64(logits)
    k = min(1, x.dim() - 1)
    below = x.amax(k, keepdim=True) - x
    exponential_sum = torch.exp(-below).sum(k)
    p = torch.exp(-below) / exponential_sum.unsqueeze(k)
    log_sum, mean_below = torch.log(exponential_sum), times(p, below).sum(k)
    condition = 1 + log_sum + times(times(p, below), 2 + below).sum(k)
    return Truth(log_sum + mean_below, condition)


def sigmoid_bce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    grad_output: Tensor | None = None,
) -> SigmoidBCE:
    """Binary cross entropy with logits and its gradients; the weights broadcast over the logits' shape."""
    x, t = float64(logits), float64(target)
    one = torch.ones((), dtype=torch.float64)
    w = one if weight is None else float64(weight)
    pw = one if pos_weight is None else float64(pos_weight)

    # loss = w * (pw * t * softplus(-x) + (1 - t) * softplus(x)), softplus(+-x) = max(+-x, 0) + log1p(exp(-|x|))
    small = torch.exp(-x.abs())
    p = torch.where(x >= 0, 1 / (1 + small), small / (1 + small))
    q = torch.where(x >= 0, small / (1 + small), 1 / (1 + small))
    soft_negative = (-x).clamp_min(0) + torch.log1p(small)  # -log p
    soft_positive = x.clamp_min(0) + torch.log1p(small)  # -log q
    element_loss = w * (times(pw * t, soft_negative) + times(1 - t, soft_positive))

    # The kernels add the linear part and ((1 - t) + pw * t) * log1p(...).
    logarithm = torch.log1p(small)
    logarithm_condition = times(logarithm, 1 + x.abs())
    linear = times(torch.where(x >= 0, (1 - t).abs(), (pw * t).abs()), x.abs())
    element_condition = w.abs() * (linear + times((1 - t).abs() + (pw * t).abs(), logarithm_condition))
    count = torch.tensor(float(x.numel()))
    loss, g = _reduce(element_loss, element_condition, count, reduction, grad_output)
    # The same without weight, and exp(-|x|) where it is subnormal in float32, 0 included: what it is multiplied with.
    unweighted = linear + times((1 - t).abs() + (pw * t).abs(), logarithm)
    subnormal = (small < torch.finfo(torch.float32).smallest_normal).double()
    moved = w.abs() * ((1 - t).abs() + (pw * t).abs()) * subnormal
    loss = loss._replace(
        partial=torch.maximum(unweighted, element_condition) if reduction == "none" else unweighted.sum(),
        subnormal=_reduce(moved, moved, count, reduction, None)[0].condition,
    )

    p_condition, q_condition = times(p, 1 + times(q, x.abs())), times(q, 1 + times(p, x.abs()))
    grad_logits = g * w * ((1 - t) * p - pw * t * q)
    grad_logits_condition = (g * w).abs() * ((1 - t).abs() * p_condition + (pw * t).abs() * q_condition)
    least = torch.finfo(torch.float32).smallest_normal
    products = ((product != 0) & (product.abs() < least) for product in ((1 - t) * p, pw * t * q))
    grad_moved = moved + w.abs() * sum(product.double() for product in products)
    # d loss / d t = pw * softplus(-x) - softplus(x), of terms that do not cancel where pw < 1
    linear = torch.where(x >= 0, -x, times(pw, x.abs()))
    grad_target = g * w * (linear + times(pw - 1, logarithm))
    grad_target_condition = (g * w).abs() * (linear.abs() + times((pw - 1).abs(), logarithm_condition))
    return SigmoidBCE(
        loss,
        Truth(grad_logits, grad_logits_condition, subnormal=g.abs() * grad_moved),
        Truth(grad_target, grad_target_condition, subnormal=(g * w * (pw - 1)).abs() * subnormal),
    )


def _reduce(
    value: Tensor,
    condition: Tensor,
    total: Tensor,
    reduction: str,
    grad_output: Tensor | None,
    class_dim: int | None = None,
) -> tuple[Truth, Tensor]:
    """The reduced loss and what each unreduced one receives as its gradient.

    `class_dim` names a dimension of size 1 that the loss does not have.
    """
    g = torch.ones((), dtype=torch.float64) if grad_output is None else float64(grad_output)
    if reduction == "none":
        if class_dim is None:
            return Truth(value, condition), g
        g = g.expand(value.squeeze(class_dim).shape).unsqueeze(class_dim)
        return Truth(value.squeeze(class_dim), condition.squeeze(class_dim)), g
    if reduction == "sum":
        return Truth(value.sum(), condition.sum()), g
    return Truth(value.sum() / total, condition.sum() / total.abs()), g / total
