"""What tests of refused arguments share."""

from __future__ import annotations

from typing import Any

import pytest

from pmrl_kernels.ops import function


@pytest.fixture
def no_kernels(monkeypatch):
    """An argument error must come before any kernel: reaching one fails the test."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("a kernel was reached with a bad argument")

    monkeypatch.setattr(function, "apply", reached)
