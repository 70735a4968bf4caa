"""The contrasts of the compiled library (csrc/cpu/contrast.cpp): the shapes of what its forward operator returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import spec

_KEPT = 1 << 23  # similarities that are kept for the backward pass, at most
_SPARE = 16  # zeros where a state might be empty: whether it is nobody can say who exports for any B


def _forward_shapes(
    vectors: Sequence[Tensor],
    pairs: Sequence[int],
    directions: Sequence[bool],
    mask: Tensor | None,
    everyone: Sequence[Tensor],
    *_: Any,
) -> Any:
    x, shape = vectors[0], spec.losses_shape(vectors, pairs)
    ways, count, n = shape
    others = everyone[0].shape[0] if everyone else n
    # As csrc/cpu/contrast.cpp says: positives and bounds, and the similarities of the first products.
    measured = _SPARE if ways == 1 and all(directions) else count * (others + 1)
    products = count * (ways if everyone else 1)
    # As functions of torch, which leave sizes open that a compiler does.
    kept = torch.sym_min(products, _KEPT // torch.sym_max(1, n * others))
    room = n * (n + 192) // 2 if ways == 1 and not everyone else n * (others + 32)
    return x.new_empty(()), x.new_empty(shape, dtype=torch.float64), x.new_empty((measured + kept * room,))


PAIRS = dict.fromkeys((spec.PAIRED.name, spec.OF_ANY_NORM.name), native.pair(spec.PAIRED, _forward_shapes))
