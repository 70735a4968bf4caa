"""What the tests of the contract share: the public functions by name, and embeddings to call them with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    instance_contrastive_loss,
    pmrl_loss,
    singular_values,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OBJECTIVES = ("softmax", "leading")

# Every public function of embeddings as (name, function returning one tensor per instance or a scalar).
PER_INSTANCE: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda *x, **o: dominant_sv_loss(*x, reduction="none", **o),
    "leading": lambda *x, **o: dominant_sv_loss(*x, reduction="none", objective="leading", **o),
    "singular_values": lambda *x, **o: singular_values(*x, **o),
    "dominant_singular_value": lambda *x, **o: dominant_singular_value(*x, **o),
    "u": lambda *x, **o: dominant_singular_triplet(*x, **o).u,
    "v": lambda *x, **o: dominant_singular_triplet(*x, **o).v,
}
EVERY_CONTRAST = ("leading", "modality", "leave_one_out", "pairs")
MIXING: dict[str, Callable[..., Tensor]] = {
    f"{contrast}-{objective}": lambda *x, c=contrast, b=objective, **o: pmrl_loss(*x, contrast=c, objective=b, **o)
    for contrast in EVERY_CONTRAST
    for objective in OBJECTIVES
}

CONTRASTS: dict[str, Callable[..., Tensor]] = {
    f"{name} of {k}": lambda *x, f=function, k=k, **o: f(x[:k], return_components=True, **o).instance
    for name, function in MIXING.items()
    for k in (1, 3)
    if k > 1 or not name.startswith("pairs")  # one modality alone makes no pair
}
CONTRASTS["instance_contrastive_loss"] = lambda x, *_, mask=None, instance_temperature=0.1, **o: (
    instance_contrastive_loss(x, instance_temperature, mask=None if mask is None else mask.any(1), **o)
)


def with_spectrum(sigma: Tensor, B: int, d: int) -> list[Tensor]:
    """k float64 tensors (B, d) whose matrices have the singular values sigma (k,), k <= d."""
    k = len(sigma)
    U = torch.linalg.qr(torch.randn(B, d, k, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(B, k, k, dtype=torch.float64)).Q
    return list((U * sigma @ V.mT).unbind(2))


def almost_equal(k: int, B: int, d: int, departure: float) -> list[Tensor]:
    """Unit vectors with pairwise cosines of about 1 − departure, float64."""
    shared = torch.nn.functional.normalize(torch.randn(B, d, dtype=torch.float64), dim=1)
    noise = [torch.nn.functional.normalize(torch.randn(B, d, dtype=torch.float64), dim=1) for _ in range(k)]
    return [torch.nn.functional.normalize(shared + departure**0.5 * n, dim=1) for n in noise]


def leaves(xs: list[Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(device, dtype).requires_grad_() for x in xs]


def svdvals64(xs: list[Tensor], normalize: bool) -> Tensor:
    """Singular values (B, min(d, k)) of the given inputs' exact values, in float64 on the CPU."""
    Z = torch.stack([x.detach().cpu().double() for x in xs], 2)
    if normalize:
        Z = Z / torch.linalg.vector_norm(Z, dim=1, keepdim=True)
    return torch.linalg.svdvals(Z)


def grads(loss: Tensor, xs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, xs))


def finite(*tensors: Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


def any_bytes(mask: Tensor) -> Tensor:
    """The same mask, with bytes other than 0 and 1."""
    shown = torch.tensor([1, 255, 2, 128], dtype=torch.uint8).repeat(mask.numel())[: mask.numel()].view(mask.shape)
    view = (mask.cpu().to(torch.uint8) * shown).to(mask.device).view(torch.bool)
    assert view.view(torch.uint8).max() == 255
    return view


def negated_view(x: Tensor) -> Tensor:
    """x, as a view whose memory holds −x: what ``.imag`` of a conjugate is, without a copy."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view
