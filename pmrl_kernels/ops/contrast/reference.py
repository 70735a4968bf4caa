"""The contrasts in pure PyTorch, forward and hand-written backward, tile by tile: no B x B matrix at large B.

Every row i of a (n, d) has its positive at row start + i of b (N, d). With δ_ij = (s_ij − s_i⁺)/τ its loss is

    ℓ_i = log(1 + Σ_{j≠start+i} exp δ_ij) = softplus(logsumexp δ_ij),

which neither overflows nor cancels when ℓ_i is small, and P_ij = exp(δ_ij − ℓ_i) are the softmax probabilities, so ℓ is
all the backward pass needs besides its inputs. Of a batch over several processes, a are one process's rows and b
everyone's. The formulas are derived in docs/mathematics.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import Operators, Pair
from ..reference import NAME, NAMESPACE, read_mask, read_temperature, rejects
from . import spec

_TILE = 1 << 22  # similarities held at a time: 16 MiB in float32


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
    u: Tensor, everyone: Tensor | None, start: int, temperature: Tensor | None, fixed_temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """cross_entropy(U Uᵀ/τ, arange(B)) over the rows of U that are not zero; the others are unit vectors.

    Args:
        u: (B, d).
        everyone, start: None and 0; or the rows of all processes (N, d), with u at rows start and following.

    Returns:
        The sum of the losses of u over the number of rows of U that count (0-d); the losses (B,), float64,
        0 where a row does not count; a state for the backward pass.
    """
    with torch.autocast(u.device.type, enabled=False):
        all_rows, number = _unit_side(u if everyone is None else everyone)
        own = all_rows.at(slice(start, start + len(u)))
        tau = read_temperature(temperature, fixed_temperature, contrast=True)
        losses = _softplus(_log_sums(own, all_rows, start, tau, False)[0])
        if own.counted is not None:
            losses = losses.masked_fill(~own.counted, 0.0)
        mean = losses.sum(dtype=torch.float64) / number * (tau / tau)
        return mean.to(u.dtype), losses.double(), u.new_empty((0,))


def instance_backward(
    u: Tensor,
    everyone: Tensor | None,
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
        all_rows, number = _unit_side(u if everyone is None else everyone)
        rows = slice(start, start + len(u))
        tau = read_temperature(temperature, fixed_temperature, contrast=True)
        scale = grad.double() / number / tau
        sides = all_rows.at(rows), all_rows
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
    everyone: Sequence[Tensor],
    everyone_mask: Tensor | None,
    raw: bool,
) -> tuple[list[_Modality], Tensor]:
    if everyone:
        return _modality_sides(everyone[1:], everyone[0], everyone_mask, raw)
    return _modality_sides(z, u, mask, raw)


def modality_forward(
    z: Sequence[Tensor],
    u: Tensor,
    mask: Tensor | None,
    everyone: Sequence[Tensor],
    everyone_mask: Tensor | None,
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
        everyone, everyone_mask, start: empty, None and 0; or u and the z of all processes, N rows each, their mask,
            and at which row those of this process start.
        raw: u holds any vectors, which count where the mask has one of their modalities.

    Returns:
        The sum of the pairs' losses over the number of present pairs of all processes (0-d); the losses of both
        directions, (2, k, B), float64; a state for the backward pass.
    """
    with torch.autocast(u.device.type, enabled=False):
        sides, number = _modality_everyone(z, u, mask, everyone, everyone_mask, raw)
        rows = slice(start, start + len(u))
        tau = read_temperature(temperature, fixed_temperature, contrast=True)
        losses = u.new_empty((2, len(z), len(u)))
        for m, (of_z, of_u) in enumerate(sides):
            forth, back = _log_sums(of_z.at(rows), of_u, start, tau, not everyone)
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
    everyone: Sequence[Tensor],
    everyone_mask: Tensor | None,
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
    the spectral op's backward pass drops it with the rest of them.
    """
    with torch.autocast(u.device.type, enabled=False):
        sides, number = _modality_everyone(z, u, mask, everyone, everyone_mask, raw)
        rows = slice(start, start + len(u))
        tau = read_temperature(temperature, fixed_temperature, contrast=True)
        scale = grad.double() / (2 * number) / tau
        slopes = temperature is not None
        grad_u = torch.zeros_like(u)
        grad_temperature = torch.zeros((), dtype=torch.float64, device=u.device)
        grad_z = []
        for (of_z, of_u), forth, back in zip(sides, *losses, strict=True):
            from_z, from_u, slope = _pulled(of_z.at(rows), of_u, forth[rows], back, start, tau, not everyone, slopes)
            grad_temperature -= slope
            if from_u is None:
                from_u, _, slope = _pulled(of_u.at(rows), of_z, back[rows], forth, start, tau, False, slopes)
                grad_temperature -= slope
            grad_u += from_u
            grad_z.append(_where_seen((from_z.double() * scale).to(u.dtype), of_z.at(rows)))
        grad_u = _where_seen((grad_u.double() * scale).to(u.dtype), sides[0].u.at(rows))
        return grad_z, grad_u, grad_temperature * scale


def _instance_forward_shapes(u: Tensor, *_: Any) -> Any:
    return u.new_empty(()), u.new_empty(u.shape[:1], dtype=torch.float64), u.new_empty((0,))


def _modality_forward_shapes(z: Sequence[Tensor], u: Tensor, *_: Any) -> Any:
    return u.new_empty(()), u.new_empty((2, len(z), u.shape[0]), dtype=torch.float64), u.new_empty((0,))


def _registered() -> tuple[Operators, dict[str, Pair]]:
    operators = Operators(f"{NAMESPACE}_contrast")
    instance = operators.define(spec.INSTANCE, instance_forward, instance_backward, _instance_forward_shapes)
    modality = operators.define(spec.MODALITY, modality_forward, modality_backward, _modality_forward_shapes)
    pairs = {spec.INSTANCE.name: Pair(NAME, *instance, rejects), spec.MODALITY.name: Pair(NAME, *modality, rejects)}
    return operators, pairs


_operators, PAIRS = _registered()
