"""The forward kernels: singular values, leading vectors, alignment terms, and the records that a backward pass needs.

For large batches, with an instance per lane, or K lanes per instance, in the solve:

    gram_kernel      reads the k embeddings of each instance once, writes the Gram matrix G = XᵀX to its record
    solve_kernel     reads G; writes sigma, v, the alignment term (or its sum), and the rest of the record
    vectors_kernel   reads the embeddings again; writes u = X c, the z_m = x_m / n_m and the w_m = (Y - |v_m| z_m) r_m,
                     Y = Σ_j |v_j| z_j, as far as they are wanted

For small ones forward_kernel, all three at once with one instance per program, then reduce_kernel if a sum is wanted.

Nothing here adds floating-point numbers atomically: the same input gives the same bits.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...triton.arguments import Instances
from ...triton.eigen import jacobi_lanes, power_lanes, power_tiles, put, reciprocal, triangle, zero_or_nan
from ...triton.record import load_tiles, number_of_modalities, record_of, store_vector
from ...triton.scalars import read_temperature
from .algebra import block_of, decompose_tiles, finish_forward
from .passes import gram_phase, gram_tile_phase, tile_of, vectors_phase, vectors_tile_phase


class Outputs(NamedTuple):
    """What is k numbers long, or one: alignment terms (B,), sigma (B, min(d, k)) or (B, 1), v (B, k); or None."""

    alignment: Any
    sigma: Any
    v: Any


class Solve(NamedTuple):
    """How solve_kernel takes a batch."""

    instances: int  # of a program
    part: int  # how many go through the algebra at a time
    lanes: bool  # an instance per lane; else K lanes for each


# ------------------------------------------------------------------------------------------------
# Solving
# ------------------------------------------------------------------------------------------------


@triton.jit
def normalized_lanes(A, records, there, MODE: tl.constexpr):
    """g_ij / (n_i n_j), one after the other: the product of two norms may underflow. Writes the 1/n."""
    inverse = ()
    for m in tl.static_range(MODE.k):
        norm = tl.sqrt(A[triangle(m, m)])
        inverse = inverse + (reciprocal(norm),)
        A = put(A, triangle(m, m), tl.where(norm == 0, 0.0, norm / tl.where(norm == 0, 1.0, norm)))
        tl.store(records + MODE.record.inverse_norms + m, inverse[m], mask=there)
    for j in tl.static_range(1, MODE.k):
        for i in tl.static_range(j):
            A = put(A, triangle(i, j), A[triangle(i, j)] * inverse[i] * inverse[j])
    return A


@triton.jit
def solve_lanes(records, there, MODE: tl.constexpr):
    """Eigenpairs of the Gram matrices of N instances, one in each lane, from their records to their records."""
    k: tl.constexpr = MODE.k
    A = ()
    for at in tl.static_range(k * (k + 1) // 2):
        A = A + (tl.load(records + MODE.record.gram + at, mask=there, other=0.0),)
    if MODE.normalize:
        A = normalized_lanes(A, records, there, MODE)
        if not MODE.spectrum:
            for at in tl.static_range(k * (k + 1) // 2):
                tl.store(records + MODE.record.gram + at, A[at], mask=there)
    broken = zero_or_nan(A[0])
    trace = tl.zeros_like(A[0])
    for j in tl.static_range(k):
        trace += A[triangle(j, j)]
        for i in tl.static_range(j + 1):
            broken += zero_or_nan(A[triangle(i, j)])
    fine = (broken == 0) & (trace > 0)
    if MODE.spectrum:
        for at in tl.static_range(k * (k + 1) // 2):
            A = put(A, at, tl.where(fine, A[at], 0.0))
        values, V = jacobi_lanes(A, k)
        for m in tl.static_range(k):
            tl.store(records + MODE.record.eigenvalues + m, values[m] + broken, mask=there)
        for at in tl.static_range(k * k):
            tl.store(records + MODE.record.eigenvectors + at, V[at] + broken, mask=there)
    else:
        for at in tl.static_range(k * (k + 1) // 2):  # what has no answer stands as e₁e₁ᵀ, rank 1 at once
            A = put(A, at, tl.where(fine, A[at], 1.0 if at == 0 else 0.0))
        v, undecided = power_lanes(A, k, MODE.float64_input)
        tl.store(records + MODE.record.undecided, (undecided & fine).to(tl.float64), mask=there)
        for m in tl.static_range(k):
            tl.store(records + MODE.record.leading + m, tl.where(fine, v[m], 0.0) + broken, mask=there)


@triton.jit
def normalized_tiles(A, records, lane, there, MODE: tl.constexpr):
    """As ``normalized_lanes``; also writes the Gram matrix of normalised columns, without the spectrum."""
    norm = tl.sqrt(A[0])
    inverse = reciprocal(norm)
    A = put(A, 0, tl.where(norm == 0, 0.0, norm / tl.where(norm == 0, 1.0, norm)))
    store_vector(records[:, None] + MODE.record.inverse_norms, lane, there[:, None], inverse, MODE.k)
    tl.debug_barrier()
    for y in tl.static_range(MODE.K):
        if y > 0:  # in the same order for both lanes that hold this entry
            other = tl.gather(inverse, lane ^ y, 1)
            low = lane < (lane ^ y)
            A = put(A, y, A[y] * tl.where(low, inverse, other) * tl.where(low, other, inverse))
        if not MODE.spectrum:
            inside = there[:, None] & (lane < MODE.k)
            at = records[:, None] + MODE.record.gram + lane * (lane + 1) // 2 + (lane ^ y)
            tl.store(at, A[y], mask=inside & ((lane ^ y) <= lane))
    return A


@triton.jit
def solve_tiles(records, there, N: tl.constexpr, MODE: tl.constexpr):
    """As ``solve_lanes``, with K lanes for each of the N instances."""
    k: tl.constexpr = MODE.k
    K: tl.constexpr = MODE.K
    lane = tl.arange(0, K)[None, :] + tl.zeros([N, 1], tl.int32)
    A = load_tiles(records + MODE.record.gram, lane, there, k, K)
    if MODE.normalize:
        A = normalized_tiles(A, records, lane, there, MODE)
    elif MODE.spectrum:
        tl.debug_barrier()  # V goes where all have to have read G
    broken = zero_or_nan(A[0])
    for y in tl.static_range(1, K):
        broken += zero_or_nan(A[y])
    broken = tl.sum(broken, 1)
    fine = (broken == 0) & (tl.sum(A[0], 1) > 0)
    if MODE.spectrum:
        for y in tl.static_range(K):
            A = put(A, y, tl.where(fine[:, None], A[y], 0.0))
        decompose_tiles(records, A, broken, there, lane, MODE)
    else:
        for y in tl.static_range(K):  # what has no answer stands as e₁e₁ᵀ, rank 1 at once
            A = put(A, y, tl.where(fine[:, None], A[y], tl.where((lane == 0) & (y == 0), 1.0, 0.0)))
        v, undecided = power_tiles(A, lane, k, K, MODE.float64_input)
        tl.store(records + MODE.record.undecided, (undecided & fine).to(tl.float64), mask=there)
        v = tl.where(fine[:, None], v, 0.0) + broken[:, None]
        store_vector(records[:, None] + MODE.record.leading, lane, there[:, None], v, k)


# ------------------------------------------------------------------------------------------------
# Sums over the batch
# ------------------------------------------------------------------------------------------------


@triton.jit
def sum_of(x):
    """Of a block [N, 1, 1]."""
    return tl.sum(tl.sum(tl.sum(x, 2), 1), 0)


@triton.jit
def write_total(state, total, losses, slopes, count, MEAN: tl.constexpr):
    count = tl.maximum(count, 1.0)  # the mean over no instance is 0
    if MEAN:
        losses = losses / count
    tl.store(total, losses.to(total.dtype.element_ty))
    tl.store(state, count)
    tl.store(state + 1, slopes)


@triton.jit
def add_up(losses, slopes, counts, state, sums, MEAN: tl.constexpr, BATCH: tl.constexpr):
    """Leaves this program's sums in ``sums.partial``; the last program to finish adds up everyone's, in their order."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    partial = sums.partial
    tl.store(partial + 3 * program, losses)
    tl.store(partial + 3 * program + 1, slopes)
    tl.store(partial + 3 * program + 2, counts)
    tl.debug_barrier()
    if tl.atomic_add(sums.counter, 1, sem="acq_rel") == programs - 1:
        tl.debug_barrier()
        all_losses = tl.zeros([BATCH], tl.float64)
        all_slopes = tl.zeros([BATCH], tl.float64)
        all_counts = tl.zeros([BATCH], tl.float64)
        for begin in range(0, programs, BATCH):
            at = begin + tl.arange(0, BATCH)
            inside = at < programs
            all_losses += tl.load(partial + 3 * at, mask=inside, other=0.0, volatile=True)
            all_slopes += tl.load(partial + 3 * at + 1, mask=inside, other=0.0, volatile=True)
            all_counts += tl.load(partial + 3 * at + 2, mask=inside, other=0.0, volatile=True)
        write_total(state, sums.total, tl.sum(all_losses, 0), tl.sum(all_slopes, 0), tl.sum(all_counts, 0), MEAN)


