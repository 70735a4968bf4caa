"""The record of an instance: where each number of it is, and every load and store of one.

Everything about an instance that is not d numbers long is in its record, float64 numbers in global memory. Eigensolvers
and passes over d, each in the layout that suits them, write and read it, with a barrier or a launch in between. The
state that a forward pass leaves for the backward pass is [HEAD numbers for the batch, the records of its B instances,
what programs that sum up the batch leave for the last of them]. A backward pass has *coefficients* of each instance
besides, in a buffer of its own.

Loads come in the layouts of those who ask: a number of each of R instances, [R]; vectors [N, K, 1] or [N, 1, K] and
matrices [N, K, K]; matrices in XOR order (``eigen``), K blocks [N, K]; and vectors [K] and matrices [K, K] of one
instance.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .double_float import coefficient

HEAD = tl.constexpr(2)  # instances that count in the mean, Σ ∂(alignment)/∂τ


class Layout(NamedTuple):
    """Where a record holds what; None where it has no such field."""

    gram: Any  # upper triangle of the Gram matrix, of normalised columns where they are to be
    eigenvectors: Any  # V, row by row (with the spectrum in place of the Gram matrix; without it, in ties)
    resolvent: Any  # without the spectrum: upper triangle of Σ_j v_j v_jᵀ / (λ₁ − λ_j), j untied; V's place, made of it
    through_alignment: Any  # upper triangle of C for a gradient of 1 of the alignment term
    eigenvalues: Any  # λ_j of V's columns, in no order, 0 beyond min(d, k_i); or λ₁
    leading: Any  # v₁
    inverse_norms: Any  # 1/n, 0 for zero vectors
    exponents: Any  # column m was scaled by 2^-e before its Gram entries were formed
    weights: Any  # of V's columns, for a while; then the coefficients of u₁ = Σ_m c_m x_m
    others: Any  # 1/‖y_m‖, y_m = Σ_{j≠m} |v_j| z_j, and 0 where that norm counts as zero
    slope: Any  # ∂(alignment)/∂τ
    alignment: Any  # the alignment term
    undecided: Any  # 1 where power iteration left the leading pair to Jacobi, else 0
    size: Any  # numbers of a record, an even number


def layout(k: Any, spectrum: bool, normalize: bool, alignment: bool, others: bool) -> Layout:
    """Of what a state depends on must a compiler know, since it allocates some: it knows neither the card nor how it
    sums, and exponents have a place everywhere."""
    half = k * (k + 1) // 2
    at: dict[str, Any] = dict.fromkeys(Layout._fields)
    size = 0
    for name, numbers, kept in (
        ("gram", 0 if spectrum else half, True),
        ("eigenvectors", k * k, True),
        ("through_alignment", half, alignment),
        ("eigenvalues", k, True),
        ("leading", k, True),
        ("inverse_norms", k, normalize),
        ("exponents", k, True),
        ("weights", k, True),
        ("others", k, others),
        ("slope", 1, alignment),
        ("alignment", 1, alignment),
        ("undecided", 1, not spectrum),
    ):
        if kept:
            at[name] = size
            size += numbers
    at |= {"resolvent": None if spectrum else at["eigenvectors"], "size": size + size % 2}
    return Layout(**at)


def state_size(B: Any, record: Layout) -> Any:
    """Numbers of the state: the head, the records, three sums for each program that adds up the batch (of at least 4
    instances), and a counter."""
    return HEAD.value + B * record.size + 3 * ((B + 3) // 4) + 1


class Coefficients(NamedTuple):
    """Where the coefficients of a backward pass are, of an instance: dX = h cᵀ + X C + H diag(factors), and with the w

        dx_m += shares_m (R − r_m g_m),   R = Σ_j r_j g_j,   g = ∂L/∂w, r = the record's ``others``.

    In double_float each stands as a pair in its place."""

    C: int  # upper triangle
    c: int
    factors: int  # what the columns' own incoming gradients are multiplied by
    exponents: int  # of two, that the gradients of the columns are still to be multiplied by; not in double_float
    weights: int  # k numbers for a while
    shares: Any  # |v_m|/n_m; None unless the w are asked for
    size: int


def coefficient_layout(k: int, others: bool) -> Coefficients:
    half = k * (k + 1) // 2
    end = half + 4 * k
    shares, size = (end, end + k) if others else (None, end)
    return Coefficients(0, half, half + k, half + 2 * k, half + 3 * k, shares, size)


@triton.jit
def record_of(state, instance, MODE: tl.constexpr):
    return state + HEAD + instance * MODE.record.size


@triton.jit
def presence(mask, instance, m, there, k: tl.constexpr):
    """Which instances have modality m, one number or a block of them, of which those from k on are nobody's."""
    inside = there & (m < k)
    if mask is None:
        return inside
    else:
        return tl.load(mask + instance * k + m, mask=inside, other=0) != 0


