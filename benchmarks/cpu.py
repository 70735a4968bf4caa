"""The alignment loss on a CPU, forward + backward, beside its rivals: time, host overhead, memory, accuracy.

    python benchmarks/cpu.py                    # everything, some ten minutes on two cores
    python benchmarks/cpu.py --quick            # two shapes, a minute or two
    python benchmarks/cpu.py --filter k=4,      # shapes by regular expression on "B=1024,d=512,k=4,"

What is measured stands in lib/cases.py, how in lib/measure.py. The machine must be idle (--force measures all the
same and records it), and every formulation must agree with a float64 SVD before a number is printed.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from lib import accuracy, cases, figures, measure, memory, ratios, report, run
from lib.cases import Case, Contender, embeddings
from lib.report import number, plain_table, table

from pmrl_kernels import dominant_sv_loss
from pmrl_kernels.ops import native

SECONDS = 4.0  # for each shape, shared by its contenders
QUICK_SECONDS = 2.0
LOOP_SECONDS = 0.02  # a turn where only overhead is measured: some hundred calls
SOLVER_MATRICES = 4096
CSV_COLUMNS = ("B", "d", "k", "contender", "median_ms", "low_ms", "high_ms", "rounds", "not_run")

Row = dict[str, Any]


class Plan(NamedTuple):
    """What a run measures."""

    shapes: Sequence[Case]
    contenders: Sequence[Contender]
    seconds: float
    progress: Callable[[str], None]


def gate(contenders: Sequence[Contender], ks: Iterable[int], progress: Callable[[str], None]) -> tuple[Contender, ...]:
    """The contenders, all of which agree with a float64 SVD; leaves the process if one does not.

    Where torch.compile does not work, its contenders come back with the reason. It also compiles for every
    k, so that no timing contains that.
    """
    passed = []
    for contender in contenders:
        for case in (Case(B, d, k) for k in ks for B, d in cases.GATE_SIZES):
            if contender.loss is None or contender.declines(case):
                continue
            progress(f"gate: {contender.name}, k = {case.k}")
            try:
                error = accuracy.agreement(contender, embeddings(case, cases.GATE_COSINE))
            except torch._dynamo.exc.TorchDynamoException as failure:
                reason = f"torch.compile failed, {str(failure).strip().split(':')[0]}"  # without paths
                contender = dataclasses.replace(contender, unavailable=reason)
                continue
            if not error <= contender.tolerance:
                tolerance = f"its tolerance is {contender.tolerance:.0e}"
                accuracy.refuse(f"{contender.name} is {error:.1e} from a float64 SVD at {case}, {tolerance}")
        passed.append(contender)
    return tuple(passed)


# ------------------------------------------------------------------------------------------------
# Time, and the overhead of small calls
# ------------------------------------------------------------------------------------------------


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


def time_rows(plan: Plan) -> list[Row]:
    rows = []
    for n, case in enumerate(plan.shapes, 1):
        plan.progress(f"{case}, {n} of {len(plan.shapes)}")
        rows += time_case(case, plan.contenders, plan.seconds)
    return rows


def time_text(rows: Sequence[Row]) -> str:
    body = []
    for (B, d, k), medians in ratios.by_shape(rows).items():
        ratio = ratios.ratios(medians)
        times = [number(medians.get(contender.name)) for contender in cases.CONTENDERS]
        body.append([f"{B}, {d}, {k}", *times, *(number(ratio.get(name)) for name in ratios.NAMES)])
    parts = [
        table(["B, d, k", *(contender.column for contender in cases.CONTENDERS), *ratios.NAMES], body),
        "eager: k-space. compiled: the better of compiled and Jacobi, by shape. eigh: Gram + eigh through autograd.",
    ]
    parts += [f"Not run: {r}." for r in sorted({f"{r['contender']}: {r['not_run']}" for r in rows if "not_run" in r})]
    for name, s in ratios.summary(rows).items():
        parts.append(f"{name}: geometric mean {s['geometric_mean']:.2f}, from {s['least']:.2f} to {s['greatest']:.2f}")
    return "\n".join(parts)


def overhead_rows(plan: Plan) -> list[Row]:
    """Calls so small that only their overhead counts: in a loop, and single ones among the others'."""
    contenders = (*plan.contenders, cases.MEAN_SQUARED_ERROR)
    loop = time_case(cases.OVERHEAD, contenders, plan.seconds, turn_seconds=LOOP_SECONDS)
    single = time_case(cases.OVERHEAD, contenders, plan.seconds, turn_seconds=0.0)
    return [
        row | ({"single_ms": other["median_ms"]} if "median_ms" in other else {})
        for row, other in zip(loop, single, strict=True)
    ]


