"""Joint scores in Triton, forward. Their gradients, contrasts and scores in float64 are the reference's.

This module imports neither triton nor the kernels; ``launch`` does, the first time that an operator runs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import triton
from ...operators import Operators, Pair
from ...triton import INTERPRETED, NAME
from .. import reference, spec

MOST_MODALITIES = 8
"""The query among them: the kernel holds a product of each of the others."""


@functools.cache
def _launch() -> types.ModuleType:
    from . import launch

    return launch


_lazy = triton.lazy(_launch, "forward")


def _forward(
    query: Tensor, candidates: Sequence[Tensor], mask: Tensor | None, score: int, normalize: bool
) -> tuple[Tensor, list[Tensor]]:
    found: tuple[Tensor, list[Tensor]] = _lazy(query, candidates, mask, score, normalize)
    return found


def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """Why it cannot take candidates (Ng, k - 1, d) there, or None."""
    reason = triton.rejects(device, dtype, k, d)
    if reason is None and dtype == torch.float64:
        reason = "its scores are as exact as float32, not as float64"
    if reason is None and k > MOST_MODALITIES:
        reason = f"its kernel is for k <= {MOST_MODALITIES}"
    return reason


def _registered() -> tuple[Operators, dict[str, Pair]]:
    # What a state is, the reference says.
    layout = triton.fingerprint(reference.__package__ or "", "reference.py") + ("_interpreted" if INTERPRETED else "")
    operators = Operators(f"pmrl_triton_joint_{layout}")
    keys = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
    pair = operators.define(spec.JOINT, _forward, reference.backward, reference.forward_shapes, keys)
    return operators, {spec.JOINT.name: Pair(NAME, *pair, rejects)}


_operators, PAIRS = _registered()
