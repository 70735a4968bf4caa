"""What goes to a package index: `make sdist`, `make wheel`, `make release`.

    python tests/tools/release.py sdist      the source distribution, which then builds and tests itself elsewhere
    python tests/tools/release.py wheel      a wheel that an index accepts, tried in environments without compilers
    python tests/tools/release.py release    both and the checks of a release; says how to upload, and uploads nothing

All leave what they make in dist/, and end with a reason where something is not as it must be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script has its own folder there

from tests.tools.environments import faults, try_wheel, try_wheel_with  # noqa: E402

DIST = ROOT / "dist"
# What torch's own wheels for Linux are, from the oldest supported one on: with an older tag nothing would be gained.
GLIBC = (2, 28)
POLICY = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
OF_TORCH = ("libtorch", "libc10")
PYTHONS = range(10, 20)
# In the repository, and of no use outside it.
NOT_DISTRIBUTED = re.compile(r"\.ci/|\.gitignore$")
# What setuptools writes into a source distribution.
WRITTEN = re.compile(r"PKG-INFO$|setup\.cfg$|pmrl_kernels\.egg-info/")
# Of the unpacked source distribution, on the library that was built of it: its symbols, and of the contract a sample.
QUICK = ["tests/packaging/test_library.py", "tests/packaging/test_layers.py", "tests/contract", "tests/api"]


def run(*command: str | Path, cwd: Path = ROOT, **settings: str) -> None:
    """Ends this program where the command fails, which has said why."""
    words = list(map(str, command))
    print("$", shlex.join(words), flush=True)
    if code := subprocess.run(words, cwd=cwd, env={**os.environ, **settings}).returncode:
        sys.exit(f"{shlex.join(words)}: exit status {code}")


def said_by(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True, text=True).stdout


# ---- the source distribution --------------------------------------------------------------------


def misfits(distributed: set[str], tracked: set[str]) -> list[str]:
    """What a source distribution lacks of the repository's files, and what it has beyond them."""
    wanted = {name for name in tracked if not NOT_DISTRIBUTED.match(name)}
    found = [f"{name} is missing: see MANIFEST.in" for name in sorted(wanted - distributed)]
    return found + [f"{name} is not in git" for name in sorted(distributed - wanted) if not WRITTEN.match(name)]


def source_distribution() -> Path:
    for old in DIST.glob("*.tar.gz"):
        old.unlink()
    # setuptools adds what an earlier list of sources names to what MANIFEST.in says.
    shutil.rmtree(ROOT / "pmrl_kernels.egg-info", ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ".")
    (archive,) = DIST.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    tracked = set(said_by("git", "ls-files", "-z").split("\0")) - {""}
    if found := misfits(names, tracked):
        sys.exit(f"{archive.name}: " + "; ".join(found))
    print(f"{archive.name}: {len(names)} files")
    return archive


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def try_quickly(source: Path, wheel: Path) -> None:
    """A few of a source's own tests, on the library in the wheel that was built of it."""
    with zipfile.ZipFile(wheel) as file:
        for name in ("libpmrl_kernels.so", "native_build.txt"):
            file.extract(f"pmrl_kernels/{name}", source)
    # Whatever a test starts finds this package, too, and not the one that the environment has.
    chosen = ["-m", "not slow", "--every", "40", "-p", "no:cacheprovider", "-q"]
    run(sys.executable, "-m", "pytest", *QUICK, *chosen, cwd=source, PYTHONPATH=str(source))


# ---- the wheel ----------------------------------------------------------------------------------


def built_wheel(source: Path, folder: Path) -> Path:
    """A wheel of pure Python is no answer here, whatever the reason."""
    options = ("--no-build-isolation", "--no-deps", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, source, PMRL_KERNELS_NATIVE="1")
    (wheel,) = folder.glob("*.whl")
    if found := faults(wheel):
        sys.exit(f"{wheel.name}: " + "; ".join(found))
    return wheel


def objections(told: dict[str, Any]) -> list[str]:
    """What auditwheel's report on a wheel says against the policy.

    Its overall tag is of no use here: it counts torch's libraries, which the wheel does not hold, as missing.
    """
    found = []
    oldest = re.fullmatch(r"manylinux_2_(\d+)_\w+", told["sym_tag"])
    if oldest is None or int(oldest[1]) > GLIBC[1]:
        found.append(f"symbols: wanted those of {POLICY}, got {told['sym_tag']} by {told['versioned_symbols']}")
    if strangers := sorted(name for name in told["external_libs"] if not name.startswith(OF_TORCH)):
        found.append(f"libraries: wanted torch's and those that every system has, got {', '.join(strangers)}")
    if told["unsupported_isa"]:
        found.append("instructions: wanted those of every processor outside the kernels' own sets")
    return found


