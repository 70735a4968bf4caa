"""From tensors to launches: what is allocated, which kernels run, and how they were compiled.

Kernels are compiled through ``triton.compile`` from explicit signatures, and launched by the compiled function
itself: what runs is what tests/data/resources.py compiles ahead of time, and a launch costs the host a few
microseconds instead of the tens that binding and specialising arguments takes each time.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import constants
from . import kernels
from .eigen import next_power_of_two
from .kspace import draft_size, field, layout, record_size

INTERPRETED = triton.knobs.runtime.interpret

HEAD = kernels.HEAD.value
_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
_SHORT = frozenset(("B", "d", "values_wanted"))  # arguments that are int32; other integers are int64


class Plan(NamedTuple):
    """Launch parameters. See ``plan``."""

    K: int  # lanes of an instance, in tiles
    latency: bool  # forward_kernel; else gram, solve and vectors one after the other
    lanes: bool  # the solve takes an instance per lane; else K lanes for each
    solve_instances: int  # of a program of solve_kernel
    solve_part: int  # of these, how many go through the k-space algebra at a time
    solve_warps: int
    stream_rows: int  # instances of a program of the other kernels
    stream_warps: int
    block: int  # columns taken at a time by these
    latency_rows: int  # instances of a program of forward_kernel, and of the backward pass of u₁ and z
    latency_block: int  # columns taken at a time by these
    latency_warps: int
    vector: int  # elements in 16 bytes
    record: int  # numbers of an instance's record
    draft: int
    pairs: bool  # sums in pairs of float32


LATENCY_BATCH = 1024
"""Up to this B one program per instance has the lower latency; beyond, the solve is better spread over lanes."""

BATCH = 256  # numbers that the last step of a sum over the batch takes at a time
SHARE = 1024  # instances whose terms one program of reduce_kernel adds up, a multiple of BATCH


@functools.cache
def plan(k: int, d: int, small: bool, itemsize: int, slow_float64: bool) -> Plan:
    """The static table of launch parameters, by what a batch is."""
    K = next_power_of_two(k)
    pairs = slow_float64 and itemsize <= 4 and K < 16
    # A pair's product is ten instructions, and what Triton takes to compile grows with their number.
    vector = 1 if pairs else 16 // itemsize
    wide = next_power_of_two(d)
    lanes = k <= 6
    return Plan(
        K=K,
        latency=small or K >= 16,
        lanes=lanes,
        solve_instances=32 if lanes else 4,
        solve_part={2: 32, 4: 8, 8: 2}.get(K, 1),
        solve_warps=1,
        stream_rows=1 if pairs else 16,
        stream_warps=1 if pairs else 4,
        block=32 if pairs else max(min(8 * vector, wide), vector),
        latency_rows=4 if INTERPRETED and K < 16 and not pairs else 1,  # which costs the interpreter no more than 1
        latency_block=32 if K >= 16 or pairs else max(min(32 * vector, wide), vector),
        latency_warps=4 if K >= 16 else 1,
        vector=vector,
        record=record_size(k),
        draft=draft_size(k),
        pairs=pairs,
    )


_FAST_FLOAT64 = frozenset((60, 70, 80, 90, 100, "gfx906", "gfx908", "gfx90a", "gfx940", "gfx941", "gfx942", "gfx950"))


def slow_float64(target: GPUTarget) -> bool:
    """Whether float64 arithmetic would hold the memory up there; data-centre cards have it at half the rate."""
    return target.arch not in _FAST_FLOAT64


SUMS = os.environ.get("PMRL_KERNELS_SUMS") or None
"""How dot products of embeddings of up to 32 bits are summed: "float64", "float32" (in pairs), or by the card."""


@functools.cache
def _in_pairs(index: int | None, sums: str | None) -> bool:
    if sums is not None and sums not in constants.SUMS:
        raise ValueError(f"environment variable PMRL_KERNELS_SUMS: got {sums!r}, wanted 'float64' or 'float32'")
    if sums is not None:
        return sums == "float32"
    return index is not None and slow_float64(triton.runtime.driver.active.get_current_target())


# ------------------------------------------------------------------------------------------------
# Compiling and launching
# ------------------------------------------------------------------------------------------------


class Compilation(NamedTuple):
    """All that a compiled kernel follows from, but for the kernel and the target: ``compile_for`` sees nothing else.

    So it is the key of what was compiled, too, and no parameter can be missing from that.
    """

    kinds: tuple[Any, ...]  # of the values, see ``_kinds``
    parameters: tuple[Any, ...]  # known when a kernel is compiled
    divisible: tuple[tuple[str, int], ...]  # which values are multiples of what
    warps: int


def _kinds(values: Sequence[Any]) -> tuple[Any, ...]:
    """Of each value, what is compiled for it: a tensor's dtype, ``int``, None, or a tuple of these."""
    kinds: list[Any] = []
    for value in values:
        if value is None:
            kinds.append(None)
        elif type(value) is int:
            kinds.append(int)
        elif isinstance(value, tuple):  # of numbers
            kinds.append(_kinds(value) if None in value else (int,) * len(value))
        else:
            kinds.append(value.dtype)
    return tuple(kinds)


