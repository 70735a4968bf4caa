"""What multiview_study.py says of its runs: tables, their text, the figure."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from multiview_losses import BASELINE, Contender

NOTHING_FOUND = 1e-3  # the R@1 that counts in a ratio where there is less

# From the Okabe-Ito palette, which colour-blind readers can tell apart.
SET_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
SET_MARKERS = "osD^vP*"
LEAST_RATIO = 0.6  # of the figure; what is below is written there
LINE = 0.035  # height of a label there

Entry = dict[str, Any]
Chosen = Callable[[str, str, Contender], list[Any]]


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def log_ratio(a: float, b: float) -> float:
    return math.log(max(a, NOTHING_FOUND) / max(b, NOTHING_FOUND))


def entry(label: str, by_set: dict[str, tuple[dict[int, float], dict[int, float], float | None]]) -> Entry:
    """A row: from R@1 by seed, the baseline's by seed and τ₂, for each set."""
    cells, logs = {}, []
    for name, (own, baseline, temperature) in by_set.items():
        mean, sd = mean_sd(list(own.values()))
        paired = [log_ratio(own[seed], baseline[seed]) for seed in own if seed in baseline]
        logs.append(statistics.fmean(paired))
        cells[name] = {
            "recall": mean,
            "sd": sd,
            "seeds": len(own),
            "temperature": temperature,
            "ratio": math.exp(logs[-1]),
        }
    mean, sd = mean_sd(logs)
    error = None if sd is None else math.exp(mean) * sd / math.sqrt(len(logs))
    return {"label": label, "sets": cells, "ratio": math.exp(mean), "error": error}


def tables(chosen: Chosen, sets: list[str], settings: Sequence[Any], contenders: list[Contender]) -> dict[str, Entry]:
    """By setting and loss. ``chosen`` gives the runs that count, by set, setting and contender."""
    made = {}
    for setting in settings:
        baseline = {name: {r.seed: r.recall for r in chosen(name, setting.name, BASELINE)} for name in sets}
        rows = {}
        if setting.fine_tuning:
            before = {name: {r.seed: r.before for r in chosen(name, setting.name, BASELINE)} for name in sets}
            rows["before"] = entry("before it", {name: (before[name], baseline[name], None) for name in sets})
        for contender in contenders:
            runs = {name: chosen(name, setting.name, contender) for name in sets}
            if all(runs.values()):
                by_set = {
                    name: ({r.seed: r.recall for r in found}, baseline[name], found[0].temperature)
                    for name, found in runs.items()
                }
                rows[contender.name] = entry(contender.label, by_set)
        made[setting.name] = {"label": setting.label, "rows": rows}
    return made


# ---------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------


def cell(found: Entry) -> str:
    spread = "" if found["sd"] is None else f" ± {100 * found['sd']:.1f}"
    chosen = "" if found["temperature"] is None else f" ({found['temperature']:g})"
    return f"{100 * found['recall']:.1f}{spread}{chosen}"


