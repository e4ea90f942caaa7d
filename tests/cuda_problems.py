"""Training steps that between them launch every kernel of csrc/cuda, for tests of how launches behave on a device."""

from __future__ import annotations

from typing import NamedTuple

import cases
import torch
from torch import Tensor

import torchce.functional


class Problem(NamedTuple):
    kind: str  # index, probability, smoothed, bce; options, with a scale, options_cpu_scale, where it is on the CPU
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str | None = None
    weighted: bool = False


# Each with more than one block, so that blocks count themselves.
PROBLEMS = {
    "lanes": Problem("index", (3001, 10)),
    "block": Problem("index", (257, 5000)),
    "parts": Problem("index", (3, 50257), torch.bfloat16),
    "parts_probability": Problem("probability", (2, 32000)),
    "smoothed": Problem("smoothed", (301, 1001), weighted=True),
    "probability": Problem("probability", (301, 1001), torch.bfloat16, weighted=True),
    "segmentation": Problem("index", (3, 19, 64, 64)),
    "segmentation_odd": Problem("probability", (3, 19, 61, 67)),
    "transposed": Problem("smoothed", (304, 1001), layout="transposed"),
    "options": Problem("options", (257, 5000)),
    "options_segmentation": Problem("options", (3, 19, 64, 64), torch.bfloat16),
    "options_cpu_scale": Problem("options_cpu_scale", (301, 1001)),
    "bce": Problem("bce", (70001,)),
    "bce_packs": Problem("bce", (512, 1024), torch.bfloat16),
    "bce_columns": Problem("bce", (513, 300), torch.bfloat16, weighted=True),
    "bce_pos_weight": Problem("bce", (64, 80, 7, 7), weighted=True),
}


def draw(problem: Problem, device: str, seed: int) -> list[Tensor]:
    """Logits, target and, where the problem has one, a weight or scale; leaves that require grad where they may."""
    kind, shape, dtype, layout, weighted = problem

    def arranged(make: cases.Maker) -> Tensor:
        return cases.laid_out(layout, make, shape)

    logits = arranged(lambda s: cases.normal(s, dtype, device, seed=seed, scale=3)).requires_grad_()
    if kind == "bce":
        target = arranged(lambda s: cases.uniform(s, dtype, device, seed=seed + 100)).requires_grad_()
        weight = cases.uniform([shape[1], *[1] * (len(shape) - 2)], dtype, device, seed=6) if weighted else None
    else:
        if kind == "probability":
            target = arranged(lambda s: cases.uniform(s, dtype, device, seed=seed + 100)).requires_grad_()
        else:
            target = cases.indices(cases.index_shape(shape), shape[1], torch.int64, device, seed=seed + 100)
        weight = cases.uniform([shape[1]], dtype, device, seed=6) if weighted else None
        if kind.startswith("options"):
            on_cpu = kind == "options_cpu_scale"
            weight = torch.tensor(0.7, device="cpu" if on_cpu else device, requires_grad=not on_cpu)
    return [logits, target] if weight is None else [logits, target, weight]


def loss_of(problem: Problem, inputs: list[Tensor], reduction: str = "mean") -> Tensor:
    logits, target, *weight = inputs
    if problem.kind == "bce":
        options = {"pos_weight": weight[0]} if weight else {}
        return torchce.functional.binary_cross_entropy_with_logits(logits, target, reduction=reduction, **options)
    if problem.kind.startswith("options"):
        own = {"z_loss": 0.1, "softcap": 5.0, "logit_scale": weight[0]}
        returned = {"return_lse": True, "return_predictions": True, "return_entropy": True}
        out = torchce.functional.cross_entropy(logits, target, reduction=reduction, **own, **returned)
        return out.loss + (out.lse + out.entropy).mean()
    smoothing = 0.1 if problem.kind == "smoothed" else 0.0
    return torchce.functional.cross_entropy(logits, target, *weight, reduction=reduction, label_smoothing=smoothing)


def step(problem: Problem, inputs: list[Tensor], reduction: str = "mean") -> list[Tensor]:
    """The loss and the gradient of every input that has one."""
    loss = loss_of(problem, inputs, reduction)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, torch.full_like(loss, -2.625))]


def renew(inputs: list[Tensor], fresh: list[Tensor]) -> None:
    """Writes fresh values into the same memory."""
    with torch.no_grad():
        for tensor, values in zip(inputs, fresh, strict=True):
            tensor.copy_(values)
