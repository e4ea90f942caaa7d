"""The examples: real data as they say, two trainings that agree, and a measurement that sees what a loss allocates."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import torchce
from examples import digits, glyphs, tokens
from examples.command import main
from examples.training import default_device, peak_bytes, train


@pytest.fixture(autouse=True)
def _one_thread(restore_threads: None) -> None:
    """Models this small gain nothing from more, and where all cores are busy lose seconds waiting for them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def files() -> Iterator[list[Path]]:
    """One font and the first files only: as real, and read in a second. The value is all files."""
    every = tokens.files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "FONTS", ("DejaVuSansMono",))
        patch.setattr(tokens, "files", lambda: every[:20])
        yield every


@pytest.mark.parametrize("example", [digits, glyphs, tokens], ids=["digits", "glyphs", "tokens"])
def test_trains_alike(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["--steps", "4", "--device", "cpu", "--output", str(picture)]
    (result,) = main(example.task, description=example.__doc__, arguments=arguments)

    theirs, ours = result.runs["torch"], result.runs["torchce"]
    assert type(ours.loss).__module__.startswith("torchce")
    assert type(theirs.loss).__module__.startswith("torch.nn")
    assert len(ours.curve) == len(theirs.curve) == 4
    assert ours.curve[-1] < ours.curve[0]
    assert max(result.differences) < 1e-5
    assert ours.score == pytest.approx(theirs.score, abs=0.01)
    assert 0 < ours.loss_bytes < theirs.loss_bytes
    assert 0 < ours.loss_share < 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert result.task.summary in printed
    assert f"{max(result.differences):.1e}" in printed


@pytest.mark.parametrize("example", [digits, glyphs, tokens], ids=["digits", "glyphs", "tokens"])
def test_help(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(example.task, description=example.__doc__, arguments=["--help"])
    printed = capsys.readouterr().out
    assert example.__doc__ is not None
    assert example.__doc__.splitlines()[0] in printed
    assert re.search(r"--output.*demo\.png", printed, re.DOTALL)


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--device", "meta"]])
def test_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(digits.task, description="", arguments=arguments)
    assert f"{arguments[0]}: " in capsys.readouterr().err


def test_the_seed_decides() -> None:
    task = digits.task()
    curves = []
    for seed in (1, 1, 2):
        *_, result = train(task, torch.device("cpu"), steps=3, seed=seed)
        curves.append(result.runs["torchce"].curve)
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_digits_are_learnt() -> None:
    *_, result = train(digits.task(), default_device(), steps=100, seed=0)
    assert result.constant_score < 0.2
    for run in result.runs.values():
        assert run.score > 0.85


def test_digits_data() -> None:
    task = digits.task()
    assert len(task.train[0]) + len(task.held_out[0]) == 1797
    for images, labels in (task.train, task.held_out):
        assert images.min() == 0
        assert images.max() == 1
        assert labels.unique().tolist() == list(range(10))


def test_glyphs_data() -> None:
    codes, images = glyphs.pictures()
    vocabulary, target = glyphs.words(codes)
    assert images.shape == (len(codes), 1, glyphs.SIZE, glyphs.SIZE)
    assert target.shape == (len(codes), len(vocabulary))
    assert images.max() == 1
    assert target.sum(0).min() >= glyphs.RAREST
    for character in "é∀Ж":
        said = {vocabulary[index] for index in target[codes.index(ord(character))].nonzero().flatten().tolist()}
        assert said == set(unicodedata.name(character).split()) & set(vocabulary)
    assert images[codes.index(ord("|"))].sum() < images[codes.index(ord("W"))].sum()
    assert images[codes.index(ord(" "))].sum() == 0


def test_no_held_out_character_is_trained_on() -> None:
    codes = list(range(65, 165)) + list(range(95, 195))  # two fonts that share 70 characters
    kept = glyphs.held_out(codes)
    held_out = {code for code, is_kept in zip(codes, kept.tolist(), strict=True) if is_kept}
    trained = {code for code, is_kept in zip(codes, kept.tolist(), strict=True) if not is_kept}
    assert len(held_out) == 13
    assert held_out.isdisjoint(trained)


def test_f1() -> None:
    target = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert glyphs.f1(torch.tensor([[1.0, -1.0, 1.0, -1.0]]), target) == (2, 4)  # one hit, one miss, one false alarm
    assert glyphs.f1(2 * target - 1, target) == (4, 4)


def test_tokens_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text('def f():\n    return "two words"  # why\n')
    expected = 'def f ( ) : <NEWLINE> <INDENT> return " two words " # why <NEWLINE> <DEDENT> <ENDMARKER>'
    assert list(tokens.tokens(path)) == expected.split()


def test_tokens_data(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "VOCABULARY", 50)
    task = tokens.task()
    windows, following = task.train
    assert windows.shape == (len(following), tokens.CONTEXT)
    assert torch.equal(windows[1:, -1], following[:-1])
    assert following.max() == 49
    assert {"tokenize.py", "dataclasses.py"} <= {path.name for path in files}
    assert not any({"test", "site-packages"} & set(path.parts) for path in files)


def test_peak_bytes() -> None:
    def function() -> torch.Tensor:
        first = torch.empty(1000)
        second = first.clone()  # 8000 bytes at once
        del first
        return second[:10].clone()

    assert peak_bytes(function, torch.device("cpu")) == 8000


@pytest.mark.cuda
def test_peak_bytes_cuda() -> None:
    size = 1 << 20
    assert peak_bytes(lambda: torch.empty(size, dtype=torch.uint8, device="cuda"), torch.device("cuda")) == size


def test_peak_bytes_sees_both_libraries() -> None:
    """What is known of the losses: torch holds log-probabilities and two gradients, torchce the gradient it returns."""
    logits = torch.randn(64, 1000, requires_grad=True)
    target = torch.zeros(64, dtype=torch.int64)

    def buffers(loss: nn.Module) -> float:
        def function() -> object:
            return torch.autograd.grad(loss(logits, target), logits)

        return peak_bytes(function, torch.device("cpu")) / (logits.numel() * logits.element_size())

    assert buffers(nn.CrossEntropyLoss()) == pytest.approx(3, rel=0.01)
    assert buffers(torchce.CrossEntropyLoss()) == pytest.approx(1, rel=0.01)
