"""setup.py and the Makefile: when a library is built, what is kept of an earlier build, what a wheel is called."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from readme_renderer import markdown

from pmrl_kernels.ops import binary, native
from tests import ROOT
from tests.tools.installation import RECORD, copied, elf, fake_torch


@pytest.fixture
def script(monkeypatch) -> Callable[..., types.ModuleType]:
    """setup.py as a module that sets nothing up, run with the given PMRL_KERNELS_NATIVE and PMRL_KERNELS_CUDA."""
    setuptools = pytest.importorskip("setuptools", minversion="77")

    def load(requested: str = "", cuda: str = "") -> types.ModuleType:
        monkeypatch.setenv("PMRL_KERNELS_NATIVE", requested)
        monkeypatch.setenv("PMRL_KERNELS_CUDA", cuda)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        spec = importlib.util.spec_from_file_location("pmrl_kernels_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module.sys, "platform", "linux")
        return module

    return load


FOUND = {"torch": "/somewhere/torch", "version": "2.10.0+cpu", "pybind11": None, "nvcc": [], "ptxas": []}


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


@pytest.mark.parametrize("name", ["PMRL_KERNELS_NATIVE", "PMRL_KERNELS_CUDA"])
def test_a_variable_that_nobody_understands(script, name):
    with pytest.raises(SystemExit, match=rf"^{name}: got 'yes', wanted 0, 1 or nothing$"):
        script(*("yes",) if name.endswith("NATIVE") else ("", "yes")).survey()


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


def test_compilers_for_cuda_are_found_among_packages(script, monkeypatch, tmp_path):
    """NVIDIA's, which are one namespace over all folders of packages, and the assembler that Triton brings."""
    names = ["nvidia/cu13/bin/nvcc", "nvidia/cu13/bin/ptxas", "nvidia/cuda_nvcc/bin/ptxas", "triton/__init__.py"]
    names += ["triton/backends/nvidia/bin/ptxas", "nvidia/cudnn/lib/libcudnn.so"]
    found = importlib.util.find_spec("nvidia")
    if found and found.origin:  # of CUDA 12 they are one folder, which is a package, and this one has to come before it
        names.append("nvidia/__init__.py")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = script().probe()
    assert [x for x in facts["nvcc"] if x.startswith(str(tmp_path))] == [str(tmp_path / names[0])]
    assert [x for x in facts["ptxas"] if x.startswith(str(tmp_path))] == [str(tmp_path / names[i]) for i in (1, 2, 4)]


def compiled(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, root: Path, broken: str = "", inplace: bool = False
) -> list[list[str]]:
    """The commands of a build, of which those for kernels for CUDA may fail for that reason."""
    from setuptools import Distribution

    commands = []

    def run(*command: str) -> None:
        commands.append(list(command))
        if broken and "cuda_images" in command:
            raise module.NotBuiltError(broken)

    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "run", run)
    command = module.Build(Distribution({"name": "pmrl-kernels", "packages": []}))
    command.inplace = inplace
    command.ensure_finalized()
    found = FOUND | {"nvcc": ["/a/bin/nvcc", "/b/bin/nvcc"], "ptxas": ["/a/bin/ptxas", "/c/ptxas"]}
    assert command._compile(found) == {module.LIBRARY: root / "build" / "native" / "libpmrl_kernels.so"}
    return commands


@pytest.mark.parametrize(("asked", "told"), [("", "AUTO"), ("1", "ON"), ("0", "OFF")])
def test_what_the_build_is_told_of_cuda(script, monkeypatch, tmp_path, asked, told):
    monkeypatch.setenv("PMRL_KERNELS_CUDA_ARCHITECTURES", "80, 90")
    configure, *making = compiled(script(cuda=asked), monkeypatch, tmp_path)
    reason = "PMRL_KERNELS_CUDA=0 at installation" if asked == "0" else ""
    assert {f"-DPMRL_CUDA={told}", f"-DPMRL_CUDA_REASON={reason}", "-DPMRL_CUDA_ARCHITECTURES=80;90"} <= {*configure}
    assert {"-DPMRL_NVCC_HINTS=/a/bin;/b/bin", "-DPMRL_PTXAS=/a/bin/ptxas;/c/ptxas"} <= {*configure}
    assert [x[1:2] + x[3:] for x in making] == [["--build", "--target", "cuda_images"], ["--build"]]


def fake_smi(folder: Path, monkeypatch, told: str) -> None:
    """An nvidia-smi that answers the one question that it is asked."""
    (folder / "nvidia-smi").write_text(
        f'#!/bin/sh\n[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] && printf \'{told}\'\n'
    )
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("cards", "architectures"),
    [
        ("9.0\n", ["90"]),
        ("8.9\n8.9\n8.0\n", ["80", "86"]),
        ("10.3\n12.1\n7.5\n", ["75", "100", "120"]),
        ("7.0\n9.0\n", []),
        ("13.0\n", []),
        ("[N/A]\n", []),
        ("NVIDIA-SMI has failed\n", []),
        ("", []),
    ],
)
def test_what_the_cards_of_this_machine_run(script, monkeypatch, tmp_path, cards, architectures):
    fake_smi(tmp_path, monkeypatch, cards)
    assert script().architectures_here() == architectures


