"""Joint scores of the compiled library: tiles and their edges, float32's precision, threads, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pmrl_kernels import joint_scores
from pmrl_kernels.ops.joint import spec
from tests.native.test_memory import Allocations
from tests.tools.native import OTHERS, run, same_bits

EPS32 = 2.0**-23
VOLUMES = ("volume", "volume2", "sine")


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def data(Nq: int, Ng: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and candidates that share something, and a gradient of their scores."""
    C = torch.randn(Ng, n, d, dtype=torch.float64) + torch.randn(Ng, 1, d, dtype=torch.float64)
    t = torch.randn(Nq, d, dtype=torch.float64)
    both = min(Nq, Ng)
    t[:both] += 0.5 * C[:both, 0]
    W = torch.randn(Nq, Ng, dtype=torch.float64)
    return unit(t).to(dtype), unit(C).to(dtype), W.to(torch.float64 if dtype == torch.float64 else torch.float32)


def with_gradients(backend: str, t: Tensor, C: Tensor, W: Tensor, **options) -> list[Tensor]:
    t, C = t.detach().requires_grad_(), C.detach().requires_grad_()
    scores = joint_scores(t, C, backend=backend, **options)
    return [scores.detach(), *torch.autograd.grad(scores, (t, C), W.to(scores.dtype))]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-300))


def agree(t: Tensor, C: Tensor, W: Tensor, scores_within: float, gradients_within: float, **options) -> None:
    """With the reference on the same numbers in float64."""
    found = with_gradients("native", t, C, W, **options)
    expected = with_gradients("reference", t.double(), C.double(), W.double(), **options)
    limits = (scores_within, gradients_within, gradients_within)
    for x, y, limit in zip(found, expected, limits, strict=True):
        assert off(x, y) < limit, options


