"""Problems nobody thought of: drawn shapes, strides, dtypes, options and extreme values, held to the rule of the suite.

Every problem is compared with the float64 reference and with torch, gradients included; wrong ones with torch's errors.
`make test` runs a few hundred, the same each time; `make fuzz` 5000 for each test, new ones each time. Hypothesis draws
the structure and a seed for the numbers, so a failure is printed small and can be written down as a test with a name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cases
import composed
import divergences
import linear_problems
import pytest
import torch
from comparison import assert_bitwise_equal, check_sigmoid_bce, check_softmax_ce, run
from fuzz_draws import grad_outputs, layouts, numbers, outliers, seeds, weights
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import torchce.functional as ours
from torchce.ops import one_stride

# Around one, two and four registers of 8 and 16 lanes, and a length that is split among threads with inner positions.
CLASS_COUNTS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 129, 257, 1001]
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 17, 33]
ADJACENT_ROWS = 130  # more than the widest strip of rows takes at once
SMOOTHINGS = [0.0, 0.1, 0.5, 1.0, -0.3]
ELEMENTS = 4_000  # at steps of up to 3 in each dimension the memory behind it is larger

dtypes = st.sampled_from([torch.float32, *cases.DTYPES])
reductions = st.sampled_from(cases.REDUCTIONS)


@st.composite
def class_weights(draw: st.DrawFn, classes: int, dtype: torch.dtype, signed: bool) -> Tensor | None:
    if draw(st.booleans()):
        return None
    weight = draw(weights(dtype))([classes])
    if signed and draw(st.booleans()):
        weight *= cases.normal([classes], torch.float64, "cpu", seed=draw(seeds)).sign().to(dtype)
    return weight


@st.composite
def softmax_shapes(draw: st.DrawFn) -> tuple[int, ...]:
    dims = draw(st.integers(1, 4))
    classes = draw(st.one_of(st.sampled_from(CLASS_COUNTS), st.integers(2, 512)))
    shape = [draw(st.sampled_from(SIZES)) for _ in range(dims)]
    shape[0 if dims == 1 else 1] = classes
    if dims > 2 and draw(st.integers(0, 7)) == 0:
        return (1, min(classes, 512), ADJACENT_ROWS)
    while math.prod(shape) > ELEMENTS:
        shape[shape.index(max(shape))] //= 2
    return tuple(shape)


class Softmax(NamedTuple):
    logits: Tensor
    target: Tensor
    options: dict[str, Any]
    grad_output: float | None


@st.composite
def softmax_problems(draw: st.DrawFn, kind: str) -> Softmax:
    shape, dtype, reduction = draw(softmax_shapes()), draw(dtypes), draw(reductions)
    classes = shape[0 if len(shape) == 1 else 1]
    values = draw(numbers(dtype))
    logits = draw(layouts(len(shape))).arrange(lambda s: values.draw(s, dtype, "cpu"), shape)
    if outlier := draw(outliers(classes)):
        outlier.put(logits, 0 if len(shape) == 1 else 1)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": draw(st.sampled_from(SMOOTHINGS))}
    if kind == "index":
        target_dtype = draw(st.sampled_from(cases.INDEX_DTYPES))
        target_shape, seed = cases.index_shape(shape), draw(seeds)
        target = draw(layouts(len(target_shape))).arrange(
            lambda s: cases.indices(s, classes, target_dtype, "cpu", seed=seed), target_shape
        )
        if outlier and outlier.place < 256 and draw(st.booleans()):
            target = torch.full_like(target, outlier.place)
        options["ignore_index"] = draw(st.sampled_from([-100, 0, classes - 1, 255, -1]))
        options["weight"] = draw(class_weights(classes, dtype, signed=reduction != "mean"))
        if reduction == "mean" and options["weight"] is not None:
            # A mean over rows that all weigh nothing is torch's NaN, in every gradient: test_all_weights_zero.
            kept = target.long()[target.long() != options["ignore_index"]]
            assume(kept.numel() == 0 or bool(options["weight"][kept].sum() > 0))
    else:
        target_dtype = draw(st.sampled_from([dtype, dtype, *cases.DTYPES]))
        seed, one_hot = draw(seeds), draw(st.booleans())

        def distribution(s: Sequence[int]) -> Tensor:
            numbers = cases.uniform(s, torch.float64, "cpu", seed=seed)
            return (numbers > 0.8 if one_hot else torch.where(numbers < 0.2, 0.0, numbers)).to(target_dtype)

        target = draw(layouts(len(shape))).arrange(distribution, shape)
        options["weight"] = draw(class_weights(classes, dtype, signed=True))
    return Softmax(logits, target, options, draw(grad_outputs))


@st.composite
def broadcasts(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A weight for some of the dimensions, or none."""
    if draw(st.booleans()):
        return None
    kept = draw(st.integers(0, len(shape)))
    sizes = [draw(st.sampled_from([1, size])) for size in shape[len(shape) - kept :]]
    weight_dtype = draw(st.sampled_from([dtype, *cases.DTYPES]))
    return draw(layouts(kept)).arrange(draw(weights(weight_dtype)), sizes)


