"""The compiled ops as the dispatcher sees them: schemas, fakes, mutation, and checks that keep memory safe."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import cases
import pytest
import torch
from cases import dtype_id
from comparison import assert_bitwise_equal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchce import (
    binary_divergence,
    divergence,
    divergence_formulas,
    ops,
    sigmoid_bce,
    softmax_ce,
    softmax_ce_formulas,
)

NONE, MEAN, SUM = 0, 1, 2
NOT_DENSE = ("sliced", "channels_last_sliced", "expanded_rows")  # layouts whose memory cannot be overwritten
NO_ROWS = ("permuted_inner",)  # whose memory cannot be overwritten by rows

OPS = sorted(
    name.removeprefix("torchce::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torchce::")
    and not name.startswith("torchce::linear_")  # not compiled: test_linear_softmax_ce.py
)
PROBLEM_H = Path(__file__).resolve().parents[1] / "csrc" / "problem.h"
OPTIONS = {
    "softmax_ce": softmax_ce.Options,
    "sigmoid_bce": sigmoid_bce.Options,
    "divergence": divergence.Options,
    "binary_divergence": binary_divergence.Options,
}
PLAIN_OPS = ("softmax_ce_forward", "softmax_ce_backward", "softmax_ce_backward_")  # which take torch's own options
# Python functions that take an op's arguments, by position. Behind those that they name they may take any.
FUNCTIONS = [
    ("softmax_ce_forward", softmax_ce_formulas.composite),
    ("softmax_ce_forward", softmax_ce_formulas.decomposition),
    ("softmax_ce_forward_outputs", softmax_ce_formulas.composite_outputs),
    ("softmax_ce_forward_outputs", softmax_ce_formulas.outputs_decomposition),
    ("softmax_ce_backward_", ops.softmax_ce_backward_),
    ("softmax_ce_backward_outputs_", ops.softmax_ce_backward_outputs_),
    ("softmax_ce_forward_backward_", ops.softmax_ce_forward_backward_),
    ("sigmoid_bce_forward", sigmoid_bce.composite),
    ("sigmoid_bce_backward", sigmoid_bce.gradients),
    ("sigmoid_bce_backward_", ops.sigmoid_bce_backward_),
    ("divergence_forward", divergence_formulas.composite),
    ("divergence_forward", divergence_formulas.decomposition),
    ("binary_divergence_forward", binary_divergence.composite),
    ("binary_divergence_backward", binary_divergence.gradients),
]

Named = dict[str, Any]
PLAIN: Named = {"weight": None, "dtype": None, "reduction": MEAN, "ignore_index": -100, "label_smoothing": 0.0}

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
    "z_loss": {"shape": (6, 5), "weighted": True, "smoothing": 0.1, "z_loss": 0.1},
    "softcap": {"shape": (6, 5), "softcap": 5.0, "reduction": SUM},
    "scaled": {"shape": (6, 5), "scaled": True, "softcap": 5.0, "reduction": SUM},
    "scaled_none": {"shape": (2, 5, 3, 4), "scaled": True, "layout": "channels_last", "reduction": NONE},
    "empty": {"shape": (0, 5), "reduction": SUM},  # opcheck takes NaN, the mean, for a difference
}
PROBABILITY_SAMPLES = SOFTMAX_SAMPLES | {  # float32 beside float64
    "wide_target": {"shape": (6, 5), "target_dtype": torch.float64, "loss_dtype": torch.float64},
    "wide_logits": {"shape": (3, 5, 4), "dtype": torch.float64, "target_dtype": torch.float32},
    "wide_weight": {"shape": (6, 5), "weighted": True, "weight_dtype": torch.float64, "reduction": NONE},
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
DIVERGENCE_SAMPLES = {
    "kl": {"shape": (6, 5)},
    "kl_probabilities": {"shape": (3, 5, 4), "target_logits": False, "reduction": NONE},
    "reverse_kl": {"shape": (5,), "kind": divergence.REVERSE_KL},
    "reverse_kl_probabilities": {"shape": (6, 5), "kind": divergence.REVERSE_KL, "target_logits": False},
    "js": {"shape": (2, 5, 3, 4), "kind": divergence.JS, "layout": "channels_last"},
    "js_probabilities": {"shape": (6, 300), "kind": divergence.JS, "target_logits": False, "dtype": torch.bfloat16},
    "entropy": {"shape": (6, 5), "kind": divergence.ENTROPY, "target_logits": False, "layout": "sliced"},
    "empty": {"shape": (0, 5), "reduction": SUM},
}
BINARY_SAMPLES = {
    "kl": {"shape": (6, 5)},
    "kl_0d": {"shape": ()},
    "kl_none": {"shape": (2, 5, 3, 4), "layout": "channels_last", "reduction": NONE},
    "kl_probabilities": {"shape": (3, 5, 4), "target_logits": False, "reduction": NONE},
    "kl_bfloat16": {"shape": (6, 5), "dtype": torch.bfloat16, "layout": "sliced"},
    "entropy": {"shape": (6, 5), "entropy": True, "layout": "sliced"},
    "entropy_none": {"shape": (6, 5), "entropy": True, "reduction": NONE},
    "empty": {"shape": (0, 5), "reduction": SUM},
}


def op(name: str) -> Any:
    """As torchce.ops calls it: torch.ops.torchce's, or what --emulate-cuda has put in its place."""
    return getattr(ops, f"_{name}" if hasattr(ops, f"_{name}") else name)


