"""Values and gradients of sigmoid binary cross entropy against the float64 reference and torch."""

from __future__ import annotations

import math
from typing import Any

import cases
import pytest
import reference
import torch
from cases import dtype_id
from comparison import assert_accurate, assert_bitwise_equal, check_sigmoid_bce, grad_output_for, run
from torch import Tensor

import torchce.functional

INF = math.inf

# What may stand beside logits of [3, 5, 4, 2]; the last two are no (outer, size, inner) broadcast.
BROADCASTS = [
    pytest.param((), id="scalar"),
    pytest.param((1,), id="1"),
    pytest.param((2,), id="last"),
    pytest.param((5, 1, 1), id="channel"),
    pytest.param((1, 5, 1, 1), id="channel_4d"),
    pytest.param((3, 1, 1, 1), id="batch"),
    pytest.param((4, 2), id="last_two"),
    pytest.param((4, 1), id="third"),
    pytest.param((5, 4, 2), id="all_but_batch"),
    pytest.param((3, 5, 4, 2), id="full"),
    pytest.param((5, 1, 2), id="channel_and_last"),
    pytest.param((3, 1, 4, 1), id="batch_and_third"),
]


def bce(logits: Tensor, target: Tensor, **options: object) -> Tensor:
    return torchce.functional.binary_cross_entropy_with_logits(logits, target, **options)