@st.composite
def bce_problems(draw: st.DrawFn) -> Softmax:
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), max_size=4)))
    while math.prod(shape) > ELEMENTS:
        shape = shape[1:]
    dtype, reduction = draw(dtypes), draw(reductions)
    values = draw(numbers(dtype))
    logits = draw(layouts(len(shape))).arrange(lambda s: values.draw(s, dtype, "cpu"), shape)
    target_dtype = draw(st.sampled_from([dtype, *cases.DTYPES, torch.bool, torch.uint8, torch.int64, torch.int32]))
    seed, hard = draw(seeds), draw(st.booleans())

    def labels(s: Sequence[int]) -> Tensor:
        numbers = cases.uniform(s, torch.float64, "cpu", seed=seed)
        return (numbers.round() if hard or not target_dtype.is_floating_point else numbers).to(target_dtype)

    target = draw(layouts(len(shape))).arrange(labels, shape)
    options = {name: draw(broadcasts(shape, dtype)) for name in ("weight", "pos_weight")}
    return Softmax(logits, target, {"reduction": reduction, **options}, draw(grad_outputs))


def on(device: str, problem: Softmax) -> tuple[Tensor, Tensor, dict[str, Any], Tensor | None]:
    """(logits, target, options, grad_output) there, strides kept."""
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in problem.options.items()}
    grad = problem.grad_output
    loss_dtype = torch.float32 if grad is None else torch.float64
    return (
        problem.logits.to(device),
        problem.target.to(device),
        options,
        None if grad is None else torch.tensor(grad, dtype=loss_dtype, device=device),
    )


def hold(check: Callable[..., Tensor], function: Callable[..., Tensor], device: str, problem: Softmax) -> None:
    logits, target, options, grad_output = on(device, problem)
    if grad_output is not None:
        with torch.no_grad():
            loss = function(logits, target, **options)
            grad_output = grad_output.to(loss.dtype).expand(loss.shape)
    check(logits, target, grad_output=grad_output, target_grad=target.is_floating_point(), **options)


@pytest.mark.parametrize("device", cases.DEVICES)
@given(problem=softmax_problems("index"))
def test_cross_entropy_with_indices(problem: Softmax, device: str, counts: Counter[str]) -> None:
    hold(check_softmax_ce, ours.cross_entropy, device, problem)
    counts["fuzzed problems"] += 1


@pytest.mark.parametrize("device", cases.DEVICES)
@given(problem=softmax_problems("probability"))
def test_cross_entropy_with_probabilities(problem: Softmax, device: str, counts: Counter[str]) -> None:
    hold(check_softmax_ce, ours.cross_entropy, device, problem)
    counts["fuzzed problems"] += 1


@st.composite
def own_problems(draw: st.DrawFn) -> Softmax:
    """With the options that torch's has not, of ordinary logits: the extremes are the other tests'."""
    problem = draw(st.one_of(softmax_problems("index"), softmax_problems("probability")))
    logits = draw(st.floats(0.1, 30)) * cases.normal(problem.logits.shape, torch.float64, "cpu", seed=draw(seeds))
    logits = torch.empty_like(problem.logits).copy_(logits)
    options = dict(problem.options)
    if options["weight"] is not None:
        options["weight"] = cases.uniform(options["weight"].shape, options["weight"].dtype, "cpu", seed=draw(seeds))
    options["z_loss"] = draw(st.sampled_from([0.0, 1e-4, 0.1]))
    scales = [None, 0.1, 2.0, torch.tensor(0.1), torch.tensor(2.0, dtype=torch.float64)]
    for name, values in {"softcap": [None, 1.0, 30.0], "logit_scale": scales}.items():
        options[name] = draw(st.sampled_from(values))
    if draw(st.booleans()):
        rows, dtype = cases.index_shape(logits.shape), draw(st.sampled_from(cases.DTYPES))
        options["sample_weight"] = 0.1 + draw(layouts(len(rows))).arrange(
            lambda s: cases.uniform(s, dtype, "cpu", seed=5), rows
        )
    if options["reduction"] == "mean":
        options["divisor"] = draw(st.sampled_from([None, 0.5, 7, torch.tensor(3)]))
    options["dtype"] = draw(st.sampled_from([None, None, torch.float32]))
    return Softmax(logits, problem.target, options, draw(st.sampled_from([None, 1.0, -3.0])))


