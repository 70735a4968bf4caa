"""The contrasts: cross-entropy over similarities of vectors, each with its partner as the positive.

One op, ``paired``: a list of pairs of (B, d) matrices, row i of one the partner of row i of the other, with losses in
both directions. What is paired with what makes a contrast:

    leading          u with itself
    modality         each z_m with u
    leave_one_out    each z_m with w_m, what the other modalities share
    pairs            each z_m with each other z_l
    raw              vectors of any norm with themselves

Vectors are unit vectors, or zero, but in raw contrasts and where embeddings enter as they are: those are an op of
their own, ``paired_of_any_norm``, the same but for what it takes. So a backend may have kernels for unit vectors alone,
whose similarities are bounded.

The mathematics is in ``reference.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..function import Tensors
from ..operators import Op, Pair
from ..reference import read_mask

if TYPE_CHECKING:
    from ...distributed import Group


def directions(pairs: Sequence[int]) -> int:
    """In how many directions the pairs have losses: one if they are of vectors with themselves, else two."""
    return 1 if pairs[::2] == pairs[1::2] else 2


def losses_shape(vectors: Sequence[Tensor], pairs: Sequence[int]) -> tuple[int, int, int]:
    """(directions, number of pairs, B)"""
    return directions(pairs), len(pairs) // 2, vectors[0].shape[0]


def _backward_shapes(vectors: Sequence[Tensor], *_: Any) -> Any:
    return [x.new_empty(x.shape) for x in vectors], vectors[0].new_empty((), dtype=torch.float64)


_ARGUMENTS = (
    "Tensor[] vectors, int[] pairs, bool[] directions, Tensor? mask, Tensor[] everyone, Tensor? everyone_mask, "
    "int start, Tensor? temperature, float fixed_temperature"
)

PAIRED = Op(
    "paired",
    f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    f"({_ARGUMENTS}, Tensor losses, Tensor state, Tensor grad) -> (Tensor[], Tensor)",
    _backward_shapes,
)
"""``pairs`` are indices into the vectors, two for each pair: all of two different vectors, or all of one with itself.

All rows are unit vectors or zero, of the op ``OF_ANY_NORM`` any vectors.

Which rows there are: of vectors with True in ``directions`` those that are not zero. Of others
all, but where the partner in a pair is a direction, the partners of rows that there are. And of the last n vectors
those for which ``mask`` (B, n) is True; its n is 0 without a mask. A row has losses where its partner is there too,
and the other side chooses among all that are there.

