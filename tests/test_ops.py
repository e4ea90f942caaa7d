"""The compiled ops as the dispatcher sees them: schemas, fakes, mutation, and checks that keep memory safe."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from cases import dtype_id
from comparison import assert_bitwise_equal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchce.functional

NONE, MEAN, SUM = 0, 1, 2
NOT_DENSE = ("sliced", "channels_last_sliced", "expanded_rows")  # layouts whose memory cannot be overwritten
NO_ROWS = ("permuted_inner",)  # whose memory cannot be overwritten by rows

# The contract between Python and the kernels of every device. A change here is a change of every layer.
SCHEMAS = {
    "softmax_ce_forward": (
        "(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, float label_smoothing, "
        "ScalarType? dtype) -> (Tensor loss, Tensor statistics, Tensor totals)"
    ),
    "softmax_ce_backward": (
        "(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor statistics, Tensor totals, "
        "int reduction, int ignore_index, float label_smoothing) -> Tensor"
    ),
    "softmax_ce_backward_": (
        "(Tensor grad_output, Tensor(a!) logits, Tensor target, Tensor? weight, Tensor statistics, Tensor totals, "
        "int reduction, int ignore_index, float label_smoothing) -> ()"
    ),
    "softmax_ce_backward_target": (
        "(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor statistics, Tensor totals, "
        "int reduction, float label_smoothing) -> Tensor"
    ),
    "softmax_ce_forward_backward_": (
        "(Tensor grad_output, Tensor(a!) logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
        "float label_smoothing, ScalarType? dtype) -> Tensor"
    ),
    "sigmoid_bce_forward": (
        "(Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight, int reduction, ScalarType? dtype) -> Tensor"
    ),
    "sigmoid_bce_backward": (
        "(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight, "
        "int reduction) -> Tensor"
    ),
    "sigmoid_bce_backward_": (
        "(Tensor grad_output, Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? pos_weight, "
        "int reduction) -> ()"
    ),
    "sigmoid_bce_backward_target": (
        "(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight, "
        "int reduction) -> Tensor"
    ),
}

SOFTMAX_SAMPLES = {
    "2d": {"shape": (6, 5)},
    "1d": {"shape": (5,)},
    "3d_bfloat16": {"shape": (3, 5, 4), "dtype": torch.bfloat16},
    "channels_last": {"shape": (2, 5, 3, 4), "layout": "channels_last"},
    "sliced": {"shape": (6, 5), "layout": "sliced"},
    "permuted_sliced": {"shape": (2, 5, 3, 4), "layout": "channels_last_sliced"},
    "permuted_inner": {"shape": (2, 5, 3, 4), "layout": "permuted_inner"},
    "expanded": {"shape": (6, 5), "layout": "expanded_rows"},
    "none": {"shape": (3, 5, 4), "reduction": NONE},
    "sum": {"shape": (6, 5), "reduction": SUM},
    "weighted": {"shape": (6, 5), "weighted": True, "smoothing": 0.1},
    "weighted_sum": {"shape": (6, 5), "weighted": True, "smoothing": 0.1, "reduction": SUM},
    "loss_dtype": {"shape": (6, 5), "dtype": torch.float16, "loss_dtype": torch.float32},
    "empty": {"shape": (0, 5), "reduction": SUM},  # opcheck takes NaN, the mean, for a difference
}
BCE_SAMPLES = {
    "2d": {"shape": (6, 5)},
    "0d": {"shape": ()},
    "bfloat16": {"shape": (6, 5), "dtype": torch.bfloat16},
    "channels_last": {"shape": (2, 5, 3, 4), "layout": "channels_last", "reduction": NONE},
    "sliced": {"shape": (6, 5), "layout": "sliced", "reduction": NONE},
    "permuted_sliced": {"shape": (2, 5, 3, 4), "layout": "channels_last_sliced", "reduction": NONE},
    "permuted_inner": {"shape": (2, 5, 3, 4), "layout": "permuted_inner", "reduction": NONE},
    "weighted": {"shape": (6, 5), "weighted": True},
    "loss_dtype": {"shape": (6, 5), "dtype": torch.float16, "loss_dtype": torch.float32, "reduction": NONE},
    "empty": {"shape": (0, 5), "reduction": SUM},  # opcheck takes NaN, the mean, for a difference
}


def op(name: str) -> Any:
    """As torchce.ops calls it: torch.ops.torchce's, or what --emulate-cuda has put in its place."""
    return getattr(torchce.ops, f"_{name}")


