"""The op family of joint scores: how well a query goes with a whole candidate, of every pair of them.

A query is one embedding t (d), a candidate has n further modalities C (n, d). With the k x k Gram matrix G of [t, C],
k = n + 1, and K that of C alone:

    volume    √det G                     sine      √(det G / det K), the distance of t from the span of C
    volume2   det G                      sigma     σ₁ = √λ₁(G)
    lambda    λ₁(G)                      gain      λ₁(G) − λ₁(K)
    area2     2·area² of the triangle t, c₁, c₂ (k = 3)

Only C t depends on the pair, so n matrix products are all that is quadratic. The mathematics is in ``reference.py``.

Two ops: ``joint`` is the matrix of scores, ``joint_contrast`` the cross-entropy over it in both directions, which never
holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..function import Tensors
from ..operators import Op, Pair
from ..reference import read_mask

if TYPE_CHECKING:
    from ...distributed import Group

SCORES = ("volume", "volume2", "sine", "sigma", "lambda", "gain", "area2")
VOLUME, VOLUME2, SINE, SIGMA, LAMBDA, GAIN, AREA2 = range(7)
NAMES = (*SCORES, "cosine", "mip")
"""All that have a name in public: the last two are products of vectors, t · c."""

DOT = 7
"""Of a contrast alone: t · c of candidates with one vector c as it comes; ``normalize`` is of the queries."""

SIGNS = (-1, -1, -1, 1, 1, 1, -1, 1)
"""Of each score: 1 where the largest is best, -1 where the smallest is."""


def modalities(candidates: Sequence[Tensor]) -> list[Tensor]:
    """The n tensors (Ng, d), whether they came one by one or as one (Ng, n, d) stack."""
    return list(candidates[0].unbind(1)) if candidates[0].dim() == 3 else list(candidates)


def output_dtype(query: Tensor, candidates: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 if any of them is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in (query, *candidates)) else torch.float32


def scores_like(query: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """An empty (Nq, Ng)."""
    shape = query.shape[0], candidates[0].shape[0]
    return query.new_empty(shape, dtype=output_dtype(query, candidates))


def _backward_shapes(query: Tensor, candidates: Sequence[Tensor], *arguments: Any) -> Any:
    needed = arguments[-1]
    return [x.new_empty(x.shape if want else (0,)) for x, want in zip((query, *candidates), needed, strict=True)]


_ARGUMENTS = "Tensor query, Tensor[] candidates, Tensor? mask, int score, bool normalize"

JOINT = Op(
    "joint",
    f"({_ARGUMENTS}) -> (Tensor, Tensor[])",
    f"({_ARGUMENTS}, Tensor[] state, Tensor grad, bool[] needed) -> Tensor[]",
    _backward_shapes,
)
"""``candidates`` are n tensors (Ng, d) or one (Ng, n, d), ``mask`` (Ng, n) says which modalities there are, ``score``
is an index of ``SCORES``. Forward: scores (Nq, Ng) and a state. Backward: from their gradient those of the query and
of the candidates, in their layouts and dtypes, empty where not needed."""


def own_rows(own: Sequence[int], query: Tensor, candidates: Sequence[Tensor]) -> Sequence[int]:
    """(first, last, begin, end) of what an operator of ``JOINT_CONTRAST`` is told."""
    return own or (0, query.shape[0], 0, candidates[0].shape[0])


def _contrast_backward_shapes(query: Tensor, candidates: Sequence[Tensor], *arguments: Any) -> Any:
    first, last, begin, end = own_rows(arguments[2], query, candidates)
    needed = arguments[-1]
    rows = [last - first] + [end - begin] * len(candidates)
    found = [
        x.new_empty((n, *x.shape[1:]) if want else (0,))
        for x, n, want in zip((query, *candidates), rows, needed, strict=True)
    ]
    return [*found, query.new_empty((), dtype=torch.float64)]


_CONTRASTED = (
    "Tensor query, Tensor[] candidates, Tensor? mask, Tensor? positives, int[] own, int score, bool normalize, "
    "float smoothing, Tensor? temperature, float fixed_temperature"
)

JOINT_CONTRAST = Op(
    "joint_contrast",
    f"({_CONTRASTED}) -> (Tensor, Tensor, Tensor, Tensor[])",
    f"({_CONTRASTED}, Tensor row_losses, Tensor column_losses, Tensor[] state, Tensor grad, bool half, bool[] needed)"
    " -> Tensor[]",
    _contrast_backward_shapes,
)
"""``query``, ``candidates`` and ``mask`` as in ``JOINT``, of everyone; ``own`` = (first, last, begin, end): this
process has the losses of queries [first, last) and of candidates [begin, end). Empty: of all, whose number a compiled
graph need not know then.

