"""The spectral op in Triton.

This module imports neither triton nor the kernels; ``launch`` does, the first time that an operator runs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import triton
from ...operators import Operators, Pair
from ...triton import INTERPRETED, NAME, observed, rejects
from .. import spec


@functools.cache
def _launch() -> types.ModuleType:
    from . import launch

    return launch


_forward, _backward = triton.lazy(_launch, "forward"), triton.lazy(_launch, "backward")


def _forward_shapes(
    embeddings: Sequence[Tensor],
    mask: Any,
    temperature: Any,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
) -> Any:
    from ...triton.record import layout, state_size

    first = embeddings[0]
    asked = wanted & spec.ANY_ALIGNMENT != 0, wanted & spec.W != 0
    record = layout(spec.number_of_modalities(embeddings), spectrum, normalize, *asked)
    state = first.new_empty((state_size(first.shape[0], record),), dtype=torch.float64)
    return spec.output_shapes(embeddings, spectrum, wanted), [state]


# An operator written in Python takes the host some ten microseconds more than the function itself.


def _forward_or_operator(embeddings: Sequence[Tensor], mask: Any, temperature: Any, *settings: Any) -> Any:
    function = forward_operator if observed((*embeddings, mask, temperature)) else _forward
    return function(embeddings, mask, temperature, *settings)


def _backward_or_operator(embeddings: Sequence[Tensor], *arguments: Any) -> Any:
    mask, temperature, *_, grads, _ = arguments
    function = backward_operator if observed((*embeddings, mask, temperature, *grads)) else _backward
    return function(embeddings, *arguments)


def _registered() -> tuple[Operators, Any, Any]:
    operators = Operators(f"pmrl_triton_spectral_{triton.fingerprint(triton.__name__, 'record.py')}")
    keys = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
    return operators, *operators.define(spec.SPECTRAL, _forward, _backward, _forward_shapes, keys)


_operators, forward_operator, backward_operator = _registered()

PAIRS = {spec.SPECTRAL.name: Pair(NAME, _forward_or_operator, _backward_or_operator, rejects)}
