"""``python -m gpu.counters``: six kernels on problems of their own size, for the profiler to count what they do.

Run under ``ncu --profile-from-start off``: of each problem one launch is profiled, by the op itself, so the profiler's
rows come in the order of PROBLEMS. :func:`parse` reads them.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterator
from contextlib import suppress

from gpu.steps import MISSING, OK, Verdict, last_line

METRICS = {
    "time": "gpu__time_duration.sum",
    "bytes": "dram__bytes.sum",
    "of peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "instructions": "smsp__inst_executed.sum",
}
OPTIONS = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
UNITS = {"second": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "msecond": 1e-3, "usecond": 1e-6, "nsecond": 1e-9}

MEAN, SUM, IGNORED = 1, 2, -100


def problems(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, the op as a call), the inputs ready. bfloat16; on a CPU small, for a rehearsal."""
    import torch

    from torchce import ops

    small = device == "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        shape = tuple(min(extent, 40) for extent in shape) if small else shape
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(4)

    def indices(x: torch.Tensor) -> torch.Tensor:
        return torch.randint(x.shape[1], (x.shape[0], *x.shape[2:]), generator=generator, device=device)

    one = torch.ones((), device=device)
    for shape in ((4096, 32768), (8192, 8192), (8, 19, 512, 1024)):
        x = normal(*shape)
        target = indices(x)
        name = f"{'x'.join(map(str, shape))} bfloat16"
        forward = ops.softmax_ce_forward(x, target, None, None, MEAN, IGNORED, 0.0)
        yield (
            f"CE forward {name}",
            lambda x=x, y=target: ops.softmax_ce_forward(x, y, None, None, MEAN, IGNORED, 0.0),
        )
        if shape != (4096, 32768):
            continue
        saved = (one.to(x.dtype), x, target, None, *forward[1:], MEAN)
        yield f"CE backward {name}", lambda saved=saved: ops.softmax_ce_backward(*saved, IGNORED, 0.0)
        yield (
            f"CE forward_backward {name}",
            lambda x=x, y=target: ops.softmax_ce_forward_backward_(one, x, y, None, torch.float32, SUM, IGNORED, 0.0),
        )
    x = normal(8192, 8192)
    target = torch.rand(x.shape, generator=generator, device=device, dtype=torch.bfloat16).round_()
    loss = ops.sigmoid_bce_forward(x, target, None, None, None, MEAN)
    yield "BCE forward 2^26 bfloat16", lambda: ops.sigmoid_bce_forward(x, target, None, None, None, MEAN)
    saved_bce = (torch.ones_like(loss), x, target, None, None, MEAN)
    yield "BCE backward 2^26 bfloat16", lambda: ops.sigmoid_bce_backward(*saved_bce)


def _rows(output: str) -> Iterator[dict[str, tuple[str, str]]]:
    """The profiler's rows: {metric: (value, unit)}. Its own messages and the program's stand around and among them."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    for start, line in enumerate(lines):
        if line.startswith('"ID"'):
            header, *rows = csv.reader(lines[start:])
            units, *rows = [row for row in rows if len(row) == len(header)] or [[]]
            for row in rows:
                yield dict(zip(header, zip(row, units, strict=True), strict=True))
            return


def parse(output: str) -> list[tuple[str, str]]:
    """(kernel, what was counted), in the order of the launches; a problem's name where one was printed for each."""
    names = re.findall(r"^problem: (.+)$", output, re.MULTILINE)
    rows = list(_rows(output))
    if len(names) != len(rows):  # a problem of several kernels: which is whose is then not known
        names = [row.get("Kernel Name", ("?", ""))[0].partition("(")[0] for row in rows]
    return [(name, _words(row)) for name, row in zip(names, rows, strict=True)]


def _words(row: dict[str, tuple[str, str]]) -> str:
    found: dict[str, float] = {}
    for name, metric in METRICS.items():
        value, unit = row.get(metric, ("", ""))
        with suppress(ValueError):  # "n/a" where this card does not count it
            found[name] = float(value.replace(",", "")) * UNITS.get(unit, 1.0)
    parts = []
    if "time" in found:
        parts.append(f"{found['time'] * 1e3:.4g} ms")
    if found.get("time") and "bytes" in found:
        parts.append(f"{found['bytes'] / 1e6:.5g} MB at {found['bytes'] / found['time'] / 1e12:.3g} TB/s")
    for name, text in (
        ("of peak", "{:.0f} % of DRAM's peak"),
        ("issue", "issue slots {:.0f} %"),
        ("occupancy", "occupancy {:.0f} %"),
        ("registers", "{:.0f} registers"),
        ("blocks", "{:.0f} blocks"),
        ("instructions", "{:.4g} warp instructions"),
    ):
        if name in found:
            parts.append(text.format(found[name]))
    return ", ".join(parts)


def judge(code: int, output: str) -> Verdict:
    """Where the profiler is not allowed to count, its words."""
    details = tuple(parse(output))
    if details:
        return Verdict(OK, f"{len(details)} kernels counted", details)
    complaints = re.findall(r"^==(?:ERROR|WARNING)== (.+)$", output, re.MULTILINE)
    return Verdict(MISSING, complaints[0] if complaints else f"no counters: {last_line(output)}")


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(prog="python -m gpu.counters", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    device = parser.parse_args().device
    for name, call in problems(device):
        call()  # loads the kernel
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        print(f"problem: {name}", flush=True)
        call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
