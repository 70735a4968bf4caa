"""What only a GPU can show of the CUDA backend alone. What it has in common with Triton's: tests/triton/test_gpu.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pmrl_kernels import dominant_singular_triplet, dominant_sv_loss, ops, pmrl_loss, warm_up
from tests import ROOT

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if "cuda" not in ops.available:
    pytest.skip(f"no CUDA backend here: {ops.unavailable_reasons['cuda']}", allow_module_level=True)
if reason := ops.available["cuda"].rejects(torch.device("cuda"), torch.float32, 4, 64):
    pytest.skip(f"not on this GPU: {reason}", allow_module_level=True)


def modalities(B: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(B, 96, device="cuda", generator=generator).requires_grad_() for _ in range(4)]


def loss(*xs: Tensor, backend: str | None = "cuda") -> Tensor:
    sigma, u, _ = dominant_singular_triplet(*xs, backend=backend)
    return sigma.sum() + u[:, 0].sum() + pmrl_loss(*xs, contrast="leave_one_out", backend=backend)


@pytest.mark.parametrize("requested", [None, "cuda"])
def test_compile_without_graph_breaks(requested):
    """With batches of any size, by a backend that nobody has named, too."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *xs: loss(*xs, backend=requested), fullgraph=True, dynamic=True)
    for B in (64, 80):
        xs = modalities(B)
        found, expected = compiled(*xs), loss(*xs)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, xs), torch.autograd.grad(expected, xs))


def test_a_first_call_while_a_graph_is_captured():
    """In a process of its own: here the kernels have run."""
    code = """
import torch
from pmrl_kernels import dominant_sv_loss, warm_up
xs = [torch.randn(64, 16, device="cuda") for _ in range(3)]
def capture():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        dominant_sv_loss(*xs, backend="cuda")
try:
    capture()
except RuntimeError as error:
    print(str(error).splitlines()[0])
torch.cuda.synchronize()
warm_up(lambda *xs: dominant_sv_loss(*xs, backend="cuda"), *xs)
capture()
print("captured")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    told, captured = done.stdout.splitlines()
    assert "total is not loaded yet, and cannot be while a CUDA graph is captured" in told
    assert captured == "captured", done.stderr


def test_large_batches_come_in_rounds_whatever_came_before():
    """From 24 instances for each of four blocks of a multiprocessor on; captured after a small batch alone has run."""
    B = 25 * 4 * torch.cuda.get_device_properties(0).multi_processor_count + 3
    small, large = modalities(8), modalities(B)
    step = lambda xs: torch.autograd.grad(dominant_sv_loss(xs, backend="cuda"), xs)  # noqa: E731
    warm_up(lambda *xs: dominant_sv_loss(xs, backend="cuda"), *small)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(large)
    graph.replay()
    found = step(large)
    assert all(map(torch.equal, captured, found))
    assert all(map(torch.equal, found, step(large)))
    expected = torch.autograd.grad(dominant_sv_loss(large, backend="reference"), large)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 * y.abs().max().item())


def test_operators_refuse_tensors_of_several_devices():
    """Those who call them directly: a kernel would read the host's memory."""
    xs = [x.detach() for x in modalities(8)[:2]]
    forward = torch.ops.pmrl_kernels.spectral_forward
    mask, tau = torch.ones(8, 2, dtype=torch.bool), torch.tensor(0.5)
    for call in (([xs[0], xs[1].cpu()], None, None), (xs, mask, None), (xs, None, tau)):
        with pytest.raises(RuntimeError, match="all tensors must be on one device"):
            forward(*call, 0.5, True, True, 1)
