"""Linear cross entropy against float64 truth and the unfused loss: values, gradients, products, memory, errors."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import cases
import linear_problems as problems
import pytest
import torch
from cases import dtype_id
from comparison import assert_bitwise_equal, ulp
from linear_problems import Layer, assert_no_worse, fused, results, truth, unfused
from test_memory import SLACK, bytes_of, peak_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import torchce
import torchce.functional as ours

RETURNED = {"return_lse": True, "return_predictions": True, "return_entropy": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "z": {"z_loss": 0.01},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "scale_tensor": {"logit_scale": torch.tensor(0.7)},
    "sample_weight": {"sample_weight": True},
    "divisor": {"divisor": torch.tensor(3.5), "dtype": torch.float32},
    "outputs": RETURNED,
    "all": {
        **RETURNED,
        "label_smoothing": 0.1,
        "weight": True,
        "z_loss": 0.01,
        "softcap": 5.0,
        "logit_scale": torch.tensor(0.7),
        "sample_weight": True,
        "divisor": torch.tensor(3.5),
    },
}


def options_for(name: str, of: Layer, target: Tensor, reduction: str) -> dict[str, Any]:
    options: dict[str, Any] = {**OPTIONS[name], "reduction": reduction}
    dtype = of.input.dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rows = (*of.input.shape[:-1], *of.linear_weight.shape[1:-1])
    if "weight" in options:
        options["weight"] = cases.uniform(of.linear_weight.shape[:1], dtype, str(of.input.device), seed=21) + 0.1
    if "sample_weight" in options:
        options["sample_weight"] = cases.uniform(rows, acc, str(of.input.device), seed=22) + 0.1
    if reduction != "mean":
        options.pop("divisor", None)
    return options | {
        k: v.to(acc) for k, v in options.items() if k in problems.DIFFERENTIABLE and isinstance(v, Tensor)
    }


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [*((dtype, "mean") for dtype in cases.DTYPES), (torch.float32, "none"), (torch.bfloat16, "sum")],
    ids=lambda value: dtype_id(value) or value,
)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients(device: str, name: str, kind: str, dtype: torch.dtype, reduction: str) -> None:
    """In pieces of ten rows; of a mean, a sum and of each row. A divisor or scale on the CPU serves CUDA too."""
    layer = problems.layer(dtype=dtype, device=device)
    target = problems.target_for(layer, kind)
    options = options_for(name, layer, target, reduction)
    found = results(fused, layer, target, {**options, "chunk_rows": 10})
    assert_no_worse(
        found, results(unfused, layer, target, options), results(truth, layer, target, options, torch.float64)
    )
    again = results(fused, layer, target, {**options, "chunk_rows": 10})
    for key, result in found.items():
        assert_bitwise_equal(result, again[key], key)


SHAPES: dict[str, dict[str, Any]] = {
    "no_batch": {"rows": None},
    "no_rows": {"rows": 0},
    "one_row": {"rows": 1},
    "one_class": {"classes": 1},
    "no_bias": {"bias": False},
    "one_feature": {"features": 1},
    "1d_out": {"rows": 7, "out_features": (5,)},
    "2d_out": {"rows": 7, "out_features": (2, 3), "bias": False},
    "1000_classes": {"rows": 300, "classes": 1000, "features": 64},
}


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, reduction: str, kind: str) -> None:
    layer = problems.layer(**SHAPES[name])
    target = problems.target_for(layer, kind)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, **RETURNED}
    if name == "no_rows" and reduction == "mean":
        assert fused(layer, target).isnan()
        options["empty_value"] = 0.5
    found = results(fused, layer, target, {**options, "chunk_rows": 128 if name == "1000_classes" else 2})
    assert_no_worse(
        found, results(unfused, layer, target, options), results(truth, layer, target, options, torch.float64)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", ["transposed", "offset", "sliced"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Of input, weight and target, whose memory no product wants so."""
    input = cases.arranged(layout, (37, 12), dtype, "cpu")
    weight = cases.arranged(layout, (29, 12), dtype, "cpu")
    layer = Layer(input, weight, None)
    for kind in ("index", "probability"):
        target = problems.target_for(layer, kind)
        target = torch.stack([target, target], -1)[..., 0]
        found = results(fused, layer, target, {"chunk_rows": 10})
        assert_no_worse(found, results(unfused, layer, target, {}), results(truth, layer, target, {}, torch.float64))


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_every_option_without_a_batch(kind: str) -> None:
    layer = problems.layer(rows=None)
    target = problems.target_for(layer, kind)
    options = {**OPTIONS["all"], "weight": torch.arange(29.0), "sample_weight": torch.tensor(0.7)}
    found = results(fused, layer, target, {**options, "chunk_rows": 1})
    for name, result in results(unfused, layer, target, options).items():
        torch.testing.assert_close(found[name], result)
        assert found[name].shape == result.shape


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_probabilities_of_another_dtype(dtype: torch.dtype, target_dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Are made alike in pieces: beside the logits of a piece their copy counts."""
    layer = problems.layer(1000, 16, 500, dtype=dtype, bias=False)
    target = problems.target_for(layer, "probability").to(target_dtype)
    found, theirs = (
        results(fused, layer, target, {**options, "chunk_rows": 100}),
        results(unfused, layer, target, options),
    )
    assert_no_worse(found, theirs, results(truth, layer, target, options, torch.float64))
    leaves = [t.requires_grad_() for t in (layer.input, layer.linear_weight)]
    budget = 200_000
    peak = beyond_gradients(lambda: fused(layer, target, **options, chunk_bytes=budget, acc_policy="compact"), leaves)
    of_products = 128 << 10  # which torch's of 16 bits take themselves
    assert peak <= budget + of_products + 1000 * 64 + SLACK


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=dtype_id)
def test_narrow_indices(dtype: torch.dtype) -> None:
    layer = problems.layer()
    target = problems.target_for(layer).clamp_min(0)
    expected = results(fused, layer, target, {"ignore_index": (3, 0)})
    for name, result in results(fused, layer, target.to(dtype), {"ignore_index": (3, 0)}).items():
        assert_bitwise_equal(result, expected[name])
    for name, result in results(unfused, layer, target, {"ignore_index": (3, 0)}).items():
        torch.testing.assert_close(result, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_the_number_of_pieces_is_a_matter_of_roundings(dtype: torch.dtype) -> None:
    """The loss is a sum in float64 of rows in float32, whose logits a product of other rows may round otherwise."""
    layer = problems.layer(rows=1000, features=64, classes=500, dtype=dtype)
    target = problems.target_for(layer)
    losses = [fused(layer, target, chunk_rows=rows, dtype=torch.float32).double() for rows in (1, 10, 256, 1000)]
    expected = truth(layer.to(torch.float64), target)
    if dtype == torch.bfloat16:  # logits of three digits: the truth is that of them
        logits = problems.logits_of(layer)
        expected = F.cross_entropy(logits.double(), target)
    for loss in losses:
        assert (loss - expected).abs() <= 4 * ulp(expected, torch.float32)


def test_the_sum_of_many_16_bit_losses_keeps_its_digits() -> None:
    """Summed in bfloat16, they would stop to count at 256 times one of them."""
    layer = problems.layer(rows=5000, features=8, classes=100, dtype=torch.bfloat16)
    target = cases.indices([5000], 100, torch.int64, "cpu")
    rows = F.cross_entropy(problems.logits_of(layer).double(), target, reduction="none")
    for reduction, expected in (("mean", rows.mean()), ("sum", rows.sum())):
        loss = fused(layer, target, reduction=reduction, chunk_rows=700)
        assert loss.dtype == torch.bfloat16
        assert (loss.double() - expected).abs() <= ulp(expected, torch.bfloat16)


# --- what is computed when ------------------------------------------------------------------------------------------


def count_products(function: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return sum(event.name in ("aten::mm", "aten::addmm") for event in profiler.events())


@pytest.mark.parametrize(
    ("frozen", "in_forward", "in_none_backward"),
    [((), 3, 3), (("input",), 2, 2), (("linear_weight",), 2, 2), (("input", "linear_weight"), 1, 1)],
)
def test_products(frozen: tuple[str, ...], in_forward: int, in_none_backward: int) -> None:
    """Three for a mean, all in the forward; four for each row's loss; what is frozen costs none."""
    layer = problems.layer()
    target = problems.target_for(layer)
    leaves = Layer(*(t.clone().requires_grad_(name not in frozen) for name, t in layer._asdict().items()))
    pieces = 4
    options: dict[str, Any] = {"chunk_rows": 10, "compact_ignored": False}
    out: list[Any] = [None]

    def forward(**more: Any) -> None:
        out[0] = fused(leaves, target, **options, **more)

    assert count_products(lambda: forward()) == in_forward * pieces
    assert count_products(lambda: out[0].backward(torch.tensor(2.0), retain_graph=True)) == 0
    assert count_products(lambda: out[0].backward(torch.tensor(2.0))) == in_forward * pieces  # taken by the first
    assert count_products(lambda: forward(reduction="none")) == pieces
    assert count_products(lambda: out[0].sum().backward()) == in_none_backward * pieces
    with torch.no_grad():
        assert count_products(lambda: forward()) == pieces


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_ignored_rows_cost_no_product(reduction: str) -> None:
    """21 of 37 rows are left: three pieces of ten instead of four."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer(classes=100)))
    target = cases.indices([37], 100, torch.int64, "cpu")
    target[5:21] = -100

    def step(**options: Any) -> tuple[Tensor, ...]:
        loss = fused(layer, target, chunk_rows=10, reduction=reduction, **options)
        return loss, *torch.autograd.grad(problems.number(loss), layer)

    per_piece = 4 if reduction == "none" else 3
    assert count_products(step) == 3 * per_piece
    assert count_products(lambda: step(compact_ignored=False)) == 4 * per_piece
    for result, expected in zip(step(), step(compact_ignored=False), strict=True):
        torch.testing.assert_close(result, expected)
    assert (step()[1][5:21] == 0).all()
    assert count_products(lambda: fused(layer, target, chunk_rows=10, return_lse=True)) == 12  # of all rows


def test_nothing_but_ignored_rows() -> None:
    """The mean is NaN as torch's, its gradients 0, and there is no product."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer()))
    target = torch.full([37], -100)
    loss = fused(layer, target)
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, layer):
        assert (gradient == 0).all()
    assert count_products(lambda: fused(layer, target)) == 0
    for gradient in torch.autograd.grad(fused(layer, target, compact_ignored=False), layer):
        assert (gradient == 0).all()
    assert fused(layer, target, empty_value=0.5) == 0.5


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("upstream", [1.0, -2.625, 65536.0])
def test_every_backward_gives_the_same(upstream: float, dtype: torch.dtype) -> None:
    """The first takes the forward's gradients, later ones compute them again; nobody's are changed after that."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer(dtype=dtype)))
    target = problems.target_for(layer)
    loss = fused(layer, target, chunk_rows=10)
    grad_output = torch.tensor(upstream).to(loss.dtype) if dtype != torch.float16 else torch.tensor(1024.0).to(dtype)
    first = torch.autograd.grad(loss, layer, grad_output, retain_graph=True)
    kept = [t.clone() for t in first]
    for _ in range(2):
        for again, before, now in zip(
            torch.autograd.grad(loss, layer, grad_output, retain_graph=True), kept, first, strict=True
        ):
            assert_bitwise_equal(again, before)
            assert_bitwise_equal(now, before)


def test_gradients_accumulate() -> None:
    layer = Layer(*(t.requires_grad_() for t in problems.layer()))
    target = problems.target_for(layer)
    single = torch.autograd.grad(fused(layer, target), layer)
    losses = [fused(layer, target), fused(layer, target)]
    for loss in losses:
        loss.backward()
    for leaf, gradient in zip(layer, single, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient)


def test_one_tensor_twice() -> None:
    """A weight that is the input as well."""
    both = cases.normal((7, 7), torch.float32, "cpu").requires_grad_()
    target = cases.indices([7], 7, torch.int64, "cpu")
    (result,) = torch.autograd.grad(ours.linear_cross_entropy(both, both, target, chunk_rows=3), both)
    (expected,) = torch.autograd.grad(ours.cross_entropy(F.linear(both, both), target), both)
    torch.testing.assert_close(result, expected)


def test_nothing_is_left_when_the_loss_is() -> None:
    """The gradients that wait for a backward are no part of a cycle."""
    layer = problems.layer()
    weight = layer.linear_weight.clone().requires_grad_()
    gc.collect()
    gc.disable()
    try:
        peak_bytes(lambda: ours.linear_cross_entropy(layer.input, weight, problems.target_for(layer)), "cpu")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = ours.linear_cross_entropy(layer.input, weight, problems.target_for(layer))
            del loss
        events = profiler.profiler.kineto_results.events()
        assert sum(event.nbytes() for event in events if event.name() == "[memory]") == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("weights", [None, 1e-6, 1e5])
def test_float16_keeps_its_range(weights: float | None, scale: float) -> None:
    """Small gradients with a loss's scale, and sums beyond the range before they are divided: as the unfused loss."""
    layer = problems.layer(1000, 8, 16000, dtype=torch.float16, bias=False, scale=1.0)
    target = cases.indices([1000], 50, torch.int64, "cpu")  # the other classes' gradients are small
    options: dict[str, Any] = {"dtype": torch.float32}
    if weights is not None:
        options["sample_weight"] = torch.full([1000], weights)
    errors = []
    leaves = layer.to(torch.float64)._replace(linear_bias=None)
    leaves = Layer(*(t if t is None else t.requires_grad_() for t in leaves))
    wanted = torch.autograd.grad(truth(leaves, target, sample_weight=options.get("sample_weight")) * scale, leaves[:2])
    for function in (functools.partial(fused, chunk_rows=300), unfused):
        leaves = Layer(*(t if t is None else t.clone().requires_grad_() for t in layer))
        found = torch.autograd.grad(function(leaves, target, **options) * scale, leaves[:2])
        small, of_small = found[1][50:], wanted[1][50:]  # of classes that are no target
        pairs = [*zip(found, wanted, strict=True), (small, of_small)]
        errors.append([(t.double() - w).square().mean().sqrt() for t, w in pairs])
    for error, unfused_error, expected in zip(*errors, [*wanted, of_small], strict=True):
        assert error <= unfused_error + ulp(expected.abs().max(), torch.float16)
    padding = torch.full([1000], -100)
    leaves = Layer(*(t if t is None else t.clone().requires_grad_() for t in layer))
    assert all((t == 0).all() for t in torch.autograd.grad(fused(leaves, padding), leaves[:2]))


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_the_loss_may_be_changed_in_place(reduction: str) -> None:
    """Before it is differentiated, as torch's may."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer()))
    target = problems.target_for(layer)
    divisor = torch.tensor(3.5, requires_grad=True)
    options: dict[str, Any] = {"divisor": divisor} if reduction == "mean" else {}
    leaves = [*layer, *options.values()]
    results = []
    for function in (functools.partial(fused, chunk_rows=10), unfused):
        loss = function(layer, target, reduction=reduction, **options)
        loss /= 4
        loss += 1
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("upstream", [0.0, math.inf, math.nan])
def test_upstream_gradients_at_the_ends(upstream: float) -> None:
    """An ignored row's gradient is 0 whatever comes in, and a sample's weight's of an infinite loss that gets none."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer()))
    target = problems.target_for(layer)
    with torch.no_grad():
        layer.linear_bias[target[0]] = -math.inf
    weight = torch.ones(37, requires_grad=True)
    leaves = [layer.input, weight]
    results = []
    for function in (functools.partial(fused, chunk_rows=10), unfused):
        loss = function(layer, target, sample_weight=weight, reduction="sum")
        results.append(torch.autograd.grad(loss, leaves, torch.tensor(upstream)))
    of_input, of_weight = results[0]
    assert (of_input[target == -100] == 0).all()
    torch.testing.assert_close(of_input, results[1][0], equal_nan=True)
    if upstream == 0:
        assert (of_weight == 0).all()


