"""What is kept for backward and how much is allocated at most, counted at torch's allocators, for every path.

The promise: besides the inputs and the gradients that were asked for, two or three numbers a row. Two cases need a copy
of one input, as they do in torch, and have their own tests: strides that no two steps describe, and a pair of dtypes
for which there is no kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import pytest
import torch
from cases import dtype_id
from comparison import grad_output_for, leaf
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import torchce.functional

SLACK = 1024  # scalars: the loss, the totals, a gradient of one number

ROWS_AND_CLASSES = (257, 1001)
SHAPES = {
    "index": ROWS_AND_CLASSES,
    "probability": ROWS_AND_CLASSES,
    "index_segmentation": (3, 19, 61, 67),
    "probability_segmentation": (3, 19, 61, 67),
    "bce": ROWS_AND_CLASSES,
}


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """The most that `function` had allocated at once, beyond what there was before."""
    if device == "cuda":  # what was asked for: the allocator rounds each block up to 512 bytes
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = function()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.memory_stats()["requested_bytes.all.peak"]) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(itertools.accumulate((bytes_ for _, bytes_ in changes), initial=0))


def slack(device: str) -> int:
    """On CUDA with the scratch of one launch (csrc/cuda/scratch.h), which is gone after it: 16 bytes a block and 8."""
    if device != "cuda":
        return SLACK
    card = torch.cuda.get_device_properties(0)
    blocks = card.multi_processor_count * card.max_threads_per_multi_processor // 256
    return SLACK + 16 * blocks + 8


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Problem(NamedTuple):
    function: Callable[..., Tensor]
    logits: Tensor
    target: Tensor
    options: dict[str, Any]
    row_numbers: int  # bytes of the numbers kept for each row


def make(
    kind: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    options: bool = False,
) -> Problem:
    shape = SHAPES[kind]

    def arranged(draw: cases.Maker) -> Tensor:
        return cases.laid_out(layout, draw, shape)

    logits = arranged(lambda s: cases.normal(s, dtype, device))
    weight = cases.uniform([shape[1]], dtype, device, seed=6)
    if kind == "bce":
        target = arranged(lambda s: cases.uniform(s, dtype, device))
        more = {"weight": weight, "pos_weight": weight} if options else {}
        return Problem(torchce.functional.binary_cross_entropy_with_logits, logits, target, more, 0)
    kind = kind.removesuffix("_segmentation")
    target = cases.softmax_target(kind, shape, dtype, device)
    if kind == "probability":
        target = arranged(lambda s: cases.uniform(s, dtype, device))
    more = {"weight": weight, "label_smoothing": 0.1} if options else {}
    rows = logits.numel() // shape[1]
    numbers = (3 if kind == "probability" else 2) * rows * (8 if dtype == torch.float64 else 4)
    return Problem(torchce.functional.cross_entropy, logits, target, more, numbers)


def weight_bytes(problem: Problem) -> int:
    """Class weights are read in the dtype that the kernel computes in."""
    return sum(8 * value.numel() for value in problem.options.values() if isinstance(value, Tensor))


def loss_bytes(problem: Problem, reduction: str, loss_dtype: torch.dtype) -> int:
    if reduction != "none":
        return 0
    elements = problem.logits.numel()
    return loss_dtype.itemsize * (elements if problem.row_numbers == 0 else elements // problem.logits.shape[1])


def assert_peaks(problem: Problem, device: str, reduction: str, context: Callable[[], Any], copied: int = 0) -> None:
    """Forward alone, and forward with each choice of gradients, stay within the promise."""
    function, logits, target, options, row_numbers = problem
    with context():
        loss = function(logits, target, reduction=reduction, **options)
    grad_output = grad_output_for(loss)
    allowed = row_numbers + loss_bytes(problem, reduction, loss.dtype) + weight_bytes(problem) + copied + slack(device)

    def forward() -> Tensor:
        with context():
            return function(logits, target, reduction=reduction, **options)

    assert peak_bytes(forward, device) <= allowed

    choices = [(True, False)] + ([(False, True), (True, True)] if target.is_floating_point() else [])
    for logits_grad, target_grad in choices:

        def both_ways(logits_grad: bool = logits_grad, target_grad: bool = target_grad) -> Any:
            x = leaf(logits) if logits_grad else logits
            y = leaf(target) if target_grad else target
            with context():
                loss = function(x, y, reduction=reduction, **options)
            return torch.autograd.grad(loss, [t for t in (x, y) if t.requires_grad], grad_output)

        gradients = logits_grad * bytes_of(logits) + target_grad * bytes_of(target)
        peak = peak_bytes(both_ways, device)
        assert peak <= allowed + gradients, f"{peak} bytes, allowed {allowed} + {gradients}"
        assert peak >= gradients, "the gradients are counted"


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "reduction", "options"),
    [
        pytest.param(torch.float32, "mean", False, id="float32-mean"),
        pytest.param(torch.float32, "none", True, id="float32-none-options"),
        pytest.param(torch.bfloat16, "none", False, id="bfloat16-none"),
        pytest.param(torch.bfloat16, "mean", True, id="bfloat16-mean-options"),
        pytest.param(torch.float64, "sum", True, id="float64-sum-options"),
    ],
)
def test_peak(device: str, dtype: torch.dtype, reduction: str, options: bool, kind: str) -> None:
    assert_peaks(make(kind, device, dtype, options=options), device, reduction, torch.enable_grad)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "channels_last", "expanded_rows"])
def test_peak_of_strided_inputs(device: str, layout: str, kind: str) -> None:
    """No contiguous copy where a stride will do."""
    if layout == "channels_last" and len(SHAPES[kind]) < 3:
        pytest.skip("needs an inner dimension")
    if layout in ("transposed", "sliced") and len(SHAPES[kind]) > 2:
        pytest.skip("a batch and inner dimensions at two strides; below")
    assert_peaks(make(kind, device, layout=layout), device, "mean", torch.enable_grad)


@pytest.mark.parametrize("kind", ["index_segmentation", "probability_segmentation", "bce"])
def test_peak_where_no_two_strides_describe_the_input(device: str, kind: str) -> None:
    """At most a copy of each input, and it is gone after the op that read it."""
    problem = make(kind, device, layout="strided")
    assert_peaks(problem, device, "mean", torch.enable_grad, copied=bytes_of(problem.logits) + bytes_of(problem.target))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_makes_no_float32_copy(device: str, dtype: torch.dtype, reduction: str, kind: str) -> None:
    """torch casts the logits to float32 and keeps them; here 16-bit logits are read as they are."""

    def autocast() -> torch.autocast:
        return torch.autocast(device, dtype=dtype)

    problem = make(kind, device, dtype)
    with autocast():
        assert problem.function(problem.logits, problem.target).dtype == torch.float32
    assert_peaks(problem, device, reduction, autocast)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("index", torch.bfloat16), ("index", torch.float32), ("probability", torch.float32)]
)
def test_peak_with_own_options(device: str, dtype: torch.dtype, kind: str) -> None:
    """As the plain loss's, but for numbers of the rows: outputs, weights, and gradients of them and of a scale."""
    _, logits, target, _, row_numbers = make(kind, device, dtype)
    of_rows = torch.ones(cases.index_shape(logits.shape), device=device)
    scale = torch.tensor(0.7, device=device, requires_grad=True)

    def both_ways() -> Any:
        x = leaf(logits)
        out = torchce.functional.cross_entropy(
            x,
            target,
            z_loss=0.1,
            softcap=5.0,
            logit_scale=scale,
            sample_weight=of_rows,
            dtype=torch.float32,
            return_lse=True,
            return_predictions=True,
            return_entropy=True,
        )
        return torch.autograd.grad([out.loss, out.lse, out.entropy], [x, scale], [None, of_rows, of_rows])

    numbers = 16  # of 8 bytes a row, which is 1/16 of its logits
    peak = peak_bytes(both_ways, device)
    allowed = bytes_of(logits) + row_numbers + numbers * 8 * of_rows.numel() + slack(device)
    assert bytes_of(logits) <= peak <= allowed, f"{peak} bytes, allowed {allowed}"


