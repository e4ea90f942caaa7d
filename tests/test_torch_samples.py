"""The samples that torch tests its own losses with, all of them, through torchce.

They come from torch's OpInfo and ModuleInfo databases, so whatever torch adds to its contract is tested here from then
on. Each is held to the tolerance of comparison.py; the number run is printed at the end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import reference
import torch
from cases import dtype_id
from comparison import check, check_sigmoid_bce, check_softmax_ce
from torch import Tensor, nn

import torchce
import torchce.functional

pytest.importorskip("expecttest", reason="torch's test databases import expecttest, which is not installed")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

CHECKS = {"cross_entropy": check_softmax_ce, "binary_cross_entropy_with_logits": check_sigmoid_bce}
REFERENCES = {"CrossEntropyLoss": reference.softmax_ce, "BCEWithLogitsLoss": reference.sigmoid_bce}
OPS = [op for op in op_db if op.name.removeprefix("nn.functional.") in CHECKS]
MODULES = [info for info in module_db if info.module_cls.__name__ in REFERENCES]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """torch draws its samples from the global generators."""
    torch.manual_seed(0)
    random.seed(0)


def test_torch_has_samples() -> None:
    """None of the tests below may come to nothing because torch renamed something."""
    assert len(OPS) == len(MODULES) == 2


def loss_name(op: OpInfo) -> str:
    return op.name.removeprefix("nn.functional.")


def samples(op: OpInfo, device: str, dtype: torch.dtype, requires_grad: bool) -> Iterator[tuple[str, SampleInput]]:
    """(the database it is from, a sample), each also with every tensor strided."""
    for sample in op.sample_inputs(device, dtype, requires_grad=requires_grad):
        yield "sample inputs", sample
        yield "strided sample inputs", sample.noncontiguous()
    for sample in op.reference_inputs(device, dtype, requires_grad=requires_grad):
        yield "reference inputs", sample


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("op", OPS, ids=loss_name)
def test_op_samples(device: str, op: OpInfo, dtype: torch.dtype, counts: Counter[str]) -> None:
    """Values, dtypes, shapes and all gradients that torch gives."""
    assert dtype in op.supported_dtypes(device)
    for source, sample in samples(op, device, dtype, requires_grad=True):
        target_grad = sample.args[0].requires_grad
        CHECKS[loss_name(op)](sample.input, *sample.args, target_grad=target_grad, **sample.kwargs)
        counts[f"of torch's {source} ({loss_name(op)}, {device})"] += 1


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", OPS, ids=loss_name)
def test_op_samples_require_grad_as_torchs(device: str, op: OpInfo, requires_grad: bool) -> None:
    function = getattr(torchce.functional, loss_name(op))
    for _, sample in samples(op, device, torch.float32, requires_grad):
        ours, theirs = (f(sample.input, *sample.args, **sample.kwargs) for f in (function, op.op))
        assert ours.requires_grad == theirs.requires_grad == requires_grad
        assert ours.is_leaf == theirs.is_leaf


@pytest.mark.parametrize("op", OPS, ids=loss_name)
def test_op_samples_pass_gradcheck(device: str, op: OpInfo) -> None:
    """As torch's own suite checks its losses: forward and reverse mode, second derivatives, batched gradients."""
    function = getattr(torchce.functional, loss_name(op))
    for sample in op.sample_inputs(device, torch.float64, requires_grad=True):
        tensors = [sample.input, *sample.args]

        def loss(*tensors: Tensor, kwargs: dict[str, Any] = sample.kwargs) -> Tensor:
            return function(*tensors, **kwargs)

        # Fast mode: along random directions; test_autograd.py checks every element on fewer problems.
        every_way = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
        assert torch.autograd.gradcheck(loss, tensors, fast_mode=True, **every_way)
        assert torch.autograd.gradgradcheck(
            loss, tensors, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True
        )


@pytest.mark.parametrize("op", OPS, ids=loss_name)
def test_op_error_inputs(device: str, op: OpInfo, counts: Counter[str]) -> None:
    if op.error_inputs_func is None:
        pytest.skip(f"torch {torch.__version__} has no error inputs for it")
    function = getattr(torchce.functional, loss_name(op))
    for error in op.error_inputs(device):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            function(sample.input, *sample.args, **sample.kwargs)
        counts[f"of torch's error inputs ({loss_name(op)}, {device})"] += 1


def module_name(info: ModuleInfo) -> str:
    return info.module_cls.__name__


def build(info: ModuleInfo, sample: ModuleInput, device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's)"""
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    classes = (getattr(torchce, module_name(info)), info.module_cls)
    ours, theirs = (module(*args, **kwargs).to(device, dtype) for module in classes)
    return ours, theirs


def build_and_run(info: ModuleInfo, sample: ModuleInput, device: str) -> Tensor:
    ours, _ = build(info, sample, device, torch.float32)
    return ours(*sample.forward_input.args, **sample.forward_input.kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("info", MODULES, ids=module_name)
def test_module_samples(
    device: str, info: ModuleInfo, dtype: torch.dtype, training: bool, counts: Counter[str]
) -> None:
    """Held to the reference as everywhere, and to the reference that torch wrote for the sample."""
    for sample in info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training):
        ours, theirs = (module.train(training) for module in build(info, sample, device, dtype))
        logits, target = sample.forward_input.args
        target = target.detach()
        loss = check(
            lambda x, y, module=ours, **_: module(x, y),
            lambda x, y, module=theirs, **_: module(x, y),
            REFERENCES[module_name(info)],
            (logits, target, target),
            (sample.constructor_input.kwargs, {}),
            None,
            target.is_floating_point(),
            lambda _, sample=sample: f"sample {sample.desc!r}",
        )
        if dtype in (torch.float64, torch.float32):  # torch's references round 16-bit numbers at every step
            expected = sample.reference_fn(ours, logits, target).detach()
            torch.testing.assert_close(loss, expected, equal_nan=True)  # NaN: every row happens to be ignored
        counts[f"of torch's module inputs ({module_name(info)}, {device})"] += 1


@pytest.mark.parametrize("info", MODULES, ids=module_name)
def test_module_error_inputs(device: str, info: ModuleInfo, counts: Counter[str]) -> None:
    """torch's exception, and its message in ours."""
    if info.module_error_inputs_func is None:
        pytest.skip(f"torch {torch.__version__} has no error inputs for it")
    for error in info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=True
    ):
        sample = error.module_error_input
        with pytest.raises(error.error_type, match=error.error_regex):
            build_and_run(info, sample, device)
        counts[f"of torch's module error inputs ({module_name(info)}, {device})"] += 1
