"""Encoders run over a few rows of the batch at a time, so that a contrastive loss can have a large one."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Hashable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import inputs

_PLAIN = (type(None), bool, int, float, str)


def in_chunks(function: Callable[..., Any], chunk_size: int, *, shared: Collection[str] = ()) -> Callable[..., Any]:
    r"""``function`` of a whole batch, run over ``chunk_size`` rows at a time, keeping no activations of any chunk.

    Returns a function of the same arguments. It calls ``function`` on rows 0 to c − 1 of every tensor in them, on rows
    c to 2c − 1, and so on, the last time on what is left, and concatenates what comes back. In the backward pass each
    chunk is run once more, when its gradient is there, and its activations go before the next chunk's come. So memory
    is that of one chunk's activations and of everyone's embeddings, for one more forward pass in time; and the loss,
    which sees all embeddings at once, is called as ever.

    This is the gradient cache (GradCache, Gao et al. 2021) by PyTorch's own ``torch.utils.checkpoint``. There the loss
    is differentiated first, down to embeddings without a graph, whose gradients are put into a second pass by hand;
    here one graph, an outline of which is kept from the first pass, does both in one ``backward()``. Gradients are the
    same. So whoever calls ``backward()`` need not know: any trainer, ``DistributedDataParallel`` (every parameter's
    gradient is complete, and sent, once), FSDP, gradient clipping, ``torch.autograd.grad``.

    Args:
        function: of tensors, and of dicts, tuples, lists and dataclasses of them to any depth, by position or by name:
            an encoder, or a method of a model. A row of its output may depend on the same row of its inputs alone.
        chunk_size: rows of a chunk, c, an int of at least 1. Where B <= c nothing differs from ``function``: it is
            called once, and its activations are kept.
        shared: names of keyword arguments, of keys of dicts and of fields, at any depth, whose tensors have no row for
            each instance: each chunk gets them whole. (A tensor without dimensions, and what is no tensor, is shared
            anyway.)

    Returns:
        A function that returns what ``function`` does: a tensor (B, ...), or a dict, tuple, list or dataclass of such
        (the model outputs of transformers are dicts), joined by key. What is no tensor there must be equal in all
        chunks, and so must keys and kinds of containers. An output that the loss does not use is concatenated too, and
        takes memory: return embeddings, not hidden states.

    Raises:
        TypeError, ValueError: a bad argument. By the call: no tensor to take rows of, tensors whose numbers of rows
            differ (ValueError); an output with another number of rows than its chunk (ValueError), or that cannot be
            concatenated, such as a cache of keys and values, or with other keys for one chunk (TypeError).

    Until ``backward()`` has run, ``function`` has to stay what it was, since it is called again: variables that it
    reads (a name bound by a loop, say, in a lambda), parameters, ``train()`` or ``eval()``. PyTorch does not notice if
    an optimizer's step or ``torch.func.functional_call`` has changed parameters in between, and of random numbers it
    repeats its own, those of the CPU and of devices of tensors among the arguments. What containers among the
    arguments hold is read once, at the call, but for what is shared, which comes as it is each time; a tensor that is
    written to is an error.

    Gradients: to the bit those of a loop over chunks that keeps everything, so those of the whole batch up to how
    PyTorch rounds products and sums of fewer rows, for parameters, inputs and shared tensors; under autocast, chunks
    are summed in the parameters' dtype. Without grad mode nothing is kept, and nothing runs twice; so it is with what
    is frozen, up to the first parameter that is not. Dropout draws chunk by chunk, so other numbers than for the whole
    batch, and the same ones when a chunk is run again.

    Degenerate cases: B = 0 is one call with no rows. BatchNorm in training mode is *not* what it is for the whole
    batch: its statistics are a chunk's, and are updated twice in a step. Whatever else counts calls counts twice, too.

    Source: Gao, Zhang, Han, Callan, *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*
    (arXiv 2101.06983); docs/trainers.md has measurements.

    Example:
        >>> import torch
        >>> from pmrl_kernels import pmrl_loss
        >>> encoders = [torch.nn.Linear(w, 16) for w in (48, 80, 40)]
        >>> features = [torch.randn(64, w) for w in (48, 80, 40)]
        >>> embeddings = [in_chunks(encoder, 10)(x) for encoder, x in zip(encoders, features)]
        >>> [tuple(x.shape) for x in embeddings]
        [(64, 16), (64, 16), (64, 16)]
        >>> pmrl_loss(embeddings, temperature=1.0, contrast="leave_one_out").backward()
        >>> encoders[0].weight.grad.shape
        torch.Size([16, 48])
    """
    if not callable(function):
        raise TypeError(f"function: got {type(function).__name__}, wanted a callable")
    chunk_size, names = inputs.count(chunk_size, "chunk_size"), _names(shared)

    def call(*arguments: Any, **named: Any) -> Any:
        rows = [(name, x) for name, x in _leaves((arguments, named), "", names) if _has_rows(x)]
        _check_rows(rows)
        chunks = list(zip(*(x.split(chunk_size) for _, x in rows), strict=True))
        given = _held((arguments, named), names)
        # What is shared is read from where it is, and comes along so that PyTorch notices if it is written to.
        whole = [x for x in _shared((arguments, named), names) if isinstance(x, Tensor)]

        def one(*tensors: Tensor) -> Any:
            # Or weights that autocast has cast for one chunk would serve the next one as well, and collect the
            # gradients of all chunks in autocast's dtype: sums of many terms in bfloat16. (What compiles a graph
            # caches none of them, and that of torch 2.10 cannot trace this.)
            if not torch.compiler.is_compiling():
                torch.clear_autocast_cache()
            parts = iter(tensors)
            arguments, named = _replaced(given, lambda x: next(parts) if _has_rows(x) else x, names)
            return function(*arguments, **named)

        # As positional arguments tensors tell on which device there are random numbers to keep.
        run = one if len(chunks) == 1 or not torch.is_grad_enabled() else _checkpointed(one)
        return _joined([run(*chunk, *whole) for chunk in chunks], [len(chunk[0]) for chunk in chunks])

    return call


class Chunked(nn.Module):
    r"""A module that runs ``encoder`` over ``chunk_size`` rows at a time; all rules are :func:`in_chunks`'s.

    The encoder is a submodule, ``encoder``, so names in a ``state_dict()`` have that in front; where that is in the
    way, call ``in_chunks(self.text, 32)(...)`` in the model's ``forward`` instead. With FSDP2 shard the ``Chunked``,
    ``fully_shard(Chunked(encoder, 32))``, and its parameters are gathered and their gradients reduced once a step;
    modules that are sharded inside it are gathered for each chunk, so then all processes must have as many chunks.

    Args:
        encoder: a module.
        chunk_size, shared: as in :func:`in_chunks`.

    Raises:
        TypeError, ValueError: a bad argument, when the module is made.

    Source: as :func:`in_chunks`.

    Example:
        >>> import torch
        >>> encoder = Chunked(torch.nn.Linear(48, 16), chunk_size=10)
        >>> encoder(torch.randn(64, 48)).shape
        torch.Size([64, 16])
        >>> encoder
        Chunked(
          chunk_size=10
          (encoder): Linear(in_features=48, out_features=16, bias=True)
        )
    """

    def __init__(self, encoder: nn.Module, chunk_size: int, *, shared: Collection[str] = ()) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: got {type(encoder).__name__}, wanted a torch.nn.Module; functions: in_chunks")
        self.encoder = encoder
        self.chunk_size = inputs.count(chunk_size, "chunk_size")
        self.shared = _names(shared)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the encoder returns for the whole batch."""
        return in_chunks(self.encoder, self.chunk_size, shared=self.shared)(*arguments, **named)

    def extra_repr(self) -> str:
        shared = f", shared={self.shared}" if self.shared else ""
        return f"chunk_size={self.chunk_size}{shared}"


