"""Whether two checkouts give the same bits: ``python tests/same_bits.py OTHER [--level LEVEL] [--emulate-cuda]``.

For changes that are to leave every result as it was. OTHER is another checkout with its libraries built in place, such
as a git worktree of an older revision. A process for each computes the problems below, this checkout's for both, with
its own torchce: losses and gradients, also in place and by forward_backward, with one thread and with two. Their bytes
are compared here, at each SIMD level of the machine and, if asked, for the CUDA kernels in each one's own emulation.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from math import inf, nan, prod
from pathlib import Path
from typing import Any

import cases
import torch
from cases import DTYPES, REDUCTIONS
from rich.progress import track
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 20  # differences at most, from all over the problems
SIGNS = "only signs of zeros or what NaNs carry"
EMULATED_ELEMENTS, EMULATED_STEP = 30000, 5  # the largest problem for the emulation, which gets every fifth
EMULATED_DEVICES = [(3, 1), (1, 1), (5, 8)]  # multiprocessors and the largest cluster of blocks, in turns
FLOAT32, INDEX, INDICES = torch.float32, ("index", "smoothed"), cases.INDEX_DTYPES
UPSTREAM = [0.0, -0.0, -2.625, 1e-12, 65504.0, 1e30, inf, -inf, nan]
Inputs = tuple[Tensor, Tensor, dict[str, Any]]
Sent = tuple[torch.dtype, torch.Size, tuple[int, ...], bytes]  # a tensor between processes: what it is, and its bytes


def special_rows(logits: Tensor, target: Tensor) -> None:
    """Sixteen rows: NaN and infinity at the beginning, in the middle and at the end, and nothing but infinities."""
    for row, (value, place) in enumerate(product((nan, -nan, inf, -inf), (0, logits.shape[1] // 2, -1))):
        logits[row, place] = value
    logits[12], logits[13], logits[14, 1:], logits[15, :-1] = -inf, inf, -inf, torch.finfo(logits.dtype).min


EDITS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "special rows": special_rows,
    "some masked": lambda logits, target: logits.copy_(cases.with_some_minus_infinity(logits)),
    "half the least": lambda logits, target: logits[:, ::2].fill_(torch.finfo(logits.dtype).min),
    "first far below": lambda logits, target: logits[:, 0].sub_(70),
    "all ignored": lambda logits, target: target.fill_(-100),
    "bad index": lambda logits, target: target.view(-1)[:1].fill_(logits.shape[1]),
}


@dataclass(frozen=True)
class Problem:
    """What a problem consists of, in plain words: they are its name."""

    shape: tuple[int, ...]
    kind: str  # of cases.kernel_problem, or "bce"
    dtype: torch.dtype = FLOAT32
    layout: str | None = None
    reduction: str = "none"
    scale: float = 3.0
    edit: str | None = None
    upstream: float | str = "normal"
    target_dtype: torch.dtype | None = None
    target_layout: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # a weight is a shape, a dtype or the name of infinite ones

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value not in (None, {}))

    def inputs(self) -> Inputs:
        shape, dtype, options = self.shape, self.dtype, {}
        classes = shape[min(1, len(shape) - 1)] if shape else 1
        logits = cases.laid_out(self.layout, lambda s: cases.normal(s, dtype, "cpu", scale=self.scale), shape)
        target = cases.uniform(shape, dtype, "cpu")
        if self.kind != "bce":
            target, options = cases.kernel_problem(self.kind, logits)
        options |= self.options
        for name, what in self.options.items():
            if isinstance(what, tuple):
                options[name] = cases.uniform(what, FLOAT32, "cpu", seed=len(name)) * 3
            elif isinstance(what, torch.dtype):
                options[name] = cases.uniform([classes], what, "cpu", seed=6)
            elif isinstance(what, str):
                from test_infinite_weights import WEIGHTS, logits_of

                options[name] = WEIGHTS[what](classes).to(dtype)
                logits.copy_(logits_of(classes, None, dtype, "cpu"))
        if self.edit is not None:
            EDITS[self.edit](logits, target)
        if self.target_layout is not None:
            high, kept = 1 if target.is_floating_point() else classes, target.dtype
            target = cases.laid_out(
                self.target_layout, lambda s: (cases.uniform(s, FLOAT32, "cpu") * high).to(kept), target.shape
            )
        if self.target_dtype is not None:
            target = (target if self.target_dtype.is_floating_point else target * 2).to(self.target_dtype)
        return logits, target, options

    def grad_output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.upstream == "normal":
            return cases.normal(shape, dtype, "cpu", seed=8)
        if self.upstream == "rows":
            return torch.tensor(UPSTREAM, dtype=dtype).repeat(prod(shape))[: prod(shape)].view(shape)
        return torch.tensor(self.upstream, dtype=dtype).expand(shape)


def problems() -> Iterator[Problem]:
    """Those of the tests, most of them with every type that has kernels of its own."""
    from test_determinism import PROBLEMS
    from test_infinite_weights import WEIGHTS
    from test_sigmoid_bce import BROADCASTS

    types = [*(each.values for each in cases.KERNEL_TYPES), *(("bce", dtype) for dtype in DTYPES)]
    layouts, both = [each.values for each in cases.LAYOUT_SHAPES], (None, "transposed")
    for shape, each, reduction in product((*cases.CLASS_SHAPES, *cases.SOFTMAX_SHAPES), types, REDUCTIONS):
        yield Problem(*shape.values, *each, reduction=reduction)
    for (layout, shape), (kind, dtype) in product(layouts, types):
        yield Problem(shape, kind, dtype, layout)
        yield Problem(shape, kind, dtype, target_layout=layout if shape[2:] or kind not in INDEX else None)
    for (kind, dtype), layout in product(types, ("offset", "transposed")):
        for classes in (*range(1, 70), *cases.classes_around_plan_changes(dtype)):
            yield Problem((3, classes), kind, dtype, layout)
    for problem, reduction in product(PROBLEMS.values(), REDUCTIONS):
        for dtype in dict.fromkeys(
            (problem.dtype, torch.float64)
        ):  # float64 losses show in which order their chunks were added
            yield Problem(problem.shape, problem.kind, dtype, problem.layout, reduction)
    for shape, (kind, dtype), layout in product([(16, 1001), (16, 40), (16, 21, 5)], types, both):
        for edit in list(EDITS)[: 6 if kind in INDEX else 4]:
            yield Problem(shape, kind, dtype, layout, edit=edit)
        for scale in (0.0, 10.0, 1e4):
            yield Problem(shape, kind, dtype, layout, "sum", scale)
        for upstream in (*UPSTREAM, "rows"):
            reduction = "none" if upstream in (-2.625, "rows") else "sum"
            yield Problem(shape, kind, dtype, layout, reduction, upstream=upstream)
    for classes, name, layout, (kind, dtype) in product((2, 17, 1000, 1001), WEIGHTS, both, types):
        dense = "offset" if classes % 2 and kind not in INDEX else None  # no class's probability is 0
        yield Problem((6, classes), kind, dtype, layout, target_layout=dense, options={"weight": name})
    for shape, kind, dtype, weight in product([(9, 21), (2, 21, 5)], cases.KERNEL_KINDS, DTYPES, (*DTYPES, None)):
        for other in INDICES if kind in INDEX else DTYPES:
            yield Problem(shape, kind, dtype, target_dtype=other, options={"weight": weight})
    for smoothing, ignore, weight, reduction in product((0.0, 0.1, 1.0), (-1, 2, 255), (FLOAT32, None), REDUCTIONS):
        options = {"label_smoothing": smoothing, "ignore_index": ignore, "weight": weight}
        yield Problem((2, 7, 5, 3), "index", reduction=reduction, options=options)

    for shape, dtype, reduction in product(cases.ELEMENT_SHAPES, DTYPES, REDUCTIONS):
        yield Problem(*shape.values, "bce", dtype, reduction=reduction)
    for weight, pos_weight, dtype, reduction in product(BROADCASTS, BROADCASTS, DTYPES, ("none", "mean")):
        options = {"weight": weight.values[0], "pos_weight": pos_weight.values[0]}
        yield Problem((3, 5, 4, 2), "bce", dtype, reduction=reduction, options=options)
    options = {"weight": (40,), "pos_weight": (40,)}
    types = product((*DTYPES, torch.bool, torch.uint8, torch.int64), DTYPES)  # 0, 1 and in between
    for (other, dtype), each, layout, reduction in product(types, ({}, options, {"pos_weight": ()}), both, REDUCTIONS):
        yield Problem((33, 40), "bce", dtype, layout, reduction, target_dtype=other, options=each)
        yield Problem((33, 40), "bce", dtype, layout, reduction, edit="special rows", target_dtype=other, options=each)


def results(problem: Problem, inputs: Inputs, ops: Any) -> Iterator[tuple[str, Tensor]]:
    """Losses and gradients by every way that leads to them."""
    from torchce import functional

    logits, target = (each.detach().requires_grad_(each.is_floating_point()) for each in inputs[:2])
    options = inputs[2] | {"reduction": problem.reduction}
    function = functional.binary_cross_entropy_with_logits if problem.kind == "bce" else functional.cross_entropy
    try:
        loss = function(logits, target, **options)
    except IndexError:
        yield "IndexError", torch.empty(0)
        return
    grad_output = problem.grad_output(tuple(loss.shape), loss.dtype)
    yield "loss", loss.detach()
    leaves = [each for each in (logits, target) if each.requires_grad]
    yield from zip(("gradient", "target's gradient"), torch.autograd.grad(loss, leaves, grad_output), strict=False)
    if problem.layout == "permuted_inner":  # no place for a gradient
        return
    target, memory = target.detach(), logits.clone()
    loss = function(memory, target, inplace_backward=True, **options)
    yield "loss in place", loss.detach()
    yield "gradient in place", torch.autograd.grad(loss, memory, grad_output)[0]

    wide = torch.promote_types(logits.dtype, FLOAT32)  # what kernels compute in
    if problem.kind == "bce" or options["reduction"] == "mean" or target.dtype not in (logits.dtype, wide, *INDICES):
        return
    weight, memory = options.get("weight"), logits.detach().clone()
    values = {"logits": memory, "target": target, "weight": None if weight is None else weight.to(wide)}
    values |= {"reduction": REDUCTIONS.index(problem.reduction), "dtype": loss.dtype, "grad_output": grad_output}
    values = {"label_smoothing": 0.0, "ignore_index": -100} | options | values
    op = ops.softmax_ce_forward_backward_.default  # called by names, whose order may differ between checkouts
    names = [argument.name for argument in op._schema.arguments]
    yield "forward_backward's loss", op(**{name: values[name] for name in names if name in values})
    yield "forward_backward's gradient", memory


def compute(checkout: Path, emulate: bool) -> None:
    """Writes the number of problems, then each with its results; whatever else writes to stdout is led to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torchce

    assert Path(torchce.__file__).is_relative_to(checkout), f"{torchce.__file__} is not in {checkout}"
    assert torchce.build_info()["cpu_level"] == os.environ["TORCHCE_CPU_LEVEL"]
    todo = list({str(problem): problem for problem in problems()}.values())  # each once
    ops, emulation = torch.ops.torchce, None
    if emulate:
        sys.path.insert(0, str(checkout / "tests"))
        from cuda_emulation import build, plugin

        emulation = plugin.Emulation(build.build())
        emulation.take_over()
        ops = torch.ops.torchce_emulated
        todo = [problem for problem in todo if prod(problem.shape) <= EMULATED_ELEMENTS][::EMULATED_STEP]
    pickle.dump(len(todo), out)
    for number, problem in enumerate(todo):
        inputs, found = problem.inputs(), {}
        for threads in (1,) if emulate else (1, 2):
            torch.set_num_threads(threads)
            if emulation is not None:
                emulation.start_afresh()
                emulation.set_device(*EMULATED_DEVICES[number % 3])
            for name, result in results(problem, inputs, ops):
                content = result.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[f"{name}, threads={threads}"] = (result.dtype, result.shape, result.stride(), content)
        pickle.dump((str(problem), found), out)
    out.close()


