"""The backend for CUDA where the registry meets it: which calls it takes, in whose place, and why it does not run."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode

from pmrl_kernels import dominant_sv_loss, ops
from pmrl_kernels.ops import cuda, native
from pmrl_kernels.ops.contrast import PAIRED
from pmrl_kernels.ops.spectral import SPECTRAL, spec
from tests.tools.backends import ALL_OPS, fake, run_python, use_backends

CARD = torch.device("cuda", 0)
BUILT = {"cuda": "sm_80 sm_90 sm_100 compute_90"}


@pytest.fixture
def machine(monkeypatch) -> dict[int, str | None]:
    """A library for CUDA, and what the driver has answered for each device. The backends are fake."""
    answers: dict[int, str | None] = {0: None}
    monkeypatch.setattr(native, "build_info", BUILT)
    monkeypatch.setattr(native, "_answers", answers)
    ours = fake("cuda", offered=["spectral"])
    pair = ours.pairs["spectral"]._replace(rejects=cuda.rejects_modalities)
    triton = fake("triton", offered=["spectral"])
    ours = ours._replace(rejects=cuda.rejects, pairs={"spectral": pair})
    use_backends(monkeypatch, {"cuda": ours, "triton": triton, "reference": ops.available["reference"]})
    return answers


def chosen(k: int, device: torch.device = CARD, requested: str | None = None, op: ops.Op = SPECTRAL) -> str:
    return ops.resolve(op, requested, device, torch.float32, k, 64).backend


def test_it_takes_the_numbers_of_modalities_that_it_is_compiled_for(machine, caplog):
    """In place of Triton's kernels, which take the others."""
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        assert [chosen(k) for k in (1, *range(2, 9), 9, 32)] == ["triton", *["cuda"] * 7, "triton", "triton"]
    assert [record.getMessage() for record in caplog.records] == [
        "spectral: using the triton backend; passed over cuda: its kernels are for k in 2..8"
    ]
    assert chosen(4, op=PAIRED) == "reference"
    assert chosen(4, requested="triton") == "triton"
    assert chosen(4, requested="cuda") == "cuda"


def test_it_is_the_next_after_the_cpus():
    assert ops._PREFERENCE.index("native") < ops._PREFERENCE.index("cuda") < ops._PREFERENCE.index("triton")


@pytest.mark.parametrize(
    ("k", "where", "reason"),
    [
        (4, torch.device("cpu"), "it has kernels for CUDA, not for cpu"),
        (4, torch.device("cuda", 1), "an old card"),
    ],
)
def test_asked_for_by_name_it_runs_or_says_why_not(machine, monkeypatch, k, where, reason):
    machine[1] = "an old card"
    told = rf"backend 'cuda' cannot run torch.float32 embeddings of k = {k}, d = 64 on {where}: {reason}$"
    with pytest.raises(RuntimeError, match=f"^{told}"):
        chosen(k, where, "cuda")
    monkeypatch.setattr(ops, "default_name", "cuda")  # what PMRL_KERNELS_BACKEND says
    with pytest.raises(RuntimeError, match=f"^environment variable PMRL_KERNELS_BACKEND: {told}"):
        chosen(k, where)


@pytest.mark.parametrize("k", [1, 9, 32])
def test_other_numbers_of_modalities_are_the_next_backends(machine, k):
    """One is what the instance contrast normalises its rows as."""
    assert chosen(k, requested="cuda") == "triton"


