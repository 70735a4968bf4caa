"""The Triton backend in the interpreter, and where it is chosen."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no packages for this system")

from pmrl_kernels.ops import triton
from pmrl_kernels.ops.contrast import triton as contrasts
from pmrl_kernels.ops.triton import runtime
from tests.tools.processes import run, run_interpreted

if runtime.INTERPRETED:
    pytest.skip("this process interprets; these tests start such processes themselves", allow_module_level=True)

# What takes a backend and a device; embeddings of the oracle are tamer than those of the rest.
CONTRACT = "cpu and not oracle"

# ------------------------------------------------------------------------------------------------
# In the interpreter
# ------------------------------------------------------------------------------------------------


def test_a_sample_of_the_contract():
    assert run_interpreted("tests/contract", "-k", f"triton and {CONTRACT}", "--one-in", "800") >= 7


def test_a_sample_of_contrasts_and_joint_scores():
    files = "tests/triton/test_contrasts.py", "tests/triton/test_joint.py"
    assert run_interpreted(*files, "-m", "not slow", "--every", "18") >= 10


@pytest.mark.slow
def test_a_sample_of_what_compilers_do_with_it():
    assert run_interpreted("tests/pytorch", "-k", "triton and (compile or export)", "--one-in", "24") >= 4


@pytest.mark.slow
def test_the_contract(sampled):
    """A part of it that takes some minutes, and what torch makes of the operators.

    All of it: TRITON_INTERPRET=1 python -m pytest tests/contract -k triton
    """
    parts = (  # the longest first
        ("tests/pytorch", "triton", sampled(8)),
        ("tests/contract", f"triton-latency and {CONTRACT}", sampled(8)),
        ("tests/contract", f"triton-throughput and {CONTRACT}", sampled(8)),
        ("tests/contract", f"triton-double-float and {CONTRACT}", sampled(8)),
        ("tests/triton/test_gpu.py", "test", sampled(1, "--every")),
        ("tests/triton/test_contrasts.py", "test", sampled(1, "--every")),
        ("tests/triton/test_joint.py", "test", sampled(1, "--every")),
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(run_interpreted, path, "-k", which, *share) for path, which, share in parts]
        assert min(one.result() for one in started) >= 1


# ------------------------------------------------------------------------------------------------
# At home in an installation
# ------------------------------------------------------------------------------------------------


def test_reasons(monkeypatch):
    assert triton.unavailable() is None or "TRITON_INTERPRET" in triton.unavailable()
    assert "not for cpu" in triton.rejects(torch.device("cpu"), torch.float32, 3, 64)
    assert triton.rejects(torch.device("cuda"), torch.float32, 12, 64) is None
    monkeypatch.setattr(triton, "OLD_ON_AMD", True)
    assert triton.rejects(torch.device("cuda"), torch.float32, 8, 64) is None
    assert "Triton 3.9" in triton.rejects(torch.device("cuda"), torch.float32, 9, 64)


@pytest.mark.parametrize(
    ("hip", "name", "capability", "old", "reason"),
    [
        (None, "", (8, 0), False, None),
        (None, "", (7, 5), False, "compute capability below 8.0"),
        ("7.0", "gfx942:sramecc+:xnack-", (9, 4), True, None),
        ("7.0", "gfx1100", (11, 0), False, None),
        ("7.0", "gfx1100", (11, 0), True, "RDNA 3 it needs Triton 3.9"),
    ],
)
def test_cards_without_contrasts(monkeypatch, hip, name, capability, old, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton, "OLD_ON_AMD", old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName=name))
    found = contrasts.rejects(torch.device("cuda", 0), torch.float32, 3, 64)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_importing_the_package_imports_no_triton(interpret):
    code = (
        "import json, sys, pmrl_kernels.ops as ops\n"
        "print(json.dumps(['triton' in sys.modules, 'triton' in ops.available]))"
    )
    done = run("-c", code, TRITON_INTERPRET=interpret)
    imported, available = json.loads(done.stdout)
    assert not imported
    assert available or interpret == "0"


def test_auto_prefers_it_on_a_gpu_only():
    """But for kernels compiled at installation, which go before it: tests/backends/test_cuda.py has those."""
    code = (
        "import torch, pmrl_kernels.ops as b\n"
        "candidates = tuple(backend for name, backend in b.available.items() if name != 'cuda')\n"
        "def resolve(op, device):\n"
        "    problem = torch.device(device), torch.float32, 3, 64\n"
        "    return b.choose(op, candidates, None, *problem, {})[0].backend\n"
        "print(*(resolve(op, device) for op in ('spectral', 'paired') for device in ('cuda', 'cpu')))"
    )
    done = run("-c", code, TRITON_INTERPRET="1")
    spectral_on_gpus, spectral_on_cpus, paired_on_gpus, paired_on_cpus = done.stdout.split()
    assert (spectral_on_gpus, paired_on_gpus) == ("triton", "triton"), done.stderr
    assert spectral_on_cpus in ("native", "triton")
    assert paired_on_cpus in ("native", "reference")