def ratio(row: Entry) -> str:
    return f"{row['ratio']:.3f}" + ("" if row["error"] is None else f" ± {row['error']:.3f}")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose source can be read as it is."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in (head, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(record: dict[str, Any]) -> str:
    conditions, protocol, sets = record["conditions"], record["protocol"], record["sets"]
    sizes = ", ".join(
        f"{name} {len(parts['views'])} views, {parts['train']} / {parts['validation']} / {parts['test']}"
        for name, parts in sets.items()
    )
    written = [
        f"R@1 in % among held-out instances, mean ± standard deviation of {protocol['seeds']} seeds, in brackets τ₂; "
        f"ratio to InfoNCE over all pairs, paired by split and seed, ± standard error over sets.\n"
        f"{protocol['steps']} steps of batch {conditions['batch']}, d = {conditions['dim']}, "
        f"torch {conditions['torch']}, {conditions['threads']} thread. "
        f"Instances (training / validation / test): {sizes}."
    ]
    for table in record["tables"].values():
        rows = [
            [row["label"], *(cell(row["sets"][name]) for name in sets), ratio(row)] for row in table["rows"].values()
        ]
        written.append(f"## {table['label']}\n\n" + markdown(["loss", *sets, "ratio to pairs"], rows))

    times = record["loss_ms"]
    losses = {name: row["label"] for table in record["tables"].values() for name, row in table["rows"].items()}
    rows = [
        [label, *(f"{by_loss[name]:.2f}" for by_loss in times.values())]
        for name, label in losses.items()
        if all(name in by_loss for by_loss in times.values())
    ]
    head = ["loss", *(f"k = {k}" for k in times)]
    written.append("## ms of the loss alone, forward and backward\n\n" + markdown(head, rows))
    floors = ", ".join(f"{floor:.3f} (k = {k})" for k, floor in record["floors"].items())
    written.append(f"The modality contrast's floor of τ₂, 1/(√k·log(B - 1)): {floors}.")
    return "\n\n".join(written) + "\n"


# ---------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------


