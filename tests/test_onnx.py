"""ONNX exports of models with their loss inside: onnxruntime computes what torch does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from test_export import IDS, PROBLEMS, ROWS, Model, target_of, weights
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import torchce
from torchce import softmax_ce_formulas

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    names = [given.name for given in session.get_inputs()]
    (result,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    return torch.as_tensor(result)


def export(model: Any, inputs: tuple[Tensor, ...], path: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, path, verbose=False, **options)


@pytest.mark.parametrize(("loss", "kind", "options"), PROBLEMS, ids=IDS)
@pytest.mark.parametrize("way", ["model", "inference", "program", "decomposed", "dynamic", "torchscript"])
def test_onnxruntime_gives_the_same(
    way: str, loss: type[torch.nn.Module], kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, target = Model(loss(**options)).eval(), target_of(kind)
    data = cases.normal((ROWS, 5), torch.float32, "cpu")
    path = tmp_path / "model.onnx"
    if way in ("program", "decomposed"):
        program = torch.export.export(model, (data, target))
        export(program.run_decompositions() if way == "decomposed" else program, (), path, dynamo=True)
    elif way == "dynamic":
        batch = {0: torch.export.Dim("batch", min=2, max=100)}
        export(model, (data, target), path, dynamo=True, dynamic_shapes=(batch, batch))
        data, target = torch.cat([data, data])[:-1], torch.cat([target, target])[:-1]
    else:
        with torch.inference_mode(way == "inference"):
            export(model, (data, target), path, dynamo=way != "torchscript")
    # TorchScript's exporter takes the promotion to float64 for float32, with torch's own loss too.
    torch.testing.assert_close(
        run(path, data, target), model(data, target).detach(), check_dtype=way != "torchscript", rtol=1e-6, atol=1e-6
    )


def test_outputs_and_a_scale(tmp_path: Path) -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            out = torchce.functional.cross_entropy(
                x, y, z_loss=0.1, softcap=5.0, logit_scale=scale, return_lse=True, return_entropy=True
            )
            return out.loss + out.lse.sum() + out.entropy.square().sum()

    inputs = cases.normal((ROWS, 5), torch.float32, "cpu", scale=3), target_of("int64"), torch.tensor(0.7)
    export(Loss(), inputs, tmp_path / "model.onnx", dynamo=True)
    torch.testing.assert_close(run(tmp_path / "model.onnx", *inputs), Loss()(*inputs))


@pytest.mark.parametrize("loss", [torch.nn.CrossEntropyLoss, torch.nn.BCEWithLogitsLoss], ids=lambda m: m.__name__)
def test_under_patch_torch(loss: type[torch.nn.Module], tmp_path: Path) -> None:
    model = Model(loss()).eval()
    target = target_of("int64" if loss is torch.nn.CrossEntropyLoss else "soft")
    data = cases.normal((ROWS, 5), torch.float32, "cpu")
    with torchce.patch_torch():
        export(model, (data, target), tmp_path / "model.onnx", dynamo=True)
    torch.testing.assert_close(run(tmp_path / "model.onnx", data, target), model(data, target).detach())


def shaped(shape: str, target: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, target) of that shape, with 3 classes, from a target for rows of them."""
    logits = cases.normal((ROWS, 3), torch.float32, "cpu", scale=2)
    if shape == "unbatched":
        return logits[0], target[0]
    if shape == "images":
        logits, target = (tensor[..., None, None] * torch.ones(2, 5, dtype=tensor.dtype) for tensor in (logits, target))
    return logits, target


@pytest.mark.parametrize("kind", ["int64", "probability"])
@pytest.mark.parametrize("shape", ["unbatched", "images"])
def test_other_shapes_of_logits(shape: str, kind: str, tmp_path: Path) -> None:
    model, (logits, target) = torchce.CrossEntropyLoss(label_smoothing=0.1), shaped(shape, target_of(kind))
    export(model, (logits, target), tmp_path / "model.onnx", dynamo=True)
    torch.testing.assert_close(run(tmp_path / "model.onnx", logits, target), model(logits, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("loss", ["index", "probability", "bce"])
def test_logits_far_from_zero(loss: str, dynamo: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Beyond 18, where onnxruntime rounds a sigmoid to 0 or 1, and where exp is beyond float32; columns are targets."""
    far = torch.tensor([-200.0, -89.0, -50.0, -18.5, -10.0, 0.0, 10.0, 18.5, 50.0, 89.0, 200.0], dtype=dtype)
    logits = far.unsqueeze(1) * torch.tensor([1.0, 1.0, -1.0], dtype=dtype)
    model: torch.nn.Module = torchce.BCEWithLogitsLoss(reduction="none", pos_weight=weights())
    target = torch.tensor([0.0, 0.25, 1.0], dtype=dtype).expand_as(logits).contiguous()
    if loss != "bce":
        model = torchce.CrossEntropyLoss(reduction="none", label_smoothing=0.125)
        target = target / target.sum(1, keepdim=True) if loss == "probability" else torch.arange(len(far)) % 3
    export(model, (logits, target), tmp_path / "model.onnx", dynamo=dynamo)
    torch.testing.assert_close(
        run(tmp_path / "model.onnx", logits, target), model(logits, target), rtol=1e-6, atol=1e-6
    )


# BCE's weights here are one for each of three columns, which images have not.
SHAPED = [
    (*problem, shape)
    for problem in PROBLEMS
    for shape in ("rows", "unbatched", "images")
    if shape != "images" or problem[0] is torchce.CrossEntropyLoss
]


@pytest.mark.parametrize(("loss", "kind", "options", "shape"), SHAPED)
def test_the_decomposition_is_the_op(
    loss: type[torch.nn.Module], kind: str, options: dict[str, Any], shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every result, what is kept for backward included."""
    module, (logits, target) = loss(**options), shaped(shape, target_of(kind))
    reduction = {"none": 0, "mean": 1, "sum": 2}[options.get("reduction", "mean")]
    if loss is torchce.CrossEntropyLoss:
        op = torch.ops.torchce.softmax_ce_forward.default
        arguments = (logits, target, module.weight, None, reduction, module.ignore_index, module.label_smoothing)
    else:
        op = torch.ops.torchce.sigmoid_bce_forward.default
        target = target.float() if target.dtype == torch.float64 else target
        arguments = (logits, target, module.weight, module.pos_weight, None, reduction)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    decomposed = make_fx(op)(*arguments)
    assert not any("torchce" in str(node.target) for node in decomposed.graph.nodes)
    torch.testing.assert_close(decomposed(*arguments), op(*arguments))


@pytest.mark.parametrize("wide", [0, 1, 2], ids=["logits", "target", "weight"])
def test_the_decomposition_of_float64_beside_float32_is_the_op(wide: int) -> None:
    """What is kept for backward is of float64, too."""
    op = torch.ops.torchce.softmax_ce_forward.default
    operands = [cases.normal((6, 3), torch.float32, "cpu"), cases.probabilities((6, 3), torch.float32, "cpu")]
    operands.append(cases.uniform([3], torch.float64, "cpu"))
    operands[wide] = operands[wide].double()
    arguments = (*operands, torch.float64, 1, -100, 0.1)
    torch.testing.assert_close(softmax_ce_formulas.decomposition(*arguments), op(*arguments), rtol=1e-13, atol=0)
