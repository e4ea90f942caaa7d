"""How many bytes of memory a call must move, with everything read once and written once.

With L bytes of logits, T of target, W of class weights or ``pos_weight``, S of row statistics (two numbers a row, three
for probability targets, in the dtype that is computed in; none for BCE; STATISTICS of a divergence) and k the share of
rows that are not ignored::

    forward             k L + k' T + W     read,   S written
    backward            k L + k' T + W + S read,   L written
    forward+backward    the sum of both: softmax needs a whole row before its first gradient
    in place            as much
    forward_backward    k L + k' T + W     read,   S + L written: a row is kept on the chip until its gradient is

k' is k for probability targets, 1 for class indices: those are what says that a row is ignored. An ignored row's
gradient is written, as zeros. What in place saves is memory, and on CPU the zeroing of fresh pages by the system, which
is in no formula here.

A divergence's target is what its teacher is given by, as large as the logits; only the logits want a gradient.

Linear cross entropy is bound by its matrix products and has no figure.
"""

from __future__ import annotations

import math

from benchmarks.problems import (
    BCE,
    CROSS_ENTROPY,
    DIVERGENCES,
    ENTROPY_OF_LOGITS,
    IGNORED_SHARE,
    JS_DIV,
    KL_DIV,
    PROBABILITIES,
    SOFT64,
    Problem,
)

INDEX_BYTES = 8  # int64
WIDE_BYTES = 8  # float64
STATISTIC_BYTES = 4  # float32, where nothing is wider

STATISTICS = {
    (KL_DIV, ""): 4,
    (KL_DIV, PROBABILITIES): 3,
    (JS_DIV, ""): 5,
    (ENTROPY_OF_LOGITS, ""): 3,
}
"""Numbers a row that the gradient of a divergence's logits needs: two a softmax, the sum of given probabilities, the
student's term of a JS divergence, the entropy. Those for the teacher's gradient are not among them."""

PHASES = ("forward", "backward", "forward+backward")


def traffic_bytes(problem: Problem, phase: str, element_bytes: int) -> int | None:
    """Bytes one call of ``phase`` moves, for logits of ``element_bytes`` each."""
    logits = math.prod(problem.shape) * element_bytes
    soft = problem.variant in ("soft", SOFT64)
    kept = 1 - IGNORED_SHARE if problem.variant == "ignored" else 1.0
    if problem.op == BCE:
        target, statistics = logits, 0
    elif problem.op == CROSS_ENTROPY:
        probabilities = math.prod(problem.shape) * WIDE_BYTES if problem.variant == SOFT64 else logits
        target = probabilities if soft else problem.rows * INDEX_BYTES
        number = max(STATISTIC_BYTES, element_bytes, WIDE_BYTES if problem.variant == SOFT64 else 0)
        statistics = problem.rows * number * (3 if soft else 2)
    elif problem.op in DIVERGENCES:
        target = 0 if problem.op == ENTROPY_OF_LOGITS else logits
        statistics = problem.rows * max(STATISTIC_BYTES, element_bytes) * STATISTICS[problem.op, problem.variant]
    else:
        return None
    weights = problem.classes * element_bytes if problem.variant in ("weight", "pos_weight") else 0
    reads = int(kept * logits) + target + weights
    both = 2 * reads + 2 * statistics + logits
    return {
        "forward": reads + statistics,
        "backward": reads + statistics + logits,
        "forward+backward": both,
        "in place": both,
        "forward_backward": reads + statistics + logits,
    }[phase]
