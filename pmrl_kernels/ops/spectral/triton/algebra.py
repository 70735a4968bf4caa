"""The loss and its gradient in k-space (docs/mathematics.md): from eigenpairs of Gram matrices to singular values,
leading vectors and alignment, and from incoming gradients to the coefficients of dX = h cᵀ + X C, and of what comes
through the w.

N instances are taken at once, matrices as blocks [N, K, K] (row i, column j), vectors as [N, K, 1] or [N, 1, K], K
being a power of two from k on. The phases of a kernel are separated by barriers, so what one has written to a record
the next may read.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ... import constants
from ...triton.double_float import highest_exponent, scaled
from ...triton.eigen import PEAK_TIE, eigenvalue_gap, jacobi_tiles, product, reciprocal, zero_or_nan, zero_sum
from ...triton.record import (
    load_square,
    load_symmetric,
    load_tiles,
    load_vector,
    presence,
    store_coefficient,
    store_symmetric,
    store_vector,
)
from ...triton.scalars import log1p

CANCELLED = tl.constexpr(constants.CANCELLED)

_CASES = [(k, float64) for k in range(1, constants.MAX_MODALITIES + 1) for float64 in (False, True)]
_FLOORS = {case: constants.singular_value_floor(*case) ** 2 for case in _CASES}


@triton.constexpr_function
def eigenvalue_floor(k, float64_input):
    """The square of the relative floor below which a singular value has weight 0."""
    return _FLOORS[k, float64_input]


class Block(NamedTuple):
    """N instances: their records, which they are and which there are, [N, 1, 1]; rows [1, K, 1] and columns [1, 1, K]
    of their matrices."""

    record: Any
    instance: Any
    there: Any
    i: Any
    j: Any


@triton.jit
def block_of(record, instance, there, K: tl.constexpr):
    return Block(record, instance, there, tl.arange(0, K)[None, :, None], tl.arange(0, K)[None, None, :])


@triton.jit
def along_columns(x, K: tl.constexpr):
    """[N, K, 1] as [N, 1, K]."""
    if K == 2:  # for which Triton 3.6 cannot make sense of the layouts of a reshape
        return tl.permute(x, (0, 2, 1))
    else:
        return tl.reshape(x, [x.shape[0], 1, K])


@triton.jit
def number_present(b, mask, k: tl.constexpr):
    """How many modalities instances have, [N, 1, 1]."""
    return tl.sum(presence(mask, b.instance, b.j, b.there, k).to(tl.int32), 2, keep_dims=True)


@triton.jit
def decompose_tiles(records, A, broken, kept, lane, MODE: tl.constexpr):
    """Eigenpairs of A, finite matrices in XOR order, to the records that are ``kept``; NaN where ``broken`` is."""
    k: tl.constexpr = MODE.k
    values, V = jacobi_tiles(A, lane, MODE.K)
    kept = kept[:, None]
    store_vector(records[:, None] + MODE.record.eigenvalues, lane, kept, values + broken[:, None], k)
    for row in tl.static_range(k):
        at = records[:, None] + MODE.record.eigenvectors + row * k
        store_vector(at, lane, kept, V[row] + broken[:, None], k)


@triton.jit
def weighted(b, weights, MODE: tl.constexpr):
    """V diag(weights) Vᵀ, V being the record's, ``weights`` where its k numbers are."""
    k: tl.constexpr = MODE.k
    V = b.record + MODE.record.eigenvectors
    total = tl.zeros([b.record.shape[0], MODE.K, MODE.K], tl.float64)
    for m in range(k):
        left = tl.load(V + b.i * k + m, mask=b.there & (b.i < k), other=0.0)
        right = tl.load(V + b.j * k + m, mask=b.there & (b.j < k), other=0.0)
        weight = tl.load(weights + m, mask=b.there, other=0.0)
        total += left * weight * right
    return total


@triton.jit
def times_gram(matrix, values, x, MODE: tl.constexpr):
    """G x [N, K, 1]; ``matrix`` is G, or with the spectrum V, and ``values`` the eigenvalues [N, 1, K]."""
    if MODE.spectrum:
        along = values * tl.sum(product(matrix, x), 1, keep_dims=True)
        return tl.sum(product(matrix, along), 2, keep_dims=True)
    else:
        return tl.sum(product(matrix, along_columns(x, MODE.K)), 2, keep_dims=True)


@triton.jit
def gram_diagonal(b, matrix, values, MODE: tl.constexpr):
    """[N, K, 1], as above."""
    if MODE.spectrum:
        return tl.sum(product(matrix * matrix, values), 2, keep_dims=True)
    else:
        return tl.sum(tl.where(b.i == b.j, matrix, 0.0), 2, keep_dims=True)