def test_the_second_backward_of_outputs() -> None:
    """To the same bits as the first, and the forward's gradients are not held beside those of all outputs."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer(300, 64, 1000, dtype=torch.bfloat16)))
    target = problems.target_for(layer)
    out = fused(layer, target, chunk_rows=100, **RETURNED)
    first, second = (torch.autograd.grad(out.loss, layer, retain_graph=True) for _ in range(2))
    for result, expected in zip(first, second, strict=True):
        assert_bitwise_equal(result, expected)

    def peak(reduction: str) -> int:
        def step() -> tuple[Tensor, ...]:
            out = fused(layer, target, chunk_rows=100, reduction=reduction, return_lse=True)
            return torch.autograd.grad(out.loss.sum() + out.lse.sum(), layer)

        return peak_bytes(step, "cpu")

    assert peak("mean") <= peak("none") + 2000 * 16


@pytest.mark.parametrize("needs_input", [True, False])
def test_of_some_inputs(needs_input: bool) -> None:
    """One at a time, in any order."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer()))
    target = problems.target_for(layer)
    expected = torch.autograd.grad(fused(layer, target, chunk_rows=10), layer)
    loss = fused(layer, target, chunk_rows=10)
    for place in (0, 1, 2) if needs_input else (2, 1, 0):
        (gradient,) = torch.autograd.grad(loss, layer[place], retain_graph=True)
        assert_bitwise_equal(gradient, expected[place])


