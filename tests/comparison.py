"""One tolerance for the whole suite, and one way to run ours, torch's and the reference on the same problem.

The rule: our error against the float64 reference may exceed torch's own error at the same dtype by at most one ulp of
the output dtype at that value plus 7e-7 of the value's condition (reference.py). That is six times float32's eps:
partial sums of eight terms and kernels without fused multiply-adds take up to five, and a block whose 32 additions all
round the same way took eight to twelve. Two places are stricter than the rule: 16-bit results are rounded once from
float32 and so are not granted torch's error (torch rounds at every step), and float64 gets 1e-13, so that a float32
step in a float64 kernel cannot pass.

What lies at the ends of float32's range is ruled too:
- A coefficient, a quotient or e^-|x| below the least normal number may be off by one subnormal number.
- A sum or quotient on the way may be infinite where it is beyond a sixteenth of the largest number, and a finite result
  then infinite or NaN, if torch's is no number either.
- So may a finite result where torch's is a number, if it is of terms of both signs and those of one sign add up beyond
  the largest number: it depends on their order then. An infinite one may be NaN, if both do.
- Of losses in float64 whose finite terms add up beyond a sixteenth of the largest number, the truth, which is no wider,
  is none where it is not finite; where it is, they may be off by 1e-13 of that number.
- Where the upstream gradient is infinite, an infinite gradient may be NaN if torch's is, or if it met e^-|x| = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import composed
import reference
import torch
from reference import Truth
from torch import Tensor

import torchce.functional

RELATIVE = {torch.float64: 1e-13, torch.float32: 7e-7, torch.bfloat16: 7e-7, torch.float16: 7e-7}
SIXTEEN_BIT = (torch.bfloat16, torch.float16)

# No power of two below, so that a gradient factor that is lost, squared or applied twice shows.
SCALAR_GRAD_OUTPUT = -2.625


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` at `value` (float64), down to the subnormals."""
    finfo = torch.finfo(dtype)
    _, exponent = torch.frexp(value)  # value = m * 2^exponent with m in [0.5, 1)
    spacing = torch.ldexp(torch.full_like(value, finfo.eps), exponent - 1)
    return spacing.clamp_min(finfo.smallest_normal * finfo.eps)


def assert_accurate(
    what: str,
    ours: Tensor,
    truth: Truth,
    theirs: Tensor | None = None,
    describe: Callable[[tuple[int, ...]], str] = str,
    infinite_grad_output: bool = False,
) -> None:
    """Hold `ours` to the rule above; on failure print the worst element and its inputs.

    Args:
        ours: our result, any floating dtype and device
        theirs: torch's for the same inputs; None where torch has no answer
        describe: the inputs behind the element at an index, in words
        infinite_grad_output: ours is a gradient, and what it was given is infinite
    """
    assert ours.shape == truth.value.shape, f"{what}: shape {ours.shape}, not {truth.value.shape}"
    if ours.numel() == 0:
        return
    value = reference.float64(ours)
    expected = truth.value.to(ours.dtype).to(torch.float64)  # overflows where the dtype does

    accumulates = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32)
    error = (value - truth.value).abs()
    allowed = ulp(truth.value, ours.dtype) + _finite(RELATIVE[ours.dtype] * truth.condition)
    if truth.subnormal is not None:
        allowed = allowed + _finite(accumulates.smallest_normal * accumulates.eps * truth.subnormal)
    if theirs is not None and ours.dtype not in SIXTEEN_BIT:
        allowed = allowed + _finite((reference.float64(theirs) - truth.value).abs())

    # Where the allowed error leads beyond the dtype's range, so may the result.
    farthest = (truth.value + torch.where(truth.value < 0, -allowed, allowed)).to(ours.dtype).to(torch.float64)
    same = (value == expected) | (value.isnan() & expected.isnan())
    good = (error <= allowed) | same | (farthest.isinf() & (value == farthest))
    # NaN for infinity: where an infinite upstream gradient met a factor that is 0 in the dtype; and where torch has NaN
    # of such factors, too, or of terms beyond the dtype's range, whose difference is that of infinities.
    infinite_to_nan = expected.isinf() & value.isnan()
    no_factor = torch.zeros_like(good) if truth.subnormal is None else truth.subnormal.isinf()
    if infinite_grad_output:
        good |= infinite_to_nan & no_factor
    if theirs is not None:
        their_value = reference.float64(theirs)
        beyond = torch.zeros_like(good) if truth.partial is None else truth.partial > accumulates.max / 16
        good |= expected.isfinite() & beyond & ~value.isfinite() & ~their_value.isfinite()
        if truth.of_signs is not None:
            positive, negative = (terms > 0.99 * accumulates.max for terms in truth.of_signs)
            good |= expected.isfinite() & ~value.isfinite() & (positive | negative)
            good |= expected.isinf() & value.isnan() & positive & negative
        if accumulates.dtype == "float64" and truth.of_signs is not None:  # the reference of a loss is no wider
            good |= beyond & ~expected.isfinite()
            good |= beyond & truth.condition.isinf() & (error <= RELATIVE[ours.dtype] * accumulates.max)
        beyond_range = truth.value.isfinite() & (truth.value.abs() > accumulates.max)
        beyond = beyond | beyond_range | no_factor | infinite_grad_output
        good |= infinite_to_nan & their_value.isnan() & beyond
    if bool(good.all()):
        return
    excess = torch.where(good, torch.zeros_like(error), (error / allowed).nan_to_num(nan=torch.inf))
    index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    torch_has = "no answer" if theirs is None else repr(theirs[index].item())
    raise AssertionError(
        f"{what}: {int((~good).sum())} of {good.numel()} elements are wrong; the worst is {list(index)}\n"
        f"  ours  {value[index].item()!r} ({ours.dtype})\n"
        f"  truth {truth.value[index].item()!r}\n"
        f"  torch {torch_has}\n"
        f"  error {error[index].item():.3e}, allowed {allowed[index].item():.3e}\n"
        f"  {describe(index)}"
    )


