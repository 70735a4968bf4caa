"""The contrasts in pure PyTorch, forward and hand-written backward, tile by tile: no B x B matrix at large B.

Of a pair of matrices every row i of a (n, d) has its positive at row start + i of b (N, d). With δ_ij = (s_ij − s_i⁺)/τ
its loss is

    ℓ_i = log(1 + Σ_{j≠start+i} exp δ_ij) = softplus(logsumexp δ_ij),

which neither overflows nor cancels when ℓ_i is small, and P_ij = exp(δ_ij − ℓ_i) are the softmax probabilities, so ℓ is
all the backward pass needs besides its inputs. Of a batch over several processes, a are one process's rows and b
everyone's. The formulas are derived in docs/mathematics.md.

Similarities and τ are halved, so that the difference of any two that the dtype holds is a number, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import Operators, Pair
from ..reference import NAME, NAMESPACE, read_mask, read_temperature, rejects
from . import spec

_TILE = 1 << 22  # similarities held at a time: 16 MiB in float32, which caches of CPUs like
_DEVICE_TILE = 1 << 24  # elsewhere, where each tile is some ten launches


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ). The library's default switches to the identity at 20: 2e-9 off, too much in float64."""
    return torch.nn.functional.softplus(x, threshold=40.0)


def _row_tiles(n_rows: int, n_columns: int, device: torch.device) -> Iterator[slice]:
    tile = _TILE if device.type == "cpu" else _DEVICE_TILE
    step = max(1, tile // max(1, n_columns))
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
    positive: Tensor  # (n,): similarity with its own partner on the other side, halved
    counted: Tensor | None  # bool (n,): which have a loss
    seen: Tensor | None  # bool (n,): which the other side may choose

    def at(self, rows: slice) -> _Side:
        counted, seen = (None if x is None else x[rows] for x in (self.counted, self.seen))
        return _Side(self.vectors[rows], self.positive[rows], counted, seen)


def _half_similarities(a: _Side, b: _Side) -> Tensor:
    return (a.vectors @ b.vectors.T).mul_(0.5)


def _log_sums(a: _Side, b: _Side, start: int, tau: Tensor | float, both: bool) -> tuple[Tensor, Tensor | None]:
    """logsumexp_{j≠start+i} δ_ij for every row of a; where ``both``, for every column too (a and b then pair up)."""
    rows = torch.empty_like(a.positive)
    columns = torch.full_like(b.positive, -torch.inf, dtype=torch.float64) if both else None
    for tile in _row_tiles(len(rows), len(b.positive), rows.device):
        part = a.at(tile)
        similarity = _half_similarities(part, b)
        rows[tile] = _deltas(similarity, part.positive[:, None], tau, b.seen, start + tile.start).logsumexp(1)
        if columns is not None:
            allowed = None if part.seen is None else part.seen[:, None]
            delta = _deltas(similarity, b.positive, tau, allowed, start + tile.start)
            columns = torch.logaddexp(columns, delta.logsumexp(0).double())
    return rows, columns


def _deltas(similarity: Tensor, positive: Tensor, tau: Tensor | float, allowed: Tensor | None, start: int) -> Tensor:
    """δ of one tile: −inf where not allowed and for the positives, which ℓ treats apart."""
    delta = torch.sub(similarity, positive).div_(tau / 2)
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
    for tile in _row_tiles(len(a.vectors), len(b.vectors), a.vectors.device):
        part, rows = a.at(tile), own[tile]
        similarity, first = _half_similarities(part, b), start + tile.start
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
    return from_rows, from_columns, total / (tau / 2)


def _probabilities(
    similarity: Tensor, positive: Tensor, losses: Tensor, tau: Tensor | float, allowed: Tensor | None, start: int
) -> Tensor:
    """P of one tile: 0 where not allowed and for the positives."""
    P = torch.sub(similarity, positive).div_(tau / 2).sub_(losses).clamp_max_(0.0).exp_()
    if allowed is not None:
        P.masked_fill_(~allowed, 0.0)
    P.diagonal(start).fill_(0.0)
    return P


def _slope(P: Tensor, similarity: Tensor, positive: Tensor) -> Tensor:
    """½τ Σ P·δ, half the negative of ∂Σℓ/∂τ · τ². (log P + ℓ is δ too, but for large τ the rounding of two numbers.)"""
    return torch.where(P == 0, 0.0, P * (similarity - positive)).sum(dtype=torch.float64)


def _divisor(counted: Tensor, positive: Tensor) -> Tensor:
    """What a mean over rows divides by (0-d float64): how many count, at least 1, so that nothing gives 0.

    NaN where the similarity of one of those with its partner is: a row that is compared with no other, or is another
    process's, shows what is not finite nowhere else.
    """
    return counted.sum().clamp_min(1) + torch.where(counted, positive * 0, 0.0).sum(dtype=torch.float64)


class _Pair(NamedTuple):
    """Two sides, and which of the vectors they are."""

    left: _Side
    right: _Side
    at: tuple[int, int]
    symmetric: bool  # both sides are the same, and have their losses once


def _pairs(
    vectors: Sequence[Tensor], indices: Sequence[int], directions: Sequence[bool], mask: Tensor | None
) -> tuple[list[_Pair], Tensor]:
    """The sides of each pair, by the rules of ``spec.PAIRED``; and how many losses a mean counts."""
    masked = 0 if mask is None else mask.shape[1]
    there, filled = [], []
    for n, (x, is_direction) in enumerate(zip(vectors, directions, strict=True)):
        rows = (x != 0).any(1) if is_direction else torch.ones_like(x[:, 0], dtype=torch.bool)
        column = n - len(vectors) + masked
        if mask is not None and column >= 0:
            present = read_mask(mask)[:, column]
            rows, x = rows & present, x.masked_fill(~present[:, None], 0.0)
        there.append(rows)
        filled.append(x)
    found, counted, positives = [], [], []
    for a, b in zip(indices[::2], indices[1::2], strict=True):
        both = there[a] & there[b]
        if a == b and directions[a]:
            positive = 1 + 0 * filled[a].sum(1)  # by definition, unless a row is not finite
        else:
            positive = (filled[a] * filled[b]).sum(1)
            positive = positive.masked_fill(~positive.isfinite(), torch.nan)  # an Inf must not turn into weight 0
        seen_a = both if directions[b] and not directions[a] else there[a]
        seen_b = both if directions[a] and not directions[b] else there[b]
        here = _unless_all(both)
        left, right = (_Side(filled[n], positive / 2, here, _unless_all(x)) for n, x in ((a, seen_a), (b, seen_b)))
        found.append(_Pair(left, right, (a, b), a == b))
        counted.append(both)
        positives.append(positive)
    nothing = vectors[0].new_zeros((0,))
    number = _divisor(torch.cat([nothing.bool(), *counted]), torch.cat([nothing, *positives]))
    return found, number * spec.directions(indices)


def paired_forward(
    vectors: Sequence[Tensor],
    pairs: Sequence[int],
    directions: Sequence[bool],
    mask: Tensor | None,
    everyone: Sequence[Tensor],
    everyone_mask: Tensor | None,
    start: int,
    temperature: Tensor | None,
    fixed_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over pairs (a, b) and their rows of ½[CE(a Bᵀ/τ) + CE(b Aᵀ/τ)], or CE(a Aᵀ/τ) of vectors with themselves.

    Args:
        vectors, pairs, directions, mask: see ``spec.PAIRED``; matrices (B, d), whose absent rows may hold anything.
        everyone, everyone_mask, start: empty, None and 0; or the vectors of all processes, (N, d) each, their mask, and
            at which row those of this process start.

    Returns:
        The sum of this process's losses over how many everyone has (0-d); the losses (directions, pairs, B), float64, 0
        where a row has none; a state for the backward pass.
    """
    with torch.autocast(vectors[0].device.type, enabled=False):
        B = len(vectors[0])
        found, number = _pairs(everyone or vectors, pairs, directions, everyone_mask if everyone else mask)
        rows = slice(start, start + B)
        tau = read_temperature(temperature, fixed_temperature, contrast=True)
        losses = vectors[0].new_zeros(spec.losses_shape(vectors, pairs))
        for n, (left, right, _, symmetric) in enumerate(found):
            forth, back = _log_sums(left.at(rows), right, start, tau, not everyone and not symmetric)
            if back is None and not symmetric:
                back, _ = _log_sums(right.at(rows), left, start, tau, False)
            for direction, sums in enumerate((forth, back)):
                if sums is not None:
                    losses[direction, n] = _softplus(sums)
            here = left.at(rows).counted
            if here is not None:
                losses[:, n].masked_fill_(~here, 0.0)
        mean = losses.sum(dtype=torch.float64) / number * (tau / tau)
        return mean.to(losses.dtype), losses.double(), losses.new_empty((0,))


def paired_backward(
    vectors: Sequence[Tensor],
    pairs: Sequence[int],
    directions: Sequence[bool],
    mask: Tensor | None,
    everyone: Sequence[Tensor],
    everyone_mask: Tensor | None,
    start: int,
    temperature: Tensor | None,
    fixed_temperature: float,
    losses: Tensor,
    state: Tensor,
    grad: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the mean over all processes from their losses (directions, pairs, N): of the vectors, and ∂/∂τ.

    ∂/∂τ (0-d float64) is of this process's losses. Rows that nothing has to do with get zeros, whatever the others, or
    the gradient that comes in, make of the rest.
    """
    with torch.autocast(vectors[0].device.type, enabled=False):
        found, number = _pairs(everyone or vectors, pairs, directions, everyone_mask if everyone else mask)
        rows = slice(start, start + len(vectors[0]))
        tau = read_temperature(temperature, fixed_temperature, contrast=True)
        scale = grad.double() / number / tau
        slopes = temperature is not None
        slope = torch.zeros((), dtype=torch.float64, device=vectors[0].device)
        grads = [torch.zeros_like(x) for x in vectors]
        used = [torch.zeros_like(x[:, 0], dtype=torch.bool) for x in vectors]
        for n, (left, right, at, symmetric) in enumerate(found):
            forth = losses[0, n]
            back = forth if symmetric else losses[1, n]
            both = not everyone and not symmetric
            own, from_other, part = _pulled(left.at(rows), right, forth[rows], back, start, tau, both, slopes)
            slope -= part
            if from_other is None and not symmetric:
                from_other, _, part = _pulled(right.at(rows), left, back[rows], forth, start, tau, False, slopes)
                slope -= part
            for which, side, pulled in zip(at, (left, right), (own, from_other), strict=True):
                if pulled is not None:
                    seen = side.at(rows).seen
                    used[which] |= True if seen is None else seen
                    grads[which] += pulled if seen is None else pulled.masked_fill(~seen[:, None], 0.0)
        for x, seen in zip(grads, used, strict=True):
            x.copy_((x.double() * scale).masked_fill(~seen[:, None], 0.0))  # a scaler's gradient need not fit float32
        return grads, slope * scale


def _forward_shapes(vectors: Sequence[Tensor], pairs: Sequence[int], *_: Any) -> Any:
    x, shape = vectors[0], spec.losses_shape(vectors, pairs)
    return x.new_empty(()), x.new_empty(shape, dtype=torch.float64), x.new_empty((0,))


def _registered() -> tuple[Operators, dict[str, Pair]]:
    operators = Operators(f"{NAMESPACE}_contrast")
    paired = operators.define(spec.PAIRED, paired_forward, paired_backward, _forward_shapes)
    return operators, dict.fromkeys((spec.PAIRED.name, spec.OF_ANY_NORM.name), Pair(NAME, *paired, rejects))


_operators, PAIRS = _registered()
