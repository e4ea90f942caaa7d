"""What only torchce takes, under everything that transforms programs: the plain call's answers.

The kernels know no transforms; the formulas in torch's own operations that stand in for them take the same targets and
weights, mask the same rows and have the same limits.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import pytest
import torch
from comparison import assert_bitwise_equal
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import torchce.functional as ours
from torchce import transforms
from torchce.softmax_ce_formulas import Gradients, Options, gradients

INF = torch.inf


class Problem(NamedTuple):
    function: Callable[..., Tensor]
    logits: Tensor
    target: Tensor
    options: dict[str, Any]

    def __call__(self, logits: Tensor, **options: Any) -> Tensor:
        return self.function(logits, self.target, **{**self.options, **options})

    def total(self, logits: Tensor) -> Tensor:
        return self(logits).sum()


def weights(*values: float) -> Tensor:
    return torch.tensor(values or (1, 2, 0.5), dtype=torch.float32)


def softmax_problems() -> dict[str, Problem]:
    x = cases.normal((4, 3), torch.float32, "cpu", scale=2)
    y = torch.tensor([0, 1, 2, 0])
    soft = cases.softmax_target("probability", (4, 3), torch.float32, "cpu")
    masked, masked_soft = x.clone(), soft.clone()
    masked[0, 1], masked_soft[0, 1] = -INF, 0
    ignored = x.clone()
    ignored[1], ignored[2, 0] = -INF, torch.nan
    kept = torch.tensor([0, -100, -100, 2])
    images = cases.normal((2, 3, 4, 5), torch.float32, "cpu")
    maps = cases.indices((2, 4, 5), 3, torch.int32, "cpu")
    smoothed = {"label_smoothing": 0.1, "weight": weights()}
    sure = x.clone()
    sure[0, 1] = 1000  # whose log-probability is rounded to 0
    infinite = {"label_smoothing": 0.1, "weight": weights(1, INF, 1)}
    problems = {
        "int64": (x, y, {}),
        "int32": (x, y.int(), {}),
        "uint8": (x, y.byte(), smoothed),
        "int32 maps": (images, maps, {"ignore_index": 1, **smoothed}),
        "int32 unbatched": (x[0], y[0].int(), {}),
        "float64 weight": (x, y, {"weight": weights().double(), "reduction": "sum"}),
        "masked class": (masked, masked_soft, {}),
        "masked class, smoothed": (masked, masked_soft, {"label_smoothing": 0.1, "weight": weights(1, 0, 1)}),
        "masked class without weight": (masked, torch.tensor([1, 1, 2, 0]), {"weight": weights(1, 0, 1)}),
        "ignored rows": (ignored, kept, {}),
        "ignored rows, smoothed": (ignored, kept, smoothed),
        "ignored rows, each": (ignored, kept, {"reduction": "none"}),
        "infinite weight": (x, torch.tensor([0, 0, 2, 0]), infinite),
        "infinite weight, its row": (x, y, {"weight": weights(1, INF, 1), "reduction": "none"}),
        "infinite weight, sure": (sure, torch.tensor([0, 0, 2, 0]), {**infinite, "reduction": "sum"}),
        "infinite weight, probabilities": (
            sure,
            torch.full((4, 3), 0.25),
            {"weight": weights(1, INF, 1), "reduction": "none"},
        ),
        "infinite weight, one class": (x[:, :1], y * 0, {"label_smoothing": 0.1, "weight": weights(INF)}),
    }
    return {name: Problem(ours.cross_entropy, *rest) for name, rest in problems.items()}


def sigmoid_problems() -> dict[str, Problem]:
    x = cases.normal((4, 3), torch.float32, "cpu", scale=2)
    t = cases.uniform((4, 3), torch.float32, "cpu")
    certain, right = x.clone(), t.clone()
    certain[0, 0], right[0, 0], certain[1, 1], right[1, 1] = INF, 1, -INF, 0
    problems = {
        "bool": (x, t > 0.5, {}),
        "int32": (x, (t > 0.5).int(), {"weight": weights(), "pos_weight": 3 * weights()}),
        "certain": (certain, right, {}),
        "certain, pos_weight": (certain, right, {"pos_weight": weights(), "reduction": "none"}),
    }
    return {name: Problem(ours.binary_cross_entropy_with_logits, *rest) for name, rest in problems.items()}


PROBLEMS = {**softmax_problems(), **{f"bce {name}": problem for name, problem in sigmoid_problems().items()}}
FINITE = [name for name in PROBLEMS if "infinite weight" not in name]


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]


@pytest.fixture(params=FINITE)
def finite(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]


def plain(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient, by the kernels."""
    x = problem.logits.clone().requires_grad_()
    loss = problem.total(x)
    assert "Backward" in type(problem(x).grad_fn).__name__
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def assert_same(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, equal_nan=True)


