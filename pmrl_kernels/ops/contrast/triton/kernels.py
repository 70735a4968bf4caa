"""The kernels of the contrasts of unit vectors: similarities on tensor cores, as exact as float32, never all at once.

    prepare_kernel   rows to fp16 parts; similarities with partners; which rows there are
    similar_kernel   a tile of similarities; sums of exponentials over its rows and over its columns; losses, their mean
    finish_kernel    the latter, where rows go by strips or are a process's own
    weights_kernel   (backward) the tile again; what multiplies the other side's rows, in fp16 parts
    product_kernel   (backward) gradients, the weights times the other side's rows

**Similarities.** Tensor cores do not round what they add, they cut it, and so a sum in float32 loses up to a unit of
its last place each time. But sums of whole numbers below 2²⁴ are exact however they are added up. With x' = 4092 x,
|x| <= 1, a row is hi + lo, hi the nearest whole number to x' and lo what is left, both in fp16:

    4092² a·b = Σ hi hi' + (Σ hi lo' + Σ lo hi' + Σ lo lo')

up to what fp16 cannot hold of lo, less than 2⁻¹¹ of it. The first sum is at most 4092² < 2²⁴ plus what rounding to
whole numbers adds, and exact; the others are small. All four are of what is loaded once. Positives are of the same
sums, so that a row and its equal have the same similarity. Where products in reduced precision are allowed, Σ w w' is
the similarity, w being x' in fp16.

**Exponentials.** With s <= 1 and τ >= 1/64 exp(s/τ) fits float32 as it is, with room for sums; vectors with themselves
(``itself``) take exp((s - 1)/τ), which is right for any τ, since their positives are 1. Below 1/64 (*steep*) sums over
the rows and columns of a tile are kept as logarithms, relative to the positive.

**Ways.** Of a pair (a, b) of vectors, the rows of a choose among those of b, and those of b among those of a: two ways,
of which the similarities are each other's transpose; ``sides`` and ``way_of`` say which. Vectors with themselves have
one.

Buffers: what is prepared of rows, see ``state.Prepared``; losses (ways of a pair, P, N), float64. Rows of a batch over
several processes: ``start`` is the first of this process's n, and everyone's are the columns.
"""

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...triton.eigen import INTERPRETED, zero_or_nan
from ...triton.scalars import expm1, log1p, read_temperature

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)
UNIT = tl.constexpr(4092.0)
_INVERSE = 1 / 4092.0**2
SQUARE = tl.constexpr(struct.unpack("f", struct.pack("f", _INVERSE))[0])  # in float32, and what that leaves
SQUARE_LOW = tl.constexpr(_INVERSE - SQUARE.value)
STEEP = tl.constexpr(1 / 64)
COUNTED = tl.constexpr(1)  # a row of a pair that has losses,
SEEN = tl.constexpr(2)  # may be chosen by the other side as a row of a, and, twice this, of b


# Numbers of several types share a buffer, one for the host to allocate.


@triton.jit
def parts_of(prepared):
    return (prepared.buffer + prepared.parts).to(tl.pointer_type(tl.float16), bitcast=True)


@triton.jit
def positives_of(prepared):
    return (prepared.buffer + prepared.positives).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def flags_in(prepared):
    return (prepared.buffer + prepared.flags).to(tl.pointer_type(tl.int8), bitcast=True)


@triton.jit
def counters_of(prepared):
    return (prepared.buffer + prepared.counters).to(tl.pointer_type(tl.int32), bitcast=True)


class Sizes(NamedTuple):
    """Numbers of rows and the like. (An argument of kernels.)"""

    rows: int  # n, of this process
    columns: int  # N, everyone's
    start: int  # where the former are among the latter
    padded: int  # NP, the rows of parts
    tiles: int  # of N


class Strip(NamedTuple):
    """Rows that are looked at, in tiles."""

    first: int
    height: int


class Form(NamedTuple):
    """What is paired with what. (Known when a kernel is compiled, but for k.)"""

    itself: bool  # one vector with itself
    star: bool  # k vectors with vector 0, which comes before them
    clique: bool  # each of k with each other one; else, k with k others
    rows_only: bool  # a way at a time; else tiles serve both ways of a pair
    exact: bool  # several products, of what is loaded once; else one


