"""Agreement with the reference, reads and writes of every half-precision number, and where rounding takes place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pmrl_kernels import dominant_singular_triplet, dominant_sv_loss, singular_values
from pmrl_kernels.ops.spectral import spec
from tests.tools import tolerances as tol
from tests.tools.backends import operators
from tests.tools.native import DTYPES, HALVES, OPS, awkward, everything, modalities, same_bits, some_mask


def values_and_gradients(xs: list[Tensor], mask: Tensor | None, **options: Any) -> Iterator[Tensor]:
    """Of every function of one instance, one backward pass each."""
    B, d = xs[0].shape
    weights = torch.linspace(0.5, 2.0, B)
    for objective in ("softmax", "leading"):
        tau = torch.tensor(0.3, requires_grad=True)
        loss = dominant_sv_loss(xs, temperature=tau, mask=mask, objective=objective, reduction="none", **options)
        leaves = [*xs, tau] if objective == "softmax" else xs
        yield from (loss, *torch.autograd.grad((loss * weights).sum(), leaves))
    sigma = singular_values(xs, mask=mask, **options)
    yield from (sigma, *torch.autograd.grad((sigma * torch.linspace(1, 2, sigma.shape[1])).sum(), xs))
    sigma, u, v = dominant_singular_triplet(xs, mask=mask, **options)
    total = sigma.sum() + (u * torch.linspace(-1, 1, d)).sum() + (v * torch.linspace(1, 2, v.shape[1])).sum()
    yield from (sigma, u, v, *torch.autograd.grad(total, xs))


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "raw"])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 7, 8, 9, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(dtype, k, normalize):
    """Losses, vectors and gradients, at sizes that are no multiple of a register, of a pack or of a tile."""
    B, d = 21, 83
    mask = some_mask(B, k) if k % 2 else None
    results = (
        values_and_gradients(modalities(k, B, d, dtype), mask, normalize=normalize, backend=backend)
        for backend in ("native", "reference")
    )
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        scale = float(expected.detach().abs().max())
        if found.dtype in HALVES:  # neighbouring numbers, where float64 results straddle the middle
            torch.testing.assert_close(found, expected, rtol=2 * tol.HALF_GRADIENT[dtype], atol=tol.EPS32 * scale)
        elif dtype == torch.float64:  # room for the condition of the spectra
            torch.testing.assert_close(found, expected, rtol=tol.TWO_BACKENDS, atol=tol.TWO_BACKENDS * scale)
        else:  # the same float64 number, rounded; sums over the batch are PyTorch's, in float32
            torch.testing.assert_close(found, expected, rtol=2 * tol.EPS32, atol=tol.TWO_BACKENDS * scale)


@pytest.mark.parametrize("spectrum", [True, False], ids=["softmax", "leading"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "raw"])
@pytest.mark.parametrize("k", [2, 3, 5, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_the_reference_where_it_is_delicate(dtype, k, normalize, spectrum):
    """Ties, zero vectors, full alignment, extreme norms, NaN and Inf; every gradient at once."""
    B = 39
    xs, weights = awkward(k, B, 19, dtype), torch.linspace(0.5, 2.0, B)
    # what rounding is measured by where a result is 0: the norms, and for gradients their reciprocals
    norm = torch.stack(xs).double().nan_to_num(0.0, 0.0, 0.0).abs().amax((0, 2)).clamp_min(1e-300)
    unit = torch.ones(B, dtype=torch.float64) if normalize else norm
    slope = 1 / norm if normalize else 1 + 1 / norm
    for mask in (None, some_mask(B, k)):
        found, expected = (
            everything(xs, mask, normalize, spectrum, weights, ops) for ops in (OPS, operators("reference"))
        )
        units = [unit] * 2 + [torch.ones_like(unit)] * 2 + [unit] * k + [torch.ones_like(unit)] * k + [slope] * 2 * k
        for a, b, scale in zip(found, expected, units, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
            assert torch.equal(a.isnan(), b.isnan())
            scale = scale.view(-1, *[1] * (a.dim() - 1))
            difference = ((a.double() - b.double()).abs() / scale).nan_to_num(0.0, 0.0, 0.0)
            size = (b.double().abs() / scale).nan_to_num(0.0, 0.0, 0.0).flatten(1).amax(1) if a.dim() > 1 else 0
            worst = difference.flatten(1).amax(1) if a.dim() > 1 else difference
            assert (worst <= tol.DELICATE * (1 + size)).all(), (worst / (1 + size)).argmax() % 13


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 x to ``dtype`` in one rounding, ties to even. (PyTorch itself goes through float32.)"""
    digits, least = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}[dtype]
    numbers = x.detach().numpy()
    exponent = np.maximum(np.frexp(numbers)[1] - 1, least) - digits + 1
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(numbers, -exponent)), exponent)).to(dtype)


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every one of the 65536, NaNs, infinities and subnormals among them."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def equal_numbers(found: Tensor, expected: Tensor) -> bool:
    """As values: all NaNs are one, and so are both zeros."""
    return found.dtype == expected.dtype and torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),
        expected.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),
    )  # fmt: skip


