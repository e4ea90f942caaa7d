"""``torch.compile`` and ``torch.export`` under ``torchce.patch_torch``, whichever of them comes first.

Dynamo keeps a table of torch's functions from its first import on: what lies under their names then it takes for them.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PRELUDE = """
import sys
import torch, torchce
import torch.nn.functional as F
assert "torch._dynamo" not in sys.modules

torchs = F.cross_entropy, F.binary_cross_entropy_with_logits
patch = torchce.patch_torch()
if {late}:
    patch.__exit__(None, None, None)
import torch._dynamo
torch._dynamo.trace_rules.get_torch_obj_rule_map()
if {late}:
    patch = torchce.patch_torch()
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(5))
        self.loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, y, t):
        x = x * self.scale
        return self.loss(x, y) + F.binary_cross_entropy_with_logits(x, t, pos_weight=self.scale.detach())

def expected(x, y, t):
    return torchs[0](x, y, label_smoothing=0.1) + torchs[1](x, t, pos_weight=torch.ones(5))

def problem(rows):
    return torch.randn(rows, 5), torch.arange(rows) % 5, torch.rand(rows, 5)

def check(model, rows):
    arguments = problem(rows)
    scale = torch.ones(5, requires_grad=True)
    loss, (parameter,) = model(*arguments), model.parameters()
    torch.testing.assert_close(loss, expected(arguments[0] * scale, *arguments[1:]))
    parameter.grad = None
    loss.backward()
    expected(arguments[0] * scale, *arguments[1:]).backward()
    torch.testing.assert_close(parameter.grad, scale.grad)

OPS = ("softmax_ce_forward", "softmax_ce_backward.", "sigmoid_bce_forward", "sigmoid_bce_backward")
"""

COMPILE = """
graphs = []

def keep(graph, _):
    graphs.append(graph.code)
    return make_boxed_func(graph.forward)

def ops():
    found = [sum(op in code for code in graphs) for op in OPS]
    graphs.clear()
    return found

for dynamic in (None, True):
    torch._dynamo.reset()
    model = torch.compile(
        Model(), fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    check(model, 4)
    assert ops() == [1] * 4
    traced = torchce.patch_torch.calls()
    check(model, 4)
    assert torchce.patch_torch.calls() == traced  # counted when it is traced, and never again
    traced.pop("linear_cross_entropy", None)  # which the model does not call
    assert all(calls.kernel and not calls.other for calls in traced.values())
    check(model, 7)
    check(model, 9)
    assert ops() == ([0] * 4 if dynamic else [1] * 4)  # the first other size makes a dynamic graph
    with torchce.patch_torch():
        check(model, 8)
    assert not graphs  # a further hold changes nothing
    patch.__exit__(None, None, None)
    check(model, 6)
    assert graphs and ops() == [0] * 4  # torch's own losses again
    patch = torchce.patch_torch()
    check(model, 6)
    assert not graphs  # the first graphs are still there

    torch._dynamo.reset()
    patch.__exit__(None, None, None)
    check(model, 4)
    assert graphs and ops() == [0] * 4
    patch = torchce.patch_torch()  # between two calls of what is compiled
    check(model, 4)
    assert ops() == [1] * 4

# Options that are arguments, and numbers in the graph.
def options(x, y, ignore_index, label_smoothing):
    return F.cross_entropy(x, y, ignore_index=ignore_index, label_smoothing=label_smoothing)

for dynamic in (None, True):
    torch._dynamo.reset()
    compiled = torch.compile(
        options, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    for ignore_index, label_smoothing in ((1, 0.1), (2, 0.2), (3, 0.3)):
        x, y, _ = problem(6)
        loss = compiled(x.requires_grad_(), y, ignore_index, label_smoothing)
        loss.backward()
        expected_loss = torchs[0](x, y, ignore_index=ignore_index, label_smoothing=label_smoothing)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(x.grad, torch.autograd.grad(expected_loss, x)[0])
    assert graphs and all("softmax_ce" in code for code in graphs)
    graphs.clear()

for backend in ("eager", "aot_eager", "inductor"):
    torch._dynamo.reset()
    model = torch.compile(Model(), fullgraph=True, backend=backend)
    check(model, 4)
    check(model, 7)
    patch.__exit__(None, None, None)
    check(model, 7)
    patch = torchce.patch_torch()
    check(model, 7)
"""

EXPORT = """
for strict in (False, True):
    for dynamic in (False, True):
        rows = {0: torch.export.Dim("rows")}
        program = torch.export.export(
            Model(), problem(4), strict=strict, dynamic_shapes=(rows, rows, rows) if dynamic else None
        )
        assert all(op in str(program.graph) for op in OPS[::2]), (strict, program)
        model = program.module()
        check(model, 4)
        if dynamic:
            check(model, 7)
        patch.__exit__(None, None, None)
        check(model, 4)
        patch = torchce.patch_torch()
"""


@pytest.mark.parametrize("what", ["compile", "export"])
@pytest.mark.parametrize("late", [False, True], ids=["patched_first", "dynamo_first"])
def test_traced_graphs_hold_torchces_ops(late: bool, what: str) -> None:
    code = PRELUDE.replace("{late}", str(late)) + (COMPILE if what == "compile" else EXPORT)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
