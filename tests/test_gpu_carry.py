"""What travels to a GPU machine without a network: collected, unpacked, recognised again; with made-up wheels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gpu import carry, libraries

from benchmarks import revision


def wheel(folder: Path, name: str, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as content:
        for file, text in {f"{name}-1.0.dist-info/METADATA": f"Name: {name}\nVersion: 1.0\n", **files}.items():
            content.writestr(file, text)
    return path


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """carry's folders, in a folder of the test's own."""
    for name, path in {"WORK": "work", "FOLDER": ".gpu", "PACKAGES": ".gpu/packages.tar.xz"}.items():
        monkeypatch.setattr(carry, name, tmp_path / path)
    for name, path in {"LIBRARIES": ".gpu/libraries.tar.xz", "VARIANTS": ".gpu/variants"}.items():
        monkeypatch.setattr(carry, name, tmp_path / path)
    return tmp_path


def test_packages_are_importable_where_they_were_unpacked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(python: str, wheels: Path) -> None:
        wheel(wheels, "quick", **{"quick/__init__.py": "WORD = 'quick'"})
        inner = carry.SEARCHED[1]
        wheel(wheels, "deep", **{f"{inner}/deep.py": "WORD = 'deep'", "deep.pth": inner})

    monkeypatch.setattr(carry, "download", download)
    carry.carry_packages(sys.executable)
    site = place / "site"
    assert carry.main(["--unpack", str(carry.PACKAGES), str(site)]) == 0
    code = "import quick, deep; from importlib import metadata; print(quick.WORD, deep.WORD, metadata.version('quick'))"
    paths = ":".join(str(site / folder) for folder in carry.SEARCHED)
    shown = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": paths}, capture_output=True, check=True)
    assert shown.stdout.split() == [b"quick", b"deep", b"1.0"]

    monkeypatch.setattr(carry, "download", lambda *_: pytest.fail("the list has not changed"))
    carry.carry_packages(sys.executable)


def test_the_same_packages_give_the_same_archive(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "quick", **{"quick.py": "WORD = 'quick'"})
    archives = [tmp_path / "a.tar.xz", tmp_path / "b.tar.xz"]
    for archive in archives:
        carry.pack_wheels(tmp_path / "wheels", archive)
    first, second = (archive.read_bytes() for archive in archives)
    assert first == second


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"quick-1.0.data/purelib/quick.py": ""}, "has to be installed"),
        ({"quick.pth": "somewhere/else\n"}, "somewhere/else"),
    ],
)
def test_wheels_that_unpacking_does_not_install_are_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    wheel(tmp_path / "wheels", "quick", **files)
    with pytest.raises(carry.CannotCarry, match=words):
        carry.pack_wheels(tmp_path / "wheels", tmp_path / "packages.tar.xz")


def test_sizes_are_printed_and_judged(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    carry.FOLDER.mkdir()
    (carry.FOLDER / "packages.tar.xz").write_bytes(bytes(3 << 20))
    assert carry.report(carry.FOLDER) == 3 << 20
    assert "3.00 MiB  .gpu/packages.tar.xz" in capsys.readouterr().out
    monkeypatch.setattr(carry, "carry_variant", lambda *_: None)
    monkeypatch.setattr(carry, "report", lambda: carry.MOST_BYTES + 1)
    assert carry.main(["--variant", "tuned"]) == 1


@pytest.mark.skipif(not (carry.ROOT / ".git").exists(), reason="not a git repository")
def test_a_variant_is_another_revisions_package(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(python: str, arch: str, source: Path, work: Path) -> list[Path]:
        assert (source / "csrc" / "schemas.h").is_file()
        library = work / "_C.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        library.write_bytes(str(source).encode())
        return [library]

    monkeypatch.setattr(carry, "build", build)
    carry.carry_variant(sys.executable, "9.0", "baseline", "HEAD")
    carry.carry_variant(sys.executable, "9.0", "tuned", None)
    for name, source in {"baseline": place / "work/variants/baseline/source", "tuned": carry.ROOT}.items():
        carry.unpack(carry.VARIANTS / f"{name}.tar.xz", place / name)
        assert (place / name / "torchce" / "_C.so").read_text() == str(source)
        assert (place / name / "torchce" / "ops.py").is_file()
        assert (place / name / "commit.txt").read_text().strip().removesuffix("-changed") == revision.git(
            carry.ROOT, "rev-parse", "--short=12", "HEAD"
        )
    with pytest.raises(carry.CannotCarry, match="no-such-revision"):
        carry.carry_variant(sys.executable, "9.0", "third", "no-such-revision")


# --- which revision it is ---------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of a few sources, without their history."""
    root = tmp_path / "copy"
    (root / "torchce").mkdir(parents=True)
    (root / "csrc").mkdir()
    (root / "torchce" / "ops.py").write_text("one\n")
    (root / "csrc" / "ops.h").write_text("two\n")
    (root / "setup.py").write_text("three\n")
    return root


