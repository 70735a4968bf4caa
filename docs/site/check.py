"""Checks a built site, without a network: every link and picture leads somewhere, and nothing comes from elsewhere.

    python docs/site/check.py build/docs

Files and anchors of links between pages, pictures, scripts, style sheets and what these load; `make docs` runs it.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


class Page(HTMLParser):
    """What a page loads, where its links lead, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        target = found.get(LOADED.get(tag, ""))
        if target:
            self.loaded.append(target)


@cache
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def problems(path: Path) -> tuple[int, list[str]]:
    """How many links of a page were followed, and what is wrong with them."""
    wrong: list[str] = []
    count = 0
    this = page(path)
    for target, loaded in [*((x, True) for x in this.loaded), *((x, False) for x in this.links)]:
        url = urlsplit(target)
        if url.scheme == "data":
            continue
        if url.scheme or url.netloc:
            if loaded:
                wrong.append(f"loads {target}, which is not of this site")
            continue
        count += 1
        file = path if not url.path else (path.parent / unquote(url.path)).resolve()
        if not file.is_file():
            wrong.append(f"{target}: there is no such file")
        elif url.fragment and file.suffix == ".html" and unquote(url.fragment) not in page(file).anchors:
            wrong.append(f"{target}: the page has no such anchor")
    return count, wrong


def styles(path: Path) -> tuple[int, list[str]]:
    """The same for what a style sheet loads."""
    wrong = []
    text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [x.strip("'\" ") for x in re.findall(r"url\(([^)]*)\)|@import\s+([^;]+)", text) for x in x if x]
    targets = [x for x in targets if not x.startswith(("data:", "#"))]
    for target in targets:
        if urlsplit(target).scheme or target.startswith("//"):
            wrong.append(f"loads {target}, which is not of this site")
        elif not (path.parent / urlsplit(target).path).is_file():
            wrong.append(f"{target}: there is no such file")
    return len(targets), wrong


def main(folder: Path) -> int:
    pages = sorted(folder.resolve().rglob("*.html"))
    sheets = sorted(folder.resolve().rglob("*.css"))
    if not pages:
        raise SystemExit(f"{folder}: got no page, wanted a site that was built")
    total = 0
    broken: list[str] = []
    for path in [*pages, *sheets]:
        count, wrong = (problems if path.suffix == ".html" else styles)(path)
        total += count
        broken += [f"{path.relative_to(folder.resolve())}: {what}" for what in wrong]
    print(*broken, sep="\n", end="\n" if broken else "")
    print(f"{len(pages)} pages, {total} links within the site, {len(broken)} of them broken")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