def arguments_of(name: str) -> list[Any]:
    return op(name)._schema.arguments  # type: ignore[no-any-return]


def arguments(name: str, named: Named) -> tuple[Any, ...]:
    """Those that the op takes, in its order; an option that the problem leaves out has the schema's default."""
    return tuple(named.get(a.name, a.default_value) for a in arguments_of(name))


def call(name: str, named: Named) -> Any:
    return op(name)(*arguments(name, named))


def make_logits(shape: tuple[int, ...], dtype: torch.dtype, layout: str | None, device: str) -> Tensor:
    return cases.laid_out(layout, lambda s: cases.normal(s, dtype, device), shape)


def softmax_problem(
    device: str,
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    reduction: int = MEAN,
    weighted: bool = False,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    scaled: bool = False,
    loss_dtype: torch.dtype | None = None,
    target_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype = torch.float32,
) -> tuple[Named, list[str]]:
    """What every softmax op is given, by name, and the ops that take the problem."""
    classes = shape[0 if len(shape) == 1 else 1]
    named = {
        "logits": make_logits(shape, dtype, layout, device),
        "target": cases.softmax_target(kind, shape, target_dtype or dtype, device),
        "weight": cases.uniform([classes], weight_dtype, device) if weighted else None,
        "dtype": loss_dtype,
        "reduction": reduction,
        "ignore_index": -100,
        "label_smoothing": smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": 1.0,
        "returns_lse": True,
        "returns_predictions": reduction != SUM,
        "returns_entropy": reduction == SUM or scaled,
    }
    acc = ops.softmax_ce_accumulation(named["logits"], named["target"], named["weight"])
    named["scale"] = torch.tensor(0.7, dtype=acc, device=device) if scaled else None
    knows_outputs = kind == "index" or (target_dtype or dtype) == acc == torch.promote_types(dtype, torch.float32)
    forward = "softmax_ce_forward_outputs" if knows_outputs else "softmax_ce_forward"
    loss, *_, named["statistics"], named["totals"] = call(forward, named)
    named["grad_output"] = torch.ones_like(loss)
    row_shape = cases.index_shape(shape)
    ones = torch.ones(row_shape, dtype=acc, device=device)
    named["grad_lse"] = ones if z_loss or reduction == NONE else None
    named["grad_entropy"] = ones if knows_outputs and named["returns_entropy"] else None
    is_dense = layout not in NOT_DENSE + NO_ROWS
    names = []
    if not (z_loss or softcap or scaled):
        names += ["softmax_ce_forward", "softmax_ce_backward"] + ["softmax_ce_backward_"] * is_dense
    if knows_outputs:
        names += ["softmax_ce_forward_outputs", "softmax_ce_backward_outputs"]
        names += ["softmax_ce_backward_outputs_"] * is_dense
    names += ["softmax_ce_backward_scale"] * scaled
    names += ["softmax_ce_forward_backward_"] * (is_dense and reduction != MEAN and not scaled)
    if kind == "probability":
        names.append("softmax_ce_backward_target")
    return named, names


