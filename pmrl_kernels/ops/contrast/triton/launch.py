"""From tensors to launches: what is allocated, which kernels run, and in what steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import read_temperature
from ...triton import runtime
from ...triton.arguments import Targets, Temperature, bits, dense, rows, targets
from ...triton.runtime import Launch
from .. import spec
from . import kernels
from .kernels import Form, Losses, Sizes, Strip, Sums
from .state import Prepared, kept, prepared, state_size, width_of

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
    depth: int  # columns of rows, or rows of a product, that are loaded at a time
    stages: int = 3  # of which so many are under way, if there is room


@functools.cache
def plan(N: int, itself: bool, architecture: int | str) -> Plan:
    """By the number of columns: tiles as large as leave some 40 of them, of a few pairs. See docs/gpu-notes.md."""
    if runtime.INTERPRETED:  # where a program costs the same whatever it does
        return Plan(512 if N > 1024 else 128 if N > 64 else 32, 4, 8, 64, 32, 64)
    tile = 32
    for larger, beyond in ((64, 448), (128, 1280)) if itself else ((64, 192), (128, 448)):
        if beyond < N:
            tile = larger
    if tile < 128:
        return Plan(tile, 4, 8, 1, 32, depth=64)
    # Registers leave room for one program, so shared memory is all its own. An H200 has room for three loads of 64 KiB;
    # most others have not, and on those of 10.0, where Triton 3.6 keeps a fourth, nobody has tried.
    return Plan(tile, 8, 8, 1, 32, depth=64 if architecture == 90 else 32)


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


class Problem(NamedTuple):
    """The arguments of the operators, see ``spec.PAIRED``."""

    vectors: Sequence[Tensor]
    pairs: Sequence[int]
    directions: Sequence[bool]
    mask: Tensor | None
    everyone: Sequence[Tensor]
    everyone_mask: Tensor | None
    start: int
    temperature: Tensor | None
    fixed_temperature: float

    def columns(self) -> Sequence[Tensor]:
        return self.everyone or self.vectors


class Geometry(NamedTuple):
    """What follows from shapes and settings, for both passes."""

    pairs: int
    k: int
    form: Form
    plan: Plan
    sizes: Sizes
    width: int
    layout: Prepared  # without its buffer
    numbers: int  # of that
    kept: bool  # whether it is in the state

    def tiles_of(self, strip: Strip) -> int:
        """Of a job, in a strip."""
        height, tiles = strip.height, self.sizes.tiles
        if self.form.itself and not self.form.rows_only:
            return height * (height + 1) // 2 + height * (tiles - strip.first - height)
        return height * tiles

    def strips(self, height: int) -> list[Strip]:
        """Of so many rows of tiles; one without any for a process that has no rows."""
        tiles = -(-self.sizes.rows // self.plan.tile)
        return [Strip(first, min(height, tiles - first)) for first in range(0, max(1, tiles), height)]

    def ways(self) -> int:
        return self.pairs * (1 if self.form.itself else 2)

    def chooser(self, way: int) -> int:
        """The vector whose rows choose in a way."""
        if self.form.itself:
            return 0
        pair, direction = divmod(way, 2)
        if self.form.star:
            return 0 if direction else pair + 1
        if not self.form.clique:
            return self.k * direction + pair
        high = 1
        while high * (high + 1) // 2 <= pair:
            high += 1
        return high if direction else pair - high * (high - 1) // 2


@functools.lru_cache(1024)
def _geometry(
    pairs: tuple[int, ...], directions: tuple[bool, ...], n: int, N: int, d: int, start: int, gathered: bool,
    exact: bool, p: Plan
) -> Geometry:  # fmt: skip
    found = form(pairs, directions)
    if found is None:
        raise NotImplementedError(f"pairs: got {pairs} with directions {directions}, wanted those of {spec.NAMES}")
    k, itself, star, clique = found
    V, count, tiles = len(directions), len(pairs) // 2, -(-N // p.tile)
    padded, blocks = kept(V, N, d, count, gathered)
    is_kept = padded > 0
    if not is_kept:
        padded, blocks = (tiles + gathered) * p.tile, 2 * count * tiles  # tiles of rows begin where this process's do
    kind, sizes = Form(itself, star, clique, gathered, exact), Sizes(n, N, start, padded, tiles)
    layout, numbers = prepared(None, V, padded, N, d, count, blocks)
    return Geometry(count, k, kind, p, sizes, width_of(d), layout, numbers, is_kept)


def geometry(problem: Problem) -> Geometry:
    columns = problem.columns()
    (N, d), n = columns[0].shape, problem.vectors[0].shape[0]
    gathered = bool(problem.everyone)
    pairs, directions = tuple(problem.pairs), tuple(problem.directions)
    p = plan(N, pairs == (0, 0), runtime.architecture(columns[0].device.index))
    return _geometry(pairs, directions, n, N, d, problem.start, gathered, exact(), p)


def _prepare(call: Geometry, problem: Problem, state: Tensor) -> Prepared:
    """The rows in fp16, and what is there: in the state, if that keeps them."""
    columns = [dense(x) for x in problem.columns()]
    present = problem.everyone_mask if problem.everyone else problem.mask
    sizes, width, d, first = call.sizes, call.width, columns[0].shape[1], columns[0]
    buffer = state if call.kept else torch.empty(call.numbers, dtype=torch.float64, device=first.device)
    made = call.layout._replace(buffer=buffer)
    x, multiple = rows(columns, d)
    masked = 0
    if present is not None:
        present, masked = present.contiguous(), present.shape[1]
    counters, block = 1 + call.ways() * sizes.tiles, 64 if width % 128 else 128 if width % 256 else 256
    arguments = (x, present, made, counters, d, call.k, call.pairs, width, sizes)
    multiples = (multiple, 1, 2, 1, multiple, 1, 1, 64, 1)
    parameters = (masked, tuple(problem.directions), call.form, call.plan.rows, block)
    varies = (first.dtype, None if present is None else present.dtype)
    programs = -(-sizes.padded // call.plan.rows)
    _run(kernels.prepare_kernel, programs, 1, arguments, multiples, parameters, varies)
    return made


def _run(
    kernel: Any,
    programs: int,
    warps: int,
    arguments: Any,
    multiples: Any,
    parameters: Any,
    varies: tuple[Any, ...],
    stages: tuple[int, int] = (0, 0),
) -> None:
    runtime.run(Launch(kernel, programs, warps, arguments, parameters, multiples, stages=stages, varies=varies))


def _stages(call: Geometry, columns: int) -> tuple[int, int]:
    """Loads under way, of the operands of a tile with so many columns, and their bytes."""
    p, exact = call.plan, call.form.exact
    # Of one product half the bytes are loaded; two more are under way where a program has the memory to itself.
    more = 0 if exact or p.tile < 128 else 2
    return p.stages + more, (2 if exact else 1) * (p.tile + columns) * p.depth * 2


def _nothing(problem: Problem) -> Tensor:
    """What is made of no pair, 0-d float64: 0, but a bad temperature shows there too."""
    tau = read_temperature(problem.temperature, problem.fixed_temperature, contrast=True)
    return torch.zeros((), dtype=torch.float64, device=problem.vectors[0].device) * (tau / tau)


def _elsewhere(x: Tensor) -> bool:
    """Whether it is on another device than the current one."""
    return x.device.type == "cuda" and x.device.index != torch.cuda.current_device()


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's; the state is what the mean was divided by, and of a small batch what is prepared."""
    problem = Problem(*arguments)
    first, columns = problem.vectors[0], problem.columns()
    if _elsewhere(first):
        with torch.cuda.device(first.device):
            return forward(*arguments)
    device, count = first.device, len(problem.pairs) // 2
    N, d = columns[0].shape
    losses = torch.empty(spec.losses_shape(problem.vectors, problem.pairs), dtype=torch.float64, device=device)
    size = state_size(len(columns), N, d, count, bool(problem.everyone))
    state = torch.empty(size, dtype=torch.float64, device=device)
    if not problem.pairs or N == 0:
        return _nothing(problem).to(first.dtype), losses, state.fill_(1.0)
    call = geometry(problem)
    made = _prepare(call, problem, state)
    kind, p, sizes = call.form, call.plan, call.sizes
    ways, tile = 1 if kind.itself else 2, p.tile
    jobs = call.pairs * (ways if kind.rows_only else 1)
    strips = call.strips(max(1, ROOM // (2 * jobs * sizes.tiles * tile)))
    at_once = len(strips) == 1 and not kind.rows_only
    per_loss = sizes.tiles if at_once else -(-sizes.columns // p.finish)
    programs = ways * call.pairs * per_loss
    room = -(-jobs * sizes.tiles * strips[0].height * tile // 4) * 2  # numbers of 64 bits, for sums of one kind
    end = room * (1 if kind.rows_only else 2)
    sums = Sums(torch.empty(end + 2 * programs, dtype=torch.float64, device=device), 0, room, end)
    tau = Temperature(problem.temperature, bits(problem.fixed_temperature))
    found = Losses(losses, first.new_empty(()), state)
    varies = (first.dtype, None if tau.pointer is None else tau.pointer.dtype, at_once)
    for at, strip in enumerate(strips):
        per_job = call.tiles_of(strip)
        if strip.height > 0:
            tensors = (made, tau, sums, found if at_once else None)
            _run(
                kernels.similar_kernel, jobs * per_job, p.warps,
                (*tensors, call.k, call.pairs, per_job, call.width, sizes, strip), (2, 1, 2, 1, 1, 1, 1, 64, 1, 1),
                (kind, tile, p.depth, p.group, BATCH), varies, _stages(call, tile),
            )  # fmt: skip
        if not at_once:
            numbers = (call.pairs, per_loss, int(at > 0), int(at + 1 < len(strips)), sizes, strip)
            _run(
                kernels.finish_kernel, programs, 1, (made, tau, sums, found, *numbers), (2, 1, 2, *(1,) * 7),
                (kind, tile, p.finish, BATCH), varies,
            )  # fmt: skip
    return found.loss, losses, state


class Pass(NamedTuple):
    """What all launches of a backward pass take."""

    call: Geometry
    made: Prepared
    tau: Temperature
    losses: Tensor
    state: Tensor
    grad: Tensor
    h: Targets
    multiple: int  # of their rows
    slopes: list[Tensor]  # found so far

    def varies(self) -> tuple[Any, ...]:
        return self.h.pointer.dtype, self.grad.dtype, None if self.tau.pointer is None else self.tau.pointer.dtype


def backward(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    """As the reference's."""
    *of_problem, losses, state, grad = arguments
    problem = Problem(*of_problem)
    first, temperature = problem.vectors[0], problem.temperature
    if _elsewhere(first):
        with torch.cuda.device(first.device):
            return backward(*arguments)
    device = first.device
    found = [torch.empty(x.shape, dtype=torch.float32, device=device) for x in problem.vectors]
    if not problem.pairs or first.shape[0] == 0:
        tau = read_temperature(temperature, problem.fixed_temperature, contrast=True)
        slope = torch.zeros((), dtype=torch.float64, device=device)
        return [x.zero_() for x in found], slope * (grad.double() / state[0] / tau)
    call = geometry(problem)
    if state.data_ptr() % 16:  # whoever kept it in the meantime need not know of that
        state = state.clone()
    made = call.layout._replace(buffer=state) if call.kept else _prepare(call, problem, state)
    h, multiple = targets(found, first.shape[1])
    fixed = Temperature(temperature, bits(problem.fixed_temperature))
    step = Pass(call, made, fixed, losses.contiguous(), state, grad, h, multiple, [])
    tile, sizes, ways = call.plan.tile, call.sizes, call.ways()
    rows_of_tiles, length = -(-sizes.rows // tile), sizes.tiles * tile  # and numbers of a row of weights
    if call.pairs * rows_of_tiles * tile * length <= ROOM:
        strip = Strip(0, rows_of_tiles)
        _product(step, strip, _weights(step, strip, 0, ways if call.form.rows_only else call.pairs), all_of=len(found))
    else:
        step = step._replace(call=call._replace(form=call.form._replace(rows_only=True)))
        height = max(ROOM // (tile * length), min(RESIDENT // tile, 4 * ROOM // (tile * length)), 1)
        of = [call.chooser(way) for way in range(ways)]
        for way, vector in enumerate(of):
            before, after = vector in of[:way], vector in of[way + 1 :]
            for strip in call.strips(height):
                weights = _weights(step, strip, way, 1)
                _product(step, strip, weights, vector=vector, way=way, added=before, more=after)
                del weights
    if temperature is None:
        return found, torch.zeros((), dtype=torch.float64, device=device)
    tau, slopes = read_temperature(temperature, 0.0, contrast=True), step.slopes
    slope = torch.stack([x.sum() for x in slopes]).sum() if len(slopes) > 1 else slopes[0].sum()
    return found, -slope * (grad.double() / state[0] / tau / tau)


def _weights(step: Pass, strip: Strip, first_job: int, jobs: int) -> tuple[Tensor, Tensor]:
    """The weights of a strip, and their scales."""
    call = step.call
    kind, p, sizes, device = call.form, call.plan, call.sizes, step.losses.device
    both = 1 if kind.itself or kind.rows_only else 2
    planes = (jobs * both, 2 if kind.exact else 1, strip.height * p.tile, sizes.tiles * p.tile)
    weights = torch.empty(planes, dtype=torch.float16, device=device)
    scales = torch.empty((jobs * both, strip.height, sizes.tiles), dtype=torch.float32, device=device)
    per_job, slope = call.tiles_of(strip), None
    if step.tau.pointer is not None:
        slope = torch.empty(jobs * per_job, dtype=torch.float64, device=device)
        step.slopes.append(slope)
    values = (step.made, step.tau, step.losses, weights, scales, slope)
    numbers = (call.k, call.pairs, first_job, per_job, call.width, sizes, strip)
    multiples = (2, 1, 1, 8, 1, 1, 1, 1, 1, 1, 64, 1, 1)
    parameters, arguments = (kind, p.tile, p.depth, p.group), (*values, *numbers)
    varies = step.varies()[-1:]
    stages = _stages(call, p.tile)
    _run(kernels.weights_kernel, jobs * per_job, p.warps, arguments, multiples, parameters, varies, stages)
    return weights, scales


def _product(
    step: Pass,
    strip: Strip,
    weights: tuple[Tensor, Tensor],
    all_of: int = 0,
    vector: int = 0,
    way: int = 0,
    added: bool = False,
    more: bool = False,
) -> None:
    """Gradients of all vectors, so many, from the weights of all ways; or of one, from those of one way."""
    call, h = step.call, step.h
    kind, p, d = call.form, call.plan, h.stride
    columns = 128 if p.tile == 128 and call.width % 128 == 0 else 64
    blocks = call.width // columns
    values = (*weights, step.made, step.losses, step.grad, step.state, step.tau, h)
    numbers = (call.k, call.pairs, vector, way, int(added), int(more), blocks, d, call.width, call.sizes, strip)
    multiples = (8, 1, 2, 1, 1, 1, 1, step.multiple, 1, 1, 1, 1, 1, 1, 1, step.multiple, 64, 1, 1)
    parameters, arguments = (kind, all_of > 0, p.tile, columns, min(p.depth, p.tile)), (*values, *numbers)
    varies = (len(h.offsets), *step.varies())
    programs = max(1, all_of) * strip.height * blocks
    stages = _stages(call, columns)
    _run(kernels.product_kernel, programs, p.warps, arguments, multiples, parameters, varies, stages)
