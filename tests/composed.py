"""Cross entropy with torchce's own options, as one writes it in torch's operations: what ours are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

OF_RESULT = {"dtype", "empty_value"}  # what changes no value that there is
OWN = {"z_loss", "softcap", "logit_scale", "sample_weight", "divisor", *OF_RESULT}


def transformed(input: Tensor, softcap: float | None, logit_scale: float | Tensor | None) -> Tensor:
    """What the loss is of, in float32 at least."""
    if softcap is None and logit_scale is None:
        return input
    input = input.to(torch.promote_types(input.dtype, torch.float32))
    if logit_scale is not None:
        input = logit_scale * input
    return input if softcap is None else softcap * torch.tanh(input / softcap)


def entropy(values: Tensor, class_dim: int) -> Tensor:
    """Of softmax(values); what is of probability 0 adds nothing."""
    log_p = torch.log_softmax(values, class_dim)
    return -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(class_dim)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
    empty_value: float | None = None,
    **options: Any,
) -> Tensor:
    """``options`` are torch's."""
    class_dim = min(1, input.dim() - 1)
    input_dtype = input.dtype
    input = transformed(input, softcap, logit_scale)
    own_dtype = dtype or input_dtype
    if target.is_floating_point() and dtype is None:
        for other in (target, *([] if weight is None else [weight])):
            own_dtype = torch.promote_types(own_dtype, other.dtype)
    elif weight is not None:
        weight = weight.to(input.dtype)
    rows = F.cross_entropy(input, target, weight, reduction="none", **options)
    lse = torch.logsumexp(input if dtype is None else input.to(torch.promote_types(dtype, input.dtype)), class_dim)
    if target.is_floating_point():
        kept = torch.ones_like(rows, dtype=torch.bool)
        row_weight = torch.ones_like(rows)
    else:
        kept = target != options.get("ignore_index", -100)
        row_weight = kept.to(rows.dtype)
        if weight is not None:
            row_weight = torch.where(kept, weight[torch.where(kept, target, 0)], 0)
    rows = rows + torch.where(kept, z_loss * lse.square(), 0)
    if sample_weight is not None:
        rows, row_weight = sample_weight * rows, sample_weight * row_weight
    if reduction == "none":
        return rows.to(own_dtype)
    total = rows.sum()
    if reduction == "mean":
        total = total / (row_weight.sum() if divisor is None else divisor)
        if empty_value is not None and not bool((row_weight != 0).any()):
            return 0 * input.sum().to(own_dtype) + empty_value
    return total.to(own_dtype)
