"""Divergences of a student's linear layer from a teacher's, without the logits of either: distillation of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from torchce import overrides
from torchce.composites import sum_of_rows
from torchce.divergence import JS, REVERSE_KL
from torchce.functional._common import (
    autocasts,
    have_kernels,
    promoted,
    reduction_number,
    refuse_scripting,
    requires_grad,
)
from torchce.functional.divergence import (
    check_device,
    check_loss_dtype,
    check_mask,
    check_temperature,
    js_div_with_logits,
    kind_of,
    kl_div_with_logits,
)
from torchce.functional.linear_chunks import chunks_of
from torchce.functional.linear_layer import autocast_layer, check_dtypes, check_layer
from torchce.functional.linear_softmax_ce import SMALL_BYTES
from torchce.linear_divergence import Inputs, Loss, linear_divergence
from torchce.sizes import known
from torchce.transforms import transformed

_MEAN = 1


@refuse_scripting
def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    target_input: Tensor,
    target_linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    reverse: bool = False,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    chunk_rows: int | None = None,
    acc_policy: str = "auto",
) -> Tensor:
    r"""Kullback-Leibler divergence of a student's linear layer from a teacher's, both fused with it.

    That is :func:`torchce.functional.kl_div_with_logits` of ``linear(input, linear_weight, linear_bias)`` and of
    ``linear(target_input, target_linear_weight, target_linear_bias)`` for logits of the teacher: the layers and the
    loss go through pieces of rows, so that the logits of neither are ever whole. The backward computes a piece's
    logits anew; both passes together take six matrix products, where whole logits take four.

    In pieces only the student has gradients. Where a tensor of the teacher's requires grad, it has its own, but through
    whole logits; so do transforms of :mod:`torch.func` and second derivatives, and small calls, whose logits take 2 MiB
    at most.

    Args:
        input (Tensor): the student's features
        linear_weight (Tensor): of the student's layer
        target_input (Tensor): the teacher's features, as many rows
        target_linear_weight (Tensor): of the teacher's layer, to as many classes

    Keyword Args:
        linear_bias, target_linear_bias (Tensor, optional): of the layers. Default: ``None``
        reduction, temperature, reverse, mask, dtype: as in :func:`torchce.functional.kl_div_with_logits`
        chunk_bytes, chunk_rows, acc_policy: how the rows are cut, as in
            :func:`torchce.functional.linear_cross_entropy`

    Shape:
        - input: :math:`(N, H)`, linear_weight: :math:`(C, H)`, linear_bias: :math:`(C)`
        - target_input: :math:`(N, G)`, target_linear_weight: :math:`(C, G)`, target_linear_bias: :math:`(C)`
        - mask: :math:`(N)`
        - output: a scalar, or with ``reduction='none'`` :math:`(N)`

    Returns:
        Tensor: the loss, of the dtype that the unfused one has.

    Raises:
        RuntimeError: the shapes or dtypes of a layer do not fit.
        ValueError: the layers do not fit each other, or an argument is wrong.

    Example::

        >>> features = torch.ones(2, 8)
        >>> student, teacher = torch.zeros(4, 8, requires_grad=True), torch.eye(4, 8)
        >>> torchce.functional.linear_kl_div(features, student, features, teacher)
        tensor(0., grad_fn=<DivergenceBackward>)
    """
    own = {
        "linear_bias": linear_bias,
        "target_linear_bias": target_linear_bias,
        "reduction": reduction,
        "reverse": reverse,
        "temperature": temperature,
        "mask": mask,
        "dtype": dtype,
        "chunk_bytes": chunk_bytes,
        "chunk_rows": chunk_rows,
        "acc_policy": acc_policy,
    }
    return _answer(linear_kl_div, (input, linear_weight, target_input, target_linear_weight), own)


@refuse_scripting
def linear_js_div(
    input: Tensor,
    linear_weight: Tensor,
    target_input: Tensor,
    target_linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    target_linear_bias: Tensor | None = None,
    reduction: str = "mean",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    chunk_rows: int | None = None,
    acc_policy: str = "auto",
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence between a student's and a teacher's linear layer, fused with both.

    That is :func:`torchce.functional.js_div_with_logits` of the logits of two linear layers, which are never whole: see
    :func:`linear_kl_div`.

    Args:
        input (Tensor): the student's features
        linear_weight (Tensor): of the student's layer
        target_input (Tensor): the teacher's features, as many rows
        target_linear_weight (Tensor): of the teacher's layer, to as many classes

    Keyword Args:
        beta (float): as in :func:`torchce.functional.js_div_with_logits`. Default: 0.5
        linear_bias, target_linear_bias, reduction, temperature, mask, dtype, chunk_bytes, chunk_rows, acc_policy: as in
            :func:`linear_kl_div`

    Shape:
        As in :func:`linear_kl_div`.

    Returns:
        Tensor: the loss, of the dtype that the unfused one has.

    Raises:
        RuntimeError: the shapes or dtypes of a layer do not fit.
        ValueError: the layers do not fit each other, or an argument is wrong.

    Example::

        >>> features = torch.ones(2, 8)
        >>> student, teacher = torch.zeros(4, 8, requires_grad=True), torch.eye(4, 8)
        >>> torchce.functional.linear_js_div(features, student, features, teacher, beta=0.1)
        tensor(0., grad_fn=<DivergenceBackward>)
    """
    own = {
        "linear_bias": linear_bias,
        "target_linear_bias": target_linear_bias,
        "reduction": reduction,
        "beta": beta,
        "temperature": temperature,
        "mask": mask,
        "dtype": dtype,
        "chunk_bytes": chunk_bytes,
        "chunk_rows": chunk_rows,
        "acc_policy": acc_policy,
    }
    return _answer(linear_js_div, (input, linear_weight, target_input, target_linear_weight), own)


