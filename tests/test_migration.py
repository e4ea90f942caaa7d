"""docs/migration.md row by row: the peer's formula in torch's operations against the call of torchce on the page.

A formula's name is its row's last column. The call is not written here again: it is read from the page and evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from torchce.functional import cross_entropy, linear_cross_entropy, token_logprobs

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"
ROW = re.compile(r"^\|.*\| `(?P<call>[^`]+)` \|[^|]*\| `(?P<name>\w+)` \|$", re.MULTILINE)
ROWS = {row["name"]: row["call"] for row in ROW.finditer(PAGE.read_text())}

LEAVES = {"x": (6, 7), "h": (2, 4, 7), "e": (6, 3), "c": (7, 3), "b": (7,)}
Y = {"some": [2, -100, 0, 6, -100, 3], "all": [-100] * 6, "none": [2, 5, 0, 6, 1, 3]}
T = {
    "some": [[1, 2, -100, 4], [0, -100, 5, 3]],
    "all": [[-100] * 4] * 2,
    "none": [[1, 2, 6, 4], [0, 1, 5, 3]],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.int64: 0}

Formula = Callable[[SimpleNamespace], Any]
FORMULAS: dict[str, tuple[Formula, str, torch.dtype]] = {}


def formula(ignored: str = "some", dtype: torch.dtype = torch.float64) -> Callable[[Formula], Formula]:
    """The row of the function's name, with `ignored` rows and logits of `dtype`."""

    def add(function: Formula) -> Formula:
        FORMULAS[function.__name__] = function, ignored, dtype
        return function

    return add


def leaves_of(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in LEAVES.items()}
    return {name: (2 * leaf).to(dtype).requires_grad_() for name, leaf in normal.items()}


def names_of(leaves: dict[str, Tensor], ignored: str) -> dict[str, Any]:
    """The page's names; activations in place of leaves, which no gradient could overwrite."""
    y = torch.tensor(Y[ignored])
    names: dict[str, Any] = {name: leaf.clone() for name, leaf in leaves.items()}
    names |= {"y": y, "kept": y != -100, "t": torch.tensor(T[ignored])}
    names |= {"w": torch.tensor([0.5, 2, 1, 1.5, 3, 0.25, 0.75]).double(), "s": 0.15, "z": 0.03, "n": 11, "C": 7}
    names |= {"a": 0.625, "cap": 3.5, "tau": 0.8}
    names |= {"mask": torch.tensor([1.0, 0, 1, 1, 0, 1]), "v": torch.tensor([0.5, 0, 2, 1.25, 0, 0.5])}
    return names


def run(answer: Callable[[dict[str, Any]], Any], leaves: dict[str, Tensor], ignored: str) -> tuple[list[Tensor], Any]:
    """The results, and the gradients of those that have some, for upstream gradients that differ from row to row."""
    answers = answer(names_of(leaves, ignored))
    results: list[Tensor] = list(answers) if isinstance(answers, tuple) else [answers]
    live = [result for result in results if result.requires_grad]
    upstream = [torch.linspace(-2.625, 1.5, r.numel(), dtype=torch.float64).to(r.dtype).view(r.shape) for r in live]
    wrt = list(leaves.values())
    return results, torch.autograd.grad(live, wrt, upstream, allow_unused=True, materialize_grads=True) if live else ()


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        tolerance = TOLERANCE[our.dtype]
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", FORMULAS)
def test_row(name: str) -> None:
    function, ignored, dtype = FORMULAS[name]
    call = compile(ROWS[name], f"docs/migration.md, {name}", "eval")
    functions = (cross_entropy, linear_cross_entropy, token_logprobs, pad)
    tools = {"torch": torch} | {function.__name__: function for function in functions}
    leaves = leaves_of(dtype)
    ours, our_gradients = run(lambda names: eval(call, {**tools, **names}), leaves, ignored)
    theirs, their_gradients = run(lambda names: function(SimpleNamespace(**names)), leaves, ignored)
    assert [result.requires_grad for result in ours] == [result.requires_grad for result in theirs]
    assert_same(ours, theirs)
    assert_same(our_gradients, their_gradients)


