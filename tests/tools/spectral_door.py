"""csrc/cuda/spectral.cpp and driver.cpp on a machine without CUDA: behind spectral_door.cpp, on the driver of libcuda.c,
which hands every launch to the interpreter of ptx.py."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests import ROOT
from tests.tools import cuda, driver, ptx
from tests.tools.installation import COMPILER

TOOLS = Path(__file__).parent
POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)


class Grid(ctypes.Structure):
    """The first fields of CUlaunchConfig."""

    _fields_ = (*((name, ctypes.c_uint) for name in ("X", "Y", "Z", "x", "y", "z", "shared")), ("stream", ctypes.c_void_p))


LAUNCHED = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.POINTER(Grid), ctypes.POINTER(ctypes.c_void_p))


def compile_libraries(folder: Path) -> None:
    """Into ``folder``: libtorch_cuda.so as far as it is asked for, libcuda.so.1, and the door."""
    driver.compile_libraries(folder)
    torch_folder = Path(torch.__path__[0])
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "-I", ROOT / "csrc"]
    command += ["-isystem", torch_folder / "include", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    command += [TOOLS / "spectral_door.cpp", ROOT / "csrc" / "cuda" / "driver.cpp"]
    command += [torch_folder / "lib" / "libtorch_cpu.so", "-ldl", "-o", folder / "spectral_door.so"]
    subprocess.run(list(map(str, command)), check=True)


class Door:
    """The operators, and what they have launched: (kernel, blocks, threads) of each."""

    def __init__(self, folder: Path, compiled: Callable[[int], str] = cuda.compiled) -> None:
        self.launches: list[tuple[str, int, int]] = []
        self.errors: list[BaseException] = []
        self.compiled = compiled
        ctypes.CDLL(str(folder / "libtorch_cuda.so"), ctypes.RTLD_GLOBAL)
        self.driver = ctypes.CDLL(str(folder / "libcuda.so.1"))
        self.driver.name_of.restype, self.driver.image_of.restype = ctypes.c_char_p, ctypes.c_void_p
        self.driver.name_of.argtypes = self.driver.image_of.argtypes = (ctypes.c_size_t,)
        self._callback = LAUNCHED(self._launched)
        self.driver.on_launch(self._callback)
        torch.ops.load_library(str(folder / "spectral_door.so"))
        self.operators = torch.ops.pmrl_door

    def multiprocessors(self, number: int) -> None:
        """Of the devices. Effective before the first call alone."""
        ctypes.c_int.in_dll(self.driver, "multiprocessors").value = number

    def _launched(self, function: int, grid: Any, arguments: Any) -> None:
        try:
            name, k = self.driver.name_of(function).decode(), ctypes.string_at(self.driver.image_of(function), 1)[0]
            g, text = grid.contents, self.compiled(k)
            assert (g.Y, g.Z, g.y, g.z, g.shared, g.stream) == (1, 1, 1, 1, 0, driver.STREAM), name
            code = ptx.parse(text, name)
            given = [ctypes.string_at(arguments[i], size) for i, size in enumerate(code.parameters.values())]
            places = self.operators.allocations()
            owned = list(zip(places[::2], places[1::2], strict=True))
            self.launches.append((name, g.X, g.x))
            ptx.execute(text, g.shared, g.X, given, name, threads=g.x, owned=owned)
        except BaseException as error:
            self.errors.append(error)

    def call(self, name: str, *arguments: Any) -> Any:
        found = getattr(self.operators, name).default(*arguments)
        if self.errors:
            raise self.errors.pop(0)
        return found

    def forward(self, *arguments: Any) -> Any:
        return self.call("spectral_forward", *arguments)

    def backward(self, *arguments: Any) -> Any:
        return self.call("spectral_backward", *arguments)