def test_sums_of_16_bits_by_default() -> None:
    """Over 200 pieces, they are as true as the unfused loss's; a single piece is rounded once and takes no sums."""
    layer = problems.layer(1000, 32, 50, dtype=torch.bfloat16)
    target = cases.indices([1000], 50, torch.int64, "cpu")
    theirs, truths = results(unfused, layer, target, {}), results(truth, layer, target, {}, torch.float64)
    for policy in ("auto", "accurate"):
        found = results(fused, layer, target, {"chunk_rows": 5, "acc_policy": policy})
        assert_no_worse(found, theirs, truths)
    compact = results(fused, layer, target, {"chunk_rows": 5, "acc_policy": "compact"})
    with pytest.raises(AssertionError, match="gradient of linear_weight"):
        assert_no_worse(compact, theirs, truths)
    weight = cases.normal([4000, 64], torch.bfloat16, "cpu").requires_grad_()
    input, target = cases.normal([100, 64], torch.bfloat16, "cpu"), cases.indices([100], 4000, torch.int64, "cpu")

    def beyond(chunk_rows: int) -> int:
        return beyond_gradients(
            lambda: ours.linear_cross_entropy(input, weight, target, chunk_rows=chunk_rows), [weight]
        )

    assert beyond(50) - beyond(100) >= 4 * weight.numel() - 100 * 4000 * 2


