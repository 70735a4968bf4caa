"""The loss and its gradient in k-space (docs/mathematics.md): from eigenpairs of Gram matrices to singular values,
leading vectors and alignment, and from incoming gradients to the coefficients of dX = h cᵀ + X C.

Everything about an instance that is not d numbers long is in its *record*, float64 numbers in global memory.
Eigensolvers and streams, each in the layout that suits them, write and read it; here N instances are taken at once,
matrices as blocks [N, K, K] (row i, column j), vectors as [N, K, 1] or [N, 1, K], K being a power of two from k on.
The phases of a kernel are separated by barriers, so what one has written the next may read.
"""

import triton
import triton.language as tl

from .. import constants
from .eigen import PEAK_TIE, eigenvalue_gap, jacobi_tiles, product, reciprocal, zero_or_nan, zero_sum

# ------------------------------------------------------------------------------------------------
# The record of an instance
# ------------------------------------------------------------------------------------------------

_FIELDS = ("gram", "eigenvectors", "through_alignment", "eigenvalues", "leading", "inverse_norms", "exponents")
_FIELDS += ("weights", "slope", "alignment", "undecided")


def layout(k):
    """Where each field of a record begins, and how many numbers a record has."""
    half = k * (k + 1) // 2
    sizes = (half, k * k, half, k, k, k, k, k, 1, 1, 1)
    starts = [sum(sizes[:at]) for at in range(len(sizes) + 1)]
    fields = dict(zip(_FIELDS, starts[:-1], strict=True))
    return fields | {"resolvent": fields["eigenvectors"]}, starts[-1] + starts[-1] % 2


_LAYOUTS = {k: layout(k) for k in range(1, constants.MAX_MODALITIES + 1)}
_FLOORS = {(k, wide): constants.singular_value_floor(k, wide) ** 2 for k in _LAYOUTS for wide in (False, True)}


@triton.constexpr_function
def field(k, name):
    """Where a record holds

    gram               upper triangle of the Gram matrix, of normalised columns where they are to be
    eigenvectors       V, row by row (with the spectrum, and in ties)
    through_alignment  upper triangle of C for a gradient of 1 of the alignment term
    resolvent          upper triangle of Σ_j v_j v_jᵀ / (λ₁ − λ_j), over what is not tied (without the spectrum, where
                       nobody needs V again once this is made of it)
    eigenvalues        λ_j of V's columns, in no order, 0 beyond min(d, k_i); or λ₁
    leading            v₁
    inverse_norms      1/n, 0 for zero vectors
    exponents          column m was scaled by 2^-e before its Gram entries were formed
    weights            of V's columns, for a while; then the coefficients of u₁ = Σ_m c_m x_m
    slope, alignment   ∂(alignment)/∂τ; the alignment term
    undecided          1 where power iteration left the leading pair to Jacobi, else 0
    """
    return _LAYOUTS[k][0][name]


@triton.constexpr_function
def record_size(k):
    return _LAYOUTS[k][1]


@triton.constexpr_function
def eigenvalue_floor(k, wide):
    """The square of the relative floor below which a singular value has weight 0."""
    return _FLOORS[k, wide]


# ------------------------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------------------------


@triton.jit
def power_of_two(exponent, x):
    """2^e in the dtype of x (float64, float32), of whose normal numbers e is."""
    if x.dtype == tl.float32:
        return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def scaled(x, exponent):
    """x·2^e, in two steps: 2^1074, which lifts the least subnormal, is no float64."""
    half = tl.floor(exponent * 0.5)
    return x * power_of_two(half, x) * power_of_two(exponent - half, x)


@triton.jit
def log1p(x):
    """For x >= 0: log(1 + x) of the rounded sum, and what the rounding took."""
    total = 1.0 + x
    return tl.log(total) + (x - (total - 1.0)) / total


@triton.jit
def along_columns(x, N: tl.constexpr, K: tl.constexpr):
    """[N, K, 1] as [N, 1, K]."""
    if K == 2:  # for which Triton 3.6 cannot make sense of the layouts of a reshape
        return tl.permute(x, (0, 2, 1))
    else:
        return tl.reshape(x, [N, 1, K])


@triton.jit
def load_vector(record, name: tl.constexpr, index, there, k: tl.constexpr):
    return tl.load(record + field(k, name) + index, mask=there & (index < k), other=0.0)


