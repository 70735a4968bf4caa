"""Joint scores, their losses and their ranks on a CPU, beside the matrix products they are made of.

    python benchmarks/joint.py               # ten minutes on two idle cores; prints, and writes results/joint.json
    python benchmarks/joint.py --threads 1   # the same with one thread; another --output keeps both
    python benchmarks/joint.py --force       # on a busy machine, which the results then say

A query is the first of k modalities, a candidate the n = k - 1 others, N of each, so that scores are N x N. Forward,
scores are to cost n products of N x d with d x N, in float32. With a backward pass there are n more, since the planes
are not kept, and two of N x N with N x d for each: 4n. Scores get any gradient that comes, here a random one. As in
cpu.py, contenders take turns in one process, medians are reported, and nothing is timed that does not agree with
float64. Formulations as published hold all pairs at once: they have turns of their own, with what they are compared to,
since the gigabytes that they take and give back would tell on whoever comes next. Those of (N, N, d) are left out where
they do not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lib import compare, memory, objectives, report
from lib.accuracy import doubled
from lib.cases import Case, embeddings
from lib.compare import Check, Comparison, Section, step
from lib.measure import Call
from torch import Tensor

from pmrl_kernels import joint_contrastive_loss, joint_scores, retrieval_ranks

SCORES = ("volume", "sine", "sigma", "gain")  # area2 too where k = 3
CASES = tuple(Case(N, 512, k) for N in (1024, 4096) for k in (3, 4, 5))
TAU, SMOOTHING = 0.07, 0.1
SECONDS = 10.0  # for each shape
LARGE = (4917, 512, 3)  # N, d, k where memory is measured: ActivityNet's clips
OF_MEMORY = ("volume", "sigma", "gain", "area2")
MOST_MIB = 8192  # of one (N, N, d)

Row = dict[str, Any]


class Published(NamedTuple):
    """A score as its code goes about it."""

    name: str
    score: str
    function: Callable[[Sequence[Tensor]], Tensor]
    wide: bool = False
    """Whether it holds (N, N, d)."""
    most: int = 1 << 24
    """Pairs that it takes in a bearable time."""

    def declines(self, case: Case) -> bool:
        pairs = case.B**2
        return pairs > self.most or (self.wide and (case.k != 3 or pairs * case.d * 4 > MOST_MIB << 20))


PUBLISHED = (
    Published("(N, N, k, k), det: GRAM", "volume", objectives.determinant_volumes),
    Published("(N, N, k, k), eigvalsh", "sigma", objectives.eigenvalue_sigmas, most=1 << 20),
    Published("(N, N, d): TRIANGLE", "area2", objectives.difference_areas, wide=True),
)
SIGNS = {"volume": -1, "area2": -1, "sigma": 1, "gain": 1}


def scores_of(k: int) -> tuple[str, ...]:
    return (*SCORES, "area2") if k == 3 else SCORES


def ours(xs: Sequence[Tensor], score: str) -> Tensor:
    return joint_scores(*xs, score=score)


def contrast(xs: Sequence[Tensor], score: str, smoothing: float = 0.0) -> Tensor:
    return joint_contrastive_loss(*xs, score=score, temperature=TAU, label_smoothing=smoothing)


def published_contrast(xs: Sequence[Tensor], published: Published, smoothing: float = 0.0) -> Tensor:
    return objectives.joint_contrast(SIGNS[published.score] * published.function(xs) / TAU, smoothing)


# ------------------------------------------------------------------------------------------------
# The products
# ------------------------------------------------------------------------------------------------


def products(case: Case, backward: bool) -> Call:
    """S_m = T C_mᵀ of each of the n modalities; with a backward pass again, and S_m C_m and S_mᵀ T too."""
    T, *C = (x.detach() for x in embeddings(case))
    S = torch.empty(case.B, case.B)
    of_queries, of_candidates = torch.empty_like(T), torch.empty_like(T)

    def call() -> None:
        for c in C:
            torch.mm(T, c.T, out=S)
            if backward:
                torch.mm(T, c.T, out=S)
                torch.mm(S, c, out=of_queries)
                torch.mm(S.T, T, out=of_candidates)

    return call


def named(case: Case, backward: bool) -> dict[str, Call]:
    return {f"{(4 if backward else 1) * (case.k - 1)} products": products(case, backward)}


# ------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------


def weighed(xs: Sequence[Tensor], function: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """A sum of scores, so weighed that every one counts and no symmetry hides a wrong one."""
    scores = function(xs).double()
    return (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).sum()


def checks() -> list[Check]:
    found = []
    for k in (3, 5):
        xs = embeddings(Case(100, 64, k))
        doubles = doubled(xs)

        def check(name: str, loss: Callable[..., Tensor], exact: Callable[..., Tensor], xs=xs, doubles=doubles) -> None:
            found.append(Check(name, lambda: loss(xs), xs, lambda: exact(doubles), doubles))

        for published in PUBLISHED:
            if published.wide and k != 3:
                continue
            exact = functools.partial(weighed, function=published.function)
            scores = functools.partial(ours, score=published.score)
            check(f"joint_scores, {published.score}", functools.partial(weighed, function=scores), exact)
            check(published.name, exact, exact)
            check(
                f"contrast, {published.score}",
                functools.partial(contrast, score=published.score, smoothing=SMOOTHING),
                functools.partial(published_contrast, published=published, smoothing=SMOOTHING),
            )
        check(
            "joint_scores, gain",
            functools.partial(weighed, function=functools.partial(ours, score="gain")),
            functools.partial(weighed, function=objectives.eigenvalue_gains),
        )
    return found


@torch.no_grad()
def forward(call: Callable[[], object]) -> object:
    return call()


def forward_calls(case: Case) -> dict[str, Call]:
    xs, found = embeddings(case), named(case, False)
    for score in scores_of(case.k):
        found[score] = functools.partial(forward, functools.partial(ours, xs, score))
    return found


def gradient_calls(case: Case) -> dict[str, Call]:
    xs, grad = embeddings(case), torch.randn(case.B, case.B)

    def both(score: str) -> Call:
        return lambda: torch.autograd.grad(ours(xs, score), xs, grad)

    return named(case, True) | {score: both(score) for score in scores_of(case.k)}


def contrast_calls(case: Case) -> dict[str, Call]:
    xs = embeddings(case)
    found = named(case, True)
    for score in scores_of(case.k):
        found[score] = step(functools.partial(contrast, score=score), xs)
    smoothed = functools.partial(contrast, score="volume", smoothing=SMOOTHING)
    return found | {f"volume, smoothing {SMOOTHING}": step(smoothed, xs)}


def taken(case: Case) -> list[Published]:
    return [published for published in PUBLISHED if not published.declines(case)]


def published_forward_calls(case: Case) -> dict[str, Call]:
    xs, found = embeddings(case), forward_calls(case)
    kept = {name: found[name] for name in (next(iter(found)), *(published.score for published in taken(case)))}
    return kept | {p.name: functools.partial(forward, functools.partial(p.function, xs)) for p in taken(case)}


def published_contrast_calls(case: Case) -> dict[str, Call]:
    xs, found = embeddings(case), contrast_calls(case)
    kept = {name: found[name] for name in (next(iter(found)), *(published.score for published in taken(case)))}
    return kept | {p.name: step(functools.partial(published_contrast, published=p), xs) for p in taken(case)}


def comparisons() -> tuple[Comparison, ...]:
    return (
        Comparison("scores, forward", CASES, forward_calls, share=0.6),
        Comparison("scores, forward + backward", CASES, gradient_calls),
        Comparison("contrast", CASES, contrast_calls),
        Comparison("as published, forward", CASES, published_forward_calls, share=0.5),
        Comparison("contrast, as published", CASES, published_contrast_calls, share=0.5),
    )


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


def memory_call(kind: str, score: str, N: str, d: str, k: str) -> Call:
    """What memory.peak measures: scores, a contrast's forward and backward pass, or ranks."""

    def made(case: Case) -> Call:
        xs = embeddings(case)
        if kind == "scores":
            return functools.partial(forward, functools.partial(ours, xs, score))
        if kind == "contrast":
            return step(functools.partial(contrast, score=score), xs)
        if kind == "ranks":
            return functools.partial(forward, functools.partial(retrieval_ranks, *xs, score=score))
        published = next(published for published in PUBLISHED if published.name == kind)
        return functools.partial(forward, functools.partial(published.function, xs))

    made(Case(8, int(d), int(k)))()
    return made(Case(int(N), int(d), int(k)))