def raw_forward(xs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The embeddings as the kernels read them, and a state; nothing is divided by a norm."""
    (_, *z), state = OPS.spectral_forward(xs, None, None, 1.0, False, False, spec.U | spec.Z)
    return z, state


def raw_backward(xs: list[Tensor], state: list[Tensor], h: Tensor | None, H: list[Tensor | None]) -> list[Tensor]:
    """Gradients from those of u and of the embeddings as they were read. H alone is passed on as it is."""
    wanted = spec.U | spec.Z
    return OPS.spectral_backward(xs, None, None, 1.0, False, False, wanted, state, [h, *H], [True] * len(xs))


@pytest.mark.parametrize("company", ["alike", "mixed"])
@pytest.mark.parametrize("d", [1, 13, 64])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_number_is_read_as_it_is(dtype, d, company):
    """In whole registers, in what is left at the end of a row, and beside embeddings of another dtype."""
    numbers = all_numbers(dtype)
    numbers = torch.cat([numbers, numbers[: -len(numbers) % d]]).view(-1, d)
    other = numbers.flip(0) if company == "alike" else torch.ones(numbers.shape)
    z, _ = raw_forward([numbers, other])
    assert equal_numbers(z[0], numbers.float())
    assert equal_numbers(z[1], other.float())
    signs = numbers.float().signbit() == z[0].signbit()
    assert (signs | (numbers == 0) | numbers.isnan()).all()


def to_be_rounded(dtype: torch.dtype, wide: bool) -> Tensor:
    """float64 numbers: all of ``dtype``, all halfway between two, and their neighbours in float64 or float32."""
    numbers = all_numbers(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    overflow = float(numbers[-1] + (numbers[-1] - numbers[-2]) / 2)  # the first that rounds to Inf
    ends = [overflow, -overflow, 1e300 if wide else 3.4e38, torch.inf, -torch.inf, torch.nan, 0.0, -0.0]
    halfway = torch.cat([(numbers[1:] + numbers[:-1]) / 2, torch.tensor(ends, dtype=torch.float64)])
    step = 2.0**-45 if wide else 2.0**-22
    every = torch.cat([numbers, halfway, halfway * (1 + step), halfway * (1 - step)])
    if not wide:
        return every.float().double()
    # less than float32 can tell from the middle, or from zero
    tiny = torch.tensor([1e-46, 1e-60, -1e-60, 5e-324], dtype=torch.float64)
    return torch.cat([every, halfway * (1 + 2.0**-30), tiny])


@pytest.mark.parametrize("wide", [False, True], ids=["from float32", "from float64"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_are_rounded_once(dtype, wide):
    """To even in ties, to Inf beyond the largest, down into the subnormal numbers; NaN stays NaN."""
    H = to_be_rounded(dtype, wide)
    expected = rounded(H, dtype)
    if wide:  # or this test could not tell
        assert not equal_numbers(H.float().to(dtype), expected)
    for d in (1, 13, 64):
        padded = torch.cat([H, H[: -len(H) % d]]).view(-1, d)
        # a float64 embedding beside it makes gradients come in in float64
        xs = [torch.ones(padded.shape, dtype=dtype), torch.ones(padded.shape, dtype=torch.float64 if wide else dtype)]
        _, state = raw_forward(xs)
        incoming = padded if wide else padded.float()
        found, other = raw_backward(xs, state, None, [incoming, incoming])
        assert equal_numbers(found.flatten()[: len(H)], expected)
        assert equal_numbers(other.flatten()[: len(H)], H if wide else expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_nan_stays_one_whatever_its_payload(dtype):
    """Rounded like a number, the largest payload would become a zero."""
    payloads = torch.tensor([2**31 - 1, -1, 0x7F800001, 0x7FC00000, 0x7F80FFFF], dtype=torch.int32).view(torch.float32)
    H = payloads[:, None].expand(5, 11).contiguous()
    xs = [torch.ones(5, 11, dtype=dtype) for _ in range(2)]
    _, state = raw_forward(xs)
    assert all(x.isnan().all() for x in raw_backward(xs, state, None, [H, H]))


@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_that_a_rounding_to_float32_would_move(dtype, k):
    """A middle between two numbers plus 2⁻⁴⁰ of it: after a rounding to float32 it would look like a tie."""
    numbers = all_numbers(dtype).float()
    numbers = numbers[(numbers.abs() > 2.0**-3) & (numbers.abs() < 2.0**4)].unique()
    middle = (numbers[1:] + numbers[:-1]) / 2
    middle = torch.cat([middle, middle])
    tiny = middle * 2.0**-40
    tiny[: len(tiny) // 2] *= -1
    B = len(middle)
    expected = rounded(middle.double() + tiny.double(), dtype)
    assert not torch.equal(expected, rounded(middle.double(), dtype))
    # the first embedding is u itself, so what is across it comes through with factor 1
    xs = [torch.zeros(B, 10, dtype=dtype) for _ in range(k)]
    xs[0][:, 0] = 1.0
    _, state = raw_forward(xs)
    h, H = torch.zeros(B, 10), torch.zeros(B, 10)
    h[:, 1:], H[:, 1:] = tiny[:, None], middle[:, None]
    found = raw_backward(xs, state, h, [H, *[None] * (k - 1)])
    assert torch.equal(found[0][:, 1:], expected[:, None].expand(B, 9))
    assert not any(x.any() for x in found[1:])


@pytest.mark.parametrize(("dtype", "B"), [(torch.bfloat16, 8192), (torch.float16, 1024)], ids=str)
def test_losses_gradients_are_rounded_once(dtype, B):
    """Of enough numbers that rounding through float32 would show."""
    xs = [x.detach() for x in modalities(4, B, 64, dtype)]
    weights = 2.0 ** torch.arange(B).remainder(12)
    grads = []
    for leaves in (xs, [x.double() for x in xs]):
        leaves = [x.requires_grad_() for x in leaves]
        loss = dominant_sv_loss(leaves, temperature=0.5, reduction="none", backend="native")
        grads.append(torch.stack(torch.autograd.grad(loss, leaves, weights.to(loss.dtype))))
    found, exact = grads
    noise = tol.NOISE_64 * exact.abs().amax((0, 2), keepdim=True)
    assert (found >= rounded(exact - noise, dtype)).all()
    assert (found <= rounded(exact + noise, dtype)).all()
    assert (exact.float().to(dtype) != rounded(exact, dtype)).any()  # or this test could not tell


MIXED = [
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float16),
    (torch.float64, torch.bfloat16, torch.float32, torch.float16),
]


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "raw"])
@pytest.mark.parametrize("dtypes", MIXED, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
def test_mixed_dtypes_are_the_upcast_computation(dtypes, normalize):
    """Under autocast, with each gradient rounded to its dtype once."""
    xs = [x.detach().to(dtype) for x, dtype in zip(modalities(len(dtypes), 64, 35), dtypes, strict=True)]
    mask = some_mask(64, len(dtypes))
    results = []
    for leaves in (xs, [x.double() for x in xs]):
        leaves = [x.requires_grad_() for x in leaves]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(list(values_and_gradients(leaves, mask, normalize=normalize, backend="native")))
    for found, exact in zip(*results, strict=True):
        noise = tol.NOISE_64 * exact.abs().max()
        if found.dtype == torch.float64:
            assert ((found - exact).abs() <= noise).all()
        elif found.dim():  # the gradient of the temperature is a float32 sum over all instances
            assert (found >= rounded(exact - noise, found.dtype)).all()
            assert (found <= rounded(exact + noise, found.dtype)).all()


@pytest.mark.parametrize("spectrum", [True, False], ids=["softmax", "leading"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "raw"])
def test_powers_of_two_come_out_as_they_went_in(normalize, spectrum):
    """float64 embeddings at every scale: their squares leave float64's range, and then they are scaled exactly."""
    xs = [x.detach() for x in modalities(4, 9, 19, torch.float64)]

    def values(power: int) -> list[Tensor]:
        leaves = [(x * 2.0**power).requires_grad_() for x in xs]
        found = [singular_values(leaves, normalize=normalize, backend="native")] if spectrum else []
        found += [] if spectrum else dominant_singular_triplet(leaves, normalize=normalize, backend="native")[:2]
        total = sum((x * torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)).sum() for x in found)
        homogeneous = power * (not normalize)  # u and the gradient of sigma stay, what is normalised shrinks
        grads = torch.autograd.grad(total if normalize else found[0].sum(), leaves)
        return [found[0] * 2.0**-homogeneous, *found[1:], *(g * 2.0 ** (power - homogeneous) for g in grads)]

    expected = values(0)
    for power in (-1000, -700, -520, -505, -300, -160, -140, 140, 160, 300, 505, 520, 700, 1000):
        for found, wanted in zip(values(power), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=tol.NOISE_64, atol=tol.NOISE_64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_temperature_tensor_is_its_number(dtype):
    """Of any dtype, to the last bit, and its gradient comes back in that dtype."""
    xs = modalities(3, dtype=torch.float64)
    tau = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    found = dominant_sv_loss(xs, temperature=tau, backend="native")
    assert same_bits([found], [dominant_sv_loss(xs, temperature=tau.item(), backend="native")])
    assert torch.autograd.grad(found, tau)[0].dtype == dtype


def test_flushing_subnormal_numbers_does_no_harm():
    """``torch.set_flush_denormal(True)`` changes the processor's arithmetic for this library too."""
    xs = modalities(4, 33, 65)
    small = [x.detach().mul(1e-39).requires_grad_() for x in xs]  # subnormal, and read as zeros then
    expected = dominant_sv_loss(xs, backend="native")
    gradients = torch.autograd.grad(expected, xs)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        found = dominant_sv_loss(xs, backend="native")
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, xs), gradients)
        for dtype in DTYPES:
            leaves = [x.detach().to(dtype).requires_grad_() for x in small]
            loss = dominant_sv_loss(leaves, backend="native")
            assert loss.isfinite()
            torch.autograd.grad(loss, leaves)
    finally:
        torch.set_flush_denormal(False)
