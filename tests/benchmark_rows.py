"""Measured rows as a ledger has them, for the tests of what is made of them."""

from __future__ import annotations

from typing import Any

from benchmarks import ledger
from benchmarks.problems import CROSS_ENTROPY

ENVIRONMENT = {
    **{"device": "cpu", "name": "Some CPU, 2 threads", "threads": 2, "load": 0.1, "cpu_level": "x86-64-v3"},
    **{"torch": "2.14.1", "torchce": "0.1.0", "commit": "0123456789ab", "date": "2026-01-02 03:04 UTC", "quick": False},
}
MIB = 1 << 20


def row(contender: str, median: float | None, **changes: Any) -> ledger.Row:
    """A measured row of CE 512x32000 float32."""
    values: dict[str, Any] = {
        **{"op": CROSS_ENTROPY, "size": "512x32000", "variant": "", "dtype": "float32", "phase": "forward+backward"},
        **{"iqr": 1e-4, "minimum": median, "samples": 9, "calls_per_sample": 1, "environment": ENVIRONMENT},
        **{"peak_bytes": 62 * MIB, "traffic_bytes": 196_616_192},
    }
    return ledger.Row(contender=contender, median=median, **{**values, **changes})


ROWS = [
    row("torchce", 0.020),
    row("torchce in place", 0.010, peak_bytes=4096),
    row("eager", 0.080),
    row("compile", 0.050),
    row("copy", 0.008, peak_bytes=None),
]
