"""Rows as pictures: speed-up over the fastest peer as bars, time for a logit against the number of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.cases import Case, cases
from benchmarks.contenders import COPY, FORWARD_BACKWARD, IN_PLACE, OURS, PEERS, TORCHCE
from benchmarks.goals import SPEEDUP, TRAINING, verdicts
from benchmarks.ledger import Row
from benchmarks.problems import CROSS_ENTROPY, TRAINED

# Okabe and Ito's palette: told apart with any colour vision, and in print by lightness.
COLOURS = {
    TORCHCE: "#0072B2",
    IN_PLACE: "#56B4E9",
    FORWARD_BACKWARD: "#000000",
    "eager": "#D55E00",
    "compile": "#E69F00",
    "torch chunked": "#F0E442",
    "Liger": "#009E73",
    "QuACK": "#CC79A7",
    "Apple CCE": "#8C6D31",
    COPY: "#888888",
}
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
}


def draw(rows: Sequence[Row], folder: Path, subtitle: str) -> list[str]:
    """Writes what can be drawn from the rows; returns the files' names."""
    found = [case for case in cases(rows) if case.phase == TRAINING]
    with plt.rc_context(STYLE):
        pictures = {
            "speedup.png": _speedups([case for case in found if case.fastest_peer()], subtitle),
            "time_against_classes.png": _against_classes([case for case in found if _on_curve(case)], subtitle),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            if figure is not None:
                figure.savefig(folder / name)
                plt.close(figure)
            else:
                (folder / name).unlink(missing_ok=True)  # an older one would pass for a picture of these rows
    return [name for name, figure in pictures.items() if figure is not None]


def _on_curve(case: Case) -> bool:
    """Plain rows, enough of them and large enough that the time is spent on logits, not on the call."""
    plain = case.op == CROSS_ENTROPY and len(case.shape) == 2 and not case.variant
    return plain and case.shape[0] >= 256 and case.elements >= 1 << 17


def _dtypes(found: Sequence[Case]) -> list[str]:
    return [dtype for dtype in TRAINED if any(case.dtype == dtype for case in found)]


def _heading(figure: Figure, title: str, subtitle: str) -> None:
    """A title and where it was measured, above the axes at any height of the figure."""
    inches = figure.get_size_inches()[1]
    figure.suptitle(title, x=0.02, y=1 + 0.36 / inches, ha="left", va="bottom", fontsize=12, weight="bold")
    figure.text(0.02, 1 + 0.1 / inches, subtitle, ha="left", va="bottom", fontsize=8, color="#555555")


def _speedups(found: Sequence[Case], subtitle: str) -> Figure | None:
    dtypes = _dtypes(found)
    if not dtypes:
        return None
    names = list(dict.fromkeys(case.name for case in found))
    figure, axes = plt.subplots(
        *(1, len(dtypes)),
        figsize=(4.9 * len(dtypes) + 1.0, 0.5 * len(names) + 0.9),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    reach = [1.0]
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for case in (case for case in found if case.dtype == dtype):
            y = names.index(case.name)
            # Goals against one peer alone would stand beside a bar that shows another's.
            goals = {
                verdict.goal.contender: verdict.goal.bound
                for verdict in verdicts(case)
                if verdict.goal.quantity == SPEEDUP and len(verdict.goal.peers) > 1
            }
            for ours, offset in ((TORCHCE, -0.2), (IN_PLACE, 0.2)):
                speedup = case.speedup(ours, case.fastest_peer())
                if speedup is None:
                    continue
                reach.append(speedup)
                axis.barh(y + offset, speedup - 1, 0.36, left=1, color=COLOURS[ours])
                ahead = speedup >= 1
                goal = goals.get(ours, 0.0)
                beyond = goal if ahead and speedup <= goal < 1.5 * speedup else speedup  # no label across a goal
                axis.annotate(
                    f"{speedup:.2g}x" if speedup < 9.95 else f"{speedup:.0f}x",
                    *((beyond, y + offset), (3 if ahead else -3, 0)),
                    textcoords="offset points",
                    **{"va": "center", "ha": "left" if ahead else "right", "fontsize": 7},
                )
                if goal:
                    axis.plot([goal] * 2, [y + offset - 0.2, y + offset + 0.2], color="black", linewidth=1.2)
        axis.axvline(1, color="#444444", linewidth=0.8)
        axis.set_title(dtype, loc="left")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("times faster than the fastest peer")
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
    axes[0][0].set_xlim(min(reach) / 1.5, max(reach) * 1.5)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.4, -0.6)
    handles: list[Any] = [Rectangle((0, 0), 1, 1, color=COLOURS[ours]) for ours in (TORCHCE, IN_PLACE)]
    handles.append(Line2D([], [], color="black", marker="|", linestyle="", markersize=9))
    figure.legend(handles, [TORCHCE, IN_PLACE, "goal"], loc="outside lower right", ncols=3)
    _heading(figure, "Forward and backward", subtitle)
    return figure


def _against_classes(found: Sequence[Case], subtitle: str) -> Figure | None:
    dtypes = _dtypes(found)
    if len({case.shape[1] for case in found}) < 2:
        return None
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(4.9 * len(dtypes) + 0.6, 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        # Of the problems with as many classes the one with the most rows: the others show how small sizes fare.
        largest = {c.shape[1]: c for c in sorted((c for c in found if c.dtype == dtype), key=lambda c: c.elements)}
        for contender in (*OURS, *PEERS, COPY):
            points = [
                (classes, time / case.elements * 1e9)
                for classes, case in sorted(largest.items())
                if (time := case.time(contender)) is not None
            ]
            if points:
                dashed = {"linestyle": ":", "linewidth": 1.2} if contender == COPY else {"marker": "o", "markersize": 4}
                label = "copy of as many bytes" if contender == COPY else contender
                axis.plot(*zip(*points, strict=True), color=COLOURS[contender], label=label, **dashed)
        axis.set(xscale="log", yscale="log", xlabel="classes C (rows N)")
        axis.set_title(dtype, loc="left")
        ticks = sorted(largest)
        axis.set_xticks(ticks, [f"{c}\n({largest[c].shape[0]})" for c in ticks], fontsize=7)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("nanoseconds a logit")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels))
    _heading(figure, "Cross entropy, forward and backward: time for one logit", subtitle)
    return figure
