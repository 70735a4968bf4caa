"""The contrasts of the compiled library (csrc/cpu/contrast.cpp): the shapes of what its forward operators return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import spec

# They keep similarities for their backward passes while there are few of them.


def _kept(count: int, n: int, others: int, size: int) -> int:
    """As csrc/cpu/contrast.cpp says: nothing, or ``size`` numbers for each of ``count`` matrices (n, others)."""
    return count * size if count * n * others <= 1 << 22 else 0


def _instance_forward_shapes(u: Tensor, everyone: Tensor | None, *_: Any) -> Any:
    n = u.shape[0]
    if everyone is None:
        state = _kept(1, n, n, n * (n + 192) // 2)
    else:
        state = _kept(1, n, everyone.shape[0], n * (everyone.shape[0] + 32))
    return u.new_empty(()), u.new_empty((n,), dtype=torch.float64), u.new_empty((state,))


def _modality_forward_shapes(
    z: Sequence[Tensor], u: Tensor, mask: Tensor | None, everyone: Sequence[Tensor], *_: Any
) -> Any:
    n, k = u.shape[0], len(z)
    others = everyone[0].shape[0] if everyone else n
    state = k * others + k + _kept(2 * k if everyone else k, n, others, n * (others + 32))
    return u.new_empty(()), u.new_empty((2, k, n), dtype=torch.float64), u.new_empty((state,))


PAIRS = {
    spec.INSTANCE.name: native.pair(spec.INSTANCE, _instance_forward_shapes),
    spec.MODALITY.name: native.pair(spec.MODALITY, _modality_forward_shapes),
}
