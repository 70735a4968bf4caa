"""What an installation leaves behind, what a wheel holds, and what the library asks of where it is loaded.

The slow tests install for real, in fresh virtual environments. Those that need the library built compile in
build/native of this checkout, where `make build` left the objects; the library inside pmrl_kernels/, which development
uses, is left alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import pmrl_kernels
from pmrl_kernels import info
from pmrl_kernels.backends import native

DATA = Path(__file__).resolve().parent / "data"
sys.path.insert(0, str(DATA))

from environments import TORCH, Environment, libraries, try_wheel  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(pmrl_kernels.__file__).parent
LIBRARY = PACKAGE / "libpmrl_kernels.so"
RECORD = "native_build.txt"
OBJECTS = sorted((ROOT / "build" / "native" / "CMakeFiles").glob("kernels_*.dir/csrc/cpu/kernels.cpp.o"))
COMPILER = next(filter(None, map(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++"])), None)
# cmake and ninja may be where pip put them, and the environments under test have nothing there.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
# What compiled the objects in build/native compiles nothing again.
TOOLS = {name: os.environ[name] for name in ("CXX",) if name in os.environ} | {"PATH": PATH}

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason=f"no library to look into: {native.describe()}")
needs_binutils = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="no nm or no readelf")
needs_compiler = pytest.mark.skipif(
    not (COMPILER and shutil.which("cmake", path=PATH) and LIBRARY.exists()),
    reason=f"nothing to build the library with, or it was not built: {native.describe()}",
)


@pytest.fixture(scope="module", autouse=True)
def in_place_build_stays() -> Iterator[None]:
    """Of none of the installations below is the library that development uses."""

    def state() -> dict[str, tuple[int, str]]:
        files = [*PACKAGE.glob("*.so"), *PACKAGE.glob(RECORD)]
        return {x.name: (x.stat().st_mtime_ns, hashlib.sha256(x.read_bytes()).hexdigest()) for x in files}

    before = state()
    yield
    assert state() == before


# ------------------------------------------------------------------------------------------------
# What is in the library
# ------------------------------------------------------------------------------------------------


def output(*command: str | Path) -> list[str]:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.splitlines()


def undefined() -> list[tuple[str, str]]:
    """Every symbol the library must find elsewhere, and the version it wants ("" for none)."""
    found = []
    for line in output("nm", "-D", "--undefined-only", LIBRARY):
        kind, name = line.split()[:2]
        if kind == "U":  # the weak ones may be missing
            name, _, wanted = name.partition("@")
            found.append((name, wanted.lstrip("@")))
    return found


@needs_library
@needs_binutils
def test_torch_2_10_has_all_that_is_asked_of_torch():
    offered = set((DATA / "torch-2.10-symbols.txt").read_text().splitlines())
    asked = {name for name, wanted in undefined() if not wanted}
    assert "torch_call_dispatcher" in offered
    assert any(name.startswith("aoti_torch_") for name in asked)
    assert asked <= offered


# Of the first releases of distributions that carry GCC 11: RHEL 9, Ubuntu 22.04, Debian 12 have no less.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7,)}


@needs_library
@needs_binutils
def test_the_rest_is_the_c_and_cpp_runtime():
    wanted = {wanted for _, wanted in undefined() if wanted}
    families = {name.rsplit("_", 1)[0] for name in wanted}
    assert {"GLIBC", "GLIBCXX"} <= families
    assert families <= NEWEST.keys()
    compiler, release = native.build_info["compiler"].split()
    if compiler != "GNU" or int(release.split(".")[0]) > 12:
        pytest.skip(f"the newest versions allowed are those that GCC up to 12 asks for, this is {compiler} {release}")
    for name in wanted:
        family, number = name.rsplit("_", 1)
        assert tuple(map(int, number.split("."))) <= NEWEST[family], name


@needs_library
@needs_binutils
def test_the_library_exports_nothing():
    """Operators register themselves; two versions of a library in one process cannot get in each other's way."""
    assert output("nm", "-D", "--defined-only", LIBRARY) == []


