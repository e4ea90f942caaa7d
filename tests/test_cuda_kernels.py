"""Every CUDA kernel at the sizes where its plan changes (csrc/cuda/softmax_ce_plan.h), on a GPU or emulated.

On a GPU the number of multiprocessors is what it is; the emulation takes the parameter's.
"""

from __future__ import annotations

from collections.abc import Sequence

import cases
import pytest
import torch
from cases import dtype_id
from comparison import check_sigmoid_bce, check_softmax_ce
from torch import Tensor

import torchce.functional

pytestmark = pytest.mark.cuda

KINDS = ["index", "smoothed", "probability"]


def pack(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return 16 // dtype.itemsize


def check(kind: str, logits: Tensor, **options: object) -> None:
    """With every kind of target that has a kernel of its own, weights, and a row that is ignored."""
    shape, dtype, device = logits.shape, logits.dtype, str(logits.device)
    target = cases.softmax_target("probability" if kind == "probability" else "index", shape, dtype, device)
    if kind != "probability" and target.numel() > 2:
        target.view(-1)[1] = -100
    if kind == "smoothed":
        options["label_smoothing"] = 0.1
        options["weight"] = cases.uniform(shape[1:2], dtype, device)
    check_softmax_ce(logits, target, target_grad=kind == "probability", **options)


def logits_of(layout: str | None, shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    def make(sizes: Sequence[int]) -> Tensor:
        return cases.normal(sizes, dtype, device, scale=3)

    return make(shape) if layout is None else cases.LAYOUTS[layout](make, shape)


@pytest.mark.parametrize("multiprocessors", [1], indirect=True)
@pytest.mark.parametrize("packs", [1, 2, 4, 8, 64, 128, 512, 1024])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_classes_around_a_change_of_plan(
    cuda_device: str, multiprocessors: int, kind: str, dtype: torch.dtype, packs: int
) -> None:
    """How many threads share a row: 512 packs is where a block takes over from a warp. Rows misaligned and not."""
    boundary = packs * pack(dtype)
    for classes in (boundary - 1, boundary, boundary + 1):
        if classes > 0:
            check(kind, logits_of("sliced", (3, classes), dtype, cuda_device))


@pytest.mark.parametrize("multiprocessors", [1], indirect=True)
@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        pytest.param(2, 3, id="fewer_rows_than_a_warp_has_groups"),
        pytest.param(2049, 3, id="one_row_more_than_the_grid_takes_at_once"),  # 8 blocks of 256 rows
        pytest.param(257, 130, id="32_lanes"),  # 8 blocks of 8 rows, four times and once more
        pytest.param(19, 4099, id="blocks"),  # 8 blocks of a row
    ],
)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_the_grid(
    cuda_device: str, multiprocessors: int, kind: str, reduction: str, rows: int, classes: int
) -> None:
    check(kind, logits_of(None, (rows, classes), torch.float32, cuda_device), reduction=reduction)


@pytest.mark.parametrize("multiprocessors", [1, 5], indirect=True)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("classes", [16383, 16384, 16385, 24583])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_shared_by_blocks(
    cuda_device: str, multiprocessors: int, kind: str, dtype: torch.dtype, classes: int, rows: int
) -> None:
    """Fewer rows than multiprocessors: parts of 8192 classes or more, the last of them shorter."""
    check(kind, logits_of("offset", (rows, classes), dtype, cuda_device))


@pytest.mark.parametrize("multiprocessors", [1, 20], indirect=True)
def test_more_parts_than_a_warp_has_lanes(cuda_device: str, multiprocessors: int) -> None:
    check("smoothed", logits_of(None, (1, 300_007), torch.float32, cuda_device))


@pytest.mark.parametrize("multiprocessors", [1, 5], indirect=True)
@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=["plus_inf", "nan"])
@pytest.mark.parametrize("position", [0, 8191, 16384, 20000])
@pytest.mark.parametrize("kind", KINDS)
def test_poison_in_one_part(cuda_device: str, multiprocessors: int, kind: str, position: int, poison: float) -> None:
    """Wherever it stands, its row is NaN and the other is not."""
    logits = logits_of(None, (2, 20001), torch.float32, cuda_device).requires_grad_()
    with torch.no_grad():
        logits[1, position] = poison
    target = cases.softmax_target("probability" if kind == "probability" else "index", (2, 20001), torch.float32, "cpu")
    smoothing = 0.1 if kind == "smoothed" else 0.0
    loss = torchce.functional.cross_entropy(logits, target.to(cuda_device), reduction="none", label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isnan().tolist() == [False, True]
    assert bool(grad[0].isfinite().all()) and bool(grad[1].isnan().all())


ACROSS_SHAPES = [
    pytest.param((3, 1, 8), id="one_class"),
    pytest.param((1, 3, 5), id="fewer_classes_than_shares"),
    pytest.param((2, 33, 300), id="inner_is_no_multiple_of_8"),
    pytest.param((3, 40, 64), id="packed"),
    pytest.param((1, 3, 4104), id="more_rows_than_the_grid_takes_at_once"),
    pytest.param((2, 129, 16), id="shares_of_the_classes_do_not_come_out_even"),
]


@pytest.mark.parametrize("multiprocessors", [1, 5], indirect=True)
@pytest.mark.parametrize("shape", ACROSS_SHAPES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_across(
    cuda_device: str, multiprocessors: int, kind: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Classes far apart in memory, rows side by side: aligned for packs of them, and not."""
    check(kind, logits_of(None, shape, dtype, cuda_device))
    check(kind, logits_of("offset", shape, dtype, cuda_device), reduction="none")


@pytest.mark.parametrize("multiprocessors", [1], indirect=True)
@pytest.mark.parametrize("shape", [(64, 37), (61, 37), (4096, 3)], ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_transposed(
    cuda_device: str, multiprocessors: int, kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Rows without inner dimension whose neighbours lie side by side: with a target that does, and one that does not."""
    check(kind, logits_of("transposed", shape, dtype, cuda_device))


@pytest.mark.parametrize("multiprocessors", [1], indirect=True)
@pytest.mark.parametrize("size", [1, 255, 256, 257, 2047, 2048, 2049, 4095, 4096, 4097, 65537, 65544])
@pytest.mark.parametrize("layout", [None, "offset"], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_elements(cuda_device: str, multiprocessors: int, dtype: torch.dtype, layout: str | None, size: int) -> None:
    """Around a block of single elements, of packs, of two packs a thread, and more than the grid takes at once."""
    logits = logits_of(layout, (size,), dtype, cuda_device)
    check_sigmoid_bce(logits, cases.uniform((size,), dtype, cuda_device), target_grad=True)
    check_sigmoid_bce(logits, cases.uniform((size,), dtype, cuda_device), reduction="none")


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.uint8, torch.bool, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("inner", [64, 63])
def test_elements_with_targets_of_another_dtype(
    cuda_device: str, inner: int, dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    """Packs whose operands differ in width, and weights that repeat along them, across them, or not at all."""
    shape = (3, 5, inner)
    target = cases.uniform(shape, torch.float32, cuda_device)
    target = target if target_dtype.is_floating_point else (target > 0.5).to(target_dtype)
    for weight_shape in ((inner,), (5, 1), shape):
        check_sigmoid_bce(
            cases.normal(shape, dtype, cuda_device, scale=3),
            target,
            target_grad=target_dtype.is_floating_point,
            weight=cases.uniform(weight_shape, dtype, cuda_device),
            pos_weight=cases.uniform((5, 1), dtype, cuda_device, seed=6),
            reduction="none",
        )
