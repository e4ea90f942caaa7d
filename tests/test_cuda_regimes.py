"""The shapes at which csrc/cuda/softmax_ce_plan.h changes its plan, and those that a plan was made for."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import dtype_id
from comparison import check_sigmoid_bce, check_softmax_ce

pytestmark = pytest.mark.cuda

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BLOCK = 256  # threads of every kernel
BLOCKS_PER_PROCESSOR = 8


def multiprocessors() -> int:
    return torch.cuda.get_device_properties().multi_processor_count


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", [None, "sliced"], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_every_change_of_plan(kind: str, layout: str | None, dtype: torch.dtype) -> None:
    """Lanes, a block and several blocks a row; teams and parts of the backward."""
    for classes in cases.classes_around_plan_changes(dtype):
        shape = (3, classes)
        logits = cases.normal(shape, dtype, "cuda", scale=3)
        if layout is not None:
            logits = cases.LAYOUTS[layout](lambda s: cases.normal(s, dtype, "cuda", scale=3), shape)
        check_softmax_ce(logits, cases.softmax_target(kind, shape, dtype, "cuda"), reduction="none")


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 33, 64, 127, 128])
def test_few_rows_of_llama_3(rows: int) -> None:
    """Each row over several blocks, which the last one merges."""
    shape = (rows, 128256)
    target = cases.softmax_target("index", shape, torch.bfloat16, "cuda")
    check_softmax_ce(cases.normal(shape, torch.bfloat16, "cuda", scale=3), target, reduction="none")


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=dtype_id)
def test_few_rows_with_options(dtype: torch.dtype, kind: str, options: dict[str, float]) -> None:
    shape = (5, 50257)
    weight = cases.uniform([50257], dtype, "cuda")
    target = cases.softmax_target(kind, shape, dtype, "cuda")
    if kind == "index":
        target[1] = -100
    check_softmax_ce(cases.normal(shape, dtype, "cuda", scale=3), target, weight=weight, **options)


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_rows_around_the_number_of_multiprocessors(difference: int) -> None:
    """Fewer rows are cut into parts, more are not."""
    shape = (multiprocessors() + difference, 20001)
    check_softmax_ce(
        cases.normal(shape, torch.float32, "cuda", scale=3),
        cases.softmax_target("index", shape, torch.float32, "cuda"),
        reduction="none",
    )


@pytest.mark.parametrize("difference", [-1, 0, 1])
@pytest.mark.parametrize("classes", [3, 70, 1100], ids=["a_lane", "lanes", "block"])
def test_more_rows_than_resident_blocks_take_at_once(classes: int, difference: int) -> None:
    """Blocks stride over the rows that are left. 1100 float64 classes take a block."""
    dtype = torch.float64 if classes == 1100 else torch.float32
    rows_of_block = {3: BLOCK, 70: 32, 1100: 1}[classes]
    rows = multiprocessors() * BLOCKS_PER_PROCESSOR * rows_of_block + difference
    logits = cases.normal((rows, classes), dtype, "cuda", scale=3)
    check_softmax_ce(logits, cases.softmax_target("index", (rows, classes), dtype, "cuda"), reduction="none")


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_inner_positions_around_every_block_width(dtype: torch.dtype, kind: str) -> None:
    """Across the rows: 8 to 256 packs a block, whole packs and single rows, fewer and more classes than threads."""
    pack = 16 // dtype.itemsize
    for packs in (1, 7, 8, 9, 63, 64, 65, 255, 256, 257):
        for inner in {packs * pack, packs * pack + 1}:
            for classes in (1, 2, 5, 33):
                shape = (2, classes, inner)
                target = cases.softmax_target(kind, shape, dtype, "cuda")
                check_softmax_ce(cases.normal(shape, dtype, "cuda", scale=3), target, reduction="none")


@pytest.mark.parametrize("divisor", [1, 4, 16])
@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_inner_positions_that_fill_the_device(difference: int, divisor: int) -> None:
    """Fewer packs than would fill it with `divisor` threads a pack get twice as many; more make blocks stride."""
    packs = multiprocessors() * BLOCKS_PER_PROCESSOR * BLOCK // divisor + difference
    classes = 3 if divisor == 1 else 40
    shape = (1, classes, packs * 4)
    target = cases.softmax_target("index", shape, torch.float32, "cuda")
    check_softmax_ce(cases.normal(shape, torch.float32, "cuda", scale=3), target)


@pytest.mark.parametrize("difference", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_bce_elements_around_what_the_grid_takes_at_once(dtype: torch.dtype, difference: int) -> None:
    threads = multiprocessors() * BLOCKS_PER_PROCESSOR * BLOCK
    for elements in (threads, 2 * threads * (16 // dtype.itemsize)):
        shape = (elements + difference,)
        check_sigmoid_bce(cases.normal(shape, dtype, "cuda", scale=3), cases.uniform(shape, dtype, "cuda"))
