"""What `python -m benchmarks.readme` makes of the ledgers, and builds of torchce measured beside each other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmarks print with rich")
pytest.importorskip("matplotlib", reason="the benchmarks draw with matplotlib")

from benchmark_rows import ENVIRONMENT, ROWS, row

import torchce
from benchmarks import ledger, readme, variants
from benchmarks.problems import KL_DIV, LINEAR_CROSS_ENTROPY


def test_readme_is_made_from_the_ledger_alone(tmp_path: Path) -> None:
    results = tmp_path / "results"
    page = tmp_path / "README.md"
    markers = "<!-- benchmarks:begin -->\ntyped by hand\n<!-- benchmarks:end -->"
    page.write_text(f"# Title\n\n{markers}\n\nThe end.\n")

    assert readme.update(page, results)
    empty = page.read_text()
    assert empty.count(readme.NOT_MEASURED.capitalize()) == 2
    assert "| CE" not in empty
    assert not readme.update(page, results)

    head = {"op": LINEAR_CROSS_ENTROPY, "size": "512x128x32000"}
    times = {"torchce": 0.3, "torchce in place": 0.25, "eager": 0.9, "torch chunked": 0.6}
    linear = [row(contender, median, **head) for contender, median in times.items()]
    ledger.save(results / "some-cpu" / ledger.FILE, [*ROWS, *linear])
    assert readme.update(page, results)
    text = page.read_text()
    expected = "| linear CE 512x128x32000 | float32 | 300 ms | 250 ms | 900 ms | - | 600 ms | 2.0x | 2.4x |"
    assert expected in text
    assert "| CE 512x32000 | float32 | 20 ms | 10 ms | 80 ms | 50 ms | 2.5x | 5.0x | 62 MiB | 4 KiB |" in text
    assert f"| CE 512x32000 | bfloat16 | {readme.NOT_MEASURED} |" in text
    assert text.count(readme.NOT_MEASURED.capitalize()) == 1  # CUDA
    assert ENVIRONMENT["commit"] in text
    assert "typed by hand" not in text
    assert text.startswith("# Title\n")
    assert text.endswith("The end.\n")


def test_readme_shows_divergences_once_they_are_measured(tmp_path: Path) -> None:
    results = tmp_path / "results"
    page = tmp_path / "README.md"
    page.write_text("<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\n")
    ledger.save(results / "some-cpu" / ledger.FILE, ROWS)
    assert readme.update(page, results)
    assert "| KL" not in page.read_text()

    times = {"torchce": 0.02, "eager": 0.09, "compile": 0.05}
    kl = [row(contender, median, op=KL_DIV) for contender, median in times.items()]
    unsupported = row("torchce in place", None, op=KL_DIV, peak_bytes=None, note="overwrites nothing")
    ledger.save(results / "some-cpu" / ledger.FILE, [*ROWS, *kl, unsupported])
    assert readme.update(page, results)
    text = page.read_text()
    assert "| problem | dtype | torchce | eager | compile | speed-up | memory |" in text
    assert "| KL 512x32000 | float32 | 20 ms | 90 ms | 50 ms | 2.5x | 62 MiB |" in text
    assert f"| entropy 512x32000 | float32 | {readme.NOT_MEASURED} | - | - | - | - |" in text
    assert not readme.update(page, results)


def test_the_measured_section_is_made_from_the_cuda_ledger(tmp_path: Path) -> None:
    page = tmp_path / "cuda.md"
    page.write_text("<!-- measured:begin -->\n<!-- measured:end -->\n")
    ledger.save(tmp_path / "results" / "some-cpu" / ledger.FILE, ROWS)  # no CUDA row: nothing of it shows
    assert readme.update(page, tmp_path / "results")
    assert readme.NOT_MEASURED.capitalize() in page.read_text()

    environment = {**ENVIRONMENT, "device": "cuda", "name": "NVIDIA Test 9000"}
    times = {"forward": {"torchce": 0.004, "copy": 0.003}, "backward": {"torchce": 0.006}}
    times["forward+backward"] = {
        "torchce": 0.010,
        "torchce forward_backward": 0.008,
        "copy": 0.006,
        "eager": 0.04,
        "QuACK": 0.02,
    }
    rows = [
        row(contender, median, phase=phase, environment=environment)
        for phase, medians in times.items()
        for contender, median in medians.items()
    ]
    ledger.save(tmp_path / "results" / "nvidia-test-9000" / ledger.FILE, rows)
    assert readme.update(page, tmp_path / "results")
    expected = "| CE 512x32000 | float32 | 4 ms (75%) | 6 ms | 8 ms (75%) | 4.00x | - | - | 2.00x |"
    assert expected in page.read_text().splitlines()
    assert "NVIDIA Test 9000" in page.read_text()
    assert not readme.update(page, tmp_path / "results")


def test_every_page_with_a_section_has_its_markers() -> None:
    for name, (marker, _) in readme.SECTIONS.items():
        text = (ledger.ROOT / name).read_text()
        assert text.index(f"<!-- {marker}:begin -->") < text.index(f"<!-- {marker}:end -->")


def test_readme_without_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="benchmarks:begin"):
        readme.update(page, tmp_path)
    assert page.read_text() == "# Title\n"


def test_builds_are_measured_in_turn_each_in_a_process_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = []
    for name in ("baseline", "tuned"):
        shutil.copytree(Path(torchce.__file__).parent, tmp_path / name / "torchce")
        named.append(f"{name}={tmp_path / name}")
    options = ["--device", "cpu", "--size", "32x10", "--seconds", "0"]
    assert variants.main([*named, *options]) == 0
    shown = capfd.readouterr().out
    assert re.search(r"^tuned / baseline, CE 32x10 float32: forward \d+\.\d\dx \(.* -> .*, \d+% of copy\)", shown, re.M)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="expected torchce in"):
        variants.main([f"other={tmp_path / 'empty'}", named[0], *options])


def test_of_all_turns_the_fastest_counts() -> None:
    def turn(median: float | None) -> list[dict[str, Any]]:
        return [{"phase": "forward", "contender": "torchce", "median": median}]

    before, after = variants.fastest([turn(0.004), turn(0.003)]), variants.fastest([turn(None), turn(0.002)])
    copy = {("forward", "copy"): 0.0018}
    assert variants.compared({**before, **copy}, after) == "forward 1.50x (3 ms -> 2 ms, 90% of copy)"
