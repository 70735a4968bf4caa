"""Compiling and launching kernels: of any op family, and told of another target, for machines that are not here.

Kernels are compiled through ``triton.compile`` from explicit signatures, and launched by the compiled function
itself: what runs is what tests/tools/resources.py compiles ahead of time, and a launch costs the host a few
microseconds instead of the tens that binding and specialising arguments takes each time.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import constants

INTERPRETED = triton.knobs.runtime.interpret

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}

# ------------------------------------------------------------------------------------------------
# Targets
# ------------------------------------------------------------------------------------------------

_FAST_FLOAT64 = frozenset((60, 70, 80, 90, 100, "gfx906", "gfx908", "gfx90a", "gfx940", "gfx941", "gfx942", "gfx950"))


def slow_float64(target: GPUTarget) -> bool:
    """Whether float64 arithmetic would hold the memory up there; data-centre cards have it at half the rate."""
    return target.arch not in _FAST_FLOAT64


SUMS = os.environ.get("PMRL_KERNELS_SUMS") or None
"""How dot products of embeddings of up to 32 bits are summed: "float64", "float32" (in pairs), or by the card."""


@functools.cache
def double_float(index: int | None, sums: str | None) -> bool:
    """Whether they are pairs of float32, on a device."""
    if sums is not None and sums not in constants.SUMS:
        raise ValueError(f"environment variable PMRL_KERNELS_SUMS: got {sums!r}, wanted 'float64' or 'float32'")
    if sums is not None:
        return sums == "float32"
    return index is not None and slow_float64(triton.runtime.driver.active.get_current_target())


# ------------------------------------------------------------------------------------------------
# Compiling
# ------------------------------------------------------------------------------------------------

SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that a program can have, by NVIDIA's compute capability; of others, the least of these."""


@functools.cache
def architecture(index: int | None) -> int | str:
    """Of a device, in Triton's words: 90, "gfx942"; where there is none, of an H200, on which plans were measured."""
    return 90 if index is None else triton.runtime.driver.active.get_current_target().arch


class Compilation(NamedTuple):
    """All that a compiled kernel follows from, but for the kernel and the target: ``compile_for`` sees nothing else.

    So it is the key of what was compiled, too, and no parameter can be missing from that; unless a launch says in
    fewer words what it is for (``varies``), which tests compare.
    """

    kinds: tuple[Any, ...]  # of the arguments, see ``_kinds``
    parameters: tuple[Any, ...]  # known when a kernel is compiled
    multiples: tuple[int, ...]  # of the arguments, see ``Launch``
    warps: int
    registers: int  # of a thread at most; 0 for as many as there are
    stages: tuple[int, int]  # see ``Launch``


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    programs: int
    warps: int
    arguments: tuple[Any, ...]
    parameters: tuple[Any, ...]
    multiples: tuple[int, ...]
    """For each argument, what all integers in it are multiples of; where that is not 1, addresses are multiples of 16
    bytes."""
    registers: int = 0
    """Of a thread at most, so that more programs fit a multiprocessor; 0 for as many as there are."""
    stages: tuple[int, int] = (0, 0)
    """Of what a loop loads, how many are to be under way at a time, and the bytes of shared memory that each takes: as
    many as there is room for. (0, 0): Triton's default, three."""
    varies: tuple[Any, ...] | None = None
    """What the arguments' kinds follow from, with the parameters: dtypes, which ones there are, how long tuples are. To
    look at each argument instead takes the host half as long as the launch does."""

    def compilation(self) -> Compilation:
        return Compilation(
            _kinds(self.arguments), self.parameters, self.multiples, self.warps, self.registers, self.stages
        )


