"""Cross entropy with the keyword arguments that torch's has not, each alone and all at once."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import typing
from typing import Any

import cases
import composed
import numpy
import pytest
import reference
import torch
from cases import dtype_id
from comparison import assert_accurate, assert_bitwise_equal, check_softmax_ce, grad_output_for
from torch import Tensor

import torchce
import torchce.functional as ours
from torchce import ops, softmax_ce_formulas
from torchce.functional.softmax_ce_own import Own

Z = 0.01  # of rows whose lse is near 10 about as much as the rest of the loss
SHAPES = [
    pytest.param((11,), id="1d"),
    pytest.param((32, 10), id="short"),  # across the rows
    pytest.param((70, 100), id="along"),  # a group of rows along the classes and a part of one
    pytest.param((3, 9001), id="along_9001"),  # on CUDA by blocks
    pytest.param((2, 19, 13, 9), id="4d"),
]
RETURNED = {"return_lse": True, "return_predictions": True, "return_entropy": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "z": {"z_loss": Z},
    "sample_weight": {"sample_weight": True},
    "divisor": {"divisor": 3.5},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.7},
    "scale_tensor": {"logit_scale": torch.tensor(0.7)},
    "softcap_scale": {"softcap": 30.0, "logit_scale": 2.5},
    "z_sample_weight": {"z_loss": Z, "sample_weight": True},
    "z_divisor": {"z_loss": Z, "divisor": 3.5},
    "all": {
        "z_loss": Z,
        "softcap": 5.0,
        "logit_scale": 0.7,
        "sample_weight": True,
        "divisor": 3.5,
        "dtype": torch.float32,
    },
}


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return cases.index_shape(shape)


def own_options(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if "sample_weight" in options:
        options["sample_weight"] = cases.uniform(row_shape(shape), dtype, device, seed=7) - 0.2
    return options


@pytest.mark.parametrize(
    ("shape", "reduction"), [*((shape.values[0], "mean") for shape in SHAPES), ((32, 10), "none"), ((70, 100), "sum")]
)
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients(
    device: str, name: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...], reduction: str
) -> None:
    logits = cases.normal(shape, dtype, device, scale=3)
    target, options = cases.kernel_problem(kind, logits)
    own = own_options(name, shape, dtype, device)
    if reduction != "mean":
        own.pop("divisor", None)
    check_softmax_ce(logits, target, reduction=reduction, target_grad=target.is_floating_point(), **options, **own)


def lse_of(logits: Tensor) -> Tensor:
    return torch.logsumexp(reference.float64(logits), min(1, logits.dim() - 1))


@pytest.mark.parametrize("layout", [None, "transposed", "offset", "sliced"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
def test_outputs(device: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str | None) -> None:
    """Of every row, and the gradient of all at once. Without the loss, of lse and of entropy alone."""
    if layout is not None and len(shape) == 1:
        pytest.skip("a layout of more dimensions")
    logits = cases.arranged(layout, shape, dtype, device).requires_grad_()
    target, options = cases.kernel_problem(kind, logits.detach())
    out = ours.cross_entropy(logits, target, z_loss=Z, **RETURNED, **options)
    assert_bitwise_equal(out.loss, ours.cross_entropy(logits, target, z_loss=Z, **options))
    assert out.z_loss is None
    class_dim = min(1, logits.dim() - 1)
    assert_bitwise_equal(out.predictions, logits.argmax(class_dim))
    truth = lse_of(logits)
    accumulation = torch.float64 if "float64" in f"{dtype} {target.dtype} {options.get('weight')}" else torch.float32
    if kind in ("index", "smoothed"):
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.lse.dtype == out.entropy.dtype == accumulation
    assert_accurate("lse", out.lse.detach(), reference.Truth(truth, truth.abs() + 8))
    assert_accurate("entropy", out.entropy.detach(), reference.entropy(logits))

    grads = {
        "loss": torch.tensor(-2.625, dtype=out.loss.dtype, device=device),
        "lse": grad_output_for(out.lse),
        "entropy": grad_output_for(out.entropy).flip(0) + 0.5,
    }
    named = {"z_loss": Z, **options}
    for names in (["loss", "lse"], ["loss", "entropy"], ["loss", "lse", "entropy"], ["lse"], ["entropy"]):
        results = [getattr(out, name) for name in names]
        (grad,) = torch.autograd.grad(results, logits, [grads[name] for name in names], retain_graph=True)
        given = {f"grad_{name}": grads[name] for name in names if name != "loss"}
        grad_output = grads["loss"] if "loss" in names else 0 * grads["loss"]
        truths = reference.softmax_ce(logits, target, grad_output=grad_output, **given, **named)
        assert_accurate(f"gradient of {names}", grad, truths.grad_logits)
    for output in (out.lse, out.entropy):
        for ones in (torch.ones(()).expand(output.shape), torch.ones([*output.shape, 2])[..., 0]):  # stride 0, stride 2
            ones = ones.to(output)
            of_sum = torch.autograd.grad(output, logits, ones, retain_graph=True)[0]
            dense = torch.autograd.grad(output, logits, ones.contiguous(), retain_graph=True)[0]
            assert_bitwise_equal(of_sum, dense)
    grad_loss = grads["loss"]
    of_loss = torch.autograd.grad(out.loss, logits, grad_loss)[0]
    assert_bitwise_equal(
        of_loss, torch.autograd.grad(ours.cross_entropy(logits, target, **named), logits, grad_loss)[0]
    )


@pytest.mark.parametrize("name", ["softcap", "scale", "scale_tensor", "softcap_scale"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
def test_outputs_of_transformed_logits(
    device: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...], name: str
) -> None:
    """Are of their values."""
    logits = cases.normal(shape, dtype, device, scale=3).requires_grad_()
    target, options = cases.kernel_problem(kind, logits.detach())
    own = own_options(name, shape, dtype, device)
    out = ours.cross_entropy(logits, target, **RETURNED, **options, **own)
    values = composed.transformed(reference.float64(logits), own.get("softcap"), own.get("logit_scale"))
    lse = lse_of(values)
    moved = values.abs().amax(min(1, logits.dim() - 1))
    assert_accurate("lse", out.lse.detach(), reference.Truth(lse, lse.abs() + 8 + moved))
    truth = reference.entropy(values)
    assert_accurate("entropy", out.entropy.detach(), truth._replace(condition=(1 + moved) * truth.condition))
    grad_loss = torch.tensor(-2.625, dtype=out.loss.dtype, device=device)
    grad_lse, grad_entropy = grad_output_for(out.lse), grad_output_for(out.entropy).flip(0) + 0.5
    upstream = [grad_loss, grad_lse, grad_entropy]
    (grad,) = torch.autograd.grad([out.loss, out.lse, out.entropy], logits, upstream)
    grads = {"grad_output": grad_loss, "grad_lse": grad_lse, "grad_entropy": grad_entropy}
    assert_accurate("gradient", grad, reference.softmax_ce(logits, target, **grads, **options, **own).grad_logits)


@pytest.mark.parametrize(("layout", "reduction"), [(None, "mean"), ("transposed", "none"), ("offset", "sum")])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "dtype"), cases.KERNEL_TYPES)
def test_gradient_of_a_scale(
    device: str,
    kind: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    softcap: float | None,
    layout: str | None,
    reduction: str,
) -> None:
    """By way of all outputs: what torch has of it in float64."""
    if layout is not None and len(shape) == 1:
        pytest.skip("a layout of more dimensions")
    logits = cases.arranged(layout, shape, dtype, device)
    target, options = cases.kernel_problem(kind, logits)
    own = {"softcap": softcap, "z_loss": Z, "reduction": reduction}
    acc = torch.promote_types(dtype, torch.float32)
    scale = torch.tensor(0.7, dtype=acc, device=device, requires_grad=True)
    out = ours.cross_entropy(logits, target, logit_scale=scale, dtype=acc, **RETURNED, **options, **own)
    upstream = [grad_output_for(out.loss), grad_output_for(out.lse), grad_output_for(out.entropy).flip(0) + 0.5]
    (result,) = torch.autograd.grad([out.loss, out.lse, out.entropy], scale, upstream)
    assert result.dtype == acc

    def in_double(value: Any) -> Any:
        return value.cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else value

    logits, exact = in_double(logits).requires_grad_(), in_double(scale.detach()).requires_grad_()
    target = in_double(target) if target.is_floating_point() else target.cpu().long()
    options = {name: in_double(value) for name, value in options.items()}
    class_dim = min(1, logits.dim() - 1)
    values = composed.transformed(logits, softcap, exact)
    outputs = [
        composed.cross_entropy(logits, target, logit_scale=exact, **options, **own),
        values.logsumexp(class_dim),
        composed.entropy(values, class_dim),
    ]
    expected, of_logits = torch.autograd.grad(outputs, [exact, logits], [in_double(grad) for grad in upstream])
    terms = (of_logits * logits / exact).detach()  # a row's softmax is rounded by its largest value
    largest = logits.detach().abs().amax(class_dim, keepdim=True)
    allowed = 8 * torch.finfo(acc).eps * float((terms.abs() * (2 + largest)).sum())
    torch.testing.assert_close(in_double(result), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("classes", [10, 100, 600, 1001])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_scaled_logits_far_from_zero(device: str, dtype: torch.dtype, classes: int, tensor: bool) -> None:
    """A product is rounded before the largest is subtracted: what is certain costs nothing, and equals are equal."""
    for size in (1e3, 1e4, 6e4, 1e7, 3e9, 1e30):
        if size > torch.finfo(dtype).max:
            continue
        logits = torch.zeros(6, classes, dtype=dtype, device=device)
        logits[0, 0] = logits[1, classes // 2] = logits[2, classes - 1] = logits[3, 7] = size
        logits[4:] = size
        target = torch.tensor([0, classes // 2, classes - 1, 7, 0, classes - 1], device=device)
        scale = torch.tensor(1.3, device=device, requires_grad=True) if tensor else 1.3
        for arranged in (logits, logits.T.contiguous().T):
            leaf = arranged.clone().requires_grad_()
            out = ours.cross_entropy(
                leaf, target, reduction="none", logit_scale=scale, return_entropy=True, dtype=torch.float64
            )
            ends = torch.tensor([0.0] * 4 + [math.log(classes)] * 2, dtype=torch.float64)
            torch.testing.assert_close(out.loss.detach().cpu(), ends, rtol=1e-6, atol=0)
            torch.testing.assert_close(out.entropy.detach().cpu().double(), ends, rtol=1e-6, atol=0)
            certain = (out.loss + out.entropy)[:4].sum()
            grads = torch.autograd.grad(certain, [leaf, scale] if tensor else [leaf])
            assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("classes", [5, 100])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_entropy_at_the_ends(device: str, dtype: torch.dtype, classes: int) -> None:
    """0 of a certain class and log C of equal ones, masked or not; without a softmax NaN. Of ignored rows too."""
    logits = cases.normal((8, classes), dtype, device)
    logits[0] = 3
    logits[1, 1:] = -torch.inf
    logits[2, 0], logits[2, 1:] = 60_000, -60_000
    logits[3, 2:] = -torch.inf
    logits[3, :2] = -7
    logits[4] = -torch.inf
    logits[5, 1] = torch.nan
    logits[6, 1] = torch.inf
    target = torch.tensor([-100, 0, 0, 1, -100, -100, -100, 2], device=device)
    ends = torch.tensor([math.log(classes), 0, 0, math.log(2)], dtype=torch.float64)
    for arranged in (logits, logits.T.contiguous().T):
        leaf = arranged.detach().requires_grad_()
        for scale in (None, torch.tensor(1.0, device=device)):
            out = ours.cross_entropy(leaf, target, logit_scale=scale, return_entropy=True)
            torch.testing.assert_close(out.entropy[:4].detach().cpu().double(), ends, rtol=1e-6, atol=0)
            assert out.entropy[4:7].isnan().all()
            for create_graph in (False, True):
                of_four = out.entropy[:4].sum() + out.entropy[7]
                (grad,) = torch.autograd.grad(of_four, leaf, create_graph=create_graph, retain_graph=True)
                assert (grad[:4].detach().abs() < 1e-6).all()
                assert (grad[4:7] == 0).all()
                assert (grad[7] != 0).all()
                # An ignored row of no softmax has the gradient 0 even where it is asked for.
                (grad,) = torch.autograd.grad(out.entropy.sum(), leaf, create_graph=create_graph, retain_graph=True)
                assert (grad[4:7] == 0).all()


@pytest.mark.parametrize("classes", [5, 10, 100, 1001])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_predictions_as_argmax(device: str, dtype: torch.dtype, classes: int) -> None:
    """The first of equals, the first NaN, infinities, rows of minus infinity, in ignored rows as in others."""
    inf, nan = torch.inf, torch.nan
    logits = cases.normal((12, classes), dtype, device).clamp(max=2)
    logits[0] = 0
    logits[1] = -inf
    logits[2, [classes // 2, classes - 1]] = 5
    logits[3, classes - 1] = nan
    logits[4, 1], logits[4, 2], logits[4, classes - 1] = inf, nan, nan
    logits[5, classes - 1] = inf
    logits[6, :-1] = -inf
    logits[7] = torch.finfo(dtype).min
    logits[8] = -0.0
    logits[8, classes // 2] = 0.0
    logits[9, 1:] = nan
    target = torch.full((12,), -100, device=device)
    target[10:] = 1
    for arranged, named in ((logits, target), (logits.T.contiguous().T, target)):
        out = ours.cross_entropy(arranged, named, return_predictions=True)
        assert_bitwise_equal(out.predictions, logits.argmax(1))
        assert out.lse is None
    images = logits.T.reshape(1, classes, 3, 4)
    for own in ({}, {"softcap": 0.1}, {"logit_scale": 1e-3}):  # where values of logits are equal the logits are not
        out = ours.cross_entropy(images, target.view(1, 3, 4), return_predictions=True, **own)
        assert_bitwise_equal(out.predictions, images.argmax(1))
        out = ours.cross_entropy(logits, target, return_predictions=True, **own)
        assert_bitwise_equal(out.predictions, logits.argmax(1))


@pytest.mark.parametrize("classes", [10, 100])
def test_lse_without_a_softmax(device: str, classes: int) -> None:
    """Minus infinity of nothing else; NaN with a NaN or infinity. An ignored row's gradient is 0 unless it is asked."""
    logits = cases.normal((4, classes), torch.float32, device)
    logits[0] = -torch.inf
    logits[1, 3] = torch.nan
    logits[2, 3] = torch.inf
    logits.requires_grad_()
    target = torch.tensor([-100, -100, -100, 2], device=device)
    out = ours.cross_entropy(logits, target, return_lse=True)
    assert out.lse[0] == -torch.inf
    assert out.lse[1:3].isnan().all()
    for create_graph in (False, True):
        for lse in (out.lse[3], out.lse.nan_to_num(0, 0, 0).sum()):
            (grad,) = torch.autograd.grad(out.loss + lse, logits, create_graph=create_graph, retain_graph=True)
            assert (grad[:3] == 0).all()
            assert grad[3].isfinite().all()
        (grad,) = torch.autograd.grad(out.lse.sum(), logits, create_graph=create_graph, retain_graph=True)
        assert (grad[:3] == 0).all()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("classes", [8, 100])
