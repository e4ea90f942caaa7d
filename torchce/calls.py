"""Which way the calls that ``torchce.patch_torch`` leads here go: to a kernel, or else to what and why.

``patch_torch`` counts; the places that leave the road to a kernel note a reason, and nothing is asked on that road.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import forward_ad

from torchce.transforms import in_functorch

HANDLED = "answered by a __torch_function__ handler"
# What differs from call to call in the words of a problem: shapes, devices' indices, the value received.
_DETAILS = re.compile(r", got .*| ?\[[^]]*\]|(?<=\w):\d+")

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Calls(NamedTuple):
    """One loss's calls under ``patch_torch``."""

    kernel: int
    """How many a kernel took."""
    other: dict[str, int]
    """How many went another way, to torch's function or to torch's own operations, for each reason."""


class _Thread(threading.local):
    reason: str | None = None


_thread = _Thread()
_lock = threading.Lock()
_counts: Counter[tuple[str, str | None]] = Counter()


def _while_tracing(function: _Function) -> _Function:
    """Lets Dynamo run ``function`` while it traces, as ``in_functorch``, and keeps it out of the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_while_tracing
def begin() -> str | None:
    """A call begins. Returns, for the function that ends it, the reason of the call in whose handler it happens."""
    outer = _thread.reason
    _thread.reason = None
    return outer


@_while_tracing
def note(reason: str | None) -> None:
    """The call that has begun goes another way than to a kernel; with None it goes to a kernel after all."""
    _thread.reason = reason and _DETAILS.sub("", reason)


@_while_tracing
def note_composite() -> None:
    """The call that has begun goes to the formulas in torch's own operations."""
    if in_functorch():
        note("torch.func transform")
    elif torch._C._is_tracing():  # type: ignore[attr-defined]
        note("torch.jit.trace")
    elif forward_ad._current_level >= 0:
        note("forward-mode AD")
    else:
        note("weight requires grad")


@_while_tracing
def count(loss: str, outer: str | None) -> None:
    """The call that has begun ended with an answer."""
    with _lock:
        _counts[loss, _thread.reason] += 1
    _thread.reason = outer


@_while_tracing
def abandon(outer: str | None) -> None:
    """The call that has begun raised: it does not count, and the reason of the one around it is as it was."""
    _thread.reason = outer


def reset() -> None:
    with _lock:
        _counts.clear()


def summary(losses: list[str]) -> dict[str, Calls]:
    with _lock:
        counts = dict(_counts)
    return {
        loss: Calls(
            kernel=counts.get((loss, None), 0),
            other={reason: number for (name, reason), number in counts.items() if name == loss and reason is not None},
        )
        for loss in losses
    }
