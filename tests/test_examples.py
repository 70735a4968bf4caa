"""The programs a newcomer runs: the demo, the README's lines, the documentation's figure."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
VIEWS = 6


def load(path: str) -> ModuleType:
    """A program of the repository as a module, without running it."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ordinary_memory() -> None:
    """Programs run as users run them; indexing backward is many times slower in deterministic mode."""
    torch.use_deterministic_algorithms(False)


def check_demo(arguments: list[str], recipes: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = load("examples/multiview_digits.py").main([*arguments, "--steps", "4", "--output", str(folder)])
    assert len(results) == recipes + 1
    for name, metrics in results.items():
        assert metrics["loss_ms"] > 0
        assert 0 < metrics["loss_share"] < 1
        if name != "authors":
            assert all(0 <= metrics[key] <= 1 for key in ("recall", "worst_pair", "probe", "alignment"))
            assert len(metrics["table"]) == VIEWS
    printed = capsys.readouterr().out
    figure = folder / "multiview_digits.png"
    assert str(figure) in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("ordinary_memory")
def test_demo(tmp_path, capsys):
    check_demo([], 4, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("ordinary_memory")
def test_demo_with_every_recipe(tmp_path, capsys):
    check_demo(["--all"], 9, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("ordinary_memory")
def test_demo_learns_and_repeats_itself(tmp_path):
    """A seed gives the same numbers twice, and forty steps of the modality contrast find far more than chance."""
    demo = load("examples/multiview_digits.py")
    runs = [demo.main(["--steps", "40", "--seed", "3", "--no-figure", "--output", str(tmp_path)]) for _ in range(2)]
    assert runs[0]["modality"]["recall"] == runs[1]["modality"]["recall"]
    assert runs[0]["modality"]["recall"] > 50 / demo.HELD_OUT
    assert not list(tmp_path.iterdir())


def test_readme_usage_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(block, names)
        assert math.isfinite(names["loss"].item())
        assert names["text"].grad is not None


@pytest.mark.slow
@pytest.mark.usefixtures("ordinary_memory")
def test_recipes_figure_agrees_with_the_closed_forms(tmp_path):
    """The script behind docs/recipes.md raises where the package and the closed forms differ."""
    recipes = load("docs/figures/recipes.py")
    assert recipes.largest_error() < 1e-9
    assert recipes.saturation_cosine(4, 0.05) == pytest.approx(0.159, abs=1e-3)
    assert recipes.saturation_cosine(4, 1.0) is None
