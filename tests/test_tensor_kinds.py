"""Tensors that are more than strided numbers on a CPU or GPU: torch's answer, whether a kernel or torch gives it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as theirs
from cases import dtype_id
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.multi_threaded_pg import _uninstall_threaded_pg
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.testing._internal.two_tensor import TwoTensor

import torchce
import torchce.functional as ours
from torchce.functional._common import have_kernels

LOSSES = ["cross_entropy_index", "cross_entropy_probability", "bce"]
Loss = Callable[..., Tensor]


def pair(loss: str) -> tuple[Loss, Loss]:
    """(ours, torch's)"""
    name = "binary_cross_entropy_with_logits" if loss == "bce" else "cross_entropy"
    return getattr(ours, name), getattr(theirs, name)


def problem(loss: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(logits [6, 5], target)"""
    logits = cases.normal((6, 5), dtype, device, scale=2)
    if loss == "bce":
        return logits, cases.uniform((6, 5), dtype, device)
    return logits, cases.softmax_target(loss.removeprefix("cross_entropy_"), (6, 5), dtype, device)


# --- fake and meta tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_fake_tensors(device: str, dtype: torch.dtype, reduction: str, loss: str) -> None:
    """Loss and gradients of a model that was never allocated: shapes, strides, dtypes and device of the real ones."""
    f, torch_function = pair(loss)
    logits, target = problem(loss, device, dtype)
    logits.requires_grad_()
    real = torch_function(logits, target, reduction=reduction)
    real.sum().backward()
    with FakeTensorMode() as mode:
        fake_logits, fake_target = (mode.from_tensor(tensor) for tensor in (logits, target))
        assert have_kernels(fake_logits, fake_target)
        result = f(fake_logits, fake_target, reduction=reduction)
        result.sum().backward()
    for fake, expected in ((result, real), (fake_logits.grad, logits.grad)):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.stride(), fake.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert fake.device == expected.device


@pytest.mark.parametrize("loss", LOSSES)
def test_meta_gradients(loss: str) -> None:
    f, _ = pair(loss)
    logits, target = (tensor.to("meta") for tensor in problem(loss))
    logits.requires_grad_()
    f(logits, target).backward()
    assert logits.grad is not None
    assert (logits.grad.shape, logits.grad.device.type) == ((6, 5), "meta")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("other", ["mps", "xpu"])
def test_other_devices_fall_back(other: str, loss: str) -> None:
    """No such device is here, but a fake tensor can claim to be on one: ours has no kernel, torch answers."""
    logits, target = problem(loss)
    with FakeTensorMode():
        fake_logits = torch.empty(logits.shape, device=other)
        fake_target = torch.empty(target.shape, device=other, dtype=target.dtype)
        assert not have_kernels(fake_logits, fake_target)
        result, expected = (f(fake_logits, fake_target) for f in pair(loss))
    assert result.device.type == other
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)


def test_kernels_are_used_where_they_exist(device: str) -> None:
    """The decision itself, so that nothing above falls back where it should not."""
    logits, target = problem("bce", device)
    assert have_kernels(logits, target)
    assert have_kernels(torch.nn.Parameter(logits), target, None)
    assert have_kernels(logits.to("meta"), target.to("meta"))
    assert not have_kernels(logits, target.to("meta"))
    assert not have_kernels(logits.to_sparse(), target)
    assert not have_kernels(logits.to(torch.complex64), target)
    assert not have_kernels(torch.nested.nested_tensor([logits, logits[:2]], layout=torch.jagged), target)
    assert not have_kernels(TwoTensor(logits, logits), target)


# --- subclasses -----------------------------------------------------------------------------------------------------


def two(tensor: Tensor) -> Tensor:
    return TwoTensor(tensor, tensor.flip(0))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrap", [two, LoggingTensor], ids=["TwoTensor", "LoggingTensor"])
def test_dispatch_subclasses(wrap: Callable[[Tensor], Tensor], loss: str) -> None:
    """They see torch's own operations, which they know."""
    logits, target = problem(loss)
    results = []
    for f in pair(loss):
        x = wrap(logits.clone()).requires_grad_()
        result = f(x, wrap(target.clone()))
        result.sum().backward()
        results.append((result, x.grad))
    for result, expected in zip(*results, strict=True):
        assert type(result) is type(expected)
        for part in ("a", "b") if isinstance(result, TwoTensor) else ("elem",):
            torch.testing.assert_close(getattr(result, part).detach(), getattr(expected, part).detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_parameter_of_a_subclass(loss: str) -> None:
    logits, target = problem(loss)
    result, expected = (f(torch.nn.Parameter(two(logits)), two(target)) for f in pair(loss))
    assert type(result) is type(expected) is TwoTensor


# --- DTensor --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_two_ranks() -> Iterator[Callable[[Callable[[Any], None]], Callable[[Any], None]]]:
    """Decorates what two threads, as ranks, each do.

    DTensor finds shapes in fake mode, which the main thread has to enter before them: on a machine without a GPU, torch
    2.10 and 2.11 with CUDA crash where the thread that entered it first has ended.
    """
    pytest.importorskip("expecttest", reason="torch's threads as ranks import expecttest, which is not installed")
    from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

    with FakeTensorMode():
        pass
    yield spawn_threads_and_init_comms(world_size=2)
    _uninstall_threaded_pg()


# DTensor of torch 2.11 and older knows no BCE with logits: torch's function refuses it, and ours with it.
DTENSOR_LOSSES = [loss for loss in LOSSES if loss != "bce" or torch.__version__ >= (2, 12)]


@pytest.mark.parametrize("loss", DTENSOR_LOSSES)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=["replicated", "batch_sharded"])
def test_dtensor(placement: Any, reduction: str, loss: str, on_two_ranks: Any) -> None:
    """On two ranks: the loss and gradient that torch gives, in the placement torch gives them, and the plain ones."""
    f, torch_function = pair(loss)
    logits, target = problem(loss)
    plain = logits.clone().requires_grad_()
    expected = f(plain, target, reduction=reduction)
    expected.sum().backward()

    @on_two_ranks
    def on_each_rank(_: None) -> None:
        mesh = init_device_mesh("cpu", (2,))
        placements = []
        for function in (f, torch_function):
            x = distribute_tensor(logits, mesh, [placement]).requires_grad_()
            result = function(x, distribute_tensor(target, mesh, [placement]), reduction=reduction)
            result.sum().backward()
            assert isinstance(result, DTensor)
            torch.testing.assert_close(result.full_tensor().detach(), expected.detach())
            torch.testing.assert_close(x.grad.full_tensor(), plain.grad)
            placements.append((result.placements, x.grad.placements))
        assert placements[0] == placements[1]
        assert dist.get_world_size() == 2

    on_each_rank(None)


@pytest.mark.skipif("bce" in DTENSOR_LOSSES, reason="torch's DTensor knows every loss")
def test_dtensor_that_torch_refuses(on_two_ranks: Any) -> None:
    logits, target = problem("bce")

    @on_two_ranks
    def on_each_rank(_: None) -> None:
        mesh = init_device_mesh("cpu", (2,))
        arguments = [distribute_tensor(tensor, mesh, [Replicate()]) for tensor in (logits, target)]
        for function in pair("bce"):
            with pytest.raises(NotImplementedError, match="does not have a sharding strategy"):
                function(*arguments)

    on_each_rank(None)


# --- TorchScript ----------------------------------------------------------------------------------------------------


def _scripted_cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    return ours.cross_entropy(x, y)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(5, 5)
        self.loss = torchce.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.net(x), y)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ours.cross_entropy,
        lambda: ours.binary_cross_entropy_with_logits,
        lambda: _scripted_cross_entropy,
        torchce.CrossEntropyLoss,
        torchce.BCEWithLogitsLoss,
        Model,
    ],
    ids=["cross_entropy", "bce", "function", "CrossEntropyLoss", "BCEWithLogitsLoss", "model"],
)
def test_script_says_that_it_cannot(make: Callable[[], Any]) -> None:
    """And says so again: torch's own message of a second attempt is another."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"TorchScript error.*torchce.*use torch\.compile"):
            torch.jit.script(make())


def test_trace_records_torchs_operations(tmp_path: Path) -> None:
    """A trace is a graph of torch's own operations and runs where torchce is not installed."""
    model, (logits, target) = Model(), problem("cross_entropy_index")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (logits, target))
        assert "torchce::" not in str(traced.inlined_graph)
        traced.save(str(tmp_path / "traced.pt"))
        loaded = torch.jit.load(str(tmp_path / "traced.pt"))
    torch.testing.assert_close(loaded(logits, target), model(logits, target))
