"""Fixtures every test shares: the backends and devices of this machine, and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pmrl_kernels import backends

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so an output element nobody wrote shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=tuple(backends.available))
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that works here: a new one joins the suite by working."""
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
