"""What the tests of the native backend share. Where there is none, importing this skips the module that does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import ops
from pmrl_kernels.ops import native
from pmrl_kernels.ops.spectral import spec
from tests import ROOT

if "native" not in ops.available:
    pytest.skip(f"no native backend here: {ops.unavailable_reasons['native']}", allow_module_level=True)


OPS = torch.ops.pmrl_kernels
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)
ALL = spec.ALIGNMENT | spec.SIGMA | spec.U | spec.V | spec.Z | spec.W

COMPILED = native.build_info["compiled"].split()
RUNS_HERE = [isa for isa in COMPILED if not isa.endswith("(-)")]
OTHERS = [isa for isa in RUNS_HERE if isa != native.build_info["isa"]]


def run(*arguments: str, isa: str | None = None, timeout: int = 60) -> subprocess.CompletedProcess[str]:
    """Another Python process, in which PMRL_KERNELS_ISA is ``isa`` and no backend is preset."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PMRL_KERNELS")}
    if isa is not None:
        environment["PMRL_KERNELS_ISA"] = isa
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def modalities(k: int = 3, B: int = 9, d: int = 21, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Embeddings that share something."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(B, d, generator=generator)
    return [(shared + torch.randn(B, d, generator=generator)).to(dtype).requires_grad_() for _ in range(k)]


def some_mask(B: int, k: int) -> Tensor:
    """Every instance lacks another selection of modalities, one of them all."""
    return torch.rand(B, k, generator=torch.Generator().manual_seed(1)) > 0.3


def awkward(k: int, B: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Instances of all kinds side by side: random, aligned, tied, antipodal, zero, huge, tiny, NaN and Inf."""
    xs = [x.detach().double() for x in modalities(k, B, d)]
    for i in range(B):
        kind = i % 13
        for m, x in enumerate(xs):
            if kind == 1:
                x[i] = xs[0][i]
            elif kind == 2:
                x[i] = torch.eye(d, dtype=torch.float64)[m % d]
            elif kind == 3:
                x[i] = xs[0][i] * (-1) ** m
            elif kind == 4 or (kind == 5 and m == k - 1):
                x[i] = 0.0
            elif kind in (6, 7):
                x[i] *= {torch.float64: 1e160, torch.float16: 100.0}.get(dtype, 1e18) ** (1 if kind == 6 else -1)
            elif kind == 8 and m == i % k:
                x[i, -1] = torch.nan
            elif kind == 9 and m == i % k:
                x[i, 0] = torch.inf
            elif kind == 10:
                x[i] = xs[0][i] + 1e-4 * x[i]
    return [x.to(dtype) for x in xs]


def everything(
    xs: list[Tensor], mask: Tensor | None, normalize: bool, spectrum: bool, weights: Tensor, ops: Any = OPS
) -> list[Tensor]:
    """All outputs and, from gradients of all of them and of the first alone, all gradients: a row per instance."""
    options = (xs, mask, None, 0.3, normalize, spectrum, ALL)
    outputs, state = ops.spectral_forward(*options)
    first = weights.to(outputs[0].dtype)
    rest = [first[:, None] * torch.linspace(0.5, 1.0, x.shape[1], dtype=first.dtype) for x in outputs[1:]]
    needed = [True] * len(xs)
    grads = ops.spectral_backward(*options, state, [first, *rest], needed)
    plain = ops.spectral_backward(*options, state, [first, *(None for _ in rest)], needed)
    return [*outputs, *grads, *plain]


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Bit by bit, signs of zeros included; NaN payloads apart."""

    def bits(x: Tensor) -> Tensor:
        x = x.detach().masked_fill(x.isnan(), torch.nan).contiguous()
        return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])

    return all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))
