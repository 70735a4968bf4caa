"""Contrasts of joint scores are cross-entropies of their matrix, in float64 by autograd of plain formulations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pmrl_kernels import gram_loss, joint_contrastive_loss, joint_scores, triangle_loss
from pmrl_kernels.ops.joint import reference, spec
from tests.conftest import CPU_BACKENDS
from tests.contract.test_joint import FLOAT64, TINY_NORMS, embeddings, off, plain, unit

TAU = 0.3
each_score = pytest.mark.parametrize("score", spec.NAMES)


def cross_entropies(
    s: Tensor, positives: Tensor, smoothing: float, there: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of the rows and columns of logits (Nq, Ng), as they are usually written: of rows (R,) with a positive that is
    there, and of columns (C,) with one."""
    Ng = s.shape[1]
    there = torch.ones(Ng, dtype=torch.bool) if there is None else there
    known = (positives >= 0) & (positives < Ng)
    counted = known & there[positives.clamp(0, Ng - 1)]
    s = s.masked_fill(~there, -torch.inf)[counted | ~known]
    partner = torch.where(counted, positives, -1)[counted | ~known]
    some = partner >= 0
    rows = cross_entropy(s[some][:, there], (there.cumsum(0) - 1)[partner[some]], reduction="none")
    rows = (1 - smoothing) * rows + smoothing * -s[some][:, there].log_softmax(1).mean(1)
    columns = []
    for j in range(Ng):
        own = partner == j
        if own.any():
            log_p = s[:, j].log_softmax(0)
            columns.append(-(1 - smoothing) * log_p[own].logsumexp(0) - smoothing * log_p.mean())
    return rows, torch.stack(columns) if columns else s.new_zeros(0)


def logits(t: Tensor, C: Tensor, score: str, mask: Tensor | None = None, tau: Tensor | float = TAU) -> Tensor:
    """Of vectors as they are."""
    if score in ("cosine", "mip"):
        return joint_scores(t, C, score=score, mask=mask, normalize=False) / tau
    return spec.SIGNS[spec.SCORES.index(score)] * plain(score, t, C, mask) / tau


def expected_loss(s: Tensor, positives: Tensor | None = None, smoothing: float = 0.0, there: Tensor | None = None):
    positives = torch.arange(len(s)) if positives is None else positives
    return sum(x.sum() / max(1, len(x)) for x in cross_entropies(s, positives, smoothing, there)) / 2


