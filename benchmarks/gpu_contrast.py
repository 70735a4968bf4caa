"""The contrasts and the whole objective on a GPU, forward + backward: eager wall time, device time, peak memory.

    python benchmarks/gpu_contrast.py              # B = 256 to 65536; --limit SECONDS ends it sooner
    python benchmarks/gpu_contrast.py --dry-run    # toy sizes on the CPU, kernels interpreted: does the program run?

Ours come with three products for a similarity and, "high", with one. Beside them stand the same losses as they are
written with ``F.cross_entropy``, eager and compiled, with matrix products in float32 and in TF32 ("high"), and the
products alone that no formulation is spared: 2 B x B x d of an instance contrast, in float32, TF32 and float16. Wall
and device time are those of gpu.py; what takes longest comes last. Nothing is timed that does not agree with the
reference in float64.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

if __name__ == "__main__" and "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from lib import objectives, on_gpu, report, run
from lib.accuracy import doubled
from lib.cases import Case, Contender, embeddings
from lib.measure import Clock
from lib.on_gpu import Row, Work, on_all_cores, times
from lib.report import number, table
from torch import Tensor

from pmrl_kernels import instance_contrastive_loss, pmrl_loss

TAU, CONTRAST_TAU = 0.05, 0.1
BACKEND = "triton"
BATCHES = (256, 1024, 4096, 16384, 65536)
SMALL = 4096  # of these batches everything is timed before larger ones
COMPILED_AHEAD = (40000, 16384, 4096, 1024, 256)  # for the largest one the same kernels as for 65536, the slowest first
DRY_BATCHES = (5,)
D, K, DRY_D, DRY_K = 512, 4, 12, 3
TOLERANCE = {"highest": 1e-5, "high": 5e-2}

Loss = Callable[[Sequence[Tensor]], Tensor]


def _instance(xs: Sequence[Tensor], backend: str = BACKEND) -> Tensor:
    return instance_contrastive_loss(xs[0], CONTRAST_TAU, backend=backend)


def _pmrl(xs: Sequence[Tensor], contrast: str, backend: str = BACKEND) -> Tensor:
    return pmrl_loss(
        xs, temperature=TAU, instance_temperature=CONTRAST_TAU, alignment_weight=float(contrast != "pairs"),
        contrast=contrast, backend=backend,
    )  # fmt: skip


def _cross_entropy(xs: Sequence[Tensor]) -> Tensor:
    return objectives.instance_contrast(xs[0], CONTRAST_TAU)


@functools.cache
def _compiled() -> Loss:
    torch._dynamo.config.recompile_limit = 64  # beyond it, one of so many shapes and precisions would run eagerly
    return torch.compile(lambda xs: objectives.instance_contrast(xs[0], CONTRAST_TAU), dynamic=False)


def _all_pairs(xs: Sequence[Tensor]) -> Tensor:
    return objectives.all_pairs(xs, CONTRAST_TAU)


def _products(xs: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    with torch.no_grad():
        x = xs[0].detach().to(dtype)
        return [(x @ x.T) @ x]


def _at(precision: str, contender: Contender) -> Contender:
    """The same with ``torch.set_float32_matmul_precision``."""

    def step(xs: Sequence[Tensor]) -> Sequence[Tensor]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            used = contender.step(xs)
        finally:
            torch.set_float32_matmul_precision(before)
        return used

    return Contender(f"{contender.name}, {precision}", f"{contender.column} {precision}", contender.loss, step)


def _of_one(name: str, loss: Loss) -> Contender:
    """Of the first embedding alone, with its gradient."""
    return Contender(name, name, loss, lambda xs: torch.autograd.grad(loss(xs), xs[:1]))


def contenders(dry: bool) -> list[Contender]:
    """In the order in which they are timed: where time is short, the last ones are not."""
    names = ("leading", "leave_one_out", "modality", "pairs")
    instance, plain = _of_one("instance", _instance), _of_one("F.cross_entropy", _cross_entropy)
    objective = [Contender(f"pmrl, {c}", c, functools.partial(_pmrl, contrast=c)) for c in names]
    found = [
        *(instance, plain, _at("high", plain), *objective),
        *(_at("high", one) for one in (instance, *objective)),
        Contender("F.cross_entropy, all pairs", "all pairs", _all_pairs),
        Contender("2 products, float32", "float32", work=functools.partial(_products, dtype=torch.float32)),
        _at("high", Contender("2 products", "tf32", work=functools.partial(_products, dtype=torch.float32))),
        Contender("2 products, float16", "float16", work=functools.partial(_products, dtype=torch.float16)),
    ]
    if not dry:
        compiled = _of_one("F.cross_entropy, compiled", lambda xs: _compiled()(xs))
        found += [compiled, _at("high", compiled)]
    return found


def work(candidates: Sequence[Contender], shapes: Sequence[tuple[int, int, int]]) -> list[Work]:
    """Who is timed where, in order: small batches before large ones, and what has to be compiled behind the others."""
    compiled = [c for c in candidates if "compiled" in c.name]
    others = [c for c in candidates if c not in compiled]
    sizes = [[shape for shape in shapes if (shape[0] <= SMALL) == small] for small in (True, False)]
    return [(some, torch.float32, who) for some in sizes for who in (others, compiled)]


def _prepare(name: str, B: int, d: int, k: int, device: str) -> None:
    (contender,) = (c for c in contenders(device == "cpu") if c.name == name)
    contender.step(embeddings(Case(B, d, k, device)))


def compiled_rivals(
    candidates: Sequence[Contender], shapes: Sequence[tuple[int, int, int]], device: str
) -> Iterator[Callable[[], object]]:
    """Calls that have PyTorch's compiler make a graph for the gate and for each shape: it takes half a minute, most of
    it to be imported."""
    for B, d, k in (_gate_shapes("cuda")[0], *shapes):
        for one in candidates:
            if "compiled" in one.name:
                yield functools.partial(one.step, embeddings(Case(B, d, k, device)))


def _gate_shapes(device: str) -> tuple[tuple[int, int, int], ...]:
    """The first for everyone; ours have to agree with every tile and in strips. Of as many columns as share their
    kernels with those that are timed."""
    return ((7, 12, 3),) if device == "cpu" else tuple((B, 256, 4) for B in (300, 1024, 4096, 16384))


def _of_ours(contender: Contender) -> bool:
    return contender.name.removesuffix(", high") == "instance" or contender.name.startswith("pmrl")


def gate_embeddings(case: Case) -> list[Tensor]:
    """With a part that all instances share, as trained ones have. Gradients of independent ones are what is left of
    sums that cancel: by ``F.cross_entropy`` in float32, on a CPU, off by 1e-4 of the largest entry at B = 16384."""
    part = torch.randn(case.d, generator=torch.Generator().manual_seed(1)).to(case.device)
    return [(x.detach() + 0.7 * part).requires_grad_() for x in embeddings(case)]


def gate(candidates: Sequence[Contender], device: str) -> tuple[list[Contender], list[str]]:
    """Those whose gradients are float64's, and what is said of the others, which are not timed."""
    first, *others = [gate_embeddings(Case(*shape, device)) for shape in _gate_shapes(device)]
    names = ("leading", "leave_one_out", "modality", "pairs")
    exact: dict[str, Loss] = {f"pmrl, {c}": functools.partial(_pmrl, contrast=c, backend="reference") for c in names}
    exact["instance"] = exact["F.cross_entropy"] = functools.partial(_instance, backend="reference")
    exact["F.cross_entropy, all pairs"] = exact["pmrl, pairs"]

    def off(one: Contender, xs: Sequence[Tensor]) -> float:
        doubles = doubled(xs)
        loss = exact[one.name.removesuffix(", high").removesuffix(", compiled")](doubles)
        wanted = torch.autograd.grad(loss, doubles, allow_unused=True)
        errors = [(x.double() - y).abs().max() / y.abs().max() for x, y in zip(one.step(xs), wanted, strict=False)]
        return torch.stack(errors).max().item()  # NaN if one is

    passed, said = [], []
    for one in candidates:
        tolerance, refused = TOLERANCE["high" if one.name.endswith("high") else "highest"], None
        try:
            for xs in (first, *(others if _of_ours(one) else ())) if one.loss is not None else ():
                if refused is None and not (error := off(one, xs)) <= tolerance:
                    refused = (
                        f"its gradient is {error:.1e} from the reference in float64 at B = {len(xs[0])}: not timed"
                    )
        except Exception as error:  # a kernel that does not compile or run: the others are timed
            refused = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if refused is None:
            passed.append(one)
        else:
            said.append(f"{one.name}: {refused}")
    return passed, said


