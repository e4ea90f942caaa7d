"""Characters named by sight: from the picture of a character, the words of its Unicode name, with binary cross entropy.

The pictures are the glyphs of the DejaVu and STIX fonts that matplotlib ships; the names are Python's ``unicodedata``.
Each character has several words, and each word many characters: the picture of U+00E9 is to give LATIN, SMALL, LETTER,
E, WITH and ACUTE. Held out are characters, in every font they have, so a name is never seen in one font and asked for
in another. No model gets all of them right: Latin, Greek and Cyrillic have letters that look the same.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from torch import Tensor, nn

import torchce
from examples.command import main
from examples.training import Task

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
SIZE = 32  # pixels; at 20 a line, nearly every glyph fits
RAREST = 10  # a word of fewer characters than this has too few examples to be learnt


def words(codes: list[int]) -> tuple[list[str], Tensor]:
    """The common words of characters' names, and which of them each of ``codes`` has, ``[len(codes), words]``."""
    words_of = {code: set(unicodedata.name(chr(code)).replace("-", " ").split()) for code in codes}
    counts = Counter(word for words in words_of.values() for word in words)
    vocabulary = sorted(word for word, count in counts.items() if count >= RAREST)
    rows = {code: torch.tensor([float(word in words) for word in vocabulary]) for code, words in words_of.items()}
    return vocabulary, torch.stack([rows[code] for code in codes])


def picture(font: FT2Font, code: int) -> np.ndarray:
    """``[SIZE, SIZE]`` uint8, the glyph in the middle, cut where it is larger."""
    font.set_text(chr(code))
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = np.asarray(font.get_image())[:SIZE, :SIZE]
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    top, left = (SIZE - ink.shape[0]) // 2, (SIZE - ink.shape[1]) // 2
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return canvas


def pictures() -> tuple[list[int], Tensor]:
    """The code point of every glyph of every font, and its picture, ``[glyphs, 1, SIZE, SIZE]`` in [0, 1]."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    codes, images = [], []
    for name in FONTS:
        font = FT2Font(str(folder / f"{name}.ttf"))
        font.set_size(20, 72)
        for code in sorted(font.get_charmap()):
            if unicodedata.name(chr(code), None) is not None:
                codes.append(code)
                images.append(picture(font, code))
    return codes, torch.from_numpy(np.stack(images)).unsqueeze(1) / 255


def f1(logits: Tensor, target: Tensor) -> tuple[int, int]:
    """2 tp / (2 tp + fp + fn) over all words; accuracy would flatter, for hardly any word is in a given name."""
    said, true = logits > 0, target > 0
    return 2 * int((said & true).sum()), int(said.sum() + true.sum())


def network(frequency: Tensor) -> nn.Module:
    """``[N, 1, SIZE, SIZE]`` to ``[N, words]``; ``frequency`` is how often each word occurs, ``[words]``.

    GELU and not ReLU, whose kink lets a difference of one rounding grow from step to step: this network with ReLU ends
    with curves 3e-4 apart, with GELU 1e-8.
    """
    layers: list[nn.Module] = []
    for channels, more in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels, more, 3, stride=2, padding=1), nn.GroupNorm(4, more), nn.GELU()]
    last = nn.Linear(64 * (SIZE // 8) ** 2, len(frequency))
    with torch.no_grad():  # start from how rare the words are, else the first hundred steps only learn that
        last.bias.copy_(frequency.logit(eps=1e-4))
    return nn.Sequential(*layers, nn.Flatten(), last)


def held_out(codes: list[int]) -> Tensor:
    """Which glyphs are kept from training, ``[len(codes)]``: every one of a tenth of the characters."""
    characters = sorted(set(codes))
    order = torch.randperm(len(characters), generator=torch.Generator().manual_seed(0))
    kept = {characters[index] for index in order[: len(characters) // 10].tolist()}
    return torch.tensor([code in kept for code in codes])


def task() -> Task:
    codes, images = pictures()
    vocabulary, target = words(codes)
    test = held_out(codes)
    train = ~test
    # As many of the commonest words as a name has on average: about the best one can say without looking.
    frequency = target[train].mean(0)
    usual = frequency.sort(descending=True).values[round(float(frequency.sum()))]
    return Task(
        name="glyphs",
        summary=f"glyphs to the words of their names, {len(vocabulary)} labels",
        model=lambda: network(frequency),
        losses={"torch": nn.BCEWithLogitsLoss(), "torchce": torchce.BCEWithLogitsLoss()},
        train=(images[train], target[train]),
        held_out=(images[test], target[test]),
        constant=frequency - usual,
        batch_size=256,
        steps=400,
        learning_rate=6e-3,
        score_name="F1 of words",
        tally=f1,
    )


if __name__ == "__main__":
    main(task, description=__doc__)
