"""Everything to be known about the package on a GPU, by one command: tests, then the benchmark.

    python benchmarks/gpu_check.py              # at most eight minutes; needs torch, triton, numpy, pytest, tqdm
    python benchmarks/gpu_check.py --dry-run    # on the CPU, kernels interpreted, at toy sizes

Runs in the checkout, with the Python that runs it: nothing is installed or downloaded. A step that fails does not keep
the next from running, but makes the whole fail. What was printed and measured goes to --output.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480.0  # seconds for everything


def steps(dry: bool, output: Path) -> dict[str, tuple[list[str], float]]:
    """Commands by name, and the most seconds of each."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=30", "--durations=10"]
    parallel = ["-n", "auto"] if importlib.util.find_spec("xdist") and not dry else []
    where, share = ("cpu", "100") if dry else ("cuda", "5")
    contract = [*pytest, *parallel, "tests/test_contract.py", "-k", f"triton and {where}", "--one-in", share]
    return {
        "facts": (["-m", "pmrl_kernels.info"], 60),
        "gpu": ([*pytest, "tests/test_gpu.py"], 150),
        "benchmark": (["benchmarks/gpu.py", "--output", str(output), *(["--dry-run"] if dry else [])], 240),
        "contract": (contract, 180),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, kernels interpreted, at toy sizes")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "gpu-check", help="folder for logs and results"
    )
    parser.add_argument("--only", nargs="+", default=None, help="names of steps")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # PyTorch wants it where tests forbid what is not deterministic
    if options.dry_run:
        environment["TRITON_INTERPRET"] = "1"
    begin, failed = time.monotonic(), []
    for name, (command, most) in steps(options.dry_run, options.output.resolve()).items():
        if options.only and name not in options.only:
            continue
        left = LIMIT - (time.monotonic() - begin)
        print(f"== {name}", flush=True)
        with (options.output / f"{name}.log").open("w") as log:
            start = time.monotonic()
            try:
                done = subprocess.run(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, min(left, most)),
                )
                status = done.returncode
            except subprocess.TimeoutExpired:
                status = 124
        text = (options.output / f"{name}.log").read_text()
        print("\n".join(text.splitlines()[-60:]))
        print(
            f"== {name}: {'passed' if status == 0 else f'FAILED ({status})'}, {time.monotonic() - start:.0f} s\n",
            flush=True,
        )
        if status:
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'nothing'}; {time.monotonic() - begin:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
