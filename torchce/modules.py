"""Modules, each a subclass of torch's own: ``isinstance``, ``state_dict``, pickling and ``repr`` hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

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


class _KeepsKeywords(nn.Module):
    """A module of cross entropy that keeps the function's keyword arguments.

    ``logit_scale`` may be an attribute, a parameter, a buffer or parametrized; ``_own`` has its name, so that a plain
    loss need not look for it in all these places.
    """

    _own: Mapping[str, Any] = {}
    z_loss = _Keyword(0.0)
    softcap = _Keyword()
    dtype = _Keyword()
    empty_value = _Keyword()
    return_lse = _Keyword(False)
    return_predictions = _Keyword(False)
    return_z_loss = _Keyword(False)
    return_entropy = _Keyword(False)

    __prepare_scriptable__ = _refuse_scripting

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

    def _keywords(self, its_class: type, sample_weight: Tensor | None, divisor: float | Tensor | None) -> Any:
        """Those that are no defaults; a subclass of ``its_class`` may have properties in place of our attributes."""
        own = self._own
        if type(self) is not its_class:
            own = {name: getattr(self, name) for name in _KEYWORDS}
        elif "logit_scale" in own:
            own = {**own, "logit_scale": self.logit_scale}
        if sample_weight is not None or divisor is not None:
            own = {**own, "sample_weight": sample_weight, "divisor": divisor}
        return own


class CrossEntropyLoss(_KeepsKeywords, nn.CrossEntropyLoss):
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
        own = self._keywords(CrossEntropyLoss, sample_weight, divisor)
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


class _StandsAlone(nn.modules.loss._WeightedLoss):
    """What a :class:`LinearCrossEntropyLoss` is a subclass of beside a torch that has none: the same attributes."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"weight: expected shape [{num_classes}], got {list(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
        super().__init__(weight, None, None, reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)
        self.options = options


if TYPE_CHECKING or not hasattr(nn, "LinearCrossEntropyLoss"):
    _LinearCrossEntropyLoss = _StandsAlone
else:
    _LinearCrossEntropyLoss = nn.LinearCrossEntropyLoss


class LinearCrossEntropyLoss(_KeepsKeywords, _LinearCrossEntropyLoss):
    r"""A linear layer and the softmax cross entropy of its logits, which are never whole.

    A drop-in replacement for ``torch.nn.LinearCrossEntropyLoss``, whose subclass it is from torch 2.13 on; see
    :func:`torchce.functional.linear_cross_entropy` for the shapes, dtypes and errors. The layer is ``self.linear``; to
    tie its weight to an embedding's, assign that: ``loss.linear.weight = embedding.weight``.

    Args:
        in_features (int): the features of each row of the input, H.
        num_classes (int): the number of classes, C.

    Keyword Args:
        out_features (tuple of ints): the dimensions d1, ..., dK of a K-dimensional loss. Default: ``()``
        bias (bool): whether the layer has a bias. Default: ``False``
        device, dtype: of the layer.
        reduction (str): ``'none'``, ``'mean'`` or ``'sum'``. Default: ``'mean'``
        weight (Tensor, optional): a weight for each class, ``[C]``.
        ignore_index (int or tuple of ints, optional): class indices whose rows have no loss and no gradient.
            Default: ``None``, -100
        label_smoothing (float): the part of each target spread evenly over all classes. Default: 0.0
        options, chunk_bytes, chunk_rows, acc_policy, compact_ignored: as in the function.
        z_loss, softcap, logit_scale, loss_dtype, empty_value, return_lse, return_predictions, return_z_loss,
            return_entropy: as in the function, where the dtype of the loss is called ``dtype``, as the attribute is.

    Called with ``input`` and ``target``, and with the function's ``sample_weight`` and ``divisor``. With any
    ``return_`` it returns a :class:`torchce.CrossEntropyOutput`.

    Example::

        >>> loss = torchce.LinearCrossEntropyLoss(8, 4)
        >>> _ = torch.nn.init.zeros_(loss.linear.weight)
        >>> loss(torch.ones(2, 8), torch.tensor([0, 3]))
        tensor(1.3863, grad_fn=<SoftmaxCEBackward>)
    """

    chunk_bytes: int | None = None  # as inplace_backward in CrossEntropyLoss
    chunk_rows: int | None = None
    acc_policy: str = "auto"
    compact_ignored: bool | None = None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | tuple[int, ...] | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        chunk_bytes: int | None = None,
        chunk_rows: int | None = None,
        acc_policy: str = "auto",
        compact_ignored: bool | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float | Tensor | None = None,
        loss_dtype: torch.dtype | None = None,
        empty_value: float | None = None,
        return_lse: bool = False,
        return_predictions: bool = False,
        return_z_loss: bool = False,
        return_entropy: bool = False,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,  # type: ignore[arg-type]
            label_smoothing=label_smoothing,
            options=options,
        )
        self.chunk_bytes = chunk_bytes
        self.chunk_rows = chunk_rows
        self.acc_policy = acc_policy
        self.compact_ignored = compact_ignored
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.dtype = loss_dtype
        self.empty_value = empty_value
        self.return_lse = return_lse
        self.return_predictions = return_predictions
        self.return_z_loss = return_z_loss
        self.return_entropy = return_entropy

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor | CrossEntropyOutput:
        shape = (self.num_classes, *self.out_features)
        weight, bias = self.linear.weight, self.linear.bias
        return functional.linear_cross_entropy(  # type: ignore[no-any-return]
            input,
            weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            chunk_bytes=self.chunk_bytes,
            chunk_rows=self.chunk_rows,
            acc_policy=self.acc_policy,
            compact_ignored=self.compact_ignored,
            **self._keywords(LinearCrossEntropyLoss, sample_weight, divisor),
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


class KLDivWithLogitsLoss(nn.Module):
    r"""Kullback-Leibler divergence of a student's softmax from a teacher's distribution.

    See :func:`torchce.functional.kl_div_with_logits` for the formula, shapes, dtypes and errors. It takes logits, where
    :class:`torch.nn.KLDivLoss` takes log-probabilities, and its mean is that one's ``'batchmean'``.

    Args:
        reduction (str): ``'none'``, ``'mean'`` over the rows that are kept, or ``'sum'``. Default: ``'mean'``

    Keyword Args:
        target_logits (bool): whether the target holds the teacher's logits. Default: ``False``
        temperature (float): a positive number that divides all logits. Default: 1.0
        reverse (bool): KL(student || teacher). Default: ``False``
        dtype (torch.dtype, optional): of the loss. Default: ``None``

    Called with ``input`` and ``target``, and with the function's ``mask``, which belongs to a batch.

    Example::

        >>> loss = torchce.KLDivWithLogitsLoss(target_logits=True, temperature=2.0)
        >>> loss(torch.zeros(2, 4), torch.zeros(2, 4))
        tensor(0.)
    """

    def __init__(
        self,
        reduction: str = "mean",
        *,
        target_logits: bool = False,
        temperature: float = 1.0,
        reverse: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.target_logits = target_logits
        self.temperature = temperature
        self.reverse = reverse
        self.dtype = dtype

    __prepare_scriptable__ = _refuse_scripting

    def extra_repr(self) -> str:
        names = ["reduction", "target_logits", "temperature", "reverse", *([] if self.dtype is None else ["dtype"])]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.kl_div_with_logits(  # type: ignore[no-any-return]
            input,
            target,
            self.reduction,
            target_logits=self.target_logits,
            temperature=self.temperature,
            reverse=self.reverse,
            mask=mask,
            dtype=self.dtype,
        )
