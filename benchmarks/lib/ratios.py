"""What the times of the alignment loss say: how native stands to the usual formulation, its best rivals, the floor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .cases import CONTENDERS, FLOOR, MEAN_SQUARED_ERROR, NATIVE, REDUCED, RIVALS, Case

NAMES = ("reduced/native", *(f"{kind}/native" for kind in RIVALS), "native/floor")


def by_shape(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int, int], dict[str, float]]:
    """Median ms by (B, d, k) and contender, of those that were run."""
    shapes: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in rows:
        medians = shapes.setdefault((row["B"], row["d"], row["k"]), {})
        if "median_ms" in row:
            medians[row["contender"]] = row["median_ms"]
    return shapes


def ratios(medians: Mapping[str, float]) -> dict[str, float]:
    """By name; of the formulations in plain PyTorch (eager, compiled) the best counts."""
    if NATIVE not in medians:
        return {}
    found = {"reduced/native": medians[REDUCED] / medians[NATIVE]}
    for kind in RIVALS:
        times = [medians[c.name] for c in CONTENDERS if c.rival == kind and c.name in medians]
        if times:
            found[f"{kind}/native"] = min(times) / medians[NATIVE]
    return found | {"native/floor": medians[NATIVE] / medians[FLOOR]}


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric mean, least and greatest of each ratio over all shapes."""
    collected: dict[str, list[float]] = {}
    for medians in by_shape(rows).values():
        for name, ratio in ratios(medians).items():
            collected.setdefault(name, []).append(ratio)
    return {
        name: {"geometric_mean": math.exp(math.fsum(map(math.log, x)) / len(x)), "least": min(x), "greatest": max(x)}
        for name, x in collected.items()
    }


def losses(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every shape at which some formulation is faster than native."""
    lost = []
    for (B, d, k), medians in by_shape(rows).items():
        for name, median in medians.items():
            rival = name not in (NATIVE, FLOOR, MEAN_SQUARED_ERROR.name)
            if rival and NATIVE in medians and median < medians[NATIVE]:
                lost.append(f"{Case(B, d, k)}: {name} takes {median / medians[NATIVE]:.2f} of native's time")
    return lost