def make_logits(shape: tuple[int, ...], dtype: torch.dtype, layout: str | None, device: str) -> Tensor:
    return cases.laid_out(layout, lambda s: cases.normal(s, dtype, device), shape)


def softmax_calls(
    device: str,
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    reduction: int = MEAN,
    weighted: bool = False,
    smoothing: float = 0.0,
    loss_dtype: torch.dtype | None = None,
) -> dict[str, tuple[Any, ...]]:
    """The arguments of every softmax op for one problem."""
    logits = make_logits(shape, dtype, layout, device)
    target = cases.softmax_target(kind, shape, dtype, device)
    classes = shape[0 if len(shape) == 1 else 1]
    weight = cases.uniform([classes], torch.float32, device) if weighted else None
    forward = (logits, target, weight, reduction, -100, smoothing, loss_dtype)
    loss, statistics, totals = op("softmax_ce_forward")(*forward)
    state = (torch.ones_like(loss), logits, target, weight, statistics, totals, reduction)
    calls = {"softmax_ce_forward": forward, "softmax_ce_backward": (*state, -100, smoothing)}
    if layout not in NOT_DENSE + NO_ROWS:
        calls["softmax_ce_backward_"] = (*state, -100, smoothing)
        if reduction != MEAN:
            calls["softmax_ce_forward_backward_"] = (*state[:4], reduction, -100, smoothing, loss_dtype)
    if kind == "probability":
        calls["softmax_ce_backward_target"] = (*state, smoothing)
    return calls


def bce_calls(
    device: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    reduction: int = MEAN,
    weighted: bool = False,
    loss_dtype: torch.dtype | None = None,
) -> dict[str, tuple[Any, ...]]:
    """The arguments of every BCE op for one problem."""
    logits = make_logits(shape, dtype, layout, device)
    target = cases.uniform(shape, dtype, device)
    weight = cases.uniform(shape[-1:], torch.float32, device) if weighted else None
    forward = (logits, target, weight, weight, reduction, loss_dtype)
    loss = op("sigmoid_bce_forward")(*forward)
    state = (torch.ones_like(loss), logits, target, weight, weight, reduction)
    calls = {"sigmoid_bce_forward": forward, "sigmoid_bce_backward": state, "sigmoid_bce_backward_target": state}
    if layout not in NOT_DENSE:
        calls["sigmoid_bce_backward_"] = state
    return calls


def all_calls(loss: str, sample: str, device: str) -> dict[str, tuple[Any, ...]]:
    if loss == "bce":
        return bce_calls(device, **BCE_SAMPLES[sample])
    return softmax_calls(device, loss, **SOFTMAX_SAMPLES[sample])


SAMPLES = [
    *(pytest.param("index", sample, id=f"index-{sample}") for sample in SOFTMAX_SAMPLES),
    *(pytest.param("probability", sample, id=f"probability-{sample}") for sample in SOFTMAX_SAMPLES),
    *(pytest.param("bce", sample, id=f"bce-{sample}") for sample in BCE_SAMPLES),
]


