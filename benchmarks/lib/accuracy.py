"""How far losses, gradients and singular values are from float64, and the gate: nothing wrong is timed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from pmrl_kernels import singular_values

from . import formulations
from .cases import CONTENDERS, ON_A_CPU, TEMPERATURE, Case, Contender, embeddings

EPS32 = formulations.EPS32
INSTANCES, WIDTH = 256, 512
MODALITIES = (4, 8, 16)
SPECTRA = ("random", "graded", "near rank 1")
COSINES = (0.0, 0.5, 0.9, 0.999, 0.99999)
GRADIENT_CASE = Case(1024, 512, 4)


def doubled(xs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers as float64 leaves."""
    return [x.detach().double().requires_grad_() for x in xs]


def error(loss: Tensor, xs: Sequence[Tensor], exact: Tensor, doubles: Sequence[Tensor]) -> float:
    """The larger of the relative errors of a loss and of its gradients, those of all inputs together."""
    found, truth = (
        torch.cat([g.double().flatten() for g in torch.autograd.grad(of, inputs, allow_unused=True) if g is not None])
        for of, inputs in ((loss, xs), (exact, doubles))
    )
    errors = [
        float(torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth)),
        float((loss.detach().double() - exact.detach()).abs() / exact.detach().abs()),
    ]
    # A NaN compares as neither less nor greater, so it must not get lost in a maximum.
    return float("nan") if any(map(math.isnan, errors)) else max(errors)


def agreement(contender: Contender, xs: list[Tensor]) -> float:
    """The error of a contender's loss and gradients against a float64 SVD; NaN if either is."""
    assert contender.loss is not None
    doubles = doubled(xs)
    return error(contender.loss(xs), xs, formulations.reduced_svd(doubles, TEMPERATURE), doubles)


def disagreement(contender: Contender, xs: list[Tensor], by_svd: bool = True) -> float:
    """``agreement``, where there is a loss to take a float64 SVD of; else how far the gradients of a step are from the
    reference's in float64, of their norm."""
    if contender.loss is not None and (by_svd or contender.exact is None):
        return agreement(contender, xs)
    assert contender.exact is not None
    found, truth = (
        torch.cat([g.double().flatten() for g in gradients])
        for gradients in (contender.step(xs), contender.exact(doubled(xs)))
    )
    return float(torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth))


def refuse(said: str) -> NoReturn:
    sys.exit(f"{said}. No time of a wrong result is printed.")


def with_spectrum(spectrum: str, k: int) -> Tensor:
    """Float32 embeddings (B, k, d) whose d x k matrices have, up to rounding, singular values of that kind."""
    generator = torch.Generator().manual_seed(k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if spectrum == "random":
        return normal(INSTANCES, k, WIDTH).float()
    if spectrum == "graded":
        sigma = torch.logspace(0, -6, k, dtype=torch.float64).expand(INSTANCES, k)
    else:
        sigma = torch.cat((torch.ones(INSTANCES, 1), 1e-5 * normal(INSTANCES, k - 1).abs()), 1)
    U = torch.linalg.qr(normal(INSTANCES, WIDTH, k)).Q
    V = torch.linalg.qr(normal(INSTANCES, k, k)).Q
    return (V * sigma[:, None] @ U.mT).float().contiguous()


def sigma_errors() -> list[dict[str, Any]]:
    """Largest |σ_j − σ_j*| over instances and j, in units of eps32·σ₁, for each spectrum and k."""
    rows = []
    for spectrum in SPECTRA:
        for k in MODALITIES:
            X = with_spectrum(spectrum, k)
            truth = torch.linalg.svdvals(X.double())
            found = {name: singular_values(X, normalize=False, backend=name) for name in ON_A_CPU}
            found["torch.linalg.svdvals"] = torch.linalg.svdvals(X)
            eigenvalues = torch.linalg.eigvalsh(torch.bmm(X, X.mT)).flip(1)
            found["float32 Gram + eigh"] = eigenvalues.clamp_min(0).sqrt()
            errors = {
                name: float(((sigma.double() - truth).abs() / (EPS32 * truth[:, :1])).max())
                for name, sigma in found.items()
            }
            rows.append({"spectrum": spectrum, "k": k, **errors})
    return rows


def gradient_errors(contenders: tuple[Contender, ...] = CONTENDERS, case: Case = GRADIENT_CASE) -> list[dict[str, Any]]:
    """‖gradient − truth‖/‖truth‖ over all embeddings, for each expected cosine between modalities.

    The SVD's loss here is the formula that does not cancel, so that its errors are the SVD's own. The full
    SVD is left out: its cross entropy has no gradient left in float32 at these cosines.
    """
    rows = []
    for cosine in COSINES:
        xs = embeddings(case, cosine)
        doubles = doubled(xs)
        truth = torch.stack(torch.autograd.grad(formulations.reduced_svd(doubles, TEMPERATURE), doubles))
        row: dict[str, Any] = {"cosine": cosine}
        for contender in contenders:
            if contender.loss is None or contender.largest is not None or contender.declines(case):
                continue
            error = torch.stack(tuple(contender.step(xs))).double() - truth
            row[contender.name] = float(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(truth))
        rows.append(row)
    return rows
