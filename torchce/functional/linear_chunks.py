"""How :func:`torchce.functional.linear_cross_entropy` is told into which pieces to cut the rows, and what to spare."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchce.chunked import Chunks
from torchce.functional._common import SIXTEEN_BITS, is_integer

if TYPE_CHECKING:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

_TORCHS_OPTIONS = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # there from torch 2.13 on

_POLICIES = ("auto", "accurate", "compact")


def chunks_of(
    options: LinearCrossEntropyOptions | None,
    chunk_bytes: int | None,
    chunk_rows: int | None,
    acc_policy: str,
    compact_ignored: bool | None,
    input: Tensor,
    linear_weight: Tensor,
) -> Chunks:
    """How the rows of checked tensors are cut; raises where the arguments are wrong or contradict each other."""
    if acc_policy not in _POLICIES:
        raise ValueError(f"acc_policy: expected one of {', '.join(map(repr, _POLICIES))}, got {acc_policy!r}")
    if compact_ignored is not None and type(compact_ignored) is not bool:
        raise ValueError(f"compact_ignored: expected a bool or None, got {compact_ignored!r}")
    row_bytes = math.prod(linear_weight.shape[:-1]) * input.element_size()
    bytes_of_one = f"{row_bytes}, what one row of logits takes"
    for name, value, least, words in (
        ("chunk_bytes", chunk_bytes, row_bytes, bytes_of_one),
        ("chunk_rows", chunk_rows, 1, "1"),
    ):
        if value is not None and (not is_integer(value) or isinstance(value, Tensor)):
            raise TypeError(f"{name}: expected an int or None, got {value!r}")
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {words}, got {value}")
    if chunk_bytes is not None and chunk_rows is not None:
        raise ValueError(f"chunk_rows: expected none beside chunk_bytes, got {chunk_rows} and {chunk_bytes}")
    if options is not None:
        if _TORCHS_OPTIONS is None or not isinstance(options, _TORCHS_OPTIONS):
            raise TypeError(f"options: expected a torch.nn.LinearCrossEntropyOptions or None, got {options!r}")
        if chunk_bytes is not None or chunk_rows is not None or acc_policy != "auto":
            raise ValueError("options: expected None beside chunk_bytes, chunk_rows or acc_policy, which say the same")
        chunk_bytes, chunk_rows, acc_policy = _from_torchs(options, input)
    if compact_ignored is None:
        compact_ignored = not input.is_cuda
    return Chunks(chunk_bytes or 0, chunk_rows or 0, acc_policy == "compact", compact_ignored)


def _from_torchs(options: LinearCrossEntropyOptions, input: Tensor) -> tuple[int | None, int | None, str]:
    """Bytes or rows of a piece and the policy of the sums that torch's options ask for."""
    chunk_bytes = None
    method: Any = options.chunking_method
    if method is not None and method != "auto":
        if options.batch_chunk_size is not None:
            both = f"{method!r} and {options.batch_chunk_size}"
            raise ValueError(f"options: expected one of chunking_method and batch_chunk_size, got {both}")
        chunk_bytes = max(1, input.numel() * input.element_size() // int(method.partition(":")[2] or 1))
    acc_dtype = options.acc_dtype
    if acc_dtype not in (None, input.dtype) and not (acc_dtype == torch.float32 and input.dtype in SIXTEEN_BITS):
        raise RuntimeError(
            f"options: expected an acc_dtype of {input.dtype}, or of float32 beside 16 bits, got {acc_dtype}"
        )
    is_narrow = acc_dtype == input.dtype
    return chunk_bytes, options.batch_chunk_size, "compact" if is_narrow else options.acc_policy
