"""Ranks and best candidates are those of a stable sort of all float64 scores, though nothing holds them all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import (
    Recall,
    dominant_singular_triplet,
    joint_contrastive_loss,
    joint_scores,
    recall_at,
    retrieval,
    retrieval_ranks,
)
from pmrl_kernels import retrieval_topk as topk
from pmrl_kernels.joint import NAMES
from pmrl_kernels.ops.joint import spec
from pmrl_kernels.ops.joint.exact import ExactCandidates, exact_rows
from pmrl_kernels.ops.joint.reference import ordered_sum
from tests.native.test_memory import Allocations
from tests.tools.functions import any_bytes

FLOAT64 = torch.float64
SMALLEST_FIRST = ("volume", "volume2", "sine", "area2")
TIES = ("index", "optimistic", "pessimistic")
each_score = pytest.mark.parametrize("score", NAMES)


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def clips(Ng: int, Nq: int, k: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Captions (Nq, d), clips (Ng, k - 1, d) and whose caption it is; a tenth of both are copies of others."""
    X = unit(torch.randn(Ng, 1, d) + 1.44 * torch.randn(Ng, k, d))
    t, C = X[:, 0].contiguous(), X[:, 1:].contiguous()
    some, others = slice(Ng // 10, Ng // 5), slice(3 * Ng // 10, 3 * Ng // 10 + Ng // 5 - Ng // 10)
    t[some], C[some] = t[others], C[others]
    more = unit(t[: Nq - Ng] + 0.05 * torch.randn(Nq - Ng, d))
    return torch.cat([t, more]), C, torch.cat([torch.arange(Ng), torch.arange(Nq - Ng)])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way, of odd sizes, and pairs in several parts."""
    monkeypatch.setattr(retrieval, "_QUERIES", 71 * 32)
    monkeypatch.setattr(retrieval, "_CANDIDATES", 37 * 32 * 3)
    monkeypatch.setattr(retrieval, "_PAIRS", 501 * 32 * 5)


def merits(
    t: Tensor, C: Tensor, score: str, mask: Tensor | None = None, normalize: bool = True, backend: str | None = None
) -> Tensor:
    """(Nq, Ng): all exact scores, turned so that the largest is best. No score is -Inf. No backend computes them."""
    index = spec.SCORES.index(score) if score in spec.SCORES else score
    of = ExactCandidates([C], mask, index, normalize, FLOAT64 in (t.dtype, C.dtype))
    rows = exact_rows(t, None, normalize)
    found = torch.stack([of.scores(rows, torch.full((len(t),), j)) for j in range(len(C))], 1)
    found = -found if score in SMALLEST_FIRST else found
    return found.nan_to_num(-math.inf, math.inf, -math.inf).masked_fill(~of.there, -math.inf)


def sorted_ranks(all_merits: Tensor, positives: Tensor, by_query: bool, ties: str) -> Tensor:
    """As published code has it: sort, and look where the right one is; of several queries the best."""
    if not by_query:
        all_merits = all_merits.T
    order = all_merits.sort(dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    found = []
    for i, row in enumerate(all_merits):
        right = [int(positives[i])] if by_query else (positives == i).nonzero()[:, 0].tolist()
        by_rule = {
            "index": lambda p, i=i: int(place[i, p]),
            "optimistic": lambda p, row=row: int((row > row[p]).sum()),
            "pessimistic": lambda p, row=row: int((row >= row[p]).sum()) - 1,
        }[ties]
        found.append(min((by_rule(p) for p in right if p >= 0), default=-1))
    return torch.tensor(found)


def check_ranks(
    t: Tensor, C: Tensor, positives: Tensor, score: str, rules: Sequence[str] = TIES, **options: Any
) -> None:
    expected = merits(t, C, score, **options)
    for direction, ties in itertools.product(("query", "candidate"), rules):
        found = retrieval_ranks(t, C, score=score, positives=positives, direction=direction, ties=ties, **options)
        assert found.dtype == torch.int64
        wanted = sorted_ranks(expected, positives, direction == "query", ties)
        assert torch.equal(found, wanted), (score, direction, ties)


def check_topk(t: Tensor, C: Tensor, score: str, k: int, **options: Any) -> None:
    expected = merits(t, C, score, **options).sort(dim=1, descending=True, stable=True)
    found = topk(t, C, k=k, score=score, **options)
    assert torch.equal(found.indices, expected.indices[:, :k])
    values = -expected.values if score in SMALLEST_FIRST else expected.values
    assert torch.equal(found.scores, values[:, :k].to(found.scores.dtype))


def scores_with(k: int) -> list[str]:
    return [score for score in NAMES if k == 3 or score != "area2"]


# ------------------------------------------------------------------------------------------------
# Scores of single pairs
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_scores_of_pairs_are_those_of_the_matrix(k):
    t, C, _ = clips(30, 40, k, 24)
    mask = torch.rand(30, k - 1) < 0.7
    for score, some in itertools.product(scores_with(k), (None, mask)):
        if score == "area2" and some is not None:
            continue
        expected = joint_scores(t.double(), C.double(), score=score, mask=some)
        found = merits(t.double(), C.double(), score, some)
        found = -found if score in SMALLEST_FIRST else found
        there = slice(None) if some is None else some.any(1)
        torch.testing.assert_close(found[:, there], expected[:, there], rtol=1e-11, atol=1e-13)


def test_leading_vectors_are_the_package_s():
    """Of antipodal pairs and ties too, where a rule picks them."""
    e = torch.eye(4)
    C = torch.stack(
        [torch.stack(x) for x in ([e[0], -e[0]], [-e[1], e[1]], [e[0], e[1]], [e[2], e[2]], [e[3], 0 * e[0]])]
    )
    C = torch.cat([C, unit(torch.randn(20, 2, 4))])
    found = ExactCandidates([C], None, "cosine", True, False).vector
    torch.testing.assert_close(found, dominant_singular_triplet(C).u.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 4, 6, 9])
def test_copies_score_the_same_bits(k):
    """Wherever they are, among however many, with any number of threads."""
    threads = torch.get_num_threads()
    d = 129
    t, c = torch.randn(d), torch.randn(k - 1, d)
    for score in scores_with(k):
        index = spec.SCORES.index(score) if score in spec.SCORES else score
        seen = set()
        for size, count in ((1, 1), (2, 1), (7, 2), (33, 1), (129, 1), (258, 3)):
            torch.set_num_threads(count)
            C, T = torch.randn(size, k - 1, d), torch.randn(size, d)
            places = {0, size // 2, size - 1}
            for p in places:
                C[p], T[p] = c, t
            of = ExactCandidates([C], None, index, True, False)
            found = of.scores(exact_rows(T, None, True), torch.arange(size))
            seen |= {float(found[p]) for p in places}
        torch.set_num_threads(threads)
        assert len(seen) == 1, score


def test_ordered_sums():
    for size, dim in itertools.product((1, 2, 3, 7, 8, 100), (0, 1)):
        x = torch.randn((size, 5) if dim == 0 else (5, size), dtype=FLOAT64)
        before = x.clone()
        torch.testing.assert_close(ordered_sum(x, dim), x.sum(dim))
        assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------------
# Ranks
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 4])
def test_ranks_are_those_of_a_stable_sort(k, small_blocks):
    t, C, positives = clips(100, 150, k, 32)
    for score in scores_with(k):
        check_ranks(t, C, positives, score)


@pytest.mark.slow
@pytest.mark.parametrize("k", [3, 4])
@each_score
def test_ranks_are_those_of_a_stable_sort_of_many(score, k):
    if score in scores_with(k):
        t, C, positives = clips(1000, 1500, k, 128)
        check_ranks(t, C, positives, score)
        check_topk(t, C, score, 10)


HARD = (
    "near copies",
    "in the span",
    "nearly dependent",
    "a few directions",
    "any norm",
    "short queries",
    "short candidates",
)
ANY_NORM = HARD[-3:]


def hard(case: str, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What float32 scores cannot tell apart, in many ways."""
    t, C, _ = clips(50, 50, k, 32)
    t, C = t.double(), C.double()
    near = 10.0 ** -torch.linspace(2, 9, 50, dtype=FLOAT64)
    if case in ("near copies", "short queries", "short candidates"):
        C = C[:1] + near[:, None, None] * torch.randn(50, k - 1, 32)
    if case == "in the span":
        t = C.sum(1) + near[:, None] * torch.randn(50, 32)
    if case == "nearly dependent":
        C[:, -1] = C[:, 0] + near[:, None] * C[:, -1]
    if case == "a few directions":
        e = torch.eye(32, dtype=FLOAT64)
        t, C = e[torch.randint(3, (50,))], e[torch.randint(3, (50, k - 1))]
    if case == "any norm":
        t, C = t * 10.0 ** (4 * torch.rand(50, 1) - 2), C * 10.0 ** (4 * torch.rand(50, k - 1, 1) - 2)
    if case == "short queries":
        t, C = 1e-6 * t, 1e-3 * C
    if case == "short candidates":
        t, C = 1e-3 * t, 1e-6 * C
    return t.to(dtype), C.to(dtype)


@pytest.mark.parametrize("case", HARD)
def test_ranks_where_scores_hardly_differ(case):
    for k, dtype in ((3, torch.float32), (4, FLOAT64)):
        t, C = hard(case, k, dtype)
        for score in scores_with(k):
            check_ranks(t, C, torch.arange(50), score, TIES[:1], normalize=case not in ANY_NORM)
            check_topk(t, C, score, 5, normalize=case not in ANY_NORM)


@pytest.mark.parametrize("case", HARD)
def test_every_backend_keeps_the_margins(backend, device, case):
    """What decides without a look at the exact scores is at most half as wrong as is allowed for."""
    for k, dtype in itertools.product((2, 3, 4, 6), (torch.float32, FLOAT64)):
        t, C = (x.to(device) for x in hard(case, k, dtype))
        for score in scores_with(k):
            scoring = retrieval._Scoring(t, (C,), score, None, case not in ANY_NORM, backend)
            everyone = slice(0, 50)
            of = scoring.exact(everyone)
            fast, margin = scoring.fast_merits(everyone, everyone, of)
            i, j = torch.cartesian_prod(torch.arange(50), torch.arange(50)).to(device).unbind(1)
            exact = scoring.powered(scoring.merit(scoring.exact_scores(i, of, j))).view(50, 50)
            assert ((fast.double() - exact).abs() <= margin.double() / 2).all(), (score, k, dtype)
            if case == "in the span" and dtype == torch.float32:
                assert margin.max() < 1e-4 * max(1, k)  # and they are of use


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16,) * 2, (torch.float16,) * 2, (FLOAT64,) * 2, (torch.float32, FLOAT64), (FLOAT64, torch.float32)],
)
def test_every_dtype(dtypes):
    t, C, positives = clips(60, 80, 3, 32)
    t, C = t.to(dtypes[0]), C.to(dtypes[1])
    C[:20, 1] = C[:20, 0]
    C[:20, 0, 0] += 3e-7 * torch.rand(20, dtype=C.dtype)  # volumes that are 0 where no embedding is float64
    for score in NAMES:
        check_ranks(t, C, positives, score, TIES[:1])
        check_topk(t, C, score, 7)


