"""What the CUDA compiler made of the kernels, read from the built extension: registers, local memory, load widths.

This needs no GPU, only torchce._cuda and cuobjdump (of a CUDA toolkit, or the one triton brings).
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache

import pytest
from cuda_sass import tools
from cuda_sass.tools import CUOBJDUMP, EXTENSION, dump

# 256 threads of 128 registers leave room for two blocks on a multiprocessor (kBlocksToFit in csrc/cuda/launch_shape.h).
MOST_REGISTERS = 128
# What the plan of forward_backward leaves to the kernels' own variables (kDeclaredSharedMemory in softmax_ce_plan.h).
MOST_SHARED_MEMORY = 2048
KERNELS = {
    "forward_by_lanes",
    "forward_by_block",
    "forward_by_parts",
    "forward_across",
    "backward_along",
    "backward_across",
    "forward_backward_by_lanes",
    "forward_backward_by_cluster",
    "row_outputs",
    "backward_scale",
    "forward_by_teams",
    "backward_by_teams",
    "binary_forward",
    "binary_backward",
    "forward",
    "backward",
}


# Kernels that are compiled once for every size of a pack.
BY_PACK = {"forward_across", "backward_across", "forward", "backward", "binary_forward", "binary_backward"}

pytestmark = [
    pytest.mark.skipif(EXTENSION is None, reason="torchce._cuda is not built"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump"),
]


def kernel_name(symbol: str) -> str:
    """``forward_by_lanes`` of ``_ZN7torchce4cuda10softmax_ce16forward_by_lanesI...``; empty for no loss's kernel."""
    found = re.search(r"(?:softmax_ce|sigmoid_bce|divergence)\d+([a-z_]+?)I", symbol)
    return found[1] if found else ""


def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel symbol) -> REG, STACK, LOCAL, ..."""
    return {key: used for key, used in tools.resources().items() if kernel_name(key[1])}


@cache
def instructions() -> dict[str, set[str]]:
    """Kernel symbol -> the memory instructions in it, of one architecture: disassembling each takes half a minute."""
    arches = {arch for arch, _ in resources()}
    arch = "sm_90" if "sm_90" in arches else min(arches)
    result = defaultdict(set)
    symbol = ""
    for line in dump("-arch", arch, "-sass").splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            symbol = found[1]
        elif kernel_name(symbol) and (found := re.search(r"\s((?:LD|ST)[GL]\.[A-Z0-9.]+)", line)):
            result[symbol].add(found[1])
    return result


def test_every_kernel_is_there() -> None:
    assert {kernel_name(symbol) for _, symbol in resources()} == KERNELS
    symbols = defaultdict(set)
    for arch, symbol in resources():
        symbols[arch].add(symbol)
    assert len({frozenset(s) for s in symbols.values()}) == 1, "the architectures differ in their kernels"


def test_no_local_memory_and_registers_within_budget() -> None:
    """A spill is memory traffic that no one counts."""
    for key, used in resources().items():
        assert used["STACK"] == used["LOCAL"] == 0, key
        assert used["REG"] <= MOST_REGISTERS, key
        assert used["SHARED"] <= MOST_SHARED_MEMORY or "forward_backward" not in kernel_name(key[1]), key
    for symbol, used_instructions in instructions().items():
        assert not any(name.startswith(("LDL", "STL")) for name in used_instructions), symbol


def has_packs(symbol: str) -> bool:
    """Kernels along rows find aligned packs by themselves; across rows and in BCE the pack size is an argument, V."""
    if kernel_name(symbol) == "backward_scale":
        return False  # it reads class by class
    if kernel_name(symbol) == "row_outputs":
        return "Lb1E" in symbol  # kAdjacent
    if "by_teams" in kernel_name(symbol):
        return "EELb1EEEv" in symbol  # the last argument: kAdjacent
    across = kernel_name(symbol) in BY_PACK
    return not across or "Li1EEEv" not in symbol


def widest(symbol: str) -> tuple[int, int]:
    """Bits of a load and of a store. What is computed in float64 comes two at a time: float32 elements in 8 bytes."""
    float_logits = "FloatInDouble" in symbol
    in_double = float_logits or "IdNS_10softmax_ce" in symbol
    float_target = (in_double and "ProbabilitiesIfE" in symbol) or "backwardIdf" in symbol
    of_target = "GradientOfE1E" in symbol  # reads the logits alone
    load = 64 if float_logits and (float_target or of_target) else 128
    return load, 64 if (float_target if of_target else float_logits) else 128


def test_hot_paths_use_the_widest_accesses() -> None:
    packed = {symbol: names for symbol, names in instructions().items() if has_packs(symbol)}
    assert {kernel_name(symbol) for symbol in packed} == KERNELS - {"backward_scale"}
    for symbol, names in packed.items():
        load, store = widest(symbol)
        assert any(re.fullmatch(rf"LDG\.[A-Z0-9.]*{load}[A-Z0-9.]*", name) for name in names), symbol
        if "backward" in kernel_name(symbol):
            assert any(re.fullmatch(rf"STG\.[A-Z0-9.]*{store}[A-Z0-9.]*", name) for name in names), symbol


def test_nothing_is_read_through_the_cache_of_constants() -> None:
    """Gradients may be written where the logits lie: what that cache holds of them would then be out of date."""
    for symbol, names in instructions().items():
        assert not any("CONSTANT" in name for name in names), symbol
