"""Every accepted form of input to one canonical form, and every argument error.

Nothing below this file checks arguments, and nothing above it looks inside them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import Group, exchanged, summed
from .ops import constants
from .ops.joint.spec import NAMES as JOINT_SCORES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LEAST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Embeddings = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""One positional argument of a public function: a tensor, or all modalities in one container."""

Mask = Tensor | Mapping[str, Tensor]


class Batch(NamedTuple):
    """k modalities of B instances: ``tensors`` holds k tensors (B, d), or one (B, k, d)."""

    tensors: tuple[Tensor, ...]
    mask: Tensor | None  # bool (B, k), True = present; of any bytes, see ``reference.read_mask``
    B: int
    k: int
    d: int
    device: torch.device
    dtype: torch.dtype  # what k-space is chosen by: float64 if any embedding is, else the first one's


_ARRAY = " (an array is passed as torch.from_numpy(x))"


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _check_tensor(x: Any, name: str, shape: str = "(B, d)") -> None:
    if not isinstance(x, Tensor):
        hint = ""
        if isinstance(x, (Mapping, list, tuple)) and name not in ("u", "query"):
            hint = " (a container of modalities is passed alone, and a mask by keyword, as mask=...)"
        elif isinstance(x, (int, float)):
            hint = " (options are passed by keyword, as temperature=...)"
        elif hasattr(x, "__array__"):
            hint = _ARRAY
        raise TypeError(f"{name}: got {type(x).__name__}, wanted a floating-point tensor {shape}{hint}")
    if x.dtype not in _DTYPES:
        wanted = ", ".join(map(str, _DTYPES))
        hint = " (a mask is passed by keyword, as mask=...)" if x.dtype == torch.bool else ""
        raise TypeError(f"{name}: got dtype {x.dtype}, wanted a floating-point one of {wanted}{hint}")
    _check_dense(x, name)


