"""Everything to be known about the package on a GPU, by one command: tests, the benchmark, and on demand the rest.

    python benchmarks/gpu_check.py                            # at most eight minutes, see DEFAULT
    python benchmarks/gpu_check.py --only fused benchmark contrasts --limit 590  # first of all: what has not run yet
    python benchmarks/gpu_check.py --only contrasts tune counters host  # and launch parameters, the hardware's counters
    python benchmarks/gpu_check.py --only tune-contrasts      # sizes of tiles, loads under way and forms of contrasts
    python benchmarks/gpu_check.py --only contract --one-in 1 --limit 590
    python benchmarks/gpu_check.py --only gpu memcheck racecheck initcheck synccheck --limit 590
    python benchmarks/gpu_check.py --only wheel --wheel dist/*.whl    # a wheel of another machine
    python benchmarks/gpu_check.py --dry-run                  # on the CPU, kernels interpreted, at toy sizes

Needs torch, triton, numpy, pytest and tqdm; pytest-xdist makes the contract many times faster. Runs in the checkout,
with the Python that runs it: nothing is installed or downloaded. A step that fails does not keep the next from running,
but makes the whole fail. One that takes too long is interrupted, and tells what has failed so far. What was printed and
measured goes to --output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT = "{seconds left}"
DEFAULT = ("facts", "fused", "gpu", "benchmark", "contract")
SHOWN = 60  # last lines of a step that are printed; all of them are in the log
LAST_WORDS = 20.0  # seconds, of those that a step may take, for it to end in when it is interrupted; at least 5
SANITIZED = "odd_sizes"
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
OUR_KERNELS = (
    r"regex:^((gram|solve|vectors|forward|reduce|backward)_kernel|(forward|stream|vectors|backward)_\d\w*|total)$"
)


class Step(NamedTuple):
    arguments: list[str]
    """Of Python. LEFT stands for the seconds it may take."""
    most: float
    """Seconds."""
    under: tuple[str, ...] = ()
    """A program that runs Python and looks on."""
    settings: tuple[tuple[str, str], ...] = ()
    """Environment variables."""


def steps(options: argparse.Namespace) -> dict[str, Step]:
    """By name, in order."""
    dry = options.dry_run
    output = ["--output", str(options.output.resolve())]
    results = [*output, *(["--dry-run"] if dry else [])]
    # pytest-benchmark warns in every process that it does nothing there. (Without it, its name is nobody's.)
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    pytest = ["-m", "pytest", "-q", *plugins, "--tb=short", "--show-capture=stderr", "--maxfail=30", "--durations=10"]
    parallel = ["-n", "auto"] if importlib.util.find_spec("xdist") and not dry else []
    where, share = ("cpu", options.one_in or 100) if dry else ("cuda", options.one_in or 5)
    selected = ["-k", f"(triton or cuda-cuda) and {where} and not oracle", "--one-in", str(share)]
    fused = ["tests/triton/test_contrasts.py", "tests/triton/test_joint.py", *(["--every", "24"] if dry else [])]
    on_gpus = ["tests/triton/test_gpu.py", "tests/cuda/test_gpu.py", *(["--every", "2"] if dry else [])]
    sanitized = [*pytest, "tests/triton/test_gpu.py", "-k", SANITIZED]
    # Every tensor an allocation of its own, so that what lies beside it is no tensor's.
    apart = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)

    def checked(tool: str, *more: str) -> Step:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "20")
        return Step([*sanitized, *more], 300, command, apart)  # with kernels that the step gpu has compiled

    alone = len(options.only) == 1
    # What ends by itself when its time is over would leave nothing to those behind it.
    timed = len({"benchmark", "contrasts"} & set(options.only))
    timing = 260 if "contract" in options.only else options.limit / max(1, timed)
    sections = tuple(word for section in SECTIONS for word in ("--section", section))
    return {
        "facts": Step(["-m", "pmrl_kernels.info"], 60),
        "fused": Step([*pytest, *parallel, *fused], options.limit if dry or alone else 150),
        "gpu": Step([*pytest, *parallel, *on_gpus], options.limit if dry or alone else 180),
        "benchmark": Step(["benchmarks/gpu.py", *results, "--limit", LEFT], timing),
        "contrasts": Step(["benchmarks/gpu_contrast.py", *results, "--limit", LEFT], timing),
        "tune": Step(["benchmarks/tune.py", *results], options.limit),
        "tune-contrasts": Step(["benchmarks/tune_contrast.py", *results], options.limit),
        "counters": Step(
            ["benchmarks/gpu.py", "--once", "65536", "512", "4"],
            120,
            ("ncu", "--clock-control", "none", "-k", OUR_KERNELS, *sections),
        ),
        "latency-counters": Step(
            ["benchmarks/gpu.py", "--once", "256", "512", "4"],
            120,
            ("ncu", "--clock-control", "none", "-k", OUR_KERNELS, *sections),
        ),
        "host": Step(["benchmarks/host.py", *output, *(["--quick"] if dry else [])], 60),
        "wheel": Step(["tests/tools/environments.py", str(options.wheel)], 120),
        "memcheck": checked("memcheck"),
        "racecheck": checked("racecheck"),
        "initcheck": checked("initcheck", "--unpoisoned"),
        "synccheck": checked("synccheck"),
        "contract": Step([*pytest, *parallel, "tests/contract", *selected], options.limit),
    }


def run(step: Step, seconds: float, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status, 124 for one that took too long, and what was printed."""
    # A step that keeps to a limit itself has a last call to end, and a report to print.
    arguments = [str(max(1, int(0.85 * seconds))) if word == LEFT else word for word in step.arguments]
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's job in the background would pass on that it is deaf
    process = subprocess.Popen(
        [*step.under, sys.executable, *arguments],
        cwd=ROOT,
        env={**environment, **dict(step.settings)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        begun = max(0.9 * seconds, seconds - LAST_WORDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            text = process.communicate(timeout=begun)[0]
            return process.returncode, text
        process.send_signal(signal.SIGINT)  # pytest then says which tests have failed, and why
        with contextlib.suppress(subprocess.TimeoutExpired):
            return 124, process.communicate(timeout=max(5.0, seconds - begun))[0] + f"\ninterrupted after {begun:.0f} s"
    finally:
        _end(process)
    return 124, process.communicate()[0] + f"\nstopped after {seconds:.0f} s"


def _end(process: subprocess.Popen[str]) -> None:
    """And whatever it has started, which would keep the device busy in the next step."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, kernels interpreted, at toy sizes")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "gpu-check", help="folder for the log and results"
    )
    parser.add_argument("--only", nargs="+", default=DEFAULT, help="names of steps")
    parser.add_argument("--one-in", type=int, help="of the contract, one test in so many; default: 5")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--wheel", type=Path, default=None, help="for the step of that name")
    options = parser.parse_args()
    chosen = steps(options)
    if unknown := set(options.only) - chosen.keys():
        parser.error(f"--only: got {sorted(unknown)}, wanted some of {list(chosen)}")
    if "wheel" in options.only and not (options.wheel and options.wheel.exists()):
        parser.error(f"--wheel: got {options.wheel}, wanted a wheel (`make wheel` makes one)")
    options.output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # PyTorch wants it where tests forbid what is not deterministic
    if options.dry_run:
        environment["TRITON_INTERPRET"] = "1"
    begin, failed, left_out = time.monotonic(), [], []
    with (options.output / "gpu-check.log").open("w") as log:
        for name in (name for name in chosen if name in options.only):
            step, start = chosen[name], time.monotonic()
            print(f"== {name}", flush=True)
            if step.under and shutil.which(step.under[0]) is None:
                left_out.append(name)
                print(f"== {name}: not run, {step.under[0]} is not here\n", flush=True)
                continue
            status, text = run(step, max(1.0, min(options.limit - (start - begin), step.most)), environment)
            verdict = f"{'passed' if status == 0 else f'FAILED ({status})'}, {time.monotonic() - start:.0f} s"
            log.write(f"== {name}: {verdict}\n{text}\n")
            log.flush()
            print("\n".join(text.splitlines()[-SHOWN:]))
            print(f"== {name}: {verdict}\n", flush=True)
            if status:
                failed.append(name)
    print(f"failed: {', '.join(failed) or 'nothing'}; ", end="")
    print(f"not run: {', '.join(left_out)}; " if left_out else "", f"{time.monotonic() - begin:.0f} s in all", sep="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
