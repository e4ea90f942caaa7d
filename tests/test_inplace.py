"""``inplace_backward=True``: the same gradient, over the logits, and autograd knows that they are gone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import cases
import pytest
import torch
from cases import dtype_id
from comparison import assert_bitwise_equal
from functorch.compile import aot_function, nop
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import torchce
from torchce import ops

SHAPE = (37, 21)
LOSSES = ["index", "probability", "bce"]


def problem(loss: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """(loss function, leaf, target)."""
    leaf = cases.normal(SHAPE, dtype, device, scale=3).requires_grad_()
    if loss == "bce":
        function = torchce.functional.binary_cross_entropy_with_logits
        return function, leaf, cases.uniform(SHAPE, dtype, device)
    return torchce.functional.cross_entropy, leaf, cases.softmax_target(loss, SHAPE, dtype, device)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_the_same_and_lies_in_the_logits(
    device: str, loss: str, dtype: torch.dtype, reduction: str
) -> None:
    function, leaf, target = problem(loss, device, dtype)
    expected_loss = function(leaf, target, reduction=reduction)
    (expected,) = torch.autograd.grad(expected_loss.sum(), leaf)
    logits = leaf.clone()
    value = function(logits, target, reduction=reduction, inplace_backward=True)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert_bitwise_equal(value.detach(), expected_loss.detach())
    assert_bitwise_equal(grad, expected)
    assert grad.data_ptr() == logits.data_ptr()


def test_gradient_lies_in_the_logits_beside_float64_probabilities(device: str) -> None:
    function, leaf, target = problem("probability", device)
    target = target.double()
    (expected,) = torch.autograd.grad(function(leaf, target), leaf)
    logits = leaf.clone()
    (grad,) = torch.autograd.grad(function(logits, target, inplace_backward=True), logits)
    assert_bitwise_equal(grad, expected)
    assert grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("loss", LOSSES)
def test_modules_take_it(device: str, loss: str) -> None:
    _, leaf, target = problem(loss, device)
    module = torchce.BCEWithLogitsLoss if loss == "bce" else torchce.CrossEntropyLoss
    logits = leaf.clone()
    (grad,) = torch.autograd.grad(module(inplace_backward=True)(logits, target), logits)
    assert grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("use", ["square", "relu"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_later_use_of_the_logits_raises(device: str, loss: str, use: str) -> None:
    """What else was computed from them, or they from it, would get a wrong gradient."""
    function, leaf, target = problem(loss, device)
    logits = leaf.relu() if use == "relu" else leaf * 1
    other = logits.square()
    version = logits._version
    total = function(logits, target, inplace_backward=True)
    if use == "relu":  # its backward reads its result, which comes after the loss's in this very call
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
    else:
        total.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(other.sum(), leaf)
    assert logits._version == version + 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_backward_raises(device: str, loss: str) -> None:
    function, leaf, target = problem(loss, device)
    value = function(leaf * 1, target, inplace_backward=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True: this loss's backward has run"):
        value.backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_two_losses_of_the_same_logits(device: str, loss: str) -> None:
    """The later one's backward runs first: the other would then read its gradient, or has nothing to fear."""
    function, leaf, target = problem(loss, device)
    logits = leaf * 1
    total = function(logits, target) + function(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()

    (expected,) = torch.autograd.grad(function(leaf, target), leaf)
    logits = leaf * 1
    total = function(logits, target, inplace_backward=True) + function(logits, target)
    (grad,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(grad, 2 * expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_leaf_is_refused(device: str, loss: str) -> None:
    function, leaf, target = problem(loss, device)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="inplace_backward=True: input is a leaf that requires grad"):
        function(leaf, target, inplace_backward=True)
    assert_bitwise_equal(leaf.detach(), before)


class Passing(torch.autograd.Function):
    """Hands its memory on as a view; its other input requires grad too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.variable = None  # a name that autograd's own nodes use
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad.sum().view(1)


def passed(x: Tensor) -> Tensor:
    return Passing.apply(x, torch.ones(1, device=x.device, requires_grad=True))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda leaf: leaf.view(SHAPE),
    "view of a view": lambda leaf: leaf.view(SHAPE[1], SHAPE[0]).view(-1).view(SHAPE),
    "slice": lambda leaf: torch.cat([leaf, leaf]).detach().requires_grad_()[: leaf.numel()].view(SHAPE),
    "transposed": lambda leaf: leaf.view(SHAPE[1], SHAPE[0]).t(),
    "chunk": lambda leaf: torch.cat([leaf, leaf]).detach().requires_grad_().chunk(2)[1].view(SHAPE),
    "alias": lambda leaf: torch.ops.aten.alias(leaf).view(SHAPE),
    "of a leaf that is a slice": lambda leaf: (
        torch.cat([leaf, leaf]).detach()[: leaf.numel()].requires_grad_().view(SHAPE)
    ),
    "of a leaf that is a chunk": lambda leaf: torch.cat([leaf, leaf]).detach().chunk(2)[1].requires_grad_().view(SHAPE),
    "of a leaf that is detached": lambda leaf: leaf.detach()[:].requires_grad_().view(-1).view(SHAPE),
    "of a Function": passed,
    "of a Function, of a view": lambda leaf: passed(leaf.view(SHAPE)),
    "unsafe_chunk": lambda leaf: leaf.view(SHAPE).unsafe_chunk(1)[0],
    "_unsafe_view": lambda leaf: torch.ops.aten._unsafe_view(leaf, SHAPE),
    "made without grad": lambda leaf: torch.no_grad()(leaf.view)(-1).view(SHAPE),
    "of a sparse leaf": lambda leaf: values_of_leaf(leaf.detach().view(SHAPE).to_sparse(1)),
    "of a nested leaf": lambda leaf: values_of_leaf(torch.nested.nested_tensor([leaf.detach().view(SHAPE)] * 2)),
    "of a jagged leaf": lambda leaf: values_of_leaf(
        torch.nested.nested_tensor([leaf.detach().view(SHAPE)] * 2, layout=torch.jagged)
    ),
}


def values_of_leaf(tensor: Tensor) -> Tensor:
    tensor = tensor.requires_grad_()
    return (tensor.coalesce() if tensor.is_sparse else tensor).values().view(-1)[: SHAPE[0] * SHAPE[1]]


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_view_of_a_leaf_is_refused(device: str, loss: str, view: str) -> None:
    """Of a view, of a slice, of a parameter: the gradient would overwrite the leaf's own values."""
    function, leaf, target = problem(loss, device)
    parameter = torch.nn.Parameter(leaf.detach().flatten())
    logits = VIEWS[view](parameter)
    logits = logits if logits.shape == SHAPE else logits.view(SHAPE)
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match="inplace_backward=True: input is a view of a leaf that requires grad"):
        function(logits, target, inplace_backward=True)
    assert_bitwise_equal(logits.detach(), before)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_view_of_what_is_no_leaf_is_taken(device: str, loss: str) -> None:
    function, leaf, target = problem(loss, device)
    (expected,) = torch.autograd.grad(function(leaf, target), leaf)
    logits = (leaf * 1).view(-1).view(SHAPE)
    (grad,) = torch.autograd.grad(function(logits, target, inplace_backward=True), leaf)
    assert_bitwise_equal(grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_leaves_without_memory_or_layout(device: str, loss: str) -> None:
    """They are compared with nothing: on meta, empty, and where a leaf is no strided tensor."""
    function, leaf, target = problem(loss, device)
    logits = (leaf.detach().to_sparse().requires_grad_().to_dense() * 1).view(-1).view(SHAPE)
    function(logits, target, inplace_backward=True).backward()
    if device == "cpu":
        logits = leaf.detach().to_mkldnn().requires_grad_().to_dense().view(-1).view(SHAPE)
        function(logits, target, inplace_backward=True).backward()
    on_meta = leaf.detach().to("meta").requires_grad_()
    function((on_meta * 1).view(-1).view(SHAPE), target.to("meta"), inplace_backward=True).backward()
    if loss == "bce":
        empty = torch.zeros(3, 0, requires_grad=True)
        function((empty * 1).view(-1).view(3, 0), torch.zeros(3, 0), inplace_backward=True).backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_view_of_the_negative_is_refused(device: str, loss: str) -> None:
    """Its memory holds other values than it does."""
    function, leaf, target = problem(loss, device)
    with pytest.raises(RuntimeError, match="inplace_backward=True: input is a view of its negative"):
        function(torch._neg_view(leaf * 1), target, inplace_backward=True)


HOOKS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "hooks": lambda total, leaf: run(total, leaf, torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)),
    "save_on_cpu": lambda total, leaf: run(total, leaf, torch.autograd.graph.save_on_cpu()),
    "checkpoint": lambda total, leaf: checkpoint(total, leaf, use_reentrant=False),
}