def test_func_grad(problem: Problem) -> None:
    assert_same(grad(problem.total)(problem.logits), plain(problem)[1])


def test_vmap(problem: Problem) -> None:
    stacked = torch.stack([problem.logits, 2 * problem.logits])
    result = vmap(problem)(stacked)
    for part, logits in zip(result, stacked, strict=True):
        assert_same(part, problem(logits))


def test_vmap_of_grad_over_targets(problem: Problem) -> None:
    """In a batch of targets, too, no row's gradient is a product of 0 and another's infinite weight."""

    def total(logits: Tensor, target: Tensor) -> Tensor:
        return problem.function(logits, target, **problem.options).sum()

    target = problem.target
    result = vmap(grad(total))(torch.stack([problem.logits] * 2), torch.stack([target, target]))
    for part in result:
        assert_same(part, plain(problem)[1])


def test_vmap_of_grad(problem: Problem) -> None:
    result = vmap(grad(problem.total))(torch.stack([problem.logits, problem.logits]))
    for part in result:
        assert_same(part, plain(problem)[1])


def test_jvp(finite: Problem) -> None:
    loss, gradient = plain(finite)
    tangent = cases.normal(finite.logits.shape, torch.float32, "cpu", seed=7)
    value, derivative = jvp(finite.total, (finite.logits,), (tangent,))
    assert_same(value, loss)
    assert_same(derivative, (gradient * tangent).sum())


def test_forward_mode(finite: Problem) -> None:
    loss, gradient = plain(finite)
    tangent = cases.normal(finite.logits.shape, torch.float32, "cpu", seed=7)
    with forward_ad.dual_level():
        value, derivative = forward_ad.unpack_dual(finite.total(forward_ad.make_dual(finite.logits, tangent)))
    assert_same(value, loss)
    assert_same(derivative, (gradient * tangent).sum())


def test_an_open_dual_level_changes_nothing(problem: Problem) -> None:
    """To the last bit, forward and backward: not the level counts, but whether a tensor carries a tangent."""
    x = problem.logits.clone().requires_grad_()
    with forward_ad.dual_level():
        loss = problem.total(x)
        (gradient,) = torch.autograd.grad(loss, x)
    assert_bitwise_equal(loss, plain(problem)[0])
    assert_bitwise_equal(gradient, plain(problem)[1])


def test_nor_does_another_threads(problem: Problem) -> None:
    opened, done = threading.Event(), threading.Event()

    def hold() -> None:
        with forward_ad.dual_level():
            opened.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert opened.wait(60)
        results = plain(problem)
    finally:
        done.set()
        thread.join()
    for result, expected in zip(results, plain(problem), strict=True):
        assert_bitwise_equal(result, expected)


def test_jit_trace(problem: Problem) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: problem(x), problem.logits, check_trace=False)
    x = problem.logits.clone().requires_grad_()
    loss = traced(x).sum()
    assert_same(loss.detach(), plain(problem)[0])
    assert_same(torch.autograd.grad(loss, x)[0], plain(problem)[1])


@pytest.mark.parametrize("name", ["ignored rows", "ignored rows, smoothed", "masked class", "bce certain"])
@pytest.mark.parametrize("way", ["grad", "jvp"])
def test_a_trace_of_ordinary_values_holds_for_others(way: str, name: str) -> None:
    """Passes are spared where no infinity and no ignored row can be met: not in a graph, which meets other data."""
    problem = PROBLEMS[name]

    def derivative(logits: Tensor, target: Tensor) -> Tensor:
        def total(x: Tensor) -> Tensor:
            return problem.function(x, target, **problem.options)

        return grad(total)(logits) if way == "grad" else jvp(total, (logits,), (torch.ones_like(logits),))[1]

    ordinary = cases.normal(problem.logits.shape, torch.float32, "cpu")
    target = problem.target.clamp(0, 1) if problem.target.is_floating_point() else problem.target.clamp(0)
    traced = make_fx(derivative)(ordinary, target)
    assert_same(traced(problem.logits, problem.target), derivative(problem.logits, problem.target))


def values_are_known(way: str) -> tuple[bool, bool]:
    known = []

    def ask(x: Tensor) -> Tensor:
        known.append((transforms.all_finite(x), transforms.all_true(x > 0)))
        return x.sum()

    x = torch.ones(2, 3)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: ask(x),
        "grad": lambda: grad(ask)(x),
        "vmap of grad": lambda: vmap(grad(ask))(x),
        "jvp of vmap": lambda: jvp(vmap(ask), (x,), (x,)),
        "jit.trace": lambda: torch.jit.trace(ask, x, check_trace=False),
        "make_fx": lambda: make_fx(ask)(x),
        "make_fx of grad": lambda: make_fx(grad(ask))(x),
        "pre_dispatch": lambda: make_fx(ask, pre_dispatch=True)(x),
        "functionalize": lambda: functionalize(ask)(x),
        "compile": lambda: torch.compile(ask, backend="eager", fullgraph=True)(x),
    }
    ways[way]()
    assert len(set(known)) == 1
    return known[0]


