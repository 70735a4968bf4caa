"""Retrieval by joint scores: ranks, the best candidates and recall, without the matrix of all scores.

Scores of a block of candidates with a block of queries come from the fastest backend, as ``joint_scores`` has them.
They are off by rounding, so they decide only between candidates that differ by more. The others are compared by scores
in float64 that are functions of one query and one candidate alone (``ops/joint/exact.py``), among which copies tie
exactly. What comes out is the order of those.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import inputs
from .inputs import Embeddings, Mask
from .joint import joint_scores
from .ops import constants
from .ops.joint.exact import ExactCandidates, exact_rows
from .ops.joint.spec import NAMES, SCORES, output_dtype
from .ops.reference import read_mask

_QUERIES = 1 << 19  # numbers of the queries of a tile, 4 MiB in float64; backends have a few copies of them
_CANDIDATES = 1 << 18  # and of its candidates
_TILE = 1 << 20  # pairs of a tile, of which there are some 20 bytes each
_BEST = 1 << 18  # numbers of those that are best so far of the queries of a tile, which are sorted with others
_PAIRS = 1 << 20  # numbers of the pairs that are scored one by one at a time, a few copies too


class Retrieved(NamedTuple):
    """What :func:`retrieval_topk` returns."""

    scores: Tensor
    """(Nq, k), best first; NaN where a candidate has none."""
    indices: Tensor
    """(Nq, k), int64."""


class Recall(NamedTuple):
    """What :func:`recall_at` returns."""

    recall: dict[int, float]
    """By K, the share of ranks among the first K."""
    median_rank: float
    """1-based; of an even number of ranks the lower one of the two in the middle."""
    mean_rank: float
    """1-based."""


# ------------------------------------------------------------------------------------------------
# How far scores may be off
# ------------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """How a score is compared, and how far a backend's may be from the exact one.

    The latter in eps of its dtype: what rounding is known to do to it (docs/contract.md, "Retrieval"), times four. With
    β = ‖t‖², μ₁ = λ₁(K), n modalities, the least resolved eigenvalue μ_n of K, and e = 1 + n (eps64/eps) μ₁/μ_n, since
    bases of nearly dependent modalities are orthonormal up to that:

        volume², volume2   64 det K β e        lambda, gain   (32 + 4 n)(β + μ₁)
        sine²              64 β e              sigma          16 (√β + √μ₁)
        cosine, mip        64 √β ‖c‖, of the one vector c that a candidate is
        area2              64 ‖g‖(‖g‖ + ‖m‖)(β + ‖m‖²), of the edge g = a − v and its middle m
    """

    sign: int  # 1 where the largest is best
    power: int = 1  # of the score: that of which the error does not depend on how small it is
    root: bool = False  # whether the error grows with √β, not with β


_RULES = {
    "volume": _Rule(-1, 2),
    "volume2": _Rule(-1),
    "sine": _Rule(-1, 2),
    "sigma": _Rule(1, root=True),
    "lambda": _Rule(1),
    "gain": _Rule(1),
    "area2": _Rule(-1),
    "cosine": _Rule(1, root=True),
    "mip": _Rule(1, root=True),
}


def _norms(x: Tensor) -> Tensor:
    """(N,) of x (N, d), whose squares need not be numbers."""
    largest = x.abs().amax(1)
    norms: Tensor = torch.linalg.vector_norm(x / torch.where(largest == 0, 1.0, largest)[:, None], dim=1)
    return largest * norms


class _Margin(NamedTuple):
    """That the rule's power of a score with these candidates is off by at most (size + extra)·first·second·slope, where
    size is β of the query, or √β; each (J,), in float64. As factors, which are multiplied in this order: without the
    first one their product, det K say, may be below float64's least number where the score is not."""

    extra: Tensor
    first: Tensor
    second: Tensor
    slope: Tensor

    def of(self, size: Tensor) -> Tensor:
        """(I, J) of sizes (I,)."""
        found = size[:, None] + self.extra
        for factor in (self.first, self.second, self.slope):
            found *= factor
        return found


