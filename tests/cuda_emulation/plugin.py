"""``pytest --emulate-cuda``: the CUDA kernels in place of the CPU ones, run on the CPU by the emulation.

Tests then run on ``device == "cpu"`` as ever, but whatever reaches an op through :mod:`torchce.ops` is computed by
``csrc/cuda``. Outputs and shared memory are filled with NaN before they are written. ``TORCHCE_EMULATION_SEED`` orders
blocks and threads, for each test anew; ``TORCHCE_EMULATED_SMS`` is the number of multiprocessors.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulation import build

import torchce.ops

# Where the kernels are tested; the other files ask about the layers above them.
EMULATED_FILES = {
    "test_autograd",
    "test_binary_divergence",
    "test_cuda_regimes",
    "test_determinism",
    "test_divergence",
    "test_infinite_weights",
    "test_ops",
    "test_sigmoid_bce",
    "test_softmax_ce",
    "test_softmax_ce_forward_backward",
    "test_softmax_ce_own",
    "test_softmax_ce_rounding",
}
NOT_EMULATED = {
    "test_backward_with_a_bad_index_stays_in_bounds": "CUDA gives NaN, and has its own test",
    "test_a_bad_index_leaves_the_logits_alone": "CUDA gives NaN, and has its own test",
    "test_operands_of_two_dtypes": "functional makes those of CUDA tensors alike",
    "test_same_bits_for_every_number_of_threads": "kernels use no CPU threads",
    "test_nearly_equal_distributions": "lanes that are merged round their sums, to an error like torch's",
    "test_nearly_equal_probabilities": "CUDA kernels lift no known probabilities",
    "test_opcheck": "looks at how torchce's own ops are registered",
    "test_fake_results_have_the_real_layout": "fakes are registered for torchce's own ops",
    "test_thread_count_does_not_matter": "kernels use no CPU threads",
    "test_every_thread_count": "kernels use no CPU threads",
}


class Emulation:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        self.library.cuda_emulation_seed.argtypes = [ctypes.c_uint64]
        self.library.cuda_emulation_launches.restype = ctypes.c_uint64
        self.library.cuda_emulation_switches.restype = ctypes.c_uint64
        self.library.cuda_emulation_kernels.restype = ctypes.c_char_p
        self.library.cuda_emulation_last_kernel.restype = ctypes.c_char_p
        self.initial_seed = int(os.environ.get("TORCHCE_EMULATION_SEED", "0"))
        self.multiprocessors = int(os.environ.get("TORCHCE_EMULATED_SMS", "3"))

    def take_over(self) -> None:
        """Makes every wrapper in torchce.ops call the emulated op."""
        for name in torch._C._dispatch_get_all_op_names():
            namespace, _, op = name.partition("::")
            if namespace == "torchce_emulated":
                overload = getattr(torch.ops.torchce_emulated, op).default
                bare = f"_{op}" if hasattr(torchce.ops, f"_{op}") else op  # below its wrapper, if it has one
                assert hasattr(torchce.ops, bare), f"torchce.ops has no {op}"
                setattr(torchce.ops, bare, overload)
                if hasattr(torchce.ops, f"eager_{op}"):
                    setattr(torchce.ops, f"eager_{op}", torchce.ops.below_autograd(overload))

    def start_afresh(self) -> None:
        self.library.cuda_emulation_seed(self.initial_seed)
        self.set_device(self.multiprocessors)

    def set_device(self, multiprocessors: int, largest_cluster: int = 1, placeable_cluster: int = 16) -> None:
        self.library.cuda_emulation_set_multiprocessors(multiprocessors)
        self.library.cuda_emulation_set_largest_cluster(largest_cluster)
        self.library.cuda_emulation_set_placeable_cluster(placeable_cluster)


emulation: Emulation | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("CUDA emulation")
    group.addoption("--emulate-cuda", action="store_true", help="run the CUDA kernels on the CPU in place of the CPU's")
    group.addoption("--sanitized", action="store_true", help="with AddressSanitizer and UBSan")
    group.addoption("--emulated-kernels", type=Path, help="file that gets the names of all kernels that were launched")
    group.addoption("--csrc", type=Path, default=build.CSRC, help="sources to emulate, if not the project's")


def pytest_configure(config: pytest.Config) -> None:
    global emulation
    if not config.getoption("--emulate-cuda"):
        return
    sanitized = config.getoption("--sanitized")
    if sanitized and not build.is_sanitized_process():
        raise pytest.UsageError(f"--sanitized needs the environment: {build.sanitized_environment()}")
    try:
        library = build.build(sanitized=sanitized, csrc=config.getoption("--csrc").resolve())
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    emulation = Emulation(library)
    emulation.take_over()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if emulation is None:
        return
    for item in items:
        reason = NOT_EMULATED.get(getattr(item, "originalname", item.name))
        if item.path.stem not in EMULATED_FILES:
            reason = "asks nothing of the kernels"
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"--emulate-cuda: {reason}"))


@pytest.fixture(autouse=True)
def _emulation_starts_afresh() -> Iterator[None]:
    """So that a test alone does what it does among others, and a counter that a kernel spoiled fails the right one."""
    if emulation is None:
        yield
        return
    emulation.start_afresh()
    yield
    left = emulation.library.cuda_emulation_reset_counters()
    assert left == 0, f"a kernel left a counter of its blocks at {left}: later launches would go wrong"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "multiprocessors" in metafunc.fixturenames:
        counts = [1, 5] if emulation is not None else ["all"]
        metafunc.parametrize("multiprocessors", counts, indirect=True, ids=lambda count: f"{count}_sms")


@pytest.fixture
def emulated() -> bool:
    """Whether the emulation runs the CUDA kernels."""
    return emulation is not None


@pytest.fixture
def count_launches() -> Callable[[], int]:
    """How many kernels were launched so far; only the emulation can tell."""
    if emulation is None:
        pytest.skip("counted under --emulate-cuda")
    return emulation.library.cuda_emulation_launches


@pytest.fixture
def last_kernel() -> Callable[[], str]:
    """The name of the kernel that was launched last, template arguments included; only the emulation can tell."""
    if emulation is None:
        pytest.skip("asked under --emulate-cuda")
    library = emulation.library
    return lambda: library.cuda_emulation_last_kernel().decode()


@pytest.fixture
def cuda_device(emulated: bool) -> str:
    """Where CUDA kernels run: for tests that the CPU's kernels would not pass, or do not need."""
    return "cpu" if emulated else "cuda"


