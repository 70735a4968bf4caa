"""The spectral op of the compiled library: the shapes of what its forward operator returns, for CPUs
(csrc/cpu/spectral.cpp) and for CUDA (csrc/cuda/spectral.cpp)."""

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


def cuda_state(embeddings: Sequence[Tensor], normalize: bool, spectrum: bool, wanted: int) -> list[Tensor]:
    """As csrc/cuda says: numbers of each instance (``state_of`` in arguments.h), and the sums of all."""
    first = embeddings[0]
    k, float64_input = spec.number_of_modalities(embeddings), spec.output_dtype(embeddings) == torch.float64
    triangle, vectors = k * (k + 1) // 2, wanted & ~spec.ANY_ALIGNMENT != 0
    size = triangle + 1 if wanted & spec.ANY_ALIGNMENT else 0
    if vectors and wanted & ~spec.Z:
        size = size + k + (k + k * k if spectrum else 1 + triangle)
    size = size + k * (int(vectors and normalize) + int(wanted & spec.W != 0) + int(float64_input))
    return [first.new_empty(shape, dtype=torch.float64) for shape in ((size, first.shape[0]), (3,))]


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
    outputs = spec.output_shapes(embeddings, spectrum, wanted)
    if first.device.type == "cuda":
        return outputs, cuda_state(embeddings, normalize, spectrum, wanted)
    k, float64_input = spec.number_of_modalities(embeddings), spec.output_dtype(embeddings) == torch.float64
    shape = _state_shape(first.shape[0], k, normalize, spectrum, wanted & spec.W != 0, float64_input)
    return outputs, [first.new_empty(shape, dtype=torch.float64)]


PAIRS = {spec.SPECTRAL.name: native.pair(spec.SPECTRAL, _forward_shapes)}
