"""Where the alignment term stops pulling: the figure and the tables of docs/recipes.md.

Every instance holds k unit embeddings of which any two have the same cosine c. Loss and gradient come
from ``dominant_sv_loss``; the closed forms, which exist for such embeddings, only check them.

    python docs/figures/recipes.py             # writes docs/figures/recipes.png, prints the tables
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pmrl_kernels import dominant_sv_loss

TEMPERATURES = (0.01, 0.05, 0.1, 0.3, 1.0)
MODALITIES = (3, 4, 6, 8)
SHOWN_K = 4
FRACTION = 0.01  # of the gradient at c = 0: what counts as saturated
LEVEL = 0.9  # the cosine at which the second table reads the gradient

# From the Okabe-Ito palette, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip


def equal_cosines(c: Tensor, k: int) -> Tensor:
    """Unit embeddings (B, k, k + 1), float64: in instance i any two of the k have cosine c[i], 0 <= c <= 1."""
    common, own = c.sqrt(), (1 - c).sqrt()
    return torch.cat([common[:, None, None].expand(-1, k, 1), own[:, None, None] * torch.eye(k, dtype=c.dtype)], 2)


def loss_and_pull(c: Tensor, k: int, tau: float | None) -> tuple[Tensor, Tensor]:
    """The loss (B,) and the norm of its gradient with respect to all k embeddings (B,); τ None: "leading"."""
    x = equal_cosines(c, k).requires_grad_()
    if tau is None:
        loss = dominant_sv_loss(x, objective="leading", reduction="none")
    else:
        loss = dominant_sv_loss(x, temperature=tau, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad.flatten(1).norm(dim=1)


def closed_forms(c: Tensor, k: int, tau: float | None) -> tuple[Tensor, Tensor]:
    """The same two from σ₁ = √(1 + (k−1)c), σ_j = √(1−c)."""
    first, other = (1 + (k - 1) * c).sqrt(), (1 - c).sqrt()
    if tau is None:
        return math.sqrt(k) - first, (1 - first**2 / k).clamp_min(0).sqrt()
    weight = torch.exp((other - first) / tau)
    pull = weight / (1 + (k - 1) * weight) / tau
    return torch.log1p((k - 1) * weight), pull * ((k - 1) * (k - (k - 1) * (first - other) ** 2 / k)).sqrt()


def saturation_cosine(k: int, tau: float, fraction: float = FRACTION) -> float | None:
    """The cosine at which the gradient has fallen to ``fraction`` of its norm at c = 0; None: at no c < 1."""
    ends = torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64)
    start, end = loss_and_pull(ends, k, tau)[1].tolist()
    if end > fraction * start:
        return None
    low, high = 0.0, 1.0
    for _ in range(8):  # a grid narrowed eightfold each time: the norm falls monotonically with c
        grid = torch.linspace(low, high, 9, dtype=torch.float64)[1:-1]
        above = int((loss_and_pull(grid, k, tau)[1] > fraction * start).sum())
        width = (high - low) / 8
        low, high = low + above * width, low + (above + 1) * width
    return (low + high) / 2


def relative_pull(k: int, tau: float, cosine: float = LEVEL) -> float:
    """The gradient's norm at ``cosine`` over its norm at 0."""
    start, there = loss_and_pull(torch.tensor([0.0, cosine], dtype=torch.float64), k, tau)[1].tolist()
    return there / start


def largest_error() -> float:
    """Of loss and gradient norm against their closed forms, relative, over all k, τ and cosines up to 0.999."""
    c = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    worst = 0.0
    for k in MODALITIES:
        for tau in (*TEMPERATURES, None):
            for ours, exact in zip(loss_and_pull(c, k, tau), closed_forms(c, k, tau), strict=True):
                worst = max(worst, ((ours - exact).abs() / exact).max().item())
    return worst


def table(entries: list[list[str]]) -> str:
    """A Markdown table: one row per k, one column per τ₁."""
    lines = ["| k | " + " | ".join(f"τ₁ = {tau:g}" for tau in TEMPERATURES) + " |", "| --- " * 6 + "|"]
    lines += [f"| {k} | " + " | ".join(row) + " |" for k, row in zip(MODALITIES, entries, strict=True)]
    return "\n".join(lines)


