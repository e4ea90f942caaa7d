"""Bit for bit the same, run after run and for any number of threads."""

from __future__ import annotations

from typing import NamedTuple

import cases
import pytest
import torch
from comparison import assert_bitwise_equal
from torch import Tensor

import torchce.functional


class Problem(NamedTuple):
    """Large enough that work is split among threads, in pieces that do not come out even."""

    kind: str
    shape: tuple[int, ...]
    layout: str | None = None
    dtype: torch.dtype = torch.float32


PROBLEMS = {
    "index_many_rows": Problem("index", (50021, 7)),
    "index_rows_of_1001": Problem("index", (301, 1001)),
    "index_few_long_rows": Problem("index", (3, 70001)),
    "index_bfloat16": Problem("index", (301, 1001), dtype=torch.bfloat16),
    "index_segmentation": Problem("index", (3, 19, 61, 67)),
    "index_inner_2": Problem("index", (301, 101, 2)),
    "index_one_image": Problem("index", (1, 5, 50021)),
    "index_channels_last": Problem("index", (3, 19, 61, 67), "channels_last"),
    "index_transposed": Problem("index", (301, 1001), "transposed"),
    "probability": Problem("probability", (301, 1001)),
    "probability_segmentation": Problem("probability", (3, 19, 61, 67)),
    "probability_bfloat16": Problem("probability", (301, 1001), dtype=torch.bfloat16),
    "bce": Problem("bce", (70001,)),
    "bce_transposed": Problem("bce", (301, 1001), "transposed"),
    "bce_bfloat16": Problem("bce", (70001,), dtype=torch.bfloat16),
}


def everything(problem: Problem, device: str, reduction: str) -> list[Tensor]:
    """Loss and all gradients, with every option on that adds arithmetic."""
    kind, shape, layout, dtype = problem
    logits = cases.normal(shape, dtype, device, scale=3)
    if layout is not None:
        logits = cases.LAYOUTS[layout](lambda s: cases.normal(s, dtype, device, scale=3), shape)
    logits.requires_grad_()
    if kind == "bce":
        target = cases.uniform(shape, dtype, device).requires_grad_()
        options = {"pos_weight": cases.uniform(shape[-1:], dtype, device, seed=6)}
        loss = torchce.functional.binary_cross_entropy_with_logits(logits, target, reduction=reduction, **options)
    else:
        target = cases.softmax_target(kind, shape, dtype, device)
        if kind == "probability":
            target.requires_grad_()
        weight = cases.uniform([shape[1]], dtype, device, seed=6)
        loss = torchce.functional.cross_entropy(logits, target, weight, label_smoothing=0.1, reduction=reduction)
    inputs = [tensor for tensor in (logits, target) if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_thread_count_does_not_matter(name: str, reduction: str, restore_threads: None) -> None:
    torch.set_num_threads(1)
    expected = everything(PROBLEMS[name], "cpu", reduction)
    for threads in (2, 3, 5, 8) if reduction == "mean" else (7,):
        torch.set_num_threads(threads)
        for number, result in enumerate(everything(PROBLEMS[name], "cpu", reduction)):
            assert_bitwise_equal(result, expected[number], f"result {number} with {threads} threads")


@pytest.mark.parametrize("threads", range(1, 9))
def test_every_thread_count(threads: int, restore_threads: None) -> None:
    """1 to 8 threads over one chunk of rows, a few, and more than there are threads (10922 rows of 3 are a chunk)."""
    losses = {}
    for threads_now in (1, threads):
        torch.set_num_threads(threads_now)
        losses[threads_now] = [
            torchce.functional.cross_entropy(
                cases.normal((rows, 3), torch.float32, "cpu"), cases.indices([rows], 3, torch.int64, "cpu")
            )
            for rows in (1, 10922, 10923, 30011, 200003)
        ]
    for result, expected in zip(losses[threads], losses[1], strict=True):
        assert_bitwise_equal(result, expected)


@pytest.mark.parametrize("name", PROBLEMS)
def test_runs_are_equal(device: str, name: str) -> None:
    """Memory that a kernel forgot to write differs from run to run, so free memory is filled in between."""
    expected = everything(PROBLEMS[name], device, "mean")
    for value in (1e30, -1.0, torch.nan):
        for result in expected:  # the next allocations of these sizes reuse this memory
            torch.full_like(result, value)
        for number, result in enumerate(everything(PROBLEMS[name], device, "mean")):
            assert_bitwise_equal(result, expected[number], f"result {number}")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_deterministic_algorithms_never_raise(
    device: str, name: str, reduction: str, deterministic_algorithms: None
) -> None:
    """Not even for K-dimensional losses, where torch's CUDA kernels do."""
    for result in everything(PROBLEMS[name], device, reduction):
        assert bool(result.isfinite().all())


@pytest.mark.parametrize("kind", ["index", "probability", "bce"])
def test_a_row_does_not_depend_on_its_neighbours(device: str, kind: str) -> None:
    """Row 5 of a batch is bitwise what it is alone, wherever it falls in a block.

    On CUDA packs of classes begin where 16 bytes do, and with them the order of the sum, so a row keeps its alignment.
    """
    shape = (37, 1001)
    logits = cases.normal(shape, torch.float32, device, scale=3)
    if kind == "bce":
        function, target = (
            torchce.functional.binary_cross_entropy_with_logits,
            cases.uniform(shape, torch.float32, device),
        )
    else:
        function, target = torchce.functional.cross_entropy, cases.softmax_target(kind, shape, torch.float32, device)
    whole = function(logits, target, reduction="none")
    for row in (0, 5, 36):
        misaligned = row * shape[1] % 4
        alone_logits = torch.empty(misaligned + shape[1], device=device)[misaligned:].copy_(logits[row]).unsqueeze(0)
        alone = function(alone_logits, target[row : row + 1].clone(), reduction="none")
        assert_bitwise_equal(whole[row : row + 1], alone, f"row {row}")
