"""Divergences and entropies in every kind of graph: eager's numbers, and every gradient."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import divergences
import pytest
import torch
from comparison import assert_bitwise_equal
from divergences import BINARY_KINDS, KINDS, Kind, operands
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import torchce
import torchce.functional as ours
from torchce.divergence_formulas import decomposition

EACH_KIND = pytest.mark.parametrize("kind", [*KINDS.values(), *BINARY_KINDS.values()], ids=lambda kind: kind.name)
EACH_OF_ROWS = pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
SHAPE = (6, 5)
CODES = {
    name: {"kl": 0, "reverse_kl": 1, "js": 2, "entropy": 3}[name.removesuffix("_probabilities").removesuffix("_beta")]
    for name in KINDS
}
MASK = torch.tensor([True, False, True, True, False, True])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def number_of(kind: Kind, function: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """A number made of a row's losses, with every option, of what tensors the kind has."""

    def number(input: Tensor, target: Tensor | None = None, mask: Tensor | None = MASK) -> Tensor:
        of_function = kind if function is None else lambda x, t, **options: function(kind, x, t, **options)
        rows = of_function(input, target, reduction="none", temperature=1.7, mask=mask)
        return rows.sin().sum() + of_function(input, target, mask=mask)

    return number


def tensors_of(
    kind: Kind, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, scale: float = 3.0
) -> tuple[Tensor, ...]:
    return tuple(t for t in operands(kind, shape, dtype, scale=scale) if t is not None)


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in tensors)


def value_and_grads(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    of = leaves(tensors)
    value = function(*of)
    return [value.detach(), *torch.autograd.grad(value, of)]


def assert_same_bits(results: Any, expected: Any) -> None:
    for result, wanted in zip(results, expected, strict=True):
        assert_bitwise_equal(result, wanted)


# --- derivatives -----------------------------------------------------------------------------------------------------


@EACH_KIND
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 2), (2, 203)], ids=str)
def test_gradcheck(kind: Kind, shape: tuple[int, ...]) -> None:
    """First derivatives, in forward mode and batched too; second ones of small problems."""
    of = leaves(tensors_of(kind, shape, torch.float64, scale=1.0))  # no probability as small as a step
    mask = None if len(shape) == 1 else cases.uniform(cases.index_shape(shape), torch.float32, "cpu", seed=3) < 0.7

    def loss(*tensors: Tensor) -> Tensor:
        return kind(*tensors, reduction="none", temperature=1.3, mask=mask)

    small = shape[-1] < 100
    assert gradcheck(loss, of, check_forward_ad=small, check_batched_grad=small, fast_mode=not small)
    if small:
        assert gradgradcheck(loss, of, check_batched_grad=True)


@EACH_KIND
def test_second_derivatives_are_those_of_the_composition(kind: Kind) -> None:
    results = []
    for function in (None, divergences.composed):
        of = leaves(tensors_of(kind, dtype=torch.float64))
        first = torch.autograd.grad(number_of(kind, function)(*of), of, create_graph=True)
        results.append((first, torch.autograd.grad(sum(t.sin().sum() for t in first), of)))
    torch.testing.assert_close(*results)


@EACH_KIND
def test_only_what_requires_grad_has_one(kind: Kind) -> None:
    """The gradient of one operand has the same bits, whether the other has one or not."""
    for shape in (SHAPE, (3, 300)):
        tensors = tensors_of(kind, shape)
        both = value_and_grads(kind, tensors)[1:]
        for number, expected in enumerate(both):
            of = [t.clone().requires_grad_(n == number) for n, t in enumerate(tensors)]
            kind(*of).backward()
            for n, t in enumerate(of):
                assert (t.grad is None) == (n != number)
            assert_bitwise_equal(of[number].grad, expected)


@EACH_KIND
def test_backward_twice_gives_the_same(kind: Kind) -> None:
    of = leaves(tensors_of(kind))
    loss = kind(*of)
    assert_same_bits(torch.autograd.grad(loss, of, retain_graph=True), torch.autograd.grad(loss, of))


