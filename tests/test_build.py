"""What setup.py decides to build, from what a machine has, and the words in which it says so."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import stat
import sys
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


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torchce_setup", SETUP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(setup: ModuleType) -> Callable[..., Any]:
    """A machine that has everything but a GPU, with changes."""

    def make(**changes: Any) -> Any:
        toolkit = setup.Toolkit(Path("/cuda"), "13.0", ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"))
        complete = setup.Machine("2.14.1+cu130", "13.0", True, True, "/usr/bin/g++", toolkit, (), False)
        return dataclasses.replace(complete, **changes)

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": None}, "torch is not installed.*pip install"),
        ({"torch": "2.9.1"}, r"torch 2\.9\.1 is too old.*2\.10"),
        ({"pybind11": False}, "pybind11 is not installed.*pip install"),
        ({"compiler": None}, "no C.. compiler.*g..$"),
        ({"python_headers": False}, "Python.h is not found.*python3-dev"),
    ],
    ids=["no_torch", "old_torch", "no_pybind11", "no_compiler", "no_headers"],
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
    ],
    ids=["forbidden", "cpu_torch", "no_toolkit", "other_version"],
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


def test_unknown_value_of_the_switch(setup: ModuleType, machine: Callable[..., Any]) -> None:
    with pytest.raises(setup.CannotBuild, match="TORCHCE_CUDA: expected 0 or 1, got 'yes'"):
        setup.make_plan(machine(), {"TORCHCE_CUDA": "yes"})


@pytest.mark.parametrize(
    ("changes", "environ", "archs"),
    [
        ({}, {}, "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"),
        ({"gpu_archs": ("9.0",)}, {}, "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"),
        ({"development": True}, {}, "9.0"),
        ({"development": True, "gpu_archs": ("8.6", "8.9")}, {}, "8.6;8.9"),
        ({"development": True, "gpu_archs": ("11.0",)}, {}, "8.0;8.6;8.9;9.0+PTX;10.0;12.0+PTX"),
        ({"development": True}, {"TORCH_CUDA_ARCH_LIST": "7.5"}, "7.5"),
    ],
    ids=["wheel", "wheel_ignores_the_gpu", "development", "development_for_the_gpus", "unknown_gpu", "given"],
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
    older = setup.Toolkit(Path("/cuda"), "12.4", ("8.0", "8.6", "8.9", "9.0"))
    plan = setup.make_plan(machine(toolkit=older, torch_cuda="12.6"), {})
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


def test_compiler_may_come_with_a_launcher(setup: ModuleType, tmp_path: Path) -> None:
    fake_nvcc(tmp_path / "ccache", tmp_path)
    assert setup.find_compiler({"CXX": "ccache g++ -m64", "PATH": str(tmp_path)}) == str(tmp_path / "ccache")
    assert setup.find_compiler({"CXX": "no-such-compiler", "PATH": str(tmp_path)}) is None
    assert setup.find_compiler({"PATH": str(tmp_path)}) is None


def test_build_info_tells_what_runs() -> None:
    info = torchce.build_info()
    assert info["torch_running"] == torch.__version__
    assert info["cpu_level"] in info["cpu_levels"]
    assert info["cpu_levels"][-1] == "baseline"
    assert info["cuda_loaded"] == (info["cuda_built"] is not None)
    assert info["cuda_loaded"] or info["cuda_status"] == "not built" or info["cuda_status"].startswith("built, but")
