"""Log-probabilities of tokens, for those who train on them rather than on a loss."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.utils import _pytree

from torchce import ops
from torchce.functional._common import refuse_scripting
from torchce.functional.softmax_ce import cross_entropy
from torchce.functional.softmax_ce_own import check_positive, seen


class TokenLogprobsOutput(NamedTuple):
    """The log-probabilities with what else was asked for."""

    logprobs: Tensor
    entropy: Tensor
    """Of each token's distribution, in nats."""


# So that an exported program that returns one can be saved.
_pytree._register_namedtuple(TokenLogprobsOutput, serialized_type_name="torchce.TokenLogprobsOutput")


@overload
def token_logprobs(
    input: Tensor,
    target: Tensor,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | tuple[int, ...] = ...,
    dtype: torch.dtype | None = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    input: Tensor,
    target: Tensor,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | tuple[int, ...] = ...,
    dtype: torch.dtype | None = ...,
    return_entropy: bool,
    inplace_backward: bool = ...,
) -> Tensor | TokenLogprobsOutput: ...
@refuse_scripting
def token_logprobs(
    input: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    ignore_index: int | tuple[int, ...] = -100,
    dtype: torch.dtype | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | TokenLogprobsOutput:
    r"""The log-probability of each target class under logits divided by a temperature.

    That is minus the unreduced :func:`torchce.functional.cross_entropy` with ``logit_scale`` 1 / temperature, under the
    name that reinforcement learning from tokens has for it (policy gradients, PPO, GRPO, DPO): one read of the logits,
    and no log-softmax of their size, where :func:`torch.log_softmax` and ``gather`` keep one for backward.

    Args:
        input (Tensor): unnormalised logits, the classes in dimension 1. A model's ``[batch, time, classes]`` is read
            without a copy as ``logits.transpose(1, 2)``.
        target (Tensor): class indices (int64, int32 or uint8), such as the tokens that were drawn.
        temperature (float or Tensor): a positive divisor of the logits; a tensor has no dimension and may require
            grad. Default: 1.0

    Keyword Args:
        ignore_index (int or tuple of ints): class indices whose rows have 0 and no gradient. Default: -100
        dtype (torch.dtype, optional): of the log-probabilities. Default: ``None``, float64 for float64 logits, else
            float32
        return_entropy (bool): return each token's entropy as well, as an entropy bonus takes it: differentiable, of
            ignored tokens too, as in :func:`torchce.functional.cross_entropy`. Default: ``False``
        inplace_backward (bool): let the gradient overwrite the logits, see
            :func:`torchce.functional.cross_entropy`. Default: ``False``

    Shape:
        - input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`
        - target, output, entropy: the input's shape without C

    Returns:
        Tensor: the log-probabilities; with ``return_entropy`` a named tuple ``(logprobs, entropy)``.

    Raises:
        ValueError: the target holds no class indices, or an argument is wrong.
        IndexError: a class index is neither in [0, C) nor ``ignore_index`` (CPU; on CUDA the row is NaN).

    Example::

        >>> logits = torch.zeros(2, 3, 4)  # [batch, time, classes]
        >>> torchce.functional.token_logprobs(logits.transpose(1, 2), torch.ones(2, 3, dtype=torch.int64))
        tensor([[-1.3863, -1.3863, -1.3863],
                [-1.3863, -1.3863, -1.3863]])
    """
    acc = ops.accumulation_dtype(input.dtype)
    if (number := seen("temperature", temperature, input)) is not None:
        check_positive("temperature", number, acc)
        check_positive("1 / temperature", 1 / number, acc)
    logit_scale = 1 / (temperature.to(acc) if isinstance(temperature, Tensor) else temperature)
    if isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(f"target: expected class indices, got {target.dtype}")
    result = cross_entropy(
        input,
        target,
        ignore_index=ignore_index,
        reduction="none",
        logit_scale=logit_scale,
        dtype=dtype or acc,
        return_entropy=return_entropy,
        inplace_backward=inplace_backward,
    )
    if isinstance(result, Tensor):
        return 0 - result  # -result would make of an ignored row's 0 a -0
    assert result.entropy is not None  # as it was asked for
    return TokenLogprobsOutput(0 - result.loss, result.entropy)
