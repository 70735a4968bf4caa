"""What a forward pass leaves for the backward pass: numbers of 64 bits, of which the first is what the mean was divided
by. Of a small batch, what ``prepare_kernel`` has written follows, from the third on, so that the backward pass has one
launch less: parts, positives and flags."""

from __future__ import annotations

KEPT = 1 << 22
"""Numbers of all vectors of which parts are kept, at most: 24 MiB."""


def width_of(d: int) -> int:
    """Columns of the parts."""
    return -(-d // 64) * 64


def kept(V: int, N: int, d: int, pairs: int, gathered: bool) -> tuple[int, int, int, int]:
    """Rows of the parts that are kept, and how many numbers the parts, positives and flags take; zeros where the batch
    is too large. (N may be a symbol.)"""
    width = width_of(d)
    if N * V * width > KEPT:
        return 0, 0, 0, 0
    padded = (-(-N // 128) + gathered) * 128  # whatever the tiles of so few rows are
    return padded, V * 3 * padded * width // 4, -(-pairs * N // 4) * 2, -(-pairs * N // 16) * 2


def state_size(V: int, N: int, d: int, pairs: int, gathered: bool) -> int:
    return 2 + sum(kept(V, N, d, pairs, gathered)[1:])