def test_page_and_formulas_have_the_same_rows() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    assert len(rows) == len(ROWS)  # none that the pattern does not find, no name twice
    assert set(ROWS) == set(FORMULAS)


def at_target(x: Tensor, y: Tensor) -> Tensor:
    return x.gather(1, y.clamp(min=0)[:, None])[:, 0]


def nll(x: Tensor, y: Tensor) -> Tensor:
    """lse - x_y; 0 of ignored rows."""
    return (x.logsumexp(1) - at_target(x, y)).where(y != -100, 0)


def count(y: Tensor) -> Tensor:
    return (y != -100).sum()


def linear(p: SimpleNamespace) -> Tensor:
    """The logits of embeddings and classifier."""
    return p.e @ p.c.T + p.b


def capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def with_logits(p: SimpleNamespace, **logits: Tensor) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(p), **logits})


# Liger


def liger_rows(p: SimpleNamespace, weighted: bool) -> Tensor:
    """(1 - s) w_y (lse - x_y) + s/C (lse sum w - sum w x)."""
    w = p.w if weighted else torch.ones_like(p.w)
    smooth = p.s / p.C * (p.x.logsumexp(1) * w.sum() - (p.x * w).sum(1))
    return ((1 - p.s) * w[p.y.clamp(min=0)] * nll(p.x, p.y) + smooth).where(p.kept, 0)


def z_rows(p: SimpleNamespace) -> Tensor:
    return (p.z * p.x.logsumexp(1) ** 2).where(p.kept, 0)


@formula()
def liger_mean(p: SimpleNamespace) -> Tensor:
    return liger_rows(p, True).sum() / p.w[p.y[p.kept]].sum()


@formula()
def liger_z_mean(p: SimpleNamespace) -> Tensor:
    return (liger_rows(p, False) / count(p.y) + z_rows(p) / count(p.y)).sum()


@formula()
def liger_z_sum(p: SimpleNamespace) -> Tensor:
    return (liger_rows(p, True) + z_rows(p)).sum()


@formula()
def liger_z_none(p: SimpleNamespace) -> Tensor:
    return liger_rows(p, True) + z_rows(p)


@formula()
def liger_z_mean_weight(p: SimpleNamespace) -> Tensor:
    return (liger_rows(p, True) / p.w[p.y[p.kept]].sum() + z_rows(p) / count(p.y)).sum()


@formula()
def liger_softcap(p: SimpleNamespace) -> Tensor:
    return liger_z_mean(with_logits(p, x=capped(p.x, p.cap)))


@formula()
def liger_return_z_loss(p: SimpleNamespace) -> Tensor:
    return (z_rows(p) / count(p.y)).sum().detach()


@formula()
def liger_predicted_tokens(p: SimpleNamespace) -> Tensor:
    return torch.tensor([row.argmax() if kept else -1 for row, kept in zip(p.x, p.kept, strict=True)])


@formula()
def liger_token_accuracy(p: SimpleNamespace) -> Tensor:
    return liger_token_accuracy_none(p).sum() / count(p.y)


@formula()
def liger_token_accuracy_none(p: SimpleNamespace) -> Tensor:
    return (p.kept & (p.x.argmax(1) == p.y)).float()


@formula(ignored="all")
def liger_empty(p: SimpleNamespace) -> Tensor:
    return (0 * p.x).sum()


@formula()
def liger_token_scaling(p: SimpleNamespace) -> Tensor:
    probability = at_target(p.x.softmax(1), p.y).detach()
    return ((liger_rows(p, False) / count(p.y) + z_rows(p) / count(p.y)) * probability).sum()


@formula()
def liger_linear(p: SimpleNamespace) -> Tensor:
    return liger_mean(with_logits(p, x=capped(linear(p), p.cap)))


