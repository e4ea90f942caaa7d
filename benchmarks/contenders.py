"""Who is measured: each an adapter of a few lines from a problem to a function of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import torchce
from benchmarks.problems import (
    BCE,
    CAPPED,
    CROSS_ENTROPY,
    DIVERGENCES,
    ENTROPY,
    ENTROPY_OF_LOGITS,
    JS_DIV,
    KL_DIV,
    LINEAR_CROSS_ENTROPY,
    SOFT64,
    Problem,
)
from benchmarks.traffic import PHASES

Loss = Callable[..., Tensor]
IGNORE_INDEX = -100


class Unsupported(Exception):
    """The contender does not solve this problem at all; says why."""


@dataclass(frozen=True)
class Contender:
    name: str
    loss: Callable[[Problem], Loss]
    devices: tuple[str, ...] = ("cpu", "cuda")
    module: str | None = None  # what must be importable
    distribution: str | None = None  # where it is to be had
    overwrites: bool = False  # a training step destroys the logits
    phases: tuple[str, ...] = PHASES  # that it has

    def consumes(self, problem: Problem) -> bool:
        """Whether each training step needs its inputs afresh: others' first step makes what may be overwritten."""
        return self.overwrites and problem.op in (CROSS_ENTROPY, BCE)

    def missing(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.module is None or util.find_spec(self.module) is not None:
            return None
        return f"not installed (pip install {self.distribution})"

    def version(self) -> str | None:
        try:
            return metadata.version(self.distribution) if self.distribution else None
        except metadata.PackageNotFoundError:
            return None


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise Unsupported(what)


def _torchce(problem: Problem) -> Loss:
    _require(hasattr(torchce.functional, problem.op), f"torchce has no {problem.op}")
    if problem.variant == ENTROPY:
        return _torchce_with_entropy
    return getattr(torchce.functional, problem.op)


def _torchce_with_entropy(logits: Tensor, target: Tensor, entropy_bonus: float, **keywords: Any) -> Tensor:
    out = torchce.functional.cross_entropy(logits, target, return_entropy=True, **keywords)
    return out.loss - entropy_bonus * out.entropy.mean().to(out.loss.dtype)


def _torchce_in_place(problem: Problem) -> Loss:
    if problem.op == LINEAR_CROSS_ENTROPY:
        return _after_linear(partial(torchce.functional.cross_entropy, inplace_backward=True))
    _require(problem.op not in DIVERGENCES, "a divergence's gradient overwrites nothing")
    return partial(_torchce(problem), inplace_backward=True)


class _ForwardBackward(torch.autograd.Function):
    """Loss and gradient at once, for callers who know the upstream gradient, here 1, as a fused linear layer does."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
        dtype = torchce.ops.accumulation_dtype(logits.dtype)
        divisor = torchce.softmax_ce.mean_divisor(target, weight, IGNORE_INDEX, logits.shape[1], dtype)
        ctx.grad = logits.detach()
        loss = torchce.ops.softmax_ce_forward_backward_(
            divisor.reciprocal(), ctx.grad, target, weight, dtype, 2, IGNORE_INDEX, label_smoothing
        )
        return (loss / divisor).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.grad, None, None, None


def _torchce_forward_backward(problem: Problem) -> Loss:
    _require(problem.op == CROSS_ENTROPY, f"has no {problem.op}")
    _require(problem.variant != SOFT64, "is measured with probabilities of the logits' dtype")
    _require(problem.variant not in (CAPPED, ENTROPY), "is measured without them")

    def loss(logits: Tensor, target: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
        weight = None if weight is None else weight.to(torchce.ops.accumulation_dtype(logits.dtype))
        return _ForwardBackward.apply(logits, target, weight, label_smoothing)  # type: ignore[no-any-return]

    return loss


def _after_linear(loss: Loss) -> Loss:
    """The loss of a linear layer's whole logits."""
    return lambda hidden, linear_weight, target: loss(F.linear(hidden, linear_weight), target)


def _capped_cross_entropy(logits: Tensor, target: Tensor, z_loss: float, softcap: float) -> Tensor:
    logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target) + z_loss * torch.logsumexp(logits, 1).square().mean()


def _cross_entropy_with_entropy(logits: Tensor, target: Tensor, entropy_bonus: float) -> Tensor:
    log_p = F.log_softmax(logits, 1)
    return F.nll_loss(log_p, target) - entropy_bonus * -(log_p.exp() * log_p).sum(1).mean()


def _rows(logits: Tensor) -> int:
    return logits.numel() // logits.shape[1]


def _kl_div(logits: Tensor, target: Tensor, target_logits: bool = False) -> Tensor:
    teacher = F.log_softmax(target, 1) if target_logits else target
    # Of two dimensions that is batchmean.
    return F.kl_div(F.log_softmax(logits, 1), teacher, reduction="sum", log_target=target_logits) / _rows(logits)


