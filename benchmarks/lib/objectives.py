"""The contrasts, the whole PMRL objective and joint scores as they are written elsewhere: plain PyTorch, float32.

Each objective takes k embeddings (B, d) and returns the mean alignment loss plus the instance contrast of the leading
singular vectors. The two in k-space are meant to be the strongest that plain PyTorch allows, as in formulations.py:
gradients by hand, and two matrix products for the contrast where autograd makes three of ``cross_entropy(u @ u.T)``,
since the weights of a symmetric matrix are added to their transposes before they multiply u.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import cross_entropy, normalize

from .formulations import alignment, coefficients, combine, products, spectrum

# ------------------------------------------------------------------------------------------------
# Contrasts
# ------------------------------------------------------------------------------------------------


def instance_contrast(x: Tensor, tau: float) -> Tensor:
    u = normalize(x, dim=1)
    return cross_entropy(u @ u.T / tau, torch.arange(len(u), device=u.device))


def all_pairs(embeddings: Sequence[Tensor], tau: float) -> Tensor:
    """InfoNCE over all pairs of modalities, both ways."""
    zs = [normalize(x, dim=1) for x in embeddings]
    everyone = torch.arange(len(zs[0]), device=zs[0].device)
    total = embeddings[0].new_zeros(())
    for m in range(len(zs)):
        for n in range(m):
            s = zs[m] @ zs[n].T / tau
            total = total + cross_entropy(s, everyone) + cross_entropy(s.T, everyone)
    return total / (len(zs) * (len(zs) - 1))


# ------------------------------------------------------------------------------------------------
# Joint scores (N, N) of queries and candidates, each as its published code goes about it: the first is the query
# ------------------------------------------------------------------------------------------------


def gram_matrices(xs: Sequence[Tensor]) -> Tensor:
    """(N, N, k, k): inner products of [t_i, c_j1, ..., c_jn] for every pair."""
    query, *candidates = (normalize(x, dim=1) for x in xs)
    N, k = len(query), len(xs)
    entries = {(0, 0): query.square().sum(1)[:, None].expand(N, N)}
    for m, c in enumerate(candidates, start=1):
        entries[0, m] = query @ c.T
        for n, other in enumerate(candidates[:m], start=1):
            entries[n, m] = (c * other).sum(1).expand(N, N)
    rows = [torch.stack([entries[min(m, n), max(m, n)] for n in range(k)], 2) for m in range(k)]
    return torch.stack(rows, 2)


def determinant_volumes(xs: Sequence[Tensor]) -> Tensor:
    """As GRAM: the root of the determinant's modulus."""
    return torch.linalg.det(gram_matrices(xs)).abs().sqrt()


def eigenvalue_sigmas(xs: Sequence[Tensor]) -> Tensor:
    return torch.linalg.eigvalsh(gram_matrices(xs))[..., -1].sqrt()


def eigenvalue_gains(xs: Sequence[Tensor]) -> Tensor:
    alone = torch.stack([normalize(x, dim=1) for x in xs[1:]], 1)
    return torch.linalg.eigvalsh(gram_matrices(xs))[..., -1] - torch.linalg.eigvalsh(alone @ alone.mT)[:, -1]


def difference_areas(xs: Sequence[Tensor]) -> Tensor:
    """As TRIANGLE, from differences (N, N, d): (|u|²|w|² − (u·w)²)/2."""
    t, a, b = (normalize(x, dim=1) for x in xs)
    u, w = t[:, None] - a, t[:, None] - b
    return (u.square().sum(2) * w.square().sum(2) - (u * w).sum(2).square()) / 2


def joint_contrast(logits: Tensor, label_smoothing: float) -> Tensor:
    """Both directions, the diagonal being right."""
    everyone = torch.arange(len(logits), device=logits.device)
    return sum(cross_entropy(s, everyone, label_smoothing=label_smoothing) for s in (logits, logits.T)) / 2


# ------------------------------------------------------------------------------------------------
# The objective, differentiated by autograd
# ------------------------------------------------------------------------------------------------


def _objective(sigma: Tensor, u: Tensor, temperature: float, tau: float) -> Tensor:
    return alignment(sigma, temperature) + cross_entropy(u @ u.T / tau, torch.arange(len(u), device=u.device))


def reduced_svd(embeddings: Sequence[Tensor], temperature: float, tau: float) -> Tensor:
    Z = torch.stack([normalize(x, dim=1) for x in embeddings], 2)
    U, sigma, Vh = torch.linalg.svd(Z, full_matrices=False)
    return _objective(sigma, U[:, :, 0] * Vh[:, 0].sum(1).sign()[:, None], temperature, tau)


def gram_eigh(embeddings: Sequence[Tensor], temperature: float, tau: float) -> Tensor:
    Z = torch.stack([normalize(x, dim=1) for x in embeddings], 1)
    eigenvalues, V = torch.linalg.eigh(Z @ Z.mT)
    sigma, v = eigenvalues.flip(1).clamp_min(1e-12).sqrt(), V[:, :, -1]
    v = v * v.sum(1, keepdim=True).sign()
    return _objective(sigma, (v[:, None] @ Z)[:, 0] / sigma[:, :1], temperature, tau)


