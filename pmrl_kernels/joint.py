"""Joint scores: how well a query goes with a whole candidate of several modalities, for every pair of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from . import inputs
from .inputs import Batch, Embeddings, Mask
from .ops import function, resolve
from .ops.joint.spec import DOT, JOINT, JOINT_CONTRAST, NAMES, SCORES, Joint, JointContrast, Product
from .ops.reference import read_mask
from .ops.spectral.spec import SPECTRAL, Spectral, U, Z

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        NotImplementedError: a second derivative, forward mode or ``vmap``.

    Gradient:
        For any upstream gradient, of queries and candidates, without anything of size Nq x Ng x d or Nq x Ng x n x n.
        Finite where the formulas' own is not: where t lies in the span of C the root of a volume has slope 0; where C
        is singular (singular values at or below eps32·σ₁; √(n·eps64)·σ₁ in float64) a volume is 0 and has no slope;
        ties of λ₁ take one of their vectors. ``cosine`` has that of ``dominant_singular_triplet``. Absent modalities
        get exact zeros, and their buffers are never read. Those of ``sine`` and ``cosine`` with respect to candidates
        whose modalities are nearly equal are large, since the span and u₁ turn with little; the others' are bounded.

    Degenerate queries and candidates:
        A query of zeros has ``sine`` and volumes 0, which no other can beat, and ``gain``, ``cosine`` and ``mip`` 0; a
        mask is of candidates alone, so leave out rows whose query is missing. A candidate without modalities has
        volume, ``sine`` and ``sigma`` ‖t‖, ``volume2``, ``lambda`` and ``gain`` ‖t‖², and ``cosine`` and ``mip`` 0. A
        zero vector that is present makes volumes 0. NaN or Inf stays within its pairs.

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
    batch = inputs.canonical(candidates, mask, "candidates")
    query = inputs.query(query, batch)
    normalize = inputs.flag(normalize, "normalize")
    _check_area(score, batch)
    if score in SCORES:
        pair = resolve(JOINT, backend, batch.device, _dtype(query, batch), batch.k + 1, batch.d)
        call = Joint(pair, SCORES.index(score), normalize)
        return function.apply(call, (batch.mask, query, *batch.tensors))[0]
    dtype = _dtype(query, batch)
    (t,) = _spectral(batch, (query,), None, Z, normalize, backend, dtype)
    vector = _vector(batch, score, normalize, backend, dtype)
    return function.apply(Product(), (t.to(vector.dtype), vector))[0].to(dtype)


def _dtype(query: Tensor, batch: Batch) -> torch.dtype:
    return torch.float64 if torch.float64 in (query.dtype, batch.dtype) else torch.float32


def _check_area(score: str, batch: Batch) -> None:
    if score == "area2" and (batch.k != 2 or batch.mask is not None):
        name, got, wanted = ("mask", "one", "none") if batch.k == 2 else ("candidates", f"{batch.k} modalities", "2")
        raise ValueError(f"{name}: got {got}, wanted {wanted}: score='area2' is of two modalities that are all there")


def _spectral(
    batch: Batch,
    tensors: tuple[Tensor, ...],
    present: Tensor | None,
    wanted: int,
    normalize: bool,
    backend: str | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Vectors of this dtype, float64 or float32: a query and candidates have the thresholds of the wider of them."""
    if dtype == torch.float64:
        tensors = tuple(x.to(dtype) for x in tensors)
    k = tensors[0].shape[1] if tensors[0].dim() == 3 else len(tensors)
    pair = resolve(SPECTRAL, backend, batch.device, dtype, k, batch.d)
    return function.apply(Spectral(pair, wanted, False, normalize), (present, None, *tensors))


def _vector(batch: Batch, score: str, normalize: bool, backend: str | None, dtype: torch.dtype) -> Tensor:
    """What ``cosine`` and ``mip`` multiply a query by: one vector for each candidate, (Ng, d); 0 where it has none. In
    this dtype; or in float64, as products are of any numbers, which float32 may not hold."""
    if score == "cosine":
        (found,) = _spectral(batch, batch.tensors, batch.mask, U, normalize, backend, dtype)
    else:
        dtype = dtype if normalize else torch.float64
        zs = _spectral(batch, batch.tensors, batch.mask, Z, normalize, backend, dtype)
        mask = None if batch.mask is None else read_mask(batch.mask)
        if mask is not None:
            zs = tuple(torch.where(there[:, None], z, 1.0) for there, z in zip(mask.unbind(1), zs, strict=True))
        # One by one: the gradient of prod() divides by factors, and where all of them make next to nothing is off.
        found = functools.reduce(torch.mul, zs)
        if mask is not None:
            found = torch.where(mask.any(1, keepdim=True), found, 0.0)
    return found


