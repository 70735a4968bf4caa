"""What holds for every input, searched by hypothesis: bounds, invariances, and the meaning of a mask."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    instance_contrastive_loss,
    pmrl_loss,
    singular_values,
)
from tests.conftest import CPU_BACKENDS
from tests.tools import tolerances as tol
from tests.tools.functions import EVERY_CONTRAST

# PMRL_TESTS_EXAMPLES=5000 searches for longer, elsewhere each time.
EXAMPLES = int(os.environ.get("PMRL_TESTS_EXAMPLES", 60))
# Fixtures that only set global switches are safe to share between examples.
lenient = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=EXAMPLES == 60,
)
BACKENDS = pytest.mark.parametrize("backend", CPU_BACKENDS)


@st.composite
def batches(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> list[Tensor]:
    """k tensors (B, d) between independent and equal, some rows repeated, negated or zero."""
    B, k, d = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    agreement = draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    shared = torch.randn(B, d, generator=generator, dtype=torch.float64)
    xs = []
    for _ in range(k):
        own = torch.randn(B, d, generator=generator, dtype=torch.float64)
        x = agreement * shared + (1 - agreement) * own
        kind = draw(st.sampled_from(["plain", "plain", "plain", "zero", "negated", "first again"]))
        x = {"plain": x, "zero": 0 * x, "negated": -x, "first again": xs[0].double() if xs else x}[kind]
        xs.append(x * 10.0 ** draw(st.integers(-12, 12)))
    dtype = draw(st.sampled_from(dtypes))
    return [x.to(dtype).requires_grad_() for x in xs]


@st.composite
def masked_batches(draw: st.DrawFn) -> tuple[list[Tensor], Tensor]:
    xs = draw(batches())
    rows = st.lists(st.booleans(), min_size=len(xs), max_size=len(xs))
    return xs, torch.tensor(draw(st.lists(rows, min_size=len(xs[0]), max_size=len(xs[0]))))


def eps(xs: list[Tensor]) -> float:
    return tol.EPS64**0.5 if xs[0].dtype == torch.float64 else tol.EPS32


def gradients(out: Tensor, xs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, xs))


@BACKENDS
@lenient
@given(xs=batches())
def test_bounds(backend, xs):
    """0 <= softmax <= log k', 0 <= leading <= √k − 1, ‖σ‖² = number of nonzero columns, σ descending."""
    k, d = len(xs), xs[0].shape[1]
    sigma = singular_values(xs, backend=backend).detach().double()
    nonzero = torch.stack([(x != 0).any(1) for x in xs]).sum(0)
    assert (sigma.diff(dim=1) <= 0).all()
    torch.testing.assert_close(sigma.square().sum(1), nonzero.double(), rtol=1e-5, atol=0)
    softmax = dominant_sv_loss(xs, temperature=0.3, reduction="none", backend=backend)
    assert (softmax >= 0).all()
    assert (softmax <= math.log(min(k, d)) + 1e-6).all()
    leading = dominant_sv_loss(xs, objective="leading", reduction="none", backend=backend)
    assert (leading >= 0).all()
    assert (leading <= max(math.sqrt(k) - 1, 0) + 1e-6).all()


@BACKENDS
@lenient
@given(xs=batches())
def test_the_triplet_is_one(backend, xs):
    """Z v = σ u, ‖u‖ = ‖v‖ = 1, the entries of v have no negative sum, and σ is the largest."""
    sigma, u, v = (x.detach().double() for x in dominant_singular_triplet(xs, backend=backend))
    Z = torch.stack([x.detach().double() for x in xs], 2)
    norms = torch.linalg.vector_norm(Z, dim=1, keepdim=True)
    Z = torch.where(norms == 0, 0.0, Z / norms)
    torch.testing.assert_close((Z @ v[:, :, None])[:, :, 0], sigma[:, None] * u, rtol=0, atol=1e-5)
    here = sigma > 0
    torch.testing.assert_close(torch.linalg.vector_norm(u, dim=1), here.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(v, dim=1), here.double(), rtol=1e-6, atol=0)
    assert (v.sum(1) >= -1e-6).all()
    torch.testing.assert_close(dominant_singular_value(xs, backend=backend).double(), sigma)
    torch.testing.assert_close(singular_values(xs, backend=backend)[:, 0].double(), sigma, rtol=4 * eps(xs), atol=0)


@BACKENDS
@lenient
@given(xs=batches(), objective=st.sampled_from(["softmax", "leading"]))
def test_gradients_are_finite_and_tangent(backend, xs, objective):
    """A normalised embedding's gradient is orthogonal to it, and 0 where it is 0."""
    loss = dominant_sv_loss(xs, temperature=0.3, objective=objective, reduction="sum", backend=backend)
    for x, g in zip(xs, gradients(loss, xs), strict=True):
        assert g.isfinite().all()
        x, g = x.detach().double(), g.double()
        assert not g[(x == 0).all(1)].any()
        sizes = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(g, dim=1)
        assert ((x * g).sum(1).abs() <= 1e-5 * sizes + 1e-12).all()


