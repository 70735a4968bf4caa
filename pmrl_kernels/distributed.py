"""A batch spread over processes: who holds which of its rows, and how everyone gets to see all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def _all_gather(everyone: Tensor, rows: Tensor, processes: ProcessGroup) -> None:
    # The name that torch 2.13 prefers; it warns of the other, which is all that torch 2.10 has. Some torch has neither.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, rows, group=processes)


class Group(NamedTuple):
    """The processes of a group, and the number of rows that each of them has."""

    processes: ProcessGroup
    sizes: tuple[int, ...]
    rank: int

    def start(self) -> int:
        """Where this process's rows begin among all rows. (No property: the compiler of torch 2.10 passes those on.)"""
        return sum(self.sizes[: self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """Everyone's rows (N, n) from this process's (B, n), in the order of ranks. Not differentiable.

        One collective, whatever the rows: a process without any joins it, unless nobody has any.
        """
        largest = max(self.sizes)
        if len(self.sizes) == 1 or largest == 0:
            return rows
        if len(rows) < largest:  # collectives take equal shapes
            rows = torch.cat([rows, rows.new_zeros((largest - len(rows), rows.shape[1]))])
        everyone = rows.new_empty((len(self.sizes) * largest, rows.shape[1]))
        _all_gather(everyone, rows.contiguous(), self.processes)
        if min(self.sizes) == largest:
            return everyone
        return torch.cat([x[:size] for x, size in zip(everyone.split(largest), self.sizes, strict=True)])


def exchanged(processes: ProcessGroup, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """The numbers of every process of the group. One collective, for which the host waits."""
    own = torch.tensor([numbers], dtype=torch.int64, device=device)
    everyone = own.new_empty((dist.get_world_size(processes), len(numbers)))
    _all_gather(everyone, own, processes)
    found: list[list[int]] = everyone.tolist()
    return found


def summed(numbers: Sequence[Tensor], processes: ProcessGroup | None) -> list[Tensor]:
    """Each of these float64 tensors, summed over the processes of a group. None: this process alone."""
    if processes is None:
        return list(numbers)
    flat = torch.cat([x.reshape(-1) for x in numbers])
    dist.all_reduce(flat, group=processes)
    parts = flat.split([x.numel() for x in numbers])
    return [part.view(x.shape) for part, x in zip(parts, numbers, strict=True)]
