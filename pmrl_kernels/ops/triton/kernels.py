"""The Triton kernels of the spectral functions.

Forward, for large batches (an instance per lane, or K lanes per instance, in the solve):

    gram_kernel      reads the k embeddings of each instance once, writes the Gram matrix G = XᵀX to its record
    solve_kernel     reads G; writes sigma, v, the alignment term (or its sum), and the record that backward needs
    vectors_kernel   reads the embeddings again; writes u = X c and the z_m = x_m / n_m, if they are wanted

and for small ones forward_kernel, all three at once with one instance per program, then reduce_kernel if a sum is
wanted. Backward is one launch, backward_kernel: dX = h cᵀ + X C (+ H).

Nothing here adds floating-point numbers atomically: the same input gives the same bits.
"""

import triton
import triton.language as tl

from .eigen import jacobi_lanes, power_lanes, power_tiles, put, reciprocal, triangle, zero_or_nan
from .kspace import (
    decompose_tiles,
    draft_alignment,
    draft_coefficients,
    draft_field,
    draft_size,
    field,
    finish_forward,
    load_tiles,
    presence,
    record_size,
)
from .streams import (
    add_dots,
    apply_chunk,
    apply_tile,
    dots_tile,
    gathered,
    gram_phase,
    gram_tile_phase,
    load_coefficient,
    load_each,
    load_rows,
    load_scales,
    no_sum,
    over_lanes,
    power,
    present_modality,
    vectors_phase,
    vectors_tile_phase,
    widened,
)

# ------------------------------------------------------------------------------------------------
# Solving
# ------------------------------------------------------------------------------------------------


