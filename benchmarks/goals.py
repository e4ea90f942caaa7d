"""What is wanted of which problem, as data; judged against measured cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.contenders import COMPILE, COPY, EAGER, IN_PLACE, LIGER, QUACK, TORCH_CHUNKED, TORCHCE
from benchmarks.problems import (
    BCE,
    CHANNELS_LAST,
    CPU,
    CROSS_ENTROPY,
    CUDA,
    DIVERGENCES,
    KL_DIV,
    LINEAR_CROSS_ENTROPY,
    SOFT64,
    TRAINED,
    Problem,
)

SPEEDUP = "speed-up"
COPY_SHARE = "share of copy"
PEAK = "peak memory"

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"

# O(N) in figures: statistics, losses and their kind take less a row, partial sums and wrappers less in all.
BYTES_PER_ROW = 64
BYTES_IN_ALL = 64 << 10

# What a piece of a linear layer's logits may take, as torchce.functional.linear_cross_entropy says of its chunk_bytes.
PIECE_BYTES, PIECES = 64 << 20, 16
SUM_BYTES = 4  # a sum over pieces of 16-bit gradients is of float32


@dataclass(frozen=True)
class MemoryUnit:
    """What peak memory is counted in, beyond what it may hold besides."""

    unit: str
    unit_bytes: Callable[[Case], float]
    rest: str
    rest_bytes: Callable[[Case], int]

    def used(self, case: Case, peak_bytes: int) -> float:
        return (peak_bytes - self.rest_bytes(case)) / self.unit_bytes(case)


def _row_bytes(case: Case) -> int:
    rows = 0 if case.op == BCE else case.elements // case.shape[1]
    return BYTES_PER_ROW * rows + BYTES_IN_ALL


def _layer_bytes(case: Case) -> int:
    """Gradients of a linear layer's input and weight, and the sums that the latter is rounded from."""
    rows, hidden, classes = case.extents
    sum_bytes = SUM_BYTES if case.element_bytes < SUM_BYTES else 0
    weights = classes * hidden
    return (rows * hidden + weights) * case.element_bytes + weights * sum_bytes + _row_bytes(case)


def _piece_bytes(case: Case) -> float:
    return max(PIECE_BYTES, case.logits_bytes / PIECES)


OF_LOGITS = MemoryUnit("logits", lambda case: case.logits_bytes, "O(N)", _row_bytes)
OF_PIECES = MemoryUnit("pieces of logits", _piece_bytes, "gradients", _layer_bytes)


@dataclass(frozen=True)
class Goal:
    """``quantity`` of ``contender`` is at least ``bound``; peak memory at most that in units of ``memory``."""

    device: str
    quantity: str
    bound: float
    op: str | None = None  # None: both losses of logits
    sizes: tuple[str, ...] | None = None  # None: all; exact, or with a variant: "1024x1000 soft"
    dtypes: tuple[str, ...] = TRAINED
    phases: tuple[str, ...] = (TRAINING,)
    contender: str = TORCHCE
    peers: tuple[str, ...] = (EAGER, COMPILE)  # a speed-up is over the fastest of them
    memory: MemoryUnit = OF_LOGITS

    def applies(self, case: Case) -> bool:
        return (
            case.device == self.device
            and (case.op in (CROSS_ENTROPY, BCE) if self.op is None else case.op == self.op)
            and (self.sizes is None or f"{case.size} {case.variant}".rstrip() in self.sizes)
            and case.dtype in self.dtypes
            and case.phase in self.phases
        )

    def value(self, case: Case) -> float | None:
        """The measured quantity, or None if any part of it was not measured."""
        if self.quantity == SPEEDUP:
            return case.speedup(self.contender, case.fastest_peer(self.peers))
        if self.quantity == COPY_SHARE:
            return case.copy_share(self.contender)
        row = case.rows.get(self.contender)
        return None if row is None or row.peak_bytes is None else self.memory.used(case, row.peak_bytes)

    def met(self, value: float) -> bool:
        return value <= self.bound if self.quantity == PEAK else value >= self.bound

    def describe(self, value: float) -> str:
        """Such as ``3.41x eager|compile (>= 3x)``."""
        if self.quantity == SPEEDUP:
            return f"{value:.2f}x {'|'.join(self.peers)} (≥ {self.bound:.3g}x)"
        if self.quantity == COPY_SHARE:
            return f"{value:.0%} of {COPY} (≥ {self.bound:.3g})"
        return f"{max(value, 0):.2f} {self.memory.unit} + {self.memory.rest} (≤ {self.bound:.3g})"


@dataclass(frozen=True)
class Verdict:
    case: Case
    goal: Goal
    value: float

    @property
    def met(self) -> bool:
        return self.goal.met(self.value)

    def __str__(self) -> str:
        return self.goal.describe(self.value)


def verdicts(case: Case) -> list[Verdict]:
    """Every goal that applies and whose quantity was measured."""
    found = [(goal, goal.value(case)) for goal in GOALS if goal.applies(case)]
    return [Verdict(case, goal, value) for goal, value in found if value is not None]


def _sizes(problems: list[Problem]) -> tuple[str, ...]:
    return tuple(f"{problem.size} {problem.variant}".rstrip() for problem in problems)


