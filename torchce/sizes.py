"""Conditions on sizes and strides, which may be symbols while a program is traced."""

from __future__ import annotations

import torch


def known(condition: bool) -> bool:
    """Whether ``condition`` holds: False where it depends on data that no trace can know, without a guard on them."""
    if not (isinstance(condition, torch.SymBool) or torch.compiler.is_compiling()):
        return bool(condition)  # in torch.jit.trace sizes are tensors
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # loads sympy: not before a symbol is there

    return guard_or_false(condition)
