"""The contrasts and the whole objective on a CPU, forward + backward, beside the matrix products they are made of.

    python benchmarks/contrast.py            # two minutes on two idle cores; prints, and writes results/contrast.json
    python benchmarks/contrast.py --force    # on a busy machine, which the results then say

A product of B x B similarities counts as one, in float32. As in cpu.py, contenders take turns in one process, medians
are reported, and nothing is timed that does not agree with float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lib import compare, formulations, memory, objectives
from lib.accuracy import doubled
from lib.cases import Case, embeddings
from lib.compare import Check, Comparison, Section, step
from lib.measure import Call
from torch import Tensor
from torch.nn.functional import normalize

from pmrl_kernels import instance_contrastive_loss, ops, pmrl_loss

TAU, CONTRAST_TAU = 0.05, 0.1
INSTANCES = tuple(Case(B, d, 1) for B in (1024, 4096) for d in (512, 128))
MODALITIES = (Case(1024, 512, 4), Case(512, 256, 8), Case(4096, 128, 6))
OBJECTIVE = Case(1024, 512, 4)
LARGE = (16384, 512)  # where memory is measured
TEMPERATURES = (0.02, 0.05, 0.1)
SECONDS = 8.0  # for each shape

TAUS = {"temperature": TAU, "tau": CONTRAST_TAU}
RIVALS: dict[str, Callable[..., Tensor]] = {
    "torch k-space, compiled": objectives.k_space_compiled,
    "torch k-space": objectives.k_space,
    "Gram + eigh": objectives.gram_eigh,
    "reduced SVD": objectives.reduced_svd,
}

Row = dict[str, Any]


def unit_rows(B: int, d: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(B, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def ours(xs: Sequence[Tensor], backend: str, contrast: str = "leading", alignment_weight: float = 1.0) -> Tensor:
    return pmrl_loss(
        xs,
        temperature=TAU,
        instance_temperature=CONTRAST_TAU,
        alignment_weight=alignment_weight,
        contrast=contrast,
        backend=backend,
    )


def operators_step(u: Tensor, columns: Tensor | None = None) -> Call:
    """The instance term alone, on vectors that are given: no normalisation, no autograd."""
    pair, one = ops.available["native"].pairs["paired"], torch.ones(())

    def arguments(x: Tensor, everyone: Tensor | None) -> tuple[Any, ...]:
        return [x], [0, 0], [True], None, [] if everyone is None else [everyone], None, 0, None, CONTRAST_TAU

    every = None if columns is None else pair.forward(*arguments(columns, None))[1]

    def call() -> object:
        _, losses, state = pair.forward(*arguments(u, columns))
        losses = losses if every is None else every
        return pair.backward(*arguments(u, columns), losses, state, one)

    return call


def products(rows: Tensor, columns: Tensor, count: int) -> Call:
    """So many matrix products as a contrast makes: S = R Cᵀ, and S C or Sᵀ R."""
    S, R, C = rows @ columns.T, torch.empty_like(rows), torch.empty_like(columns)
    kinds: list[Call] = [
        lambda: torch.mm(rows, columns.T, out=S),
        lambda: torch.mm(S, columns, out=R),
        lambda: torch.mm(S.T, rows, out=C),
    ]
    order = [kinds[i % 2] if count < 3 else kinds[i % 3] for i in range(count)]
    return lambda: [kind() for kind in order]


# ------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------


def checks() -> list[Check]:
    xs = embeddings(Case(300, 64, 3))
    doubles = doubled(xs)
    exact = functools.partial(objectives.reduced_svd, doubles, **TAUS)

    def check(name: str, loss: Callable[[], Tensor], exact: Callable[[], Tensor]) -> Check:
        return Check(name, loss, xs, exact, doubles)

    return [
        check("pmrl_loss", lambda: ours(xs, "native"), exact),
        *(
            check(
                name, functools.partial(ours, xs, "native", name), functools.partial(ours, doubles, "reference", name)
            )
            for name in ("modality", "leave_one_out")
        ),
        check(
            "pairs",
            lambda: ours(xs, "native", "pairs", 0.0),
            lambda: objectives.all_pairs(doubles, CONTRAST_TAU),
        ),
        check(
            "instance",
            lambda: instance_contrastive_loss(xs[0], CONTRAST_TAU, backend="native"),
            lambda: objectives.instance_contrast(doubles[0], CONTRAST_TAU),
        ),
        *(check(name, functools.partial(rival, xs, **TAUS), exact) for name, rival in RIVALS.items()),
    ]


def instance_calls(case: Case) -> dict[str, Call]:
    u, x = unit_rows(case.B, case.d), torch.randn(case.B, case.d, requires_grad=True)
    loss = functools.partial(instance_contrastive_loss, temperature=CONTRAST_TAU, backend="native")
    return {
        "2 products": products(u, u, 2),
        "operators": operators_step(u),
        "instance_contrastive_loss": step(loss, x),
        "the same, normalize=False": step(functools.partial(loss, normalize=False), x),
        "F.cross_entropy": step(functools.partial(objectives.instance_contrast, tau=CONTRAST_TAU), x),
    }


def share_calls(case: Case) -> dict[str, Call]:
    """Of two processes, each of which has half of the rows."""
    u = unit_rows(case.B, case.d)
    own = u[: case.B // 2]
    return {"3 products": products(own, u, 3), "operators": operators_step(own, u)}


def modality_calls(case: Case) -> dict[str, Call]:
    xs, u = embeddings(case), unit_rows(case.B, case.d)
    k, pairs = case.k, case.k * (case.k - 1) // 2
    return {
        f"{3 * k} products": products(u, u, 3 * k),
        "modality": step(functools.partial(ours, backend="native", contrast="modality"), xs),
        "leave_one_out": step(functools.partial(ours, backend="native", contrast="leave_one_out"), xs),
        f"{3 * pairs} products": products(u, u, 3 * pairs),
        "pairs": step(functools.partial(ours, backend="native", contrast="pairs", alignment_weight=0.0), xs),
        "InfoNCE over all pairs": step(functools.partial(objectives.all_pairs, tau=CONTRAST_TAU), xs),
    }


def objective_calls(case: Case) -> dict[str, Call]:
    xs, u = embeddings(case), unit_rows(case.B, case.d)
    two = products(u, u, 2)

    def floor() -> None:
        formulations.floor(xs)
        two()

    return {
        "floor + 2 products": floor,
        "native": step(functools.partial(ours, backend="native"), xs),
        "reference": step(functools.partial(ours, backend="reference"), xs),
        **{name: step(functools.partial(rival, **TAUS), xs) for name, rival in RIVALS.items()},
    }


def comparisons() -> tuple[Comparison, ...]:
    return (
        Comparison("instance", INSTANCES, instance_calls),
        Comparison("instance, one of two processes", INSTANCES, share_calls, share=0.5),
        Comparison("modality", MODALITIES, modality_calls),
        Comparison("objective", (OBJECTIVE,), objective_calls),
    )


# ------------------------------------------------------------------------------------------------
# Memory and accuracy
# ------------------------------------------------------------------------------------------------


def instance_call(B: str, d: str) -> Call:
    """What memory.peak measures: the instance term beyond its rows."""
    operators_step(unit_rows(8, 16))()
    return operators_step(unit_rows(int(B), int(d)))


def memory_text(MiB: float) -> str:
    B, d = LARGE
    return f"memory at B = {B}, d = {d}: {MiB:.0f} MiB, rows are {B * d * 4 / 2**20:.0f} MiB"


def accuracy_rows() -> list[Row]:
    """Relative errors of float32 beside float64, of rows in clusters, where losses depend on rounding most."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(64, 512, generator=generator, dtype=torch.float64)
    rows = []
    for noise in (0.1, 1.0):
        wide = (centres.repeat(8, 1) + noise * torch.randn(512, 512, generator=generator, dtype=torch.float64)).float()
        for tau in TEMPERATURES:
            x = wide.double().requires_grad_()
            exact = objectives.instance_contrast(x, tau)
            (gradient,) = torch.autograd.grad(exact, x)
            for name, loss in (
                ("native", lambda x, tau: instance_contrastive_loss(x, tau, backend="native")),
                ("F.cross_entropy", objectives.instance_contrast),
            ):
                y = wide.clone().requires_grad_()
                found = loss(y, tau)
                (grad,) = torch.autograd.grad(found, y)
                rows.append({
                    "noise": noise, "tau": tau, "call": name, "exact": exact.item(),
                    "loss": ((found.double() - exact).abs() / exact).item(),
                    "gradient": ((grad.double() - gradient).norm() / gradient.norm()).item(),
                })  # fmt: skip
    return rows


def accuracy_text(rows: Sequence[Row]) -> str:
    return "\n".join(
        f"noise {row['noise']}, tau {row['tau']}: {row['call']:16} loss {row['exact']:.3g} "
        f"error {row['loss']:.1e}, gradient error {row['gradient']:.1e}"
        for row in rows
    )


SECTIONS = {
    "memory_MiB": Section(lambda: memory.peak("contrast:instance_call", *LARGE), memory_text),
    "accuracy": Section(accuracy_rows, accuracy_text),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return compare.main(__doc__, "contrast", comparisons, checks, SECONDS, SECTIONS, argv)


if __name__ == "__main__":
    main()