@BACKENDS
@lenient
@given(xs=batches(), data=st.data())
def test_order_of_modalities_does_not_matter(backend, xs, data):
    """Not for values, and gradients and v are permuted along."""
    order = data.draw(st.permutations(range(len(xs))))
    shuffled = [xs[m] for m in order]
    for contrast in EVERY_CONTRAST:
        one = pmrl_loss(xs, temperature=0.5, contrast=contrast, backend=backend)
        other = pmrl_loss(shuffled, temperature=0.5, contrast=contrast, backend=backend)
        if not ties_in_orientation(xs):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    one = dominant_sv_loss(xs, temperature=0.5, reduction="none", backend=backend)
    other = dominant_sv_loss(shuffled, temperature=0.5, reduction="none", backend=backend)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def ties_in_orientation(xs: list[Tensor]) -> bool:
    """Whether some instance's u₁ is not determined by its modalities as a set: Σ v₁ = 0, as in antipodal pairs."""
    v = dominant_singular_triplet(xs).v.detach().double()
    return bool(((v.sum(1).abs() < 1e-3) & v.any(1)).any())


@BACKENDS
@lenient
@given(xs=batches((torch.float64,)), seed=st.integers(0, 2**31))
def test_rotating_and_scaling_embeddings_changes_nothing(backend, xs, seed):
    """The loss sees angles only."""
    d = xs[0].shape[1]
    Q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    turned = [(3.0 * x.detach() @ Q).requires_grad_() for x in xs]
    for objective in ("softmax", "leading"):
        options = {"temperature": 0.5, "objective": objective, "reduction": "none", "backend": backend}
        one, other = dominant_sv_loss(xs, **options), dominant_sv_loss(turned, **options)
        # σ is good to √eps64 where it is 0
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)


@BACKENDS
@lenient
@given(batch=masked_batches(), rubbish=st.sampled_from([0.0, 1e6, math.nan, math.inf]))
def test_a_mask_means_the_modality_is_not_there(backend, batch, rubbish):
    """Each instance's loss is that of its present modalities alone, whatever the absent buffers hold."""
    xs, mask = batch
    held = [x.detach().masked_fill(~mask[:, m, None], rubbish).requires_grad_() for m, x in enumerate(xs)]
    for objective in ("softmax", "leading"):
        options = {"temperature": 0.3, "objective": objective, "reduction": "none", "backend": backend}
        loss = dominant_sv_loss(held, mask=mask, **options)
        found = gradients(loss.sum(), held)
        for i in range(len(mask)):
            here = [m for m in range(len(xs)) if mask[i, m]]
            if not here:
                assert loss[i] == 0
                continue
            alone = [xs[m][i : i + 1].detach().requires_grad_() for m in here]
            part = dominant_sv_loss(alone, **options)
            torch.testing.assert_close(loss[i], part[0], rtol=1e-6, atol=1e-7)
            for m, g in zip(here, gradients(part.sum(), alone), strict=True):
                scale = float(g.abs().max())
                # a gradient grows as 1/‖x‖, and so does what rounding leaves of one that is 0
                noise = 1e-12 / min(1.0, float(torch.linalg.vector_norm(xs[m][i].detach())) or 1.0)
                torch.testing.assert_close(found[m][i], g[0], rtol=1e-4, atol=1e-4 * scale + noise)
        for m, g in enumerate(found):
            assert not g[~mask[:, m]].any()


@BACKENDS
@lenient
@given(batch=masked_batches(), contrast=st.sampled_from(EVERY_CONTRAST))
def test_pmrl_is_finite_and_its_parts_add_up(backend, batch, contrast):
    xs, mask = batch
    total, alignment, instance = pmrl_loss(
        xs, mask=mask, instance_weight=0.5, contrast=contrast, return_components=True, backend=backend
    )
    assert total.isfinite()
    assert instance >= 0
    torch.testing.assert_close(total, alignment + 0.5 * instance)
    torch.testing.assert_close(alignment, dominant_sv_loss(xs, mask=mask, backend=backend))
    for m, g in enumerate(gradients(total, xs)):
        assert g.isfinite().all()
        assert not g[~mask[:, m]].any()


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "softmax": lambda xs, **o: (dominant_sv_loss(xs, reduction="none", **o),),
    "leading": lambda xs, **o: (dominant_sv_loss(xs, objective="leading", **o),),
    "values": lambda xs, **o: (singular_values(xs, **o),),
    "triplet": lambda xs, **o: dominant_singular_triplet(xs, **o),
    "pmrl": lambda xs, **o: pmrl_loss(xs, return_components=True, **o),
    "pmrl-modality": lambda xs, **o: pmrl_loss(xs, contrast="modality", return_components=True, **o),
    "contrast": lambda xs, mask, **o: (instance_contrastive_loss(xs[0], mask=mask[:, 0], **o),),
    "raw contrast": lambda xs, mask, **o: (instance_contrastive_loss(xs[0], 1e30, False, mask[:, 0], **o),),
}


