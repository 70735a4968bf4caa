"""From tensors to launches: what is allocated, which kernels run, and in what steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import read_temperature
from ...triton import runtime
from ...triton.arguments import Targets, Temperature, bits, dense, rows, targets
from ...triton.runtime import Launch
from .. import spec
from . import kernels
from .kernels import Form, Losses, Sizes, Strip
from .state import kept, state_size, width_of

ROOM = 1 << 26
"""Numbers of 32 bits that there are of pairs of rows at a time, at most: weights of one way of all pairs, in two parts
of fp16 each, and sums by tiles. What needs more goes by strips of rows."""

RESIDENT = 4224
"""Rows of weights that keep the multiprocessors of an H200 busy, by 33 tiles of 128 and four blocks of columns each.
Where not even those of one way fit ``ROOM``, strips have so many, within four times as much."""

BATCH = 256  # numbers that the last step of a sum takes at a time


class Plan(NamedTuple):
    """Launch parameters."""

    tile: int  # rows and columns of a tile of similarities
    warps: int
    group: int  # tiles whose rows, and then whose columns, stay in cache
    rows: int  # of a program of prepare_kernel
    finish: int  # rows of a program of finish_kernel


@functools.cache
def plan(N: int) -> Plan:
    """By the number of columns. See docs/gpu-notes.md."""
    if runtime.INTERPRETED:  # where a program costs the same whatever it does
        return Plan(512 if N > 1024 else 128 if N > 64 else 32, 4, 8, 64, 32)
    tile = 128 if N > 1536 else 64 if N > 512 else 32
    return Plan(tile, 8 if tile == 128 else 4, 8, 1, 32)


def exact() -> bool:
    """Whether products of float32 matrices are to be as exact as float32, by PyTorch's settings."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the newer settings were used, which the older ones have no word for
        return torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")


