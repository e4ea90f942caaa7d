"""A linear layer and what is made of its logits, in pieces of rows: the logits are never whole.

A piece's logits are computed into a buffer that all pieces share, a function of the caller's turns them into their
gradient there, and two matrix products lead it on to the layer's input and weight. Which loss it is, this file does not
know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchce.ops import accumulation_dtype

LEAST_BYTES = 64 << 20
LOGITS_SHARE = 16
# A product of fewer rows wastes time: for each piece the whole weight is read, and on the CPU first put into another
# order. 512 float32 rows of 128 features to 32,000 classes took 46 ms in pieces of 128 rows, 29 of 256, 25 at once.
LEAST_ROWS_ON_CPU = 256
# Rows of a matrix product's tile, at most, on tensor cores; a piece of another number fills its last tile partly.
_TILE = 128
# Products are put down before they are added to sums of another dtype, in a share of a piece's bytes at most; on the
# CPU where two cores' L2 caches hold them: of 256 rows, 128,256 classes and 256 features they take 55 ms so, in parts
# of 8 MiB 64, at once 92.
_PRODUCT_SHARE = 8
_LEAST_PRODUCT_BYTES = 256 << 10  # so that pieces of few rows are not made of a thousand products
_PRODUCT_BYTES_ON_CPU = 2 << 20


class Linear(NamedTuple):
    """The layer: ``input @ weight.T + bias``."""

    input: Tensor  # [rows, features]
    weight: Tensor  # [outputs, features]
    bias: Tensor | None  # [outputs]


class LayerGradients(NamedTuple):
    """Those of the layer's tensors, contiguous, of their shapes and dtypes; None of what needs none."""

    input: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def as_outputs(gradients: LayerGradients, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """What an op returns: of what is not needed an empty tensor, each its own, as no two outputs may be the same."""
    of_input, of_weight, of_bias = (linear.input.new_empty(0) if grad is None else grad for grad in gradients)
    return of_input, of_weight, of_bias


def new_outputs(input: Tensor, weight: Tensor, needs: Iterable[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`as_outputs` returns of a layer to outputs of any shape, not filled."""
    shapes = (input.shape, weight.shape, weight.shape[:-1])
    of_input, of_weight, of_bias = (input.new_empty(s if n else [0]) for s, n in zip(shapes, needs, strict=True))
    return of_input, of_weight, of_bias


class Chunks(NamedTuple):
    """How the rows are cut, and what is spared."""

    chunk_bytes: int = 0
    """Of a piece, at most, or 0 for :func:`default_bytes`."""
    chunk_rows: int = 0
    """Of a piece, at most, or 0 for as many as ``chunk_bytes`` allows."""
    compact_gradients: bool = False
    """Whether the weight's gradient is added up in its own dtype, not in float32."""
    compact_ignored: bool = False
    """Whether rows that do not count are left out of the products."""


def kept_rows(counts: Tensor, outputs: int, chunks: Chunks) -> Tensor | None:
    """The numbers of the rows that count, ``counts`` in ``[rows]`` saying which; None to go through all of them.

    To gather rows on the CPU takes as long as the products of some 20 outputs with them.
    """
    if not chunks.compact_ignored:
        return None
    kept = counts.nonzero().squeeze(1)  # on CUDA the host waits for their number
    left_out = len(counts) - len(kept)
    if counts.is_cpu and (left_out == 0 or (outputs < 1024 and left_out * outputs < 20 * len(counts))):
        return None
    return kept


def default_bytes(rows: int, row_bytes: int, device: torch.device) -> int:
    """What a piece may take: a sixteenth of all, but at least 64 MiB and the rows a product needs.

    On CUDA those are as many as there are multiprocessors: a long row is one block's work.
    """
    least_rows = LEAST_ROWS_ON_CPU
    if device.type == "cuda":
        least_rows = torch.cuda.get_device_properties(device).multi_processor_count
    return max(LEAST_BYTES, rows * row_bytes // LOGITS_SHARE, least_rows * row_bytes)


def piece_rows(rows: int, row_bytes: int, sum_bytes: int, chunks: Chunks, device: torch.device) -> int:
    """How many rows the largest piece has: as many as may be, in whole tiles, of pieces that are about alike.

    By the rule all are one piece where sums over pieces, of ``sum_bytes``, would take what pieces spare.
    """
    by_rule = not (chunks.chunk_bytes or chunks.chunk_rows)
    most_bytes = chunks.chunk_bytes or default_bytes(rows, row_bytes, device)
    most = chunks.chunk_rows or max(1, most_bytes // max(1, row_bytes))
    if most >= rows or (by_rule and sum_bytes >= (rows - most) * row_bytes):
        return max(1, rows)
    if most > _TILE:
        most -= most % _TILE
    pieces = -(-rows // most)
    alike = -(-rows // pieces)
    return min(most, -(-alike // _TILE) * _TILE)


def run(
    linear: Linear,
    kept: Tensor | None,
    needs: tuple[bool, bool, bool],
    chunks: Chunks,
    turn: Callable[[Tensor, slice | Tensor], None],
    turn_bytes: int = 0,
) -> LayerGradients:
    """Goes through the rows, and returns the gradients of those of the layer's tensors that ``needs`` names.

    Args:
        linear: the layer, of tensors of one dtype on one device
        kept: the numbers of the rows that count, the others' gradient is 0; None if all do
        needs: whether input, weight and bias have a gradient
        chunks: how the rows are cut
        turn: called with the logits of a piece, ``[its rows, outputs]``, and which rows these are; if anything needs a
            gradient, it overwrites the logits with theirs
        turn_bytes: what that takes for itself, for each row
    """
    needs_input, needs_weight, needs_bias = needs
    input, weight, bias = linear
    rows = len(input) if kept is None else len(kept)
    outputs, features = weight.shape
    gathered = 0 if kept is None else 2 * features  # of a piece's input, and of its gradient
    sum_dtype = weight.dtype if chunks.compact_gradients else accumulation_dtype(weight.dtype)
    sum_bytes = weight.numel() * sum_dtype.itemsize if needs_weight and sum_dtype != weight.dtype else 0
    row_bytes = (outputs + gathered) * input.element_size() + turn_bytes
    size = piece_rows(rows, row_bytes, sum_bytes, chunks, input.device)
    buffer = input.new_empty(min(size, rows), outputs)
    grad_input = None
    if needs_input:
        grad_input = input.new_empty(input.shape) if kept is None else input.new_zeros(input.shape)
    if size >= rows:  # then there is no sum over pieces
        sum_dtype = weight.dtype
    of_weight = _Sum(weight, sum_dtype, buffer.nbytes) if needs_weight else None
    of_bias = torch.zeros(outputs, dtype=torch.float64, device=input.device) if needs_bias else None
    for piece in _pieces(rows, size):
        at: slice | Tensor = piece if kept is None else kept[piece]
        x = input[at]
        logits = buffer[: len(x)]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        turn(logits, at)
        if of_weight is not None:
            of_weight.add(logits, x)
        if of_bias is not None:
            of_bias += logits.sum(0)  # of 16 bits in float32; with a dtype, torch would copy the piece
        if grad_input is not None and kept is None:
            torch.mm(logits, weight, out=grad_input[at])
        elif grad_input is not None:
            grad_input[at] = torch.mm(logits, weight)
    del buffer  # before the weight's gradient is rounded
    return LayerGradients(
        grad_input,
        None if of_weight is None else of_weight.result(),
        None if of_bias is None else of_bias.to(input.dtype),
    )


class _Sum:
    """The sum over pieces of ``grad_logits.T @ input``, of the weight's shape."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, piece_bytes: int) -> None:
        self.dtype = weight.dtype
        self.total = weight.new_empty(weight.shape, dtype=dtype)
        self.is_empty = True
        self.product: Tensor | None = None
        if dtype != self.dtype:
            on_cuda = weight.is_cuda  # where a product of 16 bits may be of float32
            of_product = dtype if on_cuda else self.dtype
            most = max(_LEAST_PRODUCT_BYTES, piece_bytes // _PRODUCT_SHARE)
            most = most if on_cuda else min(most, _PRODUCT_BYTES_ON_CPU)
            step = min(len(weight), max(1, most // max(1, weight.shape[1] * of_product.itemsize)))
            self.product = weight.new_empty(step, weight.shape[1], dtype=of_product)

    def add(self, grad_logits: Tensor, input: Tensor) -> None:
        left = grad_logits.t()
        if self.product is not None:
            for at in _pieces(len(left), len(self.product)):
                self._add_part(self.total[at], left[at], input)
        elif self.is_empty:
            torch.mm(left, input, out=self.total)
        else:
            torch.addmm(self.total, left, input, out=self.total)
        self.is_empty = False

    def _add_part(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        assert self.product is not None
        product = self.product[: len(total)]
        if product.dtype == left.dtype:
            torch.mm(left, right, out=product)
        else:
            torch.mm(left, right, out_dtype=product.dtype, out=product)
        if self.is_empty:
            total.copy_(product)
        else:
            total.add_(product)

    def result(self) -> Tensor:
        if self.is_empty:
            return torch.zeros_like(self.total, dtype=self.dtype)
        self.product = None
        return self.total.to(self.dtype)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies a dense ``gradient`` with ``factor``, a scalar of the dtype that is computed in."""
    if gradient.dtype == factor.dtype:
        gradient.mul_(factor)
        return
    parts = gradient.view(-1).split(LEAST_BYTES // _PRODUCT_SHARE // factor.element_size())
    for part in parts:  # else float32 would be held for all of it, and a factor of 16 bits has few digits
        part.copy_(part.to(factor.dtype).mul_(factor))


def _pieces(length: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, length)) for begin in range(0, length, size))
