"""The alignment loss on a GPU, forward + backward, beside its rivals: eager wall time, device time, memory, accuracy.

    python benchmarks/gpu.py                 # everything; --limit SECONDS ends it sooner
    python benchmarks/gpu.py --dry-run       # toy sizes on the CPU, kernels interpreted: does the program run?
    ncu python benchmarks/gpu.py --once 65536 512 4    # two calls of that size, for a profiler to look at

*Wall* is what a training loop sees: calls one after the other, the clock stopped when the device is done. *Device* is a
replayed CUDA graph of the same call, in which the host has no part; a formulation that cannot be captured has none.
Before a number is printed every formulation must agree with a float64 SVD, what has no such loss and large batches of
ours with the reference in float64; in every layout that is timed, and in bfloat16. *copy* is a device-to-device copy
of all embeddings, and *least* the time it would take to move the least bytes: inputs twice, gradients once.

What matters most is measured first, and results are written as they come: a run that is cut short is a shorter run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from lib import accuracy, cases, figures, formulations, on_gpu, report, run
from lib.cases import GATE_COSINE, TEMPERATURE, Case, Contender, embeddings
from lib.formulations import Loss
from lib.measure import Clock
from lib.on_gpu import Row, Work, on_all_cores, times
from lib.report import number, table
from torch import Tensor
from torch.nn.functional import mse_loss

from pmrl_kernels import dominant_singular_triplet, dominant_sv_loss, ops

OURS = ("cuda", "triton")

SHAPES = tuple((B, 512, 4) for B in (64, 256, 1024, 4096, 16384, 65536))
MORE_SHAPES = (
    *((B, 512, k) for k in (3, 6, 8) for B in (256, 4096, 65536)),
    *((B, d, 4) for d in (128, 1024) for B in (256, 4096, 65536)),
    *((B, 512, k) for k in (16, 32) for B in (256, 4096)),
)
HALF_SHAPES = tuple((B, 512, 4) for B in (256, 4096, 65536))
DRY_SHAPES = ((3, 20, 3),)
GATE_SHAPES = ((64, 128, 4), (64, 128, 6))
# Of ours, in each layout that is timed: one program for an instance, K lanes for one, one lane for one, and in CUDA
# blocks that go around in rounds; with the columns from which on kernels are those of 512.
LAYOUTS = tuple((B, 256, k) for k in (4, 8) for B in (64, 4096, 13312))
COMPILED_MODALITIES = 6  # Jacobi of eight took PyTorch's compiler more than the 100 seconds that were left
SVD_BATCH = 4096  # up to this one, a float64 SVD is waited for
HALF_TOLERANCE = 2.0**-8  # of gradients in bfloat16


def _by_driver(driver: str | None, xs: Sequence[Tensor]) -> Tensor:
    Z = torch.nn.functional.normalize(torch.stack(list(xs), 2), dim=1)
    sigma = torch.linalg.svd(Z, full_matrices=False, driver=driver).S
    return formulations.alignment(sigma, TEMPERATURE)


def _squared_error(xs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The price of an ordinary loss: one over all embeddings, two by two; if one is left, its mean square."""
    half = len(xs) // 2
    losses = [mse_loss(x, y) for x, y in zip(xs[:half], xs[half:], strict=False)]
    losses += [x.square().mean() for x in xs[2 * half :]]
    return torch.autograd.grad(sum(losses), xs)


def _copy(xs: Sequence[Tensor]) -> Sequence[Tensor]:
    with torch.no_grad():
        return [x.clone() for x in xs]


