"""``make gpu-carry``, ``make variant``: all that a GPU machine without a network needs, in one folder.

    .gpu/revision.json        the commit, and digests of the sources that it stands for
    .gpu/libraries.tar.xz     torchce's libraries, built with a Python and a torch like the machine's
    .gpu/packages.tar.xz      the packages of benchmarks/peers.txt, unpacked as on an import path
    .gpu/variants/NAME.tar.xz another revision's package with its libraries

``make gpu`` unpacks them. The folder is ignored by git: it has to be copied along with the files that are not.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from benchmarks import revision
from benchmarks.variants import COMMIT
from gpu.steps import ROOT

FOLDER = ROOT / ".gpu"
REVISION = ROOT / revision.CARRIED
LIBRARIES = FOLDER / "libraries.tar.xz"
PACKAGES = FOLDER / "packages.tar.xz"
VARIANTS = FOLDER / "variants"
LIST = ROOT / "benchmarks" / "peers.txt"
WORK = ROOT / "build" / "gpu"
SITE = WORK / "site"  # where the packages are unpacked
# .pth files, which name more folders, are read in Python's own folder alone: these go to PYTHONPATH.
SEARCHED = ("", "nvidia_cutlass_dsl/python_packages")
MOST_BYTES = 60 << 20
# pip matches the minor version exactly, and a wheel for an older system library runs beside a newer one.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 37)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


class CannotCarry(Exception):
    """Something that must travel is not to be had; the message says what."""


def pack(archive: Path, files: Iterable[tuple[str, Path]]) -> None:
    """Writes (name, file) pairs; the same files give the same archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_suffix(".tmp")
    with lzma.open(unfinished, "wb", preset=9) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for name, path in sorted(files):
            content = path.read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755 if os.access(path, os.X_OK) else 0o644
            tar.addfile(entry, io.BytesIO(content))
    unfinished.replace(archive)


def unpack(archive: Path, folder: Path) -> None:
    """All of it, or nothing.

    Raises:
        CannotCarry: it did not arrive whole.
    """
    try:
        content = lzma.decompress(archive.read_bytes())
    except lzma.LZMAError as error:
        raise CannotCarry(f"{archive.name} is damaged: {error}") from None
    extract(io.BytesIO(content), folder)


