"""The backward kernel: all gradients of the spectral operators in one launch, dX = h cᵀ + X C (+ H), and what comes
through the w."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...triton.arguments import Instances
from ...triton.double_float import no_sum, over_lanes, power, to_float64
from ...triton.record import load_symmetric, load_vector, number_of_modalities, own, record_of
from .algebra import ThroughOthers, alignment_coefficients, block_of, gradient_coefficients
from .passes import (
    Linear,
    Others,
    add_dots,
    add_dots_of_others,
    apply_chunk,
    apply_tile,
    dots_of_others_tile,
    dots_tile,
    load_linear,
    load_others,
    load_rows,
    load_scale,
    load_scales,
    tile_of,
)


class Gradients(NamedTuple):
    """What comes in for the outputs that are k numbers long, or one; or None. The alignment term's is (B,), or 0-d
    where that is a sum or a mean."""

    alignment: Any
    sigma: Any
    v: Any


@triton.jit
def packed(blocks, first: tl.constexpr, R: tl.constexpr, MODE: tl.constexpr):
    """k blocks [R] as one [R, K, 1]; zeros where there are none."""
    i = tl.arange(0, MODE.K)[None, :, None]
    out = tl.zeros([R, MODE.K, 1], tl.float64)
    for m in tl.static_range(MODE.k):
        if first + m < len(blocks):
            out = tl.where(i == m, blocks[first + m][:, None, None], out)
    return out


@triton.jit
def alignment_gradient(grads, state, at, MEAN: tl.constexpr):
    """∂L/∂(alignment) of R instances, [R]."""
    grad = tl.zeros([at.index.shape[0]], tl.float64)
    if grads.alignment is not None:
        pointers = grads.alignment.pointer + at.index * grads.alignment.strides[0]
        grad = to_float64(tl.load(pointers, mask=at.there, other=0.0))
        if MEAN:
            grad = grad / tl.load(state)
    return grad


@triton.jit
def write_slope(slope, grads, state, MEAN: tl.constexpr):
    """∂L/∂τ of a sum or a mean over the batch."""
    total = to_float64(tl.load(grads.alignment.pointer)) * tl.load(state + 1)
    tl.store(slope, total / tl.load(state) if MEAN else total)


@triton.jit
def backward_kernel(
    x, mask, state, coefficients, slope, grads, grad_u, grad_z, grad_w, out, B, d, MODE: tl.constexpr,
    STEP: tl.constexpr, MEAN: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Gradients of R instances: dX = h cᵀ + X C (+ H), h and H being what comes in for u₁ and the z; and with g, what
    comes in for the w, dx_m += s_m (R − r_m g_m), R = Σ_j r_j g_j, s = |v₁|/n, r = 1/‖y‖.

    Reads the records, x, and the incoming gradients that are given; writes the gradients that are wanted, ∂L/∂τ if
    ``slope`` is given. A gradient of the alignment term alone finds its C in the record; whatever else comes in is made
    into coefficients first, which pass through ``coefficients``. With RESIDENT one step has all of d, and x is read
    once for both.
    """
    instance = tl.program_id(0).to(tl.int64) * STEP.rows + tl.arange(0, STEP.rows)
    at = Instances(instance, instance < B)
    grad = alignment_gradient(grads, state, at, MEAN)
    if slope is not None:
        if tl.program_id(0) == 0:
            write_slope(slope, grads, state, MEAN)
    if MODE.K >= 16:
        backward_tile(x, mask, state, coefficients, grad, grads, grad_u, grad_z, grad_w, out, at, d, MODE, STEP)
    else:
        backward_rows(
            x, mask, state, coefficients, grad, grads, grad_u, grad_z, grad_w, out, at, d, MODE, STEP, RESIDENT
        )


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------


