"""Modules, each a subclass of torch's own: ``isinstance``, ``state_dict``, pickling and ``repr`` hold."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn

from torchce import functional


def _refuse_scripting(self: nn.Module) -> NoReturn:
    """What ``torch.jit.script`` calls before it compiles a module, whose own words would not tell the reason."""
    raise RuntimeError(f"TorchScript error: {functional.NO_TORCHSCRIPT}")


class CrossEntropyLoss(nn.CrossEntropyLoss):
    r"""Softmax cross entropy between logits and class indices or probabilities.

    A drop-in replacement for :class:`torch.nn.CrossEntropyLoss`; see :func:`torchce.functional.cross_entropy` for the
    shapes, dtypes and errors.

    Args:
        weight (Tensor, optional): a weight for each class, ``[C]``.
        size_average (bool, optional): deprecated, see ``reduction``.
        ignore_index (int): a class index whose rows have no loss and no gradient. Default: -100
        reduce (bool, optional): deprecated, see ``reduction``.
        reduction (str): ``'none'``, ``'mean'`` or ``'sum'``. Default: ``'mean'``
        label_smoothing (float): the part of each target spread evenly over all classes, at most 1. Default: 0.0

    Keyword Args:
        inplace_backward (bool): let the gradient overwrite the logits; read what you need of them, for an accuracy
            say, before ``backward()``. Default: ``False``

    Example::

        >>> loss = torchce.CrossEntropyLoss()
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> loss(logits, torch.tensor([0, 3]))
        tensor(1.3863, grad_fn=<SoftmaxCEBackward>)
    """

    inplace_backward: bool = False  # of objects that no __init__ of ours has made: old pickles, torch's

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace_backward = inplace_backward

    __prepare_scriptable__ = _refuse_scripting

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        # Found as an attribute, a buffer takes ten times as long, more than any check of a small loss.
        buffers = self._buffers
        weight = buffers["weight"] if "weight" in buffers else self.weight  # noqa: SIM401  (`get` would evaluate both)
        return functional.cross_entropy(
            input,
            target,
            weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
        )


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    r"""Binary cross entropy between logits and targets, the sigmoid included.

    A drop-in replacement for :class:`torch.nn.BCEWithLogitsLoss`; see
    :func:`torchce.functional.binary_cross_entropy_with_logits` for the shapes, dtypes and errors.

    Args:
        weight (Tensor, optional): a weight for each element, broadcast to the input's shape.
        size_average (bool, optional): deprecated, see ``reduction``.
        reduce (bool, optional): deprecated, see ``reduction``.
        reduction (str): ``'none'``, ``'mean'`` or ``'sum'``. Default: ``'mean'``
        pos_weight (Tensor, optional): a weight for positive targets, broadcast to the input's shape.

    Keyword Args:
        inplace_backward (bool): let the gradient overwrite the logits; read what you need of them, for an accuracy
            say, before ``backward()``. Default: ``False``

    Example::

        >>> loss = torchce.BCEWithLogitsLoss()
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> loss(logits, torch.tensor([0.0, 1.0, 1.0]))
        tensor(0.6931, grad_fn=<SigmoidBCEBackward>)
    """

    inplace_backward: bool = False  # as in CrossEntropyLoss

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.inplace_backward = inplace_backward

    __prepare_scriptable__ = _refuse_scripting

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            inplace_backward=self.inplace_backward,
        )
