"""``make gpu`` on a machine without a GPU: time limits, verdicts, and dry runs with pretended durations."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu import __main__ as command
from gpu import carry, plan, steps, table
from gpu.plan import Setting
from gpu.steps import Group, Outcome, Runner, Step

MACHINE = {"gpu": "NVIDIA Test 9000", "capability": "9.0", "torch": "2.14"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(tmp_path: Path, step: Step, limit: float = 60) -> Outcome:
    runner = Runner(time.monotonic() + limit, tmp_path / "gpu.log")
    runner.run_group(Group("alone", [step], limit))
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


def test_a_judge_that_stumbles_fails_its_step_alone(tmp_path: Path) -> None:
    def stumble(code: int, output: str) -> None:
        raise ValueError(output.strip())

    outcome = run(tmp_path, Step("odd", python("print('odd')"), 60, judge=stumble))
    assert (outcome.result, outcome.words) == ("FAILED", "its output is not understood: ValueError('odd')")


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
        (steps.judge_trial, 0, "QuACK: failed: X: y (CE 1x2)\n0 of 0 measured goals", ("ok", "failed: X: y (CE 1x2)")),
        (steps.judge_trial, 0, "0 of 0 measured goals met", ("ok", "ran")),
        (steps.judge_trial, -11, "Segmentation fault", ("FAILED", "Segmentation fault")),
        (steps.judge_variants, 0, "b / a, CE 1x2: forward 1.2x\nmeasured", ("ok", "measured")),
    ],
)
def test_verdicts(judge: Callable[[int, str], Any], code: int, output: str, expected: Any) -> None:
    verdict = judge(code, output)
    assert (verdict and verdict[:2]) == expected


def test_a_group_shares_its_seconds(tmp_path: Path) -> None:
    runner = Runner(time.monotonic() + 60, tmp_path / "gpu.log")
    slow = [Step(str(number), python("import time; time.sleep(60)"), 60) for number in range(2)]
    runner.run_group(Group("both", slow, 1.5))
    assert [outcome.result for outcome in runner.outcomes] == ["TIMED OUT", "NOT RUN"]


def setting(tmp_path: Path, **changes: Any) -> Setting:
    values = {"device": "cuda", "capability": "9.0", "cores": 16, "results": tmp_path, "scratch": tmp_path / "scratch"}
    return Setting(**{**values, **changes})


def test_tools_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan, "find_tool", lambda *_: None)
    for step in [*plan.sanitizers(setting(tmp_path)), *plan.profile(setting(tmp_path)).steps]:
        outcome = run(tmp_path, step)
        assert outcome.result == "MISSING"
        assert "is not on the PATH" in outcome.words


def test_a_tool_is_found_in_the_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert plan.find_tool("compute-sanitizer") == str(tool)


def test_every_file_of_tests_is_a_step(tmp_path: Path) -> None:
    names = {step.name for step in plan.tests(setting(tmp_path))}
    assert {"test_softmax_ce.py", "test_cuda_graphs.py", "test_cuda_device.py", "test_cuda_regimes.py"} <= names
    assert "test_cuda_large.py" not in names
    (large,) = plan.large(setting(tmp_path)).steps
    assert "tests/test_cuda_large.py" in large.command


# --- dry runs: a machine, a clock and a pool of workers that only pretend ---------------------------------------------


class Pretended:
    """Time passes only while a step runs, each of the given duration; workers take steps in turn, as a real pool's."""

    def __init__(self, duration: Callable[[Step], float], crashing: Sequence[str] = ()) -> None:
        self.duration, self.crashing = duration, crashing
        self.now = 0.0
        self.began: dict[str, float] = {}
        self.commands: dict[str, list[str]] = {}
        self.watch: Callable[[], None] = lambda: None
        self.ends: list[float] = []

    def run(self, step: Step, command: Sequence[str], seconds: float) -> tuple[int | None, str]:
        self.watch()
        self.began[step.name], self.commands[step.name] = self.now, list(command)
        wanted = self.duration(step)
        self.now += min(wanted, seconds)
        if wanted > seconds:
            return None, ""
        return (-11 if step.name in self.crashing else 0), "========= ERROR SUMMARY: 0 errors\n5 passed in 1s"

    def stop(self) -> None:
        raise AssertionError("nothing interrupts a dry run")

    def pool(self, workers: int) -> Pretended:
        self.ends = [self.now] * workers
        return self

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *_: object) -> None:
        self.now = max(self.ends)

    def submit(self, function: Callable[..., None], *arguments: Any) -> Pretended:
        worker = self.ends.index(min(self.ends))
        self.now = self.ends[worker]
        function(*arguments)
        self.ends[worker] = self.now
        return self

    def result(self) -> None:
        """Of a future: there at once."""

    def main(self, *argv: str) -> int:
        return command.main(list(argv), clock=lambda: self.now, machine=self, pool=self.pool)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU, every tool, and everything that travels; returns the folder for the results."""
    monkeypatch.setattr(command, "look", lambda: MACHINE)
    monkeypatch.setattr(command, "cores", lambda: 16)
    monkeypatch.setattr(plan, "find_tool", lambda name, *_: f"/toolkit/{name}")
    monkeypatch.setattr(carry, "VARIANTS", tmp_path / "variants")
    monkeypatch.setattr(carry, "PACKAGES", tmp_path / "packages.tar.xz")
    carry.PACKAGES.touch()
    carry.VARIANTS.mkdir()
    for name in ("baseline", "tuned"):
        (carry.VARIANTS / f"{name}.tar.xz").touch()
    results = tmp_path / "results"
    results.mkdir()
    return results


OWN, PEERS, LARGE = "benchmark: torchce, eager, copy", "benchmark: peers", "2^31 and 2^32 elements"
ORDER = ["libraries", "every kernel once", OWN, "variants side by side", "counters", "test_softmax_ce.py", PEERS, LARGE]


def test_the_most_valuable_comes_first(elsewhere: Path) -> None:
    machine = Pretended(lambda step: min(step.seconds, 12))
    assert machine.main("--out", str(elsewhere), "--variants", "baseline tuned") == 0
    assert [name for name in machine.began if name in ORDER] == ORDER
    assert machine.began["sanitizer: synccheck"] == machine.began["test_softmax_ce.py"]  # side by side
    assert machine.began["trial: QuACK"] < machine.began[PEERS]
    ran = [step.name for step in plan.tests(setting(elsewhere))]
    assert set(ran) <= set(machine.began)
    assert len(machine.began) * steps.LOGGED_BYTES < 16 << 20  # gpu.log, with what every step may say


@pytest.mark.parametrize("share", [1.0, math.inf], ids=["all_of_its_time", "hangs"])
@pytest.mark.parametrize("variants", ["", "baseline tuned"])
def test_ten_minutes_whatever_the_steps_take(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], variants: str, share: float
) -> None:
    machine = Pretended(lambda step: step.seconds * share)
    machine.main("--out", str(elsewhere), "--variants", variants)
    assert machine.now <= command.LIMIT - command.ENDING
    assert max(machine.began.values()) <= command.LIMIT - command.ENDING - steps.SHORTEST
    assert {"libraries", "every kernel once", OWN, "counters"} <= set(machine.began)  # whatever is cut off
    steps_written = json.loads((elsewhere / "gpu.json").read_text())["steps"]
    assert {step["name"] for step in steps_written if step["result"] == "NOT RUN"} >= {LARGE}
    assert {path.name for path in elsewhere.iterdir()} == {"gpu.json", "gpu.log", "gpu.md"}
    shown = capsys.readouterr().out.rstrip().splitlines()
    (start,) = (number for number, line in enumerate(shown) if line.startswith("step "))
    assert len(shown) - start == 1 + len(steps_written)  # one table, and nothing after it


def test_as_long_as_estimated_everything_is_reached(elsewhere: Path) -> None:
    """Seconds on 16 cores, guessed: no step has run on a GPU yet."""
    guessed = {"libraries": 15, "every kernel once": 20, OWN: 100, "counters": 50, PEERS: 110, LARGE: 60}
    machine = Pretended(lambda step: min(step.seconds, guessed.get(step.name, 100 if ":" in step.name else 20)))
    assert machine.main("--out", str(elsewhere)) == 0
    results = {step["result"] for step in json.loads((elsewhere / "gpu.json").read_text())["steps"]}
    assert results <= {"ok", "MISSING"}


def test_what_was_found_is_written_after_every_step(elsewhere: Path) -> None:
    machine, seen = Pretended(lambda step: 1.0), []

    def watch() -> None:
        if (elsewhere / "gpu.json").exists():
            seen.append(len(json.loads((elsewhere / "gpu.json").read_text())["steps"]))

    machine.watch = watch
    machine.main("--out", str(elsewhere))
    assert seen == list(range(1, len(machine.began)))


def test_a_benchmark_ends_before_it_is_cut_off(elsewhere: Path) -> None:
    machine = Pretended(lambda step: step.seconds)
    machine.main("--out", str(elsewhere), "--limit", "300")
    options = machine.commands[OWN]
    assert float(options[options.index("--time-limit") + 1]) <= 300 - machine.began[OWN] - 15
    assert options[options.index("--out") + 1] == str(elsewhere)


def test_a_peer_that_crashed_is_left_out_and_the_rest_goes_on(elsewhere: Path) -> None:
    machine = Pretended(lambda step: 1.0, crashing=["trial: QuACK"])
    assert machine.main("--out", str(elsewhere)) == 1
    measured = machine.commands[PEERS]
    assert "QuACK" not in measured
    assert {"compile", "Liger", "Apple CCE"} <= set(measured)


def test_chosen_steps(elsewhere: Path) -> None:
    machine = Pretended(lambda step: 1.0)
    assert machine.main("--out", str(elsewhere), "--only", "sanitizer*") == 0
    assert len(machine.began) == 4
    assert machine.main("--out", str(elsewhere), "--only", "nothing of that name") == 1


def test_a_variant_that_did_not_come_along_is_not_measured(elsewhere: Path) -> None:
    """Least of all the package beside the tests in its place."""
    machine = Pretended(lambda step: 1.0)
    (carry.VARIANTS / "tuned.tar.xz").unlink()
    machine.main("--out", str(elsewhere), "--variants", "baseline tuned")
    assert "kernels of baseline" in machine.began
    assert not {"kernels of tuned", "variants side by side"} & set(machine.began)
    assert "did not come along: tuned.tar.xz" in (elsewhere / "gpu.md").read_text()


def test_a_failure_is_shown_and_named(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Pretended(lambda step: 1.0, crashing=["libraries"])
    carry.PACKAGES.unlink()
    assert machine.main("--out", str(elsewhere), "--only", "libraries", "--only", "packages") == 1
    shown = capsys.readouterr().out
    assert "0 of 2 steps held; failed: libraries; not checked: packages (missing)" in shown
    written = json.loads((elsewhere / "gpu.json").read_text())
    assert written["machine"] == MACHINE
    assert {step["name"]: step["result"] for step in written["steps"]}["libraries"] == "FAILED"


def test_a_rehearsal_leaves_no_step_out(tmp_path: Path) -> None:
    """The same groups; the tests are in one step, and of the peers only one is tried."""
    rehearsed, real = (
        list(command.groups(setting(tmp_path, device=device), Runner(0, tmp_path / "gpu.log")))
        for device in ("cpu", "cuda")
    )
    assert [group.name for group in rehearsed] == [group.name for group in real]
    assert all(group.steps for group in rehearsed)


def test_without_expecttest_every_file_is_collected() -> None:
    """A package that torch.testing._internal imports, and machines lack."""
    files = [str(file) for file in plan.TESTS.glob("test_*.py") if "torch.testing._internal" in file.read_text()]
    code = "import sys, pytest; sys.modules['expecttest'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["--collect-only", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-c", code, *options, *files], cwd=steps.ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:]
    assert "test_dtensor" in result.stdout


@pytest.mark.parametrize("out", [None, "elsewhere"])
def test_where_results_go(monkeypatch: pytest.MonkeyPatch, out: str | None) -> None:
    monkeypatch.delenv("OUT", raising=False)
    if out is not None:
        monkeypatch.setenv("OUT", out)
    expected = Path("elsewhere") if out else steps.ROOT / "benchmarks" / "results" / "nvidia-h200"
    assert command.results_folder("NVIDIA H200") == expected


def test_table() -> None:
    rows = table.lines([Outcome("build", "ok", 12.34, "built a|b", (("kernel", "3 ms"),))], [("CE 1x2", "fast")])
    assert table.markdown(rows).splitlines()[2:] == [
        "| build | ok | 12.3 | built a/b |",
        "| kernel |  |  | 3 ms |",
        "| CE 1x2 | measured |  | fast |",
    ]
    *_, build, kernel, _ = table.plain(rows).splitlines()
    assert build == "build     ok           12.3  built a|b"
    assert kernel.split() == ["kernel", "3", "ms"]


def test_figures_come_from_the_ledger_as_far_as_it_got(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="the benchmarks print with rich")
    from benchmark_rows import row

    from benchmarks import ledger

    assert table.figures(tmp_path) == []
    problem = {"size": "32768x1024", "dtype": "bfloat16"}
    rows = [
        row("torchce", 0.002, phase="forward+backward", **problem),
        row("eager", 0.008, phase="forward+backward", **problem),
        row("QuACK", None, phase="forward", note="failed: ImportError: no cutlass", **problem),
        row("torchce", 0.001, phase="forward", **problem),
        row("copy", 0.0009, phase="forward", **problem),
        row("torchce", 0.1, size="3x4"),
    ]
    ledger.save(tmp_path / ledger.FILE, rows)
    assert table.figures(tmp_path) == [
        ("CE 32768x1024 bfloat16", "fwd 1 ms 90% of copy; fwd+bwd 2 ms, 4.00x eager"),
        ("QuACK", "failed: ImportError: no cutlass (CE 32768x1024 bfloat16)"),
    ]


def test_a_ledger_that_is_not_understood_costs_only_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="the benchmarks print with rich")
    row = {"op": "a loss of another revision", "size": "1x2", "variant": "", "dtype": "float32"}
    row |= {"phase": "forward", "contender": "torchce", "median": 1.0, "environment": 0}
    (tmp_path / "ledger.json").write_text(json.dumps({"environments": [{}], "rows": [row]}))
    assert table.figures(tmp_path) == [("figures", "not readable: KeyError('a loss of another revision')")]


def test_results_that_cannot_be_written_are_one_line(elsewhere: Path) -> None:
    (elsewhere / "file").touch()
    with pytest.raises(SystemExit, match=r"make gpu: no results can be written: .*file"):
        Pretended(lambda step: 1.0).main("--out", str(elsewhere / "file"))
