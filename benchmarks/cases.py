"""Rows of one problem and pass put together, and the ratios read off them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from benchmarks.contenders import COPY, PEERS
from benchmarks.ledger import Row
from benchmarks.problems import DTYPES, LABELS, LINEAR_CROSS_ENTROPY


@dataclass
class Case:
    op: str
    size: str
    variant: str
    dtype: str
    phase: str
    rows: dict[str, Row] = field(default_factory=dict)  # by contender

    @property
    def name(self) -> str:
        return f"{LABELS[self.op]} {self.size} {self.variant}".rstrip()

    @property
    def extents(self) -> tuple[int, ...]:
        return tuple(map(int, self.size.split("x")))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits."""
        rows, *rest = self.extents
        return (rows, rest[-1]) if self.op == LINEAR_CROSS_ENTROPY else self.extents

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        return self.elements * self.element_bytes

    @property
    def device(self) -> str:
        return next(iter(self.rows.values())).environment["device"]

    def time(self, contender: str) -> float | None:
        """Median seconds a call."""
        row = self.rows.get(contender)
        return row.median if row else None

    def fastest_peer(self, peers: Iterable[str] = PEERS) -> str | None:
        """The peer with the least time."""
        times = {peer: time for peer in peers if (time := self.time(peer)) is not None}
        return min(times, key=times.__getitem__, default=None)

    def speedup(self, contender: str, peer: str | None) -> float | None:
        """How many times faster than the peer the contender is."""
        time, other = self.time(contender), self.time(peer) if peer else None
        return None if time is None or other is None else other / time

    def copy_share(self, contender: str) -> float | None:
        """Achieved bandwidth as a share of what a plain copy of as many bytes achieved."""
        return self.speedup(contender, COPY)

    def bandwidth(self, contender: str) -> float | None:
        """Bytes a second, by the traffic model."""
        row = self.rows.get(contender)
        return (
            None if row is None or row.median is None or row.traffic_bytes is None else row.traffic_bytes / row.median
        )


def cases(rows: Iterable[Row]) -> list[Case]:
    """In the order the rows came in."""
    found: dict[tuple[str, ...], Case] = {}
    for row in rows:
        case = found.setdefault(row.key[:-1], Case(row.op, row.size, row.variant, row.dtype, row.phase))
        case.rows[row.contender] = row
    return list(found.values())


def with_minima(rows: Iterable[Row]) -> list[Row]:
    """Rows with the fastest sample for the median: on a busy machine the only figure near the truth."""
    return [replace(row, median=row.minimum) for row in rows]
