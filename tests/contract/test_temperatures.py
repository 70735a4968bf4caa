"""Temperatures in tensors: those that are none give NaN, all others are their numbers."""

from __future__ import annotations

import math

import pytest
import torch

from pmrl_kernels import dominant_sv_loss
from tests.tools.functions import CONTRASTS, finite, grads, leaves

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


@pytest.mark.parametrize("objective", ["softmax"])
def test_temperature_gradient_of_infinite_gaps(backend, device, objective):
    """σ gaps over a tiny τ overflow while their softmax weights vanish: the product is 0, not NaN."""
    xs = leaves([torch.randn(3, 6) for _ in range(3)], device, torch.float64)
    tau = torch.tensor(1e-310, dtype=torch.float64, device=device, requires_grad=True)
    loss = dominant_sv_loss(xs, temperature=tau, objective=objective, backend=backend)
    assert loss == 0
    assert grads(loss, [tau])[0] == 0


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
    for given in (tau, float(tau.detach())):
        loss = CONTRASTS[function](*xs, instance_temperature=given, backend=backend)
        found = torch.autograd.grad(loss, xs, torch.full_like(loss, min(value, 1e30)), allow_unused=True)
        results.append([loss, *(g for g in found if g is not None)])
    assert all(not x.isnan().any() for x in results[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
