"""What autograd does with the losses, beyond the values of the first gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as theirs
from comparison import assert_bitwise_equal
from torch import Tensor

import torchce.functional as ours

LOSSES = ["cross_entropy_index", "cross_entropy_probability", "bce"]


def problem(loss: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """(ours, logits, target), the logits a leaf that requires grad."""
    logits = cases.normal((6, 5), dtype, device, scale=2).requires_grad_()
    if loss == "bce":
        return ours.binary_cross_entropy_with_logits, logits, cases.uniform((6, 5), dtype, device)
    kind = loss.removeprefix("cross_entropy_")
    return ours.cross_entropy, logits, cases.softmax_target(kind, (6, 5), dtype, device)


# --- derivatives against finite differences, float64 ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 4, 3)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["hard", "smooth"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_gradcheck_cross_entropy(
    device: str, kind: str, weighted: bool, smoothing: float, reduction: str, shape: tuple[int, ...]
) -> None:
    logits = cases.normal(shape, torch.float64, device).requires_grad_()
    target = cases.softmax_target(kind, shape, torch.float64, device)
    if kind == "probability":
        target.requires_grad_()
    elif target.dim() > 0:
        target.view(-1)[1] = -100
    weight = cases.uniform([4], torch.float64, device) if weighted else None

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return ours.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, (logits, target))
    assert torch.autograd.gradgradcheck(loss, (logits, target))


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("weights", ["", "weight", "pos_weight", "weight pos_weight"], ids=lambda w: w or "plain")
def test_gradcheck_bce(device: str, weights: str, reduction: str) -> None:
    logits = cases.normal((3, 4), torch.float64, device).requires_grad_()
    target = cases.uniform((3, 4), torch.float64, device).requires_grad_()
    options = {name: cases.uniform([4], torch.float64, device, seed=8) * 3 for name in weights.split()}

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return ours.binary_cross_entropy_with_logits(logits, target, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, (logits, target))
    assert torch.autograd.gradgradcheck(loss, (logits, target))


# --- second derivatives, graphs kept and graphs made ----------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_backward_equals_the_first(device: str, reduction: str, loss: str) -> None:
    function, logits, target = problem(loss, device)
    if target.is_floating_point():
        target.requires_grad_()
    inputs = [t for t in (logits, target) if t.requires_grad]
    result = function(logits, target, reduction=reduction).sum()
    first = torch.autograd.grad(result, inputs, retain_graph=True)
    second = torch.autograd.grad(result, inputs)
    for one, other in zip(first, second, strict=True):
        assert_bitwise_equal(one, other)


@pytest.mark.parametrize("loss", LOSSES)
def test_backward_twice_without_retain_graph_raises(device: str, loss: str) -> None:
    function, logits, target = problem(loss, device)
    result = function(logits, target)
    result.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        result.backward()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_create_graph_gives_torchs_second_derivative(
    device: str, dtype: torch.dtype, reduction: str, loss: str
) -> None:
    """A gradient penalty: d/dx of |d loss / dx|^2."""
    function, logits, target = problem(loss, device, dtype)
    torch_function = getattr(theirs, function.__name__)
    penalties = []
    for f in (function, torch_function):
        (grad,) = torch.autograd.grad(f(logits, target, reduction=reduction).square().sum(), logits, create_graph=True)
        assert grad.requires_grad
        (penalty,) = torch.autograd.grad(grad.square().sum(), logits)
        penalties.append(penalty)
    torch.testing.assert_close(penalties[0], penalties[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_create_graph_does_not_change_the_gradient(device: str, loss: str) -> None:
    function, logits, target = problem(loss, device)
    (plain,) = torch.autograd.grad(function(logits, target), logits)
    (with_graph,) = torch.autograd.grad(function(logits, target), logits, create_graph=True)
    torch.testing.assert_close(with_graph.detach(), plain)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_accumulate(device: str, loss: str) -> None:
    function, logits, target = problem(loss, device)
    function(logits, target).backward()
    once = logits.grad.clone()
    function(logits, target).backward()
    assert_bitwise_equal(logits.grad, once + once)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_reaches_through_the_model(device: str, loss: str) -> None:
    """Logits that are no leaf, and a loss that goes on."""
    function, logits, target = problem(loss, device, torch.float64)
    torch_function = getattr(theirs, function.__name__)
    gradients = []
    for f in (function, torch_function):
        hidden = (logits * 3).tanh()
        (grad,) = torch.autograd.grad(3 * f(hidden, target, reduction="none").exp().mean(), logits)
        gradients.append(grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("loss", ["cross_entropy_probability", "bce"])
def test_gradient_for_the_target_alone(device: str, loss: str) -> None:
    """Distillation with a fixed student: the logits do not require grad."""
    function, logits, target = problem(loss, device, torch.float64)
    torch_function = getattr(theirs, function.__name__)
    gradients = []
    for f in (function, torch_function):
        t = target.clone().requires_grad_()
        gradients.append(torch.autograd.grad(f(logits.detach(), t), t)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("loss", ["cross_entropy_probability", "bce"])
def test_one_tensor_as_logits_and_target(device: str, loss: str) -> None:
    """Both gradients arrive in the same leaf."""
    function, logits, _ = problem(loss, device, torch.float64)
    torch_function = getattr(theirs, function.__name__)
    gradients = [torch.autograd.grad(f(logits, logits), logits)[0] for f in (function, torch_function)]
    torch.testing.assert_close(gradients[0], gradients[1])


# --- what autograd must be told -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("victim", ["logits", "target", "weight"])
def test_changing_an_input_before_backward_raises(device: str, victim: str, loss: str) -> None:
    """The gradient is recomputed from the inputs, so a changed one must not give a wrong gradient in silence."""
    function, leaf, target = problem(loss, device)
    logits = leaf * 1.0
    weight = cases.uniform([5], torch.float32, device)
    result = function(logits, target, weight)
    with torch.no_grad():
        {"logits": logits, "target": target, "weight": weight}[victim].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_no_grad_keeps_no_state(device: str, context: Callable[[], Any], loss: str) -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    function, logits, target = problem(loss, device)
    with context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(logits, target)
    assert result.grad_fn is None and not result.requires_grad and not saved


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_of_the_logits_size_is_saved_but_the_inputs(device: str, loss: str) -> None:
    """Softmax probabilities are never stored: two or three numbers a row, two for the whole."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    function, logits, target = problem(loss, device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(logits, target)
    inputs = {logits.data_ptr(), target.data_ptr()}
    rows = 0 if loss == "bce" else logits.size(0)
    assert saved, "the hook saw what is saved"
    extra = sum(t.numel() for t in saved if t.data_ptr() not in inputs)
    assert extra <= 3 * rows + 2, [t.shape for t in saved]
    result.backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_saved_tensors_may_be_moved_away_and_back(device: str, loss: str) -> None:
    """As activation offloading does: fresh memory at the same values."""
    function, logits, target = problem(loss, device)
    (expected,) = torch.autograd.grad(function(logits, target), logits)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        result = function(logits, target)
    (grad,) = torch.autograd.grad(result, logits)
    assert_bitwise_equal(grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_unused_loss_costs_nothing(device: str, loss: str) -> None:
    """A loss that is never differentiated does not disturb another one over the same logits."""
    function, logits, target = problem(loss, device)
    (expected,) = torch.autograd.grad(function(logits, target), logits)
    function(logits, target)
    first, second = function(logits, target), function(logits, target)
    (grad,) = torch.autograd.grad(second, logits)
    assert_bitwise_equal(grad, expected)
    (grad,) = torch.autograd.grad(first, logits)
    assert_bitwise_equal(grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_broadcast_leaf_receives_a_gradient_of_its_shape(device: str, loss: str) -> None:
    """Expanded logits whose base is the leaf: autograd sums over the rows."""
    function, logits, target = problem(loss, device, torch.float64)
    torch_function = getattr(theirs, function.__name__)
    base = logits.detach()[:1].clone().requires_grad_()
    gradients = [torch.autograd.grad(f(base.expand(6, 5), target), base)[0] for f in (function, torch_function)]
    assert gradients[0].shape == (1, 5)
    torch.testing.assert_close(gradients[0], gradients[1])
