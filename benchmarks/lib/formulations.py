"""The alignment loss as it is written elsewhere, and the least any formulation can cost.

Each loss takes k embeddings (B, d), float32, and returns the mean over the batch of
log Σ_j exp((σ_j − σ₁)/τ), σ the singular values of an instance's normalised d x k matrix.

The rivals in k-space are meant to be the strongest that plain PyTorch allows: one pass to a Gram matrix,
a gradient written by hand, one pass to apply it. What was tried for them, forward + backward at
(B, d, k) = (1024, 512, 4) and 1 thread, in ms of processor time on a busy AVX-512 machine (read the ratios):

    eager       stack, one bmm for the Gram, k thin bmms for the gradients, all float32       6.7  kept
                one (k x k)·(k x d) bmm for the gradients: level here, 1.2 times slower
                  at B = 4096, and up to twice with 2 threads                                 6.4
                eigenvectors in float64 after a float32 Gram                                  6.9
                all in float64, which keeps small singular values                            11.8
                no stack: a dot product for each pair, addcmul for the gradients              9.1
    compiled    an autograd.Function, dot products and their application fused, float32       4.1  kept
                eigenvectors in float64 after a float32 Gram                                  4.2
                all in float64                                                                5.0
                no autograd.Function, differentiated through eigh                             4.5
                with the C++ wrapper or max_autotune: no gain                                 4.1
                one graph for each shape in place of one for all: level, 48 compilations
                Jacobi rotations in place of eigh, float32 (see JacobiAlignment)              2.7  kept
                Jacobi rotations, all in float64                                              3.7

`torch.linalg.eigh` is half of the compiled time, since it solves one matrix after the other on one thread.
The same rotations uncompiled are slower than `eigh` at k = 4 and B = 1024: a sweep on whole (k, k, B) tensors
takes 0.8 ms, and there are four or more of them; `eigh` takes 1.9 ms.

All of these hold the Gram matrix in float32. That is the fastest and loses singular values below some
3e-4·σ₁: the report's accuracy section says what it costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import cross_entropy, mse_loss, normalize

EPS32 = 2.0**-23
LARGE = 1024  # from this batch size on, compiled graphs are made to run on several threads

Loss = Callable[[Sequence[Tensor]], Tensor]


# ------------------------------------------------------------------------------------------------
# By singular value decomposition, and by eigenvalues through autograd
# ------------------------------------------------------------------------------------------------


def alignment(sigma: Tensor, temperature: float) -> Tensor:
    """The mean loss from singular values (B, k) in descending order, by the formula that does not cancel."""
    return torch.log1p(torch.exp((sigma[:, 1:] - sigma[:, :1]) / temperature).sum(1)).mean()


def full_svd(embeddings: Sequence[Tensor], temperature: float) -> Tensor:
    """As PMRL's authors write it: a (B, d, k) stack, an SVD with a d x d factor, cross entropy of class 0."""
    Z = normalize(torch.stack(tuple(embeddings), 2), dim=1)
    sigma = torch.linalg.svd(Z, full_matrices=True)[1]
    return cross_entropy(sigma / temperature, torch.zeros(len(sigma), dtype=torch.long, device=sigma.device))


def reduced_svd(embeddings: Sequence[Tensor], temperature: float) -> Tensor:
    Z = normalize(torch.stack(tuple(embeddings), 2), dim=1)
    return alignment(torch.linalg.svd(Z, full_matrices=False)[1], temperature)


def svdvals(embeddings: Sequence[Tensor], temperature: float) -> Tensor:
    Z = normalize(torch.stack(tuple(embeddings), 2), dim=1)
    return alignment(torch.linalg.svdvals(Z), temperature)


def gram_eigh(embeddings: Sequence[Tensor], temperature: float) -> Tensor:
    """The Gram matrix in the embeddings' dtype, its eigenvalues, their roots; autograd does the rest."""
    Z = normalize(torch.stack(tuple(embeddings), 1), dim=2)
    eigenvalues = torch.linalg.eigh(Z @ Z.mT)[0]
    # Rounding makes the least eigenvalues negative, and the derivative of a root at 0 is infinite.
    return alignment(eigenvalues.clamp_min(EPS32**2).sqrt().flip(1), temperature)


# ------------------------------------------------------------------------------------------------
# k-space in plain PyTorch: Gram (B, k, k) -> coefficients C (B, k, k), gradients dX = C X
# ------------------------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """Of the Gram G of normalised embeddings, eigenvalues ascending. Also in objectives.py."""

    loss: Tensor  # (): the mean over the batch
    gram: Tensor  # (B, k, k)
    inverse: Tensor  # (B, k): 1/‖x_m‖
    sigma: Tensor  # (B, k)
    V: Tensor  # (B, k, k): eigenvectors in columns
    slopes: Tensor  # (B, k): ∂loss/∂σ_j / σ_j for the sum of the batch's losses


