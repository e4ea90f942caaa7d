"""Values and gradients of divergences and entropies against the float64 reference and torch, and their identities."""

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
from divergences import KINDS, Kind, check, operands, truth, value_and_gradients
from torch import Tensor

import torchce
import torchce.functional as ours

INF = math.inf
EACH_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
WITH_TARGET = [kind for kind in KINDS.values() if kind.has_target]
LOGITS = [kind for kind in KINDS.values() if kind.options.get("target_logits")]


def rows_mask(shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    mask = cases.uniform(cases.index_shape(shape), torch.float32, "cpu", seed=9) < 0.6
    return mask.to(device)


# --- values over sizes, dtypes, layouts, options ---------------------------------------------------------------------


@EACH_KIND
@pytest.mark.parametrize("shape", [*cases.CLASS_SHAPES, *cases.SOFTMAX_SHAPES])
def test_shapes(device: str, kind: Kind, shape: tuple[int, ...]) -> None:
    check(kind, *operands(kind, shape, device=device), reduction="none")


@EACH_KIND
@pytest.mark.parametrize("shape", [(13, 11), (5, 1001), (2, 19, 5, 7)], ids=str)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
def test_dtypes(device: str, kind: Kind, dtype: torch.dtype, reduction: str, shape: tuple[int, ...]) -> None:
    check(kind, *operands(kind, shape, dtype, device), reduction=reduction)


@EACH_KIND
@pytest.mark.parametrize("classes", [*range(1, 70), *(192 + step for step in range(-1, 18))])
def test_every_remainder(kind: Kind, classes: int) -> None:
    """Around one and two registers of every width, and where lanes begin to run along the rows."""
    check(kind, *operands(kind, (3, classes)), reduction="sum")


@pytest.mark.parametrize("kind", WITH_TARGET, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtypes", list(itertools.permutations(cases.DTYPES, 2)), ids=str)
def test_operands_of_two_dtypes(device: str, kind: Kind, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """All pairs are read as they are; the loss has the promoted dtype, and each gradient its operand's."""
    for shape in ((7, 11), (3, 515)):
        input, target = operands(kind, shape, dtypes[0], device)[0], operands(kind, shape, dtypes[1], device)[1]
        assert target is not None
        loss, grad_input, grad_target = value_and_gradients(lambda x, t: kind(x, t, "none"), (input, target))
        wide = [t.to(torch.promote_types(torch.float32, torch.promote_types(*dtypes))) for t in (input, target)]
        assert loss is not None
        upstream = divergences.grad_output_for(loss)
        expected = value_and_gradients(lambda x, t: kind(x, t, "none"), tuple(wide), upstream.to(wide[0].dtype))
        for what, wanted, dtype in zip(
            (loss, grad_input, grad_target), expected, (torch.promote_types(*dtypes), *dtypes), strict=True
        ):
            assert what is not None
            assert wanted is not None
            assert_bitwise_equal(what, wanted.to(dtype))


@EACH_KIND
@pytest.mark.parametrize("temperature", [0.25, 1.7, 4, 1e3])
def test_temperature(device: str, kind: Kind, temperature: float) -> None:
    for shape in ((7, 11), (3, 515)):
        check(kind, *operands(kind, shape, device=device), temperature=temperature)


@EACH_KIND
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_scales(device: str, kind: Kind, scale: float) -> None:
    for shape in ((7, 11), (3, 515)):
        check(kind, *operands(kind, shape, device=device, scale=scale), reduction="none")


@EACH_KIND
@pytest.mark.parametrize("shape", [(64, 11), (37, 515), (2, 19, 5, 7)], ids=str)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_mask(device: str, kind: Kind, reduction: str, shape: tuple[int, ...]) -> None:
    """Rows that are left out may hold anything, and have no loss, gradient or part in the mean."""
    mask = rows_mask(shape, device)
    input, target = operands(kind, shape, device=device)
    expected = value_and_gradients(lambda x, t: kind(x, t, reduction, mask=mask), (input, target))
    check(kind, input, target, reduction=reduction, mask=mask)
    class_dim = 1
    left_out = ~mask.unsqueeze(class_dim).expand(shape)
    for value in (math.nan, INF):
        spoilt = [None if t is None else t.masked_fill(left_out, value) for t in (input, target)]
        results = value_and_gradients(lambda x, t: kind(x, t, reduction, mask=mask), tuple(spoilt))
        for result, wanted in zip(results, expected, strict=True):
            if wanted is not None:
                assert result is not None
                assert_bitwise_equal(result, wanted)


@EACH_KIND
def test_nothing_is_kept(device: str, kind: Kind) -> None:
    """The mean of no rows is NaN as torch's, the sum 0; there is no gradient."""
    input, target = operands(kind, (5, 7), device=device)
    mask = torch.zeros(5, dtype=torch.bool, device=device)
    assert kind(input, target, mask=mask).isnan()
    assert kind(input, target, "sum", mask=mask) == 0
    x = leaf(input)
    kind(x, target, "sum", mask=mask).backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0
    empty = [None if t is None else t[:0] for t in (input, target)]
    assert kind(*empty).isnan()
    assert kind(*empty, "sum") == 0
    assert kind(*empty, "none").shape == (0,)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second class": lambda t: torch.stack([t, t], 2).flatten(1)[:, ::2] if t.dim() == 2 else t,
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "slice": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@EACH_KIND
@pytest.mark.parametrize("shape", [(33, 17), (5, 300), (2, 19, 5, 7)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, kind: Kind, layout: str, shape: tuple[int, ...]) -> None:
    """Of either operand and of both; the gradient has the layout of what it belongs to."""
    arrange = LAYOUTS[layout]
    input, target = operands(kind, shape, device=device)
    pairs = [(arrange(input), target)]
    if target is not None:
        pairs += [(input, arrange(target)), (arrange(input), arrange(target))]
    for tensors in pairs:
        plain = [None if t is None else t.contiguous() for t in tensors]
        upstream = torch.randn(shape[0], *shape[2:], generator=torch.Generator().manual_seed(3)).to(device)
        expected = value_and_gradients(lambda x, t: kind(x, t, "none"), tuple(plain), upstream)
        results = value_and_gradients(lambda x, t: kind(x, t, "none"), tensors, upstream)
        for result, wanted, of in zip(results, expected, (None, *tensors), strict=True):
            if wanted is None:
                continue
            torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)
            if of is not None and layout == "transposed":
                assert result is not None
                assert result.stride() == torch.empty_like(of).stride()


# --- identities of the seed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 11), (3, 1003), (2, 19, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_cross_entropy_less_entropy_is_the_divergence(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """H(P, Q) - H(P) = KL(P || Q), and H(P, P) = H(P)."""
    input, target = operands(KINDS["kl"], shape, dtype, device)
    assert target is not None
    p = target.softmax(1)
    cross_entropy, entropy = ours.cross_entropy(input, p, reduction="none"), ours.entropy_with_logits(target, "none")
    of_itself = ours.cross_entropy(target, p, reduction="none")
    divergence = ours.kl_div_with_logits(input, target, "none", target_logits=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(cross_entropy - entropy, divergence, **tolerance)
    torch.testing.assert_close(of_itself, entropy, **tolerance)


@pytest.mark.parametrize("kind", LOGITS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=dtype_id)
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_a_distribution_does_not_diverge_from_itself(kind: Kind, dtype: torch.dtype, scale: float) -> None:
    """Exactly 0, with exact zeros for a gradient, at every temperature."""
    for shape in ((9, 5), (5, 1003), (2, 19, 3, 3)):
        x = cases.normal(shape, dtype, "cpu", scale=scale)
        for temperature in (1.0, 0.7):
            results = value_and_gradients(lambda x, t, T=temperature: kind(x, t, "none", temperature=T), (x, x.clone()))
            assert all(result is not None and bool((result == 0).all()) for result in results)


def test_certainty_has_neither_entropy_nor_surprise() -> None:
    """A certain P: entropy 0, and self-information, which is the unreduced cross entropy, 0 of its class."""
    for classes in (5, 1003):
        for far in (1e3, INF):
            logits = torch.full((2, classes), -far)
            logits[0, 1] = logits[1, -1] = 0
            assert ours.entropy_with_logits(logits, "none").tolist() == [0, 0]
            assert ours.cross_entropy(logits, torch.tensor([1, classes - 1]), reduction="none").tolist() == [0, 0]


def test_uniform_distributions() -> None:
    assert ours.entropy_with_logits(torch.zeros(2), "none").item() == pytest.approx(math.log(2), rel=1e-7)
    for classes in (3, 1000, 32000):
        entropy = ours.entropy_with_logits(torch.full((2, classes), 7.5), "none")
        torch.testing.assert_close(entropy, torch.full((2,), math.log(classes)), rtol=3e-7, atol=0)


def test_symmetric_divergence_is_bounded_by_log_2() -> None:
    """And symmetric, and reached where the distributions exclude each other."""
    js = KINDS["js"]
    for shape in ((50, 7), (7, 1003)):
        input, target = operands(js, shape, scale=30.0)
        forwards, backwards = js(input, target, "none"), js(target, input, "none")
        assert bool(((forwards >= 0) & (forwards <= math.log(2) * (1 + 1e-6))).all())
        torch.testing.assert_close(forwards, backwards, rtol=1e-6, atol=1e-7)
    apart = torch.tensor([[0.0, -INF], [-INF, 0.0]])
    torch.testing.assert_close(js(apart, apart.flip(0), "none"), torch.full((2,), math.log(2)))


@pytest.mark.parametrize("kind", [KINDS["kl"], KINDS["kl_probabilities"]], ids=lambda kind: kind.name)
def test_ends_of_the_generalised_divergence(kind: Kind) -> None:
    """Where beta is 0 it is KL(P || Q), where it is 1, KL(Q || P): what it tends to, divided by beta or 1 - beta."""
    input, target = operands(kind, (5, 9), torch.float64)
    for beta, reverse, near in ((0, False, 1e-8), (1, True, 1 - 1e-8)):
        end = ours.js_div_with_logits(input, target, beta=beta, **kind.options)
        assert_bitwise_equal(end, ours.kl_div_with_logits(input, target, reverse=reverse, **kind.options))
        close = ours.js_div_with_logits(input, target, beta=near, **kind.options) / min(near, 1 - near)
        torch.testing.assert_close(close, end, rtol=1e-4, atol=0)


# --- extreme values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 18, 400])
@pytest.mark.parametrize("kind", LOGITS, ids=lambda kind: kind.name)
def test_classes_that_are_excluded(kind: Kind, classes: int) -> None:
    """By both they cost nothing, nor change anything; by the second distribution alone everything."""
    input, target = operands(kind, (6, classes), torch.float64)
    assert target is not None
    with_both = [torch.cat([t, torch.full((6, 2), -INF, dtype=t.dtype)], 1) for t in (input, target)]
    results = value_and_gradients(lambda x, t: kind(x, t, "none"), tuple(with_both))
    expected = value_and_gradients(lambda x, t: kind(x, t, "none"), (input, target))
    torch.testing.assert_close(results[0], expected[0], rtol=1e-13, atol=1e-13)
    for result, wanted in zip(results[1:], expected[1:], strict=True):
        assert result is not None
        torch.testing.assert_close(result[:, :-2], wanted, rtol=1e-12, atol=1e-13)
        assert bool((result[:, -2:] == 0).all())
    for excluded_by_student in (True, False):
        x, t = input.clone(), target.clone()
        (x if excluded_by_student else t)[:, 1] = -INF
        loss = kind(x, t, "none")
        is_infinite = "kl" in kind.name and excluded_by_student != ("reverse" in kind.name)
        assert bool((loss == INF).all()) == is_infinite
        assert bool(loss.isfinite().all()) != is_infinite


def test_excluded_by_the_student_where_the_teacher_hardly_counts_it() -> None:
    """Infinite even where float32 rounds the teacher's probability to 0, wherever in the row that is."""
    for classes in (5, 700):
        for place in (0, classes // 2, classes - 1):
            student, teacher = torch.zeros(2, classes), torch.zeros(2, classes)
            student[:, place], teacher[:, place] = -INF, -200
            assert ours.kl_div_with_logits(student, teacher, "none", target_logits=True).tolist() == [INF, INF]


@EACH_KIND
@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("classes", [5, 700])
def test_no_number_gives_no_number(kind: Kind, value: float, classes: int) -> None:
    """A NaN or +inf among the logits, or a NaN or a negative number among the probabilities, shows in the
    loss and both gradients of its row only."""
    input, target = operands(kind, (4, classes))
    spoilt = [input, *([] if target is None else [target])]
    for number, tensor in enumerate(spoilt):
        is_probability = number == 1 and not kind.options.get("target_logits")
        changed = [t.clone() for t in spoilt]
        changed[number][2, classes // 2] = (value if math.isnan(value) else -0.25) if is_probability else value
        loss = kind(*changed, "none") if len(changed) == 2 else kind(changed[0], None, "none")
        assert loss.isnan().tolist() == [False, False, True, False], f"{tensor.shape}"
        results = value_and_gradients(lambda x, t: kind(x, t, "none"), (*changed, None)[:2])
        for gradient in results[1:]:
            assert gradient is None or gradient[2].isnan().any()
            assert gradient is None or not gradient[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("classes", [5, 700])
@pytest.mark.parametrize("kind", LOGITS, ids=lambda kind: kind.name)
def test_a_row_without_a_softmax(kind: Kind, classes: int) -> None:
    """Of nothing but minus infinity, in either operand."""
    input, target = operands(kind, (3, classes))
    assert target is not None
    nothing = torch.full((3, classes), -INF)
    for tensors in ((nothing, target), (input, nothing), (nothing, nothing)):
        assert bool(kind(*tensors, "none").isnan().all())
    assert bool(ours.entropy_with_logits(nothing, "none").isnan().all())


@pytest.mark.parametrize("kind", LOGITS, ids=lambda kind: kind.name)
def test_masks_of_the_lowest_number(kind: Kind) -> None:
    """finfo.min in both, as masks are filled with, is as good as minus infinity."""
    input, target = operands(kind, (4, 40))
    assert target is not None
    lowest = torch.finfo(torch.float32).min
    results = []
    for filler in (lowest, -INF):
        x, t = input.clone(), target.clone()
        x[:, 7:29] = filler
        t[:, 7:29] = filler
        results.append(value_and_gradients(lambda x, t: kind(x, t, "none"), (x, t)))
    for result, wanted in zip(*results, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, 100.0, -3000.0])
@pytest.mark.parametrize("kind", [KINDS["kl"], KINDS["reverse_kl"], KINDS["js"]], ids=lambda kind: kind.name)
def test_nearly_equal_distributions(kind: Kind, shift: float) -> None:
    """The error is no larger than that of torch's float32 composition, on average over rows, and of the worst."""
    for shape in ((200, 50), (40, 5000)):
        input = cases.normal(shape, torch.float32, "cpu", scale=4)
        target = input + cases.normal(shape, torch.float32, "cpu", seed=5, scale=1e-3) + shift
        wanted = divergences.composed(kind, input.double(), target.double(), "none")
        errors = [(f(input, target, "none") - wanted).abs() for f in (kind, lambda *a: divergences.composed(kind, *a))]
        assert errors[0].mean() <= errors[1].mean()
        assert errors[0].max() <= errors[1].max()


@pytest.mark.parametrize("is_strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("shape", [(200, 50), (40, 1000), (10, 32000)], ids=str)
@pytest.mark.parametrize("name", ["kl_probabilities", "reverse_kl_probabilities"])
def test_nearly_equal_probabilities(name: str, shape: tuple[int, ...], is_strided: bool) -> None:
    """The error is on average that of torch's float32 composition, or less; 1.06 times it without fused operations."""
    kind = KINDS[name]
    input = cases.normal(shape, torch.float32, "cpu")
    target = (input + cases.normal(shape, torch.float32, "cpu", seed=5, scale=1e-3)).softmax(1)
    wanted = divergences.composed(kind, input.double(), target.double(), "none")
    theirs = (divergences.composed(kind, input, target, "none") - wanted).abs()
    if is_strided:
        input, target = (t.T.contiguous().T for t in (input, target))
    assert (kind(input, target, "none") - wanted).abs().mean() <= 1.1 * theirs.mean()


def test_sums_of_rising_rows() -> None:
    """Rows that rise slowly rescale their sums again and again; their errors must not add up."""
    for classes in (4096, 40000):
        rising = torch.arange(classes, dtype=torch.float32)
        input, target = (0.1 * rising).repeat(2, 1), (0.3 * rising).repeat(2, 1)
        for kind in LOGITS:
            for tensors in ((input, target), (target, input), (input.T.contiguous().T, target.flip(1))):
                check(kind, *tensors, reduction="none")


@EACH_KIND
def test_gradients_of_huge_and_tiny_upstream(kind: Kind) -> None:
    for size in (1e30, 1e-30):
        for shape in ((6, 9), (3, 515)):
            input, target = operands(kind, shape)
            check(kind, input, target, reduction="sum", grad_output=torch.tensor(size))


# --- the module, dtypes, memory, determinism -------------------------------------------------------------------------


def test_module() -> None:
    input, target = operands(KINDS["kl"], (4, 5))
    mask = rows_mask((4, 5))
    options: dict[str, Any] = {"target_logits": True, "temperature": 2.0, "reverse": True, "dtype": torch.float64}
    loss = torchce.KLDivWithLogitsLoss("sum", **options)
    assert_bitwise_equal(loss(input, target, mask), ours.kl_div_with_logits(input, target, "sum", mask=mask, **options))
    fields = "reduction='sum', target_logits=True, temperature=2.0, reverse=True, dtype=torch.float64"
    assert repr(loss) == f"KLDivWithLogitsLoss({fields})"
    assert torchce.KLDivWithLogitsLoss()(input, input.softmax(1)).item() == pytest.approx(0, abs=1e-6)


@EACH_KIND
def test_dtype_of_the_loss(kind: Kind) -> None:
    input, target = operands(kind, (4, 9), torch.bfloat16)
    exact = kind(*(None if t is None else t.double() for t in (input, target)), "none")
    for dtype in cases.DTYPES:
        loss = kind(input, target, "none", dtype=dtype)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), exact, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert kind(input, target).dtype == torch.float32
        x = leaf(input)
        kind(x, target).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@EACH_KIND
def test_same_bits_for_every_number_of_threads(kind: Kind, restore_threads: None) -> None:
    for shape in ((300, 700), (5000, 19), (2, 19, 70, 70)):
        divergences.assert_same_bits_for_every_number_of_threads(kind, operands(kind, shape))


# --- errors ----------------------------------------------------------------------------------------------------------

X, T = torch.zeros(3, 5), torch.full((3, 5), 0.2)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((X, T[:, :4]), {}, r"target: expected the input's shape \[3, 5\], got \[3, 4\]"),
        ((X, torch.zeros(3, dtype=torch.int64)), {}, "target: expected a floating point tensor"),
        ((X.long(), T), {}, "input: expected a floating point tensor"),
        ((X.to(torch.complex64), T), {}, "input: expected a floating point tensor"),
        ((X, None), {}, "target: expected a Tensor, got NoneType"),
        ((X[0, 0], T[0, 0]), {}, "input: expected at least one dimension"),
        ((X[:, :0], T[:, :0]), {}, r"input: expected at least one class, got shape \[3, 0\]"),
        ((X, T), {"temperature": 0}, "temperature: expected a positive number .* got 0"),
        ((X, T), {"temperature": -1.5}, "temperature: expected a positive number .* got -1.5"),
        ((X, T), {"temperature": math.nan}, "temperature: expected a positive number"),
        ((X, T), {"temperature": INF}, "temperature: expected a positive number"),
        ((X, T), {"temperature": "2"}, "temperature: expected a positive number"),
        ((X, T), {"temperature": 1e-50}, "temperature: expected a positive number within the range of torch.float32"),
        ((X, T), {"target_logits": 1}, "target_logits: expected a bool, got 1"),
        ((X, T), {"reverse": None}, "reverse: expected a bool, got None"),
        (
            (X, T),
            {"mask": torch.ones(3)},
            r"mask: expected a bool tensor of shape \[3\].* got torch.strided torch.float32 \[3\]",
        ),
        ((X, T), {"mask": torch.ones(3).bool().to_sparse()}, r"mask: expected a bool tensor .* got torch.sparse_coo"),
        ((X, T), {"mask": torch.ones(3, 5).bool()}, r"mask: expected a bool tensor of shape \[3\]"),
        ((X, T), {"mask": [True] * 3}, "mask: expected a bool tensor"),
        ((X, T), {"dtype": torch.int64}, "dtype: expected a floating point dtype"),
        ((X, T, "batchmean"), {}, "batchmean"),
        ((X, T), {"temperature": 1e39}, "temperature: expected a positive number"),
        ((X, T.to("meta")), {}, "target: expected a tensor on cpu, got one on meta"),
        ((X, T), {"mask": torch.ones(3).bool().to("meta")}, "mask: expected a tensor on cpu, got one on meta"),
        ((X.to_sparse(), T), {}, "input: expected a strided tensor, got a torch.sparse_coo one"),
        ((torch.nested.nested_tensor([X[0], X[1]]), T), {}, "input: expected a strided tensor, got a nested one"),
    ],
)
def test_errors(arguments: tuple[Any, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ours.kl_div_with_logits(*arguments, **options)


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan, "1", None, True])
def test_beta_is_a_share(beta: Any) -> None:
    with pytest.raises(ValueError, match="beta: expected a number from 0 to 1"):
        ours.js_div_with_logits(X, T, beta=beta)


def test_ops_check_what_keeps_memory_safe() -> None:
    ops = torch.ops.torchce
    for arguments, words in (
        ((X, T[:, :4], None, None, 0, 1, False), "target: expected the input's shape"),
        ((X, None, None, None, 0, 1, False), "target: expected one"),
        ((X, T, None, None, 3, 1, False), "target: expected none beside an entropy"),
        ((X, T, torch.ones(4).bool(), None, 0, 1, False), "mask: expected shape"),
        ((X, T, torch.ones(3), None, 0, 1, False), "mask: expected bool"),
        ((X, T, None, None, 7, 1, False), "kind: expected"),
        ((X, T, None, None, 0, 1, False, 0.0), "temperature: expected a positive number"),
        ((X, T, None, None, 2, 1, False, 1.0, 1.5), "beta: expected"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.divergence_forward(*arguments)
    _, statistics, totals = ops.divergence_forward(X, T, None, None, 0, 1, False)
    g = torch.ones(())
    for arguments, words in (
        ((g, X, T, None, statistics[:2], totals, True, True, 0, 1, False), "statistics: not what the forward returned"),
        ((g, X, T, None, statistics, totals[:0], True, True, 0, 1, False), "totals: not what the forward returned"),
        ((torch.ones(3), X, T, None, statistics, totals, True, True, 0, 1, False), "grad_output: expected"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.divergence_backward(*arguments)


def test_reference_is_torchs_composition_in_float64() -> None:
    """The oracle has no slip that ours might share."""
    for kind in KINDS.values():
        input, target = operands(kind, (5, 7, 3), torch.float64)
        options: dict[str, Any] = {"temperature": 1.3, "mask": rows_mask((5, 7, 3)), "reduction": "sum"}
        theirs = value_and_gradients(
            lambda x, t, k=kind, o=options: divergences.composed(k, x, t, **o), (input, target)
        )
        truths = truth(kind, input, target, grad_output=divergences.grad_output_for(theirs[0]), **options)
        for their, true in zip(theirs, truths, strict=True):
            if true is not None:
                torch.testing.assert_close(their, true.value, rtol=1e-11, atol=1e-12)
