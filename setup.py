"""Builds torchce._C (schemas, CPU kernels) and, where a CUDA toolkit fits torch, torchce._cuda.

Environment: TORCHCE_CUDA=0|1 forbids or demands the CUDA extension, TORCH_CUDA_ARCH_LIST names its architectures,
TORCHCE_WERROR=1 makes warnings errors, MAX_JOBS bounds the compilers run at once. Both extensions use LibTorch's stable
ABI: one build serves torch >= 2.10.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
PTX_ARCHS = {"9.0"}  # besides the newest: for the capabilities in between, as 11.0, which has no binary
DEVELOPMENT_ARCH = "9.0"
COMMON_FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the stable ABI of torch 2.10
# No -march: the kernels choose among SIMD levels at run time (csrc/cpu/levels.h).
HOST_FLAGS = [*COMMON_FLAGS, "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
HOST_FLAGS += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}
DEVELOPMENT_COMMANDS = {"develop", "editable_wheel", "--inplace", "-i"}


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit with headers."""

    root: Path
    version: str
    archs: tuple[str, ...]  # those its nvcc knows


@dataclass(frozen=True)
class Machine:
    """What the choice of what to build depends on."""

    torch: str | None  # version; None: not installed
    torch_cuda: str | None  # the CUDA version torch was built with
    pybind11: bool
    python_headers: bool
    compiler: str | None  # path of the C++ compiler
    toolkit: Toolkit | None
    gpu_archs: tuple[str, ...]  # of the visible GPUs
    development: bool  # an in-place or editable build


@dataclass(frozen=True)
class Plan:
    """What will be built, and the lines that say so."""

    archs: str | None  # None: no CUDA extension
    lines: tuple[str, ...]


class CannotBuild(Exception):
    """Nothing can be built; the message says why and what would help."""


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def make_plan(machine: Machine, environ: Mapping[str, str]) -> Plan:
    """Decides what to build."""
    if machine.torch is None:
        raise CannotBuild("torch is not installed: pip install 'torch>=2.10'")
    if version_tuple(machine.torch) < OLDEST_TORCH:
        raise CannotBuild(f"torch {machine.torch} is too old: torch >= 2.10 is needed")
    if not machine.pybind11:
        raise CannotBuild("pybind11 is not installed: pip install pybind11")
    if machine.compiler is None:
        wanted_compiler = environ.get("CXX")
        raise CannotBuild(f"CXX={wanted_compiler} is not found" if wanted_compiler else "no C++ compiler: install g++")
    if not machine.python_headers:
        raise CannotBuild("Python.h is not found: install Python's development package (python3-dev)")
    cpu_line = f"building _C (CPU kernels) with {machine.compiler} for torch {machine.torch}"

    obstacle = cuda_obstacle(machine, environ)
    if obstacle is not None:
        if environ.get("TORCHCE_CUDA") == "1":
            raise CannotBuild(f"TORCHCE_CUDA=1, but {obstacle}")
        return Plan(None, (cpu_line, f"no _cuda, CPU kernels only: {obstacle}"))
    assert machine.toolkit is not None  # or there were an obstacle
    archs, why = choose_archs(machine, machine.toolkit, environ)
    toolkit = f"CUDA {machine.toolkit.version} at {machine.toolkit.root}"
    return Plan(archs, (cpu_line, f"building _cuda (CUDA kernels) with {toolkit} for {archs}: {why}"))


def cuda_obstacle(machine: Machine, environ: Mapping[str, str]) -> str | None:
    """Why there can be no CUDA extension."""
    wanted = environ.get("TORCHCE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise CannotBuild(f"TORCHCE_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "TORCHCE_CUDA=0"
    if machine.torch_cuda is None:
        return f"torch {machine.torch} is built without CUDA"
    if machine.toolkit is None:
        return "no CUDA toolkit with nvcc and headers found (CUDA_HOME names one)"
    if version_tuple(machine.toolkit.version)[0] != version_tuple(machine.torch_cuda)[0]:
        return (
            f"the toolkit at {machine.toolkit.root} is CUDA {machine.toolkit.version}, "
            f"torch {machine.torch} is built with CUDA {machine.torch_cuda}"
        )
    return None


def choose_archs(machine: Machine, toolkit: Toolkit, environ: Mapping[str, str]) -> tuple[str, str]:
    """TORCH_CUDA_ARCH_LIST for this build, and why."""
    given = environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given, "TORCH_CUDA_ARCH_LIST"
    if machine.development:
        known = [arch for arch in machine.gpu_archs if arch in toolkit.archs]
        if known:
            return ";".join(known), "a development build for the visible GPU"
        if not machine.gpu_archs:
            return DEVELOPMENT_ARCH, "a development build, no visible GPU"
    known = [arch for arch in ARCHS if arch in toolkit.archs]
    archs = ";".join(f"{arch}+PTX" if arch in PTX_ARCHS | {known[-1]} else arch for arch in known)
    return archs, "every supported architecture that this CUDA knows"


def find_toolkit(environ: Mapping[str, str], conventional: str = "/usr/local/cuda") -> Toolkit | None:
    """The first toolkit that has headers. An nvcc on the PATH may be a wrapper far from them, so it is asked."""
    roots = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), conventional]
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    if on_path is not None:
        steps = output_of(on_path, "--dryrun", "-E", "-x", "cu", os.devnull)
        roots += re.findall(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    for root in (Path(root).resolve() for root in roots if root):
        nvcc = root / "bin" / "nvcc"
        if (root / "include" / "cuda_runtime.h").is_file() and nvcc.is_file():
            release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
            archs = re.findall(r"compute_(\d+)(\d)\b", output_of(nvcc, "--list-gpu-arch"))
            if release is not None:
                return Toolkit(root, release.group(1), tuple(f"{major}.{minor}" for major, minor in archs))
    return None


def output_of(*command: str | Path) -> str:
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    return result.stdout


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """The compiler torch's build will run: CXX, which may hold a launcher and options, or c++ or g++."""
    names = [environ["CXX"].split()[0]] if environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    return next(filter(None, (shutil.which(name, path=environ.get("PATH")) for name in names)), None)


def this_machine(argv: list[str], environ: Mapping[str, str]) -> Machine:
    try:
        import torch
    except ImportError:
        torch = None
    gpus = range(torch.cuda.device_count()) if torch and torch.cuda.is_available() else ()
    capabilities = sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})
    return Machine(
        torch=torch and torch.__version__,
        torch_cuda=torch and torch.version.cuda,
        pybind11=util.find_spec("pybind11") is not None,
        python_headers=Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        compiler=find_compiler(environ),
        toolkit=find_toolkit(environ),
        gpu_archs=tuple(f"{major}.{minor}" for major, minor in capabilities),
        development=bool(DEVELOPMENT_COMMANDS & set(argv)),
    )


