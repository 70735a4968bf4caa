"""The numerical contract (docs/contract.md), row by row, on every backend and device of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import tolerances as tol
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
from pmrl_kernels.spectral import _spectral

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OBJECTIVES = ("softmax", "leading")

# Every public function of embeddings as (name, function returning one tensor per instance or a scalar).
PER_INSTANCE: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda *x, **o: dominant_sv_loss(*x, reduction="none", **o),
    "leading": lambda *x, **o: dominant_sv_loss(*x, reduction="none", objective="leading", **o),
    "singular_values": lambda *x, **o: singular_values(*x, **o),
    "dominant_singular_value": lambda *x, **o: dominant_singular_value(*x, **o),
    "u": lambda *x, **o: dominant_singular_triplet(*x, **o).u,
    "v": lambda *x, **o: dominant_singular_triplet(*x, **o).v,
}
MIXING: dict[str, Callable[..., Tensor]] = {
    f"{contrast}-{objective}": lambda *x, c=contrast, b=objective, **o: pmrl_loss(*x, contrast=c, objective=b, **o)
    for contrast in ("leading", "modality")
    for objective in OBJECTIVES
}


def with_spectrum(sigma: Tensor, B: int, d: int) -> list[Tensor]:
    """k float64 tensors (B, d) whose matrices have the singular values sigma (k,), k <= d."""
    k = len(sigma)
    U = torch.linalg.qr(torch.randn(B, d, k, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(B, k, k, dtype=torch.float64)).Q
    return list((U * sigma @ V.mT).unbind(2))


def spectra(k: int) -> dict[str, Tensor]:
    graded = torch.logspace(0, -7, k, dtype=torch.float64)  # down to the floor
    near_rank_1 = torch.full((k,), 1e-6, dtype=torch.float64) * torch.linspace(1, 2, k, dtype=torch.float64)
    near_rank_1[0] = k**0.5
    clustered = 1 + 1e-3 * torch.arange(k, 0, -1, dtype=torch.float64)
    return {"graded": graded, "near rank 1": near_rank_1, "clustered": clustered}


def almost_equal(k: int, B: int, d: int, departure: float) -> list[Tensor]:
    """Unit vectors with pairwise cosines of about 1 − departure, float64."""
    shared = torch.nn.functional.normalize(torch.randn(B, d, dtype=torch.float64), dim=1)
    noise = [torch.nn.functional.normalize(torch.randn(B, d, dtype=torch.float64), dim=1) for _ in range(k)]
    return [torch.nn.functional.normalize(shared + departure**0.5 * n, dim=1) for n in noise]


def leaves(xs: list[Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(device, dtype).requires_grad_() for x in xs]


def svdvals64(xs: list[Tensor], normalize: bool) -> Tensor:
    """Singular values (B, min(d, k)) of the given inputs' exact values, in float64 on the CPU."""
    Z = torch.stack([x.detach().cpu().double() for x in xs], 2)
    if normalize:
        Z = Z / torch.linalg.vector_norm(Z, dim=1, keepdim=True)
    return torch.linalg.svdvals(Z)


def grads(loss: Tensor, xs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, xs))


