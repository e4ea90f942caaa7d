"""Builds torchce._C (schemas, CPU kernels) and, where a CUDA toolkit fits torch, torchce._cuda.

Environment: TORCHCE_CUDA=0|1 forbids or demands the CUDA extension, TORCH_CUDA_ARCH_LIST names its architectures,
MAX_JOBS bounds the compilers run at once. Both extensions use LibTorch's stable ABI: one build serves torch >= 2.10.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
ALL_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
DEVELOPMENT_ARCH = "9.0"
DEVELOPMENT_COMMANDS = {"develop", "editable_wheel", "--inplace", "-i"}


@dataclass(frozen=True)
class Machine:
    """What the choice of what to build depends on."""

    torch_version: str | None  # None: torch is not installed
    torch_cuda: str | None  # the CUDA version torch was built with
    compiler: str | None  # path of the C++ compiler
    cuda_root: Path | None  # toolkit with headers
    cuda_version: str | None  # of that toolkit's nvcc
    gpu_visible: bool
    development: bool  # an in-place or editable build


@dataclass(frozen=True)
class Plan:
    """What will be built, and the lines that say so."""

    cuda: bool
    archs: str | None
    lines: tuple[str, ...]


class CannotBuild(Exception):
    """Nothing can be built; the message says why and what would help."""


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def make_plan(machine: Machine, environ: Mapping[str, str]) -> Plan:
    """Decides what to build."""
    if machine.torch_version is None:
        raise CannotBuild("torch is not installed, and nothing can be built without it: pip install 'torch>=2.10'")
    if version_tuple(machine.torch_version) < OLDEST_TORCH:
        raise CannotBuild(
            f"torch {machine.torch_version} is too old, and nothing will be built: torch >= 2.10 is needed"
        )
    if machine.compiler is None:
        raise CannotBuild("no C++ compiler found, and nothing will be built: install g++ or set CXX")
    lines = [f"_C with {machine.compiler} for torch {machine.torch_version}"]

    wanted = environ.get("TORCHCE_CUDA", "")
    obstacle = None
    if wanted == "0":
        obstacle = "TORCHCE_CUDA=0"
    elif machine.torch_cuda is None:
        obstacle = f"torch {machine.torch_version} is built without CUDA"
    elif machine.cuda_root is None or machine.cuda_version is None:
        obstacle = "no CUDA toolkit with nvcc and headers found (set CUDA_HOME)"
    elif version_tuple(machine.cuda_version)[0] != version_tuple(machine.torch_cuda)[0]:
        obstacle = f"nvcc is CUDA {machine.cuda_version}, torch is built with CUDA {machine.torch_cuda}"
    if obstacle is not None:
        if wanted == "1":
            raise CannotBuild(f"TORCHCE_CUDA=1, but {obstacle}; nothing will be built")
        return Plan(False, None, (*lines, f"no _cuda, CPU kernels only: {obstacle}"))

    archs = environ.get("TORCH_CUDA_ARCH_LIST")
    if archs:
        why = "TORCH_CUDA_ARCH_LIST"
    elif machine.development and not machine.gpu_visible:
        archs, why = DEVELOPMENT_ARCH, "a development build without a visible GPU"
    elif machine.development:
        archs, why = "native", "a development build for the visible GPU"
    else:
        archs, why = ALL_ARCHS, "all supported architectures"
    lines.append(f"_cuda with CUDA {machine.cuda_version} at {machine.cuda_root} for {archs} ({why})")
    return Plan(True, None if archs == "native" else archs, tuple(lines))


def find_cuda_root(environ: Mapping[str, str]) -> Path | None:
    """The first toolkit root that has headers: nvcc on the PATH may be a wrapper far from them."""
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    candidates = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates.append(str(Path(nvcc).resolve().parent.parent) if nvcc else None)
    for root in (Path(candidate) for candidate in candidates if candidate):
        if (root / "include" / "cuda_runtime.h").is_file() and (root / "bin" / "nvcc").is_file():
            return root
    return None


def nvcc_version(root: Path | None) -> str | None:
    if root is None:
        return None
    output = subprocess.run([root / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    return match.group(1) if match else None


def this_machine(argv: list[str], environ: Mapping[str, str]) -> Machine:
    try:
        import torch
    except ImportError:
        torch = None
    cuda_root = find_cuda_root(environ)
    return Machine(
        torch_version=torch and torch.__version__,
        torch_cuda=torch and torch.version.cuda,
        compiler=next(
            filter(None, (shutil.which(name) for name in (environ.get("CXX") or "c++", "g++", "clang++"))), None
        ),
        cuda_root=cuda_root,
        cuda_version=nvcc_version(cuda_root),
        gpu_visible=bool(torch and torch.cuda.is_available()),
        development=bool(DEVELOPMENT_COMMANDS & set(argv)),
    )


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def make_extensions(machine: Machine, plan: Plan) -> list:
    import pybind11
    from torch.utils import cpp_extension

    torch_target = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
    # No -march: the kernels choose among SIMD levels at run time (csrc/cpu/levels.h).
    host = [
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
    ]
    cxx = [*host, torch_target, f'-DTORCHCE_TORCH_VERSION="{machine.torch_version}"']
    include_dirs = [pybind11.get_include()]
    cpu = cpp_extension.CppExtension(
        "torchce._C",
        sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
        include_dirs=include_dirs,
        extra_compile_args={"cxx": cxx},
    )
    cpu.libraries = ["torch_cpu"]  # nothing that only some builds of torch have
    if not plan.cuda:
        return [cpu]
    cpp_extension.CUDA_HOME = str(machine.cuda_root)  # torch's own guess may be a folder without headers
    if plan.archs is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = plan.archs
    defines = [torch_target, "-DUSE_CUDA", f'-DTORCHCE_CUDA_ARCHS="{plan.archs or "native"}"']
    nvcc = ["-O3", "--threads=2", "-Werror=all-warnings", "-Xptxas=-warn-spills", "-Xcompiler=-fvisibility=hidden"]
    cuda = cpp_extension.CUDAExtension(
        "torchce._cuda",
        sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp"),
        include_dirs=include_dirs,
        extra_compile_args={"cxx": [*host, *defines], "nvcc": [*nvcc, *defines]},
    )
    cuda.libraries = ["torch_cpu", "torch_cuda", "cudart"]
    return [cpu, cuda]


def main() -> None:
    from setuptools import setup

    try:
        machine = this_machine(sys.argv, os.environ)
        plan = make_plan(machine, os.environ)
    except CannotBuild as error:
        sys.exit(f"torchce: {error}")
    for line in plan.lines:
        print(f"torchce: building {line}", file=sys.stderr)
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=make_extensions(machine, plan), cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":
    main()
