"""The contrasts and the whole objective on a CPU, forward + backward, beside the matrix products they are made of.

    python benchmarks/contrast.py            # two minutes on two idle cores; prints, and writes results/contrast.json
    python benchmarks/contrast.py --force    # on a busy machine, which the results then say

A product of B x B similarities counts as one, in float32. As in bench.py, contenders take turns in one process, medians
are reported, and nothing is timed that does not agree with float64.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench
import formulations
import measure
import objectives
import peak_memory
import torch
from cases import Case, embeddings
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from pmrl_kernels import instance_contrastive_loss, ops, pmrl_loss

TAU, CONTRAST_TAU = 0.05, 0.1
INSTANCES = ((1024, 512), (1024, 128), (4096, 512), (4096, 128))
MODALITIES = (Case(1024, 512, 4), Case(4096, 128, 6))
OBJECTIVE = Case(1024, 512, 4)
LARGE = (16384, 512)  # where memory is measured
TEMPERATURES = (0.02, 0.05, 0.1)
SECONDS = 8.0  # for each shape

TAUS = {"temperature": TAU, "tau": CONTRAST_TAU}
RIVALS: dict[str, Callable[..., Tensor]] = {
    "torch k-space, compiled": objectives.k_space_compiled,
    "torch k-space": objectives.k_space,
    "Gram + eigh": objectives.gram_eigh,
    "reduced SVD": objectives.reduced_svd,
}

Call = Callable[[], object]
Row = dict[str, Any]


def unit_rows(B: int, d: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(B, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def ours(xs: Sequence[Tensor], backend: str, contrast: str = "leading") -> Tensor:
    return pmrl_loss(xs, temperature=TAU, instance_temperature=CONTRAST_TAU, contrast=contrast, backend=backend)


def step(loss: Callable[[Any], Tensor], inputs: Any) -> Call:
    leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    return lambda: torch.autograd.grad(loss(inputs), leaves)


def operators_step(u: Tensor, columns: Tensor | None = None) -> Call:
    """The instance term alone, on vectors that are given: no normalisation, no autograd."""
    native, one = ops.available["native"].operators, torch.ones(())
    every = None if columns is None else native.instance_forward(columns, None, 0, None, CONTRAST_TAU)[1]

    def call() -> object:
        _, losses, state = native.instance_forward(u, columns, 0, None, CONTRAST_TAU)
        losses = losses if every is None else every
        return native.instance_backward(u, columns, 0, None, CONTRAST_TAU, losses, state, one)

    return call


def products(rows: Tensor, columns: Tensor, count: int) -> Call:
    """So many matrix products as a contrast makes: S = R Cᵀ, and S C or Sᵀ R."""
    S, R, C = rows @ columns.T, torch.empty_like(rows), torch.empty_like(columns)
    kinds: list[Call] = [
        lambda: torch.mm(rows, columns.T, out=S),
        lambda: torch.mm(S, columns, out=R),
        lambda: torch.mm(S.T, rows, out=C),
    ]
    order = [kinds[i % 2] if count < 3 else kinds[i % 3] for i in range(count)]
    return lambda: [kind() for kind in order]


# ------------------------------------------------------------------------------------------------
# Sections
# ------------------------------------------------------------------------------------------------


def gate() -> None:
    """Leaves the process if a loss that will be timed, or its gradient, is not that of float64."""
    xs = embeddings(Case(300, 64, 3))
    wide = [x.detach().double().requires_grad_() for x in xs]
    exact = functools.partial(objectives.reduced_svd, **TAUS)
    checks: list[tuple[str, Call, Call]] = [
        ("pmrl_loss", lambda: ours(xs, "native"), lambda: exact(wide)),
        ("modality", lambda: ours(xs, "native", "modality"), lambda: ours(wide, "reference", "modality")),
        (
            "instance",
            lambda: instance_contrastive_loss(xs[0], CONTRAST_TAU, backend="native"),
            lambda: objectives.instance_contrast(wide[0], CONTRAST_TAU),
        ),
        *((name, functools.partial(f, xs, **TAUS), lambda: exact(wide)) for name, f in RIVALS.items()),
    ]
    for name, loss, truth in checks:
        found, expected = loss(), truth()
        errors = [
            ((a.double() - b).norm() / b.norm()).item()
            for a, b in zip(
                (found.detach(), *torch.autograd.grad(found, xs, allow_unused=True)),
                (expected.detach(), *torch.autograd.grad(expected, wide, allow_unused=True)),
                strict=True,
            )
            if a is not None or b is not None
        ]
        wrong = [error for error in errors if not error < 1e-3]  # a NaN too
        if wrong:
            sys.exit(f"{name} is {wrong[0]:.1e} from float64. No time of a wrong result is printed.")


def timed(section: str, size: dict[str, int], calls: dict[str, Call], floor: str, seconds: float) -> list[Row]:
    """One row for each call: its median, and that over the floor's."""
    found = measure.interleaved(calls, seconds)
    base = found[floor].median_ms
    return [
        {"section": section, **size, "call": name, "ms": t.median_ms, "of_floor": t.median_ms / base, "floor": floor}
        for name, t in found.items()
    ]


