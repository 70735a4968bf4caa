"""Device functions for single numbers in float64 that all op families need."""

import triton
import triton.language as tl

from .double_float import to_float64

LARGEST_FLOAT32 = tl.constexpr((2 - 2.0**-23) * 2.0**127)


@triton.jit
def read_temperature(temperature, CONTRAST: tl.constexpr):
    """Of a ``Temperature``. A bad one in a tensor makes NaN, see ``reference.read_temperature``; numbers were looked at
    before."""
    if temperature.pointer is None:
        # the interpreter takes an integer in a tuple for one of 32 bits, if it fits
        return temperature.bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        t = to_float64(tl.load(temperature.pointer))
        if CONTRAST:
            return tl.where((t >= 2.0**-126) & (t <= LARGEST_FLOAT32), t, float("nan"))
        else:
            return tl.where((t > 0) & (t < float("inf")), t, float("nan"))


@triton.jit
def log1p(x):
    """For x >= 0: log(1 + x) of the rounded sum, and what the rounding took."""
    total = 1.0 + x
    return tl.log(total) + (x - (total - 1.0)) / total


@triton.jit
def expm1(x):
    """For x <= 0, NaN too. With u the rounded exponential, u - 1 and log u are off by the same part."""
    u = tl.exp(x)
    plain = (u == 1.0) | (u < 0.5)  # where log u is 0, and where nothing cancels
    return tl.where(u == 1.0, x, tl.where(plain, u - 1.0, (u - 1.0) * (x / tl.log(tl.where(plain, 0.5, u)))))