def test_small_logits_are_whole() -> None:
    """Without an ignored row, in eager mode: the bits of the unfused loss, and no op of pieces."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer()))
    target = cases.indices([37], 29, torch.int64, "cpu")

    def has_pieces(**options: Any) -> bool:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            fused(layer, target, **options)
        return any("linear_softmax_ce" in event.name for event in profiler.events())

    assert not has_pieces()
    assert has_pieces(chunk_rows=37)
    assert has_pieces(chunk_bytes=1 << 20)
    assert has_pieces(compact_ignored=False)
    for name, result in results(fused, layer, target, {}).items():
        assert_bitwise_equal(result, results(unfused, layer, target, {})[name])
    target[3] = -100
    assert has_pieces()
    large = problems.layer(1000, 4, 600)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        fused(large, cases.indices([1000], 600, torch.int64, "cpu"))
    assert any("linear_softmax_ce" in event.name for event in profiler.events())


# --- memory ---------------------------------------------------------------------------------------------------------


def beyond_gradients(loss: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """The most that forward and backward hold beyond what was there and the gradients."""
    return peak_bytes(lambda: torch.autograd.grad(loss(), leaves), "cpu") - sum(map(bytes_of, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("policy", ["accurate", "compact"])
def test_memory(policy: str, reduction: str, dtype: torch.dtype) -> None:
    """A piece, an eighth of one for products, the weight in float32 where 16 bits are added up, some numbers a row."""
    rows, features, classes, budget = 2000, 32, 4000, 4 << 20
    layer = problems.layer(rows, features, classes, dtype=dtype)
    leaves = [t.requires_grad_() for t in layer if t is not None]
    target = cases.indices([rows], classes, torch.int64, "cpu")

    def loss() -> Tensor:
        result = fused(layer, target, chunk_bytes=budget, acc_policy=policy, reduction=reduction)
        return result.sum()

    sums = 4 * features * classes if dtype == torch.bfloat16 and policy == "accurate" else 0
    of_products = 3 * features * classes * 2 if dtype == torch.bfloat16 else 0  # which torch's take themselves
    of_rows = rows * 64
    assert beyond_gradients(loss, leaves) <= budget * 9 // 8 + sums + of_products + of_rows + SLACK
    assert beyond_gradients(lambda: unfused(layer, target), leaves) >= 1.9 * rows * classes * dtype.itemsize


def test_memory_of_gathered_rows() -> None:
    """Those that are not ignored, of a piece, and their gradient: many features beside few classes."""
    layer = problems.layer(4000, 200, 60, bias=False)
    leaves = [t.requires_grad_() for t in (layer.input, layer.linear_weight)]
    target = cases.indices([4000], 60, torch.int64, "cpu")
    target[::2] = -100
    budget = 400_000
    peak = beyond_gradients(lambda: fused(layer, target, chunk_bytes=budget), leaves)
    assert peak <= budget + 4000 * 64 + SLACK


def test_memory_of_a_large_vocabulary() -> None:
    """The default's: at most a tenth of what the unfused loss holds, which are its logits and their gradient."""
    rows, features, classes = 4096, 256, 128256
    input = torch.zeros(rows, features, dtype=torch.bfloat16).requires_grad_()
    weight = torch.zeros(classes, features, dtype=torch.bfloat16).requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)
    target[256:] = -100  # one piece's rows count: the memory is the same, the time is not
    peak = beyond_gradients(
        lambda: (
            ours.linear_cross_entropy(input, weight, target, compact_ignored=False, chunk_rows=256)
            if False
            else ours.linear_cross_entropy(input, weight, target)
        ),
        [input, weight],
    )
    unfused_bytes = 2 * rows * classes * 2
    assert peak <= unfused_bytes / 10


