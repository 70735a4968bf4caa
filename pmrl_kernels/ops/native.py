"""The native backend: compiled kernels, on PyTorch's stable ABI.

The library registers its operators itself (csrc/library.cpp); ``pair`` gives them the shape functions that
``torch.compile`` and fake tensors need. Importing this module raises nothing: what keeps the library from working is
the reason that ``unavailable`` gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import binary
from .operators import Op, Pair

NAME = "native"

_PACKAGE = Path(__file__).parent.parent
_LIBRARY = _PACKAGE / binary.LIBRARY


def _record() -> list[str]:
    """What setup.py wrote about its outcome, and about later builds that left it alone."""
    try:
        text = (_PACKAGE / binary.RECORD).read_text(encoding="utf-8", errors="replace")
    except OSError:  # a file in a zip archive, too
        text = ""
    return text.strip().splitlines() or ["it was not built"]


def _load() -> dict[str, str]:
    """What the library says of itself. Raises ImportError with the reason for one that cannot be used."""
    # The operators' names are the process's, and a second library that registers them would end it. A copy of the
    # package imported before may have loaded one; of the same sources, it is as good as this copy's own.
    earlier = hasattr(torch.ops.pmrl_kernels, "build_info")
    if not earlier:
        if lacking := binary.damage(_LIBRARY):
            raise ImportError(f"{_LIBRARY.name} is damaged: {lacking}; install the package again")
        try:
            torch.ops.load_library(str(_LIBRARY))
        except OSError as error:  # torch names the file, and the loader's reason is in what it caught
            raise ImportError(f"{_LIBRARY.name} cannot be loaded: {error.__cause__ or error}") from error
        if not hasattr(torch.ops.pmrl_kernels, "build_info"):
            raise ImportError(f"{_LIBRARY.name} holds none of this package's operators; install the package again")
    facts = dict(line.split(": ", 1) for line in torch.ops.pmrl_kernels.build_info().splitlines())
    if earlier and facts["sources"].encode() not in _LIBRARY.read_bytes():
        raise ImportError(
            "this process has loaded the library of another version of pmrl_kernels already, and cannot load two; "
            "start Python anew, and import one of them"
        )
    return facts


build_info: dict[str, str] = {}
"""Facts of the build by name (sources, compiler, torch, compiled, isa, cuda, nvcc); empty where there is no library."""

broken = False
"""Whether the reason for being unavailable is a fault, and not the mere absence of a library."""

_unavailable: str | None = None


def describe() -> str:
    """What was built at installation and which instruction set runs; "(-)" marks one this processor lacks."""
    outcome, *later = _record()
    if not build_info:
        return "; ".join([outcome, *later])
    facts = build_info
    told = f"{facts['isa'] or 'none'} of {facts['compiled']}, by {facts['compiler']} with torch {facts['torch']}"
    return "; ".join([told, *later])


def describe_cuda() -> str:
    """Which architectures the library has kernels for, or why for none."""
    if not build_info:
        return "none: there is no native library"
    return build_info["cuda"] + (f", by {build_info['nvcc']}" if build_info["nvcc"] else "")


def cuda_unavailable(device: torch.device) -> str | None:
    """Why none of the library's kernels for CUDA run on that device, or None. This starts CUDA, where there is any."""
    if torch.version.hip is not None:  # which calls its devices "cuda" too
        return f"its kernels are for CUDA, and this PyTorch is for HIP {torch.version.hip}"
    if not build_info:
        return "there is no native library"
    index = device.index
    if index is None:  # torch has a current device where there is a driver, and raises where there is none
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _asked_of(index)


_answers: dict[int, str | None] = {}
"""By devices: an answer stays, and is wanted by every call."""


def _ask(index: int) -> str | None:
    return torch.ops.pmrl_kernels.cuda_unavailable(index) or None


def _asked_of(index: int) -> str | None:
    if index not in _answers:
        _answers[index] = _ask(index)
    return _answers[index]


# Dynamo calls it, and keeps the answer. (torch.compiler.assume_constant_result does no more, and loads the compiler.)
_asked_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable() -> str | None:
    """Why this backend cannot run in this installation, or None."""
    return _unavailable


def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """Why this backend cannot take (B, d) embeddings of k modalities there, or None."""
    if device.type != "cpu":
        return f"this version has kernels for the CPU only, not for {device.type}"
    return None


def pair(op: Op, forward_shapes: Callable[..., Any]) -> Pair:
    """The library's operators for an op. Raises ImportError where it has none, or others of these names.

    They take one shape function in a process, so that of the first copy of the package.
    """
    found = []
    for (name, signature), shapes in zip(op.signatures().items(), (forward_shapes, op.backward_shapes), strict=True):
        operator = getattr(torch.ops.pmrl_kernels, name).default
        wanted = torch._C.parse_schema(f"pmrl_kernels::{name}{signature}")
        if operator._schema != wanted:
            raise ImportError(f"{_LIBRARY.name} is of another version: got {operator._schema}, wanted {wanted}")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pmrl_kernels::{name}", "Meta"):
            torch.library.register_fake(f"pmrl_kernels::{name}", shapes)
        found.append(operator)
    return Pair(NAME, found[0], found[1], rejects)


try:
    if _LIBRARY.exists():
        build_info = _load()
        _unavailable, broken = build_info["unusable"] or None, bool(build_info["unusable"])
        if binary.outdated(build_info["sources"], _PACKAGE.parent):
            warnings.warn(
                "pmrl_kernels: the native library was not built from the sources beside it; run `make build`",
                stacklevel=2,
            )
    else:
        _unavailable = f"this installation has no compiled library: {describe()}"
except Exception as error:
    _unavailable, broken = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}", True
