"""The benchmark tool itself: its byte counts, ledger, goals and comparison, and a tiny grid run."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("rich", reason="the benchmarks print with rich")
pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")

from benchmark_rows import ENVIRONMENT, ROWS, row

from benchmarks import __main__ as command
from benchmarks import contenders, goals, ledger, measure, plots, problems, report, timing, traffic
from benchmarks.cases import cases
from benchmarks.problems import (
    BCE,
    CHANNELS_LAST,
    CROSS_ENTROPY,
    DIVERGENCES,
    ENTROPY_OF_LOGITS,
    JS_DIV,
    KL_DIV,
    LINEAR_CROSS_ENTROPY,
    PROBABILITIES,
    SOFT64,
    Problem,
)


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """Nothing here is large enough to gain from more, and waiting for them takes long on a busy machine."""
    torch.set_num_threads(1)


L = 4 * 6 * 4  # float32 logits of shape [4, 6]
TRAFFIC = [
    pytest.param(Problem(CROSS_ENTROPY, (4, 6), ""), (L + 32 + 32, L + 32 + 32 + L), id="indices"),
    pytest.param(Problem(CROSS_ENTROPY, (4, 6), "", "soft"), (2 * L + 48, 3 * L + 48), id="probabilities"),
    pytest.param(Problem(CROSS_ENTROPY, (4, 6), "", SOFT64), (3 * L + 96, 4 * L + 96), id="wide_probabilities"),
    pytest.param(Problem(CROSS_ENTROPY, (4, 6), "", "weight"), (L + 32 + 24 + 32, 2 * L + 32 + 24 + 32), id="weight"),
    pytest.param(Problem(CROSS_ENTROPY, (4, 6), "", "ignored"), (L // 2 + 64, L // 2 + 64 + L), id="half_ignored"),
    pytest.param(Problem(CROSS_ENTROPY, (2, 6, 2), ""), (L + 32 + 32, 2 * L + 32 + 32), id="strided_classes"),
    pytest.param(Problem(BCE, (4, 6), ""), (2 * L, 3 * L), id="bce"),
    pytest.param(Problem(BCE, (4, 6), "", "pos_weight"), (2 * L + 24, 3 * L + 24), id="pos_weight"),
    pytest.param(Problem(KL_DIV, (4, 6), ""), (2 * L + 64, 3 * L + 64), id="kl"),
    pytest.param(Problem(KL_DIV, (4, 6), "", PROBABILITIES), (2 * L + 48, 3 * L + 48), id="kl_probabilities"),
    pytest.param(Problem(JS_DIV, (2, 6, 2), ""), (2 * L + 80, 3 * L + 80), id="js_strided_classes"),
    pytest.param(Problem(ENTROPY_OF_LOGITS, (4, 6), ""), (L + 48, 2 * L + 48), id="entropy"),
]


@pytest.mark.parametrize(("problem", "expected"), TRAFFIC)
def test_traffic_counts_each_byte_once(problem: Problem, expected: tuple[int, int]) -> None:
    forward, backward, both = (traffic.traffic_bytes(problem, phase, 4) for phase in traffic.PHASES)
    assert (forward, backward) == expected
    assert both == sum(expected)


@pytest.mark.parametrize("device", problems.GRIDS)
def test_every_divergence_of_the_grid_has_traffic(device: str) -> None:
    grid = [problem for problem in problems.GRIDS[device] if problem.op in DIVERGENCES]
    assert {problem.op for problem in grid} == set(DIVERGENCES)
    for problem in grid:
        elements = problem.rows * problem.classes
        operands = 1 if problem.op == ENTROPY_OF_LOGITS else 2
        numbers = [
            (traffic.traffic_bytes(problem, "forward", size) or 0) - operands * elements * size for size in (2, 4)
        ]
        assert numbers[0] == numbers[1]  # of float32, whatever the logits are
        assert 0 < numbers[0] <= 5 * 4 * problem.rows


def test_traffic_of_products_is_not_counted() -> None:
    assert traffic.traffic_bytes(Problem(LINEAR_CROSS_ENTROPY, (4, 6), "", hidden=8), "forward", 2) is None


@pytest.mark.parametrize("device", problems.GRIDS)
def test_every_problem_is_distinct_and_has_a_reason(device: str) -> None:
    grid = problems.GRIDS[device]
    assert len({problem.name for problem in grid}) == len(grid)
    assert all(problem.reason for problem in grid)
    assert any(problem.quick for problem in grid)


@pytest.mark.parametrize("device", problems.GRIDS)
def test_every_goal_names_problems_of_the_grid(device: str) -> None:
    known = {f"{problem.size} {problem.variant}".rstrip() for problem in problems.GRIDS[device]}
    named = {size for goal in goals.GOALS if goal.device == device for size in goal.sizes or ()}
    assert named
    assert named <= known


def test_filters() -> None:
    soft = Problem(CROSS_ENTROPY, (1024, 1000), "", "soft")
    assert soft.matches([], [])
    assert soft.matches(["ce"], ["1024x*"])
    assert soft.matches([CROSS_ENTROPY], ["*soft"])
    assert not soft.matches(["bce"], [])
    assert not soft.matches([], ["512x*"])


def test_the_ledger_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ledger.FILE
    rows = [*ROWS, row("Liger", None, note="not installed", environment={**ENVIRONMENT, "date": "2026-01-03"})]
    ledger.save(path, rows)
    loaded = ledger.load(path)
    assert [dataclasses.replace(r, iqr=None, minimum=None) for r in loaded] == [
        dataclasses.replace(r, iqr=None, minimum=None) for r in rows
    ]
    assert loaded[0] == rows[0]
    assert path.read_text().count('"Some CPU') == 2  # each environment once, not with every row


def test_the_ledger_keeps_what_was_not_measured_again() -> None:
    merged = ledger.merge(ROWS, [row("torchce", 0.015), row("torchce", 0.001, size="32x10")])
    assert len(merged) == len(ROWS) + 1
    assert merged[0].median == 0.015


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    for text in ("", "[]", '{"rows": [{}]}', '{"environments": [], "rows": [{"environment": 1}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="no benchmark ledger"):
            ledger.load(path)


def test_goals_are_judged_against_the_fastest_peer() -> None:
    (case,) = cases(ROWS)
    judged = {(v.goal.quantity, v.goal.contender): v for v in goals.verdicts(case)}
    assert judged["speed-up", "torchce"].value == pytest.approx(2.5)  # over compile, not eager
    assert not judged["speed-up", "torchce"].met
    assert not judged["speed-up", "torchce in place"].met
    assert judged["peak memory", "torchce"].met
    assert judged["peak memory", "torchce in place"].met
    assert case.copy_share("torchce") == pytest.approx(0.4)
    assert case.bandwidth("torchce") == pytest.approx(196_616_192 / 0.020)
    assert len(report.missed_goals(ROWS)) == 2


@pytest.mark.parametrize(
    "problem",
    [
        {"dtype": "float64", "size": "8x19x256x256"},
        {"size": "1024x1000", "variant": SOFT64},
        {"op": BCE, "size": "8x19x256x256", "variant": CHANNELS_LAST},
    ],
    ids=["float64", "wide_probabilities", "channels_last"],
)
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
def test_slower_than_torch_is_a_missed_goal(problem: dict[str, str], phase: str) -> None:
    def missed(ours: float) -> list[goals.Verdict]:
        values = {**problem, "phase": phase, "peak_bytes": None}
        (case,) = cases([row("torchce", ours, **values), row("eager", 0.020, **values)])
        return [verdict for verdict in goals.verdicts(case) if not verdict.met]

    assert len(missed(0.021)) == 1
    assert not missed(0.019)


@pytest.mark.parametrize(("dtype", "sums"), [("float32", 0), ("bfloat16", 256 * 32000 * 4)])
def test_memory_of_a_linear_layers_loss_is_counted_in_pieces(dtype: str, sums: int) -> None:
    """4096x256x32000: 64 MiB are more than a sixteenth of the logits."""
    rest = (4096 + 32000) * 256 * problems.DTYPES[dtype].itemsize + sums + 4096 * 64 + (64 << 10)
    for pieces, met in ((1.12, True), (1.13, False)):
        peak = round(pieces * (64 << 20)) + rest
        values = {"op": LINEAR_CROSS_ENTROPY, "size": "4096x256x32000", "dtype": dtype, "peak_bytes": peak}
        (case,) = cases([row("torchce", 1.0, **values)])
        (verdict,) = goals.verdicts(case)
        assert verdict.value == pytest.approx(pieces)
        assert verdict.met == met
        assert str(verdict) == f"{pieces} pieces of logits + gradients (≤ 1.12)"


def test_a_linear_layers_loss_is_judged_against_whole_logits_and_torchs_pieces() -> None:
    values = {"op": LINEAR_CROSS_ENTROPY, "size": "512x128x32000", "peak_bytes": None}
    times = {"torchce": 1.0, "torchce in place": 0.96, "eager": 1.29, "torch chunked": 2.0}
    (case,) = cases([row(contender, time, **values) for contender, time in times.items()])
    judged = {verdict.goal.peers: verdict.met for verdict in goals.verdicts(case)}
    assert judged == {("torchce in place",): True, ("eager",): False, ("torch chunked",): True}


@pytest.mark.parametrize("dtype", problems.TRAINED)
def test_kl_is_judged_against_eager_and_the_compiler_apart(dtype: str) -> None:
    values = {"op": KL_DIV, "size": "8x19x256x256", "dtype": dtype, "peak_bytes": None}
    times = {"torchce": 1.0, "eager": 2.9, "compile": 1.6}
    (case,) = cases([row(contender, time, **values) for contender, time in times.items()])
    judged = {verdict.goal.peers: verdict.met for verdict in goals.verdicts(case)}
    assert judged == {("eager",): False, ("compile",): True}


@pytest.mark.parametrize("op", DIVERGENCES)
def test_a_divergence_holds_one_gradient_and_a_few_numbers_a_row(op: str) -> None:
    gradient, rest = 4096 * 1000 * 4, 4096 * 64 + (64 << 10)
    for peak, met in ((gradient + rest, True), (gradient + rest + 1, False)):
        (case,) = cases([row("torchce", 1.0, op=op, size="4096x1000", peak_bytes=peak)])
        (verdict,) = goals.verdicts(case)
        assert verdict.met == met


def test_nothing_is_judged_that_was_not_measured() -> None:
    (case,) = cases([row("torchce", 0.02, peak_bytes=None), row("eager", None), row("compile", None)])
    assert goals.verdicts(case) == []


def test_comparison_shows_only_what_left_the_spread() -> None:
    new = [row("torchce", 0.0101), row("torchce in place", 0.0101), row("compile", 0.050)]
    (line,) = report.comparison(ROWS, new).lines
    assert [cell.text for cell in line] == [
        *("CE 512x32000", "float32", "forward+backward", "20 ms", "10.1 ms", "1.98x", "2.50x", "4.95x")
    ]
    noisy = [row("torchce", 0.0101, iqr=0.02)]
    assert report.comparison(ROWS, noisy).lines == []
    (line,) = report.comparison([], [row("torchce", 0.01)]).lines
    assert "new" in [cell.text for cell in line]


def test_markdown_says_what_is_missing_and_missed() -> None:
    text = report.markdown([*ROWS, row("QuACK", None, note="not installed")], ["speedup.png"])
    assert "Some CPU, 2 threads" in text
    assert "QuACK: not installed" in text
    assert "2.50x eager / compile (≥ 3x)" in text
    assert "|CE 512x32000|float32|in place|10 ms|" in text


def test_a_busy_machine_is_named() -> None:
    assert report.busy(ENVIRONMENT) is None
    assert "load 3.5" in (report.busy({**ENVIRONMENT, "load": 3.5}) or "")


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "-"), (2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 µs"), (5e-8, "50 ns")]
)
def test_seconds(value: float | None, expected: str) -> None:
    assert report.seconds(value) == expected


def test_quick_results_stay_apart() -> None:
    thorough, quick = (ledger.folder({**ENVIRONMENT, "quick": quick}) for quick in (False, True))
    assert thorough.name == "some-cpu-2-threads"
    assert quick.parent == thorough


def test_calls_take_the_input_sets_in_turn() -> None:
    seen: list[tuple[str, int]] = []
    timed = timing.Timed(
        "x", [lambda i=i: seen.append(("run", i)) for i in range(3)], lambda i: seen.append(("prepare", i))
    )
    for _ in range(2):
        timed.ready(2)
        timed.run(2)
    order = [[("prepare", i), ("prepare", j), ("run", i), ("run", j)] for i, j in ((0, 1), (2, 0))]
    assert seen == order[0] + order[1]
    assert timed.most_calls == 3


def test_cuda_times_single_calls_cold_and_launch_bound_ones_back_to_back(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 6.0  # milliseconds

    class Driver:
        def get_empty_cache_for_benchmark(self) -> str:
            return "L2"

        def clear_cache(self, cache: str) -> None:
            log.append(f"flush {cache}")

    runtime = pytest.importorskip("triton", reason="triton flushes the L2 cache").runtime
    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=Driver()))
    cuda = {"Event": Event, "synchronize": lambda: log.append("sync"), "_sleep": lambda _: log.append("busy")}
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    clock = timing.clock("cuda")
    timed = timing.Timed("x", [lambda: log.append("call")] * 3, lambda i: log.append(f"prepare {i}"))
    assert clock.calls_per_sample(timed, launch_bound=False) == 1
    assert clock.sample(timed, 1) == pytest.approx(6e-3)
    assert log == ["prepare 0", "sync", "flush L2", "busy", "event", "call", "event", "wait"]
    log.clear()
    assert clock.calls_per_sample(timed, launch_bound=True) == 3  # as many as there are inputs to consume
    assert clock.sample(timed, 3) == pytest.approx(2e-3)
    assert log == ["prepare 1", "prepare 2", "prepare 0", "sync", "event", "call", "call", "call", "event", "wait"]


def test_peak_memory_is_that_of_the_allocations() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(500, dtype=torch.float32)
        del first, second
        torch.empty(100, dtype=torch.float32)

    assert timing.peak_bytes(timing.Timed("x", [call]), "cpu") == 6000


TINY = [
    pytest.param(Problem(CROSS_ENTROPY, (8, 5), "indices", launch_bound=True), id="ce"),
    pytest.param(Problem(CROSS_ENTROPY, (2, 5, 3, 3), "strided classes"), id="ce_4d"),
    *(
        pytest.param(Problem(CROSS_ENTROPY, (8, 5), "", variant), id=f"ce_{variant}")
        for variant in ("soft", SOFT64, "smoothing", "weight", "ignored")
    ),
    pytest.param(Problem(BCE, (2, 5, 3, 3), "", "pos_weight"), id="bce_pos_weight"),
    pytest.param(Problem(BCE, (2, 5, 3, 3), "", CHANNELS_LAST), id="bce_channels_last"),
    pytest.param(Problem(LINEAR_CROSS_ENTROPY, (8, 5), "", hidden=4), id="linear"),
    pytest.param(Problem(KL_DIV, (8, 5), ""), id="kl"),
    pytest.param(Problem(KL_DIV, (2, 5, 3, 3), "", PROBABILITIES), id="kl_probabilities"),
    pytest.param(Problem(JS_DIV, (2, 5, 3, 3), ""), id="js"),
    pytest.param(Problem(ENTROPY_OF_LOGITS, (2, 5, 3, 3), ""), id="entropy"),
]
ALL_PHASES = traffic.PHASES
NO_COMPILE = [c for c in contenders.CONTENDERS if "cpu" in c.devices and c.name != contenders.COMPILE]


# bfloat16 asks more of the contenders than float32.
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("problem", TINY)
def test_every_kind_of_problem_is_measured(problem: Problem, dtype: str) -> None:
    rows = list(measure.measure(problem, dtype, "cpu", NO_COMPILE, measure.Budget(0.0, 1), ALL_PHASES))
    found = {(r.phase, r.contender): r for r in rows}
    is_linear = problem.op == LINEAR_CROSS_ENTROPY
    for phase in ("forward", "forward+backward") if is_linear else ALL_PHASES:
        for contender in ("eager", "torchce", *([] if is_linear else ["copy"])):
            assert found[phase, contender].median, found[phase, contender].note
    ours, in_place = found["forward+backward", "torchce"], found["forward+backward", "torchce in place"]
    if problem.op in DIVERGENCES:
        assert "overwrites nothing" in in_place.note
    else:
        assert in_place.median, in_place.note
    # One gradient at least: of the logits, or of the linear layer's weight.
    gradient = problem.classes * (problem.hidden or problem.rows)
    assert (ours.peak_bytes or 0) >= gradient * problems.DTYPES[dtype].itemsize
    chunked = found["forward+backward", "torch chunked"]
    if is_linear and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert chunked.median, chunked.note
    else:
        assert chunked.note


def test_whoever_computes_something_else_is_not_timed() -> None:
    def half(problem: Problem) -> contenders.Loss:
        return lambda *arguments, **keywords: torch.nn.functional.cross_entropy(*arguments, **keywords) / 2

    def broken(problem: Problem) -> contenders.Loss:
        raise RuntimeError("out of order\nwith details")

    entrants = [contenders.Contender("half", half), contenders.Contender("broken", broken), NO_COMPILE[0]]
    problem = Problem(CROSS_ENTROPY, (8, 5), "")
    rows = list(measure.measure(problem, "float32", "cpu", entrants, measure.Budget(0.0, 1), ["forward"]))
    found = {r.contender: r for r in rows}
    assert found["half"].median is None
    assert "float32 torch" in found["half"].note
    assert found["broken"].note == "failed: RuntimeError: out of order"
    assert found["torchce"].median


def test_a_size_names_the_width_before_the_linear_layer() -> None:
    problem = Problem(LINEAR_CROSS_ENTROPY, (4096, 32000), "", hidden=256)
    assert problem.name == "linear CE 4096x256x32000"
    assert problem.matches(["linear_cross_entropy"], ["4096x256x*"])
    (case,) = cases([row("eager", 1.0, op=problem.op, size=problem.size, dtype="bfloat16")])
    assert (case.name, case.shape) == (problem.name, problem.shape)
    assert case.logits_bytes == 4096 * 32000 * 2


def test_a_linear_layers_loss_overwrites_no_inputs() -> None:
    in_place = next(c for c in contenders.CONTENDERS if c.name == contenders.IN_PLACE)
    assert in_place.consumes(Problem(CROSS_ENTROPY, (8, 5), ""))
    assert not in_place.consumes(Problem(LINEAR_CROSS_ENTROPY, (8, 5), "", hidden=4))


@pytest.mark.parametrize("contender", contenders.CONTENDERS, ids=lambda contender: contender.name)
def test_a_divergence_overwrites_no_inputs(contender: contenders.Contender) -> None:
    assert not any(contender.consumes(Problem(op, (8, 5), "")) for op in DIVERGENCES)


def test_ligers_divergences_are_given_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    def jsd(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        log_m = (log_q.exp() / 2 + log_p.exp() / 2).log()
        of_p, of_q = (F.kl_div(log_m, log, reduction="batchmean", log_target=True) for log in (log_p, log_q))
        return of_p / 2 + of_q / 2

    functional = SimpleNamespace(liger_kl_div=F.kl_div, liger_jsd=jsd)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace(functional=functional))
    liger = [c for c in contenders.CONTENDERS if c.name == contenders.LIGER]

    def notes(problem: Problem) -> list[str]:
        return [r.note for r in measure.measure(problem, "float32", "cpu", liger, measure.Budget(0.0, 1), ["forward"])]

    for problem in (
        Problem(KL_DIV, (8, 5), ""),
        Problem(KL_DIV, (8, 5), "", PROBABILITIES),
        Problem(JS_DIV, (8, 5), ""),
    ):
        assert not any(notes(problem))
    assert "takes [N, C] logits only" in notes(Problem(KL_DIV, (2, 5, 3), ""))
    assert f"has no {ENTROPY_OF_LOGITS}" in notes(Problem(ENTROPY_OF_LOGITS, (8, 5), ""))


def test_long_calls_need_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds() -> int:
        timed = timing.Timed("x", [lambda: None])
        return len(timing.interleave([timed], timing.clock("cpu"), 0.0, 7)["x"].times)

    assert rounds() == 7
    monkeypatch.setattr(timing, "LONG_PASS_SECONDS", 0.0)
    assert rounds() == 3


def test_the_command_measures_reports_draws_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(problems.GRIDS, "cpu", [Problem(CROSS_ENTROPY, (512, c), "", quick=True) for c in (256, 512)])
    monkeypatch.setattr(command, "QUICK", measure.Budget(0.0, 2))
    arguments = ["--quick", "--no-compile", "--dtype", "float32", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("ledger.json", "results.md", "speedup.png", "time_against_classes.png")
    }
    assert "CE 512x256" in capsys.readouterr().out

    old = tmp_path / "old.json"
    slower = [dataclasses.replace(r, median=r.median and r.median * 100) for r in ledger.load(tmp_path / ledger.FILE)]
    ledger.save(old, slower)
    monkeypatch.setattr(plots, "draw", lambda *_: [])  # once is enough
    assert command.main([*arguments, "--from-ledger", "--statistic", "minimum", "--compare", str(old)]) == 0
    assert command.main([*arguments, "--size", "512x512", "--compare", str(old)]) == 0
    assert "Changes since" in capsys.readouterr().out
    assert len({r.size for r in ledger.load(tmp_path / ledger.FILE)}) == 2  # the filtered run kept the other one
    with pytest.raises(SystemExit, match="no problem"):
        command.main([*arguments, "--op", "bce"])


def test_time_limit_measures_the_quick_ones_first_and_names_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [Problem(CROSS_ENTROPY, (8, classes), "", quick=classes == 7) for classes in (5, 6, 7)]
    monkeypatch.setitem(problems.GRIDS, "cpu", grid)
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    limits = ["--time-limit", "0", "--seconds", "0"]
    assert command.main([*limits, "--no-compile", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    assert {r.size for r in ledger.load(tmp_path / ledger.FILE)} == {"8x7"}
    assert "not measured within 0 s: CE 8x5 float32, CE 8x6 float32" in capsys.readouterr().out


def test_key_problems_and_contenders_are_chosen_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(problems.GRIDS, "cpu", [Problem(CROSS_ENTROPY, (8, c), "", key=c == 7) for c in (5, 7)])
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    options = ["--key", "--dtype", "float32", "--seconds", "0", "--out", str(tmp_path)]
    assert command.main([*options, "--contender", "torchce*", "--contender", "eager"]) == 0
    rows = ledger.load(tmp_path / ledger.FILE)
    assert {r.size for r in rows} == {"8x7"}
    assert {r.contender for r in rows} == {
        "torchce",
        "torchce in place",
        "torchce forward_backward",
        "eager",
        "copy",
        "read",
    }
    with pytest.raises(SystemExit, match="no contender"):
        command.main([*options, "--contender", "nobody"])


def test_eight_key_problems_for_the_peers() -> None:
    assert len([problem for problem in problems.GRIDS["cuda"] if problem.key]) == 8


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    stale = tmp_path / "speedup.png"
    stale.write_bytes(b"")
    assert plots.draw([row("copy", 0.01)], tmp_path, "") == []
    assert not stale.exists()
