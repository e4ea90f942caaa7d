"""A language model's head, a linear layer and the cross entropy of its output, in three ways that give the same loss.

Each takes the features ``[N, H]``, the layer's weight ``[C, H]`` and bias ``[C]``, and the target ``[N]``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

import torchce
from torchce.functional import linear_cross_entropy


class UnfusedHead(nn.Module):
    """The layer's whole output, and then its loss."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.loss(F.linear(features, weight, bias), target)
        return loss


class FusedHead(nn.Module):
    """The layer and its loss together, a piece of the rows at a time."""

    def forward(self, features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(features, weight, target, linear_bias=bias)


HEADS: dict[str, nn.Module] = {
    "torch": UnfusedHead(nn.CrossEntropyLoss()),
    "torchce": UnfusedHead(torchce.CrossEntropyLoss()),
    "torchce linear": FusedHead(),
}
