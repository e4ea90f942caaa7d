"""The shapes, layouts, scales and dtypes that the tests of every backend share, and how their data is drawn.

Data is drawn on the CPU from a fixed seed and then moved, so CPU and CUDA see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
REDUCTIONS = ["none", "mean", "sum"]
INDEX_DTYPES = [torch.int64, torch.int32, torch.uint8]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# The class counts every softmax kernel must get right. Few rows: the class count is the point.
CLASS_SHAPES = [
    pytest.param((4, 1), id="4x1"),  # log 1: loss and gradient are exactly 0
    pytest.param((5, 2), id="5x2"),  # the smallest real softmax, shorter than any register
    pytest.param((7, 3), id="7x3"),  # odd, so rows start at every offset within a register
    pytest.param((32, 10), id="32x10"),  # digits: one 8-lane register and a tail
    pytest.param((9, 1000), id="9x1000"),  # ImageNet: whole 8-lane registers, half a 16-lane one left
    pytest.param((9, 1001), id="9x1001"),  # with a background class: a tail of one, every second row misaligned
    pytest.param((3, 8003), id="3x8003"),  # prime: a tail loop that steps wrongly treats an element twice
    pytest.param((3, 32000), id="3x32000"),  # Llama 2: a power of two times 125, no tail
    pytest.param((3, 50257), id="3x50257"),  # GPT-2: odd, rows 1 and 2 misaligned
    pytest.param((3, 128256), id="3x128256"),  # Llama 3: the longest float32 sum
]

# Every softmax input rank, and the shapes at which a kernel must change its plan.
SOFTMAX_SHAPES = [
    pytest.param((11,), id="1d"),  # one row, no batch
    pytest.param((13, 11), id="2d"),
    pytest.param((1037, 3), id="2d_many_rows"),  # more rows than one grain of work, and no multiple of it
    pytest.param((139, 35), id="2d_strips"),  # short rows with a remainder: strips of 16 to 64 and a part of one
    pytest.param((2, 5, 7), id="3d"),
    pytest.param((2, 19, 13, 9), id="4d"),  # segmentation; 117 inner positions are no multiple of a register
    pytest.param((2, 3, 2, 3, 2), id="5d"),
    pytest.param((3, 301, 2), id="3d_inner_2"),  # inner shorter than a register
    pytest.param((2, 3, 4099), id="3d_inner_4099"),  # inner longer than one block of rows
    pytest.param((1, 6, 1, 1), id="4d_inner_1"),  # strided form of a plain row
]

ELEMENT_SHAPES = [
    pytest.param((), id="0d"),
    pytest.param((1,), id="1"),
    pytest.param((7,), id="7"),  # shorter than a register
    pytest.param((33, 31), id="33x31"),  # rows misaligned, 1023 elements: one short of a block
    pytest.param((1025,), id="1025"),  # one more than a block
    pytest.param((2, 3, 5, 7), id="4d"),
    pytest.param((70001,), id="70001"),  # prime, several grains of work
]

SCALES = [1.0, 10.0, 1e4]


def classes_around_plan_changes(dtype: torch.dtype) -> list[int]:
    """Class counts on both sides of each at which csrc/cuda/softmax_ce_plan.h plans otherwise, for a few rows.

    ``test_cuda_plan.py`` holds this to the header.
    """
    pack = 16 // dtype.itemsize
    switches = [pack * packs for packs in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024)]
    return sorted({1, 2, 3, 4, 5, *(switch + step for switch in switches for step in (-1, 0, 1))} - {0})


def dtype_id(value: object) -> str | None:
    """A readable id for a torch.dtype parameter; pytest's own for anything else."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def normal(shape: Sequence[int], dtype: torch.dtype, device: str, *, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(list(shape), generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def uniform(shape: Sequence[int], dtype: torch.dtype, device: str, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(list(shape), generator=generator, dtype=torch.float64).to(device, dtype)


