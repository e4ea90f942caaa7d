"""The SIMD of the CPU kernels: that the built library has it, and that every level this machine runs is right."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from torchce import _C

HERE = Path(__file__).resolve().parent
LEVELS = _C.build_info()["cpu_levels"]
WIDEST = LEVELS[0]
REGISTERS = {"x86-64-v4": "zmm", "x86-64-v3": "ymm", "baseline": "xmm"}
NAMESPACES = {"x86-64-v4": "x86_v4", "x86-64-v3": "x86_v3", "baseline": "baseline"}
POLYNOMIAL = 5  # multiply-adds of the shortest one
PACKED = r"(?:fn?m\w+|mul)ps"
SINGLE = r"fn?m\w+ss|mulss|pinsr\w|pextr\w|insertps|extractps"  # arithmetic on one number, and moves of one lane

# Kernels whose time goes into float32 arithmetic, as the start of their demangled names.
KERNELS = (
    r"along::(?:forward|RowSums)<float, torchce::softmax_ce::Indices>",
    r"along::(?:forward|RowSums)<torchce::BFloat16, torchce::softmax_ce::Indices>",
    r"along::(?:forward|RowSums)<float, torchce::softmax_ce::Probabilities<float> ?>",
    r"along::backward<float, torchce::softmax_ce::Indices, ",
    r"along::backward<torchce::BFloat16, torchce::softmax_ce::Indices, ",
    r"along::backward<torchce::Half, torchce::softmax_ce::SmoothedIndices, ",
    r"along::backward<float, torchce::softmax_ce::General<torchce::softmax_ce::Indices>, .*TiltedExp",
    r"along::entropies<float>",
    r"across::forward(_strip)?<float, torchce::softmax_ce::Indices",
    r"across::forward(_strip)?<torchce::BFloat16, torchce::softmax_ce::Indices",
    r"across::backward(_strip)?<float, torchce::softmax_ce::Indices",
    r"across::backward(_strip)?<torchce::BFloat16, torchce::softmax_ce::Indices",
    r"sigmoid_bce_forward\(.*<float, float>",
    r"sigmoid_bce_forward\(.*<torchce::BFloat16, torchce::BFloat16>",
    r"sigmoid_bce_gradient<false>\(.*<float, float>",
    r"sigmoid_bce_gradient<false>\(.*<torchce::BFloat16, torchce::BFloat16>",
    r"binary_divergence_forward\(.*<torchce::binary_divergence::OfLogits, float, float>",
    r"binary_divergence_forward\(.*<torchce::binary_divergence::OfProbability, float, float>",
    r"binary_divergence_forward\(.*<torchce::binary_divergence::Entropy, float, float>",
    r"binary_divergence_gradient<false>\(.*<torchce::binary_divergence::OfLogits, float, float>",
    r"binary_divergence_gradient<true>\(.*<torchce::binary_divergence::OfLogits, float, float>",
    r"divergences::forward_(group|strip)<float, ",
    r"divergences::backward_(group|strip)<float, ",
)


@lru_cache
def functions() -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of every function of the library, by demangled name."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", "--section=.text", _C.__file__]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    body: list[tuple[int, str]] = []
    for line in text.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = found.setdefault(header[1], [])
        elif instruction := re.match(r" *([0-9a-f]+):\t(.*)", line):
            body.append((int(instruction[1], 16), instruction[2]))
    return found


def count(instructions: list[str], pattern: str, register: str = "") -> int:
    return sum(register in text and bool(re.match(rf"v?(?:{pattern}) ", text)) for text in instructions)


def hot_loops(body: list[tuple[int, str]], register: str) -> list[list[str]]:
    """The instructions of the loops that evaluate a polynomial on whole registers, and hold no smaller such loop."""
    jumps = [(int(jump[1], 16), at) for at, text in body if (jump := re.match(r"j\w+ +([0-9a-f]+)", text))]
    spans = [(to, at) for to, at in jumps if body[0][0] <= to <= at]
    loops: list[tuple[int, int]] = []
    for to, at in sorted(spans, key=lambda span: span[1] - span[0]):
        inside = [text for address, text in body if to <= address <= at]
        holds_another = any(to <= other_to and other_at <= at for other_to, other_at in loops)
        if not holds_another and count(inside, PACKED, register) >= POLYNOMIAL:
            loops.append((to, at))
    return [[text for address, text in body if to <= address <= at] for to, at in loops]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("level", LEVELS)
def test_hot_loops_are_vector_code(level: str, kernel: str) -> None:
    """There is one that works on whole registers and hardly ever lane by lane.

    Others need not be like that: remainders and strides are read lane by lane, and a row's own few numbers stand where
    the compiler put them. But where the bulk falls back to lanes, wholly or in one step, no loop is like that.
    """
    register = "%" + REGISTERS[level]
    name = re.compile(rf"torchce::cpu::{NAMESPACES[level]}::(?:{kernel})")
    bodies = {function: body for function, body in functions().items() if body and name.search(function)}
    assert bodies, "no such function in the library"
    loops = [loop for body in bodies.values() for loop in hot_loops(body, register)]
    assert loops, f"no vector loop in {', '.join(bodies)}"
    counts = [(count(loop, PACKED, register), count(loop, SINGLE)) for loop in loops]
    assert any(single * 4 <= packed for packed, single in counts), f"(packed, lane by lane): {counts}"


def is_shared(function: str) -> bool:
    """Whether several levels compile it, to judge by a name that holds no level and is not the host code's."""
    return "torchce::" in function and re.search(r"torchce::(?:cpu|host)::|torch::stable", function) is None


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_levels_share_no_function() -> None:
    """What several of them compile is inlined: the linker keeps one copy, in whichever level's instructions."""
    assert is_shared("torchce::softmax_ce::TargetClass::target_at(torchce::softmax_ce::Rows const&)")
    assert is_shared("float torchce::load_as<float>(torchce::DType, void const*, long)")
    assert sum("torchce::cpu::" in name for name in functions()) > 100
    assert [name for name in functions() if is_shared(name)] == []


def run_python(level: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCHCE_CPU_LEVEL": level}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("level", LEVELS)
def test_environment_chooses_the_level(level: str) -> None:
    result = run_python(level, "-c", "import torchce; print(torchce.build_info()['cpu_level'])")
    assert result.stdout.strip() == level, result.stderr


def test_unknown_level_is_refused() -> None:
    result = run_python("x86-64-v9", "-c", "import torchce; torchce.build_info()")
    assert result.returncode != 0
    assert "TORCHCE_CPU_LEVEL is 'x86-64-v9', but this machine has" in result.stderr


@pytest.mark.parametrize("level", [level for level in LEVELS if level != WIDEST])
def test_values_at_lower_levels(level: str) -> None:
    """All tests of the kernels, at the levels that are not the default here: the suite itself runs at that one."""
    kernels = [
        "softmax_ce",
        "softmax_ce_rounding",
        "softmax_ce_forward_backward",
        "infinite_weights",
        "sigmoid_bce",
        "divergence",
        "binary_divergence",
    ]
    selection = [*(f"tests/test_{name}.py" for name in kernels), "-k", "not cuda"]
    result = run_python(level, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selection)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
