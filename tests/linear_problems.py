"""Problems of linear cross entropy, their truth in float64, and the same loss through whole logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cases
import composed
import torch
from comparison import RELATIVE, assert_bitwise_equal, leaf, ulp
from torch import Tensor
from torch.nn import functional as F

import torchce.functional as ours
from torchce import CrossEntropyOutput

DIFFERENTIABLE = ("sample_weight", "divisor", "logit_scale")


class Layer(NamedTuple):
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Layer:
        return Layer(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]


def layer(
    rows: int | None = 37,
    features: int = 12,
    classes: int = 29,
    out_features: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    device: str = "cpu",
    scale: float = 3.0,
) -> Layer:
    """Logits spread about as far as ``scale``; without ``rows`` no batch."""
    outputs = (classes, *out_features)
    return Layer(
        cases.normal([features] if rows is None else [rows, features], dtype, device, seed=11),
        cases.normal([*outputs, features], dtype, device, seed=12, scale=scale / features**0.5),
        cases.normal(outputs, dtype, device, seed=13) if bias else None,
    )


def logits_shape(of: Layer) -> tuple[int, ...]:
    return (*of.input.shape[:-1], *of.linear_weight.shape[:-1])


def target_for(of: Layer, kind: str = "index") -> Tensor:
    """With some ignored rows among indices."""
    target = cases.softmax_target(kind, logits_shape(of), of.input.dtype, str(of.input.device))
    if kind == "index" and target.dim():
        target = torch.where(
            cases.uniform(target.shape, torch.float32, "cpu", seed=17).to(target.device) < 0.2, -100, target
        )
    return target


def logits_of(of: Layer) -> Tensor:
    bias = None if of.linear_bias is None else of.linear_bias.flatten()
    return F.linear(of.input, of.linear_weight.flatten(0, -2), bias).view(logits_shape(of))


def fused(of: Layer, target: Tensor, **options: Any) -> Any:
    return ours.linear_cross_entropy(of.input, of.linear_weight, target, linear_bias=of.linear_bias, **options)


def unfused(of: Layer, target: Tensor, **options: Any) -> Any:
    return ours.cross_entropy(logits_of(of), target, **options)


def truth(of: Layer, target: Tensor, **options: Any) -> Any:
    """Of float64 tensors, by torch's own operations; with everything that can be returned if anything is."""
    returned = [options.pop(name) for name in list(options) if name.startswith("return_")]
    logits = logits_of(of)
    loss = composed.cross_entropy(logits, target, **options)
    if not any(returned):
        return loss
    values = composed.transformed(logits, options.get("softcap"), options.get("logit_scale"))
    class_dim = min(1, logits.dim() - 1)
    return CrossEntropyOutput(
        loss, values.logsumexp(class_dim), logits.argmax(class_dim), None, composed.entropy(values, class_dim)
    )


def number(result: Any) -> Tensor:
    """One made of all that a loss returned, with another factor for each."""
    if isinstance(result, Tensor):
        return (result * factors(result)).sum()
    parts = (result.loss, result.lse, result.entropy)
    return sum((part * factors(part, seed)).sum() for seed, part in enumerate(parts) if part is not None)  # type: ignore[return-value]


def factors(like: Tensor, seed: int = 0) -> Tensor:
    if like.dim() == 0:
        return torch.full_like(like, 1.375 + seed)
    return cases.normal(like.shape, torch.float32, "cpu", seed=seed).to(like)


def results(
    function: Callable[..., Any],
    of: Layer,
    target: Tensor,
    options: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """What ``function`` gives, and the gradients of all that has one, by name; computed in ``dtype`` if it is given."""
    options = dict(options)
    if dtype is not None:
        of = of.to(dtype)
        target = target.to(dtype) if target.is_floating_point() else target.long()
        options |= {k: v.to(dtype) for k, v in options.items() if isinstance(v, Tensor)}
        options.pop("dtype", None)
    of = Layer(*(None if t is None else leaf(t) for t in of))  # type: ignore[arg-type]
    options |= {k: leaf(v) for k, v in options.items() if k in DIFFERENTIABLE and isinstance(v, Tensor)}
    leaves = {k: v for k, v in {**of._asdict(), **options}.items() if isinstance(v, Tensor) and v.requires_grad}
    result = function(of, target, **options)
    found = {"loss": result} if isinstance(result, Tensor) else result._asdict()
    gradients = torch.autograd.grad(number(result), list(leaves.values()))
    named = {f"gradient of {name}": grad for name, grad in zip(leaves, gradients, strict=True)}
    return {name: t.detach() for name, t in {**found, **named}.items() if t is not None}


def assert_no_worse(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    truths: Mapping[str, Tensor],
    ulps: float = 1,
    term: float = 0.0,
) -> None:
    """Our errors' root mean square is at most one ulp (or some) above theirs, which are the unfused loss's.

    The ulp is that of a tensor's largest number: its elements are sums of terms of both signs. In a single element two
    orders of adding them up may err apart by what comparison.py grants, times that number, or times the size of a
    ``term``, where all may cancel, and so in the mean of a few drawn ones.
    """
    assert ours.keys() == theirs.keys()
    for name, result in ours.items():
        other, expected = theirs[name], truths[name]
        assert (result.dtype, result.shape) == (other.dtype, other.shape), name
        if not result.is_floating_point():
            assert_bitwise_equal(result, other, name)
        elif result.numel():
            error, their_error = ((t.double() - expected).abs() for t in (result, other))
            largest = expected.abs().max().clamp_min(term)
            assert error.isfinite().all(), name
            one, slack = ulps * ulp(largest, result.dtype), RELATIVE[result.dtype] * largest
            assert error.max() <= their_error.max() + one + slack, f"{name}: {error.max()}, unfused {their_error.max()}"
            are_many = result.numel() >= 64 or term == 0  # of a few drawn numbers a mean is one of them
            if result.dtype != torch.float64 and are_many:  # whose truth is no truer
                rms, their_rms = (t.square().mean().sqrt() for t in (error, their_error))
                assert rms <= their_rms + one, f"{name}: {rms}, unfused {their_rms}, ulp {one}"
