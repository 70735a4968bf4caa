"""The directive ``results``: what a file of benchmarks/results recorded, as tables, made when the site is built.

```{results} ../../benchmarks/results/cpu.json
```
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import result_tables
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Results(SphinxDirective):
    required_arguments = 1
    has_content = False
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        self.env.note_dependency(result_tables.__file__)
        text = result_tables.text(Path(path).stem, json.loads(Path(path).read_text(encoding="utf-8")))
        return [nodes.container("", *self.parse_text_to_nodes(text), classes=["results"])]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("results", Results)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
