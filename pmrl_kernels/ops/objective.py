"""The whole objective as one call: a spectral op and a contrast on the vectors that it finds.

One pass over the embeddings each way: the backward pass takes the gradients of both terms together, and the contrast's
with respect to u and z go into the same coefficients in k-space as the alignment's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .contrast.spec import Contrast, gathered
from .function import Tensors
from .reference import read_mask
from .spectral.spec import Spectral, number_of_modalities


class Objective(NamedTuple):
    """A call on (mask, temperature, instance temperature, *embeddings), see ``function.py``; its outputs are the total
    alignment + weight · instance, alignment, and instance, 0-d each.

    ``spectral`` wants a sum or mean of alignment terms, u and, with the modality contrast, z.
    """

    spectral: Spectral
    contrast: Contrast
    weight: float

    def forward(self, tensors: Tensors) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        mask, temperature, instance_temperature, *embeddings = tensors
        outputs, spectral_state = self.spectral.compute(embeddings, mask, temperature)
        alignment, u, *z = outputs
        everyone = number = u.new_empty((0,))
        if self.contrast.group is not None:
            k = number_of_modalities(embeddings)
            present = u.new_ones((len(u), k)) if mask is None else read_mask(mask).to(u.dtype)
            alignable = (present.sum(1, keepdim=True) >= 2).to(u.dtype)
            everyone = gathered(self.contrast.group, u, *((*z, present) if z else ()), alignable)
            number = everyone[:, -1].sum(dtype=torch.float64).clamp_min(1)
            alignment = (alignment.double() * self.contrast.processes() / number).to(alignment.dtype)
        instance, losses, state = self.contrast.compute(mask, u, z, everyone, instance_temperature)
        total = torch.add(alignment, instance, alpha=self.weight)
        return (total, alignment, instance), [losses, state, number, everyone, u, *z, *spectral_state]

    def backward(self, tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, needed: Sequence[bool]) -> Tensors:
        mask, temperature, instance_temperature, *embeddings = tensors
        total, alignment, instance = grads
        if total is None and alignment is None and instance is None:
            return (None,) * len(tensors)
        losses, state, number, everyone, u, *rest = saved
        count = number_of_modalities(embeddings) if self.contrast.kind == "modality" else 0
        z, spectral_state = rest[:count], rest[count:]
        if total is not None:
            alignment = total if alignment is None else alignment + total
            weighted = total * self.weight
            instance = weighted if instance is None else instance + weighted

        h: Tensor | None = None
        H: Sequence[Tensor | None] = [None] * count
        slope = slope2 = None
        if instance is not None:
            h, H, slope2 = self.contrast.gradients(mask, u, z, everyone, instance_temperature, losses, state, instance)
        if alignment is not None and self.contrast.group is not None:
            alignment = (alignment.double() * self.contrast.processes() / number).to(alignment.dtype)
        slope, found = self.spectral.gradients(
            embeddings, mask, temperature, spectral_state, [alignment, h, *H], needed[3:]
        )
        slope = slope.to(temperature.dtype) if slope is not None and needed[1] else None
        slope2 = slope2.to(instance_temperature.dtype) if slope2 is not None and needed[2] else None
        return (None, slope, slope2, *found)

    def outputs(self, tensors: Tensors) -> int:
        return 3
