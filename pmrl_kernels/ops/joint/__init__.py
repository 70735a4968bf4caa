"""The op family of joint scores: what it offers, and who implements it."""

from __future__ import annotations

from collections.abc import Mapping

from ..operators import Pair
from .spec import JOINT, JOINT_CONTRAST

OPS = (JOINT, JOINT_CONTRAST)


def implementations(backend: str) -> Mapping[str, Pair]:
    """A backend's pairs, by the names of the ops. (By statements, which tools that freeze programs can see.)"""
    if backend == "native":
        from .native import PAIRS
    elif backend == "triton":
        from . import triton  # modulefinder takes ``from .triton`` for the package triton

        return triton.PAIRS
    elif backend == "reference":
        from .reference import PAIRS
    else:
        return {}
    return PAIRS
