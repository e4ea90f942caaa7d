"""Divergences of a student's linear layer from a teacher's, whose logits are never whole: ops and derivatives.

Pieces of rows go through both layers and the loss, forward and again backward (:mod:`torchce.chunked`). Only the
student learns: the teacher's layer has no gradient here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchce import chunked, ops
from torchce.composites import decompose_for_onnx, differentiate, gradients_of, implement, refuse_derivative
from torchce.divergence_formulas import Options, composite
from torchce.transforms import differentiates_backward, is_batched

_NONE = 0


class Inputs(NamedTuple):
    """The tensors of a call, in the order of the ops' schemas.

    Shape:
        - input: ``[N, H]``, linear_weight: ``[C, H]``, linear_bias: ``[C]``
        - target_input: ``[N, G]``, target_linear_weight: ``[C, G]``, target_linear_bias: ``[C]``
        - mask: bool ``[N]``
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target_input: Tensor
    target_linear_weight: Tensor
    target_linear_bias: Tensor | None
    mask: Tensor | None

    def without_masked_rows(self) -> Inputs:
        """With zeros for what rows hold that are left out: a NaN times 0 would reach the weights' gradients."""
        if self.mask is None:
            return self
        kept = self.mask.unsqueeze(1)
        input, target_input = (torch.where(kept, rows, 0) for rows in (self.input, self.target_input))
        return self._replace(input=input, target_input=target_input)


N_INPUTS = len(Inputs._fields)
_N_STUDENT = 3  # of the inputs, those that may have a gradient
_N_CHUNKS = len(chunked.Chunks._fields)
_TENSORS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target_input, Tensor target_linear_weight, "
    "Tensor? target_linear_bias, Tensor? mask, "
)
_REST = (
    "SymInt chunk_bytes, SymInt chunk_rows, bool compact_gradients, bool compact_ignored, int kind, "
    "float temperature=1.0, float beta=0.5"
)
_library = torch.library.Library("torchce", "FRAGMENT")
_library.define(f"linear_divergence_forward({_TENSORS}{_REST}) -> Tensor")
# `needs` says which gradients are wanted: of input, linear_weight, linear_bias.
_library.define(
    f"linear_divergence_backward(Tensor grad_output, {_TENSORS}bool[] needs, {_REST}) -> "
    "(Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)"
)


class Loss(NamedTuple):
    """What is computed of both rows of logits, as ``divergence_forward`` takes it."""

    kind: int
    temperature: float = 1.0
    beta: float = 0.5


def _options(loss: Loss) -> Options:
    return Options(loss.kind, _NONE, True, loss.temperature, loss.beta)


def linear_divergence(inputs: Inputs, chunks: chunked.Chunks, loss: Loss) -> Tensor:
    """The loss of each row, ``[N]``, of the dtype that is computed in; of checked inputs, differentiable."""
    losses: Tensor = torch.ops.torchce.linear_divergence_forward(*inputs, *chunks, *loss)
    return losses


# --- the ops -------------------------------------------------------------------------------------------------------


def _parsed(arguments: tuple[Any, ...]) -> tuple[Inputs, chunked.Chunks, Loss]:
    """The arguments of the forward op; graphs leave out those that are the defaults."""
    rest = arguments[N_INPUTS:]
    return Inputs(*arguments[:N_INPUTS]), chunked.Chunks(*rest[:_N_CHUNKS]), Loss(*rest[_N_CHUNKS:])


def _acc(inputs: Inputs) -> torch.dtype:
    return ops.divergence_accumulation(inputs.input, inputs.target_input)


def _student(inputs: Inputs) -> chunked.Linear:
    return chunked.Linear(inputs.input, inputs.linear_weight, inputs.linear_bias)


def _run(
    inputs: Inputs,
    chunks: chunked.Chunks,
    needs: tuple[bool, bool, bool],
    turn: Callable[[Tensor, Tensor, slice | Tensor], Tensor | None],
) -> chunked.LayerGradients:
    """Calls ``turn`` with the student's and the teacher's logits of each piece; it returns the former's gradient."""

    def turn_both(logits: Tensor, at: slice | Tensor) -> None:
        of_teacher = F.linear(inputs.target_input[at], inputs.target_linear_weight, inputs.target_linear_bias)
        of_student = logits
        if logits.is_cuda and of_teacher.dtype != logits.dtype:  # kernels take pairs of one dtype there
            common = torch.promote_types(logits.dtype, of_teacher.dtype)
            of_student, of_teacher = logits.to(common), of_teacher.to(common)
        gradient = turn(of_student, of_teacher, at)
        if gradient is not None:
            logits.copy_(gradient)

    kept = None
    if inputs.mask is not None:
        kept = chunked.kept_rows(inputs.mask, len(inputs.linear_weight), chunks)
        if kept is None:
            inputs = inputs.without_masked_rows()
    # The teacher's logits, and a gradient before it is written over the student's.
    element_bytes = inputs.target_input.element_size() + (inputs.input.element_size() if any(needs) else 0)
    row_bytes = len(inputs.linear_weight) * element_bytes
    with torch.amp.autocast(inputs.input.device.type, enabled=False):  # it has had its say before
        return chunked.run(_student(inputs), kept, needs, chunks, turn_both, row_bytes)


