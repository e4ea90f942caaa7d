"""One picture of what was measured: loss curves and their difference on top, time and memory below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples.training import Result, Run

COLOURS = {"torch": "#ee9a7c", "torchce": "#1f5a96", "torchce linear": "#2ca58d"}
GREY = "#555555"
# Where curves agree, all are still seen: a wide line under the dashes of one thin line in the gaps of another.
LINES: dict[str, dict[str, Any]] = {
    "torch": {"linewidth": 4.5},
    "torchce": {"linewidth": 1.2, "linestyle": (0, (4, 4))},
    "torchce linear": {"linewidth": 1.2, "linestyle": (4, (4, 4))},
}


def readable_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def readable_milliseconds(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1e3:.3g} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{1e3 * milliseconds:.3g} µs"


def draw(results: list[Result], path: str | Path) -> None:
    """Writes the picture."""
    title = "Trained from one seed: with torch's losses and with torchce's"
    figure = new_figure(title, width=max(4.2 * len(results), 9), height=7.2)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.35, 1)).flat
    panels = top.subplots(2, len(results), squeeze=False, sharex="col", height_ratios=(3, 1))
    for (curves, difference), result in zip(panels.T, results, strict=True):
        _curves(curves, result)
        _difference(difference, result)
    panels[0, 0].set_ylabel("training loss")
    panels[1, 0].set_ylabel("|difference|")
    times, memory = bottom.subplots(1, 2)
    bars(times, results, lambda run: run.loss_milliseconds, readable_milliseconds)
    times.set_title("Time of forward + backward, per step", fontsize=10.5)
    times.set_ylabel("ms, log scale")
    bars(memory, results, lambda run: run.loss_bytes / 2**20, lambda mebibytes: readable_bytes(mebibytes * 2**20))
    memory.set_title("Peak memory of the same, beyond its inputs", fontsize=10.5)
    memory.set_ylabel("MiB, log scale")
    figure.savefig(path)


def new_figure(title: str, width: float, height: float) -> Figure:
    """Bound to no window system, so a machine without a display draws it as well."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    return figure


def _curves(axes: Axes, result: Result) -> None:
    for name, run in result.runs.items():
        label = f"{name}: {run.score:.1%} {result.task.score_name}"
        axes.plot(run.curve, color=COLOURS[name], label=label, **LINES[name])
    axes.set_title(result.task.summary, fontsize=10.5)
    axes.legend(frameon=False, fontsize=9, title="held out", title_fontsize=9)
    tidy(axes)


def _difference(axes: Axes, result: Result) -> None:
    axes.plot(result.differences, color=GREY, linewidth=0.9)
    axes.set_ylim(0, 1.5 * max(max(result.differences), 1e-9))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.text(
        0.98, 0.93, f"at most {max(result.differences):.1e}", transform=axes.transAxes, ha="right", va="top", fontsize=9
    )
    axes.set_xlabel("step")
    tidy(axes)


def bars(axes: Axes, results: list[Result], height: Callable[[Run], float], readable: Callable[[float], str]) -> None:
    """Of each result its own runs, side by side and centred: not every task has every run."""
    names = [name for name in COLOURS if any(name in result.runs for result in results)]
    width = 0.86 / len(names)
    for name in names:
        positions, heights = [], []
        for index, result in enumerate(results):
            if name in result.runs:
                place = list(result.runs).index(name)
                positions.append(index + (place - (len(result.runs) - 1) / 2) * width)
                heights.append(height(result.runs[name]))
        drawn = axes.bar(positions, heights, width * 0.94, color=COLOURS[name], label=name)
        axes.bar_label(drawn, fmt=readable, fontsize=8, padding=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 3, high * 4)
    axes.set_xlim(-0.5, len(results) - 0.5)
    axes.set_xticks(range(len(results)), [f"{result.task.name}\n{result.task.measured}" for result in results])
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    tidy(axes)


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