def memory_rows() -> list[Row]:
    """MiB beyond the embeddings, and beyond what is returned: scores (N, N), gradients, ranks (N,)."""
    N, d, k = LARGE
    returned = {"contrast": k * N * d * 4, "ranks": 8 * N}
    wanted = [(kind, score) for kind in ("scores", "contrast", "ranks") for score in OF_MEMORY]
    wanted += [(published.name, published.score) for published in PUBLISHED]
    rows = []
    for kind, score in wanted:
        of_output = returned.get(kind, 4 * N**2) / 2**20
        wide = any(published.name == kind and published.wide for published in PUBLISHED)
        if wide and memory.available() < 4 * N**2 * d * 4 / 2**20:
            row = {"MiB": 2 * N**2 * d * 4 / 2**20, "computed": "two (N, N, d)"}
        else:
            row = {"MiB": memory.peak("joint:memory_call", kind, score, *LARGE) - of_output}
        rows.append({"call": kind, "score": score, "N": N, "d": d, "k": k, "of_output": of_output, **row})
    return rows


def memory_text(rows: Sequence[Row]) -> str:
    N, d, k = LARGE
    inputs = k * N * d * 4 / 2**20
    lines = [f"memory at (N, d, k) = {LARGE}: MiB beyond embeddings ({inputs:.0f}) and what is returned"]
    for row in rows:
        said = f" ({row['computed']}, computed)" if "computed" in row else ""
        lines.append(f"{row['call']:28} {row['score']:8} {report.number(row['MiB'])}{said}")
    return "\n".join(lines)


SECTIONS = {"memory": Section(memory_rows, memory_text)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return compare.main(__doc__, "joint", comparisons, checks, SECONDS, SECTIONS, argv)


if __name__ == "__main__":
    main()
