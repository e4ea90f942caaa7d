"""Divergences and entropies in float64, written out, as one composes them in torch, and how ours are held to both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cases
import reference
import torch
from comparison import assert_accurate, assert_bitwise_equal, grad_output_for, leaf
from reference import Truth, float64, times
from torch import Tensor
from torch.nn import functional as F

import torchce.functional as ours


@dataclass(frozen=True)  # Dynamo of torch 2.10 calls no named tuple
class Kind:
    """A function of ours with the options that make a formula of it."""

    name: str
    function: Callable[..., Tensor]
    options: dict[str, Any]

    @property
    def has_target(self) -> bool:
        return "entropy" not in self.name

    @property
    def is_binary(self) -> bool:
        """Whether it is of elements, which have no options but a reduction, and not of rows."""
        return self.name.startswith("binary")

    def __call__(self, input: Tensor, target: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
        tensors = (input, target) if self.has_target else (input,)
        if self.is_binary:
            options = {name: value for name, value in options.items() if name == "reduction"}
        return self.function(*tensors, *args, **self.options, **options)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("kl", ours.kl_div_with_logits, {"target_logits": True}),
        Kind("kl_probabilities", ours.kl_div_with_logits, {}),
        Kind("reverse_kl", ours.kl_div_with_logits, {"target_logits": True, "reverse": True}),
        Kind("reverse_kl_probabilities", ours.kl_div_with_logits, {"reverse": True}),
        Kind("js", ours.js_div_with_logits, {"target_logits": True}),
        Kind("js_probabilities", ours.js_div_with_logits, {}),
        Kind("js_beta", ours.js_div_with_logits, {"target_logits": True, "beta": 0.15}),
        Kind("entropy", ours.entropy_with_logits, {}),
    )
}

BINARY_KINDS = {
    kind.name: kind
    for kind in (
        Kind("binary_kl", ours.binary_kl_div_with_logits, {"target_logits": True}),
        Kind("binary_kl_probabilities", ours.binary_kl_div_with_logits, {}),
        Kind("binary_entropy", ours.binary_entropy_with_logits, {}),
    )
}


def operands(
    kind: Kind, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 3.0
) -> tuple[Tensor, Tensor | None]:
    input = cases.normal(shape, dtype, device, seed=1, scale=scale)
    if not kind.has_target:
        return input, None
    if kind.options.get("target_logits"):
        return input, cases.normal(shape, dtype, device, seed=2, scale=scale)
    if kind.is_binary:
        return input, cases.uniform(shape, dtype, device, seed=2)
    # Reverse divergences from what excludes a class are infinite.
    softmax = cases.normal(shape, torch.float64, "cpu", seed=2, scale=min(scale, 3.0)).softmax(min(1, len(shape) - 1))
    return input, softmax.clamp_min(torch.finfo(dtype).smallest_normal).to(device, dtype)


class _Side(NamedTuple):
    """A distribution, its logarithms and their size, and how a relative rounding error of all that is moves it."""

    p: Tensor
    log: Tensor
    size: Tensor
    error: Tensor
    is_known: bool


def _of_logits(logits: Tensor, temperature: float, class_dim: int) -> _Side:
    x = float64(logits) / temperature
    largest = x.amax(class_dim, keepdim=True)
    gap = torch.where(x == largest, 0, x - largest)
    log_p = gap - gap.exp().sum(class_dim, keepdim=True).log()
    rounded = x.abs() + largest.abs() if temperature != 1 else torch.zeros_like(x)  # the quotients are rounded too
    size = torch.where(log_p == -torch.inf, 0, log_p.abs())  # where it is excluded, nothing is rounded
    error = torch.where(log_p == -torch.inf, 0, 1 + size + rounded)
    return _Side(log_p.exp(), log_p, size, error, False)


def _of_probabilities(target: Tensor) -> _Side:
    p = float64(target)
    return _Side(p, p.log(), torch.where(p == 0, 0, p.log().abs()), torch.ones_like(p), True)


class Truths(NamedTuple):
    loss: Truth
    grad_input: Truth
    grad_target: Truth | None


def truth(
    kind: Kind,
    input: Tensor,
    target: Tensor | None,
    reduction: str = "mean",
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    grad_output: Tensor,
    **_: Any,
) -> Truths:
    """Loss and gradients, each with its condition (reference.py): exponentials and quotients are rounded relatively."""
    if kind.is_binary:
        return _binary_truth(kind, input, target, reduction, grad_output)
    class_dim = min(1, input.dim() - 1)

    def total(terms: Tensor) -> Tensor:
        return terms.sum(class_dim, keepdim=True)

    student = _of_logits(input, temperature, class_dim)
    teacher: _Side | None = None
    if target is not None:
        logits = kind.options.get("target_logits", False)
        teacher = _of_logits(target, temperature, class_dim) if logits else _of_probabilities(target)
    kept = torch.ones_like(total(student.p), dtype=torch.bool) if mask is None else mask.cpu().unsqueeze(class_dim)
    count = kept.double().sum()

    if teacher is None:
        loss = -total(times(student.p, student.log))
        size = total(times(student.p, student.size * student.error)) + total(student.p * student.error)
    elif "js" in kind.name:
        beta = kind.options.get("beta", 0.5)
        lift = 2.0**100  # so that no mixture is a subnormal number
        mixture = beta * (lift * teacher.p) + (1 - beta) * (lift * student.p)
        shares = []
        for side, share in ((teacher, beta), (student, 1 - beta)):
            ratio = (lift * side.p / mixture).log()
            ratio = torch.where((side.p == 0) | (mixture == 0), 0, ratio)
            shares.append((side, share, ratio, share * total(side.p * ratio)))
        loss = shares[0][3] + shares[1][3]
        size = sum(share * total(side.p * ratio.abs() * side.error) for side, share, ratio, _ in shares)
        size = size + total(torch.minimum(student.p * student.error, teacher.p * teacher.error))
    else:
        first, other = (student, teacher) if "reverse" in kind.name else (teacher, student)
        difference = torch.where(first.log == -torch.inf, 0, first.log - other.log)
        # Infinite even where float64 rounds the first's probability to 0.
        loss = total(torch.where(difference == torch.inf, torch.inf, times(first.p, difference)))
        of_sums = (0 if side.is_known else total(times(side.p, side.error)) for side in (first, other))
        size = total(times(first.p, difference.abs() * first.error + first.size)) + total(first.p) * sum(of_sums)
        size = size + total(times(first.p, torch.minimum(other.size, torch.full_like(other.size, 1e300))))
    zero = torch.zeros_like(loss)
    loss, size = torch.where(kept, loss, zero), torch.where(kept, size, zero)
    row_truth, g = reference._reduce(loss, size, count, reduction, grad_output, class_dim)
    g = torch.where(kept, g, 0)

    def gradient(value: Tensor, condition: Tensor, of_logits: bool = True, subnormal: Tensor | None = None) -> Truth:
        """``subnormal``: what a change of a probability by one moves."""
        by = g / temperature if of_logits else g
        kept_value = torch.where(kept & (by != 0), by * value, torch.zeros_like(value))
        moved = None if subnormal is None else (by.abs() + 1) * subnormal + 1  # products may be subnormal, too
        return Truth(kept_value, torch.where(kept, by.abs() * condition, torch.zeros_like(value)), subnormal=moved)

    if teacher is None:
        log = torch.where(student.p == 0, 0, student.log)
        value = student.p * (-log - loss)
        return Truths(
            row_truth,
            gradient(value, student.p * student.error * (log.abs() + size), subnormal=log.abs() + loss.abs() + 1),
            None,
        )
    if "js" in kind.name:
        found = []
        for (side, share, ratio, term), by in zip(shares, (teacher, student), strict=True):
            near = lift * (teacher.p * teacher.error + student.p * student.error) / mixture
            moved = share * (ratio.abs() * side.error + torch.minimum(near, 1 + side.error))
            if by.is_known:
                value = torch.where(side.p == 0, -torch.inf, share * ratio)
                found.append(gradient(value, moved, of_logits=False, subnormal=lift / mixture))
            else:
                condition = side.p * (moved + term.abs() * side.error + size)
                found.append(gradient(side.p * (share * ratio - term), condition, subnormal=ratio.abs() + term + 1))
        return Truths(row_truth, found[1], found[0])
    if first.is_known:
        value = difference + 1
        value = torch.where(first.p == 0, -torch.inf, value)
        of_first = gradient(value, first.size + other.size + other.error, of_logits=False)
    else:
        condition = first.p * (difference.abs() + loss.abs()) * first.error
        condition = times(first.p, first.size + other.size + first.error + other.error) + condition + first.p * size
        value = torch.where(first.p == 0, 0, first.p * (difference - loss))
        of_first = gradient(value, condition, subnormal=difference.abs() + loss.abs() + 1)
    if other.is_known:
        value = -torch.where(first.p == 0, 0, first.p / other.p)
        of_other = gradient(value, value.abs() * first.error, of_logits=False, subnormal=2 / other.p)
    else:
        weights = total(first.p)
        condition = weights * other.p * other.error + first.p * first.error
        of_other = gradient(other.p * weights - first.p, condition, subnormal=weights + 1)
    return Truths(row_truth, *((of_first, of_other) if "reverse" in kind.name else (of_other, of_first)))


def _binary_truth(kind: Kind, input: Tensor, target: Tensor | None, reduction: str, grad_output: Tensor) -> Truths:
    """Of elements; each logarithm of a probability is one of sigmoid, never of 1 minus something."""
    b = float64(input)
    q, not_q = b.sigmoid(), (-b).sigmoid()
    log_q, log_not_q = F.logsigmoid(b), F.logsigmoid(-b)
    least = 2.0**-149  # float32 rounds what is less to 0
    if target is None:
        value = -(times(q, log_q) + times(not_q, log_not_q))
        row_truth, g = reference._reduce(value, value, torch.tensor(float(b.numel())), reduction, grad_output)
        slope = times(times(-b, q), not_q)
        moved = g.abs() * torch.where(b.isinf(), 0, b.abs()) + 1
        return Truths(row_truth, Truth(g * slope, (g * slope).abs(), subnormal=moved), None)
    if kind.options.get("target_logits"):
        a = float64(target)
        p, not_p, log_p, log_not_p = a.sigmoid(), (-a).sigmoid(), F.logsigmoid(a), F.logsigmoid(-a)
    else:
        p = float64(target)
        not_p, log_p, log_not_p = 1 - p, p.log(), (-p).log1p()
        a = log_p - log_not_p
    gaps = [torch.where(f == -torch.inf, 0, f - o) for f, o in ((log_p, log_q), (log_not_p, log_not_q))]
    terms = [torch.where(gap == torch.inf, gap, times(f, gap)) for f, gap in zip((p, not_p), gaps, strict=True)]
    value = terms[0] + terms[1]
    smaller, is_yes = torch.minimum(p, not_p), p <= 0.5
    d = torch.where(a == b, 0, torch.where(is_yes, b - a, a - b))
    value = torch.where(d.abs() <= 1, (smaller * d.expm1()).log1p() - smaller * d, value)  # nothing of d is lost
    of_far = torch.where(d.abs() <= 1, 0, torch.minimum(-log_q - log_not_q, -log_p - log_not_p + value.abs()))
    condition = (times(smaller, d).abs() + of_far + value.abs()).nan_to_num(nan=0)
    row_truth, g = reference._reduce(value, condition, torch.tensor(float(b.numel())), reduction, grad_output)
    of_input = Truth(
        g * torch.where(is_yes, q - p, not_p - not_q),
        g.abs() * (torch.where(is_yes, q, not_q) + smaller),
        subnormal=2 * g.abs() + 1,
    )
    gap = torch.where(a == b, 0, a - b)
    if kind.options.get("target_logits"):
        slope = torch.where(gap.isinf() & (smaller > least), gap, times(times(p, not_p), gap))
        of_target = Truth(g * slope, (g * slope).abs(), subnormal=g.abs() * gap.abs() + 1)
    else:
        of_target = Truth(g * gap, g.abs() * (log_p.abs() + log_not_p.abs() + b.abs()))
    return Truths(row_truth, of_input, of_target)


def _binary_composed(kind: Kind, input: Tensor, target: Tensor | None, reduction: str) -> Tensor:
    logs = [F.logsigmoid(input), F.logsigmoid(-input)]
    if target is None:
        losses = -sum(log.exp() * torch.where(log == -torch.inf, 0, log) for log in logs)
    elif kind.options.get("target_logits"):
        targets = F.logsigmoid(target), F.logsigmoid(-target)
        losses = sum(F.kl_div(q, p, reduction="none", log_target=True) for q, p in zip(logs, targets, strict=True))
    else:
        losses = sum(F.kl_div(q, p, reduction="none") for q, p in zip(logs, (target, 1 - target), strict=True))
    return {"none": lambda t: t, "mean": torch.mean, "sum": torch.sum}[reduction](losses)


def composed(
    kind: Kind,
    input: Tensor,
    target: Tensor | None,
    reduction: str = "mean",
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What one writes with torch's functions."""
    if kind.is_binary:
        return _binary_composed(kind, input, target, reduction)
    class_dim = min(1, input.dim() - 1)
    log_q = F.log_softmax(input / temperature, class_dim)
    if target is None:
        rows = -(log_q.exp() * torch.where(log_q == -torch.inf, 0, log_q)).sum(class_dim)
    else:
        has_logits = kind.options.get("target_logits", False)
        log_p = F.log_softmax(target / temperature, class_dim) if has_logits else target.log()
        p = log_p.exp() if has_logits else target
        if "js" in kind.name:
            beta = kind.options.get("beta", 0.5)
            log_m = (beta * p + (1 - beta) * log_q.exp()).log()
            of_p = F.kl_div(log_m, log_p, reduction="none", log_target=True)
            of_q = F.kl_div(log_m, log_q, reduction="none", log_target=True)
            terms = beta * of_p + (1 - beta) * of_q
        elif "reverse" in kind.name:
            terms = F.kl_div(log_p, log_q, reduction="none", log_target=True)
        elif has_logits:
            terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        else:
            terms = F.kl_div(log_q, p, reduction="none")
        rows = terms.sum(class_dim)
    if mask is not None:
        rows = torch.where(mask, rows, 0)
    if reduction == "mean":
        rows = rows.sum() / (rows.numel() if mask is None else mask.sum())
    elif reduction == "sum":
        rows = rows.sum()
    return rows.to(dtype or rows.dtype)


