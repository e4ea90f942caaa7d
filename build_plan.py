"""What a machine has, and what setup.py builds there: decided here, in functions of what was found."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory

OLDEST_TORCH = (2, 10)
ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
PTX_ARCHS = {"9.0"}  # besides the newest: for the capabilities in between, as 11.0, which has no binary
DEVELOPMENT_ARCH = "9.0"
ARCH_NAMES = {"Ampere", "Ampere+Tegra", "Ada", "Hopper", "Blackwell", "Blackwell+Tegra"}  # those of torch's that matter
DEVELOPMENT_COMMANDS = {"develop", "editable_wheel", "--inplace", "-i"}

# What the sources need of a compiler: a header of C++20, and a builtin that g++ 10 lacks.
PROBE = """#include <concepts>
template <std::integral T> constexpr T bits(float x) { return __builtin_bit_cast(T, x); }
static_assert(bits<int>(1.0f) == 0x3f800000);
"""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit with headers."""

    root: Path
    version: str
    archs: tuple[str, ...]  # those its nvcc knows


@dataclass(frozen=True)
class Torch:
    """What a torch/version.py tells."""

    version: str
    cuda: str | None


@dataclass(frozen=True)
class Machine:
    """What the choice of what to build depends on."""

    torch: str | None  # version; None: not installed
    torch_cuda: str | None  # the CUDA version torch was built with
    pybind11: bool
    python_headers: bool
    compiler: tuple[str, ...]  # the command that compiles C++; empty: none
    toolkit: Toolkit | None
    gpu_archs: tuple[str, ...]  # of the visible GPUs
    development: bool  # an in-place or editable build
    compiler_fault: str | None = None  # why that command compiles none of the sources
    hidden_torch: Torch | None = None  # the installed one, where a build in isolation sees another


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
    misfit = isolation_misfit(machine, environ)
    if misfit is not None:
        raise CannotBuild(f"this build in isolation sees torch {machine.torch}, but {misfit}")
    if not machine.pybind11:
        raise CannotBuild("pybind11 is not installed: pip install pybind11")
    if not machine.compiler:
        wanted_compiler = environ.get("CXX")
        raise CannotBuild(f"CXX={wanted_compiler} is not found" if wanted_compiler else "no C++ compiler: install g++")
    compiler = shlex.join(machine.compiler)
    if machine.compiler_fault is not None:
        raise CannotBuild(f"{compiler} does not compile C++20 as g++ 11 and newer do: {machine.compiler_fault}")
    if not machine.python_headers:
        raise CannotBuild("Python.h is not found: install Python's development package (python3-dev)")
    jobs = environ.get("MAX_JOBS", "")
    if jobs and not re.fullmatch("[1-9][0-9]*", jobs):
        raise CannotBuild(f"MAX_JOBS: expected a number from 1 on, got {jobs!r}")
    switch(environ, "TORCHCE_WERROR")
    cpu_line = f"building _C (CPU kernels) with {compiler} for torch {machine.torch}"

    obstacle = cuda_obstacle(machine, environ)
    if obstacle is not None:
        if switch(environ, "TORCHCE_CUDA") == "1":
            raise CannotBuild(f"TORCHCE_CUDA=1, but {obstacle}")
        return Plan(None, (cpu_line, f"no _cuda, CPU kernels only: {obstacle}"))
    assert machine.toolkit is not None  # or there were an obstacle
    archs, why = choose_archs(machine, machine.toolkit, environ)
    toolkit = f"CUDA {machine.toolkit.version} at {machine.toolkit.root}"
    return Plan(archs, (cpu_line, f"building _cuda (CUDA kernels) with {toolkit} for {archs}: {why}"))