def test_the_count_sees_torchs_copies(device: str) -> None:
    """The meter itself: torch's loss on 16-bit logits under autocast allocates several times what ours does."""
    _, logits, target, _, _ = make("index", device, torch.bfloat16)

    def torchs() -> Tensor:
        x = leaf(logits)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(x, target)
        return torch.autograd.grad(loss, x)[0]

    assert peak_bytes(torchs, device) >= 4 * logits.numel() + bytes_of(logits)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_peak_in_place(device: str, dtype: torch.dtype, kind: str) -> None:
    """The gradient takes the logits' place: nothing of their size is allocated."""
    function, logits, target, _, row_numbers = make(kind, device, dtype)
    memory = logits.clone()

    def both_ways() -> None:
        x = memory.detach().requires_grad_()
        loss = function(cases.activation(x), target, inplace_backward=True)
        loss.backward()
        x.grad = None

    assert peak_bytes(both_ways, device) <= row_numbers + slack(device)


@pytest.mark.parametrize("target_dtype", cases.INDEX_DTYPES, ids=dtype_id)
def test_index_targets_are_not_converted(device: str, target_dtype: torch.dtype) -> None:
    problem = make("index_segmentation", device)
    assert_peaks(problem._replace(target=problem.target.to(target_dtype)), device, "mean", torch.enable_grad)