@triton.jit
def store_vector(record, name: tl.constexpr, index, there, x, k: tl.constexpr):
    tl.store(record + field(k, name) + index, x, mask=there & (index < k))


@triton.jit
def load_symmetric(record, name: tl.constexpr, i, j, there, k: tl.constexpr):
    larger = tl.maximum(i, j)
    at = larger * (larger + 1) // 2 + tl.minimum(i, j)
    return tl.load(record + field(k, name) + at, mask=there & (larger < k), other=0.0)


@triton.jit
def store_symmetric(record, name: tl.constexpr, i, j, there, x, k: tl.constexpr):
    tl.store(record + field(k, name) + j * (j + 1) // 2 + i, x, mask=there & (i <= j) & (j < k))


@triton.jit
def load_square(record, name: tl.constexpr, i, j, there, k: tl.constexpr):
    return tl.load(record + field(k, name) + i * k + j, mask=there & (i < k) & (j < k), other=0.0)


@triton.jit
def load_tiles(records, lane, there, k: tl.constexpr, K: tl.constexpr):
    """The Gram matrices of N instances in XOR order, K blocks [N, K]."""
    A = ()
    for y in tl.static_range(K):
        larger = tl.maximum(lane, lane ^ y)
        at = records[:, None] + field(k, "gram") + larger * (larger + 1) // 2 + tl.minimum(lane, lane ^ y)
        A = A + (tl.load(at, mask=there[:, None] & (larger < k), other=0.0),)
    return A


@triton.jit
def decompose_tiles(records, A, broken, kept, lane, k: tl.constexpr, K: tl.constexpr):
    """Eigenpairs of A, finite matrices in XOR order, to the records that are ``kept``; NaN where ``broken`` is."""
    values, V = jacobi_tiles(A, lane, K)
    inside = kept[:, None] & (lane < k)
    tl.store(records[:, None] + field(k, "eigenvalues") + lane, values + broken[:, None], mask=inside)
    for row in tl.static_range(k):
        tl.store(records[:, None] + field(k, "eigenvectors") + row * k + lane, V[row] + broken[:, None], mask=inside)


@triton.jit
def weighted(record, weights, i, j, there, k: tl.constexpr):
    """V diag(weights) Vᵀ, V being the record's, ``weights`` where its k numbers are."""
    total = tl.zeros([record.shape[0], i.shape[1], j.shape[2]], tl.float64)
    for m in range(k):
        left = tl.load(record + field(k, "eigenvectors") + i * k + m, mask=there & (i < k), other=0.0)
        right = tl.load(record + field(k, "eigenvectors") + j * k + m, mask=there & (j < k), other=0.0)
        weight = tl.load(weights + m, mask=there, other=0.0)
        total += left * weight * right
    return total


@triton.jit
def presence(mask, instance, index, there, k: tl.constexpr):
    """Which modalities an instance has."""
    inside = there & (index < k)
    if mask is None:
        return inside
    else:
        return tl.load(mask + instance * k + index, mask=inside, other=0) != 0


# ------------------------------------------------------------------------------------------------
# Forward
# ------------------------------------------------------------------------------------------------


@triton.jit
def ranks(values_i, values_j, i, j):
    """The place of each eigenvalue in descending order, lower columns first among equals."""
    before = (values_i > values_j) | ((values_i == values_j) & (i < j))
    return tl.sum(before.to(tl.int32), 1, keep_dims=True)


@triton.jit
def oriented(V, values, top, i, j, N: tl.constexpr, k: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """v₁ [N, K, 1]: the all-ones vector projected on the top eigenspace and normalised.

    Where the projection is zero, up to what rounding makes of it if the next eigenvalue is near, a unit vector e_m is
    projected instead, m the modality nearest the eigenspace. 0 where the largest eigenvalue is 0.
    """
    tied = top - values <= eigenvalue_gap(k, WIDE) * top
    along = tl.where(tied, tl.sum(V, 1, keep_dims=True), 0.0)
    gap = top - tl.max(tl.where(tied, 0.0, values), 2, keep_dims=True)
    noise = zero_sum(k) * top
    nowhere = tl.sqrt(tl.sum(product(along, along), 2, keep_dims=True)) * gap <= noise
    nearness = tl.sum(tl.where(tied, product(V, V), 0.0), 2, keep_dims=True)
    largest = tl.max(nearness, 1, keep_dims=True)
    tie = tl.maximum(tl.minimum(noise / tl.where(gap > 0, gap, 1.0), 0.5), PEAK_TIE)
    nearest = tl.min(tl.where((nearness >= largest * (1.0 - tie)) & (i < k), i, K), 1, keep_dims=True)
    row = tl.sum(tl.where(i == nearest, V, 0.0), 1, keep_dims=True)
    along = tl.where(nowhere, tl.where(tied, row, 0.0), along)
    v = tl.sum(product(V, along), 2, keep_dims=True)
    squares = tl.sum(product(v, v), 1, keep_dims=True)
    return tl.where(top == 0, 0.0, v * (1.0 / tl.sqrt(tl.where(top == 0, 1.0, squares))))


@triton.jit
def resolvent(record, v_i, v_j, top, i, j, there, k: tl.constexpr):
    """Σ_j v_j v_jᵀ / (λ₁ − λ_j) over j >= 2, for a simple λ₁: (λ₁ I − G + λ₁ v₁v₁ᵀ)⁻¹ − v₁v₁ᵀ/λ₁, by Gauss-Jordan."""
    known = (i < k) & (j < k) & (top > 0)
    eye = tl.where(i == j, 1.0, 0.0)
    gram = load_symmetric(record, "gram", i, j, there, k)
    S = tl.where(known, top * eye - gram + top * v_i * v_j, eye)
    for p in range(k):
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
def projected(A, radial_i, inverse_i, inverse_j, i, j, NORMALIZE: tl.constexpr):
    """From dZ = Z A to dX = X C: dx_m = (dz_m - (z_m . dz_m) z_m) / n_m, the radial parts being known."""
    if NORMALIZE:
        A = tl.where(i == j, A - radial_i, A) * inverse_i * inverse_j  # their product may underflow
    return A


@triton.jit
def finish_forward(
    record,
    there,
    instance,
    mask,
    tau,
    sigma,
    v,
    values_wanted,
    d,
    N: tl.constexpr,
    k: tl.constexpr,
    K: tl.constexpr,
    SPECTRUM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Completes the records of N instances from their eigenpairs, and writes sigma (B, values_wanted) and v (B, k).

    Returns the alignment terms [N, 1, 1], their derivatives by tau, and which instances have two modalities.
    """
    i = tl.arange(0, K)[None, :, None]
    j = tl.arange(0, K)[None, None, :]
    present_i = presence(mask, instance, i, there, k)
    present_j = presence(mask, instance, j, there, k)
    number = tl.sum(present_j.to(tl.int32), 2, keep_dims=True)
    alignable = number >= 2
    inverse_i = load_vector(record, "inverse_norms", i, there, k)
    inverse_j = load_vector(record, "inverse_norms", j, there, k)
    exponent = tl.zeros([N, 1, 1], tl.float64)
    if (WIDE or PAIRS) and not NORMALIZE:
        exponent = tl.load(record + field(k, "exponents"), mask=there, other=0.0)

    if SPECTRUM:
        values_i = load_vector(record, "eigenvalues", i, there, k)
        values = load_vector(record, "eigenvalues", j, there, k)
        tl.debug_barrier()
        broken = tl.sum(zero_or_nan(values), 2, keep_dims=True)
        rank = ranks(values_i, values, i, j)
        counts = rank < tl.minimum(number, d)  # the rest are zeros that are no logits
        values = tl.where(counts, values, 0.0) + broken
        store_vector(record, "eigenvalues", j, there, values, k)
        V = load_square(record, "eigenvectors", i, j, there, k)
        top = tl.max(values, 2, keep_dims=True) + broken
        v_i = oriented(V, values, top, i, j, N, k, K, WIDE) + broken
        sigma_j = tl.sqrt(values)
    else:
        # the last step of power iteration, on G itself
        gram = load_symmetric(record, "gram", i, j, there, k)
        before = load_vector(record, "leading", i, there, k)
        tl.debug_barrier()  # whoever writes it again writes when all have read it
        v_i = tl.sum(product(gram, along_columns(before, N, K)), 2, keep_dims=True)
        v_i = v_i * reciprocal(tl.sqrt(tl.sum(product(v_i, v_i), 1, keep_dims=True)))
        Gv = tl.sum(product(gram, along_columns(v_i, N, K)), 2, keep_dims=True)
        top = tl.sum(product(v_i, Gv), 1, keep_dims=True)
        undecided = tl.load(record + field(k, "undecided"), mask=there, other=0.0) > 0
        ambiguous = tl.max(tl.reshape(undecided.to(tl.int32), [N]), 0) > 0
        weights = tl.zeros([N, 1, K], tl.float64)
        if ambiguous:
            lane = tl.arange(0, K)[None, :] + tl.zeros([N, 1], tl.int32)
            kept = tl.reshape(undecided, [N])
            A = load_tiles(tl.reshape(record, [N]), lane, kept, k, K)
            tl.debug_barrier()
            decompose_tiles(tl.reshape(record, [N]), A, tl.zeros([N], tl.float64), kept, lane, k, K)
            tl.debug_barrier()
            values = load_vector(record, "eigenvalues", j, there, k)
            V = load_square(record, "eigenvectors", i, j, there, k)
            highest = tl.max(values, 2, keep_dims=True)
            top = tl.where(undecided, highest, top)
            v_i = tl.where(undecided, oriented(V, values, highest, i, j, N, k, K, WIDE), v_i)
            tied = highest - values <= eigenvalue_gap(k, WIDE) * highest
            weights = tl.where(tied, 0.0, 1.0 / tl.where(tied, 1.0, highest - values))
            tl.debug_barrier()
        tl.store(record + field(k, "eigenvalues"), top, mask=there)
        if VECTORS:
            T = resolvent(record, v_i, along_columns(v_i, N, K), top, i, j, there, k)
            if ambiguous:
                store_vector(record, "weights", j, there, weights, k)
                tl.debug_barrier()
                T = tl.where(undecided, weighted(record, record + field(k, "weights"), i, j, there, k), T)
                tl.debug_barrier()
            store_symmetric(record, "resolvent", i, j, there, T, k)

    v_j = along_columns(v_i, N, K)
    sigma_1 = tl.sqrt(top)
    store_vector(record, "leading", i, there, v_i, k)
    if v is not None:
        tl.store(v + instance * k + i, v_i.to(v.dtype.element_ty), mask=there & (i < k))
    if sigma is not None:
        if SPECTRUM:
            shown = sigma_j
            if (WIDE or PAIRS) and not NORMALIZE:
                shown = scaled(shown, exponent)
            # a NaN has no rank, and all of its instance are NaN
            place = tl.where(values == values, rank, j)
            inside = there & (j < k) & (place < values_wanted)
            tl.store(sigma + instance * values_wanted + place, shown.to(sigma.dtype.element_ty), mask=inside)
        else:
            shown = sigma_1
            if (WIDE or PAIRS) and not NORMALIZE:
                shown = scaled(shown, exponent)
            tl.store(sigma + instance, shown.to(sigma.dtype.element_ty), mask=there)

    loss = tl.zeros([N, 1, 1], tl.float64)
    slope = tl.zeros([N, 1, 1], tl.float64)
    if ALIGNMENT:
        if SPECTRUM:
            first = rank == 0
            gaps = sigma_1 - sigma_j
            if (WIDE or PAIRS) and not NORMALIZE:
                gaps = scaled(gaps, exponent)
            gaps = gaps / tau
            p = tl.where(counts & (rank > 0), tl.exp(-gaps), 0.0)
            total = tl.sum(p, 2, keep_dims=True)
            loss = log1p(total) + zero_or_nan(tau)  # a bad temperature shows even where there is no logit
            p = tl.where(alignable, p / (1.0 + total), 0.0)
            pull = p / tau
            # where p underflows to 0 beside an infinite gap, their product tends to 0
            slope = tl.sum(tl.where(p == 0, 0.0, product(p, gaps)), 2, keep_dims=True) / tau
            slope += zero_or_nan(top)  # no p tells of a NaN, which has no rank
            g = tl.where(first, -tl.sum(pull, 2, keep_dims=True), pull)  # rather than (p_1 - 1) / tau, which cancels
            weights, first_weight = spectral_weights(g, values, sigma_j, top, first, k, WIDE)
            A, radial = through_spectrum(
                record, record + field(k, "weights"), weights, first_weight, V, values, top, v_i, v_j, i, j, there, k
            )
        else:
            diagonal = tl.sum(tl.where(i == j, gram, 0.0), 2, keep_dims=True)
            trace = tl.sum(diagonal, 1, keep_dims=True)
            loss = tl.maximum(trace - top, 0.0) * reciprocal(tl.sqrt(trace) + sigma_1)
            if (WIDE or PAIRS) and not NORMALIZE:
                loss = scaled(loss, exponent)
            even = tl.where(alignable, reciprocal(tl.sqrt(trace)), 0.0)
            along = tl.where(alignable, -reciprocal(sigma_1), 0.0)
            A = along * v_i * v_j + tl.where(i == j, even, 0.0)
            radial = even * diagonal + along * top * v_i * v_i
        loss = tl.where(alignable | (loss != loss), loss, 0.0) + zero_or_nan(top)  # a NaN in one alone is not swallowed
        C = projected(A, radial, inverse_i, inverse_j, i, j, NORMALIZE)
        store_symmetric(record, "through_alignment", i, j, there, tl.where(present_i & present_j, C, 0.0), k)
        tl.store(record + field(k, "slope"), slope, mask=there)
        tl.store(record + field(k, "alignment"), loss, mask=there)
    if VECTORS:
        tl.debug_barrier()
        share = v_i * reciprocal(sigma_1)
        if NORMALIZE:
            share = share * inverse_i
        store_vector(record, "weights", i, there, share, k)
    return loss, slope, alignable


@triton.jit
def spectral_weights(g, values, sigma_j, top, first, k: tl.constexpr, WIDE: tl.constexpr):
    """g_j / sigma_j, 0 for what is not resolved (the minimum-norm subgradient); and what the first has beyond them.

    In a tied top eigenspace v1 is singled out by the orientation rule, and the others share their mean weight, so that
    nothing depends on the solver's basis there.
    """
    resolved = (values > eigenvalue_floor(k, WIDE) * top) | (values != values)
    weights = tl.where(resolved, g / tl.where(resolved, sigma_j, 1.0), 0.0)
    tied = top - values <= eigenvalue_gap(k, WIDE) * top
    others = tied & (first == 0)
    number = tl.sum(others.to(tl.float64), 2, keep_dims=True)
    shared = tl.sum(tl.where(others, weights, 0.0), 2, keep_dims=True) / tl.maximum(number, 1.0)
    first_weight = tl.sum(tl.where(first, weights, 0.0), 2, keep_dims=True) - shared
    return tl.where(tied, shared, weights), first_weight


@triton.jit
def through_spectrum(record, scratch, weights, first_weight, V, values, top, v_i, v_j, i, j, there, k: tl.constexpr):
    """M = V diag(weights) Vᵀ + first_weight v₁v₁ᵀ, and the diagonal of G M. ``scratch`` has room for k numbers."""
    tl.debug_barrier()
    tl.store(scratch + j, weights, mask=there & (j < k))
    tl.debug_barrier()
    M = weighted(record, scratch, i, j, there, k) + first_weight * v_i * v_j
    radial = tl.sum(product(V * V, values * weights), 2, keep_dims=True) + first_weight * top * v_i * v_i
    return M, radial


# ------------------------------------------------------------------------------------------------
# Backward
# ------------------------------------------------------------------------------------------------


@triton.constexpr_function
def draft_field(k, name):
    """Where a backward pass keeps the coefficients of an instance: the upper triangle of C, c, what the columns' own
    incoming gradients are multiplied by, the exponents of two that the gradients of its columns are still to be
    multiplied by, and k numbers for a while."""
    half = k * (k + 1) // 2
    return {"C": 0, "c": half, "factors": half + k, "exponents": half + 2 * k, "weights": half + 3 * k}[name]


@triton.constexpr_function
def draft_size(k):
    return k * (k + 1) // 2 + 4 * k


@triton.jit
def highest_exponent(x):
    """Of a block [N, a, b] over a and b, as float64's bits have it: 0 for 0, 0x7FF where something is not finite."""
    bits = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
    return tl.max(tl.max(bits, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def as_pairs(pointers):
    """Pointers to numbers in float64 as pointers to the pairs of float32 in their places."""
    return pointers.to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def store_coefficient(draft, at, x, inside, PAIRS: tl.constexpr):
    if PAIRS:
        high = x.to(tl.float32)
        tl.store(as_pairs(draft + at), high, mask=inside)
        tl.store(as_pairs(draft + at) + 1, (x - high.to(tl.float64)).to(tl.float32), mask=inside)
    else:
        tl.store(draft + at, x, mask=inside)


@triton.jit
def store_draft(
    draft, C, c, factors, exponent, there, i, j, k: tl.constexpr, PAIRS: tl.constexpr, THROUGH_U: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """In pairs, all of an instance's coefficients are multiplied by the power of two that makes the largest about 1,
    and the gradients get it back at the end: gradients may be of any size that is a float32, coefficients of more."""
    if PAIRS:
        highest = highest_exponent(C)
        if THROUGH_U:
            highest = tl.maximum(highest, highest_exponent(c))
        if DIRECT:
            highest = tl.maximum(highest, highest_exponent(factors))
        e = tl.where((highest > 0) & (highest < 0x7FF), highest - 1022, 0).to(tl.float64)
        C = scaled(C, -e)
        c = scaled(c, -e)
        factors = scaled(factors, -e)
        exponent = tl.minimum(tl.maximum(exponent + e, -250.0), 250.0)  # beyond that there are only 0 and infinity
    inside = there & (i < k)
    store_coefficient(draft, draft_field(k, "C") + j * (j + 1) // 2 + i, C, there & (i <= j) & (j < k), PAIRS)
    if THROUGH_U:
        store_coefficient(draft, draft_field(k, "c") + i, c, inside, PAIRS)
    if DIRECT:
        store_coefficient(draft, draft_field(k, "factors") + i, factors, inside, PAIRS)
    tl.store(draft + draft_field(k, "exponents") + i, exponent, mask=inside)


@triton.jit
def draft_alignment(
    record, draft, there, instance, mask, grad, N: tl.constexpr, k: tl.constexpr, K: tl.constexpr,
    NORMALIZE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """As ``draft_coefficients``, of a gradient of the alignment term alone."""
    i = tl.arange(0, K)[None, :, None]
    j = tl.arange(0, K)[None, None, :]
    alignable = tl.sum(presence(mask, instance, j, there, k).to(tl.int32), 2, keep_dims=True) >= 2
    C = tl.where(alignable, grad, 0.0) * load_symmetric(record, "through_alignment", i, j, there, k)
    none = tl.zeros([N, K, 1], tl.float64)
    exponent = none
    if NORMALIZE:
        exponent = -load_vector(record, "exponents", i, there, k)
    store_draft(draft, C, none, none, exponent, there, i, j, k, PAIRS, False, False)


@triton.jit
def draft_coefficients(
    record,
    draft,
    there,
    instance,
    mask,
    w,
    direct,
    grad_alignment,
    grad_sigma,
    sigma_strides,
    values_wanted,
    grad_v,
    v_strides,
    N: tl.constexpr,
    k: tl.constexpr,
    K: tl.constexpr,
    SPECTRUM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    THROUGH_U: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """All incoming gradients of N instances to the coefficients of dX = h cᵀ + X C.

    ``w`` and ``direct`` [N, K, 1] are x_m · ∂L/∂u₁ and x_m · ∂L/∂z_m.
    """
    i = tl.arange(0, K)[None, :, None]
    j = tl.arange(0, K)[None, None, :]
    present_i = presence(mask, instance, i, there, k)
    present_j = presence(mask, instance, j, there, k)
    inverse_i = load_vector(record, "inverse_norms", i, there, k)
    inverse_j = load_vector(record, "inverse_norms", j, there, k)
    v_i = load_vector(record, "leading", i, there, k)
    v_j = load_vector(record, "leading", j, there, k)
    A = tl.zeros([N, K, K], tl.float64)
    radial = tl.zeros([N, K, 1], tl.float64)
    if SPECTRUM:
        values = load_vector(record, "eigenvalues", j, there, k)
        V = load_square(record, "eigenvectors", i, j, there, k)
        top = tl.max(values, 2, keep_dims=True) + tl.sum(zero_or_nan(values), 2, keep_dims=True)
    else:
        top = tl.load(record + field(k, "eigenvalues"), mask=there, other=0.0)
    inverse_sigma = reciprocal(tl.sqrt(top))

    if grad_sigma is not None:
        if SPECTRUM:
            rank = ranks(load_vector(record, "eigenvalues", i, there, k), values, i, j)
            place = tl.where(values == values, rank, j)
            at = grad_sigma + instance * sigma_strides[0] + place * sigma_strides[1]
            g = tl.load(at, mask=there & (j < k) & (place < values_wanted), other=0.0).to(tl.float64)
            weights, first_weight = spectral_weights(g, values, tl.sqrt(values), top, rank == 0, k, WIDE)
            scratch = draft + draft_field(k, "weights")
            A, radial = through_spectrum(
                record, scratch, weights, first_weight, V, values, top, v_i, v_j, i, j, there, k
            )
        else:
            along = tl.load(grad_sigma + instance * sigma_strides[0], mask=there, other=0.0).to(tl.float64)
            along = along * inverse_sigma
            A = along * v_i * v_j
            radial = along * top * v_i * v_i

    c = v_i * inverse_sigma
    exponent = tl.zeros([N, K, 1], tl.float64)
    if (WIDE or PAIRS) and NORMALIZE:
        exponent = -load_vector(record, "exponents", i, there, k)
    aligned = tl.zeros([N, K, K], tl.float64)
    if ALIGNMENT:
        # an instance with fewer than two modalities has no alignment term, whatever comes in for it
        alignable = tl.sum(present_j.to(tl.int32), 2, keep_dims=True) >= 2
        grad_alignment = tl.where(alignable, grad_alignment, 0.0)
        aligned = grad_alignment * load_symmetric(record, "through_alignment", i, j, there, k)
    if NORMALIZE:
        w = w * inverse_i
        direct = direct * inverse_i
    if THROUGH_U or grad_v is not None:
        r = w * inverse_sigma
        if grad_v is not None:
            at = grad_v + instance * v_strides[0] + i * v_strides[1]
            r += tl.load(at, mask=present_i, other=0.0).to(tl.float64)
        if SPECTRUM:
            # a gap that does not count has no share, but a NaN that comes in is passed on
            dot = tl.sum(product(V, r), 1, keep_dims=True)
            tied = top - values <= eigenvalue_gap(k, WIDE) * top
            share = tl.where(tied, dot * 0.0, dot / tl.where(tied, 1.0, top - values))
            y = tl.sum(product(V, share), 2, keep_dims=True)
            Gy = tl.sum(product(V, values * share), 2, keep_dims=True)
        else:
            T = load_symmetric(record, "resolvent", i, j, there, k)
            y = tl.sum(product(T, along_columns(r, N, K)), 2, keep_dims=True)
            gram = load_symmetric(record, "gram", i, j, there, k)
            Gy = tl.sum(product(gram, along_columns(y, N, K)), 2, keep_dims=True)
        along = tl.sum(product(v_i, w), 1, keep_dims=True) * inverse_sigma * inverse_sigma * inverse_sigma
        through = y * v_j + v_i * along_columns(y, N, K) - along * v_i * v_j
        radial += v_i * (Gy + top * (y - along * v_i))
        if (WIDE or PAIRS) and not NORMALIZE:
            # ``through`` and c are 2^-e times these, A is not. Up or down, the factor goes where nothing overflows
            # before the sum is formed: on those two, or on A now and on the gradient at the end.
            e = tl.load(record + field(k, "exponents"), mask=there, other=0.0)
            up = tl.maximum(e, 0.0)
            exponent += up - e
            c = scaled(c, -up)
            A = scaled(A, e - up)
            aligned = scaled(aligned, e - up)
            through = scaled(through, -up)
        A += through
        if THROUGH_U:
            radial += c * w
    C = aligned + projected(A, radial + direct, inverse_i, inverse_j, i, j, NORMALIZE)
    if NORMALIZE:
        c = c * inverse_i
    C = tl.where(present_i & present_j, C, 0.0)
    c = tl.where(present_i, c, 0.0)
    store_draft(draft, C, c, inverse_i, exponent, there, i, j, k, PAIRS, THROUGH_U, DIRECT and NORMALIZE)
