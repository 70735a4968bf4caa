"""alignment_score, effective_rank and uniformity against their definitions, evaluated directly in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from pmrl_kernels import alignment_score, dominant_singular_triplet, effective_rank, uniformity

FUNCTIONS = {"alignment_score": alignment_score, "effective_rank": effective_rank, "uniformity": uniformity}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def spectra(xs: Tensor, mask: Tensor) -> list[Tensor]:
    """Singular values of each instance's present modalities, from (B, k, d) in float64."""
    rows = [normalize(x[present].double(), dim=-1) for x, present in zip(xs, mask, strict=True)]
    return [torch.linalg.svdvals(row) for row in rows]


def expected_score(xs: Tensor, mask: Tensor) -> float:
    values = [s[0] / k**0.5 for s, k in zip(spectra(xs, mask), mask.sum(1).tolist(), strict=True) if k >= 2]
    return float(torch.stack(values).mean()) if values else float("nan")


def expected_rank(xs: Tensor, mask: Tensor) -> float:
    values = []
    for s, k in zip(spectra(xs, mask), mask.sum(1).tolist(), strict=True):
        if k >= 2:
            p = s / s.sum()
            values.append(torch.exp(-(p * p.log()).nan_to_num().sum()))
    return float(torch.stack(values).mean()) if values else float("nan")


def expected_uniformity(xs: Tensor, mask: Tensor) -> float:
    u = dominant_singular_triplet(xs.double(), mask=mask, backend="reference").u[mask.any(1)]
    n = len(u)
    return float((u @ u.T).fill_diagonal_(0).sum() / (n * (n - 1))) if n >= 2 else float("nan")


EXPECTED = {alignment_score: expected_score, effective_rank: expected_rank, uniformity: expected_uniformity}


def draw(B: int, k: int, d: int, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(B, 1, d) + spread * torch.randn(B, k, d)).to(dtype)


@each_function
@given(
    B=st.integers(0, 9),
    k=st.integers(1, 6),
    d=st.integers(1, 12),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
)
def test_definition(function, B, k, d, spread, seed, masked):
    torch.manual_seed(seed)
    xs = draw(B, k, d, spread)
    mask = torch.rand(B, k) < 0.6 if masked else None
    everyone = torch.ones(B, k, dtype=torch.bool)
    got = function(xs, mask=mask)
    assert got.shape == ()
    want = EXPECTED[function](xs, everyone if mask is None else mask)
    # near rank 1 a share of eps32 has an entropy of 16 eps32
    torch.testing.assert_close(
        got.double(), torch.tensor(want, dtype=torch.float64), rtol=2e-5, atol=1e-6, equal_nan=True
    )


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forms_and_dtypes(function, dtype):
    xs = draw(7, 3, 10, dtype=dtype)
    mask = torch.tensor([[True, True, False], *[[True] * 3] * 6])
    parts = dict(zip("abc", xs.unbind(1), strict=True))
    results = [
        function(xs, mask=mask),
        function(*xs.unbind(1), mask=mask),
        function(list(xs.unbind(1)), mask=mask),
        function(parts, mask=dict(zip("abc", mask.unbind(1), strict=True))),
    ]
    assert results[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(torch.equal(one, results[0]) for one in results)
    torch.testing.assert_close(results[0].double().item(), EXPECTED[function](xs, mask), rtol=1e-5, atol=1e-6)


@each_function
def test_backends_agree(function, backend):
    xs = draw(6, 4, 9)
    torch.testing.assert_close(function(xs, backend=backend), function(xs, backend="reference"))


@each_function
def test_no_gradient(function):
    xs = draw(4, 3, 5).requires_grad_()
    result = function(xs)
    assert not result.requires_grad
    assert torch.is_grad_enabled()


def test_ends_of_the_scales():
    agreeing = draw(5, 4, 8, spread=0.0)
    torch.testing.assert_close(alignment_score(agreeing), torch.tensor(1.0))
    torch.testing.assert_close(effective_rank(agreeing), torch.tensor(1.0))
    apart = torch.eye(4).expand(5, 4, 4)
    torch.testing.assert_close(alignment_score(apart), torch.tensor(0.5))
    torch.testing.assert_close(effective_rank(apart), torch.tensor(4.0))
    collapsed = torch.ones(6, 3)
    torch.testing.assert_close(uniformity(collapsed), torch.tensor(1.0))
    torch.testing.assert_close(uniformity(torch.eye(6)), torch.tensor(0.0))


def test_one_modality_adrift_is_told_from_all_apart():
    """What effective_rank is there for."""
    adrift = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    apart = torch.eye(3)[None]
    assert effective_rank(adrift) < 2 < effective_rank(apart)


def test_the_authors_log_keeps_the_diagonal():
    u = normalize(torch.randn(9, 4, dtype=torch.float64), dim=1)
    torch.testing.assert_close((u @ u.T).mean(), (8 * uniformity(u) + 1) / 9)


@each_function
def test_instances_that_do_not_count(function):
    """Absent modalities hold anything, and a zero vector is no direction."""
    xs = draw(6, 3, 5)
    alone = function(xs[:4])
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[4:] = False
    xs[4:] = torch.nan
    torch.testing.assert_close(function(xs, mask=mask), alone)
    if function is not alignment_score:  # where a zero vector is a modality that does not agree
        zeros = torch.cat([xs[:4], torch.zeros(2, 3, 5)])
        torch.testing.assert_close(function(zeros), alone)


@each_function
def test_nothing_to_average_is_nan(function):
    assert function(torch.randn(0, 3, 4)).isnan()
    assert function(torch.randn(1, 1, 4)).isnan()


@each_function
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_shows(function, bad):
    xs = draw(4, 3, 5)
    xs[2, 1, 0] = bad
    assert function(xs).isnan()


@each_function
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_shows_where_it_is_alone(function, bad, backend):
    """In the one modality that an instance has: its score would not count, but the loss is NaN there."""
    xs = draw(5, 3, 6)
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[2, 1:] = False
    xs[2, 1:] = bad
    assert function(xs, mask=mask, backend=backend).isfinite()
    xs[2, 0, 3] = bad
    assert function(xs, mask=mask, backend=backend).isnan()


@each_function
def test_errors(function):
    with pytest.raises(TypeError, match="group"):
        function(torch.randn(2, 3, 4), group=object())
    with pytest.raises(TypeError, match="floating-point"):
        function(torch.ones(2, 3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="mask"):
        function(torch.randn(2, 3, 4), mask=torch.ones(2, 2, dtype=torch.bool))


@each_function
def test_compile(function: Callable[..., Tensor]):
    torch.compiler.reset()
    compiled = torch.compile(lambda *xs: function(*xs), fullgraph=True, backend="aot_eager")
    for B in (4, 6, 9):
        xs = draw(B, 3, 8).unbind(1)
        torch.testing.assert_close(compiled(*xs), function(*xs))


def test_no_matrix_of_instances():
    """Memory grows with B, not with its square."""
    big = 20_000  # whose square of float32 would be 1.6 GB
    assert uniformity(torch.randn(big, 8)).abs() < 0.05


@pytest.mark.parametrize("function", [alignment_score, effective_rank, uniformity])
def test_masks_of_any_bytes(function):
    """A bool view of an image's mask, where present is 255."""
    xs, mask = torch.randn(6, 4, 9), torch.rand(6, 4) < 0.6
    odd = (mask.to(torch.uint8) * 255).view(torch.bool)
    assert torch.equal(function(xs, mask=odd), function(xs, mask=mask))
