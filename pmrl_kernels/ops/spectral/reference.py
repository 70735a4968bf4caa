"""The spectral op in pure PyTorch: through each instance's k x k Gram matrix, forward and hand-written backward.

    Z = X diag(1/n),   G = ZᵀZ = V diag(λ) Vᵀ,   σ = √λ,   u₁ = Z v₁/σ₁
    w_m = y_m/‖y_m‖,   y_m = Σ_{j≠m} |v_j| z_j
    alignment = log Σ_j exp((σ_j − σ₁)/τ), or ‖Z‖_F − σ₁
    dX = h ⊗ c + D·g + X·C (+ H f), where h = ∂L/∂u₁, g = ∂L/∂w, H = ∂L/∂Z, and c (B, k), C, D (B, k, k) and f come
    from all other gradients

One pass over the embeddings forms the Gram matrices, one applies the coefficients; no float64 copy of all embeddings
ever exists. The formulas are derived in docs/mathematics.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import constants
from ..operators import Operators, Pair
from ..reference import (
    NAME,
    NAMESPACE,
    eigenpairs,
    exponents_of,
    read_mask,
    read_temperature,
    rejects,
    scale_by_power_of_two,
)
from . import spec

_HOST_BLOCK = 1 << 19  # float64 elements of embeddings held at a time: 4 MiB, about a core's cache
_DEVICE_BLOCK = 1 << 24  # elsewhere launches cost more than memory


# ------------------------------------------------------------------------------------------------
# Reading embeddings
# ------------------------------------------------------------------------------------------------


class _Blocks:
    """The k tensors (B, d) block by block of rows, each block one float64 (b, k, d) buffer.

    Products of two float32 are exact in float64, so a Gram formed from a block keeps all there is to
    know about small singular values. Absent modalities read as zeros, whatever their buffer holds.
    """

    def __init__(self, xs: Sequence[Tensor], mask: Tensor | None, exponent: Tensor | None) -> None:
        self.xs, self.mask, self.exponent = xs, mask, exponent
        (self.B, self.d), self.k = xs[0].shape, len(xs)
        budget = _HOST_BLOCK if xs[0].device.type == "cpu" else _DEVICE_BLOCK
        self.rows = max(1, min(self.B, budget // (self.k * self.d)))
        self._whole: Tensor | None = None  # a batch of one block is read once for all passes

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        if self._whole is not None:
            yield slice(0, self.B), self._whole
            return
        buffer = self.xs[0].new_empty((self.rows, self.k, self.d), dtype=torch.float64)
        for start in range(0, self.B, self.rows):
            rows = slice(start, min(start + self.rows, self.B))
            block = buffer[: rows.stop - start]
            for m, x in enumerate(self.xs):
                block[:, m].copy_(x[rows])
            if self.mask is not None:
                block.masked_fill_(~self.mask[rows, :, None], 0.0)
            if self.exponent is not None:
                block = scale_by_power_of_two(block, -self.exponent[rows, :, None])
            if self.rows == self.B:
                self._whole = block
            yield rows, block


def _exponents(xs: Sequence[Tensor], mask: Tensor | None, normalize: bool) -> Tensor:
    """Powers of two (B, k) that bring float64 embeddings to order 1, where squares stay in range.

    One for each embedding when it will be normalised anyway, else one for each instance.
    """
    peak = xs[0].new_zeros((xs[0].shape[0], len(xs)), dtype=torch.float64)
    for rows, block in _Blocks(xs, mask, None):
        peak[rows] = block.abs().amax(-1)
    if not normalize:
        peak = peak.amax(1, keepdim=True).expand(-1, len(xs))
    return exponents_of(peak)


class _Batch:
    """What both operators make of embeddings and mask: k tensors (B, d), and what follows from these alone."""

    def __init__(
        self, embeddings: Sequence[Tensor], mask: Tensor | None, normalize: bool, exponents: Tensor | None = None
    ) -> None:
        self.xs = spec.modalities(embeddings)
        self.mask = None if mask is None else read_mask(mask)
        (self.B, self.d), self.k, self.device = self.xs[0].shape, len(self.xs), self.xs[0].device
        self.normalize, self.dtype = normalize, spec.output_dtype(self.xs)
        self.float64_input = self.dtype == torch.float64
        self.exponents: Tensor | None = None  # (B, k): embeddings were scaled by 2^-exponents
        if self.float64_input:
            self.exponents = _exponents(self.xs, self.mask, normalize) if exponents is None else exponents
        # (B, 1): the one of all embeddings of an instance, where it is not divided out by normalising
        self.shared_exponent = None if self.exponents is None or normalize else self.exponents[:, :1]
        self.blocks = _Blocks(self.xs, self.mask, self.exponents)
        self.logits, self.alignable = _counts(self.mask, self.k, self.d, self.device)

    def number_alignable(self) -> Tensor:
        """How many instances a mean over the alignment terms counts; at least 1, so that nothing gives 0."""
        return self.alignable.expand(self.B, 1).sum().clamp_min(1)

    def gram(self) -> tuple[Tensor, Tensor]:
        """The Gram matrices (B, k, k) in float64, of unit columns where they are normalised; and 1/norms (B, k), or
        nothing (0, k)."""
        G = torch.empty((self.B, self.k, self.k), dtype=torch.float64, device=self.device)
        for rows, X in self.blocks:
            torch.bmm(X, X.mT, out=G[rows])
        if not self.normalize:
            return G, G.new_empty((0, self.k))
        norms = G.diagonal(dim1=1, dim2=2).sqrt()
        inverse_norms = _reciprocal(norms)
        G = G * inverse_norms[:, :, None] * inverse_norms[:, None, :]
        G.diagonal(dim1=1, dim2=2).copy_(torch.where(norms == 0, 0.0, norms / norms))
        return G, inverse_norms


def _counts(mask: Tensor | None, k: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the k eigenvalues are singular values, the first min(d, k_i): (B, k), or (1, k) without a mask.

    And which instances have something to align, k_i >= 2: (B, 1) or (1, 1).
    """
    present = mask.sum(1, keepdim=True) if mask is not None else torch.full((1, 1), k, device=device)
    return torch.arange(k, device=device) < present.clamp_max(d), present >= 2


