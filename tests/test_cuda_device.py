"""How the ops behave on a device: streams, the current device, no waiting, memory, bad targets, bitwise repetition."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import product

import cases
import pytest
import torch
from comparison import assert_bitwise_equal, check_softmax_ce
from cuda_problems import PROBLEMS, Problem, draw, loss_of, renew, step
from torch import Tensor

import torchce.functional
from torchce import ops

pytestmark = pytest.mark.cuda

COUNTERS = 1 << 20  # kCounters in csrc/cuda/device.cu
A_WHILE = 20_000_000  # cycles, 10 ms at 2 GHz: far longer than it takes to queue a step


def assert_all_equal(results: list[Tensor], expected: list[Tensor], what: str) -> None:
    for number, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert_bitwise_equal(result, wanted, f"{what}, result {number}")


# --- streams, devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_runs_on_the_current_stream(name: str) -> None:
    """The inputs are written late on that stream; on any other one the old values would be read."""
    problem = PROBLEMS[name]
    expected = step(problem, draw(problem, "cuda", 1))
    inputs, fresh = draw(problem, "cuda", 0), draw(problem, "cuda", 1)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        renew(inputs, fresh)
        results = step(problem, inputs)
    stream.synchronize()
    assert_all_equal(results, expected, "a side stream")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", PROBLEMS)
def test_another_than_the_current_device(name: str) -> None:
    """Launched where the tensors are, and the current device is what it was, after an error too."""
    problem = PROBLEMS[name]
    torch.cuda.set_device(0)
    results = step(problem, draw(problem, "cuda:1", 0))
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in results)
    if len({torch.cuda.get_device_name(d) for d in (0, 1)}) == 1:
        assert_all_equal(
            [result.to("cuda:0") for result in results], step(problem, draw(problem, "cuda:0", 0)), "cuda:1"
        )
    with pytest.raises(RuntimeError, match="different devices"):
        ops.softmax_ce_forward(
            torch.zeros(2, 3, device="cuda:1"),
            torch.zeros(2, dtype=torch.int64, device="cuda:0"),
            None,
            None,
            1,
            -100,
            0.0,
        )
    assert torch.cuda.current_device() == 0


def test_logits_on_the_cpu_beside_a_cuda_target() -> None:
    """The target alone leads the dispatcher to the CUDA op."""
    target = torch.zeros(2, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="logits: expected a CUDA device"):
        ops.softmax_ce_forward(torch.zeros(2, 3), target, None, None, 1, -100, 0.0)


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_host_never_waits(name: str, reduction: str, request: pytest.FixtureRequest) -> None:
    """torch finds no sync of its own, and the step returns while the device is still busy with what came before."""
    problem = PROBLEMS[name]
    inputs = draw(problem, "cuda", 0)
    expected = step(problem, inputs, reduction)  # the first launch of a kernel loads it, which may wait
    request.getfixturevalue("sync_is_an_error")
    torch.cuda._sleep(10 * A_WHILE)
    asleep = torch.cuda.Event()
    asleep.record()
    results = step(problem, inputs, reduction)
    assert not asleep.query()
    torch.cuda.set_sync_debug_mode("default")
    assert_all_equal(results, expected, reduction)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4096, 4096), (128, 128256), (8, 128, 128, 128)], ids=["block", "parts", "across"])
@pytest.mark.parametrize("kind", ["index", "probability", "bce"])
def test_peak_memory_is_the_gradient(kind: str, shape: tuple[int, ...]) -> None:
    """Forward: some numbers a row and a block. Backward: one tensor of the logits' size for each gradient."""
    logits = torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    if kind == "index":
        target = torch.randint(shape[1], cases.index_shape(shape), device="cuda")
        loss_function = torchce.functional.cross_entropy
    else:
        target = torch.rand(shape, device="cuda", dtype=torch.bfloat16)
        functional = torchce.functional
        loss_function = (
            functional.cross_entropy if kind == "probability" else functional.binary_cross_entropy_with_logits
        )
    rows = logits.numel() // shape[1]
    small = 16 * rows + (1 << 20)  # two or three float32 a row; partial sums of the blocks, rounding of the allocator
    gradient = logits.numel() * logits.element_size()
    assert small < gradient / 4

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = loss_function(logits, target)
    assert torch.cuda.max_memory_allocated() - before <= small
    loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert gradient <= peak <= gradient + small