def test_what_waits_for_a_backward() -> None:
    """The gradients themselves, or of each row's loss some numbers."""
    layer = problems.layer(2000, 32, 4000, bias=False)
    leaves = [t.requires_grad_() for t in (layer.input, layer.linear_weight)]
    target = cases.indices([2000], 4000, torch.int64, "cpu")
    for reduction, expected in (("mean", sum(map(bytes_of, leaves))), ("none", 0)):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = fused(layer, target, reduction=reduction)
        events = profiler.profiler.kineto_results.events()
        held = sum(event.nbytes() for event in events if event.name() == "[memory]")
        assert expected <= held <= expected + 2000 * 16 + SLACK
        del loss


# --- arguments and errors -------------------------------------------------------------------------------------------


def test_signature_begins_as_torchs() -> None:
    names = list(inspect.signature(ours.linear_cross_entropy).parameters)
    assert names[:3] == ["input", "linear_weight", "target"]
    if hasattr(F, "linear_cross_entropy"):
        theirs = inspect.signature(F.linear_cross_entropy).parameters
        assert set(theirs) <= set(names)
        mine = inspect.signature(ours.linear_cross_entropy).parameters
        assert all(theirs[name].default == mine[name].default for name in theirs)
    own = set(inspect.signature(ours.cross_entropy).parameters) - set(inspect.signature(F.cross_entropy).parameters)
    assert own - set(names) == {"inplace_backward"}  # no logits to overwrite


