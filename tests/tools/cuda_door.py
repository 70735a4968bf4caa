"""The spectral op for CUDA on a machine without a GPU: csrc/cuda/spectral.cpp for tensors of a CPU, behind
spectral_door.cpp, on the driver of libcuda.c, which hands every launch of its kernels to ptx.py's interpreter of what
nvcc makes of them.

As a pytest plugin it makes that a backend, and the contract runs on it:

    python -m pytest -p tests.tools.cuda_door tests/contract -k cuda --every 20

With PMRL_DOOR_ARCHITECTURE=sm_86, say, of the kernels for another architecture than sm_90.

(A module called cuda here would be what torch takes for NVIDIA's bindings, in scripts of this folder.)
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import traceback
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmrl_kernels.ops.spectral import native, spec
from tests import ROOT
from tests.tools import driver, ptx
from tests.tools.installation import COMPILER
from tests.tools.kept import kept

CSRC = ROOT / "csrc"
TOOLS = Path(__file__).parent
KS = range(2, 9)
FLAGS = ("-prec-div=false", "-prec-sqrt=false")  # of float32, which the angles of rotations alone are in


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
def compiled(k: int, architecture: str) -> str:
    """Their PTX."""
    folder = kept(
        f"ptx-{architecture}-{k}",
        lambda folder: driver.run_compiler([*command(k, architecture, "-ptx", "-o"), folder / "kernels.ptx"]),
        csrc=CSRC,
    )
    return (folder / "kernels.ptx").read_text()


def disassembler() -> str | None:
    """CUDA's, or the one that comes with Triton."""
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which("nvdisasm") or (beside and shutil.which("nvdisasm", path=str(beside)))


