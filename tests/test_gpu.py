"""What only a GPU can show: capture, streams, determinism, memory, no synchronisation. Needs one, and Triton.

The numerical contract runs on every device by itself (test_contract.py). `make gpu-check` runs both, and the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pmrl_kernels import (
    backends,
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    pmrl_loss,
    singular_values,
)

if not torch.cuda.is_available() or "triton" not in backends.available:
    pytest.skip("needs a GPU and Triton", allow_module_level=True)

from pmrl_kernels.backends.triton import launch

BOTH = (64, 4096)  # a batch for each layout

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda xs, **o: dominant_sv_loss(xs, **o),
    "leading": lambda xs, **o: dominant_sv_loss(xs, objective="leading", **o),
    "singular_values": lambda xs, **o: singular_values(xs, **o).square().sum(),
    "dominant_singular_value": lambda xs, **o: dominant_singular_value(xs, **o).sum(),
    "triplet": lambda xs, **o: sum(part.sum() for part in dominant_singular_triplet(xs, **o)),
}
each_function = pytest.mark.parametrize("function", FUNCTIONS)
each_layout = pytest.mark.parametrize("B", BOTH)


def modalities(B: int, d: int = 96, k: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = [torch.randn(B, d, device="cuda", generator=generator) for _ in range(k + 1)]
    return [(x + draw[k]).to(dtype).requires_grad_() for x in draw[:k]]


def step(function: str, xs: list[Tensor], **options: object) -> list[Tensor]:
    loss = FUNCTIONS[function](xs, backend="triton", **options)
    return [loss.detach(), *torch.autograd.grad(loss, xs)]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@each_function
@each_layout
@pytest.mark.parametrize("masked", [False, True])
def test_the_host_never_waits(function, B, masked, no_synchronisation):
    mask = torch.ones(B, 4, dtype=torch.bool, device="cuda") if masked else None
    step(function, modalities(B), mask=mask)


@each_layout
def test_a_learned_temperature_is_never_read(B, no_synchronisation):
    tau = torch.full((), 0.05, device="cuda", requires_grad=True)
    for reduction in ("mean", "none"):
        loss = dominant_sv_loss(modalities(B), temperature=tau, reduction=reduction, backend="triton").sum()
        torch.autograd.grad(loss, tau)


@each_function
@each_layout
@pytest.mark.parametrize("k", [2, 3, 6, 8, 12, 32])
def test_agrees_with_the_reference(function, B, k):
    xs = modalities(B, k=k, dtype=torch.float64)
    loss = FUNCTIONS[function](xs, backend="reference")
    for ours, theirs in zip(step(function, xs), [loss.detach(), *torch.autograd.grad(loss, xs)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@each_function
def test_layouts_agree(function, monkeypatch):
    results = []
    for limit in (0, 1 << 30):
        monkeypatch.setattr(launch, "LATENCY_BATCH", limit)
        results.append(step(function, modalities(777)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@each_function
@each_layout
def test_the_same_bits_every_time(function, B):
    xs = modalities(B)
    first = step(function, xs)
    for _ in range(20):
        torch.randn(1 << 20, device="cuda").sort()  # something else to schedule around
        assert all(torch.equal(one, other) for one, other in zip(first, step(function, xs), strict=True))


@each_function
@each_layout
def test_cuda_graph(function, B):
    """Captured once, replayed on other numbers."""
    xs = modalities(B)
    step(function, xs)  # compiles
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(function, xs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(function, xs)
    for seed in (1, 2):
        others = modalities(B, seed=seed)
        with torch.no_grad():
            for x, other in zip(xs, others, strict=True):
                x.copy_(other)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, step(function, others), strict=True))


@each_layout
def test_streams_do_not_disturb_one_another(B):
    batches = [modalities(B, seed=seed) for seed in range(8)]
    alone = [step("softmax", xs) for xs in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    for _ in range(10):
        together = []
        for xs, stream in zip(batches, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(step("softmax", xs))
        torch.cuda.synchronize()
        for ours, theirs in zip(together, alone, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@each_function
@each_layout
def test_compile_without_graph_breaks(function, B):
    xs = modalities(B)
    compiled = torch.compile(lambda *tensors: FUNCTIONS[function](list(tensors), backend="triton"), fullgraph=True)
    loss = compiled(*xs)
    for one, other in zip([loss.detach(), *torch.autograd.grad(loss, xs)], step(function, xs), strict=True):
        torch.testing.assert_close(one, other)


@each_layout
def test_memory_is_that_of_the_gradients(B):
    d, k = 1024, 4
    xs = modalities(B, d, k)
    step("softmax", xs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = step("softmax", xs)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= sum(g.numel() * g.element_size() for g in grads) + 8 * launch.state_size(B, k) + (1 << 16)


def test_offsets_beyond_32_bits():
    """The last instance of a batch of more than 2^31 elements."""
    B, d = (1 << 31) // 64 + 3, 64
    x = torch.zeros(B, d, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(B, d, dtype=torch.bfloat16, device="cuda")
    x[-1, :2] = torch.tensor([3.0, 4.0])
    y[-1, :2] = torch.tensor([4.0, 3.0])
    x.requires_grad_()
    sigma = dominant_singular_value(x, y, backend="triton")
    (gradient,) = torch.autograd.grad(sigma.sum(), x)
    assert sigma[-1].item() == pytest.approx(1.96**0.5, rel=1e-6)
    assert sigma[:-1].abs().max().item() == 0
    expected = torch.autograd.grad(dominant_singular_value(x[-1:], y[-1:], backend="reference").sum(), x)[0][-1]
    torch.testing.assert_close(gradient[-1], expected)


@pytest.mark.parametrize("function", ["softmax", "triplet"])
def test_opcheck(function):
    """Schema, fakes and dispatch of both operators."""
    from pmrl_kernels.backends import constants

    wanted = constants.ALIGNMENT_MEAN if function == "softmax" else constants.SIGMA | constants.U | constants.V
    xs = [x.detach() for x in modalities(16)]
    options = (None, None, 0.05, True, function == "softmax", wanted)
    operators = backends.available["triton"].operators
    torch.library.opcheck(operators.spectral_forward, (xs, *options))
    outputs, state = operators.spectral_forward(xs, *options)
    arguments = (xs, *options, state, [torch.ones_like(x) for x in outputs], [True] * 4)
    torch.library.opcheck(operators.spectral_backward, arguments)


def test_the_fastest_is_chosen():
    assert backends.resolve(None, torch.device("cuda", 0), torch.float32, 4, 512) == "triton"
    xs = modalities(32)
    torch.testing.assert_close(pmrl_loss(xs), pmrl_loss(xs, backend="reference"))