def test_schemas_are_the_contract() -> None:
    registered = {
        name.removeprefix("torchce::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("torchce::")
    }
    assert registered == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert op(name)._schema == torch._C.parse_schema(f"torchce::{name}{schema}"), name


@pytest.mark.parametrize("name", SCHEMAS)
def test_inductor_finds_no_decomposition(name: str) -> None:
    """It refuses to call an op that has one, in every process with the variable CI in its environment."""
    assert not torch._decomp.get_decompositions([op(name)])


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_op_has_a_sample(name: str) -> None:
    """So that the checks below leave none out."""
    assert any(name in all_calls(*parameters.values, "cpu") for parameters in SAMPLES)


@pytest.mark.parametrize(("loss", "sample"), SAMPLES)
def test_opcheck(device: str, loss: str, sample: str) -> None:
    """Schema, autograd registration, fake against real, and AOT dispatch with dynamic shapes."""
    for name, arguments in all_calls(loss, sample, device).items():
        torch.library.opcheck(op(name), arguments)


@pytest.mark.parametrize(("loss", "sample"), SAMPLES)
def test_fake_results_have_the_real_layout(device: str, loss: str, sample: str) -> None:
    """Strides too: a compiled caller lays its code out by what the fake says."""
    for name, arguments in all_calls(loss, sample, device).items():
        real = op(name)(*(a.clone() if name.endswith("_") and isinstance(a, Tensor) else a for a in arguments))
        with FakeTensorMode() as mode:
            fake_arguments = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            fake = op(name)(*fake_arguments)
        for r, f in zip(_tensors(real), _tensors(fake), strict=True):
            assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device), name