def tagged(wheel: Path) -> Path:
    """The wheel in dist/, under the tag of the policy that its symbols keep to, on processors where that was tried."""
    DIST.mkdir(exist_ok=True)
    for old in DIST.glob("*.whl"):
        old.unlink()
    if platform.machine() != "x86_64":
        print(
            f"{platform.machine()}: which symbols the library has there was not tried, and the wheel keeps its tag, "
            "which no package index accepts; auditwheel may say what it is"
        )
        return Path(shutil.copy(wheel, DIST))
    # torch's libraries are in the process before this one is.
    excluded = [word for name in OF_TORCH for word in ("--exclude", f"{name}*.so")]
    auditwheel = (sys.executable, "-m", "auditwheel")
    run(*auditwheel, "repair", "--plat", POLICY, "--only-plat", *excluded, "-w", DIST, wheel)
    (found,) = DIST.glob("*.whl")
    told = json.loads(said_by(*auditwheel, "show", "--json", found))
    if wrong := faults(found, POLICY) + objections(told):
        sys.exit(f"{found.name}: " + "; ".join(wrong))
    symbols = ", ".join(f"{name} {' '.join(of)}" for name, of in told["versioned_symbols"].items())
    print(f"{found.name}\n  auditwheel: its symbols would do for {told['sym_tag']}: {symbols}", flush=True)
    return found


def pythons() -> list[str]:
    """The interpreters on the PATH that this package is for, and this one, from the oldest to the newest."""
    found = {sys.version_info[:2]: sys.executable}
    for name in (f"python3.{minor}" for minor in PYTHONS):
        path = shutil.which(name)
        if path is None or subprocess.run([path, "-c", "import venv"], capture_output=True).returncode:
            continue
        version = (3, int(name.partition(".")[2]))
        found.setdefault(version, path)
    return [found[version] for version in sorted(found)]


def oldest_torch() -> str:
    pinned = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    return re.search(r"(?m)^torch==\S+", pinned)[0]


def smoke(wheel: Path, fetch: bool) -> None:
    """Where nothing can be compiled: with this torch; with the oldest supported one, and the newest that there is."""
    tag = POLICY if POLICY in wheel.name else None
    with tempfile.TemporaryDirectory() as folder:
        print(try_wheel(wheel, Path(folder), tag), flush=True)
    if not fetch:
        print("other versions of torch were not fetched, and not tried")
        return
    interpreters = pythons()
    for interpreter, torch in ((interpreters[0], oldest_torch()), (interpreters[-1], "torch")):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{interpreter}, {torch}:")
            print(try_wheel_with(torch, interpreter, wheel, Path(folder)), flush=True)


# ---- a release ----------------------------------------------------------------------------------


def version() -> str:
    text = (ROOT / "pmrl_kernels" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'(?m)^__version__ = "(.+)"$', text)[1]


def unready(number: str, changelog: str, status: str) -> list[str]:
    """Why what is in the repository is no release: its changelog has no section or no date, or git is not clean."""
    found = []
    heading = re.search(rf"(?m)^## {re.escape(number)}(?: (.*))?$", changelog)
    if heading is None:
        found.append(f"CHANGELOG.md: wanted a section '## {number}', as in pmrl_kernels/__init__.py, found none")
    elif not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)", heading[1] or ""):
        found.append(f"CHANGELOG.md: wanted the day of the release, '## {number} (YYYY-MM-DD)', got {heading[0]!r}")
    if status:
        found.append(f"git: wanted a clean checkout, got {'; '.join(status.splitlines()[:5])}")
    return found


def release(rehearse: bool, fetch: bool) -> None:
    number = version()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    reasons = unready(number, changelog, said_by("git", "status", "--porcelain"))
    if reasons and not rehearse:
        sys.exit("\n".join([*reasons, "ARGS=--rehearse goes on all the same"]))
    for arguments in (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)):
        run(sys.executable, "-m", *arguments)
    archive = source_distribution()
    with tempfile.TemporaryDirectory() as folder:
        source = unpacked(archive, Path(folder) / "source")
        # Of what the source distribution holds, and of nothing else.
        built = built_wheel(source, Path(folder) / "wheel")
        try_quickly(source, built)
        wheel = tagged(built)
    for name in (archive.name, wheel.name):
        if f"pmrl_kernels-{number}" not in name:
            sys.exit(f"{name}: wanted the version {number}")
    smoke(wheel, fetch)
    run(sys.executable, "-m", "twine", "check", "--strict", archive, wheel)
    print()
    for path in (archive, wheel):
        code = path.read_bytes()
        print(f"{path.name}\n  {len(code) / 2**20:.2f} MiB, SHA-256 {hashlib.sha256(code).hexdigest()}")
    print("Nothing was uploaded. What would be run:")
    print(f"  python -m twine upload {archive.relative_to(ROOT)} {wheel.relative_to(ROOT)}")
    if reasons:
        print("A rehearsal. A release it is not, for:", *reasons, sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sdist", "wheel", "release"])
    parser.add_argument("--rehearse", action="store_true", help="a release in a checkout that is not ready for one")
    parser.add_argument("--no-fetch", action="store_true", help="the wheel is tried with the installed torch alone")
    options = parser.parse_args()
    if options.what == "release":
        return release(options.rehearse, not options.no_fetch)
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "wheel":
            # The objects are those of `make build`.
            smoke(tagged(built_wheel(ROOT, Path(folder))), not options.no_fetch)
        else:
            source = unpacked(source_distribution(), Path(folder) / "source")
            try_quickly(source, built_wheel(source, Path(folder) / "wheel"))


if __name__ == "__main__":
    main()
