"""Which implementation runs: one pure resolver over the backends of this installation.

A backend is a module of this package that has

* ``NAME``, and ``unavailable()`` and ``rejects(device, dtype, k, d)``: a reason, or None;
* ``operators``: a namespace with the six functions of ``reference.py`` under the same names and
  signatures. The ``state`` that a forward function returns is read by its own backward alone.

To add one, write the module, name it in ``_PREFERENCE`` and import it in ``_import``.

The reference always works. A backend that does not is left out with a reason, whatever happened: logged when the
package is imported (logger ``pmrl_kernels``), at INFO where something is merely not there, at WARNING where something
is broken, which is what an exception means, or a module's ``broken``.
"""

from __future__ import annotations

import importlib.util
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


def _import(name: str) -> Any:
    """A backend's module. By statements, which those who read sources see: PyInstaller takes along what they name."""
    if name == "native":
        from . import native

        return native
    if name == "triton":
        from . import triton

        return triton
    from . import reference

    return reference


def _why_not(name: str, error: Exception) -> tuple[str, bool]:
    """Why importing the backend failed, and whether something is broken, or just not there."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and missing.partition(".")[0] != __name__.partition(".")[0]:
        return f"it needs the module {missing!r}, which is not installed", False
    if isinstance(error, ImportError) and importlib.util.find_spec(f"{__name__}.{name}") is None:
        return "this version of pmrl_kernels does not contain it", False
    return f"{type(error).__name__}: {error}", True


def _load() -> tuple[dict[str, Any], dict[str, str]]:
    """The backends that work here by name, fastest first, and why the others do not."""
    loaded, reasons = {}, {}
    for name in _PREFERENCE:
        reason: str | None
        try:
            module = _import(name)
            reason, broken = module.unavailable(), getattr(module, "broken", False)
        except Exception as error:
            if name == "reference":
                raise
            reason, broken = _why_not(name, error)
        if reason is None:
            loaded[name] = module
        else:
            reasons[name] = reason
            _logger.log(
                logging.WARNING if broken else logging.INFO, "the %s backend is not available: %s", name, reason
            )
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
    reason = passed_over or "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"no backend can run {dtype} embeddings of k = {k}, d = {d} on {device}: {reason}")


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
