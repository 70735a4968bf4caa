"""From tensors to launches: what is allocated, which kernels run, and in what steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...triton import runtime
from ...triton.arguments import (
    Mode,
    Step,
    Sums,
    Temperature,
    Values,
    bits,
    canonical,
    dense,
    filled,
    mode,
    rows,
    targets,
    values,
)
from ...triton.eigen import next_power_of_two
from ...triton.record import HEAD as _HEAD
from ...triton.record import state_size
from ...triton.runtime import Launch
from .. import spec
from . import forward as kernels
from .backward import Gradients, backward_kernel
from .forward import Outputs, Solve

HEAD = _HEAD.value


class Plan(NamedTuple):
    """Launch parameters. See ``plan``."""

    latency: bool  # forward_kernel; else gram, solve and vectors one after the other
    latency_rows: int  # instances of a program of forward_kernel
    latency_block: int  # columns it takes at a time
    latency_warps: int
    gram_rows: int  # the same of gram_kernel
    gram_block: int
    gram_warps: int
    lanes: bool  # the solve takes an instance per lane; else K lanes for each
    solve_instances: int  # of a program of solve_kernel
    solve_part: int  # of these, how many go through the k-space algebra at a time
    solve_registers: int  # at most, of a thread; 0 for as many as there are
    vectors_rows: int  # the same of vectors_kernel
    vectors_block: int
    vectors_others_rows: int  # where it writes the w: it holds all rows at once
    vectors_others_block: int
    vectors_warps: int
    backward_rows: int  # of backward_kernel, for gradients of the alignment term alone
    backward_block: int
    backward_warps: int
    all_rows: int  # and for those of all outputs
    all_block: int
    all_others_block: int  # where gradients of the w come in, which are as many rows again
    all_warps: int
    vector: int  # elements in 16 bytes
    double_float: bool  # sums in pairs of float32


LATENCY_BATCH = 1024
"""Up to this B one program for one or two instances has the lower latency; beyond, and for 4 < k <= 8 from a quarter of
it, the solve is better by itself."""

SPREAD_BATCH = 8192
"""Up to this B, K lanes for each instance solve sooner than one: there are not enough instances to fill the lanes."""

BATCH = 256  # numbers that the last step of a sum over the batch takes at a time
SHARE = 1024  # instances whose terms one program of reduce_kernel adds up, a multiple of BATCH


SMALL, MEDIUM, LARGE = range(3)


def size_of(B: int, k: int) -> int:
    """What launch parameters depend on of a batch's size."""
    share = 4 if 4 < k <= 8 else 1
    return SMALL if B * share <= LATENCY_BATCH else MEDIUM if B <= SPREAD_BATCH else LARGE


