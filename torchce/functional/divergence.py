"""Divergences of a student's distribution from a teacher's, and entropies, from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from torchce import calls, ops, overrides
from torchce.divergence import ENTROPY, JS, KL, REVERSE_KL, Options, divergence
from torchce.divergence_formulas import composite
from torchce.functional._common import (
    FLOATS,
    autocasts,
    has_shape,
    have_kernels,
    promoted,
    reduction_number,
    refuse_scripting,
)
from torchce.functional.softmax_ce_own import check_positive, is_plain_number
from torchce.sizes import known


@refuse_scripting
def kl_div_with_logits(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    target_logits: bool = False,
    temperature: float = 1.0,
    reverse: bool = False,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of a student's softmax from a teacher's distribution, as in distillation.

    With the student :math:`Q = \mathrm{softmax}(x / T)` of logits x = ``input``, and the teacher P, which is
    ``target``, or softmax(target / T) with ``target_logits``, the loss of a row is

    .. math:: \mathrm{KL}(P \| Q) = \sum_k P_k\, (\log P_k - \log Q_k) = H(P, Q) - H(P)

    or with ``reverse`` :math:`\mathrm{KL}(Q \| P)`. 0 log 0 is 0: a class that both exclude, by a logit of minus
    infinity say, costs nothing; one that only the second distribution excludes makes the loss infinite. Both operands
    are read once, and nothing of their size is kept for backward but themselves. Differentiable in both.

    The mean is over rows, what :func:`torch.nn.functional.kl_div` calls ``'batchmean'`` of a two-dimensional input; its
    own ``'mean'`` divides by the number of elements, and its ``'none'`` gives a value for every class. That function
    takes log-probabilities; of logits it is ``kl_div(log_softmax(input / T), target)``. Its loss is often multiplied
    with :math:`T^2` (Hinton et al. 2015, arXiv:1503.02531), so that gradients do not shrink with the temperature;
    nothing does so here. (Kullback and Leibler 1951.)

    Args:
        input (Tensor): the student's unnormalised logits, float64, float32, bfloat16 or float16, of any strides, the
            classes in dimension 1.
        target (Tensor): the teacher's probabilities, of any of these dtypes and any strides; they are taken as they
            are, whatever they add up to.
        reduction (str): ``'none'``, ``'mean'`` over the rows that are kept, or ``'sum'``. Default: ``'mean'``

    Keyword Args:
        target_logits (bool): whether ``target`` holds the teacher's unnormalised logits. Default: ``False``
        temperature (float): a positive number T that divides all logits, not probabilities. Default: 1.0
        reverse (bool): KL(student || teacher), as in reverse KL distillation. Default: ``False``
        mask (Tensor, optional): bool, the rows that are kept are True; the others have loss 0, gradient 0, whatever
            they hold, and no part in a mean. Default: ``None``, all rows
        dtype (torch.dtype, optional): of the loss. Default: ``None``, the promoted one of input and target; float32
            for all but float64 under autocast

    Shape:
        - input, target: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`
        - mask: the input's shape without C
        - output: a scalar, or with ``reduction='none'`` the input's shape without C

    Returns:
        Tensor: the loss. A mean of no rows is NaN.

    Raises:
        ValueError: shapes do not fit, or an argument is wrong.

    Example::

        >>> student, teacher = torch.zeros(2, 4, requires_grad=True), torch.tensor([[8.0, 0, 0, 0], [0, 0, 0, 0]])
        >>> torchce.functional.kl_div_with_logits(student, teacher, "none", target_logits=True)
        tensor([1.3772, 0.0000], grad_fn=<DivergenceBackward>)
    """
    own = {
        "target_logits": target_logits,
        "temperature": temperature,
        "reverse": reverse,
        "mask": mask,
        "dtype": dtype,
    }
    return _answer(kl_div_with_logits, (input, target), reduction, own)


