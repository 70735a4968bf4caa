"""What kernels take, as named tuples, and how these are made of tensors.

On the host their fields are tensors, integers and None; ``runtime`` compiles a kernel for the dtypes, for which fields
are None, and for what all of an argument's numbers and addresses are multiples of. In a kernel they are pointers and
integers: 64 bits wide in a tuple, where they are distances between addresses, else 32. The last ones, in capitals
there, are known when a kernel is compiled.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eigen import next_power_of_two
from .record import Coefficients, Layout, coefficient_layout, layout


class Rows(NamedTuple):
    """k tensors (B, d), or one (B, k, d), whose last dimension is contiguous: one pointer, and for each of the k how
    many elements after it the first row is, and how many lie between rows."""

    pointer: Any
    offsets: tuple[int, ...]
    strides: tuple[int, ...]


class Targets(NamedTuple):
    """As ``Rows``, to be written: all with rows as far apart."""

    pointer: Any
    offsets: tuple[Any, ...]  # None: no such tensor
    stride: int


class Values(NamedTuple):
    """(B,), (B, n), or (B, d) with any strides; or 0-d, with a stride of 0."""

    pointer: Any
    strides: tuple[int, ...]


class Temperature(NamedTuple):
    """A tensor, which the host does not read; or None, and the bits of a float64: numbers would pass as float32."""

    pointer: Any
    bits: int


class Sums(NamedTuple):
    """Where a sum over the batch goes, and what its programs add up by (None if there is one): three numbers of each,
    and how many have finished."""

    total: Any
    partial: Any
    counter: Any


class Instances(NamedTuple):
    """Made by kernels: which instances a program has, and which of these there are."""

    index: Any
    there: Any


class Step(NamedTuple):
    """What a program takes at a time in a pass over d."""

    rows: int  # instances
    columns: int
    vector: int  # neighbouring columns in one lane


class Mode(NamedTuple):
    """What forward and backward passes have in common."""

    k: int
    K: int  # lanes of an instance, in tiles
    spectrum: bool  # all singular values are asked for; else the leading one
    normalize: bool
    alignment: bool  # the alignment term is asked for
    others: bool  # and the w, what the other modalities of each one share
    float64_input: bool
    double_float: bool  # sums over d in pairs of float32
    scaled: bool  # embeddings may be scaled by powers of two, as a record's exponents say
    record: Layout
    coefficients: Coefficients


@functools.cache
def mode(
    k: int, spectrum: bool, normalize: bool, alignment: bool, others: bool, float64_input: bool, double_float: bool
) -> Mode:
    record, coefficients = layout(k, spectrum, normalize, alignment, others), coefficient_layout(k, others)
    scaled = float64_input or double_float
    settings = (spectrum, normalize, alignment, others, float64_input, double_float, scaled)
    return Mode(k, next_power_of_two(k), *settings, record, coefficients)


# ------------------------------------------------------------------------------------------------
# From tensors
# ------------------------------------------------------------------------------------------------


def dense(x: Tensor) -> Tensor:
    """With the last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def canonical(embeddings: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of one dtype, with contiguous rows. Mixed dtypes are made one by a copy."""
    dtype = embeddings[0].dtype
    for x in embeddings:
        if x.dtype != dtype or not (x.is_contiguous() or x.stride(-1) == 1):
            break
    else:
        return embeddings
    for x in embeddings:
        dtype = torch.promote_types(dtype, x.dtype)
    return [dense(x.to(dtype)) for x in embeddings]


def _distances(tensors: Sequence[Tensor], size: int) -> tuple[tuple[int, ...], int]:
    """From the first one, in elements; and all addresses, or-ed."""
    addresses = [x.data_ptr() for x in tensors]
    start = together = addresses[0]
    for address in addresses:
        together |= address
    return tuple([(address - start) // size for address in addresses]), together


def rows(tensors: Sequence[Tensor], d: int) -> tuple[Rows, int]:
    """k tensors (B, d), or one (B, k, d); and what offsets, strides and d are multiples of: the elements of 16 bytes
    if addresses are multiples of these too, else 1."""
    first = tensors[0]
    size = first.element_size()
    together = d * size  # a multiple of 16 if all steps and addresses are
    if first.dim() == 3:
        stride, step, _ = first.stride()
        offsets = tuple(range(0, first.shape[1] * step, step)) if step else (0,) * first.shape[1]
        strides = (stride,) * first.shape[1]
        together |= first.data_ptr() | step * size | stride * size
    else:
        offsets, addresses = _distances(tensors, size)
        strides = tuple([d if x.is_contiguous() else x.stride(0) for x in tensors])  # asked for so, it costs less
        together |= addresses
        for stride in strides:
            together |= stride * size
    return Rows(first, offsets, strides), 1 if together % 16 else 16 // size


def filled(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Of k tensors (B, d) of which some may be None, all, with zeros for those; none if all are. (Not left to kernels:
    Triton 3.6 compiles no ``is not None`` of a tuple that has a None in it.) To be kept until the launch: ``Rows`` hold
    on to their first tensor alone."""
    there = [x for x in tensors if x is not None]
    if 0 < len(there) < len(tensors):
        zeros = there[0].new_zeros(there[0].shape[1]).expand(there[0].shape)
        there = [zeros if x is None else x for x in tensors]
    return there


def targets(tensors: Sequence[Tensor | None], d: int) -> tuple[Targets, int]:
    """As ``rows``, of contiguous ones, of which some may be None, not all."""
    there = [x for x in tensors if x is not None]
    first = there[0]
    size = first.element_size()
    if first.dim() == 3:
        k = first.shape[1]
        offsets, stride, together = tuple(range(0, k * d, d)), k * d, first.data_ptr()
    else:
        offsets, together = _distances(there, size)
        stride = d
    chosen: tuple[int | None, ...] = offsets
    if len(there) < len(tensors):
        left = iter(offsets)
        chosen = tuple([None if x is None else next(left) for x in tensors])
    return Targets(first, chosen, stride), 1 if (together | d * size) % 16 else 16 // size


def bits(value: float) -> int:
    """Of a float64."""
    return struct.unpack("<q", struct.pack("<d", value))[0]  # type: ignore[no-any-return]


def values(x: Tensor | None) -> Values | None:
    return None if x is None else Values(x, x.stride())
