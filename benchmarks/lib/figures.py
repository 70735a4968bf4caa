"""The figures of cpu.py and gpu.py: times against the batch size, and how every shape compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import report
from .cases import CONTENDERS, FLOOR, NATIVE, REDUCED, RIVALS

# From the Okabe-Ito palette, which colour-blind readers can tell apart; what is alike shares a colour.
OURS, RIVAL, RIVAL_COMPILED, SVD, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#777777"
STYLES: dict[str, dict[str, Any]] = {
    "full SVD": {"color": SVD, "ls": "-", "marker": "s"},
    "reduced SVD": {"color": SVD, "ls": "--", "marker": "o"},
    "svdvals": {"color": SVD, "ls": ":", "marker": "v"},
    "Gram + eigh": {"color": "#CC79A7", "ls": "--", "marker": "o"},
    "torch k-space": {"color": RIVAL, "ls": ":", "marker": "v"},
    "torch k-space, compiled": {"color": RIVAL_COMPILED, "ls": "--", "marker": "o"},
    "torch k-space, compiled Jacobi": {"color": RIVAL_COMPILED, "ls": "-", "marker": "s"},
    "reference": {"color": OURS, "ls": "--", "marker": "o"},
    NATIVE: {"color": OURS, "ls": "-", "marker": "s", "lw": 2.6, "zorder": 3},
    FLOOR: {"color": GREY, "ls": "-", "marker": None},
}
OTHERS: dict[str, Any] = {"color": GREY, "ls": "--", "marker": "."}  # contenders without an entry
PREFERRED = (512, 4)  # d, k of the first panel


def spread(heights: Sequence[float], least: float) -> list[float]:
    """Heights in ascending order moved apart to a distance of ``least``, each group about its middle."""
    groups: list[list[float]] = [[h] for h in heights]

    def span(group: list[float]) -> tuple[float, float]:
        middle, half = sum(group) / len(group), least * (len(group) - 1) / 2
        return middle - half, middle + half

    i = 0
    while i + 1 < len(groups):
        if span(groups[i + 1])[0] - span(groups[i])[1] < least:
            groups[i : i + 2] = [groups[i] + groups[i + 1]]
            i = max(i - 1, 0)
        else:
            i += 1
    return [span(group)[0] + least * n for group in groups for n in range(len(group))]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # writes a file, needs no screen
    from matplotlib import pyplot

    return pyplot


# ------------------------------------------------------------------------------------------------
# On a CPU
# ------------------------------------------------------------------------------------------------


def draw_cpu(results: Mapping[str, Any], path: Path) -> Path:
    """``results`` of cpu.py, in whose "time" are rows of B, d, k, contender and median_ms or not_run."""
    plt, rows = _pyplot(), results["time"]
    times = {(r["contender"], r["B"], r["d"], r["k"]): r["median_ms"] for r in rows if "median_ms" in r}
    sizes = sorted({key[1:] for key in times}, key=lambda size: (size[2], size[0], size[1]))
    d, k = PREFERRED if any(size[1:] == PREFERRED for size in sizes) else sizes[0][1:]

    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.8), width_ratios=(1, 1.35), layout="constrained")
    caption = f"Forward + backward, float32. {report.machine(results['conditions'])}"
    figure.suptitle(caption, fontsize=9.5)

    _times(left, times, d, k)
    _ratios(right, times, sizes)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _times(axes: Any, times: dict[tuple[str, int, int, int], float], d: int, k: int) -> None:
    """One line for each contender, its name at its right end."""
    import numpy as np

    ends = []
    for contender in CONTENDERS:
        line = sorted((B, ms) for (name, B, *rest), ms in times.items() if name == contender.name and rest == [d, k])
        if line:
            axes.plot(*zip(*line, strict=True), **({"lw": 1.6, "ms": 4.5} | STYLES.get(contender.name, OTHERS)))
            ends.append((line[-1], contender.name))
    axes.set(xscale="log", yscale="log", xlabel="batch size B", ylabel="ms")
    axes.set_title(f"Time, d = {d}, k = {k}", loc="left", fontsize=11)
    batches = sorted({B for _, B, *rest in times if rest == [d, k]})
    axes.set_xticks(batches, [str(B) for B in batches])
    axes.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    low, high = axes.get_ylim()
    ends.sort(key=lambda end: end[0][1])
    # Names that would overlap are moved apart, and a thin line leads to each. 0.047 of the axis is a line of text.
    heights = spread([float(np.log(ms / low) / np.log(high / low)) for (_, ms), _ in ends], 0.047)
    for ((B, ms), name), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (B, ms),
            xytext=(1.05, height),
            textcoords="axes fraction",
            color=STYLES.get(name, OTHERS)["color"],
            fontweight="bold" if name == NATIVE else None,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "lw": 0.7, "shrinkA": 1, "shrinkB": 3},
        )


def _ratios(axes: Any, times: dict[tuple[str, int, int, int], float], sizes: list[tuple[int, int, int]]) -> None:
    """Times as multiples of native's, for every shape: B and k along the axis, d side by side."""
    from matplotlib.ticker import LogLocator

    rivals = {kind: [c.name for c in CONTENDERS if c.rival == kind] for kind in RIVALS}

    def best(kind: str, *size: int) -> float | None:
        return min((times[(name, *size)] for name in rivals[kind] if (name, *size) in times), default=None)

    widths = sorted({size[1] for size in sizes})
    groups = list(dict.fromkeys((k, B) for B, d, k in sizes))
    gap = 0.8  # between one k and the next
    place = {}
    for n, (k, B) in enumerate(groups):
        place[k, B] = n + gap * sorted({group[0] for group in groups}).index(k)
    series = (
        ("reduced SVD", SVD, "o", lambda *size: times.get((REDUCED, *size))),
        ("plain PyTorch, eager", RIVAL, "v", lambda *size: best("eager", *size)),
        ("plain PyTorch, best compiled", RIVAL_COMPILED, "s", lambda *size: best("compiled", *size)),
        ("floor", GREY, "_", lambda *size: times.get((FLOOR, *size))),
    )
    for label, color, marker, find in series:
        points = []
        for B, d, k in sizes:
            ms, ours = find(B, d, k), times.get((NATIVE, B, d, k))
            if ms is not None and ours is not None:
                shift = 0.24 * (widths.index(d) - (len(widths) - 1) / 2)
                points.append((place[k, B] + shift, ms / ours))
        if points:
            axes.scatter(*zip(*points, strict=True), s=22, color=color, marker=marker, label=label, zorder=2)
    axes.axhline(1, color=OURS, lw=2, zorder=1)
    axes.text(1.0, 1, " native", color=OURS, fontweight="bold", va="center", transform=axes.get_yaxis_transform())
    axes.set(yscale="log", ylabel="time / native's time")
    axes.set_title(
        f"Every shape, relative to native; side by side: d = {', '.join(map(str, widths))}", loc="left", fontsize=11
    )
    axes.set_xticks([place[group] for group in groups], [str(B) for _, B in groups], rotation=45)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylim(top=axes.get_ylim()[1] * 2.2)  # room for the legend
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    for k in dict.fromkeys(group[0] for group in groups):
        places = [place[group] for group in groups if group[0] == k]
        axes.text(
            sum(places) / len(places), -0.16, f"k = {k}", ha="center", transform=axes.get_xaxis_transform(), fontsize=10
        )
    axes.set_xlabel("batch size B, by number of modalities k", labelpad=24)
    axes.legend(frameon=False, loc="upper left", ncols=2, bbox_to_anchor=(0, 1.0))