def _js_div(logits: Tensor, target: Tensor, target_logits: bool) -> Tensor:
    log_q, log_p = F.log_softmax(logits, 1), F.log_softmax(target, 1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    terms = [F.kl_div(log_m, log, reduction="sum", log_target=True) for log in (log_p, log_q)]
    return sum(terms[1:], terms[0]) / (2 * _rows(logits))


def _entropy(logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1).mean()


COMPOSED: dict[str, Loss] = {KL_DIV: _kl_div, JS_DIV: _js_div, ENTROPY_OF_LOGITS: _entropy}
"""What torch has no function for."""


def eager(problem: Problem) -> Loss:
    if problem.variant == CAPPED:
        return _capped_cross_entropy
    if problem.variant == ENTROPY:
        return _cross_entropy_with_entropy
    if problem.op in COMPOSED:
        return COMPOSED[problem.op]
    # As torch's own linear_cross_entropy without options, which older versions lack.
    return _after_linear(F.cross_entropy) if problem.op == LINEAR_CROSS_ENTROPY else getattr(F, problem.op)


def _compile(problem: Problem) -> Loss:
    # Static shapes are the best case for the compiler; the default mode is what a training loop uses.
    loss = eager(problem)
    return torch.compile(lambda *arguments, **keywords: loss(*arguments, **keywords), fullgraph=True, dynamic=False)


def _torch_chunked(problem: Problem) -> Loss:
    _require(problem.op == LINEAR_CROSS_ENTROPY, "takes no logits: it fuses the linear layer before them")
    _require(hasattr(torch.nn, "LinearCrossEntropyOptions"), "torch has it from 2.13 on")
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def _liger_kl_div(liger: Any, logits: Tensor, target: Tensor, target_logits: bool = False) -> Tensor:
    teacher = F.log_softmax(target, 1) if target_logits else target
    log_q = F.log_softmax(logits, 1)
    loss: Tensor = liger.liger_kl_div(log_q, teacher, reduction="batchmean", log_target=target_logits)
    return loss


def _liger_js_div(liger: Any, logits: Tensor, target: Tensor, target_logits: bool) -> Tensor:
    loss: Tensor = liger.liger_jsd(F.log_softmax(logits, 1), F.log_softmax(target, 1))
    return loss


def _liger(problem: Problem) -> Loss:
    from liger_kernel.transformers import functional as liger

    if problem.op == LINEAR_CROSS_ENTROPY:
        return liger.liger_fused_linear_cross_entropy
    if problem.op in (KL_DIV, JS_DIV):
        _require(len(problem.shape) == 2, "takes [N, C] logits only")
        return partial(_liger_kl_div if problem.op == KL_DIV else _liger_js_div, liger)
    _require(problem.op == CROSS_ENTROPY, f"has no {problem.op}")
    _require(len(problem.shape) == 2 and problem.variant != "soft", "takes [N, C] logits and class indices only")
    _require(problem.variant != ENTROPY, "returns no entropy")
    if problem.variant == CAPPED:
        return lambda logits, target, z_loss, softcap: liger.liger_cross_entropy(
            logits, target, lse_square_scale=z_loss, softcap=softcap
        )
    return liger.liger_cross_entropy


def _quack(problem: Problem) -> Loss:
    if problem.op == LINEAR_CROSS_ENTROPY:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy
    from quack import cross_entropy

    _require(problem.op == CROSS_ENTROPY, f"has no {problem.op}")
    _require(len(problem.shape) == 2 and problem.variant != "soft", "takes [N, C] logits and class indices only")
    _require(problem.variant not in ("smoothing", CAPPED, ENTROPY), f"has no {problem.variant}")
    return cross_entropy


def _apple_cce(problem: Problem) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    _require(problem.op == LINEAR_CROSS_ENTROPY, "takes no logits: it fuses the linear layer before them")
    return linear_cross_entropy


TORCHCE = "torchce"
IN_PLACE = "torchce in place"
FORWARD_BACKWARD = "torchce forward_backward"
EAGER = "eager"
COMPILE = "compile"
TORCH_CHUNKED = "torch chunked"
LIGER = "Liger"
QUACK = "QuACK"
APPLE_CCE = "Apple CCE"

CONTENDERS = [
    Contender(TORCHCE, _torchce),
    Contender(IN_PLACE, _torchce_in_place, overwrites=True, phases=("forward+backward",)),
    Contender(FORWARD_BACKWARD, _torchce_forward_backward, overwrites=True, phases=("forward+backward",)),
    Contender(EAGER, eager),
    Contender(COMPILE, _compile),
    Contender(TORCH_CHUNKED, _torch_chunked),
    Contender(
        # Its forward already computes the gradient, over the logits: there is no backward to time.
        *(LIGER, _liger, ("cuda",), "liger_kernel", "liger-kernel"),
        overwrites=True,
        phases=("forward", "forward+backward"),
    ),
    Contender(QUACK, _quack, ("cuda",), "quack", "quack-kernels"),
    Contender(APPLE_CCE, _apple_cce, ("cuda",), "cut_cross_entropy", "cut-cross-entropy"),
]

OURS = {TORCHCE: None, IN_PLACE: "in place", FORWARD_BACKWARD: "forward_backward"}
"""Those of this project; where it is not a phase, what their pass is called."""
PEERS = tuple(contender.name for contender in CONTENDERS if contender.name not in OURS)
COPY = "copy"
READ = "read"
YARDSTICKS = (COPY, READ)
