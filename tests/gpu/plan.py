"""What ``make gpu`` does, in the order that brings most home if time runs out.

Every builder takes a :class:`Setting`. In a rehearsal, without a GPU, the commands are the same ones, on the CPU and as
short as they can be: what dies of a typing error or a missing package does so there.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from gpu import carry, counters
from gpu.steps import (
    FAILED,
    ROOT,
    Group,
    Outcome,
    Step,
    judge_benchmark,
    judge_command,
    judge_pytest,
    judge_sanitizer,
    judge_trial,
    judge_variants,
)

PYTHON = sys.executable
TESTS = ROOT / "tests"
SITES = [str(carry.SITE / folder) for folder in carry.SEARCHED]
PATHS = os.pathsep.join(filter(None, (str(TESTS), str(ROOT), *SITES, os.environ.get("PYTHONPATH"))))
LARGE = ("test_cuda_large.py", "test_large.py")  # alone on the card: they take most of its memory
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
KERNELS = [PYTHON, str(TESTS / "gpu" / "kernels.py")]  # by its path: PYTHONPATH then says which torchce it is
FOUND_SOMETHING = "86"  # compute-sanitizer's exit status then

COMPILE = "compile"
HEAD = "8192x4096x128256"  # of linear cross entropy, which alone Apple CCE has
# Tried each in a process of its own before it is measured beside others: a crash takes its whole process along, an
# illegal access every later launch. torch.compile on all problems, so that its cache is warm; the others on small ones.
TRIED = {
    COMPILE: [],
    "Liger": ["--size", "32768x1024", "--dtype", "bfloat16"],
    "QuACK": ["--size", "32768x1024", "--size", HEAD],
    "Apple CCE": ["--size", HEAD],
}
SECONDS = 0.25  # a pass, for all contenders


@dataclass(frozen=True)
class Setting:
    device: str  # cuda, or cpu in a rehearsal
    capability: str
    cores: int
    results: Path
    scratch: Path  # for what is not worth keeping
    variants: tuple[str, ...] = ()

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def workers(self) -> int:
        return max(1, min(12, self.cores * 3 // 4))


def find_tool(name: str, folders: Sequence[str] = ("bin", "compute-sanitizer")) -> str | None:
    """On the PATH or in the toolkit, where some lack the name in bin; ncu may have a place of its own."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(home, folder) for home in homes if home for folder in folders]
    places += sorted(glob("/opt/nvidia/nsight-compute/*"), reverse=True)
    return next(filter(None, (shutil.which(name, path=place) for place in (None, *places))), None)


def prepare(setting: Setting) -> list[Group]:
    """The libraries, carried or built, then every kernel once; the peers are unpacked meanwhile."""
    jobs = os.environ.get("MAX_JOBS") or str(setting.cores)
    environment = {"PYTHONPATH": PATHS, "TORCH_CUDA_ARCH_LIST": setting.capability, "MAX_JOBS": jobs}
    libraries = Step("libraries", [PYTHON, "-m", "gpu.libraries", "--device", setting.device], 180, environment)
    return [
        Group("libraries", [libraries], 180),
        Group("every kernel once", [_kernels(setting, "every kernel once"), *_unpack(setting)], 60, workers=4),
    ]


def _kernels(setting: Setting, name: str, package: Path | None = None, missing: str = "") -> Step:
    paths = PATHS if package is None else os.pathsep.join((str(package), PATHS))
    command = [*KERNELS, "--device", setting.device]
    return Step(name, command, 60, {"PYTHONPATH": paths}, missing=missing)


def _unpack(setting: Setting) -> list[Step]:
    archives = {carry.PACKAGES: carry.SITE, **{_archive(name): _package(name) for name in setting.variants}}
    steps = []
    for archive, folder in archives.items():
        command = [PYTHON, "-m", "gpu.carry", "--unpack", str(archive), str(folder)]
        name = "packages" if archive == carry.PACKAGES else f"variant {folder.name}"
        steps.append(Step(name, command, 60, {"PYTHONPATH": PATHS}, missing=_absent(archive)))
    return steps


def _absent(*archives: Path) -> str:
    names = [archive.name for archive in archives if not archive.exists()]
    return f"did not come along: {', '.join(names)}" if names else ""


def _archive(variant: str) -> Path:
    return carry.VARIANTS / f"{variant}.tar.xz"


def _package(variant: str) -> Path:
    return carry.WORK / "unpacked" / variant


def _benchmark(setting: Setting, *options: str) -> list[str]:
    small = ["--size", "32x10", "--dtype", "float32"] if setting.rehearsal else []
    return [PYTHON, "-m", "benchmarks", "--device", setting.device, *options, *small]


def _measure(setting: Setting, name: str, seconds: float, *options: str) -> Step:
    """Its time limit leaves it a while for its last problem and its report."""
    each = "0" if setting.rehearsal else str(SECONDS)
    given = [*options, "--seconds", each, "--out", str(setting.results)]

    def command(seconds: float) -> list[str]:
        return _benchmark(setting, *given, "--time-limit", f"{max(seconds - 15, 1):.0f}")

    return Step(name, command, seconds, {"PYTHONPATH": PATHS}, judge_benchmark)