def gated(wanted: Sequence[Work], clock: Clock, refused: list[str]) -> Iterator[Work]:
    """Each with those that pass the gate, and no sooner than it is its turn: the last ones take a minute to compile."""
    judged: dict[str, bool] = {}
    for shapes, dtype, candidates in wanted:
        passed, said = gate([c for c in candidates if c.name not in judged], clock.device)
        for one in candidates:
            judged.setdefault(one.name, one in passed)
        refused += said
        yield shapes, dtype, [c for c in candidates if judged[c.name]]


def text(results: dict[str, Any]) -> str:
    rows: list[Row] = results["time"]
    lines = [report.facts(results["conditions"]), ""]
    for kind, what in (("wall_us", "Wall"), ("device_us", "Device (graph replay)"), ("peak_MiB", "Peak memory")):
        unit, scale = ("GiB", 1 / 1024) if kind == "peak_MiB" else ("ms", 1e-3)
        batches = list(dict.fromkeys(row["B"] for row in rows))
        cells = []
        for name in dict.fromkeys(row["contender"] for row in rows):
            found = {row["B"]: row[kind] * scale for row in rows if row["contender"] == name and kind in row}
            cells.append([name, *(number(found.get(B)) for B in batches)])
        lines += [table([f"{what}, {unit}; B =", *map(str, batches)], cells), ""]
    said = [f"not run at B = {row['B']}: {row['contender']}: {row['not_run']}" for row in rows if "not_run" in row]
    said += results["refused"]
    said += [f"no graph at B = {row['B']}: {row['contender']}: {row['no_graph']}" for row in rows if "no_graph" in row]
    return "\n".join([*lines, *said])


