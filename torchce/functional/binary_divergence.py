"""Divergences of a student's Bernoulli distributions from a teacher's, and their entropies, from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from torchce import calls, overrides
from torchce.binary_divergence import Options, binary_divergence, composite
from torchce.functional._common import (
    autocasts,
    have_kernels,
    of_dtypes_that_kernels_pair,
    promoted,
    reduction_number,
    refuse_scripting,
)
from torchce.functional.divergence import check_bool, check_operands, of_one_dtype_on_cuda
from torchce.functional.sigmoid_bce import MOST_DIMENSIONS


@refuse_scripting
def binary_kl_div_with_logits(
    input: Tensor, target: Tensor, reduction: str = "mean", *, target_logits: bool = False
) -> Tensor:
    r"""Kullback-Leibler divergence of a student's sigmoid from a teacher's probability, elementwise.

    With the student :math:`q = \sigma(x)` of the logit x = ``input``, and the teacher p, which is ``target``, or
    :math:`\sigma(` ``target`` :math:`)` with ``target_logits``, the loss of an element is

    .. math:: \mathrm{KL}(p \| q) = p \log \frac{p}{q} + (1 - p) \log \frac{1 - p}{1 - q}

    which is the binary cross entropy less the entropy of p, computed as no such difference: exactly 0 where the logits
    are the same, and with digits where they are near each other. 0 log 0 is 0: a label that both exclude, by an
    infinite logit say, costs nothing; one that the student alone excludes makes the loss infinite. Differentiable in
    both operands. The forward and each gradient that is wanted read both once, and nothing but them is kept; of two
    dtypes, unless the target's is float32, copies are made first. (Kullback and Leibler 1951.)

    Args:
        input (Tensor): the student's logits, float64, float32, bfloat16 or float16, of any shape and strides.
        target (Tensor): the teacher's probabilities, of any of these dtypes and any strides; one outside [0, 1] makes
            the loss NaN.
        reduction (str): ``'none'``, ``'mean'`` over elements, or ``'sum'``. Default: ``'mean'``

    Keyword Args:
        target_logits (bool): whether ``target`` holds the teacher's logits. Default: ``False``

    Shape:
        - input, target: :math:`(*)`, the same
        - output: a scalar, or with ``reduction='none'`` the input's shape, in its memory format

    Returns:
        Tensor: the loss, of the promoted dtype of input and target, under autocast float32 for all but float64. A mean
        of no elements is NaN.

    Raises:
        ValueError: shapes do not fit, or an argument is wrong.

    Example::

        >>> student, teacher = torch.tensor([0.0, 2.0, -torch.inf]), torch.tensor([0.5, 0.5, 0.0])
        >>> torchce.functional.binary_kl_div_with_logits(student, teacher, "none")
        tensor([0.0000, 0.4338, 0.0000])
    """
    return _answer(binary_kl_div_with_logits, (input, target), reduction, {"target_logits": target_logits})


@refuse_scripting
def binary_entropy_with_logits(input: Tensor, reduction: str = "mean") -> Tensor:
    r"""Entropy of the sigmoid of logits, in nats, elementwise.

    With :math:`p = \sigma(x)` the entropy of an element is :math:`-p \log p - (1 - p) \log(1 - p)`, from 0 of a
    certain label to log 2 at x = 0. (Shannon 1948.)

    Args:
        input (Tensor): logits, as in :func:`binary_kl_div_with_logits`
        reduction (str): as there

    Shape:
        - input: :math:`(*)`
        - output: a scalar, or with ``reduction='none'`` the input's shape, in its memory format

    Returns:
        Tensor: the entropy. A mean of no elements is NaN.

    Raises:
        ValueError: an argument is wrong.

    Example::

        >>> torchce.functional.binary_entropy_with_logits(torch.tensor([0.0, 2.0, torch.inf]), "none")
        tensor([0.6931, 0.3654, 0.0000])
    """
    return _answer(binary_entropy_with_logits, (input,), reduction, {})


def _answer(ours: Any, operands: tuple[Tensor, ...], reduction: str, own: dict[str, Any]) -> Tensor:
    """The loss of unchecked operands, an input and perhaps a target, or what their handlers make of the call."""
    if has_torch_function_variadic(*operands):
        answer: Tensor = overrides.ask_handlers(ours, ours, operands, own, *operands, reduction)
        return answer
    input, *targets = map(overrides.plain, operands)
    number = reduction_number(reduction, None, None)
    target_logits = own.get("target_logits", False)
    check_bool("target_logits", target_logits)
    check_operands(input, targets)
    target = targets[0] if targets else None
    dtype = input.dtype if target is None else promoted(input.dtype, target.dtype)
    if autocasts(input):
        dtype = promoted(dtype, torch.float32)
    options = Options(number, target_logits)
    if not have_kernels(input, target) or input.dim() > MOST_DIMENSIONS:  # formulas in torch's operations serve those
        calls.note_composite()
        return composite(input, target, dtype, *options)
    input, target = of_one_dtype_on_cuda(input, target)
    if target is not None:
        input, target = of_dtypes_that_kernels_pair(input, target)
    return binary_divergence(input, target, dtype, options)