@formula()
def liger_linear_z(p: SimpleNamespace) -> tuple[Tensor, Tensor]:
    of = with_logits(p, x=linear(p))
    z_loss = (z_rows(of) / count(of.y)).sum()
    return nll(of.x, of.y).sum() / count(of.y) + z_loss, z_loss.detach()


@formula()
def liger_linear_accum(p: SimpleNamespace) -> Tensor:
    return nll(p.e @ p.c.T, p.y).sum() / count(p.y)


@formula(dtype=torch.bfloat16)
def liger_dtype(p: SimpleNamespace) -> Tensor:
    return (nll(p.x.float(), p.y) / count(p.y)).to(p.x.dtype).sum()


@formula()
def liger_inplace(p: SimpleNamespace) -> Tensor:
    return nll(p.x, p.y).sum() / count(p.y)


# flash-attention


def flash_rows(p: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """lse - s mean x - (1 - s) x_y + z lse^2, and the last term."""
    lse = p.x.logsumexp(1)
    z_losses = p.z * lse * lse
    losses = lse - p.s * p.x.sum(1) / p.C - (1 - p.s) * at_target(p.x, p.y) + z_losses
    return losses.where(p.kept, 0), z_losses.where(p.kept, 0).detach()


@formula()
def flash_mean(p: SimpleNamespace) -> Tensor:
    return flash_rows(p)[0].sum() / count(p.y)


@formula()
def flash_sum(p: SimpleNamespace) -> Tensor:
    return flash_rows(p)[0].sum()


@formula()
def flash_logit_scale(p: SimpleNamespace) -> Tensor:
    return flash_mean(with_logits(p, x=p.x * p.a))


@formula()
def flash_losses(p: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return flash_rows(p)


@formula()
def flash_return_z_loss(p: SimpleNamespace) -> tuple[Tensor, Tensor]:
    losses, z_losses = flash_rows(p)
    return losses.sum() / count(p.y), z_losses.sum() / count(p.y)


@formula(ignored="all")
def flash_empty(p: SimpleNamespace) -> Tensor:
    return (0 * p.x).sum() + torch.nan  # 0 / 0; backward reads no upstream gradient of ignored rows


@formula(dtype=torch.bfloat16)
def flash_dtype(p: SimpleNamespace) -> Tensor:
    return nll(p.x.float(), p.y).sum() / count(p.y)


@formula()
def flash_inplace(p: SimpleNamespace) -> Tensor:
    return nll(p.x, p.y).sum() / count(p.y)


# QuACK


@formula()
def quack_mean(p: SimpleNamespace) -> Tensor:
    return quack_none(p).sum() / (p.w[p.y.clamp(min=0)] * p.kept).sum()


@formula()
def quack_sum(p: SimpleNamespace) -> Tensor:
    return quack_none(p).sum()


@formula()
def quack_none(p: SimpleNamespace) -> Tensor:
    return p.w[p.y.clamp(min=0)] * nll(p.x, p.y)


@formula()
def quack_linear(p: SimpleNamespace) -> Tensor:
    return liger_linear_accum(p)


@formula()
def quack_lse(p: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return quack_none(p).detach(), p.x.logsumexp(1).detach()


@formula(dtype=torch.bfloat16)
def quack_dtype(p: SimpleNamespace) -> Tensor:
    return nll(p.x.float(), p.y).sum() / count(p.y).float()


@formula()
def quack_inplace(p: SimpleNamespace) -> Tensor:
    return nll(p.x, p.y).sum() / count(p.y)


# Apple CCE


@formula()
def cce_mean(p: SimpleNamespace) -> Tensor:
    return nll(linear(p)[p.kept], p.y[p.kept]).mean()


@formula()
def cce_sum(p: SimpleNamespace) -> Tensor:
    return nll(linear(p)[p.kept], p.y[p.kept]).sum()


@formula()
def cce_none(p: SimpleNamespace) -> Tensor:
    return nll(linear(p), p.y)


@formula()
def cce_softcap(p: SimpleNamespace) -> Tensor:
    return nll(capped(linear(p)[p.kept], p.cap), p.y[p.kept]).mean()


@formula()
def cce_lse(p: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return cce_mean(p), linear(p).logsumexp(1).where(p.kept, 0)


@formula()
def cce_z(p: SimpleNamespace) -> Tensor:
    loss, lse = cce_lse(p)
    return loss + p.z * (lse**2).sum() / count(p.y)


@formula()
def cce_z_all(p: SimpleNamespace) -> Tensor:
    loss, lse = cce_lse(p)
    return loss + p.z * (lse**2).mean()


@formula()
def cce_shift(p: SimpleNamespace) -> Tensor:
    rows = [(x, y) for x, y in zip(linear(p)[:-1], p.y[1:], strict=True) if y != -100]
    return sum(x.logsumexp(0) - x[y] for x, y in rows) / len(rows)


# unsloth


def of_sequences(h: Tensor, t: Tensor) -> Tensor:
    return nll(h.reshape(-1, h.shape[-1]), t.reshape(-1)).sum()


@formula()
def unsloth_mean(p: SimpleNamespace) -> Tensor:
    return of_sequences(p.h, p.t) / torch.count_nonzero(p.t != -100)


@formula()
def unsloth_n_items(p: SimpleNamespace) -> Tensor:
    return of_sequences(p.h, p.t) / p.n


@formula()
def unsloth_logits(p: SimpleNamespace) -> Tensor:
    return unsloth_mean(with_logits(p, h=capped(p.a * p.h, p.cap)))


@formula(ignored="all")
def unsloth_empty(p: SimpleNamespace) -> Tensor:
    return nll(p.x, p.y).sum() / count(p.y).clamp(min=1)


@formula(dtype=torch.bfloat16)
def unsloth_dtype(p: SimpleNamespace) -> Tensor:
    return nll(p.x.float(), p.y).sum() / count(p.y)


@formula()
def unsloth_inplace(p: SimpleNamespace) -> Tensor:
    return nll(p.x, p.y).sum() / count(p.y)


# Hugging Face


@formula()
def hf_causal(p: SimpleNamespace) -> Tensor:
    return of_sequences(p.h[:, :-1], p.t[:, 1:]) / count(p.t[:, 1:])


@formula()
def hf_masked(p: SimpleNamespace) -> Tensor:
    return of_sequences(p.h, p.t) / count(p.t)


@formula()
def hf_num_items(p: SimpleNamespace) -> Tensor:
    return nll(p.x, p.y).sum() / p.n


@formula(ignored="all")
def hf_empty(p: SimpleNamespace) -> Tensor:
    return nll(p.x, p.y).sum() / p.n


@formula(dtype=torch.bfloat16)
def hf_dtype(p: SimpleNamespace) -> Tensor:
    return nll(p.x.float(), p.y).sum() / count(p.y)


@formula(dtype=torch.bfloat16)
def hf_capped(p: SimpleNamespace) -> Tensor:
    return hf_dtype(p)


@formula(dtype=torch.float32)
def hf_softcap(p: SimpleNamespace) -> Tensor:
    return hf_dtype(with_logits(p, x=capped(p.x, p.cap)))


@formula()
def hf_smoother(p: SimpleNamespace) -> Tensor:
    smoothed = -p.x.log_softmax(1).sum(1).where(p.kept, 0).sum() / (count(p.y) * p.C)
    return (1 - p.s) * nll(p.x, p.y).sum() / count(p.y) + p.s * smoothed


# torchtune and torchtitan


@formula()
def torchtune_mean(p: SimpleNamespace) -> Tensor:
    chunks = zip(p.h.tensor_split(3, 1), p.t.tensor_split(3, 1), strict=True)
    return sum(of_sequences(h, t) for h, t in chunks) / count(p.t)


@formula(ignored="all")
def torchtune_linear(p: SimpleNamespace) -> Tensor:
    return nll(p.e @ p.c.T, p.y).sum()


@formula(ignored="all")
def torchtune_empty(p: SimpleNamespace) -> Tensor:
    return nll(p.x, p.y).sum()


@formula(dtype=torch.bfloat16)
def torchtitan_sum(p: SimpleNamespace) -> Tensor:
    return nll(p.x.float(), p.y).sum()


@formula()
def torchtitan_mean(p: SimpleNamespace) -> Tensor:
    return nll(p.x, p.y).sum() / p.n


@formula()
def torchtitan_logprobs(p: SimpleNamespace) -> Tensor:
    return at_target(p.x.log_softmax(1), p.y).where(p.kept, 0)


# Megatron-LM


@formula(ignored="none")
def megatron_none(p: SimpleNamespace) -> Tensor:
    return (p.x - p.x.amax(1, True)).exp().sum(1).log() - at_target(p.x - p.x.amax(1, True), p.y)


@formula(ignored="none")
def megatron_smoothing(p: SimpleNamespace) -> Tensor:
    """s / (C - 1) for each class but the label's, which keeps 1 - s."""
    target = torch.full_like(p.x, p.s / (p.C - 1)).scatter(1, p.y[:, None], 1 - p.s)
    return -(target * p.x.log_softmax(1)).sum(1)


@formula(ignored="none")
def megatron_sum(p: SimpleNamespace) -> Tensor:
    return (megatron_none(p) * p.mask).sum()


@formula(ignored="none")
def megatron_mean(p: SimpleNamespace) -> Tensor:
    return megatron_sum(p) / p.mask.sum().int().clamp(min=1)


@formula(ignored="none")
def megatron_empty(p: SimpleNamespace) -> Tensor:
    return (megatron_none(p) * 0 * p.mask).sum() / 1


@formula(ignored="none")
def megatron_fractions(p: SimpleNamespace) -> Tensor:
    return (megatron_none(p) * p.v).sum() / p.v.sum().int().clamp(min=1)


# TRL, verl, OpenRLHF


def logprobs(h: Tensor, t: Tensor) -> Tensor:
    """log_softmax of the last dimension, at the labels."""
    return h.log_softmax(-1).gather(-1, t[..., None])[..., 0]


@formula(ignored="none")
def trl_logprobs(p: SimpleNamespace) -> Tensor:
    return p.h.gather(-1, p.t[..., None])[..., 0] - p.h.logsumexp(-1)


@formula(ignored="none")
def trl_temperature(p: SimpleNamespace) -> Tensor:
    return trl_logprobs(with_logits(p, h=p.h / p.tau))


@formula(ignored="none")
def trl_entropy(p: SimpleNamespace) -> Tensor:
    log_p = p.h.log_softmax(-1)
    return (-log_p.exp() * log_p).sum(-1)


@formula(ignored="none")
def trl_row_mask(p: SimpleNamespace) -> Tensor:
    return logprobs(p.x, p.y).masked_fill(p.mask == 0, 0)


@formula(ignored="none", dtype=torch.bfloat16)
def trl_dtype(p: SimpleNamespace) -> Tensor:
    return logprobs(p.h, p.t)


@formula()
def verl_logprobs(p: SimpleNamespace) -> Tensor:
    """Minus flash-attention's losses."""
    return -nll(p.h.reshape(-1, p.C), p.t.reshape(-1)).view(p.t.shape)


@formula(ignored="none")
def verl_entropy(p: SimpleNamespace) -> Tensor:
    return p.h.logsumexp(-1) - torch.einsum("btc,btc->bt", p.h.softmax(-1), p.h)


@formula()
def verl_inplace(p: SimpleNamespace) -> Tensor:
    return verl_logprobs(p)


@formula(ignored="none")
def openrlhf_logprobs(p: SimpleNamespace) -> Tensor:
    return logprobs(p.h.div_(p.tau), p.t)