def _piece(mask: Tensor | None, at: slice | Tensor) -> Tensor | None:
    return None if mask is None else mask[at].contiguous()


def _forward(*arguments: Any) -> Tensor:
    inputs, chunks, loss = _parsed(arguments)
    losses = inputs.input.new_zeros(len(inputs.input), dtype=_acc(inputs))

    def keep(logits: Tensor, of_teacher: Tensor, at: slice | Tensor) -> None:
        mask = _piece(inputs.mask, at)
        losses[at] = ops.eager_divergence_forward(logits, of_teacher, mask, losses.dtype, *_options(loss))[0]

    _run(inputs, chunks, (False, False, False), keep)
    return losses


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    grad_output, needs = arguments[0], arguments[N_INPUTS + 1]
    inputs, chunks, loss = _parsed((*arguments[1 : N_INPUTS + 1], *arguments[N_INPUTS + 2 :]))
    options = _options(loss)

    def turn(logits: Tensor, of_teacher: Tensor, at: slice | Tensor) -> Tensor:
        operands = (logits, of_teacher, _piece(inputs.mask, at))
        _, *saved = ops.eager_divergence_forward(*operands, grad_output.dtype, *options)
        grad, _ = ops.eager_divergence_backward(grad_output[at], *operands, *saved, True, False, *options)
        return grad  # type: ignore[no-any-return]

    return chunked.as_outputs(_run(inputs, chunks, tuple(needs), turn), _student(inputs))


def _fake_forward(*arguments: Any) -> Tensor:
    inputs, _, _ = _parsed(arguments)
    return inputs.input.new_empty(inputs.input.shape[0], dtype=_acc(inputs))


def _fake_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs = Inputs(*arguments[:N_INPUTS]), arguments[N_INPUTS]
    return chunked.new_outputs(inputs.input, inputs.linear_weight, needs)


implement("linear_divergence_forward", _forward, _fake_forward)
implement("linear_divergence_backward", _backward, _fake_backward)


# --- autograd ------------------------------------------------------------------------------------------------------


def _unfused(*arguments: Any) -> Tensor:
    """What the forward op gives of the same arguments, in torch's own operations, through the whole logits."""
    inputs, _, loss = _parsed(arguments)
    inputs = inputs.without_masked_rows()
    logits = F.linear(*_student(inputs))
    of_teacher = F.linear(inputs.target_input, inputs.target_linear_weight, inputs.target_linear_bias)
    return composite(logits, of_teacher, inputs.mask, _acc(inputs), *_options(loss))


def _set_up(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*arguments[:N_INPUTS])
    ctx.rest = arguments[N_INPUTS:]


def _op_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:_N_STUDENT]
    if any(ctx.needs_input_grad[_N_STUDENT:N_INPUTS]):
        raise RuntimeError("target_input, target_linear_weight, target_linear_bias: expected none that requires grad")
    inputs, none = ctx.saved_tensors, (None,) * (len(ctx.needs_input_grad) - _N_STUDENT)
    batched = not torch.compiler.is_compiling() and is_batched(grad_output)
    if batched or differentiates_backward(grad_output, *inputs):

        def losses(*student: Tensor) -> Tensor:
            return _unfused(*student, *inputs[_N_STUDENT:], *ctx.rest)

        with torch.amp.autocast(grad_output.device.type, enabled=False):
            return *gradients_of(losses, inputs[:_N_STUDENT], needs, (grad_output,)), *none
    with torch.no_grad():  # while torch.compile traces a backward, gradients are enabled
        found = torch.ops.torchce.linear_divergence_backward(grad_output, *inputs, needs, *ctx.rest)
    return *(gradient if needed else None for gradient, needed in zip(found, needs, strict=True)), *none


refuse_derivative("linear_divergence_backward", "a linear divergence")
differentiate("linear_divergence_forward", _unfused, _set_up, _op_backward)
decompose_for_onnx("linear_divergence_forward", _unfused)
