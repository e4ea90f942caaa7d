"""Fixtures that every test file shares: where a test runs, and what it may not leave behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import cases
import pytest
import torch

import torchce  # noqa: F401  (registers the ops that are asked about below)

pytest_plugins = ["cuda_emulation.plugin"]


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchce::softmax_ce_forward", "CUDA"):
        return "torchce built without CUDA"
    return None


# What pytest's own summary does not count: torch's samples, by whose they are, and fuzzed problems.
COUNTS = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="also run the tests beyond 2^31 elements, which take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTS] = Counter()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for what, count in sorted(config.stash[COUNTS].items()):
        terminalreporter.write_line(f"{count} {what}")


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Counter[str]:
    """Counts that are printed at the end of the run, each with its key behind it."""
    return request.config.stash[COUNTS]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "cuda": _why_no_cuda(),
        "large": None if config.getoption("--large") else "takes minutes and gigabytes: make test-large",
    }
    for item in items:
        if "cuda_device" in getattr(item, "fixturenames", ()) and config.getoption("--emulate-cuda"):
            continue
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


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
