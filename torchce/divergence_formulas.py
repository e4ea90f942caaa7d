"""The formulas of ``csrc/math/divergence.h`` in torch's own operations, for what torch is to transform or trace."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchce import ops
from torchce.composites import reduced, times

KL, REVERSE_KL, JS, ENTROPY = range(4)
_MEAN = 1


class Options(NamedTuple):
    """What a call asks for beside its tensors, in the order of ``csrc/schemas.h``; a new one comes last."""

    kind: int
    """0 KL(teacher || student), 1 KL(student || teacher), 2 JS, 3 the student's entropy."""
    reduction: int
    """torch's number: 0 none, 1 mean, 2 sum."""
    target_logits: bool
    temperature: float = 1.0
    beta: float = 0.5


class Distribution(NamedTuple):
    """Probabilities and their logarithms; without a NaN in rows that are left out."""

    p: Tensor
    log: Tensor
    is_known: bool
    """Whether the probabilities were given, and not logits."""


class _Problem:
    """The distributions of a call, in the dtype that is computed in, and its rows."""

    def __init__(self, input: Tensor, target: Tensor | None, mask: Tensor | None, options: Options) -> None:
        self.options = options
        self.class_dim = min(1, input.dim() - 1)
        self.acc = ops.divergence_accumulation(input, target)
        self.mask = None if mask is None else mask.to(torch.bool)
        self.student = self._softmax(input)
        self.teacher: Distribution | None = None
        if target is not None and options.target_logits:
            self.teacher = self._softmax(target)
        elif target is not None:
            t = self._kept(target.to(self.acc), 1)
            t = torch.where(t < 0, torch.nan, t)  # which has no logarithm, in any derivative
            self.teacher = Distribution(t, t.log(), is_known=True)

    def _softmax(self, logits: Tensor) -> Distribution:
        x = self._kept(logits.to(self.acc)) * (1 / self.options.temperature)
        log_p = x.log_softmax(self.class_dim)
        return Distribution(log_p.exp(), log_p, is_known=False)

    def _kept(self, t: Tensor, filler: int = 0) -> Tensor:
        return t if self.mask is None else torch.where(self.mask.unsqueeze(self.class_dim), t, filler)

    def kept_rows(self, rows: Tensor) -> Tensor:
        """``rows`` with 0 in those that the mask leaves out."""
        return rows if self.mask is None else torch.where(self.mask, rows, 0)

    def count(self) -> Tensor:
        """How many rows are kept, a scalar."""
        rows = self.student.p.select(self.class_dim, 0)
        return torch.ones_like(rows).sum() if self.mask is None else self.mask.sum(dtype=self.acc)

    def over_classes(self, terms: Tensor) -> Tensor:
        return terms.sum(self.class_dim)

    def rows(self) -> Tensor:
        """The loss of each row."""
        kind = self.options.kind
        if kind == ENTROPY:
            return self.over_classes(0 - self.student.p * finite_log(self.student))
        assert self.teacher is not None
        if kind == JS:
            return sum(self.js_terms(), start=self.student.p.new_zeros(()))
        first, other = (self.teacher, self.student) if kind == KL else (self.student, self.teacher)
        return self.over_classes(kl_terms(first, other))

    def js_terms(self) -> tuple[Tensor, Tensor]:
        """Each row's beta KL(teacher || M) and (1 - beta) KL(student || M)."""
        assert self.teacher is not None
        beta = self.options.beta
        log_teacher, log_student = self.mixture_logs()
        if not self.teacher.is_known:
            log_teacher = _where_counted(self.teacher, log_teacher)
        of_teacher = self.over_classes(times(self.teacher.p, log_teacher))
        of_student = self.over_classes(self.student.p * _where_counted(self.student, log_student))
        return beta * of_teacher, (1 - beta) * of_student

    def mixture_logs(self) -> tuple[Tensor, Tensor]:
        """``log(P_k / M_k)`` of the teacher and ``log(Q_k / M_k)`` of the student, M = beta P + (1 - beta) Q."""
        assert self.teacher is not None
        beta, log_p, log_q = self.options.beta, _log_of(self.teacher), self.student.log
        gap = torch.where((log_p == -torch.inf) & (log_q == -torch.inf), 0, log_q - log_p)
        return _log_of_share(gap, 1 - beta, beta), _log_of_share(-gap, beta, 1 - beta)


def _log_of(distribution: Distribution) -> Tensor:
    """The logarithms; given probabilities of 0 have no derivative here, where it would be 0 times infinity."""
    if not distribution.is_known:
        return distribution.log
    is_zero = distribution.p == 0
    return torch.where(is_zero, -torch.inf, torch.where(is_zero, 1, distribution.p).log())


def _log_of_share(gap: Tensor, share: float, rest: float) -> Tensor:
    """``-log(rest + share e^gap)`` of shares that add up to 1: with the digits of a small gap and of a small share, and
    with derivatives at infinite gaps."""

    def log_of_mixture(share: float, rest: float, gap: Tensor) -> Tensor:  # of gaps that are small
        keeps_digits = gap >= (-torch.inf if share <= 0.5 else -1)
        near = (share * torch.where(keeps_digits, gap, 0).expm1()).log1p()
        return torch.where(keeps_digits, near, (rest + share * gap.exp()).log())

    is_small = gap <= (40 if share <= 0.5 else 1)  # e^40 has a square
    small, large = torch.where(is_small, gap, 0), torch.where(is_small, 1, gap)
    return torch.where(is_small, -log_of_mixture(share, rest, small), -large - log_of_mixture(rest, share, -large))


