"""Formulas rendered at build by KaTeX, in one Node process, so that pages need no script for them.

sphinxcontrib-katex does the same by a server, to which it may connect before that listens; builds failed by it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator

BROWSER = Path(sys.prefix) / "browser"  # the Makefile lays there what browsers load


@cache
def _node() -> subprocess.Popen[str]:
    command = ["node", str(Path(__file__).with_suffix(".js")), str(BROWSER / "katex/katex.min.js")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")


@cache
def rendered(tex: str, display: bool) -> str:
    """HTML of a formula, with MathML in it for what reads pages aloud."""
    process = _node()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"tex": tex, "display": display}) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    answer = json.loads(line) if line else {"error": "Node has ended, see above"}
    if "error" in answer:
        raise ExtensionError(f"a formula cannot be rendered: {answer['error']}: {tex}")
    return answer["html"]


def inline(writer: HTML5Translator, node: nodes.math) -> None:
    """A line may end between the parts of a formula, and not between it and the full stop behind it: see site.css."""
    part = '<span class="katex-base">'
    first, *others = rendered(node.astext(), False).split(part)
    writer.body.append(f'<span class="math">{first}{part}{f"<wbr>{part}".join(others)}</span>')
    raise nodes.SkipNode


def display(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{rendered(node.astext(), True)}</div>\n')
    raise nodes.SkipNode


def end(app: Sphinx, exception: Exception | None) -> None:
    if _node.cache_info().currsize:
        process = _node()
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=10)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("katex", inline_renderers=(inline, None), block_renderers=(display, None))
    app.add_css_file("katex/katex.min.css")
    app.connect("build-finished", end)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