def finite(*tensors: Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


# ---- singular values, losses and gradients in every dtype ---------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["random", "graded", "near rank 1", "clustered"])
@pytest.mark.parametrize("k", [2, 3, 4, 6, 8, 12, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_singular_values(backend, device, dtype, k, kind, normalize):
    B, d = 6 if k <= 8 else 2, 67
    xs = [torch.randn(B, d) for _ in range(k)] if kind == "random" else with_spectrum(spectra(k)[kind], B, d)
    xs = leaves(xs, device, dtype)
    wanted = svdvals64(xs, normalize)
    top = wanted[:, :1]
    if dtype == torch.float32:
        bound = torch.full_like(wanted, tol.SIGMA_32)
    elif dtype == torch.float64:
        bound = tol.sigma_64(wanted / top)
    else:
        bound = tol.sigma_16(wanted / top, k)
    ours = singular_values(xs, normalize=normalize, backend=backend)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((ours.cpu().double() - wanted).abs() <= bound * top).all()
    leading = dominant_singular_value(xs, normalize=normalize, backend=backend).cpu().double()
    assert ((leading - wanted[:, 0]).abs() <= bound[:, 0] * top[:, 0]).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("kind", ["random", "graded", "near rank 1", "aligned to 1e-4"])
@pytest.mark.parametrize("k", [2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_gradient_are_as_close_as_svd(backend, device, dtype, k, kind, temperature, objective):
    """Our error against the float64 oracle beside that of torch.linalg.svd in the same dtype."""
    B, d = 16, 96
    if kind == "random":
        xs = [torch.randn(B, d) for _ in range(k)]
    elif kind == "aligned to 1e-4":
        xs = almost_equal(k, B, d, 1e-4)
    else:  # graded, but above the floor at eps32·σ₁, below which the contract asks for weight 0
        xs = with_spectrum(spectra(k)[kind] ** (0.8 if dtype == torch.float32 else 0.5), B, d)
    xs = leaves(xs, device, dtype)
    exact, same = oracle.upcast(xs), [x.detach().cpu().requires_grad_() for x in xs]
    arguments = (temperature, None, True, objective)
    truth, by_svd = oracle.alignments(exact, *arguments), oracle.alignments(same, *arguments)
    ours = dominant_sv_loss(xs, temperature=temperature, objective=objective, reduction="none", backend=backend)

    def error(values: Tensor, reference: Tensor) -> float:
        difference = values.detach().cpu().double() - reference.detach()
        return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(reference.detach()))

    # In float64 the Gram squares the condition number, and the oracle is exact beside it.
    sigma = svdvals64(xs, True)
    condition = float((sigma[:, 0] / sigma[:, -1]).max())
    floor = tol.FLOOR[dtype] * (condition**2 / temperature if dtype == torch.float64 else 1.0)
    assert error(ours, truth) <= tol.FACTOR * error(by_svd, truth) + floor
    true_grads = torch.stack(grads(truth.sum(), exact))
    svd_grads = torch.stack(grads(by_svd.sum(), same))
    our_grads = torch.stack(grads(ours.sum(), xs))
    assert error(our_grads, true_grads) <= tol.FACTOR * error(svd_grads, true_grads) + floor


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("k", [2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_exact_arithmetic_rounded_once(backend, device, dtype, k, objective):
    """On the exact input values; the upstream gradient enters before the one rounding of the result."""
    xs = leaves([torch.randn(8, 48) for _ in range(k)], device, dtype)
    exact = oracle.upcast(xs)
    truth = oracle.alignments(exact, 0.05, None, True, objective)
    ours = dominant_sv_loss(xs, temperature=0.05, objective=objective, reduction="none", backend=backend)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-4, atol=1e-6)
    for upstream in (1.0, 2.0**-12, 2.0**16):
        # 2⁻¹² of these gradients are subnormal in float16, 2¹⁶ times as much is what a loss scaler sends
        scale = upstream / 2.0**12
        for x, y in zip(grads((ours * scale).sum(), xs), grads((truth * scale).sum(), exact), strict=True):
            assert x.dtype == dtype
            rounded = y.to(dtype).double()
            torch.testing.assert_close(
                x.cpu().double(), rounded, rtol=2 * tol.HALF_GRADIENT[dtype], atol=2 * tol.LEAST_HALF
            )
        ours = dominant_sv_loss(xs, temperature=0.05, objective=objective, reduction="none", backend=backend)
        truth = oracle.alignments(exact, 0.05, None, True, objective)


def test_a_loss_scaler_keeps_gradients_that_would_vanish(backend, device):
    """float16 gradients below 6e-8 are zero; scaled by 2¹⁶ before the rounding they are not."""
    xs = leaves(almost_equal(3, 4, 16, 0.3), device, torch.float16)
    loss = dominant_sv_loss(xs, temperature=0.05, backend=backend) * 1e-3
    plain = grads(loss, xs)
    loss = dominant_sv_loss(xs, temperature=0.05, backend=backend) * 1e-3
    scaled = grads(loss * 2.0**16, xs)
    assert sum(int((g == 0).sum()) for g in scaled) < sum(int((g == 0).sum()) for g in plain)


@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("k", [2, 3, 4, 9])
@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
def test_mixed_dtypes(backend, device, function, k, first):
    """As of the same numbers in one dtype, float64 if any is; each gradient in its input's dtype, if it is wanted.

    For k = 2 every pair, for more some of the mixtures, others for each function.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, function)) + k)
    rests = [(x,) for x in DTYPES]
    if k > 2:
        rests = [tuple(DTYPES[i] for i in torch.randint(4, (k - 1,), generator=generator)) for _ in range(4)]
    for rest in rests:
        dtypes = (first, *rest)
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        xs = [torch.randn(5, 11, generator=generator).to(device, dtype) for dtype in dtypes]
        mask = torch.rand(5, k, generator=generator) < 0.8
        mask = mask.to(device) if torch.rand((), generator=generator) < 0.5 else None
        wanted = torch.rand(k, generator=generator) < 0.7
        wanted[int(torch.randint(k, (), generator=generator))] = True
        options = {"mask": mask, "normalize": bool(torch.rand((), generator=generator) < 0.7), "backend": backend}
        results = []
        for leaves_ in ([x.clone() for x in xs], [x.to(wide, copy=True) for x in xs]):
            for x, want in zip(leaves_, wanted, strict=True):
                x.requires_grad_(bool(want))
            out = (PER_INSTANCE | MIXING)[function](leaves_, **options)
            weights = torch.linspace(0.5, 1, out.numel(), device=device).reshape(out.shape).to(out.dtype)
            results.append((out, torch.autograd.grad(out, [x for x in leaves_ if x.requires_grad], weights)))
        (out, found), (expected, exact) = results
        assert out.dtype == expected.dtype == wide
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        needed = [dtype for dtype, want in zip(dtypes, wanted, strict=True) if want]
        assert [g.dtype for g in found] == needed
        scale = max(float(g.abs().max()) for g in exact)
        for g, h, dtype in zip(found, exact, needed, strict=True):
            rounding = tol.HALF_GRADIENT.get(dtype, 0.0)
            torch.testing.assert_close(g.to(wide), h, rtol=rounding + 1e-4, atol=1e-5 * scale + tol.LEAST_HALF)


@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
@pytest.mark.parametrize("function", PER_INSTANCE)
def test_bad_upstream_gradients_pass_through(backend, device, function, upstream):
    """A scaler finds its overflow by the Inf or NaN that comes back; it must stay in its row."""
    xs = leaves([torch.randn(3, 8) for _ in range(3)], device, torch.float32)
    out = PER_INSTANCE[function](xs, backend=backend)
    weights = torch.ones_like(out)
    weights[1] = upstream
    for g in torch.autograd.grad(out, xs, weights):
        assert not g[1].isfinite().any()
        assert finite(g[0], g[2])


# ---- full alignment -----------------------------------------------------------------------------


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


# ---- ties at the top ----------------------------------------------------------------------------


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
    vectors = constants.SIGMA | constants.U | constants.V
    wanted = vectors | constants.ALIGNMENT_SUM
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


# ---- zero vectors and extreme norms -------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_vectors(backend, device, dtype, normalize):
    """A zero vector that is not masked stays a column: σ = 0 for it, zero gradient, nothing breaks."""
    xs = [torch.randn(4, 12) for _ in range(3)]
    xs[1][0] = 0
    xs[0][2] = xs[1][2] = 0
    for x in xs:
        x[3] = 0
    xs = leaves(xs, device, dtype)
    sigma = singular_values(xs, normalize=normalize, backend=backend)
    assert (sigma[0, 2] == 0).all()
    assert not sigma[3].any()
    for name, function in (PER_INSTANCE | MIXING).items():
        out = function(xs, normalize=normalize, backend=backend)
        found = grads(out.sum(), xs)
        assert finite(out, *found), name
        assert not any(g[3].any() for g in found), name
        if normalize:
            assert not found[1][0].any(), name
            assert not found[0][2].any(), name
    # The softmax runs over all three columns still: with one direction left, two logits at σ = 0.
    loss = dominant_sv_loss(xs, temperature=0.5, reduction="none", backend=backend)
    torch.testing.assert_close(
        loss[2].cpu().double(), torch.log1p(2 * torch.exp(torch.tensor(-2.0)).double()), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(loss[3].cpu().double(), torch.tensor(3.0).double().log(), rtol=1e-6, atol=0)


def exponents(dtype: torch.dtype) -> list[tuple[int, int, int]]:
    """Powers of two for three modalities: alike, and as far apart as the dtype allows."""
    far = {torch.float64: (500, 1000, 1021), torch.float16: (8, 12, 14)}.get(dtype, (66, 100, 125))
    cases = [(far[0],) * 3, (-far[0],) * 3, (-far[0], 0, far[0]), (far[1], far[1], 0), (-far[1], -far[1], 0)]
    return [*cases, (far[2], far[2], far[2]), (far[1], -far[1], 0)]


@pytest.mark.parametrize("case", range(7))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_norms(backend, device, dtype, case, objective):
    """Norms of 1e±20 (1e±150 and beyond in float64): scaling an input by 2^e scales its gradient by 2^-e."""
    powers = exponents(dtype)[case]
    grid = torch.randint(-8, 9, (3, 5, 24)).double() / 8  # few bits: scaling stays exact in every dtype
    plain = leaves(list(grid), device, dtype)
    scaled = leaves(
        [
            torch.ldexp(x.double(), torch.tensor(float(e)))
            if abs(e) < 1000
            else x.double() * 2.0 ** (e // 2) * 2.0 ** (e - e // 2)
            for x, e in zip(grid, powers, strict=True)
        ],
        device,
        dtype,
    )
    assert finite(*scaled)
    options = {"temperature": 0.5, "objective": objective, "reduction": "sum", "backend": backend}
    one, other = dominant_sv_loss(plain, **options), dominant_sv_loss(scaled, **options)
    torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)
    for g, h, e in zip(grads(one, plain), grads(other, scaled), powers, strict=True):
        g, h = g.cpu().double(), h.cpu().double()
        wanted = g * 2.0 ** (-e // 2) * 2.0 ** (-e - -e // 2)
        info = torch.finfo(dtype)
        wanted = wanted.where(wanted.abs() <= info.max, torch.inf * wanted.sign())
        # Below the least normal number only absolute digits are left.
        resolution = max(1e-5, 4 * info.eps)
        least = max(float(info.tiny), float(wanted.abs().nan_to_num(posinf=0).max()) * resolution)
        torch.testing.assert_close(h, wanted, rtol=resolution, atol=least)
    u = dominant_singular_triplet(plain, backend=backend).u
    torch.testing.assert_close(dominant_singular_triplet(scaled, backend=backend).u, u, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_subnormal_embeddings(backend, device, dtype):
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    grid = torch.randint(1, 5, (3, 2, 9)).double()
    xs = leaves([x * least for x in grid], device, dtype)
    assert all((x != 0).all() for x in xs)
    torch.testing.assert_close(
        dominant_sv_loss(xs, backend=backend), dominant_sv_loss(leaves(list(grid), device, dtype), backend=backend)
    )


@pytest.mark.parametrize("power", [-66, 66])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unnormalised_extremes(backend, device, dtype, power):
    """normalize=False: singular values scale with the embeddings, and so do gradients of ratios."""
    grid = torch.randint(-8, 9, (3, 4, 20)).double() / 8
    plain = leaves(list(grid), device, dtype)
    scaled = leaves([x * 2.0**power for x in grid], device, dtype)
    for function in (singular_values, dominant_singular_value):
        one = function(plain, normalize=False, backend=backend)
        torch.testing.assert_close(function(scaled, normalize=False, backend=backend), one * 2.0**power)
    one = dominant_singular_triplet(plain, normalize=False, backend=backend).u
    other = dominant_singular_triplet(scaled, normalize=False, backend=backend).u
    torch.testing.assert_close(other, one)
    weights = torch.randn_like(one)
    for g, h in zip(grads((one * weights).sum(), plain), grads((other * weights).sum(), scaled), strict=True):
        torch.testing.assert_close(
            h.double() * 2.0**power, g.double(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("power", [-700, -400, 400, 700])
def test_unnormalised_extremes_in_float64(backend, device, power):
    grid = torch.randn(3, 4, 20, dtype=torch.float64)
    plain, scaled = (leaves([x * s for x in grid], device, torch.float64) for s in (1.0, 2.0**power))
    one = dominant_singular_triplet(plain, normalize=False, backend=backend)
    other = dominant_singular_triplet(scaled, normalize=False, backend=backend)
    torch.testing.assert_close(other.sigma, one.sigma * 2.0**power, rtol=1e-13, atol=0)
    torch.testing.assert_close(other.u, one.u, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(one.u)
    for g, h in zip(grads((one.u * weights).sum(), plain), grads((other.u * weights).sum(), scaled), strict=True):
        torch.testing.assert_close(h * 2.0**power, g, rtol=1e-9, atol=1e-12)
    # σ and the alignment have gradients that do not depend on the scale
    for objective, temperature in (("leading", 1.0), ("softmax", 2.0**power)):
        options = {"objective": objective, "normalize": False, "reduction": "sum", "backend": backend}
        one_loss = dominant_sv_loss(plain, temperature=temperature / 2.0**power, **options)
        other_loss = dominant_sv_loss(scaled, temperature=temperature, **options)
        factor = 2.0**power if objective == "softmax" else 1.0
        for g, h in zip(grads(one_loss, plain), grads(other_loss, scaled), strict=True):
            torch.testing.assert_close(h * factor, g, rtol=1e-9, atol=1e-12)


# ---- NaN and Inf --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("function", PER_INSTANCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_bad_row_stays_in_its_row(backend, device, dtype, function, k, bad):
    """Its outputs and gradients are NaN, no other's, and nothing raises."""
    xs = [torch.randn(5, 11) for _ in range(k)]
    clean = leaves(xs, device, dtype)
    dirty = [x.clone() for x in xs]
    dirty[k // 2][2, 3] = bad
    dirty = leaves(dirty, device, dtype)
    one, other = (PER_INSTANCE[function](x, backend=backend) for x in (clean, dirty))
    assert other[2].isnan().all()
    others = torch.arange(5) != 2
    torch.testing.assert_close(other[others], one[others], rtol=1e-6, atol=1e-7)
    for g, h in zip(grads(one.sum(), clean), grads(other.sum(), dirty), strict=True):
        assert h[2].isnan().all()
        torch.testing.assert_close(h[others], g[others], rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize(("B", "d"), [(1, 6), (5, 6), (4, 1)])
def test_a_bad_row_shows_in_the_gradient_of_the_temperature(backend, device, B, d, k, bad):
    """As in the loss, whether it has something to align or not."""
    xs = [torch.randn(B, d, device=device) for _ in range(k)]
    xs[-1][B // 2, -1] = bad
    for reduction in ("mean", "sum", "none"):
        tau = torch.tensor(0.4, device=device, requires_grad=True)
        loss = dominant_sv_loss(xs, temperature=tau, reduction=reduction, backend=backend)
        assert loss.sum().isnan()
        assert torch.autograd.grad(loss.sum(), tau)[0].isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", MIXING)
def test_a_bad_row_is_not_swallowed_by_the_mixing_terms(backend, device, function, bad):
    xs = [torch.randn(5, 11) for _ in range(3)]
    xs[0][2, 3] = bad
    xs = leaves(xs, device, torch.float32)
    loss = MIXING[function](xs, backend=backend)
    assert loss.isnan()
    assert all(g.isnan().all() for g in grads(loss, xs))


@pytest.mark.parametrize("normalize", [True, False])
def test_instance_contrast_of_bad_rows(backend, device, normalize):
    u = torch.randn(5, 4, device=device)
    u[3, 1] = float("nan")
    v = u.clone().requires_grad_()
    loss = instance_contrastive_loss(v, normalize=normalize, backend=backend)
    assert loss.isnan()
    assert grads(loss, [v])[0].isnan().all()
    # masked out, it does not exist
    mask = torch.arange(5, device=device) != 3
    v = u.clone().requires_grad_()
    loss = instance_contrastive_loss(v, normalize=normalize, mask=mask, backend=backend)
    torch.testing.assert_close(loss, instance_contrastive_loss(u[mask], normalize=normalize, backend=backend))
    gradient = grads(loss, [v])[0]
    assert finite(gradient)
    assert not gradient[3].any()


CONTRASTS: dict[str, Callable[..., Tensor]] = {
    f"{name} of {k}": lambda *x, f=function, k=k, **o: f(x[:k], return_components=True, **o).instance
    for name, function in MIXING.items()
    for k in (1, 3)
}
CONTRASTS["instance_contrastive_loss"] = lambda x, *_, mask=None, instance_temperature=0.1, **o: (
    instance_contrastive_loss(x, instance_temperature, mask=None if mask is None else mask.any(1), **o)
)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("function", CONTRASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bad_row_that_is_compared_with_nothing(backend, device, dtype, function, normalize, bad):
    """The only one that takes part has nobody to be told from, and no similarity shows what is wrong with it."""
    raw = function == "instance_contrastive_loss" and not normalize  # where a zero row is a row like any other
    for left in ("alone", "masked", "beside zeros"):
        B, row = (1, 0) if left == "alone" else (3, 1)
        others = torch.arange(B) != row
        xs = [torch.randn(B, 5) for _ in range(3)]
        xs[0][row, 2] = bad
        mask = None
        if left == "masked":
            mask = ~others[:, None].expand(B, 3 if function.endswith("3") else 1).to(device)
        elif left == "beside zeros":
            xs = [x.masked_fill(others[:, None], 0.0) for x in xs]
        xs = leaves(xs, device, dtype)
        tau = torch.tensor(0.2, device=device, requires_grad=True)
        options = {"normalize": normalize, "mask": mask, "instance_temperature": tau, "backend": backend}
        loss = CONTRASTS[function](*xs, **options)
        assert loss.isnan(), left
        *found, slope = torch.autograd.grad(loss, [*xs, tau], allow_unused=True)
        assert slope.isnan(), left
        for g in found:
            if g is not None:
                assert g[row].isnan().all(), left
                assert g[others].isnan().all() if raw and left == "beside zeros" else not g[others].any(), left


@pytest.mark.parametrize(("bad", "upstream"), [(float("nan"), 1.0), (0.5, float("inf")), (0.5, float("nan"))])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("function", CONTRASTS)
def test_zero_vectors_get_zeros_beside_anything(backend, device, function, normalize, bad, upstream):
    """An instance without a direction is left out of the contrast, whatever the others or the upstream gradient are."""
    if function == "instance_contrastive_loss" and not normalize:
        return  # there it takes part
    xs = [torch.randn(4, 5) for _ in range(3)]
    xs[0][2, 1] = bad
    for x in xs:
        x[1] = 0
    xs = leaves(xs, device, torch.float32)
    loss = CONTRASTS[function](*xs, normalize=normalize, backend=backend)
    for g in torch.autograd.grad(loss, xs, torch.full_like(loss, upstream), allow_unused=True):
        if g is not None:
            assert not g[1].any()
            assert not g[[0, 2, 3]].isfinite().any()


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e38])
def test_instance_contrast_of_extreme_norms(backend, device, scale):
    u = torch.randn(6, 8, device=device)
    one, other = u.clone().requires_grad_(), (u * scale).clamp(-3e38, 3e38).requires_grad_()
    losses = [instance_contrastive_loss(v, backend=backend) for v in (one, other)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    (g,), (h,) = grads(losses[0], [one]), grads(losses[1], [other])
    torch.testing.assert_close(h.double() * scale, g.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instance_contrast_precision(backend, device, dtype, temperature):
    """No worse than F.cross_entropy in float32, though most of its losses are far below 1e-3."""
    u = torch.nn.functional.normalize(torch.randn(64, 48), dim=1).to(device, dtype).requires_grad_()
    (exact,) = oracle.upcast([u])
    rows = exact / torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    delta = (rows @ rows.T - 1) / temperature
    delta = delta.masked_fill(torch.eye(64, dtype=torch.bool), -torch.inf)
    truth = torch.log1p(delta.exp().sum(1)).mean()
    ours = instance_contrastive_loss(u, temperature, backend=backend)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = tol.FORMULA_64 if dtype == torch.float64 else tol.CONTRAST_32 / temperature
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=bound, atol=0)
    (g,), (h,) = grads(ours, [u]), grads(truth, [exact])
    bound = max(bound, tol.HALF_GRADIENT.get(dtype, 0.0))
    least = tol.LEAST_HALF if dtype == torch.float16 else 0.0
    torch.testing.assert_close(g.cpu().double(), h, rtol=bound, atol=bound * float(h.abs().max()) + least)


# ---- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_modalities_are_no_columns(backend, device, dtype, function):
    """Whatever their buffers hold: values and gradients are those of the present ones alone."""
    B, k = 6, 4
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    clean = [torch.randn(B, 9) for _ in range(k)]
    results = []
    for rubbish in (0.0, 1e4, float("nan"), float("inf")):
        xs = leaves([x.masked_fill(~mask[:, m, None], rubbish) for m, x in enumerate(clean)], device, dtype)
        out = (PER_INSTANCE | MIXING)[function](xs, mask=mask.to(device), backend=backend)
        found = grads((out * torch.arange(1, out.numel() + 1, device=device).reshape(out.shape)).sum(), xs)
        assert finite(out, *found)
        for m, g in enumerate(found):
            assert not g[~mask[:, m].to(device)].any()
        results.append([out.detach(), *found])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_inputs_of_absent_modalities_reach_an_encoder(backend, device):
    """docs/recipes.md: the loss sends exact zeros back, but 0 · NaN is NaN in an encoder's weights."""
    encoder = torch.nn.Linear(5, 9).to(device)
    other, inputs = torch.randn(4, 9, device=device), torch.randn(4, 5, device=device)
    mask = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 1]], device=device).bool()
    absent = ~mask[:, :1]

    def step(given: Tensor) -> Tensor:
        loss = pmrl_loss(encoder(given), other, mask=mask, backend=backend)
        assert loss.isfinite()
        return grads(loss, [encoder.weight])[0]

    assert step(inputs.masked_fill(absent, torch.nan)).isnan().any()
    assert torch.equal(step(inputs.masked_fill(absent, 0.0)), step(inputs.masked_fill(absent, 1.0)))


def any_bytes(mask: Tensor) -> Tensor:
    """The same mask, with bytes other than 0 and 1."""
    shown = torch.tensor([1, 255, 2, 128], dtype=torch.uint8).repeat(mask.numel())[: mask.numel()].view(mask.shape)
    view = (mask.cpu().to(torch.uint8) * shown).to(mask.device).view(torch.bool)
    assert view.view(torch.uint8).max() == 255
    return view


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "by name"])
def test_masks_of_any_bytes(backend, device, function, layout):
    """A bool tensor is True where its byte is not 0, also one that views an image's mask of 255."""
    xs = leaves([torch.randn(6, 9) for _ in range(4)], device, torch.float32)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    mask = mask.to(device)
    odd = any_bytes(mask)
    given: Any = {"transposed": any_bytes(mask.T).T, "strided": any_bytes(mask.repeat(1, 2))[:, :4]}.get(layout, odd)
    embeddings: Any = xs
    if layout == "by name":
        embeddings = dict(zip("abcd", xs, strict=True))
        given = dict(zip("abcd", odd.unbind(1), strict=True))
    one = (PER_INSTANCE | MIXING)[function](embeddings, mask=given, backend=backend)
    other = (PER_INSTANCE | MIXING)[function](xs, mask=mask, backend=backend)
    assert torch.equal(one, other)
    for a, b in zip(grads(one.sum(), xs), grads(other.sum(), xs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normalize", [True, False])
def test_masks_of_any_bytes_for_rows(backend, device, normalize):
    u = torch.randn(6, 9, device=device, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], device=device).bool()
    options = {"normalize": normalize, "backend": backend}
    one, other = (instance_contrastive_loss(u, mask=m, **options) for m in (any_bytes(mask), mask))
    assert torch.equal(one, other)
    assert torch.equal(*(grads(loss, [u])[0] for loss in (one, other)))


def test_masked_alignment_is_that_of_the_subset(backend, device):
    xs = leaves([torch.randn(3, 9) for _ in range(4)], device, torch.float64)
    mask = torch.tensor([[True, False, True, True]] * 3, device=device)
    for function in PER_INSTANCE.values():
        part = function([xs[0], xs[2], xs[3]], backend=backend)
        whole = function(xs, mask=mask, backend=backend)
        if whole.shape != part.shape:
            assert not whole[:, 3:].any() or function is PER_INSTANCE["v"]
            whole = whole[:, [0, 2, 3]] if function is PER_INSTANCE["v"] else whole[:, :3]
        torch.testing.assert_close(whole, part, rtol=1e-12, atol=1e-14)


def test_instances_without_anything_to_align_do_not_count(backend, device):
    xs = leaves([torch.randn(4, 9) for _ in range(3)], device, torch.float32)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], device=device).bool()
    per = dominant_sv_loss(xs, mask=mask, reduction="none", backend=backend)
    assert per[1] == 0
    assert per[2] == 0
    torch.testing.assert_close(dominant_sv_loss(xs, mask=mask, backend=backend), (per[0] + per[3]) / 2)
    loss = dominant_sv_loss(xs, mask=torch.zeros_like(mask), backend=backend)
    assert loss == 0
    assert not any(g.any() for g in grads(loss, xs))


# ---- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize(
    "shape", [(0, 3, 5), (1, 3, 5), (4, 1, 5), (4, 3, 1), (4, 1, 1), (4, 5, 2), (0, 1, 1), (2, 32, 3)], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_small_and_odd_shapes(backend, device, function, shape, masked):
    B, k, d = shape
    xs = leaves([torch.randn(B, d) for _ in range(k)], device, torch.float32)
    mask = torch.ones(B, k, dtype=torch.bool, device=device) if masked else None
    out = (PER_INSTANCE | MIXING)[function](xs, mask=mask, backend=backend)
    found = grads(out.sum(), xs)
    assert finite(out, *found)
    assert all(g.shape == (B, d) for g in found)
    if function in MIXING and B == 0:
        assert out == 0
    if function in ("softmax", "leading") and (k == 1 or (d == 1 and function == "softmax")):
        assert not out.any()
        assert not any(g.any() for g in found)
    if function == "singular_values":
        assert out.shape == (B, min(d, k))
    if k == 1 and function == "u":
        torch.testing.assert_close(out, torch.nn.functional.normalize(xs[0].detach(), dim=1))


def test_mean_over_nothing_is_zero(backend, device):
    xs = leaves([torch.randn(0, 5) for _ in range(3)], device, torch.float32)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        loss = dominant_sv_loss(xs, reduction=reduction, backend=backend)
        assert loss.shape == shape
        assert not loss.any()
    u = torch.randn(0, 5, device=device, requires_grad=True)
    loss = instance_contrastive_loss(u, backend=backend)
    assert loss == 0
    assert grads(loss, [u])[0].shape == (0, 5)


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
def test_strides(backend, device, function):
    """Columns of a wider tensor, transposed storage and expanded rows give what contiguous copies give."""
    wide = torch.randn(4, 3, 14, device=device)
    views = [
        wide[:, 0, ::2],
        wide[:, 1, 7:],
        torch.randn(7, 4, device=device).T,
        torch.randn(7, device=device).expand(4, 7),
    ]
    ours = [v.detach().requires_grad_() for v in views]
    copies = [v.detach().contiguous().clone().requires_grad_() for v in views]
    one, other = ((PER_INSTANCE | MIXING)[function](x, backend=backend) for x in (ours, copies))
    assert torch.equal(one, other)
    for a, b in zip(grads(one.sum(), ours), grads(other.sum(), copies), strict=True):
        assert torch.equal(a, b)


def negated_view(x: Tensor) -> Tensor:
    """x, as a view whose memory holds −x: what ``.imag`` of a conjugate is, without a copy."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("kind", ["negated view", "expanded", "strided", "transposed", "zero tensor"])
def test_upstream_gradients_of_any_view(backend, device, function, kind):
    xs = leaves([torch.randn(4, 7) for _ in range(3)], device, torch.float32)
    out = (PER_INSTANCE | MIXING)[function](xs, backend=backend)
    g = torch.randn(out.shape, device=device)
    if kind == "negated view":
        view = negated_view(g)
    elif kind == "expanded":
        view = torch.full((), 0.7, device=device).expand(out.shape)
    elif kind == "strided":
        view = torch.randn(*out.shape, 2, device=device)[..., 1]
    elif kind == "transposed":
        view = torch.randn(out.shape[::-1], device=device).permute(tuple(reversed(range(out.dim()))))
    else:
        view = torch._efficientzerotensor(tuple(out.shape), device=device)
    copy = view.clone(memory_format=torch.contiguous_format) if kind != "zero tensor" else torch.zeros_like(out)
    assert not copy.is_neg()
    one, other = (torch.autograd.grad(out, xs, upstream, retain_graph=True) for upstream in (view, copy))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", ["softmax", "dominant_singular_value", "u", "leading-softmax", "modality-leading"])
def test_negated_views_as_embeddings_and_temperatures(backend, device, function):
    xs = [torch.randn(4, 7, device=device) for _ in range(3)]
    tau = torch.tensor(0.3, device=device)
    results = []
    for make in (torch.clone, negated_view):
        ours = [make(x).requires_grad_() for x in xs]
        options = {} if function in ("dominant_singular_value", "u") else {"temperature": make(tau)}
        out = (PER_INSTANCE | MIXING)[function](ours, backend=backend, **options)
        results.append([out.detach(), *grads(out.sum(), ours)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
def test_gradients_for_some_inputs_only(backend, device, function):
    xs = [torch.randn(4, 7, device=device) for _ in range(3)]
    everything = leaves(xs, device, torch.float32)
    out = (PER_INSTANCE | MIXING)[function](everything, backend=backend)
    wanted = grads(out.sum(), everything)
    for some in ([0], [2], [0, 2]):
        part = [x.clone().requires_grad_(m in some) for m, x in enumerate(xs)]
        (PER_INSTANCE | MIXING)[function](part, backend=backend).sum().backward()
        for m, x in enumerate(part):
            assert (x.grad is not None) == (m in some)
            if m in some:
                assert torch.equal(x.grad, wanted[m])


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_input_same_bits(backend, device, dtype, function):
    xs = leaves([torch.randn(33, 130) for _ in range(4)], device, dtype)
    runs = []
    for _ in range(3):
        out = (PER_INSTANCE | MIXING)[function](xs, backend=backend)
        runs.append([out.detach(), *grads(out.square().sum(), xs)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_threads_do_not_disturb_one_another(backend, device):
    from concurrent.futures import ThreadPoolExecutor

    batches = [leaves([torch.randn(16, 24) for _ in range(3)], device, torch.float32) for _ in range(4)]

    def work(xs: list[Tensor]) -> list[Tensor]:
        loss = pmrl_loss(xs, contrast="modality", backend=backend)
        return [loss.detach(), *grads(loss, xs)]

    alone = [work(xs) for xs in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, batches * 4))
    for i, run in enumerate(together):
        assert all(torch.equal(a, b) for a, b in zip(alone[i % 4], run, strict=True))


# ---- what a plausible slip would break ----------------------------------------------------------


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


def test_a_single_column_has_norm_one_exactly(backend, device):
    x = torch.randn(200, 7, dtype=torch.float64, device=device)
    assert (singular_values([x], backend=backend) == 1).all()


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("normalize", [True, False])
def test_absent_modalities_get_zeros_beside_anything(backend, device, function, normalize):
    """Exactly 0, also where the instance's present modalities or the upstream gradient are NaN or Inf."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0]], device=device).bool()
    clean = [torch.randn(4, 6) for _ in range(3)]
    for bad_input, upstream in ((float("nan"), 1.0), (0.3, float("inf")), (0.3, float("nan"))):
        xs = [x.clone() for x in clean]
        xs[0][0, 2] = bad_input
        xs = leaves(xs, device, torch.float32)
        out = (PER_INSTANCE | MIXING)[function](xs, mask=mask, normalize=normalize, backend=backend)
        for m, g in enumerate(torch.autograd.grad(out, xs, torch.full_like(out, upstream))):
            assert not g[~mask[:, m]].any()
            assert torch.equal(g[~mask[:, m]], torch.zeros_like(g[~mask[:, m]]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_upstream_gradients_of_instances_with_nothing_to_align_are_ignored(backend, device, objective):
    xs = leaves([torch.randn(2, 6) for _ in range(3)], device, torch.float32)
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]], device=device).bool()
    out = dominant_sv_loss(xs, mask=mask, objective=objective, reduction="none", backend=backend)
    for g in torch.autograd.grad(out, xs, torch.tensor([1.0, float("inf")], device=device)):
        assert finite(g)
        assert not g[1].any()
    alone = leaves([torch.randn(2, 6)], device, torch.float32)
    out = dominant_sv_loss(alone, objective=objective, reduction="none", backend=backend)
    assert not torch.autograd.grad(out, alone, torch.full_like(out, float("inf")))[0].any()


@pytest.mark.parametrize("contrast", ["leading", "modality"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_contrast_itself_shows_a_bad_row(backend, device, contrast, bad):
    xs = [torch.randn(4, 6, device=device) for _ in range(3)]
    xs[1][2, 0] = bad
    assert pmrl_loss(xs, contrast=contrast, return_components=True, backend=backend).instance.isnan()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("normalize", [True, False])
def test_instance_contrast_does_not_swallow_infinities(backend, device, normalize, bad):
    """−inf − finite is a weight of 0, not a number: the row must be found otherwise."""
    for rows in ([[bad, 1.0], [-1.0, 2.0]], [[bad, bad], [-1.0, 2.0], [1.0, -1.0]]):
        u = torch.tensor(rows, device=device, requires_grad=True)
        loss = instance_contrastive_loss(u, normalize=normalize, backend=backend)
        assert loss.isnan()
        assert grads(loss, [u])[0].isnan().all()


def test_raw_instance_contrast_of_large_norms(backend, device):
    u = torch.tensor([[1e20, 1e20], [1e20, -1e20]], device=device, requires_grad=True)
    loss = instance_contrastive_loss(u, normalize=False, backend=backend)
    assert loss == 0
    assert not grads(loss, [u])[0].any()


def test_raw_instance_contrast_counts_zero_rows_and_large_losses(backend, device):
    """A zero row without normalisation is a row like any other: CE over two equal logits for it."""
    u = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64, device=device)
    wanted = torch.nn.functional.cross_entropy(u.cpu() @ u.cpu().T, torch.arange(2))
    torch.testing.assert_close(instance_contrastive_loss(u, 1.0, normalize=False, backend=backend).cpu(), wanted)
    # log(1 + e²²) is not 22 in float64
    u = torch.tensor([[1.0, 0.0], [23.0, 0.0]], dtype=torch.float64, device=device)
    wanted = (torch.tensor(22.0).double() + torch.log1p(torch.exp(torch.tensor(-22.0).double()))) / 2
    ours = instance_contrastive_loss(u, 1.0, normalize=False, backend=backend).cpu()
    torch.testing.assert_close(ours, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("contrast", ["leading", "modality"])
@pytest.mark.parametrize("upstream", [2.0**-40, 2.0**127])
def test_contrast_gradients_of_extreme_upstreams(backend, device, contrast, upstream):
    """Upstream over τ need not fit float32, only the gradient it makes: it multiplies before the rounding."""
    shared = torch.nn.functional.normalize(torch.randn(4, 64), dim=1)  # far apart: small probabilities
    xs = leaves([shared + 0.01 * torch.randn(4, 64) for _ in range(2)], device, torch.float32)
    found = []
    for factor in (1.0, upstream):
        parts = pmrl_loss(xs, instance_temperature=0.02, contrast=contrast, return_components=True, backend=backend)
        found.append(torch.autograd.grad(parts.instance, xs, torch.full_like(parts.instance, factor)))
    for g, h in zip(*found, strict=True):
        assert g.any()
        torch.testing.assert_close(h.double() / upstream, g.double(), rtol=1e-4, atol=1e-4 * float(g.abs().max()))


@pytest.mark.parametrize("norm", [1e-309, 1e-316, 1e-300, 1e300, 1e307])
def test_unnormalised_vectors_at_the_ends_of_float64(backend, device, norm):
    """∂u/∂x grows as 1/‖x‖: finite where it fits, Inf of the right sign where it does not, never NaN."""
    plain = leaves([torch.randn(1, 5) for _ in range(2)], device, torch.float64)
    u = dominant_singular_triplet(plain, normalize=False, backend=backend).u
    weights = 1e-6 * torch.randn(5, dtype=torch.float64, device=device)
    wanted = grads(u[0] @ weights, plain)
    assert all((g.abs() > 1e-8).all() for g in wanted)  # no zero, whose noise would be scaled up
    scaled = [(x.detach() * norm).requires_grad_() for x in plain]
    u = dominant_singular_triplet(scaled, normalize=False, backend=backend).u
    for g, h in zip(wanted, grads(u[0] @ weights, scaled), strict=True):
        torch.testing.assert_close(h, g / norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", ["softmax"])
def test_temperature_gradient_of_infinite_gaps(backend, device, objective):
    """σ gaps over a tiny τ overflow while their softmax weights vanish: the product is 0, not NaN."""
    xs = leaves([torch.randn(3, 6) for _ in range(3)], device, torch.float64)
    tau = torch.tensor(1e-310, dtype=torch.float64, device=device, requires_grad=True)
    loss = dominant_sv_loss(xs, temperature=tau, objective=objective, backend=backend)
    assert loss == 0
    assert grads(loss, [tau])[0] == 0


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


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("bad", "upstream"), [(float("nan"), 1.0), (0.5, float("inf")), (0.5, float("nan"))])
def test_rows_left_out_of_the_instance_contrast_get_zeros(backend, device, normalize, bad, upstream):
    """Also where the rows that take part, or the upstream gradient, make everything else NaN."""
    u = torch.randn(5, 3, device=device)
    u[0, 0] = bad
    u.requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 0], device=device).bool()
    loss = instance_contrastive_loss(u, normalize=normalize, mask=mask, backend=backend)
    gradient = torch.autograd.grad(loss, u, torch.full_like(loss, upstream))[0]
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


def test_upstream_gradients_of_absent_entries_of_v_are_ignored(backend, device):
    """They are zeros by definition: whatever comes back for them must not reach the present modalities."""
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=device).bool()
    xs = leaves([torch.randn(2, 5) for _ in range(3)], device, torch.float32)
    found = []
    for rubbish in (0.0, 3.0, float("nan")):
        v = dominant_singular_triplet(xs, mask=mask, backend=backend).v
        upstream = torch.tensor([[0.3, rubbish, -1.0], [0.2, 0.7, rubbish]], device=device)
        found.append(torch.autograd.grad(v, xs, upstream))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class _NoGradient(torch.autograd.Function):
    """The identity, whose backward pass has nothing to say."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


@pytest.mark.parametrize("function", ["singular_values", "triplet", "none", "mean", "leading", "pmrl_loss"])
def test_no_upstream_gradient_at_all_gives_zeros(backend, device, function):
    """Autograd says "no gradient" by None, to a backward pass that has been called nevertheless."""
    call = {
        "singular_values": lambda xs: singular_values(xs, backend=backend),
        "triplet": lambda xs: dominant_singular_triplet(xs, backend=backend).u,
        "none": lambda xs: dominant_sv_loss(xs, temperature=tau, reduction="none", backend=backend),
        "mean": lambda xs: dominant_sv_loss(xs, temperature=tau, backend=backend),
        "leading": lambda xs: dominant_sv_loss(xs, objective="leading", backend=backend),
        "pmrl_loss": lambda xs: pmrl_loss(xs, temperature=tau, contrast="modality", backend=backend),
    }[function]
    tau = torch.full((), 0.3, device=device, requires_grad=True)
    xs = leaves([torch.randn(3, 5) for _ in range(3)], device, torch.float32)
    result = _NoGradient.apply(call(xs)).sum()
    for gradient in torch.autograd.grad(result, [*xs, tau], allow_unused=True):
        assert gradient is None or not gradient.any()


# ---- temperatures in tensors --------------------------------------------------------------------

BAD_TEMPERATURES = [(0.0, torch.float32), (-1.0, torch.float16), (math.nan, torch.bfloat16), (math.inf, torch.float64)]
# float32 has no normal numbers for these, only subnormal ones for the last.
OUT_OF_RANGE = [(1e46, torch.float64), (1e-300, torch.float64), (1e-40, torch.float32), (1e-40, torch.bfloat16)]
TINY = torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 4), (2, 2, 1), (5, 3, 4)], ids=str)
@pytest.mark.parametrize(("value", "tau_dtype"), BAD_TEMPERATURES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bad_temperatures_of_the_alignment(backend, device, dtype, value, tau_dtype, shape):
    """NaN, with ∂/∂τ and the gradients of all that is present, whether anything is compared or not."""
    B, k, d = shape
    xs = leaves([torch.randn(B, d) for _ in range(k)], device, dtype)
    mask = torch.ones(B, k, dtype=torch.bool, device=device)
    mask[1:2, 1:] = False
    mask[2:3] = False
    for m, reduction in ((None, "none"), (mask, "none"), (None, "mean"), (mask, "sum")):
        tau = torch.tensor(value, dtype=tau_dtype, device=device, requires_grad=True)
        loss = dominant_sv_loss(xs, temperature=tau, mask=m, reduction=reduction, backend=backend)
        assert loss.isnan().all()
        *found, slope = torch.autograd.grad(loss.sum(), [*xs, tau])
        assert slope.isnan() or loss.numel() == 0  # of no losses at all
        for i, g in enumerate(found):
            here = torch.ones_like(mask[:, i]) if m is None else m[:, i]
            assert g[here].isnan().all()
            assert not g[~here].any()


@pytest.mark.parametrize("function", CONTRASTS)
@pytest.mark.parametrize(("value", "tau_dtype"), BAD_TEMPERATURES + OUT_OF_RANGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bad_temperatures_of_a_contrast(backend, device, dtype, value, tau_dtype, function):
    """As of the alignment. What is refused of a Python number, since it is no normal one in float32, is bad too."""
    for B, d in ((0, 4), (1, 4), (5, 4), (2, 1)):
        xs = leaves([torch.randn(B, d) for _ in range(3)], device, dtype)
        tau = torch.tensor(value, dtype=tau_dtype, device=device, requires_grad=True)
        loss = CONTRASTS[function](*xs, instance_temperature=tau, backend=backend)
        assert loss.isnan(), (B, d)
        *found, slope = torch.autograd.grad(loss, [*xs, tau], allow_unused=True)
        assert slope.isnan(), (B, d)
        assert all(g is None or g.isnan().all() for g in found), (B, d)


@pytest.mark.parametrize("function", CONTRASTS)
@pytest.mark.parametrize(
    ("value", "tau_dtype"),
    [
        *((TINY, torch.float32), (TINY, torch.bfloat16), (1e-30, torch.float64), (2.0**-24, torch.float16)),
        *((3e38, torch.float32), (torch.finfo(torch.bfloat16).max, torch.bfloat16), (65504.0, torch.float16)),
    ],
    ids=str,
)
def test_temperature_tensors_of_a_contrast_mean_their_numbers(backend, device, value, tau_dtype, function):
    """Up to the ends of float32's normal numbers; float16's subnormal ones are among those."""
    xs = leaves([torch.randn(5, 4) for _ in range(3)], device, torch.float32)
    tau = torch.tensor(value, dtype=tau_dtype, device=device, requires_grad=True)
    results = []
    for given in (tau, float(tau)):
        loss = CONTRASTS[function](*xs, instance_temperature=given, backend=backend)
        found = torch.autograd.grad(loss, xs, torch.full_like(loss, min(value, 1e30)), allow_unused=True)
        results.append([loss, *(g for g in found if g is not None)])
    assert all(not x.isnan().any() for x in results[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [1e46, 1e300, 1e-300, 1e-310, 5e-324])
def test_temperatures_of_the_alignment_have_all_of_float64(backend, device, dtype, value):
    """A tensor is its number. Large ones make all singular values equal, small ones the largest all there is."""
    xs = leaves([torch.randn(4, 5) for _ in range(3)], device, dtype)
    tau = torch.tensor(value, dtype=torch.float64, device=device, requires_grad=True)
    loss, same = (dominant_sv_loss(xs, temperature=t, backend=backend) for t in (tau, value))
    assert torch.equal(loss, same)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(3) if value > 1 else 0.0), rtol=1e-6, atol=0)
    *found, slope = torch.autograd.grad(loss, [*xs, tau])
    assert finite(*found)
    assert 0 <= slope <= 1 / value**0.5
    # Of a tie, whose loss depends on no temperature. Its gradient is of the order of 1/τ.
    pair = leaves([torch.eye(5)[:1], torch.eye(5)[1:2]], device, dtype)
    loss = dominant_sv_loss(pair, temperature=tau, backend=backend)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    *found, slope = torch.autograd.grad(loss, [*pair, tau])
    assert slope == 0
    assert finite(*found) or value < (1e-38 if dtype == torch.float32 else 1e-308)