@pytest.mark.parametrize("score", spec.SCORES)
@pytest.mark.parametrize("d", [1, 3, 7, 33])
@pytest.mark.parametrize(("Nq", "Ng"), [(1, 1), (3, 5), (31, 33), (257, 129), (300, 391), (5, 700)])
def test_edges_of_tiles(score, d, Nq, Ng):
    n = 2 if score == "area2" else min(3, (d + 1) // 2)
    t, C, W = data(Nq, Ng, n, d, torch.float64)
    t, C = t * (0.5 + torch.rand(Nq, 1)), C * (0.5 + torch.rand(Ng, n, 1))
    if score in VOLUMES:  # slopes of near copies lose digits in float64 too
        W = torch.where(joint_scores(t, C, score="sine", normalize=False) < 0.05, 0.0, W)
    found = with_gradients("native", t, C, W, score=score, normalize=False)
    expected = with_gradients("reference", t, C, W, score=score, normalize=False)
    if d == 1 and score in VOLUMES:  # of which all are rounding
        assert found[0].abs().max() < 1e-7
        return
    for x, y, limit in zip(found, expected, (1e-9 if score in VOLUMES else 1e-12, 1e-8, 1e-8), strict=True):
        assert (x - y).abs().max() < limit * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize("score", [name for name in spec.SCORES if name != "area2"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 31])
def test_any_number_of_modalities(score, n):
    t, C, W = data(40, 67, n, 48)
    mask = torch.rand(67, n) < 0.7
    for options in ({}, {"mask": mask}):
        agree(t.double(), C.double(), W.double(), 1e-12, 1e-9, score=score, **options)
        # Volumes of 31 modalities are small against their parts.
        agree(t, C, W, 2e-6 if n < 31 else 1e-4, 2e-5 if n < 31 else 1e-3, score=score, **options)


@pytest.mark.parametrize(
    "dtypes", [*itertools.product((torch.float32, torch.bfloat16, torch.float64), repeat=2)], ids=str
)
def test_mixed_dtypes_and_layouts(dtypes):
    t, C, W = data(9, 11, 2, 20)
    a, b = C.unbind(1)
    t, a, b = t.to(dtypes[0]), a.to(dtypes[1]).t().contiguous().t(), b.to(torch.float16)[:, ::1]
    xs = [x.detach().requires_grad_() for x in (t, a, b)]
    found = joint_scores(*xs, backend="native", score="gain")
    expected = joint_scores(*xs, backend="reference", score="gain")
    assert found.dtype == expected.dtype
    assert off(found.detach(), expected.detach()) < (1e-12 if torch.float64 in dtypes else 5e-7)
    W = W.to(found.dtype)
    for x, y in zip(torch.autograd.grad(found, xs, W), torch.autograd.grad(expected, xs, W), strict=True):
        assert x.dtype == y.dtype
        assert off(x, y) < max(1e-5, 2 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("score", ["volume", "sine", "gain"])
@pytest.mark.parametrize("views", [False, True])
def test_absent_modalities_are_not_read(score, views):
    t, C, W = data(70, 150, 3, 24)
    mask = torch.rand(150, 3) < 0.6
    mask[3] = False
    broken = torch.where(mask[:, :, None], C, torch.nan)
    if views:  # a bool tensor may be a view of other bytes
        mask = (mask.to(torch.uint8) * 255).view(torch.bool)
    found = with_gradients("native", t, broken, W, score=score, mask=mask)
    expected = with_gradients("native", t, C, W, score=score, mask=mask)
    assert same_bits(found, expected)
    assert not found[2][~mask.view(torch.uint8).bool()].any()


@pytest.mark.parametrize("near", [0.0, 1e-7, 1e-5, 1e-3, 1e-2])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("score", VOLUMES)
def test_near_copies(score, n, near):
    """Scores within 2 eps32 of those of the same numbers in float64, and gradients that point the right way."""
    C = unit(torch.randn(50, n, 64, dtype=torch.float64)).float()
    t = unit(C.double().mean(1) + near * torch.randn(50, 64, dtype=torch.float64)).float()
    W = torch.zeros(50, 50)
    W.fill_diagonal_(1.0)
    found = with_gradients("native", t, C, W, score=score)
    expected = with_gradients("reference", t.double(), C.double(), W.double(), score=score)
    plain = 8 * EPS32 / (8 * near) if near > 1e-3 else 0.0  # these are no near copies
    assert (found[0] - expected[0]).diagonal().abs().max() <= 2 * EPS32 + plain
    if near >= 1e-5:  # below, the last bits of float32 inputs decide
        for x, y in zip(found[1:], expected[1:], strict=True):
            assert (x - y).abs().max() < 1e-4 * y.abs().max() + 4 * EPS32 * (score == "volume2")


def test_everything_is_a_near_copy():
    t, C, W = unit(torch.ones(1, 20) + 1e-4 * torch.randn(90, 20)), torch.ones(80, 1, 20) / 20**0.5, torch.randn(90, 80)
    C = unit(C + 1e-4 * torch.randn(80, 1, 20))
    found = with_gradients("native", t, C, W, score="volume")
    expected = with_gradients("reference", t.double(), C.double(), W.double(), score="volume")
    assert (found[0] - expected[0]).abs().max() <= 2 * EPS32
    for x, y in zip(found[1:], expected[1:], strict=True):
        assert off(x, y) < 1e-5


def test_areas_of_near_copies():
    v = unit(torch.randn(60, 32))
    t, a = unit(v + 1e-4 * torch.randn(60, 32)), unit(v + 1e-4 * torch.randn(60, 32))
    found = joint_scores(t, v, a, score="area2", backend="native").diagonal()
    expected = joint_scores(t.double(), v.double(), a.double(), score="area2", backend="reference").diagonal()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (12, 31))])