@pytest.mark.parametrize("target_dtype", [torch.bool, torch.uint8, torch.int64], ids=dtype_id)
def test_integer_bce_targets_are_not_converted(device: str, target_dtype: torch.dtype) -> None:
    problem = make("bce", device)
    assert_peaks(problem._replace(target=problem.target.round().to(target_dtype)), device, "mean", torch.enable_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("kind", ["probability", "bce"])
def test_float32_targets_of_16_bit_logits_are_not_converted(device: str, kind: str, dtype: torch.dtype) -> None:
    problem = make(kind, device, dtype)
    assert_peaks(problem._replace(target=problem.target.float()), device, "mean", torch.enable_grad)


@pytest.mark.parametrize(
    ("dtype", "target_dtype", "weight_dtype"),
    [
        (torch.float32, torch.float64, None),
        (torch.float64, torch.float32, None),
        (torch.float32, torch.float32, torch.float64),
    ],
    ids=["target", "logits", "weight"],
)
def test_float64_beside_float32_is_not_converted(
    device: str, dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    """Three numbers a row are kept in float64; neither logits nor probabilities are, beside what came in."""
    problem = make("probability", device, dtype)
    classes = problem.logits.shape[1]
    options = {} if weight_dtype is None else {"weight": cases.uniform([classes], weight_dtype, device)}
    numbers = 3 * 8 * problem.logits.numel() // classes
    problem = problem._replace(target=problem.target.to(target_dtype), options=options, row_numbers=numbers)
    assert_peaks(problem, device, "mean", torch.enable_grad)


@pytest.mark.parametrize(
    ("dtype", "target_dtype"),
    [(torch.bfloat16, torch.float64), (torch.float64, torch.bfloat16)],
    ids=["logits", "target"],
)
def test_16_bits_beside_float64_cost_a_copy_in_float32(
    device: str, dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    """And, where a gradient is asked for, its own in float32."""
    problem = make("probability", device, dtype)
    numbers = 3 * 8 * problem.logits.numel() // problem.logits.shape[1]
    problem = problem._replace(target=problem.target.to(target_dtype), row_numbers=numbers)
    assert_peaks(problem, device, "mean", torch.enable_grad, copied=2 * 4 * problem.logits.numel())


@pytest.mark.parametrize(
    ("kind", "target_dtype"),
    [("probability", torch.bfloat16), ("bce", torch.bfloat16), ("bce", torch.float64)],
    ids=["probability-bfloat16", "bce-bfloat16", "bce-float64"],
)
def test_other_pairs_of_dtypes_cost_one_conversion(device: str, kind: str, target_dtype: torch.dtype) -> None:
    """The narrower of logits and target in the wider dtype, and its gradient in both; torch needs more."""
    problem = make(kind, device)
    problem = problem._replace(target=problem.target.to(target_dtype), row_numbers=2 * problem.row_numbers)
    converted = max(4, target_dtype.itemsize) * problem.logits.numel()
    assert_peaks(problem, device, "mean", torch.enable_grad, copied=2 * converted)


# --- kept for backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in_place"])
@pytest.mark.parametrize("layout", [None, "transposed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_kept_for_backward(
    device: str, autocast: bool, layout: str | None, inplace: bool, reduction: str, kind: str
) -> None:
    """The inputs themselves, and the numbers of each row; in place or not, whatever the reduction."""
    function, logits, target, options, row_numbers = make(kind, device, torch.bfloat16, layout, options=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = leaf(logits)
    with (
        torch.autocast(device, dtype=torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss = function(cases.activation(x), target, reduction=reduction, inplace_backward=inplace, **options)
    assert logits.untyped_storage().data_ptr() in kept
    for tensor in (logits, target):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= row_numbers + weight_bytes(Problem(function, logits, target, options, 0)) + SLACK
    loss.sum().backward()


def test_nothing_is_kept_without_grad(device: str) -> None:
    """The memory of a loss without grad is its result."""
    for kind in SHAPES:
        problem = make(kind, device)

        def scores(problem: Problem = problem) -> list[Tensor]:
            with torch.no_grad():
                return [problem.function(problem.logits, problem.target) for _ in range(10)]

        assert peak_bytes(scores, device) <= problem.row_numbers + 10 * SLACK + slack(device)
