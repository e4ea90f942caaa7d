"""Arguments that are wrong in kind: torch's class, and words that name the argument and what is wrong with it.

Where torch has an answer after all, ours is the same.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor

import torchce
import torchce.functional as ours

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])
SOFT = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
WANTS_GRAD = torch.ones(3, requires_grad=True)
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def quantized(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


Call = Callable[[Any], Tensor]


def both(call: Call) -> tuple[Tensor | Exception, Tensor | Exception]:
    """(torch's result or error, ours)"""
    results: list[Tensor | Exception] = []
    for functions in (theirs, ours):
        try:
            results.append(call(functions))
        except Exception as error:
            results.append(error)
    return results[0], results[1]


def assert_as_torch(call: Call, *words: str) -> None:
    """Torch's answer, or an error of torch's class with all of ``words`` before torch's own."""
    expected, result = both(call)
    if isinstance(expected, Exception):
        assert type(result) is type(expected), (result, expected)
        assert words, "an error needs words that it must hold"
        for word in words:
            assert re.search(word, str(result)), (word, str(result))
    else:
        torch.testing.assert_close(result, expected)


def cross_entropy(*args: Any, **kwargs: Any) -> Call:
    return lambda functions: functions.cross_entropy(*args, **kwargs)


def bce(*args: Any, **kwargs: Any) -> Call:
    return lambda functions: functions.binary_cross_entropy_with_logits(*args, **kwargs)


NO_TENSORS = {
    "target None": (cross_entropy(X, None), "target: expected a Tensor, got NoneType"),
    "target list": (cross_entropy(X, [0, 1, 2, 0]), "target: expected a Tensor, got list"),
    "input None": (cross_entropy(None, Y), "input: expected a Tensor, got NoneType"),
    "input array": (cross_entropy(X.numpy(), Y), "input: expected a Tensor, got ndarray"),
    "weight list": (cross_entropy(X, Y, [1.0, 1.0, 1.0]), "weight: expected a Tensor, got list"),
    "bce target None": (bce(X, None), "target: expected a Tensor, got NoneType"),
    "bce target number": (bce(X, 0.5), "target: expected a Tensor, got float"),
    "bce input None": (bce(None, SOFT), "input: expected a Tensor, got NoneType"),
    "bce weight list": (bce(X, SOFT, [1.0, 1.0, 1.0]), "weight: expected a Tensor, got list"),
    "bce pos_weight number": (bce(X, SOFT, pos_weight=3.0), "pos_weight: expected a Tensor, got float"),
}


@pytest.mark.parametrize("name", NO_TENSORS)
def test_what_is_no_tensor(name: str) -> None:
    assert_as_torch(*NO_TENSORS[name])


@pytest.mark.parametrize("module", ["CrossEntropyLoss", "BCEWithLogitsLoss"])
def test_modules_without_a_target(module: str) -> None:
    with pytest.raises(Exception, match="target: expected a Tensor, got NoneType") as ours_:
        getattr(torchce, module)()(X, None)
    with pytest.raises(ours_.type):
        getattr(torch.nn, module)()(X, None)


@pytest.mark.parametrize("reduction", [["mean"], ("mean",), {"mean": 1}, None, 1, "Mean", "MEAN", b"mean"], ids=repr)
@pytest.mark.parametrize("call", [cross_entropy, bce], ids=["cross_entropy", "bce"])
def test_reduction(call: Callable[..., Call], reduction: Any) -> None:
    target = Y if call is cross_entropy else SOFT
    assert_as_torch(call(X, target, reduction=reduction), re.escape(f"{reduction} is not a valid value for reduction"))


class Whole(int):
    """An int whose type is not int."""


INTEGERS = [2**63, -(2**63) - 1, 2**63 - 1, -(2**63), 10**30, 1.0, "1", None, True, 1j, Decimal(1), Fraction(1)]
INTEGERS += [numpy.int64(1), numpy.uint8(1), numpy.float32(1), numpy.array([1]), numpy.array([1, 2])]
INTEGERS += [numpy.uint64(2**63), Whole(2**63), Whole(1), torch.tensor(2**63, dtype=torch.uint64)]
INTEGERS += [torch.tensor(1), torch.tensor(1.0), torch.tensor([1, 2]), [1]]
INTEGERS += [torch.tensor(1).to_sparse(), torch.tensor(1, device="meta")]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_ignore_index(value: Any) -> None:
    assert_as_torch(cross_entropy(X, Y, ignore_index=value), "ignore_index: expected an integer of 64 bits, got ")


NUMBERS = [numpy.array([0.1]), numpy.array([0.1, 0.2]), numpy.array(0.1), [0.1], Decimal("0.1"), Fraction(1, 10), "0.1"]
NUMBERS += [numpy.float32(0.1), numpy.float64(0.1), numpy.float16(0.1), numpy.int64(1), numpy.bool_(True), None, 1j]
NUMBERS += [True, 1, 0, 2, -0.5, 1.5, float("inf"), float("nan"), torch.tensor(0.1), torch.tensor([0.1]), (0.1,)]
NUMBERS += [torch.tensor(0.1, requires_grad=True), torch.tensor(0.1 + 1j), torch.tensor(1)]
NUMBERS += [torch.tensor(0.5).to(dtype) for dtype in FLOAT8] + [torch.tensor(0.1).to_sparse()]
NUMBERS += [torch.tensor(0.1, device="meta"), torch.tensor(1, device="meta")]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_label_smoothing(value: Any) -> None:
    assert_as_torch(cross_entropy(X, Y, label_smoothing=value), "label_smoothing: expected (a number|at most 1.0), got")


KINDS = {
    "sparse logits": (cross_entropy(X.to_sparse(), Y), "input: torch.sparse_coo"),
    "sparse logits, csr": (cross_entropy(X.to_sparse_csr(), Y), "input: torch.sparse_csr"),
    "sparse bce": (bce(X.to_sparse(), SOFT), "input: torch.sparse_coo"),
    "sparse target": (bce(X, SOFT.to_sparse()), "target: torch.sparse_coo"),
    "weight wants grad": (cross_entropy(X, Y, WANTS_GRAD), "weight: .*require grad"),
    "bce weight wants grad": (bce(X, SOFT, WANTS_GRAD), "weight: .*require grad"),
    "bce pos_weight wants grad": (bce(X, SOFT, pos_weight=WANTS_GRAD), "pos_weight: .*require grad"),
    "quantized logits": (cross_entropy(quantized(X), Y), "input: quantized"),
    "quantized target": (cross_entropy(X, quantized(SOFT)), "target: quantized"),
    "quantized bce target": (bce(X, quantized(SOFT)), "target: quantized"),
    "quantized weight": (cross_entropy(X, Y, quantized(SOFT)[0]), "weight: quantized"),
}
KINDS |= {f"{dtype} target": (cross_entropy(X, SOFT.to(dtype)), f"target: .*got {dtype}") for dtype in FLOAT8}
KINDS |= {f"{dtype} bce target": (bce(X, SOFT.to(dtype)), f"target: .*got {dtype}") for dtype in FLOAT8}
KINDS |= {f"{dtype} logits": (cross_entropy(X.to(dtype), Y), f"input: {dtype}") for dtype in FLOAT8}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_tensors(name: str) -> None:
    assert_as_torch(*KINDS[name])


@pytest.mark.parametrize("small", FLOAT8, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_float8_under_autocast(dtype: torch.dtype, small: torch.dtype) -> None:
    """Torch casts them, so that they have a value: loss and gradient."""
    for function, target, options in (
        ("cross_entropy", SOFT.to(small), {}),
        ("cross_entropy", SOFT.to(small), {"label_smoothing": 0.1}),
        ("binary_cross_entropy_with_logits", SOFT.to(small), {}),
        ("binary_cross_entropy_with_logits", SOFT, {"pos_weight": SOFT.to(small)[0]}),
    ):
        results = []
        for functions in (ours, theirs):
            x = X.to(dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                loss = getattr(functions, function)(x, target, **options)
            loss.backward()
            results.append((loss.detach(), x.grad))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("small", FLOAT8, ids=str)
def test_float8_logits_under_autocast(small: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_torch(cross_entropy(X.to(small), Y))
        assert_as_torch(bce(X.to(small), SOFT))
