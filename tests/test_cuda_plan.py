"""How the CUDA kernels are laid over a problem: csrc/cuda/softmax_ce_plan.h, plain C++, asked on the CPU.

A plan that leaves a class out, starts an empty block or divides by zero shows here, for sizes no GPU test can hold.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cases
import pytest
import torch
from cases import dtype_id

PROGRAM = Path(__file__).resolve().parent / "cuda_plan.cpp"
HEADER = PROGRAM.parent.parent / "csrc" / "cuda" / "softmax_ce_plan.h"
COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = [
    pytest.mark.skipif(not HEADER.is_file(), reason="these tests stand beside an installed wheel, not its source"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]

BLOCK = 256  # kThreads
PART = 64  # packs, kThreadsAtWork
BATCH = 1024  # packs that a block has in flight
LANES, WHOLE_BLOCK, PARTS = range(3)  # Regime

ROWS = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 131, 132, 133, 263, 264, 1000, 32768, 2**20 + 1, 2**31, 2**40]
CLASSES = [*cases.classes_around_plan_changes(torch.float32), *cases.classes_around_plan_changes(torch.bfloat16)]
CLASSES += [32000, 50257, 128256, 262144, 2**20 + 1, 2**31 + 1]
PACKS = [2, 4, 8]  # float64, float32, 16 bits
MULTIPROCESSORS = [1, 14, 46, 108, 132, 192]
BLOCKS_OF_MULTIPROCESSOR = [1, 3]  # that run at the same time


class Question(NamedTuple):
    rows: int
    classes: int
    pack: int
    multiprocessors: int
    slots: int  # blocks that the device runs at the same time


Ask = Callable[..., list[list[int]]]  # (which, questions, what else the plan depends on)


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    program = tmp_path_factory.mktemp("plan") / "cuda_plan"
    # Overflow and division by zero stop the program with a message.
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run([str(COMPILER), "-std=c++20", "-O1", *checks, str(PROGRAM), "-o", str(program)], check=True)

    def answers(which: str, questions: Sequence[Question], extra: Sequence[int] = ()) -> list[list[int]]:
        lines = "".join(f"{which} {' '.join(map(str, [*question, *extra]))}\n" for question in questions)
        result = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=False)
        found = [list(map(int, line.split())) for line in result.stdout.splitlines()]
        if result.returncode != 0:
            pytest.fail(f"plan_{which} stopped at {questions[len(found)]}: {result.stderr or result.returncode}")
        assert len(found) == len(questions)
        return found

    return answers


def realistic(rows: int, classes: int) -> bool:
    return rows * classes <= 2**45  # 64 TB of 16-bit logits


QUESTIONS = [
    Question(rows, classes, pack, multiprocessors, multiprocessors * blocks)
    for rows, classes, pack, multiprocessors in product(ROWS, CLASSES, PACKS, MULTIPROCESSORS)
    for blocks in BLOCKS_OF_MULTIPROCESSOR
    if realistic(rows, classes)
]
ACROSS = [question for question in QUESTIONS if question.rows % question.pack == 0]


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def covers(parts: int, part: int, classes: int) -> bool:
    """Whether parts of that many classes cover all of them, none empty."""
    return parts >= 1 and (parts - 1) * part < classes <= parts * part


def duration(blocks: int, slots: int) -> int:
    """Of blocks of one length; half of the slots keep the memory busy (duration_of)."""
    last = blocks % slots
    return blocks - last + (max(last, slots // 2) if last else 0)


def test_forward(ask: Ask) -> None:
    for question, (regime, lanes, parts, part, blocks) in zip(QUESTIONS, ask("forward", QUESTIONS), strict=True):
        rows, classes, pack, _, slots = question
        assert covers(parts, part, classes), question
        assert blocks >= min(rows, 1), question
        if regime == LANES:
            assert parts == 1, question
            assert lanes <= 32, question
            assert is_power_of_two(lanes), question
            assert lanes == 1 or (lanes - 1) * pack < classes, f"{question}: a lane without a pack"
            assert blocks == min(slots, ceil_div(rows, BLOCK // lanes)), question
        elif regime == WHOLE_BLOCK:
            assert parts == 1, question
            assert blocks == min(slots, rows), question
        else:  # blocks do not stride: there is one for each part of each row
            assert parts > 1, question
            assert blocks == rows * parts < 2**31, question
            assert part >= PART * pack, question
            assert part % pack == 0, f"{question}: parts that start misaligned"
            assert rows + 1 <= 2**13, f"{question}: more counters than a launch has"
            if rows > slots // 2:
                assert parts <= 4, question
                assert part >= BATCH * pack, f"{question}: parts of less than a batch"
                assert duration(blocks, slots) / parts < duration(rows, slots) / 1.05, f"{question}: nothing gained"


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("count", MULTIPROCESSORS)
def test_few_long_rows_fill_the_device(ask: Ask, count: int, pack: int) -> None:
    """Half of the slots wherever two warps of a block would have packs to read."""
    slots = 3 * count
    questions = [Question(rows, 128256, pack, count, slots) for rows in range(1, slots + 1)]
    for question, (*_, blocks) in zip(questions, ask("forward", questions), strict=True):
        possible = question.rows * (question.classes // ((PART + 1) * pack))
        assert blocks >= min(slots // 2, possible), question


def test_the_last_blocks_of_long_rows_do_not_run_alone(ask: Ask) -> None:
    """From half of the slots to four times as many rows: within 18 % of a device that is always full."""
    slots = 396  # an H100's, three blocks a multiprocessor
    questions = [Question(rows, 128256, 8, 132, slots) for rows in range(slots // 2, 4 * slots)]
    for question, (_, _, parts, _, blocks) in zip(questions, ask("forward", questions), strict=True):
        regime_blocks = question.rows * parts
        assert regime_blocks >= blocks, question
        assert duration(regime_blocks, slots) / parts <= 1.18 * question.rows, question


@pytest.mark.parametrize("rows", [1, 2, 16, 128])
def test_few_rows_of_llama_3_fill_an_h200(ask: Ask, rows: int) -> None:
    question = Question(rows, 128256, 8, 132, 396)
    ((regime, _, parts, _, blocks),) = ask("forward", [question])
    assert regime == PARTS
    assert parts > 1
    assert 240 <= blocks <= 396
    ((_, _, _, blocks),) = ask("backward", [question])
    assert blocks >= 240


def test_backward(ask: Ask) -> None:
    for question, (team, parts, part, blocks) in zip(QUESTIONS, ask("backward", QUESTIONS), strict=True):
        assert covers(parts, part, question.classes), question
        assert team <= BLOCK, question
        assert is_power_of_two(team), question
        assert parts == 1 or part % question.pack == 0, f"{question}: parts that start misaligned"
        assert blocks == ceil_div(question.rows * parts, BLOCK // team), question


def test_forward_across(ask: Ask) -> None:
    for question, (columns, blocks) in zip(ACROSS, ask("forward_across", ACROSS), strict=True):
        packs = question.rows // question.pack
        assert 8 <= columns <= BLOCK, question
        assert is_power_of_two(columns), question
        assert blocks == min(8 * question.slots, ceil_div(packs, columns)), question
        threads = packs * (BLOCK // columns)
        assert threads >= 384 * question.multiprocessors or columns == 8 or BLOCK // columns >= question.classes, (
            question
        )


def test_backward_across(ask: Ask) -> None:
    for question, (team, parts, part, blocks) in zip(ACROSS, ask("backward_across", ACROSS), strict=True):
        packs = question.rows // question.pack
        assert team == 1, question
        assert covers(parts, part, question.classes), question
        assert blocks == ceil_div(packs * parts, BLOCK), question
        assert part <= 2**30, f"{question}: a class of a part that 32 bits do not count"


# Multiprocessors, shared memory of a block in KiB, largest cluster.
H200, PORTABLE, ADA, AMPERE, EMULATION = (132, 227, 16), (132, 227, 8), (142, 99, 1), (108, 163, 1), (3, 14, 1)
DEVICES = {"H200": H200, "H200 in small clusters": PORTABLE, "Ada": ADA, "Ampere": AMPERE, "emulation": EMULATION}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_forward_backward(ask: Ask, device: tuple[int, int, int]) -> None:
    multiprocessors, of_block, largest_cluster = device
    questions = [question for question in QUESTIONS if question.multiprocessors == question.slots == 1]
    asked = [question._replace(multiprocessors=multiprocessors) for question in questions]
    extra = [of_block << 10, largest_cluster]
    for question, (lanes, cluster, kept, blocks) in zip(asked, ask("forward_backward", asked, extra), strict=True):
        packs = ceil_div(question.classes, question.pack)
        assert kept >= 1, question
        assert kept * BLOCK * 16 <= (of_block - 2) << 10, f"{question}: more shared memory than a block can have"
        assert is_power_of_two(cluster), question
        assert cluster <= largest_cluster, question
        assert blocks % cluster == 0, f"{question}: a cluster is cut"
        assert blocks == (ceil_div(question.rows, BLOCK // lanes) if lanes else question.rows * cluster), question
        threads = lanes or cluster * BLOCK
        assert lanes == 0 or cluster == 1, question
        assert lanes == 0 or is_power_of_two(lanes), question
        assert (kept - 1) * threads < packs, f"{question}: shared memory that nothing is kept in"
        if kept * threads < packs:  # something is read twice
            assert (kept + 1) * BLOCK * 16 > (of_block - 2) << 10, question
            assert lanes or cluster == largest_cluster, question


@pytest.mark.parametrize("rows", [1, 8, 4096])
def test_rows_stay_in_the_shared_memory_of_an_h200(ask: Ask, rows: int) -> None:
    """Up to a MiB, as 262144 float32 logits: one read and one write. Few rows take more blocks each."""
    for classes, pack in [(32000, 8), (128256, 8), (128256, 4), (262144, 4)]:
        question = Question(rows, classes, pack, 132, 396)
        ((lanes, cluster, kept, blocks),) = ask("forward_backward", [question], [227 << 10, 16])
        assert kept * (lanes or cluster * BLOCK) * pack >= classes, question
        assert kept <= 16, f"{question}: shared memory for fewer than three blocks"
        assert blocks >= min(128, 4 * rows), question


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
def test_the_gpu_tests_know_every_change_of_plan(ask: Ask, dtype: torch.dtype) -> None:
    """cases.classes_around_plan_changes holds both sides of each class count at which a plan changes."""
    known = set(cases.classes_around_plan_changes(dtype))
    pack = 16 // dtype.itemsize
    questions = [Question(3, classes, pack, 132, 396) for classes in range(1, 1024 * pack + 2)]
    forward = [(regime, lanes) for regime, lanes, *_ in ask("forward", questions)]
    backward = [(team, min(parts, 2)) for team, parts, *_ in ask("backward", questions)]
    forward_backward = [tuple(plan[:3]) for plan in ask("forward_backward", questions, [14 << 10, 1])]
    changes = [
        classes
        for plans in (forward, backward, forward_backward)
        for classes in range(2, len(plans) + 1)
        if plans[classes - 1] != plans[classes - 2]
    ]
    assert len(changes) > 10
    assert {side for classes in changes for side in (classes - 1, classes)} <= known
