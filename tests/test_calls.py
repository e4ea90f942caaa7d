"""``torchce.patch_torch.calls()``: which calls took a kernel, and why the others did not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import torchce
from torchce.patch import patch_torch

TORCHS = F.cross_entropy


def problem() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 5, requires_grad=True), torch.arange(6) % 5


def test_calls_are_counted_while_patched() -> None:
    logits, target = problem()
    with patch_torch():
        for _ in range(3):
            F.cross_entropy(logits, target)
            torch.func.grad(torchce.functional.cross_entropy)(logits.detach(), target)  # not by torch's name
        F.binary_cross_entropy_with_logits(logits, logits.detach().sigmoid())
        with patch_torch():
            nn.CrossEntropyLoss()(logits, target)
        torchce.functional.cross_entropy(logits, target)
        with pytest.raises(ValueError, match="target"):
            F.cross_entropy(logits, target[:2])
    F.cross_entropy(logits, target)
    assert torchce.patch_torch.calls() == {
        **({"linear_cross_entropy": (0, {})} if hasattr(F, "linear_cross_entropy") else {}),
        "cross_entropy": (4, {}),
        "binary_cross_entropy_with_logits": (1, {}),
    }
    assert "Calls(kernel=4, other={})" in str(torchce.patch_torch.calls())
    with patch_torch():
        assert torchce.patch_torch.calls()["cross_entropy"] == (0, {})


REASONS: dict[str, Callable[[int], Any]] = {
    "no kernel for input: torch.float32 Tensor on cpu, target: torch.float32 TwoTensor on cpu": lambda n: (
        F.binary_cross_entropy_with_logits(torch.ones(n), TwoTensor(torch.ones(n), torch.ones(n)))
    ),
    "input: expected at most 16 dimensions": lambda n: F.binary_cross_entropy_with_logits(
        torch.ones([1] * (16 + n)), torch.ones([1] * (16 + n))
    ),
    "torch.func transform": lambda n: torch.func.grad(F.cross_entropy)(torch.ones(n), torch.tensor(0)),
    "forward-mode AD": lambda n: dual(torch.ones(n, 3)),
    "torch.jit.trace": lambda n: torch.jit.trace(F.cross_entropy, (torch.ones(n), torch.tensor(0)), check_trace=False),
    "weight requires grad": lambda n: F.cross_entropy(
        torch.ones(n, 2), torch.ones(n, 2), torch.ones(2, requires_grad=True)
    ),
    "answered by a __torch_function__ handler": lambda n: F.cross_entropy(
        torch.ones(n).as_subclass(Answering), torch.tensor(0)
    ),
}


def dual(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return F.cross_entropy(forward_ad.make_dual(x, x), torch.zeros(len(x), dtype=torch.int64))


class Answering(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 42 if func is TORCHS else super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reason", REASONS)
def test_calls_name_the_reason(reason: str) -> None:
    """One reason whatever the shapes."""
    with patch_torch():
        for n in (1, 2, 3):
            REASONS[reason](n)
    counted = torchce.patch_torch.calls().values()
    assert [(calls.kernel, calls.other) for calls in counted if calls.other] == [(0, {reason: 3})]


def test_a_handler_that_leaves_the_answer_to_the_function_took_a_kernel() -> None:
    logits, target = problem()
    with patch_torch(), torch.overrides.BaseTorchFunctionMode():
        F.cross_entropy(logits, target)
    assert torchce.patch_torch.calls()["cross_entropy"] == (1, {})


class Unwrapping(Tensor):
    """Answers by a loss of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is TORCHS:
            return F.cross_entropy(args[0].as_subclass(Tensor) * 2, args[1])
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_call_inside_a_handler_is_one_of_its_own() -> None:
    logits, target = problem()
    with patch_torch():
        F.cross_entropy(logits.detach().as_subclass(Unwrapping), target)
    assert torchce.patch_torch.calls()["cross_entropy"] == (1, {"answered by a __torch_function__ handler": 1})


def test_a_call_that_raises_in_a_handler_leaves_its_reason() -> None:
    logits, target = problem()

    class Trying(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not TORCHS:
                return func(*args, **(kwargs or {}))
            with pytest.raises(ValueError, match="target"):
                F.cross_entropy(logits, target[:2])
            return 42

    with patch_torch(), Trying():
        F.cross_entropy(logits, target)
    assert torchce.patch_torch.calls()["cross_entropy"] == (0, {"answered by a __torch_function__ handler": 1})


def test_calls_in_threads() -> None:
    logits, target = problem()
    with patch_torch():
        threads = [
            threading.Thread(target=lambda: [F.cross_entropy(logits, target) for _ in range(200)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torchce.patch_torch.calls()["cross_entropy"] == (800, {})


def test_compiled_calls_count_when_they_are_traced() -> None:
    """And never again: a count in the graph, or a guard on one, would."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logits, target = problem()
    weight = torch.ones(5, requires_grad=True)
    with patch_torch():
        compiled = torch.compile(lambda *args: F.cross_entropy(*args), fullgraph=True, backend="aot_eager")
        compiled(logits, target)
        traced = torchce.patch_torch.calls()["cross_entropy"]
        assert traced.kernel >= 1
        assert not traced.other
        for _ in range(3):
            compiled(logits, target)
        with patch_torch():
            F.cross_entropy(logits, target)
            compiled(logits, target)
        assert torchce.patch_torch.calls()["cross_entropy"] == (traced.kernel + 1, {})
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        compiled(logits, logits.detach().softmax(1), weight)
        assert "weight requires grad" in torchce.patch_torch.calls()["cross_entropy"].other
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
