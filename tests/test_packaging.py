"""What an installation leaves behind, what a wheel holds, and what the library asks of where it is loaded.

The slow tests install for real, in fresh virtual environments. Those that need the library built compile in
build/native of this checkout, where `make build` left the objects; the library inside pmrl_kernels/, which development
uses, is left alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
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
from pmrl_kernels import info, ops
from pmrl_kernels.ops import binary, native

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


def build_nothing(package: Path, **variables: str) -> tuple[str, str]:
    """The record after a build in place that makes nothing, and what it told."""
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    variables = {**os.environ, "PMRL_KERNELS_NATIVE": "", **variables}
    done = subprocess.run(command, cwd=package.parent, env=variables, check=True, capture_output=True, text=True)
    return (package / RECORD).read_text(), done.stdout + done.stderr


NOTHING = {"not wanted": {"PMRL_KERNELS_NATIVE": "0"}, "no compiler": {"CXX": "no-such-compiler"}}
WHY = {
    "not wanted": "PMRL_KERNELS_NATIVE=0 at installation",
    "no compiler": "no C++ compiler was found at installation (looked for no-such-compiler)",
}
DOORS = [f"_numerics.cpython-{number}-x86_64-linux-gnu.so" for number in (310, 311)]


@pytest.mark.parametrize("why", NOTHING)
@pytest.mark.parametrize("library", ["a text", "another version", "truncated", "none"])
def test_building_nothing_in_place_removes_what_no_longer_fits(tmp_path, why, library):
    """Or the record would speak of something else than what runs."""
    package = copied(tmp_path / "source") / "pmrl_kernels"
    if library == "a text":
        (package / "libpmrl_kernels.so").write_text("of an earlier build")
    elif library != "none":
        code = elf() + binary.source_hash(package.parent).encode()
        (package / "libpmrl_kernels.so").write_bytes(code if library == "another version" else code[:-500])
    if library == "another version":
        with (package.parent / "csrc" / "cpu" / "ops.h").open("a") as file:
            file.write("// changed\n")
    for name in DOORS:
        (package / name).write_text("of an earlier build")
    assert build_nothing(package, **NOTHING[why])[0] == f"{WHY[why]}\n"
    assert not [*package.glob("*.so")]


@pytest.mark.parametrize("why", NOTHING)
def test_building_nothing_in_place_keeps_what_fits(tmp_path, why):
    """Several environments share a checkout. One without a compiler must not take another one's library away."""
    package = copied(tmp_path / "source") / "pmrl_kernels"
    code = elf() + binary.source_hash(package.parent).encode()
    (package / "libpmrl_kernels.so").write_bytes(code)
    (package / RECORD).write_text("built\n")
    for name in DOORS:
        (package / name).write_text("of an earlier build")
    for _ in range(2):  # the second time it is the record of a kept one that is replaced
        record, told = build_nothing(package, **NOTHING[why])
        assert record == f"built\nkept by a later build, which made none: {WHY[why]}\n"
        assert "warning" in told
        assert f"no native library was built ({WHY[why]})" in told
        assert (package / "libpmrl_kernels.so").read_bytes() == code
        assert sorted(path.name for path in package.glob("*.so")) == sorted([*DOORS, "libpmrl_kernels.so"])


@pytest.mark.parametrize("fits", [True, False])
def test_a_build_in_place_keeps_the_doors_of_other_pythons_that_fit(script, monkeypatch, tmp_path, fits):
    """The library is replaced, a door for another version of Python only goes if it may be of other sources."""
    module = script()
    from setuptools import Distribution

    root = copied(tmp_path / "source")
    package = root / "pmrl_kernels"
    code = elf() + binary.source_hash(root).encode()
    (package / "libpmrl_kernels.so").write_bytes(code if fits else elf())
    (package / DOORS[0]).write_text("for Python 3.10")
    (root / "new.so").write_bytes(code)
    monkeypatch.chdir(root)
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "survey", dict)
    extensions = [module.Extension(module.LIBRARY, [])]
    command = module.Build(Distribution({"name": "pmrl-kernels", "packages": [], "ext_modules": extensions}))
    command.inplace = True
    command.ensure_finalized()
    monkeypatch.setattr(command, "_compile", lambda facts: {module.LIBRARY: root / "new.so"})
    command.run()
    assert (package / "libpmrl_kernels.so").read_bytes() == code
    assert (package / RECORD).read_text() == "built\n"
    assert (package / DOORS[0]).exists() == fits


