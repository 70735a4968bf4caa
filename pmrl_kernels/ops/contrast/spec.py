"""The contrasts: cross-entropy over similarities of vectors, each with its partner as the positive.

Two ops, ``instance`` (leading vectors with one another) and ``modality`` (each modality's embeddings with the leading
vectors, and, *raw*, vectors of any norm with themselves): their signatures, the shapes of their results, and calls of
them. The mathematics is in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..function import Tensors
from ..operators import Op, Pair
from ..reference import read_mask

if TYPE_CHECKING:
    from ...distributed import Group


def _instance_shapes(u: Tensor, *_: Any) -> Any:
    return u.new_empty(u.shape), u.new_empty((), dtype=torch.float64)


def _modality_shapes(z: Sequence[Tensor], u: Tensor, *_: Any) -> Any:
    return [z_m.new_empty(z_m.shape) for z_m in z], u.new_empty(u.shape), u.new_empty((), dtype=torch.float64)


_TEMPERATURE = "Tensor? temperature, float fixed_temperature"
_SAVED = "Tensor losses, Tensor state, Tensor grad"
_INSTANCE = f"Tensor u, Tensor? everyone, int start, {_TEMPERATURE}"
_MODALITY = (
    f"Tensor[] z, Tensor u, Tensor? mask, Tensor[] everyone, Tensor? everyone_mask, int start, bool raw, {_TEMPERATURE}"
)

INSTANCE = Op(
    "instance",
    f"({_INSTANCE}) -> (Tensor, Tensor, Tensor)",
    f"({_INSTANCE}, {_SAVED}) -> (Tensor, Tensor)",
    _instance_shapes,
)
"""Forward: the mean loss (0-d), the loss of each row (B,) in float64, a state. Backward, from the losses of everyone:
the gradients of u and of the temperature (0-d float64)."""

MODALITY = Op(
    "modality",
    f"({_MODALITY}) -> (Tensor, Tensor, Tensor)",
    f"({_MODALITY}, {_SAVED}) -> (Tensor[], Tensor, Tensor)",
    _modality_shapes,
)
"""Forward: the mean loss (0-d), the losses of both directions (2, k, B) in float64, a state. Backward, from the losses
of everyone: the gradients of the k embeddings, of u, and of the temperature (0-d float64)."""


def gathered(group: Group | None, u: Tensor, *others: Tensor) -> Tensor:
    """The rows of all processes (N, n) from this one's u (B, d) and what else stands beside it, side by side; empty
    without a group.

    Every process joins this collective, whatever its arguments or its rows, and none is left for the backward pass:
    nobody can make another one wait for ever by skipping it.
    """
    return u.new_empty((0,)) if group is None else group.gather(torch.cat([u, *others], 1))


class Contrast(NamedTuple):
    """One of the contrasts, between this process's rows and everyone's."""

    pair: Pair
    kind: str  # "leading": of u (B, d), by the op ``instance``; "modality": of k z (B, d) and u; "raw": of u and itself
    fixed_temperature: float  # where there is no tensor
    group: Group | None

    def processes(self) -> int:
        return 1 if self.group is None else len(self.group.sizes)

    def _arguments(self, mask: Tensor | None, u: Tensor, z: Sequence[Tensor], everyone: Tensor) -> tuple[Any, ...]:
        """What the operators take before the temperatures.

        ``everyone`` holds u and, but for the leading contrast, z and the mask as numbers, side by side.
        """
        start = 0 if self.group is None else self.group.start()
        d, raw = u.shape[1], self.kind == "raw"
        if self.kind == "leading":
            return u, None if self.group is None else everyone[:, :d], start
        z = (u,) if raw else z
        if self.group is None:
            return z, u, mask, [], None, 0, raw
        k = len(z)
        parts = [everyone[:, m * d : (m + 1) * d] for m in range(1 if raw else k + 1)]
        present = everyone[:, d * len(parts) : d * len(parts) + k] != 0
        return z, u, mask, parts * 2 if raw else parts, present, start, raw

    def compute(
        self,
        mask: Tensor | None,
        u: Tensor,
        z: Sequence[Tensor],
        everyone: Tensor,
        temperature: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, losses of everyone, state). The mean of all processes' losses is that of the whole batch."""
        arguments = self._arguments(mask, u, z, everyone)
        loss, losses, state = self.pair.forward(*arguments, temperature, self.fixed_temperature)
        if self.group is not None:
            loss = loss * len(self.group.sizes)
            if losses.dim() == 1:
                losses = self.group.gather(losses[:, None])[:, 0]
            else:
                losses = self.group.gather(losses.flatten(0, 1).T).T.unflatten(0, losses.shape[:2])
        return loss, losses, state

    def gradients(
        self,
        mask: Tensor | None,
        u: Tensor,
        z: Sequence[Tensor],
        everyone: Tensor,
        temperature: Tensor | None,
        losses: Tensor,
        state: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Of u, of the z (none in the leading contrast), and of the temperature in float64."""
        grad = grad if self.group is None else grad.double() * len(self.group.sizes)
        arguments = self._arguments(mask, u, z, everyone)
        found = self.pair.backward(*arguments, temperature, self.fixed_temperature, losses, state, grad)
        if self.kind == "leading":
            return found[0], (), found[1]
        return found[1], found[0], found[2]


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
        loss, losses, state = self.contrast.compute(mask, u, (), everyone, temperature)
        loss = loss.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return (loss,), [losses, state, everyone, u]

    def backward(self, tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, needed: Sequence[bool]) -> Tensors:
        mask, temperature, x = tensors
        (grad,) = grads
        if grad is None:
            return None, None, None
        losses, state, everyone, u = saved
        h, (H,), slope = self.contrast.gradients(mask, u, (), everyone, temperature, losses, state, grad)
        found = h + H if mask is None else (h + H).masked_fill(~read_mask(mask), 0.0)
        return None, slope.to(temperature.dtype) if needed[1] else None, found.to(x.dtype) if needed[2] else None

    def outputs(self, tensors: Tensors) -> int:
        return 1
