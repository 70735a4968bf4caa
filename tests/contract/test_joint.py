"""Joint scores are those of their formulas, from explicit Gram matrices of every pair, in float64 by autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pmrl_kernels import dominant_singular_triplet, joint_scores
from pmrl_kernels.ops.joint import reference, spec
from tests.tools.joints import SLOW_ROOTS, slow_root

FLOAT64 = torch.float64
ROOTS = ("volume", "sine", "sigma")
VOLUMES = ("volume", "volume2", "sine")
each_score = pytest.mark.parametrize("score", spec.SCORES)
of_any_k = pytest.mark.parametrize("score", [name for name in spec.SCORES if name != "area2"])


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def plain(score: str, t: Tensor, C: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of t (Nq, d) and C (Ng, n, d) as they are, by (Nq, Ng, k, k) as it is usually written."""
    Nq, (Ng, n, _) = len(t), C.shape
    if score == "area2":
        u, w = (C[None, :, m] - t[:, None] for m in (0, 1))
        return ((u * u).sum(-1) * (w * w).sum(-1) - (u * w).sum(-1) ** 2) / 2
    there = torch.ones(Ng, n, dtype=torch.bool) if mask is None else mask
    C = torch.where(there[:, :, None], C, 0.0)
    Z = torch.cat([t[:, None, None].expand(Nq, Ng, 1, -1), C[None].expand(Nq, -1, -1, -1)], 2)
    G = Z @ Z.mT
    if score in VOLUMES:
        missing = torch.diag_embed((~there).double())  # 1 on the diagonal: no column at all
        volume2 = torch.linalg.det(G + torch.nn.functional.pad(missing, (1, 0, 1, 0)))
        if score == "sine":
            volume2 = volume2 / torch.linalg.det(C @ C.mT + missing)
        return volume2 if score == "volume2" else volume2.clamp_min(0).sqrt()
    largest = torch.linalg.eigvalsh(G)[..., -1]
    if score == "gain":
        return largest - torch.linalg.eigvalsh(C @ C.mT)[..., -1]
    return largest.sqrt() if score == "sigma" else largest


def embeddings(k: int, case: str) -> tuple[Tensor, Tensor, Tensor | None]:
    Nq, Ng, d = 20, 17, 24
    t = unit(torch.randn(Nq, d, dtype=FLOAT64))
    C = unit(torch.randn(Ng, k - 1, d, dtype=FLOAT64) + 0.7 * torch.randn(Ng, 1, d, dtype=FLOAT64))
    mask = None
    if case == "duplicates":
        C[5], C[6], t[7] = C[4], C[4], t[8]
    if case == "masks":
        mask = torch.rand(Ng, k - 1) < 0.6
        mask[3], mask[4] = False, True
    if case == "any norm":
        t, C = t * (0.5 + torch.rand(Nq, 1)), C * (0.5 + torch.rand(Ng, k - 1, 1))
    return t, C, mask


def gradients(scores: Tensor, W: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((scores * W).sum(), tensors)


def off(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


@of_any_k
@pytest.mark.parametrize("case", ["random", "duplicates", "masks", "any norm"])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 8])
def test_scores_and_gradients(score, case, k, backend, monkeypatch):
    """For any gradient that comes in; of several tiles."""
    monkeypatch.setattr(reference, "_TILE", 64)
    t, C, mask = (None if x is None else x.requires_grad_(x.is_floating_point()) for x in embeddings(k, case))
    W = torch.randn(len(t), len(C), dtype=FLOAT64)
    expected = plain(score, t, C, mask)
    found = joint_scores(t, C, score=score, mask=mask, normalize=False, backend=backend)
    assert off(found, expected) < 1e-13
    for x, y in zip(gradients(found, W, t, C), gradients(expected, W, t, C), strict=True):
        assert off(x, y) < 1e-11


@pytest.mark.parametrize("case", ["random", "duplicates", "any norm"])
def test_areas(case, backend, monkeypatch):
    monkeypatch.setattr(reference, "_TILE", 64)
    t, C, _ = (None if x is None else x.requires_grad_() for x in embeddings(3, case))
    W = torch.randn(len(t), len(C), dtype=FLOAT64)
    found, expected = joint_scores(t, C, score="area2", normalize=False, backend=backend), plain("area2", t, C)
    assert off(found, expected) < 1e-13
    for x, y in zip(gradients(found, W, t, C), gradients(expected, W, t, C), strict=True):
        assert off(x, y) < 1e-12


