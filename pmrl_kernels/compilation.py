"""Compiling and loading kernels before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from . import inputs

_BATCHES = (2, 192, 200, 448, 456, 1032, 1280, 1288, 8200)
"""One for each way that kernels are launched: the Triton backend's LATENCY_BATCH and SPREAD_BATCH lie between, and for
contrasts, of one vector with itself and of others, the least and the largest batch for each size of tiles, or one whose
weights go in strips."""

_ON_CPUS = (2, 1032)  # where large ones take seconds, and make no difference


def _batches(leaves: Sequence[Tensor]) -> Sequence[int]:
    if all(x.device.type == "cpu" for x in leaves):
        return _ON_CPUS
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    # Contrasts are launched by the number of everyone's rows, if the function gathers them; else by their own.
    return sorted({*_BATCHES, *(max(2, -(-batch // processes)) for batch in _BATCHES)})  # (BatchNorm refuses 1)


def warm_up(function: Callable[..., Any], *embeddings: Any, mask: Any = None) -> None:
    """Compiles whatever ``function(*embeddings)`` and its gradient run, for batches of any size.

    Triton's kernels are compiled when a call first needs them, which takes seconds (docs/layering.md has a table), and
    those of the CUDA backend are loaded. This gets it over with where waiting does no harm: before a timed step, before
    all processes of a job reach their first collective, or before a CUDA graph is captured, where either is an error.
    It calls ``function`` on random embeddings, of a few instances, a thousand and on a GPU of several numbers up to
    eight thousand, and differentiates what comes out. Triton keeps compiled kernels on disk (``TRITON_CACHE_DIR``), so
    another process takes less time. Where nothing has to be compiled, as on a CPU, it does no more than those calls.
    Gradients are enabled for them, within ``torch.no_grad()`` and ``torch.inference_mode()`` too.

    Triton's depend on the number of modalities, on dtypes, on d as far as up to which power of two and whether it is a
    multiple of 16 bytes, on options, and on which embeddings require gradients. Of B they depend no further than such
    batches do; with ``group=``, of what all processes have together, if they are those of the default group. But a
    contrast of more than some 2¹⁶/√(number of pairs) rows has another form of two kernels, and must have been called
    once with as many.

    Args:
        function: a loss, a module, or anything that takes the embeddings (and ``mask``, if one is given) and returns
            a tensor or a tree of tensors.
        embeddings: examples in any form that the function accepts, (B, d) tensors or trees of them, or (B, k, d);
            only their shapes beyond B, dtypes, devices and whether they require gradients matter. If none of
            them requires a gradient, all are taken to.
        mask: an example of one, if the function is to be called with ``mask=``.

    Raises:
        TypeError: a function that is none; an example that is no dense tensor of an accepted dtype; a mask that is no
            tensor.
        ValueError: an example on the meta device, for which there is nothing to compile: build the model first.

    What ``function`` raises comes through. No gradient is accumulated anywhere.

    Example:
        >>> import torch
        >>> from pmrl_kernels import dominant_sv_loss, warm_up
        >>> text, video, audio = (torch.randn(4, 16) for _ in range(3))
        >>> warm_up(dominant_sv_loss, text, video, audio)
        >>> warm_up(lambda xs: dominant_sv_loss(xs, objective="leading"), [text, video, audio])
    """
    if not callable(function):
        raise TypeError(f"function: got {type(function).__name__}, wanted a callable")
    leaves, tree = pytree.tree_flatten(embeddings)
    inputs.examples(leaves, [] if mask is None else pytree.tree_leaves(mask))
    all_of_them = not any(x.requires_grad for x in leaves)
    # What is made in inference mode cannot be differentiated, not even with gradients enabled.
    with torch.inference_mode(False), torch.enable_grad():
        for batch in _batches(leaves):
            copies = []
            for x in leaves:
                generator = torch.Generator(x.device).manual_seed(0)
                copy = torch.randn((batch, *x.shape[1:]), dtype=x.dtype, device=x.device, generator=generator)
                copies.append(copy.requires_grad_(x.requires_grad or all_of_them))
            options = {}
            if mask is not None:
                options["mask"] = pytree.tree_map(lambda m, rows=batch: m.new_ones((rows, *m.shape[1:])), mask)
            found = function(*pytree.tree_unflatten(copies, tree), **options)
            outputs = [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and x.requires_grad]
            if outputs:
                wanted = [x for x in copies if x.requires_grad]
                torch.autograd.grad(outputs, wanted, [torch.ones_like(x) for x in outputs], allow_unused=True)
