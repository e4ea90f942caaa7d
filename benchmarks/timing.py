"""How calls are timed: interleaved in one process, so that a busy moment of the machine hits all alike.

CPU: wall time around as many calls as last a millisecond. Small inputs stay in cache, as after the layer before.

CUDA: events around one call. Before each, the L2 cache is overwritten and the device kept busy until the host has
queued the call: what is timed is the device's work on cold data. Inputs smaller than the cache come in several sets,
used in turn. Launch-bound problems are the exception: there the host is what one waits for, so calls run back to back.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.benchmark import Measurement, TaskSpec

Call = Callable[[], object]

CPU_SAMPLE_SECONDS = 1e-3  # perf_counter resolves 1e-7 of it; short enough for many samples
MAX_CALLS = 1000
# Calls that take seconds vary little: a pass ends after that many rounds once it has taken that long.
LONG_PASS_SECONDS, LONG_PASS_ROUNDS = 30.0, 3
# About 1 ms at 2 GHz: longer than Python takes to queue a forward and backward with a compiled wrapper around them.
BUSY_CYCLES = 2_000_000


@dataclass
class Timed:
    """One contender's way to run a pass: the same call on each of several input sets, in turn."""

    name: str
    calls: Sequence[Call]
    prepare: Callable[[int], object] | None = None  # renews what the call on one input set consumes, untimed
    scale: float = 1.0  # of the times, where the call does only a part of the work
    turn: int = field(default=0, init=False)

    def ready(self, times: int) -> None:
        """Before :meth:`run`."""
        if self.prepare is not None:
            for i in range(self.turn, self.turn + times):
                self.prepare(i % len(self.calls))

    def run(self, times: int) -> None:
        calls, turn = self.calls, self.turn
        if len(calls) == 1:
            call = calls[0]
            for _ in itertools.repeat(None, times):
                call()
        else:
            for i in range(turn, turn + times):
                calls[i % len(calls)]()
            self.turn = (turn + times) % len(calls)

    @property
    def most_calls(self) -> int:
        """Calls in one sample; none may meet what an earlier one has consumed."""
        return MAX_CALLS if self.prepare is None else len(self.calls)


class CpuClock:
    def sample(self, timed: Timed, calls: int) -> float:
        """Seconds per call."""
        timed.ready(calls)
        start = time.perf_counter()
        timed.run(calls)
        return (time.perf_counter() - start) / calls

    def calls_per_sample(self, timed: Timed, launch_bound: bool) -> int:
        once = self.sample(timed, 1)
        if once < 100 * CPU_SAMPLE_SECONDS:  # no hiccup makes a short call that long
            once = min(once, *(self.sample(timed, 1) for _ in range(2)))
        return max(1, min(timed.most_calls, math.ceil(CPU_SAMPLE_SECONDS / once)))


class CudaClock:
    def __init__(self) -> None:
        from triton import runtime

        driver = runtime.driver.active  # type: ignore[attr-defined]
        cache = driver.get_empty_cache_for_benchmark()
        self._flush = lambda: driver.clear_cache(cache)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, timed: Timed, calls: int) -> float:
        """Seconds per call."""
        timed.ready(calls)
        torch.cuda.synchronize()
        if calls == 1:
            self._flush()
            torch.cuda._sleep(BUSY_CYCLES)
        self._start.record()
        timed.run(calls)
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / calls

    def calls_per_sample(self, timed: Timed, launch_bound: bool) -> int:
        # 50 calls: the first one's head start over the device is spread thin.
        return min(timed.most_calls, 50) if launch_bound else 1


def clock(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def interleave(
    timed: Sequence[Timed],
    clock: CpuClock | CudaClock,
    seconds: float,
    min_rounds: int,
    launch_bound: bool = False,
) -> dict[str, Measurement]:
    """Times all in turn, in rounds that each begin with another one, for ``seconds`` or ``min_rounds``, the longer.

    Where calls are long, fewer rounds do.
    """
    for each in timed:
        clock.sample(each, 1)
    calls = [clock.calls_per_sample(each, launch_bound) for each in timed]
    samples: list[list[float]] = [[] for _ in timed]
    order = list(range(len(timed)))
    collects = gc.isenabled()
    gc.disable()  # as timeit does: a collection would be charged to whoever is running
    try:
        start = time.perf_counter()
        rounds, passed = 0, 0.0
        while passed < seconds or rounds < (min_rounds if passed < LONG_PASS_SECONDS else LONG_PASS_ROUNDS):
            for i in order:
                samples[i].append(clock.sample(timed[i], calls[i]) * timed[i].scale)
            order.append(order.pop(0))
            rounds, passed = rounds + 1, time.perf_counter() - start
    finally:
        if collects:
            gc.enable()
    return {
        each.name: Measurement(n, [t * n for t in ts], TaskSpec(each.name, setup=""))
        for each, n, ts in zip(timed, calls, samples, strict=True)
    }


def peak_bytes(timed: Timed, device: str) -> int:
    """The most memory one call holds at once beyond what was there before it."""
    timed.ready(1)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed.run(1)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler sees every allocation through torch's CPU allocator, exactly; the resident set of the process would
    # add what malloc keeps.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        timed.run(1)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(0, *itertools.accumulate(nbytes for _, nbytes in changes), 0)
