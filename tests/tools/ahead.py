"""Compiles Triton's kernels for a GPU that is not here: what tests and benchmarks launch, into an archive of its cache.

    python tests/tools/ahead.py kernels.tar.xz                                # benchmarks, tuning, tests on a GPU
    python tests/tools/ahead.py kernels.tar.xz --only contract --one-in 8    # and one test in so many of the contract
    make gpu-check ARGS="--kernels kernels.tar.xz"                            # where the GPU is

A card that is lent by the minute need not wait for compilers then. Needs the Python, torch and Triton of that machine,
whose versions are in the names that Triton gives, and the tests' requirements; launches are recorded instead of made,
on CPU tensors, so of a test that looks at what it gets only those before that are. What was compiled for an earlier
archive is there still. The text of PTX in binaries, more than half of them, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import io
import lzma
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path("/tmp/kernels-ahead")  # a folder named as the package would hide it from programs beside it
KEPT = (".cubin", ".json", ".so")

Job = tuple[str, str, Any]
"""A kernel's module and name, and what it is compiled for."""

sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


# ------------------------------------------------------------------------------------------------
# Which
# ------------------------------------------------------------------------------------------------


def of_benchmarks(options: argparse.Namespace) -> None:
    import gpu
    import gpu_contrast

    def all_of(prepare: Callable[..., None], jobs: list[tuple[Any, ...]], *_: Any) -> None:
        for job in jobs:
            with contextlib.suppress(Exception):  # nothing is computed, so what comes next may refuse it
                prepare(*job)

    gpu.on_all_cores = all_of
    gpu.compile_ahead(gpu.work(gpu.contenders(False), False), "cpu")
    ours = [c.name for c in gpu_contrast.contenders(False) if gpu_contrast._of_ours(c)]
    shapes = [(B, gpu_contrast.D, gpu_contrast.K) for B in gpu_contrast.COMPILED_AHEAD]
    all_of(gpu_contrast._prepare, [(n, *s, "cpu") for s in (*gpu_contrast._gate_shapes("cuda"), *shapes) for n in ours])


def of_tuning(options: argparse.Namespace) -> None:
    import tune
    import tune_contrast

    from pmrl_kernels.ops.triton import runtime

    for sweep in tune_contrast.SWEEPS.values():
        for shape in sweep.shapes:
            for changes in ({}, *sweep.settings):
                with tune_contrast.planned(changes):
                    tune_contrast.step(shape, tune_contrast.vectors(shape, "cpu"))
    for family in tune.FAMILIES.values():
        for shape in family.shapes:
            for changes in ({}, *family.settings(shape)):
                case = tune.resources.Case("sm_90", family.call, shape.dtype, shape.k)
                with tune.planned(changes):
                    for one in tune.resources.launches(case, shape.d):
                        if one.kernel.fn.__name__ in family.kernels or not changes:
                            runtime.run(one)


def of_tests(options: argparse.Namespace) -> None:
    _tests("-m", "slow or not slow", *(f"tests/triton/test_{name}.py" for name in ("contrasts", "joint")))
    os.environ["PMRL_KERNELS_TESTS"] = "whole"
    _tests("tests/triton/test_gpu.py", "-k", "odd_sizes or layouts_and_sums_agree")


def of_contract(options: argparse.Namespace) -> None:
    """Those whose names, "cpu" being "cuda" there, go to ``{archive}.txt``, for pytest to be asked for."""
    chosen = ("tests/contract", "-k", "triton and cpu and not oracle", "--one-in", str(options.one_in), "--every-k")
    names = _tests(*chosen, "--seed", options.seed)
    text = "".join(f"{name.replace('-cpu', '-cuda', 1)}\n" for name in names)
    options.archive.with_suffix(".txt").write_text(text)


