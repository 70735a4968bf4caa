"""Streams: the device functions for what is d numbers long.

Embeddings are k tensors (B, d) given as one pointer and, for each, an offset in elements and a row stride: no stack,
no array of pointers. Two forms:

* rows (k <= 8): R instances at a time, an embedding a block [R, BLOCK], and a tuple of k of them. The k x k work on
  each column is unrolled.
* tiles (k > 8): one instance, all its embeddings a block [K, BLOCK], K >= 16 being a power of two. The k x k work is a
  float64 matrix product, which the tensor cores of data-centre cards take.

Sums run in float64, where the product of two float32 is exact. With PAIRS, which rows have for embeddings of up to 32
bits, they run in pairs of float32 (high, low) instead, for cards whose float64 is some 64 times slower: a product of
two float32 and its rounding error are two instructions, a sum and its rounding error six, and a pair carries 48 bits.
Since float32 has 2^±126 only, embeddings out of range are scaled by powers of two, as float64 ones are.
"""

import triton
import triton.language as tl

from .eigen import INTERPRETED, any_of, product, put, triangle
from .kspace import as_pairs, field, power_of_two

# Squares of norms between these need no scaling. In float64 the solvers square Gram entries once more; in pairs what is
# 2^-48 of an entry of C, which goes with the squares of the inverse norms, still has to be a number. Powers of two.
LEAST_SQUARE = tl.constexpr(2.0**-300)
LARGEST_SQUARE = tl.constexpr(2.0**300)
LEAST_SQUARE_OF_PAIRS = tl.constexpr(2.0**-20)
LARGEST_SQUARE_OF_PAIRS = tl.constexpr(2.0**20)


# ------------------------------------------------------------------------------------------------
# Loads
# ------------------------------------------------------------------------------------------------


@triton.jit
def lifted(x, PAIRS: tl.constexpr):
    """In float64, or in float32 with PAIRS. bfloat16 is the upper half of a float32; the interpreter's own conversion
    loses its subnormals."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32 if PAIRS else tl.float64)


@triton.jit
def widened(x):
    return lifted(x, False)


@triton.jit
def load_wide(pointers, mask):
    """float64 of what is there, 0 elsewhere."""
    return widened(tl.load(pointers, mask=mask, other=0.0))


@triton.jit
def power(exponent):
    """2^e as two factors: 2^1074 and 2^149, which lift the least subnormals, are no float64 and no float32."""
    half = tl.floor(exponent * 0.5)
    return (power_of_two(half, exponent), power_of_two(exponent - half, exponent))


@triton.jit
def times_power(x, factors):
    """x·2^e, for a block [R, BLOCK] and ``factors`` of 2^e [R]."""
    return x * factors[0][:, None] * factors[1][:, None]


@triton.jit
def load_embedding(x, offset, stride, instance, cols, inside, PAIRS: tl.constexpr):
    return lifted(tl.load(x + offset + instance[:, None] * stride + cols[None, :], mask=inside, other=0.0), PAIRS)


# ------------------------------------------------------------------------------------------------
# Sums, in float64 or in pairs of float32
# ------------------------------------------------------------------------------------------------
#
# A sum is a tuple: one block in float64, or (high, low) in float32, |low| about 2^-24 |high|. So is a coefficient.


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
    """In pairs: total + a b."""
    high, low = two_product(a, b)
    high, e = two_sum(total[0], high)
    return (high, total[1] + (low + e))


@triton.jit
def no_sum(R: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr):
    if PAIRS:
        return (tl.zeros([R, N], tl.float32), tl.zeros([R, N], tl.float32))
    else:
        return (tl.zeros([R, N], tl.float64),)


@triton.jit
def plus_dot(
    total, a, b, R: tl.constexpr, N: tl.constexpr, VECTOR: tl.constexpr, PAIRS: tl.constexpr, APART: tl.constexpr
):
    """A sum [R, N] and a · b, blocks [R, N VECTOR] of which VECTOR neighbours are in one lane (1 with PAIRS); or, with
    APART, may be in several."""
    if PAIRS:
        high, low = plus_product(total, a, b)
        s = high + low
        return (s, low - (s - high))
    else:
        ab = product(a, b) if APART else a * b
        return (total[0] + tl.sum(tl.reshape(ab, [R, N, VECTOR]), 2),)


@triton.jit
def over_lanes(total):
    """The sums [R], in float64, of what lanes [R, N] have."""
    x = total[0].to(tl.float64)
    if len(total) == 2:
        x += total[1].to(tl.float64)
    return tl.sum(x, 1)


@triton.jit
def coefficient(c, PAIRS: tl.constexpr):
    """A number of float64's as what ``plus_multiple`` multiplies by."""
    if PAIRS:
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
def rounded(total):
    """To one block."""
    if len(total) == 2:
        return total[0] + total[1]
    else:
        return total[0]


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


