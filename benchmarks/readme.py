"""What pages say of speed, from the ledgers: ``python -m benchmarks.readme``.

It replaces what lies between two marker lines, in README.md::

    <!-- benchmarks:begin -->
    <!-- benchmarks:end -->

and in docs/cuda.md, ``measured`` for ``benchmarks``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import Case, cases
from benchmarks.contenders import (
    APPLE_CCE,
    COMPILE,
    EAGER,
    FORWARD_BACKWARD,
    IN_PLACE,
    LIGER,
    OURS,
    QUACK,
    TORCH_CHUNKED,
    TORCHCE,
)
from benchmarks.goals import BACKWARD, FORWARD, TRAINING
from benchmarks.ledger import RESULTS, ROOT, Row, folder, latest
from benchmarks.problems import BCE, CROSS_ENTROPY, DIVERGENCES, GRIDS, LINEAR_CROSS_ENTROPY, TRAINED, Problem
from benchmarks.report import describe, environments, ratio, seconds, size

NOT_MEASURED = "not yet measured"

# What a reader decides by: the size at which calls cost most, the common ones, and both losses.
HEADLINES = {device: [p for p in grid if p.key and p.op in (CROSS_ENTROPY, BCE)] for device, grid in GRIDS.items()}
HEADS = {device: [p for p in grid if p.key and p.op == LINEAR_CROSS_ENTROPY] for device, grid in GRIDS.items()}
OF_DIVERGENCES = {device: [p for p in grid if p.key and p.op in DIVERGENCES] for device, grid in GRIDS.items()}
PEERS = {"cpu": (EAGER, COMPILE), "cuda": (EAGER, COMPILE, LIGER, QUACK)}
PEERS_OF_HEADS = {
    "cpu": (EAGER, COMPILE, TORCH_CHUNKED),
    "cuda": (EAGER, COMPILE, TORCH_CHUNKED, LIGER, QUACK, APPLE_CCE),
}
PEERS_OF_DIVERGENCES = {"cpu": (EAGER, COMPILE), "cuda": (EAGER, COMPILE, LIGER)}
TITLES = {"cpu": "CPU", "cuda": "CUDA"}


def _table(
    problems: Sequence[Problem], peers: Sequence[str], rows: Sequence[Row], ours: Sequence[str] = (TORCHCE, IN_PLACE)
) -> str:
    found = {(c.op, c.size, c.variant, c.dtype): c for c in cases(rows) if c.phase == TRAINING}
    ways = [OURS[each] for each in ours]
    figures = [f"{figure} {way or ''}".rstrip() for figure in ("speed-up", "memory") for way in ways]
    header = ["problem", "dtype", *(way or TORCHCE for way in ways), *peers, *figures]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for problem in problems:
        for dtype in (dtype for dtype in problem.dtypes if dtype in TRAINED):
            case = found.get((problem.op, problem.size, problem.variant, dtype))
            lines.append([problem.name, dtype, *_figures(case, peers, ours)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(case: Case | None, peers: Sequence[str], ours: Sequence[str]) -> list[str]:
    if case is None or case.time(TORCHCE) is None:
        return [NOT_MEASURED, *["-"] * (len(peers) + 3 * len(ours) - 1)]
    best = case.fastest_peer(peers)
    speedups = [case.speedup(each, best) for each in ours]
    return [
        *(seconds(case.time(contender)) for contender in (*ours, *peers)),
        *("-" if speedup is None else f"{speedup:.1f}x" for speedup in speedups),
        *(size(case.rows[each].peak_bytes) if each in case.rows else "-" for each in ours),
    ]


def _divergences(device: str, rows: Sequence[Row]) -> list[str]:
    """A sentence and a table; nothing where none was measured."""
    problems = OF_DIVERGENCES[device]
    if not {problem.op for problem in problems} & {row.op for row in rows}:
        return []
    return [
        "Divergences from the logits of a teacher, and entropies, beside what one composes of torch's functions:",
        _table(problems, PEERS_OF_DIVERGENCES[device], rows, (TORCHCE,)),
    ]


def section(results: Path = RESULTS) -> str:
    """The text between the markers."""
    parts = [
        "Forward and backward together: medians, all interleaved in one process. *speed-up*: over the fastest of the "
        "others; *in place*: `inplace_backward=True`, the gradient overwriting the logits; *memory*: the most held at "
        "once beyond the inputs. Linear CE is of rows x hidden x classes, and *in place* is there the linear layer, "
        "whole, then the loss.",
    ]
    for device in ("cpu", "cuda"):
        rows = latest(device, results)
        parts.append(f"**{TITLES[device]}**")
        if rows:
            parts.append("\n".join(f"- {describe(each)}" for each in environments(rows)))
            where = folder(rows[0].environment).relative_to(ROOT).as_posix()
            parts += [
                _table(HEADLINES[device], PEERS[device], rows),
                _table(HEADS[device], PEERS_OF_HEADS[device], rows),
                *_divergences(device, rows),
                f"Every problem and pass, with plots: [{where}]({where}/results.md).",
            ]
        else:
            parts.append(f"{NOT_MEASURED.capitalize()}: `python -m benchmarks --device {device}` fills this in.")
    return "\n\n".join(parts)


def measured(results: Path = RESULTS) -> str:
    """Every problem of the CUDA ledger in a line: times with their share of a copy's speed, and against the others."""
    rows = latest("cuda", results)
    if not rows:
        return f"{NOT_MEASURED.capitalize()}: `python -m benchmarks --device cuda` fills this in."
    passes: dict[tuple[str, str], dict[str, Case]] = {}
    for case in cases(rows):
        if case.op != LINEAR_CROSS_ENTROPY:
            passes.setdefault((case.name, case.dtype), {})[case.phase] = case
    header = ["problem", "dtype", FORWARD, BACKWARD, "forward_backward", *(f"vs {peer}" for peer in PEERS["cuda"])]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for (name, dtype), found in passes.items():
        training = found.get(TRAINING)
        lines.append(
            [
                *(name, dtype),
                *(_speed(found.get(phase), TORCHCE) for phase in (FORWARD, BACKWARD)),
                _speed(training, FORWARD_BACKWARD),
                *(ratio(training.speedup(TORCHCE, peer) if training else None) for peer in PEERS["cuda"]),
            ]
        )
    return "\n\n".join(
        [
            "Medians, each with its share of the speed of a copy that moves as many bytes; *vs*: forward and backward "
            "together, times faster than the other.",
            "\n".join(f"- {describe(each)}" for each in environments(rows)),
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
        ]
    )


def _speed(case: Case | None, contender: str) -> str:
    if case is None or case.time(contender) is None:
        return "-"
    share = case.copy_share(contender)
    return seconds(case.time(contender)) + ("" if share is None else f" ({share:.0%})")


SECTIONS = {"README.md": ("benchmarks", section), "docs/cuda.md": ("measured", measured)}
"""By page: the markers' name, and what lies between them."""


def update(page: Path, results: Path = RESULTS) -> bool:
    """Rewrites the page's section; returns whether anything changed.

    Raises:
        ValueError: the file has no markers, or they are out of order.
    """
    name, written = next(value for key, value in SECTIONS.items() if page.name == Path(key).name)
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page.name} has no section to fill: add the lines {begin} and {end}")
    new = pattern.sub(lambda _: f"{begin}\n\n{written(results)}\n\n{end}", text, count=1)
    if new != text:
        page.write_text(new)
    return new != text


def main() -> int:
    status = 0
    for name in SECTIONS:
        try:
            print(f"{name} updated" if update(ROOT / name) else f"{name} is up to date")
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
