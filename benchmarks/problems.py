"""The grid: every size with the reason it is there, and how its data is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

CROSS_ENTROPY = "cross_entropy"
BCE = "binary_cross_entropy_with_logits"
LINEAR_CROSS_ENTROPY = "linear_cross_entropy"
KL_DIV = "kl_div_with_logits"
JS_DIV = "js_div_with_logits"
ENTROPY_OF_LOGITS = "entropy_with_logits"
"""Ops go by their names in :mod:`torch.nn.functional`, those that torch lacks by ours."""

DIVERGENCES = (KL_DIV, JS_DIV, ENTROPY_OF_LOGITS)
LABELS = {
    CROSS_ENTROPY: "CE",
    BCE: "BCE",
    LINEAR_CROSS_ENTROPY: "linear CE",
    KL_DIV: "KL",
    JS_DIV: "JS",
    ENTROPY_OF_LOGITS: "entropy",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TRAINED = ("float32", "bfloat16")  # what models are trained in: measured everywhere, and what tables and plots show
WIDENED = ("float32",)  # what is read as it is beside float64; of 16 bits there is a copy

CAPPED = "z-loss softcap"
ENTROPY = "entropy"  # a bonus for that of each row
SOFT64 = "soft float64"  # probabilities wider than the logits
PROBABILITIES = "probabilities"  # of a divergence's teacher, which else has logits
CHANNELS_LAST = "channels_last"  # logits, beside a contiguous target

IGNORE_INDEX = -100
IGNORED_SHARE = 0.5
Z_LOSS, SOFTCAP = 1e-4, 30.0  # PaLM's and Gemma's
ENTROPY_BONUS = 0.01
LABEL_SMOOTHING = 0.1
LOGIT_SCALE = 4.0  # a trained classifier's logits spread about that far; zeros or 0.1 would flatter a skipped rescale


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of a loss; the first ``differentiable`` of them want gradients."""

    arguments: tuple[Tensor, ...]
    keywords: dict[str, Any]
    differentiable: int = 1

    def with_first(self, *first: Tensor) -> Inputs:
        """The same call on other differentiable arguments."""
        return Inputs((*first, *self.arguments[self.differentiable :]), self.keywords, self.differentiable)


