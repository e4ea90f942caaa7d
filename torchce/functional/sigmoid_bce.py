"""Sigmoid BCE with the semantics of :func:`torch.nn.functional.binary_cross_entropy_with_logits`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from torchce import inplace, ops, overrides
from torchce.functional._common import (
    FLOATS,
    REDUCTION_NAMES,
    autocasts,
    broadcasts_to,
    explain,
    has_exact_shape,
    has_shape,
    have_kernels,
    no_kernels,
    of_dtypes_that_kernels_pair,
    promoted,
    reduction_number,
    refuse_scripting,
    requires_grad,
)
from torchce.sigmoid_bce import PLAIN_OPTIONS, sigmoid_bce
from torchce.sizes import are_numbers

_torch_bce_with_logits = F.binary_cross_entropy_with_logits  # bound now: torchce.patch_torch cannot lead back here
MOST_DIMENSIONS = 16  # that sigmoid_bce's kernels can keep apart (csrc/problem.h)


@overrides.stands_for(_torch_bce_with_logits)
@refuse_scripting
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Binary cross entropy between logits and targets, the sigmoid included.

    A drop-in replacement for :func:`torch.nn.functional.binary_cross_entropy_with_logits`, computed in one pass each
    way without intermediate tensors. For logit x, target t, weight w and positive weight c:

    .. math:: w \left( (1 - t)\, x + (1 + (c - 1)\, t)\, (\max(-x, 0) + \log(1 + e^{-|x|})) \right)

    Finite wherever that is: a right answer at an infinite logit costs 0. (Maximum likelihood over Bernoulli labels.)

    Args:
        input (Tensor): logits, float64, float32, bfloat16 or float16, of any shape and strides.
        target (Tensor): targets between 0 and 1; besides floating ones also bool and integer ones.
        weight (Tensor, optional): a weight for each element.
        size_average (bool, optional): deprecated, see ``reduction``.
        reduce (bool, optional): deprecated, see ``reduction``.
        reduction (str): ``'none'``, ``'mean'`` or ``'sum'``. Default: ``'mean'``
        pos_weight (Tensor, optional): a weight for positive targets.

    Keyword Args:
        inplace_backward (bool): let the gradient overwrite the logits, which then need no second buffer of their size.
            The logits must be dense, and neither a leaf that requires grad nor a view of one. After backward, a
            backward through what else was computed from them raises, and so does a second backward; but merely
            *reading* them raises nothing and finds the gradient: take what you need of them, such as
            ``logits.argmax(1)`` for an accuracy, before ``backward()``. Without effect under :func:`torch.compile`,
            in graphs that are traced with fake tensors, and where hooks take what is saved for backward, as inside
            :mod:`torch.utils.checkpoint`. Default: ``False``

    Shape:
        - input, target: :math:`(*)`, the same
        - weight, pos_weight: broadcast to the input's shape; one of :math:`(C, 1, 1)` costs no more memory than itself
        - output: a scalar, or with ``reduction='none'`` the input's shape, in its memory format

    Returns:
        Tensor: the loss, in the dtype torch gives it: the target's (the input's for bool and integer targets), or
        float32 for all but float64 under autocast.

    Raises:
        ValueError, RuntimeError: what torch raises for the same call.

    Example::

        >>> logits = torch.zeros(3, requires_grad=True)
        >>> torchce.functional.binary_cross_entropy_with_logits(logits, torch.tensor([0.0, 1.0, 1.0]))
        tensor(0.6931, grad_fn=<SigmoidBCEBackward>)
    """
    if has_torch_function_variadic(input, target, weight, pos_weight):
        answer: Tensor = overrides.ask_handlers(
            binary_cross_entropy_with_logits,
            _torch_bce_with_logits,
            (input, target, weight, pos_weight),
            {"inplace_backward": inplace_backward},
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
        )
        return answer
    number = reduction_number(reduction, size_average, reduce)
    problem = _problem(input, target, weight, pos_weight)
    if problem is not None:
        arguments = (input, target, weight, None, None, REDUCTION_NAMES[number], pos_weight)
        return explain(problem, _torch_bce_with_logits, *arguments)
    inplace_backward = inplace_backward and inplace.will_overwrite(input, rows=False)
    input, target, weight, pos_weight, dtype = _promote(input, target, weight, pos_weight)
    return sigmoid_bce(input, target, weight, pos_weight, dtype, PLAIN_OPTIONS[number], inplace_backward)


def _problem(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> str | None:
    """What keeps the kernels from taking this call, naming the argument and both values."""
    if not isinstance(target, Tensor) or not have_kernels(input, target, weight, pos_weight):
        return no_kernels(input=input, target=target, weight=weight, pos_weight=pos_weight)
    shape = input.shape
    fits = has_exact_shape if are_numbers(shape, target.shape) else has_shape
    if not fits(target, shape):
        return f"target: expected the input's shape {list(input.shape)}, got {list(target.shape)}"
    if target.is_complex():
        return f"target: expected a real dtype, got {target.dtype}"
    if target.dtype not in FLOATS and target.is_floating_point() and not autocasts(input):
        return f"target: expected one of 16 bits or more, got {target.dtype}"
    for name, tensor in (("weight", weight), ("pos_weight", pos_weight)):
        if tensor is None:
            continue
        if requires_grad(tensor):
            return f"{name}: expected one that does not require grad"
        if tensor.is_complex():
            return f"{name}: expected a real dtype, got {tensor.dtype}"
        if not broadcasts_to(tensor, input.shape):
            return f"{name}: expected a shape that broadcasts to {list(input.shape)}, got {list(tensor.shape)}"
    if pos_weight is not None and pos_weight.dtype == torch.bool:
        return f"pos_weight: expected a tensor of numbers, got {pos_weight.dtype}"
    if input.dim() > MOST_DIMENSIONS:
        return f"input: expected at most {MOST_DIMENSIONS} dimensions, got {input.dim()}"
    return None


def _promote(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, torch.dtype]:
    """The tensors in dtypes that go together in the op, and the loss's dtype."""
    is_float = target.is_floating_point()
    if is_float and target.dtype not in FLOATS:  # autocast: torch casts what it can
        target = target.to(torch.float32)
    dtype = target.dtype if is_float else input.dtype
    if autocasts(input):
        dtype = promoted(dtype, torch.float32)
    if is_float:
        input, target = of_dtypes_that_kernels_pair(input, target)
    elif target.dtype not in (torch.bool, torch.uint8, torch.int64):
        target = target.to(ops.accumulation_dtype(input.dtype))
    if weight is not None:
        weight = weight.to(ops.accumulation_dtype(input.dtype))
    if pos_weight is not None:
        pos_weight = pos_weight.to(ops.accumulation_dtype(input.dtype))
    return input, target, weight, pos_weight, dtype