@EACH_KIND
def test_an_operand_that_was_changed_is_refused(kind: Kind) -> None:
    of = leaves(tensors_of(kind))
    x = of[0] * 1
    loss = kind(x, *of[1:])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EACH_KIND
def test_batched_gradients(kind: Kind) -> None:
    of = leaves(tensors_of(kind))
    rows = kind(*of, reduction="none")
    upstream = cases.normal((3, *rows.shape), torch.float32, "cpu", seed=8)
    batched = torch.autograd.grad(rows, of, upstream, is_grads_batched=True, retain_graph=True)
    for number, one in enumerate(upstream):
        expected = torch.autograd.grad(rows, of, one, retain_graph=True)
        assert_same_bits([t[number] for t in batched], expected)


# --- torch.func ------------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, *t: grad(f, tuple(range(len(t))))(*t),
    "vjp": lambda f, *t: vjp(f, *t)[1](torch.tensor(2.0, dtype=t[0].dtype)),
    "jvp": lambda f, *t: jvp(f, t, tuple(x.cos() for x in t)),
    "jacrev": lambda f, *t: jacrev(f)(*t),
    "jacfwd": lambda f, *t: jacfwd(f)(*t),
    "hessian": lambda f, *t: hessian(f)(*t),
    "vmap": lambda f, *t: vmap(f)(*(torch.stack([x, x.flip(0)]) for x in t)),
    "per_sample": lambda f, *t: vmap(grad(lambda *row: f(*(x[None] for x in row), mask=None)))(*t),
}


@EACH_KIND
@pytest.mark.parametrize("name", TRANSFORMS)
def test_func(name: str, kind: Kind) -> None:
    tensors = tensors_of(kind, dtype=torch.float64)
    results = [TRANSFORMS[name](number_of(kind, f), *tensors) for f in (None, divergences.composed)]
    torch.testing.assert_close(*results)


@EACH_OF_ROWS
def test_func_as_eager_at_the_ends(kind: Kind) -> None:
    """Masked classes, rows that are left out and hold NaN: the composite gives what the kernels give."""
    inf, lowest = torch.inf, torch.finfo(torch.float32).min
    x = torch.tensor([[0.0, -inf, 2], [0, 1, lowest], [1e4, -1e4, 0], [torch.nan] * 3])
    y = torch.tensor([[1.0, -inf, -1], [3, 1, lowest], [0, 1e4, 9e3], [torch.nan] * 3])
    mask = torch.tensor([True, True, True, False])
    if kind.has_target and not kind.options.get("target_logits"):
        y = torch.tensor([[0.25, 0, 0.75], [0.5, 0.5, 0], [0.1, 0.9, 1e-20], [torch.nan] * 3])
        x[0, 1] = -40  # by a probability that is 0 as the other one is, there is no derivative
    if kind.name == "reverse_kl_probabilities":
        y = y.clamp_min(1e-20)  # from what excludes a class it is infinite
    tensors = (x, y) if kind.has_target else (x,)

    def loss(*t: Tensor) -> Tensor:
        return kind(*t, reduction="sum", mask=mask)

    of = leaves(tensors)
    expected = torch.autograd.grad(loss(*of), of)
    torch.testing.assert_close(loss(*of).detach(), vmap(lambda *t: loss(*t))(*(t[None] for t in tensors))[0])
    for results in (
        grad(loss, tuple(range(len(tensors))))(*tensors),
        torch.autograd.grad(loss(*of), of, create_graph=True),
    ):
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)
    assert bool((expected[0][3] == 0).all())


