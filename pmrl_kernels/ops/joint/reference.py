"""Joint scores in PyTorch: in float64, tile by tile, n matrix products for all pairs of queries and candidates.

**Basis.** With the Gram matrix of a candidate's modalities K = C Cᵀ = V diag(μ) Vᵀ, the rows u_m = (Vᵀ C)_m/√μ_m are an
orthonormal basis of their span, and of a pair only q_m = u_m·t matters. An absent modality has K_mm = −1 instead: an
eigenvector of its own, which mixes with nothing, and is dropped. So is a μ_m that is not resolved
(``constants.singular_value_floor``): K is singular.

**Volumes.** det G = det K · r, r = ‖t‖² − Σ q_m².

**Largest eigenvalues.** In the basis [t, C/√μ] G is diagonal but for one row, and x = λ₁ − μ₁ >= 0 is the largest root
of x + Δ = Σ_m w_m/(x + δ_m), with Δ = μ₁ − ‖t‖², w_m = μ_m q_m², δ_m = μ₁ − μ_m. See ``_largest_root``. The eigenvector
is v₀ (1, ŷ), ŷ_m = √μ_m q_m/(x + δ_m).

**Gradients** are those of ĉ_m = (Vᵀ C)_m with V frozen, which is exact, since scores do not depend on the basis: no
derivative of an eigensolver, no division by gaps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import constants
from ..operators import Operators, Pair
from ..reference import NAME, NAMESPACE, eigenpairs, read_mask, rejects
from . import spec

_TILE = 1 << 18  # pairs at a time on a CPU, with a few float64 numbers for each of n modalities
_DEVICE_TILE = 1 << 22

_STEPS = 7
"""Of the root finder. The most that were needed by any of eight families of a hundred thousand pairs each, k <= 32."""


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Rows (N, d) in float64, divided by ``scale`` and ``norm`` (N, 1), if they are to be unit vectors."""

    z: Tensor
    scale: Tensor | None
    norm: Tensor | None

    def pulled(self, gradient: Tensor) -> Tensor:
        """The gradient of the rows as they came, from that of z."""
        if self.scale is None or self.norm is None:
            return gradient
        along = (gradient * self.z).sum(1, keepdim=True)
        found = (gradient - along * self.z) / self.norm / self.scale
        return torch.where(self.norm == 0, 0.0, found)


