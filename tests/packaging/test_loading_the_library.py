"""What may stand in the library's place: nothing, half of it, another's, one of other sources; its record."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pmrl_kernels import info, ops
from pmrl_kernels.ops import native
from tests import ROOT
from tests.tools.installation import (
    LIBRARY,
    PACKAGE,
    RECORD,
    TOOLS,
    copied,
    elf,
    installed,
    needs_compiler,
    needs_library,
)

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
    path = package / "ops" / "contrast" / "spec.py"
    path.write_text(path.read_text().replace("int[] pairs, bool[] directions,", "int[] pairs,"))
    code = "from pmrl_kernels import ops; print(ops.available['native'].lacking['paired'])"
    reasons, warned = told_of_native(tmp_path, code=code)
    reason = reasons.strip()
    told = "ImportError: libpmrl_kernels.so is of another version: got pmrl_kernels::paired_forward(Tensor[] vectors,"
    assert reason.startswith(told)
    assert warned == f"the native backend has no kernels for paired, paired_of_any_norm: {reason}"


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


@pytest.mark.slow
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
            outputs, _ = backend.pairs["spectral"].forward([torch.eye(3)] * 2, None, None, 1.0, True, True, 1)
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
    variables = {**os.environ, **TOOLS, **PLAIN, "CXX": compiler, "PMRL_KERNELS_NATIVE": "", "PMRL_KERNELS_CUDA": ""}
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