@pytest.mark.parametrize("way", ["plain", "grad", "vmap of grad", "jvp of vmap"])
def test_values_are_known(way: str) -> None:
    assert values_are_known(way) == (True, True)


@pytest.mark.parametrize("way", ["jit.trace", "make_fx", "make_fx of grad", "pre_dispatch", "functionalize", "compile"])
def test_values_are_not_known_to_a_trace(way: str) -> None:
    assert values_are_known(way) == (False, False)


@pytest.mark.parametrize("value", [INF, -INF, torch.nan])
def test_what_is_not_finite_is_seen(value: float) -> None:
    x = torch.ones(2, 3)
    x[1, 2] = value
    assert not transforms.all_finite(x)
    assert not transforms.all_true(x == 1)


def test_create_graph(problem: Problem) -> None:
    x = problem.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.total(x), x, create_graph=True)
    assert_same(gradient.detach(), plain(problem)[1])


def test_second_derivatives_are_finite(finite: Problem) -> None:
    """Of ignored rows too, whatever they hold, and at infinite logits."""
    if finite.logits.dim() != 2:
        return
    eager = torch.autograd.functional.hessian(finite.total, finite.logits)
    assert eager.isfinite().all()
    assert_same(hessian(finite.total)(finite.logits), eager)


def test_second_derivative_of_an_ignored_row_is_zero() -> None:
    x = torch.randn(3, 4)
    x[1, 2], x[2] = -INF, -INF
    target = torch.tensor([0, -100, -100])
    for smoothing in (0.0, 0.1):

        def loss(x: Tensor, smoothing: float = smoothing) -> Tensor:
            return ours.cross_entropy(x, target, label_smoothing=smoothing)

        second = torch.autograd.functional.hessian(loss, x)
        assert bool((second[1:] == 0).all())
        assert bool((second[:, :, 1:] == 0).all())


@pytest.mark.parametrize("batching", ["is_grads_batched", "vmap"])
def test_batched_gradients(problem: Problem, batching: str) -> None:
    x = problem.logits.clone().requires_grad_()
    losses = problem(x, reduction="none")
    upstream = cases.normal((3, *losses.shape), torch.float32, "cpu", seed=5)
    if batching == "vmap":
        result = vmap(lambda g: torch.autograd.grad(losses, x, g, retain_graph=True)[0])(upstream)
    else:
        (result,) = torch.autograd.grad(losses, x, upstream, is_grads_batched=True, retain_graph=True)
    for part, one in zip(result, upstream, strict=True):
        assert_same(part, torch.autograd.grad(losses, x, one, retain_graph=True)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.dtype_id)
def test_sixteen_bits_beside_a_float32_weight(dtype: torch.dtype) -> None:
    """Computed in float32 inside the transform as well, and rounded once."""
    x, y = cases.normal((6, 5), dtype, "cpu", scale=2), cases.indices((6,), 5, torch.int64, "cpu")
    weight = cases.uniform((5,), torch.float32, "cpu")
    for target, options in ((y, {"weight": weight}), (y.int(), {"weight": weight, "label_smoothing": 0.1})):
        problem = Problem(ours.cross_entropy, x, target, {**options, "reduction": "none"})
        losses, gradient = problem(x), plain(problem)[1]
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(vmap(problem)(x[None])[0], losses, rtol=eps, atol=0)
        torch.testing.assert_close(grad(problem.total)(x), gradient, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["masked class", "bce certain", "bce certain, pos_weight"])
def test_gradient_of_the_target_where_a_part_is_certain(name: str, reduction: str) -> None:
    """The log-probability of a class that costs nothing: infinite, as from the kernels, and no large number."""
    problem = PROBLEMS[name]
    x, t = problem.logits, problem.target.clone().requires_grad_()

    def total(logits: Tensor, target: Tensor) -> Tensor:
        return problem.function(logits, target, **{**problem.options, "reduction": reduction}).sum()

    (expected,) = torch.autograd.grad(total(x, t), t)
    assert expected.isinf().equal(x.isinf())
    assert_same(grad(total, argnums=1)(x, problem.target), expected)
    assert_same(torch.autograd.grad(total(x, t), t, create_graph=True)[0].detach(), expected)
    one = torch.zeros_like(t).masked_fill_(x.isinf(), 1)
    assert_same(jvp(lambda t: total(x, t), (problem.target,), (one,))[1], expected[x.isinf()].sum())
    assert_same(jvp(lambda t: total(x, t), (problem.target,), (1 - one,))[1], expected[x.isfinite()].sum())


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "weight": weights()}], ids=["plain", "smoothed"])
def test_derivatives_of_a_mean_without_rows_are_zero(options: dict[str, Any]) -> None:
    """The mean itself is NaN; forward mode agrees with the gradient."""
    problem = Problem(ours.cross_entropy, torch.randn(2, 3), torch.tensor([-100, -100]), options)
    loss, gradient = plain(problem)
    assert bool(loss.isnan())
    assert not bool(gradient.any())
    value, derivative = jvp(problem.total, (problem.logits,), (torch.ones(2, 3),))
    assert bool(value.isnan())
    assert float(derivative) == 0
    assert not bool(grad(problem.total)(problem.logits).any())
    assert not bool(torch.func.jacfwd(torch.func.jacfwd(problem.total))(problem.logits).any())


