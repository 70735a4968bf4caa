"""Which backend runs: by order, by name, by environment variable; and what is logged about it.

Fake backends stand in for compiled ones, so these tests say the same on every machine.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from pmrl_kernels import dominant_sv_loss, ops
from pmrl_kernels.ops import reference
from pmrl_kernels.ops.contrast import PAIRED
from pmrl_kernels.ops.operators import Op, Pair
from pmrl_kernels.ops.spectral import SPECTRAL
from tests.tools.backends import CPU, choose, fake, raising, run_python, use_backends

# ------------------------------------------------------------------------------------------------
# choose
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rejections", "expected"),
    [
        ([None, None, None], ("a", None)),
        (["too wide", None, None], ("b", "a: too wide")),
        (["too wide", "too deep", None], ("c", "a: too wide; b: too deep")),
        ([None, "too deep", "too long"], ("a", None)),
    ],
)
def test_the_first_that_takes_it_is_chosen(rejections, expected):
    """With why faster ones were passed over."""
    assert choose([fake(name, reason) for name, reason in zip("abc", rejections, strict=True)]) == expected


def test_order_is_the_candidates_order():
    assert choose([fake("a"), fake("b")])[0] == "a"
    assert choose([fake("b"), fake("a")])[0] == "b"


def test_request_goes_before_order():
    assert choose([fake("a"), fake("b")], "b") == ("b", None)


def test_request_that_is_rejected_raises_with_the_reason():
    """No other one is taken in its place."""
    with pytest.raises(RuntimeError) as caught:
        choose([fake("a", "d is not a multiple of 8"), fake("b")], "a")
    for part in ("'a'", "torch.float32", "k = 3", "d = 64", "cpu", "d is not a multiple of 8"):
        assert part in str(caught.value)


def test_request_that_is_not_available_raises_with_the_reason():
    with pytest.raises(RuntimeError, match="'triton' is not available: triton is not installed"):
        choose([fake("a")], "triton")


def test_none_can_run():
    with pytest.raises(RuntimeError) as caught:
        choose([fake("a", "too wide"), fake("b", "too deep")])
    for part in ("no backend", "torch.float32", "k = 3", "d = 64", "cpu", "a: too wide"):
        assert part in str(caught.value)


def test_rejects_sees_the_problem():
    seen = []

    def rejects(*problem: Any) -> None:
        seen.append(problem)

    pair = Pair("a", None, None, rejects)
    candidate = ops.Backend("a", raising(AssertionError("its pair is to be asked")), {"spectral": pair}, {})
    ops.choose("spectral", [candidate], None, CPU, torch.bfloat16, 4, 512, {})
    assert seen == [(CPU, torch.bfloat16, 4, 512)]


def test_choose_is_pure(monkeypatch):
    """Neither the module's state nor the environment reach it, and it changes nothing."""
    candidates = [fake("a", "no"), fake("b")]
    expected = choose(candidates)
    monkeypatch.setattr(ops, "available", {})
    monkeypatch.setattr(ops, "unavailable_reasons", {})
    monkeypatch.setattr(ops, "default_name", "triton")
    monkeypatch.setenv("PMRL_KERNELS_BACKEND", "triton")
    logged = set(ops._logged)
    assert choose(candidates) == choose(candidates) == expected
    assert ops._logged == logged


# ------------------------------------------------------------------------------------------------
# resolve
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def rejecting(monkeypatch) -> None:
    """A faster backend that works here but not for this problem."""
    rejecting = fake("native", "k = 3 is not compiled in")
    use_backends(monkeypatch, {"native": rejecting, "reference": ops.available["reference"]})


def resolve(requested: str | None = None, op: Op = SPECTRAL) -> str:
    return ops.resolve(op, requested, CPU, torch.float32, 3, 64).backend


def test_passed_over_backend_is_logged_once(rejecting, caplog):
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        assert [resolve() for _ in range(3)] == ["reference"] * 3
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("pmrl_kernels", logging.INFO)
    for part in ("reference", "native", "k = 3 is not compiled in"):
        assert part in record.getMessage()


