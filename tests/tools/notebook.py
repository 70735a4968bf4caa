"""Runs docs/quickstart.ipynb from the top and stores what comes out, without times and paths.

    python tests/tools/notebook.py

The suite runs it too, and compares (tests/programs/test_quickstart.py).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = ROOT / "docs" / "quickstart.ipynb"


def executed(path: Path, timeout: int = 120) -> NotebookNode:
    """The notebook after a run in a process of its own, in the checkout's folder. A cell that raises, raises here."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # One thread in every library, so that figures are the same wherever it runs; and what users have set for IPython
    # and matplotlib is no part of it.
    with tempfile.TemporaryDirectory() as folder:
        settings = {"IPYTHONDIR": folder, "MPLCONFIGDIR": folder, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        # The kernel is spoken to by sockets in this folder, and not by the machine's ports.
        manager = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        client = NotebookClient(
            notebook,
            timeout=timeout,
            resources={"metadata": {"path": str(ROOT)}},
            record_timing=False,
            coalesce_streams=True,
            config=Config({"KernelManager": manager}),
        )
        client.execute(env={**os.environ, **settings})
    for cell in notebook.cells:
        cell.metadata.clear()
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(QUICKSTART), QUICKSTART)
    sys.stdout.write(f"{QUICKSTART.relative_to(ROOT)} is what came out\n")
