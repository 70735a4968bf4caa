"""Draws the figures of results that were written before, once more.

python benchmarks/figure.py                     # results/cpu.png from results/cpu.json; gpu.png if it is there
python benchmarks/figure.py output/gpu.json     # output/gpu.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lib import figures, run


def main(argv: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="cpu.json or gpu.json of a run")
    paths = parser.parse_args(argv).results
    if not paths:
        paths = [path for path in (run.RESULTS / f"{name}.json" for name in figures.DRAWN) if path.exists()]
    if unknown := [str(path) for path in paths if path.stem not in figures.DRAWN]:
        parser.error(f"got {', '.join(unknown)}, wanted one of {', '.join(f'{name}.json' for name in figures.DRAWN)}")
    drawn = [figures.DRAWN[path.stem](json.loads(path.read_text()), path.with_suffix(".png")) for path in paths]
    print("Written: " + ", ".join(map(str, drawn)))
    return drawn


if __name__ == "__main__":
    main()
