"""``torchce.patch_torch``: torch's own functions lead to torchce, for good or for a while, and its classes stay."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchce
from torchce.patch import patch_torch

NAMES = ["cross_entropy", "binary_cross_entropy_with_logits"]
TORCHS = {name: getattr(F, name) for name in NAMES}
CLASSES = ["CrossEntropyLoss", "BCEWithLogitsLoss"]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test leaves torch as it was, but for its own other libraries."""
    yield
    monkeypatch.undo()
    assert {name: getattr(F, name) for name in NAMES} == TORCHS


def problem(name: str) -> tuple[Tensor, Tensor]:
    """(logits [6, 5], target) of a function or of a class."""
    target = torch.rand(6, 5) if name.lower().startswith("b") else torch.arange(6) % 5
    return torch.randn(6, 5, requires_grad=True), target


def is_ours(loss: Tensor) -> bool:
    return type(loss.grad_fn).__name__ in ("SoftmaxCEBackward", "SigmoidBCEBackward")


def patched() -> bool:
    """Whether both functions lead to torchce; never only one."""
    found = {is_ours(getattr(F, name)(*problem(name))) for name in NAMES}
    assert len(found) == 1
    return found.pop()


# --- a counted state --------------------------------------------------------------------------------------------------


def test_functions_change_and_come_back() -> None:
    assert not patched()
    with torchce.patch_torch():
        assert patched()
    assert not patched()
    assert all(getattr(F, name) is TORCHS[name] for name in NAMES)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_exits_in_any_order(order: tuple[int, ...]) -> None:
    contexts = [patch_torch() for _ in order]
    for context in contexts:
        context.__enter__()
    for index in order:
        assert patched()
        contexts[index].__exit__(None, None, None)
    assert not patched()


def test_one_object_entered_twice() -> None:
    context = patch_torch()
    for _ in range(2):  # and again after it was left
        with context:
            with context:
                assert patched()
            assert patched()
        assert not patched()


def test_the_first_with_takes_over_the_call() -> None:
    context = patch_torch()
    assert patched()
    with context:
        assert patched()
    assert not patched()


def test_a_plain_call_keeps_torch_patched() -> None:
    good = patch_torch()
    with patch_torch():
        pass
    assert patched()
    with good:
        pass
    assert not patched()


def test_one_exit_too_many_lets_go_of_nobody_elses() -> None:
    with patch_torch():
        other = patch_torch()
        for _ in range(3):
            other.__exit__(None, None, None)
        assert patched()


def test_it_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), patch_torch():
        raise ZeroDivisionError
    assert not patched()
    with patch_torch():
        with pytest.raises(IndexError):
            F.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3]))
        assert patched()


def test_threads_enter_and_leave() -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(8)

    def work() -> None:
        try:
            start.wait()
            for _ in range(100):
                with patch_torch():
                    assert patched()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not patched()


