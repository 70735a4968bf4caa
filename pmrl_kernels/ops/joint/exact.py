"""Joint scores of single pairs in float64, functions of one query and one candidate to the last bit: for rankings.

The formulas and their basis are those of ``reference.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import constants
from ..reference import exponents_of, read_mask, scale_by_power_of_two
from . import spec
from .reference import Basis, Edge, basis_of, edge_of, gain_of, gram_eigenpairs, ordered_sum, unit_rows


def exact_rows(x: Tensor, present: Tensor | None, normalize: bool) -> Tensor:
    """Rows (N, d) in float64, each a function of itself alone, bit for bit."""
    return unit_rows(x, present, normalize, lambda z: ordered_sum(z * z, 1).sqrt()[:, None]).z


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
        self.of: Basis | None = None
        self.edge: Edge | None = None
        self.vector: Tensor | None = None
        """(J, d), of scores that are t · c."""
        if score == spec.AREA2:
            self.edge = edge_of(C, lambda z: ordered_sum(z * z, 1).sqrt())
        elif score == "mip":
            if present is not None:
                C = torch.where(present[:, :, None], C, 1.0)
            product = functools.reduce(torch.mul, C.unbind(1))
            self.vector = torch.where(self.there[:, None], product, 0.0)
        else:
            if score == "cosine" and not normalize:  # u₁ is of length 1, whatever C is of
                C = scale_by_power_of_two(C, -exponents_of(C.abs().amax((1, 2), keepdim=True)))
            self.eigenvalues, V = _exactly_decomposed(C, present)
            if score == "cosine":
                self.vector = _leading(C, self.eigenvalues, V, float64_input)
            else:
                self.of = basis_of(C, (self.eigenvalues, V), float64_input, _exactly_rotated)

    def volumes(self) -> Tensor:
        """√det K, (J,); 0 where K is singular."""
        assert self.of is not None
        return functools.reduce(torch.mul, self.of.factors().unbind(0))

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
                found = volume * (volume * r) if self.score == spec.VOLUME2 else r.sqrt()
                found = volume * found if self.score == spec.VOLUME else found
            else:
                q, beta = ordered_sum(u * t, 2)[:, None], ordered_sum(t * t, 1)[None]
                mu = self.of.mu[j].T[:, None]
                x = gain_of(q, mu, beta)[0]
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
    """``gram_eigenpairs`` of candidates. Matrices are filled up to a multiple of four rows with what mixes with
    nothing, and then all lie alike in memory, which LAPACK's arithmetic may depend on."""
    J, n, _ = C.shape
    size = 4 * math.ceil(n / 4)
    K = C.new_zeros((J, size, size))
    K[:, :n, :n] = torch.stack([ordered_sum(C * C[:, m, None], 2) for m in range(n)], 1)
    there = K.new_zeros((J, size), dtype=torch.bool)
    there[:, :n] = True if present is None else present
    mu, V = gram_eigenpairs(K, there)
    return [mu[:, :n], V[:, :n, :n]]


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
