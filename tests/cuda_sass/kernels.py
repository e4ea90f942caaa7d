"""The hot kernels: what one turn of each does, on which problem its share is stated, and its budgets.

Where a kernel changes, so does its entry; `python -m tests.cuda_sass` prints what is measured beside what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """What must not be lost. Instructions are a few per cent above those of CUDA 13.0."""

    registers: int  # at most, a thread
    blocks: int  # at least, of 256 threads on a multiprocessor
    instructions: float  # at most, a pack
    loads: int  # at least, of 128 bits, issued before the first of them is used
    trips: int  # at most, to memory one after the other, in a task of one turn


@dataclass(frozen=True)
class Problem:
    """One that a share of the copy's bandwidth is stated for."""

    name: str
    turns: float  # a thread's for a task: a row, or a part of it; 1 where there are no tasks
    # What the path around the turns does not show, being one thread's or a loop's, as read from the source.
    trips: float = 0  # to memory, one after the other
    instructions: float = 0


@dataclass(frozen=True)
class Kernel:
    name: str
    symbol: str  # a pattern that one kernel's mangled name has
    turns: tuple[Mapping[str, int], ...]  # of each of its hot loops: what one turn does (see the package)
    packs: int  # of logits, 16 bytes each, a turn
    bytes_a_pack: int  # that memory moves for it
    problems: tuple[Problem, ...]
    budget: Budget
    dynamic_shared_memory: int = field(default=0)
    target_ahead: bool = False  # a row's class index is asked for while the row before is worked on


# A row's end is one thread's. The target and the logit there were asked for before the row's logits.
END_OF_ROW = {"instructions": 100}

