"""Everything to be known about the package on a GPU, by one command: tests, the benchmark, and on demand the rest.

    python benchmarks/gpu_check.py                            # at most eight minutes, see DEFAULT
    python benchmarks/gpu_check.py --kernels kernels.tar.xz   # the same with what tests/tools/ahead.py has compiled
    python benchmarks/gpu_check.py --only benchmark contrasts tune counters host  # and the hardware's counters
    python benchmarks/gpu_check.py --only tune-contrasts      # sizes of tiles and loads under way of contrasts
    python benchmarks/gpu_check.py --only contract --one-in 1 --limit 590
    python benchmarks/gpu_check.py --only memcheck racecheck initcheck synccheck --limit 590
    python benchmarks/gpu_check.py --only wheel --wheel dist/*.whl    # a wheel of another machine
    python benchmarks/gpu_check.py --dry-run                  # on the CPU, kernels interpreted, at toy sizes

Needs torch, triton, numpy, pytest and tqdm; pytest-xdist makes the tests many times faster. Runs in the checkout, with
the Python that runs it: nothing is installed or downloaded. Tests and sanitizers run side by side, and meanwhile the
benchmarks have their rivals compiled; then each of these runs alone. A step that fails does not keep the next from
running, but makes the whole fail. One that takes too long is interrupted, and tells what has failed so far. What was
printed and measured goes to --output.
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
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CUE = "{file}"
TESTS = {"fused": 2, "gpu": 4, "contract": 3, "contract-cuda": 2}  # and their shares of the cores
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
DEFAULT = ("facts", *TESTS, "memcheck", "racecheck", "synccheck", "benchmark", "contrasts")
SHOWN = 60  # last lines of a step that are printed; all of them are in the log
LAST_WORDS = 20.0  # seconds, of those that a step may take, for it to end in when it is interrupted; at least 5
READY = 60.0  # seconds to wait for benchmarks that are in the middle of compiling something
SANITIZED = "odd_sizes"
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
OUR_KERNELS = (
    r"regex:^((gram|solve|vectors|forward|reduce|backward)_kernel|(forward|stream|vectors|backward)_\d\w*|total)$"
)


class Step(NamedTuple):
    arguments: list[str]
    """Of Python. CUE stands for a file that will hold the time by which it has to end, when it is its turn."""
    share: float
    """Of the time that is left, beside those of steps to come. Those that run side by side have one together."""
    beside: bool = False
    """Whether it may run beside others, since nothing is timed."""
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
    xdist = importlib.util.find_spec("xdist") is not None and not dry
    parallel = {name: ["-n", str(workers(name, options.only))] if xdist else [] for name in TESTS}
    fused = ["tests/triton/test_contrasts.py", "tests/triton/test_joint.py", *(["--every", "24"] if dry else [])]
    on_gpus = ["tests/triton/test_gpu.py", "tests/cuda/test_gpu.py", *(["--every", "4"] if dry else [])]
    # On a CPU the operators for CUDA run behind a door of tests/tools, with an interpreter of PTX.
    where, behind = ("cpu", ["-p", "tests.tools.cuda_door"]) if dry else ("cuda", [])
    every = str(2000 if dry else options.one_in or 24)
    share = options.one_in or (100 if dry else 32)
    contract = ["-k", f"triton and {where} and not oracle", "--one-in", str(share), "tests/contract"]
    of_cuda = [*behind, "--every", every, "tests/contract", "-k", f"cuda-{where} and not oracle"]
    if (names := names_beside(options.kernels)) is not None:
        contract = names.read_text().split("\n")[:-1]
    sanitized = [*pytest, "tests/triton/test_gpu.py", "-k", SANITIZED]
    # Every tensor an allocation of its own, so that what lies beside it is no tensor's.
    apart = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)

    def checked(tool: str, *more: str) -> Step:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "20")
        return Step([*sanitized, *more], 1.0, True, command, apart)

    timed = [*results, "--on-cue", CUE]
    # While tests run beside it PyTorch's compiler is not to take all cores, as it would.
    modest = (("TORCHINDUCTOR_COMPILE_THREADS", "2"),)
    if options.kernels is not None:
        timed += ["--compiled"]
    sections = tuple(word for section in SECTIONS for word in ("--section", section))
    counting = ("ncu", "--clock-control", "none", "-k", OUR_KERNELS, *sections)
    return {
        "facts": Step(["-m", "pmrl_kernels.info"], 0.1),
        "fused": Step([*pytest, *parallel["fused"], *fused], 1.0, True),
        "gpu": Step([*pytest, *parallel["gpu"], *on_gpus], 1.0, True),
        "contract": Step([*pytest, *parallel["contract"], *contract], 1.0, True),
        "contract-cuda": Step([*pytest, *parallel["contract-cuda"], *of_cuda], 1.0, True),
        "memcheck": checked("memcheck"),
        "racecheck": checked("racecheck"),
        "initcheck": checked("initcheck", "--unpoisoned"),
        "synccheck": checked("synccheck"),
        "wheel": Step(["tests/tools/environments.py", str(options.wheel)], 0.5),
        "benchmark": Step(["benchmarks/gpu.py", *timed], 1.0, settings=modest),
        "contrasts": Step(["benchmarks/gpu_contrast.py", *timed], 0.5, settings=modest),
        "tune": Step(["benchmarks/tune.py", *results], 1.0),
        "tune-contrasts": Step(["benchmarks/tune_contrast.py", *results], 1.0),
        "counters": Step(["benchmarks/gpu.py", "--once", "65536", "512", "4"], 0.5, under=counting),
        "latency-counters": Step(["benchmarks/gpu.py", "--once", "256", "512", "4"], 0.5, under=counting),
        "host": Step(["benchmarks/host.py", *output, *(["--quick"] if dry else [])], 0.25),
    }


def workers(step: str, chosen: Sequence[str]) -> int:
    """Processes for a step of tests: its share of the cores that sanitizers and benchmarks that wait leave."""
    left = (os.cpu_count() or 1) - sum(name in (*SANITIZERS, "benchmark", "contrasts") for name in chosen)
    return max(1, left * TESTS[step] // max(1, sum(share for name, share in TESTS.items() if name in chosen)))


# ------------------------------------------------------------------------------------------------
# Kernels compiled ahead
# ------------------------------------------------------------------------------------------------


def names_beside(archive: Path | None) -> Path | None:
    """The names of tests of the contract that tests/tools/ahead.py has written, if it has."""
    names = None if archive is None else archive.with_suffix(".txt")
    return names if names is not None and names.exists() else None


def unpack(archive: Path) -> Path:
    """Where its files are then, which have their whole paths: a cache of Triton's."""
    cache = None
    with tarfile.open(archive, "r|*") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.10.12 and later have it
        for member in tar:
            folder = Path("/", member.name).parent.parent
            cache = cache or folder
            if folder != cache or not member.isfile():
                sys.exit(f"--kernels: got {archive} with {member.name}, wanted files of one cache alone, {cache}")
            tar.extract(member, "/")
    if cache is None:
        sys.exit(f"--kernels: got {archive} with nothing in it")
    return cache


