"""``python -m gpu.kernels``: every CUDA kernel on small problems, held to the CPU kernels' results.

Small and plain enough to run under compute-sanitizer. Inputs are made on the CPU and copied, results are copied back:
hardly any kernel but torchce's runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cases
import torch
from torch import Tensor

import torchce
from torchce import ops

NONE, MEAN, SUM = 0, 1, 2
IGNORED = -100


class Softmax(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str  # index, smoothed, probability
    layout: str | None = None
    reduction: int = MEAN
    weighted: bool = False


class Bce(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    target_dtype: torch.dtype | None = None
    layout: str | None = None
    reduction: int = MEAN
    weighted: bool = False


F64, F32, BF16, F16 = cases.DTYPES

ROWS = 700  # more than half of the blocks that a large GPU runs at once: fewer long rows are cut into parts

# By kernel, with more than one block wherever a kernel shares anything between blocks.
SOFTMAX = {
    "a lane a row": Softmax((700, 10), F32, "index"),
    "lanes, bfloat16": Softmax((300, 7), BF16, "index", weighted=True),
    "lanes, misaligned": Softmax((37, 1001), BF16, "probability", "sliced", NONE),
    "lanes, float64": Softmax((33, 500), F64, "smoothed", reduction=SUM, weighted=True),
    "block": Softmax((ROWS, 2100), F32, "index"),
    "block, misaligned": Softmax((ROWS, 4201), F16, "smoothed", "sliced", NONE),
    "block, probabilities": Softmax((ROWS, 4200), BF16, "probability", weighted=True),
    "parts": Softmax((2, 20001), F32, "index"),
    "parts, smoothed": Softmax((1, 40000), BF16, "smoothed", weighted=True),
    "parts, probabilities": Softmax((2, 20001), F32, "probability", reduction=SUM),
    "beyond a cluster's shared memory": Softmax((1, 500_001), F32, "index", reduction=SUM),
    "across, packs": Softmax((2, 19, 64), F32, "index"),
    "across, packs, bfloat16": Softmax((2, 40, 16, 8), BF16, "probability", reduction=NONE),
    "across, single rows": Softmax((2, 19, 7, 11), BF16, "smoothed", weighted=True),
    "across, transposed": Softmax((64, 300), F32, "probability", "transposed"),
    "across, channels last": Softmax((2, 21, 5, 7), F32, "index", "channels_last", SUM),
    "across, float64": Softmax((3, 33, 50), F64, "probability"),
}
# By layout (csrc/cuda/sigmoid_bce_layout.h). Two dimensions: pos_weight is of columns; more: of channels.
BCE = {
    "dense": Bce((4096,), BF16),
    "dense, remainder": Bce((33, 31), BF16),
    "dense, every loss": Bce((33, 31), F32, reduction=NONE),
    "dense, float64": Bce((64, 33), F64, reduction=SUM),
    "dense, transposed": Bce((40, 24), F32, layout="transposed", reduction=NONE),
    "dense, integer targets": Bce((16, 17), F32, torch.int64, reduction=NONE),
    "dense, bool targets": Bce((16, 17), BF16, torch.bool),
    "dense, float32 targets": Bce((16, 16), BF16, torch.float32, reduction=NONE),
    "dense, fills the device": Bce((2048, 2049), BF16),
    "columns": Bce((64, 32), BF16, weighted=True),
    "columns, odd": Bce((33, 31), F32, reduction=SUM, weighted=True),
    "columns, fewer than a pack": Bce((1000, 3), F16, reduction=NONE, weighted=True),
    "columns, float64": Bce((64, 32), F64, weighted=True),
    "columns, integer targets": Bce((33, 31), BF16, torch.int64, weighted=True),
    "strided, packs": Bce((2, 8, 8, 8), BF16, torch.bool, weighted=True),
    "strided, single elements": Bce((33, 31), F16, layout="sliced", reduction=NONE, weighted=True),
    "strided, misaligned": Bce((33, 32), BF16, layout="offset"),
}
# One rounding apart, for sums of another order; 16-bit gradients may round to a neighbour.
TOLERANCES = {F64: 1e-12, F32: 2e-5, BF16: 1e-2, F16: 2e-3}

Results = Iterator[tuple[str, Tensor]]


def is_dense(tensor: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


def softmax(problem: Softmax, device: str) -> Results:
    """The results of every op of the loss."""
    shape, dtype, kind, layout, reduction, weighted = problem

    def logits() -> Tensor:
        return cases.arranged(layout, shape, dtype, device)

    x, smoothing = logits(), 0.1 if kind == "smoothed" else 0.0
    acc = ops.accumulation_dtype(dtype)
    weight = cases.uniform([shape[1]], acc, device, seed=6) if weighted else None
    if kind == "probability":
        target = cases.laid_out(layout, lambda s: cases.uniform(s, dtype, device), shape)
    else:
        target = cases.indices(cases.index_shape(shape), shape[1], torch.int64, "cpu")
        target[-1] = IGNORED if shape[0] > 1 else target[-1]
        target = target.to(device)
    loss, statistics, totals = ops.softmax_ce_forward(x, target, weight, None, reduction, IGNORED, smoothing)
    yield "loss", loss
    grad_output = cases.normal(loss.shape, dtype, device, seed=7)
    options = (reduction, IGNORED, smoothing)
    saved = (target, weight, statistics, totals, *options)
    yield "gradient", ops.softmax_ce_backward(grad_output, x, *saved)
    if kind != "probability" or dtype == acc:  # other pairs the op does not know
        own = (0.1, 5.0, 0.7)  # z-loss, softcap, scale
        scale = torch.tensor(1.5, dtype=acc, device=device)
        loss, lse, predictions, entropy, *outputs_saved = ops.softmax_ce_forward_outputs(
            x, target, weight, scale, None, True, True, True, reduction, IGNORED, smoothing, *own
        )
        yield from (("loss with options", loss), ("lse", lse), ("predictions", predictions), ("entropy", entropy))
        grads = (grad_output, *(cases.normal(lse.shape, acc, device, seed=seed) for seed in (8, 9)))
        outputs_saved = [target, weight, scale, *outputs_saved, reduction, IGNORED, smoothing, *own]
        yield "gradient of all outputs", ops.softmax_ce_backward_outputs(*grads, x, *outputs_saved)
        yield "gradient of the scale", ops.softmax_ce_backward_scale(*grads, x, *outputs_saved)
    if kind == "probability":
        yield (
            "gradient of the target",
            ops.softmax_ce_backward_target(grad_output, x, target, weight, None, statistics, totals, *options),
        )
    if is_dense(x):
        overwritten = logits()
        ops.softmax_ce_backward_(grad_output, overwritten, *saved)
        yield "gradient in place", overwritten
        overwritten = logits()
        no_mean = (None, NONE if reduction == NONE else SUM, IGNORED, smoothing)
        yield (
            "loss of forward_backward",
            ops.softmax_ce_forward_backward_(grad_output, overwritten, target, weight, *no_mean),
        )
        yield "gradient of forward_backward", overwritten


def bce(problem: Bce, device: str) -> Results:
    shape, dtype, target_dtype, layout, reduction, weighted = problem

    def logits() -> Tensor:
        return cases.arranged(layout, shape, dtype, device)

    x, acc = logits(), ops.accumulation_dtype(dtype)
    target = cases.laid_out(layout, lambda s: cases.uniform(s, dtype, "cpu"), shape)
    if target_dtype is not None:
        target = target.to(target_dtype) if target_dtype.is_floating_point else target.round().to(target_dtype)
    target = target.to(device)
    of_classes = [shape[1], *[1] * (len(shape) - 2)] if len(shape) > 1 else [1]
    weight = cases.uniform([1], acc, device, seed=6) if weighted else None
    pos_weight = cases.uniform(of_classes, acc, device, seed=8) if weighted else None
    loss = ops.sigmoid_bce_forward(x, target, weight, pos_weight, None, reduction)
    yield "loss", loss
    saved = (cases.normal(loss.shape, dtype, device, seed=7), x, target, weight, pos_weight, reduction)
    yield "gradient", ops.sigmoid_bce_backward(*saved)
    if target.is_floating_point():
        yield "gradient of the target", ops.sigmoid_bce_backward_target(*saved)
    if is_dense(x):
        overwritten = logits()
        ops.sigmoid_bce_backward_(saved[0], overwritten, *saved[2:])
        yield "gradient in place", overwritten


def differences(name: str, run: Callable[[str], Results], dtype: torch.dtype, device: str) -> Iterator[str]:
    for (what, result), (_, expected) in zip(run(device), run("cpu"), strict=True):
        tolerance = TOLERANCES[dtype]
        try:
            torch.testing.assert_close(result.cpu(), expected, rtol=tolerance, atol=tolerance / 20, equal_nan=True)
        except AssertionError as error:
            yield f"{name}, {what}: {' '.join(str(error).split())}"


def bad_targets() -> Iterator[str]:
    """Indices far outside: nothing outside the tensors may be read."""
    for shape in ((40, 10), (4, 5000), (2, 40000), (4, 19, 8, 8)):
        x = cases.normal(shape, F32, "cuda")
        target = torch.full(cases.index_shape(shape), 2**40, dtype=torch.int64)
        target[0], target[1] = -1, shape[1]
        target = target.to("cuda")
        loss, statistics, totals = ops.softmax_ce_forward(x, target, None, None, NONE, IGNORED, 0.1)
        grad_output = torch.ones(cases.index_shape(shape)).to("cuda")
        grad = ops.softmax_ce_backward(grad_output, x, target, None, statistics, totals, NONE, IGNORED, 0.1)
        forward_backward = ops.softmax_ce_forward_backward_(grad_output, x, target, None, None, NONE, IGNORED, 0.1)
        if not all(result.cpu().isnan().all() for result in (loss, grad, forward_backward, x)):
            yield f"bad targets {list(shape)}: expected NaN everywhere"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.kernels", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: a rehearsal of this script")
    device = parser.parse_args().device
    if device == "cuda":
        if not torch.cuda.is_available():
            print("no CUDA device is visible to torch")
            return 1
        info = torchce.build_info()
        if not info["cuda_loaded"]:
            print(f"torchce._cuda: {info['cuda_status']}")
            return 1
        print(f"{torch.cuda.get_device_name()}, kernels for {info['cuda_archs']}", flush=True)
    wrong: list[str] = []
    for name, problem in SOFTMAX.items():
        wrong += differences(name, lambda device, p=problem: softmax(p, device), problem.dtype, device)
    for name, problem in BCE.items():
        wrong += differences(f"BCE, {name}", lambda device, p=problem: bce(p, device), problem.dtype, device)
    if device == "cuda":
        wrong += bad_targets()
        torch.cuda.synchronize()
    print("\n".join(wrong) or f"{len(SOFTMAX) + len(BCE)} problems, as on the CPU")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
