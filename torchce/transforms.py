"""Which of torch's program transforms are running: the kernels know none of them."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform, or a batched backward, is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_ad() -> bool:
    """Whether inputs may carry forward-mode tangents."""
    return forward_ad._current_level >= 0
