"""What :func:`torchce.functional.cross_entropy` has beyond torch's: the keyword arguments that are its own.

The op knows the z-loss, the loss's dtype and what else a row gives. What weighs whole rows, and divides their sum, is
written here in torch's operations over rows, few beside the logits, which autograd and every transform know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree

from torchce import ops
from torchce.composites import sum_of_rows, times
from torchce.functional._common import FLOATS, REDUCTION_NAMES, has_shape, is_integer, is_number
from torchce.softmax_ce import Options, Wanted, row_weights, softmax_ce, softmax_ce_outputs
from torchce.softmax_ce_formulas import are_plain, plain_options
from torchce.transforms import known_least

_NONE, _MEAN, _SUM = range(3)
_NO_CLASS = -(2**63)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class CrossEntropyOutput(NamedTuple):
    """The loss with what else was asked for; the rest is ``None``."""

    loss: Tensor
    lse: Tensor | None = None
    """Each row's log-sum-exp: float64 of float64 logits and beside float64 probabilities or weights of theirs, else
    float32."""
    predictions: Tensor | None = None
    """Each row's class of the largest logit, int64, as :func:`torch.argmax` has it."""
    z_loss: Tensor | None = None
    """The part of the loss that is the z-loss, reduced as the loss is, detached."""
    entropy: Tensor | None = None
    """Each row's entropy of softmax, in nats, of lse's dtype."""


def _of_parts(cls: type[CrossEntropyOutput], loss: Any, *rest: Any, **by_name: Any) -> CrossEntropyOutput:
    """The tuple, of fields or of a generator of them, of which Tensor's own ``__torch_function__`` makes it again."""
    return _of_fields(cls, *loss) if isinstance(loss, Generator) else _of_fields(cls, loss, *rest, **by_name)


_of_fields = CrossEntropyOutput.__new__
CrossEntropyOutput.__new__ = _of_parts  # type: ignore[assignment]
# So that an exported program that returns one can be saved.
_pytree._register_namedtuple(CrossEntropyOutput, serialized_type_name="torchce.CrossEntropyOutput")


class LossArguments(TypedDict, total=False):
    """The keyword arguments with which the loss is all that is returned."""

    z_loss: float
    softcap: float | None
    logit_scale: float | Tensor | None
    sample_weight: Tensor | None
    divisor: float | Tensor | None
    dtype: torch.dtype | None
    empty_value: float | None


class OwnArguments(LossArguments, total=False):
    """All of them."""

    return_lse: bool
    return_predictions: bool
    return_z_loss: bool
    return_entropy: bool