def _lengths(z: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return found


def _rows(x: Tensor, present: Tensor | None, normalize: bool, lengths: Callable[[Tensor], Tensor] = _lengths) -> _Rows:
    """Absent ones are 0, whatever they hold."""
    x = x.double()
    if present is not None:
        x = torch.where(present[:, None], x, 0.0)
    if not normalize:
        return _Rows(x, None, None)
    scale = x.abs().amax(1, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    z = x / scale  # whose squares neither overflow nor vanish
    norm = lengths(z)
    return _Rows(z / torch.where(norm == 0, 1.0, norm), scale, norm)


class _Candidates(NamedTuple):
    """(Ng, ...) of everyone."""

    mu: Tensor  # (Ng, n), 0 where dropped
    V: Tensor  # (Ng, n, n)
    u: Tensor  # (n, Ng, d), 0 where dropped
    root: Tensor  # √μ, (n, Ng)
    there: Tensor  # (n, Ng), False for absent modalities
    kept: Tensor  # (n, Ng)


def _decomposed(C: Tensor, present: Tensor | None) -> list[Tensor]:
    """μ, 0 where it is not resolved and −1 where absent, and V of C (Ng, n, d)."""
    K = C @ C.mT
    if present is not None:
        K = K - torch.diag_embed((~present).to(K.dtype))
    return list(eigenpairs(K))


def _candidates(
    C: Tensor,
    state: Sequence[Tensor],
    float64_input: bool,
    rotated: Callable[[Tensor, Tensor], Tensor] = lambda V, C: V.mT @ C,
) -> _Candidates:
    mu, V = state
    n = mu.shape[1]
    floor = constants.singular_value_floor(n, float64_input) ** 2
    absent = mu < -0.5
    dropped = absent | (mu <= floor * mu[:, :1].clamp_min(0.0))
    mu = mu.masked_fill(dropped, 0.0)
    root = mu.sqrt()
    inverse = torch.where(dropped, 0.0, 1.0 / torch.where(dropped, 1.0, root))
    u = rotated(V, C) * inverse[:, :, None]
    return _Candidates(mu, V, u.transpose(0, 1).contiguous(), root.T, ~absent.T, ~dropped.T)


def _without_each(factors: Tensor) -> Tensor:
    """Products of all factors (n, Ng) but one, without a division."""
    before, after = torch.ones_like(factors), torch.ones_like(factors)
    for m in range(1, len(factors)):
        before[m] = before[m - 1] * factors[m - 1]
        after[-1 - m] = after[-m] * factors[-m]
    return before * after


def _tiles(queries: int, candidates: int, n: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Of queries and candidates, in order. There may be none."""
    room = max(1, (_TILE if device.type == "cpu" else _DEVICE_TILE) // n)
    width = max(1, min(candidates, 4096, room))
    height = max(1, room // width)
    for i in range(0, queries, height):
        for j in range(0, candidates, width):
            yield slice(i, i + height), slice(j, j + width)


def ordered_sum(x: Tensor, dim: int = 0) -> Tensor:
    """The sum along a dimension, by adding halves until one is left: each with the same additions in the same order,
    wherever it is, among however many, on every device and with any number of threads. ``Tensor.sum`` promises that
    of none of these."""
    size = x.shape[dim]
    while size > 1:
        half = (size + 1) // 2
        first, second = x.narrow(dim, 0, half), x.narrow(dim, half, size - half)
        if size % 2:
            first = first.clone()
            first.narrow(dim, 0, size - half).add_(second)
            x = first
        else:
            x = first + second
        size = half
    return x.select(dim, 0)


# ------------------------------------------------------------------------------------------------
# Scores of a tile
# ------------------------------------------------------------------------------------------------


def _largest_root(w: Tensor, poles: Tensor, excess: Tensor) -> Tensor:
    """The largest x >= 0 with x + excess = Σ_m w_m/(x + poles_m), or 0 if there is none: w (n, I, J), poles (n, 1, J),
    the first of them 0; excess (I, J).

    It begins with the largest root of one w_m alone. A step replaces the terms with near poles, at most x, by one
    fraction with the same value and slope, and the others by their tangent: 1/Σ is concave and the others are convex,
    so that x grows and never passes the root, and converges quadratically.
    """
    tiny = torch.finfo(w.dtype).tiny
    half, part = (excess + poles) / 2, (excess - poles) / 2
    s = torch.sqrt(part * part + w)
    alone = torch.where(half > 0, (w - excess * poles) / (s + half).clamp_min(tiny), s - half)
    x = alone.amax(0).clamp_min(0.0)
    for _ in range(_STEPS if len(w) > 1 else 0):
        near, inverse = poles <= x, 1.0 / (x + poles).clamp_min(tiny)
        term = w * inverse
        slope = term * inverse
        phi, phi_slope = ordered_sum(torch.where(near, term, 0.0)), ordered_sum(torch.where(near, slope, 0.0))
        psi, psi_slope = ordered_sum(torch.where(near, 0.0, term)), ordered_sum(torch.where(near, 0.0, slope))
        y = torch.where(phi_slope == 0, x, phi / torch.where(phi_slope == 0, 1.0, phi_slope))
        a, b = 1.0 + psi_slope, excess - psi - psi_slope * x + (1.0 + psi_slope) * (x - y)
        s = torch.sqrt(b * b + 4.0 * a * phi * y)
        step = torch.where(b > 0, 2.0 * phi * y / (b + s).clamp_min(tiny), (s - b) / (2.0 * a))
        x = torch.maximum(x, x + step - y)
    return x


def _planes(t: Tensor, of: _Candidates, columns: slice) -> Tensor:
    """q, (n, I, J)"""
    return t @ of.u[:, columns].mT


def _distance2(beta: Tensor, q: Tensor) -> Tensor:
    """r, (I, J)"""
    return (beta - (q * q).sum(0)).clamp_min(0.0)


def _gain(beta: Tensor, q: Tensor, of: _Candidates, columns: slice | Tensor) -> Tensor:
    """x, (I, J)"""
    mu = of.mu[columns].T[:, None]
    return _largest_root(mu * q * q, mu[:1] - mu, mu[0] - beta)


def _tile_of_scores(score: int, beta: Tensor, q: Tensor, of: _Candidates, columns: slice) -> Tensor:
    if score in (spec.VOLUME, spec.VOLUME2, spec.SINE):
        r = _distance2(beta, q)
        if score == spec.SINE:
            return r.sqrt()
        volume = _volumes(of)[columns]
        return volume * r.sqrt() if score == spec.VOLUME else volume * volume * r
    x = _gain(beta, q, of, columns)
    if score == spec.GAIN:
        return x
    largest = of.mu[columns, 0] + x
    return largest.sqrt() if score == spec.SIGMA else largest


def _factors(of: _Candidates) -> Tensor:
    """Of √det K, (n, Ng): an absent modality is none."""
    return torch.where(of.there, of.root, 1.0)


def _volumes(of: _Candidates) -> Tensor:
    """√det K, (Ng,)"""
    return functools.reduce(torch.mul, _factors(of).unbind(0))


# ------------------------------------------------------------------------------------------------
# The triangle
# ------------------------------------------------------------------------------------------------


class _Edge(NamedTuple):
    """Of two modalities v and a: their middle m, their difference g, its length and its direction."""

    middle: Tensor
    length: Tensor  # (Ng,)
    direction: Tensor

    def heights(self, t: Tensor, beta: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """q = ĝ·(t − m) and ρ, the squared distance of t from the line, (I, J)."""
        m, direction = self.middle[columns], self.direction[columns]
        q = t @ direction.T - (m * direction).sum(1)
        away = beta + (m * m).sum(1) - 2.0 * (t @ m.T)
        return q, (away - q * q).clamp_min(0.0)


def _edge(C: Tensor, lengths: Callable[[Tensor], Tensor] = lambda z: _lengths(z)[:, 0]) -> _Edge:
    v, a = C.unbind(1)
    length = lengths(a - v)
    direction = (a - v) / torch.where(length == 0, 1.0, length)[:, None]
    return _Edge((v + a) / 2, length, direction)


def _triangle_gradients(t: Tensor, beta: Tensor, edge: _Edge, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of t (Nq, d) and of C (Ng, 2, d), from that of ½‖g‖²ρ. With e = t − m − q ĝ, the height of the triangle:
    ∂t = ‖g‖² e, ∂m = −‖g‖² e, ∂g = ρ g − q ‖g‖ e."""
    d_t, d_m, d_g = torch.zeros_like(t), torch.zeros_like(edge.middle), torch.zeros_like(edge.middle)
    for I, J in _tiles(len(t), len(edge.length), 2, t.device):  # noqa: E741
        q, rho = edge.heights(t[I], beta[I], J)
        m, length, direction = edge.middle[J], edge.length[J], edge.direction[J]
        W = grad[I, J].double()
        A = W * (length * length)
        d_t[I] += A.sum(1, keepdim=True) * t[I] - A @ m - (A * q) @ direction
        d_m[J] -= A.T @ t[I] - A.sum(0)[:, None] * m - (A * q).sum(0)[:, None] * direction
        Wq = W * q
        height = Wq.T @ t[I] - Wq.sum(0)[:, None] * m - (Wq * q).sum(0)[:, None] * direction
        d_g[J] += length[:, None] * ((W * rho).sum(0)[:, None] * direction - height)
    return d_t, torch.stack((d_m / 2 - d_g, d_m / 2 + d_g), 1)


# ------------------------------------------------------------------------------------------------
# Gradients
# ------------------------------------------------------------------------------------------------


def _inverse_distance(r: Tensor, beta: Tensor) -> Tensor:
    """1/√r. Its product with t − Σ q u has norm 1, and no more where r is mostly rounding; 0, the subgradient of least
    norm, where it is nothing else."""
    lost = 16 * constants.EPS64 * beta
    return torch.where(r <= lost, r * 0.0, 1.0 / torch.maximum(r, constants.EPS32**2 * beta).sqrt())


def _gradients(score: int, t: Tensor, of: _Candidates, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of t (Nq, d) and of C (Ng, n, d): dT = diag(own) T + Σ_m S_m B_m and, before it is turned by V,
    dĈ_m = c_m (S_mᵀ T + Σ_l M_ml B_l), B_m the basis vector times ``length``."""
    n, beta = len(of.u), (t * t).sum(1, keepdim=True)
    volumes = score in (spec.VOLUME, spec.VOLUME2, spec.SINE)
    d_t, d_c = torch.zeros_like(t), torch.zeros_like(of.u)
    M = t.new_zeros((n, n, of.u.shape[1]))
    basis = of.u if volumes else of.u * of.root[:, :, None]
    volume = _volumes(of) if score in (spec.VOLUME, spec.VOLUME2) else torch.ones_like(of.root[0])
    for I, J in _tiles(len(t), of.u.shape[1], n, t.device):  # noqa: E741
        q, W = _planes(t[I], of, J), grad[I, J].double()
        if volumes:
            r = _distance2(beta[I], q)
            own = 2.0 * W * volume[J] if score == spec.VOLUME2 else W * _inverse_distance(r, beta[I])
            S, y = -own * q, -q
            if score != spec.SINE:  # how the volume of the candidate itself changes
                M.diagonal()[J] += (own * r).sum(0)[:, None]
        else:
            x = _gain(beta[I], q, of, J)
            mu = of.mu[J].T[:, None]
            if score == spec.SIGMA:
                sigma = (mu[0] + x).sqrt()
                W = torch.where(sigma == 0, W * 0.0, W / (2.0 * torch.where(sigma == 0, 1.0, sigma)))
            tiny = torch.finfo(x.dtype).tiny
            still = x <= tiny  # the query adds nothing: λ₁ is μ₁
            y = torch.where(still, q * 0.0, of.root[:, J][:, None] * q / (x + mu[:1] - mu).clamp_min(tiny))
            own = torch.where(still, W * 0.0, 2.0 * W / (1.0 + (y * y).sum(0)))
            S = own * y
            M[0, 0, J] += torch.where(still, 2.0 * W, W * 0.0).sum(0)
            if score == spec.GAIN:
                M[0, 0, J] -= 2.0 * W.sum(0)
        M[:, :, J] += torch.einsum("mij,lij->mlj", S, y)
        scaled = basis[:, J] * volume[J, None]
        d_t[I] += (own * volume[J]).sum(1, keepdim=True) * t[I] + (S @ scaled).sum(0)
        d_c[:, J] += S.mT @ t[I]
    d_c += torch.einsum("mlj,ljd->mjd", M, basis)
    if volumes:
        inverse = torch.where(of.kept, 1.0 / torch.where(of.kept, of.root, 1.0), 0.0)
        others = inverse if score == spec.SINE else torch.where(of.kept, _without_each(_factors(of)), 0.0)
        d_c *= others[:, :, None]
    return d_t, of.V @ d_c.transpose(0, 1)


# ------------------------------------------------------------------------------------------------
# Scores of single pairs
# ------------------------------------------------------------------------------------------------


def exact_rows(x: Tensor, present: Tensor | None, normalize: bool) -> Tensor:
    """Rows (N, d) in float64, each a function of itself alone, bit for bit."""
    return _rows(x, present, normalize, lambda z: ordered_sum(z * z, 1).sqrt()[:, None]).z


class ExactCandidates:
    """Candidates (J, n, d), to be scored with single queries to the last bit.

    A score is a function of the query's and the candidate's numbers alone: copies have equal scores, wherever they are
    and whatever they are computed with. So all sums are ordered ones, and the rest is element by element, but for the
    eigensolver, which takes one matrix after the other. Volumes come from the query's residual, orthogonalised twice,
    so they are as exact near 0 as elsewhere.

    ``score`` is an index of ``spec.SCORES``, or "cosine" or "mip".
    """

    def __init__(
        self,
        candidates: Sequence[Tensor],
        mask: Tensor | None,
        score: int | str,
        normalize: bool,
        float64_input: bool,
    ) -> None:
        present = None if mask is None else read_mask(mask)
        xs = spec.modalities(candidates)
        rows = [exact_rows(x, None if present is None else present[:, m], normalize) for m, x in enumerate(xs)]
        C, self.score = torch.stack(rows, 1), score
        self.there = C.new_ones(len(C), dtype=torch.bool) if present is None else present.any(1)
        self.finite = C.isfinite().all(2).all(1)
        self.eigenvalues = C.new_empty((len(C), 0))
        """μ as the solver found them, (J, n); -1 of absent modalities. None of triangles and products."""
        self.of: _Candidates | None = None
        self.edge: _Edge | None = None
        self.vector: Tensor | None = None
        """(J, d), of scores that are t · c."""
        if score == spec.AREA2:
            self.edge = _edge(C, lambda z: ordered_sum(z * z, 1).sqrt())
        elif score == "mip":
            if present is not None:
                C = torch.where(present[:, :, None], C, 1.0)
            product = functools.reduce(torch.mul, C.unbind(1))
            self.vector = torch.where(self.there[:, None], product, 0.0)
        else:
            self.eigenvalues, V = _exactly_decomposed(C, present)
            if score == "cosine":
                self.vector = _leading(C, self.eigenvalues, V, float64_input)
            else:
                self.of = _candidates(C, (self.eigenvalues, V), float64_input, _exactly_rotated)

    def volumes(self) -> Tensor:
        """√det K, (J,); 0 where K is singular."""
        assert self.of is not None
        return _volumes(self.of)

    def scores(self, t: Tensor, j: Tensor) -> Tensor:
        """Of queries (P, d), which are ``exact_rows``, with candidates of these numbers (P,); NaN where either is not
        finite."""
        if self.vector is not None:
            found = ordered_sum(t * self.vector[j], 1)
        elif self.edge is not None:
            e = _without(t - self.edge.middle[j], self.edge.direction[None, j])
            found = self.edge.length[j] ** 2 / 2 * ordered_sum(e * e, 1)
        else:
            assert self.of is not None
            u = self.of.u[:, j]
            if self.score in (spec.VOLUME, spec.VOLUME2, spec.SINE):
                e = _without(t, u)
                r = ordered_sum(e * e, 1)
                volume = self.volumes()[j]
                found = volume * volume * r if self.score == spec.VOLUME2 else r.sqrt()
                found = volume * found if self.score == spec.VOLUME else found
            else:
                q, beta = ordered_sum(u * t, 2)[:, None], ordered_sum(t * t, 1)[None]
                x = _gain(beta, q, self.of, j)[0]
                largest = self.of.mu[j, 0] + x
                found = x if self.score == spec.GAIN else largest if self.score == spec.LAMBDA else largest.sqrt()
        return torch.where(self.finite[j] & t.isfinite().all(1), found, torch.nan)


def _without(t: Tensor, u: Tensor) -> Tensor:
    """t (P, d) without its parts along the orthonormal u (n, P, d); twice, since the first time leaves rounding."""
    for _ in range(2):
        q = ordered_sum(u * t, 2)
        for of_one, along in zip(q, u, strict=True):
            t = t - of_one[:, None] * along
    return t


def _exactly_rotated(V: Tensor, C: Tensor) -> Tensor:
    """Vᵀ C, one modality after the other."""
    return functools.reduce(torch.add, (V[:, m, :, None] * C[:, m, None] for m in range(C.shape[1])))


def _exactly_decomposed(C: Tensor, present: Tensor | None) -> list[Tensor]:
    """As ``_decomposed``. Matrices are filled up to a multiple of four rows with what mixes with nothing, and then all
    lie alike in memory, which LAPACK's arithmetic may depend on."""
    J, n, _ = C.shape
    K = torch.stack([ordered_sum(C * C[:, m, None], 2) for m in range(n)], 1)
    scale = functools.reduce(torch.add, K.diagonal(dim1=1, dim2=2).unbind(1))
    scale = torch.where(scale == 0, 1.0, scale)  # for those of any norm, beside the -1
    size = 4 * math.ceil(n / 4)
    A = torch.diag_embed(K.new_full((J, size), -1.0))
    A[:, :n, :n] = K / scale[:, None, None]
    if present is not None:
        A[:, :n, :n] -= torch.diag_embed((~present).to(K.dtype))
    mu, V = eigenpairs(A)
    mu, V = mu[:, :n], V[:, :n, :n]
    return [torch.where(mu < -0.5, -1.0, mu * scale[:, None]), V]


def _leading(C: Tensor, mu: Tensor, V: Tensor, float64_input: bool) -> Tensor:
    """u₁ (J, d), by the rules of ties and of orientation that leading vectors have everywhere in the package."""
    n = mu.shape[1]
    mu = mu.clamp_min(0.0)
    first = mu[:, :1]
    tied = first - mu <= constants.eigenvalue_gap(n, float64_input) * first
    top = V * tied[:, None, :]
    along = ordered_sum(top, 1)  # the all-ones vector, projected on the top eigenspace
    gap = first - mu.masked_fill(tied, 0.0).amax(1, keepdim=True)
    noise = constants.zero_sum(n) * first
    nowhere = ordered_sum(along * along, 1).sqrt()[:, None] * gap <= noise
    diagonal = ordered_sum(top * top, 2)
    tie = (noise / gap).clamp(constants.PEAK_TIE, 0.5)
    m = (diagonal >= diagonal.amax(1, keepdim=True) * (1 - tie)).int().argmax(1)
    along = torch.where(nowhere, top[torch.arange(len(top), device=m.device), m], along)
    v = ordered_sum(top * along[:, None], 2)
    length = ordered_sum(v * v, 1).sqrt() * first[:, 0].sqrt()
    u = functools.reduce(torch.add, (v[:, m, None] * C[:, m] for m in range(n)))
    return torch.where(first == 0, 0.0, u / length[:, None])


# ------------------------------------------------------------------------------------------------
# Operators
# ------------------------------------------------------------------------------------------------


def _read(
    query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, normalize: bool
) -> tuple[_Rows, list[_Rows], Tensor | None]:
    present = None if mask is None else read_mask(mask)
    xs = spec.modalities(candidates)
    rows = [_rows(x, None if present is None else present[:, m], normalize) for m, x in enumerate(xs)]
    return _rows(query, None, normalize), rows, present


def forward(
    query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, score: int, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    """Scores (Nq, Ng); the state is what K decomposes into, (Ng, n) and (Ng, n, n), but of triangles."""
    with torch.autocast(query.device.type, enabled=False):
        t, rows, present = _read(query, candidates, mask, normalize)
        C = torch.stack([x.z for x in rows], 1)
        scores, beta = spec.scores_like(query, candidates), (t.z * t.z).sum(1, keepdim=True)
        Nq, Ng = scores.shape
        if score == spec.AREA2:
            edge = _edge(C)
            for I, J in _tiles(Nq, Ng, 2, scores.device):  # noqa: E741
                scores[I, J] = edge.length[J] ** 2 / 2 * edge.heights(t.z[I], beta[I], J)[1]
            return scores, []
        state = _decomposed(C, present)
        of = _candidates(C, state, scores.dtype == torch.float64)
        for I, J in _tiles(Nq, Ng, len(rows), scores.device):  # noqa: E741
            scores[I, J] = _tile_of_scores(score, beta[I], _planes(t.z[I], of, J), of, J)
        return scores, state


def backward(
    query: Tensor,
    candidates: Sequence[Tensor],
    mask: Tensor | None,
    score: int,
    normalize: bool,
    state: Sequence[Tensor],
    grad: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the query and the candidates from that of the scores."""
    with torch.autocast(query.device.type, enabled=False):
        t, rows, present = _read(query, candidates, mask, normalize)
        C = torch.stack([x.z for x in rows], 1)
        if score == spec.AREA2:
            d_t, d_c = _triangle_gradients(t.z, (t.z * t.z).sum(1, keepdim=True), _edge(C), grad)
        else:
            of = _candidates(C, state, spec.output_dtype(query, candidates) == torch.float64)
            d_t, d_c = _gradients(score, t.z, of, grad)
        found = [x.pulled(g) for x, g in zip(rows, d_c.unbind(1), strict=True)]
        if present is not None:
            found = [torch.where(present[:, m, None], g, 0.0) for m, g in enumerate(found)]
        if candidates[0].dim() == 3:
            found = [torch.stack(found, 1)]
        all_of = zip((query, *candidates), (t.pulled(d_t), *found), needed, strict=True)
        return [g.to(x.dtype) if want else x.new_empty((0,)) for x, g, want in all_of]


def _forward_shapes(
    query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, score: int, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    scores, n = spec.scores_like(query, candidates), len(spec.modalities(candidates))
    if score == spec.AREA2:
        return scores, []
    Ng = scores.shape[1]
    return scores, [query.new_empty(shape, dtype=torch.float64) for shape in ((Ng, n), (Ng, n, n))]


def _registered() -> tuple[Operators, dict[str, Pair]]:
    operators = Operators(f"{NAMESPACE}_joint")
    pair = operators.define(spec.JOINT, forward, backward, _forward_shapes)
    return operators, {spec.JOINT.name: Pair(NAME, *pair, rejects)}


_operators, PAIRS = _registered()