# ------------------------------------------------------------------------------------------------
# Forward: leading pairs
# ------------------------------------------------------------------------------------------------


@triton.jit
def ranks(values_i, values_j, i, j):
    """The place of each eigenvalue in descending order, lower columns first among equals."""
    before = (values_i > values_j) | ((values_i == values_j) & (i < j))
    return tl.sum(before.to(tl.int32), 1, keep_dims=True)


@triton.jit
def oriented(V, values, top, i, MODE: tl.constexpr):
    """v₁ [N, K, 1]: the all-ones vector projected on the top eigenspace and normalised.

    Where the projection is zero, up to what rounding makes of it if the next eigenvalue is near, a unit vector e_m is
    projected instead, m the modality nearest the eigenspace. 0 where the largest eigenvalue is 0.
    """
    k: tl.constexpr = MODE.k
    tied = top - values <= eigenvalue_gap(k, MODE.float64_input) * top
    along = tl.where(tied, tl.sum(V, 1, keep_dims=True), 0.0)
    gap = top - tl.max(tl.where(tied, 0.0, values), 2, keep_dims=True)
    noise = zero_sum(k) * top
    nowhere = tl.sqrt(tl.sum(product(along, along), 2, keep_dims=True)) * gap <= noise
    nearness = tl.sum(tl.where(tied, product(V, V), 0.0), 2, keep_dims=True)
    largest = tl.max(nearness, 1, keep_dims=True)
    tie = tl.maximum(tl.minimum(noise / tl.where(gap > 0, gap, 1.0), 0.5), PEAK_TIE)
    nearest = tl.min(tl.where((nearness >= largest * (1.0 - tie)) & (i < k), i, MODE.K), 1, keep_dims=True)
    row = tl.sum(tl.where(i == nearest, V, 0.0), 1, keep_dims=True)
    along = tl.where(nowhere, tl.where(tied, row, 0.0), along)
    v = tl.sum(product(V, along), 2, keep_dims=True)
    squares = tl.sum(product(v, v), 1, keep_dims=True)
    return tl.where(top == 0, 0.0, v * (1.0 / tl.sqrt(tl.where(top == 0, 1.0, squares))))


@triton.jit
def resolvent(b, v_i, top, MODE: tl.constexpr):
    """Σ_j v_j v_jᵀ / (λ₁ − λ_j) over j >= 2, for a simple λ₁: (λ₁ I − G + λ₁ v₁v₁ᵀ)⁻¹ − v₁v₁ᵀ/λ₁, by Gauss-Jordan."""
    i = b.i
    j = b.j
    v_j = along_columns(v_i, MODE.K)
    known = (i < MODE.k) & (j < MODE.k) & (top > 0)
    eye = tl.where(i == j, 1.0, 0.0)
    # loaded again: to hold it meanwhile takes k > 6 more registers than there are
    gram = load_symmetric(b.record + MODE.record.gram, i, j, b.there, MODE.k)
    S = tl.where(known, top * eye - gram + top * v_i * v_j, eye)
    for p in range(MODE.k):
        row = tl.sum(tl.where(i == p, S, 0.0), 1, keep_dims=True)
        column = tl.sum(tl.where(j == p, S, 0.0), 2, keep_dims=True)
        inverse = 1.0 / tl.sum(tl.where(j == p, row, 0.0), 2, keep_dims=True)
        S = tl.where(
            i == p,
            tl.where(j == p, inverse, row * inverse),
            tl.where(j == p, -column * inverse, S - column * row * inverse),
        )
    return tl.where(known, S - v_i * v_j / tl.where(top > 0, top, 1.0), 0.0)


@triton.jit
def sorted_spectrum(b, number, d, MODE: tl.constexpr):
    """With the spectrum: eigenvalues [N, 1, K], their ranks, which of them count as singular values, and V; λ₁ and v₁.

    Reads the eigenpairs of the records; writes the eigenvalues again, 0 for those that do not count.
    """
    k: tl.constexpr = MODE.k
    values_i = load_vector(b.record + MODE.record.eigenvalues, b.i, b.there, k)
    values = load_vector(b.record + MODE.record.eigenvalues, b.j, b.there, k)
    tl.debug_barrier()
    broken = tl.sum(zero_or_nan(values), 2, keep_dims=True)
    rank = ranks(values_i, values, b.i, b.j)
    counts = rank < tl.minimum(number, d)  # the rest are zeros that are no logits
    values = tl.where(counts, values, 0.0) + broken
    store_vector(b.record + MODE.record.eigenvalues, b.j, b.there, values, k)
    V = load_square(b.record + MODE.record.eigenvectors, b.i, b.j, b.there, k)
    top = tl.max(values, 2, keep_dims=True) + broken
    v_i = oriented(V, values, top, b.i, MODE) + broken
    return values, rank, counts, V, top, v_i


