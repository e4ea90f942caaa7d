"""Which of torch's program transforms are running: the kernels know none of them."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform, or a batched backward, is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# Dynamo does not model the call above; told so, it runs it while tracing, when the transforms it traces are on the
# stack. This is what torch.compiler.assume_constant_result does, without importing torch._dynamo.
in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def differentiates_backward() -> bool:
    """In a backward: whether it must consist of operations that torch can transform again.

    That is so with ``create_graph=True``, in a batched backward, and where the gradient that comes in may carry a
    forward-mode tangent, which the kernels would drop. While ``torch.compile`` traces a backward, grad mode is on as
    well, but what it traces is the first derivative only.
    """
    return (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or in_functorch() or in_forward_ad()


def in_forward_ad() -> bool:
    """Whether inputs may carry forward-mode tangents."""
    return forward_ad._current_level >= 0
