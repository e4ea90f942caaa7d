"""What build_plan.py decides to build, from what a machine has, and the words in which it says so."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import torchce

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
pytestmark = pytest.mark.skipif(
    not SETUP.is_file(), reason="these tests stand beside an installed wheel, not its source"
)
CUDA_12 = {"torch": "2.11.0+cu128", "torch_cuda": "12.8"}
TOOLKIT_12 = {"toolkit": ("12.8", ("8.0", "9.0"))}
CPU = {"torch": "2.11.0+cpu", "torch_cuda": None}


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    import build_plan

    return build_plan


@pytest.fixture
def machine(setup: ModuleType) -> Callable[..., Any]:
    """A machine that has everything but a GPU, with changes; those of the toolkit are its version and what it knows."""

    def make(**changes: Any) -> Any:
        if changes.get("toolkit") is not None:
            changes["toolkit"] = setup.Toolkit(Path("/cuda"), *changes["toolkit"])
        toolkit = setup.Toolkit(Path("/cuda"), "13.0", ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"))
        complete = setup.Machine("2.14.1+cu130", "13.0", True, True, ("/usr/bin/g++",), toolkit, (), False)
        return dataclasses.replace(complete, **changes)

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": None}, "torch is not installed.*pip install"),
        ({"torch": "2.9.1"}, r"torch 2\.9\.1 is too old.*2\.10"),
        ({"pybind11": False}, "pybind11 is not installed.*pip install"),
        ({"compiler": ()}, "no C.. compiler.*g..$"),
        (
            {"compiler": ("/usr/bin/ccache", "g++-9"), "compiler_fault": "concepts: No such file or directory"},
            "^/usr/bin/ccache g..-9 does not compile C..20 as g.. 11 .*: concepts: No such file or directory$",
        ),
        ({"python_headers": False}, "Python.h is not found.*python3-dev"),
    ],
    ids=["no_torch", "old_torch", "no_pybind11", "no_compiler", "old_compiler", "no_headers"],
)
def test_what_stops_every_build(
    setup: ModuleType, machine: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(setup.CannotBuild, match=message):
        setup.make_plan(machine(**changes), {})


@pytest.mark.parametrize(
    ("changes", "environ", "message"),
    [
        ({}, {"TORCHCE_CUDA": "0"}, "TORCHCE_CUDA=0"),
        ({"torch": "2.14.1+cpu", "torch_cuda": None}, {}, "built without CUDA"),
        ({"toolkit": None}, {}, "no CUDA toolkit"),
        ({"torch_cuda": "12.8"}, {}, r"CUDA 13\.0, .*CUDA 12\.8"),
        ({"toolkit": ("13.0", ())}, {}, "/cuda knows none of the architectures 8.0, "),
    ],
    ids=["forbidden", "cpu_torch", "no_toolkit", "other_version", "mute_toolkit"],
)
def test_what_leaves_cuda_out(
    setup: ModuleType, machine: Callable[..., Any], changes: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    """The CPU kernels are built all the same; insisting on CUDA makes it an error with the same words."""
    plan = setup.make_plan(machine(**changes), environ)
    assert plan.archs is None
    assert len(plan.lines) == 2
    assert re.search(f"CPU kernels only: .*{message}", plan.lines[1])
    if environ:
        return
    with pytest.raises(setup.CannotBuild, match=f"TORCHCE_CUDA=1, but .*{message}"):
        setup.make_plan(machine(**changes), {"TORCHCE_CUDA": "1"})


def test_a_newer_minor_version_of_cuda_will_do(setup: ModuleType, machine: Callable[..., Any]) -> None:
    assert setup.make_plan(machine(torch_cuda="13.2"), {}).archs is not None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TORCHCE_CUDA", "yes", "TORCHCE_CUDA: expected 0 or 1, got 'yes'"),
        ("TORCHCE_WERROR", "on", "TORCHCE_WERROR: expected 0 or 1, got 'on'"),
        ("MAX_JOBS", "all", "MAX_JOBS: expected a number from 1 on, got 'all'"),
        ("MAX_JOBS", "0", "MAX_JOBS: expected a number from 1 on, got '0'"),  # ninja starts them all at once
        ("MAX_JOBS", "\N{SUPERSCRIPT TWO}", "MAX_JOBS"),  # a digit, but none that int() takes
        ("TORCH_CUDA_ARCH_LIST", "nonsense", r"TORCH_CUDA_ARCH_LIST: CUDA 13\.0 knows 7.5, .*, but not 'nonsense'"),
        ("TORCH_CUDA_ARCH_LIST", "9.0;6.1", "not '6.1'"),
        ("TORCH_CUDA_ARCH_LIST", "9.0,8.0", "not '9.0,8.0'"),
    ],
)
def test_values_that_mean_nothing(
    setup: ModuleType, machine: Callable[..., Any], name: str, value: str, message: str
) -> None:
    with pytest.raises(setup.CannotBuild, match=message):
        setup.make_plan(machine(), {name: value})


def test_what_does_not_matter_is_not_judged(setup: ModuleType, machine: Callable[..., Any]) -> None:
    setup.make_plan(machine(), {"TORCHCE_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "nonsense", "MAX_JOBS": ""})


@pytest.mark.parametrize(
    ("seen", "installed", "changes", "message"),
    [
        ({}, CUDA_12, TOOLKIT_12, r"isolation sees torch 2\.14.*2\.11.*CUDA 12.8.*--no-build-isolation"),
        (CPU, CUDA_12, TOOLKIT_12, "sees torch 2.11.0.cpu, .*--no-build-isolation"),
        ({}, {"torch": "2.9.1+cu130", "torch_cuda": "13.0"}, {}, r"2\.9\.1.* is installed.* >= 2\.10.*upgrade"),
        ({}, CUDA_12, {}, None),
        ({}, CUDA_12, {"toolkit": None}, None),
        ({}, CPU, {}, None),
        ({}, {"torch": "2.11.0+cu131", "torch_cuda": "13.1"}, {}, None),
    ],
    ids=["other_cuda", "seen_without_cuda", "too_old", "other_toolkit", "no_toolkit", "installed_without_cuda", "fits"],
)
def test_builds_in_isolation_fit_the_installed_torch(
    setup: ModuleType,
    machine: Callable[..., Any],
    seen: dict[str, Any],
    installed: dict[str, Any],
    changes: dict[str, Any],
    message: str | None,
) -> None:
    """They do where the installed torch would have no CUDA kernels from a plain build either."""
    hidden = setup.Torch(installed["torch"], installed["torch_cuda"])
    isolated = machine(**seen, **changes, hidden_torch=hidden)
    if message is None:
        assert setup.make_plan(isolated, {}) == setup.make_plan(machine(**seen, **changes), {})
        return
    with pytest.raises(setup.CannotBuild, match=message):
        setup.make_plan(isolated, {})
    if "upgrade" not in message:
        assert setup.make_plan(isolated, {"TORCHCE_CUDA": "0"}).archs is None


@pytest.mark.parametrize("cuda", [": Optional[str] = '12.8'", " = '12.8'", ": str | None = None"])
def test_hidden_torch_is_read_not_imported(setup: ModuleType, tmp_path: Path, cuda: str) -> None:
    """As pip isolates a build: the interpreter's own folders are not searched, and another's torch is imported."""
    own, shared, empty = (str(tmp_path / name) for name in ("own", "shared", "empty"))
    for folder in (own, shared):
        version = Path(folder, "torch", "version.py")
        version.parent.mkdir(parents=True)
        version.write_text(f"from typing import Optional\n__version__ = '2.11.0+{Path(folder).name}'\ncuda{cuda}\n")
    expected = "12.8" if "12.8" in cuda else None
    assert setup.find_hidden_torch([empty, own, shared], ["/overlay"]) == setup.Torch("2.11.0+own", expected)
    assert setup.find_hidden_torch([own, shared], [own, "/overlay"]) is None
    assert setup.find_hidden_torch([empty], ["/overlay"]) is None


@pytest.mark.parametrize("shared", [False, True])
def test_site_packages_of_a_virtual_environment(setup: ModuleType, tmp_path: Path, shared: bool) -> None:
    """Another Python's folder is among them where the environment shares it."""
    venv.create(tmp_path, system_site_packages=shared, symlinks=True)
    code = "import build_plan, site, sys; print(*build_plan.site_packages(), sep='\\n')"
    command = [tmp_path / "bin" / "python", "-c", code]
    environ = {**os.environ, "PYTHONPATH": str(SETUP.parent)}
    folders = subprocess.check_output(command, env=environ, text=True).splitlines()
    own = sysconfig.get_path("purelib", vars={"base": str(tmp_path)})
    base = sysconfig.get_path("purelib", vars={"base": sys.base_prefix})
    assert folders[0] == own
    assert (base in folders) == shared


