"""The module through which tests reach the native numerics; without it, importing this skips whatever module does."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tools import tolerances as tol

numerics = pytest.importorskip(
    "pmrl_kernels._numerics", reason="the test module of the solvers is built in development installs only (make build)"
)

Array = NDArray[np.float64]
Extended = NDArray[np.longdouble]

ISAS = tuple(numerics.runs_here())
EPS = tol.EPS64

each_isa = pytest.mark.parametrize("isa", ISAS)


def eigenpairs(A: Array, wide: bool, isa: str) -> tuple[Array, Array]:
    """As ``leading_pair`` takes them: the width of the embeddings makes no difference here."""
    values, V = numerics.eigenpairs(A, isa)
    return values, V
