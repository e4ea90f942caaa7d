"""One problem, all contenders, every pass -> ledger rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contenders import COPY, EAGER, OURS, READ, YARDSTICKS, Contender, Loss, Unsupported, eager
from benchmarks.ledger import Row
from benchmarks.problems import DTYPES, LINEAR_CROSS_ENTROPY, Inputs, Problem
from benchmarks.timing import Timed, clock, interleave, peak_bytes
from benchmarks.traffic import traffic_bytes

PHASES = {"cpu": ("forward", "forward+backward"), "cuda": ("forward", "backward", "forward+backward")}

# Input sets of a problem share this much memory. CPU: they stay in the L2 cache of one core, as a single set would.
# CUDA: twice the largest L2 cache in use (126 MB), so that no set is still cached when its turn comes.
SETS_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
MAX_SETS = 64
# Beyond this a copy's time is proportional to its size, and a larger one would only take memory from the contenders.
LARGEST_COPY_BYTES = 2 << 30

# A contender whose loss is off by more than this computes something else. 16-bit results carry 3 digits, and torch's
# own 16-bit mean drifts further over many rows.
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Budget:
    seconds: float  # for each pass, shared by all contenders
    min_rounds: int


THOROUGH = Budget(2.0, 7)
QUICK = Budget(0.3, 3)


class _Case:
    """A problem's data, and each contender's calls on it."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: str):
        self.problem, self.device = problem, device
        self.element_bytes = dtype.itemsize
        logits_bytes = math.prod(problem.shape) * dtype.itemsize
        count = max(1, min(MAX_SETS, SETS_BYTES[device] // logits_bytes))
        self.sets = [problem.inputs(dtype, device, seed) for seed in range(count)]
        self._trainable = [self._leaves(inputs) for inputs in self.sets]
        self._perishable: list[Inputs] | None = None

    @staticmethod
    def _leaves(inputs: Inputs) -> Inputs:
        return inputs.with_first(*(x.detach().requires_grad_() for x in inputs.arguments[: inputs.differentiable]))

    @property
    def perishable(self) -> list[Inputs]:
        """Inputs to be overwritten: not leaves, as the output of a layer is not. One copy for all who destroy it."""
        if self._perishable is None:
            self._perishable = [self._copies(inputs) for inputs in self.sets]
        return self._perishable

    @staticmethod
    def _copies(inputs: Inputs) -> Inputs:
        def copy(x: Tensor) -> Tensor:
            anchor = x.new_zeros(1, requires_grad=True)  # a leaf of the full size would be a third copy
            return anchor.expand(x.shape).clone()

        return inputs.with_first(*map(copy, inputs.arguments[: inputs.differentiable]))

    def renew(self, i: int) -> None:
        inputs = self.sets[i]
        with torch.no_grad():
            for k in range(inputs.differentiable):
                self.perishable[i].arguments[k].copy_(inputs.arguments[k])

    def timed(self, contender: Contender, loss: Loss, phase: str) -> Timed:
        if phase == "forward":
            return Timed(contender.name, [_forward(loss, inputs) for inputs in self.sets])
        consumes = contender.consumes(self.problem)
        data = self.perishable if consumes else self._trainable
        renew = self.renew if consumes else None
        if phase == "forward+backward":
            return Timed(contender.name, [_forward_backward(loss, inputs) for inputs in data], renew)

        results: list[Any] = [None] * len(data)

        def forward(i: int) -> None:
            if renew is not None:
                renew(i)
            results[i] = loss(*data[i].arguments, **data[i].keywords)

        def backward(i: int) -> Any:
            return lambda: torch.autograd.grad(results[i], data[i].arguments[: data[i].differentiable])

        return Timed(contender.name, [backward(i) for i in range(len(data))], forward)

    def yardsticks(self, phase: str) -> list[Timed]:
        """A plain copy that moves as many bytes as the pass, half of them each way; on CPU also a plain read."""
        moved = traffic_bytes(self.problem, phase, self.element_bytes)
        if moved is None:
            return []
        size = min(moved, LARGEST_COPY_BYTES)
        source = torch.ones(size // 8, dtype=torch.float32, device=self.device)
        destination = torch.zeros_like(source)  # written once, so that the system has given it pages
        sticks = [Timed(COPY, [lambda: destination.copy_(source)], scale=moved / size)]
        if self.device == "cpu" and phase == "forward":
            whole = torch.ones(size // 4, dtype=torch.float32)
            sticks.append(Timed(READ, [whole.sum], scale=moved / size))
        return sticks


def _forward(loss: Loss, inputs: Inputs) -> Any:
    arguments, keywords = inputs.arguments, inputs.keywords

    def call() -> None:
        with torch.no_grad():
            loss(*arguments, **keywords)

    return call


def _forward_backward(loss: Loss, inputs: Inputs) -> Any:
    arguments, keywords = inputs.arguments, inputs.keywords
    wanted = arguments[: inputs.differentiable]

    def call() -> None:
        # The gradient is dropped at once, as zero_grad does: every call allocates it, for every contender.
        torch.autograd.grad(loss(*arguments, **keywords), wanted)

    return call


def _reference(problem: Problem, inputs: Inputs) -> float:
    """The loss by torch, from inputs widened to float32."""
    widened = [x.float() if x.is_floating_point() else x for x in inputs.arguments]
    keywords = {k: v.float() if isinstance(v, Tensor) else v for k, v in inputs.keywords.items()}
    if problem.op == LINEAR_CROSS_ENTROPY:  # in parts: float32 logits of the whole problem are gigabytes
        hidden, linear_weight, target = widened
        parts = zip(hidden.split(1024), target.split(1024), strict=True)
        total = sum(F.cross_entropy(F.linear(h, linear_weight), t, reduction="sum").item() for h, t in parts)
        return total / len(target)
    return eager(problem)(*widened, **keywords).item()


def _bind(contender: Contender, case: _Case, dtype: str, reference: float) -> Loss:
    loss = contender.loss(case.problem)
    if "forward" not in contender.phases:  # another contender's forward, and checked there
        return loss
    with torch.no_grad():
        value = loss(*case.sets[0].arguments, **case.sets[0].keywords).item()
    # torch's own 16-bit results are the standard, whatever they are; all others must find the value.
    if contender.name != EAGER and not abs(value - reference) <= TOLERANCE[dtype] * abs(reference):
        raise Unsupported(f"computes {value:.6g}, float32 torch {reference:.6g}")
    return loss


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, Unsupported) else f"failed: {type(error).__name__}: {text[:200]}"


def measure(
    problem: Problem, dtype: str, device: str, contenders: Sequence[Contender], budget: Budget, phases: Sequence[str]
) -> Iterator[Row]:
    """Rows of one problem: each contender in each pass, and the yardsticks; failures are rows with a note."""
    torch.compiler.reset()  # else the compiler gives up specialising after a few shapes

    def row(phase: str, contender: str, **values: Any) -> Row:
        moved = traffic_bytes(problem, OURS.get(contender) or phase, DTYPES[dtype].itemsize)
        return Row(problem.op, problem.size, problem.variant, dtype, phase, contender, traffic_bytes=moved, **values)

    try:
        case = _Case(problem, DTYPES[dtype], device)
        with torch.no_grad():
            reference = _reference(problem, case.sets[0])
    except torch.OutOfMemoryError as error:  # a smaller card still measures the rest of the grid
        yield from (row(phase, contender.name, note=_words(error)) for contender in contenders for phase in phases)
        return
    timer = clock(device)
    if problem.op == LINEAR_CROSS_ENTROPY:  # most compute its gradients in the forward, and so have no backward to time
        phases = [phase for phase in phases if phase != "backward"]

    bound: list[tuple[Contender, Loss]] = []
    for contender in contenders:
        try:
            bound.append((contender, _bind(contender, case, dtype, reference)))
        except Exception as error:  # a peer's failure is a result, not an end
            yield from (row(phase, contender.name, note=_words(error)) for phase in phases if phase in contender.phases)

    for phase in phases:
        timed: list[Timed] = []
        peaks: dict[str, int | None] = {}
        for contender, loss in bound:
            if phase not in contender.phases:
                continue
            try:
                each = case.timed(contender, loss, phase)
                for _ in range(2):  # the first call compiles, allocates what is kept, and fails if any does
                    timer.sample(each, 1)
                peaks[each.name] = peak_bytes(each, device)
                timed.append(each)
            except Exception as error:
                yield row(phase, contender.name, note=_words(error))
        timed += case.yardsticks(phase)
        measured = interleave(timed, timer, budget.seconds, budget.min_rounds, problem.launch_bound)
        for name, result in measured.items():
            yield row(
                phase,
                name,
                median=result.median,
                iqr=result.iqr,
                minimum=min(result.times),
                samples=len(result.times),
                calls_per_sample=result.number_per_run,
                peak_bytes=None if name in YARDSTICKS else peaks[name],
            )
