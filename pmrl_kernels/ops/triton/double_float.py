"""Numbers of passes over d: as float64, or as pairs of float32; and powers of two.

The product of two float32 is exact in float64. On cards whose float64 is some 64 times slower, sums of embeddings of
up to 32 bits are double_float instead, pairs of float32 (high, low): a product of two float32 and its rounding error
are two instructions, a sum and its rounding error six, and a pair carries 48 bits. Since float32 has 2^±126 only,
embeddings out of range are scaled by powers of two, as float64 ones are.

A sum is a tuple: one block in float64, or (high, low) in float32, |low| about 2^-24 |high|. So is a coefficient.
"""

import triton
import triton.language as tl

from .eigen import INTERPRETED, product


@triton.jit
def lifted(x, DOUBLE_FLOAT: tl.constexpr):
    """In float64, or in float32 for a double_float sum. bfloat16 is the upper half of a float32; the interpreter's own
    conversion loses its subnormals."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32 if DOUBLE_FLOAT else tl.float64)


@triton.jit
def to_float64(x):
    return lifted(x, False)


# ------------------------------------------------------------------------------------------------
# Powers of two
# ------------------------------------------------------------------------------------------------


@triton.jit
def _power_of_two(exponent):
    """2^e in e's dtype (float64, float32), of whose normal numbers it is."""
    if exponent.dtype == tl.float32:
        return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def power(exponent):
    """2^e as two factors: 2^1074 and 2^149, which lift the least subnormals, are no float64 and no float32."""
    half = tl.floor(exponent * 0.5)
    return (_power_of_two(half), _power_of_two(exponent - half))


@triton.jit
def scaled(x, exponent):
    """x·2^e, in the dtype of both."""
    factors = power(exponent)
    return x * factors[0] * factors[1]


@triton.jit
def times_power(x, factors):
    """x·2^e, for a block [R, BLOCK] and ``factors`` of 2^e [R]."""
    return x * factors[0][:, None] * factors[1][:, None]


@triton.jit
def exponent_of(peak):
    """e with peak = f 2^e, 1/2 <= f < 1; 0 for 0 and for what is not finite, whose instance is NaN in the end."""
    normal = tl.where(peak < 2.0**-1000, peak * 2.0**60, peak)
    bits = (normal.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    e = bits - 1022 - tl.where(peak < 2.0**-1000, 60, 0)
    return tl.where((peak > 0) & (bits < 0x7FF), e, 0).to(tl.float64)


@triton.jit
def highest_exponent(x):
    """Of a block [N, a, b] over a and b, as float64's bits have it: 0 for 0, 0x7FF where something is not finite."""
    bits = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    return tl.max(tl.max(bits, 2, keep_dims=True), 1, keep_dims=True)


# ------------------------------------------------------------------------------------------------
# Sums
# ------------------------------------------------------------------------------------------------


@triton.jit
def two_sum(a, b):
    """a + b and its rounding error. Additions alone: nothing here can be fused."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def two_product(a, b):
    """a b and its rounding error, of float32."""
    if INTERPRETED:  # which has no fused multiply-add
        p = a * b
        return p, (a.to(tl.float64) * b.to(tl.float64) - p.to(tl.float64)).to(tl.float32)
    else:
        p = tl.math.fma(a, b, 0.0)  # a compiler would fuse a * b with an addition that follows, and add another number
        return p, tl.math.fma(a, b, -p)


@triton.jit
def plus_product(total, a, b):
    """total + a b, in double_float."""
    high, low = two_product(a, b)
    high, e = two_sum(total[0], high)
    return (high, total[1] + (low + e))


@triton.jit
def no_sum(R: tl.constexpr, N: tl.constexpr, DOUBLE_FLOAT: tl.constexpr):
    if DOUBLE_FLOAT:
        return (tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32))
    else:
        return (tl.zeros([R, N], tl.float64),)


@triton.jit
def plus_dot(total, a, b, STEP: tl.constexpr, APART: tl.constexpr):
    """A sum [R, N] and a · b, blocks [R, N VECTOR] of which VECTOR neighbours are in one lane (1 in double_float); or,
    with APART, may be in several."""
    if len(total) == 2:
        high, low = plus_product(total, a, b)
        s = high + low
        return (s, low - (s - high))
    else:
        ab = product(a, b) if APART else a * b
        return (total[0] + tl.sum(tl.reshape(ab, [STEP.rows, STEP.columns // STEP.vector, STEP.vector]), 2),)


@triton.jit
def over_lanes(total):
    """The sums [R], in float64, of what lanes [R, N] have."""
    x = total[0].to(tl.float64)
    if len(total) == 2:
        x += total[1].to(tl.float64)
    return tl.sum(x, 1)


@triton.jit
def coefficient(c, DOUBLE_FLOAT: tl.constexpr):
    """A number of float64's as what ``plus_multiple`` multiplies by."""
    if DOUBLE_FLOAT:
        high = c.to(tl.float32)
        return (high, (c - high.to(tl.float64)).to(tl.float32))
    else:
        return (c,)


@triton.jit
def plus_multiple(total, c, x):
    """A sum [R, BLOCK] (or none yet, an empty tuple) and c x, for a coefficient [R]."""
    if len(c) == 2:
        c_high = tl.broadcast_to(c[0][:, None], x.shape)
        if len(total) == 0:
            high, low = two_product(c_high, x)
            return (high, low + c[1][:, None] * x)
        else:
            high, low = plus_product(total, c_high, x)
            return (high, low + c[1][:, None] * x)
    else:
        if len(total) == 0:
            return (c[0][:, None] * x,)
        else:
            return (total[0] + c[0][:, None] * x,)


@triton.jit
def plus_dot_of_sum(total, a, b, STEP: tl.constexpr):
    """As ``plus_dot``, of a block b and a sum a, neither of which need have its neighbours in one lane."""
    if len(total) == 2:
        high, low = plus_product(total, a[0], b)
        low += a[1] * b
        s = high + low
        return (s, low - (s - high))
    else:
        return plus_dot(total, a[0], b, STEP, True)


@triton.jit
def plus_multiple_of_sum(total, c, x):
    """As ``plus_multiple``, of a sum x."""
    if len(c) == 2:
        high, low = plus_multiple(total, c, x[0])
        return (high, low + c[0][:, None] * x[1])
    else:
        return plus_multiple(total, c, x[0])


@triton.jit
def rounded(total):
    """To one block."""
    if len(total) == 2:
        return total[0] + total[1]
    else:
        return total[0]
