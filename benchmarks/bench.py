"""The alignment loss, forward + backward, beside its rivals: time, host overhead, memory, accuracy.

    python benchmarks/bench.py                    # everything, some ten minutes on two cores
    python benchmarks/bench.py --quick            # two shapes, a minute or two
    python benchmarks/bench.py --filter k=4,      # shapes by regular expression on "B=1024,d=512,k=4,"

What is measured stands in cases.py, how in measure.py. The machine must be idle (--force measures all the
same and records it), and every formulation must agree with a float64 SVD before a number is printed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import accuracy
import cases
import measure
import numpy
import torch
from cases import FLOOR, NATIVE, REDUCED, Case, Contender, embeddings
from tqdm import tqdm

from pmrl_kernels import dominant_sv_loss
from pmrl_kernels.ops import native

RESULTS = Path(__file__).with_name("results")
SECONDS = 4.0  # for each shape, shared by its contenders
QUICK_SECONDS = 2.0
LOOP_SECONDS = 0.02  # a turn where only overhead is measured: some hundred calls
SOLVER_MATRICES = 4096
SECTIONS = ("time", "overhead", "memory", "accuracy", "leading", "solvers")

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def gate(contenders: Sequence[Contender], ks: Iterable[int], progress: Callable[[str], None]) -> tuple[Contender, ...]:
    """The contenders, all of which agree with a float64 SVD; leaves the process if one does not.

    Where torch.compile does not work, its contenders come back with the reason. It also compiles for every
    k, so that no timing contains that.
    """
    passed = []
    for contender in contenders:
        for k in ks:
            for B, d in cases.GATE_SIZES:
                case = Case(B, d, k)
                if contender.loss is None or contender.declines(case):
                    continue
                progress(f"gate: {contender.name}, k = {k}")
                try:
                    error = accuracy.agreement(contender, embeddings(case, cases.GATE_COSINE))
                except torch._dynamo.exc.TorchDynamoException as failure:
                    reason = f"torch.compile failed, {str(failure).strip().split(':')[0]}"  # without paths
                    contender = dataclasses.replace(contender, unavailable=reason)
                    continue
                if not error <= contender.tolerance:
                    sys.exit(
                        f"{contender.name} is {error:.1e} from a float64 SVD at {case}, its tolerance is "
                        f"{contender.tolerance:.0e}. No time of a wrong result is printed."
                    )
        passed.append(contender)
    return tuple(passed)


def time_case(
    case: Case, contenders: Iterable[Contender], seconds: float, turn_seconds: float = measure.TURN_SECONDS
) -> list[Row]:
    """One row for each contender: its timing, or why it was not run."""
    xs = embeddings(case)
    reasons = {contender.name: contender.declines(case) for contender in contenders}
    calls = {c.name: functools.partial(c.step, xs) for c in contenders if reasons[c.name] is None}
    timings = measure.interleaved(calls, seconds, turn_seconds)
    size = {"B": case.B, "d": case.d, "k": case.k}
    return [
        {**size, "contender": name} | ({"not_run": reason} if reason else dataclasses.asdict(timings[name]))
        for name, reason in reasons.items()
    ]


def overhead_rows(contenders: Sequence[Contender], seconds: float) -> list[Row]:
    """Calls so small that only their overhead counts: in a loop, and single ones among the others'."""
    loop = time_case(cases.OVERHEAD, contenders, seconds, turn_seconds=LOOP_SECONDS)
    single = time_case(cases.OVERHEAD, contenders, seconds, turn_seconds=0.0)
    return [
        row | ({"single_ms": other["median_ms"]} if "median_ms" in other else {})
        for row, other in zip(loop, single, strict=True)
    ]


