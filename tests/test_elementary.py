"""exp, log, log1p and tanh of ``csrc/math/elementary.h`` against double and, of doubles, against long double, compiled
for every SIMD level of this machine.

What is run is ``elementary.cpp``: every mantissa at the exponents where results vary, one float32 of 509 elsewhere; a
million doubles of each range, and those beside the borders of a function's parts. ``TORCHCE_TEST_EVERY_FLOAT=1`` takes
every float32 of each domain and 64 times as many doubles, minutes a level.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from torchce import _C

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "x86-64-v4": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-DTORCHCE_LEVEL_BYTES=64"],
    "x86-64-v3": ["-march=x86-64-v3", "-DTORCHCE_LEVEL_BYTES=32"],
    "baseline": ["-DTORCHCE_LEVEL_BYTES=16"],
}
ULPS = 2.0
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "csrc").is_dir(), reason="these tests stand beside an installed wheel, not its source"
    ),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


@pytest.mark.parametrize("level", _C.build_info()["cpu_levels"])
def test_within_their_bounds(level: str, tmp_path: Path) -> None:
    program = tmp_path / "elementary"
    options = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}", *TARGETS[level]]
    subprocess.run([str(COMPILER), *options, ROOT / "tests/elementary.cpp", "-o", program], check=True)
    arguments = ["all"] if os.environ.get("TORCHCE_TEST_EVERY_FLOAT") == "1" else []
    output = subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout
    errors = [line.rsplit(maxsplit=1) for line in output.splitlines()]
    assert len([what for what, _ in errors if "of doubles" in what]) > 30
    assert len(errors) > 60
    wrong = [f"{what}: {error} ulps" for what, error in errors if not float(error) <= ULPS]
    assert not wrong, "\n".join(wrong)
