"""Which implementation runs: one pure resolver over the backends of this installation.

A backend is a module of this package that has

* ``NAME``, and ``unavailable()`` and ``rejects(device, dtype, k, d)``: a reason, or None;
* ``operators``: a namespace with the six functions of ``reference.py`` under the same names and
  signatures. The ``state`` that a forward function returns is read by its own backward alone.

To add one, write the module and name it in ``_PREFERENCE``.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch

_logger = logging.getLogger("pmrl_kernels")

_PREFERENCE = ("native", "triton", "reference")  # fastest first


class Backend(Protocol):
    """What the resolver and the autograd Functions ask of a backend module."""

    NAME: str
    operators: Any

    def unavailable(self) -> str | None: ...

    def rejects(self, device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None: ...


def _load() -> tuple[dict[str, Any], dict[str, str]]:
    """The backends that work here by name, fastest first, and why the others do not."""
    loaded, reasons = {}, {}
    for name in _PREFERENCE:
        try:
            module = importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name == f"{__name__}.{name}":
                reasons[name] = "this version of pmrl_kernels does not contain it"
            else:
                reasons[name] = f"it needs the module {error.name!r}, which is not installed"
            continue
        reason = module.unavailable()
        if reason is None:
            loaded[name] = module
        else:
            reasons[name] = reason
    return loaded, reasons


available, unavailable_reasons = _load()

default_name = os.environ.get("PMRL_KERNELS_BACKEND") or None
"""What ``backend=None`` means in this process; read once, when the package is imported."""

_logged: set[str] = set()


def choose(
    candidates: Sequence[Backend],
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    k: int,
    d: int,
    reasons: dict[str, str],
) -> tuple[str, str | None]:
    """The name of the backend to run, and why a faster one was passed over (or None).

    Pure: it reads nothing but its arguments. ``candidates`` come fastest first, ``reasons`` tells of
    the backends that are not among them. Raises RuntimeError for a requested backend that cannot run.
    """
    if requested is not None:
        for candidate in candidates:
            if requested == candidate.NAME:
                reason = candidate.rejects(device, dtype, k, d)
                if reason is None:
                    return candidate.NAME, None
                raise RuntimeError(
                    f"backend {requested!r} cannot run {dtype} embeddings of k = {k}, d = {d} on {device}: {reason}"
                )
        raise RuntimeError(f"backend {requested!r} is not available: {reasons[requested]}")
    passed_over = None
    for candidate in candidates:
        reason = candidate.rejects(device, dtype, k, d)
        if reason is None:
            return candidate.NAME, passed_over
        passed_over = passed_over or f"{candidate.NAME}: {reason}"
    raise RuntimeError(f"no backend can run {dtype} embeddings of k = {k}, d = {d} on {device}: {passed_over}")


def check_name(requested: str | None, source: str = "backend") -> str | None:
    """Raises ValueError for a name that no backend has; whether that backend runs here is ``resolve``'s matter."""
    if requested is not None and requested not in _PREFERENCE:
        raise ValueError(f"{source}: got {requested!r}, wanted None or one of {', '.join(map(repr, _PREFERENCE))}")
    return requested


def resolve(requested: str | None, device: torch.device, dtype: torch.dtype, k: int, d: int) -> str:
    """The name of the backend for such embeddings: as requested, else as the environment says, else the fastest.

    A faster backend passed over is logged once (logger ``pmrl_kernels``, level INFO).

    Raises:
        ValueError: an unknown name.
        RuntimeError: a known backend that cannot run here, with the reason.
    """
    check_name(requested)
    if requested is None and default_name is not None:
        requested = check_name(default_name, "environment variable PMRL_KERNELS_BACKEND")
    name, passed_over = choose(tuple(available.values()), requested, device, dtype, k, d, unavailable_reasons)
    if passed_over is not None and not torch.compiler.is_compiling() and passed_over not in _logged:
        _logged.add(passed_over)
        _logger.info("using the %s backend; passed over %s", name, passed_over)
    return name