_CE_2D = [p for p in CUDA if p.op == CROSS_ENTROPY and len(p.shape) == 2 and not p.launch_bound and not p.variant]
_QUACK_GRID = _sizes([p for p in _CE_2D if p.rows >= 8192])
_LARGE_C = _sizes([p for p in _CE_2D if p.rows >= 8192 and p.classes >= 32768])
_LARGE_BCE = _sizes([p for p in CUDA if p.op == BCE and p.rows * p.classes >= 1 << 24])
_LARGE_CPU = ("512x32000", "256x128256")
_HEADS = _sizes([p for p in CPU if p.op == LINEAR_CROSS_ENTROPY])
_NOT_LAUNCH_BOUND = _sizes([p for p in CPU if p.op in (CROSS_ENTROPY, BCE) and not p.launch_bound])
_MIXED = _sizes([p for p in CPU if p.variant in (SOFT64, CHANNELS_LAST)])
_ALIKE = tuple(size for size in _NOT_LAUNCH_BOUND if size not in _MIXED)

CPU_GOALS = [
    Goal("cpu", SPEEDUP, 3.0, CROSS_ENTROPY, _LARGE_CPU, ("float32",)),
    Goal("cpu", SPEEDUP, 2.0, CROSS_ENTROPY, _LARGE_CPU, ("bfloat16",)),
    Goal("cpu", SPEEDUP, 2.0, CROSS_ENTROPY, ("4096x1000", "65536x32")),
    Goal("cpu", SPEEDUP, 2.0, CROSS_ENTROPY, ("8x19x256x256", "1024x1000 soft")),
    # Never slower, whatever the size.
    Goal("cpu", SPEEDUP, 1.0, sizes=_NOT_LAUNCH_BOUND, phases=(FORWARD,)),
    Goal("cpu", SPEEDUP, 1.0, CROSS_ENTROPY, ("256x1000",)),
    Goal("cpu", SPEEDUP, 1.0, sizes=_MIXED),
    Goal("cpu", SPEEDUP, 1.0, sizes=_NOT_LAUNCH_BOUND, dtypes=("float64",), phases=(FORWARD, TRAINING)),
    Goal("cpu", SPEEDUP, 3.0, BCE, ("512x32000",)),
    Goal("cpu", SPEEDUP, 2.5, BCE, ("4096x1000",)),
    Goal("cpu", SPEEDUP, 6.0, sizes=_LARGE_CPU, contender=IN_PLACE),
    # Small sizes take at most 1.2 times eager's time.
    Goal("cpu", SPEEDUP, 1 / 1.2, sizes=("32x10",), phases=(FORWARD, TRAINING), peers=(EAGER,)),
    # Forward takes at most 1.6 times as long as copying its inputs. That copy moves each byte twice, in and out, and so
    # takes twice as long as the yardstick, which moves only as many bytes as forward does.
    Goal("cpu", COPY_SHARE, 1 / (2 * 1.6), sizes=_ALIKE, phases=(FORWARD,)),
    Goal("cpu", PEAK, 1.0),
    Goal("cpu", PEAK, 0.0, contender=IN_PLACE),
    # Pieces take at most a twentieth longer than whole logits that are overwritten.
    Goal("cpu", SPEEDUP, 1 / 1.05, LINEAR_CROSS_ENTROPY, _HEADS, peers=(IN_PLACE,)),
    Goal("cpu", SPEEDUP, 1.3, LINEAR_CROSS_ENTROPY, _HEADS, peers=(EAGER,)),
    Goal("cpu", SPEEDUP, 2.0, LINEAR_CROSS_ENTROPY, _HEADS, peers=(TORCH_CHUNKED,)),
    Goal("cpu", PEAK, 1 + 1 / 8, LINEAR_CROSS_ENTROPY, memory=OF_PIECES),
    Goal("cpu", SPEEDUP, 3.0, KL_DIV, peers=(EAGER,)),
    Goal("cpu", SPEEDUP, 1.5, KL_DIV, peers=(COMPILE,)),
    *(Goal("cpu", PEAK, 1.0, op) for op in DIVERGENCES),
]

CUDA_GOALS = [
    Goal("cuda", COPY_SHARE, 0.9, CROSS_ENTROPY, _QUACK_GRID, phases=(FORWARD, BACKWARD)),
    Goal("cuda", COPY_SHARE, 0.9, BCE, _LARGE_BCE, phases=(FORWARD, BACKWARD)),
    Goal(
        *("cuda", COPY_SHARE, 0.8, CROSS_ENTROPY, ("8x19x512x1024", "16x150x512x512", "4x1000x64x64")),
        phases=(FORWARD, BACKWARD),
    ),
    Goal("cuda", SPEEDUP, 1.0, CROSS_ENTROPY, peers=(QUACK,)),
    Goal("cuda", SPEEDUP, 1.3, CROSS_ENTROPY, peers=(LIGER,)),
    Goal("cuda", SPEEDUP, 2.0, CROSS_ENTROPY, _LARGE_C, peers=(COMPILE,)),
    Goal("cuda", SPEEDUP, 3.0, CROSS_ENTROPY, _LARGE_C, peers=(EAGER,)),
    Goal("cuda", SPEEDUP, 4.0, BCE, _LARGE_BCE, peers=(EAGER,)),
    Goal("cuda", SPEEDUP, 1.2, BCE, _LARGE_BCE, peers=(COMPILE,)),
    Goal("cuda", SPEEDUP, 1.0, sizes=("32x10", "4096x10"), phases=(FORWARD, BACKWARD, TRAINING)),
    Goal("cuda", SPEEDUP, 0.95, phases=(FORWARD, BACKWARD, TRAINING), peers=(EAGER, COMPILE, LIGER, QUACK)),
    Goal("cuda", PEAK, 1.0),
    Goal("cuda", PEAK, 0.0, contender=IN_PLACE),
    Goal("cuda", PEAK, 1 + 1 / 8, LINEAR_CROSS_ENTROPY, memory=OF_PIECES),
]

GOALS = [*CPU_GOALS, *CUDA_GOALS]
