"""The two modules: torch's own in every respect but what computes them."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import torchce

MODULES = ["CrossEntropyLoss", "BCEWithLogitsLoss"]

# Constructor arguments that a user may already have, with and without names.
ARGUMENTS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "CrossEntropyLoss": [
        ((), {}),
        ((torch.arange(1.0, 6.0),), {}),
        ((None, None, 2, None, "sum", 0.1), {}),
        ((), {"weight": torch.arange(1.0, 6.0), "ignore_index": 2, "reduction": "none", "label_smoothing": 0.3}),
        ((), {"size_average": False}),
        ((), {"reduce": False}),
    ],
    "BCEWithLogitsLoss": [
        ((), {}),
        ((torch.arange(1.0, 6.0),), {}),
        ((None, None, None, "sum", torch.arange(1.0, 6.0)), {}),
        ((), {"weight": torch.arange(1.0, 6.0), "pos_weight": torch.tensor(3.0), "reduction": "none"}),
        ((), {"size_average": False}),
        ((), {"reduce": False}),
    ],
}
CONSTRUCTIONS = [
    pytest.param(name, args, kwargs, id=f"{name}-{number}")
    for name, choices in ARGUMENTS.items()
    for number, (args, kwargs) in enumerate(choices)
]


def build(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's), legacy warnings aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(torchce, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)


def problem(name: str) -> tuple[Tensor, Tensor]:
    logits = cases.normal((6, 5), torch.float32, "cpu", scale=3)
    if name == "CrossEntropyLoss":
        return logits, cases.indices([6], 5, torch.int64, "cpu")
    return logits, cases.uniform((6, 5), torch.float32, "cpu")


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS)
def test_drop_in(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Every constructor argument arrives: the loss and its gradient are torch's."""
    logits, target = problem(name)
    results = []
    for module in build(name, *args, **kwargs):
        x = logits.clone().requires_grad_()
        loss = module(x, target)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS)
def test_is_torchs_module(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ours, theirs = build(name, *args, **kwargs)
    assert isinstance(ours, getattr(nn, name))
    assert isinstance(ours, nn.modules.loss._Loss)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for attribute in ("reduction", "ignore_index", "label_smoothing"):
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)


@pytest.mark.parametrize("name", MODULES)
def test_signature_extends_torchs(name: str) -> None:
    ours, theirs = (list(inspect.signature(getattr(home, name)).parameters.values()) for home in (torchce, nn))
    for our, their in zip(ours, theirs, strict=False):
        assert (our.name, our.default, our.kind) == (their.name, their.default, their.kind)
    for extra in ours[len(theirs) :]:
        assert extra.kind == inspect.Parameter.KEYWORD_ONLY
        assert extra.default is not inspect.Parameter.empty


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "state_dict"])
def test_copies_compute_the_same(way: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ours, theirs = build(name, *args, **kwargs)
    if way == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    elif way == "deepcopy":
        copied = copy.deepcopy(ours)
    else:  # a checkpoint written by torch's module
        blank = [torch.ones_like(a) if isinstance(a, Tensor) else a for a in args]
        blank_kwargs = {k: torch.ones_like(a) if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        copied, _ = build(name, *blank, **blank_kwargs)
        copied.load_state_dict(theirs.state_dict())
    assert type(copied) is type(ours)
    torch.testing.assert_close(copied(*problem(name)), ours(*problem(name)), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_bad_reduction_raises_at_the_call(name: str) -> None:
    ours, theirs = build(name, reduction="sideways")
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="sideways"):
            module(*problem(name))


@pytest.mark.parametrize("name", MODULES)
def test_legacy_constructor_warns_as_torch(name: str) -> None:
    messages = []
    for home in (torchce, nn):
        with pytest.warns(UserWarning, match="size_average") as caught:
            getattr(home, name)(size_average=False)
        messages.append([str(warning.message) for warning in caught])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", MODULES)
def test_buffers_move_with_the_module(name: str) -> None:
    ours, _ = build(name, weight=torch.arange(1.0, 6.0))
    assert ours.double().weight.dtype == torch.float64
    assert ours.to("meta").weight.device.type == "meta"


def test_in_a_model() -> None:
    """A step of training, with the loss as a submodule found by type."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": nn.Linear(8, 5), "loss": torchce.CrossEntropyLoss(label_smoothing=0.1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data, target = cases.normal((32, 8), torch.float32, "cpu"), cases.indices([32], 5, torch.int64, "cpu")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model["loss"](model["net"](data), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert [type(m) for m in model.modules() if isinstance(m, nn.CrossEntropyLoss)] == [torchce.CrossEntropyLoss]
