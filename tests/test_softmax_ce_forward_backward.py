"""The op that gives the loss of softmax_ce and writes the gradient over the logits: softmax_ce_forward_backward_."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import dtype_id
from comparison import assert_bitwise_equal, check_softmax_ce, grad_output_for
from torch import Tensor

from torchce import ops

WithClusters = Callable[..., None]
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


class ForwardBackward(torch.autograd.Function):
    """The op as a loss, so that the suite's one comparison takes it: its upstream gradient is the one it will get."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *rest: Any) -> Tensor:
        shape = cases.index_shape(logits.shape) if reduction == "none" else ()
        dtype = torch.promote_types(logits.dtype, target.dtype)
        if ops.softmax_ce_accumulation(logits, target, weight) == torch.float64:
            dtype = torch.float64
        ctx.grad_output = grad_output_for(torch.empty(shape, dtype=dtype, device=logits.device))
        memory = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
        ctx.grad = memory.copy_(logits) if ops.one_stride(logits) and ops.one_stride(memory) else logits.clone()
        return ops.softmax_ce_forward_backward_(
            ctx.grad_output, ctx.grad, target, weight, dtype, REDUCTIONS[reduction], *rest
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        assert_bitwise_equal(grad_output, ctx.grad_output)
        return ctx.grad, *[None] * 8


def forward_backward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> Tensor:
    if weight is not None:
        beside = weight if target.is_floating_point() else None
        weight = weight.to(ops.softmax_ce_accumulation(logits, target, beside))
    if softcap and target.is_floating_point():  # as torchce.functional does
        target = target.to(ops.softmax_ce_accumulation(logits, target, weight))
    own = (0.0, softcap, logit_scale)
    return ForwardBackward.apply(logits, target, weight, reduction, ignore_index, label_smoothing, *own)


def check(kind: str, logits: Tensor, reduction: str = "none") -> None:
    """Loss and gradient."""
    target, options = cases.kernel_problem(kind, logits)
    check_softmax_ce(logits, target, reduction=reduction, function=forward_backward, **options)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("shape", [*cases.CLASS_SHAPES, *cases.SOFTMAX_SHAPES])
@pytest.mark.parametrize("kind", cases.KERNEL_KINDS)
def test_shapes(device: str, emulated: bool, kind: str, shape: tuple[int, ...], reduction: str) -> None:
    if emulated and max(shape) > 9000:
        pytest.skip("too large for the emulation")
    check(kind, cases.normal(shape, torch.float32, device, scale=3), reduction)


@pytest.mark.parametrize(("kind", "dtype"), cases.CAPPED_TYPES)
def test_transformed_logits(device: str, kind: str, dtype: torch.dtype) -> None:
    for shape in ((37, 10), (5, 300), (3, 9001), (2, 19, 64)):
        check(kind, cases.normal(shape, dtype, device, scale=3))


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "offset"])
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
def test_layouts(device: str, kind: str, dtype: torch.dtype, layout: str) -> None:
    """Classes with a stride, and rows that start misaligned."""
    for shape in ((37, 21, 5), (2, 100, 3)):
        check(kind, cases.arranged(layout, shape, dtype, device))