def value_and_gradients(
    function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], grad_output: Tensor | None = None
) -> list[Tensor | None]:
    """Loss, and the gradients of input and target."""
    leaves = [None if t is None else leaf(t) for t in tensors]
    loss = function(*leaves)
    loss.backward(grad_output_for(loss) if grad_output is None else grad_output)
    return [loss.detach(), *(None if t is None else t.grad for t in leaves)]


def assert_same_bits_for_every_number_of_threads(kind: Kind, tensors: tuple[Tensor | None, ...]) -> None:
    """Of loss and gradients; the caller restores the number."""
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(lambda x, t: kind(x, t), tensors))
    for other in results[1:]:
        for result, wanted in zip(other, results[0], strict=True):
            if wanted is not None:
                assert result is not None
                assert_bitwise_equal(result, wanted)


def check(
    kind: Kind, input: Tensor, target: Tensor | None, *, grad_output: Tensor | None = None, **options: Any
) -> Tensor:
    """Hold loss and gradients to the reference and to torch; returns our loss."""
    results = value_and_gradients(lambda x, t: kind(x, t, **options), (input, target), grad_output)
    theirs = value_and_gradients(lambda x, t: composed(kind, x, t, **options), (input, target), grad_output)
    loss = results[0]
    assert loss is not None
    upstream = grad_output_for(loss) if grad_output is None else grad_output
    truths = truth(kind, input, target, grad_output=upstream, **options)

    def describe(index: tuple[int, ...]) -> str:
        values = [t[index].item() for t in (input, target) if t is not None and len(index) == t.dim()]
        return f"{kind.name} of {list(input.shape)} {input.dtype}, {values}, {options}"

    for name, our, their, true in zip(("loss", "grad_input", "grad_target"), results, theirs, truths, strict=True):
        if our is None:
            assert true is None or target is None
            continue
        assert true is not None
        assert their is not None
        assert our.dtype == their.dtype, f"{name}: {our.dtype}, torch gives {their.dtype}"
        assert_accurate(f"{kind.name}, {name}", our, true, their, describe)
    return loss