def test_every_form_of_candidates():
    t, C, positives = clips(40, 50, 3, 16)
    expected = retrieval_ranks(t, C, positives=positives)
    for candidates in (C.unbind(1), (list(C.unbind(1)),), ({"video": C[:, 0], "audio": C[:, 1]},)):
        assert torch.equal(retrieval_ranks(t, *candidates, positives=positives), expected)
        assert torch.equal(topk(t, *candidates, k=3).indices, topk(t, C, k=3).indices)
    mixed = retrieval_ranks(t.bfloat16(), C[:, 0].half(), C[:, 1], positives=positives)
    rounded = torch.stack([C[:, 0].half().float(), C[:, 1]], 1)
    assert torch.equal(mixed, retrieval_ranks(t.bfloat16(), rounded, positives=positives))


def test_any_number_of_modalities():
    for k, scores in ((2, scores_with(2)), (7, scores_with(7)), (32, ("gain", "volume", "cosine"))):
        t, C, positives = clips(20, 30, k, 48)
        for score in scores:
            check_ranks(t, C, positives, score, TIES[:1])


def test_everything_is_a_copy(small_blocks):
    t, C = torch.randn(1, 32).expand(90, -1), torch.randn(1, 2, 32).expand(90, -1, -1)
    everyone = torch.arange(90)
    for score in NAMES:
        for direction in ("query", "candidate"):
            for ties, expected in zip(TIES, (everyone, 0 * everyone, 0 * everyone + 89), strict=True):
                assert torch.equal(retrieval_ranks(t, C, score=score, direction=direction, ties=ties), expected)
        assert torch.equal(topk(t, C, k=4, score=score).indices, everyone[:4].expand(90, 4))