def _type(kind: Any, name: str) -> Any:
    if isinstance(kind, tuple):
        return tuple(_type(part, name) for part in kind)
    if kind is int:
        return "i32" if name in _SHORT else "i64"
    return "constexpr" if kind is None else _TYPES[kind]


def _source(kernel: Any, compilation: Compilation) -> ASTSource:
    """Arguments in order, first the values, then what is known when a kernel is compiled."""
    kinds, parameters, divisible = compilation.kinds, compilation.parameters, dict(compilation.divisible)
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for at, (name, kind) in enumerate(zip(kernel.arg_names, (*kinds, *parameters), strict=True)):
        if at >= len(kinds):
            signature[name] = "constexpr"
            constexprs[(at,)] = kind
            continue
        signature[name] = _type(kind, name)
        for part, one in enumerate(kind) if isinstance(kind, tuple) else ((None, kind),):
            path = (at,) if part is None else (at, part)
            if one is None:
                constexprs[path] = None
            elif name in divisible:
                attributes[path] = [["tt.divisibility", divisible[name]]]
    return ASTSource(kernel, signature, constexprs, attributes)


def compile_for(target: GPUTarget, kernel: Any, compilation: Compilation) -> Any:
    """The compiled kernel; needs no GPU. Multiplications and additions are fused, whatever Triton's default is."""
    options = {"num_warps": compilation.warps, "enable_fp_fusion": True}
    if target.backend == "cuda":  # left alone, ptxas spills a few registers to make room for more warps
        options["maxnreg"] = min(255, 65536 // (32 * compilation.warps))
    return triton.compile(_source(kernel, compilation), target=target, options=options)


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    programs: int
    warps: int
    values: tuple[Any, ...]
    parameters: tuple[Any, ...]
    divisible: dict[str, int]

    def compilation(self) -> Compilation:
        return Compilation(_kinds(self.values), self.parameters, tuple(self.divisible.items()), self.warps)


_compiled: dict[tuple[Any, int, Compilation], Any] = {}


def run(launch: Launch) -> None:
    kernel, programs, _, values, parameters, _ = launch
    if INTERPRETED:
        kernel[(programs,)](*values, *parameters)
        return
    index = torch.cuda.current_device()
    key = (kernel, index, launch.compilation())
    compiled = _compiled.get(key)
    if compiled is None:
        if torch.cuda.is_current_stream_capturing():  # a kernel is loaded, which ends a capture with an obscure error
            raise RuntimeError(
                f"pmrl_kernels: {kernel.fn.__name__} is not compiled for such a call yet, and cannot be while a CUDA "
                "graph is captured; call pmrl_kernels.warm_up, or the same function on such embeddings, before that"
            )
        target = triton.runtime.driver.active.get_current_target()
        compiled = _compiled[key] = compile_for(target, *key[::2])
    compiled[(programs, 1, 1)](*values, *parameters, stream=torch._C._cuda_getCurrentRawStream(index))


class _Rows(NamedTuple):
    """The k embeddings of a batch (or k tensors like them), as kernels take them."""

    first: Tensor
    offsets: tuple[int, ...]
    strides: tuple[int, ...]
    divisible: int  # offsets, strides and d are multiples of this


def _dense(x: Tensor) -> Tensor:
    """With the last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(tensors: Sequence[Tensor], d: int) -> _Rows:
    """k tensors (B, d), or one (B, k, d)."""
    first = tensors[0]
    size = first.element_size()
    together = d * size  # a multiple of 16 if all steps and addresses are
    if first.dim() == 3:
        stride, step, _ = first.stride()
        offsets = tuple(range(0, first.shape[1] * step, step)) if step else (0,) * first.shape[1]
        strides = (stride,) * first.shape[1]
        together |= first.data_ptr() | step * size | stride * size
    else:
        addresses = [x.data_ptr() for x in tensors]
        start = addresses[0]
        offsets = tuple([(address - start) // size for address in addresses])
        strides = tuple([x.stride(0) for x in tensors])
        for address in addresses:
            together |= address
        for stride in strides:
            together |= stride * size
    return _Rows(first, offsets, strides, 1 if together % 16 else 16 // size)


def _canonical(embeddings: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of one dtype, with contiguous rows. Mixed dtypes are made one by a copy."""
    dtype = embeddings[0].dtype
    for x in embeddings:
        if x.dtype != dtype or x.stride(-1) != 1:
            break
    else:
        return embeddings
    for x in embeddings:
        dtype = torch.promote_types(dtype, x.dtype)
    return [_dense(x.to(dtype)) for x in embeddings]


def _nothing(temperature: Tensor) -> Tensor:
    """What a sum over no instances is: 0, but a bad temperature shows there too."""
    return torch.where((temperature > 0) & temperature.isfinite(), 0.0, torch.nan).double()


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]  # type: ignore[no-any-return]