@pytest.mark.parametrize("index_dtype", cases.INDEX_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_index_options(device: str, index_dtype: torch.dtype, ignore_index: int) -> None:
    """Class weights without smoothing, every index dtype, another index to ignore."""
    for shape in ((37, 100), (4, 21, 5)):
        logits = cases.normal(shape, torch.float32, device, scale=3)
        target = cases.indices(cases.index_shape(shape), shape[1], index_dtype, device)
        target.view(-1)[1] = 3
        weight = cases.uniform(shape[1:2], torch.float32, device)
        check_softmax_ce(
            logits, target, weight=weight, ignore_index=ignore_index, reduction="none", function=forward_backward
        )


def test_expanded_grad_output(device: str) -> None:
    """One number for all rows, as the gradient of a sum of unreduced losses is."""
    logits, target = cases.normal((37, 100), torch.float32, device), cases.indices((37,), 100, torch.int64, device)
    grad_output = torch.full((), -2.625, device=device)
    results = []
    for each in (grad_output.expand(37), grad_output.repeat(37)):
        grad = logits.clone()
        loss = ops.softmax_ce_forward_backward_(each, grad, target, None, None, 0, -100, 0.0)
        results.append((loss, grad))
    for result, expected in zip(*results, strict=True):
        assert_bitwise_equal(result, expected)


@pytest.mark.parametrize("scale", cases.SCALES)
@pytest.mark.parametrize("kind", cases.KERNEL_KINDS)
def test_extreme_logits(device: str, kind: str, scale: float) -> None:
    logits = cases.with_some_minus_infinity(cases.normal((5, 1001), torch.float32, device, scale=scale))
    target = cases.probabilities((5, 1001), torch.float32, device).masked_fill(logits == -torch.inf, 0)
    if kind != "probability":
        target = logits.argmax(1)
    check_softmax_ce(logits, target, reduction="sum", function=forward_backward)


@pytest.mark.parametrize("classes", [3, 100, 5000])
@pytest.mark.parametrize("kind", ["smoothed", "probability"])
def test_infinite_weights(device: str, kind: str, classes: int) -> None:
    """Of the first class, the last and every third."""
    logits = cases.normal((5, classes), torch.float32, device)
    target, options = cases.kernel_problem(kind, logits)
    for places in (0, classes - 1, slice(None, None, 3)):
        weight = options["weight"].clone()
        weight[places] = torch.inf
        loss = check_softmax_ce(
            logits, target, reduction="none", function=forward_backward, **(options | {"weight": weight})
        )
        assert loss.isinf().tolist() == [kind == "probability" or row != 1 for row in range(5)]


@pytest.mark.cuda
@pytest.mark.parametrize("layout", [None, "offset"], ids=["aligned", "misaligned"])
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
def test_every_change_of_plan(
    cuda_device: str, multiprocessors: int, kind: str, layout: str | None, dtype: torch.dtype
) -> None:
    """Lanes and blocks a row, all of it kept and, in the emulation's little shared memory, only its beginning."""
    for classes in cases.classes_around_plan_changes(dtype):
        if multiprocessors == 1 or classes >= 127 * 16 // dtype.itemsize:
            check(kind, cases.arranged(layout, (3, classes), dtype, cuda_device))


@pytest.mark.cuda
@pytest.mark.parametrize("layout", [None, "offset"], ids=["aligned", "misaligned"])
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
@pytest.mark.parametrize(("blocks", "packs"), [(2, 1025), (4, 2049), (8, 4097)])
def test_rows_spread_over_a_cluster(
    cuda_device: str,
    with_clusters: WithClusters,
    blocks: int,
    packs: int,
    kind: str,
    layout: str | None,
    dtype: torch.dtype,
) -> None:
    """So many packs that each of three rows is given so many blocks, where they are at hand."""
    with_clusters(3 * blocks, blocks)
    classes = packs * 16 // dtype.itemsize
    check(kind, cases.arranged(layout, (3, classes - 1), dtype, cuda_device))


@pytest.mark.cuda
@pytest.mark.parametrize(("blocks", "packs"), [(2, 4097), (8, 16385)])
@pytest.mark.parametrize(("kind", "dtype"), [("index", torch.float32), ("probability", torch.bfloat16)], ids=str)
def test_a_cluster_takes_row_after_row(
    cuda_device: str, with_clusters: WithClusters, blocks: int, packs: int, kind: str, dtype: torch.dtype
) -> None:
    """Of which it can keep only the beginning."""
    with_clusters(1, blocks)
    check(kind, cases.normal((5, packs * 16 // dtype.itemsize), dtype, cuda_device, scale=3))


@pytest.mark.cuda
@pytest.mark.parametrize("placeable", [1, 2, 8, 16])
def test_a_cluster_that_cannot_be_placed(cuda_device: str, with_clusters: WithClusters, placeable: int) -> None:
    """Rows for sixteen blocks; a smaller cluster takes them where multiprocessors stand in small groups."""
    with_clusters(16, 16, placeable)
    check("index", cases.normal((2, 32769 * 4), torch.float32, cuda_device, scale=3))


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 20, 133, 1000])
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        (32000, torch.bfloat16),
        (12288, torch.float32),  # 48 KiB of shared memory, what a block gets unasked but for what the kernel declares
        (49152, torch.bfloat16),
        (128256, torch.bfloat16),
        (262144, torch.float32),
        (500_001, torch.float32),  # more than a cluster keeps
    ],
    ids=str,
)
def test_rows_that_take_a_cluster(
    cuda_device: str, emulated: bool, with_clusters: WithClusters, rows: int, classes: int, dtype: torch.dtype
) -> None:
    """Up to sixteen blocks a row."""
    if rows * classes > (2**21 if emulated else 2**26):
        pytest.skip("the reference would need gigabytes, or the emulation minutes")
    with_clusters(132, 16)
    check("index", cases.normal((rows, classes), dtype, cuda_device, scale=3))


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_bitwise_the_same_every_time(device: str, kind: str) -> None:
    logits = cases.normal((37, 1001), torch.float32, device, scale=3)
    target = cases.softmax_target(kind, (37, 1001), torch.float32, device)
    results = []
    for _ in range(20):
        grad = logits.clone()
        loss = ops.softmax_ce_forward_backward_(
            torch.ones((), device=device), grad, target, None, None, REDUCTIONS["sum"], -100, 0.0
        )
        results.append((loss, grad))
    for loss, grad in results[1:]:
        assert_bitwise_equal(loss, results[0][0])
        assert_bitwise_equal(grad, results[0][1])


