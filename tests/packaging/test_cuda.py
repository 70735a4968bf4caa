"""Kernels for CUDA in the build: whether there are any and why not, what is compiled for what, and what is redone.

Most tests have a toolkit of scripts that write down how they are called.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from pmrl_kernels.ops import binary
from tests.tools.installation import COMPILER, PATH, copied

CMAKE, NINJA = shutil.which("cmake", path=PATH), shutil.which("ninja", path=PATH)
pytestmark = pytest.mark.skipif(not (COMPILER and CMAKE and NINJA), reason="no C++ compiler, no cmake or no ninja")
ARCHITECTURES = ["75", "80", "86", "90", "100", "120"]

NVCC = """#!/bin/sh
echo "$0 $*" >> {calls}
case "$*" in
*--version*) echo "Cuda compilation tools, release 13.0, V{version}"; exit;;
*--list-gpu-code*) for x in {known}; do echo sm_$x; done; exit;;
esac
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2;; -MF) dependencies=$2;; -MT) target=$2;; *.cu) source=$1;; esac
  shift
done
{fails}
printf '//\\n\\n.version 9.0\\n.target sm_90\\n' > "$out"
if [ -n "$dependencies" ]; then echo "$target: $source $(dirname $source)/small.cuh" > "$dependencies"; fi
"""
PTXAS = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release {version}, V{version}"; exit;; esac
echo "$0 $*" >> {calls}
for out; do :; done
echo "$0 $*" > $out
"""
FATBINARY = """#!/bin/sh
echo "$0 $*" >> {calls}
for x; do case $x in --create=*) echo "a fatbin: $*" > "${{x#--create=}}";; esac; done
"""


class Toolkit:
    """Scripts for nvcc, ptxas and fatbinary, and one for an older ptxas."""

    def __init__(self, folder: Path, version: str = "13.0.88", fails: str = "", known: str = "75 80 86 90 100 120"):
        self.calls = folder / "calls"
        self.calls.touch()
        self.bin = folder / "bin"
        self.older = folder / "older" / "ptxas"
        for path, text in {
            self.bin / "nvcc": NVCC,
            self.bin / "ptxas": PTXAS,
            self.bin / "fatbinary": FATBINARY,
            self.older: PTXAS.replace("{version}", "12.9.86"),
        }.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.format(calls=self.calls, version=version, fails=fails, known=known))
            path.chmod(0o755)

    def called(self, tool: str) -> list[list[str]]:
        """The arguments of its calls that made something of a source, and not of a trial."""
        calls = [line.split() for line in self.calls.read_text().splitlines()]
        return [x[1:] for x in calls if x[0].endswith(f"/{tool}") and "small" in " ".join(x)]


THIS_MACHINES = "this machine's"


