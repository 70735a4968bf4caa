"""From tensors to launches: what is allocated, which kernels run, and how they were compiled.

Kernels are compiled through ``triton.compile`` from explicit signatures, and launched by the compiled function
itself: what runs is what tests/data/resources.py compiles ahead of time, and a launch costs the host a few
microseconds instead of the tens that binding and specialising arguments takes each time.
"""

from __future__ import annotations

import functools
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
from .kspace import draft_size, field, record_size

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

    latency: bool  # forward_kernel, an instance per program; else gram, solve and vectors one after the other
    lanes: bool  # the solve takes an instance per lane; else K lanes for each
    solve_instances: int  # of a program of solve_kernel
    solve_part: int  # of these, how many go through the k-space algebra at a time
    solve_warps: int
    stream_rows: int  # instances of a program of the other kernels
    stream_warps: int
    block: int  # columns taken at a time by these
    latency_block: int  # and by forward_kernel and the backward pass of u₁ and z
    latency_warps: int
    vector: int  # elements in 16 bytes


LATENCY_BATCH = 1024
"""Up to this B one program per instance has the lower latency; beyond, the solve is better spread over lanes."""


@functools.cache
def plan(k: int, d: int, small: bool, itemsize: int) -> Plan:
    """The static table of launch parameters, by what a batch is."""
    K = next_power_of_two(k)
    vector = 16 // itemsize
    wide = next_power_of_two(d)
    lanes = k <= 6
    return Plan(
        latency=small or K >= 16,
        lanes=lanes,
        solve_instances=32 if lanes else 4,
        solve_part={2: 32, 4: 8, 8: 2}.get(K, 1),
        solve_warps=1,
        stream_rows=16,
        stream_warps=4,
        block=max(min(8 * vector, wide), vector),
        latency_block=32 if K >= 16 else max(min(32 * vector, wide), vector),
        latency_warps=4 if K >= 16 else 1,
        vector=vector,
    )


# ------------------------------------------------------------------------------------------------
# Compiling and launching
# ------------------------------------------------------------------------------------------------


def _type(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(part, name) for part in value)
    if isinstance(value, int):
        return "i32" if name in _SHORT else "i64"
    return "constexpr"


def _source(kernel: Any, arguments: dict[str, Any], parameters: dict[str, Any], divisible: dict[str, int]) -> ASTSource:
    """What is compiled: ``divisible`` says which arguments are multiples of what."""
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for at, name in enumerate(kernel.arg_names):
        if name in parameters:
            signature[name] = "constexpr"
            constexprs[(at,)] = parameters[name]
            continue
        value = arguments[name]
        signature[name] = _type(value, name)
        for part, one in enumerate(value) if isinstance(value, tuple) else ((None, value),):
            path = (at,) if part is None else (at, part)
            if one is None:
                constexprs[path] = None
            elif name in divisible:
                attributes[path] = [["tt.divisibility", divisible[name]]]
    return ASTSource(kernel, signature, constexprs, attributes)


