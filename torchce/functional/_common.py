"""What every loss asks of its arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import _reduction as _Reduction
from torch.nn.parameter import Buffer, Parameter

from torchce import calls, ops
from torchce.sizes import known

_Function = TypeVar("_Function", bound=Callable[..., Any])
# Kinds of tensors whose operations are a plain tensor's; AOTAutograd traces with FunctionalTensor.
_PLAIN_TENSORS = frozenset({Tensor, Parameter, Buffer, FakeTensor, FunctionalTensor})
SIXTEEN_BITS = frozenset({torch.bfloat16, torch.float16})
FLOATS = SIXTEEN_BITS | {torch.float32, torch.float64}
_INTEGERS = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64})  # that fit in int64
CHECKS_TARGETS = os.environ.get("TORCHCE_CHECK_TARGETS") == "1"
REDUCTION_NAMES = ("none", "mean", "sum")
_REDUCTIONS = {name: number for number, name in enumerate(REDUCTION_NAMES)}
NO_TORCHSCRIPT = "torchce's losses cannot be scripted; use torch.compile or torch.export, or torch.nn's losses"


def refuse_scripting(function: _Function) -> _Function:
    """Makes ``torch.jit.script``, which looks for such a mark, refuse ``function`` and say why."""
    setattr(function, "__script_unsupported", NO_TORCHSCRIPT)
    return function


def reduction_number(reduction: str, size_average: bool | None, reduce: bool | None) -> int:
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    number = _REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    return _Reduction.get_enum(reduction) if number is None else number  # warns or raises


def have_kernels(input: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels exist for these kinds of tensors, whatever their shapes."""
    if type(input) not in _PLAIN_TENSORS:
        return False
    device = input.device
    if (
        input.dtype not in FLOATS
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
            or tensor.is_quantized
        ):
            return False
    if input.is_cuda and not ops.has_cuda():
        ops.warn_without_cuda()
        return False
    return True


def no_kernels(**tensors: Tensor | None) -> str:
    """Says which of the kinds that :func:`have_kernels` asks for is missing."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("input", "target")):
            return f"{name}: expected a Tensor, got {type(tensor).__name__}"
    kinds = ", ".join(f"{name}: {_kind(tensor)}" for name, tensor in tensors.items() if tensor is not None)
    return f"no kernel for {kinds}"


def _kind(tensor: Tensor) -> str:
    layout = "nested " if tensor.is_nested else "" if tensor.layout == torch.strided else f"{tensor.layout} "
    quantized = "quantized " if tensor.is_quantized else ""
    return f"{quantized}{layout}{tensor.dtype} {type(tensor).__name__} on {tensor.device}"


def requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def autocasts(input: Tensor) -> bool:
    return not input.is_meta and torch.is_autocast_enabled("cpu" if input.is_cpu else "cuda")


def promoted(*dtypes: torch.dtype) -> torch.dtype:
    """``torch.promote_types`` of floating dtypes, which would be a call in a traced graph, and no compiler takes it."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def of_dtypes_that_kernels_pair(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands of an elementwise loss, the floating target of the input's dtype or float32."""
    if target.dtype == torch.float64:
        input = input.to(torch.float64)
    elif target.dtype not in (input.dtype, torch.float32):
        target = target.to(ops.accumulation_dtype(input.dtype))
    return input, target


def explain(problem: str, torch_function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Torch's own answer to what the kernels do not take; its refusal is worded by ``problem``."""
    try:
        loss = torch_function(*args, **kwargs)
    except Exception as error:
        raise type(error)(f"{problem} ({error})") from None
    calls.note(problem)
    return loss


def is_integer(value: object) -> bool:
    """Whether torch's argument parser takes ``value`` for an int: numpy's scalars and 0-d tensors, but no bool."""
    if type(value) is int:  # an abstract class takes longer to ask
        return -(2**63) <= value < 2**63
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype in _INTEGERS and not value.is_meta
    if isinstance(value, torch.SymInt):  # torch.compile's, where it takes the function that is called for torch's own
        return True
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63


def is_number(value: object) -> bool:
    """Whether torch's argument parser takes ``value`` for a float: numpy's scalars, 0-d tensors, no fractions."""
    if type(value) is float:
        return True
    if isinstance(value, Tensor):
        return value.dim() == 0 and not (value.requires_grad or value.is_complex() or value.is_meta)
    return isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) or (
        isinstance(value, Real) and hasattr(value, "dtype")
    )


def has_exact_shape(tensor: Tensor, wanted: Sequence[int]) -> bool:
    return tensor.shape == wanted


def has_shape(tensor: Tensor, wanted: Sequence[int]) -> bool:
    """Whether ``tensor`` may have the shape ``wanted``: sizes that depend on data are compared by the op when it runs.

    Where all sizes are numbers (:func:`torchce.sizes.are_numbers`), :func:`has_exact_shape` knows it sooner.
    """
    shape = tensor.shape
    return len(shape) == len(wanted) and not any(known(a != b) for a, b in zip(shape, wanted, strict=True))


def broadcasts_to(tensor: Tensor, wanted: Sequence[int]) -> bool:
    """Whether ``tensor`` may broadcast to ``wanted``, where :func:`has_shape` says when it may have that shape."""
    shape = tensor.shape
    offset = len(wanted) - len(shape)
    return offset >= 0 and not any(
        known(size != 1) and known(size != other) for size, other in zip(shape, wanted[offset:], strict=True)
    )