def test_lse_beside_a_mean_over_nothing(device: str, classes: int, create_graph: bool) -> None:
    """The gradient of lse is none of the mean's, whose divisor is 0."""
    logits = cases.normal((3, classes), torch.float64, device).requires_grad_()
    ignored, target = torch.full((3,), -100, device=device), torch.tensor([1, 2, 0], device=device)
    no_weight = torch.zeros(classes, dtype=torch.float64, device=device)
    expected = torch.softmax(logits.detach(), 1)
    for y, options in ((ignored, {}), (ignored, {"z_loss": Z}), (target, {"weight": no_weight})):
        out = ours.cross_entropy(logits, y, return_lse=True, label_smoothing=0.1, **options)
        (grad,) = torch.autograd.grad(out.lse.sum(), logits, create_graph=create_graph, retain_graph=True)
        torch.testing.assert_close(grad.detach(), expected)
        if y is ignored:
            total = out.loss.nan_to_num(0.0) + out.lse.sum()
            (grad,) = torch.autograd.grad(total, logits, create_graph=create_graph)
            torch.testing.assert_close(grad.detach(), expected)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_an_ignored_row_has_no_part_whatever_its_weight(device: str, reduction: str) -> None:
    logits = cases.normal((4, 10), torch.float32, device).requires_grad_()
    target = torch.tensor([1, 2, 3, -100], device=device)
    finite = torch.tensor([1.0, 2, 3, 1], device=device)
    for value in (torch.inf, torch.nan, -1.0):
        weight = finite.clone()
        weight[3] = value
        outs = [
            ours.cross_entropy(logits, target, z_loss=Z, sample_weight=v, reduction=reduction, return_z_loss=True)
            for v in (weight, finite)
        ]
        assert_bitwise_equal(outs[0].loss, outs[1].loss)
        assert_bitwise_equal(outs[0].z_loss, outs[1].z_loss)
        assert_bitwise_equal(*(torch.autograd.grad(out.loss.sum(), logits)[0] for out in outs))


