"""What the native backend promises beyond the contract of all backends.

Every instruction set, reads and writes of every half-precision number, bits that depend neither on neighbours nor
on threads, no copies, operators that survive nonsense, and headers that compile as device code.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import contrasts
import numpy as np
import pytest
import tolerances as tol
import torch
from torch import Tensor

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_sv_loss,
    ops,
    pmrl_loss,
    singular_values,
)
from pmrl_kernels.ops import constants, native

if "native" not in ops.available:
    pytest.skip(f"no native backend here: {ops.unavailable_reasons['native']}", allow_module_level=True)

HERE = Path(__file__)
ROOT = HERE.parent.parent
OPS = torch.ops.pmrl_kernels
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)
ALL = constants.ALIGNMENT | constants.SIGMA | constants.U | constants.V | constants.Z

COMPILED = native.build_info["compiled"].split()
RUNS_HERE = [isa for isa in COMPILED if not isa.endswith("(-)")]
OTHERS = [isa for isa in RUNS_HERE if isa != native.build_info["isa"]]


def run(*arguments: str, isa: str | None = None, timeout: int = 60) -> subprocess.CompletedProcess[str]:
    """Another Python process, in which PMRL_KERNELS_ISA is ``isa`` and no backend is preset."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PMRL_KERNELS")}
    if isa is not None:
        environment["PMRL_KERNELS_ISA"] = isa
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def modalities(k: int = 3, B: int = 9, d: int = 21, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Embeddings that share something."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(B, d, generator=generator)
    return [(shared + torch.randn(B, d, generator=generator)).to(dtype).requires_grad_() for _ in range(k)]


def some_mask(B: int, k: int) -> Tensor:
    """Every instance lacks another selection of modalities, one of them all."""
    return torch.rand(B, k, generator=torch.Generator().manual_seed(1)) > 0.3


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Bit by bit, signs of zeros included; NaN payloads apart."""

    def bits(x: Tensor) -> Tensor:
        x = x.detach().masked_fill(x.isnan(), torch.nan).contiguous()
        return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])

    return all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------
# Instruction sets
# ------------------------------------------------------------------------------------------------


def test_the_instruction_set_is_the_one_asked_for():
    """With none asked for the best there is; in the processes started below the one they were given."""
    asked = os.environ.get("PMRL_KERNELS_ISA") or RUNS_HERE[0]
    assert native.build_info["isa"] == asked
    assert "baseline" in RUNS_HERE


def passed(done: subprocess.CompletedProcess[str]) -> int:
    """How many tests a pytest process passed; an error unless that is all it ran."""
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, f"{last}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert "failed" not in last
    found = re.search(r"(\d+) passed", last)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("isa", OTHERS)
def test_arithmetic_on_every_instruction_set(isa):
    """Those tests of this file that take arithmetic apart, by another instruction set in another process."""
    names = [
        "test_the_instruction_set_is_the_one_asked_for",
        "test_every_half_precision_number_is_read_as_it_is",
        "test_gradients_are_rounded_once",
        "test_sums_that_a_rounding_to_float32_would_move",
        *(f"test_agrees_with_the_reference[{dtype}-{k}-normalize]" for dtype in DTYPES for k in (2, 5, 9)),
    ]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"{HERE}::{name}" for name in names), isa=isa)
    assert passed(done) == 1 + 12 + 4 + 8 + 12


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_contract_on_every_instruction_set(isa, sampled):
    """The whole suite of the native backend, for those that this process does not run on."""
    done = run(
        *("-m", "pytest", str(HERE.parent), "-q", "-p", "no:cacheprovider", "-m", "not slow"),
        *("-k", "native and not every_instruction_set", *sampled(1, "--every")),
        isa=isa,
        timeout=1200,
    )
    assert passed(done) > 200


FALLBACK = """
import json, torch
from pmrl_kernels import ops, dominant_sv_loss, info
x = torch.eye(3)
loss = dominant_sv_loss(x, x).item()
try:
    dominant_sv_loss(x, x, backend="native")
    error = None
except RuntimeError as caught:
    error = str(caught)
resolved = ops.resolve(None, torch.device("cpu"), torch.float32, 2, 3)
reason = ops.unavailable_reasons["native"]
print(json.dumps([list(ops.available), reason, resolved, loss, error, info.report()]))
"""


@pytest.mark.parametrize("isa", ["sse9", *(name[:-3] for name in COMPILED if name.endswith("(-)"))])
def test_an_instruction_set_that_cannot_run(isa):
    """No native backend then, with a reason; the reference takes over unless "native" is asked for by name."""
    done = run("-c", FALLBACK, isa=isa)
    assert done.returncode == 0, done.stderr
    available, reason, resolved, loss, error, report = json.loads(done.stdout)
    assert "native" not in available
    assert resolved == "reference"
    x = torch.eye(3)
    assert loss == pytest.approx(dominant_sv_loss(x, x, backend="reference").item())
    wanted = RUNS_HERE if isa not in COMPILED else ["this processor does not have"]
    for part in ("PMRL_KERNELS_ISA", f"'{isa}'", *wanted):
        assert part in reason
        assert part in error
        assert part in report


def test_an_empty_variable_asks_for_nothing():
    done = run("-c", "from pmrl_kernels.ops import native; print(native.build_info['isa'])", isa="")
    assert done.stdout.split() == [RUNS_HERE[0]]


# ------------------------------------------------------------------------------------------------
# Arithmetic
# ------------------------------------------------------------------------------------------------


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


def everything(
    xs: list[Tensor], mask: Tensor | None, normalize: bool, spectrum: bool, weights: Tensor, ops: Any = OPS
) -> list[Tensor]:
    """All outputs and, from gradients of all of them and of the first alone, all gradients: a row per instance."""
    options = (xs, mask, None, 0.3, normalize, spectrum, ALL)
    outputs, state = ops.spectral_forward(*options)
    first = weights.to(outputs[0].dtype)
    rest = [first[:, None] * torch.linspace(0.5, 1.0, x.shape[1], dtype=first.dtype) for x in outputs[1:]]
    needed = [True] * len(xs)
    grads = ops.spectral_backward(*options, state, [first, *rest], needed)
    plain = ops.spectral_backward(*options, state, [first, *(None for _ in rest)], needed)
    return [*outputs, *grads, *plain]


@pytest.mark.parametrize("rows", [1, 31, 33, 192, 1447, 1449, 2047, 2048, 2049])
def test_states_of_contrasts_are_as_large_as_their_fakes(rows):
    """What is kept for the backward pass, and up to how many similarities, is written in two languages."""
    u = torch.nn.functional.normalize(torch.randn(rows, 3), dim=1)
    for columns in (None, torch.cat([u, u[:1]])):
        arguments = (u, columns, 0, None, 0.5)
        assert OPS.instance_forward(*arguments)[2].shape == native._instance_forward_shapes(*arguments)[2].shape
    for z, columns in (([u], []), ([u, u], []), ([u], [u, u])):
        arguments = (z, u, None, columns, None, 0, False, None, 0.5)
        assert OPS.modality_forward(*arguments)[2].shape == native._modality_forward_shapes(*arguments)[2].shape


def test_operators_read_masks_of_any_bytes():
    """They may be called with what inputs.py has not read: a mask's bytes are 0 or not."""
    xs, mask = [x.detach() for x in modalities(4, 37, 19, torch.float32)], some_mask(37, 4)
    odd = (mask.to(torch.uint8) * 255).view(torch.bool)
    weights = torch.linspace(0.5, 2.0, 37)
    for a, b in zip(*(everything(xs, m, True, True, weights) for m in (mask, odd)), strict=True):
        assert torch.equal(a, b)
    u, *z = (torch.nn.functional.normalize(x) for x in [xs[0], *xs])
    for raw, columns in itertools.product((False, True), ([], [u, *z])):
        found = []
        for m in (mask, odd):
            given = (z, u, None if columns else m, columns, m if columns else None, 0, raw, None, 0.1)
            loss, losses, state = OPS.modality_forward(*given)
            gradients, h, _ = OPS.modality_backward(*given, losses, state, torch.ones(()))
            found.append([loss, losses, h, *(g.masked_fill(~mask[:, j, None], 0) for j, g in enumerate(gradients))])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


def awkward(k: int, B: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Instances of all kinds side by side: random, aligned, tied, antipodal, zero, huge, tiny, NaN and Inf."""
    xs = [x.detach().double() for x in modalities(k, B, d)]
    for i in range(B):
        kind = i % 13
        for m, x in enumerate(xs):
            if kind == 1:
                x[i] = xs[0][i]
            elif kind == 2:
                x[i] = torch.eye(d, dtype=torch.float64)[m % d]
            elif kind == 3:
                x[i] = xs[0][i] * (-1) ** m
            elif kind == 4 or (kind == 5 and m == k - 1):
                x[i] = 0.0
            elif kind in (6, 7):
                x[i] *= {torch.float64: 1e160, torch.float16: 100.0}.get(dtype, 1e18) ** (1 if kind == 6 else -1)
            elif kind == 8 and m == i % k:
                x[i, -1] = torch.nan
            elif kind == 9 and m == i % k:
                x[i, 0] = torch.inf
            elif kind == 10:
                x[i] = xs[0][i] + 1e-4 * x[i]
    return [x.to(dtype) for x in xs]


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
            everything(xs, mask, normalize, spectrum, weights, ops) for ops in (OPS, ops.reference.operators)
        )
        units = [unit] * 2 + [torch.ones_like(unit)] * 2 + [unit] * k + [slope] * 2 * k
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
    z, state = OPS.spectral_forward(xs, None, None, 1.0, False, False, constants.Z)
    return z, state


def raw_backward(xs: list[Tensor], state: list[Tensor], h: Tensor | None, H: list[Tensor | None]) -> list[Tensor]:
    """Gradients from those of u and of the embeddings as they were read. H alone is passed on as it is."""
    wanted = constants.U | constants.Z
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


# ------------------------------------------------------------------------------------------------
# Bits
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", [True, False], ids=["softmax", "leading"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "raw"])
@pytest.mark.parametrize(
    ("k", "dtype"),
    [(2, torch.float32), (3, torch.float64), (4, torch.float16), (8, torch.bfloat16), (9, torch.float32)],
)
def test_an_instance_has_the_same_bits_in_any_batch(k, dtype, normalize, spectrum):
    """Alone, in batches of any size and at any position, whatever its neighbours are; forward and backward."""
    xs, mask = awkward(k, 100, 19, dtype), some_mask(100, k)
    weights = torch.linspace(-1.0, 2.0, 100)

    def rows(selection: Sequence[int]) -> list[Tensor]:
        chosen = list(selection)
        return everything([x[chosen] for x in xs], mask[chosen], normalize, spectrum, weights[chosen])

    whole = rows(range(100))
    generator = torch.Generator().manual_seed(0)
    selections = [[i] for i in range(26)]  # alone, each kind on both sides of the mask
    selections += [torch.randint(100, (n,), generator=generator).tolist() for n in (7, 8, 9) * 5]
    selections += [torch.randperm(100, generator=generator).tolist()]
    for chosen in selections:
        assert same_bits(rows(chosen), [x[chosen] for x in whole])


@pytest.mark.parametrize("spectrum", [True, False], ids=["softmax", "leading"])
@pytest.mark.parametrize(("k", "dtype"), [(3, torch.float32), (4, torch.float64), (9, torch.bfloat16)])
def test_what_absent_embeddings_hold_changes_no_bit(k, dtype, spectrum):
    """It is never read, not even to be multiplied by zero."""
    xs, mask = [x.detach() for x in modalities(k, 50, 19, dtype)], some_mask(50, k)
    weights = torch.linspace(-1.0, 2.0, 50)
    expected = everything(xs, mask, True, spectrum, weights)
    for rubbish in (torch.nan, torch.inf, 3e38):
        spoilt = [x.masked_fill(~mask[:, m, None], rubbish) for m, x in enumerate(xs)]
        assert same_bits(everything(spoilt, mask, True, spectrum, weights), expected)
    strided = mask.repeat_interleave(2, 1)[:, ::2]
    assert same_bits(everything(xs, strided, True, spectrum, weights), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_change_no_bit(dtype):
    """The gradient of a temperature, a sum over the batch, included."""
    xs = [x.detach() for x in modalities(4, 1003, 64, dtype)]
    mask = some_mask(1003, 4)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in xs]
            tau = torch.tensor(0.3, requires_grad=True)
            losses = dominant_sv_loss(leaves, temperature=tau, mask=mask, reduction="none", backend="native")
            u = dominant_singular_triplet(leaves, mask=mask, backend="native").u
            grads = torch.autograd.grad(losses.sum() + (u * torch.arange(64)).sum(), [*leaves, tau])
            results.append([losses, u, *grads])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert same_bits(result, results[0])


def test_python_threads_do_not_disturb_one_another():
    """Eight at once, on different inputs of different shapes and dtypes."""

    def work(seed: int) -> list[Tensor]:
        xs = modalities(2 + seed % 8, 50 + seed, 17 + seed, DTYPES[seed % 4], seed)
        loss = pmrl_loss(xs, backend="native")
        sigma = singular_values(xs, backend="native")
        return [loss, sigma, *torch.autograd.grad(loss + sigma.sum(), xs)]

    alone = [work(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(work, range(16)), alone, strict=True):
                assert same_bits(found, expected)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stack_is_its_modalities(dtype, k):
    """One (B, k, d) tensor, in any layout with contiguous rows, gives the bits of k tensors; its gradient is one."""
    xs = [x.detach() for x in modalities(k, 11, 13, dtype)]
    stacks = {
        "contiguous": torch.stack(xs, 1),
        "modalities first": torch.stack(xs).transpose(0, 1),
        "part of a larger one": torch.stack([x.clone() for x in [*xs, xs[0]]], 1)[:, :k],
    }
    for objective in ("softmax", "leading"):
        leaves = [x.clone().requires_grad_() for x in xs]
        expected = dominant_sv_loss(leaves, objective=objective, reduction="none", backend="native")
        gradients = torch.autograd.grad(expected.sum(), leaves)
        for stack in stacks.values():
            stack = stack.detach().requires_grad_()
            found = dominant_sv_loss(stack, objective=objective, reduction="none", backend="native")
            assert same_bits([found], [expected])
            (gradient,) = torch.autograd.grad(found.sum(), stack)
            assert gradient.is_contiguous()
            assert same_bits(gradient.unbind(1), gradients)


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


class Allocations:
    """Bytes that PyTorch's CPU allocator handed out while a function ran."""

    def __init__(self, function: Callable[[], Any]) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.result = function()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.peak = max(np.cumsum([0, *sizes]))
        self.sizes = sorted(size for size in sizes if size > 0)


def forward_and_backward(xs: list[Tensor], **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        return torch.autograd.grad(dominant_sv_loss(xs, backend="native", **options), xs)

    call()  # what is allocated once in a process
    return call


@pytest.fixture
def unpoisoned() -> Iterator[None]:
    """Filling memory with NaN allocates nothing, but runs operators that a profile need not show."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


B, D, K = 1024, 1024, 4
STATE = 8 * (B + 15) * (K * K + 4 * K)  # float64: eigenvectors, eigenvalues, v₁, norms, exponents
SMALL = 64 * B * K  # outputs, and whatever else has one number per instance or modality


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "leading": {"objective": "leading"},
    "raw": {"normalize": False},
    "masked": {"mask": some_mask(B, K)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nothing_of_the_embeddings_size_is_allocated_but_gradients(dtype, options, unpoisoned):
    """Forward and backward together, at the peak."""
    xs = modalities(K, B, D, dtype)
    gradients = sum(x.nbytes for x in xs)
    found = Allocations(forward_and_backward(xs, **options))
    assert gradients <= found.peak <= gradients + STATE + SMALL
    forward = Allocations(lambda: dominant_sv_loss(xs, backend="native", **options))
    assert forward.peak <= STATE + SMALL


LAYOUTS: dict[str, Callable[[int], list[Tensor]]] = {
    "columns of one tensor": lambda d: list(torch.randn(B, K * d).split(d, 1)),
    "every second row": lambda d: [torch.randn(2 * B, d)[::2] for _ in range(K)],
    "columns that start anywhere": lambda d: [torch.randn(B, d + 64)[:, m : d + m] for m in range(K)],
    "one row for all": lambda d: [torch.randn(d).expand(B, d) for _ in range(K)],
    "a stack": lambda d: [torch.randn(B, K, d)],
    "a stack, modalities first": lambda d: [torch.randn(K, B, d).transpose(0, 1)],
    "a stack, expanded": lambda d: [torch.randn(B, 1, d).expand(B, K, d)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_with_contiguous_rows_are_read_in_place(layout, unpoisoned):
    d = 512
    xs = [x.requires_grad_() for x in LAYOUTS[layout](d)]
    found = Allocations(forward_and_backward(xs))
    gradients = 4 * B * K * d
    assert gradients <= found.peak <= gradients + STATE + SMALL
    copies = [x.detach().contiguous().requires_grad_() for x in xs]
    assert same_bits(found.result, forward_and_backward(copies)())


def test_a_tensor_without_contiguous_rows_is_copied_alone(unpoisoned):
    xs = [x.detach() for x in modalities(K, B, D)]
    xs[2] = xs[2].t().contiguous().t()
    xs = [x.requires_grad_() for x in xs]
    one = 4 * B * D
    found = Allocations(forward_and_backward(xs))
    assert found.peak <= 5 * one + STATE + SMALL
    # one copy for the forward pass, one for the backward pass, and four gradients
    assert [size for size in found.sizes if size >= one / 2] == [one] * 6
    copies = [x.detach().contiguous().requires_grad_() for x in xs]
    assert same_bits(found.result, forward_and_backward(copies)())


def test_gradients_that_nobody_asked_for_are_not_made(unpoisoned):
    xs = [x.detach() for x in modalities(K, B, D)]
    xs[1].requires_grad_()
    loss = dominant_sv_loss(xs, backend="native")
    found = Allocations(lambda: torch.autograd.grad(loss, xs[1]))
    assert found.peak <= 4 * B * D + SMALL


# ------------------------------------------------------------------------------------------------
# Operators: opcheck, torch.compile, and nonsense
# ------------------------------------------------------------------------------------------------


def forward_samples() -> Iterator[tuple[Any, ...]]:
    """Arguments of spectral_forward: every flag both ways, forms, dtypes, masks and temperatures."""
    tau = torch.tensor(0.5)
    xs = [x.detach() for x in modalities(3, 9, 5)]
    yield xs, None, None, 0.5, True, True, constants.ALIGNMENT_MEAN
    yield xs, some_mask(9, 3), tau, 1.0, False, False, ALL
    yield xs, some_mask(9, 3), tau, 1.0, False, True, constants.ALIGNMENT_SUM
    yield [x.half() for x in xs], some_mask(9, 3), tau.half(), 1.0, False, True, ALL - constants.Z
    yield [x.double() for x in xs], some_mask(9, 3), tau.double(), 1.0, True, True, ALL
    yield [x.double() for x in xs], None, None, 0.5, False, True, constants.SIGMA | constants.Z
    yield [xs[0].double(), xs[1].bfloat16(), xs[2].half()], None, None, 0.5, True, False, ALL
    yield [x[:4, :2] for x in xs], some_mask(4, 6)[:, ::2], tau, 1.0, True, True, ALL - constants.V
    yield [torch.stack(xs, 1)], some_mask(9, 3), tau, 1.0, True, True, ALL
    yield [torch.stack(xs, 2).transpose(1, 2).bfloat16()], None, None, 0.5, True, False, constants.U
    yield [x[:0] for x in xs], None, None, 0.5, True, True, ALL
    yield [x[:0] for x in xs], None, tau, 1.0, True, True, constants.ALIGNMENT_MEAN
    yield xs[:1], None, None, 0.5, True, True, ALL
    yield [x[:, ::2] for x in xs], None, None, 0.5, True, True, ALL


def backward_samples() -> Iterator[tuple[Any, ...]]:
    """Arguments of spectral_backward: all gradients at once, one at a time, and for some embeddings only."""
    for index, sample in enumerate(forward_samples()):
        outputs, state = OPS.spectral_forward(*sample)
        n, grads = len(sample[0]), [x.exp() for x in outputs]
        yield *sample, state, grads, [True] * n
        if index == 1:
            for only in range(len(grads)):
                some = [x if i == only else None for i, x in enumerate(grads)]
                yield *sample, state, some, [m == only for m in range(n)]
            yield *sample, state, [None if i == 4 else x for i, x in enumerate(grads)], [False] * n


SAMPLES = {
    "spectral_forward": forward_samples,
    "spectral_backward": backward_samples,
    **contrasts.samples(OPS),
}
CHECKED = [(op, sample) for op, make in SAMPLES.items() for sample in make()]


@pytest.mark.parametrize(("op", "sample"), CHECKED, ids=[f"{op}-{i}" for i, (op, _) in enumerate(CHECKED)])
def test_opcheck(op, sample):
    """Schema, aliasing and mutation, fake against real outputs, and tracing with dynamic shapes."""
    result = torch.library.opcheck(getattr(OPS, op).default, sample)
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_of_the_library_is_checked():
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "pmrl_kernels::" in name}
    assert names == {*SAMPLES, "build_info"}


LOSSES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "dominant_sv_loss": (dominant_sv_loss, 1),
    "pmrl_loss": (pmrl_loss, 2),
}


@pytest.mark.parametrize("objective", ["softmax", "leading"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_graphs_hold_the_operators_and_no_decomposition(name, objective):
    """One graph forward and one backward, whose calls are seen; nothing of torch.linalg is left in them."""
    from functorch.compile import make_boxed_func  # slow to import, and needed here alone
    from torch._dynamo.backends.common import aot_autograd

    function, calls = LOSSES[name]
    graphs: list[list[str]] = []

    def collect(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    try:
        compiled = torch.compile(function, backend=aot_autograd(fw_compiler=collect), fullgraph=True)
        xs = modalities()
        loss = compiled(*xs, objective=objective, backend="native")
        gradients = torch.autograd.grad(loss, xs)
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 2
    for graph, operator in zip(graphs, ("spectral_forward", "spectral_backward"), strict=True):
        ours = [target for target in graph if "pmrl" in target]
        assert ours.count(f"pmrl_kernels.{operator}.default") == 1
        assert len(ours) == calls
        assert not [target for target in graph if re.search("eigh|linalg|svd|bmm|while", target)]
    expected = function(*(y := modalities()), objective=objective, backend="native")
    torch.testing.assert_close(loss, expected)
    assert same_bits(gradients, torch.autograd.grad(expected, y)) or name == "pmrl_loss"


FENCED = """
import ctypes, itertools, mmap
import torch
import pmrl_kernels

OPS = torch.ops.pmrl_kernels
ALL = 1 + 8 + 16 + 32 + 64
protect = ctypes.CDLL(None).mprotect
kept = []

def fenced(x):
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    kept.append(memory)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert protect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return copy.view(x.shape).copy_(x)

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
for dtype, k, d in itertools.product(DTYPES, (1, 2, 4, 7, 9), (1, 2, 3, 5, 7, 8, 9, 15, 17, 33)):
    xs = [fenced(torch.randn(9, d).to(dtype)) for _ in range(k)]
    if k == 7:
        xs[0] = fenced(torch.randn(9, d))  # mixed
    mask, tau = fenced(torch.rand(9, k) > 0.2), fenced(torch.tensor(0.5))
    for spectrum, normalize in ((True, True), (False, False)):
        settings = xs, mask, tau, 1.0, normalize, spectrum, ALL
        outputs, state = OPS.spectral_forward(*settings)
        grads, state = [fenced(x) for x in outputs], [fenced(x) for x in state]
        OPS.spectral_backward(*settings, state, grads, [True] * k)
        OPS.spectral_backward(*settings, state, [grads[0], *(None for _ in grads[1:])], [True] * k)
print("fine")
"""


@pytest.mark.parametrize("isa", [None, *(pytest.param(isa, marks=pytest.mark.slow) for isa in OTHERS)])
def test_no_byte_beyond_a_tensor_is_read(isa):
    """Every input ends where memory that nobody may touch begins."""
    done = run("-c", FENCED, isa=isa)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


# What callers that go around the package's own checks may pass. Each in a process of its own, since the wrong
# answer to most is to read memory that is not there.
SANE = """
import os, sys, torch
import pmrl_kernels
OPS = torch.ops.pmrl_kernels
torch.set_num_threads(1)
B, d = 20, 7
x = [torch.randn(B, d) for _ in range(3)]
ALL = 1 + 8 + 16 + 32 + 64

def forward(xs=x, mask=None, tau=None, wanted=ALL):
    return OPS.spectral_forward(xs, mask, tau, 0.5, True, True, wanted)

state = forward()[1]

fewer = forward(x[:2])[1]

def backward(state=state, alignment=None, sigma=None, u=None, v=None, z=(None,) * 3, needed=(True,) * 3, wanted=ALL):
    return OPS.spectral_backward(
        x, None, None, 0.5, True, True, wanted, state, [alignment, sigma, u, v, *z], list(needed))
"""
NONSENSE = {
    "no embeddings": "forward([])",
    "other rows": "forward([x[0], x[1][:5], x[2]])",
    "other columns": "forward([x[0], x[1][:, :5], x[2]])",
    "a stack beside a matrix": "forward([torch.ones(B, 3, d), x[0]])",
    "a matrix beside a stack": "forward([x[0], torch.ones(B, 3, d)])",
    "no dimension": "forward([torch.tensor(1.0)])",
    "one dimension": "forward([torch.ones(d)])",
    "four dimensions": "forward([torch.ones(2, 2, 2, 2)])",
    "33 embeddings": "forward([x[0]] * 33)",
    "33 in a stack": "forward([torch.ones(B, 33, d)])",
    "0 in a stack": "forward([torch.ones(B, 0, d)])",
    "integers": "forward([torch.ones(B, d, dtype=torch.int64)] * 3)",
    "complex numbers": "forward([torch.ones(B, d, dtype=torch.complex64)] * 3)",
    "eight bits": "forward([torch.ones(B, d).to(torch.float8_e4m3fn)] * 3)",
    "a sparse embedding": "forward([x[0].to_sparse(), x[1], x[2]])",
    "a mask of floats": "forward(mask=torch.ones(B, 3))",
    "a mask of another size": "forward(mask=torch.ones(B, 2, dtype=torch.bool))",
    "a transposed mask": "forward(mask=torch.ones(3, B, dtype=torch.bool))",
    "a mask in one dimension": "forward(mask=torch.ones(B, dtype=torch.bool))",
    "a temperature without elements": "forward(tau=torch.ones(0))",
    "temperatures": "forward(tau=torch.ones(3))",
    "no state": "backward(state=[])",
    "two states": "backward(state=[state[0], state[0]])",
    "a short state": "backward(state=[state[0][:5]])",
    "a state in float32": "backward(state=[state[0].float()])",
    "a state in bytes": "backward(state=[state[0].to(torch.int8)])",
    "a state without storage": "backward(state=[state[0][:1, :1].expand(state[0].shape)])",
    "a state of fewer modalities": "backward(state=fewer)",
    "too few needed": "backward(needed=[True])",
    "too many needed": "backward(needed=[True] * 4)",
    "alignment in float64": "backward(alignment=torch.ones(B, dtype=torch.float64))",
    "alignment of fewer instances": "backward(alignment=torch.ones(2))",
    "alignment of none": "backward(alignment=torch.ones(0))",
    "alignment as a scalar": "backward(alignment=torch.ones(()))",
    "sigma of fewer instances": "backward(sigma=torch.ones(2, 3))",
    "sigma of fewer values": "backward(sigma=torch.ones(B, 1))",
    "sigma in one dimension": "backward(sigma=torch.ones(B))",
    "u of fewer instances": "backward(u=torch.ones(2, d))",
    "u of fewer columns": "backward(u=torch.ones(B, 2))",
    "u in one dimension": "backward(u=torch.ones(B))",
    "u in bfloat16": "backward(u=torch.ones(B, d, dtype=torch.bfloat16))",
    "v of fewer instances": "backward(v=torch.ones(2, 3))",
    "v of fewer modalities": "backward(v=torch.ones(B, 2))",
    "z of fewer instances": "backward(z=[torch.ones(2, d)] * 3)",
    "z of fewer columns": "backward(z=[torch.ones(B, 2)] * 3)",
    "z of more modalities": "backward(z=[torch.ones(B, d)] * 4)",
    "z of fewer modalities": "backward(z=[torch.ones(B, d)] * 2)",
    "a vector for a mean": "backward(alignment=torch.ones(B), wanted=ALL + 3)",
    "two reductions": "forward(wanted=6)",
    "a flag that is none": "forward(wanted=1024)",
}
ONE_PROCESS_EACH = """
for name, call in NONSENSE.items():
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            eval(call)
            print(f"{name}: returned", flush=True)
        except RuntimeError:
            print(f"{name}: RuntimeError", flush=True)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}", flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(f"{name}: died of signal {-status}", flush=True)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What became of each call."""
    done = run("-c", f"{SANE}\nNONSENSE = {NONSENSE!r}\nforward(); backward()\n{ONE_PROCESS_EACH}")
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", NONSENSE)
def test_operators_called_with_nonsense_raise(name, answers):
    """A RuntimeError from each, and never a read of memory that is not there."""
    assert answers[name] in ("RuntimeError", "NotImplementedError")


# ------------------------------------------------------------------------------------------------
# Device code
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_headers_compile_as_device_code(architecture, tmp_path):
    """csrc/common is for GPUs too: solvers and algebra inside a kernel, with nothing on stderr."""
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-c", "-I", str(ROOT / "csrc")]
    command += [str(HERE.with_name("device_code.cu")), "-o", str(tmp_path / "device_code.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
