"""Installations in fresh virtual environments, wheels, and the source distribution.

The slow tests install for real. Those that need the library built compile in build/native of this checkout,
where `make build` left the objects; the library inside pmrl_kernels/, which development uses, is left alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import pmrl_kernels
from pmrl_kernels.ops import binary, native
from tests import ROOT
from tests.tools.environments import TORCH, Environment, libraries, try_wheel
from tests.tools.installation import COMPILER, RECORD, TOOLS, copied, fake_torch, needs_compiler

WORKS = "works"
"""What is said of the native backend where all is well."""


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory) -> Path:
    return libraries(tmp_path_factory.mktemp("libraries") / "with torch")


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> Path:
    return libraries(tmp_path_factory.mktemp("libraries") / "without torch", TORCH)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return copied(tmp_path_factory.mktemp("copy") / "source")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT)]
    variables = {**os.environ, **TOOLS, "PMRL_KERNELS_NATIVE": "1"}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return next(folder.glob("*.whl"))


def reported(environment: Environment) -> tuple[str, str]:
    """What `python -m pmrl_kernels.info` says of the native backend and of the library."""
    done = environment.python("-m", "pmrl_kernels.info")
    assert done.returncode == 0, done.stdout
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    return lines["backend native"], lines["native library"]


def holds_library(environment: Environment) -> bool:
    folder = environment.site / "pmrl_kernels"
    assert (folder / RECORD).exists()
    return bool([*folder.glob("*.so")])


@pytest.mark.slow
@needs_compiler
def test_install_with_torch_and_compiler(tmp_path, with_torch):
    environment = Environment(tmp_path / "environment", with_torch)
    done = environment.pip("install", "--no-index", "--no-build-isolation", ROOT, **TOOLS)
    assert done.returncode == 0, done.stdout
    backend, library = reported(environment)
    assert backend == WORKS
    assert library == native.describe()
    assert [x.name for x in (environment.site / "pmrl_kernels").glob("*.so")] == ["libpmrl_kernels.so"]


@pytest.mark.slow
@needs_compiler
def test_install_with_build_isolation(tmp_path, with_torch):
    """Torch is invisible to the process that builds, and found all the same."""
    environment = Environment(tmp_path / "environment", with_torch)
    # With other versions of cmake and ninja than `make build` has used, everything would be compiled again.
    # (As an address, since pip takes a path with a space for several.)
    pinned = {name: (ROOT / "constraints.txt").as_uri() for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    done = environment.pip("install", ROOT, **TOOLS, **pinned)
    if done.returncode and re.search(r"(?i)no matching distribution|connection (broken|error)|timed out", done.stdout):
        pytest.skip("pip could not fetch what builds the package")
    assert done.returncode == 0, done.stdout
    backend, library = reported(environment)
    assert backend == WORKS
    assert library == native.describe()


# PATH has cmake and a compiler unless it says otherwise.
PURE = {
    "no torch": (TORCH, {}, r"torch was not found by \S*/environment/bin/python at installation; .*"),
    "no compiler": ((), {"PATH": str(Path(sys.executable).parent)}, r"no C\+\+ compiler was found at installation .*"),
    "not wanted": ((), {"PMRL_KERNELS_NATIVE": "0"}, "PMRL_KERNELS_NATIVE=0 at installation"),
    "a broken compiler": (
        (),
        {"CXX": str(shutil.which("false"))},
        r'the compilation failed at installation: The C\+\+ compiler "\S*/false" is not able to compile .*',
    ),
}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("hidden", "settings", "reason"), PURE.values(), ids=PURE.keys())
def test_install_without_the_library(tmp_path, request, source, hidden, settings, reason):
    with_torch = request.getfixturevalue("with_torch")
    others = request.getfixturevalue("without_torch") if hidden else with_torch
    environment = Environment(tmp_path / "environment", others)
    # Without dependencies, as pip would fetch the torch that is not there.
    done = environment.pip("install", "--no-deps", "--no-build-isolation", source, **(TOOLS | settings))
    assert done.returncode == 0, done.stdout
    assert not holds_library(environment)
    environment.use(with_torch)
    backend, library = reported(environment)
    assert re.fullmatch(reason, library)
    assert backend == f"not available: this installation has no compiled library: {library}"


@pytest.mark.slow
@needs_compiler
def test_install_with_an_old_torch(tmp_path, source, with_torch, without_torch):
    environment = Environment(tmp_path / "environment", without_torch)
    fake_torch(environment.site, "2.9.1")
    done = environment.pip("install", "--no-deps", "--no-build-isolation", source, **TOOLS)
    assert done.returncode == 0, done.stdout
    shutil.rmtree(environment.site / "torch")
    environment.use(with_torch)
    assert reported(environment)[1] == "it needs torch >= 2.10 at installation, which had 2.9.1"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("settings", "hidden", "reason"),
    [
        ({}, TORCH, "torch was not found by"),
        ({"PATH": str(Path(sys.executable).parent)}, (), r"no C\+\+ compiler was found"),
        ({"CXX": str(shutil.which("false"))}, (), "the compilation failed"),
    ],
    ids=["no torch", "no compiler", "a broken compiler"],
)
def test_install_that_insists_on_the_library(tmp_path, request, source, settings, hidden, reason):
    others = request.getfixturevalue("without_torch" if hidden else "with_torch")
    environment = Environment(tmp_path / "environment", others)
    asked = TOOLS | settings | {"PMRL_KERNELS_NATIVE": "1"}
    done = environment.pip("install", "--no-deps", "--no-build-isolation", source, **asked)
    assert done.returncode != 0
    assert re.search(f"PMRL_KERNELS_NATIVE=1, but the native library cannot be built: {reason}", done.stdout)
    assert not (environment.site / "pmrl_kernels").exists()


@pytest.mark.slow
@needs_compiler
def test_wheel_works_where_nothing_can_be_compiled(tmp_path, wheel):
    told = try_wheel(wheel, tmp_path)
    assert re.search(rf"(?m)^backend native +{re.escape(WORKS)}$", told)
    for isa in native.build_info["compiled"].split():
        result = "this processor does not have it" if isa.endswith("(-)") else "agrees with the reference"
        assert f"\n{isa.removesuffix('(-)')}: {result}\n" in told


@pytest.mark.slow
@needs_compiler
def test_install_without_the_library_over_one_with_it(tmp_path, wheel, with_torch):
    """Neither the old installation nor the folder of the last build, which is the same, leaves its library there."""
    environment = Environment(tmp_path / "environment", with_torch)
    done = environment.pip("install", "--no-index", wheel)
    assert done.returncode == 0, done.stdout
    assert holds_library(environment)
    again = ("install", "--no-deps", "--no-build-isolation", "--force-reinstall", ROOT)
    done = environment.pip(*again, PMRL_KERNELS_NATIVE="0", **TOOLS)
    assert done.returncode == 0, done.stdout
    assert not holds_library(environment)
    assert reported(environment)[1] == "PMRL_KERNELS_NATIVE=0 at installation"


def source_archive(folder: Path) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    make = f"import setuptools.build_meta as hooks; hooks.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


def names_in(archive: Path) -> set[str]:
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}


def test_a_source_distribution_can_be_tested(tmp_path):
    """It holds whatever the Makefile's targets read, and what those read in turn."""
    names = names_in(source_archive(tmp_path))
    files = {*("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "Makefile", "pmrl_kernels/py.typed")}
    files |= {path.name for suffix in ("md", "txt") for path in ROOT.glob(f"*.{suffix}")} | {"LICENSE"}
    files.add(".pre-commit-config.yaml")
    for folder in (".github", "benchmarks", "csrc", "docs", "examples", "tests"):
        files |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.*") if path.is_file()}
    files |= {str(path.relative_to(ROOT)) for path in (ROOT / "pmrl_kernels").rglob("*.py")}
    files = {name for name in files if "__pycache__" not in name}
    assert {"tests/conftest.py", "tests/data/torch-2.10-symbols.txt", "constraints.txt"} <= files
    assert not files - names
    text = (ROOT / "Makefile").read_text()
    read = set(re.findall(r"(?:benchmarks|docs|tests|examples)/[\w/]+\.py|constraints[\w-]*\.txt", text))
    assert len(read) > 8
    assert not read - names


def test_the_version_is_written_once():
    """In the package, where it is read without running it: a build may have no torch."""
    pytest.importorskip("setuptools", minversion="77")
    assert pmrl_kernels.__version__ not in (ROOT / "pyproject.toml").read_text()
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert told.split()[-1] == pmrl_kernels.__version__


@pytest.mark.slow
@needs_compiler
def test_source_distribution(tmp_path, with_torch):
    """It holds what a build needs, and nothing that a build made; a library built from it is one of these sources."""
    archive = source_archive(tmp_path)
    names = names_in(archive)
    assert not [name for name in names if re.search(r"\.so$|\.py[co]$|native_build\.txt$|^build", name)]

    # No objects can be shared with another path, so this one is compiled without optimisation, which takes a tenth.
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    compiler.chmod(0o755)
    environment = Environment(tmp_path / "environment", with_torch)
    installing = ("install", "--no-index", "--no-build-isolation", archive)
    settings = {"CXX": str(compiler), "PMRL_KERNELS_NATIVE": "1", "PMRL_KERNELS_CUDA": "0"}
    done = environment.pip(*installing, **(TOOLS | settings))
    assert done.returncode == 0, done.stdout
    assert reported(environment)[0] == WORKS
    done = environment.python("-c", "from pmrl_kernels.ops import native; print(native.build_info['sources'])")
    assert done.stdout.strip() == binary.source_hash(ROOT)
