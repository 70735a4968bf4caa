"""Builds the native library where torch and a C++ compiler are at hand, else installs pure Python.

What happened is recorded in ``pmrl_kernels/native_build.txt`` and shown by ``python -m pmrl_kernels.info``.

    PMRL_KERNELS_NATIVE=1   a native build that cannot be made is an error
    PMRL_KERNELS_NATIVE=0   no native build is tried
    PMRL_KERNELS_CUDA=1     and so are kernels for CUDA that cannot be made; without it they are left out of the library
    PMRL_KERNELS_CUDA=0     none are tried
    PMRL_KERNELS_CUDA_ARCHITECTURES="80 90"   for these compute capabilities alone; without it in place for the cards of
                                              this machine, if nvidia-smi tells them, and else for all of the default

    PMRL_KERNELS_ISAS="avx512"   for these instruction sets of CPUs alone; "this" is the best that this machine has

In place (``--inplace``, editable installations) several environments share one library. A build that makes none there
leaves the one it finds, if it was made from the same sources, and writes down that it did.

Everything else about the package is in pyproject.toml, everything about the compilation in CMakeLists.txt.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# By its path: importing the package would take torch.
_spec = importlib.util.spec_from_file_location("binary", ROOT / "pmrl_kernels" / "ops" / "binary.py")
binary = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(binary)
# setuptools brings the parser for the Python that has none.
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
LIBRARY = "pmrl_kernels.libpmrl_kernels"
TEST_MODULE = "pmrl_kernels._numerics"
OLDEST_TORCH = (2, 10)
DEFAULT_ARCHITECTURES = ("75", "80", "86", "90", "100", "120")  # those of csrc/cuda/kernels.cmake
REQUESTED = os.environ.get("PMRL_KERNELS_NATIVE", "")
CUDA = os.environ.get("PMRL_KERNELS_CUDA", "")

_PROBE = """
import glob, importlib.util, json, os, sys
sys.path[:] = filter(None, sys.path)  # not the folder this runs in
found = importlib.util.find_spec("torch")
facts = {"torch": None, "pybind11": None, "nvcc": [], "ptxas": []}
if found is not None:
    from importlib.metadata import version
    # As it is really called: environments that share one torch share what was compiled with it.
    facts["torch"] = os.path.realpath(found.submodule_search_locations[0])
    facts["version"] = version("torch")
if importlib.util.find_spec("pybind11") is not None:
    import pybind11
    facts["pybind11"] = pybind11.get_cmake_dir()
# Packages of NVIDIA's (nvidia-cuda-nvcc and the like) have a toolkit's folders; Triton brings an assembler.
for package, place in (("nvidia", "*"), ("triton", "backends/nvidia")):
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or () if found else ():
        for name in ("nvcc", "ptxas"):
            facts[name] += sorted(glob.glob(os.path.join(glob.escape(folder), place, "bin", name)))
