"""What the tests of CUDA kernels share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """A launch looks for tensors among all objects; those that were there before are put aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
