"""NaN and Inf, in embeddings and in upstream gradients: they stay in their row, and are not swallowed."""

from __future__ import annotations

import pytest
import torch

from pmrl_kernels import dominant_singular_triplet, dominant_sv_loss, pmrl_loss, singular_values
from tests.tools.functions import MIXING, OBJECTIVES, PER_INSTANCE, finite, grads, leaves


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("function", PER_INSTANCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_bad_row_stays_in_its_row(backend, device, dtype, function, k, bad):
    """Its outputs and gradients are NaN, no other's, and nothing raises."""
    xs = [torch.randn(5, 11) for _ in range(k)]
    clean = leaves(xs, device, dtype)
    dirty = [x.clone() for x in xs]
    dirty[k // 2][2, 3] = bad
    dirty = leaves(dirty, device, dtype)
    one, other = (PER_INSTANCE[function](x, backend=backend) for x in (clean, dirty))
    assert other[2].isnan().all()
    others = torch.arange(5) != 2
    torch.testing.assert_close(other[others], one[others], rtol=1e-6, atol=1e-7)
    for g, h in zip(grads(one.sum(), clean), grads(other.sum(), dirty), strict=True):
        assert h[2].isnan().all()
        torch.testing.assert_close(h[others], g[others], rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
@pytest.mark.parametrize("function", PER_INSTANCE)
def test_bad_upstream_gradients_pass_through(backend, device, function, upstream):
    """A scaler finds its overflow by the Inf or NaN that comes back; it must stay in its row."""
    xs = leaves([torch.randn(3, 8) for _ in range(3)], device, torch.float32)
    out = PER_INSTANCE[function](xs, backend=backend)
    weights = torch.ones_like(out)
    weights[1] = upstream
    for g in torch.autograd.grad(out, xs, weights):
        assert not g[1].isfinite().any()
        assert finite(g[0], g[2])


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("normalize", [True, False])
def test_absent_modalities_get_zeros_beside_anything(backend, device, function, normalize):
    """Exactly 0, also where the instance's present modalities or the upstream gradient are NaN or Inf."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0]], device=device).bool()
    clean = [torch.randn(4, 6) for _ in range(3)]
    for bad_input, upstream in ((float("nan"), 1.0), (0.3, float("inf")), (0.3, float("nan"))):
        xs = [x.clone() for x in clean]
        xs[0][0, 2] = bad_input
        xs = leaves(xs, device, torch.float32)
        out = (PER_INSTANCE | MIXING)[function](xs, mask=mask, normalize=normalize, backend=backend)
        for m, g in enumerate(torch.autograd.grad(out, xs, torch.full_like(out, upstream))):
            assert not g[~mask[:, m]].any()
            assert torch.equal(g[~mask[:, m]], torch.zeros_like(g[~mask[:, m]]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_upstream_gradients_of_instances_with_nothing_to_align_are_ignored(backend, device, objective):
    xs = leaves([torch.randn(2, 6) for _ in range(3)], device, torch.float32)
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]], device=device).bool()
    out = dominant_sv_loss(xs, mask=mask, objective=objective, reduction="none", backend=backend)
    for g in torch.autograd.grad(out, xs, torch.tensor([1.0, float("inf")], device=device)):
        assert finite(g)
        assert not g[1].any()
    alone = leaves([torch.randn(2, 6)], device, torch.float32)
    out = dominant_sv_loss(alone, objective=objective, reduction="none", backend=backend)
    assert not torch.autograd.grad(out, alone, torch.full_like(out, float("inf")))[0].any()


def test_upstream_gradients_of_absent_entries_of_v_are_ignored(backend, device):
    """They are zeros by definition: whatever comes back for them must not reach the present modalities."""
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=device).bool()
    xs = leaves([torch.randn(2, 5) for _ in range(3)], device, torch.float32)
    found = []
    for rubbish in (0.0, 3.0, float("nan")):
        v = dominant_singular_triplet(xs, mask=mask, backend=backend).v
        upstream = torch.tensor([[0.3, rubbish, -1.0], [0.2, 0.7, rubbish]], device=device)
        found.append(torch.autograd.grad(v, xs, upstream))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class _NoGradient(torch.autograd.Function):
    """The identity, whose backward pass has nothing to say."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


@pytest.mark.parametrize("function", ["singular_values", "triplet", "none", "mean", "leading", "pmrl_loss"])
def test_no_upstream_gradient_at_all_gives_zeros(backend, device, function):
    """Autograd says "no gradient" by None, to a backward pass that has been called nevertheless."""
    call = {
        "singular_values": lambda xs: singular_values(xs, backend=backend),
        "triplet": lambda xs: dominant_singular_triplet(xs, backend=backend).u,
        "none": lambda xs: dominant_sv_loss(xs, temperature=tau, reduction="none", backend=backend),
        "mean": lambda xs: dominant_sv_loss(xs, temperature=tau, backend=backend),
        "leading": lambda xs: dominant_sv_loss(xs, objective="leading", backend=backend),
        "pmrl_loss": lambda xs: pmrl_loss(xs, temperature=tau, contrast="modality", backend=backend),
    }[function]
    tau = torch.full((), 0.3, device=device, requires_grad=True)
    xs = leaves([torch.randn(3, 5) for _ in range(3)], device, torch.float32)
    result = _NoGradient.apply(call(xs)).sum()
    for gradient in torch.autograd.grad(result, [*xs, tau], allow_unused=True):
        assert gradient is None or not gradient.any()