def _answer(ours: Any, layers: tuple[Tensor, ...], own: dict[str, Any]) -> Tensor:
    """The loss of unchecked arguments, or what their handlers make of the call."""
    input, weight, target_input, target_weight = layers
    biases = own["linear_bias"], own["target_linear_bias"]
    inputs = Inputs(input, weight, biases[0], target_input, target_weight, biases[1], own["mask"])
    if has_torch_function_variadic(*inputs):
        answer: Tensor = overrides.ask_handlers(ours, ours, inputs, own, *layers)
        return answer
    inputs = Inputs(*map(overrides.plain, inputs))
    of_loss = {name: own[name] for name in ("reduction", "temperature", "mask", "dtype")}
    of_chunks = {name: own[name] for name in ("chunk_bytes", "chunk_rows", "acc_policy")}
    temperature, dtype, beta, kind = own["temperature"], own["dtype"], own.get("beta", 0.5), kind_of(own)
    number = reduction_number(own["reduction"], None, None)
    for name, tensor in inputs._asdict().items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name.endswith(("bias", "mask"))):
            raise ValueError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    student, teacher = inputs[:3], inputs[3:6]
    _check_layers(inputs)
    if autocasts(inputs.input):
        student, teacher = tuple(autocast_layer(*student)), tuple(autocast_layer(*teacher))
    check_dtypes(*student)
    check_dtypes(*teacher, prefix="target_")
    inputs = Inputs(*student, *teacher, inputs.mask)
    _check_devices(inputs)
    check_loss_dtype(dtype)
    check_temperature(temperature, promoted(inputs.input.dtype, inputs.target_input.dtype))
    check_mask(inputs.mask, inputs.input.shape[:1], inputs.input)
    chunks = chunks_of(
        options=None, **of_chunks, compact_ignored=None, input=inputs.input, linear_weight=inputs.linear_weight
    )
    by_rule = of_chunks["chunk_bytes"] is None and of_chunks["chunk_rows"] is None
    if (
        (by_rule and _is_small(inputs))
        or not have_kernels(*inputs)
        or any(map(requires_grad, inputs[3:]))
        or transformed(*inputs)
    ):
        inputs = inputs.without_masked_rows()
        logits = F.linear(*inputs[:3]), F.linear(*inputs[3:6])
        if kind == JS:
            return js_div_with_logits(*logits, target_logits=True, beta=beta, **of_loss)
        return kl_div_with_logits(*logits, target_logits=True, reverse=kind == REVERSE_KL, **of_loss)
    if dtype is None:
        dtype = promoted(inputs.input.dtype, inputs.target_input.dtype)
        dtype = promoted(dtype, torch.float32) if autocasts(inputs.input) else dtype
    losses = linear_divergence(inputs, chunks, Loss(kind, float(temperature), float(beta)))
    if number == _MEAN:
        losses = sum_of_rows(losses) / (len(losses) if inputs.mask is None else inputs.mask.sum())
    elif number > _MEAN:
        losses = sum_of_rows(losses)
    return losses.to(dtype)


def _check_devices(inputs: Inputs) -> None:
    for name, tensor in inputs._asdict().items():
        if tensor is not None:
            check_device(name, tensor, inputs.input)


def _check_layers(inputs: Inputs) -> None:
    for prefix, layer in (("", inputs[:3]), ("target_", inputs[3:6])):
        input, weight, bias = layer
        assert input is not None and weight is not None  # noqa: PT018
        if input.dim() != 2 or weight.dim() != 2:
            shapes = f"{list(input.shape)} and {list(weight.shape)}"
            raise ValueError(f"{prefix}input, {prefix}linear_weight: expected two dimensions each, got {shapes}")
        check_layer(input, weight, bias, prefix)
    (rows, _), (target_rows, _) = inputs.input.shape, inputs.target_input.shape
    if known(rows != target_rows):
        raise ValueError(f"target_input: expected {rows} rows as the input's, got {target_rows}")
    (classes, _), (target_classes, _) = inputs.linear_weight.shape, inputs.target_linear_weight.shape
    if known(classes != target_classes):
        raise ValueError(
            f"target_linear_weight: expected {classes} classes as the student's layer has, got {target_classes}"
        )
    if known(classes == 0):
        raise ValueError(f"linear_weight: expected at least one class, got shape {list(inputs.linear_weight.shape)}")


def _is_small(inputs: Inputs) -> bool:
    """Whether pieces spare nothing that counts; not where a program is traced, which would depend on the size."""
    rows, classes = inputs.input.shape[0], inputs.linear_weight.shape[0]
    if torch.compiler.is_compiling() or not inputs.input.is_cpu or type(rows * classes) is not int:
        return False
    return rows * classes * inputs.input.element_size() <= SMALL_BYTES
