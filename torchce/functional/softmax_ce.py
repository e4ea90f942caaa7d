"""Softmax cross entropy with the semantics of :func:`torch.nn.functional.cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parameter import Parameter
from torch.overrides import has_torch_function_variadic

from torchce import inplace, ops, overrides
from torchce.functional._common import (
    CHECKS_TARGETS,
    FLOATS,
    REDUCTION_NAMES,
    SIXTEEN_BITS,
    autocasts,
    explain,
    has_exact_shape,
    has_shape,
    have_kernels,
    is_integer,
    is_number,
    no_kernels,
    promoted,
    reduction_number,
    refuse_scripting,
    requires_grad,
)
from torchce.sizes import are_numbers, known
from torchce.softmax_ce import Options, eager_softmax_ce, known_options, softmax_ce
from torchce.transforms import may_be_transformed

_torch_cross_entropy = F.cross_entropy  # bound now, so that torchce.patch_torch cannot lead back here
_INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.uint8})


@overrides.stands_for(_torch_cross_entropy)
@refuse_scripting
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Softmax cross entropy between logits and class indices or probabilities.

    A drop-in replacement for :func:`torch.nn.functional.cross_entropy`, computed in one pass each way: softmax
    probabilities are never stored, and 16-bit logits are not copied to float32, but where something of float64 stands
    beside them. For logits x of one row, class weights w, target class y, s = ``label_smoothing`` and
    lse = max + log sum exp(x - max):

    .. math:: (1 - s)\, w_y\, (\mathrm{lse} - x_y) + \frac{s}{C} \sum_k w_k\, (\mathrm{lse} - x_k)

    and for target probabilities t, with t' = (1 - s) t + s / C: :math:`\sum_k w_k\, t'_k\, (\mathrm{lse} - x_k)`, where
    0 times infinity is 0. The mean divides by the sum of the rows' weights for indices, by the number of rows for
    probabilities. (Maximum likelihood over multinomial labels; smoothing after Szegedy et al. 2016, arXiv:1512.00567.)

    Args:
        input (Tensor): unnormalised logits, float64, float32, bfloat16 or float16, of any strides.
        target (Tensor): class indices (int64, int32 or uint8), or class probabilities (floating point).
        weight (Tensor, optional): a weight for each class, of any floating dtype.
        size_average (bool, optional): deprecated, see ``reduction``.
        ignore_index (int): a class index whose rows have no loss and no gradient. Default: -100
        reduce (bool, optional): deprecated, see ``reduction``.
        reduction (str): ``'none'``, ``'mean'`` or ``'sum'``. Default: ``'mean'``
        label_smoothing (float): the part of each target spread evenly over all classes, at most 1. Default: 0.0

    Keyword Args:
        inplace_backward (bool): let the gradient overwrite the logits, which then need no second buffer of their size.
            The logits must be dense, and neither a leaf that requires grad nor a view of one. After backward, a
            backward through what else was computed from them raises, and so does a second backward; but merely
            *reading* them raises nothing and finds the gradient: take what you need of them, such as
            ``logits.argmax(1)`` for an accuracy, before ``backward()``. Without effect under :func:`torch.compile`,
            in graphs that are traced with fake tensors, and where hooks take what is saved for backward, as inside
            :mod:`torch.utils.checkpoint`. Default: ``False``

    Shape:
        - input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`
        - target: the input's shape without C for indices, the input's shape for probabilities
        - weight: :math:`(C)`
        - output: a scalar, or with ``reduction='none'`` the input's shape without C

    Returns:
        Tensor: the loss, in the dtype torch gives it: the input's for indices, the promoted one of all three for
        probabilities, float32 for 16-bit inputs under autocast.

    Raises:
        IndexError: a class index is neither in [0, C) nor ``ignore_index`` (on CUDA such a row's loss and gradient are
            NaN instead, unless ``TORCHCE_CHECK_TARGETS=1`` is set in the environment).
        ValueError, RuntimeError, TypeError: what torch raises for the same call.

    Example::

        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> torchce.functional.cross_entropy(logits, torch.tensor([0, 3]))
        tensor(1.3863, grad_fn=<SoftmaxCEBackward>)
    """
    if has_torch_function_variadic(input, target, weight):
        answer: Tensor = overrides.ask_handlers(
            cross_entropy,
            _torch_cross_entropy,
            (input, target, weight),
            {"inplace_backward": inplace_backward},
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return answer
    number = reduction_number(reduction, size_average, reduce)
    if not inplace_backward:
        loss = _plain_loss(input, target, weight, number, ignore_index, label_smoothing)
        if loss is not None:
            return loss
    problem = _problem(input, target, weight, ignore_index, label_smoothing)
    if problem is not None:
        arguments = (input, target, weight, None, ignore_index, None, REDUCTION_NAMES[number], label_smoothing)
        return explain(problem, _torch_cross_entropy, *arguments)
    inplace_backward = inplace_backward and inplace.will_overwrite(input, rows=True)
    input, target, weight, dtype = _promote(input, target, weight)
    label_smoothing = max(float(label_smoothing), 0.0)  # torch takes a negative one for none
    options = Options(number, int(ignore_index), label_smoothing)
    if CHECKS_TARGETS and input.is_cuda and not target.is_floating_point() and not torch.compiler.is_compiling():
        check_targets(target, input.shape[min(1, input.dim() - 1)], options.ignore_index)
    return softmax_ce(input, target, weight, dtype, options, inplace_backward)


def _plain_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> Tensor | None:
    """The loss where nothing can be wrong that the op does not find out itself, else None.

    It is tried first, because a small loss takes less time than all the questions of :func:`_problem`.
    """
    is_plain = (
        not torch.compiler.is_compiling()
        and (type(input) is Tensor or type(input) is Parameter)
        and type(target) is Tensor
        and type(ignore_index) is int
        and (target.dtype is torch.int64 or (target.dtype is input.dtype and ignore_index < 0))
        and (
            target.is_cpu
            if input.is_cpu
            else input.is_cuda and target.is_cuda and ops.has_cuda() and not CHECKS_TARGETS
        )
        and (weight is None or _is_plain_weight(weight, input, target))
        and type(label_smoothing) is float
        and 0.0 <= label_smoothing <= 1.0
        and not torch._C._is_any_autocast_enabled()
        and not may_be_transformed()
    )
    if not is_plain:
        return None
    try:
        options = known_options(reduction, ignore_index, label_smoothing + 0.0)  # not -0.0, which equals another key
        return eager_softmax_ce(input, target, weight, None, options, False)
    except RuntimeError:
        problem = _problem(input, target, weight, ignore_index, label_smoothing)
        if problem is None:  # a saved tensor's hook raised it, say
            raise
        return None


def _is_plain_weight(weight: Tensor, input: Tensor, target: Tensor) -> bool:
    """Whether the op takes ``weight`` as it is, or refuses it for its shape, which then has a problem to be named.

    One beside probabilities has a say in the loss's dtype, if it is not the logits'.
    """
    return (
        type(weight) is Tensor
        and weight.dtype is ops.accumulation_dtype(input.dtype)
        and (target.dtype is torch.int64 or weight.dtype is input.dtype)
        and weight.is_contiguous()
        and not weight.requires_grad
        and not weight.is_meta
    )


def _value(number: Any) -> Any:
    """A scalar tensor's number: sparse and 8-bit floating ones do not compare."""
    return number.item() if isinstance(number, Tensor) else number


def _problem(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> str | None:
    """What keeps the kernels from taking this call, naming the argument and both values."""
    if not isinstance(target, Tensor) or not have_kernels(input, target, weight):
        return no_kernels(input=input, target=target, weight=weight)
    if not is_integer(ignore_index):
        return f"ignore_index: expected an integer of 64 bits, got {ignore_index!r}"
    if not is_number(label_smoothing):
        return f"label_smoothing: expected a number, got {label_smoothing!r}"
    ignore_index, label_smoothing = _value(ignore_index), _value(label_smoothing)
    shape = input.shape
    if not shape:
        return "input: expected at least one dimension, got a scalar"
    exact = are_numbers(shape, target.shape)
    fits = has_exact_shape if exact else has_shape
    classes = shape[0] if len(shape) == 1 else shape[1]
    if classes == 0 if exact else known(classes == 0):
        return f"input: expected at least one class, got shape {list(shape)}"
    if fits(target, shape):
        if not target.is_floating_point():
            return f"target: expected floating point probabilities for the input's shape, got {target.dtype}"
        if target.dtype not in FLOATS and not autocasts(input):
            return f"target: expected probabilities of 16 bits or more, got {target.dtype}"
        if ignore_index >= 0:
            return f"ignore_index: expected none with probabilities, got {ignore_index}"
    else:
        index_shape = shape[1:] if len(shape) == 1 else shape[:1] + shape[2:]
        if not fits(target, index_shape):
            return (
                f"target: expected class indices of shape {list(index_shape)} or "
                f"probabilities of shape {list(shape)}, got shape {list(target.shape)}"
            )
        if target.dtype not in _INDEX_DTYPES:
            return f"target: expected class indices of dtype int64, int32 or uint8, got {target.dtype}"
        if requires_grad(weight):
            return "weight: expected one that does not require grad beside class indices"
    if weight is not None and not (fits(weight, (classes,)) and weight.is_floating_point()):
        return f"weight: expected a floating point tensor of shape [{classes}], got {weight.dtype} {list(weight.shape)}"
    if not label_smoothing <= 1.0:
        return f"label_smoothing: expected at most 1.0, got {label_smoothing}"
    return None


def _promote(
    input: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
    """The tensors in dtypes that go together in the op, and the loss's dtype, or None for the logits'."""
    dtype = None
    if target.dtype not in FLOATS and target.is_floating_point():  # autocast: torch casts what it can
        target = target.to(torch.float32)
    accumulation = ops.softmax_ce_accumulation(input, target, weight)
    if target.is_floating_point():
        dtype = promoted(input.dtype, target.dtype, input.dtype if weight is None else weight.dtype)
        # The op takes all pairs but those of 16 bits beside another 16 or beside float64.
        if accumulation == torch.float64 and input.dtype in SIXTEEN_BITS:
            input = input.to(torch.float32)
        if target.dtype != input.dtype and target.dtype in SIXTEEN_BITS:
            target = target.to(torch.float32)
    if accumulation != torch.float64 and autocasts(input):
        dtype = torch.float32
    if weight is not None:
        weight = weight.to(accumulation).contiguous()
    return input, target, weight, dtype


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises the CPU kernels' IndexError for the first class index that is no class; waits for the device to know."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        value = int(target.flatten()[row])
        raise IndexError(f"Target {value} is out of bounds. (row {row} of {target.numel()}, {classes} classes)")
