"""Values and gradients of binary divergences and entropies against the float64 reference and torch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import cases
import divergences
import pytest
import torch
from cases import dtype_id
from comparison import assert_bitwise_equal, leaf
from divergences import BINARY_KINDS, Kind, check, operands, value_and_gradients
from torch import Tensor
from torch.func import grad, vmap

import torchce.functional as ours
from torchce import binary_divergence

INF, NAN = math.inf, math.nan
EACH_KIND = pytest.mark.parametrize("kind", BINARY_KINDS.values(), ids=lambda kind: kind.name)
KL, PROBABILITIES, ENTROPY = BINARY_KINDS.values()


# --- values over sizes, dtypes, layouts ------------------------------------------------------------------------------


@EACH_KIND
@pytest.mark.parametrize("shape", cases.ELEMENT_SHAPES)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_shapes(device: str, kind: Kind, dtype: torch.dtype, reduction: str, shape: tuple[int, ...]) -> None:
    check(kind, *operands(kind, shape, dtype, device), reduction=reduction)


@EACH_KIND
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_every_remainder(device: str, kind: Kind, dtype: torch.dtype, offset: int) -> None:
    """All lengths around one, two and four registers, so that every remainder of a bulk loop occurs."""
    for count in range(1, 70):
        tensors = operands(kind, (count + offset,), dtype, device)
        check(kind, *(None if t is None else t[offset:] for t in tensors), reduction="none")


@EACH_KIND
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_scales(device: str, kind: Kind, scale: float) -> None:
    check(kind, *operands(kind, (33, 31), device=device, scale=scale), reduction="none")


@pytest.mark.parametrize("kind", [KL, PROBABILITIES], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtypes", list(itertools.permutations(cases.DTYPES, 2)), ids=str)
def test_operands_of_two_dtypes(device: str, kind: Kind, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The loss has the promoted dtype, and each gradient its operand's."""
    input, target = operands(kind, (7, 31), dtypes[0], device)[0], operands(kind, (7, 31), dtypes[1], device)[1]
    assert target is not None
    results = value_and_gradients(lambda x, t: kind(x, t, reduction="none"), (input, target))
    assert results[0] is not None
    upstream = divergences.grad_output_for(results[0])
    wide = [t.to(torch.promote_types(torch.float32, torch.promote_types(*dtypes))) for t in (input, target)]
    expected = value_and_gradients(lambda x, t: kind(x, t, reduction="none"), tuple(wide), upstream.to(wide[0].dtype))
    for result, wanted, dtype in zip(results, expected, (torch.promote_types(*dtypes), *dtypes), strict=True):
        assert result is not None
        assert wanted is not None
        assert_bitwise_equal(result, wanted.to(dtype))


LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "expanded": lambda t: t[:1].expand(t.shape),
}


@EACH_KIND
@pytest.mark.parametrize("shape", [(33, 17), (2, 19, 5, 7), (70, 300)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, kind: Kind, layout: str, shape: tuple[int, ...]) -> None:
    """Of either operand and of both; the loss and the gradient of the logits have the layout of the logits."""
    arrange = LAYOUTS[layout]
    input, target = operands(kind, shape, device=device)
    pairs = [(arrange(input), target)]
    if target is not None:
        pairs += [(input, arrange(target)), (arrange(input), arrange(target))]
    upstream = cases.normal(shape, torch.float32, device, seed=3)
    for tensors in pairs:
        plain = [None if t is None else t.contiguous() for t in tensors]
        expected = value_and_gradients(lambda x, t: kind(x, t, reduction="none"), tuple(plain), upstream)
        results = value_and_gradients(lambda x, t: kind(x, t, reduction="none"), tensors, upstream)
        for result, wanted, of in zip(results, expected, (tensors[0], *tensors), strict=True):
            if wanted is not None:
                assert result is not None
                assert of is not None
                torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)
                assert result.stride() == torch.empty_like(of).stride()