def memory_rows(contenders: Iterable[Contender], case: Case) -> list[Row]:
    """Peak memory of each contender in MiB and as a multiple of the gradients' size."""
    gradients = case.B * case.d * case.k * 4 / 2**20
    rows = []
    for contender in contenders:
        row: Row = {"contender": contender.name}
        # The full SVD is too slow to time at this size, but one call shows what it holds.
        reason = dataclasses.replace(contender, largest=None).declines(case)
        if contender.largest is not None and measure.available_memory() < 3 * case.B * case.d**2 * 4 / 2**20:
            reason = "not enough memory is free"
        if reason is None:
            try:
                row["MiB"] = measure.peak_memory(contender.name, case)
                row["of_gradients"] = row["MiB"] / gradients
            except RuntimeError as error:
                reason = f"could not be measured: {error}"
        rows.append(row | ({"not_run": reason} if reason else {}))
    return rows


def leading_rows(seconds: float) -> list[Row]:
    """The leading objective (power iteration) beside the softmax objective (the whole spectrum), in ms."""
    rows = []
    for case in cases.LEADING:
        xs = embeddings(case)

        def step(name: str, objective: str, xs: list[torch.Tensor] = xs) -> Sequence[torch.Tensor]:
            loss = dominant_sv_loss(xs, temperature=cases.TEMPERATURE, objective=objective, backend=name)
            return torch.autograd.grad(loss, xs)

        calls = {
            f"{name}, {objective}": functools.partial(step, name, objective)
            for name in cases.ON_A_CPU
            for objective in ("softmax", "leading")
        }
        timings = measure.interleaved(calls, seconds)
        rows.append({"B": case.B, "d": case.d, "k": case.k} | {name: t.median_ms for name, t in timings.items()})
    return rows


def solver_rows(seconds: float) -> list[Row] | str:
    """The k x k solvers alone, float64, one thread, in ns for each matrix; or why there is nothing to measure."""
    try:
        from pmrl_kernels import _numerics
    except ImportError:
        return "pmrl_kernels._numerics is not there: it is built in development installs"
    isa = native.build_info.get("isa") or "baseline"
    rows = []
    for case in cases.LEADING:
        X = torch.stack([x.detach() for x in embeddings(case._replace(B=SOLVER_MATRICES, d=64))], 1).double()
        gram = torch.bmm(X, X.mT)
        array = gram.numpy()
        calls: dict[str, Callable[[], object]] = {
            f"Jacobi ({isa})": functools.partial(_numerics.eigenpairs, array, isa),
            f"power iteration ({isa})": functools.partial(_numerics.leading_pair, array, False, isa),
            "numpy.linalg.eigh": functools.partial(numpy.linalg.eigh, array),
            "torch.linalg.eigh": functools.partial(torch.linalg.eigh, gram),
        }
        timings = measure.interleaved(calls, seconds)
        rows.append({"k": case.k} | {name: 1e6 * t.median_ms / SOLVER_MATRICES for name, t in timings.items()})
    return rows


# ------------------------------------------------------------------------------------------------
# What the times say
# ------------------------------------------------------------------------------------------------


def by_shape(rows: Iterable[Row]) -> dict[tuple[int, int, int], dict[str, float]]:
    """Median ms by (B, d, k) and contender, of those that were run."""
    shapes: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in rows:
        medians = shapes.setdefault((row["B"], row["d"], row["k"]), {})
        if "median_ms" in row:
            medians[row["contender"]] = row["median_ms"]
    return shapes


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """How native stands to the usual formulation, to the best in plain PyTorch (eager, compiled), and to the floor."""
    if NATIVE not in medians:
        return {}
    found = {"reduced/native": medians[REDUCED] / medians[NATIVE]}
    for kind in cases.RIVALS:
        times = [medians[c.name] for c in cases.CONTENDERS if c.rival == kind and c.name in medians]
        if times:
            found[f"{kind}/native"] = min(times) / medians[NATIVE]
    return found | {"native/floor": medians[NATIVE] / medians[FLOOR]}