@triton.jit
def leading_pair(b, VECTORS: tl.constexpr, MODE: tl.constexpr):
    """Without the spectrum: the Gram matrix, λ₁ and v₁, by the last step of power iteration, on G itself, or by Jacobi
    where that left it undecided.

    Reads the Gram matrix and v₁ before that step; writes λ₁, and the resolvent if u₁ or v₁ may take gradients.
    """
    N: tl.constexpr = b.record.shape[0]
    k: tl.constexpr = MODE.k
    K: tl.constexpr = MODE.K
    gram = load_symmetric(b.record + MODE.record.gram, b.i, b.j, b.there, k)
    before = load_vector(b.record + MODE.record.leading, b.i, b.there, k)
    tl.debug_barrier()  # whoever writes it again writes when all have read it
    v_i = tl.sum(product(gram, along_columns(before, K)), 2, keep_dims=True)
    v_i = v_i * reciprocal(tl.sqrt(tl.sum(product(v_i, v_i), 1, keep_dims=True)))
    Gv = tl.sum(product(gram, along_columns(v_i, K)), 2, keep_dims=True)
    top = tl.sum(product(v_i, Gv), 1, keep_dims=True)
    undecided = tl.load(b.record + MODE.record.undecided, mask=b.there, other=0.0) > 0
    ambiguous = tl.max(tl.reshape(undecided.to(tl.int32), [N]), 0) > 0
    weights = tl.zeros([N, 1, K], tl.float64)
    if ambiguous:
        lane = tl.arange(0, K)[None, :] + tl.zeros([N, 1], tl.int32)
        kept = tl.reshape(undecided, [N])
        records = tl.reshape(b.record, [N])
        A = load_tiles(records + MODE.record.gram, lane, kept, k, K)
        tl.debug_barrier()
        decompose_tiles(records, A, tl.zeros([N], tl.float64), kept, lane, MODE)
        tl.debug_barrier()
        values = load_vector(b.record + MODE.record.eigenvalues, b.j, b.there, k)
        V = load_square(b.record + MODE.record.eigenvectors, b.i, b.j, b.there, k)
        highest = tl.max(values, 2, keep_dims=True)
        top = tl.where(undecided, highest, top)
        v_i = tl.where(undecided, oriented(V, values, highest, b.i, MODE), v_i)
        tied = highest - values <= eigenvalue_gap(k, MODE.float64_input) * highest
        weights = tl.where(tied, 0.0, 1.0 / tl.where(tied, 1.0, highest - values))
        tl.debug_barrier()
    tl.store(b.record + MODE.record.eigenvalues, top, mask=b.there)
    if VECTORS:
        T = resolvent(b, v_i, top, MODE)
        if ambiguous:
            scratch = b.record + MODE.record.weights
            store_vector(scratch, b.j, b.there, weights, k)
            tl.debug_barrier()
            T = tl.where(undecided, weighted(b, scratch, MODE), T)
            tl.debug_barrier()
        store_symmetric(b.record + MODE.record.resolvent, b.i, b.j, b.there, T, k)
    return gram, top, v_i


# ------------------------------------------------------------------------------------------------
# Forward: alignment
# ------------------------------------------------------------------------------------------------


@triton.jit
def projected(A, radial_i, inverse_i, inverse_j, i, j, NORMALIZE: tl.constexpr):
    """From dZ = Z A to dX = X C: dx_m = (dz_m - (z_m . dz_m) z_m) / n_m, the radial parts being known."""
    if NORMALIZE:
        A = tl.where(i == j, A - radial_i, A) * inverse_i * inverse_j  # their product may underflow
    return A


@triton.jit
def load_inverse_norms(b, index, MODE: tl.constexpr):
    """1/n of the columns of b.i or b.j; 1 where columns are not normalised."""
    if MODE.normalize:
        return load_vector(b.record + MODE.record.inverse_norms, index, b.there, MODE.k)
    else:
        return tl.full(index.shape, 1.0, tl.float64)


@triton.jit
def unscaled(x, exponent, MODE: tl.constexpr):
    """A singular value of embeddings that were scaled by 2^-e as one of these themselves; of normalised ones it is."""
    if MODE.scaled and not MODE.normalize:
        x = scaled(x, exponent)
    return x


