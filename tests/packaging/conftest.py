"""What holds for every test of packaging."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from tests.tools.installation import PACKAGE, RECORD


@pytest.fixture(scope="module", autouse=True)
def in_place_build_stays() -> Iterator[None]:
    """Of none of the installations below is the library that development uses."""

    def state() -> dict[str, tuple[int, str]]:
        files = [*PACKAGE.glob("*.so"), *PACKAGE.glob(RECORD)]
        return {x.name: (x.stat().st_mtime_ns, hashlib.sha256(x.read_bytes()).hexdigest()) for x in files}

    before = state()
    yield
    assert state() == before