@pytest.mark.parametrize(("dtype", "ignored"), [(torch.uint8, -100), (torch.uint8, 257), (torch.int32, 2**32 + 1)])
def test_ignore_index_that_the_target_cannot_hold(device: str, dtype: torch.dtype, ignored: int) -> None:
    """No class is taken for it, in any part of the output."""
    logits = cases.normal((3, 200), torch.float64, device, scale=3)
    target = torch.tensor([156, 1, 2], dtype=dtype, device=device)
    out = ours.cross_entropy(logits, target, z_loss=Z, ignore_index=ignored, return_z_loss=True)
    expected = ours.cross_entropy(logits, target.long(), z_loss=Z, return_z_loss=True)
    assert_bitwise_equal(out.loss, expected.loss)
    assert_bitwise_equal(out.z_loss, expected.z_loss)


def test_z_loss_value(device: str) -> None:
    """Reduced as the loss is: what is left without it is the plain loss."""
    logits = cases.normal((33, 100), torch.float64, device, scale=3).requires_grad_()
    target = cases.indices((33,), 100, torch.int64, device)
    target[3:6] = -100
    weight = cases.uniform((100,), torch.float64, device)
    of_rows = cases.uniform((33,), torch.float64, device, seed=9)
    for reduction in cases.REDUCTIONS:
        for own in ({}, {"sample_weight": of_rows}, {"divisor": 7}, {"sample_weight": of_rows, "divisor": 7}):
            if "divisor" in own and reduction != "mean":
                continue
            options = {"weight": weight, "reduction": reduction, **own}
            out = ours.cross_entropy(logits, target, z_loss=Z, return_z_loss=True, **options)
            plain = ours.cross_entropy(logits, target, **options)
            torch.testing.assert_close(out.loss - out.z_loss, plain, rtol=1e-12, atol=1e-12)
            assert not out.z_loss.requires_grad
            assert (out.z_loss > 0).any()
            if reduction == "none":
                assert (out.z_loss[3:6] == 0).all()


