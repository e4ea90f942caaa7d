"""How handlers, ``__torch_function__`` of tensor subclasses and of modes, get their say in a loss.

They see torch's own function with torch's arguments, which they can compare with what they know. A handler that leaves
the answer to that function is to get torchce's, not torch's: a mode of ours, beneath the handler that is asked, answers
it. docs/decisions.md says why it lies there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl, _len_torch_function_stack
from torch.fx import Proxy
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_overridable_functions,
    _pop_mode,
    _push_mode,
    handle_torch_function,
    has_torch_function,
)
from torch.utils._device import DeviceContext

from torchce import calls

Loss = Callable[..., Any]
_Function = TypeVar("_Function", bound=Loss)

STANDS_FOR: dict[Loss, Loss] = {}
"""torchce's function for each of torch's."""
_LEADS_TO: dict[Loss, Loss] = {}
"""torchce's function for each that handlers may call: torch's, torchce's and the wrappers of ``patch_torch``."""


def leads_to(ours: Loss, function: Loss) -> None:
    """A handler that calls ``function`` means ``ours``."""
    _LEADS_TO[function] = ours


def stands_for(torchs: Loss) -> Callable[[_Function], _Function]:
    """Decorates the function that answers in place of ``torchs``."""

    def register(ours: _Function) -> _Function:
        STANDS_FOR[torchs] = ours
        leads_to(ours, torchs)
        leads_to(ours, ours)
        return ours

    return register


class _Beneath(TorchFunctionMode):
    """Answers torch's function by torchce's, once nobody above is left to ask."""

    def __torch_function__(
        self, func: Loss, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = _LEADS_TO.get(func)
        if ours is None:
            return func(*args, **kwargs)
        if not has_torch_function((*args, *kwargs.values())):
            calls.note(None)
            return ours(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
        if func in STANDS_FOR and not _len_torch_function_stack():
            return NotImplemented  # torch asks the subclasses next, with this mode on the stack again
        return ours(*args, **kwargs)  # asks the modes or subclasses that are left


def plain(argument: Any) -> Any:
    """A tensor whose class has no say any more as one that the kernels take; what dispatches itself stays as it is."""
    if (
        isinstance(argument, Tensor)
        and type(argument) is not Tensor
        and type(argument).__torch_function__ is not _disabled_torch_function_impl  # kernels know Parameter and Buffer
        and type(argument).__torch_dispatch__ is Tensor.__torch_dispatch__
        and argument.layout == torch.strided
    ):
        return argument.as_subclass(Tensor)
    return argument


_BENEATH = _Beneath()


def ask_handlers(
    ours: Loss, torchs: Loss, relevant: tuple[Any, ...], own: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """The answer of the handlers that ``relevant`` arguments or modes have, as ``handle_torch_function`` asks them.

    ``own`` are torchce's own keyword arguments. Where one is used the handlers see torchce's function, which takes it;
    so they do while a graph is traced, and symbolic tracing records it, to be called when nothing here is on the stack.
    """
    defaults = ours.__kwdefaults__ or {}
    used = {name: value for name, value in own.items() if name not in defaults or value is not defaults[name]}
    if used:
        index = _get_overridable_functions()[1]  # where torch.overrides.resolve_name looks
        index.setdefault(ours, f"torchce.functional.{ours.__name__}")
    if (
        used
        or torchs not in STANDS_FOR
        or torch.compiler.is_compiling()
        or any(isinstance(argument, Proxy) for argument in relevant)
    ):
        return handle_torch_function(ours, relevant, *args, **kwargs, **used)
    top = _get_current_function_mode()
    # Our mode lies below a handler that has called torchce's function itself; torch's for the default device looks
    # for functions that make tensors, and passes on all others.
    if top is _BENEATH or type(top) is DeviceContext:
        return handle_torch_function(ours, relevant, *args, **kwargs)
    calls.note(calls.HANDLED)
    if top is None:
        _push_mode(_BENEATH)
    else:
        _pop_mode()
        _push_mode(_BENEATH)
        _push_mode(top)
    try:
        return handle_torch_function(torchs, relevant, *args, **kwargs)
    finally:
        _take_out()


def _take_out() -> None:
    """Takes the mode out of the stack, wherever it lies: ``torch.set_default_device`` in a handler moves its own."""
    above = []
    while _len_torch_function_stack() and (mode := _pop_mode()) is not _BENEATH:
        above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)
