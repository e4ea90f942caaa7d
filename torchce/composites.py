"""What the formulas in torch's own operations share, and how torch comes to know them and the ops they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._pytree import tree_map

from torchce.ops import below_autograd
from torchce.transforms import all_finite, transformed


def times(coefficient: Tensor, term: Tensor, weight: Tensor | None = None) -> Tensor:
    """``weight * coefficient * term`` with 0 * inf = 0, in every derivative too.

    A factor of 0 is differentiated nevertheless: infinite, as the product of two numbers that overflows. Where no
    infinity can be met, as can mostly be seen, the passes that look for it are spared.
    """
    if not all_finite(term):
        largest = torch.finfo(term.dtype).max
        killed = (coefficient == 0) & term.isinf()
        if weight is not None:
            killed = killed & weight.isfinite()
        coefficient = torch.where(killed, largest * coefficient, coefficient)
        term = torch.where(killed, term.clamp(-largest, largest), term)
    product = coefficient * term
    return product if weight is None else times(weight, product)


def product_in_range(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x * a * b`` in the order of ``product_in_range`` in ``csrc/math/rounding.h``, which stays in range."""
    in_order = (x.abs() <= 1) == (a.abs() >= b.abs())
    return x * torch.where(in_order, a, b) * torch.where(in_order, b, a)


def reduced(losses: Tensor, reduction: int) -> Tensor:
    """``losses`` themselves, their mean or their sum, by torch's number."""
    return losses.mean() if reduction == 1 else losses.sum() if reduction == 2 else losses


def sum_of_rows(rows: Tensor) -> Tensor:
    """The sum in float64, in an order that the number of threads has no part in.

    torch adds fewer numbers than a grain of work one after the other, and the rows of a matrix each for itself. In a
    traced program it is one sum, whatever the size.
    """
    rows = rows.reshape(-1)  # of what is batched by is_grads_batched=True torch flattens nothing
    fewer_than_a_grain = 1 << 14
    is_known = not torch.compiler.is_compiling() and type(rows.numel()) is int
    if rows.is_cpu and is_known and rows.numel() > fewer_than_a_grain:
        rows = torch.nn.functional.pad(rows, (0, -rows.numel() % fewer_than_a_grain)).view(-1, fewer_than_a_grain)
        rows = rows.sum(1, dtype=torch.float64)
    return rows.sum(dtype=torch.float64)


def implement(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes ``function`` the op ``name`` on every device, and ``fake`` the op of tensors that hold nothing."""
    for device in ("CPU", "CUDA"):
        _library.impl(name, function, device)
    torch.library.register_fake(f"torchce::{name}", fake, lib=_library)


def differentiate(
    name: str,
    composite: Callable[..., Any],
    set_up: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    prepared: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]] = lambda _, arguments: arguments,
) -> None:
    """Tells autograd how the op ``name`` is differentiated where no Function of ours surrounds it: in traced graphs.

    ``set_up`` and ``backward`` are what :func:`torch.library.register_autograd` takes. That has no forward mode,
    whose tangents it would drop, and is refused inside :mod:`torch.func`: there ``composite`` computes the op. Where it
    is to be differentiated, the op is called with the arguments that ``prepared`` makes of those that came.
    """
    op = below_autograd(getattr(torch.ops.torchce, name).default)

    class Differentiated(Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = op(*prepared(ctx, arguments))
            set_up(ctx, arguments, output)
            return output

    Differentiated.backward = staticmethod(backward)  # type: ignore[assignment, method-assign]

    def kernel(*arguments: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if transformed(*tensors):
            return composite(*arguments)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return Differentiated.apply(*arguments)  # type: ignore[no-untyped-call]
        return op(*arguments)

    def compute_fake(mode: Any, overload: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = functools.partial(mode.__torch_dispatch__, overload, types, args, kwargs)
        if not mode.propagate_real_tensors:
            return plain()
        # Beside real tensors, as in torch.export.draft_export, torch checks of ops that are not its own which
        # arguments they have written, and takes one that is None for written.
        mode.propagate_real_tensors = False
        try:
            outputs = plain()
        finally:
            mode.propagate_real_tensors = True
        with mode:
            return tree_map(_in_layout_of, outputs, composite(*args, **kwargs or {}))

    _library.impl(name, kernel, "Autograd")
    torch.library.register_torch_dispatch(f"torchce::{name}", FakeTensorMode, compute_fake, lib=_library)


_library = torch.library.Library("torchce", "IMPL")


def _in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(tensor)


def differentiate_by(name: str, formula: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Gives the op ``name`` the derivatives of ``formula``, which computes it from the same arguments."""

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.arguments = [Tensor if isinstance(argument, Tensor) else argument for argument in inputs]
        ctx.save_for_backward(*(argument for argument in inputs if isinstance(argument, Tensor)))

    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        arguments = [next(tensors) if argument is Tensor else argument for argument in ctx.arguments]
        return gradients_of(formula, arguments, ctx.needs_input_grad, grad_outputs)

    differentiate(name, formula, set_up, backward)


def gradients_of(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Sequence[Any],
    needs_grad: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of those ``arguments`` that need one, from operations that torch can transform and differentiate.

    ``grad_outputs`` are those of what ``formula`` makes of the arguments; None of an output that has none. An output
    that was not asked for has no elements, and leads nowhere.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each argument becomes a view of its own, at which its gradient stops: one may be computed from another, or be
        # the same tensor.
        arguments = [a.view_as(a) if needed else a for a, needed in zip(arguments, needs_grad, strict=True)]
        wanted = [argument for argument, needed in zip(arguments, needs_grad, strict=True) if needed]
        result = formula(*arguments)
        results = (result,) if isinstance(result, Tensor) else result
        used = [(r, g) for r, g in zip(results, grad_outputs, strict=True) if g is not None and r.requires_grad]
        if not used:
            return (None,) * len(needs_grad)
        outputs, grads = zip(*used, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if needed else None for needed in needs_grad)


def refuse_derivative(name: str, loss: str) -> None:
    """Has the op ``name``, a backward, raise where it is to be differentiated: it has no formula of its own."""
    op = below_autograd(getattr(torch.ops.torchce, name).default)

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            raise RuntimeError(
                f"{name}: expected tensors that do not require grad: in a graph that holds the backward of {loss} that "
                "has no derivative; differentiate the loss itself twice, outside a graph"
            )
        return op(*arguments)

    _library.impl(name, kernel, "Autograd")


def decompose_for_onnx(name: str, decomposition: Callable[..., Any]) -> None:
    """Has the op ``name`` traced as ``decomposition`` while ONNX is exported, which knows torch's own operations only.

    torch's table of decompositions would tell the exporter as well; but with the variable ``CI`` in the environment,
    Inductor refuses to call an op that has an entry there.
    """

    def trace(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.onnx.is_in_onnx_export():
            with mode:
                return decomposition(*args, **kwargs or {})
        return mode.__torch_dispatch__(op, types, args, kwargs)

    torch.library.register_torch_dispatch(f"torchce::{name}", ProxyTorchDispatchMode, trace, lib=_library)
