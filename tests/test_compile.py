"""Under torch.compile: no graph break, eager's numbers, no recompilation for another batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import pytest
import torch
from comparison import assert_bitwise_equal
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx

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


@pytest.mark.parametrize("loss", ["index", "index_options", "bce", "bce_weights"])
def test_inductor(device: str, loss: str) -> None:
    """With arithmetic around the loss for inductor to fuse, so that strides and layouts are really used."""
    function, logits, target = problem(loss, device)

    def model(x: Tensor, y: Tensor) -> Tensor:
        return function((x * 2).tanh(), y) * 3

    compiled = torch.compile(model, fullgraph=True)
    results = loss_and_grads(compiled, logits, target)
    for result, expected in zip(results, loss_and_grads(model, logits, target), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("loss", ["index_3d", "probability"])
def test_inductor_with_dynamic_shapes(device: str, loss: str) -> None:
    """Training, then inference, at batch sizes the compiler has not seen, and no second compilation of either."""
    function = problem(loss, device)[0]

    def model(x: Tensor, y: Tensor) -> Tensor:
        return function((x * 2).tanh(), y) * 3

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for context in (torch.enable_grad, torch.no_grad):
        for number, rows in enumerate((6, 9, 130)):
            _, logits, target = problem(loss, device, rows)
            with context(), torch._dynamo.config.patch(error_on_recompile=number > 0):
                if context is torch.no_grad:
                    torch.testing.assert_close(compiled(logits, target), model(logits, target))
                else:
                    results, expected = (loss_and_grads(f, logits, target) for f in (compiled, model))
                    torch.testing.assert_close(results, expected)


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


@pytest.mark.parametrize("loss", LOSSES)
def test_no_recompile_in_training(loss: str) -> None:
    function = problem(loss, "cpu")[0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for number, rows in enumerate((6, 7, 130, 33)):
        _, logits, target = problem(loss, "cpu", rows)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            results = loss_and_grads(compiled, logits, target)
        for result, expected in zip(results, loss_and_grads(function, logits, target), strict=True):
            assert_bitwise_equal(result, expected)


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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("loss", ["index", "probability", "bce"])
def test_inplace_backward(backend: str, loss: str) -> None:
    """The compiler plans the memory: the argument changes neither the graph nor the gradient, nor the logits."""
    name = "binary_cross_entropy_with_logits" if loss == "bce" else "cross_entropy"
    _, logits, target = problem(loss, "cpu")

    def function(x: Tensor, y: Tensor, inplace_backward: bool) -> Tensor:
        return getattr(torchce.functional, name)(x * 2, y, inplace_backward=inplace_backward)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = loss_and_grads(lambda x, y: compiled(x, y, True), logits, target)
    for result, expected in zip(
        results, loss_and_grads(lambda x, y: function(x, y, False), logits, target), strict=True
    ):
        assert_bitwise_equal(result, expected)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace_backward"])
@pytest.mark.parametrize("loss", ["index", "probability", "bce"])
def test_compiled_autograd(loss: str, inplace: bool) -> None:
    """A backward that is compiled while it runs, behind a forward that was not."""
    name = "binary_cross_entropy_with_logits" if loss == "bce" else "cross_entropy"
    function = getattr(torchce.functional, name)
    _, logits, target = problem(loss, "cpu")
    x = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(x * 2, target), x)
    with compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        function(x * 2, target, inplace_backward=inplace).backward()
    assert_bitwise_equal(x.grad, expected)


# --- torch.export and AOTAutograd -----------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """A network with its loss inside, as it is exported for training or scoring."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = torch.nn.Linear(5, 5), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.net(x), y)


def model_of(loss: str) -> tuple[Model, Tensor, Tensor]:
    """(model, input, target)"""
    weight = torch.arange(1.0, 6.0)
    _, data, target = problem(loss, "cpu")
    if loss == "bce_weights":
        return Model(torchce.BCEWithLogitsLoss(weight, pos_weight=3 * weight)), data, target
    if loss == "index_options":
        return Model(torchce.CrossEntropyLoss(weight, ignore_index=1, label_smoothing=0.1)), data, target
    return Model(torchce.CrossEntropyLoss()), data, target


EXPORTED = {"index_options": "softmax_ce", "probability": "softmax_ce", "bce_weights": "sigmoid_bce"}


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("loss", EXPORTED)
def test_export(loss: str, strict: bool, tmp_path: Path) -> None:
    """One op of ours in the graph, for any batch size, also after decomposition and a trip through a file."""
    model, data, target = model_of(loss)
    batch = {0: torch.export.Dim("batch", min=2, max=1000)}
    program = torch.export.export(model, (data, target), dynamic_shapes=(batch, batch), strict=strict)
    program = program.run_decompositions()
    ops = [str(node.target) for node in program.graph.nodes if "torchce" in str(node.target)]
    assert ops == [f"torchce.{EXPORTED[loss]}_forward.default"]
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (6, 3):
        assert_bitwise_equal(loaded(data[:rows], target[:rows]), model(data[:rows], target[:rows]).detach())


@pytest.mark.parametrize("loss", EXPORTED)
def test_aot_autograd_sees_a_functional_graph(loss: str) -> None:
    """Forward and backward, functionalised and with dynamic shapes, hold our ops and none that writes its inputs."""
    model, data, target = model_of(loss)
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        for node in graph.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                assert not node.target._schema.is_mutable, node.target
                seen.append(str(node.target))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep))
    results, expected = (
        torch.autograd.grad(function(data, target), list(model.parameters())) for function in (compiled, model)
    )
    torch.testing.assert_close(results, expected)
    for direction in ("forward", "backward"):
        assert f"torchce.{EXPORTED[loss]}_{direction}.default" in seen


@pytest.mark.parametrize("loss", ["index", "probability", "bce"])
def test_aot_function_without_dynamo(loss: str) -> None:
    """Tensors arrive as functional ones here, and torch's own operations are what is traced."""
    function, logits, target = problem(loss, "cpu")
    traced = aot_function(function, fw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    results, expected = (loss_and_grads(f, logits, target) for f in (traced, function))
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("loss", ["index", "probability", "bce"])
def test_make_fx(loss: str) -> None:
    """Symbolic tracing of loss and gradient."""
    function, logits, target = problem(loss, "cpu")

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x, y), x)[0]

    graph = make_fx(gradient, tracing_mode="symbolic")(logits, target)
    assert any("torchce" in str(node.target) and "backward" in str(node.target) for node in graph.graph.nodes)
    _, other_logits, other_target = problem(loss, "cpu", 9)
    assert_bitwise_equal(graph(other_logits, other_target), gradient(other_logits, other_target))