@each_score
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FLOAT64])
def test_normalized_rows_of_any_dtype(score, dtype, backend):
    """And their gradients, in their dtypes; in every form of candidates."""
    t, C, _ = embeddings(3, "any norm")
    t, C = (x.to(dtype).requires_grad_() for x in (t, C))
    W = torch.randn(len(t), len(C))
    wide_t, wide_C = (x.detach().double().requires_grad_() for x in (t, C))
    expected = plain(score, unit(wide_t), unit(wide_C))
    wanted = gradients(expected, W, wide_t, wide_C)
    eps = 1e-13 if dtype == FLOAT64 else 2e-7 if backend == "reference" else 5e-7  # 4 eps32 of λ₁
    for candidates in ((C,), tuple(C.unbind(1)), ({"video": C[:, 0], "audio": C[:, 1]},)):
        found = joint_scores(t, *candidates, score=score, backend=backend)
        assert found.dtype == (FLOAT64 if dtype == FLOAT64 else torch.float32)
        assert off(found.double(), expected) < eps
        for x, y in zip(gradients(found, W, t, C), wanted, strict=True):
            assert x.dtype == dtype
            assert off(x.double(), y) < max(100 * eps, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("normalize", [True, False])
def test_scores_of_one_product(normalize, backend):
    t, C, mask = embeddings(4, "masks")
    if not normalize:
        t, C = t * (0.5 + torch.rand(len(t), 1)), C * (0.5 + torch.rand(*C.shape[:2], 1))
    t, C = (x.requires_grad_() for x in (t, C))
    W = torch.randn(len(t), len(C), dtype=FLOAT64)
    u = dominant_singular_triplet(C, mask=mask, normalize=normalize).u
    product = torch.where(mask[:, :, None], C, 1.0).prod(1) * mask.any(1, keepdim=True)
    for score, expected in (("cosine", t @ u.T), ("mip", t @ product.T)):
        found = joint_scores(t, C, score=score, mask=mask, normalize=normalize, backend=backend)
        assert off(found, expected) < 1e-13
        wanted = gradients(expected, W, t, C)
        if normalize:  # by norms, along which there is nothing; t @ u.T has that of C already
            along = (t, C) if score == "mip" else (t, None)
            wanted = tuple(
                g if x is None else g - (g * x).sum(-1, keepdim=True) * x for g, x in zip(wanted, along, strict=True)
            )
        for x, y in zip(gradients(found, W, t, C), wanted, strict=True):
            assert off(x, y) < 1e-12
        assert not found[:, 3].any()


@of_any_k
def test_candidates_without_modalities_and_absent_ones(score, backend):
    """Absent modalities are never read, and get exact zeros."""
    t, C, mask = embeddings(4, "masks")
    expected = joint_scores(t, C, score=score, mask=mask, backend=backend)
    broken = torch.where(mask[:, :, None], C, torch.nan).requires_grad_()
    found = joint_scores(t, broken, score=score, mask=mask, backend=backend)
    assert torch.equal(found, expected)
    (g,) = torch.autograd.grad(found.sum(), broken)
    assert torch.isfinite(g).all()
    assert not g[~mask].any()
    alone = {"volume2": 1.0, "lambda": 1.0, "gain": 1.0}.get(score, 1.0)
    torch.testing.assert_close(found[:, 3], torch.full((len(t),), alone, dtype=FLOAT64))
    twice = joint_scores(2 * t, C, score=score, mask=mask, normalize=False, backend=backend)[:, 3]
    torch.testing.assert_close(twice, torch.full_like(twice, 2.0 if score in ROOTS else 4.0))


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("near", [0.0, 1e-9, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_near_alignment_everything_stays_finite(dtype, near, k, backend):
    """Where the formulas' own gradients are NaN: copies of one vector, and queries in a candidate's span."""
    base = unit(torch.randn(5, 1, 16, dtype=FLOAT64))
    C = unit(base + near * torch.randn(5, k - 1, 16, dtype=FLOAT64)).to(dtype).requires_grad_()
    t = unit(base[:, 0] + near * torch.randn(5, 16, dtype=FLOAT64)).to(dtype).requires_grad_()
    scores = [name for name in (*spec.SCORES, "cosine", "mip") if k == 3 or name != "area2"]
    for score in scores:
        found = joint_scores(t, C, score=score, backend=backend)
        for g in torch.autograd.grad(found.sum(), (t, C)):
            assert torch.isfinite(g).all(), score
            assert score in ("cosine", "sine") or g.abs().max() < 10, score  # the span and u₁ of near copies do turn


@pytest.mark.parametrize("score", VOLUMES)
def test_where_volumes_have_no_slope(score, backend):
    """At r = 0 and where a candidate is singular gradients are 0, and steps from there do not climb."""
    t = torch.eye(6)[:3].requires_grad_()
    C = torch.stack([torch.eye(6)[:2], torch.eye(6)[[3, 3]]]).requires_grad_()
    found = joint_scores(t, C, score=score, backend=backend)
    expected = {"sine": [[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]}.get(score, [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-7)
    g_t, g_C = torch.autograd.grad(found[:2].sum(), (t, C))
    assert g_C[1].abs().max() <= (1.0 if score == "sine" else 0.0)
    assert g_t[:2].abs().max() < 1e-6


@pytest.mark.parametrize(("angle", "slope"), [(1e-2, 1.0), (1e-5, 1.0), (2e-7, 1.0), (9e-8, 0.755), (3e-8, 0.0)])
def test_slopes_near_the_span_of_a_candidate(angle, slope, backend):
    """1/√r, which makes a unit vector of t's part beside the span; down to r = eps32²‖t‖², 0 where r is rounding."""
    t = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=FLOAT64, requires_grad=True)
    C = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=FLOAT64)
    for score in ("volume", "sine"):
        found = joint_scores(t, C, score=score, normalize=False, backend=backend)
        (g,) = torch.autograd.grad(found.sum(), t)
        assert g[0, 1].item() == pytest.approx(slope, rel=0.05, abs=0.0)
        assert abs(g[0, 0].item()) <= 1e-8


@pytest.mark.parametrize("score", ["volume", "sine", "gain", "area2"])
def test_descending_from_the_optimum_stays_there(score, backend):
    x = unit(torch.randn(4, 8)).repeat(3, 1, 1)
    t, v, a = (y.clone().requires_grad_() for y in x)
    sign = -1.0 if score == "gain" else 1.0
    before = float((sign * joint_scores(t, v, a, score=score, backend=backend).diagonal()).mean().detach())
    for _ in range(20):
        loss = (sign * joint_scores(t, v, a, score=score, backend=backend).diagonal()).mean()
        grads = torch.autograd.grad(loss, (t, v, a))
        with torch.no_grad():
            for y, g in zip((t, v, a), grads, strict=True):
                assert torch.isfinite(g).all()
                y -= 0.1 * g
    assert float(loss.detach()) <= before + 1e-6


@of_any_k
def test_nan_stays_within_its_pairs(score, backend):
    t, C, _ = embeddings(4, "random")
    clean = joint_scores(t, C, score=score, backend=backend)
    t, C = t.clone(), C.clone()
    t[2, 1], C[3, 1, 0] = torch.nan, torch.inf
    found = joint_scores(t, C, score=score, backend=backend)
    bad = torch.zeros_like(clean, dtype=torch.bool)
    bad[2], bad[:, 3] = True, True
    assert torch.equal(found.isnan(), bad)
    assert torch.equal(found[~bad], clean[~bad])


@of_any_k
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-160, 1e160])
def test_norms_do_not_matter(score, scale, backend):
    dtype = torch.float32 if 1e-38 < scale < 1e38 else FLOAT64
    t, C, _ = (None if x is None else x.to(dtype) for x in embeddings(4, "random"))
    wild = [(scale * x).requires_grad_() for x in (t, C)]
    tame = [x.requires_grad_() for x in (t, C)]
    found, expected = (joint_scores(*x, score=score, backend=backend) for x in (wild, tame))
    assert off(found, expected) < 2e-6 if dtype == torch.float32 else 1e-12
    for x, y in zip(torch.autograd.grad(found.sum(), wild), torch.autograd.grad(expected.sum(), tame), strict=True):
        assert off(scale * x, y) < (1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("score", ["sigma", "lambda", "gain"])
@pytest.mark.parametrize("scale", [2.0**-450, 2.0**-260, 2.0**260, 2.0**450])
def test_eigenvalues_of_any_norm(score, scale, backend):
    """Where squares are in float64's range: the same bits times a power of two; and of norms that share no scale."""
    t, C, mask = embeddings(4, "masks")
    power = 1 if score == "sigma" else 2
    tame, wild = ([(by * x).requires_grad_() for x in (t, C)] for by in (1.0, scale))
    options = {"score": score, "mask": mask, "normalize": False, "backend": backend}
    expected, found = (joint_scores(*x, **options) for x in (tame, wild))
    assert torch.equal(found, expected * scale**power)
    grads = [torch.autograd.grad(x.sum(), y) for x, y in ((expected, tame), (found, wild))]
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x * scale ** (power - 1), y)

    for of_C in (1.0, max(scale, 2.0**-300) ** -1 if scale < 1.0 else min(scale, 2.0**300) ** -1):
        by = scale if of_C == 1.0 else 1.0 / of_C
        apart = [(by * t).requires_grad_(), (of_C * C).requires_grad_()]
        found = joint_scores(*apart, **options)
        beta = apart[0].detach().square().sum(1, keepdim=True)
        if by > 1.0:
            wanted = beta.expand_as(found)
        else:
            leading = dominant_singular_triplet(apart[1].detach(), mask=mask, normalize=False)
            gain = torch.where(mask.any(1), (apart[0].detach() @ leading.u.T).square(), beta)
            wanted = gain if score == "gain" else gain + leading.sigma.square()
        torch.testing.assert_close(found, wanted.sqrt() if score == "sigma" else wanted, rtol=1e-10, atol=0.0)
        for g in torch.autograd.grad(found.sum(), apart):
            assert torch.isfinite(g).all()


def test_roots_of_hard_spectra():
    """w of widely different sizes, poles that coincide, nothing at the top pole: no residual beyond rounding."""
    N = 20000
    for n, wide in itertools.product((2, 3, 7, 31), (1, 6, 12)):
        poles = torch.rand(n, 1, N, dtype=FLOAT64) * 10.0 ** (-wide * torch.rand(n, 1, N))
        poles[0] = 0
        poles[1, :, ::3] = 0
        w = torch.rand(n, 1, N, dtype=FLOAT64) * 10.0 ** (-wide * torch.rand(n, 1, N))
        w[0, :, ::5] = 0
        excess = 2 * torch.rand(1, N, dtype=FLOAT64) - 1
        x = reference.largest_root(w, poles, excess)
        A = torch.diag_embed((-poles[:, 0]).T)  # of which the arrow's largest eigenvalue is x
        arrow = torch.zeros(N, n + 1, n + 1, dtype=FLOAT64)
        arrow[:, 1:, 1:], arrow[:, 0, 0] = A, -excess[0]
        arrow[:, 0, 1:] = arrow[:, 1:, 0] = w[:, 0].T.sqrt()
        largest = torch.linalg.eigvalsh(arrow)[:, -1].clamp_min(0)
        torch.testing.assert_close(x[0], largest, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", SLOW_ROOTS)
def test_roots_that_take_most_steps(n, backend):
    t, C = slow_root(n)
    both = torch.cat([t[:, None], C], 1).double()
    largest = torch.linalg.eigvalsh(both @ both.mT)[:, -1]
    for dtype, limit in ((torch.float32, 4 * 2.0**-23), (FLOAT64, 16 * 2.0**-52)):
        found = joint_scores(t.to(dtype), C.to(dtype), score="lambda", normalize=False, backend=backend)
        assert (found.double() - largest).abs() / largest <= limit


def spectral_gradients(score: str, t: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    t, C = (x.detach().requires_grad_() for x in (t, C))
    return torch.autograd.grad(plain(score, t, C).sum(), (t, C))


@pytest.mark.parametrize("score", ["sigma", "lambda", "gain"])
def test_queries_that_add_next_to_nothing(score, backend):
    """x is lost where it is added to μ₁; the eigenvector, and with it the gradient, is not to be."""
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=FLOAT64)
    Q = torch.block_diag(signs / 2, signs / 2)  # orthonormal to the last bit, whoever adds up its products
    given = [
        (Q[:1], torch.stack([Q[1:2], 0.75 * Q[1:2] + 0.25 * Q[2:3]], 1)),
        (torch.tensor([[1e-3, 1, 0, 0]], dtype=FLOAT64), torch.tensor([[[1e6, 0, 0, 0]]], dtype=FLOAT64)),
        (torch.tensor([[1e-5, 1, 0, 0]], dtype=FLOAT64), torch.tensor([[[1e6, 0, 0, 0], [1, 1, 1, 0]]]).double()),
        (1e-9 * Q[:3], Q[2:6, None] + Q[:2]),
    ]
    for t, C in given:
        t, C = (x.clone().requires_grad_() for x in (t, C))
        found = joint_scores(t, C, score=score, normalize=False, backend=backend)
        wanted = spectral_gradients(score, t, C)
        # The difference of the two eigenvalues of the gain leaves rounding of the gradient of either.
        size = spectral_gradients("sigma" if score == "sigma" else "lambda", t, C)
        for x, y, z in zip(torch.autograd.grad(found.sum(), (t, C)), wanted, size, strict=True):
            assert (x - y).abs().max() < 1e-13 * z.abs().max() + 1e-16


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("norm", [1.0, 30.0, 1e3, 1e6])
def test_gains_of_long_candidates(dtype, norm, backend):
    """Of one modality the gain is a root of a quadratic. Its gradient is small beside either eigenvalue's, and of it
    alone the digits count."""
    t, C = torch.randn(7, 9, dtype=FLOAT64).to(dtype), (norm * unit(torch.randn(5, 1, 9, dtype=FLOAT64))).to(dtype)
    t = unit(t) / 2
    wide = [x.double().requires_grad_() for x in (t, C)]
    w, beta, mu = (wide[0] @ wide[1][:, 0].T) ** 2, (wide[0] ** 2).sum(1)[:, None], (wide[1][:, 0] ** 2).sum(1)
    wanted = 2 * w / (mu - beta + ((mu - beta) ** 2 + 4 * w).sqrt())
    t, C = (x.requires_grad_() for x in (t, C))
    found = joint_scores(t, C, score="gain", normalize=False, backend=backend)
    within = 1e-13 if dtype == FLOAT64 else 2e-6
    assert off(found.double(), wanted) < within
    for x, y in zip(torch.autograd.grad(found.sum(), (t, C)), torch.autograd.grad(wanted.sum(), wide), strict=True):
        assert off(x.double(), y) < 10 * within


def raw(t: Tensor, C: Tensor, score: str, backend: str, W: Tensor | None = None) -> list[Tensor]:
    """Scores of vectors as they are, and gradients of their sum, or of that times W."""
    t, C = (x.detach().requires_grad_() for x in (t, C))
    found = joint_scores(t, C, score=score, normalize=False, backend=backend)
    return [found.detach(), *gradients(found, found.new_ones(()) if W is None else W, t, C)]


TINY_NORMS = [
    (torch.float32, 1e-16, 1.0),
    (torch.float32, 1e-20, 1.0),
    (FLOAT64, 1e-16, 1.0),
    (FLOAT64, 1e-20, 1.0),
    (FLOAT64, 1e-30, 1e30),
    (FLOAT64, 1e-60, 1e-60),
]


@pytest.mark.parametrize("score", ["volume", "sine"])
@pytest.mark.parametrize(("dtype", "of_t", "of_C"), TINY_NORMS)
def test_slopes_do_not_depend_on_norms(score, dtype, of_t, of_C, backend):
    """The root of a volume has slopes wherever r is more than rounding of ‖t‖², however small that is."""
    e, one = torch.eye(8, dtype=FLOAT64), torch.ones(1, 1, dtype=FLOAT64)
    random = (torch.randn(*shape, dtype=FLOAT64) for shape in ((5, 16), (6, 2, 16), (5, 6)))
    for t, C, W in (random, (e[:1], e[1:2, None], one)):
        size = of_C ** C.shape[1] if score == "volume" else 1.0  # of scores, and of gradients of t
        found = raw((of_t * t).to(dtype), (of_C * C).to(dtype), score, backend, W.to(dtype))
        wanted = raw(t, C, score, "reference", W)
        within = 1e-12 if dtype == FLOAT64 else 2e-6
        for x, y, z in zip(found, wanted, (size * of_t, size, size * of_t / of_C), strict=True):
            if backend != "triton" or x is not found[0]:  # its scores are from squares in float32
                assert off(x.double() / z, y) < within


@of_any_k
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("scale", [1e-10, 1e-6, 1e-3, 1e3, 1e8])
def test_absent_modalities_at_any_norm(score, scale, dtype, backend):
    """What an absent one is told by is nothing that others could be as large as, or as small."""
    if dtype == torch.float32 and score == "volume2" and scale in (1e-10, 1e8):
        return  # float32 has no such numbers
    t, C = (scale * torch.randn(*shape, dtype=FLOAT64) for shape in ((5, 16), (6, 3, 16)))
    mask = torch.tensor([True, False, True]).expand(6, 3)
    t, C = (x.to(dtype).requires_grad_() for x in (t, C))
    found = joint_scores(t, C, score=score, mask=mask, normalize=False, backend=backend)
    wanted = joint_scores(t, C[:, ::2], score=score, normalize=False, backend=backend)
    within = 1e-12 if dtype == FLOAT64 else 2e-6
    assert off(found, wanted) < within
    for x, y in zip(
        gradients(found, found.new_ones(()), t, C), gradients(wanted, wanted.new_ones(()), t, C), strict=True
    ):
        assert off(x, y) < 10 * within


@of_any_k
@pytest.mark.parametrize("k", [4, 5, 17])
def test_absent_modalities_have_no_gradient(score, k, backend):
    """Not even one of rounding's size; none is NaN where others overflow."""
    mask = torch.rand(6, k - 1) < 0.6
    for scale in (1.0, 1e12):
        t, C = (scale * torch.randn(*shape) for shape in ((5, 32), (6, k - 1, 32)))
        C = torch.where(mask[:, :, None], C, torch.nan).requires_grad_()
        found = joint_scores(t, C, score=score, mask=mask, normalize=False, backend=backend)
        (grad,) = torch.autograd.grad(found.sum(), C)
        assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("score", spec.NAMES)
def test_on_the_meta_device(score):
    t, C = torch.randn(5, 8, device="meta", requires_grad=True), torch.randn(6, 2, 8, device="meta", requires_grad=True)
    found = joint_scores(t, C, score=score)
    assert found.shape == (5, 6)
    assert [x.shape for x in torch.autograd.grad(found.sum(), (t, C))] == [t.shape, C.shape]


@pytest.mark.parametrize("score", ["volume", "volume2"])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8, 1e12])
def test_dependent_modalities_at_any_norm(score, scale, dtype, backend):
    """Volumes are 0, since an eigenvalue is, which rounding makes negative: more so, the larger the others are."""
    t, c, e = ((scale * torch.randn(9, 16)).to(dtype) for _ in range(3))
    if dtype == torch.float32 and scale > 1e10:
        return  # float32 has no such volumes
    assert not joint_scores(t, c, c, e, score=score, normalize=False, backend=backend).any()
    assert not joint_scores(t, 3 * c, e, -c, score=score, normalize=False, backend=backend).any()


