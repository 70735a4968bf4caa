"""The Triton backend: fused kernels for NVIDIA and AMD GPUs, compiled on first use, no compiler needed at installation.

This module imports neither triton nor the kernels; ``launch`` does, the first time that an operator runs. On a
machine without a GPU the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 is set before Python starts: slow,
and meant for tests. Contrasts are the reference's, which are matrix products.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference

NAME = "triton"

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


_OLDEST = (3, 6)
# What has been distributing the module: which of them did is known from nothing but their metadata.
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-xpu")


def installed() -> bool:
    """Whether there is a Triton, found without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # what stands for it in sys.modules has no specification
        return True


@functools.cache
def version() -> str:
    """The newest that metadata speak of, in their words; "" where they do not."""
    found = []
    for name in _DISTRIBUTIONS:
        try:
            found.append(importlib.metadata.version(name) or "")  # nothing, by metadata without that line
        except Exception:  # not there; or there and broken, which is no reason to fail
            continue
    return max(found, key=_release, default="")


def _release(text: str) -> tuple[int, ...]:
    """(major, minor), and () of what is no version."""
    match = re.match(r"(?:v|\d+!)?(\d+)\.(\d+)", text.strip())
    return tuple(map(int, match.groups())) if match else ()


_NO_FLOAT64_DOT = torch.version.hip is not None and _release(version()) < (3, 9)


def unavailable() -> str | None:
    """Why this backend cannot run in this installation, or None."""
    if not installed():
        return "it needs the module 'triton', which is not installed"
    # Whether there is a GPU is not asked: torch would start the driver, and no process forked later could use it.
    if not _INTERPRETED and torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs alone (to interpret the kernels there, set TRITON_INTERPRET=1)"
    found = version()
    if () < _release(found) < _OLDEST:  # one that nobody knows the version of may do
        return f"it needs Triton {'.'.join(map(str, _OLDEST))} or newer, found {found}"
    return None


def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """Why this backend cannot take (B, d) embeddings of k modalities there, or None."""
    if device.type == "cuda":
        if k > 8 and _NO_FLOAT64_DOT:
            return "for k > 8 on AMD's GPUs it needs Triton 3.9, which has float64 matrix products there"
        return None
    if device.type == "cpu" and _INTERPRETED:
        return None
    return f"it has kernels for GPUs, not for {device.type}"


@functools.cache
def _launch() -> types.ModuleType:
    from . import launch

    return launch


@functools.cache
def _untraced(name: str) -> Any:
    return torch.compiler.disable(getattr(_launch(), name))


# Around a graph break Dynamo would compile what lies between tensors and launches too, piece by piece. Where nobody
# has loaded it, there is no need to, and that takes a second.


def _forward(*arguments: Any) -> Any:
    if "torch._dynamo" in sys.modules:
        return _untraced("forward")(*arguments)
    return _launch().forward(*arguments)


def _backward(*arguments: Any) -> Any:
    if "torch._dynamo" in sys.modules:
        return _untraced("backward")(*arguments)
    return _launch().backward(*arguments)


def _forward_shapes(
    embeddings: Sequence[Tensor],
    mask: Any,
    temperature: Any,
    fixed_temperature: float,
    normalize: bool,
    spectrum: bool,
    wanted: int,
) -> Any:
    first = embeddings[0]
    k = first.shape[1] if first.dim() == 3 else len(embeddings)
    state = first.new_empty((_launch().state_size(first.shape[0], k),), dtype=torch.float64)
    return reference.spectral_output_shapes(embeddings, spectrum, wanted), [state]


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def _observed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether someone must see an operator: a compiler, fake tensors, a subclass, a ``torch.func`` transform; and what
    makes tensors of memory that holds their negatives, or nothing where they are zero."""
    if torch.compiler.is_compiling():  # first, since Dynamo cannot trace the rest
        return True
    for x in tensors:
        if type(x) not in _PLAIN or (x is not None and (_is_wrapped(x) or x.is_neg() or x._is_zerotensor())):
            return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


# An operator written in Python takes the host some ten microseconds more than the function itself.


def _forward_or_operator(embeddings: Sequence[Tensor], mask: Any, temperature: Any, *settings: Any) -> Any:
    observed = _observed((*embeddings, mask, temperature))
    function = _operators["spectral_forward"] if observed else _forward
    return function(embeddings, mask, temperature, *settings)


def _backward_or_operator(embeddings: Sequence[Tensor], *arguments: Any) -> Any:
    mask, temperature, *_, grads, _ = arguments
    observed = _observed((*embeddings, mask, temperature, *grads))
    function = _operators["spectral_backward"] if observed else _backward
    return function(embeddings, *arguments)


_operators: dict[str, Any] = {}


def _layout() -> str:
    """A word for what a state is, for the operators' names: torch.compile keeps graphs on disk by these, and would run
    those made for the states of another version."""
    try:
        sources = [pkgutil.get_data(__name__, name) or b"" for name in ("kspace.py", "launch.py")]
    except OSError:  # a program that was packed without sources never meets another version
        sources = []
    return hashlib.sha256(b"".join(sources)).hexdigest()[:8]


def _registered() -> torch.library.Library:
    """The library with its operators, which nothing else holds before it is complete."""
    library = reference.new_library(f"pmrl_triton_{_layout()}")
    for name, implementation, shapes in (
        ("spectral_forward", _forward, _forward_shapes),
        ("spectral_backward", _backward, reference.spectral_backward_shapes),
    ):
        library.define(name + reference.signatures[name], tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CUDA", "CPU") if _INTERPRETED else ("CUDA",):
            library.impl(name, implementation, key)
        torch.library.register_fake(f"{library.ns}::{name}", shapes, lib=library)
        _operators[name] = getattr(getattr(torch.ops, library.ns), name).default
    return library


operators: Any = None
"""What ``autograd.py`` calls."""

if unavailable() is None:
    _library = _registered()
    operators = types.SimpleNamespace(
        spectral_forward=_forward_or_operator,
        spectral_backward=_backward_or_operator,
        instance_forward=reference.operators.instance_forward,
        instance_backward=reference.operators.instance_backward,
        modality_forward=reference.operators.modality_forward,
        modality_backward=reference.operators.modality_backward,
    )
