"""The CUDA kernels without a GPU: run on the CPU by tests/cuda_emulation, under AddressSanitizer and UBSan.

The tests that run there are those of a GPU, in processes of their own (``pytest --emulate-cuda``). Faults planted into
the kernels show that they would be caught.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cuda_emulation import build, faults

pytestmark = [
    pytest.mark.skipif(not build.CSRC.is_dir(), reason="these tests stand beside an installed wheel, not its source"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

# Two processes of about the same duration. Gradient checks in float64 add nothing to the kernels' own tests.
PARTS = [
    [
        "tests/test_cuda_regimes.py",
        "tests/test_softmax_ce_forward_backward.py",
        "tests/test_infinite_weights.py",
        "tests/test_softmax_ce_rounding.py",
        "tests/test_ops.py",
    ],
    [
        "tests/test_softmax_ce.py",
        "tests/test_softmax_ce_own.py",
        "tests/test_sigmoid_bce.py",
        "tests/test_determinism.py",
        "tests/test_divergence.py",
        "tests/test_binary_divergence.py",
    ],
]


def environment(*, sanitized: bool = False) -> dict[str, str]:
    """One thread for torch's reference: it has small tensors and neighbours that want the other cores."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | (build.sanitized_environment() if sanitized else {})


def run(command: list[str], env: dict[str, str]) -> str:
    """What the command prints; its failure is the test's."""
    result = subprocess.run(
        command, cwd=build.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert result.returncode == 0, f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-20_000:]}"
    return result.stdout


@pytest.mark.parametrize(
    "flags",
    [["-O2"], ["-O1", *build.SANITIZERS], ["-O1", "-DCUDA_EMULATION_UCONTEXT"]],
    ids=["plain", "sanitized", "ucontext"],
)
def test_the_emulation_itself(tmp_path: Path, flags: list[str]) -> None:
    """Barriers, shuffles, atomics, the faults it refuses, and that it still notices missing barriers."""
    sources = [str(build.HERE / f"{name}.cpp") for name in ("self_test", "machine", "fiber")]
    program = str(tmp_path / "self_test")
    run(["g++", "-std=c++20", "-rdynamic", *flags, *sources, "-o", program], environment())
    print(run([program], environment()))


def kernels_of(library: Path) -> set[str]:
    """Every instantiation of every ``__global__`` template, as reports name them."""
    sources = "".join(path.read_text() for path in build.CSRC.glob("cuda/*.cuh"))
    names = re.findall(r"__global__[^;{]*?\b(\w+)\((?!kThreads)", sources)
    assert len(names) == sources.count("__global__"), names
    symbols = subprocess.check_output(["nm", "-C", "--defined-only", str(library)], text=True)
    kernel = re.compile(rf"^\w+ [WTt] (void torchce::cuda::\w+::(?:{'|'.join(names)})<.*\))$", re.MULTILINE)
    return {name for name in kernel.findall(symbols) if "::{lambda" not in name}


def test_kernels(tmp_path: Path) -> None:
    """All of them, right, within the bounds of their memory, and without undefined behaviour."""
    library = build.build(sanitized=True)
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulate-cuda", "--sanitized"]
    env = environment(sanitized=True)
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(run, [*pytest_command, f"--emulated-kernels={tmp_path / str(number)}", *part], env)
            for number, part in enumerate(PARTS)
        ]
        for finished in runs:
            print("\n".join(finished.result().splitlines()[-3:]))
    launched = {name for number in range(len(PARTS)) for name in (tmp_path / str(number)).read_text().splitlines()}
    assert launched == kernels_of(library)


# A forward whose logits lie in `bytes` bytes from `offset` on: 3 * 1001 * 4 and 0 are right.
FORWARD_OF_WRONG_MEMORY = """
import sys, numpy, torch
library, size, offset = sys.argv[1], *map(int, sys.argv[2:])
torch.ops.load_library(library)
memory = numpy.zeros(size + offset, numpy.uint8)[offset : offset + 4].view(numpy.float32)
logits = torch.from_numpy(numpy.lib.stride_tricks.as_strided(memory, (3, 1001), (4004, 4)))
target = torch.zeros(3, dtype=torch.int64)
torch.ops.torchce_emulated.softmax_ce_forward(logits, target, None, None, 1, -100, 0.0)
"""


@pytest.mark.parametrize(
    ("size", "offset", "report"),
    [
        pytest.param(3 * 1001 * 4, 0, None, id="right"),
        pytest.param(3 * 1001 * 4 - 4, 0, "heap-buffer-overflow", id="one_too_short"),
        pytest.param(3 * 1001 * 4, 2, "misaligned address", id="misaligned"),
    ],
)
def test_sanitizers_watch_the_kernels(size: int, offset: int, report: str | None) -> None:
    """And say where in the kernel it happened, which runs on a stack of its own."""
    library = build.build(sanitized=True)
    command = [sys.executable, "-c", FORWARD_OF_WRONG_MEMORY, str(library), str(size), str(offset)]
    if report is None:
        run(command, environment(sanitized=True))
        return
    result = subprocess.run(command, env=environment(sanitized=True), capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert report in result.stderr
    assert re.search(r" in .*torchce::cuda::softmax_ce::sum_classes<float", result.stderr)


@pytest.fixture(scope="module")
def fault_report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What fails, by fault; under "" without any."""
    faults.plant()
    report = tmp_path_factory.mktemp("faults") / "report.json"
    path = os.pathsep.join([str(build.ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    run([sys.executable, "-m", "cuda_emulation.faults", str(report)], environment() | {"PYTHONPATH": path})
    return json.loads(report.read_text())


def test_without_a_fault_nothing_fails(fault_report: dict[str, Any]) -> None:
    assert fault_report[""]["messages"] == []
    assert fault_report[""]["passed"] > 100


@pytest.mark.parametrize("name", faults.FAULTS)
def test_fault_is_caught(fault_report: dict[str, Any], name: str) -> None:
    messages = fault_report[name]["messages"]
    assert messages, "nothing failed"
    assert faults.FAULTS[name].says in messages[0], messages[0][-3000:]