def opcodes(k: int, architecture: str, kernel: str, folder: Path) -> Counter[str]:
    """Of the machine's instructions of a kernel, how many there are."""
    path = folder / "kernels.cubin"
    driver.run_compiler([*command(k, architecture, "-cubin", "-o"), path])
    told = subprocess.run([str(disassembler()), "-c", path], capture_output=True, text=True, check=True).stdout
    text = told.partition(f".text.{kernel}:")[2].partition(".section")[0]
    return Counter(re.findall(r"(?m)^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text))


def compile_door(folder: Path) -> None:
    """Into ``folder``: the host's code, and what it takes for PyTorch's part for CUDA and for the driver.

    With the environment's PMRL_DOOR_FLAGS, those of a sanitizer, say."""
    driver.compile_machine(folder, "pytorch_of_door.so", "cuda_of_door.so")
    installed = Path(torch.__path__[0])
    flags = [
        "-std=c++17",
        "-O1",
        "-fvisibility=hidden",
        "-DPMRL_TUNING",
        *os.environ.get("PMRL_DOOR_FLAGS", "").split(),
    ]
    flags += ["-I", ROOT / "csrc", "-isystem", installed / "include"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    renamed = ["-Ddlopen=door_dlopen", "-fPIC", "-c", ROOT / "csrc" / "cuda" / "driver.cpp", "-o", folder / "driver.o"]
    driver.run_compiler([COMPILER, *flags, *renamed])
    linked = TOOLS / "spectral_door.cpp", folder / "driver.o", installed / "lib" / "libtorch_cpu.so", "-ldl"
    driver.library(folder / "door.so", *flags, *linked, compiler=COMPILER)


# ---------------------------------------------------------------------------------------------------
# The operators
# ---------------------------------------------------------------------------------------------------


class Grid(ctypes.Structure):
    """The first fields of CUlaunchConfig."""

    _fields_ = (*((name, ctypes.c_uint) for name in [*"XYZxyz", "shared"]), ("stream", ctypes.c_void_p))


LAUNCHED = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.POINTER(Grid), ctypes.POINTER(ctypes.c_void_p))


class Door:
    """The operators for tensors of a CPU, and which kernels they have launched, in what grids."""

    architecture = "sm_90"
    runs = True
    """Whether launches do; without that they are written down alone."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, int]] = []
        self.executed: Counter[str] = Counter()  # instructions of warps, by kernel
        self.errors: list[Exception] = []
        folder = kept("door", compile_door, os.environ.get("PMRL_DOOR_FLAGS", ""))
        self.driver = ctypes.CDLL(str(folder / "cuda_of_door.so"))
        self.driver.name_of.restype, self.driver.image_of.restype = ctypes.c_char_p, ctypes.c_void_p
        self.driver.name_of.argtypes = self.driver.image_of.argtypes = (ctypes.c_size_t,)
        self._callback = LAUNCHED(self._launched)  # C does not keep it alive
        self.driver.on_launch(self._callback)
        torch.ops.load_library(str(folder / "door.so"))
        self.operators = torch.ops.pmrl_door
        os.environ["PMRL_DOOR_FOLDER"] = str(folder)
        shapes = {"spectral_forward": forward_shapes, "spectral_backward": spec.SPECTRAL.backward_shapes}
        for name, function in shapes.items():
            torch.library.register_fake(f"pmrl_door::{name}", function)

    def _launched(self, function: int, grid: Any, arguments: Any) -> None:
        name, k = self.driver.name_of(function).decode(), ctypes.string_at(self.driver.image_of(function), 1)[0]
        try:
            g = grid.contents
            assert (g.Y, g.Z, g.y, g.z, g.stream) == (1, 1, 1, 1, driver.STREAM), name
            assert bool(g.shared) == name.startswith("stream"), name
            self.launches.append((name, g.X, g.x))
            if self.runs:
                text = compiled(k, self.architecture)
                sizes = ptx.parse(text, name).parameters.values()
                given = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)]
                places = self.operators.allocations()
                owned = list(zip(places[::2], places[1::2], strict=True))
                with ptx.counting() as kinds:
                    ptx.execute(text, g.shared, g.X, given, name, threads=g.x, owned=owned)
                self.executed[name] += sum(kinds.values())
        except Exception as error:  # which C would not pass on
            traceback.print_exception(error)
            self.errors.append(error)
            ctypes.c_int.in_dll(self.driver, "refused").value = 1

    def call(self, name: str, *arguments: Any) -> Any:
        """Raises what a launch has raised."""
        try:
            return getattr(self.operators, name).default(*arguments)
        except RuntimeError:
            if self.errors:
                raise self.errors.pop() from None
            raise

    def forward(self, *arguments: Any) -> Any:
        return self.call("spectral_forward", *arguments)

    def backward(self, *arguments: Any) -> Any:
        return self.call("spectral_backward", *arguments)


def forward_shapes(embeddings: Sequence[Tensor], mask: Any, temperature: Any, fixed: float, *options: Any) -> Any:
    """What the operators for CUDA tell torch.compile, for tensors of a CPU."""
    normalize, spectrum, wanted = options
    return spec.output_shapes(embeddings, spectrum, wanted), native.cuda_state(embeddings, normalize, spectrum, wanted)


_door = functools.cache(Door)  # names of operators are the process's


def door(
    lanes: int | None = None,
    share: int | None = None,
    rounds: int | None = None,
    architecture: str = "sm_90",
    runs: bool = True,
) -> Door:
    """The process's, set to so many lanes for an instance, instances that are decomposed at once, and rounds of these
    (without them, as it chooses)."""
    settings = {"PMRL_LANES": lanes, "PMRL_READERS": lanes, "PMRL_SHARE": share, "PMRL_ROUNDS": rounds}
    for name, value in settings.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = str(value)
    found = _door()
    found.architecture, found.runs = architecture, runs
    found.launches.clear()
    found.executed.clear()
    found.errors.clear()
    return found


# ---------------------------------------------------------------------------------------------------
# As a backend
# ---------------------------------------------------------------------------------------------------


def install() -> None:
    """The backend "cuda" is this one, before all others. Of other k, the reference's operators."""
    from pmrl_kernels import ops
    from pmrl_kernels.ops.operators import Pair

    def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
        return None if device.type == "cpu" else f"no {device.type} here"

    def for_k(own: Any, others: Any) -> Any:
        def operator(embeddings: Sequence[Tensor], *arguments: Any) -> Any:
            k = spec.number_of_modalities(embeddings)
            return (own if KS[0] <= k <= KS[-1] else others)(embeddings, *arguments)  # of symbols, too

        return operator

    architecture = os.environ.get("PMRL_DOOR_ARCHITECTURE", "sm_90")
    own, reference = door(architecture=architecture).operators, ops.available["reference"].pairs[spec.SPECTRAL.name]
    forward = for_k(own.spectral_forward.default, reference.forward)
    backward = for_k(own.spectral_backward.default, reference.backward)
    pairs = {spec.SPECTRAL.name: Pair("cuda", forward, backward, rejects)}
    others = [op.name for family in ops.FAMILIES for op in family.OPS if op.name not in pairs]
    ops.available = {
        "cuda": ops.Backend("cuda", rejects, pairs, dict.fromkeys(others, "there are none")),
        **ops.available,
    }


def pytest_load_initial_conftests() -> None:
    """Before conftest.py asks which backends there are."""
    install()