def test_no_graph_and_no_autocast():
    t, C, positives = clips(60, 80, 3, 32)
    for score in ("cosine", "mip", "gain", "volume"):
        expected = retrieval_ranks(t, C, score=score, positives=positives), topk(t, C, k=30, score=score)
        t.requires_grad_(), C.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = retrieval_ranks(t, C, score=score, positives=positives), topk(t, C, k=30, score=score)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1].indices, expected[1].indices)
        assert not found[1].scores.requires_grad


@each_score
def test_products_that_may_be_rounded(score, matmul_precision):
    """Such as a processor with AMX makes of bfloat16, of rows that are long enough."""
    t, C, positives = clips(60, 80, 3, 64)
    matmul_precision("medium")
    check_ranks(t, C, positives, score)
    check_topk(t, C, score, 7)


@pytest.mark.parametrize("score", ["mip", "cosine", "gain", "volume"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_comes_last_of_any_norm(score, bad, backend):
    t, C = torch.randn(5, 6), torch.randn(5, 2, 6)
    t[1, 2], C[3, 0, 4] = bad, bad
    options = {"score": score, "normalize": False, "backend": backend}
    assert retrieval_ranks(t, C, **options)[[1, 3]].tolist() == [4, 4]
    best = topk(t, C, k=5, **options)
    assert best.scores[1].isnan().all()
    assert best.indices[[0, 2, 4], 4].tolist() == [3, 3, 3]


@pytest.mark.parametrize("score", ["volume", "volume2", "sine"])
def test_spans_that_rounding_decides_on(score, backend):
    """A third singular value at the least that counts: a backend need not find it above that where the exact one is."""
    least = 3**0.5 * torch.finfo(FLOAT64).eps ** 0.5  # of the largest
    for scale in (1.0, 1e4):
        C = scale * torch.linalg.qr(torch.randn(150, 8, 3, dtype=FLOAT64)).Q.mT
        C[:, 2] *= least * (0.8 + 0.4 * torch.rand(150, 1).double())
        t = scale * torch.randn(150, 8, dtype=FLOAT64)
        check_ranks(t, C, torch.arange(150), score, TIES[:1], normalize=False, backend=backend)
        check_topk(t, C, score, 100, normalize=False, backend=backend)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_dependent_modalities_of_any_norm(scale):
    """All volumes are 0, so all candidates tie."""
    t, c, e = (scale * torch.randn(4, 16) for _ in range(3))
    options = {"score": "volume", "normalize": False}
    assert retrieval_ranks(t, c, c, e, ties="pessimistic", **options).tolist() == [3] * 4
    assert retrieval_ranks(t, c, c, e, **options).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("score", "of_t", "of_C"),
    [("mip", 1e150, 1e-85), ("cosine", 1e-170, 1e85), ("mip", 1e-308, 1e150), ("cosine", 1e-310, 1e85)],
)
def test_squares_below_float64(score, of_t, of_C):
    """Of vectors whose products are numbers like others."""
    t, C = of_t * torch.randn(30, 16, dtype=FLOAT64), of_C * torch.rand(16, dtype=FLOAT64).expand(40, 2, 16)
    options = {"score": score, "normalize": False, "positives": torch.arange(30)}
    assert not retrieval_ranks(t, C, ties="optimistic", **options).any()
    assert (retrieval_ranks(t, C, ties="pessimistic", **options) == 39).all()


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-600, 2.0**600, 2.0**1000])
def test_leading_vectors_of_any_norm(scale):
    """Whose squares float64 does not have: scores are as those of other candidates."""
    t, C, positives = clips(40, 50, 3, 32)
    mask = torch.rand(40, 2) < 0.8
    t, C = t.double(), C.double()
    options: dict[str, Any] = {"score": "cosine", "normalize": False, "mask": mask}
    found, wanted = (joint_scores(t, x, **options) for x in (scale * C, C))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    for direction in ("query", "candidate"):
        found, wanted = (
            retrieval_ranks(t, x, positives=positives, direction=direction, **options) for x in (scale * C, C)
        )
        assert torch.equal(found, wanted)
    found, wanted = (topk(t, x, k=40, **options) for x in (scale * C, C))
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.scores.nan_to_num(7.0), wanted.scores.nan_to_num(7.0))