def tell(root: Path, **said: str) -> None:
    path = root / revision.CARRIED
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(said))


def test_the_commit_is_known_where_no_git_is(sources: Path) -> None:
    assert revision.commit(sources) == "unknown"
    tell(sources, commit="0123456789ab", sources=revision.digest(sources))
    (sources / "torchce" / "_C.so").write_bytes(b"not a source")
    assert revision.commit(sources) == "0123456789ab"


@pytest.mark.parametrize("name", ["torchce/ops.py", "csrc/ops.h", "setup.py", "csrc/new.cu"])
def test_a_change_after_the_collection_is_seen(sources: Path, name: str) -> None:
    tell(sources, commit="0123456789ab", sources=revision.digest(sources))
    (sources / name).write_text("changed\n")
    assert revision.commit(sources) == "0123456789ab-changed"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_knows_better_than_what_travelled(sources: Path) -> None:
    tell(sources, commit="0123456789ab", sources=revision.digest(sources))
    git = ["git", "-C", str(sources), "-c", "user.name=x", "-c", "user.email=x@y"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    assert revision.commit(sources) == head.stdout.strip()
    (sources / "setup.py").write_text("changed\n")
    assert revision.commit(sources) == f"{head.stdout.strip()}-changed"


# --- the libraries that travelled -------------------------------------------------------------------------------------


@pytest.fixture
def travelled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Libraries of these sources; returns where they are unpacked."""
    archive, root = tmp_path / "libraries.tar.xz", tmp_path / "root"
    library = tmp_path / "_C.so"
    library.write_bytes(b"library")
    carry.pack(archive, [("torchce/_C.so", library)])
    monkeypatch.setattr(libraries, "LIBRARIES", archive)
    monkeypatch.setattr(libraries, "ROOT", root)
    monkeypatch.setattr(libraries, "carried", lambda: {"compiled": revision.digest(names=revision.COMPILED)})
    return root


def test_libraries_that_travelled_are_taken_if_they_run(travelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "run", lambda device: None)
    assert libraries.why_not_carried("cuda") is None
    assert (travelled / "torchce" / "_C.so").read_bytes() == b"library"
    monkeypatch.setattr(libraries, "run", lambda device: "GLIBC_2.38 not found")
    assert libraries.why_not_carried("cuda") == "GLIBC_2.38 not found"


def test_libraries_that_did_not_arrive_whole_are_not_unpacked(travelled: Path) -> None:
    whole = libraries.LIBRARIES.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        libraries.LIBRARIES.write_bytes(whole[:size])
        assert "libraries.tar.xz is damaged" in (libraries.why_not_carried("cuda") or "")
        with pytest.raises(SystemExit, match="damaged"):
            carry.main(["--unpack", str(libraries.LIBRARIES), str(travelled)])
    assert not travelled.exists()


def test_libraries_of_other_sources_are_not_unpacked(travelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "carried", lambda: {"compiled": "of another day"})
    assert "other sources" in (libraries.why_not_carried("cuda") or "")
    assert not travelled.exists()
    monkeypatch.setattr(libraries, "LIBRARIES", travelled / "nowhere.tar.xz")
    assert libraries.why_not_carried("cuda") == "none came along"


@pytest.mark.parametrize(("built", "expected"), [(0, 0), (1, 1)])
def test_libraries_are_built_where_the_others_do_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], built: int, expected: int
) -> None:
    monkeypatch.setattr(libraries, "why_not_carried", lambda device: "none came along")
    monkeypatch.setattr(libraries, "build", lambda: built)
    monkeypatch.setattr(libraries, "run", lambda device: None)
    monkeypatch.setattr(sys, "argv", ["libraries"])
    assert libraries.main() == expected
    assert "building: none came along" in capsys.readouterr().out


def test_a_kernel_of_this_build_runs() -> None:
    assert libraries.run("cpu") is None
