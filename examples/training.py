"""Trains a model with torch's loss and again with each of torchce's, and measures what the loss costs.

All trainings start from the same seed and see the same batches, so any difference between their curves comes from the
loss alone. They take turns, step by step and each leading equally often: whatever else the machine does then slows all
alike, and none has the warm caches to itself.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import torchce

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes its start and stop between our lines


@dataclass(frozen=True)
class Task:
    """A model, its data and its loss, the latter from both libraries.

    A loss is called with what the model returns and the target. That is the logits, or, where the model's last layer is
    part of the loss and measured with it, a tuple of what the loss needs to compute them.

    Shape:
        - train, held_out: (inputs ``[n, ...]``, target ``[n]`` or ``[n, C]``)
        - constant: ``[C]``, the logits of a model that has seen the targets of ``train`` but ignores its input
    """

    name: str
    summary: str
    model: Callable[[], nn.Module]
    losses: dict[str, nn.Module]
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    constant: Tensor
    batch_size: int
    steps: int
    learning_rate: float
    score_name: str
    tally: Callable[[Tensor, Tensor], tuple[int, int]]
    """Logits and target to a numerator and a denominator; their sums over all batches divide to the score."""
    logits: Callable[..., Tensor] = lambda logits: logits
    """The logits from what the model returns."""
    measured: str = "loss"
    """What the losses compute, in a few words for the picture."""


@dataclass
class Run:
    """One training and what was measured on the way."""

    model: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    curve: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    loss_bytes: int = 0
    score: float = 0.0

    @property
    def loss_milliseconds(self) -> float:
        """Of one step; the median, which a preempted core does not move."""
        return 1e3 * statistics.median(self.loss_seconds)

    @property
    def loss_share(self) -> float:
        """The part of a step's time that its loss takes."""
        return statistics.median(self.loss_seconds) / statistics.median(self.step_seconds)


@dataclass(frozen=True)
class Result:
    """A task after training, with one run for each loss."""

    task: Task
    device: torch.device
    runs: dict[str, Run]
    constant_score: float

    @property
    def differences(self) -> list[float]:
        """How far the loss curve of any run is from the first run's, torch's, at every step."""
        steps = zip(*(run.curve for run in self.runs.values()), strict=True)
        return [max(abs(loss - first) for loss in others) for first, *others in steps]


def default_device() -> torch.device:
    """The GPU where there is one and torchce has kernels for it."""
    usable = torch.cuda.is_available() and torchce.build_info()["cuda_loaded"]
    return torch.device("cuda" if usable else "cpu")


def accuracy(logits: Tensor, target: Tensor) -> tuple[int, int]:
    return int((logits.argmax(1) == target).sum()), len(target)


def train(task: Task, device: torch.device, steps: int, seed: int) -> Iterator[Result]:
    """Trains ``task`` with every loss; yields after each step, the last time with memory and scores filled in."""
    runs = {}
    for name, loss in task.losses.items():
        torch.manual_seed(seed)
        model = task.model().to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        runs[name] = Run(model, loss, optimizer, schedule)
    result = Result(task, device, runs, _constant_score(task))

    order = list(runs.values())
    batches = torch.Generator().manual_seed(seed)
    inputs, target = task.train
    for number in range(steps):
        rows = torch.randint(len(inputs), (task.batch_size,), generator=batches)
        batch = inputs[rows].to(device), target[rows].to(device)
        for run in order:
            _step(run, *batch)
        order.append(order.pop(0))
        if number + 1 == steps:
            for run in order:
                run.loss_bytes = _loss_bytes(run, *batch)
                run.score = _score(task, run.model, device)
        yield result


def clock(device: torch.device) -> float:
    """The time in seconds at which ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def loss_and_gradients(
    loss: nn.Module, outputs: tuple[Tensor, ...], target: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and its gradients for a model's outputs, without anything of the model.

    Autograd sees the outputs detached, for one may lead to another: an embedding that is the last layer's weight as
    well has a part in that layer's input.
    """
    detached = tuple(output.detach().requires_grad_() for output in outputs)
    value = loss(*detached, target)
    return value, torch.autograd.grad(value, detached)


def _outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    outputs = model(inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _step(run: Run, inputs: Tensor, target: Tensor) -> None:
    started = clock(inputs.device)
    outputs = _outputs(run.model, inputs)
    loss_started = clock(inputs.device)
    loss, gradients = loss_and_gradients(run.loss, outputs, target)
    loss_ended = clock(inputs.device)
    run.optimizer.zero_grad()
    torch.autograd.backward(outputs, gradients)
    run.optimizer.step()
    run.schedule.step()
    ended = clock(inputs.device)
    run.curve.append(loss.item())
    run.loss_seconds.append(loss_ended - loss_started)
    run.step_seconds.append(ended - started)


def _loss_bytes(run: Run, inputs: Tensor, target: Tensor) -> int:
    outputs = _outputs(run.model, inputs)
    return peak_bytes(lambda: loss_and_gradients(run.loss, outputs, target), inputs.device)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``function`` holds at any moment, beyond what was allocated before it.

    On CUDA, torch's allocator keeps that figure. On the CPU, the profiler records every allocation and release, inside
    an operator as well, so it sees what ATen's losses and torchce's ops hold in the same way.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = function()  # until the profile ends: a result counts as well
    del held
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak


def _score(task: Task, model: nn.Module, device: torch.device) -> float:
    model.eval()
    return _mean_score(task, lambda inputs: task.logits(*_outputs(model, inputs.to(device))).cpu())


def _constant_score(task: Task) -> float:
    return _mean_score(task, lambda inputs: task.constant.expand(len(inputs), -1))


@torch.no_grad()
def _mean_score(task: Task, logits_of: Callable[[Tensor], Tensor]) -> float:
    """Batch by batch: all held-out logits of a large vocabulary would be half a gigabyte."""
    batches = zip(*(tensor.split(task.batch_size) for tensor in task.held_out), strict=True)
    numerators, denominators = zip(*(task.tally(logits_of(inputs), target) for inputs, target in batches), strict=True)
    return float(sum(numerators) / sum(denominators))
