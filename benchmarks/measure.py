"""How time and memory are measured: an idle machine, contenders that take turns, medians."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pmrl_kernels.ops import native

ROOT = Path(__file__).parents[1]

# A machine is called busy beyond any of these.
LOAD_PER_CORE = 0.5  # load average over the last minute
LEAST_SHARE = 0.95  # processor time over wall time x threads, all threads at work
MOST_JITTER = 1.25  # median over minimum of one and the same product
SPIN_SECONDS = 1.0

SLOW = 0.3  # seconds; calls that take longer are repeated less
TURN_SECONDS = 0.002  # as long as a contender's turn lasts at least, the call outside the clock apart
LEAST_ROUNDS, MOST_ROUNDS = 7, 300
LEAST_SLOW_ROUNDS = 3


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
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def conditions(threads: int, reasons: list[str], load: float) -> dict[str, Any]:
    """What a reader needs to judge the numbers by."""
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


# ------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Of one contender's calls: median and quartiles."""

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int


def _seconds(call: Callable[[], object], times: int = 1) -> float:
    """The mean of ``times`` calls, one after the other."""
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    seconds = (time.perf_counter() - start) / times
    del result  # what the last one returns is freed outside the clock, as the others are within
    return seconds


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, turn_seconds: float = TURN_SECONDS, seed: int = 0
) -> dict[str, Timing]:
    """Times calls that take turns, so that a busy moment hits all of them alike.

    A turn is as many calls as fill ``turn_seconds``, after one outside the clock: quick calls are timed as in
    a loop of their own. With 0 it is a single call, right after another contender's: caches are cold then, and
    threads asleep.
    ``seconds`` are shared out equally, so a fast contender has more rounds than a slow one; the rounds of
    each are spread over the whole time, and the order within a round is drawn anew.
    """
    rounds: dict[str, int] = {}
    length: dict[str, int] = {}
    warms_up: dict[str, bool] = {}
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        call()  # warms up
        estimate = _seconds(call)
        times[name] = [estimate] if estimate > SLOW else []
        if estimate <= SLOW:
            estimate = min(estimate, _seconds(call), _seconds(call))
        length[name] = max(1, round(turn_seconds / estimate))
        warms_up[name] = turn_seconds > 0 and estimate <= SLOW
        cost = estimate * (length[name] + warms_up[name])
        least = LEAST_SLOW_ROUNDS if estimate > SLOW else LEAST_ROUNDS
        rounds[name] = min(max(int(seconds / len(calls) / cost), least), MOST_ROUNDS)
    total, generator = max(rounds.values()), random.Random(seed)
    for turn in range(total):
        now = [name for name in calls if (turn + 1) * rounds[name] // total > turn * rounds[name] // total]
        generator.shuffle(now)
        for name in now:
            if len(times[name]) < rounds[name]:
                if warms_up[name]:
                    calls[name]()
                times[name].append(_seconds(calls[name], length[name]))
    summary = {}
    for name, samples in times.items():
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        summary[name] = Timing(1e3 * median, 1e3 * low, 1e3 * high, len(samples))
    return summary


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


def peak_memory(contender: str, case: tuple[Any, ...]) -> float:
    """MiB by which a fresh process grows at its peak during one forward + backward, gradients included."""
    command = (sys.executable, str(Path(__file__).with_name("peak_memory.py")), contender, *map(str, case[:3]))
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit status {result.returncode}")
    return float(result.stdout.strip().splitlines()[-1])


def available_memory() -> float:
    """MiB the system could give, infinite where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return float("inf")
