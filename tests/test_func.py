"""torch.func's transforms and their nestings, eager and compiled: torch's own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor
from torch.func import functionalize, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import torchce.functional as ours

LOSSES = ["cross_entropy_index", "cross_entropy_probability", "bce"]
Loss = Callable[..., Tensor]


def pair(loss: str) -> tuple[Loss, Loss]:
    """(ours, torch's)"""
    name = "binary_cross_entropy_with_logits" if loss == "bce" else "cross_entropy"
    return getattr(ours, name), getattr(theirs, name)


def problem(loss: str, device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(logits [4, 5], target)"""
    logits = cases.normal((4, 5), dtype, device, scale=2)
    if loss == "bce":
        return logits, cases.uniform((4, 5), dtype, device)
    return logits, cases.softmax_target(loss.removeprefix("cross_entropy_"), (4, 5), dtype, device)


def direction(x: Tensor) -> Tensor:
    """Some tangent, from operations that can be traced."""
    return torch.linspace(-2, 9, x.numel(), dtype=x.dtype, device=x.device).cos().view(x.shape)


def vjp_of_rows(f: Loss, x: Tensor, y: Tensor) -> Any:
    rows, pull = vjp(lambda x: f(x, y, reduction="none"), x)
    return rows, pull(direction(rows))


def per_sample_gradients(f: Loss, x: Tensor, y: Tensor) -> Any:
    return vmap(grad(f))(x, y)


# What each transform is asked for, of a loss f at logits x and target y.
TRANSFORMS: dict[str, Callable[[Loss, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, y: grad(f)(x, y),
    "grad_and_value": lambda f, x, y: grad_and_value(f)(x, y),
    "vjp": vjp_of_rows,
    "jvp": lambda f, x, y: jvp(lambda x: f(x, y), (x,), (direction(x),)),
    "linearize": lambda f, x, y: linearize(lambda x: f(x, y), x)[1](direction(x)),
    "jacrev": lambda f, x, y: jacrev(lambda x: f(x, y, reduction="none"))(x),
    "jacfwd": lambda f, x, y: jacfwd(lambda x: f(x, y, reduction="none"))(x),
    "hessian": lambda f, x, y: hessian(lambda x: f(x, y))(x),
    "vmap": lambda f, x, y: vmap(f)(x, y),
    "vmap_logits_only": lambda f, x, y: vmap(lambda x: f(x, y))(torch.stack([x, 2 * x])),
    "vmap_target_only": lambda f, x, y: vmap(lambda y: f(x, y))(torch.stack([y, y.flip(0)])),
    "vmap_along_the_last_dim": lambda f, x, y: vmap(
        lambda x, y: f(x, y, reduction="sum"), in_dims=(2, 2 if y.dim() > 1 else 1)
    )(torch.stack([x, 2 * x], -1), torch.stack([y, y.flip(0)], -1)),
    "vmap_in_chunks": lambda f, x, y: vmap(f, chunk_size=3)(x, y),
    "vmap_of_vmap": lambda f, x, y: vmap(vmap(f))(torch.stack([x, 2 * x]), torch.stack([y, y])),
    "vmap_of_grad": per_sample_gradients,
    "vmap_of_hessian": lambda f, x, y: vmap(hessian(f))(x, y),
    "grad_of_vmap": lambda f, x, y: grad(lambda x: vmap(f)(x, y).square().sum())(x),
    "grad_of_grad": lambda f, x, y: grad(lambda x: grad(f)(x, y).square().sum())(x),
    "jvp_of_grad": lambda f, x, y: jvp(lambda x: grad(f)(x, y), (x,), (direction(x),)),
    "grad_of_jvp": lambda f, x, y: grad(lambda x: jvp(lambda x: f(x, y), (x,), (direction(x),))[1])(x),
    "jvp_of_jvp": lambda f, x, y: jvp(
        lambda x: jvp(lambda x: f(x, y), (x,), (direction(x),))[1], (x,), (direction(x),)
    ),
    "jacfwd_of_jacfwd": lambda f, x, y: jacfwd(jacfwd(lambda x: f(x, y)))(x),
    "jacrev_of_jacrev": lambda f, x, y: jacrev(jacrev(lambda x: f(x, y)))(x),
    "functionalize": lambda f, x, y: functionalize(f)(x, y),
    "functionalize_of_grad": lambda f, x, y: functionalize(grad(f))(x, y),
    "vmap_of_autograd": lambda f, x, y: _vmap_over_a_graph(f, x, y),
    "autograd_jacobian": lambda f, x, y: torch.autograd.functional.jacobian(
        lambda x: f(x, y, reduction="none"), x, vectorize=True
    ),
    "autograd_hessian": lambda f, x, y: torch.autograd.functional.hessian(
        lambda x: f(x, y), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "autograd_hvp": lambda f, x, y: torch.autograd.functional.hvp(lambda x: f(x, y), x, direction(x)),
    "autograd_jvp": lambda f, x, y: torch.autograd.functional.jvp(lambda x: f(x, y), x, direction(x)),
}


def _vmap_over_a_graph(f: Loss, x: Tensor, y: Tensor) -> Tensor:
    """A graph made outside the transform and walked inside it."""
    x = x.clone().requires_grad_()
    rows = f(x, y, reduction="none")
    grad_outputs = cases.normal((3, *rows.shape), x.dtype, str(x.device), seed=9)
    return vmap(lambda g: torch.autograd.grad(rows, x, g, retain_graph=True)[0])(grad_outputs)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(device: str, transform: str, loss: str) -> None:
    x, y = problem(loss, device)
    f, torch_function = pair(loss)
    try:
        expected = TRANSFORMS[transform](torch_function, x, y)
    except RuntimeError:
        assert (transform, loss) == ("jacfwd_of_jacfwd", "bce"), "torch gives up on this one only"
        expected = TRANSFORMS["hessian"](torch_function, x, y)
    torch.testing.assert_close(TRANSFORMS[transform](f, x, y), expected)


@pytest.mark.parametrize("loss", ["cross_entropy_probability", "bce"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "jacfwd", "hessian"])
def test_transform_of_the_target(device: str, transform: str, loss: str) -> None:
    x, y = problem(loss, device)
    results = [TRANSFORMS[transform](lambda y, x, f=f, **kw: f(x, y, **kw), y, x) for f in pair(loss)]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("wide", ["logits", "target", "weight"])
def test_float64_beside_float32(device: str, wide: str) -> None:
    """Formulas are as exact as kernels: as those of the same numbers, all in float64."""
    logits, target = problem("cross_entropy_probability", device, torch.float32)
    operands = {"logits": logits, "target": target, "weight": cases.uniform([5], torch.float32, device)}
    operands[wide] = operands[wide].double()
    x, y, weight = operands.values()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ours.cross_entropy(x, y, weight)

    def expected_loss(x: Tensor, y: Tensor) -> Tensor:
        return theirs.cross_entropy(x, y, weight.double())

    def gradients(f: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        return torch.autograd.grad(f(x, y), (x, y), create_graph=True)

    def tangent(f: Loss, x: Tensor, y: Tensor, along: Tensor) -> Tensor:
        return jvp(lambda x: f(x, y), (x,), (along,))[1]

    torch.testing.assert_close(vmap(loss)(x, y), vmap(expected_loss)(x.double(), y.double()), rtol=1e-13, atol=0)
    along = direction(x)
    expected = tangent(expected_loss, x.double(), y.double(), along.double())
    torch.testing.assert_close(tangent(loss, x, y, along), expected, rtol=1e-12, atol=0)
    for result, expected in zip(gradients(loss, x, y), gradients(expected_loss, x.double(), y.double()), strict=True):
        tolerance = 1e-13 if result.dtype == torch.float64 else 2**-24  # one rounding
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=1e-16)


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap", "vmap_of_grad"])
def test_options_reach_through(device: str, transform: str) -> None:
    """Weight, ignore_index, smoothing and pos_weight under a transform."""
    weight = cases.uniform([5], torch.float64, device)
    for loss, options in (
        ("cross_entropy_index", {"weight": weight, "ignore_index": 1, "label_smoothing": 0.1, "reduction": "sum"}),
        ("cross_entropy_probability", {"weight": weight, "label_smoothing": 0.1}),
        ("bce", {"weight": weight, "pos_weight": 3 * weight}),
    ):
        x, y = problem(loss, device)
        results = [
            TRANSFORMS[transform](lambda x, y, f=f, options=options: f(x, y, **options), x, y) for f in pair(loss)
        ]
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_ensemble_of_models(device: str, randomness: str) -> None:
    """torch.func's own example: functional_call, grad and vmap over stacked parameters."""
    torch.manual_seed(0)
    nets = [torch.nn.Linear(3, 5, dtype=torch.float64, device=device) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)
    data = cases.normal((4, 3), torch.float64, device)
    target = cases.indices([4], 5, torch.int64, device)
    results = []
    for f in pair("cross_entropy_index"):

        def loss(parameters: Any, buffers: Any, f: Loss = f) -> Tensor:
            return f(torch.func.functional_call(nets[0], (parameters, buffers), (data,)), target)

        results.append(vmap(grad(loss), randomness=randomness)(parameters, buffers))
    torch.testing.assert_close(results[0], results[1])


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap", "vmap_of_grad"])
def test_compiled_transform(device: str, transform: str, loss: str, fresh_dynamo: None) -> None:
    """One graph, though Dynamo refuses an autograd.Function with a jvp of its own."""
    x, y = problem(loss, device)
    f, torch_function = pair(loss)
    compiled = torch.compile(lambda x, y: TRANSFORMS[transform](f, x, y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), TRANSFORMS[transform](torch_function, x, y))
