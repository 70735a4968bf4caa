"""Passes over d: the device functions for what is d numbers long.

Embeddings are k tensors (B, d) given as one pointer and, for each, an offset in elements and a row stride: no stack,
no array of pointers. Two forms:

* rows (k <= 8): R instances at a time, an embedding a block [R, BLOCK], and a tuple of k of them. The k x k work on
  each column is unrolled. Sums in float64, or in double_float.
* tiles (k > 8): one instance, all its embeddings a block [K, BLOCK], K >= 16 being a power of two. The k x k work is a
  float64 matrix product, which the tensor cores of data-centre cards take.

``MODE`` and ``STEP`` are those of ``arguments``; R and BLOCK are the step's rows and columns.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...triton.double_float import (
    coefficient,
    exponent_of,
    lifted,
    no_sum,
    over_lanes,
    plus_dot,
    plus_dot_of_sum,
    plus_multiple,
    plus_multiple_of_sum,
    power,
    rounded,
    times_power,
    to_float64,
)
from ...triton.eigen import any_of, product, put, triangle
from ...triton.record import (
    load_coefficient,
    load_each,
    load_vector,
    own,
    presence,
    store_each,
    store_symmetric,
    store_vector,
)

# Squares of norms between these need no scaling. In float64 the solvers square Gram entries once more; in double_float
# what is 2^-48 of an entry of C, which goes with the squares of the inverse norms, still has to be a number.
LEAST_SQUARE = tl.constexpr(2.0**-300)
LARGEST_SQUARE = tl.constexpr(2.0**300)
LEAST_SQUARE_OF_DOUBLE_FLOAT = tl.constexpr(2.0**-20)
LARGEST_SQUARE_OF_DOUBLE_FLOAT = tl.constexpr(2.0**20)


# ------------------------------------------------------------------------------------------------
# Rows: loads
# ------------------------------------------------------------------------------------------------


@triton.jit
def load_row(x, m, mask, at, cols, d, k: tl.constexpr):
    """One chunk of embedding m of R instances, as it is, [R, BLOCK]: 0 where it is absent or ends."""
    inside = presence(mask, at.index, m, at.there, k)[:, None] & (cols < d)[None, :]
    pointers = x.pointer + x.offsets[m] + at.index[:, None] * x.strides[m] + cols[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_rows(x, mask, at, cols, d, k: tl.constexpr):
    rows = ()
    for m in tl.static_range(k):
        rows = rows + (load_row(x, m, mask, at, cols, d, k),)
    return rows


@triton.jit
def lifted_rows(rows, scales, MODE: tl.constexpr):
    """The rows of k embeddings in the arithmetic's numbers, multiplied by ``scales``, if there are any."""
    xs = ()
    for m in tl.static_range(MODE.k):
        row = lifted(rows[m], MODE.double_float)
        if MODE.scaled:
            row = times_power(row, scales[m])
        xs = xs + (row,)
    return xs


@triton.jit
def load_scales(records, there, MODE: tl.constexpr, STEP: tl.constexpr):
    """What embeddings were multiplied by before their Gram entries were formed, as factors; nothing where they were
    not. ``records`` are a program's ``own``."""
    scales = ()
    if MODE.scaled:
        for m in tl.static_range(MODE.k):
            e = load_each(records + MODE.record.exponents + m, there, STEP.rows, MODE.double_float)
            scales = scales + (power((-e).to(tl.float32 if MODE.double_float else tl.float64)),)
    return scales


@triton.jit
def load_incoming(grad_u, at, cols, inside, MODE: tl.constexpr):
    """One chunk of ∂L/∂u₁ of R instances."""
    pointers = grad_u.pointer + at.index[:, None] * grad_u.strides[0] + cols[None, :]
    return lifted(tl.load(pointers, mask=inside, other=0.0), MODE.double_float)


@triton.jit
def load_incoming_row(grad_z, m: tl.constexpr, mask, at, cols, inside, MODE: tl.constexpr):
    """One chunk of ∂L/∂z_m of R instances, 0 where modality m is absent."""
    is_present = presence(mask, at.index, m, at.there, MODE.k)[:, None]
    pointers = grad_z.pointer + grad_z.offsets[m] + at.index[:, None] * grad_z.strides[m] + cols[None, :]
    return lifted(tl.load(pointers, mask=inside & is_present, other=0.0), MODE.double_float)