def test_roots_of_hard_spectra_in_float32(n):
    """Candidates whose singular values differ widely or not at all, queries along any of them: λ₁ within 4 eps32."""
    N, d = 300, 40
    for wide, equal in itertools.product((0, 2, 5), (False, True)):
        V = torch.linalg.qr(torch.randn(N, d, d, dtype=torch.float64))[0][:, :n]
        mu = 10.0 ** (-wide * torch.rand(N, n, dtype=torch.float64))
        if equal:
            mu[:, : (n + 1) // 2] = 1.0
        C = (mu.sqrt()[:, :, None] * V).float()
        weights = torch.randn(N, n, dtype=torch.float64) * 10.0 ** (-wide * torch.rand(N, n, dtype=torch.float64))
        weights[::3, 0] = 0
        t = unit((weights[:, :, None] * V).sum(1) + 1e-3 * torch.randn(N, d, dtype=torch.float64)).float()
        t[::5] *= 0.3
        expected = {
            score: joint_scores(t.double(), C.double(), score=score, normalize=False, backend="reference")
            for score in ("lambda", "gain")
        }
        for score, wanted in expected.items():
            found = joint_scores(t, C, score=score, normalize=False, backend="native")
            assert ((found - wanted).abs() / expected["lambda"]).max() <= 4 * EPS32


@pytest.mark.parametrize("score", ["volume", "sigma", "area2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_no_bit(score, dtype):
    t, C, W = data(530, 300, 2, 96, dtype)
    t[:5] = C[:5, 0]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradients("native", t, C, W, score=score))
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_a_gradient_that_nobody_asked_for_is_not_made():
    t, C, W = data(20, 30, 2, 16)
    whole = with_gradients("native", t, C, W)
    for at in (0, 1):
        xs = [t.detach(), C.detach()]
        xs[at].requires_grad_()
        (g,) = torch.autograd.grad(joint_scores(*xs, backend="native"), xs[at], W)
        assert torch.equal(g, whole[1 + at])
        xs[at].requires_grad_(False)


def test_memory():
    """Beyond the scores: what is as large as the candidates and the queries, and tiles."""
    Nq, Ng, n, d = 2048, 1024, 3, 64
    t, C, W = data(Nq, Ng, n, d)
    torch.use_deterministic_algorithms(False)
    with_gradients("native", t, C, W)
    found = Allocations(lambda: joint_scores(t, C, backend="native"))
    embeddings, tiles = 4 * d * (Nq + n * Ng), torch.get_num_threads() * 4 * 256 * 128 * (n + 4)
    assert found.peak <= 4 * Nq * Ng + embeddings + tiles + 2**20
    both = Allocations(lambda: with_gradients("native", t, C, W))
    assert both.peak <= 4 * Nq * Ng + 4 * embeddings + tiles + 2**20


ISA = """
import torch
from pmrl_kernels import joint_scores
torch.manual_seed(0)
for score in ("volume", "volume2", "sine", "sigma", "lambda", "gain", "area2"):
    for n in (2,) if score == "area2" else (1, 3, 4, 9):
        for dtype, within in ((torch.float32, 1e-4), (torch.float64, 1e-9), (torch.bfloat16, 2e-2)):
            C = torch.nn.functional.normalize(torch.randn(45, n, 33), dim=-1).to(dtype)
            t = torch.nn.functional.normalize(torch.randn(70, 33), dim=-1).to(dtype)
            t[:3] = C[:3, 0]
            xs = [t.requires_grad_(), C.requires_grad_()]
            found, expected = (joint_scores(*xs, score=score, backend=name) for name in ("native", "reference"))
            W = torch.randn(70, 45).to(found.dtype)
            W[:3, :3] = 0  # copies, of whose gradients rounding decides
            torch.testing.assert_close(found, expected, rtol=within, atol=1e-6 if within > 1e-9 else 1e-7)
            for x, y in zip(*(torch.autograd.grad(s, xs, W) for s in (found, expected))):
                assert (x - y).abs().max() <= within * y.abs().max(), (score, n, dtype)
print("fine")
"""


@pytest.mark.parametrize("isa", [None, *OTHERS])
def test_every_instruction_set(isa):
    done = run("-c", ISA, isa=isa)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