def test_slopes_between_float32s_ends(backend):
    """Norms that are as far apart as float32 has them, of a gradient that it can hold."""
    t, C = 1e-30 * torch.randn(5, 16), 1e15 * torch.randn(6, 2, 16)
    for score in ("sine", "volume"):
        _, found, _ = raw(t, C, score, backend)
        _, wanted, _ = raw(t.double(), C.double(), score, "reference")
        assert off(found.double(), wanted) < 2e-6


def at_float32s_ends() -> dict[str, tuple[str, Tensor, Tensor]]:
    """Numbers of float32 whose score is one too, and whose squares or products are not."""
    e, here = torch.eye(16), torch.zeros(1, 2, 8)
    here[0, 1, 0] = 1e-23
    return {
        "a large triangle": ("area2", torch.randn(4, 16), 1e9 * torch.randn(5, 2, 16)),
        "a long and narrow triangle": ("area2", 1e7 * torch.eye(8)[7:], here),
        "short queries": ("volume2", 1e-6 * torch.eye(8)[[0, 7]], 1e6 * torch.eye(4, 8)[None]),
        "a long query": ("volume2", 1e7 * torch.eye(8)[7:], 1e-6 * torch.eye(4, 8)[None]),
        "a large volume with a query in its span": ("volume", e[:1], 1e4 * torch.eye(12, 16)[None]),
        "a large volume": ("volume", 1e-12 * e[15:], 1e4 * torch.eye(12, 16)[None]),
        "a small volume": ("volume", 1e12 * e[15:], 1e-4 * torch.eye(12, 16)[None]),
    }