def joint_contrastive_loss(
    query: Tensor,
    *candidates: Embeddings,
    score: str = "gain",
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.0,
    positives: Tensor | None = None,
    mask: Mask | None = None,
    normalize: bool = True,
    half_gradient: bool = False,
    group: ProcessGroup | Literal["world"] | None = None,
    local_sizes: Sequence[int] | Sequence[tuple[int, int]] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Contrast of queries with whole candidates: each must find its own among all others, and be found by it.

    With :math:`s_{ij} = \pm S_{ij} / \tau`, S the :func:`joint_scores` and minus where the smallest is best, it is

    .. math:: \tfrac12 [\mathrm{CE}(s, p) + \mathrm{CE}(s^\top, p^{-1})],

    the cross-entropy of each row with its candidate p(i), and of each column with its queries P(j): where there are
    several, as with several captions of one clip, :math:`-\log (\sum_{i \in P} e^{s_{ij}} / \sum_i e^{s_{ij}})`. With
    label smoothing ε, as in ``torch.nn.functional.cross_entropy``, a row's loss grows by ε (s⁺ − mean s), s⁺ the logit
    of its positive, or the logsumexp of these.

    The matrix of scores is never held: memory is O(Nq + Ng) beside what the embeddings take.

    Args:
        query: (Nq, d); float32, bfloat16, float16 or float64.
        candidates, mask, normalize: as in :func:`joint_scores`.
        score: one of those of :func:`joint_scores`.
        temperature: τ > 0 in the unit of the scores, a float or a 0-d tensor, as in
            :func:`~pmrl_kernels.instance_contrastive_loss`. What suits one score does not suit another: for unit
            vectors ``gain`` spans [0, 1] whatever k is, ``cosine`` [−1, 1], ``sigma`` [√n, √(n + 1)] of candidates
            that agree.
        label_smoothing: ε in [0, 1].
        positives: int64 (Nq,), the candidate of each query; None: its own number, and Nq = Ng. A query with a negative
            number has no candidate here: candidates must not choose it. A candidate without queries is one that
            queries must not choose. (Numbers of Ng and more raise on a CPU; elsewhere, where looking would stall, they
            count as negative.)
        half_gradient: leave out the gradient that queries have by the candidates' choices, and candidates by the
            queries'. That is how a loss learns whose other side is gathered without a gradient, as GRAM's and
            TRIANGLE's are; it is no gradient of this loss.
        group: processes whose batches together are the batch, as in :func:`~pmrl_kernels.pmrl_loss`; ``positives``
            count this process's candidates.
        local_sizes: as there; with ``positives`` pairs, the queries and the candidates of each process.
        backend: "native" (CPUs), "cuda" or "triton" (GPUs), or "reference"; None takes the fastest that works.

    Returns:
        A 0-d tensor, float32 (float64 if any embedding is float64): half the mean over rows that have a positive plus
        half the mean over columns that have one; a mean over none is 0.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as in :func:`joint_scores` and
            :func:`~pmrl_kernels.pmrl_loss`.

    Gradient:
        Exact (unless halved), of queries, candidates and temperature; degenerate pairs as in :func:`joint_scores`. A
        candidate without modalities leaves the contrast with its queries, as row and column, and all get exact zeros.
        A NaN in one that takes part makes the loss and everyone's gradient NaN, since it mixes them; so does a
        temperature tensor that is not a positive normal number of float32.

    Source: GRAM (arXiv 2412.11959), section 3; docs/mathematics.md, "Joint scores".

    Example:
        >>> import torch
        >>> text, video, audio = (torch.eye(3) for _ in range(3))
        >>> joint_contrastive_loss(text, video, audio, temperature=0.5)  # log(1 + 2 exp(-2))
        tensor(0.2395)
        >>> joint_contrastive_loss(text[[0, 0, 1, 2]], video, audio, positives=torch.tensor([0, 0, 1, 2])) < 1e-5
        tensor(True)
    """
    score = inputs.one_of(score, "score", NAMES)
    batch = inputs.canonical(candidates, mask, "candidates")
    query = inputs.query(query, batch)
    tau, fixed = inputs.temperature(temperature, "temperature", batch.device, contrast=True)
    smoothing = inputs.smoothing(label_smoothing)
    numbers = inputs.positives(positives, query.shape[0], batch)
    normalize = inputs.flag(normalize, "normalize")
    half = inputs.flag(half_gradient, "half_gradient")
    _check_area(score, batch)
    dtype = wide = _dtype(query, batch)
    k = batch.k + 1
    if score in SCORES:
        index, present, tensors = SCORES.index(score), batch.mask, batch.tensors
    else:
        k, index, tensors = 2, DOT, (_vector(batch, score, normalize, backend, dtype),)
        present = None if batch.mask is None else read_mask(batch.mask).any(1, keepdim=True)
        wide = tensors[0].dtype
    spread = inputs.spread_pairs(
        group, local_sizes, query.shape[0], batch._replace(dtype=wide), score, numbers is not None
    )
    queries, gallery = spread or (None, None)
    pair = resolve(JOINT_CONTRAST, backend, batch.device, wide, k, batch.d)
    call = JointContrast(pair, index, normalize, smoothing, fixed, half, queries, gallery)
    return function.apply(call, (present, numbers, tau, query, *tensors))[0].to(dtype)


def gram_loss(
    query: Tensor,
    *candidates: Embeddings,
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.1,
    positives: Tensor | None = None,
    mask: Mask | None = None,
    half_gradient: bool = False,
    group: ProcessGroup | Literal["world"] | None = None,
    local_sizes: Sequence[int] | Sequence[tuple[int, int]] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""GRAM's contrast: :func:`joint_contrastive_loss` of the volume spanned by a text and a candidate.

    :math:`s_{ij} = -\sqrt{\det G_{ij}} / \tau` of unit vectors, with τ = 0.07 and label smoothing of 0.1 as published.
    Their code computes (N, N, k, k) determinants twice, takes the root of their size, and has NaN for a gradient where
    text and candidate agree; here it is n products, and 0 there. ``half_gradient=True`` is the gradient that their
    code follows.

    Args, Returns, Raises, Gradient: as in :func:`joint_contrastive_loss`, without ``score`` and ``normalize``.

    Source: GRAM (arXiv 2412.11959), section 3; docs/joint-scores.md has a migration guide.

    Example:
        >>> import torch
        >>> text, video, audio = torch.eye(4)[[0, 1]], torch.eye(4)[[0, 1]], torch.eye(4)[[2, 3]]
        >>> gram_loss(text, video, audio, temperature=1.0, label_smoothing=0.0)  # log(1 + exp(-1))
        tensor(0.3133)
    """
    return joint_contrastive_loss(
        query,
        *candidates,
        score="volume",
        temperature=temperature,
        label_smoothing=label_smoothing,
        positives=positives,
        mask=mask,
        half_gradient=half_gradient,
        group=group,
        local_sizes=local_sizes,
        backend=backend,
    )


def triangle_loss(
    query: Tensor,
    *candidates: Embeddings,
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.1,
    positives: Tensor | None = None,
    half_gradient: bool = False,
    group: ProcessGroup | Literal["world"] | None = None,
    local_sizes: Sequence[int] | Sequence[tuple[int, int]] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""TRIANGLE's contrast: :func:`joint_contrastive_loss` of the triangle of a text and two modalities.

    :math:`s_{ij} = -2\,\mathrm{area}^2 / \tau` of unit vectors, the number that their code calls the area, with
    τ = 0.07 and label smoothing of 0.1 as published. Their code holds (N, N, d) differences; here it is two products.
    ``half_gradient=True`` is the gradient that their code follows.

    Args, Returns, Raises, Gradient: as in :func:`joint_contrastive_loss`, without ``score`` and ``normalize``;
    candidates have two modalities, and no mask.

    Source: TRIANGLE, https://github.com/ispamm/TRIANGLE; docs/joint-scores.md has a migration guide.

    Example:
        >>> import torch
        >>> text, video, audio = torch.eye(4)[[0, 1]], torch.eye(4)[[0, 1]], torch.eye(4)[[2, 3]]
        >>> triangle_loss(text, video, audio, temperature=1.0, label_smoothing=0.0)  # log(1 + exp(-1.5))
        tensor(0.2014)
    """
    return joint_contrastive_loss(
        query,
        *candidates,
        score="area2",
        temperature=temperature,
        label_smoothing=label_smoothing,
        positives=positives,
        half_gradient=half_gradient,
        group=group,
        local_sizes=local_sizes,
        backend=backend,
    )