# ------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------


class Running:
    """A step's process. What it prints goes to a file, ``{name}.running`` of a folder, while it runs."""

    def __init__(self, name: str, step: Step, environment: Mapping[str, str], folder: Path) -> None:
        self.path = folder / f"{name}.running"
        self.cue = folder / f"{name}.cue"
        # A shell's job in the background would pass on that it is deaf.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.began = time.monotonic()
        with self.path.open("w") as out:
            self.process = subprocess.Popen(
                [*step.under, sys.executable, *(str(self.cue) if word == CUE else word for word in step.arguments)],
                cwd=ROOT,
                env={**environment, **dict(step.settings)},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def hush(self) -> None:
        """It is to end what it gets ready."""
        self._tell("")

    def begin(self, seconds: float) -> None:
        """It has so many, of which its last call and its report take some."""
        self.began = time.monotonic()
        self._tell(str(time.time() + 0.85 * seconds))

    def _tell(self, text: str) -> None:
        half = self.cue.with_suffix(".half")
        half.write_text(text)
        half.rename(self.cue)

    def quiet(self) -> bool:
        """Whether nothing of it runs that would keep the device busy."""
        return self.process.poll() is not None or self.cue.with_suffix(".ready").exists()

    def end(self) -> str:
        """With whatever it has started. What was printed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        text = self.path.read_text(errors="replace")
        for path in (self.path, self.cue, self.cue.with_suffix(".ready")):
            path.unlink(missing_ok=True)
        return text


def finish(running: Mapping[str, Running], seconds: float) -> dict[str, tuple[int, str, float]]:
    """By step: exit status, 124 for one that took too long, what was printed, and seconds."""
    told = max(0.9 * seconds, seconds - LAST_WORDS)
    begin, interrupted, found = time.monotonic(), set(), {}
    try:
        while left := [name for name in running if name not in found]:
            passed = time.monotonic() - begin
            for name in left:
                one = running[name]
                if one.process.poll() is not None or passed > told + max(5.0, seconds - told):
                    status = 124 if name in interrupted else one.process.returncode
                    text = one.end() + (f"\ninterrupted after {told:.0f} s" if name in interrupted else "")
                    found[name] = status, text, time.monotonic() - one.began
                elif passed > told and name not in interrupted:
                    interrupted.add(name)
                    one.process.send_signal(signal.SIGINT)  # pytest then says which tests have failed, and why
            time.sleep(0.05)
    finally:
        for name in running.keys() - found.keys():
            running[name].end()
    return found


def run(step: Step, seconds: float, environment: Mapping[str, str]) -> tuple[int, str]:
    """Alone: exit status and what was printed."""
    with tempfile.TemporaryDirectory() as folder:
        return finish({"one": Running("one", step, environment, Path(folder))}, seconds)["one"][:2]


class Report:
    """What the steps came to, printed and in a log."""

    def __init__(self, path: Path) -> None:
        self.begin, self.failed, self.left_out = time.monotonic(), [], []  # type: float, list[str], list[str]
        self.log = path.open("w")

    def add(self, found: Mapping[str, tuple[int, str, float]]) -> None:
        for name, (status, text, seconds) in found.items():
            verdict = f"{'passed' if status == 0 else f'FAILED ({status})'}, {seconds:.0f} s"
            self.log.write(f"== {name}: {verdict}\n{text}\n")
            self.log.flush()
            print("\n".join([f"== {name}", *text.splitlines()[-SHOWN:], f"== {name}: {verdict}\n"]), flush=True)
            if status:
                self.failed.append(name)

    def last(self) -> int:
        self.log.close()
        without = f"not run: {', '.join(self.left_out)}; " if self.left_out else ""
        seconds = f"{time.monotonic() - self.begin:.0f} s in all"
        print(f"failed: {', '.join(self.failed) or 'nothing'}; {without}{seconds}")
        return 1 if self.failed else 0


def run_all(chosen: Mapping[str, Step], limit: float, environment: Mapping[str, str], folder: Path) -> Report:
    """Those that may run beside others together, when it is the first one's turn, with those behind that wait for a
    cue; every other by itself."""
    report = Report(folder / "gpu-check.log")
    beside = [name for name, step in chosen.items() if step.beside]
    stages = [name for name in chosen if name not in beside[1:]]
    waiting: dict[str, Running] = {}

    def started(names: Iterable[str]) -> dict[str, Running]:
        return {name: Running(name, chosen[name], environment, folder) for name in names}

    try:
        for at, name in enumerate(stages):
            left = limit - (time.monotonic() - report.begin)
            seconds = max(1.0, left * chosen[name].share / sum(chosen[later].share for later in stages[at:]))
            if name in beside:
                waiting = started(name for name, step in chosen.items() if CUE in step.arguments)
                report.add(finish(started(beside), seconds))
                for one in waiting.values():
                    one.hush()
                begin = time.monotonic()
                while not all(one.quiet() for one in waiting.values()) and time.monotonic() < begin + READY:
                    time.sleep(0.2)
                continue
            one = waiting.pop(name, None) or started([name])[name]
            if CUE in chosen[name].arguments:
                one.begin(seconds)
            report.add(finish({name: one}, seconds))
    finally:
        for one in waiting.values():
            one.end()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, kernels interpreted, at toy sizes")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "gpu-check", help="folder for the log and results"
    )
    parser.add_argument("--only", nargs="+", default=DEFAULT, help="names of steps")
    parser.add_argument("--one-in", type=int, help="of the contract, one test in so many; default: 32, for CUDA 24")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--kernels", type=Path, help="compiled ahead by tests/tools/ahead.py: its archive")
    parser.add_argument("--wheel", type=Path, default=None, help="for the step of that name")
    options = parser.parse_args()
    known = steps(options)
    if unknown := set(options.only) - known.keys():
        parser.error(f"--only: got {sorted(unknown)}, wanted some of {list(known)}")
    if "wheel" in options.only and not (options.wheel and options.wheel.exists()):
        parser.error(f"--wheel: got {options.wheel}, wanted a wheel (`make wheel` makes one)")
    if options.kernels is not None and not options.kernels.exists():
        parser.error(f"--kernels: got {options.kernels}, wanted an archive that tests/tools/ahead.py has made")
    options.output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # PyTorch wants it where tests forbid what is not deterministic
    if options.dry_run:
        environment["TRITON_INTERPRET"] = "1"
    if options.kernels is not None:
        environment["TRITON_CACHE_DIR"] = str(unpack(options.kernels))
    chosen = {name: step for name, step in known.items() if name in options.only}
    missing = [name for name, step in chosen.items() if step.under and shutil.which(step.under[0]) is None]
    for name in missing:
        print(f"== {name}: not run, {chosen.pop(name).under[0]} is not here\n", flush=True)
    report = run_all(chosen, options.limit, environment, options.output.resolve())
    report.left_out += missing
    return report.last()


if __name__ == "__main__":
    sys.exit(main())
