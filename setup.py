"""Builds torchce._C (schemas, CPU kernels) and, where a CUDA toolkit fits torch, torchce._cuda.

Environment: TORCHCE_CUDA=0|1 forbids or demands the CUDA extension, TORCH_CUDA_ARCH_LIST names its architectures, CXX
the compiler (with launcher and options), TORCHCE_WERROR=1 makes warnings errors, MAX_JOBS bounds the compilers run at
once. Both extensions use LibTorch's stable ABI: one build serves torch >= 2.10.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext, suppress
from importlib import util
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:  # as in pip's builds
    sys.path.append(str(ROOT))

from build_plan import CannotBuild, Machine, Plan, make_plan, this_machine, version_tuple  # noqa: E402

OLDEST_SETUPTOOLS = (77,)  # as in pyproject.toml
COMMON_FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the stable ABI of torch 2.10
# No -march: the kernels choose among SIMD levels at run time (csrc/cpu/levels.h).
HOST_FLAGS = [*COMMON_FLAGS, "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
HOST_FLAGS += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
# Where a hot loop lies costs up to a quarter of its time, and any change elsewhere moves it.
HOST_FLAGS += ["-falign-functions=64", "-falign-loops=32"]
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}


def prepare_environment(machine: Machine, environ: MutableMapping[str, str]) -> None:
    """Sets what torch.utils.cpp_extension would otherwise guess, and must be set before its import."""
    if machine.compiler:
        environ["CXX"] = one_word(machine.compiler, environ)
    if machine.toolkit is not None:  # the guess may be a folder without headers
        environ["CUDA_HOME"] = str(machine.toolkit.root)
    if util.find_spec("ninja") is not None:  # a virtual environment's, activated or not
        import ninja

        environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, environ.get("PATH", "")])
    # Its warnings are about the missing GPU and CUDA's minor version, which do not matter here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def one_word(command: Collection[str], environ: MutableMapping[str, str]) -> str:
    """A name for that command, since torch's build takes the whole of CXX for the name of one program.

    It is a script on the PATH, called after what it runs: ninja compiles again where the name is another.
    """
    (first, *more) = command
    if not more and not re.search(r"\s", first):
        return first
    script = f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'
    file = ROOT / "build" / "compiler" / f"cxx-{hashlib.sha256(script.encode()).hexdigest()[:12]}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(script)
    file.chmod(0o755)
    environ["PATH"] = os.pathsep.join([str(file.parent), environ.get("PATH", "")])
    return file.name


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
    from setuptools.errors import FileError
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            for line in plan.lines:
                print(f"torchce: {line}", file=sys.stderr)
            if plan.archs is None:
                self.remove_stale("torchce._cuda")
            try:
                super().run()
            except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:  # of compilers and flags
                hint = "" if plan.archs is None else "; TORCHCE_CUDA=0 builds the CPU kernels alone"
                sys.exit(f"torchce: the build failed: {error}{hint}")
            built = [os.path.relpath(self.get_ext_fullpath(extension.name), ROOT) for extension in self.extensions]
            print(f"torchce: built {', '.join(built)}", file=sys.stderr)
            if self.serves_checkout() and not self.inplace:
                with suppress(OSError, FileError):  # the folder may be another user's
                    self.copy_extensions_to_source()
                    print("torchce: left in torchce/ too, which Python started here imports", file=sys.stderr)

        def build_extensions(self) -> None:
            with nullcontext() if self.distribution.verbose else short_output():
                super().build_extensions()

        def serves_checkout(self) -> bool:
            """Whether the libraries are left in torchce/ too, which hides the installed package in this folder.

            Not from an unpacked sdist, which has PKG-INFO, and not where a folder was named for what is built.
            """
            named = [name for command in ("build", "build_ext") for name in self.distribution.get_option_dict(command)]
            return self.inplace or not ((ROOT / "PKG-INFO").is_file() or {"build_base", "build_lib"} & set(named))

        def remove_stale(self, name: str) -> None:
            """An earlier build's extension would be taken along: a wheel is made of all that lies in build/lib*."""
            file = self.get_ext_filename(self.get_ext_fullname(name))
            Path(self.build_lib, file).unlink(missing_ok=True)
            if self.serves_checkout():
                with nullcontext() if self.inplace else suppress(OSError):
                    (ROOT / file).unlink(missing_ok=True)

    return Build


def main() -> None:
    from setuptools import __version__, setup

    if version_tuple(__version__) < OLDEST_SETUPTOOLS:  # it would call pyproject.toml's license an error
        sys.exit(f"torchce: setuptools {__version__} is too old: pip install 'setuptools>=77'; nothing can be built")
    if not BUILD_COMMANDS & set(sys.argv):  # metadata or an sdist: nothing is compiled
        setup()
        return
    try:
        machine = this_machine(sys.argv, os.environ)
        plan = make_plan(machine, os.environ)
    except CannotBuild as error:
        sys.exit(f"torchce: {error}; nothing can be built")
    prepare_environment(machine, os.environ)
    setup(ext_modules=make_extensions(machine, plan, os.environ), cmdclass={"build_ext": build_command(plan)})


if __name__ == "__main__":
    main()