# ------------------------------------------------------------------------------------------------
# The objective in k-space, differentiated by hand
# ------------------------------------------------------------------------------------------------


def leading(gram: Tensor, temperature: float) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The mean alignment loss, a (B, k) with u = Σ_m a_m x_m, and what :func:`pull_back` needs."""
    found = spectrum(gram, temperature)
    V = found.V * torch.where(found.V[:, :, -1:].sum(1, keepdim=True) < 0, -1.0, 1.0)
    top, rest = found.sigma[:, -1:], found.sigma[:, :-1]
    # u = Zᵀ v₁/σ₁ pulls p = Z ∂u back through v_j (v_j·p)/(σ₁ (σ₁² − σ_j²)), and through −(v₁·p) v₁ v₁ᵀ/σ₁³.
    gaps = torch.cat((1 / (top * (top + rest) * (top - rest)), -0.5 / top**3), 1)
    a = V[:, :, -1] / top * found.inverse
    return found.loss, a, (a, found.gram, found.inverse, V, gaps, coefficients(found))


def pull_back(saved: tuple[Tensor, ...], p: Tensor, scale: Tensor) -> Tensor:
    """C with dX = C X + a ⊗ ∂u, where p_m = x_m·∂u, for ``scale`` times the sum of the batch's alignment losses."""
    a, gram, inverse, V, gaps, C = saved
    y = (V * ((V * (p * inverse)[:, :, None]).sum(1) * gaps)[:, None, :]).sum(2)
    N = V[:, :, -1:] * y[:, None, :]
    N = N + N.mT
    N = N - torch.diag_embed((gram * N).sum(2) + a * p)
    return C * scale + N * inverse[:, :, None] * inverse[:, None, :]


def contrast(u: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    s = u @ u.T / tau
    sums = s.logsumexp(1)
    return (sums - s.diagonal()).mean(), s, sums


def contrast_gradient(u: Tensor, s: Tensor, sums: Tensor, tau: float) -> Tensor:
    weights = torch.exp(s - sums[:, None]) + torch.exp(s - sums)  # symmetric: one product for both of u's places
    return (weights @ u - 2 * u) / (tau * len(u))


class EagerObjective(Function):
    """(temperature, tau, *embeddings) -> the mean loss."""

    @staticmethod
    def forward(ctx: Any, temperature: float, tau: float, *embeddings: Tensor) -> Tensor:
        X = torch.stack(embeddings, 1)
        loss, a, saved = leading(torch.bmm(X, X.mT), temperature)
        u = torch.bmm(a[:, None], X)[:, 0]
        contrast_loss, s, sums = contrast(u, tau)
        ctx.save_for_backward(X, u, s, sums, *saved)
        ctx.tau = tau
        return loss + contrast_loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        X, u, s, sums, *saved = ctx.saved_tensors
        du = contrast_gradient(u, s, sums, ctx.tau) * grad
        C = pull_back(tuple(saved), torch.bmm(X, du[:, :, None])[:, :, 0], grad / len(X))
        k, a = X.shape[1], saved[0]
        return (
            None,
            None,
            *(torch.baddbmm(a[:, m, None, None] * du[:, None], C[:, m : m + 1], X)[:, 0] for m in range(k)),
        )


class FusedObjective(Function):
    """The same in a form for a compiler: no stack, no bmm over d."""

    @staticmethod
    def forward(ctx: Any, temperature: float, tau: float, *embeddings: Tensor) -> Tensor:
        k, dots = len(embeddings), products(embeddings)
        gram = torch.stack([dots[min(i, j), max(i, j)] for i in range(k) for j in range(k)], 1).view(-1, k, k)
        loss, a, saved = leading(gram, temperature)
        (u,) = combine([a.unbind(1)], embeddings)
        contrast_loss, s, sums = contrast(u, tau)
        ctx.save_for_backward(u, s, sums, *saved, *embeddings)
        ctx.tau = tau
        return loss + contrast_loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        u, s, sums, *others = ctx.saved_tensors
        saved, embeddings = tuple(others[:6]), others[6:]
        du = contrast_gradient(u, s, sums, ctx.tau) * grad
        C = pull_back(saved, torch.stack([(x * du).sum(1) for x in embeddings], 1), grad / len(u))
        rows = [[*row.unbind(1), a] for row, a in zip(C.unbind(1), saved[0].unbind(1), strict=True)]
        return None, None, *combine(rows, [*embeddings, du])


def k_space(embeddings: Sequence[Tensor], temperature: float, tau: float) -> Tensor:
    return EagerObjective.apply(temperature, tau, *embeddings)


@functools.cache
def _compiled(temperature: float, tau: float) -> Callable[..., Any]:
    return torch.compile(lambda *embeddings: FusedObjective.apply(temperature, tau, *embeddings), dynamic=False)


def k_space_compiled(embeddings: Sequence[Tensor], temperature: float, tau: float) -> Tensor:
    return _compiled(temperature, tau)(*embeddings)
