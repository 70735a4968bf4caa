"""The contrast operators of every backend against dense float64 cross-entropy: tiles, masks, and split batches."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from pmrl_kernels import dominant_singular_triplet, instance_contrastive_loss, ops, pmrl_loss
from tests.tools.backends import by_dtype, operators
from tests.tools.contrasts import Calls
from tests.tools.functions import EVERY_CONTRAST

FLOAT32, FLOAT64 = torch.float32, torch.float64
# One row, packs and tiles nearly full, several tiles; the last is too large for its similarities to be kept.
SIZES = [(1, 3), (2, 1), (31, 4), (127, 8), (129, 33), (300, 16), (2100, 5)]


native_only = pytest.mark.skipif("native" not in ops.available, reason="the native library is not built here")


class Case(NamedTuple):
    z: list[Tensor]
    u: Tensor
    mask: Tensor | None


def case(k: int, B: int, d: int, dtype: torch.dtype, *, masked: bool = False, scale: float = 1.0) -> Case:
    """Unit vectors; with a mask, some modalities are missing, some instances have none, and buffers hold NaN."""
    generator = torch.Generator().manual_seed(B + 7 * d + k)

    def vectors() -> Tensor:
        return normalize(torch.randn(B, d, dtype=FLOAT64, generator=generator), dim=1).to(dtype) * scale

    z, u = [vectors() for _ in range(k)], vectors()
    if not masked:
        return Case(z, u, None)
    mask = torch.rand(B, k, generator=generator) < 0.7
    mask[::5] = False
    u = u * mask.any(1, keepdim=True)
    z = [x.masked_fill(~mask[:, m, None], torch.nan) for m, x in enumerate(z)]
    return Case(z, u, mask)


class Dense(NamedTuple):
    loss: Tensor
    grads: tuple[Tensor, ...]


def dense_instance(u: Tensor, tau: float) -> Dense:
    """cross_entropy over the rows that are not zero, by autograd in float64; gradients of u and of τ."""
    u, t = u.detach().double().requires_grad_(), torch.tensor(tau, dtype=FLOAT64, requires_grad=True)
    v = u[(u != 0).any(1).nonzero()[:, 0]]
    s = (v @ v.T).fill_diagonal_(1.0) / t if len(v) else v @ v.T
    loss = cross_entropy(s, torch.arange(len(v))) if len(v) else u.sum() * t * 0
    return Dense(loss.detach(), torch.autograd.grad(loss, (u, t)))


def dense_modality(z: list[Tensor], u: Tensor, mask: Tensor | None, tau: float) -> Dense:
    """The same for the modality contrast; gradients of the z, of u and of τ."""
    mask = torch.ones(len(u), len(z), dtype=torch.bool) if mask is None else mask
    z = [x.double().nan_to_num().requires_grad_() for x in z]
    u, t = u.detach().double().requires_grad_(), torch.tensor(tau, dtype=FLOAT64, requires_grad=True)
    valid = (u != 0).any(1)
    total = sum(x.sum() for x in z) * u.sum() * t * 0
    for m, x in enumerate(z):
        here = valid & mask[:, m]
        if not here.any():
            continue
        target = torch.arange(len(u))[here]
        forth = (x[here] @ u.T / t).masked_fill(~valid, -torch.inf)
        back = (u[here] @ x.T / t).masked_fill(~here, -torch.inf)
        total = total + cross_entropy(forth, target, reduction="sum") + cross_entropy(back, target, reduction="sum")
    loss = total / (2 * (mask & valid[:, None]).sum().clamp_min(1))
    return Dense(loss.detach(), torch.autograd.grad(loss, (*z, u, t)))


@functools.cache
def dense(B: int, d: int, masked: bool, dtype: torch.dtype, tau: float) -> Dense:
    """``dense_modality`` of such a case of two modalities, which takes longer than a backend does: once for all."""
    return dense_modality(*case(2, B, d, dtype, masked=masked), tau)


@functools.cache
def huge(B: int, d: int, dtype: torch.dtype, scale: float, tau: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Embeddings of norms up to ``scale``, and the gradients where they are on both sides; once for all backends."""
    x = case(1, B, d, FLOAT64).z[0]
    x = (x * torch.linspace(0.5, 1.0, B, dtype=FLOAT64)[:, None] * scale).to(dtype)
    return x, dense_modality([x.double()], x.double(), None, tau).grads