# ------------------------------------------------------------------------------------------------
# On a GPU
# ------------------------------------------------------------------------------------------------


def draw_gpu(results: Mapping[str, Any], path: Path) -> Path:
    """Wall and device time by batch size at d = 512, k = 4, float32."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(14, 5.5), sharey=True, constrained_layout=True)
    rows = [r for r in results["time"] if (r["d"], r["k"], r["dtype"]) == (512, 4, "float32")]
    for ax, kind, title in zip(
        axes, ("wall_us", "device_us"), ("Eager wall time", "Device time, graph replay"), strict=True
    ):
        for at, name in enumerate(dict.fromkeys(row["contender"] for row in rows)):
            points = [(row["B"], row[kind]) for row in rows if row["contender"] == name and kind in row]
            if points:
                style = {"lw": 3, "zorder": 3} if name in ("cuda", "triton") else {"lw": 1}
                style |= {"ls": ("-", "--", ":")[at % 3], "marker": "osv^"[at % 4], "color": plt.get_cmap("tab20")(at)}
                ax.plot(*zip(*points, strict=True), ms=4, label=name, **style)
        ax.set(
            xscale="log", yscale="log", xlabel="batch size B", ylabel="µs", title=f"{title}, d = 512, k = 4, float32"
        )
        ax.grid(alpha=0.3)
    if rows:  # where the other panel is empty: what makes the host wait has no graph
        axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="upper left", ncols=2)
    facts = results["conditions"]
    figure.suptitle(", ".join(f"{key} {facts[key]}" for key in ("device", "torch", "triton", "commit") if key in facts))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


DRAWN = {"cpu": draw_cpu, "gpu": draw_gpu}
"""By the name of the results."""
