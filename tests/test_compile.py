"""Under torch.compile: no graph break, eager's numbers, no recompilation for another batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cases
import pytest
import torch
from comparison import assert_bitwise_equal
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import torchce
import torchce.functional

LOSSES = ["index", "index_options", "index_3d", "probability", "bce", "bce_weights"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(loss: str, device: str, rows: int = 6) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """(function of logits and target, logits, target)."""
    shape = (rows, 5, 3) if loss == "index_3d" else (rows, 5)
    logits = cases.normal(shape, torch.float32, device, scale=3)
    weight = cases.uniform([5], torch.float32, device)
    if loss.startswith("bce"):
        options = {"weight": weight, "pos_weight": weight * 3} if loss == "bce_weights" else {}
        target = cases.uniform(shape, torch.float32, device)
        return lambda x, y: torchce.functional.binary_cross_entropy_with_logits(x, y, **options), logits, target
    options = {"weight": weight, "ignore_index": 1, "label_smoothing": 0.1} if loss == "index_options" else {}
    target = cases.softmax_target(loss.split("_")[0], shape, torch.float32, device)
    return lambda x, y: torchce.functional.cross_entropy(x, y, **options), logits, target


def loss_and_grads(function: Callable[..., Tensor], logits: Tensor, target: Tensor) -> list[Tensor]:
    """Loss, and the gradients of the logits and of a target that has one."""
    logits = logits.detach().clone().requires_grad_()
    inputs = [logits]
    if target.is_floating_point():
        target = target.detach().clone().requires_grad_()
        inputs.append(target)
    loss = function(logits, target)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fullgraph_equals_eager(device: str, backend: str, dynamic: bool, loss: str) -> None:
    function, logits, target = problem(loss, device)
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    results = loss_and_grads(compiled, logits, target)
    for result, expected in zip(results, loss_and_grads(function, logits, target), strict=True):
        assert_bitwise_equal(result, expected)


@pytest.mark.parametrize("loss", ["index", "bce_weights"])
def test_inductor(device: str, loss: str) -> None:
    """With arithmetic around the loss for inductor to fuse, so that strides and layouts are really used."""
    function, logits, target = problem(loss, device)

    def model(x: Tensor, y: Tensor) -> Tensor:
        return function((x * 2).tanh(), y) * 3

    compiled = torch.compile(model, fullgraph=True)
    results = loss_and_grads(compiled, logits, target)
    for result, expected in zip(results, loss_and_grads(model, logits, target), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_recompile_when_only_the_batch_changes(loss: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(problem(loss, "cpu")[0], fullgraph=True, backend=counter, dynamic=True)
    for rows in (6, 7, 130, 33):
        function, logits, target = problem(loss, "cpu", rows)
        assert_bitwise_equal(compiled(logits, target), function(logits, target))
    assert counter.frame_count == 1


@pytest.mark.parametrize("loss", ["index", "bce"])
def test_batch_becomes_dynamic_by_itself(loss: str) -> None:
    """torch's default: one graph for the first size, one for all others."""
    counter = CompileCounter()
    compiled = torch.compile(problem(loss, "cpu")[0], fullgraph=True, backend=counter)
    for rows in (6, 7, 130, 33):
        _, logits, target = problem(loss, "cpu", rows)
        compiled(logits, target)
    assert counter.frame_count == 2


@pytest.mark.parametrize("loss", ["index", "probability", "bce"])
def test_no_grad(device: str, loss: str) -> None:
    function, logits, target = problem(loss, device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        result = compiled(logits.requires_grad_(), target)
    assert not result.requires_grad
    assert_bitwise_equal(result, function(logits, target))


@pytest.mark.parametrize("loss", ["index", "bce"])
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast(device: str, inside: bool, loss: str) -> None:
    function, logits, target = problem(loss, device)
    logits = logits.bfloat16()

    def with_autocast(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return function(x, y)

    if inside:
        compiled = torch.compile(with_autocast, fullgraph=True, backend="aot_eager")
        result = compiled(logits, target)
    else:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with torch.autocast(device, dtype=torch.bfloat16):
            result = compiled(logits, target)
    assert result.dtype == torch.float32
    assert_bitwise_equal(result, with_autocast(logits, target))


@pytest.mark.parametrize("module", ["CrossEntropyLoss", "BCEWithLogitsLoss"])
def test_modules(module: str) -> None:
    """The whole training graph of a small model, loss module included."""
    torch.manual_seed(0)
    net, loss = torch.nn.Linear(4, 5), getattr(torchce, module)()
    data = cases.normal((6, 4), torch.float32, "cpu")
    target = (
        cases.indices([6], 5, torch.int64, "cpu")
        if module == "CrossEntropyLoss"
        else cases.uniform((6, 5), torch.float32, "cpu")
    )

    def step() -> Tensor:
        return loss(net(data), target)

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        gradients.append(torch.autograd.grad(function(), list(net.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1])