def test_the_record_tells_who_kept_the_library(monkeypatch, tmp_path):
    (tmp_path / RECORD).write_text("built\nkept by a later build, which made none: no cmake\n")
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(native, "build_info", {"isa": "x", "compiled": "x y", "compiler": "C", "torch": "2.10"})
    assert native.describe() == "x of x y, by C with torch 2.10; kept by a later build, which made none: no cmake"


def test_make_works_in_a_folder_with_a_space(tmp_path):
    """Whose tools then come first on the PATH. Nothing is built: the interpreter only tells what it is called with."""
    if not shutil.which("make"):
        pytest.skip("no make")
    root = copied(tmp_path / "with a spa ce and an ä")
    shutil.copy(ROOT / "Makefile", root)
    shutil.copy(ROOT / "constraints.txt", root)
    tools = root / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text('#!/bin/sh\necho "$PATH|$*" >> calls\n', encoding="utf-8")
    (tools / "python").chmod(0o755)
    (root / "dist").mkdir()
    (root / "dist" / "a.whl").touch()
    targets = ["build", "wheel", "sanitize", "test", "resources", "bench"]
    done = subprocess.run(["make", f"PYTHON={sys.executable}", *targets], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [line.split("|") for line in (root / "calls").read_text(encoding="utf-8").splitlines()]
    first = {arguments: path.split(os.pathsep)[0] for path, arguments in calls}
    for told in ("install --no-build-isolation --no-deps -e .", "wheel --no-build-isolation", "sanitize.py"):
        (called,) = (arguments for arguments in first if told in arguments)
        assert first[called] == str(tools), called


# ------------------------------------------------------------------------------------------------
# What stands in the library's place
# ------------------------------------------------------------------------------------------------


def elf() -> bytes:
    """A file in which a loader finds all that the headers speak of."""
    header = b"\x7fELF\x02\x01".ljust(32, b"\0") + struct.pack("<QQIHHHHHH", 64, 960, 0, 64, 56, 1, 64, 1, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 600, 600, 4096)
    return (header + segment).ljust(1024, b"\0")


@pytest.mark.parametrize("size", [64, 119, 120, 599, 960, 1023])
def test_a_file_that_ends_too_early_is_known_without_loading_it(tmp_path, size):
    (tmp_path / "library").write_bytes(elf()[:size])
    assert binary.damage(tmp_path / "library") == f"it ends after {size} of 1024 bytes"


@pytest.mark.parametrize("content", [elf(), elf() + b"more", b"", b"text", elf()[:63], b"text" * 100], ids=range(6))
def test_a_file_that_is_whole_or_no_library_at_all(tmp_path, content):
    (tmp_path / "library").write_bytes(content)
    assert binary.damage(tmp_path / "library") is None


@needs_library
def test_the_library_is_whole(tmp_path):
    assert binary.damage(LIBRARY) is None
    code = LIBRARY.read_bytes()
    for size in [64, 1000, *range(0x1000, len(code), len(code) // 50), len(code) - 4096, len(code) - 1]:
        (tmp_path / "library").write_bytes(code[:size])
        assert binary.damage(tmp_path / "library") == f"it ends after {size} of {len(code)} bytes"


def installed(folder: Path, library: bytes | Path | None = None, name: str = "pmrl_kernels") -> Path:
    """A copy of the package, with that in the library's place."""
    package = folder / name
    shutil.copytree(ROOT / "pmrl_kernels", package, ignore=shutil.ignore_patterns("__pycache__", "*.so", RECORD))
    if isinstance(library, Path):
        shutil.copyfile(library, package / "libpmrl_kernels.so")
    elif library is not None:
        (package / "libpmrl_kernels.so").write_bytes(library)
    return package


ASKED = """
import torch
from pmrl_kernels import ops, dominant_sv_loss
assert "reference" in ops.available
assert dominant_sv_loss(torch.eye(3), torch.eye(3)).isfinite()
print(ops.unavailable_reasons.get("native", "works"))
"""


def told_of_native(folder: Path, *options: str, code: str = ASKED) -> tuple[str, str]:
    """Why there is no native backend, in a process that imports what is in ``folder``, and what it was warned of."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PMRL_KERNELS_", "PYTHON"))}
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode} {done.stdout}{done.stderr}"
    return done.stdout.strip(), done.stderr.strip()


def logged(reason: str) -> str:
    """What is broken is told on stderr, by a process that does nothing about logging."""
    return f"the native backend is not available: {reason}"


# Importing the package anew spares importing torch.
ONE_BY_ONE = """
import importlib, io, json, logging, pathlib, sys, warnings
import torch
log = io.StringIO()
logging.basicConfig(stream=log, level=logging.WARNING, format="%(message)s")
for folder in sorted(pathlib.Path.cwd().iterdir()):
    for module in [name for name in sys.modules if name.partition(".")[0] == "pmrl_kernels"]:
        del sys.modules[module]
    log.truncate(log.seek(0))
    sys.path[0] = str(folder)
    importlib.invalidate_caches()
    from pmrl_kernels import ops, dominant_sv_loss
    assert folder in pathlib.Path(ops.__file__).parents
    assert dominant_sv_loss(torch.eye(3), torch.eye(3)).isfinite()
    print(json.dumps([folder.name, ops.unavailable_reasons.get("native", "works"), log.getvalue().strip()]))
"""


def told_one_by_one(folder: Path, *options: str) -> dict[str, tuple[str, str]]:
    """As above of the packages in each folder of ``folder``, of which at most one has a library that can be loaded."""
    told, warned = told_of_native(folder, *options, code=ONE_BY_ONE)
    assert warned == ""
    return {name: (reason, log) for name, reason, log in map(json.loads, told.splitlines())}


def test_a_library_that_is_not_there_or_none_at_all(tmp_path):
    """The package works without it, and tells the loader's own reason. That there is none is no fault."""
    content = {"empty": b"", "text": b"a text of some length, which is no library at all", "zeros": elf()}
    for name in ("absent", *content):
        installed(tmp_path / name, content.get(name))
    told = told_one_by_one(tmp_path)
    assert told.pop("absent") == ("this installation has no compiled library: it was not built", "")
    assert told.keys() == content.keys()
    for reason, log in told.values():
        assert re.match(r"libpmrl_kernels\.so cannot be loaded: .*(file too short|ELF|cannot open)", reason)
        assert log == logged(reason)


@needs_library
def test_a_truncated_library_does_not_end_the_process(tmp_path):
    """As a full disk or an interrupted copy leaves it: mapped, it ends the process at the first touch of the rest."""
    code = LIBRARY.read_bytes()
    sizes = [int(left * len(code)) for left in (0.1, 0.5, 0.9, 0.999)]
    for size in sizes:
        installed(tmp_path / str(size), code[:size])
    reasons = {
        str(
            size
        ): f"libpmrl_kernels.so is damaged: it ends after {size} of {len(code)} bytes; install the package again"
        for size in sizes
    }
    assert told_one_by_one(tmp_path) == {size: (reason, logged(reason)) for size, reason in reasons.items()}


def test_another_library_in_its_place(tmp_path):
    other = Path(str(importlib.util.find_spec("_bisect").origin))
    if not other.exists():
        pytest.skip("this Python has its modules built in")
    installed(tmp_path, other)
    reason, warned = told_of_native(tmp_path)
    assert reason == "libpmrl_kernels.so holds none of this package's operators; install the package again"
    assert warned == logged(reason)


@needs_library
def test_a_library_of_another_version(tmp_path):
    """Whose operators take other arguments than this version passes."""
    package = installed(tmp_path, LIBRARY)
    path = package / "ops" / "reference.py"
    path.write_text(path.read_text().replace("Tensor u, Tensor? columns, int start,", "Tensor u, Tensor? columns,"))
    code = "from pmrl_kernels.ops import native; print(native.unavailable())"
    reason, warned = told_of_native(tmp_path, code=code)
    assert reason.startswith("libpmrl_kernels.so is of another version: got pmrl_kernels::instance_forward(Tensor u,")
    assert warned == logged(reason)


STRANGERS = {
    "an empty folder": {"csrc/.keep": ""},
    "sources": {"csrc/common/a.h": "int a;", "csrc/b.cpp": "int b;"},
    "a CMake project": {"CMakeLists.txt": "project(extension LANGUAGES CXX)\n", "csrc/b.cpp": "int b;"},
    "CMakeLists.txt is a folder": {"CMakeLists.txt/a": "", "csrc/b.cpp/c": ""},
}


@needs_library
def test_other_peoples_sources_beside_the_package(tmp_path):
    """As in site-packages, or a working folder: neither an error nor a claim about this library."""
    for case, files in STRANGERS.items():
        installed(tmp_path / case, LIBRARY)
        for name, content in files.items():
            path = tmp_path / case / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    told = told_one_by_one(tmp_path, "-W", "error::UserWarning")
    assert told == dict.fromkeys(STRANGERS, ("works", ""))


@needs_library
def test_a_library_that_was_not_built_from_the_sources_beside_it(tmp_path):
    """In a checkout, a warning; where warnings are errors the import still succeeds, and the reason is the warning."""
    root = copied(tmp_path / "source")
    shutil.copyfile(LIBRARY, root / "pmrl_kernels" / "libpmrl_kernels.so")
    assert told_of_native(root, "-W", "error::UserWarning") == ("works", "")
    with (root / "csrc" / "library.cpp").open("a") as file:
        file.write("// changed\n")
    reason, warned = told_of_native(root)
    assert reason == "works"
    assert "the native library was not built from the sources beside it; run `make build`" in warned
    reason, warned = told_of_native(root, "-W", "error::UserWarning")
    assert reason.startswith("UserWarning: pmrl_kernels: the native library was not built from")
    assert warned == logged(reason)


TWO_COPIES = """
import torch
import someones_pmrl
from someones_pmrl import ops as theirs
from pmrl_kernels import ops as ours
assert "native" in theirs.available, theirs.unavailable_reasons
for package in (theirs, ours):
    for name, backend in package.available.items():
        if name != "triton":
            outputs, _ = backend.operators.spectral_forward([torch.eye(3)] * 2, None, None, 1.0, True, True, 1)
            assert outputs[0].isfinite().all()
print(ours.unavailable_reasons.get("native", "works"))
"""


@needs_library
@pytest.mark.parametrize("same", [True, False])
def test_two_libraries_in_one_process(tmp_path, same):
    """Each would register the same operators, which ends the process. One of the same sources serves both copies."""
    installed(tmp_path, LIBRARY)
    code, sources = LIBRARY.read_bytes(), native.build_info["sources"].encode()
    assert code.count(sources) == 1
    installed(tmp_path, code if same else code.replace(sources, b"0" * len(sources)), "someones_pmrl")
    reason, warned = told_of_native(tmp_path, code=TWO_COPIES)
    if same:
        assert (reason, warned) == ("works", "")
    else:
        assert reason.startswith("this process has loaded the library of another version of pmrl_kernels already")
        assert "start Python anew" in reason
        assert warned == logged(reason)


def test_a_package_in_a_zip_archive(tmp_path):
    """Pure Python, as no library can be loaded from there."""
    installed(tmp_path / "folder")
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "folder")
    code = f"import sys; sys.path.insert(0, {archive!r})\n{ASKED}"
    assert told_of_native(tmp_path, code=code) == ("this installation has no compiled library: it was not built", "")


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
    assert (PACKAGE / RECORD).read_text().splitlines()[0] == "built"
    assert "native" in ops.available or "PMRL_KERNELS_ISA" in os.environ, ops.unavailable_reasons["native"]
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
    # (As an address, since pip takes a path with a space for several.)
    pinned = {name: (ROOT / "constraints.txt").as_uri() for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
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
    for folder in ("benchmarks", "csrc", "docs", "examples", "tests"):
        files |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.*") if path.is_file()}
    files |= {str(path.relative_to(ROOT)) for path in (ROOT / "pmrl_kernels").rglob("*.py")}
    files = {name for name in files if "__pycache__" not in name}
    assert {"tests/conftest.py", "tests/data/torch-2.10-symbols.txt", "constraints.txt"} <= files
    assert not files - names
    text = (ROOT / "Makefile").read_text()
    read = set(re.findall(r"(?:benchmarks|tests|examples)/[\w/]+\.py|constraints[\w-]*\.txt", text))
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
    done = environment.pip(*installing, **(TOOLS | {"CXX": str(compiler), "PMRL_KERNELS_NATIVE": "1"}))
    assert done.returncode == 0, done.stdout
    assert reported(environment)[0] == "works"
    done = environment.python("-c", "from pmrl_kernels.ops import native; print(native.build_info['sources'])")
    assert done.stdout.strip() == binary.source_hash(ROOT)
