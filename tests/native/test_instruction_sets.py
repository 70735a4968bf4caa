"""Every instruction set that this processor has, and those that it has not."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
import torch

from pmrl_kernels import dominant_sv_loss
from pmrl_kernels.ops import native
from tests import ROOT
from tests.tools.native import COMPILED, DTYPES, OTHERS, RUNS_HERE, run


def test_the_instruction_set_is_the_one_asked_for():
    """With none asked for the best there is; in the processes started below the one they were given."""
    asked = os.environ.get("PMRL_KERNELS_ISA") or RUNS_HERE[0]
    assert native.build_info["isa"] == asked
    assert "baseline" in RUNS_HERE or len(COMPILED) == 1  # of a sample of the sanitizers'


def passed(done: subprocess.CompletedProcess[str]) -> int:
    """How many tests a pytest process passed; an error unless that is all it ran."""
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, f"{last}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert "failed" not in last
    found = re.search(r"(\d+) passed", last)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("isa", OTHERS)
def test_arithmetic_on_every_instruction_set(isa):
    """Those tests that take arithmetic apart, by another instruction set in another process."""
    names = [
        "test_every_half_precision_number_is_read_as_it_is",
        "test_gradients_are_rounded_once",
        "test_sums_that_a_rounding_to_float32_would_move",
        *(f"test_agrees_with_the_reference[{dtype}-{k}-normalize]" for dtype in DTYPES for k in (2, 5, 9)),
    ]
    chosen = [f"{__file__}::test_the_instruction_set_is_the_one_asked_for"]
    chosen += [f"{ROOT}/tests/native/test_arithmetic.py::{name}" for name in names]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, isa=isa)
    assert passed(done) == 1 + 12 + 4 + 8 + 12


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_contract_on_every_instruction_set(isa, sampled):
    """The whole suite of the native backend, for those that this process does not run on."""
    which = (
        "native and not every_instruction_set and not test_solvers and not test_elementary"  # these do so themselves
    )
    command = ("-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", which)
    done = run(*command, *sampled(1, "--every"), isa=isa, timeout=1200)
    assert passed(done) > 200


FALLBACK = """
import json, torch
from pmrl_kernels import ops, dominant_sv_loss, info
from pmrl_kernels.ops.spectral import SPECTRAL
x = torch.eye(3)
loss = dominant_sv_loss(x, x).item()
try:
    dominant_sv_loss(x, x, backend="native")
    error = None
except RuntimeError as caught:
    error = str(caught)
resolved = ops.resolve(SPECTRAL, None, torch.device("cpu"), torch.float32, 2, 3).backend
reason = ops.unavailable_reasons["native"]
print(json.dumps([list(ops.available), reason, resolved, loss, error, info.report()]))
"""


@pytest.mark.parametrize("isa", ["sse9", *(name[:-3] for name in COMPILED if name.endswith("(-)"))])
def test_an_instruction_set_that_cannot_run(isa):
    """No native backend then, with a reason; the reference takes over unless "native" is asked for by name."""
    done = run("-c", FALLBACK, isa=isa)
    assert done.returncode == 0, done.stderr
    available, reason, resolved, loss, error, report = json.loads(done.stdout)
    assert "native" not in available
    assert resolved == "reference"
    x = torch.eye(3)
    assert loss == pytest.approx(dominant_sv_loss(x, x, backend="reference").item())
    wanted = RUNS_HERE if isa not in COMPILED else ["this processor does not have"]
    for part in ("PMRL_KERNELS_ISA", f"'{isa}'", *wanted):
        assert part in reason
        assert part in error
        assert part in report


def test_an_empty_variable_asks_for_nothing():
    done = run("-c", "from pmrl_kernels.ops import native; print(native.build_info['isa'])", isa="")
    assert done.stdout.split() == [RUNS_HERE[0]]