def switch(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise CannotBuild(f"{name}: expected 0 or 1, got {value!r}")
    return value


def isolation_misfit(machine: Machine, environ: Mapping[str, str]) -> str | None:
    """Why what a build in isolation makes would be of less use to the installed torch than what a plain build makes."""
    installed = machine.hidden_torch
    if installed is None:
        return None
    if version_tuple(installed.version) < OLDEST_TORCH:
        return f"torch {installed.version} is installed, and torch >= 2.10 is needed: upgrade it first"
    plain = replace(machine, torch=installed.version, torch_cuda=installed.cuda)
    if cuda_obstacle(plain, environ) is not None or cuda_major(machine) == cuda_major(plain):
        return None
    return (
        f"the installed torch {installed.version} is built with CUDA {installed.cuda} and would be left without CUDA "
        "kernels: pip install --no-build-isolation . builds beside it"
    )


def cuda_major(machine: Machine) -> int | None:
    return None if machine.torch_cuda is None else version_tuple(machine.torch_cuda)[0]


def cuda_obstacle(machine: Machine, environ: Mapping[str, str]) -> str | None:
    """Why there can be no CUDA extension."""
    if switch(environ, "TORCHCE_CUDA") == "0":
        return "TORCHCE_CUDA=0"
    if machine.torch_cuda is None:
        return f"torch {machine.torch} is built without CUDA"
    if machine.toolkit is None:
        return "no CUDA toolkit with nvcc and headers found (CUDA_HOME names one)"
    if version_tuple(machine.toolkit.version)[0] != cuda_major(machine):
        return (
            f"the toolkit at {machine.toolkit.root} is CUDA {machine.toolkit.version}, "
            f"torch {machine.torch} is built with CUDA {machine.torch_cuda}"
        )
    if not set(ARCHS) & set(machine.toolkit.archs):
        return f"the toolkit at {machine.toolkit.root} knows none of the architectures {', '.join(ARCHS)}"
    return None


def choose_archs(machine: Machine, toolkit: Toolkit, environ: Mapping[str, str]) -> tuple[str, str]:
    """TORCH_CUDA_ARCH_LIST for this build, and why."""
    given = environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for arch in given:
        if arch not in ARCH_NAMES and re.sub(r"a?(\+PTX)?$", "", arch) not in toolkit.archs:
            known_here = ", ".join(toolkit.archs)
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: CUDA {toolkit.version} knows {known_here}, but not {arch!r}")
    if given:
        return ";".join(given), "TORCH_CUDA_ARCH_LIST"
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
        steps = answer_of(on_path, "--dryrun", "-E", "-x", "cu", os.devnull)[1]
        roots += re.findall(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    for root in (Path(os.path.realpath(root)) for root in roots if root):
        nvcc = root / "bin" / "nvcc"
        # Not Path's own is_file, which raises for a folder that may not be read.
        if all(map(os.path.isfile, (root / "include" / "cuda_runtime.h", nvcc))):
            release = re.search(r"release (\d+\.\d+)", answer_of(nvcc, "--version")[1])
            archs = re.findall(r"compute_(\d+)(\d)\b", answer_of(nvcc, "--list-gpu-arch")[1])
            if release is not None:
                return Toolkit(root, release.group(1), tuple(f"{major}.{minor}" for major, minor in archs))
    return None


def answer_of(*command: str | Path, seconds: float = 60) -> tuple[int, str]:
    """Exit status and output of a program that may be none, or hang."""
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {seconds:g} seconds"
    except OSError as error:
        return 127, str(error)
    return result.returncode, result.stdout


def find_compiler(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The command that torch's build will run: CXX, which may hold a launcher and options, or c++ or g++."""
    try:
        given = shlex.split(environ.get("CXX", ""))
    except ValueError as error:
        raise CannotBuild(f"CXX={environ['CXX']} is no command: {error}") from None
    paths = (shutil.which(name, path=environ.get("PATH")) for name in given[:1] or ["c++", "g++", "clang++"])
    found = next(filter(None, paths), None)
    return (os.path.abspath(found), *given[1:]) if found else ()


def find_compiler_fault(command: Collection[str], seconds: float = 60) -> str | None:
    """Why that command compiles none of the sources; /bin/true, say, succeeds and makes nothing."""
    with TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        made = Path(folder, "probe.o")
        source.write_text(PROBE)
        status, output = answer_of(*command, "-std=c++20", "-c", source, "-o", made, seconds=seconds)
        if status == 0 and made.is_file():
            return None
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line]
    return next(iter(errors + lines), f"it exited with {status}, without an object file or a word")


def find_hidden_torch(folders: Collection[str], search: Collection[str]) -> Torch | None:
    """The first torch in these folders, if its folder is not searched: pip leaves it out to build in isolation."""
    for folder in folders:
        with suppress(OSError):
            text = Path(folder, "torch", "version.py").read_text()
            version = re.search(r"""^__version__\b.*= ['"](.+)['"]""", text, re.MULTILINE)
            cuda = re.search(r"""^cuda\b.*= ['"](.+)['"]""", text, re.MULTILINE)
            if version is not None:
                return None if folder in search else Torch(version[1], cuda and cuda[1])
    return None


def site_packages() -> list[str]:
    """Where this interpreter finds packages if nothing is hidden from it."""
    kinds = ("purelib", "platlib")
    folders = [sysconfig.get_path(kind) for kind in kinds]
    environment = Path(sys.prefix, "pyvenv.cfg")
    if not environment.is_file():
        return [site.getusersitepackages(), *folders]
    if re.search(r"^include-system-site-packages\s*=\s*true", environment.read_text(), re.IGNORECASE | re.MULTILINE):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [site.getusersitepackages(), *(sysconfig.get_path(kind, vars=base) for kind in kinds)]
    return folders


def this_machine(argv: list[str], environ: Mapping[str, str]) -> Machine:
    try:
        import torch
    except ImportError:
        torch = None
    gpus = range(torch.cuda.device_count()) if torch and torch.cuda.is_available() else ()
    compiler = find_compiler(environ)
    capabilities = sorted({torch.cuda.get_device_capability(gpu) for gpu in gpus})
    return Machine(
        torch=torch and torch.__version__,
        torch_cuda=torch and torch.version.cuda,
        pybind11=util.find_spec("pybind11") is not None,
        python_headers=Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        compiler=compiler,
        toolkit=find_toolkit(environ),
        gpu_archs=tuple(f"{major}.{minor}" for major, minor in capabilities),
        development=bool(DEVELOPMENT_COMMANDS & set(argv)),
        compiler_fault=find_compiler_fault(compiler) if compiler else None,
        hidden_torch=find_hidden_torch(site_packages(), sys.path),
    )