@triton.jit
def spectral_weights(g, values, sigma_j, top, first, MODE: tl.constexpr):
    """g_j / sigma_j, 0 for what is not resolved (the minimum-norm subgradient); and what the first has beyond them.

    In a tied top eigenspace v1 is singled out by the orientation rule, and the others share their mean weight, so that
    nothing depends on the solver's basis there.
    """
    resolved = (values > eigenvalue_floor(MODE.k, MODE.float64_input) * top) | (values != values)
    weights = tl.where(resolved, g / tl.where(resolved, sigma_j, 1.0), 0.0)
    tied = top - values <= eigenvalue_gap(MODE.k, MODE.float64_input) * top
    others = tied & (first == 0)
    number = tl.sum(others.to(tl.float64), 2, keep_dims=True)
    shared = tl.sum(tl.where(others, weights, 0.0), 2, keep_dims=True) / tl.maximum(number, 1.0)
    first_weight = tl.sum(tl.where(first, weights, 0.0), 2, keep_dims=True) - shared
    return tl.where(tied, shared, weights), first_weight


@triton.jit
def through_spectrum(b, scratch, weights, first_weight, V, values, top, v_i, v_j, MODE: tl.constexpr):
    """M = V diag(weights) Vᵀ + first_weight v₁v₁ᵀ, and the diagonal of G M. ``scratch`` has room for k numbers."""
    tl.debug_barrier()
    store_vector(scratch, b.j, b.there, weights, MODE.k)
    tl.debug_barrier()
    M = weighted(b, scratch, MODE) + first_weight * v_i * v_j
    radial = tl.sum(product(V * V, values * weights), 2, keep_dims=True) + first_weight * top * v_i * v_i
    return M, radial


@triton.jit
def softmax_alignment(b, tau, exponent, alignable, values, rank, counts, V, top, v_i, v_j, MODE: tl.constexpr):
    """-log of the share of σ₁ in softmax(σ / τ), its derivative by τ, and A and the radial parts of dZ = Z A."""
    sigma_j = tl.sqrt(values)
    first = rank == 0
    gaps = unscaled(tl.sqrt(top) - sigma_j, exponent, MODE) / tau
    p = tl.where(counts & (rank > 0), tl.exp(-gaps), 0.0)
    total = tl.sum(p, 2, keep_dims=True)
    loss = log1p(total) + zero_or_nan(tau)  # a bad temperature shows even where there is no logit
    p = tl.where(alignable, p / (1.0 + total), 0.0)
    pull = p / tau
    # where p underflows to 0 beside an infinite gap, their product tends to 0
    slope = tl.sum(tl.where(p == 0, 0.0, product(p, gaps)), 2, keep_dims=True) / tau
    slope += zero_or_nan(top)  # no p tells of a NaN, which has no rank
    g = tl.where(first, -tl.sum(pull, 2, keep_dims=True), pull)  # rather than (p_1 - 1) / tau, which cancels
    weights, first_weight = spectral_weights(g, values, sigma_j, top, first, MODE)
    scratch = b.record + MODE.record.weights
    A, radial = through_spectrum(b, scratch, weights, first_weight, V, values, top, v_i, v_j, MODE)
    return loss, slope, A, radial


@triton.jit
def leading_alignment(b, exponent, alignable, gram, top, v_i, v_j, MODE: tl.constexpr):
    """√tr G − σ₁, and A and the radial parts of dZ = Z A."""
    sigma_1 = tl.sqrt(top)
    diagonal = tl.sum(tl.where(b.i == b.j, gram, 0.0), 2, keep_dims=True)
    trace = tl.sum(diagonal, 1, keep_dims=True)
    loss = unscaled(tl.maximum(trace - top, 0.0) * reciprocal(tl.sqrt(trace) + sigma_1), exponent, MODE)
    even = tl.where(alignable, reciprocal(tl.sqrt(trace)), 0.0)
    along = tl.where(alignable, -reciprocal(sigma_1), 0.0)
    A = along * v_i * v_j + tl.where(b.i == b.j, even, 0.0)
    radial = even * diagonal + along * top * v_i * v_i
    return loss, A, radial


@triton.jit
def store_values(b, sigma, values, rank, exponent, d, MODE: tl.constexpr):
    """sigma (B, min(d, k)), in descending order."""
    shown = unscaled(tl.sqrt(values), exponent, MODE)
    place = tl.where(values == values, rank, b.j)  # a NaN has no rank, and all of its instance are NaN
    wanted = tl.minimum(d, MODE.k)
    inside = b.there & (b.j < MODE.k) & (place < wanted)
    tl.store(sigma + b.instance * wanted + place, shown.to(sigma.dtype.element_ty), mask=inside)


