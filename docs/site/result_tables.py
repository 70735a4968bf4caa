"""What a file of benchmarks/results recorded, as tables in Markdown, for the directive of results.py. Needs no Sphinx.

Names the command, the device and the versions, and after each table of times the rows in which something else was
faster than what is computed here. A list that is not described below comes as a table of all it holds.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from lib.report import number, warning  # noqa: E402  (a folder of programs, no package)

Row = Mapping[str, Any]
NUMBER = re.compile(r"-?[\d.]+(e[-+]?\d+)?¹?$")


class Times(NamedTuple):
    """A list of times by shape and contender, as a table with a row for each shape."""

    title: str
    values: tuple[tuple[str, str], ...]  # key of a row -> what its table is called
    contender: str  # the key that names the column
    shape: tuple[str, ...] = ("B", "d", "k")
    sections: str | None = None  # the key by whose values rows go to tables of their own
    beside: Mapping[str, tuple[str, ...]] = {}  # ours -> what it is compared with
    over: Mapping[str, tuple[str, str]] = {}  # what is computed -> two whose times' ratio gets a table of its own


class Record(NamedTuple):
    """A file: the command that writes it, and what its lists are."""

    command: str
    lists: Mapping[str, Times | str]  # times, or the title of a plain table


_TORCH = (
    "full SVD",
    "reduced SVD",
    "svdvals",
    "Gram + eigh",
    "torch k-space",
    "torch k-space, compiled",
    "torch k-space, compiled Jacobi",
)
_GPU_SVD = ("full SVD", "reduced SVD, gesvd", "reduced SVD, gesvdj", "reduced SVD, gesvda", *_TORCH[2:5])
_ALL_PAIRS = ("InfoNCE over all pairs",)

RECORDS: Mapping[str, Record] = {
    "cpu": Record(
        "make bench",
        {
            "time": Times(
                "The alignment loss, forward + backward, τ = 0.05",
                (("median_ms", "median, ms"),),
                "contender",
                beside={"native": _TORCH},
            ),
            "overhead": "Where only overhead counts: ms of a call in a loop, and of a single call among other work",
            "memory": "Peak memory at (1024, 1024, 4), gradients included",
            "sigma": "Largest error of a singular value, in eps32·σ₁",
            "gradient": "Largest error of the gradient, relative, by the cosine of the modalities",
            "leading": "By objective, ms",
            "solvers": "Eigensolvers of k x k matrices, ns a matrix",
            "summary": "Ratios of times over all shapes",
            "losing": "Shapes at which a formulation is faster than native",
        },
    ),
    "contrast": Record(
        "make bench-contrast",
        {
            "time": Times(
                "Forward + backward",
                (("ms", "median, ms"), ("of_floor", "in multiples of the products")),
                "call",
                sections="section",
                beside={
                    "instance_contrastive_loss": ("F.cross_entropy",),
                    "the same, normalize=False": ("F.cross_entropy",),
                    "native": _TORCH,
                    "pairs": _ALL_PAIRS,
                    "leave_one_out": _ALL_PAIRS,
                    "modality": _ALL_PAIRS,
                },
            ),
            "memory_MiB": "Peak memory of `instance_contrastive_loss` at B = 16384, d = 512, MiB beyond its rows",
            "accuracy": "Error of the loss, and of the gradient, relative, rows in clusters",
        },
    ),
    "joint": Record(
        "make bench-joint",
        {
            "time": Times(
                "Joint scores, N = B",
                (("ms", "median, ms"), ("of_floor", "in multiples of the products")),
                "call",
                sections="section",
                beside={
                    "volume": ("(N, N, k, k), det: GRAM",),
                    "sigma": ("(N, N, k, k), eigvalsh",),
                    "area2": ("(N, N, d): TRIANGLE",),
                },
            ),
            "memory": "Peak memory, MiB beyond embeddings and what is returned",
        },
    ),
    "gpu": Record(
        "python benchmarks/gpu.py",
        {
            "left_out": "Left out",
            "time": Times(
                "The alignment loss, forward + backward",
                (
                    ("device_us", "device time of a replayed graph, µs"),
                    ("wall_us", "wall time of an eager call in a loop, µs"),
                    ("peak_MiB", "peak memory, MiB"),
                ),
                "contender",
                ("B", "d", "k", "dtype"),
                beside={
                    "cuda": ("triton", *_GPU_SVD),
                    "cuda, leading": ("triton, leading",),
                    "cuda, triplet": ("triton, triplet",),
                },
                over={
                    "softmax": ("triton", "cuda"),
                    "leading": ("triton, leading", "cuda, leading"),
                    "triplet": ("triton, triplet", "cuda, triplet"),
                },
            ),
        },
    ),
    "gpu-contrast": Record(
        "python benchmarks/gpu_contrast.py",
        {
            "time": Times(
                "Contrasts, forward + backward",
                (
                    ("device_us", "device time of a replayed graph, µs"),
                    ("wall_us", "wall time of an eager call in a loop, µs"),
                    ("peak_MiB", "peak memory, MiB"),
                ),
                "contender",
                ("B", "d", "k", "dtype"),
                beside={
                    "instance": ("F.cross_entropy", "F.cross_entropy, compiled", "F.cross_entropy, high"),
                    "instance, high": ("F.cross_entropy, high", "F.cross_entropy, compiled, high"),
                    "pmrl, pairs": ("F.cross_entropy, all pairs",),
                },
            )
        },
    ),
}

# What keys of conditions and of plain tables are called on the site. Others stand as they are.
WORDS = {
    # conditions
    "python": "Python",
    "triton": "Triton",
    "cuda": "CUDA",
    "torch_isa": "PyTorch's instruction set",
    "native_isa": "native kernels'",
    "native_compiler": "compiled by",
    "of_run": "¹",
    # columns
    "contender": "computed by",
    "call": "computed by",
    "median_ms": "median, ms",
    "low_ms": "lower quartile, ms",
    "high_ms": "upper quartile, ms",
    "single_ms": "a single call, ms",
    "of_gradients": "in multiples of the gradients",
    "of_output": "returned, MiB",
    "computed": "of what, computed and not run",
    "geometric_mean": "geometric mean",
    "tau": "τ₂",
    "exact": "loss in float64",
    "loss": "error of the loss",
    "gradient": "error of the gradient",
}


def word(key: str) -> str:
    found = WORDS.get(key, key)
    if "_" in found:
        raise ValueError(f"{key}: got a key without a name for readers, wanted one in WORDS of {Path(__file__).name}")
    return found


def digits(x: Any) -> str:
    """A cell: three digits of a number, small ones as powers of ten."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return str(x).replace("|", "\\|")
    if isinstance(x, int) or x == round(x, 5):  # what was chosen, not measured
        return f"{x:g}"
    return f"{x:.1e}" if 0 < abs(x) < 1e-3 else "NaN" if math.isnan(x) else number(x)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns that hold a number are flushed right."""
    rows = list(rows)
    sides = ["---:" if any(NUMBER.match(row[i]) for row in rows) else "---" for i in range(len(header))]
    return ["", *(f"| {' | '.join(line)} |" for line in (header, sides, *rows)), ""]


def plain(title: str, rows: Sequence[Row]) -> Iterator[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    yield f"**{title}**"
    yield from table(list(map(word, keys)), ([digits(row[key]) if key in row else "" for key in keys] for row in rows))


def pivoted(times: Times, rows: Sequence[Row], value: str, unit: str, title: str) -> Iterator[str]:
    """One table: shapes down, contenders across; then where something else was faster."""
    skipped = {(*(row[key] for key in times.shape), row[times.contender]) for row in rows if "not_run" in row}
    rows = [row for row in rows if value in row]
    if not rows:
        return
    shapes: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        shapes.setdefault(tuple(row[key] for key in times.shape), {})[row[times.contender]] = row
    names = list(dict.fromkeys(row[times.contender] for row in rows))
    names.sort(key=lambda name: (name.endswith(" products"), name.split()[0].zfill(4) if name[0].isdigit() else ""))

    def cell(shape: tuple[Any, ...], name: str) -> str:
        row = shapes[shape].get(name)
        if row is None:
            return "not run" if (*shape, name) in skipped else ""
        return digits(row[value]) + ("¹" if "of_run" in row else "")

    yield f"**{title}: {unit}**"
    body = ([*map(str, shape), *(cell(shape, name) for name in names)] for shape in shapes)
    yield from table([*times.shape, *names], body)
    if any("of_run" in row for row in rows):
        yield from ("¹ of another run, see the conditions above.", "")
    if value == "of_floor":
        return  # the same rows again
    faster: dict[tuple[str, str], list[str]] = {}
    for shape, found in shapes.items():
        for ours, rivals in times.beside.items():
            for rival in rivals:
                if ours in found and rival in found and found[rival][value] < found[ours][value]:
                    share = f"{found[rival][value] / found[ours][value]:.2f} at ({', '.join(map(str, shape))})"
                    faster.setdefault((rival, ours), []).append(share)
    compared = any(ours in names and set(rivals) & set(names) for ours, rivals in times.beside.items())
    if faster:
        yield from ("Where something else takes less, and how much of it:", "")
        yield from (f"- `{rival}` of `{ours}`: {', '.join(shares)}" for (rival, ours), shares in faster.items())
        yield ""
    elif compared:
        yield from ("Nothing that it is compared with takes less here.", "")


def ratios(times: Times, rows: Sequence[Row]) -> Iterator[str]:
    """How long one of two takes in multiples of the other: for each shape what is computed, by each kind of time."""
    kinds = [(value, unit.partition(" time")[0]) for value, unit in times.values if value.endswith("_us")]
    found = {(*(row[key] for key in times.shape), row[times.contender]): row for row in rows}
    header = [f"{what}: {kind}" for what in times.over for _, kind in kinds]
    body = []
    for shape in dict.fromkeys(tuple(row[key] for key in times.shape) for row in rows):
        cells = []
        for pair in times.over.values():
            one, other = (found.get((*shape, name), {}) for name in pair)
            cells += [
                digits(one[value] / other[value]) if value in one and value in other else "" for value, _ in kinds
            ]
        if any(cells):
            body.append([*map(str, shape), *cells])
    if body:
        (one, other), *_ = times.over.values()
        yield f"**Which of two: what {one} takes in multiples of what {other} takes**"
        yield from table([*times.shape, *header], body)


def lists(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a file holds, by name: lists of rows, dicts of such lists, dicts of rows, numbers."""
    for key, value in results.items():
        if key == "conditions":
            continue
        if isinstance(value, dict):
            if all(isinstance(x, dict) for x in value.values()):
                yield key, [{"": name, **row} for name, row in value.items()]
            else:
                yield from value.items()
        else:
            yield key, value


def text(name: str, results: Mapping[str, Any]) -> str:
    """The tables of a file as Markdown."""
    record = RECORDS[name]
    conditions = {key: value for key, value in results["conditions"].items() if value is not None}
    said = ", ".join(f"{word(key)} {value}" for key, value in conditions.items() if key not in ("busy", "forced"))
    lines = [
        f"`{record.command}`: {said}.",
        "",
        *(warning(conditions) if "forced" in conditions else ()),
        "",
    ]
    for key, rows in lists(results):
        known = record.lists.get(key, key)
        if not isinstance(rows, list):
            lines += [f"{known}: {digits(rows)}.", ""]
        elif not rows or not isinstance(rows[0], dict):
            lines += [f"{known}: {', '.join(map(str, rows)) or 'none'}.", ""]
        elif isinstance(known, str):
            lines += plain(known, rows)
        else:
            sections = dict.fromkeys(row[known.sections] for row in rows) if known.sections else [None]
            for section in sections:
                title = known.title if section is None else f"{known.title}, {section}"
                own = [row for row in rows if section is None or row[known.sections] == section]
                for value, unit in known.values:
                    lines += pivoted(known, own, value, unit, title)
                lines += ratios(known, own)
    return "\n".join(lines)