def draw(record: dict[str, Any], contenders: list[Contender], sweepers: list[Contender], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # writes a file, needs no screen
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    widths = (5, 4, 4) if record["sweep"]["sets"] else (5, 4)
    figure, (found, cost, *sweep) = plt.subplots(
        1, len(widths), figsize=(1.23 * sum(widths), 5), layout="constrained", width_ratios=widths
    )
    conditions, protocol = record["conditions"], record["protocol"]
    figure.suptitle(
        f"Views of one thing in one space: {protocol['steps']} steps of batch {conditions['batch']}, "
        f"d = {conditions['dim']}, {protocol['seeds']} seeds, torch {conditions['torch']}, one thread",
        fontsize=10.5,
    )
    first = next(iter(record["tables"].values()))
    draw_recall(found, first, list(record["sets"]))
    draw_cost(cost, first, record, contenders)
    for axes in sweep:
        draw_sweep(axes, record, sweepers)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_recall(axes: Any, table: Entry, sets: list[str]) -> None:
    rows = list(table["rows"].values())
    for i, name in enumerate(sets):
        found = [row["sets"][name] for row in rows]
        axes.errorbar(
            [100 * cell["recall"] for cell in found],
            [y + 0.12 * (i - (len(sets) - 1) / 2) for y in range(len(rows))],
            xerr=[100 * (cell["sd"] or 0) for cell in found],
            fmt=SET_MARKERS[i % len(SET_MARKERS)],
            color=SET_COLOURS[i % len(SET_COLOURS)],
            ms=5,
            lw=1,
            label=name,
        )
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="R@1 in %, mean ± sd over seeds", title=f"R@1 by loss and set\n{table['label']}")
    plain_ticks(axes, (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="upper left")


def draw_cost(axes: Any, table: Entry, record: dict[str, Any], contenders: list[Contender]) -> None:
    """Ratio to pairs against the loss's time; geometric means over sets, of the time that of their k."""
    views = [len(parts["views"]) for parts in record["sets"].values()]
    points = sorted(
        (statistics.geometric_mean([record["loss_ms"][k][c.loss_name] for k in views]), i, c)
        for i, c in enumerate(contenders)
        if c.name in table["rows"] and c.temperature is None
    )
    column = points[-1][0] * 1.35  # where labels begin, right of all points
    shown = [(seconds, c) for seconds, _, c in points if table["rows"][c.name]["ratio"] >= LEAST_RATIO]
    shown.sort(key=lambda point: table["rows"][point[1].name]["ratio"])
    ratios = [table["rows"][c.name]["ratio"] for _, c in shown]
    for (seconds, contender), place in zip(shown, apart(ratios, LINE), strict=True):
        row = table["rows"][contender.name]
        axes.errorbar(seconds, row["ratio"], yerr=row["error"], fmt="o", ms=7, color=contender.colour, capsize=3)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        leader = {"arrowstyle": "-", "color": contender.colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 5}
        label = {"va": "center", "color": contender.colour, "fontsize": 8.5, "arrowprops": leader, "bbox": white}
        axes.annotate(contender.label, (seconds, row["ratio"]), (column, place), **label)
    below = 0  # how many ratios are too low for the axis and stand under it, each on a line of its own
    for seconds, _, contender in points:
        ratio = table["rows"][contender.name]["ratio"]
        if ratio < LEAST_RATIO:
            below += 1
            height, label = LEAST_RATIO - LINE * below, f"{contender.label}: {ratio:.2f}"
            axes.plot(seconds, height, "v", color=contender.colour, ms=7)
            axes.annotate(label, (seconds, height), (7, -3), textcoords="offset points", fontsize=8.5)
    axes.axhline(1, color="#777777", lw=0.8, ls=":")
    axes.set(
        xscale="log",
        xlabel="seconds of the loss alone in 1000 steps,\nforward + backward, geometric mean over sets",
        ylabel="R@1, ratio to InfoNCE over all pairs",
        title=f"R@1 against the time of the loss\n{table['label']}",
    )
    axes.set_xlim(points[0][0] / 1.3, column * 3.2)
    axes.set_ylim(LEAST_RATIO - LINE * (below + 1), None)
    plain_ticks(axes, (0.5, 1, 2, 5, 10, 20, 50, 100))


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Ascending heights, moved as little as makes neighbours so far apart."""
    centre = statistics.fmean
    groups: list[list[float]] = []  # of those that touch, each group about the mean of its own
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and centre(groups[-1]) - centre(groups[-2]) < least * len(groups[-2] + groups[-1]) / 2:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [centre(group) + least * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def draw_sweep(axes: Any, record: dict[str, Any], sweepers: list[Contender]) -> None:
    """R@1 against τ₂ on the swept sets, relative to pairs as tuned there; a line's style is the set's."""
    temperatures = record["protocol"]["sweep"]
    styles = dict(zip(record["sweep"]["sets"], ("-", "--"), strict=False))
    for name, style in styles.items():
        base = record["tables"]["whole"]["rows"][BASELINE.name]["sets"][name]["recall"]
        for contender in sweepers:
            key = (name, "whole", contender.loss_name)
            means = [
                statistics.fmean(
                    run["recall"]
                    for run in record["runs"]
                    if (run["set"], run["setting"], run["loss"]) == key and run["temperature"] == temperature
                )
                for temperature in temperatures
            ]
            label = contender.label if style == "-" else None
            ratios = [mean / max(base, NOTHING_FOUND) for mean in means]
            axes.plot(temperatures, ratios, style, marker="o", ms=4, color=contender.colour, label=label)
        k = len(record["sets"][name]["views"])
        axes.axvline(record["floors"][k], color="#777777", ls=style, lw=1)
        above = axes.get_xaxis_transform()
        axes.text(record["floors"][k], 1.01, f"floor, k = {k}", transform=above, ha="center", color="#777777", size=8.5)
    axes.set(
        xscale="log",
        xlabel="τ₂; vertical: the floor of the modality contrast,\n1/(√k·log(B - 1))",
        ylabel="R@1, ratio to InfoNCE over all pairs as tuned",
        ylim=(0, None),
    )
    drawn = ", ".join(f"{name} ({'solid' if style == '-' else 'dashed'})" for name, style in styles.items())
    axes.set_title(f"R@1 against the contrast's temperature\n{drawn}", pad=16)
    plain_ticks(axes, temperatures)
    axes.legend(frameon=True, framealpha=1, edgecolor="none", loc="lower right")


def plain_ticks(axes: Any, at: Sequence[float]) -> None:
    """On a logarithmic axis, those of the numbers that it shows."""
    low, high = axes.get_xlim()
    axes.set_xticks([x for x in at if low <= x <= high], [f"{x:g}" for x in at if low <= x <= high])
    axes.set_xticks([], minor=True)