def assert_near(
    found: Tensor, expected: Tensor, dtype: torch.dtype, tau: float, projected: Tensor | None = None
) -> None:
    """Within what rounding similarities costs, relative to the largest entry or to the terms it was summed from.

    The dense oracle, logsumexp − positive in float64, has an error of its own.
    """
    if projected is not None:  # along a unit vector the gradient says nothing, and "1 by definition" has none
        found, expected = (x - (x * projected).sum(1, keepdim=True) * projected for x in (found, expected))
    assert found.shape == expected.shape
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    terms = 0.0
    if expected.dim() == 2:
        counted = max(1, int((expected != 0).any(1).sum()))
        terms = 24 / (tau * counted) * max(1.0, (counted / 1000) ** 0.5)  # libraries may add up one after the other
    eps = torch.finfo(dtype).eps
    bound = (4 + 4 / tau) * eps * scale + 4 * eps * terms + 1e-15 / tau**2
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


def split(B: int) -> list[slice]:
    """Batches of four processes, uneven, one of them empty."""
    cuts = [0, B // 3, B // 3, B // 2 + (B > 1), B]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("tau", [0.5, 0.05])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["all", "zero rows"])
@pytest.mark.parametrize(("B", "d"), SIZES)
def test_instances(backend, B, d, zeros, dtype, tau):
    """Whole, and split over processes: the parts' losses add up, and their gradients are the whole one's."""
    ops = Calls(by_dtype(backend))
    u = case(0, B, d, dtype).u
    if zeros:
        u[::3] = 0
    expected = dense_instance(u, tau)
    t, upstream = torch.tensor(tau, dtype=FLOAT64), torch.tensor(-3.0)

    loss, losses, state = ops.instance_forward(u, None, 0, t, 1.0)
    assert_near(loss, expected.loss, dtype, tau)
    h, slope = ops.instance_backward(u, None, 0, t, 1.0, losses, state, upstream)
    assert_near(h, -3 * expected.grads[0], dtype, tau, u.double())
    assert_near(slope, -3 * expected.grads[1], dtype, tau)

    parts = split(B)
    found = [ops.instance_forward(u[rows], u, rows.start, t, 1.0) for rows in parts]
    assert_near(sum(x[0].double() for x in found), expected.loss, dtype, tau)
    every = torch.cat([x[1] for x in found])
    assert_near(every, losses.double(), dtype, tau)
    back = [
        ops.instance_backward(u[rows], u, rows.start, t, 1.0, every, x[2], upstream)
        for rows, x in zip(parts, found, strict=True)
    ]
    assert_near(torch.cat([x[0] for x in back]), -3 * expected.grads[0], dtype, tau, u.double())
    assert_near(sum(x[1] for x in back), -3 * expected.grads[1], dtype, tau)


@pytest.mark.parametrize("tau", [0.5, 0.02])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("B", "d"), SIZES)
def test_modalities(backend, B, d, masked, dtype, tau):
    """The same, with losses both ways. At τ = 0.02 exponentials of similarities leave float32's range."""
    ops, k = Calls(by_dtype(backend)), 2
    z, u, mask = case(k, B, d, dtype, masked=masked)
    expected = dense(B, d, masked, dtype, tau)
    t, upstream = torch.tensor(tau, dtype=FLOAT64), torch.tensor(-3.0)

    def present(grads: list[Tensor]) -> list[Tensor]:
        """What comes back for absent embeddings says nothing."""
        return [x if mask is None else x.masked_fill(~mask[:, m, None], 0) for m, x in enumerate(grads)]

    loss, losses, state = ops.modality_forward(z, u, mask, [], None, 0, False, t, 1.0)
    assert_near(loss, expected.loss, dtype, tau)
    H, h, slope = ops.modality_backward(z, u, mask, [], None, 0, False, t, 1.0, losses, state, upstream)
    for a, b in zip((*present(H), h, slope), expected.grads, strict=True):
        assert_near(a, -3 * b, dtype, tau)

    parts, columns = split(B), [u, *(x.nan_to_num() for x in z)]
    arguments = [
        ([x[r] for x in z], u[r], None if mask is None else mask[r], columns, mask, r.start, False, t, 1.0)
        for r in parts
    ]
    found = [ops.modality_forward(*x) for x in arguments]
    assert_near(sum(x[0].double() for x in found), expected.loss, dtype, tau)
    every = torch.cat([x[1] for x in found], 2)
    assert_near(every, losses.double(), dtype, tau)
    back = [ops.modality_backward(*a, every, x[2], upstream) for a, x in zip(arguments, found, strict=True)]
    whole = [torch.cat([x[0][m] for x in back]) for m in range(k)]
    for a, b in zip((*present(whole), torch.cat([x[1] for x in back])), expected.grads, strict=False):
        assert_near(a, -3 * b, dtype, tau)
    assert_near(sum(x[2] for x in back), -3 * expected.grads[-1], dtype, tau)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4, 1e5, 1e7, 1e9, 1e15, 1e25])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_embeddings_of_other_norms(backend, dtype, scale):
    """As with ``normalize=False``: exponentials of raw similarities are out of range, their differences are not."""
    ops = Calls(by_dtype(backend), any_norm=True)
    z, u, _ = case(2, 150, 9, dtype)
    z = [x * scale for x in z]
    expected = dense_modality(z, u, None, 0.1)
    loss, losses, state = ops.modality_forward(z, u, None, [], None, 0, False, None, 0.1)
    H, h, _ = ops.modality_backward(z, u, None, [], None, 0, False, None, 0.1, losses, state, torch.ones(()))
    # Rounding similarities of norm `scale` moves their differences over tau by so much, as long as it is little.
    smooth = min(8 * torch.finfo(dtype).eps * max(1.0, scale) / 0.1, 1e-3)
    for a, b in zip((loss, *H, h), (expected.loss, *expected.grads[:-1]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=smooth * float(b.abs().max()) + 1e-15)


@native_only
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("scale", [3e2, 3e3, 3e4, 3e5, 3e6, 3e10, 3e11])
def test_large_similarities_are_as_exact_as_the_reference(dtype, scale):
    """Probabilities come from differences to the log of their sum, not to a positive far away."""
    z, u, _ = case(2, 150, 9, dtype)
    z = [x * scale for x in z]
    exact = dense_modality(z, u, None, 0.1).grads
    errors = {}
    for name in ("native", "reference"):
        ops = Calls(by_dtype(name), any_norm=True)
        _, losses, state = ops.modality_forward(z, u, None, [], None, 0, False, None, 0.1)
        H, h, _ = ops.modality_backward(z, u, None, [], None, 0, False, None, 0.1, losses, state, torch.ones(()))
        errors[name] = max(float((a.double() - b).norm() / b.norm()) for a, b in zip((*H, h), exact, strict=False))
    eps = torch.finfo(dtype).eps
    # Losses travel in float64, and what rounding takes from them counts in an exponent.
    assert errors["native"] <= 3 * errors["reference"] + 2 * eps + 2**-52 * scale / 0.1, errors


@pytest.mark.parametrize("tau", [1e-5, 1e-7, 3e-8, 1e-9, 1e-20, 1e-38, 1e-39])
def test_tiny_temperatures(backend, tau):
    """Equal rows, whose similarity rounds to a little above 1 or below, and others."""
    ops = Calls(by_dtype(backend))
    generator = torch.Generator().manual_seed(0)
    u = normalize(torch.randn(40, 7, generator=generator), dim=1)
    u[1::2] = u[::2]
    loss, losses, state = ops.instance_forward(u, None, 0, None, tau)
    h, _ = ops.instance_backward(u, None, 0, None, tau, losses, state, torch.full((), tau))
    rounding = float(((u @ u.T).fill_diagonal_(-1).max() - 1).abs() + 1e-6) / tau
    assert 0 <= float(loss) <= rounding + 1
    assert h.isfinite().all()
    assert float(h.norm(dim=1).max()) <= 4.1 / len(u)
    z = [u.flip(0), u]
    loss, losses, state = ops.modality_forward(z, u, None, [], None, 0, False, None, tau)
    H, h, _ = ops.modality_backward(z, u, None, [], None, 0, False, None, tau, losses, state, torch.full((), tau))
    if tau > 1e-38:  # beyond, similarities over tau leave float32
        assert loss.isfinite()
        assert all(x.isfinite().all() for x in (*H, h))


@pytest.mark.parametrize("tau", [1e2, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_slopes_at_large_temperatures(backend, dtype, tau):
    """Where all probabilities are alike, ∂/∂τ is −Σ(s − s⁺)/(Nτ)²: of differences, not of their exponentials."""
    ops, B, one = Calls(by_dtype(backend)), 60, torch.ones(())
    (z,), u, _ = case(1, B, 9, dtype)
    t = torch.tensor(tau, dtype=FLOAT64)
    wide, others = [x.double() for x in (z, u)], 1 - torch.eye(B, dtype=FLOAT64)
    _, losses, state = ops.instance_forward(u, None, 0, t, 1.0)
    _, slope = ops.instance_backward(u, None, 0, t, 1.0, losses, state, one)
    expected = ((1 - wide[1] @ wide[1].T) * others).sum() / (B * tau) ** 2
    torch.testing.assert_close(slope, expected, rtol=1e-5 + 2 / tau, atol=0)
    _, losses, state = ops.modality_forward([z], u, None, [], None, 0, False, t, 1.0)
    _, _, slope = ops.modality_backward([z], u, None, [], None, 0, False, t, 1.0, losses, state, one)
    s = wide[0] @ wide[1].T
    expected = ((s.diagonal()[:, None] + s.diagonal() - 2 * s) * others).sum() / (B * tau) ** 2 / 2
    torch.testing.assert_close(slope, expected, rtol=1e-4 + 20 / tau, atol=0)


@pytest.mark.parametrize("tau", [1.0, 1e-4])
@pytest.mark.parametrize("scale", [10.0, 1e5, 1e9, 1e16])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize(("B", "d"), [(130, 7), (1500, 3)])
def test_huge_embeddings_on_both_sides(backend, dtype, scale, tau, B, d):
    """The most similar other vector gets all the weight, though the loss in the state is rounded by more than 1/τ.

    Rows of several processes see the same weights as those of one, up to the rounding of similarities: libraries do not
    round a product's rows the same way whatever rows it has. Where that is more than τ there are no weights to compare.
    """
    ops = Calls(by_dtype(backend))
    near = {"rtol": 1e-2, "atol": 1e-4 / (tau * B)}
    embeddings, exact = huge(B, d, dtype, scale, tau)
    x = [embeddings]
    arguments = (None, [], None, 0, True, None, tau)
    _, losses, state = ops.modality_forward(x, x[0], *arguments)
    (H,), h, _ = ops.modality_backward(x, x[0], *arguments, losses, state, torch.ones(()))
    wide = [y.double() for y in x]
    for found, expected in ((H, exact[0]), (h, exact[1])):
        torch.testing.assert_close(found.double() / scale, expected / scale, **near)
    every = [x[0], *x]
    shares = [([x[0][rows]], x[0][rows], None, every, None, rows.start, True, None, tau) for rows in split(B)]
    found = [ops.modality_forward(*share) for share in shares]
    losses = torch.cat([losses for _, losses, _ in found], 2)
    parts = [
        ops.modality_backward(*share, losses, saved, torch.ones(()))
        for share, (_, _, saved) in zip(shares, found, strict=True)
    ]
    squares = wide[0].square().sum(1)
    comparable = torch.finfo(dtype).eps * d * float(squares.max()) / tau < 2.5e-3
    assert comparable or scale > 10 or (dtype, tau) == (FLOAT32, 1e-4)
    for together, alone in ((torch.cat([p[0][0] for p in parts]), H), (torch.cat([p[1] for p in parts]), h)):
        if comparable:
            torch.testing.assert_close(together / scale, alone / scale, **near)
        assert float(together.abs().max()) <= 3 * float(wide[0].abs().max()) / tau  # no weight of more than 2, nor NaN


def test_the_same_bits_twice_and_after_another_batch(backend):
    ops = Calls(by_dtype(backend))
    z, u, _ = case(2, 300, 16, FLOAT32)

    def run() -> list[Tensor]:
        loss, losses, state = ops.modality_forward(z, u, None, [], None, 0, False, None, 0.1)
        H, h, _ = ops.modality_backward(z, u, None, [], None, 0, False, None, 0.1, losses, state, torch.ones(()))
        one, own, saved = ops.instance_forward(u, None, 0, None, 0.1)
        g, _ = ops.instance_backward(u, None, 0, None, 0.1, own, saved, torch.ones(()))
        return [loss, losses, *H, h, one, own, g]

    first = run()
    ops.instance_forward(u[:50], None, 0, None, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_vector_shows_everywhere(backend, bad):
    ops = Calls(by_dtype(backend))
    z, u, _ = case(2, 40, 6, FLOAT32)
    z[1][7, 2] = bad
    loss, losses, state = ops.modality_forward(z, u, None, [], None, 0, False, None, 0.1)
    H, h, _ = ops.modality_backward(z, u, None, [], None, 0, False, None, 0.1, losses, state, torch.ones(()))
    assert all(x.isnan().all() for x in (loss, h, H[1]))
    u[3, 0] = torch.nan
    loss, losses, state = ops.instance_forward(u, None, 0, None, 0.1)
    h, _ = ops.instance_backward(u, None, 0, None, 0.1, losses, state, torch.ones(()))
    assert all(x.isnan().all() for x in (loss, h))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sizes", [(0, 1), (0, 1, 0), (0, 3), (2, 3)], ids=str)
def test_a_bad_vector_of_one_process_shows_on_all(backend, sizes, bad):
    """On one that has no rows, and where it is the only row of the world. One process's ∂/∂τ is of its own rows."""
    ops, one, tau = Calls(by_dtype(backend)), torch.ones(()), torch.tensor(0.3)
    z, u, _ = case(2, sum(sizes), 6, FLOAT32)
    z[1][-1, 2], u[-1, 3] = bad, torch.nan
    ends = list(itertools.accumulate(sizes))
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    shares = [ops.instance_forward(u[rows], u, rows.start, tau, 1.0) for rows in parts]
    losses = torch.cat([x[1] for x in shares])
    for rows, (loss, _, state) in zip(parts, shares, strict=True):
        h, slope = ops.instance_backward(u[rows], u, rows.start, tau, 1.0, losses, state, one)
        assert all(x.isnan().all() for x in (loss, h, slope))

    mask = torch.ones(len(u), 2, dtype=torch.bool)
    for raw, present in ((False, None), (False, mask), (True, None)):
        arguments = [
            ([x[r] for x in z], u[r], None if present is None else present[r], [u, *z], present, r.start, raw, tau, 1.0)
            for r in parts
        ]
        shares = [ops.modality_forward(*x) for x in arguments]
        losses = torch.cat([x[1] for x in shares], 2)
        for given, (loss, _, state) in zip(arguments, shares, strict=True):
            _, h, slope = ops.modality_backward(*given, losses, state, one)
            assert all(x.isnan().all() for x in (loss, h, slope))


@pytest.mark.parametrize("tau", [0.02, 0.05, 0.1])
def test_float32_is_as_good_as_cross_entropy(backend, tau):
    """Of rows that nearly repeat one another, where a loss depends on rounding most."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(16, 64, generator=generator, dtype=FLOAT64)
    x = centres.repeat(12, 1) + 0.3 * torch.randn(192, 64, generator=generator, dtype=FLOAT64)
    x = x.float().requires_grad_()

    def plain(x: Tensor) -> Tensor:
        v = normalize(x, dim=1)
        return cross_entropy(v @ v.T / tau, torch.arange(len(v)))

    def error(loss: Tensor) -> tuple[float, float]:
        (grad,) = torch.autograd.grad(loss, x)
        return float((loss.detach().double() - exact.detach()).abs()), float((grad.double() - exact_grad).norm())

    wide = x.detach().double().requires_grad_()
    exact = plain(wide)
    (exact_grad,) = torch.autograd.grad(exact, wide)
    ours, theirs = error(instance_contrastive_loss(x, tau, backend=backend)), error(plain(x))
    assert ours[0] <= theirs[0] + 2e-7 / tau * float(exact.detach())
    assert ours[1] <= 2 * theirs[1]


@pytest.mark.parametrize("allowed", ["high", "medium"])
@pytest.mark.parametrize("contrast", EVERY_CONTRAST)
def test_reduced_precision_of_float32_products(backend, matmul_precision, contrast, allowed):
    """PyTorch may then round factors to bfloat16, where a processor multiplies such: in float32 contrasts alone."""
    generator = torch.Generator().manual_seed(0)
    shared, *xs = torch.randn(4, 256, 64, generator=generator, dtype=FLOAT64)
    xs = [shared + 0.3 * x for x in xs]

    def run(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """What must be the same to the bit, and what need not be: values, and gradients of the contrast."""
        leaves = [x.to(dtype).requires_grad_() for x in xs]
        parts = pmrl_loss(leaves, contrast=contrast, return_components=True, backend=backend)
        slopes = torch.autograd.grad(parts.alignment, leaves, retain_graph=True)
        products = [parts.instance, *torch.autograd.grad(parts.instance, leaves)]
        others = [parts.alignment, *slopes, *dominant_singular_triplet(leaves, backend=backend)]
        return ([*others, *products], []) if dtype == FLOAT64 else (others, products)

    before = [run(dtype) for dtype in (FLOAT32, FLOAT64)]
    matmul_precision(allowed)
    after = [run(dtype) for dtype in (FLOAT32, FLOAT64)]
    for (same, near), (exact, expected) in zip(after, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(same, exact, strict=True))
        for a, b in zip(near, expected, strict=True):
            assert float((a - b).detach().norm()) <= 2**-8 / 0.1 * float(b.detach().norm())


BAD_ARGUMENTS = {
    "integers": lambda u, z: (u.int(), None, 0, None, 0.5),
    "another width": lambda u, z: (u, z[0][:, :2], 0, None, 0.5),
    "another dtype": lambda u, z: (u, u.double(), 0, None, 0.5),
    "outside": lambda u, z: (u, u, 3, None, 0.5),
    "before": lambda u, z: (u, u, -1, None, 0.5),
    "a vector": lambda u, z: (u[0], None, 0, None, 0.5),
}
BAD_PAIRS = {
    "half a pair": ([0, 1, 1], [True] * 3),
    "no such vector": ([0, 3], [True] * 3),
    "a negative index": ([-1, 0], [True] * 3),
    "some with themselves": ([0, 0, 0, 1], [True] * 3),
    "too few directions": ([0, 1], [True] * 2),
}


@native_only
@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_the_library_refuses_nonsense(what):
    """Arguments are checked in Python; the operators check again whatever a read or a write depends on."""
    z, u, _ = case(2, 8, 4, FLOAT32)
    with pytest.raises(RuntimeError, match="pmrl_kernels"):
        Calls(operators("native")).instance_forward(*BAD_ARGUMENTS[what](u, z))


@native_only
@pytest.mark.parametrize("what", BAD_PAIRS)
def test_the_library_refuses_pairs_that_are_none(what):
    pairs, directions = BAD_PAIRS[what]
    z, u, _ = case(2, 8, 4, FLOAT32)
    with pytest.raises(RuntimeError, match="pmrl_kernels: pairs"):
        operators("native").paired_forward([u, *z], pairs, directions, None, [], None, 0, None, 0.5)


@native_only
def test_the_library_refuses_losses_and_states_of_other_batches():
    z, u, _ = case(2, 8, 4, FLOAT32)
    ops, one = Calls(operators("native")), torch.ones(())
    _, losses, state = ops.instance_forward(u, None, 0, None, 0.5)
    for bad in (
        (losses[:-1], state, one),
        (losses, state[:-1], one),
        (losses, state.double(), one),
        (losses, state, losses),
    ):
        with pytest.raises(RuntimeError, match="pmrl_kernels"):
            ops.instance_backward(u, None, 0, None, 0.5, *bad)
    _, losses, state = ops.modality_forward(z, u, None, [], None, 0, False, None, 0.5)
    for bad in ((losses[:1], state, one), (losses, state[:-1], one), (losses, state, losses)):
        with pytest.raises(RuntimeError, match="pmrl_kernels"):
            ops.modality_backward(z, u, None, [], None, 0, False, None, 0.5, *bad)
    for arguments in (
        (z, u, torch.ones(8, 4, dtype=torch.bool), []),
        (z, u, torch.ones(7, 2, dtype=torch.bool), []),
        (z, u, None, [u, z[0]]),
        ([z[0][:3], z[1]], u, None, []),
    ):
        with pytest.raises(RuntimeError, match="pmrl_kernels"):
            ops.modality_forward(*arguments, None, 0, False, None, 0.5)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_processes_of_one_row_of_any_norm(backend, dtype):
    """Their products round otherwise than those of many rows, and a similarity may exceed the logsumexp of all."""
    ops = Calls(by_dtype(backend), any_norm=True)
    B, tau, one = 130, 1e-4, torch.ones(())
    for scale in (1e3, 1e9):
        z = case(1, B, 257, dtype).z[0] * scale
        u = z.roll(1, 0).contiguous()  # each is nearest to another one's
        parts = [slice(0, 1), slice(1, 2), slice(2, B)]
        shares = [([z[r]], u[r], None, [u, z], None, r.start, True, None, tau) for r in parts]
        found = [ops.modality_forward(*share) for share in shares]
        losses = torch.cat([x for _, x, _ in found], 2)
        for share, (_, _, state) in zip(shares, found, strict=True):
            (H,), h, _ = ops.modality_backward(*share, losses, state, one)
            assert float(torch.maximum(H.abs().max(), h.abs().max())) <= 3 * scale / tau