def test_for_good() -> None:
    code = (
        "import torch, torchce; torchce.patch_torch(); loss = torch.nn.CrossEntropyLoss(); "
        "value = loss(torch.ones(2, 3, requires_grad=True), torch.tensor([0, 1])); "
        "print(type(loss).__module__, type(value.grad_fn).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["torch.nn.modules.loss", "SoftmaxCEBackward"]


# --- other libraries ------------------------------------------------------------------------------------------------


def over(name: str) -> Callable[..., Any]:
    """Another library's patch over what it finds."""
    inner = getattr(F, name)

    def others(*args: Any, **kwargs: Any) -> tuple[str, Tensor]:
        return "others", inner(*args, **kwargs)

    return others


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_under_ours_comes_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as others:
        others.setattr(F, name, over(name))
        theirs = getattr(F, name)
        for _ in range(2):
            with patch_torch():
                assert is_ours(getattr(F, name)(*problem(name)))
            assert getattr(F, name) is theirs


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_over_ours_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, name, TORCHS[name])  # puts it back
    with patch_torch():
        theirs = over(name)
        setattr(F, name, theirs)
        assert is_ours(theirs(*problem(name))[1])
        with patch_torch():
            assert getattr(F, name) is theirs
    assert getattr(F, name) is theirs
    assert not is_ours(theirs(*problem(name))[1])  # the wrapper below leads to torch's function again
    with patch_torch():  # and does so when what it lies below is found and patched
        assert is_ours(getattr(F, name)(*problem(name)))
    assert getattr(F, name) is theirs
    assert not is_ours(theirs(*problem(name))[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_put_back_late_leads_to_torch(name: str) -> None:
    """As by a library that patched over it and is removed after torchce."""
    with patch_torch():
        wrapper = getattr(F, name)
    setattr(F, name, wrapper)
    assert not is_ours(wrapper(*problem(name)))
    with patch_torch():
        assert is_ours(getattr(F, name)(*problem(name)))
    assert getattr(F, name) is TORCHS[name]


@pytest.mark.parametrize("name", NAMES)
def test_patching_again_after_torchs_function_was_put_back(name: str) -> None:
    with patch_torch():
        setattr(F, name, TORCHS[name])
        with patch_torch():
            assert patched()


def test_entering_often_makes_no_new_functions() -> None:
    """Compiled code is guarded by the function's identity."""
    found = set()
    for _ in range(3):
        with patch_torch():
            found.add(F.cross_entropy)
    assert len(found) == 1


# --- the functions ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("name", NAMES)
def test_the_functions_look_like_torchs(name: str) -> None:
    with patch_torch():
        function, torchs = getattr(F, name), TORCHS[name]
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(function, attribute) == getattr(torchs, attribute), attribute
        assert inspect.signature(function) == inspect.signature(torchs)
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function
        assert torch.overrides.resolve_name(function) == f"torch.nn.functional.{name}"
        with pytest.raises(RuntimeError, match=r"torchce.*use torch\.compile"):
            torch.jit.script(function)
        stored = pickle.dumps(function)
    assert pickle.loads(stored) is torchs


@pytest.mark.parametrize("name", NAMES)
def test_what_only_torch_can_do_still_goes_to_torch(name: str) -> None:
    """Not back to torchce, without end."""
    logits, target = problem(name)
    with patch_torch():
        with pytest.raises((RuntimeError, NotImplementedError)):
            getattr(F, name)(logits.to(torch.complex64), target)
        hessian = torch.func.hessian(getattr(F, name))(logits, target)
    assert hessian.shape == (6, 5, 6, 5)


@pytest.mark.parametrize("name", NAMES)
def test_a_function_bound_before_is_not_reached(name: str) -> None:
    with patch_torch():
        assert not is_ours(TORCHS[name](*problem(name)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("name", CLASSES)
def test_torchscript_is_not_reached(name: str) -> None:
    """What was compiled before keeps torch's loss."""
    scripted = torch.jit.script(getattr(nn, name)())
    logits, target = problem(name)
    with patch_torch():
        assert not is_ours(scripted(logits, target))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_patch_is_not_copied(copied: Any) -> None:
    """A copy would let go of a hold that it does not have."""
    with patch_torch() as patch, pytest.raises(TypeError, match="cannot be copied or pickled"):
        copied(patch)


# --- torch's modules and torchce's ------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, name: str, place: Any = nn) -> None:
        super().__init__()
        self.loss = getattr(place, name)()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss(logits, target)


class OfTorchs(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


class OfOurs(torchce.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_stay_torchs(name: str) -> None:
    before = getattr(nn, name)
    module = before()
    with patch_torch():
        assert getattr(nn, name) is getattr(nn.modules.loss, name) is before
        assert isinstance(module, getattr(nn, name))
        assert isinstance(getattr(torchce, name)(), getattr(nn, name))
        assert is_ours(module(*problem(name)))
        assert is_ours(getattr(nn, name).forward(module, *problem(name)))
        assert is_ours(before(reduction="sum")(*problem(name)))
    assert not is_ours(module(*problem(name)))


@pytest.mark.parametrize("place", [nn, torchce], ids=["torch", "torchce"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("saved", [False, True], ids=["saved_before", "saved_patched"])
def test_whole_models_are_saved_across_the_patch(saved: bool, name: str, place: Any) -> None:
    logits, target = problem(name)
    expected = Model(name)(logits, target)

    def save(model: nn.Module) -> io.BytesIO:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return file

    def load(file: io.BytesIO) -> Any:
        return torch.load(file, weights_only=False)

    if saved:
        with patch_torch():
            file = save(Model(name, place))
        model = load(file)
        assert is_ours(model(logits, target)) == (place is torchce)
    else:
        file = save(Model(name, place))
        with patch_torch():
            model = load(file)
            assert is_ours(model(logits, target))
            model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
            assert is_ours(model(logits, target))
    assert type(model.loss) is getattr(place, name)
    torch.testing.assert_close(model(logits, target), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_objects_without_torchces_attributes(name: str) -> None:
    """As old pickles make them, and whoever changes the class of torch's modules."""
    logits, target = problem(name)
    ours, torchs = getattr(torchce, name), getattr(nn, name)
    state = pickle.loads(pickle.dumps(torchs()))
    state.__class__ = ours
    assert is_ours(state(logits, target))
    made = ours.__new__(ours)
    made.__setstate__(torchs().__dict__)
    assert is_ours(made(logits, target))
    assert not made.inplace_backward


def test_subclasses() -> None:
    logits, target = problem("cross_entropy")
    expected = 2 * F.cross_entropy(logits, target)
    of_torchs, of_ours = OfTorchs(), OfOurs()
    with patch_torch():
        for module in (of_torchs, of_ours, OfTorchs(), OfOurs(), pickle.loads(pickle.dumps(of_torchs))):
            torch.testing.assert_close(module(logits, target), expected)
        assert isinstance(of_torchs, nn.CrossEntropyLoss)
        assert isinstance(of_ours, nn.CrossEntropyLoss)
        torch.testing.assert_close(nn.CrossEntropyLoss.forward(of_ours, logits, target) * 2, expected)
    for module in (of_torchs, of_ours):
        torch.testing.assert_close(module(logits, target), expected)
