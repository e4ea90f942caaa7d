"""What a language model's head costs for each size of vocabulary: its last linear layer and softmax cross entropy.

Measured are forward and backward of the layer and the loss together, down to the gradients of the layer's input (the
features), weight and bias, for three heads: torch's layer and loss, torch's layer and torchce's loss, and
torchce.functional.linear_cross_entropy, which does both in pieces and never holds all logits. The time is the median
of a few repetitions, in which the heads take turns. The memory is the most that a head holds at any moment beyond
features, weight, bias and target; the gradients that it returns are part of it. Features, weight and targets are drawn
at random, such that each logit has mean 0 and variance 1.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.command import device_name, option_parser, positive, progress_bar
from examples.heads import HEADS
from examples.picture import COLOURS, new_figure, readable_bytes, readable_milliseconds, tidy
from examples.training import clock, loss_and_gradients, peak_bytes

VOCABULARIES = [1024 * thousands for thousands in (8, 16, 32, 64, 128, 256)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward."""

    milliseconds: float
    bytes: int


Costs = dict[int, dict[str, Cost]]
"""By size of vocabulary and by the name of the head."""


def main(arguments: Sequence[str] | None = None) -> Costs:
    """Measures as the command line says, and prints and draws what came of it."""
    options = _options(arguments)
    console = Console(highlight=False)
    costs = {}
    with progress_bar(console) as progress:
        runs = len(options.vocabularies) * len(HEADS) * (1 + options.repetitions)
        bar = progress.add_task("measuring", total=runs)
        for vocabulary in options.vocabularies:
            progress.update(bar, description=f"vocabulary of {vocabulary:,}")
            costs[vocabulary] = measure(vocabulary, options, advance=lambda: progress.advance(bar))
    problem = f"{options.rows:,} rows of {options.features} features, {options.dtype}, {device_name(options.device)}"
    console.print(_table(costs, problem))
    draw(costs, problem, options.output)
    console.print(f"Plots: {options.output}")
    return costs


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = option_parser(str(__doc__), output="vocabulary.png")
    parser.add_argument("--vocabularies", type=positive, nargs="+", default=VOCABULARIES, metavar="CLASSES")
    parser.add_argument("--rows", type=positive, default=1024, help="tokens of a batch (default: %(default)s)")
    parser.add_argument("--features", type=positive, default=64, help="of each token (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--repetitions", type=positive, default=3, help="of each timing (default: %(default)s)")
    return parser.parse_args(arguments)


def layer_and_target(vocabulary: int, options: argparse.Namespace) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Features ``[rows, H]``, weight ``[vocabulary, H]`` and bias ``[vocabulary]``; and the target ``[rows]``."""
    generator = torch.Generator(options.device).manual_seed(options.seed)
    as_head = {"dtype": DTYPES[options.dtype], "device": options.device}
    features = torch.randn(options.rows, options.features, generator=generator, **as_head)
    weight = torch.randn(vocabulary, options.features, generator=generator, **as_head) * options.features**-0.5
    bias = torch.zeros(vocabulary, **as_head)
    target = torch.randint(vocabulary, (options.rows,), generator=generator, device=options.device)
    return (features, weight, bias), target


def measure(vocabulary: int, options: argparse.Namespace, advance: Callable[[], None]) -> dict[str, Cost]:
    """What each head costs; calls ``advance`` after each of its runs."""
    layer, target = layer_and_target(vocabulary, options)
    runs = {name: partial(loss_and_gradients, head, layer, target) for name, head in HEADS.items()}
    memory = {}
    for name, run in runs.items():  # first, since what is slow only once then is in no timing
        memory[name] = peak_bytes(run, options.device)
        advance()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(options.repetitions):
        for name in order:
            seconds[name].append(_seconds(runs[name], options.device))
            advance()
        order.append(order.pop(0))
    return {name: Cost(1e3 * statistics.median(seconds[name]), memory[name]) for name in runs}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    started = clock(device)
    held = run()  # released after the clock is read
    ended = clock(device)
    del held
    return ended - started


def _table(costs: Costs, problem: str) -> Table:
    table = Table(title=f"Linear layer and cross entropy, forward + backward\n{problem}")
    table.add_column("vocabulary", justify="right", no_wrap=True)
    for quantity in ("time", "memory"):
        for name in HEADS:
            table.add_column(f"{quantity}\n{name}".replace(" ", "\n"), justify="right")
    for vocabulary, of_heads in costs.items():
        times = (readable_milliseconds(of_heads[name].milliseconds) for name in HEADS)
        memory = (readable_bytes(of_heads[name].bytes) for name in HEADS)
        table.add_row(f"{vocabulary:,}", *times, *memory)
    return table


def draw(costs: Costs, problem: str, path: str) -> None:
    """Writes the picture: memory and time against the size of the vocabulary, all on logarithmic axes."""
    figure = new_figure("Linear layer + cross entropy, forward + backward", width=11, height=5)
    memory, times = figure.subplots(1, 2)
    _lines(memory, costs, lambda cost: cost.bytes, readable_bytes)
    memory.set_title("Peak memory beyond features, weight, bias and target", fontsize=10.5)
    memory.yaxis.set_major_locator(LogLocator(base=2))
    _lines(times, costs, lambda cost: cost.milliseconds, readable_milliseconds)
    times.set_title("Time", fontsize=10.5)
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    figure.supxlabel(problem, fontsize=9)
    figure.savefig(path)


def _lines(axes: Axes, costs: Costs, value: Callable[[Cost], float], readable: Callable[[float], str]) -> None:
    for name in HEADS:
        values = [value(of_heads[name]) for of_heads in costs.values()]
        axes.plot(list(costs), values, color=COLOURS[name], label=name, marker="o", linewidth=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(list(costs), [_thousands(vocabulary) for vocabulary in costs])
    axes.yaxis.set_major_formatter(lambda number, _: readable(number))
    axes.set_xlabel("vocabulary")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    tidy(axes)


def _thousands(vocabulary: int) -> str:
    return f"{vocabulary // 1024}k" if vocabulary % 1024 == 0 else f"{vocabulary:,}"


if __name__ == "__main__":
    main()
