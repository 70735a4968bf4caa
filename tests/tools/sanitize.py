"""The kernels' tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

Of what is for CUDA it is the host's half, as tests/tools/cuda_door.py compiles it.

With --every N, one in N of them on one instruction set, which ones by --seed: compiling all is half of a run.

Builds in build/sanitize and lays the package out anew in build/sanitize/checkout, tests and sources beside it. What a
test or a process that it starts imports there is the sanitized build; the checkout's own stays as it is.

Any finding ends the process that made it, with a report on stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
COPY = BUILD / "checkout"
SOLVERS = ["tests/native/test_solvers.py", "tests/native/test_elementary.py"]
DOOR_FLAGS = (  # as CMakeLists.txt has them
    "-fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow,vptr -fno-sanitize-recover=undefined "
    "-fno-omit-frame-pointer -g1 -Og"
)


def build(isas: list[str]) -> None:
    settings = {
        "PMRL_ISAS": ";".join(isas),
        "PMRL_SANITIZE": "ON",
        "PMRL_NUMERICS": "ON",
        "PMRL_CUDA": "OFF",  # no sanitizer of these sees what runs on a card; its host's half has a door of its own
        "PMRL_TORCH_ROOT": os.path.realpath(torch.__path__[0]),
        "PMRL_TORCH_VERSION": torch.__version__,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD, *defined], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", BUILD], check=True)


def drawn(seed: str) -> str:
    """One of the instruction sets that this processor has; the next seed may draw another."""
    capability = torch.backends.cpu.get_cpu_capability()
    isas = {"AVX512": ["baseline", "avx2", "avx512"], "AVX2": ["baseline", "avx2"]}.get(capability, ["baseline"])
    return isas[zlib.crc32(seed.encode()) % len(isas)]


def lay_out() -> None:
    shutil.rmtree(COPY, ignore_errors=True)
    ours = shutil.ignore_patterns("__pycache__", "*.so", "native_build.txt")
    for folder in ("pmrl_kernels", "csrc", "tests"):
        shutil.copytree(ROOT / folder, COPY / folder, ignore=ours)
    for file in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, COPY)
    for library in BUILD.glob("*.so"):
        code = library.read_bytes()
        for sanitizer in (b"__asan_load", b"__ubsan_handle"):
            if sanitizer not in code:
                sys.exit(f"{library}: wanted a sanitized library, but it makes no call to {sanitizer.decode()}*")
        shutil.copy(library, COPY / "pmrl_kernels")


def environment() -> dict[str, str]:
    """The interpreter is not sanitized, so what the sanitized library needs must be in the process from the start."""
    compiler = re.search(r"(?m)^CMAKE_CXX_COMPILER:\w+=(.*)$", (BUILD / "CMakeCache.txt").read_text())[1]
    preloaded = []
    # The second because AddressSanitizer looks for what throws exceptions when it starts, and Python has none of it.
    for name in ("libasan.so", "libstdc++.so.6"):
        asked = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            sys.exit(f"the sanitizers are GCC's here: wanted a compiler that has {name}, got {compiler}")
        preloaded.append(found)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PMRL_KERNELS_", "PYTHON"))}
    return {
        **inherited,
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch free little at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PMRL_DOOR_FLAGS": DOOR_FLAGS,
        "OMP_NUM_THREADS": "1",  # tests that want threads ask for them
    }


def run_tests(isa: str | None, options: list[str]) -> tuple[bool, str]:
    # Captured by file descriptor, pytest's default, a report would go down with the process.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", *options]
    variables = environment() | ({"PMRL_KERNELS_ISA": isa} if isa else {})
    done = subprocess.run(
        command, cwd=COPY, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    return done.returncode == 0, done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="one test in so many, on one instruction set")
    parser.add_argument("--seed", default="", help="which ones: any word, such as a commit")
    options = parser.parse_args()
    start = time.monotonic()
    build([drawn(options.seed)] if options.every > 1 else [])
    lay_out()
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    asked = "from pmrl_kernels import _numerics; print(_numerics.__file__, *_numerics.runs_here())"
    told = subprocess.run(
        [sys.executable, "-c", asked], cwd=COPY, env=environment(), check=True, capture_output=True, text=True
    )
    module, scalar, *isas = told.stdout.split()
    if COPY not in Path(module).parents:
        sys.exit(f"wanted to test what is in {COPY}, got {module}")

    # Of the solvers, the many matrices of order 31 and 32 take most of the time: one instruction set has the latter.
    solvers = f"not 31- and (not 32- or {scalar} or {isas[0]})"
    jobs = {"solvers": (None, [*SOLVERS, "-k", solvers])}
    jobs["cuda, the host"] = (None, ["tests/cuda/test_operators.py", "-k", "not opcheck", "-m", "not slow"])
    for isa in isas:
        # The other instruction sets, which some tests start processes for, have their turn here.
        chosen = ["-m", "not slow", "-k", "native and not every_instruction_set"]
        sample = ["--every", str(options.every), f"--seed={options.seed}"]
        jobs[isa] = (
            isa,
            ["tests/native", "tests/contract", *(f"--ignore={name}" for name in SOLVERS), *chosen, *sample],
        )
    failed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(run_tests, *job): name for name, job in jobs.items()}
        for future in as_completed(running):
            passed, output = future.result()
            name, last = running[future], output.splitlines()[-1] if output else "no output"
            print(f"{name}: {last}" if passed else f"{output}\n{name}: FAILED", flush=True)
            failed += [] if passed else [name]
    print(f"{time.monotonic() - start:.0f} s in all")
    if failed:
        sys.exit(f"the sanitizers or the tests found something: {', '.join(failed)}")


if __name__ == "__main__":
    main()