def _tensors(result: Any) -> list[Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize(("loss", "sample"), SAMPLES)
def test_in_place_backward_equals_out_of_place(device: str, loss: str, sample: str) -> None:
    """Bit for bit."""
    calls = all_calls(loss, sample, device)
    for name in [name for name in calls if name.endswith("_backward_") and name.removesuffix("_") in calls]:
        arguments = calls[name]
        expected = op(name.removesuffix("_"))(*arguments)
        logits = arguments[1].clone()
        op(name)(arguments[0], logits, *arguments[2:])
        assert_bitwise_equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_in_place_backward_at_every_remainder(device: str, kind: str, dtype: torch.dtype) -> None:
    """A tail that steps wrongly transforms an element twice: 8003 classes showed it in a public repository."""
    for classes in [*range(1, 70), 1001, 8003]:
        calls = softmax_calls(device, kind, (3, classes), dtype, reduction=NONE)
        arguments = calls["softmax_ce_backward_"]
        expected = op("softmax_ce_backward")(*arguments)
        op("softmax_ce_backward_")(*arguments)
        assert_bitwise_equal(arguments[1], expected, f"{classes} classes")


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_statistics_are_two_or_three_numbers_a_row(device: str, kind: str) -> None:
    """Maximum and sum of exp(x - maximum), kept apart; nothing of the logits' size."""
    logits = cases.normal((3, 5, 4), torch.bfloat16, device, scale=3)
    target = cases.softmax_target(kind, (3, 5, 4), torch.bfloat16, device)
    loss, statistics, totals = op("softmax_ce_forward")(logits, target, None, MEAN, -100, 0.0, None)
    assert loss.shape == ()
    assert totals.shape == (2,)
    assert statistics.shape == (2 if kind == "index" else 3, 12)
    assert statistics.dtype == torch.float32
    largest = logits.float().amax(1).flatten()
    torch.testing.assert_close(statistics[0], largest, rtol=0, atol=0)
    exponentials = (logits.float() - largest.view(3, 1, 4)).exp().sum(1).flatten()
    torch.testing.assert_close(statistics[1], exponentials)


# --- misuse: nothing is written before everything has been checked --------------------------------------------------


def wrong_calls(name: str) -> list[tuple[str, tuple[Any, ...]]]:
    """(what is wrong, arguments) for an in-place op; every one must raise and leave the logits alone."""
    if name == "softmax_ce_backward_":
        grad, logits, target, weight, statistics, totals, *rest = softmax_calls("cpu", "index", (6, 5), weighted=True)[
            name
        ]
        return [
            ("grad_output", (torch.ones(6), logits, target, weight, statistics, totals, *rest)),
            ("target", (grad, logits, target[:5], weight, statistics, totals, *rest)),
            ("target", (grad, logits, target.short(), weight, statistics, totals, *rest)),
            ("weight", (grad, logits, target, weight[:4], statistics, totals, *rest)),
            ("weight", (grad, logits, target, weight.double(), statistics, totals, *rest)),
            ("statistics", (grad, logits, target, weight, statistics[:, :5], totals, *rest)),
            ("statistics", (grad, logits, target, weight, statistics.double(), totals, *rest)),
            ("totals", (grad, logits, target, weight, statistics, totals[:1], *rest)),
            ("reduction", (grad, logits, target, weight, statistics, totals, 3, *rest[1:])),
            ("logits", (grad, logits.expand(6, 5).long(), target, weight, statistics, totals, *rest)),
        ]
    if name == "softmax_ce_forward_backward_":
        grad, logits, target, weight, *rest = softmax_calls("cpu", "index", (6, 5), weighted=True, reduction=NONE)[name]
        return [
            ("grad_output", (torch.ones(5), logits, target, weight, *rest)),
            ("grad_output", (torch.ones(6, dtype=torch.int64), logits, target, weight, *rest)),
            ("target", (grad, logits, target[:5], weight, *rest)),
            ("target", (grad, logits, target.short(), weight, *rest)),
            ("weight", (grad, logits, target, weight.double(), *rest)),
            ("reduction", (grad, logits, target, weight, MEAN, *rest[1:])),
            ("dtype", (grad, logits, target, weight, *rest[:-1], torch.int64)),
            ("logits", (grad, logits.t().clone().t()[:, ::2], target, None, *rest)),
        ]
    grad, logits, target, weight, pos_weight, reduction = bce_calls("cpu", (6, 5), weighted=True)[name]
    return [
        ("grad_output", (torch.ones(6, 5), logits, target, weight, pos_weight, reduction)),
        ("target", (grad, logits, target[:5], weight, pos_weight, reduction)),
        ("target", (grad, logits, target.half(), weight, pos_weight, reduction)),
        ("weight", (grad, logits, target, weight[:4], pos_weight, reduction)),
        ("weight", (grad, logits, target, weight.double(), pos_weight, reduction)),
        ("pos_weight", (grad, logits, target, weight, pos_weight.expand(2, 6, 5), reduction)),
        ("reduction", (grad, logits, target, weight, pos_weight, -1)),
    ]


@pytest.mark.parametrize("name", ["softmax_ce_backward_", "softmax_ce_forward_backward_", "sigmoid_bce_backward_"])
def test_misuse_raises_before_anything_is_written(name: str) -> None:
    for argument, arguments in wrong_calls(name):
        logits = arguments[1]
        before = logits.clone()
        with pytest.raises(RuntimeError, match=argument):
            op(name)(*arguments)
        assert_bitwise_equal(logits, before, argument)


@pytest.mark.parametrize("name", ["softmax_ce_backward_", "softmax_ce_forward_backward_", "sigmoid_bce_backward_"])
def test_overlapping_memory_cannot_be_overwritten(name: str) -> None:
    """Expanded logits: several elements share one place."""
    calls = (
        softmax_calls("cpu", "index", (6, 5), reduction=SUM) if name.startswith("softmax") else bce_calls("cpu", (6, 5))
    )
    grad, _, *rest = calls[name]
    with pytest.raises(RuntimeError, match="logits"):
        op(name)(grad, torch.zeros(1, 5).expand(6, 5), *rest)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_backward_with_a_bad_index_stays_in_bounds(bad: int) -> None:
    """The forward raised already; a backward called by hand may give anything for that row, but only there."""
    grad, logits, target, *rest = softmax_calls("cpu", "index", (6, 5), reduction=SUM)["softmax_ce_backward"]
    expected = op("softmax_ce_backward")(grad, logits, target, *rest)
    wrong = target.clone()
    wrong[3] = bad
    result = op("softmax_ce_backward")(grad, logits, wrong, *rest)
    others = torch.arange(6) != 3
    assert_bitwise_equal(result[others], expected[others])


@pytest.mark.parametrize("shape", [(2, 0), (0, 0), (2, 0, 3)], ids=str)
def test_no_classes_are_refused(device: str, shape: tuple[int, ...]) -> None:
    """torchce.functional sends them to torch; a kernel has no logit to read and no number of classes to divide by."""
    logits = torch.empty(shape, device=device)
    target = torch.full(cases.index_shape(shape), -100, device=device)
    with pytest.raises(RuntimeError, match=r"logits: expected at least one class, got shape \["):
        op("softmax_ce_forward")(logits, target, None, MEAN, -100, 0.0, None)