def _is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor, found without the seconds that importing that takes."""
    return type(x) is not Tensor and hasattr(x, "full_tensor")


def _check_dense(x: Tensor, name: str) -> None:
    if _is_distributed(x):
        raise TypeError(
            f"{name}: got a DTensor, wanted a plain tensor: x.to_local() has this process's rows, which group= "
            "contrasts with everyone's, and x.full_tensor() has all of them"
        )
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.layout == torch.strided else x.layout
        raise TypeError(f"{name}: got a {kind} tensor, wanted a dense (strided) one")


def _check_sizes(k: int, d: int, name: str = "embeddings", hint: str = "") -> None:
    if k > constants.MAX_MODALITIES:
        most = constants.MAX_MODALITIES - (name == "candidates")  # which have a query beside them
        raise ValueError(f"{name}: got k = {k} modalities, wanted at most {most}{hint}")
    if d < 1:
        raise ValueError(f"{name}: got d = 0, wanted embeddings of at least one dimension")


def _uniform(tensors: tuple[Any, ...]) -> tuple[torch.Size, torch.dtype, torch.device] | None:
    """What these have in common, if they are what users nearly always pass; else ``_check_modalities``, which takes
    longer, decides."""
    first, strided = tensors[0], torch.strided
    for x in tensors:
        if type(x) is not Tensor and (not isinstance(x, Tensor) or _is_distributed(x)):
            return None
        if x.is_nested or x.layout != strided:  # what is nested may have no shape
            return None
    shape, dtype, device = first.shape, first.dtype, first.device
    for x in tensors[1:]:
        if x.dtype != dtype or x.shape != shape or x.device != device:
            return None
    return (shape, dtype, device) if len(shape) == 2 and dtype in _DTYPES else None


def _check_modalities(tensors: tuple[Any, ...], names: list[str]) -> None:
    """k tensors (B, d) of one shape and device."""
    first, k = tensors[0], len(tensors)
    for x, name in zip(tensors, names, strict=True):
        _check_tensor(x, name)
    for x, name in zip(tensors, names, strict=True):
        if x.dim() != 2:
            wanted = "(B, d), or one (B, k, d) tensor alone" if k == 1 else f"(B, d) as all {k} modalities have it"
            raise ValueError(f"{name}: got shape {_shape(x)}, wanted {wanted}")
        if x.shape != first.shape:
            raise ValueError(f"{name}: got shape {_shape(x)}, wanted {_shape(first)} as {names[0]} has it")
        if x.device != first.device:
            raise ValueError(f"{name}: got device {x.device}, wanted {first.device} as {names[0]} has it")


def canonical(embeddings: tuple[Any, ...], mask: Any, name: str = "embeddings") -> Batch:
    """Reads ``*embeddings`` and ``mask`` in any accepted form; raises TypeError or ValueError for any other.

    ``name`` is what the caller calls them: "embeddings", or "candidates", which a query comes before.
    """
    keys: tuple[Any, ...] | None = None
    tensors: tuple[Any, ...] = embeddings
    if len(embeddings) == 1 and not isinstance(embeddings[0], Tensor):
        only = embeddings[0]
        if isinstance(only, Mapping):
            keys, tensors = tuple(only.keys()), tuple(only.values())
        elif _is_list(only):
            tensors = tuple(only)
        else:
            hint = _ARRAY if hasattr(only, "__array__") else ""
            raise TypeError(
                f"{name}: got {type(only).__name__}, wanted k tensors (B, d), a list, tuple or dict of them, "
                f"or one tensor (B, k, d){hint}"
            )
    if not tensors:
        hint = " after the query, which is passed by itself" if name == "candidates" else ""
        raise ValueError(f"{name}: got none, wanted at least one tensor (B, d){hint}")

    first = tensors[0]
    if len(tensors) == 1 and isinstance(first, Tensor) and first.dim() == 3 and keys is None:
        _check_tensor(first, name)
        B, k, d = first.shape
        transposed = k > constants.MAX_MODALITIES >= d
        hint = "; a (B, d, k) stack must be transposed: pass Z.transpose(1, 2)" if transposed else ""
        _check_sizes(k, d, name, hint)
        if k < 1:
            raise ValueError(f"{name}: got shape {_shape(first)}, wanted (B, k, d) with k of at least 1")
        dtype = first.dtype
    else:
        k = len(tensors)
        common = _uniform(tensors)
        if common is not None:
            (B, d), dtype, device = common
            _check_sizes(k, d, name)
            return Batch(tensors, None if mask is None else _mask(mask, keys, B, k, d, device), B, k, d, device, dtype)
        _check_modalities(tensors, [f"{name}[{key!r}]" for key in (range(k) if keys is None else keys)])
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else first.dtype
        B, d = first.shape
        _check_sizes(k, d, name)
    device = first.device
    return Batch(tensors, None if mask is None else _mask(mask, keys, B, k, d, device), B, k, d, device, dtype)


def _is_list(x: Any) -> bool:
    return isinstance(x, (list, tuple)) or (isinstance(x, Sequence) and not isinstance(x, (str, bytes)))


def _mask(mask: Any, keys: tuple[Any, ...] | None, B: int, k: int, d: int, device: torch.device) -> Tensor:
    if isinstance(mask, Mapping):
        if keys is None:
            raise TypeError("mask: got a dict, wanted a bool tensor (B, k), since embeddings are no dict")
        if set(mask) != set(keys):
            raise ValueError(f"mask: got keys {sorted(map(str, mask))}, wanted those of embeddings, {list(keys)}")
        for key in keys:
            _check_mask(mask[key], f"mask[{key!r}]", (B,), device)
        return torch.stack([mask[key] for key in keys], 1)
    shaped = isinstance(mask, Tensor) and not mask.is_nested
    transposed = shaped and tuple(mask.shape) == (B, d) != (B, k)
    hint = f": embeddings are (B, k, d) = {(B, k, d)}; a (B, d, k) stack must be transposed" if transposed else ""
    _check_mask(mask, "mask", (B, k), device, hint)
    result: Tensor = mask
    return result


def _check_mask(mask: Any, name: str, shape: tuple[int, ...], device: torch.device, hint: str = "") -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, wanted a bool tensor {shape}, True = present")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: got dtype {mask.dtype}, wanted torch.bool, True = present")
    _check_dense(mask, name)
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name}: got shape {_shape(mask)}, wanted {shape}{hint}")
    if mask.device != device:
        raise ValueError(f"{name}: got device {mask.device}, wanted {device} as what it masks has it")


def identified(embeddings: Any, ids: Any) -> tuple[list[str], tuple[Tensor, ...], list[Any]]:
    """Checks the (B_m, d) embeddings of ``by_id`` and the ids of their rows: names, embeddings, ids in their order.

    Ids come out all as tensors or all as sequences. Whether one comes twice is not looked at.
    """
    for name, value, wanted in (("embeddings", embeddings, "tensors (B, d)"), ("ids", ids, "the ids of their rows")):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}: got {type(value).__name__}, wanted a dict of {wanted}, by modality")
    if not embeddings:
        raise ValueError("embeddings: got none, wanted at least one tensor (B, d)")
    if set(ids) != set(embeddings):
        raise ValueError(f"ids: got keys {sorted(map(str, ids))}, wanted those of embeddings, {list(embeddings)}")
    names, tensors, given = list(embeddings), tuple(embeddings.values()), [ids[name] for name in embeddings]
    first = tensors[0]
    for name, x in embeddings.items():
        _check_tensor(x, f"embeddings[{name!r}]")
        if x.dim() != 2:
            raise ValueError(f"embeddings[{name!r}]: got shape {_shape(x)}, wanted (B, d)")
        if x.shape[1] != first.shape[1]:
            wanted = f"(B, {first.shape[1]}) with the d of embeddings[{names[0]!r}]"
            raise ValueError(f"embeddings[{name!r}]: got shape {_shape(x)}, wanted {wanted}")
        if x.device != first.device:
            wanted = f"{first.device} as embeddings[{names[0]!r}] has it"
            raise ValueError(f"embeddings[{name!r}]: got device {x.device}, wanted {wanted}")
    _check_sizes(len(tensors), first.shape[1])
    if isinstance(given[0], Tensor):
        _check_id_tensors(names, tensors, given)
    else:
        _check_id_sequences(names, tensors, given)
    return names, tensors, given


def _check_id_tensors(names: list[str], tensors: tuple[Tensor, ...], ids: list[Any]) -> None:
    first = ids[0]
    for key, x, own in zip(names, tensors, ids, strict=True):
        name, B = f"ids[{key!r}]", len(x)
        if not isinstance(own, Tensor):
            raise TypeError(f"{name}: got {type(own).__name__}, wanted a tensor as ids[{names[0]!r}] is one")
        if own.dtype not in _INTEGERS:
            raise TypeError(f"{name}: got dtype {own.dtype}, wanted an integer one of {', '.join(map(str, _INTEGERS))}")
        _check_dense(own, name)
        if own.is_meta:
            raise ValueError(f"{name}: got device meta, wanted one where ids can be read")
        if own.dim() not in (1, 2) or len(own) != B or 0 in own.shape[1:]:
            raise ValueError(f"{name}: got shape {_shape(own)}, wanted ({B},) or ({B}, c), the ids of {B} rows")
        if own.shape[1:] != first.shape[1:]:
            wanted = ", ".join(map(str, (B, *first.shape[1:]))) + ("," if first.dim() == 1 else "")
            raise ValueError(f"{name}: got shape {_shape(own)}, wanted ({wanted}), ids as ids[{names[0]!r}] has them")
        if own.device != first.device:
            raise ValueError(f"{name}: got device {own.device}, wanted {first.device} as ids[{names[0]!r}] has it")


def _check_id_sequences(names: list[str], tensors: tuple[Tensor, ...], ids: list[Any]) -> None:
    kinds: dict[tuple[int, ...], tuple[type, str]] = {}  # by place in a tuple: that of the first one, and whose it is
    for key, x, own in zip(names, tensors, ids, strict=True):
        name, B = f"ids[{key!r}]", len(x)
        wanted = f"an integer tensor ({B},) or ({B}, c), or a sequence of {B} hashables"
        if isinstance(own, Tensor):
            raise TypeError(f"{name}: got a tensor, wanted a sequence as ids[{names[0]!r}] is one")
        if not isinstance(own, Sequence) or isinstance(own, (str, bytes)):
            hint = " (an array is passed as torch.from_numpy(x), or x.tolist())" if hasattr(own, "dtype") else ""
            raise TypeError(f"{name}: got {type(own).__name__}, wanted {wanted}{hint}")
        if len(own) != B:
            raise ValueError(f"{name}: got {len(own)} ids, wanted {B}, those of the rows of embeddings[{key!r}]")
        for i, id in enumerate(own):
            _check_kind(id, name, (i,), kinds)
        bad = _unhashable(own)
        if bad is not None:
            raise TypeError(f"{name}[{bad}]: got {type(own[bad]).__name__}, wanted a hashable, as a string or a tuple")


def _check_kind(id: Any, name: str, place: tuple[int, ...], kinds: dict[tuple[int, ...], tuple[type, str]]) -> None:
    """That an id, or what a tuple has in one place, is of a type that can be equal to those before it."""

    def refuse(wanted: str) -> NoReturn:
        where = "".join(f"[{at}]" for at in place)
        raise TypeError(f"{name}{where}: got {type(id).__name__}, wanted {wanted}")

    # Of two types few ids are ever equal, "1" and 1 say: nothing would be in common, and nobody told.
    kind, whose = kinds.setdefault(place[1:], (type(id), name))
    if type(id) is not kind:
        refuse(f"{kind.__name__} as {whose} has them")
    # As a key a tensor is equal to itself alone, and so is NaN.
    if isinstance(id, Tensor):
        refuse("a hashable, as a string or a tuple (tensors of ids are passed as one tensor)")
    if isinstance(id, numbers.Complex) and not isinstance(id, numbers.Rational):  # NumPy's, too
        refuse("a string, an integer or a tuple of such: floats that should be equal need not be")
    if not _is_itself(id):
        refuse("what is equal to itself")
    if isinstance(id, tuple):
        for at, part in enumerate(id):
            if part is not None:
                _check_kind(part, name, (*place, at), kinds)


def _is_itself(id: Any) -> bool:
    try:
        return bool(id == id)
    except Exception:  # what is missing, in pandas, is neither equal nor not
        return False


def _unhashable(ids: Sequence[Any]) -> int | None:
    """The place of the first that cannot be hashed, as a list cannot, or a tuple that holds one."""
    try:
        hash(tuple(ids))
    except TypeError:
        for i, id in enumerate(ids):
            try:
                hash(id)
            except TypeError:
                return i
    return None


def refuse_repeated(name: str, id: Hashable) -> NoReturn:
    """An id that one modality has twice."""
    raise ValueError(f"ids[{name!r}]: got {id!r} twice, wanted every id at most once in a modality")


def rows(u: Any, mask: Any) -> tuple[Tensor, Tensor | None]:
    """Checks the (B, d) vectors and the (B,) mask of ``instance_contrastive_loss``."""
    _check_tensor(u, "u")
    if u.dim() != 2 or u.shape[1] < 1:
        raise ValueError(f"u: got shape {_shape(u)}, wanted (B, d) with d of at least 1")
    if mask is not None:
        _check_mask(mask, "mask", (u.shape[0],), u.device)
    return u, mask


def query(x: Any, candidates: Batch) -> Tensor:
    """Checks the (Nq, d) queries of joint scores, and that with one of them candidates are not too many modalities."""
    _check_tensor(x, "query", "(Nq, d)")
    if x.dim() != 2 or x.shape[1] != candidates.d:
        raise ValueError(f"query: got shape {_shape(x)}, wanted (Nq, {candidates.d}) with the d of the candidates")
    if x.device != candidates.device:
        raise ValueError(f"query: got device {x.device}, wanted {candidates.device} as the candidates have it")
    if candidates.k >= constants.MAX_MODALITIES:
        most = constants.MAX_MODALITIES - 1
        raise ValueError(f"candidates: got {candidates.k} modalities, wanted at most {most} beside the query")
    result: Tensor = x
    return result


def positives(x: Any, queries: int, candidates: Batch) -> Tensor | None:
    """Checks the (Nq,) numbers of queries' candidates; None where each query has its own, as many as there are.

    Numbers elsewhere than on a CPU are not read, since the host would wait for them.
    """
    Ng = candidates.B
    if x is None:
        if queries != Ng:
            raise ValueError(
                f"positives: got None with {queries} queries and {Ng} candidates, wanted an int64 tensor ({queries},), "
                "the candidate of each query"
            )
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"positives: got {type(x).__name__}, wanted an int64 tensor ({queries},), or None")
    if x.dtype != torch.int64:
        raise TypeError(f"positives: got dtype {x.dtype}, wanted torch.int64, the candidate of each query")
    _check_dense(x, "positives")
    if tuple(x.shape) != (queries,):
        raise ValueError(f"positives: got shape {_shape(x)}, wanted ({queries},), the candidate of each query")
    if x.device != candidates.device:
        raise ValueError(f"positives: got device {x.device}, wanted {candidates.device} as the candidates have it")
    if type(x) is Tensor and x.device.type == "cpu" and queries and not torch.compiler.is_compiling():
        largest = int(x.max())
        if largest >= Ng:
            raise ValueError(f"positives: got {largest}, wanted numbers below {Ng}, that of candidates (or negative)")
    result: Tensor = x
    return result


def ranks(value: Any) -> Tensor:
    """Checks the 0-based ranks (N,) of ``recall_at``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"ranks: got {type(value).__name__}, wanted an int64 tensor (N,)")
    if value.dtype != torch.int64:
        raise TypeError(f"ranks: got dtype {value.dtype}, wanted torch.int64")
    _check_dense(value, "ranks")
    if value.is_meta:
        raise ValueError("ranks: got device meta, wanted one where ranks can be read")
    if value.dim() != 1:
        raise ValueError(f"ranks: got shape {_shape(value)}, wanted (N,)")
    return value


