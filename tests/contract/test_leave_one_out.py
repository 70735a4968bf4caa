"""contrast="leave_one_out" and contrast="pairs": what they are equal to, and what leaves them."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from pmrl_kernels import PMRLLoss, losses, ops, pmrl_loss
from pmrl_kernels.ops import objective
from pmrl_kernels.ops.spectral import spec
from pmrl_kernels.ops.spectral.spec import Spectral
from tests.tools.functions import DTYPES, finite, grads, leaves

NEW = ("leave_one_out", "pairs")


def instance(xs: list[Tensor], contrast: str, **options: Any) -> Tensor:
    return pmrl_loss(xs, contrast=contrast, alignment_weight=0.0, return_components=True, **options).instance


def directions(
    xs: list[Tensor],
    mask: Tensor | None = None,
    unit: bool = True,
    backend: str = "reference",
    spectrum: bool = True,
    wanted: int = spec.W,
) -> Any:
    """The w (B, d) of each modality, by the operator, and before them what else is wanted."""
    first = xs[0]
    pair = ops.resolve(spec.SPECTRAL, backend, first.device, first.dtype, len(xs), first.shape[1])
    return pair.forward([x.detach() for x in xs], mask, None, 1.0, unit, spectrum, wanted)[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_w_are_the_same_kept_and_made_anew(backend, device, masked, compiled, monkeypatch):
    """Bit for bit, with learned temperatures."""
    xs = leaves([torch.randn(12, 8) for _ in range(3)], device, torch.float32)
    taus = [torch.tensor(t, device=device, requires_grad=True) for t in (0.3, 0.2)]
    mask = (torch.rand(12, 3) < 0.7).to(device) if masked else None

    def loss(*xs: Tensor) -> Tensor:
        return pmrl_loss(
            *xs, mask=mask, temperature=taus[0], instance_temperature=taus[1], contrast="leave_one_out", backend=backend
        )

    found, passes = [], []
    compute = Spectral.compute
    monkeypatch.setattr(Spectral, "compute", lambda self, *a: passes.append(self.wanted) or compute(self, *a))
    for kept in (False, True):
        monkeypatch.setattr(objective, "waits_for_launches", lambda x, k, kept=kept: kept)
        torch.compiler.reset()
        call = torch.compile(loss, backend="aot_eager") if compiled else loss
        found.append(grads(call(*xs), [*xs, *taus]))
        if not compiled:
            assert passes.count(spec.W) == 1, "kept the second time"
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("contrast", NEW)
@pytest.mark.parametrize("tau", [0.05, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_modalities_are_info_nce(backend, device, dtype, tau, contrast):
    """Also where they point away from each other: |v| has no sign to turn them by."""
    text, image = leaves([torch.randn(24, 16), torch.randn(24, 16)], device, dtype)
    wide = [x.detach().double().cpu().requires_grad_() for x in (text, image)]
    s = normalize(wide[0], dim=1) @ normalize(wide[1], dim=1).T / tau
    targets = torch.arange(24)
    expected = (cross_entropy(s, targets) + cross_entropy(s.T, targets)) / 2
    found = instance([text, image], contrast, instance_temperature=tau, backend=backend)
    eps = 1e-13 if dtype == torch.float64 else 2e-7
    torch.testing.assert_close(found.double().cpu(), expected, rtol=eps / tau, atol=0)
    rounding = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 0.0)
    for g, h in zip(grads(found, [text, image]), grads(expected, wide), strict=True):
        scale = float(h.abs().max())
        torch.testing.assert_close(g.double().cpu(), h, rtol=rounding, atol=(8 * eps / tau + rounding / 100) * scale)


@pytest.mark.parametrize("contrast", NEW)
@pytest.mark.parametrize("normalize", [True, False])
def test_an_absent_modality_is_as_if_it_did_not_exist(backend, device, contrast, normalize):
    xs = leaves([torch.randn(7, 9) for _ in range(4)], device, torch.float64)
    mask = torch.rand(7, 4, device=device) < 0.8
    mask[:, 2] = False
    options: dict[str, Any] = {"normalize": normalize, "instance_temperature": 0.3, "backend": backend}
    kept = [0, 1, 3]
    one = instance(xs, contrast, mask=mask, **options)
    other = instance([xs[m] for m in kept], contrast, mask=mask[:, kept], **options)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    found, expected = grads(one, xs), grads(other, [xs[m] for m in kept])
    assert not found[2].any()
    for m, g in zip(kept, expected, strict=True):
        torch.testing.assert_close(found[m], g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("contrast", NEW)
@pytest.mark.parametrize("k", [3, 5])
def test_the_order_of_modalities_does_not_matter(backend, device, contrast, k):
    xs = leaves([torch.randn(6, 9) for _ in range(k)], device, torch.float64)
    expected = grads(instance(xs, contrast, backend=backend), xs)
    for order in itertools.islice(itertools.permutations(range(k)), 1, 12, 4):
        loss = instance([xs[m] for m in order], contrast, backend=backend)
        torch.testing.assert_close(loss, instance(xs, contrast, backend=backend), rtol=1e-12, atol=0)
        for g, h in zip(grads(loss, xs), expected, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 9, 17])
def test_directions_are_unit_vectors_of_what_the_others_share(backend, device, dtype, k):
    xs = [torch.randn(5, 21).add(0.4).to(device, dtype) for _ in range(k)]
    w = directions(xs, backend=backend)
    Z = normalize(torch.stack([x.double().cpu() for x in xs], 2), dim=1)
    a = torch.linalg.svd(Z, full_matrices=False)[2][:, 0].abs()
    for m, found in enumerate(w):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if k == 1:
            assert not found.any()
            continue
        others = [j for j in range(k) if j != m]
        expected = normalize((Z * a[:, None, :])[:, :, others].sum(2), dim=1)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-7
        torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spectrum", [True, False])
@pytest.mark.parametrize("k", [3, 9])
def test_directions_are_the_same_bits_whatever_else_is_wanted(backend, device, k, spectrum):
    """The backward pass makes them anew, beside probabilities of what the forward pass had."""
    xs, mask = [torch.randn(7, 21, device=device) for _ in range(k)], torch.rand(7, k, device=device) < 0.7
    for wanted in (spec.ALIGNMENT_MEAN | spec.Z, spec.ALIGNMENT_SUM | spec.Z, spec.Z, spec.U | spec.V):
        some = directions(xs, mask, backend=backend, spectrum=spectrum, wanted=wanted | spec.W)[-k:]
        for a, b in zip(some, directions(xs, mask, backend=backend, spectrum=spectrum), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_has_no_direction_leaves(backend, device, dtype):
    """A lone modality has no others, a zero vector is none, and those that cancel share nothing."""
    e = torch.eye(4, dtype=dtype, device=device)
    x, y = torch.randn(2, 4, dtype=dtype, device=device)
    #      plain   lone        a zero vector  others that cancel          nothing at all
    rows = [[e[0], x, y], [x, y, y], [e[1], e[1], 0 * x], [x, y, -y], [x, x, x]]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]], device=device).bool()
    xs = [torch.stack([row[m] for row in rows]).requires_grad_() for m in range(3)]
    w = directions(xs, mask, backend=backend)
    there = torch.stack([x.any(1) for x in w], 1)
    # the first of (x, y, -y) is orthogonal to nothing here, but the other two pull each other to zero
    assert there[0].all()
    assert there[1].tolist() == [False, True, True]  # what the absent ones' others share is there
    assert there[2].all()
    assert there[3].tolist() == [False, True, True]
    assert not there[4].any()
    for vectors in w:
        norms = torch.linalg.vector_norm(vectors, dim=1)
        torch.testing.assert_close(norms[norms > 0], torch.ones_like(norms[norms > 0]), rtol=1e-6, atol=0)
    for contrast in NEW:
        loss = instance(xs, contrast, mask=mask, backend=backend)
        found = grads(loss, xs)
        assert finite(loss, *found)
        assert not found[2][2].any()  # the zero vector
        assert all(not g[4].any() for g in found)
        assert not found[1][1].any()
        assert not found[2][1].any()


def test_others_that_are_nothing_beside_a_modality(backend, device):
    """With columns as they are one may dwarf the rest, of whose direction its own rounding then decides."""
    xs = [torch.randn(3, 8, dtype=torch.float64, device=device) for _ in range(3)]
    for scale, there in ((1e1, True), (1e3, False), (1e12, False)):
        found = directions([xs[0] * scale, *xs[1:]], unit=False, backend=backend)
        assert bool(found[0].any(1).all()) == there
        assert found[1].any(1).all()
        assert found[2].any(1).all()


@pytest.mark.parametrize("contrast", NEW)
@pytest.mark.parametrize("kind", ["equal", "orthonormal", "antipodal", "mirrored", "two equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_from_where_it_has_kinks(backend, device, dtype, kind, contrast):
    """Gradients are finite there, and a few steps along them bring the loss down or leave it."""
    B, d = 5, 8
    e = torch.eye(d, dtype=dtype)
    base = normalize(torch.randn(B, d, dtype=dtype), dim=1)
    side = normalize(torch.randn(B, d, dtype=dtype), dim=1)
    xs = {
        "equal": [base, base, base, base],
        "orthonormal": [e[m].repeat(B, 1).roll(0, 0) for m in range(4)],
        "antipodal": [base, -base, base, -base],
        "mirrored": [base + side, base - side, side - base, side],
        "two equal": [base, base, side, side],
    }[kind]
    parameters = leaves([x.clone() for x in xs], device, dtype)
    values = []
    for _ in range(6):
        loss = pmrl_loss(parameters, temperature=1.0, contrast=contrast, instance_temperature=0.2, backend=backend)
        found = grads(loss, parameters)
        assert finite(loss, *found)
        values.append(loss.item())
        with torch.no_grad():
            for x, g in zip(parameters, found, strict=True):
                x -= 0.05 * g
    assert values[-1] <= values[0] + 1e-6


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pairs_are_cross_entropies_of_all_pairs(backend, device, dtype, masked):
    B, k, tau = 33, 4, 0.1
    xs = leaves([torch.randn(B, 12) for _ in range(k)], device, dtype)
    mask = torch.rand(B, k) < 0.7 if masked else torch.ones(B, k, dtype=torch.bool)
    wide = [x.detach().double().cpu().requires_grad_() for x in xs]
    z = [normalize(x, dim=1) for x in wide]
    total, number = torch.zeros((), dtype=torch.float64), 0
    for m, j in itertools.combinations(range(k), 2):
        both = (mask[:, m] & mask[:, j]).nonzero()[:, 0]
        s = z[m] @ z[j].T / tau
        for logits, there in ((s, mask[:, j]), (s.T, mask[:, m])):
            logits = logits.masked_fill(~there, -torch.inf)
            total = total + cross_entropy(logits[both], both, reduction="sum")
        number += 2 * len(both)
    given = mask.to(device) if masked else None
    loss = instance(xs, "pairs", mask=given, instance_temperature=tau, backend=backend)
    eps = 1e-12 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(loss.double().cpu(), (total / number).detach(), rtol=eps, atol=0)
    for g, h in zip(grads(loss, xs), grads(total / number, wide), strict=True):
        torch.testing.assert_close(g.double().cpu(), h, rtol=0, atol=4 * eps * float(h.abs().max()))


@pytest.mark.parametrize("contrast", ["leading", "modality", *NEW])
def test_without_the_alignment_term(backend, device, contrast):
    """Its weight of 0 leaves it out, its temperature's gradient and NaN included; other weights multiply it."""
    xs = leaves([torch.randn(6, 8) for _ in range(3)], device, torch.float64)
    tau = torch.tensor(0.5, device=device, requires_grad=True)
    options: dict[str, Any] = {"contrast": contrast, "return_components": True, "backend": backend}

    def full() -> Any:
        return pmrl_loss(xs, temperature=0.5, **options)

    none = pmrl_loss(xs, temperature=tau, alignment_weight=0.0, instance_weight=2.0, **options)
    assert none.alignment == 0
    torch.testing.assert_close(none.instance, full().instance)
    torch.testing.assert_close(none.total, 2 * full().instance)
    for g, h in zip(grads(none.total, xs), grads(full().instance, xs), strict=True):
        torch.testing.assert_close(g, 2 * h, rtol=1e-9, atol=1e-12)
    slope = torch.autograd.grad(
        pmrl_loss(xs, temperature=tau, alignment_weight=0.0, **options).total, tau, allow_unused=True
    )[0]
    assert slope is None or slope == 0
    weighted = pmrl_loss(xs, temperature=0.5, alignment_weight=3.0, instance_weight=0.5, **options)
    torch.testing.assert_close(weighted.total, 3 * full().alignment + 0.5 * full().instance)
    expected = [3 * g + 0.5 * h for g, h in zip(grads(full().alignment, xs), grads(full().instance, xs), strict=True)]
    torch.testing.assert_close(grads(weighted.total, xs), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("contrast", ["leading", "modality", *NEW])
def test_default_temperatures_are_those_of_the_contrast(contrast):
    xs = [torch.randn(30, 8) for _ in range(3)]
    default = losses.INSTANCE_TEMPERATURES[contrast]
    assert default == {"modality": 0.2}.get(contrast, 0.1)
    named = pmrl_loss(xs, contrast=contrast, instance_temperature=default)
    assert torch.equal(pmrl_loss(xs, contrast=contrast), named)
    assert torch.equal(PMRLLoss(contrast=contrast)(xs), named)
    assert PMRLLoss(contrast=contrast).instance_temperature() == default


def test_a_temperature_below_the_floor_warns_once(monkeypatch, recwarn):
    monkeypatch.setattr(losses, "_warned_of_floor", False)
    B, k = 128, 4
    xs = [torch.randn(B, 8) for _ in range(k)]
    floor = 1 / (math.sqrt(k) * math.log(B - 1))
    for quiet in (
        {"contrast": "modality", "instance_temperature": floor * 1.001},
        {"contrast": "modality", "instance_temperature": torch.tensor(0.05)},  # which nobody reads
        {"contrast": "modality"},
        {"contrast": "leave_one_out", "instance_temperature": 0.05},
    ):
        pmrl_loss(xs, **quiet)
    assert not recwarn
    for _ in range(2):
        pmrl_loss(xs, contrast="modality", instance_temperature=0.05)
    (warning,) = recwarn
    assert warning.filename == __file__
    for part in ("0.05", f"{floor:.3f}", "k = 4, B = 128", "leave_one_out"):
        assert part in str(warning.message)


def test_below_the_floor_nothing_need_agree():
    """What the warning is about: orthogonal modalities satisfy the modality contrast, and not the others."""
    B, k = 64, 4
    xs = list(torch.linalg.qr(torch.randn(B * k, B * k)).Q.view(B, k, B * k).unbind(1))
    floor = 1 / (math.sqrt(k) * math.log(B - 1))
    low = instance(xs, "modality", instance_temperature=floor / 5)
    assert low < 0.01
    for contrast in NEW:
        assert instance(xs, contrast, instance_temperature=floor / 5) > 1


def test_the_floor_of_small_batches(monkeypatch, recwarn):
    """Of two instances there is none, of the default temperature and of tensors nothing is said."""

    def warned(B: int, k: int = 2, **options: Any) -> list[str]:
        monkeypatch.setattr(losses, "_warned_of_floor", False)
        recwarn.clear()
        warnings.simplefilter("always")
        loss = pmrl_loss([torch.randn(B, 8) for _ in range(k)], contrast="modality", **options)
        assert loss.isfinite()
        return [str(w.message) for w in recwarn if "instance_temperature" in str(w.message)]

    for B in (1, 2):
        assert not warned(B, instance_temperature=0.1)
    (message,) = warned(3, instance_temperature=1.0)
    assert "= 1.020 with" in message
    assert "k = 2, B = 3" in message
    assert warned(4, instance_temperature=0.643)
    assert not warned(4, instance_temperature=0.644)
    assert not warned(8), "the default, though the floor is 0.363"
    assert not warned(3, instance_temperature=torch.tensor(0.5)), "which nobody reads"
    assert warned(8, instance_temperature=0.1)
    pmrl_loss([torch.randn(8, 8)] * 2, contrast="modality", instance_temperature=0.1)
    assert len(recwarn) == 1, "on another line no second one"


def test_compiled_code_does_not_warn_of_the_floor(monkeypatch):
    monkeypatch.setattr(losses, "_warned_of_floor", False)
    torch.compiler.reset()
    xs = [torch.randn(8, 4) for _ in range(2)]
    call = torch.compile(
        lambda *xs: pmrl_loss(*xs, contrast="modality", instance_temperature=0.1), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(call(*xs), pmrl_loss(*xs, contrast="modality", instance_temperature=torch.tensor(0.1)))
