"""What compilers make of the sources of tests: once for all processes, in build/tests, until anything there changes."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests import ROOT, TOOLS
from tests.tools.installation import COMPILER

PLACE = ROOT / "build" / "tests"
UNUSED_FOR = 7 * 24 * 3600  # seconds, and then it goes


@functools.cache
def _made_of(csrc: Path) -> str:
    """Of sources, those of tests among them, of the tools that say how they are compiled, and of compilers."""
    found = hashlib.sha256()
    tools = [TOOLS / "cuda_door.py", TOOLS / "driver.py"]
    for name in ("*.c", "*.cpp", "*.cu"):
        tools += (ROOT / "tests").rglob(name)
    for folder, paths in ((csrc, csrc.rglob("*")), (ROOT, tools)):
        for path in sorted(path for path in paths if path.is_file()):
            content = path.read_bytes()
            found.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    for compiler in (COMPILER, shutil.which("cc"), shutil.which("nvcc")):
        if compiler is not None:
            found.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    found.update(f"{torch.__version__} {torch.__path__[0]}".encode())
    return found.hexdigest()


def kept(name: str, make: Callable[[Path], None], *options: str, csrc: Path = ROOT / "csrc") -> Path:
    """The folder of that name which ``make`` fills, with what ``options`` say, unless a process has done it already.

    Of the sources in ``csrc``: tests put mistakes into copies of them. Who wants the same at the same time waits.
    ``make`` may skip a test, or fail, and then there is none."""
    import fcntl  # on Windows none of it compiles

    key = hashlib.sha256("\0".join([_made_of(csrc), *options]).encode()).hexdigest()[:16]
    folder = PLACE / f"{name}-{key}"
    PLACE.mkdir(parents=True, exist_ok=True)
    with (PLACE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=PLACE) as scratch:
                half = Path(scratch, "made")
                half.mkdir()
                make(half)
                half.rename(folder)
            for other in PLACE.glob(f"{name}-*"):
                if other.stat().st_mtime < time.time() - UNUSED_FOR:
                    shutil.rmtree(other)
        os.utime(folder)
    return folder