class _Names:
    """What pytest has run."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "setup":
            self.found.append(report.nodeid)


def _tests(*arguments: str) -> list[str]:
    import pytest

    names = _Names()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=no", *arguments], plugins=[names])
    return names.found


WHICH = {"benchmarks": of_benchmarks, "tuning": of_tuning, "tests": of_tests, "contract": of_contract}


def record(options: argparse.Namespace, to: Path) -> None:
    """All launches of one of these, those that come most often first."""
    os.environ["TRITON_INTERPRET"] = "1"  # so that the backend takes tensors on a CPU
    import pmrl_kernels  # noqa: F401 - reads that

    del os.environ["TRITON_INTERPRET"]  # before Triton does, so that kernels are those of a GPU
    from pmrl_kernels.ops.triton import runtime

    found: dict[Job, int] = {}

    def note(launch: Any) -> None:
        key = launch.kernel.fn.__module__, launch.kernel.fn.__name__, launch.compilation()
        if key[0].startswith("pmrl_kernels"):  # and not a test
            found[key] = found.get(key, 0) + 1

    runtime.run = note
    WHICH[options.record](options)
    to.write_bytes(pickle.dumps(sorted(found, key=lambda key: -found[key])))


# ------------------------------------------------------------------------------------------------
# Compiling
# ------------------------------------------------------------------------------------------------


def stand_in(folder: Path) -> None:
    """The driver of tests/tools/libcuda.c there, for what launches kernels to be linked with. Which has to say that it
    needs the driver, or cannot be loaded where there is one."""
    from tests.tools.driver import compile_driver

    compile_driver(folder / "libcuda.so.1")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


def compiled(job: Job, architecture: int) -> str | None:
    """Into Triton's cache, what launches it too; what went wrong, if anything. In a process for whose parent there is a
    driver's stand-in."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    from pmrl_kernels.ops.triton import runtime

    module, name, compilation = job
    try:
        ctypes.CDLL(str(Path(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1")))  # found by its name from now on
        kernel = getattr(importlib.import_module(module), name)
        made = runtime.compile_for(GPUTarget("cuda", architecture, 32), kernel, compilation)
        driver.CudaUtils()
        if hasattr(driver, "make_launcher"):  # Triton 3.6: for each signature; 3.9's utilities launch all
            driver.CudaLauncher(made.src, made.metadata)
    except Exception as error:  # whatever a compiler throws: tests launch what has to fail, too
        return f"{name}: {type(error).__name__}: {str(error).strip()[:200]}"
    return None


def compile_all(jobs: list[Job], options: argparse.Namespace) -> list[str]:
    """Until time is over; what could not be."""
    said, end, todo = [], time.monotonic() + options.seconds, iter(jobs)
    pool = ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"))
    running: set[Future[str | None]] = set()
    with pool, tqdm(total=len(jobs), desc="compiling", file=sys.stderr) as progress:
        while True:
            while len(running) < 2 * options.jobs and time.monotonic() < end and (job := next(todo, None)) is not None:
                running.add(pool.submit(compiled, job, options.architecture))
            if not running:
                return said
            done, running = wait(running, return_when=FIRST_COMPLETED)
            progress.update(len(done))
            said += [text for one in done if (text := one.result())]


# ------------------------------------------------------------------------------------------------
# Packing
# ------------------------------------------------------------------------------------------------


def sections(elf: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each section that is in the file."""
    (at,) = struct.unpack_from("<Q", elf, 0x28)
    size, number, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, at + i * size) for i in range(number)]
    for name, kind, _, _, offset, length in headers:
        begin = headers[names][4] + name
        if kind != 8:  # SHT_NOBITS
            yield elf[begin : elf.index(b"\0", begin)].decode(), offset, length


def packed(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    if path.suffix == ".cubin":
        for name, offset, length in list(sections(bytes(content))):
            if name.startswith(".nv_debug_ptx_txt"):
                content[offset : offset + length] = bytes(length)
    return bytes(content)


def pack(cache: Path, archive: Path) -> int:
    files = [path for path in cache.glob("*/*") if path.suffix in KEPT]
    files.sort(key=lambda path: (path.suffix, path.name, path.stat().st_size))  # alike beside alike
    with lzma.open(archive, "wb", preset=4) as to, tarfile.open(fileobj=to, mode="w|") as tar:
        for path in tqdm(files, "packing", file=sys.stderr):
            content = packed(path)
            entry = tarfile.TarInfo(str(path.relative_to("/")))
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    return len(files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--only", nargs="+", choices=WHICH, default=["benchmarks", "tests", "tuning"])
    parser.add_argument("--one-in", type=int, default=32, help="of the contract")
    parser.add_argument("--seed", default="", help="of its tests, which ones: any word")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing more is compiled")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--cache", type=Path, default=CACHE, help="the same there: its files have their whole paths")
    parser.add_argument("--record", choices=WHICH, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.record:
        record(options, options.archive)
        return 0
    jobs: dict[Job, None] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            to = Path(folder) / name
            more = ["--one-in", str(options.one_in), "--seed", options.seed]
            subprocess.run([sys.executable, __file__, str(to), "--record", name, *more], check=True, cwd=ROOT)
            jobs |= dict.fromkeys(pickle.loads(to.read_bytes()))
            if (names := to.with_suffix(".txt")).exists():
                options.archive.with_suffix(".txt").write_bytes(names.read_bytes())
        stand_in(Path(folder))
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
        said = compile_all(list(jobs), options)
    number = pack(options.cache.resolve(), options.archive)
    print("\n".join([*said, f"{number} files, {options.archive.stat().st_size / 2**20:.1f} MiB"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