def spectrum(gram: Tensor, temperature: float) -> Spectrum:
    inverse = gram.diagonal(dim1=1, dim2=2).rsqrt()
    gram = gram * inverse[:, :, None] * inverse[:, None, :]
    eigenvalues, V = torch.linalg.eigh(gram)
    sigma = eigenvalues.clamp_min(0).sqrt()
    weights = torch.exp((sigma[:, :-1] - sigma[:, -1:]) / temperature)
    total = weights.sum(1, keepdim=True)
    others = weights / (temperature * (1 + total))
    slopes = torch.cat((others, -others.sum(1, keepdim=True)), 1)
    slopes = torch.where(sigma > EPS32 * sigma[:, -1:], slopes / sigma, 0.0)
    return Spectrum(torch.log1p(total).mean(), gram, inverse, sigma, V, slopes)


def coefficients(found: Spectrum) -> Tensor:
    """C (B, k, k) with dX = C X for the sum of the batch's losses.

    M = V diag(g_j/σ_j) Vᵀ, C = D (M − diag(G M)) D with D = diag(1/‖x_m‖), G of the normalised embeddings.
    """
    M = torch.bmm(found.V * found.slopes[:, None, :], found.V.mT)
    C = M - torch.diag_embed((found.gram * M).sum(2))
    return C * found.inverse[:, :, None] * found.inverse[:, None, :]


class EagerAlignment(Function):
    """(temperature, *embeddings) -> the mean loss."""

    @staticmethod
    def forward(ctx: Any, temperature: float, *embeddings: Tensor) -> Tensor:
        X = torch.stack(embeddings, 1)
        found = spectrum(torch.bmm(X, X.mT), temperature)
        ctx.save_for_backward(X, coefficients(found))
        return found.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        X, C = ctx.saved_tensors
        C = C * (grad / len(X))
        return None, *(torch.bmm(C[:, m : m + 1], X).squeeze(1) for m in range(X.shape[1]))


def k_space(embeddings: Sequence[Tensor], temperature: float) -> Tensor:
    return EagerAlignment.apply(temperature, *embeddings)


def pairs(k: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(k) for j in range(i, k)]


