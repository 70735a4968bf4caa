"""Every backend against float64 ``torch.linalg.svd`` through autograd, where that is well defined."""

from __future__ import annotations

import pytest
import torch

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    instance_contrastive_loss,
    pmrl_loss,
    singular_values,
)
from pmrl_kernels.ops import constants
from pmrl_kernels.ops import reference as shared
from pmrl_kernels.ops.contrast import reference as contrast_reference
from pmrl_kernels.ops.spectral import reference
from tests.tools import oracle
from tests.tools import tolerances as tol
from tests.tools.functions import EVERY_CONTRAST

SHAPES = ((5, 2, 7), (4, 3, 16), (3, 4, 33), (3, 6, 40), (2, 3, 2), (2, 8, 5), (2, 12, 31), (2, 32, 48))  # B, k, d


def embeddings(B: int, k: int, d: int, device: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shared = torch.randn(B, d, dtype=torch.float64)
    return [(shared + torch.randn(B, d, dtype=torch.float64)).to(device, dtype).requires_grad_() for _ in range(k)]


def some_mask(B: int, k: int, device: str) -> torch.Tensor:
    """Random, with an instance of one modality and one of none where the batch has room for both."""
    mask = torch.rand(B, k) < 0.7
    mask[0, :2] = True
    if B > 2:
        mask[1], mask[2] = False, torch.arange(k) == k - 1
    return mask.to(device)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = tol.FORMULA_64) -> None:
    ours, theirs = ours.detach().cpu().double(), theirs.detach()
    assert ours.shape == theirs.shape
    scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def same_gradients(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = tol.FORMULA_64) -> None:
    for x, y in zip(ours, theirs, strict=True):
        close(x.grad, torch.zeros_like(y) if y.grad is None else y.grad.nan_to_num(0.0), tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstSVD:
    @pytest.mark.parametrize("objective", ["softmax", "leading"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_alignment(self, backend, device, shape, normalize, masked, objective, reduction):
        xs = embeddings(*shape, device)
        mask = some_mask(shape[0], shape[1], device) if masked else None
        ys, tau, tau64 = oracle.upcast(xs), *(torch.tensor(0.3, dtype=torch.float64) for _ in range(2))
        tau = tau.to(device).requires_grad_()
        tau64.requires_grad_()
        ours = dominant_sv_loss(
            xs,
            temperature=tau,
            mask=mask,
            normalize=normalize,
            objective=objective,
            reduction=reduction,
            backend=backend,
        )
        mask = None if mask is None else mask.cpu()
        theirs = oracle.alignments(ys, tau64, mask, normalize, objective)
        if reduction != "none":
            theirs = theirs.sum() if reduction == "sum" else oracle.mean_alignment(theirs, shape[1], mask)
        close(ours, theirs)
        weights = torch.randn(theirs.shape, dtype=torch.float64)
        (ours * weights.to(device)).sum().backward()
        (theirs * weights).sum().backward()
        same_gradients(xs, ys)
        if objective == "softmax":
            same_gradients([tau], [tau64])

    def test_singular_values(self, backend, device, shape, normalize, masked):
        B, k, d = shape
        xs = embeddings(*shape, device)
        mask = some_mask(B, k, device) if masked else None
        ys = oracle.upcast(xs)
        ours = singular_values(xs, mask=mask, normalize=normalize, backend=backend)
        rows = []
        for i in range(B):
            if mask is not None and not mask[i].any():
                rows.append(torch.zeros(min(d, k), dtype=torch.float64))
                continue
            S = oracle.triplet(oracle.columns(ys, i, None if mask is None else mask.cpu(), normalize))[0]
            rows.append(torch.nn.functional.pad(S, (0, min(d, k) - len(S))))
        theirs = torch.stack(rows)
        close(ours, theirs)
        weights = torch.randn(theirs.shape, dtype=torch.float64)
        (ours * weights.to(device)).sum().backward()
        (theirs * weights).sum().backward()
        same_gradients(xs, ys)

    def test_leading_triplet(self, backend, device, shape, normalize, masked):
        B, k, _ = shape
        xs = embeddings(*shape, device)
        mask = some_mask(B, k, device) if masked else None
        ys = oracle.upcast(xs)
        sigma, u, v = dominant_singular_triplet(xs, mask=mask, normalize=normalize, backend=backend)
        close(dominant_singular_value(xs, mask=mask, normalize=normalize, backend=backend), sigma.detach().cpu())
        weights = [torch.randn(x.shape, dtype=torch.float64) for x in (sigma, u, v)]
        total = torch.zeros((), dtype=torch.float64)
        for i in range(B):
            here = torch.ones(k, dtype=torch.bool) if mask is None else mask[i].cpu()
            if not here.any():
                assert not sigma[i].any()
                assert not u[i].any()
                assert not v[i].any()
                continue
            S, u_i, v_i = oracle.triplet(oracle.columns(ys, i, None if mask is None else mask.cpu(), normalize))
            close(sigma[i], S[0])
            close(u[i], u_i)
            close(v[i][here.to(device)], v_i)
            assert not v[i][~here.to(device)].any()
            total = total + weights[0][i] * S[0] + weights[1][i] @ u_i + weights[2][i][here] @ v_i
        sum((w.to(device) * x).sum() for w, x in zip(weights, (sigma, u, v), strict=True)).backward()
        total.backward()
        same_gradients(xs, ys, 1e-8)  # d < k and k = 32 leave gaps of 1e-2: both sides lose digits

    @pytest.mark.parametrize("contrast", EVERY_CONTRAST)
    @pytest.mark.parametrize("objective", ["softmax", "leading"])
    def test_pmrl(self, backend, device, shape, normalize, masked, contrast, objective):
        xs = embeddings(*shape, device)
        mask = some_mask(shape[0], shape[1], device) if masked else None
        ys = oracle.upcast(xs)
        taus = [torch.tensor(t, dtype=torch.float64, device=device, requires_grad=True) for t in (0.5, 0.7)]
        taus64 = oracle.upcast(taus)
        ours = pmrl_loss(
            xs,
            temperature=taus[0],
            instance_temperature=taus[1],
            instance_weight=0.6,
            mask=mask,
            normalize=normalize,
            objective=objective,
            contrast=contrast,
            return_components=True,
            backend=backend,
        )
        mask = None if mask is None else mask.cpu()
        theirs = oracle.pmrl(ys, *taus64, 0.6, mask, normalize, objective, contrast)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)
        weights = (0.3, 1.7, -0.4)  # every component at once, each with its own upstream gradient
        sum(w * x for w, x in zip(weights, ours, strict=True)).backward()
        sum(w * x for w, x in zip(weights, theirs, strict=True)).backward()
        same_gradients(xs, ys, 1e-8)
        same_gradients(taus[objective == "leading" :], taus64[objective == "leading" :])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_instance_contrast(backend, device, normalize, masked):
    u = torch.randn(9, 5, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.arange(9, device=device) % 3 > 0 if masked else None
    tau = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    v, tau64 = oracle.upcast([u, tau])
    ours = instance_contrastive_loss(u, tau, normalize=normalize, mask=mask, backend=backend)
    rows = v / torch.linalg.vector_norm(v, dim=1, keepdim=True) if normalize else v
    theirs = oracle.instance(rows, tau64, None if mask is None else mask.cpu())
    close(ours, theirs)
    (3 * ours).backward()
    (3 * theirs).backward()
    same_gradients([u, tau], [v, tau64])


def test_contrasts_are_the_same_in_tiles(device, monkeypatch):
    """The reference goes tile by tile; a tile size that divides nothing must change no value."""
    xs = embeddings(11, 3, 6, device)
    mask = some_mask(11, 3, device)
    for contrast in EVERY_CONTRAST:
        values, grads = [], []
        for tile in (1 << 22, 11, 40):
            for name in ("_TILE", "_DEVICE_TILE"):
                monkeypatch.setattr(contrast_reference, name, tile)
            loss = pmrl_loss(xs, mask=mask, contrast=contrast, backend="reference")
            values.append(loss.detach())
            grads.append(torch.autograd.grad(loss, xs))
        for value, grad in zip(values[1:], grads[1:], strict=True):
            torch.testing.assert_close(value, values[0], rtol=1e-13, atol=0)
            torch.testing.assert_close(grad, grads[0], rtol=1e-11, atol=1e-13)


def test_blocks_of_rows_change_nothing(device, monkeypatch):
    """The reference reads embeddings in blocks; a batch of many blocks gives what one block gives."""
    xs = embeddings(7, 3, 10, device, torch.float32)
    mask = some_mask(7, 3, device)
    results = []
    for block in (1 << 19, 3 * 10 * 2):
        for name in ("_HOST_BLOCK", "_DEVICE_BLOCK"):
            monkeypatch.setattr(reference, name, block)
        loss = pmrl_loss(xs, mask=mask, contrast="modality", backend="reference")
        results.append((loss.detach(), *torch.autograd.grad(loss, xs)))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gaps", [1.1, 3.0, 100.0])
@pytest.mark.parametrize("k", [2, 4, 8, 12, 16, 24, 32])
@pytest.mark.parametrize("float64_input", [False, True])
@pytest.mark.parametrize("first", [1.0, -0.5])
def test_power_iteration_resolves_every_gap_that_counts(device, k, float64_input, gaps, first):
    """Stopping early must not mistake a small gap, which moves the iterate slowly at first, for a tie."""
    gap = gaps * constants.eigenvalue_gap(k, float64_input)
    v = torch.linspace(first, 2, k, dtype=torch.float64, device=device)[None]
    v = v / torch.linalg.vector_norm(v)
    G = torch.eye(k, dtype=torch.float64, device=device) + gap * v[:, :, None] * v[:, None, :]
    top, ours = reference._power_iteration(G, float64_input)
    # G itself holds the gap to eps64 only: 1e-16 beside gap
    torch.testing.assert_close(ours, v, rtol=0, atol=10 * tol.EPS64 / gap)
    rounding = max(4, k // 4) * tol.EPS64  # of sums of k products, in whatever order
    torch.testing.assert_close(top, torch.full_like(top, 1 + gap), rtol=rounding, atol=0)


def test_power_iteration_from_a_start_nearly_orthogonal_to_the_answer(device):
    """Σ v₁ = 1e-9: what rounding adds to P·1 is then no longer small beside it."""
    v = torch.tensor([[1.0, -1.0 + 2e-9, 0.0]], dtype=torch.float64, device=device)
    v = v / torch.linalg.vector_norm(v)
    w = torch.tensor([[0.6, 0.6, 0.5]], dtype=torch.float64, device=device)
    w = w - (w @ v.T) * v
    w = w / torch.linalg.vector_norm(w)
    x = torch.linalg.cross(v, w)
    G = sum(s * y[:, :, None] * y[:, None, :] for s, y in ((2.0, v), (1.9, w), (0.3, x)))
    ours = reference._power_iteration(G, False)[1]
    torch.testing.assert_close(ours, v, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("k", "B", "GiB"), [(3, 9000, 4.55), (4, 13203, 6.75), (12, 9000, 5.04), (32, 9000, 6.25)])
def test_a_gibibyte_is_enough_to_decompose_in(k, B, GiB):
    """By what cuSOLVER asked for of so many matrices."""
    assert 0.99 < shared.at_once(k) * GiB / B < 1.01
    assert shared.at_once(1) < 1 << 16
    assert shared.at_once(1 << 14) == 1


@pytest.mark.parametrize("number", [1, 3, 7, 100])
def test_matrices_are_decomposed_some_at_a_time(number):
    """As on a GPU, where its library works in a gibibyte."""
    A = torch.randn(7, 4, 4, dtype=torch.float64)
    A = A + A.mT
    for some, whole in zip(shared.decomposed(A, number), torch.linalg.eigh(A), strict=True):
        assert torch.equal(some, whole)
    assert [len(part) for part in shared.decomposed(A[:0], number)] == [0, 0]
