"""Compiles the Triton kernels ahead of time, with no GPU, and reports what they take.

    python tests/tools/resources.py --write    compile everything, and rewrite tests/data/triton-resources.txt
    python tests/tools/resources.py --quick     one shape on one target

The launches of real calls are recorded instead of made, so what is compiled here is what runs. Registers, stack (where
spilled registers live) and shared memory are read off the binary. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pmrl_kernels.ops.contrast.spec import kind
from pmrl_kernels.ops.contrast.triton import launch as contrast
from pmrl_kernels.ops.joint import spec as joint
from pmrl_kernels.ops.joint.triton import launch as joint_launch
from pmrl_kernels.ops.spectral import spec
from pmrl_kernels.ops.spectral.triton import launch
from pmrl_kernels.ops.triton import runtime
from tests.tools.samples import draw

RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
TABLE = Path(__file__).resolve().parents[1] / "data" / "triton-resources.txt"
TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
SHARED_LIMIT = {name: runtime.SHARED.get(target.arch, 64) for name, target in TARGETS.items()}
"""KiB."""
SPILLED = {
    "solve_kernel": dict.fromkeys(TARGETS, 336),
    "similar_kernel": {"gfx1100": 136, "sm_80": 72, "sm_120": 88},
    "weights_kernel": {"gfx1100": 164, "sm_80": 160, "sm_90": 8, "sm_120": 144},  # sm_90 with Triton 3.6
    "product_kernel": {"gfx1100": 144, "sm_120": 40},
    "scores_kernel": {"sm_80": 24, "sm_90": 8, "sm_100": 8, "sm_120": 40},  # on sm_90 and sm_100 with Triton 3.6
}
"""Bytes that a kernel may spill for k <= 8, and where. On an H200 parameters that leave solve_kernel none take up to
three times as long. Those of contrasts spill with tiles of 128, where products are made by warps (two accumulators, and
operands in registers): of sm_80 and sm_120 up to 15 of the accesses are in the loop, beside its 128 products."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# What is asked for: the whole spectrum or the leading pair, and the outputs.
CALLS = {
    "alignment": (True, spec.ALIGNMENT_MEAN),
    "leading": (False, spec.ALIGNMENT_MEAN),
    "values": (True, spec.SIGMA),
    "triplet": (False, spec.SIGMA | spec.U | spec.V),
    "pmrl": (True, spec.ALIGNMENT_MEAN | spec.U | spec.Z),
    "others": (True, spec.ALIGNMENT_MEAN | spec.Z | spec.W),
    "others1": (False, spec.ALIGNMENT_MEAN | spec.Z | spec.W),
}


CONTRASTS = {"instances": "leading", "modality": "modality", "one_out": "leave_one_out", "pairs": "pairs"}


SCORES = {"volume": joint.VOLUME, "gain": joint.GAIN, "area2": joint.AREA2}


class Case(NamedTuple):
    target: str
    call: str
    dtype: str
    k: int
    masked: bool = False


QUICK = [Case("sm_90", "alignment", "fp32", 4)]
CASES = [
    *(Case("sm_90", call, "fp32", k) for call in ("alignment", "triplet", "pmrl") for k in (2, 3, 4, 5, 6, 7, 8)),
    *(Case("sm_90", call, "fp32", k) for call in ("leading", "values") for k in (4, 6, 8)),
    *(Case("sm_90", "others", "fp32", k) for k in (2, 3, 4, 6, 8, 12)),
    *(Case("sm_90", "others1", "fp32", k) for k in (4, 6, 8)),
    *(Case("sm_90", "others", dtype, 8) for dtype in ("bf16", "fp64")),
    *(Case("sm_90", call, dtype, 4) for call in ("alignment", "triplet") for dtype in ("bf16", "fp16", "fp64")),
    *(Case("sm_90", call, "fp32", 4, True) for call in ("alignment", "pmrl")),
    *(Case("sm_90", "alignment", "fp32", k) for k in (12, 32)),
    *(
        Case(target, call, "fp32", k)
        for target in ("sm_80", "sm_100", "sm_120", "gfx942")
        for call in ("alignment", "triplet")
        for k in (4, 8)
    ),
    *(Case("sm_120", call, "fp32", k) for call in ("alignment", "triplet", "pmrl") for k in (3, 6)),
    *(Case("sm_120", call, dtype, 4) for call in ("alignment", "pmrl") for dtype in ("bf16", "fp16", "fp64")),
    *(Case(target, "pmrl", "fp32", 4) for target in ("sm_75", "gfx1100")),
    *(Case(target, "others", "fp32", 8) for target in ("sm_80", "sm_100", "sm_120", "gfx942")),
    Case("sm_120", "others", "fp32", 3),
    *(Case(target, "alignment", "fp32", 16) for target in ("sm_80", "sm_100", "sm_120", "gfx942")),
    *(Case("sm_90", call, "fp32", 1 if call == "instances" else 3) for call in CONTRASTS),
    *(Case(target, "modality", "fp32", 3) for target in ("sm_80", "sm_100", "sm_120", "gfx942")),
    *([Case("gfx1100", "modality", "fp32", 3)] if RELEASE >= (3, 9) else []),
    *(Case("sm_90", call, "fp32", k) for call in ("volume", "gain") for k in (2, 3, 4, 5, 8)),
    *(
        Case(target, call, "fp32", 4)
        for call in ("volume", "gain")
        for target in ("sm_80", "sm_100", "sm_120", "gfx942")
    ),
    Case("sm_90", "area2", "fp32", 3),
]


