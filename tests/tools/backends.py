"""Backends that are none, and Python processes in an environment without settings."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import pmrl_kernels
from pmrl_kernels import ops
from pmrl_kernels.ops.operators import Op, Pair
from tests.tools import forks

PACKAGE = Path(pmrl_kernels.__file__).parent
CPU = torch.device("cpu")


ALL_OPS = tuple(op.name for family in ops.FAMILIES for op in family.OPS)


def fake_module(name: str) -> types.SimpleNamespace:
    """A backend's module, which says that it works here."""
    return types.SimpleNamespace(NAME=name, unavailable=lambda: None, rejects=lambda device, dtype, k, d: None)


def fake(
    name: str, rejection: str | None = None, offered: Sequence[str] = ALL_OPS, computes: Any = None
) -> ops.Backend:
    """A backend that works here, offers these ops, and takes everything, or nothing."""

    def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
        return rejection

    pairs = {op: Pair(name, computes, computes, rejects) for op in offered}
    return ops.Backend(name, rejects, pairs, {op: "there are none" for op in ALL_OPS if op not in offered})


def use_backends(monkeypatch: pytest.MonkeyPatch, available: Mapping[str, ops.Backend]) -> None:
    """These are the backends that work here, and nothing has been resolved or logged yet."""
    for name, value in {"available": available, "default_name": None, "_logged": set(), "_resolved": {}}.items():
        monkeypatch.setattr(ops, name, value)


def operators(backend: str) -> types.SimpleNamespace:
    """All operators by name, as they run on a CPU where this backend is asked for."""
    found = {}
    for op in (op for family in ops.FAMILIES for op in family.OPS):
        pair = ops.resolve(op, backend, CPU, torch.float32, 3, 64)
        found |= {f"{op.name}_forward": pair.forward, f"{op.name}_backward": pair.backward}
    return types.SimpleNamespace(**found)


def by_dtype(backend: str) -> types.SimpleNamespace:
    """The same, of whoever computes each call: a backend may leave float64 to others."""
    parts = ("forward", "backward")
    every = [(op, part) for family in ops.FAMILIES for op in family.OPS for part in parts]
    return types.SimpleNamespace(**{f"{op.name}_{part}": _resolving(op, part, backend) for op, part in every})


def _resolving(op: Op, part: str, backend: str) -> Callable[..., Any]:
    def call(first: Sequence[torch.Tensor], *arguments: Any) -> Any:
        return getattr(ops.resolve(op, backend, CPU, first[0].dtype, 3, 64), part)(first, *arguments)

    return call


def run_python(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -c code`` in a clean environment for this package, or for the copy in ``cwd``; with torch imported."""
    dropped = {"PMRL_KERNELS_BACKEND", *(("PYTHONPATH",) if cwd else ())}
    variables = {key: value for key, value in os.environ.items() if key not in dropped} | environment
    if sys.platform == "linux":
        return forks.run(code, cwd, variables, timeout=120)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


REASONS = {"triton": "triton is not installed"}


def choose(candidates: list[ops.Backend], requested: str | None = None, op: str = "spectral") -> tuple[str, str | None]:
    """The name of the backend that runs, and why others do not."""
    pair, passed_over = ops.choose(op, candidates, requested, CPU, torch.float32, 3, 64, REASONS)
    return pair.backend, passed_over


def raising(error: BaseException) -> Callable[[], Any]:
    def call(*_: Any) -> Any:
        raise error

    return call