Forward: the mean loss (0-d), the losses (``losses_shape``) in float64, a state. Backward, from the losses of everyone:
the gradients of the vectors, and of the temperature (0-d float64)."""

OF_ANY_NORM = PAIRED._replace(name="paired_of_any_norm")


class Kind(NamedTuple):
    """What is paired with what, for k modalities."""

    u: bool  # the vectors are u, if it takes part,
    z: bool  # then the k z,
    w: bool  # then the k w
    pairs: tuple[int, ...]
    directions: tuple[bool, ...]
    masked: bool  # the mask says which z there are, or which vectors, and not their zeros

    def vectors(self, k: int) -> int:
        """How many there are. (To a symbolic k PyTorch 2.11 adds no bool.)"""
        return int(self.u) + k * (int(self.z) + int(self.w))


NAMES = ("leading", "modality", "leave_one_out", "pairs")

RAW = Kind(True, False, False, (0, 0), (False,), True)


def kind(name: str, k: int) -> Kind:
    """By the name of a contrast."""
    return _new_kind(name, k) if torch.compiler.is_compiling() else _kind(name, k)


def _new_kind(name: str, k: int) -> Kind:
    if name == "leading":
        return Kind(True, False, False, (0, 0), (True,), False)
    if name == "modality":
        of_each = tuple(x for m in range(k) for x in (1 + m, 0))
        return Kind(True, True, False, of_each, (True, *(False,) * k), True)
    if name == "leave_one_out":
        of_each = tuple(x for m in range(k) for x in (m, k + m))
        return Kind(False, True, True, of_each, (True,) * 2 * k, False)
    of_each = tuple(x for m in range(k) for j in range(m) for x in (j, m))
    return Kind(False, True, False, of_each, (True,) * k, False)


_kind = functools.cache(_new_kind)  # which compilers warn of


def op(parts: Kind, normalize: bool) -> Op:
    """What computes such a contrast: the z are the embeddings as they are without ``normalize``."""
    return OF_ANY_NORM if not normalize and (parts.z or parts == RAW) else PAIRED


def gathered(group: Group | None, *columns: Tensor) -> Tensor:
    """The rows of all processes (N, n) from this one's matrices (B, ...), side by side; empty without a group.

    Every process joins this collective, whatever its arguments or its rows, and none is left for the backward pass:
    nobody can make another one wait for ever by skipping it.
    """
    return columns[0].new_empty((0,)) if group is None else group.gather(torch.cat(columns, 1))


class Contrast(NamedTuple):
    """One of the contrasts, between this process's rows and everyone's."""

    pair: Pair
    kind: Kind
    fixed_temperature: float  # where there is no tensor
    group: Group | None

    def processes(self) -> int:
        return 1 if self.group is None else len(self.group.sizes)

    def _arguments(self, mask: Tensor | None, vectors: Sequence[Tensor], everyone: Tensor) -> tuple[Any, ...]:
        """What the operators take before the temperatures.

        ``everyone`` holds the vectors and, where the mask is needed, the mask as numbers, side by side.
        """
        kind = self.kind
        mask = mask if kind.masked else None
        if self.group is None:
            return vectors, kind.pairs, kind.directions, mask, [], None, 0
        d, number = vectors[0].shape[1], len(vectors)
        parts = [everyone[:, n * d : (n + 1) * d] for n in range(number)]
        present = None
        if kind.masked:
            columns = kind.directions.count(False)
            present = everyone[:, d * number : d * number + columns] != 0
        return vectors, kind.pairs, kind.directions, mask, parts, present, self.group.start()

    def compute(
        self, mask: Tensor | None, vectors: Sequence[Tensor], everyone: Tensor, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, losses of everyone, state). The mean of all processes' losses is that of the whole batch."""
        arguments = self._arguments(mask, vectors, everyone)
        loss, losses, state = self.pair.forward(*arguments, temperature, self.fixed_temperature)
        if self.group is not None:
            loss = loss * len(self.group.sizes)
            losses = self.group.gather(losses.flatten(0, 1).T).T.unflatten(0, losses.shape[:2])
        return loss, losses, state

    def gradients(
        self,
        mask: Tensor | None,
        vectors: Sequence[Tensor],
        everyone: Tensor,
        temperature: Tensor | None,
        losses: Tensor,
        state: Tensor,
        grad: Tensor,
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Of the vectors, and of the temperature in float64."""
        grad = grad if self.group is None else grad.double() * len(self.group.sizes)
        arguments = self._arguments(mask, vectors, everyone)
        found: tuple[Sequence[Tensor], Tensor]
        found = self.pair.backward(*arguments, temperature, self.fixed_temperature, losses, state, grad)
        return found


class RawContrast(NamedTuple):
    """The contrast of vectors as they are with themselves: a call on (mask (B, 1), temperature, u (B, d)), see
    ``function.py``. In float64, since similarities of norms of 1e20 exceed float32."""

    contrast: Contrast

    def forward(self, tensors: Tensors) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        mask, temperature, x = tensors
        u = x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        present = torch.ones_like(u[:, :1]) if mask is None else read_mask(mask).to(u.dtype)
        u = u if mask is None else u.masked_fill_(present == 0, 0.0)
        everyone = gathered(self.contrast.group, u, present)
        loss, losses, state = self.contrast.compute(mask, (u,), everyone, temperature)
        loss = loss.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return (loss,), [losses, state, everyone, u]

    def backward(self, tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, needed: Sequence[bool]) -> Tensors:
        mask, temperature, x = tensors
        (grad,) = grads
        if grad is None:
            return None, None, None
        losses, state, everyone, u = saved
        (h,), slope = self.contrast.gradients(mask, (u,), everyone, temperature, losses, state, grad)
        found = h if mask is None else h.masked_fill(~read_mask(mask), 0.0)
        return None, slope.to(temperature.dtype) if needed[1] else None, found.to(x.dtype) if needed[2] else None

    def outputs(self, tensors: Tensors) -> int:
        return 1
