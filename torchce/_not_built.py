"""What to do where the compiled kernels are not beside torchce's source, in words."""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

IN_PLACE = "python setup.py build_ext --inplace"


def message() -> str:
    """Why ``import torchce`` found no kernels, and what helps."""
    here = Path(__file__).resolve().parent
    installed = _installed()
    if installed is not None:
        return (
            f"{here} is torchce's source without compiled kernels, and hides the installed torchce at {installed}: "
            f"run Python from another folder, or build in place in {here.parent}: {IN_PLACE}"
        )
    others = ", ".join(sorted(path.name for path in here.glob("_C.*") if path.suffix != ".pyi"))
    found = f"; {others} is for another Python" if others else ""
    return (
        f"torchce's compiled kernels are not in {here}{found}: "
        f"run `pip install --no-build-isolation .` or `{IN_PLACE}` in torchce's folder"
    )


def _installed() -> Path | None:
    """The folder of a torchce on the path that has its kernels, which this one has not."""
    for entry in sys.path:
        folder = Path(entry, "torchce").resolve()
        if any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
            return folder
    return None
