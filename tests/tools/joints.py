"""Arguments of the operators of joint scores, for opcheck on every backend that has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pmrl_kernels.ops.joint import spec
from tests.tools.scalars import modalities, some_mask


def data(k: int, B: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach() for x in modalities(k, B, d, dtype)]


def samples(ops: Any) -> dict[str, Callable[[], Iterator[tuple[Any, ...]]]]:
    """By operator's name, what makes its arguments; backward ones come from a forward call of ``ops``."""

    def forward() -> Iterator[tuple[Any, ...]]:
        for score, name in enumerate(spec.SCORES):
            x, *candidates = data(3, 5, 7, torch.bfloat16 if name == "gain" else torch.float64)
            mask = None if name == "area2" else some_mask(5, 2)
            yield x[:4], candidates, mask, score, True
            yield x[:4], [torch.stack(candidates, 1)], None, score, False

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
