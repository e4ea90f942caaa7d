"""Softmax cross entropy of a linear layer, with the semantics of torch's ``linear_cross_entropy`` (torch 2.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic
from typing_extensions import Unpack

from torchce import ops, overrides
from torchce.chunked import Chunks
from torchce.functional._common import (
    CHECKS_TARGETS,
    REDUCTION_NAMES,
    autocasts,
    explain,
    has_shape,
    have_kernels,
    no_kernels,
    reduction_number,
    refuse_scripting,
    requires_grad,
)
from torchce.functional.linear_chunks import chunks_of
from torchce.functional.linear_layer import autocast_layer, check_dtypes, check_layer
from torchce.functional.softmax_ce import cross_entropy, loss_dtype, of_known_dtype, problem_of
from torchce.functional.softmax_ce_own import (
    CrossEntropyOutput,
    LossArguments,
    Own,
    OwnArguments,
    Rows,
    given,
    names_own_arguments,
    one_ignore_index,
    scalar_beside,
)
from torchce.linear_softmax_ce import Inputs, linear_softmax_ce
from torchce.softmax_ce_formulas import Options, check_targets
from torchce.transforms import all_true, transformed

if TYPE_CHECKING:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

_NONE, _SUM = 0, 2
# The calls of a piece add 70 % to the time of 128 rows of 64 features and 1,000 classes, 8 % at 2 MiB, nothing at 4.
SMALL_BYTES = 2 << 20
_OF_CHUNKS = ("chunk_bytes", "chunk_rows", "acc_policy", "compact_ignored")


def _composed(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    options: None = None,
    **keywords: Any,
) -> Tensor:
    """What torch's function is for a torch that has none."""
    logits = _logits(input, linear_weight, linear_bias)
    return F.cross_entropy(logits, target, ignore_index=-100 if ignore_index is None else ignore_index, **keywords)


_Function = TypeVar("_Function", bound=Callable[..., Any])
_torch_linear_cross_entropy: Callable[..., Tensor] = getattr(F, "linear_cross_entropy", _composed)


