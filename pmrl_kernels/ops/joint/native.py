"""Joint scores of the compiled library (csrc/cpu/joint.cpp): the shapes of what its forward operators return."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from . import spec


def _forward_shapes(
    query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, score: int, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    scores, n = spec.scores_like(query, candidates), len(spec.modalities(candidates))
    return scores, [query.new_empty((scores.shape[1], n + n * n), dtype=torch.float64)]


PAIRS = {spec.JOINT.name: native.pair(spec.JOINT, _forward_shapes)}
