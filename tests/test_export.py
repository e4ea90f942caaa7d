"""Programs that have been traced: the loss in them trains, or says that it cannot."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from comparison import assert_bitwise_equal
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import torchce
import torchce.functional as ours

ROWS, CLASSES = 4, 3


def weights() -> Tensor:
    return torch.tensor([1.0, 2.0, 0.5])


def target_of(kind: str) -> Tensor:
    soft = cases.uniform((ROWS, CLASSES), torch.float32, "cpu")
    return {
        "int64": torch.tensor([0, 1, 2, 0]),
        "int32": torch.tensor([0, 1, 2, 0], dtype=torch.int32),
        "uint8": torch.tensor([0, 1, 2, 0], dtype=torch.uint8),
        "probability": soft.softmax(1),
        "soft": soft,
        "soft float64": soft.double(),
        "bool": soft > 0.5,
        "integer": (soft > 0.5).long(),
    }[kind]


SOFTMAX = [("int64", {})]
SOFTMAX += [(kind, {"ignore_index": 1, "label_smoothing": 0.1, "weight": weights()}) for kind in ("int32", "uint8")]
SOFTMAX += [("int64", {"reduction": "none"}), ("int64", {"reduction": "sum", "weight": weights()}), ("probability", {})]
SOFTMAX += [("probability", {"label_smoothing": 0.1, "weight": weights(), "reduction": "none"})]
SIGMOID = [("soft", {}), ("soft float64", {"reduction": "sum"}), ("bool", {"reduction": "none"})]
SIGMOID += [("integer", {"weight": weights(), "pos_weight": 3 * weights()})]
PROBLEMS = [(torchce.CrossEntropyLoss, *problem) for problem in SOFTMAX]
PROBLEMS += [(torchce.BCEWithLogitsLoss, *problem) for problem in SIGMOID]
IDS = [f"{loss.__name__}-{kind}-{'-'.join(options)}" for loss, kind, options in PROBLEMS]
every_problem = pytest.mark.parametrize(("loss", "kind", "options"), PROBLEMS, ids=IDS)


class Model(torch.nn.Module):
    """A network with its loss inside, and another term beside it that would hide a missing gradient."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = torch.nn.Linear(5, CLASSES), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.net(x)
        return self.loss(logits, y).sum() + 0.1 * logits.square().mean()


def gradients(model: torch.nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(x, y), list(model.parameters()))


