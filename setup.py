"""Builds the native library where torch and a C++ compiler are at hand, else installs pure Python.

What happened is recorded in ``pmrl_kernels/native_build.txt`` and shown by ``python -m pmrl_kernels.info``.

    PMRL_KERNELS_NATIVE=1   a native build that cannot be made is an error
    PMRL_KERNELS_NATIVE=0   no native build is tried

Everything else about the package is in pyproject.toml, everything about the compilation in CMakeLists.txt.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
LIBRARY = "pmrl_kernels.libpmrl_kernels"
DOOR = "pmrl_kernels._numerics"
RECORD = "native_build.txt"
OLDEST_TORCH = (2, 10)
REQUESTED = os.environ.get("PMRL_KERNELS_NATIVE", "")
BUILT = "built"

# Under build isolation this process does not see the environment that the package is installed into. A new
# one of the same interpreter, which ignores PYTHONPATH and the like, does.
_PROBE = """
import json, importlib.util
found = importlib.util.find_spec("torch")
facts = {"torch": None, "pybind11": None}
if found is not None:
    from importlib.metadata import version
    facts["torch"] = found.submodule_search_locations[0]
    facts["version"] = version("torch")
if importlib.util.find_spec("pybind11") is not None:
    import pybind11
    facts["pybind11"] = pybind11.get_cmake_dir()
print(json.dumps(facts))
"""


def probe() -> dict[str, str | None]:
    """Where the target interpreter has torch and pybind11."""
    done = subprocess.run([sys.executable, "-I", "-c", _PROBE], capture_output=True, text=True)
    if done.returncode:
        return {"torch": None, "pybind11": None}
    facts: dict[str, str | None] = json.loads(done.stdout)
    return facts


def obstacle(facts: dict[str, str | None]) -> str | None:
    """Why no native library can be built here, or None."""
    if REQUESTED == "0":
        return "PMRL_KERNELS_NATIVE=0 at installation"
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, not on {sys.platform}"
    if facts["torch"] is None:
        return f"torch was not found by {sys.executable} at installation; install torch first, then this package again"
    version = str(facts["version"])
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        return f"it needs torch >= 2.10 at installation, which had {version}"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler was found at installation ({', '.join(compilers)})"
    if not shutil.which("cmake"):
        return "cmake was not found at installation"
    return None


facts = probe()
reason = obstacle(facts)
if REQUESTED == "1" and reason is not None:
    sys.exit(f"PMRL_KERNELS_NATIVE=1, but the native library cannot be built: {reason}")


class Build(build_ext):
    """One CMake build for all extensions; no file name carries a Python version, as none depends on one."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libpmrl_kernels"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        development = self.inplace or getattr(self, "editable_mode", False)
        self.extensions = [ext for ext in self.extensions if ext.name == LIBRARY or (development and facts["pybind11"])]
        try:
            built = self._compile([ext.name for ext in self.extensions])
        except (subprocess.CalledProcessError, OSError) as error:
            if REQUESTED == "1":
                raise
            self._record(f"the compilation failed at installation: {error}")
            self.extensions = []
            return
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A running process may have the old file mapped: never write into it.
            temporary = target.with_name(target.name + ".new")
            shutil.copyfile(built[ext.name], temporary)
            os.replace(temporary, target)
        self._record(BUILT)

    def _compile(self, names: list[str]) -> dict[str, Path]:
        build = ROOT / "build" / "native"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        settings = [f"-DPMRL_TORCH_ROOT={facts['torch']}", f"-DPMRL_TORCH_VERSION={facts['version']}"]
        if DOOR in names:
            settings += ["-DPMRL_NUMERICS=ON", f"-Dpybind11_DIR={facts['pybind11']}"]
            settings += [f"-DPython_EXECUTABLE={sys.executable}"]
        else:
            settings += ["-DPMRL_NUMERICS=OFF"]
        # The cache may name tools of an isolated environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(["cmake", *generator, "-S", str(ROOT), "-B", str(build), *settings], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        results = {LIBRARY: build / "libpmrl_kernels.so"}
        if DOOR in names:
            results[DOOR] = next(build.glob("_numerics*.so"))
        return results

    def _record(self, outcome: str) -> None:
        folder = Path(self.get_ext_fullpath(LIBRARY)).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(outcome + "\n")


class Sources(build_py):
    """Leaves the reason where there is nothing to build."""

    def run(self) -> None:
        super().run()
        if reason is not None:
            folder = ROOT if getattr(self, "editable_mode", False) else Path(self.build_lib)
            (folder / "pmrl_kernels").mkdir(parents=True, exist_ok=True)
            (folder / "pmrl_kernels" / RECORD).write_text(reason + "\n")
            for stale in (folder / "pmrl_kernels").glob("libpmrl_kernels.so"):
                stale.unlink()  # of an earlier build, or the record would not be true


class Wheel(bdist_wheel):
    """py3-none-<platform>: the library needs the platform's C library and PyTorch's stable ABI, no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", platform if self.distribution.has_ext_modules() else "any")


setup(
    ext_modules=[] if reason else [Extension(LIBRARY, []), Extension(DOOR, [])],
    cmdclass={"build_ext": Build, "build_py": Sources, "bdist_wheel": Wheel},
)