def _finite(error: Tensor) -> Tensor:
    """An error that is no number allows nothing."""
    return error.nan_to_num(nan=0.0, posinf=0.0)


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal to the last bit: -0.0 is not 0.0, and a NaN equals itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    bits, expected_bits = (t.detach().contiguous().view(integer) for t in (actual, expected))
    differing = int((bits != expected_bits).sum())
    assert differing == 0, f"{what}: {differing} of {expected.numel()} elements differ"


def leaf(tensor: Tensor) -> Tensor:
    """The same memory and strides as a new leaf that requires grad, if its dtype can."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def grad_output_for(loss: Tensor) -> Tensor:
    """Never 1: a scalar constant, or a different number for each element of an unreduced loss."""
    if loss.dim() == 0:
        return torch.full_like(loss, SCALAR_GRAD_OUTPUT)
    generator = torch.Generator().manual_seed(loss.numel())
    return torch.randn(loss.shape, generator=generator).to(loss)


def run(
    function: Callable[..., Tensor],
    logits: Tensor,
    target: Tensor,
    options: Mapping[str, Any],
    grad_output: Tensor | None,
    target_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, gradient of the logits, gradient of the target or None)."""
    logits = leaf(logits)
    target = leaf(target) if target_grad else target.detach()
    loss = function(logits, target, **options)
    grad_output = grad_output_for(loss) if grad_output is None else grad_output
    loss.backward(grad_output)
    assert logits.grad is not None
    return loss.detach(), logits.grad, target.grad


def check_softmax_ce(
    logits: Tensor,
    target: Tensor,
    *,
    grad_output: Tensor | None = None,
    target_grad: bool = False,
    function: Callable[..., Tensor] = torchce.functional.cross_entropy,
    **options: Any,
) -> Tensor:
    """Hold loss and gradients of torchce's cross entropy to reference and torch; returns our loss."""
    is_torchs = options.keys().isdisjoint(composed.OWN)
    torch_options = dict(options)
    torch_target = target
    if not target.is_floating_point():  # torch takes int64 and uint8 indices, and a weight of the logits' dtype
        torch_target = target.long()
        if options.get("weight") is not None:
            torch_options["weight"] = options["weight"].to(logits.dtype)

    def describe(index: tuple[int, ...]) -> str:
        return _describe_row(logits, target, index, options)

    return check(
        function,
        torch.nn.functional.cross_entropy if is_torchs else composed.cross_entropy,
        reference.softmax_ce,
        (logits, target, torch_target),
        (options, torch_options),
        grad_output,
        target_grad,
        describe,
    )


