"""Fresh virtual environments for what installs this package: the tests of packaging, and `make wheel`.

    python tests/tools/environments.py dist/pmrl_kernels-0.1.0-py3-none-linux_x86_64.whl

installs that wheel into one and has smoke.py try it there, with no compiler, cmake or ninja to be found.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

SMOKE = Path(__file__).resolve().with_name("smoke.py")
TORCH = ("torch", "torchgen", "functorch")
# Settings that someone running the tests may have made, and that what is tested here depends on.
_SETTINGS = ("PMRL_KERNELS_", "PYTHON", "CXX", "LD_PRELOAD")


def libraries(folder: Path, without: Iterable[str] = ()) -> Path:
    """Links to what is installed beside torch, but for ``without`` and for this package.

    Torch takes minutes and a network to install; links take neither. They are to single packages, as the folder
    itself would bring along the package under test: pip finds its metadata there, of the editable installation that
    development uses, and takes it to be installed already.
    """
    folder.mkdir()
    hidden = {*without, "pmrl_kernels"}
    for entry in Path(torch.__file__).parent.parent.iterdir():
        name = entry.name.split("-")[0]  # also of a package's metadata, torch-2.13.0.dist-info
        if name not in hidden and not name.startswith("__editable__") and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


class Environment:
    """A virtual environment that has ``others`` and what is installed into it."""

    def __init__(self, folder: Path, others: Path) -> None:
        # Without pip of its own, which takes ten times as long; `pip` below serves any interpreter.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.interpreter = folder / "bin" / "python"
        self.site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        self.use(others)

    def use(self, others: Path) -> None:
        (self.site / "others.pth").write_text(f"{others}\n")

    def pip(self, *arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-m", "pip", "--python", self.interpreter, *arguments], settings)

    def python(self, *arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        """-I: neither the folder this runs in nor PYTHONPATH must offer another copy of the package."""
        return self._run([self.interpreter, "-I", *arguments], settings)

    def _run(self, command: list[str | Path], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
        return subprocess.run(
            list(map(str, command)),
            env={**inherited, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.site,
        )


def faults(wheel: Path) -> list[str]:
    """What a wheel with the native library must not be, hold or lack, as far as a look inside shows."""
    names = set(zipfile.ZipFile(wheel).namelist())
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    found = []
    if not wheel.name.endswith(f"-py3-none-{platform}.whl"):
        found.append(f"its name: wanted the tag py3-none-{platform}, got {wheel.name}")
    for name in ("__init__.py", "py.typed", "libpmrl_kernels.so", "native_build.txt", "ops/native.py"):
        if f"pmrl_kernels/{name}" not in names:
            found.append(f"pmrl_kernels/{name} is missing")
    binaries = {name for name in names if name.endswith((".so", ".o", ".a", ".pyc"))}
    if binaries - {"pmrl_kernels/libpmrl_kernels.so"}:
        found.append(f"compiled files that are not the library: {sorted(binaries)}")
    strangers = {name.split("/")[0] for name in names if not name.split("/")[0].startswith("pmrl_kernels")}
    if strangers:
        found.append(f"what is not the package's: {sorted(strangers)}")
    return found


def try_wheel(wheel: Path, folder: Path) -> str:
    """What smoke.py says of the wheel in a fresh environment; raises unless all is well."""
    if found := faults(wheel):
        raise RuntimeError(f"{wheel.name}: " + "; ".join(found))
    environment = Environment(folder / "environment", libraries(folder / "libraries"))
    installed = environment.pip("install", "--no-index", wheel)
    if installed.returncode:
        raise RuntimeError(installed.stdout)
    # With a PATH that leads nowhere nothing can be compiled, nor any other program started.
    (folder / "nothing").mkdir()
    told = environment.python(SMOKE, PATH=str(folder / "nothing"))
    if told.returncode:
        raise RuntimeError(told.stdout)
    return told.stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(try_wheel(Path(sys.argv[1]).resolve(), Path(folder)), end="")
