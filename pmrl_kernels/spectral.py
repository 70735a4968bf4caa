"""Singular values and leading vectors of each instance's embedding matrix, as differentiable primitives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import inputs
from .inputs import Embeddings, Mask
from .ops import function, resolve
from .ops.spectral.spec import SIGMA, SPECTRAL, Spectral, U, V


class DominantTriplet(NamedTuple):
    """The leading singular triplet of B instances."""

    sigma: Tensor
    """Largest singular values, (B,)."""
    u: Tensor
    """Leading left singular vectors, (B, d): the direction the modalities share."""
    v: Tensor
    """Leading right singular vectors, (B, k): how much each modality has of it."""


def singular_values(
    *embeddings: Embeddings, mask: Mask | None = None, normalize: bool = True, backend: str | None = None
) -> Tensor:
    r"""All singular values of every instance's :math:`d \times k` embedding matrix.

    With :math:`Z_i = [x_1/\lVert x_1\rVert, \dots, x_k/\lVert x_k\rVert]` the matrix of instance i's
    embeddings, returns :math:`\sigma_j = \sqrt{\lambda_j(Z_i^\top Z_i)}`, largest first. An eigensolve of
    the k x k Gram matrix; no singular value decomposition of anything of size d.

    Args:
        embeddings: k tensors (B, d), one per modality; or one list, tuple or dict of them; or one tensor
            (B, k, d). float32, bfloat16, float16 or float64, which may differ; 1 <= k <= 32, d >= 1.
        mask: bool (B, k), True = present (a dict of (B,) where embeddings are a dict). An absent modality
            is no column at all.
        normalize: divide every embedding by its norm first. Unlike in ``torch.linalg`` this is the
            default, as in the losses of this package, whose logits these values are.
        backend: "native" (CPUs), "cuda" or "triton" (GPUs), or "reference"; None takes the fastest that works.

    Returns:
        (B, min(d, k)), float32 (float64 if any embedding is float64), in the unit of the embeddings' norms. Instances
        with fewer than k modalities have min(d, k_i) singular values, followed by zeros.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: a backend asked for by name that cannot run.
        NotImplementedError: a second derivative, forward mode or ``vmap``.

    Gradient:
        :math:`\partial/\partial Z = Z V \mathrm{diag}(g_j/\sigma_j) V^\top`. A σ_j at or below eps32·σ₁
        (√(k·eps64)·σ₁ in float64) contributes 0, the minimum-norm subgradient. Where the largest value is
        tied, v₁ is the oriented vector of ``dominant_singular_triplet`` and the others of the tie share the
        mean of their weights; in ties further down, weights that differ meet the solver's basis. Zero
        vectors and absent modalities get exact zeros, an instance with a NaN or Inf gets NaN, its
        neighbours in the batch do not.

    Source: PMRL (arXiv 2507.17343), section 3; docs/mathematics.md.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
        >>> singular_values(x, y)
        tensor([[1., 1.]])
        >>> singular_values(x, y, normalize=False)
        tensor([[5., 3.]])
    """
    return _spectral(embeddings, mask, normalize, backend, spectrum=True, wanted=SIGMA)[0]


def dominant_singular_value(
    *embeddings: Embeddings, mask: Mask | None = None, normalize: bool = True, backend: str | None = None
) -> Tensor:
    r"""The largest singular value of every instance's :math:`d \times k` embedding matrix.

    :math:`\sigma_1 = \max_{\lVert v\rVert = 1} \lVert Z_i v\rVert`, by batched power iteration on the k x k
    Gram matrix: the cheap path where the rest of the spectrum is not needed. With normalised embeddings that
    are not all zero, :math:`1 \le \sigma_1 \le \sqrt{k}`, and √k exactly when all modalities agree up to sign.

    Args:
        embeddings, mask, normalize, backend: as in :func:`singular_values`.

    Returns:
        (B,), float32 (float64 if any embedding is float64); 0 for an instance without modalities.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`singular_values`.

    Gradient:
        :math:`\partial\sigma_1/\partial Z = u_1 v_1^\top`; 0 where σ₁ = 0. In a tie, that of the oriented
        pair (u₁, v₁), see :func:`dominant_singular_triplet`.

    Source: PMRL (arXiv 2507.17343), section 3; docs/mathematics.md, "Power iteration".

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> dominant_singular_value(x, x, x)
        tensor([1.7321])
    """
    return _spectral(embeddings, mask, normalize, backend, spectrum=False, wanted=SIGMA)[0][:, 0]


def dominant_singular_triplet(
    *embeddings: Embeddings, mask: Mask | None = None, normalize: bool = True, backend: str | None = None
) -> DominantTriplet:
    r"""σ₁, u₁ and v₁ of every instance's :math:`d \times k` embedding matrix, :math:`Z_i v_1 = \sigma_1 u_1`.

    By batched power iteration on the k x k Gram matrix. The sign is fixed: u₁ points towards the mean of
    the embeddings, that is, the entries of v₁ have a positive sum, so the result does not depend on the
    order of the modalities. Where that sum is zero up to rounding, the entry of v₁ of largest magnitude (the
    first of equals) is positive: so of two modalities with a negative cosine the order does decide. In a tied top
    eigenspace v₁ is the normalised projection of the all-ones vector.

    Args:
        embeddings, mask, normalize, backend: as in :func:`singular_values`.

    Returns:
        ``DominantTriplet(sigma (B,), u (B, d), v (B, k))``, float32 (float64 if any embedding is float64). v is 0 at
        absent modalities; an instance with σ₁ = 0 has u = 0 and v = 0.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`singular_values`.

    Gradient:
        Of all three outputs. Only σ₁ and the gaps λ₁ − λ_j to the top of the Gram's spectrum are divided
        by; a gap of at most 4·eps32·λ₁ (16·k·eps64·λ₁ in float64) contributes 0, since u₁ and v₁ are not
        determined there. σ₁ = 0 gives zero gradients.

    Source: PMRL (arXiv 2507.17343), section 3; docs/mathematics.md, "Gradient through the leading vectors".

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> sigma, u, v = dominant_singular_triplet(x, x, y)
        >>> sigma
        tensor([1.4142])
        >>> torch.allclose(u, x), torch.allclose(v, torch.tensor([[0.5, 0.5, 0.0]]).sqrt())
        (True, True)
    """
    wanted = SIGMA | U | V
    sigma, u, v = _spectral(embeddings, mask, normalize, backend, spectrum=False, wanted=wanted)
    return DominantTriplet(sigma[:, 0], u, v)


def _spectral(
    embeddings: tuple[Embeddings, ...],
    mask: Mask | None,
    normalize: bool,
    backend: str | None,
    *,
    spectrum: bool,
    wanted: int,
) -> tuple[Tensor, ...]:
    batch = inputs.canonical(embeddings, mask)
    normalize = inputs.flag(normalize, "normalize")
    pair = resolve(SPECTRAL, backend, batch.device, batch.dtype, batch.k, batch.d)
    return function.apply(Spectral(pair, wanted, spectrum, normalize), (batch.mask, None, *batch.tensors))
