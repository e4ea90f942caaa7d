"""What ``make gpu`` says in the end: one table on the terminal, and the same in gpu.md and gpu.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu.steps import OK, Outcome

MOST_COLUMNS = 170
MEASURED = "measured"

Line = tuple[str, str, str, str]


def lines(outcomes: Iterable[Outcome], figures: Iterable[tuple[str, str]] = ()) -> list[Line]:
    """(step, result, seconds, words): the steps, each with what it found below, then the figures."""
    found = [("step", "result", "seconds", "")]
    for each in outcomes:
        found.append((each.name, each.result, f"{each.seconds:.1f}", each.words))
        found += [(f"  {name}", "", "", words) for name, words in each.details]
    return found + [(name, MEASURED, "", words) for name, words in figures]


def plain(rows: Sequence[Line]) -> str:
    width, results, time = (max(len(row[column]) for row in rows) for column in (0, 1, 2))
    drawn = (f"{a:<{width}}  {b:<{results}}  {c:>{time}}  {d}" for a, b, c, d in rows)
    return "\n".join(line[:MOST_COLUMNS].rstrip() for line in drawn)


def markdown(rows: Sequence[Line]) -> str:
    cells = [f"| {' | '.join(cell.strip().replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([cells[0], "|---|---|--:|---|", *cells[1:]])


def conclusion(outcomes: Sequence[Outcome]) -> str:
    """One line; what was not checked is named beside what failed."""
    failed = [each.name for each in outcomes if not each.good]
    unchecked = [f"{each.name} ({each.result.lower()})" for each in outcomes if each.good and each.result != OK]
    words = f"{len(outcomes) - len(failed) - len(unchecked)} of {len(outcomes)} steps held"
    words += f"; failed: {', '.join(failed)}" if failed else ""
    return words + (f"; not checked: {', '.join(unchecked)}" if unchecked else "")


def figures(folder: Path) -> list[tuple[str, str]]:
    """Of the key problems in the ledger there, and why a peer was not measured; nothing where there is no ledger."""
    try:
        return _figures(folder)
    except Exception as error:  # the table must come whatever lies in the folder, as another revision's ledger
        return [("figures", f"not readable: {error!r}")]


def _figures(folder: Path) -> list[tuple[str, str]]:
    try:  # torchce is perhaps not built
        from benchmarks import ledger, report
        from benchmarks.cases import cases
        from benchmarks.contenders import PEERS, TORCHCE
        from benchmarks.goals import BACKWARD, FORWARD, TRAINING
        from benchmarks.problems import GRIDS

        rows = ledger.load(folder / ledger.FILE)
    except (ImportError, OSError, ValueError):
        return []
    key = {problem.name for grid in GRIDS.values() for problem in grid if problem.key}
    found: dict[str, list[str]] = {}
    order = [FORWARD, BACKWARD, TRAINING]
    for case in sorted(cases(rows), key=lambda case: order.index(case.phase)):
        if case.name not in key or case.time(TORCHCE) is None:
            continue
        words = f"{case.phase.replace(FORWARD, 'fwd').replace(BACKWARD, 'bwd')} {report.seconds(case.time(TORCHCE))}"
        if (share := case.copy_share(TORCHCE)) is not None:
            words += f" {share:.0%} of copy"
        if case.phase == TRAINING:
            others = {peer: case.speedup(TORCHCE, peer) for peer in case.rows if peer in PEERS}
            words += "".join(f", {value:.2f}x {peer}" for peer, value in others.items() if value is not None)
        found.setdefault(f"{case.name} {case.dtype}", []).append(words)
    return [(name, "; ".join(words)) for name, words in found.items()] + [
        (line.partition(": ")[0], line.partition(": ")[2]) for line in report.notes(rows) if "failed" in line
    ]


def write(folder: Path, machine: dict[str, Any], outcomes: Sequence[Outcome], rows: Sequence[Line]) -> None:
    words = ", ".join(f"{name} {value}" for name, value in machine.items())
    (folder / "gpu.md").write_text(f"{words}\n\n{markdown(rows)}\n")
    steps = [{**vars(each), "seconds": round(each.seconds, 1)} for each in outcomes]
    (folder / "gpu.json").write_text(json.dumps({"machine": machine, "steps": steps}, indent=1) + "\n")
