"""The CUDA backend: kernels of the compiled library for NVIDIA's GPUs, compiled at installation.

The library (``native.py``) loads with the backend for CPUs, whose operators these are, for tensors of another device.
Whether a card runs them is asked when there is a tensor on it: asking starts CUDA, and no process forked later could
use it.
"""

from __future__ import annotations

import torch

from . import native

NAME = "cuda"

MOST_K = 8
"""As csrc/cuda/arguments.h has it: kernels are compiled for each number of modalities."""


def unavailable() -> str | None:
    """Why this backend cannot run in this installation, or None."""
    if not native.build_info:  # a fault of the library's is told of where that is loaded
        return f"its kernels are in the native library: {native.unavailable()}"
    told = native.build_info["cuda"]
    if told.startswith("none: "):
        return f"the native library was built without kernels for CUDA: {told.removeprefix('none: ')}"
    if torch.version.cuda is None:
        of = "CPUs alone" if torch.version.hip is None else f"HIP {torch.version.hip}"
        return f"this torch is built for {of}"
    return None


def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """Why this backend cannot take (B, d) embeddings of k modalities there, or None."""
    if device.type != "cuda":
        return f"it has kernels for CUDA, not for {device.type}"
    return native.cuda_unavailable(device)


def rejects_modalities(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """The same of the kernels over modalities."""
    if 2 <= k <= MOST_K:
        return rejects(device, dtype, k, d)
    return f"its kernels are for k in 2..{MOST_K}"