def instances(k: int, case: str, score: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Queries (Nq, d), candidates (Ng, n, d), a mask, and positives."""
    t, C, mask = embeddings(k, "any norm" if case in ("captions", "pairs") else case)
    positives = None
    if case == "captions":  # several of one candidate, none of another, and some of none
        positives = torch.randint(0, len(C), (len(t),))
        positives[3], positives[4:7], positives[11] = -1, 5, -7
    elif case == "masks":
        positives = torch.arange(len(t)) % len(C)
        mask = None if score == "area2" else mask
    else:
        t = t[: len(C)]
    return t.requires_grad_(), C.requires_grad_(), mask, positives


@pytest.mark.parametrize(
    ("case", "smoothing"),
    [("pairs", 0.0), ("pairs", 1.0), ("duplicates", 0.1), ("masks", 0.1), ("captions", 0.0), ("captions", 0.1)],
)
@pytest.mark.parametrize(
    ("score", "k"), [(score, k) for score in spec.NAMES for k in (2, 3, 5) if score != "area2" or k == 3]
)
def test_losses_and_gradients(score, case, smoothing, k, backend, monkeypatch):
    """Of embeddings and of a temperature; of several tiles."""
    monkeypatch.setattr(reference, "_TILE", 64)
    t, C, mask, positives = instances(k, case, score)
    tau = torch.tensor(TAU, dtype=FLOAT64, requires_grad=True)
    there = None if mask is None else mask.any(1)
    wanted = expected_loss(logits(t, C, score, mask, tau), positives, smoothing, there)
    options = {
        "score": score,
        "mask": mask,
        "positives": positives,
        "label_smoothing": smoothing,
        "normalize": False,
        "backend": backend,
    }
    found = joint_contrastive_loss(t, C, temperature=tau, **options)
    assert found.dtype == FLOAT64
    assert off(found, wanted) < 1e-13
    sides = (t, C, tau)
    for x, y in zip(torch.autograd.grad(found, sides), torch.autograd.grad(wanted, sides), strict=True):
        assert off(x, y) < 1e-10
    assert off(joint_contrastive_loss(t, C, temperature=TAU, **options), wanted) < 1e-13


@each_score
def test_factors_are_not_rounded(score, backend, matmul_precision):
    """Whatever PyTorch is allowed to do with products of float32."""
    t, C = torch.randn(80, 64), torch.randn(80, 2, 64)
    C += 2 * t[:, None]
    t, C = (unit(x).requires_grad_() for x in (t, C))
    wide = [x.detach().double().requires_grad_() for x in (t, C)]
    wanted = expected_loss(logits(*wide, score))
    wanted = [wanted, *torch.autograd.grad(wanted, wide)]
    matmul_precision("medium")
    found = joint_contrastive_loss(t, C, score=score, temperature=TAU, normalize=False, backend=backend)
    for x, y in zip((found, *torch.autograd.grad(found, (t, C))), wanted, strict=True):
        assert off(x.double(), y) < 1e-5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("score", ["cosine", "mip"])
def test_scores_beyond_float32(score, backend):
    """A temperature makes them moderate again."""
    t, C = 3e6 * torch.randn(20, 16), 1e16 * torch.randn(20, 2, 16)
    t = t if score == "mip" else 1e31 * t
    t, C = (x.requires_grad_() for x in (t, C))
    wide = [x.detach().double().requires_grad_() for x in (t, C)]
    tau = 1e37
    wanted = expected_loss(logits(*wide, score, tau=tau))
    found = joint_contrastive_loss(t, C, score=score, temperature=tau, normalize=False, backend=backend)
    assert found.dtype == torch.float32
    assert off(found.double(), wanted) < 1e-6
    for x, y in zip(torch.autograd.grad(found, (t, C)), torch.autograd.grad(wanted, wide), strict=True):
        assert off(1e30 * x.double(), 1e30 * y) < 1e-5


@each_score
@pytest.mark.parametrize("case", ["pairs", "captions"])
def test_half_gradients(score, case, backend):
    """Each side's gradient of the loss in which the other one chooses among vectors that are held."""
    t, C, mask, positives = instances(3, case, score)
    tau = torch.tensor(TAU, dtype=FLOAT64, requires_grad=True)
    partners = torch.arange(len(t)) if positives is None else positives
    of_rows = cross_entropies(logits(t, C.detach(), score, mask, tau), partners, 0.1)[0]
    of_columns = cross_entropies(logits(t.detach(), C, score, mask, tau), partners, 0.1)[1]
    wanted = (of_rows.mean() + of_columns.mean()) / 2
    found = joint_contrastive_loss(
        t,
        C,
        score=score,
        temperature=tau,
        label_smoothing=0.1,
        positives=positives,
        half_gradient=True,
        normalize=False,
        backend=backend,
    )
    assert off(found, wanted) < 1e-13
    for x, y in zip(torch.autograd.grad(found, (t, C, tau)), torch.autograd.grad(wanted, (t, C, tau)), strict=True):
        assert off(x, y) < 1e-10


@pytest.mark.parametrize("half", [False, True])
def test_presets_are_the_published_losses(half, backend):
    """With their values, of unit vectors; with their gradient, which holds what is gathered, as an option."""
    t, C, _ = (None if x is None else x.requires_grad_() for x in embeddings(3, "any norm"))
    t = t[: len(C)].detach().requires_grad_()
    tau = torch.tensor(0.07, dtype=FLOAT64, requires_grad=True)

    def gathered(x: Tensor) -> Tensor:
        return x.detach() if half else x

    for score, loss in (("volume", gram_loss), ("area2", triangle_loss)):
        of_text = plain(score, unit(t), gathered(unit(C)))
        of_candidates = plain(score, gathered(unit(t)), unit(C))
        targets = torch.arange(len(t))
        wanted = cross_entropy(-of_text / tau, targets, label_smoothing=0.1)
        wanted = (wanted + cross_entropy(-of_candidates.T / tau, targets, label_smoothing=0.1)) / 2
        found = loss(t, *C.unbind(1), temperature=tau, half_gradient=half, backend=backend)
        assert off(found, wanted) < 1e-13
        as_they_begin = loss(t, *C.unbind(1), half_gradient=half, backend=backend)  # with 0.07
        assert off(as_they_begin, wanted) < 1e-13
        for x, y in zip(torch.autograd.grad(found, (t, C, tau)), torch.autograd.grad(wanted, (t, C, tau)), strict=True):
            assert off(x, y) < 1e-11
    t, C, mask = embeddings(4, "masks")
    options = {"mask": mask, "positives": torch.arange(20) % 17, "backend": backend}
    wanted = joint_contrastive_loss(t, C, score="volume", label_smoothing=0.1, **options)
    assert torch.equal(gram_loss(t, C, **options), wanted)
    t, C, _ = embeddings(3, "random")
    options = {"positives": torch.arange(20) % 17, "backend": backend}
    wanted = joint_contrastive_loss(t, C, score="area2", label_smoothing=0.1, **options)
    assert torch.equal(triangle_loss(t, C, **options), wanted)


@pytest.mark.parametrize("loss", [gram_loss, triangle_loss])
def test_presets_hand_everything_on(loss):
    x = torch.randn(4, 3, 8)
    for options, message in (
        ({"backend": "fast"}, "backend: got 'fast'"),
        ({"local_sizes": [4]}, "local_sizes: got"),
        ({"group": "everyone"}, "group: got 'everyone'"),
        ({"label_smoothing": 2.0}, "label_smoothing: got 2.0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss(*x.unbind(1), **options)


@each_score
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(score, dtype, backend):
    t, C, _ = embeddings(3, "any norm")
    t, C = (x.to(dtype).requires_grad_() for x in (t[: len(C)], C))
    wide = [x.detach().double().requires_grad_() for x in (t, C)]
    wanted = expected_loss(logits(*map(unit, wide), score), smoothing=0.1)
    found = joint_contrastive_loss(t, C, score=score, temperature=TAU, label_smoothing=0.1, backend=backend)
    assert found.dtype == torch.float32
    assert off(found.double(), wanted) < 1e-6
    pairs = zip(torch.autograd.grad(found, (t, C)), torch.autograd.grad(wanted, wide), strict=True)
    for x, y in pairs:
        assert x.dtype == dtype
        assert off(x.double(), y) < max(1e-5, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("score", [name for name in spec.NAMES if name != "area2"])
def test_who_leaves_has_zeros_and_is_not_read(score, backend):
    t, C, mask = embeddings(4, "masks")
    t = t[: len(C)]
    expected = joint_contrastive_loss(t, C, score=score, mask=mask, backend=backend)
    gone = ~mask.any(1)
    assert gone.any()
    t = torch.where(gone[:, None], torch.nan, t).requires_grad_()
    C = torch.where(mask[:, :, None], C, torch.inf).requires_grad_()
    loss = joint_contrastive_loss(t, C, score=score, mask=mask, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-15, atol=0.0)
    loss.backward()
    assert t.grad.isfinite().all()
    assert C.grad.isfinite().all()
    assert not t.grad[gone].any()
    assert not C.grad[~mask].any()


@each_score
@pytest.mark.parametrize("tau", [1.2e-38, 1e-4, 0.01, 1e4, 1e38])
def test_any_temperature(score, tau, backend):
    """Finite, and the loss that of the formulation (where that is finite)."""
    t, C, _ = embeddings(3, "duplicates")
    t, C = (x.requires_grad_() for x in (t[: len(C)], C))
    temperature = torch.tensor(tau, dtype=FLOAT64, requires_grad=True)
    found = joint_contrastive_loss(t, C, score=score, temperature=temperature, backend=backend)
    wanted = expected_loss(logits(unit(t), unit(C), score, tau=tau))
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-12, atol=0.0)
    for x in torch.autograd.grad(found, (t, C, temperature)):
        assert x.isfinite().all()


@pytest.mark.parametrize("N", [4, 200])
@pytest.mark.parametrize("tau", [2e37, 1e38, 2.6e38, 3.4e38])
def test_temperatures_near_the_largest_of_float32(N, tau, backend):
    """Times the loss, they are none of its numbers."""
    xs = [torch.randn(N, 6, requires_grad=True) for _ in range(3)]
    temperature = torch.tensor(tau, dtype=FLOAT64, requires_grad=True)
    for score in spec.NAMES:
        found = joint_contrastive_loss(*xs, score=score, temperature=temperature, backend=backend)
        torch.testing.assert_close(found.item(), math.log(N), rtol=1e-6, atol=0.0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(found, (*xs, temperature)))


TINY = [(torch.float32, tau) for tau in (1e-13, 1e-18)] + [(FLOAT64, tau) for tau in (1e-16, 1e-30)]


@pytest.mark.parametrize(("dtype", "tau"), TINY)
def test_tiny_temperatures_leave_the_best(dtype, tau, backend):
    """Of a row's gradient: its best candidate's vector less its own, whatever the size of the logits."""
    N = 40
    t, C = torch.randn(N, 8, dtype=FLOAT64).to(dtype).requires_grad_(), torch.randn(N, 1, 8, dtype=FLOAT64).to(dtype)
    options = {"score": "mip", "temperature": tau, "normalize": False, "half_gradient": True, "backend": backend}
    (found,) = torch.autograd.grad(joint_contrastive_loss(t, C, **options), t)
    c = C[:, 0].double()
    best = (t.detach().double() @ c.T).argmax(1)
    wanted = (c[best] - c) / (2 * N)
    assert (best != torch.arange(N)).sum() > 30
    torch.testing.assert_close(found.double() * tau, wanted, rtol=1e-5, atol=1e-7)


@each_score
@pytest.mark.parametrize(("dtype", "tau"), TINY)
def test_tiny_temperatures(score, dtype, tau, backend):
    """As the reference has it in float64, where all of a row is one pair's."""
    t, C = torch.randn(40, 8, dtype=FLOAT64).to(dtype), torch.randn(40, 2, 8, dtype=FLOAT64).to(dtype)

    def found(t: Tensor, C: Tensor, backend: str) -> list[Tensor]:
        t, C = (x.detach().requires_grad_() for x in (t, C))
        temperature = torch.tensor(tau, dtype=FLOAT64, requires_grad=True)
        loss = joint_contrastive_loss(t, C, score=score, temperature=temperature, normalize=False, backend=backend)
        slopes = torch.autograd.grad(loss, (t, C, temperature))
        return [tau * x.detach().double() for x in (loss, *slopes)]

    within = 1e-10 if dtype == FLOAT64 else 1e-4
    for x, y in zip(found(t, C, backend), found(t.double(), C.double(), "reference"), strict=True):
        assert off(x, y) < within


@pytest.mark.parametrize("score", ["volume", "sine"])
@pytest.mark.parametrize(("dtype", "of_t", "of_C"), TINY_NORMS[:-1])
def test_slopes_do_not_depend_on_norms(score, dtype, of_t, of_C, backend):
    """Of volumes and their temperature, both as much larger or smaller."""
    t, C = torch.randn(9, 16, dtype=FLOAT64), torch.randn(9, 2, 16, dtype=FLOAT64)
    size = of_t * (of_C**2 if score == "volume" else 1.0)

    def found(t: Tensor, C: Tensor, tau: float, backend: str) -> list[Tensor]:
        t, C = (x.detach().requires_grad_() for x in (t, C))
        options = {"score": score, "temperature": tau, "normalize": False, "backend": backend}
        loss = joint_contrastive_loss(t, C, label_smoothing=0.1, **options)
        return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, (t, C)))]

    tau = 0.5
    wanted = found(t, C, tau, "reference")
    within = 1e-11 if dtype == FLOAT64 else 1e-5
    given = (of_t * t).to(dtype), (of_C * C).to(dtype)
    for x, y, z in zip(found(*given, size * tau, backend), wanted, (1.0, 1 / of_t, 1 / of_C), strict=True):
        assert off(x / z, y) < within


