"""Softmax cross entropy of a linear layer's logits, which are never whole: its ops, and how they are differentiated.

Where the loss is a sum or a mean, its gradients are computed with it, in three matrix products: what comes in for them
is one number, which they are multiplied with. They are computed in the backward, in four, where each row's loss or
what else it has gets a gradient of its own; where an earlier backward has taken those of the forward; where hooks take
what is saved for backward, as inside a checkpoint, which keeps little and computes the forward again; and of float16,
whose small gradients are lost unless they are computed times the number that comes in, a loss's scale.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchce import chunked, inplace, ops
from torchce.composites import (
    decompose_for_onnx,
    differentiate,
    gradients_of,
    implement,
    refuse_derivative,
    sum_of_rows,
    times,
)
from torchce.softmax_ce_formulas import (
    Gradients,
    Options,
    Wanted,
    are_plain,
    check_targets,
    composite_outputs,
    plain_options,
)
from torchce.transforms import differentiates_backward, is_batched, known_least

_NONE, _SUM = 0, 2


class Inputs(NamedTuple):
    """The tensors of a call, in the order of the ops' schemas.

    Shape, with acc the accumulation dtype, as in ``csrc/schemas.h``:
        - input: ``[N, H]``
        - linear_weight: ``[C, d1, ..., dK, H]``
        - linear_bias: ``[C, d1, ..., dK]``
        - target: class indices ``[N, d1, ..., dK]``, or probabilities ``[N, C, d1, ..., dK]``
        - weight: ``[C]``, acc
        - sample_weight: ``[N, d1, ..., dK]``, acc; only for a sum
        - scale, divisor: scalars, acc; the latter only for a sum, which it divides
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None
    scale: Tensor | None
    divisor: Tensor | None


# Functions, not members: the Dynamo of torch 2.10, in compiled autograd, evaluates none of a named tuple.
def _row_shape(inputs: Inputs) -> tuple[int, ...]:
    return (inputs.input.shape[0], *inputs.linear_weight.shape[1:-1])


def _acc(inputs: Inputs) -> torch.dtype:
    return ops.softmax_ce_accumulation(inputs.input, inputs.target, inputs.weight)


def _linear(inputs: Inputs) -> chunked.Linear:
    """The layer whose outputs are the logits, with C and d1...dK as one dimension."""
    bias = None if inputs.linear_bias is None else inputs.linear_bias.flatten().contiguous()
    return chunked.Linear(inputs.input, inputs.linear_weight.flatten(0, -2), bias)


N_INPUTS = len(Inputs._fields)
_N_WANTED, _N_CHUNKS = len(Wanted._fields), len(chunked.Chunks._fields)
_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? sample_weight, "
    "Tensor? scale, Tensor? divisor, "
)
_REST = (
    "SymInt chunk_bytes, SymInt chunk_rows, bool compact_gradients, bool compact_ignored, int reduction, "
    "int ignore_index, float label_smoothing, float z_loss=0.0, float softcap=0.0, float logit_scale=1.0"
)
_library = torch.library.Library("torchce", "FRAGMENT")
# `needs` says of which tensors the gradients are computed too: input, linear_weight, linear_bias, scale.
_library.define(
    f"linear_softmax_ce_forward({_TENSORS}bool[] needs, bool returns_lse, bool returns_predictions, "
    f"bool returns_entropy, {_REST}) -> (Tensor loss, Tensor lse, Tensor predictions, Tensor entropy, Tensor losses, "
    "Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias, Tensor grad_scale)"
)
_library.define(
    f"linear_softmax_ce_backward(Tensor grad_output, Tensor? grad_lse, Tensor? grad_entropy, {_TENSORS}bool[] needs, "
    f"{_REST}) -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias, Tensor grad_scale)"
)
_NEEDS_NOTHING = (False,) * 4


