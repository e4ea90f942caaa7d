"""Cross entropy with torchce's own options in every kind of graph: eager's numbers, and every gradient."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import cases
import composed
import pytest
import torch
from comparison import assert_bitwise_equal
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import torchce
import torchce.functional as ours

KINDS = ["index", "probability"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def target_of(kind: str, rows: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    target = cases.softmax_target(kind, (rows, 5), dtype, "cpu")
    if kind == "index":
        target[1] = -100
    return target


def of_everything(loss: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """A number made of all that ``loss`` gives of logits, target, sample_weight, divisor and logit_scale."""
    weight = cases.uniform([5], dtype, "cpu") + 0.5

    def number(x: Tensor, y: Tensor, v: Tensor, d: Tensor | None = None, scale: float | Tensor = 0.7) -> Tensor:
        out = loss(
            x,
            y,
            weight,
            label_smoothing=0.1,
            z_loss=0.1,
            softcap=5.0,
            logit_scale=scale,
            sample_weight=v,
            divisor=d,
            dtype=dtype,
            return_lse=True,
            return_predictions=True,
            return_z_loss=True,
            return_entropy=True,
        )
        of_rows = out.lse.sin() + out.predictions * v + out.entropy.square()
        return out.loss * 2 + out.z_loss + of_rows.sum()

    return number


def composed_output(*args: Any, **options: Any) -> Any:
    input = args[0]
    options = {name: value for name, value in options.items() if not name.startswith("return_")}
    plain = composed.cross_entropy(*args, **{**options, "z_loss": 0.0})
    loss = composed.cross_entropy(*args, **options)
    values = composed.transformed(input, options["softcap"], options["logit_scale"])
    z_loss = (loss - plain).detach()
    return torchce.CrossEntropyOutput(loss, values.logsumexp(1), input.argmax(1), z_loss, composed.entropy(values, 1))


def inputs(kind: str, rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x = cases.normal((rows, 5), dtype, "cpu", scale=3)
    v, d, scale = cases.uniform([rows], dtype, "cpu", seed=5), torch.tensor(2.5), torch.tensor(0.7)
    return x, target_of(kind, rows, dtype), v, d.to(dtype), scale.to(dtype)


def value_and_grads(function: Callable[..., Tensor], kind: str, rows: int = 6) -> list[Tensor]:
    x, y, v, d, scale = (t.clone() for t in inputs(kind, rows))
    leaves = [t.requires_grad_() for t in (x, v, d, scale, *([y] if y.is_floating_point() else []))]
    value = function(x, y, v, d, scale)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("kind", KINDS)
def test_eager(kind: str) -> None:
    results = value_and_grads(of_everything(ours.cross_entropy), kind)
    torch.testing.assert_close(results, value_and_grads(of_everything(composed_output), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_eager_with_a_number_for_scale(kind: str) -> None:
    """Which the kernels apply."""
    x, y, v, d, _ = inputs(kind)
    x.requires_grad_()
    results = [of_everything(f)(x, y, v, d) for f in (ours.cross_entropy, composed_output)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result, x) for result in results))


@pytest.mark.parametrize(
    ("kind", "backend", "dynamic"),
    [
        *((kind, "aot_eager", dynamic) for kind in KINDS for dynamic in (False, True)),
        ("index", "inductor", True),  # half a minute of a compiler's
    ],
)
def test_compile(kind: str, backend: str, dynamic: bool) -> None:
    function = of_everything(ours.cross_entropy)
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (6, 7):
        results, expected = (value_and_grads(f, kind, rows) for f in (compiled, function))
        torch.testing.assert_close(results, expected)


def test_no_recompile_when_a_tensor_option_changes() -> None:
    counter = CompileCounter()
    compiled = torch.compile(of_everything(ours.cross_entropy), fullgraph=True, backend=counter)
    x, y, v, d, scale = inputs("index")
    for factor in (1, 2, 3):
        compiled(x, y, factor * v, factor * d, factor * scale)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "options",
    [
        {"z_loss": 0.1},
        {"softcap": 5.0},
        {"logit_scale": 0.7},
        {"empty_value": 0.0},
        {"ignore_index": (1, -100)},
        {"divisor": 3},
    ],
    ids=str,
)
def test_compile_with_each_option(options: dict[str, Any]) -> None:
    x, y, *_ = inputs("index")

    def loss(x: Tensor) -> Tensor:
        return ours.cross_entropy(x, y, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(x), loss(x))
    results = [torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)[0] for f in (compiled, loss)]
    assert_bitwise_equal(*results)


class Model(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.function = torch.nn.Linear(5, 5), function

    def forward(self, x: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
        return self.function(self.net(x), y, *rest)


def through_a_file(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_trains(kind: str, strict: bool, scaled: bool) -> None:
    """Its parameters' gradients, and those of sample_weight and of a divisor and scale that are tensors."""
    model = Model(of_everything(ours.cross_entropy))
    x, y, *rest = inputs(kind)
    rest = rest if scaled else rest[:-1]
    program = torch.export.export(model, (x, y, *rest), strict=strict)
    exported = (through_a_file(program) if scaled else program).module()

    def gradients(module: torch.nn.Module) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in rest]
        return torch.autograd.grad(module(x, y, *leaves), [*module.parameters(), *leaves])

    for result, expected in zip(gradients(exported), gradients(model), strict=True):
        assert_bitwise_equal(result, expected)


