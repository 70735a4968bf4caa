"""The native backend: compiled kernels for the CPU, on PyTorch's stable ABI.

The library registers its operators itself (csrc/library.cpp); here they get the shape functions that
``torch.compile`` and fake tensors need.
"""

from __future__ import annotations

import hashlib
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference

NAME = "native"

_PACKAGE = Path(__file__).parent.parent
_LIBRARY = _PACKAGE / "libpmrl_kernels.so"
_RECORD = _PACKAGE / "native_build.txt"
_LANES = 16  # instances solved together, at most: the state comes in blocks of them


def _record() -> str:
    """What setup.py wrote about its outcome."""
    return _RECORD.read_text(encoding="utf-8", errors="replace").strip() if _RECORD.exists() else "it was not built"


def _load() -> tuple[dict[str, str], str | None]:
    """What the library says of itself, and why it cannot be used (or None)."""
    if not _LIBRARY.exists():
        return {}, f"this installation has no compiled library: {_record()}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:  # torch names the file, and the loader's reason is in what it caught
        return {}, f"{_LIBRARY.name} cannot be loaded: {error.__cause__ or error}"
    facts = dict(line.split(": ", 1) for line in torch.ops.pmrl_kernels.build_info().splitlines())
    return facts, facts["unusable"] or None


def source_hash(root: Path) -> str:
    """What CMakeLists.txt computes of the sources below ``root`` and builds into the library."""
    files = sorted(
        str(path.relative_to(root))
        for path in (root / "CMakeLists.txt", *root.glob("csrc/**/*.h"), *root.glob("csrc/**/*.cpp"))
    )
    digests = "".join(f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n" for name in files)
    return hashlib.sha256(digests.encode()).hexdigest()


build_info, _unavailable = _load()
"""Facts of the build by name (sources, compiler, torch, compiled, isa); empty where there is no library."""

if build_info and (_PACKAGE.parent / "csrc").is_dir() and build_info["sources"] != source_hash(_PACKAGE.parent):
    warnings.warn(
        "pmrl_kernels: the native library was not built from the sources beside it; run `make build`", stacklevel=2
    )


def describe() -> str:
    """What was built at installation and which instruction set runs; "(-)" marks one this processor lacks."""
    if not build_info:
        return _record()
    facts = build_info
    return f"{facts['isa'] or 'none'} of {facts['compiled']}, by {facts['compiler']} with torch {facts['torch']}"


def unavailable() -> str | None:
    """Why this backend cannot run in this installation, or None."""
    return _unavailable


def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """Why this backend cannot take (B, d) embeddings of k modalities there, or None."""
    if device.type != "cpu":
        return f"this version has kernels for the CPU only, not for {device.type}"
    return None


def _state_shape(B: int, k: int, normalize: bool, spectrum: bool, wide: bool) -> tuple[int, int]:
    """As csrc/cpu says: state_size numbers an instance, with room for whole blocks."""
    pairs = k + k * k if spectrum else 1 + k * (k + 1) // 2
    return B + _LANES - 1, pairs + k * (1 + int(normalize) + int(wide))  # a symbolic k takes no bool as a factor


def _spectral_forward_shapes(
    embeddings: Sequence[Tensor],
    mask: Any,
    temperature: Any,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
) -> Any:
    first = embeddings[0]
    B, k = first.shape[0], first.shape[1] if first.dim() == 3 else len(embeddings)
    wide = any(x.dtype == torch.float64 for x in embeddings)
    state = first.new_empty(_state_shape(B, k, normalize, spectrum, wide), dtype=torch.float64)
    return reference.spectral_output_shapes(embeddings, spectrum, wanted), [state]


# The contrasts keep similarities for their backward passes while there are few of them.


def _kept(count: int, n: int, columns: int, size: int) -> int:
    """As csrc/cpu/contrast.cpp says: nothing, or ``size`` numbers for each of ``count`` matrices (n, columns)."""
    return count * size if count * n * columns <= 1 << 22 else 0


def _instance_forward_shapes(u: Tensor, columns: Tensor | None, *_: Any) -> Any:
    n = u.shape[0]
    if columns is None:
        state = _kept(1, n, n, n * (n + 192) // 2)
    else:
        state = _kept(1, n, columns.shape[0], n * (columns.shape[0] + 32))
    return u.new_empty(()), u.new_empty((n,), dtype=torch.float64), u.new_empty((state,))


def _modality_forward_shapes(
    z: Sequence[Tensor], u: Tensor, mask: Tensor | None, columns: Sequence[Tensor], *_: Any
) -> Any:
    n, k = u.shape[0], len(z)
    others = columns[0].shape[0] if columns else n
    state = k * others + k + _kept(2 * k if columns else k, n, others, n * (others + 32))
    return u.new_empty(()), u.new_empty((2, k, n), dtype=torch.float64), u.new_empty((state,))


operators: Any = None
"""What ``autograd.py`` calls."""

if _unavailable is None:
    torch.library.register_fake("pmrl_kernels::spectral_forward", _spectral_forward_shapes)
    torch.library.register_fake("pmrl_kernels::spectral_backward", reference.spectral_backward_shapes)
    torch.library.register_fake("pmrl_kernels::instance_forward", _instance_forward_shapes)
    torch.library.register_fake("pmrl_kernels::instance_backward", reference.instance_backward_shapes)
    torch.library.register_fake("pmrl_kernels::modality_forward", _modality_forward_shapes)
    torch.library.register_fake("pmrl_kernels::modality_backward", reference.modality_backward_shapes)
    operators = types.SimpleNamespace(
        **{name: getattr(torch.ops.pmrl_kernels, name).default for name in reference.signatures}
    )
