"""What the tests of arguments share: the public functions, embeddings for them, and what a refusal must say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    pmrl_loss,
    singular_values,
)

B, K, D = 5, 3, 7

FUNCTIONS = {
    "dominant_sv_loss": dominant_sv_loss,
    "pmrl_loss": pmrl_loss,
    "singular_values": singular_values,
    "dominant_singular_value": dominant_singular_value,
    "dominant_singular_triplet": dominant_singular_triplet,
}
LOSSES = {name: FUNCTIONS[name] for name in ("dominant_sv_loss", "pmrl_loss")}

# Small problems are evaluated alike whatever the form, but a kernel may read a stack with other loads.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def _with(contrast: str) -> Callable[..., Tensor]:
    return lambda *embeddings, **options: pmrl_loss(*embeddings, contrast=contrast, **options)


ALL = {**FUNCTIONS, **{f"pmrl_loss-{name}": _with(name) for name in ("modality", "leave_one_out", "pairs")}}
each_function = pytest.mark.parametrize("function", ALL.values(), ids=ALL.keys())


def modalities(k: int = K, seed: int = 0) -> list[Tensor]:
    """k leaves (B, d) in float64: differences between forms would show."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(k)]


def rejects(error: type[Exception], call: Callable[[], Any], *parts: str) -> None:
    """``call`` raises exactly ``error``, with all ``parts`` in its message."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    for part in parts:
        assert part in str(caught.value)


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape or (B, D), dtype=dtype, device=device)


FLOATS = "wanted a floating-point one of torch.float32, torch.bfloat16, torch.float16, torch.float64"