def _names(shared: Any) -> tuple[str, ...]:
    if isinstance(shared, str) or not isinstance(shared, Collection):
        raise TypeError(f"shared: got {type(shared).__name__}, wanted a tuple of names")
    for name in shared:
        if not isinstance(name, str):
            raise TypeError(f"shared: got {type(name).__name__} in it, wanted names")
    return tuple(shared)


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *chunk: checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=True)


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _check_rows(rows: Sequence[tuple[str, Tensor]]) -> None:
    if not rows:
        raise ValueError(
            "inputs: got no tensor with dimensions that is not shared, wanted at least one to take rows of"
        )
    (first, x), *others = rows
    for name, y in others:
        if len(y) != len(x):
            raise ValueError(
                f"{name}: got {len(y)} rows, wanted {len(x)}, as {first} has; what has no row for each instance "
                "belongs in shared"
            )


def _joined(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """What the function returned for chunks of these sizes, as one."""
    first, *others = found = [_by_place(output) for output in outputs]
    for number, other in enumerate(others, 1):
        for place in {**first, **other}:
            wanted, got = (_kind(x[place]) if place in x else "nothing" for x in (first, other))
            if got != wanted:
                raise TypeError(
                    f"{_named(place)}: got {got} of chunk {number}, and of the first {wanted}, wanted the same of all "
                    "chunks"
                )
    columns = []
    for place, value in first.items():
        name, parts = _named(place), [x[place] for x in found]
        if isinstance(value, Tensor):
            for number, (x, size) in enumerate(zip(parts, sizes, strict=True)):
                if x.dim() == 0 or len(x) != size:
                    raise ValueError(f"{name}: got the shape {tuple(x.shape)} of {size} rows, wanted one row for each")
                if x.shape[1:] != value.shape[1:]:
                    raise TypeError(
                        f"{name}: got the shape {tuple(x.shape)} of chunk {number}, and of the first "
                        f"{tuple(value.shape)}, wanted the same but for rows"
                    )
            columns.append(parts)
        elif _parts(value) is None and not all(isinstance(x, _PLAIN) and x == value for x in parts):
            raise TypeError(
                f"{name}: got {type(value).__name__}, wanted tensors, or what is equal in all chunks: None, "
                "a number, a string"
            )
    if len(outputs) == 1:
        return outputs[0]
    whole = iter([torch.cat(parts) for parts in columns])
    return _replaced(outputs[0], lambda x: next(whole) if isinstance(x, Tensor) else x)


# ------------------------------------------------------------------------------------------------
# Containers. (PyTorch's own pytree cannot tell keys of classes that others have registered with it, and does not know
# those that nobody has.)
# ------------------------------------------------------------------------------------------------


def _parts(value: Any) -> list[tuple[Hashable, Any]] | None:
    """What a container holds, by key, field or number; None for a leaf."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init]
    return None


def _leaves(value: Any, name: str, shared: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """Everything in a container that is none, with its name; but what is below a shared name."""
    parts = _parts(value)
    if parts is None:
        return [(name, value)]
    found = []
    for key, part in parts:
        if not (isinstance(key, str) and key in shared):
            found += _leaves(part, _name(name, key), shared)
    return found


def _by_place(value: Any, place: tuple[Hashable, ...] = ()) -> dict[tuple[Hashable, ...], Any]:
    """A container, and everything in it to any depth, by the keys that lead there, in the order of :func:`_leaves`."""
    found = {place: value}
    for key, part in _parts(value) or ():
        found |= _by_place(part, (*place, key))
    return found


def _kind(value: Any) -> str:
    return "None" if value is None else "Tensor" if isinstance(value, Tensor) else type(value).__name__


def _named(place: tuple[Hashable, ...]) -> str:
    return functools.reduce(_name, place, "output")


def _name(container: str, key: Hashable) -> str:
    if not container:  # positional and keyword arguments
        return "inputs" if key == 0 else "keywords"
    if container == "keywords":
        return str(key)
    return f"{container}[{key!r}]"


def _shared(value: Any, shared: tuple[str, ...]) -> list[Any]:
    """Everything that :func:`_leaves` leaves out, and tensors without dimensions."""
    parts = _parts(value)
    if parts is None:
        return [value] if isinstance(value, Tensor) and not _has_rows(value) else []
    found = []
    for key, part in parts:
        below = isinstance(key, str) and key in shared
        found += [x for _, x in _leaves(part, "")] if below else _shared(part, shared)
    return found


def _held(value: Any, shared: tuple[str, ...]) -> Any:
    """The same containers, as they are now: whoever called may put the result into one of them before chunks run again.
    What is shared comes as it is."""
    parts = _parts(value)
    if parts is None:
        return value
    new = {key: part if isinstance(key, str) and key in shared else _held(part, shared) for key, part in parts}
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping):  # which need not be made a second time
        twin = copy.copy(value)
        for key, part in new.items():
            object.__setattr__(twin, str(key), part)
        return twin
    return _rebuilt(value, new)


def _replaced(value: Any, leaf: Callable[[Any], Any], shared: tuple[str, ...] = ()) -> Any:
    """The same container with ``leaf(x)`` for everything in it that is none, in the order of :func:`_leaves`."""
    parts = _parts(value)
    if parts is None:
        return leaf(value)
    return _rebuilt(
        value,
        {key: part if isinstance(key, str) and key in shared else _replaced(part, leaf, shared) for key, part in parts},
    )


def _rebuilt(value: Any, new: dict[Hashable, Any]) -> Any:
    """A container like this one that holds these."""
    if type(value) is dict or (isinstance(value, Mapping) and not isinstance(value, MutableMapping)):
        return new
    if isinstance(value, MutableMapping):
        twin = copy.copy(value)  # of its class, with whatever else it has
        for key, part in new.items():
            before, twin[key] = value[key], part
            if part is not before and value[key] is part:  # the copy has no memory of its own
                value[key] = before
                raise TypeError(
                    f"inputs and outputs: got {type(value).__name__}, wanted a dict, or a mapping of which copy.copy "
                    "makes another one that can be written to"
                )
        return twin
    if isinstance(value, tuple):
        return value._make(new.values()) if hasattr(value, "_make") else type(value)(new.values())
    if isinstance(value, list):
        return type(value)(new.values())
    return dataclasses.replace(value, **{str(key): part for key, part in new.items()})
