"""Fused softmax and sigmoid binary cross entropy for PyTorch, drop-in for torch's own losses.

Softmax cross entropy is there with the linear layer before it, too.
"""

from __future__ import annotations

from importlib import util as _util

if _util.find_spec("torchce._C") is None:
    from torchce import _not_built

    raise ImportError(_not_built.message())

from torchce import functional
from torchce._build_info import build_info
from torchce.functional import CrossEntropyOutput, TokenLogprobsOutput
from torchce.modules import BCEWithLogitsLoss, CrossEntropyLoss, KLDivWithLogitsLoss, LinearCrossEntropyLoss
from torchce.patch import patch_torch

__version__ = "0.1.0"

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "KLDivWithLogitsLoss",
    "LinearCrossEntropyLoss",
    "TokenLogprobsOutput",
    "build_info",
    "functional",
    "patch_torch",
]
