"""The drop-in replacement at work: one model, one seed, three losses, and where their curves part.

    python examples/drop_in/train.py

Features are synthetic: all modalities of an instance are nonlinear views of one latent vector, with noise of their own.
Everything but the loss is the same: the initial weights, the batches, the optimiser.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from model import WIDTHS, Heads, authors_loss, kernels_loss
from torch import Tensor
from tqdm import tqdm

from pmrl_kernels import PMRLComponents, alignment_score, uniformity

LATENT = 16
NOISE = 0.3
BATCH = 64
LEARNING_RATE = 1e-3

LOSSES: dict[str, Callable[[dict[str, Tensor]], PMRLComponents]] = {
    "authors": authors_loss,
    "authors, oriented": lambda embeddings: authors_loss(embeddings, oriented=True),
    "pmrl_kernels": kernels_loss,
}


def views(seed: int) -> Callable[[], dict[str, Tensor]]:
    """A source of batches, {name: features (BATCH, width)}."""
    generator = torch.Generator().manual_seed(seed)
    mixing = {name: torch.randn(LATENT, width, generator=generator) for name, width in WIDTHS.items()}

    def batch() -> dict[str, Tensor]:
        latent = torch.randn(BATCH, LATENT, generator=generator)
        return {
            name: torch.tanh(latent @ m / LATENT**0.5) + NOISE * torch.randn(BATCH, m.shape[1], generator=generator)
            for name, m in mixing.items()
        }

    return batch


def train(
    loss: Callable[[dict[str, Tensor]], PMRLComponents], steps: int, seed: int, progress: tqdm
) -> dict[str, Tensor]:
    """The components of the loss at every step, (steps,) each; two scores at the end; seconds a step in the loss."""
    torch.manual_seed(seed)
    model, batch = Heads(), views(seed)
    optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    curves: list[list[float]] = []
    seconds = 0.0
    for _ in range(steps):
        embeddings = model(batch())
        start = time.perf_counter()
        components = loss(embeddings)
        gradients = torch.autograd.grad(components.total, list(embeddings.values()))
        seconds += time.perf_counter() - start
        optimiser.zero_grad()
        torch.autograd.backward(list(embeddings.values()), gradients)
        optimiser.step()
        curves.append([part.item() for part in components])
        progress.update()
    result = dict(zip(PMRLComponents._fields, torch.tensor(curves).unbind(1), strict=True))
    with torch.no_grad():
        embeddings = model(batch())
    scores = {"alignment score": alignment_score(embeddings), "uniformity": uniformity(embeddings)}
    return result | scores | {"seconds": torch.tensor(seconds / steps)}


def parting(one: Tensor, other: Tensor) -> int | None:
    """The first step at which two curves differ by more than a thousandth."""
    apart = ((one - other).abs() > 1e-3 * other.abs()).nonzero()
    return int(apart[0]) if len(apart) else None


def draw(results: dict[str, dict[str, Tensor]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    styles = {"authors": {"linewidth": 1.2}, "authors, oriented": {"linewidth": 4, "alpha": 0.4}, "pmrl_kernels": {}}
    for ax, part in zip(axes, ("alignment", "instance"), strict=True):
        for name, result in results.items():
            ax.plot(result[part], label=name, **styles[name])
        ax.set(title=f"{part} term", xlabel="step", yscale="log")
        ax.grid(alpha=0.3)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number from 1 on")
    return int(text)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Tensor]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=count, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--double", action="store_true", help="in float64, where rounding parts no curves")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the figure")
    options = parser.parse_args(arguments)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if options.double else torch.float32)
    try:
        with tqdm(total=options.steps * len(LOSSES), disable=None) as progress:
            results = {name: train(loss, options.steps, options.seed, progress) for name, loss in LOSSES.items()}
    finally:
        torch.set_default_dtype(before)
    ours = results["pmrl_kernels"]
    print(
        f"{options.steps} steps, B = {BATCH}, {ours['total'].dtype}, seed {options.seed}, torch {torch.__version__}\n"
    )
    for name, result in results.items():
        print(
            f"{name:18} alignment {result['alignment'][-1]:.3e}, instance {result['instance'][-1]:.3e}, "
            f"alignment score {result['alignment score']:.3f}, uniformity {result['uniformity']:+.3f}, "
            f"{1e3 * result['seconds']:.2f} ms in the loss"
        )
    for name in ("authors", "authors, oriented"):
        step = parting(results[name]["total"], ours["total"])
        print(f"{name}: " + ("the same curve" if step is None else f"parts from ours at step {step}"))
    path = options.output / "drop_in.png"
    draw(results, path)
    print(f"figure: {path}")
    return results


if __name__ == "__main__":
    main()