``positives`` (Nq,), int64, is each query's candidate; None is its own number, Nq = Ng then. Negative ones (or such as
there are not): the query has none. A candidate without modalities leaves with its queries. The others may be chosen,
and have a loss if they have a positive.

Forward: the own part of the loss (0-d), half the mean of the rows' and half that of the columns'; the own rows'
losses and the own columns' (float64; without smoothing, 0 where there is none); a state. Backward, from everyone's
losses: the gradients of the own queries and own candidates, empty where not needed, and of the temperature (0-d
float64). ``half``: those of queries by the rows' losses alone, of candidates by the columns'."""


class Joint(NamedTuple):
    """A call of the op on (mask, query, *candidates), see ``function.py``."""

    pair: Pair
    score: int
    normalize: bool

    def forward(self, tensors: Tensors) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        mask, query, *candidates = tensors
        scores, state = self.pair.forward(query, candidates, mask, self.score, self.normalize)
        return (scores,), state

    def backward(self, tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, needed: Sequence[bool]) -> Tensors:
        mask, query, *candidates = tensors
        (grad,) = grads
        if grad is None:
            return (None,) * len(tensors)
        wanted = list(needed[1:])
        found = self.pair.backward(query, candidates, mask, self.score, self.normalize, saved, grad, wanted)
        return (None, *(x if want else None for x, want in zip(found, wanted, strict=True)))

    def outputs(self, tensors: Tensors) -> int:
        return 1


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The meta device has no autocast, and takes no word about it."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Product(NamedTuple):
    """A call on (t, c), see ``function.py``: t cᵀ (Nq, Ng) of t (Nq, d) and c (Ng, d), by PyTorch; under autocast in
    their dtype, gradients too."""

    def forward(self, tensors: Tensors) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        t, c = tensors
        with _without_autocast(t):
            return (t @ c.T,), ()

    def backward(self, tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, needed: Sequence[bool]) -> Tensors:
        t, c = tensors
        (grad,) = grads
        if grad is None:
            return (None, None)
        with _without_autocast(t):
            return (grad @ c if needed[0] else None, grad.T @ t if needed[1] else None)

    def outputs(self, tensors: Tensors) -> int:
        return 1


class JointContrast(NamedTuple):
    """A call of the op ``joint_contrast`` on (mask, positives, temperature, query, *candidates), see ``function.py``.

    Of a batch over several processes every one gathers all queries and candidates in its forward pass, and everyone's
    losses; none is left for the backward pass, so nobody can make another one wait for ever by skipping it."""

    pair: Pair
    score: int
    normalize: bool
    smoothing: float
    fixed_temperature: float  # where there is no tensor
    half: bool
    queries: Group | None
    gallery: Group | None  # how the candidates spread over the same processes

    def _arguments(
        self,
        query: Tensor,
        candidates: Sequence[Tensor],
        mask: Tensor | None,
        positives: Tensor | None,
        temperature: Tensor | None,
        sizes: tuple[int, int],
    ) -> tuple[Any, ...]:
        """What both operators take: everyone's tensors, and which of their rows are this process's."""
        own: list[int] = []
        if self.queries is not None and self.gallery is not None:
            first, begin = self.queries.start(), self.gallery.start()
            own = [first, first + sizes[0], begin, begin + sizes[1]]
        options = self.score, self.normalize, self.smoothing, temperature, self.fixed_temperature
        return (query, candidates, mask, positives, own, *options)

    def _everyone(
        self, query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, positives: Tensor | None
    ) -> list[Tensor]:
        """All processes' queries (Nq, d), candidates (Ng, n, d), mask (Ng, n), and positives (Nq,) if there are any."""
        if self.queries is None or self.gallery is None:
            return []
        dtype, xs = output_dtype(query, candidates), modalities(candidates)
        n, d = len(xs), query.shape[1]
        present = query.new_ones((len(xs[0]), n)) if mask is None else read_mask(mask)
        # What is absent is never read, and must not be NaN on the wire either.
        zs = xs if mask is None else [torch.where(present[:, m, None], x, 0.0) for m, x in enumerate(xs)]
        gallery = torch.cat([x.to(dtype) for x in (*zs, present)], 1)
        if positives is None:
            rows = self.queries.gather(torch.cat((query.to(dtype), gallery), 1))
            everyone, gallery = rows[:, :d], rows[:, d:]
        else:
            everyone, gallery = self.queries.gather(query.to(dtype)), self.gallery.gather(gallery)
        found = [everyone, gallery[:, : n * d].unflatten(1, (n, d)), gallery[:, n * d :] != 0]
        if positives is not None:
            known = (positives >= 0) & (positives < len(xs[0]))
            numbers = torch.where(known, positives + self.gallery.start(), -1)
            found.append(self.queries.gather(numbers[:, None])[:, 0])
        return found

    def forward(self, tensors: Tensors) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        mask, positives, temperature, query, *candidates = tensors
        sizes = query.shape[0], candidates[0].shape[0]
        everyone = self._everyone(query, candidates, mask, positives)
        if everyone:
            query, stack, present, *chosen = everyone
            candidates, positives = [stack], chosen[0] if chosen else None
            mask = None if self.score == AREA2 else present  # which is nothing without all of its corners
        arguments = self._arguments(query, candidates, mask, positives, temperature, sizes)
        loss, rows, columns, state = self.pair.forward(*arguments)
        if self.queries is not None and self.gallery is not None:
            loss = loss * len(self.queries.sizes)
            rows, columns = self.queries.gather(rows[:, None])[:, 0], self.gallery.gather(columns[:, None])[:, 0]
        return (loss,), [rows, columns, *everyone, *state]

    def backward(self, tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, needed: Sequence[bool]) -> Tensors:
        mask, positives, temperature, query, *candidates = tensors
        (grad,) = grads
        if grad is None:
            return (None,) * len(tensors)
        rows, columns, *rest = saved
        sizes, wanted, given = (query.shape[0], candidates[0].shape[0]), list(needed[3:]), candidates
        if self.queries is not None:
            grad = grad.double() * len(self.queries.sizes)
            query, stack, present, *rest = rest
            mask = None if self.score == AREA2 else present
            if positives is not None:
                positives, *rest = rest
            candidates, wanted = [stack], [wanted[0], any(wanted[1:])]
        arguments = self._arguments(query, candidates, mask, positives, temperature, sizes)
        *found, slope = self.pair.backward(*arguments, rows, columns, rest, grad, self.half, wanted)
        if self.queries is not None and wanted[1] and given[0].dim() == 2:
            found = [found[0], *found[1].unbind(1)]
        gradients = [
            found[i].to(x.dtype) if want else None
            for i, (x, want) in enumerate(zip((tensors[3], *given), needed[3:], strict=True))
        ]
        return (None, None, slope.to(temperature.dtype) if needed[2] else None, *gradients)

    def outputs(self, tensors: Tensors) -> int:
        return 1
