"""``inplace_backward=True``: the gradient overwrites the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from torchce import ops


def applies(inplace_backward: bool) -> bool:
    """Whether the gradient is to overwrite the logits. In a compiled graph it is the compiler that plans the memory."""
    return inplace_backward and not torch.compiler.is_compiling()


def refusal(logits: Tensor, rows: bool) -> str | None:
    """Why a gradient cannot overwrite ``logits``, seen as rows of classes or as elements, or None where it can."""
    if logits.requires_grad and logits.is_leaf:
        return "input is a leaf that requires grad: its own values would be lost"
    if not torch.ops.aten.is_non_overlapping_and_dense.default(logits):
        return f"input has overlapping or scattered memory (shape {list(logits.shape)}, strides {logits.stride()})"
    if rows and logits.numel() > 0 and not ops.one_stride(logits):
        return f"input's inner dimensions are permuted (shape {list(logits.shape)}, strides {logits.stride()})"
    return None


class Overwritten:
    """Whether one backward has overwritten the logits it saved, so that the next refuses in plain words."""

    done = False

    def check(self) -> None:
        if self.done:
            raise RuntimeError(
                "inplace_backward=True: this loss's backward has run and overwritten the logits with their gradient; "
                "a second backward needs inplace_backward=False"
            )

    def mark(self, logits: Tensor) -> Tensor:
        """The overwritten logits, as the gradient."""
        self.done = True
        return logits.detach()
