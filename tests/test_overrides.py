"""``__torch_function__``: handlers see torch's function and arguments, and what they leave to it ends in torchce."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, resolve_name

import torchce
import torchce.functional as ours

TORCHS = {name: getattr(F, name) for name in ("cross_entropy", "binary_cross_entropy_with_logits")}
LOSSES = list(TORCHS)
Log = list[tuple[Any, ...]]


@pytest.fixture(params=[False, True], ids=["", "patched"])
def patched(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether torch is patched; handlers see the same function."""
    with torchce.patch_torch() if request.param else contextlib.nullcontext():
        yield request.param


@pytest.fixture(autouse=True)
def _modes_come_back() -> Iterator[None]:
    before = _get_current_function_mode_stack()
    yield
    assert _get_current_function_mode_stack() == before


def problem(loss: str) -> tuple[Tensor, Tensor]:
    """(logits [6, 5], a target that torch's function does not take)"""
    logits = torch.randn(6, 5, requires_grad=True)
    if loss == "cross_entropy":
        return logits, torch.tensor([0, 1, 2, 3, 4, 0], dtype=torch.int32)
    return logits, torch.randint(2, (6, 5))


def plain(loss: str, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient of plain logits)"""
    x = logits.detach().as_subclass(Tensor).requires_grad_()
    value = getattr(ours, loss)(x, target.as_subclass(Tensor))
    return value.detach(), torch.autograd.grad(value, x)[0]


def check(loss: str, value: Tensor, logits: Tensor, target: Tensor) -> None:
    """Value and gradient are those of torchce's kernels."""
    expected, gradient = plain(loss, logits, target)
    torch.testing.assert_close(value.detach().as_subclass(Tensor), expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (found,) = torch.autograd.grad(value.as_subclass(Tensor), logits)
    torch.testing.assert_close(found.as_subclass(Tensor), gradient)
    assert any("torchce" in event.name for event in profile.events())


def logging_mode(who: str, log: Log, answer: Callable[..., Any] | None = None) -> TorchFunctionMode:
    class Logging(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if getattr(func, "__name__", "") not in LOSSES:
                return func(*args, **kwargs)
            log.append((who, func, tuple(types), len(args), sorted(kwargs)))
            return (answer or func)(*args, **kwargs)

    return Logging()


class Logged(Tensor):
    """Leaves every answer to the function."""

    log: Log

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LOSSES:
            Logged.log.append((cls.__name__, func, tuple(types), len(args), sorted(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs or {})


class LoggedChild(Logged):
    """Asked before its parent."""


class Declining(Tensor):
    """Knows nothing of losses."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LOSSES:
            Logged.log.append((cls.__name__, func, tuple(types), len(args), sorted(kwargs or {})))
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


class Tolerant(Tensor):
    """Takes tensors of all classes, which torch's own handler does not."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LOSSES:
            Logged.log.append((cls.__name__, func, tuple(types), len(args), sorted(kwargs or {})))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Duck:
    """No tensor at all; knows the functions it answers, as libraries' tables do."""

    TABLE: ClassVar = {function: name for name, function in TORCHS.items()}

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (cls.TABLE[func], resolve_name(func)) if func in cls.TABLE else NotImplemented


# --- what handlers see ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_tables_of_torchs_functions_match(loss: str, patched: bool) -> None:
    logits, target = problem(loss)
    for function in (getattr(ours, loss), getattr(F, loss)):
        assert function(Duck(), target) == function(logits, Duck()) == (loss, f"torch.nn.functional.{loss}")
    module = torchce.CrossEntropyLoss() if loss == "cross_entropy" else torchce.BCEWithLogitsLoss()
    assert module(logits, Duck()) == (loss, f"torch.nn.functional.{loss}")


# Tensor classes of (input, target, weight), and how many modes lie above them.
CASES = {
    "input": ((Logged, Tensor, Tensor), 0),
    "target": ((Tensor, Logged, Tensor), 0),
    "weight": ((Tensor, Tensor, Logged), 0),
    "child_first": ((Logged, LoggedChild, Tensor), 0),
    "declining_first": ((Declining, Tolerant, Tensor), 0),
    "all_decline": ((Declining, Tensor, Logged), 0),
    "mode": ((Tensor, Tensor, Tensor), 1),
    "modes": ((Tensor, Tensor, Tensor), 3),
    "mode_and_input": ((Logged, Tensor, Tensor), 1),
    "modes_and_more": ((Logged, Tolerant, Declining), 2),
    "modes_and_all_decline": ((Declining, Tensor, Logged), 2),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_handlers_are_asked_as_by_torch(case: str, loss: str, patched: bool) -> None:
    """The same handlers in the same order, with the same function, types and arguments; and so the same refusals."""
    classes, modes = CASES[case]
    logits, target = problem(loss)
    target = target.long() if loss == "cross_entropy" else target.float()
    tensors = (logits.detach(), target, torch.ones(5))
    arguments = dict(zip(("input", "target", "weight"), map(Tensor.as_subclass, tensors, classes), strict=True))

    def asked(function: Callable[..., Tensor]) -> tuple[Log, str, Tensor | None]:
        Logged.log = []
        with contextlib.ExitStack() as stack:
            for number in range(modes):
                stack.enter_context(logging_mode(f"mode {number}", Logged.log))
            try:
                value, error = function(**arguments), ""
            except TypeError as refusal:
                value, error = None, str(refusal).partition(" nor in mode ")[0]
        return Logged.log, error, value

    log, error, value = asked(getattr(ours, loss))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(F, loss, TORCHS[loss])
        torchs_log, torchs_error, torchs_value = asked(TORCHS[loss])
    assert log == torchs_log
    assert error == torchs_error
    assert log
    assert bool(error) == ("all_decline" in case)
    assert type(value) is type(torchs_value)
    if value is not None:
        torch.testing.assert_close(value.as_subclass(Tensor), torchs_value.as_subclass(Tensor))


@pytest.mark.parametrize("loss", LOSSES)
def test_torchces_arguments_travel_if_used(loss: str) -> None:
    """With torchce's own function, which takes them."""
    logits, target = problem(loss)
    log: Log = []
    with logging_mode("mode", log):
        getattr(ours, loss)(logits, target, inplace_backward=False)
        value = getattr(ours, loss)(logits + 0, target, inplace_backward=True)
    torch.testing.assert_close(value, getattr(ours, loss)(logits, target))
    assert [entry[1] for entry in log] == [TORCHS[loss], getattr(ours, loss)]
    assert ["inplace_backward" in entry[-1] for entry in log] == [False, True]


@pytest.mark.parametrize("built_first", [False, True])
def test_names_resolve_whenever_torchs_index_is_built(built_first: bool) -> None:
    code = f"""
import torch, torchce
from torch.overrides import get_overridable_functions, resolve_name
import torch.nn.functional as F
torchs = F.cross_entropy
if {built_first}: resolve_name(torchs)
with torchce.patch_torch():
    print(resolve_name(torchs), resolve_name(F.cross_entropy), torchs in get_overridable_functions()[F])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["torch.nn.functional.cross_entropy"] * 2 + ["True"]


# --- what they leave to the function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cls", [Tensor, Logged])
@pytest.mark.parametrize("modes", [0, 1, 2])
def test_what_handlers_leave_ends_in_kernels(modes: int, cls: type[Tensor], loss: str, patched: bool) -> None:
    """A target that torch's function does not take, forward and backward."""
    logits, target = problem(loss)
    x = logits.detach().as_subclass(cls).requires_grad_()
    Logged.log = []
    with contextlib.ExitStack() as stack:
        for number in range(modes):
            stack.enter_context(logging_mode(f"mode {number}", Logged.log))
        value = getattr(F if patched else ours, loss)(x, target)
    assert type(value) is cls
    check(loss, value, x, target)
    assert len(Logged.log) == modes + (cls is Logged)


@pytest.mark.parametrize("loss", LOSSES)
def test_limits_at_infinity_hold(loss: str, patched: bool) -> None:
    x = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = getattr(ours, loss)(x, target)
    assert expected.isfinite()
    with torch.overrides.BaseTorchFunctionMode():
        torch.testing.assert_close(getattr(ours, loss)(x, target), expected)
        torch.testing.assert_close(TORCHS[loss](x, target).isfinite(), torch.tensor(patched))


@pytest.mark.parametrize("loss", LOSSES)
def test_default_device(loss: str, patched: bool) -> None:
    logits, target = problem(loss)
    with torch.device("cpu"):
        check(loss, getattr(ours, loss)(logits, target), logits, target)
        with torch.overrides.BaseTorchFunctionMode():
            check(loss, getattr(ours, loss)(logits, target), logits, target)
        x = logits.detach().as_subclass(Logged).requires_grad_()
        Logged.log = []
        check(loss, getattr(ours, loss)(x, target), x, target)
        assert len(Logged.log) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_handler_changes_the_default_device(loss: str) -> None:
    """Torch's mode goes to the bottom of the stack then, below torchce's."""
    logits, target = problem(loss)

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        with torch.device("meta"):
            assert torch.empty(1).is_meta
            value: Tensor = TORCHS[loss](*args, **kwargs)
        return value

    with torch.device("cpu"), logging_mode("mode", [], answer):
        check(loss, getattr(ours, loss)(logits, target), logits, target)
    with logging_mode("mode", [], answer):
        check(loss, getattr(ours, loss)(logits, target), logits, target)


ANSWERS: dict[str, Callable[[str], Callable[..., Tensor]]] = {
    "torchs": lambda loss: TORCHS[loss],
    "looked_up": lambda loss: lambda *args, **kwargs: getattr(F, loss)(*args, **kwargs),
    "torchces": lambda loss: getattr(ours, loss),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("cls", [Tensor, Logged])
def test_handlers_may_call_any_of_the_functions(cls: type[Tensor], answer: str, loss: str, patched: bool) -> None:
    """Each mode and subclass is asked once, whichever function the one before calls."""
    logits, target = problem(loss)
    x = logits.detach().as_subclass(cls).requires_grad_()
    Logged.log = []
    with logging_mode("lower", Logged.log), logging_mode("upper", Logged.log, ANSWERS[answer](loss)):
        value = getattr(ours, loss)(x, target)
    check(loss, value, x, target)
    assert [entry[0] for entry in Logged.log] == ["upper", "lower", "Logged"][: 3 if cls is Logged else 2]
    assert {entry[1] for entry in Logged.log} == {TORCHS[loss]}


class Wrapping:
    """Unwraps its tensors before it calls the function, as wrapper libraries do."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [arg.tensor if isinstance(arg, Wrapping) else arg for arg in args]
        return Wrapping(func(*args, **(kwargs or {})))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_handler_that_unwraps(loss: str, patched: bool) -> None:
    logits, target = problem(loss)
    value = getattr(ours, loss)(Wrapping(logits), Wrapping(target))
    check(loss, value.tensor, logits, target)
    nested = getattr(ours, loss)(Wrapping(Wrapping(logits)), target)
    check(loss, nested.tensor.tensor, logits, target)


def test_other_functions_pass_through() -> None:
    """A handler's own operations, and its own second loss."""

    def answer(input: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        smooth = F.log_softmax(input, 1).mean() + torch.zeros(()) + F.binary_cross_entropy_with_logits(input, input > 0)
        return TORCHS["cross_entropy"](input * 1.0, target, **kwargs) - smooth

    logits, target = problem("cross_entropy")
    with logging_mode("mode", [], answer):
        value = ours.cross_entropy(logits, target)
    expected = ours.cross_entropy(logits, target) - F.log_softmax(logits, 1).mean()
    expected = expected - ours.binary_cross_entropy_with_logits(logits, logits > 0)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_error_leaves_the_stack_as_it_was(loss: str, patched: bool) -> None:
    logits, target = problem(loss)

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        raise ZeroDivisionError

    log: Log = []
    with logging_mode("lower", log), logging_mode("upper", log, answer):
        before = _get_current_function_mode_stack()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                getattr(ours, loss)(logits, target)
            assert _get_current_function_mode_stack() == before
    with logging_mode("mode", log):
        before = _get_current_function_mode_stack()
        with pytest.raises(ValueError, match="reduction"):
            getattr(ours, loss)(logits, target, reduction="median")
        assert _get_current_function_mode_stack() == before
    check(loss, getattr(ours, loss)(logits, target), logits, target)


def test_threads_have_their_own_modes() -> None:
    logits, target = problem("cross_entropy")
    expected = ours.cross_entropy(logits, target).detach()
    wrong: list[Any] = []

    def work() -> None:
        log: Log = []
        for _ in range(100):
            with logging_mode("lower", log), logging_mode("upper", log):
                value = ours.cross_entropy(logits.detach(), target)
            wrong.extend([value] if not torch.equal(value, expected) else [])
            wrong.extend(_get_current_function_mode_stack())
        wrong.extend([len(log)] if len(log) != 200 else [])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- traced graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [torch.nn, torchce], ids=["patched", "torchce"])
def test_symbolic_tracing_records_torchces_function(place: Any) -> None:
    """The graph is run when nothing of torchce's is there to answer torch's function."""
    logits, target = problem("cross_entropy")
    with torchce.patch_torch():
        traced = torch.fx.symbolic_trace(lambda x, y: (F if place is torch.nn else ours).cross_entropy(x, y))
    check("cross_entropy", traced(logits, target), logits, target)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "mode", [torch.overrides.BaseTorchFunctionMode, lambda: torch.device("cpu")], ids=["own", "device"]
)
def test_compiled_under_a_mode(mode: Callable[[], Any], loss: str, patched: bool) -> None:
    torch._dynamo.reset()
    logits, target = problem(loss)
    compiled = torch.compile(lambda x, y: getattr(ours, loss)(x, y), fullgraph=True, backend="aot_eager")
    with mode():
        check(loss, compiled(logits, target), logits, target)
