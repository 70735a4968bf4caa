"""Joint scores in one kernel: products of a tile of queries with the planes of candidates, and what is made of them.

    q_m = t · b_m                     planes b (n, Ng, d) of candidates, queries t (Nq, d)

    volumes    factor √r, or factor r,     r = β − Σ q²
    λ₁         x = the largest root of x + Δ = Σ w_m/(x + δ_m), w = μ q²    (``_root``)
    area²      factor (β + centre − 2 q₂ − (q₁ − shift)²)

with numbers of each candidate beside the planes: see ``Candidates``. Reads queries and planes in float32, and in
float64 where a tile has a near copy (distance² below 2⁻¹⁰ of ‖t‖²), whose distance would be rounding otherwise; writes
scores (Nq, Ng) in float32. The formulas are those of ``reference.py``, where they are derived.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

VOLUME, VOLUME2, SINE, SIGMA, LAMBDA, GAIN, AREA2 = (tl.constexpr(i) for i in range(7))  # as spec.py has them

NEAR = tl.constexpr(2.0**-10)
TINY = tl.constexpr(2.0**-126)


class Queries(NamedTuple):
    """Rows in both precisions, and β = ‖t‖² in float64."""

    t: Any
    wide: Any
    beta: Any


class Candidates(NamedTuple):
    """Planes in both precisions, and in float64 numbers of each candidate, (·, Ng): μ for λ₁, n of them; √det K or 1
    for volumes; ½‖g‖², m·ĝ and ‖m‖² for triangles, with the planes ĝ and m."""

    planes: Any
    wide: Any
    numbers: Any


@triton.jit
def _products(t, plane, d, row, column, inside, there, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """t · b of a tile, (rows, columns), in the precision of what the pointers point to."""
    c = tl.arange(0, BLOCK)
    total = tl.zeros([row.shape[0], column.shape[0]], t.dtype.element_ty)
    a = t + row[:, None].to(tl.int64) * d + c[None, :]
    b = plane + column[None, :].to(tl.int64) * d + c[:, None]
    for at in range(0, d, BLOCK):
        left = d - at
        x = tl.load(a + at, mask=inside[:, None] & (c[None, :] < left), other=0.0)
        y = tl.load(b + at, mask=there[None, :] & (c[:, None] < left), other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=t.dtype.element_ty)
    return total


@triton.jit
def _reciprocal(x):
    return 1.0 / tl.maximum(x, TINY)


@triton.jit
def _root(q, mu, excess, n: tl.constexpr, STEPS: tl.constexpr):
    """x of q, a tuple of n tiles, and μ, as many rows: see ``reference.largest_root``."""
    x = tl.zeros_like(excess)
    for m in tl.static_range(n):
        w, pole = mu[m] * q[m] * q[m], mu[0] - mu[m]
        half, part = (excess + pole) * 0.5, (excess - pole) * 0.5
        s = tl.sqrt(part * part + w)
        x = tl.maximum(x, tl.where(half > 0, (w - excess * pole) * _reciprocal(s + half), s - half))
    if n > 1:
        for _ in range(STEPS):  # unrolled, it takes more registers than there are
            phi, phi_slope = tl.zeros_like(x), tl.zeros_like(x)
            psi, psi_slope = tl.zeros_like(x), tl.zeros_like(x)
            for m in tl.static_range(n):
                pole = mu[0] - mu[m]
                inverse = _reciprocal(x + pole)
                term = mu[m] * q[m] * q[m] * inverse
                slope, near = term * inverse, pole <= x
                phi += tl.where(near, term, 0.0)
                phi_slope += tl.where(near, slope, 0.0)
                psi += tl.where(near, 0.0, term)
                psi_slope += tl.where(near, 0.0, slope)
            y = tl.where(phi_slope == 0, x, phi / tl.where(phi_slope == 0, 1.0, phi_slope))
            a = 1.0 + psi_slope
            b = excess - psi - psi_slope * x + a * (x - y)
            s = tl.sqrt(b * b + 4.0 * a * phi * y)
            step = tl.where(b > 0, 2.0 * phi * y * _reciprocal(b + s), (s - b) / (2.0 * a))
            x = tl.maximum(x, x + step - y)
    # A NaN, which a maximum may lose.
    total = excess
    for m in tl.static_range(n):
        total += q[m]
    return tl.where(total == total, x, total)


@triton.jit
def scores_kernel(
    queries, candidates, scores, d, Nq, Ng, tiles,
    n: tl.constexpr, SCORE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of (ROWS, COLUMNS) scores; ``tiles`` of them lie beside one another."""
    at = tl.program_id(0)
    row, column = at // tiles * ROWS + tl.arange(0, ROWS), at % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside, there = row < Nq, column < Ng
    plane = Ng.to(tl.int64) * d
    beta = tl.load(queries.beta + row, mask=inside, other=0.0)[:, None]
    q = ()
    for m in tl.static_range(n):
        q = q + (_products(queries.t, candidates.planes + m * plane, d, row, column, inside, there, BLOCK, PRECISION),)
    numbers = candidates.numbers + column
    if (SCORE == SIGMA) | (SCORE == LAMBDA) | (SCORE == GAIN):
        mu = ()
        for m in tl.static_range(n):
            mu = mu + (tl.load(numbers + m * Ng.to(tl.int64), mask=there, other=0.0).to(tl.float32)[None, :],)
        largest = tl.load(numbers, mask=there, other=0.0)[None, :]
        x = _root(q, mu, (largest - beta).to(tl.float32), n, STEPS)
        if SCORE == GAIN:
            found = x
        else:
            found = largest.to(tl.float32) + x
            if SCORE == SIGMA:
                found = tl.sqrt(found)
    else:
        factor = tl.load(numbers, mask=there, other=0.0)[None, :]
        size = beta
        if SCORE == AREA2:
            shift = tl.load(numbers + Ng.to(tl.int64), mask=there, other=0.0)[None, :]
            size = beta + tl.load(numbers + 2 * Ng.to(tl.int64), mask=there, other=0.0)[None, :]
            across = q[0] - shift.to(tl.float32)
            r = size.to(tl.float32) - 2.0 * q[1] - across * across
        else:
            r = beta.to(tl.float32) - q[0] * q[0]
            for m in tl.static_range(1, n):
                r -= q[m] * q[m]
        near = (r < NEAR * size.to(tl.float32)) & inside[:, None] & there[None, :]
        if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
            exact = size + tl.zeros([1, COLUMNS], tl.float64)
            for m in tl.static_range(n):
                plane_of_m = candidates.wide + m * plane
                product = _products(queries.wide, plane_of_m, d, row, column, inside, there, 16, "ieee")
                if SCORE == AREA2:
                    if m == 0:
                        exact -= (product - shift) * (product - shift)
                    else:
                        exact -= 2.0 * product
                else:
                    exact -= product * product
            r = tl.where(near, exact.to(tl.float32), r)
        r = tl.where(r < 0, 0.0, r)  # a NaN stays one
        factor = factor.to(tl.float32)
        if (SCORE == VOLUME) | (SCORE == SINE):
            found = factor * tl.sqrt(r)
        elif SCORE == VOLUME2:
            found = factor * factor * r
        else:
            found = factor * r
    to = scores + row[:, None].to(tl.int64) * Ng + column[None, :]
    tl.store(to, found, mask=inside[:, None] & there[None, :])
