"""Blocks a multiprocessor, and the share of a copy's bandwidth that a kernel can be expected to reach.

A model, of which docs/cuda.md says how it was derived and how far off it may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

THREADS = 256  # a block's, in every kernel
WARPS = THREADS // 32

# A multiprocessor of compute capability 9.0.
SCHEDULERS = 4  # each issues an instruction a cycle
MOST_WARPS = 64
REGISTERS = 65536
REGISTER_UNIT = 256  # registers are given to a warp in such units, from its scheduler's quarter
SHARED_MEMORY = 228 * 1024
RESERVED_SHARED_MEMORY = 1024  # a block's, for the system

CLOCK = 1.85e9  # Hz
LATENCY = 635e-9  # seconds from a load to its data: the middle of 570 to 700 ns
SHARPNESS = 5  # of the minimum of limits: the power at which the model comes closest to a queue (docs/cuda.md)


@dataclass(frozen=True)
class Gpu:
    name: str
    multiprocessors: int
    copy: float  # bytes a second that a copy within the device moves, read and written


H100 = Gpu("H100", 132, 3.0e12)
H200 = Gpu("H200", 132, 4.3e12)


def blocks_of_multiprocessor(registers: int, shared_memory: int) -> int:
    """How many blocks fit by a thread's registers and a block's shared memory, without what the system reserves."""
    of_warp = math.ceil(registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
    warps = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS
    by_shared_memory = SHARED_MEMORY // (shared_memory + RESERVED_SHARED_MEMORY)
    return min(warps // WARPS, MOST_WARPS // WARPS, by_shared_memory)


def expected_share(gpu: Gpu, blocks: int, instructions: float, trips: float, moved: float) -> float:
    """Of the copy's bandwidth.

    Args:
        blocks: On a multiprocessor.
        instructions: That a warp issues for one task.
        trips: To memory that follow one another in a task: each starts when the data of the one before are there.
        moved: Bytes that a warp reads and writes for one task.
    """
    available = gpu.copy / gpu.multiprocessors / CLOCK  # bytes a cycle and multiprocessor
    by_issue = SCHEDULERS * moved / instructions
    # The warps of a block go on together, WARPS / SCHEDULERS of them on each scheduler.
    cycles_of_task = trips * LATENCY * CLOCK + instructions * WARPS / SCHEDULERS
    by_latency = blocks * WARPS * moved / cycles_of_task
    limits = (1.0, by_issue / available, by_latency / available)
    return sum(limit**-SHARPNESS for limit in limits) ** (-1 / SHARPNESS)
