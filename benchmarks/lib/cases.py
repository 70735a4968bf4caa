"""The registry of the alignment loss: which shapes, which contenders, which inputs.

A formulation in plain PyTorch joins IN_TORCH, and is measured on CPUs and GPUs. A backend for CPUs joins CONTENDERS,
with an ``unavailable`` that says where it cannot run; what runs on a GPU only is listed in gpu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pmrl_kernels import dominant_sv_loss, ops

from . import formulations
from .formulations import Loss

TEMPERATURE = 0.05
COSINE = 0.5  # expected between modalities of an instance
FULL_SVD_LIMIT = 1 << 29  # elements of the (B, d, d) factor: 2 GiB

Step = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Case(NamedTuple):
    """Embeddings of one size, float32."""

    B: int
    d: int
    k: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"B={self.B},d={self.d},k={self.k}"


CASES = tuple(Case(B, d, k) for k in (3, 4, 6, 8) for d in (128, 512, 1024) for B in (64, 256, 1024, 4096))
QUICK = (Case(1024, 512, 4), Case(64, 512, 4))
OVERHEAD = Case(8, 16, 4)
MEMORY = Case(1024, 1024, 4)
GATE_SIZES = ((1024, 128), (64, 128))  # B, d; both size classes of compiled graphs, the large one first
GATE_COSINE = 0.05  # far from alignment, where the authors' cross entropy still holds the loss in float32
LEADING = tuple(Case(1024, 512, k) for k in (4, 8, 16, 32))


def embeddings(case: Case, cosine: float = COSINE, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """k random leaves (B, d) that share a part: the expected cosine of two modalities is ``cosine``."""
    generator = torch.Generator(case.device).manual_seed(seed)  # drawn where they are: a GPU's take a CPU seconds
    shared, *own = (torch.randn(case.B, case.d, generator=generator, device=case.device) for _ in range(case.k + 1))
    return [(cosine**0.5 * shared + (1 - cosine) ** 0.5 * x).to(dtype).contiguous().requires_grad_() for x in own]


@dataclass(frozen=True)
class Contender:
    """A formulation, and where it can run."""

    name: str
    column: str
    """The name in a narrow table."""
    loss: Loss | None = None
    """From embeddings to the mean loss; None for those of which only the work counts."""
    work: Step | None = None
    """Forward and backward, where that is not the loss and its gradients."""
    exact: Step | None = None
    """The same step by the reference, which in float64 it has to agree with where there is no SVD to compare with."""
    tolerance: float = 1e-3
    """Of loss and gradients at the gate, relative to a float64 SVD: wide enough for float32, for no wrong formula."""
    rival: str | None = None
    """"eager" or "compiled": a k-space formulation in plain PyTorch, the best of either kind being a rival to beat."""
    unavailable: str | None = None
    """Why it cannot run in this installation."""
    waits: bool = False
    """Whether it asks torch.linalg for eigenvalues or singular values, on whose outcome the host of a GPU waits."""
    largest: int | None = None
    """The most elements of a (B, d, d) factor it is asked for."""
    most: int | None = None
    """The most modalities it takes."""

    def step(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Forward + backward: the gradients of all embeddings."""
        if self.work is not None:
            return self.work(xs)
        assert self.loss is not None
        return torch.autograd.grad(self.loss(xs), tuple(xs))

    def declines(self, case: Case) -> str | None:
        """Why it is not run there, or None."""
        if self.unavailable is not None:
            return self.unavailable
        if self.largest is not None and case.B * case.d**2 > self.largest:
            return f"its (B, d, d) factor would take {case.B * case.d**2 / 2**28:.0f} GiB"
        return None


def in_torch(function: Callable[[Sequence[Tensor], float], Tensor]) -> Loss:
    return functools.partial(function, temperature=TEMPERATURE)


def ours(backend: str) -> Loss:
    return functools.partial(dominant_sv_loss, temperature=TEMPERATURE, backend=backend)


CPU = torch.device("cpu")
ON_A_CPU = tuple(n for n, b in ops.available.items() if b.rejects(CPU, torch.float32, 4, 512) is None)
"""Our backends that take tensors there."""

NATIVE, REDUCED, FLOOR = "native", "reduced SVD", "floor"
RIVALS = ("eager", "compiled")

IN_TORCH = (
    Contender("full SVD", "full SVD", in_torch(formulations.full_svd), waits=True, largest=FULL_SVD_LIMIT),
    Contender(REDUCED, "reduced", in_torch(formulations.reduced_svd), waits=True),
    Contender("svdvals", "svdvals", in_torch(formulations.svdvals), waits=True),
    Contender("Gram + eigh", "eigh", in_torch(formulations.gram_eigh), waits=True),
    Contender("torch k-space", "k-space", in_torch(formulations.k_space), rival="eager", waits=True),
    Contender(
        "torch k-space, compiled",
        "compiled",
        in_torch(formulations.k_space_compiled),
        rival="compiled",
        waits=True,
    ),
    Contender("torch k-space, compiled Jacobi", "Jacobi", in_torch(formulations.k_space_jacobi), rival="compiled"),
)
REFERENCE = Contender("reference", "reference", ours("reference"), tolerance=1e-6, waits=True)
CONTENDERS = (
    *IN_TORCH,
    REFERENCE,
    Contender(NATIVE, NATIVE, ours(NATIVE), tolerance=1e-6, unavailable=ops.unavailable_reasons.get(NATIVE)),
    Contender(FLOOR, FLOOR, work=formulations.floor),
)
MEAN_SQUARED_ERROR = Contender("F.mse_loss", "mse_loss", work=formulations.mean_squared_error)


def named(name: str) -> Contender:
    return next(contender for contender in (*CONTENDERS, MEAN_SQUARED_ERROR) if contender.name == name)
