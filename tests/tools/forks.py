"""Python processes that have torch imported from the start, which takes them longer than most of what they are for.

They are forks of one process per test run, and end as any other does. Each imports this package itself.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = """
import json, os, sys, types
import torch

for line in sys.stdin.buffer:
    code, folder, variables, files = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_TRUNC), stream)
    if folder is not None:
        os.chdir(folder)
    dropped = os.environ.get("PYTHONPATH", "").split(os.pathsep) if "PYTHONPATH" not in variables else ()
    sys.path[1:] = [path for path in sys.path[1:] if path not in dropped]
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in variables
    os.environ.clear()
    os.environ.update(variables)
    break
else:
    sys.exit()
sys.modules["__main__"] = main = types.ModuleType("__main__")
exec(compile(code, "<string>", "exec"), main.__dict__)
"""


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def end() -> None:
        server.communicate()

    atexit.register(end)
    return server


def run(code: str, folder: Path | None, variables: Mapping[str, str], timeout: int) -> subprocess.CompletedProcess[str]:
    """What ``python -c code`` is in that folder, with these variables of the environment alone."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        request = [code, None if folder is None else str(folder), dict(variables), [out.name, err.name]]
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            _server.cache_clear()
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
            for child in map(int, children):
                os.killpg(child, signal.SIGKILL)
            server.kill()
            raise subprocess.TimeoutExpired(code, timeout, out.read(), err.read())
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(["python", "-c", code], status, out.read(), err.read())
