"""The shapes at which csrc/cuda changes its plan, and those that a plan was made for.

On a GPU, or with ``--emulate-cuda`` on a device of one multiprocessor and on one of five.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import cases
import pytest
import torch
from cases import dtype_id
from comparison import check_sigmoid_bce, check_softmax_ce
from torch import Tensor

import torchce.functional

pytestmark = pytest.mark.cuda

BLOCK = 256  # threads of every kernel
BUSY = 384  # threads of a multiprocessor that keep the memory busy (kBusyThreads)


def check(kind: str, logits: Tensor, reduction: str = "none") -> None:
    """Loss and gradients."""
    target, options = cases.kernel_problem(kind, logits)
    check_softmax_ce(logits, target, target_grad=kind.endswith("probability"), reduction=reduction, **options)


LAUNCHED = {
    "lanes": ((700, 10), None),
    "block": ((7, 5000), None),
    "parts": ((1, 20001), None),
    "across": ((2, 19, 64), None),
    "transposed": ((64, 300), "transposed"),
}


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("kind", [*cases.KERNEL_KINDS, "bce"])
def test_one_launch_each_way(
    cuda_device: str, count_launches: Callable[[], int], kind: str, name: str, reduction: str
) -> None:
    """The reduction included."""
    shape, layout = LAUNCHED[name]
    logits = cases.arranged(layout, shape, torch.float32, cuda_device).requires_grad_()
    if kind == "bce":
        function, options = torchce.functional.binary_cross_entropy_with_logits, {}
    else:
        function, options = torchce.functional.cross_entropy, {"label_smoothing": 0.1 if kind == "smoothed" else 0.0}
    by_index = kind in ("index", "smoothed")
    target = cases.softmax_target("index" if by_index else "probability", shape, torch.float32, cuda_device)
    before = count_launches()
    loss = function(logits, target, reduction=reduction, **options)
    assert count_launches() == before + 1
    loss.backward(torch.ones_like(loss))
    assert count_launches() == before + 2


@pytest.mark.parametrize(("kind", "dtype"), cases.CAPPED_TYPES)
def test_transformed_logits(cuda_device: str, multiprocessors: int, kind: str, dtype: torch.dtype) -> None:
    """Every kernel of theirs: lanes, a block and several blocks a row; across packs of rows and single ones."""
    for shape, layout in (
        ((37, 10), None),
        ((3, 300), "offset"),
        ((2 * multiprocessors, 9001), None),
        ((1, 20001), "offset"),
        ((2, 19, 64), None),
        ((2, 19, 7), None),
        ((33, 41), "transposed"),
    ):
        check(kind, cases.arranged(layout, shape, dtype, cuda_device))


# --- rows whose classes are adjacent in memory ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, "sliced"], ids=["aligned", "misaligned"])
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
def test_every_change_of_plan(
    cuda_device: str, multiprocessors: int, kind: str, layout: str | None, dtype: torch.dtype
) -> None:
    """Lanes, a block and several blocks a row; teams and parts of the backward."""
    rows = 3
    for classes in cases.classes_around_plan_changes(dtype):
        if multiprocessors <= rows and classes < 511 * 16 // dtype.itemsize:
            continue  # planned as on any other device
        check(kind, cases.arranged(layout, (rows, classes), dtype, cuda_device))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 33, 64, 127, 128])
def test_few_rows_of_llama_3(cuda_device: str, emulated: bool, rows: int) -> None:
    """Each row over several blocks, which the last one merges."""
    if emulated and rows > 5:
        pytest.skip("too large for the emulation")
    check("index", cases.arranged(None, (rows, 128256), torch.bfloat16, cuda_device))


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
def test_rows_shared_by_blocks(
    cuda_device: str, multiprocessors: int, kind: str, rows: int, dtype: torch.dtype
) -> None:
    """Fewer rows than multiprocessors. The last part of a row is shorter than the others."""
    check(kind, cases.arranged("offset", (rows, 24583), dtype, cuda_device), "mean")


@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=["plus_inf", "nan"])
@pytest.mark.parametrize("kind", cases.KERNEL_KINDS)
def test_poison_in_one_part(cuda_device: str, multiprocessors: int, kind: str, poison: float) -> None:
    """Wherever it stands, its row is NaN and the other is not."""
    shape = (2, 20001)
    target = cases.softmax_target(
        "probability" if kind == "probability" else "index", shape, torch.float32, cuda_device
    )
    for position in (0, 1000, 8192, 20000):
        logits = cases.arranged(None, shape, torch.float32, cuda_device)
        logits[1, position] = poison
        loss = torchce.functional.cross_entropy(
            logits.requires_grad_(), target, reduction="none", label_smoothing=0.1 if kind == "smoothed" else 0.0
        )
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isnan().tolist() == [False, True]
        assert bool(grad[0].isfinite().all())
        assert bool(grad[1].isnan().all())


@pytest.mark.parametrize("difference", [-1, 0, 1])
@pytest.mark.parametrize("halves", [1, 2, 4, 8])
def test_long_rows_around_the_number_of_blocks(
    cuda_device: str, resident_blocks: int, halves: int, difference: int
) -> None:
    """Rows are cut into parts where they are few, and where the last of them would run alone."""
    rows = max(resident_blocks * halves // 2 + difference, 1)
    check("index", cases.arranged(None, (rows, 20001), torch.float32, cuda_device), "mean" if difference else "none")


@pytest.mark.parametrize("difference", [-1, 0, 1])
@pytest.mark.parametrize("classes", [3, 70, 1100], ids=["a_lane", "lanes", "block"])
@pytest.mark.parametrize("kind", cases.KERNEL_KINDS)
def test_more_rows_than_resident_blocks_take_at_once(
    cuda_device: str, resident_blocks: int, kind: str, classes: int, difference: int
) -> None:
    """Blocks stride over the rows that are left. 1100 float64 classes take a block."""
    dtype = torch.float64 if classes == 1100 else torch.float32
    rows_of_block = {3: BLOCK, 70: 32, 1100: 1}[classes]
    rows = 4 * resident_blocks * rows_of_block + difference
    check(kind, cases.arranged(None, (rows, classes), dtype, cuda_device), "mean" if difference == 0 else "none")


# --- rows that are adjacent in memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", [1, 7, 8, 9, 63, 64, 65, 255, 256, 257])
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
def test_inner_positions_around_every_block_width(
    cuda_device: str, multiprocessors: int, kind: str, packs: int, dtype: torch.dtype
) -> None:
    """Across the rows: 8 to 256 packs a block, whole packs and single rows, fewer and more classes than threads."""
    inner = packs * 16 // dtype.itemsize
    for classes in (2, 5) if packs % 2 == 0 else (1, 33):
        check(kind, cases.arranged(None, (2, classes, inner), dtype, cuda_device))
        check(kind, cases.arranged(None, (2, classes, inner + 1), dtype, cuda_device), "sum")


@pytest.mark.parametrize("divisor", [1, 4, 16])
@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_inner_positions_that_fill_the_device(
    cuda_device: str, multiprocessors: int, difference: int, divisor: int
) -> None:
    """Fewer packs than would keep it busy with `divisor` threads a pack get twice as many."""
    packs = multiprocessors * BUSY // divisor + difference
    classes = 3 if divisor == 1 else 40
    check("index", cases.arranged(None, (1, classes, packs * 4), torch.float32, cuda_device), "mean")


@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
def test_transposed_rows(cuda_device: str, multiprocessors: int, kind: str, dtype: torch.dtype) -> None:
    """Without an inner dimension rows that follow each other are neighbours; in packs, or one by one."""
    for shape in ((64, 130), (61, 37), (4096, 3)):
        check(kind, cases.arranged("transposed", shape, dtype, cuda_device))


# --- elements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, "offset"], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_bce_elements_around_a_block(
    cuda_device: str, multiprocessors: int, dtype: torch.dtype, layout: str | None
) -> None:
    """One element a thread, one pack, several packs and single elements beyond them."""
    pack = 16 // dtype.itemsize
    for elements in {BLOCK, BLOCK * pack, 2 * BLOCK * pack, 4 * BLOCK * pack}:
        for difference in (-1, 0, 1, pack):
            logits = cases.arranged(layout, (elements + difference,), dtype, cuda_device)
            target = cases.uniform(logits.shape, dtype, cuda_device)
            check_sigmoid_bce(logits, target, target_grad=True, reduction="none" if difference == 0 else "mean")


@pytest.mark.parametrize("difference", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_bce_elements_around_what_the_grid_takes_at_once(
    cuda_device: str, resident_blocks: int, dtype: torch.dtype, difference: int
) -> None:
    threads = resident_blocks * BLOCK
    for elements in (threads, 4 * threads * (16 // dtype.itemsize)):
        shape = (elements + difference,)
        check_sigmoid_bce(cases.normal(shape, dtype, cuda_device, scale=3), cases.uniform(shape, dtype, cuda_device))


# Logits, what the weights broadcast as, and the layout that csrc/cuda/sigmoid_bce_layout.h finds; 0: single elements.
DENSE, COLUMNS, STRIDED = range(3)
BCE_LAYOUTS = {
    "plain": ((33, 31), None, {}, (DENSE, 4)),
    "one element": ((1,), None, {}, (DENSE, 4)),
    "transposed": ((33, 31), "transposed", {}, (DENSE, 4)),
    "channels last": ((2, 5, 7, 3), "channels_last", {}, (DENSE, 4)),
    "misaligned": ((33, 32), "offset", {}, (STRIDED, 1)),
    "sliced": ((33, 31), "sliced", {}, (STRIDED, 1)),
    "one logit for a row": ((33, 32), "expanded_classes", {}, (STRIDED, 1)),
    "weight": ((33, 31), None, {"weight": (31,)}, (COLUMNS, 4)),
    "scalar pos_weight": ((33, 31), None, {"pos_weight": ()}, (COLUMNS, 4)),
    "weight, scalar pos_weight": ((33, 31), None, {"weight": (31,), "pos_weight": ()}, (COLUMNS, 4)),
    "weight of each element": ((33, 31), None, {"weight": (33, 31)}, (COLUMNS, 4)),
    "weight of each, pos_weight of columns": (
        (33, 32),
        None,
        {"weight": (33, 32), "pos_weight": (32,)},
        (STRIDED, 4),
    ),
    "weight of rows": ((33, 32), None, {"weight": (33, 1)}, (STRIDED, 4)),
    "weight of odd rows": ((33, 31), None, {"weight": (33, 1)}, (STRIDED, 1)),
    "pos_weight of channels": ((2, 5, 8, 4), None, {"pos_weight": (5, 1, 1)}, (STRIDED, 4)),
    "pos_weight of channels last": ((2, 5, 7, 3), "channels_last", {"pos_weight": (5, 1, 1)}, (COLUMNS, 4)),
}


@pytest.mark.parametrize("grad_output", ["dense", "sum"])
@pytest.mark.parametrize("name", BCE_LAYOUTS)
def test_bce_layout(cuda_device: str, last_kernel: Callable[[], str], name: str, grad_output: str) -> None:
    """A plain problem takes no kernel with offsets, nor does one with weights of columns."""
    shape, layout, weights, expected = BCE_LAYOUTS[name]
    logits = cases.arranged(layout, shape, torch.float32, cuda_device).requires_grad_()
    target = cases.laid_out(layout, lambda sizes: cases.uniform(sizes, torch.float32, cuda_device), shape)
    options = {which: cases.uniform(each, torch.float32, cuda_device, seed=6) for which, each in weights.items()}
    loss = torchce.functional.binary_cross_entropy_with_logits(logits, target, reduction="none", **options)
    assert kernel_layout(last_kernel()) == expected
    loss.sum().backward() if grad_output == "sum" else loss.backward(torch.ones_like(loss))
    if name != "one logit for a row":  # its gradient is that of the whole
        assert kernel_layout(last_kernel()) == expected


def kernel_layout(name: str) -> tuple[int, int]:
    """(layout, elements of a pack) of ``... forward<float, float, (torchce::cuda::sigmoid_bce::Layout)0, 4>(...)``."""
    found = re.search(r"sigmoid_bce::(?:for|back)ward<.*::Layout\)(\d), (\d+)>", name)
    assert found is not None, name
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("columns", [2, 3, 5, 7, 8, 9, 31, 64, 1037, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_bce_weights_of_columns(cuda_device: str, multiprocessors: int, dtype: torch.dtype, columns: int) -> None:
    """Rows shorter than a pack, of whole packs and of others, with more packs than the grid takes at once.

    20011 columns are one row: a weight for each element.
    """
    shape = (-(-20011 // columns), columns)
    column_weight = cases.uniform((columns + 1,), torch.float32, cuda_device, seed=6)
    one_weight = torch.tensor(0.625, device=cuda_device)
    for weights, reduction in (
        ({"weight": column_weight[:-1]}, "none"),
        ({"pos_weight": column_weight[1:]}, "mean"),  # misaligned
        ({"weight": one_weight, "pos_weight": column_weight[:-1] * 3}, "sum"),
        ({"weight": column_weight[:-1], "pos_weight": column_weight[1:] * 3}, "mean"),
    ):
        logits = cases.normal(shape, dtype, cuda_device, scale=3)
        target = cases.uniform(shape, dtype, cuda_device)
        check_sigmoid_bce(logits, target, target_grad=reduction == "mean", reduction=reduction, **weights)


@pytest.mark.parametrize("inner", [64, 63], ids=["packs", "single"])
@pytest.mark.parametrize("target_dtype", [None, torch.float32, torch.uint8, torch.bool, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_bce_packs_of_unequal_width(
    cuda_device: str, dtype: torch.dtype, target_dtype: torch.dtype | None, inner: int
) -> None:
    """Targets of another dtype, and weights that repeat along a pack, across packs, or not at all."""
    shape = (3, 5, inner)
    target_dtype = dtype if target_dtype is None else target_dtype
    target = cases.uniform(shape, torch.float32, cuda_device)
    target = (target if target_dtype.is_floating_point else target > 0.5).to(target_dtype)
    for weight_shape in ((inner,), (5, 1), shape):
        check_sigmoid_bce(
            cases.normal(shape, dtype, cuda_device, scale=3),
            target,
            target_grad=target_dtype.is_floating_point,
            weight=cases.uniform(weight_shape, dtype, cuda_device),
            pos_weight=cases.uniform((5, 1), dtype, cuda_device, seed=6),
            reduction="none",
        )
