"""The speed section of README.md, from the ledgers: ``python -m benchmarks.readme``.

It replaces what lies between two marker lines::

    <!-- benchmarks:begin -->
    <!-- benchmarks:end -->
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import Case, cases
from benchmarks.contenders import COMPILE, EAGER, IN_PLACE, LIGER, QUACK, TORCHCE
from benchmarks.goals import TRAINING
from benchmarks.ledger import RESULTS, ROOT, Row, folder, latest
from benchmarks.problems import BCE, CROSS_ENTROPY, DTYPES, LABELS
from benchmarks.report import describe, environments, seconds, size

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOT_MEASURED = "not yet measured"

# What a reader decides by: the size at which calls cost most, the common ones, and both losses.
HEADLINES = {
    "cpu": [
        (CROSS_ENTROPY, "32x10", ""),
        (CROSS_ENTROPY, "4096x1000", ""),
        (CROSS_ENTROPY, "512x32000", ""),
        (CROSS_ENTROPY, "256x128256", ""),
        (CROSS_ENTROPY, "8x19x256x256", ""),
        (CROSS_ENTROPY, "1024x1000", "soft"),
        (BCE, "4096x1000", ""),
        (BCE, "512x32000", ""),
    ],
    "cuda": [
        (CROSS_ENTROPY, "32768x1024", ""),
        (CROSS_ENTROPY, "32768x32768", ""),
        (CROSS_ENTROPY, "16384x131072", ""),
        (CROSS_ENTROPY, "8x19x512x1024", ""),
        (BCE, "4096x4096", ""),
        (BCE, "16384x16384", ""),
    ],
}
PEERS = {"cpu": (EAGER, COMPILE), "cuda": (EAGER, COMPILE, LIGER, QUACK)}
TITLES = {"cpu": "CPU", "cuda": "CUDA"}


def _table(device: str, rows: Sequence[Row]) -> str:
    found = {(c.op, c.size, c.variant, c.dtype): c for c in cases(rows) if c.phase == TRAINING}
    peers = PEERS[device]
    ours = ["torchce", "in place"]
    figures = ["speed-up", "speed-up in place", "memory", "memory in place"]
    header = ["problem", "dtype", *ours, *peers, *figures]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for op, extent, variant in HEADLINES[device]:
        name = f"{LABELS[op]} {extent} {variant}".rstrip()
        for dtype in DTYPES:
            case = found.get((op, extent, variant, dtype))
            lines.append([name, dtype, *_figures(case, peers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(case: Case | None, peers: Sequence[str]) -> list[str]:
    if case is None or case.time(TORCHCE) is None:
        return [NOT_MEASURED, *["-"] * (len(peers) + 5)]
    best = case.fastest_peer(peers)
    speedups = [case.speedup(ours, best) for ours in (TORCHCE, IN_PLACE)]
    return [
        *(seconds(case.time(contender)) for contender in (TORCHCE, IN_PLACE, *peers)),
        *("-" if speedup is None else f"{speedup:.1f}x" for speedup in speedups),
        *(size(case.rows[ours].peak_bytes) if ours in case.rows else "-" for ours in (TORCHCE, IN_PLACE)),
    ]


def section(results: Path = RESULTS) -> str:
    """The text between the markers."""
    parts = [
        "Forward and backward together: medians, all interleaved in one process. *speed-up*: over the fastest of the "
        "others; *in place*: `inplace_backward=True`, the gradient overwriting the logits; *memory*: the most held at "
        "once beyond the inputs.",
    ]
    for device in ("cpu", "cuda"):
        rows = latest(device, results)
        parts.append(f"**{TITLES[device]}**")
        if rows:
            parts.append("\n".join(f"- {describe(each)}" for each in environments(rows)))
            where = folder(rows[0].environment).relative_to(ROOT).as_posix()
            parts += [_table(device, rows), f"Every problem and pass, with plots: [{where}]({where}/results.md)."]
        else:
            parts.append(f"{NOT_MEASURED.capitalize()}: `python -m benchmarks --device {device}` fills this in.")
    return "\n\n".join(parts)


def update(readme: Path = ROOT / "README.md", results: Path = RESULTS) -> bool:
    """Rewrites the section; returns whether anything changed.

    Raises:
        ValueError: the file has no markers, or they are out of order.
    """
    text = readme.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{readme.name} has no section to fill: add the lines {BEGIN} and {END}")
    new = pattern.sub(lambda _: f"{BEGIN}\n\n{section(results)}\n\n{END}", text, count=1)
    if new != text:
        readme.write_text(new)
    return new != text


def main() -> int:
    try:
        print("README.md updated" if update() else "README.md is up to date")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
