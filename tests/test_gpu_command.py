"""The runner behind ``make gpu``, on a machine without a GPU: time limits, verdicts, the table, the exit status."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu import __main__ as command
from gpu import steps
from gpu.steps import Outcome, Runner, Step

MACHINE = {"gpu": "NVIDIA Test 9000", "capability": "9.0", "torch": "2.14"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(tmp_path: Path, step: Step, limit: float = 60) -> Outcome:
    runner = Runner(time.monotonic() + limit, tmp_path / "gpu.log")
    runner.run(step)
    return runner.outcomes[0]


def test_a_step_that_holds(tmp_path: Path) -> None:
    outcome = run(tmp_path, Step("greeting", python("print('first'); print('last')"), 60))
    assert (outcome.result, outcome.words) == ("ok", "last")
    assert "first\nlast" in (tmp_path / "gpu.log").read_text()


def test_a_step_that_fails_shows_the_end_of_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(tmp_path, Step("broken", python("print('why'); raise SystemExit(3)"), 60))
    assert outcome.result == "FAILED"
    assert "| why" in capsys.readouterr().out


def test_a_step_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    marker = tmp_path / "survived"
    child = f"import pathlib, time; time.sleep(3); pathlib.Path({str(marker)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    outcome = run(tmp_path, Step("hanging", python(code), 1))
    assert outcome.result == "TIMED OUT"
    assert outcome.seconds < 30
    time.sleep(3)
    assert not marker.exists()


def test_no_step_outlasts_the_whole(tmp_path: Path) -> None:
    outcome = run(tmp_path, Step("long", python("import time; time.sleep(60)"), 60), limit=2)
    assert outcome.result == "TIMED OUT"
    assert run(tmp_path, Step("late", python("pass"), 60), limit=0).result == "NOT RUN"


def test_what_cannot_be_started_fails(tmp_path: Path) -> None:
    assert run(tmp_path, Step("nothing", ["/no/such/program"], 60)).result == "FAILED"


@pytest.mark.parametrize(
    ("judge", "code", "output", "expected"),
    [
        (steps.judge_pytest, 0, "..\n12 passed, 3 deselected in 1.5s", ("ok", "12 passed, 3 deselected in 1.5s")),
        (steps.judge_pytest, 1, "1 failed, 12 passed in 1.5s", ("FAILED", "1 failed, 12 passed in 1.5s")),
        (steps.judge_pytest, 5, "7 deselected in 0.1s", None),
        (
            steps.judge_pytest,
            0,
            "SKIPPED [3] tests/conftest.py:20: no CUDA device\n3 skipped in 1s",
            ("skipped", "3 skipped in 1s: no CUDA device"),
        ),
        (steps.judge_sanitizer, 0, "========= ERROR SUMMARY: 0 errors", ("ok", "0 errors")),
        (
            steps.judge_sanitizer,
            0,
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            ("ok", "0 hazards displayed (0 errors, 0 warnings)"),
        ),
        (steps.judge_sanitizer, 86, "========= ERROR SUMMARY: 3 errors", ("FAILED", "3 errors")),
        (steps.judge_sanitizer, 1, "1 wrong\n========= ERROR SUMMARY: 0 errors", ("FAILED", "0 errors")),
        (steps.judge_sanitizer, 0, "24 problems, as on the CPU", ("FAILED", "24 problems, as on the CPU")),
        (
            steps.judge_benchmark,
            0,
            "not measured within 9 s: CE 1x2\n3 of 4 measured goals met, 8 s\na.png",
            ("ok", "3 of 4 measured goals met, 8 s; not measured within 9 s: CE 1x2"),
        ),
    ],
)
def test_verdicts(judge: Callable[[int, str], Any], code: int, output: str, expected: Any) -> None:
    assert judge(code, output) == expected


def test_sanitizers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "find_sanitizer", lambda: None)
    for step in command.sanitizers():
        outcome = run(tmp_path, step)
        assert outcome.result == "MISSING"
        assert outcome.words.startswith("compute-sanitizer is not on the PATH")


def test_sanitizer_is_found_in_the_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert command.find_sanitizer() == str(tool)


def test_every_file_of_tests_is_a_step() -> None:
    names = {step.name for step in command.tests(4)}
    assert {"test_softmax_ce.py", "test_cuda_graphs.py", "test_cuda_device.py", "test_cuda_regimes.py"} <= names
    assert "test_cuda_large.py" not in names
    (large,) = command.large()
    assert "tests/test_cuda_large.py" in large.command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Step]]:
    """make gpu with other steps."""
    chosen: dict[str, list[Step]] = {"build": [], "tests": [], "sanitizers": [], "large": [], "benchmark": []}
    monkeypatch.setattr(command, "look", lambda: MACHINE)
    for name in chosen:
        monkeypatch.setattr(command, name, lambda *_, name=name: chosen[name])
    return chosen


def test_goes_on_after_a_failure_and_says_so_last(
    small: dict[str, list[Step]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small["build"] = [Step("build", python("raise SystemExit('no compiler')"), 60)]
    small["sanitizers"] = [Step("sanitizer: memcheck", [], 60, missing="not here")]
    small["tests"] = [Step(f"test_{number}.py", python("print('5 passed in 1s')"), 60) for number in range(3)]
    small["benchmark"] = [Step("benchmark", python("print('done')"), 60)]
    assert command.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    *_, last = shown.strip().splitlines()
    assert last == "4 of 6 steps held; failed: build; not checked: sanitizer: memcheck (missing)"
    assert "no compiler" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["machine"] == MACHINE
    assert {step["name"]: step["result"] for step in written["steps"]}["build"] == "FAILED"


def test_chosen_steps(small: dict[str, list[Step]], tmp_path: Path) -> None:
    small["tests"] = [Step("test_a.py", python("pass"), 60), Step("test_b.py", python("raise SystemExit(1)"), 60)]
    assert command.main(["--out", str(tmp_path), "--only", "*_a.py"]) == 0
    assert command.main(["--out", str(tmp_path), "--only", "nothing of that name"]) == 1


@pytest.mark.parametrize("out", [None, "elsewhere"])
def test_where_results_go(monkeypatch: pytest.MonkeyPatch, out: str | None) -> None:
    monkeypatch.delenv("OUT", raising=False)
    if out is not None:
        monkeypatch.setenv("OUT", out)
    expected = Path("elsewhere") if out else steps.ROOT / "benchmarks" / "results" / "nvidia-h200"
    assert command.results_folder("NVIDIA H200") == expected


def test_table_in_markdown() -> None:
    outcomes = [Outcome("build", "ok", 12.34, "built a|b")]
    assert command.table(outcomes, markdown=True).splitlines()[-1] == "| build | ok | 12.3 | built a/b |"
    assert command.table(outcomes).splitlines()[-1] == "build  ok         12.3  built a|b"