def check_sigmoid_bce(
    logits: Tensor,
    target: Tensor,
    *,
    grad_output: Tensor | None = None,
    target_grad: bool = False,
    **options: Any,
) -> Tensor:
    """Hold loss and gradients of torchce's BCE with logits to reference and torch; returns our loss."""
    # torch takes floating targets only; ours gives integers and bools the logits' dtype
    torch_target = target if target.is_floating_point() else target.to(logits.dtype)

    def describe(index: tuple[int, ...]) -> str:
        if len(index) < logits.dim():
            return _describe_all(logits, target, options)
        return f"logit {logits[index].item()!r}, target {target[index].item()!r}, {options}"

    return check(
        torchce.functional.binary_cross_entropy_with_logits,
        torch.nn.functional.binary_cross_entropy_with_logits,
        reference.sigmoid_bce,
        (logits, target, torch_target),
        (options, options),
        grad_output,
        target_grad,
        describe,
    )


def check(
    our_function: Callable[..., Tensor],
    torch_function: Callable[..., Tensor],
    reference_function: Callable[..., Any],
    tensors: tuple[Tensor, Tensor, Tensor],
    options: tuple[Mapping[str, Any], Mapping[str, Any]],
    grad_output: Tensor | None,
    target_grad: bool,
    describe: Callable[[tuple[int, ...]], str],
) -> Tensor:
    """Hold one function to another and to the reference.

    Args:
        tensors: logits, target and the target as torch takes it
        options: ours and torch's; the reference gets ours
    """
    logits, target, torch_target = tensors
    ours = run(our_function, logits, target, options[0], grad_output, target_grad)
    theirs = run(torch_function, logits, torch_target, options[1], grad_output, target_grad)
    grad_output = grad_output_for(ours[0]) if grad_output is None else grad_output
    known = {name: value for name, value in options[0].items() if name not in composed.OF_RESULT}
    truths = reference_function(logits, target, grad_output=grad_output, **known)

    for name, our, their, truth in zip(("loss", "grad_logits", "grad_target"), ours, theirs, truths, strict=True):
        if our is None and not (name == "grad_target" and target_grad):
            continue
        assert our.dtype == their.dtype, f"{name}: {our.dtype}, torch gives {their.dtype}"
        assert our.shape == their.shape, f"{name}: {our.shape}, torch gives {their.shape}"
        assert our.device == their.device, f"{name}: {our.device}, torch gives {their.device}"
        assert_accurate(name, our, truth, their, describe, name != "loss" and bool(grad_output.isinf().any()))
    return ours[0]


def _describe_row(logits: Tensor, target: Tensor, index: tuple[int, ...], options: Mapping[str, Any]) -> str:
    class_dim = 0 if logits.dim() == 1 else 1
    if len(index) == logits.dim():  # an element of a gradient
        logit = f"logit {logits[index].item()!r}; "
        row_index = index[:class_dim] + index[class_dim + 1 :]
    elif len(index) == logits.dim() - 1:  # a row's loss
        logit, row_index = "", index
    else:
        return _describe_all(logits, target, options)
    everything = slice(None)
    row = logits[(*row_index[:class_dim], everything, *row_index[class_dim:])]
    row_target = (
        target[(*row_index[:class_dim], everything, *row_index[class_dim:])]
        if target.is_floating_point()
        else target[row_index]
    )
    return (
        f"{logit}row {list(row_index)} of {row.numel()} logits in [{row.min().item()!r}, {row.max().item()!r}], "
        f"target {row_target.flatten()[:8].tolist()}, {options}"
    )


def _describe_all(logits: Tensor, target: Tensor, options: Mapping[str, Any]) -> str:
    return (
        f"logits {list(logits.shape)} {logits.dtype} strides {logits.stride()}, "
        f"target {list(target.shape)} {target.dtype}, {options}"
    )
