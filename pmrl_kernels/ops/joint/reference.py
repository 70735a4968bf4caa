"""Joint scores in PyTorch: in float64, tile by tile, n matrix products for all pairs of queries and candidates.

**Basis.** With the Gram matrix of a candidate's modalities K = C Cᵀ = V diag(μ) Vᵀ, the rows u_m = (Vᵀ C)_m/√μ_m are an
orthonormal basis of their span, and of a pair only q_m = u_m·t matters. An absent modality has K_mm = −1 instead: an
eigenvector of its own, which mixes with nothing, and is dropped. So is a μ_m that is not resolved
(``constants.singular_value_floor``): K is singular.

**Volumes.** det G = det K · r, r = ‖t‖² − Σ q_m².

**Largest eigenvalues.** In the basis [t, C/√μ] G is diagonal but for one row, and x = λ₁ − μ₁ >= 0 is the largest root
of x + Δ = Σ_m w_m/(x + δ_m), with Δ = μ₁ − ‖t‖², w_m = μ_m q_m², δ_m = μ₁ − μ_m. See ``largest_root``. The eigenvector
is v₀ (1, ŷ), ŷ_m = √μ_m q_m/(x + δ_m).

**Gradients** are those of ĉ_m = (Vᵀ C)_m with V frozen, which is exact, since scores do not depend on the basis: no
derivative of an eigensolver, no division by gaps.

**Contrast.** With s_ij = ± score/τ, a query i with its candidate p, and a candidate j with its queries P,

    row i     log(1 + Σ_{l≠p} exp(s_il − s_i⁺)),  s_i⁺ = s_ip
    column j  log(1 + Σ_{l∉P} exp(s_lj − s_j⁺)),  s_j⁺ = log Σ_{l∈P} exp s_lj

which neither overflow nor cancel where they are small, and are all that the backward pass needs besides the tiles that
it makes anew. Label smoothing ε adds ε (s⁺ − the mean of all s) to each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import constants
from ..operators import Operators, Pair
from ..reference import NAME, NAMESPACE, eigenpairs, read_mask, read_temperature, rejects
from . import spec

_TILE = 1 << 18  # pairs at a time on a CPU, with a few float64 numbers for each of n modalities
_DEVICE_TILE = 1 << 22

_STEPS = 7
"""Of the root finder. The most that were needed by any of eight families of a hundred thousand pairs each, k <= 32."""

_EXPONENT = 0x7FF << 52  # the bits of a float64 that, alone, are its power of two


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Rows (N, d) in float64, divided by ``scale`` and ``norm`` (N, 1), if they are to be unit vectors; those that are
    not ``present`` (N,) are 0."""

    z: Tensor
    present: Tensor | None
    scale: Tensor | None
    norm: Tensor | None

    def pulled(self, gradient: Tensor) -> Tensor:
        """The gradient of the rows as they came, from that of z."""
        if self.scale is None or self.norm is None:  # LAPACK's vectors of absent rows mix with others by some eps64
            return gradient if self.present is None else torch.where(self.present[:, None], gradient, 0.0)
        along = (gradient * self.z).sum(1, keepdim=True)
        found = (gradient - along * self.z) / self.norm / self.scale
        return torch.where(self.norm == 0, 0.0, found)


