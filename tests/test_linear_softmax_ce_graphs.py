"""Linear cross entropy in every kind of graph: eager's numbers and every gradient, or one clear error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import cases
import linear_problems as problems
import pytest
import torch
import torch.distributed as dist
from comparison import assert_bitwise_equal
from linear_problems import Layer, fused, unfused
from test_softmax_ce_own_graphs import through_a_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import torchce
import torchce.functional as ours
from torchce import linear_softmax_ce, ops
from torchce.chunked import Chunks
from torchce.linear_softmax_ce import Inputs
from torchce.softmax_ce_formulas import Gradients, Options, Wanted

KINDS = ["index", "probability"]
ROWS = 9


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(kind: str = "index", rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Input, weight, bias, sample_weight, divisor, logit_scale and target."""
    layer = problems.layer(rows, features=4, classes=5, dtype=dtype)
    target = problems.target_for(layer, kind)
    v = cases.uniform([rows], dtype, "cpu", seed=5) + 0.1
    return *layer, v, torch.tensor(2.5, dtype=dtype), torch.tensor(0.7, dtype=dtype), target  # type: ignore[return-value]


Function = Callable[..., Tensor]


def plain(loss: Callable[..., Any], **options: Any) -> Function:
    """Of input, weight and bias alone, a number; the rest is not used."""

    def number(x: Tensor, w: Tensor, b: Tensor, v: Tensor, d: Tensor, s: Tensor, y: Tensor) -> Tensor:
        result: Tensor = loss(Layer(x, w, b), y, **options)
        return 3 * result if result.dim() == 0 else (result * result).sum()

    return number


def of_everything(loss: Callable[..., Any], **options: Any) -> Function:
    """With every option and all that is returned."""

    def number(x: Tensor, w: Tensor, b: Tensor, v: Tensor, d: Tensor, s: Tensor, y: Tensor) -> Tensor:
        out = loss(
            Layer(x, w, b),
            y,
            label_smoothing=0.1,
            z_loss=0.1,
            softcap=5.0,
            logit_scale=s,
            sample_weight=v,
            divisor=d,
            dtype=x.dtype,
            return_lse=True,
            return_predictions=True,
            return_z_loss=True,
            return_entropy=True,
            **options,
        )
        return 2 * out.loss + out.z_loss + (out.lse.sin() + out.predictions * v + out.entropy.square()).sum()

    return number


NUMBERS: dict[str, Callable[[Callable[..., Any]], Function]] = {
    "mean": lambda loss: plain(loss),
    "none": lambda loss: plain(loss, reduction="none"),
    "everything": of_everything,
}


def in_pieces(layer: Layer, target: Tensor, **options: Any) -> Any:
    return fused(layer, target, chunk_rows=4, **options)


def value_and_grads(function: Function, arguments: tuple[Tensor, ...]) -> list[Tensor | None]:
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in arguments[:-1]]
    value = function(*leaves, arguments[-1])
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NUMBERS)
def test_eager(name: str, kind: str) -> None:
    results = [value_and_grads(NUMBERS[name](loss), problem(kind)) for loss in (in_pieces, unfused)]
    torch.testing.assert_close(*results)


# --- the ops --------------------------------------------------------------------------------------------------------


