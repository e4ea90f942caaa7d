"""Divergences of a student's linear layer from a teacher's, in pieces: as of whole logits, in every graph."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import torch
from comparison import assert_bitwise_equal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import torchce.functional as ours
from torchce import ops
from torchce.functional import linear_divergence

ROWS, CLASSES = 24, 13
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "kl": (ours.linear_kl_div, ours.kl_div_with_logits, {}),
    "reverse_kl": (ours.linear_kl_div, ours.kl_div_with_logits, {"reverse": True}),
    "js": (ours.linear_js_div, ours.js_div_with_logits, {"beta": 0.3}),
}
EACH_LOSS = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers(dtype: torch.dtype = torch.float32, rows: int = ROWS, classes: int = CLASSES) -> dict[str, Tensor]:
    shapes = {
        "input": (rows, 6),
        "linear_weight": (classes, 6),
        "linear_bias": (classes,),
        "target_input": (rows, 9),
        "target_linear_weight": (classes, 9),
        "target_linear_bias": (classes,),
    }
    return {name: cases.normal(shape, dtype, "cpu", seed=n) for n, (name, shape) in enumerate(shapes.items())}


MASK = torch.arange(ROWS) % 3 != 1
STUDENT = ("input", "linear_weight", "linear_bias")


def whole(name: str, tensors: dict[str, Tensor], **options: Any) -> Tensor:
    """Of the logits of both layers."""
    student, teacher = ([tensors[prefix + n] for n in STUDENT] for prefix in ("", "target_"))
    _, function, fixed = LOSSES[name]
    return function(F.linear(*student), F.linear(*teacher), target_logits=True, **fixed, **options)


def pieces(name: str, tensors: dict[str, Tensor], **options: Any) -> Tensor:
    function, _, fixed = LOSSES[name]
    return function(**tensors, **fixed, **{"chunk_rows": 7, **options})


def value_and_grads(function: Callable[..., Tensor], name: str, tensors: dict[str, Tensor], **options: Any) -> Any:
    tensors = {n: t.clone().requires_grad_(n in STUDENT) for n, t in tensors.items()}
    loss = function(name, tensors, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, [tensors[n] for n in STUDENT], upstream)]


@EACH_LOSS
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_as_of_whole_logits(name: str, reduction: str, dtype: torch.dtype, masked: bool) -> None:
    options: dict[str, Any] = {"reduction": reduction, "temperature": 1.7, "mask": MASK if masked else None}
    tensors = layers(dtype)
    wide = {n: t.double() for n, t in tensors.items()}
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 3e-2)
    for chunk_rows in (1, 7, 100):
        results = value_and_grads(pieces, name, tensors, **options, chunk_rows=chunk_rows)
        for result, expected, n in zip(
            results, value_and_grads(whole, name, wide, **options), ("", *STUDENT), strict=True
        ):
            assert result.dtype == dtype
            scale = expected.abs().max()
            torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * float(scale), msg=n)


@EACH_LOSS
def test_gradients_of_what_learns_only(name: str) -> None:
    tensors = layers()
    all_of_them = dict(zip(("loss", *STUDENT), value_and_grads(pieces, name, tensors), strict=True))
    for learns in STUDENT:
        of = {n: t.clone().requires_grad_(n == learns) for n, t in tensors.items()}
        loss = pieces(name, of)
        loss.backward(torch.full_like(loss, 0.5))
        assert_bitwise_equal(of[learns].grad, all_of_them[learns])
        assert all(t.grad is None for n, t in of.items() if n != learns)


@EACH_LOSS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=cases.dtype_id)
def test_a_teacher_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    """In pieces, too; the loss has the promoted dtype."""
    tensors = layers()
    mixed = {n: t.to(dtype) if n.startswith("target_") else t for n, t in tensors.items()}
    results, expected = value_and_grads(pieces, name, mixed), value_and_grads(whole, name, mixed)
    assert results[0].dtype == torch.promote_types(torch.float32, dtype)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)


@EACH_LOSS
@pytest.mark.parametrize("classes", [CLASSES, 2000])
def test_rows_that_are_left_out_may_hold_anything(name: str, classes: int) -> None:
    """Whether they are gathered, of many classes, or not."""
    tensors = layers(classes=classes)
    expected = value_and_grads(pieces, name, tensors, mask=MASK)
    for n in ("input", "target_input"):
        tensors[n] = tensors[n].masked_fill(~MASK.unsqueeze(1), torch.nan)
    for result, wanted in zip(value_and_grads(pieces, name, tensors, mask=MASK), expected, strict=True):
        assert_bitwise_equal(result, wanted)


@EACH_LOSS
@pytest.mark.parametrize("chunk_rows", [None, 7], ids=["small", "pieces"])
def test_rows_that_are_left_out_reach_no_weight(name: str, chunk_rows: int | None) -> None:
    """Through whole logits neither: of small calls, of a teacher that learns, in second derivatives."""
    clean = layers()
    spoilt = dict(clean)
    for n in ("input", "target_input"):
        spoilt[n] = clean[n].masked_fill(~MASK.unsqueeze(1), torch.nan)
    for learning in (("linear_weight",), ("linear_weight", "target_linear_weight")):
        gradients = []
        for tensors in (clean, spoilt):
            of = [tensors[n].clone().requires_grad_() for n in learning]
            loss = pieces(name, tensors | dict(zip(learning, of, strict=True)), mask=MASK, chunk_rows=chunk_rows)
            first = torch.autograd.grad(loss, of, create_graph=True)
            gradients.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), of)])
        torch.testing.assert_close(*gradients)


@EACH_LOSS
def test_a_teacher_that_learns(name: str) -> None:
    """Through whole logits."""
    results = []
    for function in (pieces, whole):
        tensors = {n: t.clone().requires_grad_() for n, t in layers().items()}
        results.append(torch.autograd.grad(function(name, tensors), list(tensors.values())))
    torch.testing.assert_close(*results)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece has more rows than were asked for, forward or backward; a mask's rows are left out of the products."""
    seen: list[int] = []

    def note(op: Callable[..., Any], place: int) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            seen.append(len(arguments[place]))
            return op(*arguments)

        return noted

    monkeypatch.setattr(ops, "eager_divergence_forward", note(ops.eager_divergence_forward, 0))
    monkeypatch.setattr(ops, "eager_divergence_backward", note(ops.eager_divergence_backward, 1))
    value_and_grads(pieces, "kl", layers())
    assert max(seen) <= 7
    assert sum(seen) == 3 * ROWS
    seen.clear()
    tensors = layers(classes=2000)
    value_and_grads(pieces, "kl", tensors, mask=MASK)
    assert sum(seen) == 3 * int(MASK.sum())


