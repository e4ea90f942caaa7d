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
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import torchce
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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_every_mode_against_finite_differences(device: str, reduction: str, loss: str) -> None:
    """Forward mode, batched gradients both ways, forward over reverse; the 3d samples of torch come on top."""
    function, logits, target = problem(loss, device, torch.float64)
    logits = logits[:3].detach().requires_grad_()
    target = target[:3].requires_grad_(target.is_floating_point())

    def reduced(logits: Tensor, target: Tensor) -> Tensor:
        return function(logits, target, reduction=reduction)

    assert torch.autograd.gradcheck(
        reduced, (logits, target), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(reduced, (logits, target), check_fwd_over_rev=True, check_batched_grad=True)


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


@pytest.mark.parametrize("loss", LOSSES)
def test_tangent_that_meets_only_the_backward(device: str, loss: str) -> None:
    """Forward over reverse where the loss was computed before the dual level: the kernels would drop the tangent."""
    function, logits, target = problem(loss, device, torch.float64)
    tangents = []
    for f in (function, getattr(theirs, function.__name__)):
        result = f(logits, target, reduction="none")
        with forward_ad.dual_level():
            tangent = cases.uniform(result.shape, torch.float64, device)
            grad_output = forward_ad.make_dual(torch.ones_like(result), tangent)
            (grad,) = torch.autograd.grad(result, logits, grad_output)
            tangents.append(forward_ad.unpack_dual(grad).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(tangents[0], tangents[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_third_derivative(device: str, loss: str) -> None:
    function, logits, target = problem(loss, device, torch.float64)
    direction = cases.normal(logits.shape, torch.float64, device, seed=9)
    thirds = []
    for f in (function, getattr(theirs, function.__name__)):
        derivative = f(logits, target)
        for _ in range(3):
            (grad,) = torch.autograd.grad(derivative, logits, create_graph=True)
            derivative = (grad * direction).sum()
        thirds.append(grad)
    torch.testing.assert_close(thirds[0], thirds[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_batched_gradients(device: str, loss: str) -> None:
    """Three gradients at once, as torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    function, logits, target = problem(loss, device, torch.float64)
    results = []
    for f in (function, getattr(theirs, function.__name__)):
        result = f(logits, target, reduction="none")
        grad_outputs = cases.normal((3, *result.shape), torch.float64, device, seed=9)
        results.append(torch.autograd.grad(result, logits, grad_outputs, is_grads_batched=True)[0])
    assert results[0].shape == (3, 6, 5)
    torch.testing.assert_close(results[0], results[1])


# --- hooks and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_hooks_see_and_change_the_gradient(device: str, loss: str) -> None:
    """On the logits, on the loss, and on the loss's node in the graph."""
    function, leaf, target = problem(loss, device, torch.float64)
    results = []
    for f in (function, getattr(theirs, function.__name__)):
        seen: list[Tensor] = []
        logits = leaf * 1
        logits.register_hook(lambda grad, seen=seen: seen.append(grad) or 2 * grad)
        result = f(logits, target, reduction="none")
        result.register_hook(lambda grad: 3 * grad)
        result.grad_fn.register_prehook(lambda grads: tuple(5 * grad for grad in grads))
        result.grad_fn.register_hook(lambda grads, _: tuple(None if g is None else 7 * g for g in grads))
        (grad,) = torch.autograd.grad(result.sum(), leaf)
        results.append([*seen, grad])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("module", [torchce.CrossEntropyLoss, torchce.BCEWithLogitsLoss], ids=lambda m: m.__name__)
def test_module_hooks(device: str, module: type[torch.nn.Module]) -> None:
    _, logits, target = problem("bce", device)
    seen: list[Tensor] = []
    loss = module()
    loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss.register_forward_hook(lambda _, inputs, output: seen.append(output) or 2 * output)
    loss.register_full_backward_hook(lambda _, grads, grad_outputs: seen.append(grads[0]))
    loss(logits, target).backward()
    assert len(seen) == 3
    assert_bitwise_equal(seen[2], logits.grad)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing(device: str, reentrant: bool, loss: str) -> None:
    """The loss is computed again in backward, to the same bits."""
    function, logits, target = problem(loss, device)
    (expected,) = torch.autograd.grad(function(logits * 2, target), logits)

    def head(x: Tensor) -> Tensor:
        return function(x * 2, target)

    checkpoint(head, logits, use_reentrant=reentrant).backward()
    assert_bitwise_equal(logits.grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_saved_on_the_cpu(device: str, loss: str) -> None:
    function, logits, target = problem(loss, device)
    (expected,) = torch.autograd.grad(function(logits, target), logits)
    with torch.autograd.graph.save_on_cpu():
        result = function(logits, target)
    assert_bitwise_equal(torch.autograd.grad(result, logits)[0], expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_inference_tensors(device: str, loss: str) -> None:
    """They take part in no graph, and a graph cannot keep them for backward: torch's answer, both times."""
    function, logits, target = problem(loss, device)
    expected = function(logits.detach(), target)
    with torch.inference_mode():
        frozen_logits, frozen_target = logits.detach().clone(), target.clone()
    assert_bitwise_equal(function(frozen_logits, frozen_target), expected)
    for f in (function, getattr(theirs, function.__name__)):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            f(logits, frozen_target)


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
    assert result.grad_fn is None
    assert not result.requires_grad
    assert not saved


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


def test_error_of_a_saved_tensors_hook_is_not_tried_again(device: str) -> None:
    """A loss of class indices is tried before its arguments are looked at; that may only hide the op's own refusals."""
    calls = []

    def pack(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        raise RuntimeError("no room")

    logits = torch.randn(4, 10, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(RuntimeError, match="no room"):
        torchce.functional.cross_entropy(logits, torch.arange(4, device=device))
    assert len(calls) == 1