def instance_rows(B: int, d: int, seconds: float) -> list[Row]:
    u, x = unit_rows(B, d), torch.randn(B, d, requires_grad=True)
    whole: dict[str, Call] = {
        "2 products": products(u, u, 2),
        "operators": operators_step(u),
        "instance_contrastive_loss": step(
            lambda x: instance_contrastive_loss(x, CONTRAST_TAU, backend="native"), x
        ),
        "the same, normalize=False": step(
            lambda x: instance_contrastive_loss(x, CONTRAST_TAU, normalize=False, backend="native"), x
        ),
        "F.cross_entropy": step(functools.partial(objectives.instance_contrast, tau=CONTRAST_TAU), x),
    }  # fmt: skip
    own = u[: B // 2]
    share: dict[str, Call] = {"3 products": products(own, u, 3), "operators": operators_step(own, u)}
    size = {"B": B, "d": d, "k": 1}
    return [
        *timed("instance", size, whole, "2 products", seconds),
        *timed("instance, one of two processes", size, share, "3 products", seconds / 2),
    ]


def modality_rows(case: Case, seconds: float) -> list[Row]:
    xs, u = embeddings(case), unit_rows(case.B, case.d)
    k = case.k
    calls: dict[str, Call] = {f"{3 * k} products": products(u, u, 3 * k)}
    if k * case.B**2 > 1 << 22:  # similarities that are not kept are formed twice
        calls[f"{4 * k} products"] = products(u, u, 4 * k)
    calls |= {
        "pmrl_loss": step(functools.partial(ours, backend="native", contrast="modality"), xs),
        "InfoNCE over all pairs": step(functools.partial(objectives.all_pairs, tau=CONTRAST_TAU), xs),
    }
    return timed("modality", {"B": case.B, "d": case.d, "k": k}, calls, f"{3 * k} products", seconds)


def objective_rows(case: Case, seconds: float) -> list[Row]:
    xs, u = embeddings(case), unit_rows(case.B, case.d)
    two = products(u, u, 2)

    def floor() -> None:
        formulations.floor(xs)
        two()

    calls: dict[str, Call] = {
        "floor + 2 products": floor,
        "native": step(functools.partial(ours, backend="native"), xs),
        "reference": step(functools.partial(ours, backend="reference"), xs),
        **{name: step(functools.partial(f, **TAUS), xs) for name, f in RIVALS.items()},
    }
    return timed("objective", {"B": case.B, "d": case.d, "k": case.k}, calls, "floor + 2 products", seconds)


def accuracy_rows() -> list[Row]:
    """Relative errors of float32 beside float64, of rows in clusters, where losses depend on rounding most."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(64, 512, generator=generator, dtype=torch.float64)
    rows = []
    for noise in (0.1, 1.0):
        wide = (centres.repeat(8, 1) + noise * torch.randn(512, 512, generator=generator, dtype=torch.float64)).float()
        for tau in TEMPERATURES:
            x = wide.double().requires_grad_()
            exact = objectives.instance_contrast(x, tau)
            (gradient,) = torch.autograd.grad(exact, x)
            for name, loss in (
                ("native", lambda x, tau: instance_contrastive_loss(x, tau, backend="native")),
                ("F.cross_entropy", objectives.instance_contrast),
            ):
                y = wide.clone().requires_grad_()
                found = loss(y, tau)
                (grad,) = torch.autograd.grad(found, y)
                rows.append({
                    "noise": noise, "tau": tau, "call": name, "exact": exact.item(),
                    "loss": ((found.double() - exact).abs() / exact).item(),
                    "gradient": ((grad.double() - gradient).norm() / gradient.norm()).item(),
                })  # fmt: skip
    return rows


def memory(B: int, d: int) -> float:
    """MiB that the instance term takes beyond its rows at the peak of forward + backward, in a fresh process."""
    result = subprocess.run(
        [sys.executable, __file__, "--memory", str(B), str(d)], capture_output=True, text=True, check=True
    )
    return float(result.stdout.strip().splitlines()[-1])


def measure_memory(B: int, d: int) -> None:
    ctypes.CDLL(None).mallopt(peak_memory.M_MMAP_THRESHOLD, 1 << 16)
    u = unit_rows(B, d)
    operators_step(unit_rows(8, 16))()
    call = operators_step(u)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory.kibibytes("VmRSS")
    call()
    print((peak_memory.kibibytes("VmHWM") - before) / 1024)


def report(results: dict[str, Any]) -> str:
    lines = [json.dumps(results["conditions"]), ""]
    for row in results["time"]:
        size = f"({row['B']}, {row['d']}, {row['k']})"
        times = f"{row['ms']:9.3f} ms  {row['of_floor']:6.2f} x {row['floor']}"
        lines.append(f"{row['section']:32} {size:16} {row['call']:28} {times}")
    B, d = LARGE
    lines.append(
        f"\nmemory at B = {B}, d = {d}: {results['memory_MiB']:.0f} MiB, rows are {B * d * 4 / 2**20:.0f} MiB\n"
    )
    for row in results["accuracy"]:
        lines.append(
            f"noise {row['noise']}, tau {row['tau']}: {row['call']:16} loss {row['exact']:.3g} "
            f"error {row['loss']:.1e}, gradient error {row['gradient']:.1e}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    parser.add_argument("--output", type=Path, default=bench.RESULTS)
    parser.add_argument("--memory", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.memory:
        measure_memory(*options.memory)
        return {}
    threads, load = torch.get_num_threads(), measure.load_average()
    reasons = measure.busy(threads)
    if reasons and not options.force:
        sys.exit("This machine is busy: " + "; ".join(reasons) + ". --force measures all the same.")
    gate()
    seconds = SECONDS / (10 if options.quick else 1)
    jobs = [
        *(functools.partial(instance_rows, B, d) for B, d in INSTANCES),
        *(functools.partial(modality_rows, case) for case in MODALITIES),
        functools.partial(objective_rows, OBJECTIVE),
    ]
    rows = [row for job in tqdm(jobs, desc="shapes") for row in job(seconds)]
    results = {
        "conditions": measure.conditions(threads, reasons, load),
        "time": rows,
        "memory_MiB": memory(*LARGE),
        "accuracy": accuracy_rows(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "contrast.json").write_text(json.dumps(results, indent=1) + "\n")
    print(report(results))
    return results


if __name__ == "__main__":
    main()
