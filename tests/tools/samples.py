"""Which of many a sample has."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def draw(items: Sequence[T], one_in: int, seed: str, name: Callable[[T], object] = str) -> list[T]:
    """One in so many of them, rounded up, in their order; with one seed always the same.

    The share is exact, so that how many are drawn, and how long they take, does not depend on the seed.
    """
    places = sorted(range(len(items)), key=lambda i: zlib.crc32(f"{seed}{name(items[i])}".encode()))
    return [items[i] for i in sorted(places[: -(-len(items) // one_in)])]
