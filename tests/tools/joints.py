"""Arguments of the operators of joint scores, for opcheck on every backend that has its own; and hard spectra."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pmrl_kernels.ops.joint import spec
from tests.tools.scalars import modalities, some_mask

# Pairs whose largest eigenvalue takes most steps, by a search over millions: β, μ of the candidate, q of the query.
SLOW_ROOTS = {
    4: (
        0.187880233,
        (1.00913215, 1.00867224, 0.980511427, 0.723192334),
        (0.000693369249, 0.00978869479, 0.15167512, 0.405929297),
    ),
    5: (
        1.0,
        (1.45169854, 1.45169806, 1.45169592, 1.44860291, 1.42525363),
        (1.96756082e-06, 0.000253363833, 0.000721983728, 0.0282989386, 0.0871411636),
    ),
    7: (
        1.0,
        (2.33811378, 2.33811188, 2.33797669, 2.33708143, 2.08092356, 2.04096031, 1.33074939),
        (3.56185104e-09, 0.000144103542, 0.00234540063, 0.000387064327, 0.000758224749, 0.415014565, 0.909811318),
    ),
}


def slow_root(n: int) -> tuple[Tensor, Tensor]:
    """Query (1, n + 1) and candidate (1, n, n + 1) of ``SLOW_ROOTS[n]``."""
    beta, mu, q = SLOW_ROOTS[n]
    C = torch.diag_embed(torch.tensor(mu, dtype=torch.float64).sqrt())
    t = torch.tensor([*q, 0.0], dtype=torch.float64)
    t[n] = (beta - t @ t).clamp_min(0.0).sqrt()
    return t[None].float(), torch.nn.functional.pad(C, (0, 1))[None].float()


def data(k: int, B: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach() for x in modalities(k, B, d, dtype)]


def transposed(x: Tensor) -> Tensor:
    """The same numbers, its first dimension innermost in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def samples(ops: Any) -> dict[str, Callable[[], Iterator[tuple[Any, ...]]]]:
    """By operator's name, what makes its arguments; backward ones come from a forward call of ``ops``."""

    def forward() -> Iterator[tuple[Any, ...]]:
        for score, name in enumerate(spec.SCORES):
            x, *candidates = data(3, 5, 7, torch.bfloat16 if name == "gain" else torch.float64)
            mask = None if name == "area2" else some_mask(5, 2)
            yield x[:4], candidates, mask, score, True
            yield x[:4], [torch.stack(candidates, 1)], None, score, False
            yield transposed(x[:4]), [transposed(c) for c in candidates], None, score, True

    def backward() -> Iterator[tuple[Any, ...]]:
        for sample in forward():
            scores, state = ops.joint_forward(*sample)
            needed = [True] * (1 + len(sample[1]))
            yield *sample, state, torch.ones_like(scores), needed
            yield *sample, state, torch.ones_like(scores), [False, *needed[1:]]

    def contrast_forward() -> Iterator[tuple[Any, ...]]:
        tau = torch.tensor(0.3)
        for score in (spec.VOLUME, spec.GAIN, spec.AREA2, spec.DOT):
            x, *candidates = data({spec.DOT: 2}.get(score, 3), 5, 7, torch.float32 if score % 2 else torch.float64)
            n = len(candidates)
            mask = None if score == spec.AREA2 else some_mask(5, n)
            positives = torch.tensor([0, 3, 3, -1])
            yield x[:4], candidates, mask, positives, [0, 4, 0, 5], score, True, 0.1, tau, 1.0
            yield x, [torch.stack(candidates, 1)], None, None, [1, 3, 2, 5], score, False, 0.0, None, 0.3
            yield transposed(x), [transposed(torch.stack(candidates, 1))], None, None, [], score, True, 0.0, None, 0.3

    def contrast_backward() -> Iterator[tuple[Any, ...]]:
        for sample in contrast_forward():
            query, candidates, mask, positives, _, *options = sample
            everyone = [0, len(query), 0, len(candidates[0])]
            _, rows, columns, state = ops.joint_contrast_forward(query, candidates, mask, positives, everyone, *options)
            needed = [True] * (1 + len(candidates))
            yield *sample, rows, columns, state, torch.ones(()), False, needed
            yield *sample, rows, columns, state, torch.ones(()), True, [False, *needed[1:]]

    return {
        "joint_forward": forward,
        "joint_backward": backward,
        "joint_contrast_forward": contrast_forward,
        "joint_contrast_backward": contrast_backward,
    }
