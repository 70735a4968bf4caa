"""Every public function as a scalar loss, for tests of what PyTorch may do with it, and small batches for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    instance_contrastive_loss,
    pmrl_loss,
    singular_values,
)
from tests.conftest import CPU_BACKENDS

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
    "pmrl_loss-leave_one_out": lambda *xs, **options: pmrl_loss(
        *xs, temperature=0.7, instance_temperature=0.5, contrast="leave_one_out", **options
    ),
    "pmrl_loss-pairs": lambda *xs, **options: pmrl_loss(
        *xs, instance_temperature=0.5, contrast="pairs", alignment_weight=0.0, **options
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


def forward_mode(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def right_or_an_error(found: Callable[[], Any], expected: Any) -> None:
    """For what works on some functions only: never a silently wrong value."""
    try:
        result = found()
    except (NotImplementedError, RuntimeError):
        return
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


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
