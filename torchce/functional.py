r"""The two losses as functions, with the signatures and semantics of :mod:`torch.nn.functional`.

Here every accepted input becomes one that the kernels take, and every other goes to torch's own function: it raises
what torch raises, with a message that names the argument, or answers where only torch can. That happens for

- devices other than CPU, CUDA and meta, layouts other than strided, nested tensors, and tensor subclasses without
  ``__torch_function__`` (such as DTensor; the others get their own say and come out again);
- CUDA, where no CUDA kernels are loaded: one warning says why;
- complex or integer inputs, inputs without classes (``C = 0``), and BCE inputs of more than 16 dimensions;
- a ``weight`` or ``pos_weight`` that requires grad (torch differentiates the former for probability targets only);
- :mod:`torch.func` transforms and forward-mode AD;
- ``torch.jit.trace``. ``torch.jit.script`` raises: TorchScript cannot compile these functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import _reduction as _Reduction
from torch.nn import functional as F
from torch.nn.parameter import Buffer, Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torchce import inplace, ops
from torchce.sigmoid_bce import sigmoid_bce
from torchce.softmax_ce import softmax_ce
from torchce.transforms import in_forward_ad, in_functorch

# Bound now, so that torchce.patch_torch cannot lead back here.
_torch_cross_entropy = F.cross_entropy
_torch_bce_with_logits = F.binary_cross_entropy_with_logits

_PLAIN_TENSORS = frozenset({Tensor, Parameter, Buffer, FakeTensor})
_SIXTEEN_BITS = frozenset({torch.bfloat16, torch.float16})
_LOGIT_DTYPES = _SIXTEEN_BITS | {torch.float32, torch.float64}
_INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.uint8})
_CHECKS_TARGETS = os.environ.get("TORCHCE_CHECK_TARGETS") == "1"
_MOST_DIMENSIONS = 16  # that sigmoid_bce's kernels can keep apart (csrc/problem.h)
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _reduction_number(reduction: str, size_average: bool | None, reduce: bool | None) -> int:
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    number = _REDUCTIONS.get(reduction)
    return _Reduction.get_enum(reduction) if number is None else number  # warns or raises


def _have_kernels(input: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels exist for these kinds of tensors, whatever their shapes."""
    if type(input) not in _PLAIN_TENSORS:
        return False
    device = input.device
    if (
        input.dtype not in _LOGIT_DTYPES
        or not (input.is_cpu or input.is_cuda or input.is_meta)  # device.type takes ten times as long
        or input.layout != torch.strided
        or input.is_nested
    ):
        return False
    for tensor in others:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TENSORS
            or tensor.device != device
            or tensor.layout != torch.strided
            or tensor.is_nested
        ):
            return False
    if input.is_cuda and not ops.has_cuda():
        ops.warn_without_cuda()
        return False
    return not (in_forward_ad() or in_functorch() or torch.jit.is_tracing())  # type: ignore[attr-defined]


def _looks_plain(input: Tensor, target: Tensor, ignore_index: int, label_smoothing: float) -> bool:
    """Whether nothing that the op does not find out itself can be wrong with a loss of class indices.

    It is asked first, because a small loss takes less time than all the questions of :func:`_have_kernels` and
    :func:`_cross_entropy_problem`.
    """
    return (
        not torch.compiler.is_compiling()
        and (type(input) is Tensor or type(input) is Parameter)
        and type(target) is Tensor
        and target.dtype is torch.int64
        and (
            target.is_cpu
            if input.is_cpu
            else input.is_cuda and target.is_cuda and ops.has_cuda() and not _CHECKS_TARGETS
        )
        and type(ignore_index) is int
        and type(label_smoothing) is float
        and 0.0 <= label_smoothing <= 1.0
        and not (
            in_forward_ad()
            or in_functorch()
            or torch._C._is_tracing()  # type: ignore[attr-defined]
            or torch._C._is_any_autocast_enabled()
        )
    )


def _no_kernels(**tensors: Tensor | None) -> str:
    """What :func:`_have_kernels` did not find, in words."""
    kinds = ", ".join(
        f"{name}: {tensor.dtype} {type(tensor).__name__} on {tensor.device}"
        if isinstance(tensor, Tensor)
        else f"{name}: {type(tensor).__name__}"
        for name, tensor in tensors.items()
        if tensor is not None
    )
    return f"no kernel for {kinds}"


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _autocast(input: Tensor) -> bool:
    return not input.is_meta and torch.is_autocast_enabled("cpu" if input.is_cpu else "cuda")