@pytest.mark.parametrize("score", ["volume", "volume2"])
def test_gram_determinants_below_float64(score, backend):
    """Of scores that are numbers like others: no positive comes before itself, nor anything else than without scale."""
    C = torch.randn(3, 8, dtype=FLOAT64) + 1e-3 * torch.randn(25, 3, 8, dtype=FLOAT64)
    t = torch.randn(8, dtype=FLOAT64) + 1e-3 * torch.randn(25, 8, dtype=FLOAT64)
    options = {"score": score, "normalize": False, "backend": backend}
    for scale in (2.0**-175, 2.0**175):
        apart = t / scale, C * scale
        assert torch.equal(retrieval_ranks(*apart, **options), retrieval_ranks(t, C, **options))
        assert torch.equal(
            joint_scores(*apart, **options), scale ** (2 if score == "volume" else 4) * joint_scores(t, C, **options)
        )
        for i in range(len(t)):
            assert retrieval_ranks(apart[0][i : i + 1], apart[1][i : i + 1], **options).tolist() == [0]


@pytest.mark.parametrize("score", ["cosine", "mip", "gain", "lambda", "sigma", "volume", "volume2", "area2"])
def test_scores_beyond_float32(score):
    """Too large for it, or too small; ranks are those of float64 nonetheless."""
    t, C, positives = clips(40, 50, 3, 32)
    for of_t, of_C in ((1e10, 1e-15), (1e18, 1e18), (1e-18, 1e-18), (1e30, 1e-30)):
        check_ranks(of_t * t, of_C * C, positives, score, rules=("index",), normalize=False)
        check_topk(of_t * t, of_C * C, score, 5, normalize=False)
    t, C = torch.tensor([[1e-30, -1.0]]), torch.tensor([[[1e20, 1e10]] * 2, [[1.0, 1.0]] * 2])
    assert retrieval_ranks(t, C, score="mip", normalize=False, positives=torch.tensor([1])).tolist() == [0]