def op_arguments(
    name: str,
    kind: str,
    wanted: Wanted,
    needs: tuple[bool, ...],
    chunks: Chunks = Chunks(0, 4, False, True),  # noqa: B008
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Of the forward op, or of the backward's where its rows have gradients of lse and entropy."""
    x, w, b, v, d, s, target = problem(kind)
    x, w, b = (t.to(dtype) for t in (x, w, b))
    inputs = Inputs(x, w, b, target, cases.uniform([5], torch.float32, "cpu") + 0.1, v, s, d)
    rest = (*chunks, *Options(2, -100, 0.1, 0.1, 5.0, 0.7))
    if name == "linear_softmax_ce_forward":
        return *inputs, needs, *wanted, *rest
    grads = [cases.normal([ROWS], torch.float32, "cpu", seed=seed) for seed in (1, 2)]
    of_outputs = [grad if has else None for grad, has in zip(grads, (wanted.lse, wanted.entropy), strict=True)]
    return torch.tensor(1.5), *of_outputs, *inputs, needs, *rest


OPS = ["linear_softmax_ce_forward", "linear_softmax_ce_backward"]
ALL, NONE = (True,) * 4, (False,) * 4


@pytest.mark.parametrize("name", OPS)
def test_schemas_have_the_fields_in_order(name: str) -> None:
    schema = [argument.name for argument in getattr(torch.ops.torchce, name).default._schema.arguments]
    wanted = [f"returns_{field}" for field in Wanted._fields]
    grads = [f"grad_{field}" for field in Gradients._fields]
    rest = [*Chunks._fields, *Options._fields]
    if name == "linear_softmax_ce_forward":
        assert schema == [*Inputs._fields, "needs", *wanted, *rest]
    else:
        assert schema == [*grads, *Inputs._fields, "needs", *rest]


@pytest.mark.parametrize("needs", [ALL, NONE, (True, False, False, True)], ids=str)
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(True, True, True)], ids=["", "outputs"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, kind: str, wanted: Wanted, needs: tuple[bool, ...]) -> None:
    """Schema, autograd registration, fake against real, strides too, and AOT dispatch with dynamic shapes."""
    op, arguments = getattr(torch.ops.torchce, name).default, op_arguments(name, kind, wanted, needs)
    torch.library.opcheck(op, arguments)
    transposed = [a.t().contiguous().t() if isinstance(a, Tensor) and a.dim() == 2 else a for a in arguments]
    arguments = tuple(transposed)
    with FakeTensorMode() as mode:
        fakes = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    for real, fake in zip(op(*arguments), fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


class Card(NamedTuple):
    multi_processor_count: int = 132


LOOPS = {
    "linear_softmax_ce_forward": linear_softmax_ce._forward,
    "linear_softmax_ce_backward": linear_softmax_ce._backward,
}


knows_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA tensors")


@knows_cuda
@pytest.mark.parametrize("policy", ["accurate", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=cases.dtype_id)
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(True, True, True)], ids=["", "outputs"])
@pytest.mark.parametrize("name", OPS)
def test_nothing_on_cuda_waits_for_the_device(
    name: str, wanted: Wanted, dtype: torch.dtype, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop on tensors whose numbers cannot be read, with products of float32 where it wants them."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card())
    out_dtypes: list[Any] = []
    product = torch.mm

    def mm(*args: Any, **kwargs: Any) -> Tensor:
        out_dtypes.append(kwargs.get("out_dtype"))
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", mm)
    arguments = op_arguments(name, "index", wanted, ALL, Chunks(0, 4, policy == "compact", False), dtype)
    with FakeTensorMode() as mode:

        def on_cuda(argument: Any) -> Any:
            is_tensor = isinstance(argument, Tensor)
            return torch.empty_like(mode.from_tensor(argument), device="cuda") if is_tensor else argument

        results = LOOPS[name](*map(on_cuda, arguments))
        expected = getattr(torch.ops.torchce, name)(*map(on_cuda, arguments))
    for result, fake in zip(results, expected, strict=True):
        assert (result.shape, result.dtype, result.device) == (fake.shape, fake.dtype, fake.device)
        assert result.device.type == "cuda"
    assert (torch.float32 in out_dtypes) == (dtype != torch.float32 and policy == "accurate")


@knows_cuda
def test_compact_ignored_on_cuda_waits() -> None:
    """For the number of rows that are left."""
    arguments = op_arguments("linear_softmax_ce_forward", "index", Wanted(), ALL, Chunks(0, 4, False, True))
    with FakeTensorMode() as mode, pytest.raises(DynamicOutputShapeException):
        linear_softmax_ce._forward(
            *(torch.empty_like(mode.from_tensor(a), device="cuda") if isinstance(a, Tensor) else a for a in arguments)
        )


@knows_cuda
def test_no_number_is_read_before_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CUDA tensors that have none."""
    real = problem()
    monkeypatch.setattr(ops, "has_cuda", lambda: True)
    with FakeTensorMode() as mode:
        tensors = [torch.empty_like(mode.from_tensor(t), device="cuda") for t in real]
        for make in NUMBERS.values():
            assert make(in_pieces)(*tensors).device.type == "cuda"


# --- torch.compile and torch.export ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "backend", "dynamic"),
    [
        *((kind, name, "aot_eager", dynamic) for kind in KINDS for name in NUMBERS for dynamic in (False, True)),
        ("index", "mean", "inductor", True),
    ],
)
def test_compile(kind: str, name: str, backend: str, dynamic: bool) -> None:
    function = NUMBERS[name](in_pieces)
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (ROWS, 7):
        arguments = problem(kind, rows)
        torch.testing.assert_close(value_and_grads(compiled, arguments), value_and_grads(function, arguments))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("name", NUMBERS)
def test_no_recompile_when_the_number_of_rows_changes(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(NUMBERS[name](in_pieces), fullgraph=True, backend=counter, dynamic=True)
    value_and_grads(compiled, problem())
    compiled_once = counter.frame_count
    for rows in (7, 30, 31):
        value_and_grads(compiled, problem(rows=rows))
    assert counter.frame_count == compiled_once


def test_compiled_products() -> None:
    """One op in the forward's graph, which has the gradients, and none in the backward's."""
    forwards: list[str] = []
    backwards: list[str] = []

    def keep(graphs: list[str]) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph.code)
            return graph

        return compiler

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=keep(forwards), bw_compiler=keep(backwards))
    arguments = problem()
    function = plain(in_pieces)
    results = value_and_grads(torch.compile(function, fullgraph=True, backend=backend), arguments)
    torch.testing.assert_close(results, value_and_grads(function, arguments))
    assert forwards[0].count("torch.ops.torchce.linear_softmax_ce_forward") == 1
    assert "linear_softmax_ce" not in backwards[0]
    assert "[True, True, True, False]" in forwards[0]


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_bytes": 100},
        {"acc_policy": "compact"},
        {"compact_ignored": False},
        {"ignore_index": (1, -100)},
        {"empty_value": 0.0},
        {"reduction": "sum", "z_loss": 0.1},
        {"softcap": 5.0},
        {"divisor": 3},
        *(
            [{"options": nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio:2")}]
            if hasattr(nn, "LinearCrossEntropyOptions")
            else []
        ),
    ],
    ids=str,
)
def test_compile_with_each_option(options: dict[str, Any]) -> None:
    function = plain(fused, **options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(value_and_grads(compiled, problem()), value_and_grads(function, problem()))


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_compile_16_bits(autocast: bool) -> None:
    """With a transposed input, and a loss that is changed in place."""
    x, w, b, *_, target = problem(dtype=torch.float32 if autocast else torch.bfloat16)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = in_pieces(Layer(x.t().contiguous().t(), w, b), target)
        loss /= 4
        return loss

    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


def test_rows_that_depend_on_data() -> None:
    """Need no guard: the rows of a mask."""
    x, w, *_, target = problem()

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        kept = target != -100
        return ours.linear_cross_entropy(x[kept], w, target[kept])

    config = {"capture_dynamic_output_shape_ops": True}
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    with torch._dynamo.config.patch(config):
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves, target)
    found = torch.autograd.grad(value, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves, target), leaves))


def test_draft_export() -> None:
    model = Model(plain(in_pieces))
    x, _, _, *rest = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.draft_export(model, (x, *rest))
    assert_bitwise_equal(program.module()(x, *rest), model(x, *rest))


def test_compiled_autograd() -> None:
    """A backward that is compiled by itself gives eager's gradients, of other numbers too, and twice."""
    for name, make in NUMBERS.items():
        for factor in (1.0, 0.5):
            arguments = [factor * t if t.is_floating_point() else t for t in problem()]
            expected = value_and_grads(make(in_pieces), arguments)
            leaves = [t.clone().requires_grad_() for t in arguments[:-1]]
            loss = make(in_pieces)(*leaves, arguments[-1])
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                loss.backward(retain_graph=True)
                loss.backward()
            for leaf, wanted in zip(leaves, expected[1:], strict=True):
                twice = None if wanted is None else 2 * wanted
                torch.testing.assert_close(leaf.grad, twice, msg=lambda text, name=name: f"{name}: {text}")


class Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.head, self.function = nn.Linear(4, 4), nn.Linear(4, 5), function

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.function(self.net(x), self.head.weight, self.head.bias, *rest)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize(("name", "kind"), [("mean", "index"), ("none", "probability"), ("everything", "index")])
def test_an_exported_program_trains(name: str, kind: str, strict: bool) -> None:
    """With as many rows as it was not exported with; its gradients are the eager model's."""
    model = Model(NUMBERS[name](in_pieces))
    x, _, _, *rest = problem(kind)
    batch = {0: torch.export.Dim("batch", min=2, max=1000)}
    shapes = {"x": batch, "rest": (batch, None, None, batch)}
    program = torch.export.export(model, (x, *rest), strict=strict, dynamic_shapes=shapes)
    for module in (program.module(), through_a_file(program).module()):
        for rows in (ROWS, 12):
            x, _, _, *rest = problem(kind, rows)
            found = [torch.autograd.grad(m(x, *rest), list(m.parameters())) for m in (module, model)]
            for result, expected in zip(*found, strict=True):
                assert_bitwise_equal(result, expected)
            with torch.no_grad():
                assert_bitwise_equal(module(x, *rest), model(x, *rest))


@pytest.mark.parametrize("way", ["model", "program", "torchscript"])
@pytest.mark.parametrize("name", NUMBERS)
def test_onnx(name: str, way: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = Model(NUMBERS[name](in_pieces)).eval()
    x, _, _, *rest = problem()
    inputs, path = (x, *rest), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "program":
            torch.onnx.export(torch.export.export(model, inputs), (), path, dynamo=True, verbose=False)
        else:
            torch.onnx.export(model, inputs, path, dynamo=way == "model", verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    names = [given.name for given in session.get_inputs()]
    used = inputs if len(names) == len(inputs) else (x, rest[-1])
    (result,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, used, strict=True)})
    torch.testing.assert_close(
        torch.as_tensor(result), model(*inputs).detach(), rtol=1e-5, atol=1e-5, check_dtype=False
    )


def test_traced_graphs_differentiate() -> None:
    """make_fx's and torch.jit.trace's, of other inputs. (Below autograd make_fx forgets a z-loss's detach.)"""
    arguments, others = problem(), tuple(t * 0.5 if t.is_floating_point() else t for t in problem())
    for name, make in NUMBERS.items():
        function = make(in_pieces)
        expected = value_and_grads(function, others)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(function, arguments, check_trace=False)
        graphs = [make_fx(function, pre_dispatch=True)(*arguments), traced]
        if name != "everything":
            graphs.append(make_fx(function)(*arguments))
        for graph in graphs:
            torch.testing.assert_close(value_and_grads(graph, others), expected)


# --- transforms and further derivatives -----------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, w, *rest: grad(f, (0, 1))(x, w, *rest),
    "vjp": lambda f, x, w, *rest: vjp(lambda w: f(x, w, *rest), w)[1](torch.tensor(2.0, dtype=x.dtype)),
    "jvp": lambda f, x, w, *rest: jvp(lambda x, w: f(x, w, *rest), (x, w), (x.cos(), w.sin())),
    "jacrev": lambda f, x, *rest: jacrev(f)(x, *rest),
    "jacfwd": lambda f, x, *rest: jacfwd(f)(x, *rest),
    "hessian": lambda f, x, *rest: hessian(f)(x, *rest),
    "vmap": lambda f, x, *rest: vmap(lambda x: f(x, *rest))(torch.stack([x, 2 * x])),
    "vmap_weights": lambda f, x, w, *rest: vmap(lambda w: grad(f)(x, w, *rest))(torch.stack([w, 2 * w])),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_func(transform: str, name: str, kind: str) -> None:
    arguments = problem(kind, dtype=torch.float64)
    results = [TRANSFORMS[transform](NUMBERS[name](loss), *arguments) for loss in (in_pieces, unfused)]
    torch.testing.assert_close(*results)


def test_forward_mode() -> None:
    """A tangent of the input, and of the weight, by torch.autograd's own levels."""
    x, w, *rest = problem(dtype=torch.float64)
    for make in NUMBERS.values():
        tangents = []
        for loss in (in_pieces, unfused):
            with torch.autograd.forward_ad.dual_level():
                duals = [torch.autograd.forward_ad.make_dual(t, t.cos()) for t in (x, w)]
                tangents.append(torch.autograd.forward_ad.unpack_dual(make(loss)(*duals, *rest)).tangent)
        assert tangents[0] != 0
        torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NUMBERS)