# --- bad targets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 10), (40, 5000), (4, 50257), (4, 19, 8, 8)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", cases.INDEX_DTYPES, ids=cases.dtype_id)
def test_bad_targets_harm_nobody(dtype: torch.dtype, smoothing: float, shape: tuple[int, ...]) -> None:
    """Their rows are NaN, in every regime; all other rows and all later calls are right."""
    logits = cases.normal(shape, torch.float32, "cuda").requires_grad_()
    target = cases.indices(cases.index_shape(shape), shape[1], dtype, "cuda")
    weight = cases.uniform([shape[1]], torch.float32, "cuda")
    info = torch.iinfo(dtype)
    values = [value for value in (-1, shape[1], 200, info.min, info.max) if info.min <= value <= info.max]
    values = [value for value in values if not 0 <= value < shape[1]]
    bad = torch.zeros(target.shape, dtype=torch.bool, device="cuda")
    for value, at in product(values, (0, -1)):
        target[at] = value
        bad[at] = True
        loss = torchce.functional.cross_entropy(logits, target, weight, reduction="none", label_smoothing=smoothing)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.equal(loss.isnan(), bad)
        assert torch.equal(grad.isnan().any(1), bad)
        assert torch.equal(grad.isnan().all(1), bad)
        assert torchce.functional.cross_entropy(logits, target).isnan()
    torch.cuda.synchronize()
    check_softmax_ce(logits, cases.softmax_target("index", shape, torch.float32, "cuda"))


def test_checks_on_request() -> None:
    """TORCHCE_CHECK_TARGETS=1 makes a bad index the IndexError it is on the CPU; read when torchce is imported."""
    code = """if True:
        import torch, torchce
        logits = torch.zeros(3, 5, device="cuda")
        good = torchce.functional.cross_entropy(logits, torch.tensor([0, 4, -100], device="cuda"))
        assert good.isfinite()
        try:
            torchce.functional.cross_entropy(logits, torch.tensor([0, 5, 4], device="cuda"))
        except IndexError as error:
            print(error)
    """
    environment = {**os.environ, "TORCHCE_CHECK_TARGETS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Target 5 is out of bounds" in result.stdout
    assert "row 1 of 3" in result.stdout


# --- the same bits every time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_hundred_runs_on_four_streams(name: str) -> None:
    """Launches overlap, each with a counter of its own."""
    problem = PROBLEMS[name]
    inputs = draw(problem, "cuda", 0)
    expected = step(problem, inputs)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    runs = []
    for number in range(100):
        with torch.cuda.stream(streams[number % 4]):
            runs.append(step(problem, inputs))
    torch.cuda.synchronize()
    for number, results in enumerate(runs):
        assert_all_equal(results, expected, f"run {number}")


def test_threads_with_streams_of_their_own() -> None:
    """Host threads draw from the same ring of counters."""
    problems = [PROBLEMS[name] for name in ("lanes", "parts", "segmentation", "bce")]
    inputs = [draw(problem, "cuda", 0) for problem in problems]
    expected = [step(problem, each) for problem, each in zip(problems, inputs, strict=True)]
    torch.cuda.synchronize()
    runs: list[list[list[Tensor]]] = [[] for _ in problems]

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                runs[number].append(step(problems[number], inputs[number]))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results_of_runs in enumerate(runs):
        assert len(results_of_runs) == 50
        for results in results_of_runs:
            assert_all_equal(results, expected[number], f"thread {number}")


def test_more_launches_than_counters() -> None:
    """Every counter is used more than once, so each must be left at 0 by whoever used it."""
    problems = [PROBLEMS["lanes"], Problem("index", (64, 32000)), PROBLEMS["bce_packs"]]
    launches = COUNTERS // 16  # of which a third take 65 counters, one for each row that is cut into parts
    inputs = [draw(problem, "cuda", 0) for problem in problems]
    with torch.no_grad():
        expected = [loss_of(problem, each) for problem, each in zip(problems, inputs, strict=True)]
        for number in range(launches):
            which = number % len(problems)
            loss = loss_of(problems[which], inputs[which])
            if number % 997 == 0 or number > launches - 3000:
                assert_bitwise_equal(loss, expected[which], f"launch {number}")