# ------------------------------------------------------------------------------------------------
# Who has no positive, no modality or no score
# ------------------------------------------------------------------------------------------------


def test_queries_without_a_candidate(small_blocks):
    """They have no rank, but are still among those that a candidate can find; others have no query."""
    t, C, positives = clips(60, 80, 3, 32)
    positives[::7] = -1
    positives[positives == 11] = -5
    for score in ("gain", "volume", "cosine"):
        check_ranks(t, C, positives.clamp_min(-1), score)
        found = retrieval_ranks(t, C, score=score, positives=positives)
        assert torch.equal(found < 0, positives < 0)
        assert retrieval_ranks(t, C, score=score, positives=positives, direction="candidate")[11] == -1


@pytest.mark.parametrize("score", [name for name in NAMES if name != "area2"])
def test_masks(score, small_blocks):
    """Absent modalities are not read; who has none is behind everyone, whatever the rule for ties."""
    t, C, positives = clips(70, 90, 4, 32)
    mask = torch.rand(70, 3) < 0.6
    mask[5], mask[40] = False, False
    there = mask.any(1)
    C = torch.where(mask[:, :, None], C, torch.nan)
    lacking = ~there[positives]
    expected = merits(t, C, score, mask)
    assert (expected[:, there] > -math.inf).all()
    for ties in TIES:
        options: dict[str, Any] = {"score": score, "positives": positives, "mask": mask, "ties": ties}
        found, wanted = retrieval_ranks(t, C, **options), sorted_ranks(expected, positives, True, ties)
        assert torch.equal(found[~lacking], wanted[~lacking])
        assert (found[lacking] == 70 - 1).all()
        found = retrieval_ranks(t, C, direction="candidate", **options)
        wanted = sorted_ranks(expected, positives, False, ties)
        assert torch.equal(found[there], wanted[there])
        assert (found[~there] == 90 - 1).all()
    best = topk(t, C, k=70, score=score, mask=mask)
    assert torch.equal(best.indices, expected.sort(dim=1, descending=True, stable=True).indices)
    behind = (~there).nonzero()[:, 0]
    assert torch.equal(best.indices[:, -len(behind) :], behind.expand(90, -1))
    assert torch.equal(best.scores.isnan(), torch.arange(70).expand(90, -1) >= 70 - len(behind))