@pytest.mark.parametrize("tau", [0.0, -1.0, torch.nan, torch.inf, 1e-40])
def test_a_bad_temperature_tensor_is_nan(tau, backend):
    t, C, _ = embeddings(3, "random")
    t, C = (x.float().requires_grad_() for x in (t[: len(C)], C))
    loss = joint_contrastive_loss(t, C, temperature=torch.tensor(tau, dtype=FLOAT64), backend=backend)
    loss.backward()
    assert loss.isnan()
    assert t.grad.isnan().all()
    assert C.grad.isnan().all()
    for N, positives in ((0, None), (1, None), (3, torch.full((3,), -1))):  # nothing is compared
        options = {"temperature": torch.tensor(tau, dtype=FLOAT64), "positives": positives, "backend": backend}
        assert joint_contrastive_loss(t[:N], C[:N], **options).isnan()


def test_a_small_loss_has_its_digits(backend):
    """Beyond what 1 plus it can hold."""
    basis = torch.eye(6, dtype=FLOAT64)
    t, C = basis[:2], torch.stack((basis[:2], basis[2:4]), 1)
    found = joint_contrastive_loss(t, C, score="volume", temperature=0.02, backend=backend)
    torch.testing.assert_close(found, torch.tensor(-50.0, dtype=FLOAT64).exp(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("score", ["volume", "volume2", "sine", "sigma", "gain", "area2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_descending_from_the_optimum(score, dtype, backend):
    """From where all modalities of an instance agree: finite, and it does not climb."""
    t = unit(torch.randn(6, 12, dtype=dtype))
    t, *C = (t.clone().requires_grad_() for _ in range(3))
    losses = []
    for _ in range(20):
        loss = joint_contrastive_loss(t, *C, score=score, temperature=0.1, backend=backend)
        losses.append(loss.item())
        for x, g in zip((t, *C), torch.autograd.grad(loss, (t, *C)), strict=True):
            assert g.isfinite().all()
            x.data -= 1e-3 * g
    assert max(losses) <= losses[0] + 1e-6
    assert losses[-1] <= losses[0]


def test_alone_or_without_anyone(backend):
    for Nq, Ng in ((0, 0), (1, 1), (3, 0), (0, 3)):
        t, C = torch.randn(Nq, 4, requires_grad=True), torch.randn(Ng, 2, 4, requires_grad=True)
        positives = None if Nq == Ng else torch.full((Nq,), -1)
        for score in spec.NAMES:
            loss = joint_contrastive_loss(t, C, score=score, positives=positives, label_smoothing=0.1, backend=backend)
            loss.backward()
            assert loss == 0
            assert not t.grad.any()
            assert not C.grad.any()


@pytest.mark.parametrize("where", ["query", "candidate"])
def test_nan_is_everyones(where, backend):
    t, C, _ = embeddings(3, "random")
    t = t[: len(C)]
    (t if where == "query" else C)[2, ..., 0] = torch.nan
    t.requires_grad_(), C.requires_grad_()
    for score in spec.NAMES:
        loss = joint_contrastive_loss(t, C, score=score, backend=backend)
        assert loss.isnan()
        assert all(g.isnan().any() for g in torch.autograd.grad(loss, (t, C)))


def test_what_may_be_asked_for():
    t, C, _ = embeddings(3, "random")
    t = t[: len(C)]
    loss = joint_contrastive_loss
    for arguments, error, message in (
        ({"score": "area"}, ValueError, "score: got 'area', wanted one of"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5, wanted a number from 0 to 1"),
        ({"label_smoothing": None}, TypeError, "label_smoothing: got NoneType"),
        ({"positives": [1]}, TypeError, "positives: got list, wanted an int64 tensor"),
        ({"positives": torch.zeros(17)}, TypeError, "positives: got dtype torch.float32, wanted torch.int64"),
        ({"positives": torch.zeros(3).long()}, ValueError, r"positives: got shape \(3,\), wanted \(17,\)"),
        ({"positives": torch.full((17,), 17)}, ValueError, "positives: got 17, wanted numbers below 17"),
        ({"half_gradient": 1}, TypeError, "half_gradient: got int"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"temperature": 1e-40}, ValueError, "temperature: got 1e-40"),
        ({"local_sizes": [17]}, ValueError, "local_sizes: got"),
        ({"score": "area2", "mask": torch.ones(17, 2).bool()}, ValueError, "mask: got one, wanted none: score='area2'"),
    ):
        with pytest.raises(error, match=message):
            loss(t, C, **arguments)
    with pytest.raises(ValueError, match="candidates: got none, wanted at least one tensor"):
        loss([t, C])
    with pytest.raises(ValueError, match="positives: got None with 16 queries and 17 candidates"):
        loss(t[:16], C)
    (g,) = torch.autograd.grad(loss(t.requires_grad_(), C), t, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient penalty"):
        g.sum().backward()


def test_label_smoothing_is_at_most_1(backend):
    """Where every candidate is as right as any other."""
    x = torch.nn.functional.normalize(torch.randn(3, 6, 5), dim=2)
    loss = joint_contrastive_loss(*x, score="cosine", temperature=0.5, label_smoothing=1.0, backend=backend)
    s = joint_scores(*x, score="cosine", backend=backend) / 0.5
    expected = -(s.log_softmax(1).mean() + s.log_softmax(0).mean()) / 2
    torch.testing.assert_close(loss, expected)


def test_compiled(backend):
    torch.compiler.reset()  # of one function it compiles eight graphs at most
    t, C, mask = embeddings(3, "masks")
    t, C, positives = t.requires_grad_(), C.requires_grad_(), torch.arange(20) % 17
    for score, half in itertools.product(("volume", "gain", "cosine"), (False, True)):

        def loss(t, C, mask, positives, score=score, half=half):
            return joint_contrastive_loss(
                t, C, score=score, mask=mask, positives=positives, half_gradient=half, backend=backend
            )

        found = torch.compile(loss, backend="aot_eager", fullgraph=True)(t, C, mask, positives)
        expected = loss(t, C, mask, positives)
        assert found == expected
        for x, y in zip(torch.autograd.grad(found, (t, C)), torch.autograd.grad(expected, (t, C)), strict=True):
            assert torch.equal(x, y)


def test_memory_grows_with_rows_alone(monkeypatch):
    """Nothing of the size of the matrix is made, in either pass."""
    N, tile = 600, 4096
    monkeypatch.setattr(reference, "_TILE", tile)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for x in found if isinstance(found, (tuple, list)) else [found]:
                largest = max(largest, x.numel() if isinstance(x, Tensor) else 0)
            return found

    t, C = torch.randn(N, 4), torch.randn(N, 2, 4)
    with torch.no_grad():
        pair = reference.PAIRS[spec.JOINT_CONTRAST.name]
        arguments = (t, [C], None, None, [0, N, 0, N], spec.GAIN, True, 0.1, None, TAU)
        # The functions themselves: what an operator does inside is not dispatched once more.
        with Sizes():
            _, rows, columns, state = reference.contrast_forward(*arguments)
            reference.contrast_backward(*arguments, rows, columns, state, torch.ones(()), False, [True, True])
    assert pair.backend == "reference"
    assert tile <= largest < N * N / 10