@functools.cache
def form(pairs: tuple[int, ...], directions: tuple[bool, ...]) -> tuple[int, bool, bool, bool] | None:
    """k, and whether that is one vector with itself, a star, a clique, see ``Form``; None for other lists of pairs."""
    V = len(directions)
    if pairs == (0, 0) and directions == (True,):
        return 1, True, False, False
    for name, k in (("modality", V - 1), ("leave_one_out", V // 2), ("pairs", V)):
        if k < 1:
            continue
        kind = spec.kind(name, k)
        if (kind.pairs, kind.directions) == (pairs, directions):
            return k, False, name == "modality", name == "pairs"
    return None


class Call(NamedTuple):
    """What both passes make of their arguments."""

    pairs: int
    k: int
    form: Form
    plan: Plan
    sizes: Sizes
    width: int
    tau: Temperature
    parts: Tensor
    flags: Tensor
    positives: Tensor


def _call(
    state: Tensor | None,
    vectors: Sequence[Tensor],
    pairs: Sequence[int],
    directions: Sequence[bool],
    everyone: Sequence[Tensor],
    start: int,
    temperature: Tensor | None,
    fixed_temperature: float,
) -> tuple[Call, bool]:
    """And whether its parts, positives and flags are in the state."""
    found = form(tuple(pairs), tuple(directions))
    if found is None:
        raise NotImplementedError(f"pairs: got {pairs} with directions {directions}, wanted those of {spec.NAMES}")
    k, itself, star, clique = found
    xs = everyone or vectors
    V, (N, d), n, count = len(xs), xs[0].shape, vectors[0].shape[0], len(pairs) // 2
    p, gathered = plan(N), bool(everyone)
    tiles, width = -(-N // p.tile), width_of(d)
    padded, *sizes = kept(V, N, d, count, gathered)
    keeps, device = padded > 0 and state is not None, xs[0].device
    if state is not None and keeps:
        parts, positives, flags = state[2:].split(sizes)
        parts, positives, flags = parts.view(torch.float16), positives.view(torch.float32), flags.view(torch.int8)
    else:
        padded = (tiles + gathered) * p.tile  # tiles of rows begin where this process's do
        parts = torch.empty(V * 3 * padded * width, dtype=torch.float16, device=device)
        positives = torch.empty(count * N, dtype=torch.float32, device=device)
        flags = torch.empty(count * N, dtype=torch.int8, device=device)
    kind = Form(itself, star, clique, gathered, exact())
    tau = Temperature(temperature, bits(fixed_temperature))
    return Call(count, k, kind, p, Sizes(n, N, start, padded, tiles), width, tau, parts, flags, positives), keeps


def _prepare(
    call: Call,
    vectors: Sequence[Tensor],
    directions: Sequence[bool],
    mask: Tensor | None,
    everyone: Sequence[Tensor],
    everyone_mask: Tensor | None,
) -> Tensor:
    """The rows in fp16, and what is there; returns the counters of ``Losses``."""
    xs, present = (everyone, everyone_mask) if everyone else (vectors, mask)
    xs = [dense(x) for x in xs]
    p, sizes, width, d = call.plan, call.sizes, call.width, xs[0].shape[1]
    there = torch.empty((len(xs), sizes.columns), dtype=torch.int8, device=xs[0].device)
    counters = 1 + call.pairs * sizes.tiles * (1 if call.form.itself else 2)
    counter = torch.empty(counters, dtype=torch.int32, device=xs[0].device)
    x, multiple = rows(xs, d)
    masked = 0
    if present is not None:
        present, masked = present.contiguous(), present.shape[1]
    block = 64 if width % 128 else 128 if width % 256 else 256
    numbers = (counters, d, call.k, call.pairs, width, sizes)
    arguments = (x, present, call.parts, there, call.flags, call.positives, counter, *numbers)
    multiples = (multiple, 1, 8, 1, 1, 1, 1, 1, multiple, 1, 1, 64, 1)
    parameters = (masked, tuple(directions), call.form, p.rows, block)
    runtime.run(Launch(kernels.prepare_kernel, -(-sizes.padded // p.rows), 1, arguments, parameters, multiples))
    return counter


def _tiles_of(call: Call, strip: Strip) -> int:
    """Of a job, in a strip."""
    height, tiles = strip.height, call.sizes.tiles
    if call.form.itself and not call.form.rows_only:
        return height * (height + 1) // 2 + height * (tiles - strip.first - height)
    return height * tiles


def _strips(call: Call, height: int) -> list[Strip]:
    """Of so many rows of tiles; one without any for a process that has no rows."""
    tiles = -(-call.sizes.rows // call.plan.tile)
    return [Strip(first, min(height, tiles - first)) for first in range(0, max(1, tiles), height)]


def _nothing(temperature: Tensor | None, fixed_temperature: float, device: torch.device) -> Tensor:
    """What is made of no pair, 0-d float64: 0, but a bad temperature shows there too."""
    tau = read_temperature(temperature, fixed_temperature, contrast=True)
    return torch.zeros((), dtype=torch.float64, device=device) * (tau / tau)


def forward(
    vectors: Sequence[Tensor],
    pairs: Sequence[int],
    directions: Sequence[bool],
    mask: Tensor | None,
    everyone: Sequence[Tensor],
    everyone_mask: Tensor | None,
    start: int,
    temperature: Tensor | None,
    fixed_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's; the state is what the mean was divided by, and of a small batch what ``kept`` says."""
    first = vectors[0]
    if first.device.type == "cuda" and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return forward(
                vectors, pairs, directions, mask, everyone, everyone_mask, start, temperature, fixed_temperature
            )
    losses = torch.empty(spec.losses_shape(vectors, pairs), dtype=torch.float64, device=first.device)
    others = everyone or vectors
    N, d = others[0].shape
    size = state_size(len(others), N, d, len(pairs) // 2, bool(everyone))
    state = torch.empty(size, dtype=torch.float64, device=first.device)
    if not pairs or (not everyone and first.shape[0] == 0):
        return _nothing(temperature, fixed_temperature, first.device).to(first.dtype), losses, state.fill_(1.0)
    call, _ = _call(state, vectors, pairs, directions, everyone, start, temperature, fixed_temperature)
    counter = _prepare(call, vectors, directions, mask, everyone, everyone_mask)
    kind, p, sizes = call.form, call.plan, call.sizes
    device, tile = first.device, p.tile
    ways = 1 if kind.itself else 2
    jobs = call.pairs * (ways if kind.rows_only else 1)
    height = max(1, ROOM // (2 * jobs * sizes.tiles * tile))
    strips = _strips(call, height)
    height = strips[0].height
    shape = jobs, sizes.tiles, height * tile
    row_sums = torch.empty(shape, dtype=torch.float32, device=device)
    column_sums = None if kind.rows_only else torch.empty(shape, dtype=torch.float32, device=device)
    at_once = len(strips) == 1 and not kind.rows_only
    per_loss = sizes.tiles if at_once else -(-sizes.columns // p.finish)
    programs = ways * call.pairs * per_loss
    partial = torch.empty(2 * programs, dtype=torch.float64, device=device)
    found = Losses(losses, first.new_empty(()), state, partial, counter)
    for at, strip in enumerate(strips):
        per_job = _tiles_of(call, strip)
        tensors = (call.parts, call.flags, call.positives, call.tau, row_sums, column_sums)
        values = (*tensors, found if at_once else None, call.k, call.pairs, per_job, call.width, sizes, strip)
        multiples = (8, 1, 1, 1, 4, 4, 1, 1, 1, 1, 64, 1, 1)
        parameters = (kind, tile, 64, p.group, BATCH)
        if strip.height > 0:
            runtime.run(Launch(kernels.similar_kernel, jobs * per_job, p.warps, values, parameters, multiples))
        if not at_once:
            sums = (row_sums, column_sums, call.flags, call.positives, call.tau, found)
            numbers = (call.pairs, per_loss, int(at > 0), int(at + 1 < len(strips)), sizes, strip)
            last = (kind, tile, p.finish, BATCH)
            runtime.run(Launch(kernels.finish_kernel, programs, 1, (*sums, *numbers), last, (1,) * 12))
    return found.loss, losses, state


def _chooser(call: Call, way: int) -> int:
    """The vector whose rows choose in a way."""
    pair, direction = (way, 0) if call.form.itself else divmod(way, 2)
    if call.form.itself:
        return 0
    if call.form.star:
        return 0 if direction else pair + 1
    if not call.form.clique:
        return call.k * direction + pair
    high = 1
    while high * (high + 1) // 2 <= pair:
        high += 1
    return high if direction else pair - high * (high - 1) // 2


def backward(
    vectors: Sequence[Tensor],
    pairs: Sequence[int],
    directions: Sequence[bool],
    mask: Tensor | None,
    everyone: Sequence[Tensor],
    everyone_mask: Tensor | None,
    start: int,
    temperature: Tensor | None,
    fixed_temperature: float,
    losses: Tensor,
    state: Tensor,
    grad: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """As the reference's."""
    first = vectors[0]
    arguments = vectors, pairs, directions, mask, everyone, everyone_mask, start, temperature, fixed_temperature
    if first.device.type == "cuda" and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return backward(*arguments, losses, state, grad)
    found = [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in vectors]
    if not pairs or first.shape[0] == 0:
        tau = read_temperature(temperature, fixed_temperature, contrast=True)
        slope = torch.zeros((), dtype=torch.float64, device=first.device)
        return [x.zero_() for x in found], slope * (grad.double() / state[0] / tau)
    call, is_kept = _call(state, vectors, pairs, directions, everyone, start, temperature, fixed_temperature)
    if not is_kept:
        _prepare(call, vectors, directions, mask, everyone, everyone_mask)
    kind, p, sizes = call.form, call.plan, call.sizes
    losses = losses.contiguous()
    ways = call.pairs * (1 if kind.itself else 2)
    h, multiple = targets(found, first.shape[1])
    product = functools.partial(_product, losses=losses, state=state, grad=grad, h=h, multiple=multiple)
    rows, length = -(-sizes.rows // p.tile), sizes.tiles * p.tile  # in tiles, and numbers of a row of weights
    slopes: list[Tensor] = []
    if call.pairs * rows * p.tile * length <= ROOM:
        strip = Strip(0, rows)
        weights = _weights(call, strip, losses, 0, ways if kind.rows_only else call.pairs, temperature, slopes)
        product(call, strip, weights, all_of=len(found))
    else:
        call = call._replace(form=kind._replace(rows_only=True))
        height = max(ROOM // (p.tile * length), min(RESIDENT // p.tile, 4 * ROOM // (p.tile * length)), 1)
        of = [_chooser(call, way) for way in range(ways)]
        for way, vector in enumerate(of):
            for strip in _strips(call, height):
                weights = _weights(call, strip, losses, way, 1, temperature, slopes)
                product(
                    call, strip, weights, vector=vector, way=way, added=vector in of[:way], more=vector in of[way + 1 :]
                )
                del weights
    if temperature is None:
        return found, torch.zeros((), dtype=torch.float64, device=first.device)
    tau = read_temperature(temperature, 0.0, contrast=True)
    slope = torch.stack([x.sum() for x in slopes]).sum() if len(slopes) > 1 else slopes[0].sum()
    return found, -slope * (grad.double() / state[0] / tau / tau)


def _weights(
    call: Call,
    strip: Strip,
    losses: Tensor,
    first_job: int,
    jobs: int,
    temperature: Tensor | None,
    slopes: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The weights of a strip, and their scales."""
    kind, p, sizes = call.form, call.plan, call.sizes
    device = losses.device
    both = 1 if kind.itself or kind.rows_only else 2
    planes = (jobs * both, 2 if kind.exact else 1, strip.height * p.tile, sizes.tiles * p.tile)
    weights = torch.empty(planes, dtype=torch.float16, device=device)
    scales = torch.empty((jobs * both, strip.height, sizes.tiles), dtype=torch.float32, device=device)
    per_job = _tiles_of(call, strip)
    slope = None
    if temperature is not None:
        slope = torch.empty(jobs * per_job, dtype=torch.float64, device=device)
        slopes.append(slope)
    values = (call.parts, call.flags, call.positives, call.tau, losses, weights, scales, slope)
    numbers = (call.k, call.pairs, first_job, per_job, call.width, sizes, strip)
    multiples = (8, 1, 1, 1, 1, 8, 1, 1, 1, 1, 1, 1, 64, 1, 1)
    parameters = (kind, p.tile, 64, p.group)
    runtime.run(Launch(kernels.weights_kernel, jobs * per_job, p.warps, (*values, *numbers), parameters, multiples))
    return weights, scales


def _product(
    call: Call,
    strip: Strip,
    weights: tuple[Tensor, Tensor],
    losses: Tensor,
    state: Tensor,
    grad: Tensor,
    h: Targets,
    multiple: int,
    all_of: int = 0,
    vector: int = 0,
    way: int = 0,
    added: bool = False,
    more: bool = False,
) -> None:
    """Gradients of all vectors, so many, from the weights of all ways; or of one, from those of one way."""
    kind, p, d = call.form, call.plan, h.stride
    columns = 128 if p.tile == 128 and call.width % 128 == 0 else 64
    blocks = call.width // columns
    values = (*weights, call.parts, call.flags, losses, grad, state, call.tau, h)
    numbers = (call.k, call.pairs, vector, way, int(added), int(more), blocks, d, call.width, call.sizes, strip)
    multiples = (8, 1, 8, 1, 1, 1, 1, 1, multiple, 1, 1, 1, 1, 1, 1, 1, multiple, 64, 1, 1)
    parameters = (kind, all_of > 0, p.tile, columns, min(64, p.tile))
    programs = max(1, all_of) * strip.height * blocks
    runtime.run(Launch(kernels.product_kernel, programs, p.warps, (*values, *numbers), parameters, multiples))