def _kinds(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of each, what is compiled for it: a tensor's dtype, ``int``, None, or of a tuple its class and the same of what
    is in it. Plain tuples hold integers, and None."""
    kinds: list[Any] = []
    for value in values:
        cls = type(value)
        if value is None:
            kinds.append(None)
        elif cls is int:
            kinds.append(int)
        elif cls is tuple and None not in value:
            kinds.append((tuple, (int,) * len(value)))
        elif isinstance(value, tuple):
            kinds.append((cls, _kinds(value)))
        else:
            kinds.append(value.dtype)
    return tuple(kinds)


def _rebuilt(cls: type, parts: list[Any]) -> Any:
    return tuple(parts) if cls is tuple else cls(*parts)


class _Source:
    """The parts of an ``ASTSource``, path by path: (argument,), (argument, field), ..."""

    def __init__(self) -> None:
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}

    def argument(self, kind: Any, multiple: int, path: tuple[int, ...]) -> Any:
        """Its type, or a tuple of types."""
        if kind is None:
            self.constants[path] = None
            return "constexpr"
        if isinstance(kind, tuple):
            cls, kinds = kind
            return _rebuilt(cls, [self.argument(part, multiple, (*path, at)) for at, part in enumerate(kinds)])
        if multiple > 1:
            self.attributes[path] = [["tt.divisibility", multiple if kind is int else 16]]
        if kind is int:
            return "i32" if len(path) == 1 else "i64"
        return _TYPES[kind]

    def parameter(self, value: Any, path: tuple[int, ...]) -> Any:
        """Field by field: Triton 3.6 makes no constant of a tuple."""
        if isinstance(value, tuple):
            return _rebuilt(type(value), [self.parameter(part, (*path, at)) for at, part in enumerate(value)])
        self.constants[path] = value
        return "constexpr"


def _source(kernel: Any, compilation: Compilation) -> ASTSource:
    """Arguments in order, first the values, then what is known when a kernel is compiled."""
    source = _Source()
    paired = zip(compilation.kinds, compilation.multiples, strict=True)
    types = [source.argument(kind, multiple, (at,)) for at, (kind, multiple) in enumerate(paired)]
    types += [source.parameter(value, (at,)) for at, value in enumerate(compilation.parameters, len(types))]
    signature = dict(zip(kernel.arg_names, types, strict=True))
    return ASTSource(kernel, signature, source.constants, source.attributes)


@functools.cache
def _name(module: str) -> None:
    """What Triton keeps on disk it finds by a kernel's source, those of all functions that it calls, and the constants
    that these use: in Triton 3.6, of a callee's only if somebody has asked for the callee's own name before. A kernel's
    name would depend on which kernels came before it in a process, and each order would compile anew what is there. So
    all functions are named in one order: those that a module imports before its own, as they are defined."""
    functions = [x for x in vars(sys.modules[module]).values() if isinstance(x, triton.JITFunction)]
    for other in dict.fromkeys(function.fn.__module__ for function in functions):
        if other != module and other in sys.modules:
            _name(other)
    for function in functions:
        if function.fn.__module__ == module:
            function.cache_key  # noqa: B018 - it is kept


def compile_for(target: GPUTarget, kernel: Any, compilation: Compilation) -> Any:
    """The compiled kernel; needs no GPU. Multiplications and additions are fused, whatever Triton's default is."""
    _name(kernel.fn.__module__)
    options = {"num_warps": compilation.warps, "enable_fp_fusion": True}
    if target.backend == "cuda":  # left alone, ptxas spills a few registers to make room for more warps
        options["maxnreg"] = compilation.registers or min(255, 65536 // (32 * compilation.warps))
        wanted, each = compilation.stages
        if wanted:
            shared = SHARED.get(int(target.arch), min(SHARED.values())) * 1024
            options["num_stages"] = max(2, min(wanted, shared // each))
    return triton.compile(_source(kernel, compilation), target=target, options=options)


# ------------------------------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------------------------------

_compiled: dict[tuple[Any, int, Any], Any] = {}
"""By the kernel's Python function, whose hash costs the host less than the kernel's, and the device."""


def run(launch: Launch) -> None:
    kernel, programs, _, arguments, parameters, *_ = launch
    if INTERPRETED:
        kernel[(programs,)](*arguments, *parameters)
        return
    index = torch.cuda.current_device()
    varies = launch.varies
    if varies is None:
        of: tuple[Any, ...] = launch.compilation()
    else:
        of = varies, parameters, launch.multiples, launch.warps, launch.registers, launch.stages
    key = kernel.fn, index, of
    compiled = _compiled.get(key)
    if compiled is None:
        if torch.cuda.is_current_stream_capturing():  # a kernel is loaded, which ends a capture with an obscure error
            raise RuntimeError(
                f"pmrl_kernels: {kernel.fn.__name__} is not compiled for such a call yet, and cannot be while a CUDA "
                "graph is captured; call pmrl_kernels.warm_up, or the same function on such embeddings, before that"
            )
        target = triton.runtime.driver.active.get_current_target()
        compiled = _compiled[key] = compile_for(target, kernel, launch.compilation())
    compiled[(programs, 1, 1)](*arguments, *parameters, stream=torch._C._cuda_getCurrentRawStream(index))
