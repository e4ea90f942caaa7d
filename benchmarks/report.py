"""Rows as tables: on the terminal, in Markdown, and beside an older ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.cases import Case, cases
from benchmarks.contenders import OURS, PEERS, TORCHCE
from benchmarks.goals import Verdict, verdicts
from benchmarks.ledger import Row

BUSY_LOAD = 0.5  # runnable processes a core before the benchmark starts, above which medians mean little
CHANGED = 0.05  # a smaller change is noise even where the spread does not say so


@dataclass(frozen=True)
class Cell:
    text: str
    good: bool | None = None


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn."""

    header: tuple[str, ...]
    lines: list[tuple[Cell, ...]]
    left: int  # columns that hold words

    def rich(self, caption: str = "") -> Table:
        table = Table(
            box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, caption=caption, caption_justify="left"
        )
        for i, title in enumerate(self.header):
            table.add_column(title, justify="left" if i < self.left else "right", no_wrap=i < self.left)
        styles = {True: "green", False: "red", None: ""}
        previous = None
        for line in self.lines:
            if previous not in (None, line[0].text):
                table.add_section()
            previous = line[0].text
            table.add_row(*(Text(cell.text, styles[cell.good]) for cell in line))
        return table

    def markdown(self) -> str:
        rule = ["---" if i < self.left else "---:" for i in range(len(self.header))]
        marks = {True: " ✓", False: " ✗", None: ""}
        lines = ["|".join(cell.text.replace("|", "/") + marks[cell.good] for cell in line) for line in self.lines]
        return "\n".join(f"|{line}|" for line in ("|".join(self.header), "|".join(rule), *lines))


def seconds(value: float | None) -> str:
    """Three digits, in the unit that suits."""
    if value is None:
        return "-"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: float | None) -> str:
    if value is None:
        return "-"
    for scale, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= 1000 * scale / 1024:  # 1000 KiB would be four digits
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def results(rows: Iterable[Row]) -> Grid:
    """One line for each problem, pass and way of torchce's."""
    found = cases(rows)
    peers = [peer for peer in PEERS if any(case.time(peer) is not None for case in found)]
    header = (
        "problem",
        "dtype",
        "pass",
        "torchce",
        "±",
        *peers,
        "vs best",
        "GB/s",
        "of copy",
        "memory",
        "best's",
        "goal",
    )
    lines = [
        _line(case, ours, peers, [verdict for verdict in verdicts(case) if verdict.goal.contender == ours])
        for case in found
        for ours in OURS
        if ours in case.rows and (ours == TORCHCE or case.time(ours) is not None)  # not every problem has every pass
    ]
    return Grid(header, lines, left=3)


def _line(case: Case, ours: str, peers: Sequence[str], judged: list[Verdict]) -> tuple[Cell, ...]:
    row = case.rows[ours]
    best = case.fastest_peer()
    speedup, share, bandwidth = case.speedup(ours, best), case.copy_share(ours), case.bandwidth(ours)
    missed = [verdict for verdict in judged if not verdict.met]
    goal = Cell("missed" if missed else "met", not missed) if judged else Cell("")
    return (
        Cell(case.name),
        Cell(case.dtype),
        Cell(OURS[ours] or case.phase),
        Cell(seconds(row.median) if row.median is not None else row.note),
        Cell(f"{row.iqr / row.median:.0%}" if row.median and row.iqr is not None else ""),
        *(Cell(seconds(case.time(peer))) for peer in peers),
        Cell(ratio(speedup), None if speedup is None else speedup >= 1),
        Cell("-" if bandwidth is None else f"{bandwidth / 1e9:.3g}"),
        Cell("-" if share is None else f"{share:.0%}"),
        Cell(size(row.peak_bytes)),
        Cell(size(case.rows[best].peak_bytes) if best else "-"),
        goal,
    )


def missed_goals(rows: Iterable[Row]) -> list[str]:
    return [
        f"{verdict.case.name} {verdict.case.dtype} {OURS[verdict.goal.contender] or verdict.case.phase}: {verdict}"
        for case in cases(rows)
        for verdict in verdicts(case)
        if not verdict.met
    ]


def goal_count(rows: Iterable[Row]) -> str:
    judged = [verdict for case in cases(rows) for verdict in verdicts(case)]
    return f"{sum(verdict.met for verdict in judged)} of {len(judged)} measured goals met"


