"""Values and gradients of softmax cross entropy against the float64 reference and torch."""

from __future__ import annotations

import math

import cases
import pytest
import reference
import torch
from cases import dtype_id
from comparison import assert_accurate, assert_bitwise_equal, check_softmax_ce, run
from torch import Tensor
from torch.nn import functional as F

import torchce.functional

KINDS = ["index", "probability"]
INF = math.inf


def loss_and_grad(logits: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Ours, with a gradient of one."""
    logits = logits.detach().requires_grad_()
    loss = torchce.functional.cross_entropy(logits, target, **options)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


# --- values over sizes, dtypes, scales, options ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", cases.CLASS_SHAPES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_class_counts(device: str, kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    target = cases.softmax_target(kind, shape, dtype, device)
    check_softmax_ce(cases.normal(shape, dtype, device, scale=3), target)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_every_remainder(device: str, kind: str, dtype: torch.dtype, layout: str) -> None:
    """All class counts around one, two and four registers, so that every remainder of a bulk loop occurs."""
    for classes in range(1, 70):
        shape = (3, classes)
        logits = cases.LAYOUTS[layout](lambda s: cases.normal(s, dtype, device, scale=3), shape)
        check_softmax_ce(logits, cases.softmax_target(kind, shape, dtype, device), reduction="none")


@pytest.mark.parametrize("shape", cases.SOFTMAX_SHAPES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(device: str, kind: str, reduction: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    target = cases.softmax_target(kind, shape, dtype, device)
    check_softmax_ce(cases.normal(shape, dtype, device, scale=3), target, reduction=reduction)


@pytest.mark.parametrize("shape", [(17, 37), (3, 37, 5)], ids=["2d", "3d"])
@pytest.mark.parametrize("scale", cases.SCALES)
@pytest.mark.parametrize("masked", [False, True], ids=["finite", "minus_inf"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_scales(device: str, kind: str, dtype: torch.dtype, masked: bool, scale: float, shape: tuple[int, ...]) -> None:
    logits = cases.normal(shape, dtype, device, scale=scale)
    target = cases.softmax_target(kind, shape, dtype, device)
    if masked:  # some targets are masked out too: their loss is inf, their gradient finite
        logits = cases.with_some_minus_infinity(logits)
    check_softmax_ce(logits, target, reduction="none")


@pytest.mark.parametrize("classes", [10, 33, 65, 257, 513, 1001])
@pytest.mark.parametrize("layout", [None, "transposed"], ids=["adjacent", "strided"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_logits_masked_with_the_least_number(device: str, dtype: torch.dtype, layout: str | None, classes: int) -> None:
    """As ``masked_fill(mask, torch.finfo(dtype).min)`` leaves them: at the beginning, at the end, all but one, all."""
    target = torch.tensor([classes - 1, 0, classes - 1, 0], device=device)
    logits = cases.arranged(layout, (4, classes), dtype, device)
    least = torch.finfo(dtype).min
    for row, masked in enumerate((slice(classes // 2), slice(classes // 2, None), slice(-1), slice(None))):
        logits[row, masked] = least
    check_softmax_ce(logits, target, reduction="none")


@pytest.mark.parametrize("classes", [10, 33, 513, 1601])
@pytest.mark.parametrize("layout", [None, "transposed"], ids=["adjacent", "strided"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_first_logit_far_below(device: str, dtype: torch.dtype, kind: str, layout: str | None, classes: int) -> None:
    """The CPU kernels sum against the first logits until another exceeds them by much."""
    gaps = [10.0, 60.0, 63.0, 66.0, 100.0, 1e4]
    logits = cases.arranged(layout, (len(gaps), classes), dtype, device)
    for row, gap in enumerate(gaps):
        logits[row, 0] -= gap
        logits[row, -1] += gap  # and the last block is another beginning
    target = cases.softmax_target(kind, logits.shape, dtype, device)
    check_softmax_ce(logits, target, reduction="none")


@pytest.mark.parametrize("classes", [10, 64, 600])
@pytest.mark.parametrize("layout", [None, "transposed"], ids=["adjacent", "strided"])
@pytest.mark.parametrize("gap", [0.0, 7.0, 16.0, 63.0])
def test_low_logits_at_both_ends_cost_no_digits(device: str, gap: float, layout: str | None, classes: int) -> None:
    """The worst of many losses is as good as torch's worst: differences to a low logit would be rounded too much."""
    logits = cases.arranged(layout, (2000, classes), torch.float32, device)
    logits[:, [0, -1]] -= gap
    target = torch.ones(len(logits), dtype=torch.int64, device=device)
    truth = F.cross_entropy(logits.double(), target, reduction="none")
    ours, torchs = (
        ((function(logits, target, reduction="none").double() - truth) / truth).abs()[truth > 0.1].max()
        for function in (torchce.functional.cross_entropy, F.cross_entropy)
    )
    assert ours <= torchs + 2e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("end", [0.3, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("layout", [None, "transposed"], ids=["adjacent", "strided"])
def test_slowly_rising_logits(device: str, layout: str | None, end: float, smoothing: float) -> None:
    """Sums that were corrected for every new maximum would gather the errors of the corrections."""
    logits = cases.arranged(layout, (4, 4096), torch.float32, device)
    logits.copy_(torch.linspace(0, end, 4096, device=device))
    target = torch.full((4,), 4095, device=device)
    check_softmax_ce(logits, target, label_smoothing=smoothing, reduction="none")


@pytest.mark.parametrize(("end", "classes"), [(0.1, 128256), (0.5, 151936), (0.1, 256000), (0.5, 256000)])
def test_long_rows_that_rise_slowly(device: str, end: float, classes: int) -> None:
    """A thread has up to 62 batches of such a row, each with a new maximum, and a row has a block to itself."""
    logits = (torch.arange(classes, device=device) * (end / classes)).expand(6, classes).contiguous()
    check_softmax_ce(logits, torch.arange(6, device=device) * 1000, reduction="none")


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("layout", [None, "transposed"], ids=["adjacent", "strided"])
@pytest.mark.parametrize("grad_output", [1e10, -1.0, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_probabilities_below_the_least_normal_number(
    device: str, dtype: torch.dtype, grad_output: float, layout: str | None, reduction: str
) -> None:
    """A large upstream gradient lifts them into what the dtype can hold, and a small one leaves nothing of them."""
    logits = cases.laid_out(layout, lambda shape: torch.zeros(shape, dtype=dtype, device=device), (24, 300))
    logits[:, 1:] = torch.linspace(-103.5, -60, 299, dtype=torch.float64).to(device, dtype)
    target = cases.indices((24,), 300, torch.int64, device)
    loss_shape = () if reduction == "sum" else (24,)
    upstream = torch.full(loss_shape, grad_output, dtype=dtype, device=device)
    check_softmax_ce(logits, target, grad_output=upstream, reduction=reduction)


@pytest.mark.parametrize("classes", [5, 40, 300])
@pytest.mark.parametrize("layout", [None, "transposed"], ids=["adjacent", "strided"])
def test_an_extreme_row_leaves_its_neighbours_alone(device: str, layout: str | None, classes: int) -> None:
    logits = cases.arranged(layout, (32, classes), torch.float32, device)
    target = torch.arange(32, device=device) % classes
    before = torchce.functional.cross_entropy(logits, target, reduction="none")
    logits[3, classes * 2 // 3] = 1e3
    after = torchce.functional.cross_entropy(logits, target, reduction="none")
    assert (before != after).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("classes", [10, 65])
@pytest.mark.parametrize("layout", [None, "transposed"], ids=["adjacent", "strided"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("of", ["weight", "grad_output"])
def test_nan_with_every_bit_set(device: str, of: str, dtype: torch.dtype, layout: str | None, classes: int) -> None:
    """Rounding such a NaN to bfloat16 as if it were a number would make it 0."""
    nan = torch.full([], -1, dtype=torch.int32, device=device).view(torch.float32)
    logits = cases.arranged(layout, (3, classes), dtype, device).requires_grad_()
    weight = torch.ones(classes, device=device)
    grad_output = torch.ones(3, device=device)
    if of == "weight":
        weight[1] = nan
    else:
        grad_output[1] = nan
    with torch.autocast(device, torch.bfloat16):  # the loss and what comes back for it are float32
        loss = torchce.functional.cross_entropy(logits, torch.arange(3, device=device), weight, reduction="none")
    (grad,) = torch.autograd.grad(loss, logits, grad_output.to(loss.dtype))
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("classes", [10, 65])
@pytest.mark.parametrize("layout", [None, "transposed"], ids=["adjacent", "strided"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("infinity", [INF, -INF], ids=["plus", "minus"])
def test_infinite_grad_output(
    device: str, infinity: float, dtype: torch.dtype, layout: str | None, classes: int
) -> None:
    """What a ``GradScaler`` looks for, in no other row, and NaN where infinity is taken from infinity."""
    logits = cases.arranged(layout, (3, classes), dtype, device).requires_grad_()
    loss = torchce.functional.cross_entropy(logits, torch.arange(3, device=device), reduction="none")
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor([1.0, infinity, 1.0], dtype=dtype, device=device))
    assert grad[1].isnan().tolist() == [k == 1 for k in range(classes)]
    assert (grad[1] == infinity).tolist() == [k != 1 for k in range(classes)]
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(13, 11), (3, 7, 5, 2)], ids=["2d", "4d"])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 255], ids=lambda i: f"ignore{i}")
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0], ids=lambda s: f"smooth{s}")
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_index_options(
    device: str,
    dtype: torch.dtype,
    weighted: bool,
    smoothing: float,
    ignore_index: int,
    reduction: str,
    shape: tuple[int, ...],
) -> None:
    target = cases.softmax_target("index", shape, dtype, device)
    target[target == 1] = ignore_index
    weight = cases.uniform([shape[1]], dtype, device) if weighted else None
    check_softmax_ce(
        cases.normal(shape, dtype, device, scale=3),
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
    )


@pytest.mark.parametrize("shape", [(11,), (13, 11), (3, 7, 5, 2)], ids=["1d", "2d", "4d"])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0], ids=lambda s: f"smooth{s}")
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_probability_options(
    device: str,
    dtype: torch.dtype,
    weighted: bool,
    smoothing: float,
    reduction: str,
    shape: tuple[int, ...],
) -> None:
    """With the gradient of the target, too."""
    weight = cases.uniform([shape[0 if len(shape) == 1 else 1]], dtype, device) if weighted else None
    check_softmax_ce(
        cases.normal(shape, dtype, device, scale=3),
        cases.softmax_target("probability", shape, dtype, device),
        target_grad=True,
        weight=weight,
        label_smoothing=smoothing,
        reduction=reduction,
    )


@pytest.mark.parametrize("kind", ["unnormalised", "negative", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_targets_that_are_no_distribution(device: str, dtype: torch.dtype, kind: str) -> None:
    shape = (7, 33)
    target = {
        "unnormalised": cases.uniform(shape, dtype, device),
        "negative": cases.normal(shape, dtype, device, seed=5),
        "hard": torch.eye(33, device=device, dtype=dtype)[:7],
    }[kind]
    check_softmax_ce(cases.normal(shape, dtype, device), target, target_grad=True, label_smoothing=0.1)


# --- dtypes of the other arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 200), (2, 200, 5)], ids=["2d", "3d"])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("target_dtype", cases.INDEX_DTYPES, ids=dtype_id)
def test_index_dtypes(device: str, target_dtype: torch.dtype, reduction: str, shape: tuple[int, ...]) -> None:
    target = cases.indices(cases.index_shape(shape), shape[1], target_dtype, device)
    check_softmax_ce(cases.normal(shape, torch.float32, device), target, reduction=reduction)


def test_uint8_with_ignore_index_255(device: str) -> None:
    """How segmentation masks come from disk."""
    shape = (2, 19, 6, 7)
    target = cases.indices(cases.index_shape(shape), shape[1], torch.uint8, device)
    target[:, ::2] = 255
    check_softmax_ce(cases.normal(shape, torch.float32, device), target, ignore_index=255)


def test_uint8_target_156_is_not_minus_100(device: str) -> None:
    """156 and the default ignore_index are the same eight bits."""
    target = torch.full((3,), 156, dtype=torch.uint8, device=device)
    loss = check_softmax_ce(cases.normal((3, 200), torch.float32, device), target, reduction="none")
    assert bool((loss > 0).all())


@pytest.mark.parametrize("target_dtype", cases.INDEX_DTYPES, ids=dtype_id)
def test_ignore_index_is_not_truncated_to_the_target_dtype(device: str, target_dtype: torch.dtype) -> None:
    """2^32 + 1 ignores no row, though its low bits are class 1."""
    target = torch.ones(3, dtype=target_dtype, device=device)
    logits = cases.normal((3, 4), torch.float32, device)
    loss = check_softmax_ce(logits, target, reduction="none", ignore_index=2**32 + 1)
    assert bool((loss > 0).all())


@pytest.mark.parametrize("weight_dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_index_weight_of_another_dtype(device: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """torch refuses these; the loss keeps the logits' dtype and the weight is not rounded to it."""
    weight = cases.uniform([21], weight_dtype, device)
    target = cases.indices([9], 21, torch.int64, device)
    loss = check_softmax_ce(cases.normal((9, 21), dtype, device), target, weight=weight, label_smoothing=0.1)
    assert loss.dtype == dtype


@pytest.mark.parametrize("target_dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(9, 21), (2, 21, 5)], ids=["2d", "3d"])
def test_probabilities_of_another_dtype(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    """Input and target promote together; each gradient has its own tensor's dtype."""
    target = cases.probabilities(shape, target_dtype, device)
    loss = check_softmax_ce(cases.normal(shape, dtype, device), target, target_grad=True, label_smoothing=0.1)
    assert loss.dtype == torch.promote_types(dtype, target_dtype)


@pytest.mark.parametrize("weight_dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_probability_weight_of_another_dtype(device: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """With probabilities the weight promotes too."""
    weight = cases.uniform([21], weight_dtype, device)
    target = cases.probabilities((9, 21), dtype, device)
    loss = check_softmax_ce(cases.normal((9, 21), dtype, device), target, weight=weight)
    assert loss.dtype == torch.promote_types(dtype, weight_dtype)


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "shape"), cases.LAYOUT_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_layouts(device: str, kind: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    logits = cases.LAYOUTS[layout](lambda s: cases.normal(s, dtype, device, scale=3), shape)
    target = cases.softmax_target(kind, shape, dtype, device)
    check_softmax_ce(logits, target, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize(("layout", "shape"), cases.LAYOUT_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_probability_layouts(device: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    target = cases.LAYOUTS[layout](lambda s: cases.uniform(s, dtype, device), shape)
    check_softmax_ce(cases.normal(shape, dtype, device, scale=3), target, target_grad=True, reduction="sum")


@pytest.mark.parametrize("dims", [5, 8, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_many_dimensions_that_cannot_be_merged(device: str, kind: str, dims: int) -> None:
    """No single stride leads through the inner dimensions of strided logits."""
    shape = (2,) * dims
    logits = cases.LAYOUTS["strided"](lambda s: cases.normal(s, torch.float32, device), shape)
    check_softmax_ce(logits, cases.softmax_target(kind, shape, torch.float32, device), reduction="none")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "offset", "expanded_rows", "stride_0"])
@pytest.mark.parametrize("target_dtype", cases.INDEX_DTYPES, ids=dtype_id)
def test_index_layouts(device: str, target_dtype: torch.dtype, layout: str) -> None:
    shape = (4, 21, 5)
    target = cases.LAYOUTS[layout](lambda s: cases.indices(s, 21, target_dtype, device), (4, 5))
    check_softmax_ce(cases.normal(shape, torch.float32, device), target, reduction="none")


def test_strided_index_of_a_batch(device: str) -> None:
    """A column of a table: the one-dimensional target whose stride is not 1."""
    target = cases.indices((6, 4), 21, torch.int64, device)[:, 1]
    check_softmax_ce(cases.normal((6, 21), torch.float32, device), target, reduction="none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_weight_layouts(device: str, layout: str, kind: str) -> None:
    weight = {
        "strided": cases.uniform([42], torch.float32, device)[::2],
        "expanded": cases.uniform([1], torch.float32, device).expand(21),
    }[layout]
    target = cases.softmax_target(kind, (6, 21), torch.float32, device)
    check_softmax_ce(cases.normal((6, 21), torch.float32, device), target, weight=weight)


@pytest.mark.parametrize("shape", [(6, 21), (3, 21, 5), (2, 21, 3, 5)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("kind", KINDS)
def test_unreduced_loss_is_contiguous(device: str, kind: str, shape: tuple[int, ...]) -> None:
    logits = cases.LAYOUTS["transposed"](lambda s: cases.normal(s, torch.float32, device), shape)
    target = cases.softmax_target(kind, shape, torch.float32, device)
    assert torchce.functional.cross_entropy(logits, target, reduction="none").is_contiguous()


# --- grad_output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stride_0", "transposed", "strided"])
@pytest.mark.parametrize("kind", KINDS)
def test_grad_output_layouts(device: str, kind: str, form: str) -> None:
    """`.sum()` after reduction="none" sends a stride-0 gradient, `.transpose()` a transposed one."""
    shape, rows = (4, 21, 5), (4, 5)
    grad_output = {
        "stride_0": torch.tensor(0.37, device=device).expand(rows),
        "transposed": cases.normal((5, 4), torch.float32, device).t(),
        "strided": cases.normal((8, 10), torch.float32, device)[::2, ::2],
    }[form]
    check_softmax_ce(
        cases.normal(shape, torch.float32, device),
        cases.softmax_target(kind, shape, torch.float32, device),
        grad_output=grad_output,
        reduction="none",
        target_grad=kind == "probability",
    )


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**16])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_scaled_grad_output(device: str, dtype: torch.dtype, scale: float) -> None:
    """What GradScaler and gradient accumulation send."""
    if dtype == torch.float16 and scale > torch.finfo(dtype).max:
        scale = 2.0**15
    check_softmax_ce(
        cases.normal((9, 21), dtype, device),
        cases.indices([9], 21, torch.int64, device),
        grad_output=torch.tensor(scale, dtype=dtype, device=device),
    )


# --- edge cases, by name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3)], ids=["1d", "2d", "3d"])
def test_all_ignored(device: str, shape: tuple[int, ...], weighted: bool, smoothing: float) -> None:
    """The mean is 0 / 0 and the sum 0; the gradient is exactly 0 in either case."""
    logits = cases.normal(shape, torch.float32, device)
    target = torch.full(cases.index_shape(shape), -100, device=device)
    weight = cases.uniform([5], torch.float32, device) if weighted else None
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        loss, grad = loss_and_grad(logits, target, weight=weight, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(loss.item(), expected, rtol=0, atol=0, equal_nan=True)
        assert torch.count_nonzero(grad) == 0
    loss, grad = loss_and_grad(logits, target, weight=weight, reduction="none", label_smoothing=smoothing)
    assert torch.count_nonzero(loss) == 0
    assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_weights_zero(device: str, smoothing: float) -> None:
    """The mean is 0 / 0 in rows that do count, so the gradients are NaN as well; sums are 0."""
    logits = cases.normal((4, 5), torch.float32, device)
    target = torch.tensor([0, 1, 4, 2], device=device)
    options = {"weight": torch.zeros(5, device=device), "label_smoothing": smoothing}
    loss, grad = loss_and_grad(logits, target, **options)
    assert loss.isnan()
    assert bool(grad.isnan().all())
    loss, grad = loss_and_grad(logits, target, reduction="sum", **options)
    assert loss == 0
    assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("shape", [(0, 5), (0, 20001), (0, 5, 3), (2, 5, 0), (2, 5, 3, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(device: str, kind: str, shape: tuple[int, ...]) -> None:
    logits = cases.normal(shape, torch.float32, device)
    target = (
        torch.zeros(shape, device=device)
        if kind == "probability"
        else torch.zeros(cases.index_shape(shape), dtype=torch.int64, device=device)
    )
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        loss, grad = loss_and_grad(logits, target, reduction=reduction)
        torch.testing.assert_close(loss.item(), expected, rtol=0, atol=0, equal_nan=True)
        assert grad.shape == logits.shape
    loss, grad = loss_and_grad(logits, target, reduction="none")
    assert loss.shape == cases.index_shape(shape)
    assert grad.shape == logits.shape


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("shape", [(3, 5, 2, 0), (3, 5, 0, 2), (0, 5, 0, 0), (0, 5, 2, 3)], ids=str)
def test_empty_with_inner_dimensions_of_no_common_stride(device: str, kind: str, shape: tuple[int, ...]) -> None:
    """Fuzzing found it: a copy was to give strides that merge, but torch does not copy what has no elements: no end."""
    logits = torch.empty_strided(shape, (1, 1, 7, 3), device=device)
    target = torch.empty(shape, device=device)
    if kind == "index":
        target = torch.empty(cases.index_shape(shape), dtype=torch.int64, device=device)
    loss, grad = loss_and_grad(logits, target, reduction="none")
    assert loss.shape == cases.index_shape(shape)
    assert grad.shape == shape
    assert loss_and_grad(logits, target, reduction="mean")[0].isnan()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("logit", [0.0, 1e4, -1e4])
def test_one_class(device: str, logit: float, dtype: torch.dtype) -> None:
    """log of a certain class: exactly 0, not a rounding error."""
    logits = torch.full((3, 1), logit, dtype=dtype, device=device)
    loss, grad = loss_and_grad(logits, torch.zeros(3, dtype=torch.int64, device=device))
    assert loss == 0
    assert torch.count_nonzero(grad) == 0


def test_no_classes(device: str) -> None:
    """Every row ignored, because no class can be named."""
    logits = torch.empty(2, 0, device=device)
    loss, grad = loss_and_grad(logits, torch.full((2,), -100, device=device))
    assert loss.isnan()
    assert grad.shape == (2, 0)


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3)], ids=["2d", "3d"])
def test_minus_inf_logit_at_the_target(device: str, shape: tuple[int, ...]) -> None:
    """An impossible class happened: the loss is inf, the gradient p - 1 = -1 there."""
    logits = cases.normal(shape, torch.float32, device)
    logits[0, 2] = -INF
    target = torch.full(cases.index_shape(shape), 2, device=device)
    loss, grad = loss_and_grad(logits, target, reduction="none")
    assert bool((loss[0] == INF).all())
    assert bool(loss[1].isfinite().all())
    assert bool((grad[0, 2] == -1).all())
    assert bool(grad.isfinite().all())


def test_minus_inf_logit_with_smoothing(device: str) -> None:
    """Smoothing gives the impossible class a probability: the loss is inf as in torch."""
    logits = torch.tensor([[0.0, 1.0, -INF]], device=device)
    target = torch.tensor([0], device=device)
    loss, grad = loss_and_grad(logits, target, label_smoothing=0.1)
    assert loss == INF
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_all_logits_minus_inf(device: str, kind: str) -> None:
    """No distribution at all: NaN, in its own row only."""
    logits = torch.tensor([[-INF, -INF, -INF], [0.5, 1.0, 2.0]], device=device)
    target = cases.softmax_target(kind, (2, 3), torch.float32, device)
    loss, grad = loss_and_grad(logits, target, reduction="none")
    assert loss[0].isnan()
    assert loss[1].isfinite()
    assert bool(grad[0].isnan().all())
    assert bool(grad[1].isfinite().all())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_all_logits_minus_inf_at_every_remainder(device: str, kind: str, dtype: torch.dtype) -> None:
    """Found by fuzzing: 65 classes had an infinite loss, because the last pack was filled up with finite numbers."""
    for classes in (*range(1, 10), 31, 63, *range(64, 140), 1000, 1001):
        logits = torch.full((2, classes), -INF, dtype=dtype, device=device)
        target = cases.softmax_target(kind, (2, classes), dtype, device)
        loss, grad = loss_and_grad(logits, target, reduction="none")
        assert bool(loss.isnan().all()), classes
        assert bool(grad.isnan().all()), classes


@pytest.mark.parametrize("classes", [3, 40, 1001])
@pytest.mark.parametrize("poison", [INF, math.nan], ids=["plus_inf", "nan"])
@pytest.mark.parametrize("layout", ["row", "strided"])
@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_row_is_nan(device: str, kind: str, layout: str, poison: float, classes: int) -> None:
    """Wherever in the row it stands: a maximum taken with `<` loses a NaN at some positions."""
    for position in {0, 1, classes // 2, classes - 2, classes - 1}:
        logits = cases.normal((3, classes), torch.float32, device)
        logits[1, position] = poison
        if layout == "strided":
            logits = logits.t().contiguous().t()
        target = cases.softmax_target(kind, (3, classes), torch.float32, device)
        loss, grad = loss_and_grad(logits, target, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        assert bool(grad[1].isnan().all()), f"position {position}"
        assert bool(grad[0].isfinite().all())
        assert bool(grad[2].isfinite().all())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("poison", [INF, -INF, math.nan], ids=["plus_inf", "minus_inf", "nan"])
@pytest.mark.parametrize("inner", [False, True], ids=["2d", "3d"])
def test_ignored_row_may_hold_anything(device: str, inner: bool, poison: float, smoothing: float) -> None:
    """Padding is never read into the loss, and its gradient is exactly 0 (torch leaves NaN there)."""
    shape = (4, 5, 3) if inner else (4, 5)
    logits = cases.normal(shape, torch.float32, device)
    target = cases.softmax_target("index", shape, torch.float32, device)
    target[1] = -100
    clean, clean_grad = loss_and_grad(logits, target, label_smoothing=smoothing)
    logits[1] = poison
    loss, grad = loss_and_grad(logits, target, label_smoothing=smoothing)
    assert_bitwise_equal(loss, clean)
    assert torch.count_nonzero(grad[1]) == 0
    assert_bitwise_equal(grad, clean_grad)


def test_zero_probability_at_a_minus_inf_logit(device: str) -> None:
    """0 * inf: torch gives NaN, the limit is the loss of the other classes."""
    logits = torch.tensor([[0.5, -INF, 2.0, 1.0]], device=device)
    target = torch.tensor([[0.25, 0.0, 0.75, 0.0]], device=device)
    loss = check_softmax_ce(logits, target)
    without = check_softmax_ce(logits[:, [0, 2, 3]], target[:, [0, 2, 3]])
    assert loss.isfinite()
    torch.testing.assert_close(loss, without)


def test_positive_probability_at_a_minus_inf_logit(device: str) -> None:
    logits = torch.tensor([[0.5, -INF, 2.0]], device=device)
    assert check_softmax_ce(logits, torch.tensor([[0.25, 0.25, 0.5]], device=device)) == INF


def test_dominant_logit_keeps_the_small_gradients(device: str) -> None:
    """At a scale of 1e4 an lse kept as one float32 number is off by 5e-4, and so is every gradient."""
    logits = cases.normal((64, 33), torch.float32, device) + 1e4
    check_softmax_ce(logits, cases.indices([64], 33, torch.int64, device), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_rows_do_not_drift(device: str, reduction: str, dtype: torch.dtype) -> None:
    """Row losses are summed in float32 at least and rounded once; torch is not even granted its error here."""
    logits = cases.normal((30011, 5), dtype, device, scale=0.3)
    target = cases.indices([30011], 5, torch.int64, device)
    loss = torchce.functional.cross_entropy(logits, target, reduction=reduction)
    assert_accurate("loss", loss, reference.softmax_ce(logits, target, reduction=reduction).loss)


def test_inputs_are_not_written(device: str) -> None:
    shape = (6, 21)
    logits = cases.normal(shape, torch.float32, device)
    weight = cases.uniform([21], torch.float32, device)
    for kind in KINDS:
        target = cases.softmax_target(kind, shape, torch.float32, device)
        before = [t.clone() for t in (logits, target, weight)]
        versions = [t._version for t in (logits, target, weight)]
        options = {"weight": weight, "label_smoothing": 0.1}
        run(torchce.functional.cross_entropy, logits, target, options, None, kind == "probability")
        for after, copy in zip((logits, target, weight), before, strict=True):
            assert_bitwise_equal(after, copy)
        assert [t._version for t in (logits, target, weight)] == versions


@pytest.mark.cuda
@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_cuda_marks_a_bad_index_with_nan(cuda_device: str, bad: int) -> None:
    """No sync, so no IndexError: that row's loss and gradient are NaN, the others' are right, the process lives."""
    logits = cases.normal((4, 5), torch.float32, cuda_device)
    target = torch.tensor([0, bad, 4, -100], device=cuda_device)
    loss, grad = loss_and_grad(logits, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    assert grad.isnan().any(1).tolist() == [False, True, False, False]
