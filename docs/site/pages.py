"""What makes pages of the repository's own files: README.md, programs, links from page to page and to sources."""

from __future__ import annotations

import ast
import html
import os
import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

# Files outside docs/ that have a page of their own.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

ERRORS = re.compile(r"\s+[A-Z]\w+(, [A-Z]\w+)*:")  # the names that an entry of "Raises:" begins with

LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#]+)")  # of Markdown, to a file
NAMED = re.compile(r"\[([\w-]+\.(?:md|ipynb))\](?=\(((?:[^)#]*/)?\1)[)#])")  # where the text is the file's name

# Pages of what a copy of the repository may lack; they leave the lists of pages with it.
NEEDED = {"quickstart": DOCS / "quickstart.ipynb", "trainers": ROOT / "examples" / "integrations"}


def absent() -> list[str]:
    return [page for page, needed in NEEDED.items() if not needed.exists()]


def without_absent_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    for page in absent():
        source[0] = source[0].replace(f"\n{page}\n", "\n")


def front_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """README.md above the list of pages in index.md; its links, from the root, become those of a file in docs/."""
    if docname == "index":
        readme = ROOT / "README.md"
        app.env.note_dependency(readme)
        text = LINK.sub(lambda link: f"]({os.path.relpath(ROOT / link[1], DOCS)}", readme.read_text(encoding="utf-8"))
        source[0] = f"{text}\n{source[0]}"


def links_to_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """What leads to a file outside docs/ that has a page leads to the page."""
    folder = (DOCS / docname).parent

    def to_page(link: re.Match[str]) -> str:
        page = PAGES.get(os.path.relpath(folder / link[1], ROOT))
        return link[0] if page is None else f"]({os.path.relpath(DOCS / page, folder)}"

    if not docname.startswith("api/"):
        source[0] = LINK.sub(to_page, source[0])


def titles_of_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """A link that is called as its file on a code host is called by the page's title here."""
    folder = (DOCS / docname).parent

    def titled(link: re.Match[str]) -> str:
        path = folder / link[2]
        title = re.search(r'(?m)^(?: *")?# ([^"\\\n]+)', path.read_text(encoding="utf-8")) if path.is_file() else None
        return link[0] if title is None else f"[{title[1]}]"

    if not docname.startswith("api/"):
        source[0] = NAMED.sub(titled, source[0])


def docstrings(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """They name pages as files, which is plain to read in a terminal; here these are links. And what stands before a
    colon in the first line of a field's, of what is returned, or of errors without names is no type, as Napoleon has
    it."""
    lines[:] = [re.sub(r"docs/([a-z-]+)\.md", r":doc:`docs/\1.md </\1>`", line) for line in lines]
    if what == "attribute":
        lines[:0] = ["..", ""]  # an empty comment
    for i, line in enumerate(lines):
        if lines[i - 1] == "Returns:" or (lines[i - 1] == "Raises:" and not ERRORS.match(line)):
            lines[i] = f"    : {line.strip()}"
            if lines[i - 1] == "Raises:":  # lines that go on would be errors of their own
                more = next((j for j in range(i + 1, len(lines)) if not lines[j].strip()), len(lines))
                lines[i + 1 : more] = [f"    {x}" for x in lines[i + 1 : more]]


class Programs(SphinxDirective):
    """The programs of a folder: the head of each, then its source."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        _, folder = self.env.relfn2path(self.arguments[0])
        found: list[nodes.Node] = []
        for path in sorted(Path(folder).glob("*.py")):
            self.env.note_dependency(str(path))
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
            head = ast.get_docstring(tree) or ""
            body = "\n".join(source.splitlines()[tree.body[0].end_lineno if head else 0 :]).strip("\n")
            section = nodes.section(ids=[nodes.make_id(path.stem)], names=[path.stem])
            section += nodes.title("", "", nodes.literal("", path.name))
            section += self.parse_text_to_nodes(head)
            section += nodes.literal_block(body, body, language="python")
            found.append(section)
        return found


class Mermaid(SphinxDirective):
    """A diagram, drawn by mermaid.js where the page is read. Code hosts draw the same fence."""

    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        source = html.escape("\n".join(self.content))
        return [nodes.raw("", f'<pre class="mermaid">{source}</pre>', format="html")]


def diagrams(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document) -> None:
    """The script is some megabytes: only pages with diagrams have it."""
    if doctree is not None and 'class="mermaid"' in context.get("body", ""):
        app.add_js_file("mermaid/mermaid.min.js")
        app.add_js_file("diagrams.js")


def figures(app: Sphinx, doctree: nodes.document) -> None:
    """As wide as the text, and by Sphinx's rule for a width a link to the picture itself, where its print is larger."""
    for image in doctree.findall(nodes.image):
        image.setdefault("width", "100%")


def sentences(app: Sphinx, doctree: nodes.document) -> None:
    """Cells that hold much text are told from numbers and names: on a phone site.css keeps them from getting narrow."""
    for cell in doctree.findall(nodes.entry):
        if len(cell.astext()) > 40:
            cell["classes"].append("long")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", front_page)
    app.connect("source-read", titles_of_pages)
    app.connect("source-read", links_to_pages)
    app.connect("source-read", without_absent_pages)
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", docstrings, priority=400)  # before Napoleon
    app.add_directive("programs", Programs)
    app.add_directive("mermaid", Mermaid)
    app.connect("doctree-read", figures)
    app.connect("doctree-read", sentences)
    app.connect("html-page-context", diagrams)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
