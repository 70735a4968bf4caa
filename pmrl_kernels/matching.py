"""Rows of modalities that only partly overlap, brought together by the ids of their instances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import inputs


class Matched(NamedTuple):
    """What :func:`by_id` returns: U instances, those of any modality."""

    embeddings: dict[str, Tensor]
    """(U, d) by modality; rows of 0 where an instance has none."""
    mask: dict[str, Tensor]
    """(U,) bool by modality, True = present: the ``mask`` of the losses."""
    ids: Tensor | list[Hashable]
    """(U,) or (U, c), or a list of U, as ids came."""


def by_id(embeddings: Mapping[str, Tensor], ids: Mapping[str, Tensor | Sequence[Hashable]]) -> Matched:
    """Embeddings of modalities that have rows of different instances, as one batch with a mask.

    Rows with the same id are of one instance. An instance that some modality lacks gets a row of zeros there and False
    in the mask, so that ``found = by_id(embeddings, ids)`` is what ``pmrl_loss(found.embeddings, mask=found.mask)`` and
    all other functions of embeddings take.

    Args:
        embeddings: (B_m, d) by modality, of any floating dtypes, on one device; the numbers of rows B_m may differ.
        ids: by the same keys, the ids of these rows, in one of two forms for all modalities:
            integer tensors, (B_m,) or (B_m, c), where a row of c numbers is one id, such as (data set, example). Any
            signed or uint8 dtypes, all on one device, which may be another than that of the embeddings;
            sequences of B_m hashables of one type, strings or tuples, say, which are the same id if they are equal; in
            each place of tuples of one type, too, or None. Floats, tensors and what is not equal to itself are none.
            In a modality no id may come twice.

    Returns:
        (embeddings, mask, ids), :class:`Matched`. Instances are in the order in which ids first appear: all rows of
        the first modality as they come, then those of the second one that are new, and so on. Modalities are in the
        order of ``embeddings`` and keep their dtypes; embeddings and masks are on the device of the embeddings, ids
        where they were.

    Raises:
        TypeError: no dict, embeddings that are no floating-point tensors, ids that are neither form, or of two forms,
            two types, or floating ones.
        ValueError: no modality, other keys, ranks, shapes or devices, ids that are not as many as rows, or an id that
            comes twice in a modality, which the message names.

    Gradient: that of a row is the gradient of the row it became, bit for bit; of any order.

    Degenerate cases:
        A modality without rows (0, d) is False throughout; without any rows anywhere U = 0; without an instance in
        common each has one modality, and nothing to align. With the same ids in the same order everywhere embeddings
        come out as they are (copied), with a mask of True. One modality is itself.

    The host waits for the device of the ids once, to learn U and whether an id comes twice: with ids on a CPU not for
    a GPU. Compiled code breaks its graph here and calls it as it is. Only rows of this process are matched: with
    ``group=`` of a loss an instance must have all its rows on one process.

    Example:
        >>> import torch
        >>> from pmrl_kernels import pmrl_loss
        >>> embeddings = {"text": torch.ones(2, 4), "video": torch.ones(3, 4), "audio": torch.ones(1, 4)}
        >>> ids = {"text": torch.tensor([7, 3]), "video": torch.tensor([3, 9, 7]), "audio": torch.tensor([9])}
        >>> found = by_id(embeddings, ids)
        >>> found.ids, found.mask["text"], found.mask["audio"]
        (tensor([7, 3, 9]), tensor([ True,  True, False]), tensor([False, False,  True]))
        >>> loss = pmrl_loss(found.embeddings, mask=found.mask, contrast="leave_one_out")
        >>> by_id({"text": torch.ones(2, 4), "audio": torch.ones(1, 4)}, {"text": ["a", "b"], "audio": ["c"]}).ids
        ['a', 'b', 'c']
    """
    if torch.compiler.is_compiling():
        # Ids are other ones with every batch. Traced, a list of them would be a constant of the graph; and the graph
        # breaks in any case. (Made here, since torch.compiler.disable takes the seconds that importing Dynamo does.)
        matched: Matched = torch.compiler.disable(_by_id)(embeddings, ids)
        return matched
    return _by_id(embeddings, ids)


def _by_id(embeddings: Mapping[str, Tensor], ids: Mapping[str, Tensor | Sequence[Hashable]]) -> Matched:
    names, tensors, given = inputs.identified(embeddings, ids)
    rows, U, union = _of_tensors(names, given) if isinstance(given[0], Tensor) else _of_sequences(names, given)
    found: dict[str, Tensor] = {}
    mask: dict[str, Tensor] = {}
    for name, x, row in zip(names, tensors, rows, strict=True):
        row = row.to(x.device, non_blocking=True)
        # Rows of a modality are all different, so each is written once, and read once by the backward pass.
        found[name] = x.new_zeros((U, x.shape[1])).index_copy_(0, row, x)
        mask[name] = row.new_zeros(U, dtype=torch.bool).index_fill_(0, row, True)
    return Matched(found, mask, union)


def _of_tensors(names: list[str], ids: Sequence[Tensor]) -> tuple[Sequence[Tensor], int, Tensor]:
    """For each modality the instance of each row, (B_m,); how many instances there are; and their ids.

    Ids are sorted, so that equal ones are neighbours, and by a stable sort: the first of them is the one that appears
    first, and of one modality they are neighbours too.
    """
    sizes = [len(x) for x in ids]
    everything = torch.cat(list(ids))  # promotes
    columns = everything if everything.dim() == 2 else everything[:, None]
    order = torch.arange(len(columns), device=columns.device)
    for column in columns.unbind(1):
        order = order[column[order].argsort(stable=True)]
    same = (columns[order[1:]] == columns[order[:-1]]).all(1)  # as the one before

    modality = torch.cat([order.new_full((size,), m) for m, size in enumerate(sizes)])
    twice = same & (modality[order[1:]] == modality[order[:-1]])
    begins = torch.ones_like(order, dtype=torch.bool)
    begins[1:] = ~same
    is_first = torch.zeros_like(begins).index_copy_(0, order, begins)
    # What is at a place in the order: where the first of the same id is, and which instance that makes.
    place = torch.arange(len(order), device=order.device)
    first = order[torch.where(begins, place, 0).cummax(0).values]
    instance = is_first.cumsum(0) - 1
    row = torch.empty_like(order).index_copy_(0, order, instance[first])

    U, repeated = torch.stack([is_first.sum(), twice.any().long()]).tolist()
    if repeated:
        again = order[1:][twice][0]
        numbers = columns[again].tolist()
        inputs.refuse_repeated(names[int(modality[again])], tuple(numbers) if everything.dim() == 2 else numbers[0])
    union = everything.new_empty((U, *everything.shape[1:])).index_copy_(0, row, everything)
    return row.split(sizes), U, union


def _of_sequences(names: list[str], ids: Sequence[Sequence[Hashable]]) -> tuple[Sequence[Tensor], int, list[Hashable]]:
    """The same of hashables."""
    instances: dict[Hashable, int] = {}
    rows = []
    for name, own in zip(names, ids, strict=True):
        row = [instances.setdefault(id, len(instances)) for id in own]
        if len(set(row)) < len(row):
            inputs.refuse_repeated(name, next(id for id, times in Counter(own).items() if times > 1))
        rows.append(torch.tensor(row, dtype=torch.int64, device="cpu"))
    return rows, len(instances), list(instances)
