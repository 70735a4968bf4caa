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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..function import Tensors
from ..operators import Op, Pair

SCORES = ("volume", "volume2", "sine", "sigma", "lambda", "gain", "area2")
VOLUME, VOLUME2, SINE, SIGMA, LAMBDA, GAIN, AREA2 = range(7)
DOT = 7
"""Of a contrast alone: t · c of candidates with one vector c, as it comes."""

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


def _contrast_backward_shapes(query: Tensor, candidates: Sequence[Tensor], *arguments: Any) -> Any:
    first, last, begin, end = arguments[2]
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
process has the losses of queries [first, last) and of candidates [begin, end).

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
