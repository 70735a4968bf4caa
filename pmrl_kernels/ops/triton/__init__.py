"""The Triton backend: fused kernels for NVIDIA and AMD GPUs, compiled on first use, no compiler needed at installation.

Here is what op families share: whether it can run, and (``runtime.py`` and its neighbours) what their kernels are
compiled, launched and made of. This module imports no triton. On a machine without a GPU the kernels run in Triton's
interpreter, if TRITON_INTERPRET=1 is set before Python starts: slow, and meant for tests.
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
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAME = "triton"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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


OLD_ON_AMD = torch.version.hip is not None and _release(version()) < (3, 9)


def unavailable() -> str | None:
    """Why this backend cannot run in this installation, or None."""
    if not installed():
        return "it needs the module 'triton', which is not installed"
    # Whether there is a GPU is not asked: torch would start the driver, and no process forked later could use it.
    if not INTERPRETED and torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs alone (to interpret the kernels there, set TRITON_INTERPRET=1)"
    found = version()
    if () < _release(found) < _OLDEST:  # one that nobody knows the version of may do
        return f"it needs Triton {'.'.join(map(str, _OLDEST))} or newer, found {found}"
    return None


def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
    """Why this backend cannot take (B, d) embeddings of k modalities there, or None."""
    if device.type == "cuda":
        if k > 8 and OLD_ON_AMD:
            return "for k > 8 on AMD's GPUs it needs Triton 3.9, which has float64 matrix products there"
        return None
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"it has kernels for GPUs, not for {device.type}"


def fingerprint(package: str, file: str) -> str:
    """A word for what a state is, which a file says, for the operators' names: torch.compile keeps graphs on disk by
    these, and would run those made for the states of another version."""
    try:
        source = pkgutil.get_data(package, file) or b""
    except OSError:  # a program that was packed without sources never meets another version
        source = b""
    return hashlib.sha256(source).hexdigest()[:8]


def lazy(launch: Callable[[], ModuleType], name: str) -> Callable[..., Any]:
    """The function of this name of a module that is imported when it first runs.

    Around a graph break Dynamo would compile what lies between tensors and launches too, piece by piece. Where nobody
    has loaded it, there is no need to keep it from that, which takes a second.
    """

    @functools.cache
    def untraced() -> Any:
        return torch.compiler.disable(getattr(launch(), name))

    def call(*arguments: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return untraced()(*arguments)
        return getattr(launch(), name)(*arguments)

    return call


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def observed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether someone must see an operator: a compiler, fake tensors, a subclass, a ``torch.func`` transform; and what
    makes tensors of memory that holds their negatives, or nothing where they are zero."""
    if torch.compiler.is_compiling():  # first, since Dynamo cannot trace the rest
        return True
    for x in tensors:
        if type(x) not in _PLAIN or (x is not None and (_is_wrapped(x) or x.is_neg() or x._is_zerotensor())):
            return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
