"""Gradients by gradcheck; which ones are made; backward twice, or after a change in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    instance_contrastive_loss,
    pmrl_loss,
    singular_values,
    warm_up,
)
from tests.tools.functions import EVERY_CONTRAST
from tests.tools.scalars import SCALARS, assert_same_bits, each_backend, each_scalar, gradients, modalities, some_mask

SIZES = {"k=2": (2, 4), "k=3": (3, 4), "k=5": (5, 6), "d<k": (5, 3), "d=1": (3, 1)}

CHECKED: dict[str, Callable[..., Any]] = {
    "dominant_sv_loss": lambda tau, tau2, xs, options: dominant_sv_loss(*xs, temperature=tau, **options),
    "dominant_sv_loss-leading": lambda tau, tau2, xs, options: dominant_sv_loss(
        *xs, reduction="none", objective="leading", **options
    ),
    "pmrl_loss": lambda tau, tau2, xs, options: pmrl_loss(
        *xs, temperature=tau, instance_temperature=tau2, return_components=True, **options
    ),
    "pmrl_loss-leading": lambda tau, tau2, xs, options: pmrl_loss(
        *xs, instance_temperature=tau2, objective="leading", **options
    ),
    "pmrl_loss-modality": lambda tau, tau2, xs, options: pmrl_loss(
        *xs, temperature=tau, instance_temperature=tau2, contrast="modality", **options
    ),
    "pmrl_loss-leading-modality": lambda tau, tau2, xs, options: pmrl_loss(
        *xs, instance_temperature=tau2, objective="leading", contrast="modality", **options
    ),
    "singular_values": lambda tau, tau2, xs, options: singular_values(*xs, **options),
    "dominant_singular_value": lambda tau, tau2, xs, options: dominant_singular_value(*xs, **options),
    "dominant_singular_triplet": lambda tau, tau2, xs, options: dominant_singular_triplet(*xs, **options),
}


def gradcheck(function: Callable[..., Any], xs: list[Tensor], **options: Any) -> None:
    """Of every embedding and both temperatures. Double precision all through, so the tolerances can be tight."""
    taus = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 0.5)]
    assert torch.autograd.gradcheck(
        lambda tau, tau2, *xs: function(tau, tau2, xs, options), (*taus, *xs), eps=1e-6, atol=1e-7, rtol=1e-5
    )


@each_backend
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", CHECKED.values(), ids=CHECKED.keys())
def test_gradcheck(function, size, backend):
    k, d = SIZES[size]
    gradcheck(function, modalities(k, 3, d), backend=backend)


@each_backend
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "raw"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("function", CHECKED.values(), ids=CHECKED.keys())
def test_gradcheck_with_options(function, masked, normalize, backend):
    mask = some_mask(3, 3) if masked else None
    gradcheck(function, modalities(3, 3, 4, seed=2), mask=mask, normalize=normalize, backend=backend)


@each_backend
@pytest.mark.parametrize("function", CHECKED.values(), ids=CHECKED.keys())
def test_gradcheck_of_a_stack(function, backend):
    stack = torch.stack(modalities(3, 3, 4), 1).detach().requires_grad_()
    gradcheck(function, [stack], backend=backend)


@each_backend
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "raw"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_gradcheck_of_instance_contrastive_loss(masked, normalize, backend):
    mask = torch.tensor([True, False, True, True]) if masked else None
    (u,) = modalities(1, 4, 5)
    gradcheck(
        lambda tau, tau2, xs, options: instance_contrastive_loss(*xs, temperature=tau2, **options),
        [u], mask=mask, normalize=normalize, backend=backend,
    )  # fmt: skip


@each_backend
@each_scalar
def test_gradients_where_only_some_are_required(name, backend):
    """Every subset of the inputs: the same gradients, none for the rest, whose graph is not even recorded."""
    xs = modalities()
    expected = gradients(SCALARS[name](*xs, backend=backend), xs)
    for wanted in itertools.product([False, True], repeat=3):
        if not any(wanted) or (name == "instance_contrastive_loss" and not wanted[0]):
            continue
        leaves = [x.detach().requires_grad_(want) for x, want in zip(xs, wanted, strict=True)]
        SCALARS[name](*leaves, backend=backend).backward()
        for leaf, want, right in zip(leaves, wanted, expected, strict=True):
            if want and right is not None:
                torch.testing.assert_close(leaf.grad, right, rtol=1e-12, atol=1e-14)
            else:
                assert leaf.grad is None


@each_backend
def test_only_the_temperatures_require_gradients(backend):
    xs = [x.detach() for x in modalities()]
    for contrast in EVERY_CONTRAST:
        taus = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, 0.5)]
        assert torch.autograd.gradcheck(
            lambda a, b, c=contrast: pmrl_loss(*xs, temperature=a, instance_temperature=b, contrast=c, backend=backend),
            taus,
        )


@each_backend
@each_scalar
def test_no_graph_where_none_is_wanted(name, backend):
    xs = modalities()
    expected = SCALARS[name](*xs, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = SCALARS[name](*xs, backend=backend)
        assert torch.equal(found, expected)
        assert not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(SCALARS[name](*(x.clone() for x in xs), backend=backend), expected)
    assert expected.requires_grad
    assert not SCALARS[name](*(x.detach() for x in xs), backend=backend).requires_grad


@each_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_warm_up_where_no_graph_is_wanted(mode, backend):
    """It differentiates all the same, with examples from outside and from inside, and leaves the mode as it was."""
    seen = []

    def function(*xs: Tensor, mask: Tensor) -> Tensor:
        loss = pmrl_loss(*xs, mask=mask, backend=backend)
        loss.register_hook(lambda gradient: seen.append(len(xs[0])))
        return loss

    outside = modalities()
    with mode():
        for xs in (outside, [x.clone() for x in outside]):
            warm_up(function, *xs, mask=torch.ones(4, 3, dtype=torch.bool))
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert len(seen) == 4
    assert all(x.grad is None for x in outside)


@each_backend
@each_scalar
def test_backward_twice_gives_the_same_bits(name, backend):
    xs = modalities()
    loss = SCALARS[name](*xs, backend=backend)
    first = torch.autograd.grad(loss, xs, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, xs, allow_unused=True)
    assert_same_bits(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, xs, allow_unused=True)


@each_backend
@each_scalar
def test_in_place_change_before_backward_is_noticed(name, backend):
    xs = modalities()
    loss = SCALARS[name](*xs, backend=backend)
    with torch.no_grad():
        xs[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