def compile_for(
    target: GPUTarget,
    kernel: Any,
    arguments: dict[str, Any],
    parameters: dict[str, Any],
    divisible: dict[str, int],
    warps: int,
) -> Any:
    """The compiled kernel; needs no GPU. Multiplications and additions are fused, whatever Triton's default is."""
    source = _source(kernel, arguments, parameters, divisible)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if target.backend == "cuda":  # left alone, ptxas spills a few registers to make room for more warps
        options["maxnreg"] = min(255, 65536 // (32 * warps))
    return triton.compile(source, target=target, options=options)


_compiled: dict[Any, Any] = {}


def _launch(
    kernel: Any,
    programs: int,
    warps: int,
    arguments: dict[str, Any],
    parameters: dict[str, Any],
    divisible: dict[str, int],
    device: torch.device,
) -> None:
    if INTERPRETED:
        kernel[(programs,)](**arguments, **parameters)
        return
    index = device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _launch(kernel, programs, warps, arguments, parameters, divisible, device)
    types = tuple(_type(value, name) for name, value in arguments.items())
    key = (kernel.fn.__name__, index, warps, types, *parameters.values(), *divisible.values())
    compiled = _compiled.get(key)
    if compiled is None:
        target = triton.runtime.driver.active.get_current_target()
        compiled = _compiled[key] = compile_for(target, kernel, arguments, parameters, divisible, warps)
    values = [parameters[name] if name in parameters else arguments[name] for name in kernel.arg_names]
    compiled[(programs, 1, 1)](*values, stream=torch._C._cuda_getCurrentRawStream(index))


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
    if first.dim() == 3:
        k, step = first.shape[1], first.stride(1)
        offsets = tuple(m * step for m in range(k))
        strides = (first.stride(0),) * k
    else:
        start = first.data_ptr()
        offsets = tuple((x.data_ptr() - start) // size for x in tensors)
        strides = tuple(x.stride(0) for x in tensors)
    vector = 16 // size
    aligned = first.data_ptr() % 16 == 0 and all(n % vector == 0 for n in (*offsets, *strides, d))
    return _Rows(first, offsets, strides, vector if aligned else 1)


def _canonical(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Of one dtype, with contiguous rows. Dtypes are mixed under autocast only, and are made one by a copy."""
    dtype = embeddings[0].dtype
    for x in embeddings[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [_dense(x if x.dtype == dtype else x.to(dtype)) for x in embeddings]


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]  # type: ignore[no-any-return]


def _divisible(rows: _Rows) -> dict[str, int]:
    if rows.divisible == 1:
        return {}
    return {"x": 16, "offsets": rows.divisible, "strides": rows.divisible, "d": rows.divisible}


def state_size(B: Any, k: int) -> Any:
    """Numbers of the state: the head, the records, three sums for each program of solve_kernel, and a counter."""
    return HEAD + B * record_size(k) + 3 * ((B + 3) // 4) + 1


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
    xs = _canonical(embeddings)
    stacked = xs[0].dim() == 3
    B, d = xs[0].shape[0], xs[0].shape[-1]
    k = xs[0].shape[1] if stacked else len(xs)
    device, dtype = xs[0].device, xs[0].dtype
    wide = dtype == torch.float64
    out = torch.float64 if wide else torch.float32
    empty = functools.partial(torch.empty, dtype=out, device=device)
    values_wanted = min(d, k) if spectrum else 1
    K = next_power_of_two(k)

    state = torch.empty(state_size(B, k), dtype=torch.float64, device=device)
    summed = bool(wanted & (constants.ALIGNMENT_SUM | constants.ALIGNMENT_MEAN))
    total = empty(()) if summed else None
    alignment = empty((B,)) if wanted & constants.ALIGNMENT else None
    sigma = empty((B, values_wanted)) if wanted & constants.SIGMA else None
    u = empty((B, d)) if wanted & constants.U else None
    v = empty((B, k)) if wanted & constants.V else None
    z = [empty((B, d)) for _ in range(k)] if wanted & constants.Z else []
    outputs = [x for x in (total, alignment, sigma, u, v) if x is not None] + z
    if B == 0:
        if total is not None:
            total.zero_()
        return outputs, [state]

    rows = _rows(xs, d)
    to = _rows(z, d) if z else None
    p = plan(k, d, B <= LATENCY_BATCH, xs[0].element_size())
    divisible = _divisible(rows)
    if mask is not None:
        mask = mask.contiguous()
    common = {"mask": mask, "state": state, "B": B, "d": d}
    embedding = {"x": rows.first, "offsets": rows.offsets, "strides": rows.strides}
    vectors = {"u": u, "z": to.first if to else None, "z_offsets": to.offsets if to else None}
    solve = {
        "tau": temperature,
        "tau_bits": _bits(fixed_temperature),
        "alignment": alignment,
        "sigma": sigma,
        "v": v,
        "values_wanted": values_wanted,
    }
    flags = {"k": k, "NORMALIZE": normalize, "WIDE": wide}
    solve_flags = {
        "K": K,
        "SPECTRUM": spectrum,
        "ALIGNMENT": bool(wanted & constants.ANY_ALIGNMENT),
        "VECTORS": bool(wanted & (constants.U | constants.V)),
    }
    mean = bool(wanted & constants.ALIGNMENT_MEAN)
    if p.latency:
        arguments = {**embedding, **common, **solve, **vectors}
        parameters = {**flags, **solve_flags, "BLOCK": p.latency_block, "VECTOR": p.vector}
        _launch(kernels.forward_kernel, B, p.latency_warps, arguments, parameters, divisible, device)
        if total is not None:
            arguments = {"mask": mask, "state": state, "total": total, "B": B}
            parameters = {"k": k, "MEAN": mean, "BATCH": 256}
            _launch(kernels.reduce_kernel, 1, 4, arguments, parameters, {}, device)
    else:
        tail = HEAD + B * record_size(k)
        counter = state[-1:].view(torch.int32)
        partial = state[tail:]
        stream = {**flags, "R": p.stream_rows, "BLOCK": p.block, "VECTOR": p.vector}
        programs = -(-B // p.stream_rows)
        arguments = {**embedding, **common, "counter": counter if summed else None}
        _launch(kernels.gram_kernel, programs, p.stream_warps, arguments, stream, divisible, device)
        arguments = {
            **common,
            **solve,
            "partial": partial if summed else None,
            "counter": counter if summed else None,
            "total": total,
        }
        parameters = {
            **flags,
            **solve_flags,
            "N": p.solve_instances,
            "PART": p.solve_part,
            "LANES": p.lanes,
            "MEAN": mean,
            "BATCH": 256,
        }
        _launch(kernels.solve_kernel, -(-B // p.solve_instances), p.solve_warps, arguments, parameters, {}, device)
        if u is not None or z:
            stream = {name: stream[name] for name in (*flags, "R", "BLOCK")}
            arguments = {**embedding, **common, **vectors}
            _launch(kernels.vectors_kernel, programs, p.stream_warps, arguments, stream, divisible, device)
    return outputs, [state]


def _incoming(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else _dense(grad)


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
    xs = _canonical(embeddings)
    stacked = xs[0].dim() == 3
    B, d = xs[0].shape[0], xs[0].shape[-1]
    k = xs[0].shape[1] if stacked else len(xs)
    device, dtype = xs[0].device, xs[0].dtype
    wide = dtype == torch.float64
    rest = list(grads)
    single = (constants.ANY_ALIGNMENT, constants.SIGMA, constants.U, constants.V)
    grad_alignment, grad_sigma, grad_u, grad_v = (rest.pop(0) if wanted & flag else None for flag in single)
    grad_u, grad_z = _incoming(grad_u), [_incoming(g) for g in rest]
    summed = not wanted & constants.ALIGNMENT
    mean = bool(wanted & constants.ALIGNMENT_MEAN)

    # the interpreter rounds to bfloat16 by cutting off
    written = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    found = [x.new_empty(x.shape if want else (0,), dtype=written) for x, want in zip(xs, needed, strict=True)]
    some = B > 0 and any(needed)
    slope = None
    if temperature is not None:
        slope = torch.zeros((), dtype=torch.float64, device=device)
        if B > 0 and grad_alignment is not None and spectrum and not (summed and some):
            slopes = state[0][HEAD : HEAD + B * record_size(k)].view(B, record_size(k))[:, field(k, "slope")]
            slope = (grad_alignment.double() * (slopes / state[0][0] if mean else slopes)).sum()
    if some:
        rows = _rows(xs, d)
        direct = [g for g in grad_z if g is not None]
        to = [x for x, want in zip(found, needed, strict=True) if want]
        target = _rows(to, d)
        offsets, given = iter(target.offsets), iter(_rows(direct, d).offsets if direct else ())
        z_offsets = tuple(next(given) if g is not None else None for g in grad_z) or (None,) * k
        simple = grad_sigma is None and grad_u is None and grad_v is None and not direct
        p = plan(k, d, B <= LATENCY_BATCH, xs[0].element_size())
        K = next_power_of_two(k)
        resident = not simple and d <= p.latency_block and K < 16
        R = 1 if K >= 16 or not simple else p.stream_rows
        arguments = {
            "x": rows.first,
            "offsets": rows.offsets,
            "strides": rows.strides,
            "mask": mask.contiguous() if mask is not None else None,
            "state": state[0],
            "draft": None if simple else torch.empty(B * draft_size(k), dtype=torch.float64, device=device),
            "slope": slope if summed and spectrum and grad_alignment is not None else None,
            "grad_alignment": grad_alignment,
            "alignment_stride": 0 if grad_alignment is None or summed else grad_alignment.stride(0),
            "grad_sigma": grad_sigma,
            "sigma_strides": None if grad_sigma is None else grad_sigma.stride(),
            "values_wanted": min(d, k) if spectrum else 1,
            "grad_v": grad_v,
            "v_strides": None if grad_v is None else grad_v.stride(),
            "grad_u": grad_u,
            "u_stride": 0 if grad_u is None else grad_u.stride(0),
            "grad_z": direct[0] if direct else None,
            "z_offsets": z_offsets,
            "z_strides": tuple(0 if g is None else g.stride(0) for g in grad_z) or None,
            "out": target.first,
            "out_offsets": target.offsets if stacked else tuple(next(offsets) if want else None for want in needed),
            "out_stride": k * d if stacked else d,
            "B": B,
            "d": d,
        }
        parameters = {
            "k": k,
            "K": K,
            "R": R,
            "BLOCK": p.block if simple and K < 16 else p.latency_block,
            "VECTOR": p.vector,
            "RESIDENT": resident,
            "SPECTRUM": spectrum,
            "NORMALIZE": normalize,
            "WIDE": wide,
            "MEAN": mean,
            "DIRECT": bool(direct),
            "SIMPLE": simple,
        }
        divisible = _divisible(rows)
        if divisible and target.divisible > 1:
            divisible |= {"out": 16, "out_offsets": target.divisible, "out_stride": target.divisible}
        warps = p.latency_warps if K >= 16 or not simple else p.stream_warps
        _launch(kernels.backward_kernel, -(-B // R), warps, arguments, parameters, divisible, device)
    found = [g if g.dtype == x.dtype else g.to(x.dtype) for g, x in zip(found, embeddings, strict=True)]
    return found if slope is None else [*found, slope]
