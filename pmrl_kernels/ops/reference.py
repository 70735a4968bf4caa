"""The reference backend: the k-space formulation in pure PyTorch, forward and hand-written backward.

It is the fallback where nothing is compiled and the oracle every kernel is tested against, so it
imports nothing of the package's kernels and runs on any device that has float64. Three pairs:

* ``spectral_forward`` / ``spectral_backward``: singular values, leading vectors and the alignment term
  of every instance's d x k embedding matrix, through its k x k Gram matrix;
* ``instance_forward`` / ``instance_backward``: contrast of leading vectors with one another;
* ``modality_forward`` / ``modality_backward``: contrast of each modality with the leading vectors.

The formulas are derived in docs/mathematics.md. Each function is an operator of the library
``pmrl_reference``, which makes it one opaque node for ``torch.compile``: the loops over blocks stay
loops at any batch size, the operator computes the same bits compiled as eagerly, and neither a B x B
matrix at large B nor a float64 copy of all embeddings ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import constants

NAME = "reference"

_HOST_BLOCK = 1 << 19  # float64 elements of embeddings held at a time: 4 MiB, about a core's cache
_DEVICE_BLOCK = 1 << 24  # elsewhere launches cost more than memory
_TILE = 1 << 22  # similarities held at a time: 16 MiB in float32


def unavailable() -> str | None:
    """Why this backend cannot run in this installation, or None. It always can."""
    return None


def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """Why this backend cannot take (B, d) embeddings of k modalities there, or None."""
    if device.type == "mps":
        return "it keeps k x k matrices in float64, which mps devices lack"
    return None


# ------------------------------------------------------------------------------------------------
# Reading embeddings
# ------------------------------------------------------------------------------------------------


def _modalities(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """The k tensors (B, d), whether they came one by one or as one (B, k, d) stack."""
    return list(embeddings[0].unbind(1)) if embeddings[0].dim() == 3 else list(embeddings)


def read_mask(mask: Tensor) -> Tensor:
    """The mask, True where its byte is not 0. Whatever computes with a mask begins with this, or reads bytes itself.

    A bool tensor may be a view of other bytes than 0 and 1 (an image's 255), and torch's own operations do not agree on
    what that is: some count 255, some take its complement bit by bit.
    """
    return mask.view(torch.uint8) != 0


def _output_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _temperature(tensor: Tensor | None, value: float, contrast: bool = False) -> Tensor | float:
    """A tensor is never read by the host, so a bad one cannot raise: it turns the result into NaN.

    What ``inputs.py`` refuses of a Python number is bad, so of a contrast whatever is no normal number in float32.
    """
    if tensor is None:
        return value
    tau = tensor.double()
    limits = torch.finfo(torch.float32)
    good = (tau >= limits.tiny) & (tau <= limits.max) if contrast else (tau > 0) & tau.isfinite()
    return torch.where(good, tau, torch.nan)


def _scale_by_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x·2^exponent, exactly. In two steps: 2^1074, which lifts the least subnormal, is no float64."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    for part in (half, exponent - half):
        x = x * ((part.to(torch.int64) + 1023) << 52).view(torch.float64)
    return x


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
                block = _scale_by_power_of_two(block, -self.exponent[rows, :, None])
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
    # The exponent of an Inf or NaN is unspecified; such a row is NaN in the end, whatever its scale.
    return torch.frexp(peak.nan_to_num(nan=1.0, posinf=1.0)).exponent


# ------------------------------------------------------------------------------------------------
# k-space: eigenpairs of the Gram matrix
# ------------------------------------------------------------------------------------------------


def _eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, k) in descending order, at least 0, and eigenvectors (B, k, k) in columns.

    LAPACK raises for the whole batch when one matrix holds a NaN, so such a matrix is kept from it
    and its results are NaN.
    """
    bad = ~G.isfinite().all(-1).all(-1)
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    eigenvalues, V = torch.linalg.eigh(torch.where(bad[:, None, None], eye, G))
    eigenvalues = eigenvalues.flip(-1).clamp_min(0.0).masked_fill(bad[:, None], torch.nan)
    return eigenvalues, V.flip(-1).masked_fill(bad[:, None, None], torch.nan)


def _tied(eigenvalues: Tensor, k: int, double_input: bool) -> Tensor:
    """(B, k): which eigenvalues cannot be told from the largest, itself included."""
    top = eigenvalues[:, :1]
    return top - eigenvalues <= constants.eigenvalue_gap(k, double_input) * top


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


def _power_iteration(G: Tensor, double_input: bool) -> tuple[Tensor, Tensor]:
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
    for step in range(constants.squarings(k, double_input)):
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
        v[undecided] = _oriented(eigenvalues, V, _tied(eigenvalues, k, double_input))
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
        gaps = _scale_by_power_of_two(gaps, exponent)
    gaps = gaps / tau
    others = logits & (torch.arange(sigma.shape[1], device=sigma.device) > 0)
    return gaps, torch.exp(-gaps).masked_fill(~others, 0.0)


def _counts(mask: Tensor | None, k: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the k eigenvalues are singular values, the first min(d, k_i): (B, k), or (1, k) without a mask.

    And which instances have something to align, k_i >= 2: (B, 1) or (1, 1).
    """
    present = mask.sum(1, keepdim=True) if mask is not None else torch.full((1, 1), k, device=device)
    return torch.arange(k, device=device) < present.clamp_max(d), present >= 2


def _number_alignable(alignable: Tensor, B: int) -> Tensor:
    """How many instances a mean over the alignment terms counts; at least 1, so that nothing gives 0."""
    return alignable.expand(B, 1).sum().clamp_min(1)


def _through_spectrum(g: Tensor, eigenvalues: Tensor, V: Tensor, v: Tensor, double_input: bool) -> Tensor:
    """M (B, k, k) = V diag(g_j/σ_j) Vᵀ from the gradients g (B, k) of the singular values.

    Weights of unresolved σ_j are 0. In a tied top eigenspace v₁ is singled out by the orientation rule,
    and the others share their mean weight, so that M does not depend on the solver's basis there.
    """
    k, sigma = V.shape[-1], eigenvalues.sqrt()
    resolved = sigma > constants.singular_value_floor(k, double_input) * sigma[:, :1]
    weights = torch.where(resolved, g / sigma, 0.0)
    tied = _tied(eigenvalues, k, double_input)
    others = tied & (torch.arange(k, device=g.device) > 0)
    shared = weights.where(others, 0.0).sum(1, keepdim=True) / others.sum(1, keepdim=True).clamp_min(1)
    M = torch.bmm(V * torch.where(tied, shared, weights)[:, None, :], V.mT)
    return M + (weights[:, :1] - shared)[:, :, None] * v[:, :, None] * v[:, None, :]


def _through_vectors(
    w: Tensor, q: Tensor, eigenvalues: Tensor, V: Tensor, v: Tensor, inverse_sigma1: Tensor, double_input: bool
) -> Tensor:
    """N (B, k, k) from w = Zᵀ ∂L/∂u₁ and q = ∂L/∂v₁, (B, k) each. Tied directions contribute 0."""
    gaps = eigenvalues[:, :1] - eigenvalues
    over_gap = torch.where(_tied(eigenvalues, V.shape[-1], double_input), 0.0, 1 / gaps)
    y = torch.bmm(V, torch.bmm(V.mT, (w * inverse_sigma1 + q)[:, :, None]) * over_gap[:, :, None])
    N = y * v[:, None, :]
    along = (v * w).sum(1, keepdim=True) * inverse_sigma1**3
    return N + N.mT - along[:, :, None] * v[:, :, None] * v[:, None, :]


# ------------------------------------------------------------------------------------------------
# The spectral pair
# ------------------------------------------------------------------------------------------------


def spectral_forward(
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
        wanted: which outputs are asked for, as a sum of ``constants.ALIGNMENT`` and the like.

    Returns:
        What is wanted of alignment (B,) or its sum or mean, 0-d; sigma (B, min(d, k)) or (B, 1); u (B, d); v (B, k);
        the k normalised embeddings (B, d). And what the backward pass needs: eigenvalues (B, k) and eigenvectors
        (B, k, k), or λ₁ (B, 1) and the Gram (B, k, k); v₁ (B, k); 1/norms and exponents, (B, k) or empty.
    """
    xs = _modalities(embeddings)
    mask = None if mask is None else read_mask(mask)
    (B, d), k, out = xs[0].shape, len(xs), _output_dtype(xs)
    device, double_input = xs[0].device, out == torch.float64
    exponent = _exponents(xs, mask, normalize) if double_input else None
    blocks = _Blocks(xs, mask, exponent)

    G = torch.empty((B, k, k), dtype=torch.float64, device=device)
    for rows, X in blocks:
        torch.bmm(X, X.mT, out=G[rows])
    if normalize:
        norms = G.diagonal(dim1=1, dim2=2).sqrt()
        inverse_norms = _reciprocal(norms)
        G = G * inverse_norms[:, :, None] * inverse_norms[:, None, :]
        G.diagonal(dim1=1, dim2=2).copy_(torch.where(norms == 0, 0.0, norms / norms))
        shared_exponent = None
    else:
        inverse_norms = G.new_empty((0, k))
        shared_exponent = exponent[:, :1] if exponent is not None else None

    logits, alignable = _counts(mask, k, d, device)
    if spectrum:
        eigenvalues, matrix = _eigh(G)
        eigenvalues = eigenvalues.where(logits | eigenvalues.isnan(), 0.0)
        v = _oriented(eigenvalues, matrix, _tied(eigenvalues, k, double_input))
    else:
        (eigenvalues, v), matrix = _power_iteration(G, double_input), G
    sigma = eigenvalues.sqrt()

    outputs = []
    if wanted & constants.ANY_ALIGNMENT:
        if spectrum:
            tau = _temperature(temperature, fixed_temperature)
            weights = _softmax_weights(sigma, tau, logits, shared_exponent)[1]
            alignment = torch.log1p(weights.sum(1)) * (tau / tau)  # a bad τ shows even where there is no logit
        else:
            trace = G.diagonal(dim1=1, dim2=2).sum(1)
            rest = (trace - eigenvalues[:, 0]).clamp_min(0.0)
            alignment = rest * _reciprocal(trace.sqrt() + sigma[:, 0])
            if shared_exponent is not None:
                alignment = _scale_by_power_of_two(alignment, shared_exponent[:, 0])
        # One modality alone has nothing to align with, but a NaN in it must not be swallowed.
        alignment = alignment.where(alignable[:, 0] | alignment.isnan(), 0.0)
        alignment = alignment.masked_fill(sigma[:, 0].isnan(), torch.nan)
        if not wanted & constants.ALIGNMENT:
            alignment = alignment.sum()
            if spectrum and temperature is not None:
                alignment = alignment * (tau / tau)  # and where there is no instance
        if wanted & constants.ALIGNMENT_MEAN:
            alignment = alignment / _number_alignable(alignable, B)
        outputs.append(alignment.to(out))

    want_u, want_z = bool(wanted & constants.U), bool(wanted & constants.Z)
    u = torch.empty((B if want_u else 0, d), dtype=out, device=device)
    z = [torch.empty((B, d), dtype=out, device=device) for _ in xs] if want_z else []
    if want_u or want_z:
        scale = inverse_norms if normalize else G.new_ones((1, 1)).expand(B, k)
        coefficients = v * scale * _reciprocal(sigma[:, :1])
        for rows, X in blocks:
            if want_u:
                u[rows] = torch.bmm(coefficients[rows, None, :], X).squeeze(1).to(out)
            for m in range(k if want_z else 0):
                z_m = X[:, m] * scale[rows, m, None]
                if shared_exponent is not None:
                    z_m = _scale_by_power_of_two(z_m, shared_exponent[rows])
                z[m][rows] = z_m.to(out)

    if wanted & constants.SIGMA:
        shown = sigma[:, : min(d, k)]
        if shared_exponent is not None:
            shown = _scale_by_power_of_two(shown, shared_exponent)
        outputs.append(shown.to(out, copy=True))
    if want_u:
        outputs.append(u)
    if wanted & constants.V:
        outputs.append(v.to(out, copy=True))
    state = [eigenvalues, matrix, v, inverse_norms]
    state.append(exponent if exponent is not None else G.new_empty((0, k), dtype=torch.int32))
    return outputs + z, state


def _split_gradients(
    grads: Sequence[Tensor | None], wanted: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Sequence[Tensor | None]]:
    """The gradients of a spectral function's outputs by name: alignment, sigma, u, v and the k of z."""
    rest = list(grads)
    flags = (constants.ANY_ALIGNMENT, constants.SIGMA, constants.U, constants.V)
    alignment, sigma, u, v = (rest.pop(0) if wanted & flag else None for flag in flags)
    return alignment, sigma, u, v, rest


def spectral_backward(
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
    """Gradients of all of ``spectral_forward``'s outputs at once: dX = h ⊗ c + X·C (+ H).

    c (B, k) and C (B, k, k) are made in k-space from every incoming gradient; one pass over the
    embeddings applies them. Returns the gradients in the layout and dtypes of ``embeddings``, empty
    where not ``needed``; then, if τ is a tensor, ∂/∂τ as a float64 0-d tensor.
    """
    grad_alignment, grad_sigma, grad_u, grad_v, grad_z = _split_gradients(grads, wanted)
    xs = _modalities(embeddings)
    mask = None if mask is None else read_mask(mask)
    (B, d), k = xs[0].shape, len(xs)
    double_input = _output_dtype(xs) == torch.float64
    eigenvalues, matrix, v, inverse_norms, exponents = state
    exponent = exponents if double_input else None
    shared_exponent = exponents[:, :1] if double_input and not normalize else None
    sigma = eigenvalues.sqrt()
    inverse_sigma1 = _reciprocal(sigma[:, :1])
    stacked = embeddings[0].dim() == 3
    columns = [m for m in range(k) if needed[0 if stacked else m]]

    # A = M + N, with dZ = h v₁ᵀ/σ₁ + Z A; first M, what comes through singular values.
    logits, alignable = _counts(mask, k, d, xs[0].device)
    g = torch.zeros_like(sigma)
    if grad_sigma is not None:
        g = torch.nn.functional.pad(grad_sigma.double(), (0, g.shape[1] - grad_sigma.shape[1]))
    if grad_alignment is not None:
        grad_alignment = grad_alignment.double()
        if wanted & constants.ALIGNMENT_MEAN:
            grad_alignment = grad_alignment / _number_alignable(alignable, B)
        grad_alignment = grad_alignment.expand(B)[:, None].where(alignable, 0.0)
    grad_temperature = torch.zeros((), dtype=torch.float64, device=xs[0].device)
    if spectrum:
        if grad_alignment is not None:
            tau = _temperature(temperature, fixed_temperature)
            gaps, weights = _softmax_weights(sigma, tau, logits, shared_exponent)
            p = weights / (1 + weights.sum(1, keepdim=True))
            pull = grad_alignment * p / tau
            # g₁ = −Σ g_j rather than (p₁ − 1)/τ, which cancels
            g = g + torch.cat([-pull[:, 1:].sum(1, keepdim=True), pull[:, 1:]], 1)
            g = g + (tau - tau)  # a bad τ shows even where there is no logit
            # where p underflows to 0 beside an infinite gap, their product tends to 0
            grad_temperature = (grad_alignment * torch.where(p == 0, 0.0, p * gaps)).sum() / tau
            grad_temperature = grad_temperature + (0 * sigma[:, 0]).sum()  # NaN where the term is
        A = _through_spectrum(g, eigenvalues, matrix, v, double_input)
    else:
        A = torch.zeros_like(matrix)
        if grad_alignment is not None:
            g = g - grad_alignment
            trace = matrix.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
            A.diagonal(dim1=1, dim2=2).copy_(grad_alignment * _reciprocal(trace.sqrt()))
        A = A + (g * inverse_sigma1)[:, :, None] * v[:, :, None] * v[:, None, :]

    blocks = _Blocks(xs, mask, exponent)
    last_exponent = -exponent if exponent is not None and normalize else None  # of two, for the gradient
    w, c = torch.zeros_like(v), torch.zeros_like(v)
    along_z = torch.zeros_like(v)
    direct = any(H is not None for H in grad_z)
    if grad_u is not None or (direct and normalize):
        for rows, X in blocks:
            if grad_u is not None:
                w[rows] = torch.bmm(X, grad_u[rows].double()[:, :, None]).squeeze(2)
            for m, H in enumerate(grad_z):
                if H is not None and normalize:
                    along_z[rows, m] = (X[:, m] * H[rows].double()).sum(1)
        if normalize:
            w, along_z = w * inverse_norms, along_z * inverse_norms
    # Then N, what comes through the leading vectors.
    if grad_u is not None or grad_v is not None:
        q = torch.zeros_like(v) if grad_v is None else grad_v.double()
        if mask is not None:
            q = q.masked_fill(~mask, 0.0)
        pairs = (eigenvalues, matrix) if spectrum else _eigh(matrix)
        N = _through_vectors(w, q, *pairs, v, inverse_sigma1, double_input)
        if grad_u is not None:
            c = v * inverse_sigma1
        if shared_exponent is not None:
            # N and c are 2^-exponent times these, M is not. Up or down, the factor goes where nothing
            # overflows before the sum is formed: on N and c, or on M now and on the gradient at the end.
            N = _scale_by_power_of_two(N, -shared_exponent[:, :, None].clamp_min(0))
            c = _scale_by_power_of_two(c, -shared_exponent.clamp_min(0))
            last_exponent = -shared_exponent.clamp_max(0)
            A = _scale_by_power_of_two(A, -last_exponent[:, :, None])
        A = A + N

    C = A
    if normalize:  # dx_m = (dz_m − (z_mᵀdz_m) z_m)/n_m
        gram = torch.bmm(matrix * eigenvalues[:, None, :], matrix.mT) if spectrum else matrix
        radial = (gram * A).sum(2) + c * w + along_z
        C = (A - torch.diag_embed(radial)) * inverse_norms[:, :, None] * inverse_norms[:, None, :]
        c = c * inverse_norms

    slope = [grad_temperature] if temperature is not None else []
    if stacked:
        found = [torch.empty_like(embeddings[0], memory_format=torch.contiguous_format)] if columns else []
        targets = _modalities(found) if columns else []
        found = found or [embeddings[0].new_empty((0,))]
    else:
        targets = [x.new_empty((B, d) if m in columns else (0,)) for m, x in enumerate(xs)]
        found = targets
    if not columns:
        return found + slope
    C, c = C[:, columns], c[:, columns]
    for rows, X in blocks:
        dX = torch.bmm(C[rows], X)
        if grad_u is not None:
            dX.addcmul_(c[rows, :, None], grad_u[rows].double()[:, None, :])
        for i, m in enumerate(columns):
            dx, H = dX[:, i], grad_z[m] if direct else None
            if H is not None and normalize:
                dx = dx + H[rows].double() * inverse_norms[rows, m, None]
            if last_exponent is not None:
                dx = _scale_by_power_of_two(dx, last_exponent[rows, m if normalize else 0, None])
            if H is not None and not normalize:
                dx = dx + H[rows].double()
            if mask is not None:
                dx = dx.masked_fill(~mask[rows, m, None], 0.0)
            targets[m][rows] = dx.to(targets[m].dtype)
    return found + slope


# ------------------------------------------------------------------------------------------------
# Contrasts: cross-entropy over similarities, tile by tile
# ------------------------------------------------------------------------------------------------
#
# Every row i of a (n, d) has its positive at column start + i of b (N, d). With δ_ij = (s_ij − s_i⁺)/τ its loss is
#     ℓ_i = log(1 + Σ_{j≠start+i} exp δ_ij) = softplus(logsumexp δ_ij),
# which neither overflows nor cancels when ℓ_i is small, and P_ij = exp(δ_ij − ℓ_i) are the softmax
# probabilities, so ℓ is all the backward pass needs besides its inputs.
#
# Batches over several processes: a and b are then one process's rows and everyone's.


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ). The library's default switches to the identity at 20: 2e-9 off, too much in float64."""
    return torch.nn.functional.softplus(x, threshold=40.0)


def _row_tiles(n_rows: int, n_columns: int) -> Iterator[slice]:
    step = max(1, _TILE // max(1, n_columns))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _unless_all(rows: Tensor) -> Tensor | None:
    """None where nothing need be masked. Elsewhere than on a CPU asking costs a wait."""
    return None if rows.device.type == "cpu" and bool(rows.all()) else rows


def _both(rows: Tensor | None, columns: Tensor | None) -> Tensor | None:
    """Which entries of a tile count; None is everyone."""
    if rows is None:
        return columns
    return rows[:, None] if columns is None else rows[:, None] & columns


class _Side(NamedTuple):
    """Rows or columns of a similarity matrix."""

    vectors: Tensor  # (n, d)
    positive: Tensor  # (n,): similarity with its own partner on the other side
    counted: Tensor | None  # bool (n,): which have a loss
    seen: Tensor | None  # bool (n,): which the other side may choose

    def at(self, rows: slice) -> _Side:
        counted, seen = (None if x is None else x[rows] for x in (self.counted, self.seen))
        return _Side(self.vectors[rows], self.positive[rows], counted, seen)


def _log_sums(a: _Side, b: _Side, start: int, tau: Tensor | float, both: bool) -> tuple[Tensor, Tensor | None]:
    """logsumexp_{j≠start+i} δ_ij for every row of a; where ``both``, for every column too (a and b then pair up)."""
    rows = torch.empty_like(a.positive)
    columns = torch.full_like(b.positive, -torch.inf, dtype=torch.float64) if both else None
    for tile in _row_tiles(len(rows), len(b.positive)):
        part = a.at(tile)
        similarity = part.vectors @ b.vectors.T
        rows[tile] = _deltas(similarity, part.positive[:, None], tau, b.seen, start + tile.start).logsumexp(1)
        if columns is not None:
            allowed = None if part.seen is None else part.seen[:, None]
            delta = _deltas(similarity, b.positive, tau, allowed, start + tile.start)
            columns = torch.logaddexp(columns, delta.logsumexp(0).double())
    return rows, columns


def _deltas(similarity: Tensor, positive: Tensor, tau: Tensor | float, allowed: Tensor | None, start: int) -> Tensor:
    """δ of one tile: −inf where not allowed and for the positives, which ℓ treats apart."""
    delta = torch.sub(similarity, positive).div_(tau)
    if allowed is not None:
        delta.masked_fill_(~allowed, -torch.inf)
    delta.diagonal(start).fill_(-torch.inf)
    return delta


def _pulled(
    a: _Side, b: _Side, own: Tensor, theirs: Tensor, start: int, tau: Tensor | float, both: bool, slope: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """τ ∂/∂a, and τ ∂/∂b where ``both``, of the sum of the counted losses of both sides; and Σ P·δ.

    That is G b and Gᵀ a with G_ij = P_ij + R_ij, where R are the columns' probabilities of choosing a row, and
    minus the sum of all others' at the positives. Σ P·δ is of the rows' losses, and of the columns' where ``both``.
    """
    from_rows = torch.empty_like(a.vectors)
    from_columns = torch.zeros_like(b.vectors) if both else None
    total = torch.zeros((), dtype=torch.float64, device=a.vectors.device)
    own, theirs = (losses.to(a.vectors.dtype) for losses in (own, theirs))
    for tile in _row_tiles(len(a.vectors), len(b.vectors)):
        part, rows = a.at(tile), own[tile]
        similarity, first = part.vectors @ b.vectors.T, start + tile.start
        allowed = _both(part.counted, b.seen)
        G = _probabilities(similarity, part.positive[:, None], rows[:, None], tau, allowed, first)
        if slope:
            total += _slope(G, similarity, part.positive[:, None])
        R = _probabilities(similarity, b.positive, theirs, tau, _both(part.seen, b.counted), first)
        if slope and both:
            total += _slope(R, similarity, b.positive)
        G += R
        partners = slice(first, first + len(rows))
        G.diagonal(first).copy_(torch.expm1(-rows) + torch.expm1(-theirs[partners]))
        from_rows[tile] = G @ b.vectors
        if from_columns is not None:
            from_columns += G.T @ part.vectors
    return from_rows, from_columns, total / tau


def _probabilities(
    similarity: Tensor, positive: Tensor, losses: Tensor, tau: Tensor | float, allowed: Tensor | None, start: int
) -> Tensor:
    """P of one tile: 0 where not allowed and for the positives."""
    P = torch.sub(similarity, positive).div_(tau).sub_(losses).clamp_max_(0.0).exp_()
    if allowed is not None:
        P.masked_fill_(~allowed, 0.0)
    P.diagonal(start).fill_(0.0)
    return P


def _slope(P: Tensor, similarity: Tensor, positive: Tensor) -> Tensor:
    """τ Σ P·δ, the negative of ∂Σℓ/∂τ · τ². (log P + ℓ is δ too, but for large τ the rounding of two numbers.)"""
    return torch.where(P == 0, 0.0, P * (similarity - positive)).sum(dtype=torch.float64)


def _divisor(counted: Tensor, positive: Tensor) -> Tensor:
    """What a mean over rows divides by (0-d float64): how many count, at least 1, so that nothing gives 0.

    NaN where the similarity of one of those with its partner is: a row that is compared with no other, or is another
    process's, shows what is not finite nowhere else.
    """
    return counted.sum().clamp_min(1) + torch.where(counted, positive * 0, 0.0).sum(dtype=torch.float64)


def _where_seen(x: Tensor, side: _Side) -> Tensor:
    """0 for the rows that are left out, whatever the others, or a gradient that came in, make of the rest."""
    return x if side.seen is None else x.masked_fill(~side.seen[:, None], 0.0)


def _unit_side(u: Tensor) -> tuple[_Side, Tensor]:
    """Unit rows, their similarity with themselves 1 by definition; zero rows have no direction and are left out."""
    valid = (u != 0).any(1)
    mask, positive = _unless_all(valid), 1 + 0 * u.sum(1)
    return _Side(u, positive, mask, mask), _divisor(valid, positive)


def instance_forward(
    u: Tensor, columns: Tensor | None, start: int, temperature: Tensor | None, fixed_temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """cross_entropy(U Uᵀ/τ, arange(B)) over the rows of U that are not zero; the others are unit vectors.

    Args:
        u: (B, d).
        columns, start: None and 0; or the rows of all processes (N, d), with u at rows start and following.

    Returns:
        The sum of the losses of u over the number of rows of U that count (0-d); the losses (B,), float64,
        0 where a row does not count; a state for the backward pass.
    """
    with torch.autocast(u.device.type, enabled=False):
        everyone, number = _unit_side(u if columns is None else columns)
        own = everyone.at(slice(start, start + len(u)))
        tau = _temperature(temperature, fixed_temperature, contrast=True)
        losses = _softplus(_log_sums(own, everyone, start, tau, False)[0])
        if own.counted is not None:
            losses = losses.masked_fill(~own.counted, 0.0)
        mean = losses.sum(dtype=torch.float64) / number * (tau / tau)
        return mean.to(u.dtype), losses.double(), u.new_empty((0,))


def instance_backward(
    u: Tensor,
    columns: Tensor | None,
    start: int,
    temperature: Tensor | None,
    fixed_temperature: float,
    losses: Tensor,
    state: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """∂/∂u (B, d) of what all processes' losses (N,) sum up to, over their number; and this one's ∂/∂τ (0-d float64).

    Q U/(τ N) with Q_ij = P_ij + P_ji, Q_ii = −2 Σ_{j≠i} P_ij.
    """
    with torch.autocast(u.device.type, enabled=False):
        everyone, number = _unit_side(u if columns is None else columns)
        rows = slice(start, start + len(u))
        tau = _temperature(temperature, fixed_temperature, contrast=True)
        scale = grad.double() / number / tau
        sides = everyone.at(rows), everyone
        pulled, _, slope = _pulled(*sides, losses[rows], losses, start, tau, both=False, slope=temperature is not None)
        # a scaler's upstream gradient need not fit the output's dtype
        return _where_seen((pulled.double() * scale).to(u.dtype), sides[0]), -slope * scale


class _Modality(NamedTuple):
    """What one modality's contrast is between: embeddings and leading vectors, of this process and of all."""

    z: _Side
    u: _Side


def _modality_sides(z: Sequence[Tensor], u: Tensor, mask: Tensor | None, raw: bool) -> tuple[list[_Modality], Tensor]:
    """The two sides of each modality's similarities, and how many pairs of instance and modality are present."""
    mask = None if mask is None else read_mask(mask)
    valid = (u != 0).any(1)
    if raw:
        valid = torch.ones_like(valid) if mask is None else mask.any(1)
    sides, counted, positives = [], [], []
    for m, z_m in enumerate(z):
        present = valid if mask is None else valid & mask[:, m]
        if mask is not None:
            z_m = z_m.masked_fill(~mask[:, m, None], 0.0)
        positive = (z_m * u).sum(1)
        positive = positive.masked_fill(~positive.isfinite(), torch.nan)  # an Inf must not turn into weight 0
        counted.append(present)
        positives.append(positive)
        here = _unless_all(present)
        seen = here if mask is None else _unless_all(valid)
        sides.append(_Modality(_Side(z_m, positive, here, here), _Side(u, positive, here, seen)))
    return sides, _divisor(torch.cat(counted), torch.cat(positives))


def _modality_everyone(
    z: Sequence[Tensor],
    u: Tensor,
    mask: Tensor | None,
    columns: Sequence[Tensor],
    columns_mask: Tensor | None,
    raw: bool,
) -> tuple[list[_Modality], Tensor]:
    if columns:
        return _modality_sides(columns[1:], columns[0], columns_mask, raw)
    return _modality_sides(z, u, mask, raw)


def modality_forward(
    z: Sequence[Tensor],
    u: Tensor,
    mask: Tensor | None,
    columns: Sequence[Tensor],
    columns_mask: Tensor | None,
    start: int,
    raw: bool,
    temperature: Tensor | None,
    fixed_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over present pairs (i, m) of ½[CE(z_m Uᵀ/τ) + CE(U z_mᵀ/τ)], each i's positive its own u_i.

    An embedding looks for its leading vector among all of them, a leading vector for its embedding among the
    present ones.

    Args:
        z, u, mask: k tensors (B, d); (B, d), zero rows left out unless ``raw``; bool (B, k) or None.
        columns, columns_mask, start: empty, None and 0; or u and z of all processes, N rows each, their mask, and
            at which row those of this process start.
        raw: u holds any vectors, which count where the mask has one of their modalities.

    Returns:
        The sum of the pairs' losses over the number of present pairs of all processes (0-d); the losses of both
        directions, (2, k, B), float64; a state for the backward pass.
    """
    with torch.autocast(u.device.type, enabled=False):
        everyone, number = _modality_everyone(z, u, mask, columns, columns_mask, raw)
        rows = slice(start, start + len(u))
        tau = _temperature(temperature, fixed_temperature, contrast=True)
        losses = u.new_empty((2, len(z), len(u)))
        for m, (of_z, of_u) in enumerate(everyone):
            forth, back = _log_sums(of_z.at(rows), of_u, start, tau, not columns)
            if back is None:
                back, _ = _log_sums(of_u.at(rows), of_z, start, tau, False)
            for direction, found in enumerate((forth, back)):
                losses[direction, m] = _softplus(found)
            here = of_z.at(rows).counted
            if here is not None:
                losses[:, m].masked_fill_(~here, 0.0)
        mean = losses.sum(dtype=torch.float64) / (2 * number) * (tau / tau)
        return mean.to(u.dtype), losses.double(), u.new_empty((0,))


def modality_backward(
    z: Sequence[Tensor],
    u: Tensor,
    mask: Tensor | None,
    columns: Sequence[Tensor],
    columns_mask: Tensor | None,
    start: int,
    raw: bool,
    temperature: Tensor | None,
    fixed_temperature: float,
    losses: Tensor,
    state: Tensor,
    grad: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the mean over all processes from their losses (2, k, N): k times (B, d), (B, d), and ∂/∂τ.

    ∂/∂τ (0-d float64) is of this process's losses. What comes back for absent embeddings says nothing;
    ``spectral_backward`` drops it with the rest of them.
    """
    with torch.autocast(u.device.type, enabled=False):
        everyone, number = _modality_everyone(z, u, mask, columns, columns_mask, raw)
        rows = slice(start, start + len(u))
        tau = _temperature(temperature, fixed_temperature, contrast=True)
        scale = grad.double() / (2 * number) / tau
        slopes = temperature is not None
        grad_u = torch.zeros_like(u)
        grad_temperature = torch.zeros((), dtype=torch.float64, device=u.device)
        grad_z = []
        for (of_z, of_u), forth, back in zip(everyone, *losses, strict=True):
            from_z, from_u, slope = _pulled(of_z.at(rows), of_u, forth[rows], back, start, tau, not columns, slopes)
            grad_temperature -= slope
            if from_u is None:
                from_u, _, slope = _pulled(of_u.at(rows), of_z, back[rows], forth, start, tau, False, slopes)
                grad_temperature -= slope
            grad_u += from_u
            grad_z.append(_where_seen((from_z.double() * scale).to(u.dtype), of_z.at(rows)))
        grad_u = _where_seen((grad_u.double() * scale).to(u.dtype), everyone[0].u.at(rows))
        return grad_z, grad_u, grad_temperature * scale


# ------------------------------------------------------------------------------------------------
# Operators
# ------------------------------------------------------------------------------------------------


def new_library(name: str) -> torch.library.Library:
    """An empty library of operators of that name; ``name_2`` and so on where this process has it already.

    Names of operators are the process's. Another copy of the package, or this one before it was imported anew, keeps
    its own: whoever still holds its functions runs them, and what runs here is what is written here.
    """
    for number in range(1, 1000):
        try:
            return torch.library.Library(name if number == 1 else f"{name}_{number}", "DEF")
        except RuntimeError as error:  # torch tells by nothing but this whether a name is taken
            taken = error
    raise taken


def _spectral_forward_shapes(
    embeddings: Sequence[Tensor],
    mask: Any,
    temperature: Any,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
) -> Any:
    xs = _modalities(embeddings)
    B, k, out = xs[0].shape[0], len(xs), _output_dtype(xs)
    x, wide = xs[0].new_empty, torch.float64
    state = [
        x((B, k if spectrum else 1), dtype=wide),
        x((B, k, k), dtype=wide),
        x((B, k), dtype=wide),
        x((B if normalize else 0, k), dtype=wide),
        x((B if out == wide else 0, k), dtype=torch.int32),
    ]
    return spectral_output_shapes(embeddings, spectrum, wanted), state


def spectral_output_shapes(embeddings: Sequence[Tensor], spectrum: bool, wanted: int) -> list[Tensor]:
    """Empty tensors like the outputs of any backend's ``spectral_forward``."""
    xs = _modalities(embeddings)
    (B, d), k, out = xs[0].shape, len(xs), _output_dtype(xs)
    shapes: list[tuple[int, ...]] = []
    if wanted & constants.ANY_ALIGNMENT:
        shapes.append((B,) if wanted & constants.ALIGNMENT else ())
    if wanted & constants.SIGMA:
        shapes.append((B, min(d, k) if spectrum else 1))
    if wanted & constants.U:
        shapes.append((B, d))
    if wanted & constants.V:
        shapes.append((B, k))
    if wanted & constants.Z:
        shapes += [(B, d)] * k
    return [xs[0].new_empty(shape, dtype=out) for shape in shapes]


def spectral_backward_shapes(embeddings: Sequence[Tensor], mask: Any, temperature: Any, *arguments: Any) -> Any:
    """Empty tensors like the results of any backend's ``spectral_backward``."""
    needed = arguments[-1]
    grads = [x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip(embeddings, needed, strict=True)]
    return grads if temperature is None else [*grads, embeddings[0].new_empty((), dtype=torch.float64)]


def _instance_forward_shapes(u: Tensor, *_: Any) -> Any:
    return u.new_empty(()), u.new_empty(u.shape[:1], dtype=torch.float64), u.new_empty((0,))


def instance_backward_shapes(u: Tensor, *_: Any) -> Any:
    """Empty tensors like the results of any backend's ``instance_backward``."""
    return u.new_empty(u.shape), u.new_empty((), dtype=torch.float64)


def _modality_forward_shapes(z: Sequence[Tensor], u: Tensor, *_: Any) -> Any:
    return u.new_empty(()), u.new_empty((2, len(z), u.shape[0]), dtype=torch.float64), u.new_empty((0,))


def modality_backward_shapes(z: Sequence[Tensor], u: Tensor, *_: Any) -> Any:
    """Empty tensors like the results of any backend's ``modality_backward``."""
    return [z_m.new_empty(z_m.shape) for z_m in z], u.new_empty(u.shape), u.new_empty((), dtype=torch.float64)


_TEMPERATURE = "Tensor? temperature, float fixed_temperature"
_SPECTRAL = f"Tensor[] embeddings, Tensor? mask, {_TEMPERATURE}, bool normalize, bool spectrum, int wanted"
_INSTANCE = f"Tensor u, Tensor? columns, int start, {_TEMPERATURE}"
_MODALITY = (
    f"Tensor[] z, Tensor u, Tensor? mask, Tensor[] columns, Tensor? columns_mask, int start, bool raw, {_TEMPERATURE}"
)
_SAVED = "Tensor losses, Tensor state, Tensor grad"
signatures: dict[str, str] = {}
"""Of the operators, by name."""


def _registered() -> torch.library.Library:
    """The library with its operators. Nothing else holds it before it is complete, so an interrupted one goes away."""
    library = new_library("pmrl_reference")
    for signature, implementation, shapes in (
        (f"spectral_forward({_SPECTRAL}) -> (Tensor[], Tensor[])", spectral_forward, _spectral_forward_shapes),
        (
            f"spectral_backward({_SPECTRAL}, Tensor[] state, Tensor?[] grads, bool[] needed) -> Tensor[]",
            spectral_backward,
            spectral_backward_shapes,
        ),
        (f"instance_forward({_INSTANCE}) -> (Tensor, Tensor, Tensor)", instance_forward, _instance_forward_shapes),
        (f"instance_backward({_INSTANCE}, {_SAVED}) -> (Tensor, Tensor)", instance_backward, instance_backward_shapes),
        (f"modality_forward({_MODALITY}) -> (Tensor, Tensor, Tensor)", modality_forward, _modality_forward_shapes),
        (
            f"modality_backward({_MODALITY}, {_SAVED}) -> (Tensor[], Tensor, Tensor)",
            modality_backward,
            modality_backward_shapes,
        ),
    ):
        name = signature.partition("(")[0]
        signatures[name] = signature.removeprefix(name)
        library.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{name}", shapes, lib=library)
    return library


_library = _registered()

operators = getattr(torch.ops, _library.ns)
"""What ``autograd.py`` calls: the six functions above as operators."""
