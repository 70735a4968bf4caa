"""The w of the spectral op, and all gradients beside theirs, by every backend's operators against the reference's."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pmrl_kernels.ops import resolve
from pmrl_kernels.ops.spectral import SPECTRAL, spec

WANTED = {
    "w": spec.W,
    "z and w": spec.ALIGNMENT_MEAN | spec.Z | spec.W,
    "u and w": spec.U | spec.W,
    "v and w": spec.V | spec.W,
    "all": spec.ALIGNMENT | spec.SIGMA | spec.U | spec.V | spec.Z | spec.W,
}
SCALES = {torch.float32: (1.0, 1e-20, 1e18), torch.float64: (1.0, 1e-150, 1e160), torch.bfloat16: (1.0,)}
CASES = [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales]
MODALITIES = (1, 2, 3, 5, 8, 11)


def computed(
    backend: str, xs: list[Tensor], mask: Tensor | None, options: tuple[Any, ...], missing: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients for incoming ones that are the same for everyone; of the w only some, if ``missing``."""
    first = xs[0]
    k, d = (first.shape[1] if first.dim() == 3 else len(xs)), first.shape[-1]
    pair = resolve(SPECTRAL, backend, first.device, first.dtype, k, d)
    outputs, state = pair.forward(xs, mask, None, 0.3, *options)
    generator = torch.Generator().manual_seed(7)
    incoming: list[Tensor | None] = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs
    ]
    if missing:
        incoming[-1] = None
        incoming[:-k] = [None] * len(incoming[:-k])
    needed = [True] * len(xs)
    found = pair.backward(xs, mask, None, 0.3, *options, state, incoming, needed)
    return outputs, found


def agree(
    ours: tuple[list[Tensor], list[Tensor]], theirs: tuple[list[Tensor], list[Tensor]], dtype: Any, size: float = 1.0
) -> None:
    """Up to rounding of what is as large as the largest number, or as terms of gradients by embeddings of that size."""
    eps = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for one, other, rounding, term in ((ours[0], theirs[0], 1e-6, 0.0), (ours[1], theirs[1], eps, 1 / size)):
        tolerance = 1e-11 if dtype == torch.float64 else rounding
        least = max(term, *(float(t.abs().max()) for t in other))
        for x, y in zip(one, other, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * least)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("k", MODALITIES)
@pytest.mark.parametrize(("dtype", "scale"), CASES)
def test_agrees_with_the_reference(backend, device, wanted, k, dtype, scale):
    number = zlib.crc32(f"{wanted} {k} {dtype} {scale}".encode())  # other options by chance, the same each time
    normal, spectrum, masked, stacked, missing = (bool(number >> bit & 1) for bit in range(5, 10))
    base = torch.randn(5, 1, 13, dtype=torch.float64) + 0.7 * torch.randn(5, k, 13, dtype=torch.float64)
    x = (base * scale).to(device, dtype)
    xs = [x] if stacked else [y.contiguous() for y in x.unbind(1)]
    mask = None
    if masked:
        mask = torch.rand(5, k, device=device) < 0.7
        mask[0] = True
    options = (normal, spectrum, WANTED[wanted])
    ours = computed(backend, xs, mask, options, missing and k > 1)
    agree(ours, computed("reference", xs, mask, options, missing and k > 1), dtype, scale)


@pytest.mark.parametrize("kind", ["orthonormal", "one orthogonal", "equal", "cancelling", "zero"])
@pytest.mark.parametrize("spectrum", [True, False], ids=["spectrum", "leading"])
@pytest.mark.parametrize("k", [3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_where_something_is_zero(backend, device, kind, spectrum, k, dtype):
    """Entries of v₁, sums of others, columns: what rounding makes of these has no say."""
    e = torch.eye(12, dtype=torch.float64)
    shared = normalize(torch.randn(4, 12, dtype=torch.float64), dim=1)
    rows = {
        "orthonormal": [e[m].repeat(4, 1) for m in range(k)],
        "one orthogonal": [e[0].repeat(4, 1)] + [e[1] + 0.5 * e[2] * m + torch.zeros(4, 1) for m in range(1, k)],
        "equal": [shared] * k,
        "cancelling": [shared, -shared] + [e[m].repeat(4, 1) * 0.0 for m in range(k - 2)],
        "zero": [shared, shared + e[1], *(shared * 0.0 for _ in range(k - 2))],
    }[kind]
    xs = [x.to(device, dtype).contiguous() for x in rows]
    options = (True, spectrum, spec.Z | spec.W)
    ours, theirs = (computed(name, xs, None, options, False) for name in (backend, "reference"))
    assert all(x.isfinite().all() for x in ours[1])
    agree(ours, theirs, dtype)
