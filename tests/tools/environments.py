"""Fresh virtual environments for what installs this package: the tests of packaging, and release.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
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
    """A virtual environment, of this interpreter or another, that has ``others`` and what is installed into it."""

    def __init__(self, folder: Path, others: Path | None = None, interpreter: str = sys.executable) -> None:
        # Without pip of its own, which takes ten times as long; `pip` below serves any interpreter.
        subprocess.run([interpreter, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.interpreter = folder / "bin" / "python"
        (self.site,) = (folder / "lib").glob("python*/site-packages")
        if others is not None:
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


def faults(wheel: Path, tag: str | None = None) -> list[str]:
    """What a wheel with the native library must not be, hold or lack, as far as a look inside shows.

    ``tag`` is the platform's, without it that of a wheel which was only built.
    """
    names = set(zipfile.ZipFile(wheel).namelist())
    tag = tag or sysconfig.get_platform().replace("-", "_").replace(".", "_")
    found = []
    if not wheel.name.endswith(f"-py3-none-{tag}.whl"):
        found.append(f"its name: wanted the tag py3-none-{tag}, got {wheel.name}")
    for name in ("__init__.py", "py.typed", "libpmrl_kernels.so", "native_build.txt", "ops/native.py"):
        if f"pmrl_kernels/{name}" not in names:
            found.append(f"pmrl_kernels/{name} is missing")
    binaries = {name for name in names if re.search(r"\.(so(\.[\d.]+)?|o|a|pyc)$", name)}
    if others := sorted(binaries - {"pmrl_kernels/libpmrl_kernels.so"}):
        found.append(f"compiled files that are not the library: {others}")
    ours = re.compile(r"pmrl_kernels(-[^/]*\.dist-info)?/")
    if strangers := {name.split("/")[0] for name in names if not ours.match(name)}:
        found.append(f"what is not the package's: {sorted(strangers)}")
    return found


def try_wheel(wheel: Path, folder: Path, tag: str | None = None) -> str:
    """What smoke.py says of the wheel in a fresh environment with this one's torch; raises unless all is well."""
    if found := faults(wheel, tag):
        raise RuntimeError(f"{wheel.name}: " + "; ".join(found))
    environment = Environment(folder / "environment", libraries(folder / "libraries"))
    return _smoke(environment, folder, "--no-index", wheel)


def try_wheel_with(torch_wanted: str, interpreter: str, wheel: Path, folder: Path) -> str:
    """The same with another Python, and with the torch that pip installs there for ``torch_wanted``."""
    return _smoke(Environment(folder / "environment", interpreter=interpreter), folder, torch_wanted, wheel)


def _smoke(environment: Environment, folder: Path, *installing: str | Path) -> str:
    installed = environment.pip("install", *installing)
    if installed.returncode:
        raise RuntimeError(installed.stdout)
    # With a PATH that leads nowhere nothing can be compiled, nor any other program started.
    (folder / "nothing").mkdir()
    told = environment.python(SMOKE, PATH=str(folder / "nothing"))
    if told.returncode:
        raise RuntimeError(told.stdout)
    return told.stdout
