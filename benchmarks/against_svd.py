"""`dominant_sv_loss` beside the same loss by `torch.linalg.svd`: time and gradient error, float32, CPU.

    python benchmarks/against_svd.py [--threads N] [--backend NAME]

Times are medians of forward + backward. The formulations take turns within one process, so that a busy
moment hits all of them alike. Errors are ‖gradient − truth‖/‖truth‖ against a float64 SVD of the same
inputs, at cosines where that gradient exists.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from pmrl_kernels import dominant_sv_loss

TEMPERATURE = 0.05
SHAPES = ((64, 512, 4), (1024, 512, 4), (1024, 512, 8), (4096, 512, 4))  # B, d, k
ROUNDS = 15
FULL_SVD_ROUNDS = 3  # it builds a (B, d, d) tensor and takes seconds
FULL_SVD_LIMIT = 1 << 29  # elements of that tensor


def by_svd(xs: list[Tensor], full_matrices: bool) -> Tensor:
    Z = normalize(torch.stack(xs, 2), dim=1)
    S = torch.linalg.svd(Z, full_matrices=full_matrices)[1]
    return torch.log1p(torch.exp((S[:, 1:] - S[:, :1]) / TEMPERATURE).sum(1)).mean()


def gradients(loss: Callable[[list[Tensor]], Tensor], xs: list[Tensor]) -> Tensor:
    return torch.stack(torch.autograd.grad(loss(xs), xs))


def embeddings(B: int, d: int, k: int, cosine: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random embeddings with an expected cosine between the modalities of an instance."""
    shared = torch.randn(B, d)
    return [
        (cosine**0.5 * shared + (1 - cosine) ** 0.5 * torch.randn(B, d)).to(dtype).requires_grad_() for _ in range(k)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend", default=None, help="of pmrl_kernels; default: the fastest that works")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    load = os.getloadavg()[0]

    losses: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "full SVD": lambda xs: by_svd(xs, True),
        "reduced SVD": lambda xs: by_svd(xs, False),
        "pmrl_kernels": lambda xs: dominant_sv_loss(xs, temperature=TEMPERATURE, backend=arguments.backend),
    }
    rows = []
    with tqdm(total=len(SHAPES) * ROUNDS, unit="round", leave=False) as progress:
        for B, d, k in SHAPES:
            xs = embeddings(B, d, k, 0.5)
            times: dict[str, list[float]] = {name: [] for name in losses}
            for step in range(-1, ROUNDS):
                for name, loss in losses.items():
                    if name == "full SVD" and (step >= FULL_SVD_ROUNDS or B * d * d > FULL_SVD_LIMIT):
                        continue
                    start = time.perf_counter()
                    gradients(loss, xs)
                    if step >= 0:  # the first round warms up
                        times[name].append(1e3 * (time.perf_counter() - start))
                progress.update(step >= 0)
            medians = [statistics.median(times[name]) if times[name] else float("nan") for name in losses]
            rows.append(
                f"{B:>6}{d:>6}{k:>4}" + "".join(f"{t:14.2f}" for t in medians) + f"{medians[1] / medians[2]:9.1f}x"
            )

    print(
        f"torch {torch.__version__}, {arguments.threads} threads, load {load:.1f} before, median ms of {ROUNDS} rounds"
    )
    print(f"{'B':>6}{'d':>6}{'k':>4}" + "".join(f"{name:>14}" for name in losses) + "   reduced/ours")
    print("\n".join(rows))

    print("\nrelative gradient error at (1024, 512, 4)")
    print(f"{'cosine':>10}{'reduced SVD':>14}{'pmrl_kernels':>14}{'ratio':>9}")
    for cosine in (0.0, 0.5, 0.9, 0.999, 0.99999):
        xs = embeddings(1024, 512, 4, cosine)
        truth = gradients(losses["reduced SVD"], [x.detach().double().requires_grad_() for x in xs])
        size = torch.linalg.vector_norm(truth)
        svd, ours = (
            float(torch.linalg.vector_norm(gradients(losses[name], xs).double() - truth) / size)
            for name in ("reduced SVD", "pmrl_kernels")
        )
        print(f"{cosine:>10}{svd:14.1e}{ours:14.1e}{svd / ours:8.1f}x")


if __name__ == "__main__":
    main()
