"""PyTorch citizenship, on every backend that works here.

gradcheck, torch.compile, autocast, torch.func, saved-tensor hooks, checkpointing, fake tensors and opcheck;
what is not supported (forward mode, vmap, second derivatives) raises and never returns zeros.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import contrasts
import pytest
import torch
from conftest import CPU_BACKENDS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import pmrl_kernels
from pmrl_kernels import (
    DominantSVLoss,
    PMRLLoss,
    alignment_score,
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    effective_rank,
    instance_contrastive_loss,
    pmrl_loss,
    singular_values,
    uniformity,
    warm_up,
)
from pmrl_kernels.ops import constants

each_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


def modalities(k: int = 3, B: int = 4, d: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(k)]


def some_mask(B: int, k: int) -> Tensor:
    """The first instance lacks its last modality, the last one its first."""
    mask = torch.ones(B, k, dtype=torch.bool)
    mask[0, -1] = mask[-1, 0] = False
    return mask


def weighted(*outputs: Tensor) -> Tensor:
    """A scalar in which every element of every output has a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in outputs)


# name -> scalar of k embeddings; temperatures where gradients are of order 1
SCALARS: dict[str, Callable[..., Tensor]] = {
    "dominant_sv_loss": lambda *xs, **options: dominant_sv_loss(*xs, temperature=0.7, **options),
    "dominant_sv_loss-leading": lambda *xs, **options: dominant_sv_loss(*xs, objective="leading", **options),
    "pmrl_loss": lambda *xs, **options: pmrl_loss(*xs, temperature=0.7, instance_temperature=0.5, **options),
    "pmrl_loss-leading": lambda *xs, **options: pmrl_loss(
        *xs, instance_temperature=0.5, objective="leading", **options
    ),
    "pmrl_loss-modality": lambda *xs, **options: pmrl_loss(
        *xs, temperature=0.7, instance_temperature=0.5, contrast="modality", **options
    ),
    "singular_values": lambda *xs, **options: weighted(singular_values(*xs, **options)),
    "dominant_singular_value": lambda *xs, **options: weighted(dominant_singular_value(*xs, **options)),
    "dominant_singular_triplet": lambda *xs, **options: weighted(*dominant_singular_triplet(*xs, **options)),
    "instance_contrastive_loss": lambda *xs, **options: instance_contrastive_loss(xs[0], temperature=0.5, **options),
}
each_scalar = pytest.mark.parametrize("name", SCALARS)


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


# ------------------------------------------------------------------------------------------------
# gradcheck
# ------------------------------------------------------------------------------------------------

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
    for contrast in ("leading", "modality"):
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


# ------------------------------------------------------------------------------------------------
# What others hang into the graph
# ------------------------------------------------------------------------------------------------


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
        for contrast in ("leading", "modality"):

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
# Not supported: an error, never zeros
# ------------------------------------------------------------------------------------------------


