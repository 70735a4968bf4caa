"""Shapes, strides and dtypes in any mixture give what contiguous copies of one dtype give, with the same bits."""

from __future__ import annotations

import pytest
import torch

from pmrl_kernels import dominant_sv_loss, instance_contrastive_loss
from tests.tools import tolerances as tol
from tests.tools.functions import DTYPES, MIXING, PER_INSTANCE, finite, grads, leaves, negated_view


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize(
    "shape", [(0, 3, 5), (1, 3, 5), (4, 1, 5), (4, 3, 1), (4, 1, 1), (4, 5, 2), (0, 1, 1), (2, 32, 3)], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_small_and_odd_shapes(backend, device, function, shape, masked):
    B, k, d = shape
    xs = leaves([torch.randn(B, d) for _ in range(k)], device, torch.float32)
    mask = torch.ones(B, k, dtype=torch.bool, device=device) if masked else None
    out = (PER_INSTANCE | MIXING)[function](xs, mask=mask, backend=backend)
    found = grads(out.sum(), xs)
    assert finite(out, *found)
    assert all(g.shape == (B, d) for g in found)
    if function in MIXING and B == 0:
        assert out == 0
    if function in ("softmax", "leading") and (k == 1 or (d == 1 and function == "softmax")):
        assert not out.any()
        assert not any(g.any() for g in found)
    if function == "singular_values":
        assert out.shape == (B, min(d, k))
    if k == 1 and function == "u":
        torch.testing.assert_close(out, torch.nn.functional.normalize(xs[0].detach(), dim=1))


def test_mean_over_nothing_is_zero(backend, device):
    xs = leaves([torch.randn(0, 5) for _ in range(3)], device, torch.float32)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        loss = dominant_sv_loss(xs, reduction=reduction, backend=backend)
        assert loss.shape == shape
        assert not loss.any()
    u = torch.randn(0, 5, device=device, requires_grad=True)
    loss = instance_contrastive_loss(u, backend=backend)
    assert loss == 0
    assert grads(loss, [u])[0].shape == (0, 5)


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
def test_strides(backend, device, function):
    """Columns of a wider tensor, transposed storage and expanded rows give what contiguous copies give."""
    wide = torch.randn(4, 3, 14, device=device)
    views = [
        wide[:, 0, ::2],
        wide[:, 1, 7:],
        torch.randn(7, 4, device=device).T,
        torch.randn(7, device=device).expand(4, 7),
    ]
    ours = [v.detach().requires_grad_() for v in views]
    copies = [v.detach().contiguous().clone().requires_grad_() for v in views]
    one, other = ((PER_INSTANCE | MIXING)[function](x, backend=backend) for x in (ours, copies))
    assert torch.equal(one, other)
    for a, b in zip(grads(one.sum(), ours), grads(other.sum(), copies), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("kind", ["negated view", "expanded", "strided", "transposed", "zero tensor"])
def test_upstream_gradients_of_any_view(backend, device, function, kind):
    xs = leaves([torch.randn(4, 7) for _ in range(3)], device, torch.float32)
    out = (PER_INSTANCE | MIXING)[function](xs, backend=backend)
    g = torch.randn(out.shape, device=device)
    if kind == "negated view":
        view = negated_view(g)
    elif kind == "expanded":
        view = torch.full((), 0.7, device=device).expand(out.shape)
    elif kind == "strided":
        view = torch.randn(*out.shape, 2, device=device)[..., 1]
    elif kind == "transposed":
        view = torch.randn(out.shape[::-1], device=device).permute(tuple(reversed(range(out.dim()))))
    else:
        view = torch._efficientzerotensor(tuple(out.shape), device=device)
    copy = view.clone(memory_format=torch.contiguous_format) if kind != "zero tensor" else torch.zeros_like(out)
    assert not copy.is_neg()
    one, other = (torch.autograd.grad(out, xs, upstream, retain_graph=True) for upstream in (view, copy))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", ["softmax", "dominant_singular_value", "u", "leading-softmax", "modality-leading"])
def test_negated_views_as_embeddings_and_temperatures(backend, device, function):
    xs = [torch.randn(4, 7, device=device) for _ in range(3)]
    tau = torch.tensor(0.3, device=device)
    results = []
    for make in (torch.clone, negated_view):
        ours = [make(x).requires_grad_() for x in xs]
        options = {} if function in ("dominant_singular_value", "u") else {"temperature": make(tau)}
        out = (PER_INSTANCE | MIXING)[function](ours, backend=backend, **options)
        results.append([out.detach(), *grads(out.sum(), ours)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
def test_gradients_for_some_inputs_only(backend, device, function):
    xs = [torch.randn(4, 7, device=device) for _ in range(3)]
    everything = leaves(xs, device, torch.float32)
    out = (PER_INSTANCE | MIXING)[function](everything, backend=backend)
    wanted = grads(out.sum(), everything)
    for some in ([0], [2], [0, 2]):
        part = [x.clone().requires_grad_(m in some) for m, x in enumerate(xs)]
        (PER_INSTANCE | MIXING)[function](part, backend=backend).sum().backward()
        for m, x in enumerate(part):
            assert (x.grad is not None) == (m in some)
            if m in some:
                assert torch.equal(x.grad, wanted[m])


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_input_same_bits(backend, device, dtype, function):
    xs = leaves([torch.randn(33, 130) for _ in range(4)], device, dtype)
    runs = []
    for _ in range(3):
        out = (PER_INSTANCE | MIXING)[function](xs, backend=backend)
        runs.append([out.detach(), *grads(out.square().sum(), xs)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("k", [2, 3, 4, 9])
@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
def test_mixed_dtypes(backend, device, function, k, first):
    """As of the same numbers in one dtype, float64 if any is; each gradient in its input's dtype, if it is wanted.

    For k = 2 every pair, for more some of the mixtures, others for each function.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, function)) + k)
    rests = [(x,) for x in DTYPES]
    if k > 2:
        rests = [tuple(DTYPES[i] for i in torch.randint(4, (k - 1,), generator=generator)) for _ in range(4)]
    for rest in rests:
        dtypes = (first, *rest)
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        xs = [torch.randn(5, 11, generator=generator).to(device, dtype) for dtype in dtypes]
        mask = torch.rand(5, k, generator=generator) < 0.8
        mask = mask.to(device) if torch.rand((), generator=generator) < 0.5 else None
        wanted = torch.rand(k, generator=generator) < 0.7
        wanted[int(torch.randint(k, (), generator=generator))] = True
        options = {"mask": mask, "normalize": bool(torch.rand((), generator=generator) < 0.7), "backend": backend}
        results = []
        for leaves_ in ([x.clone() for x in xs], [x.to(wide, copy=True) for x in xs]):
            for x, want in zip(leaves_, wanted, strict=True):
                x.requires_grad_(bool(want))
            out = (PER_INSTANCE | MIXING)[function](leaves_, **options)
            weights = torch.linspace(0.5, 1, out.numel(), device=device).reshape(out.shape).to(out.dtype)
            results.append((out, torch.autograd.grad(out, [x for x in leaves_ if x.requires_grad], weights)))
        (out, found), (expected, exact) = results
        assert out.dtype == expected.dtype == wide
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        needed = [dtype for dtype, want in zip(dtypes, wanted, strict=True) if want]
        assert [g.dtype for g in found] == needed
        scale = max(float(g.abs().max()) for g in exact)
        for g, h, dtype in zip(found, exact, needed, strict=True):
            rounding = tol.HALF_GRADIENT.get(dtype, 0.0)
            torch.testing.assert_close(g.to(wide), h, rtol=rounding + 1e-4, atol=1e-5 * scale + tol.LEAST_HALF)