@triton.jit
def dots_rows(
    rows, scales, x, mask, records, grad_u, grad_z, grad_w, at, d, MODE: tl.constexpr, STEP: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """x_m · ∂L/∂u₁, x_m · ∂L/∂z_m where those come in, and where the ∂L/∂w do, what ``add_dots_of_others`` says: a
    tuple of blocks [R]."""
    k: tl.constexpr = MODE.k
    first: tl.constexpr = k if grad_z is None else 2 * k
    number: tl.constexpr = first if grad_w is None else first + 3 * k
    sums = ()
    others = ()
    if grad_w is not None:
        others = load_others(records, at.there, MODE, STEP)
    for _ in tl.static_range(number):
        sums = sums + (no_sum(STEP.rows, STEP.columns // STEP.vector, MODE.double_float),)
    if RESIDENT:
        cols = tl.arange(0, STEP.columns)
        sums = add_dots(sums, rows, scales, mask, grad_u, grad_z, at, cols, d, MODE, STEP)
        if grad_w is not None:
            sums = add_dots_of_others(sums, first, rows, scales, others, grad_w, at, cols, d, MODE, STEP)
    else:
        for start in range(0, d, STEP.columns):
            cols = start + tl.arange(0, STEP.columns)
            chunk = load_rows(x, mask, at, cols, d, k)
            sums = add_dots(sums, chunk, scales, mask, grad_u, grad_z, at, cols, d, MODE, STEP)
            if grad_w is not None:
                sums = add_dots_of_others(sums, first, chunk, scales, others, grad_w, at, cols, d, MODE, STEP)
    dots = ()
    for n in tl.static_range(number):
        dots = dots + (over_lanes(sums[n]),)
    return dots


@triton.jit
def recorded_linear(records, grad, there, MODE: tl.constexpr):
    """For a gradient of the alignment term alone, from the records."""
    k: tl.constexpr = MODE.k
    C = ()
    powers = ()
    for n in tl.static_range(k * (k + 1) // 2):
        C = C + ((grad * tl.load(records + MODE.record.through_alignment + n, mask=there, other=0.0),),)
    for m in tl.static_range(k):
        if MODE.scaled:
            e = tl.zeros_like(grad)
            if MODE.normalize:
                e = -tl.load(records + MODE.record.exponents + m, mask=there, other=0.0)
            powers = powers + (power(e),)
    return Linear(C, (), (), powers, ())


@triton.jit
def backward_rows(
    x, mask, state, coefficients, grad, grads, grad_u, grad_z, grad_w, out, at, d, MODE: tl.constexpr,
    STEP: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """``backward_kernel`` of k <= 8: rows of R instances."""
    k: tl.constexpr = MODE.k
    R: tl.constexpr = STEP.rows
    OTHERS: tl.constexpr = grad_w is not None
    DOTS: tl.constexpr = (grad_u is not None) or ((grad_z is not None) and MODE.normalize) or OTHERS
    VECTORS: tl.constexpr = (grad_u is not None) or (grad_z is not None) or OTHERS
    SIMPLE: tl.constexpr = (grads.sigma is None) and (grads.v is None) and not VECTORS
    records = own(state, at, MODE)
    scales = load_scales(records, at.there, MODE, STEP)
    rows = ()
    if RESIDENT:
        rows = load_rows(x, mask, at, tl.arange(0, STEP.columns), d, k)
    if SIMPLE and not MODE.double_float:
        grad = tl.where(number_of_modalities(mask, at.index, at.there, k) >= 2, grad, 0.0)
        linear = recorded_linear(record_of(state, at.index, MODE), grad, at.there, MODE)
    else:
        one = at.index[:, None, None]
        block = block_of(record_of(state, one, MODE), one, at.there[:, None, None], MODE.K)
        theirs = coefficients + one * MODE.coefficients.size
        if SIMPLE:
            alignment_coefficients(block, theirs, mask, grad[:, None, None], MODE)
        else:
            dots = ()
            if DOTS:
                dots = dots_rows(rows, scales, x, mask, records, grad_u, grad_z, grad_w, at, d, MODE, STEP, RESIDENT)
            w = packed(dots, 0, R, MODE)
            direct = packed(dots if grad_z is not None else (), k, R, MODE)
            through_w = ()
            if OTHERS:
                first: tl.constexpr = k if grad_z is None else 2 * k
                through_w = ThroughOthers(
                    packed(dots, first, R, MODE), packed(dots, first + k, R, MODE), packed(dots, first + 2 * k, R, MODE)
                )
            gradient_coefficients(
                block, theirs, mask, w, direct, through_w, grad[:, None, None], grads, d,
                grad_u is not None, grad_z is not None, OTHERS, MODE,
            )  # fmt: skip
        tl.debug_barrier()
        if MODE.double_float:
            mine = coefficients + tl.program_id(0).to(tl.int64) * MODE.coefficients.size
        else:
            mine = coefficients + at.index * MODE.coefficients.size
        DIRECT: tl.constexpr = (grad_z is not None) and MODE.normalize
        linear = load_linear(mine, records, at.there, grad_u is not None, DIRECT, OTHERS, MODE, R)
    if RESIDENT:
        apply_chunk(rows, linear, scales, mask, grad_u, grad_z, grad_w, out, at, tl.arange(0, STEP.columns), d, MODE)
    else:
        for start in range(0, d, STEP.columns):
            cols = start + tl.arange(0, STEP.columns)
            chunk = load_rows(x, mask, at, cols, d, k)
            apply_chunk(chunk, linear, scales, mask, grad_u, grad_z, grad_w, out, at, cols, d, MODE)


# ------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------


@triton.jit
def backward_tile(
    x, mask, state, coefficients, grad, grads, grad_u, grad_z, grad_w, out, at, d, MODE: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """``backward_kernel`` of k > 8: the program's instance."""
    k: tl.constexpr = MODE.k
    OTHERS: tl.constexpr = grad_w is not None
    VECTORS: tl.constexpr = (grad_u is not None) or (grad_z is not None) or OTHERS
    SIMPLE: tl.constexpr = (grads.sigma is None) and (grads.v is None) and not VECTORS
    tile = tile_of(x, mask, MODE)
    record = record_of(state, tile.instance, MODE)
    scale = load_scale(record, MODE)
    index = tl.arange(0, MODE.K)
    i = index[:, None]
    j = index[None, :]
    inside = index < k
    c = tl.zeros([MODE.K], tl.float64)
    factors = c
    last = c
    others = ()
    if SIMPLE:
        number = tl.sum(tile.present.to(tl.int32), 0)
        upstream = tl.where(number >= 2, tl.sum(grad, 0), 0.0)
        C = upstream * load_symmetric(record + MODE.record.through_alignment, i, j, i >= 0, k)
        if MODE.scaled and MODE.normalize:
            last = -load_vector(record + MODE.record.exponents, index, inside, k)
    else:
        w = c
        direct = c
        if (grad_u is not None) or ((grad_z is not None) and MODE.normalize):
            w, direct = dots_tile(x, tile, scale, grad_u, grad_z, d, MODE, STEP)
        through_w = ()
        if OTHERS:
            along_sum, own_dots, along_common = dots_of_others_tile(x, tile, scale, record, grad_w, d, MODE, STEP)
            through_w = ThroughOthers(along_sum[None, :, None], own_dots[None, :, None], along_common[None, :, None])
        one = at.index[:, None, None]
        block = block_of(record_of(state, one, MODE), one, at.there[:, None, None], MODE.K)
        gradient_coefficients(
            block, coefficients + one * MODE.coefficients.size, mask, w[None, :, None], direct[None, :, None],
            through_w, grad[:, None, None], grads, d, grad_u is not None, grad_z is not None, OTHERS, MODE,
        )  # fmt: skip
        tl.debug_barrier()
        mine = coefficients + tile.instance * MODE.coefficients.size
        C = load_symmetric(mine + MODE.coefficients.C, i, j, i >= 0, k)
        c = load_vector(mine + MODE.coefficients.c, index, inside, k)
        if MODE.scaled:
            last = load_vector(mine + MODE.coefficients.exponents, index, inside, k)
        if (grad_z is not None) and MODE.normalize:
            factors = load_vector(record + MODE.record.inverse_norms, index, inside, k)
        if OTHERS:
            inverses = load_vector(record + MODE.record.others, index, inside, k)
            others = Others(load_vector(mine + MODE.coefficients.shares, index, inside, k), inverses)
    apply_tile(x, tile, Linear(C, c, factors, last, others), scale, grad_u, grad_z, grad_w, out, d, MODE, STEP)