def forward_mode(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


UNSUPPORTED: dict[str, tuple[Callable[[Callable[[Tensor], Tensor], Tensor], Any], str]] = {
    "func.jvp": (lambda call, x: torch.func.jvp(call, (x,), (torch.ones_like(x),)), "forward-mode"),
    "func.jacfwd": (lambda call, x: torch.func.jacfwd(call)(x), "forward-mode"),
    "forward_ad": (forward_mode, "forward mode"),
    "func.hessian": (lambda call, x: torch.func.hessian(call)(x), "forward-mode|vmap"),
    "func.grad of grad": (
        lambda call, x: torch.func.grad(lambda x: torch.func.grad(call)(x).square().sum())(x),
        "through the gradient",
    ),
    "functional.hessian": (torch.autograd.functional.hessian, "through the gradient"),
    "functional.jvp": (
        lambda call, x: torch.autograd.functional.jvp(call, x, torch.ones_like(x)),
        "through the gradient",
    ),
    "func.vmap": (lambda call, x: torch.func.vmap(call)(torch.stack([x, x])), "vmap"),
    "func.jacrev": (lambda call, x: torch.func.jacrev(call)(x), "vmap|[Bb]atching rule"),
}


def right_or_an_error(found: Callable[[], Any], expected: Any) -> None:
    """For what works on some functions only: never a silently wrong value."""
    try:
        result = found()
    except (NotImplementedError, RuntimeError):
        return
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


@each_backend
@each_scalar
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


# ------------------------------------------------------------------------------------------------
# Autocast
# ------------------------------------------------------------------------------------------------


def mixed(dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x, dtype in zip(modalities(B=16, d=32), dtypes, strict=True)]


MIXED = [
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
]
each_mixture = pytest.mark.parametrize(
    "dtypes", MIXED, ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
)
SEVERAL = [name for name in SCALARS if name != "instance_contrastive_loss"]


each_place = pytest.mark.parametrize("enabled", [True, False], ids=["autocast", "outside"])


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


# ------------------------------------------------------------------------------------------------
# torch.compile
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, on disk neither: such a cache knows graphs, not the shapes our operators declare."""
    import torch._inductor.config

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


COMPILED = [
    "dominant_sv_loss",
    "dominant_sv_loss-leading",
    "pmrl_loss",
    "pmrl_loss-modality",
    "singular_values",
    "dominant_singular_triplet",
    "instance_contrastive_loss",
]


def check_compiled(call: Callable[..., Tensor], backend: str, batches: tuple[int, ...] = (5, 8, 13)) -> None:
    """Forward and backward in one graph that serves every batch size, with the eager values."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    graphs = []
    for B in batches:
        xs = modalities(B=B)
        for x in xs:
            torch._dynamo.mark_dynamic(x, 0)  # an error if anything specialises on B
        found = compiled(*xs)
        expected = call(*(y := modalities(B=B)))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        for a, b in zip(gradients(found, xs), gradients(expected, y), strict=True):
            assert (a is None) == (b is None)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs == graphs[:1] * len(batches)


@each_backend
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name, backend, fresh_dynamo):
    if name in ("singular_values", "dominant_singular_triplet"):
        function = getattr(pmrl_kernels, name)

        # random weights cannot be drawn from a generator inside a graph

        def call(*xs: Tensor) -> Tensor:
            outputs = function(*xs, backend=backend)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return sum((x.sin() * (1 + torch.arange(x.shape[-1]))).sum() for x in outputs)

    else:

        def call(*xs: Tensor) -> Tensor:
            return SCALARS[name](*xs, backend=backend)

    check_compiled(call, "aot_eager")


@each_backend
def test_compile_with_a_mask(backend, fresh_dynamo):
    check_compiled(
        lambda *xs: pmrl_loss(*xs, mask=torch.stack([x[:, 0] > -1 for x in xs], 1), backend=backend), "aot_eager"
    )


@each_backend
def test_compile_of_a_stack_and_of_a_repeated_modality(backend, fresh_dynamo):
    check_compiled(lambda *xs: pmrl_loss(torch.stack([xs[0], *xs], 1), backend=backend), "aot_eager", (5, 8))


