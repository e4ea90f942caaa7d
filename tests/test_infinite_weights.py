"""Class weights that are infinite, or whose products are: softmax cross entropy has torch's infinities, not NaN.

Kernels sum u_k (x_k - m) against a maximum m that changes on the way, and take it back at the end: infinity times a
difference of 0, and infinities of both signs, come up in the middle of rows whose loss is simply infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cases
import pytest
import reference
import torch
from cases import dtype_id
from comparison import check_softmax_ce
from torch import Tensor
from torch.nn import functional as F

import torchce.functional

INF = math.inf

# One vector and less, rows summed twice, long rows of whole packs and with a remainder.
CLASSES = [2, 3, 17, 1000, 32000]
LAYOUTS = [pytest.param(None, id="adjacent"), pytest.param("transposed", id="strided")]
KINDS = ["smoothed", "probability", "smoothed_sparse_probability"]


def logits_of(classes: int, layout: str | None, dtype: torch.dtype, device: str) -> Tensor:
    """Rows in which the sums' maximum changes in different ways; a class's probability is 1 in none of them."""
    place = torch.arange(classes, dtype=torch.float64) / (classes - 1)
    rows = torch.stack(
        [
            cases.normal((classes,), torch.float64, "cpu"),
            3 * place,  # never far above the first maximum
            12 * place,  # far above it, step by step
            -12 * place - 5,  # below 0, and no later maximum
            12 * (place > 0.5),  # at once, and many are the largest
            torch.zeros(classes, dtype=torch.float64),
        ]
    )
    return cases.laid_out(layout, lambda shape: torch.empty(shape, dtype=dtype, device=device), rows.shape).copy_(rows)


def problem(kind: str, logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Target and options. One row of class indices is ignored; "sparse" probabilities leave classes out."""
    shape, dtype, device = tuple(logits.shape), logits.dtype, str(logits.device)
    smoothing = 0.1 if kind.startswith("smoothed") else 0.0
    if kind == "probability":
        target = (0.1 + cases.uniform(shape, torch.float64, "cpu")).to(device, dtype)
    elif kind != "smoothed":
        target = cases.probabilities(shape, dtype, device)
    else:
        target = cases.indices((shape[0],), shape[1], torch.int64, device)
        target[1] = -100
    return target, {"label_smoothing": smoothing}


def some(classes: int, places: Any, value: float = INF) -> Tensor:
    weight = cases.uniform((classes,), torch.float64, "cpu", seed=5)
    weight[places] = value
    return weight


