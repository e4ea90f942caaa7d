"""The built extension, the tools that read it, and what they tell of each kernel."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import util
from importlib.machinery import PathFinder
from pathlib import Path


def _extension() -> Path | None:
    """Found without an import of torch, which takes longer than all the rest."""
    package = util.find_spec("torchce")
    spec = package and PathFinder.find_spec("torchce._cuda", package.submodule_search_locations)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _tool(name: str) -> str | None:
    """A CUDA toolkit's, or the one triton brings."""
    triton = util.find_spec("triton")
    places = (
        [] if triton is None else [str(Path(p, "backends/nvidia/bin")) for p in triton.submodule_search_locations or []]
    )
    return next(filter(None, (shutil.which(name, path=place) for place in (None, *places))), None)


EXTENSION, CUOBJDUMP, NVDISASM = _extension(), _tool("cuobjdump"), _tool("nvdisasm")
ARCH = "sm_90"  # of the budgets


def dump(*options: str, binary: Path | None = EXTENSION) -> str:
    """What cuobjdump says of the extension, or of a cubin."""
    command = [str(CUOBJDUMP), *options, str(binary)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def resources(binary: Path | None = EXTENSION) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, symbol) -> REG, STACK, LOCAL, SHARED, ... of each kernel."""
    result = {}
    arch, symbol = ARCH, ""  # of a cubin no architecture is printed
    for line in dump("-res-usage", binary=binary).splitlines():
        if found := re.match(r"\s*arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):$", line):
            symbol = found[1]
        elif "REG:" in line:
            result[arch, symbol] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    return result


def functions(cubin: bytes) -> Iterator[tuple[str, int]]:
    """The functions in a cubin, which is a 64-bit ELF file: (symbol, its index in the symbol table)."""
    (start,) = struct.unpack_from("<Q", cubin, 40)  # of the section headers
    size, count = struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQII", cubin, start + i * size) for i in range(count)]
    for _, kind, _, _, offset, length, names, _ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        for index in range(length // 24):
            name, info = struct.unpack_from("<IB", cubin, offset + index * 24)
            if info & 15 == 2:  # STT_FUNC
                first = sections[names][4] + name
                yield cubin[first : cubin.index(b"\0", first)].decode(), index


@cache
def _cubins(binary: Path | None) -> list[bytes]:
    """Those for ARCH in the binary, which may be one itself."""
    if binary is not None and binary.suffix == ".cubin":
        return [binary.read_bytes()]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([str(CUOBJDUMP), "-xelf", ARCH, str(binary)], check=True, capture_output=True, cwd=folder)
        return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


def compiler(binary: Path | None = EXTENSION) -> str:
    """The version of the CUDA compiler that made the kernels."""
    versions = {found for cubin in _cubins(binary) for found in re.findall(rb"release [\d.]+, V([\d.]+)", cubin)}
    return b" and ".join(sorted(versions)).decode()


def disassemble(symbols: Iterable[str], binary: Path | None = EXTENSION) -> dict[str, str]:
    """SASS of these kernels; of all would take half a minute."""
    wanted, result = set(symbols), {}
    for cubin in _cubins(binary):
        indices = [str(index) for symbol, index in functions(cubin) if symbol in wanted]
        if not indices:
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [str(NVDISASM), "-c", "-fun", ",".join(indices), file.name]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
        result |= dict(zip(parts[1::2], parts[2::2], strict=True))
    return result
