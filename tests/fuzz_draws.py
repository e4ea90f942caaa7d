"""What the fuzz draws its tensors from: memory layouts, numbers, weights, upstream gradients.

Hypothesis draws the structure and a seed; the numbers follow from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cases
import torch
from hypothesis import strategies as st
from torch import Tensor

SPECIAL = [-math.inf, math.inf, math.nan, 0.0, -0.0, 1e4, -1e4, 60000.0, -60000.0, 1e-7]
WIDE = [1e30, -1e30, 1e-38, 1e-42]  # beyond float16
SCALES = [1e-3, 1.0, 10.0, 1e4]
POWERS = (-24, 7)  # of two: gaps from where a term is 1 to where it is 0, in float32
WEIGHT_POWERS = {torch.float16: (-7.0, 4.0)}  # of ten
WIDE_WEIGHT_POWERS = (-38.0, 30.0)

seeds = st.integers(0, 2**20)


class Layout(NamedTuple):
    """How a tensor lies in memory: nothing, or all of what views can do to it."""

    order: tuple[int, ...]  # dimensions, slowest first
    steps: tuple[int, ...]
    padding: tuple[int, ...]  # elements beside it in each dimension
    expanded: tuple[bool, ...]  # stride 0
    offset: int  # in elements, so that the memory is not aligned

    def arrange(self, draw: Callable[[Sequence[int]], Tensor], shape: Sequence[int]) -> Tensor:
        sizes = [1 if self.expanded[d] else shape[d] * self.steps[d] + self.padding[d] for d in self.order]
        whole = draw([self.offset + math.prod(sizes)])[self.offset :].view(sizes)
        back = [self.order.index(d) for d in range(len(shape))]
        view = whole.permute(back)
        for d, step in enumerate(self.steps):
            if not self.expanded[d]:
                view = view.narrow(d, self.padding[d], shape[d] * step)[(slice(None),) * d + (slice(None, None, step),)]
        return view.expand(shape)


@st.composite
def layouts(draw: st.DrawFn, dims: int) -> Layout:
    if draw(st.booleans()):
        order = tuple(range(dims))
        if draw(st.booleans()):  # classes last, or strided
            order = (0, *order[2:], *order[1:2]) if dims > 1 else order
        return Layout(order, (1,) * dims, (0,) * dims, (False,) * dims, 0)

    def each(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(values, min_size=dims, max_size=dims)))

    return Layout(
        order=tuple(draw(st.permutations(range(dims)))),
        steps=each(st.sampled_from([1, 1, 1, 1, 2, 3])),
        padding=each(st.sampled_from([0, 0, 0, 1, 3])),
        expanded=each(st.sampled_from([False, False, False, False, True])),
        offset=draw(st.sampled_from([0, 0, 1, 3])),
    )


# A number close to a power of two, the sign of a gap below a row's largest.
near_power_of_two = st.builds(
    lambda power, steps: -math.ldexp(1 + steps * 2.0**-23, power), st.integers(*POWERS), st.integers(-2, 2)
)
gaps = st.one_of(st.floats(-110, 0, width=32), near_power_of_two)


class Outlier(NamedTuple):
    """One class whose logit is the same in every row, so that what it does to a rounding is, too."""

    place: int
    value: float

    def put(self, logits: Tensor, class_dim: int) -> None:
        for d, stride in enumerate(logits.stride()):  # what is expanded is written once
            if stride == 0 and logits.shape[d] > 1:
                if d == class_dim:
                    return
                logits = logits.narrow(d, 0, 1)
        logits.select(class_dim, self.place).fill_(self.value)


class Numbers(NamedTuple):
    seed: int
    kind: str  # "normal" (times the factor), "constant" (the factor), "powers" of two (with its sign)
    factor: float
    special: tuple[float, ...]  # values put at random places
    share: float  # of all places

    def draw(self, shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
        if self.kind == "normal":
            numbers = cases.normal(shape, torch.float64, "cpu", seed=self.seed, scale=self.factor)
        elif self.kind == "constant":
            numbers = torch.full(list(shape), self.factor, dtype=torch.float64)
        else:
            numbers = math.copysign(1.0, self.factor) * near_powers_of_two(shape, dtype, seed=self.seed + 3)
        if self.special:
            places = cases.uniform(shape, torch.float64, "cpu", seed=self.seed + 1) < self.share
            which = cases.indices(shape, len(self.special), torch.int64, "cpu", seed=self.seed + 2)
            values = torch.tensor(self.special, dtype=torch.float64)
            numbers = torch.where(places, values[which], numbers)
        return numbers.to(dtype).to(device)


def near_powers_of_two(shape: Sequence[int], dtype: torch.dtype, *, seed: int) -> Tensor:
    """Every power of the range and its neighbours in `dtype`."""
    lowest, highest = POWERS
    power = lowest + cases.indices(shape, highest - lowest + 1, torch.int64, "cpu", seed=seed)
    steps = cases.indices(shape, 5, torch.int64, "cpu", seed=seed + 1) - 2
    return torch.ldexp(1 + steps.double() * torch.finfo(dtype).eps, power)


@st.composite
def numbers(draw: st.DrawFn, dtype: torch.dtype) -> Numbers:
    # finfo.min is what masks are filled with.
    values = [*SPECIAL, torch.finfo(dtype).min] + WIDE * (dtype != torch.float16)
    kind = draw(st.sampled_from(["normal", "normal", "constant", "powers"]))
    if kind == "constant":
        factor = draw(gaps) * draw(st.sampled_from([1.0, -1.0]))
    else:
        # A product of subnormal numbers may be off by more than one of them, which is all that float64 is allowed.
        factor = draw(st.sampled_from(SCALES[:-1] if dtype == torch.float64 else SCALES))
        factor *= draw(st.sampled_from([1.0, -1.0]))
    return Numbers(
        seed=draw(seeds),
        kind=kind,
        factor=factor,
        special=tuple(draw(st.lists(st.sampled_from(values), max_size=0 if draw(st.booleans()) else 3))),
        share=draw(st.sampled_from([0.01, 0.3, 1.0])),
    )


@st.composite
def outliers(draw: st.DrawFn, classes: int) -> Outlier | None:
    if draw(st.booleans()):
        return None
    return Outlier(draw(st.integers(0, classes - 1)), draw(st.one_of(st.just(0.0), gaps)))


@st.composite
def weights(draw: st.DrawFn, dtype: torch.dtype) -> Callable[[Sequence[int]], Tensor]:
    """Not negative: near 1, with zeros, of one magnitude or of every magnitude at once."""
    kind = draw(st.sampled_from(["uniform", "zeros in it", "one magnitude", "every magnitude"]))
    lowest, highest = WEIGHT_POWERS.get(dtype, WIDE_WEIGHT_POWERS)
    power = draw(st.one_of(st.sampled_from([lowest, highest]), st.floats(lowest, highest)))
    magnitude = 10.0**power if kind == "one magnitude" else 1.0
    seed, zeros = draw(seeds), kind == "zeros in it" or draw(st.booleans())

    def make(shape: Sequence[int]) -> Tensor:
        values = cases.uniform(shape, torch.float64, "cpu", seed=seed)
        result = magnitude * values
        if kind == "every magnitude":
            result = 10.0 ** (lowest + values * (highest - lowest))
        if zeros:
            result = torch.where(cases.uniform(shape, torch.float64, "cpu", seed=seed + 1) < 0.3, 0.0, result)
        return result.to(dtype)

    return make


# None is the suite's own, with a number for each element of an unreduced loss.
grad_outputs = st.sampled_from([None, None, 0.0, 1.0, -3.0, 2.0**10, 1e-30, 65536.0, math.inf])
