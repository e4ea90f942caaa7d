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

BLOCK = 256  # kBlock
BLOCKS_PER_PROCESSOR = 8  # kBlocksPerProcessor
PART = 64  # packs, plan_forward's smallest_part
LANES, WHOLE_BLOCK, PARTS = range(3)  # Regime

ROWS = [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 131, 132, 133, 263, 264, 1000, 32768, 2**20 + 1, 2**31, 2**40]
CLASSES = [*cases.classes_around_plan_changes(torch.float32), *cases.classes_around_plan_changes(torch.bfloat16)]
CLASSES += [32000, 50257, 128256, 262144, 2**20 + 1, 2**31 + 1]
PACKS = [2, 4, 8]  # float64, float32, 16 bits
MULTIPROCESSORS = [1, 14, 46, 108, 132, 192]


class Question(NamedTuple):
    rows: int
    classes: int
    pack: int
    multiprocessors: int


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


QUESTIONS = [Question(*each) for each in product(ROWS, CLASSES, PACKS, MULTIPROCESSORS) if realistic(each[0], each[1])]
ACROSS = [question for question in QUESTIONS if question.rows % question.pack == 0]


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def covers(parts: int, part: int, classes: int) -> bool:
    """Whether parts of that many classes cover all of them, none empty."""
    return parts >= 1 and (parts - 1) * part < classes <= parts * part


def test_forward(ask: Ask) -> None:
    for question, (regime, lanes, parts, part, blocks) in zip(QUESTIONS, ask("forward", QUESTIONS), strict=True):
        rows, classes, pack, multiprocessors = question
        resident = multiprocessors * BLOCKS_PER_PROCESSOR
        assert covers(parts, part, classes), question
        assert blocks >= min(rows, 1), question
        if regime == LANES:
            assert parts == 1, question
            assert lanes <= 32, question
            assert is_power_of_two(lanes), question
            assert lanes == 1 or (lanes - 1) * pack < classes, f"{question}: a lane without a pack"
            assert blocks == min(resident, ceil_div(rows, BLOCK // lanes)), question
        elif regime == WHOLE_BLOCK:
            assert parts == 1, question
            assert blocks == min(resident, rows), question
        else:  # blocks do not stride: there is one for each part of each row
            assert parts > 1, question
            assert blocks == rows * parts < 2**31, question
            assert rows < multiprocessors, question
            assert part >= PART * pack, question
            assert part % pack == 0, f"{question}: parts that start misaligned"
            assert blocks <= 4 * multiprocessors, f"{question}: more partial sums than the last block should merge"


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("count", MULTIPROCESSORS)
def test_few_long_rows_fill_the_device(ask: Ask, count: int, pack: int) -> None:
    """A block for each multiprocessor wherever two warps of it would have packs to read."""
    questions = [Question(rows, 128256, pack, count) for rows in range(1, 129)]
    for question, (*_, blocks) in zip(questions, ask("forward", questions), strict=True):
        possible = question.rows * (question.classes // (PART * pack))
        assert blocks >= min(count, possible), question


@pytest.mark.parametrize("rows", [1, 2, 16, 128])
def test_few_rows_of_llama_3_fill_an_h200(ask: Ask, rows: int) -> None:
    question = Question(rows, 128256, 8, 132)
    ((regime, _, parts, _, blocks),) = ask("forward", [question])
    assert regime == PARTS
    assert parts > 1
    assert blocks >= 132
    ((_, _, _, blocks),) = ask("backward", [question])
    assert blocks >= 132


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
        assert blocks == min(question.multiprocessors * BLOCKS_PER_PROCESSOR, ceil_div(packs, columns)), question


def test_backward_across(ask: Ask) -> None:
    for question, (team, parts, part, blocks) in zip(ACROSS, ask("backward_across", ACROSS), strict=True):
        packs = question.rows // question.pack
        assert team == 1, question
        assert covers(parts, part, question.classes), question
        assert blocks == ceil_div(packs * parts, BLOCK), question


# Multiprocessors, shared memory of a block and of a multiprocessor in KiB, largest cluster.
H200, ADA, AMPERE, EMULATION = (132, 227, 228, 8), (142, 99, 100, 1), (108, 163, 164, 1), (3, 14, 64, 1)


@pytest.mark.parametrize("device", [H200, ADA, AMPERE, EMULATION], ids=["H200", "Ada", "Ampere", "emulation"])
def test_fused(ask: Ask, device: tuple[int, int, int, int]) -> None:
    multiprocessors, of_block, of_multiprocessor, largest_cluster = device
    questions = [question for question in QUESTIONS if question.multiprocessors == 1]
    asked = [question._replace(multiprocessors=multiprocessors) for question in questions]
    extra = [of_block << 10, of_multiprocessor << 10, largest_cluster]
    for question, (lanes, cluster, kept, blocks) in zip(asked, ask("fused", asked, extra), strict=True):
        packs = ceil_div(question.classes, question.pack)
        assert kept >= 1, question
        assert kept * BLOCK * 16 <= (of_block - 2) << 10, f"{question}: more shared memory than a block can have"
        assert is_power_of_two(cluster), question
        assert cluster <= largest_cluster, question
        assert blocks % cluster == 0, f"{question}: a cluster is cut"
        assert 0 < blocks + (question.rows == 0) < 2**31, question
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
        question = Question(rows, classes, pack, 132)
        ((lanes, cluster, kept, blocks),) = ask("fused", [question], [227 << 10, 228 << 10, 8])
        assert kept * (lanes or cluster * BLOCK) * pack >= classes, question
        assert blocks >= min(128, 4 * rows), question


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
def test_the_gpu_tests_know_every_change_of_plan(ask: Ask, dtype: torch.dtype) -> None:
    """cases.classes_around_plan_changes holds both sides of each class count at which a plan changes."""
    known = set(cases.classes_around_plan_changes(dtype))
    pack = 16 // dtype.itemsize
    questions = [Question(3, classes, pack, 132) for classes in range(1, 1024 * pack + 2)]
    forward = [(regime, lanes) for regime, lanes, *_ in ask("forward", questions)]
    backward = [(team, min(parts, 2)) for team, parts, *_ in ask("backward", questions)]
    fused = [tuple(plan[:3]) for plan in ask("fused", questions, [14 << 10, 64 << 10, 1])]
    changes = [
        classes
        for plans in (forward, backward, fused)
        for classes in range(2, len(plans) + 1)
        if plans[classes - 1] != plans[classes - 2]
    ]
    assert len(changes) > 10
    assert {side for classes in changes for side in (classes - 1, classes)} <= known
