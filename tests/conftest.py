"""Fixtures that every test file shares: where a test runs, and what it may not leave behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
import torch
from hypothesis import HealthCheck, settings

import torchce

pytest_plugins = ["cuda_emulation.plugin"]


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchce::softmax_ce_forward", "CUDA"):
        return "torchce built without CUDA"
    return None


# What pytest's own summary does not count: torch's samples, by whose they are, and fuzzed problems.
COUNTS = pytest.StashKey[Counter[str]]()


# Hypothesis checks how long a problem takes to draw and to run, which on a shared machine says nothing about it.
_UNHURRIED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
settings.register_profile(
    "short", max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=_UNHURRIED
)
settings.register_profile(
    "fuzz", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=_UNHURRIED
)  # of each test; there are seven
settings.load_profile("short")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="also run the tests beyond 2^31 elements, which take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTS] = Counter()


def pytest_report_header() -> str:
    """Which build is tested: `make sanitize` has its own."""
    return f"torchce: {Path(torchce.__file__).parent}, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for what, count in sorted(config.stash[COUNTS].items()):
        terminalreporter.write_line(f"{count} {what}")


@pytest.fixture(scope="session")
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