def difference(one: Sent | None, other: Sent | None) -> str | None:
    """What differs, in words."""
    if one == other:
        return None
    if one is None or other is None or one[:-1] != other[:-1]:
        return f"{one and one[:-1]} and {other and other[:-1]}"
    a, b = (torch.frombuffer(bytearray(each[-1]), dtype=one[0]) for each in (one, other))
    wrong = (a != b) & ~(a.isnan() & b.isnan())
    if not wrong.any():
        return SIGNS
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    places = []  # of each number among all of its dtype: neighbours are 1 apart
    for each in (a, b):
        magnitude = each.abs().view(integer).long()
        places.append(torch.where(each.signbit(), -magnitude, magnitude))
    ulps = (places[0] - places[1]).abs()[wrong]
    return f"{len(ulps)} of {len(a)} numbers, by up to {int(ulps.max())} ulp"


def compare(checkouts: list[Path], level: str, emulate: bool) -> bool:
    """Prints what differs; whether anything does."""
    command = [sys.executable, __file__, "--compute", *["--emulate-cuda"] * emulate]
    environment = os.environ | {"TORCHCE_CPU_LEVEL": level, "OMP_WAIT_POLICY": "passive"}
    processes = []
    for checkout in checkouts:
        environment["PYTHONPATH"] = str(checkout)
        processes.append(subprocess.Popen([*command, checkout], cwd=checkout, env=environment, stdout=subprocess.PIPE))
    streams = [process.stdout for process in processes]
    lines, kinds, compared, (count, _) = [], Counter[str](), 0, [pickle.load(stream) for stream in streams]
    for _ in track(range(count), level + ", CUDA" * emulate):
        (problem, one), (_, other) = [pickle.load(stream) for stream in streams]
        compared += len(one)
        for name in one | other:
            if (words := difference(one.get(name), other.get(name))) is not None:
                lines.append(f"{problem}: {name}: {words}")
                kinds[f"{name}: {words}" if words == SIGNS else name] += 1
    assert [process.wait() for process in processes] == [0, 0]
    print(f"{len(lines)} of {compared} results of {count} problems differ")
    print("".join(f"  {often} {kind}\n" for kind, often in kinds.items()), end="")
    print("".join(f"{line}\n" for line in lines[:: len(lines) // SHOWN + 1]), end="")
    return bool(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the other one, with its libraries built in place")
    parser.add_argument("--level", help="one SIMD level, if not all that the machine has")
    parser.add_argument("--emulate-cuda", action="store_true", help="the CUDA kernels as well")
    parser.add_argument("--compute", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    if arguments.compute:
        compute(checkout, arguments.emulate_cuda)
        return
    ask = [sys.executable, "-c", "import torchce; print(*torchce.build_info()['cpu_levels'])"]
    levels = subprocess.check_output(ask, cwd=ROOT, text=True).split()
    if arguments.level not in (None, *levels):
        parser.error(f"--level {arguments.level}: this machine has {', '.join(levels)}")
    runs = [(level, False) for level in levels if arguments.level in (None, level)]
    runs += [(levels[0], True)] * arguments.emulate_cuda
    sys.exit(any([compare([ROOT, checkout], *run) for run in runs]))  # all of them, whatever the first gives


if __name__ == "__main__":
    main()