def through_a_file(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@every_problem
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_exported_program_trains(
    strict: bool, loss: type[torch.nn.Module], kind: str, options: dict[str, Any]
) -> None:
    """To the same bits: as it is, decomposed, saved and loaded, and compiled."""
    model, target = Model(loss(**options)), target_of(kind)
    data = cases.normal((ROWS, 5), torch.float32, "cpu")
    expected = gradients(model, data, target)
    program = torch.export.export(model, (data, target), strict=strict)
    decomposed = program.run_decompositions()
    for trained in (program.module(), decomposed.module(), through_a_file(decomposed).module()):
        for grad, wanted in zip(gradients(trained, data, target), expected, strict=True):
            assert_bitwise_equal(grad, wanted)
    torch._dynamo.reset()
    compiled = torch.compile(program.module(), fullgraph=True, backend="aot_eager")
    for grad, wanted in zip(gradients(compiled, data, target), expected, strict=True):
        assert_bitwise_equal(grad, wanted)


@every_problem
def test_a_draft_of_an_export_trains(loss: type[torch.nn.Module], kind: str, options: dict[str, Any]) -> None:
    """``draft_export`` runs the ops on real tensors beside the fake ones, and looks for what they have written."""
    model, target = Model(loss(**options)), target_of(kind)
    data = cases.normal((ROWS, 5), torch.float32, "cpu")
    program = torch.export.draft_export(model, (data, target))
    assert any("torchce" in str(node.target) for node in program.graph.nodes)
    for grad, wanted in zip(gradients(program.module(), data, target), gradients(model, data, target), strict=True):
        assert_bitwise_equal(grad, wanted)


@every_problem
def test_compiled_beside_real_tensors(loss: type[torch.nn.Module], kind: str, options: dict[str, Any]) -> None:
    """As ``draft_export``, backward ops included."""
    model, target = Model(loss(**options)), target_of(kind)
    data = cases.normal((ROWS, 5), torch.float32, "cpu")
    torch._dynamo.reset()
    with functorch_config.patch(fake_tensor_propagate_real_tensors=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = gradients(compiled, data, target)
    torch.testing.assert_close(results, gradients(model, data, target))


def test_gradients_keep_their_layout_beside_real_tensors() -> None:
    """Inductor checks what the ops return against what their fakes promised."""
    logits = cases.normal((2, 4, 5, CLASSES), torch.float32, "cpu").permute(0, 3, 1, 2).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        target = torch.full_like(x, 0.25)
        elements = ours.binary_cross_entropy_with_logits(x, target, reduction="none").sum()
        return ours.cross_entropy(x, target.argmax(1)) + elements

    torch._dynamo.reset()
    with functorch_config.patch(fake_tensor_propagate_real_tensors=True):
        (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(logits), logits)
    torch.testing.assert_close(grad, torch.autograd.grad(loss(logits), logits)[0])


@pytest.mark.parametrize("loss", ["index", "probability", "bce"])
def test_an_exported_program_trains_its_optimizer_steps(loss: str) -> None:
    """Three steps of each, and the parameters are the same to the last bit."""
    made = torchce.BCEWithLogitsLoss if loss == "bce" else torchce.CrossEntropyLoss
    target = target_of({"index": "int64", "bce": "soft"}.get(loss, loss))
    data = cases.normal((ROWS, 5), torch.float32, "cpu")
    results = []
    for exported in (False, True):
        model: torch.nn.Module = Model(made())
        if exported:
            model = through_a_file(torch.export.export(model, (data, target))).module()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(data, target).backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    for eager, traced in zip(*results, strict=True):
        assert_bitwise_equal(eager, traced)


def function_of(loss: type[torch.nn.Module], target: Tensor, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    function = ours.cross_entropy if loss is torchce.CrossEntropyLoss else ours.binary_cross_entropy_with_logits
    return lambda x: function(x, target, **options).sum()


@every_problem
@pytest.mark.parametrize("pre_dispatch", [False, True], ids=["", "pre_dispatch"])
def test_a_traced_loss_has_its_gradient(
    pre_dispatch: bool, loss: type[torch.nn.Module], kind: str, options: dict[str, Any]
) -> None:
    function = function_of(loss, target_of(kind), options)
    logits = cases.normal((ROWS, CLASSES), torch.float32, "cpu", scale=2)
    graph = make_fx(function, pre_dispatch=pre_dispatch)(logits)
    assert any("torchce" in str(node.target) for node in graph.graph.nodes)
    results = []
    for f in (graph, function):
        x = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
        results.append((grad, torch.autograd.grad(grad.square().sum(), x)[0]))
    assert_bitwise_equal(results[0][0], results[1][0])
    assert_bitwise_equal(results[0][1], results[1][1])


@every_problem
def test_a_traced_gradient_has_its_own(loss: type[torch.nn.Module], kind: str, options: dict[str, Any]) -> None:
    """The graph of a gradient holds the backward ops, whose derivatives are those of the formulas."""
    function = function_of(loss, target_of(kind), options)
    logits = cases.normal((ROWS, CLASSES), torch.float32, "cpu", scale=2)

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(function(x), x)[0]

    graph = make_fx(gradient)(logits.clone().requires_grad_())
    x = logits.clone().requires_grad_()
    (traced,) = torch.autograd.grad(graph(x).square().sum(), x)
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(traced, expected)


SOFT_TARGET = torch.linspace(0, 1, ROWS * CLASSES, dtype=torch.float64).view(ROWS, CLASSES)
# Without functions that save their result: of that, make_fx records a detached copy before torch 2.14.
ENTANGLED: dict[str, Callable[[Tensor], Tensor]] = {
    "ce, upstream of the loss": lambda x: ours.cross_entropy(x, torch.tensor([0, 1, 2, 0]), reduction="none").square(),
    "bce, upstream of the loss": lambda x: ours.binary_cross_entropy_with_logits(x, SOFT_TARGET).square(),
    "ce, target of the logits": lambda x: ours.cross_entropy(x, x.square()),
    "bce, target of the logits": lambda x: ours.binary_cross_entropy_with_logits(x, x.square()),
    "bce, one tensor twice": lambda x: ours.binary_cross_entropy_with_logits(x, x),
}


@pytest.mark.parametrize("name", ENTANGLED)
def test_a_traced_gradient_of_arguments_that_hang_together(name: str) -> None:
    """Each argument of a backward op gets its own derivative, though one is computed from another."""
    logits = cases.normal((ROWS, CLASSES), torch.float64, "cpu", scale=2)

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(ENTANGLED[name](x).sum(), x)[0]

    graph = make_fx(gradient)(logits.clone().requires_grad_())
    x = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(graph, x)
    assert torch.autograd.gradgradcheck(graph, x)


@pytest.mark.parametrize("loss", ["probability", "bce"])
def test_a_traced_gradient_of_the_target_has_its_own(loss: str) -> None:
    function = ours.binary_cross_entropy_with_logits if loss == "bce" else ours.cross_entropy
    logits = cases.normal((ROWS, CLASSES), torch.float64, "cpu", scale=2)
    target = target_of("probability").double()

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return torch.autograd.grad(function(x, y), y)[0]

    graph = make_fx(gradient)(logits, target.clone().requires_grad_())
    x, y = logits.clone().requires_grad_(), target.clone().requires_grad_()
    (traced,) = torch.autograd.grad(graph(x, y).square().sum(), x)
    (first,) = torch.autograd.grad(function(x, y), y, create_graph=True)
    torch.testing.assert_close(traced, torch.autograd.grad(first.square().sum(), x)[0])


@pytest.mark.parametrize("op", ["softmax_ce", "sigmoid_bce"])
def test_what_an_op_cannot_differentiate_raises(op: str) -> None:
    """A weight of a graph that requires grad after all, where torch differentiates none."""
    logits, weight = torch.zeros(ROWS, CLASSES, requires_grad=True), weights().requires_grad_()
    if op == "softmax_ce":
        loss = torchce.ops.softmax_ce_forward(logits, target_of("int64"), weight, None, 1, -100, 0.0)[0]
    else:
        loss = torchce.ops.sigmoid_bce_forward(logits, target_of("soft"), weight, None, None, 1)
    with pytest.raises(RuntimeError, match=r"weight.*no gradient leads to"):
        loss.backward()


@every_problem
def test_transforms_of_a_traced_loss(loss: type[torch.nn.Module], kind: str, options: dict[str, Any]) -> None:
    """The op in the graph is transformed as the function is: nothing is dropped, in forward mode least of all."""
    function = function_of(loss, target_of(kind), options)
    logits = cases.normal((ROWS, CLASSES), torch.float32, "cpu", scale=2)
    tangent = cases.normal((ROWS, CLASSES), torch.float32, "cpu", seed=8)
    graph = make_fx(function)(logits)

    def dual(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            primal, derivative = forward_ad.unpack_dual(f(forward_ad.make_dual(logits, tangent)))
            return primal, derivative

    for transform in (
        lambda f: torch.func.grad(f)(logits),
        lambda f: torch.func.jvp(f, (logits,), (tangent,)),
        lambda f: torch.func.hessian(f)(logits),
        lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([logits, tangent])),
        dual,
    ):
        torch.testing.assert_close(transform(graph), transform(function))
