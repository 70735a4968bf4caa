"""Singular values that are equal, or nearly: full alignment, ties at the top, gaps around the smallest that counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    instance_contrastive_loss,
    pmrl_loss,
    singular_values,
)
from pmrl_kernels.ops import constants
from pmrl_kernels.ops.spectral import spec
from pmrl_kernels.spectral import _spectral
from tests.tools import tolerances as tol
from tests.tools.functions import (
    DTYPES,
    MIXING,
    OBJECTIVES,
    PER_INSTANCE,
    almost_equal,
    finite,
    grads,
    leaves,
    svdvals64,
    with_spectrum,
)

# ------------------------------------------------------------------------------------------------
# Full alignment
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("departure", [1e-6, 1e-8, 1e-10, 1e-12, 0.0])
@pytest.mark.parametrize("k", [2, 3, 6, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearly_equal_modalities(backend, device, dtype, k, departure, objective):
    """Finite, and steps from there do not raise the loss.

    σ₂ enters the loss like a norm, with a kink at 0: a step must be short beside it not to jump across.
    At the very optimum the gradient is 0 and any step will do.
    """
    step = 0.1 * departure**0.5 if departure else 1.0
    xs = leaves(almost_equal(k, 4, 64, departure), device, dtype)
    losses = []
    for _ in range(6):
        loss = dominant_sv_loss(xs, temperature=0.5, objective=objective, backend=backend)
        losses.append(float(loss.detach()))
        found = grads(loss, xs)
        assert finite(loss, *found)
        with torch.no_grad():
            for x, g in zip(xs, found, strict=True):
                x -= step * g
    # Rounding the stepped inputs moves σ₂ by about their epsilon, and ‖Z‖ − σ₁ by its square.
    eps = torch.finfo(dtype).eps
    noise = k * eps / 0.5 if objective == "softmax" else 16 * k * max(eps**2, tol.EPS64)
    assert max(losses) <= losses[0] * (1 + 1e-6) + noise


@pytest.mark.parametrize("k", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_modalities_have_zero_gradient(backend, device, dtype, k, objective):
    """The minimum-norm subgradient at the optimum is 0: LAPACK's arbitrary vectors would push away from it."""
    x = torch.randn(5, 40)
    xs = leaves([x] * k, device, dtype)
    loss = dominant_sv_loss(xs, temperature=0.5, objective=objective, reduction="sum", backend=backend)
    for g in grads(loss, xs):
        assert g.abs().max() <= 1e-6 * (1 if dtype != torch.float64 else 1e-6)
    sigma = singular_values(xs, backend=backend)
    torch.testing.assert_close(sigma[:, 0], torch.full_like(sigma[:, 0], k**0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modalities_equal_in_pairs(backend, device, dtype):
    a, b = torch.randn(4, 24), torch.randn(4, 24)
    xs = leaves([a, a, b, b], device, dtype)
    for function in (*PER_INSTANCE.values(), *MIXING.values()):
        out = function(xs, backend=backend)
        found = grads(out.sum(), xs)
        assert finite(out, *found)
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[2], found[3])


# ------------------------------------------------------------------------------------------------
# Ties at the top
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orthonormal_modalities(backend, device, dtype, k):
    """All singular values equal: u₁ is the direction of the mean, for every function and any order."""
    eye = torch.eye(16)[:k]
    xs = leaves([eye[m].expand(3, 16) for m in range(k)], device, dtype)
    sigma, u, v = dominant_singular_triplet(xs, backend=backend)
    torch.testing.assert_close(sigma, torch.ones_like(sigma))
    torch.testing.assert_close(v, torch.full_like(v, k**-0.5))
    torch.testing.assert_close(u[:, :k], torch.full_like(v, k**-0.5))
    for function in (*PER_INSTANCE.values(), *MIXING.values()):
        out = function(xs, backend=backend)
        assert finite(out, *grads(out.sum(), xs))
    # A descent step from the tie descends, and favours no modality.
    for objective in OBJECTIVES:
        loss = dominant_sv_loss(xs, objective=objective, temperature=1.0, reduction="sum", backend=backend)
        found = grads(loss, xs)
        with torch.no_grad():
            stepped = [x - 0.1 * g for x, g in zip(xs, found, strict=True)]
        assert dominant_sv_loss(stepped, objective=objective, temperature=1.0, reduction="sum") < loss
        norms = torch.stack([torch.linalg.vector_norm(g.double()) for g in found])
        torch.testing.assert_close(norms, norms[:1].expand(k), rtol=1e-2, atol=0)


@pytest.mark.parametrize("departure", [1e-16, 1e-12, 1e-9, 1e-8, 1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_near_ties_at_the_top(backend, device, dtype, departure):
    """Gaps across the tie threshold: finite, σ right, gradients bounded by the threshold's reciprocal."""
    sigma = torch.tensor([1.0, 1.0 - departure, 0.5], dtype=torch.float64)
    xs = leaves(with_spectrum(sigma, 5, 20), device, dtype)
    for function in (*PER_INSTANCE.values(), *MIXING.values()):
        out = function(xs, normalize=False, backend=backend)
        assert finite(out, *grads(out.sum(), xs))
    wanted = svdvals64(xs, False)
    bound = tol.SIGMA_32 if dtype == torch.float32 else 16 * tol.EPS64
    ours = dominant_singular_value(xs, normalize=False, backend=backend).cpu().double()
    assert ((ours - wanted[:, 0]).abs() <= bound * wanted[:, 0]).all()
    u = dominant_singular_triplet(xs, normalize=False, backend=backend).u
    torch.testing.assert_close(torch.linalg.vector_norm(u, dim=1), torch.ones_like(ours).to(u), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [2, 4, 7])
def test_ties_left_by_rounding_are_ties(backend, device, dtype, k):
    """Orthonormal up to rounding, in general position: still the direction of the mean, on both paths."""
    frames = torch.linalg.qr(torch.randn(20, 9, k, dtype=torch.float64)).Q
    xs = leaves(list(frames.unbind(2)), device, dtype)
    sigma, u, v = dominant_singular_triplet(xs, backend=backend)
    torch.testing.assert_close(v, torch.full_like(v, k**-0.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(sigma, torch.ones_like(sigma), rtol=1e-5, atol=0)
    by_path = [pmrl_loss(xs, objective=o, return_components=True, backend=backend).instance for o in OBJECTIVES]
    torch.testing.assert_close(by_path[0], by_path[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(by_path[0], instance_contrastive_loss(u, backend=backend), rtol=1e-4, atol=0)
    # no modality is favoured
    for objective in OBJECTIVES:
        loss = dominant_sv_loss(xs, objective=objective, temperature=1.0, reduction="sum", backend=backend)
        norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in grads(loss, xs)])
        torch.testing.assert_close(norms, norms[:1].expand(k, 20), rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_softmax_gradient_in_a_full_tie(backend, device, k):
    """dZ = Z(I − 11ᵀ)/(kτ): the others of the tie share the mean weight, v₁ is the oriented one."""
    frames = torch.linalg.qr(torch.randn(4, 9, k, dtype=torch.float64)).Q
    xs = leaves(list(frames.unbind(2)), device, torch.float64)
    loss = dominant_sv_loss(xs, temperature=0.3, normalize=False, reduction="sum", backend=backend)
    wanted = frames @ (torch.eye(k, dtype=torch.float64) - 1) / (k * 0.3)
    torch.testing.assert_close(torch.stack(grads(loss, xs), 2).cpu(), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "departure"), [(torch.float32, 5e-8), (torch.float64, 1e-15)], ids=str)
@pytest.mark.parametrize("output", ["u", "v"])
def test_gradients_along_a_tie_are_zero_not_huge(backend, device, dtype, departure, output):
    """Below the gap that counts nothing is divided by it."""
    sigma = torch.tensor([1.0, 1.0 - departure, 0.4], dtype=torch.float64)
    xs = leaves(with_spectrum(sigma, 6, 12), device, torch.float64)
    xs = leaves([x.detach() for x in xs], device, dtype)
    out = PER_INSTANCE[output](xs, normalize=False, backend=backend)
    found = grads((out * torch.randn_like(out)).sum(), xs)
    assert all(g.abs().max() < 50 for g in found)


# ------------------------------------------------------------------------------------------------
# The sign of the leading vectors
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_antipodal_pairs_are_oriented_by_the_first_modality(backend, device, dtype):
    """v₁'s entries sum to 0 up to rounding: a coin toss per run without the second rule."""
    x, y = torch.randn(6, 17), 0.1 * torch.randn(6, 17)
    xs = leaves([x, -x], device, dtype)
    v = dominant_singular_triplet(xs, backend=backend).v
    torch.testing.assert_close(
        v, torch.tensor([0.5, -0.5], device=device).sign().to(v) * (0.5**0.5) + torch.zeros_like(v)
    )
    xs = leaves([-y, 2 * x, -2 * x, y], device, dtype)
    v = dominant_singular_triplet(xs, normalize=False, backend=backend).v
    assert (v[:, 1] > 0.6).all()
    assert (v[:, 2] < -0.6).all()
    for function in (*PER_INSTANCE.values(), *MIXING.values()):
        out = function(xs, backend=backend)
        assert finite(out, *grads(out.sum(), xs))


def test_antipodal_up_to_rounding(backend, device):
    """Entries of v₁ that differ in their last digits count as equal: the first modality decides, whoever computes."""
    x = torch.randn(8, 5, dtype=torch.float64)
    for stretch in (1 + 1e-9, 1 - 1e-9, 1.0):
        xs = leaves([x, -x * stretch], device, torch.float64)
        v = dominant_singular_triplet(xs, normalize=False, backend=backend).v
        # 1e-9 leaves a sum that is not zero: the larger modality's direction, else the first's
        first = v[:, 0] > 0
        assert (first if stretch <= 1 else ~first).all()
    # v₁ = ½(1, 1, −1, −1) with noise in every entry, which must not choose the sign
    x, y = torch.randn(2, 200, 7, dtype=torch.float64)
    y = x + 0.5 * y
    for order in ([x, y, -x, -y], [-x, -y, y, x], [x, -y, -x, y]):
        v = dominant_singular_triplet(leaves(order, device, torch.float64), backend=backend).v
        assert (v[:, 0] > 0.4).all()


# ------------------------------------------------------------------------------------------------
# Both paths, around the smallest gap that counts
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_whole_and_leading_paths_agree(backend, device, objective):
    """u from the eigensolver (in ``pmrl_loss``'s softmax objective) and from power iteration are one u."""
    xs = leaves(almost_equal(4, 6, 20, 0.5), device, torch.float64)
    _, _, by_u = pmrl_loss(xs, objective=objective, return_components=True, backend=backend)
    u = dominant_singular_triplet(xs, backend=backend).u
    torch.testing.assert_close(by_u, instance_contrastive_loss(u, backend=backend), rtol=1e-9, atol=1e-12)


# Every gap around the rule, as multiples of the smallest that counts. From there to twice that, a second eigenvector
# is still left in a power iteration.
AROUND_THE_GAP = (0.01, 0.5, 0.9, 0.99, 1.01, 1.1, 1.3, 1.4, 1.5, 1.6, 1.7, 1.75, 1.8, 1.85, 1.9, 1.95, 2.0, 2.05, 2.1)
BEYOND_THE_GAP = (2.5, 3.0, 5.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e5, 1e6)


def of_the_gap(k: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Gaps (B,) from well below to far above the smallest that counts, each below 1. An interpreter takes some."""
    gaps = torch.tensor(AROUND_THE_GAP + BEYOND_THE_GAP, dtype=torch.float64)[:: 4 if backend == "triton" else 1]
    return gaps * constants.eigenvalue_gap(k, dtype == torch.float64)


def both_paths_agree(xs: list[Tensor], gaps: Tensor, normalize: bool, mask: Tensor | None, backend: str) -> Tensor:
    """The leading path's σ₁, u₁, v₁ and gradient are those of the eigensolver. Returns v₁, (B, k) in float64.

    The gap rule for float64 is but a few roundings of a Gram matrix: very near to it a backend may have two opinions.
    """
    vectors = spec.SIGMA | spec.U | spec.V
    wanted = vectors | spec.ALIGNMENT_SUM
    loss, sigma, *ours = _spectral((xs,), mask, normalize, backend, spectrum=False, wanted=wanted)
    sigmas, *theirs = _spectral((xs,), mask, normalize, backend, spectrum=True, wanted=vectors)
    wide = xs[0].dtype == torch.float64
    rounding = tol.solver(len(xs)) if wide else 4 * tol.EPS32
    torch.testing.assert_close(sigma[:, 0], sigmas[:, 0], rtol=rounding, atol=0)
    ours.append(torch.stack(grads(loss, xs), 1))
    theirs.append(torch.stack(grads((torch.linalg.vector_norm(sigmas, dim=1) - sigmas[:, 0]).sum(), xs), 1))
    # what two backward stable solvers may differ by, and the rounding of the output
    bound = 4 * tol.EPS32 + 32 * tol.EPS64 / gaps.clamp_min(tol.EPS64)
    opinion = (gaps / constants.eigenvalue_gap(len(xs), wide) - 1).abs() < (0.3 if wide else 1e-6)
    for a, b in zip(ours, theirs, strict=True):
        difference = (a.detach().cpu().double() - b.detach().cpu().double()).abs().flatten(1).amax(1)
        difference = torch.where(opinion, 0.0, difference)
        worst = (difference / bound).argmax()
        assert difference[worst] <= bound[worst], (float(gaps[worst]), a[worst], b[worst])
    return ours[1].detach().cpu().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pairs_at_an_obtuse_angle(backend, device, dtype):
    """v₁ = (1, −1)/√2 however little the cosine is below 0, from the smallest gap that counts on."""
    gap = constants.eigenvalue_gap(2, dtype == torch.float64)
    factors = torch.cat([torch.linspace(0.9, 2.2, 27), torch.logspace(0.5, 6, 12)]).double()
    cosines = -gap / 2 * factors[:: 4 if backend == "triton" else 1]
    zero = torch.zeros_like(cosines)
    xs = [torch.stack([zero + 1, zero, zero], 1), torch.stack([cosines, zero, (1 - cosines**2).sqrt()], 1)]
    xs = leaves(xs, device, dtype)
    gaps = 2 * cosines.abs() / (1 + cosines.abs())
    v = both_paths_agree(xs, gaps, True, None, backend)
    apart = gaps > gap
    decided = (gaps / gap - 1).abs() > 1e-3 if dtype == torch.float32 else ((gaps / gap - 1).abs() > 0.1)
    assert apart[decided].any()
    assert not apart[decided].all()
    wanted = torch.tensor([[0.5, 0.5], [0.5, -0.5]], dtype=torch.float64)[apart.int()].sign() * 0.5**0.5
    torch.testing.assert_close(v[decided], wanted[decided], rtol=4 * tol.EPS32, atol=0)
    exact = (1 - xs[1][:, 0].detach().cpu().double()).sqrt()
    sigma = dominant_singular_value(xs, backend=backend).cpu().double()
    torch.testing.assert_close(sigma[decided], exact[decided], rtol=4 * torch.finfo(dtype).eps, atol=0)


def mirrored(k: int, gaps: Tensor) -> tuple[list[Tensor], Tensor]:
    """k float64 tensors (B, d) whose v₁ has entries that add up to 0 exactly, and which of them come in pairs.

    Embeddings (s, t) and (s, −t) are a reflection of one another, others (s, 0) of themselves. So each right singular
    vector is even or odd under the exchange, and the first one is odd: σ₁² = 1, with the even ones ``gaps`` below.
    Returns also (B, k) with the number of each one's pair, −1 for those without. The first pair dominates v₁.
    """
    instances, partners = [], []
    for i in range(len(gaps)):
        pairs = 1 + i % (k // 2)
        alone = k - 2 * pairs
        w = torch.cat([torch.ones(1), torch.rand(pairs - 1) * 0.6]).double()
        W = torch.linalg.qr(torch.cat([w[:, None], torch.randn(pairs, pairs - 1, dtype=torch.float64)], 1)).Q
        scale = torch.cat([torch.ones(1), 0.8 * torch.rand(pairs - 1)]).double()
        odd = torch.linalg.qr(torch.randn(pairs, pairs, dtype=torch.float64)).Q * scale @ W.mT / 2**0.5
        below = torch.cat([(1 - gaps[i : i + 1]).sqrt(), 0.8 * torch.rand(pairs + alone - 1)])
        even = with_spectrum(below, 1, pairs + alone)
        even = torch.stack([x[0] for x in even], 1)
        s, t = even[:, :pairs] / 2**0.5, odd
        rest = torch.cat([even[:, pairs:], odd.new_zeros(pairs, alone)])
        columns = torch.cat([torch.cat([s, t]), torch.cat([s, -t]), rest], 1)
        numbers = torch.cat([torch.arange(pairs), torch.arange(pairs), torch.full((alone,), -1)])
        order = torch.randperm(k)
        instances.append(torch.nn.functional.pad(columns, (0, 0, 0, k + 1 - len(columns)))[:, order])
        partners.append(numbers[order])
    return list(torch.stack(instances).unbind(2)), torch.stack(partners)


@pytest.mark.parametrize(
    ("k", "masked"), [(2, 0), (2, 1), (3, 0), (4, 0), (4, 1), (5, 0), (6, 1), (7, 0), (8, 0), (12, 1), (31, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_leading_vectors_across_the_mean(backend, device, dtype, k, masked):
    """Entries of v₁ that add up to 0, whatever the gap: one rule on both paths, and the first of equals decides."""
    least = constants.eigenvalue_gap(k + masked, dtype == torch.float64)
    gaps = of_the_gap(k + masked, dtype, backend)
    xs, pair = mirrored(k, gaps)
    Z = torch.stack(xs, 2).to(dtype).double()  # whose gaps are others than they were before this rounding
    partners = (pair[:, :, None] == pair[:, None, :]) & (pair >= 0)[:, :, None] & ~torch.eye(k, dtype=torch.bool)
    partner = torch.where(pair < 0, torch.arange(k), partners.int().argmax(2))
    image = Z.gather(2, partner[:, None, :].expand_as(Z))
    odd, even = (torch.linalg.svdvals((Z + sign * image) / 2)[:, 0] for sign in (-1, 1))
    gaps = (odd - even) * (odd + even) / odd**2
    mask = None
    if masked:
        mask = torch.ones(len(gaps), k + 1, dtype=torch.bool, device=device)
        mask[:, 1] = False
        xs.insert(1, torch.full_like(xs[0], torch.nan))
        pair = torch.cat([pair[:, :1], torch.full_like(pair[:, :1], -1), pair[:, 1:]], 1)
    v = both_paths_agree(leaves(xs, device, dtype), gaps.abs(), False, mask, backend)
    decided = gaps > (1.001 if dtype == torch.float32 else 1.3) * least
    assert decided.sum() >= len(gaps) / 2
    first = (pair == 0).int().argmax(1)
    assert (v.gather(1, first[:, None])[decided] > 0.3).all()
    assert (v.sum(1)[decided].abs() <= 4 * tol.EPS32 + 32 * tol.EPS64 / gaps[decided]).all()


@pytest.mark.parametrize("k", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_leading_vectors_nearly_across_the_mean(backend, device, dtype, k):
    """A sum that is zero, nearly, or not quite, of either sign: whatever it counts as, it does on both paths."""
    gaps = of_the_gap(k, dtype, backend)
    B = len(gaps)
    zero = constants.zero_sum(k) / gaps
    sums = zero * torch.logspace(-3, 4, 7, dtype=torch.float64)[torch.arange(B) % 7]
    sums = sums.clamp_max(0.5) * torch.where(torch.arange(B) % 2 == 0, 1, -1)
    ones = torch.full((B, k), k**-0.5, dtype=torch.float64)
    across = torch.randn(B, k, dtype=torch.float64)
    across = torch.nn.functional.normalize(across - across.mean(1, keepdim=True), dim=1)
    share = (sums / k**0.5)[:, None]
    first = across * (1 - share**2).sqrt() + ones * share
    second = ones * (1 - share**2).sqrt() - across * share  # all that there is of the mean
    basis = torch.linalg.qr(torch.cat([first[:, :, None], second[:, :, None], torch.randn(B, k, k).double()], 2)).Q
    scale = torch.cat([torch.ones(B, 1), (1 - gaps).sqrt()[:, None], 0.8 * torch.rand(B, k - 2)], 1)
    U = torch.linalg.qr(torch.randn(B, k + 2, k, dtype=torch.float64)).Q
    Z = (U * scale[:, None, :]) @ basis[:, :, :k].mT
    both_paths_agree(leaves(list(Z.unbind(2)), device, dtype), gaps, False, None, backend)