@pytest.mark.parametrize("case", at_float32s_ends())
def test_scores_at_the_ends_of_float32(case, backend):
    """Scores are right wherever float32 can hold them, whatever is met on the way, and gradients where it can hold
    all of them."""
    score, t, C = at_float32s_ends()[case]
    found, wanted = raw(t, C, score, backend), raw(t.double(), C.double(), score, "reference")
    for x, y in zip(found, wanted, strict=True):
        # Scores of Triton's kernel are from squares in float32, from which these leave.
        if y.abs().max() < 3.4e38 and (backend != "triton" or x is not found[0]):
            assert (x.double() - y).abs().max() <= 1e-6 * y.abs().max() + 1.2e-38
    assert wanted[0].abs().max() < 3.4e38


@pytest.mark.parametrize("score", ["sigma", "lambda", "gain"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("along", "norm"), [(2e-19, 10.0), (4e-19, 1e3), (1e-18, 1e5)])
def test_eigenvectors_beyond_the_squares_of_float32(along, norm, n, score, backend):
    """A query with next to nothing along a long candidate: the eigenvector is the candidate's, from which ŷ says how
    far the query is, and ŷ² leaves float32. Then it is the candidate's alone, and not nobody's."""
    t, C = torch.zeros(1, 8), torch.zeros(1, n, 8)
    t[0, 0], t[0, 1], C[0, -1, 2], C[0, 0, 1] = 1.0, along, 1.0, norm
    if n == 1:
        C[0, 0, 2] = 0.0
    found, wanted = raw(t, C, score, backend), raw(t.double(), C.double(), score, "reference")
    largest = raw(t.double(), C.double(), "sigma" if score == "sigma" else "lambda", "reference")
    size = max(float(x.abs().max()) for x in largest[1:])  # of gradients of either
    for x, y, z in zip(found, wanted, (float(largest[0].abs().max()), size, size), strict=True):
        assert (x - y).abs().max() <= 1e-6 * z


@each_score
@pytest.mark.parametrize("normalize", [True, False])
def test_factors_are_not_rounded(score, normalize, backend, matmul_precision):
    """Whatever PyTorch is allowed to do with products of float32: volumes are what is left of them."""
    t, C = torch.randn(70, 64), torch.randn(90, 2, 64)
    C[:70] += 3 * t[:, None]
    wide = [unit(x.double()) if normalize else x.double() for x in (t, C)]
    wanted = [plain(score, *(x.requires_grad_() for x in wide))]
    wanted += [*gradients(wanted[0], W := torch.randn(70, 90, dtype=FLOAT64), *wide)]
    matmul_precision("medium")
    t, C = ((unit(x) if normalize else x).requires_grad_() for x in (t, C))
    scores = joint_scores(t, C, score=score, normalize=False, backend=backend)
    for x, y in zip((scores, *gradients(scores, W.float(), t, C)), wanted, strict=True):
        assert off(x.double(), y) < 1e-5


def test_any_backend_may_be_asked_for(backend, device):
    """Whoever has no kernels for it leaves it to the next one."""
    t, C, _ = (None if x is None else x.to(device) for x in embeddings(3, "random"))
    assert off(joint_scores(t, C, backend=backend), joint_scores(t, C, backend="reference")) < 1e-14


def test_nothing_to_score():
    for Nq, Ng in ((0, 3), (3, 0), (0, 0)):
        t, C = torch.randn(Nq, 4, requires_grad=True), torch.randn(Ng, 2, 4, requires_grad=True)
        for score in (*spec.SCORES, "cosine", "mip"):
            found = joint_scores(t, C, score=score)
            assert found.shape == (Nq, Ng)
            assert all(not g.any() for g in torch.autograd.grad(found.sum(), (t, C)))


def test_errors_name_the_argument():
    t, C = torch.randn(3, 4), torch.randn(5, 2, 4)
    with pytest.raises(ValueError, match="score: got 'det', wanted one of 'volume'"):
        joint_scores(t, C, score="det")
    with pytest.raises(ValueError, match=r"query: got shape \(3, 5\), wanted \(Nq, 4\)"):
        joint_scores(torch.randn(3, 5), C)
    with pytest.raises(TypeError, match=r"query: got list, wanted a floating-point tensor \(Nq, d\)$"):
        joint_scores([t], C)
    for several in ([t, t], {"text": t, "video": t}):  # as the losses without a query take them
        with pytest.raises(ValueError, match=r"candidates: got none, wanted .* \(B, d\) after the query"):
            joint_scores(several)
    with pytest.raises(ValueError, match=r"candidates\[1\]: got shape \(5, 3\), wanted \(5, 4\) as candidates\[0\]"):
        joint_scores(t, C[:, 0], torch.randn(5, 3))
    with pytest.raises(TypeError, match=r"candidates\['audio'\]: got dtype torch.int64"):
        joint_scores(t, {"video": C[:, 0], "audio": C[:, 1].long()})
    with pytest.raises(ValueError, match="candidates: got k = 33 modalities, wanted at most 31"):
        joint_scores(t, torch.randn(5, 33, 4))
    with pytest.raises(ValueError, match="candidates: got 3 modalities, wanted 2: score='area2'"):
        joint_scores(t, torch.randn(5, 3, 4), score="area2")
    with pytest.raises(ValueError, match="mask: got one, wanted none: score='area2'"):
        joint_scores(t, C, score="area2", mask=torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="candidates: got 32 modalities, wanted at most 31"):
        joint_scores(t, torch.randn(5, 32, 4))
    with pytest.raises(ValueError, match=r"mask: got shape \(3, 2\), wanted \(5, 2\)"):
        joint_scores(t, C, mask=torch.ones(3, 2, dtype=torch.bool))


def test_compiled(backend):
    t, C, mask = embeddings(4, "masks")
    t, C = (x.float().requires_grad_() for x in (t, C))
    compiled = torch.compile(
        lambda t, C: joint_scores(t, C, mask=mask, backend=backend), backend="aot_eager", fullgraph=True
    )
    found, expected = compiled(t, C), joint_scores(t, C, mask=mask, backend=backend)
    assert torch.equal(found, expected)
    for x, y in zip(*(torch.autograd.grad(s.sum(), (t, C)) for s in (found, expected)), strict=True):
        assert torch.equal(x, y)


def test_what_is_known_of_a_few(backend):
    """Orthogonal, equal and opposite vectors, by hand."""
    e = torch.eye(3, dtype=FLOAT64)
    C = torch.stack([torch.stack([e[0], e[1]]), torch.stack([e[0], e[0]])])
    t = torch.stack([e[2], e[0], -e[0], (e[0] + e[1]) / math.sqrt(2)])
    root = math.sqrt(2)
    expected = {
        "volume": [[1, 0], [0, 0], [0, 0], [0, 0]],
        "sine": [[1, 1], [0, 0], [0, 0], [0, 1 / root]],
        "sigma": [[1, root], [root, math.sqrt(3)], [root, math.sqrt(3)], [root, math.sqrt((3 + math.sqrt(5)) / 2)]],
        "gain": [[0, 0], [1, 1], [1, 1], [1, (math.sqrt(5) - 1) / 2]],
        "cosine": [[0, 0], [1 / root, 1], [-1 / root, -1], [1, 1 / root]],
        "mip": [[0, 0], [0, 1], [0, -1], [0, 1 / root]],
    }
    for score, values in expected.items():
        torch.testing.assert_close(
            joint_scores(t, C, score=score, backend=backend), torch.tensor(values, dtype=FLOAT64), rtol=0, atol=3e-8
        )


@pytest.mark.parametrize("score", spec.NAMES)
@pytest.mark.parametrize("wide", ["query", "candidates", "one of them"])
def test_mixed_dtypes(score, wide, backend):
    """As of embeddings that are all float64, and with float64's thresholds, if one of them is."""
    t, (a, b) = torch.randn(6, 8), (torch.randn(7, 8) for _ in range(2))
    a[0], b[0] = torch.eye(8)[0], torch.eye(8)[1] - 1e-8 * torch.eye(8)[0]  # tied, to float32
    widened = {"query": (t,), "candidates": (a, b), "one of them": (a,)}[wide]
    xs = [x.double() if any(x is other for other in widened) else x for x in (t, a, b)]
    xs = [x.requires_grad_() for x in xs]
    all_wide = [x.detach().double().requires_grad_() for x in xs]
    found = joint_scores(*xs, score=score, backend=backend)
    wanted = joint_scores(*all_wide, score=score, backend=backend)
    assert found.dtype == FLOAT64
    assert off(found, wanted) < 1e-12
    W = torch.randn(6, 7, dtype=FLOAT64)
    for x, y, z in zip(gradients(found, W, *xs), gradients(wanted, W, *all_wide), xs, strict=True):
        assert x.dtype == z.dtype
        assert off(x, y) < (1e-10 if x.dtype == FLOAT64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_beyond_float32(dtype, backend):
    """On the way: of numbers of any norm, whose multilinear inner product float32 holds."""
    t, C = (1e10 * torch.randn(5, 16)).to(dtype), (1e-15 * torch.randn(6, 3, 16)).to(dtype)
    C[:, 0] *= 1e25
    C[3, 1:], t[2] = 1e15 * C[3, 1:], 1e-20 * t[2]
    t, C = (x.requires_grad_() for x in (t, C))
    wide = [x.detach().double().requires_grad_() for x in (t, C)]
    found = joint_scores(t, C, score="mip", normalize=False, backend=backend)
    wanted = torch.einsum("id,jd->ij", wide[0], wide[1].prod(1))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6 * wanted.abs().median().item())
    t, c = (1e-30 * torch.randn(5, 16)).to(dtype), (1e30 * torch.randn(5, 16)).to(dtype)  # c c is beyond it, too
    found = joint_scores(t, c, c, score="mip", normalize=False, backend=backend)
    wanted = t.double() @ c.double().square().T
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6 * wanted.abs().median().item())


