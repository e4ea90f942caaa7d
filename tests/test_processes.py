"""Bit for bit the same in many runs, in many Python threads, after fork and in a fresh process."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import cases
import pytest
import torch
from comparison import assert_bitwise_equal, leaf
from torch import Tensor

import torchce.functional

# Sizes that are split among threads, and one that is not.
SHAPES = {
    "index": (301, 1001),
    "index_3d": (3, 19, 4099),
    "probability": (101, 1001),
    "bce": (70001,),
    "small": (32, 10),
}
PATIENCE = 120  # seconds for another process to import torch and compute, on a busy machine


@functools.cache
def problem(name: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, target, class weights), drawn once."""
    shape = SHAPES[name]
    if name == "bce":
        target = cases.uniform(shape, torch.float32, device)
    else:
        target = cases.softmax_target("probability" if name == "probability" else "index", shape, torch.float32, device)
    weight = cases.uniform([shape[-1 if name == "bce" else 1]], torch.float32, device, seed=6)
    return cases.normal(shape, torch.float32, device, scale=3), target, weight


def differentiable_loss(name: str, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    """(loss, the leaves that require grad)"""
    logits, target, weight = problem(name, device)
    inputs = [leaf(tensor) for tensor in (logits, target) if tensor.is_floating_point()]
    if name == "bce":
        return torchce.functional.binary_cross_entropy_with_logits(*inputs, pos_weight=weight), inputs
    target = inputs[-1] if target.is_floating_point() else target
    return torchce.functional.cross_entropy(inputs[0], target, weight, label_smoothing=0.1), inputs


def loss_and_grads(name: str, device: str = "cpu") -> list[Tensor]:
    loss, inputs = differentiable_loss(name, device)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def digest(name: str, device: str = "cpu") -> str:
    """All bits of a loss and its gradients in one word, which can be sent to another process."""
    bits = hashlib.sha256()
    for tensor in loss_and_grads(name, device):
        bits.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return bits.hexdigest()


@pytest.mark.parametrize("name", SHAPES)
def test_100_runs(device: str, name: str) -> None:
    expected = loss_and_grads(name, device)
    for run in range(100):
        for result, first in zip(loss_and_grads(name, device), expected, strict=True):
            assert_bitwise_equal(result, first, f"run {run}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_8_python_threads_at_once(device: str, name: str, threads: int, restore_threads: None) -> None:
    """Each with torch's own threads below it; all start at the same moment and must not share scratch memory."""
    torch.set_num_threads(threads)
    expected = digest(name, device)
    found: list[str] = []
    start = threading.Barrier(8)

    def work() -> None:
        torch.set_num_threads(threads)  # it is a number of the thread that asks
        start.wait()
        found.extend(digest(name, device) for _ in range(3))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 24


def _send_digests(connection: Connection) -> None:
    torch.set_num_threads(1)
    connection.send({name: digest(name) for name in SHAPES})


def _send_digests_with_threads(connection: Connection) -> None:
    torch.set_num_threads(2)
    connection.send({name: digest(name) for name in SHAPES})


def received_from(method: str, target: Any) -> dict[str, str]:
    """What a process started by `method` sends."""
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender,))
    process.start()
    try:
        assert receiver.poll(PATIENCE), "the other process sends nothing"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork() -> None:
    """In a child of a process whose threads have run, set to one thread as DataLoader sets its workers.

    With more, OpenMP waits for threads that only the parent has: torch's own losses hang there as well.
    """
    expected = {name: digest(name) for name in SHAPES}
    assert received_from("fork", _send_digests) == expected


def test_under_spawn() -> None:
    """A process that imports torchce anew, with threads of its own."""
    assert received_from("spawn", _send_digests_with_threads) == {name: digest(name) for name in SHAPES}


def test_data_loader_workers() -> None:
    """Losses computed in a data set's workers, as for mining hard examples."""

    class Losses(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            return loss_and_grads("small")[0]

    loader = torch.utils.data.DataLoader(Losses(), num_workers=2)
    expected = loss_and_grads("small")[0]
    assert [loss.item() for loss in loader] == [expected.item()] * 4


@pytest.mark.parametrize("name", SHAPES)
def test_backward_in_another_thread(device: str, name: str) -> None:
    """A graph made in one thread and walked in another."""
    loss, inputs = differentiable_loss(name, device)
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    for leaf_, expected in zip(inputs, loss_and_grads(name, device)[1:], strict=True):
        assert_bitwise_equal(leaf_.grad, expected)


if sys.platform == "linux":

    def test_threads_do_not_leak() -> None:
        """Kernels use torch's threads and start none of their own."""
        digest("index")
        before = len(os.listdir("/proc/self/task"))
        for name in SHAPES:
            digest(name)
        assert len(os.listdir("/proc/self/task")) <= before
