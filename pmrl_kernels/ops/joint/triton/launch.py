"""From tensors to a launch: the reference decomposes candidates, in float64; the kernel has all that is of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...triton import runtime
from ...triton.runtime import Launch
from .. import reference, spec
from .kernels import Candidates, Queries, scores_kernel


def forward(
    query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, score: int, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    """As the reference's, with the same state."""
    if query.device.type == "cuda" and query.device.index != torch.cuda.current_device():
        with torch.cuda.device(query.device):
            return forward(query, candidates, mask, score, normalize)
    with torch.autocast(query.device.type, enabled=False):
        scores = spec.scores_like(query, candidates)
        read = reference.read_arguments(query, candidates, mask, score, normalize)
        state = read.decomposed(score)
        Nq, Ng = scores.shape
        if Nq and Ng:
            runtime.run(all_pairs(read, state, score, scores))
        return scores, state


def precision() -> str:
    """Of products of float32: on tensor cores, from three products of parts with eleven bits; AMD's cards have no such
    parts, and an interpreter needs none."""
    return "ieee" if torch.version.hip is not None or runtime.INTERPRETED else "tf32x3"


def all_pairs(read: reference.Read, state: Sequence[Tensor], score: int, scores: Tensor) -> Launch:
    """The launch of the kernel for all pairs."""
    (Nq, Ng), (n, d) = scores.shape, read.C.shape[1:]
    pairs = read.pairs(score, state)
    wide, numbers = pairs.planes()
    t = read.t.z.contiguous()
    queries = Queries(t.float(), t, (t * t).sum(1))
    rows, columns, block, warps = 64, 32, 32, 8
    if runtime.INTERPRETED:
        rows, columns, block = 64, 64, 256
    tiles, steps = -(-Ng // columns), 4 if n <= 3 else 5 if n == 4 else 6
    multiple = 4 if d % 4 == 0 else 1
    arguments = (queries, Candidates(wide.float(), wide, numbers), scores, d, Nq, Ng, tiles)
    parameters = (n, score, steps, rows, columns, block, precision())
    return Launch(scores_kernel, -(-Nq // rows) * tiles, warps, arguments, parameters, (1, 1, 1, multiple, 1, 1, 1))