@pytest.mark.parametrize(
    ("flags", "isas"),
    [
        ("flags\t\t: fpu avx2 fma f16c avx512f avx512dq avx512bw avx512vl\n", ["avx512"]),
        ("flags\t\t: fpu avx2 fma f16c avx512f avx512cd\n", ["avx2"]),
        ("flags\t\t: fpu sse2 avx avx2\n", ["baseline"]),
        ("Features\t: fp asimd\n", ["baseline"]),
        (None, []),
    ],
)
def test_instruction_sets_of_this_machine(script, monkeypatch, flags, isas):
    module = script()
    cpuinfo = types.SimpleNamespace(read_text=lambda **_: f"processor\t: 0\n{flags}\n") if flags else Path("/no/file")
    monkeypatch.setattr(module, "Path", lambda _: cpuinfo)
    monkeypatch.setenv("PMRL_KERNELS_ISAS", "this")
    assert module.instruction_sets() == isas
    monkeypatch.setenv("PMRL_KERNELS_ISAS", "avx2, baseline")
    assert module.instruction_sets() == ["avx2", "baseline"]
    monkeypatch.delenv("PMRL_KERNELS_ISAS")
    assert module.instruction_sets() == []


def test_this_machine_is_given_what_it_would_run(script, monkeypatch):
    """Torch chooses among the same sets by itself; a process of its own, whom no variable tells what to choose."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    chosen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setenv("PMRL_KERNELS_ISAS", "this")
    assert script().instruction_sets() == [{"AVX512": "avx512", "AVX2": "avx2"}.get(chosen, "baseline")]


def test_without_nvidia_smi_no_card_is_known(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script().architectures_here() == []


@pytest.mark.parametrize(
    ("inplace", "asked", "told"),
    [(True, "", "86"), (False, "", ""), (True, "75", "75")],
    ids=["in place", "wheel", "asked"],
)
def test_a_build_in_place_is_for_the_cards_here(script, monkeypatch, tmp_path, inplace, asked, told):
    fake_smi(tmp_path, monkeypatch, "8.9\n")
    monkeypatch.setenv("PMRL_KERNELS_CUDA_ARCHITECTURES", asked)
    configure, *_ = compiled(script(), monkeypatch, tmp_path, inplace=inplace)
    assert f"-DPMRL_CUDA_ARCHITECTURES={told}" in configure


def test_the_default_architectures_are_those_of_the_build(script):
    wanted = re.search(r"set\(cuda_wanted ([\d ]+)\)", (ROOT / "csrc" / "cuda" / "kernels.cmake").read_text())[1]
    assert wanted.split() == [*script().DEFAULT_ARCHITECTURES]


def test_kernels_that_cannot_be_compiled_do_not_take_the_library_along(script, monkeypatch, tmp_path, capfd):
    first, _, second, last = compiled(script(), monkeypatch, tmp_path, "a.cu(3): error: no")
    assert second == [*first, "-DPMRL_CUDA=OFF", "-DPMRL_CUDA_REASON=a.cu(3): error: no"]
    assert "--target" not in last


def test_kernels_that_are_wanted_and_cannot_be_compiled(script, monkeypatch, tmp_path):
    module = script(cuda="1")
    with pytest.raises(module.NotBuiltError, match=r"^no$"):
        compiled(module, monkeypatch, tmp_path, "no")


def test_wanting_kernels_for_cuda_is_wanting_the_library(tmp_path):
    package = copied(tmp_path / "source") / "pmrl_kernels"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build_nothing(package, PMRL_KERNELS_CUDA="1", CXX="no-such-compiler")
    assert "PMRL_KERNELS_CUDA=1, but the native library cannot be built: no C++ compiler" in caught.value.stderr


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("x.ptx, line 9; fatal   : unknown version\nninja: stopped", "x.ptx, line 9; fatal   : unknown version"),
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


README = ROOT.joinpath("README.md").read_text(encoding="utf-8")


def leads_and_shows(page: str) -> list[str]:
    """What the page links to, and the images on it, as an index renders it."""
    html = markdown.render(page)
    assert html, "an index would show the source"
    return re.findall(r'(?:href|src)="([^"]*)"', html)


def test_a_page_without_a_repository_leads_nowhere_else(script):
    found = leads_and_shows(script().page(README, None, "1.2.3"))
    assert "https://arxiv.org/abs/2507.17343" in found
    assert not [target for target in found if not target.startswith(("https://", "#"))]
    relative = {target for target in leads_and_shows(README) if not target.startswith(("https://", "#"))}
    assert len(relative) > 10  # there was something to find


def test_a_page_with_a_repository_leads_to_the_files_of_its_version(script):
    found = leads_and_shows(script().page(README, "https://example.org/us/it", "1.2.3"))
    images = [target for target in found if target.startswith("https://example.org/us/it/raw/v1.2.3/")]
    links = [target for target in found if target.startswith("https://example.org/us/it/blob/v1.2.3/")]
    assert len(images) == len(re.findall(r"!\[", README))
    assert len(links) > 10
    assert not [target for target in found if not target.startswith(("https://", "#"))]
    for target in [*images, *links]:  # and they are there
        assert (ROOT / target.partition("/v1.2.3/")[2]).exists(), target


@pytest.mark.parametrize(
    ("text", "alone", "of_a_repository"),
    [
        ("[a](https://b.c/d)", "[a](https://b.c/d)", "[a](https://b.c/d)"),
        ("see [`a`](b/c.md#d), e", "see `a`, e", "see [`a`](S/blob/v1/b/c.md#d), e"),
        ("x\n\n![a\nb](c.png)\n\ny", "x\n\n\n\ny", "x\n\n![a\nb](S/raw/v1/c.png)\n\ny"),
        ("`[a](b)` [c](d)", "`[a](b)` c", "`[a](b)` [c](S/blob/v1/d)"),
        ("```python\nf[a](b)\n```\n[c](d)", "```python\nf[a](b)\n```\nc", "```python\nf[a](b)\n```\n[c](S/blob/v1/d)"),
    ],
)
def test_links_of_a_page(script, text, alone, of_a_repository):
    module = script()
    assert module.page(text, None, "1") == alone
    assert module.page(text, "S", "1") == of_a_repository


def build_nothing(package: Path, **variables: str) -> tuple[str, str]:
    """The record after a build in place that makes nothing, and what it told."""
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    variables = {**os.environ, "PMRL_KERNELS_NATIVE": "", "PMRL_KERNELS_CUDA": "", **variables}
    done = subprocess.run(command, cwd=package.parent, env=variables, check=True, capture_output=True, text=True)
    return (package / RECORD).read_text(), done.stdout + done.stderr


NOTHING = {"not wanted": {"PMRL_KERNELS_NATIVE": "0"}, "no compiler": {"CXX": "no-such-compiler"}}
WHY = {
    "not wanted": "PMRL_KERNELS_NATIVE=0 at installation",
    "no compiler": "no C++ compiler was found at installation (looked for no-such-compiler)",
}
TEST_MODULES = [f"_numerics.cpython-{number}-x86_64-linux-gnu.so" for number in (310, 311)]


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
        with (package.parent / "csrc" / "cpu" / "kernels.h").open("a") as file:
            file.write("// changed\n")
    for name in TEST_MODULES:
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
    for name in TEST_MODULES:
        (package / name).write_text("of an earlier build")
    for _ in range(2):  # the second time it is the record of a kept one that is replaced
        record, told = build_nothing(package, **NOTHING[why])
        assert record == f"built\nkept by a later build, which made none: {WHY[why]}\n"
        assert "warning" in told
        assert f"no native library was built ({WHY[why]})" in told
        assert (package / "libpmrl_kernels.so").read_bytes() == code
        assert sorted(path.name for path in package.glob("*.so")) == sorted([*TEST_MODULES, "libpmrl_kernels.so"])


@pytest.mark.parametrize("fits", [True, False])
def test_a_build_in_place_keeps_the_test_modules_of_other_pythons_that_fit(script, monkeypatch, tmp_path, fits):
    """The library is replaced, a test module for another version of Python only goes if it may be of other sources."""
    module = script()
    from setuptools import Distribution

    root = copied(tmp_path / "source")
    package = root / "pmrl_kernels"
    code = elf() + binary.source_hash(root).encode()
    (package / "libpmrl_kernels.so").write_bytes(code if fits else elf())
    (package / TEST_MODULES[0]).write_text("for Python 3.10")
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
    assert (package / TEST_MODULES[0]).exists() == fits


def test_the_record_tells_who_kept_the_library(monkeypatch, tmp_path):
    (tmp_path / RECORD).write_text("built\nkept by a later build, which made none: no cmake\n")
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    facts = {"isa": "x", "compiled": "x y", "compiler": "C", "torch": "2.10", "cuda": "none: no nvcc", "nvcc": ""}
    monkeypatch.setattr(native, "build_info", facts)
    assert native.describe() == "x of x y, by C with torch 2.10; kept by a later build, which made none: no cmake"
    assert native.describe_cuda() == "none: no nvcc"
    monkeypatch.setattr(native, "build_info", facts | {"cuda": "sm_90 compute_90", "nvcc": "nvcc 13.0"})
    assert native.describe_cuda() == "sm_90 compute_90, by nvcc 13.0"
    monkeypatch.setattr(native, "build_info", {})
    assert native.describe_cuda() == "none: there is no native library"


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
    targets = ["build", "wheel", "sdist", "release", "sanitize", "test", "resources", "bench"]
    done = subprocess.run(["make", f"PYTHON={sys.executable}", *targets], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [line.split("|") for line in (root / "calls").read_text(encoding="utf-8").splitlines()]
    first = {arguments: path.split(os.pathsep)[0] for path, arguments in calls}
    programs = ("release.py wheel", "release.py sdist", "release.py release", "sanitize.py")
    for told in ("install --no-build-isolation --no-deps -e .", *programs):
        (called,) = (arguments for arguments in first if told in arguments)
        assert first[called] == str(tools), called
