"""Which releases of Triton are taken, and what else may be called triton."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable

import pytest

from pmrl_kernels import info
from pmrl_kernels.ops import triton


@pytest.fixture
def with_triton(monkeypatch, tmp_path) -> Callable[..., tuple[str | None, str]]:
    """Why there is no Triton backend, and what info tells, where these distributions are installed."""
    real = importlib.metadata.version

    def call(**versions: str | None) -> tuple[str | None, str]:
        for name, number in versions.items():
            (tmp_path / f"{name}-1.dist-info").mkdir()
            text = f"Name: {name}\n" + ("" if number is None else f"Version: {number}\n")
            (tmp_path / f"{name}-1.dist-info" / "METADATA").write_text(text)

        def version(name: str) -> str:
            if name.replace("-", "_") not in versions:  # what is really installed here
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setattr(triton, "INTERPRETED", True)
        monkeypatch.setattr(triton, "version", triton.version.__wrapped__)  # not what was found before
        (line,) = (line for line in info.report().splitlines() if line.startswith("triton  "))
        return triton.unavailable(), line.split(None, 1)[1]

    return call


@pytest.mark.parametrize("distribution", ["triton", "pytorch_triton", "pytorch_triton_rocm", "triton_rocm"])
@pytest.mark.parametrize("version", ["3.5.1", "3.5.1+git0d1e2f3", "2.9.0rc1", "3.5"])
def test_an_old_triton_is_a_reason(with_triton, distribution, version):
    told = with_triton(**{distribution: version})
    assert told == (f"it needs Triton 3.6 or newer, found {version}", version)


@pytest.mark.parametrize("distribution", ["triton", "pytorch_triton", "pytorch_triton_rocm"])
@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git5a3b", "3.6rc1", "3.10.0.dev20260101", "4.0"])
def test_a_triton_that_is_new_enough(with_triton, distribution, version):
    assert with_triton(**{distribution: version}) == (None, version)


@pytest.mark.parametrize("version", ["unknown", "main-5a3b", None])
def test_a_triton_of_unknown_version_is_tried(with_triton, version):
    assert with_triton(triton=version) == (None, version or "of unknown version")


def test_of_two_distributions_the_newer_one_counts(with_triton):
    """Both have written to one folder: the later one won, which metadata do not tell."""
    assert with_triton(triton="2.1.0", pytorch_triton_rocm="3.6.0") == (None, "3.6.0")


def test_something_else_called_triton(monkeypatch):
    """A stand-in of another program's, which has no specification."""
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert triton.installed()
    assert info.report()
