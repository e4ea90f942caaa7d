"""``torchce.patch_torch``: torch's own names lead to torchce, for good or for a while."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import torchce

NAMES = {
    "CrossEntropyLoss": (nn, nn.modules.loss),
    "BCEWithLogitsLoss": (nn, nn.modules.loss),
    "cross_entropy": (nn.functional,),
    "binary_cross_entropy_with_logits": (nn.functional,),
}
PLACES = [(place, name) for name, places in NAMES.items() for place in places]


def ours(name: str) -> object:
    return getattr(torchce, name, None) or getattr(torchce.functional, name)


def test_every_name_is_swapped_and_put_back() -> None:
    found = [getattr(place, name) for place, name in PLACES]
    with torchce.patch_torch():
        for place, name in PLACES:
            assert getattr(place, name) is ours(name), name
    assert [getattr(place, name) for place, name in PLACES] == found


def test_it_is_put_back_after_an_error() -> None:
    before = nn.CrossEntropyLoss
    with pytest.raises(ZeroDivisionError), torchce.patch_torch():
        raise ZeroDivisionError
    assert nn.CrossEntropyLoss is before


def test_torchs_own_modules_use_it() -> None:
    """A module made before looks its function up at each call."""
    module = nn.CrossEntropyLoss()
    logits, target = torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 3])
    assert "SoftmaxCE" not in type(module(logits, target).grad_fn).__name__
    with torchce.patch_torch():
        assert "SoftmaxCE" in type(module(logits, target).grad_fn).__name__
        assert isinstance(nn.BCEWithLogitsLoss(), torchce.BCEWithLogitsLoss)


def test_what_only_torch_can_do_still_goes_to_torch() -> None:
    """Not back to torchce, without end."""
    logits = torch.zeros(2, 4, dtype=torch.complex64)
    target = torch.full((2, 4), 0.25)
    with torchce.patch_torch(), pytest.raises(RuntimeError):
        nn.functional.cross_entropy(logits, target)
    with torchce.patch_torch():
        hessian = torch.func.hessian(nn.functional.cross_entropy)(torch.zeros(2, 4), torch.tensor([0, 3]))
    assert hessian.shape == (2, 4, 2, 4)


def test_for_good() -> None:
    code = "import torch, torchce; torchce.patch_torch(); print(type(torch.nn.CrossEntropyLoss()).__module__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "torchce.modules"
