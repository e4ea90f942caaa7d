"""``make gpu``: everything that needs a GPU, the most valuable first, within a time limit; one table comes last.

Needs torch, ninja, pybind11, pytest and what the benchmark draws with, and no network; what `make gpu-carry` collected
in .gpu is used. Results go to $OUT, or to benchmarks/results/<device name>, and are renewed after every step: the logs
in gpu.log, the table in gpu.md and gpu.json, and the benchmark's own files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gpu import plan, table
from gpu.plan import PYTHON, Setting
from gpu.steps import ROOT, Group, Runner

LIMIT = 570.0
ENDING = 10.0  # seconds of it for the table
LOOK = """
import json, sys, torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device is visible to torch")
properties = torch.cuda.get_device_properties(0)
print(json.dumps({
    "gpu": properties.name, "gpus": torch.cuda.device_count(),
    "capability": f"{properties.major}.{properties.minor}",
    "multiprocessors": properties.multi_processor_count, "memory GiB": round(properties.total_memory / 2**30),
    "torch": torch.__version__, "CUDA": torch.version.cuda, "python": sys.version.split()[0],
}))
"""
NO_GPU = {"gpu": "no GPU, a rehearsal", "capability": "9.0", "python": sys.version.split()[0]}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="for everything (default: 570)")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="steps of these names")
    parser.add_argument("--variants", default="", metavar="NAMES", help="of `make variant`: measure them side by side")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: every command, briefly, on the CPU")
    parser.add_argument("--out", type=Path, help="folder for the results")
    return parser.parse_args(argv)


def look() -> dict[str, Any]:
    """The visible GPU, asked in a process of its own: this one takes no memory of it."""
    try:
        result = subprocess.run([PYTHON, "-c", LOOK], capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        raise SystemExit("make gpu: torch did not find a GPU within 60 s") from None
    if result.returncode != 0:
        raise SystemExit(f"make gpu: {(result.stderr.strip().splitlines() or ['python failed'])[-1]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def results_folder(gpu: str) -> Path:
    """As ``python -m benchmarks`` names it."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results" / name


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def groups(setting: Setting, runner: Runner) -> Iterator[Group]:
    """In order; a later one may depend on what became of the earlier ones."""
    yield from plan.prepare(setting)
    yield plan.own_benchmark(setting)
    yield from plan.variants(setting)
    yield plan.profile(setting)
    yield plan.checks(setting)
    yield plan.peers(setting, runner.outcomes)
    yield plan.large(setting)


def chosen(group: Group, patterns: list[str]) -> Group:
    steps = [step for step in group.steps if not patterns or any(fnmatch(step.name, each) for each in patterns)]
    return replace(group, steps=steps)


def main(
    argv: list[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **pretended: Any,  # for the runner
) -> int:
    options = arguments(argv)
    deadline = clock() + options.limit - ENDING
    machine = NO_GPU if options.rehearse else look()
    home = ROOT / "build" / "gpu" / "rehearsal" if options.rehearse else results_folder(machine["gpu"])
    folder = (options.out or home).resolve()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        runner = Runner(deadline, folder / "gpu.log", clock=clock, **pretended)
    except OSError as error:
        raise SystemExit(f"make gpu: no results can be written: {error}") from None
    runner.finished = lambda: table.write(folder, machine, runner.outcomes, table.lines(runner.outcomes))
    with tempfile.TemporaryDirectory() as scratch:
        device = "cpu" if options.rehearse else "cuda"
        variants = tuple(options.variants.split())
        setting = Setting(device, machine["capability"], cores(), folder, Path(scratch), variants)
        interrupted = False
        try:
            for group in groups(setting, runner):
                runner.run_group(chosen(group, options.only))
        except KeyboardInterrupt:
            interrupted = True
    rows = table.lines(runner.outcomes, table.figures(folder))
    table.write(folder, machine, runner.outcomes, rows)
    print(f"\nlogs and results: {folder}\n{'interrupted; ' * interrupted}{table.conclusion(runner.outcomes)}\n")
    print(table.plain(rows), flush=True)
    return 0 if runner.outcomes and not interrupted and all(each.good for each in runner.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
