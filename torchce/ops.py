"""The compiled ops of ``torch.ops.torchce``, each with its fake right below.

``csrc/schemas.h`` has their schemas, and the shapes of what goes in and comes out. The ops check what memory safety
needs, and :mod:`torchce.functional` what a user should be told. Those that overwrite their logits have a wrapper here,
which tells autograd of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchce import _C, _cuda_library  # noqa: F401  (importing _C registers the ops)
from torchce.sizes import known

_ops = torch.ops.torchce


cuda_module, cuda_status = _cuda_library.load()


def has_cuda() -> bool:
    """Whether CUDA kernels were built and loaded."""
    return cuda_module is not None


_has_warned = False


def warn_without_cuda() -> None:
    """Says, once in a process, why a loss of CUDA logits does not run on torchce's kernels."""
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    warnings.warn(
        f"torchce's CUDA kernels: {cuda_status}. Losses of CUDA logits are torch's own. To have the kernels, install "
        "torchce beside this torch: TORCHCE_CUDA=1 pip install --no-build-isolation . says what is missing",
        stacklevel=2,
    )


# Dynamo would break its graph at a warning; marked as constant, this function runs while Dynamo traces.
warn_without_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel computes in, for logits of ``dtype`` beside class indices, or in BCE."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_ce_accumulation(logits: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype a softmax_ce op computes in: probabilities and weights beside them have a say, too."""
    dtypes = [logits.dtype]
    if target.is_floating_point():
        dtypes += [target.dtype] if weight is None else [target.dtype, weight.dtype]
    return torch.float64 if torch.float64 in dtypes else torch.float32


_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # type: ignore[attr-defined]
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_set_excluded = torch._C._dispatch_tls_set_dispatch_key_excluded


def below_autograd(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """``overload`` without its autograd formula, for callers that have one of their own; not for Dynamo.

    A formula (:func:`torchce.composites.differentiate`) is written in Python and costs 5 us a call, a fifth of a small
    loss. To step below it costs 0.2; the guard that torch has for this, 0.5.
    """
    op = overload._op  # what the overload wraps, a microsecond sooner

    def call(*arguments: Any) -> Any:
        excluded = _is_excluded(_AUTOGRAD)
        _set_excluded(_AUTOGRAD, True)
        try:
            return op(*arguments)
        finally:
            _set_excluded(_AUTOGRAD, excluded)

    return call


def _was_overwritten(logits: Tensor) -> None:
    """Tells autograd that the logits are overwritten, as torch's own ops do: whoever saved them raises from now on."""
    if not (logits.is_inference() or torch.compiler.is_compiling()):
        torch.autograd.graph.increment_version(logits)


def one_stride(t: Tensor) -> bool:
    """Whether one stride leads through all of d1...dk of ``t``, shaped as logits."""
    expected = None
    for size, stride in zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True):
        if known(size == 1):
            continue
        if expected is not None and not known(stride == expected):
            return False
        expected = stride * size
    return True


def _empty_gradient(like: Tensor) -> Tensor:
    grad = torch.empty_like(like)
    return grad if one_stride(grad) else like.new_empty(like.shape)


# --- softmax cross entropy -----------------------------------------------------------------------------------------

softmax_ce_forward = _ops.softmax_ce_forward.default
eager_softmax_ce_forward = below_autograd(softmax_ce_forward)


@torch.library.register_fake("torchce::softmax_ce_forward")
def _(logits, target, weight, dtype, reduction, *_):  # type: ignore[no-untyped-def]
    row_shape = _row_shape(logits)
    rows = 1
    for size in row_shape:
        rows = rows * size
    acc = softmax_ce_accumulation(logits, target, weight)
    loss = logits.new_empty(row_shape if reduction == 0 else [], dtype=dtype or logits.dtype)
    statistics = logits.new_empty([3 if target.is_floating_point() else 2, rows], dtype=acc)
    return loss, statistics, logits.new_empty([2], dtype=acc)


def _row_shape(logits: Tensor) -> list[int]:
    class_dim = min(1, logits.dim() - 1)
    return [*logits.shape[:class_dim], *logits.shape[class_dim + 1 :]]


softmax_ce_forward_outputs = _ops.softmax_ce_forward_outputs.default
eager_softmax_ce_forward_outputs = below_autograd(softmax_ce_forward_outputs)