def loss_and_grad(logits: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Ours, with a gradient of one."""
    logits = logits.detach().requires_grad_()
    loss = bce(logits, target, **options)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


# --- values over sizes, dtypes, scales, options ---------------------------------------------------------------------


SPECIAL = [
    (INF, 1.0, 0.0, 0.0),  # torch: NaN
    (-INF, 0.0, 0.0, 0.0),
    (INF, 0.0, INF, 1.0),
    (-INF, 1.0, INF, -1.0),
    (INF, 0.5, INF, 0.5),
    (-INF, 0.5, INF, -0.5),
    (math.nan, 0.0, math.nan, math.nan),
    (math.nan, 1.0, math.nan, math.nan),
]


@pytest.mark.parametrize("shape", cases.ELEMENT_SHAPES)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_shapes(device: str, dtype: torch.dtype, reduction: str, shape: tuple[int, ...]) -> None:
    logits = cases.normal(shape, dtype, device, scale=3)
    check_sigmoid_bce(logits, cases.uniform(shape, dtype, device), target_grad=True, reduction=reduction)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_every_remainder(device: str, dtype: torch.dtype, offset: int) -> None:
    """All lengths around one, two and four registers, so that every remainder of a bulk loop occurs."""
    for count in range(1, 70):
        logits = cases.normal([count + offset], dtype, device, scale=3)[offset:]
        target = cases.uniform([count + offset], dtype, device)[offset:]
        check_sigmoid_bce(logits, target, reduction="none", target_grad=True)


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bool, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_every_remainder_of_weighted_columns(
    device: str, dtype: torch.dtype, target_dtype: torch.dtype, columns: int
) -> None:
    """Rows shorter than a register or as long, which then end anywhere within one."""
    for rows in (1, 2, 3, 5, 8, 11, 16, 33):
        target = cases.uniform((rows, columns), torch.float32, device)
        check_sigmoid_bce(
            cases.normal((rows, columns), dtype, device, scale=3),
            target if target_dtype.is_floating_point else (target > 0.6).to(target_dtype),
            target_grad=target_dtype.is_floating_point,
            reduction="none",
            weight=cases.uniform([columns], torch.float32, device, seed=6),
            pos_weight=cases.uniform([columns], torch.float32, device, seed=7) * 3,
        )


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("scale", cases.SCALES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_scales(device: str, dtype: torch.dtype, weighted: bool, scale: float, hard: bool) -> None:
    target = cases.uniform((33, 31), dtype, device)
    weights = {}
    if weighted:
        weights["weight"] = cases.uniform([31], dtype, device, seed=6)
        weights["pos_weight"] = cases.uniform([31], dtype, device, seed=7) * 3
    check_sigmoid_bce(
        cases.normal((33, 31), dtype, device, scale=scale),
        target.round() if hard else target,
        target_grad=True,
        reduction="none",
        **weights,
    )


@pytest.mark.parametrize("shape", BROADCASTS)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("which", ["weight", "pos_weight"])
def test_weight_broadcasts(device: str, which: str, reduction: str, shape: tuple[int, ...]) -> None:
    check_sigmoid_bce(
        cases.normal((3, 5, 4, 2), torch.float32, device, scale=3),
        cases.uniform((3, 5, 4, 2), torch.float32, device),
        target_grad=True,
        reduction=reduction,
        **{which: cases.uniform(shape, torch.float32, device, seed=6) * 3},
    )


@pytest.mark.parametrize("pos_shape", [(), (2,), (5, 1, 1), (3, 1, 4, 1)], ids=str)
@pytest.mark.parametrize("shape", [(), (2,), (5, 1, 1), (3, 5, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_both_weights(device: str, dtype: torch.dtype, shape: tuple[int, ...], pos_shape: tuple[int, ...]) -> None:
    check_sigmoid_bce(
        cases.normal((3, 5, 4, 2), dtype, device, scale=3),
        cases.uniform((3, 5, 4, 2), dtype, device),
        target_grad=True,
        weight=cases.uniform(shape, dtype, device, seed=6),
        pos_weight=cases.uniform(pos_shape, dtype, device, seed=7) * 3,
    )


def test_weight_along_long_rows(device: str) -> None:
    """1037 labels: rows longer than any register and misaligned, each with its own weights."""
    check_sigmoid_bce(
        cases.normal((9, 1037), torch.float32, device, scale=3),
        cases.uniform((9, 1037), torch.float32, device),
        weight=cases.uniform([1037], torch.float32, device, seed=6),
        pos_weight=cases.uniform([1037], torch.float32, device, seed=7) * 3,
        reduction="none",
    )


@pytest.mark.parametrize("which", ["weight", "pos_weight"])
def test_weight_for_channels_last_logits(device: str, which: str) -> None:
    """[C, 1, 1] runs along the innermost dimension of the memory here."""
    shape = (2, 5, 7, 3)
    check_sigmoid_bce(
        cases.LAYOUTS["channels_last"](lambda s: cases.normal(s, torch.float32, device), shape),
        cases.LAYOUTS["channels_last"](lambda s: cases.uniform(s, torch.float32, device), shape),
        reduction="none",
        **{which: cases.uniform((5, 1, 1), torch.float32, device, seed=6) * 3},
    )


@pytest.mark.parametrize("layout", ["strided", "stride_0", "transposed"])
@pytest.mark.parametrize("which", ["weight", "pos_weight"])
def test_weight_layouts(device: str, which: str, layout: str) -> None:
    weight = cases.LAYOUTS[layout](lambda s: cases.uniform(s, torch.float32, device, seed=6), (6, 21))
    check_sigmoid_bce(
        cases.normal((6, 21), torch.float32, device),
        cases.uniform((6, 21), torch.float32, device),
        **{which: weight},
    )


# --- dtypes of the other arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target_dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_result_has_the_target_dtype(
    device: str, reduction: str, dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    """torch's rule, odd as it is; each gradient has its own tensor's dtype."""
    target = cases.uniform((9, 21), target_dtype, device)
    logits = cases.normal((9, 21), dtype, device, scale=3)
    loss = check_sigmoid_bce(logits, target, target_grad=True, reduction=reduction)
    assert loss.dtype == target_dtype


@pytest.mark.parametrize(
    "target_dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=dtype_id
)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_integer_and_bool_targets(device: str, reduction: str, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    """torch refuses these; the loss has the logits' dtype."""
    target = (cases.uniform((9, 21), torch.float32, device) > 0.6).to(target_dtype)
    logits = cases.normal((9, 21), dtype, device, scale=3)
    pos_weight = cases.uniform([21], dtype, device) * 3
    loss = check_sigmoid_bce(logits, target, reduction=reduction, pos_weight=pos_weight)
    assert loss.dtype == dtype
    target = (cases.uniform((1500,), torch.float32, device) > 0.6).to(target_dtype)
    check_sigmoid_bce(cases.normal((1500,), dtype, device, scale=3), target, reduction=reduction)


@pytest.mark.parametrize("value", [-1, 2, 255])
def test_integer_targets_beyond_one(device: str, value: int) -> None:
    """The formula holds for any number, and nothing is clipped or read as a bool."""
    dtype = torch.uint8 if value == 255 else torch.int64
    target = torch.full((7,), value, dtype=dtype, device=device)
    check_sigmoid_bce(cases.normal([7], torch.float32, device), target, reduction="none")


@pytest.mark.parametrize("which", ["weight", "pos_weight"])
@pytest.mark.parametrize("weight_dtype", [*cases.DTYPES, torch.int64, torch.uint8], ids=dtype_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_weight_of_another_dtype(device: str, dtype: torch.dtype, weight_dtype: torch.dtype, which: str) -> None:
    """A weight promotes nothing."""
    weight = (cases.uniform([21], torch.float64, device) * 4).to(weight_dtype)
    loss = check_sigmoid_bce(
        cases.normal((9, 21), dtype, device), cases.uniform((9, 21), dtype, device), **{which: weight}
    )
    assert loss.dtype == dtype


def test_bool_weight_masks(device: str) -> None:
    mask = cases.uniform((9, 21), torch.float32, device, seed=6) > 0.5
    logits = cases.normal((9, 21), torch.float32, device)
    loss = check_sigmoid_bce(logits, cases.uniform((9, 21), torch.float32, device), weight=mask, reduction="none")
    assert torch.count_nonzero(loss[~mask]) == 0
    assert bool((loss[mask] > 0).all())


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "shape"), cases.LAYOUT_SHAPES)
@pytest.mark.parametrize("which", ["logits", "target", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_layouts(device: str, dtype: torch.dtype, which: str, layout: str, shape: tuple[int, ...]) -> None:
    logits, target = cases.normal(shape, dtype, device, scale=3), cases.uniform(shape, dtype, device)
    if which != "target":
        logits = cases.LAYOUTS[layout](lambda s: cases.normal(s, dtype, device, scale=3), shape)
    if which != "logits":
        target = cases.LAYOUTS[layout](lambda s: cases.uniform(s, dtype, device), shape)
    check_sigmoid_bce(logits, target, target_grad=True, reduction="none")


# Rows, columns and squares of every SIMD level: fewer than one, remainders, several tiles of either dimension.
ACROSS_SHAPES = [
    pytest.param((3, 2, 9, 11), id="3x2x9x11"),
    pytest.param((2, 19, 37, 29), id="2x19x37x29"),
    pytest.param((1, 33, 17, 1), id="1x33x17x1"),
    pytest.param((2, 300, 5, 7), id="2x300x5x7"),
    pytest.param((1100, 37), id="1100x37"),
    pytest.param((45, 1100), id="45x1100"),
]


@pytest.mark.parametrize("shape", ACROSS_SHAPES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("target_dtype", [None, torch.float32, torch.int64, torch.bool], ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_fast_dimensions_that_differ(
    device: str, dtype: torch.dtype, target_dtype: torch.dtype | None, reduction: str, shape: tuple[int, ...]
) -> None:
    """Either operand in another order than the gradient that is written, beside weights of either order."""
    layout = "channels_last" if len(shape) > 2 else "transposed"
    uniform = cases.uniform(shape, torch.float32, device)
    target = uniform.round() if target_dtype in (torch.int64, torch.bool) else uniform
    target = target.to(target_dtype or dtype)
    logits = cases.LAYOUTS[layout](lambda s: cases.normal(s, dtype, device, scale=3), shape)
    columns = {"pos_weight": cases.uniform((shape[1], *[1] * (len(shape) - 2)), torch.float32, device, seed=6) * 3}
    each = {"weight": cases.uniform(shape, torch.float32, device, seed=7)}
    for x in (logits, logits.contiguous()):
        t = target if x is logits else cases.LAYOUTS[layout](lambda s: torch.empty(s).to(target), shape).copy_(target)
        for options in ({}, columns, each) if target_dtype is None else ({},):
            check_sigmoid_bce(x, t, target_grad=target.is_floating_point(), reduction=reduction, **options)


@pytest.mark.parametrize("dims", [5, 8, 12])
def test_many_dimensions_that_cannot_be_merged(device: str, dims: int) -> None:
    """No dimension of a strided operand steps evenly into the next, so a fixed number of loops runs out."""
    shape = (2,) * dims
    check_sigmoid_bce(
        cases.LAYOUTS["strided"](lambda s: cases.normal(s, torch.float32, device), shape),
        cases.LAYOUTS["strided"](lambda s: cases.uniform(s, torch.float32, device), shape),
        target_grad=True,
        pos_weight=cases.uniform(shape[1:2] + (1,) * (dims - 2), torch.float32, device, seed=6),
    )


@pytest.mark.parametrize("shape", [(3, 21, 5), (2, 21, 3, 5)], ids=["3d", "4d"])
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "channels_last_sliced", "expanded_rows"])
def test_unreduced_loss_keeps_the_memory_format(device: str, layout: str, shape: tuple[int, ...]) -> None:
    logits = cases.LAYOUTS[layout](lambda s: cases.normal(s, torch.float32, device), shape)
    target = cases.LAYOUTS[layout](lambda s: cases.uniform(s, torch.float32, device), shape)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    assert bce(logits, target, reduction="none").stride() == theirs.stride()


# --- grad_output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stride_0", "transposed", "strided"])
def test_grad_output_layouts(device: str, form: str) -> None:
    """`.sum()` after reduction="none" sends a stride-0 gradient, `.transpose()` a transposed one."""
    grad_output = {
        "stride_0": torch.tensor(0.37, device=device).expand(6, 21),
        "transposed": cases.normal((21, 6), torch.float32, device).t(),
        "strided": cases.normal((12, 42), torch.float32, device)[::2, ::2],
    }[form]
    check_sigmoid_bce(
        cases.normal((6, 21), torch.float32, device),
        cases.uniform((6, 21), torch.float32, device),
        grad_output=grad_output,
        reduction="none",
        target_grad=True,
    )


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**15])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_scaled_grad_output(device: str, dtype: torch.dtype, scale: float) -> None:
    """What GradScaler and gradient accumulation send."""
    check_sigmoid_bce(
        cases.normal((9, 21), dtype, device),
        cases.uniform((9, 21), dtype, device),
        grad_output=torch.tensor(scale, dtype=dtype, device=device),
        target_grad=True,
    )


