"""Joint scores: how well a query goes with a whole candidate of several modalities, for every pair of them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import inputs
from .inputs import Embeddings, Mask
from .ops import function, resolve
from .ops.joint.spec import AREA2, JOINT, SCORES, Joint
from .ops.spectral.spec import SPECTRAL, Spectral, U, Z

NAMES = (*SCORES, "cosine", "mip")


def joint_scores(
    query: Tensor,
    *candidates: Embeddings,
    score: str = "gain",
    mask: Mask | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Scores of every pair of a query and a candidate that has several modalities.

    With t the embedding of a query, C (n, d) those of a candidate, G the Gram matrix of :math:`[t, c_1, \dots, c_n]`
    and K that of C alone:

    ============ =========================================================== ====================================
    ``score``    formula                                                     best
    ============ =========================================================== ====================================
    ``gain``     :math:`\lambda_1(G) - \lambda_1(K)`                         largest; what the query adds
    ``sine``     :math:`\sqrt{\det G / \det K}`, the distance of t from the  smallest
                 span of C
    ``volume``   :math:`\sqrt{\det G}`, GRAM's                               smallest
    ``volume2``  :math:`\det G`                                              smallest
    ``area2``    twice the squared area of the triangle of t, c₁ and c₂,     smallest
                 TRIANGLE's
    ``sigma``    :math:`\sigma_1 = \sqrt{\lambda_1(G)}`, PMRL's              largest
    ``lambda``   :math:`\lambda_1(G)`                                        largest
    ``cosine``   t · u₁(C), the candidate's leading singular vector          largest
    ``mip``      Σ t c₁ ⋯ cₙ, the multilinear inner product                  largest
    ============ =========================================================== ====================================

    By n matrix products (one for ``cosine`` and ``mip``), not by Nq x Ng small matrices. Volumes contain det K and
    ``sigma`` and ``lambda`` λ₁(K): candidates whose own modalities agree do well with every query, which ``gain``,
    ``sine`` and ``cosine`` leave out. All but ``cosine``, ``mip`` and ``area2`` are the same for t and −t.

    Args:
        query: (Nq, d); float32, bfloat16, float16 or float64.
        candidates: n tensors (Ng, d), one per modality; or one list, tuple or dict of them; or one tensor (Ng, n, d).
            1 <= n <= 31; exactly 2 for ``area2``.
        score: one of the above.
        mask: bool (Ng, n), True = present (a dict of (Ng,) where candidates are a dict). An absent modality is no
            column at all. Not with ``area2``, which is nothing without a triangle.
        normalize: divide every embedding by its norm first.
        backend: "native" (CPUs), "cuda" or "triton" (GPUs), or "reference"; None takes the fastest that works.

    Returns:
        (Nq, Ng), float32 (float64 if any embedding is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        RuntimeError: a backend asked for by name that cannot run.

    Gradient:
        For any upstream gradient, of queries and candidates, without anything of size Nq x Ng x d or Nq x Ng x n x n.
        Finite where the formulas' own is not: where t lies in the span of C the root of a volume has slope 0; where C
        is singular (singular values at or below eps32·σ₁; √(n·eps64)·σ₁ in float64) a volume is 0 and has no slope;
        ties of λ₁ take one of their vectors. ``cosine`` has that of ``dominant_singular_triplet``. Absent modalities
        get exact zeros, and their buffers are never read. Those of ``sine`` and ``cosine`` with respect to candidates
        whose modalities are nearly equal are large, since the span and u₁ turn with little; the others' are bounded.

    Degenerate candidates:
        One without modalities has volume, ``sine`` and ``sigma`` ‖t‖, ``volume2``, ``lambda`` and ``gain`` ‖t‖², and
        ``cosine`` and ``mip`` 0. A zero vector that is present makes volumes 0. NaN or Inf stays within its pairs.

    Source: GRAM (arXiv 2412.11959), TRIANGLE, PMRL (arXiv 2507.17343), Symile (arXiv 2411.01053); docs/mathematics.md,
    "Joint scores".

    Example:
        >>> import torch
        >>> t = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> video, audio = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
        >>> joint_scores(t, video, audio, score="volume")
        tensor([[0.],
                [1.]])
        >>> joint_scores(t, video, audio)
        tensor([[1.],
                [0.]])
    """
    score = inputs.one_of(score, "score", NAMES)
    batch = inputs.canonical(candidates, mask)
    query = inputs.query(query, batch)
    normalize = inputs.flag(normalize, "normalize")
    dtype = torch.float64 if torch.float64 in (query.dtype, batch.dtype) else torch.float32
    if score in SCORES:
        index = SCORES.index(score)
        if index == AREA2 and (batch.k != 2 or batch.mask is not None):
            got = f"{batch.k} modalities" if batch.k != 2 else "a mask"
            raise ValueError(f"score: got 'area2' with {got}, wanted it with two modalities that are all there")
        pair = resolve(JOINT, backend, batch.device, dtype, batch.k + 1, batch.d)
        return function.apply(Joint(pair, index, normalize), (batch.mask, query, *batch.tensors))[0]

    def parts(tensors: tuple[Tensor, ...], present: Tensor | None, k: int, wanted: int) -> tuple[Tensor, ...]:
        pair = resolve(SPECTRAL, backend, batch.device, batch.dtype, k, batch.d)
        return function.apply(Spectral(pair, wanted, False, normalize), (present, None, *tensors))

    (t,) = parts((query,), None, 1, Z)
    if score == "cosine":
        (found,) = parts(batch.tensors, batch.mask, batch.k, U)
    else:
        zs = parts(batch.tensors, batch.mask, batch.k, Z)
        if batch.mask is not None:
            zs = tuple(torch.where(there[:, None], z, 1.0) for there, z in zip(batch.mask.unbind(1), zs, strict=True))
        found = torch.stack(zs).prod(0)
        if batch.mask is not None:
            found = torch.where(batch.mask.any(1, keepdim=True), found, 0.0)
    return t.to(dtype) @ found.to(dtype).T
