"""Which op families there are, which backends implement them here, and which one runs.

An *op family* is a folder of this package with

* ``OPS``: its ops, see ``operators.py``;
* ``implementations(backend)``: that backend's pairs of operators, by the names of the ops.

To add one, write the folder and name it in ``FAMILIES``.

A *backend* is a module of this package with ``NAME``, and ``unavailable()`` and ``rejects(device, dtype, k, d)``: a
reason, or None. It offers the ops it is good at; for the others the next one in order of speed runs. To add one, write
the module, name it in ``_PREFERENCE`` and import it in ``_import``.

The reference always works, and has every op. A backend that does not work is left out with a reason, whatever
happened, and so are its pairs for one family: logged when the package is imported (logger ``pmrl_kernels``), at INFO
where something is merely not there, at WARNING where something is broken, which is what an exception means, or a
module's ``broken``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch

from . import contrast, joint, spectral
from .operators import Op, Pair

_logger = logging.getLogger("pmrl_kernels")

FAMILIES: tuple[Any, ...] = (spectral, contrast, joint)

_PREFERENCE = ("native", "cuda", "triton", "reference")  # fastest first


class Backend(NamedTuple):
    """A backend that works here."""

    name: str
    rejects: Any
    """(device, dtype, k, d) -> why it cannot take (B, d) embeddings of k modalities there, or None."""
    pairs: Mapping[str, Pair]
    """By the names of ops."""
    lacking: Mapping[str, str]
    """Why it does not offer the others."""


def _import(name: str) -> Any:
    """A backend's module. By statements, which those who read sources see: PyInstaller takes along what they name."""
    if name == "native":
        from . import native

        return native
    if name == "cuda":
        from . import cuda

        return cuda
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


def _log(broken: bool, message: str, *arguments: str) -> None:
    _logger.log(logging.WARNING if broken else logging.INFO, message, *arguments)


def _pairs(name: str) -> tuple[dict[str, Pair], dict[str, str]]:
    """A backend's pairs by the names of ops, and why it lacks others."""
    pairs: dict[str, Pair] = {}
    lacking: dict[str, str] = {}
    for family in FAMILIES:
        reason = "there are none"
        found: Mapping[str, Pair] = {}
        try:
            found = family.implementations(name)
        except Exception as error:
            if name == "reference":
                raise
            reason, broken = _why_not(name, error)
            what = ", ".join(op.name for op in family.OPS)
            _log(broken, "the %s backend has no kernels for %s: %s", name, what, reason)
        pairs.update(found)
        lacking.update({op.name: reason for op in family.OPS if op.name not in found})
    return pairs, lacking


def _load() -> tuple[dict[str, Backend], dict[str, str]]:
    """The backends that work here by name, fastest first, and why the others do not."""
    loaded, reasons = {}, {}
    for name in _PREFERENCE:
        reason: str | None
        try:
            module = _import(name)
            reason, broken = module.unavailable(), getattr(module, "broken", False)
            if reason is None:
                pairs, lacking = _pairs(name)
                if pairs:
                    loaded[name] = Backend(name, module.rejects, pairs, lacking)
                else:
                    reasons[name] = f"it has no kernels: {'; '.join(dict.fromkeys(lacking.values()))}"
        except Exception as error:
            if name == "reference":
                raise
            reason, broken = _why_not(name, error)
        if reason is not None:
            broken = broken and reason not in reasons.values()  # one fault of what two backends share is one warning
            reasons[name] = reason
            _log(broken, "the %s backend is not available: %s", name, reason)
    return loaded, reasons


available, unavailable_reasons = _load()

_VARIABLE = "environment variable PMRL_KERNELS_BACKEND"
default_name = os.environ.get("PMRL_KERNELS_BACKEND") or None
"""What ``backend=None`` means in this process; read once, when the package is imported."""

_logged: set[tuple[str, str]] = set()
_resolved: dict[tuple[Any, ...], Pair] = {}
"""What ``resolve`` has found: a small call would wait for the search longer than for its arithmetic."""


def choose(
    op: str,
    candidates: Sequence[Backend],
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    k: int,
    d: int,
    reasons: Mapping[str, str],
    source: str = "",
) -> tuple[Pair, str | None]:
    """The pair of operators to run, and why faster backends, or the one requested, were passed over (or None).

    Pure: it reads nothing but its arguments. ``candidates`` come fastest first, ``reasons`` tells of the backends that
    are not among them, and with ``source`` begin errors of the one requested. If that one lacks the op, or kernels for
    such embeddings, it leaves them to those after it; raises RuntimeError for one that cannot run at all.
    """
    if requested is not None:
        names = [candidate.name for candidate in candidates]
        if requested not in names:
            raise RuntimeError(f"{source}backend {requested!r} is not available: {reasons[requested]}")
        candidates = candidates[names.index(requested) :]
        reason = candidates[0].rejects(device, dtype, k, d)
        if reason is not None:
            raise RuntimeError(
                f"{source}backend {requested!r} cannot run {dtype} embeddings of k = {k}, d = {d} on {device}: {reason}"
            )
    passed_over: list[str] = []
    for candidate in candidates:
        pair = candidate.pairs.get(op)
        reason = (pair or candidate).rejects(device, dtype, k, d)
        if pair is not None and reason is None:
            return pair, "; ".join(passed_over) or None
        passed_over.append(f"{candidate.name}: {reason or f'no kernels for {op}, {candidate.lacking[op]}'}")
    told = passed_over or [f"{name}: {reason}" for name, reason in reasons.items()]
    raise RuntimeError(f"no backend can run {dtype} embeddings of k = {k}, d = {d} on {device}: {'; '.join(told)}")


def check_name(requested: str | None, source: str = "backend") -> str | None:
    """Raises ValueError for a name that no backend has; whether that backend runs here is ``resolve``'s matter."""
    if requested is not None and requested not in _PREFERENCE:
        raise ValueError(f"{source}: got {requested!r}, wanted None or one of {', '.join(map(repr, _PREFERENCE))}")
    return requested


def resolve(op: Op, requested: str | None, device: torch.device, dtype: torch.dtype, k: int, d: int) -> Pair:
    """Who computes the op for such embeddings: as requested, else as the environment says, else the fastest.

    A backend passed over is logged once for each reason (logger ``pmrl_kernels``, level INFO).

    Raises:
        ValueError: an unknown name.
        RuntimeError: a known backend that cannot run here, with the reason.
    """
    key = op.name, requested, device, dtype, k, d
    # A compiler must see what the choice depends on. And sizes may be symbols there, or where something else traces,
    # which are no keys.
    compiling = torch.compiler.is_compiling() or type(k) is not int or type(d) is not int
    if not compiling and type(requested) in (str, NoneType):
        found = _resolved.get(key)
        if found is not None:
            return found
    check_name(requested)
    source = ""
    if requested is None and default_name is not None:
        requested = check_name(default_name, _VARIABLE)
        source = f"{_VARIABLE}: "
    pair, passed_over = choose(
        op.name, tuple(available.values()), requested, device, dtype, k, d, unavailable_reasons, source
    )
    if compiling:
        return pair
    if len(_resolved) >= 1024:
        _resolved.clear()
    _resolved[key] = pair
    if passed_over is not None and (op.name, passed_over) not in _logged:
        _logged.add((op.name, passed_over))
        _logger.info("%s: using the %s backend; passed over %s", op.name, pair.backend, passed_over)
    return pair
