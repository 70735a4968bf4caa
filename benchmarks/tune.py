"""Launch parameters of the Triton kernels on a GPU: each kernel alone under every setting, then both layouts by B.

    python benchmarks/tune.py                # everything
    python benchmarks/tune.py --dry-run      # on the CPU: compiles for sm_90, interprets at toy sizes
    python benchmarks/tune.py --compile-only # fills Triton's cache for sm_90, on a machine that need not have a GPU

The settings are changes of ``launch.plan``. A kernel's time is that of a CUDA graph that launches it many times over, a
row *least* what moving its bytes once takes at the bandwidth of a device-to-device copy. Before a setting is timed the
loss and its gradients under it must be those of the default, and once more when it has run many times. What wins here
is written into ``plan`` by hand.
"""

from __future__ import annotations

import os
import sys

if "--dry-run" in sys.argv:  # read when Triton is imported; the processes that compile must not see it
    os.environ["TRITON_INTERPRET"] = "1" if __name__ == "__main__" else "0"

import contextlib
import functools
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lib import report, run
from lib.cases import TEMPERATURE, Case, embeddings
from lib.measure import Clock, captured
from lib.report import number, table
from torch import Tensor
from tqdm import tqdm

from pmrl_kernels import dominant_singular_triplet, dominant_sv_loss
from pmrl_kernels.ops.spectral.triton import launch
from pmrl_kernels.ops.triton import runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tools import resources

DTYPES = resources.DTYPES
SECONDS = 0.02  # for each number
TOLERANCE = 2e-6  # of the largest gradient: other orders of summation in float64, one rounding to float32
BF16_TOLERANCE = 2.0**-7
SHOWN = 6  # settings of each kernel and shape

Changes = dict[str, int]


class Shape(NamedTuple):
    B: int
    d: int
    k: int
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"B={self.B},d={self.d},k={self.k},{self.dtype}"


class Family(NamedTuple):
    """Kernels that share parameters, what is tried for these, and the call of CALLS whose kernels they are."""

    kernels: tuple[str, ...]
    shapes: tuple[Shape, ...]
    settings: Callable[[Shape], list[Changes]]
    call: str = "alignment"


def product(**values: Sequence[int]) -> list[Changes]:
    return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]


def passes(shape: Shape, kernel: str) -> list[Changes]:
    """One or two 16-byte loads of each embedding a lane and step."""
    vector = 16 // DTYPES[shape.dtype].itemsize
    names = [f"{kernel}_{what}" for what in ("rows", "warps", "block")]
    found = []
    for rows, warps, lanes in itertools.product((1, 2, 4, 8), (1, 2, 4), (8, 16, 32, 64)):
        if rows * lanes in (32 * warps, 64 * warps) and lanes * vector <= shape.d:
            found.append(dict(zip(names, (rows, warps, lanes * vector), strict=True)))
    return found


def solves(shape: Shape) -> list[Changes]:
    tiles = product(lanes=(False,), solve_instances=(4, 8, 16), solve_part=(4,), solve_registers=(0,))
    if shape.k > 4:  # an instance in a lane takes more registers than there are, and half a minute to compile
        return tiles
    return [*product(lanes=(True,), solve_instances=(32,), solve_part=(4, 8, 16), solve_registers=(0, 128)), *tiles]


def latencies(shape: Shape) -> list[Changes]:
    vector = 16 // DTYPES[shape.dtype].itemsize
    if shape.k > 8:
        return product(latency_warps=(1, 2, 4), latency_block=(32,))
    return [
        *product(latency_rows=(1,), latency_warps=(1, 2), latency_block=(32 * vector, 64 * vector)),
        *product(latency_rows=(2,), latency_warps=(1,), latency_block=(16 * vector, 32 * vector)),
    ]


def alls(shape: Shape) -> list[Changes]:
    return product(all_warps=(1, 2, 4), all_block=(32,))