@dataclass(frozen=True)
class Problem:
    op: str
    shape: tuple[int, ...]  # of the logits
    reason: str
    # soft, SOFT64, smoothing, weight, ignored, CAPPED, ENTROPY; pos_weight, CHANNELS_LAST; PROBABILITIES
    variant: str = ""
    quick: bool = False  # part of --quick
    key: bool = False  # part of --key, and of README's table: what a reader decides by
    launch_bound: bool = False  # so small that launching it is what takes the time
    hidden: int = 0  # width before the linear layer of linear_cross_entropy
    dtypes: tuple[str, ...] = TRAINED

    @property
    def size(self) -> str:
        """Such as ``512x32000``; with a linear layer rows x hidden x classes."""
        rows, *rest = self.shape
        return "x".join(map(str, (rows, *([self.hidden] if self.hidden else []), *rest)))

    @property
    def name(self) -> str:
        return f"{LABELS[self.op]} {self.size} {self.variant}".rstrip()

    @property
    def classes(self) -> int:
        return self.shape[1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.classes

    def matches(self, ops: list[str], sizes: list[str]) -> bool:
        """Whether the filters let it through: op names or labels, and patterns such as ``512x*`` or ``*soft``."""
        op_names = {self.op, LABELS[self.op].lower()}
        size_names = (self.size, f"{self.size} {self.variant}")
        return (not ops or not op_names.isdisjoint(map(str.lower, ops))) and (
            not sizes or any(fnmatch(name, pattern) for name in size_names for pattern in sizes)
        )

    def inputs(self, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        """Fresh data, drawn on the device: copying gigabytes to it would take longer than the benchmark."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)

        def indices() -> Tensor:
            shape = (self.shape[0], *self.shape[2:])
            return torch.randint(self.classes, shape, generator=generator, device=device)

        def uniform(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.rand(shape, generator=generator, device=device, dtype=dtype)

        if self.op == LINEAR_CROSS_ENTROPY:
            hidden = normal(self.rows, self.hidden, scale=1.0)
            linear_weight = normal(self.classes, self.hidden, scale=LOGIT_SCALE / math.sqrt(self.hidden))
            return Inputs((hidden, linear_weight, indices()), {}, differentiable=2)

        logits = normal(*self.shape, scale=LOGIT_SCALE)
        if self.op == BCE:
            keywords = {}
            if self.variant == CHANNELS_LAST:
                logits = logits.contiguous(memory_format=torch.channels_last)
            if self.variant == "pos_weight":  # [C, 1, 1] in the logits' dtype, as torch's promotion wants it
                keywords["pos_weight"] = uniform(self.classes, *[1] * (len(self.shape) - 2), dtype=dtype).add_(0.5)
            targets = uniform(*self.shape, dtype=dtype).round_()
            return Inputs((logits, targets), keywords)

        if self.op == ENTROPY_OF_LOGITS:
            return Inputs((logits,), {})
        if self.op in DIVERGENCES:
            teacher = normal(*self.shape, scale=LOGIT_SCALE)
            if self.variant == PROBABILITIES:
                return Inputs((logits, torch.softmax(teacher, 1)), {})
            return Inputs((logits, teacher), {"target_logits": True})

        if self.variant == "soft":
            return Inputs((logits, torch.softmax(normal(*self.shape, scale=1.0), 1)), {})
        if self.variant == SOFT64:
            return Inputs((logits, torch.softmax(normal(*self.shape, scale=1.0), 1, torch.float64)), {})
        target = indices()
        if self.variant == "ignored":
            target[uniform(*target.shape) < IGNORED_SHARE] = IGNORE_INDEX
        return Inputs(
            (logits, target),
            {
                **({"weight": uniform(self.classes, dtype=dtype).add_(0.5)} if self.variant == "weight" else {}),
                **({"label_smoothing": LABEL_SMOOTHING} if self.variant == "smoothing" else {}),
                **({"z_loss": Z_LOSS, "softcap": SOFTCAP} if self.variant == CAPPED else {}),
                **({"entropy_bonus": ENTROPY_BONUS} if self.variant == ENTROPY else {}),
            },
        )


def _ce(*shape: int, reason: str, **options: Any) -> Problem:
    return Problem(CROSS_ENTROPY, shape, reason, **options)


def _bce(*shape: int, reason: str, **options: Any) -> Problem:
    return Problem(BCE, shape, reason, **options)


def _linear_ce(rows: int, hidden: int, classes: int, reason: str, **options: Any) -> Problem:
    return Problem(LINEAR_CROSS_ENTROPY, (rows, classes), reason, hidden=hidden, **options)


def _kl(*shape: int, reason: str, **options: Any) -> Problem:
    return Problem(KL_DIV, shape, reason, **options)


def _js(*shape: int, reason: str, **options: Any) -> Problem:
    return Problem(JS_DIV, shape, reason, **options)


def _entropy(*shape: int, reason: str, **options: Any) -> Problem:
    return Problem(ENTROPY_OF_LOGITS, shape, reason, **options)


CPU = [
    _ce(32, 10, reason="digits: the cost of a call, not of its arithmetic", launch_bound=True, quick=True, key=True),
    _ce(256, 1000, reason="an ImageNet batch: logits fit the L2 cache"),
    _ce(
        *(4096, 1000),
        reason="a large ImageNet batch: logits fit the L3 cache at most",
        quick=True,
        key=True,
        dtypes=tuple(DTYPES),
    ),
    _ce(65536, 32, reason="tagging: many short rows, shorter than a cache line or two"),
    _ce(512, 32000, reason="Llama 2's vocabulary: memory bound", quick=True, key=True),
    _ce(256, 128256, reason="Llama 3's vocabulary: the longest rows", key=True),
    _ce(
        *(8, 19, 256, 256),
        reason="Cityscapes segmentation: classes are strided",
        quick=True,
        key=True,
        dtypes=tuple(DTYPES),
    ),
    _ce(
        1024,
        1000,
        reason="mixup or distillation: the target is as large as the logits",
        variant="soft",
        quick=True,
        key=True,
    ),
    _ce(1024, 1000, reason="a target computed in float64: one dtype is not enough", variant=SOFT64, dtypes=WIDENED),
    _ce(4, 19, 128, 128, reason="the same with strided classes", variant=SOFT64, dtypes=WIDENED),
    _ce(4096, 1000, reason="label smoothing: the row's sum of logits as well", variant="smoothing"),
    _ce(4096, 1000, reason="imbalanced classes: a weighted mean", variant="weight"),
    _ce(512, 32000, reason="prompt tokens masked out: half the rows need no reading", variant="ignored"),
    _ce(512, 32000, reason="a language model's z-loss and capped logits", variant=CAPPED),
    _ce(512, 32000, reason="reinforcement learning from tokens: a bonus for entropy", variant=ENTROPY),
    _bce(32, 10, reason="the cost of a call, not of its arithmetic", launch_bound=True),
    _bce(
        *(4096, 1000),
        reason="multi-label tagging: fits the L3 cache at most",
        quick=True,
        key=True,
        dtypes=tuple(DTYPES),
    ),
    _bce(512, 32000, reason="extreme multi-label: memory bound", quick=True, key=True),
    _bce(8, 1, 512, 512, reason="binary segmentation"),
    _bce(8, 19, 256, 256, reason="multi-label segmentation: one weight [C, 1, 1] a class", variant="pos_weight"),
    _bce(8, 19, 256, 256, reason="convolutions run channels_last, masks are contiguous", variant=CHANNELS_LAST),
    # Llama 3's 128256 classes would take 4096 rows 10 to 100 s a call here, and tell nothing more.
    _linear_ce(512, 128, 32000, reason="a small language model's head: all logits fit one piece", key=True),
    _linear_ce(4096, 256, 32000, reason="its longer batch: several pieces, and whole logits fit no cache", key=True),
    _kl(512, 32000, reason="distillation of a language model: memory bound", key=True),
    _kl(4096, 1000, reason="distillation of a classifier: fits the L3 cache at most", quick=True, key=True),
    _kl(8, 19, 256, 256, reason="distillation of a segmentation: classes are strided", key=True),
    _kl(512, 32000, reason="a language model's stored probabilities", variant=PROBABILITIES),
    _kl(4096, 1000, reason="a classifier's stored probabilities", variant=PROBABILITIES),
    _kl(8, 19, 256, 256, reason="a segmentation's stored probabilities", variant=PROBABILITIES),
    _js(512, 32000, reason="generalised distillation of a language model: memory bound", key=True),
    _js(4096, 1000, reason="consistency of a classifier's two views"),
    _js(8, 19, 256, 256, reason="consistency of two segmentations: classes are strided"),
    _entropy(512, 32000, reason="reinforcement learning from tokens: a bonus without a loss", key=True),
    _entropy(4096, 1000, reason="test-time adaptation of a classifier: entropy is the loss"),
    _entropy(8, 19, 256, 256, reason="the same of a segmentation: classes are strided"),
]

_QUACK = "QuACK's published grid: "

CUDA = [
    _ce(32, 10, reason="digits: launches are the cost", launch_bound=True, quick=True, key=True),
    _ce(4096, 10, reason="a larger batch of them: still launches", launch_bound=True),
    _ce(32768, 256, reason=_QUACK + "a row in a warp's registers"),
    _ce(32768, 512, reason=_QUACK + "a row in a warp's registers"),
    _ce(32768, 1024, reason=_QUACK + "about ImageNet's class count", key=True),
    _ce(32768, 2048, reason=_QUACK + "between a warp and a block per row"),
    _ce(32768, 4096, reason=_QUACK + "a block per row", quick=True),
    _ce(32768, 8192, reason=_QUACK + "a block per row"),
    _ce(32768, 16384, reason=_QUACK + "a block per row"),
    _ce(32768, 32768, reason=_QUACK + "about Llama 2's vocabulary", quick=True, key=True),
    _ce(32768, 65536, reason=_QUACK + "2^31 logits"),
    _ce(16384, 131072, reason=_QUACK + "about Llama 3's vocabulary", key=True),
    _ce(8192, 262144, reason=_QUACK + "Gemma's vocabulary"),
    _ce(1, 128256, reason="decoding: one row must fill the card", quick=True),
    _ce(8, 128256, reason="few rows: each over several blocks"),
    _ce(32, 128256, reason="few rows: each over several blocks"),
    _ce(128, 128256, reason="about as many rows as multiprocessors"),
    _ce(8, 19, 512, 1024, reason="Cityscapes segmentation: classes are strided", quick=True, key=True),
    _ce(16, 150, 512, 512, reason="ADE20K segmentation: more strided classes"),
    _ce(4, 1000, 64, 64, reason="dense features: many classes, few positions"),
    _ce(4096, 32768, reason="distillation: the target is as large as the logits", variant="soft"),
    _ce(32768, 1024, reason="label smoothing: the row's sum of logits as well", variant="smoothing"),
    _ce(32768, 1024, reason="imbalanced classes: a weighted mean", variant="weight"),
    _ce(8192, 32768, reason="prompt tokens masked out: half the rows need no reading", variant="ignored"),
    _ce(8192, 32768, reason="a language model's z-loss and capped logits", variant=CAPPED),
    _ce(8192, 32768, reason="reinforcement learning from tokens: a bonus for entropy", variant=ENTROPY),
    _bce(1024, 1024, reason="2^20 elements: fits the L2 cache"),
    _bce(8, 1, 512, 512, reason="binary segmentation, 2^21 elements"),
    _bce(4096, 4096, reason="2^24 elements: memory bound from here", quick=True, key=True),
    _bce(16384, 16384, reason="2^28 elements: long enough to hide every launch", key=True),
    _bce(8, 80, 256, 256, reason="detection maps: one weight [C, 1, 1] a class", variant="pos_weight"),
    _linear_ce(
        *(8192, 4096, 128256),
        reason="a language model's head: the peers' fused linear + CE",
        key=True,
        dtypes=("bfloat16",),
    ),
    _kl(4096, 32768, reason="distillation of a language model"),
    _js(4096, 32768, reason="generalised distillation of a language model"),
    _entropy(4096, 32768, reason="reinforcement learning from tokens: a bonus without a loss"),
]

GRIDS = {"cpu": CPU, "cuda": CUDA}
