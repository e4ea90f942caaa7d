"""``python -m examples``: all four, one after the other, with one table and one picture."""

from __future__ import annotations

from examples import digits, distillation, glyphs, tokens
from examples.command import main

DESCRIPTION = """\
Trains four real models, each with torch's loss and with torchce's from the same seed, and compares the trainings:

  digits        a classifier of handwritten digits, cross entropy over 10 classes
  distillation  a smaller one that learns from a teacher's logits and never sees a 3, Kullback-Leibler divergence
  glyphs        the words of characters' names from their pictures, binary cross entropy over some 350 labels
  tokens        the next token of Python's standard library, cross entropy over 32,000 classes; the last layer is
                measured with it, and fused with it in a third training

Each also runs alone: python -m examples.digits --help"""


if __name__ == "__main__":
    main(digits.task, distillation.task, glyphs.task, tokens.task, description=DESCRIPTION)