@pytest.mark.cuda
@pytest.mark.parametrize(("shape", "launches"), [((700, 10), 1), ((3, 5000), 1), ((3, 19, 64), 2)], ids=str)
def test_one_launch_along_rows(
    cuda_device: str, count_launches: Callable[[], int], shape: tuple[int, ...], launches: int
) -> None:
    """And two where classes have a stride."""
    logits = cases.normal(shape, torch.float32, cuda_device)
    target = cases.indices(cases.index_shape(shape), shape[1], torch.int64, cuda_device)
    before = count_launches()
    ops.softmax_ce_forward_backward_(torch.ones(()), logits, target, None, None, REDUCTIONS["sum"], -100, 0.0)
    assert count_launches() == before + launches


def test_loss_dtype(device: str) -> None:
    """As under autocast: 16-bit logits, a float32 loss that was never rounded to 16 bits."""
    logits = cases.normal((64, 1000), torch.bfloat16, device)
    target = cases.indices((64,), 1000, torch.int64, device)
    expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="sum")
    one = torch.ones((), device=device)
    loss = ops.softmax_ce_forward_backward_(one, logits, target, None, torch.float32, 2, -100, 0.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_empty_batch(device: str) -> None:
    logits, target = torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)
    one = torch.ones((), device=device)
    assert ops.softmax_ce_forward_backward_(one, logits, target, None, None, 2, -100, 0.0).item() == 0


def test_a_bad_index_leaves_the_logits_alone() -> None:
    logits, target = cases.normal((100, 1000), torch.float32, "cpu"), cases.indices((100,), 1000, torch.int64, "cpu")
    target[70] = 1000
    before = logits.clone()
    with pytest.raises(IndexError, match=r"Target 1000 is out of bounds. \(row 70 of 100, 1000 classes\)"):
        ops.softmax_ce_forward_backward_(torch.ones(()), logits, target, None, None, 2, -100, 0.0)
    assert_bitwise_equal(logits, before)


@pytest.mark.cuda
def test_a_bad_index_is_nan_on_cuda(cuda_device: str) -> None:
    for classes in (5, 5000):
        logits = cases.normal((4, classes), torch.float32, cuda_device)
        target = torch.tensor([0, classes, 1, -100], device=cuda_device)
        loss = ops.softmax_ce_forward_backward_(
            torch.ones(4, device=cuda_device), logits, target, None, None, 0, -100, 0.0
        )
        assert loss.isnan().tolist() == [False, True, False, False]
        assert logits.isnan().all(1).tolist() == [False, True, False, False]
        assert not logits[[0, 2, 3]].isnan().any()


def test_a_mean_is_refused(device: str) -> None:
    """Its divisor is not known when the first gradient is written."""
    logits = cases.normal((6, 5), torch.float32, device)
    before = logits.clone()
    target, one = cases.indices((6,), 5, torch.int64, device), torch.ones((), device=device)
    with pytest.raises(RuntimeError, match="reduction"):
        ops.softmax_ce_forward_backward_(one, logits, target, None, None, REDUCTIONS["mean"], -100, 0.0)
    assert_bitwise_equal(logits, before)
