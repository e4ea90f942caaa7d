"""Sizes that only the data know: no guard where torch has none, and the op compares what a trace cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

import torchce.functional as ours

BACKENDS = ["eager", "aot_eager", "inductor"]
WEIGHT = torch.tensor([1.0, 2.0, 0.5])
PROBLEMS: dict[str, dict[str, Any]] = {
    "index": {},
    "index_options": {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 1},
    "index_none": {"reduction": "none"},
    "probability": {"weight": WEIGHT},
    "bce": {},
    "bce_options": {"weight": WEIGHT, "pos_weight": WEIGHT},  # one tensor twice
    "bce_none": {"reduction": "none"},
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


def problem(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """(function of logits and target, logits, target)"""
    kind = name.split("_")[0]
    function = ours.binary_cross_entropy_with_logits if kind == "bce" else ours.cross_entropy
    logits = cases.normal((6, 3), torch.float32, "cpu", scale=2)
    target = cases.uniform((6, 3), torch.float32, "cpu")
    if kind != "bce":
        target = cases.softmax_target(kind, (6, 3), torch.float32, "cpu")
    return lambda x, y: function(x, y, **PROBLEMS[name]), logits, target


MASK = torch.tensor([True, False, True, True, False, True])


class Masked(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = problem(name)[0]

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        return self.function(x[mask], y[other])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend: str, name: str) -> None:
    """One mask, and two of which only the data tell that they keep as many rows: loss and gradient."""
    _, logits, target = problem(name)
    model = Masked(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for other in (MASK, MASK.clone()):
        results = []
        for f in (compiled, model):
            x = logits.clone().requires_grad_()
            loss = f(x, target, MASK, other)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exported(strict: bool, name: str) -> None:
    _, logits, target = problem(name)
    model = Masked(name)
    masks = (MASK, MASK.clone())
    program = torch.export.export(model, (logits, target, *masks), strict=strict).module()
    others = (~MASK, ~MASK)
    for given in (masks, others):
        torch.testing.assert_close(program(logits, target, *given), model(logits, target, *given))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_marked_as_unbacked(backend: str, name: str) -> None:
    function, logits, target = problem(name)
    expected = function(logits, target)
    x = logits.clone().requires_grad_()
    for tensor in (x, target):
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    loss = torch.compile(function, fullgraph=True, backend=backend)(x, target)
    torch.testing.assert_close(loss.detach(), expected)
    loss.sum().backward()


@pytest.mark.parametrize("dims", [(2, 3), (0, 2, 3)], ids=str)
def test_images_of_any_size(dims: tuple[int, ...]) -> None:
    x = cases.normal((6, 3, 4, 5), torch.float32, "cpu").requires_grad_()
    y = cases.indices((6, 4, 5), 3, torch.int64, "cpu")
    expected = torch.autograd.grad(ours.cross_entropy(x, y), x)[0]
    for dim in dims:
        torch._dynamo.decorators.mark_unbacked(x, dim)
        torch._dynamo.decorators.mark_unbacked(y, dim - (dim > 1))
    compiled = torch.compile(ours.cross_entropy, fullgraph=True, backend="inductor")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), x)[0], expected)


@pytest.mark.parametrize("name", ["index", "probability", "bce", "bce_options"])
def test_what_the_trace_took_for_equal_is_compared_when_it_runs(name: str) -> None:
    _, logits, target = problem(name)
    compiled = torch.compile(Masked(name), fullgraph=True, backend="aot_eager")
    fewer = MASK.clone()
    fewer[0] = False
    compiled(logits, target, MASK, MASK.clone())
    with pytest.raises(RuntimeError):
        compiled(logits, target, MASK, fewer)
