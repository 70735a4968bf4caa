"""An operation beside what it is compared with: which calls at which sizes, checks before, turns, a table, JSON.

A command lists its comparisons and its checks, and :func:`main` does the rest; lib/__init__.py shows one whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import accuracy, measure, report, run
from .cases import Case
from .measure import Call

TOLERANCE = 1e-3  # of losses and gradients, relative to float64: wide enough for float32, for no wrong formula

Row = dict[str, Any]


class Comparison(NamedTuple):
    """Calls that take turns."""

    section: str
    cases: Sequence[Case]
    calls: Callable[[Case], Mapping[str, Call]]
    """By name, the floor first: the least that the work can cost."""
    share: float = 1.0
    """Of the seconds for a case."""


class Check(NamedTuple):
    """A loss that will be timed, and the same in float64."""

    name: str
    loss: Callable[[], Tensor]
    inputs: Sequence[Tensor]
    exact: Callable[[], Tensor]
    doubles: Sequence[Tensor]


class Section(NamedTuple):
    """Whatever a command measures beside its comparisons."""

    measure: Callable[[], Any]
    text: Callable[[Any], str]


def step(loss: Callable[[Any], Tensor], inputs: Any) -> Call:
    """Forward + backward of a loss of one tensor, or of a list of them."""
    leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    return lambda: torch.autograd.grad(loss(inputs), leaves)


def gate(checks: Sequence[Check]) -> None:
    """Leaves the process if a loss that will be timed, or its gradient, is not that of float64."""
    for check in checks:
        error = accuracy.error(check.loss(), check.inputs, check.exact(), check.doubles)
        if not error < TOLERANCE:  # a NaN too
            accuracy.refuse(f"{check.name} is {error:.1e} from float64")


def rows(comparison: Comparison, case: Case, seconds: float) -> list[Row]:
    """One for each call: its median, and that over the floor's."""
    timings = measure.interleaved(comparison.calls(case), seconds * comparison.share)
    medians = {name: timing.median_ms for name, timing in timings.items()}
    floor, least = next(iter(medians.items()))
    shared = {"section": comparison.section, "B": case.B, "d": case.d, "k": case.k}
    return [{**shared, "call": name, "ms": ms, "of_floor": ms / least, "floor": floor} for name, ms in medians.items()]


def text(found: Sequence[Row]) -> str:
    lines = []
    for row in found:
        size = f"({row['B']}, {row['d']}, {row['k']})"
        times = f"{row['ms']:9.3f} ms  {row['of_floor']:6.2f} x {row['floor']}"
        lines.append(f"{row['section']:32} {size:16} {row['call']:28} {times}")
    return "\n".join(lines)


def main(
    doc: str,
    name: str,
    comparisons: Callable[[], Sequence[Comparison]],
    checks: Callable[[], Sequence[Check]],
    seconds: float,
    sections: Mapping[str, Section] | None = None,
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The command: ``seconds`` for each case, results to ``name``.json."""
    parser = run.parser(doc, quick="a tenth of the time", force=True, output=f"folder for {name}.json")
    parser.add_argument("--threads", type=int, help="default: as many as PyTorch takes")
    parser.set_defaults(output=run.RESULTS)
    options = parser.parse_args(argv)
    conditions = run.on_a_cpu(options.force, options.threads)
    gate(checks())
    seconds = seconds / 10 if options.quick else seconds
    jobs = [functools.partial(rows, comparison, case) for comparison in comparisons() for case in comparison.cases]
    results: dict[str, Any] = {"conditions": conditions, "time": []}
    sections = sections or {}
    with run.progress(len(jobs) + len(sections), "shapes") as bar:
        for job in jobs:
            results["time"] += job(seconds)
            bar.update()
        for key, section in sections.items():
            results[key] = section.measure()
            bar.update()
    parts = [report.facts(conditions), *report.warning(conditions), "", text(results["time"])]
    print("\n".join([*parts, *(f"\n{section.text(results[key])}" for key, section in sections.items())]))
    run.write_json(results, options.output / f"{name}.json")
    return results
