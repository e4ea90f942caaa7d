"""Distillation: a student of handwritten digits learns from a teacher's logits, with the Kullback-Leibler divergence.

As in Hinton et al. 2015 (Distilling the Knowledge in a Neural Network, arXiv:1503.02531) student and teacher are
softened by a temperature, and the student never sees a 3: of that digit it knows what the teacher's logits say of the
others. Beside it the same student learns the labels of the same pictures, with cross entropy. Both are asked for every
digit that is held out, 3 among them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchce
from examples import digits
from examples.command import main
from examples.training import Task, train

TEMPERATURE = 8.0
UNSEEN = 3
TEACHER_STEPS = 300


class ComposedKLDiv(nn.Module):
    """What torch has for it: ``kl_div`` of two ``log_softmax``."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.kl_div(
            F.log_softmax(student / TEMPERATURE, 1),
            F.log_softmax(teacher / TEMPERATURE, 1),
            reduction="batchmean",
            log_target=True,
        )


def student() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def teacher() -> nn.Module:
    wide = nn.Linear(64, 512), nn.GELU(), nn.Dropout(), nn.Linear(512, 512), nn.GELU(), nn.Dropout()
    return nn.Sequential(*wide, nn.Linear(512, 10))


def taught() -> tuple[Tensor, float]:
    """The teacher's logits for the pictures of ``digits``, ``[n, 10]``, and its score."""
    task = replace(digits.task(), model=teacher, losses={"torchce": torchce.CrossEntropyLoss()}, learning_rate=1e-3)
    *_, result = train(task, torch.device("cpu"), TEACHER_STEPS, seed=0)
    run = result.runs["torchce"]  # its model is in evaluation mode since it got its score
    with torch.no_grad():
        return run.model(task.train[0]), run.score


def labels_task() -> Task:
    """The student without a teacher."""
    whole = digits.task()
    images, labels = whole.train
    seen = labels != UNSEEN
    return replace(
        whole,
        name="labels",
        summary=f"a student of labels, no {UNSEEN} among them",
        model=student,
        train=(images[seen], labels[seen]),
        constant=labels[seen].bincount(minlength=10),
    )


def task() -> Task:
    """The student of a teacher."""
    whole = digits.task()
    images, labels = whole.train
    logits, score = taught()
    seen = labels != UNSEEN
    return replace(
        whole,
        name="distilled",
        summary=f"a student of logits, no picture of a {UNSEEN}; teacher: {score:.1%}",
        model=student,
        losses={
            "torch": ComposedKLDiv(),
            "torchce": torchce.KLDivWithLogitsLoss(target_logits=True, temperature=TEMPERATURE),
        },
        train=(images[seen], logits[seen]),
        constant=logits[seen].mean(0),
        measured="KL divergence",
    )


if __name__ == "__main__":
    main(labels_task, task, description=str(__doc__))