KERNELS = (
    Kernel(
        "CE forward, block, bf16",
        r"16forward_by_blockINS_8BFloat16E.*softmax_ce7IndicesE",
        ({"LDG": 4, "EX2": 32},),
        packs=4,
        bytes_a_pack=16,
        problems=(Problem("C = 32768", turns=4, **END_OF_ROW), Problem("C = 8192", turns=1, **END_OF_ROW)),
        budget=Budget(registers=80, blocks=3, instructions=56, loads=4, trips=1),
        target_ahead=True,
    ),
    Kernel(
        "CE forward, block, f32",
        r"16forward_by_blockIf.*softmax_ce7IndicesE",
        ({"LDG": 4, "EX2": 16},),
        packs=4,
        bytes_a_pack=16,
        problems=(Problem("C = 32768", turns=8, **END_OF_ROW), Problem("C = 4096", turns=1, **END_OF_ROW)),
        budget=Budget(registers=80, blocks=3, instructions=28, loads=4, trips=1),
        target_ahead=True,
    ),
    Kernel(
        "CE forward, lanes, bf16",
        r"16forward_by_lanesINS_8BFloat16E.*softmax_ce7IndicesE",
        ({"LDG": 4, "EX2": 32},),
        packs=4,
        bytes_a_pack=16,
        problems=(Problem("C = 4096", turns=4, **END_OF_ROW), Problem("C = 1024", turns=1, **END_OF_ROW)),
        budget=Budget(registers=80, blocks=3, instructions=56, loads=4, trips=1),
        target_ahead=True,
    ),
    Kernel(
        "CE forward, block, bf16 probabilities",
        r"16forward_by_blockINS_8BFloat16E.*softmax_ce13ProbabilitiesIS",
        ({"LDG": 4, "EX2": 16},),
        packs=2,
        bytes_a_pack=32,
        problems=(Problem("C = 32768", turns=8, **END_OF_ROW),),
        budget=Budget(registers=112, blocks=2, instructions=136, loads=4, trips=1),
    ),
    Kernel(
        "CE backward, bf16",
        r"14backward_alongINS_8BFloat16E.*softmax_ce7IndicesELNS_10GradientOfE0E",
        ({"LDG": 4, "STG": 4, "EX2": 32},),
        packs=4,
        bytes_a_pack=32,
        problems=(Problem("C = 32768", turns=1),),
        budget=Budget(registers=72, blocks=3, instructions=93.5, loads=4, trips=2),
    ),
    Kernel(
        "CE backward, f32",
        r"14backward_alongIf.*softmax_ce7IndicesELNS_10GradientOfE0E",
        ({"LDG": 4, "STG": 4, "EX2": 16},),
        packs=4,
        bytes_a_pack=32,
        problems=(Problem("C = 32768", turns=1),),
        budget=Budget(registers=72, blocks=3, instructions=84.5, loads=4, trips=2),
    ),
    Kernel(
        "CE forward_backward, bf16",
        r"27forward_backward_by_clusterINS_8BFloat16E.*softmax_ce7IndicesE",
        ({"LDG": 4, "STS": 4, "EX2": 32}, {"LDS": 4, "STG": 4, "EX2": 32}),
        packs=4,
        bytes_a_pack=32,
        problems=(Problem("C = 32768", turns=4, **END_OF_ROW),),
        budget=Budget(registers=80, blocks=3, instructions=154, loads=4, trips=2),
        dynamic_shared_memory=16 * 256 * 16,  # 16 packs a thread
        target_ahead=True,
    ),
    Kernel(
        "CE forward, across, bf16",
        r"14forward_acrossINS_8BFloat16E.*softmax_ce7IndicesELi8E",
        ({"LDG": 4, "EX2": 32},),
        packs=4,
        bytes_a_pack=16,
        # 19 classes are five turns, the last of three packs. A thread ends eight rows, whose targets are asked for at
        # once, then their logits.
        problems=(Problem("C = 19", turns=4.75, trips=0.25 + 2, instructions=8 * 100),),
        budget=Budget(registers=116, blocks=2, instructions=73, loads=4, trips=1),
    ),
    Kernel(
        "CE backward, across, bf16",
        r"15backward_acrossINS_8BFloat16E.*softmax_ce7IndicesELNS_10GradientOfE0ELi8E",
        ({"LDG": 4, "STG": 4, "EX2": 32},),
        packs=4,
        bytes_a_pack=32,
        problems=(Problem("C = 19", turns=4.75),),
        budget=Budget(registers=120, blocks=2, instructions=114, loads=4, trips=2),
    ),
    Kernel(
        "BCE forward, bf16",
        r"sigmoid_bce7forwardINS_8BFloat16ES3_LNS1_6LayoutE0ELi8E",
        ({"LDG": 8, "EX2": 32},),
        packs=4,
        bytes_a_pack=32,
        problems=(Problem("2^24 and more", turns=1),),
        budget=Budget(registers=80, blocks=3, instructions=199, loads=8, trips=1),
    ),
    Kernel(
        "BCE forward, f32",
        r"sigmoid_bce7forwardIffLNS1_6LayoutE0ELi4E",
        ({"LDG": 8, "EX2": 16},),
        packs=4,
        bytes_a_pack=32,
        problems=(Problem("2^24 and more", turns=1),),
        budget=Budget(registers=80, blocks=3, instructions=119, loads=8, trips=1),
    ),
    Kernel(
        "BCE backward, bf16",
        r"sigmoid_bce8backwardINS_8BFloat16ES3_LNS_10GradientOfE0ELNS1_6LayoutE0ELi8E",
        ({"LDG": 8, "STG": 4, "EX2": 32},),
        packs=4,
        bytes_a_pack=48,
        problems=(Problem("2^24 and more", turns=1),),
        budget=Budget(registers=80, blocks=3, instructions=159, loads=8, trips=1),
    ),
    Kernel(
        "BCE backward, f32",
        r"sigmoid_bce8backwardIffLNS_10GradientOfE0ELNS1_6LayoutE0ELi4E",
        ({"LDG": 8, "STG": 4, "EX2": 16},),
        packs=4,
        bytes_a_pack=48,
        problems=(Problem("2^24 and more", turns=1),),
        budget=Budget(registers=80, blocks=3, instructions=102, loads=8, trips=1),
    ),
)