def test_gradients_of_rows_weights(device: str) -> None:
    """Of sample_weight and a divisor, in every reduction, and the second derivatives of all."""
    logits = cases.normal((4, 5), torch.float64, device).requires_grad_()
    weight = (cases.uniform((4,), torch.float64, device) + 0.5).requires_grad_()
    divisor = torch.tensor(2.5, dtype=torch.float64, device=device, requires_grad=True)
    classes = cases.uniform((5,), torch.float64, device)
    for target in (torch.tensor([0, 1, -100, 4], device=device), cases.probabilities((4, 5), torch.float64, device)):
        for reduction in cases.REDUCTIONS:

            def loss(x: Tensor, v: Tensor, d: Tensor | None = None, target=target, reduction=reduction) -> Any:
                out = ours.cross_entropy(
                    x,
                    target,
                    classes,
                    reduction=reduction,
                    label_smoothing=0.1,
                    z_loss=0.1,
                    sample_weight=v,
                    divisor=d,
                    return_lse=True,
                )
                return out.loss, out.lse

            inputs = (logits, weight, divisor) if reduction == "mean" else (logits, weight)
            torch.autograd.gradcheck(loss, inputs)
            torch.autograd.gradgradcheck(loss, inputs)
            torch.autograd.gradcheck(loss, (logits, weight), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_gradients_of_everything(device: str, kind: str, softcap: float | None) -> None:
    """By finite differences, the second ones too: of all outputs, by logits, a scale, probabilities."""
    logits = cases.normal((4, 5), torch.float64, device, scale=2).requires_grad_()
    scale = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([0, 1, -100, 4], device=device)
    inputs = [logits, scale]
    if kind == "probability":
        target = cases.probabilities((4, 5), torch.float64, device).requires_grad_()
        inputs.append(target)

    def outputs(x: Tensor, a: Tensor, y: Tensor = target) -> tuple[Tensor, ...]:
        out = ours.cross_entropy(
            x, y, softcap=softcap, logit_scale=a, z_loss=0.1, label_smoothing=0.1, return_lse=True, return_entropy=True
        )
        return out.loss, out.lse, out.entropy

    torch.autograd.gradcheck(outputs, inputs, check_batched_grad=True)
    torch.autograd.gradcheck(outputs, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(outputs, inputs)
    torch.autograd.gradgradcheck(lambda x, y=target: outputs(x, scale.detach(), y), [inputs[0], *inputs[2:]])


@pytest.mark.parametrize("classes", [5, 100])
def test_a_mask_under_a_softcap(device: str, classes: int) -> None:
    """Becomes the negative cap, which masks nothing; its gradient is 0, as the tanh is level there."""
    logits = cases.normal((3, classes), torch.float64, device)
    logits[:, 2] = -torch.inf
    logits[1, 3] = torch.inf
    logits.requires_grad_()
    target = torch.tensor([1, 3, 2], device=device)
    out = ours.cross_entropy(logits, target, softcap=5.0, return_entropy=True)
    values = 5 * torch.tanh(logits.detach() / 5)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(values, target))
    torch.testing.assert_close(out.entropy, composed.entropy(values, 1))
    (grad,) = torch.autograd.grad(out.loss + out.entropy.sum(), logits)
    assert (grad[:, 2] == 0).all()
    assert grad[1, 3] == 0
    assert (grad[0, :2] != 0).all()


def test_zero_weight_of_an_infinite_loss(device: str) -> None:
    """0, as a class weight of 0 has it; a row with a NaN stays one."""
    logits = torch.zeros(3, 4, device=device)
    logits[0, 1] = -torch.inf
    logits[2, 0] = torch.nan
    target = torch.tensor([1, 1, 1], device=device)
    rows = ours.cross_entropy(logits, target, sample_weight=torch.tensor([0.0, 1, 0], device=device), reduction="none")
    assert rows[0] == 0
    assert rows[1].isfinite()
    assert rows[2].isnan()


@pytest.mark.parametrize("value", [None, 0.0, 2.5])
@pytest.mark.parametrize("case", ["ignored", "no_rows", "sample_weight", "class_weight", "probability"])
def test_empty_value(device: str, case: str, value: float | None) -> None:
    rows = 0 if case in ("no_rows", "probability") else 4
    logits = cases.normal((rows, 10), torch.float32, device).requires_grad_()
    target = torch.full((rows,), -100 if case == "ignored" else 3, device=device)
    if case == "probability":
        target = cases.probabilities((rows, 10), torch.float32, device)
    options: dict[str, Any] = {"empty_value": value, "z_loss": Z}
    if case == "sample_weight":
        options["sample_weight"] = torch.zeros(rows, device=device)
    if case == "class_weight":
        options["weight"] = torch.zeros(10, device=device)
    loss = ours.cross_entropy(logits, target, **options)
    loss.backward()
    if value is None:  # infinite where the z-loss, which class weights do not multiply, is divided by their sum
        assert loss.isinf() if case == "class_weight" else loss.isnan()
        return
    assert loss == value
    assert (logits.grad == 0).all()


def test_empty_value_of_a_mean_that_is_there(device: str) -> None:
    logits = cases.normal((4, 10), torch.float32, device).requires_grad_()
    target = torch.tensor([1, -100, 2, 3], device=device)
    check_softmax_ce(logits, target, empty_value=0.0)
    check_softmax_ce(logits, target, empty_value=0.0, z_loss=Z)


def test_float32_loss_of_16_bits(device: str) -> None:
    """Not what 16 bits would have of it, and no less than float32 logits give."""
    logits = (40 * cases.normal((64, 1000), torch.float64, device)).to(torch.bfloat16)
    target = cases.indices((64,), 1000, torch.int64, device)
    loss = ours.cross_entropy(logits, target, dtype=torch.float32)
    assert_bitwise_equal(loss, ours.cross_entropy(logits.float(), target))
    assert loss != ours.cross_entropy(logits, target)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=dtype_id)
