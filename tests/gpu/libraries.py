"""``python -m gpu.libraries``: torchce's libraries for the visible GPU, those that were carried or new ones.

Carried ones are taken if they were built from these sources and a kernel of them runs; else all is built here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks.revision import COMPILED, carried, digest
from gpu.carry import LIBRARIES, CannotCarry, unpack
from gpu.steps import ROOT

TRY = """
import sys, torch, torchce
info, device = torchce.build_info(), sys.argv[1]
logits, target = torch.zeros(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device)
loss = torchce.functional.cross_entropy(logits, target)
assert device == "cpu" or info["cuda_loaded"], info["cuda_status"]
assert abs(loss.item() - 1.0986123) < 1e-5, loss.item()
print(f"a kernel of them ran; for {info['cuda_archs']}")
"""


def run(device: str) -> str | None:
    """Why the libraries that are there do not do, or None."""
    result = subprocess.run([sys.executable, "-c", TRY, device], cwd=ROOT, capture_output=True, text=True, check=False)
    print(result.stdout.strip())
    return None if result.returncode == 0 else (result.stderr.strip().splitlines() or ["it crashed"])[-1]


def build() -> int:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "TORCHCE_CUDA": "1"}, check=False).returncode


def why_not_carried(device: str) -> str | None:
    if not LIBRARIES.exists():
        return "none came along"
    if carried().get("compiled") != digest(names=COMPILED):
        return "those that came along were built from other sources"
    try:
        unpack(LIBRARIES, ROOT)
    except CannotCarry as error:
        return str(error)
    return run(device)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.libraries", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    device = parser.parse_args().device
    if device == "cpu":  # a rehearsal: with what is there, or came along, but no build
        reason = run(device) and why_not_carried(device)
        print(reason or "rehearsed with libraries that were there or came along")
        return 1 if reason else 0
    reason = why_not_carried(device)
    if reason is None:
        print("carried, and a kernel of them ran")
        return 0
    print(f"building: {reason}", flush=True)
    if build() != 0:
        return 1
    broken = run(device)
    print(broken or f"built here: {reason}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
