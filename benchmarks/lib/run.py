"""How a run begins and ends: arguments, a machine that is idle, conditions to go beside the numbers, files."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pmrl_kernels.ops import native

BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results"

# A machine is called busy beyond any of these.
LOAD_PER_CORE = 0.5  # load average over the last minute
LEAST_SHARE = 0.95  # processor time over wall time x threads, all threads at work
MOST_JITTER = 1.25  # median over minimum of one and the same product
SPIN_SECONDS = 1.0


# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------


def parser(
    doc: str,
    *,
    output: str = "folder for the results",
    quick: str | None = None,
    dry_run: str | None = None,
    force: bool = False,
) -> argparse.ArgumentParser:
    """Of a command with this docstring: --output, and those of the others that it has a use for."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help=output)
    if quick is not None:
        made.add_argument("--quick", action="store_true", help=quick)
    if dry_run is not None:
        made.add_argument("--dry-run", action="store_true", help=dry_run)
    if force:
        made.add_argument("--force", action="store_true", help="measure on a busy machine too, and record it")
    return made


def progress(total: int, what: str | None = None) -> tqdm:
    """On stderr, gone when it is through: stdout is the report's."""
    return tqdm(total=total, desc=what, leave=False, file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# Conditions
# ------------------------------------------------------------------------------------------------


def load_average() -> float:
    return os.getloadavg()[0]


def busy(threads: int) -> list[str]:
    """What else this machine seems to be doing; empty if nothing. Takes about a second."""
    reasons = []
    cores = os.cpu_count() or 1
    if load_average() > LOAD_PER_CORE * cores:
        reasons.append(f"its load average is {load_average():.1f} on {cores} cores")
    A = torch.randn(512, 512)
    times: list[float] = []
    torch.mm(A, A)
    wall, processor = time.perf_counter(), time.process_time()
    while time.perf_counter() < wall + SPIN_SECONDS:
        start = time.perf_counter()
        torch.mm(A, A)
        times.append(time.perf_counter() - start)
    share = (time.process_time() - processor) / ((time.perf_counter() - wall) * threads)
    jitter = statistics.median(times) / min(times)
    if share < LEAST_SHARE:
        reasons.append(f"{threads} busy threads got {share:.0%} of the time of as many cores")
    if jitter > MOST_JITTER:
        reasons.append(f"the same product takes {jitter:.1f} times its least time, by the median")
    return reasons


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this checkout, "+dirty" if anything but results differs from it."""

    def git(*arguments: str) -> str:
        command = ("git", *arguments)
        return subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def free_something_large() -> None:
    """As any training has: from then on glibc keeps up to twice as much freed memory for the next call.

    Where nothing larger than a gradient was ever freed, it hands their pages back to the system after each call, and
    the next one takes as long to get them again as to compute: forward + backward at (1024, 512, 3) then took up to
    1.2 ms instead of 0.36 (AMD EPYC, AVX-512, 2 threads).
    """
    torch.empty(28 << 20, dtype=torch.uint8)  # glibc heeds nothing beyond 32 MiB


def on_a_cpu(force: bool, threads: int | None = None) -> dict[str, Any]:
    """Begins a run: what a reader judges its numbers by. Leaves the process on a busy machine, unless forced."""
    if threads is not None:
        torch.set_num_threads(threads)
    load, threads = load_average(), torch.get_num_threads()
    reasons = busy(threads)
    if reasons and not force:
        sys.exit(f"This machine is busy: {'; '.join(reasons)}. Wait, or pass --force.")
    free_something_large()
    facts = native.build_info
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "native_isa": facts.get("isa") or "none",
        "native_compiler": facts.get("compiler", "none"),
        "commit": commit(),
        "load": round(load, 2),
        "busy": reasons,
        "forced": bool(reasons),
    }


def on_a_gpu(device: str) -> dict[str, Any]:
    """The same there, where nobody else is; ``device`` is "cpu" in a rehearsal."""
    import triton

    facts = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if device == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "hip": torch.version.hip}
        facts |= {"driver": _driver()}
    return facts | {"commit": commit()}


def _driver() -> str:
    """Of NVIDIA's cards, as their own tool says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found[0] if found else "unknown"


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def write_json(results: Mapping[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return path


def write_csv(results: Mapping[str, Any], columns: Sequence[str], path: Path) -> Path:
    """The rows of results["time"], below the conditions as comments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: Iterable[Mapping[str, Any]] = results["time"]
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in results["conditions"].items())
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path