# ------------------------------------------------------------------------------------------------
# k-space: eigenpairs of the Gram matrix
# ------------------------------------------------------------------------------------------------


def _eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, k) in descending order, at least 0, and eigenvectors (B, k, k) in columns."""
    eigenvalues, V = eigenpairs(G)
    return eigenvalues.clamp_min(0.0), V


def _tied(eigenvalues: Tensor, k: int, float64_input: bool) -> Tensor:
    """(B, k): which eigenvalues cannot be told from the largest, itself included."""
    top = eigenvalues[:, :1]
    return top - eigenvalues <= constants.eigenvalue_gap(k, float64_input) * top


def _peak(diagonal: Tensor, tie: Tensor | float) -> Tensor:
    """(B, 1): lowest index among the largest entries of the top eigenspace projector's diagonal (B, k)."""
    largest = diagonal.amax(1, keepdim=True) * (1 - tie)
    return (diagonal >= largest).int().argmax(1, keepdim=True)


def _oriented(eigenvalues: Tensor, V: Tensor, tied: Tensor) -> Tensor:
    """v₁ (B, k): the all-ones vector projected on the top eigenspace and normalised.

    For a simple eigenvalue this is the eigenvector whose entries have a positive sum. Where the
    projection is zero, up to what rounding makes of it if the next eigenvalue is near, a unit vector
    e_m is projected instead, m the modality nearest the eigenspace.
    """
    k = V.shape[-1]
    top = V * tied[:, None, :]
    along = top.sum(1)
    gap = eigenvalues[:, :1] - eigenvalues.masked_fill(tied, 0.0).amax(1, keepdim=True)
    noise = constants.zero_sum(k) * eigenvalues[:, :1]
    nowhere = torch.linalg.vector_norm(along, dim=1, keepdim=True) * gap <= noise
    m = _peak((top * top).sum(2), (noise / gap).clamp(constants.PEAK_TIE, 0.5))
    along = torch.where(nowhere, top.gather(1, m[:, :, None].expand(-1, 1, k)).squeeze(1), along)
    v = torch.bmm(top, along[:, :, None]).squeeze(2)
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return torch.where(eigenvalues[:, :1] == 0, 0.0, v)


