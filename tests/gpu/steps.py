"""One step of ``make gpu``: a command with a time limit, run beside others, its output logged and judged."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LOGGED_BYTES = 1 << 20  # of a step's output: its end
OK, FAILED, SKIPPED, MISSING, TIMED_OUT, NOT_RUN = "ok", "FAILED", "skipped", "MISSING", "TIMED OUT", "NOT RUN"
GOOD = (OK, SKIPPED, MISSING)

Verdict = tuple[str, str]
"""A result and the words beside it."""


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def judge_command(code: int, output: str) -> Verdict | None:
    return (OK if code == 0 else FAILED), last_line(output)


def judge_pytest(code: int, output: str) -> Verdict | None:
    """None where the file has no CUDA tests. A run in which nothing passed proves nothing."""
    words = last_line(output).strip("= ")
    if code == 5:
        return None
    if code != 0:
        return FAILED, words or f"pytest ended with {code}"
    if not re.search(r"\d+ passed", words):
        reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.+)$", output, re.MULTILINE)
        return SKIPPED, f"{words}: {'; '.join(dict.fromkeys(reasons))}"
    return OK, words


def judge_sanitizer(code: int, output: str) -> Verdict | None:
    """Good only if the tool says so itself: one that could not attach reports nothing."""
    summaries = re.findall(r"^=+ .*SUMMARY: (.+)$", output, re.MULTILINE)
    clean = bool(summaries) and all(re.match(r"0 (errors|hazards)", summary) for summary in summaries)
    words = summaries[-1] if summaries else last_line(output)
    return (OK if code == 0 and clean else FAILED), words


def judge_benchmark(code: int, output: str) -> Verdict | None:
    """Goals that were missed are a result; what was not measured is named."""
    goals = re.findall(r"^\d+ of \d+ measured goals met.*$", output, re.MULTILINE)
    left_out = re.findall(r"^not measured within .*$", output, re.MULTILINE)
    words = "; ".join([*goals[-1:], *left_out[-1:]]) or last_line(output)
    return (OK if code == 0 else FAILED), words


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    seconds: float  # at most
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], Verdict | None] = judge_command
    missing: str = ""  # what the machine lacks for it


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    seconds: float
    words: str

    @property
    def good(self) -> bool:
        return self.result in GOOD


class Runner:
    """Runs steps until a common deadline, each in a process group of its own, and remembers what became of them."""

    def __init__(self, deadline: float, log: Path) -> None:
        self.deadline, self.log = deadline, log
        self.start = time.monotonic()
        self.outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        log.write_text("")

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    def run(self, step: Step) -> None:
        began = time.monotonic()
        output = ""
        if step.missing:
            verdict: Verdict | None = (MISSING, step.missing)
        elif self.left() < 1:
            verdict = (NOT_RUN, "no time left")
        else:
            code, output = self._output(step, min(step.seconds, self.left()))
            seconds = time.monotonic() - began
            verdict = (TIMED_OUT, f"after {seconds:.0f} s") if code is None else step.judge(code, output)
        if verdict is None:
            return
        self._finish(Outcome(step.name, verdict[0], time.monotonic() - began, verdict[1]), step, output)

    def _output(self, step: Step, seconds: float) -> tuple[int | None, str]:
        """Exit status, None if time ran out, and the end of the output."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
        with tempfile.TemporaryFile() as file:
            try:
                process = subprocess.Popen(
                    list(step.command),
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that what it started can be ended with it
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

    def _finish(self, outcome: Outcome, step: Step, output: str) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            with self.log.open("a") as log:
                log.write(f"{'=' * 100}\n{outcome.name}: {outcome.result}, {outcome.seconds:.1f} s, {outcome.words}\n")
                log.write(f"{' '.join(step.command)}\n\n{output.rstrip()}\n\n")
            passed = time.monotonic() - self.start
            print(f"[{passed:4.0f} s] {outcome.result:<9} {outcome.name}: {outcome.words[:120]}", flush=True)
            if not outcome.good:
                for line in output.rstrip().splitlines()[-25:]:
                    print(f"         | {line[:200]}", flush=True)

    def stop(self) -> None:
        """Ends what is still running."""
        with self._lock:
            running = list(self._running)
        for process in running:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all it started; compile workers and grandchildren outlive it otherwise."""
    with suppress(ProcessLookupError, PermissionError):  # the group is gone, as it should be
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