@torch.library.register_fake("torchce::softmax_ce_forward_outputs")
def _(logits, target, weight, scale, dtype, returns_lse, returns_predictions, returns_entropy, *options):  # type: ignore[no-untyped-def]
    loss, statistics, totals = softmax_ce_forward(logits, target, weight, dtype, *options[:3])
    if returns_entropy:
        statistics = statistics.new_empty([statistics.shape[0] + 1, statistics.shape[1]])
    acc = statistics.dtype
    wanted = ((returns_lse, acc), (returns_predictions, torch.int64), (returns_entropy, acc))
    outputs = [logits.new_empty(_row_shape(logits) if returned else [0], dtype=dtype) for returned, dtype in wanted]
    return loss, *outputs, statistics, totals


softmax_ce_backward = _ops.softmax_ce_backward.default
eager_softmax_ce_backward = below_autograd(softmax_ce_backward)


@torch.library.register_fake("torchce::softmax_ce_backward")
def _(grad_output, logits, *_):  # type: ignore[no-untyped-def]
    return _empty_gradient(logits)


softmax_ce_backward_outputs = _ops.softmax_ce_backward_outputs.default
eager_softmax_ce_backward_outputs = below_autograd(softmax_ce_backward_outputs)


@torch.library.register_fake("torchce::softmax_ce_backward_outputs")
def _(grad_output, grad_lse, grad_entropy, logits, *_):  # type: ignore[no-untyped-def]
    return _empty_gradient(logits)


softmax_ce_backward_scale = _ops.softmax_ce_backward_scale.default
eager_softmax_ce_backward_scale = below_autograd(softmax_ce_backward_scale)


@torch.library.register_fake("torchce::softmax_ce_backward_scale")
def _(grad_output, grad_lse, grad_entropy, logits, target, weight, scale, statistics, *_):  # type: ignore[no-untyped-def]
    return logits.new_empty(_row_shape(logits), dtype=statistics.dtype)


_softmax_ce_backward_ = _ops.softmax_ce_backward_.default


def softmax_ce_backward_(grad_output: Tensor, logits: Tensor, *saved: Any, **by_name: Any) -> None:
    """``softmax_ce_backward``, written over the logits, which must be dense."""
    _softmax_ce_backward_(grad_output, logits, *saved, **by_name)
    _was_overwritten(logits)


@torch.library.register_fake("torchce::softmax_ce_backward_")
def _(*_):  # type: ignore[no-untyped-def]
    return None


_softmax_ce_backward_outputs_ = _ops.softmax_ce_backward_outputs_.default


def softmax_ce_backward_outputs_(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    *saved: Any,
    **by_name: Any,
) -> None:
    """``softmax_ce_backward_outputs``, written over the logits, which must be dense."""
    _softmax_ce_backward_outputs_(grad_output, grad_lse, grad_entropy, logits, *saved, **by_name)
    _was_overwritten(logits)


@torch.library.register_fake("torchce::softmax_ce_backward_outputs_")
def _(*_):  # type: ignore[no-untyped-def]
    return None


softmax_ce_backward_target = _ops.softmax_ce_backward_target.default
eager_softmax_ce_backward_target = below_autograd(softmax_ce_backward_target)


@torch.library.register_fake("torchce::softmax_ce_backward_target")
def _(grad_output, logits, target, *_):  # type: ignore[no-untyped-def]
    return _empty_gradient(target)


_softmax_ce_forward_backward_ = _ops.softmax_ce_forward_backward_.default


