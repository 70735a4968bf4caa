"""The Triton backend without a GPU: interpreted, compiled ahead of time, and its launches counted.

Interpreting and compiling exclude one another in a process, and are done in others. The contract itself is that of all
backends (test_contract.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no packages for this system")

DATA = Path(__file__).resolve().parent / "data"
ROOT = DATA.parent.parent
sys.path.insert(0, str(DATA))

import resources  # noqa: E402

from pmrl_kernels.backends import constants, reference, triton  # noqa: E402
from pmrl_kernels.backends.triton import kspace, launch  # noqa: E402

if launch.INTERPRETED:
    pytest.skip("this process interprets; these tests start such processes themselves", allow_module_level=True)


def run(*arguments: str, timeout: int = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another Python process, single-threaded."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PMRL_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_interpreted(*arguments: str) -> int:
    """The number of tests that passed in the interpreter; none may fail."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    done = run(*command, timeout=3600, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


# ------------------------------------------------------------------------------------------------
# In the interpreter
# ------------------------------------------------------------------------------------------------


def test_a_sample_of_the_contract():
    assert run_interpreted("tests/test_contract.py", "-k", "triton", "--one-in", "24") >= 60


@pytest.mark.slow
def test_the_contract():
    """A part of it that takes some minutes.

    All of it: TRITON_INTERPRET=1 python -m pytest tests/test_contract.py -k triton
    """
    parts = {"triton-latency": "8", "triton-throughput": "8"}
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(run_interpreted, "tests/test_contract.py", "-k", variant, "--one-in", share)
            for variant, share in parts.items()
        ]
        assert min(one.result() for one in started) >= 100


# ------------------------------------------------------------------------------------------------
# Ahead of time
# ------------------------------------------------------------------------------------------------


def compiled(*arguments: str) -> str:
    done = run(str(DATA / "resources.py"), *arguments, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout


def rows_of(text: str) -> dict[tuple[str, ...], list[int]]:
    """(target, call, dtype, k, kernel, warps) -> registers, stack, shared memory."""
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {tuple(row[:6]): list(map(int, row[6:9])) for row in rows}


def test_kernels_compile_without_spills():
    rows = rows_of(compiled("--quick"))
    assert {key[0] for key in rows} == {case.target for case in resources.QUICK}
    assert {key[4] for key in rows} >= {"forward_kernel", "gram_kernel", "solve_kernel", "backward_kernel"}


@pytest.mark.slow
def test_resources_are_those_of_the_table():
    """A kernel that takes more than it did is seen where it is reviewed: `make resources` rewrites the table."""
    text, written = compiled(), resources.TABLE.read_text()
    assert text.splitlines()[0] == written.splitlines()[0], "another version of Triton: rewrite the table"
    assert rows_of(text) == rows_of(written)


@pytest.mark.parametrize("stack", [0, 8])
@pytest.mark.parametrize("k", [8, 9])
def test_the_gate_sees_spills(k, stack):
    row = resources.Row(resources.Case("sm_90", "alignment", "fp32", k), "kernel", 1, 255, stack, 0, 1.0)
    assert bool(resources.faults(row)) == (stack > 0 and k <= 8)
    assert resources.faults(row._replace(stack=0, shared=1 << 20))


def test_nothing_adds_floating_point_numbers_atomically():
    """It would add them in another order each time."""
    atomics = []
    for request in resources.requests(resources.Case("sm_90", "alignment", "fp32", 3)):
        kernel, warps, *rest = request
        text = launch.compile_for(resources.TARGETS["sm_90"], kernel, *rest, warps).asm["ptx"]
        atomics += re.findall(r"\b(?:atom|red)\.[\w.:]+", text)
    assert atomics, "the last program of solve_kernel is found by counting"
    assert not [name for name in atomics if re.search(r"\.(f|bf)\d+", name)]


# ------------------------------------------------------------------------------------------------
# Launches
# ------------------------------------------------------------------------------------------------

OUTPUTS = {
    "alignment": constants.ALIGNMENT_MEAN,
    "values": constants.SIGMA,
    "everything": constants.ALIGNMENT_MEAN | constants.SIGMA | constants.U | constants.V | constants.Z,
}


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[str]]:
    names: list[str] = []
    monkeypatch.setattr(launch, "_launch", lambda kernel, *_: names.append(kernel.fn.__name__))
    return names


@pytest.mark.parametrize(
    ("wanted", "B", "forward"),
    [
        ("alignment", 64, ["forward_kernel", "reduce_kernel"]),
        ("values", 64, ["forward_kernel"]),
        ("everything", 64, ["forward_kernel", "reduce_kernel"]),
        ("alignment", 65536, ["gram_kernel", "solve_kernel"]),
        ("values", 65536, ["gram_kernel", "solve_kernel"]),
        ("everything", 65536, ["gram_kernel", "solve_kernel", "vectors_kernel"]),
        ("everything", 0, []),
    ],
)
def test_launches(launched, wanted, B, forward):
    """One or two for the alignment term forward, one backward whatever comes in."""
    xs = [torch.empty(B, 4) for _ in range(3)]
    options = (None, None, 0.05, True, True, OUTPUTS[wanted])
    outputs, state = launch.forward(xs, *options)
    assert launched == forward
    launch.backward(xs, *options, state, outputs, [True, False, True])
    assert launched == forward + (["backward_kernel"] if B else [])


def test_shapes_without_running(launched):
    """Outputs are those of the reference, the state is as large as the fake one that torch.compile sees."""
    for stacked in (False, True):
        xs = [torch.empty(5, 3, 4)] if stacked else [torch.empty(5, 4) for _ in range(3)]
        for wanted in OUTPUTS.values():
            outputs, state = launch.forward(xs, None, None, 0.05, True, True, wanted)
            expected = reference.spectral_output_shapes(xs, True, wanted)
            assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in expected]
            assert state[0].shape == (launch.state_size(5, 3),)


def test_a_record_has_room_for_its_fields():
    for k in (1, 2, 4, 9, 32):
        half = k * (k + 1) // 2
        fields = {name: kspace.field(k, name) for name in kspace._FIELDS}
        assert list(fields.values()) == sorted(fields.values())
        assert fields["through_alignment"] - fields["eigenvectors"] == k * k
        assert fields["eigenvectors"] == half
        assert kspace.record_size(k) > fields["undecided"]


# ------------------------------------------------------------------------------------------------
# At home in an installation
# ------------------------------------------------------------------------------------------------


def test_reasons():
    assert triton.unavailable() is None or "TRITON_INTERPRET" in triton.unavailable()
    assert "not for cpu" in triton.rejects(torch.device("cpu"), torch.float32, 3, 64)
    assert triton.rejects(torch.device("cuda"), torch.float32, 3, 64) is None


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_importing_the_package_imports_no_triton(interpret):
    code = (
        "import json, sys, pmrl_kernels.backends as backends\n"
        "print(json.dumps(['triton' in sys.modules, 'triton' in backends.available]))"
    )
    done = run("-c", code, TRITON_INTERPRET=interpret)
    imported, available = json.loads(done.stdout)
    assert not imported
    assert available or interpret == "0"


def test_auto_prefers_it_on_a_gpu_only():
    code = (
        "import torch, pmrl_kernels.backends as b\n"
        "resolve = lambda device: b.choose(tuple(b.available.values()), None, torch.device(device), torch.float32,"
        " 3, 64, {})[0]\n"
        "print(resolve('cuda'), resolve('cpu'))"
    )
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.stdout.split()[0] == "triton", done.stderr
    assert done.stdout.split()[1] in ("native", "triton")
