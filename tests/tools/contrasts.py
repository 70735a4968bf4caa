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


class Calls:
    """A backend's op by its two oldest uses: of leading vectors, and of embeddings with them. ``any_norm``: the op of
    vectors that need not be unit vectors, which is that of *raw* calls, too."""

    def __init__(self, ops: Any, any_norm: bool = False) -> None:
        self.ops, self.any_norm = ops, any_norm

    def _operator(self, part: str, raw: bool) -> Any:
        return getattr(self.ops, f"paired_of_any_norm_{part}" if raw or self.any_norm else f"paired_{part}")

    def instance_forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(u, everyone's or None, start, τ, fixed τ) -> (loss, losses (n,), state)"""
        loss, losses, state = self._operator("forward", False)(*instances(*arguments))
        return loss, losses[0, 0], state

    def instance_backward(self, u: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        """And (losses (N,), state, gradient) -> gradients of u and of τ."""
        *first, losses, state, grad = arguments
        (h,), slope = self._operator("backward", False)(*instances(u, *first), losses[None, None], state, grad)
        return h, slope

    def modality_forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(z, u, mask, everyone's, their mask, start, raw, τ, fixed τ) -> (loss, losses (2, k, n), state)"""
        found: tuple[Tensor, Tensor, Tensor] = self._operator("forward", arguments[6])(*modalities(*arguments))
        return found

    def modality_backward(self, z: list[Tensor], *arguments: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        """And (losses (2, k, N), state, gradient) -> gradients of the z, of u, and of τ."""
        *first, losses, state, grad = arguments
        operator = self._operator("backward", first[5])
        (h, *H), slope = operator(*modalities(z, *first), losses, state, grad)
        return H, h, slope


def instances(u: Tensor, others: Tensor | None, start: int, *temperatures: Any) -> tuple[Any, ...]:
    return [u], [0, 0], [True], None, [] if others is None else [others], None, start, *temperatures


def modalities(
    z: list[Tensor], u: Tensor, mask: Any, others: Any, others_mask: Any, start: int, raw: bool, *temperatures: Any
) -> tuple[Any, ...]:
    """The vectors are u and the z, everyone's too; *raw*, u holds any vectors, and not directions."""
    pairs = [x for m in range(len(z)) for x in (m + 1, 0)]
    return [u, *z], pairs, [not raw, *(False for _ in z)], mask, others, others_mask, start, *temperatures


def samples(ops: Any) -> dict[str, Callable[[], Iterator[tuple[Any, ...]]]]:
    """By operator's name, what makes its arguments; backward ones come from a forward call of ``ops``."""

    def forward() -> Iterator[tuple[Any, ...]]:
        tau = torch.tensor(0.5)
        for dtype in DTYPES:
            (u,) = rows(1, 4, 6, dtype)
            yield instances(u, None, 0, None, 0.5)
            yield instances(u * torch.tensor([1, 0, 1, 1])[:, None], None, 0, tau, 1.0)
            yield instances(u, *everyone([u]), 1, tau, 1.0)
            yield instances(u[:0], *everyone([u]), 2, None, 0.5)
            yield [u * 3], [0, 0], [False], torch.rand(4, 1) < 0.7, [], None, 0, tau, 1.0
            u, *z = rows(4, 4, 6, dtype)
            mask, all_masks = torch.rand(4, 3) < 0.7, torch.rand(8, 3) < 0.7
            others = everyone([u, *z])
            yield modalities(z, u, None, [], None, 0, False, None, 0.5)
            yield modalities(z, u, mask, [], None, 0, False, tau, 1.0)
            yield modalities(z[:1], z[0], mask[:, :1], [], None, 0, True, tau, 1.0)
            yield modalities(z, u, mask, others, all_masks, 1, False, tau, 1.0)
            yield modalities([x[:0] for x in z], u[:0], None, others, None, 2, False, None, 0.5)
            yield z, [0, 1, 0, 2, 1, 2], [True] * 3, None, [], None, 0, None, 0.5
            yield z, [0, 1, 0, 2, 1, 2], [True] * 3, None, everyone(z), None, 1, tau, 1.0
            yield z[:1], [], [True], None, [], None, 0, tau, 1.0
        u, *z = rows(3, 0, 6, torch.float32)
        yield modalities(z, u, None, [], None, 0, False, None, 0.5)
        for B in (0, 1):
            yield instances(torch.randn(B, 6), None, 0, None, 0.5)

    def backward() -> Iterator[tuple[Any, ...]]:
        for sample in forward():
            loss, losses, state = ops.paired_forward(*sample)
            if sample[4]:
                losses = losses.new_ones((*losses.shape[:2], len(sample[4][0])))
            yield *sample, losses, state, torch.ones_like(loss)

    return {"paired_forward": forward, "paired_backward": backward}
