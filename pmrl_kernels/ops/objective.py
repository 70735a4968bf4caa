"""The whole objective as one call: a spectral op and a contrast on the vectors that it finds.

One pass over the embeddings each way: the backward pass takes the gradients of both terms together, and the contrast's
with respect to u, z and w go into the same coefficients in k-space as the alignment's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .contrast.spec import Contrast, gathered
from .function import Tensors
from .reference import read_mask
from .spectral import spec
from .spectral.spec import Spectral, number_of_modalities

SMALL = 1 << 21
"""Numbers of embeddings of a batch that waits for launches on a GPU, at most: 8 MiB in float32."""


def waits_for_launches(x: Tensor, k: int) -> bool:
    """Whether a pass less is worth as much memory as k embeddings like these, (B, d) or (B, k, d), take."""
    return x.device.type != "cpu" and x.shape[0] * k * x.shape[-1] <= SMALL


class Objective(NamedTuple):
    """A call on (mask, temperature, instance temperature, *embeddings), see ``function.py``; its outputs are the total
    alignment weight · alignment + instance weight · instance, alignment, and instance, 0-d each.

    ``spectral`` wants the vectors that the contrast is of and, before them, a sum or mean of alignment terms; or no
    such term, whose weight is 0 then.
    """

    spectral: Spectral
    contrast: Contrast
    alignment_weight: float
    instance_weight: float

    def forward(self, tensors: Tensors) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        mask, temperature, instance_temperature, *embeddings = tensors
        outputs, spectral_state = self.spectral.compute(embeddings, mask, temperature)
        aligns = self.spectral.wanted & spec.ANY_ALIGNMENT != 0
        vectors = outputs[1:] if aligns else outputs
        everyone = number = vectors[0].new_empty((0,))
        if self.contrast.group is not None:
            k = number_of_modalities(embeddings)
            B, dtype = vectors[0].shape[0], vectors[0].dtype
            present = vectors[0].new_ones((B, k)) if mask is None else read_mask(mask).to(dtype)
            alignable = (present.sum(1, keepdim=True) >= 2).to(dtype)
            masks = (present,) if self.contrast.kind.masked else ()
            everyone = gathered(self.contrast.group, *vectors, *masks, alignable)
            number = everyone[:, -1].sum(dtype=torch.float64).clamp_min(1)
        instance, losses, state = self.contrast.compute(mask, vectors, everyone, instance_temperature)
        if aligns:
            alignment = self._share(outputs[0], number)
            total = torch.add(_times(alignment, self.alignment_weight), instance, alpha=self.instance_weight)
        else:
            alignment, total = torch.zeros_like(instance), instance * self.instance_weight
        kept = vectors[: self._kept(embeddings)]
        return (total, alignment, instance), [losses, state, number, everyone, *kept, *spectral_state]

    def _kept(self, embeddings: Sequence[Tensor]) -> int:
        """How many of the vectors wait for the backward pass. It makes the w anew, to the same bits: they take a pass
        over the embeddings, and as much memory as these. But small batches on a GPU wait for launches, not for that."""
        k, kind = number_of_modalities(embeddings), self.contrast.kind
        w = k if kind.w and not waits_for_launches(embeddings[0], k) else 0
        return kind.vectors(k) - w

    def _share(self, alignment: Tensor, number: Tensor) -> Tensor:
        """What a sum of this process's terms, or a gradient of it, is of everyone's mean."""
        if self.contrast.group is None:
            return alignment
        return (alignment.double() * self.contrast.processes() / number).to(alignment.dtype)

    def backward(self, tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, needed: Sequence[bool]) -> Tensors:
        mask, temperature, instance_temperature, *embeddings = tensors
        total, alignment, instance = grads
        if total is None and alignment is None and instance is None:
            return (None,) * len(tensors)
        losses, state, number, everyone, *rest = saved
        kept = self._kept(embeddings)
        vectors, spectral_state = rest[:kept], rest[kept:]
        if total is not None:
            weighted = _times(total, self.alignment_weight)
            alignment = weighted if alignment is None else alignment + weighted
            weighted = _times(total, self.instance_weight)
            instance = weighted if instance is None else instance + weighted

        pulls: Sequence[Tensor | None] = [None] * self.contrast.kind.vectors(number_of_modalities(embeddings))
        slope = slope2 = None
        if instance is not None:
            if kept < len(pulls):
                w, _ = self.spectral._replace(wanted=spec.W).compute(embeddings, mask, temperature)
                vectors = [*vectors, *w]
                del w
            pulls, slope2 = self.contrast.gradients(
                mask, vectors, everyone, instance_temperature, losses, state, instance
            )
            del vectors
        incoming: list[Tensor | None] = []
        if self.spectral.wanted & spec.ANY_ALIGNMENT:
            incoming = [None if alignment is None else self._share(alignment, number)]
        slope, found = self.spectral.gradients(
            embeddings, mask, temperature, spectral_state, [*incoming, *pulls], needed[3:]
        )
        slope = slope.to(temperature.dtype) if slope is not None and needed[1] else None
        slope2 = slope2.to(instance_temperature.dtype) if slope2 is not None and needed[2] else None
        return (None, slope, slope2, *found)

    def outputs(self, tensors: Tensors) -> int:
        return 3


def _times(x: Tensor, weight: float) -> Tensor:
    return x if weight == 1.0 else x * weight
