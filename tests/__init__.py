"""The suite; a package, so that its folders may be called what they test and still shadow nothing of that name."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
TOOLS = ROOT / "tests" / "tools"