@refuse_scripting
def js_div_with_logits(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    beta: float = 0.5,
    target_logits: bool = False,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence between a student's softmax and a teacher's distribution.

    With the student Q and the teacher P of :func:`kl_div_with_logits`, and :math:`M = \beta P + (1 - \beta) Q`, the
    loss of a row is

    .. math:: \beta\, \mathrm{KL}(P \| M) + (1 - \beta)\, \mathrm{KL}(Q \| M)

    which is finite whatever either excludes; with beta 1/2 it is symmetric and at most log 2. Where beta is 0 or 1 that
    would be 0 for all P and Q: there the loss is KL(P || Q) or KL(Q || P), to which it tends when it is divided by beta
    or 1 - beta, as in generalised knowledge distillation. (Lin 1991; Agarwal et al. 2023, arXiv:2306.13649.)

    Args:
        input (Tensor): as in :func:`kl_div_with_logits`
        target (Tensor): as there
        reduction (str): as there

    Keyword Args:
        beta (float): the teacher's share of the mixture, from 0 to 1. Default: 0.5
        target_logits, temperature, mask, dtype: as there

    Shape:
        As in :func:`kl_div_with_logits`.

    Returns:
        Tensor: the loss. A mean of no rows is NaN.

    Raises:
        ValueError: shapes do not fit, or an argument is wrong.

    Example::

        >>> student, teacher = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
        >>> torchce.functional.js_div_with_logits(student, teacher, target_logits=True)  # log 2
        tensor(0.6931)
    """
    own = {"beta": beta, "target_logits": target_logits, "temperature": temperature, "mask": mask, "dtype": dtype}
    return _answer(js_div_with_logits, (input, target), reduction, own)


@refuse_scripting
def entropy_with_logits(
    input: Tensor,
    reduction: str = "mean",
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Entropy of the softmax of logits, in nats, as confidence penalties and entropy bonuses take it.

    With :math:`P = \mathrm{softmax}(x / T)` the entropy of a row is :math:`H(P) = -\sum_k P_k \log P_k`, from 0 of a
    certain P to log C. The logits are read once. (Shannon 1948.)

    Args:
        input (Tensor): unnormalised logits, as in :func:`kl_div_with_logits`
        reduction (str): as there

    Keyword Args:
        temperature, mask, dtype: as there

    Shape:
        - input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`
        - mask: the input's shape without C
        - output: a scalar, or with ``reduction='none'`` the input's shape without C

    Returns:
        Tensor: the entropy. A mean of no rows is NaN.

    Raises:
        ValueError: shapes do not fit, or an argument is wrong.

    Example::

        >>> torchce.functional.entropy_with_logits(torch.zeros(2, 4), "none")  # log 4
        tensor([1.3863, 1.3863])
    """
    own = {"temperature": temperature, "mask": mask, "dtype": dtype}
    return _answer(entropy_with_logits, (input,), reduction, own)


def of_one_dtype_on_cuda(input: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both operands, of their promoted dtype where kernels take no others."""
    if target is None or not input.is_cuda or target.dtype == input.dtype:
        return input, target
    common = promoted(input.dtype, target.dtype)
    return input.to(common), target.to(common)


def kind_of(own: dict[str, Any]) -> int:
    """The divergence that the keyword arguments ask for; raises ValueError if they ask for none."""
    if "beta" not in own:
        check_bool("reverse", own["reverse"])
        return REVERSE_KL if own["reverse"] else KL
    beta = own["beta"]
    if not is_plain_number(beta) or not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number from 0 to 1, got {beta!r}")
    return KL if beta == 0 else REVERSE_KL if beta == 1 else JS


def check_bool(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name}: expected a bool, got {value!r}")


def _answer(ours: Any, operands: tuple[Tensor, ...], reduction: str, own: dict[str, Any]) -> Tensor:
    """The loss of unchecked operands, an input and perhaps a target, or what their handlers make of the call."""
    relevant = (*operands, own["mask"])
    if has_torch_function_variadic(*relevant):
        answer: Tensor = overrides.ask_handlers(ours, ours, relevant, own, *operands, reduction)
        return answer
    input, *targets, mask = map(overrides.plain, relevant)
    temperature, dtype, target_logits = own["temperature"], own["dtype"], own.get("target_logits", False)
    number = reduction_number(reduction, None, None)
    kind = kind_of(own) if targets else ENTROPY
    check_bool("target_logits", target_logits)
    _check_tensors(input, targets, mask)
    check_loss_dtype(dtype)
    target = targets[0] if targets else None
    check_temperature(temperature, ops.divergence_accumulation(input, target))
    if dtype is None:
        dtype = promoted(input.dtype, input.dtype if target is None else target.dtype)
        if autocasts(input):
            dtype = promoted(dtype, torch.float32)
    options = Options(kind, number, target_logits, float(temperature), float(own.get("beta", 0.5)))
    input, target = of_one_dtype_on_cuda(input, target)
    if not have_kernels(input, target, mask):  # formulas in torch's operations serve every other kind
        calls.note_composite()
        return composite(input, target, mask, dtype, *options)
    return divergence(input, target, mask, dtype, options)


def _check_tensors(input: Any, targets: list[Any], mask: Any) -> None:
    """Raises ValueError for what no formula takes, naming the argument and both values."""
    check_operands(input, targets)
    shape = input.shape
    if len(shape) == 0:
        raise ValueError("input: expected at least one dimension, got a scalar")
    class_dim = min(1, len(shape) - 1)
    if known(shape[class_dim] == 0):
        raise ValueError(f"input: expected at least one class, got shape {list(shape)}")
    check_mask(mask, (*shape[:class_dim], *shape[class_dim + 1 :]), input)


def check_operands(input: Any, targets: Sequence[Any]) -> None:
    """Raises ValueError unless these are floating tensors of one shape on one device."""
    for name, tensor in (("input", input), *(("target", target) for target in targets)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: expected a floating point tensor of 16 bits or more, got {tensor.dtype}")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise ValueError(f"{name}: expected a strided tensor, got a {kind} one")
        check_device(name, tensor, input)
        if not has_shape(tensor, input.shape):
            raise ValueError(f"{name}: expected the input's shape {list(input.shape)}, got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected a tensor on {input.device}, got one on {tensor.device}")


def check_loss_dtype(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        raise ValueError(f"dtype: expected a floating point dtype of 16 bits or more, got {dtype!r}")


def check_temperature(temperature: Any, dtype: torch.dtype) -> None:
    acc = ops.accumulation_dtype(dtype)
    check_positive("temperature", temperature, acc)
    check_positive("1 / temperature", 1 / temperature, acc)


def check_mask(mask: Any, row_shape: Sequence[int], input: Tensor) -> None:
    if mask is None:
        return
    is_bool = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.layout == torch.strided
    if not is_bool or not has_shape(mask, row_shape):
        got = f"{mask.layout} {mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"mask: expected a bool tensor of shape {list(row_shape)}, one for each row, got {got}")
    check_device("mask", mask, input)