def products(embeddings: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
    """The Gram's upper triangle, (B,) each. A compiler fuses all dot products into one pass."""
    return {(i, j): (embeddings[i] * embeddings[j]).sum(1) for i, j in pairs(len(embeddings))}


def combine(rows: Sequence[Sequence[Tensor]], embeddings: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Σ_j C_ij x_j from entries C_ij (B,). A compiler fuses all of it into one pass."""
    return tuple(sum(c[:, None] * x for c, x in zip(row, embeddings, strict=True)) for row in rows)


class FusedAlignment(Function):
    """(temperature, *embeddings) -> the mean loss, in a form for a compiler: no stack, no bmm over d."""

    @staticmethod
    def forward(ctx: Any, temperature: float, *embeddings: Tensor) -> Tensor:
        k, dots = len(embeddings), products(embeddings)
        gram = torch.stack([dots[min(i, j), max(i, j)] for i in range(k) for j in range(k)], 1).view(-1, k, k)
        found = spectrum(gram, temperature)
        ctx.save_for_backward(coefficients(found), *embeddings)
        return found.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        C, *embeddings = ctx.saved_tensors
        C = C * (grad / len(C))
        return None, *combine([row.unbind(1) for row in C.unbind(1)], embeddings)


@functools.cache
def _compiled(function: Callable[..., Any], k: int, large: bool, *constants: float) -> Callable[..., Any]:
    """``function(*constants, *tensors)`` compiled: one graph for each k and for small and large batches, for all B, d.

    The code generator decides from the first size it sees whether to use threads.
    """
    torch._dynamo.config.recompile_limit = 64  # the limit is for one function, and here are many k of one
    # Sizes of tensors are to be symbols, k is not: torch 2.13 computes wrongly where loops over it fill a dict.
    torch._dynamo.config.specialize_int = True
    return torch.compile(lambda *tensors: function(*constants, *tensors), dynamic=True)


def k_space_compiled(embeddings: Sequence[Tensor], temperature: float) -> Tensor:
    large = len(embeddings[0]) >= LARGE
    return _compiled(FusedAlignment.apply, len(embeddings), large, temperature)(*embeddings)


# ------------------------------------------------------------------------------------------------
# The same with a Jacobi eigensolver that a compiler vectorises over the batch
# ------------------------------------------------------------------------------------------------


def normalised_gram(*embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The upper triangle of the normalised embeddings' Gram, (k(k+1)/2, B), and 1/norms (k, B)."""
    dots = products(embeddings)
    inverse = [dots[m, m].rsqrt() for m in range(len(embeddings))]
    return torch.stack([dot * inverse[i] * inverse[j] for (i, j), dot in dots.items()]), torch.stack(inverse)


def rotate(k: int, rounds: int, upper: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """``rounds`` rounds of ⌊k/2⌋ disjoint Jacobi rotations on upper (k(k+1)/2, B) and V (k·k, B).

    The modalities move on by one seat after each round, as in a tournament, so that the same graph serves
    every round, and k rounds (k − 1 where k is even) are a sweep.
    """
    a = dict(zip(pairs(k), upper.unbind(0), strict=True))
    v = {(m, j): V[m * k + j] for m in range(k) for j in range(k)}
    cycle = k - 1 if k % 2 == 0 else k  # with an even number one seat stays
    seats = [(j + 1) % cycle if j < cycle else j for j in range(k)]
    turns = [(i, cycle - i) for i in range(1, (cycle + 1) // 2)] + ([(0, k - 1)] if k % 2 == 0 else [])
    for _ in range(rounds):
        for p, q in turns:
            off, gap = a[p, q], a[q, q] - a[p, p]
            size = gap.abs() + torch.sqrt(gap * gap + 4 * off * off) + 1e-30
            t = torch.where(gap >= 0, 2 * off, -2 * off) / size
            c = torch.rsqrt(1 + t * t)
            s = t * c
            a[p, p], a[q, q], a[p, q] = a[p, p] - t * off, a[q, q] + t * off, torch.zeros_like(off)
            for r in range(k):
                if r not in (p, q):
                    rp, rq = (min(r, p), max(r, p)), (min(r, q), max(r, q))
                    a[rp], a[rq] = c * a[rp] - s * a[rq], s * a[rp] + c * a[rq]
                v[r, p], v[r, q] = c * v[r, p] - s * v[r, q], s * v[r, p] + c * v[r, q]
        a = {(i, j): a[min(seats[i], seats[j]), max(seats[i], seats[j])] for i, j in pairs(k)}
        v = {(m, j): v[m, seats[j]] for m in range(k) for j in range(k)}
    return torch.stack(list(a.values())), torch.stack(list(v.values()))


def jacobi_coefficients(k: int, temperature: float, upper: Tensor, V: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss and C (k, k, B), as ``coefficients``, from eigenvalues in any order."""
    eigenvalues = torch.stack([upper[n] for n, (i, j) in enumerate(pairs(k)) if i == j]).clamp_min(0)
    sigma = eigenvalues.sqrt()
    leads = torch.arange(k, device=sigma.device)[:, None] == sigma.argmax(0)
    top = sigma.amax(0)
    weights = torch.where(leads, 0.0, torch.exp((sigma - top) / temperature))
    total = weights.sum(0)
    others = weights / (temperature * (1 + total))
    slopes = torch.where(leads, -others.sum(0), others) / sigma
    slopes = torch.where(sigma > EPS32 * top, slopes, 0.0)
    V = V.view(k, k, -1)
    M = (V[:, None] * V[None] * slopes).sum(2)
    along = (V * V * (eigenvalues * slopes)).sum(1)
    C = M - torch.eye(k, device=M.device)[:, :, None] * along
    return torch.log1p(total).mean(), C * inverse[:, None] * inverse


def jacobi_gradients(C: Tensor, grad: Tensor, *embeddings: Tensor) -> tuple[Tensor, ...]:
    C = C * (grad / C.shape[2])
    return combine([row.unbind(0) for row in C.unbind(0)], embeddings)


class JacobiAlignment(Function):
    """(temperature, *embeddings) -> the mean loss.

    Four compiled graphs, the one of rotations called again and again: a graph of all sweeps would take
    minutes to compile. The number of sweeps is fixed, at what float32 needs on this benchmark's inputs;
    a solver for all inputs would have to look whether it has converged.
    """

    @staticmethod
    def forward(ctx: Any, temperature: float, *embeddings: Tensor) -> Tensor:
        k = len(embeddings)
        upper, inverse = _compiled(normalised_gram, k, True)(*embeddings)
        V = torch.eye(k, device=upper.device).view(k * k, 1).expand(-1, upper.shape[1]).contiguous()
        sweeps = 4 if k <= 4 else 5 if k <= 6 else 6
        rounds = k - 1 + k % 2
        fused = rounds if k <= 4 else 1  # rounds in one graph, whose compile time grows with their number
        step = _compiled(rotate, k, True, k, fused)
        for _ in range(sweeps * rounds // fused):
            upper, V = step(upper, V)
        loss, C = _compiled(jacobi_coefficients, k, True, k, temperature)(upper, V, inverse)
        ctx.save_for_backward(C, *embeddings)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        C, *embeddings = ctx.saved_tensors
        return None, *_compiled(jacobi_gradients, len(embeddings), True)(C, grad, *embeddings)


def k_space_jacobi(embeddings: Sequence[Tensor], temperature: float) -> Tensor:
    return JacobiAlignment.apply(temperature, *embeddings)


# ------------------------------------------------------------------------------------------------
# Scales to read the others against
# ------------------------------------------------------------------------------------------------


def floor(embeddings: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Reads all embeddings, as a forward pass must; then reads them and writes gradients of their size."""
    with torch.no_grad():
        for x in embeddings:
            x.sum()
        return tuple(torch.mul(x, 0.5) for x in embeddings)


def mean_squared_error(embeddings: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One of PyTorch's own losses, forward and backward, on the first two modalities."""
    first, second = embeddings[:2]
    return torch.autograd.grad(mse_loss(first, second), (first, second))
