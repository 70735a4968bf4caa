"""torch.compile: one graph for every batch size, the eager values, and the same refusals."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import pmrl_kernels
from pmrl_kernels import (
    PMRLLoss,
    dominant_singular_triplet,
    dominant_sv_loss,
    gram_loss,
    joint_contrastive_loss,
    joint_scores,
    pmrl_loss,
    singular_values,
    triangle_loss,
)
from tests.conftest import CPU_BACKENDS
from tests.tools.functions import EVERY_CONTRAST
from tests.tools.scalars import (
    MIXED,
    SCALARS,
    UNSUPPORTED,
    assert_same_bits,
    each_backend,
    each_place,
    gradients,
    mixed,
    modalities,
    right_or_an_error,
    some_mask,
)


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


def slow(case: object) -> object:
    """One of those that `make test` leaves to `make test-slow`."""
    return pytest.param(case, marks=pytest.mark.slow)


# Where backends differ in an operator's name alone.
one_backend = pytest.mark.parametrize("backend", [CPU_BACKENDS[0], *map(slow, CPU_BACKENDS[1:])])


def of_each_loss(transforms: list[str], left_out: tuple[str, ...]) -> Any:
    """Every transform of every loss. `make test` has each of both but for what is left out, and half of the pairs."""
    losses = ["dominant_sv_loss", "pmrl_loss", "instance_contrastive_loss"]
    cases = []
    for (i, transform), (j, name) in itertools.product(enumerate(transforms), enumerate(losses)):
        marks = [pytest.mark.slow] if transform in left_out or (i + j) % 2 else []
        cases.append(pytest.param(transform, name, marks=marks))
    return pytest.mark.parametrize(("transform", "name"), cases)


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


JOINT: dict[str, Callable[..., Tensor]] = {
    "joint_scores, volume": lambda *xs, **options: joint_scores(*xs, score="volume", **options).sin().sum(),
    "joint_scores, mip": lambda *xs, **options: joint_scores(*xs, score="mip", **options).sin().sum(),
    "joint_contrastive_loss": joint_contrastive_loss,
    "joint_contrastive_loss, cosine": lambda *xs, **options: joint_contrastive_loss(*xs, score="cosine", **options),
    "gram_loss": lambda *xs, **options: gram_loss(*xs, half_gradient=True, **options),
    "triangle_loss": triangle_loss,
}


@one_backend
@pytest.mark.parametrize("name", JOINT)
def test_compile_of_joint_scores(name, backend, fresh_dynamo):
    check_compiled(lambda *xs: JOINT[name](*xs, backend=backend), "aot_eager", (5, 8))


@each_backend
def test_compile_of_a_stack_and_of_a_repeated_modality(backend, fresh_dynamo):
    check_compiled(lambda *xs: pmrl_loss(torch.stack([xs[0], *xs], 1), backend=backend), "aot_eager", (5, 8))


@one_backend
@pytest.mark.parametrize("name", [slow(name) if name.startswith("pmrl") else name for name in COMPILED[:-1]])
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


@one_backend
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


@one_backend
@pytest.mark.parametrize("k", [1, slow(2), 3, slow(4), 5])
@pytest.mark.parametrize("name", ["dominant_sv_loss", "pmrl_loss", "pmrl_loss-modality", "dominant_singular_triplet"])
def test_compile_without_gradients(name, k, backend, fresh_dynamo):
    """A step of validation. Dynamo takes a Function's ctx for an input of forward if the numbers of both agree."""
    xs = [x.detach() for x in modalities(k)]
    function = getattr(pmrl_kernels, name, None) or SCALARS[name]
    for mask in (None, some_mask(len(xs[0]), k)):
        call = functools.partial(function, mask=mask, backend=backend)
        found = torch.compile(lambda *xs, call=call: call(*xs), backend="eager", fullgraph=True)(*xs)
        torch.testing.assert_close(found, call(*xs), rtol=1e-12, atol=0.0)


@one_backend
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


@one_backend
@each_place
@pytest.mark.parametrize("contrast", EVERY_CONTRAST)
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


# It generates and compiles C++, which takes 12 s a time.
@one_backend
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


@one_backend
@of_each_loss(["grad", "vjp", "grad of a part"], left_out=("grad of a part",))
def test_compiled_functional_gradient_is_right_or_an_error(transform, name, backend, fresh_dynamo):
    transform = COMPILED_TRANSFORMS[transform]
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


@one_backend
@of_each_loss(["func.jvp", "func.grad of grad", "forward_ad", "func.hessian"], left_out=("forward_ad", "func.hessian"))
def test_compiled_unsupported_transforms_raise(transform, name, backend, fresh_dynamo):
    """Inside a graph no less than outside: never zeros."""
    x, *rest = (y.detach() for y in modalities())
    apply, _ = UNSUPPORTED[transform]

    @torch.compile(backend="aot_eager")
    def compiled(x: Tensor) -> Any:
        return apply(lambda x: SCALARS[name](x, *rest, backend=backend), x)

    with pytest.raises((NotImplementedError, RuntimeError)):
        compiled(x)
