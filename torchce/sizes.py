"""Conditions on sizes and strides, which may be symbols while a program is traced."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def are_numbers(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether no size is a symbol, asked once for all of them: a small loss takes no longer than many questions."""
    return not torch.compiler.is_compiling() and type(sum(shape) + sum(other)) is int


def known(condition: bool) -> bool:
    """Whether ``condition`` holds: False where it depends on data that no trace can know, without a guard on them."""
    if not (isinstance(condition, torch.SymBool) or torch.compiler.is_compiling()):
        return bool(condition)  # in torch.jit.trace sizes are tensors
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # loads sympy: not before a symbol is there

    return guard_or_false(condition)
