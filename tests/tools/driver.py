"""csrc/cuda/driver.cpp on a machine without CUDA: behind the door of cuda_door.cpp, on the driver of libcuda.c.

What it finds is a process's, so each case has one of its own, which runs a test's code after that of ``BEGIN``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.tools.installation import COMPILER

TOOLS = Path(__file__).parent
STREAM = 0x57EA00
"""The current stream of device 0; that of another device is so many more."""

_TORCH = f"""
#include <stdint.h>
int aoti_torch_get_current_cuda_stream(int32_t device, void **stream) {{
  *stream = (void *)(uintptr_t)({STREAM} + device);
  return device > 5;
}}
"""

BEGIN = f"""
import ctypes, os, sys
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_double, c_int, c_size_t, c_uint, c_void_p

folder = os.environ["DRIVER_FOLDER"]
STREAM = {STREAM}

class Grid(ctypes.Structure):  # the first fields of CUlaunchConfig
    _fields_ = [(name, c_uint) for name in ("X", "Y", "Z", "x", "y", "z", "shared")] + [("stream", c_void_p)]

Launched = CFUNCTYPE(None, c_size_t, POINTER(Grid), POINTER(c_void_p))

def load(name, **results):
    library = ctypes.CDLL(os.path.join(folder, name))
    for function, result in results.items():
        getattr(library, function).restype = result
    return library

def pytorch(name="libtorch_cuda.so"):
    load(name)

def cuda(**facts):
    library = load("libcuda.so.1", name_of=c_char_p, image_of=c_void_p)
    for name, value in facts.items():
        if isinstance(value, str):
            (ctypes.c_char * 64).in_dll(library, name).value = value.encode()
        elif isinstance(value, list):
            (c_int * len(value)).in_dll(library, name)[:] = value
        else:
            c_int.in_dll(library, name).value = value
    return library

def door(name="door.so"):
    names = "unavailable", "properties", "kernel", "stream", "launch"
    library = load(name, code_of=c_void_p, **{{f"door_{{name}}": c_char_p for name in names}})
    library.door_launch.argtypes = (c_int, c_void_p, c_uint, c_uint, c_uint, c_void_p, c_int, c_double)
    return library

def kernel(door, k, name):
    found = c_void_p()
    text = door.door_kernel(k, name.encode(), c_void_p(STREAM), byref(found))
    assert text is None, text
    return found

def calls(cuda):
    return (ctypes.c_char * (1 << 16)).in_dll(cuda, "calls").value.decode().split()
"""


@cache
def headers() -> Path:
    """Where cuda.h is: with Triton, or a toolkit."""
    triton = find_spec("triton")
    places = [Path(str(triton.origin)).parent / "backends" / "nvidia" / "include"] if triton else []
    places += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    for place in places:
        if (place / "cuda.h").exists():
            return place
    pytest.skip("no cuda.h, neither Triton's nor a toolkit's")


def run_compiler(command: Sequence[str | Path]) -> None:
    """Not sanitized, where this process is."""
    variables = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(list(map(str, command)), check=True, env=variables)


def c_compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        pytest.skip("no C compiler, which Triton needs too")
    return found


def library(path: Path, *options: str | Path, compiler: str | None = None) -> None:
    """Without a compiler: by one for C."""
    compiler = compiler or c_compiler()
    run_compiler([compiler, "-shared", "-fPIC", f"-Wl,-soname,{path.name}", *options, "-o", path])


def compile_driver(path: Path) -> None:
    """That of libcuda.c, which Triton's programs in C can be linked with and loaded beside, too."""
    library(path, "-I", headers(), TOOLS / "libcuda.c")


def compile_machine(folder: Path, pytorch: str = "libtorch_cuda.so", driver: str = "libcuda.so.1") -> None:
    """Into ``folder``: PyTorch's part for CUDA as far as driver.cpp asks for it, and the CUDA driver."""
    (folder / "torch.c").write_text(_TORCH)
    library(folder / pytorch, folder / "torch.c")
    compile_driver(folder / driver)


def compile_libraries(folder: Path) -> None:
    """Into ``folder``: such a machine, others that lack something, and the door."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    compile_machine(folder)
    (folder / "nothing.c").write_text("int nothing;\n")
    for name in ("libtorch_hip.so", "old/libcuda.so.1", "old/libtorch_cuda.so"):
        (folder / name).parent.mkdir(exist_ok=True)
        library(folder / name, folder / "nothing.c")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-I", ROOT / "csrc"]
    flags += ["-isystem", Path(torch.__path__[0]) / "include"]
    run_compiler([COMPILER, *flags, "-c", ROOT / "csrc" / "cuda" / "driver.cpp", "-o", folder / "driver.o"])
    for name, definitions in {"door.so": [], "empty.so": ["-DPMRL_NO_KERNELS"]}.items():
        options = [*flags, *definitions, TOOLS / "cuda_door.cpp", folder / "driver.o", "-ldl"]
        library(folder / name, *options, compiler=str(COMPILER))


def run(folder: Path, code: str) -> list[str]:
    """The lines that the code prints, in a process without PyTorch that sees the libraries of ``folder``."""
    variables = {**os.environ, "DRIVER_FOLDER": str(folder)}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()
