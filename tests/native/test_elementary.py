"""Elementary functions and constants of the native code, and the module through which tests see them."""

from __future__ import annotations

import numpy as np
import pytest

from pmrl_kernels.ops import constants
from pmrl_kernels.ops.spectral import native
from tests.tools import tolerances as tol
from tests.tools.solvers import EPS, ISAS, Array, Extended, each_isa, eigenpairs, numerics


def ulps(found: Array, truth: Extended) -> float:
    """Largest error in units of the last place of the truth."""
    unit = np.spacing(np.abs(truth).astype(np.float64))
    return float((np.abs(found - truth) / unit).max())


@each_isa
def test_exp_nonpositive(isa):
    """To about 1 ulp over the normal range, 0 where the result would be subnormal."""
    rng = np.random.default_rng(0)
    log2 = np.log(2.0)
    boundaries = -log2 * (np.arange(0, 1020)[:, None] + np.array([0.0, 0.5]))  # of the reduction
    near = boundaries[..., None] + np.spacing(boundaries)[..., None] * np.arange(-3, 4)
    x = np.concatenate(
        [-708.0 * rng.random(200_000), -np.logspace(-320, np.log10(708.0), 50_000), near.ravel(), [0.0, -0.0, -708.0]]
    )
    x = x[(x <= 0) & (x >= -708.0)]
    assert ulps(numerics.exp_nonpositive(x, isa), np.exp(x.astype(np.longdouble))) <= tol.EXP_ULPS
    exact = {0.0: 1.0, -5e-324: 1.0, -708.5: 0.0, -745.0: 0.0, -1e5: 0.0, -1e308: 0.0, -np.inf: 0.0}
    assert (numerics.exp_nonpositive(np.array(list(exact)), isa) == list(exact.values())).all()


@each_isa
def test_log1p_nonnegative(isa):
    """To 3 ulp from the least subnormal to the 31 that a sum of weights can reach."""
    rng = np.random.default_rng(0)
    powers = np.sqrt(2.0) * 2.0 ** np.arange(0, 5) - 1  # of the reduction
    near = powers[:, None] + np.spacing(powers)[:, None] * np.arange(-50, 51)
    x = np.concatenate(
        [
            31.5 * rng.random(200_000),
            rng.random(100_000),
            np.logspace(-323, np.log10(31.5), 50_000),
            near.ravel(),
            1 + np.spacing(1.0) * np.arange(-50, 51),
            [5e-324, 2.0**-1022, 1e-300, 31.0, 31.5],
        ]
    )
    assert ulps(numerics.log1p_nonnegative(x, isa), np.log1p(x.astype(np.longdouble))) <= tol.LOG1P_ULPS
    tiny = np.array([0.0, 2.0**-1022, 1e-300, 1e-20])
    assert (numerics.log1p_nonnegative(tiny, isa) == tiny).all()


@pytest.mark.parametrize("function", ["exp_nonpositive", "log1p_nonnegative"])
@each_isa
def test_elementary_functions_of_nan(isa, function):
    """It stays in its lane."""
    call = getattr(numerics, function)
    x = np.linspace(0.0, 1.0, 19) * (-1 if function == "exp_nonpositive" else 1)
    expected = call(x, isa)
    for at in range(19):
        spoilt = x.copy()
        spoilt[at] = np.nan
        found = call(spoilt, isa)
        assert np.isnan(found[at])
        assert (np.delete(found, at) == np.delete(expected, at)).all()


def test_constants_are_those_of_every_backend():
    """The compiled code has its own copy of ops/constants.py; this is what keeps the two the same."""
    assert constants.MAX_MODALITIES == numerics.MAX_MODALITIES == 32
    assert constants.PEAK_TIE == numerics.PEAK_TIE
    assert constants.CANCELLED == numerics.CANCELLED
    assert constants.RANK_ONE == numerics.RANK_ONE
    assert constants.JACOBI_TOLERANCE == numerics.JACOBI_TOLERANCE
    assert constants.MAX_SWEEPS == numerics.MAX_SWEEPS
    assert native.LANES == numerics.MOST_LANES
    for k in range(1, constants.MAX_MODALITIES + 1):
        assert constants.zero_sum(k) == numerics.zero_sum(k)
        for wide in (False, True):
            assert constants.eigenvalue_gap(k, wide) == numerics.eigenvalue_gap(k, wide)
            assert constants.squarings(k, wide) == numerics.squarings(k, wide)
            floor = constants.singular_value_floor(k, wide)
            assert floor * floor == pytest.approx(numerics.singular_value_floor_squared(k, wide), rel=2 * EPS)


def test_the_test_module_checks_what_it_is_given():
    """A test that asks for nonsense should hear of it."""
    assert ISAS[0] == "scalar"
    assert len(ISAS) > 1
    A = np.eye(3)[None]
    for call in (eigenpairs, numerics.leading_pair):
        with pytest.raises(ValueError, match="isa: got 'none'"):
            call(A, False, "none")
        for bad in (np.eye(3), np.zeros((1, 2, 3)), np.zeros((1, 33, 33)), np.zeros((1, 0, 0))):
            with pytest.raises(ValueError, match="wanted"):
                call(bad, False, "scalar")
        for isa in ISAS:
            values, vectors = call(np.zeros((0, 3, 3)), False, isa)
            assert len(values) == len(vectors) == 0