def overhead_text(rows: Sequence[Row]) -> str:
    body = [
        [r["contender"], number(1e3 * r["median_ms"]), number(1e3 * r["single_ms"])] for r in rows if "median_ms" in r
    ]
    header = f"Host overhead, forward + backward in µs at {cases.OVERHEAD}"
    return f"{header}\n{table(['', 'in a loop', 'single call'], body)}"


# ------------------------------------------------------------------------------------------------
# Memory and accuracy
# ------------------------------------------------------------------------------------------------


def memory_rows(plan: Plan) -> list[Row]:
    """Peak memory of each contender in MiB and as a multiple of the gradients' size."""
    case = cases.MEMORY
    gradients = case.B * case.d * case.k * 4 / 2**20
    rows = []
    for contender in plan.contenders:
        row: Row = {"contender": contender.name}
        # The full SVD is too slow to time at this size, but one call shows what it holds.
        reason = dataclasses.replace(contender, largest=None).declines(case)
        if contender.largest is not None and memory.available() < 3 * case.B * case.d**2 * 4 / 2**20:
            reason = "not enough memory is free"
        if reason is None:
            try:
                row["MiB"] = memory.of_contender(contender.name, case)
                row["of_gradients"] = row["MiB"] / gradients
            except RuntimeError as error:
                reason = f"could not be measured: {error}"
        rows.append(row | ({"not_run": reason} if reason else {}))
    return rows


def memory_text(rows: Sequence[Row]) -> str:
    body = [[r["contender"], number(r.get("MiB")), number(r.get("of_gradients")), r.get("not_run", "")] for r in rows]
    header = f"Peak memory beyond the embeddings at {cases.MEMORY}, gradients included, and / gradients"
    return f"{header}\n{table(['', 'MiB', 'multiple', ''], body)}"


def accuracy_rows(plan: Plan) -> dict[str, list[Row]]:
    return {"sigma": accuracy.sigma_errors(), "gradient": accuracy.gradient_errors(plan.contenders)}


def accuracy_text(found: Mapping[str, Sequence[Row]]) -> str:
    return "\n".join(
        [
            "Largest error of singular values, in eps32·σ₁",
            plain_table(found["sigma"], ("spectrum", "k")),
            "",
            f"Relative error of the gradient at {accuracy.GRADIENT_CASE} by the modalities' cosine",
            plain_table(found["gradient"], ("cosine",), "{:.1e}".format),
        ]
    )


# ------------------------------------------------------------------------------------------------
# The leading objective, and the solvers alone
# ------------------------------------------------------------------------------------------------


def leading_rows(plan: Plan) -> list[Row]:
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
        timings = measure.interleaved(calls, plan.seconds)
        rows.append({"B": case.B, "d": case.d, "k": case.k} | {name: t.median_ms for name, t in timings.items()})
    return rows


def leading_text(rows: Sequence[Row]) -> str:
    return f"The leading objective beside the softmax objective, ms\n{plain_table(rows, ('B', 'd', 'k'))}"


def solver_rows(plan: Plan) -> list[Row] | str:
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
        calls: dict[str, measure.Call] = {
            f"Jacobi ({isa})": functools.partial(_numerics.eigenpairs, array, isa),
            f"power iteration ({isa})": functools.partial(_numerics.leading_pair, array, False, isa),
            "numpy.linalg.eigh": functools.partial(numpy.linalg.eigh, array),
            "torch.linalg.eigh": functools.partial(torch.linalg.eigh, gram),
        }
        timings = measure.interleaved(calls, plan.seconds / 2)
        rows.append({"k": case.k} | {name: 1e6 * t.median_ms / SOLVER_MATRICES for name, t in timings.items()})
    return rows