# What each transform is asked for, of f, the number of everything, at x, with the other arguments.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, *rest: grad(f)(x, *rest),
    "grad_sample_weight": lambda f, x, y, v, d, s: grad(lambda v: f(x, y, v, d))(v),
    "grad_scale": lambda f, x, y, v, d, s: grad(lambda s: f(x, y, v, d, s))(s),
    "number_for_scale": lambda f, x, y, v, d, s: hessian(lambda x: f(x, y, v, d))(x),
    "vjp": lambda f, x, *rest: vjp(lambda x: f(x, *rest), x)[1](torch.tensor(2.0, dtype=x.dtype)),
    "jvp": lambda f, x, y, v, d, s: jvp(lambda x, v: f(x, y, v, d, s), (x, v), (x.cos(), v.sin())),
    "jacrev": lambda f, x, *rest: jacrev(f)(x, *rest),
    "jacfwd": lambda f, x, *rest: jacfwd(f)(x, *rest),
    "hessian": lambda f, x, *rest: hessian(f)(x, *rest),
    "vmap": lambda f, x, y, v, d, s: vmap(lambda x, v: f(x, y, v, d, s))(
        torch.stack([x, 2 * x]), torch.stack([v, 3 * v])
    ),
    "per_sample": lambda f, x, y, v, d, s: vmap(
        grad(lambda x, y, v: f(x[None], y[None], v[None], d, s)), in_dims=(0, 0, 0)
    )(x, y, v),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_func(name: str, kind: str) -> None:
    arguments = inputs(kind, dtype=torch.float64)
    results = [
        TRANSFORMS[name](of_everything(f, torch.float64), *arguments) for f in (ours.cross_entropy, composed_output)
    ]
    torch.testing.assert_close(*results)


def test_func_of_outputs_with_a_row_that_has_none() -> None:
    """An ignored row of NaN has the gradient 0 in a transform, as a kernel gives it."""
    x, y, *_ = inputs("index")
    x[1] = torch.nan

    def loss(x: Tensor) -> Tensor:
        out = ours.cross_entropy(x, y, return_lse=True, return_entropy=True)
        return out.loss + out.lse[2:].sum() + out.entropy.sin().sum()

    leaf = x.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(x), result)
    assert (result[1] == 0).all()


INF, LEAST = torch.inf, torch.finfo(torch.float32).min