def _power_iteration(G: Tensor, float64_input: bool) -> tuple[Tensor, Tensor]:
    """λ₁ (B, 1) and oriented v₁ (B, k) of every Gram matrix by repeated squaring.

    P = (G / tr G)^(2^s) tends to v₁v₁ᵀ for any gap that counts in a bounded number of squarings s. Its
    largest row is v₁ with the sign of the orientation's second rule; its sum then decides by the first.
    One step on G itself and a Rayleigh quotient finish. A matrix whose P has not come down to rank 1 is
    tied at the top, or within rounding of it. Those few go to the eigensolver, since squaring would
    amplify what rounding left of the tie, and the orientation rule wants the whole eigenspace. So do
    those whose sum is too near what counts as zero.
    """
    k = G.shape[-1]
    bad = ~G.isfinite().all(-1).all(-1)
    empty = G.diagonal(dim1=1, dim2=2).sum(1) == 0
    one = torch.zeros((k, k), dtype=G.dtype, device=G.device)
    one[0, 0] = 1.0  # stands in for matrices without an answer: rank 1 at once
    G = torch.where((bad | empty)[:, None, None], one, G)
    P = G / G.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    squares = []  # of P's norms: 1 at rank 1
    for step in range(constants.squarings(k, float64_input)):
        previous, P = P, torch.bmm(P, P)
        squares.append(P.diagonal(dim1=1, dim2=2).sum(1))
        P = P / squares[-1][:, None, None]
        # A CPU looks whether anything still moves; looking at each step costs a device its queue.
        look = G.device.type == "cpu" and step % 2 and len(G)
        if look and float((P - previous).abs().max()) <= 4 * constants.EPS64:
            break
    # n squarings down to rank 1: the gap is 28 to 64 times 2^-n, what counts as zero 1 to 3 times ``zero``
    n = (torch.stack(squares) < 1 - constants.RANK_ONE).sum(0)[:, None]
    zero = constants.zero_sum(k) * torch.exp2(n.double() - 6).clamp_min(1.0)
    m = _peak(P.diagonal(dim1=1, dim2=2), constants.PEAK_TIE)
    v = P.gather(1, m[:, :, None].expand(-1, 1, k)).squeeze(1)
    v = torch.bmm(P, v[:, :, None]).squeeze(2)  # squares the share of other eigenvectors once more
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    total = v.sum(1, keepdim=True)
    v = torch.bmm(G, torch.where(total < -zero, -v, v)[:, :, None]).squeeze(2)
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    top = (v * torch.bmm(G, v[:, :, None]).squeeze(2)).sum(1, keepdim=True)

    size = total.abs()
    unclear = (size < 8 * zero) & ((size > zero / 2) | (zero > constants.PEAK_TIE / 2))
    undecided = (unclear[:, 0] | (1 - (P * P).sum((1, 2)) > constants.RANK_ONE)).nonzero()[:, 0]
    if len(undecided):
        eigenvalues, V = _eigh(G[undecided])
        v[undecided] = _oriented(eigenvalues, V, _tied(eigenvalues, k, float64_input))
        top[undecided] = eigenvalues[:, :1]
    top, v = top.masked_fill(empty[:, None], 0.0), v.masked_fill(empty[:, None], 0.0)
    return top.masked_fill(bad[:, None], torch.nan), v.masked_fill(bad[:, None], torch.nan)


def _reciprocal(x: Tensor) -> Tensor:
    """1/x, and 0 where x = 0: a zero vector has no direction and takes no gradient."""
    return torch.where(x == 0, 0.0, 1 / x)


