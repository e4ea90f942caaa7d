"""Faults planted into a copy of the kernels, to see that the tests catch each of them.

All are compiled into one library, where ``planted_fault`` is the number of the one that is in effect, so that a dozen
faults cost one build. ``python -m cuda_emulation.faults REPORT`` runs each fault's tests and writes what failed, in
JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cuda_emulation import build

SOURCES = build.ROOT / "build" / "cuda_emulation" / "faulty" / "csrc"


@dataclass(frozen=True)
class Fault:
    """``code``, which must be in the file once, becomes ``faulty``, whose PLANTED is 1 when it is in effect, else 0.

    A fault must not write out of bounds, nor read far out: the library has no sanitizers, and one process serves all.
    """

    file: str
    code: str
    faulty: str
    tests: str  # a node id
    says: str = "elements are wrong"  # part of what the failed test says


FORWARD_BACKWARD_HOST = "cuda/softmax_ce_forward_backward.cu"
BACKWARD_HOST, OUTPUTS_OF_ROWS = "cuda/softmax_ce_backward.cu", "cuda/softmax_ce_outputs.cuh"
SCALE = "cuda/softmax_ce_scale.cuh"
BINARY, DIVERGENCE_ROW, PACKED_CLASSES = (
    "cuda/binary_divergence.cuh",
    "cuda/divergence_row.cuh",
    "cuda/packed_classes.cuh",
)
FORMULAS = "math/softmax_ce.h"
REDUCE, CLUSTER, EXP, CLASSES, SUMS, GRADIENT, FORWARD, BACKWARD, FORWARD_BACKWARD, BCE, BCE_OPERANDS = (
    f"cuda/{name}.cuh"
    for name in (
        "reduce",
        "cluster",
        "exp",
        "softmax_ce_classes",
        "softmax_ce_sums",
        "softmax_ce_gradient",
        "softmax_ce_forward",
        "softmax_ce_backward",
        "softmax_ce_forward_backward",
        "sigmoid_bce",
        "sigmoid_bce_operands",
    )
)
PLANS = "test_cuda_regimes.py::test_every_change_of_plan"
MANY_ROWS = "test_cuda_regimes.py::test_more_rows_than_resident_blocks_take_at_once"
FORWARD_BACKWARD_PLANS = "test_softmax_ce_forward_backward.py::test_every_change_of_plan"
CLUSTERS = "test_softmax_ce_forward_backward.py::test_rows_spread_over_a_cluster"
INNER = "test_cuda_regimes.py::test_inner_positions_around_every_block_width"
COLUMNS = "test_cuda_regimes.py::test_bce_weights_of_columns"
TRANSFORMED = "test_cuda_regimes.py::test_transformed_logits"
OUTPUTS = "test_softmax_ce_own.py::test_outputs"
DIVERGENCES = "test_divergence.py::test_shapes"
OF_SCALE = "test_softmax_ce_own.py::test_gradient_of_a_scale"

FAULTS = {
    "a barrier is missing before shared memory is read": Fault(
        REDUCE,
        "of_warps[warp] = value;\n  __syncthreads();",
        "of_warps[warp] = value;\n  if (!PLANTED) __syncthreads();",
        MANY_ROWS,
    ),
    "a barrier is missing before shared memory is used again": Fault(
        REDUCE,
        "__syncthreads();  // an earlier call",
        "if (!PLANTED) __syncthreads();  // an earlier call",
        MANY_ROWS,
    ),
    "a barrier is missing across the rows, before the read": Fault(
        FORWARD, "= sums[v];\n    __syncthreads();", "= sums[v];\n    if (!PLANTED) __syncthreads();", INNER
    ),
    "some threads leave before a barrier": Fault(
        REDUCE,
        "if (gridDim.x == 1) return true;\n  if (threadIdx.x == 0) scratch",
        "if (gridDim.x == 1 || (PLANTED && threadIdx.x > 100)) return true;\n  if (threadIdx.x == 0) scratch",
        MANY_ROWS,
        "deadlock: thread",
    ),
    "the last block is taken for the one before": Fault(
        REDUCE, "== blocks - 1;", "== blocks - 1 - PLANTED;", MANY_ROWS
    ),
    "the counter of blocks is not left at zero": Fault(
        REDUCE, "atomicInc(counter, blocks - 1)", "atomicInc(counter, blocks - 1 + PLANTED)", MANY_ROWS, "counter"
    ),
    "half of a warp's lanes are not added": Fault(REDUCE, "width / 2;", "width / (2 + 2 * PLANTED);", PLANS),
    "the tail ends one class early": Fault(PACKED_CLASSES, "k < end;", "k < end - PLANTED;", PLANS),
    "the head ends one class early": Fault(PACKED_CLASSES, "k < body;", "k < body - PLANTED;", PLANS),
    "the tail takes one class twice": Fault(
        PACKED_CLASSES,
        "k = body + packs * V + thread;",
        "k = body + packs * V + thread - (PLANTED && packs > 0);",
        "test_ops.py::test_in_place_backward_at_every_remainder",
        "elements differ",
    ),
    "the tail steps wrongly": Fault(
        PACKED_CLASSES,
        "; k += threads) f(k);\n  }\n};",
        "; k += threads + PLANTED) f(k);\n  }\n};",
        "test_softmax_ce.py::test_every_remainder",
    ),
    "the gradient overwrites the target's logit before it is read": Fault(
        FORWARD_BACKWARD,
        "if (lane == 0) finish_row<T, Target>(forward, r, sums, target, hot_logit, total);",
        "if (PLANTED) hot_logit = load_hot_logit<T, Target>(rows, at, target);\n"
        "if (lane == 0) finish_row<T, Target>(forward, r, sums, target, hot_logit, total);",
        FORWARD_BACKWARD_PLANS,
    ),
    "a barrier is missing before a cluster's sums are read": Fault(
        CLUSTER,
        "of_this_block = value;\n  cluster.sync();",
        "of_this_block = value;\n  if (!PLANTED) cluster.sync();",
        CLUSTERS,
    ),
    "a block ends while its cluster reads from it": Fault(
        CLUSTER,
        "cluster.sync();  // the next call",
        "if (!PLANTED) cluster.sync();  // the next call",
        CLUSTERS,
        "has ended",
    ),
    "a cluster's second block is left out": Fault(
        CLUSTER, "of_each(cluster.size,", "of_each(cluster.size - PLANTED,", CLUSTERS
    ),
    "blocks of a cluster take the same classes": Fault(
        FORWARD_BACKWARD,
        "thread = cluster.rank() * kThreads",
        "thread = (PLANTED ? 0 : cluster.rank()) * kThreads",
        CLUSTERS,
    ),
    "what is kept is taken for another pack": Fault(
        FORWARD_BACKWARD,
        "memcpy(&pack, &slot(number)",
        "memcpy(&pack, &slot(PLANTED && number > 0 ? number - 1 : number)",
        FORWARD_BACKWARD_PLANS,
    ),
    "more is kept than fits": Fault(
        FORWARD_BACKWARD,
        "if (number < count) std",
        "if (number < count + PLANTED) std",
        FORWARD_BACKWARD_PLANS,
        "dynamic shared memory",
    ),
    "the target is read as if its classes were adjacent": Fault(
        SUMS,
        "* rows.target_strides.classes, true)",
        "* (PLANTED ? 1 : rows.target_strides.classes), true)",
        "test_softmax_ce.py::test_probability_layouts",
    ),
    "the gradient is written as if its classes were adjacent": Fault(
        BACKWARD,
        "(first + i) * call.grad_strides.classes",
        "(first + i) * (PLANTED ? 1 : call.grad_strides.classes)",
        "test_softmax_ce.py::test_logits_layouts",
    ),
    "rows beyond the grid are left out": Fault(
        FORWARD, "r < count; r += gridDim.x", "r < count; r += PLANTED ? count : gridDim.x", MANY_ROWS
    ),
    "a row is given the target of the row before": Fault(
        FORWARD, "ahead.ask_for(r + gridDim.x);", "if (!PLANTED) ahead.ask_for(r + gridDim.x);", MANY_ROWS
    ),
    "a class that is not there counts as a logit of 0": Fault(
        SUMS,
        "store_one(&x, -math::kInfinity<Accumulate<T>>);",
        "store_one(&x, PLANTED ? 0 : -math::kInfinity<Accumulate<T>>);",
        PLANS,
    ),
    "the target class is looked for one class late": Fault(
        GRADIENT, "uint64_t(index - k);", "uint64_t(index - k - PLANTED);", PLANS
    ),
    "an ignored row across the rows keeps its gradient": Fault(
        BACKWARD, "row[v].ignored ? 0 : 0xff", "row[v].ignored && !PLANTED ? 0 : 0xff", INNER
    ),
    "a small probability is 0 before a large gradient multiplies it": Fault(
        EXP,
        "excess_ = small ? 0.0f : 64.0f;",
        "excess_ = small ? 0.0f : 64.0f;\n    if (PLANTED) scale_ = scale, excess_ = 0;",
        "test_softmax_ce.py::test_probabilities_below_the_least_normal_number",
    ),
    "gaps of masked logits are rebased as if their maximum were 0": Fault(
        SUMS,
        "return max == minus_infinity() ? base(larger) : max;",
        "return max == minus_infinity() && !PLANTED ? base(larger) : base(max);",
        "test_infinite_weights.py::test_minus_infinite_logits",
    ),
    "a class that is not there has its share of the smoothing": Fault(
        CLASSES,
        "const A share = kWhole || is_there ? ",
        "const A share = kWhole || is_there || PLANTED ? ",
        PLANS,
    ),
    "an infinite weight's loss is left to the formula": Fault(
        FORMULAS,
        "const auto infinite = ",
        "const auto infinite = !PLANTED & ",
        "test_infinite_weights.py::test_every_place",
    ),
    "the gradient of a value is taken for the logit's": Fault(
        GRADIENT,
        "return logit.slope(value) * gradient;",
        "return PLANTED ? gradient : logit.slope(value) * gradient;",
        TRANSFORMED,
    ),
    "a z-loss has half of its gradient": Fault(FORMULAS, "A(2) * z * lse", "A(2 - PLANTED) * z * lse", OUTPUTS),
    "the gradient of lse is read as if its rows lay side by side": Fault(
        BACKWARD_HOST,
        "args.grad_lse_strides = turned(args.grad_lse_strides);",
        "if (!PLANTED) args.grad_lse_strides = turned(args.grad_lse_strides);",
        OUTPUTS,
        "elements differ",
    ),
    "an ignored row has no lse": Fault(CLASSES, "&& rows.every_row)", "&& rows.every_row && !PLANTED)", OUTPUTS, "lse"),
    "the last of equal logits is predicted": Fault(
        OUTPUTS_OF_ROWS,
        "other.index < index",
        "(other.index < index) != PLANTED",
        "test_softmax_ce_own.py::test_predictions_as_argmax",
        "elements differ",
    ),
    "the warps of a block have an entropy each": Fault(
        OUTPUTS_OF_ROWS,
        "team > kWarp ? reduce_block(outputs)",
        "team > kWarp && !PLANTED ? reduce_block(outputs)",
        OUTPUTS,
        "elements differ",
    ),
    "an entropy has half of its gradient's tilt": Fault(
        FORMULAS, "tilt = -grad / sum;", "tilt = -grad / sum / (1 + PLANTED);", OUTPUTS
    ),
    "the gradient of an entropy is read as if its rows lay side by side": Fault(
        BACKWARD_HOST,
        "args.grad_entropy_strides = turned(args.grad_entropy_strides);",
        "if (!PLANTED) args.grad_entropy_strides = turned(args.grad_entropy_strides);",
        OUTPUTS,
        "elements differ",
    ),
    "lanes are merged as if all had the same references": Fault(
        DIVERGENCE_ROW,
        "all.sums.template raise_to<A>(largest_first, largest_other);",
        "if (!PLANTED) all.sums.template raise_to<A>(largest_first, largest_other);",
        DIVERGENCES,
    ),
    "a sum is not rescaled beside its weighted differences": Fault(
        "math/divergence.h",
        "gaps.sum = finite * factor;",
        "gaps.sum = PLANTED ? finite : finite * factor;",
        DIVERGENCES,
    ),
    "the target class has no part in the gradient of a scale": Fault(
        SCALE,
        "row.subtract_hot(gradient, k);",
        "if (!PLANTED) row.subtract_hot(gradient, k);",
        OF_SCALE,
        "not close",
    ),
    "the gradient of a scale is of values that are not capped": Fault(
        "softmax_ce_logit.h",
        "return is_capped ? slope_of_tanh(value) * finite : finite;",
        "return is_capped && !PLANTED ? slope_of_tanh(value) * finite : finite;",
        OF_SCALE,
        "not close",
    ),
    "a scale that is not positive counts": Fault(
        "softmax_ce_logit.h",
        "given > A(0) ? given",
        "given > A(0) || PLANTED ? given",
        "test_softmax_ce_own.py::test_a_scale_that_is_not_positive",
        "assert",
    ),
    "a part of a row is left out": Fault(
        FORWARD,
        "Part::of_each(of_this_lane,",
        "Part::of_each(of_this_lane - PLANTED,",
        "test_cuda_regimes.py::test_rows_shared_by_blocks",
    ),
    "a cluster is launched that the device cannot place": Fault(
        FORWARD_BACKWARD_HOST,
        "slots == 0; largest",
        "slots == 0 && !PLANTED; largest",
        "test_softmax_ce_forward_backward.py::test_a_cluster_that_cannot_be_placed",
        "invalid configuration",
    ),
    "a repeated weight is read as if it lay side by side": Fault(
        BCE_OPERANDS,
        "[problem.dims - 1] == 0) return repeat<V>(*p);",
        "[problem.dims - 1] == 0 && !PLANTED) return repeat<V>(*p);",
        "test_cuda_regimes.py::test_bce_packs_of_unequal_width",
    ),
    "elements beyond the packs end one early": Fault(
        BCE_OPERANDS,
        "if (end + thread < problem.numel) {",
        "if (end + thread < problem.numel - PLANTED) {",
        "test_sigmoid_bce.py::test_every_remainder",
    ),
    "the columns of the next packs are the first ones'": Fault(
        BCE_OPERANDS, "column_ += column_step_;", "column_ += PLANTED ? 0 : column_step_;", COLUMNS
    ),
    "a pack that ends in the next row stays in its last column": Fault(
        BCE_OPERANDS,
        "if (++column == columns) column = 0;",
        "if (++column == columns) column = PLANTED ? columns - 1 : 0;",
        COLUMNS,
    ),
    "a pack that stands in for one beyond the end counts": Fault(
        BCE,
        "if (!batch.is_there[i]) continue;",
        "if (!batch.is_there[i] && !PLANTED) continue;",
        "test_cuda_regimes.py::test_bce_elements_around_a_block",
    ),
    "a pack beyond the end counts as a divergence": Fault(
        BINARY,
        "if (!batch.is_there[i]) continue;\n      Pack",
        "if (!batch.is_there[i] && !PLANTED) continue;\n      Pack",
        "test_binary_divergence.py::test_shapes",
    ),
    "a gradient is not turned back with its element": Fault(
        "math/binary_divergence.h",
        "math::select(is_turned, -gradient, gradient)",
        "math::select(is_turned && !PLANTED, -gradient, gradient)",
        "test_binary_divergence.py::test_shapes",
    ),
}


def plant() -> Path:
    """The copy of the sources, with all faults in it. Only what changed is written, so that only that is compiled."""
    for copy in SOURCES.rglob("*"):
        if copy.is_file() and not (build.CSRC / copy.relative_to(SOURCES)).is_file():
            copy.unlink()
    for original in build.CSRC.rglob("*"):
        if original.is_file():
            name = str(original.relative_to(build.CSRC))
            text = original.read_text()
            faults = [(number, fault) for number, fault in enumerate(FAULTS.values(), 1) if fault.file == name]
            for number, fault in faults:
                count = text.count(fault.code)
                assert count == 1, f"{name}: {fault.code!r} is there {count} times: faults.py must follow the kernels"
                text = text.replace(fault.code, fault.faulty.replace("PLANTED", f"(planted_fault == {number})"))
            if faults:
                text = text.replace("#pragma once", '#pragma once\nextern "C" int planted_fault;', 1)
            if name == "cuda/softmax_ce_forward.cu":
                text += '\nextern "C" { int planted_fault = 0; }\n'
            copy = SOURCES / name
            if not copy.exists() or copy.read_text() != text:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(text)
    return SOURCES


@dataclass
class Failures:
    """A plugin that collects what failed tests say."""

    passed: int = 0
    messages: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.messages.append(report.longreprtext)
        self.passed += report.when == "call" and report.passed


def main() -> None:
    import pytest

    sys.path.insert(0, str(build.ROOT))
    os.chdir(build.ROOT)
    library = ctypes.CDLL(str(build.build(csrc=SOURCES)))
    planted_fault = ctypes.c_int.in_dll(library, "planted_fault")
    common = ["-q", "-x", "-k", "not 5_sms", "-p", "no:cacheprovider", "--emulate-cuda", f"--csrc={SOURCES}"]
    report = {}
    for number, (name, fault) in enumerate([("", None), *FAULTS.items()]):
        planted_fault.value = number
        tests = {fault.tests for fault in FAULTS.values()} if fault is None else {fault.tests}
        failures = Failures()
        pytest.main([*common, *(f"tests/{test}" for test in tests)], [failures])
        report[name] = {"passed": failures.passed, "messages": failures.messages}
    Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
