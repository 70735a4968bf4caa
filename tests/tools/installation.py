"""What the tests of packaging share: the files that a build makes, and what it takes to make them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import pmrl_kernels
from pmrl_kernels.ops import native
from tests import ROOT

PACKAGE = Path(pmrl_kernels.__file__).parent
LIBRARY = PACKAGE / "libpmrl_kernels.so"
RECORD = "native_build.txt"
OBJECTS = sorted((ROOT / "build" / "native" / "CMakeFiles").glob("kernels_*.dir/csrc/cpu/*kernels.cpp.o"))
COMPILER = next(filter(None, map(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++"])), None)
# cmake and ninja may be where pip put them, and the environments under test have nothing there.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
# What compiled the objects in build/native, and for what it did, compiles nothing again.
TOOLS = {name: os.environ[name] for name in ("CXX", "PMRL_KERNELS_CUDA_ARCHITECTURES") if name in os.environ}
TOOLS |= {"PATH": PATH} | ({"PMRL_KERNELS_CUDA": "0"} if os.environ.get("PMRL_KERNELS_CUDA") == "0" else {})

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason=f"no library to look into: {native.describe()}")
needs_binutils = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="no nm or no readelf")
needs_compiler = pytest.mark.skipif(
    not (COMPILER and shutil.which("cmake", path=PATH) and LIBRARY.exists()),
    reason=f"nothing to build the library with, or it was not built: {native.describe()}",
)


def output(*command: str | Path) -> list[str]:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.splitlines()


def copied(folder: Path) -> Path:
    """What a build reads, without anything that was built before."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("pmrl_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", RECORD))
    return folder


def elf() -> bytes:
    """A file in which a loader finds all that the headers speak of."""
    header = b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<QQIHHHHHH", 64, 960, 0, 64, 56, 1, 64, 1, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 600, 600, 4096)
    return (header + segment).ljust(1024, b"\0")


def installed(folder: Path, library: bytes | Path | None = None, name: str = "pmrl_kernels") -> Path:
    """A copy of the package, with that in the library's place."""
    package = folder / name
    shutil.copytree(ROOT / "pmrl_kernels", package, ignore=shutil.ignore_patterns("__pycache__", "*.so", RECORD))
    if isinstance(library, Path):
        shutil.copyfile(library, package / "libpmrl_kernels.so")
    elif library is not None:
        (package / "libpmrl_kernels.so").write_bytes(library)
    return package


def fake_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("")
    (folder / f"torch-{version}.dist-info").mkdir()
    (folder / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