@each_score
def test_what_is_not_finite_never_wins(score, small_blocks):
    t, C, positives = clips(70, 90, 3, 32)
    mask = None
    if score != "area2":
        mask = torch.ones(70, 2, dtype=torch.bool)
        mask[50] = False
    others = 70 - (mask is not None)
    C[3, 0, 0], C[60, 1, 2], t[4, 1], t[77, 0] = torch.nan, math.inf, -math.inf, torch.nan
    bad_query = ~t.isfinite().all(1)
    bad = ~C.isfinite().all(2).all(1)
    lost = bad_query | bad[positives]
    absent = torch.zeros(70, dtype=torch.bool) if mask is None else ~mask.any(1)
    expected = merits(t, C, score, mask)
    for ties in TIES:
        options: dict[str, Any] = {"score": score, "positives": positives, "mask": mask, "ties": ties}
        found, wanted = retrieval_ranks(t, C, **options), sorted_ranks(expected, positives, True, ties)
        known = ~lost & ~absent[positives]
        assert torch.equal(found[known], wanted[known])
        assert (found[lost & ~absent[positives]] == others - 1).all()
        found = retrieval_ranks(t, C, direction="candidate", **options)
        wanted = sorted_ranks(expected, positives, False, ties)
        # Candidate 7 has the captions 7 and 77, of which one is left; 4 has 74 beside 4.
        known = ~bad & ~absent
        assert torch.equal(found[known], wanted[known])
        assert (found[bad | absent] == 90 - 1).all()
    best = topk(t, C, k=70, score=score, mask=mask)
    rest = [*bad.nonzero()[:, 0].tolist(), *absent.nonzero()[:, 0].tolist()]
    assert best.indices[0, 70 - len(rest) :].tolist() == rest
    assert torch.equal(best.scores[0].isnan(), torch.arange(70) >= 70 - len(rest))
    numbers = torch.arange(70)
    assert torch.equal(best.indices[4], torch.cat([numbers[~absent], numbers[absent]]))
    assert best.scores[4].isnan().all()
    assert torch.equal(topk(t, C, k=2, score=score, mask=mask).indices, best.indices[:, :2])


def test_scores_that_overflow():
    """In float32, where they do not in float64; and in float64."""
    t, C, positives = clips(40, 50, 3, 32)
    for score in NAMES:
        for scale in (1e15, 1.43e19):  # of the latter some eigenvalues do, and others do not
            check_ranks(scale * t, scale * C, positives, score, TIES[:1], normalize=False)
            check_topk(scale * t, scale * C, score, 5, normalize=False)
        check_ranks(1e-15 * t, 1e-15 * C, positives, score, TIES[:1], normalize=False)
        retrieval_ranks(1e200 * t.double(), 1e200 * C.double(), score=score, positives=positives, normalize=False)


def test_nothing_to_rank():
    t, C = torch.randn(3, 4), torch.randn(5, 2, 4)
    none = torch.full((3,), -1)
    for score in NAMES:
        assert retrieval_ranks(t, C, score=score, positives=none).tolist() == [-1] * 3
        assert retrieval_ranks(t, C, score=score, positives=none, direction="candidate").tolist() == [-1] * 5
        assert retrieval_ranks(t, C[:0], score=score, positives=none).tolist() == [-1] * 3
        assert retrieval_ranks(t[:0], C, score=score, positives=none[:0]).shape == (0,)
        assert retrieval_ranks(t[:0], C, score=score, positives=none[:0], direction="candidate").tolist() == [-1] * 5
        assert topk(t[:0], C, score=score, k=2).indices.shape == (0, 2)
        assert retrieval_ranks(t, C, score=score, positives=none - 100).tolist() == [-1] * 3


@each_score
def test_a_row_that_is_more_than_a_tile(score, monkeypatch):
    for name, value in {"_QUERIES": 64, "_CANDIDATES": 7, "_PAIRS": 7, "_TILE": 1, "_BEST": 7}.items():
        monkeypatch.setattr(retrieval, name, value)
    t, C, positives = clips(10, 15, 3, 32)
    check_ranks(t, C, positives, score, TIES[:1])
    check_topk(t, C, score, 10)


@pytest.mark.parametrize("score", ["cosine", "mip", "gain"])
def test_masks_of_any_bytes(score, backend):
    """A bool view of an image's mask, where present is 255."""
    t, C, positives = clips(60, 70, 4, 16)
    mask = torch.rand(60, 3) < 0.6
    options: dict[str, Any] = {"score": score, "backend": backend}
    for call in (
        lambda mask: joint_scores(t, C, mask=mask, **options),
        lambda mask: retrieval_ranks(t, C, positives=positives, mask=mask, **options),
        lambda mask: topk(t, C, k=60, mask=mask, **options).indices,
        lambda mask: joint_contrastive_loss(t, C, positives=positives, mask=mask, **options),
    ):
        assert torch.equal(call(any_bytes(mask)).nan_to_num(7.0), call(mask).nan_to_num(7.0))


# ------------------------------------------------------------------------------------------------
# The best, recall, memory, errors
# ------------------------------------------------------------------------------------------------