def main() -> None:
    options = on_gpu.parser(__doc__, "folder for gpu-contrast.json").parse_args()
    dry, deadline = options.dry_run, time.monotonic() + options.limit
    clock = Clock("cpu" if dry else "cuda")
    candidates = contenders(dry)
    d, k, batches = (DRY_D, DRY_K, DRY_BATCHES) if dry else (D, K, BATCHES)
    shapes = [(B, d, k) for B in batches]
    # On one core it would take minutes, in which the device waits.
    ours = [c.name for c in candidates if _of_ours(c)]
    jobs = [(name, B, d, k, clock.device) for B in (batches if dry else COMPILED_AHEAD) for name in ours]
    if not options.compiled:
        on_all_cores(_prepare, jobs[:1] if dry else jobs)
    if options.on_cue:
        deadline = on_gpu.wait_for(options.on_cue, compiled_rivals(candidates, shapes, clock.device))
    rows: list[Row] = []
    refused: list[str] = []
    results = {"conditions": run.on_a_gpu(clock.device), "refused": refused, "time": rows}
    folder = options.output or (None if dry else run.RESULTS)
    with run.progress(len(candidates) * len(batches)) as bar:
        for row in times(gated(work(candidates, shapes), clock, refused), clock, deadline, order=2):
            rows.append(row)
            bar.update()
            if folder:
                run.write_json(results, folder / "gpu-contrast.json")
    print(text(results))
    if refused:
        sys.exit(1)


if __name__ == "__main__":
    main()
