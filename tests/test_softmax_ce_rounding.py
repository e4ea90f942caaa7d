"""Roundings of softmax cross entropy that all go in one direction, products in an order that leaves float32's range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cases
import pytest
import reference
import torch
from cases import dtype_id
from comparison import assert_accurate, check_softmax_ce, run
from torch import Tensor
from torch.nn import functional as F

import torchce.functional

INF = math.inf
EPS = torch.finfo(torch.float32).eps
LEAST = torch.finfo(torch.float32).min

LAYOUTS = [pytest.param(None, id="adjacent"), pytest.param("transposed", id="strided")]
KINDS = ["index", "smoothed", "one_hot", "uniform", "random"]
# e^-7.5575 is just what an addition to 1 rounds badly, and so is e^-16, one ulp of 1.
GAPS = (7.5575, 0.1, 16.0, 3.3, 9.27728, 14.4468)


def class_counts(device: str, step: int) -> range:
    """Those from 2 to 512; some in the emulation, which takes a thousand times as long."""
    return range(2, 513, step if device == "cpu" else 51)


def target_of(kind: str, outlier: Tensor, classes: int) -> tuple[Tensor, float]:
    """A target of rows whose largest logit is that of class `outlier`, and a label smoothing."""
    one_hot = F.one_hot(outlier, classes).float()
    if kind in ("index", "smoothed"):
        return outlier, 0.1 if kind == "smoothed" else 0.0
    if kind == "random":
        return cases.probabilities(one_hot.shape, torch.float32, str(outlier.device)), 0.0
    return (one_hot if kind == "one_hot" else torch.full_like(one_hot, 1 / classes)), 0.0


def hold_to_five_eps(logits: Tensor, target: Tensor, label_smoothing: float) -> None:
    """Errors beyond torch's are at most one ulp and 5 eps of the condition: some nine roundings of a sum near 1."""
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    grad_output = torch.ones(len(logits), device=logits.device)
    ours, theirs = (
        run(function, logits, target, options, grad_output, False)
        for function in (torchce.functional.cross_entropy, F.cross_entropy)
    )
    truths = reference.softmax_ce(logits, target, grad_output=grad_output, **options)
    for name, our, their, truth in zip(("loss", "grad_logits"), ours[:2], theirs[:2], truths[:2], strict=True):
        error, their_error = ((reference.float64(value) - truth.value).abs() for value in (our, their))
        excess = (error - their_error - EPS * truth.value.abs()) / truth.condition.clamp_min(1e-30)
        assert float(excess.max()) <= 5 * EPS, f"{name} of {logits.shape[1]} classes: {float(excess.max()) / EPS} eps"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_rows_with_an_outlier(device: str, layout: str | None, kind: str) -> None:
    """One large term beside equal small ones: added one by one they would all round the same way."""
    gaps = torch.tensor(GAPS, device=device).repeat_interleave(3)[:, None]
    for classes in class_counts(device, 1 if kind == "index" else 3):
        outlier = torch.tensor([0, classes // 2, classes - 1] * len(GAPS), device=device)
        logits = -gaps * (1 - F.one_hot(outlier, classes).float())
        logits = cases.laid_out(layout, lambda s: torch.empty(s, device=device), logits.shape).copy_(logits)
        hold_to_five_eps(logits, *target_of(kind, outlier, classes))


@pytest.mark.parametrize("kind", ["index", "random"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_rows(device: str, layout: str | None, kind: str) -> None:
    for classes in class_counts(device, 3):
        logits = cases.arranged(layout, (3, classes), torch.float32, device)
        hold_to_five_eps(logits, *target_of(kind, logits.argmax(1), classes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_of_equal_rows_keeps_no_error(device: str, layout: str | None) -> None:
    logits = cases.laid_out(layout, lambda s: torch.full(s, -7.5575, device=device), (64, 32))
    logits[:, 0] = 0
    loss = torchce.functional.cross_entropy(logits, torch.zeros(64, dtype=torch.int64, device=device))
    assert abs(float(loss) - math.log1p(31 * math.exp(-float(torch.tensor(7.5575))))) <= 4 * EPS


# --- products out of range ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [0.0, 0.125, 1e-30], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_target_gradient_at_a_mask_of_the_least_number(device: str, layout: str | None, upstream: float) -> None:
    """g w (lse - x) is in range where w (lse - x) is not."""
    logits = cases.arranged(layout, (4, 40), torch.float32, device)
    logits[:, 3:7] = LEAST
    target = cases.probabilities((4, 40), torch.float32, device)
    _, _, grad = run(
        torchce.functional.cross_entropy,
        logits,
        target,
        {"weight": torch.full((40,), 2.0, device=device), "reduction": "sum"},
        torch.tensor(upstream, device=device),
        True,
    )
    assert grad is not None
    truth = reference.softmax_ce(
        logits, target, torch.full((40,), 2.0), reduction="sum", grad_output=torch.tensor(upstream)
    ).grad_target
    assert truth is not None
    assert_accurate("grad_target", grad, truth)
    if upstream == 0.125:
        assert float(grad[0, 3]) == pytest.approx(0.125 * 2 * -LEAST, rel=1e-6)


@pytest.mark.parametrize("create_graph", [False, True], ids=["kernels", "differentiable"])
@pytest.mark.parametrize(("weight", "upstream"), [(1e-16, 1e-30), (1e-30, 1e-16), (1e30, 1e-30), (1e-30, 1e30)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_target_gradient_whose_coefficient_underflows(
    device: str, layout: str | None, weight: float, upstream: float, create_graph: bool
) -> None:
    """g w is 0 in float32 where g w (lse - x) is in range, or infinite."""
    logits = cases.arranged(layout, (4, 40), torch.float32, device)
    logits[:, 3:7] = LEAST
    logits[1, 8:11] = -INF
    target = cases.probabilities((4, 40), torch.float32, device).requires_grad_()
    weights = torch.full((40,), weight, device=device)
    grad_output = torch.tensor(upstream, device=device)
    loss = torchce.functional.cross_entropy(logits, target, weights, reduction="sum")
    (grad,) = torch.autograd.grad(loss, target, grad_output, create_graph=create_graph)
    truth = reference.softmax_ce(logits, target, weights, reduction="sum", grad_output=grad_output).grad_target
    assert truth is not None
    assert_accurate("grad_target", grad, truth)
    assert float(grad[0, 3]) == pytest.approx(-LEAST * float(weights[0]) * upstream, rel=1e-6)
    assert grad[1, 8:11].tolist() == [INF] * 3


# Spread over more classes, 0.1 would leave them coefficients that are subnormal numbers, of few digits.
@pytest.mark.parametrize(("classes", "label_smoothing"), [(3, 0.0), (3, 0.1), (40, 0.0), (1000, 0.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_coefficients_that_underflow(device: str, layout: str | None, classes: int, label_smoothing: float) -> None:
    """w t is 0 in float32, but w t (lse - x) is infinite."""
    logits = cases.arranged(layout, (3, classes), torch.float32, device)
    logits[:2, 1] = -INF
    target = torch.zeros(3, classes, device=device)
    target[:, 0], target[:2, 1] = 1, 1e-9
    weight = torch.full((classes,), 1e-38, device=device)
    loss = check_softmax_ce(
        logits, target, weight=weight, reduction="none", label_smoothing=label_smoothing, grad_output=torch.ones(3)
    )
    assert loss.tolist()[:2] == [INF, INF]
    weight[1] = 0  # then it costs nothing
    loss = torchce.functional.cross_entropy(logits, target, weight, reduction="none", label_smoothing=label_smoothing)
    assert float(loss.max()) < 1e-30


@pytest.mark.parametrize("label_smoothing", [0.0, 0.5])
@pytest.mark.parametrize("weight", [1e-38, 7e-39, 1e-30, 1e30])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_of_tiny_weights(device: str, layout: str | None, weight: float, label_smoothing: float) -> None:
    """The upstream gradient divided by the sum of the weights would be infinite before it meets one."""
    logits = cases.arranged(layout, (1, 7), torch.float32, device)
    weights = torch.full((7,), weight, device=device)
    check_softmax_ce(logits, torch.tensor([3], device=device), weight=weights, label_smoothing=label_smoothing)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("weight", "upstream"), [(1e-38, 65536.0), (2e-38, 65536.0), (1e-20, 1e30)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiny_weight_in_a_large_mean(
    device: str, layout: str | None, weight: float, upstream: float, label_smoothing: float
) -> None:
    """Divided by the sum of all weights it would have lost its digits before the upstream gradient comes."""
    logits = cases.arranged(layout, (1000, 10), torch.float32, device)
    weights = torch.ones(10, device=device)
    weights[0] = weight
    target = (torch.arange(1000, device=device) % 9 + 1).index_fill(0, torch.tensor([0, 500], device=device), 0)
    grad_output = torch.tensor(upstream, device=device)
    check_softmax_ce(logits, target, weight=weights, label_smoothing=label_smoothing, grad_output=grad_output)


def loss_and_grad(
    road: str, logits: Tensor, target: Tensor, *, upstream: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient, of the kernels, of the formulas in torch's own operations or of torch itself."""
    function = F.cross_entropy if road == "torch" else torchce.functional.cross_entropy

    def loss_of(x: Tensor) -> Tensor:
        return function(x, target, **options)

    grad_output = torch.tensor(upstream, device=logits.device)
    if road == "func":
        loss, pull_back = torch.func.vjp(loss_of, logits)
        return loss, pull_back(grad_output)[0]
    x = logits.detach().requires_grad_()
    loss = loss_of(x)
    (grad,) = torch.autograd.grad(loss, x, grad_output, create_graph=road == "differentiable")
    return loss.detach(), grad.detach()


ROADS = ["kernels", "differentiable", "func"]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("classes", [5, 15, 31, 40, 300, 1001])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_of_the_least_number_under_smoothing(device: str, layout: str | None, classes: int, road: str) -> None:
    """The gaps of all classes add up to infinity, and are infinite times a weight, though the loss is in range."""
    logits = cases.arranged(layout, (4, classes), torch.float32, device)
    logits[:, 1 : 1 + classes // 2] = LEAST
    target = torch.zeros(4, dtype=torch.int64, device=device)
    weights = torch.full((classes,), 3.0, device=device)
    weights[2::4] = -1
    for weight in (None, weights):
        options = {"weight": weight, "label_smoothing": 0.01, "reduction": "sum"}
        loss, grad = loss_and_grad(road, logits, target, **options)
        truth = reference.softmax_ce(logits, target, **options)
        assert_accurate("loss", loss, truth.loss)
        assert_accurate("grad_logits", grad, truth.grad_logits, loss_and_grad("torch", logits, target, **options)[1])


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("classes", [400, 512, 1001])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_weights_whose_sum_is_infinite(device: str, layout: str | None, classes: int, road: str) -> None:
    logits = cases.arranged(layout, (4, classes), torch.float32, device)
    target = torch.arange(4, device=device)
    options = {"weight": torch.full((classes,), 1e36, device=device), "label_smoothing": 0.1, "reduction": "mean"}
    loss, grad = loss_and_grad(road, logits, target, **options)
    truth = reference.softmax_ce(logits, target, **options)
    assert_accurate("loss", loss, truth.loss)
    assert_accurate("grad_logits", grad, truth.grad_logits, loss_and_grad("torch", logits, target, **options)[1])


@pytest.mark.parametrize("road", ["kernels", "differentiable"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("weight", "upstream"), [(1e30, 1e10), (1e-30, 1e-16), (1e-30, 1e-10), (1e-38, 1.0), (1e30, 1e-8), (1e-5, 1e-30)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_weights_of_a_mean(
    device: str, layout: str | None, weight: float, upstream: float, label_smoothing: float, road: str
) -> None:
    """They have no part in the result, and g divided by their sum or multiplied with them is not always in range."""
    logits, target = cases.arranged(layout, (4, 10), torch.float32, device), torch.arange(4, device=device)
    options = {"weight": torch.full((10,), weight, device=device), "label_smoothing": label_smoothing}
    _, grad = loss_and_grad(road, logits, target, upstream=upstream, **options)
    truth = reference.softmax_ce(logits, target, grad_output=torch.tensor(upstream), **options)
    assert_accurate("grad_logits", grad, truth.grad_logits)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_that_is_in_range_with_its_share(device: str, layout: str | None, road: str) -> None:
    """g w is infinite, g w eps / C is not."""
    logits, target = cases.arranged(layout, (3, 14), torch.float32, device), torch.arange(3, device=device)
    weight = torch.ones(14, device=device)
    weight[5] = 2e38
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}
    _, grad = loss_and_grad(road, logits, target, upstream=4.0, **options)
    truth = reference.softmax_ce(logits, target, grad_output=torch.tensor(4.0), **options)
    assert_accurate("grad_logits", grad, truth.grad_logits)


@pytest.mark.parametrize("create_graph", [False, True], ids=["kernels", "differentiable"])
@pytest.mark.parametrize(("weight", "label_smoothing"), [(1.5e-38, 0.9999), (1e-36, 0.999), (1e-40, 0.999999)])
def test_target_gradient_of_a_tiny_weight(
    device: str, weight: float, label_smoothing: float, create_graph: bool
) -> None:
    """w (1 - eps) is subnormal, or 0."""
    logits = cases.normal((4, 40), torch.float32, device)
    logits[1, 3:5] = -INF
    target = cases.probabilities((4, 40), torch.float32, device).requires_grad_()
    weights, upstream = torch.full((40,), weight, device=device), torch.tensor(65536.0, device=device)
    options = {"reduction": "sum", "label_smoothing": label_smoothing}
    loss = torchce.functional.cross_entropy(logits, target, weights, **options)
    (grad,) = torch.autograd.grad(loss, target, upstream, create_graph=create_graph)
    truth = reference.softmax_ce(logits, target, weights, grad_output=upstream, **options).grad_target
    assert truth is not None
    assert_accurate("grad_target", grad, truth._replace(subnormal=None))
    assert grad[1, 3:5].tolist() == [INF] * 2


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinite_upstream_of_a_weight_that_underflows(device: str, layout: str | None, label_smoothing: float) -> None:
    """A weight divided by the sum of all is 0, but infinity times the weight is not NaN."""
    logits = cases.arranged(layout, (20, 7), torch.float32, device)
    weight = torch.tensor([1e28, 1e10, 1e-7, 1e24, 1e6, 1e15, 1e-26], device=device)
    target, grad_output = torch.arange(20, device=device) % 7, torch.tensor(INF, device=device)
    check_softmax_ce(logits, target, grad_output=grad_output, weight=weight, label_smoothing=label_smoothing)


@pytest.mark.parametrize("label_smoothing", [0.99, 0.9999, 0.999999])
@pytest.mark.parametrize("classes", [3, 257])
def test_smoothing_near_one(device: str, classes: int, label_smoothing: float) -> None:
    """1 - eps of a float32 eps has few digits."""
    logits = cases.normal((4, classes), torch.float32, device)
    probabilities = cases.probabilities(logits.shape, torch.float32, device)
    check_softmax_ce(logits, probabilities, label_smoothing=label_smoothing, target_grad=True)
    check_softmax_ce(logits, logits.argmax(1), label_smoothing=label_smoothing)


# --- zeros ----------------------------------------------------------------------------------------------------------


def certain_rows(device: str) -> Tensor:
    """Three classes, of which the first has p = 1."""
    return torch.tensor([[0.0, -200.0, -INF], [5.0, -150.0, -3e38], [-7.0, -INF, -INF]], device=device)


def one_class(device: str) -> Tensor:
    return cases.normal((5, 1), torch.float32, device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("make", [certain_rows, one_class])
@pytest.mark.parametrize("label", [0.3, 1.0, 0.7])
@pytest.mark.parametrize("weight", [None, 1.7])
def test_gradient_of_a_certain_class_is_zero(
    device: str, weight: float | None, label: float, make: Callable[[str], Tensor], dtype: torch.dtype
) -> None:
    """p sum(u) - u with p = 1 and no other u: exactly 0, as torch has it."""
    logits = make(device).to(dtype)
    target = torch.zeros_like(logits)
    target[:, 0] = label
    weights = None if weight is None else torch.full((logits.shape[1],), weight, device=device)
    for reduction in cases.REDUCTIONS:
        for inner in (logits, logits[:, :, None].expand(*logits.shape, 40)):
            of_inner = target if inner.dim() == 2 else target[:, :, None].expand(inner.shape)
            options = {"weight": weights, "reduction": reduction}
            _, grad, _ = run(torchce.functional.cross_entropy, inner, of_inner, options, None, False)
            assert torch.equal(grad[:, 0], torch.zeros_like(grad[:, 0]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weight", [None, 1.7])
def test_gradient_of_a_lone_class_is_zero(device: str, weight: float | None, label_smoothing: float) -> None:
    logits, target = one_class(device), torch.zeros(5, dtype=torch.int64, device=device)
    weights = None if weight is None else torch.full((1,), weight, device=device)
    options = {"weight": weights, "label_smoothing": label_smoothing}
    loss, grad, _ = run(torchce.functional.cross_entropy, logits, target, options, None, False)
    assert float(loss) == 0
    assert torch.equal(grad, torch.zeros_like(grad))