def bce_problem(
    device: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    reduction: int = MEAN,
    weighted: bool = False,
    loss_dtype: torch.dtype | None = None,
) -> tuple[Named, list[str]]:
    """What every BCE op is given, by name, and the ops that take the problem."""
    weight = cases.uniform(shape[-1:], torch.float32, device) if weighted else None
    named = {
        "logits": make_logits(shape, dtype, layout, device),
        "target": cases.uniform(shape, dtype, device),
        "weight": weight,
        "pos_weight": weight,
        "dtype": loss_dtype,
        "reduction": reduction,
    }
    named["grad_output"] = torch.ones_like(call("sigmoid_bce_forward", named))
    names = ["sigmoid_bce_forward", "sigmoid_bce_backward", "sigmoid_bce_backward_target"]
    return named, names + ["sigmoid_bce_backward_"] * (layout not in NOT_DENSE)


def divergence_problem(
    device: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    reduction: int = MEAN,
    kind: int = divergence.KL,
    target_logits: bool = True,
) -> tuple[Named, list[str]]:
    """What both ops of divergences are given, by name, and these."""
    target = make_logits(shape, dtype, layout, device) * 2
    named = {
        "input": make_logits(shape, dtype, layout, device),
        "target": None
        if kind == divergence.ENTROPY
        else target
        if target_logits
        else target.softmax(min(1, len(shape) - 1)),
        "mask": torch.ones(cases.index_shape(shape), dtype=torch.bool, device=device),
        "dtype": None,
        "needs_input": True,
        "needs_target": kind != divergence.ENTROPY,
        "kind": kind,
        "reduction": reduction,
        "target_logits": target_logits,
        "temperature": 1.5,
        "beta": 0.3,
    }
    loss, named["statistics"], named["totals"] = call("divergence_forward", named)
    named["grad_output"] = torch.ones_like(loss)
    return named, ["divergence_forward", "divergence_backward"]


def binary_problem(
    device: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    reduction: int = MEAN,
    target_logits: bool = True,
    entropy: bool = False,
) -> tuple[Named, list[str]]:
    """What the ops of binary divergences are given, by name, and these."""
    target = make_logits(shape, dtype, layout, device) * 2
    named = {
        "input": make_logits(shape, dtype, layout, device),
        "target": None if entropy else target if target_logits else target.sigmoid(),
        "dtype": None,
        "reduction": reduction,
        "target_logits": target_logits,
    }
    named["grad_output"] = torch.ones_like(call("binary_divergence_forward", named))
    names = ["binary_divergence_forward", "binary_divergence_backward"]
    return named, names + ["binary_divergence_backward_target"] * (not entropy)


def problem_of(loss: str, sample: str, device: str) -> tuple[Named, list[str]]:
    if loss == "bce":
        return bce_problem(device, **BCE_SAMPLES[sample])
    if loss == "divergence":
        return divergence_problem(device, **DIVERGENCE_SAMPLES[sample])
    if loss == "binary":
        return binary_problem(device, **BINARY_SAMPLES[sample])
    return softmax_problem(device, loss, **PROBABILITY_SAMPLES[sample])


SAMPLES = [
    *(pytest.param("index", sample, id=f"index-{sample}") for sample in SOFTMAX_SAMPLES),
    *(pytest.param("probability", sample, id=f"probability-{sample}") for sample in PROBABILITY_SAMPLES),
    *(pytest.param("bce", sample, id=f"bce-{sample}") for sample in BCE_SAMPLES),
    *(pytest.param("divergence", sample, id=f"divergence-{sample}") for sample in DIVERGENCE_SAMPLES),
    *(pytest.param("binary", sample, id=f"binary-{sample}") for sample in BINARY_SAMPLES),
]


@pytest.mark.parametrize("name", OPS)
def test_options_are_the_end_of_every_schema(name: str) -> None:
    """The same fields, types and defaults in the same order; no op is without them."""
    (options,) = [options for stem, options in OPTIONS.items() if name.startswith(stem)]  # no stem begins another
    fields = options._fields[: softmax_ce_formulas.N_PLAIN] if name in PLAIN_OPS else options._fields
    types = get_type_hints(options)
    last = arguments_of(name)[-len(fields) :]
    assert [(a.name, str(a.type)) for a in last] == [(field, types[field].__name__) for field in fields]
    defaults = {a.name: a.default_value for a in last if a.has_default_value()}
    assert defaults.items() <= options._field_defaults.items()


