"""Embeddings of mixed dtypes, within autocast and without."""

from __future__ import annotations

import functools

import pytest
import torch

from pmrl_kernels import (
    DominantSVLoss,
    PMRLLoss,
    alignment_score,
    effective_rank,
    joint_contrastive_loss,
    joint_scores,
    pmrl_loss,
    uniformity,
    warm_up,
)
from pmrl_kernels.ops.joint.spec import NAMES
from tests.tools.scalars import (
    SCALARS,
    SEVERAL,
    assert_same_bits,
    each_backend,
    each_mixture,
    each_place,
    each_scalar,
    gradients,
    mixed,
    modalities,
)


@each_backend
@each_place
@each_mixture
@pytest.mark.parametrize("name", SEVERAL)
def test_mixed_dtypes(name, dtypes, enabled, backend):
    """Computed on their exact values, as of embeddings upcast to float32; within autocast and after it."""
    xs = mixed(dtypes)
    upcast = [x.detach().float().requires_grad_() for x in xs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        found = SCALARS[name](*xs, backend=backend)
    expected = SCALARS[name](*upcast, backend=backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    found.backward()
    expected.backward()
    for x, y, dtype in zip(xs, upcast, dtypes, strict=True):
        assert x.grad.dtype == dtype
        # one rounding to the input's dtype, and float16's subnormals
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(x.grad.float(), y.grad, rtol=rounding, atol=1e-7)


@each_backend
@each_place
@pytest.mark.parametrize("name", SEVERAL)
def test_float64_beside_less(name, enabled, backend):
    """The widest input decides: the output is float64."""
    xs = mixed((torch.float32, torch.float64, torch.bfloat16))
    upcast = [x.detach().double().requires_grad_() for x in xs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        found = SCALARS[name](*xs, backend=backend)
    expected = SCALARS[name](*upcast, backend=backend)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    assert [x.grad.dtype for x in xs] == [x.dtype for x in xs]


@each_backend
def test_modules_and_diagnostics_take_mixed_dtypes(backend):
    """An encoder in float32 beside one in bfloat16, and whatever is done with their embeddings."""
    text, audio = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8, dtype=torch.bfloat16)
    xs = [text(torch.randn(5, 6)), audio(torch.randn(5, 6, dtype=torch.bfloat16))]
    for module in (DominantSVLoss(backend=backend), PMRLLoss(contrast="modality", backend=backend)):
        module(xs).backward(retain_graph=True)
    assert text.weight.grad.dtype == torch.float32
    assert audio.weight.grad.dtype == torch.bfloat16
    assert audio.weight.grad.any()
    for diagnostic in (alignment_score, effective_rank, uniformity):
        found = diagnostic(xs, backend=backend)
        torch.testing.assert_close(found, diagnostic([x.float() for x in xs], backend=backend))
    warm_up(functools.partial(pmrl_loss, backend=backend), *xs)


@each_backend
@each_scalar
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(name, dtype, backend):
    """It would turn the float32 products of similarities into bfloat16 ones; backward may run inside it too."""
    xs = modalities(B=16, d=32, dtype=torch.float32)
    expected = SCALARS[name](*xs, backend=backend)
    slopes = gradients(expected, xs)
    with torch.autocast("cpu", dtype=dtype):
        found = SCALARS[name](*xs, backend=backend)
        inside = torch.autograd.grad(found, xs, retain_graph=True, allow_unused=True)
        assert (xs[0] @ xs[1].T).dtype == dtype  # autocast is on
    assert torch.equal(found, expected)
    assert_same_bits(inside, slopes)
    assert_same_bits(gradients(found, xs), slopes)


@each_backend
@pytest.mark.parametrize("score", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit_of_joint_scores(score, dtype, backend):
    """Some scores are plain products, and so are their gradients."""
    xs = modalities(B=16, d=32, dtype=torch.float32)

    def differentiated(loss):
        return [loss.detach(), *gradients(loss.sum(), xs)]

    def scores():
        return joint_scores(*xs, score=score, normalize=False, backend=backend)

    def contrast():
        return joint_contrastive_loss(*xs, score=score, backend=backend)

    expected = [differentiated(call()) for call in (scores, contrast)]
    with torch.autocast("cpu", dtype=dtype):
        found = [differentiated(call()) for call in (scores, contrast)]
    for some, wanted in zip(found, expected, strict=True):
        assert_same_bits(some, wanted)
