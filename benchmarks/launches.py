"""Kernels that a GPU is given for ``pmrl_loss``, forward + backward, and bytes of their arguments, counted on a CPU.

    python benchmarks/launches.py            # four contrasts, B = 256 to 65536, d = 512, k = 4: a minute
    python benchmarks/launches.py --quick    # B = 256 alone

Launches of the Triton kernels are recorded instead of made. Beside those of the contrast stand the kernels that the
reference makes of it in PyTorch, counted on the device "meta": each operation is one, log Σ exp nine, views and
allocations none. Bytes are those of all tensors that a kernel is given, each once, at its whole size: what kernels read
several times comes from caches, if all goes well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from lib import run
from lib.report import table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pmrl_kernels.ops import objective
from pmrl_kernels.ops.contrast import reference
from pmrl_kernels.ops.contrast import spec as contrasts
from pmrl_kernels.ops.contrast.triton import launch as fused
from pmrl_kernels.ops.spectral import spec
from pmrl_kernels.ops.spectral.triton import launch as spectral
from pmrl_kernels.ops.triton import runtime
from pmrl_kernels.ops.triton.arguments import Rows, Targets

D, K, TAU = 512, 4, 0.1
BATCHES = (256, 1024, 4096, 65536)
WANTED = {"leading": spec.U, "modality": spec.U | spec.Z, "leave_one_out": spec.Z | spec.W, "pairs": spec.Z}

NO_KERNEL = frozenset(
    (
        *("_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "narrow", "permute"),
        *("reshape", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    )
)
LOGSUMEXP = 9, 3  # kernels, and how often it passes over its matrix


class Work(NamedTuple):
    """Kernels and bytes of each pass."""

    forward: int
    backward: int
    size: int

    def __str__(self) -> str:
        return f"{self.forward} + {self.backward}, {self.size / 1e9:.3g} GB"


class Operations(TorchDispatchMode):
    """Counts what PyTorch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2].rstrip("_")
        if name not in NO_KERNEL:
            kernels, passes = LOGSUMEXP if name == "logsumexp" else (1, 1)
            tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
            self.kernels += kernels
            self.size += passes * sum(x.numel() * x.element_size() for x in tensors)
        return found


def sizes(value: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes of the tensors in an argument of a kernel, by address."""
    if isinstance(value, Tensor):
        found[value.data_ptr()] = value.numel() * value.element_size()
    elif isinstance(value, (Rows, Targets)):
        there = sum(offset is not None for offset in value.offsets)
        of_one = value.pointer.numel() * value.pointer.element_size()
        found[value.pointer.data_ptr()] = of_one * (there if value.pointer.dim() == 2 else 1)
    elif isinstance(value, tuple):
        for part in value:
            sizes(part, found)
    return found


def launched(forward: Callable[[], Any], backward: Callable[..., Any]) -> Work:
    """By what runs Triton's kernels."""
    recorded: list[runtime.Launch] = []
    make, runtime.run = runtime.run, recorded.append
    try:
        found = forward()
        number = len(recorded)
        backward(*found)
    finally:
        runtime.run = make
    size = sum(sum(sizes(one.arguments, {}).values()) for one in recorded)
    return Work(number, len(recorded) - number, size)


def arguments(contrast: str, B: int) -> tuple[Any, ...]:
    kind = contrasts.kind(contrast, K)
    vectors = [torch.empty(B, D) for _ in range(kind.vectors(K))]
    return vectors, kind.pairs, kind.directions, None, [], None, 0, None, TAU


def of_triton(contrast: str, B: int) -> Work:
    given, one = arguments(contrast, B), torch.ones(())
    return launched(lambda: fused.forward(*given)[1:], lambda *found: fused.backward(*given, *found, one))


def of_the_rest(contrast: str, B: int) -> Work:
    """The alignment term and the vectors that the contrast is of, from and to the embeddings."""
    xs = [torch.empty(B, D) for _ in range(K)]
    options = None, None, TAU, True, True
    wanted = spec.ALIGNMENT_MEAN | WANTED[contrast]

    def backward(outputs: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        if contrast == "leave_one_out" and B * K * D > objective.SMALL:
            spectral.forward(xs, *options, spec.W)
        spectral.backward(xs, *options, wanted, state, outputs, [True] * K)

    return launched(lambda: spectral.forward(xs, *options, wanted), backward)


def of_pytorch(contrast: str, B: int) -> Work:
    autocast = mock.patch("torch.autocast", return_value=contextlib.nullcontext())  # which knows no such device
    with torch.device("meta"), autocast:
        given, one = arguments(contrast, B), torch.ones(())
        with Operations() as counted:
            _, losses, state = reference.paired_forward(*given)
            forward = counted.kernels
            reference.paired_backward(*given, losses, state, one)
    return Work(forward, counted.kernels - forward, counted.size)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = run.parser(__doc__, quick="B = 256 alone", output="folder for launches.json").parse_args(argv)
    cells = [(contrast, B) for contrast in contrasts.NAMES for B in (BATCHES[:1] if options.quick else BATCHES)]
    rows = []
    with run.progress(len(cells)) as bar:
        for contrast, B in cells:
            found = {"PyTorch": of_pytorch(contrast, B), "fused": of_triton(contrast, B)}
            found["the rest"] = of_the_rest(contrast, B)
            rows.append({"contrast": contrast, "B": B, **{name: work._asdict() for name, work in found.items()}})
            rows[-1]["text"] = [contrast, str(B), *map(str, found.values())]
            bar.update()
    print(f"forward + backward, d = {D}, k = {K}, float32, torch {torch.__version__}")
    header = ["contrast", "B", "contrast in PyTorch", "contrast, fused", "alignment, vectors"]
    print(table(header, [row.pop("text") for row in rows]))
    if options.output:
        run.write_json(rows, options.output / "launches.json")
    return rows


if __name__ == "__main__":
    main()
