"""torch's semantics, exactly: signatures, dtypes, autocast, legacy arguments, odd argument types, fallbacks and errors.

Wherever torch has an answer it is asked on the spot, so a change of torch shows here.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cases
import numpy
import pytest
import torch
import torch.nn.functional as theirs
from cases import dtype_id
from comparison import assert_bitwise_equal, check_sigmoid_bce, check_softmax_ce
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchce.functional as ours

LOSSES = ["cross_entropy", "binary_cross_entropy_with_logits"]


def both(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return getattr(ours, name), getattr(theirs, name)


def problem(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A small (logits, target) of the loss named."""
    logits = cases.normal((6, 5), dtype, device, scale=3)
    if name == "cross_entropy":
        return logits, cases.indices([6], 5, torch.int64, device)
    return logits, cases.uniform((6, 5), dtype, device)


# --- signatures and reductions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_signature_extends_torchs(name: str) -> None:
    """The same names, order and defaults; everything more is keyword-only and optional."""
    our_parameters, their_parameters = (
        list(inspect.signature(function).parameters.values()) for function in both(name)
    )
    for our, their in zip(our_parameters, their_parameters, strict=False):
        assert (our.name, our.default, our.kind) == (their.name, their.default, their.kind)
    for extra in our_parameters[len(their_parameters) :]:
        assert extra.kind == inspect.Parameter.KEYWORD_ONLY
        assert extra.default is not inspect.Parameter.empty


def test_every_argument_by_position() -> None:
    logits, target = problem("cross_entropy")
    weight = cases.uniform([5], torch.float32, "cpu")
    arguments = (logits, target, weight, None, 1, None, "sum", 0.1)
    torch.testing.assert_close(ours.cross_entropy(*arguments), theirs.cross_entropy(*arguments))
    arguments = (logits, logits.sigmoid(), weight, None, None, "sum", weight * 3)
    torch.testing.assert_close(
        ours.binary_cross_entropy_with_logits(*arguments), theirs.binary_cross_entropy_with_logits(*arguments)
    )