def _divisible(rows: _Rows) -> dict[str, int]:
    if rows.divisible == 1:
        return {}
    return {"x": 16, "offsets": rows.divisible, "strides": rows.divisible, "d": rows.divisible}


def _vector(p: Plan, divisible: dict[str, int], elements: int, warps: int) -> int:
    """How many neighbouring columns of the ``elements`` that a program takes at a time are in one lane: as many as
    16 bytes hold, if rows are aligned and there are enough for all lanes, else one.

    To add neighbours up across lanes would not do: each lane fuses its own product with the other's.
    """
    return p.vector if divisible and elements >= 32 * warps * p.vector else 1


_RECORDS = {k: record_size(k) for k in range(1, constants.MAX_MODALITIES + 1)}  # a lookup costs the host less


def state_size(B: Any, k: int) -> Any:
    """Numbers of the state: the head, the records, three sums for each program of solve_kernel, and a counter."""
    record = _RECORDS[k] if type(k) is int else layout(k)[1]  # k is a symbol where a compiler traces a stack
    return HEAD + B * record + 3 * ((B + 3) // 4) + 1


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
    values: tuple[Any, ...]
    parameters: tuple[Any, ...]
    xs = _canonical(embeddings)
    first = xs[0]
    B, d, k = first.shape[0], first.shape[-1], first.shape[1] if first.dim() == 3 else len(xs)
    dtype = first.dtype
    wide = dtype == torch.float64
    out = dtype if wide else torch.float32
    p = plan(k, d, B <= LATENCY_BATCH, first.element_size(), _in_pairs(device.index, SUMS))
    values_wanted = min(d, k) if spectrum else 1

    state = first.new_empty(state_size(B, k), dtype=torch.float64)
    total: Tensor | None = None
    alignment: Tensor | None = None
    sigma: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None
    z: Tensor | None = None
    to: tuple[int, ...] | None = None
    outputs = []
    if wanted & constants.ANY_ALIGNMENT:
        if wanted & constants.ALIGNMENT:
            alignment = torch.empty(B, dtype=out, device=device)
            outputs.append(alignment)
        else:
            total = first.new_empty((), dtype=out)
            outputs.append(total)
    if wanted & constants.SIGMA:
        sigma = torch.empty((B, values_wanted), dtype=out, device=device)
        outputs.append(sigma)
    if wanted & constants.U:
        u = torch.empty((B, d), dtype=out, device=device)
        outputs.append(u)
    if wanted & constants.V:
        v = torch.empty((B, k), dtype=out, device=device)
        outputs.append(v)
    if wanted & constants.Z:
        zs = [torch.empty((B, d), dtype=out, device=device) for _ in range(k)]
        outputs += zs
        z = zs[0]
    if B == 0:
        if total is not None:
            total.zero_() if temperature is None or not spectrum else total.copy_(_nothing(temperature))
        return outputs, [state]

    rows = _rows(xs, d)
    divisible = _divisible(rows)
    writing = divisible  # of the kernels that write u and z
    if u is not None and divisible and u.data_ptr() % 16 == 0:
        writing = divisible | {"u": 16}
    if z is not None:
        targets = _rows(zs, d)
        to = targets.offsets
        if divisible and targets.divisible > 1:
            writing = writing | {"z": 16, "z_offsets": targets.divisible}
    if mask is not None:
        mask = mask.contiguous()
    mean = bool(wanted & constants.ALIGNMENT_MEAN)
    aligns, vectors = bool(wanted & constants.ANY_ALIGNMENT), bool(wanted & (constants.U | constants.V))
    bits = _bits(fixed_temperature)
    x = (first, rows.offsets, rows.strides, mask)
    algebra = (spectrum, normalize, wide, p.pairs, aligns)
    counter = partial = None
    if total is not None and (not p.latency or B > SHARE):
        counter, partial = state[-1:].view(torch.int32), state[HEAD + B * p.record :]
    if p.latency:
        values = (*x, temperature, bits, state, counter, alignment, sigma, v, u, z, to, values_wanted, B, d)
        vector = _vector(p, divisible, p.latency_rows * p.latency_block, p.latency_warps)
        parameters = (k, p.K, p.latency_rows, p.latency_block, vector, *algebra, vectors)
        programs = -(-B // p.latency_rows)
        run(Launch(kernels.forward_kernel, programs, p.latency_warps, values, parameters, writing))
        if total is not None:
            values = (mask, state, partial, counter, total, B)
            run(Launch(kernels.reduce_kernel, -(-B // SHARE), 4, values, (k, mean, BATCH, SHARE), {}))
        return outputs, [state]
    programs = -(-B // p.stream_rows)
    stream = (k, p.stream_rows, p.block)
    values = (*x, state, counter, B, d)
    vector = _vector(p, divisible, p.stream_rows * p.block, p.stream_warps)
    parameters = (*stream, vector, normalize, wide, p.pairs)
    run(Launch(kernels.gram_kernel, programs, p.stream_warps, values, parameters, divisible))
    values = (mask, temperature, bits, state, partial, counter, total, alignment, sigma, v, values_wanted, B, d)
    parameters = (k, p.solve_instances, p.solve_part, p.K, p.lanes, *algebra, mean, vectors, BATCH)
    run(Launch(kernels.solve_kernel, -(-B // p.solve_instances), p.solve_warps, values, parameters, {}))
    if u is not None or z is not None:
        values = (*x, state, u, z, to, B, d)
        parameters = (*stream, normalize, wide, p.pairs)
        run(Launch(kernels.vectors_kernel, programs, p.stream_warps, values, parameters, writing))
    return outputs, [state]


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
    xs = _canonical(embeddings)
    first = xs[0]
    B, d, k = first.shape[0], first.shape[-1], first.shape[1] if first.dim() == 3 else len(xs)
    dtype = first.dtype
    wide = dtype == torch.float64
    p = plan(k, d, B <= LATENCY_BATCH, first.element_size(), _in_pairs(device.index, SUMS))
    rest = list(grads)
    grad_alignment = rest.pop(0) if wanted & constants.ANY_ALIGNMENT else None
    grad_sigma = rest.pop(0) if wanted & constants.SIGMA else None
    grad_u = _incoming(rest.pop(0)) if wanted & constants.U else None
    grad_v = rest.pop(0) if wanted & constants.V else None
    grad_z = [_incoming(g) for g in rest]
    direct = [g for g in grad_z if g is not None]
    summed, mean = not wanted & constants.ALIGNMENT, bool(wanted & constants.ALIGNMENT_MEAN)

    # the interpreter rounds to bfloat16 by cutting off
    written = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    found = []
    to = []
    for x, want in zip(xs, needed, strict=True):
        if want and written == dtype and x.is_contiguous():
            g = torch.empty_like(x)  # which takes the host half the time
        else:
            g = torch.empty(x.shape if want else 0, dtype=written, device=device)
        found.append(g)
        if want and B:
            to.append(g)
    if all(g is None for g in grads):  # what is not asked for is not in the records either
        for g in to:
            g.zero_()
        to = []
    slope = None
    if temperature is not None:
        slope = torch.zeros((), dtype=torch.float64, device=device)
        if B == 0 and grad_alignment is not None and spectrum:
            slope = _nothing(temperature)
        elif B > 0 and grad_alignment is not None and spectrum and not (summed and to):
            slopes = state[0][HEAD : HEAD + B * p.record].view(B, p.record)[:, field(k, "slope")]
            slope = (grad_alignment.double() * (slopes / state[0][0] if mean else slopes)).sum()
    if to:
        rows, target = _rows(xs, d), _rows(to, d)
        z_offsets: tuple[int | None, ...] = (None,) * k
        out_offsets: tuple[int | None, ...] = target.offsets
        z = z_strides = None
        divisible = _divisible(rows)
        if divisible and target.divisible > 1:
            divisible |= {"out": 16, "out_offsets": target.divisible, "out_stride": target.divisible}
        if divisible and grad_u is not None and _rows([grad_u], d).divisible > 1:
            divisible |= {"grad_u": 16, "u_stride": 16 // grad_u.element_size()}
        if direct:
            incoming = _rows(direct, d)
            if divisible and incoming.divisible > 1:
                divisible |= dict.fromkeys(("z_offsets", "z_strides"), incoming.divisible) | {"grad_z": 16}
            offsets = iter(incoming.offsets)
            z, z_offsets = direct[0], tuple([None if g is None else next(offsets) for g in grad_z])
            z_strides = tuple([0 if g is None else g.stride(0) for g in grad_z])
        if len(to) < len(xs):
            offsets = iter(target.offsets)
            out_offsets = tuple([next(offsets) if want else None for want in needed])
        simple = grad_sigma is None and grad_u is None and grad_v is None and not direct
        resident = not simple and d <= p.latency_block and p.K < 16
        R, block, warps = p.latency_rows, p.latency_block, p.latency_warps
        if simple and p.K < 16:
            R, block, warps = p.stream_rows, p.block, p.stream_warps
        draft = None if simple and not p.pairs else torch.empty(B * p.draft, dtype=torch.float64, device=device)
        learned = slope if summed and spectrum and grad_alignment is not None else None
        values = (
            *(first, rows.offsets, rows.strides, None if mask is None else mask.contiguous(), state[0], draft, learned),
            *(grad_alignment, 0 if summed or grad_alignment is None else grad_alignment.stride(0)),
            *(grad_sigma, None if grad_sigma is None else grad_sigma.stride(), min(d, k) if spectrum else 1),
            *(grad_v, None if grad_v is None else grad_v.stride()),
            *(grad_u, 0 if grad_u is None else grad_u.stride(0), z, z_offsets, z_strides),
            *(target.first, out_offsets, k * d if first.dim() == 3 else d, B, d),
        )
        flags = (spectrum, normalize, wide, p.pairs, mean, bool(direct), simple)
        parameters = (k, p.K, R, block, p.vector, resident, *flags)
        run(Launch(kernels.backward_kernel, -(-B // R), warps, values, parameters, divisible))
    for at, (g, x) in enumerate(zip(found, embeddings, strict=True)):
        if g.dtype != x.dtype:
            found[at] = g.to(x.dtype)
    return found if slope is None else [*found, slope]


def _incoming(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else _dense(grad)