@pytest.mark.parametrize("entry", [1.4e-45, 1e-40, 0.0])
def test_gradients_of_products_that_are_nearly_nothing(backend, entry):
    """Of each factor it is the product of the others, however small the whole product is."""
    torch.manual_seed(0)
    t, a, b = torch.nn.functional.normalize(torch.randn(3, 1, 8), dim=2)
    a[0, 0] = entry
    xs = [x.clone().requires_grad_() for x in (t, a, b)]
    found = torch.autograd.grad(joint_scores(*xs, score="mip", backend=backend).sum(), xs)
    ys = [x.double().requires_grad_() for x in (t, a, b)]
    unit = [y / y.norm() for y in ys]
    expected = torch.autograd.grad((unit[0] * unit[1] * unit[2]).sum(), ys)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", [*spec.SCORES, "cosine", "mip"])
@pytest.mark.parametrize("wide", [0, 1, 2, 3])
def test_one_of_float64_is_enough(score, wide, backend):
    """For results in it, wherever it is."""
    n = 3 if score == "area2" else 4
    xs = [torch.randn(4, 6, dtype=FLOAT64 if m == wide % n else torch.float32) for m in range(n)]
    found = joint_scores(*xs, score=score, backend=backend)
    assert found.dtype == FLOAT64
    exact = joint_scores(*(x.double() for x in xs), score=score, backend="reference")
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
