"""The examples: real data as they say, trainings that agree, and a measurement that sees what a loss allocates."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import torchce
from examples import digits, distillation, glyphs, information, tokens, vocabulary
from examples.command import main
from examples.heads import HEADS
from examples.picture import bars
from examples.training import Result, default_device, loss_and_gradients, peak_bytes, train


@pytest.fixture(autouse=True)
def _one_thread(restore_threads: None) -> None:
    """Models this small gain nothing from more, and where all cores are busy lose seconds waiting for them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def files() -> Iterator[list[Path]]:
    """One font, the first files only, one teacher: as real, and ready in a second. The value is all files."""
    every = tokens.files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "FONTS", ("DejaVuSansMono",))
        patch.setattr(tokens, "files", lambda: every[:20])
        patch.setattr(distillation, "taught", cache(distillation.taught))
        yield every


TRAINED = [digits, distillation, glyphs, tokens]


@pytest.mark.parametrize("example", TRAINED, ids=lambda example: example.__name__)
def test_trains_alike(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    steps = 40 if example is distillation else 4  # softened by a temperature, a loss falls slowly at first
    arguments = ["--steps", str(steps), "--device", "cpu", "--output", str(picture)]
    (result,) = main(example.task, description=example.__doc__, arguments=arguments)

    fused_too = ["torchce linear"] if example is tokens else []
    assert list(result.runs) == ["torch", "torchce", *fused_too]
    theirs, *all_ours = result.runs.values()
    assert max(result.differences) < 1e-5
    for ours in all_ours:
        assert len(ours.curve) == len(theirs.curve) == steps
        assert ours.curve[-1] < ours.curve[0]
        assert ours.score == pytest.approx(theirs.score, abs=0.01)
        assert 0 < ours.loss_share < 1
    memory = [run.loss_bytes for run in result.runs.values()]
    assert memory == sorted(set(memory), reverse=True)  # each run takes less than the one before
    assert memory[-1] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert result.task.summary in printed
    assert f"{max(result.differences):.1e}" in printed


@pytest.mark.parametrize("example", TRAINED, ids=lambda example: example.__name__)
def test_help(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(example.task, description=example.__doc__, arguments=["--help"])
    printed = capsys.readouterr().out
    assert example.__doc__ is not None
    assert example.__doc__.splitlines()[0] in printed
    assert re.search(r"--output.*demo\.png", printed, re.DOTALL)


def result_of(names: list[str]) -> Result:
    task = replace(digits.task(), losses=dict.fromkeys(names, nn.CrossEntropyLoss()))
    *_, result = train(task, torch.device("cpu"), steps=2, seed=0)
    return result


def test_differences_are_from_the_first_run() -> None:
    curves = {"torch": [1.0, 2.0], "torchce": [1.5, 2.0], "torchce linear": [0.75, 2.25]}
    result = result_of(list(curves))
    for name, curve in curves.items():
        result.runs[name].curve = curve
    assert result.differences == [0.5, 0.25]


def test_bars_of_tasks_with_and_without_a_run() -> None:
    results = [result_of(["torch", "torchce"]), result_of(["torch", "torchce", "torchce linear"])]
    axes = Figure().subplots()
    bars(axes, results, lambda run: run.loss_milliseconds, str)
    assert [len(of_run) for of_run in axes.containers] == [2, 2, 1]
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(right < left for (_, right), (left, _) in itertools.pairwise(edges))
    for index, count in enumerate((2, 3)):
        middles = [(left + right) / 2 for left, right in edges if abs((left + right) / 2 - index) < 0.5]
        assert len(middles) == count
        assert sum(middles) / count == pytest.approx(index)


def test_heads_are_alike() -> None:
    torch.manual_seed(0)
    layer = torch.randn(64, 16), torch.randn(500, 16), torch.randn(500)  # features, weight, bias
    target = torch.randint(500, (64,))
    expected = loss_and_gradients(HEADS["torch"], layer, target)
    for head in HEADS.values():
        torch.testing.assert_close(loss_and_gradients(head, layer, target), expected, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_is_the_head_too_gets_both_gradients() -> None:
    embedding = torch.randn(50, 8, requires_grad=True)
    target = torch.randint(50, (20,))
    outputs = embedding[:20].tanh(), embedding, torch.zeros(50, requires_grad=True)
    expected = torch.autograd.grad(HEADS["torch"](*outputs, target), embedding, retain_graph=True)[0]
    _, gradients = loss_and_gradients(HEADS["torch"], outputs, target)
    torch.autograd.backward(outputs, gradients)
    torch.testing.assert_close(embedding.grad, expected)


def test_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    sizes = ["--vocabularies", "1000", "24000", "--rows", "768", "--features", "4", "--repetitions", "1"]
    costs = vocabulary.main([*sizes, "--device", "cpu", "--output", str(picture)])
    assert list(costs) == [1000, 24000]
    for classes, of_heads in costs.items():
        assert list(of_heads) == list(HEADS)
        assert all(cost.milliseconds > 0 for cost in of_heads.values())
        logits_bytes = 768 * classes * 4
        assert of_heads["torchce linear"].bytes < of_heads["torchce"].bytes < of_heads["torch"].bytes
        assert logits_bytes < of_heads["torchce"].bytes
    assert costs[24000]["torchce linear"].bytes < 0.6 * logits_bytes  # the logits come in two pieces
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "768 rows of 4 features, float32" in printed
    assert "24,000" in printed


def test_vocabulary_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        vocabulary.main(["--help"])
    assert re.search(r"--output.*vocabulary\.png", capsys.readouterr().out, re.DOTALL)


VOCABULARY_OPTIONS = ["--vocabularies", "--rows", "--features", "--repetitions"]


@pytest.mark.parametrize("arguments", [["--dtype", "int64"], *([option, "0"] for option in VOCABULARY_OPTIONS)])
def test_vocabulary_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        vocabulary.main(arguments)
    assert f"{arguments[0]}: " in capsys.readouterr().err


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


def test_distillation_teaches_the_unseen() -> None:
    device = torch.device("cpu")
    images, labels = digits.task().held_out
    unseen = labels == distillation.UNSEEN
    shares = {}
    for task in (distillation.labels_task(), distillation.task()):
        *_, result = train(task, device, task.steps, seed=0)
        for name, run in result.runs.items():
            with torch.no_grad():
                guesses = run.model(images).argmax(1)
            shares[task.name, name] = float((guesses[unseen] == labels[unseen]).float().mean())
            assert (guesses[~unseen] == labels[~unseen]).float().mean() > 0.85
    assert shares["labels", "torch"] == shares["labels", "torchce"] == 0
    assert min(shares["distilled", "torch"], shares["distilled", "torchce"]) > 0.5


def test_distillation_data() -> None:
    whole, labelled, distilled = digits.task(), distillation.labels_task(), distillation.task()
    assert labelled.train[1].unique().tolist() == [digit for digit in range(10) if digit != distillation.UNSEEN]
    assert torch.equal(labelled.train[0], distilled.train[0])
    assert distilled.train[1].shape == (len(labelled.train[1]), 10)
    assert (distilled.train[1].argmax(1) == labelled.train[1]).float().mean() > 0.98
    for task in (labelled, distilled):
        assert all(map(torch.equal, task.held_out, whole.held_out))


def test_distillation_losses_are_alike() -> None:
    torch.manual_seed(0)
    student, teacher = 10 * torch.randn(64, 10), 10 * torch.randn(64, 10)
    theirs, ours = (loss_and_gradients(loss, (student,), teacher) for loss in distillation.task().losses.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_information(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    panels = information.main(["--device", "cpu", "--output", str(picture)])
    printed = capsys.readouterr().out
    for panel in panels:
        for name, difference in panel.identities.items():
            assert difference.numel() > 0
            assert difference.abs().max() < 1e-13
            assert name in printed
        for curve in panel.curves.values():
            assert curve.shape == panel.positions.shape
            assert curve.min() > -1e-15
    _, coin, moving, apart = panels
    assert coin.positions[coin.curves["H"].argmax()] == 0.5
    assert "H(P, Q) at 1.00, KL(P || Q) at 1.00" in printed
    assert moving.curves["H(P, Q)"].min().item() == pytest.approx(moving.level[1], abs=1e-13)
    assert 0.69 < apart.curves["JS(P, Q)"].max() <= information.LOG_2 < apart.curves["KL(P || Q)"].max()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_information_has_curves_of_the_seed() -> None:
    first, again, other = (information.moving(torch.device("cpu"), seed).curves["H(P, Q)"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_information_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        information.main(["--help"])
    assert re.search(r"--output.*information\.png", capsys.readouterr().out, re.DOTALL)


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
