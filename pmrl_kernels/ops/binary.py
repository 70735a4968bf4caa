"""The compiled library as a file: what can be told of it without loading it.

setup.py runs this file too, by itself and where there may be no torch, so it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

LIBRARY = "libpmrl_kernels.so"
RECORD = "native_build.txt"  # what setup.py wrote about its outcome

SOURCES = ("h", "cpp", "cu", "cuh", "S", "in", "cmake")
"""What CMakeLists.txt takes the sources of a library to be called at their ends."""

_HEADER = struct.Struct("<32xQQ6xHHHH2x")  # of ELF: where its tables are, how long an entry is and how many there are
_SEGMENT = struct.Struct("<8xQ16xQ16x")  # where in the file, and how much of it


def damage(library: Path) -> str | None:
    """How much of it is missing, or None where the file holds all that its own headers speak of.

    A loader maps what they say, and the process ends where it touches a page beyond the end of the file. What is no
    64-bit ELF file at all is left to the loader, which refuses it.
    """
    with library.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:6] != b"\x7fELF\x02\x01":
            return None
        segments, sections, segment_size, n_segments, section_size, n_sections = _HEADER.unpack(header)
        file.seek(segments)
        table = file.read(segment_size * n_segments)
    ends = [segments + segment_size * n_segments, sections + section_size * n_sections]
    if segment_size == _SEGMENT.size and len(table) == segment_size * n_segments:
        ends += map(sum, _SEGMENT.iter_unpack(table))
    size = library.stat().st_size
    return f"it ends after {size} of {max(ends)} bytes" if size < max(ends) else None


def source_hash(root: Path) -> str:
    """What CMakeLists.txt computes of the sources below ``root`` and builds into the library."""
    files = sorted(
        str(path.relative_to(root))
        for path in (root / "CMakeLists.txt", *(x for end in SOURCES for x in root.glob(f"csrc/**/*.{end}")))
    )
    digests = "".join(f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n" for name in files)
    return hashlib.sha256(digests.encode()).hexdigest()


def outdated(sources: str, root: Path) -> bool:
    """Whether ``root`` holds this project's sources, and others than those of the hash ``sources``.

    Beside an installed package there may be anything: a folder csrc or a CMakeLists.txt of someone else's.
    """
    try:
        ours = "project(pmrl_kernels " in (root / "CMakeLists.txt").read_text(encoding="utf-8", errors="replace")
        return ours and sources != source_hash(root)
    except OSError:  # what cannot be read cannot be told from what it was
        return False


def fits(library: Path, root: Path) -> bool:
    """Whether it is whole and was built from the sources below ``root``."""
    return library.is_file() and damage(library) is None and source_hash(root).encode() in library.read_bytes()
