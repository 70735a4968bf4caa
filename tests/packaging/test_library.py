"""What is in the library, and what it asks of where it is loaded."""

from __future__ import annotations

import ctypes
import math
import platform
import random
import re
from pathlib import Path

import pytest
import torch

from pmrl_kernels.ops import binary, native
from tests import DATA, ROOT
from tests.tools.installation import LIBRARY, OBJECTS, elf, needs_binutils, needs_library, output
from tests.tools.smoke import check_errors


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


# Of manylinux_2_28, as auditwheel has it; csrc/portable.h sees to it on x86-64. Elsewhere of the first releases of
# distributions that carry GCC 11: RHEL 9, Ubuntu 22.04, Debian 12 have no less.
PORTABLE = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
OF_GCC_11 = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)}
NEWEST = PORTABLE if platform.machine() == "x86_64" else OF_GCC_11


@needs_library
@needs_binutils
def test_the_rest_is_the_c_and_cpp_runtime_of_older_systems():
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


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="not glibc on x86-64")
@pytest.mark.parametrize("name", ["exp", "exp2", "log"])
def test_the_older_version_of_a_function_computes_the_same(name):
    """csrc/portable.h asks for the one of GLIBC_2.2.5, whatever is the newest."""
    libm = ctypes.CDLL("libm.so.6")
    find = ctypes.CDLL(None).dlvsym
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    function = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)
    versions = [find(libm._handle, name.encode(), version) for version in (b"GLIBC_2.2.5", b"GLIBC_2.29")]
    if versions[1] is None:
        pytest.skip("a glibc that has no newer one")
    older, newer = map(function, versions)
    assert versions[0] != versions[1]
    draw = random.Random(0)
    # Over all that is finite and positive for log, and for the others over what overflows, underflows or neither.
    values = [2.0 ** draw.uniform(-1080, 1024) if name == "log" else draw.uniform(-1100, 1100) for _ in range(20000)]
    for x in [*values, 0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, -1.0, 5e-324, 1e308, -1e308]:
        a, b = older(x), newer(x)
        assert a == b or (a != a and b != b), x


@needs_library
def test_errors_arrive_as_exceptions():
    """What the library throws, and what PyTorch does on its behalf, crosses from one to the other and to Python."""
    check_errors()


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
    system = r"libstdc\+\+\.so\.6|libm\.so\.6|libgcc_s\.so\.1|libc\.so\.6|libdl\.so\.2|libpthread\.so\.0|ld-linux.*"
    assert all(re.fullmatch(system, name) for name in needed - {"libtorch_cpu.so"}), needed
    code = LIBRARY.read_bytes()
    for path in (ROOT, Path(torch.__path__[0]), Path(torch.__path__[0]).resolve(), Path.home()):
        assert len(path.parts) < 2 or f"{path}/".encode() not in code, path


@needs_binutils
@pytest.mark.skipif(not OBJECTS, reason="no object files in build/native")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: f"{path.parents[2].stem}-{path.name.partition('.')[0]}")
def test_no_code_is_shared_between_instruction_sets(path):
    """A linker keeps one of several copies of an inline function: that of AVX-512, say, for all processors."""
    table = path.parents[2].stem  # pmrl::kernels_avx2, say, by which all the rest is reached
    named = (f"{prefix}{table}" for prefix in ("", "joint_", "solver_"))
    tables = {f"_ZN4pmrl{len(name)}{name}E" for name in named}  # of one instruction set
    for line in output("nm", "-P", path):
        name, kind = line.split()[:2]
        if kind in "Uvw":  # undefined: what comes from the compiler's runtime, not from other files of this project
            assert "pmrl" not in name or name in tables, line
        else:  # lower case is local, but for u: W, V and u are what a linker merges
            assert (kind.islower() and kind != "u") or name in tables, line


@needs_library
def test_the_kernels_for_cuda_are_in_the_library():
    """As many fatbins as there are files of kernels and numbers of modalities; or none, and a reason."""
    fatbins = LIBRARY.read_bytes().count((0xBA55ED50).to_bytes(4, "little") + b"\x01\x00\x10\x00")
    told, compiler = native.build_info["cuda"], native.build_info["nvcc"]
    if compiler:
        assert re.fullmatch(r"(sm_\d+ )+compute_\d+", told)
        assert re.fullmatch(r"nvcc [\d.]+, ptxas [\d.]+", compiler)
        assert fatbins == 7 * len([*(ROOT / "csrc" / "cuda").glob("*.cu")])
    else:
        assert re.fullmatch("none: .+", told)
        assert fatbins == 0


@needs_library
def test_why_no_kernel_for_cuda_runs_on_a_torch_for_cpus(monkeypatch):
    if torch.version.cuda is not None:
        pytest.skip("a torch for CUDA")
    told = native.cuda_unavailable(torch.device("cuda", 0))
    built, _, reason = native.build_info["cuda"].partition("none: ")
    assert told == (
        "PyTorch was built without CUDA" if built else f"this library was built without kernels for CUDA: {reason}"
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")  # whose devices are called "cuda" too
    assert (
        native.cuda_unavailable(torch.device("cuda", 0)) == "its kernels are for CUDA, and this PyTorch is for HIP 7.0"
    )


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
