"""The loop over pieces of a linear layer's logits: how rows are cut, and that it knows no loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchce import chunked
from torchce.chunked import Chunks, Linear, default_bytes, piece_rows, run

CPU = torch.device("cpu")
MIB = 1 << 20
BY_RULE = Chunks()


@pytest.mark.parametrize(
    ("rows", "row_bytes", "expected"),
    [
        (1, 40, 64 * MIB),
        (512, 4 * 32000, 64 * MIB),  # all of them take less
        (4096, 4 * 32000, 64 * MIB),  # a sixteenth is 31 MiB
        (4096, 4 * 128256, 4096 * 4 * 128256 // 16),
        (1024, 4 * 262144, 256 * 4 * 262144),  # a sixteenth would be 64 rows, too few for a product
    ],
)
def test_default_bytes(rows: int, row_bytes: int, expected: int) -> None:
    assert default_bytes(rows, row_bytes, CPU) == expected


@pytest.mark.parametrize(
    ("rows", "row_bytes", "chunks", "expected"),
    [
        (0, 40, BY_RULE, 1),
        (1, 40, BY_RULE, 1),
        (512, 4 * 32000, BY_RULE, 512),  # at once
        (4096, 4 * 32000, BY_RULE, 512),  # 524 fit
        (4096, 2 * 32000, BY_RULE, 1024),  # 1048 fit
        (4096, 2 * 128256, BY_RULE, 256),  # 261 fit
        (1100, 4 * 128256, BY_RULE, 256),  # of 256 rows that fit, five pieces: 220 rows in two tiles
        (2000, 4 * 32000, BY_RULE, 512),  # four pieces of 500, the last one the smallest
        (100, 1, Chunks(chunk_rows=7), 7),  # 15 pieces
        (100, 1, Chunks(chunk_rows=60), 60),  # what was asked for is no tile
        (1000, 10, Chunks(10), 1),
        (1000, 10, Chunks(9), 1),  # never none
        (1000, 10, Chunks(3000), 256),  # 300 fit, two tiles
        (10**6, 0, BY_RULE, 10**6),  # no class: nothing to hold
    ],
)
def test_rows_of_a_piece(rows: int, row_bytes: int, chunks: Chunks, expected: int) -> None:
    size = piece_rows(rows, row_bytes, 0, chunks, CPU)
    assert size == expected
    if chunks.chunk_bytes > row_bytes or chunks == BY_RULE:
        assert size * row_bytes <= (chunks.chunk_bytes or default_bytes(rows, row_bytes, CPU))


def test_one_piece_where_sums_would_take_what_pieces_spare() -> None:
    """Of 4096 rows of 16 bits and 32,000 classes pieces of 64 MiB spare 186 MiB, 1437 features in float32."""
    row_bytes = 2 * 32000
    for features, expected in ((256, 1024), (1500, 1024), (1530, 4096), (4096, 4096)):
        assert piece_rows(4096, row_bytes, 4 * 32000 * features, BY_RULE, CPU) == expected
    assert piece_rows(4096, row_bytes, 4 * 32000 * 4096, Chunks(chunk_rows=128), CPU) == 128  # as was asked for


def test_as_few_pieces_as_may_be() -> None:
    """There are no more pieces than of as many rows as fit."""
    for rows in range(1, 3000, 7):
        chunks = Chunks(512 * 100)
        size = piece_rows(rows, 100, 0, chunks, CPU)
        assert -(-rows // size) == -(-rows // 512), rows


@pytest.mark.parametrize("needs", [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)])
@pytest.mark.parametrize("rows", [0, 1, 10, 11])
@pytest.mark.parametrize("kept", [None, [0, 2, 7], []])
def test_any_function_of_the_logits(kept: list[int] | None, rows: int, needs: tuple[bool, bool, bool]) -> None:
    """Half the square of each logit, whose gradient is the logit itself, against autograd."""
    torch.manual_seed(0)
    which = None if kept is None else torch.tensor([k for k in kept if k < rows], dtype=torch.int64)
    leaves = [torch.randn(rows, 3), torch.randn(4, 3), torch.randn(4)]
    leaves = [t.double().requires_grad_() for t in leaves]
    logits = torch.nn.functional.linear(*leaves)
    counted = logits if which is None else logits[which]
    expected = torch.autograd.grad((counted.square() / 2).sum(), leaves)
    seen: list[Tensor] = []

    def turn(piece: Tensor, at: slice | Tensor) -> None:
        torch.testing.assert_close(piece, logits[at])
        seen.append(torch.arange(rows)[at])

    found = run(Linear(*(t.detach() for t in leaves)), which, needs, Chunks(chunk_rows=4), turn)
    assert torch.equal(
        torch.cat([torch.empty(0, dtype=torch.int64), *seen]), torch.arange(rows) if which is None else which
    )
    for gradient, of_autograd, needed in zip(found, expected, needs, strict=True):
        assert (gradient is None) == (not needed)
        if gradient is not None:
            torch.testing.assert_close(gradient, of_autograd)


@pytest.mark.parametrize("compact", [False, True])
def test_sums_of_16_bits_are_of_float32(compact: bool) -> None:
    """1,000 pieces of one row each add 1/8 to a sum, whose steps beyond 32 are 1/4 in bfloat16."""
    ones = torch.ones(1000, 1, dtype=torch.bfloat16)
    layer = Linear(ones, ones[:2], None)

    def turn(piece: Tensor, at: slice | Tensor) -> None:
        piece.fill_(0.125)

    gradient = run(layer, None, (False, True, True), Chunks(chunk_rows=1, compact_gradients=compact), turn)
    assert gradient.weight is not None
    assert gradient.bias is not None
    assert (gradient.weight == (32 if compact else 125)).all()
    assert (gradient.bias == 125).all()  # whose sums are short
    assert gradient.weight.dtype == gradient.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scale_in_place(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a factor that has more digits than 16 bits, rounded once, in parts."""
    monkeypatch.setattr(chunked, "LEAST_BYTES", 256)
    gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    factor = torch.tensor(1 / 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (gradient.to(factor.dtype) * factor).to(dtype)
    chunked.scale_(gradient, factor)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    ("rows", "ignored", "outputs", "compacts"),
    [
        (100, 0, 5000, False),
        (100, 1, 5000, True),
        (100, 50, 40, True),
        (100, 50, 39, False),  # gathering 50 rows takes as long as 39 outputs of the others
        (100, 100, 20, True),
    ],
)
def test_rows_are_left_out_where_that_pays(rows: int, ignored: int, outputs: int, compacts: bool) -> None:
    counts = torch.arange(rows) >= ignored
    kept = chunked.kept_rows(counts, outputs, Chunks(compact_ignored=True))
    assert (kept is not None) == compacts
    if kept is not None:
        assert torch.equal(kept, torch.arange(ignored, rows))
    assert chunked.kept_rows(counts, outputs, Chunks()) is None