def linear_softmax_ce(
    inputs: Inputs, wanted: Wanted, chunks: chunked.Chunks, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, predictions and entropy of checked inputs, all but the predictions differentiable, all of acc.

    ``options.reduction`` is that of no reduction or of a sum, which ``inputs.divisor`` divides.
    """
    forward = torch.ops.torchce.linear_softmax_ce_forward
    loss, lse, predictions, entropy, *_ = forward(*inputs, _NEEDS_NOTHING, *wanted, *chunks, *options)
    return loss, lse, predictions, entropy


# --- the ops -------------------------------------------------------------------------------------------------------


class _Results:
    """What a call gives of its rows, filled in piece by piece."""

    def __init__(self, inputs: Inputs, wanted: Wanted, options: Options, needs_scale: bool) -> None:
        self.inputs, self.wanted, self.needs_scale = inputs, wanted, needs_scale
        self.options = options._replace(reduction=_NONE)
        new = inputs.input.new_empty
        shape = _row_shape(inputs)
        self.losses = new(shape, dtype=_acc(inputs))
        self.lse = new(shape if wanted.lse else 0, dtype=_acc(inputs))
        self.predictions = new(shape if wanted.predictions else 0, dtype=torch.int64)
        self.entropy = new(shape if wanted.entropy else 0, dtype=_acc(inputs))
        self.of_scale = new((), dtype=torch.float64).zero_() if needs_scale else new(0, dtype=torch.float64)
        self.is_plain = are_plain(options) and inputs.scale is None and not any(wanted)

    def logits(self, logits: Tensor) -> Tensor:
        return logits.view(-1, *self.inputs.linear_weight.shape[:-1])

    def _target_dtype(self) -> torch.dtype:
        """The one in which the compiled ops take a piece's target."""
        dtype = self.inputs.target.dtype
        as_they_are = self.inputs.input.dtype, torch.float32, torch.float64
        if not dtype.is_floating_point or (self.is_plain and dtype in as_they_are):
            return dtype
        return _acc(self.inputs)

    def _target(self, at: slice | Tensor) -> Tensor:
        return self.inputs.target[at].to(self._target_dtype())

    def turn_bytes(self) -> int:
        """What a row of a piece takes beside its logits."""
        dtype = self._target_dtype()
        return 0 if dtype == self.inputs.target.dtype else self.inputs.target[:1].numel() * dtype.itemsize

    def keep(self, logits: Tensor, at: slice | Tensor) -> None:
        """What a forward gives of the rows ``at``."""
        logits, target = self.logits(logits), self._target(at)
        if self.is_plain:
            arguments = (logits, target, self.inputs.weight, _acc(self.inputs), *plain_options(self.options))
            self.losses[at] = ops.eager_softmax_ce_forward(*arguments)[0]
        else:
            self._forward_outputs(logits, target, at)

    def turn(self, grads: Gradients, logits: Tensor, at: slice | Tensor) -> None:
        """The same, and the logits become their gradient, of the gradients that each row's losses and outputs get."""
        logits, target = self.logits(logits), self._target(at)
        of_piece = Gradients(*(None if grad is None else grad[at] for grad in grads))
        assert of_piece.output is not None  # zeros where the loss has none
        if self.inputs.scale is None and not any(self.wanted):
            self.losses[at] = ops.softmax_ce_forward_backward_(
                of_piece.output, logits, target, self.inputs.weight, _acc(self.inputs), *self.options
            )
            return
        saved = self._forward_outputs(logits, target, at)
        if self.needs_scale:
            self.of_scale += sum_of_rows(ops.eager_softmax_ce_backward_scale(*of_piece, *saved))
        ops.softmax_ce_backward_outputs_(of_piece.output, of_piece.lse, of_piece.entropy, *saved)

    def _forward_outputs(self, logits: Tensor, target: Tensor, at: slice | Tensor) -> tuple[Any, ...]:
        """Keeps them, and returns what the ops of the backward take beside gradients."""
        weight, scale, acc = self.inputs.weight, self.inputs.scale, _acc(self.inputs)
        loss, lse, predictions, entropy, *saved = ops.eager_softmax_ce_forward_outputs(
            logits, target, weight, scale, acc, *self.wanted, *self.options
        )
        self.losses[at] = loss
        for rows, of_piece in ((self.lse, lse), (self.predictions, predictions), (self.entropy, entropy)):
            if len(of_piece):
                rows[at] = of_piece
        return logits, target, weight, scale, *saved, *self.options


def _without_autocast(inputs: Inputs) -> torch.amp.autocast:
    """Autocast has had its say before; the products of a piece are written where they belong, in the dtypes there."""
    return torch.amp.autocast(inputs.input.device.type, enabled=False)


def _kept(inputs: Inputs, options: Options, chunks: chunked.Chunks) -> Tensor | None:
    """The numbers of the rows that are not ignored, or None to go through all of them."""
    if inputs.target.is_floating_point():
        return None
    counts = inputs.target != options.ignore_index
    counts = counts.flatten(1).any(1) if counts.dim() > 1 else counts
    return chunked.kept_rows(counts, inputs.linear_weight.shape[:-1].numel(), chunks)


def _check(inputs: Inputs, options: Options) -> None:
    """On the CPU the whole target first: a piece does not know the numbers of its rows."""
    if inputs.input.is_cpu and not inputs.target.is_floating_point():
        check_targets(inputs.target, inputs.linear_weight.shape[0], options.ignore_index)


def _grads_of_rows(inputs: Inputs, grad_loss: Tensor | None = None) -> Tensor:
    """What each row's loss gets where their sum, divided, gets ``grad_loss``, or 1."""
    grad = inputs.input.new_ones((), dtype=_acc(inputs)) if grad_loss is None else grad_loss
    if inputs.divisor is not None:
        grad = grad / inputs.divisor
    return grad.expand(_row_shape(inputs)).contiguous() if inputs.sample_weight is None else inputs.sample_weight * grad


def _gradients_of_pieces(
    rows: _Results, kept: Tensor | None, needs: tuple[bool, ...], chunks: chunked.Chunks, grads: Gradients
) -> tuple[Tensor, ...]:
    def turn(logits: Tensor, at: slice | Tensor) -> None:
        rows.turn(grads, logits, at)

    linear = _linear(rows.inputs)
    found = chunked.run(linear, kept, (needs[0], needs[1], needs[2]), chunks, turn, rows.turn_bytes())
    grad_input, grad_weight, grad_bias = chunked.as_outputs(found, linear)
    if needs[1]:
        grad_weight = grad_weight.view(rows.inputs.linear_weight.shape)
    if needs[2]:
        grad_bias = grad_bias.view(rows.inputs.linear_weight.shape[:-1])
    return grad_input, grad_weight, grad_bias, rows.of_scale.to(_acc(rows.inputs))


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs, wanted, chunks, options = _parsed(arguments)
    _check(inputs, options)
    rows = _Results(inputs, wanted, options, needs[3])
    kept = None if any(wanted) else _kept(inputs, options, chunks)
    if kept is not None:
        rows.losses.zero_()
    with _without_autocast(inputs):
        if any(needs):
            grads = Gradients(_grads_of_rows(inputs))
            gradients = _gradients_of_pieces(rows, kept, needs, chunks, grads)
        else:
            gradients = _empty_gradients(inputs, needs)
            chunked.run(_linear(inputs), kept, (False, False, False), chunks, rows.keep, rows.turn_bytes())
    loss = _reduced(inputs, options, rows.losses)
    return loss, rows.lse, rows.predictions, rows.entropy, _kept_losses(inputs, rows.losses), *gradients


def _reduced(inputs: Inputs, options: Options, losses: Tensor) -> Tensor:
    if options.reduction == _NONE:
        return losses
    total = sum_of_rows(losses if inputs.sample_weight is None else times(inputs.sample_weight, losses))
    return (total if inputs.divisor is None else total / inputs.divisor).to(_acc(inputs))


def _kept_losses(inputs: Inputs, losses: Tensor) -> Tensor:
    """For the gradient of their weights."""
    return losses.new_empty(0) if inputs.sample_weight is None else losses


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    grads, arguments = Gradients(*arguments[:3]), arguments[3:]
    inputs, needs, _, chunks, options = _parsed((*arguments[: N_INPUTS + 1], *Wanted(), *arguments[N_INPUTS + 1 :]))
    grad_output = grads.output
    assert grad_output is not None
    if options.reduction == _SUM:
        grad_output = _grads_of_rows(inputs, grad_output)
    wanted = Wanted(lse=grads.lse is not None, entropy=grads.entropy is not None)
    rows = _Results(inputs, wanted, options, needs[3])
    kept = None if any(wanted) else _kept(inputs, options, chunks)
    with _without_autocast(inputs):
        return _gradients_of_pieces(rows, kept, needs, chunks, grads._replace(output=grad_output))


def _parsed(arguments: tuple[Any, ...]) -> tuple[Inputs, tuple[bool, ...], Wanted, chunked.Chunks, Options]:
    """The arguments of the forward op; of the options, graphs leave out those that are the defaults."""
    inputs, (needs, *rest) = Inputs(*arguments[:N_INPUTS]), arguments[N_INPUTS:]
    wanted, rest = Wanted(*rest[:_N_WANTED]), rest[_N_WANTED:]
    chunks, options = chunked.Chunks(*rest[:_N_CHUNKS]), Options(*rest[_N_CHUNKS:])
    return inputs, tuple(needs), wanted, chunks, options


def _empty_gradients(inputs: Inputs, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    grads = chunked.new_outputs(inputs.input, inputs.linear_weight, needs[:3])
    return *grads, inputs.input.new_empty([] if needs[3] else [0], dtype=_acc(inputs))


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs, wanted, _, options = _parsed(arguments)
    new, acc, shape = inputs.input.new_empty, _acc(inputs), _row_shape(inputs)
    return (
        new([] if options.reduction == _SUM else shape, dtype=acc),
        new(shape if wanted.lse else [0], dtype=acc),
        new(shape if wanted.predictions else [0], dtype=torch.int64),
        new(shape if wanted.entropy else [0], dtype=acc),
        new([0] if inputs.sample_weight is None else shape, dtype=acc),
        *_empty_gradients(inputs, needs),
    )


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(Inputs(*arguments[3 : 3 + N_INPUTS]), tuple(arguments[3 + N_INPUTS]))


implement("linear_softmax_ce_forward", _forward, _fake_forward)
implement("linear_softmax_ce_backward", _backward, _fake_backward)


# --- autograd ------------------------------------------------------------------------------------------------------


def _unfused(inputs: Inputs, wanted: Wanted, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, predictions, entropy and the rows' losses in torch's own operations, through the whole logits."""
    logits = F.linear(*_linear(inputs)).view(inputs.input.shape[0], *inputs.linear_weight.shape[:-1])
    of_rows = options._replace(reduction=_NONE)
    losses, *outputs = composite_outputs(
        logits, inputs.target, inputs.weight, inputs.scale, _acc(inputs), *wanted, *of_rows
    )
    lse, predictions, entropy = outputs
    return _reduced(inputs, options, losses), lse, predictions, entropy, losses


def _unfused_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """What the forward op gives of the same arguments, but for its gradients, which here are those of autograd."""
    inputs, needs, wanted, _, options = _parsed(arguments)
    *outputs, losses = _unfused(inputs, wanted, options)
    return *outputs, _kept_losses(inputs, losses), *map(torch.zeros_like, _empty_gradients(inputs, needs))


def _set_up(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    inputs, _, wanted, chunks, options = _parsed(arguments)
    loss, lse, predictions, entropy, losses, *gradients = output
    # The loss itself may be changed in place before it is differentiated.
    of_divisor = loss.clone() if ctx.needs_input_grad[Inputs._fields.index("divisor")] else None
    ctx.save_for_backward(*inputs, of_divisor, losses)
    ctx.wanted, ctx.chunks, ctx.options = wanted, chunks, options
    # Not with what is saved, for the first backward takes them for itself; popped from a list, in one step for threads.
    ctx.gradients = [[gradient.detach() for gradient in gradients]] if _computes_gradients(ctx, inputs, options) else []
    without = [predictions, losses, *gradients, *([] if wanted.lse else [lse]), *([] if wanted.entropy else [entropy])]
    ctx.mark_non_differentiable(*without)
    ctx.set_materialize_grads(False)


def _computes_gradients(ctx: Any, inputs: Inputs, options: Options) -> bool:
    """Whether the forward does."""
    return (
        options.reduction == _SUM
        and inputs.input.dtype != torch.float16  # as in _scales
        and any(_needs(ctx))
        and not inplace.has_saved_tensors_hooks()
    )


def _needs(ctx: Any) -> tuple[bool, ...]:
    input, linear_weight, linear_bias, _target, _weight, _sample_weight, scale, *_ = ctx.needs_input_grad
    return input, linear_weight, linear_bias, scale


def _with_gradients(ctx: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's arguments, asking for the gradients where the forward is to compute them."""
    inputs, *_, options = _parsed(arguments)
    needs = _needs(ctx) if _computes_gradients(ctx, inputs, options) else _NEEDS_NOTHING
    return *arguments[:N_INPUTS], needs, *arguments[N_INPUTS + 1 :]


def _op_backward(
    ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None, grad_entropy: Tensor | None, *__: None
) -> tuple[Tensor | None, ...]:
    none = (None,) * len(ctx.needs_input_grad)
    grads = Gradients(grad_loss, grad_lse, grad_entropy)
    given = [grad for grad in grads if grad is not None]
    if not given:
        return none
    for name, needed in zip(Inputs._fields, ctx.needs_input_grad, strict=False):
        if needed and name in ("target", "weight"):
            raise RuntimeError(f"{name}: expected a tensor that does not require grad: no gradient leads to it here")
    *tensors, loss, losses = ctx.saved_tensors
    inputs, options = Inputs(*tensors), ctx.options
    batched = not torch.compiler.is_compiling() and any(is_batched(grad) for grad in given)
    if batched or differentiates_backward(*grads, *inputs):
        ctx.gradients.clear()
        return *_differentiable(ctx, inputs, grads), *none[N_INPUTS:]
    grad_output = grads.output
    if grad_output is None:
        grad_output = inputs.input.new_zeros(
            () if options.reduction == _SUM else _row_shape(inputs), dtype=_acc(inputs)
        )
    needs = _needs(ctx)
    found: tuple[Tensor | None, ...] = (None,) * 4
    if any(needs):
        is_sum = grads.lse is None and grads.entropy is None and _scales(inputs, options, grad_output)
        computed = (
            _of_sum(ctx, inputs, needs, grad_output)
            if is_sum
            else _of_rows(ctx, inputs, needs, (grad_output, grads.lse, grads.entropy))
        )
        found = tuple(gradient if needed else None for gradient, needed in zip(computed, needs, strict=True))
    grad_input, grad_linear_weight, grad_linear_bias, grad_scale = found
    grad_sample_weight = grad_divisor = None
    if inputs.sample_weight is not None and inputs.sample_weight.requires_grad:
        grad_sample_weight = times(_grads_of_rows(inputs._replace(sample_weight=None), grad_output), losses)
    if inputs.divisor is not None and inputs.divisor.requires_grad:
        grad_divisor = -grad_output * loss / inputs.divisor  # loss: a copy of it
    of_layer = (grad_input, grad_linear_weight, grad_linear_bias)
    return *of_layer, None, None, grad_sample_weight, grad_scale, grad_divisor, *none[N_INPUTS:]


def _scales(inputs: Inputs, options: Options, grad_output: Tensor) -> bool:
    """Whether the gradients are those of a loss with gradient 1, times what comes in.

    Not in float16, whose small gradients would be lost, and not where it is infinite or 0, as far as that can be seen:
    an ignored row's gradient is 0 nevertheless, and so is that of an infinite weight.
    """
    if options.reduction != _SUM or inputs.input.dtype == torch.float16:
        return False
    factor = known_least(grad_output)
    return factor is None or (math.isfinite(factor) and factor != 0)


def _of_sum(ctx: Any, inputs: Inputs, needs: tuple[bool, ...], grad_loss: Tensor) -> list[Tensor]:
    """Those of the forward, which the first backward takes, or the same computed again, times what is left of it."""
    try:
        gradients = ctx.gradients.pop()
    except IndexError:
        arguments = (*inputs, needs, *ctx.wanted, *ctx.chunks, *ctx.options)  # of outputs too: by the same ops
        with torch.no_grad():  # while torch.compile traces a backward, gradients are enabled
            gradients = torch.ops.torchce.linear_softmax_ce_forward(*arguments)[-4:]
    if torch.compiler.is_compiling() or type(gradients[0]) is not Tensor:  # which a trace plans the memory of
        return [(gradient.to(grad_loss.dtype) * grad_loss).to(gradient.dtype) for gradient in gradients]
    if known_least(grad_loss) != 1:
        for gradient, needed in zip(gradients, needs, strict=True):
            if needed:
                chunked.scale_(gradient, grad_loss)
    return list(gradients)


def _of_rows(ctx: Any, inputs: Inputs, needs: tuple[bool, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    ctx.gradients.clear()  # the forward's are not those of all outputs, and would be held beside them
    with torch.no_grad():  # as in _of_sum
        found: tuple[Tensor, ...] = torch.ops.torchce.linear_softmax_ce_backward(
            *grads, *inputs, needs, *ctx.chunks, *ctx.options
        )
    return found


def _differentiable(ctx: Any, inputs: Inputs, grads: Gradients) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs, from operations that torch can transform and differentiate again."""

    def outputs(*tensors: Any) -> tuple[Tensor, ...]:
        loss, lse, _, entropy, _ = _unfused(Inputs(*tensors), ctx.wanted, ctx.options)
        return loss, lse, entropy

    with _without_autocast(inputs):
        return gradients_of(outputs, inputs, ctx.needs_input_grad[:N_INPUTS], grads)


refuse_derivative("linear_softmax_ce_backward", "linear_cross_entropy")
differentiate("linear_softmax_ce_forward", _unfused_forward, _set_up, _op_backward, _with_gradients)
decompose_for_onnx("linear_softmax_ce_forward", _unfused_forward)