@pytest.mark.parametrize("output", ["loss", "lse", "entropy"])
@pytest.mark.parametrize(
    "row",
    [[-INF, 1.0, 2.0], [0.0, -INF, 2.0], [0.0, 1.0, LEAST], [1e8, 1e8, 0.0], [-INF] * 3, [0.0, INF, 1.0]],
    ids=str,
)
def test_func_as_eager_at_the_ends(row: list[float], output: str) -> None:
    """Masked classes with and without a part in the loss, large values, rows without a softmax."""
    x, y, scale = torch.tensor([row, [0.0, 1, 2]]), torch.tensor([0, 1]), torch.tensor(0.25)

    def number(x: Tensor, scale: Tensor | None = None) -> Tensor:
        out = ours.cross_entropy(x, y, logit_scale=scale, reduction="sum", return_lse=True, return_entropy=True)
        return 2 * getattr(out, output).sum()

    leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
    expected = torch.autograd.grad(number(*leaves), leaves)
    for results in (
        grad(number, (0, 1))(x, scale),
        torch.autograd.grad(number(*leaves), leaves, create_graph=True),
    ):
        torch.testing.assert_close(results[0], expected[0], equal_nan=True)
        if 1e8 not in row:  # torch adds up the scale's over all rows, and loses the second one's beside that
            torch.testing.assert_close(results[1], expected[1], equal_nan=True)
    if LEAST in row:  # without a scale, whose derivative overflows
        (first,) = torch.autograd.grad(number(leaves[0]), leaves[0], create_graph=True)
        assert torch.autograd.grad(first.sin().sum(), leaves[0])[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str) -> None:
    x, y, v, d, scale = inputs(kind, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, v, d, scale, *([y] if y.is_floating_point() else []))]
    results = []
    for f in (ours.cross_entropy, composed_output):
        first = torch.autograd.grad(of_everything(f, torch.float64)(x, y, v, d, scale), leaves, create_graph=True)
        results.append((first, torch.autograd.grad(sum(t.sin().sum() for t in first), leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place(kind: str) -> None:
    """Bit for bit the gradient of the other road, and refused a second time."""
    x, y, v, d, scale = inputs(kind)
    scale.requires_grad_()

    def run(inplace_backward: bool) -> tuple[Any, tuple[Tensor, ...]]:
        leaf = x.clone().requires_grad_()
        out = ours.cross_entropy(
            cases.activation(leaf),
            y,
            z_loss=0.1,
            softcap=5.0,
            sample_weight=v,
            logit_scale=scale,
            divisor=d,
            return_lse=True,
            return_entropy=True,
            inplace_backward=inplace_backward,
        )
        grads = torch.autograd.grad(out.loss + out.lse.sum() + out.entropy.sum(), [leaf, scale], retain_graph=True)
        return out, grads

    (_, expected), (out, results) = run(False), run(True)
    for result, wanted in zip(results, expected, strict=True):
        assert_bitwise_equal(result, wanted)
    with pytest.raises(RuntimeError, match="second backward"):
        out.lse.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.dtype_id)
def test_autocast(dtype: torch.dtype) -> None:
    """The loss in float32 as torch's, or as asked; lse is of the 16-bit logits."""
    x, y, v, *_ = inputs("index")
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours.cross_entropy(x, y, z_loss=0.1, sample_weight=v, return_lse=True)
        assert ours.cross_entropy(x, y, dtype=torch.float16).dtype == torch.float16
    assert out.loss.dtype == out.lse.dtype == torch.float32
    expected = ours.cross_entropy(x, y, z_loss=0.1, sample_weight=v, return_lse=True, dtype=torch.float32)
    assert_bitwise_equal(out.loss, expected.loss)
    assert_bitwise_equal(*(torch.autograd.grad(o.loss + o.lse.sum(), x)[0] for o in (out, expected)))


def test_autocast_with_probabilities() -> None:
    """In float32, of logits of 16 bits that are read as they are."""
    x, y, v, _, scale = inputs("probability")
    options = {"z_loss": 0.1, "softcap": 5.0, "logit_scale": scale, "sample_weight": v, "return_entropy": True}
    results = []
    for enabled in (True, False):
        leaves = [x.bfloat16().requires_grad_(), y.clone().requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = ours.cross_entropy(*leaves, dtype=None if enabled else torch.float32, **options)
        results.append([out.loss, out.entropy, *torch.autograd.grad(out.loss + out.entropy.sum(), leaves)])
    for result, expected in zip(*results, strict=True):
        assert_bitwise_equal(result, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any]) -> None:
    x, y, v, d, _ = inputs("index")
    expected = of_everything(ours.cross_entropy)(x.clone().requires_grad_(), y, v, d)
    with context():
        assert_bitwise_equal(of_everything(ours.cross_entropy)(x.clone().requires_grad_(), y, v, d), expected.detach())


def test_checkpoint() -> None:
    function = of_everything(ours.cross_entropy)
    results = value_and_grads(lambda *a: checkpoint(function, *a, use_reentrant=False), "index")
    for result, expected in zip(results, value_and_grads(function, "index"), strict=True):
        assert_bitwise_equal(result, expected)


def test_subclass_and_mode_see_the_options() -> None:
    """A handler is given the options; it answers by the function it was asked for."""
    seen: list[dict[str, Any]] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "cross_entropy":
                seen.append(dict(kwargs or {}))
            return func(*args, **(kwargs or {}))

    results: list[Any] = []

    x, y, v, *_ = inputs("index")
    expected = ours.cross_entropy(x, y, z_loss=0.1, sample_weight=v, return_lse=True)
    with Mode():
        out = ours.cross_entropy(x, y, z_loss=0.1, sample_weight=v, return_lse=True)
    assert_bitwise_equal(out.loss, expected.loss)
    assert_bitwise_equal(out.lse, expected.lse)
    assert {"z_loss", "sample_weight", "return_lse"} <= set(seen[0])

    class Subclass(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results.append(super().__torch_function__(func, types, args, kwargs or {}))
            return results[-1]

    loss = ours.cross_entropy(x.as_subclass(Subclass), y, z_loss=0.1, ignore_index=(1, -100))
    assert_bitwise_equal(loss.as_subclass(Tensor), ours.cross_entropy(x, y, z_loss=0.1, ignore_index=(1, -100)))
    out = ours.cross_entropy(x.as_subclass(Subclass), y, z_loss=0.1, sample_weight=v, return_lse=True)
    assert type(out) is torchce.CrossEntropyOutput
    assert type(out.loss) is type(out.lse) is Subclass
    assert results[-1] is out
    assert_bitwise_equal(out.lse.as_subclass(Tensor), expected.lse)
    loss = ours.cross_entropy(x.as_subclass(Subclass), y, ignore_index=(1, -100))
    assert_bitwise_equal(loss.as_subclass(Tensor), ours.cross_entropy(x, y, ignore_index=(1, -100)))


def test_patched_torch_takes_them() -> None:
    """What torch's own function would refuse."""
    x, y, v, *_ = inputs("index")
    with torchce.patch_torch():
        loss = torch.nn.functional.cross_entropy(x, y, z_loss=0.1, sample_weight=v)
    assert_bitwise_equal(loss, ours.cross_entropy(x, y, z_loss=0.1, sample_weight=v))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graph", ["compile", "export", "strict", "make_fx"])
@pytest.mark.parametrize("output", ["lse", "entropy"])
def test_gradient_of_an_output_without_another_option(output: str, graph: str, kind: str) -> None:
    """A graph drops the arguments that are defaults, which then look like a plain loss's."""
    x, y, *_ = inputs(kind)

    class Loss(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = ours.cross_entropy(x, y, **{f"return_{output}": True})
            return out.loss + getattr(out, output).square().sum()

    if graph == "compile":
        function: Callable[..., Tensor] = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    elif graph == "make_fx":
        function = make_fx(Loss())(x)
    else:
        function = torch.export.export(Loss(), (x,), strict=graph == "strict").module()
    leaf = x.clone().requires_grad_()
    results = [torch.autograd.grad(f(leaf), leaf)[0] for f in (function, Loss())]
    assert_bitwise_equal(*results)


@pytest.mark.parametrize("rows", [5, 20_000])
def test_export_for_any_number_of_rows(rows: int) -> None:
    """No size is a guard; the output comes back as one, from a file too."""
    x, y, v, *_ = inputs("index", 40)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            returned = {"return_lse": True, "return_z_loss": True, "return_entropy": True}
            self.loss = torchce.CrossEntropyLoss(z_loss=0.1, empty_value=0.0, **returned)

        def forward(self, x: Tensor, y: Tensor, v: Tensor) -> torchce.CrossEntropyOutput:
            return self.loss(x, y, sample_weight=v)

    dynamic = {name: {0: torch.export.Dim("rows")} for name in ("x", "y", "v")}
    program = through_a_file(torch.export.export(Loss(), (x, y, v), dynamic_shapes=dynamic))
    x, y, v, *_ = inputs("index", rows)
    for result, expected in zip(program.module()(x, y, v), Loss()(x, y, v), strict=True):
        assert (result is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(result, expected)


def test_no_recompile_when_only_the_rows_change() -> None:
    counter = CompileCounter()
    compiled = torch.compile(of_everything(ours.cross_entropy), fullgraph=True, backend=counter, dynamic=True)
    for rows in (100, 200, 20_000, 50):
        compiled(*inputs("index", rows))
    assert counter.frame_count == 1


def test_a_compiled_module() -> None:
    x, y, v, _, scale = inputs("index")
    loss = torchce.CrossEntropyLoss(
        z_loss=0.1, softcap=5.0, logit_scale=torch.nn.Parameter(scale), dtype=torch.float64, return_lse=True
    )
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(x, y, sample_weight=v), loss(x, y, sample_weight=v), strict=True):
        if expected is not None:
            torch.testing.assert_close(result, expected)


def test_jit_trace() -> None:
    x, y, v, *_ = inputs("index")

    def loss(x: Tensor) -> Tensor:
        out = ours.cross_entropy(x, y, z_loss=0.1, softcap=5.0, sample_weight=v, return_lse=True)
        return out.loss + out.lse.sum()

    torch.testing.assert_close(torch.jit.trace(loss, (x,))(2 * x), loss(2 * x))


def test_no_device_is_waited_for() -> None:
    """Fake tensors have no values to ask for."""
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        arguments = [mode.from_tensor(t) for t in inputs("index")]
        assert of_everything(ours.cross_entropy)(*arguments).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
@pytest.mark.parametrize("shape", [(6, 100), (2, 19, 7, 5)], ids=str)
def test_in_place_of_lse_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of strided classes and 16 bits, too."""
    x, y = (
        cases.normal(shape, dtype, "cpu", scale=3),
        cases.indices(cases.index_shape(shape), shape[1], torch.int64, "cpu"),
    )
    grads = []
    for inplace_backward in (False, True):
        leaf = x.clone().requires_grad_()
        out = ours.cross_entropy(
            cases.activation(leaf), y, softcap=5.0, return_lse=True, inplace_backward=inplace_backward
        )
        out.lse.sum().backward()
        grads.append(leaf.grad)
    assert_bitwise_equal(*grads)


def test_functional_call_with_a_module() -> None:
    x, y, v, *_ = inputs("index")
    module = torchce.CrossEntropyLoss(torch.ones(5), z_loss=0.1)
    weight = cases.uniform([5], torch.float32, "cpu")
    result = functional_call(module, {"weight": weight}, (x, y), {"sample_weight": v})
    assert_bitwise_equal(result, ours.cross_entropy(x, y, weight, z_loss=0.1, sample_weight=v))