class Project:
    """A copy of the sources, whose kernels are others, and its build folder."""

    def __init__(self, folder: Path, source: str | None = "small.cu"):
        self.root, self.build = copied(folder / "source"), folder / "build"
        for path in (self.root / "csrc" / "cuda").glob("*.cu*"):
            path.unlink()
        if source:
            (self.root / "csrc" / "cuda" / source).write_text(
                'extern "C" __global__ void small(float* x) { *x = PMRL_K; }\n'
            )
            (self.root / "csrc" / "cuda" / "small.cuh").write_text("// a header\n")

    def configure(self, toolkit: Toolkit | str | None, **settings: str) -> subprocess.CompletedProcess[str]:
        """``toolkit`` None: with none to be found, whatever this machine has."""
        settings = {"CMAKE_CXX_COMPILER": COMPILER, "CMAKE_MAKE_PROGRAM": NINJA, **settings}
        if toolkit is None:
            nowhere = {"CMAKE_FIND_ROOT_PATH": str(self.root / "nowhere"), "CMAKE_FIND_ROOT_PATH_MODE_PROGRAM": "ONLY"}
            settings |= nowhere
        settings = {"PMRL_TORCH_ROOT": "/somewhere/torch", "PMRL_TORCH_VERSION": "2.10", **settings}
        variables = {name: x for name, x in os.environ.items() if name not in ("CUDA_HOME", "NVCC_CCBIN", "CXX")}
        if isinstance(toolkit, Toolkit):
            variables["PATH"] = f"{toolkit.bin}{os.pathsep}{PATH}"
        defined = [f"-D{name}={value}" for name, value in settings.items()]
        command = [str(CMAKE), "-G", "Ninja", "-S", str(self.root), "-B", str(self.build), *defined]
        return subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def make(self) -> str:
        command = [str(CMAKE), "--build", str(self.build), "--target", "cuda_images"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def built(self) -> tuple[str, str, str, list[str]]:
        """Names of architectures, compiler, the reason for none, and numbers, as the library will tell them."""
        text = (self.build / "cuda" / "images.cpp").read_text()
        names, compiler, reason, numbers = re.search(r'kBuilt\{"(.*)", "(.*)", "(.*)", \{(.*)\};', text).groups()
        return names, compiler, reason, re.findall(r"\d+", numbers)


@pytest.fixture
def project(tmp_path) -> Callable[..., Project]:
    return lambda source="small.cu": Project(tmp_path, source)


def test_kernels_for_each_number_of_modalities_and_architecture(project, tmp_path):
    """One object for each, one fatbin for each number; drivers of CUDA 12 take what an assembler of CUDA 12 makes."""
    toolkit, here = Toolkit(tmp_path), project()
    done = here.configure(toolkit, PMRL_PTXAS=f"/no/such/ptxas;{toolkit.bin / 'ptxas'};{toolkit.older}")
    assert done.returncode == 0, done.stdout
    names = " ".join(f"sm_{x}" for x in ARCHITECTURES) + " compute_90"
    assert here.built() == (names, "nvcc 13.0.88, ptxas 12.9.86", "", [*ARCHITECTURES, "90", "12040", "12080"])
    here.make()
    compiled = toolkit.called("nvcc")
    assert sorted((x[x.index("-ptx") + 1], next(y for y in x if y.startswith("-DPMRL_K"))) for x in compiled) == sorted(
        (f"-arch=compute_{architecture}", f"-DPMRL_K={k}") for architecture in ARCHITECTURES for k in range(2, 9)
    )
    assembled = [x for x in toolkit.called("ptxas") if x[0].startswith("-arch")]
    assert len(assembled) == 7 * len(ARCHITECTURES)
    # k = 8 does not fit into registers, and nobody is to be warned of it
    assert sum("-warn-spills" in x and "-warn-lmem-usage" in x for x in assembled) == 6 * len(ARCHITECTURES)
    assert not [x for x in assembled if "_8_" in x[-1] and "-warn-spills" in x]
    calls = toolkit.calls.read_text()
    assert f"{toolkit.older} -arch=sm_100" in calls
    assert f"{toolkit.bin / 'ptxas'} -arch" not in calls
    assert "\n.version 8.7\n.target" in (here.build / "cuda" / "small_2_sm_90.ptx").read_text()
    for k, packed in zip(range(2, 9), sorted(toolkit.called("fatbinary"), key=str), strict=True):
        images = [re.fullmatch(r"--image3=kind=(\w+),sm=(\d+),file=\S+/small_(\d)_sm_(\d+)\.(\w+)", x) for x in packed]
        found = [x.groups() for x in images if x]
        assert sorted(found) == sorted(
            [("elf", x, str(k), x, "cubin") for x in ARCHITECTURES] + [("ptx", "90", str(k), "90", "ptx")]
        )
        assert {"--compress-all", "--compress-mode=size"} <= {*packed}
    (code,) = [x.read_bytes() for x in here.build.rglob("images.cpp.o")]
    for k in range(2, 9):
        assert (here.build / "cuda" / f"small_{k}.fatbin").read_bytes() in code


def test_a_second_build_compiles_what_changed(project, tmp_path):
    toolkit, here = Toolkit(tmp_path), project()
    assert here.configure(toolkit, PMRL_CUDA_ARCHITECTURES="80;90").returncode == 0
    assert "small.cu, k = 3, sm_90" in here.make()
    assert len(toolkit.called("nvcc")) == 14
    here.make()
    assert len(toolkit.called("nvcc")) == 14
    (here.root / "csrc" / "cuda" / "small.cuh").write_text("// changed\n")
    here.make()
    assert len(toolkit.called("nvcc")) == 28


def test_without_an_older_assembler_drivers_have_to_be_new(project, tmp_path):
    toolkit, here = Toolkit(tmp_path), project()
    done = here.configure(toolkit, PMRL_CUDA="ON", PMRL_CUDA_ARCHITECTURES="80;86", PMRL_CUDA_MODALITIES="4")
    assert done.returncode == 0, done.stdout
    compiler = "nvcc 13.0.88, ptxas 13.0.88"
    assert here.built() == ("sm_80 sm_86 compute_86", compiler, "", ["80", "86", "86", "13000", "13000"])
    here.make()
    assert ".version 9.0" in (here.build / "cuda" / "small_4_sm_86.ptx").read_text()


def test_an_older_nvcc_leaves_out_what_it_does_not_know(project, tmp_path):
    toolkit, here = Toolkit(tmp_path, "12.4.131", known="75 80 86 90"), project()
    assert here.configure(toolkit, PMRL_PTXAS=str(toolkit.older)).returncode == 0
    names = "sm_75 sm_80 sm_86 sm_90 compute_90"
    numbers = ["75", "80", "86", "90", "90", "12000", "12040"]
    assert here.built() == (names, "nvcc 12.4.131, ptxas 12.4.131", "", numbers)
    assert "--compress-all" in toolkit.calls.read_text()
    assert "--compress-mode" not in toolkit.calls.read_text()


NONE = {
    "no nvcc": (None, {}, r"no nvcc was found at installation \(looked for it in CUDA_HOME, .*"),
    "an old nvcc": (
        {"version": "11.8.89"},
        {},
        r"wanted an nvcc of CUDA 12\.0 or newer at installation, got '11\.8\.89'",
    ),
    "an nvcc that fails": (
        {"fails": 'echo "a.cu"; echo "nvcc fatal : \\"cicc\\" not found" >&2; exit 1'},
        {},
        r'nvcc 13\.0\.88 compiled nothing at installation: nvcc fatal : \\"cicc\\" not found',
    ),
    "an nvcc that says nothing": (
        {"fails": "exit 3"},
        {},
        r"nvcc 13\.0\.88 compiled nothing at installation: exit status 3",
    ),
    "an unknown architecture": (
        {},
        {"PMRL_CUDA_ARCHITECTURES": "90;33"},
        r"nvcc 13\.0\.88 does not compile for 33 of PMRL_CUDA_ARCHITECTURES",
    ),
    "an nvcc of a far future": (
        {"version": "20.0.1", "known": "200"},
        {},
        r"nvcc 20\.0\.1 compiles for none of 75;80;86;90;100;120",
    ),
    "not wanted": ({}, {"PMRL_CUDA": "OFF"}, "PMRL_CUDA is OFF"),
    "for a reason": (
        {},
        {"PMRL_CUDA": "OFF", "PMRL_CUDA_REASON": 'a.cu(3): error: no "b\\c"; d'},
        r'a\.cu\(3\): error: no \\"b\\\\c\\"; d',
    ),
}


@pytest.mark.parametrize(("tools", "settings", "reason"), NONE.values(), ids=NONE.keys())
def test_why_there_are_no_kernels(project, tmp_path, tools, settings, reason):
    """The library has none then, and says why; if they are wanted, that is an error."""
    toolkit, here = None if tools is None else Toolkit(tmp_path, **tools), project()
    done = here.configure(toolkit, **settings)
    assert done.returncode == 0, done.stdout
    names, compiler, told, numbers = here.built()
    assert re.fullmatch(reason, told)
    assert (names, compiler, numbers) == ("", "", ["0", "0", "0", "0"])
    here.make()
    if settings.get("PMRL_CUDA") != "OFF":
        shutil.rmtree(here.build)
        done = here.configure(toolkit, **settings, PMRL_CUDA="ON")
        assert done.returncode != 0
        wanted = " ".join(done.stdout.split())
        assert re.search("PMRL_CUDA is ON, but no kernels for CUDA can be compiled: ", wanted)


def test_a_reason_holds_no_path_of_the_build(project, tmp_path):
    """Nor does the library in which it ends up."""
    here = project()
    told = f"{here.root}/csrc/cuda/small.cu(1): error: no"
    assert here.configure(None, PMRL_CUDA="OFF", PMRL_CUDA_REASON=told).returncode == 0
    assert here.built()[2] == "csrc/cuda/small.cu(1): error: no"


def test_no_sources_no_kernels(project, tmp_path):
    here = project(source=None)
    assert here.configure(Toolkit(tmp_path)).returncode == 0
    assert here.built()[2] == "there are no sources of any in csrc/cuda"


def test_an_unknown_wish_is_an_error(project, tmp_path):
    done = project().configure(Toolkit(tmp_path), PMRL_CUDA="YES")
    assert done.returncode != 0
    assert "PMRL_CUDA: got 'YES', wanted AUTO, ON or OFF" in done.stdout


@pytest.mark.parametrize("name", ["cuda/small.cu", "cuda/small.cuh", "cuda/images.cpp.in", "cuda/kernels.cmake", "a.S"])
def test_the_hash_of_the_sources_is_of_kernels_too(project, name):
    """CMake's, in the library, is the one that Python tells a stale library by."""
    here = project()
    (here.root / "csrc" / "a.S").write_text("// assembly\n")
    before = binary.source_hash(here.root)
    assert here.configure(None).returncode == 0
    assert before in (here.build / "build.ninja").read_text()
    with (here.root / "csrc" / name).open("a") as file:
        file.write("\n")
    assert binary.source_hash(here.root) != before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_a_real_toolkit(tmp_path):
    """What the fatbins hold, as NVIDIA's own tool sees it in an object of this library."""
    triton = find_spec("triton")
    tools = Path(str(triton and triton.origin)).parent / "backends" / "nvidia" / "bin"
    if not (tools / "cuobjdump").exists():
        pytest.skip("no cuobjdump, which Triton brings")
    here = Project(tmp_path)
    done = here.configure(THIS_MACHINES, PMRL_CUDA="ON", PMRL_PTXAS=str(tools / "ptxas"))
    assert done.returncode == 0, done.stdout
    here.make()
    names = here.built()[0].split()
    assert {*(f"sm_{x}" for x in ARCHITECTURES), "compute_90"} <= {*names}
    (code,) = here.build.rglob("images.cpp.o")

    def listed(option: str, file: Path) -> list[str]:
        told = subprocess.run([tools / "cuobjdump", option, file], check=True, capture_output=True, text=True).stdout
        return sorted(re.findall(r"(sm_\d+)", told))

    objects = sorted(x for x in names if x.startswith("sm_"))
    assert listed("-lelf", code) == sorted(objects * 7)
    assert listed("-lptx", code) == ["sm_90"] * 7
    for k in range(2, 9):
        fatbin = here.build / "cuda" / f"small_{k}.fatbin"
        assert fatbin.read_bytes() in code.read_bytes()
        assert listed("-lelf", fatbin) == objects