def notes(rows: Iterable[Row]) -> list[str]:
    """Who could not be measured and why, each said once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.median is None:
            case = cases([row])[0]
            problems = found.setdefault((row.contender, row.note), [])
            if (label := f"{case.name} {case.dtype}") not in problems:
                problems.append(label)
    return [
        f"{contender}: {note} ({', '.join(problems[:4])}{', ...' if len(problems) > 4 else ''})"
        for (contender, note), problems in found.items()
    ]


def environments(rows: Iterable[Row]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in rows:
        if row.environment not in found:
            found.append(row.environment)
    return found


def describe(environment: dict[str, Any]) -> str:
    """A machine and what ran on it, in a line."""
    parts = [
        environment["name"],
        f"driver {environment['driver']}" if environment.get("driver") else None,
        f"CUDA {environment['cuda']}" if environment.get("cuda") else None,
        f"SIMD level {environment['cpu_level']}" if environment["device"] == "cpu" else None,
        f"torch {environment['torch']}",
        f"torchce {environment['torchce']} at {environment['commit']}",
        *(f"{name} {version}" for name, version in environment.get("peers", {}).items()),
        environment["date"],
    ]
    return ", ".join(part for part in parts if part)


def busy(environment: dict[str, Any]) -> str | None:
    """A warning where other work was running, or None."""
    load, threads = environment.get("load"), environment["threads"]
    if load is None or load <= BUSY_LOAD * threads:
        return None
    return f"the machine was busy: load {load} on {threads} threads before the start; medians are unreliable"


LEGEND = (
    "Times are medians, ± the interquartile range. *vs best*: times faster than the fastest peer. *GB/s*: by the "
    "traffic model (`benchmarks/traffic.py`); *of copy*: against a plain copy that moves as many bytes. *memory*: most "
    "held at once beyond the inputs; *best's*: the fastest peer's. *in place*: forward+backward, the gradient "
    "overwriting the logits, against the peers' forward+backward; of linear CE the logits are the linear layer's, and "
    "whole. *goal*: those missed are listed with what was wanted."
)


def markdown(rows: Sequence[Row], plots: Sequence[str]) -> str:
    """The whole report."""
    measured_by = environments(rows)
    parts = [
        "# Benchmark results",
        "Written by `python -m benchmarks`; the figures are `ledger.json`'s.",
        "\n".join(f"- {describe(environment)}" for environment in measured_by),
        "\n".join(f"**Note:** {warning}." for each in measured_by if (warning := busy(each))),
        "\n".join(f"![{plot}]({plot})" for plot in plots),
        LEGEND,
        results(rows).markdown(),
        f"## Goals\n\n{goal_count(rows)}."
        + "".join(f"\n- missed: {line.replace('|', ' / ')}" for line in missed_goals(rows)),
    ]
    if unmeasured := notes(rows):
        parts.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in unmeasured))
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison(old: Iterable[Row], new: Iterable[Row]) -> Grid:
    """What changed of torchce's times beyond the spread of either run, beside what the fastest peer did meanwhile."""
    before, after = (
        {(case.op, case.size, case.variant, case.dtype, case.phase): case for case in cases(rows)}
        for rows in (old, new)
    )
    lines: list[tuple[Cell, ...]] = []
    for key, case in after.items():
        for ours in OURS:
            row = case.rows.get(ours)
            other = before[key].rows.get(ours) if key in before else None
            if row is None or row.median is None:
                continue
            label = Cell(case.name), Cell(case.dtype), Cell(OURS[ours] or case.phase)
            if other is None or other.median is None:
                lines.append((*label, Cell("-"), Cell(seconds(row.median)), Cell("new"), Cell("-"), Cell("-")))
                continue
            change = other.median / row.median
            spread = max((each.iqr or 0.0) / each.median for each in (row, other) if each.median)
            if abs(change - 1) <= max(CHANGED, spread):
                continue
            speedups = [each.speedup(ours, each.fastest_peer()) for each in (before[key], case)]
            lines.append(
                (
                    *label,
                    *(Cell(seconds(each.median)) for each in (other, row)),
                    Cell(ratio(change), change > 1),
                    *(Cell(ratio(speedup)) for speedup in speedups),
                )
            )
    header = ("problem", "dtype", "pass", "old", "new", "times faster", "old vs best", "new vs best")
    return Grid(header, lines, left=3)


def short(rows: Sequence[Row]) -> str:
    """A just finished problem in a few words, for the progress bar."""
    found = cases(rows)
    case = found[-1] if found else None
    if case is None or case.time(TORCHCE) is None:
        return ""
    best = case.fastest_peer()
    return f"{case.name} {case.dtype}: {seconds(case.time(TORCHCE))}, {ratio(case.speedup(TORCHCE, best))} {best or ''}"
