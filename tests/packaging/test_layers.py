"""Imports within the package go one way (docs/layering.md), and tools that read sources see them."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import modulefinder
from pathlib import Path

import pytest

from pmrl_kernels import ops
from tests.tools.backends import PACKAGE

# Every file may import from the rows below its own, never from its own row or above; but files that one pattern with a
# * stands for may import one another, as long as there is no cycle. "" is the package, FAMILY the folder of any op
# family.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("info",),
    ("",),
    ("modules", "chunks", "compilation", "diagnostics", "retrieval"),
    ("losses", "spectral", "joint", "matching"),
    ("inputs", "ops", "ops.objective"),
    ("ops.FAMILY",),
    ("ops.FAMILY.cuda",),
    ("ops.FAMILY.native", "ops.FAMILY.triton", "ops.FAMILY.exact"),
    ("ops.FAMILY.triton.*",),
    ("ops.FAMILY.reference",),
    ("ops.FAMILY.spec",),
    ("ops.cuda",),
    ("ops.native", "ops.triton"),
    ("ops.triton.*",),
    ("ops.reference", "ops.binary", "ops.operators", "ops.function", "distributed"),
    ("ops.constants",),
)
FAMILIES = [family.__name__.rpartition(".")[2] for family in ops.FAMILIES]


def place(name: str) -> tuple[int, str]:
    """The row of a module, and the pattern in it."""
    for family in FAMILIES:
        if name == f"ops.{family}" or name.startswith(f"ops.{family}."):
            name = name.replace(family, "FAMILY", 1)
    for level, row in enumerate(LAYERS):
        for pattern in row:
            if fnmatch.fnmatchcase(name, pattern):
                return level, pattern
    pytest.fail(f"{name} is new: give it its place in LAYERS")


def module_name(path: Path) -> str:
    """losses.py -> "losses", ops/__init__.py -> "ops", __init__.py -> ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_within_the_package(name: str, source: str, is_package: bool) -> set[str]:
    """Modules of the package that ``source`` imports, at the top or inside functions."""
    here = ["pmrl_kernels", *filter(None, name.split("."))]
    package = here if is_package else here[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *filter(None, (node.module or "").split("."))]
            # ``from package import x``: x may be a module, or a name in the package
            full = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        for target in full:
            if target.split(".")[0] != "pmrl_kernels":
                continue
            inner = target.removeprefix("pmrl_kernels").removeprefix(".")
            while inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    return imports_within_the_package(name, path.read_text(), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("name", "source", "is_package", "expected"),
    [
        ("losses", "from . import distributed, inputs", False, {"distributed", "inputs"}),
        ("losses", "from .ops import resolve", False, {"ops"}),
        ("losses", "def f():\n    import pmrl_kernels.ops.constants", False, {"ops.constants"}),
        ("info", "from . import __version__, ops", False, {"", "ops"}),
        (
            "ops.reference",
            "from .. import losses\nfrom . import constants",
            False,
            {"losses", "ops.constants"},
        ),
        ("ops", "from . import constants\nimport torch, os.path", True, {"ops.constants"}),
        ("", "from .losses import pmrl_loss", True, {"losses"}),
    ],
)
def test_imports_are_found(name, source, is_package, expected):
    """The test below is only as good as this."""
    assert imports_within_the_package(name, source, is_package) == expected


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    level, pattern = place(name)
    for target in imports_of(name):
        below, other = place(target)
        neighbours = "*" in pattern and pattern == other
        assert below > level or neighbours, f"{name or 'the package'} must not import {target or 'the package'}"


def test_imports_have_no_cycle():
    graph = {name: imports_of(name) for name in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("family", FAMILIES)
def test_op_families_do_not_know_one_another(family):
    """What is about two of them is a matter of ``ops/objective.py``, or of those who call it."""
    others = tuple(f"ops.{other}" for other in FAMILIES if other != family)
    for name in MODULES:
        if name.startswith(f"ops.{family}"):
            assert not {target for target in imports_of(name) if target.startswith(others)}


@pytest.mark.parametrize("name", ["ops.reference", *(f"ops.{family}.reference" for family in FAMILIES)])
def test_reference_stands_alone(name):
    """It is the oracle of the kernels, so it may share nothing with them but the constants and what an op is."""
    family = name.removesuffix(".reference")
    allowed = {"ops.constants", "ops.operators", "ops.reference", family, f"{family}.spec"}
    assert imports_of(name) <= allowed
    assert imports_of("ops.constants") == set()


def test_users_files_reach_implementations_through_the_resolver_only():
    for name in ("", "modules", "losses", "spectral"):
        inner = {target for target in imports_of(name) if target.startswith("ops.")}
        specs = {f"ops.{family}.spec" for family in FAMILIES}
        assert not inner - {"ops.function", "ops.objective", *specs}


def test_every_backend_is_imported_by_a_statement():
    assert {f"ops.{name}" for name in ops._PREFERENCE} <= imports_of("ops")
    assert [ops._import(name).NAME for name in ops._PREFERENCE] == list(ops._PREFERENCE)


def test_static_analysis_finds_the_whole_package():
    """What freezes a program into a file takes along what it can see being imported, by bytecode."""
    finder = modulefinder.ModuleFinder(path=[str(PACKAGE.parent)])
    finder.import_hook("pmrl_kernels")
    found = {name for name in finder.modules if name.partition(".")[0] == "pmrl_kernels"}
    assert found == {f"pmrl_kernels.{name}".rstrip(".") for name in MODULES} - {"pmrl_kernels.info"}