def softmax_ce_forward_backward_(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    *options: Any,
    **by_name: Any,
) -> Tensor:
    """The loss of ``softmax_ce_forward``, while the logits become what ``softmax_ce_backward`` would give.

    For callers who need the logits no more, as a fused linear layer: they are read once and written once. The mean's
    divisor is known only after the last row, so ``reduction`` is 0 or 2; for a mean divide ``grad_output`` and the loss
    by :func:`torchce.softmax_ce.mean_divisor`.

    Args:
        grad_output: the gradient that the loss will get, of its shape
        logits: dense, with one stride through d1...dk; overwritten with their gradient
        target, weight, dtype: as in the forward
        options, by_name: the fields of :class:`torchce.softmax_ce.Options`

    Raises:
        IndexError: on the CPU, as the forward; the logits are then as they were.
        RuntimeError: if the logits require grad, which the loss would not have.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("logits: expected a tensor that does not require grad: no gradient leads through this op")
    loss: Tensor = _softmax_ce_forward_backward_(grad_output, logits, target, weight, dtype, *options, **by_name)
    _was_overwritten(logits)
    return loss


@torch.library.register_fake("torchce::softmax_ce_forward_backward_")
def _(grad_output, logits, target, weight, dtype, *_):  # type: ignore[no-untyped-def]
    return logits.new_empty(grad_output.shape, dtype=dtype or logits.dtype)


# --- sigmoid binary cross entropy ----------------------------------------------------------------------------------

sigmoid_bce_forward = _ops.sigmoid_bce_forward.default
eager_sigmoid_bce_forward = below_autograd(sigmoid_bce_forward)


@torch.library.register_fake("torchce::sigmoid_bce_forward")
def _(logits, target, weight, pos_weight, dtype, reduction, *_):  # type: ignore[no-untyped-def]
    dtype = dtype or logits.dtype
    return torch.empty_like(logits, dtype=dtype) if reduction == 0 else logits.new_empty([], dtype=dtype)


sigmoid_bce_backward = _ops.sigmoid_bce_backward.default
eager_sigmoid_bce_backward = below_autograd(sigmoid_bce_backward)


@torch.library.register_fake("torchce::sigmoid_bce_backward")
def _(grad_output, logits, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)


_sigmoid_bce_backward_ = _ops.sigmoid_bce_backward_.default


def sigmoid_bce_backward_(grad_output: Tensor, logits: Tensor, *saved: Any, **by_name: Any) -> None:
    """``sigmoid_bce_backward``, written over the logits, which must be dense."""
    _sigmoid_bce_backward_(grad_output, logits, *saved, **by_name)
    _was_overwritten(logits)


@torch.library.register_fake("torchce::sigmoid_bce_backward_")
def _(*_):  # type: ignore[no-untyped-def]
    return None


sigmoid_bce_backward_target = _ops.sigmoid_bce_backward_target.default
eager_sigmoid_bce_backward_target = below_autograd(sigmoid_bce_backward_target)


@torch.library.register_fake("torchce::sigmoid_bce_backward_target")
def _(grad_output, logits, target, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(target)


# --- divergences ---------------------------------------------------------------------------------------------------

divergence_forward = _ops.divergence_forward.default
eager_divergence_forward = below_autograd(divergence_forward)


def divergence_accumulation(input: Tensor, target: Tensor | None) -> torch.dtype:
    """The dtype a divergence op computes in."""
    is_wide = torch.float64 in (input.dtype, None if target is None else target.dtype)
    return torch.float64 if is_wide else torch.float32


@torch.library.register_fake("torchce::divergence_forward")
def _(input, target, mask, dtype, kind, reduction, target_logits, *_):  # type: ignore[no-untyped-def]
    row_shape = _row_shape(input)
    rows = 1
    for size in row_shape:
        rows = rows * size
    acc = divergence_accumulation(input, target)
    of_input, of_target = 2, 2 if target_logits else 0 if kind == 1 else 1  # as statistics_of in csrc/problem.h
    of_row = of_input + (0 if target is None else of_target) + (2 if kind == 2 else 1)
    loss = input.new_empty(row_shape if reduction == 0 else [], dtype=dtype or input.dtype)
    return loss, input.new_empty([of_row, rows], dtype=acc), input.new_empty([1], dtype=acc)


divergence_backward = _ops.divergence_backward.default
eager_divergence_backward = below_autograd(divergence_backward)


@torch.library.register_fake("torchce::divergence_backward")
def _(grad_output, input, target, mask, statistics, totals, needs_input, needs_target, *_):  # type: ignore[no-untyped-def]
    like_target = input if target is None else target
    return (
        _empty_gradient(input) if needs_input else input.new_empty(0),
        _empty_gradient(like_target) if needs_target else like_target.new_empty(0),
    )


# --- binary divergences --------------------------------------------------------------------------------------------

binary_divergence_forward = _ops.binary_divergence_forward.default
eager_binary_divergence_forward = below_autograd(binary_divergence_forward)


@torch.library.register_fake("torchce::binary_divergence_forward")
def _(input, target, dtype, reduction, *_):  # type: ignore[no-untyped-def]
    dtype = dtype or input.dtype
    return torch.empty_like(input, dtype=dtype) if reduction == 0 else input.new_empty([], dtype=dtype)


binary_divergence_backward = _ops.binary_divergence_backward.default
eager_binary_divergence_backward = below_autograd(binary_divergence_backward)


@torch.library.register_fake("torchce::binary_divergence_backward")
def _(grad_output, input, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(input)


binary_divergence_backward_target = _ops.binary_divergence_backward_target.default
eager_binary_divergence_backward_target = below_autograd(binary_divergence_backward_target)


@torch.library.register_fake("torchce::binary_divergence_backward_target")
def _(grad_output, input, target, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(target)