# Triton's time to compile goes with the number of loads and stores of blocks times that of operations. Pairs have too
# many of these; a program has one instance there, and loads and stores scalars, which do not count.


@triton.jit
def load_each(record, at, there, R: tl.constexpr, PAIRS: tl.constexpr):
    """A number of each of R instances."""
    if PAIRS:
        return tl.zeros([R], tl.float64) + tl.load(record + at)
    else:
        return tl.load(record + at, mask=there, other=0.0)


@triton.jit
def store_each(record, at, there, x, PAIRS: tl.constexpr):
    if PAIRS:
        tl.store(record + at, tl.sum(x, 0))
    else:
        tl.store(record + at, x, mask=there)


@triton.jit
def present_modality(mask, instance, there, m: tl.constexpr, k: tl.constexpr):
    """Which of the instances [R] have modality m."""
    if mask is None:
        return there
    else:
        return tl.load(mask + instance * k + m, mask=there, other=0) != 0


@triton.jit
def gram_rows(
    x, offsets, strides, mask, instance, there, scales, d, k: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, SCALED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Upper triangles of R Gram matrices, float64 blocks [R], of embeddings multiplied by ``scales``."""
    sums = ()
    for _ in tl.static_range(k * (k + 1) // 2):
        sums = sums + (no_sum(R, BLOCK // VECTOR, PAIRS),)
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        rows = ()
        for m in tl.static_range(k):
            inside = present_modality(mask, instance, there, m, k)[:, None] & (cols < d)[None, :]
            row = load_embedding(x, offsets[m], strides[m], instance, cols, inside, PAIRS)
            if SCALED:
                row = times_power(row, scales[m])
            rows = rows + (row,)
        for j in tl.static_range(k):
            for i in tl.static_range(j + 1):
                total = plus_dot(sums[triangle(i, j)], rows[i], rows[j], R, BLOCK // VECTOR, VECTOR, PAIRS, False)
                sums = put(sums, triangle(i, j), total)
    out = ()
    for at in tl.static_range(k * (k + 1) // 2):
        out = out + (over_lanes(sums[at]),)
    return out


@triton.jit
def peak_rows(
    x, offsets, strides, mask, instance, there, d, k: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The largest magnitude in each embedding, k float64 blocks [R]."""
    peaks = ()
    for _ in tl.static_range(k):
        peaks = peaks + (tl.zeros([R, BLOCK // VECTOR], tl.float32 if PAIRS else tl.float64),)
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        for m in tl.static_range(k):
            inside = present_modality(mask, instance, there, m, k)[:, None] & (cols < d)[None, :]
            row = tl.abs(load_embedding(x, offsets[m], strides[m], instance, cols, inside, PAIRS))
            peak = tl.max(tl.reshape(row, [R, BLOCK // VECTOR, VECTOR]), 2)
            peaks = put(peaks, m, tl.maximum(peaks[m], peak))
    out = ()
    for m in tl.static_range(k):
        out = out + (tl.max(peaks[m], 1).to(tl.float64),)
    return out


@triton.jit
def exponent_of(peak):
    """e with peak = f 2^e, 1/2 <= f < 1; 0 for 0 and for what is not finite, whose instance is NaN in the end."""
    normal = tl.where(peak < 2.0**-1000, peak * 2.0**60, peak)
    bits = (normal.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    e = bits - 1022 - tl.where(peak < 2.0**-1000, 60, 0)
    return tl.where((peak > 0) & (bits < 0x7FF), e, 0).to(tl.float64)


@triton.jit
def gram_phase(
    x, offsets, strides, mask, records, instance, there, d, k: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Gram matrices of R instances to their records. Where an arithmetic has not the range for the squares of its
    embeddings, they are scaled by powers of two first, one for each if they will be normalised anyway, else one for
    each instance."""
    G = gram_rows(x, offsets, strides, mask, instance, there, (), d, k, R, BLOCK, VECTOR, False, PAIRS)
    if WIDE or PAIRS:
        least = LEAST_SQUARE_OF_PAIRS if PAIRS else LEAST_SQUARE
        largest = LARGEST_SQUARE_OF_PAIRS if PAIRS else LARGEST_SQUARE
        exponents = ()
        good = there & False
        bad = there & False
        for m in tl.static_range(k):
            square = G[triangle(m, m)]
            is_present = present_modality(mask, instance, there, m, k)
            in_range = (square > least) & (square < largest)
            good = good | (is_present & in_range)
            if NORMALIZE:
                bad = bad | (is_present & (in_range == 0))
            else:
                bad = bad | (is_present & ((square < largest) == 0))
            exponents = exponents + (tl.zeros([R], tl.float64),)
        # one column in range vouches for the rest but for overflow
        flagged = bad if NORMALIZE else bad | ((good == 0) & there)
        if any_of(flagged) > 0:
            peaks = peak_rows(x, offsets, strides, mask, instance, there, d, k, R, BLOCK, VECTOR, PAIRS)
            shared = tl.zeros([R], tl.float64)
            if not NORMALIZE:
                highest = peaks[0]
                for m in tl.static_range(1, k):
                    highest = tl.maximum(highest, peaks[m])
                shared = exponent_of(highest)
            scales = ()
            for m in tl.static_range(k):
                e = tl.where(flagged, exponent_of(peaks[m]) if NORMALIZE else shared, 0.0)
                exponents = put(exponents, m, e)
                scales = scales + (power((-e).to(tl.float32 if PAIRS else tl.float64)),)
            again = gram_rows(x, offsets, strides, mask, instance, there, scales, d, k, R, BLOCK, VECTOR, True, PAIRS)
            for at in tl.static_range(k * (k + 1) // 2):
                G = put(G, at, tl.where(flagged, again[at], G[at]))
        for m in tl.static_range(k):
            store_each(records, field(k, "exponents") + m, there, exponents[m], PAIRS)
    for at in tl.static_range(k * (k + 1) // 2):
        store_each(records, field(k, "gram") + at, there, G[at], PAIRS)


@triton.jit
def combine_rows(
    x, offsets, strides, mask, coefficients, instance, there, scales, d, out, k: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, SCALED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """out (B, d) = Σ_m c_m x_m for R instances, with x_m multiplied by ``scales``."""
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total = ()
        for m in tl.static_range(k):
            inside = present_modality(mask, instance, there, m, k)[:, None] & (cols < d)[None, :]
            row = load_embedding(x, offsets[m], strides[m], instance, cols, inside, PAIRS)
            if SCALED:
                row = times_power(row, scales[m])
            total = plus_multiple(total, coefficients[m], row)
        inside = there[:, None] & (cols < d)[None, :]
        at = out + instance[:, None] * d + cols[None, :]
        tl.store(at, rounded(total).to(out.dtype.element_ty), mask=inside)


@triton.jit
def vectors_phase(
    x, offsets, strides, mask, records, instance, there, d, u, z, z_offsets, k: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """u (B, d) and the k tensors z (B, d) of R instances."""
    scales = load_scales(records, there, k, R, WIDE, PAIRS)
    if u is not None:
        coefficients = ()
        for m in tl.static_range(k):
            c = load_each(records, field(k, "weights") + m, there, R, PAIRS)
            coefficients = coefficients + (coefficient(c, PAIRS),)
        combine_rows(
            x, offsets, strides, mask, coefficients, instance, there, scales, d, u, k, R, BLOCK, WIDE or PAIRS,
            PAIRS,
        )  # fmt: skip
    if z is not None:
        for m in tl.static_range(k):
            factor = tl.full([R], 1.0, tl.float64)
            if NORMALIZE:
                factor = load_each(records, field(k, "inverse_norms") + m, there, R, PAIRS)
            is_present = present_modality(mask, instance, there, m, k)
            for start in range(0, d, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                inside = is_present[:, None] & (cols < d)[None, :]
                row = load_embedding(x, offsets[m], strides[m], instance, cols, inside, PAIRS)
                if (WIDE or PAIRS) and NORMALIZE:
                    row = times_power(row, scales[m])
                row = rounded(plus_multiple((), coefficient(factor, PAIRS), row))
                inside = there[:, None] & (cols < d)[None, :]
                at = z + z_offsets[m] + instance[:, None] * d + cols[None, :]
                tl.store(at, row.to(z.dtype.element_ty), mask=inside)


@triton.jit
def load_scales(records, there, k: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr):
    """What embeddings were multiplied by before their Gram entries were formed, as factors; nothing where they were
    not."""
    scales = ()
    if WIDE or PAIRS:
        for m in tl.static_range(k):
            e = load_each(records, field(k, "exponents") + m, there, R, PAIRS)
            scales = scales + (power((-e).to(tl.float32 if PAIRS else tl.float64)),)
    return scales


@triton.jit
def load_rows(
    x, offsets, strides, mask, instance, there, cols, d, k: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    rows = ()
    for m in tl.static_range(k):
        inside = present_modality(mask, instance, there, m, k)[:, None] & (cols < d)[None, :]
        at = x + offsets[m] + instance[:, None] * strides[m] + cols[None, :]
        rows = rows + (tl.load(at, mask=inside, other=0.0),)
    return rows


@triton.jit
def add_dots(
    sums, rows, scales, mask, grad_u, u_stride, grad_z, z_offsets, z_strides, instance, there, cols, d,
    k: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, DIRECT: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Adds to k (2 k with DIRECT) sums what one chunk has of x_m · ∂L/∂u₁ and x_m · ∂L/∂z_m."""
    inside = there[:, None] & (cols < d)[None, :]
    if grad_u is not None:
        h = lifted(tl.load(grad_u + instance[:, None] * u_stride + cols[None, :], mask=inside, other=0.0), PAIRS)
    for m in tl.static_range(k):
        row = lifted(rows[m], PAIRS)
        if WIDE or PAIRS:
            row = times_power(row, scales[m])
        if grad_u is not None:
            sums = put(sums, m, plus_dot(sums[m], row, h, R, BLOCK // VECTOR, VECTOR, PAIRS, True))
        if DIRECT:
            if z_offsets[m] is not None:
                is_present = present_modality(mask, instance, there, m, k)[:, None]
                at = grad_z + z_offsets[m] + instance[:, None] * z_strides[m] + cols[None, :]
                H = lifted(tl.load(at, mask=inside & is_present, other=0.0), PAIRS)
                sums = put(sums, k + m, plus_dot(sums[k + m], row, H, R, BLOCK // VECTOR, VECTOR, PAIRS, True))
    return sums


@triton.jit
def load_coefficient(draft, at, there, R: tl.constexpr, PAIRS: tl.constexpr):
    if PAIRS:
        high = tl.zeros([R], tl.float32) + tl.load(as_pairs(draft + at))
        return (high, tl.zeros([R], tl.float32) + tl.load(as_pairs(draft + at) + 1))
    else:
        return (tl.load(draft + at, mask=there, other=0.0),)


@triton.jit
def apply_chunk(
    rows, C, c, factors, scales, powers, mask, grad_u, u_stride, grad_z, z_offsets, z_strides, out, out_offsets,
    out_stride, instance, there, cols, d, k: tl.constexpr, R: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """dx_m = (h c_m + Σ_j C_mj x_j + f_m H_m) 2^e_m of one chunk, for the gradients that are wanted."""
    inside = there[:, None] & (cols < d)[None, :]
    wide = ()
    for m in tl.static_range(k):
        row = lifted(rows[m], PAIRS)
        if WIDE or PAIRS:
            row = times_power(row, scales[m])
        wide = wide + (row,)
    if grad_u is not None:
        h = lifted(tl.load(grad_u + instance[:, None] * u_stride + cols[None, :], mask=inside, other=0.0), PAIRS)
    for m in tl.static_range(k):
        if out_offsets[m] is not None:
            total = plus_multiple((), C[triangle(m, 0)], wide[0])
            for j in tl.static_range(1, k):
                total = plus_multiple(total, C[triangle(m, j)], wide[j])
            if grad_u is not None:
                total = plus_multiple(total, c[m], h)
            is_present = present_modality(mask, instance, there, m, k)[:, None]
            if z_offsets[m] is not None:
                at = grad_z + z_offsets[m] + instance[:, None] * z_strides[m] + cols[None, :]
                H = lifted(tl.load(at, mask=inside & is_present, other=0.0), PAIRS)
                if NORMALIZE:
                    total = plus_multiple(total, factors[m], H)
            dx = rounded(total)
            if WIDE or PAIRS:
                dx = times_power(dx, powers[m])
            if z_offsets[m] is not None:
                if not NORMALIZE:
                    dx += H
            dx = tl.where(is_present, dx, 0.0)
            if out.dtype.element_ty != tl.float64:
                dx = dx.to(tl.float32)
            at = out + out_offsets[m] + instance[:, None] * out_stride + cols[None, :]
            tl.store(at, dx.to(out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------


@triton.jit
def gathered(values, k: tl.constexpr, K: tl.constexpr):
    """k integers as one block [K]."""
    index = tl.arange(0, K)
    out = tl.zeros([K], tl.int64)
    for m in tl.static_range(k):
        if values[m] is not None:
            out = tl.where(index == m, values[m], out)
    return out


@triton.jit
def which(values, k: tl.constexpr, K: tl.constexpr):
    """Which of k integers are given, a block [K]."""
    index = tl.arange(0, K)
    out = index < 0
    for m in tl.static_range(k):
        if values[m] is not None:
            out = out | (index == m)
    return out


@triton.jit
def load_tile(x, at, present, cols, d, scale, SCALED: tl.constexpr):
    """[K, BLOCK] in float64; ``at`` [K] is where the instance's rows begin."""
    X = load_wide(x + at[:, None] + cols[None, :], present[:, None] & (cols < d)[None, :])
    if SCALED:
        X = times_power(X, scale)
    return X


@triton.jit
def opaque(X):
    """X, by way of a sum over one. For the layout of a product's operands Triton 3.6 looks back through all that is
    elementwise for the narrowest load, a mask's 8 bits or bfloat16, and then has no such layout for float64."""
    return tl.sum(X[:, :, None], 2)


@triton.jit
def gram_tile(x, at, present, scale, d, K: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr):
    G = tl.zeros([K, K], tl.float64)
    for start in range(0, d, BLOCK):
        X = opaque(load_tile(x, at, present, start + tl.arange(0, BLOCK), d, scale, SCALED))
        G = tl.dot(X, tl.trans(X), G, out_dtype=tl.float64)
    return G


@triton.jit
def gram_tile_phase(
    x, at, present, record, d, k: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """As ``gram_phase``, of one instance."""
    index = tl.arange(0, K)
    i = index[:, None]
    j = index[None, :]
    none = tl.zeros([K], tl.float64)
    G = gram_tile(x, at, present, (), d, K, BLOCK, False)
    if WIDE:
        square = tl.sum(tl.where(i == j, G, 0.0), 1)
        in_range = (square > LEAST_SQUARE) & (square < LARGEST_SQUARE)
        good = tl.max((present & in_range).to(tl.int32), 0)
        if NORMALIZE:
            flagged = tl.max((present & (in_range == 0)).to(tl.int32), 0) > 0
        else:
            overflow = tl.max((present & ((square < LARGEST_SQUARE) == 0)).to(tl.int32), 0)
            flagged = (overflow > 0) | (good == 0)
        exponents = none
        if flagged:
            peaks = none
            for start in range(0, d, BLOCK):
                X = load_tile(x, at, present, start + tl.arange(0, BLOCK), d, (), False)
                peaks = tl.maximum(peaks, tl.max(tl.abs(X), 1))
            if not NORMALIZE:
                peaks = none + tl.max(peaks, 0)
            exponents = exponent_of(peaks)
            G = gram_tile(x, at, present, power(-exponents), d, K, BLOCK, True)
        tl.store(record + field(k, "exponents") + index, exponents, mask=index < k)
    tl.store(record + field(k, "gram") + j * (j + 1) // 2 + i, G, mask=(i <= j) & (j < k))


@triton.jit
def vectors_tile_phase(
    x, at, present, record, instance, d, u, z, z_offsets, k: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As ``vectors_phase``, of one instance."""
    index = tl.arange(0, K)
    inside = index < k
    scale = ()
    if WIDE:
        scale = power(-tl.load(record + field(k, "exponents") + index, mask=inside, other=0.0))
    if u is not None:
        c = tl.load(record + field(k, "weights") + index, mask=inside, other=0.0)
        for start in range(0, d, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            X = load_tile(x, at, present, cols, d, scale, WIDE)
            total = tl.sum(product(X, c[:, None]), 0)
            tl.store(u + instance * d + cols, total.to(u.dtype.element_ty), mask=cols < d)
    if z is not None:
        factor = tl.full([K], 1.0, tl.float64)
        if NORMALIZE:
            factor = tl.load(record + field(k, "inverse_norms") + index, mask=inside, other=0.0)
        to = gathered(z_offsets, k, K) + instance * d
        for start in range(0, d, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            X = load_tile(x, at, present, cols, d, scale, WIDE and NORMALIZE) * factor[:, None]
            tl.store(
                z + to[:, None] + cols[None, :], X.to(z.dtype.element_ty), mask=inside[:, None] & (cols < d)[None, :]
            )


@triton.jit
def dots_tile(
    x, at, present, scale, grad_u, u_stride, grad_z, z_offsets, z_strides, instance, d, k: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr, DIRECT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x_m · ∂L/∂u₁ and x_m · ∂L/∂z_m, blocks [K]."""
    w = tl.zeros([K], tl.float64)
    direct = tl.zeros([K], tl.float64)
    if DIRECT:
        z_at = gathered(z_offsets, k, K) + instance * gathered(z_strides, k, K)
        z_there = which(z_offsets, k, K) & present
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        X = load_tile(x, at, present, cols, d, scale, WIDE)
        if grad_u is not None:
            h = load_wide(grad_u + instance * u_stride + cols, cols < d)
            w += tl.sum(product(X, h[None, :]), 1)
        if DIRECT:
            H = load_wide(grad_z + z_at[:, None] + cols[None, :], z_there[:, None] & (cols < d)[None, :])
            direct += tl.sum(product(X, H), 1)
    return w, direct


@triton.jit
def apply_tile(
    x, at, present, scale, C, c, factors, last, grad_u, u_stride, grad_z, z_offsets, z_strides, out, out_offsets,
    out_stride, instance, d, k: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, DIRECT: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As ``apply_chunk``, of one instance and all its columns."""
    if DIRECT:
        z_at = gathered(z_offsets, k, K) + instance * gathered(z_strides, k, K)
        z_there = which(z_offsets, k, K) & present
    to = gathered(out_offsets, k, K) + instance * out_stride
    wanted = which(out_offsets, k, K)
    C = opaque(C)
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        X = opaque(load_tile(x, at, present, cols, d, scale, WIDE))
        total = tl.dot(C, X, out_dtype=tl.float64)
        if grad_u is not None:
            h = load_wide(grad_u + instance * u_stride + cols, cols < d)
            total += c[:, None] * h[None, :]
        if DIRECT:
            H = load_wide(grad_z + z_at[:, None] + cols[None, :], z_there[:, None] & (cols < d)[None, :])
            if NORMALIZE:
                total += factors[:, None] * H
        if WIDE:
            total = times_power(total, power(last))
        if DIRECT and not NORMALIZE:
            total += H
        total = tl.where(present[:, None], total, 0.0)
        if out.dtype.element_ty != tl.float64:
            total = total.to(tl.float32)
        inside = wanted[:, None] & (cols < d)[None, :]
        tl.store(out + to[:, None] + cols[None, :], total.to(out.dtype.element_ty), mask=inside)