def seen_as(x: Tensor, kind: str) -> Tensor:
    """The same numbers, as some view of other memory."""
    if kind == "negated":
        view = torch.complex(torch.zeros_like(x), -x).conj().imag
    elif kind == "strided":
        view = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    elif kind == "transposed":
        view = x.permute(tuple(reversed(range(x.dim())))).contiguous().permute(tuple(reversed(range(x.dim()))))
    else:
        view = x.clone()
    assert torch.equal(view, x) or not x.isfinite().all()
    return view


KINDS = st.sampled_from(["plain", "negated", "strided", "transposed"])


@BACKENDS
@lenient
@given(batch=masked_batches(), function=st.sampled_from(sorted(FUNCTIONS)), data=st.data())
def test_bytes_and_views_mean_the_numbers_they_stand_for(backend, batch, function, data):
    """Masks of any bytes, embeddings and upstream gradients of any memory: the same bits as of ordinary tensors."""
    xs, mask = batch
    numbers = st.lists(st.integers(1, 255), min_size=mask.numel(), max_size=mask.numel())
    odd = (mask * torch.tensor(data.draw(numbers), dtype=torch.uint8).view(mask.shape)).view(torch.bool)
    views = [seen_as(x.detach(), data.draw(KINDS)).requires_grad_() for x in xs]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    options: dict[str, Any] = {"backend": backend}
    one, other = FUNCTIONS[function](xs, mask=mask, **options), FUNCTIONS[function](views, mask=odd, **options)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in one]
    odd_upstream = [seen_as(g, data.draw(KINDS)) for g in upstream]
    found = torch.autograd.grad(one, xs, upstream, allow_unused=True)
    odd_found = torch.autograd.grad(other, views, odd_upstream, allow_unused=True)
    for a, b in zip((*one, *found), (*other, *odd_found), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@st.composite
def bad_batches(draw: st.DrawFn) -> tuple[list[Tensor], Tensor]:
    """A few instances, most of them masked out, of zero vectors and of numbers that are none among others."""
    B, k, d = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    xs = [torch.randn(B, d, generator=generator).to(dtype) for _ in range(k)]
    for x in xs:
        for row in x:
            kind = draw(st.sampled_from(["plain", "plain", "zero", "nan", "inf", "-inf"]))
            if kind == "zero":
                row.zero_()
            elif kind != "plain":
                row[draw(st.integers(0, d - 1))] = float(kind)
    rows = st.lists(st.sampled_from([True, False, False]), min_size=k, max_size=k)
    mask = torch.tensor(draw(st.lists(rows, min_size=B, max_size=B)))
    return [x.requires_grad_() for x in xs], mask


@BACKENDS
@lenient
@given(batch=bad_batches(), contrast=st.sampled_from(EVERY_CONTRAST))
def test_a_contrast_is_nan_where_something_that_takes_part_is(backend, batch, contrast):
    """Whether there is something to compare it with or not, and nowhere else; 0 where nothing is compared."""
    xs, mask = batch
    bad = torch.stack([~x.isfinite().all(1) for x in xs], 1) & mask
    there = torch.stack([(x != 0).any(1) for x in xs], 1) & mask
    has_direction = there.any(1)
    if contrast == "pairs":  # a modality takes part where some instance has another one too
        both = (there[:, :, None] & there[:, None, :]).any(0).fill_diagonal_(False)
        there = there & both.any(1)
    bad_there = bad if contrast != "pairs" else bad & there
    instance = pmrl_loss(xs, mask=mask, contrast=contrast, return_components=True, backend=backend).instance
    assert instance.isnan() == bad_there.any()
    if not bad_there.any() and has_direction.sum() <= 1:
        assert instance == 0
    for m, g in enumerate(gradients(instance, xs)):
        assert not g[~mask[:, m]].any()
        assert not g[~has_direction].any()
        assert g[bad_there.any(1) & there[:, m]].isnan().all()
    for normalize in (True, False):
        u, rows = xs[0], mask[:, 0]
        loss = instance_contrastive_loss(u, 1.0, normalize, rows, backend=backend)
        assert loss.isnan() == bad[:, 0].any()
        g = gradients(loss, [u])[0]
        assert not g[~rows].any()
        assert g[bad[:, 0]].isnan().all()
