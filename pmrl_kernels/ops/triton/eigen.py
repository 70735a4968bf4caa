"""Eigenpairs of symmetric positive semidefinite k x k matrices, many at a time: the device functions.

Two layouts of the same two methods, cyclic Jacobi for all pairs and repeated squaring for the leading one:

* lanes (k <= 8): an instance per lane. A matrix is a tuple of blocks [N], one per entry, all in registers. No lane
  waits for another, so this has the highest throughput; one program needs N instances at once.
* tiles (any k): K = 2^b >= k lanes per instance. A matrix is a tuple of K blocks [N, K] in XOR order: entry (j ^ y, j)
  is in lane j of block y. Its registers are few, K^2 / 32 numbers a lane for each matrix, and N may be 1.

In XOR order the K - 1 rounds of a sweep rotate all pairs (j, j ^ r), r = 1 .. K - 1, and the partner of block y in
round r is block y ^ r: no index into registers may depend on r, or they would live in memory. Taking r through the
powers of a generator g of the field GF(2^b) makes all rounds the same code, a loop: before round t the block called
y is the one that belongs to g^t * y, so the partner is always block y ^ 1, and going on to the next round only renames
the blocks, y <- g * y. After K - 1 rounds every name is its own again.

Angles are found in float32 and applied in float64, as in csrc/common/eigen.h, whose comments give the reasons.
"""

import triton
import triton.language as tl

from .. import constants

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

JACOBI_TOLERANCE = tl.constexpr(constants.JACOBI_TOLERANCE)
MAX_SWEEPS = tl.constexpr(constants.MAX_SWEEPS)
FOUR_EPS64 = tl.constexpr(4 * constants.EPS64)
PEAK_TIE = tl.constexpr(constants.PEAK_TIE)
RANK_ONE = tl.constexpr(constants.RANK_ONE)

# ------------------------------------------------------------------------------------------------
# What is known when a kernel is compiled
# ------------------------------------------------------------------------------------------------


@triton.constexpr_function
def next_power_of_two(k):
    """The lanes of an instance of k modalities: at least 2, so that there is someone to rotate with."""
    return max(2, 1 << (k - 1).bit_length())


@triton.constexpr_function
def triangle(i, j):
    """Where entry (i, j) of a symmetric matrix is in its upper triangle, column by column."""
    return max(i, j) * (max(i, j) + 1) // 2 + min(i, j)


@triton.constexpr_function
def games(k):
    """Rotations in a round: the pairs of a round-robin tournament of k players share no index."""
    return (k + 1) // 2


@triton.constexpr_function
def rounds(k):
    return k + k % 2 - 1


@triton.constexpr_function
def game(k, number):
    """Who plays game ``number`` of the first round; an odd k is played with one who sits out, index k."""
    circle = rounds(k)
    a, b = (number, circle - number) if number else (circle, 0)
    return min(a, b), max(a, b)


@triton.constexpr_function
def seat(k, player):
    """The tournament goes on by moving everyone but the last to the next seat, which renames registers."""
    circle = rounds(k)
    return (player + 1) % circle if player < circle else player


_FIELDS = {2: 0b11, 4: 0b111, 8: 0b1011, 16: 0b10011, 32: 0b100101}  # primitive polynomials over GF(2)


@triton.constexpr_function
def bits(K):
    return K.bit_length() - 1


@triton.constexpr_function
def times_generator(K, y):
    """g * y in GF(K), g = 2 being a generator (1 in GF(2), which has no other)."""
    if K == 2:
        return y
    y = y << 1
    return y ^ _FIELDS[K] if y >= K else y


# Functions of k and of whether the input is float64, as tables: Triton follows no plain function from a kernel.
_CASES = [(k, float64) for k in range(1, constants.MAX_MODALITIES + 1) for float64 in (False, True)]
_SQUARINGS = {case: constants.squarings(*case) for case in _CASES}
_GAPS = {case: constants.eigenvalue_gap(*case) for case in _CASES}
_ZERO_SUMS = {case: constants.zero_sum(case[0]) for case in _CASES}


@triton.constexpr_function
def squarings(k, float64_input):
    return _SQUARINGS[k, float64_input]


@triton.constexpr_function
def eigenvalue_gap(k, float64_input):
    return _GAPS[k, float64_input]