def summary(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Geometric mean, least and greatest of each ratio over all shapes."""
    collected: dict[str, list[float]] = {}
    for medians in by_shape(rows).values():
        for name, ratio in ratios(medians).items():
            collected.setdefault(name, []).append(ratio)
    return {
        name: {"geometric_mean": math.exp(math.fsum(map(math.log, x)) / len(x)), "least": min(x), "greatest": max(x)}
        for name, x in collected.items()
    }


def losses(rows: Iterable[Row]) -> list[str]:
    """Every shape at which some formulation is faster than native."""
    lost = []
    for (B, d, k), medians in by_shape(rows).items():
        for name, median in medians.items():
            rival = name not in (NATIVE, FLOOR, cases.MEAN_SQUARED_ERROR.name)
            if rival and NATIVE in medians and median < medians[NATIVE]:
                lost.append(f"{Case(B, d, k)}: {name} takes {median / medians[NATIVE]:.2f} of native's time")
    return lost


# ------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------


def number(x: float | None) -> str:
    """Three digits; a dash for what was not run."""
    if x is None:
        return "-"
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def report(results: dict[str, Any]) -> str:
    """The whole report as text."""
    c = results["conditions"]
    parts = [
        f"Alignment loss, forward + backward, float32, temperature {cases.TEMPERATURE}, {describe(c)}.",
        "Contenders take turns within one process; median times in ms.",
    ]
    if c["forced"]:
        parts.append("FORCED, read nothing into these numbers: " + "; ".join(c["busy"]) + ".")

    if "time" in results:
        shapes = by_shape(results["time"])
        names = ("reduced/native", *(f"{kind}/native" for kind in cases.RIVALS), "native/floor")
        body = []
        for (B, d, k), medians in shapes.items():
            ratio = ratios(medians)
            times = [number(medians.get(contender.name)) for contender in cases.CONTENDERS]
            body.append([f"{B}, {d}, {k}", *times, *(number(ratio.get(name)) for name in names)])
        parts += ["", table(["B, d, k", *(contender.column for contender in cases.CONTENDERS), *names], body)]
        parts.append(
            "eager: k-space. compiled: the better of compiled and Jacobi, by shape. eigh: Gram + eigh through autograd."
        )
        for reason in sorted({f"{r['contender']}: {r['not_run']}" for r in results["time"] if "not_run" in r}):
            parts.append(f"Not run: {reason}.")
        for name, s in results["summary"].items():
            parts.append(
                f"{name}: geometric mean {s['geometric_mean']:.2f}, from {s['least']:.2f} to {s['greatest']:.2f}"
            )
    if "losing" in results:
        parts += ["", "Where native loses: " + ("; ".join(results["losing"]) or "none") + "."]

    if "overhead" in results:
        parts += ["", f"Host overhead, forward + backward in µs at {cases.OVERHEAD}"]
        parts.append(
            table(
                ["", "in a loop", "single call"],
                [
                    [r["contender"], number(1e3 * r["median_ms"]), number(1e3 * r["single_ms"])]
                    for r in results["overhead"]
                    if "median_ms" in r
                ],
            )
        )
    if "memory" in results:
        parts += ["", f"Peak memory beyond the embeddings at {cases.MEMORY}, gradients included, and / gradients"]
        rows = [
            [r["contender"], number(r.get("MiB")), number(r.get("of_gradients")), r.get("not_run", "")]
            for r in results["memory"]
        ]
        parts.append(table(["", "MiB", "multiple", ""], rows))
    if "accuracy" in results:
        parts += ["", "Largest error of singular values, in eps32·σ₁"]
        parts.append(plain_table(results["accuracy"]["sigma"], ("spectrum", "k")))
        parts += ["", f"Relative error of the gradient at {accuracy.GRADIENT_CASE} by the modalities' cosine"]
        parts.append(plain_table(results["accuracy"]["gradient"], ("cosine",), "{:.1e}".format))
    if "leading" in results:
        parts += ["", "The leading objective beside the softmax objective, ms"]
        parts.append(plain_table(results["leading"], ("B", "d", "k")))
    if "solvers" in results:
        parts += ["", "k x k solvers alone, float64, one thread, ns for each matrix"]
        found = results["solvers"]
        parts.append(found if isinstance(found, str) else plain_table(found, ("k",)))
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines())


def plain_table(rows: Sequence[Row], keys: Sequence[str], form: Callable[[float], str] = number) -> str:
    """Rows of one and the same shape: first the keys, then numbers."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in keys))
    body = [
        [*(f"{row[key]}" for key in keys), *(form(row[name]) if name in row else "-" for name in columns)]
        for row in rows
    ]
    return table([*keys, *columns], body)


def describe(c: dict[str, Any]) -> str:
    """The conditions in one line."""
    return (
        f"{c['processor']}, {c['threads']} threads, {c['native_isa']} kernels, torch {c['torch']}, "
        f"Python {c['python']}, commit {c['commit']}, load {c['load']}" + (", FORCED: busy" if c["forced"] else "")
    )


def write(results: dict[str, Any], folder: Path, device: str) -> list[Path]:
    """<device>.json with everything, <device>.csv with the times, <device>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{device}.json"]
    paths[0].write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if "time" in results:
        from figure import draw

        paths += [folder / f"{device}.csv", folder / f"{device}.png"]
        columns = ["B", "d", "k", "contender", "median_ms", "low_ms", "high_ms", "rounds", "not_run"]
        with paths[1].open("w", newline="") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in results["conditions"].items())
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(results["time"])
        draw(results["time"], f"Forward + backward, float32. {describe(results['conditions'])}", paths[2])
    return paths


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer rounds")
    parser.add_argument("--filter", default="", help='shapes by regular expression on "B=1024,d=512,k=4,"')
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too, and record it")
    parser.add_argument(
        "--output", type=Path, help=f"folder for the results; default: {RESULTS.name}/ if everything was measured"
    )
    arguments = parser.parse_args(argv)
    shapes = [
        case for case in (cases.QUICK if arguments.quick else cases.CASES) if re.search(arguments.filter, f"{case},")
    ]
    if not shapes:
        parser.error(f"no shape matches {arguments.filter!r}")
    whole = shapes == list(cases.CASES) and set(arguments.sections) == set(SECTIONS)
    folder = arguments.output or (RESULTS if whole else None)

    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")  # torch.compile's own
    load = measure.load_average()
    reasons = measure.busy(arguments.threads)
    if reasons and not arguments.force:
        sys.exit(f"This machine is busy: {'; '.join(reasons)}. Wait, or pass --force.")
    results: dict[str, Any] = {"conditions": measure.conditions(arguments.threads, reasons, load)}

    seconds = QUICK_SECONDS if arguments.quick else SECONDS
    with tqdm(total=1 + len(shapes) + len(arguments.sections), leave=False) as progress:
        gated = {
            "time": {case.k for case in shapes},
            "overhead": {cases.OVERHEAD.k},
            "accuracy": {accuracy.GRADIENT_CASE.k},
        }
        ks = sorted(set().union(*(gated.get(name, set()) for name in arguments.sections)))
        contenders = gate(cases.CONTENDERS, ks, progress.set_description)
        progress.update()
        if "time" in arguments.sections:
            results["time"] = []
            for case in shapes:
                progress.set_description(str(case))
                results["time"] += time_case(case, contenders, seconds)
                progress.update()
        sections: dict[str, Callable[[], Any]] = {
            "overhead": lambda: overhead_rows((*contenders, cases.MEAN_SQUARED_ERROR), seconds),
            "memory": lambda: memory_rows(contenders, cases.MEMORY),
            "accuracy": lambda: {
                "sigma": accuracy.sigma_errors(),
                "gradient": accuracy.gradient_errors(contenders),
            },
            "leading": lambda: leading_rows(seconds),
            "solvers": lambda: solver_rows(seconds / 2),
        }
        for name, section in sections.items():
            if name in arguments.sections:
                progress.set_description(name)
                results[name] = section()
                progress.update()

    timed = results.get("time", []) + results.get("overhead", [])
    if timed:
        results["summary"], results["losing"] = summary(results.get("time", [])), losses(timed)
    print(report(results))
    if folder:
        print("\nWritten: " + ", ".join(str(path) for path in write(results, folder, shapes[0].device)))
    return results


if __name__ == "__main__":
    main()