@triton.jit
def solve_lanes(records, there, k: tl.constexpr, SPECTRUM: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr):
    """Eigenpairs of the Gram matrices of N instances, one in each lane, from their records to their records."""
    A = ()
    for at in tl.static_range(k * (k + 1) // 2):
        A = A + (tl.load(records + field(k, "gram") + at, mask=there, other=0.0),)
    if NORMALIZE:  # g_ij / (n_i n_j), one after the other: the product of two norms may underflow
        inverse = ()
        for m in tl.static_range(k):
            norm = tl.sqrt(A[triangle(m, m)])
            inverse = inverse + (reciprocal(norm),)
            A = put(A, triangle(m, m), tl.where(norm == 0, 0.0, norm / tl.where(norm == 0, 1.0, norm)))
            tl.store(records + field(k, "inverse_norms") + m, inverse[m], mask=there)
        for j in tl.static_range(1, k):
            for i in tl.static_range(j):
                A = put(A, triangle(i, j), A[triangle(i, j)] * inverse[i] * inverse[j])
        if not SPECTRUM:
            for at in tl.static_range(k * (k + 1) // 2):
                tl.store(records + field(k, "gram") + at, A[at], mask=there)
    broken = zero_or_nan(A[0])
    trace = tl.zeros_like(A[0])
    for j in tl.static_range(k):
        trace += A[triangle(j, j)]
        for i in tl.static_range(j + 1):
            broken += zero_or_nan(A[triangle(i, j)])
    fine = (broken == 0) & (trace > 0)
    if not SPECTRUM:
        for at in tl.static_range(k * (k + 1) // 2):  # what has no answer stands as e₁e₁ᵀ, rank 1 at once
            A = put(A, at, tl.where(fine, A[at], 1.0 if at == 0 else 0.0))
        v, undecided = power_lanes(A, k, WIDE)
        tl.store(records + field(k, "undecided"), (undecided & fine).to(tl.float64), mask=there)
        for m in tl.static_range(k):
            tl.store(records + field(k, "leading") + m, tl.where(fine, v[m], 0.0) + broken, mask=there)
    else:
        for at in tl.static_range(k * (k + 1) // 2):
            A = put(A, at, tl.where(fine, A[at], 0.0))
        values, V = jacobi_lanes(A, k)
        for m in tl.static_range(k):
            tl.store(records + field(k, "eigenvalues") + m, values[m] + broken, mask=there)
        for at in tl.static_range(k * k):
            tl.store(records + field(k, "eigenvectors") + at, V[at] + broken, mask=there)


@triton.jit
def solve_tiles(
    records, there, k: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPECTRUM: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As ``solve_lanes``, with K lanes for each of the N instances."""
    lane = tl.arange(0, K)[None, :] + tl.zeros([N, 1], tl.int32)
    inside = there[:, None] & (lane < k)
    A = load_tiles(records, lane, there, k, K)
    if NORMALIZE:
        norm = tl.sqrt(A[0])
        inverse = reciprocal(norm)
        A = put(A, 0, tl.where(norm == 0, 0.0, norm / tl.where(norm == 0, 1.0, norm)))
        tl.store(records[:, None] + field(k, "inverse_norms") + lane, inverse, mask=inside)
        tl.debug_barrier()
        for y in tl.static_range(K):
            if y > 0:  # in the same order for both lanes that hold this entry
                other = tl.gather(inverse, lane ^ y, 1)
                low = lane < (lane ^ y)
                A = put(A, y, A[y] * tl.where(low, inverse, other) * tl.where(low, other, inverse))
            if not SPECTRUM:
                at = records[:, None] + field(k, "gram") + lane * (lane + 1) // 2 + (lane ^ y)
                tl.store(at, A[y], mask=inside & ((lane ^ y) <= lane))
    broken = zero_or_nan(A[0])
    for y in tl.static_range(1, K):
        broken += zero_or_nan(A[y])
    broken = tl.sum(broken, 1)
    fine = (broken == 0) & (tl.sum(A[0], 1) > 0)
    if SPECTRUM:
        for y in tl.static_range(K):
            A = put(A, y, tl.where(fine[:, None], A[y], 0.0))
        decompose_tiles(records, A, broken, there, lane, k, K)
    else:
        for y in tl.static_range(K):  # what has no answer stands as e₁e₁ᵀ, rank 1 at once
            A = put(A, y, tl.where(fine[:, None], A[y], tl.where((lane == 0) & (y == 0), 1.0, 0.0)))
        v, undecided = power_tiles(A, lane, k, K, WIDE)
        tl.store(records + field(k, "undecided"), (undecided & fine).to(tl.float64), mask=there)
        v = tl.where(fine[:, None], v, 0.0) + broken[:, None]
        tl.store(records[:, None] + field(k, "leading") + lane, v, mask=inside)


# ------------------------------------------------------------------------------------------------
# Kernels: forward
# ------------------------------------------------------------------------------------------------
#
# The state is [HEAD numbers for the batch, the records of its B instances, what solve_kernel's programs add up to].

HEAD = tl.constexpr(2)  # instances that count in the mean, Σ ∂(alignment)/∂τ


@triton.jit
def read_temperature(tau, bits):
    """A bad one makes NaN; a Python number comes as the bits of a float64, since arguments are float32."""
    if tau is None:
        return bits.to(tl.float64, bitcast=True)
    else:
        t = widened(tl.load(tau))
        return tl.where((t > 0) & (t < float("inf")), t, float("nan"))


@triton.jit
def own(state, records, k: tl.constexpr, PAIRS: tl.constexpr):
    """Where ``load_each`` and ``store_each`` find the records: with PAIRS a program has one instance, a scalar."""
    if PAIRS:
        return state + HEAD + tl.program_id(0).to(tl.int64) * record_size(k)
    else:
        return records


@triton.jit
def gram_kernel(
    x, offsets, strides, mask, state, counter, B, d, k: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """G = XᵀX of R instances. Reads x; writes gram (and exponents) of their records, and sets the counter to 0."""
    instance = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = instance < B
    records = state + HEAD + instance * record_size(k)
    if counter is not None:
        if tl.program_id(0) == 0:
            tl.store(counter, 0)
    records = own(state, records, k, PAIRS)
    gram_phase(x, offsets, strides, mask, records, instance, there, d, k, R, BLOCK, VECTOR, NORMALIZE, WIDE, PAIRS)


@triton.jit
def solve_kernel(
    mask, tau, tau_bits, state, partial, counter, total, alignment, sigma, v, values_wanted, B, d, k: tl.constexpr,
    N: tl.constexpr, PART: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, SPECTRUM: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr, ALIGNMENT: tl.constexpr, MEAN: tl.constexpr,
    VECTORS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Eigenpairs, singular values, v₁ and the alignment term of N instances.

    Reads gram of their records; writes the rest of them, and alignment (B,), sigma (B, values_wanted), v (B, k) as
    far as they are given. Where only a sum or a mean of the alignment terms is wanted, every program leaves what its
    instances add up to in ``partial``, and the last one to finish adds those up, in their order.
    """
    instance = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    there = instance < B
    records = state + HEAD + instance * record_size(k)
    if LANES:
        solve_lanes(records, there, k, SPECTRUM, NORMALIZE, WIDE)
    else:
        solve_tiles(records, there, k, N, K, SPECTRUM, NORMALIZE, WIDE)
    tl.debug_barrier()
    losses = tl.zeros([PART, 1, 1], tl.float64)
    slopes = tl.zeros([PART, 1, 1], tl.float64)
    counts = tl.zeros([PART, 1, 1], tl.float64)
    for start in range(0, N, PART):  # some at a time: their matrices are to stay in registers
        one = (tl.program_id(0).to(tl.int64) * N + start + tl.arange(0, PART))[:, None, None]
        loss, slope, alignable = finish_forward(
            state + HEAD + one * record_size(k), one < B, one, mask, read_temperature(tau, tau_bits), sigma, v,
            values_wanted, d, PART, k, K, SPECTRUM, NORMALIZE, WIDE, PAIRS, ALIGNMENT, VECTORS,
        )  # fmt: skip
        if alignment is not None:
            tl.store(alignment + one, loss.to(alignment.dtype.element_ty), mask=one < B)
        losses += tl.where(one < B, loss, 0.0)
        slopes += tl.where(one < B, slope, 0.0)
        counts += (alignable & (one < B)).to(tl.float64)
    if total is not None:
        add_up(
            sum_of(losses), sum_of(slopes), sum_of(counts), state, partial, counter, total, MEAN, BATCH
        )  # fmt: skip


@triton.jit
def sum_of(x):
    """Of a block [N, 1, 1]."""
    return tl.sum(tl.sum(tl.sum(x, 2), 1), 0)


@triton.jit
def add_up(losses, slopes, counts, state, partial, counter, total, MEAN: tl.constexpr, BATCH: tl.constexpr):
    """Leaves this program's sums in ``partial``; the last program to finish adds up everyone's, in their order."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partial + 3 * program, losses)
    tl.store(partial + 3 * program + 1, slopes)
    tl.store(partial + 3 * program + 2, counts)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
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
        write_total(state, total, tl.sum(all_losses, 0), tl.sum(all_slopes, 0), tl.sum(all_counts, 0), MEAN)


@triton.jit
def write_total(state, total, losses, slopes, count, MEAN: tl.constexpr):
    count = tl.maximum(count, 1.0)  # the mean over no instance is 0
    if MEAN:
        losses = losses / count
    tl.store(total, losses.to(total.dtype.element_ty))
    tl.store(state, count)
    tl.store(state + 1, slopes)


@triton.jit
def reduce_kernel(
    mask, state, partial, counter, total, B, k: tl.constexpr, MEAN: tl.constexpr, BATCH: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    """Sum or mean of the alignment terms in the records of the batch, SHARE of them by each program.

    With a counter there are several, and the last one to finish adds up what each has left in ``partial``.
    """
    losses = tl.zeros([BATCH], tl.float64)
    slopes = tl.zeros([BATCH], tl.float64)
    counts = tl.zeros([BATCH], tl.float64)
    first = tl.program_id(0) * SHARE
    for start in range(first, tl.minimum(first + SHARE, B), BATCH):
        instance = (start + tl.arange(0, BATCH)).to(tl.int64)
        there = instance < B
        records = state + HEAD + instance * record_size(k)
        losses += tl.load(records + field(k, "alignment"), mask=there, other=0.0)
        slopes += tl.load(records + field(k, "slope"), mask=there, other=0.0)
        number = tl.zeros([BATCH], tl.int32)
        for m in tl.static_range(k):
            number += present_modality(mask, instance, there, m, k).to(tl.int32)
        counts += (number >= 2).to(tl.float64)
    if counter is None:
        write_total(state, total, tl.sum(losses, 0), tl.sum(slopes, 0), tl.sum(counts, 0), MEAN)
    else:
        add_up(
            tl.sum(losses, 0), tl.sum(slopes, 0), tl.sum(counts, 0), state, partial, counter, total, MEAN, BATCH
        )  # fmt: skip


@triton.jit
def vectors_kernel(
    x, offsets, strides, mask, state, u, z, z_offsets, B, d, k: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """u = X c and z_m = x_m / n_m of R instances. Reads x and records; writes u (B, d) and the z (B, d), if given."""
    instance = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = instance < B
    records = state + HEAD + instance * record_size(k)
    vectors_phase(
        x, offsets, strides, mask, own(state, records, k, PAIRS), instance, there, d, u, z, z_offsets, k, R, BLOCK,
        NORMALIZE, WIDE, PAIRS,
    )  # fmt: skip


@triton.jit
def forward_kernel(
    x, offsets, strides, mask, tau, tau_bits, state, counter, alignment, sigma, v, u, z, z_offsets, values_wanted, B,
    d, k: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    SPECTRUM: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
    ALIGNMENT: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """gram_kernel, solve_kernel and vectors_kernel of R instances, whose embeddings are in cache the second time."""
    instance = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = instance < B
    records = state + HEAD + instance * record_size(k)
    if counter is not None:
        if tl.program_id(0) == 0:
            tl.store(counter, 0)
    if K >= 16:
        one = tl.program_id(0).to(tl.int64)
        record = state + HEAD + one * record_size(k)
        present = presence(mask, one, tl.arange(0, K), tl.arange(0, K) >= 0, k)
        at = gathered(offsets, k, K) + one * gathered(strides, k, K)
        gram_tile_phase(x, at, present, record, d, k, K, BLOCK, NORMALIZE, WIDE)
    else:
        gram_phase(
            x, offsets, strides, mask, own(state, records, k, PAIRS), instance, there, d, k, R, BLOCK, VECTOR,
            NORMALIZE, WIDE, PAIRS,
        )  # fmt: skip
    tl.debug_barrier()
    solve_tiles(records, there, k, R, K, SPECTRUM, NORMALIZE, WIDE)
    tl.debug_barrier()
    loss, _, _ = finish_forward(
        records[:, None, None], there[:, None, None], instance[:, None, None], mask, read_temperature(tau, tau_bits),
        sigma, v, values_wanted, d, R, k, K, SPECTRUM, NORMALIZE, WIDE, PAIRS, ALIGNMENT, VECTORS,
    )  # fmt: skip
    if alignment is not None:
        at = alignment + instance[:, None, None]
        tl.store(at, loss.to(alignment.dtype.element_ty), mask=there[:, None, None])
    if (u is not None) or (z is not None):
        tl.debug_barrier()
        if K >= 16:
            vectors_tile_phase(x, at, present, record, one, d, u, z, z_offsets, k, K, BLOCK, NORMALIZE, WIDE)
        else:
            vectors_phase(
                x, offsets, strides, mask, own(state, records, k, PAIRS), instance, there, d, u, z, z_offsets, k,
                R, BLOCK, NORMALIZE, WIDE, PAIRS,
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Kernels: backward
# ------------------------------------------------------------------------------------------------


@triton.jit
def packed(blocks, first: tl.constexpr, k: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
    """k blocks [R] as one [R, K, 1]."""
    i = tl.arange(0, K)[None, :, None]
    out = tl.zeros([R, K, 1], tl.float64)
    for m in tl.static_range(k):
        out = tl.where(i == m, blocks[first + m][:, None, None], out)
    return out


@triton.jit
def backward_kernel(
    x, offsets, strides, mask, state, draft, slope, grad_alignment, alignment_stride, grad_sigma, sigma_strides,
    values_wanted, grad_v, v_strides, grad_u, u_stride, grad_z, z_offsets, z_strides, out, out_offsets, out_stride, B,
    d,
    k: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    RESIDENT: tl.constexpr, SPECTRUM: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
    MEAN: tl.constexpr, DIRECT: tl.constexpr, SIMPLE: tl.constexpr,
):  # fmt: skip
    """Gradients of R instances, all of them in one launch: dX = h cᵀ + X C (+ H).

    Reads the records, x, and the incoming gradients that are given; writes the gradients that are wanted. A gradient
    of the alignment term alone finds its C in the record; whatever else comes in is made into coefficients first,
    which pass through ``draft``.
    """
    instance = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = instance < B
    records = state + HEAD + instance * record_size(k)
    drafts = draft
    if draft is not None:
        drafts = draft + instance * draft_size(k)
    ALIGNMENT: tl.constexpr = grad_alignment is not None
    grad = tl.zeros([R], tl.float64)
    if ALIGNMENT:
        grad = widened(tl.load(grad_alignment + instance * alignment_stride, mask=there, other=0.0))
        if MEAN:
            grad = grad / tl.load(state)
    if slope is not None:
        if tl.program_id(0) == 0:
            total = widened(tl.load(grad_alignment)) * tl.load(state + 1)
            tl.store(slope, total / tl.load(state) if MEAN else total)
    if K >= 16:
        one = tl.program_id(0).to(tl.int64)
        record = state + HEAD + one * record_size(k)
        index = tl.arange(0, K)
        inside = index < k
        present = presence(mask, one, index, index >= 0, k)
        at = gathered(offsets, k, K) + one * gathered(strides, k, K)
        scale = ()
        if WIDE:
            exponents = tl.load(record + field(k, "exponents") + index, mask=inside, other=0.0)
            scale = power(-exponents)
        larger = tl.maximum(index[:, None], index[None, :])
        entry = larger * (larger + 1) // 2 + tl.minimum(index[:, None], index[None, :])
        c = tl.zeros([K], tl.float64)
        factors = c
        last = c
        if SIMPLE:
            number = tl.sum(present.to(tl.int32), 0)
            upstream = tl.where(number >= 2, tl.sum(grad, 0), 0.0)
            C = upstream * tl.load(record + field(k, "through_alignment") + entry, mask=larger < k, other=0.0)
            if WIDE and NORMALIZE:
                last = -exponents
        else:
            w = c
            direct = c
            if (grad_u is not None) or (DIRECT and NORMALIZE):
                w, direct = dots_tile(
                    x, at, present, scale, grad_u, u_stride, grad_z, z_offsets, z_strides, one, d, k, K, BLOCK,
                    DIRECT, WIDE,
                )  # fmt: skip
            draft_coefficients(
                records[:, None, None], drafts[:, None, None], there[:, None, None], instance[:, None, None], mask,
                w[None, :, None], direct[None, :, None], grad[:, None, None], grad_sigma, sigma_strides,
                values_wanted, grad_v, v_strides, R, k, K, SPECTRUM, NORMALIZE, WIDE, PAIRS, ALIGNMENT,
                grad_u is not None, DIRECT,
            )  # fmt: skip
            tl.debug_barrier()
            draft_one = draft + one * draft_size(k)
            C = tl.load(draft_one + draft_field(k, "C") + entry, mask=larger < k, other=0.0)
            c = tl.load(draft_one + draft_field(k, "c") + index, mask=inside, other=0.0)
            if WIDE:
                last = tl.load(draft_one + draft_field(k, "exponents") + index, mask=inside, other=0.0)
            if DIRECT and NORMALIZE:
                factors = tl.load(record + field(k, "inverse_norms") + index, mask=inside, other=0.0)
        apply_tile(
            x, at, present, scale, C, c, factors, last, grad_u, u_stride, grad_z, z_offsets, z_strides, out,
            out_offsets, out_stride, one, d, k, K, BLOCK, DIRECT, NORMALIZE, WIDE,
        )  # fmt: skip
    else:
        scales = load_scales(own(state, records, k, PAIRS), there, k, R, WIDE, PAIRS)
        cols = tl.arange(0, BLOCK)
        if RESIDENT:
            rows = load_rows(x, offsets, strides, mask, instance, there, cols, d, k, R, BLOCK)

        if SIMPLE and PAIRS:
            draft_alignment(
                records[:, None, None], drafts[:, None, None], there[:, None, None], instance[:, None, None], mask,
                grad[:, None, None], R, k, K, NORMALIZE, PAIRS,
            )  # fmt: skip
        elif SIMPLE:
            alignable = there & (k >= 2)
            if mask is not None:
                number = tl.zeros([R], tl.int32)
                for m in tl.static_range(k):
                    number += present_modality(mask, instance, there, m, k).to(tl.int32)
                alignable = number >= 2
            grad = tl.where(alignable, grad, 0.0)
        else:
            sums = ()
            if (grad_u is not None) or (DIRECT and NORMALIZE):
                for _ in tl.static_range(2 * k if DIRECT else k):
                    sums = sums + (no_sum(R, BLOCK // VECTOR, PAIRS),)
                if RESIDENT:
                    sums = add_dots(
                        sums, rows, scales, mask, grad_u, u_stride, grad_z, z_offsets, z_strides, instance, there,
                        cols, d, k, R, BLOCK, VECTOR, DIRECT, WIDE, PAIRS,
                    )  # fmt: skip
                else:
                    for start in range(0, d, BLOCK):
                        chunk = load_rows(x, offsets, strides, mask, instance, there, start + cols, d, k, R, BLOCK)
                        sums = add_dots(
                            sums, chunk, scales, mask, grad_u, u_stride, grad_z, z_offsets, z_strides, instance,
                            there, start + cols, d, k, R, BLOCK, VECTOR, DIRECT, WIDE, PAIRS,
                        )  # fmt: skip
            dots = ()
            for at in tl.static_range(2 * k):
                if at < len(sums):
                    dots = dots + (over_lanes(sums[at]),)
                else:
                    dots = dots + (tl.zeros([R], tl.float64),)
            draft_coefficients(
                records[:, None, None], drafts[:, None, None], there[:, None, None], instance[:, None, None], mask,
                packed(dots, 0, k, K, R), packed(dots, k, k, K, R), grad[:, None, None], grad_sigma, sigma_strides,
                values_wanted, grad_v, v_strides, R, k, K, SPECTRUM, NORMALIZE, WIDE, PAIRS, ALIGNMENT,
                grad_u is not None, DIRECT,
            )  # fmt: skip
        C = ()
        c = ()
        factors = ()
        powers = ()
        if SIMPLE and not PAIRS:
            for at in tl.static_range(k * (k + 1) // 2):
                C = C + ((grad * tl.load(records + field(k, "through_alignment") + at, mask=there, other=0.0),),)
            for m in tl.static_range(k):
                if WIDE:
                    e = tl.zeros([R], tl.float64)
                    if NORMALIZE:
                        e = -tl.load(records + field(k, "exponents") + m, mask=there, other=0.0)
                    powers = powers + (power(e),)
        else:
            tl.debug_barrier()
            if PAIRS:
                drafts = draft + tl.program_id(0).to(tl.int64) * draft_size(k)
            for at in tl.static_range(k * (k + 1) // 2):
                C = C + (load_coefficient(drafts, draft_field(k, "C") + at, there, R, PAIRS),)
            for m in tl.static_range(k):
                if grad_u is not None:
                    c = c + (load_coefficient(drafts, draft_field(k, "c") + m, there, R, PAIRS),)
                if DIRECT and NORMALIZE:
                    factors = factors + (load_coefficient(drafts, draft_field(k, "factors") + m, there, R, PAIRS),)
                if WIDE or PAIRS:
                    e = load_each(drafts, draft_field(k, "exponents") + m, there, R, PAIRS)
                    powers = powers + (power(e.to(tl.float32 if PAIRS else tl.float64)),)

        if RESIDENT:
            apply_chunk(
                rows, C, c, factors, scales, powers, mask, grad_u, u_stride, grad_z, z_offsets, z_strides, out,
                out_offsets, out_stride, instance, there, cols, d, k, R, NORMALIZE, WIDE, PAIRS,
            )  # fmt: skip
        else:
            for start in range(0, d, BLOCK):
                chunk = load_rows(x, offsets, strides, mask, instance, there, start + cols, d, k, R, BLOCK)
                apply_chunk(
                    chunk, C, c, factors, scales, powers, mask, grad_u, u_stride, grad_z, z_offsets, z_strides, out,
                    out_offsets, out_stride, instance, there, start + cols, d, k, R, NORMALIZE, WIDE, PAIRS,
                )  # fmt: skip