X, W = torch.zeros(6, 4), torch.zeros(5, 4)
T = torch.zeros(6, dtype=torch.int64)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "input_dim": ((torch.zeros(2, 3, 4), W, T), {}, RuntimeError, r"input: .*1 or 2 dimensions.*\[2, 3, 4\]"),
    "weight_dim": ((X, torch.zeros(4), T), {}, RuntimeError, r"linear_weight: .*2 dimensions.*\[4\]"),
    "features": ((X, torch.zeros(5, 3), T), {}, RuntimeError, r"linear_weight: .*4 .*\[5, 3\]"),
    "bias": ((X, W, T), {"linear_bias": torch.zeros(6)}, RuntimeError, r"linear_bias: .*\[5\].*\[6\]"),
    "no_batch": (
        (X[0], torch.zeros(5, 2, 4), torch.zeros(2, dtype=torch.int64)),
        {},
        RuntimeError,
        r"input: .*\[N, 4\].*\[5, 2, 4\].*\[4\]",
    ),
    "dtype": ((X, W.double(), T), {}, RuntimeError, "linear_weight: .*float32.*float64"),
    "bias_dtype": ((X, W, T), {"linear_bias": torch.zeros(5).half()}, RuntimeError, "linear_bias: .*float32.*float16"),
    "target_shape": ((X, W, T[:5]), {}, ValueError, r"target: .*\[6\].*\[6, 5\].*\[5\]"),
    "target_dtype": ((X, W, T.bool()), {}, RuntimeError, "target: .*int64.*bool"),
    "ignore_index": (
        (X, W, torch.zeros(6, 5)),
        {"ignore_index": -100},
        RuntimeError,
        "ignore_index: expected None beside probabilities, got -100",
    ),
    "ignore_index_of_no_rows": (
        (X[:0], W, torch.zeros(0, 5)),
        {"ignore_index": -100},
        RuntimeError,
        "ignore_index: expected None beside probabilities, got -100",
    ),
    "smoothing": ((X, W, T), {"label_smoothing": 1.5}, RuntimeError, "label_smoothing: .*1.0.*1.5"),
    "class_weight": ((X, W, T), {"weight": torch.ones(4)}, RuntimeError, r"weight: .*\[5\].*\[4\]"),
    "reduction": ((X, W, T), {"reduction": "median"}, ValueError, "median"),
    "no_tensor": ((X, 5, T), {}, (TypeError, AttributeError), "linear_weight: .*int"),
    "not_floating": ((X.long(), W.long(), T), {}, RuntimeError, "int64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name: str) -> None:
    """Torch's class of error, the argument and both values."""
    arguments, options, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        ours.linear_cross_entropy(*arguments, **options)
    if hasattr(F, "linear_cross_entropy"):
        with pytest.raises(error):
            F.linear_cross_entropy(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"chunk_bytes": 19}, ValueError, "chunk_bytes: expected at least 20, .* got 19"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows: expected at least 1, got 0"),
        ({"chunk_rows": -1}, ValueError, "chunk_rows: expected at least 1, got -1"),
        ({"chunk_rows": 2.0}, TypeError, "chunk_rows: expected an int or None, got 2.0"),
        ({"chunk_bytes": True}, TypeError, "chunk_bytes: expected an int or None, got True"),
        (
            {"chunk_rows": 2, "chunk_bytes": 100},
            ValueError,
            "chunk_rows: expected none beside chunk_bytes, got 2 and 100",
        ),
        ({"acc_policy": "fast"}, ValueError, "acc_policy: expected one of 'auto', 'accurate', 'compact', got 'fast'"),
        ({"compact_ignored": 1}, ValueError, "compact_ignored: expected a bool or None, got 1"),
        ({"options": "auto"}, TypeError, "options: .*LinearCrossEntropyOptions.*'auto'"),
        ({"z_loss": -1.0}, ValueError, "z_loss: .*-1.0"),
        ({"sample_weight": torch.ones(5)}, ValueError, r"sample_weight: .*\[6\].*\[5\]"),
        ({"inplace_backward": True}, TypeError, "inplace_backward"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ours.linear_cross_entropy(X, W, T, **options)


def test_a_bad_index_is_named_by_its_row_in_the_whole_target() -> None:
    layer = problems.layer()
    target = cases.indices([37], 29, torch.int64, "cpu")
    target[31] = 29
    for options in ({}, {"reduction": "none"}, {"return_lse": True}):
        with pytest.raises(IndexError, match=r"Target 29 is out of bounds. \(row 31 of 37, 29 classes\)"):
            fused(layer, target, chunk_rows=10, **options)
    target[31] = -1
    with pytest.raises(IndexError, match=r"Target -1 is out of bounds"):
        fused(layer, target)


def test_probabilities_and_weights_that_the_pieces_do_not_take_go_through_whole_logits() -> None:
    """What requires grad beside the layer, and float64 beside float32: the unfused loss, bit for bit."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer()))
    probabilities = problems.target_for(layer, "probability")
    for target, options in (
        (probabilities.clone().requires_grad_(), {}),
        (probabilities.double(), {}),
        (probabilities, {"weight": torch.ones(29, requires_grad=True)}),
        (probabilities, {"weight": torch.ones(29, dtype=torch.float64)}),
    ):
        leaves = [t for t in (*layer, target, *options.values()) if t.requires_grad]
        outcomes = []
        for function in (functools.partial(fused, chunk_rows=10), unfused):
            loss = function(layer, target, **options)
            outcomes.append([loss, *torch.autograd.grad(loss, leaves)])
        for result, expected in zip(*outcomes, strict=True):
            assert_bitwise_equal(result, expected)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch 2.13 is the first that has them")
def test_torchs_options() -> None:
    """Rows and policy as torch means them; a retained graph needs no asking."""
    layer = Layer(*(t.requires_grad_() for t in problems.layer()))
    target = problems.target_for(layer)
    expected = torch.autograd.grad(fused(layer, target), layer)
    for options, products in (
        ({}, 3),
        ({"batch_chunk_size": 10}, 12),
        ({"chunking_method": "aspect_ratio"}, 9),  # 37 x 12 of input hold 15 rows of 29 classes
        ({"chunking_method": "aspect_ratio:2"}, 18),
        ({"acc_policy": "compact", "batch_chunk_size": 37}, 3),
    ):
        of_torch = nn.LinearCrossEntropyOptions(**options)
        loss = fused(layer, target, options=of_torch, compact_ignored=False)
        assert count_products(lambda: fused(layer, target, options=of_torch, compact_ignored=False)) == products  # noqa: B023
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(loss, layer, retain_graph=True), expected)
    with pytest.raises(ValueError, match="options: expected None beside chunk_bytes"):
        fused(layer, target, options=nn.LinearCrossEntropyOptions(), chunk_rows=3)
    for options, error in (
        ({"batch_chunk_size": 1, "chunking_method": "aspect_ratio"}, ValueError),
        ({"acc_dtype": torch.float16}, RuntimeError),
    ):
        of_torch = nn.LinearCrossEntropyOptions(**options)
        with pytest.raises(error, match="options: expected"):
            fused(layer, target, options=of_torch)
        with pytest.raises(error):
            F.linear_cross_entropy(layer.input, layer.linear_weight, target, options=of_torch)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 is the first that has it")
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("name", ["no_bias", "2d_out", "no_batch"])
def test_as_torchs_own(name: str, kind: str, reduction: str) -> None:
    layer = Layer(*(t if t is None else t.requires_grad_() for t in problems.layer(**SHAPES[name])))
    target = problems.target_for(layer, kind)
    weight = cases.uniform([29], torch.float32, "cpu") + 0.1
    leaves = [t for t in layer if t is not None]
    outcomes = []
    in_pieces = functools.partial(ours.linear_cross_entropy, chunk_rows=10)
    for function in (in_pieces, F.linear_cross_entropy):
        loss = function(
            layer.input,
            layer.linear_weight,
            target,
            linear_bias=layer.linear_bias,
            weight=weight,
            reduction=reduction,
            label_smoothing=0.1,
        )
        outcomes.append([loss, *torch.autograd.grad(problems.number(loss), leaves)])
    torch.testing.assert_close(*outcomes)


# --- the module -----------------------------------------------------------------------------------------------------


def module(**options: Any) -> torchce.LinearCrossEntropyLoss:
    torch.manual_seed(0)
    return torchce.LinearCrossEntropyLoss(12, 29, **options)


@pytest.mark.parametrize("out_features", [(), (2, 3)])
def test_module(out_features: tuple[int, ...]) -> None:
    """Its loss and gradients are the function's of its layer."""
    weight = cases.uniform([29], torch.float32, "cpu") + 0.1
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": "sum", "chunk_rows": 10}
    loss = module(out_features=out_features, bias=True, **options, z_loss=0.1, softcap=5.0, loss_dtype=torch.float64)
    layer = problems.layer(out_features=out_features)
    target = problems.target_for(layer)
    sample_weight = cases.uniform(target.shape, torch.float32, "cpu")
    result = loss(layer.input, target, sample_weight=sample_weight)
    own = Layer(
        layer.input,
        loss.linear.weight.view(29, *out_features, 12),
        loss.linear.bias.view(29, *out_features),
    )
    keywords = {"z_loss": 0.1, "softcap": 5.0, "dtype": torch.float64, "sample_weight": sample_weight}
    expected = fused(own, target, **options, **keywords)
    assert_bitwise_equal(result, expected)
    parameters = list(loss.parameters())
    for gradient, wanted in zip(
        torch.autograd.grad(result, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert_bitwise_equal(gradient, wanted)
    mean = module(out_features=out_features)
    assert_bitwise_equal(
        mean(layer.input, target, divisor=4.0) * 4,
        module(out_features=out_features, reduction="sum")(layer.input, target),
    )


def test_module_is_torchs() -> None:
    """isinstance, state_dict, pickling, copies and repr hold; a torch without one has the same attributes."""
    loss = module(bias=True, z_loss=0.1, logit_scale=nn.Parameter(torch.tensor(0.5)))
    assert isinstance(loss, getattr(nn, "LinearCrossEntropyLoss", nn.Module))
    assert sorted(loss.state_dict()) == ["linear.bias", "linear.weight", "logit_scale"]
    assert "num_classes" in vars(loss) and "(linear): Linear(in_features=12" in repr(loss)  # noqa: PT018
    layer = problems.layer()
    target = problems.target_for(layer)
    expected = loss(layer.input, target)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert_bitwise_equal(other(layer.input, target), expected)
    loss.return_lse = True
    assert isinstance(loss(layer.input, target), torchce.CrossEntropyOutput)
    if hasattr(nn, "LinearCrossEntropyLoss"):
        torch.manual_seed(0)
        theirs = nn.LinearCrossEntropyLoss(12, 29, label_smoothing=0.1)
        mine = module(label_smoothing=0.1)
        assert list(theirs.state_dict()) == list(mine.state_dict())
        torch.testing.assert_close(mine(layer.input, target), theirs(layer.input, target))
        theirs.__class__ = torchce.LinearCrossEntropyLoss  # as an object that no __init__ of ours has made
        assert_bitwise_equal(theirs(layer.input, target), mine(layer.input, target))


@pytest.mark.parametrize("options", [{"weight": torch.ones(3)}, {"label_smoothing": 1.5}], ids=str)
def test_module_refuses_what_torchs_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"weight.*29.*3|label_smoothing.*1.5"):
        module(**options)


def test_module_with_a_weight_of_two() -> None:
    """One that an embedding has, too, gets both gradients."""
    embedding = nn.Embedding(29, 12)
    loss = module(chunk_rows=7)
    loss.linear.weight = embedding.weight
    tokens = cases.indices([20], 29, torch.int64, "cpu")
    target = cases.indices([20], 29, torch.int64, "cpu", seed=3)
    loss(embedding(tokens), target).backward()
    (expected,) = torch.autograd.grad(
        F.cross_entropy(F.linear(embedding(tokens), embedding.weight), target), embedding.weight
    )
    torch.testing.assert_close(embedding.weight.grad, expected)


def test_patched() -> None:
    """Torch's function and module lead here, where torch has them."""
    layer = problems.layer(bias=False)
    target = problems.target_for(layer)
    if not hasattr(F, "linear_cross_entropy"):
        with torchce.patch_torch():
            assert "linear_cross_entropy" not in torchce.patch_torch.calls()
        return
    torchs, theirs = F.linear_cross_entropy, nn.LinearCrossEntropyLoss(12, 29)
    with torchce.patch_torch():
        result = F.linear_cross_entropy(layer.input, layer.linear_weight, target)
        theirs(layer.input, target)
        assert torchce.patch_torch.calls()["linear_cross_entropy"] == (2, {})
        assert torchce.patch_torch.calls()["cross_entropy"] == (0, {})
        torch.func.grad(lambda x: F.linear_cross_entropy(x, layer.linear_weight, target))(layer.input)
        assert torchce.patch_torch.calls()["linear_cross_entropy"].other == {"torch.func transform": 1}
    assert F.linear_cross_entropy is torchs
    assert_bitwise_equal(result, fused(layer, target))


def test_sizes_that_are_no_number_of_rows() -> None:
    """A piece of as many rows as there are, and more, and of one."""
    layer = problems.layer()
    target = problems.target_for(layer)
    expected = fused(layer, target, chunk_rows=37)
    for options in ({"chunk_rows": 2**40}, {"chunk_bytes": 2**40}, {"chunk_bytes": 29 * 4}, {"chunk_rows": 1}):
        assert math.isclose(fused(layer, target, **options), expected, rel_tol=1e-6)
