"""Rows of measurements and the environment each was taken in, as one JSON file a device."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import torchce
from benchmarks import revision
from benchmarks.contenders import CONTENDERS
from benchmarks.revision import ROOT

RESULTS = Path(__file__).parent / "results"
FILE = "ledger.json"

Key = tuple[str, str, str, str, str, str]


@dataclass
class Row:
    """One contender on one problem; ``median`` is None where it could not be measured, and ``note`` says why."""

    op: str
    size: str
    variant: str
    dtype: str
    phase: str
    contender: str
    median: float | None = None  # seconds per call
    iqr: float | None = None  # seconds
    minimum: float | None = None  # seconds
    samples: int = 0
    calls_per_sample: int = 0
    peak_bytes: int | None = None  # beyond the inputs
    traffic_bytes: int | None = None  # that the pass must move
    note: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.op, self.size, self.variant, self.dtype, self.phase, self.contender


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def environment(device: str, quick: bool) -> dict[str, Any]:
    """Everything about here and now that a figure depends on."""
    info = torchce.build_info()
    cuda = device == "cuda"
    threads = torch.get_num_threads()
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if cuda else f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": _cpu_name(),
        "threads": threads,
        "machine": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchce": info["torchce"],
        "cpu_level": info["cpu_level"],
        "compiler": info["compiler"],
        "peers": {c.distribution: c.version() for c in CONTENDERS if cuda and c.version()},
        "commit": revision.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": quick,
    }


def folder(environment: dict[str, Any]) -> Path:
    """Where results of this device lie; quick ones apart, so that they never replace thorough ones."""
    name = re.sub(r"[^a-z0-9]+", "-", environment["name"].lower()).strip("-")
    return RESULTS / name / "quick" if environment["quick"] else RESULTS / name


def _short(value: Any) -> Any:
    """Six digits of a float: more than any clock has here, and readable."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def save(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows one to a line, environments once each: a change is a readable diff."""
    environments: list[dict[str, Any]] = []
    lines = []
    for row in rows:
        if row.environment not in environments:
            environments.append(row.environment)
        values = {name: _short(value) for name, value in asdict(row).items() if value is not None and name != "note"}
        if row.note:
            values["note"] = row.note
        lines.append(json.dumps({**values, "environment": environments.index(row.environment)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(f"  {line}" for line in lines)
    table = ",\n".join(f"  {json.dumps(each)}" for each in environments)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(f'{{"environments": [\n{table}\n],\n"rows": [\n{body}\n]}}\n')
    unfinished.replace(path)  # an interrupted run leaves the old ledger whole


def load(path: Path) -> list[Row]:
    """Raises:
    ValueError: the file is no ledger.
    """
    try:
        content = json.loads(path.read_text())
        environments = content["environments"]
        known = {each.name for each in fields(Row)}
        return [
            Row(**{k: v for k, v in {**row, "environment": environments[row["environment"]]}.items() if k in known})
            for row in content["rows"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is no benchmark ledger: {error!r}") from None


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The old rows, those measured again replaced: a filtered run renews only its part."""
    merged = {row.key: row for row in old}
    merged.update({row.key: row for row in new})
    return list(merged.values())


def latest(device: str, results: Path = RESULTS) -> list[Row]:
    """The thorough ledger of the device of that type measured last; empty where none was."""
    ledgers = [load(path) for path in sorted(results.glob(f"*/{FILE}"))]
    ledgers = [rows for rows in ledgers if rows and rows[0].environment["device"] == device]
    return max(ledgers, key=lambda rows: max(row.environment["date"] for row in rows), default=[])
