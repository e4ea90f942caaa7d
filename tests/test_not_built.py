"""What ``import torchce`` says where the kernels are not beside its source."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torchce
from torchce import _C

PACKAGE = Path(torchce.__file__).parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the package's source in it."""
    folder = tmp_path / "checkout"
    shutil.copytree(PACKAGE, folder / "torchce", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def words_of_the_import(folder: Path, *path: Path) -> str:
    """The error, as it is where no torchce is installed but on ``path``; the tests may run on an installed one."""
    code = (
        "import pathlib, sys; others = [entry for entry in sys.path if not pathlib.Path(entry, 'torchce').is_dir()]; "
        f"sys.path[:] = {['', *map(str, path)]} + others; import torchce"
    )
    command = [sys.executable, "-I", "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (words,) = (line for line in result.stderr.splitlines() if line.startswith("ImportError: "))
    return words.removeprefix("ImportError: ")


def test_source_that_hides_an_installed_package(checkout: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site-packages" / "torchce"
    installed.mkdir(parents=True)
    (installed / Path(_C.__file__).name).touch()
    words = words_of_the_import(checkout, tmp_path / "nowhere", installed.parent)
    assert words == (
        f"{checkout / 'torchce'} is torchce's source without compiled kernels, and hides the installed torchce at "
        f"{installed}: run Python from another folder, or build in place in {checkout}: "
        "python setup.py build_ext --inplace"
    )


def test_source_alone(checkout: Path) -> None:
    words = words_of_the_import(checkout)
    assert words.startswith(
        f"torchce's compiled kernels are not in {checkout / 'torchce'}: run `pip install --no-build"
    )
    assert words.endswith("or `python setup.py build_ext --inplace` in torchce's folder")


def test_kernels_of_another_python(checkout: Path) -> None:
    (checkout / "torchce" / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "; _C.cpython-39-x86_64-linux-gnu.so is for another Python: run" in words_of_the_import(checkout)
