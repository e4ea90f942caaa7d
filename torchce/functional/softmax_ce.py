"""Softmax cross entropy with the semantics of :func:`torch.nn.functional.cross_entropy`."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parameter import Parameter
from torch.overrides import has_torch_function_variadic
from typing_extensions import Unpack

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
from torchce.functional.softmax_ce_own import (
    CrossEntropyOutput,
    LossArguments,
    Own,
    OwnArguments,
    given,
    names_own_arguments,
    one_ignore_index,
    own_cross_entropy,
)
from torchce.sizes import are_numbers, known
from torchce.softmax_ce import Options, eager_softmax_ce, softmax_ce
from torchce.softmax_ce_formulas import check_targets, plain_options
from torchce.transforms import may_be_transformed

_torch_cross_entropy = F.cross_entropy  # bound now, so that torchce.patch_torch cannot lead back here
_INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.uint8})


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int | tuple[int, ...] = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    inplace_backward: bool = ...,
    **own: Unpack[LossArguments],
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int | tuple[int, ...] = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    inplace_backward: bool = ...,
    **own: Unpack[OwnArguments],
) -> CrossEntropyOutput: ...
@overrides.stands_for(_torch_cross_entropy)
@refuse_scripting
@names_own_arguments
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int | tuple[int, ...] = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
    **own: Unpack[OwnArguments],
) -> Tensor | CrossEntropyOutput:
    r"""Softmax cross entropy between logits and class indices or probabilities.

    A drop-in replacement for :func:`torch.nn.functional.cross_entropy`, computed in one pass each way: softmax
    probabilities are never stored, and 16-bit logits are not copied to float32, but where something of float64 stands
    beside them. For logits x of one row, class weights w, target class y, s = ``label_smoothing`` and
    lse = max + log sum exp(x - max):

    .. math:: (1 - s)\, w_y\, (\mathrm{lse} - x_y) + \frac{s}{C} \sum_k w_k\, (\mathrm{lse} - x_k)

    and for target probabilities t, with t' = (1 - s) t + s / C: :math:`\sum_k w_k\, t'_k\, (\mathrm{lse} - x_k)`, where
    0 times infinity is 0. The mean divides by the sum of the rows' weights for indices, by the number of rows for
    probabilities. (Maximum likelihood over multinomial labels; smoothing after Szegedy et al. 2016, arXiv:1512.00567.)

    With v = ``sample_weight`` and z = ``z_loss``, the loss of a row that is not ignored is
    :math:`v\, (\text{the above} + z\, \mathrm{lse}^2)`, and its weight in the mean is v times the one above. With
    c = ``softcap`` and a = ``logit_scale``, all of it is of :math:`c \tanh(a x / c)` in place of x, or of a x.

    Args:
        input (Tensor): unnormalised logits, float64, float32, bfloat16 or float16, of any strides.
        target (Tensor): class indices (int64, int32 or uint8), or class probabilities (floating point).
        weight (Tensor, optional): a weight for each class, of any floating dtype.
        size_average (bool, optional): deprecated, see ``reduction``.
        ignore_index (int or tuple of ints): class indices whose rows have no loss and no gradient. Default: -100
        reduce (bool, optional): deprecated, see ``reduction``.
        reduction (str): ``'none'``, ``'mean'`` or ``'sum'``. Default: ``'mean'``
        label_smoothing (float): the part of each target spread evenly over all classes, at most 1. Default: 0.0

    Keyword Args:
        z_loss (float): what times lse^2 is added to the loss of each row that is not ignored; class weights do not
            multiply it. (Chowdhery et al. 2022, PaLM, arXiv:2204.02311.) Default: 0.0
        softcap (float, optional): keeps the logits between it and its negative, by a tanh; minus infinity becomes the
            negative, and masks no class. (Bello et al. 2016, arXiv:1611.09940; Gemma 2, arXiv:2408.00118.)
            Default: ``None``
        logit_scale (float or Tensor, optional): a positive factor for the logits, before softcap. A tensor has no
            dimension and may require grad; where it is not positive the loss is NaN, or a ValueError if that can be
            seen without waiting for a device. Default: ``None``, 1
        sample_weight (Tensor, optional): a factor for each row's loss, of any floating dtype and differentiable. The
            mean divides by the sum of the weights that were used: of rows that are not ignored, times their class's.
            Default: ``None``
        divisor (float or Tensor, optional): what the mean divides by instead, such as the tokens of all the batches
            whose gradients are added up, or of all processes. No device is waited for. Default: ``None``
        dtype (torch.dtype, optional): the loss's. ``torch.float32`` costs 16-bit logits no copy, and their loss the
            rounding to 16 bits no longer: near 37 bfloat16 has steps of 0.25. Default: ``None``, torch's
        empty_value (float, optional): the mean where no row counts: all are ignored, or weigh 0. The gradient is 0
            then. Default: ``None``, torch's NaN
        return_lse (bool): return each row's lse as well, differentiable, of ignored rows too. Minus infinity of a row
            of nothing else; NaN where the row holds a NaN or infinity. Default: ``False``
        return_predictions (bool): return each row's class of the largest logit as well, the first one of equals, of
            ignored rows too. Default: ``False``
        return_z_loss (bool): return the z-loss's part of the loss as well, reduced as the loss, detached.
            Default: ``False``
        return_entropy (bool): return each row's entropy :math:`-\sum_k p_k \log p_k`, p = softmax(x), as well,
            differentiable, of ignored rows too. NaN where the row has no softmax. Default: ``False``
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
        - sample_weight, lse, predictions, entropy: the input's shape without C
        - output, z_loss: a scalar, or with ``reduction='none'`` the input's shape without C

    Returns:
        Tensor: the loss, in the dtype torch gives it: the input's for indices, the promoted one of all three for
        probabilities, float32 for 16-bit inputs under autocast. With any ``return_`` a
        :class:`torchce.CrossEntropyOutput` that holds it.

    Raises:
        IndexError: a class index is neither in [0, C) nor ``ignore_index`` (on CUDA such a row's loss and gradient are
            NaN instead, unless ``TORCHCE_CHECK_TARGETS=1`` is set in the environment).
        ValueError, RuntimeError, TypeError: what torch raises for the same call.
        ValueError: a keyword argument is wrong, or excludes another one, or the kernels do not take the tensors and
            torch, which would, knows no such argument.

    Example::

        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> torchce.functional.cross_entropy(logits, torch.tensor([0, 3]))
        tensor(1.3863, grad_fn=<SoftmaxCEBackward>)
    """
    if has_torch_function_variadic(input, target, weight):
        answer: Tensor | CrossEntropyOutput = overrides.ask_handlers(
            cross_entropy,
            _torch_cross_entropy,
            (input, target, weight),
            {**given("cross_entropy", own), "inplace_backward": inplace_backward},
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
    if not (own or inplace_backward):
        loss = _plain_loss(input, target, weight, number, ignore_index, label_smoothing)
        if loss is not None:
            return loss
    own_arguments = given("cross_entropy", own)
    is_torchs = not own_arguments
    if isinstance(ignore_index, tuple):
        target, ignore_index = one_ignore_index(target, ignore_index)
    if not is_torchs:
        input, target, weight = map(overrides.plain, (input, target, weight))
    problem = problem_of(input, target, weight, ignore_index, label_smoothing)
    if problem is not None:
        arguments = (input, target, weight, None, ignore_index, None, REDUCTION_NAMES[number], label_smoothing)
        loss = explain(problem, _torch_cross_entropy, *arguments)
        if is_torchs:
            return loss
        raise ValueError(f"{problem}: torch's loss answers there, which has no keyword arguments of torchce's own")
    of_own = Own(**own_arguments)
    if not is_torchs:
        of_own.check(input, ops.softmax_ce_accumulation(input, target, weight), number)
    inplace_backward = inplace_backward and inplace.will_overwrite(input, rows=True)
    input, target, weight, dtype = promote(input, target, weight)
    label_smoothing = max(float(label_smoothing), 0.0)  # torch takes a negative one for none
    options = Options(number, int(ignore_index), label_smoothing)
    if CHECKS_TARGETS and input.is_cuda and not target.is_floating_point() and not torch.compiler.is_compiling():
        check_targets(target, input.shape[min(1, input.dim() - 1)], options.ignore_index)
    if is_torchs:
        return softmax_ce(input, target, weight, dtype, plain_options(options), inplace_backward)
    return own_cross_entropy(input, target, weight, dtype or input.dtype, options, inplace_backward, of_own)


def _plain_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: Any, label_smoothing: float
) -> Tensor | None:
    """The loss where nothing can be wrong that the op does not find out itself, else None.

    It is tried first, because a small loss takes less time than all the questions of :func:`problem_of`.
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
        return eager_softmax_ce(input, target, weight, None, (reduction, ignore_index, label_smoothing), False)
    except RuntimeError:
        problem = problem_of(input, target, weight, ignore_index, label_smoothing)
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


def problem_of(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: Any,
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


def promote(
    input: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
    """The tensors in dtypes that go together in the op, and the loss's dtype, or None for the logits'."""
    target = of_known_dtype(target)
    dtype = loss_dtype(input, target, weight)
    accumulation = ops.softmax_ce_accumulation(input, target, weight)
    if target.is_floating_point():
        # The op takes all pairs but those of 16 bits beside another 16 or beside float64.
        if accumulation == torch.float64 and input.dtype in SIXTEEN_BITS:
            input = input.to(torch.float32)
        if target.dtype != input.dtype and target.dtype in SIXTEEN_BITS:
            target = target.to(torch.float32)
    return input, target, None if weight is None else weight.to(accumulation).contiguous(), dtype


def of_known_dtype(target: Tensor) -> Tensor:
    """Probabilities in a dtype that kernels read: autocast takes others, and torch casts what it can."""
    return target.to(torch.float32) if target.dtype not in FLOATS and target.is_floating_point() else target


def loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype | None:
    """The loss's, or None for the logits'."""
    if ops.softmax_ce_accumulation(input, target, weight) != torch.float64 and autocasts(input):
        return torch.float32
    if not target.is_floating_point():
        return None
    return promoted(input.dtype, target.dtype, input.dtype if weight is None else weight.dtype)