@triton.constexpr_function
def zero_sum(k):
    return _ZERO_SUMS[k, False]


# ------------------------------------------------------------------------------------------------
# Small things
# ------------------------------------------------------------------------------------------------


@triton.jit
def put(values, at: tl.constexpr, x):
    """The tuple with one entry replaced."""
    return values[:at] + (x,) + values[at + 1 :]


@triton.jit
def any_of(condition):
    """1 if the condition holds anywhere in a block of one dimension, else 0."""
    return tl.max(condition.to(tl.int32), 0)


@triton.jit
def binade(x):
    """The power of two below a positive, normal float64."""
    bits = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def zero_or_nan(x):
    """0, or NaN where x is not finite. If x is a product a b, compilers make of x - x the fused a b - x, which is what
    rounding took."""
    return x * 0.0


@triton.jit
def product(a, b):
    """a b, rounded. For sums over lanes: each lane would fuse its own product with the others' sums, and every one of
    them come out with other last bits, where all are to have the same number."""
    if INTERPRETED:
        return a * b
    else:
        return tl.math.fma(a, b, tl.zeros_like(a))


@triton.jit
def reciprocal(x):
    """1/x, and 0 where x = 0: a zero vector has no direction and takes no gradient."""
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def rotation(app, apq, aqq, least):
    """Cosine and sine of the rotation in the plane (p, q) that makes a_pq zero, or of none where a_pq² <= least."""
    d = aqq - app
    e = apq + apq
    x = tl.where(d < 0, -e, e).to(tl.float32)
    y = tl.abs(d).to(tl.float32)
    t = x / (y + tl.sqrt(y * y + x * x) + 1e-37)  # 0 / 0 is to be 0
    cosine = tl.rsqrt(1.0 + t * t)
    c = cosine.to(tl.float64)
    s = (t * cosine).to(tl.float64)
    error = 1.0 - (c * c + s * s)
    f = 1.0 + error * (0.5 + 0.375 * error)
    turns = apq * apq > least
    return tl.where(turns, c * f, 1.0), tl.where(turns, s * f, 0.0)


@triton.jit
def unclear(total, squarings, k: tl.constexpr):
    """What the sum of v₁'s entries says: that v₁ has to be turned, and whether it is too near what counts as zero.

    n squarings down to rank 1 tell that the gap is between 28 and 64 times 2^-n, and zero_sum over it 1 to 3 times
    ``zero``.
    """
    scale = ((squarings.to(tl.int64) + (1023 - 6)) << 52).to(tl.float64, bitcast=True)
    zero = zero_sum(k) * tl.maximum(scale, 1.0)
    size = tl.abs(total)
    return total < -zero, (size < 8.0 * zero) & ((size > 0.5 * zero) | (zero > 0.5 * PEAK_TIE))


# ------------------------------------------------------------------------------------------------
# Lanes: an instance per lane
# ------------------------------------------------------------------------------------------------


@triton.jit
def _turn(A, V, least, p: tl.constexpr, q: tl.constexpr, k: tl.constexpr):
    """A <- RᵀAR and V <- VR. The diagonal moves by what it gains: rounding costs in proportion to the angle."""
    if q < k:
        app = A[triangle(p, p)]
        apq = A[triangle(p, q)]
        aqq = A[triangle(q, q)]
        c, s = rotation(app, apq, aqq, least)
        sd = s * (aqq - app)
        gain = s * (sd - c * (apq + apq))
        A = put(A, triangle(p, p), app + gain)
        A = put(A, triangle(p, q), (c * c - s * s) * apq - c * sd)
        A = put(A, triangle(q, q), aqq - gain)
        for r in tl.static_range(k):
            if r != p and r != q:
                a = A[triangle(r, p)]
                b = A[triangle(r, q)]
                A = put(A, triangle(r, p), c * a - s * b)
                A = put(A, triangle(r, q), s * a + c * b)
        for r in tl.static_range(k):
            a = V[r * k + p]
            b = V[r * k + q]
            V = put(V, r * k + p, c * a - s * b)
            V = put(V, r * k + q, s * a + c * b)
    return A, V


