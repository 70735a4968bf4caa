"""The oracle: the losses by ``torch.linalg.svd`` in float64 through autograd, one instance at a time.

Written for plainness and shares nothing with the package. Well defined only where all singular values
are distinct and positive; the contract says what must come out elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def columns(xs: Sequence[Tensor], i: int, mask: Tensor | None, normalize: bool) -> Tensor:
    """Z_i (d, k_i): instance i's present embeddings, normalised if asked, in the inputs' dtype."""
    present = [x[i] for m, x in enumerate(xs) if mask is None or mask[i, m]]
    if normalize:
        present = [x / torch.linalg.vector_norm(x) for x in present]
    return torch.stack(present, 1)


def triplet(Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular values, u₁ (d,) and v₁ (k_i,), u₁ pointing towards the mean of the columns."""
    U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
    sign = torch.where(Vh[0].detach().sum() < 0, -1.0, 1.0).to(Z.dtype)
    return S, U[:, 0] * sign, Vh[0] * sign


def alignments(
    xs: Sequence[Tensor], temperature: float | Tensor, mask: Tensor | None, normalize: bool, objective: str
) -> Tensor:
    """(B,): the alignment term of each instance; 0 where fewer than two modalities are present."""
    losses = []
    for i in range(len(xs[0])):
        if len(xs) < 2 or (mask is not None and mask[i].sum() < 2):
            losses.append(xs[0].new_zeros(()))
            continue
        Z = columns(xs, i, mask, normalize)
        S = torch.linalg.svd(Z, full_matrices=False)[1]
        if objective == "leading":
            losses.append(torch.linalg.vector_norm(Z) - S[0])
        else:
            losses.append(torch.log1p(torch.exp((S[1:] - S[0]) / temperature).sum()))
    return torch.stack(losses)


def mean_alignment(alignment: Tensor, k: int, mask: Tensor | None) -> Tensor:
    counted = len(alignment) * (k >= 2) if mask is None else int((mask.sum(1) >= 2).sum())
    return alignment.sum() / max(counted, 1)


def leading_vectors(xs: Sequence[Tensor], mask: Tensor | None, normalize: bool) -> Tensor:
    """U (B, d); rows of zeros where no modality is present."""
    rows = []
    for i in range(len(xs[0])):
        absent = mask is not None and not mask[i].any()
        rows.append(xs[0].new_zeros(xs[0].shape[1]) if absent else triplet(columns(xs, i, mask, normalize))[1])
    return torch.stack(rows)


def instance(u: Tensor, temperature: float | Tensor, keep: Tensor | None = None) -> Tensor:
    u = u if keep is None else u[keep]
    return F.cross_entropy(u @ u.T / temperature, torch.arange(len(u)))


def others(xs: Sequence[Tensor], mask: Tensor | None, normalize: bool) -> list[Tensor]:
    """k tensors (B, d): w_m, what the modalities but m share, and zeros where there are none."""
    rows: list[list[Tensor]] = [[] for _ in xs]
    for i in range(len(xs[0])):
        present = [m for m in range(len(xs)) if mask is None or mask[i, m]]
        Z = columns(xs, i, mask, normalize) if present else None
        weights = triplet(Z)[2].abs() if Z is not None else None
        for m, found in enumerate(rows):
            y = xs[0].new_zeros(xs[0].shape[1])
            for position, j in enumerate(present):
                if j != m:
                    y = y + weights[position] * Z[:, position]
            found.append(y / torch.linalg.vector_norm(y) if y.any() else y)
    return [torch.stack(found) for found in rows]


def info_nce(a: Tensor, b: Tensor, tau: float | Tensor, a_there: Tensor, b_there: Tensor) -> tuple[Tensor, int]:
    """Sum of both directions' cross-entropies over the rows that both sides have, and how many those are."""
    both = a_there & b_there
    total = a.new_zeros(())
    for x, y, there in ((a, b, b_there), (b, a, a_there)):
        position = (there.cumsum(0) - 1)[both]
        if len(position):
            total = total + F.cross_entropy(x[both] @ y[there].T / tau, position, reduction="sum")
    return total, int(both.sum())


def paired(
    xs: Sequence[Tensor], contrast: str, temperature: float | Tensor, mask: Tensor | None, normalize: bool
) -> Tensor:
    """The contrasts "leave_one_out" and "pairs"."""
    there = torch.ones(len(xs[0]), len(xs), dtype=torch.bool) if mask is None else mask
    z = [x / torch.linalg.vector_norm(x, dim=1, keepdim=True) if normalize else x for x in xs]
    z = [x.where(there[:, m, None], torch.zeros_like(x)) for m, x in enumerate(z)]
    if contrast == "pairs":
        found = [info_nce(z[m], z[j], temperature, there[:, m], there[:, j]) for m in range(len(z)) for j in range(m)]
    else:
        w = others(xs, mask, normalize)
        found = [
            info_nce(x, y, temperature, there[:, m], (y != 0).any(1)) for m, (x, y) in enumerate(zip(z, w, strict=True))
        ]
    total = sum((loss for loss, _ in found), xs[0].new_zeros(()))
    return total / (2 * max(sum(number for _, number in found), 1))


def modality(
    xs: Sequence[Tensor], u: Tensor, temperature: float | Tensor, mask: Tensor | None, normalize: bool
) -> Tensor:
    """Mean over present pairs (i, m) of ½[CE(z_m Uᵀ/τ) + CE(U z_mᵀ/τ)]."""
    B, k = len(u), len(xs)
    mask = torch.ones(B, k, dtype=torch.bool) if mask is None else mask
    valid = mask.any(1)
    total, pairs = u.new_zeros(()), 0
    for m, x in enumerate(xs):
        here = mask[:, m].nonzero()[:, 0]
        if not len(here):
            continue
        z = x[here]
        z = z / torch.linalg.vector_norm(z, dim=1, keepdim=True) if normalize else z
        # where each present instance's own u stands among the valid ones
        position = (valid.cumsum(0) - 1)[here]
        total = total + F.cross_entropy(z @ u[valid].T / temperature, position, reduction="sum")
        total = total + F.cross_entropy(u[here] @ z.T / temperature, torch.arange(len(here)), reduction="sum")
        pairs += len(here)
    return total / (2 * max(pairs, 1))


def pmrl(
    xs: Sequence[Tensor],
    temperature: float | Tensor,
    instance_temperature: float | Tensor,
    weight: float,
    mask: Tensor | None,
    normalize: bool,
    objective: str,
    contrast: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, alignment, instance) of ``pmrl_loss``."""
    alignment = mean_alignment(alignments(xs, temperature, mask, normalize, objective), len(xs), mask)
    if contrast in ("leave_one_out", "pairs"):
        second = paired(xs, contrast, instance_temperature, mask, normalize)
        return alignment + weight * second, alignment, second
    u = leading_vectors(xs, mask, normalize)
    if contrast == "leading":
        second = instance(u, instance_temperature, None if mask is None else mask.any(1))
    else:
        second = modality(xs, u, instance_temperature, mask, normalize)
    return alignment + weight * second, alignment, second


def upcast(xs: Sequence[Tensor]) -> list[Tensor]:
    """Fresh float64 leaves on the CPU with the same values."""
    return [x.detach().cpu().double().requires_grad_() for x in xs]
