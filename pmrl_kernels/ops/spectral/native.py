"""The spectral op of the compiled library (csrc/cpu/spectral.cpp): the shapes of what its forward operator returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import spec

LANES = 16  # instances solved together, at most: the state comes in blocks of them


def _state_shape(B: int, k: int, normalize: bool, spectrum: bool, others: bool, float64_input: bool) -> tuple[int, int]:
    """As csrc/cpu says: state_size numbers an instance, with room for whole blocks."""
    pairs = k + k * k if spectrum else 1 + k * (k + 1) // 2
    # a symbolic k takes no bool as a factor
    return B + LANES - 1, pairs + k * (1 + int(normalize) + int(others) + int(float64_input))


def _forward_shapes(
    embeddings: Sequence[Tensor],
    mask: Any,
    temperature: Any,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
) -> Any:
    first = embeddings[0]
    B, k = first.shape[0], spec.number_of_modalities(embeddings)
    float64_input = spec.output_dtype(embeddings) == torch.float64
    state = first.new_empty(
        _state_shape(B, k, normalize, spectrum, wanted & spec.W != 0, float64_input), dtype=torch.float64
    )
    return spec.output_shapes(embeddings, spectrum, wanted), [state]


PAIRS = {spec.SPECTRAL.name: native.pair(spec.SPECTRAL, _forward_shapes)}