def test_several_ignore_indices(device: str, dtype: torch.dtype) -> None:
    """As if all of their rows had one; those that the target's dtype cannot hold are in no row."""
    logits = cases.normal((64, 10), torch.float32, device).requires_grad_()
    target = cases.indices((64,), 10, dtype, device)
    one = torch.where((target == 3) | (target == 7), -100, target.long())
    for indices in ((3, 7), (7, 3), (3, -100, 7, 2**40), (3, 7, 300)):
        expected, result = ours.cross_entropy(logits, one), ours.cross_entropy(logits, target, ignore_index=indices)
        assert_bitwise_equal(result, expected)
        assert_bitwise_equal(*(torch.autograd.grad(loss, logits)[0] for loss in (result, expected)))
        assert_bitwise_equal(torchce.CrossEntropyLoss(ignore_index=indices)(logits, target), expected)
    nothing = ours.cross_entropy(logits, target, ignore_index=())
    assert_bitwise_equal(nothing, ours.cross_entropy(logits, target))
    probabilities = cases.probabilities((64, 10), torch.float32, device)
    same = ours.cross_entropy(logits, probabilities, ignore_index=(-1, -100))
    assert_bitwise_equal(same, ours.cross_entropy(logits, probabilities))


def test_many_rows_give_the_same_bits(restore_threads: None) -> None:
    """The sum over weighted rows too, and that of a scale's gradient, for any number of threads."""
    logits = cases.normal((100_000, 3), torch.float32, "cpu")
    target = cases.indices((100_000,), 3, torch.int64, "cpu")
    weight = cases.uniform((100_000,), torch.float32, "cpu")
    scale = torch.ones((), requires_grad=True)
    losses, gradients = [], []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        options = {"sample_weight": weight, "logit_scale": scale, "return_entropy": True}
        out = ours.cross_entropy(logits, target, dtype=torch.float64, **options)
        losses.append(out.loss.detach())
        gradients += torch.autograd.grad(out.loss + out.entropy.sum(), scale)
    for loss, gradient in zip(losses, gradients, strict=True):
        assert_bitwise_equal(loss, losses[0])
        assert_bitwise_equal(gradient, gradients[0])
    truth = reference.softmax_ce(logits, target, sample_weight=weight).loss
    assert_accurate("loss", losses[0].float(), truth)