@needs_library
@needs_binutils
def test_the_library_knows_nothing_of_where_it_was_built():
    entries = [line.split(maxsplit=2)[1:] for line in output("readelf", "-d", LIBRARY) if line.startswith(" 0x")]
    assert not {kind for kind, _ in entries} & {"(RPATH)", "(RUNPATH)"}
    needed = {re.search(r"\[(.*)\]", rest)[1] for kind, rest in entries if kind == "(NEEDED)"}
    assert "libtorch_cpu.so" in needed
    system = r"libstdc\+\+\.so\.6|libm\.so\.6|libgcc_s\.so\.1|libc\.so\.6|ld-linux.*"
    assert all(re.fullmatch(system, name) for name in needed - {"libtorch_cpu.so"}), needed
    code = LIBRARY.read_bytes()
    for path in (ROOT, Path(torch.__path__[0]), Path(torch.__path__[0]).resolve(), Path.home()):
        assert len(path.parts) < 2 or f"{path}/".encode() not in code, path


@needs_binutils
@pytest.mark.skipif(not OBJECTS, reason="no object files in build/native")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.parents[2].stem)
def test_no_code_is_shared_between_instruction_sets(path):
    """A linker keeps one of several copies of an inline function: that of AVX-512, say, for all processors."""
    table = path.parents[2].stem  # pmrl::kernels_avx2, say, by which all the rest is reached
    for line in output("nm", "-P", path):
        name, kind = line.split()[:2]
        if kind in "Uvw":  # undefined: what comes from the compiler's runtime, not from other files of this project
            assert "pmrl" not in name, line
        else:  # lower case is local, but for u: W, V and u are what a linker merges
            assert (kind.islower() and kind != "u") or name == f"_ZN4pmrl{len(table)}{table}E", line


# ------------------------------------------------------------------------------------------------
# What setup.py decides
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch) -> Callable[..., types.ModuleType]:
    """setup.py as a module that sets nothing up, run with the given PMRL_KERNELS_NATIVE."""
    setuptools = pytest.importorskip("setuptools", minversion="77")

    def load(requested: str = "") -> types.ModuleType:
        monkeypatch.setenv("PMRL_KERNELS_NATIVE", requested)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        spec = importlib.util.spec_from_file_location("pmrl_kernels_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module.sys, "platform", "linux")
        return module

    return load


FOUND = {"torch": "/somewhere/torch", "version": "2.10.0+cpu", "pybind11": None}


@pytest.mark.parametrize(
    ("torch_version", "on_path", "reason"),
    [
        (None, ["c++", "cmake"], r"torch was not found by \S+ at installation; .* --force-reinstall --no-deps .*"),
        ("2.9.1", ["c++", "cmake"], r"it needs torch >= 2\.10 at installation, which had 2\.9\.1"),
        ("1.13.1", ["c++", "cmake"], r"it needs torch >= 2\.10 at installation, which had 1\.13\.1"),
        ("2.10.0", ["cmake"], r"no C\+\+ compiler was found at installation \(looked for c\+\+, g\+\+, clang\+\+\)"),
        ("2.10.0a0+git1234567", ["clang++"], "cmake was not found at installation"),
        ("3.0", ["clang++", "cmake"], None),
    ],
)
def test_why_no_library_is_built(script, monkeypatch, tmp_path, torch_version, on_path, reason):
    module = script()
    facts = FOUND | ({"version": torch_version} if torch_version else {"torch": None})
    monkeypatch.setattr(module, "probe", lambda: facts)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    for name in on_path:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if reason is None:
        assert module.survey() == facts
    else:
        with pytest.raises(module.NotBuiltError, match=f"^{reason}"):
            module.survey()


def test_cmake_is_found_in_an_environment_that_is_not_active(script, monkeypatch, tmp_path):
    module = script()
    monkeypatch.setattr(module, "probe", lambda: FOUND)
    for folder, name in (("on the path", "c++"), ("environment", "cmake")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "on the path"))
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "environment"))
    assert module.survey() == FOUND


def test_other_systems_get_pure_python(script, monkeypatch):
    module = script()
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(module.NotBuiltError, match=r"^it is built on Linux only, not on darwin$"):
        module.survey()


def test_the_compiler_that_cxx_names_is_looked_for(script, monkeypatch):
    module = script()
    monkeypatch.setattr(module, "probe", lambda: FOUND)
    monkeypatch.setenv("CXX", "no-such-compiler --with options")
    with pytest.raises(module.NotBuiltError, match=r"\(looked for no-such-compiler\)$"):
        module.survey()


def test_the_variable_that_wants_no_library(script):
    module = script("0")
    with pytest.raises(module.NotBuiltError, match=r"^PMRL_KERNELS_NATIVE=0 at installation$"):
        module.survey()


