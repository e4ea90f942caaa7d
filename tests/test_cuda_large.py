"""Beyond 2^31 and 2^32 elements on a GPU: every offset is 64 bits wide. What does not fit the memory is skipped.

The logits repeat a block of a prime number of values, so that rows differ wherever they are cut. Rows at both ends and
on both sides of the boundary are compared with the float64 reference, sums with the unreduced loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cases
import pytest
import reference
import torch
from comparison import assert_accurate
from torch import Tensor

import torchce.functional

pytestmark = pytest.mark.cuda

BOUNDARIES = [pytest.param(2**31, id="2^31"), pytest.param(2**32, id="2^32")]
CLASSES = 32771  # odd: no row boundary falls on a power of two
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def need(bytes_an_element: int, elements: int) -> None:
    needed, free = bytes_an_element * elements + 2**30, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory, has {free / 2**30:.0f}")


def repeated(count: int, make: Callable[[list[int]], Tensor]) -> Tensor:
    """`count` values that repeat one block, without a temporary of their size."""
    block = make([1_000_003])
    result = torch.empty(count, dtype=block.dtype, device=block.device)
    whole = count // len(block)
    result[: whole * len(block)].view(whole, -1).copy_(block.expand(whole, -1))
    result[whole * len(block) :] = block[: count - whole * len(block)]
    return result


def normal(count: int) -> Tensor:
    return repeated(count, lambda shape: cases.normal(shape, DTYPE, "cuda", scale=3))


def coin_tosses(count: int) -> Tensor:
    return repeated(count, lambda shape: cases.uniform(shape, torch.float32, "cuda").round().to(torch.uint8))


def rows_for(boundary: int) -> int:
    return boundary // CLASSES + 40


def rows_of_interest(boundary: int) -> list[int]:
    """Both ends, both sides of the boundary and of its half."""
    rows, at, half = rows_for(boundary), boundary // CLASSES, boundary // 2 // CLASSES
    return [0, 1, half - 1, half, half + 1, at - 1, at, at + 1, rows - 2, rows - 1]


def pick(tensor: Tensor, rows: list[int]) -> Tensor:
    return torch.stack([tensor[row] for row in rows])


def matrix(layout: str, rows: int, make: Callable[[int], Tensor]) -> Tensor:
    """[rows, CLASSES], in memory by rows, by classes, or by rows that are not adjacent and start misaligned."""
    if layout == "sliced":
        return make(rows * (CLASSES + 3)).view(rows, CLASSES + 3)[:, 1:-2]
    numbers = make(rows * CLASSES)
    return numbers.view(rows, CLASSES) if layout == "contiguous" else numbers.view(CLASSES, rows).t()


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_cross_entropy(layout: str, boundary: int) -> None:
    """Unreduced and reduced, forward and backward."""
    need(4, boundary)
    rows, few = rows_for(boundary), rows_of_interest(boundary)
    logits = matrix(layout, rows, normal)
    target = cases.indices([rows], CLASSES, torch.int64, "cuda")
    truth = reference.softmax_ce(pick(logits, few), pick(target, few), reduction="none")
    x = logits.detach().requires_grad_()

    with torch.autocast("cuda", dtype=DTYPE):  # a float32 loss
        loss = torchce.functional.cross_entropy(x, target, reduction="none")
        mean = torchce.functional.cross_entropy(logits, target)
    assert_accurate("loss", pick(loss.detach(), few), truth.loss)
    torch.testing.assert_close(mean, loss.detach().double().mean().float(), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    assert_accurate("grad_logits", pick(grad, few), truth.grad_logits)
    del grad

    loss = torchce.functional.cross_entropy(x, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    assert_accurate("grad_logits of the sum", pick(grad, few), truth.grad_logits)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_segmentation(layout: str, boundary: int) -> None:
    """One image: few classes, many inner positions, uint8 targets."""
    classes = 19
    size = boundary // classes // 8 * 8 + 800  # whole packs, so that the widest kernel runs
    need(5, boundary)
    numbers = normal(classes * size)
    logits = numbers.view(1, classes, size)
    if layout == "channels_last":
        logits = numbers.view(1, size, classes).transpose(1, 2)
    target = repeated(size, lambda shape: cases.indices(shape, classes, torch.uint8, "cuda")).unsqueeze(0)
    x = logits.detach().requires_grad_()
    loss = torchce.functional.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, torch.ones((), dtype=loss.dtype, device="cuda").expand(loss.shape))
    for part in (slice(0, 100), slice(size // 2 - 50, size // 2 + 50), slice(size - 100, size)):
        truth = reference.softmax_ce(logits[:, :, part], target[:, part], reduction="none")
        assert_accurate("loss", loss.detach()[:, part], truth.loss)
        assert_accurate("grad_logits", grad[:, :, part], truth.grad_logits)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_many_short_rows(boundary: int) -> None:
    """More rows than 32-bit numbers of threads or blocks could count: 3 classes, in place to halve the memory."""
    need(6, boundary)
    rows = boundary // 3 + 1000
    logits = normal(3 * rows).view(rows, 3)
    target = repeated(rows, lambda shape: cases.indices(shape, 3, torch.uint8, "cuda"))
    parts = [slice(0, 100), slice(rows // 2, rows // 2 + 100), slice(rows - 1100, rows - 900), slice(rows - 100, rows)]
    truths = [reference.softmax_ce(logits[part], target[part], reduction="sum") for part in parts]
    x = logits.detach().requires_grad_()
    loss = torchce.functional.cross_entropy(cases.activation(x), target, reduction="sum", inplace_backward=True)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.data_ptr() == logits.data_ptr()
    for part, truth in zip(parts, truths, strict=True):
        assert_accurate("grad_logits", grad[part], truth.grad_logits)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_forward_backward(layout: str, boundary: int) -> None:
    """The gradient is where the logits were."""
    need(3, boundary)
    rows, few = rows_for(boundary), rows_of_interest(boundary)
    logits = matrix(layout, rows, normal)
    target = cases.indices([rows], CLASSES, torch.int64, "cuda")
    truth = reference.softmax_ce(pick(logits, few), pick(target, few), reduction="none")
    grad_output = torch.ones(rows, device="cuda")
    loss = torchce.ops.softmax_ce_forward_backward_(grad_output, logits, target, None, torch.float32, 0, -100, 0.0)
    assert_accurate("loss", pick(loss, few), truth.loss)
    assert_accurate("grad_logits", pick(logits, few), truth.grad_logits)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_bce(layout: str, boundary: int) -> None:
    """uint8 targets keep the memory at five bytes an element."""
    need(5, boundary)
    rows, few = rows_for(boundary), rows_of_interest(boundary)
    logits = matrix(layout, rows, normal)
    target = matrix("contiguous" if layout == "sliced" else layout, rows, coin_tosses)
    truth = reference.sigmoid_bce(pick(logits, few), pick(target, few), reduction="none")

    loss = torchce.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    assert_accurate("loss", pick(loss, few), truth.loss)
    with torch.autocast("cuda", dtype=DTYPE):
        mean = torchce.functional.binary_cross_entropy_with_logits(logits, target)
    in_float64 = sum(part.sum(dtype=torch.float64) for part in loss.split(1024)) / loss.numel()
    torch.testing.assert_close(mean.double(), in_float64, rtol=1e-3, atol=0)  # its terms are rounded to bfloat16
    del loss

    x = logits.detach().requires_grad_()
    loss = torchce.functional.binary_cross_entropy_with_logits(x, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    assert_accurate("grad_logits", pick(grad, few), truth.grad_logits)