print(json.dumps(facts))
"""


class NotBuiltError(Exception):
    """Why there is no native library, for the record."""


def probe() -> dict[str, Any]:
    """Where the interpreter that this package is installed for has torch, pybind11, and compilers for CUDA."""
    facts: dict[str, Any] = {}
    # As this process sees it, which may be by PYTHONPATH; else without the variables by which pip's build isolation
    # hides the environment that the package is installed into.
    for options in ([], ["-E"]):
        done = subprocess.run([sys.executable, *options, "-c", _PROBE], capture_output=True, text=True)
        if done.returncode:
            raise NotBuiltError(f"looking for torch failed at installation: {done.stderr.strip().splitlines()[-1]}")
        facts = json.loads(done.stdout.splitlines()[-1])
        if facts["torch"] is not None:
            break
    return facts


def tool(name: str) -> str | None:
    """Its path. cmake and ninja may be where pip puts them, in a virtual environment that nobody activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def architectures_here() -> list[str]:
    """Which of the default compute capabilities the cards of this machine run; none if one is not known, or of none."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    command = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    found = set()
    for line in told.splitlines():
        # Of its own generation the highest minor number that is not above its own.
        major, _, minor = line.strip().partition(".")
        runs = [x for x in DEFAULT_ARCHITECTURES if x[:-1] == major and minor.isdigit() and int(x[-1]) <= int(minor)]
        if not runs:
            return []
        found.add(runs[-1])
    return sorted(found, key=int)


def instruction_sets() -> list[str]:
    """Those that PMRL_KERNELS_ISAS asks for; none for all."""
    asked = os.environ.get("PMRL_KERNELS_ISAS", "").replace(",", " ").split()
    if asked != ["this"]:
        return asked
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return []
    flags = set(re.search(r"(?m)^flags\s*:(.*)$|\Z", cpuinfo)[0].split())
    # What csrc/cpu/dispatch.cpp asks for.
    if flags >= {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma", "f16c"}:
        return ["avx512"]
    return ["avx2"] if flags >= {"avx2", "fma", "f16c"} else ["baseline"]


def survey() -> dict[str, Any]:
    """What ``probe`` found, if that and the tools of this machine suffice for a build."""
    if REQUESTED == "0":
        raise NotBuiltError("PMRL_KERNELS_NATIVE=0 at installation")
    if REQUESTED not in ("", "1"):
        sys.exit(f"PMRL_KERNELS_NATIVE: got {REQUESTED!r}, wanted 0, 1 or nothing")
    if CUDA not in ("", "0", "1"):
        sys.exit(f"PMRL_KERNELS_CUDA: got {CUDA!r}, wanted 0, 1 or nothing")
    if not sys.platform.startswith("linux"):
        raise NotBuiltError(f"it is built on Linux only, not on {sys.platform}")
    facts = probe()
    if facts["torch"] is None:
        # pip keeps an installed version, and the wheels it made, whatever else changed; and forced, it would install
        # torch once more. Other tools isolate a build by an interpreter of its own, which leads to no other.
        raise NotBuiltError(
            f"torch was not found by {sys.executable} at installation; with torch installed, install this package "
            "again with pip's --force-reinstall --no-deps --no-cache-dir (--no-build-isolation, if it was there before)"
        )
    version = str(facts["version"])
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise NotBuiltError(
            f"it needs torch >= {'.'.join(map(str, OLDEST_TORCH))} at installation, which had {version}"
        )
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise NotBuiltError(f"no C++ compiler was found at installation (looked for {', '.join(compilers)})")
    if not tool("cmake"):
        raise NotBuiltError("cmake was not found at installation")
    return facts


def run(*command: str) -> None:
    """Runs it and passes its output on; a failure names the first error in it."""
    lines = []
    printable = sys.stdout.encoding or "utf-8"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            sys.stdout.write(line.encode(printable, "replace").decode(printable))
            lines.append(line.strip())
    if process.returncode:
        # CUDA's assembler sets its colons apart.
        at = next((i for i, line in enumerate(lines) if re.search(r"\b(error|fatal) *:|^CMake Error", line)), None)
        if at is None:
            told = lines[-1:]
        elif lines[at].startswith("CMake Error at"):
            told = lines[at + 1 : at + 6]  # the line itself only says where
        else:
            told = [lines[at]]
        message = " ".join(filter(None, told)) or f"exit status {process.returncode}"
        raise NotBuiltError(f"the compilation failed at installation: {message[:400]}")


class Build(build_ext):
    """One CMake build for all extensions, or none and the reason."""

    def get_ext_filename(self, fullname: str) -> str:
        # The library depends on no version of Python, and its name carries none.
        if fullname.endswith("libpmrl_kernels"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        package = Path(self.get_ext_fullpath(LIBRARY)).parent
        try:
            built, outcome = self._compile(survey()), "built"
        except (NotBuiltError, OSError) as error:
            for variable, asked in {"PMRL_KERNELS_NATIVE": REQUESTED, "PMRL_KERNELS_CUDA": CUDA}.items():
                if asked == "1":
                    sys.exit(f"{variable}=1, but the native library cannot be built: {error}")
            built, outcome = {}, str(error)
        self.extensions = [ext for ext in self.extensions if ext.name in built]
        # Without one the distribution is pure Python, to everything that asks from here on.
        self.distribution.ext_modules = self.extensions
        package.mkdir(parents=True, exist_ok=True)
        # What an earlier build left in place is not what the record is about to describe, unless it is of the same
        # sources: then it may be another environment's, whose test modules are for other versions of Python.
        found = package / binary.LIBRARY
        kept = package.resolve() == (ROOT / "pmrl_kernels").resolve() and binary.fits(found, ROOT)
        targets = {name: Path(self.get_ext_fullpath(name)) for name in built}
        if not kept:
            for stale in {found, *package.glob("_numerics*.so")} - {*targets.values()}:
                stale.unlink(missing_ok=True)
        for name, source in built.items():
            target = targets[name]
            # A running process may have the old file mapped: never write into it.
            temporary = target.with_name(target.name + ".new")
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
        if kept and not built:
            self.warn(f"no native library was built ({outcome}); the one in {package} stays, which is of these sources")
            outcome = f"built\nkept by a later build, which made none: {outcome}"
        # What this locale cannot spell came from a path or a variable, and goes back as it came.
        (package / binary.RECORD).write_text(outcome + "\n", encoding="utf-8", errors="surrogateescape")

    def _compile(self, facts: dict[str, Any]) -> dict[str, Path]:
        """The files built, by the name of their extension. The test module is for builds in place alone."""
        development = self.inplace or getattr(self, "editable_mode", False)
        build = ROOT / "build" / "native"
        cmake, ninja = str(tool("cmake")), tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        settings = [f"-DPMRL_TORCH_ROOT={facts['torch']}", f"-DPMRL_TORCH_VERSION={facts['version']}"]
        if development and facts["pybind11"]:
            settings += ["-DPMRL_NUMERICS=ON", f"-Dpybind11_DIR={facts['pybind11']}"]
            settings += [f"-DPython_EXECUTABLE={sys.executable}"]
        else:
            settings += ["-DPMRL_NUMERICS=OFF"]
        architectures = os.environ.get("PMRL_KERNELS_CUDA_ARCHITECTURES", "").replace(",", " ").split()
        if not architectures and development:
            architectures = architectures_here()  # not for what may go to other machines
        settings += [
            f"-DPMRL_ISAS={';'.join(instruction_sets())}",
            f"-DPMRL_CUDA={ {'': 'AUTO', '0': 'OFF', '1': 'ON'}[CUDA] }",
            f"-DPMRL_CUDA_REASON={'PMRL_KERNELS_CUDA=0 at installation' if CUDA == '0' else ''}",
            f"-DPMRL_CUDA_ARCHITECTURES={';'.join(architectures)}",
            f"-DPMRL_NVCC_HINTS={';'.join(os.path.dirname(path) for path in facts['nvcc'])}",
            f"-DPMRL_PTXAS={';'.join(facts['ptxas'])}",
        ]
        # The cache may name tools of an isolated environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = (cmake, *generator, "-S", str(ROOT), "-B", str(build), *settings)
        run(*configure)
        try:
            run(cmake, "--build", str(build), "--target", "cuda_images")
        except NotBuiltError as error:
            # That there is no compiler for CUDA is no failure. What one makes of the kernels, or does not, is no reason
            # to leave out those for CPUs.
            if CUDA == "1":
                raise
            self.warn(f"the library is built without kernels for CUDA: {error}")
            run(*configure, "-DPMRL_CUDA=OFF", f"-DPMRL_CUDA_REASON={error}")
        run(cmake, "--build", str(build))
        built = {LIBRARY: build / "libpmrl_kernels.so"}
        if "-DPMRL_NUMERICS=ON" in settings:
            built[TEST_MODULE] = next(build.glob("_numerics*.so"))
        return built


class Wheel(bdist_wheel):
    """py3-none-<platform>: the library needs the platform's C library and PyTorch's stable ABI, no Python."""

    def run(self) -> None:
        # Both are packed whole: what an earlier build left there would go with it. (Folders that someone named
        # instead may hold more than that.)
        for folder in (self.get_finalized_command("build").build_lib, self.bdist_dir):
            if (ROOT / "build").resolve() in Path(folder).resolve().parents:
                shutil.rmtree(folder, ignore_errors=True)
        super().run()

    def run_command(self, command: str) -> None:
        super().run_command(command)
        # Only now is it known whether there is a library.
        self.root_is_pure = not self.distribution.has_ext_modules()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


_CODE = r"^```.*?^```$|`[^`]*`"
_LINK = re.compile(_CODE + r"|(!?)\[([^\]]*)\]\((?!https?:)([^)\s]*)\)", re.MULTILINE | re.DOTALL)


def page(readme: str, source: str | None, version: str) -> str:
    """The README for where its neighbours are not, such as a page of a package index.

    What it links to and shows is looked for where the version's tag is in the repository at ``source``. Where there is
    none, links become their text, and images go. Captions stay: they say what was measured where.
    """

    def target(found: re.Match[str]) -> str:
        image, text, path = found.groups()
        if path is None:  # code
            return found[0]
        if source is None:
            return "" if image else text
        return f"{image}[{text}]({source}/{'raw' if image else 'blob'}/v{version}/{path})"

    return _LINK.sub(target, readme)


_project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_version = re.search(r'(?m)^__version__ = "(.+)"$', (ROOT / "pmrl_kernels/__init__.py").read_text(encoding="utf-8"))
setup(
    long_description=page(
        (ROOT / "README.md").read_text(encoding="utf-8"), _project.get("urls", {}).get("Source"), _version[1]
    ),
    long_description_content_type="text/markdown",
    ext_modules=[Extension(LIBRARY, []), Extension(TEST_MODULE, [])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