@pytest.mark.skipif(not PROBLEM_H.is_file(), reason="these tests stand beside an installed wheel, not its source")
@pytest.mark.parametrize("stem", OPTIONS)
def test_options_of_kernels_are_in_the_same_order(stem: str) -> None:
    """boxing.h reads them one after another, and counts them only."""
    structs = PROBLEM_H.read_text().partition(f"namespace {stem} {{")[2].split("kFields{")[1:]
    fields = [re.findall(r"&Options::(\w+)", struct.partition("}")[0]) for struct in structs]
    assert fields[0] == list(OPTIONS[stem]._fields)
    assert stem != "softmax_ce" or fields[1] == list(softmax_ce.Options._fields[: softmax_ce_formulas.N_PLAIN])


@pytest.mark.parametrize("name", OPS)
def test_only_what_a_name_says_is_written(name: str) -> None:
    written = [a.name for a in arguments_of(name) if a.alias_info is not None and a.alias_info.is_write]
    assert written == (["logits"] if name.endswith("_") else [])


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=lambda value: getattr(value, "__qualname__", value))
def test_signatures_follow_the_schema(name: str, function: Callable[..., Any]) -> None:
    assert_follows([str(p).partition(":")[0] for p in inspect.signature(function).parameters.values()], name)


def test_fakes_follow_the_schema() -> None:
    fakes = dict(re.findall(r'register_fake\("torchce::(\w+)"\)\ndef _\((.*)\):', inspect.getsource(ops)))
    assert sorted(fakes) == OPS
    for name, parameters in fakes.items():
        assert_follows(parameters.split(", "), name)


def assert_follows(parameters: list[str], name: str) -> None:
    """All arguments, or the first ones and a parameter for the rest."""
    schema = [a.name for a in arguments_of(name)]
    first = [parameter for parameter in parameters if not parameter.startswith("*")]
    assert first == schema[: len(first)]
    assert len(first) < len(parameters) or first == schema


@pytest.mark.parametrize(("name", "function"), [pair for pair in FUNCTIONS if pair[0].endswith("_")], ids=str)
def test_wrappers_take_arguments_by_name(name: str, function: Callable[..., Any]) -> None:
    named, expected = in_place_problem(name), in_place_problem(name)
    result = function(**{a.name: named[a.name] for a in arguments_of(name)})
    wanted = call(name, expected)
    for r, w in zip([*_tensors(result), named["logits"]], [*_tensors(wanted), expected["logits"]], strict=True):
        assert_bitwise_equal(r, w)


@pytest.mark.parametrize("name", OPS)
def test_inductor_finds_no_decomposition(name: str) -> None:
    """It refuses to call an op that has one, in every process with the variable CI in its environment."""
    assert not torch._decomp.get_decompositions([op(name)])


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_sample(name: str) -> None:
    """So that the checks below leave none out."""
    assert any(name in problem_of(*parameters.values, "cpu")[1] for parameters in SAMPLES)


@pytest.mark.parametrize(("loss", "sample"), SAMPLES)
def test_opcheck(device: str, loss: str, sample: str) -> None:
    """Schema, autograd registration, fake against real, and AOT dispatch with dynamic shapes."""
    named, names = problem_of(loss, sample, device)
    for name in names:
        torch.library.opcheck(op(name), arguments(name, named))


@pytest.mark.parametrize(("loss", "sample"), SAMPLES)
def test_fake_results_have_the_real_layout(device: str, loss: str, sample: str) -> None:
    """Strides too: a compiled caller lays its code out by what the fake says."""
    named, names = problem_of(loss, sample, device)
    for name in names:
        real = call(name, overwritable(named) if name.endswith("_") else named)
        with FakeTensorMode() as mode:
            fake = call(name, {k: mode.from_tensor(a) if isinstance(a, Tensor) else a for k, a in named.items()})
        for r, f in zip(_tensors(real), _tensors(fake), strict=True):
            assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device), name