@pytest.mark.parametrize("bad", [5, -1, 2**40])
@pytest.mark.parametrize("reduction", [0, 1, 2], ids=["none", "mean", "sum"])
def test_a_bad_index_makes_its_row_nan_with_create_graph(reduction: int, bad: int) -> None:
    """On CUDA, where no forward has raised: an index out of bounds there would take the process with it."""
    x = torch.randn(4, 5)
    target, others = torch.tensor([0, bad, 4, -100]), torch.tensor([0, -100, 4, -100])
    g = torch.randn(4) if reduction == 0 else torch.randn(())
    result, expected = (gradients(Gradients(g), x, y, None, Options(reduction, -100, 0.1))[0] for y in (target, others))
    assert bool(result[1].isnan().all())
    torch.testing.assert_close(result[[0, 2, 3]], expected[[0, 2, 3]])


def test_index_out_of_range_raises_in_a_transform() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        grad(lambda x: ours.cross_entropy(x, torch.tensor([0, 5])))(torch.zeros(2, 3))


def test_gradient_of_a_weight_beside_probabilities() -> None:
    """The one weight that torch differentiates, with the limits of the kernels."""
    problem = PROBLEMS["masked class"]
    weight = weights().requires_grad_()
    loss = ours.cross_entropy(problem.logits, problem.target, weight)
    (gradient,) = torch.autograd.grad(loss, weight)
    p, t = torch.log_softmax(problem.logits.double(), 1), problem.target.double()
    expected = -torch.where(t == 0, 0, t * p).sum(0) / len(t)
    torch.testing.assert_close(gradient.double(), expected)


WRONG: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
    "integer logits": (torch.ones(4, 3, dtype=torch.int64), torch.tensor([0, 1, 2, 0]), {}),
    "bool logits": (torch.ones(4, 3, dtype=torch.bool), torch.tensor([0, 1, 2, 0]), {}),
    "complex logits": (torch.ones(4, 3, dtype=torch.complex64), torch.tensor([0, 1, 2, 0]), {}),
    "float8 logits": (torch.ones(4, 3).to(torch.float8_e5m2), torch.tensor([0, 1, 2, 0]), {}),
    "integer target of the logits' shape": (torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.int64), {}),
    "too few rows": (torch.ones(4, 3), torch.tensor([0, 1]), {}),
    "one row for an unbatched input": (torch.ones(3), torch.tensor([0]), {}),
    "rows for an unbatched input": (torch.ones(3), torch.tensor([0, 1, 2]), {}),
    "smoothing beyond 1": (torch.ones(4, 3), torch.tensor([0, 1, 2, 0]), {"label_smoothing": 1.5}),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("transform", ["functionalize", "vmap", "vmap_target", "grad", "jvp", "dual", "trace"])
def test_wrong_arguments_are_refused_inside_as_outside(transform: str, name: str) -> None:
    """Torch's class of error, or torch's value where torch has one."""
    logits, target, options = WRONG[name]

    def call(function: Callable[..., Tensor]) -> Any:
        def loss(x: Tensor) -> Tensor:
            return function(x, target, **options)

        if transform == "functionalize":
            return torch.func.functionalize(loss)(logits)
        if transform == "vmap":
            return vmap(loss)(torch.stack([logits, logits]))
        if transform == "vmap_target":
            return vmap(lambda y: function(logits, y, **options))(torch.stack([target, target]))
        if transform == "grad":
            return grad(loss)(logits)
        if transform == "jvp":
            return jvp(loss, (logits,), (logits,))
        if transform == "dual":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, logits)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(loss, logits, check_trace=False)(logits)

    results: list[Any] = []
    for function in (ours.cross_entropy, torch.nn.functional.cross_entropy):
        try:
            results.append(call(function))
        except Exception as error:
            results.append(error)
    if isinstance(results[1], Exception):
        assert type(results[0]) is type(results[1]), results
    else:
        torch.testing.assert_close(results[0], results[1])