@EACH_KIND
@pytest.mark.parametrize("columns", [slice(0, 16), slice(1, 18)], ids=["words", "elements"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_parts_of_rows(device: str, kind: Kind, dtype: torch.dtype, columns: slice) -> None:
    """Which are no block of memory: whole words of 16 bytes, and elements at odd places."""
    tensors = operands(kind, (6, 24), dtype, device)
    check(kind, *(None if t is None else t[:, columns] for t in tensors), reduction="none")


def test_more_dimensions_than_kernels_keep_apart() -> None:
    """Formulas in torch's operations answer."""
    shape = (2,) * 18
    order = (*range(1, 18, 2), *range(0, 18, 2))
    input, target = (t.permute(order) for t in operands(KL, shape, torch.float64) if t is not None)
    tensors = (input, target.contiguous())
    results, expected = (value_and_gradients(f, tensors) for f in (KL, lambda x, t: KL(x.flatten(), t.flatten())))
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-15)


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_cross_entropy_less_entropy_is_the_divergence(device: str, dtype: torch.dtype) -> None:
    """H(p, q) - H(p) = KL(p || q), and H(p, p) = H(p)."""
    input, target = operands(KL, (40, 30), dtype, device)
    assert target is not None
    p = target.sigmoid()
    entropy = ours.binary_entropy_with_logits(target, "none")
    cross_entropy = ours.binary_cross_entropy_with_logits(input, p, reduction="none")
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(cross_entropy - entropy, KL(input, target, reduction="none"), **tolerance)
    of_itself = ours.binary_cross_entropy_with_logits(target, p, reduction="none")
    torch.testing.assert_close(of_itself, entropy, **tolerance)


def test_a_bernoulli_distribution_is_a_softmax_of_two() -> None:
    """Of the classes x and 0."""
    input, target = operands(KL, (50,), torch.float64)
    assert target is not None
    rows = [torch.stack([t, torch.zeros_like(t)], 1) for t in (input, target)]
    expected = ours.kl_div_with_logits(*rows, "none", target_logits=True)
    torch.testing.assert_close(KL(input, target, reduction="none"), expected, rtol=1e-11, atol=1e-15)
    entropies = ours.entropy_with_logits(rows[0], "none")
    torch.testing.assert_close(ours.binary_entropy_with_logits(input, "none"), entropies, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_a_distribution_does_not_diverge_from_itself(device: str, dtype: torch.dtype, scale: float) -> None:
    """Exactly 0, with exact zeros for gradients."""
    x = cases.normal((9, 77), dtype, device, scale=scale)
    results = value_and_gradients(lambda x, t: KL(x, t, reduction="none"), (x, x.clone()))
    assert all(result is not None and bool((result == 0).all()) for result in results)


def test_certain_and_even_labels() -> None:
    assert ours.binary_entropy_with_logits(torch.tensor([INF, -INF, 1e4, -1e4]), "none").tolist() == [0] * 4
    assert ours.binary_entropy_with_logits(torch.zeros(1)).item() == pytest.approx(math.log(2), rel=1e-7)


@pytest.mark.parametrize("shift", [0.0, 3.0, 12.0, -12.0])
@pytest.mark.parametrize("step", [1e-4, 1e-2, 0.5])
def test_digits_of_nearly_equal_logits(device: str, shift: float, step: float) -> None:
    """All digits but the last few, where torch's float32 composition has none."""
    input = cases.normal((5000,), torch.float32, device) + shift
    target = input + cases.normal((5000,), torch.float32, device, seed=5, scale=step)
    p, d = target.double().sigmoid(), input.double() - target.double()
    # log(1 + p (e^d - 1)) - p d of the less likely label, of which nothing is lost in float64.
    p, d = torch.where(p <= 0.5, p, (-target.double()).sigmoid()), torch.where(p <= 0.5, d, -d)
    wanted = (p * d.expm1()).log1p() - p * d
    result = KL(input, target, reduction="none").double()
    has_digits = d.abs() > 1e-7  # in float64
    torch.testing.assert_close(result[has_digits], wanted[has_digits], rtol=3e-6, atol=0)
    theirs = (divergences.composed(KL, input, target, "none").double() - wanted).abs()
    assert (result - wanted).abs().mean() <= theirs.mean() / 4


def test_digits_of_nearly_equal_probabilities() -> None:
    """No worse than torch's composition, by far."""
    input = cases.normal((5000,), torch.float32, "cpu")
    target = (input + cases.normal((5000,), torch.float32, "cpu", seed=5, scale=1e-4)).sigmoid()
    wanted = divergences.composed(PROBABILITIES, input.double(), target.double(), "none")
    errors = [
        (f(input, target, reduction="none") - wanted).abs()
        for f in (PROBABILITIES, lambda *a, **options: divergences.composed(PROBABILITIES, *a, **options))
    ]
    assert errors[0].mean() <= errors[1].mean() / 4
    assert errors[0].max() <= errors[1].max() / 4


# --- extreme values --------------------------------------------------------------------------------------------------

# Student's logit, teacher's logit; loss, gradient by the student's, by the teacher's logit.
ENDS = [
    (INF, INF, 0.0, 0.0, 0.0),
    (-INF, -INF, 0.0, 0.0, 0.0),
    (INF, -INF, INF, 1.0, 0.0),
    (-INF, INF, INF, -1.0, 0.0),
    (-INF, 0.0, INF, -0.5, INF),
    (INF, 0.0, INF, 0.5, -INF),
    (-INF, -200.0, INF, 0.0, 0.0),  # infinite even where float32 rounds the teacher's probability to 0
    (0.0, INF, math.log(2), -0.5, 0.0),
    (0.0, -INF, math.log(2), 0.5, 0.0),
    (1e4, -1e4, 1e4, 1.0, 0.0),
    (-1e4, 1e4, 1e4, -1.0, 0.0),
    (3e38, -3e38, 3e38, 1.0, 0.0),
    (1e4, 1e4, 0.0, 0.0, 0.0),
    (NAN, 0.0, NAN, NAN, NAN),
    (0.0, NAN, NAN, NAN, NAN),
    (INF, NAN, NAN, NAN, NAN),
]


def assert_ends(results: list[Tensor | None], columns: list[tuple[float, ...]]) -> None:
    for result, wanted in zip(results, columns, strict=True):
        assert result is not None
        most = torch.finfo(torch.float32).max / 8  # an infinite gradient may be as good as that
        wanted_here = torch.tensor(wanted)
        result = torch.where(wanted_here.isinf() & (result.abs() > most), result.sign() * INF, result)
        torch.testing.assert_close(result, wanted_here, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_infinite_logits(device: str) -> None:
    """Each alone and among others, where lanes would see them together."""
    columns = list(zip(*ENDS, strict=True))
    x, t = (torch.tensor(column, device=device) for column in columns[:2])
    one = torch.ones(len(ENDS), device=device)
    results = value_and_gradients(lambda x, t: KL(x, t, reduction="none"), (x, t), one)
    assert_ends([None if r is None else r.cpu() for r in results], columns[2:])


def test_composite_at_the_ends() -> None:
    """What torch transforms gives what the kernels give; with create_graph=True too."""
    columns = list(zip(*ENDS, strict=True))
    x, t = (torch.tensor(column) for column in columns[:2])
    assert_ends([vmap(lambda x, t: KL(x, t))(x, t)], columns[2:3])
    of = (leaf(x.clone()), leaf(t.clone()))
    with_graph = torch.autograd.grad(KL(*of, reduction="sum"), of, create_graph=True)
    assert_ends([g.detach() for g in with_graph], columns[3:])
    assert_ends([grad(lambda x: KL(x, t, reduction="sum"))(x)], columns[3:4])
    finite = torch.tensor([all(map(math.isfinite, row)) for row in ENDS])  # the teacher's is NaN elsewhere
    of_teacher = grad(lambda t: KL(x[finite], t, reduction="sum"))(t[finite])
    torch.testing.assert_close(of_teacher, torch.tensor(columns[4])[finite], rtol=1e-6, atol=1e-6)


def test_probabilities_at_the_ends(device: str) -> None:
    """0 and 1 cost the student's surprise; what is no probability gives NaN."""
    t = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, -0.1, 1.1, NAN, 1e-40, 0.5], device=device)
    x = torch.tensor([0.5, 0.5, -INF, INF, INF, -INF, 0.5, 0.5, 0.5, 0.0, 0.0], device=device)
    soft = math.log1p(math.exp(0.5))
    wanted = [soft, soft - 0.5, 0, 0, INF, INF, NAN, NAN, NAN, math.log(2), 0]
    result = PROBABILITIES(x, t, reduction="none").cpu()
    torch.testing.assert_close(result, torch.tensor(wanted), rtol=1e-6, atol=1e-30, equal_nan=True)
    x.requires_grad_()
    t.requires_grad_()
    gradients = [g.cpu() for g in torch.autograd.grad(PROBABILITIES(x, t, reduction="sum"), (x, t))]
    p = 1 / (1 + math.exp(-0.5))
    wanted = torch.tensor([p, p - 1, 0, 0, 1, -1, NAN, NAN, NAN, 0.5, 0])
    torch.testing.assert_close(gradients[0], wanted, rtol=1e-6, atol=1e-38, equal_nan=True)
    wanted = torch.tensor([-INF, INF, -INF, INF, NAN, NAN, math.log(1e-40), 0])
    torch.testing.assert_close(gradients[1][[0, 1, 4, 5, 6, 7, 9, 10]], wanted, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("x", [INF, -INF])
def test_no_probability_beside_an_infinite_logit(device: str, x: float) -> None:
    t = torch.tensor([-0.1, 1.1, NAN], device=device)
    assert bool(PROBABILITIES(torch.full_like(t, x), t, reduction="none").isnan().all())


def test_no_upstream_gradient_leaves_none(device: str) -> None:
    """Where the loss is infinite, too."""
    rows = [row for row in ENDS if not any(map(math.isnan, row[:2]))]
    x, t = (torch.tensor(column, device=device).requires_grad_() for column in list(zip(*rows, strict=True))[:2])
    loss = KL(x, t, reduction="none")
    for gradient in torch.autograd.grad(loss, (x, t), torch.zeros_like(loss)):
        assert bool((gradient == 0).all())


@EACH_KIND
def test_gradients_of_huge_and_tiny_upstream(device: str, kind: Kind) -> None:
    for size in (1e30, 1e-30):
        tensors = operands(kind, (6, 9), device=device)
        check(kind, *tensors, reduction="sum", grad_output=torch.tensor(size, device=device))


@EACH_KIND
def test_nothing(device: str, kind: Kind) -> None:
    """The mean of no elements is NaN as torch's, the sum 0."""
    empty = [t for t in operands(kind, (0, 7), device=device) if t is not None]
    assert kind(*empty).isnan()
    assert kind(*empty, reduction="sum") == 0
    assert kind(*empty, reduction="none").shape == (0, 7)


@EACH_KIND
def test_same_bits_for_every_number_of_threads(kind: Kind, restore_threads: None) -> None:
    divergences.assert_same_bits_for_every_number_of_threads(kind, operands(kind, (300, 701)))


# --- errors ----------------------------------------------------------------------------------------------------------

X, T = torch.zeros(3, 5), torch.full((3, 5), 0.2)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((X, T[:, :4]), {}, r"target: expected the input's shape \[3, 5\], got \[3, 4\]"),
        ((X, torch.zeros(3, 5, dtype=torch.int64)), {}, "target: expected a floating point tensor"),
        ((X.long(), T), {}, "input: expected a floating point tensor"),
        ((X, None), {}, "target: expected a Tensor, got NoneType"),
        ((X, T.to("meta")), {}, "target: expected a tensor on cpu, got one on meta"),
        ((X.to_sparse(), T), {}, "input: expected a strided tensor, got a torch.sparse_coo one"),
        ((X, T), {"target_logits": 1}, "target_logits: expected a bool, got 1"),
        ((X, T, "batchmean"), {}, "batchmean"),
    ],
)
def test_errors(arguments: tuple[Any, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ours.binary_kl_div_with_logits(*arguments, **options)


def test_errors_of_entropies() -> None:
    with pytest.raises(ValueError, match="input: expected a floating point tensor"):
        ours.binary_entropy_with_logits(X.bool())
    with pytest.raises(ValueError, match="input: expected a Tensor, got list"):
        ours.binary_entropy_with_logits([0.0])


def test_ops_check_what_keeps_memory_safe() -> None:
    ops, g = torch.ops.torchce, torch.ones(())
    for op, arguments, words in (
        (ops.binary_divergence_forward, (X, T[:, :4], None, 1, False), "target: expected the logits' shape"),
        (ops.binary_divergence_forward, (X, T.double(), None, 1, False), "target: expected the logits' dtype"),
        (ops.binary_divergence_forward, (X, T.long(), None, 1, False), "target: expected a floating dtype"),
        (ops.binary_divergence_forward, (X, T, torch.int64, 1, False), "dtype: expected a floating dtype"),
        (ops.binary_divergence_forward, (X, T, None, 3, False), "reduction: expected"),
        (ops.binary_divergence_backward, (torch.ones(3), X, T, 1, False), "grad_output: expected the loss's shape"),
        (ops.binary_divergence_backward_target, (g, X, None, 1, False), "target: expected one, whose gradient"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*arguments)


def test_reference_is_torchs_composition_in_float64() -> None:
    """The oracle has no slip that ours might share."""
    for kind in BINARY_KINDS.values():
        tensors = operands(kind, (5, 7, 3), torch.float64)
        theirs = value_and_gradients(lambda x, t, k=kind: divergences.composed(k, x, t, "sum"), tensors)
        upstream = divergences.grad_output_for(theirs[0])
        truths = divergences.truth(kind, *tensors, "sum", grad_output=upstream)
        for their, true in zip(theirs, truths, strict=True):
            if true is not None:
                torch.testing.assert_close(their, true.value, rtol=1e-11, atol=1e-12)


def test_formulas_are_the_kernels() -> None:
    for kind in BINARY_KINDS.values():
        tensors = operands(kind, (40,), torch.float64)
        arguments = (*tensors, None, 0, kind.options.get("target_logits", False))
        torch.testing.assert_close(binary_divergence.composite(*arguments), kind(*tensors, reduction="none"))