def _explain(problem: str, torch_function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Torch's own answer to what the kernels do not take; its refusal is worded by ``problem``."""
    try:
        return torch_function(*args, **kwargs)
    except Exception as error:
        raise type(error)(f"{problem} ({error})") from None


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
    probabilities are never stored, and 16-bit logits are never copied to float32. For logits x of one row, class
    weights w, target class y, s = ``label_smoothing`` and lse = max + log sum exp(x - max):

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
            The logits must be dense and no leaf; using them after backward, or a second backward, raises.
            Without effect under :func:`torch.compile`, whose compiler plans the memory. Default: ``False``

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
        loss: Tensor = handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            inplace_backward=inplace_backward,
        )
        return loss
    number = _reduction_number(reduction, size_average, reduce)
    if weight is None and not inplace_backward and _looks_plain(input, target, ignore_index, label_smoothing):
        try:
            return softmax_ce(input, target, None, number, ignore_index, label_smoothing, None, False)
        except RuntimeError:
            problem = _cross_entropy_problem(input, target, weight, ignore_index, label_smoothing)
            if problem is None:  # a saved tensor's hook raised it, say
                raise
    else:
        problem = _cross_entropy_problem(input, target, weight, ignore_index, label_smoothing)
    if problem is not None:
        arguments = (input, target, weight, None, ignore_index, None, _REDUCTION_NAMES[number], label_smoothing)
        return _explain(problem, _torch_cross_entropy, *arguments)
    inplace_backward = inplace.applies(inplace_backward)
    if inplace_backward and (refusal := inplace.refusal(input, rows=True)) is not None:
        raise RuntimeError(f"inplace_backward=True: {refusal}")

    dtype = None
    if target.is_floating_point():
        dtype = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
        if torch.float64 == dtype != input.dtype:
            input = input.to(dtype)
        # 16-bit logits are read as they are beside float32 probabilities; other pairs need one dtype.
        if target.dtype != input.dtype and not (target.dtype == torch.float32 and input.dtype in _SIXTEEN_BITS):
            target = target.to(torch.promote_types(input.dtype, target.dtype))
            if target.dtype != input.dtype and input.dtype not in _SIXTEEN_BITS:
                input = input.to(target.dtype)
    if input.dtype != torch.float64 and _autocast(input):
        dtype = torch.float32
    if weight is not None:
        weight = weight.to(ops.accumulation_dtype(input.dtype)).contiguous()
    if _CHECKS_TARGETS and input.is_cuda and not target.is_floating_point() and not torch.compiler.is_compiling():
        check_targets(target, input.shape[min(1, input.dim() - 1)], int(ignore_index))
    smoothing = max(float(label_smoothing), 0.0)  # torch takes a negative one for none
    return softmax_ce(input, target, weight, number, int(ignore_index), smoothing, dtype, inplace_backward)


_REDUCTION_NAMES = ("none", "mean", "sum")


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises the CPU kernels' IndexError for the first class index that is no class; waits for the device to know."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        value = int(target.flatten()[row])
        raise IndexError(f"Target {value} is out of bounds. (row {row} of {target.numel()}, {classes} classes)")


