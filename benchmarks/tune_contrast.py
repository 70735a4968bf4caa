"""Launch parameters of the fused contrasts on a GPU: each kernel's time, forward + backward, under every setting.

    python benchmarks/tune_contrast.py                    # every sweep: two minutes on an H200
    python benchmarks/tune_contrast.py --only tiles       # some of them
    python benchmarks/tune_contrast.py --dry-run          # on the CPU: compiles for sm_90, interprets at a toy size

The settings are changes of ``launch.plan``. A kernel's time is that between two events around its launches, summed up,
while the device still has a pause to get through: the host is ahead of it, and in no number. Before a setting is timed
its gradients must be those of the default. What wins here is written into ``plan`` by hand.
"""

from __future__ import annotations

import os
import sys

if "--dry-run" in sys.argv:  # read when Triton is imported; the processes that compile must not see it
    os.environ["TRITON_INTERPRET"] = "1" if __name__ == "__main__" else "0"

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lib import report, run
from lib.report import number, table
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from pmrl_kernels.ops.contrast import spec
from pmrl_kernels.ops.contrast.triton import launch
from pmrl_kernels.ops.triton import runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tools import resources

K, D, TEMPERATURE = 4, 512, 0.1
ROUNDS = 5
PAUSE = 4_000_000  # of the device, in its clocks: longer than the host takes for a dozen launches
TOLERANCE = 2e-6  # of the largest gradient

Changes = Mapping[str, Any]


class Shape(NamedTuple):
    contrast: str
    B: int

    def __str__(self) -> str:
        return f"{self.contrast}, B={self.B}"


class Sweep(NamedTuple):
    shapes: tuple[Shape, ...]
    settings: tuple[Changes, ...]


LARGE = (Shape("leading", 4096), Shape("leave_one_out", 2048), Shape("leading", 1024))
SWEEPS = {
    "loops": Sweep(
        LARGE,
        (
            *({"depth": 64, "stages": stages} for stages in (2, 3)),
            *({"depth": 32, "stages": stages} for stages in (3, 4, 5, 6)),
        ),
    ),
    "tiles": Sweep(
        tuple(Shape(c, B) for c in ("leading", "leave_one_out", "pairs") for B in (256, 512, 1024, 1536)),
        ({"tile": 32, "warps": 4}, {"tile": 64, "warps": 4}, {"tile": 128, "warps": 8}),
    ),
    "order": Sweep(LARGE, ({"group": 4}, {"group": 16})),
    "rows": Sweep((Shape("leave_one_out", 4096), Shape("leading", 4096)), ({"rows": 2}, {"rows": 4})),
}
DRY = {"loops": Sweep((Shape("leading", 70),), ({"depth": 32, "stages": 5},))}


@contextlib.contextmanager
def planned(changes: Changes) -> Iterator[None]:
    """``launch.plan`` with these changes."""
    plan = launch.plan
    launch.plan = lambda *arguments: plan(*arguments)._replace(**changes)
    try:
        yield
    finally:
        launch.plan = plan


def vectors(shape: Shape, device: str) -> list[Tensor]:
    count = spec.kind(shape.contrast, K).vectors(K)
    return [normalize(torch.randn(shape.B, D, device=device), dim=1) for _ in range(count)]


def step(shape: Shape, xs: Sequence[Tensor]) -> list[Tensor]:
    """The contrast and its gradients, by the launches alone."""
    kind = spec.kind(shape.contrast, K)
    arguments = xs, kind.pairs, kind.directions, None, [], None, 0, None, TEMPERATURE
    _, losses, state = launch.forward(*arguments)
    gradients, _ = launch.backward(*arguments, losses, state, torch.ones((), device=xs[0].device))
    return gradients


@contextlib.contextmanager
def instead(of: Any) -> Iterator[None]:
    """What is launched goes there."""
    make, runtime.run = runtime.run, of
    try:
        yield
    finally:
        runtime.run = make


def prepared(target: Any, shape: Shape, changes: Changes) -> str | None:
    """Compiles its kernels into Triton's cache, in a process without a GPU; what went wrong, if anything."""
    recorded: list[runtime.Launch] = []
    try:
        with planned(changes), instead(recorded.append):
            step(shape, vectors(shape, "cpu"))
        for one in recorded:
            runtime.compile_for(target, one.kernel, one.compilation())
    except Exception as error:  # whatever a compiler throws: this setting is out, the others are not
        return f"{type(error).__name__}: {str(error).strip()[:200]}"
    return None