@triton.jit
def inverse_norms_of_others(b, matrix, values, v_i, MODE: tl.constexpr):
    """1/‖y_m‖ [N, K, 1], y_m = Σ_{j≠m} a_j z_j, a = |v₁|, and 0 where that norm counts as zero:
    ‖y_m‖² = aᵀG a − 2 a_m (G a)_m + a_m² G_mm. Of NaN no such thing is true, and it stays NaN."""
    a = tl.abs(v_i)
    Ga = times_gram(matrix, values, a, MODE)
    diagonal = gram_diagonal(b, matrix, values, MODE)
    squares = tl.sum(product(a, Ga), 1, keep_dims=True) - 2.0 * a * Ga + a * a * diagonal
    least = CANCELLED * tl.sum(product(a, tl.sqrt(diagonal)), 1, keep_dims=True)
    zero = squares <= least * least
    return tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, squares)))


@triton.jit
def finish_forward(b, mask, tau, outputs, d, VECTORS: tl.constexpr, MODE: tl.constexpr):
    """Completes the records of N instances from their eigenpairs, and writes sigma and v as far as they are given.

    Returns the alignment terms [N, 1, 1], their derivatives by tau, and which instances have two modalities.
    """
    k: tl.constexpr = MODE.k
    N: tl.constexpr = b.record.shape[0]
    number = number_present(b, mask, k)
    alignable = number >= 2
    exponent = tl.zeros([N, 1, 1], tl.float64)
    if MODE.scaled and not MODE.normalize:
        exponent = tl.load(b.record + MODE.record.exponents, mask=b.there, other=0.0)
    if MODE.spectrum:
        values, rank, counts, V, top, v_i = sorted_spectrum(b, number, d, MODE)
    else:
        gram, top, v_i = leading_pair(b, VECTORS, MODE)

    v_j = along_columns(v_i, MODE.K)
    store_vector(b.record + MODE.record.leading, b.i, b.there, v_i, k)
    if outputs.v is not None:
        store_vector(outputs.v + b.instance * k, b.i, b.there, v_i.to(outputs.v.dtype.element_ty), k)
    if outputs.sigma is not None:
        if MODE.spectrum:
            store_values(b, outputs.sigma, values, rank, exponent, d, MODE)
        else:
            shown = unscaled(tl.sqrt(top), exponent, MODE)
            tl.store(outputs.sigma + b.instance, shown.to(outputs.sigma.dtype.element_ty), mask=b.there)

    if MODE.others:
        if MODE.spectrum:
            inverses = inverse_norms_of_others(b, V, values, v_i, MODE)
        else:
            # loaded again, as for the resolvent
            again = load_symmetric(b.record + MODE.record.gram, b.i, b.j, b.there, k)
            inverses = inverse_norms_of_others(b, again, top, v_i, MODE)
        store_vector(b.record + MODE.record.others, b.i, b.there, inverses, k)

    loss = tl.zeros([N, 1, 1], tl.float64)
    slope = tl.zeros([N, 1, 1], tl.float64)
    inverse_i = load_inverse_norms(b, b.i, MODE)
    if MODE.alignment:
        if MODE.spectrum:
            loss, slope, A, radial = softmax_alignment(
                b, tau, exponent, alignable, values, rank, counts, V, top, v_i, v_j, MODE
            )
        else:
            loss, A, radial = leading_alignment(b, exponent, alignable, gram, top, v_i, v_j, MODE)
        loss = tl.where(alignable | (loss != loss), loss, 0.0) + zero_or_nan(top)  # a NaN in one alone is not swallowed
        C = projected(A, radial, inverse_i, load_inverse_norms(b, b.j, MODE), b.i, b.j, MODE.normalize)
        present = presence(mask, b.instance, b.i, b.there, k) & presence(mask, b.instance, b.j, b.there, k)
        store_symmetric(b.record + MODE.record.through_alignment, b.i, b.j, b.there, tl.where(present, C, 0.0), k)
        tl.store(b.record + MODE.record.slope, slope, mask=b.there)
        tl.store(b.record + MODE.record.alignment, loss, mask=b.there)
    if VECTORS:
        tl.debug_barrier()
        share = v_i * reciprocal(tl.sqrt(top))
        if MODE.normalize:
            share = share * inverse_i
        store_vector(b.record + MODE.record.weights, b.i, b.there, share, k)
    return loss, slope, alignable