class Own(NamedTuple):
    """The keyword arguments, those that are not given as their defaults."""

    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float | Tensor | None = None
    sample_weight: Tensor | None = None
    divisor: float | Tensor | None = None
    dtype: torch.dtype | None = None
    empty_value: float | None = None
    return_lse: bool = False
    return_predictions: bool = False
    return_z_loss: bool = False
    return_entropy: bool = False

    def check(self, input: Tensor, acc: torch.dtype, reduction: int) -> None:
        """Raises ValueError for what is wrong, naming the argument and its value; ``acc`` is what is computed in."""
        if not is_plain_number(self.z_loss) or not 0 <= self.z_loss <= torch.finfo(acc).max:
            raise ValueError(f"z_loss: expected a finite number that is not negative, got {self.z_loss!r}")
        if self.softcap is not None:
            check_positive("softcap", self.softcap, acc)
            check_positive("1 / softcap", 1 / self.softcap, acc)
        if self.logit_scale is not None and (scale := seen("logit_scale", self.logit_scale, input)) is not None:
            check_positive("logit_scale", scale, acc)
            if self.softcap is not None:
                check_positive("logit_scale / softcap", scale / self.softcap, acc)
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype in FLOATS):
            raise ValueError(f"dtype: expected a floating point dtype of 16 bits or more, got {self.dtype!r}")
        if self.sample_weight is not None:
            _check_sample_weight(self.sample_weight, input)
        if isinstance(self.divisor, Tensor):
            check_scalar("divisor", self.divisor, input, may_be_integer=True)
        elif self.divisor is not None and not is_plain_number(self.divisor):
            raise ValueError(f"divisor: expected a number or a tensor of no dimension, got {self.divisor!r}")
        if self.empty_value is not None and not is_plain_number(self.empty_value):
            raise ValueError(f"empty_value: expected a number, got {self.empty_value!r}")
        for name in ("divisor", "empty_value"):
            if (value := getattr(self, name)) is not None and reduction != _MEAN:
                raise ValueError(f"{name}: expected none with reduction='{REDUCTION_NAMES[reduction]}', got {value!r}")
        if self.divisor is not None and self.empty_value is not None:
            both = f"{self.empty_value!r} and {self.divisor!r}"
            raise ValueError(f"empty_value: expected none beside a divisor, got {both}")
        for name in ("return_lse", "return_predictions", "return_z_loss", "return_entropy"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: expected a bool, got {getattr(self, name)!r}")

    def terms(self, input: Tensor, acc: torch.dtype, options: Options) -> tuple[Tensor | None, Options]:
        """A tensor that scales the logits, and ``options`` with what else changes a row's loss."""
        options = options._replace(z_loss=float(self.z_loss), softcap=float(self.softcap or 0.0))
        if isinstance(self.logit_scale, Tensor):
            return scalar_beside(self.logit_scale, input, acc), options
        if self.logit_scale is not None:
            options = options._replace(logit_scale=float(self.logit_scale))
        return None, options

    def wanted(self) -> Wanted:
        return Wanted(self.return_lse or self.return_z_loss, self.return_predictions, self.return_entropy)


def scalar_beside(scalar: Tensor, input: Tensor, acc: torch.dtype) -> Tensor:
    """``scalar`` on the device of ``input``, as a kernel's argument: a copy would be waited for."""
    if scalar.device != input.device:
        scalar = input.new_ones((), dtype=acc) * scalar
    return scalar.to(acc)


def is_plain_number(value: object) -> bool:
    """A number that no device has to be waited for."""
    return is_number(value) and not isinstance(value, (Tensor, bool))


def check_positive(name: str, value: Any, dtype: torch.dtype) -> None:
    """Raises ValueError unless ``value`` is a positive number that is one in ``dtype`` too."""
    limits = torch.finfo(dtype)
    if not is_plain_number(value) or not limits.tiny <= value <= limits.max:
        raise ValueError(f"{name}: expected a positive number within the range of {dtype}, got {value!r}")


def check_scalar(name: str, value: Tensor, input: Tensor, may_be_integer: bool = False) -> None:
    """Raises ValueError unless the tensor ``value`` can be a number beside ``input``."""
    is_real = value.dtype in FLOATS or (may_be_integer and value.dtype != torch.bool and not value.is_complex())
    if value.dim() != 0 or not is_real or value.layout != torch.strided:
        expected = "a number or a tensor of no dimension" if may_be_integer else "a number or a floating tensor of none"
        raise ValueError(f"{name}: expected {expected}, got {value.dtype} {list(value.shape)}")
    if not (value.is_cpu or value.device == input.device):
        raise ValueError(f"{name}: expected a tensor on {input.device} or the CPU, got one on {value.device}")


def seen(name: str, value: Any, input: Tensor) -> Any:
    """The number in ``value`` if it is a tensor that can be one, or None where it cannot be seen; else ``value``."""
    if not isinstance(value, Tensor):
        return value
    check_scalar(name, value, input)
    return known_least(value)


def _check_sample_weight(weight: Any, input: Tensor) -> None:
    class_dim = min(1, input.dim() - 1)
    row_shape = (*input.shape[:class_dim], *input.shape[class_dim + 1 :])
    if not isinstance(weight, Tensor):
        raise ValueError(f"sample_weight: expected a tensor, got {weight!r}")
    if weight.dtype not in FLOATS or weight.layout != torch.strided or not has_shape(weight, row_shape):
        raise ValueError(
            f"sample_weight: expected a floating point tensor of shape {list(row_shape)}, one for each row, got "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if weight.device != input.device:
        raise ValueError(f"sample_weight: expected a tensor on {input.device}, got one on {weight.device}")


def given(function: str, arguments: OwnArguments) -> dict[str, Any]:
    """Those of ``arguments`` that are no defaults."""
    defaults = Own._field_defaults
    for name in arguments:
        if name not in defaults:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return {
        name: value
        for name, value in arguments.items()
        if value is not defaults[name] and not (type(value) is float and value == defaults[name])
    }


def names_own_arguments(function: _Function) -> _Function:
    """Decorates a function that takes them as ``**own``, so that its signature says which they are.

    As parameters each of them would take a plain call 25 ns, all together 3 % of a small loss.
    """
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    place = [p.kind for p in parameters].index(inspect.Parameter.KEYWORD_ONLY)
    annotations = get_type_hints(OwnArguments)
    parameters[place:place] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotations[name])
        for name, default in Own._field_defaults.items()
    ]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def one_ignore_index(target: Any, indices: tuple[int, ...]) -> tuple[Any, int]:
    """The target with the rows of all ``indices`` at one of them, and that one."""
    for index in indices:
        if not is_integer(index):
            raise ValueError(f"ignore_index: expected integers of 64 bits, got {indices!r}")
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex() or not indices:
        return target, max(indices, default=_NO_CLASS)
    limits = torch.iinfo(target.dtype) if target.dtype != torch.bool else None
    first, *others = [i for i in indices if limits is None or limits.min <= i <= limits.max] or [_NO_CLASS]
    for other in others:
        target = target.masked_fill(target == other, first)
    return target, first


