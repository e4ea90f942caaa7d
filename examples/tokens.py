"""Source code: guessing the next token of Python's standard library, with cross entropy over 32,000 classes.

The text is the library of the running interpreter, its tests left out, tokenised with ``tokenize``; strings and
comments are split further into words and marks, since whole they would hardly ever occur twice. The model is the window
of Bengio et al. 2003 (A Neural Probabilistic Language Model, JMLR 3), with one embedding for input and output. Its last
layer is measured with the loss, so that torchce's loss of a linear layer stands beside the two libraries' losses of
logits. Every tenth file is held out.
"""

from __future__ import annotations

import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.command import main
from examples.heads import HEADS
from examples.training import Task, accuracy

VOCABULARY = 32_000
CONTEXT = 12
WIDTH = 32
HELD_OUT_WINDOWS = 4096

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
PLAIN = {tokenize.NAME, tokenize.OP, tokenize.NUMBER}
LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


def files() -> list[Path]:
    """The standard library's Python files, in an order that depends on nothing but their names."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if LEFT_OUT.isdisjoint(path.relative_to(root).parts))


def tokens(path: Path) -> Iterator[str]:
    """The tokens of one file, layout by its name in ``tokenize`` and the rest as written."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in PLAIN:
                yield token.string
            elif token.type in LAYOUT:
                yield f"<{tokenize.tok_name[token.type]}>"
            else:  # strings, comments and, from Python 3.12 on, the parts of f-strings
                yield from WORD_OR_MARK.findall(token.string)


class Window(nn.Module):
    """What gives the next token's logits, from the last ``CONTEXT`` tokens: the last layer's input, weight and bias.

    ``[N, CONTEXT]`` to ``[N, WIDTH]``, ``[classes, WIDTH]`` and ``[classes]``.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, WIDTH)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.hidden = nn.Sequential(
            nn.Linear(CONTEXT * WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH), nn.LayerNorm(WIDTH)
        )
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden(self.embedding(window).flatten(1)), self.embedding.weight, self.bias


def windows(texts: list[list[str]], number: dict[str, int]) -> Tensor:
    """Every run of ``CONTEXT + 1`` tokens, ``[n, CONTEXT + 1]``, as a view: each token is stored once."""
    stream = torch.tensor([number.get(token, 0) for text in texts for token in text])
    return stream.unfold(0, CONTEXT + 1, 1)


def task() -> Task:
    texts = [list(tokens(path)) for path in files()]
    counts = Counter(token for text in texts for token in text)
    vocabulary = ["<rare>", *(token for token, _ in counts.most_common(VOCABULARY - 1))]
    number = {token: index for index, token in enumerate(vocabulary)}
    held_out = windows(texts[::10], number)
    held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:HELD_OUT_WINDOWS]]
    train = windows([text for index, text in enumerate(texts) if index % 10], number)
    return Task(
        name="tokens",
        summary=f"next token of the standard library, {len(vocabulary):,} classes",
        model=lambda: Window(len(vocabulary)),
        losses=HEADS,
        train=(train[:, :-1], train[:, -1]),
        held_out=(held_out[:, :-1], held_out[:, -1]),
        constant=train[:, -1].bincount(minlength=len(vocabulary)),
        batch_size=512,
        steps=120,
        learning_rate=3e-3,
        score_name="tokens right",
        tally=accuracy,
        logits=F.linear,
        measured="last layer + loss",
    )


if __name__ == "__main__":
    main(task, description=__doc__)