def solver_text(found: Sequence[Row] | str) -> str:
    body = found if isinstance(found, str) else plain_table(found, ("k",))
    return f"k x k solvers alone, float64, one thread, ns for each matrix\n{body}"


# ------------------------------------------------------------------------------------------------
# The whole
# ------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    measure: Callable[[Plan], Any]
    text: Callable[[Any], str]
    gated: Callable[[Sequence[Case]], set[int]] = lambda shapes: set()
    """The k for which it takes contenders, given the shapes of the run."""


SECTIONS = {
    "time": Section(time_rows, time_text, lambda shapes: {case.k for case in shapes}),
    "overhead": Section(overhead_rows, overhead_text, lambda shapes: {cases.OVERHEAD.k}),
    "memory": Section(memory_rows, memory_text),
    "accuracy": Section(accuracy_rows, accuracy_text, lambda shapes: {accuracy.GRADIENT_CASE.k}),
    "leading": Section(leading_rows, leading_text),
    "solvers": Section(solver_rows, solver_text),
}


def text(results: Mapping[str, Any]) -> str:
    """The whole report."""
    conditions = results["conditions"]
    parts = [
        f"Alignment loss, forward + backward, float32, temperature {cases.TEMPERATURE}, {report.machine(conditions)}.",
        "Contenders take turns within one process; median times in ms.",
        *report.warning(conditions),
    ]
    for name, section in SECTIONS.items():
        if name == "overhead" and "losing" in results:
            parts += ["", "Where native loses: " + ("; ".join(results["losing"]) or "none") + "."]
        if name in results:
            parts += ["", section.text(results[name])]
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines())


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """cpu.json with everything; cpu.csv and cpu.png with the times."""
    paths = [run.write_json(results, folder / "cpu.json")]
    if "time" in results:
        paths.append(run.write_csv(results, CSV_COLUMNS, folder / "cpu.csv"))
        paths.append(figures.draw_cpu(results, folder / "cpu.png"))
    return paths


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    where = f"folder for the results; default: {run.RESULTS.name}/ if everything was measured"
    parser = run.parser(__doc__, quick="two shapes, fewer rounds", output=where, force=True)
    parser.add_argument("--filter", default="", help='shapes by regular expression on "B=1024,d=512,k=4,"')
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--threads", type=int, help="default: as many as PyTorch takes")
    options = parser.parse_args(argv)
    shapes = [case for case in (cases.QUICK if options.quick else cases.CASES) if re.search(options.filter, f"{case},")]
    if not shapes:
        parser.error(f"no shape matches {options.filter!r}")
    whole = shapes == list(cases.CASES) and set(options.sections) == set(SECTIONS)
    folder = options.output or (run.RESULTS if whole else None)

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")  # torch.compile's own
    results: dict[str, Any] = {"conditions": run.on_a_cpu(options.force, options.threads)}
    wanted = {name: section for name, section in SECTIONS.items() if name in options.sections}
    ks = sorted(set().union(*(section.gated(shapes) for section in wanted.values())))
    with run.progress(1 + len(wanted)) as bar:
        contenders = gate(cases.CONTENDERS, ks, bar.set_description)
        bar.update()
        plan = Plan(shapes, contenders, QUICK_SECONDS if options.quick else SECONDS, bar.set_description)
        for name, section in wanted.items():
            bar.set_description(name)
            results[name] = section.measure(plan)
            bar.update()

    timed = results.get("time", []) + results.get("overhead", [])
    if timed:
        results["summary"], results["losing"] = ratios.summary(results.get("time", [])), ratios.losses(timed)
    print(text(results))
    if folder:
        print("\nWritten: " + ", ".join(map(str, write(results, folder))))
    return results


if __name__ == "__main__":
    main()
