"""The op family of joint scores: what it offers, and who implements it."""

from __future__ import annotations

from collections.abc import Mapping

from ..operators import Pair
from .spec import JOINT

OPS = (JOINT,)


def implementations(backend: str) -> Mapping[str, Pair]:
    """A backend's pairs, by the names of the ops. (By statements, which tools that freeze programs can see.)"""
    if backend == "native":
        from .native import PAIRS
    elif backend == "reference":
        from .reference import PAIRS
    else:
        return {}
    return PAIRS
