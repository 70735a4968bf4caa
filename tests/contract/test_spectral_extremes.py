"""Zero vectors, and norms at the ends of what a dtype can hold."""

from __future__ import annotations

import pytest
import torch

from pmrl_kernels import dominant_singular_triplet, dominant_singular_value, dominant_sv_loss, singular_values
from tests.tools.functions import DTYPES, MIXING, OBJECTIVES, PER_INSTANCE, finite, grads, leaves


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
