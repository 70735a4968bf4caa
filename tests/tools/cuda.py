"""The kernels of csrc/cuda on a machine without a GPU: compiled by nvcc, run by ptx.py's interpreter of what comes out.

What a host does with them is written down here in Python: from tensors to the structs of csrc/cuda/arguments.h, and
which kernels run, in what grids. As a pytest plugin it makes them a backend of tensors on a CPU, and the contract runs
on it:

    python -m pytest -p tests.tools.cuda tests/contract -k cuda --every 20
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmrl_kernels.ops.spectral import spec
from tests.tools import ptx

CSRC = Path(__file__).parents[2] / "csrc"
KS = range(2, 9)
FLAGS = ("-prec-div=false", "-prec-sqrt=false")  # of float32, which the angles of rotations alone are in
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WARP = 32


# ---------------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------------


def command(k: int, architecture: str, *options: str) -> list[str]:
    """nvcc, for the kernels of one k."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    source = str(CSRC / "cuda" / "spectral.cu")
    return [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", f"-DPMRL_K={k}", *FLAGS, source, *options]


@functools.cache
def compiled(k: int, architecture: str = "sm_90") -> str:
    """Their PTX."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.ptx")
        done = subprocess.run(
            [*command(k, architecture, "-ptx", "-o"), str(path)], capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return path.read_text()


# ---------------------------------------------------------------------------------------------------
# The structs of arguments.h
# ---------------------------------------------------------------------------------------------------


def fields(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Settings(ctypes.Structure):
    _fields_ = (
        *fields("k count", ctypes.c_int),
        ("tau", ctypes.c_double),
        *fields("normalize spectrum float64_input decompose others", ctypes.c_bool),
    )


class Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int32))


class Values(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *fields("stride0 stride1", ctypes.c_int64))


class State(ctypes.Structure):
    _fields_ = fields("C slope values matrix v inverse_norms others exponents size", ctypes.c_int)


class Batch(ctypes.Structure):
    _fields_ = (
        ("B", ctypes.c_int64),
        *fields("d lanes instances", ctypes.c_int),
        ("settings", Settings),
        ("temperature", ctypes.c_void_p),
        *fields("temperature_is_float64 whole", ctypes.c_bool),
        ("x", Rows * 8),
        *fields("mask state", ctypes.c_void_p),
        ("at", State),
    )


class Forward(ctypes.Structure):
    _fields_ = (
        ("batch", Batch),
        *fields("alignment sigma", ctypes.c_void_p),
        ("values", ctypes.c_int),
        *fields("v total", ctypes.c_void_p),
        ("mean", ctypes.c_bool),
        *fields("parts sums", ctypes.c_void_p),
    )


class Vectors(ctypes.Structure):
    _fields_ = (("batch", Batch), ("u", ctypes.c_void_p), *fields("z w", ctypes.c_void_p * 8))


class Backward(ctypes.Structure):
    _fields_ = (
        ("batch", Batch),
        *fields("alignment sigma v", Values),
        ("sums", ctypes.c_void_p),
        ("values", ctypes.c_int),
        ("u", Rows),
        *fields("z w out", Rows * 8),
        *fields("pairs scratch", ctypes.c_void_p),
        ("dotted", ctypes.c_bool),
        ("slopes", ctypes.c_void_p),
    )


class Slope(ctypes.Structure):
    _fields_ = (
        ("B", ctypes.c_int64),
        *fields("slopes sums", ctypes.c_void_p),
        ("alignment", Values),
        *fields("mean is_float64", ctypes.c_bool),
        ("out", ctypes.c_void_p),
    )


def rows(x: Tensor | None) -> Rows:
    return Rows() if x is None else Rows(x.data_ptr(), x.stride(0) * x.element_size(), DTYPES[x.dtype])


def values(x: Tensor | None) -> Values:
    if x is None:
        return Values()
    return Values(x.data_ptr(), *(x.stride(i) if x.dim() > i else 0 for i in range(2)))


def state_of(s: Settings, aligned: bool, vectors: bool) -> State:
    """As the function of this name in arguments.h says."""
    k, triangle, size, at = s.k, s.k * (s.k + 1) // 2, 0, {}
    decomposed = vectors and s.decompose
    for name, wanted, numbers in (
        ("C", aligned, triangle),
        ("slope", aligned, 1),
        ("values", decomposed, k if s.spectrum else 1),
        ("matrix", decomposed, k * k if s.spectrum else triangle),
        ("v", decomposed, k),
        ("inverse_norms", vectors and s.normalize, k),
        ("others", s.others, k),
        ("exponents", s.float64_input, k),
    ):
        at[name] = size if wanted else -1
        size += numbers if wanted else 0
    return State(**at, size=size)


def whole(*tensors: Tensor | None) -> bool:
    """Whether all rows begin where a pack of 16 bytes may, and are made of such."""
    return all(
        x is None or (x.data_ptr() | x.stride(0) * x.element_size() | x.shape[1] * x.element_size()) % 16 == 0
        for x in tensors
    )


# ---------------------------------------------------------------------------------------------------
# The spectral op
# ---------------------------------------------------------------------------------------------------


class Host:
    """Forward and backward operators of the spectral op, with ``lanes`` lanes an instance and ``instances`` a warp."""

    def __init__(self, lanes: int = 8, instances: int = 4, architecture: str = "sm_90") -> None:
        self.lanes, self.instances, self.architecture = lanes, instances, architecture

    def launch(self, kernel: str, k: int, blocks: int, *arguments: Any) -> None:
        given = [bytes(x) if isinstance(x, ctypes.Structure) else x for x in arguments]
        ptx.execute(compiled(k, self.architecture), 0, blocks, given, kernel)

    def blocks(self, k: int, B: int, of_warp: int) -> int:
        return -(-B // (of_warp * (3 if k > 7 else 4)))

    def batch(
        self,
        xs: Sequence[Tensor],
        mask: Tensor | None,
        temperature: Tensor | None,
        fixed: float,
        normalize: bool,
        spectrum: bool,
        wanted: int,
    ) -> tuple[Batch, str, torch.dtype]:
        (B, d), k, dtypes = xs[0].shape, len(xs), {x.dtype for x in xs}
        out = spec.output_dtype(xs)
        b = Batch(B=B, d=d, lanes=self.lanes, instances=self.instances)
        settings = (k, min(d, k), fixed, normalize, spectrum, out == torch.float64)
        b.settings = Settings(*settings, wanted & ~spec.Z != 0, wanted & spec.W != 0)
        if temperature is not None:
            b.temperature, b.temperature_is_float64 = temperature.data_ptr(), temperature.dtype == torch.float64
        b.whole = len(dtypes) == 1 and whole(*xs)
        for m, x in enumerate(xs):
            b.x[m] = rows(x)
        b.mask = None if mask is None else mask.data_ptr()
        b.at = state_of(b.settings, wanted & spec.ANY_ALIGNMENT != 0, wanted & ~spec.ANY_ALIGNMENT != 0)
        return b, "mixed" if len(dtypes) > 1 else str(xs[0].dtype).removeprefix("torch."), out

    def forward(
        self, embeddings: Sequence[Tensor], mask: Tensor | None, temperature: Tensor | None, *options: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        xs, mask, temperature = inputs(embeddings, mask, temperature)
        b, name, _ = self.batch(xs, mask, temperature, *options)
        spectrum, wanted = options[-2:]
        k, B = b.settings.k, b.B
        state, sums = torch.empty((b.at.size, B), dtype=torch.float64), torch.empty(3, dtype=torch.float64)
        b.state = state.data_ptr()
        outputs = [torch.empty_like(x) for x in spec.output_shapes(xs, spectrum, wanted)]
        at = iter(x.data_ptr() for x in outputs)
        f = Forward(batch=b, sums=sums.data_ptr(), values=b.settings.count if spectrum else 1)
        v = Vectors(batch=b)
        if wanted & spec.ALIGNMENT:
            f.alignment = next(at)
        summed = wanted & (spec.ALIGNMENT_SUM | spec.ALIGNMENT_MEAN) != 0
        if summed:
            f.total, f.mean = next(at), wanted & spec.ALIGNMENT_MEAN != 0
        f.sigma = next(at) if wanted & spec.SIGMA else None
        v.u = next(at) if wanted & spec.U else None
        f.v = next(at) if wanted & spec.V else None
        for flag, places in ((spec.Z, v.z), (spec.W, v.w)):
            for m in range(k if wanted & flag else 0):
                places[m] = next(at)
        blocks = self.blocks(k, B, self.instances)
        parts = torch.empty(3 * blocks, dtype=torch.float64)
        f.parts = parts.data_ptr() if summed and blocks != 1 else None
        if blocks:
            self.launch(f"forward_{k}_{name}", k, blocks, f)
        if summed and blocks != 1:
            self.launch("total", k, 1, f, blocks)
        if wanted & (spec.U | spec.Z | spec.W) and B:
            self.launch(f"vectors_{k}_{name}", k, self.blocks(k, B, WARP // self.lanes), v)
        return outputs, [state, sums]

    def backward(
        self,
        embeddings: Sequence[Tensor],
        mask: Tensor | None,
        temperature: Tensor | None,
        fixed: float,
        normalize: bool,
        spectrum: bool,
        wanted: int,
        state: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> list[Tensor]:
        xs, mask, temperature = inputs(embeddings, mask, temperature)
        b, name, out = self.batch(xs, mask, temperature, fixed, normalize, spectrum, wanted)
        k, B = b.settings.k, b.B
        b.state = state[0].data_ptr()
        g = Backward(values=b.settings.count if spectrum else 1)
        incoming = iter(grads)
        alignment = next(incoming) if wanted & spec.ANY_ALIGNMENT else None
        g.alignment = values(alignment)
        g.sums = state[1].data_ptr() if wanted & spec.ALIGNMENT_MEAN else None
        small = [next(incoming)] if wanted & spec.SIGMA else [None]
        g.sigma = values(small[0])
        large: list[Tensor | None] = [plain_rows(next(incoming))] if wanted & spec.U else []
        if wanted & spec.U:
            g.u = rows(large[0])
        if wanted & spec.V:
            small.append(next(incoming))
            g.v = values(small[-1])
        for flag, places in ((spec.Z, g.z), (spec.W, g.w)):
            for m in range(k if wanted & flag else 0):
                large.append(plain_rows(next(incoming)))
                places[m] = rows(large[-1])
        b.whole = b.whole and whole(*large)
        g.batch = b

        found = [torch.empty(x.shape if want else 0, dtype=x.dtype) for x, want in zip(embeddings, needed, strict=True)]
        views = spec.modalities(found) if needed[0] or embeddings[0].dim() == 2 else [None] * k
        for m, x in enumerate(views):
            g.out[m] = rows(x) if x is not None and x.dim() == 2 else Rows()
        slopes = torch.zeros(B, dtype=torch.float64)
        g.slopes = None if temperature is None else slopes.data_ptr()
        warp_blocks = self.blocks(k, B, WARP)
        if any(x is not None for x in (*small, *large)):
            triangle = k * (k + 1) // 2
            scratch, pairs = (torch.empty((n, B), dtype=torch.float64) for n in (triangle + 5 * k, k + k * k))
            g.scratch, g.dotted = scratch.data_ptr(), any(x is not None for x in large)
            through_vectors = g.u.data or g.v.data or any(w.data for w in g.w)
            if through_vectors and not spectrum and B:
                g.pairs = pairs.data_ptr()
                self.launch(f"decompose_{k}", k, warp_blocks, b, pairs)
            if g.dotted and B:
                self.launch(f"dots_{k}_{name}", k, self.blocks(k, B, WARP // self.lanes), g)
            if B:
                suffix = "_float64" if out == torch.float64 else ""
                self.launch(f"coefficients_{k}{suffix}", k, warp_blocks, g)
                self.launch(f"apply_{k}_{name}", k, self.blocks(k, B, WARP // self.lanes), g)
        elif alignment is None:
            for x in found:
                x.zero_()
        elif B:
            self.launch(f"backward_{k}_{name}", k, self.blocks(k, B, WARP // self.lanes), g)
        if temperature is not None:
            found.append(torch.zeros((), dtype=torch.float64))
        if temperature is not None and alignment is not None:
            self.launch("slope", k, 1, Slope(B=B, slopes=slopes.data_ptr(), out=found[-1].data_ptr()))
        return found


def inputs(
    embeddings: Sequence[Tensor], mask: Tensor | None, temperature: Tensor | None
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """As kernels read them: rows whose elements are neighbours, a contiguous mask, a temperature of 32 or 64 bits."""
    xs = [x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous() for x in spec.modalities(embeddings)]
    if temperature is not None and temperature.dtype not in (torch.float32, torch.float64):
        temperature = temperature.double()
    return xs, None if mask is None else mask.contiguous(), temperature


def plain_rows(grad: Tensor | None) -> Tensor | None:
    return grad if grad is None or grad.shape[1] <= 1 or grad.stride(1) == 1 else grad.contiguous()


# ---------------------------------------------------------------------------------------------------
# As a backend
# ---------------------------------------------------------------------------------------------------


def install() -> None:
    """A backend "cuda" for tensors on a CPU, before all others; it has the spectral op. Of other k, the reference's."""
    from pmrl_kernels import ops
    from pmrl_kernels.ops.operators import Pair

    def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
        return None if device.type == "cpu" else f"no {device.type} here"

    def for_k(own: Any, others: Any) -> Any:
        def operator(embeddings: Sequence[Tensor], *arguments: Any) -> Any:
            k = spec.number_of_modalities(embeddings)
            return (own if k in KS else others)(embeddings, *arguments)

        return operator

    host, reference = Host(), ops.available["reference"].pairs[spec.SPECTRAL.name]
    operators = for_k(host.forward, reference.forward), for_k(host.backward, reference.backward)
    pairs = {spec.SPECTRAL.name: Pair("cuda", *operators, rejects)}
    ops.available = {"cuda": ops.Backend("cuda", rejects, pairs, {"paired": "there are none"}), **ops.available}
    ops._PREFERENCE = ("cuda", *ops._PREFERENCE)


def pytest_load_initial_conftests() -> None:
    """Before conftest.py asks which backends there are."""
    install()