def overwritable(named: Named) -> Named:
    """The problem with logits of its own."""
    return named | {"logits": named["logits"].clone()}


def _tensors(result: Any) -> list[Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize(("loss", "sample"), SAMPLES)
def test_in_place_backward_equals_out_of_place(device: str, loss: str, sample: str) -> None:
    """Bit for bit."""
    named, names = problem_of(loss, sample, device)
    for name in ("softmax_ce_backward_", "softmax_ce_backward_outputs_", "sigmoid_bce_backward_"):
        if name in names:
            expected = call(name.removesuffix("_"), named)
            overwritten = overwritable(named)
            call(name, overwritten)
            assert_bitwise_equal(overwritten["logits"], expected)


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_a_scale_beside_a_number(device: str, kind: str) -> None:
    """Which it multiplies: in values, and in its own gradient."""
    named, _ = softmax_problem(device, kind, (6, 40), torch.float64, softcap=5.0, scaled=True, reduction=SUM)
    named["logit_scale"] = 1.3
    *outputs, named["statistics"], named["totals"] = call("softmax_ce_forward_outputs", named)
    formulas = {
        "softmax_ce_backward_outputs": softmax_ce._outputs_gradient,
        "softmax_ce_backward_scale": softmax_ce._scale_gradient,
    }
    expected = softmax_ce_formulas.composite_outputs(*arguments("softmax_ce_forward_outputs", named))
    torch.testing.assert_close(outputs, list(expected))
    for name, formula in formulas.items():
        torch.testing.assert_close(call(name, named), formula(*arguments(name, named)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_in_place_backward_at_every_remainder(device: str, kind: str, dtype: torch.dtype) -> None:
    """A tail that steps wrongly transforms an element twice: 8003 classes showed it in a public repository."""
    for classes in [*range(1, 70), 1001, 8003]:
        named, _ = softmax_problem(device, kind, (3, classes), dtype, reduction=NONE)
        expected = call("softmax_ce_backward", named)
        call("softmax_ce_backward_", named)
        assert_bitwise_equal(named["logits"], expected, f"{classes} classes")


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_statistics_are_two_or_three_numbers_a_row(device: str, kind: str) -> None:
    """Maximum and sum of exp(x - maximum), kept apart; nothing of the logits' size."""
    logits = cases.normal((3, 5, 4), torch.bfloat16, device, scale=3)
    target = cases.softmax_target(kind, (3, 5, 4), torch.bfloat16, device)
    loss, statistics, totals = call("softmax_ce_forward", PLAIN | {"logits": logits, "target": target})
    assert loss.shape == ()
    assert totals.shape == (2,)
    assert statistics.shape == (2 if kind == "index" else 3, 12)
    assert statistics.dtype == torch.float32
    largest = logits.float().amax(1).flatten()
    torch.testing.assert_close(statistics[0], largest, rtol=0, atol=0)
    exponentials = (logits.float() - largest.view(3, 1, 4)).exp().sum(1).flatten()
    torch.testing.assert_close(statistics[1], exponentials)


# --- misuse: nothing is written before everything has been checked --------------------------------------------------


IN_PLACE = [name for name in OPS if name.endswith("_")]


def in_place_problem(name: str, weighted: bool = False) -> Named:
    if name.startswith("sigmoid"):
        return bce_problem("cpu", (6, 5), weighted=weighted)[0]
    reduction = NONE if name == "softmax_ce_forward_backward_" else MEAN
    return softmax_problem("cpu", "index", (6, 5), weighted=weighted, reduction=reduction)[0]


def wrong_arguments(name: str, named: Named) -> list[tuple[str, Any]]:
    """(argument, what is wrong); the op must raise for every one and leave the logits alone."""
    logits, target, weight = named["logits"], named["target"], named["weight"]
    wrong = [("target", target[:5]), ("weight", weight[:4]), ("weight", weight.double()), ("reduction", 3)]
    if name == "sigmoid_bce_backward_":
        return [
            *wrong,
            ("grad_output", torch.ones(6, 5)),
            ("target", target.half()),
            ("pos_weight", weight.expand(2, 6, 5)),
            ("reduction", -1),
        ]
    wrong.append(("target", target.short()))
    if name == "softmax_ce_forward_backward_":
        return [
            *wrong,
            ("grad_output", torch.ones(5)),
            ("grad_output", torch.ones(6, dtype=torch.int64)),
            ("reduction", MEAN),
            ("dtype", torch.int64),
            ("logits", logits.t().clone().t()[:, ::2]),
        ]
    return [
        *wrong,
        ("grad_output", torch.ones(6)),
        ("statistics", named["statistics"][:, :5]),
        ("statistics", named["statistics"].double()),
        ("totals", named["totals"][:1]),
        ("logits", logits.expand(6, 5).long()),
    ]


@pytest.mark.parametrize("name", IN_PLACE)
def test_misuse_raises_before_anything_is_written(name: str) -> None:
    named = in_place_problem(name, weighted=True)
    for argument, value in wrong_arguments(name, named):
        wrong = named | {argument: value} | ({"weight": None} if argument == "logits" else {})
        before = wrong["logits"].clone()
        with pytest.raises(RuntimeError, match=argument):
            call(name, wrong)
        assert_bitwise_equal(wrong["logits"], before, argument)


SAME_OR_FLOAT32 = "target: expected probabilities of the logits' dtype or float32, got"
BESIDE_FLOAT64 = "target: expected float32 or float64 beside another float64 operand, and such logits, got"


@pytest.mark.parametrize(
    ("dtype", "target_dtype", "weight_dtype", "message"),
    [
        (torch.float32, torch.bfloat16, None, f"{SAME_OR_FLOAT32} BFloat16 for logits of Float"),
        (torch.bfloat16, torch.float16, None, f"{SAME_OR_FLOAT32} Half for logits of BFloat16"),
        (torch.bfloat16, torch.float64, None, f"{BESIDE_FLOAT64} Double for logits of BFloat16"),
        (torch.float64, torch.bfloat16, None, f"{BESIDE_FLOAT64} BFloat16 for logits of Double"),
        (
            *(torch.bfloat16, torch.float32, torch.float64),
            f"{BESIDE_FLOAT64} Float for logits of BFloat16 and a weight of Double",
        ),
    ],
    ids=str,
)
def test_pairs_of_dtypes_without_kernels_are_refused(
    dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: torch.dtype | None, message: str
) -> None:
    """torchce.functional converts what is of 16 bits."""
    logits, target = cases.normal((6, 5), dtype, "cpu"), cases.probabilities((6, 5), target_dtype, "cpu")
    weight = None if weight_dtype is None else torch.ones(5, dtype=weight_dtype)
    with pytest.raises(RuntimeError, match=message):
        call("softmax_ce_forward", PLAIN | {"logits": logits, "target": target, "weight": weight})


@pytest.mark.parametrize("name", IN_PLACE)
def test_overlapping_memory_cannot_be_overwritten(name: str) -> None:
    """Expanded logits: several elements share one place."""
    with pytest.raises(RuntimeError, match="logits"):
        call(name, in_place_problem(name) | {"logits": torch.zeros(1, 5).expand(6, 5)})


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_backward_with_a_bad_index_stays_in_bounds(bad: int) -> None:
    """The forward raised already; a backward called by hand may give anything for that row, but only there."""
    named, _ = softmax_problem("cpu", "index", (6, 5), reduction=SUM)
    wrong = named["target"].clone()
    wrong[3] = bad
    result = call("softmax_ce_backward", named | {"target": wrong})
    others = torch.arange(6) != 3
    assert_bitwise_equal(result[others], call("softmax_ce_backward", named)[others])


@pytest.mark.parametrize("shape", [(2, 0), (0, 0), (2, 0, 3)], ids=str)
def test_no_classes_are_refused(device: str, shape: tuple[int, ...]) -> None:
    """torchce.functional sends them to torch; a kernel has no logit to read and no number of classes to divide by."""
    logits = torch.empty(shape, device=device)
    target = torch.full(cases.index_shape(shape), -100, device=device)
    with pytest.raises(RuntimeError, match=r"logits: expected at least one class, got shape \["):
        call("softmax_ce_forward", PLAIN | {"logits": logits, "target": target})
