"""Fixtures that every test file shares: where a test runs, and what it may not leave behind."""

from __future__ import annotations

from collections.abc import Iterator

import cases
import pytest
import torch

pytest_plugins = ["cuda_emulation.plugin"]

import torchce  # noqa: F401  (registers the ops that are asked about below)


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchce::softmax_ce_forward", "CUDA"):
        return "torchce built without CUDA"
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device and a torchce built with CUDA")


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    reason = _why_no_cuda()
    if reason is None:
        return
    skip = pytest.mark.skip(reason=reason)
    emulated = config.getoption("--emulate-cuda")
    for item in items:
        if item.get_closest_marker("cuda") and not (emulated and "cuda_device" in getattr(item, "fixturenames", ())):
            item.add_marker(skip)


@pytest.fixture(params=cases.DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
