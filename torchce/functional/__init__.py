r"""The losses as functions, with the signatures and semantics of :mod:`torch.nn.functional` where it has them.

Here every accepted input becomes one that the kernels take, and every other goes to torch's own function: it raises
what torch raises, with a message that names the argument, or answers where only torch can. That happens for

- devices other than CPU, CUDA and meta, layouts other than strided, nested tensors, and tensor subclasses without
  ``__torch_function__`` (such as DTensor; the others get their own say and come out again);
- CUDA, where no CUDA kernels are loaded: one warning says why;
- complex or integer inputs, inputs without classes (``C = 0``), and BCE inputs of more than 16 dimensions;
- weights that require grad, but for the one that torch differentiates: ``weight`` beside probability targets.

Divergences and entropies have no function of torch's behind them: their own formulas in torch's operations answer
there, or they raise.

The same formulas in torch's own operations, with the same answers for everything that torch's functions do not take,
serve :mod:`torch.func` transforms, forward-mode AD, ``torch.jit.trace`` and that ``weight``. ``torch.jit.script``
raises: TorchScript cannot compile these functions.
"""

from torchce.functional._common import NO_TORCHSCRIPT
from torchce.functional.binary_divergence import binary_entropy_with_logits, binary_kl_div_with_logits
from torchce.functional.divergence import entropy_with_logits, js_div_with_logits, kl_div_with_logits
from torchce.functional.linear_divergence import linear_js_div, linear_kl_div
from torchce.functional.linear_softmax_ce import linear_cross_entropy
from torchce.functional.sigmoid_bce import binary_cross_entropy_with_logits
from torchce.functional.softmax_ce import cross_entropy
from torchce.functional.softmax_ce_own import CrossEntropyOutput
from torchce.functional.token_logprobs import TokenLogprobsOutput, token_logprobs
from torchce.softmax_ce_formulas import check_targets

__all__ = [
    "NO_TORCHSCRIPT",
    "CrossEntropyOutput",
    "TokenLogprobsOutput",
    "binary_cross_entropy_with_logits",
    "binary_entropy_with_logits",
    "binary_kl_div_with_logits",
    "check_targets",
    "cross_entropy",
    "entropy_with_logits",
    "js_div_with_logits",
    "kl_div_with_logits",
    "linear_cross_entropy",
    "linear_js_div",
    "linear_kl_div",
    "token_logprobs",
]
