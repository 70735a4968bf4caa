"""The reference backend: every op in pure PyTorch, forward and hand-written backward.

It is the fallback where nothing is compiled and the oracle that every kernel is tested against, so it imports nothing
of the package's kernels, and runs on any device that has float64. Each op family has its own ``reference.py``; here is
what they share. Their formulas are derived in docs/mathematics.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "reference"
NAMESPACE = "pmrl_reference"
"""Of the operators: each family's is this, with its name behind it."""


def unavailable() -> str | None:
    """Why this backend cannot run in this installation, or None. It always can."""
    return None


def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """Why this backend cannot take (B, d) embeddings of k modalities there, or None."""
    if device.type == "mps":
        return "it keeps k x k matrices in float64, which mps devices lack"
    return None


def read_mask(mask: Tensor) -> Tensor:
    """The mask, True where its byte is not 0. Whatever computes with a mask begins with this, or reads bytes itself.

    A bool tensor may be a view of other bytes than 0 and 1 (an image's 255), and torch's own operations do not agree on
    what that is: some count 255, some take its complement bit by bit.
    """
    return mask.view(torch.uint8) != 0


def read_temperature(tensor: Tensor | None, value: float, contrast: bool = False) -> Tensor | float:
    """A tensor is never read by the host, so a bad one cannot raise: it turns the result into NaN.

    What ``inputs.py`` refuses of a Python number is bad, so of a contrast whatever is no normal number in float32.
    """
    if tensor is None:
        return value
    tau = tensor.double()
    limits = torch.finfo(torch.float32)
    good = (tau >= limits.tiny) & (tau <= limits.max) if contrast else (tau > 0) & tau.isfinite()
    return torch.where(good, tau, torch.nan)


def exponents_of(peak: Tensor) -> Tensor:
    """Powers of two that bring what is of this size to order 1, where squares stay in range."""
    # The exponent of an Inf or NaN is unspecified; such a row is NaN in the end, whatever its scale.
    return torch.frexp(peak.nan_to_num(nan=1.0, posinf=1.0)).exponent


def scale_by_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x·2^exponent, exactly. In two steps: 2^1074, which lifts the least subnormal, is no float64."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    for part in (half, exponent - half):
        x = x * ((part.to(torch.int64) + 1023) << 52).view(torch.float64)
    return x


_WORKSPACE = 1 << 30
"""Bytes for cuSOLVER to work in, about."""


def at_once(k: int) -> int:
    """How many k x k matrices cuSOLVER decomposes at a time.

    It asks for (512 + 6 k) KiB + 24 k² bytes of workspace for each (by what it asked for at k = 3, 4, 12 and 32 on an
    H200 with CUDA 13.0), so for 4.6 to 6.3 GiB for 9000 of them; 2024 of k = 1 and 1440 of k = 32 take 1 GiB. And it
    fails with 65536 of them.
    """
    return max(1, _WORKSPACE // ((512 + 6 * k) * 1024 + 24 * k * k))


def decomposed(A: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of (B, k, k), so many at a time."""
    parts = [torch.linalg.eigh(some) for some in A.split(number)]
    if len(parts) == 1:
        return parts[0][0], parts[0][1]
    return torch.cat([values for values, _ in parts]), torch.cat([V for _, V in parts])


def eigenpairs(A: Tensor) -> tuple[Tensor, Tensor]:
    """Of symmetric matrices (B, k, k): eigenvalues (B, k) in descending order, and eigenvectors (B, k, k) in columns.

    LAPACK raises for the whole batch when one matrix holds a NaN, so such a matrix is kept from it and its results are
    NaN.
    """
    bad = ~A.isfinite().all(-1).all(-1)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    number = max(1, len(A)) if A.device.type == "cpu" else at_once(A.shape[-1])
    eigenvalues, V = decomposed(torch.where(bad[:, None, None], eye, A), number)
    eigenvalues, V = eigenvalues.flip(-1), V.flip(-1)
    return eigenvalues.masked_fill(bad[:, None], torch.nan), V.masked_fill(bad[:, None, None], torch.nan)