def count(value: Any, name: str, most: int | None = None) -> int:
    """A Python int of at least 1."""
    if most == 0:
        raise ValueError(f"candidates: got none, wanted at least one for {name}, which is at least 1")
    wanted = "an int of at least 1" + ("" if most is None else f" and at most {most}, the number of candidates")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: got {value}, wanted {wanted}")
    return value


def smoothing(value: Any) -> float:
    """A label smoothing in [0, 1]."""
    number = real(value, "label_smoothing")
    if not 0 <= number <= 1:
        raise ValueError(f"label_smoothing: got {value!r}, wanted a number from 0 to 1")
    return number


def examples(embeddings: Sequence[Any], masks: Sequence[Any]) -> None:
    """Checks the tensors that ``warm_up`` makes others like."""
    for x in embeddings:
        if not isinstance(x, Tensor):
            raise TypeError(f"embeddings: got {type(x).__name__}, wanted floating-point tensors, or trees of them")
        _check_tensor(x, "embeddings")
        if x.is_meta:
            raise ValueError("embeddings: got device meta, wanted one that kernels run on")
    for x in masks:
        if not isinstance(x, Tensor):
            raise TypeError(f"mask: got {type(x).__name__}, wanted bool tensors, or trees of them")


def temperature(value: Any, name: str, device: torch.device, contrast: bool = False) -> tuple[Tensor | None, float]:
    """A temperature as (0-d tensor, unused number) or (None, number). Tensors are never read here."""
    if type(value) is float and _LEAST <= value <= _LARGEST:  # what nearly always comes
        return None, value
    if isinstance(value, Tensor):
        _check_tensor(value, name)
        if value.dim() != 0:
            raise ValueError(f"{name}: got a tensor of shape {_shape(value)}, wanted a 0-d tensor or a float")
        if value.device != device:
            raise ValueError(f"{name}: got device {value.device}, wanted {device} as the embeddings have it")
        return value, 1.0
    number = real(value, name, "a finite number above 0")
    if not number > 0:
        raise ValueError(f"{name}: got {value!r}, wanted a finite number above 0")
    # Beyond float32's normal numbers every backend would have to say what similarities in float32 over them are.
    if contrast and not _LEAST <= number <= _LARGEST:
        raise ValueError(f"{name}: got {value!r}, wanted one of float32's normal numbers above 0")
    return None, number


