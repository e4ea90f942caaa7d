"""Beyond 2^31 elements: offsets are 64 bits wide everywhere. Run by `make test-large`; skipped where memory is short.

The logits repeat a block of a prime number of values, so that rows differ wherever they are cut. Rows at both ends and
on both sides of element 2^31 are compared with the float64 reference, sums with the unreduced loss.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cases
import pytest
import reference
import torch
from comparison import assert_accurate, assert_bitwise_equal
from torch import Tensor

import torchce.functional

pytestmark = pytest.mark.large

BOUNDARY = 2**31
CLASSES = 32771  # odd: no row boundary falls on 2^31
ROWS = BOUNDARY // CLASSES + 40
GIB = 2**30


def available_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def need(gib: float, device: str) -> None:
    available = available_bytes(device) / GIB
    if available < gib + 1:
        pytest.skip(f"needs {gib} GiB of memory on {device}, has {available:.1f}")


def repeated(count: int, dtype: torch.dtype, device: str, draw: Callable[..., Tensor]) -> Tensor:
    """`count` numbers that repeat one block, without a temporary of their size."""
    block = draw([1_000_003], dtype, device)
    result = torch.empty(count, dtype=dtype, device=device)
    whole = count // block.numel() * block.numel()
    result[:whole].view(-1, block.numel()).copy_(block.expand(whole // block.numel(), -1))
    result[whole:] = block[: count - whole]
    return result


def rows_of_interest() -> Tensor:
    at = BOUNDARY // CLASSES
    return torch.tensor([0, 1, at - 1, at, at + 1, ROWS - 2, ROWS - 1])


def logits_of(layout: str, device: str) -> Tensor:
    """[ROWS, CLASSES], in memory by rows or by classes."""
    numbers = repeated(ROWS * CLASSES, torch.bfloat16, device, cases.normal)
    return numbers.view(ROWS, CLASSES) if layout == "contiguous" else numbers.view(CLASSES, ROWS).t()


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_cross_entropy(device: str, layout: str) -> None:
    need(9, device)
    logits = logits_of(layout, device)
    target = cases.indices([ROWS], CLASSES, torch.int64, device)
    x = logits.detach().requires_grad_()
    loss = torchce.functional.cross_entropy(x, target, reduction="none")
    rows = rows_of_interest().to(device)
    truth = reference.softmax_ce(logits[rows], target[rows], reduction="none")
    assert_accurate("loss", loss.detach()[rows], truth.loss)

    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    assert grad.stride() == logits.stride()
    assert_accurate("grad_logits", grad[rows], truth.grad_logits)
    del grad

    with torch.autocast(device, dtype=torch.bfloat16):  # float32 losses
        total = torchce.functional.cross_entropy(logits, target, reduction="sum")
        row_losses = torchce.functional.cross_entropy(logits, target, reduction="none")
    assert total.item() == pytest.approx(row_losses.double().sum().item(), rel=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_cross_entropy_in_place(device: str, layout: str) -> None:
    """The gradient over the logits, and a bad index found in the last row."""
    need(5, device)
    logits = logits_of(layout, device)
    target = cases.indices([ROWS], CLASSES, torch.int64, device)
    rows = rows_of_interest().to(device)
    truth = reference.softmax_ce(logits[rows], target[rows], reduction="sum")
    x = logits.detach().requires_grad_()
    loss = torchce.functional.cross_entropy(cases.activation(x), target, reduction="sum", inplace_backward=True)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.data_ptr() == logits.data_ptr()
    assert_accurate("grad_logits", grad[rows], truth.grad_logits)
    if device == "cpu":
        target[-1] = CLASSES
        with pytest.raises(IndexError, match=rf"{CLASSES}.*{ROWS - 1}|{ROWS - 1}.*{CLASSES}"):
            torchce.functional.cross_entropy(logits, target)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_segmentation(device: str, layout: str) -> None:
    """One image of 2^31 and some numbers: few classes, and inner positions beyond 2^26."""
    need(9, device)
    classes, size = 19, BOUNDARY // 19 + 12345
    numbers = repeated(classes * size, torch.bfloat16, device, cases.normal)
    logits = (
        numbers.view(1, classes, size) if layout == "contiguous" else numbers.view(1, size, classes).transpose(1, 2)
    )
    target = repeated(size, torch.uint8, device, lambda *args: cases.indices(args[0], classes, *args[1:])).unsqueeze(0)
    x = logits.detach().requires_grad_()
    loss = torchce.functional.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, torch.ones((), dtype=loss.dtype, device=device).expand(loss.shape))
    for part in (slice(0, 100), slice(size // 2, size // 2 + 100), slice(size - 100, size)):
        truth = reference.softmax_ce(logits[:, :, part], target[:, part], reduction="none")
        assert_accurate("loss", loss.detach()[:, part], truth.loss)
        assert_accurate("grad_logits", grad[:, :, part], truth.grad_logits)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_bce(device: str, layout: str) -> None:
    """Bool targets and a loss in place of a gradient keep the memory at three numbers an element."""
    need(11 if layout != "strided" else 14, device)
    count = ROWS * CLASSES
    numbers = repeated(count if layout != "strided" else 2 * count, torch.bfloat16, device, cases.normal)
    target = repeated(count, torch.bool, device, lambda *args: cases.uniform(args[0], torch.float32, device).round())
    if layout == "transposed":
        logits, target = numbers.view(CLASSES, ROWS).t(), target.view(CLASSES, ROWS).t()
    else:
        logits, target = numbers.view(ROWS, CLASSES, -1)[..., 0], target.view(ROWS, CLASSES)
    rows = rows_of_interest().to(device)
    truth = reference.sigmoid_bce(logits[rows], target[rows], reduction="none")

    loss = torchce.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    assert_accurate("loss", loss[rows], truth.loss)
    del loss
    with torch.autocast(device, dtype=torch.bfloat16):  # float32 losses
        mean = torchce.functional.binary_cross_entropy_with_logits(logits, target)
        sums = [
            torchce.functional.binary_cross_entropy_with_logits(part, part_target, reduction="sum").double()
            for part, part_target in zip(logits.split(1000), target.split(1000), strict=True)
        ]
    assert mean.item() == pytest.approx(sum(sums).item() / count, rel=1e-6)

    x = logits.detach().requires_grad_()
    loss = torchce.functional.binary_cross_entropy_with_logits(x, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    assert_accurate("grad_logits", grad[rows], truth.grad_logits)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_bce_in_place(device: str, layout: str) -> None:
    """Transposed logits, beside targets that are not."""
    need(7, device)
    logits = logits_of(layout, device)
    target = repeated(
        ROWS * CLASSES, torch.bool, device, lambda *args: cases.uniform(args[0], torch.float32, device).round()
    ).view(ROWS, CLASSES)
    last = rows_of_interest().to(device)
    truth = reference.sigmoid_bce(logits[last], target[last], reduction="sum")
    x = logits.detach().requires_grad_()
    loss = torchce.functional.binary_cross_entropy_with_logits(
        cases.activation(x), target, reduction="sum", inplace_backward=True
    )
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.data_ptr() == logits.data_ptr()
    assert_accurate("grad_logits", grad[last], truth.grad_logits)


def test_reduced_loss_of_repeated_rows(device: str) -> None:
    """The mean over 2^31 and some equal elements is the loss of one, and every row's is the same to the last bit."""
    need(1, device)
    logits = torch.tensor([[1.5]], device=device).expand(ROWS, CLASSES)
    target = torch.tensor([[0.0]], device=device).expand(ROWS, CLASSES)
    mean = torchce.functional.binary_cross_entropy_with_logits(logits, target)
    assert_accurate("loss", mean, reference.sigmoid_bce(logits[:1, :1], target[:1, :1]).loss)
    index = torch.zeros((), dtype=torch.int64, device=device).expand(ROWS)
    losses = torchce.functional.cross_entropy(logits, index, reduction="none")
    assert_bitwise_equal(losses, losses[:1].expand(ROWS).clone())
