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
Held out: the score on data that was not trained on. Largest difference: between the two loss curves, over all steps.
Loss time: forward and backward of the loss alone, down to the gradient of the logits; the median over the steps.
Share: the part of a step's time that this takes.
Loss memory: the most that the same work holds at any moment, beyond the logits and target it is given."""


def main(*tasks: Callable[[], Task], description: str, arguments: Sequence[str] | None = None) -> list[Result]:
    """Trains every task as the command line says, and prints and draws what came of it."""
    options = _options(description, arguments)
    console = Console(highlight=False)
    results = []
    for build in tasks:
        with console.status("reading data"):
            task = build()
        console.print(f"[bold]{task.name}[/bold]: {task.summary}")
        results.append(_watch(task, options, console))
    console.print(_table(results), MEASURED, sep="\n", soft_wrap=True)
    draw(results, options.output)
    console.print(f"Curves and bars: {options.output}")
    return results


def _options(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description.replace("``", ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="demo.png", help="where to write the picture (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="train for so many steps (default: each example's own number)")
    parser.add_argument("--seed", type=int, default=0, help="of the model and the batches (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=default_device(), help="(default here: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    if options.device.type != "cpu" and options.device.type != default_device().type:
        parser.error(f"--device: torchce has no kernels for {options.device} here (see python -m torchce)")
    return options


def _watch(task: Task, options: argparse.Namespace, console: Console) -> Result:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    steps = options.steps or task.steps
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=steps)
        for result in train(task, options.device, steps, options.seed):
            losses = ", ".join(f"{name} {run.curve[-1]:.4f}" for name, run in result.runs.items())
            progress.update(bar, advance=1, description=f"loss: {losses}")
    scores = ", ".join(f"{name} {run.score:.1%}" for name, run in result.runs.items())
    console.print(f"  {task.score_name}, held out: {scores} (without looking: {result.constant_score:.1%})\n")
    return result


def _table(results: list[Result]) -> Table:
    table = Table(title=f"Trained from one seed on {_device_name(results[0].device)}")
    table.add_column("")
    table.add_column("loss of")
    for heading in ("held out", "largest\ndifference", "loss time\na step", "share", "loss\nmemory"):
        table.add_column(heading, justify="right")
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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, torch.get_num_threads() = {torch.get_num_threads()}"