# --- edge cases, by name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("pos_weight", [False, True], ids=["plain", "pos_weight"])
def test_empty(device: str, pos_weight: bool, shape: tuple[int, ...]) -> None:
    logits, target = torch.empty(shape, device=device), torch.empty(shape, device=device)
    options = {"pos_weight": torch.ones(shape[-1], device=device)} if pos_weight else {}
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        loss, grad = loss_and_grad(logits, target, reduction=reduction, **options)
        torch.testing.assert_close(loss.item(), expected, rtol=0, atol=0, equal_nan=True)
        assert grad.shape == shape
    loss, grad = loss_and_grad(logits, target, reduction="none", **options)
    assert loss.shape == shape
    assert grad.shape == shape


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("logit", "target", "loss", "grad"), SPECIAL)
def test_infinite_logits(
    device: str, logit: float, target: float, loss: float, grad: float, weighted: bool, dtype: torch.dtype
) -> None:
    """Being certain and right costs nothing, with gradient 0; being wrong costs inf, with a finite gradient."""
    scale = 2.0 if weighted else 1.0  # weight 2, and pos_weight 1 so that the limits stay readable
    options = {"weight": torch.tensor(2.0), "pos_weight": torch.ones(3)} if weighted else {}
    options = {name: tensor.to(device, dtype) for name, tensor in options.items()}
    ours, our_grad = loss_and_grad(
        torch.tensor([1.0, logit, -1.0], dtype=dtype, device=device),
        torch.tensor([1.0, target, 0.5], dtype=dtype, device=device),
        reduction="none",
        **options,
    )
    for got, expected in ((ours[1].item(), scale * loss), (our_grad[1].item(), scale * grad)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert bool(ours[[0, 2]].isfinite().all()), "the neighbours in the register are untouched"


@pytest.mark.parametrize("pos_weight", [0.0, 0.5, 3.0])
def test_infinite_logits_with_pos_weight(device: str, pos_weight: float) -> None:
    logits = torch.tensor([INF, -INF, INF, -INF], device=device)
    target = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    options = {"pos_weight": torch.tensor(pos_weight, device=device)}
    loss, grad = loss_and_grad(logits, target, reduction="none", **options)
    expected = [0.0, 0.0, INF, 0.0 if pos_weight == 0 else INF]
    assert loss.tolist() == expected
    assert grad.tolist() == [0.0, 0.0, 1.0, -pos_weight]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("shape", [(), (1, 4)], ids=["scalar", "each"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
def test_target_gradient_at_infinite_logits(
    device: str, pos_weight: float, dtype: torch.dtype, shape: tuple[int, ...], create_graph: bool
) -> None:
    """c softplus(-x) - softplus(x), torch's too: no infinity is taken from another at -inf."""
    logits = torch.tensor([[INF, -INF, -INF, 0.5]] * 3, device=device, dtype=dtype)
    target = torch.tensor([[1.0, 0.0, 0.25, 0.25]] * 3, device=device, dtype=dtype).requires_grad_()
    options = {"pos_weight": torch.full(shape, pos_weight, device=device, dtype=dtype)}
    loss = torchce.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum", **options)
    (grad,) = torch.autograd.grad(loss, target, create_graph=create_graph)
    assert grad[:, :3].tolist() == [[-INF, INF, INF]] * 3
    assert bool(grad[:, 3].isfinite().all())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_infinite_logits_are_rounded_as_others(device: str, dtype: torch.dtype) -> None:
    """Found by fuzzing: weights and soft targets between 0 and 1, whose products round."""
    target = cases.uniform((200,), dtype, device)
    weights = {name: torch.tensor(2.9102, device=device).to(dtype) for name in ("weight", "pos_weight")}
    logits = torch.full((200,), -INF, dtype=dtype, device=device)
    for each in (logits, -logits):
        check_sigmoid_bce(each, target, **weights)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("logit", [-20.0, 20.0])
def test_confident_and_right_is_not_rounded_to_zero(device: str, logit: float, dtype: torch.dtype) -> None:
    """x = -20, t = 0: torch gives exactly 0 where the loss is log1p(exp(-20)) = 2.06e-9."""
    logits = torch.full((5,), logit, dtype=dtype, device=device)
    target = (logits > 0).to(dtype)
    loss, grad = loss_and_grad(logits, target, reduction="none")
    expected = torch.tensor(math.log1p(math.exp(-20.0)), dtype=torch.float64).to(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    if expected > smallest:  # float16 cannot hold it
        torch.testing.assert_close(loss.cpu(), expected.expand(5), rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert bool((grad != 0).all()), "the gradient is not rounded away either"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
def test_tail_keeps_relative_precision(device: str, dtype: torch.dtype) -> None:
    """|x| from 1 to 80 on the right side: loss and gradient fall to 1e-35 and stay right, torch's error not granted."""
    logits = torch.linspace(-80, 80, 641, device=device, dtype=torch.float64).to(dtype)
    target = (logits > 0).to(dtype)
    loss, grad = loss_and_grad(logits, target, reduction="none")
    truth = reference.sigmoid_bce(logits, target, reduction="none")
    assert_accurate("loss", loss, truth.loss)
    assert_accurate("grad_logits", grad, truth.grad_logits)
    assert bool((loss > 0).all())


@pytest.mark.parametrize("grad_output", [1.0, -(2.0**15)])
@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_odds_down_to_the_smallest(device: str, dtype: torch.dtype, target: float, grad_output: float) -> None:
    """Up to |x| = 104, beyond which exp(-|x|) is 0 in float32; from 87 on it is subnormal, which bfloat16 can hold."""
    logits = torch.linspace(-104, 104, 2081, device=device, dtype=torch.float64).to(dtype)
    targets, upstream = torch.full_like(logits, target), torch.full_like(logits, grad_output)
    loss, grad, _ = run(bce, logits, targets, {"reduction": "none"}, upstream, False)
    truth = reference.sigmoid_bce(logits, targets, reduction="none", grad_output=upstream)
    assert_accurate("loss", loss, truth.loss)
    assert_accurate("grad_logits", grad, truth.grad_logits)


# --- factors of every size: right by themselves, torch's error not granted ------------------------------------------

POS_WEIGHTS = [0.0, 1e-8, 0.25, 1.0, 4.0, 1e20]
MAGNITUDES = [0.0, 1e-30, 1e-7, 1e-3, 0.1, 0.7, 1.0, 3.0, 20.0, 46.0, 80.0, 200.0, 1e4, INF]


def check_alone(logits: Tensor, target: Tensor, grad_output: float | None = None, **options: Any) -> None:
    """Hold loss and gradients to the reference, as check_sigmoid_bce does, without torch beside them."""
    upstream = None
    if grad_output is not None:
        shape = logits.shape if options["reduction"] == "none" else ()
        upstream = torch.full(shape, grad_output, dtype=torch.float64, device=logits.device).to(logits.dtype)
    results = run(bce, logits, target, options, upstream, True)
    if upstream is None:
        upstream = grad_output_for(results[0])
    truths = reference.sigmoid_bce(logits, target, grad_output=upstream, **options)

    def describe(index: tuple[int, ...]) -> str:
        return f"logit {logits[index].item()!r}, target {target[index].item()!r}" if index else "all"

    for name, got, truth in zip(("loss", "grad_logits", "grad_target"), results, truths, strict=True):
        assert got is not None
        assert_accurate(f"{name} of {options}, {grad_output}", got, truth, describe=describe)


def grid(dtype: torch.dtype, device: str, magnitudes: list[float], targets: list[float]) -> tuple[Tensor, Tensor]:
    x = torch.tensor([-m for m in magnitudes] + magnitudes, dtype=torch.float64, device=device)
    t = torch.tensor(targets, dtype=torch.float64, device=device)
    return x.repeat_interleave(len(t)).to(dtype), t.repeat(len(x)).to(dtype)


@pytest.mark.parametrize("form", ["scalar", "each"])
@pytest.mark.parametrize("pos_weight", POS_WEIGHTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_pos_weights_of_every_size(device: str, dtype: torch.dtype, pos_weight: float, form: str) -> None:
    """A small c is not lost beside t = 1, nor log1p(exp(-|x|)) beside |x|; at -inf 0 times infinity is 0."""
    logits, target = grid(dtype, device, MAGNITUDES, [0.0, 0.3, 0.5, 1.0])
    kept = torch.promote_types(dtype, torch.float32)
    shape = () if form == "scalar" else logits.shape
    options = {"pos_weight": torch.full(shape, pos_weight, dtype=kept, device=device)}
    check_alone(logits, target, reduction="none", **options)
    finite = logits.isfinite()
    if form == "each":
        options = {"pos_weight": options["pos_weight"][finite]}
    for reduction in ("mean", "sum"):
        check_alone(logits[finite], target[finite], reduction=reduction, **options)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_target_gradient_where_pos_weight_is_small(device: str, dtype: torch.dtype) -> None:
    """x = -20 without positive weight: -softplus(-20), which -20 + 20 does not leave."""
    kept = torch.promote_types(dtype, torch.float32)
    options = {"pos_weight": torch.zeros((), dtype=kept, device=device)}
    target = torch.full((3,), 0.5, device=device, dtype=kept).requires_grad_()
    logits = torch.tensor([-20.0, -INF, INF], dtype=dtype, device=device)
    for create_graph in (False, True):
        loss = bce(logits, target, reduction="sum", **options)
        (grad,) = torch.autograd.grad(loss, target, create_graph=create_graph)
        torch.testing.assert_close(
            grad.tolist(), [-math.log1p(math.exp(-20.0)), 0.0, -INF], rtol=4 * torch.finfo(kept).eps, atol=0
        )


def test_second_road_keeps_a_weight_of_zero(device: str) -> None:
    """0 times a product that is infinite would be NaN."""
    logits = torch.tensor([20.0, -20.0], device=device, requires_grad=True)
    target = torch.tensor([0.25, 0.25], device=device, requires_grad=True)
    zero, huge = torch.tensor(0.0, device=device), torch.tensor(1e30, device=device)
    loss = torchce.functional.binary_cross_entropy_with_logits(logits, target, zero, pos_weight=huge, reduction="none")
    for grad in torch.autograd.grad(loss, (logits, target), torch.full_like(loss, 1e30), create_graph=True):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_target_gradient_with_an_infinite_pos_weight(device: str) -> None:
    """c softplus(-x) is infinite, also where e^-|x| is 0 and infinity times it would be NaN."""
    logits = torch.tensor([-1e4, -200.0, -1.0, 0.0, 50.0], device=device)
    target = torch.full_like(logits, 0.5).requires_grad_()
    options = {"pos_weight": torch.tensor(INF, device=device), "reduction": "sum"}
    (grad,) = torch.autograd.grad(
        torchce.functional.binary_cross_entropy_with_logits(logits, target, **options), target, create_graph=True
    )
    assert torch.equal(grad.detach().cpu(), torch.full((5,), INF))

    def loss(target: Tensor) -> Tensor:
        return torchce.functional.binary_cross_entropy_with_logits(logits, target, **options)

    assert torch.equal(torch.func.grad(loss)(target.detach()).cpu(), torch.full((5,), INF))


@pytest.mark.parametrize("pos_weight", [None, 1.0])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_target_gradient_without_pos_weight_is_exact(device: str, dtype: torch.dtype, pos_weight: float | None) -> None:
    logits, target = grid(dtype, device, MAGNITUDES, [0.5])
    options = {} if pos_weight is None else {"pos_weight": torch.full_like(logits, pos_weight)}
    target.requires_grad_()
    (grad,) = torch.autograd.grad(bce(logits, target, reduction="sum", **options), target)
    assert torch.equal(grad, -logits)


# (weight, pos_weight, upstream gradient), whose products in one order or the other are beyond float32.
FACTORS = [
    (weight, pos_weight, upstream)
    for weight in (None, 1e-38, 1e-20, 0.0, 1.0, 1e20, 1e30)
    for pos_weight in (None, 1e-8, 1e20)
    for upstream in (0.0, 1e-38, 1e-30, 65504.0, 1e30, INF)
]


@pytest.mark.parametrize("form", ["scalar", "each"])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_factors_of_every_size(device: str, dtype: torch.dtype, reduction: str, form: str) -> None:
    """Gradient, upstream gradient, weight and a mean's divisor are multiplied in an order that loses nothing."""
    logits, target = grid(dtype, device, [1e-3, 1.0, 20.0, 46.0], [0.0, 0.3, 0.5, 1.0])
    kept = torch.promote_types(dtype, torch.float32)
    for weight, pos_weight, upstream in FACTORS:
        values = {"weight": weight, "pos_weight": pos_weight}
        shape = () if form == "scalar" else logits.shape
        options = {
            name: torch.full(shape, value, dtype=kept, device=device)
            for name, value in values.items()
            if value is not None
        }
        check_alone(logits, target, upstream, reduction=reduction, **options)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_gradients_that_a_large_weight_needs(device: str, reduction: str, create_graph: bool) -> None:
    """w g is below the smallest float32 and so is g / N, but with c = 1e20 the gradients are not."""
    logits = torch.full((1000,), -1.0, device=device).requires_grad_()
    target = torch.full((1000,), 0.5, device=device).requires_grad_()
    for weight, upstream in ((1e-20, 1e-30), (1.0, 1e-38), (1e-3, 1e-38)):
        options = {"weight": torch.tensor(weight, device=device), "pos_weight": torch.tensor(1e20, device=device)}
        grad_output = torch.tensor(upstream, device=device)
        loss = bce(logits, target, reduction=reduction, **options)
        grads = torch.autograd.grad(loss, (logits, target), grad_output, create_graph=create_graph)
        truth = reference.sigmoid_bce(logits, target, grad_output=grad_output, reduction=reduction, **options)
        assert_accurate("grad_logits", grads[0].detach(), truth.grad_logits)
        assert_accurate("grad_target", grads[1].detach(), truth.grad_target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_elements_do_not_drift(device: str, reduction: str, dtype: torch.dtype) -> None:
    """Summed in float32 at least and rounded once; torch is not even granted its error here."""
    logits = cases.normal((30011, 3), dtype, device, scale=0.3)
    target = cases.uniform((30011, 3), dtype, device)
    loss = bce(logits, target, reduction=reduction)
    truth = reference.sigmoid_bce(logits, target, reduction=reduction)
    assert_accurate("loss", loss, truth.loss)


@pytest.mark.parametrize("logit", [1.5, 0.3, 0.0, -1e-3, -2.7, -20.0, -60.0])
@pytest.mark.parametrize("dense", [False, True], ids=["expanded", "dense"])
def test_many_equal_elements_do_not_drift(device: str, dense: bool, logit: float) -> None:
    """Equal terms round the same way each time, so that a long float32 sum goes astray where random terms even out."""
    logits = torch.full((1, 1), logit, device=device).expand(1000, 1001)
    target = torch.zeros((1, 1), device=device).expand(1000, 1001)
    if dense:
        logits, target = logits.contiguous(), target.contiguous()
    assert_accurate("loss", bce(logits, target), reference.sigmoid_bce(logits, target).loss)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_small_losses_are_not_lost_in_a_sum(device: str, dtype: torch.dtype) -> None:
    """Confident and right, each more so than the one before: a product of 1 + exp(-|x|) alone would be 1."""
    logits = torch.linspace(-10, -80, 3001, dtype=torch.float64, device=device).to(dtype)
    for each in (logits, -logits, logits.flip(0)):
        for part in (each, each[each.abs() > 40]):
            target = (part > 0).to(torch.promote_types(dtype, torch.float32))
            loss = bce(part, target, reduction="sum")
            assert_accurate("loss", loss, reference.sigmoid_bce(part, target, reduction="sum").loss)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pos_shape", [None, (), (1500,)], ids=["plain", "scalar", "each"])
@pytest.mark.parametrize(("logit", "target", "loss", "_grad"), SPECIAL)
def test_a_special_logit_in_a_sum(
    device: str,
    logit: float,
    target: float,
    loss: float,
    _grad: float,
    pos_shape: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> None:
    """Among others whose losses add up to 1, so that a slip of it would show in 16 bits as well."""
    others = torch.full((1500,), math.log(math.expm1(1 / 1499)), dtype=torch.float64, device=device)
    options = {} if pos_shape is None else {"pos_weight": torch.ones(pos_shape, dtype=dtype, device=device)}
    for place in (0, 17, 1024, 1499):
        here = torch.arange(1500, device=device) == place
        logits, targets = others.masked_fill(here, logit).to(dtype), here.to(dtype) * target
        got = bce(logits, targets, reduction="sum", **options).item()
        torch.testing.assert_close(got, 1.0 + loss, rtol=8 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_scalar_weights_of_a_long_run(device: str, dtype: torch.dtype, reduction: str) -> None:
    logits, target = cases.normal((1500,), dtype, device, scale=3), cases.uniform((1500,), dtype, device)
    weights = [{}, {"weight": 1.75}, {"pos_weight": 0.375}, {"weight": 0.625, "pos_weight": 2.5}]
    for each in weights:
        options = {name: torch.tensor(value, dtype=dtype, device=device) for name, value in each.items()}
        check_sigmoid_bce(logits, target, reduction=reduction, **options)


def test_nan_stays_in_its_element(device: str) -> None:
    logits = cases.normal((5, 40), torch.float32, device)
    target = cases.uniform((5, 40), torch.float32, device)
    logits[2, 17] = math.nan
    target[4, 39] = math.nan
    loss, grad = loss_and_grad(logits, target, reduction="none")
    expected = logits.isnan() | target.isnan()
    assert torch.equal(loss.isnan(), expected)
    assert torch.equal(grad.isnan(), expected)


def test_inputs_are_not_written(device: str) -> None:
    tensors = [cases.normal((6, 21), torch.float32, device)]
    tensors += [cases.uniform((6, 21), torch.float32, device, seed=seed) for seed in range(3)]
    logits, target, weight, pos_weight = tensors
    before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    run(bce, logits, target, {"weight": weight, "pos_weight": pos_weight}, None, True)
    for after, copy in zip(tensors, before, strict=True):
        assert_bitwise_equal(after, copy)
    assert [t._version for t in tensors] == versions
