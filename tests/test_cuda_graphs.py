"""CUDA graphs: forward and backward are captured, and replays compute what eager does, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
from comparison import assert_bitwise_equal
from cuda_problems import PROBLEMS, draw, loss_of, renew, step
from torch import Tensor

import torchce.functional

pytestmark = pytest.mark.cuda


def capture(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of the function and the tensors each replay writes. Warmed up first, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def assert_all_equal(results: list[Tensor], expected: list[Tensor], what: str) -> None:
    for number, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert_bitwise_equal(result, wanted, f"{what}, result {number}")


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_replay_reads_new_contents(name: str, reduction: str) -> None:
    """Eager calls in between take counters of their own and leave the graph's alone."""
    problem = PROBLEMS[name]
    inputs = draw(problem, "cuda", 0)
    graph, results = capture(lambda: step(problem, inputs, reduction))
    for seed in (1, 2, 1):
        fresh = draw(problem, "cuda", seed)
        renew(inputs, fresh)
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        expected = step(problem, fresh, reduction)
        assert_all_equal(results, expected, f"seed {seed}")
        graph.replay()
        assert_all_equal(results, expected, f"seed {seed}, again")


@pytest.mark.parametrize("name", PROBLEMS)
def test_two_graphs_at_once(name: str) -> None:
    """Replayed on two streams, with eager calls on a third: none of them may count another's blocks."""
    problem = PROBLEMS[name]
    inputs = [draw(problem, "cuda", seed) for seed in range(3)]
    expected = [step(problem, each) for each in inputs]
    captured = [capture(lambda each=each: step(problem, each)) for each in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in captured]
    torch.cuda.synchronize()
    eager = []
    for _ in range(50):
        for stream, (graph, _) in zip(streams, captured, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager.append(step(problem, inputs[2]))
    torch.cuda.synchronize()
    for number, (_, results) in enumerate(captured):
        assert_all_equal(results, expected[number], f"graph {number}")
    for number, results in enumerate(eager):
        assert_all_equal(results, expected[2], f"eager call {number}")


@pytest.mark.parametrize("name", ["lanes", "parts", "segmentation", "bce"])
def test_many_steps_in_one_graph(name: str) -> None:
    """Scratch memory of one launch is reused by the next within the graph; a thousand replays do not wear it out."""
    problem = PROBLEMS[name]
    inputs = draw(problem, "cuda", 0)
    expected = step(problem, inputs)
    graph, results = capture(lambda: [result for _ in range(3) for result in step(problem, inputs)])
    for _ in range(1000):
        graph.replay()
    assert_all_equal(results, 3 * expected, "after 1000 replays")


@pytest.mark.parametrize("name", ["lanes", "parts", "segmentation", "bce"])
def test_in_place_backward(name: str) -> None:
    problem = PROBLEMS[name]
    source, target, *_ = draw(problem, "cuda", 0)
    target = target.detach()
    name_of_loss = "binary_cross_entropy_with_logits" if problem.kind == "bce" else "cross_entropy"

    def overwriting() -> list[Tensor]:
        loss = getattr(torchce.functional, name_of_loss)(source * 1, target, inplace_backward=True)
        return [loss.detach(), *torch.autograd.grad(loss, source)]

    expected = overwriting()
    graph, results = capture(overwriting)
    for _ in range(2):
        graph.replay()
        assert_all_equal(results, expected, "replay")


@pytest.mark.parametrize("shape", [(3001, 10), (257, 5000), (8, 128256), (3, 19, 64, 64)], ids=str)
def test_forward_backward(shape: tuple[int, ...]) -> None:
    """Captured while a kernel is given more shared memory than it gets unasked."""
    source = cases.normal(shape, torch.float32, "cuda", scale=3)
    target = cases.indices(cases.index_shape(shape), shape[1], torch.int64, "cuda")
    grad_output = torch.full((), -2.625, device="cuda")

    def forward_backward() -> list[Tensor]:
        logits = source.clone()
        return [
            torchce.ops.softmax_ce_forward_backward_(grad_output, logits, target, None, None, 2, -100, 0.0),
            logits,
        ]

    expected = forward_backward()
    graph, results = capture(forward_backward)
    for _ in range(2):
        graph.replay()
        assert_all_equal(results, expected, "replay")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_linear_cross_entropy(reduction: str, dtype: torch.dtype) -> None:
    """In three pieces, with sums of float32: nothing of the loop waits for the device."""
    input = cases.normal([300, 64], dtype, "cuda").requires_grad_()
    weight = cases.normal([1000, 64], dtype, "cuda", seed=1).requires_grad_()
    target = cases.indices([300], 1000, torch.int64, "cuda")

    def step() -> list[Tensor]:
        loss = torchce.functional.linear_cross_entropy(input, weight, target, chunk_rows=100, reduction=reduction)
        return [loss.detach(), *torch.autograd.grad(loss, (input, weight), torch.full_like(loss, -2.625))]

    expected = step()
    graph, results = capture(step)
    for _ in range(2):
        graph.replay()
        assert_all_equal(results, expected, "replay")


@pytest.mark.parametrize("name", PROBLEMS)
def test_graphed_callable(name: str) -> None:
    """torch.cuda.make_graphed_callables: forward and backward are graphs of their own."""
    problem = PROBLEMS[name]
    inputs = draw(problem, "cuda", 0)
    graphed = torch.cuda.make_graphed_callables(lambda *tensors: loss_of(problem, list(tensors)), tuple(inputs))
    for seed in (1, 2):
        fresh = draw(problem, "cuda", seed)
        loss = graphed(*fresh)
        wanted = [tensor for tensor in fresh if tensor.requires_grad]
        gradients = torch.autograd.grad(loss, wanted, torch.full_like(loss, -2.625))
        assert_all_equal([loss.detach(), *gradients], step(problem, fresh), f"seed {seed}")
