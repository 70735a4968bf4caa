"""Other Python processes for Triton's kernels: interpreting and compiling exclude one another in one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests import ROOT


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


def run_tests(*arguments: str, **environment: str) -> int:
    """The number of tests that passed in another process; none may fail."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    done = run(*command, timeout=3600, **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def run_interpreted(*arguments: str) -> int:
    """As above, in Triton's interpreter."""
    return run_tests(*arguments, TRITON_INTERPRET="1")


def run_compiled(*arguments: str, **environment: str) -> int:
    """As above, on compiled kernels, whose PTX is interpreted."""
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # tests would put their tensors there
    return run_tests("-p", "tests.tools.ptx", *arguments, **no_gpu, **environment)