@pytest.fixture
def multiprocessors(request: pytest.FixtureRequest) -> int:
    """How many the device has; a test that asks for it runs on several emulated devices."""
    if emulation is None:
        return torch.cuda.get_device_properties().multi_processor_count
    emulation.set_device(request.param)
    return int(request.param)


@pytest.fixture
def resident_blocks(multiprocessors: int, emulated: bool) -> int:
    """How many of a kernel run at the same time: the emulation's two a multiprocessor, a plain kernel's three."""
    return multiprocessors * (2 if emulated else 3)


@pytest.fixture
def with_clusters() -> Callable[..., None]:
    """The emulated device from here on; a GPU stays as it is. A cluster it claims may be one it cannot place."""

    def set_device(multiprocessors: int, largest_cluster: int, placeable_cluster: int = 16) -> None:
        if emulation is not None:
            emulation.set_device(multiprocessors, largest_cluster, placeable_cluster)

    return set_device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if emulation is None:
        return
    kernels = emulation.library.cuda_emulation_kernels().decode()
    if (file := config.getoption("--emulated-kernels")) is not None:
        file.write_text(kernels)
    launches = emulation.library.cuda_emulation_launches()
    switches = emulation.library.cuda_emulation_switches()
    count = len(kernels.splitlines())
    terminalreporter.write_line(
        f"CUDA emulation: {count} kernels, {launches} launches, {switches / 1e6:.1f} million switches"
    )
