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

# The k x k solvers of the native code alone, in units of λ₁ (tests/native/test_solvers.py).


def solver(k: int) -> float:
    return (4 + k) * EPS64


# The power iteration's vector, in units of λ₁/(λ₁ − λ₂), and its elementary functions in those of the last place.
POWER_ITERATION = 2.5 * EPS64
EXP_ULPS = 1.25
LOG1P_ULPS = 3.0

# Native and reference results in float64 on random embeddings, which have no close eigenvalues.
TWO_BACKENDS = 1e-10
# On nearly aligned ones and the like, where 1e-14 of a Gram matrix is 1e-6 of a small eigenvalue.
DELICATE = 1e-5

# Two float64 evaluations of one formula with sums in another order, before a rounding to the result's dtype.
NOISE_64 = 1e-12
