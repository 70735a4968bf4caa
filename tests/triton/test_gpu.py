"""What only a GPU can show: capture, streams, determinism, memory, no synchronisation. Needs one, and Triton.

The numerical contract runs on every device by itself (tests/contract). `make gpu-check` runs both, and the benchmark.
What of it a CPU can run, in Triton's interpreter or compiled (ptx.py), is rehearsed there at toy sizes, so that no hour
on a GPU is lost to a typing error.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    instance_contrastive_loss,
    joint_scores,
    ops,
    pmrl_loss,
    singular_values,
)

if "triton" not in ops.available:
    pytest.skip("needs Triton, and a GPU or an interpreter", allow_module_level=True)

from pmrl_kernels.ops.spectral import SPECTRAL
from pmrl_kernels.ops.spectral.triton import launch
from pmrl_kernels.ops.triton import record, runtime

if not torch.cuda.is_available() and ops.available["triton"].rejects(torch.device("cpu"), torch.float32, 3, 64):
    pytest.skip("needs a GPU or an interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOY = DEVICE == "cpu" and os.environ.get("PMRL_KERNELS_TESTS") != "whole"  # as tests/tools/ahead.py has them
BOTH = (3, 10) if TOY else (64, 9000)  # a batch for each layout
needs_a_gpu = pytest.mark.skipif(TOY, reason="streams, capture, synchronisation and memory are a GPU's")


def _of_rows(options: dict[str, Any]) -> dict[str, Any]:
    """Options of embeddings as those of the rows of one of them."""
    mask = options.get("mask")
    return options if mask is None else options | {"mask": mask[:, 0]}


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda xs, **o: dominant_sv_loss(xs, **o),
    "leading": lambda xs, **o: dominant_sv_loss(xs, objective="leading", **o),
    "singular_values": lambda xs, **o: singular_values(xs, **o).square().sum(),
    "dominant_singular_value": lambda xs, **o: dominant_singular_value(xs, **o).sum(),
    "triplet": lambda xs, **o: sum(part.sum() for part in dominant_singular_triplet(xs, **o)),
    "pmrl": lambda xs, **o: pmrl_loss(xs, **o),
    "pmrl-modality": lambda xs, **o: pmrl_loss(xs, contrast="modality", temperature=1.0, **o),
    "pmrl-leave_one_out": lambda xs, **o: pmrl_loss(xs, contrast="leave_one_out", temperature=1.0, **o),
    "contrast": lambda xs, **o: instance_contrastive_loss(xs[0], **_of_rows(o)) + 0 * sum(x.sum() for x in xs[1:]),
}
BACKENDS = [
    name
    for name in ("cuda", "triton")
    if name in ops.available and ops.available[name].rejects(torch.device(DEVICE), torch.float32, 3, 64) is None
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_function = pytest.mark.parametrize("function", FUNCTIONS)
each_layout = pytest.mark.parametrize("B", BOTH)


@pytest.fixture(autouse=True)
def both_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    if TOY:
        monkeypatch.setattr(launch, "LATENCY_BATCH", 4)
        monkeypatch.setattr(launch, "SPREAD_BATCH", 8)
        monkeypatch.setattr(launch, "BATCH", 4)
        monkeypatch.setattr(launch, "SHARE", 8)  # so that k > 8 takes several programs


def modalities(
    B: int, d: int = 12 if TOY else 96, k: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    draw = [torch.randn(B, d, device=DEVICE, generator=generator) for _ in range(k + 1)]
    return [(x + draw[k]).to(dtype).requires_grad_() for x in draw[:k]]


def step(backend: str, function: str, xs: list[Tensor], **options: object) -> list[Tensor]:
    loss = FUNCTIONS[function](xs, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss, xs)]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@each_backend
@needs_a_gpu
@each_function
@each_layout
@pytest.mark.parametrize("masked", [False, True])
def test_the_host_never_waits(backend, function, B, masked, no_synchronisation):
    mask = torch.ones(B, 4, dtype=torch.bool, device=DEVICE) if masked else None
    step(backend, function, modalities(B), mask=mask)


@each_backend
@needs_a_gpu
@each_layout
def test_a_learned_temperature_is_never_read(backend, B, no_synchronisation):
    tau = torch.full((), 0.05, device=DEVICE, requires_grad=True)
    tau2 = torch.full((), 0.1, device=DEVICE, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = dominant_sv_loss(modalities(B), temperature=tau, reduction=reduction, backend=backend).sum()
        torch.autograd.grad(loss, tau)
    for contrast in ("leading", "modality", "leave_one_out"):
        options = {"temperature": tau, "instance_temperature": tau2, "contrast": contrast}
        torch.autograd.grad(pmrl_loss(modalities(B), backend=backend, **options), (tau, tau2))


@each_backend
@each_layout
@pytest.mark.parametrize("contrast", ["leading", "modality", "leave_one_out"])
def test_learned_temperatures_agree_with_the_reference(backend, contrast, B):
    found = []
    for name in (backend, "reference"):
        xs = modalities(B, k=3, dtype=torch.float64)
        tau, tau2 = (torch.full((), x, dtype=torch.float64, device=DEVICE, requires_grad=True) for x in (0.3, 0.2))
        options = {"temperature": tau, "instance_temperature": tau2, "contrast": contrast, "backend": name}
        components = pmrl_loss(xs, return_components=True, **options)
        found.append([*components, *torch.autograd.grad(components.total, (tau, tau2, *xs))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@each_backend
@each_function
@each_layout
@pytest.mark.parametrize("k", [3, 12] if TOY else [2, 3, 6, 8, 12, 32])
def test_agrees_with_the_reference(backend, function, B, k):
    if reason := ops.available[backend].rejects(torch.device(DEVICE), torch.float64, k, 96):
        pytest.skip(reason)
    xs = modalities(B, k=k, dtype=torch.float64)
    loss = FUNCTIONS[function](xs, backend="reference")
    for ours, theirs in zip(step(backend, function, xs), [loss.detach(), *torch.autograd.grad(loss, xs)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@each_function
def test_layouts_and_sums_agree(function, monkeypatch):
    results = []
    for sums in ("float64", "float32"):
        monkeypatch.setattr(runtime, "SUMS", sums)
        for small, medium in ((0, 0), (0, 1 << 30), (1 << 30, 1 << 30)):
            monkeypatch.setattr(launch, "LATENCY_BATCH", small)
            monkeypatch.setattr(launch, "SPREAD_BATCH", medium)
            results.append(step("triton", function, modalities(9 if TOY else 777)))
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


# How a batch is launched: LATENCY_BATCH and SPREAD_BATCH of Triton's, and how it sums.
FORMS = {
    "latency": (1 << 30, 1 << 30, "float64"),
    "throughput": (0, 0, "float64"),
    "spread": (0, 1 << 30, "float64"),
    "pairs": (0, 0, "float32"),
}
ODD = [
    (backend, form, function, k)
    for backend, forms, sizes in (("cuda", ("blocks", "rounds"), (3, 4, 5, 8)), ("triton", FORMS, (3, 4, 8, 12)))
    for form, k in itertools.product(forms, sizes)
    for function in ("softmax", "triplet", "pmrl-leave_one_out", "pmrl-modality")
    if backend in BACKENDS
    if not (k == 12 and form != "latency")  # which larger batches of it have, too
    if not (form == "rounds" and (k not in (4, 5) or function != "softmax"))
    if not (function == "pmrl-modality" and (k, form) not in ((3, "latency"), (3, "blocks")))
    if not (TOY and (k, form) != (3, "latency"))  # what a CPU interprets, the contract goes through
]


@pytest.mark.parametrize(("backend", "form", "function", "k"), ODD)
def test_odd_sizes_agree_with_a_cpu(backend, form, function, k, monkeypatch):
    """Nothing but what is tested runs on the device: compute-sanitizer has these to look at."""
    if backend == "triton":
        for name, value in zip(("LATENCY_BATCH", "SPREAD_BATCH"), FORMS[form][:2], strict=True):
            monkeypatch.setattr(launch, name, value)
        monkeypatch.setattr(runtime, "SUMS", FORMS[form][2])
    # Rounds are for blocks that have two at least; the modalities' contrast has several tiles.
    B = 7 if TOY else 13331 if form == "rounds" else 300 if function == "pmrl-modality" else 67
    d = 40 if k == 4 else 37
    generator = torch.Generator().manual_seed(0)
    there = [torch.randn(B, d, generator=generator).requires_grad_() for _ in range(k)]
    mask = torch.ones(B, k, dtype=torch.bool)
    mask[1, 0] = mask[5, 1] = False
    loss = FUNCTIONS[function](there, backend="reference", mask=mask)
    expected = [loss.detach(), *torch.autograd.grad(loss, there)]
    here = [x.detach().to(DEVICE).requires_grad_() for x in there]
    for ours, theirs in zip(step(backend, function, here, mask=mask.to(DEVICE)), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("score", ["volume", "gain"])
def test_joint_scores_of_odd_sizes_agree_with_a_cpu(score):
    rows, columns, d = (5, 7, 12) if TOY else (67, 130, 37)
    generator = torch.Generator().manual_seed(0)
    query, *candidates = (torch.randn(n, d, generator=generator) for n in (rows, *3 * [columns]))
    expected = joint_scores(query, *candidates, score=score, backend="reference")
    found = joint_scores(query.to(DEVICE), *(x.to(DEVICE) for x in candidates), score=score, backend="triton")
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=2e-6)


@each_backend
@each_layout
@pytest.mark.parametrize("stacked", [False, True])
def test_whatever_a_launch_takes(backend, stacked, B):
    """A mask, a temperature on the device, inputs and outputs without gradient: pointers, and None in their place."""
    found = []
    for name in ("reference", backend):
        xs = modalities(B, k=3, dtype=torch.float64)
        sources = [torch.stack(xs, 1).detach().requires_grad_()] if stacked else xs
        sources[0].requires_grad_(stacked)
        tau = torch.full((), 0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)
        mask = torch.ones(B, 3, dtype=torch.bool, device=DEVICE)
        mask[1, 0] = mask[2, 1] = False
        given = sources[0] if stacked else sources
        reduction = "none" if stacked else "mean"
        losses = dominant_sv_loss(given, temperature=tau, mask=mask, reduction=reduction, backend=name)
        sigma, u, v = dominant_singular_triplet(given, backend=name)
        wanted = [x for x in sources if x.requires_grad]
        found.append([losses.detach(), sigma.detach(), v.detach(), u.detach()])
        found[-1] += torch.autograd.grad(losses.square().sum(), [tau, *wanted])
        found[-1] += torch.autograd.grad(sigma.sum() + u[0].sum(), wanted)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@each_backend
@each_layout
@pytest.mark.parametrize(("dtype", "widths"), [(torch.float64, (64, 100)), (torch.float32, (128, 256, 100))])
def test_one_width_after_another(backend, dtype, widths, B):
    """What was compiled for one width is not run for another one, if it depends on it."""
    for function, d in itertools.product(("triplet", "singular_values"), widths):
        xs = modalities(B, d, k=3, dtype=dtype)
        loss = FUNCTIONS[function](xs, backend="reference")
        for ours, theirs in zip(
            step(backend, function, xs), [loss.detach(), *torch.autograd.grad(loss, xs)], strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@each_backend
@each_function
@each_layout
def test_the_same_bits_every_time(backend, function, B):
    xs = modalities(B)
    first = step(backend, function, xs)
    for _ in range(2 if TOY else 20):
        torch.randn(1 << 20, device=DEVICE).sort()  # something else to schedule around
        assert all(torch.equal(one, other) for one, other in zip(first, step(backend, function, xs), strict=True))


@each_backend
@needs_a_gpu
@each_function
@each_layout
def test_cuda_graph(backend, function, B):
    """Captured once, replayed on other numbers."""
    xs = modalities(B)
    step(backend, function, xs)  # compiles
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(backend, function, xs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(backend, function, xs)
    for seed in (1, 2):
        others = modalities(B, seed=seed)
        with torch.no_grad():
            for x, other in zip(xs, others, strict=True):
                x.copy_(other)
        graph.replay()
        assert all(
            torch.equal(one, other) for one, other in zip(captured, step(backend, function, others), strict=True)
        )


@each_backend
@needs_a_gpu
@each_layout
def test_streams_do_not_disturb_one_another(backend, B):
    batches = [modalities(B, seed=seed) for seed in range(8)]
    alone = [step(backend, "softmax", xs) for xs in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    for _ in range(10):
        together = []
        for xs, stream in zip(batches, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(step(backend, "softmax", xs))
        torch.cuda.synchronize()
        for ours, theirs in zip(together, alone, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@each_backend
@each_function
@each_layout
def test_compile_without_graph_breaks(backend, function, B):
    torch.compiler.reset()
    xs = modalities(B)
    compiled = torch.compile(lambda *tensors: FUNCTIONS[function](list(tensors), backend=backend), fullgraph=True)
    loss = compiled(*xs)
    for one, other in zip([loss.detach(), *torch.autograd.grad(loss, xs)], step(backend, function, xs), strict=True):
        torch.testing.assert_close(one, other)


@each_backend
@needs_a_gpu
@each_layout
def test_memory_is_that_of_the_gradients(backend, B):
    d, k = 1024, 4
    xs = modalities(B, d, k)
    step(backend, "softmax", xs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # What was asked for: of large blocks that it keeps, the allocator lends up to a megabyte more.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    grads = step(backend, "softmax", xs)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    state = 8 * record.state_size(B, record.layout(k, True, True, True, False))
    assert peak <= sum(g.numel() * g.element_size() for g in grads) + state + (1 << 16)


@each_backend
@needs_a_gpu
def test_offsets_beyond_32_bits(backend):
    """The last instance of a batch of more than 2^31 elements."""
    B, d = (1 << 31) // 64 + 3, 64
    x = torch.zeros(B, d, dtype=torch.bfloat16, device=DEVICE)
    y = torch.zeros(B, d, dtype=torch.bfloat16, device=DEVICE)
    x[-1, :2] = torch.tensor([3.0, 4.0])
    y[-1, :2] = torch.tensor([4.0, 3.0])
    x.requires_grad_()
    sigma = dominant_singular_value(x, y, backend=backend)
    (gradient,) = torch.autograd.grad(sigma.sum(), x)
    assert sigma[-1].item() == pytest.approx(1.96**0.5, rel=1e-6)
    assert sigma[:-1].abs().max().item() == 0
    expected = torch.autograd.grad(dominant_singular_value(x[-1:], y[-1:], backend="reference").sum(), x)[0][-1]
    torch.testing.assert_close(gradient[-1], expected)


@needs_a_gpu
def test_the_reference_takes_any_batch():
    xs = modalities((1 << 16) + 3, d=8)
    found = dominant_singular_value(xs, backend="reference")
    torch.testing.assert_close(found, dominant_singular_value(xs, backend=BACKENDS[0]))


@pytest.mark.parametrize("function", ["softmax", "triplet", "others"])
def test_opcheck(function):
    """Schema, fakes and dispatch of both operators. Not all of a state is written: what is asked for decides."""
    from pmrl_kernels.ops.spectral import spec, triton

    wanted = {
        "softmax": spec.ALIGNMENT_MEAN,
        "triplet": spec.SIGMA | spec.U | spec.V,
        "others": spec.ALIGNMENT_MEAN | spec.Z | spec.W,
    }[function]
    xs = [x.detach() for x in modalities(16)]
    options = (None, None, 0.05, True, function == "softmax", wanted)
    forward = triton.forward_operator
    torch.library.opcheck(forward, (xs, *options), test_utils=("test_schema", "test_faketensor"))
    outputs, state = forward(xs, *options)
    arguments = (xs, *options, state, [torch.ones_like(x) for x in outputs], [True] * 4)
    torch.library.opcheck(triton.backward_operator, arguments)


def test_the_fastest_is_chosen():
    pair = ops.resolve(SPECTRAL, None, torch.device(DEVICE, 0), torch.float32, 4, 512)
    assert TOY or pair.backend == BACKENDS[0]
    xs = modalities(32)
    torch.testing.assert_close(pmrl_loss(xs, backend=BACKENDS[0]), pmrl_loss(xs, backend="reference"))