def test_a_variable_that_nobody_understands(script):
    with pytest.raises(SystemExit, match=r"^PMRL_KERNELS_NATIVE: got 'yes', wanted 0, 1 or nothing$"):
        script("yes").survey()


@pytest.mark.parametrize("isolated", [False, True])
def test_the_interpreters_torch_is_found(script, monkeypatch, tmp_path, isolated):
    """Also where PYTHONPATH leads to a sitecustomize.py that hides it, which is how pip isolates builds."""
    module = script()
    if isolated:
        hide = "import sys; sys.path[:] = [p for p in sys.path if not p.endswith('site-packages')]"
        (tmp_path / "sitecustomize.py").write_text(hide)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = module.probe()
    assert facts["torch"] == os.path.realpath(torch.__path__[0])
    assert facts["version"] == version("torch")


def test_torch_is_found_by_pythonpath(script, monkeypatch, tmp_path):
    fake_torch(tmp_path, "2.99")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = script().probe()
    assert facts["torch"] == os.path.realpath(tmp_path / "torch")
    assert facts["version"] == "2.99"


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("a.cpp:1:2: error: no such thing\nb.cpp:1: error: more", "a.cpp:1:2: error: no such thing"),
        ("CMake Error at CMakeLists.txt:5 (project):\n  The compiler\n\n  is broken.\n", "The compiler is broken."),
        ("CMake Error: no generator", "CMake Error: no generator"),
        ("first\nlast", "last"),
        ("", "exit status 3"),
    ],
)
def test_a_failed_compilation_is_known_by_its_first_error(script, capfd, says, told):
    module = script()
    with pytest.raises(module.NotBuiltError) as caught:
        module.run(sys.executable, "-c", f"import sys; print({says!r}); sys.exit(3)")
    assert str(caught.value) == f"the compilation failed at installation: {told}"
    assert says in capfd.readouterr().out


@pytest.mark.parametrize(("extensions", "tag"), [(True, r"py3-none-linux_\w+"), (False, "py3-none-any")])
def test_a_wheel_is_for_every_python(script, extensions, tag):
    module = script()
    from setuptools import Distribution

    modules = [module.Extension(module.LIBRARY, [])] if extensions else []
    command = module.Wheel(Distribution({"name": "pmrl-kernels", "ext_modules": modules}))
    command.ensure_finalized()
    assert re.fullmatch(tag, "-".join(command.get_tag()))


def copied(folder: Path) -> Path:
    """What a build reads, without anything that was built before."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("pmrl_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", RECORD))
    return folder


def test_building_nothing_in_place_removes_what_was_there(tmp_path):
    """Or the record would speak of something else than what runs."""
    pytest.importorskip("setuptools", minversion="77")
    package = copied(tmp_path / "source") / "pmrl_kernels"
    for name in ("libpmrl_kernels.so", "_numerics.cpython-310-x86_64-linux-gnu.so"):
        (package / name).write_text("of an earlier build")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    variables = {**os.environ, "PMRL_KERNELS_NATIVE": "0"}
    subprocess.run(command, cwd=package.parent, env=variables, check=True, capture_output=True)
    assert not [*package.glob("*.so")]
    assert (package / RECORD).read_text() == "PMRL_KERNELS_NATIVE=0 at installation\n"


def test_a_library_that_cannot_be_loaded(tmp_path):
    """The package works without it, and tells the loader's own reason."""
    shutil.copytree(ROOT / "pmrl_kernels", tmp_path / "pmrl_kernels", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "pmrl_kernels" / "libpmrl_kernels.so").write_text("a text of some length, which is no library at all")
    asked = "from pmrl_kernels import backends; print(*backends.available, backends.unavailable_reasons['native'])"
    done = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, capture_output=True, text=True)
    reason = r"(triton )?reference libpmrl_kernels\.so cannot be loaded: .*(file too short|ELF)"
    assert re.match(reason, done.stdout), done.stdout + done.stderr


