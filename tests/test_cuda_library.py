"""Whether the CUDA kernels are loaded, how one learns why not, and what CUDA logits do without them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchce
from torchce import _cuda_library, functional, ops

SPEC = util.find_spec("torchce._cuda")
LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": functional.cross_entropy,
    "bce": functional.binary_cross_entropy_with_logits,
}


def shared_library(path: Path, *options: str) -> Path:
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-x", "none", "-o", path, *options], check=True)
    return path


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """One that needs the runtime of each CUDA version, one that needs none."""
    folder = tmp_path_factory.mktemp("libraries")
    result: dict[str | None, Path] = {None: shared_library(folder / "none.so")}
    for major in ("12", "13"):
        runtime = shared_library(folder / "libcudart.so", f"-Wl,-soname,libcudart.so.{major}")
        result[major] = shared_library(folder / f"{major}.so", "-Wl,--no-as-needed", str(runtime))
    return result


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str]]:
    """Loads as a torch of some CUDA version would, a library that is there or not; Python refuses what it is given."""

    def load(torch_cuda: str | None, library: Path | None) -> tuple[Any, str]:
        def refuse(name: str) -> None:
            raise ImportError(f"{name} is no module")

        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        spec = None if library is None else SimpleNamespace(origin=str(library))
        monkeypatch.setattr(_cuda_library, "util", SimpleNamespace(find_spec=lambda name: spec))
        monkeypatch.setattr(_cuda_library, "import_module", refuse)
        return _cuda_library.load()

    return load


def test_the_cuda_version_is_read_from_the_file(libraries: dict[str | None, Path]) -> None:
    assert [_cuda_library.cuda_major(str(path)) for path in libraries.values()] == [None, "12", "13"]


@pytest.mark.parametrize(
    ("torch_cuda", "major", "status"),
    [
        (None, "13", f"built, but torch {torch.__version__} has no CUDA"),
        ("12.8", "13", f"built, but for CUDA 13: torch {torch.__version__} has CUDA 12.8"),
        ("13.0", "12", f"built, but for CUDA 12: torch {torch.__version__} has CUDA 13.0"),
        ("13.2", "13", "built, but not loadable: torchce._cuda is no module"),
        ("13.2", None, "built, but not loadable: torchce._cuda is no module"),
    ],
    ids=["cpu_torch", "older_cuda", "newer_cuda", "another_minor_version_will_do", "unknown_is_tried"],
)
def test_status(
    load: Callable[..., tuple[Any, str]],
    libraries: dict[str | None, Path],
    torch_cuda: str | None,
    major: str | None,
    status: str,
) -> None:
    assert load(torch_cuda, libraries[major]) == (None, status)


@pytest.mark.parametrize("damage", ["empty", "missing", "folder"])
def test_a_library_that_cannot_be_read_leaves_the_cpu_kernels(
    load: Callable[..., tuple[Any, str]], tmp_path: Path, damage: str
) -> None:
    library = tmp_path / "_cuda.so"
    if damage == "empty":
        library.touch()
    elif damage == "folder":
        library.mkdir()
    assert load("13.0", library) == (None, "built, but not loadable: torchce._cuda is no module")


def test_status_without_a_library(load: Callable[..., tuple[Any, str]]) -> None:
    assert load("13.0", None) == (None, "not built")


@pytest.mark.skipif(SPEC is None, reason="torchce._cuda is not built")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA")
def test_another_cuda_version_leaves_the_cpu_kernels() -> None:
    assert SPEC is not None
    assert SPEC.origin is not None
    built_for = _cuda_library.cuda_major(SPEC.origin)
    assert built_for is not None
    assert torchce.build_info()["cuda_loaded"] == (torch.version.cuda.partition(".")[0] == built_for)
    program = """
import sys, torch
torch.version.cuda = "11.8"
import torchce
assert torchce.build_info()["cuda_loaded"] is False and "torchce._cuda" not in sys.modules
assert torchce.build_info()["cuda_status"].endswith("has CUDA 11.8")
assert torchce.functional.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3])).item() > 1
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- CUDA logits without CUDA kernels: fake ones, which need no device ------------------------------------------------


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "cuda_module", None)
    monkeypatch.setattr(ops, "cuda_status", "built, but for CUDA 13: torch has CUDA 12.8")
    monkeypatch.setattr(ops, "_has_warned", False)


def call(loss: str, device: str, wrap: Callable[[Any], Any] = lambda function: function) -> list[str]:
    """The warnings of two calls with logits on the device."""
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits = torch.empty(4, 5, device=device)
        target = logits if loss == "bce" else torch.empty(4, dtype=torch.int64, device=device)
        for _ in range(2):
            assert wrap(LOSSES[loss])(logits, target).device.type == device
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("loss", LOSSES)
def test_cuda_logits_without_kernels_warn_once(loss: str) -> None:
    (message,) = call(loss, "cuda")
    assert "built, but for CUDA 13: torch has CUDA 12.8" in message
    assert "TORCHCE_CUDA=1 pip install" in message
    assert call("ce", "cuda") == call("bce", "cuda") == []


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("device", ["cpu", "meta", "xpu"])
def test_other_logits_do_not_warn(loss: str, device: str) -> None:
    assert call(loss, device) == []


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_compiled_loss_warns_while_it_is_traced(loss: str) -> None:
    """In one graph: Dynamo would refuse fullgraph=True at a warning that it sees."""
    torch._dynamo.reset()
    (message,) = call(loss, "cuda", lambda function: torch.compile(function, fullgraph=True, backend="eager"))
    assert "built, but for CUDA 13" in message
