"""The steps of ``make gpu``: commands with time limits, run in groups, their output logged and judged."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ROOT = Path(__file__).resolve().parent.parent.parent
LOGGED_BYTES = 3 << 16  # of a step's output: its end
SHORTEST = 1.0  # seconds; with less time left than that no step begins
OK, FAILED, SKIPPED, MISSING, TIMED_OUT, NOT_RUN = "ok", "FAILED", "skipped", "MISSING", "TIMED OUT", "NOT RUN"
GOOD = (OK, SKIPPED, MISSING)


class Verdict(NamedTuple):
    result: str
    words: str
    details: tuple[tuple[str, str], ...] = ()  # what was found, as more lines of the table: (of what, words)


Judge = Callable[[int, str], Verdict | None]
"""What an exit status and the end of the output say; None where there was nothing to do."""


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def judge_command(code: int, output: str) -> Verdict | None:
    return Verdict(OK if code == 0 else FAILED, last_line(output))


def judge_pytest(code: int, output: str) -> Verdict | None:
    """None where the file has no CUDA tests. A run in which nothing passed proves nothing."""
    words = last_line(output).strip("= ")
    if code == 5:
        return None
    if code != 0:
        return Verdict(FAILED, words or f"pytest ended with {code}")
    if not re.search(r"\d+ passed", words):
        reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.+)$", output, re.MULTILINE)
        return Verdict(SKIPPED, f"{words}: {'; '.join(dict.fromkeys(reasons))}")
    return Verdict(OK, words)


def judge_sanitizer(code: int, output: str) -> Verdict | None:
    """Good only if the tool says so itself: one that could not attach reports nothing."""
    summaries = re.findall(r"^=+ .*SUMMARY: (.+)$", output, re.MULTILINE)
    clean = bool(summaries) and all(re.match(r"0 (errors|hazards)", summary) for summary in summaries)
    words = summaries[-1] if summaries else last_line(output)
    return Verdict(OK if code == 0 and clean else FAILED, words)


def judge_benchmark(code: int, output: str) -> Verdict | None:
    """Goals that were missed are a result; what was not measured is named."""
    goals = re.findall(r"^\d+ of \d+ measured goals met.*$", output, re.MULTILINE)
    left_out = re.findall(r"^not measured within .*$", output, re.MULTILINE)
    words = "; ".join([*goals[-1:], *left_out[-1:]]) or last_line(output)
    return Verdict(OK if code == 0 else FAILED, words)


def judge_trial(code: int, output: str) -> Verdict | None:
    """A peer that raises is no crash: the measurement beside others can bear it."""
    complaints = re.findall(r"^.*: (failed: .*|not installed.*)$", output, re.MULTILINE)
    words = complaints[0] if complaints else "ran" if code == 0 else last_line(output)
    return Verdict(OK if code == 0 else FAILED, words)


def judge_variants(code: int, output: str) -> Verdict | None:
    """One line a problem, a blank before its ratios."""
    details = tuple(re.findall(r"^(\S.*): ((?:forward|backward).*)$", output, re.MULTILINE))
    return Verdict(OK if code == 0 else FAILED, last_line(output), details)


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str] | Callable[[float], Sequence[str]]  # a function: of the seconds that the step gets
    seconds: float  # at most
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Judge = judge_command
    missing: str = ""  # what the machine lacks for it


@dataclass(frozen=True)
class Group:
    """Steps that run side by side, in this order, as many at once as there are workers."""

    name: str
    steps: Sequence[Step]
    seconds: float  # for all of them together
    workers: int = 1


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    seconds: float
    words: str
    details: tuple[tuple[str, str], ...] = ()

    @property
    def good(self) -> bool:
        return self.result in GOOD


class Machine(Protocol):
    """Runs commands: :class:`Processes`, or what a test puts in its place."""

    def run(self, step: Step, command: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Exit status, None if time ran out, and the end of the output."""

    def stop(self) -> None:
        """Ends what is still running."""


class Processes:
    """Each command in a process group of its own, so that what it started can be ended with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, step: Step, command: Sequence[str], seconds: float) -> tuple[int | None, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
        with tempfile.TemporaryFile() as file:
            try:
                process = subprocess.Popen(
                    list(command),
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return 127, str(error)
            with self._lock:
                self._running.add(process)
            code: int | None
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
                with self._lock:
                    self._running.discard(process)
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOGGED_BYTES))
            return code, file.read().decode(errors="replace")

    def stop(self) -> None:
        with self._lock:
            running = list(self._running)
        for process in running:
            end(process)


class Runner:
    """Runs groups of steps until a common deadline and remembers what became of each step.

    Machine, clock and pool are others in a test, where durations are pretended.
    """

    def __init__(
        self,
        deadline: float,
        log: Path,
        finished: Callable[[], None] = lambda: None,  # after every step
        machine: Machine | None = None,
        clock: Callable[[], float] = time.monotonic,
        pool: Callable[[int], Any] = ThreadPoolExecutor,
    ) -> None:
        self.deadline, self.log, self.finished = deadline, log, finished
        self.machine, self.clock, self.pool = machine or Processes(), clock, pool
        self.start = clock()
        self.outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        log.write_text("")

    def run_group(self, group: Group) -> None:
        until = min(self.deadline, self.clock() + group.seconds)
        with self.pool(group.workers) as pool:
            futures = [pool.submit(self.run, step, until) for step in group.steps]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                self.machine.stop()
                raise

    def run(self, step: Step, until: float) -> None:
        began = self.clock()
        seconds = min(step.seconds, until - began)
        command: Sequence[str] = ()
        output = ""
        if step.missing:
            verdict: Verdict | None = Verdict(MISSING, step.missing)
        elif seconds < SHORTEST:
            verdict = Verdict(NOT_RUN, "no time left")
        else:
            command = step.command(seconds) if callable(step.command) else step.command
            code, output = self.machine.run(step, command, seconds)
            late = Verdict(TIMED_OUT, f"after {self.clock() - began:.0f} s")
            verdict = late if code is None else _judged(step, code, output)
        if verdict is not None:
            outcome = Outcome(step.name, verdict.result, self.clock() - began, verdict.words, verdict.details)
            self._finish(outcome, command, output)

    def _finish(self, outcome: Outcome, command: Sequence[str], output: str) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            with self.log.open("a") as log:
                log.write(f"{'=' * 100}\n{outcome.name}: {outcome.result}, {outcome.seconds:.1f} s, {outcome.words}\n")
                log.write(f"{' '.join(command)}\n\n{output.rstrip()}\n\n")
            passed = self.clock() - self.start
            print(f"[{passed:4.0f} s] {outcome.result:<9} {outcome.name}: {outcome.words[:120]}", flush=True)
            if not outcome.good:
                for line in output.rstrip().splitlines()[-25:]:
                    print(f"         | {line[:200]}", flush=True)
            self.finished()


def _judged(step: Step, code: int, output: str) -> Verdict | None:
    """The judge's verdict. One that stumbles over the output must not end all later steps."""
    try:
        return step.judge(code, output)
    except Exception as error:
        return Verdict(FAILED, f"its output is not understood: {error!r}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all it started; compile workers and grandchildren outlive it otherwise."""
    with suppress(ProcessLookupError, PermissionError):  # the group is gone, as it should be
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
