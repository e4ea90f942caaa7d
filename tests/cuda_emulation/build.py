"""Builds torchce_emulated, the kernels of ``csrc/cuda`` on the emulated machine, with what changed since the last time.

``python tests/cuda_emulation/build.py [--sanitized] [--csrc FOLDER]`` prints the library's path.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"

KERNEL_FLAGS = [
    "-x c++ -include cuda_runtime.h",  # .cu files, with the names that nvcc knows by itself
    "-O0",  # compiles faster than it would run; and g++ 12 at -O2 makes one of a pack's aligned and unaligned branch
    "-fvisibility=default",  # reports name kernels by their symbols
    "-fno-gnu-unique",  # else a library that was loaded first would share its variables with this one
    "-fno-strict-aliasing",  # kernels read 16 bytes at a time, as CUDA allows
    "-ftrivial-auto-var-init=pattern",  # a register that was not written shows
    "-w",  # the compilers that the kernels are for have warned
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def build(*, sanitized: bool = False, csrc: Path = CSRC) -> Path:
    """The path of the library, which is not loaded: only a process with the sanitizers' runtime could."""
    import setup  # the project's own: its compiler, its flags

    setup.prepare_environment(setup.this_machine([], os.environ), os.environ)
    variant = ["sanitized" if sanitized else "plain"]
    if csrc != CSRC:
        variant.append(hashlib.sha256(str(csrc).encode()).hexdigest()[:8])
    machine = _library(
        "machine", [HERE / "machine.cpp", HERE / "fiber.cpp"], [*setup.HOST_FLAGS, "-O2", "-fvisibility=default"]
    )
    kernels = [path for path in csrc.glob("cuda/*.cu") if path.stem != "device"]
    flags = [*setup.HOST_FLAGS, *KERNEL_FLAGS, *([*SANITIZERS, "-g1"] if sanitized else [])]
    return _library(
        "-".join(variant),
        sorted([*kernels, HERE / "device.cpp", HERE / "library.cpp"]),
        flags,
        ["-Wl,--wrap=aoti_torch_empty_strided", *(SANITIZERS if sanitized else [])],
        csrc,
        machine,
    )


def _library(
    name: str,
    sources: list[Path],
    flags: list[str],
    link_flags: Sequence[str] = (),
    csrc: Path = CSRC,
    needs: Path | None = None,
) -> Path:
    """A shared library, linked to the one that it needs."""
    from torch.utils import cpp_extension

    folder = ROOT / "build" / "cuda_emulation" / name
    folder.mkdir(parents=True, exist_ok=True)
    module = f"cuda_emulation_{name}".replace("-", "_")
    library = folder / module
    if needs is not None and library.exists() and library.stat().st_mtime < needs.stat().st_mtime:
        library.unlink()  # ninja does not know of it
    cpp_extension.load(
        module,
        [str(path) for path in sources],
        extra_include_paths=[str(HERE), str(csrc)],
        extra_cflags=flags,
        extra_ldflags=["-shared", *link_flags, *([str(needs)] if needs is not None else [])],
        build_directory=str(folder),
        with_cuda=False,
        is_python_module=False,
        is_standalone=True,  # builds without loading; -shared makes a library of it all the same
    )
    return library


def sanitized_environment() -> dict[str, str]:
    """What a process needs in its environment to load a sanitized library.

    The sanitizers' runtime comes first, then the C++ library whose ``throw`` it wraps. Memory that Python never frees
    is no leak of ours, and a report ends the process: pytest's own handler would only print a traceback of Python.
    """
    compiler = os.environ.get("CXX", "g++")
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=1:allow_user_segv_handler=0:detect_container_overflow=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def is_sanitized_process() -> bool:
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sanitized", action="store_true")
    parser.add_argument("--csrc", type=Path, default=CSRC)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    print(build(sanitized=arguments.sanitized, csrc=arguments.csrc.resolve()))


if __name__ == "__main__":
    main()