def _triplet(xs: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    sigma, u, _ = dominant_singular_triplet(*xs, backend=backend)
    return torch.autograd.grad((sigma.sum(), u.sum()), xs)


def contenders(dry: bool) -> tuple[Contender, ...]:
    """As in cases.py, with what only a GPU has. Those without a loss are scales to read the others against."""
    drivers = () if dry else ("gesvd", "gesvdj", "gesvda")
    by_driver = [Contender(f"reduced SVD, {d}", d, functools.partial(_by_driver, d), waits=True) for d in drivers]
    in_torch = [c for one in cases.IN_TORCH for c in (by_driver if one.name == cases.REDUCED else [one])]
    in_torch = [dataclasses.replace(c, most=COMPILED_MODALITIES) if c.rival == "compiled" else c for c in in_torch]
    return (
        *(c for c in in_torch if not (dry and c.rival == "compiled")),
        cases.REFERENCE,
        *(one for name in OURS if name in ops.available for one in _ours(name)),
        Contender(
            "triton, sums in pairs of float32",
            "pairs",
            work=_in_double_float,
            exact=functools.partial(_alignment, backend="reference"),
            tolerance=1e-6,
        ),
        Contender("F.mse_loss", "mse_loss", work=_squared_error),
        Contender("copy", "copy", work=_copy),
    )


def _ours(name: str) -> list[Contender]:
    def one(step: Callable[..., Sequence[Tensor]], what: str, loss: Loss | None = None) -> Contender:
        here, exact = (functools.partial(step, backend=backend) for backend in (name, "reference"))
        column = f"{name} {what}".strip()
        most = 8 if name == "cuda" else None
        work = None if loss else here
        return Contender(column.replace(" ", ", "), column, loss, work, exact=exact, tolerance=1e-6, most=most)

    return [one(_alignment, "", cases.ours(name)), one(_leading, "leading"), one(_triplet, "triplet")]


def _alignment(xs: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    return torch.autograd.grad(cases.ours(backend)(xs), xs)


def _of_ours(contender: Contender) -> bool:
    return contender.name.partition(",")[0] in OURS


def _in_double_float(xs: Sequence[Tensor]) -> Sequence[Tensor]:
    """As cards with slow float64 sum."""
    from pmrl_kernels.ops.triton import runtime

    sums, runtime.SUMS = runtime.SUMS, "float32"
    try:
        return _alignment(xs, "triton")
    finally:
        runtime.SUMS = sums


def _leading(xs: Sequence[Tensor], backend: str) -> Sequence[Tensor]:
    return torch.autograd.grad(dominant_sv_loss(xs, objective="leading", backend=backend), xs)


# ------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------


def work(candidates: Sequence[Contender], dry: bool) -> list[Work]:
    """In order of importance. In bfloat16 only what is ours, and the scales."""
    if dry:
        return [(DRY_SHAPES, torch.float32, candidates)]
    ours = [c for c in candidates if _of_ours(c) or c.loss is None]
    compiled = [c for c in candidates if c.rival == "compiled"]  # which takes minutes
    rivals = [c for c in candidates if c not in (*ours, *compiled)]
    return [
        (SHAPES, torch.float32, ours),
        (HALF_SHAPES, torch.bfloat16, ours),
        (MORE_SHAPES, torch.float32, ours),
        *((shapes, torch.float32, some) for shapes in (SHAPES, MORE_SHAPES) for some in (rivals, compiled)),
    ]


def gate(candidates: Sequence[Contender], clock: Clock, dry: bool) -> tuple[list[Contender], list[str]]:
    """The formulations that agree with a float64 SVD, and what is said of those that do not, which are not timed.

    Leaves the process if the loss of ours is among these. Ours have to agree in every layout.
    """
    kept, left_out = [], []
    for contender in candidates:
        small = DRY_SHAPES if dry else GATE_SHAPES
        checks = [(shape, torch.float32, contender.tolerance) for shape in small]
        if contender.exact is not None:
            more = DRY_SHAPES if dry else LAYOUTS
            checks += [(shape, torch.float32, contender.tolerance) for shape in more]
            checks += [(shape, torch.bfloat16, HALF_TOLERANCE) for shape in more if shape[2] == more[0][2]]
        wrong = None
        for (B, d, k), dtype, tolerance in checks if contender.loss or contender.exact else ():
            if k > (contender.most or k) or wrong:
                continue
            case = Case(B, d, k, clock.device)
            try:
                error = accuracy.disagreement(contender, embeddings(case, GATE_COSINE, dtype=dtype), B <= SVD_BATCH)
                wrong = None if error <= tolerance else f"is {error:.1e} from float64 at {case} in {dtype}"
            except Exception as failure:  # a kernel that does not compile or run: the others are timed
                wrong = f"fails at {case} in {dtype}: {type(failure).__name__}: {failure}".splitlines()[0][:200]
        if wrong is None:
            kept.append(contender)
            continue
        left_out.append(f"{contender.name} {wrong}")
        if contender.name in OURS:
            sys.exit(f"{left_out[-1]}. Nothing is timed.")
    return kept, left_out


def gated(wanted: Sequence[Work], clock: Clock, dry: bool, left_out: list[str]) -> Iterator[Work]:
    """Each of them with those that agree, asked as late as can be: to compile a rival may take a minute. ``left_out``
    says who does not."""
    judged: dict[str, bool] = {}
    for shapes, dtype, candidates in wanted:
        kept, said = gate([c for c in candidates if c.name not in judged], clock, dry)
        for one in candidates:
            judged.setdefault(one.name, one in kept)
        left_out += said
        yield shapes, dtype, [c for c in candidates if judged[c.name]]


def _prepare(name: str, B: int, d: int, k: int, dtype: torch.dtype, device: str) -> None:
    (contender,) = (c for c in contenders(device == "cpu") if c.name == name)
    contender.step(embeddings(Case(B, d, k, device), dtype=dtype))


def compile_ahead(wanted: Sequence[Work], device: str) -> None:
    """Fills Triton's cache with our kernels for all shapes, on all cores: one would take minutes."""
    from pmrl_kernels.ops.spectral.triton import launch

    # One batch of each size; beyond 256 columns kernels are the same.
    batches = (DRY_SHAPES[0][0] if device == "cpu" else 16, launch.LATENCY_BATCH + 1, launch.SPREAD_BATCH + 1)
    jobs = {
        (c.name, batches[launch.size_of(B, k)], min(d, 256), k, dtype, device)
        for shapes, dtype, candidates in wanted
        for B, d, k in shapes
        for c in candidates
        if _of_ours(c) and c.name.startswith("triton")
    }
    on_all_cores(_prepare, sorted(jobs, key=lambda job: -job[3]))  # the slowest first


def compiled_rivals(wanted: Sequence[Work], device: str) -> Iterator[Callable[[], object]]:
    """Calls that have PyTorch's compiler make each of its graphs: for each k, and for small and large batches."""
    made = set()
    for shapes, dtype, candidates in wanted:
        for contender, (B, d, k) in itertools.product(candidates, shapes):
            graph = contender.name, k, B >= formulations.LARGE
            if contender.rival == "compiled" and k <= COMPILED_MODALITIES and graph not in made:
                made.add(graph)
                yield functools.partial(contender.step, embeddings(Case(B, d, k, device), dtype=dtype))


# ------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------


def bandwidth_of_copy(rows: Sequence[Row]) -> float:
    """Bytes per second of the largest copy: each element read and written once."""
    copies = [row for row in rows if row["contender"] == "copy" and "wall_us" in row and row["dtype"] == "float32"]
    if not copies:
        return float("nan")
    row = max(copies, key=lambda row: row["B"] * row["d"] * row["k"])
    return 8 * row["B"] * row["d"] * row["k"] / (row.get("device_us", row["wall_us"]) * 1e-6)


def least_us(row: Row, bandwidth: float) -> float:
    size = 4 if row["dtype"] == "float32" else 2
    return 3e6 * size * row["B"] * row["d"] * row["k"] / bandwidth


# What is aimed at, float32 unless it says otherwise: shape, dtype, what is measured, the most (or least) it may be.
NEAR_LEAST = (((65536, 512, 4), "float32", 1.3), ((65536, 512, 4), "bfloat16", 1.45))
NEAR_MSE = (((64, 512, 4), 3.0), ((256, 512, 4), 3.0), ((1024, 512, 4), 3.0))
REPLAY = ((256, 512, 4), 20.0)  # µs
OVER_FULL_SVD = ((256, 512, 4), 1000.0)


def marks(rows: Sequence[Row], bandwidth: float) -> list[str]:
    """What is aimed at, beside what was measured, as far as it was."""

    def of(shape: tuple[int, int, int], contender: str, kind: str, dtype: str = "float32") -> float | None:
        for row in rows:
            if ((row["B"], row["d"], row["k"]), row["dtype"], row["contender"]) == (shape, dtype, contender):
                return row.get(kind)
        return None

    def line(what: str, found: float | None, over: float | None, wanted: float, least: bool = False) -> None:
        if found is not None and over is not None:
            ratio = found / over
            met = ratio >= wanted if least else ratio <= wanted
            bound = f"wanted {'>=' if least else '<='} {wanted:g}: {'met' if met else 'MISSED'}"
            lines.append(f"{what}: {number(ratio)}, {bound}")

    lines: list[str] = []
    for ours in OURS:
        for shape, dtype, most in NEAR_LEAST:
            size = dict(zip(("B", "d", "k"), shape, strict=True)) | {"dtype": dtype}
            found = of(shape, ours, "device_us", dtype)
            line(f"{ours}, {shape}, {dtype}: device time over the least", found, least_us(size, bandwidth), most)
        for shape, most in NEAR_MSE:
            wall = of(shape, ours, "wall_us")
            line(f"{ours}, {shape}: eager wall over F.mse_loss", wall, of(shape, "F.mse_loss", "wall_us"), most)
        line(f"{ours}, {REPLAY[0]}: device µs", of(REPLAY[0], ours, "device_us"), 1.0, REPLAY[1])
        shape, times_as_fast = OVER_FULL_SVD
        full = of(shape, "full SVD", "wall_us")
        line(f"{ours}, {shape}: full SVD's wall over it", full, of(shape, ours, "wall_us"), times_as_fast, least=True)
        memory = of(shape, "full SVD", "peak_MiB"), of(shape, ours, "peak_MiB")
        if None not in memory:
            lines.append(f"{ours}, {shape}: peak memory {number(memory[1])} MiB, full SVD {number(memory[0])} MiB")
    return lines


def text(results: dict[str, Any]) -> str:
    rows = results["time"]
    bandwidth = bandwidth_of_copy(rows)
    lines = [report.facts(results["conditions"])]
    lines.append(f"bandwidth of a device-to-device copy: {bandwidth / 1e9:.0f} GB/s\n")
    for kind, name in (
        ("wall_us", "Wall, µs"),
        ("device_us", "Device, µs (graph replay)"),
        ("peak_MiB", "Peak memory, MiB"),
    ):
        names = list(dict.fromkeys(row["contender"] for row in rows if kind in row))
        if not names:
            continue
        cells: dict[str, dict[str, float]] = {}
        for row in rows:
            shape = f"{row['B']}, {row['d']}, {row['k']}, {row['dtype']}"
            cells.setdefault(shape, {"least": least_us(row, bandwidth)})
            if kind in row:
                cells[shape][row["contender"]] = row[kind]
        columns = names if kind == "peak_MiB" else [*names, "least"]
        lines += [
            name,
            table(["B, d, k", *columns], [[s, *(number(c.get(n)) for n in columns)] for s, c in cells.items()]),
            "",
        ]
    losing = [
        f"{ours['contender']} at {row['B']}, {row['d']}, {row['k']}: {row['contender']} {number(row['wall_us'])} µs"
        for row in rows
        for ours in rows
        if ours["contender"] in OURS
        and all(ours[key] == row[key] for key in ("B", "d", "k", "dtype"))
        and row.get("wall_us", float("inf")) < ours.get("wall_us", float("inf"))
        and row["contender"] not in ("F.mse_loss", "copy")
        and row["contender"].partition(",")[0] not in OURS
    ]
    lines += [*marks(rows, bandwidth), ""]
    lines += [f"not timed: {said}" for said in results["left_out"]]
    lines += ["Where it loses (wall): " + ("none" if not losing else "; ".join(losing))]
    lines += [
        f"not run at {row['B']}, {row['d']}, {row['k']}: {row['contender']}: {row['not_run']}"
        for row in rows
        if "not_run" in row
    ]
    return "\n".join(lines)


def write(results: dict[str, Any], folder: Path) -> None:
    columns = ("B", "d", "k", "dtype", "contender", "wall_us", "device_us", "peak_MiB", "no_graph", "not_run")
    run.write_json(results, folder / "gpu.json")
    run.write_csv(results, columns, folder / "gpu.csv")


def main() -> None:
    where = f"folder for the results; default: {run.RESULTS.name}/, none for a dry run"
    parser = on_gpu.parser(__doc__, where)
    parser.add_argument("--once", type=int, nargs=3, metavar=("B", "d", "k"), help="two calls, and no times")
    options = parser.parse_args()
    dry, deadline = options.dry_run, time.monotonic() + options.limit
    clock = Clock("cpu" if dry else "cuda")
    candidates: Sequence[Contender] = contenders(dry)
    if options.once:
        for contender in (c for c in candidates if c.name in OURS):
            for _ in range(2):
                contender.step(embeddings(Case(*options.once, clock.device)))
        return clock.wait()
    wanted, rows, left_out = work(candidates, dry), [], []
    if not options.compiled:
        compile_ahead(wanted, clock.device)
    if options.on_cue:
        deadline = on_gpu.wait_for(options.on_cue, compiled_rivals(wanted, clock.device))
    results: dict[str, Any] = {"conditions": run.on_a_gpu(clock.device), "left_out": left_out, "time": rows}
    folder = options.output or (None if dry else run.RESULTS)
    with run.progress(sum(len(shapes) * len(some) for shapes, _, some in wanted)) as bar:
        for row in times(gated(wanted, clock, dry, left_out), clock, deadline):
            rows.append(row)
            bar.set_description(f"{row['B']}, {row['d']}, {row['k']}: {row['contender']}")
            bar.update()
            if folder:
                write(results, folder)
    print(text(results))
    if folder:
        try:
            figures.draw_gpu(results, folder / "gpu.png")
        except ModuleNotFoundError as error:
            print(f"no figure: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
