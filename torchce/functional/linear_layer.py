"""What losses with their linear layer ask of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchce.functional._common import has_shape
from torchce.sizes import known


def check_layer(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, prefix: str = "") -> None:
    """Raises what torch raises where the layer's shapes do not fit, naming both."""
    if input.dim() not in (1, 2):
        raise RuntimeError(f"{prefix}input: expected 1 or 2 dimensions, got shape {list(input.shape)}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"{prefix}linear_weight: expected at least 2 dimensions, got shape {list(linear_weight.shape)}"
        )
    features = input.shape[-1]
    if known(linear_weight.shape[-1] != features):
        raise RuntimeError(
            f"{prefix}linear_weight: expected a last dimension of {features} as the input's, got shape "
            f"{list(linear_weight.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"{prefix}input: expected a batch of shape [N, {features}] beside a linear_weight of shape "
            f"{list(linear_weight.shape)}, got shape {list(input.shape)}"
        )
    if linear_bias is not None and not has_shape(linear_bias, linear_weight.shape[:-1]):
        raise RuntimeError(
            f"{prefix}linear_bias: expected shape {list(linear_weight.shape[:-1])}, got shape {list(linear_bias.shape)}"
        )


def autocast_layer(*tensors: Tensor | None) -> list[Any]:
    """As autocast casts what goes into a linear layer."""
    input = tensors[0]
    assert input is not None
    dtype = torch.get_autocast_dtype("cpu" if input.is_cpu else "cuda")
    return [t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def check_dtypes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, prefix: str = "") -> None:
    """Raises what torch raises where the layer's dtypes differ, naming both."""
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(f"{prefix}{name}: expected the input's dtype {input.dtype}, got {tensor.dtype}")