def test_each_reason_is_logged(rejecting, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        resolve()
        monkeypatch.setattr(ops, "available", {**ops.available, "native": fake("native", "another reason")})
        monkeypatch.setattr(ops, "_resolved", {})
        resolve()
    assert len(caplog.records) == 2


def test_chosen_by_name_logs_nothing(rejecting, caplog):
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        assert resolve("reference") == "reference"
    assert not caplog.records


def test_default_name_is_what_none_means(rejecting, monkeypatch):
    monkeypatch.setattr(ops, "default_name", "native")
    with pytest.raises(RuntimeError, match="k = 3 is not compiled in"):
        resolve()
    assert resolve("reference") == "reference"


def test_losses_use_the_resolver(rejecting, caplog):
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        dominant_sv_loss(torch.eye(3), torch.eye(3))
    assert "k = 3 is not compiled in" in caplog.text
    with pytest.raises(RuntimeError, match="k = 3 is not compiled in"):
        dominant_sv_loss(torch.eye(3), torch.eye(3), backend="native")


# ------------------------------------------------------------------------------------------------
# An op at a time
# ------------------------------------------------------------------------------------------------


def test_what_a_backend_lacks_the_next_one_computes():
    """And the reason is told, whether the backend was asked for or is just the fastest."""
    backends = [fake("a", offered=["spectral"]), fake("b")]
    for requested in (None, "a"):
        assert choose(backends, requested) == ("a", None)
        assert choose(backends, requested, "paired") == ("b", "a: no kernels for paired, there are none")
    assert choose(backends, "b", "paired") == ("b", None)


def test_what_a_requested_backend_lacks_no_faster_one_computes():
    """Whoever asks for a slower backend has a reason not to want the others."""
    backends = [fake("a"), fake("b", offered=["spectral"]), fake("c")]
    assert choose(backends, "b", "paired") == ("c", "b: no kernels for paired, there are none")
    assert choose(backends, None, "paired") == ("a", None)


def test_a_requested_backend_that_rejects_raises_for_ops_that_it_lacks_too():
    with pytest.raises(RuntimeError, match=r"'a' cannot run .*: not on cpus$"):
        choose([fake("a", "not on cpus", offered=["spectral"]), fake("b")], "a", "paired")


def test_a_requested_backend_raises_where_none_has_the_op():
    with pytest.raises(RuntimeError, match=r"no backend can run .* a: no kernels for paired, there are none$"):
        choose([fake("a", offered=["spectral"])], "a", "paired")


def test_one_pair_may_reject_what_another_takes():
    """Kernels for one op may run where those for another do not."""
    choosy = fake("a")
    pair = choosy.pairs["paired"]._replace(rejects=lambda device, dtype, k, d: "B must be even")
    choosy = choosy._replace(pairs={**choosy.pairs, "paired": pair})
    assert choose([choosy, fake("b")]) == ("a", None)
    assert choose([choosy, fake("b")], None, "paired") == ("b", "a: B must be even")
    assert choose([choosy, fake("b")], "a", "paired") == ("b", "a: B must be even")  # asked for or not


@pytest.mark.parametrize("requested", [None, "triton"])
def test_each_op_that_falls_back_is_logged_once(monkeypatch, caplog, requested):
    partial = fake("triton", offered=["spectral"])
    use_backends(monkeypatch, {"triton": partial, "reference": ops.available["reference"]})
    with caplog.at_level(logging.INFO, logger="pmrl_kernels"):
        for _ in range(3):
            assert resolve(requested) == "triton"
            assert resolve(requested, PAIRED) == "reference"
    (record,) = caplog.records
    for part in ("paired", "using the reference backend", "triton", "no kernels for paired"):
        assert part in record.getMessage()


def test_what_was_resolved_is_found_again(monkeypatch):
    """The search takes longer than a small call's arithmetic."""
    asked = []
    counting = fake("triton")
    pair = counting.pairs["spectral"]._replace(rejects=lambda *problem: asked.append(problem))
    counting = counting._replace(pairs={"spectral": pair})
    use_backends(monkeypatch, {"triton": counting, "reference": ops.available["reference"]})
    for d in (64, 64, 32, 64):
        assert ops.resolve(SPECTRAL, None, CPU, torch.float32, 3, d).backend == "triton"
    assert [d for *_, d in asked] == [64, 32]
    for d in range(5000):  # whoever has a new shape each time does not fill memory
        ops.resolve(SPECTRAL, None, CPU, torch.float32, 3, d)
    assert len(ops._resolved) <= 1024


def test_reference_declines_devices_without_float64():
    """The one device type it cannot run on; the reason has to say why."""
    assert reference.unavailable() is None
    assert reference.rejects(CPU, torch.float32, 3, 64) is None
    assert "float64" in (reference.rejects(torch.device("mps"), torch.float32, 3, 64) or "")


# ------------------------------------------------------------------------------------------------
# The environment variable
# ------------------------------------------------------------------------------------------------


CALL = "import torch, pmrl_kernels; print(pmrl_kernels.dominant_sv_loss(torch.eye(3), torch.eye(3){}).item())"


def test_environment_variable_names_the_backend():
    """In a process where the reference is not the first choice, or this could not tell."""
    code = (
        "from pmrl_kernels import ops\n"
        "from pmrl_kernels.ops.spectral import SPECTRAL\n"
        "import torch\n"
        "reference = ops.available['reference']\n"
        "pair = reference.pairs['spectral']._replace(backend='native')\n"
        "ops.available = {'native': ops.Backend('native', pair.rejects, {'spectral': pair}, {}), **ops.available}\n"
        "problem = (torch.device('cpu'), torch.float32, 3, 64)\n"
        "print(ops.default_name, *(ops.resolve(SPECTRAL, name, *problem).backend for name in (None, 'native')))\n"
    )
    assert run_python(code, PMRL_KERNELS_BACKEND="reference").stdout.split() == ["reference", "reference", "native"]
    assert run_python(code).stdout.split() == ["None", "native", "native"]


def test_unknown_name_in_the_environment():
    """An error at the first call, not at the import; an explicit argument wins."""
    done = run_python(CALL.format(""), PMRL_KERNELS_BACKEND="gpu")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ")
    for part in ("PMRL_KERNELS_BACKEND", "'gpu'", "'reference'"):
        assert part in last
    done = run_python(CALL.format(", backend='reference'"), PMRL_KERNELS_BACKEND="gpu")
    assert (done.returncode, done.stderr) == (0, "")


def test_name_in_the_environment_that_is_not_available():
    code = (
        "from pmrl_kernels import ops\n"
        "ops.available.pop('native', None)\n"
        "ops.unavailable_reasons['native'] = 'no compiler was found'\n"
    )
    done = run_python(code + CALL.format(""), PMRL_KERNELS_BACKEND="native")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    told = "environment variable PMRL_KERNELS_BACKEND: backend 'native' is not available: no compiler was found"
    assert last == f"RuntimeError: {told}"


def test_empty_environment_variable_is_none():
    """As ``PMRL_KERNELS_BACKEND= python train.py`` leaves it."""
    code = "from pmrl_kernels import ops; print(ops.default_name)"
    assert run_python(code, PMRL_KERNELS_BACKEND="").stdout == "None\n"
