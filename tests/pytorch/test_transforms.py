"""Saved-tensor hooks, checkpointing and torch.func.

What is not supported (forward mode, vmap, second derivatives) raises and never returns zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pmrl_kernels import DominantSVLoss, dominant_sv_loss, instance_contrastive_loss, pmrl_loss
from tests.tools.functions import EVERY_CONTRAST
from tests.tools.scalars import (
    SCALARS,
    UNSUPPORTED,
    assert_same_bits,
    each_backend,
    each_scalar,
    gradients,
    modalities,
    right_or_an_error,
    some_mask,
)

# ------------------------------------------------------------------------------------------------
# Hooks, checkpointing, functional gradients
# ------------------------------------------------------------------------------------------------


@each_backend
@each_scalar
def test_tensors_that_outlive_a_transform(name, backend):
    """What a transformed function has left elsewhere is a wrapper around a tensor, and works as that tensor."""
    xs = modalities()
    left: list[Tensor] = []

    def leaking(*inputs: Tensor) -> Tensor:
        left.extend(inputs)
        return sum((x * x).sum() for x in inputs)

    torch.func.grad(leaking, argnums=tuple(range(len(xs))))(*xs)
    assert_same_bits([SCALARS[name](*left, backend=backend)], [SCALARS[name](*xs, backend=backend)])
    found = gradients(SCALARS[name](*left, backend=backend), xs)
    assert_same_bits(found, gradients(SCALARS[name](*xs, backend=backend), xs))


@each_backend
@each_scalar
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_saved_tensor_hooks(name, masked, backend):
    """Whatever is kept for the backward pass goes through the hooks, so it can be moved off the device."""
    xs = modalities()
    rows = name == "instance_contrastive_loss"
    mask = None if not masked else some_mask(4, 3)[:, 0] if rows else some_mask(4, 3)
    packed = []

    def pack(x: Tensor) -> Any:
        packed.append(x.shape)
        return x.detach().numpy().copy()

    expected = gradients(SCALARS[name](*xs, mask=mask, backend=backend), xs)
    with saved_tensors_hooks(pack, torch.from_numpy):
        loss = SCALARS[name](*xs, mask=mask, backend=backend)
    assert xs[0].shape in packed
    assert_same_bits(gradients(loss, xs), expected)
    with save_on_cpu():
        loss = SCALARS[name](*xs, mask=mask, backend=backend)
    assert_same_bits(gradients(loss, xs), expected)


@each_backend
@each_scalar
def test_checkpoint(name, backend):
    xs = modalities()
    expected = gradients(SCALARS[name](*xs, backend=backend), xs)
    found = gradients(checkpoint(SCALARS[name], *xs, backend=backend, use_reentrant=False), xs)
    assert_same_bits(found, expected)


@each_backend
@each_scalar
def test_functional_gradients(name, backend):
    """torch.func's grad and vjp, which take another path than autograd."""
    xs = modalities()
    expected = gradients(SCALARS[name](*xs, backend=backend), xs)
    expected = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(xs, expected, strict=True))
    detached = [x.detach() for x in xs]

    def call(*xs: Tensor) -> Tensor:
        return SCALARS[name](*xs, backend=backend)

    assert_same_bits(torch.func.grad(call, argnums=(0, 1, 2))(*detached), expected)
    value, pull = torch.func.vjp(call, *detached)
    assert torch.equal(value, call(*detached))
    assert_same_bits(pull(torch.ones_like(value)), expected)


@each_backend
def test_functional_gradient_of_a_temperature(backend):
    xs, tau = modalities(), torch.tensor(0.7, dtype=torch.float64)
    for argument in ("temperature", "instance_temperature"):
        for contrast in EVERY_CONTRAST:

            def call(tau: Tensor, argument: str = argument, contrast: str = contrast) -> Tensor:
                return pmrl_loss(*xs, contrast=contrast, backend=backend, **{argument: tau})

            leaf = tau.clone().requires_grad_()
            (expected,) = torch.autograd.grad(call(leaf), leaf)
            assert torch.equal(torch.func.grad(call)(tau), expected)


@each_backend
def test_functional_call_of_a_module(backend):
    """Gradients of a module's temperature by ``torch.func.functional_call``."""
    xs = modalities()
    loss = DominantSVLoss(0.3, learnable_temperature=True, backend=backend).double()
    loss(xs).backward()
    parameters = {name: parameter.detach() for name, parameter in loss.named_parameters()}
    found = torch.func.grad(lambda parameters: torch.func.functional_call(loss, parameters, (xs,)))(parameters)
    assert torch.equal(found["temperature.log_excess"], loss.temperature.log_excess.grad)


# ------------------------------------------------------------------------------------------------
# What is not supported
# ------------------------------------------------------------------------------------------------