@triton.jit
def triangular(at):
    """(i, j) with 0 <= i <= j, the at-th: (0, 0), (0, 1), (1, 1), (0, 2), ... A square root need not be exact."""
    j = tl.floor((tl.sqrt(8.0 * at.to(tl.float32) + 1.0) - 1.0) * 0.5).to(at.dtype)
    j = tl.where(at >= (j + 1) * (j + 2) // 2, j + 1, j)
    j = tl.where(at < j * (j + 1) // 2, j - 1, j)
    return at - j * (j + 1) // 2, j


@triton.jit
def sides(pair, k, FORM: tl.constexpr):
    """The two vectors of a pair."""
    if FORM.itself:
        return pair * 0, pair * 0
    elif FORM.star:
        return pair + 1, pair * 0
    elif FORM.clique:  # (0, 1), (0, 2), (1, 2), (0, 3), ...
        i, j = triangular(pair)
        return i, j + 1
    else:
        return pair, k + pair


@triton.jit
def way_of(vector, number, k, FORM: tl.constexpr):
    """Of the ways in which the rows of a vector choose: pair and direction."""
    if FORM.itself:
        return vector, vector * 0
    elif FORM.star:
        return tl.where(vector == 0, number, vector - 1), tl.where(vector == 0, 1, 0)
    elif FORM.clique:
        other = number + (number >= vector).to(tl.int32)
        low, high = tl.minimum(vector, other), tl.maximum(vector, other)
        return high * (high - 1) // 2 + low, (other < vector).to(tl.int32)
    else:
        return tl.where(vector < k, vector, vector - k), (vector >= k).to(tl.int32)


@triton.jit
def number_of_ways(vector, k, FORM: tl.constexpr):
    if FORM.star:
        return tl.where(vector == 0, k, 1)
    elif FORM.clique:
        return vector * 0 + k - 1
    else:
        return vector * 0 + 1


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


@triton.jit
def prepare_kernel(
    x, mask, prepared, counters, d, k, pairs, width, sizes, MASKED: tl.constexpr, DIRECTIONS: tl.constexpr,
    FORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hi, lo and w of ROWS rows of all vectors; s_i⁺ = a_i·b_i of all pairs, and what of these rows there is.

    Reads x: V matrices (N, d), and the mask (N, MASKED) of the last ones; writes ``prepared``, of whose counters so
    many are set to 0. A row has a part in its sides' losses where it is there on both; a side that is defined by
    the others (the first, of a star) may be chosen where it is there.
    """
    V: tl.constexpr = len(x.offsets)
    N = sizes.columns
    parts, positives, flags = parts_of(prepared), positives_of(prepared), flags_in(prepared)
    there = (prepared.buffer + prepared.there).to(tl.pointer_type(tl.int8), bitcast=True)
    counter = counters_of(prepared)
    if tl.program_id(0) == 0:
        for begin in range(0, counters, 256):
            at = begin + tl.arange(0, 256)
            tl.store(counter + at, tl.zeros([256], tl.int32), mask=at < counters)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    to = row[:, None] * width
    plane = sizes.padded * width
    for v in tl.static_range(V):
        present = inside
        if mask is not None:
            if v >= V - MASKED:
                present = tl.load(mask + row * MASKED + (v - V + MASKED), mask=inside, other=0) != 0
        other_than_zero = tl.zeros([ROWS, BLOCK], tl.int32)
        p = x.pointer + x.offsets[v] + row[:, None] * x.strides[v]
        out = parts + v * 3 * plane + to
        for c in range(0, width, BLOCK):
            at = (c + tl.arange(0, BLOCK))[None, :]
            value = tl.load(p + at, mask=present[:, None] & (at < d), other=0.0)
            other_than_zero |= (value != 0).to(tl.int32)
            value = value * UNIT
            whole = tl.floor(value + 0.5).to(tl.float16).to(tl.float32)  # an even one beyond 2048
            within = (row < sizes.padded)[:, None]
            tl.store(out + at, whole.to(tl.float16), mask=within)
            tl.store(out + plane + at, (value - whole).to(tl.float16), mask=within)
            tl.store(out + 2 * plane + at, value.to(tl.float16), mask=within)
        if DIRECTIONS[v]:
            present = tl.max(other_than_zero, 1) != 0
        tl.store(there + v * N + row, present.to(tl.int8), mask=inside)
    tl.debug_barrier()
    for number in range(pairs):
        pair = k * 0 + number  # a tensor in the interpreter, too
        a, b = sides(pair, k, FORM)
        a, b = a.to(tl.int64), b.to(tl.int64)
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        low = tl.zeros([ROWS, BLOCK], tl.float32)
        p_a, p_b = parts + a * 3 * plane + to, parts + b * 3 * plane + to
        for c in range(0, width, BLOCK):
            at = (c + tl.arange(0, BLOCK))[None, :]
            if FORM.itself:
                sums += load_part(p_a + at, inside) * 0.0
            elif FORM.exact:
                hi_a, lo_a = load_part(p_a + at, inside), load_part(p_a + plane + at, inside)
                hi_b, lo_b = load_part(p_b + at, inside), load_part(p_b + plane + at, inside)
                sums += hi_a * hi_b
                low += lo_a * lo_b + lo_a * hi_b
                low += hi_a * lo_b
            else:
                sums += load_part(p_a + 2 * plane + at, inside) * load_part(p_b + 2 * plane + at, inside)
        positive = unscaled(tl.sum(sums, 1) + tl.sum(low, 1))
        if FORM.itself:  # by definition, unless the row is not finite
            positive += 1.0
        # an Inf must not turn into weight 0
        positive = tl.where(tl.abs(positive) < float("inf"), positive, float("nan"))
        there_a = tl.load(there + a * N + row, mask=inside, other=0).to(tl.int32)
        there_b = tl.load(there + b * N + row, mask=inside, other=0).to(tl.int32)
        both = there_a & there_b
        seen_a = there_a
        if FORM.star:
            seen_a = both
        flag = both * COUNTED + seen_a * SEEN + there_b * (2 * SEEN)
        tl.store(flags + pair.to(tl.int64) * N + row, flag.to(tl.int8), mask=inside)
        tl.store(positives + pair.to(tl.int64) * N + row, positive, mask=inside)


@triton.jit
def load_part(pointer, inside):
    return tl.load(pointer, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_row(pointer, plane, mask):
    """Entries times UNIT, to 25 bits."""
    whole = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    return whole + tl.load(pointer + plane, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def unscaled(x):
    """x / UNIT², rounded once where products and sums are fused: an inverse that is itself rounded would make all
    similarities too large or too small, and the losses with them. Which product is fused is said here: compilers choose
    now the one and now the other, and equal rows would not be as similar forward as backward."""
    if INTERPRETED:
        return x * SQUARE + x * SQUARE_LOW
    else:
        return tl.math.fma(x, SQUARE, x * SQUARE_LOW)


# ------------------------------------------------------------------------------------------------
# Tiles of similarities
# ------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Made by kernels: of which pair, in which direction, which rows and columns."""

    pair: Any
    direction: Any
    I: Any  # noqa: E741
    J: Any
    row: Any  # the first, among everyone's
    column: Any
    lane: Any  # 0, 1, ... of the rows and of the columns
    rows: Any  # how many of these there are
    columns: Any


@triton.jit
def tile_of(job, at, sizes, strip, FORM: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr):
    """The at-th tile of a job: a pair, or one of its ways. Of vectors with themselves, unless it is a way, those on the
    diagonal and right of it: the first ``height`` columns of tiles from the strip's corner are a triangle, and the
    others whole. Neighbours share rows or columns, so that these stay in cache."""
    if FORM.itself and not FORM.rows_only:
        I, J = triangular(at.to(tl.int64))  # noqa: E741
        beyond = at - strip.height * (strip.height + 1) // 2
        J = strip.first + tl.where(beyond < 0, J, strip.height + beyond // strip.height)
        I = strip.first + tl.where(beyond < 0, I, beyond % strip.height)  # noqa: E741
    else:
        first = at // (GROUP * sizes.tiles) * GROUP
        height = tl.minimum(strip.height - first, GROUP)
        within = at % (GROUP * sizes.tiles)
        I = strip.first + first + within % height  # noqa: E741
        J = within // height
    pair, direction = job, job * 0
    if FORM.rows_only and not FORM.itself:
        pair, direction = job // 2, job % 2
    lane = tl.arange(0, TILE)
    left, right = sizes.rows - I * TILE, sizes.columns - J * TILE
    return Tile(pair, direction, I, J, sizes.start + I * TILE, J * TILE, lane, left, right)


@triton.jit
def others(tile):
    """Which similarities are not those of positives."""
    distance = (tile.column - tile.row).to(tl.int32)
    return tile.lane[:, None] != tile.lane[None, :] + distance


@triton.jit
def similarities(prepared, tile, k, width, sizes, FORM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """a bᵀ (TILE, TILE)."""
    parts = parts_of(prepared)
    x, y = sides(tile.pair, k, FORM)
    if FORM.rows_only:
        x, y = tl.where(tile.direction == 0, x, y), tl.where(tile.direction == 0, y, x)
    c = tl.arange(0, BLOCK)
    plane = sizes.padded * width
    a = parts + x.to(tl.int64) * 3 * plane + tile.row * width + (tile.lane[:, None] * width + c[None, :])
    b = parts + y.to(tl.int64) * 3 * plane + tile.column * width + (tile.lane[None, :] * width + c[:, None])
    nothing = tl.zeros([TILE, TILE], tl.float32)
    if FORM.exact:
        s, low = nothing, nothing
        for c in range(0, width, BLOCK):
            hi_a, lo_a = tl.load(a + c), tl.load(a + plane + c)
            hi_b, lo_b = tl.load(b + c), tl.load(b + plane + c)
            low = tl.dot(lo_a, lo_b, low)
            low = tl.dot(lo_a, hi_b, low)
            low = tl.dot(hi_a, lo_b, low)
            s = tl.dot(hi_a, hi_b, s)
        s += low
    else:
        s = nothing
        for c in range(0, width, BLOCK):
            s = tl.dot(tl.load(a + 2 * plane + c), tl.load(b + 2 * plane + c), s)
    s = unscaled(s)
    if FORM.itself:
        s = tl.where(s > 1.0, 1.0, s)  # a NaN stays one
    return s


@triton.jit
def rows_and_columns(tile, sizes):
    """(TILE, 2): where a tile's rows and its columns are in vectors of pairs, and which there are.

    What is loaded for both at once is loaded, and worked on, once. Of one vector alone, which has fewer numbers than
    there are threads, the compiler has each thread load all it will need: up to half a row of a tile, of float64.
    """
    side, lane = tl.arange(0, 2)[None, :], tile.lane[:, None]
    first, there = tl.where(side == 0, tile.row, tile.column), tl.where(side == 0, tile.rows, tile.columns)
    return tile.pair.to(tl.int64) * sizes.columns + first + lane, lane < there


@triton.jit
def flags_of(prepared, tile, sizes, FORM: tl.constexpr):
    """(TILE, 2): of rows and columns, whether they have a loss and whether they may be chosen."""
    at, there = rows_and_columns(tile, sizes)
    flag = tl.load(flags_in(prepared) + at, mask=there, other=0).to(tl.int32)
    side = tl.arange(0, 2)[None, :]
    if FORM.rows_only:
        side = side ^ tile.direction
    return (flag & COUNTED) != 0, (flag & (SEEN << side)) != 0


@triton.jit
def logarithm(x):
    """log₂ x of x >= 0, NaN too."""
    return tl.where(x == 0, float("-inf"), tl.log2(tl.where(x == 0, 1.0, x)))


@triton.jit
def sum_below_top(s, allowed, factor, AXIS: tl.constexpr):
    """Σ exp((s - top)/τ) over an axis of what is allowed, and the top; 0 and 0 where nothing is."""
    s = tl.where(allowed, s, float("-inf"))
    top = tl.max(s, AXIS)
    top = tl.where(top == float("-inf"), 0.0, top)
    return tl.sum(tl.exp2((s - tl.expand_dims(top, AXIS)) * factor), AXIS), top


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """Where they go."""

    each: Any  # (ways of a pair, P, n), float64
    loss: Any
    number: Any  # what the mean is divided by


class Sums(NamedTuple):
    """Sums that tiles leave, in one buffer of numbers of 64 bits: where in it each begins."""

    buffer: Any
    rows: int  # (jobs, tiles, height·TILE), float32: of the strip's rows, by the columns' tile
    columns: int  # (jobs, height, tiles·TILE), float32: of all columns, by the rows' tile, if tiles serve both ways
    partial: int  # two numbers of each block of rows


@triton.jit
def row_sums_of(sums):
    return (sums.buffer + sums.rows).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def column_sums_of(sums):
    return (sums.buffer + sums.columns).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def slots(found, sums, distance, first, last, inside, steep):
    """``found`` and what is in the slots from the first to before the last, ``distance`` apart: sums, or logarithms.
    Other programs may have left it just now. Eight at a time take longer than one by one, see docs/gpu-notes.md."""
    if steep:
        for slot in range(first, last):
            more = tl.load(sums + slot * distance, mask=inside, other=float("-inf"), volatile=True).to(tl.float64)
            top = tl.where((found != found) | (found > more), found, more)  # NaN if either is
            shift = tl.where(top == float("-inf"), 0.0, top)
            found = shift + logarithm(tl.exp2(found - shift) + tl.exp2(more - shift))
    else:
        for slot in range(first, last):
            found += tl.load(sums + slot * distance, mask=inside, other=0.0, volatile=True).to(tl.float64)
    return found


@triton.jit
def sums_of_rows(
    found, sums, job, direction, tile, i, mine, steep, sizes, strip, FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``found`` and what a strip's tiles have of rows i, all of one tile."""
    height, tiles = strip.height, sizes.tiles
    below = i - strip.first * TILE
    within = mine & (below >= 0) & (below < height * TILE)
    base = row_sums_of(sums) + job.to(tl.int64) * tiles * height * TILE + below
    if FORM.rows_only:
        found = slots(found, base, height * TILE, 0, tiles.to(tl.int32), within, steep)
    else:
        across = column_sums_of(sums) + job.to(tl.int64) * height * tiles * TILE + i
        if FORM.itself:  # of other strips' rows nothing but columns
            in_strip = (tile >= strip.first) & (tile < strip.first + height)
            end = tl.where(in_strip, tiles, tile).to(tl.int32)
            found = slots(found, base, height * TILE, tile.to(tl.int32), end, within, steep)
            end = tl.minimum(height, tl.maximum(tile - strip.first, 0)).to(tl.int32)
            found = slots(found, across, tiles * TILE, 0, end, mine, steep)
        elif direction == 0:
            found = slots(found, base, height * TILE, 0, tiles.to(tl.int32), within, steep)
        else:
            found = slots(found, across, tiles * TILE, 0, height.to(tl.int32), mine, steep)
    return found


@triton.jit
def is_steep(tau, FORM: tl.constexpr):
    return (tau < STEEP) & (tau > 0.0) & tl.full([], not FORM.itself, tl.int1)


@triton.jit
def finish_rows(
    found, prepared, sums, tau, losses, pair, direction, row, mine, block, blocks, pairs, sizes, FORM: tl.constexpr,
    BATCH: tl.constexpr,
):  # fmt: skip
    """ℓ_i of everyone's rows from their sums, where they are mine; of direction 0, how many count. The last of the
    blocks adds up what all have left, in their order."""
    there = row < sizes.columns
    index = pair * sizes.columns + row
    counted = (tl.load(flags_in(prepared) + index, mask=there, other=0).to(tl.int32) & COUNTED) != 0
    positive = tl.load(positives_of(prepared) + index, mask=there, other=0.0).to(tl.float64)
    steep = is_steep(tau, FORM)
    nothing = tl.where(steep, float("-inf"), 0.0).to(tl.float64)
    highest = 1.0 if FORM.itself else 0.0
    # by the rounded factor of the sums, or all similarities would differ from all positives
    factor = (1.0 / tau * LOG2_E).to(tl.float32).to(tl.float64)
    plain = logarithm(tl.where(steep, 1.0, found)) + (highest - positive) * factor
    x = tl.where(steep, found, plain) * LOG_2
    x = tl.where(found == nothing, float("-inf"), x)
    softplus = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))
    softplus = tl.where(x == float("-inf"), 0.0, softplus)
    softplus = tl.where(counted, softplus + zero_or_nan(tau), 0.0)
    tl.store(losses.each + (direction * pairs + pair) * sizes.rows + row - sizes.start, softplus, mask=mine)
    # NaN where the similarity of one of those that count with its partner is: a row that is compared with no other, or
    # is another process's, shows what is not finite nowhere else.
    each = tl.where(counted, 1.0 + positive * 0.0, 0.0)
    each = tl.where(direction == 0, each, 0.0)
    partial = sums.buffer + sums.partial
    tl.store(partial + 2 * block, tl.sum(tl.where(mine, softplus, 0.0), 0))
    tl.store(partial + 2 * block + 1, tl.sum(each, 0))
    tl.debug_barrier()
    if tl.atomic_add(counters_of(prepared), 1, sem="acq_rel") == blocks - 1:
        tl.debug_barrier()
        total = tl.zeros([BATCH], tl.float64)
        count = tl.zeros([BATCH], tl.float64)
        for begin in range(0, blocks, BATCH):
            at = begin + tl.arange(0, BATCH)
            total += tl.load(partial + 2 * at, mask=at < blocks, other=0.0, volatile=True)
            count += tl.load(partial + 2 * at + 1, mask=at < blocks, other=0.0, volatile=True)
        divisor = tl.sum(count, 0)
        divisor = tl.where(divisor < 1.0, 1.0, divisor)
        if not FORM.itself:
            divisor = divisor * 2.0
        tl.store(losses.number, divisor)
        tl.store(losses.loss, (tl.sum(total, 0) / divisor * (tau / tau)).to(losses.loss.dtype.element_ty))


@triton.jit
def similar_kernel(
    prepared, temperature, sums, losses, k, pairs, per_job, width, sizes, strip, FORM: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Σ_j exp(s_ij/τ) over a tile's columns, for each row, and over its rows, for each column, without the positives.

    Reads ``prepared``; writes ``sums``. With ``losses``, which wants all rows to be of one strip, whoever has the last
    tile of a block of rows makes their losses, see ``finish_kernel``.
    """
    job = tl.program_id(0) // per_job
    tile = tile_of(job, tl.program_id(0) % per_job, sizes, strip, FORM, TILE, GROUP)
    s = similarities(prepared, tile, k, width, sizes, FORM, TILE, BLOCK)
    tau = read_temperature(temperature, True)
    factor = (1.0 / tau * LOG2_E).to(tl.float32)
    _, seen = flags_of(prepared, tile, sizes, FORM)
    s = tl.where(others(tile), s, float("-inf"))
    # What there is of each column (as ``seen_theirs``) can take as many registers as s: no sooner than it is needed.
    if is_steep(tau, FORM):
        seen_own, seen_theirs = tl.split(seen)
        total, top = sum_below_top(s, seen_theirs[None, :], factor, 1)
        total_theirs, top_theirs = total, top
        if not FORM.rows_only:
            total_theirs, top_theirs = sum_below_top(s, seen_own[:, None], factor, 0)
        at, there = rows_and_columns(tile, sizes)
        positive = tl.load(positives_of(prepared) + at, mask=there, other=0.0)
        both = (tl.join(top, top_theirs) - positive) * factor + logarithm(tl.join(total, total_theirs))
    else:
        seen_own, seen_theirs = tl.split(seen)
        highest = 1.0 if FORM.itself else 0.0
        e = tl.exp2((s - highest) * factor)
        total = tl.sum(tl.where(seen_theirs[None, :], e, 0.0), 1)
        total_theirs = total
        if not FORM.rows_only:  # (the tiles on the diagonal of vectors with themselves are symmetric: nobody reads it)
            total_theirs = tl.sum(tl.where(seen_own[:, None], e, 0.0), 0)
        both = tl.join(total, total_theirs)
    sums_own, sums_theirs = tl.split(both)
    below = tile.I - strip.first
    to = row_sums_of(sums) + ((job.to(tl.int64) * sizes.tiles + tile.J) * strip.height + below) * TILE + tile.lane
    tl.store(to, sums_own)
    if not FORM.rows_only:
        to = column_sums_of(sums) + tile.lane
        to += ((job.to(tl.int64) * strip.height + below) * sizes.tiles + tile.J) * TILE
        tl.store(to, sums_theirs)
    if losses is not None:
        ways: tl.constexpr = 1 if FORM.itself else 2
        sides_of_tile = pairs * 0 + 2  # its rows, and its columns
        if FORM.itself:
            sides_of_tile = tl.where(tile.I == tile.J, 1, 2)
        for number in range(sides_of_tile):
            side = pairs * 0 + number  # a tensor in the interpreter, too
            block = tl.where(side == 0, tile.I, tile.J)
            direction = side
            if FORM.itself:
                direction = side * 0
            at = (direction * pairs + tile.pair) * sizes.tiles.to(tl.int32) + block.to(tl.int32)
            tl.debug_barrier()
            if tl.atomic_add(counters_of(prepared) + 1 + at, 1, sem="acq_rel") == sizes.tiles - 1:
                tl.debug_barrier()
                row = block * TILE + tile.lane
                mine = row < sizes.rows
                steep = is_steep(tau, FORM)
                found = tl.full([TILE], 0.0, tl.float64) + tl.where(steep, float("-inf"), 0.0).to(tl.float64)
                found = sums_of_rows(
                    found, sums, job, direction, block, row, mine, steep, sizes, strip, FORM, TILE
                )  # fmt: skip
                finish_rows(
                    found, prepared, sums, tau, losses, tile.pair.to(tl.int64), direction, row, mine, at,
                    ways * pairs * sizes.tiles.to(tl.int32), pairs, sizes, FORM, BATCH
                )  # fmt: skip


@triton.jit
def finish_kernel(
    prepared, temperature, sums, losses, pairs, per_loss, again, more, sizes, strip, FORM: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """ℓ_i = log(1 + Σ_{j≠i} exp((s_ij - s_i⁺)/τ)), and their sum over how many there are, of everyone.

    Reads the sums of a strip and ``prepared``; writes ``losses``. With several strips losses hold sums so far:
    ``again`` says that there are such, ``more`` that others follow.
    """
    which = tl.program_id(0) // per_loss  # (direction, pair)
    pair, direction = which % pairs, which // pairs
    row = (tl.program_id(0) % per_loss) * BLOCK + tl.arange(0, BLOCK)  # of everyone's
    i = row - sizes.start
    mine = (i >= 0) & (i < sizes.rows)
    tau = read_temperature(temperature, True)
    steep = is_steep(tau, FORM)
    to = losses.each + which.to(tl.int64) * sizes.rows + i
    found = tl.full([BLOCK], 0.0, tl.float64) + tl.where(steep, float("-inf"), 0.0).to(tl.float64)
    if again != 0:
        found = tl.load(to, mask=mine, other=0.0)
    tile = tl.max(tl.where(mine, i // TILE, 0), 0)  # BLOCK divides TILE, so one for all, where rows are one process's
    job = which
    if FORM.rows_only and not FORM.itself:
        job = 2 * pair + direction
    elif not FORM.rows_only:
        job = pair
    found = sums_of_rows(found, sums, job, direction, tile, i, mine, steep, sizes, strip, FORM, TILE)
    if more != 0:
        tl.store(to, found, mask=mine)
    else:
        finish_rows(
            found, prepared, sums, tau, losses, pair.to(tl.int64), direction, row, mine, tl.program_id(0),
            tl.num_programs(0), pairs, sizes, FORM, BATCH
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Gradients
# ------------------------------------------------------------------------------------------------


@triton.jit
def probability(delta, loss):
    """2^(δ - ℓ), at most 1; 0 where a loss is Inf, whatever δ is."""
    x = delta - loss
    return tl.where(loss == float("inf"), 0.0, tl.exp2(tl.where(x > 0, 0.0, x)))


# Rows first, and their column keeps two axes: Triton 3.6 does not compile the sum over a lone axis, nor its maximum, of
# what tensor cores of sm_100 have computed.
@triton.jit
def sum_of(x):
    """Of a tile, in float64 but for each row."""
    return tl.sum(tl.sum(x, 1, keep_dims=True).to(tl.float64), 0).item()


@triton.jit
def largest_of(x):
    """Of a tile."""
    return tl.max(tl.max(x, 1, keep_dims=True), 0).item()


@triton.jit
def power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def weights_kernel(
    prepared, temperature, losses, weights, scales, slopes, k, pairs, first_job, per_job, width, sizes, strip,
    FORM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """G_ij = P_ij + R_ij, 0 for the positives: by how much row i is pulled to column j. P are the probabilities of row
    i to choose column j, R those of column j to choose row i.

    Reads ``prepared`` and losses (ways of a pair, P, N). Writes weights (ways, 2, height·TILE, tiles·TILE) in two fp16
    parts (one, where one product will do), times a power of two of each tile, whose inverse goes to scales (ways,
    height, tiles); and to slopes, if given, Σ P·(s - s⁺) of each tile. Where tiles serve both ways, the transpose is
    written, too.
    """
    job = tl.program_id(0) // per_job
    tile = tile_of(first_job + job, tl.program_id(0) % per_job, sizes, strip, FORM, TILE, GROUP)
    s = similarities(prepared, tile, k, width, sizes, FORM, TILE, BLOCK)
    tau = read_temperature(temperature, True)
    factor = (1.0 / tau * LOG2_E).to(tl.float32)
    counted, seen = flags_of(prepared, tile, sizes, FORM)
    at, there = rows_and_columns(tile, sizes)
    positive = tl.load(positives_of(prepared) + at, mask=there, other=0.0)
    if not FORM.itself:
        at += pairs.to(tl.int64) * sizes.columns * (tl.arange(0, 2)[None, :] ^ tile.direction)
    loss = tl.load(losses + at, mask=there, other=0.0) * LOG2_E
    loss = tl.where(counted, loss, float("inf")).to(tl.float32)
    positive_own, positive_theirs = tl.split(positive)
    loss_own, loss_theirs = tl.split(loss)
    seen_own, seen_theirs = tl.split(seen)
    # Columns choose first, while registers are free: a thread has up to 64 of them, and holds two numbers of each, but
    # of one or two rows. Whom nobody may choose has no loss, either; and who has none chooses nobody.
    s = tl.where(others(tile), s, float("-inf"))
    delta = s - positive_theirs[None, :]
    G = probability(delta * factor, loss_theirs[None, :])
    G = tl.where(seen_own[:, None], G, 0.0)
    slope = 0.0
    if slopes is not None:
        if not FORM.rows_only:
            slope = sum_of(G * tl.where(G == 0, 0.0, delta))
            if FORM.itself:  # what is on the diagonal of tiles has its own transpose in it
                slope = tl.where(tile.I == tile.J, 0.0, slope)
    s = tl.where(seen_theirs[None, :], s, float("-inf"))
    delta = s - positive_own[:, None]
    P = probability(delta * factor, loss_own[:, None])
    if slopes is not None:
        tl.store(slopes + tl.program_id(0), slope + sum_of(P * tl.where(P == 0, 0.0, delta)))
    G += P
    top = largest_of(G)
    exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.minimum(tl.maximum(exponent, -110), 100)
    G = G * power_of_two(13 - exponent)
    high = G.to(tl.float16)
    low = (G - high.to(tl.float32)).to(tl.float16)
    lane = tile.lane
    length = sizes.tiles * TILE
    part = strip.height * TILE * length
    below = tile.I - strip.first
    ways: tl.constexpr = 1 if FORM.itself or FORM.rows_only else 2
    PLANES: tl.constexpr = 2 if FORM.exact else 1
    to = weights + job.to(tl.int64) * ways * PLANES * part
    across = length.to(tl.int32)
    p = to + below * TILE * length + tile.J * TILE + (lane[:, None] * across + lane[None, :])
    scale = scales + job.to(tl.int64) * ways * strip.height * sizes.tiles
    tl.store(scale + below * sizes.tiles + tile.J, power_of_two(exponent - 13))
    tl.store(p, high)
    if FORM.exact:
        tl.store(p + part, low)
    if not FORM.rows_only:  # all of it fits, so the strip is the whole
        if not FORM.itself:
            to += PLANES * part
            scale += strip.height * sizes.tiles
        p = to + tile.J * TILE * length + tile.I * TILE + (lane[None, :] * across + lane[:, None])
        tl.store(scale + tile.J * sizes.tiles + tile.I, power_of_two(exponent - 13))
        tl.store(p, high)
        if FORM.exact:
            tl.store(p + part, low)


@triton.jit
def product_kernel(
    weights, scales, prepared, losses, grad, divisor, temperature, h, k, pairs, one_vector, one_job, added, more,
    blocks, d, width, sizes, strip, FORM: tl.constexpr, ALL: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """∂/∂a_i = g/(n τ) Σ_ways (Σ_j G_ij b_j + (expm1(-ℓ_i) + expm1(-ℓ'_i)) b_i) for TILE rows and COLUMNS columns.

    Reads weights, scales, ``prepared`` and losses; writes h, the gradients (n, d) of vectors: with ALL of all, over all
    ways that each has; else of one, of one way: ``added`` says that h has a sum of others, and ``more`` that others
    follow, before which nothing is multiplied by g/(n τ). Rows that nothing has to do with get zeros. What a tile of
    weights adds up to on tensor cores, which cut, is rounded to float32 then.
    """
    at = tl.program_id(0)
    parts, flags = parts_of(prepared), flags_in(prepared)
    C = (at % blocks).to(tl.int64)
    I = (at // blocks % strip.height.to(tl.int32)).to(tl.int64)  # noqa: E741
    vector = at // blocks // strip.height.to(tl.int32) + one_vector
    lane, step = tl.arange(0, TILE), tl.arange(0, BLOCK)
    column = (C * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)
    length = sizes.tiles * TILE
    part = strip.height * TILE * length
    plane = sizes.padded * width
    a = weights + I * TILE * length + (lane[:, None] * length.to(tl.int32) + step[None, :])
    b = parts + C * COLUMNS + (step[:, None] * width + tl.arange(0, COLUMNS)[None, :])
    STEPS: tl.constexpr = TILE // BLOCK
    PLANES: tl.constexpr = 2 if FORM.exact else 1
    ways = number_of_ways(vector, k, FORM)
    if not ALL:
        ways = 1
    per_way = sizes.tiles.to(tl.int32) * STEPS
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    found = tl.zeros([TILE, COLUMNS], tl.float32)
    for number in range(ways * per_way):
        t = k * 0 + number  # a tensor in the interpreter, too
        job, other = job_and_partner(vector, t // per_way, k, one_job, FORM, ALL)
        in_way = t % per_way
        tile, within = in_way // STEPS, in_way % STEPS
        j = tile * TILE + within * BLOCK
        x = a + PLANES * job * part + j
        y = b + 3 * other * plane + j.to(tl.int64) * width
        if FORM.exact:  # but for lo lo', 2⁻²³ of the whole
            high, low = tl.load(x), tl.load(x + part)
            hi, lo = tl.load(y), tl.load(y + plane)
            found = tl.dot(low, hi, found)
            found = tl.dot(high, lo, found)
            found = tl.dot(high, hi, found)
        else:
            found = tl.dot(tl.load(x), tl.load(y + 2 * plane), found)
        if within == STEPS - 1:
            total += found * tl.load(scales + (job * strip.height + I) * sizes.tiles + tile)
            found = tl.zeros([TILE, COLUMNS], tl.float32)

    first = (strip.first + I) * TILE
    mine = lane < sizes.rows - first
    row = sizes.start + first + lane
    used = tl.zeros([TILE], tl.int32)
    # Losses of both ways at once, see ``rows_and_columns``: else each thread goes through float64 for many rows.
    distance = pairs.to(tl.int64) * sizes.columns
    if FORM.itself:
        distance = distance * 0
    for number in range(ways):
        number_of_way = k * 0 + number
        pair, direction = pair_and_direction(vector, number_of_way, k, one_job, FORM, ALL)
        _, other = job_and_partner(vector, number_of_way, k, one_job, FORM, ALL)
        index = pair.to(tl.int64) * sizes.columns + row
        flag = tl.load(flags + index, mask=mine, other=0).to(tl.int32)
        used |= flag & tl.where(direction == 0, SEEN, 2 * SEEN)
        each = index[:, None] + distance * tl.arange(0, 2)[None, :]
        both = tl.sum(expm1(-tl.load(losses + each, mask=mine[:, None], other=0.0)), 1)
        both = tl.where((flag & COUNTED) != 0, both, 0.0).to(tl.float32)
        partner = parts + other * 3 * plane + (sizes.start + first) * width + (lane[:, None] * width + column[None, :])
        total += both[:, None] * load_row(partner, plane, mine[:, None])
    offset = vector.to(tl.int64) * 0
    for v in tl.static_range(len(h.offsets)):
        offset = tl.where(vector == v, h.offsets[v], offset)
    to = h.pointer + offset + first * h.stride + (lane[:, None] * d + column[None, :])
    inside = mine[:, None] & (column < d)[None, :]
    total = tl.where((used != 0)[:, None], total, 0.0)
    if added != 0:
        total += tl.load(to, mask=inside, other=0.0)
    if more == 0:
        if not ALL:
            for number in range(number_of_ways(vector, k, FORM)):
                pair, direction = way_of(vector, k * 0 + number, k, FORM)
                flag = tl.load(flags + pair.to(tl.int64) * sizes.columns + row, mask=mine, other=0).to(tl.int32)
                used |= flag & tl.where(direction == 0, SEEN, 2 * SEEN)
        scale = tl.load(grad).to(tl.float64) / tl.load(divisor) / read_temperature(temperature, True)
        total = (total.to(tl.float64) * (scale / UNIT)).to(tl.float32)  # a scaler's gradient need not fit float32
        total = tl.where((used != 0)[:, None], total, 0.0)
    tl.store(to, total, mask=inside)


@triton.jit
def pair_and_direction(vector, number, k, one_job, FORM: tl.constexpr, ALL: tl.constexpr):
    if ALL:
        pair, direction = way_of(vector, number, k, FORM)
    elif FORM.itself:
        pair, direction = one_job, one_job * 0
    else:
        pair, direction = one_job // 2, one_job % 2
    return pair, direction


@triton.jit
def job_and_partner(vector, number, k, one_job, FORM: tl.constexpr, ALL: tl.constexpr):
    """Where a way's weights are, and which vector is on the other side."""
    pair, direction = pair_and_direction(vector, number, k, one_job, FORM, ALL)
    x, y = sides(pair, k, FORM)
    other = tl.where(direction == 0, y, x).to(tl.int64)
    job = 2 * pair + direction
    if FORM.itself:
        job = pair
    if not ALL:
        job = job * 0
    return job.to(tl.int64), other