@pytest.mark.parametrize("kind", [KINDS["kl"], KINDS["reverse_kl"]], ids=lambda kind: kind.name)
@pytest.mark.parametrize("classes", [4, 300])
def test_gradients_of_an_infinite_divergence(kind: Kind, classes: int) -> None:
    """No NaN, and the same from kernels and formulas: huge, where that of the second distribution is as ever."""
    x, y = tensors_of(kind, (3, classes))
    excludes, other = (x, y) if kind.name == "kl" else (y, x)
    excludes[:, 1] = -torch.inf
    other[1, 2] = other[2, 1] = -200.0  # a probability that float32 rounds to 0
    of = leaves((x, y))
    loss = kind(*of, reduction="sum")
    assert loss == torch.inf
    results, formulas = (torch.autograd.grad(loss, of, retain_graph=True, create_graph=c) for c in (False, True))
    for result, formula in zip(results, formulas, strict=True):
        assert not result.isnan().any()
        huge = result.abs() > 1e30
        assert torch.equal(huge, formula.abs() > 1e30)
        assert torch.equal(result.sign()[huge], formula.detach().sign()[huge])
        torch.testing.assert_close(result[~huge], formula.detach()[~huge])
    number = 0 if kind.name == "kl" else 1  # the second distribution's, which torch.func has too
    of_second = grad(lambda t: kind(*((t, y) if number == 0 else (x, t)), reduction="sum"))((x, y)[number])
    torch.testing.assert_close(of_second, results[number])


JS_ENDS = {
    "nearly excluded by both": ([0.0, -95, -90], [0.0, -90, -95], True),
    "excluded by the teacher": ([1.0, 2, 0], [1.0, -torch.inf, 2], True),
    "excluded by the student": ([1.0, -torch.inf, 0], [1.0, 0, 2], True),
    "excluded by both": ([1.0, 2, -torch.inf], [1.0, 3, -torch.inf], True),
    "certain probabilities": ([0.0, 5.5, 110], [1.0, 0, 0], False),
}


@pytest.mark.parametrize("beta", [0.5, 1e-6, 1 - 1e-6])
@pytest.mark.parametrize("name", JS_ENDS)
def test_mixtures_of_excluded_classes(name: str, beta: float) -> None:
    """Their first derivatives are the kernel's in every graph, their second ones those of float64."""
    student, teacher, has_logits = JS_ENDS[name]
    x, t = torch.tensor([student]), torch.tensor([teacher])

    def loss(x: Tensor) -> Tensor:
        return ours.js_div_with_logits(x, t.to(x.dtype), target_logits=has_logits, beta=beta)

    def second(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    (of,) = leaves((x,))
    (expected,) = torch.autograd.grad(loss(of), of)
    torch.testing.assert_close(loss(x), vmap(loss)(x[None])[0], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(grad(loss)(x), expected, rtol=1e-5, atol=1e-9)
    wide = second(x.double().requires_grad_())
    assert not wide.isnan().any()
    torch.testing.assert_close(second(of).double(), wide, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(grad(lambda x: grad(loss)(x).square().sum())(x), second(of), rtol=1e-4, atol=1e-9)


@EACH_KIND
def test_forward_mode(kind: Kind) -> None:
    tensors = tensors_of(kind, dtype=torch.float64)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()) for t in tensors]
        tangents = [forward_ad.unpack_dual(number_of(kind, f)(*duals)).tangent for f in (None, divergences.composed)]
    torch.testing.assert_close(*tangents)


# --- compiled, exported, traced --------------------------------------------------------------------------------------


@EACH_KIND
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(kind: Kind, dynamic: bool) -> None:
    function = number_of(kind)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 7):
        mask = torch.arange(rows) % 3 != 1
        tensors = tensors_of(kind, (rows, 5))
        results, expected = (
            value_and_grads(lambda *t, f=f, mask=mask: f(*t, mask=mask), tensors) for f in (compiled, function)
        )
        torch.testing.assert_close(results, expected)


def test_compile_with_inductor() -> None:
    def everything(x: Tensor, y: Tensor) -> Tensor:
        of_teacher = ours.kl_div_with_logits(x, y, target_logits=True, temperature=2.0)
        return of_teacher + ours.js_div_with_logits(x, y.softmax(1), "sum") - ours.entropy_with_logits(x)

    tensors = tensors_of(KINDS["kl"], (6, 5))
    compiled = torch.compile(everything, fullgraph=True)
    torch.testing.assert_close(*(value_and_grads(f, tensors) for f in (compiled, everything)))


def test_no_recompile_when_only_the_rows_change() -> None:
    counter = CompileCounter()
    compiled = torch.compile(number_of(KINDS["kl"]), fullgraph=True, backend=counter, dynamic=True)
    for rows in (100, 200, 20_000, 50):
        compiled(*tensors_of(KINDS["kl"], (rows, 5)), torch.ones(rows, dtype=torch.bool))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["kl", "js_probabilities", "entropy", "binary_kl"])