@pytest.mark.parametrize("device", cases.DEVICES)
@given(problem=own_problems())
def test_cross_entropy_with_own_options(problem: Softmax, device: str, counts: Counter[str]) -> None:
    hold(check_softmax_ce, ours.cross_entropy, device, problem)
    logits, target, options, _ = on(device, problem)
    out = ours.cross_entropy(logits, target, return_lse=True, return_predictions=True, return_entropy=True, **options)
    assert_bitwise_equal(out.loss, ours.cross_entropy(logits, target, **options))
    class_dim = min(1, logits.dim() - 1)
    assert_bitwise_equal(out.predictions, logits.argmax(class_dim))
    values = composed.transformed(logits.double(), options["softcap"], options["logit_scale"])
    torch.testing.assert_close(out.lse.double(), torch.logsumexp(values, class_dim), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out.entropy.double(), composed.entropy(values, class_dim), rtol=1e-4, atol=1e-5)
    counts["fuzzed problems"] += 1


class Linear(NamedTuple):
    layer: linear_problems.Layer
    target: Tensor
    options: dict[str, Any]
    chunks: dict[str, Any]


@st.composite
def layers(draw: st.DrawFn) -> Linear:
    """Of ordinary numbers, in any memory, cut in any way."""
    dtype = draw(st.sampled_from(cases.DTYPES))
    rows, features, classes = draw(st.integers(0, 20)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    out_features = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    outputs = (classes, *out_features)

    def tensor(shape: tuple[int, ...], scale: float, to: torch.dtype = dtype) -> Tensor:
        seed = draw(seeds)
        layout = draw(layouts(len(shape)))
        return layout.arrange(lambda s: cases.normal(s, torch.float64, "cpu", seed=seed, scale=scale), shape).to(to)

    layer = linear_problems.Layer(
        tensor((rows, features), 1.0),
        tensor((*outputs, features), draw(st.sampled_from([0.1, 1.0, 5.0]))),
        tensor(outputs, 1.0) if draw(st.booleans()) else None,
    )
    kind = draw(st.sampled_from(["index", "probability"]))
    target = linear_problems.target_for(layer, kind)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {
        "reduction": draw(st.sampled_from(["none", "mean", "sum"] if rows else ["none", "sum"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.1])),
        "softcap": draw(st.sampled_from([None, None, 5.0])),
        "logit_scale": draw(st.sampled_from([None, 0.7, torch.tensor(0.7, dtype=acc)])),
        **dict.fromkeys(draw(st.sampled_from([[], [], ["return_lse"], ["return_lse", "return_entropy"]])), True),
    }
    if draw(st.booleans()):
        options["weight"] = cases.uniform([classes], dtype, "cpu", seed=draw(seeds)) + 0.1
    if draw(st.booleans()):
        options["sample_weight"] = tensor((rows, *out_features), 1.0, acc).abs() + 0.1
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["divisor"] = draw(st.sampled_from([3.5, torch.tensor(3.5, dtype=acc)]))
    chunks = {
        "chunk_rows": draw(st.integers(1, 21)),
        "acc_policy": draw(st.sampled_from(["auto", "compact"])),
        "compact_ignored": draw(st.sampled_from([None, False])),
    }
    return Linear(layer, target, options, chunks)


@given(problem=layers())
def test_linear_cross_entropy(problem: Linear, counts: Counter[str]) -> None:
    layer, target, options, chunks = problem
    found = linear_problems.results(linear_problems.fused, layer, target, options | chunks)
    theirs = linear_problems.results(linear_problems.unfused, layer, target, options)
    truths = linear_problems.results(linear_problems.truth, layer, target, options, torch.float64)
    if any(t.isnan().any() for t in truths.values()):  # a mean over ignored rows alone
        torch.testing.assert_close(found, theirs, equal_nan=True)
    else:
        pieces = -(-len(layer.input) // chunks["chunk_rows"])  # each of which rounds a compact sum of 16 bits
        ulps = pieces if chunks["acc_policy"] == "compact" else 1
        # A logit's rounding, which differs with the rows of a product, moves its probability by as much.
        logits, one = linear_problems.logits_of(layer).double(), torch.ones(1, dtype=torch.float64)
        largest = [float(torch.cat([t.double().flatten(), one]).abs().max()) for t in (*layer[:2], logits)]
        term = 10 * max(largest[:2]) * largest[2]  # a row's loss, which is divided by weights from 0.1 on
        linear_problems.assert_no_worse(found, theirs, truths, ulps, term)
    counts["fuzzed problems"] += 1


@pytest.mark.parametrize("device", cases.DEVICES)
@given(problem=bce_problems())
def test_bce(problem: Softmax, device: str, counts: Counter[str]) -> None:
    hold(check_sigmoid_bce, ours.binary_cross_entropy_with_logits, device, problem)
    counts["fuzzed problems"] += 1


@pytest.mark.parametrize("device", cases.DEVICES)
@given(problem=st.one_of(softmax_problems("index"), softmax_problems("probability"), bce_problems()), data=st.data())
def test_in_place_and_autocast(problem: Softmax, data: st.DataObject, device: str, counts: Counter[str]) -> None:
    """Bit for bit the gradient of the other road: over the logits, and under autocast in torch's dtype."""
    logits, target, options, _ = on(device, problem)
    bce = "pos_weight" in options
    function = ours.binary_cross_entropy_with_logits if bce else ours.cross_entropy
    torch_function = getattr(torch.nn.functional, function.__name__)
    autocast = data.draw(st.booleans())
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        dense = torch.empty_like(logits).copy_(logits)  # keeps the order of the dimensions
        if not bce and not one_stride(dense):
            dense = dense.contiguous()
        loss, grad, target_grad = run(function, dense, target, options, None, target.is_floating_point())

        def in_place(x: Tensor, y: Tensor, **options: Any) -> Tensor:
            return function(cases.activation(x), y, inplace_backward=True, **options)

        results = run(in_place, dense.clone(), target, options, None, target.is_floating_point())
        if torch.promote_types(target.dtype, logits.dtype) == logits.dtype or not target.is_floating_point():
            for result, expected in zip(results, (loss, grad, target_grad), strict=True):
                if expected is not None:
                    assert_bitwise_equal(result, expected)
        if target.is_floating_point() or (target.dtype in (torch.int64, torch.uint8) and not bce):
            options = {k: v.to(logits.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
            target = target if target.is_floating_point() else target.long()  # torch smooths no uint8
            assert loss.dtype == torch_function(logits, target, **options).dtype
    counts["fuzzed problems"] += 1


# --- divergences ----------------------------------------------------------------------------------------------------


DIVERGENCES = divergences.KINDS | divergences.BINARY_KINDS


class Diverging(NamedTuple):
    kind: str
    input: Tensor
    target: Tensor | None
    options: dict[str, Any]


@st.composite
def diverging_problems(draw: st.DrawFn) -> Diverging:
    """Both operands of drawn layouts and dtypes, of which one excludes what the other does."""
    shape = draw(softmax_shapes())
    class_dim = min(1, len(shape) - 1)
    kind = DIVERGENCES[draw(st.sampled_from(sorted(DIVERGENCES)))]
    scale = draw(st.sampled_from([1e-3, 1.0, 10.0, 1e3]))
    has_logits = not kind.has_target or kind.options.get("target_logits", False)
    # By a probability that is 0 as the student's is there is no derivative.
    share = draw(st.sampled_from([0, 0, 0.2])) if has_logits else 0
    excluded = cases.uniform(shape, torch.float32, "cpu", seed=draw(seeds)) < share
    operands: list[Tensor] = []
    for is_logits in (True, kind.options.get("target_logits", False))[: 1 + kind.has_target]:
        dtype = draw(dtypes)
        values = cases.normal(shape, torch.float64, "cpu", seed=draw(seeds), scale=scale)
        values = values.masked_fill(excluded & ~excluded.all(class_dim, keepdim=True), -math.inf)
        if not is_logits:
            values = values.sigmoid() if kind.is_binary else values.softmax(class_dim)
            values = torch.where(values < 1e-290, 0, values)  # which the reference has digits of
            if "reverse" in kind.name:  # from what rounds to 0 it is infinite
                values = values.clamp_min(max(1e-290, torch.finfo(dtype).smallest_normal))
        draw_values = values.to(dtype)
        layout = draw(layouts(len(shape)))
        operand = layout.arrange(lambda s, d=dtype: torch.zeros(s, dtype=d), shape)  # type: ignore[misc]
        if not any(layout.expanded):
            operand.copy_(draw_values)
        else:
            operand = draw_values
        operands.append(operand)
    options: dict[str, Any] = {"reduction": draw(reductions)}
    if not kind.is_binary and draw(st.booleans()):
        options["temperature"] = draw(st.sampled_from([0.5, 1.3, 7.0]))
    if not kind.is_binary and draw(st.booleans()):
        mask = cases.uniform(cases.index_shape(shape), torch.float32, "cpu", seed=draw(seeds)) < 0.7
        assume(bool(mask.any()) or options["reduction"] != "mean")
        options["mask"] = mask
    assume(math.prod(cases.index_shape(shape)) > 0)
    return Diverging(kind.name, operands[0], operands[1] if len(operands) > 1 else None, options)


@given(problem=diverging_problems())
def test_divergences(problem: Diverging, counts: Counter[str]) -> None:
    kind, input, target, options = problem
    divergences.check(DIVERGENCES[kind], input, target, **options)
    counts["fuzzed problems"] += 1


# --- errors ---------------------------------------------------------------------------------------------------------


def _other_size(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    sizes = list(tensor.shape)
    if sizes and draw(st.booleans()):
        sizes[draw(st.integers(0, len(sizes) - 1))] += draw(st.sampled_from([1, 2]))
    elif sizes and draw(st.booleans()):
        del sizes[draw(st.integers(0, len(sizes) - 1))]
    else:
        sizes.insert(draw(st.integers(0, len(sizes))), draw(st.sampled_from([1, 2])))
    return torch.zeros(sizes, dtype=tensor.dtype)


@st.composite
def wrong_problems(draw: st.DrawFn) -> Softmax:
    """A good problem with one thing changed, which may or may not make it a wrong one."""
    kind = draw(st.sampled_from(["index", "probability", "bce"]))
    logits, target, options, _ = draw(bce_problems() if kind == "bce" else softmax_problems(kind))
    target = target.contiguous()
    if kind == "bce" and not target.is_floating_point():  # torch refuses these, ours does not
        target = target.float()
    if target.dtype == torch.int32:  # these too
        target = target.long()
    if target.dtype == torch.uint8 and (logits.dim() > 2 or options.get("label_smoothing")):  # and such bytes
        target = target.long()
    what = draw(
        st.sampled_from(["target", "target dtype", "weight", "index", "ignore_index", "smoothing", "reduction"])
    )
    if what == "target":
        target = _other_size(draw, target)
    elif what == "target dtype":
        refused = [torch.complex64] if kind == "bce" else [torch.int16, torch.int8, torch.bool, torch.complex64]
        target = target.to(draw(st.sampled_from(refused)))
    elif what == "weight":
        classes = logits.shape[: 2 if logits.dim() > 1 else 1][-1:] if kind != "bce" else logits.shape
        name = draw(st.sampled_from(["weight", "pos_weight"])) if kind == "bce" else "weight"
        options[name] = _other_size(draw, torch.empty(classes, dtype=logits.dtype))
    elif what == "index" and kind == "index" and target.numel():
        bad = draw(st.sampled_from([-1, 300, 2**40, -(2**40)]))
        target = target.long()
        target.view(-1)[draw(st.integers(0, target.numel() - 1))] = bad
    elif what == "ignore_index" and kind != "bce":
        options["ignore_index"] = draw(st.sampled_from([True, 1.0, None, 3]))
    elif what == "smoothing" and kind != "bce":
        options["label_smoothing"] = draw(st.sampled_from([1.5, "a", None, math.inf]))
    elif what == "reduction":
        options["reduction"] = draw(st.sampled_from(["", "MEAN", None, 1]))
    if isinstance(options.get("weight"), Tensor) and kind == "index":
        options["weight"] = options["weight"].to(logits.dtype)  # torch refuses another dtype, ours does not
    return Softmax(logits, target, options, None)


@given(problem=wrong_problems())
def test_errors_are_torchs(problem: Softmax, counts: Counter[str]) -> None:
    """The same exception class, or the same shape and dtype, whatever was changed."""
    logits, target, options, _ = problem
    bce = "pos_weight" in options
    name = "binary_cross_entropy_with_logits" if bce else "cross_entropy"
    outcomes: list[Any] = []
    for function in (getattr(ours, name), getattr(torch.nn.functional, name)):
        try:
            loss = function(logits, target, **options)
            outcomes.append((loss.shape, loss.dtype))
        except Exception as error:  # whatever it is, it must be the same
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    counts["fuzzed problems"] += 1