def own_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    options: Options,
    inplace_backward: bool,
    own: Own,
) -> Tensor | CrossEntropyOutput:
    """The loss of checked inputs; ``dtype`` is the one it has unless ``own`` names another."""
    acc = ops.softmax_ce_accumulation(input, target, weight)
    dtype = own.dtype or dtype
    scale, options = own.terms(input, acc, options)
    wanted = own.wanted()
    is_plain = are_plain(options) and scale is None and not any(wanted)
    if target.is_floating_point() and not is_plain:  # the op takes no other pairs of dtypes then
        target = target.to(acc)
        input = input.to(acc) if acc == torch.float64 else input
    rows = Rows(target, weight, input.shape[min(1, input.dim() - 1)], acc, options, own)
    of_op = options
    if own.sample_weight is not None:
        of_op = options._replace(reduction=_NONE)
    elif own.divisor is not None or own.empty_value is not None:
        of_op = options._replace(reduction=_SUM)
    whole = of_op is options  # then the op's loss needs nothing more
    dtype_of_op = dtype if whole else acc

    def finished(loss: Tensor) -> Tensor:
        if whole:
            return loss
        loss = rows.mean(loss if own.sample_weight is None else rows.total(loss))
        return rows.or_empty_value(loss).to(dtype)

    if is_plain:
        return finished(softmax_ce(input, target, weight, dtype_of_op, plain_options(of_op), inplace_backward))
    loss, *outputs = softmax_ce_outputs(input, target, weight, scale, dtype_of_op, wanted, of_op, inplace_backward)
    return rows.output(finished(loss), *outputs)


class Rows:
    """How the rows of a call make its loss: their weights, and what the sum of their losses is divided by."""

    def __init__(
        self, target: Tensor, weight: Tensor | None, classes: int, acc: torch.dtype, options: Options, own: Own
    ) -> None:
        self.target, self.weight, self.classes, self.acc = target, weight, classes, acc
        self.options, self.own = options, own
        self.sample_weight = None if own.sample_weight is None else self.kept(own.sample_weight.to(acc))

    def kept(self, rows: Tensor) -> Tensor:
        """``rows`` with 0 in those that are ignored, whatever they hold."""
        if self.target.is_floating_point():
            return rows
        return torch.where(self.target.to(torch.int64) != self.options.ignore_index, rows, 0)

    def weights(self) -> Tensor:
        """What each row counts in the mean."""
        if self.target.is_floating_point():
            class_dim = min(1, self.target.dim() - 1)
            weights = torch.ones_like(self.target.select(class_dim, 0), dtype=self.acc)
        else:
            weights = row_weights(self.target, self.weight, self.options.ignore_index, self.classes, self.acc)
        weights = weights.to(self.acc)
        return weights if self.sample_weight is None else times(self.sample_weight, weights)

    def are_nothing(self) -> Tensor:
        """Whether none counts."""
        return (self.weights() == 0).all()

    def total(self, losses: Tensor) -> Tensor:
        """The rows' losses times their own weights, added up where they are reduced."""
        if self.sample_weight is not None:
            losses = times(self.sample_weight, losses)
        return losses if self.options.reduction == _NONE else sum_of_rows(losses)

    def divisor(self) -> float | Tensor | None:
        """What a mean divides by; None where the reduction is none."""
        if self.options.reduction != _MEAN:
            return None
        if self.own.divisor is not None:
            return self.own.divisor if isinstance(self.own.divisor, Tensor) else float(self.own.divisor)
        divisor = sum_of_rows(self.weights())
        return divisor if self.own.empty_value is None else torch.where(self.are_nothing(), 1, divisor)

    def mean(self, total: Tensor) -> Tensor:
        """``total`` divided, where the reduction is a mean."""
        divisor = self.divisor()
        return total if divisor is None else total / divisor

    def or_empty_value(self, loss: Tensor, value: float | None = None) -> Tensor:
        """``loss``, or where none counts and that has a value, this or another one."""
        if self.own.empty_value is None:
            return loss
        return torch.where(self.are_nothing(), self.own.empty_value if value is None else value, loss)

    def output(self, loss: Tensor, lse: Tensor, predictions: Tensor, entropy: Tensor) -> Tensor | CrossEntropyOutput:
        """The loss alone or with what was asked for."""
        own = self.own
        if not any(own.wanted()):
            return loss
        z_loss = None
        if own.return_z_loss:  # not under no_grad, which forward mode and some traced programs pass over
            z_losses = self.options.z_loss * lse * lse if self.options.z_loss != 0 else torch.zeros_like(lse)
            z_loss = self.or_empty_value(self.mean(self.total(self.kept(z_losses))), 0).to(loss.dtype).detach()
        return CrossEntropyOutput(
            loss,
            lse if own.return_lse else None,
            predictions if own.return_predictions else None,
            z_loss,
            entropy if own.return_entropy else None,
        )