def test_nothing_hides_the_torch_of_this_environment(setup: ModuleType) -> None:
    assert setup.find_hidden_torch(setup.site_packages(), sys.path) is None


@pytest.mark.parametrize(
    ("changes", "environ", "archs"),
    [
        ({}, {}, "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"),
        ({"gpu_archs": ("9.0",)}, {}, "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"),
        ({"development": True}, {}, "9.0"),
        ({"development": True, "gpu_archs": ("8.6", "8.9")}, {}, "8.6;8.9"),
        ({"development": True, "gpu_archs": ("11.0",)}, {}, "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"),
        ({"development": True}, {"TORCH_CUDA_ARCH_LIST": "7.5"}, "7.5"),
        ({}, {"TORCH_CUDA_ARCH_LIST": "8.0 9.0a;12.0+PTX;"}, "8.0;9.0a;12.0+PTX"),
        ({}, {"TORCH_CUDA_ARCH_LIST": "Ada;Hopper"}, "Ada;Hopper"),
    ],
    ids=[
        "wheel",
        "wheel_ignores_the_gpu",
        "development",
        "development_for_the_gpus",
        "unknown_gpu",
        "given",
        "list",
        "names",
    ],
)
def test_architectures(
    setup: ModuleType, machine: Callable[..., Any], changes: dict[str, Any], environ: dict[str, str], archs: str
) -> None:
    plan = setup.make_plan(machine(**changes), environ)
    assert plan.archs == archs
    assert archs in plan.lines[1]


