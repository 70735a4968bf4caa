"""Peak memory of one forward + backward, measured in a process of its own (Linux with glibc).

    python benchmarks/peak_memory.py CONTENDER B d k

Prints by how many MiB the resident memory exceeds at its peak what it was before the call. Embeddings
exist before the call, gradients are included. A call on 8 instances comes first, so that loading code is
not counted.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

from cases import Case, embeddings, named

STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD = -3  # of mallopt(3)


def kibibytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))


def main(name: str, B: int, d: int, k: int) -> float:
    # Memory that was freed but kept would hide what the call takes: large blocks go back at once.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    contender = named(name)
    xs = embeddings(Case(B, d, k))
    contender.step(embeddings(Case(8, 16, k)))
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = kibibytes("VmRSS")
    gradients = contender.step(xs)
    peak = kibibytes("VmHWM")
    assert len(gradients) == k
    return (peak - before) / 1024


if __name__ == "__main__":
    print(main(sys.argv[1], *map(int, sys.argv[2:5])))
