"""``python -m pmrl_kernels.info``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types

import pytest
import torch

import pmrl_kernels
from pmrl_kernels import info, ops
from pmrl_kernels.ops import native, triton
from tests.tools.backends import raising, run_python


def test_info():
    done = subprocess.run(
        [sys.executable, "-W", "default", "-m", "pmrl_kernels.info"],
        env={key: value for key, value in os.environ.items() if key != "PMRL_KERNELS_BACKEND"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    facts = {label: value.strip() for label, value in facts.items()}
    assert facts["pmrl_kernels"] == pmrl_kernels.__version__
    assert facts["torch"].startswith(torch.__version__)
    assert facts["python"].startswith(sys.version.split()[0])
    assert {"triton", "cpu"} <= set(facts)
    for name in ops._PREFERENCE:
        reason = ops.unavailable_reasons.get(name)
        told = facts[f"backend {name}"]
        if reason is not None:
            assert told == f"not available: {reason}"
        elif lacking := ops.available[name].lacking:
            assert told.startswith(f"works; no kernels for {', '.join(lacking)}, which the next one computes (")
        else:
            assert told == "works"
    assert facts["kernels for CUDA"] == native.describe_cuda()
    assert facts["default"] == "the fastest that works"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (lambda device: None, "Some card, 80 GiB"),
        (
            lambda device: f"no code for {device}",
            "Some card, 80 GiB; not for the native library's kernels: no code for cuda:0",
        ),
        (
            raising(ValueError("no")),
            "Some card, 80 GiB; whether it runs the native library's kernels cannot be told: no",
        ),
    ],
    ids=["works", "does not", "raises"],
)
def test_info_of_a_card(monkeypatch, asked, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = types.SimpleNamespace(name="Some card", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(native, "cuda_unavailable", asked)
    assert re.search(rf"(?m)^cuda:0 +{re.escape(told)}$", info.report())


def test_info_shows_the_environment_variable(monkeypatch):
    monkeypatch.setattr(ops, "default_name", "reference")
    assert info.report().splitlines()[-1].split(None, 1) == ["default", "reference (PMRL_KERNELS_BACKEND)"]


def line_of_info(label: str, **environment: str) -> str:
    """What ``python -m pmrl_kernels.info`` says there, in a process with these variables."""
    done = run_python("from pmrl_kernels import info; print(info.report())", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{label}  "))
    return line.removeprefix(label).strip()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("pass", "in float32"),
        ("torch.set_float32_matmul_precision('highest')", "in float32"),
        ("torch.set_float32_matmul_precision('high')", "may be in tf32 on CPUs, tf32 on GPUs, where contrasts are"),
        ("torch.set_float32_matmul_precision('medium')", "may be in bf16 on CPUs, tf32 on GPUs, where contrasts are"),
        ("torch.backends.fp32_precision = 'tf32'", "may be in tf32 on CPUs, tf32 on GPUs, where contrasts are"),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "may be in bf16 on CPUs, where contrasts are"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "may be in tf32 on GPUs, where contrasts are"),
        ("torch.backends.fp32_precision = 'ieee'", "in float32"),
    ],
)
def test_info_shows_how_float32_matrices_are_multiplied(setting, told):
    """A setting of the process, so of one that makes it and asks."""
    done = run_python(f"import torch; {setting}; from pmrl_kernels import info; print(info.report())")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("float32 products  "))
    line = line.removeprefix("float32 products").strip()
    assert line.startswith(told)
    assert line == "in float32" or line.endswith("less exact, and joint scores by cosine and mip (docs/contract.md)")


def test_info_remarks_on_an_unknown_name_in_the_environment():
    """Every call without ``backend=`` then raises."""
    told = line_of_info("default", PMRL_KERNELS_BACKEND="nonsense")
    assert told.startswith("nonsense (PMRL_KERNELS_BACKEND), unknown: wanted one of ")
    assert all(repr(name) in told for name in ops._PREFERENCE)


def test_info_remarks_on_a_name_in_the_environment_that_is_not_available(monkeypatch):
    monkeypatch.setattr(ops, "default_name", "native")
    monkeypatch.setattr(ops, "available", {"reference": ops.available["reference"]})
    monkeypatch.setattr(ops, "unavailable_reasons", {"native": "no compiler was found"})
    line = info.report().splitlines()[-1]
    assert line.split(None, 1) == ["default", "native (PMRL_KERNELS_BACKEND), not available: no compiler was found"]


@pytest.mark.parametrize(
    ("sums", "told"),
    [
        ("float64", "float64 (PMRL_KERNELS_SUMS)"),
        ("float32", "float32 (PMRL_KERNELS_SUMS)"),
        ("bf16", "bf16 (PMRL_KERNELS_SUMS), unknown: wanted one of 'float64', 'float32'"),
    ],
)
def test_info_shows_how_gpus_are_to_sum(sums, told):
    assert line_of_info("sums on GPUs", PMRL_KERNELS_SUMS=sums) == told


INTO = """
import io, runpy, sys
import torch
import pmrl_kernels

class Silent:
    def write(self, text):
        self.text = text
    def flush(self):
        pass

for stream in (None, io.StringIO(), Silent(), io.TextIOWrapper(io.BytesIO(), "ascii")):
    sys.stdout = stream
    runpy.run_module("pmrl_kernels.info", run_name="__main__")
assert b"default" in stream.buffer.getvalue()
"""


def test_info_into_whatever_stands_for_the_screen():
    """None, as in a program without a console; streams that have no encoding; a terminal of ASCII."""
    done = run_python(INTO)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_info_to_someone_who_stops_reading():
    """As ``| head -1`` does; here before there is anything to read."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pmrl_kernels.info"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_info_of_backends_that_cannot_be_asked(monkeypatch):
    """Describing what is broken is what it is for."""
    monkeypatch.setattr(native, "describe", raising(OSError("no such disk")))
    monkeypatch.setattr(triton, "version", raising(ValueError("no such version")))
    report = info.report()
    assert re.search("(?m)^native library +cannot be told: no such disk$", report)
    assert re.search("(?m)^kernels for CUDA +cannot be told: no such disk$", report)
    assert re.search("(?m)^triton +(cannot be told: no such version|not installed)$", report)
