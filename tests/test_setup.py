"""What setup.py does with what was decided: the compiler's name, where libraries are left, and one line for a fault."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
C, CUDA = Path(f"torchce/_C{SUFFIX}"), Path(f"torchce/_cuda{SUFFIX}")
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="these tests stand beside an installed wheel, not its source"
)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The project's setup.py, at work in another checkout, which is empty."""
    import setup

    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torchce").mkdir()
    return setup


@pytest.fixture
def build(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run of build_ext whose compiler writes files without compiling; one that knows its command line."""
    from setuptools import Distribution, Extension
    from torch.utils.cpp_extension import BuildExtension

    from build_plan import Plan

    def compile_nothing(command: Any) -> None:
        for extension in command.extensions:
            library = Path(command.get_ext_fullpath(extension.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            library.write_text("new")

    monkeypatch.setattr(BuildExtension, "build_extensions", compile_nothing)

    def run(*arguments: str, cuda: bool = False) -> Any:
        names = ["torchce._C", *(["torchce._cuda"] if cuda else [])]
        command_class = setup.build_command(Plan("9.0" if cuda else None, ("a line",)))
        distribution = Distribution(
            {
                "name": "torchce",
                "packages": ["torchce"],
                "ext_modules": [Extension(name, ["source.cpp"]) for name in names],
                "cmdclass": {"build_ext": command_class},
                "script_name": "setup.py",
                "script_args": ["--quiet", *arguments],
            }
        )
        distribution.parse_command_line()
        distribution.run_commands()
        return distribution.get_command_obj("build_ext")

    return run


@pytest.mark.parametrize("arguments", [["build_ext"], ["build_ext", "--inplace"], ["build"]])
@pytest.mark.parametrize("cuda", [False, True])
def test_checkout_has_what_was_built(build: Callable[..., Any], arguments: list[str], cuda: bool) -> None:
    """What Python imports in this folder is its torchce/, whatever is installed."""
    for path in (C, CUDA):
        path.write_text("old")
    build(*arguments, cuda=cuda)
    assert C.read_text() == "new"
    assert CUDA.is_file() == cuda, "an earlier build's stays"
    assert not cuda or CUDA.read_text() == "new"


@pytest.mark.parametrize(
    "arguments",
    [["build_ext", "--build-lib", "there"], ["build", "--build-base", "there"], ["build", "--build-lib", "there"]],
    ids=" ".join,
)
def test_a_build_elsewhere_leaves_the_checkout_alone(build: Callable[..., Any], arguments: list[str]) -> None:
    """As one with sanitizers, whose libraries no plain Python loads."""
    CUDA.write_text("old")
    command = build(*arguments)
    assert Path(command.build_lib, C).read_text() == "new"
    assert CUDA.read_text() == "old"
    assert not C.exists()


def test_an_unpacked_sdist_is_left_alone(build: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "PKG-INFO").touch()
    build("build_ext")
    assert not C.exists()


def test_a_checkout_that_cannot_be_written_is_left_alone(
    build: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file in the folder's place is what root cannot write either."""
    (tmp_path / "torchce").rmdir()
    (tmp_path / "torchce").touch()
    command = build("build_ext")
    built = Path(command.build_lib, C)
    assert built.read_text() == "new"
    assert capfd.readouterr().err.splitlines() == ["torchce: a line", f"torchce: built {built}"]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError, subprocess.SubprocessError])
@pytest.mark.parametrize("cuda", [False, True])
def test_a_fault_of_the_compilers_is_one_line(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: type[Exception], cuda: bool
) -> None:
    from torch.utils.cpp_extension import BuildExtension

    def fail(command: Any) -> None:
        raise error("g++ 16 is newer than CUDA 13.0 takes")

    monkeypatch.setattr(BuildExtension, "build_extensions", fail)
    hint = "; TORCHCE_CUDA=0 builds the CPU kernels alone" if cuda else ""
    with pytest.raises(SystemExit, match=rf"^torchce: the build failed: g.. 16 is newer than CUDA 13\.0 takes{hint}$"):
        build("build_ext", cuda=cuda)


@pytest.mark.parametrize("name", ["CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CC", "LDSHARED"])
def test_flags_that_cannot_be_split_are_one_line(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "'")
    with pytest.raises(SystemExit, match=r"^torchce: the build failed: bad string"):
        build("build_ext")


def test_a_command_gets_a_name(setup: ModuleType, tmp_path: Path) -> None:
    """torch's build runs the whole of CXX as one program since torch 2.14, with ccache before it if there is one."""
    spaced = tmp_path / "a b"
    spaced.mkdir()
    (spaced / "c++").write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    (spaced / "c++").chmod(0o755)
    names = set()
    for command, printed in [
        ((str(spaced / "c++"),), "<x y>"),
        ((str(spaced / "c++"), "-m64", "-D'a b'"), "<-m64><-D'a b'><x y>"),
        (("/usr/bin/env", "A=1", str(spaced / "c++")), "<x y>"),
    ]:
        environ = dict(os.environ)
        name = setup.one_word(command, environ)
        assert name == Path(name).name, "a path may hold spaces"
        assert setup.one_word(command, dict(os.environ)) == name, "ninja compiles again where it changes"
        assert subprocess.check_output([name, "x y"], env=environ, text=True) == printed
        names.add(name)
    assert len(names) == 3
    assert setup.one_word(("/usr/bin/c++",), {}) == "/usr/bin/c++"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CXX", "/bin/false", "/bin/false does not compile C++20 as g++ 11 and newer do: it exited with 1"),
        ("CXX", "no-such-compiler -O1", "CXX=no-such-compiler -O1 is not found"),
        ("CXX", "g++ '", "CXX=g++ ' is no command: No closing quotation"),
        ("MAX_JOBS", "many", "MAX_JOBS: expected a number from 1 on, got 'many'"),
    ],
)
def test_what_stops_a_build_is_one_line(name: str, value: str, message: str) -> None:
    environ = {**os.environ, "TORCHCE_CUDA": "0", name: value}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"torchce: {message}")
    assert result.stderr.endswith("; nothing can be built\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["egg_info", "bdist_wheel"])
def test_old_setuptools_is_one_line(tmp_path: Path, command: str) -> None:
    """Virtual environments of Python 3.10 and 3.11 come with it, and a build without isolation takes it."""
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\nsetup = None\n")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "setup.py", command], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    words = "torchce: setuptools 65.5.0 is too old: pip install 'setuptools>=77'; nothing can be built\n"
    assert (result.returncode, result.stderr) == (1, words)
