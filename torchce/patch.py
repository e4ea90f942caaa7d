"""Leading torch's own losses to torchce's, everywhere at once."""

from __future__ import annotations

import functools
import threading
from types import TracebackType
from typing import Any

from torch import overrides as torch_overrides
from torch.nn import functional as F

from torchce import calls, overrides
from torchce.functional._common import refuse_scripting

_lock = threading.RLock()
_holds = 0
_patched = False  # whether any hold is left: compiled graphs guard on this one, which a further hold leaves as it is


class _Name:
    """A name in ``torch.nn.functional`` and the wrapper that takes its place there."""

    def __init__(self, torchs: overrides.Loss, ours: overrides.Loss) -> None:
        self.name = ours.__name__
        self.torchs = torchs
        self.ours = ours
        self.wrapper: overrides.Loss | None = None
        self.found: overrides.Loss = torchs

    def enter(self) -> None:
        current = getattr(F, self.name)
        if current is self.wrapper:
            return  # left there, or put back, by another library
        if self.wrapper is None or current is not self.found:
            # The last wrapper keeps what it found: `current` may lead to it.
            self.found = current
            self.wrapper = _wrapper(self.name, self.torchs, self.ours, current)
        setattr(F, self.name, self.wrapper)

    def enter_again(self) -> None:
        """Puts the wrapper back where somebody restored what was found; another library's function over it stays."""
        if getattr(F, self.name) is self.found:
            setattr(F, self.name, self.wrapper)

    def leave(self) -> None:
        if getattr(F, self.name) is self.wrapper:
            setattr(F, self.name, self.found)


def _wrapper(name: str, torchs: overrides.Loss, ours: overrides.Loss, found: overrides.Loss) -> overrides.Loss:
    """A function that leads to ``ours`` while torch is patched and to ``found`` whenever it is reached afterwards."""

    @refuse_scripting
    @functools.wraps(torchs)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not _patched:
            return found(*args, **kwargs)
        outer = calls.begin()
        try:
            loss = ours(*args, **kwargs)
        except BaseException:
            calls.abandon(outer)
            raise
        calls.count(name, outer)
        return loss

    # Built before the first name changes, the index of names knows torch's function, and here the wrapper too.
    index = torch_overrides._get_overridable_functions()[1]
    index.setdefault(wrapper, f"torch.nn.functional.{name}")
    overrides.leads_to(ours, wrapper)
    return wrapper


_NAMES = [_Name(torchs, ours) for torchs, ours in overrides.STANDS_FOR.items()]


def _hold() -> None:
    global _holds, _patched
    with _lock:
        for name in _NAMES:
            name.enter_again() if _holds else name.enter()
        if not _holds:
            calls.reset()
        _holds += 1
        _patched = True


def _release() -> None:
    global _holds, _patched
    with _lock:
        _holds -= 1
        if _holds == 0:
            _patched = False
            for name in _NAMES:
                name.leave()


class patch_torch:
    """Makes ``torch.nn.functional.cross_entropy`` and ``binary_cross_entropy_with_logits`` lead to torchce's.

    So does ``linear_cross_entropy``, which torch has from 2.13 on. Torch's modules look these functions up when they
    are called: ``nn.CrossEntropyLoss``, ``nn.BCEWithLogitsLoss`` and ``nn.LinearCrossEntropyLoss`` stay torch's own
    classes, and their objects, made before or after, use torchce. So do subclasses, and models that are loaded from a
    file.

    Call it once for good, or use it as a context manager. Patching is counted: torch's functions come back when every
    ``with`` block has been left, in whatever order, unless a plain call keeps torch patched. A function that another
    library has put over torchce's meanwhile is left alone.

    Not reached is what does not look the functions up: a function that was bound before, as by ``from
    torch.nn.functional import cross_entropy``, and whatever computes the loss without them, be it ``log_softmax`` and
    ``nll_loss`` by hand, TorchScript or C++. :meth:`calls` tells what is reached.

    Example::

        >>> loss, logits = torch.nn.CrossEntropyLoss(), torch.zeros(2, 4, requires_grad=True)
        >>> with torchce.patch_torch():
        ...     loss(logits, torch.tensor([0, 3]))
        tensor(1.3863, grad_fn=<SoftmaxCEBackward>)
        >>> torchce.patch_torch.calls()["cross_entropy"]
        Calls(kernel=1, other={})
    """

    def __init__(self) -> None:
        _hold()
        self._holds = 1
        self._entered = False

    def __enter__(self) -> patch_torch:
        with _lock:
            if self._entered or not self._holds:
                _hold()
                self._holds += 1
            self._entered = True  # the first `with` takes over the hold of the call
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            if self._holds:  # one exit too many lets go of nobody else's
                self._holds -= 1
                _release()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a patch_torch cannot be copied or pickled: a copy would let go of a hold that it does not have"
        )

    @staticmethod
    def calls() -> dict[str, calls.Calls]:
        """What became of the calls since torch was last patched, for each loss.

        Only calls through ``torch.nn.functional`` count, once they have an answer. A call in a compiled graph counts
        when it is traced, perhaps more than once, and not when the graph runs.

        Returns:
            dict[str, Calls]: for each function's name how many calls a kernel took (``kernel``), and how many went to
            torch's own function or operations, for each reason (``other``).
        """
        return calls.summary([name.name for name in _NAMES])
