"""Arguments of the contrast operators, for opcheck on every backend that has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


def rows(count: int, B: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.nn.functional.normalize(torch.randn(B, d, dtype=dtype), dim=1) for _ in range(count)]


def everyone(parts: list[Tensor]) -> list[Tensor]:
    """Those of all processes: others have one row before these and three after."""
    return [torch.cat([x.new_ones(1, x.shape[1]), x, x.new_ones(3, x.shape[1])]) for x in parts]


def samples(ops: Any) -> dict[str, Callable[[], Iterator[tuple[Any, ...]]]]:
    """By operator's name, what makes its arguments; backward ones come from a forward call of ``ops``."""

    def instance() -> Iterator[tuple[Any, ...]]:
        for dtype in DTYPES:
            (u,) = rows(1, 4, 6, dtype)
            yield u, None, 0, None, 0.5
            yield u * torch.tensor([1, 0, 1, 1])[:, None], None, 0, torch.tensor(0.5), 1.0
            yield u, *everyone([u]), 1, torch.tensor(0.5), 1.0
            yield u[:0], *everyone([u]), 2, None, 0.5
        yield torch.randn(0, 6), None, 0, None, 0.5
        yield torch.randn(1, 6), None, 0, None, 0.5

    def instance_backward() -> Iterator[tuple[Any, ...]]:
        for sample in instance():
            loss, losses, state = ops.instance_forward(*sample)
            if sample[1] is not None:
                losses = losses.new_ones(sample[1].shape[:1])
            yield *sample, losses, state, torch.ones_like(loss)

    def modality() -> Iterator[tuple[Any, ...]]:
        for dtype in DTYPES:
            u, *z = rows(4, 4, 6, dtype)
            mask, all_masks = torch.rand(4, 3) < 0.7, torch.rand(8, 3) < 0.7
            columns = everyone([u, *z])
            yield z, u, None, [], None, 0, False, None, 0.5
            yield z, u, mask, [], None, 0, False, torch.tensor(0.5), 1.0
            yield z[:1], z[0], mask[:, :1], [], None, 0, True, torch.tensor(0.5), 1.0
            yield z, u, mask, columns, all_masks, 1, False, torch.tensor(0.5), 1.0
            yield [x[:0] for x in z], u[:0], None, columns, None, 2, False, None, 0.5
        u, *z = rows(3, 0, 6, torch.float32)
        yield z, u, None, [], None, 0, False, None, 0.5

    def modality_backward() -> Iterator[tuple[Any, ...]]:
        for sample in modality():
            loss, losses, state = ops.modality_forward(*sample)
            if sample[3]:
                losses = losses.new_ones((2, len(sample[0]), len(sample[3][0])))
            yield *sample, losses, state, torch.ones_like(loss)

    return {
        "instance_forward": instance,
        "instance_backward": instance_backward,
        "modality_forward": modality,
        "modality_backward": modality_backward,
    }