def index_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of index targets for logits of `shape`."""
    return (shape[0], *shape[2:]) if len(shape) > 1 else ()


def indices(shape: Sequence[int], classes: int, dtype: torch.dtype, device: str, *, seed: int = 2) -> Tensor:
    """Class indices that hold the first and the last class whenever there is room."""
    generator = torch.Generator().manual_seed(seed)
    limit = min(classes, torch.iinfo(dtype).max + 1)
    drawn = torch.randint(limit, list(shape), generator=generator)
    flat = drawn.view(-1)
    if flat.numel() > 1:
        flat[0], flat[-1] = limit - 1, 0
    return drawn.to(device, dtype)


def probabilities(shape: Sequence[int], dtype: torch.dtype, device: str, *, seed: int = 3) -> Tensor:
    """Distributions over the class dimension, with exact zeros in them."""
    draws = uniform(shape, torch.float64, "cpu", seed=seed)
    class_dim = 0 if len(shape) == 1 else 1
    draws = torch.where(draws < 0.3, torch.zeros_like(draws), draws)
    return (draws / draws.sum(class_dim, keepdim=True).clamp_min(1e-3)).to(device, dtype)


def softmax_target(kind: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """`kind` is "index" (int64) or "probability" (of `dtype`)."""
    if kind == "probability":
        return probabilities(shape, dtype, device)
    return indices(index_shape(shape), shape[0 if len(shape) == 1 else 1], torch.int64, device)


def with_some_minus_infinity(logits: Tensor) -> Tensor:
    """About a tenth of the logits masked out, the first class of each row never."""
    class_dim = 0 if logits.dim() == 1 else 1
    mask = uniform(logits.shape, torch.float32, "cpu", seed=4) < 0.1
    mask.select(class_dim, 0).fill_(False)
    return logits.masked_fill(mask.to(logits.device), -torch.inf)


# A layout takes a maker of contiguous tensors and gives a tensor of `shape` whose memory is arranged otherwise.
Maker = Callable[[Sequence[int]], Tensor]


def _transposed(make: Maker, shape: Sequence[int]) -> Tensor:
    return make([shape[1], shape[0], *shape[2:]]).transpose(0, 1)


def _second_last(make: Maker, shape: Sequence[int]) -> Tensor:
    return make([shape[0], *shape[2:], shape[1]]).movedim(-1, 1)


def _permuted_inner(make: Maker, shape: Sequence[int]) -> Tensor:
    """Dense, but no single stride leads through the inner dimensions."""
    return make([*shape[:2], *reversed(shape[2:])]).permute(0, 1, *reversed(range(2, len(shape))))


def _sliced(make: Maker, shape: Sequence[int]) -> Tensor:
    """Every row starts one element off, and rows are not adjacent."""
    return make([shape[0], shape[1] + 3, *shape[2:]])[:, 1:-2]


def _channels_last_sliced(make: Maker, shape: Sequence[int]) -> Tensor:
    """Permuted and not dense, where "the same layout" for a fresh tensor is torch's to decide."""
    return make([shape[0], *shape[2:], shape[1] + 3]).movedim(-1, 1)[:, 1:-2]


def _strided(make: Maker, shape: Sequence[int]) -> Tensor:
    """No dimension is dense."""
    return make([2 * size for size in shape])[tuple(slice(1, None, 2) for _ in shape)]


def _offset(make: Maker, shape: Sequence[int]) -> Tensor:
    """Contiguous, but the data pointer is misaligned by one element."""
    count = 1
    for size in shape:
        count *= size
    return make([count + 1])[1:].view(list(shape))


def _expanded(*dims: int) -> Callable[[Maker, Sequence[int]], Tensor]:
    def layout(make: Maker, shape: Sequence[int]) -> Tensor:
        return make([1 if d in dims else size for d, size in enumerate(shape)]).expand(list(shape))

    return layout


