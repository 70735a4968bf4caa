"""The spectral op: singular values, leading vectors and alignment of every instance's d x k embedding matrix.

What it can be asked for, its operators' signatures and the shapes of their results, and the call that is
differentiated. The mathematics is in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..function import Tensors
from ..operators import Op, Pair

ALIGNMENT, ALIGNMENT_SUM, ALIGNMENT_MEAN, SIGMA, U, V, Z, W = (1 << bit for bit in range(8))
"""What is wanted, added up: one of the first three at most (the alignment terms (B,), their sum, or their mean over the
instances with at least two modalities), singular values (B, min(d, k)) or (B, 1), u₁ (B, d), v₁ (B, k), the k
normalised embeddings (B, d), and for each modality the direction (B, d) that the others share,

    w_m = y_m/‖y_m‖,   y_m = Σ_{j≠m} |v_j| z_j,

zeros where ‖y_m‖ counts as zero (``constants.CANCELLED``). Outputs come in this order, and nothing else is
allocated."""

ANY_ALIGNMENT = ALIGNMENT | ALIGNMENT_SUM | ALIGNMENT_MEAN


def modalities(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """The k tensors (B, d), whether they came one by one or as one (B, k, d) stack."""
    return list(embeddings[0].unbind(1)) if embeddings[0].dim() == 3 else list(embeddings)


def number_of_modalities(embeddings: Sequence[Tensor]) -> int:
    """k, the same way."""
    return embeddings[0].shape[1] if embeddings[0].dim() == 3 else len(embeddings)


def output_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 if any of them is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def output_shapes(embeddings: Sequence[Tensor], spectrum: bool, wanted: int) -> list[Tensor]:
    """Empty tensors like the outputs of any forward operator."""
    xs = modalities(embeddings)
    (B, d), k, out = xs[0].shape, len(xs), output_dtype(xs)
    shapes: list[tuple[int, ...]] = []
    if wanted & ANY_ALIGNMENT:
        shapes.append((B,) if wanted & ALIGNMENT else ())
    if wanted & SIGMA:
        shapes.append((B, min(d, k) if spectrum else 1))
    if wanted & U:
        shapes.append((B, d))
    if wanted & V:
        shapes.append((B, k))
    shapes += [(B, d)] * k * (bool(wanted & Z) + bool(wanted & W))
    return [xs[0].new_empty(shape, dtype=out) for shape in shapes]


def _backward_shapes(embeddings: Sequence[Tensor], mask: Any, temperature: Any, *arguments: Any) -> Any:
    needed = arguments[-1]
    grads = [x.new_empty(x.shape if wanted else (0,)) for x, wanted in zip(embeddings, needed, strict=True)]
    return grads if temperature is None else [*grads, embeddings[0].new_empty((), dtype=torch.float64)]


_ARGUMENTS = (
    "Tensor[] embeddings, Tensor? mask, Tensor? temperature, float fixed_temperature, bool normalize, bool spectrum, "
    "int wanted"
)
SPECTRAL = Op(
    "spectral",
    f"({_ARGUMENTS}) -> (Tensor[], Tensor[])",
    f"({_ARGUMENTS}, Tensor[] state, Tensor?[] grads, bool[] needed) -> Tensor[]",
    _backward_shapes,
)
"""Forward: (outputs, state). Backward: the embeddings' gradients from those of all outputs at once, in the embeddings'
layout and dtypes, empty where not needed; then, where the temperature is a tensor, its own, 0-d float64.

The reduction of alignment terms is the operator's work: at small batches two more PyTorch operators would cost as much
as the whole loss."""


class Spectral(NamedTuple):
    """A call of the op on (mask, temperature, *embeddings), see ``function.py``."""

    pair: Pair
    wanted: int
    spectrum: bool  # all singular values and the softmax objective; else σ₁, by power iteration, and the leading one
    normalize: bool = True
    fixed_temperature: float = 1.0  # where there is no tensor

    def compute(self, embeddings: Sequence[Tensor], mask: Tensor | None, temperature: Tensor | None) -> Any:
        """(outputs, state), a list each"""
        pair, wanted, spectrum, normalize, fixed = self
        return pair.forward(embeddings, mask, temperature, fixed, normalize, spectrum, wanted)

    def gradients(
        self,
        embeddings: Sequence[Tensor],
        mask: Tensor | None,
        temperature: Tensor | None,
        state: Sequence[Tensor],
        grads: Tensors,
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Of the temperature (float64, None where it is a number) and of the embeddings, None where not needed."""
        pair, wanted, spectrum, normalize, fixed = self
        found = pair.backward(embeddings, mask, temperature, fixed, normalize, spectrum, wanted, state, grads, needed)
        slope = None
        if temperature is not None:
            slope, found = found[-1], found[:-1]
        if False in needed:
            found = [x if want else None for x, want in zip(found, needed, strict=True)]
        return slope, found

    def forward(self, tensors: Tensors) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        mask, temperature, *embeddings = tensors
        outputs, state = self.compute(embeddings, mask, temperature)
        return tuple(outputs), state

    def backward(self, tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, needed: Sequence[bool]) -> Tensors:
        mask, temperature, *embeddings = tensors
        slope, found = self.gradients(embeddings, mask, temperature, saved, grads, needed[2:])
        if slope is not None:
            slope = slope.to(temperature.dtype) if needed[1] else None
        return (None, slope, *found)

    def outputs(self, tensors: Tensors) -> int:
        """How many there are."""
        k = number_of_modalities(tensors[2:])
        one, several = (ANY_ALIGNMENT, SIGMA, U, V), (Z, W)
        return sum(bool(self.wanted & flag) for flag in one) + k * sum(bool(self.wanted & flag) for flag in several)