@each_score
@pytest.mark.parametrize("k", [1, 4, 50, 100])
def test_the_best_are_those_of_a_stable_sort(score, k, small_blocks):
    """Among blocks of 37 to 55 candidates."""
    t, C, _ = clips(100, 110, 3, 32)
    check_topk(t, C, score, k)


def test_ranks_are_places_among_the_best():
    t, C, positives = clips(50, 70, 3, 16)
    best = topk(t, C, k=50).indices
    assert torch.equal((best == positives[:, None]).int().argmax(1), retrieval_ranks(t, C, positives=positives))


def test_recall_by_hand():
    found = recall_at(torch.tensor([0, 0, 3, 9, 40, -1, 4]))
    assert found == Recall({1: 2 / 6, 5: 4 / 6, 10: 5 / 6}, 4.0, (0 + 0 + 3 + 9 + 40 + 4) / 6 + 1)
    assert recall_at(torch.tensor([2]), at=[2, 3]) == Recall({2: 0.0, 3: 1.0}, 3.0, 3.0)
    assert recall_at(torch.tensor([2]), at=range(2, 4)) == Recall({2: 0.0, 3: 1.0}, 3.0, 3.0)
    assert recall_at(torch.tensor([2]), at=[10**30]).recall == {10**30: 1.0}
    empty = recall_at(torch.tensor([-1]))
    assert all(map(math.isnan, (*empty.recall.values(), *empty[1:])))
    assert tuple(empty.recall) == (1, 5, 10)


def test_recall_as_published():
    """Sorting each row of similarities and looking for the diagonal among the sorted values."""
    X = torch.randn(60, 1, 16) + torch.randn(60, 3, 16)  # no copies
    t, C = X[:, 0], X[:, 1:]
    similarity = joint_scores(t, C).double()
    sx, right = similarity.sort(dim=1, descending=True).values, similarity.diagonal()[:, None]
    places = [row.tolist().index(float(own)) for row, own in zip(sx, right, strict=True)]
    found = recall_at(retrieval_ranks(t, C))
    assert found.recall == {K: sum(p < K for p in places) / 60 for K in (1, 5, 10)}
    assert found.median_rank == sorted(places)[29] + 1
    assert found.mean_rank == pytest.approx(sum(places) / 60 + 1)


@pytest.fixture
def unpoisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


MOST = 64 << 20


def peaks(N: int, score: str, copies: bool = False, d: int = 512, k: int = 10) -> None:
    X = torch.randn(1 if copies else N, 3, d).expand(N, -1, -1)
    t, v, a = (x.contiguous() for x in X.unbind(1))
    calls = (
        lambda: retrieval_ranks(t, v, a, score=score),
        lambda: retrieval_ranks(t, v, a, score=score, direction="candidate"),
        lambda: topk(t, v, a, k=k, score=score),
    )
    for call in calls[2:] if k > 10 else calls:
        assert Allocations(call).peak <= MOST


@pytest.mark.parametrize(("N", "score"), [(1100, "volume"), (450, "gain"), (1500, "cosine")])
def test_memory(N, score, unpoisoned):
    peaks(N, score)


@pytest.mark.parametrize("score", ["gain", "cosine"])
def test_memory_of_short_rows(score, unpoisoned):
    """Tiles hold no more pairs for it."""
    peaks(3000, score, d=8)


def test_memory_of_many_that_are_best(unpoisoned):
    """No more than the results take in float64 and int64, while they are found, beyond that."""
    peaks(1500, "gain", d=8, k=800)


@pytest.mark.parametrize("N", [90, pytest.param(600, marks=pytest.mark.slow)])
def test_memory_of_copies(N, unpoisoned):
    """Where every pair is scored on its own."""
    peaks(N, "gain", copies=True)


@pytest.mark.slow
@each_score
def test_memory_at_the_size_of_activitynet(score, unpoisoned):
    peaks(4917, score)