class Others(NamedTuple):
    """Coefficients of R instances for w_m = (Y − s_m x_m) r_m, Y = Σ_j s_j x_j: s = |v₁|/n, r = 1/‖y‖ or 0."""

    shares: Any
    inverses: Any


@triton.jit
def load_others(records, there, MODE: tl.constexpr, STEP: tl.constexpr):
    """``records`` are a program's ``own``."""
    D: tl.constexpr = MODE.double_float
    shares = ()
    inverses = ()
    for m in tl.static_range(MODE.k):
        share = tl.abs(load_each(records + MODE.record.leading + m, there, STEP.rows, D))
        if MODE.normalize:
            share = share * load_each(records + MODE.record.inverse_norms + m, there, STEP.rows, D)
        shares = shares + (coefficient(share, D),)
        inverses = inverses + (coefficient(load_each(records + MODE.record.others + m, there, STEP.rows, D), D),)
    return Others(shares, inverses)


@triton.jit
def load_incoming_other(grad_w, m: tl.constexpr, at, cols, inside):
    """One chunk of ∂L/∂w_m of R instances, as it is: also where modality m is absent, since w_m is not its own."""
    pointers = grad_w.pointer + grad_w.offsets[m] + at.index[:, None] * grad_w.strides[m] + cols[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_incoming_others(grad_w, at, cols, inside, MODE: tl.constexpr):
    """Of all k of them."""
    rows = ()
    for m in tl.static_range(MODE.k):
        rows = rows + (load_incoming_other(grad_w, m, at, cols, inside),)
    return rows


@triton.jit
def combined(rows, coefficients, MODE: tl.constexpr):
    """Σ_m c_m x_m of one chunk, a sum."""
    total = ()
    for m in tl.static_range(MODE.k):
        total = plus_multiple(total, coefficients[m], lifted(rows[m], MODE.double_float))
    return total


# ------------------------------------------------------------------------------------------------
# Rows: forward
# ------------------------------------------------------------------------------------------------


@triton.jit
def gram_rows(x, mask, at, scales, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """Upper triangles of R Gram matrices, float64 blocks [R], of embeddings multiplied by ``scales``, if given."""
    k: tl.constexpr = MODE.k
    sums = ()
    for _ in tl.static_range(k * (k + 1) // 2):
        sums = sums + (no_sum(STEP.rows, STEP.columns // STEP.vector, MODE.double_float),)
    for start in range(0, d, STEP.columns):
        cols = start + tl.arange(0, STEP.columns)
        rows = ()
        for m in tl.static_range(k):
            row = lifted(load_row(x, m, mask, at, cols, d, k), MODE.double_float)
            if len(scales) > 0:
                row = times_power(row, scales[m])
            rows = rows + (row,)
        for j in tl.static_range(k):
            for i in tl.static_range(j + 1):
                sums = put(sums, triangle(i, j), plus_dot(sums[triangle(i, j)], rows[i], rows[j], STEP, False))
    out = ()
    for n in tl.static_range(k * (k + 1) // 2):
        out = out + (over_lanes(sums[n]),)
    return out


@triton.jit
def peak_rows(x, mask, at, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """The largest magnitude in each embedding, k float64 blocks [R]."""
    k: tl.constexpr = MODE.k
    R: tl.constexpr = STEP.rows
    N: tl.constexpr = STEP.columns // STEP.vector
    peaks = ()
    for _ in tl.static_range(k):
        peaks = peaks + (tl.zeros([R, N], tl.float32 if MODE.double_float else tl.float64),)
    for start in range(0, d, STEP.columns):
        cols = start + tl.arange(0, STEP.columns)
        for m in tl.static_range(k):
            row = tl.abs(lifted(load_row(x, m, mask, at, cols, d, k), MODE.double_float))
            peaks = put(peaks, m, tl.maximum(peaks[m], tl.max(tl.reshape(row, [R, N, STEP.vector]), 2)))
    out = ()
    for m in tl.static_range(k):
        out = out + (tl.max(peaks[m], 1).to(tl.float64),)
    return out


@triton.jit
def out_of_range(G, mask, at, MODE: tl.constexpr):
    """Which of R instances have squares of norms for which the arithmetic has not the range."""
    least = LEAST_SQUARE_OF_DOUBLE_FLOAT if MODE.double_float else LEAST_SQUARE
    largest = LARGEST_SQUARE_OF_DOUBLE_FLOAT if MODE.double_float else LARGEST_SQUARE
    good = at.there & False
    bad = at.there & False
    for m in tl.static_range(MODE.k):
        square = G[triangle(m, m)]
        is_present = presence(mask, at.index, m, at.there, MODE.k)
        in_range = (square > least) & (square < largest)
        good = good | (is_present & in_range)
        if MODE.normalize:
            bad = bad | (is_present & (in_range == 0))
        else:
            bad = bad | (is_present & ((square < largest) == 0))
    # one column in range vouches for the rest but for overflow
    return bad if MODE.normalize else bad | ((good == 0) & at.there)


@triton.jit
def gram_phase(x, mask, state, at, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """Gram matrices of R instances to their records. Where an arithmetic has not the range for the squares of its
    embeddings, they are scaled by powers of two first, one for each if they will be normalised anyway, else one for
    each instance."""
    k: tl.constexpr = MODE.k
    records = own(state, at, MODE)
    G = gram_rows(x, mask, at, (), d, MODE, STEP)
    if MODE.scaled:
        exponents = ()
        for _ in tl.static_range(k):
            exponents = exponents + (tl.zeros([STEP.rows], tl.float64),)
        flagged = out_of_range(G, mask, at, MODE)
        if any_of(flagged) > 0:
            peaks = peak_rows(x, mask, at, d, MODE, STEP)
            shared = tl.zeros([STEP.rows], tl.float64)
            if not MODE.normalize:
                highest = peaks[0]
                for m in tl.static_range(1, k):
                    highest = tl.maximum(highest, peaks[m])
                shared = exponent_of(highest)
            scales = ()
            for m in tl.static_range(k):
                e = tl.where(flagged, exponent_of(peaks[m]) if MODE.normalize else shared, 0.0)
                exponents = put(exponents, m, e)
                scales = scales + (power((-e).to(tl.float32 if MODE.double_float else tl.float64)),)
            again = gram_rows(x, mask, at, scales, d, MODE, STEP)
            for n in tl.static_range(k * (k + 1) // 2):
                G = put(G, n, tl.where(flagged, again[n], G[n]))
        for m in tl.static_range(k):
            store_each(records + MODE.record.exponents + m, at.there, exponents[m], MODE.double_float)
    for n in tl.static_range(k * (k + 1) // 2):
        store_each(records + MODE.record.gram + n, at.there, G[n], MODE.double_float)


@triton.jit
def combine_rows(x, mask, at, coefficients, scales, out, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """out (B, d) = Σ_m c_m x_m for R instances, with x_m multiplied by ``scales``, if given."""
    for start in range(0, d, STEP.columns):
        cols = start + tl.arange(0, STEP.columns)
        total = ()
        for m in tl.static_range(MODE.k):
            row = lifted(load_row(x, m, mask, at, cols, d, MODE.k), MODE.double_float)
            if MODE.scaled:
                row = times_power(row, scales[m])
            total = plus_multiple(total, coefficients[m], row)
        pointers = out + at.index[:, None] * d + cols[None, :]
        tl.store(pointers, rounded(total).to(out.dtype.element_ty), mask=at.there[:, None] & (cols < d)[None, :])


@triton.jit
def load_factor(records, m: tl.constexpr, there, MODE: tl.constexpr, STEP: tl.constexpr):
    """What x_m is multiplied by to be z_m."""
    if MODE.normalize:
        return load_each(records + MODE.record.inverse_norms + m, there, STEP.rows, MODE.double_float)
    else:
        return tl.full([STEP.rows], 1.0, tl.float64)


@triton.jit
def store_unit(z, m: tl.constexpr, row, factor, at, cols, d, MODE: tl.constexpr):
    """One chunk of z_m, the row of x_m times its factor."""
    row = rounded(plus_multiple((), coefficient(factor, MODE.double_float), row))
    pointers = z.pointer + z.offsets[m] + at.index[:, None] * z.stride + cols[None, :]
    inside = at.there[:, None] & (cols < d)[None, :]
    tl.store(pointers, row.to(z.pointer.dtype.element_ty), mask=inside)


@triton.jit
def others_rows(x, mask, at, records, scales, z, w, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """w_m (B, d) = (Y − s_m x_m) r_m for R instances, Y = Σ_j s_j x_j; and the z_m, if given, from the same loads. What
    cancels is at most 2^12 times what is left, which sums have the digits for."""
    k: tl.constexpr = MODE.k
    others = load_others(records, at.there, MODE, STEP)
    factors = ()
    if z is not None:
        for m in tl.static_range(k):
            factors = factors + (load_factor(records, m, at.there, MODE, STEP),)
    for start in range(0, d, STEP.columns):
        cols = start + tl.arange(0, STEP.columns)
        rows = ()
        for m in tl.static_range(k):
            row = lifted(load_row(x, m, mask, at, cols, d, k), MODE.double_float)
            if z is not None:
                if not MODE.normalize:
                    store_unit(z, m, row, factors[m], at, cols, d, MODE)
            if MODE.scaled:
                row = times_power(row, scales[m])
            if z is not None:
                if MODE.normalize:
                    store_unit(z, m, row, factors[m], at, cols, d, MODE)
            rows = rows + (row,)
        Y = combined(rows, others.shares, MODE)
        for m in tl.static_range(k):
            rest = rounded(plus_multiple(Y, others.shares[m], -rows[m]))
            found = rounded(plus_multiple((), others.inverses[m], rest))
            pointers = w.pointer + w.offsets[m] + at.index[:, None] * w.stride + cols[None, :]
            tl.store(pointers, found.to(w.pointer.dtype.element_ty), mask=at.there[:, None] & (cols < d)[None, :])


@triton.jit
def vectors_phase(x, mask, state, at, u, z, w, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """u (B, d), the k tensors z (B, d) and the k tensors w (B, d) of R instances."""
    records = own(state, at, MODE)
    scales = load_scales(records, at.there, MODE, STEP)
    if u is not None:
        coefficients = ()
        for m in tl.static_range(MODE.k):
            c = load_each(records + MODE.record.weights + m, at.there, STEP.rows, MODE.double_float)
            coefficients = coefficients + (coefficient(c, MODE.double_float),)
        combine_rows(x, mask, at, coefficients, scales, u, d, MODE, STEP)
    if w is not None:
        others_rows(x, mask, at, records, scales, z, w, d, MODE, STEP)
    elif z is not None:
        for m in tl.static_range(MODE.k):
            factor = load_factor(records, m, at.there, MODE, STEP)
            for start in range(0, d, STEP.columns):
                cols = start + tl.arange(0, STEP.columns)
                row = lifted(load_row(x, m, mask, at, cols, d, MODE.k), MODE.double_float)
                if MODE.scaled and MODE.normalize:
                    row = times_power(row, scales[m])
                store_unit(z, m, row, factor, at, cols, d, MODE)


# ------------------------------------------------------------------------------------------------
# Rows: backward
# ------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """dx_m = (h c_m + Σ_j C_mj x_j + f_m H_m + s_m (Σ_j r_j g_j − r_m g_m)) 2^e_m, tuples of coefficients of R
    instances; empty ones are not needed."""

    C: Any
    c: Any
    factors: Any
    powers: Any  # of 2^e
    others: Any  # s and r


@triton.jit
def add_dots(sums, rows, scales, mask, grad_u, grad_z, at, cols, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """Adds to k (2 k with ``grad_z``) sums what one chunk has of x_m · ∂L/∂u₁ and x_m · ∂L/∂z_m."""
    k: tl.constexpr = MODE.k
    inside = at.there[:, None] & (cols < d)[None, :]
    if grad_u is not None:
        h = load_incoming(grad_u, at, cols, inside, MODE)
    for m in tl.static_range(k):
        row = lifted(rows[m], MODE.double_float)
        if MODE.scaled:
            row = times_power(row, scales[m])
        if grad_u is not None:
            sums = put(sums, m, plus_dot(sums[m], row, h, STEP, True))
        if grad_z is not None:
            H = load_incoming_row(grad_z, m, mask, at, cols, inside, MODE)
            sums = put(sums, k + m, plus_dot(sums[k + m], row, H, STEP, True))
    return sums


@triton.jit
def add_dots_of_others(
    sums, first: tl.constexpr, rows, scales, others, grad_w, at, cols, d, MODE: tl.constexpr, STEP: tl.constexpr
):
    """Adds to 3 k sums, from ``first`` on, what one chunk has of x_m · R, x_m · g_m and Y · g_m, g_m = ∂L/∂w_m,
    R = Σ_m r_m g_m, Y = Σ_m s_m x_m."""
    k: tl.constexpr = MODE.k
    inside = at.there[:, None] & (cols < d)[None, :]
    xs = lifted_rows(rows, scales, MODE)
    grads = load_incoming_others(grad_w, at, cols, inside, MODE)
    R = combined(grads, others.inverses, MODE)
    Y = combined(xs, others.shares, MODE)
    for m in tl.static_range(k):
        sums = put(sums, first + m, plus_dot_of_sum(sums[first + m], R, xs[m], STEP))
        g = lifted(grads[m], MODE.double_float)
        sums = put(sums, first + k + m, plus_dot(sums[first + k + m], xs[m], g, STEP, True))
        sums = put(sums, first + 2 * k + m, plus_dot_of_sum(sums[first + 2 * k + m], Y, g, STEP))
    return sums


@triton.jit
def load_linear(
    coefficients, records, there, THROUGH_U: tl.constexpr, FACTORS: tl.constexpr, OTHERS: tl.constexpr,
    MODE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """What ``algebra.store_coefficients`` has left, of R instances."""
    k: tl.constexpr = MODE.k
    D: tl.constexpr = MODE.double_float
    shares = ()
    inverses = ()
    C = ()
    c = ()
    factors = ()
    powers = ()
    for n in tl.static_range(k * (k + 1) // 2):
        C = C + (load_coefficient(coefficients + MODE.coefficients.C + n, there, R, D),)
    for m in tl.static_range(k):
        if THROUGH_U:
            c = c + (load_coefficient(coefficients + MODE.coefficients.c + m, there, R, D),)
        if FACTORS:
            factors = factors + (load_coefficient(coefficients + MODE.coefficients.factors + m, there, R, D),)
        if MODE.scaled:
            e = load_each(coefficients + MODE.coefficients.exponents + m, there, R, D)
            powers = powers + (power(e.to(tl.float32 if D else tl.float64)),)
        if OTHERS:
            shares = shares + (load_coefficient(coefficients + MODE.coefficients.shares + m, there, R, D),)
            inverses = inverses + (coefficient(load_each(records + MODE.record.others + m, there, R, D), D),)
    return Linear(C, c, factors, powers, Others(shares, inverses))


@triton.jit
def apply_chunk(rows, linear, scales, mask, grad_u, grad_z, grad_w, out, at, cols, d, MODE: tl.constexpr):
    """The gradients dx_m of one chunk that are wanted, by ``Linear``."""
    k: tl.constexpr = MODE.k
    inside = at.there[:, None] & (cols < d)[None, :]
    xs = lifted_rows(rows, scales, MODE)
    if grad_u is not None:
        h = load_incoming(grad_u, at, cols, inside, MODE)
    if grad_w is not None:
        grads = load_incoming_others(grad_w, at, cols, inside, MODE)
        R = combined(grads, linear.others.inverses, MODE)
    for m in tl.static_range(k):
        if out.offsets[m] is not None:
            total = plus_multiple((), linear.C[triangle(m, 0)], xs[0])
            for j in tl.static_range(1, k):
                total = plus_multiple(total, linear.C[triangle(m, j)], xs[j])
            if grad_u is not None:
                total = plus_multiple(total, linear.c[m], h)
            if grad_w is not None:
                g = lifted(load_incoming_other(grad_w, m, at, cols, inside), MODE.double_float)
                rest = plus_multiple(R, linear.others.inverses[m], -g)
                total = plus_multiple_of_sum(total, linear.others.shares[m], rest)
            if grad_z is not None:
                H = load_incoming_row(grad_z, m, mask, at, cols, inside, MODE)
                if MODE.normalize:
                    total = plus_multiple(total, linear.factors[m], H)
            dx = rounded(total)
            if MODE.scaled:
                dx = times_power(dx, linear.powers[m])
            if grad_z is not None:
                if not MODE.normalize:
                    dx += H
            dx = tl.where(presence(mask, at.index, m, at.there, k)[:, None], dx, 0.0)
            if out.pointer.dtype.element_ty != tl.float64:
                dx = dx.to(tl.float32)
            pointers = out.pointer + out.offsets[m] + at.index[:, None] * out.stride + cols[None, :]
            tl.store(pointers, dx.to(out.pointer.dtype.element_ty), mask=inside)


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


class Tile(NamedTuple):
    """One instance, and of its embeddings, a block [K] each: where they begin, and which there are."""

    instance: Any
    at: Any
    present: Any


@triton.jit
def tile_of(x, mask, MODE: tl.constexpr):
    """Of the program's instance."""
    k: tl.constexpr = MODE.k
    K: tl.constexpr = MODE.K
    one = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, K)
    at = gathered(x.offsets, k, K) + one * gathered(x.strides, k, K)
    return Tile(one, at, presence(mask, one, index, index >= 0, k))


@triton.jit
def load_tile(x, tile, cols, d, scale):
    """[K, BLOCK] in float64, multiplied by ``scale``, if given."""
    inside = tile.present[:, None] & (cols < d)[None, :]
    X = to_float64(tl.load(x.pointer + tile.at[:, None] + cols[None, :], mask=inside, other=0.0))
    if len(scale) > 0:
        X = times_power(X, scale)
    return X


@triton.jit
def load_incoming_tile(grad_z, tile, cols, d, MODE: tl.constexpr):
    """∂L/∂z of the k modalities, [K, BLOCK] in float64."""
    at = gathered(grad_z.offsets, MODE.k, MODE.K) + tile.instance * gathered(grad_z.strides, MODE.k, MODE.K)
    inside = tile.present[:, None] & (cols < d)[None, :]
    return to_float64(tl.load(grad_z.pointer + at[:, None] + cols[None, :], mask=inside, other=0.0))


@triton.jit
def load_incoming_others_tile(grad_w, tile, cols, d, MODE: tl.constexpr):
    """∂L/∂w of the k modalities, [K, BLOCK] in float64; also of absent ones."""
    at = gathered(grad_w.offsets, MODE.k, MODE.K) + tile.instance * gathered(grad_w.strides, MODE.k, MODE.K)
    inside = (tl.arange(0, MODE.K) < MODE.k)[:, None] & (cols < d)[None, :]
    return to_float64(tl.load(grad_w.pointer + at[:, None] + cols[None, :], mask=inside, other=0.0))


@triton.jit
def load_others_tile(record, MODE: tl.constexpr):
    """As ``load_others``, of one instance, blocks [K]."""
    index = tl.arange(0, MODE.K)
    share = tl.abs(load_vector(record + MODE.record.leading, index, index >= 0, MODE.k))
    if MODE.normalize:
        share = share * load_vector(record + MODE.record.inverse_norms, index, index >= 0, MODE.k)
    return Others(share, load_vector(record + MODE.record.others, index, index >= 0, MODE.k))


@triton.jit
def load_incoming_vector(grad_u, tile, cols, d):
    """∂L/∂u₁, [BLOCK] in float64."""
    pointers = grad_u.pointer + tile.instance * grad_u.strides[0] + cols
    return to_float64(tl.load(pointers, mask=cols < d, other=0.0))


@triton.jit
def load_scale(record, MODE: tl.constexpr):
    """As ``load_scales``, of one instance."""
    scale = ()
    if MODE.scaled:
        index = tl.arange(0, MODE.K)
        scale = power(-load_vector(record + MODE.record.exponents, index, index >= 0, MODE.k))
    return scale


@triton.jit
def opaque(X):
    """X, by way of a sum over one. For the layout of a product's operands Triton 3.6 looks back through all that is
    elementwise for the narrowest load, a mask's 8 bits or bfloat16, and then has no such layout for float64."""
    return tl.sum(X[:, :, None], 2)


@triton.jit
def gram_tile(x, tile, scale, d, K: tl.constexpr, BLOCK: tl.constexpr):
    G = tl.zeros([K, K], tl.float64)
    for start in range(0, d, BLOCK):
        X = opaque(load_tile(x, tile, start + tl.arange(0, BLOCK), d, scale))
        G = tl.dot(X, tl.trans(X), G, out_dtype=tl.float64)
    return G


@triton.jit
def gram_tile_phase(x, tile, record, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """As ``gram_phase``, of one instance."""
    K: tl.constexpr = MODE.K
    BLOCK: tl.constexpr = STEP.columns
    index = tl.arange(0, K)
    i = index[:, None]
    j = index[None, :]
    none = tl.zeros([K], tl.float64)
    G = gram_tile(x, tile, (), d, K, BLOCK)
    if MODE.scaled:
        square = tl.sum(tl.where(i == j, G, 0.0), 1)
        in_range = (square > LEAST_SQUARE) & (square < LARGEST_SQUARE)
        good = tl.max((tile.present & in_range).to(tl.int32), 0)
        if MODE.normalize:
            flagged = tl.max((tile.present & (in_range == 0)).to(tl.int32), 0) > 0
        else:
            overflow = tl.max((tile.present & ((square < LARGEST_SQUARE) == 0)).to(tl.int32), 0)
            flagged = (overflow > 0) | (good == 0)
        exponents = none
        if flagged:
            peaks = none
            for start in range(0, d, BLOCK):
                X = load_tile(x, tile, start + tl.arange(0, BLOCK), d, ())
                peaks = tl.maximum(peaks, tl.max(tl.abs(X), 1))
            if not MODE.normalize:
                peaks = none + tl.max(peaks, 0)
            exponents = exponent_of(peaks)
            G = gram_tile(x, tile, power(-exponents), d, K, BLOCK)
        store_vector(record + MODE.record.exponents, index, index >= 0, exponents, MODE.k)
    store_symmetric(record + MODE.record.gram, i, j, index[:, None] >= 0, G, MODE.k)


@triton.jit
def vectors_tile_phase(x, tile, record, u, z, w, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """As ``vectors_phase``, of one instance."""
    k: tl.constexpr = MODE.k
    K: tl.constexpr = MODE.K
    index = tl.arange(0, K)
    inside = index < k
    scale = load_scale(record, MODE)
    if u is not None:
        c = load_vector(record + MODE.record.weights, index, inside, k)
        for start in range(0, d, STEP.columns):
            cols = start + tl.arange(0, STEP.columns)
            total = tl.sum(product(load_tile(x, tile, cols, d, scale), c[:, None]), 0)
            tl.store(u + tile.instance * d + cols, total.to(u.dtype.element_ty), mask=cols < d)
    if z is not None:
        factor = tl.full([K], 1.0, tl.float64)
        if MODE.normalize:
            factor = load_vector(record + MODE.record.inverse_norms, index, inside, k)
        to = gathered(z.offsets, k, K) + tile.instance * z.stride
        for start in range(0, d, STEP.columns):
            cols = start + tl.arange(0, STEP.columns)
            X = load_tile(x, tile, cols, d, scale if MODE.normalize else ()) * factor[:, None]
            pointers = z.pointer + to[:, None] + cols[None, :]
            tl.store(pointers, X.to(z.pointer.dtype.element_ty), mask=inside[:, None] & (cols < d)[None, :])
    if w is not None:
        others = load_others_tile(record, MODE)
        to = gathered(w.offsets, k, K) + tile.instance * w.stride
        for start in range(0, d, STEP.columns):
            cols = start + tl.arange(0, STEP.columns)
            X = product(load_tile(x, tile, cols, d, scale), others.shares[:, None])
            found = (tl.sum(X, 0)[None, :] - X) * others.inverses[:, None]
            pointers = w.pointer + to[:, None] + cols[None, :]
            tl.store(pointers, found.to(w.pointer.dtype.element_ty), mask=inside[:, None] & (cols < d)[None, :])


@triton.jit
def dots_of_others_tile(x, tile, scale, record, grad_w, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """x_m · R, x_m · g_m and Y · g_m as in ``add_dots_of_others``, blocks [K]."""
    others = load_others_tile(record, MODE)
    along_sum = tl.zeros([MODE.K], tl.float64)
    own_dots = tl.zeros([MODE.K], tl.float64)
    along_common = tl.zeros([MODE.K], tl.float64)
    for start in range(0, d, STEP.columns):
        cols = start + tl.arange(0, STEP.columns)
        X = load_tile(x, tile, cols, d, scale)
        g = load_incoming_others_tile(grad_w, tile, cols, d, MODE)
        R = tl.sum(product(g, others.inverses[:, None]), 0)
        Y = tl.sum(product(X, others.shares[:, None]), 0)
        along_sum += tl.sum(product(X, R[None, :]), 1)
        own_dots += tl.sum(product(X, g), 1)
        along_common += tl.sum(product(g, Y[None, :]), 1)
    return along_sum, own_dots, along_common


@triton.jit
def dots_tile(x, tile, scale, grad_u, grad_z, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """x_m · ∂L/∂u₁ and x_m · ∂L/∂z_m, blocks [K]."""
    w = tl.zeros([MODE.K], tl.float64)
    direct = tl.zeros([MODE.K], tl.float64)
    for start in range(0, d, STEP.columns):
        cols = start + tl.arange(0, STEP.columns)
        X = load_tile(x, tile, cols, d, scale)
        if grad_u is not None:
            w += tl.sum(product(X, load_incoming_vector(grad_u, tile, cols, d)[None, :]), 1)
        if grad_z is not None:
            direct += tl.sum(product(X, load_incoming_tile(grad_z, tile, cols, d, MODE)), 1)
    return w, direct


@triton.jit
def apply_tile(x, tile, linear, scale, grad_u, grad_z, grad_w, out, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """As ``apply_chunk``, of one instance and all its columns; ``linear`` has blocks, and exponents for powers."""
    to = gathered(out.offsets, MODE.k, MODE.K) + tile.instance * out.stride
    wanted = which(out.offsets, MODE.k, MODE.K)
    C = opaque(linear.C)
    for start in range(0, d, STEP.columns):
        cols = start + tl.arange(0, STEP.columns)
        X = opaque(load_tile(x, tile, cols, d, scale))
        total = tl.dot(C, X, out_dtype=tl.float64)
        if grad_u is not None:
            total += linear.c[:, None] * load_incoming_vector(grad_u, tile, cols, d)[None, :]
        if grad_w is not None:
            g = product(load_incoming_others_tile(grad_w, tile, cols, d, MODE), linear.others.inverses[:, None])
            total += linear.others.shares[:, None] * (tl.sum(g, 0)[None, :] - g)
        if grad_z is not None:
            H = load_incoming_tile(grad_z, tile, cols, d, MODE)
            if MODE.normalize:
                total += linear.factors[:, None] * H
        if MODE.scaled:
            total = times_power(total, power(linear.powers))
        if grad_z is not None:
            if not MODE.normalize:
                total += H
        total = tl.where(tile.present[:, None], total, 0.0)
        if out.pointer.dtype.element_ty != tl.float64:
            total = total.to(tl.float32)
        inside = wanted[:, None] & (cols < d)[None, :]
        pointers = out.pointer + to[:, None] + cols[None, :]
        tl.store(pointers, total.to(out.pointer.dtype.element_ty), mask=inside)
