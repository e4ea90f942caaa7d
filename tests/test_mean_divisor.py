"""What a mean divides by, from the target alone: torchce.softmax_ce.mean_divisor."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import dtype_id
from comparison import assert_accurate, assert_bitwise_equal
from reference import Truth
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchce import functional, ops
from torchce.softmax_ce import Options, mean_divisor

MEAN, SUM = 1, 2
SHAPES = [(11,), (13, 11), (1037, 3), (3, 7, 5, 2), (0, 5), (2, 5, 0, 3)]
BAD = [-1, 5, -(2**40), 2**40, 2**63 - 1]  # for 5 classes


def classes_of(shape: tuple[int, ...]) -> int:
    return shape[min(1, len(shape) - 1)]


def truth(target: Tensor, weight: Tensor | None, ignore_index: int, classes: int) -> Truth:
    """Row by row."""
    weights = [1.0] * classes if weight is None else weight.double().tolist()
    total = sum(weights[y] for y in target.flatten().tolist() if y != ignore_index and 0 <= y < classes)
    value = torch.tensor(float(total), dtype=torch.float64)
    return Truth(value, value.abs())


def divisor_of_forward(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int = -100) -> Tensor:
    totals: Tensor = ops.softmax_ce_forward(
        logits=logits,
        target=target,
        weight=weight,
        reduction=MEAN,
        ignore_index=ignore_index,
        label_smoothing=0.0,
        dtype=None,
    )[2]
    return totals[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, 2, 255], ids=lambda i: f"ignore{i}")
@pytest.mark.parametrize("index_dtype", cases.INDEX_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_of_class_indices(
    device: str,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    ignore_index: int,
    weighted: bool,
    shape: tuple[int, ...],
) -> None:
    classes = classes_of(shape)
    target = cases.indices(cases.index_shape(shape), classes, index_dtype, device)
    if ignore_index >= 0 or index_dtype != torch.uint8:
        target[target == 1] = ignore_index
    weight = cases.uniform([classes], dtype, device) if weighted else None
    divisor = mean_divisor(target, weight, ignore_index, classes, dtype)
    assert_accurate("divisor", divisor, truth(target, weight, ignore_index, classes))
    forward = divisor_of_forward(cases.normal(shape, dtype, device), target, weight, ignore_index)
    assert_accurate("divisor beside the op's", divisor, Truth(forward.double().cpu(), forward.double().cpu()))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_probabilities(device: str, shape: tuple[int, ...], weighted: bool) -> None:
    """The rows, whatever the class weights: as the op has it, bit by bit."""
    classes = classes_of(shape)
    target = cases.probabilities(shape, torch.bfloat16, device)
    weight = cases.uniform([classes], torch.float32, device) if weighted else None
    divisor = mean_divisor(target, weight, -100, classes, torch.float32)
    assert_bitwise_equal(divisor, divisor_of_forward(cases.normal(shape, torch.bfloat16, device), target, weight))


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 2**40], ids=lambda i: f"ignore{i}")
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_bad_index_adds_nothing(device: str, weighted: bool, ignore_index: int) -> None:
    """And is read from nowhere; on the CPU the op refuses it, on CUDA its divisor is the same."""
    target = torch.tensor([4, *BAD, 3, 0], device=device)
    weight = cases.uniform([5], torch.float32, device) if weighted else None
    divisor = mean_divisor(target, weight, ignore_index, 5, torch.float32)
    expected = truth(target, weight, ignore_index, 5)
    assert_accurate("divisor", divisor, expected)
    if device == "cuda":
        logits = cases.normal((len(target), 5), torch.float32, device)
        assert_accurate("the op's divisor", divisor_of_forward(logits, target, weight, ignore_index), expected)


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_weights_of_classes_without_rows_do_not_matter(device: str, weight: float) -> None:
    """Not that of class 0, which takes the place of an ignored row's, either."""
    weights = torch.tensor([weight, 2.0, weight, 0.5], device=device)
    target = torch.tensor([[1, -100], [3, 1]], device=device)
    assert mean_divisor(target, weights, -100, 4, torch.float32) == 4.5


def test_uint8_is_compared_as_what_it_holds(device: str) -> None:
    """156 is not -100, nor is 300 classes 44 of them."""
    target = torch.tensor([156, 100, 255], dtype=torch.uint8, device=device)
    assert mean_divisor(target, None, -100, 300, torch.float32) == 3
    assert mean_divisor(target, None, 356, 300, torch.float32) == 3


def test_a_strided_target(device: str) -> None:
    target = cases.indices((7, 6), 5, torch.int64, device).t()[::2]
    assert not target.is_contiguous()
    weight = cases.uniform([5], torch.float64, device)
    divisor = mean_divisor(target, weight, 4, 5, torch.float64)
    assert_accurate("divisor", divisor, truth(target, weight, 4, 5))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_nothing_depends_on_values(weighted: bool) -> None:
    """Fake tensors have none, and ``item`` of them raises."""
    with FakeTensorMode():
        weight = torch.rand(5) if weighted else None
        for target in (torch.randint(5, (4, 3)), torch.rand(4, 5, 3)):
            divisor = mean_divisor(target, weight, -100, 5, torch.float32)
            assert (divisor.shape, divisor.dtype) == ((), torch.float32)


@pytest.mark.parametrize("kind", ["index", "smoothed", "probability"])
def test_it_makes_a_mean_of_the_sum_that_writes_its_gradient(device: str, kind: str) -> None:
    logits = cases.normal((6, 7, 3), torch.float64, device, scale=3)
    target, options = cases.kernel_problem(kind, logits)
    mean = functional.cross_entropy(logits.requires_grad_(), target, **options)
    mean.backward()
    gradient = logits.detach().clone()
    weight = options.get("weight")
    divisor = mean_divisor(target, weight, -100, 7, torch.float64)
    of_sum = Options(SUM, label_smoothing=options.get("label_smoothing", 0.0))
    total = ops.softmax_ce_forward_backward_(divisor.reciprocal(), gradient, target, weight, None, *of_sum)
    torch.testing.assert_close(total / divisor, mean.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-15)