def test_second_derivatives(name: str, kind: str) -> None:
    *arguments, target = problem(kind, dtype=torch.float64)
    results = []
    for loss in (in_pieces, unfused):
        leaves = [t.clone().requires_grad_() for t in arguments]
        first = torch.autograd.grad(NUMBERS[name](loss)(*leaves, target), leaves, create_graph=True, allow_unused=True)
        number = sum(t.sin().sum() for t in first if t is not None)
        results.append((first, torch.autograd.grad(number, leaves, allow_unused=True)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_gradcheck(reduction: str) -> None:
    x, w, b, *_, target = problem(dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def loss(*leaves: Tensor) -> Tensor:
        return in_pieces(Layer(*leaves), target, reduction=reduction)

    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("name", NUMBERS)
def test_batched_gradients(name: str) -> None:
    """Several upstream gradients at once, more than once."""
    *arguments, target = problem(dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in arguments]
    value = NUMBERS[name](in_pieces)(*leaves, target)
    several = torch.tensor([1.0, -2.5, 0.0], dtype=torch.float64)
    for _ in range(2):
        batched = torch.autograd.grad(
            value, leaves, several, is_grads_batched=True, allow_unused=True, retain_graph=True
        )
        for factor, *of_one in zip(several, *(t for t in batched if t is not None), strict=True):
            single = torch.autograd.grad(value, leaves, factor, retain_graph=True, allow_unused=True)
            torch.testing.assert_close(of_one, [t for t in single if t is not None])


def test_what_has_no_derivative_raises() -> None:
    """The op of a backward in a graph, and a target or class weight that requires grad beside the op: never a zero."""
    for name, words in (("linear_softmax_ce_backward", "has no derivative"), ("linear_softmax_ce_forward", "weight: ")):
        arguments = list(op_arguments(name, "index", Wanted(), ALL))
        place = 0 if name == "linear_softmax_ce_backward" else Inputs._fields.index("weight")
        arguments[place] = arguments[place].requires_grad_()
        with pytest.raises(RuntimeError, match=words):
            getattr(torch.ops.torchce, name)(*arguments)[0].backward()


def test_a_weight_that_leads_to_the_input() -> None:
    """Each input's gradient stops at that input."""
    x, w, *_, target = problem(dtype=torch.float64)
    results = []
    for loss in (in_pieces, unfused):
        weight = w.clone().requires_grad_()
        value = loss(Layer(x @ weight[:4].T.sin(), weight, None), target)
        (first,) = torch.autograd.grad(value, weight, create_graph=True)
        results.append((first, torch.autograd.grad(first.sin().sum(), weight)[0]))
    torch.testing.assert_close(*results)


# --- what surrounds a backward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_checkpoint(name: str, reentrant: bool) -> None:
    *arguments, target = problem()
    results = []
    for inside in (False, True):
        leaves = [t.clone().requires_grad_() for t in arguments]
        function = NUMBERS[name](in_pieces)
        value = checkpoint(function, *leaves, target, use_reentrant=reentrant) if inside else function(*leaves, target)
        results.append(
            torch.autograd.grad(value, leaves, allow_unused=True) if not reentrant else by_backward(value, leaves)
        )
    torch.testing.assert_close(*results)


def by_backward(value: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    value.backward()
    return tuple(leaf.grad for leaf in leaves)


def test_a_checkpoint_keeps_no_gradients() -> None:
    """Where hooks take what is saved, the gradients are computed in the backward."""
    layer = problems.layer(500, 16, 400, bias=False)
    weight = layer.linear_weight.clone().requires_grad_()
    target = problems.target_for(layer)
    from test_linear_softmax_ce import count_products

    def loss() -> Tensor:
        return ours.linear_cross_entropy(layer.input, weight, target, compact_ignored=False)

    out: list[Tensor] = []
    with torch.autograd.graph.save_on_cpu():
        assert count_products(lambda: out.append(loss())) == 1
    assert count_products(out[0].backward) == 2
    expected = weight.grad
    assert_bitwise_equal(torch.autograd.grad(loss(), weight)[0], expected)


def test_autocast() -> None:
    """Products in autocast's dtype, the loss in float32, gradients in the parameters' dtype, as of the unfused loss."""
    layer = problems.layer()
    target = problems.target_for(layer)
    results = []
    for loss in (in_pieces, unfused):
        leaves = Layer(*(t.clone().requires_grad_() for t in layer))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(leaves, target)
            assert value.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16, enabled=loss is in_pieces):  # of no matter
            results.append([value, *torch.autograd.grad(value, leaves)])
    for result, expected in zip(*results, strict=True):
        assert result.dtype == expected.dtype == torch.float32
        assert (result - expected).abs().max() <= 2**-7 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Layer(layer.input.bfloat16(), layer.linear_weight, layer.linear_bias)
        assert in_pieces(mixed, target, dtype=torch.float16).dtype == torch.float16


def test_autocast_around_a_backward() -> None:
    """Has no say in it: a forward of float32 has a backward of float32, of the rows that are not ignored."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer(classes=200)))
    target = problems.target_for(layer)
    for reduction in cases.REDUCTIONS:
        loss = in_pieces(layer, target, reduction=reduction).sum()
        expected = torch.autograd.grad(loss, layer, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.autograd.grad(loss, layer)
        torch.testing.assert_close(found, expected)


def test_autocast_leaves_float64() -> None:
    layer = problems.layer(dtype=torch.float64)
    target = problems.target_for(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = in_pieces(layer, target)
    assert_bitwise_equal(loss, in_pieces(layer, target))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    arguments = problem()
    for make in NUMBERS.values():
        with mode():
            value = make(in_pieces)(*arguments)
        assert not value.requires_grad
        torch.testing.assert_close(value, make(unfused)(*arguments))
    with torch.inference_mode():
        inside = [t.clone() for t in arguments]
        torch.testing.assert_close(plain(in_pieces)(*inside), plain(unfused)(*arguments))


def test_meta_and_fake_tensors() -> None:
    """Shapes and dtypes without memory."""
    for function in (plain(in_pieces), plain(in_pieces, reduction="none")):
        on_meta = [t.to("meta").requires_grad_(t.is_floating_point()) for t in problem()]
        value = function(*on_meta)
        assert value.is_meta and value.shape == ()  # noqa: PT018
        gradients = torch.autograd.grad(value, on_meta[:3])
        assert [g.shape for g in gradients] == [t.shape for t in on_meta[:3]]


# --- processes and their tensors ------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_distributed_data_parallel() -> None:
    """Its hooks find every parameter's gradient, over several micro-batches."""
    x, _, _, *rest = problem()
    model = Model(plain(in_pieces))
    expected = torch.autograd.grad(2 * model(x, *rest), list(model.parameters()))
    parallel = DistributedDataParallel(model)
    with parallel.no_sync():
        parallel(x, *rest).backward()
    parallel(x, *rest).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


@pytest.mark.usefixtures("one_rank")
def test_fully_sharded() -> None:
    """A module whose parameters FSDP gathers for its forward and backward."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    x, *_, target = problem()
    torch.manual_seed(0)
    loss = torchce.LinearCrossEntropyLoss(4, 5, bias=True, chunk_rows=4)
    expected = torch.autograd.grad(loss(x, target), list(loss.parameters()))
    fully_shard(loss, mesh=mesh)
    loss(x, target).backward()
    for parameter, wanted in zip(loss.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted)


@pytest.mark.usefixtures("one_rank")
def test_dtensor() -> None:
    """A weight that is one gets torch's own answer, which is the unfused loss."""
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    x, w, _, *_, target = problem()
    whole = [distribute_tensor(t, mesh, [Replicate()]) for t in (x, w, target)]
    result = ours.linear_cross_entropy(*whole)
    torch.testing.assert_close(result.full_tensor(), ours.linear_cross_entropy(x, w, target))
    with pytest.raises(ValueError, match=r"no kernel for .*DTensor.*keyword arguments of torchce's own"):
        ours.linear_cross_entropy(*whole, z_loss=0.1)


class Watched(Tensor):
    """A subclass whose handler sees the call."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_handlers() -> None:
    """They see the loss as one call, and their class comes out again."""
    x, w, *_, target = problem()
    Watched.seen.clear()
    result = ours.linear_cross_entropy(x, w.as_subclass(Watched), target)
    assert Watched.seen[0] == "linear_cross_entropy"
    assert type(result) is Watched
    torch.testing.assert_close(result.as_subclass(Tensor), ours.linear_cross_entropy(x, w, target))
    own = ours.linear_cross_entropy(x, w.as_subclass(Watched), target, z_loss=0.1, chunk_rows=2)
    torch.testing.assert_close(own.as_subclass(Tensor), ours.linear_cross_entropy(x, w, target, z_loss=0.1))


def test_scripting_is_refused() -> None:
    with pytest.raises(RuntimeError, match="torchce's losses cannot be scripted"):
        torch.jit.script(torchce.LinearCrossEntropyLoss(4, 5))
    counter = CompileCounter()
    module = torchce.LinearCrossEntropyLoss(4, 5)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x, *_, target = problem()
    torch.testing.assert_close(compiled(x, target), module(x, target))
    assert counter.frame_count == 1