def _softmax_weights(
    sigma: Tensor, tau: Tensor | float, logits: Tensor, exponent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gaps (σ₁ − σ_j)/τ and exp(−gaps), both (B, k), the latter 0 at j = 1 and where there is no logit."""
    gaps = sigma[:, :1] - sigma
    if exponent is not None:
        gaps = scale_by_power_of_two(gaps, exponent)
    gaps = gaps / tau
    others = logits & (torch.arange(sigma.shape[1], device=sigma.device) > 0)
    return gaps, torch.exp(-gaps).masked_fill(~others, 0.0)


def _through_spectrum(g: Tensor, eigenvalues: Tensor, V: Tensor, v: Tensor, float64_input: bool) -> Tensor:
    """M (B, k, k) = V diag(g_j/σ_j) Vᵀ from the gradients g (B, k) of the singular values.

    Weights of unresolved σ_j are 0. In a tied top eigenspace v₁ is singled out by the orientation rule,
    and the others share their mean weight, so that M does not depend on the solver's basis there.
    """
    k, sigma = V.shape[-1], eigenvalues.sqrt()
    resolved = sigma > constants.singular_value_floor(k, float64_input) * sigma[:, :1]
    weights = torch.where(resolved, g / sigma, 0.0)
    tied = _tied(eigenvalues, k, float64_input)
    others = tied & (torch.arange(k, device=g.device) > 0)
    shared = weights.where(others, 0.0).sum(1, keepdim=True) / others.sum(1, keepdim=True).clamp_min(1)
    M = torch.bmm(V * torch.where(tied, shared, weights)[:, None, :], V.mT)
    return M + (weights[:, :1] - shared)[:, :, None] * v[:, :, None] * v[:, None, :]


def _through_vectors(
    w: Tensor, q: Tensor, eigenvalues: Tensor, V: Tensor, v: Tensor, inverse_sigma1: Tensor, float64_input: bool
) -> Tensor:
    """N (B, k, k) from w = Zᵀ ∂L/∂u₁ and q = ∂L/∂v₁, (B, k) each. Tied directions contribute 0."""
    gaps = eigenvalues[:, :1] - eigenvalues
    over_gap = torch.where(_tied(eigenvalues, V.shape[-1], float64_input), 0.0, 1 / gaps)
    y = torch.bmm(V, torch.bmm(V.mT, (w * inverse_sigma1 + q)[:, :, None]) * over_gap[:, :, None])
    N = y * v[:, None, :]
    along = (v * w).sum(1, keepdim=True) * inverse_sigma1**3
    return N + N.mT - along[:, :, None] * v[:, :, None] * v[:, None, :]


# ------------------------------------------------------------------------------------------------
# The spectral pair
# ------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------
# Forward
# ------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """What the backward pass reads."""

    eigenvalues: Tensor  # (B, k), or λ₁ (B, 1) without the spectrum
    matrix: Tensor  # (B, k, k): eigenvectors in columns, or the Gram matrix without the spectrum
    v: Tensor  # (B, k): v₁
    inverse_norms: Tensor  # (B, k), or (0, k) where embeddings are not normalised
    others: Tensor  # (B, k): 1/‖y_m‖, or 0; (0, k) where the w are not wanted
    exponents: Tensor  # (B, k) int32, or (0, k) for embeddings of up to 32 bits


def forward(
    embeddings: Sequence[Tensor],
    mask: Tensor | None,
    temperature: Tensor | None,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Singular values, leading vectors and alignment of every instance.

    Args:
        embeddings: k tensors (B, d) or one (B, k, d).
        mask: bool (B, k), True = present, or None.
        temperature, fixed_temperature: τ as a 0-d tensor, or else as a number.
        spectrum: all singular values and the softmax objective; else σ₁ by power iteration and the
            leading objective ‖Z‖_F − σ₁.
        wanted: which outputs are asked for, see ``spec.py``.

    Returns:
        The wanted outputs in order, and the state for ``backward``.
    """
    batch = _Batch(embeddings, mask, normalize)
    G, inverse_norms = batch.gram()
    if wanted == spec.Z:  # there is nothing to decompose for
        eigenvalues, matrix, v = G.new_zeros((batch.B, batch.k if spectrum else 1)), G, torch.zeros_like(G[:, 0])
    elif spectrum:
        eigenvalues, matrix = _eigh(G)
        eigenvalues = eigenvalues.where(batch.logits | eigenvalues.isnan(), 0.0)
        v = _oriented(eigenvalues, matrix, _tied(eigenvalues, batch.k, batch.float64_input))
    else:
        (eigenvalues, v), matrix = _power_iteration(G, batch.float64_input), G
    sigma = eigenvalues.sqrt()

    outputs, others = [], v.new_empty((0, batch.k))
    if wanted & spec.W:
        others = _inverse_norms_of_others(G, v)
    if wanted & spec.ANY_ALIGNMENT:
        tau = read_temperature(temperature, fixed_temperature) if spectrum else None
        if tau is not None:
            alignment = _softmax_alignment(batch, sigma, tau)
        else:
            alignment = _leading_alignment(batch, G, eigenvalues)
        # One modality alone has nothing to align with, but a NaN in it must not be swallowed.
        alignment = alignment.where(batch.alignable[:, 0] | alignment.isnan(), 0.0)
        alignment = alignment.masked_fill(sigma[:, 0].isnan(), torch.nan)
        if not wanted & spec.ALIGNMENT:
            alignment = alignment.sum()
            if tau is not None and temperature is not None:
                alignment = alignment * (tau / tau)  # and where there is no instance
        if wanted & spec.ALIGNMENT_MEAN:
            alignment = alignment / batch.number_alignable()
        outputs.append(alignment.to(batch.dtype))
    if wanted & spec.SIGMA:
        shown = sigma[:, : min(batch.d, batch.k)]
        if batch.shared_exponent is not None:
            shown = scale_by_power_of_two(shown, batch.shared_exponent)
        outputs.append(shown.to(batch.dtype, copy=True))
    u, z, w = _vectors(batch, v, sigma, inverse_norms, others, wanted)
    if wanted & spec.U:
        outputs.append(u)
    if wanted & spec.V:
        outputs.append(v.to(batch.dtype, copy=True))
    exponents = G.new_empty((0, batch.k), dtype=torch.int32) if batch.exponents is None else batch.exponents
    return outputs + z + w, list(_State(eigenvalues, matrix, v, inverse_norms, others, exponents))


def _softmax_alignment(batch: _Batch, sigma: Tensor, tau: Tensor | float) -> Tensor:
    """log Σ_j exp((σ_j − σ₁)/τ), (B,)."""
    weights = _softmax_weights(sigma, tau, batch.logits, batch.shared_exponent)[1]
    return torch.log1p(weights.sum(1)) * (tau / tau)  # a bad τ shows even where there is no logit


def _leading_alignment(batch: _Batch, G: Tensor, eigenvalues: Tensor) -> Tensor:
    """‖Z‖_F − σ₁ = (tr G − λ₁)/(√tr G + σ₁), (B,)."""
    trace = G.diagonal(dim1=1, dim2=2).sum(1)
    rest = (trace - eigenvalues[:, 0]).clamp_min(0.0)
    alignment = rest * _reciprocal(trace.sqrt() + eigenvalues[:, 0].sqrt())
    if batch.shared_exponent is not None:
        alignment = scale_by_power_of_two(alignment, batch.shared_exponent[:, 0])
    return alignment


def _inverse_norms_of_others(G: Tensor, v: Tensor) -> Tensor:
    """1/‖y_m‖ (B, k), y_m = Σ_{j≠m} |v_j| z_j, and 0 where that norm counts as zero."""
    a = v.abs()
    Ga, diagonal = torch.bmm(G, a[:, :, None]).squeeze(2), G.diagonal(dim1=1, dim2=2)
    squares = (a * Ga).sum(1, keepdim=True) - 2 * a * Ga + a * a * diagonal
    zero = constants.CANCELLED * (a * diagonal.sqrt()).sum(1, keepdim=True)
    return torch.where(squares <= zero * zero, 0.0, squares.rsqrt())


def _of_others(v: Tensor, others: Tensor) -> Tensor:
    """W (B, k, k) of w_m = Z W_m: |v_j|/‖y_m‖ off the diagonal."""
    W = v.abs()[:, :, None] * others[:, None, :]
    return W.masked_fill(torch.eye(v.shape[1], dtype=torch.bool, device=v.device), 0.0)


def _vectors(
    batch: _Batch, v: Tensor, sigma: Tensor, inverse_norms: Tensor, others: Tensor, wanted: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """u₁ (B, d), the k unit embeddings (B, d), and the k directions w (B, d), as far as they are wanted."""
    (B, d, k), (dtype, device) = (batch.B, batch.d, batch.k), (batch.dtype, batch.device)
    want_u, want_z, want_w = bool(wanted & spec.U), bool(wanted & spec.Z), bool(wanted & spec.W)
    u = torch.empty((B if want_u else 0, d), dtype=dtype, device=device)
    z = [torch.empty((B, d), dtype=dtype, device=device) for _ in range(k)] if want_z else []
    w = [torch.empty((B, d), dtype=dtype, device=device) for _ in range(k)] if want_w else []
    if not (want_u or want_z or want_w):
        return u, z, w
    scale = inverse_norms if batch.normalize else v.new_ones((1, 1)).expand(B, k)
    coefficients = v * scale * _reciprocal(sigma[:, :1])
    W = _of_others(v, others) * scale[:, :, None] if want_w else v
    for rows, X in batch.blocks:
        if want_u:
            u[rows] = torch.bmm(coefficients[rows, None, :], X).squeeze(1).to(dtype)
        for m, z_m in enumerate(z):
            found = X[:, m] * scale[rows, m, None]
            if batch.shared_exponent is not None:
                found = scale_by_power_of_two(found, batch.shared_exponent[rows])
            z_m[rows] = found.to(dtype)
        if want_w:
            directions = torch.bmm(W[rows].mT, X)
            for m, w_m in enumerate(w):
                w_m[rows] = directions[:, m].to(dtype)
    return u, z, w


def _forward_shapes(
    embeddings: Sequence[Tensor],
    mask: Any,
    temperature: Any,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
) -> Any:
    xs = spec.modalities(embeddings)
    B, k, out = xs[0].shape[0], len(xs), spec.output_dtype(xs)
    x, float64 = xs[0].new_empty, torch.float64
    state = _State(
        eigenvalues=x((B, k if spectrum else 1), dtype=float64),
        matrix=x((B, k, k), dtype=float64),
        v=x((B, k), dtype=float64),
        inverse_norms=x((B if normalize else 0, k), dtype=float64),
        others=x((B if wanted & spec.W else 0, k), dtype=float64),
        exponents=x((B if out == float64 else 0, k), dtype=torch.int32),
    )
    return spec.output_shapes(embeddings, spectrum, wanted), list(state)


# ------------------------------------------------------------------------------------------------
# Backward
# ------------------------------------------------------------------------------------------------


class _Incoming(NamedTuple):
    """The gradients of the outputs by name, None where nothing comes in."""

    alignment: Tensor | None
    sigma: Tensor | None
    u: Tensor | None
    v: Tensor | None
    z: Sequence[Tensor | None]  # k of them, or none
    w: Sequence[Tensor | None]  # k of them, or none

    @classmethod
    def split(cls, grads: Sequence[Tensor | None], wanted: int, k: int) -> _Incoming:
        rest = list(grads)
        flags = (spec.ANY_ALIGNMENT, spec.SIGMA, spec.U, spec.V)
        alignment, sigma, u, v = (rest.pop(0) if wanted & flag else None for flag in flags)
        number = k if wanted & spec.Z else 0
        z, w = rest[:number], rest[number:]
        return cls(alignment, sigma, u, v, z, w if any(g is not None for g in w) else [])


def backward(
    embeddings: Sequence[Tensor],
    mask: Tensor | None,
    temperature: Tensor | None,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
    state: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of all of ``forward``'s outputs at once: dX = h ⊗ c + D·g + X·C (+ H f).

    c (B, k), D and C (B, k, k) are made in k-space from every incoming gradient; one pass over the
    embeddings applies them. Returns the gradients in the layout and dtypes of ``embeddings``, empty
    where not ``needed``; then, if τ is a tensor, ∂/∂τ as a float64 0-d tensor.
    """
    saved = _State(*state)
    batch = _Batch(embeddings, mask, normalize, saved.exponents)
    incoming = _Incoming.split(grads, wanted, batch.k)
    inverse_sigma1 = _reciprocal(saved.eigenvalues[:, :1].sqrt())
    tau = read_temperature(temperature, fixed_temperature) if spectrum else None

    # A = M + N, with dZ = h v₁ᵀ/σ₁ + Z A: M comes through singular values, N through the leading vectors.
    A, slope = _through_values(batch, saved, incoming, wanted, tau, inverse_sigma1)
    w, along_z, along_g = _dots(batch, saved, incoming)
    c, D = torch.zeros_like(saved.v), None
    # the gradients are still to be multiplied by 2^last_exponents
    last_exponents = -batch.exponents if batch.exponents is not None and normalize else None
    if incoming.u is not None or incoming.v is not None or incoming.w:
        q = torch.zeros_like(saved.v) if incoming.v is None else incoming.v.double()
        if batch.mask is not None:
            q = q.masked_fill(~batch.mask, 0.0)
        pairs = (saved.eigenvalues, saved.matrix) if spectrum else _eigh(saved.matrix)
        if incoming.w:
            D = _of_others(saved.v, saved.others)
            slopes, S = _through_others(along_g, D, saved, pairs, batch)
            q = q + slopes
            along_z = along_z + (D * along_g).sum(2)
        N = _through_vectors(w, q, *pairs, saved.v, inverse_sigma1, batch.float64_input)
        if incoming.w:
            N = N + S
        if incoming.u is not None:
            c = saved.v * inverse_sigma1
        if batch.shared_exponent is not None:
            # N and c are 2^-exponent times these, M is not. Up or down, the factor goes where nothing
            # overflows before the sum is formed: on N and c, or on M now and on the gradient at the end.
            up = batch.shared_exponent.clamp_min(0)
            N = scale_by_power_of_two(N, -up[:, :, None])
            c = scale_by_power_of_two(c, -up)
            D = None if D is None else scale_by_power_of_two(D, -up[:, :, None])
            last_exponents = -batch.shared_exponent.clamp_max(0)
            A = scale_by_power_of_two(A, -last_exponents[:, :, None])
        A = A + N

    C = A
    if normalize:  # dx_m = (dz_m − (z_mᵀdz_m) z_m)/n_m
        V = saved.matrix
        gram = torch.bmm(V * saved.eigenvalues[:, None, :], V.mT) if spectrum else V
        radial = (gram * A).sum(2) + c * w + along_z
        C = (A - torch.diag_embed(radial)) * saved.inverse_norms[:, :, None] * saved.inverse_norms[:, None, :]
        c = c * saved.inverse_norms
        D = None if D is None else D * saved.inverse_norms[:, :, None]
    found = _apply(batch, embeddings, needed, C, c, D, incoming, saved.inverse_norms, last_exponents)
    return found if temperature is None else [*found, slope]


def _through_values(
    batch: _Batch,
    saved: _State,
    incoming: _Incoming,
    wanted: int,
    tau: Tensor | float | None,
    inverse_sigma1: Tensor,
) -> tuple[Tensor, Tensor]:
    """M (B, k, k), what the gradients of singular values and alignment make of dZ = Z M; and ∂/∂τ (0-d).

    ``tau`` is None without the spectrum.
    """
    sigma, v = saved.eigenvalues.sqrt(), saved.v
    g = torch.zeros_like(sigma)
    if incoming.sigma is not None:
        g = torch.nn.functional.pad(incoming.sigma.double(), (0, g.shape[1] - incoming.sigma.shape[1]))
    grad_alignment = incoming.alignment
    if grad_alignment is not None:
        grad_alignment = grad_alignment.double()
        if wanted & spec.ALIGNMENT_MEAN:
            grad_alignment = grad_alignment / batch.number_alignable()
        grad_alignment = grad_alignment.expand(batch.B)[:, None].where(batch.alignable, 0.0)
    slope = torch.zeros((), dtype=torch.float64, device=batch.device)
    if tau is None:
        M = torch.zeros_like(saved.matrix)
        if grad_alignment is not None:
            g = g - grad_alignment
            trace = saved.matrix.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
            M.diagonal(dim1=1, dim2=2).copy_(grad_alignment * _reciprocal(trace.sqrt()))
        return M + (g * inverse_sigma1)[:, :, None] * v[:, :, None] * v[:, None, :], slope
    if grad_alignment is not None:
        gaps, weights = _softmax_weights(sigma, tau, batch.logits, batch.shared_exponent)
        p = weights / (1 + weights.sum(1, keepdim=True))
        pull = grad_alignment * p / tau
        # g₁ = −Σ g_j rather than (p₁ − 1)/τ, which cancels
        g = g + torch.cat([-pull[:, 1:].sum(1, keepdim=True), pull[:, 1:]], 1)
        g = g + (tau - tau)  # a bad τ shows even where there is no logit
        # where p underflows to 0 beside an infinite gap, their product tends to 0
        slope = (grad_alignment * torch.where(p == 0, 0.0, p * gaps)).sum() / tau
        slope = slope + (0 * sigma[:, 0]).sum()  # NaN where the term is
    return _through_spectrum(g, saved.eigenvalues, saved.matrix, v, batch.float64_input), slope


def _through_others(
    along_g: Tensor, W: Tensor, saved: _State, pairs: tuple[Tensor, Tensor], batch: _Batch
) -> tuple[Tensor, Tensor]:
    """What the gradients g_m of w_m = Z W_m make of ∂L/∂v₁ (B, k), and of A (B, k, k), from z_j · g_m (B, k, k).

    With h_m = (g_m − w_m w_mᵀg_m)/‖y_m‖, ∂L/∂|v_j| = z_jᵀ Σ_{m≠j} h_m, and ∂L/∂z_j = |v_j| Σ_{m≠j} h_m, of which the
    part along the w is in A. |v_j| has slope 0 where v_j is 0, up to what rounding makes of it.
    """
    eigenvalues, V = pairs
    v, k = saved.v, batch.k
    along_w = (W * along_g).sum(1, keepdim=True)  # w_mᵀ g_m
    GW = torch.bmm(V, eigenvalues[:, :, None] * torch.bmm(V.mT, W))
    h = (along_g - GW * along_w) * saved.others[:, None, :]
    slopes = h.masked_fill(torch.eye(k, dtype=torch.bool, device=v.device), 0.0).sum(2)
    tied = _tied(eigenvalues, k, batch.float64_input)
    gap = eigenvalues[:, :1] - eigenvalues.masked_fill(tied, 0.0).amax(1, keepdim=True)
    zero = v.abs() * gap <= constants.zero_sum(k) * eigenvalues[:, :1]
    return torch.where(zero, 0.0, slopes * v.sign()), -torch.bmm(W * along_w, W.mT)


def _dots(batch: _Batch, saved: _State, incoming: _Incoming) -> tuple[Tensor, Tensor, Tensor]:
    """z_m · ∂L/∂u₁ and z_m · ∂L/∂z_m, (B, k) each, and z_j · ∂L/∂w_m, (B, k, k) (of embeddings as they are where these
    are not normalised)."""
    w, along_z = torch.zeros_like(saved.v), torch.zeros_like(saved.v)
    along_g = saved.v.new_zeros((batch.B if incoming.w else 0, batch.k, batch.k))
    direct = batch.normalize and any(H is not None for H in incoming.z)
    if incoming.u is None and not direct and not incoming.w:
        return w, along_z, along_g
    for rows, X in batch.blocks:
        if incoming.u is not None:
            w[rows] = torch.bmm(X, incoming.u[rows].double()[:, :, None]).squeeze(2)
        for m, H in enumerate(incoming.z if direct else ()):
            if H is not None:
                along_z[rows, m] = (X[:, m] * H[rows].double()).sum(1)
        if incoming.w:
            along_g[rows] = torch.bmm(X, _stacked(incoming.w, rows).mT)
    if not batch.normalize:
        return w, along_z, along_g
    along_g = along_g * saved.inverse_norms[:, :, None] if incoming.w else along_g
    return w * saved.inverse_norms, along_z * saved.inverse_norms, along_g


def _stacked(grads: Sequence[Tensor | None], rows: slice) -> Tensor:
    """Some rows of k gradients (B, d) in float64, (b, k, d); zeros for None."""
    some = next(g for g in grads if g is not None)
    return torch.stack([torch.zeros_like(some[rows]) if g is None else g[rows] for g in grads], 1).double()


def _apply(
    batch: _Batch,
    embeddings: Sequence[Tensor],
    needed: Sequence[bool],
    C: Tensor,
    c: Tensor,
    D: Tensor | None,
    incoming: _Incoming,
    inverse_norms: Tensor,
    last_exponents: Tensor | None,
) -> list[Tensor]:
    """dX = (h ⊗ c + D·g + X·C + H f)·2^last_exponents, f = 1/norms (but H itself, after that, where these are not
    divided out), in the layout of ``embeddings``, empty where not needed."""
    normalize, stacked = batch.normalize, embeddings[0].dim() == 3
    columns = [m for m in range(batch.k) if needed[0 if stacked else m]]
    if stacked:
        found = [torch.empty_like(embeddings[0], memory_format=torch.contiguous_format)] if columns else []
        targets = spec.modalities(found) if columns else []
        found = found or [embeddings[0].new_empty((0,))]
    else:
        targets = [x.new_empty((batch.B, batch.d) if m in columns else (0,)) for m, x in enumerate(batch.xs)]
        found = targets
    if not columns:
        return found
    C, c, D = C[:, columns], c[:, columns], None if D is None else D[:, columns]
    for rows, X in batch.blocks:
        dX = torch.bmm(C[rows], X)
        if incoming.u is not None:
            dX.addcmul_(c[rows, :, None], incoming.u[rows].double()[:, None, :])
        if D is not None:
            dX.baddbmm_(D[rows], _stacked(incoming.w, rows))
        for i, m in enumerate(columns):
            dx, H = dX[:, i], incoming.z[m] if incoming.z else None
            if H is not None and normalize:
                dx = dx + H[rows].double() * inverse_norms[rows, m, None]
            if last_exponents is not None:
                dx = scale_by_power_of_two(dx, last_exponents[rows, m if normalize else 0, None])
            if H is not None and not normalize:
                dx = dx + H[rows].double()
            if batch.mask is not None:
                dx = dx.masked_fill(~batch.mask[rows, m, None], 0.0)
            targets[m][rows] = dx.to(targets[m].dtype)
    return found


def _registered() -> tuple[Operators, dict[str, Pair]]:
    operators = Operators(f"{NAMESPACE}_spectral")
    pair = operators.define(spec.SPECTRAL, forward, backward, _forward_shapes)
    return operators, {spec.SPECTRAL.name: Pair(NAME, *pair, rejects)}


_operators, PAIRS = _registered()