def _lengths(z: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return found


def unit_rows(
    x: Tensor, present: Tensor | None, normalize: bool, lengths: Callable[[Tensor], Tensor] = _lengths
) -> _Rows:
    """Absent ones are 0, whatever they hold."""
    x = x.double()
    if present is not None:
        x = torch.where(present[:, None], x, 0.0)
    if not normalize:
        return _Rows(x, present, None, None)
    scale = x.abs().amax(1, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    z = x / scale  # whose squares neither overflow nor vanish
    norm = lengths(z)
    return _Rows(z / torch.where(norm == 0, 1.0, norm), present, scale, norm)


class Basis(NamedTuple):
    """(Ng, ...) of everyone."""

    mu: Tensor  # (Ng, n), 0 where dropped
    V: Tensor  # (Ng, n, n)
    u: Tensor  # (n, Ng, d), 0 where dropped
    root: Tensor  # √μ, (n, Ng)
    there: Tensor  # (n, Ng), False for absent modalities
    kept: Tensor  # (n, Ng)

    def factors(self) -> Tensor:
        """Of √det K, (n, Ng): an absent modality is none."""
        return torch.where(self.there, self.root, 1.0)


def gram_eigenpairs(K: Tensor, present: Tensor | None) -> list[Tensor]:
    """μ (J, n) in descending order, −1 of absent modalities and none else below 0, and V of Gram matrices K (J, n, n),
    in which absent ones are rows and columns of zeros."""
    largest = K.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest)  # or the −1 would be beside numbers of any size
    A = K / scale[:, :, None]
    if present is not None:
        A = A - torch.diag_embed((~present).to(K.dtype))
    mu, V = eigenpairs(A)
    # The least is some eps64 of the largest where it should be 0, and of either sign.
    return [torch.where(mu < -0.5, -1.0, mu.clamp_min(0.0) * scale), V]


def basis_of(
    C: Tensor,
    state: Sequence[Tensor],
    float64_input: bool,
    rotated: Callable[[Tensor, Tensor], Tensor] = lambda V, C: V.mT @ C,
) -> Basis:
    mu, V = state
    n = mu.shape[1]
    floor = constants.singular_value_floor(n, float64_input) ** 2
    absent = mu < 0
    dropped = absent | (mu <= floor * mu[:, :1].clamp_min(0.0))
    mu = mu.masked_fill(dropped, 0.0)
    root = mu.sqrt()
    inverse = torch.where(dropped, 0.0, 1.0 / torch.where(dropped, 1.0, root))
    u = rotated(V, C) * inverse[:, :, None]
    return Basis(mu, V, u.transpose(0, 1).contiguous(), root.T, ~absent.T, ~dropped.T)


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


def _without_each(factors: Tensor) -> Tensor:
    """Products of all factors (n, Ng) but one, without a division."""
    before, after = torch.ones_like(factors), torch.ones_like(factors)
    for m in range(1, len(factors)):
        before[m] = before[m - 1] * factors[m - 1]
        after[-1 - m] = after[-m] * factors[-m]
    return before * after


# ------------------------------------------------------------------------------------------------
# Pairs
# ------------------------------------------------------------------------------------------------


class _Pairs(Protocol):
    """Scores of pairs of t (Nq, d) and candidates, and gradients, which add up from tile to tile."""

    def modalities(self) -> int:
        """How many numbers of a pair there are at a time."""

    def tile(self, Q: slice, J: slice) -> tuple[Tensor, Any]:
        """Scores (Q, J), and what ``pull`` wants of them."""

    def single(self, i: Tensor | slice, j: Tensor | slice) -> Tensor:
        """Scores (P,) of query i[p] with candidate j[p]."""

    def planes(self) -> tuple[Tensor, Tensor]:
        """For kernels: what t is multiplied by, (n, Ng, d), and numbers (·, Ng) of each candidate."""

    def begin(self) -> None:
        """Makes room for gradients."""

    def pull(self, Q: slice, J: slice, found: Any, W: Tensor, of_t: bool, of_C: bool) -> None:
        """Adds the gradients of Σ W · scores, with respect to t and to candidates."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of t (Nq, d) and of C (Ng, n, d)."""


def largest_root(w: Tensor, poles: Tensor, excess: Tensor) -> Tensor:
    """The largest x >= 0 with x + excess = Σ_m w_m/(x + poles_m), or 0 if there is none: w (n, ...), poles (n, ...),
    the first of them 0; excess (...).

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


def gain_of(q: Tensor, mu: Tensor, beta: Tensor) -> Tensor:
    """x = λ₁(G) − μ₁ of q (n, ...), μ (n, ...) in descending order and β = ‖t‖² (...), in units of a power of two near
    √(μ₁β): w and its like are of fourth degree, and so stay in float64's range where squares are in it, however far t
    and C are apart (from 2⁴⁸⁰ on in units that keep squares of μ₁ and β there)."""
    tiny = torch.finfo(q.dtype).tiny
    largest, other = mu[0].clamp_min(tiny), beta.clamp_min(tiny)
    size = torch.maximum(largest.sqrt() * other.sqrt(), torch.maximum(largest, other) * 2.0**-480)
    unit = (size.clamp_min(tiny).view(torch.int64) & _EXPONENT).view(torch.float64)
    inverse = 1.0 / unit
    mu, beta = mu * inverse, beta * inverse
    return unit * largest_root(mu * (q * (q * inverse)), mu[:1] - mu, mu[0] - beta)


def _distance2(beta: Tensor, q: Tensor) -> Tensor:
    """r = β − Σ q², of q (n, ...)"""
    return (beta - (q * q).sum(0)).clamp_min(0.0)


def _inverse_distance(r: Tensor, beta: Tensor) -> Tensor:
    """1/√r. Its product with t − Σ q u has norm 1, and no more where r is mostly rounding; 0, the subgradient of least
    norm, where it is nothing else."""
    lost = 16 * constants.EPS64 * beta
    return torch.where(r <= lost, r * 0.0, 1.0 / torch.maximum(r, constants.EPS32**2 * beta).sqrt())


class _Planes:
    """Pairs by q_m = t·u_m. Gradients: dT = diag(own) T + Σ_m S_m B_m and, before it is turned by V,
    dĈ_m = c_m (S_mᵀ T + Σ_l M_ml B_l), B_m the basis vector times a length."""

    def __init__(self, score: int, t: Tensor, C: Tensor, state: Sequence[Tensor], float64_input: bool) -> None:
        self.score, self.t, self.of = score, t, basis_of(C, state, float64_input)
        self.beta = (t * t).sum(1, keepdim=True)
        self.factors = factors = self.of.factors()
        self.of_volumes = score in (spec.VOLUME, spec.VOLUME2, spec.SINE)
        self.volume = factors.prod(0) if score in (spec.VOLUME, spec.VOLUME2) else torch.ones_like(factors[0])

    def planes(self) -> tuple[Tensor, Tensor]:
        """And μ, or √det K."""
        return self.of.u, self.volume[None] if self.of_volumes else self.of.mu.T.contiguous()

    def begin(self) -> None:
        self.basis = self.of.u if self.of_volumes else self.of.u * self.of.root[:, :, None]
        self.d_t, self.d_c = torch.zeros_like(self.t), torch.zeros_like(self.of.u)
        self.M = self.t.new_zeros((len(self.factors), *self.factors.shape))

    def modalities(self) -> int:
        return len(self.of.u)

    def tile(self, Q: slice, J: slice) -> tuple[Tensor, Any]:
        q = self.t[Q] @ self.of.u[:, J].mT
        core = self._core(self.beta[Q], q, self.of.mu[J].T[:, None])
        return self._score(core, self.volume[J], self.of.mu[J, 0]), (q, core)

    def single(self, i: Tensor | slice, j: Tensor | slice) -> Tensor:
        q = torch.einsum("pd,npd->np", self.t[i], self.of.u[:, j])
        mu = self.of.mu[j]
        return self._score(self._core(self.beta[i, 0], q, mu.T), self.volume[j], mu[:, 0])

    def _core(self, beta: Tensor, q: Tensor, mu: Tensor) -> Tensor:
        """r, or x."""
        if self.of_volumes:
            return _distance2(beta, q)
        return gain_of(q, mu, beta)

    def _score(self, core: Tensor, volume: Tensor, largest: Tensor) -> Tensor:
        if self.score in (spec.VOLUME, spec.SINE):
            return volume * core.sqrt()
        if self.score == spec.VOLUME2:
            return volume * (volume * core)  # det K alone need not be in range
        if self.score == spec.GAIN:
            return core
        return (largest + core).sqrt() if self.score == spec.SIGMA else largest + core

    def pull(self, Q: slice, J: slice, found: Any, W: Tensor, of_t: bool, of_C: bool) -> None:
        (q, core), of, volume, M = found, self.of, self.volume, self.M
        if self.of_volumes:
            r = core
            own = 2.0 * W * volume[J] if self.score == spec.VOLUME2 else W * _inverse_distance(r, self.beta[Q])
            S, y = -own * q, -q
            if of_C and self.score != spec.SINE:  # how the volume of the candidate itself changes
                M.diagonal()[J] += (own * r).sum(0)[:, None]
        else:
            x, mu, tiny = core, of.mu[J].T[:, None], torch.finfo(core.dtype).tiny
            if self.score == spec.SIGMA:
                sigma = (mu[0] + x).sqrt()
                W = torch.where(sigma == 0, W * 0.0, W / (2.0 * torch.where(sigma == 0, 1.0, sigma)))
            still = x <= tiny  # the query adds nothing: λ₁ is μ₁
            # (Brackets: x may be nothing beside μ₁, and is all that there is for m = 0.)
            y = torch.where(still, q * 0.0, of.root[:, J][:, None] * q / (x + (mu[:1] - mu)).clamp_min(tiny))
            own = torch.where(still, W * 0.0, 2.0 * W / (1.0 + (y * y).sum(0)))
            S = own * y
            if of_C and self.score != spec.GAIN:
                M[0, 0, J] += torch.where(still, 2.0 * W, W * 0.0).sum(0)
        if of_t:
            scaled = self.basis[:, J] * volume[J, None]
            self.d_t[Q] += (own * volume[J]).sum(1, keepdim=True) * self.t[Q] + (S @ scaled).sum(0)
        if of_C:
            added = torch.einsum("mij,lij->mlj", S, y)
            if self.score == spec.GAIN:  # own y₀² − 2W, which would cancel
                added[0, 0] = -(own * (1.0 + (y[1:] * y[1:]).sum(0))).sum(0)
            M[:, :, J] += added
            self.d_c[:, J] += S.mT @ self.t[Q]

    def gradients(self) -> tuple[Tensor, Tensor]:
        of = self.of
        d_c = self.d_c + torch.einsum("mlj,ljd->mjd", self.M, self.basis)
        if self.of_volumes:
            inverse = torch.where(of.kept, 1.0 / torch.where(of.kept, of.root, 1.0), 0.0)
            others = torch.where(of.kept, _without_each(self.factors), 0.0)
            d_c *= (inverse if self.score == spec.SINE else others)[:, :, None]
        return self.d_t, of.V @ d_c.transpose(0, 1)


class Edge(NamedTuple):
    """Of two modalities v and a: their middle m, their difference g, its length and its direction."""

    middle: Tensor  # (Ng, d)
    length: Tensor  # (Ng,)
    direction: Tensor  # (Ng, d), 0 where the length is


def edge_of(C: Tensor, lengths: Callable[[Tensor], Tensor] = lambda z: _lengths(z)[:, 0]) -> Edge:
    v, a = C.unbind(1)
    length = lengths(a - v)
    return Edge((v + a) / 2, length, (a - v) / torch.where(length == 0, 1.0, length)[:, None])


class _Triangles:
    """Pairs by the height of a triangle over the edge g of two modalities v and a, with their middle m: ½‖g‖²ρ,
    ρ = ‖t − m‖² − q², q = ĝ·(t − m). With e = t − m − q ĝ: ∂t = ‖g‖² e, ∂m = −‖g‖² e, ∂g = ρ g − q ‖g‖ e."""

    def __init__(self, t: Tensor, C: Tensor) -> None:
        self.t = t
        self.middle, self.length, self.direction = edge_of(C)
        self.beta = (t * t).sum(1, keepdim=True)

    def planes(self) -> tuple[Tensor, Tensor]:
        """ĝ and m; and ½‖g‖², m·ĝ and ‖m‖²."""
        m, direction = self.middle, self.direction
        numbers = (self.length**2 / 2, (m * direction).sum(1), (m * m).sum(1))
        return torch.stack((direction, m)), torch.stack(numbers)

    def begin(self) -> None:
        self.d_t, self.d_m, self.d_g = (torch.zeros_like(x) for x in (self.t, self.middle, self.middle))

    def modalities(self) -> int:
        return 2

    def tile(self, Q: slice, J: slice) -> tuple[Tensor, Any]:
        along, across = self.t[Q] @ self.direction[J].T, self.t[Q] @ self.middle[J].T
        return self._scores(self.beta[Q], along, across, J)

    def single(self, i: Tensor | slice, j: Tensor | slice) -> Tensor:
        along, across = (self.t[i] * self.direction[j]).sum(1), (self.t[i] * self.middle[j]).sum(1)
        return self._scores(self.beta[i, 0], along, across, j)[0]

    def _scores(self, beta: Tensor, along: Tensor, across: Tensor, j: Tensor | slice) -> tuple[Tensor, Any]:
        m = self.middle[j]
        q = along - (m * self.direction[j]).sum(1)
        rho = (beta + (m * m).sum(1) - 2.0 * across - q * q).clamp_min(0.0)
        return self.length[j] ** 2 / 2 * rho, (q, rho)

    def pull(self, Q: slice, J: slice, found: Any, W: Tensor, of_t: bool, of_C: bool) -> None:
        q, rho = found
        t, m, length, direction = self.t[Q], self.middle[J], self.length[J], self.direction[J]
        A = W * (length * length)
        if of_t:
            self.d_t[Q] += A.sum(1, keepdim=True) * t - A @ m - (A * q) @ direction
        if of_C:
            self.d_m[J] -= A.T @ t - A.sum(0)[:, None] * m - (A * q).sum(0)[:, None] * direction
            Wq = W * q
            height = Wq.T @ t - Wq.sum(0)[:, None] * m - (Wq * q).sum(0)[:, None] * direction
            self.d_g[J] += length[:, None] * ((W * rho).sum(0)[:, None] * direction - height)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.d_t, torch.stack((self.d_m / 2 - self.d_g, self.d_m / 2 + self.d_g), 1)


class _Dots:
    """Pairs by t·c of candidates with one vector."""

    def __init__(self, t: Tensor, C: Tensor) -> None:
        self.t, self.c = t, C[:, 0]

    def planes(self) -> tuple[Tensor, Tensor]:
        return self.c[None], torch.ones_like(self.c[:, :1]).T

    def begin(self) -> None:
        self.d_t, self.d_c = torch.zeros_like(self.t), torch.zeros_like(self.c)

    def modalities(self) -> int:
        return 1

    def tile(self, Q: slice, J: slice) -> tuple[Tensor, Any]:
        return self.t[Q] @ self.c[J].T, None

    def single(self, i: Tensor | slice, j: Tensor | slice) -> Tensor:
        return (self.t[i] * self.c[j]).sum(1)

    def pull(self, Q: slice, J: slice, found: Any, W: Tensor, of_t: bool, of_C: bool) -> None:
        if of_t:
            self.d_t[Q] += W @ self.c[J]
        if of_C:
            self.d_c[J] += W.T @ self.t[Q]

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.d_t, self.d_c[:, None]


def _decomposes(score: int) -> bool:
    """Whether the score is of K, which is decomposed."""
    return score not in (spec.AREA2, spec.DOT)


def _pairs(score: int, t: Tensor, C: Tensor, state: Sequence[Tensor], float64_input: bool) -> _Pairs:
    if score == spec.AREA2:
        return _Triangles(t, C)
    return _Dots(t, C) if score == spec.DOT else _Planes(score, t, C, state, float64_input)


def _tiles(Q: slice, J: slice, n: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Of queries and candidates, in order. There may be none."""
    room = max(1, (_TILE if device.type == "cpu" else _DEVICE_TILE) // n)
    width = max(1, min(J.stop - J.start, 4096, room))
    height = max(1, room // width)
    for i in range(Q.start, Q.stop, height):
        for j in range(J.start, J.stop, width):
            yield slice(i, min(i + height, Q.stop)), slice(j, min(j + width, J.stop))


def _every(sizes: Sequence[int]) -> tuple[slice, slice]:
    """All queries and all candidates."""
    return slice(0, sizes[0]), slice(0, sizes[1])


def _pull(
    pairs: _Pairs,
    Q: slice,
    J: slice,
    weights: Callable[[slice, slice, Tensor], Tensor],
    of_t: bool,
    of_C: bool,
    device: torch.device,
) -> None:
    """Gradients of Σ W · scores over these rows and columns; ``weights`` makes a tile of W from one of scores."""
    for i, j in _tiles(Q, J, pairs.modalities(), device):
        scores, found = pairs.tile(i, j)
        pairs.pull(i, j, found, weights(i, j, scores), of_t, of_C)


# ------------------------------------------------------------------------------------------------
# The matrix of scores
# ------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What an operator takes, as rows in float64."""

    t: _Rows
    rows: list[_Rows]
    present: Tensor | None  # (Ng, n)
    C: Tensor  # (Ng, n, d)
    float64_input: bool

    def decomposed(self, score: int) -> list[Tensor]:
        """What K decomposes into, (Ng, n) and (Ng, n, n), for scores that are of it."""
        return gram_eigenpairs(self.C @ self.C.mT, self.present) if _decomposes(score) else []

    def pairs(self, score: int, state: Sequence[Tensor]) -> _Pairs:
        return _pairs(score, self.t.z, self.C, state, self.float64_input)

    def pulled(
        self,
        pairs: _Pairs,
        query: Tensor,
        candidates: Sequence[Tensor],
        needed: Sequence[bool],
        own: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """The gradients of queries and candidates as they came; of the own ones, where there are others."""
        d_t, d_C = pairs.gradients()
        first, last, begin, end = own or (0, len(query), 0, len(d_C))
        found = [x.pulled(g)[begin:end] for x, g in zip(self.rows, d_C.unbind(1), strict=True)]
        if candidates[0].dim() == 3:
            found = [torch.stack(found, 1)]
        all_of = zip((query, *candidates), (self.t.pulled(d_t)[first:last], *found), needed, strict=True)
        # Copies, as an operator's outputs are no views of more; and in the order in memory that is declared of them.
        dense = torch.contiguous_format
        return [g.to(x.dtype, copy=True, memory_format=dense) if want else x.new_empty((0,)) for x, g, want in all_of]


def read_arguments(
    query: Tensor,
    candidates: Sequence[Tensor],
    mask: Tensor | None,
    score: int,
    normalize: bool,
    seen: Tensor | None = None,
) -> Read:
    present = None if mask is None else read_mask(mask)
    xs, of_candidates = spec.modalities(candidates), normalize and score != spec.DOT
    rows = [unit_rows(x, None if present is None else present[:, m], of_candidates) for m, x in enumerate(xs)]
    float64_input = spec.output_dtype(query, candidates) == torch.float64
    return Read(unit_rows(query, seen, normalize), rows, present, torch.stack([x.z for x in rows], 1), float64_input)


def forward(
    query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, score: int, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    """Scores (Nq, Ng); the state is what K decomposes into."""
    with torch.autocast(query.device.type, enabled=False):
        read, scores = read_arguments(query, candidates, mask, score, normalize), spec.scores_like(query, candidates)
        state = read.decomposed(score)
        pairs = read.pairs(score, state)
        for Q, J in _tiles(*_every(scores.shape), pairs.modalities(), scores.device):
            scores[Q, J] = pairs.tile(Q, J)[0]
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
        read = read_arguments(query, candidates, mask, score, normalize)
        pairs = read.pairs(score, state)
        pairs.begin()
        every = _every((len(query), len(read.C)))
        _pull(pairs, *every, lambda Q, J, _: grad[Q, J].double(), needed[0], any(needed[1:]), query.device)
        return read.pulled(pairs, query, candidates, needed)


def _state_like(query: Tensor, candidates: Sequence[Tensor], score: int) -> list[Tensor]:
    n, Ng = len(spec.modalities(candidates)), candidates[0].shape[0]
    shapes = ((Ng, n), (Ng, n, n)) if _decomposes(score) else ()
    return [query.new_empty(shape, dtype=torch.float64) for shape in shapes]


def forward_shapes(
    query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, score: int, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    return spec.scores_like(query, candidates), _state_like(query, candidates, score)


# ------------------------------------------------------------------------------------------------
# The contrast
# ------------------------------------------------------------------------------------------------


class _Roles(NamedTuple):
    """Who takes part in a contrast, and with whom."""

    partner: Tensor  # (Nq,): each query's candidate; Ng, which there is not, where it has none
    seen: Tensor  # bool (Nq,): which queries candidates may choose
    there: Tensor  # bool (Ng,): which candidates queries may choose
    has_loss: Tensor  # bool (Nq,)
    chosen: Tensor  # bool (Ng,): which candidates have a loss

    def number(self) -> tuple[Tensor, Tensor]:
        """How many rows and columns have a loss, at least 1."""
        return self.has_loss.sum(dtype=torch.float64).clamp_min(1), self.chosen.sum(dtype=torch.float64).clamp_min(1)

    def counts(self) -> tuple[Tensor, Tensor]:
        """How many candidates there are for a row, and queries for a column."""
        return self.there.sum(dtype=torch.float64).clamp_min(1), self.seen.sum(dtype=torch.float64).clamp_min(1)


def _roles(Nq: int, Ng: int, mask: Tensor | None, positives: Tensor | None, device: torch.device) -> _Roles:
    there = torch.ones(Ng, dtype=torch.bool, device=device) if mask is None else read_mask(mask).any(1)
    if positives is None:
        return _Roles(torch.where(there, torch.arange(Ng, device=device), Ng), there, there, there, there)
    known = (positives >= 0) & (positives < Ng)
    partner = torch.where(known, positives, Ng)
    has_loss = torch.cat((there, there.new_zeros(1)))[partner]
    partner = torch.where(has_loss, partner, Ng)
    chosen = torch.zeros(Ng + 1, dtype=torch.float64, device=device).index_add_(0, partner, has_loss.double())[:Ng] > 0
    return _Roles(partner, has_loss | ~known, there, has_loss, chosen)


class _Positives(NamedTuple):
    """Scores of positives, by which others are measured: in units of scores, so that no τ makes them large."""

    row: Tensor  # (Nq,)
    column: Tensor  # (Ng,): of several queries τ times the logsumexp

    def share(self, roles: _Roles, tau: Tensor | float, sign: int) -> Tensor:
        """exp(s_ij − s_j⁺) (Nq,) of each query i at its candidate j, 0 where it has none."""
        theirs = torch.cat((self.column, self.column.new_zeros(1)))[roles.partner]
        return torch.where(roles.has_loss, ((self.row - theirs) * sign / tau).exp(), 0.0)


def _positives(pairs: _Pairs, roles: _Roles, positives: Tensor | None, tau: Tensor | float, sign: int) -> _Positives:
    Ng = len(roles.there)
    if positives is None:
        row = torch.where(roles.has_loss, pairs.single(slice(None), slice(None)), 0.0)
        return _Positives(row, row)
    if Ng == 0:
        row = torch.zeros(len(positives), dtype=torch.float64, device=positives.device)
        return _Positives(row, row.new_zeros(0))
    row = torch.where(roles.has_loss, pairs.single(slice(None), roles.partner.clamp_max(Ng - 1)), 0.0)
    best = torch.full((Ng + 1,), -torch.inf, dtype=row.dtype, device=row.device)
    best = best.scatter_reduce(0, roles.partner, torch.where(roles.has_loss, sign * row, -torch.inf), "amax")
    best = torch.where(best == -torch.inf, 0.0, best)
    parts = torch.where(roles.has_loss, ((sign * row - best[roles.partner]) / tau).exp(), 0.0)
    total = torch.zeros_like(best).index_add_(0, roles.partner, parts)
    column = sign * (best + torch.where(total == 0, 0.0, total.log() * tau))
    return _Positives(row, column[:Ng])


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ). The library's default switches to the identity at 20: 2e-9 off, too much in float64."""
    return torch.nn.functional.softplus(x, threshold=40.0)


class _Contrast(NamedTuple):
    """Of the scores of all pairs."""

    roles: _Roles
    positives: _Positives
    tau: Tensor | float
    sign: int
    smoothing: float

    def differences(self, Q: slice, J: slice, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s_ij − s_i⁺ and s_ij − s_j⁺ of a tile, which of its pairs are no positives, and which positives."""
        roles, factor = self.roles, self.sign / self.tau
        allowed = roles.seen[Q, None] & roles.there[J]
        partners = roles.partner[Q, None] == torch.arange(J.start, J.stop, device=scores.device)
        of_rows = (scores - self.positives.row[Q, None]) * factor
        of_columns = (scores - self.positives.column[J]) * factor
        return of_rows, of_columns, allowed & ~partners, partners

    def losses(self, pairs: _Pairs, Q: slice, J: slice, rows: bool, columns: bool) -> list[tuple[Tensor, Tensor]]:
        """Of the rows Q and columns J, over all that is in this rectangle: losses, and what smoothing adds to them;
        0 where there are none."""
        row, column = self.positives.row, self.positives.column
        sums = [torch.full_like(x, -torch.inf) for x in (row, column)]
        means = [torch.zeros_like(x) for x in (row, column)]
        for i, j in _tiles(Q, J, pairs.modalities(), row.device):
            of_rows, of_columns, others, partners = self.differences(i, j, pairs.tile(i, j)[0])
            if rows:
                sums[0][i] = torch.logaddexp(sums[0][i], of_rows.masked_fill(~others, -torch.inf).logsumexp(1))
                means[0][i] += torch.where(others, of_rows, 0.0).sum(1)
            if columns:
                sums[1][j] = torch.logaddexp(sums[1][j], of_columns.masked_fill(~others, -torch.inf).logsumexp(0))
                means[1][j] += torch.where(others | partners, of_columns, 0.0).sum(0)
        counts, counted = self.roles.counts(), (self.roles.has_loss, self.roles.chosen)
        found = []
        for total, mean, count, these in zip(sums, means, counts, counted, strict=True):
            smoothed = -self.smoothing * mean / count if self.smoothing else torch.zeros_like(mean)
            found.append((torch.where(these, _softplus(total), 0.0), torch.where(these, smoothed, 0.0)))
        return found


class _Weights:
    """Gradients of a contrast with respect to the scores of a tile, by the losses of rows and of columns."""

    def __init__(self, contrast: _Contrast, row_losses: Tensor, column_losses: Tensor, scale: Tensor) -> None:
        self.contrast, self.losses = contrast, (row_losses, column_losses)
        roles, tau, sign = contrast.roles, contrast.tau, contrast.sign
        self.share = contrast.positives.share(roles, tau, sign)
        numbers = roles.number()
        self.of_row, self.of_column = (
            x.double() * (scale / (2.0 * n)) for x, n in zip((roles.has_loss, roles.chosen), numbers, strict=True)
        )
        self.slope = torch.zeros_like(numbers[0])
        """-τ ∂L/∂τ. Gradients of a row or column add up to 0, so it may be by differences, Σ ∂L/∂s_ij (s_ij - s⁺)."""

    def of(self, rows: bool, columns: bool, slopes: tuple[bool, bool]) -> Callable[[slice, slice, Tensor], Tensor]:
        """By the losses of rows, of columns, or both, and which of them to add to the slope."""
        roles, eps = self.contrast.roles, self.contrast.smoothing
        in_row, in_column = roles.counts()
        factor = self.contrast.sign / self.contrast.tau

        def tile(Q: slice, J: slice, scores: Tensor) -> Tensor:
            of_rows, of_columns, others, partners = self.contrast.differences(Q, J, scores)
            W = torch.zeros_like(scores)
            if rows:
                losses = self.losses[0][Q, None]
                P = (of_rows - losses).clamp_max(0.0).exp() - eps / in_row
                G = torch.where(others, P, torch.where(partners, torch.expm1(-losses) + eps - eps / in_row, 0.0))
                G *= self.of_row[Q, None]
                self.slope += _weighted(G, of_rows) if slopes[0] else 0.0
                W += G
            if columns:
                losses = self.losses[1][J]
                R = (of_columns - losses).clamp_max(0.0).exp() - eps / in_column
                own = self.share[Q, None] * (torch.expm1(-losses) + eps) - eps / in_column
                G = torch.where(others, R, torch.where(partners, own, 0.0)) * self.of_column[J]
                self.slope += _weighted(G, of_columns) if slopes[1] else 0.0
                W += G
            return W * factor

        return tile


def _weighted(G: Tensor, x: Tensor) -> Tensor:
    """Σ G x, where 0 times what is infinite is 0."""
    return torch.where(G == 0, 0.0, G * x).sum()


def contrast_forward(
    query: Tensor,
    candidates: Sequence[Tensor],
    mask: Tensor | None,
    positives: Tensor | None,
    own: Sequence[int],
    score: int,
    normalize: bool,
    smoothing: float,
    temperature: Tensor | None,
    fixed_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(loss, losses of own rows, losses of own columns, state): the state is what K decomposes into, and the scores of
    positives."""
    with torch.autocast(query.device.type, enabled=False):
        tau = read_temperature(temperature, fixed_temperature, contrast=True)
        Ng = candidates[0].shape[0]
        roles = _roles(len(query), Ng, mask, positives, query.device)
        read = read_arguments(query, candidates, mask, score, normalize, roles.seen)
        state = read.decomposed(score)
        pairs, sign = read.pairs(score, state), spec.SIGNS[score]
        known = _positives(pairs, roles, positives, tau, sign)
        contrast = _Contrast(roles, known, tau, sign, smoothing)
        own = spec.own_rows(own, query, candidates)
        Q, J = slice(*own[:2]), slice(*own[2:])
        every = _every((len(query), Ng))
        if every == (Q, J):
            rows, columns = contrast.losses(pairs, Q, J, True, True)
        else:
            rows, columns = (
                contrast.losses(pairs, Q, every[1], True, False)[0],
                contrast.losses(pairs, every[0], J, False, True)[1],
            )
        of_rows, of_columns = roles.number()
        loss = (
            ((rows[0] + rows[1])[Q].sum() / of_rows + (columns[0] + columns[1])[J].sum() / of_columns)
            / 2.0
            * (tau / tau)
        )
        return (
            loss.to(spec.output_dtype(query, candidates)),
            rows[0][Q].clone(),
            columns[0][J].clone(),
            [*(x.clone() for x in known), *state],
        )


def contrast_backward(
    query: Tensor,
    candidates: Sequence[Tensor],
    mask: Tensor | None,
    positives: Tensor | None,
    own: Sequence[int],
    score: int,
    normalize: bool,
    smoothing: float,
    temperature: Tensor | None,
    fixed_temperature: float,
    row_losses: Tensor,
    column_losses: Tensor,
    state: Sequence[Tensor],
    grad: Tensor,
    half: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of own queries, own candidates and the temperature from that of the own part of the loss, by everyone's
    losses."""
    with torch.autocast(query.device.type, enabled=False):
        tau = read_temperature(temperature, fixed_temperature, contrast=True)
        roles = _roles(len(query), candidates[0].shape[0], mask, positives, query.device)
        read = read_arguments(query, candidates, mask, score, normalize, roles.seen)
        pairs = read.pairs(score, state[2:])
        pairs.begin()
        contrast = _Contrast(roles, _Positives(*state[:2]), tau, spec.SIGNS[score], smoothing)
        weights = _Weights(contrast, row_losses, column_losses, grad.double())
        own = spec.own_rows(own, query, candidates)
        Q, J = slice(*own[:2]), slice(*own[2:])
        everyone = _every((len(query), len(roles.there)))
        of_t, of_C, slope = needed[0], any(needed[1:]), temperature is not None
        if everyone == (Q, J) and not half:
            _pull(pairs, Q, J, weights.of(True, True, (slope, slope)), of_t, of_C, query.device)
        else:
            # (Rows have no part of candidates' gradients where these are halved, nor columns of queries'.)
            of_rows, of_columns = (
                weights.of(True, not half, (slope, False)),
                weights.of(not half, True, (False, slope)),
            )
            _pull(pairs, Q, everyone[1], of_rows, of_t, False, query.device)
            _pull(pairs, everyone[0], J, of_columns, False, of_C, query.device)
        return [*read.pulled(pairs, query, candidates, needed, own), -weights.slope / tau]


def _contrast_shapes(
    query: Tensor, candidates: Sequence[Tensor], mask: Any, positives: Any, own: Sequence[int], score: int, *_: Any
) -> Any:
    def numbers(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float64)

    loss = query.new_empty((), dtype=spec.output_dtype(query, candidates))
    known = [numbers(query.shape[0]), numbers(candidates[0].shape[0])]
    state = [*known, *_state_like(query, candidates, score)]
    first, last, begin, end = spec.own_rows(own, query, candidates)
    return loss, numbers(last - first), numbers(end - begin), state


def _registered() -> tuple[Operators, dict[str, Pair]]:
    operators = Operators(f"{NAMESPACE}_joint")
    joint = operators.define(spec.JOINT, forward, backward, forward_shapes)
    contrast = operators.define(spec.JOINT_CONTRAST, contrast_forward, contrast_backward, _contrast_shapes)
    pairs = {spec.JOINT.name: joint, spec.JOINT_CONTRAST.name: contrast}
    return operators, {name: Pair(NAME, *pair, rejects) for name, pair in pairs.items()}


_operators, PAIRS = _registered()
