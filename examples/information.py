"""The information theory of classification losses, drawn: what they measure and why some differ by a constant only.

Self-information is the cross entropy of one class. Entropy is its mean under the distribution itself, the least that
cross entropy can be; what cross entropy has beyond it is the Kullback-Leibler divergence. So both have one minimum and
one gradient, and a classifier may be trained with either. The Jensen-Shannon divergence is symmetric and at most log 2.
All curves are torchce's functions of logits, in nats and float64, and each is compared with an identity.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.command import option_parser
from examples.picture import COLOURS, GREY, new_figure, tidy
from torchce.functional import (
    binary_entropy_with_logits,
    cross_entropy,
    entropy_with_logits,
    js_div_with_logits,
    kl_div_with_logits,
)

CLASSES = 6
LOG_2 = torch.tensor(2.0, dtype=torch.float64).log().item()


@dataclass(frozen=True)
class Panel:
    """Curves over one axis, and the identities that they fulfil."""

    title: str
    axis: str
    positions: Tensor
    curves: dict[str, Tensor]
    level: tuple[str, float]
    """A horizontal line's name and height."""
    identities: dict[str, Tensor]
    """Of each the difference of its two sides, at every position or at one."""


def main(arguments: Sequence[str] | None = None) -> list[Panel]:
    """Computes all curves, and prints and draws what came of them."""
    options = _options(arguments)
    console = Console(highlight=False)
    panels = [
        self_information(options.device),
        bernoulli(options.device),
        moving(options.device, options.seed),
        apart(options.device),
    ]
    console.print(_table(panels))
    curves = panels[2].curves
    least = ", ".join(f"{name} at {panels[2].positions[curve.argmin()].item():.2f}" for name, curve in curves.items())
    console.print(f"Least with Q's logits scaled by: {least}")
    draw(panels, options.output)
    console.print(f"Curves: {options.output}")
    return panels


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    return option_parser(str(__doc__), output="information.png").parse_args(arguments)


def _probabilities(device: torch.device) -> Tensor:
    """From 0.005 to 0.995, 1/2 among them."""
    return torch.arange(1, 200, dtype=torch.float64, device=device) / 200


def _two_classes(p: Tensor) -> Tensor:
    """Logits ``[n, 2]`` whose softmax is p and 1 - p."""
    return torch.stack((p.logit(), torch.zeros_like(p)), 1)


def self_information(device: torch.device) -> Panel:
    """How surprising a class of probability p is."""
    p = _probabilities(device)
    first = torch.zeros(len(p), dtype=torch.int64, device=device)
    surprise = cross_entropy(_two_classes(p), first, reduction="none")
    return Panel(
        "Self-information of a class",
        "its probability p",
        p,
        {"-log p": surprise},
        ("log 2", LOG_2),
        {"cross_entropy of one class = -log p": surprise + p.log()},
    )


def bernoulli(device: torch.device) -> Panel:
    """What a coin tells on average, most if it is fair."""
    p = _probabilities(device)
    entropy = binary_entropy_with_logits(p.logit(), "none")
    return Panel(
        "Entropy of a Bernoulli variable",
        "probability p",
        p,
        {"H": entropy},
        ("log 2", LOG_2),
        {
            "H = -p log p - (1 - p) log(1 - p)": entropy - (-p.xlogy(p) - (1 - p).xlogy(1 - p)),
            "H at p = 1/2 is log 2": entropy[p == 0.5] - LOG_2,
            "and that of two classes": entropy - entropy_with_logits(_two_classes(p), "none"),
        },
    )


def moving(device: torch.device, seed: int) -> Panel:
    """A fixed P, and the Q of its logits scaled, which is P where the scale is 1."""
    fixed = torch.randn(CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)
    scale = torch.arange(301, dtype=torch.float64, device=device) / 100
    logits = (scale[:, None] * fixed).requires_grad_()
    target = fixed.softmax(0).expand_as(logits)
    own = entropy_with_logits(fixed)
    crossed = cross_entropy(logits, target, reduction="none")
    divergence = kl_div_with_logits(logits, target, "none")
    of_crossed, of_divergence = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (crossed, divergence))
    with torch.no_grad():
        return Panel(
            "Fixed P, moving Q",
            "Q's logits are P's, scaled by",
            scale,
            {"H(P, Q)": crossed.detach(), "KL(P || Q)": divergence.detach()},
            ("H(P)", own.item()),
            {
                "KL(P || Q) = H(P, Q) - H(P)": divergence - (crossed - own),
                "KL(P || P) = 0": divergence[scale == 1],
                "gradients of both by Q's logits are alike": of_divergence - of_crossed,
                "and are Q - P": of_divergence - (logits.softmax(1) - target),
            },
        )


def apart(device: torch.device) -> Panel:
    """P and Q that prefer one of two classes each: KL grows without bound, Jensen-Shannon does not."""
    gap = torch.arange(201, dtype=torch.float64, device=device) / 20
    teacher = torch.stack((gap, torch.zeros_like(gap)), 1)
    student = teacher.flip(1)
    shannon = js_div_with_logits(student, teacher, "none", target_logits=True)
    swapped = js_div_with_logits(teacher, student, "none", target_logits=True)
    divergence = kl_div_with_logits(student, teacher, "none", target_logits=True)
    p, q = (entropy_with_logits(logits, "none") for logits in (teacher, student))
    middle = entropy_with_logits(((teacher.softmax(1) + student.softmax(1)) / 2).log(), "none")
    return Panel(
        "P and Q ever further apart",
        "gap of the logits, P's and Q's in opposite directions",
        gap,
        {"JS(P, Q)": shannon, "KL(P || Q)": divergence},
        ("log 2", LOG_2),
        {
            "JS(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2": shannon - (middle - (p + q) / 2),
            "JS(P, Q) = JS(Q, P)": shannon - swapped,
            "JS(P, Q) beyond log 2": (shannon - LOG_2).clamp(min=0),
            "KL(P || Q) = gap tanh(gap / 2)": divergence - gap * (gap / 2).tanh(),
        },
    )


def _table(panels: list[Panel]) -> Table:
    table = Table(title="Identities, float64")
    table.add_column("")
    table.add_column("largest difference", justify="right")
    for panel in panels:
        for name, difference in panel.identities.items():
            end_section = name == list(panel.identities)[-1]
            table.add_row(name, f"{difference.abs().max().item():.1e}", end_section=end_section)
    return table


def draw(panels: list[Panel], path: str) -> None:
    """Writes the picture."""
    figure = new_figure("Classification losses as information, in nats", width=11, height=7.5)
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _curves(axes, panel)
    figure.savefig(path)


def _curves(axes: Axes, panel: Panel) -> None:
    for (name, curve), colour in zip(panel.curves.items(), (COLOURS["torchce"], COLOURS["torch"]), strict=False):
        lowest = int(curve.argmin())
        marked = [lowest] if 0 < lowest < len(curve) - 1 else []  # a minimum, not an end
        axes.plot(
            panel.positions.cpu(), curve.cpu(), color=colour, label=name, linewidth=2, marker="o", markevery=marked
        )
    name, height = panel.level
    axes.axhline(height, color=GREY, linewidth=1, linestyle="--", label=name)
    axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=10.5)
    axes.set_xlabel(panel.axis)
    axes.legend(frameon=False, fontsize=9)
    tidy(axes)


if __name__ == "__main__":
    main()