@triton.jit
def _round(A, V, least, k: tl.constexpr):
    for number in tl.static_range(games(k)):
        A, V = _turn(A, V, least, game(k, number)[0], game(k, number)[1], k)
    movedA = A
    movedV = V
    for j in tl.static_range(k):
        for i in tl.static_range(j + 1):
            movedA = put(movedA, triangle(i, j), A[triangle(seat(k, i), seat(k, j))])
        for r in tl.static_range(k):
            movedV = put(movedV, r * k + j, V[r * k + seat(k, j)])
    return movedA, movedV


@triton.jit
def jacobi_lanes(A, k: tl.constexpr):
    """Eigenvalues (a tuple of k blocks [N], in no order, at least 0) and eigenvectors (k², row by row) of A.

    A holds the upper triangle, in blocks [N]. A matrix that is not finite has to be kept from here.
    """
    trace = A[0]
    for j in tl.static_range(1, k):
        trace += A[triangle(j, j)]
    scale = binade(tl.where(trace > 0, trace, 1.0))
    V = ()
    for i in tl.static_range(k):
        for j in tl.static_range(k):
            V = V + (tl.zeros_like(trace) + (1.0 if i == j else 0.0),)
    for at in tl.static_range(k * (k + 1) // 2):
        A = put(A, at, A[at] * (1.0 / scale))
    sweeps = 0
    going = 1
    while going > 0:
        diagonal = A[0] * A[0]
        off = tl.zeros_like(diagonal)
        for j in tl.static_range(1, k):
            diagonal += A[triangle(j, j)] * A[triangle(j, j)]
            for i in tl.static_range(j):
                off += A[triangle(i, j)] * A[triangle(i, j)]
        tolerance = JACOBI_TOLERANCE * diagonal
        active = off + off > tolerance
        going = any_of(active)
        if going > 0:
            # a lane that has converged turns no more, so it does not depend on its neighbours
            least = tl.where(active, tolerance * (1.0 / (k * k)), float("inf"))
            for _ in range(rounds(k)):
                A, V = _round(A, V, least, k)
        sweeps += 1
        going = tl.where(sweeps < MAX_SWEEPS, going, 0)
    values = ()
    for j in tl.static_range(k):
        values = values + (tl.maximum(A[triangle(j, j)], 0.0) * scale,)
    return values, V


@triton.jit
def _times(A, x, k: tl.constexpr):
    """A x for a symmetric A."""
    y = ()
    for i in tl.static_range(k):
        total = A[triangle(i, 0)] * x[0]
        for j in tl.static_range(1, k):
            total += A[triangle(i, j)] * x[j]
        y = y + (total,)
    return y


@triton.jit
def _unit(x, k: tl.constexpr):
    squares = x[0] * x[0]
    for i in tl.static_range(1, k):
        squares += x[i] * x[i]
    inverse = 1.0 / tl.sqrt(squares)
    for i in tl.static_range(k):
        x = put(x, i, x[i] * inverse)
    return x


@triton.jit
def power_lanes(P, k: tl.constexpr, FLOAT64: tl.constexpr):
    """The oriented v₁ of A = P (k blocks [N]) but for a last step on A itself (``finish_forward`` takes it, so A is
    not kept meanwhile), and where Jacobi has to decide: where the top is tied, or within rounding of it, or the sum
    of v₁'s entries within rounding of what counts as zero.

    P = (A / tr A)^(2^s) tends to v₁v₁ᵀ in a bounded number of squarings. A has to be finite with a positive trace.
    """
    trace = P[0]
    for j in tl.static_range(1, k):
        trace += P[triangle(j, j)]
    inverse = 1.0 / trace
    for at in tl.static_range(k * (k + 1) // 2):
        P = put(P, at, P[at] * inverse)
    steps = 0
    moving = tl.full(trace.shape, 1, tl.int32)
    needed = tl.zeros_like(moving)  # squarings down to rank 1
    going = 1
    while going > 0:
        Q = P
        total = tl.zeros_like(trace)
        for j in tl.static_range(k):
            for i in tl.static_range(j + 1):
                dot = P[triangle(i, 0)] * P[triangle(0, j)]
                for m in tl.static_range(1, k):
                    dot += P[triangle(i, m)] * P[triangle(m, j)]
                Q = put(Q, triangle(i, j), dot)
            total += Q[triangle(j, j)]
        needed += tl.where(1.0 - total > RANK_ONE, moving, 0)
        inverse = 1.0 / total
        change = tl.zeros_like(trace)
        for at in tl.static_range(k * (k + 1) // 2):
            step = Q[at] * inverse
            change = tl.maximum(change, tl.abs(step - P[at]))
            P = put(P, at, tl.where(moving > 0, step, P[at]))
        moving = tl.where(change > FOUR_EPS64, moving, 0)
        steps += 1
        going = tl.where(steps < squarings(k, FLOAT64), tl.max(moving, 0), 0)

    frobenius = tl.zeros_like(trace)
    largest = tl.zeros_like(trace)
    for i in tl.static_range(k):
        for j in tl.static_range(k):
            frobenius += P[triangle(i, j)] * P[triangle(i, j)]
        largest = tl.maximum(largest, P[triangle(i, i)])
    x = ()
    for i in tl.static_range(k):
        x = x + (P[triangle(k - 1, i)],)
    for back in tl.static_range(1, k):  # so that the lowest index is the last to be written
        here = P[triangle(k - 1 - back, k - 1 - back)] >= largest * (1 - PEAK_TIE)
        for i in tl.static_range(k):
            x = put(x, i, tl.where(here, P[triangle(k - 1 - back, i)], x[i]))
    x = _unit(_times(P, x, k), k)  # squares the share of other eigenvectors once more
    total = x[0]
    for i in tl.static_range(1, k):
        total += x[i]
    against, undecided = unclear(total, needed, k)
    for i in tl.static_range(k):
        x = put(x, i, tl.where(against, -x[i], x[i]))
    return x, undecided | (1.0 - frobenius > RANK_ONE)


# ------------------------------------------------------------------------------------------------
# Tiles: K lanes per instance
# ------------------------------------------------------------------------------------------------


@triton.jit
def _renamed(blocks, K: tl.constexpr):
    out = ()
    for y in tl.static_range(K):
        out = out + (blocks[times_generator(K, y)],)
    return out


# What the block called y belongs to, g^t y, is linear in y: one integer for each bit of y says it all.


@triton.jit
def _first_offsets(K: tl.constexpr):
    offsets = ()
    for bit in tl.static_range(bits(K)):
        offsets = offsets + (tl.full([], 1 << bit, tl.int32),)
    return offsets


@triton.jit
def _offset(offsets, y: tl.constexpr, K: tl.constexpr):
    out = tl.full([], 0, tl.int32)
    for bit in tl.static_range(bits(K)):
        if (y >> bit) & 1:
            out = out ^ offsets[bit]
    return out


@triton.jit
def _next_offsets(offsets, K: tl.constexpr):
    out = ()
    for bit in tl.static_range(bits(K)):
        out = out + (_offset(offsets, times_generator(K, 1 << bit), K),)
    return out


@triton.jit
def _tile_round(A, V, offsets, lane, least, K: tl.constexpr):
    there = lane ^ offsets[0]
    low = lane < there
    apq = tl.where(low, A[1], tl.gather(A[1], there, 1))  # one number for both, or rounding destroys V
    other = tl.gather(A[0], there, 1)
    c, s = rotation(tl.where(low, A[0], other), apq, tl.where(low, other, A[0]), least)
    s = tl.where(low, -s, s)
    B = ()
    for y in tl.static_range(K):  # columns
        B = B + (c * A[y] + s * tl.gather(A[y ^ 1], there, 1),)
    for pair in tl.static_range(K // 2):  # rows
        row = lane ^ _offset(offsets, 2 * pair, K)
        c_row = tl.gather(c, row, 1)
        s_row = tl.gather(s, row, 1)
        A = put(A, 2 * pair, c_row * B[2 * pair] + s_row * B[2 * pair + 1])
        A = put(A, 2 * pair + 1, c_row * B[2 * pair + 1] - s_row * B[2 * pair])
    for x in tl.static_range(K):
        V = put(V, x, c * V[x] + s * tl.gather(V[x], there, 1))
    return _renamed(A, K), V, _next_offsets(offsets, K)


@triton.jit
def jacobi_tiles(A, lane, K: tl.constexpr):
    """Eigenvalues [N, K] in no order, at least 0, and eigenvectors (K blocks [N, K]: row x, lane j) of A in XOR order.

    Rows and columns beyond k are zeros and stay out of every rotation.
    """
    trace = tl.sum(A[0], 1)
    scale = binade(tl.where(trace > 0, trace, 1.0))
    inverse = (1.0 / scale)[:, None]
    V = ()
    offsets = _first_offsets(K)
    for y in tl.static_range(K):
        A = put(A, y, A[y] * inverse)
        V = V + (tl.where(lane == y, 1.0, 0.0).to(tl.float64),)
    sweeps = 0
    going = 1
    while going > 0:
        diagonal = tl.sum(product(A[0], A[0]), 1)
        squares = tl.zeros_like(A[0])
        for y in tl.static_range(1, K):
            squares += A[y] * A[y]
        tolerance = JACOBI_TOLERANCE * diagonal
        active = tl.sum(squares, 1) > tolerance
        going = any_of(active)
        if going > 0:
            least = tl.where(active, tolerance * (1.0 / (K * K)), float("inf"))[:, None]
            for _ in range(K - 1):
                A, V, offsets = _tile_round(A, V, offsets, lane, least, K)
        sweeps += 1
        going = tl.where(sweeps < MAX_SWEEPS, going, 0)
    return tl.maximum(A[0], 0.0) * scale[:, None], V


@triton.jit
def _tile_square(P, lane, K: tl.constexpr):
    """P² in XOR order: entry (j ^ y, j) is the sum over z of P_(j^y, j^z) P_(j^z, j), z = 0 and the powers of g."""
    Q = ()
    offsets = _first_offsets(K)
    for y in tl.static_range(K):
        Q = Q + (P[y] * P[0],)
    for _ in range(K - 1):
        there = lane ^ offsets[0]
        for y in tl.static_range(K):
            Q = put(Q, y, Q[y] + tl.gather(P[y ^ 1], there, 1) * P[1])
        P = _renamed(P, K)
        Q = _renamed(Q, K)
        offsets = _next_offsets(offsets, K)
    return Q


@triton.jit
def _tile_times(A, x, lane, K: tl.constexpr):
    total = A[0] * x
    for y in tl.static_range(1, K):
        total += A[y] * tl.gather(x, lane ^ y, 1)
    return total


@triton.jit
def _tile_unit(x):
    inverse = (1.0 / tl.sqrt(tl.sum(product(x, x), 1)))[:, None]
    return product(x, tl.zeros_like(x) + inverse)  # sums over lanes follow


@triton.jit
def power_tiles(P, lane, k: tl.constexpr, K: tl.constexpr, FLOAT64: tl.constexpr):
    """As ``power_lanes``: v₁ [N, K] of A = P, and where Jacobi has to decide."""
    inverse = (1.0 / tl.sum(P[0], 1))[:, None]
    for y in tl.static_range(K):
        P = put(P, y, P[y] * inverse)
    steps = 0
    moving = tl.full([P[0].shape[0]], 1, tl.int32)
    needed = tl.zeros_like(moving)
    going = 1
    while going > 0:
        Q = _tile_square(P, lane, K)
        total = tl.sum(Q[0], 1)
        needed += tl.where(1.0 - total > RANK_ONE, moving, 0)
        inverse = (1.0 / total)[:, None]
        change = tl.zeros_like(P[0])
        for y in tl.static_range(K):
            step = Q[y] * inverse
            change = tl.maximum(change, tl.abs(step - P[y]))
            P = put(P, y, tl.where(moving[:, None] > 0, step, P[y]))
        moving = tl.where(tl.max(change, 1) > FOUR_EPS64, moving, 0)
        steps += 1
        going = tl.where(steps < squarings(k, FLOAT64), tl.max(moving, 0), 0)

    squares = P[0] * P[0]
    for y in tl.static_range(1, K):
        squares += P[y] * P[y]
    largest = tl.max(P[0], 1)[:, None] * (1 - PEAK_TIE)
    peak = tl.min(tl.where(P[0] >= largest, lane, K), 1)[:, None]
    x = tl.zeros_like(P[0])
    for y in tl.static_range(K):
        x = tl.where((lane ^ y) == peak, P[y], x)
    x = _tile_unit(_tile_times(P, x, lane, K))
    against, undecided = unclear(tl.sum(x, 1), needed, k)
    return tl.where(against[:, None], -x, x), undecided | (1.0 - tl.sum(squares, 1) > RANK_ONE)