def run(total: Callable[[Tensor], Tensor], leaf: Tensor, context: AbstractContextManager[Any]) -> Tensor:
    with context:
        return total(leaf)


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_without_effect_where_hooks_save(device: str, loss: str, hooks: str) -> None:
    """Autograd asks no version of what they give back: a z-loss beside it would read the gradient as logits."""
    function, leaf, target = problem(loss, device)

    def total(x: Tensor, inplace_backward: bool = True) -> Tensor:
        logits = x * 1
        return logits.logsumexp(1).square().mean() + function(logits, target, inplace_backward=inplace_backward)

    (expected,) = torch.autograd.grad(total(leaf, inplace_backward=False), leaf)
    (grad,) = torch.autograd.grad(HOOKS[hooks](total, leaf), leaf)
    assert_bitwise_equal(grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batched_backward_is_refused(device: str, loss: str) -> None:
    function, leaf, target = problem(loss, device)
    losses = function(leaf * 1, target, reduction="none", inplace_backward=True)
    upstream = torch.ones(2, *losses.shape, device=device)
    with pytest.raises(RuntimeError, match=r"inplace_backward=True: a batched backward \(is_grads_batched=True\)"):
        torch.autograd.grad(losses, leaf, upstream, is_grads_batched=True)


# --- what shares the logits' memory ---------------------------------------------------------------------------------

Square = tuple[Tensor, dict[str, Any]]  # (what stands for the target, more arguments), of logits [8, 8]
SHARING: dict[str, tuple[str, Callable[[Tensor], Square]]] = {
    "the same elements": ("bce", lambda z: (z, {})),
    "transposed": ("bce", lambda z: (z.t(), {})),
    "a row of it": ("bce", lambda z: (z[3].expand(8, 8), {})),
    "shifted": ("bce", lambda z: (z.view(-1)[7:-1].as_strided((8, 8), (7, 1)), {})),
    "its bytes": ("bce", lambda z: (z.view(torch.uint8)[:, 8:16], {})),
    "weight": ("bce", lambda z: (torch.full((8, 8), 0.25), {"weight": z[2]})),
    "pos_weight": ("bce", lambda z: (torch.full((8, 8), 0.25), {"pos_weight": z[5]})),
    "pos_weight, a column": ("bce", lambda z: (torch.full((8, 8), 0.25), {"pos_weight": z[:, :1]})),
    "probabilities": ("cross_entropy", lambda z: (z, {})),
    "probabilities, transposed": ("cross_entropy", lambda z: (z.t(), {})),
    "class weight": ("cross_entropy", lambda z: (torch.arange(8), {"weight": z[1]})),
    "class weight, a column": ("cross_entropy", lambda z: (torch.arange(8), {"weight": z[:, 1]})),
    "class indices": ("cross_entropy", lambda z: (z.view(torch.int32)[:, 3], {"ignore_index": 7})),
}


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("sharing", SHARING)
def test_arguments_in_the_logits_memory(sharing: str, reduction: str) -> None:
    """What the kernel would read after it was overwritten gives the gradient that its values before give."""
    loss, make = SHARING[sharing]
    name = "binary_cross_entropy_with_logits" if loss == "bce" else "cross_entropy"
    function = getattr(torchce.functional, name)
    gradients = []
    for inplace in (False, True):
        leaf = cases.uniform((8, 8), torch.float32, "cpu").requires_grad_()
        logits = leaf * 1
        if sharing == "class indices":  # small numbers, as integers, are small floats
            logits.data.view(torch.int32)[:, 3] = torch.arange(8, dtype=torch.int32)
        target, options = make(logits.detach())
        value = function(logits, target, reduction=reduction, inplace_backward=inplace, **options)
        gradients.append(torch.autograd.grad(value.sum(), logits)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=3e-7, atol=6e-8)  # a copy has another layout


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy_with_logits"])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_upstream_gradient_in_the_logits_memory(reduction: str, loss: str) -> None:
    function = getattr(torchce.functional, loss)
    target = torch.arange(8) if loss == "cross_entropy" else torch.full((8, 8), 0.25)
    for pick in (lambda z: z[:, 0], lambda z: z.t(), lambda z: z, lambda z: z[2].expand(8, 8)):
        gradients = []
        for inplace in (False, True):
            logits = cases.uniform((8, 8), torch.float32, "cpu").requires_grad_() * 1
            value = function(logits, target, reduction=reduction, inplace_backward=inplace)
            upstream = pick(logits.detach())
            if value.shape != upstream.shape:
                upstream = {0: logits.detach()[2, 3], 1: logits.detach()[:, 0], 2: upstream.expand(8, 8)}[value.dim()]
            gradients.append(torch.autograd.grad(value, logits, upstream)[0])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=3e-7, atol=6e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_lies_beside_the_logits_is_not_copied(device: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer for logits and target, as of a layer with two heads."""
    function, leaf, target = problem(loss, device)
    both = torch.cat([leaf.detach().flatten(), leaf.detach().flatten()])
    anchor = torch.zeros(1, device=device, requires_grad=True)
    logits = (both + anchor)[: leaf.numel()].view(SHAPE)
    if target.shape == leaf.shape:
        target = logits._base.detach()[leaf.numel() :].view(SHAPE).copy_(target)
    value = function(logits, target, inplace_backward=True)
    monkeypatch.setattr(Tensor, "clone", lambda self: pytest.fail("copied"))
    (grad,) = torch.autograd.grad(value, logits)
    assert grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("mode", ["aot", "fake", "symbolic"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_traced_graph_overwrites_nothing(loss: str, mode: str) -> None:
    """A tracer's tensors have no memory in which to look for what is shared."""
    function, leaf, target = problem(loss, "cpu")

    def total(x: Tensor, y: Tensor) -> Tensor:
        logits = x * 1
        weight = logits.detach()[0].exp()
        return function(logits, y, weight, inplace_backward=True)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(total(x, y), x)[0]

    expected = gradient(leaf, target)
    if mode == "aot":
        (grad,) = torch.autograd.grad(aot_function(total, nop)(leaf, target), leaf)
    else:
        graph = make_fx(gradient, tracing_mode=mode)(leaf.detach(), target)
        assert not any("backward_." in str(node.target) for node in graph.graph.nodes)
        grad = graph(leaf.detach(), target)
    assert_bitwise_equal(grad, expected)


@pytest.mark.parametrize("layout", ["sliced", "expanded_rows", "strided"])
@pytest.mark.parametrize("loss", LOSSES)
def test_scattered_or_overlapping_memory_is_refused(device: str, loss: str, layout: str) -> None:
    function, _, target = problem(loss, device)
    logits = cases.LAYOUTS[layout](lambda shape: cases.normal(shape, torch.float32, device).requires_grad_() * 1, SHAPE)
    with pytest.raises(RuntimeError, match="inplace_backward=True: input has overlapping or scattered memory"):
        function(logits, target, inplace_backward=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_gradient_nothing_is_written(device: str, loss: str) -> None:
    function, leaf, target = problem(loss, device)
    logits = leaf.detach()
    before = logits.clone()
    function(logits, target, inplace_backward=True)
    with torch.no_grad():
        function(leaf * 1, target, inplace_backward=True)
    assert_bitwise_equal(logits, before)
    assert logits._version == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_model_trains_as_without(device: str, loss: str) -> None:
    """Three steps of a linear layer, whose backward needs no logits."""
    function, _, target = problem(loss, device)
    inputs = cases.normal((SHAPE[0], 8), torch.float32, device, seed=5)

    def weights(**options: Any) -> Tensor:
        layer = torch.nn.Linear(8, SHAPE[1], device=device)
        with torch.no_grad():
            layer.weight.copy_(cases.normal(layer.weight.shape, torch.float32, device, seed=6))
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            function(layer(inputs), target, **options).backward()
            optimizer.step()
        return layer.weight.detach()

    assert_bitwise_equal(weights(inplace_backward=True), weights())


def test_the_ops_tell_autograd(device: str) -> None:
    """As do those that no module uses."""
    _, leaf, target = problem("index", device)
    logits, one = leaf.detach().clone(), torch.ones((), device=device)
    ops.softmax_ce_forward_backward_(one, logits, target, None, None, 2, -100, 0.0)
    assert logits._version == 1
    with pytest.raises(RuntimeError, match="logits: expected a tensor that does not require grad"):
        ops.softmax_ce_forward_backward_(one, leaf, target, None, None, 2, -100, 0.0)
    with torch.inference_mode():  # where there are no versions
        ops.softmax_ce_forward_backward_(one, leaf * 1, target, None, None, 2, -100, 0.0)
