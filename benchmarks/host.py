"""What the Python path of the Triton backend costs up to the launch, on a machine without a GPU.

    python benchmarks/host.py

A call goes through everything that it goes through on a GPU, arguments, autograd, allocations and the choice of
kernels, except that the compiled kernel at its end does nothing. Beside it F.mse_loss on the same tensors, whose time
on the CPU contains its arithmetic, and the native backend, whose does too.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # so that the backend takes tensors on a CPU; nothing is interpreted

import torch
from bench import number, table
from torch import Tensor
from torch.nn.functional import mse_loss

from pmrl_kernels import dominant_singular_triplet, dominant_sv_loss, ops
from pmrl_kernels.ops.triton import launch

launches = 0


class Nothing:
    """A compiled kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run

    def run(self, *arguments: Any, stream: int) -> None:
        global launches
        launches += 1


def without_a_gpu() -> None:
    launch.INTERPRETED = False
    launch.compile_for = lambda *_: Nothing()
    launch.triton.runtime.driver = _Driver
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch._C._cuda_getCurrentRawStream = lambda index: 0


class _Driver:
    class active:  # noqa: N801
        get_current_target = staticmethod(lambda: None)


def loss(backend: str) -> Callable[[Sequence[Tensor]], Any]:
    return lambda xs: torch.autograd.grad(dominant_sv_loss(*xs, backend=backend), xs)


def triplet(xs: Sequence[Tensor]) -> Any:
    sigma, u, _ = dominant_singular_triplet(*xs, backend="triton")
    return torch.autograd.grad((sigma, u), xs, (torch.ones_like(sigma), torch.ones_like(u)))


CALLS = {
    "alignment, triton": loss("triton"),
    "the same, forward alone": lambda xs: dominant_sv_loss(*[x.detach() for x in xs], backend="triton"),
    "triplet, triton": triplet,
    **({"alignment, native": loss("native")} if "native" in ops.available else {}),
    "F.mse_loss": lambda xs: torch.autograd.grad(mse_loss(xs[0], xs[1]), xs[:2]),
}


def main() -> None:
    without_a_gpu()
    rows = []
    xs = [torch.randn(8, 16, requires_grad=True) for _ in range(4)]
    samples: dict[str, list[float]] = {name: [] for name in CALLS}
    counts = {}
    for name, call in CALLS.items():
        call(xs)
        before = launches
        call(xs)
        counts[name] = launches - before
    for _ in range(15):
        for name, call in CALLS.items():
            start = time.perf_counter()
            for _ in range(200):
                call(xs)
            samples[name].append((time.perf_counter() - start) / 200 * 1e6)
    for name, times in samples.items():
        rows.append([name, number(statistics.median(times)), number(min(times)), str(counts[name])])
    print(f"forward + backward of 4 x (8, 16), torch {torch.__version__}, one process, µs a call\n")
    print(table(["", "median", "least", "launches"], rows))


if __name__ == "__main__":
    main()