# A locale of ASCII alone.
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.mark.parametrize(
    ("record", "told"),
    [("GCC says «no»\n".encode(), "GCC says ?no?"), (b"GCC says \xffno\n", "GCC says ?no")],
    ids=["UTF-8", "undecodable"],
)
def test_a_record_of_any_letters_in_any_locale(tmp_path, record, told):
    """The package works, and info prints what can be printed."""
    shutil.copytree(ROOT / "pmrl_kernels", tmp_path / "pmrl_kernels", ignore=shutil.ignore_patterns("*.so", RECORD))
    (tmp_path / "pmrl_kernels" / RECORD).write_bytes(record)
    command = [sys.executable, "-m", "pmrl_kernels.info"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **PLAIN}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.search(rf"(?m)^native library +{re.escape(told)}$", done.stdout.decode("ascii"))


def built_in_plain(folder: Path, compiler: str) -> str:
    """The record of a build in that locale by such a compiler, which makes nothing."""
    pytest.importorskip("setuptools", minversion="77")
    package = copied(folder) / "pmrl_kernels"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    variables = {**os.environ, **TOOLS, **PLAIN, "CXX": compiler, "PMRL_KERNELS_NATIVE": ""}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True)
    assert done.returncode == 0, done.stderr
    return (package / RECORD).read_text(encoding="utf-8")


def test_a_record_of_any_letters_is_written_in_any_locale(tmp_path):
    assert built_in_plain(tmp_path / "source", "«none»").endswith("(looked for «none»)\n")


@needs_compiler
def test_a_compiler_says_what_it_likes_in_any_locale(tmp_path):
    """What cannot be printed is no reason to fail; that the compilation did is one to go without the library."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'a.cpp:1: error: no «such» thing'\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    record = built_in_plain(tmp_path / "source", str(compiler))
    assert record.startswith("the compilation failed at installation: ")


@needs_library
def test_the_record_of_this_installation():
    assert (PACKAGE / RECORD).read_text() == "built\n"
    line = next(line for line in info.report().splitlines() if line.startswith("native library "))
    assert re.search(r"^native library +\S+ of .*\bbaseline\b.*, by \w+ [\d.]+ with torch \d", line)


# ------------------------------------------------------------------------------------------------
# Installations
# ------------------------------------------------------------------------------------------------


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


def fake_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("")
    (folder / f"torch-{version}.dist-info").mkdir()
    (folder / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")


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
    assert backend == "works"
    assert library == native.describe()
    assert [x.name for x in (environment.site / "pmrl_kernels").glob("*.so")] == ["libpmrl_kernels.so"]


@pytest.mark.slow
@needs_compiler
def test_install_with_build_isolation(tmp_path, with_torch):
    """Torch is invisible to the process that builds, and found all the same."""
    environment = Environment(tmp_path / "environment", with_torch)
    # With other versions of cmake and ninja than `make build` has used, everything would be compiled again.
    pinned = {name: str(ROOT / "constraints.txt") for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    done = environment.pip("install", ROOT, **TOOLS, **pinned)
    if done.returncode and re.search(r"(?i)no matching distribution|connection (broken|error)|timed out", done.stdout):
        pytest.skip("pip could not fetch what builds the package")
    assert done.returncode == 0, done.stdout
    backend, library = reported(environment)
    assert backend == "works"
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
    assert re.search(r"(?m)^backend native +works$", told)
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


@pytest.mark.slow
@needs_compiler
def test_source_distribution(tmp_path, with_torch):
    """It holds what a build needs, and nothing that a build made; a library built from it is one of these sources."""
    pytest.importorskip("setuptools", minversion="77")
    make = f"import setuptools.build_meta as hooks; hooks.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True, capture_output=True)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()} - {""}
    wanted = {"setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "pmrl_kernels/py.typed"}
    for pattern in ("csrc/**/*.*", "pmrl_kernels/**/*.py"):
        wanted |= {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
    assert wanted <= names
    assert not [name for name in names if re.search(r"\.so$|\.py[co]$|native_build\.txt$|^tests|^build", name)]

    # No objects can be shared with another path, so this one is compiled without optimisation, which takes a tenth.
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    compiler.chmod(0o755)
    environment = Environment(tmp_path / "environment", with_torch)
    installing = ("install", "--no-index", "--no-build-isolation", archive)
    done = environment.pip(*installing, **(TOOLS | {"CXX": str(compiler), "PMRL_KERNELS_NATIVE": "1"}))
    assert done.returncode == 0, done.stdout
    assert reported(environment)[0] == "works"
    done = environment.python("-c", "from pmrl_kernels.backends import native; print(native.build_info['sources'])")
    assert done.stdout.strip() == native.source_hash(ROOT)
