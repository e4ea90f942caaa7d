"""Loads the CUDA kernels where this torch can use them."""

from __future__ import annotations

import re
from importlib import import_module, util
from mmap import ACCESS_READ, mmap
from types import ModuleType

import torch

NAME = "torchce._cuda"


def load() -> tuple[ModuleType | None, str]:
    """The kernels' module, and a line that says that it is loaded or why not."""
    spec = util.find_spec(NAME)
    if spec is None or spec.origin is None:
        return None, "not built"
    if torch.version.cuda is None:
        return None, f"built, but torch {torch.__version__} has no CUDA"
    built_for = cuda_major(spec.origin)
    if built_for not in (None, torch.version.cuda.partition(".")[0]):
        return None, f"built, but for CUDA {built_for}: torch {torch.__version__} has CUDA {torch.version.cuda}"
    try:
        return import_module(NAME), "loaded"
    except ImportError as error:  # torch is too old, say: the CPU kernels still serve
        return None, f"built, but not loadable: {error}"


def cuda_major(library: str) -> str | None:
    """The major version of the CUDA runtime that ``library`` names among the libraries it needs, if any.

    It is read from the file, because loading tells too late: where the linker finds that runtime, in a toolkit's folder
    say, it loads it beside torch's own of another version, without an error.
    """
    try:
        with open(library, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            needed = re.search(rb"\0libcudart\.so\.(\d+)\0", content)
            return needed[1].decode() if needed else None
    except (OSError, ValueError):  # not readable, or empty: Python says so when it loads it
        return None
