"""Peak memory of one call, measured in a process of its own (Linux with glibc).

    python -m lib.memory MODULE:FUNCTION ARGUMENT...      from benchmarks/

The function gets the arguments and returns the call. It has to make its inputs, and one call on a few instances: so
that loading code is not counted. What is printed is by how many MiB the resident memory exceeds at its peak what it was
before the call; what the call returns, such as gradients, is included.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

from .cases import Case, embeddings, named
from .measure import Call
from .run import BENCHMARKS

STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD = -3  # of mallopt(3)


def peak(function: str, *arguments: object) -> float:
    """MiB by which a fresh process grows at its peak during the call that ``function`` ("module:name") returns."""
    command = (sys.executable, "-m", "lib.memory", function, *map(str, arguments))
    path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit status {result.returncode}")
    return float(result.stdout.strip().splitlines()[-1])


def of_contender(name: str, case: Case) -> float:
    """MiB of forward and backward of a contender on embeddings that are there, gradients included."""
    return peak("lib.memory:contender_call", name, case.B, case.d, case.k)


def contender_call(name: str, B: str, d: str, k: str) -> Call:
    """Forward and backward of a contender."""
    contender = named(name)
    contender.step(embeddings(Case(8, 16, int(k))))
    return functools.partial(contender.step, embeddings(Case(int(B), int(d), int(k))))


def available() -> float:
    """MiB the system could give, infinite where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return float("inf")


def _kibibytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))


def _of_this_process(function: str, *arguments: str) -> float:
    # Memory that was freed but kept would hide what the call takes: large blocks go back at once.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)(*arguments)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = _kibibytes("VmRSS")
    result = call()
    grown = _kibibytes("VmHWM") - before
    del result
    return grown / 1024


if __name__ == "__main__":
    print(_of_this_process(*sys.argv[1:]))