LAYOUTS: dict[str, Callable[[Maker, Sequence[int]], Tensor]] = {
    "transposed": _transposed,
    "channels_last": _second_last,  # the same as transposed(1, 2) for three dimensions
    "sliced": _sliced,
    "channels_last_sliced": _channels_last_sliced,
    "permuted_inner": _permuted_inner,
    "strided": _strided,
    "offset": _offset,
    "expanded_rows": _expanded(0),
    "expanded_classes": _expanded(1),
    "expanded_inner": _expanded(2, 3),
    "stride_0": _expanded(0, 1, 2, 3),
}


def layouts_for(dims: int) -> list[str]:
    """The layouts that differ from contiguous for a tensor of that many dimensions."""
    needs_inner = ("channels_last", "channels_last_sliced", "expanded_inner") if dims < 3 else ()
    needs_two_inner = ("permuted_inner",) if dims < 4 else ()
    return [name for name in LAYOUTS if name not in (*needs_inner, *needs_two_inner)]


def laid_out(layout: str | None, make: Maker, shape: Sequence[int]) -> Tensor:
    """What `make` makes, in a layout; None: contiguous."""
    return make(shape) if layout is None else LAYOUTS[layout](make, shape)


def arranged(layout: str | None, shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers in a layout."""
    return laid_out(layout, lambda sizes: normal(sizes, dtype, device, scale=3), shape)


# Softmax targets and logits that have kernels of their own.
KERNEL_KINDS = ["index", "smoothed", "probability"]
KERNEL_TYPES = [
    *(pytest.param(kind, dtype, id=f"{kind}-{dtype_id(dtype)}") for kind in KERNEL_KINDS for dtype in DTYPES),
    pytest.param("float32_probability", torch.bfloat16, id="float32_probability-bfloat16"),
    pytest.param("float32_probability", torch.float16, id="float32_probability-float16"),
    pytest.param("float32_probability", torch.float64, id="float32_probability-float64"),
    pytest.param("float64_probability", torch.float32, id="float64_probability-float32"),
    pytest.param("float64_weighted_probability", torch.float32, id="float64_weighted_probability-float32"),
]


# The same of transformed logits, which know fewer pairs of dtypes.
CAPPED_TYPES = [
    pytest.param(f"capped_{kind}", dtype, id=f"capped_{kind}-{dtype_id(dtype)}")
    for kind in ("index", "smoothed", "float32_probability")
    for dtype in DTYPES
]


def kernel_problem(kind: str, logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """A target of that kind and its options; index targets have a row that is ignored, the others weights."""
    if kind.startswith("capped_"):
        target, options = kernel_problem(kind.removeprefix("capped_"), logits)
        return target, {**options, "softcap": 5.0, "logit_scale": 0.7}
    shape, dtype, device = tuple(logits.shape), logits.dtype, str(logits.device)
    if kind.endswith("probability"):
        target_dtype = {"float32_probability": torch.float32, "float64_probability": torch.float64}.get(kind, dtype)
        target = probabilities(shape, target_dtype, device)
    else:
        target = softmax_target("index", shape, dtype, device)
        target.view(-1)[1:2] = -100  # of a single row: none
    if kind == "index":
        return target, {}
    weight_dtype = torch.float64 if kind == "float64_weighted_probability" else dtype
    weight = uniform(shape[:1] if len(shape) == 1 else shape[1:2], weight_dtype, device)
    return target, {"label_smoothing": 0.1, "weight": weight}


LAYOUT_SHAPES = [
    pytest.param(layout, shape, id=f"{layout}-{len(shape)}d")
    for shape in ((6, 21), (3, 21, 5), (2, 21, 3, 5))
    for layout in layouts_for(len(shape))
]


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return grad_output


def activation(leaf: Tensor) -> Tensor:
    """Logits as a layer computes them, so that their gradient may overwrite them, but in the leaf's own memory."""
    activation: Tensor = _Activation.apply(leaf)  # type: ignore[no-untyped-call]
    return activation
