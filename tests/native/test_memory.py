"""What is allocated and copied, and that no byte beyond a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pmrl_kernels import dominant_sv_loss, pmrl_loss
from tests.tools.native import OTHERS, modalities, run, same_bits, some_mask


class Allocations:
    """Bytes that PyTorch's CPU allocator handed out while a function ran."""

    def __init__(self, function: Callable[[], Any]) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            torch.autograd._enable_record_function(False)  # of what is no allocation
            try:
                self.result = function()
            finally:
                torch.autograd._enable_record_function(True)
        recorded, profile.profiler = profile.profiler, None  # refers to itself: a long time until somebody collects it
        events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        recorded.kineto_results = None
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.peak = max(np.cumsum([0, *sizes]))
        self.sizes = sorted(size for size in sizes if size > 0)


def forward_and_backward(xs: list[Tensor], **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        return torch.autograd.grad(dominant_sv_loss(xs, backend="native", **options), xs)

    call()  # what is allocated once in a process
    return call


@pytest.fixture
def unpoisoned() -> Iterator[None]:
    """Filling memory with NaN allocates nothing, but runs operators that a profile need not show."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


B, D, K = 1024, 1024, 4
STATE = 8 * (B + 15) * (K * K + 4 * K)  # float64: eigenvectors, eigenvalues, v₁, norms, exponents
SMALL = 64 * B * K  # outputs, and whatever else has one number per instance or modality


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "leading": {"objective": "leading"},
    "raw": {"normalize": False},
    "masked": {"mask": some_mask(B, K)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nothing_of_the_embeddings_size_is_allocated_but_gradients(dtype, options, unpoisoned):
    """Forward and backward together, at the peak."""
    xs = modalities(K, B, D, dtype)
    gradients = sum(x.nbytes for x in xs)
    found = Allocations(forward_and_backward(xs, **options))
    assert gradients <= found.peak <= gradients + STATE + SMALL
    forward = Allocations(lambda: dominant_sv_loss(xs, backend="native", **options))
    assert forward.peak <= STATE + SMALL


def test_leave_one_out_takes_no_more_than_its_directions_beyond_the_modality_contrast(unpoisoned):
    """k·B·d numbers for the w; their gradients live when those of the modality contrast's u and z do, or less."""
    xs = modalities(K, 512, 256)

    def step(contrast: str) -> Callable[[], Any]:
        def call() -> Any:
            return torch.autograd.grad(pmrl_loss(xs, contrast=contrast, temperature=1.0, backend="native"), xs)

        call()
        return call

    modality, leave_one_out = (Allocations(step(name)).peak for name in ("modality", "leave_one_out"))
    assert leave_one_out <= modality + 4 * K * 512 * 256 + SMALL


LAYOUTS: dict[str, Callable[[int], list[Tensor]]] = {
    "columns of one tensor": lambda d: list(torch.randn(B, K * d).split(d, 1)),
    "every second row": lambda d: [torch.randn(2 * B, d)[::2] for _ in range(K)],
    "columns that start anywhere": lambda d: [torch.randn(B, d + 64)[:, m : d + m] for m in range(K)],
    "one row for all": lambda d: [torch.randn(d).expand(B, d) for _ in range(K)],
    "a stack": lambda d: [torch.randn(B, K, d)],
    "a stack, modalities first": lambda d: [torch.randn(K, B, d).transpose(0, 1)],
    "a stack, expanded": lambda d: [torch.randn(B, 1, d).expand(B, K, d)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_with_contiguous_rows_are_read_in_place(layout, unpoisoned):
    d = 512
    xs = [x.requires_grad_() for x in LAYOUTS[layout](d)]
    found = Allocations(forward_and_backward(xs))
    gradients = 4 * B * K * d
    assert gradients <= found.peak <= gradients + STATE + SMALL
    copies = [x.detach().contiguous().requires_grad_() for x in xs]
    assert same_bits(found.result, forward_and_backward(copies)())


def test_a_tensor_without_contiguous_rows_is_copied_alone(unpoisoned):
    xs = [x.detach() for x in modalities(K, B, D)]
    xs[2] = xs[2].t().contiguous().t()
    xs = [x.requires_grad_() for x in xs]
    one = 4 * B * D
    found = Allocations(forward_and_backward(xs))
    assert found.peak <= 5 * one + STATE + SMALL
    # one copy for the forward pass, one for the backward pass, and four gradients
    assert [size for size in found.sizes if size >= one / 2] == [one] * 6
    copies = [x.detach().contiguous().requires_grad_() for x in xs]
    assert same_bits(found.result, forward_and_backward(copies)())


def test_gradients_that_nobody_asked_for_are_not_made(unpoisoned):
    xs = [x.detach() for x in modalities(K, B, D)]
    xs[1].requires_grad_()
    loss = dominant_sv_loss(xs, backend="native")
    found = Allocations(lambda: torch.autograd.grad(loss, xs[1]))
    assert found.peak <= 4 * B * D + SMALL


FENCED = """
import ctypes, itertools, mmap
import torch
import pmrl_kernels

OPS = torch.ops.pmrl_kernels
ALL = 1 + 8 + 16 + 32 + 64 + 128
protect = ctypes.CDLL(None).mprotect
kept = []

def fenced(x):
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    kept.append(memory)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert protect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return copy.view(x.shape).copy_(x)

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
for dtype, k, d in itertools.product(DTYPES, (1, 2, 4, 7, 9), (1, 2, 3, 5, 7, 8, 9, 15, 17, 33)):
    xs = [fenced(torch.randn(9, d).to(dtype)) for _ in range(k)]
    if k == 7:
        xs[0] = fenced(torch.randn(9, d))  # mixed
    mask, tau = fenced(torch.rand(9, k) > 0.2), fenced(torch.tensor(0.5))
    for spectrum, normalize in ((True, True), (False, False)):
        settings = xs, mask, tau, 1.0, normalize, spectrum, ALL
        outputs, state = OPS.spectral_forward(*settings)
        grads, state = [fenced(x) for x in outputs], [fenced(x) for x in state]
        OPS.spectral_backward(*settings, state, grads, [True] * k)
        OPS.spectral_backward(*settings, state, [grads[0], *(None for _ in grads[1:])], [True] * k)
print("fine")
"""


@pytest.mark.parametrize("isa", [None, *(pytest.param(isa, marks=pytest.mark.slow) for isa in OTHERS)])
def test_no_byte_beyond_a_tensor_is_read(isa):
    """Every input ends where memory that nobody may touch begins."""
    done = run("-c", FENCED, isa=isa)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