def _is_integer(value: object) -> bool:
    """Whether torch's argument parser takes ``value`` for an int: numpy's scalars and 0-d tensors, but no bool."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Whether torch's argument parser takes ``value`` for a float."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad
    return hasattr(value, "__float__")


def _cross_entropy_problem(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> str | None:
    """What keeps the kernels from taking this call, naming the argument and both values."""
    if not _have_kernels(input, target, weight) or _requires_grad(weight):
        return _no_kernels(input=input, target=target, weight=weight)
    if type(ignore_index) is not int and not _is_integer(ignore_index):
        return f"ignore_index: expected an integer, got {ignore_index!r}"
    if type(label_smoothing) is not float and not _is_number(label_smoothing):
        return f"label_smoothing: expected a number, got {label_smoothing!r}"
    shape = input.shape
    if not shape:
        return "input: expected at least one dimension, got a scalar"
    classes = shape[0] if len(shape) == 1 else shape[1]
    if classes == 0:
        return f"input: expected at least one class, got shape {list(shape)}"
    if target.shape == shape:
        if not target.is_floating_point():
            return f"target: expected floating point probabilities for the input's shape, got {target.dtype}"
        if ignore_index >= 0:
            return f"ignore_index: expected none with probabilities, got {ignore_index}"
    else:
        index_shape = (shape[0],) if len(shape) == 2 else () if len(shape) == 1 else shape[:1] + shape[2:]
        if target.shape != index_shape:
            return (
                f"target: expected class indices of shape {list(index_shape)} or "
                f"probabilities of shape {list(shape)}, got shape {list(target.shape)}"
            )
        if target.dtype not in _INDEX_DTYPES:
            return f"target: expected class indices of dtype int64, int32 or uint8, got {target.dtype}"
    if weight is not None and (weight.shape != (classes,) or not weight.is_floating_point()):
        return f"weight: expected a floating point tensor of shape [{classes}], got {weight.dtype} {list(weight.shape)}"
    if not label_smoothing <= 1.0:
        return f"label_smoothing: expected at most 1.0, got {label_smoothing}"
    return None


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
            The logits must be dense and no leaf; using them after backward, or a second backward, raises.
            Without effect under :func:`torch.compile`, whose compiler plans the memory. Default: ``False``

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
        loss: Tensor = handle_torch_function(
            binary_cross_entropy_with_logits,
            (input, target, weight, pos_weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
            inplace_backward=inplace_backward,
        )
        return loss
    number = _reduction_number(reduction, size_average, reduce)
    if _have_kernels(input, target, weight, pos_weight) and not (_requires_grad(weight) or _requires_grad(pos_weight)):
        problem = _bce_problem(input, target, weight, pos_weight)
    else:
        problem = _no_kernels(input=input, target=target, weight=weight, pos_weight=pos_weight)
    if problem is not None:
        arguments = (input, target, weight, None, None, _REDUCTION_NAMES[number], pos_weight)
        return _explain(problem, _torch_bce_with_logits, *arguments)
    inplace_backward = inplace.applies(inplace_backward)
    if inplace_backward and (refusal := inplace.refusal(input, rows=False)) is not None:
        raise RuntimeError(f"inplace_backward=True: {refusal}")

    dtype = target.dtype if target.is_floating_point() else input.dtype
    if _autocast(input):
        dtype = torch.promote_types(dtype, torch.float32)
    if target.is_floating_point():
        if target.dtype == torch.float64:
            input = input.to(torch.float64)
        elif target.dtype not in (input.dtype, torch.float32):
            target = target.to(ops.accumulation_dtype(input.dtype))
    elif target.dtype not in (torch.bool, torch.uint8, torch.int64):
        target = target.to(ops.accumulation_dtype(input.dtype))
    acc = ops.accumulation_dtype(input.dtype)
    if weight is not None:
        weight = weight.to(acc)
    if pos_weight is not None:
        pos_weight = pos_weight.to(acc)
    return sigmoid_bce(input, target, weight, pos_weight, number, dtype, inplace_backward)


def _bce_problem(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> str | None:
    """What keeps the kernels from taking this call, naming the argument and both values."""
    if target.shape != input.shape:
        return f"target: expected the input's shape {list(input.shape)}, got {list(target.shape)}"
    for name, tensor in (("target", target), ("weight", weight), ("pos_weight", pos_weight)):
        if tensor is not None and tensor.is_complex():
            return f"{name}: expected a real dtype, got {tensor.dtype}"
        if tensor is not None and not _broadcasts_to(tensor.shape, input.shape):
            return f"{name}: expected a shape that broadcasts to {list(input.shape)}, got {list(tensor.shape)}"
    if pos_weight is not None and pos_weight.dtype == torch.bool:
        return f"pos_weight: expected a tensor of numbers, got {pos_weight.dtype}"
    if input.dim() > _MOST_DIMENSIONS:
        return f"input: expected at most {_MOST_DIMENSIONS} dimensions, got {input.dim()}"
    return None


def _broadcasts_to(shape: torch.Size, wanted: torch.Size) -> bool:
    offset = len(wanted) - len(shape)
    return offset >= 0 and all(size in (1, wanted[offset + d]) for d, size in enumerate(shape))


NO_TORCHSCRIPT = "torchce's losses cannot be scripted; use torch.compile or torch.export, or torch.nn's losses"
for _function in (cross_entropy, binary_cross_entropy_with_logits):
    setattr(_function, "__script_unsupported", NO_TORCHSCRIPT)  # where torch.jit.script looks