def _margin(name: str, of: ExactCandidates, n: int, eps: float, float64_input: bool) -> _Margin:
    """Inf where nothing can be said."""
    if of.vector is not None:
        norms = _norms(of.vector)
        one = torch.ones_like(norms)
        return _Margin(0 * one, norms, one, 64 * eps * one)
    if of.edge is not None:
        g, m2 = of.edge.length, (of.edge.middle * of.edge.middle).sum(1)
        return _Margin(m2, g, g + m2.sqrt(), torch.full_like(g, 64 * eps))
    mu = of.eigenvalues
    mu1 = mu[:, 0].clamp_min(0.0)
    one = torch.ones_like(mu1)
    if name in ("volume", "volume2", "sine"):
        floor = constants.singular_value_floor(n, float64_input) ** 2 * mu1[:, None]
        resolved = mu > floor / 4
        smallest = torch.where(resolved, mu, torch.inf).amin(1)
        slope = 64 * (eps + n * constants.EPS64 * mu1 / smallest)
        volume = one if name == "sine" else of.volumes()
        doubtful = (resolved & (mu < 4 * floor)).any(1)  # rounding decides whether such a μ counts as 0
        volume = volume.masked_fill(doubtful, 1.0)
        return _Margin(0 * one, volume, volume, slope.masked_fill(doubtful, torch.inf))
    if name == "sigma":
        return _Margin(mu1.sqrt(), one, one, 16 * eps * one)
    return _Margin(mu1, one, one, (32 + 4 * n) * eps * one)


# ------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------