def own_benchmark(setting: Setting) -> Group:
    ours = [option for name in ("torchce*", "eager") for option in ("--contender", name)]
    return Group("benchmark", [_measure(setting, "benchmark: torchce, eager, copy", 115, *ours)], 115)


def variants(setting: Setting) -> list[Group]:
    """Their kernels once, then beside each other."""
    if not setting.variants:
        return []
    kernels = [
        _kernels(setting, f"kernels of {name}", _package(name), _absent(_archive(name))) for name in setting.variants
    ]
    named = [f"{name}={_package(name)}" for name in setting.variants]
    small = ["--size", "32x10", "--seconds", "0"] if setting.rehearsal else []

    def command(seconds: float) -> list[str]:
        limits = ["--time-limit", f"{max(seconds - 15, 1):.0f}"]
        return [PYTHON, "-m", "benchmarks.variants", *named, "--device", setting.device, *limits, *small]

    missing = _absent(*map(_archive, setting.variants))
    side_by_side = Step("variants side by side", command, 90, {"PYTHONPATH": PATHS}, judge_variants, missing)
    return [Group("kernels of the variants", kernels, 40, workers=2), Group("variants", [side_by_side], 90)]


def profile(setting: Setting) -> Group:
    tool = find_tool("ncu", ("bin",))
    program = [PYTHON, "-m", "gpu.counters", "--device", setting.device]
    command = [tool or "ncu", *counters.OPTIONS, "--metrics", ",".join(counters.METRICS.values()), *program]
    missing = "" if tool else "ncu is not on the PATH nor in the CUDA toolkit"
    environment = {"PYTHONPATH": PATHS}
    if setting.rehearsal:
        return Group("counters", [Step("counters", program, 60, environment)], 60)
    return Group("counters", [Step("counters", command, 75, environment, counters.judge, missing)], 75)


def pytest_step(setting: Setting, files: list[Path], name: str, seconds: float, workers: int) -> Step:
    """Tests marked `cuda`; in a rehearsal they are only collected."""
    each = str(max(1, setting.cores // workers))
    environment = {"OMP_NUM_THREADS": each, "TORCHINDUCTOR_COMPILE_THREADS": each, "PYTHONPATH": PATHS}
    options = ["-m", "cuda", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    if any(file.name == "test_large.py" for file in files):
        options.append("--large")
    judge = judge_pytest
    if setting.rehearsal:
        options.append("--collect-only")
        judge = judge_command
    command = [PYTHON, "-m", "pytest", *options, *(str(file.relative_to(ROOT)) for file in files)]
    return Step(name, command, seconds, environment, judge)


def sanitizers(setting: Setting) -> list[Step]:
    tool = find_tool("compute-sanitizer")
    missing = "" if tool else "compute-sanitizer is not on the PATH nor in the CUDA toolkit"
    # Memory from cudaMalloc itself, or every tensor would lie in the middle of a block of torch's.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": PATHS}
    steps = []
    for name in SANITIZERS:
        options = ["--tool", name, "--error-exitcode", FOUND_SOMETHING, "--print-limit", "20"]
        if name == "memcheck":  # torch asks the driver for symbols that it may lack
            options += ["--report-api-errors", "no"]
        command = [tool or "compute-sanitizer", *options, *KERNELS]
        steps.append(Step(f"sanitizer: {name}", command, 150, environment, judge_sanitizer, missing))
    return steps


def tests(setting: Setting) -> list[Step]:
    """A process a file, for an illegal access ends every later launch of its process; the largest files first."""
    files = [file for file in TESTS.glob("test_*.py") if file.name not in LARGE]
    if setting.rehearsal:
        return [pytest_step(setting, files, "all tests", 120, 1)]
    files.sort(key=lambda file: -file.stat().st_size)
    return [pytest_step(setting, [file], file.name, 150, setting.workers) for file in files]


def trial(peer: str) -> str:
    """The name of its step."""
    return f"trial: {peer}"


def trials(setting: Setting) -> list[Step]:
    names = [COMPILE] if setting.rehearsal else list(TRIED)
    steps = []
    for peer in names:
        folder = setting.scratch / peer.replace(" ", "-")
        options = ["--key", "--contender", peer, "--seconds", "0", "--out", str(folder), *TRIED[peer]]
        environment = {"PYTHONPATH": PATHS}
        steps.append(Step(trial(peer), _benchmark(setting, *options), 150, environment, judge_trial))
    return steps


def checks(setting: Setting) -> Group:
    """Sanitizers and tests, and the peers' trials first: their compilers take long, and no GPU."""
    steps = [*trials(setting), *sanitizers(setting), *tests(setting)]
    return Group("tests", steps, 180, setting.workers)


def peers(setting: Setting, outcomes: Sequence[Outcome]) -> Group:
    """Everyone on the key problems but those whose trial crashed."""
    crashed = {outcome.name for outcome in outcomes if outcome.result == FAILED}
    names = ["torchce*", "eager", "torch chunked", *(peer for peer in TRIED if trial(peer) not in crashed)]
    chosen = [option for name in names for option in ("--contender", name)]
    return Group("peers", [_measure(setting, "benchmark: peers", 120, "--key", *chosen)], 120)


def large(setting: Setting) -> Group:
    files = [file for file in (TESTS / name for name in LARGE) if file.is_file()]
    return Group("large", [pytest_step(setting, files, "2^31 and 2^32 elements", 150, 1)], 150)