def prepare_environment(machine: Machine, environ: MutableMapping[str, str]) -> None:
    """Sets what torch.utils.cpp_extension would otherwise guess, and must be set before its import."""
    if machine.compiler is not None and not environ.get("CXX", "").strip():
        environ["CXX"] = machine.compiler
    if machine.toolkit is not None:  # the guess may be a folder without headers
        environ["CUDA_HOME"] = str(machine.toolkit.root)
    if util.find_spec("ninja") is not None:  # a virtual environment's, activated or not
        import ninja

        environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, environ.get("PATH", "")])
    # Its warnings are about the missing GPU and CUDA's minor version, which do not matter here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def make_extensions(machine: Machine, plan: Plan, environ: Mapping[str, str]) -> list:
    import pybind11
    from torch.utils import cpp_extension

    strict = environ.get("TORCHCE_WERROR") == "1"
    host = [*HOST_FLAGS, *(["-Werror"] if strict else [])]
    include_dirs = [pybind11.get_include()]
    cpu = cpp_extension.CppExtension(
        "torchce._C",
        sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
        include_dirs=include_dirs,
        extra_compile_args={"cxx": [*host, f'-DTORCHCE_TORCH_VERSION="{machine.torch}"']},
    )
    cpu.libraries = ["torch_cpu"]  # nothing that only some builds of torch have
    if plan.archs is None or machine.toolkit is None:
        return [cpu]

    os.environ["TORCH_CUDA_ARCH_LIST"] = plan.archs
    defines = ["-DUSE_CUDA", f'-DTORCHCE_CUDA_ARCHS="{plan.archs}"']
    nvcc = [*COMMON_FLAGS, "--threads=2", "-Xcompiler=-fvisibility=hidden", "-Xptxas=-warn-spills,-warn-lmem-usage"]
    nvcc += ["-Werror=all-warnings"] if strict else []
    cuda = cpp_extension.CUDAExtension(
        "torchce._cuda",
        sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp"),
        include_dirs=include_dirs,
        extra_compile_args={"cxx": [*host, *defines], "nvcc": [*nvcc, *defines]},
    )
    cuda.libraries = ["torch_cpu", "torch_cuda", "cudart"]
    return [cpu, cuda]


@contextmanager
def short_output() -> Iterator[None]:
    """Shows ninja's commands as the file each compiles; what the compilers say passes through."""
    terminal = os.dup(1)
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(write)

    def shorten() -> None:
        with open(read, errors="replace") as lines:
            for line in lines:
                command = re.match(r"\[(\d+/\d+)\] .* -c (\S+) -o ", line)
                if command:
                    line = f"  [{command[1]}] {os.path.relpath(command[2], ROOT)}\n"
                os.write(terminal, line.encode())

    shortener = Thread(target=shorten)
    shortener.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(terminal, 1)  # closes the pipe's last writing end, which ends the thread
        shortener.join()
        os.close(terminal)


def build_command(plan: Plan) -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            for line in plan.lines:
                print(f"torchce: {line}", file=sys.stderr)
            if plan.archs is None:
                self.remove_stale("torchce._cuda")
            super().run()
            built = [os.path.relpath(self.get_ext_fullpath(extension.name), ROOT) for extension in self.extensions]
            print(f"torchce: built {', '.join(built)}", file=sys.stderr)

        def build_extensions(self) -> None:
            if self.distribution.verbose:
                super().build_extensions()
            else:
                with short_output():
                    super().build_extensions()

        def remove_stale(self, name: str) -> None:
            """An earlier build's extension would be taken along: a wheel is made of all that lies in build/lib*."""
            file = self.get_ext_filename(self.get_ext_fullname(name))
            for folder in (self.build_lib, ROOT) if self.inplace else (self.build_lib,):
                Path(folder, file).unlink(missing_ok=True)

    return Build


def main() -> None:
    from setuptools import setup

    if not BUILD_COMMANDS & set(sys.argv):  # metadata or an sdist: nothing is compiled
        setup()
        return
    machine = this_machine(sys.argv, os.environ)
    try:
        plan = make_plan(machine, os.environ)
    except CannotBuild as error:
        sys.exit(f"torchce: {error}; nothing can be built")
    prepare_environment(machine, os.environ)
    setup(ext_modules=make_extensions(machine, plan, os.environ), cmdclass={"build_ext": build_command(plan)})


if __name__ == "__main__":
    main()
