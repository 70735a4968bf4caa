"""The Python blocks of README.md and of the pages in docs/, and what becomes of each.

Blocks of a page run in order, in one namespace, as a reader pastes them. A comment above a block says otherwise:

    <!-- needs: lightning -->        runs where these modules are installed (`make integrations` has them)
    <!-- run by two processes -->    in both, after the blocks above it that need nothing; in a group, if it makes none
    <!-- not run: WHY -->
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pmrl_kernels
from tests import ROOT

COLUMN = 88  # characters that a column of the site holds
TWO = "run by two processes"
BLOCK = re.compile(
    r"(?:^<!-- *(.*?) *-->\n+)?^( *)(`{3,}) *(?:python|py)\b[^\n]*\n(.*?)^\2\3 *$", re.DOTALL | re.MULTILINE
)

# A group is found in a way of its own. The interpreter's end is left out: gloo's threads can abort it where anything
# still refers to a group (docs/distributed.md), and caches of sharded tensors do.
EACH = """
import os, pathlib, runpy, sys
import torch.distributed as dist
import torch.distributed.nn

for path in sys.argv[1:]:
    if "init_process_group" not in pathlib.Path(path).read_text():
        dist.init_process_group("gloo", f"file://{path}.group", rank=int(os.environ["RANK"]), world_size=2)
    runpy.run_path(path, run_name="__main__")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


class Block(NamedTuple):
    line: int  # of its page
    said: str  # in the comment above it, "" without one
    code: str

    @property
    def needs(self) -> list[str]:
        head, _, names = self.said.partition("needs:")
        return [] if head or not names else re.split(r", *", names.strip())

    @property
    def why_not(self) -> str:
        head, _, why = self.said.partition("not run:")
        return "" if head else why.strip()

    def runs(self) -> bool:
        """In this process, after the blocks above it."""
        return not self.why_not and self.said != TWO and all(map(importlib.util.find_spec, self.needs))


def pages() -> list[Path]:
    """Those that have such blocks."""
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if blocks(path)]


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [Block(text.count("\n", 0, x.start(4)), x[1] or "", x[4]) for x in BLOCK.finditer(text)]


def problems(block: Block) -> Iterator[str]:
    """What can be told without running it."""
    if block.said and not (block.needs or block.why_not or block.said == TWO):
        yield f"is neither run nor has a reason: {block.said}"
    try:
        tree = ast.parse(block.code)
    except SyntaxError as error:
        yield f"does not compile: {error}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "pmrl_kernels":
            yield from (f"there is no pmrl_kernels.{x.name}" for x in node.names if not hasattr(pmrl_kernels, x.name))
    yield from (f"is wider than {COLUMN}: {line}" for line in block.code.splitlines() if len(line) > COLUMN)


def run(path: Path) -> Iterator[dict[str, Any]]:
    """Blocks of a page, one after the other; the names after each. Errors say the line of the page."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path):
        if block.runs():
            exec(compile("\n" * block.line + block.code, str(path), "exec"), names)
            yield names


def programs_of_two(path: Path) -> Iterator[str]:
    """A block that two processes run, below what the page has before it."""
    before = ""
    for block in blocks(path):
        if block.said == TWO:
            yield before + block.code
        elif not block.said:
            before += block.code + "\n"


def run_by_two(programs: Iterable[str], folder: Path) -> list[str]:
    """One after the other, as torchrun starts them, but in the same two processes; what these say in the end."""
    paths = []
    for i, program in enumerate(programs):
        paths.append(folder / f"{i}.py")
        paths[-1].write_text(program, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", EACH, *map(str, paths)],
            env={**os.environ, **where, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [text if process.returncode else "" for process, text in zip(started, said, strict=True)]