@each_backend
@pytest.mark.parametrize("name", COMPILED[:-1])
def test_compile_of_stacks_of_any_shape(name, backend, fresh_dynamo):
    """With ``dynamic=True`` k and d of a (B, k, d) stack are symbols too, as far as a backend lets them."""
    function = SCALARS[name]
    if name == "singular_values":
        function = lambda x, **o: singular_values(x, **o).sin().sum()  # noqa: E731
    elif name == "dominant_singular_triplet":
        function = lambda x, **o: sum(part.sin().sum() for part in dominant_singular_triplet(x, **o))  # noqa: E731
    compiled = torch.compile(lambda x: function(x, backend=backend), backend="aot_eager", fullgraph=True, dynamic=True)
    for B, k, d in ((5, 3, 6), (3, 4, 7), (4, 5, 8)):
        x, y = (torch.randn(B, k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for _ in "xy")
        found, expected = compiled(x.requires_grad_()), function(y.requires_grad_(), backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        pair = (torch.autograd.grad(out, leaf)[0] for out, leaf in ((found, x), (expected, y)))
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-14)


@each_backend
def test_compile_of_modules_with_learned_temperatures(backend, fresh_dynamo):
    """The temperatures' gradients come out of the graph too, and the module trains."""
    options = {"learnable_temperature": True, "learnable_instance_temperature": True, "backend": backend}
    eager, module = (PMRLLoss(0.7, 0.5, **options).double() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for B in (5, 8, 13):
        losses = []
        for loss, call in ((eager, eager), (module, compiled)):
            loss.zero_grad()
            losses.append(call(*modalities(B=B)))
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0.0)
        for found, expected in zip(module.parameters(), eager.parameters(), strict=True):
            assert expected.grad != 0
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=0.0)
            with torch.no_grad():  # a learned value must not be baked into the graph
                found.add_(0.1)
                expected.add_(0.1)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    # floats of the module make the first call trace twice, so only that nothing is compiled later counts
    assert graphs == graphs[:1] * 3


@each_backend
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["dominant_sv_loss", "pmrl_loss", "pmrl_loss-modality", "dominant_singular_triplet"])
def test_compile_without_gradients(name, k, backend, fresh_dynamo):
    """A step of validation. Dynamo takes a Function's ctx for an input of forward if the numbers of both agree."""
    xs = [x.detach() for x in modalities(k)]
    function = getattr(pmrl_kernels, name, None) or SCALARS[name]
    for mask in (None, some_mask(len(xs[0]), k)):
        call = functools.partial(function, mask=mask, backend=backend)
        found = torch.compile(lambda *xs, call=call: call(*xs), backend="eager", fullgraph=True)(*xs)
        torch.testing.assert_close(found, call(*xs), rtol=1e-12, atol=0.0)


