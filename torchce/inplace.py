"""``inplace_backward=True``: the gradient overwrites the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchce import ops
from torchce.transforms import is_batched

_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def will_overwrite(logits: Tensor, rows: bool) -> bool:
    """Whether the gradient overwrites ``logits`` where it is asked to; raises where it must not."""
    if not _applies(logits):
        return False
    if (reason := _refusal(logits, rows)) is not None:
        raise RuntimeError(f"inplace_backward=True: {reason}")
    return True


def _applies(logits: Tensor) -> bool:
    """Whether the gradient can overwrite ``logits`` where it is asked to.

    Not in a compiled graph, whose compiler plans the memory, nor of tensors without memory of their own, as tracers use
    them: which arguments share it cannot be seen then. Nor where hooks take what is saved for backward, as in a
    checkpoint: of what they give back autograd asks no version, and who shares it would read the gradient unnoticed.
    """
    return not (
        torch.compiler.is_compiling() or isinstance(logits, (FakeTensor, FunctionalTensor)) or has_saved_tensors_hooks()
    )


def has_saved_tensors_hooks() -> bool:
    """Whether hooks take what is saved for backward, as in a checkpoint."""
    return _saved_tensors_hooks(False) is not None


def _refusal(logits: Tensor, rows: bool) -> str | None:
    """Why a gradient cannot overwrite ``logits``, seen as rows of classes or as elements, or None where it can."""
    if logits.requires_grad and (logits.is_leaf or _is_view_of_a_leaf(logits)):
        what = "a leaf" if logits.is_leaf else "a view of a leaf"
        return f"input is {what} that requires grad: its own values would be lost"
    if logits.is_neg():
        return "input is a view of its negative: what is in memory are not its values"
    if not torch.ops.aten.is_non_overlapping_and_dense.default(logits):
        return f"input has overlapping or scattered memory (shape {list(logits.shape)}, strides {logits.stride()})"
    if rows and logits.numel() > 0 and not ops.one_stride(logits):
        return f"input's inner dimensions are permuted (shape {list(logits.shape)}, strides {logits.stride()})"
    return None


def _is_view_of_a_leaf(tensor: Tensor) -> bool:
    """Whether a leaf's memory lies below a view of it, or a view of such a view; the leaf may be a view itself.

    Not every view is known as one, ``unsafe_chunk``'s are not. So whatever could be a view is followed to its leaves,
    and their memory compared. But a Function that returns ``x.detach()`` answers for that memory itself.
    """
    base = tensor._base
    if base is None and isinstance(tensor.grad_fn, BackwardCFunction):
        return False
    if base is not None and base.is_leaf and base.requires_grad:  # no gradient leads to it from a view under no_grad
        return True
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":  # where the gradients of a leaf arrive
            if any(_overlap(part, tensor) for part in _parts(node.variable)):  # type: ignore[attr-defined]
                return True
            continue
        inputs = [function for function, _ in node.next_functions if function is not None]
        if len(inputs) == 1 or isinstance(node, BackwardCFunction):  # torch's own views have one input
            nodes += inputs
    return False


def _parts(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that hold the values of ``tensor``."""
    if is_traceable_wrapper_subclass(tensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]
    if tensor.layout == torch.sparse_coo:
        return [tensor._values()]
    if tensor.is_nested or tensor.layout in _COMPRESSED:
        return [tensor.values()]
    return [tensor] if tensor.layout == torch.strided else []


def apart(logits: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The backward op's arguments, those copied that would change while the logits do.

    A kernel reads an element of the target before it writes the logit at the same place; of what else shares the
    logits' memory it would read gradients.
    """
    return tuple(
        argument.clone() if isinstance(argument, Tensor) and _is_in_the_way(argument, logits) else argument
        for argument in arguments
    )


def _is_in_the_way(tensor: Tensor, logits: Tensor) -> bool:
    if not _overlap(tensor, logits):
        return False
    same_elements = (tensor.dtype, tensor.shape, tensor.stride()) == (logits.dtype, logits.shape, logits.stride())
    return not (same_elements and tensor.data_ptr() == logits.data_ptr())


def _overlap(tensor: Tensor, other: Tensor) -> bool:
    if tensor.is_meta or other.is_meta or 0 in (tensor.numel(), other.numel()):
        return False
    begin, end = _extent(tensor)
    other_begin, other_end = _extent(other)
    return begin < other_end and other_begin < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and of the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class Overwritten:
    """Whether one backward has overwritten the logits it saved, so that the next refuses in plain words."""

    done = False

    def checked(self, grad_output: Tensor) -> Overwritten | None:
        """Itself, or None in a backward that is being compiled; raises where a backward cannot overwrite the logits."""
        if torch.compiler.is_compiling():
            return None
        if is_batched(grad_output):
            raise RuntimeError(
                "inplace_backward=True: a batched backward (is_grads_batched=True) has a gradient for each of its "
                "batch; it needs inplace_backward=False"
            )
        if self.done:
            raise RuntimeError(
                "inplace_backward=True: this loss's backward has run and overwritten the logits with their gradient; "
                "a second backward needs inplace_backward=False"
            )
        return self

    def mark(self, logits: Tensor) -> Tensor:
        """The overwritten logits, as the gradient."""
        self.done = True
        return logits.detach()
