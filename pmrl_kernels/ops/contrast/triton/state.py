"""What a forward pass leaves for the backward pass: numbers of 64 bits, of which the first is what the mean was divided
by. Of a small batch, what ``prepare_kernel`` writes follows, so that the backward pass has one launch less."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...triton import INTERPRETED

KEPT = 1 << 22
"""Numbers of all vectors, with the rows that fill up the last tile, of which parts are kept, at most: 24 MiB."""

HEAD = 2
LARGEST_TILE = 512 if INTERPRETED else 128


class Prepared(NamedTuple):
    """Of a batch, in one buffer of numbers of 64 bits: where in it each begins, at a multiple of 16 bytes. (An argument
    of kernels. N may be a symbol.)"""

    buffer: Any
    parts: int  # (V, 3, NP, D) in fp16 of V vectors, zero beyond their N rows and d columns, D a multiple of 64
    positives: int  # (P, N) of P pairs, float32
    flags: int  # (P, N), int8
    there: int  # (V, N), int8
    counters: int  # int32: how many have been summed up, and of each block of rows, how many of its tiles


def width_of(d: int) -> int:
    """Columns of the parts."""
    return -(-d // 64) * 64


def prepared(buffer: Any, V: int, padded: int, N: int, d: int, pairs: int, blocks: int) -> tuple[Prepared, int]:
    """And how many numbers the buffer has. ``padded`` rows of parts, a multiple of 16; ``blocks`` of rows, at most, of
    all pairs and directions."""
    positives = HEAD + V * 3 * padded * width_of(d) // 4
    flags = positives + -(-pairs * N // 4) * 2
    there = flags + -(-pairs * N // 16) * 2
    counters = there + -(-V * N // 16) * 2
    return Prepared(buffer, HEAD, positives, flags, there, counters), counters + (blocks + 4) // 4 * 2


def _padded(N: int, gathered: bool) -> int:
    # (PyTorch 2.11 adds no bool to a symbolic size.)
    return (-(-N // LARGEST_TILE) + int(gathered)) * LARGEST_TILE


def _blocks(N: int, pairs: int) -> int:
    return 2 * pairs * -(-N // 32)


def kept(V: int, N: int, d: int, pairs: int, gathered: bool) -> tuple[int, int]:
    """Rows of the parts that are kept, and for how many blocks of rows there are counters, whatever the tiles; zeros
    where the batch is too large."""
    padded = _padded(N, gathered)
    if padded * V * width_of(d) > KEPT:
        return 0, 0
    return padded, _blocks(N, pairs)


def state_size(V: int, N: int, d: int, pairs: int, gathered: bool) -> int:
    """Asks nothing of N, which exports leave open."""
    padded = _padded(N, gathered)
    fits: int = torch.sym_min(1, KEPT // torch.sym_max(1, padded * V * width_of(d)))
    is_kept: int = fits * torch.sym_min(1, padded)
    return HEAD + is_kept * (prepared(None, V, padded, N, d, pairs, _blocks(N, pairs))[1] - HEAD)
