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
    u = leading_vectors(xs, mask, normalize)
    if contrast == "leading":
        second = instance(u, instance_temperature, None if mask is None else mask.any(1))
    else:
        second = modality(xs, u, instance_temperature, mask, normalize)
    return alignment + weight * second, alignment, second


def upcast(xs: Sequence[Tensor]) -> list[Tensor]:
    """Fresh float64 leaves on the CPU with the same values."""
    return [x.detach().cpu().double().requires_grad_() for x in xs]
