"""docs/quickstart.ipynb runs from the top, and what is stored in it is what comes out."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

import nbformat
import pytest
from nbformat import NotebookNode

from tests.tools.notebook import QUICKSTART, ROOT, executed

NUMBER = re.compile(r"\d+(?:\.\d+)?")
CELLS = 12, 18  # short enough to be read in one go


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def printed(notebook: NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


@pytest.fixture(scope="module")
def stored() -> NotebookNode:
    return nbformat.read(QUICKSTART, as_version=4)


@pytest.fixture(scope="module")
def fresh() -> NotebookNode:
    return executed(QUICKSTART)


def test_it_is_stored_as_it_ran(stored):
    """Whole, once from the top, nothing on stderr, and nothing of whose machine it was."""
    nbformat.validate(stored)
    assert CELLS[0] <= len(stored.cells) <= CELLS[1]
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(cell.metadata for cell in stored.cells)
    assert {output.get("name", "stdout") for output in outputs(stored)} == {"stdout"}
    text = QUICKSTART.read_text(encoding="utf-8")
    for private in (str(ROOT), "/home/", "/tmp/", "/root/", "iopub", "created_at"):
        assert private not in text
    assert len(text) < 200_000


def test_every_page_it_names_exists(stored):
    prose = "".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    linked, named = re.findall(r"\]\(([^)]+)\)", prose), re.findall(r"`(examples/[^`]+)`", prose)
    assert len(linked) >= 4
    assert named
    assert all((QUICKSTART.parent / path).is_file() for path in linked)
    assert all((ROOT / path).is_file() for path in named)


def test_it_runs_and_prints_what_is_stored(fresh, stored):
    """But for what another processor or release rounds otherwise: numbers may be off by a twentieth, and figures by
    their pixels."""
    one, other = printed(fresh), printed(stored)
    assert NUMBER.sub("#", one).split() == NUMBER.sub("#", other).split()
    for a, b in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True):
        assert float(a) == pytest.approx(float(b), rel=0.05, abs=0.05)
    for notebook in (fresh, stored):
        pictures = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
        assert len(pictures) == 1
        png = base64.b64decode(pictures[0])
        assert png.startswith(b"\x89PNG")
        assert len(png) > 10_000


def test_what_it_says_of_training_is_so(fresh):
    """Views agree far better than at the start, scans are found, and a model that never saw a scan
    whole finds most of what the other does."""
    steps = re.findall(r"step +(\d+) +alignment score ([\d.]+) +R@1 ([\d.]+)", printed(fresh))
    (_, first, found_at_first), *_, (_, last, found_at_last) = steps
    assert float(first) < 0.7 < 0.85 < float(last)
    assert float(found_at_first) < 0.02 < 0.5 < float(found_at_last)
    [(partial, whole)] = re.findall(r"R@1 ([\d.]+), trained on whole scans ([\d.]+)", printed(fresh))
    assert whole == found_at_last
    assert float(partial) > 0.5 * float(whole)
