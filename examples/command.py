"""The command line that the examples share: options, progress, the table of results and the picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from examples.picture import draw, readable_bytes, readable_milliseconds
from examples.training import Result, Task, default_device, train

MEASURED = """\
Held out: the score on data that was not trained on.
Largest difference: of any loss curve from that of torch's loss, over all steps.
Loss time: forward and backward of the loss alone, down to the gradient of the logits; of tokens, forward and backward
of the last layer and the loss, down to the gradients of the layer's input, weight and bias. The median over the steps.
Share: the part of a step's time that this takes.
Loss memory: the most that the same work holds at any moment, its gradients included, beyond what it is given: logits
and target; of tokens the layer's input, weight and bias, and the target."""


def main(*tasks: Callable[[], Task], description: str, arguments: Sequence[str] | None = None) -> list[Result]:
    """Trains every task as the command line says, and prints and draws what came of it."""
    options = _options(description, arguments)
    console = Console(highlight=False)
    results = []
    for build in tasks:
        with console.status("preparing data"):
            task = build()
        console.print(f"[bold]{task.name}[/bold]: {task.summary}")
        results.append(_watch(task, options, console))
    console.print(_table(results), MEASURED, sep="\n", soft_wrap=True)
    draw(results, options.output)
    console.print(f"Curves and bars: {options.output}")
    return results


def _options(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = option_parser(description, output="demo.png")
    parser.add_argument("--steps", type=positive, help="train for so many steps (default: each example's own number)")
    return parser.parse_args(arguments)


def option_parser(description: str, output: str) -> argparse.ArgumentParser:
    """With the options that every example has; ``output`` is where its picture goes by default."""
    parser = argparse.ArgumentParser(
        description=description.replace("``", ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=output, help="where to write the picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random (default: %(default)s)")
    parser.add_argument("--device", type=_device, default=default_device(), help="(default here: %(default)s)")
    return parser


def positive(text: str) -> int:
    """An option's value: an int of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type != "cpu" and device.type != default_device().type:
        raise argparse.ArgumentTypeError(f"torchce has no kernels for {device} here (see python -m torchce)")
    return device


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _watch(task: Task, options: argparse.Namespace, console: Console) -> Result:
    steps = options.steps or task.steps
    with progress_bar(console) as progress:
        bar = progress.add_task("training", total=steps)
        for result in train(task, options.device, steps, options.seed):
            losses = ", ".join(f"{name} {run.curve[-1]:.4f}" for name, run in result.runs.items())
            progress.update(bar, advance=1, description=f"loss: {losses}")
    scores = ", ".join(f"{name} {run.score:.1%}" for name, run in result.runs.items())
    console.print(f"  {task.score_name}, held out: {scores} (without looking: {result.constant_score:.1%})\n")
    return result


def _table(results: list[Result]) -> Table:
    table = Table(title=f"Trained from one seed on {device_name(results[0].device)}")
    table.add_column("")
    table.add_column("loss of")
    for heading in ("held out", "largest\ndifference", "loss time\na step", "share", "loss\nmemory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        names = list(result.runs)
        for name, run in result.runs.items():
            table.add_row(
                result.task.name if name == names[0] else "",
                name,
                f"{run.score:.1%}",
                f"{max(result.differences):.1e}" if name == names[-1] else "",
                readable_milliseconds(run.loss_milliseconds),
                f"{run.loss_share:.0%}",
                readable_bytes(run.loss_bytes),
                end_section=name == names[-1],
            )
    return table


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, torch.get_num_threads() = {torch.get_num_threads()}"