@functools.cache
def plan(k: int, d: int, size: int, itemsize: int, slow_float64: bool, spectrum: bool = True) -> Plan:
    """The static table of launch parameters, by what a batch is and whether all eigenpairs are asked for. Measured on
    an H200, see docs/gpu-notes.md."""
    K = next_power_of_two(k)
    double_float = slow_float64 and itemsize <= 4 and K < 16
    # A product in double_float is ten instructions, and what Triton takes to compile grows with their number.
    vector = 1 if double_float else 16 // itemsize
    whole = next_power_of_two(d)
    together = runtime.INTERPRETED and K < 16 and not double_float  # costs the interpreter no more than one

    def block(lanes: int, loads: int = 1) -> int:
        """Columns for so many lanes of a row, so many loads of 16 bytes each: no more than there are."""
        return 32 if double_float else max(min(lanes * loads * vector, whole), vector)

    def rows_of(block: int) -> int:
        """As many as give each lane of a warp a load, if that is more than one."""
        return 1 if double_float else 16 if together else max(1, 32 * vector // block)

    gram_block, backward_block = block(16 if k <= 6 else 32), block(32, loads=1 if itemsize == 2 else 2)
    others_block = min(block(32), 1024 // K)
    lanes = k <= 4 and not (K == 4 and size < LARGE)
    latency_block = 32 if K >= 16 or double_float else block(32)
    return Plan(
        latency=size == SMALL or K >= 16,
        latency_rows=4 if together else 2 if K <= 4 and not double_float else 1,
        latency_block=latency_block,
        latency_warps=2 if K >= 16 else 1,
        gram_rows=rows_of(gram_block),
        gram_block=gram_block,
        gram_warps=1,
        lanes=lanes,
        solve_instances=32 if lanes else 8 if size == LARGE and spectrum else 4,
        solve_part=4 if not lanes else {2: 32, 4: 8}[K],
        solve_registers=128 if lanes and K == 4 else 0,  # 16 warps a multiprocessor: 65536 at a time on an H200
        vectors_rows=rows_of(backward_block),
        vectors_block=backward_block,
        vectors_others_rows=rows_of(others_block),
        vectors_others_block=others_block,
        vectors_warps=1,
        backward_rows=rows_of(backward_block),
        backward_block=backward_block,
        backward_warps=1,
        all_rows=4 if together else 1,
        all_block=latency_block,
        all_others_block=latency_block if K >= 16 else min(latency_block, 2048 // (K * max(itemsize, 4))),
        all_warps=4 if K >= 16 else 1,
        vector=vector,
        double_float=double_float,
    )


def _vector(p: Plan, multiple: int, elements: int, warps: int) -> int:
    """How many neighbouring columns of the ``elements`` that a program takes at a time are in one lane: as many as
    16 bytes hold, if rows are aligned and there are enough for all lanes, else one.

    To add neighbours up across lanes would not do: each lane fuses its own product with the other's.
    """
    return p.vector if multiple > 1 and elements >= 32 * warps * p.vector else 1


def _nothing(temperature: Tensor) -> Tensor:
    """What a sum over no instances is: 0, but a bad temperature shows there too."""
    return torch.where((temperature > 0) & temperature.isfinite(), 0.0, torch.nan).double()


_Call = tuple[Sequence[Tensor], int, int, int, Plan, Mode]
"""What both passes make of their arguments: the embeddings, of one dtype and with contiguous rows; B, k, d; and how."""


def _call(embeddings: Sequence[Tensor], normalize: bool, spectrum: bool, wanted: int) -> _Call:
    xs = canonical(embeddings)
    first = xs[0]
    shape, dtype = first.shape, first.dtype
    B, d, k = shape[0], shape[-1], shape[1] if len(shape) == 3 else len(xs)
    slow_float64 = runtime.double_float(first.device.index, runtime.SUMS)
    p = plan(k, d, size_of(B, k), first.element_size(), slow_float64, spectrum)
    asked = wanted & spec.ANY_ALIGNMENT != 0, wanted & spec.W != 0
    return xs, B, k, d, p, mode(k, spectrum, normalize, *asked, dtype == torch.float64, p.double_float)


# ------------------------------------------------------------------------------------------------
# Forward
# ------------------------------------------------------------------------------------------------

_Allocated = tuple[Tensor | None, Outputs, Tensor | None, list[Tensor] | None, list[Tensor] | None, list[Tensor]]
"""The alignment term's sum or mean, what is k numbers long, u, the z, the w (None for what is not wanted); all, in
order."""


def _allocated(call: _Call, wanted: int) -> _Allocated:
    xs, B, k, d, _, MODE = call
    first = xs[0]
    device, out = first.device, first.dtype if MODE.float64_input else torch.float32
    total = alignment = sigma = u = v = z = w = None
    outputs = []
    if wanted & spec.ALIGNMENT:
        alignment = torch.empty(B, dtype=out, device=device)
        outputs.append(alignment)
    elif wanted & spec.ANY_ALIGNMENT:
        total = first.new_empty((), dtype=out)
        outputs.append(total)
    if wanted & spec.SIGMA:
        sigma = torch.empty((B, min(d, k) if MODE.spectrum else 1), dtype=out, device=device)
        outputs.append(sigma)
    if wanted & spec.U:
        u = torch.empty((B, d), dtype=out, device=device)
        outputs.append(u)
    if wanted & spec.V:
        v = torch.empty((B, k), dtype=out, device=device)
        outputs.append(v)
    if wanted & spec.Z:
        z = [torch.empty((B, d), dtype=out, device=device) for _ in range(k)]
        outputs += z
    if wanted & spec.W:
        w = [torch.empty((B, d), dtype=out, device=device) for _ in range(k)]
        outputs += w
    return total, Outputs(alignment, sigma, v), u, z, w, outputs


def forward(
    embeddings: Sequence[Tensor],
    mask: Tensor | None,
    temperature: Tensor | None,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """As ``reference.spectral_forward``; the state is one tensor, for ``backward``."""
    device = embeddings[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return forward(embeddings, mask, temperature, fixed_temperature, normalize, spectrum, wanted)
    call = xs, B, _, d, p, MODE = _call(embeddings, normalize, spectrum, wanted)
    total, small, u, zs, ws, outputs = _allocated(call, wanted)
    state = xs[0].new_empty(state_size(B, MODE.record), dtype=torch.float64)
    if B == 0:
        if total is not None:
            total.zero_() if temperature is None or not spectrum else total.copy_(_nothing(temperature))
        return outputs, [state]

    x, multiple = rows(xs, d)
    z, w, u_multiple, z_multiple, w_multiple = None, None, 1, 1, 1
    if zs is not None:
        z, z_multiple = targets(zs, d)
    if ws is not None:
        w, w_multiple = targets(ws, d)
    if multiple == 1:
        z_multiple = w_multiple = 1
    elif u is not None and u.data_ptr() % 16 == 0:
        u_multiple = multiple
    if mask is not None:
        mask = mask.contiguous()
    sums = Sums(total, None, None)
    if total is not None and (not p.latency or B > SHARE):
        sums = Sums(total, state[HEAD + B * MODE.record.size :], state[-1:].view(torch.int32))
    tau = Temperature(temperature, bits(fixed_temperature))
    vectors, mean = wanted & (spec.U | spec.V | spec.W) != 0, wanted & spec.ALIGNMENT_MEAN != 0
    parameters: tuple[Any, ...]
    if p.latency:
        R, block, warps = p.latency_rows, p.latency_block, p.latency_warps
        arguments = (x, mask, tau, state, sums.counter, small, u, z, w, B, d)
        parameters = (MODE, Step(R, block, _vector(p, multiple, R * block, warps)), vectors)
        multiples = (multiple, 1, 1, 1, 1, 1, u_multiple, z_multiple, w_multiple, 1, multiple)
        runtime.run(Launch(kernels.forward_kernel, -(-B // R), warps, arguments, parameters, multiples))
        if total is not None:
            programs, parameters = -(-B // SHARE), (MODE, mean, BATCH, SHARE)
            runtime.run(Launch(kernels.reduce_kernel, programs, 4, (mask, state, sums, B), parameters, (1, 1, 1, 1)))
        return outputs, [state]

    R, block, warps = p.gram_rows, p.gram_block, p.gram_warps
    step = Step(R, block, _vector(p, multiple, R * block, warps))
    found = (x, mask, state, sums.counter, B, d), (MODE, step), (multiple, 1, 1, 1, 1, multiple)
    runtime.run(Launch(kernels.gram_kernel, -(-B // R), warps, *found))
    solve = Solve(p.solve_instances, p.solve_part, p.lanes)
    solved = (mask, tau, state, sums, small, B, d), (MODE, solve, vectors, mean, BATCH), (1,) * 7
    runtime.run(Launch(kernels.solve_kernel, -(-B // solve.instances), 1, *solved, registers=p.solve_registers))
    if u is not None or z is not None or w is not None:
        R, block, warps = p.vectors_rows, p.vectors_block, p.vectors_warps
        if w is not None:
            R, block = p.vectors_others_rows, p.vectors_others_block
        aligned = (multiple, 1, 1, u_multiple, z_multiple, w_multiple, 1, multiple)
        written = (x, mask, state, u, z, w, B, d), (MODE, Step(R, block, 1)), aligned
        runtime.run(Launch(kernels.vectors_kernel, -(-B // R), warps, *written))
    return outputs, [state]


# ------------------------------------------------------------------------------------------------
# Backward
# ------------------------------------------------------------------------------------------------


_Incoming = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]
"""Gradients of the alignment term, sigma, u, v, the z and the w; None where nothing comes in."""


def _incoming(grads: Sequence[Tensor | None], wanted: int, k: int) -> _Incoming:
    rest = list(grads)
    alignment = rest.pop(0) if wanted & spec.ANY_ALIGNMENT else None
    sigma = rest.pop(0) if wanted & spec.SIGMA else None
    u = rest.pop(0) if wanted & spec.U else None
    v = rest.pop(0) if wanted & spec.V else None
    vectors = [None if g is None else dense(g) for g in rest]
    number = k if wanted & spec.Z else 0
    return alignment, sigma, None if u is None else dense(u), v, vectors[:number], vectors[number:]


def _gradients(xs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Tensors for the gradients of the embeddings; empty ones where none is asked for."""
    dtype = xs[0].dtype
    # the interpreter rounds to bfloat16 by cutting off
    written = torch.float32 if runtime.INTERPRETED and dtype == torch.bfloat16 else dtype
    found = []
    for x, want in zip(xs, needed, strict=True):
        if want and written == dtype and x.is_contiguous():
            found.append(torch.empty_like(x))  # which takes the host half the time
        else:
            found.append(torch.empty(x.shape if want else 0, dtype=written, device=x.device))
    return found


def _slope(call: _Call, temperature: Tensor, grad: Tensor | None, state: Tensor, mean: bool, here: bool) -> Tensor:
    """∂L/∂τ, or 0 for backward_kernel to write it there, unless it is formed ``here``."""
    _, B, _, _, _, MODE = call
    if grad is None or not MODE.spectrum or (B > 0 and not here):
        return torch.zeros((), dtype=torch.float64, device=temperature.device)
    if B == 0:
        return _nothing(temperature)
    record = MODE.record
    slopes = state[HEAD : HEAD + B * record.size].view(B, record.size)[:, record.slope]
    return (grad.double() * (slopes / state[0] if mean else slopes)).sum()


def backward(
    embeddings: Sequence[Tensor],
    mask: Tensor | None,
    temperature: Tensor | None,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
    state: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor]:
    """As ``reference.spectral_backward``."""
    device = embeddings[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            settings = (mask, temperature, fixed_temperature, normalize, spectrum, wanted)
            return backward(embeddings, *settings, state, grads, needed)
    call = _call(embeddings, normalize, spectrum, wanted)
    found = _gradients(call[0], needed)
    to: Sequence[Tensor | None] = [g if want else None for g, want in zip(found, needed, strict=True)]
    given = any(g is not None for g in grads)
    writes = given and call[1] > 0 and any(needed)
    if not given:  # what is not asked for is not in the records either
        for g in to:
            if g is not None:
                g.zero_()
    incoming = _incoming(grads, wanted, call[2])
    summed, mean = not wanted & spec.ALIGNMENT, wanted & spec.ALIGNMENT_MEAN != 0
    slope = None
    if temperature is not None:
        slope = _slope(call, temperature, incoming[0], state[0], mean, not (summed and writes))
    if writes:
        learned = slope if summed and spectrum and incoming[0] is not None else None
        if mask is not None:
            mask = mask.contiguous()
        _launch_backward(call, mask, state[0], learned, incoming, to, summed, mean)
    for at, (one, x) in enumerate(zip(found, embeddings, strict=True)):
        if one.dtype != x.dtype:
            found[at] = one.to(x.dtype)
    return found if slope is None else [*found, slope]


def _launch_backward(
    call: _Call,
    mask: Tensor | None,
    state: Tensor,
    slope: Tensor | None,
    incoming: _Incoming,
    to: Sequence[Tensor | None],
    summed: bool,
    mean: bool,
) -> None:
    xs, B, _, d, p, MODE = call
    grad_alignment, grad_sigma, grad_u, grad_v, some_z, some_w = incoming
    grad_z, grad_w = filled(some_z), filled(some_w)
    x, multiple = rows(xs, d)
    out, out_multiple = targets(to, d)
    u, z, w, u_multiple, z_multiple, w_multiple = None, None, None, 1, 1, 1
    if grad_u is not None:
        (_, _, strides), u_multiple = rows([grad_u], d)
        u = Values(grad_u, strides)
    if grad_z:
        z, z_multiple = rows(grad_z, d)
    if grad_w:
        w, w_multiple = rows(grad_w, d)
    if multiple == 1:
        u_multiple = z_multiple = w_multiple = out_multiple = 1
    alignment = None
    if grad_alignment is not None:
        alignment = Values(grad_alignment, (0,) if summed else grad_alignment.stride())
    small = Gradients(alignment, values(grad_sigma), values(grad_v))

    simple = grad_sigma is None and grad_v is None and u is None and z is None and w is None
    R, block, warps = p.all_rows, p.all_block if w is None else p.all_others_block, p.all_warps
    resident = not simple and d <= block and MODE.K < 16
    if simple and MODE.K < 16:
        R, block, warps = p.backward_rows, p.backward_block, p.backward_warps
    coefficients = None
    if not simple or p.double_float:
        coefficients = state.new_empty(B * MODE.coefficients.size)
    arguments = (x, mask, state, coefficients, slope, small, u, z, w, out, B, d)
    multiples = (multiple, 1, 1, 1, 1, 1, u_multiple, z_multiple, w_multiple, out_multiple, 1, multiple)
    parameters = (MODE, Step(R, block, p.vector), mean, resident)
    runtime.run(Launch(backward_kernel, -(-B // R), warps, arguments, parameters, multiples))