# Where a row's infinite weights stand.
WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "first": lambda classes: some(classes, 0),
    "middle": lambda classes: some(classes, classes // 2),
    "last": lambda classes: some(classes, classes - 1),
    "many": lambda classes: some(classes, slice(None, None, 3)),
    "all": lambda classes: some(classes, slice(None)),
    "minus_infinity": lambda classes: some(classes, classes // 2, -INF),
    "both": lambda classes: some(classes, 0).index_fill(0, torch.tensor(classes - 1), -INF),
    "infinity_and_0": lambda classes: some(classes, slice(1, None), 0.0).index_fill(0, torch.tensor(0), INF),
}


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("kind", [*KINDS, "sparse_probability"])
def test_every_place(device: str, kind: str, dtype: torch.dtype, layout: str | None, classes: int) -> None:
    """Loss and gradients, infinite and NaN where the formulas are."""
    logits = logits_of(classes, layout, dtype, device)
    target, options = problem(kind, logits)
    for name in WEIGHTS if classes <= 1000 else ("first", "middle", "many"):
        options["weight"] = WEIGHTS[name](classes).to(device, dtype)
        loss = check_softmax_ce(logits, target, reduction="none", target_grad=kind != "smoothed", **options)
        if dtype != torch.bfloat16:  # in which log p is 0 for torch where it is near 0
            theirs = F.cross_entropy(logits, target, reduction="none", **options)
            assert loss.isposinf().tolist() == theirs.isposinf().tolist()
            assert loss.isneginf().tolist() == theirs.isneginf().tolist()


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_reductions(device: str, kind: str, reduction: str, layout: str | None, classes: int) -> None:
    """The mean over class indices is NaN, as torch's, where a row's own weight is infinite: its divisor is too."""
    logits = logits_of(classes, layout, torch.float32, device)
    target, options = problem(kind, logits)
    if kind == "smoothed":
        target[target == classes - 1] = 0
    for name in ("first", "last"):
        options["weight"] = WEIGHTS[name](classes).to(device, torch.float32)
        loss = check_softmax_ce(logits, target, reduction=reduction, **options)
        nan = kind == "smoothed" and reduction == "mean" and name == "first" and bool((target == 0).any())
        assert bool(loss.isnan() if nan else loss == INF)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_classes_without_smoothing(device: str, layout: str | None, classes: int) -> None:
    """A class index leaves the other classes' weights out."""
    logits = logits_of(classes, layout, torch.float32, device)
    target = torch.zeros(len(logits), dtype=torch.int64, device=device)
    for name, finite in (("first", False), ("last", True)):
        weight = WEIGHTS[name](classes).to(device, torch.float32)
        loss = check_softmax_ce(logits, target, weight=weight, reduction="none")
        assert bool(loss.isfinite().all() if finite else (loss == INF).all())


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinite_logits(device: str, kind: str, layout: str | None, classes: int) -> None:
    """Masked classes in front, before there is any maximum, of infinite weight, of a finite one and of none."""
    logits = logits_of(classes, layout, torch.float32, device) - 1e4
    logits[:, : classes // 2] = -INF
    target, options = problem(kind, logits)
    masked = {"infinity": INF, "finite": 1.0, "large": 1e36}
    for value in masked.values():
        options["weight"] = some(classes, 0, value).to(device, torch.float32)
        loss = check_softmax_ce(logits, target, reduction="none", **options)
        kept = torch.ones_like(loss, dtype=torch.bool) if kind != "smoothed" else target != -100
        assert bool((loss[kept] == INF).all())
    options["weight"] = some(classes, slice(classes // 2), 0.0).to(device, torch.float32)
    assert bool(check_softmax_ce(logits, target, reduction="none", **options).isfinite().all())


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_certain_class(device: str, kind: str, layout: str | None, classes: int) -> None:
    """Where log p is rounded to 0, infinity times it is NaN for torch; the limit is infinite, as for other classes."""
    logits = logits_of(classes, layout, torch.float32, device)
    logits[:, 0] = 1000.0
    target, options = problem(kind, logits)
    for name in ("first", "middle", "last"):
        options["weight"] = WEIGHTS[name](classes).to(device, torch.float32)
        loss = torchce.functional.cross_entropy(logits, target, reduction="none", **options)
        theirs = F.cross_entropy(logits, target, reduction="none", **options)
        if kind == "smoothed":
            certain = target == 0  # its own loss has no sum
            assert loss.isnan().tolist() == (certain & (name == "first")).tolist()
            loss, theirs = loss[~certain & (target != -100)], theirs[~certain & (target != -100)]
        assert bool((loss == INF).all())
        assert bool((theirs.isnan() if name == "first" else theirs == INF).all())


@pytest.mark.parametrize("kind", KINDS)
def test_one_class(device: str, kind: str) -> None:
    """Its log p is 0: NaN, as in torch."""
    logits = cases.normal((3, 1), torch.float32, device)
    target, options = problem(kind, logits)
    loss = check_softmax_ce(logits, target, weight=torch.tensor([INF], device=device), reduction="none", **options)
    assert loss.isnan().tolist() == [True, kind != "smoothed", True]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_shows(device: str, kind: str, layout: str | None, classes: int) -> None:
    """A NaN weight, a NaN logit and an infinite logit, also beside infinite weights and where all weights are 0."""
    clean = logits_of(classes, layout, torch.float32, device)
    target, options = problem(kind, clean)
    for others in (WEIGHTS["middle"](classes), torch.zeros(classes), torch.ones(classes)):
        for place in {0, classes // 2, classes - 1}:
            for poison in (math.nan, INF):
                logits = clean.clone(memory_format=torch.preserve_format)
                logits[2, place] = poison
                weight = others.to(device, torch.float32)
                loss = torchce.functional.cross_entropy(logits, target, weight=weight, reduction="none", **options)
                assert loss.isnan().tolist() == [row == 2 for row in range(len(loss))]
            weight = others.to(device, torch.float32).index_fill(0, torch.tensor(place, device=device), math.nan)
            loss = torchce.functional.cross_entropy(clean, target, weight=weight, reduction="none", **options)
            assert loss.isnan().tolist() == [kind != "smoothed" or row != 1 for row in range(len(loss))]


@pytest.mark.parametrize("classes", [1000, 32000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["smoothed", "probability"])
def test_products_beyond_float32(device: str, kind: str, layout: str | None, classes: int) -> None:
    """One weight whose losses overflow float32, and weights whose sum does: infinite where the row's loss is.

    torch, which divides by the classes last, makes smoothed losses infinite that are in range.
    """
    logits = logits_of(classes, layout, torch.float32, device)
    target, options = problem("smoothed", logits)
    if kind == "probability":  # as large as an index's
        target, options = torch.full_like(logits, 0.5), {}
    for places in (0, classes // 2, classes - 1, slice(None)):
        options["weight"] = some(classes, places, 3e38).to(device, torch.float32)
        loss = torchce.functional.cross_entropy(logits, target, reduction="none", **options)
        truth = reference.softmax_ce(logits, target, reduction="none", **options).loss.value.float()
        theirs = F.cross_entropy(logits, target, reduction="none", **options)
        assert (loss == INF).tolist() == (truth == INF).tolist()
        assert not bool(((loss == INF) & (theirs != INF)).any())
        assert not bool(loss.isnan().any())
