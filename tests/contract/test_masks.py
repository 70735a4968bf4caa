"""Masked modalities: they are no columns, whatever their buffers hold and whatever bytes say that they are absent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pmrl_kernels import dominant_sv_loss
from tests.tools.functions import DTYPES, MIXING, PER_INSTANCE, any_bytes, finite, grads, leaves


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_modalities_are_no_columns(backend, device, dtype, function):
    """Whatever their buffers hold: values and gradients are those of the present ones alone."""
    B, k = 6, 4
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    clean = [torch.randn(B, 9) for _ in range(k)]
    results = []
    for rubbish in (0.0, 1e4, float("nan"), float("inf")):
        xs = leaves([x.masked_fill(~mask[:, m, None], rubbish) for m, x in enumerate(clean)], device, dtype)
        out = (PER_INSTANCE | MIXING)[function](xs, mask=mask.to(device), backend=backend)
        found = grads((out * torch.arange(1, out.numel() + 1, device=device).reshape(out.shape)).sum(), xs)
        assert finite(out, *found)
        for m, g in enumerate(found):
            assert not g[~mask[:, m].to(device)].any()
        results.append([out.detach(), *found])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("function", PER_INSTANCE | MIXING)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "by name"])
def test_masks_of_any_bytes(backend, device, function, layout):
    """A bool tensor is True where its byte is not 0, also one that views an image's mask of 255."""
    xs = leaves([torch.randn(6, 9) for _ in range(4)], device, torch.float32)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    mask = mask.to(device)
    odd = any_bytes(mask)
    given: Any = {"transposed": any_bytes(mask.T).T, "strided": any_bytes(mask.repeat(1, 2))[:, :4]}.get(layout, odd)
    embeddings: Any = xs
    if layout == "by name":
        embeddings = dict(zip("abcd", xs, strict=True))
        given = dict(zip("abcd", odd.unbind(1), strict=True))
    one = (PER_INSTANCE | MIXING)[function](embeddings, mask=given, backend=backend)
    other = (PER_INSTANCE | MIXING)[function](xs, mask=mask, backend=backend)
    assert torch.equal(one, other)
    for a, b in zip(grads(one.sum(), xs), grads(other.sum(), xs), strict=True):
        assert torch.equal(a, b)


def test_masked_alignment_is_that_of_the_subset(backend, device):
    xs = leaves([torch.randn(3, 9) for _ in range(4)], device, torch.float64)
    mask = torch.tensor([[True, False, True, True]] * 3, device=device)
    for function in PER_INSTANCE.values():
        part = function([xs[0], xs[2], xs[3]], backend=backend)
        whole = function(xs, mask=mask, backend=backend)
        if whole.shape != part.shape:
            assert not whole[:, 3:].any() or function is PER_INSTANCE["v"]
            whole = whole[:, [0, 2, 3]] if function is PER_INSTANCE["v"] else whole[:, :3]
        torch.testing.assert_close(whole, part, rtol=1e-12, atol=1e-14)


def test_instances_without_anything_to_align_do_not_count(backend, device):
    xs = leaves([torch.randn(4, 9) for _ in range(3)], device, torch.float32)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], device=device).bool()
    per = dominant_sv_loss(xs, mask=mask, reduction="none", backend=backend)
    assert per[1] == 0
    assert per[2] == 0
    torch.testing.assert_close(dominant_sv_loss(xs, mask=mask, backend=backend), (per[0] + per[3]) / 2)
    loss = dominant_sv_loss(xs, mask=torch.zeros_like(mask), backend=backend)
    assert loss == 0
    assert not any(g.any() for g in grads(loss, xs))
