"""Streams: the device functions for what is d numbers long.

Embeddings are k tensors (B, d) given as one pointer and, for each, an offset in elements and a row stride: no stack,
no array of pointers. Sums run in float64, where the product of two float32 is exact. Two forms:

* rows (k <= 8): R instances at a time, an embedding a block [R, BLOCK], and a tuple of k of them. The k x k work on
  each column is unrolled.
* tiles (k > 8): one instance, all its embeddings a block [K, BLOCK], K >= 16 being a power of two. The k x k work is a
  float64 matrix product, which the tensor cores of data-centre cards take.
"""

import triton
import triton.language as tl

from .eigen import any_of, put, triangle
from .kspace import field, power_of_two

# Squares of norms between these need no scaling: the solvers square Gram entries once more. Powers of two.
LEAST_SQUARE = tl.constexpr(2.0**-300)
LARGEST_SQUARE = tl.constexpr(2.0**300)


# ------------------------------------------------------------------------------------------------
# Streams: what is d numbers long
# ------------------------------------------------------------------------------------------------


@triton.jit
def widened(x):
    """In float64. bfloat16 is the upper half of a float32; the interpreter's own conversion loses its subnormals."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float64)


@triton.jit
def load_wide(pointers, mask):
    """float64 of what is there, 0 elsewhere."""
    return widened(tl.load(pointers, mask=mask, other=0.0))


@triton.jit
def times_power(x, exponent):
    half = tl.floor(exponent * 0.5)
    return x * power_of_two(half)[:, None] * power_of_two(exponent - half)[:, None]


@triton.jit
def load_embedding(x, offset, stride, instance, cols, inside):
    return load_wide(x + offset + instance[:, None] * stride + cols[None, :], inside)


@triton.jit
def present_modality(mask, instance, there, m: tl.constexpr, k: tl.constexpr):
    """Which of the instances [R] have modality m."""
    if mask is None:
        return there
    else:
        return tl.load(mask + instance * k + m, mask=there, other=0) != 0


@triton.jit
def gram_rows(
    x, offsets, strides, mask, instance, there, exponents, d, k: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, SCALED: tl.constexpr, PEAKS: tl.constexpr,
):  # fmt: skip
    """Upper triangles of R Gram matrices, blocks [R]; with PEAKS instead the largest magnitude in each embedding."""
    sums = ()
    for _ in tl.static_range(k if PEAKS else k * (k + 1) // 2):
        sums = sums + (tl.zeros([R, BLOCK // VECTOR], tl.float64),)
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        rows = ()
        for m in tl.static_range(k):
            inside = present_modality(mask, instance, there, m, k)[:, None] & (cols < d)[None, :]
            row = load_embedding(x, offsets[m], strides[m], instance, cols, inside)
            if SCALED:
                row = times_power(row, -exponents[m])
            rows = rows + (row,)
        for j in tl.static_range(k):
            if PEAKS:
                peak = tl.max(tl.reshape(tl.abs(rows[j]), [R, BLOCK // VECTOR, VECTOR]), 2)
                sums = put(sums, j, tl.maximum(sums[j], peak))
            else:
                for i in tl.static_range(j + 1):
                    part = tl.sum(tl.reshape(rows[i] * rows[j], [R, BLOCK // VECTOR, VECTOR]), 2)
                    sums = put(sums, triangle(i, j), sums[triangle(i, j)] + part)
    out = ()
    for at in tl.static_range(k if PEAKS else k * (k + 1) // 2):
        if PEAKS:
            out = out + (tl.max(sums[at], 1),)
        else:
            out = out + (tl.sum(sums[at], 1),)
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
    VECTOR: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gram matrices of R instances to their records; float64 embeddings whose squares leave float64's range are
    scaled by powers of two first, one for each if they will be normalised anyway, else one for each instance."""
    G = gram_rows(x, offsets, strides, mask, instance, there, (), d, k, R, BLOCK, VECTOR, False, False)
    if WIDE:
        exponents = ()
        good = there & False
        bad = there & False
        for m in tl.static_range(k):
            square = G[triangle(m, m)]
            is_present = present_modality(mask, instance, there, m, k)
            in_range = (square > LEAST_SQUARE) & (square < LARGEST_SQUARE)
            good = good | (is_present & in_range)
            if NORMALIZE:
                bad = bad | (is_present & (in_range == 0))
            else:
                bad = bad | (is_present & ((square < LARGEST_SQUARE) == 0))
            exponents = exponents + (tl.zeros([R], tl.float64),)
        # one column in range vouches for the rest but for overflow
        flagged = bad if NORMALIZE else bad | ((good == 0) & there)
        if any_of(flagged) > 0:
            peaks = gram_rows(x, offsets, strides, mask, instance, there, (), d, k, R, BLOCK, VECTOR, False, True)
            shared = tl.zeros([R], tl.float64)
            if not NORMALIZE:
                highest = peaks[0]
                for m in tl.static_range(1, k):
                    highest = tl.maximum(highest, peaks[m])
                shared = exponent_of(highest)
            for m in tl.static_range(k):
                e = exponent_of(peaks[m]) if NORMALIZE else shared
                exponents = put(exponents, m, tl.where(flagged, e, 0.0))
            again = gram_rows(
                x, offsets, strides, mask, instance, there, exponents, d, k, R, BLOCK, VECTOR, True, False
            )
            for at in tl.static_range(k * (k + 1) // 2):
                G = put(G, at, tl.where(flagged, again[at], G[at]))
        for m in tl.static_range(k):
            tl.store(records + field(k, "exponents") + m, exponents[m], mask=there)
    for at in tl.static_range(k * (k + 1) // 2):
        tl.store(records + field(k, "gram") + at, G[at], mask=there)


@triton.jit
def combine_rows(
    x, offsets, strides, mask, coefficients, instance, there, exponents, d, out, k: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out (B, d) = Σ_m c_m x_m for R instances; ``coefficients`` are k blocks [R]."""
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total = tl.zeros([R, BLOCK], tl.float64)
        for m in tl.static_range(k):
            inside = present_modality(mask, instance, there, m, k)[:, None] & (cols < d)[None, :]
            row = load_embedding(x, offsets[m], strides[m], instance, cols, inside)
            if SCALED:
                row = times_power(row, -exponents[m])
            total += coefficients[m][:, None] * row
        inside = there[:, None] & (cols < d)[None, :]
        tl.store(out + instance[:, None] * d + cols[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def vectors_phase(
    x, offsets, strides, mask, records, instance, there, d, u, z, z_offsets, k: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """u (B, d) and the k tensors z (B, d) of R instances."""
    exponents = load_exponents(records, there, k, WIDE)
    if u is not None:
        coefficients = ()
        for m in tl.static_range(k):
            coefficients = coefficients + (tl.load(records + field(k, "weights") + m, mask=there, other=0.0),)
        combine_rows(
            x, offsets, strides, mask, coefficients, instance, there, exponents, d, u, k, R, BLOCK, WIDE
        )  # fmt: skip
    if z is not None:
        for m in tl.static_range(k):
            factor = tl.full([R], 1.0, tl.float64)
            if NORMALIZE:
                factor = tl.load(records + field(k, "inverse_norms") + m, mask=there, other=0.0)
            is_present = present_modality(mask, instance, there, m, k)
            for start in range(0, d, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                inside = is_present[:, None] & (cols < d)[None, :]
                row = load_embedding(x, offsets[m], strides[m], instance, cols, inside)
                if WIDE and NORMALIZE:
                    row = times_power(row, -exponents[m])
                inside = there[:, None] & (cols < d)[None, :]
                at = z + z_offsets[m] + instance[:, None] * d + cols[None, :]
                tl.store(at, (row * factor[:, None]).to(z.dtype.element_ty), mask=inside)


@triton.jit
def load_exponents(records, there, k: tl.constexpr, WIDE: tl.constexpr):
    exponents = ()
    if WIDE:
        for m in tl.static_range(k):
            exponents = exponents + (tl.load(records + field(k, "exponents") + m, mask=there, other=0.0),)
    return exponents


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
    sums, rows, exponents, mask, grad_u, u_stride, grad_z, z_offsets, z_strides, instance, there, cols, d,
    k: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, DIRECT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Adds to k (2 k with DIRECT) partial sums what one chunk has of x_m · ∂L/∂u₁ and x_m · ∂L/∂z_m."""
    inside = there[:, None] & (cols < d)[None, :]
    if grad_u is not None:
        h = load_wide(grad_u + instance[:, None] * u_stride + cols[None, :], inside)
    for m in tl.static_range(k):
        row = widened(rows[m])
        if WIDE:
            row = times_power(row, -exponents[m])
        if grad_u is not None:
            sums = put(sums, m, sums[m] + tl.sum(tl.reshape(row * h, [R, BLOCK // VECTOR, VECTOR]), 2))
        if DIRECT:
            if z_offsets[m] is not None:
                is_present = present_modality(mask, instance, there, m, k)[:, None]
                at = grad_z + z_offsets[m] + instance[:, None] * z_strides[m] + cols[None, :]
                H = load_wide(at, inside & is_present)
                sums = put(sums, k + m, sums[k + m] + tl.sum(tl.reshape(row * H, [R, BLOCK // VECTOR, VECTOR]), 2))
    return sums


@triton.jit
def apply_chunk(
    rows, C, c, factors, exponents, last, mask, grad_u, u_stride, grad_z, z_offsets, z_strides, out, out_offsets,
    out_stride, instance, there, cols, d, k: tl.constexpr, R: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dx_m = (h c_m + Σ_j C_mj x_j + f_m H_m) 2^e_m of one chunk, for the gradients that are wanted."""
    inside = there[:, None] & (cols < d)[None, :]
    wide = ()
    for m in tl.static_range(k):
        row = widened(rows[m])
        if WIDE:
            row = times_power(row, -exponents[m])
        wide = wide + (row,)
    if grad_u is not None:
        h = load_wide(grad_u + instance[:, None] * u_stride + cols[None, :], inside)
    for m in tl.static_range(k):
        if out_offsets[m] is not None:
            total = C[triangle(m, 0)][:, None] * wide[0]
            for j in tl.static_range(1, k):
                total += C[triangle(m, j)][:, None] * wide[j]
            if grad_u is not None:
                total += c[m][:, None] * h
            is_present = present_modality(mask, instance, there, m, k)[:, None]
            if z_offsets[m] is not None:
                at = grad_z + z_offsets[m] + instance[:, None] * z_strides[m] + cols[None, :]
                H = load_wide(at, inside & is_present)
                if NORMALIZE:
                    total += factors[m][:, None] * H
            if WIDE:
                total = times_power(total, last[m])
            if z_offsets[m] is not None:
                if not NORMALIZE:
                    total += H
            total = tl.where(is_present, total, 0.0)
            if out.dtype.element_ty != tl.float64:
                total = total.to(tl.float32)
            at = out + out_offsets[m] + instance[:, None] * out_stride + cols[None, :]
            tl.store(at, total.to(out.dtype.element_ty), mask=inside)


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
def tile_times_power(X, exponents):
    half = tl.floor(exponents * 0.5)
    return X * power_of_two(half)[:, None] * power_of_two(exponents - half)[:, None]


@triton.jit
def load_tile(x, at, present, cols, d, exponents, SCALED: tl.constexpr):
    """[K, BLOCK] in float64; ``at`` [K] is where the instance's rows begin."""
    X = load_wide(x + at[:, None] + cols[None, :], present[:, None] & (cols < d)[None, :])
    if SCALED:
        X = tile_times_power(X, -exponents)
    return X


@triton.jit
def gram_tile(x, at, present, exponents, d, K: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr):
    G = tl.zeros([K, K], tl.float64)
    for start in range(0, d, BLOCK):
        X = load_tile(x, at, present, start + tl.arange(0, BLOCK), d, exponents, SCALED)
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
    G = gram_tile(x, at, present, none, d, K, BLOCK, False)
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
                X = load_tile(x, at, present, start + tl.arange(0, BLOCK), d, none, False)
                peaks = tl.maximum(peaks, tl.max(tl.abs(X), 1))
            if not NORMALIZE:
                peaks = none + tl.max(peaks, 0)
            exponents = exponent_of(peaks)
            G = gram_tile(x, at, present, exponents, d, K, BLOCK, True)
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
    exponents = tl.zeros([K], tl.float64)
    if WIDE:
        exponents = tl.load(record + field(k, "exponents") + index, mask=inside, other=0.0)
    if u is not None:
        c = tl.load(record + field(k, "weights") + index, mask=inside, other=0.0)
        for start in range(0, d, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            X = load_tile(x, at, present, cols, d, exponents, WIDE)
            total = tl.sum(c[:, None] * X, 0)
            tl.store(u + instance * d + cols, total.to(u.dtype.element_ty), mask=cols < d)
    if z is not None:
        factor = tl.full([K], 1.0, tl.float64)
        if NORMALIZE:
            factor = tl.load(record + field(k, "inverse_norms") + index, mask=inside, other=0.0)
        to = gathered(z_offsets, k, K) + instance * d
        for start in range(0, d, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            X = load_tile(x, at, present, cols, d, exponents, WIDE and NORMALIZE) * factor[:, None]
            tl.store(
                z + to[:, None] + cols[None, :], X.to(z.dtype.element_ty), mask=inside[:, None] & (cols < d)[None, :]
            )


@triton.jit
def dots_tile(
    x, at, present, exponents, grad_u, u_stride, grad_z, z_offsets, z_strides, instance, d, k: tl.constexpr,
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
        X = load_tile(x, at, present, cols, d, exponents, WIDE)
        if grad_u is not None:
            h = load_wide(grad_u + instance * u_stride + cols, cols < d)
            w += tl.sum(X * h[None, :], 1)
        if DIRECT:
            H = load_wide(grad_z + z_at[:, None] + cols[None, :], z_there[:, None] & (cols < d)[None, :])
            direct += tl.sum(X * H, 1)
    return w, direct


@triton.jit
def apply_tile(
    x, at, present, exponents, C, c, factors, last, grad_u, u_stride, grad_z, z_offsets, z_strides, out, out_offsets,
    out_stride, instance, d, k: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, DIRECT: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As ``apply_chunk``, of one instance and all its columns."""
    if DIRECT:
        z_at = gathered(z_offsets, k, K) + instance * gathered(z_strides, k, K)
        z_there = which(z_offsets, k, K) & present
    to = gathered(out_offsets, k, K) + instance * out_stride
    wanted = which(out_offsets, k, K)
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        X = load_tile(x, at, present, cols, d, exponents, WIDE)
        total = tl.dot(C, X, out_dtype=tl.float64)
        if grad_u is not None:
            h = load_wide(grad_u + instance * u_stride + cols, cols < d)
            total += c[:, None] * h[None, :]
        if DIRECT:
            H = load_wide(grad_z + z_at[:, None] + cols[None, :], z_there[:, None] & (cols < d)[None, :])
            if NORMALIZE:
                total += factors[:, None] * H
        if WIDE:
            total = tile_times_power(total, last)
        if DIRECT and not NORMALIZE:
            total += H
        total = tl.where(present[:, None], total, 0.0)
        if out.dtype.element_ty != tl.float64:
            total = total.to(tl.float32)
        inside = wanted[:, None] & (cols < d)[None, :]
        tl.store(out + to[:, None] + cols[None, :], total.to(out.dtype.element_ty), mask=inside)