def test_errors_name_the_argument():
    t, C, positives = torch.randn(3, 4), torch.randn(5, 2, 4), torch.tensor([0, 1, 4])
    with pytest.raises(ValueError, match="positives: got None with 3 queries and 5 candidates, wanted an int64 tensor"):
        retrieval_ranks(t, C)
    with pytest.raises(ValueError, match="candidates: got none, wanted at least one tensor"):
        retrieval_ranks(t)
    with pytest.raises(TypeError, match="positives: got list, wanted an int64 tensor"):
        retrieval_ranks(t, C, positives=[0, 1, 4])
    with pytest.raises(TypeError, match=r"positives: got dtype torch.int32, wanted torch.int64"):
        retrieval_ranks(t, C, positives=positives.int())
    with pytest.raises(ValueError, match=r"positives: got shape \(2,\), wanted \(3,\)"):
        retrieval_ranks(t, C, positives=positives[:2])
    with pytest.raises(ValueError, match="positives: got 5, wanted numbers below 5"):
        retrieval_ranks(t, C, positives=positives + 1)
    with pytest.raises(ValueError, match="direction: got 'clip', wanted one of 'query', 'candidate'"):
        retrieval_ranks(t, C, positives=positives, direction="clip")
    with pytest.raises(ValueError, match="ties: got 'random', wanted one of 'index'"):
        retrieval_ranks(t, C, positives=positives, ties="random")
    for call in (
        lambda **options: retrieval_ranks(t, C, positives=positives, **options),
        lambda **o: topk(t, C, k=1, **o),
    ):
        with pytest.raises(ValueError, match="score: got 'det', wanted one of 'volume'"):
            call(score="det")
        with pytest.raises(ValueError, match="mask: got one, wanted none: score='area2'"):
            call(score="area2", mask=torch.ones(5, 2, dtype=torch.bool))
        for score_ in ("gain", "cosine"):
            with pytest.raises(ValueError, match="backend: got 'fast'"):
                call(score=score_, backend="fast")
    with pytest.raises(
        ValueError, match="k: got 6, wanted an int of at least 1 and at most 5, the number of candidates"
    ):
        topk(t, C, k=6)
    with pytest.raises(TypeError, match="k: got float"):
        topk(t, C, k=1.0)
    with pytest.raises(ValueError, match="candidates: got none, wanted at least one for k"):
        topk(t, C[:0], k=1)
    with pytest.raises(ValueError, match="query: got device meta"):
        retrieval_ranks(t.to("meta"), C[: len(t)].to("meta"))
    with pytest.raises(ValueError, match="query: got device meta"):
        topk(t.to("meta"), C.to("meta"), k=1)
    with pytest.raises(TypeError, match="ranks: got list"):
        recall_at([0, 1])
    with pytest.raises(TypeError, match=r"ranks: got dtype torch.float32"):
        recall_at(torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"ranks: got shape \(1, 1\), wanted \(N,\)"):
        recall_at(torch.tensor([[0]]))
    with pytest.raises(ValueError, match="at: got 0, wanted an int of at least 1"):
        recall_at(torch.tensor([0]), at=(0,))
    with pytest.raises(TypeError, match="at: got int, wanted a sequence"):
        recall_at(torch.tensor([0]), at=1)
    with pytest.raises(TypeError, match="at: got bytes, wanted a sequence"):
        recall_at(torch.tensor([0]), at=b"1")
    with pytest.raises(ValueError, match="ranks: got device meta"):
        recall_at(torch.tensor([0], device="meta"))


def test_what_joint_functions_refuse():
    q, c, p = torch.randn(3, 4), torch.randn(5, 2, 4), torch.tensor([0, 1, 4])
    with pytest.raises(ValueError, match="query: got device meta, wanted cpu"):
        joint_scores(q.to("meta"), c)
    with pytest.raises(ValueError, match="query: got device cpu, wanted meta"):
        joint_scores(q, c.to("meta"))
    for call in (joint_contrastive_loss, retrieval_ranks):
        with pytest.raises(ValueError, match="positives: got None with 7 queries and 5 candidates"):
            call(torch.randn(7, 4), c)
        with pytest.raises(ValueError, match="positives: got device meta, wanted cpu"):
            call(q, c, positives=p.to("meta"))
        with pytest.raises(TypeError, match=r"positives: got a torch\.sparse_coo tensor"):
            call(q, c, positives=p.to_sparse())
    with pytest.raises(TypeError, match=r"ranks: got dtype torch\.int32"):
        recall_at(p.int())
    with pytest.raises(ValueError, match=r"ranks: got shape \(\), wanted \(N,\)"):
        recall_at(p[0])
    with pytest.raises(TypeError, match=r"ranks: got a torch\.sparse_coo tensor"):
        recall_at(p.to_sparse())
    with pytest.raises(TypeError, match="k: got bool"):
        topk(q, c, k=True)
    with pytest.raises(TypeError, match="at: got bool"):
        recall_at(p, at=(True,))
    with pytest.raises(ValueError, match=r"label_smoothing: got -0\.1, wanted a number from 0 to 1"):
        joint_contrastive_loss(q, c, positives=p, label_smoothing=-0.1)
