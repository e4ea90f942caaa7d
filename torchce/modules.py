"""Modules, each a subclass of torch's own: ``isinstance``, ``state_dict``, pickling and ``repr`` hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torchce import functional
from torchce.functional import CrossEntropyOutput


def _refuse_scripting(self: nn.Module) -> NoReturn:
    """What ``torch.jit.script`` calls before it compiles a module, whose own words would not tell the reason."""
    raise RuntimeError(f"TorchScript error: {functional.NO_TORCHSCRIPT}")


# Arguments of the function that a module of cross entropy keeps.
_KEYWORDS = (
    "z_loss",
    "softcap",
    "logit_scale",
    "dtype",
    "empty_value",
    "return_lse",
    "return_predictions",
    "return_z_loss",
    "return_entropy",
)


class _Keyword:
    """A keyword argument of the function that a module keeps only where it is not the default one.

    So a plain loss passes none on, which would take a tenth of a small loss's time.
    """

    def __init__(self, default: Any = None) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else module._own.get(self.name, self.default)

    def __set__(self, module: Any, value: Any) -> None:
        others = {name: kept for name, kept in module._own.items() if name != self.name}
        module._own = others if value is self.default else others | {self.name: value}


class CrossEntropyLoss(nn.CrossEntropyLoss):
    r"""Softmax cross entropy between logits and class indices or probabilities.

    A drop-in replacement for :class:`torch.nn.CrossEntropyLoss`; see :func:`torchce.functional.cross_entropy` for the
    shapes, dtypes and errors.

    Args:
        weight (Tensor, optional): a weight for each class, ``[C]``.
        size_average (bool, optional): deprecated, see ``reduction``.
        ignore_index (int or tuple of ints): class indices whose rows have no loss and no gradient. Default: -100
        reduce (bool, optional): deprecated, see ``reduction``.
        reduction (str): ``'none'``, ``'mean'`` or ``'sum'``. Default: ``'mean'``
        label_smoothing (float): the part of each target spread evenly over all classes, at most 1. Default: 0.0

    Keyword Args:
        z_loss, softcap, logit_scale, dtype, empty_value, return_lse, return_predictions, return_z_loss, return_entropy:
            as in the function. A ``logit_scale`` that is a parameter or buffer is the module's; it may be parametrized.
        inplace_backward (bool): let the gradient overwrite the logits; read what you need of them, for an accuracy
            say, before ``backward()``. Default: ``False``

    Called with ``input`` and ``target``, and with the function's ``sample_weight`` and ``divisor``, which belong to a
    batch. With any ``return_`` it returns a :class:`torchce.CrossEntropyOutput`.

    Example::

        >>> loss = torchce.CrossEntropyLoss()
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> loss(logits, torch.tensor([0, 3]))
        tensor(1.3863, grad_fn=<SoftmaxCEBackward>)
    """

    inplace_backward: bool = False  # of objects that no __init__ of ours has made: old pickles, torch's
    _own: Mapping[str, Any] = {}
    z_loss = _Keyword(0.0)
    softcap = _Keyword()
    dtype = _Keyword()
    empty_value = _Keyword()
    return_lse = _Keyword(False)
    return_predictions = _Keyword(False)
    return_z_loss = _Keyword(False)
    return_entropy = _Keyword(False)

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | tuple[int, ...] = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float | Tensor | None = None,
        dtype: torch.dtype | None = None,
        empty_value: float | None = None,
        return_lse: bool = False,
        return_predictions: bool = False,
        return_z_loss: bool = False,
        return_entropy: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)  # type: ignore[arg-type]
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.dtype = dtype
        self.empty_value = empty_value
        self.return_lse = return_lse
        self.return_predictions = return_predictions
        self.return_z_loss = return_z_loss
        self.return_entropy = return_entropy
        self.inplace_backward = inplace_backward

    __prepare_scriptable__ = _refuse_scripting

    # logit_scale may be an attribute, a parameter, a buffer or parametrized; `_own` has its name, so that a plain loss
    # need not look for it in all these places.

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logit_scale":
            self.__dict__.pop(name, None)  # a buffer is refused where there is another attribute of its name
        super().__setattr__(name, value)
        self._note_scale(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._note_scale(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self._note_scale(name, tensor)

    def _note_scale(self, name: str, value: Any) -> None:
        if name == "logit_scale":
            others = {key: kept for key, kept in self._own.items() if key != name}
            self._own = others if value is None else others | {name: ...}

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,  # not keyword-only: torch.onnx's older exporter passes all by position
        divisor: float | Tensor | None = None,
    ) -> Tensor | CrossEntropyOutput:
        # Found as an attribute, a buffer takes ten times as long, more than any check of a small loss.
        buffers = self._buffers
        weight = buffers["weight"] if "weight" in buffers else self.weight  # noqa: SIM401  (`get` would evaluate both)
        own = self._own
        if type(self) is not CrossEntropyLoss:  # which may have properties in place of our attributes
            own = {name: getattr(self, name) for name in _KEYWORDS}
        elif "logit_scale" in own:
            own = {**own, "logit_scale": self.logit_scale}
        if sample_weight is not None or divisor is not None:
            own = {**own, "sample_weight": sample_weight, "divisor": divisor}
        if own:  # a plain loss unpacks no mapping, which takes 0.2 us
            return functional.cross_entropy(  # type: ignore[no-any-return]
                input,
                target,
                weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
                inplace_backward=self.inplace_backward,
                **own,
            )
        return functional.cross_entropy(  # type: ignore[no-any-return]
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
        return functional.binary_cross_entropy_with_logits(  # type: ignore[no-any-return]
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            inplace_backward=self.inplace_backward,
        )
