"""Handwritten digits: a small classifier on the 1,797 8x8 images that scikit-learn ships, with cross entropy."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchce
from examples.command import main
from examples.training import Task, accuracy


def task() -> Task:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16  # [1797, 64]; pixels are 0 to 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:360], order[360:]
    return Task(
        name="digits",
        summary="handwritten digits, 10 classes",
        model=lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10)),
        losses={"torch": nn.CrossEntropyLoss(), "torchce": torchce.CrossEntropyLoss()},
        train=(images[train], labels[train]),
        held_out=(images[held_out], labels[held_out]),
        constant=labels[train].bincount(minlength=10),
        batch_size=128,
        steps=400,
        learning_rate=3e-3,
        score_name="digits right",
        tally=accuracy,
    )


if __name__ == "__main__":
    main(task, description=__doc__)
