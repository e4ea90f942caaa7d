"""What was built and what of it is in use."""

from __future__ import annotations

from typing import Any

import torch

from torchce import _C, ops


def build_info() -> dict[str, Any]:
    """What this installation of torchce was built with, and what of it runs here.

    Returns:
        dict: ``torchce``, ``torch_built`` and ``torch_running`` (versions), ``compiler``, ``cpp_standard``,
        ``cpu_level`` (the SIMD level in use; set ``TORCHCE_CPU_LEVEL`` before the import to force a lower one),
        ``cpu_levels`` (those this machine has), ``cuda_built`` (version, or None), ``cuda_loaded`` (bool) and
        ``cuda_archs``.

    Example::

        >>> torchce.build_info()["cpu_levels"]
        ['x86-64-v4', 'x86-64-v3', 'baseline']
    """
    from torchce import __version__

    cuda = ops.cuda_module.build_info() if ops.cuda_module is not None else {}
    return {
        "torchce": __version__,
        "torch_running": torch.__version__,
        **_C.build_info(),
        "cuda_loaded": ops.has_cuda(),
        "cuda_built": cuda.get("cuda_built"),
        "cuda_archs": cuda.get("archs"),
        "cuda_status": ops.cuda_status,
    }
