"""``python -m benchmarks.variants baseline=FOLDER tuned=FOLDER``: builds of torchce beside each other, ratio by ratio.

Each folder holds a package torchce with its libraries. torch registers an op once a process, so each build has a worker
process of its own, kept for the whole run. They take turns on every problem, A B A B, and while one measures the
others wait: a busy moment or a warmer card hits all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TURNS = 2
COMMIT = "commit.txt"  # beside the package, if it is known; `make variant` writes it
ANSWER = "torchce.variants "  # before a worker's answers: libraries print too


def _work(device: str) -> None:
    """Measures one problem for each line of standard input, (its number in the grid, dtype, seconds a pass)."""
    import torch

    import torchce
    from benchmarks.contenders import CONTENDERS, OURS
    from benchmarks.measure import PHASES, Budget, measure
    from benchmarks.problems import GRIDS

    assert torchce.__file__ is not None
    print(ANSWER + json.dumps(str(Path(torchce.__file__).parent.parent)), flush=True)
    ours = [contender for contender in CONTENDERS if contender.name in OURS]
    for line in sys.stdin:
        number, dtype, seconds = json.loads(line)
        rows = list(measure(GRIDS[device][number], dtype, device, ours, Budget(seconds, 3), PHASES[device]))
        if device == "cuda":
            torch.cuda.empty_cache()  # it is the other worker's turn
        print(ANSWER + json.dumps([asdict(row) for row in rows]), flush=True)


class _Worker:
    def __init__(self, name: str, folder: Path, device: str) -> None:
        self.name = name
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.variants", "--work", "--device", device],
            cwd=folder,  # the first place where Python looks for torchce
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
            print(line, end="", file=sys.stderr)
        raise SystemExit(f"{self.name} ended with {self.process.wait()}")

    def ask(self, *question: Any) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}") from None
        return self.answer()


def fastest(turns: Sequence[Sequence[dict[str, Any]]]) -> dict[tuple[str, str], float]:
    """Seconds by (pass, contender): the least median of all turns."""
    found: dict[tuple[str, str], float] = {}
    for row in (row for rows in turns for row in rows):
        if row["median"] is not None:
            key = (row["phase"], row["contender"])
            found[key] = min(row["median"], found.get(key, row["median"]))
    return found


def compared(first: dict[tuple[str, str], float], other: dict[tuple[str, str], float]) -> str:
    """Such as ``forward 1.20x (0.60 -> 0.50 ms, 96 % of copy)``, for every pass that both have."""
    from benchmarks.contenders import COPY, OURS
    from benchmarks.report import seconds

    parts = []
    for (phase, contender), before in first.items():
        after = other.get((phase, contender))
        if contender in OURS and after is not None:
            copy = min(times.get((phase, COPY), before) for times in (first, other))
            share = "" if OURS[contender] == "forward_backward" else f", {copy / after:.0%} of copy"
            parts.append(
                f"{OURS[contender] or phase} {before / after:.2f}x ({seconds(before)} -> {seconds(after)}{share})"
            )
    return ", ".join(parts)


def compare(
    workers: Sequence[_Worker], device: str, sizes: list[str], seconds: float, deadline: float
) -> Iterator[str]:
    """A line a problem and variant, each against the first variant; stops between problems at the deadline."""
    from benchmarks.problems import GRIDS

    left_out = []
    for number, problem in enumerate(GRIDS[device]):
        if not problem.key or not problem.matches(["ce", "bce"], sizes):
            continue
        for dtype in problem.dtypes:
            if time.monotonic() > deadline:
                left_out.append(f"{problem.name} {dtype}")
                continue
            turns: list[list[Any]] = [[] for _ in workers]
            for _ in range(TURNS):
                for worker, rows in zip(workers, turns, strict=True):
                    rows.append(worker.ask(number, dtype, seconds))
            first, *others = map(fastest, turns)
            for worker, other in zip(workers[1:], others, strict=True):
                yield f"{worker.name} / {workers[0].name}, {problem.name} {dtype}: {compared(first, other)}"
    if left_out:
        yield f"not measured in time: {', '.join(left_out)}"


def describe(variant: tuple[str, str, str]) -> str:
    """Its name, and its commit if known."""
    name, _, folder = variant
    file = Path(folder) / COMMIT
    return f"{name} at {file.read_text().strip()}" if file.exists() else name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--size", action="append", default=[], metavar="PATTERN", help="of the key problems")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each pass and turn")
    parser.add_argument("--time-limit", type=float, default=75, metavar="SECONDS", help="begin no problem after that")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        _work(options.device)
        return 0
    deadline = time.monotonic() + options.time_limit
    named = [variant.partition("=") for variant in options.variants]
    if len(named) < 2 or not all(folder for _, _, folder in named):
        parser.error("two variants or more, each as NAME=FOLDER")
    workers = [_Worker(name, Path(folder).resolve(), options.device) for name, _, folder in named]
    try:
        for worker, (_, _, folder) in zip(workers, named, strict=True):
            if (found := worker.answer()) != str(Path(folder).resolve()):
                raise SystemExit(f"{worker.name}: expected torchce in {folder}, it came from {found}")
        for line in compare(workers, options.device, options.size, options.seconds, deadline):
            print(line, flush=True)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    described = " and ".join(map(describe, named))
    print(f"{described} measured in turn, {TURNS} turns a problem")
    return 0


if __name__ == "__main__":
    sys.exit(main())