@each_backend
@pytest.mark.parametrize("name", ["dominant_sv_loss", "pmrl_loss", "pmrl_loss-modality"])
def test_compile_of_one_tensor_in_several_places(name, backend, fresh_dynamo):
    """As two modalities, and as both temperatures."""

    def call(x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        if name == "dominant_sv_loss":
            return dominant_sv_loss(x, x, y, temperature=tau, backend=backend)
        contrast = name.partition("-")[2] or "leading"
        return pmrl_loss(x, y, x, temperature=tau, instance_temperature=tau, contrast=contrast, backend=backend)

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        sources = (*modalities(2), torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
        loss = function(*sources)
        results.append((loss, *torch.autograd.grad(loss, sources)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@each_backend
@each_place
@pytest.mark.parametrize("contrast", ["leading", "modality"])
def test_compile_of_mixed_dtypes(contrast, enabled, backend, fresh_dynamo):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(*xs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return pmrl_loss(*xs, contrast=contrast, backend=backend)

    xs = mixed(MIXED[0])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        expected = pmrl_loss(*xs, contrast=contrast, backend=backend)
    found = compiled(*xs)
    assert torch.equal(found, expected)
    assert_same_bits(gradients(found, xs), gradients(expected, xs))


@each_backend
def test_compile_with_the_default_compiler(backend, fresh_dynamo):
    """Inductor, one graph of an encoder and the loss, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64, requires_grad=True)

    def call(*xs: Tensor) -> Tensor:
        return pmrl_loss(*(torch.tanh(x @ weight) for x in xs), backend=backend)

    check_compiled(call, "inductor", (5, 8))


@each_backend
def test_compiled_graph_refuses_a_gradient_penalty(backend, fresh_dynamo):
    xs = modalities()
    loss = torch.compile(dominant_sv_loss, backend="aot_eager", fullgraph=True)(*xs, backend=backend)
    (slope,) = torch.autograd.grad(loss, xs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (slope.square().sum() + loss).backward()


COMPILED_TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda call, x: torch.func.grad(call)(x),
    "vjp": lambda call, x: torch.func.vjp(call, x)[1](torch.ones((), dtype=x.dtype))[0],
    "grad of a part": lambda call, x: torch.func.grad(lambda x: call(2 * x) + x.square().sum())(x),
}


@each_backend
@pytest.mark.parametrize("name", ["dominant_sv_loss", "pmrl_loss", "instance_contrastive_loss"])
@pytest.mark.parametrize("transform", COMPILED_TRANSFORMS.values(), ids=COMPILED_TRANSFORMS.keys())
def test_compiled_functional_gradient_is_right_or_an_error(transform, name, backend, fresh_dynamo):
    x, *rest = (y.detach() for y in modalities())

    def call(x: Tensor) -> Tensor:
        return SCALARS[name](x, *rest, backend=backend)

    expected = transform(call, x)
    assert expected.abs().max() > 1e-3
    right_or_an_error(lambda: torch.compile(lambda x: transform(call, x), backend="aot_eager")(x), expected)


@each_backend
@pytest.mark.parametrize("name", ["dominant_sv_loss", "pmrl_loss", "instance_contrastive_loss"])
def test_compiled_vmap_is_right_or_an_error(name, backend, fresh_dynamo):
    x, *rest = (y.detach() for y in modalities())

    def call(x: Tensor) -> Tensor:
        return SCALARS[name](x, *rest, backend=backend)

    stacked = torch.stack([x, 2 * x + 1])
    expected = torch.stack([call(y) for y in stacked])
    right_or_an_error(lambda: torch.compile(torch.func.vmap(call), backend="aot_eager")(stacked), expected)


@each_backend
@pytest.mark.parametrize("name", ["dominant_sv_loss", "pmrl_loss", "instance_contrastive_loss"])
@pytest.mark.parametrize("transform", ["func.jvp", "forward_ad", "func.hessian", "func.grad of grad"])
def test_compiled_unsupported_transforms_raise(transform, name, backend, fresh_dynamo):
    """Inside a graph no less than outside: never zeros."""
    x, *rest = (y.detach() for y in modalities())
    apply, _ = UNSUPPORTED[transform]

    @torch.compile(backend="aot_eager")
    def compiled(x: Tensor) -> Any:
        return apply(lambda x: SCALARS[name](x, *rest, backend=backend), x)

    with pytest.raises((NotImplementedError, RuntimeError)):
        compiled(x)


# ------------------------------------------------------------------------------------------------
# Fake tensors, and opcheck
# ------------------------------------------------------------------------------------------------


@each_backend
@each_scalar
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fake_tensors(name, dtype, backend):
    """They have no data, so a function that reads any (which on a GPU would wait for it) raises here."""
    with FakeTensorMode():
        xs = [torch.randn(4, 6, dtype=dtype, requires_grad=True) for _ in range(3)]
        loss = SCALARS[name](*xs, backend=backend)
        loss.backward()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for x in xs:
            if x.grad is None:
                assert name == "instance_contrastive_loss"
                continue
            assert (x.grad.shape, x.grad.dtype) == (x.shape, dtype)


@each_backend
@pytest.mark.parametrize("name", SEVERAL)
def test_fake_tensors_of_mixed_dtypes(name, backend):
    with FakeTensorMode():
        for wide in (torch.float32, torch.float64):
            dtypes = (torch.bfloat16, wide, torch.float16)
            xs = [torch.randn(4, 6, dtype=dtype, requires_grad=True) for dtype in dtypes]
            loss = SCALARS[name](*xs, backend=backend)
            assert loss.dtype == wide
            loss.backward()
            assert [(x.grad.shape, x.grad.dtype) for x in xs] == [((4, 6), dtype) for dtype in dtypes]


@each_backend
def test_fake_tensors_with_everything_learned_and_masked(backend):
    with FakeTensorMode():
        xs = [torch.randn(4, 6, requires_grad=True) for _ in range(3)]
        taus = [torch.rand((), requires_grad=True) for _ in range(2)]
        mask = torch.ones(4, 3, dtype=torch.bool)
        for contrast in ("leading", "modality"):
            loss = pmrl_loss(
                *xs, temperature=taus[0], instance_temperature=taus[1], mask=mask, contrast=contrast, backend=backend
            )
            assert loss.shape == ()
            for gradient, leaf in zip(gradients(loss, [*xs, *taus]), [*xs, *taus], strict=True):
                assert gradient.shape == leaf.shape


OPS = torch.ops.pmrl_reference
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def data(k: int, B: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [x.detach() for x in modalities(k, B, d, dtype)]


ALL = constants.ALIGNMENT | constants.SIGMA | constants.U | constants.V | constants.Z


def spectral_samples() -> Iterator[tuple[Any, ...]]:
    """Arguments of spectral_forward: forms, dtypes, masks and what is asked for."""
    tau = torch.tensor(0.5)
    for dtype in DTYPES:
        yield data(3, 4, 6, dtype), None, None, 0.5, True, True, constants.ALIGNMENT_MEAN
    for wide in (torch.float32, torch.float64):
        mixture = [x.to(dtype) for x, dtype in zip(data(3, 4, 6), (torch.bfloat16, wide, torch.float16), strict=True)]
        yield mixture, some_mask(4, 3), tau, 1.0, True, True, ALL
    yield data(3, 4, 6), some_mask(4, 3), tau, 1.0, True, True, ALL
    yield data(3, 4, 6), None, tau, 1.0, False, True, ALL - constants.V
    yield data(5, 4, 3, torch.float32), some_mask(4, 5), None, 0.5, False, False, constants.ALIGNMENT | constants.U
    yield data(5, 4, 3, torch.float32), some_mask(4, 5), tau, 0.5, True, True, constants.ALIGNMENT_MEAN | constants.U
    yield data(2, 1, 1, torch.float32), None, None, 0.5, True, False, constants.SIGMA | constants.U | constants.V
    yield [torch.stack(data(3, 4, 6, torch.float32), 1)], some_mask(4, 3), tau, 1.0, True, True, ALL
    yield [torch.stack(data(3, 4, 6), 2).transpose(1, 2)], None, None, 0.5, True, False, constants.ALIGNMENT_SUM
    yield data(3, 0, 6, torch.float32), None, None, 0.5, True, True, ALL
    yield data(3, 0, 6, torch.float32), None, None, 0.5, True, True, constants.ALIGNMENT_MEAN
    yield data(1, 4, 6, torch.float32), None, None, 0.5, True, True, constants.ALIGNMENT


def spectral_backward_samples() -> Iterator[tuple[Any, ...]]:
    for sample in spectral_samples():
        embeddings = sample[0]
        outputs, state = OPS.spectral_forward(*sample)
        grads = [torch.ones_like(x) for x in outputs]
        yield *sample, state, grads, [True] * len(embeddings)
        if len(embeddings) > 1:
            needed = [m == 1 for m in range(len(embeddings))]
            yield *sample, state, [grads[0], *(None for _ in grads[1:])], needed
            yield *sample, state, [*(None for _ in grads[1:]), grads[-1]], needed


SAMPLES = {
    "spectral_forward": spectral_samples,
    "spectral_backward": spectral_backward_samples,
    **contrasts.samples(OPS),
}


@pytest.mark.parametrize(("op", "sample"), [
    pytest.param(op, sample, id=f"{op}-{i}") for op, make in SAMPLES.items() for i, sample in enumerate(make())
])  # fmt: skip
def test_opcheck(op, sample):
    """Schema, aliasing and mutation, fake against real outputs, and tracing with dynamic shapes."""
    result = torch.library.opcheck(getattr(OPS, op).default, sample)
    assert set(result.values()) == {"SUCCESS"}


def test_every_op_is_checked():
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "pmrl_reference::" in name}
    assert names == set(SAMPLES)