def test_a_budget_holds_the_logits_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a piece: the student's, the teacher's, and in the backward a gradient."""
    rows: list[int] = []
    forward = ops.eager_divergence_forward
    monkeypatch.setattr(ops, "eager_divergence_forward", lambda x, *rest: rows.append(len(x)) or forward(x, *rest))
    value_and_grads(pieces, "kl", layers(), chunk_rows=None, chunk_bytes=12 * CLASSES * 4)
    assert rows == [6] * (ROWS // 6) + [4] * (ROWS // 4)


def test_small_logits_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(linear_divergence, "linear_divergence", refuse)
    pieces("kl", layers(), chunk_rows=None)
    with pytest.raises(AssertionError):
        pieces("kl", layers())


@EACH_LOSS
def test_derivatives(name: str) -> None:
    tensors = layers(torch.float64, rows=5, classes=4)
    teacher = {n: t for n, t in tensors.items() if n not in STUDENT}

    def loss(*student: Tensor) -> Tensor:
        return pieces(name, {**dict(zip(STUDENT, student, strict=True)), **teacher}, reduction="none", chunk_rows=2)

    of = [tensors[n].requires_grad_() for n in STUDENT]
    assert gradcheck(loss, of, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, of)
    student = [t.detach() for t in of]
    expected = torch.autograd.grad(loss(*of).sum(), of)
    torch.testing.assert_close(grad(lambda *s: loss(*s).sum(), (0, 1, 2))(*student), expected)
    tangents = jvp(loss, tuple(student), tuple(t.cos() for t in student))[1]
    torch.testing.assert_close(tangents.sum(), sum((t.cos() * g).sum() for t, g in zip(student, expected, strict=True)))
    batch = vmap(lambda x: loss(x, *student[1:]))(torch.stack([student[0], 2 * student[0]]))
    torch.testing.assert_close(batch[1], loss(2 * student[0], *student[1:]))


@EACH_LOSS
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(name: str, dynamic: bool) -> None:
    compiled = torch.compile(pieces, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (ROWS, ROWS + 5):
        tensors, mask = layers(rows=rows), torch.arange(rows) % 3 != 1
        results, expected = (value_and_grads(f, name, tensors, mask=mask) for f in (compiled, pieces))
        torch.testing.assert_close(results, expected)


class Model(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher, self.name = torch.nn.Linear(6, CLASSES), torch.nn.Linear(9, CLASSES), name
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        student = {"input": x, "linear_weight": self.student.weight, "linear_bias": self.student.bias}
        teacher = {"target_linear_weight": self.teacher.weight, "target_linear_bias": self.teacher.bias}
        return pieces(self.name, {**student, "target_input": y, **teacher}, mask=mask)


@EACH_LOSS
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_exported_program_trains(name: str, strict: bool) -> None:
    model = Model(name)

    def arguments(rows: int) -> tuple[Tensor, ...]:
        tensors = layers(rows=rows)
        return tensors["input"], tensors["target_input"], torch.arange(rows) % 3 != 1

    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(model, arguments(ROWS), dynamic_shapes=(rows, rows, rows), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for count in (ROWS, 100):
        results = []
        for module in (exported, model):
            of = dict(module.named_parameters())
            sought = [of["student.weight"], of["student.bias"]]
            results.append(torch.autograd.grad(module(*arguments(count)), sought))
        torch.testing.assert_close(*results)


@EACH_LOSS
def test_small_calls_and_other_graphs(name: str) -> None:
    """By rule small logits are whole; checkpoints, autocast, no_grad and meta tensors."""
    tensors = layers()
    expected = value_and_grads(pieces, name, tensors)
    torch.testing.assert_close(value_and_grads(pieces, name, tensors, chunk_rows=None), expected)
    of = {n: t.clone().requires_grad_(n in STUDENT) for n, t in tensors.items()}
    loss = checkpoint(pieces, name, of, use_reentrant=False)
    grads = torch.autograd.grad(loss, [of[n] for n in STUDENT], torch.full_like(loss, 0.5))
    torch.testing.assert_close(list(grads), expected[1:])
    with torch.no_grad():
        assert_bitwise_equal(pieces(name, of), expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = pieces(name, of)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.detach(), expected[0], rtol=0.05, atol=0.05)
    meta = pieces(name, {n: t.to("meta") for n, t in tensors.items()}, reduction="none")
    assert meta.shape == (ROWS,)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"input": torch.zeros(4, 5, 6)}, "input, linear_weight: expected two dimensions each"),
        ({"target_input": torch.zeros(ROWS + 1, 9)}, r"target_input: expected 24 rows as the input's, got 25"),
        ({"target_linear_weight": torch.zeros(5, 9), "target_linear_bias": torch.zeros(5)}, "expected 13 classes"),
        ({"linear_weight": torch.zeros(13, 7)}, "linear_weight: expected a last dimension of 6"),
        ({"target_linear_bias": torch.zeros(4)}, "target_linear_bias: expected shape"),
        ({"target_linear_weight": torch.zeros(13, 9).double()}, "target_linear_weight: expected the input's dtype"),
        ({"input": None}, "input: expected a Tensor"),
    ],
)
def test_errors(changed: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=words):
        ours.linear_kl_div(**{**layers(), **changed})


def test_errors_of_options() -> None:
    for options, words in (
        ({"temperature": 0}, "temperature: expected a positive number"),
        ({"mask": torch.ones(ROWS)}, "mask: expected a bool tensor"),
        ({"reverse": 1}, "reverse: expected a bool"),
        ({"chunk_rows": 0}, "chunk_rows: expected at least 1"),
        ({"dtype": torch.int64}, "dtype: expected a floating point dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            ours.linear_kl_div(**layers(), **options)
    with pytest.raises(ValueError, match="beta: expected a number"):
        ours.linear_js_div(**layers(), beta=2)