@triton.jit
def number_of_modalities(mask, instance, there, k: tl.constexpr):
    """How many of them instances have, [R]."""
    number = tl.zeros_like(there.to(tl.int32))
    for m in tl.static_range(k):
        number += presence(mask, instance, m, there, k).to(tl.int32)
    return number


# ------------------------------------------------------------------------------------------------
# A number of each of R instances
# ------------------------------------------------------------------------------------------------
#
# Triton's time to compile goes with the number of loads and stores of blocks times that of operations. Sums in
# double_float have too many of these; a program has one instance there, and loads and stores scalars, which do not
# count.


@triton.jit
def own(state, at, MODE: tl.constexpr):
    """Where ``load_each`` and ``store_each`` find the records of a program's instances: one scalar in double_float."""
    if MODE.double_float:
        return record_of(state, tl.program_id(0).to(tl.int64), MODE)
    else:
        return record_of(state, at.index, MODE)


@triton.jit
def load_each(record, there, R: tl.constexpr, DOUBLE_FLOAT: tl.constexpr):
    if DOUBLE_FLOAT:
        return tl.zeros([R], tl.float64) + tl.load(record)
    else:
        return tl.load(record, mask=there, other=0.0)


@triton.jit
def store_each(record, there, x, DOUBLE_FLOAT: tl.constexpr):
    if DOUBLE_FLOAT:
        tl.store(record, tl.sum(x, 0))
    else:
        tl.store(record, x, mask=there)


# ------------------------------------------------------------------------------------------------
# Vectors and matrices of N instances
# ------------------------------------------------------------------------------------------------
#
# ``record`` is where the field begins in each record, [N, 1, 1], or [N] for XOR order.


@triton.jit
def load_vector(record, index, there, k: tl.constexpr):
    return tl.load(record + index, mask=there & (index < k), other=0.0)


@triton.jit
def store_vector(record, index, there, x, k: tl.constexpr):
    tl.store(record + index, x, mask=there & (index < k))


@triton.jit
def entry(i, j):
    """Where entry (i, j) of a symmetric matrix is in its upper triangle, column by column, and the larger index."""
    larger = tl.maximum(i, j)
    return larger * (larger + 1) // 2 + tl.minimum(i, j), larger


@triton.jit
def load_symmetric(record, i, j, there, k: tl.constexpr):
    at, larger = entry(i, j)
    return tl.load(record + at, mask=there & (larger < k), other=0.0)


@triton.jit
def store_symmetric(record, i, j, there, x, k: tl.constexpr):
    tl.store(record + j * (j + 1) // 2 + i, x, mask=there & (i <= j) & (j < k))


@triton.jit
def load_square(record, i, j, there, k: tl.constexpr):
    return tl.load(record + i * k + j, mask=there & (i < k) & (j < k), other=0.0)


@triton.jit
def load_tiles(record, lane, there, k: tl.constexpr, K: tl.constexpr):
    """Symmetric matrices of N instances in XOR order, K blocks [N, K]."""
    A = ()
    for y in tl.static_range(K):
        at, larger = entry(lane, lane ^ y)
        A = A + (tl.load(record[:, None] + at, mask=there[:, None] & (larger < k), other=0.0),)
    return A


# ------------------------------------------------------------------------------------------------
# Coefficients, which double_float has as pairs
# ------------------------------------------------------------------------------------------------


@triton.jit
def _as_pairs(pointers):
    """Pointers to numbers in float64 as pointers to the pairs of float32 in their places."""
    return pointers.to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def store_coefficient(record, x, inside, DOUBLE_FLOAT: tl.constexpr):
    if DOUBLE_FLOAT:
        high, low = coefficient(x, True)
        tl.store(_as_pairs(record), high, mask=inside)
        tl.store(_as_pairs(record) + 1, low, mask=inside)
    else:
        tl.store(record, x, mask=inside)


@triton.jit
def load_coefficient(record, there, R: tl.constexpr, DOUBLE_FLOAT: tl.constexpr):
    if DOUBLE_FLOAT:
        high = tl.zeros([R], tl.float32) + tl.load(_as_pairs(record))
        return (high, tl.zeros([R], tl.float32) + tl.load(_as_pairs(record) + 1))
    else:
        return (tl.load(record, mask=there, other=0.0),)
