"""The numbers every backend shares: where a value counts as zero, tied, or too flat to differentiate.

A backend that decided these for itself would return other gradients than its neighbour on the very
inputs this package exists for (full alignment, orthogonal modalities, antipodal pairs). Compiled
backends take them from here or are tested against this file.
"""

from __future__ import annotations

EPS32 = 2.0**-23
EPS64 = 2.0**-52

MAX_MODALITIES = 32
"""Largest k. Beyond it a k x k solve per instance is no longer the small problem the kernels are for."""


def singular_value_floor(k: int, float64_input: bool) -> float:
    """Relative floor: a σ_j <= floor·σ₁ is not resolved, so its gradient weight is 0.

    Up to 32-bit inputs keep their Gram in float64, which resolves σ down to eps32·σ₁ and beyond.
    A float64 input's Gram loses everything below √(k·eps64)·σ₁.
    """
    return (k * EPS64) ** 0.5 if float64_input else EPS32


def eigenvalue_gap(k: int, float64_input: bool) -> float:
    """Relative gap: λ₁ − λ_j <= gap·λ₁ counts as a tie, where u₁ and v₁ have no derivative along v_j.

    Up to 32-bit inputs, differences of a few eps32 are what rounding the inputs leaves of an exact tie.
    """
    return 16 * k * EPS64 if float64_input else 4 * EPS32


def zero_sum(k: int) -> float:
    """|Σ_m (v₁)_m| at or below this over the relative gap to the next eigenvalue, by which rounding turns v₁, is
    noise around 0: the orientation's second rule decides. Several times what any solver makes of an exact 0."""
    return 16 * k * EPS64


CANCELLED = 2.0**-12
"""‖y_m‖ at or below this times Σ_j |v_j| ‖z_j‖ counts as zero, y_m = Σ_{j≠m} |v_j| z_j being what the modalities but
m have in common: there are none, they cancel, or they are nothing beside m. ‖y_m‖² comes from the Gram matrix, with an
error of some 4·k·eps64 relative to the square of that sum, so norms beyond it are right within 1e-8·k."""

PEAK_TIE = 4 * EPS32
"""Entries of the top eigenspace's projector within this relative distance (or within what counts as a zero sum, if
that is more, and up to ½) count as equally large; the lowest modality index among them wins. Far above the noise
of any solver, so that all pick the same one."""


def squarings(k: int, float64_input: bool) -> int:
    """Matrix squarings after which power iteration has converged, or the eigensolver has to decide.

    P <- P² leaves a share (λ_j/λ₁)^(2^s) = exp(-gap·2^s) of v_j. At the smallest gap that counts that is
    between e^-20 and e^-10 here, which ``RANK_ONE`` sees, so a tie never passes for resolved; at three
    times that gap it is seen no more. 25 squarings for 32-bit inputs, 50 for k = 4 in float64.
    """
    gap, steps = eigenvalue_gap(k, float64_input), 0
    while gap * 2.0**steps < 10.0:
        steps += 1
    return steps


RANK_ONE = 1e-12
"""P of trace 1 has ‖P‖² = 1 - 2·share of v₂ near rank 1. More than this below 1, its matrix goes to the
eigensolver. Far above the rounding of ‖P‖²; what passes has a share of 5e-13, squared in the last steps. After how
many squarings P passes also tells the gap, within a factor of 2.3: -ln(1 - gap)·2^n is between 28 and 64."""

JACOBI_TOLERANCE = 1e-30
"""The compiled backends' eigensolver stops at 2·off² <= this·diag²; csrc/common/constants.h says why."""

MAX_SWEEPS = 20
"""A cap on it, which only ever ends a solve that rounding keeps from meeting the tolerance."""

SUMS = ("float64", "float32")
"""What dot products of embeddings of up to 32 bits may be summed in; float32 in pairs. The Triton backend has both."""
