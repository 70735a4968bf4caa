"""The native backend: compiled kernels for the CPU, on PyTorch's stable ABI.

The library registers its operators itself (csrc/library.cpp); here they get the shape functions that
``torch.compile`` and fake tensors need. Importing this module raises nothing: what keeps the library from working is
the reason that ``unavailable`` gives.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import binary, reference

NAME = "native"

_PACKAGE = Path(__file__).parent.parent
_LIBRARY = _PACKAGE / binary.LIBRARY
_LANES = 16  # instances solved together, at most: the state comes in blocks of them


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
"""Facts of the build by name (sources, compiler, torch, compiled, isa); empty where there is no library."""

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

_SHAPES: dict[str, Callable[..., Any]] = {
    "spectral_forward": _spectral_forward_shapes,
    "spectral_backward": reference.spectral_backward_shapes,
    "instance_forward": _instance_forward_shapes,
    "instance_backward": reference.instance_backward_shapes,
    "modality_forward": _modality_forward_shapes,
    "modality_backward": reference.modality_backward_shapes,
}


def _operators() -> Any:
    """The library's operators. They take one shape function in a process, so that of the first copy of the package."""
    found = {}
    for name, shapes in _SHAPES.items():
        found[name] = getattr(torch.ops.pmrl_kernels, name).default
        wanted = torch._C.parse_schema(f"pmrl_kernels::{name}{reference.signatures[name]}")
        if found[name]._schema != wanted:
            raise ImportError(f"{_LIBRARY.name} is of another version: got {found[name]._schema}, wanted {wanted}")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pmrl_kernels::{name}", "Meta"):
            torch.library.register_fake(f"pmrl_kernels::{name}", shapes)
    return types.SimpleNamespace(**found)


try:
    if _LIBRARY.exists():
        build_info = _load()
        _unavailable, broken = build_info["unusable"] or None, bool(build_info["unusable"])
        if binary.outdated(build_info["sources"], _PACKAGE.parent):
            warnings.warn(
                "pmrl_kernels: the native library was not built from the sources beside it; run `make build`",
                stacklevel=2,
            )
        if _unavailable is None:
            operators = _operators()
    else:
        _unavailable = f"this installation has no compiled library: {describe()}"
except Exception as error:
    _unavailable, broken = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}", True
