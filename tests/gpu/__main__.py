"""``make gpu``, ``python -m gpu`` in tests/: builds for the visible GPU, proves, measures, and prints one table last.

Needs torch, ninja, pybind11, pytest and what the benchmark draws with, and no network. Results go to $OUT, or to
benchmarks/results/<device name>: the logs in gpu.log, the table in gpu.md and gpu.json, and the benchmark's own files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gpu.steps import OK, ROOT, Outcome, Runner, Step, judge_benchmark, judge_pytest, judge_sanitizer

PYTHON = sys.executable
TESTS = ROOT / "tests"
LARGE = ("test_cuda_large.py", "test_large.py")  # alone on the card: they take most of its memory
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PATHS = os.pathsep.join(filter(None, (str(TESTS), str(ROOT), os.environ.get("PYTHONPATH"))))
KERNELS = [PYTHON, "-m", "gpu.kernels"]  # with PATHS
FOUND_SOMETHING = "86"  # compute-sanitizer's exit status then
LOOK = """
import json, sys, torch
assert torch.cuda.is_available(), "no CUDA device is visible to torch"
properties = torch.cuda.get_device_properties(0)
print(json.dumps({
    "gpu": properties.name, "gpus": torch.cuda.device_count(),
    "capability": f"{properties.major}.{properties.minor}",
    "multiprocessors": properties.multi_processor_count, "memory GiB": round(properties.total_memory / 2**30),
    "torch": torch.__version__, "CUDA": torch.version.cuda, "python": sys.version.split()[0],
}))
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=570, metavar="SECONDS", help="for everything (default: 570)")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="steps of these names")
    parser.add_argument("--out", type=Path, help="folder for the results")
    return parser.parse_args(argv)


def look() -> dict[str, Any]:
    """The visible GPU, asked in a process of its own: this one takes no memory of it."""
    result = subprocess.run([PYTHON, "-c", LOOK], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"make gpu: {(result.stderr.strip().splitlines() or ['python failed'])[-1]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def results_folder(gpu: str) -> Path:
    """As ``python -m benchmarks`` names it."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results" / name


def find_sanitizer() -> str | None:
    """On the PATH or in the toolkit; in some, the name in bin is missing."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(home, folder) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return next(filter(None, (shutil.which("compute-sanitizer", path=place) for place in (None, *places))), None)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build(capability: str) -> list[Step]:
    jobs = os.environ.get("MAX_JOBS") or str(cores())
    environment = {"TORCHCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": jobs}
    command = [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]
    return [
        Step("build", command, 300, environment),
        Step("every kernel once", KERNELS, 120, {"PYTHONPATH": PATHS}),
    ]


def pytest_step(files: list[Path], name: str, seconds: float, workers: int) -> Step:
    """Tests marked `cuda`. A process a file: an illegal access ends every later launch of its process."""
    each = str(max(1, cores() // workers))
    environment = {"OMP_NUM_THREADS": each, "TORCHINDUCTOR_COMPILE_THREADS": each}
    options = ["-m", "cuda", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    if any(file.name == "test_large.py" for file in files):
        options.append("--large")
    command = [PYTHON, "-m", "pytest", *options, *(str(file.relative_to(ROOT)) for file in files)]
    return Step(name, command, seconds, environment, judge_pytest)


def tests(workers: int) -> list[Step]:
    """The largest files first, so that none of them is left for the end."""
    files = [file for file in TESTS.glob("test_*.py") if file.name not in LARGE]
    files.sort(key=lambda file: -file.stat().st_size)
    return [pytest_step([file], file.name, 240, workers) for file in files]


def sanitizers() -> list[Step]:
    tool = find_sanitizer()
    missing = "" if tool else "compute-sanitizer is not on the PATH nor in the CUDA toolkit"
    # Memory from cudaMalloc itself, or every tensor would lie in the middle of a block of torch's.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": PATHS}
    steps = []
    for name in SANITIZERS:
        options = ["--tool", name, "--error-exitcode", FOUND_SOMETHING, "--print-limit", "20"]
        if name == "memcheck":  # torch asks the driver for symbols that it may lack
            options += ["--report-api-errors", "no"]
        command = [tool or "compute-sanitizer", *options, *KERNELS]
        steps.append(Step(f"sanitizer: {name}", command, 240, environment, judge_sanitizer, missing))
    return steps


def large() -> list[Step]:
    files = [file for file in (TESTS / name for name in LARGE) if file.is_file()]
    return [pytest_step(files, "2^31 and 2^32 elements", 180, 1)]


def benchmark(folder: Path, left: float) -> list[Step]:
    """Half a second a pass, as many problems as there is time for; those left out are named."""
    options = ["--device", "cuda", "--seconds", "0.5", "--time-limit", f"{max(left - 75, 1):.0f}", "--out", str(folder)]
    return [Step("benchmark", [PYTHON, "-m", "benchmarks", *options], max(left - 5, 1), judge=judge_benchmark)]


def table(outcomes: list[Outcome], markdown: bool = False) -> str:
    rows = [("step", "result", "seconds", "")]
    rows += [(each.name, each.result, f"{each.seconds:.1f}", each.words) for each in outcomes]
    if markdown:
        lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
        return "\n".join([lines[0], "|---|---|--:|---|", *lines[1:]])
    width, results = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{a:<{width}}  {b:<{results}}  {c:>7}  {d[:100]}".rstrip() for a, b, c, d in rows)


def conclusion(outcomes: list[Outcome]) -> str:
    """One line; what was not checked is named beside what failed."""
    failed = [each.name for each in outcomes if not each.good]
    unchecked = [f"{each.name} ({each.result.lower()})" for each in outcomes if each.good and each.result != OK]
    words = f"{len(outcomes) - len(failed) - len(unchecked)} of {len(outcomes)} steps held"
    words += f"; failed: {', '.join(failed)}" if failed else ""
    return words + (f"; not checked: {', '.join(unchecked)}" if unchecked else "")


def write(folder: Path, machine: dict[str, Any], outcomes: list[Outcome]) -> None:
    words = ", ".join(f"{name} {value}" for name, value in machine.items())
    (folder / "gpu.md").write_text(f"{words}\n\n{table(outcomes, markdown=True)}\n")
    steps = [{**vars(each), "seconds": round(each.seconds, 1)} for each in outcomes]
    (folder / "gpu.json").write_text(json.dumps({"machine": machine, "steps": steps}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    deadline = time.monotonic() + options.limit
    machine = look()
    folder = (options.out or results_folder(machine["gpu"])).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    runner = Runner(deadline, folder / "gpu.log")
    workers = max(1, min(8, cores() // 2))

    def run(steps: list[Step], at_once: int = 1) -> None:
        chosen = [step for step in steps if not options.only or any(fnmatch(step.name, each) for each in options.only)]
        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(runner.run, step) for step in chosen]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                runner.stop()
                raise

    complete = False
    try:
        run(build(machine["capability"]))
        run(sanitizers() + tests(workers), workers)
        run(large())
        run(benchmark(folder, runner.left()))
        complete = bool(runner.outcomes)
    except KeyboardInterrupt:
        print("interrupted")
    write(folder, machine, runner.outcomes)
    print(f"\nlogs and results: {folder}\n\n{table(runner.outcomes)}\n\n{conclusion(runner.outcomes)}")
    return 0 if complete and all(each.good for each in runner.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
