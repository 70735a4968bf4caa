"""The contrasts of unit vectors in Triton. Those of vectors of any norm are the reference's: their similarities are not
bounded, and so neither whole numbers in fp16 nor exponentials that need no maximum would hold them.

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
from ...triton import INTERPRETED, NAME, observed
from .. import spec
from .state import state_size


@functools.cache
def _launch() -> types.ModuleType:
    from . import launch

    return launch


_forward, _backward = triton.lazy(_launch, "forward"), triton.lazy(_launch, "backward")


def _forward_shapes(
    vectors: Sequence[Tensor], pairs: Sequence[int], directions: Any, mask: Any, everyone: Sequence[Tensor], *_: Any
) -> Any:
    x, shape, others = vectors[0], spec.losses_shape(vectors, pairs), everyone or vectors
    N, d = others[0].shape
    size = state_size(len(others), N, d, len(pairs) // 2, bool(everyone))
    return x.new_empty(()), x.new_empty(shape, dtype=torch.float64), x.new_empty((size,), dtype=torch.float64)


# An operator written in Python takes the host some ten microseconds more than the function itself.


def _observed(arguments: Sequence[Any]) -> bool:
    vectors, _, _, mask, everyone, everyone_mask, _, temperature, *_ = arguments
    return observed((*vectors, mask, *everyone, everyone_mask, temperature))


def _forward_or_operator(*arguments: Any) -> Any:
    return (forward_operator if _observed(arguments) else _forward)(*arguments)


def _backward_or_operator(*arguments: Any) -> Any:
    seen = _observed(arguments) or observed(arguments[-3:])
    return (backward_operator if seen else _backward)(*arguments)


def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """Why it cannot take (B, d) vectors there, or None."""
    reason = triton.rejects(device, dtype, k, d)
    if reason is None and dtype == torch.float64:
        reason = "its similarities are as exact as float32, not as float64"
    return reason or (_lacking(device.index) if device.type == "cuda" else None)


def _lacking(index: int | None) -> str | None:
    """What Triton lacks on that card to multiply matrices; None where there is no card to ask."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip is None:
        if torch.cuda.get_device_capability(index) >= (8, 0):
            return None
        return "Triton has no tensor cores for it on cards of a compute capability below 8.0"
    if triton.OLD_ON_AMD and torch.cuda.get_device_properties(index).gcnArchName.startswith("gfx11"):
        return "on AMD's RDNA 3 it needs Triton 3.9, which compiles its products there"
    return None


# Dynamo calls it, and keeps the answer, as in ``native.py``. (A cache it would look through, and warn of.)
_lacking._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _registered() -> tuple[Operators, Any, Any]:
    layout = triton.fingerprint(__name__, "state.py") + ("_interpreted" if INTERPRETED else "")  # with larger tiles
    operators = Operators(f"pmrl_triton_contrast_{layout}")
    keys = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
    return operators, *operators.define(spec.PAIRED, _forward, _backward, _forward_shapes, keys)


_operators, forward_operator, backward_operator = _registered()

PAIRS = {spec.PAIRED.name: Pair(NAME, _forward_or_operator, _backward_or_operator, rejects)}