@pytest.mark.parametrize("device", ["8.0", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1", "13.0"])
def test_every_device_finds_an_image(setup: ModuleType, machine: Callable[..., Any], device: str) -> None:
    """A binary of its major capability that is no newer, or PTX, which every newer device's driver compiles."""
    images = setup.make_plan(machine(), {}).archs.split(";")
    wanted = setup.version_tuple(device)
    older = [image for image in images if setup.version_tuple(image) <= wanted]
    assert any(setup.version_tuple(image)[0] == wanted[0] or image.endswith("+PTX") for image in older)


def test_architectures_that_this_toolkit_does_not_know_are_left_out(
    setup: ModuleType, machine: Callable[..., Any]
) -> None:
    plan = setup.make_plan(machine(toolkit=("12.4", ("8.0", "8.6", "8.9", "9.0")), torch_cuda="12.6"), {})
    assert plan.archs == "8.0;8.6;8.9;9.0+PTX"


def fake_nvcc(path: Path, root: Path) -> None:
    """An nvcc that answers as the real one of a toolkit at `root`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""#!/bin/sh
case "$*" in
  *--dryrun*) echo '#$ TOP={root}' >&2 ;;
  *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.1' ;;
  *--list-gpu-arch*) printf 'compute_80\\ncompute_120\\n' ;;
esac
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("how", ["CUDA_HOME", "conventional", "nvcc_on_path"])
def test_toolkit_is_found_where_its_headers_are(setup: ModuleType, tmp_path: Path, how: str) -> None:
    """An nvcc in a bin folder may be a wrapper, far from any header."""
    root = tmp_path / "cuda-13.0"
    fake_nvcc(root / "bin" / "nvcc", root)
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    fake_nvcc(tmp_path / "bin" / "nvcc", root)
    environ = {"CUDA_HOME": str(root)} if how == "CUDA_HOME" else {}
    environ["PATH"] = str(tmp_path / "bin") if how == "nvcc_on_path" else ""
    found = setup.find_toolkit(environ, str(root) if how == "conventional" else str(tmp_path / "nowhere"))
    assert found == setup.Toolkit(root, "13.0", ("8.0", "12.0"))


def test_toolkit_without_headers_is_none(setup: ModuleType, tmp_path: Path) -> None:
    fake_nvcc(tmp_path / "bin" / "nvcc", tmp_path)
    environ = {"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path / "bin")}
    assert setup.find_toolkit(environ, str(tmp_path / "nowhere")) is None


def test_toolkit_may_be_a_file_or_a_loop(setup: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    environ = {"CUDA_HOME": str(tmp_path / "file"), "CUDA_PATH": str(tmp_path / "loop"), "PATH": str(tmp_path)}
    assert setup.find_toolkit(environ, str(tmp_path / "nowhere")) is None


def test_compiler_may_come_with_a_launcher(setup: ModuleType, tmp_path: Path) -> None:
    fake_nvcc(tmp_path / "ccache", tmp_path)
    launched = setup.find_compiler({"CXX": "ccache 'g++' -m64", "PATH": str(tmp_path)})
    assert launched == (str(tmp_path / "ccache"), "g++", "-m64")
    assert setup.find_compiler({"CXX": "no-such-compiler", "PATH": str(tmp_path)}) == ()
    assert setup.find_compiler({"PATH": str(tmp_path)}) == ()
    with pytest.raises(setup.CannotBuild, match=r"CXX=g.. ' is no command: No closing quotation"):
        setup.find_compiler({"CXX": "g++ '", "PATH": str(tmp_path)})


def test_compiler_is_probed_with_all_its_options(setup: ModuleType) -> None:
    compiler = setup.find_compiler({})
    assert setup.find_compiler_fault(compiler) is None
    assert setup.find_compiler_fault(["/usr/bin/env", *compiler]) is None
    assert "error" in setup.find_compiler_fault([*compiler, "-no-such-option"])
    assert "error" in setup.find_compiler_fault([*compiler, "-nostdinc++"])  # as without the header <concepts>


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("exit 1", "it exited with 1, without an object file or a word"),
        ("exit 0", "it exited with 0, without an object file or a word"),
        ("echo 'In file included from probe.cpp:1:'; echo 'x.h:2: error: no'; exit 1", "x.h:2: error: no"),
        ("printf 'Fehler \\377'; exit 1", "Fehler \N{REPLACEMENT CHARACTER}"),
        ("exec sleep 60", "no answer in 0.2 seconds"),
    ],
    ids=["fails", "does_nothing", "names_an_error", "no_utf_8", "hangs"],
)
def test_programs_that_do_not_compile(setup: ModuleType, tmp_path: Path, script: str, fault: str) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    seconds = 0.2 if fault.startswith("no answer") else 60
    assert setup.find_compiler_fault([str(compiler)], seconds=seconds) == fault


def test_a_file_that_is_no_program_does_not_compile(setup: ModuleType, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_bytes(b"\x7fELF")
    compiler.chmod(0o755)
    assert "Exec format error" in setup.find_compiler_fault([str(compiler)])


def test_build_info_tells_what_runs() -> None:
    info = torchce.build_info()
    assert info["torch_running"] == torch.__version__
    assert info["cpu_level"] in info["cpu_levels"]
    assert info["cpu_levels"][-1] == "baseline"
    assert info["cuda_loaded"] == (info["cuda_built"] is not None)
    assert info["cuda_loaded"] or info["cuda_status"] == "not built" or info["cuda_status"].startswith("built, but")