def test_data_dependent_rows(name: str) -> None:
    """As many rows as a mask has, which no trace can know."""
    kind = (KINDS | BINARY_KINDS)[name]

    def loss(keep: Tensor, *tensors: Tensor) -> Tensor:
        return kind(*(t[keep] for t in tensors), reduction="none").sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        tensors = tensors_of(kind)
        results, expected = (value_and_grads(lambda *t, f=f: f(MASK, *t), tensors) for f in (compiled, loss))
    torch.testing.assert_close(results, expected)


@EACH_KIND
def test_compiled_autograd(kind: Kind) -> None:
    tensors = tensors_of(kind)
    expected = value_and_grads(kind, tensors)[1:]
    of = leaves(tensors)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        kind(*of).backward()
    assert_same_bits([t.grad for t in of], expected)


class Model(torch.nn.Module):
    """A student and a teacher, of which both learn."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher, self.kind = torch.nn.Linear(5, 7), torch.nn.Linear(5, 7), kind

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.kind.has_target:
            return self.kind(self.student(x), mask=mask, temperature=2.0)
        teacher = self.teacher(x)
        if not self.kind.options.get("target_logits"):
            teacher = teacher.sigmoid() if self.kind.is_binary else teacher.softmax(-1)
        return self.kind(self.student(x), teacher, mask=mask, temperature=2.0)


def gradients_of(module: torch.nn.Module, *arguments: Tensor) -> list[Tensor]:
    parameters = [parameter for _, parameter in sorted(module.named_parameters())]
    return [t for t in torch.autograd.grad(module(*arguments), parameters, allow_unused=True) if t is not None]


@EACH_KIND
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_exported_program_trains(kind: Kind, strict: bool) -> None:
    """With other numbers of rows, and from a file."""
    model = Model(kind)
    arguments = cases.normal((6, 5), torch.float32, "cpu"), MASK
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(model, arguments, dynamic_shapes=(rows, rows), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for module in (program.module(), torch.export.load(file).module()):
        for rows_now in (6, 4000):
            arguments = cases.normal((rows_now, 5), torch.float32, "cpu"), torch.arange(rows_now) % 3 != 1
            results, expected = gradients_of(module, *arguments), gradients_of(model, *arguments)
            assert len(expected) == (4 if kind.has_target else 2)
            assert_same_bits(results, expected)


@EACH_KIND
def test_draft_export(kind: Kind) -> None:
    model = Model(kind)
    arguments = cases.normal((6, 5), torch.float32, "cpu"), MASK
    program = torch.export.draft_export(model, arguments)
    torch.testing.assert_close(program.module()(*arguments), model(*arguments))


@EACH_KIND
def test_make_fx(kind: Kind) -> None:
    """The forward, and a forward with its backward."""
    tensors = tensors_of(kind)
    assert_bitwise_equal(make_fx(kind)(*tensors)(*tensors), kind(*tensors))
    traced = make_fx(lambda *t: value_and_grads(kind, t))(*tensors)
    assert_same_bits(traced(*(t.flip(0) for t in tensors)), value_and_grads(kind, tuple(t.flip(0) for t in tensors)))


@EACH_KIND
def test_traced_backward_has_derivatives(kind: Kind) -> None:
    """The backward op is differentiable by itself: of what was traced once."""
    tensors = tensors_of(kind, dtype=torch.float64)

    def first(*t: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(kind(*t), t, create_graph=True)

    of = leaves(tensors)
    traced = make_fx(first)(*of)
    results = [torch.autograd.grad(sum(t.sin().sum() for t in f(*of)), of) for f in (traced, first)]
    torch.testing.assert_close(*results)


@EACH_OF_ROWS
def test_the_backward_op_is_differentiable(kind: Kind) -> None:
    """By what comes in and by both operands, of the gradients that are asked for, as torch's composition is."""
    ops = torch.ops.torchce
    tensors = tensors_of(kind, (4, 5), torch.float64)
    upstream = cases.normal((4,), torch.float64, "cpu", seed=4)
    has_logits, beta = kind.options.get("target_logits", False), kind.options.get("beta", 0.5)
    options = (CODES[kind.name], 0, has_logits, 1.3, beta)
    _, *saved = ops.divergence_forward(*tensors, *(None,) * (4 - len(tensors)), *options)
    for needs in ((True, False), (True, True), (False, True))[:: 3 if len(tensors) == 1 else 1]:
        second = []
        for by_op in (True, False):
            g, *of = leaves((upstream, *tensors))
            if by_op:
                operands_of_op = (*of, *(None,) * (3 - len(of)))
                found = ops.divergence_backward(g, *operands_of_op, *saved, *needs, *options)
            else:
                rows = divergences.composed(kind, of[0], of[1] if len(of) > 1 else None, "none", temperature=1.3)
                found = torch.autograd.grad(rows, of, g, create_graph=True)
            wanted = [t for t, needed in zip(found, needs, strict=False) if needed]
            second.append(torch.autograd.grad(sum(t.sin().sum() for t in wanted), [g, *of]))
        torch.testing.assert_close(*second)


