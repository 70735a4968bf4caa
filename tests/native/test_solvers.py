"""The k x k solvers of the native code alone, on matrices made to break them.

Through ``pmrl_kernels._numerics``, which development builds have: every instruction set of this machine, and
"scalar", the same code for one matrix at a time, which is what one lane of a GPU runs. The judge is a Jacobi
iteration in extended precision, written here.

What the solvers are promised is a symmetric matrix, finite unless an input was not, positive semidefinite up to
rounding, whose largest entry lies within 2^-300 … 2^300: their callers see to that.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from pmrl_kernels.ops import constants
from tests.tools import tolerances as tol
from tests.tools.solvers import EPS, Array, Extended, each_isa, eigenpairs, numerics

KS = (*range(1, 9), 9, 12, 16, 31, 32)  # unrolled code up to 8, loops beyond

each_k = pytest.mark.parametrize("k", KS)
each_width = pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "float64"])


# ------------------------------------------------------------------------------------------------
# The judge
# ------------------------------------------------------------------------------------------------


def rounds(k: int) -> list[tuple[list[int], list[int]]]:
    """All pairs p < q below k, in rounds of pairs that share no index."""
    players = [*range(k), *[-1] * (k % 2)]
    found = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [sorted(pair) for pair in zip(players[:half], reversed(players[half:]), strict=True) if -1 not in pair]
        if pairs:
            found.append(tuple(map(list, zip(*pairs, strict=True))))
        players = [players[0], players[-1], *players[1:-1]]
    return found


def judge(A: Array) -> tuple[Extended, Extended]:
    """Eigenvalues, descending, and eigenvectors in columns of every matrix, by Jacobi in np.longdouble."""
    A = A.astype(np.longdouble)
    k = A.shape[-1]
    V = np.broadcast_to(np.eye(k, dtype=np.longdouble), A.shape).copy()
    for _ in range(40):
        if (np.abs(np.triu(A, 1)).max((1, 2)) <= 1e-20 * np.abs(A).max((1, 2))).all():
            break
        for p, q in rounds(k):
            d, e = A[:, q, q] - A[:, p, p], 2 * A[:, p, q]
            reach = np.abs(d) + np.hypot(d, e)
            t = np.where(d < 0, -e, e) / np.where(reach > 0, reach, 1)
            c = 1 / np.sqrt(1 + t * t)
            c, s = c[:, None], (t * c)[:, None]
            for M in (A, A.swapaxes(1, 2), V):
                x, y = M[:, :, p], M[:, :, q]
                M[:, :, p], M[:, :, q] = c * x - s * y, s * x + c * y
            A[:, p, q] = A[:, q, p] = 0
    values = np.einsum("nii->ni", A)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, 1), np.take_along_axis(V, order[:, None, :], 2)


def largest(values: Extended) -> Extended:
    """λ₁, and 1 for a zero matrix, whose errors are all absolute."""
    top = np.abs(values).max(1)
    return np.where(top == 0, 1, top)


# ------------------------------------------------------------------------------------------------
# Matrices
# ------------------------------------------------------------------------------------------------


def with_eigenvalues(values: Array, rng: np.random.Generator) -> Array:
    """Q diag(values) Qᵀ for a random orthogonal Q."""
    Q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def gram(columns: Array) -> Array:
    return columns.T @ columns


def unit_columns(X: Array) -> Array:
    return X / np.linalg.norm(X, axis=0)


def mirrored(k: int, gap: float, rng: np.random.Generator) -> Array:
    """v₁'s entries add up to 0 exactly, and λ₂ is a relative ``gap`` below λ₁ = 1.

    Renaming the modalities by an involution leaves every bit of the matrix as it is, and turns v₁ into −v₁.
    """
    pairs = int(rng.integers(1, k // 2 + 1))
    alone = k - 2 * pairs
    odd = with_eigenvalues(np.append(1.0, 0.9 * rng.random(pairs - 1)), rng)
    even = with_eigenvalues(np.append(1.0 - gap, 0.9 * rng.random(pairs + alone - 1)), rng)
    first, rest = even[:pairs, :pairs], even[:pairs, pairs:] / 2**0.5
    A, B = (first + odd) / 2, (first - odd) / 2
    order = rng.permutation(k)
    return np.block([[A, B, rest], [B, A, rest], [rest.T, rest.T, even[pairs:, pairs:]]])[np.ix_(order, order)]


def with_top(k: int, *top: float) -> Array:
    """Eigenvalues that start with ``top`` and go on well below."""
    return np.array([*top, *np.linspace(0.7, 0.1, k)])[:k]


@functools.cache
def cases(k: int) -> dict[str, Array]:
    """Positive semidefinite k x k matrices of order 1, by name."""
    rng = np.random.default_rng(k)
    eye, ones, steps = np.eye(k), np.ones(k), np.arange(k)
    signs = np.where(steps % 2, -1.0, 1.0)
    A = {
        "zero": np.zeros((k, k)),
        "identity": eye,
        "all equal": np.outer(ones, ones),
        "rank 1": np.outer(x := rng.standard_normal(k), x),
        "rank 1, zero sum, distinct": np.outer(x := zero_sum_vector(k), x),
        "antipodal": np.outer(signs, signs),
        "diagonal": np.diag(rng.random(k)),
        "diagonal, ascending": np.diag(np.arange(1.0, k + 1)),
        "diagonal, with zeros": np.diag(np.where(steps % 3, 0.0, 1.0 + steps)),
        "Hilbert": 1.0 / (1.0 + steps[:, None] + steps),
        "aligned to 1e-6": 1e-6 * eye + (1 - 1e-6) * np.outer(ones, ones),
        "aligned to 1e-12": 1e-12 * eye + (1 - 1e-12) * np.outer(ones, ones),
        "clustered": with_eigenvalues(1 + 1e-3 * steps, rng),
        "clustered to 1e-9": with_eigenvalues(1 + 1e-9 * steps, rng),
        "clustered below": with_eigenvalues(np.where(steps == 0, 1.0, 1e-3 * (1 + 1e-9 * steps)), rng),
        "graded": with_eigenvalues(np.logspace(0, -16, k), rng),
        "graded columns": gram(unit_columns(rng.standard_normal((2 * k, k))) * np.logspace(0, -8, k)),
        "graded columns, ascending": gram(unit_columns(rng.standard_normal((2 * k, k))) * np.logspace(-8, 0, k)),
        "not quite semidefinite": with_eigenvalues(with_top(k, 1.0) * (steps < k // 2) - 4 * EPS * (steps > 0), rng),
        "entries of one ulp": eye + EPS * np.outer(ones, ones),
        "tiny beside large": np.diag(10.0 ** -(12.0 * steps)) + 1e-200,
        "tied in pairs": with_eigenvalues(np.repeat(with_top(k, 2.0), 2)[:k], rng),
        "tied in threes": with_eigenvalues(with_top(k, 2.0, 2.0, 2.0), rng),
        "tied, axes": np.diag(with_top(k, 1.0, 1.0, 1.0)),
    }
    for i in range(4 if k < 16 else 1):
        A[f"random {i}"] = gram(rng.standard_normal((2 * k + 3, k)))
        A[f"random, unit columns {i}"] = gram(unit_columns(rng.standard_normal((k + 5, k))))
        A[f"random, low rank {i}"] = gram(unit_columns(rng.standard_normal((k // 2 + 1, k))))
        A[f"random, nearly aligned {i}"] = gram(unit_columns(1 + 1e-5 * rng.standard_normal((k + 5, k))))
    if k >= 2:
        pair = np.array([[1.0, -1.0], [-1.0, 1.0]])
        A["simplex"] = k / (k - 1) * eye - np.outer(ones, ones) / (k - 1)  # k - 1 tied at the top, across the ones
        A["antipodal pairs"] = np.kron(np.eye(k // 2 + 1), pair)[:k, :k]
        A["two blocks"] = np.zeros((k, k))
        A["two blocks"][: k // 2, : k // 2] = gram(rng.standard_normal((k, k // 2)))
        A["two blocks"][k // 2 :, k // 2 :] = gram(rng.standard_normal((k, k - k // 2)))
        v, w = (1.0 - 1e-9) * eye[0] - eye[1], eye[0] + (1.0 - 1e-9) * eye[1]
        A["a sum of 1e-9"] = np.outer(v, v) + np.outer(w, w) / 2
        A["one column zero"] = gram(rng.standard_normal((k, k)) * (steps != k // 2))
        for gap in (0.5, 1e-1, 1e-3, 1e-5, *np.outer([1e-6, 1e-9, 1e-12, 1e-13], [1, 2, 4, 8]).flat):
            A[f"mirrored, gap {gap}"] = mirrored(k, gap, rng)
        for gap in (1e-7, 1e-9, 1e-11, 1e-13, 1e-15):
            A[f"top gap {gap}"] = with_eigenvalues(with_top(k, 1.0, 1.0 - gap), rng)
            A[f"top gap {gap}, axes"] = np.diag(with_top(k, 1.0 - gap, 1.0))
        for wide in (False, True):  # on both sides of the rule
            for factor in (0.9, 1.1):
                values = with_top(k, 1.0, 1.0 - factor * constants.eigenvalue_gap(k, wide))
                A[f"{factor} of the gap, {wide}"] = with_eigenvalues(values, rng)
                A[f"{factor} of the gap, {wide}, axes"] = np.diag(values)
            for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 1.5, 1.8, 2.1, 3.0, 10.0):
                A[f"{factor} of the gap, {wide}, mirrored"] = mirrored(
                    k, factor * constants.eigenvalue_gap(k, wide), rng
                )
    return A


def zero_sum_vector(k: int) -> Array:
    """Integers that add up to 0, the largest neither first nor positive."""
    x = np.arange(1.0, k + 1)
    x[-1 if k == 1 else k // 2] -= x.sum()
    return x


class Batch(NamedTuple):
    names: list[str]
    A: Array
    values: Extended  # of the judge
    V: Extended


@functools.cache
def batch(k: int) -> Batch:
    """All cases, and some of them at both ends of the promised range."""
    found = dict(cases(k))
    for name in ("random 0", "clustered", "graded", "rank 1", "aligned to 1e-6", "identity", "antipodal"):
        for power in (-300, 300):
            found[f"{name} x 2^{power}"] = cases(k)[name] / np.abs(cases(k)[name]).max() * 2.0**power
    A = np.stack(list(found.values()))
    return Batch(list(found), A, *judge(A))


def worst(batch: Batch, errors: Extended) -> str:
    """For messages: which case the largest error belongs to."""
    per_case = errors.reshape(len(errors), -1).max(1)
    at = int(np.nanargmax(np.where(np.isnan(per_case), np.inf, per_case)))
    return f"{batch.names[at]}: {float(per_case[at]):.3g}"


@each_k
def test_the_judge(k):
    """Its residuals are those of extended precision, and LAPACK agrees with it as far as float64 goes."""
    _, A, values, V = batch(k)
    top = largest(values)
    eps = float(np.finfo(np.longdouble).eps)
    residual = np.abs(A @ V - V * values[:, None, :]).max((1, 2)) / top
    assert residual.max() <= 64 * k * eps
    assert np.abs(V.swapaxes(1, 2) @ V - np.eye(k)).max() <= 64 * k * eps
    lapack = np.linalg.eigvalsh(A)[:, ::-1]
    assert (np.abs(lapack - values).max(1) / top).max() <= 16 * k * EPS


# ------------------------------------------------------------------------------------------------
# All eigenpairs
# ------------------------------------------------------------------------------------------------


@each_width
@each_k
@each_isa
def test_eigenpairs(isa, k, wide):
    """Backward stable: eigenvalues, residual and orthogonality to a few roundings of λ₁."""
    data = batch(k)
    values, V = eigenpairs(data.A, wide, isa)
    top = largest(data.values)
    error = np.abs(values - np.maximum(data.values, 0)).max(1) / top
    assert error.max() <= tol.solver(k), worst(data, error)
    assert (np.diff(values, axis=1) <= 0).all()
    assert (values >= 0).all()
    V = V.astype(np.longdouble)
    error = np.abs(V.swapaxes(1, 2) @ V - np.eye(k)).max((1, 2))
    assert error.max() <= tol.solver(k), worst(data, error)
    error = np.abs(data.A @ V - V * values[:, None, :]).max((1, 2)) / top
    assert error.max() <= tol.solver(k), worst(data, error)


@functools.cache
def extremes(k: int) -> tuple[Array, Extended]:
    """Near the ends of what float64 can square, and the eigenvalues."""
    A = np.stack([cases(k)["random 0"], np.eye(k)])
    A = np.concatenate([A / np.abs(A).max() * scale for scale in (1e150, 1e-150)])
    return A, judge(A)[0]


@each_k
@each_isa
def test_beyond_the_promised_range(isa, k):
    """At 1e±150 digits may be lost, but nothing breaks."""
    A, truth = extremes(k)
    for wide in (False, True):
        values, V = eigenpairs(A, wide, isa)
        assert (np.abs(values - truth) <= 1e-9 * truth[:, :1]).all()
        assert np.abs(V.swapaxes(1, 2) @ V - np.eye(k)).max() <= 1e-9
        value, v = numerics.leading_pair(A, wide, isa)
        assert (np.abs(value - truth[:, 0]) <= 1e-9 * truth[:, 0]).all()
        assert np.abs((v * v).sum(1) - 1).max() <= 1e-9


# ------------------------------------------------------------------------------------------------
# The leading pair
# ------------------------------------------------------------------------------------------------


class Oriented(NamedTuple):
    v: Extended  # (n, k)
    error: Array  # (n,): how far a backward stable solver may be off
    decided: NDArray[np.bool_]  # (n,): no threshold of the rules is within rounding


def oriented(values: Extended, V: Extended, k: int, wide: bool, simple: float) -> Oriented:
    """The orientation rule of docs/mathematics.md on given eigenpairs, and how well conditioned it is.

    ``simple`` is the backward error to allow where the top eigenvalue is alone by twice the gap that counts.
    """
    top = values[:, :1]
    gaps = (top - values) / np.where(top == 0, 1, top)
    limit = constants.eigenvalue_gap(k, wide)
    tied = gaps <= limit
    # float64's limit is but a few roundings per modality; the other one is far above all of them
    band = (0.5, 2.0) if wide else (0.999, 1.001)
    decided = ~((gaps > band[0] * limit) & (gaps < band[1] * limit)).any(1)
    Pi = np.einsum("nij,nj,nmj->nim", V, tied, V)
    along = np.einsum("nmj,nj->nm", V, tied * V.sum(1))
    length = np.sqrt((along * along).sum(1, keepdims=True))
    apart = np.where(tied, 1, gaps).min(1, keepdims=True)
    zero = constants.zero_sum(k) / apart
    decided &= ~((length > zero / 16) & (length < 16 * zero))[:, 0]
    nowhere = length <= zero
    diagonal = np.einsum("nii->ni", Pi)
    peak = diagonal.max(1, keepdims=True)
    tie = np.clip(zero, constants.PEAK_TIE, 0.5)
    decided &= ~(nowhere & (np.abs(1 - diagonal / np.where(peak == 0, 1, peak) - tie) < zero / 4)).any(1)
    m = (diagonal >= peak * (1 - tie)).argmax(1)
    v = np.where(nowhere, np.take_along_axis(Pi, m[:, None, None], 1)[:, 0], along)
    norm = np.sqrt((v * v).sum(1, keepdims=True))
    v = np.where(top == 0, 0, v / np.where(norm == 0, 1, norm))
    # A projector turns with the gap to what is not in it, and its image of the ones with that over their length.
    apart = np.minimum(np.where(tied, np.inf, gaps).min(1) - np.where(tied, gaps, 0).max(1), 1)
    shrinks = np.where(nowhere[:, 0], 1.0, k**0.5 / np.maximum(length[:, 0], zero[:, 0]))
    error = np.where(tied.sum(1) == 1, 1, np.maximum(shrinks, 1)) * tol.solver(k) / apart
    error = np.where(apart > 2 * limit, np.where(tied.sum(1) == 1, simple / apart, error), error).astype(np.float64)
    return Oriented(v, error, decided & (error < 1e-2))


@each_width
@each_k
@each_isa
def test_leading_pair(isa, k, wide):
    """λ₁ to rounding; v₁ the projection of the ones on the top eigenspace, or of e_m where that is 0."""
    data = batch(k)
    value, v = numerics.leading_pair(data.A, wide, isa)
    top = largest(data.values)
    error = np.abs(value - data.values[:, 0]) / top
    assert error.max() <= tol.solver(k), worst(data, error)
    length = np.abs(np.sqrt((v.astype(np.longdouble) ** 2).sum(1)) - (data.values[:, 0] > 0))
    assert length.max() <= 4 * k**0.5 * EPS
    truth = oriented(data.values, data.V, k, wide, tol.POWER_ITERATION)
    error = np.where(truth.decided, np.abs(v - truth.v).max(1) / truth.error, 0)
    assert error.max() <= 1, worst(data, error)
    assert truth.decided.mean() > 0.7  # or the tests above say little


@each_width
@each_k
@each_isa
def test_leading_pair_agrees_with_eigenpairs(isa, k, wide):
    """One rule, two paths to it."""
    data = batch(k)
    values, V = eigenpairs(data.A, wide, isa)
    value, v = numerics.leading_pair(data.A, wide, isa)
    error = np.abs(value - values[:, 0]) / largest(data.values)
    assert error.max() <= tol.solver(k), worst(data, error)
    simple = tol.solver(k)
    ours = oriented(values.astype(np.longdouble), V.astype(np.longdouble), k, wide, simple)
    decided = oriented(data.values, data.V, k, wide, simple).decided & ours.decided
    error = np.where(decided, np.abs(v - ours.v).max(1) / ours.error, 0)
    assert error.max() <= 1, worst(data, error)


@each_width
@each_isa
@pytest.mark.parametrize("k", [k for k in KS if k >= 2])
def test_orientation(isa, k, wide):
    """The rules one by one, where the answer is known."""

    def leading(A: Array) -> Array:
        return numerics.leading_pair(A[None], wide, isa)[1][0]

    ones, e = np.ones(k), np.eye(k)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=tol.solver(k))
    close(leading(np.eye(k)), ones / k**0.5)  # everything tied: the ones themselves
    close(leading(np.diag([3.0, 3.0, *ones[2:]])), (e[0] + e[1]) / 2**0.5)  # a pair tied
    x = np.array([-1.0, *range(2, k + 1)])  # a positive sum
    close(leading(np.outer(x, x)), x / np.linalg.norm(x))
    pair = np.zeros((k, k))
    pair[:2, :2] = [[1, -1], [-1, 1]]
    close(leading(pair), (e[0] - e[1]) / 2**0.5)  # no sum: the first of two equals
    pair[:2, :2] = [[1, -2], [-2, 4]]
    close(leading(pair), np.array([1.0, 2.0]) @ e[:2] * [-1 if m == 0 else 1 for m in range(k)] / 5**0.5)
    if k > 2:
        x = zero_sum_vector(k)  # no sum: the largest entry is positive
        close(leading(np.outer(x, x)), -x / np.linalg.norm(x))
        tied = k * np.eye(k) - 1  # no sum in k - 1 dimensions, and no largest entry: the first
        close(leading(tied), (k * e[0] - 1) / (k * (k - 1)) ** 0.5)
        lifted = np.zeros((k, k))  # two antipodal pairs beside one another, the second one longer
        if k >= 4:
            lifted[:4, :4] = np.kron(np.diag([1.0, 4.0]), [[1, -1], [-1, 1]])
            close(leading(lifted), (e[2] - e[3]) / 2**0.5)
    close(leading(np.zeros((k, k))), 0 * ones)


@each_width
@each_isa
@pytest.mark.parametrize("k", [3, 4, 8, 9, 32])
def test_peaks_that_are_equal_up_to_rounding(isa, k, wide):
    """Diagonal entries of the projector within a relative 4·eps32 are a tie, and the lowest index wins."""
    for departure, winner in ((0.5 * tol.EPS32, 0), (16 * tol.EPS32, 1)):
        x = np.array([1.0, -1.0 - departure, departure, *[0.0] * (k - 3)])
        _, v = numerics.leading_pair(np.outer(x, x)[None], wide, isa)
        assert v[0, winner] > 0.5


@each_width
@each_isa
@pytest.mark.parametrize("k", [2, 3, 8, 9, 32])
def test_sums_that_are_zero_up_to_rounding(isa, k, wide):
    """Up to 16·k·eps64 a sum counts as zero, whatever its sign, and then the first of equals is positive."""
    for departure, winner in ((1e-12, 1), (4 * EPS, 0), (0.0, 0), (-4 * EPS, 0), (-1e-12, 0)):
        x = np.array([1.0, -1.0 - departure, *[0.0] * (k - 2)])
        _, v = numerics.leading_pair(np.outer(x, x)[None], wide, isa)
        assert v[0, winner] > 0.5


@each_width
@each_k
@each_isa
def test_diagonal_matrices_are_solved_exactly(isa, k, wide):
    """Zero among them: nothing to rotate, so only the order changes. Equal ones keep theirs."""
    diagonal = np.where(np.arange(k) % 3, np.arange(k) % 5, 0.0)
    for entries in (np.zeros(k), np.ones(k), diagonal, diagonal[::-1]):
        order = np.argsort(-entries, kind="stable")
        values, V = eigenpairs(np.diag(entries)[None], wide, isa)
        assert (values[0] == entries[order]).all()
        assert (V[0] == np.eye(k)[:, order]).all()


@each_width
@each_isa
def test_one_by_one(isa, wide):
    A = np.array([[[2.5]], [[1e-90]], [[0.0]]])
    value, v = numerics.leading_pair(A, wide, isa)
    assert (np.abs(value - A[:, 0, 0]) <= 2 * EPS * A[:, 0, 0]).all()
    assert (v == [[1.0], [1.0], [0.0]]).all()


# ------------------------------------------------------------------------------------------------
# One matrix among others
# ------------------------------------------------------------------------------------------------


def bits(*arrays: Array) -> Array:
    """Every bit of some results, (n, ...), one row per matrix; NaN payloads are no part of the promise."""
    flat = np.concatenate([np.where(np.isnan(x), np.nan, x).reshape(len(x), -1) for x in arrays], 1)
    return np.ascontiguousarray(flat).view(np.int64)


SOLVERS = (eigenpairs, numerics.leading_pair)
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=["eigenpairs", "leading_pair"])


@each_solver
@each_width
@each_k
@each_isa
def test_neighbours_do_not_matter(isa, k, wide, solver):
    """A matrix has the same bits alone, in packs of any length, and at any position among any others."""
    _, A, *_ = batch(k)
    expected = bits(*solver(A, wide, isa))
    if k <= 9:
        alone = np.concatenate([bits(*solver(one[None], wide, isa)) for one in A])
        assert (alone == expected).all()
    rng = np.random.default_rng(0)
    for n in (2, 7, 8, 9, len(A)):
        for _ in range(3 if k <= 9 else 1):
            rows = rng.choice(len(A), n)
            assert (bits(*solver(A[rows], wide, isa)) == expected[rows]).all()


@each_solver
@each_width
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 32])
@each_isa
def test_only_the_upper_triangle_is_read(isa, k, wide, solver):
    _, A, *_ = batch(k)
    lower = np.tril(np.full((k, k), np.nan), -1)
    assert (bits(*solver(A + lower, wide, isa)) == bits(*solver(A, wide, isa))).all()


@each_solver
@each_width
@each_k
@each_isa
def test_a_bad_matrix_is_nan_and_its_neighbours_are_not(isa, k, wide, solver):
    """Wherever it is in a pack, and whichever of its entries is bad."""
    A = batch(k).A[:20].copy()
    expected = bits(*solver(A, wide, isa))
    rng = np.random.default_rng(0)
    for at in range(9) if k <= 9 else (0, 4, 8):
        spoilt = A.copy()
        i, j = sorted(rng.integers(0, k, 2))
        spoilt[at, i, j] = (np.nan, np.inf, -np.inf)[at % 3]
        values, vectors = solver(spoilt, wide, isa)
        assert np.isnan(values[at]).all()
        assert np.isnan(vectors[at]).all()
        others = np.arange(len(A)) != at
        assert (bits(values, vectors)[others] == expected[others]).all()
