"""The documentation is whole: public names, pages and results have their places, and links within it lead somewhere.

What of it needs Sphinx (whether pages render, and whether the site's links do) `make docs` checks.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pmrl_kernels
from tests import ROOT

DOCS = ROOT / "docs"
SKIPPED = {".git", "build", "dist", "output"}  # built or fetched, with .venv and its like


def texts() -> list[Path]:
    """Every Markdown file of the checkout."""
    found = []
    for folder, inner, files in os.walk(ROOT):
        inner[:] = [x for x in inner if x not in SKIPPED and not x.startswith(".")]
        found += [Path(folder) / x for x in files if x.endswith(".md")]
    return sorted(found)


def without_code(text: str) -> str:
    """Markdown less its fences, indented blocks and code spans, where brackets are no links."""
    text = re.sub(r"^(`{3,})[^`\n]*\n.*?^\1`*[ ]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?:\A|(?<=\n\n))(?: {4}.*\n?)+", "", text)
    return re.sub(r"`[^`\n]*`", "", text)


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """Of the headings of a Markdown file, as code hosts and the site make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        same = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", x) is not None for x in found)
        found.add(f"{slug}-{same}" if same else slug)
    return frozenset(found)


def broken(path: Path) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue  # elsewhere: `make docs-links`
        name, _, anchor = target.partition("#")
        file = path if not name else path.parent / name
        if not file.exists():
            wrong.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors(file.resolve()):
            wrong.append(f"{target}: no such heading in {file.name}")
    return wrong


@pytest.mark.parametrize("path", texts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_within_the_repository(path):
    assert broken(path) == []


def test_broken_links_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `x`\n\n[a](#one-x) [b](#two) [c](gone.md) [d](page.md#one-x)\n\n    [e](gone.md)\n\n`[f](gone.md)`\n"
    )
    assert broken(page) == ["#two: no such heading in page.md", "gone.md: there is no such file"]


def test_the_check_of_a_site_sees_what_is_broken(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a href="b.html#gone">2</a><a href="c.html">3</a>')
    (tmp_path / "b.html").write_text(
        '<p id="here"><img src="https://example.org/x.png"><a href="https://example.org">4</a>'
    )
    (tmp_path / "s.css").write_text("p { background: url(x.png) }")
    run = subprocess.run(
        [sys.executable, DOCS / "site/check.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stdout.splitlines() == [
        "a.html: b.html#gone: the page has no such anchor",
        "a.html: c.html: there is no such file",
        "b.html: loads https://example.org/x.png, which is not of this site",
        "s.css: x.png: there is no such file",
        "2 pages, 4 links within the site, 4 of them broken",
    ]


def described() -> dict[str, list[str]]:
    """By name, the pages of docs/api that describe it."""
    found: dict[str, list[str]] = {}
    for page in sorted((DOCS / "api").glob("*.rst")):
        for name in re.findall(
            r"^\.\. auto(?:function|class):: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            found.setdefault(name, []).append(page.name)
    return found


def test_every_public_name_is_in_the_reference_once():
    pages = described()
    assert {name: pages.get(name, []) for name in pmrl_kernels.__all__ if len(pages.get(name, [])) != 1} == {}


def test_every_page_is_in_a_list_of_pages():
    """And nothing is listed that is not there, but what a notebook or a folder of programs brings along."""
    listed: set[Path] = set()
    sources = {*DOCS.rglob("*.md"), *DOCS.rglob("*.rst"), *DOCS.rglob("*.ipynb")}
    for path in sources:
        text = path.read_text(encoding="utf-8")
        lists = re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lists += re.findall(r"^\.\. toctree::\n((?:   .*\n|\n)*)", text, re.MULTILINE)
        for entries in lists:
            names = [x.strip() for x in entries.splitlines() if x.strip() and not x.strip().startswith(":")]
            listed |= {path.parent / name for name in names}
    pages = {path.with_suffix("") for path in sources} - {DOCS / "index"}
    assert pages - listed == set()
    assert listed - pages <= {DOCS / "quickstart"}


def test_every_result_is_on_a_page():
    """What a benchmark recorded is made a table of when the site is built."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "benchmarks").glob("*.md"))
    recorded = {path.name for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert set(re.findall(r"\{results\} \S*?([^/\s]+\.json)", pages)) == recorded


def test_times_of_two_backends_are_a_table(monkeypatch):
    """Of what both of them did at a shape, and of nothing else."""
    monkeypatch.syspath_prepend(DOCS / "site")
    tables = importlib.import_module("result_tables")
    shape = {"B": 64, "d": 512, "k": 4, "dtype": "float32"}
    rows = [
        {**shape, "contender": "cuda", "device_us": 40.0, "wall_us": 200.0},
        {**shape, "contender": "triton", "device_us": 20.0, "wall_us": 300.0},
        {**shape, "contender": "cuda, triplet", "wall_us": 200.0, "no_graph": "said"},
        {**shape, "contender": "triton, triplet", "wall_us": 600.0, "device_us": 20.0},
        {**shape, "k": 16, "contender": "triton", "device_us": 20.0, "wall_us": 300.0},
    ]
    text = tables.text("gpu", {"conditions": {"device": "some"}, "time": rows})
    title, _, body = text.partition("**Which of two")[2].partition("\n")
    assert title == ": what triton takes in multiples of what cuda takes**"
    assert body.split("\n")[1].count("|") == 11
    assert body.strip().split("\n")[2:] == ["| 64 | 512 | 4 | float32 | 0.5 | 1.5 |  |  |  | 3 |"]
