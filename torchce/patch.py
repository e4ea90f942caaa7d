"""Swapping torch's own losses for torchce's, everywhere at once."""

from __future__ import annotations

from types import ModuleType, TracebackType
from typing import Any

from torch import nn

from torchce import functional, modules

_REPLACEMENTS: list[tuple[ModuleType, str, Any]] = [
    (nn, "CrossEntropyLoss", modules.CrossEntropyLoss),
    (nn, "BCEWithLogitsLoss", modules.BCEWithLogitsLoss),
    (nn.modules.loss, "CrossEntropyLoss", modules.CrossEntropyLoss),
    (nn.modules.loss, "BCEWithLogitsLoss", modules.BCEWithLogitsLoss),
    (nn.functional, "cross_entropy", functional.cross_entropy),
    (nn.functional, "binary_cross_entropy_with_logits", functional.binary_cross_entropy_with_logits),
]


class patch_torch:
    """Makes ``torch.nn`` and ``torch.nn.functional`` use torchce's losses.

    Code that looks the losses up there afterwards, torch's own modules included, gets torchce's; names imported before
    (``from torch.nn import CrossEntropyLoss``) stay as they are. Call it once for good, or use it as a context manager
    that puts back what it found.

    Example::

        >>> with torchce.patch_torch():
        ...     type(torch.nn.CrossEntropyLoss()) is torchce.CrossEntropyLoss
        True
    """

    def __init__(self) -> None:
        self._found = [(module, name, getattr(module, name)) for module, name, _ in _REPLACEMENTS]
        for module, name, replacement in _REPLACEMENTS:
            setattr(module, name, replacement)

    def __enter__(self) -> patch_torch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module, name, found in self._found:
            setattr(module, name, found)
