"""Numbers, conditions and tables as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def number(x: float | None) -> str:
    """Three digits; a dash for what was not run."""
    if x is None:
        return "-"
    size = abs(x)
    return f"{x:.0f}" if size >= 100 else f"{x:.1f}" if size >= 10 else f"{x:.2f}" if size >= 1 else f"{x:.3f}"


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


def plain_table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], form: Callable[[float], str] = number) -> str:
    """Rows of one and the same shape: first the keys, then numbers."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in keys))
    body = [
        [*(f"{row[key]}" for key in keys), *(form(row[name]) if name in row else "-" for name in columns)]
        for row in rows
    ]
    return table([*keys, *columns], body)


def facts(conditions: Mapping[str, Any]) -> str:
    """All conditions in one line, but for what :func:`warning` says."""
    return ", ".join(f"{key} {value}" for key, value in conditions.items() if key not in ("busy", "forced"))


def machine(c: Mapping[str, Any]) -> str:
    """Those of a run on a CPU that matter most."""
    return (
        f"{c['processor']}, {c['threads']} threads, {c['native_isa']} kernels, torch {c['torch']}, "
        f"Python {c['python']}, commit {c['commit']}, load {c['load']}" + (", FORCED: busy" if c["forced"] else "")
    )


def warning(c: Mapping[str, Any]) -> list[str]:
    """What to say of a run that was forced: a line, or none."""
    return ["FORCED, read nothing into these numbers: " + "; ".join(c["busy"]) + "."] if c["forced"] else []