@EACH_OF_ROWS
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3)], ids=str)
def test_the_decomposition_gives_what_the_op_gives(kind: Kind, shape: tuple[int, ...]) -> None:
    """Statistics too, which a backward takes."""
    tensors = tensors_of(kind, shape)
    options = (CODES[kind.name], 1, kind.options.get("target_logits", False), 1.3, 0.3)
    arguments = (*tensors, *(None,) * (2 - len(tensors)), None, None, *options)
    torch.testing.assert_close(decomposition(*arguments), torch.ops.torchce.divergence_forward(*arguments))


@EACH_KIND
def test_jit_trace(kind: Kind) -> None:
    tensors = tensors_of(kind)
    traced = torch.jit.trace(lambda *t: kind(*t), tensors)
    torch.testing.assert_close(traced(*(t.flip(0) for t in tensors)), kind(*(t.flip(0) for t in tensors)))


def test_scripting_is_refused() -> None:
    for function in {kind.function for kind in (*KINDS.values(), *BINARY_KINDS.values())}:
        with pytest.raises(RuntimeError, match="cannot be scripted"):
            torch.jit.script(function)
    with pytest.raises(RuntimeError, match="cannot be scripted"):
        torch.jit.script(torchce.KLDivWithLogitsLoss())


@EACH_KIND
def test_onnx(kind: Kind, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = Model(kind).eval()
    arguments = cases.normal((6, 5), torch.float32, "cpu"), MASK
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, arguments, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    names = [given.name for given in session.get_inputs()]
    (result,) = session.run(None, {name: t.numpy() for name, t in zip(names, arguments, strict=True)})
    torch.testing.assert_close(torch.as_tensor(result), model(*arguments).detach(), rtol=1e-5, atol=1e-6)


@EACH_OF_ROWS
@pytest.mark.parametrize("shape", [(6, 5), (3, 300), (2, 5, 3), (0, 4)], ids=str)
def test_opcheck(kind: Kind, shape: tuple[int, ...]) -> None:
    """Schema, autograd registration, fake against real, and AOT dispatch with dynamic shapes."""
    input, target = operands(kind, shape)
    ops = torch.ops.torchce
    mask = torch.ones(cases.index_shape(shape), dtype=torch.bool)
    for reduction in (0, 2):
        options = (CODES[kind.name], reduction, kind.options.get("target_logits", False), 1.5, 0.3)
        of = (input.clone().requires_grad_(), None if target is None else target.clone().requires_grad_(), mask)
        torch.library.opcheck(ops.divergence_forward.default, (*of, None, *options))
        loss, *saved = ops.divergence_forward(input, target, mask, None, *options)
        for needs in ((True, target is not None), (True, False)):
            arguments = (torch.ones_like(loss), input, target, mask, *saved, *needs, *options)
            torch.library.opcheck(
                ops.divergence_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
            )


# --- where no gradient is kept, and others have a say ----------------------------------------------------------------


@EACH_KIND
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(kind: Kind, context: Callable[[], Any]) -> None:
    tensors = tensors_of(kind)
    expected = kind(*leaves(tensors)).detach()
    with context():
        assert_bitwise_equal(kind(*leaves(tensors)), expected)


@EACH_KIND
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(kind: Kind, use_reentrant: bool) -> None:
    of = leaves(tensors_of(kind))
    checkpoint(kind, *of, use_reentrant=use_reentrant).backward()
    assert_same_bits([t.grad for t in of], value_and_grads(kind, tensors_of(kind))[1:])


@EACH_KIND
def test_autocast(kind: Kind) -> None:
    """The loss in float32, of 16-bit operands that are read as they are."""
    tensors = tensors_of(kind, dtype=torch.bfloat16)
    results = []
    for enabled in (True, False):
        of = leaves(tensors)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = kind(*of) if enabled else kind(*(t.float() for t in of))
        results.append([loss.detach(), *torch.autograd.grad(loss, of)])
    assert_same_bits(*results)


@EACH_KIND
def test_meta_and_fake(kind: Kind) -> None:
    tensors = tensors_of(kind)
    for reduction in cases.REDUCTIONS:
        expected = kind(*tensors, reduction=reduction)
        meta = kind(*(t.to("meta") for t in tensors), reduction=reduction)
        with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
            fake = kind(*(mode.from_tensor(t) for t in tensors), reduction=reduction)
            on_cuda = kind(*(torch.empty(t.shape, device="cuda") for t in tensors), reduction=reduction)
        for of in (meta, fake, on_cuda):
            assert (of.shape, of.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize(
    "kind", [k for k in (*KINDS.values(), *BINARY_KINDS.values()) if k.has_target], ids=lambda kind: kind.name
)
def test_gradients_of_fake_operands_have_the_real_layout(kind: Kind) -> None:
    """Each that of its own operand."""
    input, target = operands(kind, (6, 5, 3))
    assert target is not None
    for x, t in (
        (input.transpose(1, 2).contiguous().transpose(1, 2), target),
        (input, target.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
    ):
        strides = []
        for is_fake in (False, True):
            with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                of = [(mode.from_tensor(a) if is_fake else a).requires_grad_() for a in (x.clone(), t.clone())]
            with mode if is_fake else torch.enable_grad():
                grads = torch.autograd.grad(kind(*of), of)
            strides.append([grad.stride() for grad in grads])
        assert strides[0] == strides[1]


@EACH_KIND
def test_subclasses_and_modes(kind: Kind) -> None:
    seen: list[dict[str, Any]] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is kind.function:
                seen.append(dict(kwargs or {}))
            return func(*args, **(kwargs or {}))

    class Subclass(Tensor):
        pass

    tensors = tensors_of(kind)
    expected = kind(*tensors, temperature=2.0, mask=MASK)
    with Mode():
        assert_bitwise_equal(kind(*tensors, temperature=2.0, mask=MASK), expected)
    assert seen[0].keys() >= (set() if kind.is_binary else {"temperature", "mask"}) | kind.options.keys()
    result = kind(tensors[0].as_subclass(Subclass), *tensors[1:], temperature=2.0, mask=MASK)
    assert type(result) is Subclass
    assert_bitwise_equal(result.as_subclass(Tensor), expected)


def test_functional_call_and_a_compiled_module() -> None:
    module = torchce.KLDivWithLogitsLoss(target_logits=True, temperature=2.0)
    x, y = tensors_of(KINDS["kl"])
    expected = ours.kl_div_with_logits(x, y, target_logits=True, temperature=2.0, mask=MASK)
    assert_bitwise_equal(functional_call(module, {}, (x, y, MASK)), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(x, y, MASK), expected)


@EACH_KIND
def test_saves_its_operands_and_a_few_numbers_a_row(kind: Kind) -> None:
    """And no probabilities: what autograd keeps is what came in, and up to six numbers for each row."""
    shape = (7, 301)
    saved: list[Tensor] = []
    of = leaves(tensors_of(kind, shape))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kind(*of)
    of_operands = [t for t in saved if t.shape == shape]
    assert {t.data_ptr() for t in of_operands} == {t.data_ptr() for t in of}
    assert sum(t.numel() for t in saved if t.shape != shape) <= 6 * shape[0] + 1
