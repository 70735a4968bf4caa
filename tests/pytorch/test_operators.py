"""Fake tensors, and opcheck of the reference's operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from pmrl_kernels import ops, pmrl_loss
from pmrl_kernels.ops.spectral import spec
from tests.tools import contrasts, joints
from tests.tools.backends import operators
from tests.tools.functions import EVERY_CONTRAST
from tests.tools.scalars import SCALARS, SEVERAL, each_backend, each_scalar, gradients, modalities, some_mask


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
        for contrast in EVERY_CONTRAST:
            loss = pmrl_loss(
                *xs, temperature=taus[0], instance_temperature=taus[1], mask=mask, contrast=contrast, backend=backend
            )
            assert loss.shape == ()
            for gradient, leaf in zip(gradients(loss, [*xs, *taus]), [*xs, *taus], strict=True):
                assert gradient.shape == leaf.shape


OPS = operators("reference")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def data(k: int, B: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [x.detach() for x in modalities(k, B, d, dtype)]


ALL = spec.ALIGNMENT | spec.SIGMA | spec.U | spec.V | spec.Z | spec.W


def spectral_samples() -> Iterator[tuple[Any, ...]]:
    """Arguments of spectral_forward: forms, dtypes, masks and what is asked for."""
    tau = torch.tensor(0.5)
    for dtype in DTYPES:
        yield data(3, 4, 6, dtype), None, None, 0.5, True, True, spec.ALIGNMENT_MEAN
    for wide in (torch.float32, torch.float64):
        mixture = [x.to(dtype) for x, dtype in zip(data(3, 4, 6), (torch.bfloat16, wide, torch.float16), strict=True)]
        yield mixture, some_mask(4, 3), tau, 1.0, True, True, ALL
    yield data(3, 4, 6), some_mask(4, 3), tau, 1.0, True, True, ALL
    yield data(3, 4, 6), None, tau, 1.0, False, True, ALL - spec.V
    yield data(5, 4, 3, torch.float32), some_mask(4, 5), None, 0.5, False, False, spec.ALIGNMENT | spec.U
    yield data(5, 4, 3, torch.float32), some_mask(4, 5), tau, 0.5, True, True, spec.ALIGNMENT_MEAN | spec.U
    yield data(2, 1, 1, torch.float32), None, None, 0.5, True, False, spec.SIGMA | spec.U | spec.V
    yield [torch.stack(data(3, 4, 6, torch.float32), 1)], some_mask(4, 3), tau, 1.0, True, True, ALL
    yield [torch.stack(data(3, 4, 6), 2).transpose(1, 2)], None, None, 0.5, True, False, spec.ALIGNMENT_SUM
    yield data(3, 0, 6, torch.float32), None, None, 0.5, True, True, ALL
    yield data(3, 0, 6, torch.float32), None, None, 0.5, True, True, spec.ALIGNMENT_MEAN
    yield data(1, 4, 6, torch.float32), None, None, 0.5, True, True, spec.ALIGNMENT


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
    **joints.samples(OPS),
}


@pytest.mark.parametrize(("op", "sample"), [
    pytest.param(op, sample, id=f"{op}-{i}", marks=[pytest.mark.slow] if i % 2 else [])
    for op, make in SAMPLES.items() for i, sample in enumerate(make())
])  # fmt: skip
def test_opcheck(op, sample):
    """Schema, aliasing and mutation, fake against real outputs, and tracing with dynamic shapes."""
    result = torch.library.opcheck(getattr(OPS, op), sample)
    assert set(result.values()) == {"SUCCESS"}


def test_every_op_is_checked():
    registered = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    assert {name for space, _, name in registered if space.startswith("pmrl_reference")} == set(SAMPLES)


def declared(operator: Any, sample: tuple[Any, ...], symbolic: bool) -> list[tuple[int, ...]]:
    """The shapes of what an operator says that it returns."""
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None, static_shapes=not symbolic)

    def fake(x: Any) -> Any:
        return mode.from_tensor(x) if isinstance(x, Tensor) else x

    with mode:
        results = pytree.tree_leaves(operator(*pytree.tree_map(fake, sample)))
    for x in results:  # as compilers write it in what they generate
        assert all(str(size) for size in x.shape)
    return [tuple(int(size) for size in x.shape) for x in results]


@pytest.mark.parametrize("name", [op.removesuffix("_forward") for op in SAMPLES if op.endswith("_forward")])
@pytest.mark.parametrize("by", ["native", "triton", "reference"])
def test_shapes_are_declared_of_symbols_too(name, by):
    """Of sizes that a compiler leaves open. Nothing is computed, so also where a backend has no device. (The backward
    operators' shapes are those of opcheck, above.)"""
    if by == "triton":
        pytest.importorskip("triton", reason="Triton has no packages for this system")
    elif by not in ops.available:
        pytest.skip(f"there is no {by} backend")
    pairs: dict[str, Any] = {}
    for family in ops.FAMILIES:
        pairs |= family.implementations(by)
    if (by, name) == ("triton", "joint_contrast"):  # the reference's
        assert name not in pairs
        return
    for sample in SAMPLES[f"{name}_forward"]():
        assert declared(pairs[name].forward, sample, True) == declared(pairs[name].forward, sample, False)