@triton.jit
def reduce_kernel(
    mask, state, sums, B, MODE: tl.constexpr, MEAN: tl.constexpr, BATCH: tl.constexpr, SHARE: tl.constexpr
):
    """total = Σ_b alignment_b, or its mean over the instances with two modalities, by SHARE instances a program.

    Reads slope and alignment of the records, and the mask; writes ``sums.total`` and the head of the state. With a
    counter there are several programs, and the last one to finish adds up what each has left in ``sums.partial``.
    """
    losses = tl.zeros([BATCH], tl.float64)
    slopes = tl.zeros([BATCH], tl.float64)
    counts = tl.zeros([BATCH], tl.float64)
    first = tl.program_id(0) * SHARE
    for start in range(first, tl.minimum(first + SHARE, B), BATCH):
        instance = (start + tl.arange(0, BATCH)).to(tl.int64)
        there = instance < B
        records = record_of(state, instance, MODE)
        losses += tl.load(records + MODE.record.alignment, mask=there, other=0.0)
        slopes += tl.load(records + MODE.record.slope, mask=there, other=0.0)
        counts += (number_of_modalities(mask, instance, there, MODE.k) >= 2).to(tl.float64)
    if sums.counter is None:
        write_total(state, sums.total, tl.sum(losses, 0), tl.sum(slopes, 0), tl.sum(counts, 0), MEAN)
    else:
        add_up(tl.sum(losses, 0), tl.sum(slopes, 0), tl.sum(counts, 0), state, sums, MEAN, BATCH)


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@triton.jit
def gram_kernel(x, mask, state, counter, B, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """G = XᵀX of R instances. Reads x; writes gram (and exponents) of their records, and sets the counter to 0."""
    instance = tl.program_id(0).to(tl.int64) * STEP.rows + tl.arange(0, STEP.rows)
    if counter is not None:
        if tl.program_id(0) == 0:
            tl.store(counter, 0)
    gram_phase(x, mask, state, Instances(instance, instance < B), d, MODE, STEP)


@triton.jit
def solve_kernel(
    mask, temperature, state, sums, outputs, B, d, MODE: tl.constexpr, SOLVE: tl.constexpr, VECTORS: tl.constexpr,
    MEAN: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """G = V diag(λ) Vᵀ of N instances, and what follows from that.

    Reads gram of their records; writes the rest of them, and the outputs that are given. Where only a sum or a mean of
    the alignment terms is wanted, every program leaves what its instances add up to in ``sums.partial``, and the last
    one to finish adds those up, in their order.
    """
    N: tl.constexpr = SOLVE.instances
    PART: tl.constexpr = SOLVE.part
    instance = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    if SOLVE.lanes:
        solve_lanes(record_of(state, instance, MODE), instance < B, MODE)
    else:
        solve_tiles(record_of(state, instance, MODE), instance < B, N, MODE)
    tl.debug_barrier()
    losses = tl.zeros([PART, 1, 1], tl.float64)
    slopes = tl.zeros([PART, 1, 1], tl.float64)
    counts = tl.zeros([PART, 1, 1], tl.float64)
    for start in range(0, N, PART):  # some at a time: their matrices are to stay in registers
        one = (tl.program_id(0).to(tl.int64) * N + start + tl.arange(0, PART))[:, None, None]
        block = block_of(record_of(state, one, MODE), one, one < B, MODE.K)
        loss, slope, alignable = finish_forward(
            block, mask, read_temperature(temperature, False), outputs, d, VECTORS, MODE
        )
        if outputs.alignment is not None:
            tl.store(outputs.alignment + one, loss.to(outputs.alignment.dtype.element_ty), mask=one < B)
        losses += tl.where(one < B, loss, 0.0)
        slopes += tl.where(one < B, slope, 0.0)
        counts += (alignable & (one < B)).to(tl.float64)
    if sums.total is not None:
        add_up(sum_of(losses), sum_of(slopes), sum_of(counts), state, sums, MEAN, BATCH)


@triton.jit
def vectors_kernel(x, mask, state, u, z, w, B, d, MODE: tl.constexpr, STEP: tl.constexpr):
    """u = X c, z_m = x_m / n_m and w_m = (Y - |v_m| z_m) r_m of R instances, Y = Σ_j |v_j| z_j. Reads x and records;
    writes u (B, d), the z and the w (B, d), as far as they are given."""
    instance = tl.program_id(0).to(tl.int64) * STEP.rows + tl.arange(0, STEP.rows)
    vectors_phase(x, mask, state, Instances(instance, instance < B), u, z, w, d, MODE, STEP)


@triton.jit
def forward_kernel(
    x, mask, temperature, state, counter, outputs, u, z, w, B, d, MODE: tl.constexpr, STEP: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """gram_kernel, solve_kernel and vectors_kernel of R instances, whose embeddings are in cache the second time.

    Reads x; writes the records, u, z and w as far as they are given, the outputs that are, and sets the counter to 0.
    """
    instance = tl.program_id(0).to(tl.int64) * STEP.rows + tl.arange(0, STEP.rows)
    at = Instances(instance, instance < B)
    if counter is not None:
        if tl.program_id(0) == 0:
            tl.store(counter, 0)
    if MODE.K >= 16:
        tile = tile_of(x, mask, MODE)
        gram_tile_phase(x, tile, record_of(state, tile.instance, MODE), d, MODE, STEP)
    else:
        gram_phase(x, mask, state, at, d, MODE, STEP)
    tl.debug_barrier()
    solve_tiles(record_of(state, instance, MODE), at.there, STEP.rows, MODE)
    tl.debug_barrier()
    one = instance[:, None, None]
    block = block_of(record_of(state, one, MODE), one, one < B, MODE.K)
    loss, _, _ = finish_forward(block, mask, read_temperature(temperature, False), outputs, d, VECTORS, MODE)
    if outputs.alignment is not None:
        tl.store(outputs.alignment + one, loss.to(outputs.alignment.dtype.element_ty), mask=one < B)
    if (u is not None) or (z is not None) or (w is not None):
        tl.debug_barrier()
        if MODE.K >= 16:
            vectors_tile_phase(x, tile, record_of(state, tile.instance, MODE), u, z, w, d, MODE, STEP)
        else:
            vectors_phase(x, mask, state, at, u, z, w, d, MODE, STEP)
