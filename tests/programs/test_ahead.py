"""Kernels compiled ahead for a card that is not here: what launches them is the driver's to resolve there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.tools.driver import c_compiler

pytest.importorskip("triton", reason="Triton has no packages for this system")
COMPILED = """
import os, sys
from pathlib import Path

from tests.tools import ahead, resources

driver, cache = map(Path, sys.argv[1:])
ahead.stand_in(driver)
os.environ["TRITON_CACHE_DIR"] = str(cache)
launches = resources.launches(resources.Case("sm_90", "alignment", "fp32", 3), 64)
(one,) = (x for x in launches if x.kernel.fn.__name__ == "reduce_kernel")
job = one.kernel.fn.__module__, one.kernel.fn.__name__, one.compilation()
print(ahead.compiled(job, 90), ahead.compiled(("json", "loads", None), 90), sep="\\n")
"""


def test_what_launches_a_kernel_asks_for_the_driver(tmp_path):
    """Else it cannot be loaded where there is one, and a C compiler runs once more for each signature."""
    c_compiler()  # or it is skipped
    driver, cache = tmp_path / "driver", tmp_path / "cache"
    driver.mkdir()
    command = [sys.executable, "-c", COMPILED, str(driver), str(cache)]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=compiling, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fine, told = done.stdout.splitlines()
    assert fine == "None"
    assert told.startswith("loads: ")
    programs = list(cache.glob("*/*.so"))
    assert programs
    assert all(b"\0libcuda.so.1\0" in path.read_bytes() for path in programs)
    assert len(list(cache.glob("*/*.cubin"))) == 1
    assert "could not be loaded" not in done.stderr