INF = math.inf
NUMBERS = [float("nan"), float("inf"), "a", 1j, True, torch.ones(2), numpy.ones(2)]
WRONG: dict[str, list[Any]] = {
    "z_loss": [-1.0, torch.tensor(0.1), *NUMBERS],
    "softcap": [0.0, -1.0, 1e-46, 1e39, torch.tensor(5.0), *NUMBERS],
    "logit_scale": [
        *(0.0, -1.0, 1e-46, 1e39),
        *(torch.tensor(0.0), torch.tensor(-1.0, requires_grad=True)),
        torch.ones((), dtype=torch.int64),
        torch.ones((), device="meta"),
        *NUMBERS,
    ],
    "sample_weight": [
        1.0,
        numpy.ones(4),
        torch.ones(3),
        torch.ones(4, 1),
        torch.ones(4, dtype=torch.int64),
        torch.ones(4, dtype=torch.bool),
        torch.ones(4, dtype=torch.complex64),
        torch.ones(4, device="meta"),
        torch.ones(4).to_sparse(),
    ],
    "divisor": [
        "a",
        1j,
        True,
        numpy.ones(2),
        torch.ones(1),
        torch.ones(4),
        torch.tensor(True),
        torch.ones((), device="meta"),
    ],
    "dtype": [torch.int64, torch.complex64, torch.float8_e5m2, "float32"],
    "empty_value": ["a", 1j, True, numpy.ones(2), torch.ones(4)],
    "ignore_index": [(1, "a"), (1.5,), (True, 2), (2**70,)],
    "return_lse": ["no", 1, None, torch.ones(2)],
    "return_predictions": [1],
    "return_z_loss": [1],
    "return_entropy": [1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=str
)
def test_wrong_values(name: str, value: Any) -> None:
    """ValueError that names the argument, for indices and probabilities, and nothing is written."""
    for target in (torch.tensor([1, 2, 3, 4]), cases.probabilities((4, 5), torch.float32, "cpu")):
        leaf = cases.normal((4, 5), torch.float32, "cpu").requires_grad_()
        logits = cases.activation(leaf)
        before = logits.detach().clone()
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got"):
            ours.cross_entropy(logits, target, inplace_backward=True, **{name: value})
        assert_bitwise_equal(logits, before)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", ["divisor", "empty_value"])
def test_options_of_a_mean_exclude_other_reductions(name: str, reduction: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*reduction='{reduction}', got 2.0"):
        ours.cross_entropy(torch.zeros(4, 5), torch.zeros(4).long(), reduction=reduction, **{name: 2.0})


def test_options_that_exclude_one_another() -> None:
    with pytest.raises(ValueError, match=r"empty_value.*divisor, got 0.0 and 3"):
        ours.cross_entropy(torch.zeros(4, 5), torch.zeros(4).long(), divisor=3, empty_value=0.0)


def test_divisor_of_zero(device: str) -> None:
    """As arithmetic has it."""
    logits, target = torch.zeros(4, 5, device=device), torch.zeros(4, device=device).long()
    assert ours.cross_entropy(logits, target, divisor=0) == torch.inf
    assert ours.cross_entropy(logits, target - 100, ignore_index=-100, divisor=0).isnan()
    assert ours.cross_entropy(logits, target, divisor=10**30) > 0
    for divisor in (torch.tensor(8), torch.tensor(8, device=device, dtype=torch.int32), 8):
        assert_bitwise_equal(
            ours.cross_entropy(logits, target, divisor=divisor), ours.cross_entropy(logits, target) / 2
        )


def test_what_only_torch_takes_is_refused() -> None:
    """Not answered without the option; and what torch refuses as torch does."""
    logits = torch.zeros(4, 5, dtype=torch.complex64)
    with pytest.raises((ValueError, RuntimeError), match=r"no kernel for input: torch\.complex64"):
        ours.cross_entropy(logits, torch.zeros(4).long(), z_loss=0.1)
    no_classes = torch.zeros(0, 0), torch.zeros(0).long()
    torch.nn.functional.cross_entropy(*no_classes)  # torch answers
    with pytest.raises(ValueError, match=r"at least one class.*torch's loss answers there"):
        ours.cross_entropy(*no_classes, z_loss=0.1)
    with pytest.raises(TypeError, match=r"cross_entropy\(\) got an unexpected keyword argument 'zloss'"):
        ours.cross_entropy(torch.zeros(4, 5), torch.zeros(4).long(), zloss=0.1)


def test_signature_names_the_arguments() -> None:
    """With their defaults and types, in front of the one that is a parameter."""
    parameters = inspect.signature(ours.cross_entropy).parameters
    own = list(parameters.values())[8:]
    assert [p.name for p in own] == [*Own._fields, "inplace_backward"]
    assert {p.kind for p in own} == {inspect.Parameter.KEYWORD_ONLY}
    assert parameters["z_loss"].annotation is float
    assert typing.get_type_hints(ours.cross_entropy)["reduction"] is str
    module = inspect.signature(torchce.CrossEntropyLoss).parameters
    of_call = inspect.signature(torchce.CrossEntropyLoss.forward).parameters
    assert set(Own._fields) == set(list(module)[6:-1]) | set(list(of_call)[3:])
    for name in Own._fields:
        assert (module.get(name) or of_call[name]).default == Own._field_defaults[name]


def test_output_is_a_tuple_of_what_was_asked() -> None:
    logits, target = torch.zeros(4, 5), torch.zeros(4).long()
    out = torchce.CrossEntropyLoss(return_lse=True)(logits, target)
    assert type(out) is torchce.CrossEntropyOutput
    assert out._fields == ("loss", "lse", "predictions", "z_loss", "entropy")
    assert (out.predictions, out.z_loss, out.entropy) == (None, None, None)
    assert isinstance(torchce.CrossEntropyLoss(z_loss=0.1)(logits, target), Tensor)


def test_module() -> None:
    """Every argument of the function, kept with the module, changed on it, and copied with it."""
    logits, target = cases.normal((4, 5), torch.float32, "cpu"), torch.tensor([1, 2, -100, 4])
    options = {"z_loss": 0.1, "dtype": torch.float64, "empty_value": 0.0, "return_lse": True, "return_z_loss": True}
    loss = torchce.CrossEntropyLoss(**options)
    expected = ours.cross_entropy(logits, target, **options)
    for module in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        for result, value in zip(module(logits, target), expected, strict=True):
            assert (result is None) == (value is None)
            if value is not None:
                assert_bitwise_equal(result, value)
    loss.return_lse, loss.return_z_loss, loss.z_loss = False, False, 0.0
    loss.dtype = loss.empty_value = None
    assert_bitwise_equal(loss(logits, target), ours.cross_entropy(logits, target))
    assert loss.z_loss == 0.0
    rows = torch.tensor([1.0, 2, 3, 4])
    assert_bitwise_equal(
        loss(logits, target, sample_weight=rows, divisor=3),
        ours.cross_entropy(logits, target, sample_weight=rows, divisor=3),
    )


def test_a_scale_that_the_module_learns() -> None:
    """A parameter is the module's: it is found, moved, saved, and has a gradient."""
    logits, target = cases.normal((4, 5), torch.float32, "cpu"), torch.tensor([1, 2, 0, 4])
    loss = torchce.CrossEntropyLoss(logit_scale=torch.nn.Parameter(torch.tensor(2.0)), softcap=5.0)
    assert list(dict(loss.named_parameters())) == ["logit_scale"]
    result = loss(logits, target)
    assert_bitwise_equal(result, ours.cross_entropy(logits, target, logit_scale=torch.tensor(2.0), softcap=5.0))
    result.backward()
    assert loss.logit_scale.grad != 0
    other = torchce.CrossEntropyLoss(logit_scale=torch.nn.Parameter(torch.tensor(1.0)), softcap=5.0)
    other.load_state_dict(loss.state_dict())
    assert_bitwise_equal(other.double()(logits.double(), target), loss.double()(logits.double(), target))


def test_a_subclass_may_have_a_property() -> None:
    class Hot(torchce.CrossEntropyLoss):
        @property
        def z_loss(self) -> float:  # type: ignore[override]
            return 0.5

        @z_loss.setter
        def z_loss(self, value: float) -> None: ...

    logits, target = cases.normal((4, 5), torch.float32, "cpu"), torch.tensor([1, 2, 0, 4])
    assert_bitwise_equal(Hot()(logits, target), ours.cross_entropy(logits, target, z_loss=0.5))


class Exp(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_a_scale_wherever_it_is_kept() -> None:
    """Set later, as a number, tensor, parameter or buffer, and parametrized to stay positive."""
    logits, target = cases.normal((4, 5), torch.float32, "cpu"), torch.tensor([1, 2, 0, 4])
    expected = ours.cross_entropy(logits, target, logit_scale=torch.tensor(2.0))
    for value in (torch.tensor(2.0), torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Buffer(torch.tensor(2.0))):
        for loss in (torchce.CrossEntropyLoss(), torchce.CrossEntropyLoss(logit_scale=value)):
            loss.logit_scale = value
            for module in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
                assert_bitwise_equal(module(logits, target).detach(), expected)
    loss = torchce.CrossEntropyLoss(logit_scale=2.0)
    torch.testing.assert_close(loss(logits, target), expected)
    loss.logit_scale = None
    assert_bitwise_equal(loss(logits, target), ours.cross_entropy(logits, target))
    del loss.logit_scale
    loss.register_parameter("logit_scale", torch.nn.Parameter(torch.tensor(0.5)))
    torch.nn.utils.parametrize.register_parametrization(loss, "logit_scale", Exp())
    scaled = ours.cross_entropy(logits, target, logit_scale=torch.tensor(0.5).exp())
    assert_bitwise_equal(loss(logits, target).detach(), scaled)
    loss(logits, target).backward()
    assert next(loss.parameters()).grad != 0


def test_a_scale_as_number_and_as_tensor(device: str) -> None:
    """The same loss and gradient."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = cases.normal((40, 33), dtype, device, scale=3).requires_grad_()
        target = cases.indices((40,), 33, torch.int64, device)
        scale = torch.tensor(1.7, dtype=torch.float64, device=device)
        losses = [ours.cross_entropy(logits, target, logit_scale=a, dtype=torch.float64) for a in (1.7, scale)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses), rtol=1e-2, atol=1e-6)


def test_a_scale_is_not_poisoned(device: str) -> None:
    """By ignored rows and masked classes: they have no part in its gradient. Predictions are of the logits."""
    logits = cases.normal((4, 5), torch.float32, device)
    logits[1], logits[:, 3] = torch.nan, -torch.inf
    target = torch.tensor([0, -100, 2, 4], device=device)
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    loss = ours.cross_entropy(logits, target, logit_scale=scale)
    (grad,) = torch.autograd.grad(loss, scale)
    kept = logits[[0, 2, 3]][:, [0, 1, 2, 4]].double()
    exact = torch.tensor(2.0, device=device, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(exact * kept, torch.tensor([0, 2, 3], device=device))
    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(expected, exact)[0])
    near = torch.tensor([[1.0, 1.0 + 2**-23]], device=device)
    out = ours.cross_entropy(near, target[:1], logit_scale=torch.tensor(0.3), return_predictions=True)
    assert out.predictions == 1


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_scale_that_is_not_positive(device: str, value: float) -> None:
    """Where nobody could see it before: NaN, in the kernels and in what stands for them."""
    logits, target = torch.zeros(3, 40, device=device), torch.tensor([1, 2, -100], device=device)
    scale = torch.tensor(value, device=device)
    for function in (ops.softmax_ce_forward_outputs, softmax_ce_formulas.composite_outputs):
        for softcap in (0.0, 5.0):
            arguments = (logits, target, None, scale, None, True, True, True, 1, -100, 0.0, 0.0, softcap, 1.0)
            loss, lse, predictions, entropy, *_ = function(*arguments)
            assert all(result.isnan().all() for result in (loss, lse, entropy))
            assert (predictions == 0).all()


def test_batched_gradients_of_a_scale(device: str) -> None:
    """Of more rows than torch adds up at once."""
    logits = cases.normal((20_000, 3), torch.float32, device).requires_grad_()
    target = cases.indices((20_000,), 3, torch.int64, device)
    scale = torch.tensor(0.7, device=device, requires_grad=True)
    loss = ours.cross_entropy(logits, target, logit_scale=scale)
    upstream = torch.tensor([1.0, -3.0], device=device)
    batched = torch.autograd.grad(loss, [logits, scale], upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(loss, [logits, scale], grad, retain_graph=True) for grad in upstream]
    for result, expected in zip(batched, map(torch.stack, zip(*single, strict=True)), strict=True):
        assert_bitwise_equal(result, expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"logit_scale": torch.tensor(1e-50, dtype=torch.float64)}, "logit_scale"),
        ({"logit_scale": torch.tensor(1e50, dtype=torch.float64)}, "logit_scale"),
        ({"logit_scale": torch.tensor(math.inf)}, "logit_scale"),
        ({"logit_scale": torch.nn.Parameter(torch.tensor(-1.0))}, "logit_scale"),
        ({"logit_scale": torch.tensor(1e30), "softcap": 1e-10}, "logit_scale / softcap"),
    ],
    ids=str,
)
def test_scales_beyond_the_dtype_of_computation(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a positive number within the range of torch.float32, got"):
        ours.cross_entropy(torch.zeros(4, 5), torch.zeros(4).long(), **options)


@pytest.mark.parametrize(("softcap", "scale"), [(1e25, 1e-20), (1e30, 1e-30), (1e-9, 1e30)])
def test_softcap_and_scale_beyond_each_other(softcap: float, scale: float) -> None:
    """Their quotient is a factor of the kernels."""
    with pytest.raises(ValueError, match=r"^logit_scale / softcap: expected .*float32, got"):
        ours.cross_entropy(torch.zeros(1, 3), torch.zeros(1).long(), softcap=softcap, logit_scale=scale)


def test_z_loss_value_at_the_ends() -> None:
    """As the loss has it: 0 without a factor, finite where its product is."""
    logits, target = torch.tensor([[1e20, -1e20, 0.0]]), torch.tensor([0])
    for z in (0.0, 1e-30):
        out = ours.cross_entropy(logits, target, z_loss=z, return_z_loss=True)
        torch.testing.assert_close(out.z_loss, torch.tensor(z * 1e40))
    no_weight = torch.zeros(3)
    out = ours.cross_entropy(logits, target, no_weight, z_loss=0.1, empty_value=3.0, return_z_loss=True)
    assert (out.loss, out.z_loss) == (3, 0)


@pytest.mark.parametrize("temperature", [1.0, 0.5, torch.tensor(2.0)], ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_token_logprobs(device: str, dtype: torch.dtype, temperature: float | Tensor) -> None:
    """Of a model's [batch, time, classes], without a copy, in float32 at least."""
    logits = cases.normal((2, 7, 100), dtype, device, scale=3).requires_grad_()
    tokens = cases.indices((2, 7), 100, torch.int64, device)
    result = ours.token_logprobs(logits.transpose(1, 2), tokens, temperature)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    truth = reference.float64(logits) / float(temperature)
    truth = torch.log_softmax(truth, 2).gather(2, tokens.cpu()[..., None])[..., 0]
    assert_accurate("log-probabilities", result.detach(), reference.Truth(truth, truth.abs() + 24))
    result.sum().backward()
    assert logits.grad.dtype == dtype
    out = ours.token_logprobs(logits.transpose(1, 2), tokens, temperature, return_entropy=True)
    assert type(out) is torchce.TokenLogprobsOutput
    torch.testing.assert_close(out.logprobs, result, rtol=1e-6, atol=1e-6)  # on CUDA by kernels of their own
    assert out.entropy.dtype == result.dtype
    of_values = reference.entropy(reference.float64(logits).transpose(1, 2) / float(temperature))
    assert_accurate("entropy", out.entropy.detach(), of_values._replace(condition=24 * of_values.condition))
    tokens[0, 0] = -100
    assert_bitwise_equal(ours.token_logprobs(logits.transpose(1, 2), tokens)[0, 0], torch.zeros_like(result[0, 0]))


@pytest.mark.parametrize(
    "temperature",
    [
        *(0, -1.0, float("nan"), 5e-324, 1e-40, True, "a"),
        *(torch.ones(1), torch.ones((), dtype=torch.int64), torch.tensor(-1.0), torch.tensor(1e-40), torch.tensor(INF)),
    ],
)
def test_token_logprobs_of_a_wrong_temperature(temperature: Any) -> None:
    with pytest.raises(ValueError, match=r"^temperature: expected .*, got"):
        ours.token_logprobs(torch.zeros(4, 5), torch.zeros(4).long(), temperature)
    with pytest.raises(ValueError, match=r"^target: expected class indices, got torch\.float32"):
        ours.token_logprobs(torch.zeros(4, 5), torch.zeros(4, 5))