def all_rows(shape: Shape) -> list[Changes]:
    """With all of d at a time embeddings are read once for both steps."""
    lanes = 32 * (16 // DTYPES[shape.dtype].itemsize)
    blocks = sorted({min(loads * lanes, shape.d) for loads in (1, 2, 4)})
    one = product(all_rows=(1,), all_warps=(1, 2, 4), all_block=blocks)
    return [*one, {"all_rows": 2, "all_block": blocks[0]}]


THROUGHPUT = (
    *(Shape(65536, 512, k) for k in (3, 4, 6, 8)),
    *(Shape(65536, 512, 4, "bf16"), Shape(65536, 512, 8, "bf16"), Shape(65536, 512, 4, "fp64")),
    *(Shape(65536, 128, 4), Shape(16384, 1024, 4), Shape(4096, 512, 4), Shape(4096, 512, 8)),
)
LATENCY = (
    *(Shape(B, 512, 4) for B in (64, 256, 1024)),
    *(Shape(256, 512, k) for k in (3, 8, 16, 32)),
    *(Shape(256, 1024, 4), Shape(256, 512, 4, "bf16")),
)
WIDE = tuple(Shape(256, 512, k) for k in (16, 32))
TRIPLETS = (Shape(65536, 512, 4), Shape(65536, 512, 8), Shape(65536, 512, 4, "bf16"), Shape(256, 512, 4))
FAMILIES = {
    "grams": Family(("gram_kernel",), THROUGHPUT, functools.partial(passes, kernel="gram")),
    "backwards": Family(("backward_kernel",), THROUGHPUT, functools.partial(passes, kernel="backward")),
    "solves": Family(("solve_kernel",), THROUGHPUT, solves),
    "latencies": Family(("forward_kernel",), LATENCY, latencies),
    "alls": Family(("backward_kernel",), WIDE, alls),
    "vectors": Family(("vectors_kernel",), TRIPLETS[:3], functools.partial(passes, kernel="vectors"), "triplet"),
    "triplets": Family(("backward_kernel",), TRIPLETS, all_rows, "triplet"),
}
LAYOUTS = tuple(Shape(B, 512, k) for k in (3, 4, 6, 8) for B in (64, 256, 512, 1024, 2048, 4096, 8192, 16384))

DRY = {
    "grams": FAMILIES["grams"]._replace(
        shapes=(Shape(9, 32, 3),), settings=lambda _: product(gram_rows=(4, 8), gram_warps=(1,), gram_block=(16,))
    ),
    "backwards": FAMILIES["backwards"]._replace(
        shapes=(Shape(9, 32, 3),), settings=lambda _: product(backward_rows=(4,), backward_warps=(1,))
    ),
    "solves": FAMILIES["solves"]._replace(
        shapes=(Shape(9, 32, 3),),
        settings=lambda _: [{"lanes": False, "solve_instances": 4, "solve_part": 2}],
    ),
    "latencies": FAMILIES["latencies"]._replace(
        shapes=(Shape(3, 32, 3),), settings=lambda _: product(latency_rows=(1,), latency_warps=(2,))
    ),
    "triplets": FAMILIES["triplets"]._replace(
        shapes=(Shape(9, 32, 3),), settings=lambda _: product(all_rows=(2,), all_block=(16,))
    ),
}
DRY_LAYOUTS = (Shape(3, 32, 3),)


# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

_plan = launch.plan


@contextlib.contextmanager
def planned(changes: Mapping[str, int]) -> Iterator[None]:
    """``launch.plan`` with these changes."""
    launch.plan = lambda *arguments: _plan(*arguments)._replace(**changes)
    try:
        yield
    finally:
        launch.plan = _plan


@contextlib.contextmanager
def layout(small: bool) -> Iterator[None]:
    largest, launch.LATENCY_BATCH = launch.LATENCY_BATCH, (1 << 62) if small else 0
    try:
        yield
    finally:
        launch.LATENCY_BATCH = largest


def compiled(target: Any, shape: Shape, kernels: tuple[str, ...], call: str, changes: Changes) -> str | None:
    """Compiles them into Triton's cache, in a process without a GPU; what went wrong, if anything."""
    name = f"sm_{target.arch}"
    resources.TARGETS.setdefault(name, target)
    with planned(changes):
        try:
            for one in resources.launches(resources.Case(name, call, shape.dtype, shape.k), shape.d):
                if one.kernel.fn.__name__ in kernels:
                    runtime.compile_for(target, one.kernel, one.compilation())
        except Exception as error:  # whatever a compiler throws: this setting is out, the others are not
            return f"{type(error).__name__}: {str(error).strip()[:200]}"
    return None


# ------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------


def step(xs: Sequence[Tensor], call: str = "alignment") -> tuple[Tensor, ...]:
    if call == "triplet":
        sigma, u, _ = dominant_singular_triplet(*xs, backend="triton")
        incoming = torch.ones_like(sigma), xs[0].detach().to(u.dtype)
        return (sigma.detach(), u.detach(), *torch.autograd.grad((sigma, u), tuple(xs), incoming))
    loss = dominant_sv_loss(xs, temperature=TEMPERATURE, backend="triton")
    return (loss.detach(), *torch.autograd.grad(loss, tuple(xs)))


def agree(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    for x, y in zip(ours, expected, strict=True):
        tolerance = BF16_TOLERANCE if y.dtype == torch.bfloat16 else TOLERANCE
        if not (x - y).abs().max() <= tolerance * y.abs().max():
            return False
    return True


def launches(xs: Sequence[Tensor], call: str) -> tuple[dict[str, runtime.Launch], Sequence[Tensor]]:
    """The launches of a step by kernel, and what the step returned: kernels that write k gradients hold one of them and
    the distances to the others, which have to stay where they are."""
    seen: dict[str, runtime.Launch] = {}
    make = runtime.run

    def recording(one: runtime.Launch) -> None:
        seen[one.kernel.fn.__name__] = one
        make(one)

    runtime.run = recording
    try:
        return seen, step(xs, call)
    finally:
        runtime.run = make


def again(kernel: str, recorded: Mapping[str, runtime.Launch]) -> tuple[Callable[[], None], Callable[[], None] | None]:
    """What to time, and what of that is not the kernel. solve_kernel writes V over the Gram matrices that it reads, and
    counts programs from what gram_kernel sets to 0: both are put back before it runs once more."""
    run = functools.partial(runtime.run, recorded[kernel])
    if kernel != "solve_kernel":
        return run, None
    _, _, state, sums, *_ = recorded[kernel].arguments
    runtime.run(recorded["gram_kernel"])
    kept = state.clone()

    def restore() -> None:
        state.copy_(kept)
        if sums.counter is not None:
            sums.counter.zero_()

    def call() -> None:
        restore()
        run()

    return call, restore


def repeated(call: Callable[[], None], clock: Clock) -> float:
    """Seconds of one of many calls in a graph, by the median of five replays."""
    if clock.device == "cpu":
        return clock.seconds(call, 1)
    call()
    clock.wait()
    times = max(1, min(200, int(SECONDS / 5 / max(clock.seconds(call, 3), 1e-6))))

    def many() -> None:
        for _ in range(times):
            call()

    replay = captured(many)
    replay()
    return statistics.median(clock.seconds(replay, 1) for _ in range(5)) / times


def registers(one: runtime.Launch) -> tuple[int | None, int | None]:
    """Registers and spills of a kernel that was launched."""
    made = (one.kernel.fn, one.compilation())
    binary = next((b for (function, _, key), b in runtime._compiled.items() if (function, key) == made), None)
    return getattr(binary, "n_regs", None), getattr(binary, "n_spills", None)


def least_bytes(kernel: str, shape: Shape, call: str) -> int:
    """Embeddings read, gradients written, and u or its gradient; records are counted where they are all there is."""
    u = shape.B * shape.d * max(4, DTYPES[shape.dtype].itemsize)
    stream = shape.B * shape.d * shape.k * DTYPES[shape.dtype].itemsize
    half = shape.k * (shape.k + 1) // 2
    return {
        "gram_kernel": stream,
        "forward_kernel": stream,
        "vectors_kernel": stream + u,
        "backward_kernel": 2 * stream + (u if call == "triplet" else 0),
        "solve_kernel": 16 * half * shape.B,  # the Gram matrix, and the coefficients of the backward pass
    }[kernel]


def swept(name: str, family: Family, clock: Clock, progress: tqdm) -> Iterator[dict[str, Any]]:
    for shape in family.shapes:
        xs = embeddings(Case(shape.B, shape.d, shape.k, clock.device), dtype=DTYPES[shape.dtype])
        with layout(name == "latencies"):
            expected = step(xs, family.call)
            for changes in ({}, *family.settings(shape)):
                progress.update()
                row: dict[str, Any] = {"family": name, "shape": str(shape), "changes": changes}
                with planned(changes):
                    try:
                        if not agree(step(xs, family.call), expected):
                            yield row | {"wrong": True}
                            continue
                        recorded, alive = launches(xs, family.call)
                        timed = []
                        for kernel in family.kernels:
                            call, beside = again(kernel, recorded)
                            used, spilled = registers(recorded[kernel])
                            seconds = repeated(call, clock) - (repeated(beside, clock) if beside else 0.0)
                            least = least_bytes(kernel, shape, family.call)
                            facts = {"registers": used, "spills": spilled, "bytes": least}
                            timed.append(row | {"kernel": kernel, "us": 1e6 * seconds} | facts)
                            if beside:
                                alive[0].fill_(torch.nan)  # the loss: what is written once more must be right
                                call()
                        yield from timed if agree(alive, expected) else [row | {"wrong": True}]
                        del alive
                    except Exception as error:  # a setting that cannot be launched is out, the others are not
                        yield row | {"failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}


def crossing(shapes: Sequence[Shape], clock: Clock, progress: tqdm) -> Iterator[dict[str, Any]]:
    """A step in either layout: where they swap is LATENCY_BATCH."""
    for shape in shapes:
        xs = embeddings(Case(shape.B, shape.d, shape.k, clock.device), dtype=DTYPES[shape.dtype])
        for small in (True, False):
            progress.update()
            with layout(small):
                call = functools.partial(step, xs)
                wall = clock.median(call)
                device = clock.median(captured(call)) if clock.device == "cuda" else wall
            yield {
                "shape": str(shape), "layout": "latency" if small else "throughput", "wall_us": 1e6 * wall,
                "device_us": 1e6 * device,
            }  # fmt: skip


def bandwidth(clock: Clock) -> float:
    """Bytes read and written per second of a device-to-device copy."""
    x = torch.empty(1 << (28 if clock.device == "cuda" else 20), device=clock.device)
    y = torch.empty_like(x)
    for _ in range(1000 if clock.device == "cuda" else 1):  # half a second: a card that was idle has yet to wake up
        y.copy_(x)
    return 8 * x.numel() / repeated(lambda: [y.copy_(x), None][1], clock)


# ------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------


def text(results: Mapping[str, Any]) -> str:
    lines = [report.facts(results["conditions"])]
    rate = results["bandwidth"]
    lines += [f"bandwidth of a device-to-device copy: {rate / 1e9:.0f} GB/s", ""]
    timed = [row for row in results["kernels"] if "us" in row]
    for kernel, shape in dict.fromkeys((row["kernel"], row["shape"]) for row in timed):
        rows = [row for row in timed if (row["kernel"], row["shape"]) == (kernel, shape)]
        least = 1e6 * rows[0]["bytes"] / rate
        ranked = sorted(rows, key=lambda row: row["us"])
        shown = ranked[:SHOWN] + [row for row in ranked[SHOWN:] if not row["changes"]]
        cells = [
            [
                ", ".join(f"{k} {v}" for k, v in row["changes"].items()) or "as it is",
                number(row["us"]),
                f"{row['us'] / least:.2f}",
                str(row["registers"]),
                str(row["spills"]),
            ]
            for row in shown
        ]
        lines += [
            f"{kernel}, {shape}: least {number(least)} µs",
            table(["setting", "µs", "over least", "registers", "spills"], cells),
            "",
        ]
    cells = []
    for shape in dict.fromkeys(row["shape"] for row in results["layouts"]):
        pair = {row["layout"]: row for row in results["layouts"] if row["shape"] == shape}
        order = ("latency", "throughput")
        cells.append([shape, *(number(pair[x][kind]) for kind in ("wall_us", "device_us") for x in order)])
    lines += [
        "A step in either layout, µs:",
        table(["", "wall, latency", "wall, throughput", "device, latency", "device, throughput"], cells),
    ]
    for word in ("wrong", "failed", "uncompiled"):
        lines += [f"{word}: {row}" for row in results["kernels"] if word in row]
    return "\n".join(lines)


def main() -> int:
    parser = run.parser(__doc__, dry_run="on the CPU, at toy sizes", output="folder for tune.json")
    parser.add_argument("--compile-only", action="store_true", help="for sm_90, with no GPU")
    parser.add_argument("--only", nargs="+", choices=[*FAMILIES, "layouts"], help="families")
    options = parser.parse_args()
    dry = options.dry_run
    clock = Clock("cpu" if dry else "cuda")
    families = {n: f for n, f in (DRY if dry else FAMILIES).items() if not options.only or n in options.only}
    crossings = (DRY_LAYOUTS if dry else LAYOUTS) if not options.only or "layouts" in options.only else ()
    blind = dry or options.compile_only
    target = resources.TARGETS["sm_90"] if blind else runtime.triton.runtime.driver.active.get_current_target()
    rows: list[dict[str, Any]] = []
    if target.backend == "cuda":
        spawn = multiprocessing.get_context("spawn")
        jobs = {  # what is compiled does not depend on B
            (shape._replace(B=0), family.kernels, family.call, tuple(changes.items()))
            for family in families.values()
            for shape in family.shapes
            for changes in family.settings(shape)
        }
        with ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
            waiting = {pool.submit(compiled, target, s, k, call, dict(c)): (s, c) for s, k, call, c in jobs}
            for future in tqdm(waiting, desc="compiling", file=sys.stderr):
                if said := future.result():
                    shape, changes = waiting[future]
                    rows.append({"shape": str(shape), "changes": dict(changes), "uncompiled": said})
    if options.compile_only:
        print("\n".join(map(str, rows)))
        return 1 if rows else 0
    count = sum(1 + len(f.settings(s)) for f in families.values() for s in f.shapes) + 2 * len(crossings)
    layouts: list[dict[str, Any]] = []
    results = {
        "conditions": run.on_a_gpu(clock.device), "bandwidth": bandwidth(clock), "kernels": rows, "layouts": layouts,
    }  # fmt: skip

    def keep(row: dict[str, Any], among: list[dict[str, Any]]) -> None:
        """In a file at once: who is stopped has what was measured until then."""
        among.append(row)
        if options.output:
            run.write_json(results, options.output / "tune.json")

    with tqdm(total=count, desc="timing", file=sys.stderr) as progress:
        for row in crossing(crossings, clock, progress):
            keep(row, layouts)
        for name, family in families.items():
            for row in swept(name, family, clock, progress):
                keep(row, rows)
    print(text(results))
    return 1 if any("wrong" in row or (dry and "us" not in row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