class _Scoring:
    """Queries and candidates, and what scores them.

    A *merit* is larger where a score is better: the score, or minus the score. Exact ones are float64, and -Inf where
    there is no score (NaN); fast ones are those of the backend's scores, raised to the rule's power.
    """

    def __init__(
        self,
        query: Tensor,
        candidates: tuple[Embeddings, ...],
        score: str,
        mask: Mask | None,
        normalize: bool,
        backend: str | None,
    ) -> None:
        self.name = inputs.one_of(score, "score", NAMES)
        self.batch = inputs.canonical(candidates, mask, "candidates")
        self.query = inputs.query(query, self.batch)
        self.normalize, self.backend = inputs.flag(normalize, "normalize"), backend
        if self.query.is_meta:
            raise ValueError("query: got device meta, wanted one where scores can be compared")
        self.joint(slice(0, 0), slice(0, 0))  # raises what else there is to refuse
        self.rule = _RULES[self.name]
        self.dtype = output_dtype(self.query, self.batch.tensors)
        self.float64_input = self.dtype == torch.float64
        self.numbers = torch.finfo(self.dtype)

        Nq, d = self.query.shape
        self.height, self.width = max(1, _QUERIES // d), max(1, _CANDIDATES // (d * self.batch.k))
        shrunk = math.sqrt(min(1.0, _TILE / (self.height * self.width)))  # where d is small
        self.height, self.width = max(1, int(self.height * shrunk)), max(1, int(self.width * shrunk))
        size = self.query.new_empty(Nq, dtype=torch.float64)
        self.finite = self.query.new_empty(Nq, dtype=torch.bool)
        """(Nq,): queries that have scores."""
        self.rows = self.query.new_empty((Nq if self.by_product else 0, d), dtype=self._product_dtype())
        for rows in self.query_blocks():
            t = exact_rows(self.query[rows], None, self.normalize)
            size[rows], self.finite[rows] = _norms(t) if self.rule.root else (t * t).sum(1), t.isfinite().all(1)
            if self.by_product:
                self.rows[rows] = t
        self.size = size
        self.there = self.query.new_ones(self.batch.B, dtype=torch.bool)
        """(Ng,): candidates that have modalities."""
        if self.batch.mask is not None:
            self.there = read_mask(self.batch.mask).any(1)

    @property
    def by_product(self) -> bool:
        return self.name not in SCORES

    def _product_dtype(self) -> torch.dtype:
        """What one product of t and c is made in: float64 where PyTorch may round the factors of any other, and of
        numbers that any other may not hold."""
        if not self.normalize:
            return torch.float64
        on_cpus = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        told = torch.backends.cuda.matmul.fp32_precision if self.query.is_cuda else on_cpus
        return self.dtype if told in ("none", "ieee") else torch.float64

    def query_blocks(self) -> Iterator[slice]:
        for i in range(0, len(self.query), self.height):
            yield slice(i, i + self.height)

    def candidate_blocks(self) -> Iterator[slice]:
        for j in range(0, self.batch.B, self.width):
            yield slice(j, j + self.width)

    def joint(self, I: slice, J: slice) -> Tensor:  # noqa: E741
        """What ``joint_scores`` says of a tile."""
        xs, mask = self.batch.tensors, self.batch.mask
        some = None if mask is None else mask[J]
        options = {"score": self.name, "normalize": self.normalize, "backend": self.backend}
        return joint_scores(self.query[I], *(x[J] for x in xs), mask=some, **options)  # type: ignore[arg-type]

    def exact(self, j: slice | Tensor) -> ExactCandidates:
        """The candidates of these numbers."""
        batch = self.batch
        mask = None if batch.mask is None else batch.mask[j]
        score = SCORES.index(self.name) if self.name in SCORES else self.name
        return ExactCandidates([x[j] for x in batch.tensors], mask, score, self.normalize, self.float64_input)

    def exact_scores(self, i: Tensor, of: ExactCandidates, j: Tensor) -> Tensor:
        """Of queries i with candidates number j of those, in float64."""
        chunk = max(1, _PAIRS // (self.batch.d * (self.batch.k + 2)))
        parts = [
            of.scores(exact_rows(self.query[some], None, self.normalize), others)
            for some, others in zip(i.split(chunk), j.split(chunk), strict=True)
        ]
        return torch.cat(parts)

    def positive_scores(self, i: Tensor, j: Tensor) -> Tensor:
        """Of queries i with candidates j, which are decomposed for each of these pairs."""
        parts = []
        for some, others in zip(i.split(self.width), j.split(self.width), strict=True):
            numbers = torch.arange(len(some), device=some.device)
            parts.append(self.exact_scores(some, self.exact(others), numbers))
        return torch.cat(parts)

    def merit(self, scores: Tensor) -> Tensor:
        """Of scores in float64: exact ones are compared by this."""
        return (self.rule.sign * scores).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)

    def powered(self, merit: Tensor) -> Tensor:
        """The rule's power of merits."""
        return merit * merit.abs() if self.rule.power == 2 else merit

    def fast_merits(self, I: slice, J: slice, of: ExactCandidates) -> tuple[Tensor, Tensor]:  # noqa: E741
        """Merits of a tile, and how far they may be off, (I, J) each: Inf where the dtype does not hold a merit."""
        if of.vector is not None:
            found = self.rows[I] @ of.vector.to(self.rows.dtype).T
        else:
            found = self.powered(self.rule.sign * self.joint(I, J))
        known = _margin(self.name, of, self.batch.k, self.numbers.eps, self.float64_input).of(self.size[I])
        offset = 4 * self.batch.d * self.numbers.tiny  # parts below the least number are lost
        margin = known.add_(offset).to(found.dtype)
        lost = ~found.isfinite()
        return found.masked_fill_(lost, 0.0), margin.masked_fill_(lost, math.inf)


# ------------------------------------------------------------------------------------------------
# Ranks
# ------------------------------------------------------------------------------------------------


def retrieval_ranks(
    query: Tensor,
    *candidates: Embeddings,
    score: str = "gain",
    positives: Tensor | None = None,
    mask: Mask | None = None,
    normalize: bool = True,
    direction: str = "query",
    ties: str = "index",
    backend: str | None = None,
) -> Tensor:
    r"""Where the right candidate of every query comes among all candidates: its rank by :func:`joint_scores`.

    :math:`\mathrm{rank}_i = \lvert\{j : s_{ij} \text{ better than } s_{i p_i}\}\rvert` and, by ``ties``, those
    :math:`j` that are as good; :math:`p_i` is the candidate of query i. Better is smaller for ``volume``, ``volume2``,
    ``sine`` and ``area2``, and larger for the others. Ranks are those of a stable sort of scores in float64, to the
    last one, whatever the dtype of the embeddings, and copies of a candidate or of a query have exactly equal scores
    (of float32 scores, rounding decides between copies). There never is a matrix (Nq, Ng): a block of candidates is
    scored with a block of queries by the fastest backend, and what is within rounding of the reference is scored in
    float64, pair by pair.

    Args:
        query, candidates, score, mask, normalize, backend: as in :func:`joint_scores`, all nine scores.
        positives: (Nq,), int64, :math:`p_i`; negative where a query has no candidate in this set. Several queries may
            have the same one. None: query i's is candidate i, Nq = Ng.
        direction: "query", the rank of each query's candidate among all candidates; or "candidate", for each candidate
            the rank of its query among all queries, of its best one where it has several (as published code does for
            several captions a clip).
        ties: how candidates count that are exactly as good as the right one (in direction "candidate", queries):
            "index", those with smaller numbers come before it, as in a stable sort; "optimistic", behind it;
            "pessimistic", before it.

    Returns:
        int64, 0-based: (Nq,), or (Ng,) with ``direction="candidate"``. -1 for a query without a candidate and for a
        candidate without a query. (The former still is one among all queries.)

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; on a CPU an index in
            ``positives`` that is not below Ng. (Elsewhere that would make the host wait, and is as a negative one.)
        RuntimeError: a backend asked for by name that cannot run.

    Without a score:
        A candidate without modalities cannot be found. It comes behind all others for every query, its own queries
        have rank Ng - 1, and it has rank Nq - 1 in direction "candidate". A score that is NaN, since the query or a
        modality that is present is not finite, is worse than any other: it is never counted as better than one, and a
        query whose candidate it is with comes behind all candidates with modalities, a candidate behind all queries.
        Neither depends on ``ties``, so nothing is found for having no score. (A query of zeros has one, and by ``sine``
        and the volumes the best of all: leave out rows whose query is missing.)

    Memory:
        About 20 MiB beside the inputs at d = 512 and k = 3 for any Nq and Ng, and a few numbers for each query and
        each candidate; with ``cosine`` and ``mip`` a normalised copy of the queries too.

    Gradient: none; nothing is recorded.

    Source: retrieval of GRAM (arXiv 2412.11959) and TRIANGLE, which sort the matrix; docs/contract.md, "Retrieval".

    Example:
        >>> import torch
        >>> text, video, audio = torch.eye(3), torch.eye(3), torch.eye(3)
        >>> retrieval_ranks(text, video, audio)
        tensor([0, 0, 0])
        >>> copies = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # of one candidate, which cannot be told apart
        >>> retrieval_ranks(copies, copies), retrieval_ranks(copies, copies, ties="optimistic")
        (tensor([0, 1]), tensor([0, 0]))
    """
    by_query = inputs.one_of(direction, "direction", ("query", "candidate")) == "query"
    ties = inputs.one_of(ties, "ties", ("index", "optimistic", "pessimistic"))
    with torch.no_grad():
        scoring = _Scoring(query, candidates, score, mask, normalize, backend)
    with torch.no_grad(), torch.autocast(scoring.query.device.type, enabled=False):
        Nq, Ng = len(scoring.query), scoring.batch.B
        own = inputs.positives(positives, Nq, scoring.batch)
        own = torch.arange(Nq, device=scoring.query.device) if own is None else own
        positives = torch.where((own >= 0) & (own < Ng), own, -1)
        if Ng == 0:
            return positives.new_full((Nq if by_query else 0,), -1)
        merit, own = _references(scoring, positives, by_query)
        found = torch.zeros_like(own)
        for J in scoring.candidate_blocks():
            of = scoring.exact(J)
            for I in scoring.query_blocks():  # noqa: E741
                _count(scoring, I, J, of, merit, own, by_query, ties, found)
        if by_query:
            last = torch.where(scoring.there[own], scoring.there.sum(), Ng) - 1
        else:
            last = torch.full_like(found, Nq - 1)
        return torch.where(own < 0, -1, torch.where(merit == -math.inf, last, found))


def _references(scoring: _Scoring, positives: Tensor, by_query: bool) -> tuple[Tensor, Tensor]:
    """What others are compared with: the exact merit of each query's positive (or of each candidate's best query), and
    that one's number, -1 if there is none."""
    i = (positives >= 0).nonzero()[:, 0]
    j = positives[i]
    merits = scoring.merit(scoring.positive_scores(i, j)).masked_fill(~scoring.there[j], -math.inf)
    if by_query:
        return scoring.size.new_full(positives.shape, -math.inf).index_copy(0, i, merits), positives
    Ng, Nq = scoring.batch.B, len(positives)
    best = scoring.size.new_full((Ng,), -math.inf).scatter_reduce(0, j, merits, "amax")
    numbers = torch.where(merits == best[j], i, Nq)
    own = positives.new_full((Ng,), Nq).scatter_reduce(0, j, numbers, "amin")
    return best, torch.where(own == Nq, -1, own)


def _count(
    scoring: _Scoring,
    I: slice,  # noqa: E741
    J: slice,
    of: ExactCandidates,
    merit: Tensor,
    own: Tensor,
    by_query: bool,
    ties: str,
    found: Tensor,
) -> None:
    """Adds to ``found`` what a tile has that comes before the references."""
    fast, margin = scoring.fast_merits(I, J, of)
    merits = merit[I, None] if by_query else merit[J]
    usable = scoring.finite[I, None] & (of.finite & of.there) & (merits > -math.inf)
    fast -= scoring.powered(merits).to(fast.dtype)
    held = fast.isfinite()  # the reference's merit may be beyond the dtype
    ahead = usable & (fast > margin) & held
    unclear = usable & ~(held & (fast.abs() > margin))
    del fast, margin, usable, held
    found[I if by_query else J] += ahead.sum(1 if by_query else 0)
    i, j = unclear.nonzero().unbind(1)
    at, other = (i + I.start, j + J.start) if by_query else (j + J.start, i + I.start)
    exact, wanted = scoring.merit(scoring.exact_scores(i + I.start, of, j)), merit[at]
    before = exact > wanted
    if ties != "optimistic":
        before |= (exact == wanted) & (other < own[at] if ties == "index" else other != own[at])
    found.index_add_(0, at, before.long())


# ------------------------------------------------------------------------------------------------
# The best candidates
# ------------------------------------------------------------------------------------------------


def retrieval_topk(
    query: Tensor,
    *candidates: Embeddings,
    k: int,
    score: str = "gain",
    mask: Mask | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Retrieved:
    r"""The k best candidates of every query by :func:`joint_scores`, best first.

    :math:`j_{i1}, \dots, j_{ik}` with the best :math:`s_{ij}`, in the order of scores in float64; of equally good ones
    that with the smaller number comes first. Streaming, and exact in the same way as :func:`retrieval_ranks`.

    Args:
        query, candidates, score, mask, normalize, backend: as in :func:`joint_scores`, all nine scores.
        k: how many, 1 <= k <= Ng, so there must be a candidate. (Not the number of modalities.)

    Returns:
        A :class:`Retrieved` (scores, indices) of (Nq, k) each: scores in float32 (float64 if any embedding is float64),
        as rounded from float64; indices in int64.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`retrieval_ranks`; ValueError for k above Ng.

    Without a score:
        Candidates whose score is NaN come behind all that have one, and behind them those without modalities, each in
        the order of their numbers. The scores that are returned for both are NaN.

    Memory: as :func:`retrieval_ranks`, and the results.

    Gradient: none; nothing is recorded.

    Source: docs/contract.md, "Retrieval".

    Example:
        >>> import torch
        >>> video = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> best = retrieval_topk(torch.tensor([[1.0, 0.0]]), video, k=2, score="cosine")
        >>> best.indices, best.scores
        (tensor([[0, 2]]), tensor([[1.0000, 0.7071]]))
    """
    with torch.no_grad():
        scoring = _Scoring(query, candidates, score, mask, normalize, backend)
    with torch.no_grad(), torch.autocast(scoring.query.device.type, enabled=False):
        Nq, Ng = len(scoring.query), scoring.batch.B
        k = inputs.count(k, "k", Ng)
        scoring.height = min(scoring.height, max(1, _BEST // k))
        merits = scoring.size.new_full((Nq, k), -math.inf)
        indices = torch.full((Nq, k), -1, device=merits.device)
        for J in scoring.candidate_blocks():
            of = scoring.exact(J)
            for I in scoring.query_blocks():  # noqa: E741
                i, j = _contenders(scoring, I, J, of, merits[I, -1], k)
                found = scoring.merit(scoring.exact_scores(i + I.start, of, j))
                merits[I], indices[I] = _merged(merits[I], indices[I], i, j + J.start, found)
        _filled(scoring, merits, indices)
        scores = scoring.rule.sign * merits
        return Retrieved(scores.masked_fill(merits == -math.inf, torch.nan).to(scoring.dtype), indices)


def _contenders(
    scoring: _Scoring,
    I: slice,  # noqa: E741
    J: slice,
    of: ExactCandidates,
    worst: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The pairs of a tile that may be among the best of their queries, whose last ones so far have merits ``worst``."""
    fast, margin = scoring.fast_merits(I, J, of)
    usable = scoring.finite[I, None] & (of.finite & of.there)
    least = scoring.powered(worst).to(fast.dtype).clamp_max(torch.finfo(fast.dtype).max)
    if fast.shape[1] >= k:  # that many are at least as good as the last of the k best lower bounds
        lower = (fast - margin).nan_to_num_(-math.inf, math.inf, -math.inf).masked_fill_(~usable, -math.inf)
        least = torch.maximum(least, lower.topk(k).values[:, -1])
        del lower
    i, j = (usable & ~(fast + margin < least[:, None])).nonzero().unbind(1)
    return i, j


def _merged(merits: Tensor, indices: Tensor, i: Tensor, j: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The k best, best first, of the (I, k) so far and of candidates j of queries i, which come behind equal ones."""
    height, k = merits.shape
    rows = torch.cat([torch.arange(height, device=i.device).repeat_interleave(k), i])
    values, numbers = torch.cat([merits.flatten(), found]), torch.cat([indices.flatten(), j])
    order = values.sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    counts = torch.zeros(height, dtype=torch.int64, device=i.device).index_add_(0, rows, torch.ones_like(rows))
    first = counts.cumsum(0) - counts
    chosen = order[first[:, None] + torch.arange(k, device=i.device)]
    return values[chosen], numbers[chosen]


def _filled(scoring: _Scoring, merits: Tensor, indices: Tensor) -> None:
    """Puts candidates without a score behind those of queries that have fewer than k: NaN, then no modalities."""
    Ng, places = scoring.batch.B, torch.arange(merits.shape[1], device=merits.device)
    lacking = (merits[:, -1] == -math.inf).nonzero()[:, 0]
    for some in lacking.split(max(1, _PAIRS // (Ng + 1))):
        known, scored = indices[some], merits[some] > -math.inf
        kind = torch.zeros((len(some), Ng + 1), dtype=torch.uint8, device=merits.device)
        kind[:, :Ng] = ~scoring.there
        kind.scatter_(1, torch.where(scored, known, Ng), 2)
        others = kind[:, :Ng].argsort(dim=1, stable=True)
        behind = (places - scored.sum(1, keepdim=True)).clamp_min(0)
        indices[some] = torch.where(scored, known, others.gather(1, behind))


# ------------------------------------------------------------------------------------------------
# Recall
# ------------------------------------------------------------------------------------------------


def recall_at(ranks: Tensor, at: Sequence[int] = (1, 5, 10)) -> Recall:
    r"""The figures that retrieval is reported by, from the ranks of :func:`retrieval_ranks`.

    :math:`R@K = \lvert\{i : \mathrm{rank}_i < K\}\rvert / N`, and the median and the mean of rank + 1.

    Args:
        ranks: (N,), int64, 0-based. Negative ones, of queries without a candidate, are left out, and not counted in N.
        at: the K, ints of at least 1.

    Returns:
        A :class:`Recall` (recall, median_rank, mean_rank) of Python floats: ``recall[K]`` between 0 and 1; ranks from 1
        on, and the median that of ``torch.median``, the lower one of the two in the middle. All NaN where N = 0. The
        host waits for them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.

    Source: the ``compute_metrics`` of CLIP4Clip and its successors.

    Example:
        >>> import torch
        >>> recall_at(torch.tensor([0, 3, 7, -1, 20]))
        Recall(recall={1: 0.25, 5: 0.5, 10: 0.75}, median_rank=4.0, mean_rank=8.5)
    """
    ranks = inputs.ranks(ranks)
    if not isinstance(at, Sequence) or isinstance(at, (str, bytes)):
        raise TypeError(f"at: got {type(at).__name__}, wanted a sequence of ints of at least 1")
    wanted = [inputs.count(K, "at") for K in at]
    ranks = ranks[ranks >= 0]
    if len(ranks) == 0:
        return Recall(dict.fromkeys(wanted, math.nan), math.nan, math.nan)
    recall = {K: float((ranks < min(K, sys.maxsize)).double().mean()) for K in wanted}
    return Recall(recall, float(ranks.median()) + 1, float(ranks.double().mean()) + 1)
