"""Joint scores of the compiled library (csrc/cpu/joint.cpp): the shapes of what its forward operators return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import spec


def _forward_shapes(
    query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, score: int, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    scores, n = spec.scores_like(query, candidates), len(spec.modalities(candidates))
    return scores, [query.new_empty((scores.shape[1], n + n * n), dtype=torch.float64)]


def _contrast_forward_shapes(
    query: Tensor,
    candidates: Sequence[Tensor],
    mask: Tensor | None,
    positives: Tensor | None,
    own: Sequence[int],
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    scores, state = _forward_shapes(query, candidates, mask, 0, True)
    first, last, begin, end = spec.own_rows(own, query, candidates)
    rows, columns = (query.new_empty(n, dtype=torch.float64) for n in (last - first, end - begin))
    return scores.new_empty(()), rows, columns, state


PAIRS = {
    spec.JOINT.name: native.pair(spec.JOINT, _forward_shapes),
    spec.JOINT_CONTRAST.name: native.pair(spec.JOINT_CONTRAST, _contrast_forward_shapes),
}
