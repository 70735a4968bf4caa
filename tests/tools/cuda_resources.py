"""Compiles the CUDA kernels ahead of time, with no GPU, and reports what they take.

    python tests/tools/cuda_resources.py --write    compile everything, and rewrite tests/data/cuda-resources.txt
    python tests/tools/cuda_resources.py --only sm_90 4

Registers, stack (where spilled registers live), spilled bytes and declared shared memory are what nvcc's own ptxas
tells (a build takes an older one where Triton brings it). Instructions are
what warps execute for an instance of ``INSTANCES`` of (k, 256) in float32, counted by the interpreter of PTX: a change
that makes a kernel longer is seen here where a clock is not at hand.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pmrl_kernels.ops.spectral import spec
from tests.tools import cuda_door as cuda

TABLE = Path(__file__).resolve().parents[1] / "data" / "cuda-resources.txt"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
COUNTED = "sm_90"
INSTANCES, D = 64, 256
SPILLING = 8
"""From this k on registers need not hold everything."""
LISTED = {("sm_100", f"stream_4_{dtype}"): 16 for dtype in ("float32", "bfloat16", "float16")}
"""Bytes of stack for what ptxas spills elsewhere: loop counters, once for many instances."""
MOST_SHARED = 48 << 10
"""Bytes that a kernel may declare."""


class Row(NamedTuple):
    target: str
    k: int
    kernel: str
    registers: int
    stack: int
    spilled: int
    shared: int
    instructions: int | None
    """Of warps, for an instance; None: not counted."""

    def __str__(self) -> str:
        counted = "-" if self.instructions is None else self.instructions
        return (
            f"{self.target:6} {self.k} {self.kernel:22} {self.registers:4} {self.stack:5} {self.spilled:7} "
            f"{self.shared:6} {counted:>12}"
        )


def compiler() -> str:
    told = subprocess.run([cuda.command(2, COUNTED)[0], "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', told)[1]}"  # type: ignore[index]


def executed(k: int) -> Counter[str]:
    """Instructions of warps for an instance, by kernel: everything that comes in and goes out, in either layout."""
    found: Counter[str] = Counter()
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(INSTANCES, D, generator=generator)
    xs = [shared + torch.randn(INSTANCES, D, generator=generator) for _ in range(k)]
    everything = spec.ALIGNMENT_MEAN | spec.SIGMA | spec.U | spec.V | spec.Z | spec.W
    for rounds, spectrum, wanted in (
        (0, True, spec.ALIGNMENT_MEAN),
        (2, True, spec.ALIGNMENT_MEAN),
        (0, True, everything),
        (0, False, everything),
    ):
        if rounds and k not in (4, 5):
            continue
        door = cuda.door(8, 16 if rounds else 8, rounds, COUNTED)
        tau = torch.tensor(0.1)
        options = None, tau, 0.1, True, spectrum, wanted
        outputs, state = door.forward(xs, *options)
        grads = [torch.randn(x.shape, generator=generator) for x in outputs]
        door.backward(xs, *options, state, grads, [True] * k)
        for name, count in door.executed.items():
            found.setdefault(name, round(count / INSTANCES))
    return found


def compiled(target: str, k: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = cuda.command(k, target, "-cubin", "-Xptxas", "-v", "-o", str(Path(folder, "kernels.cubin")))
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode or "warning" in done.stderr:
        raise RuntimeError(done.stderr)
    counted = executed(k) if target == COUNTED else Counter()
    for part in done.stderr.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)[1]  # type: ignore[index]
        stack, spilled = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part).groups())  # type: ignore[union-attr]
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        yield Row(target, k, name, registers, stack, spilled, int(shared[1]) if shared else 0, counted.get(name))


def faults(row: Row) -> list[str]:
    """What would keep a kernel from running, or make it slow."""
    told = []
    if row.k < SPILLING and max(row.spilled, row.stack) > LISTED.get((row.target, row.kernel), 0):
        told.append(f"spills {row.spilled} bytes to a stack of {row.stack}")
    if row.shared > MOST_SHARED:
        told.append(f"takes {row.shared} bytes of shared memory")
    return told


def rows_of(text: str) -> dict[tuple[str, int, str], Row]:
    rows = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            target, k, kernel, *numbers, counted = line.split()
            row = Row(target, int(k), kernel, *map(int, numbers), None if counted == "-" else int(counted))
            rows[target, row.k, kernel] = row
    return rows


def table(rows: Iterable[Row]) -> str:
    head = [
        f"# {compiler()}. Stack, spilled registers and shared memory in bytes; instructions of warps for an instance.",
        "# target k kernel                 regs stack spilled shared instructions",
    ]
    return "\n".join([*head, *map(str, rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"everything, to {TABLE.name}")
    parser.add_argument("--only", nargs=2, metavar=("TARGET", "K"))
    options = parser.parse_args()
    cases = (
        [(options.only[0], int(options.only[1]))] if options.only else [(a, k) for a in ARCHITECTURES for k in cuda.KS]
    )
    rows: list[Row] = []
    for case in tqdm(cases, disable=None):
        rows += compiled(*case)
    text = table(rows)
    print(text, end="")
    if options.write:
        TABLE.write_text(text)
    bad = [f"{row.target}, k = {row.k}: {row.kernel} {', '.join(told)}" for row in rows if (told := faults(row))]
    print("\n".join(bad), file=sys.stderr, end="\n" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
