"""``python -m benchmarks``: measures a grid, prints a table, keeps the ledger, draws the plots.

Examples::

    python -m benchmarks --quick                                  a few sizes, under 2 minutes
    python -m benchmarks --op bce --dtype bfloat16                a part; the ledger keeps the rest
    python -m benchmarks --size '512x*' --size '*soft'
    python -m benchmarks --device cuda
    python -m benchmarks --compare OLD.json                       what changed since
    python -m benchmarks --from-ledger --statistic minimum        draw again, measure nothing
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import ledger, plots, readme, report
from benchmarks.cases import with_minima
from benchmarks.contenders import COMPILE, CONTENDERS
from benchmarks.measure import PHASES, QUICK, THOROUGH, measure
from benchmarks.problems import DTYPES, GRIDS


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(GRIDS), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer problems and samples; kept apart from the ledger")
    parser.add_argument("--key", action="store_true", help="only the problems that README's table shows")
    parser.add_argument("--op", action="append", default=[], metavar="OP", help="ce, kl, ... or the function's name")
    parser.add_argument("--dtype", action="append", default=[], choices=list(DTYPES))
    parser.add_argument("--size", action="append", default=[], metavar="PATTERN", help="such as 512x32000, '4096x*'")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "--contender", action="append", default=[], metavar="PATTERN", help="such as QuACK, 'torchce*' (default: all)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, help="for each pass of a problem, shared by all contenders")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="begin no problem after that; those of --quick go first, those left out are named",
    )
    parser.add_argument("--statistic", choices=["median", "minimum"], default="median", help="of the printed table")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="show what changed since that ledger")
    parser.add_argument("--from-ledger", action="store_true", help="report what is there, measure nothing")
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's speed section afterwards")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results/<device name>)")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace, environment: dict, path: Path, console: Console) -> list[ledger.Row]:
    """Measures what the options let through; the ledger is saved after every problem."""
    device = options.device
    grid = [
        (problem, dtype)
        for problem in GRIDS[device]
        if problem.matches(options.op, options.size)
        and (problem.quick or not options.quick)
        and (problem.key or not options.key)
        for dtype in options.dtype or DTYPES
        if dtype in problem.dtypes
    ]
    if not grid:
        raise SystemExit("no problem passes these filters")
    deadline = math.inf
    if options.time_limit is not None:
        deadline = time.perf_counter() + options.time_limit
        grid.sort(key=lambda pair: not pair[0].quick)
    budget = QUICK if options.quick else THOROUGH
    if options.seconds is not None:
        budget = replace(budget, seconds=options.seconds)
    present = [c for c in CONTENDERS if device in c.devices and not (options.no_compile and c.name == COMPILE)]
    if options.contender:
        present = [c for c in present if any(fnmatch(c.name, pattern) for pattern in options.contender)]
    if not present:
        raise SystemExit("no contender of that name for this device")
    for contender in present:
        if reason := contender.missing():
            console.print(f"[yellow]{contender.name}: {reason}[/]")
    present = [contender for contender in present if contender.missing() is None]

    old = ledger.load(path) if path.exists() else []
    new: list[ledger.Row] = []
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(grid))
        for number, (problem, dtype) in enumerate(grid):
            if number > 0 and time.perf_counter() > deadline:
                left = ", ".join(f"{problem.name} {dtype}" for problem, dtype in grid[number:])
                progress.console.print(f"[yellow]not measured within {options.time_limit:.0f} s: {left}[/]")
                break
            progress.update(task, description=f"{problem.name} {dtype}: {problem.reason}")
            rows = list(measure(problem, dtype, device, present, budget, PHASES[device]))
            rows = [replace(row, environment=environment) for row in rows]
            new += rows
            ledger.save(path, ledger.merge(old, new))
            progress.advance(task)
            progress.console.print(f"[dim]{report.short(rows)}[/]", highlight=False)
            if device == "cuda":
                torch.cuda.empty_cache()  # the next problem's peers allocate other sizes
    return new


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible to torch", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 190)
    previous = ledger.load(options.compare) if options.compare else None
    environment = ledger.environment(options.device, options.quick)
    folder = options.out or ledger.folder(environment)
    path = folder / ledger.FILE

    if options.from_ledger and not path.exists():
        raise SystemExit(f"nothing measured yet: {path} is not there")
    start = time.perf_counter()
    rows = ledger.load(path) if options.from_ledger else []
    for each in report.environments(rows) or [environment]:
        console.print(report.describe(each), highlight=False)
        if warning := report.busy(each):
            console.print(f"[yellow]{warning}[/]")
    if not rows:
        rows = _run(options, environment, path, console)
    everything = ledger.load(path)
    pictures = plots.draw(everything, folder, report.describe(everything[-1].environment))
    (folder / "results.md").write_text(report.markdown(everything, pictures))

    if options.statistic == "minimum":
        rows, previous = with_minima(rows), previous and with_minima(previous)
    legend = report.LEGEND.translate({ord("*"): None, ord("`"): None})
    if options.statistic == "minimum":
        legend = legend.replace("medians", "minima")
    console.print(report.results(rows).rich(legend))
    for line in report.notes(rows):
        console.print(f"[yellow]{line}[/]", highlight=False)
    for line in report.missed_goals(rows):
        console.print(f"missed: {line}", highlight=False)
    console.print(f"[bold]{report.goal_count(rows)}[/], {time.perf_counter() - start:.0f} s", highlight=False)
    if previous is not None:
        changes = report.comparison(previous, rows)
        console.print(
            f"[bold]Changes since {options.compare}[/]" if changes.lines else "nothing changed beyond the spread"
        )
        if changes.lines:
            console.print(changes.rich())
    console.print("\n".join(str(folder / name) for name in (ledger.FILE, "results.md", *pictures)), highlight=False)
    return readme.main() if options.readme else 0


if __name__ == "__main__":
    sys.exit(main())
