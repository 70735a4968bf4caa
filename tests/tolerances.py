"""Every tolerance of the suite, in one table."""

from __future__ import annotations

import torch

EPS32 = 2.0**-23
EPS64 = 2.0**-52

# Singular values against a float64 SVD, in units of σ₁.
SIGMA_32 = 4 * EPS32


def sigma_64(ratio: torch.Tensor) -> torch.Tensor:
    """float64: 16·eps·σ₁·(σ₁/σ_j), never worse than 1e-7·σ₁. ``ratio`` is σ_j/σ₁."""
    return (16 * EPS64 / ratio).clamp_max(1e-7)


def sigma_16(ratio: torch.Tensor, k: int) -> torch.Tensor:
    """bfloat16 and float16: 4·eps32·σ₁·(σ₁/σ_j), never worse than √(k·eps32)·σ₁."""
    return (4 * EPS32 / ratio).clamp_max((k * EPS32) ** 0.5)


# Losses and gradients: our error against the float64 oracle may be FACTOR times that of the same
# formula by torch.linalg.svd in the inputs' dtype, plus a floor of a few roundings of the result.
FACTOR = 1.0
FLOOR = {torch.float32: 4 * EPS32, torch.float64: 64 * EPS64}

# Half precision: the gradient is the float64 oracle's on the same inputs, rounded once.
HALF_GRADIENT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
LEAST_HALF = 2.0**-24  # the least float16 number: gradients below it are rounded to it or to 0

# Two float64 evaluations by different formulas, relative to the largest entry.
FORMULA_64 = 1e-10

# Contrast terms in float32: similarities carry a rounding of a few eps32 into exp(s/τ).
CONTRAST_32 = 64 * EPS32