def _stands_for_torchs(function: _Function) -> _Function:
    if _torch_linear_cross_entropy is _composed:
        return function
    return overrides.stands_for(_torch_linear_cross_entropy)(function)


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | tuple[int, ...] | None = ...,
    label_smoothing: float = ...,
    options: LinearCrossEntropyOptions | None = ...,
    chunk_bytes: int | None = ...,
    chunk_rows: int | None = ...,
    acc_policy: str = ...,
    compact_ignored: bool | None = ...,
    **own: Unpack[LossArguments],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int | tuple[int, ...] | None = ...,
    label_smoothing: float = ...,
    options: LinearCrossEntropyOptions | None = ...,
    chunk_bytes: int | None = ...,
    chunk_rows: int | None = ...,
    acc_policy: str = ...,
    compact_ignored: bool | None = ...,
    **own: Unpack[OwnArguments],
) -> CrossEntropyOutput: ...
@_stands_for_torchs
@refuse_scripting
@names_own_arguments
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | tuple[int, ...] | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    chunk_bytes: int | None = None,
    chunk_rows: int | None = None,
    acc_policy: str = "auto",
    compact_ignored: bool | None = None,
    **own: Unpack[OwnArguments],
) -> Tensor | CrossEntropyOutput:
    r"""Softmax cross entropy between a linear layer's output and a target; the logits are never whole.

    A drop-in replacement for ``torch.nn.functional.linear_cross_entropy`` of torch 2.13 and later, and the same as
    :func:`torchce.functional.cross_entropy` of ``torch.nn.functional.linear(input, linear_weight, linear_bias)``, with
    all its keyword arguments. The logits are computed, and turned into their gradient, in pieces of rows. For a mean or
    a sum the gradients are computed in the forward (three matrix products, as without pieces); where each row has an
    upstream gradient of its own, as of ``reduction='none'`` or lse, and in a second backward, they are computed in the
    backward (four). Both give the same. Those of float16 are always computed in the backward: times the scale of the
    loss that comes in there, without which small ones are lost.

    Args:
        input (Tensor): the layer's input, float64, float32, bfloat16 or float16.
        linear_weight (Tensor): the layer's weight, of the input's dtype.
        target (Tensor): class indices (int64, int32 or uint8), or class probabilities (floating point).

    Keyword Args:
        linear_bias (Tensor, optional): the layer's bias, of the input's dtype. Default: ``None``
        weight (Tensor, optional): a weight for each class, of any floating dtype.
        reduction (str): ``'none'``, ``'mean'`` or ``'sum'``. Default: ``'mean'``
        ignore_index (int or tuple of ints, optional): class indices whose rows have no loss and no gradient; none
            beside probabilities. Default: ``None``, -100
        label_smoothing (float): the part of each target spread evenly over all classes. Default: 0.0
        options (torch.nn.LinearCrossEntropyOptions, optional): torch's way to say what the next three arguments say:
            its ``batch_chunk_size`` is ``chunk_rows``, its ``aspect_ratio`` a number of ``chunk_bytes``, its
            ``acc_policy`` and ``acc_dtype`` the ``acc_policy``. ``allow_retain_graph`` is always so. Default: ``None``
        chunk_bytes (int, optional): what the logits of a piece may take. Default: ``None``, a sixteenth of all logits,
            but at least 64 MiB and 256 rows (on CUDA as many rows as it has multiprocessors), or all of them where the
            sums of ``acc_policy`` would take what pieces spare. What a forward and backward hold beyond inputs and
            gradients is that, an eighth more where sums are of float32, and what ``acc_policy`` says
        chunk_rows (int, optional): the rows of a piece instead. Default: ``None``
        acc_policy (str): in which dtype the weight's gradient is added up over pieces, for inputs of 16 bits:
            ``'accurate'``, float32, which takes 4 bytes for each number of the weight until it is rounded,
            ``'compact'``, the weight's own, which takes none, ``'auto'``, accurate. Default: ``'auto'``
        compact_ignored (bool, optional): whether rows that are ignored are left out of the matrix products, unless
            something is returned of them. On CUDA the host then waits for the device, once each way. Default:
            ``None``, on the CPU, where that takes less time
        z_loss, softcap, logit_scale, sample_weight, divisor, dtype, empty_value, return_lse, return_predictions,
            return_z_loss, return_entropy: as in :func:`torchce.functional.cross_entropy`

    Shape:
        - input: :math:`(H)` or :math:`(N, H)`
        - linear_weight: :math:`(C, H)`, or :math:`(C, d_1, ..., d_K, H)` beside a batch
        - linear_bias: the weight's shape without H
        - target: for indices :math:`()`, :math:`(N)` or :math:`(N, d_1, ..., d_K)`, for probabilities :math:`(C)`,
          :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`
        - weight: :math:`(C)`
        - sample_weight, lse, predictions, entropy: the shape of indices
        - output, z_loss: a scalar, or with ``reduction='none'`` the shape of indices

    Returns:
        Tensor: the loss, in the dtype that the unfused one has: the input's, float32 under autocast, the promoted one
        for probabilities. With any ``return_`` a :class:`torchce.CrossEntropyOutput` that holds it.

    Transforms of :mod:`torch.func`, forward-mode AD, second derivatives and ``torch.jit.trace`` go through the whole
    logits, and so does what has no kernel that works in place: probabilities that require grad, and probabilities or
    their weights of float64 beside a narrower input.

    Raises:
        IndexError: a class index is neither in [0, C) nor ``ignore_index`` (on CUDA as in
            :func:`torchce.functional.cross_entropy`).
        RuntimeError: the shapes or dtypes of input, linear_weight and linear_bias do not fit.
        ValueError, RuntimeError, TypeError: what torch raises for the same call.
        ValueError: a keyword argument is wrong, or a piece may not hold a row.

    Example::

        >>> hidden = torch.zeros(2, 8, requires_grad=True)
        >>> head = torch.nn.Linear(8, 4, bias=False)
        >>> torchce.functional.linear_cross_entropy(hidden, head.weight, torch.tensor([0, 3]))
        tensor(1.3863, grad_fn=<SoftmaxCEBackward>)
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        of_chunks = (chunk_bytes, chunk_rows, acc_policy, compact_ignored)
        answer: Tensor | CrossEntropyOutput = overrides.ask_handlers(
            linear_cross_entropy,
            _torch_linear_cross_entropy,
            (input, linear_weight, target, linear_bias, weight),
            {**given("linear_cross_entropy", own), **dict(zip(_OF_CHUNKS, of_chunks, strict=True))},
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        return answer
    number = reduction_number(reduction, None, None)
    own_arguments = given("linear_cross_entropy", own)
    if own_arguments:
        layer = map(overrides.plain, (input, linear_weight, linear_bias))
        input, linear_weight, linear_bias, target, weight = (*layer, overrides.plain(target), overrides.plain(weight))
    if not isinstance(linear_weight, Tensor) or not have_kernels(input, linear_weight, target, linear_bias, weight):
        problem: str | None = no_kernels(
            input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight
        )
    else:
        check_layer(input, linear_weight, linear_bias)
        if autocasts(input):
            input, linear_weight, linear_bias = autocast_layer(input, linear_weight, linear_bias)
        check_dtypes(input, linear_weight, linear_bias)
        logits = _stand_in(input, linear_weight)
        ignored = _ignored(logits, target, ignore_index)
        if isinstance(ignored, tuple):
            target, ignored = one_ignore_index(target, ignored)
        problem = problem_of(logits, target, weight, ignored, label_smoothing)
    if problem is not None:
        loss = explain(
            problem,
            _torch_linear_cross_entropy,
            *(input, linear_weight, target),
            linear_bias=linear_bias,
            weight=weight,
            reduction=REDUCTION_NAMES[number],
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        if not own_arguments:
            return loss
        raise ValueError(f"{problem}: torch's loss answers there, which has no keyword arguments of torchce's own")
    chunks = chunks_of(options, chunk_bytes, chunk_rows, acc_policy, compact_ignored, input, linear_weight)
    by_rule = options is None and (chunk_bytes, chunk_rows, compact_ignored) == (None, None, None)
    of_own = Own(**own_arguments)
    acc = ops.softmax_ce_accumulation(logits, target, weight)
    of_own.check(logits, acc, number)
    is_wide = acc == torch.float64 and input.dtype != torch.float64
    tensors = (input, linear_weight, linear_bias, target, weight, of_own.sample_weight, of_own.logit_scale)
    if (
        (by_rule and _is_small(logits, target, ignored))
        or is_wide
        or requires_grad(weight)
        or (target.is_floating_point() and requires_grad(target))
        or transformed(*(tensor for tensor in tensors if isinstance(tensor, Tensor)))
    ):
        return cross_entropy(  # type: ignore[no-any-return]
            _logits(input, linear_weight, linear_bias),
            target,
            weight,
            ignore_index=ignored,
            reduction=REDUCTION_NAMES[number],
            label_smoothing=label_smoothing,
            **own_arguments,
        )
    if CHECKS_TARGETS and input.is_cuda and not target.is_floating_point() and not torch.compiler.is_compiling():
        check_targets(target, linear_weight.shape[0], int(ignored))
    target = of_known_dtype(target)  # pairs of dtypes that the kernels do not take are made alike in pieces
    of_own = of_own._replace(dtype=of_own.dtype or loss_dtype(logits, target, weight) or input.dtype)
    weight = None if weight is None else weight.to(acc).contiguous()
    row_options = Options(number, int(ignored), max(float(label_smoothing), 0.0))
    if input.dim() == 2:
        return _in_pieces(input, linear_weight, linear_bias, target, weight, acc, chunks, row_options, of_own)
    if of_own.sample_weight is not None:
        of_own = of_own._replace(sample_weight=of_own.sample_weight.unsqueeze(0))
    batch = (input.unsqueeze(0), linear_weight, linear_bias, target.unsqueeze(0), weight)
    return _without_batch(_in_pieces(*batch, acc, chunks, row_options, of_own))


def _in_pieces(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    acc: torch.dtype,
    chunks: Chunks,
    options: Options,
    own: Own,
) -> Tensor | CrossEntropyOutput:
    """The loss of a checked batch, of the dtype that ``own`` names."""
    scale, options = own.terms(input, acc, options)
    rows = Rows(target, weight, linear_weight.shape[0], acc, options, own)
    divisor = rows.divisor()
    if isinstance(divisor, Tensor):
        divisor = scalar_beside(divisor, input, acc)
    elif divisor is not None:
        divisor = input.new_full((), divisor, dtype=acc)
    is_unreduced = options.reduction == _NONE
    sample_weight = None if is_unreduced else rows.sample_weight
    inputs = Inputs(input, linear_weight, linear_bias, target, weight, sample_weight, scale, divisor)
    of_op = options._replace(reduction=_NONE if is_unreduced else _SUM)
    loss, *outputs = linear_softmax_ce(inputs, own.wanted(), chunks, of_op)
    loss = rows.or_empty_value(rows.total(loss) if is_unreduced else loss)
    return rows.output(loss.to(own.dtype), *outputs)


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """The whole ones, ``[N, C, d1, ..., dK]``."""
    if linear_weight.dim() == 2:
        return F.linear(input, linear_weight, linear_bias)
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    return logits.view(*input.shape[:-1], *linear_weight.shape[:-1])


def _stand_in(input: Tensor, linear_weight: Tensor) -> Tensor:
    """A tensor like the logits, of their shape, dtype and device, without memory."""
    return input.detach().new_empty(()).expand(*input.shape[:-1], *linear_weight.shape[:-1])


def _is_small(logits: Tensor, target: Tensor, ignore_index: Any) -> bool:
    """Whether pieces spare nothing that counts, and the calls that make them take longer than all the rest.

    So not where a program is traced, which would depend on the size, nor where ignored rows are left out.
    """
    if torch.compiler.is_compiling() or not logits.is_cpu or type(logits.numel()) is not int:
        return False
    if logits.numel() * logits.element_size() > SMALL_BYTES:
        return False
    return target.is_floating_point() or all_true(target != ignore_index)


def _without_batch(result: Tensor | CrossEntropyOutput) -> Tensor | CrossEntropyOutput:
    if isinstance(result, Tensor):
        return result if result.dim() == 0 else result.squeeze(0)
    fields = {name: t if t is None or t.dim() == 0 else t.squeeze(0) for name, t in result._asdict().items()}
    return CrossEntropyOutput(**fields)


def _ignored(logits: Tensor, target: Tensor, ignore_index: Any) -> Any:
    if ignore_index is None:
        return -100
    if has_shape(target, logits.shape):
        raise RuntimeError(f"ignore_index: expected None beside probabilities, got {ignore_index!r}")
    return ignore_index
