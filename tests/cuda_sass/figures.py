"""The figures of the hot kernels in the built extension, and the table of them in docs/cuda.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from .kernels import KERNELS, Kernel, Problem
from .model import H100, H200, THREADS, Gpu, blocks_of_multiprocessor, expected_share
from .paths import around, hot_loop, loads_before_first_use, trips, waits_before
from .program import Program
from .tools import ARCH, EXTENSION, compiler, disassemble, resources

PAGE = Path(__file__).parents[2] / "docs" / "cuda.md"
BEGIN, END = "<!-- sass:begin -->", "<!-- sass:end -->"


@dataclass(frozen=True)
class Figures:
    """Of one kernel."""

    kernel: Kernel
    registers: int
    blocks: int
    instructions_a_turn: int
    loads: int  # before the first use
    instructions_a_task: int  # besides the turns
    trips_a_task: int  # of one turn, or of one after another where there are no tasks
    trips_a_turn: int  # more

    @property
    def instructions_a_pack(self) -> float:
        return self.instructions_a_turn / self.kernel.packs

    @property
    def bytes_in_flight(self) -> int:
        return self.loads * 16 * THREADS * self.blocks

    def share(self, gpu: Gpu, problem: Problem) -> float:
        return expected_share(
            gpu,
            self.blocks,
            instructions=problem.turns * self.instructions_a_turn + self.instructions_a_task + problem.instructions,
            trips=self.trips_a_task + (problem.turns - 1) * self.trips_a_turn + problem.trips,
            moved=problem.turns * self.kernel.packs * 32 * self.kernel.bytes_a_pack,
        )


def _matches(kernel: Kernel, binary: Path | None) -> list[str]:
    return [symbol for arch, symbol in resources(binary) if arch == ARCH and re.search(kernel.symbol, symbol)]


@cache
def _sass(binary: Path | None) -> dict[str, str]:
    return disassemble([symbol for kernel in KERNELS for symbol in _matches(kernel, binary)], binary)


def _symbol(kernel: Kernel, binary: Path | None) -> str:
    matches = _matches(kernel, binary)
    if len(matches) != 1:
        raise LookupError(f"{kernel.symbol} should match one kernel of {ARCH}, matches {matches}")
    return matches[0]


def waits_for_target(kernel: Kernel, binary: Path | None = EXTENSION) -> list[str]:
    """Where a row waits for its own index, of 64 bits, before its logits are asked for."""
    program = Program(_sass(binary)[_symbol(kernel, binary)])
    loop, _ = hot_loop(program, kernel.turns[0])
    return [f"{wait.address:#x} {wait.opcode}" for wait in waits_before(program, loop, "LDG.E.64")]


def measure(kernel: Kernel, binary: Path | None = EXTENSION) -> Figures:
    """Reads them from the binary.

    Raises:
        LookupError: not exactly one kernel there has the name.
        NoHotPath: no loop of it does what is stated.
    """
    symbol = _symbol(kernel, binary)
    program, used = Program(_sass(binary)[symbol]), resources(binary)[ARCH, symbol]
    loops, paths = zip(*(hot_loop(program, turn) for turn in kernel.turns), strict=True)
    first, *others = around(program, list(loops))

    def trips_of_task(turns: int) -> int:
        pieces = (list(path) * turns + piece for path, piece in zip(paths, others, strict=True))
        return trips(chain(first, *pieces))

    instructions_a_task = len(first) + sum(map(len, others))
    trips_a_turn = trips_of_task(3) - trips_of_task(2)
    return Figures(
        kernel,
        used["REG"],
        blocks_of_multiprocessor(used["REG"], used["SHARED"] + kernel.dynamic_shared_memory),
        sum(len(path) for path in paths),
        max(loads_before_first_use(path) for path in paths),
        instructions_a_task,
        trips_of_task(1) if instructions_a_task else trips_a_turn,
        trips_a_turn,
    )


def table(binary: Path | None = EXTENSION) -> str:
    """Markdown, from the first marker to the last."""
    head = (
        "kernel",
        "registers",
        "blocks",
        "instructions a pack",
        "bytes in flight",
        "problem",
        "expected, H100",
        "expected, H200",
    )
    lines = [
        BEGIN,
        f"Compiled by CUDA {compiler(binary)} for {ARCH}; `python -m tests.cuda_sass --write` writes this table.",
        "",
        f"| {' | '.join(head)} |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for f in (measure(kernel, binary) for kernel in KERNELS):
        own = [f.kernel.name, f.registers, f.blocks, f"{f.instructions_a_pack:.1f}", f"{f.bytes_in_flight // 1024} KiB"]
        for problem in f.kernel.problems:
            shares = (f"{f.share(gpu, problem):.2f}" for gpu in (H100, H200))
            lines.append(f"| {' | '.join(map(str, (*own, problem.name, *shares)))} |")
            own = [""] * len(own)
    return "\n".join([*lines, END])


def committed_table() -> str:
    text = PAGE.read_text()
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def write_table(binary: Path | None = EXTENSION) -> None:
    PAGE.write_text(PAGE.read_text().replace(committed_table(), table(binary)))
