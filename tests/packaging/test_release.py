"""What `make sdist`, `make wheel` and `make release` hold a distribution to. The slow test makes one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pmrl_kernels
from tests import ROOT
from tests.tools import environments, release
from tests.tools.installation import PATH, RECORD, TOOLS, needs_compiler


def test_the_version_is_the_packages():
    assert release.version() == pmrl_kernels.__version__


TODAY = "# Changelog\n\n## 1.2.3 (2026-01-31)\n\n## 1.2.2 (2025-01-31)\n"


@pytest.mark.parametrize(
    ("number", "changelog", "status", "told"),
    [
        ("1.2.3", TODAY, "", []),
        ("1.2.4", TODAY, "", ["CHANGELOG.md: wanted a section '## 1.2.4', as in pmrl_kernels/__init__.py, found none"]),
        ("1.2", TODAY, "", ["CHANGELOG.md: wanted a section '## 1.2', as in pmrl_kernels/__init__.py, found none"]),
        (
            "1.2.3",
            "## 1.2.3 (unreleased)\n",
            "",
            ["CHANGELOG.md: wanted the day of the release, '## 1.2.3 (YYYY-MM-DD)', got '## 1.2.3 (unreleased)'"],
        ),
        (
            "1.2.3",
            "## 1.2.3\n",
            " M a\n?? b\n",
            [
                "CHANGELOG.md: wanted the day of the release, '## 1.2.3 (YYYY-MM-DD)', got '## 1.2.3'",
                "git: wanted a clean checkout, got  M a; ?? b",
            ],
        ),
    ],
)
def test_what_is_no_release(number, changelog, status, told):
    assert release.unready(number, changelog, status) == told


def test_a_release_is_refused_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "said_by", lambda *command: "?? a")
    monkeypatch.setattr(release, "run", lambda *command, **settings: pytest.fail(f"ran {command}"))
    (tmp_path / "pmrl_kernels").mkdir()
    (tmp_path / "pmrl_kernels" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(TODAY)
    with pytest.raises(SystemExit, match=r"git: wanted a clean checkout, got \?\? a"):
        release.release(rehearse=False, fetch=False)


def test_a_source_distribution_is_what_git_has():
    tracked = {".ci/run", ".gitignore", "setup.py", "csrc/portable.h"}
    written = {"PKG-INFO", "setup.cfg", "pmrl_kernels.egg-info/SOURCES.txt"}
    assert release.misfits({"setup.py", "csrc/portable.h", *written}, tracked) == []
    assert release.misfits({"setup.py", "notes.txt", *written}, tracked) == [
        "csrc/portable.h is missing: see MANIFEST.in",
        "notes.txt is not in git",
    ]


def some_wheel(folder: Path, tag: str, *more: str) -> Path:
    names = ("__init__.py", "py.typed", "libpmrl_kernels.so", RECORD, "ops/native.py")
    wheel = folder / f"pmrl_kernels-1.2.3-py3-none-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in [*(f"pmrl_kernels/{name}" for name in names), "pmrl_kernels-1.2.3.dist-info/METADATA", *more]:
            file.writestr(name, "")
    return wheel


def test_faults_of_a_wheel(tmp_path):
    assert environments.faults(some_wheel(tmp_path, "manylinux_2_28_x86_64"), "manylinux_2_28_x86_64") == []
    (told,) = environments.faults(some_wheel(tmp_path, "manylinux_2_28_x86_64"), "manylinux_2_34_x86_64")
    assert told.startswith("its name: wanted the tag py3-none-manylinux_2_34_x86_64, got")
    bundled = some_wheel(tmp_path, "linux_x", "pmrl_kernels.libs/libgomp-a.so.1.0.0")
    assert environments.faults(bundled, "linux_x") == [
        "compiled files that are not the library: ['pmrl_kernels.libs/libgomp-a.so.1.0.0']",
        "what is not the package's: ['pmrl_kernels.libs']",
    ]


REPORT = {
    "sym_tag": "manylinux_2_24_x86_64",
    "versioned_symbols": {"libc.so.6": ["GLIBC_2.14"]},
    "external_libs": {"libtorch_cpu.so": None},
    "unsupported_isa": False,
}


@pytest.mark.parametrize(
    ("differs", "about"),
    [
        ({}, None),
        ({"sym_tag": "manylinux_2_28_x86_64"}, None),
        ({"sym_tag": "manylinux_2_34_x86_64"}, "symbols"),
        ({"sym_tag": "linux_x86_64"}, "symbols"),
        ({"external_libs": {"libtorch_cpu.so": None, "libgomp.so.1": "/lib/libgomp.so.1"}}, "libraries"),
        ({"unsupported_isa": True}, "instructions"),
    ],
)
def test_what_auditwheel_may_find(differs, about):
    assert [told.partition(":")[0] for told in release.objections(REPORT | differs)] == [about] * (about is not None)


def test_the_oldest_torch_is_the_one_that_is_asked_for():
    assert f'"{release.oldest_torch().removesuffix(".0").replace("==", ">=")}"' in (ROOT / "pyproject.toml").read_text()


def test_pythons_that_do_not_start_are_passed_over(monkeypatch, tmp_path):
    for minor, does in ((10, "exit 1"), (19, "exit 0")):
        (tmp_path / f"python3.{minor}").write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / f"python3.{minor}").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert release.pythons() == [sys.executable, str(tmp_path / "python3.19")]


@pytest.mark.slow
@needs_compiler
def test_a_wheel_gets_the_tag_of_its_policy(tmp_path, monkeypatch):
    """Of the objects of `make build`; installed and tried with this torch."""
    for name, value in {**TOOLS, "PATH": PATH}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(release, "DIST", tmp_path / "dist")
    (tmp_path / "built").mkdir()
    wheel = release.tagged(release.built_wheel(ROOT, tmp_path / "built"))
    release.smoke(wheel, fetch=False)
    assert os.listdir(tmp_path / "dist") == [wheel.name]
    if release.platform.machine() == "x86_64":
        assert wheel.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")
    assert subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel]).returncode == 0