class Moment:
    """Of the device; without one, of the host."""

    def __init__(self, device: str) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device == "cuda" else None
        if self.event is not None:
            self.event.record()
        self.seconds = time.perf_counter()

    def since(self, earlier: Moment) -> float:
        """µs; once the device is done."""
        if self.event is None or earlier.event is None:
            return 1e6 * (self.seconds - earlier.seconds)
        return 1e3 * earlier.event.elapsed_time(self.event)


def timed(shape: Shape, xs: Sequence[Tensor]) -> dict[str, float]:
    """Median µs of each kernel's launches, and from the first launch to the last."""
    rounds: list[dict[str, float]] = []
    make, device = runtime.run, xs[0].device.type
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(1 + ROUNDS):
        moments: list[tuple[str, Moment, Moment]] = []

        def between(one: runtime.Launch, moments: list[Any] = moments) -> None:
            before = Moment(device)
            make(one)
            moments.append((one.kernel.fn.__name__, before, Moment(device)))

        wait()
        if device == "cuda":
            torch.cuda._sleep(PAUSE)
        with instead(between):
            step(shape, xs)
        wait()
        found = {"all": moments[-1][2].since(moments[0][1])}
        for name, before, after in moments:
            found[name] = found.get(name, 0.0) + after.since(before)
        rounds.append(found)
    return {name: statistics.median(one[name] for one in rounds[1:]) for name in rounds[0]}


def off(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of gradients, over the largest gradient; NaN if one is."""
    errors = [(x - y).abs().max() / y.abs().max() for x, y in zip(found, expected, strict=True)]
    return torch.stack(errors).max().item()


def swept(sweeps: Mapping[str, Sweep], device: str, progress: tqdm) -> Iterator[dict[str, Any]]:
    for name, sweep in sweeps.items():
        for shape in sweep.shapes:
            xs = vectors(shape, device)
            expected = step(shape, xs)
            for changes in ({}, *sweep.settings):
                row: dict[str, Any] = {"sweep": name, "shape": str(shape), "changes": dict(changes)}
                try:
                    with planned(changes):
                        error = off(step(shape, xs), expected)
                        row |= {"off": error} if error <= TOLERANCE else {"wrong": error}
                        if "off" in row:
                            row["us"] = timed(shape, xs)
                except Exception as error:  # a setting that cannot be launched is out, the others are not
                    row["failed"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
                progress.update()
                yield row


def text(results: Mapping[str, Any]) -> str:
    lines, rows = [report.facts(results["conditions"]), ""], results["settings"]
    for sweep, shape in dict.fromkeys((row["sweep"], row["shape"]) for row in rows):
        some = [row for row in rows if (row["sweep"], row["shape"]) == (sweep, shape) and "us" in row]
        kernels = list(dict.fromkeys(kernel for row in some for kernel in row["us"]))
        cells = [
            [
                ", ".join(f"{k} {v}" for k, v in row["changes"].items()) or "as it is",
                *(number(row["us"].get(kernel)) for kernel in kernels),
            ]
            for row in some
        ]
        lines += [table([f"{sweep}: {shape}, µs", *(kernel.removesuffix("_kernel") for kernel in kernels)], cells), ""]
    return "\n".join([*lines, *(f"{row}" for row in rows if "us" not in row)])


def main() -> int:
    parser = run.parser(__doc__, dry_run="on the CPU, at a toy size", output="folder for tune-contrast.json")
    parser.add_argument("--only", nargs="+", choices=list(SWEEPS), help="sweeps")
    options = parser.parse_args()
    dry = options.dry_run
    sweeps = {n: s for n, s in (DRY if dry else SWEEPS).items() if not options.only or n in options.only}
    target = resources.TARGETS["sm_90"] if dry else runtime.triton.runtime.driver.active.get_current_target()
    jobs = [
        (shape, changes) for sweep in sweeps.values() for shape in sweep.shapes for changes in ({}, *sweep.settings)
    ]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        waiting = [pool.submit(prepared, target, shape, changes) for shape, changes in jobs]
        for (shape, changes), future in tqdm(zip(jobs, waiting, strict=True), "compiling", len(jobs), file=sys.stderr):
            if said := future.result():
                rows.append({"sweep": "compiling", "shape": str(shape), "changes": dict(changes), "uncompiled": said})
    device = "cpu" if dry else "cuda"
    results = {"conditions": run.on_a_gpu(device), "settings": rows}
    with tqdm(total=len(jobs), desc="timing", file=sys.stderr) as progress:
        for row in swept(sweeps, device, progress):
            rows.append(row)
            if options.output:  # at once: who is stopped has what was measured until then
                run.write_json(results, options.output / "tune-contrast.json")
    print(text(results))
    return 1 if any("wrong" in row or (dry and "us" not in row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