def extract(content: BinaryIO, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=content) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def tree(folder: Path) -> list[tuple[str, Path]]:
    return [(path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file()]


def download(python: str, wheels: Path) -> None:
    """The wheels of peers.txt for that interpreter, through pip."""
    version = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", version, *platforms]
    if subprocess.run([*command, "-d", str(wheels), "-r", str(LIST)], check=False).returncode != 0:
        raise CannotCarry(f"pip found no wheel for a package of {LIST.name}; see above")


def pack_wheels(wheels: Path, archive: Path) -> None:
    """Unpacked and packed together: xz makes a third less of them than zip does."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise CannotCarry(f"no wheels in {wheels}")
    site = wheels.parent / "unpacked"
    shutil.rmtree(site, ignore_errors=True)
    for wheel in found:
        with zipfile.ZipFile(wheel) as content:
            if any(".data/purelib" in name or ".data/platlib" in name for name in content.namelist()):
                raise CannotCarry(f"{wheel.name} keeps modules in .data: it has to be installed, not unpacked")
            content.extractall(site)
    for file in site.glob("*.pth"):
        if not set(file.read_text().split()) <= set(SEARCHED):
            raise CannotCarry(f"{file.name} names a folder that SEARCHED lacks: {file.read_text().strip()}")
    pack(archive, tree(site))
    shutil.rmtree(site)


def carry_packages(python: str) -> None:
    """Anew only if the list has changed: compressing takes minutes."""
    stamp = WORK / "packages.stamp"
    key = hashlib.sha256(f"{python} {LIST.read_text()}".encode()).hexdigest()
    if PACKAGES.exists() and stamp.exists() and stamp.read_text() == key:
        return
    wheels = WORK / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    download(python, wheels)
    pack_wheels(wheels, PACKAGES)
    stamp.write_text(key)


def build(python: str, arch: str, source: Path, work: Path) -> list[Path]:
    """The libraries of the sources there, by that interpreter."""
    environment = {**os.environ, "TORCHCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
    library = work / "lib"
    shutil.rmtree(library, ignore_errors=True)
    command = [
        python,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-temp",
        str(work / "temp"),
        "--build-lib",
        str(library),
    ]
    if subprocess.run(command, cwd=source, env=environment, check=False).returncode != 0:
        raise CannotCarry(f"{python} could not build torchce; see above")
    return sorted(library.glob("torchce/*.so"))


def package(source: Path) -> list[tuple[str, Path]]:
    """The Python files of torchce."""
    return [
        (f"torchce/{name}", path) for name, path in tree(source / "torchce") if path.suffix in {".py", ".pyi", ".typed"}
    ]


def carry_libraries(python: str, arch: str) -> None:
    built = build(python, arch, ROOT, WORK / "libraries")
    pack(LIBRARIES, [(f"torchce/{path.name}", path) for path in built])
    said = {"sources": revision.digest(), "compiled": revision.digest(names=revision.COMPILED)}
    REVISION.write_text(json.dumps({"commit": revision.commit(), **said}) + "\n")


def carry_variant(python: str, arch: str, name: str, wanted: str | None) -> None:
    """The revision of that name; without one, the files as they are."""
    work, source, commit = WORK / "libraries", ROOT, revision.commit()
    if wanted is not None:
        work = WORK / "variants" / name
        shutil.rmtree(work, ignore_errors=True)  # git's files are as old as the commit: ninja would take them for built
        source = work / "source"
        archive = subprocess.run(["git", "archive", wanted], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode != 0:
            raise CannotCarry(f"{wanted}: {archive.stderr.decode().strip()}")
        extract(io.BytesIO(archive.stdout), source)
        commit = revision.git(ROOT, "rev-parse", "--short=12", wanted) or wanted
    built = build(python, arch, source, work)
    said = work / COMMIT
    said.write_text(f"{commit}\n")
    files = [*package(source), *((f"torchce/{path.name}", path) for path in built), (COMMIT, said)]
    pack(VARIANTS / f"{name}.tar.xz", files)


def report(folder: Path = FOLDER) -> int:
    """Sizes, and whether they are small enough together."""
    sizes = {name: path.stat().st_size for name, path in sorted(tree(folder))}
    for name, size in sizes.items():
        print(f"{size / (1 << 20):7.2f} MiB  {folder.name}/{name}")
    total = sum(sizes.values())
    print(f"{total / (1 << 20):7.2f} MiB  in all, at most {MOST_BYTES >> 20}")
    return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpu.carry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="an interpreter and torch like the GPU machine's")
    parser.add_argument("--arch", default="9.0", help="compute capability of the GPU (default: 9.0)")
    parser.add_argument("--no-packages", action="store_true", help="without the peers")
    parser.add_argument("--unpack", nargs=2, type=Path, metavar=("ARCHIVE", "FOLDER"), help="and do nothing else")
    parser.add_argument("--variant", metavar="NAME", help="build that variant and nothing else")
    parser.add_argument("--revision", metavar="REV", help="of the variant (default: the files as they are)")
    options = parser.parse_args(argv)
    python = shutil.which(options.python) or options.python
    try:
        if options.unpack:
            unpack(*options.unpack)
            return 0
        if options.variant:
            carry_variant(python, options.arch, options.variant, options.revision)
        else:
            if options.no_packages:
                PACKAGES.unlink(missing_ok=True)
            else:
                carry_packages(python)
            carry_libraries(python, options.arch)
    except (CannotCarry, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"make gpu-carry: {error}") from None
    return 0 if report() <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
