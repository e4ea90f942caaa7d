"""Which of torch's program transforms are running: the kernels know none of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing  # type: ignore[attr-defined]


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform is running."""
    return _functorch_level() is not None


# Dynamo models no call of in_functorch; marked as constant, it runs during the trace, when the transforms are on the
# stack. This is what torch.compiler.assume_constant_result does, without importing torch._dynamo.
in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def may_be_transformed() -> bool:
    """Whether :func:`transformed` could be true of some tensor; not for what Dynamo traces."""
    return _functorch_level() is not None or _is_tracing() or forward_ad._current_level >= 0


def transformed(*tensors: Tensor | None) -> bool:
    """Whether what is computed from ``tensors`` must consist of torch's own operations: inside a ``torch.func``
    transform, in ``torch.jit.trace``, and where one of them carries a forward-mode tangent."""
    if torch.compiler.is_compiling():  # Dynamo traces none of the questions below
        return in_functorch() or forward_ad._current_level >= 0
    if not may_be_transformed():
        return False
    if _functorch_level() is not None or _is_tracing():
        return True
    return any(  # a level that is open may be another thread's
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def differentiates_backward(*tensors: Tensor | None) -> bool:
    """In a backward: whether it must consist of operations that torch can transform again.

    That is so with ``create_graph=True``, inside a ``torch.func`` transform, and where the gradient that comes in, or
    what was saved, carries a forward-mode tangent, which the kernels would drop. While ``torch.compile`` traces a
    backward, grad mode is on as well, but what it traces is the first derivative only. A batched backward
    (``is_grads_batched=True``) is none of these: torch runs the kernels once for each gradient of the batch.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return True
    return transformed(*tensors)


def all_true(mask: Tensor) -> bool:
    """Whether all of ``mask`` is known to be true, whatever ``torch.func`` has wrapped around it."""
    return _known_value(mask, Tensor.all) is True


def all_finite(tensor: Tensor) -> bool:
    """Whether ``tensor`` is known to hold neither infinity nor NaN; a sum that overflows hides it."""
    total = _known_value(tensor, Tensor.sum)
    return total is not None and math.isfinite(total)


def known_least(tensor: Tensor) -> float | None:
    """The least number in ``tensor``, a NaN if there is one, where it is known."""
    return _known_value(tensor, Tensor.min)


def _known_value(tensor: Tensor, reduction: Callable[[Tensor], Tensor]) -> float | None:
    """The number that ``tensor`` reduces to, where a program may depend on it: nothing traces, and no device has to be
    waited for."""
    if (
        torch.compiler.is_compiling()
        or _is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()  # torch.export's tracer
    ):
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._is_functional_tensor(tensor):  # what was written to its views may not have reached it
            return None
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if not (type(tensor) in (Tensor, Parameter) and tensor.is_cpu) or is_batched(tensor):
        return None
    with temporarily_clear_interpreter_stack(), torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        return reduction(tensor).item()


def is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor``, met in a backward, belongs to one that was asked for with ``is_grads_batched=True``."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)