def draw(path: Path, progress: tqdm) -> None:
    import matplotlib

    matplotlib.use("Agg")  # writes a file, needs no screen
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (value, gradient, limit) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    figure.suptitle(
        "Where the alignment term stops pulling: k unit embeddings, any two of them at cosine c "
        "(dominant_sv_loss, float64)"
    )

    c = torch.linspace(0, 1 - 1e-6, 1500, dtype=torch.float64)
    colours = dict(zip(TEMPERATURES, (VERMILION, ORANGE, GREEN, SKY, BLUE), strict=True))
    for tau, colour in colours.items():
        loss, pull = loss_and_pull(c, SHOWN_K, tau)
        value.plot(c, loss, color=colour, lw=2, label=f"τ₁ = {tau:g}")
        gradient.plot(c, pull, color=colour, lw=2, label=f"τ₁ = {tau:g}")
        at = saturation_cosine(SHOWN_K, tau)
        if at is not None:
            gradient.plot(at, FRACTION * pull[0], "o", color=colour, ms=7, mec="white", zorder=3)
        progress.update()
    loss, pull = loss_and_pull(c, SHOWN_K, None)
    value.plot(c, loss, "--", color=BLACK, lw=1.4, label="leading")
    gradient.plot(c, pull, "--", color=BLACK, lw=1.4, label='objective="leading"')

    value.set(xlim=(0, 1), ylim=(0, None), xlabel="cosine c", ylabel="loss", title=f"Loss, k = {SHOWN_K}")
    value.legend(frameon=False, loc="upper right", fontsize=9, bbox_to_anchor=(1.0, 1.0))
    gradient.set(
        xlim=(0, 1),
        ylim=(1e-6, 3e2),
        yscale="log",
        xlabel="cosine c",
        ylabel="norm of the gradient, all k embeddings",
        title=f"Pull on the embeddings, k = {SHOWN_K} (dot: 1 % left)",
    )

    taus = torch.logspace(-2, math.log10(0.5), 46).tolist()
    markers = dict(zip(MODALITIES, ((BLACK, "o"), (VERMILION, "s"), (BLUE, "^"), (GREEN, "D")), strict=True))
    for k, (colour, marker) in markers.items():
        found = [(tau, at) for tau in taus if (at := saturation_cosine(k, tau)) is not None]
        curve = limit.plot(*zip(*found, strict=True), color=colour, marker=marker, ms=4, lw=1.4, label=f"k = {k}")
        curve[0].set_markevery(3)
        progress.update()
    limit.set(
        xscale="log",
        xlim=(0.009, 1.1),
        ylim=(0, 1),
        xlabel="τ₁",
        ylabel="cosine c",
        title="Cosine at which 1 % of the pull is left",
    )
    limit.xaxis.set_major_formatter("{x:g}")
    note = "right of its end, a line's\n1 % is reached at no c"
    limit.text(0.98, 0.06, note, ha="right", fontsize=9, transform=limit.transAxes)
    limit.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Check, print the tables, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the figure's path")
    arguments = parser.parse_args(argv)

    error = largest_error()
    print(f"largest relative difference from the closed forms: {error:.1e}\n")
    assert error < 1e-9, "the loss disagrees with its closed form"

    with tqdm(total=2 * len(MODALITIES) + len(TEMPERATURES), leave=False) as progress:
        rows = []
        for k in MODALITIES:
            found = [saturation_cosine(k, tau) for tau in TEMPERATURES]
            rows.append(["never" if at is None else f"{at:.3f}" for at in found])
            progress.update()
        draw(arguments.output, progress)
    print(f"Cosine at which the gradient has fallen to {FRACTION:.0%} of its norm at c = 0\n\n{table(rows)}\n")
    rows = [[f"{relative_pull(k, tau):.2g}" for tau in TEMPERATURES] for k in MODALITIES]
    print(f"Norm of the gradient at c = {LEVEL:g}, relative to that at c = 0\n\n{table(rows)}\n")
    print(f"Figure: {arguments.output}")


if __name__ == "__main__":
    main()