def real(value: Any, name: str, wanted: str = "a finite number") -> float:
    """A finite Python number as a float; of ``wanted`` beyond that it makes words alone."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf:  # math.isfinite does not take the symbolic floats of torch.compile
        raise ValueError(f"{name}: got {value!r}, wanted {wanted}")
    return number


def weight(value: Any, name: str) -> float:
    """A Python number of at least 0, within float32's range, as a float."""
    number = real(value, name, "a finite number of at least 0")
    if not 0 <= number <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name}: got {value!r}, wanted a finite number of at least 0 that float32 can hold")
    return number


def flag(value: Any, name: str) -> bool:
    """A plain bool; anything else (a mask passed in the wrong place, say) is an error."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted True or False")
    return value


def one_of(value: Any, name: str, wanted: tuple[str, ...]) -> str:
    """One of the given names."""
    if not isinstance(value, str) or value not in wanted:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, wanted))}")
    return value


def named_group(group: Any) -> ProcessGroup | Literal["world"] | None:
    """None, a group of processes that this one belongs to, or "world", which a call looks up."""
    if group is None:
        return None
    if isinstance(group, str) and group == "world":
        return "world"
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: got one that this process does not belong to, wanted one that it does, or None")
        got = repr(group) if isinstance(group, str) else type(group).__name__
        raise TypeError(f'group: got {got}, wanted a torch.distributed.ProcessGroup, "world" or None')
    return group


def process_group(group: Any) -> ProcessGroup | None:
    """The same with "world" looked up: all processes, of which there is no group before it is initialised."""
    named = named_group(group)
    if not isinstance(named, str):
        return named
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            'group: got "world" where no process group is initialised, wanted a call of '
            "torch.distributed.init_process_group before this one (or None for this process alone)"
        )
    everyone: ProcessGroup | None = dist.group.WORLD
    return everyone


def spread_batch(group: Any, local_sizes: Any, batch: Batch, contrast: str, name: str = "embeddings") -> Group | None:
    """How a batch spreads over the processes of a group; None where there is no group.

    Asks the others how many rows they have, and whether what they are about to gather has the same shape, unless
    ``local_sizes`` tells: then nothing is asked.
    """
    processes = process_group(group)
    if processes is None:
        if local_sizes is not None:
            raise ValueError(f"local_sizes: got {local_sizes!r}, wanted None where there is no group")
        return None
    B, world, rank = batch.B, dist.get_world_size(processes), dist.get_rank(processes)
    if local_sizes is None:
        told = [(B, B)] if world == 1 else _sizes(processes, batch, contrast, name)
        return Group(processes, tuple(size for size, _ in told), rank)
    if not _is_list(local_sizes) or not all(_is_count(size) for size in local_sizes):
        raise TypeError(f"local_sizes: got {local_sizes!r}, wanted a list of {world} ints, the rows of each process")
    if len(local_sizes) != world:
        raise ValueError(
            f"local_sizes: got {len(local_sizes)} numbers, wanted {world}, one for each process of the group"
        )
    if local_sizes[rank] != B:
        raise ValueError(f"local_sizes[{rank}]: got {local_sizes[rank]}, wanted {B}, the rows of this process")
    return Group(processes, tuple(local_sizes), rank)


def spread_pairs(
    group: Any, local_sizes: Any, queries: int, candidates: Batch, score: str, positives: bool
) -> tuple[Group, Group] | None:
    """The same of queries and of candidates, which are as many where there are no ``positives``."""
    if not positives:
        spread = spread_batch(group, local_sizes, candidates, score, "candidates")
        return None if spread is None else (spread, spread)
    processes = process_group(group)
    if processes is not None and local_sizes is None:
        told = [(candidates.B, queries)]
        if dist.get_world_size(processes) > 1:
            told = _sizes(processes, candidates, score, "candidates", queries)
        of_candidates, of_queries = zip(*told, strict=True)
        rank = dist.get_rank(processes)
        return Group(processes, of_queries, rank), Group(processes, of_candidates, rank)
    if local_sizes is not None and not (
        _is_list(local_sizes) and all(_is_list(pair) and len(pair) == 2 for pair in local_sizes)
    ):
        raise TypeError(
            f"local_sizes: got {local_sizes!r}, wanted a list of pairs, how many queries and how many candidates each "
            "process has, since there are positives"
        )
    sides = []
    for side, batch in enumerate((candidates._replace(B=queries), candidates)):
        spread = spread_batch(group, local_sizes and [pair[side] for pair in local_sizes], batch, score)
        if spread is None:
            return None
        sides.append(spread)
    return sides[0], sides[1]


_CONTRASTS = ("leading", "modality", "raw", "leave_one_out", "pairs", *JOINT_SCORES)


def _sizes(
    processes: ProcessGroup, batch: Batch, contrast: str, name: str, queries: int | None = None
) -> list[tuple[int, int]]:
    """The number of rows of every process, and of its queries, if these are others (else 0), once all have the same of
    what decides the shape of a row on the wire."""
    kind = _CONTRASTS.index(contrast), queries is not None
    numbers = (batch.B, queries or 0, *kind, batch.k, batch.d, _DTYPES.index(batch.dtype))
    everyone = exchanged(processes, numbers, batch.device)
    sizes, of_queries, contrasts, have_queries, k, d, dtypes = zip(*everyone, strict=True)
    if all(other[2:] == everyone[0][2:] for other in everyone):
        return list(zip(sizes, of_queries, strict=True))
    if all(_CONTRASTS[c] in JOINT_SCORES for c in contrasts):
        _same("score", [repr(_CONTRASTS[c]) for c in contrasts])
        _same("positives", ["some" if have else "None" for have in have_queries])
    if _CONTRASTS.index("raw") in contrasts:
        _same("normalize", [str(_CONTRASTS[c] != "raw") for c in contrasts])
    _same("contrast", [repr(_CONTRASTS[c]) for c in contrasts])
    if contrast not in ("leading", "raw"):
        _same(name, [f"k = {n}" for n in k])
    _same(name, [f"d = {n}" for n in d])
    wide = ["64-bit" if _DTYPES[i] == torch.float64 or contrast == "raw" else "32-bit" for i in dtypes]
    _same(name, [f"dtype {_DTYPES[i]}" for i in dtypes], wide)
    return list(zip(sizes, of_queries, strict=True))


def same_width(processes: ProcessGroup | None, d: int, device: torch.device) -> None:
    """That every process of a group sums vectors of this many numbers. The host waits for it."""
    if processes is None or dist.get_world_size(processes) == 1:
        return
    # Compiled code cannot look, but takes part: the others may not be compiled. (So it is a sum: with gloo, a compiled
    # gather does not meet an eager one.)
    own = torch.zeros(dist.get_world_size(processes), dtype=torch.float64, device=device)
    own[dist.get_rank(processes)] = d
    (everyone,) = summed([own], processes)
    if not torch.compiler.is_compiling():
        _same("embeddings", [f"d = {n:.0f}" for n in everyone.tolist()])


def _same(name: str, values: Sequence[str], keys: Sequence[str] | None = None) -> None:
    """Raises where processes have different values of something (or different keys, where those decide)."""
    if len(set(values if keys is None else keys)) == 1:
        return
    got = []
    for value in dict.fromkeys(values):
        ranks = [str(rank) for rank, other in enumerate(values) if other == value]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        got.append(f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:8])}{more}")
    raise ValueError(f"{name}: got {' and '.join(got)}, wanted the same on every process of the group")


def _is_count(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0