def _x_log_x(x: Tensor) -> Tensor:
    """``x log x``, 0 at 0, where its derivative is minus infinity."""
    if torch.onnx.is_in_onnx_export():  # which has no entr
        return x * torch.where(x == 0, 1, x).log()
    entropy: Tensor = torch.special.entr(x)
    return -entropy


def finite_log(distribution: Distribution) -> Tensor:
    """The logarithms, 0 where the probability is 0: they multiply it."""
    return torch.where(distribution.log == -torch.inf, 0, distribution.log)


def _where_counted(softmax: Distribution, factor: Tensor) -> Tensor:
    """``factor``, 0 where the probability is 0: its derivative by a logit is 0 there, which times infinity is none."""
    return torch.where(softmax.p == 0, 0, factor)


def _gap(first: Distribution, other: Distribution) -> Tensor:
    """``log F_k - log O_k``, 0 where ``F_k`` is."""
    return torch.where(first.log == -torch.inf, 0, first.log - other.log)


def kl_terms(first: Distribution, other: Distribution) -> Tensor:
    """What each class adds to KL(F || O)."""
    if first.is_known:
        return _x_log_x(first.p) - times(first.p, other.log)
    gap = _gap(first, other)
    # An infinite gap counts even where p is rounded to 0, and p stays the derivative by log O.
    p = torch.where(gap == torch.inf, first.p.clamp_min(torch.finfo(gap.dtype).tiny), first.p)
    return p * gap


def composite(
    input: Tensor, target: Tensor | None, mask: Tensor | None, dtype: torch.dtype | None, *options: Any
) -> Tensor:
    """The loss of ``divergence_forward``, of the same arguments, from differentiable operations."""
    return _loss(_Problem(input, target, mask, Options(*options)), dtype or input.dtype)


def _loss(problem: _Problem, dtype: torch.dtype) -> Tensor:
    rows, reduction = problem.kept_rows(problem.rows()), problem.options.reduction
    if reduction == _MEAN:
        return (rows.sum() / problem.count()).to(dtype)
    return reduced(rows, reduction).to(dtype)


def decomposition(
    input: Tensor, target: Tensor | None, mask: Tensor | None, dtype: torch.dtype | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op in torch's own operations, for backends that know no others."""
    problem = _Problem(input, target, mask, Options(*options))
    kind, class_dim, acc = problem.options.kind, problem.class_dim, problem.acc

    def of_logits(logits: Tensor) -> list[Tensor]:
        x = logits.to(acc) * (1 / problem.options.temperature)
        largest = x.amax(class_dim, keepdim=True)
        return [largest.squeeze(class_dim), (x - largest).exp().sum(class_dim)]

    of_input = of_logits(input)
    if target is None:
        statistics = of_input
    elif problem.options.target_logits:
        of_target = of_logits(target)
        statistics = of_input + of_target if kind == REVERSE_KL else of_target + of_input
    else:  # the sum of the first distribution's probabilities
        statistics = of_input if kind == REVERSE_KL else [target.to(acc).sum(class_dim), *of_input]
    if kind == JS:
        statistics += problem.js_terms()
    else:
        statistics.append(-problem.rows() if kind == ENTROPY else problem.rows())
    loss = _loss(problem, dtype or input.dtype)
    return loss, torch.stack([rows.flatten() for rows in statistics]), problem.count().to(acc).reshape(1)


def gradients(
    grad_output: Tensor, input: Tensor, target: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Gradients for the input and for the target, from differentiable operations."""
    problem = _Problem(input, target, mask, options)
    class_dim, kind = problem.class_dim, options.kind
    g = grad_output.to(problem.acc)
    if options.reduction == _MEAN:
        g = g / problem.count()
    g = problem.kept_rows(g.expand(problem.student.p.select(class_dim, 0).shape)).unsqueeze(class_dim)
    of_logits = g / options.temperature
    student, teacher = problem.student, problem.teacher
    if teacher is None:
        entropy = problem.rows().unsqueeze(class_dim)
        return (of_logits * (student.p * (-finite_log(student) - entropy))).to(input.dtype), None
    assert target is not None
    if kind == JS:
        of_teacher, of_student = (rows.unsqueeze(class_dim) for rows in problem.js_terms())
        log_teacher, log_student = problem.mixture_logs()
        least, beta = torch.finfo(problem.acc).min, options.beta
        grad_input = of_logits * (student.p * ((1 - beta) * log_student.clamp_min(least) - of_student))
        if teacher.is_known:
            grad_target = g * (beta * log_teacher)
        else:
            grad_target = of_logits * (teacher.p * (beta * log_teacher.clamp_min(least) - of_teacher))
        return grad_input.to(input.dtype), grad_target.to(target.dtype)
    first, other = (teacher, student) if kind == KL else (student, teacher)
    divergence = problem.rows().unsqueeze(class_dim)
    if first.is_known:
        grad_first = g * ((first.log - other.log) + 1)
    else:
        # The largest number stands for infinite ones: of both the difference would be a NaN.
        most = torch.finfo(problem.acc).max
        divergence = torch.where(divergence == torch.inf, most, divergence)
        grad_first = of_logits * (first.p * (_gap(first, other).clamp(-most, most) - divergence))
    if other.is_known:
        grad_other = -(g * torch.where(first.p == 0, 0, first.p / torch.where(first.p == 0, 1, other.p)))
    else:
        weights = first.p.sum(class_dim, keepdim=True) if first.is_known else 1
        grad_other = of_logits * (other.p * weights - first.p)
    grad_input, grad_target = (grad_other, grad_first) if kind == KL else (grad_first, grad_other)
    return grad_input.to(input.dtype), grad_target.to(target.dtype)
