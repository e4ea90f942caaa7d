"""Which revision of torchce is measured, also on a machine to which the files came without their history."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
CARRIED = ".gpu/revision.json"  # {"commit": its name, "sources" and "compiled": digests}; `make gpu-carry` writes it
COMPILED = ("csrc", "setup.py")
SOURCES = ("torchce", *COMPILED)
SUFFIXES = {".py", ".pyi", ".typed", ".h", ".inc", ".cpp", ".cu", ".cuh"}


def git(root: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def digest(root: Path = ROOT, names: Sequence[str] = SOURCES) -> str:
    """Of all that decides what the built package computes, or with COMPILED what its libraries do."""
    files = [path for name in names for path in ((root / name).rglob("*") if (root / name).is_dir() else [root / name])]
    found = hashlib.sha256()
    for path in sorted(path for path in files if path.suffix in SUFFIXES and path.is_file()):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


def carried(root: Path = ROOT) -> dict[str, str]:
    """What ``make gpu-carry`` wrote; empty where it did not run."""
    try:
        found: dict[str, str] = json.loads((root / CARRIED).read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found


def commit(root: Path = ROOT) -> str:
    """Such as ``0123456789ab``, ``0123456789ab-changed``, or ``unknown``."""
    name = git(root, "rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else None
    if name is not None:
        changed = bool(git(root, "status", "--porcelain", "--untracked-files=no", "--", *SOURCES))
    else:
        said = carried(root)
        name, changed = said.get("commit"), said.get("sources") != digest(root)
    if name is None:
        return "unknown"
    return f"{name}-changed" if changed and not name.endswith("-changed") else name