def spectral_calls(case: Case, d: int) -> None:
    """Of a batch for each way of launching."""
    spectrum, wanted = CALLS[case.call]
    for B in (8, launch.LATENCY_BATCH + 8, launch.SPREAD_BATCH + 8):
        xs = [torch.empty(B, d, dtype=DTYPES[case.dtype]) for _ in range(case.k)]
        mask = torch.ones(B, case.k, dtype=torch.bool) if case.masked else None
        options = (mask, None, 0.05, True, spectrum, wanted)
        outputs, state = launch.forward(xs, *options)
        launch.backward(xs, *options, state, outputs, [True] * case.k)


def contrast_calls(case: Case, d: int) -> None:
    """Of a batch for each size of tiles, and of one that goes in strips."""
    parts, tau = kind(CONTRASTS[case.call], case.k), torch.tensor(0.1)
    for B in (64, 256, 1024, 4096, 16384):
        vectors = [torch.empty(B, d) for _ in range(parts.vectors(case.k))]
        arguments = vectors, parts.pairs, parts.directions, None, [], None, 0, tau, 1.0
        _, losses, state = contrast.forward(*arguments)
        contrast.backward(*arguments, losses, state, tau)


def joint_calls(case: Case, d: int) -> None:
    precision = joint_launch.precision
    joint_launch.precision = lambda: "ieee" if case.target.startswith("gfx") else "tf32x3"
    try:
        joint_launch.forward(torch.ones(8, d), [torch.ones(8, case.k - 1, d)], None, SCORES[case.call], True)
    finally:
        joint_launch.precision = precision


def launches(case: Case, d: int = 512) -> Iterator[runtime.Launch]:
    """The launches of forward and backward passes, with sums as the target has them."""
    recorded: list[runtime.Launch] = []
    make, runtime.run = runtime.run, recorded.append
    slow = runtime.slow_float64(TARGETS[case.target])
    sums, runtime.SUMS = runtime.SUMS, "float32" if slow else "float64"
    architecture, runtime.architecture = runtime.architecture, lambda _: TARGETS[case.target].arch
    # Nothing is computed, so nobody reads what tests fill memory with, gigabytes of it.
    memory = torch.utils.deterministic
    fill, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    try:
        make_calls = (
            contrast_calls if case.call in CONTRASTS else joint_calls if case.call in SCORES else spectral_calls
        )
        make_calls(case, d)
    finally:
        runtime.run, runtime.SUMS, runtime.architecture = make, sums, architecture
        memory.fill_uninitialized_memory = fill
    seen = set()
    for one in recorded:
        key = (one.kernel, one.compilation())
        if key not in seen:
            seen.add(key)
            yield one


class Row(NamedTuple):
    case: Case
    kernel: str
    warps: int
    registers: int
    stack: int
    shared: int
    seconds: float

    def __str__(self) -> str:
        case = self.case
        what = f"{case.target:7} {case.call + ('*' if case.masked else ''):10} {case.dtype} {case.k:2}"
        used = f"{self.registers:4} {self.stack:5} {self.shared:6} {self.seconds:5.1f}"
        return f"{what} {self.kernel:15} {self.warps} {used}"


HEADER = (
    "# triton {version}. * with a mask. Registers, stack and shared memory in bytes, seconds of one core to compile.\n"
    "# target call     dtype  k kernel      warps regs stack shared seconds\n"
)


def compile_case(case: Case) -> list[Row]:
    """Raises if a kernel does not compile."""
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    rows = []
    for one in launches(case):
        begin = time.perf_counter()
        binary = runtime.compile_for(TARGETS[case.target], one.kernel, one.compilation())
        seconds = time.perf_counter() - begin
        if case.target.startswith("gfx"):
            text = binary.asm["amdgcn"]
            names = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        else:
            text = usage(binary.asm["cubin"])
            names = (r"REG:(\d+)", r"STACK:(\d+)")
        registers, stack = (int(re.search(name, text)[1]) for name in names)
        rows.append(Row(case, one.kernel.fn.__name__, one.warps, registers, stack, binary.metadata.shared, seconds))
    return rows


def usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def faults(row: Row) -> list[str]:
    """What no kernel may do: spill for k <= 8, or ask for more shared memory than there is."""
    found = []
    allowed = SPILLED.get(row.kernel, {}).get(row.case.target, 0)
    if row.stack > allowed and row.case.k <= 8:
        found.append(f"spills: {row}")
    if row.shared > SHARED_LIMIT[row.case.target] << 10:
        found.append(f"too much shared memory: {row}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three cases")
    parser.add_argument("--every", type=int, default=1, help="one case in so many")
    parser.add_argument("--seed", default="", help="which ones: any word, such as a commit")
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    options = parser.parse_args()
    if options.write and options.every > 1:
        parser.error("--write: got --every, wanted all cases")
    cases = draw(QUICK if options.quick else CASES, options.every, options.seed)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [row for some in tqdm(pool.map(compile_case, cases), total=len(cases), disable=None) for row in some]
    text = HEADER.format(version=triton.__version__) + "".join(f"{row}\n" for row in rows)
    if options.write:
        TABLE.write_text(text)
    else:
        sys.stdout.write(text)
    found = [fault for row in rows for fault in faults(row)]
    sys.stderr.write("".join(f"{fault}\n" for fault in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