@pytest.mark.parametrize("reduction", ["mean", "no such thing"])
@pytest.mark.parametrize("reduce", [None, False, True])
@pytest.mark.parametrize("size_average", [None, False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_legacy_arguments(name: str, size_average: bool | None, reduce: bool | None, reduction: str) -> None:
    """They override even a bad reduction, with torch's warning word for word."""
    if size_average is None and reduce is None:
        if reduction == "mean":
            return  # nothing legacy about it
        with pytest.raises(ValueError, match="no such thing"):
            getattr(ours, name)(*problem(name), reduction=reduction)
        return
    options = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    results, messages = [], []
    for function in both(name):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(function(*problem(name), **options))
        messages.append([(warning.category, str(warning.message)) for warning in caught])
    assert messages[0] == messages[1]
    assert len(messages[0]) == 1
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", LOSSES)
def test_elementwise_mean_works_with_a_warning(name: str) -> None:
    function, torch_function = both(name)
    with pytest.warns(UserWarning, match="elementwise_mean"):
        result = function(*problem(name), reduction="elementwise_mean")
    torch.testing.assert_close(result, torch_function(*problem(name)))


# --- the short way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_a_plain_loss_is_not_questioned(
    device: str, kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small losses would take half as long again."""

    def fail(*_: object) -> None:
        raise AssertionError("was questioned")

    monkeypatch.setattr("torchce.functional.softmax_ce.problem_of", fail)
    weight = cases.uniform([5], torch.float32, device) if weighted else None
    target = cases.softmax_target(kind, (6, 5), torch.float32, device)
    check_softmax_ce(cases.normal((6, 5), torch.float32, device), target, weight=weight, label_smoothing=0.1)


# --- dtypes under autocast ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_autocast_cross_entropy(device: str, kind: str, reduction: str, dtype: torch.dtype) -> None:
    """float32 for everything but float64: exact to float32, though the logits are read in 16 bits."""
    target = cases.softmax_target(kind, (6, 21), dtype, device)
    logits = cases.normal((6, 21), dtype, device, scale=3)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = check_softmax_ce(logits, target, target_grad=kind == "probability", reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("target_dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_autocast_probabilities(
    device: str, dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    """torch's autocast leaves float64 as it is, and then the loss is of it."""
    logits, target = cases.normal((6, 21), dtype, device, scale=3), cases.probabilities((6, 21), target_dtype, device)
    weight = None if weight_dtype is None else cases.uniform([21], weight_dtype, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = check_softmax_ce(logits, target, target_grad=True, weight=weight)
    wide = torch.float64 in (dtype, target_dtype, weight_dtype)
    assert loss.dtype == (torch.float64 if wide else torch.float32)


@pytest.mark.parametrize("target_dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_bce(device: str, reduction: str, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    logits = cases.normal((6, 21), dtype, device, scale=3)
    target = cases.uniform((6, 21), target_dtype, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        check_sigmoid_bce(logits, target, target_grad=True, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_takes_weights(device: str, dtype: torch.dtype) -> None:
    weight = cases.uniform([21], dtype, device)
    logits = cases.normal((6, 21), dtype, device, scale=3)
    with torch.autocast(device, dtype=torch.bfloat16):
        indices = cases.indices([6], 21, torch.int64, device)
        check_softmax_ce(logits.float(), indices, weight=weight.float(), label_smoothing=0.1)
        loss = ours.cross_entropy(logits, indices, weight)
        assert loss.dtype == torch.float32
        check_sigmoid_bce(logits, cases.uniform((6, 21), dtype, device), weight=weight, pos_weight=weight)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_disabled_inside(name: str) -> None:
    logits, target = problem(name, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert getattr(ours, name)(logits, target).dtype == torch.bfloat16


# --- odd argument types and values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [0.1, 1, True, numpy.float32(0.1), numpy.float64(0.1), torch.tensor(0.1), torch.tensor(1)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_label_smoothing_types(kind: str, value: Any) -> None:
    logits, target = (
        cases.normal((6, 5), torch.float32, "cpu"),
        cases.softmax_target(kind, (6, 5), torch.float32, "cpu"),
    )
    torch.testing.assert_close(
        ours.cross_entropy(logits, target, label_smoothing=value),
        theirs.cross_entropy(logits, target, label_smoothing=value),
    )


@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_label_smoothing_that_is_not_positive_is_none(value: float) -> None:
    logits, target = problem("cross_entropy")
    expected = ours.cross_entropy(logits, target)
    assert_bitwise_equal(ours.cross_entropy(logits, target, label_smoothing=value), expected)
    assert theirs.cross_entropy(logits, target, label_smoothing=value) == theirs.cross_entropy(logits, target)


@pytest.mark.parametrize(
    "value",
    [1, numpy.int64(1), numpy.int32(1), torch.tensor(1), torch.tensor([1])],
    ids=["int", "numpy.int64", "numpy.int32", "0-d", "1-d"],
)
def test_ignore_index_types(value: Any) -> None:
    logits, target = problem("cross_entropy")
    target[::2] = 1
    torch.testing.assert_close(
        ours.cross_entropy(logits, target, ignore_index=value),
        theirs.cross_entropy(logits, target, ignore_index=value),
    )


def test_negative_ignore_index_is_taken_with_probabilities() -> None:
    logits, target = cases.normal((6, 5), torch.float32, "cpu"), cases.probabilities((6, 5), torch.float32, "cpu")
    expected = ours.cross_entropy(logits, target)
    assert_bitwise_equal(ours.cross_entropy(logits, target, ignore_index=-5), expected)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_one_target_in_a_row_for_unbatched_logits(reduction: str) -> None:
    """Logits [C] with target [1]: torch takes it and gives a scalar."""
    logits, target = cases.normal([5], torch.float32, "cpu"), torch.tensor([3])
    result, expected = (f(logits, target, reduction=reduction) for f in both("cross_entropy"))
    assert result.shape == expected.shape == ()
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("weight_dtype", [torch.int64, torch.bool], ids=dtype_id)
def test_integer_weight_with_probabilities(weight_dtype: torch.dtype) -> None:
    logits, target = cases.normal((6, 5), torch.float32, "cpu"), cases.probabilities((6, 5), torch.float32, "cpu")
    weight = torch.tensor([1, 0, 1, 1, 0]).to(weight_dtype)
    result, expected = (f(logits, target, weight) for f in both("cross_entropy"))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_requires_grad_follows_the_inputs(name: str) -> None:
    logits, target = problem(name)
    function = getattr(ours, name)
    assert not function(logits, target).requires_grad
    assert function(logits.requires_grad_(), target).requires_grad
    with torch.no_grad():
        assert not function(logits, target).requires_grad
    if target.is_floating_point():
        assert function(logits.detach(), target.requires_grad_()).requires_grad


# --- what the kernels do not take gives torch's own answer ----------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_lazy_negative_views_are_resolved(name: str) -> None:
    logits, target = problem(name)
    result = getattr(ours, name)(torch._neg_view(logits), target)
    torch.testing.assert_close(result, getattr(ours, name)(-logits, target))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_meta_tensors(name: str, reduction: str) -> None:
    logits, target = (tensor.to("meta") for tensor in problem(name))
    result, expected = (f(logits, target, reduction=reduction) for f in both(name))
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)


class Marked(Tensor):
    """A subclass without behaviour of its own."""


@pytest.mark.parametrize("which", [0, 1], ids=["input", "target"])
@pytest.mark.parametrize("name", LOSSES)
def test_tensor_subclasses_come_out_again(name: str, which: int) -> None:
    arguments = list(problem(name))
    arguments[which] = arguments[which].as_subclass(Marked)
    result, expected = (function(*arguments) for function in both(name))
    assert type(result) is type(expected) is Marked
    torch.testing.assert_close(result.as_subclass(Tensor), expected.as_subclass(Tensor))


@pytest.mark.parametrize("name", LOSSES)
def test_torch_function_modes_see_the_call(name: str) -> None:
    seen: list[str] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Recorder():
        result = getattr(ours, name)(*problem(name))
    assert name in seen
    torch.testing.assert_close(result, getattr(theirs, name)(*problem(name)))


@pytest.mark.parametrize("name", LOSSES)
def test_dispatch_modes_see_the_op(name: str) -> None:
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    logits, target = problem(name)
    with Recorder():
        getattr(ours, name)(logits.requires_grad_(), target).backward()
    op = "softmax_ce" if name == "cross_entropy" else "sigmoid_bce"
    assert f"torchce.{op}_forward.default" in seen
    assert f"torchce.{op}_backward.default" in seen


@pytest.mark.parametrize("name", LOSSES)
def test_default_device_context_changes_nothing(name: str) -> None:
    """A helper tensor made inside must not land on the default device."""
    logits, target = problem(name)
    logits.requires_grad_()
    with torch.device("meta"):
        loss = getattr(ours, name)(logits, target)
        loss.backward()
    assert loss.device.type == "cpu"
    assert logits.grad is not None
    assert logits.grad.device.type == "cpu"
    torch.testing.assert_close(loss.detach(), getattr(theirs, name)(logits.detach(), target))


def test_complex_bce_target_is_torchs() -> None:
    logits = cases.normal((6, 5), torch.float32, "cpu")
    target = logits.sigmoid().to(torch.complex64)
    result, expected = (f(logits, target) for f in both("binary_cross_entropy_with_logits"))
    assert result.dtype == expected.dtype == torch.complex64
    torch.testing.assert_close(result, expected)


def test_weight_gradient_with_probabilities() -> None:
    """The one weight torch differentiates."""
    logits, target = cases.normal((6, 5), torch.float64, "cpu"), cases.probabilities((6, 5), torch.float64, "cpu")
    gradients = []
    for function in both("cross_entropy"):
        weight = cases.uniform([5], torch.float64, "cpu").requires_grad_()
        gradients.append(torch.autograd.grad(function(logits, target, weight), weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


# --- errors ---------------------------------------------------------------------------------------------------------


class Wrong(NamedTuple):
    """A call that must fail as torch's does, with a message that says what and names both values."""

    id: str
    loss: str
    input: Any
    target: Any
    options: dict[str, Any]
    message: tuple[str, ...]  # regular expressions, every one found in the message, case ignored


def ce(id: str, input: Any, target: Any, *message: str, **options: Any) -> Wrong:
    return Wrong(f"ce_{id}", "cross_entropy", input, target, options, message)


def bce(id: str, input: Any, target: Any, *message: str, **options: Any) -> Wrong:
    return Wrong(f"bce_{id}", "binary_cross_entropy_with_logits", input, target, options, message)


def number(value: int) -> str:
    return rf"(?<!\d){value}(?!\d)"


X = torch.linspace(-2, 2, 20).reshape(4, 5)  # [N, C] = [4, 5]
X3 = torch.linspace(-2, 2, 30).reshape(2, 5, 3)  # [N, C, d] = [2, 5, 3]
Y = torch.tensor([0, 1, 4, 2])
P = torch.full((4, 5), 0.2)


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


WRONG = [
    # shapes
    ce("batch_sizes_differ", X, Y[:2], "target", number(4), number(2)),
    ce("inner_sizes_differ", X3, ones(2, 4, dtype=torch.int64), "target", number(3), number(4)),
    ce("target_lacks_a_dimension", X3, ones(2, dtype=torch.int64), "target", number(3)),
    ce("target_has_a_dimension_more", X, ones(4, 1, dtype=torch.int64), "target", number(1)),
    ce("probability_classes_differ", X, ones(4, 6), "target", number(5), number(6)),
    ce("probability_rows_differ", X, ones(3, 5), "target", number(4), number(3)),
    ce("probabilities_lack_a_dimension", X, ones(4), "target"),
    ce("scalar_logits", torch.tensor(1.0), torch.tensor(0)),
    ce("weight_too_short", X, Y, "weight", number(5), number(4), weight=ones(4)),
    ce("weight_too_long", X, Y, "weight", number(5), number(6), weight=ones(6)),
    ce("weight_of_two_dimensions", X, Y, "weight", number(5), number(1), weight=ones(1, 5)),
    ce("weight_scalar", X, Y, "weight", number(5), weight=ones()),
    ce("weight_too_short_for_probabilities", X, P, "weight", number(5), number(4), weight=ones(4)),
    bce("sizes_differ", X, ones(4, 1), "target", number(5), number(1)),
    bce("ranks_differ", X, ones(20), "target", number(20), number(5)),
    bce("weight_does_not_broadcast", X, P, "weight", number(5), number(4), weight=ones(4)),
    bce("weight_with_a_leading_1", X, P, "weight", number(1), number(4), number(5), weight=ones(1, 4, 5)),
    bce("weight_that_would_enlarge", X[:1], P[:1], "weight", number(4), number(1), weight=ones(4, 5)),
    bce("pos_weight_does_not_broadcast", X, P, "pos_weight", number(5), number(4), pos_weight=ones(4)),
    bce("pos_weight_with_a_leading_1", X, P, "pos_weight", number(1), number(4), pos_weight=ones(1, 4, 5)),
    # dtypes
    ce("int16_target", X, Y.short(), "target", "short|int16"),
    ce("bool_target", X, Y.bool(), "target", "bool"),
    ce("integer_target_of_the_logits_shape", X, P.long(), "target", "long|int64"),
    ce("integer_logits", X.long(), Y),
    ce("complex_logits", X.to(torch.complex64), Y),
    ce("integer_weight", X, Y, "weight", "long|int64", weight=ones(5, dtype=torch.int64)),
    bce("integer_logits", X.long(), P),
    bce("bool_pos_weight", X, P, "bool", pos_weight=ones(5, dtype=torch.bool)),
    bce("complex_weight", X, P, "complex", weight=ones(5, dtype=torch.complex64)),
    # values
    ce("smoothing_above_1", X, Y, "label_smoothing", "1.5", label_smoothing=1.5),
    ce("smoothing_above_1_with_probabilities", X, P, "label_smoothing", "1.5", label_smoothing=1.5),
    ce("reduction_unknown", X, Y, "reduction", "sideways", reduction="sideways"),
    ce("reduction_upper_case", X, Y, "reduction", "MEAN", reduction="MEAN"),
    ce("reduction_None", X, Y, "reduction", "None", reduction=None),
    bce("reduction_unknown", X, P, "reduction", "sideways", reduction="sideways"),
    ce("ignore_index_with_probabilities", X, P, "ignore_index", number(2), ignore_index=2),
    ce("target_too_large", X, torch.tensor([0, 5, 1, 2]), "target", number(5), number(1)),
    ce("target_negative", X, torch.tensor([0, 1, 2, -1]), "target", "-1", number(3)),
    ce("target_huge", X, torch.tensor([0, 1, 2**40, 0]), "target", str(2**40), number(2)),
    ce("target_minus_100_once_another_is_ignored", X, torch.tensor([0, -100, 1, 1]), "-100", number(1), ignore_index=0),
    ce("target_too_large_with_smoothing", X, torch.tensor([0, 5, 1, 2]), "target", number(5), label_smoothing=0.1),
    ce("target_too_large_with_weight", X, torch.tensor([0, 5, 1, 2]), "target", number(5), weight=ones(5)),
    ce("target_too_large_in_3d", X3, torch.tensor([[0, 1, 2], [3, 7, 4]]), "target", number(7), number(4)),
    ce("target_too_large_unbatched", X[0], torch.tensor(7), "target", number(7)),
    ce("no_class_at_all", X[:, :0], Y * 0, "target", number(0)),
    # types
    ce("input_is_a_list", [1.0, 2.0], Y, "input"),
    ce("target_is_an_int", X, 3, "target"),
    ce("weight_is_a_float", X, Y, "weight", weight=1.0),
    ce("smoothing_is_a_string", X, Y, "label_smoothing", "str", label_smoothing="a"),
    ce("smoothing_is_None", X, Y, "label_smoothing", "None", label_smoothing=None),
    ce("smoothing_has_a_dimension", X, Y, "label_smoothing", label_smoothing=torch.tensor([0.1])),
    ce("smoothing_requires_grad", X, Y, "label_smoothing", label_smoothing=torch.tensor(0.1, requires_grad=True)),
    ce("ignore_index_is_a_bool", X, Y, "ignore_index", "bool", ignore_index=True),
    ce("ignore_index_is_a_float", X, Y, "ignore_index", "float", ignore_index=1.0),
    ce("ignore_index_is_None", X, Y, "ignore_index", "None", ignore_index=None),
    bce("weight_is_a_float", X, P, "weight", weight=1.0),
    bce("pos_weight_is_a_float", X, P, "pos_weight", pos_weight=1.0),
    # devices
    ce("target_elsewhere", X, Y.to("meta"), "target", "cpu", "meta"),
    ce("probabilities_elsewhere", X, P.to("meta"), "target", "cpu", "meta"),
    ce("weight_elsewhere", X, Y, "weight", "cpu", "meta", weight=ones(5, device="meta")),
    bce("target_elsewhere", X, P.to("meta"), "target", "cpu", "meta"),
    bce("weight_elsewhere", X, P, "weight", "cpu", "meta", weight=ones(5, device="meta")),
    bce("pos_weight_elsewhere", X, P, "pos_weight", "cpu", "meta", pos_weight=ones(5, device="meta")),
    # gradients that torch does not give
    ce("weight_requires_grad_with_indices", X, Y, "weight", weight=torch.ones(5, requires_grad=True)),
    bce("weight_requires_grad", X, P, "weight", weight=torch.ones(5, requires_grad=True)),
    bce("pos_weight_requires_grad", X, P, "pos_weight", pos_weight=torch.ones(5, requires_grad=True)),
]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.id)
def test_error(wrong: Wrong, grad: bool) -> None:
    """torch's own exception class, and a message that tells the argument and both values."""
    function, torch_function = both(wrong.loss)

    def logits() -> Any:
        may_require = isinstance(wrong.input, Tensor) and wrong.input.dtype != torch.int64
        return wrong.input.clone().requires_grad_(grad) if may_require else wrong.input

    with pytest.raises(Exception) as torchs:  # noqa: PT011  (which one is what is asked)
        torch_function(logits(), wrong.target, **wrong.options)
    with pytest.raises(Exception) as raised:  # noqa: PT011  (compared below)
        function(logits(), wrong.target, **wrong.options)
    assert raised.type is torchs.type, f"{raised.value!r}, torch: {torchs.value!r}"
    for pattern in wrong.message:
        assert re.search(pattern, str(raised.value), re.IGNORECASE), f"no {pattern!r} in: {raised.value}"


@pytest.mark.cuda
@pytest.mark.parametrize("name", LOSSES)
def test_error_on_a_target_left_on_the_cpu(name: str) -> None:
    logits, target = problem(name)
    with pytest.raises(RuntimeError, match=r"(?s)target.*cpu|cpu.*target"):
        getattr(ours, name)(logits.cuda(), target)


@pytest.mark.parametrize("target_dtype", cases.INDEX_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(300, 5), (3, 5, 100)], ids=["2d", "3d"])
def test_bad_index_is_reported_the_same_for_any_thread_count(
    shape: tuple[int, ...], target_dtype: torch.dtype, restore_threads: None
) -> None:
    """Two rows are bad; the first is named, whoever finds which first."""
    logits = cases.normal(shape, torch.float32, "cpu")
    target = cases.indices(cases.index_shape(shape), 5, target_dtype, "cpu")
    target.view(-1)[[111, 222]] = torch.tensor([77, 88]).to(target_dtype)
    for threads in (1, 2, 5, 8):
        torch.set_num_threads(threads)
        with pytest.raises(IndexError) as raised:
            ours.cross_entropy(logits, target)
        assert re.search(number(77), str(raised.value))
        assert re.search(number(111), str(raised.value))


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_target_check_for_cuda_words_it_as_the_cpu_kernels(bad: int) -> None:
    """What TORCHCE_CHECK_TARGETS=1 runs there, here beside what the CPU says by itself."""
    logits = cases.normal((2, 5, 3), torch.float32, "cpu")
    target = torch.tensor([[0, 4, -100], [1, bad, bad]])
    with pytest.raises(IndexError) as kernels:
        ours.cross_entropy(logits, target)
    with pytest.raises(IndexError) as check:
        ours.check_targets(target, 5, -100)
    assert str(check.value) == str(kernels.value)
    ours.check_targets(target.clamp(0, 4), 5, -100)


@pytest.mark.parametrize("shape", [(37, 5), (1, 5, 300), (37, 100)], ids=str)
def test_every_position_of_a_bad_index_is_found(shape: tuple[int, ...]) -> None:
    """And named, among ignored rows and beside a weight of NaN; also where a shortcut could skip the check."""
    logits = cases.normal(shape, torch.float32, "cpu")
    rows = logits.numel() // shape[1]
    weight = torch.ones(shape[1])
    weight[3] = torch.nan
    for row in range(rows):
        target = torch.full((rows,), 3)
        target[::2] = -100
        target[row:] = shape[1]
        for reduction in cases.REDUCTIONS:
            with torch.no_grad(), pytest.raises(IndexError, match=rf"\(row {row} of {rows}, "):
                ours.cross_entropy(logits, target.view(cases.index_shape(shape)), weight, reduction=reduction)


# --- a mode of the processor ------------------------------------------------------------------------------------------


@pytest.fixture
def flushed_subnormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    yield
    torch.set_flush_denormal(False)


def test_subnormal_float16_logits_are_flushed_too(flushed_subnormals: None) -> None:
    """docs/compatibility.md says so: float16 is widened by arithmetic. torch keeps them."""
    logits = torch.tensor([[1, 0]], dtype=torch.int16).view(torch.float16)  # the least subnormal number, and 0
    target = torch.tensor([[0.5, 0.5]], dtype=torch.float16, requires_grad=True)
    loss = ours.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, target)  # -x
    assert torch.equal(grad.view(torch.int16) & 0x7FFF, torch.zeros(1, 2, dtype=torch.int16))
    row, zeros, index = 512 * logits, torch.zeros_like(logits), torch.tensor([0])
    with torch.autocast("cpu", dtype=torch.float16):  # for losses in float32
        losses = [ours.cross_entropy(x, index, reduction="none") for x in (row, zeros)]
        torchs = [theirs.cross_entropy(x, index, reduction="none") for x in (row, zeros)]
    assert torch.equal(*losses)
    assert not torch.equal(*torchs)
