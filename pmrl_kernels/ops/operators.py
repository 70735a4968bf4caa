"""Operators in pairs, a forward and a backward one: how an op is declared, and how Python code implements it.

To ``torch.compile`` an operator is one node with known output shapes. What it does is not traced into, so a loop over
blocks stays a loop, and compiled code computes the same bits as eager code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Op(NamedTuple):
    """A differentiable operation: two operators, ``<name>_forward`` and ``<name>_backward``.

    The state that a forward operator returns is read by the backward operator of the same pair alone, so each
    implementation keeps what suits it.
    """

    name: str
    forward: str
    """The signature: "(arguments) -> results"."""
    backward: str
    backward_shapes: Callable[..., Any]
    """From the backward operator's arguments to empty tensors like its results, which are alike in all pairs."""

    def signatures(self) -> dict[str, str]:
        """The signatures of the two by their full names."""
        return {f"{self.name}_forward": self.forward, f"{self.name}_backward": self.backward}


class Pair(NamedTuple):
    """An implementation of an op."""

    backend: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    rejects: Callable[[torch.device, torch.dtype, int, int], str | None]
    """(device, dtype, k, d) -> why it cannot take (B, d) embeddings of k modalities there, or None."""


class Operators:
    """Operators of one namespace. They are there as long as this object is: nothing else may hold it before all are
    defined, and then an import that is interrupted leaves nothing behind.

    Names of operators are the process's. Another copy of the package, or this one before it was imported anew, keeps
    its own: whoever still holds its functions runs them, and what runs here is what is written here. So where a
    namespace is taken, this one is called ``name_2`` and so on.
    """

    def __init__(self, name: str) -> None:
        self.library = _new_library(name)

    def define(
        self,
        op: Op,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        forward_shapes: Callable[..., Any],
        keys: Sequence[str] = ("CompositeExplicitAutograd",),
    ) -> tuple[Any, Any]:
        """The two operators of an op, computed by these functions for these dispatch keys (by default all).

        Without autograd formulas: differentiation is the matter of ``function.py``.
        """
        library, found = self.library, []
        functions = ((forward, forward_shapes), (backward, op.backward_shapes))
        for (name, signature), (function, shapes) in zip(op.signatures().items(), functions, strict=True):
            library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
            for key in keys:
                library.impl(name, function, key)
            torch.library.register_fake(f"{library.ns}::{name}", shapes, lib=library)
            found.append(getattr(getattr(torch.ops, library.ns), name).default)
        return found[0], found[1]


def _new_library(name: str) -> torch.library.Library:
    for number in range(1, 1000):
        try:
            return torch.library.Library(name if number == 1 else f"{name}_{number}", "DEF")
        except RuntimeError as error:  # torch tells by nothing but this whether a name is taken
            taken = error
    raise taken
