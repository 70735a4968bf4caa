"""Singular values, alignment losses and their gradients in every dtype, beside those of a float64 SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmrl_kernels import dominant_singular_value, dominant_sv_loss, singular_values
from tests.tools import oracle
from tests.tools import tolerances as tol
from tests.tools.functions import DTYPES, OBJECTIVES, almost_equal, grads, leaves, svdvals64, with_spectrum


def spectra(k: int) -> dict[str, Tensor]:
    graded = torch.logspace(0, -7, k, dtype=torch.float64)  # down to the floor
    near_rank_1 = torch.full((k,), 1e-6, dtype=torch.float64) * torch.linspace(1, 2, k, dtype=torch.float64)
    near_rank_1[0] = k**0.5
    clustered = 1 + 1e-3 * torch.arange(k, 0, -1, dtype=torch.float64)
    return {"graded": graded, "near rank 1": near_rank_1, "clustered": clustered}


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


def test_a_single_column_has_norm_one_exactly(backend, device):
    x = torch.randn(200, 7, dtype=torch.float64, device=device)
    assert (singular_values([x], backend=backend) == 1).all()
