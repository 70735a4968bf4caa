"""What one logs while training: how far modalities agree, and whether instances keep apart. No gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from . import inputs, spectral
from .distributed import summed
from .inputs import Embeddings, Mask
from .ops.reference import read_mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def alignment_score(
    *embeddings: Embeddings,
    mask: Mask | None = None,
    group: ProcessGroup | Literal["world"] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""How far the modalities of an instance agree: the mean of :math:`\sigma_1/\sqrt{k_i}`.

    σ₁ is the largest singular value of the instance's normalised embeddings, k_i the number of them, so the score
    is 1 where all modalities agree up to sign and :math:`1/\sqrt{k_i}` where they are orthogonal. Unlike the loss it
    does not depend on a temperature.

    Args:
        embeddings, mask, backend: as in :func:`~pmrl_kernels.dominant_sv_loss`. Embeddings are normalised.
        group: a ``torch.distributed`` group of processes, whose batches together are the batch, or "world" for all
            processes, whose group is looked up by each call; every one of them must call, and all get the same number.
            None: this process's batch alone. (In ``torch.distributed`` None means all processes.)

    Returns:
        A 0-d tensor on the embeddings' device, float32 (float64 for float64 input), without gradient: the mean over
        the instances with at least two modalities; NaN if there are none, or where a present embedding is not finite.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`~pmrl_kernels.dominant_sv_loss`; ValueError too for
            ``group="world"`` before ``torch.distributed.init_process_group``.

    Source: PMRL (arXiv 2507.17343), section 3: full alignment is σ₁ = √k.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> alignment_score(x, x), alignment_score(x, y)
        (tensor(1.), tensor(0.7071))
    """
    processes, present = inputs.process_group(group), _present(embeddings, mask)
    with torch.no_grad():
        sigma = spectral.dominant_singular_value(*embeddings, mask=mask, backend=backend)
        return _mean(sigma / present.sqrt(), (present >= 2) | sigma.isnan(), processes)


def effective_rank(
    *embeddings: Embeddings,
    mask: Mask | None = None,
    group: ProcessGroup | Literal["world"] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""How many directions the modalities of an instance take: the mean of :math:`\exp(-\sum_j p_j \log p_j)`.

    :math:`p_j = \sigma_j / \sum_l \sigma_l` over the singular values of the instance's normalised embeddings: 1 where
    all modalities agree up to sign, min(d, k_i) where they are orthogonal. Where :func:`alignment_score` sees σ₁
    alone, this tells one modality that has drifted off from all of them being apart.

    Args:
        embeddings, mask, group, backend: as in :func:`alignment_score`.

    Returns:
        As :func:`alignment_score`; instances of zero vectors only have no spectrum and do not count.

    Raises:
        As :func:`alignment_score`.

    Source: the effective rank of Roy and Vetterli (EUSIPCO 2007).

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> effective_rank(x, x), effective_rank(x, y)
        (tensor(1.), tensor(2.))
    """
    processes, present = inputs.process_group(group), _present(embeddings, mask)
    with torch.no_grad():
        sigma = spectral.singular_values(*embeddings, mask=mask, backend=backend)
        share = sigma / sigma.sum(1, keepdim=True)
        entropy = torch.special.entr(share).sum(1)
        return _mean(entropy.exp(), ((present >= 2) & (sigma[:, 0] != 0)) | sigma[:, 0].isnan(), processes)


def uniformity(
    *embeddings: Embeddings,
    mask: Mask | None = None,
    group: ProcessGroup | Literal["world"] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""How close instances are to one another: the mean of :math:`u_i^\top u_j` over all pairs i ≠ j.

    u_i is the leading left singular vector of instance i, oriented as everywhere in this package. 1 means that all
    instances have collapsed into one direction; about 0, or a little less, is what the contrast drives at. From the
    sum of the vectors, :math:`(\lVert\sum_i u_i\rVert^2 - n)/(n(n-1))`, so no B x B matrix is formed.

    The log of the PMRL authors' code averages the whole matrix :math:`U U^\top`, its diagonal of ones included, which
    for n instances is :math:`((n - 1)\,\mathrm{uniformity} + 1)/n`: with smaller batches it looks less uniform.

    Args:
        embeddings, mask, group, backend: as in :func:`alignment_score`. One tensor (B, d) is one modality: its
            normalised rows are the u_i.

    Returns:
        As :func:`alignment_score`; the mean is over pairs of instances that have a u, NaN if there is none.

    Raises:
        As :func:`alignment_score`; ValueError too on every process of a group whose processes differ in d. They tell
        one another first, which the host waits for.

    Source: docs/mathematics.md, "Instance term".

    Example:
        >>> import torch
        >>> u = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> uniformity(u)
        tensor(0.3333)
    """
    processes = inputs.process_group(group)
    with torch.no_grad():
        sigma, u, _ = spectral.dominant_singular_triplet(*embeddings, mask=mask, backend=backend)
        inputs.same_width(processes, u.shape[1], u.device)
        sums = (sigma != 0).sum(dtype=torch.float64), u.sum(0, dtype=torch.float64), u.double().square().sum()
        n, total, diagonal = summed(sums, processes)
        pairs = torch.where(n < 2, torch.nan, n * (n - 1))
        return ((total.square().sum() - diagonal) / pairs).to(u.dtype)


def _present(embeddings: tuple[Embeddings, ...], mask: Mask | None) -> Tensor:
    """How many modalities each instance has, (B,) in the dtype of the results."""
    batch = inputs.canonical(embeddings, mask)
    dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
    if batch.mask is None:
        return torch.full((batch.B,), batch.k, dtype=dtype, device=batch.device)
    return read_mask(batch.mask).sum(1, dtype=dtype)


def _mean(x: Tensor, counted: Tensor, processes: ProcessGroup | None) -> Tensor:
    """Over what counts, on all processes. A NaN shows where it counts, so what holds one must."""
    sums = torch.where(counted, x, 0).sum(dtype=torch.float64), counted.sum(dtype=torch.float64)
    total, number = summed(sums, processes)
    return (total / number).to(x.dtype)