@each_backend
@each_scalar
# Of jacrev, which maps a backward pass that then raises.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning:torch.autograd.graph")
@pytest.mark.parametrize(("transform", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_transforms_raise(transform, message, name, backend):
    x, *rest = (y.detach() for y in modalities())
    with pytest.raises((NotImplementedError, RuntimeError), match=message):
        transform(lambda x: SCALARS[name](x, *rest, backend=backend), x)


@each_backend
@each_scalar
def test_batched_gradients_are_right_or_an_error(name, backend):
    xs = modalities()
    loss = SCALARS[name](*xs, backend=backend)
    (slope,) = torch.autograd.grad(loss, xs[0], retain_graph=True)
    grads = torch.tensor([1.0, 2.0], dtype=loss.dtype)

    def batched() -> Tensor:
        return torch.autograd.grad(loss, xs[0], grads, is_grads_batched=True, retain_graph=True)[0]

    right_or_an_error(batched, torch.stack([slope, 2 * slope]))


@each_backend
@pytest.mark.parametrize(
    "call",
    [
        lambda xs, tau, **options: dominant_sv_loss(xs, temperature=tau, **options),
        lambda xs, tau, **options: pmrl_loss(xs, instance_temperature=tau, **options),
        lambda xs, tau, **options: pmrl_loss(xs, instance_temperature=tau, contrast="modality", **options),
        lambda xs, tau, **options: instance_contrastive_loss(xs[0], temperature=tau, **options),
    ],
    ids=["dominant_sv_loss", "pmrl_loss", "pmrl_loss-modality", "instance_contrastive_loss"],
)
def test_vmap_over_a_temperature_raises(call, backend):
    xs = modalities()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda tau: call(xs, tau, backend=backend))(torch.tensor([0.5, 0.7]))


PENALTIES: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    # the incoming gradient is a constant 1: ``once_differentiable`` would not notice
    "loss": lambda loss, xs: torch.autograd.grad(loss, xs[0], create_graph=True)[0],
    # the incoming gradient depends on the loss and needs a gradient itself
    "squared loss": lambda loss, xs: torch.autograd.grad(loss.square(), xs[0], create_graph=True)[0],
    # the incoming gradient is given, and needs none
    "given gradient": lambda loss, xs: torch.autograd.grad(loss, xs[0], torch.full_like(loss, 0.5), create_graph=True)[
        0
    ],
    # ... or needs one of its own, which must not make up for the lost one
    "given gradient that requires one": lambda loss, xs: torch.autograd.grad(
        loss, xs[0], torch.full_like(loss, 0.5).requires_grad_(), create_graph=True
    )[0],
}


@each_backend
@each_scalar
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
def test_gradient_penalty_is_not_silently_lost(penalty, name, backend):
    """The task loss alone gives every leaf a gradient, so nothing but an error would tell."""
    xs = modalities()
    loss = SCALARS[name](*xs, backend=backend)
    total = penalty(loss, xs).square().sum() + loss + xs[1].square().sum()
    with pytest.raises(NotImplementedError, match="through the gradient"):
        total.backward()


@each_backend
@each_scalar
def test_gradient_penalty_on_an_encoder(name, backend):
    """The usual form: the penalised gradient is that of a weight, or of the encoder's input."""
    xs = [x.detach() for x in modalities()]
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    task = torch.tanh(xs[0] @ weight).sum()
    loss = SCALARS[name](*(torch.tanh(x @ weight) for x in xs), backend=backend)
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="through the gradient"):
        (slope.square().sum() + loss + task).backward()


@each_backend
@pytest.mark.parametrize("alone", [False, True], ids=["with embeddings", "alone"])
@pytest.mark.parametrize(
    "call",
    [
        lambda xs, tau, **options: dominant_sv_loss(xs, temperature=tau, **options),
        lambda xs, tau, **options: pmrl_loss(xs, temperature=tau, **options),
        lambda xs, tau, **options: pmrl_loss(xs, instance_temperature=tau, **options),
        lambda xs, tau, **options: pmrl_loss(xs, instance_temperature=tau, contrast="modality", **options),
        lambda xs, tau, **options: instance_contrastive_loss(xs[0], temperature=tau, **options),
    ],
    ids=["dominant_sv_loss", "pmrl_loss", "instance", "modality", "instance_contrastive_loss"],
)
def test_penalty_on_the_gradient_of_a_temperature(call, alone, backend):
    """Alone: no embedding's gradient is there to raise in its place."""
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = call([x.detach() if alone else x for x in modalities()], tau, backend=backend)
    (slope,) = torch.autograd.grad(loss, tau, create_graph=True)
    with pytest.raises(NotImplementedError, match="through the gradient"):
        (slope.square() + loss).backward()


@each_backend
@each_scalar
def test_create_graph_alone_gives_the_first_derivative(name, backend):
    xs = modalities()
    loss = SCALARS[name](*xs, backend=backend)
    expected = torch.autograd.grad(loss, xs, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(loss, xs, create_graph=True, allow_unused=True)
    assert_same_bits([g if g is None else g.detach() for g in found], expected)
    # a detached gradient, as a weight for instance, is no second derivative
    (found[0].detach().square().sum() * loss).backward()
    torch.testing.assert_close(xs[0].grad, expected[0] * expected[0].square().sum())