def test_a_device_is_asked_once(machine, monkeypatch):
    """By the first call, and never before: asking starts CUDA."""
    asked = []
    machine.clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_ask", lambda index: asked.append(index) or ("no" if index else None))
    assert cuda.unavailable() is None
    assert not asked
    for d in (8, 16, 32):
        for index in (0, 1):
            reason = cuda.rejects(torch.device("cuda", index), torch.float32, 4, d)
            assert reason == ("no" if index else None)
    assert asked == [0, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cuda.rejects(torch.device("cuda"), torch.float32, 4, 64) == "no"


def test_without_a_driver_the_current_device_is_the_first(machine, monkeypatch):
    """The library's answer, and not the error of torch, which may be built for CUDA on a machine without it."""

    def raises() -> int:
        raise RuntimeError("Found no NVIDIA driver on your system.")

    machine.clear()
    monkeypatch.setattr(native, "_ask", lambda index: f"no driver for {index}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", raises)
    assert cuda.rejects(torch.device("cuda"), torch.float32, 4, 64) == "no driver for 0"


def test_why_it_cannot_run_in_an_installation(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda.unavailable() is None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.unavailable() == "this torch is built for CPUs alone"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert cuda.unavailable() == "this torch is built for HIP 7.0"
    assert "this PyTorch is for HIP 7.0" in str(cuda.rejects(CARD, torch.float32, 4, 64))
    monkeypatch.setattr(native, "build_info", {"cuda": "none: no nvcc was found"})
    assert cuda.unavailable() == "the native library was built without kernels for CUDA: no nvcc was found"
    monkeypatch.setattr(native, "build_info", {})
    monkeypatch.setattr(native, "_unavailable", "it was not built")
    assert cuda.unavailable() == "its kernels are in the native library: it was not built"


def test_asked_for_by_the_environment_on_a_machine_without_it():
    """An error at the first call that says what is lacking."""
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU")
    code = "import torch, pmrl_kernels; pmrl_kernels.dominant_sv_loss(torch.eye(3), torch.eye(3))"
    done = run_python(code, PMRL_KERNELS_BACKEND="cuda")
    last = done.stderr.strip().splitlines()[-1]
    if "cuda" in ops.available:
        assert last.endswith("it has kernels for CUDA, not for cpu")
    else:
        told = f"backend 'cuda' is not available: {ops.unavailable_reasons['cuda']}"
        assert last == f"RuntimeError: environment variable PMRL_KERNELS_BACKEND: {told}"


# ---- under torch.compile and with fake tensors --------------------------------------------------


@pytest.mark.parametrize("answer", [None, "an old card", "the library's"])
@pytest.mark.parametrize("requested", [None, "cuda"])
def test_torch_compile_sees_the_drivers_answer_and_not_the_question(machine, monkeypatch, requested, answer):
    """One graph, whether the device was asked before or not; with embeddings of a CPU, for want of others."""
    reference = ops.available["reference"]
    asked = []

    def rejects(device: torch.device, dtype: torch.dtype, k: int, d: int) -> str | None:
        return cuda.rejects(CARD, dtype, k, d)

    def ask(index: int) -> str | None:
        asked.append(index)
        return answer

    pair = reference.pairs["spectral"]._replace(backend="cuda", rejects=rejects)
    ours = ops.Backend("cuda", rejects, {"spectral": pair}, dict.fromkeys(ALL_OPS, "there are none"))
    monkeypatch.setattr(ops, "available", {"cuda": ours, "reference": reference})
    if answer == "the library's":
        if not hasattr(torch.ops.pmrl_kernels, "cuda_unavailable"):
            pytest.skip("no native library")
        real = native._ask
        answer = real(0)
    else:
        real = None
        monkeypatch.setattr(native, "_ask", ask)
    machine.clear()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(
            lambda *xs: dominant_sv_loss(*xs, backend=requested), backend="aot_eager", fullgraph=True, dynamic=True
        )
        for B in (4, 7):
            xs = [torch.randn(B, 6, requires_grad=True) for _ in range(3)]
            if requested and answer:
                with pytest.raises(Exception, match=answer):
                    compiled(*xs)
                continue
            found, expected = compiled(*xs), dominant_sv_loss(*xs, backend="reference")
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(torch.autograd.grad(found, xs), torch.autograd.grad(expected, xs))
    finally:
        torch._dynamo.reset()
    assert asked == ([] if real else [0])
    assert machine == {0: answer}


def test_fake_tensors_of_a_device_have_the_states_of_its_kernels():
    """Without gradients, for which PyTorch asks a device that is not there for a stream."""
    if not native.build_info:
        pytest.skip("no native library")
    from pmrl_kernels.ops.spectral.native import PAIRS, cuda_state

    pair, wanted = PAIRS["spectral"], spec.ALIGNMENT | spec.SIGMA | spec.U | spec.V | spec.Z | spec.W
    with FakeTensorMode():
        for k, dtype in ((2, torch.float32), (8, torch.float64)):
            xs = [torch.empty(5, 6, device="cuda", dtype=dtype) for _ in range(k)]
            call = xs, None, torch.empty((), device="cuda"), 0.5, True, True, wanted
            outputs, state = pair.forward(*call)
            assert [x.shape for x in state] == [x.shape for x in cuda_state(xs, True, True, wanted)]
            gradients = pair.backward(*call, state, outputs, [True] * k)
            assert [x.shape for x in gradients] == [(5, 6)] * k + [()]
            assert {x.device for x in (*outputs, *state, *gradients)} == {CARD}
            assert ops.resolve(SPECTRAL, None, xs[0].device, dtype, k, 6).backend in ops.available