# ------------------------------------------------------------------------------------------------
# Backward
# ------------------------------------------------------------------------------------------------


@triton.jit
def store_coefficients(
    b, coefficients, C, c, factors, shares, exponent, THROUGH_U: tl.constexpr, FACTORS: tl.constexpr,
    OTHERS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """In double_float, all of an instance's coefficients are multiplied by the power of two that makes the largest
    about 1, and the gradients get it back at the end: gradients may be of any size that is a float32, coefficients of
    more."""
    k: tl.constexpr = MODE.k
    D: tl.constexpr = MODE.double_float
    if MODE.double_float:
        highest = highest_exponent(C)
        if THROUGH_U:
            highest = tl.maximum(highest, highest_exponent(c))
        if FACTORS:
            highest = tl.maximum(highest, highest_exponent(factors))
        if OTHERS:
            highest = tl.maximum(highest, highest_exponent(shares))
        e = tl.where((highest > 0) & (highest < 0x7FF), highest - 1022, 0).to(tl.float64)
        C = scaled(C, -e)
        c = scaled(c, -e)
        factors = scaled(factors, -e)
        shares = scaled(shares, -e)
        exponent = tl.minimum(tl.maximum(exponent + e, -250.0), 250.0)  # beyond that there are only 0 and infinity
    inside = b.there & (b.i < k)
    upper = b.there & (b.i <= b.j) & (b.j < k)
    store_coefficient(coefficients + MODE.coefficients.C + b.j * (b.j + 1) // 2 + b.i, C, upper, D)
    if THROUGH_U:
        store_coefficient(coefficients + MODE.coefficients.c + b.i, c, inside, D)
    if FACTORS:
        store_coefficient(coefficients + MODE.coefficients.factors + b.i, factors, inside, D)
    if OTHERS:
        store_coefficient(coefficients + MODE.coefficients.shares + b.i, shares, inside, D)
    tl.store(coefficients + MODE.coefficients.exponents + b.i, exponent, mask=inside)


@triton.jit
def alignment_coefficients(b, coefficients, mask, grad, MODE: tl.constexpr):
    """As ``gradient_coefficients``, of a gradient of the alignment term alone."""
    k: tl.constexpr = MODE.k
    alignable = number_present(b, mask, k) >= 2
    aligned = load_symmetric(b.record + MODE.record.through_alignment, b.i, b.j, b.there, k)
    C = tl.where(alignable, grad, 0.0) * aligned
    none = tl.zeros([b.record.shape[0], MODE.K, 1], tl.float64)
    exponent = none
    if MODE.normalize:
        exponent = -load_vector(b.record + MODE.record.exponents, b.i, b.there, k)
    store_coefficients(b, coefficients, C, none, none, none, exponent, False, False, False, MODE)


@triton.jit
def through_values(b, coefficients, grad, values, V, top, v_i, v_j, d, MODE: tl.constexpr):
    """What ∂L/∂σ makes of A and of the radial parts of dZ = Z A."""
    k: tl.constexpr = MODE.k
    if MODE.spectrum:
        rank = ranks(load_vector(b.record + MODE.record.eigenvalues, b.i, b.there, k), values, b.i, b.j)
        place = tl.where(values == values, rank, b.j)
        at = grad.pointer + b.instance * grad.strides[0] + place * grad.strides[1]
        inside = b.there & (b.j < k) & (place < tl.minimum(d, k))
        g = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        weights, first_weight = spectral_weights(g, values, tl.sqrt(values), top, rank == 0, MODE)
        scratch = coefficients + MODE.coefficients.weights
        return through_spectrum(b, scratch, weights, first_weight, V, values, top, v_i, v_j, MODE)
    else:
        along = tl.load(grad.pointer + b.instance * grad.strides[0], mask=b.there, other=0.0).to(tl.float64)
        along = along * reciprocal(tl.sqrt(top))
        return along * v_i * v_j, along * top * v_i * v_i


@triton.jit
def turned(b, r, values, V, top, MODE: tl.constexpr):
    """y = Σ_j v_j v_jᵀ r / (λ₁ − λ_j) over what is not tied, by which r turns v₁; and G y."""
    k: tl.constexpr = MODE.k
    if MODE.spectrum:
        # a gap that does not count has no share, but a NaN that comes in is passed on
        dot = tl.sum(product(V, r), 1, keep_dims=True)
        tied = top - values <= eigenvalue_gap(k, MODE.float64_input) * top
        share = tl.where(tied, dot * 0.0, dot / tl.where(tied, 1.0, top - values))
        y = tl.sum(product(V, share), 2, keep_dims=True)
        Gy = tl.sum(product(V, values * share), 2, keep_dims=True)
        return y, Gy
    else:
        T = load_symmetric(b.record + MODE.record.resolvent, b.i, b.j, b.there, k)
        y = tl.sum(product(T, along_columns(r, MODE.K)), 2, keep_dims=True)
        gram = load_symmetric(b.record + MODE.record.gram, b.i, b.j, b.there, k)
        Gy = tl.sum(product(gram, along_columns(y, MODE.K)), 2, keep_dims=True)
        return y, Gy


@triton.jit
def load_pairs(b, MODE: tl.constexpr):
    """λ₁, with the spectrum the eigenvalues [N, 1, K] and V, and v₁."""
    k: tl.constexpr = MODE.k
    v_i = load_vector(b.record + MODE.record.leading, b.i, b.there, k)
    if MODE.spectrum:
        values = load_vector(b.record + MODE.record.eigenvalues, b.j, b.there, k)
        V = load_square(b.record + MODE.record.eigenvectors, b.i, b.j, b.there, k)
        top = tl.max(values, 2, keep_dims=True) + tl.sum(zero_or_nan(values), 2, keep_dims=True)
        return top, values, V, v_i
    else:
        top = tl.load(b.record + MODE.record.eigenvalues, mask=b.there, other=0.0)
        return top, top, top, v_i


class ThroughOthers(NamedTuple):
    """What sums over d tell of g = ∂L/∂w, [N, K, 1] each: x_m · R, x_m · g_m and Y · g_m, where R = Σ_m r_m g_m,
    Y = Σ_m |v_m| z_m, r = 1/‖y‖ or 0."""

    along_sum: Any
    own: Any
    along_common: Any


@triton.jit
def zero_entries(b, values, top, v_i, MODE: tl.constexpr):
    """Which entries of v₁ [N, K, 1] are 0 up to what rounding makes of it: |v_j| gap <= zero_sum λ₁.

    The gap is that to the next eigenvalue that is not tied. Without the spectrum one over the resolvent's Frobenius
    norm stands for it, which is at most √(k−1) times less.
    """
    k: tl.constexpr = MODE.k
    if MODE.spectrum:
        tied = top - values <= eigenvalue_gap(k, MODE.float64_input) * top
        gap = top - tl.max(tl.where(tied, 0.0, values), 2, keep_dims=True)
        return tl.abs(v_i) * gap <= zero_sum(k) * top
    else:
        T = load_symmetric(b.record + MODE.record.resolvent, b.i, b.j, b.there, k)
        norm = tl.sqrt(tl.sum(tl.sum(product(T, T), 2, keep_dims=True), 1, keep_dims=True))
        return tl.abs(v_i) <= zero_sum(k) * tl.maximum(top * norm, 1.0)


@triton.jit
def through_others(b, sums, matrix, values, top, v_i, v_j, inverse_i, MODE: tl.constexpr):
    """What the gradients g_m of w_m = r_m Σ_{j≠m} a_j z_j, a = |v₁|, make of ∂L/∂v₁, of A, and of the radial parts of
    dZ = Z A, of which shares (R − r_m g_m) has no part in A.

    With h_m = r_m (g_m − w_m w_mᵀg_m) it is ∂L/∂a_j = z_jᵀ Σ_{m≠j} h_m = c_j and ∂L/∂z_j = a_j Σ_{m≠j} h_m. All of that
    follows from ``sums`` and G, with t_m = r_m² w_mᵀg_m:

        c_j = Σ_{m≠j} (r_m z_jᵀg_m − t_m z_jᵀy_m)
        A_jl = −a_j a_l Σ_{m≠j,l} t_m
    """
    K: tl.constexpr = MODE.K
    a = tl.abs(v_i)
    r = load_vector(b.record + MODE.record.others, b.i, b.there, MODE.k)
    own = sums.own * inverse_i
    t = product(r * r * r, sums.along_common - a * own)  # rounded, since it is summed up
    total = tl.sum(t, 1, keep_dims=True)
    rest = total - t
    c = sums.along_sum * inverse_i - r * own
    c -= times_gram(matrix, values, a, MODE) * rest
    c += times_gram(matrix, values, t * a, MODE) - gram_diagonal(b, matrix, values, MODE) * t * a
    slopes = tl.where(zero_entries(b, values, top, v_i, MODE), 0.0, tl.where(v_i < 0, -c, c))
    A = -a * tl.abs(v_j) * tl.where(b.i == b.j, rest, rest - along_columns(t, K))
    return slopes, A, a * c


@triton.jit
def gradient_coefficients(
    b, coefficients, mask, w, direct, through_w, grad_alignment, grads, d, THROUGH_U: tl.constexpr,
    DIRECT: tl.constexpr, OTHERS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """All incoming gradients of N instances to the coefficients of dX = h cᵀ + X C + H diag(factors), and the shares of
    what comes through the w.

    ``w`` and ``direct`` [N, K, 1] are x_m · ∂L/∂u₁ and x_m · ∂L/∂z_m, ``grad_alignment`` is [N, 1, 1], ``through_w``
    are ``ThroughOthers``.
    """
    k: tl.constexpr = MODE.k
    K: tl.constexpr = MODE.K
    N: tl.constexpr = b.record.shape[0]
    present_i = presence(mask, b.instance, b.i, b.there, k)
    present_j = presence(mask, b.instance, b.j, b.there, k)
    inverse_i = load_inverse_norms(b, b.i, MODE)
    inverse_j = load_inverse_norms(b, b.j, MODE)
    top, values, V, v_i = load_pairs(b, MODE)
    v_j = load_vector(b.record + MODE.record.leading, b.j, b.there, k)
    inverse_sigma = reciprocal(tl.sqrt(top))
    A = tl.zeros([N, K, K], tl.float64)
    radial = tl.zeros([N, K, 1], tl.float64)
    if grads.sigma is not None:
        A, radial = through_values(b, coefficients, grads.sigma, values, V, top, v_i, v_j, d, MODE)

    c = v_i * inverse_sigma
    shares = tl.abs(v_i)
    exponent = tl.zeros([N, K, 1], tl.float64)
    if MODE.scaled and MODE.normalize:
        exponent = -load_vector(b.record + MODE.record.exponents, b.i, b.there, k)
    aligned = tl.zeros([N, K, K], tl.float64)
    if grads.alignment is not None:
        # an instance with fewer than two modalities has no alignment term, whatever comes in for it
        alignable = tl.sum(present_j.to(tl.int32), 2, keep_dims=True) >= 2
        grad_alignment = tl.where(alignable, grad_alignment, 0.0)
        aligned = load_symmetric(b.record + MODE.record.through_alignment, b.i, b.j, b.there, k)
        aligned = grad_alignment * aligned
    if MODE.normalize:
        w = w * inverse_i
        direct = direct * inverse_i
    if THROUGH_U or grads.v is not None or OTHERS:
        r = w * inverse_sigma
        if grads.v is not None:
            at = grads.v.pointer + b.instance * grads.v.strides[0] + b.i * grads.v.strides[1]
            r += tl.load(at, mask=present_i, other=0.0).to(tl.float64)
        if OTHERS:
            matrix = V
            if not MODE.spectrum:
                matrix = load_symmetric(b.record + MODE.record.gram, b.i, b.j, b.there, k)
            slopes, A_others, radial_others = through_others(
                b, through_w, matrix, values, top, v_i, v_j, inverse_i, MODE
            )
            r += slopes
        y, Gy = turned(b, r, values, V, top, MODE)
        along = tl.sum(product(v_i, w), 1, keep_dims=True) * inverse_sigma * inverse_sigma * inverse_sigma
        through = y * v_j + v_i * along_columns(y, K) - along * v_i * v_j
        radial += v_i * (Gy + top * (y - along * v_i))
        if OTHERS:
            through += A_others
            radial += radial_others
        if MODE.scaled and not MODE.normalize:
            # ``through`` and c are 2^-e times these, A is not. Up or down, the factor goes where nothing overflows
            # before the sum is formed: on those two, or on A now and on the gradient at the end.
            e = tl.load(b.record + MODE.record.exponents, mask=b.there, other=0.0)
            up = tl.maximum(e, 0.0)
            exponent += up - e
            c = scaled(c, -up)
            shares = scaled(shares, -up)
            A = scaled(A, e - up)
            aligned = scaled(aligned, e - up)
            through = scaled(through, -up)
        A += through
        if THROUGH_U:
            radial += c * w
    C = aligned + projected(A, radial + direct, inverse_i, inverse_j, b.i, b.j, MODE.normalize)
    if MODE.normalize:
        c = c * inverse_i
        shares = shares * inverse_i
    C = tl.where(present_i & present_j, C, 0.0)
    c = tl.where(present_i, c, 0.0)
    store_coefficients(
        b, coefficients, C, c, inverse_i, shares, exponent, THROUGH_U, DIRECT and MODE.normalize, OTHERS, MODE
    )
