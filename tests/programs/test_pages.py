"""What a reader pastes runs: every Python block of README.md and of the pages in docs/ (tests/tools/pages.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.tools import pages

Names = dict[str, Any]
each_page = pytest.mark.parametrize("path", pages.pages(), ids=lambda path: path.stem)


@each_page
def test_every_block_runs_or_says_why_not(path):
    found = pages.blocks(path)
    assert [f"line {block.line}: {x}" for block in found for x in pages.problems(block)] == []
    fences = re.findall(r"^\W*`{3,}\W*(?:code\S*\W+)?py", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == len(found)


def readme(names: Names) -> None:
    assert names["loss"].isfinite()
    assert names["text"].grad is not None


def migrating(names: Names) -> None:
    """The two formulations are the same loss but for the signs that LAPACK leaves open."""
    theirs: Names = {}
    exec(pages.blocks(ROOT / "docs/migrating.md")[0].code, theirs)
    assert names["loss"].item() == pytest.approx(theirs["loss"].item(), rel=0.5)
    names["loss"].backward()
    assert names["text"].grad.isfinite().all()


def joint_scores(names: Names) -> None:
    assert names["of_queries"] > 0.99
    assert names["of_candidates"] < 0.9
    assert (names["clips"] != torch.arange(500)).all()
    assert (names["texts"] != torch.arange(500)).all()
    assert names["learned"](*names["xs"]).item() == pytest.approx(names["loss"].item(), rel=1e-6)


def recipes(names: Names) -> None:
    (without,) = (group for group in names["optimizer"].param_groups if group["weight_decay"] == 0.0)
    assert without["params"] == list(names["objective"].parameters())


def trainers(names: Names) -> None:
    loss = names["AlignedLoss"](lambda x: {"sentence_embedding": x}, temperature=1.0, contrast="leave_one_out")
    assert loss(names["embeddings"].expand(3, -1, -1).unbind()).isfinite()


# Beyond what blocks assert themselves.
CHECKS: dict[str, Callable[[Names], None]] = {
    "README": readme,
    "joint-scores": joint_scores,
    "migrating": migrating,
    "recipes": recipes,
    "trainers": trainers,
}


@each_page
def test_the_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: Names = {}
    for names in pages.run(path):
        if path.stem == "joint-scores" and "loss" in names:
            assert all(x.grad.isfinite().all() for x in names["xs"])
    if path.stem in CHECKS:
        CHECKS[path.stem](names)


def test_what_two_processes_run(tmp_path):
    programs = [program for path in pages.pages() for program in pages.programs_of_two(path)]
    assert len(programs) == 2
    assert pages.run_by_two(programs, tmp_path) == ["", ""]


@pytest.mark.parametrize(
    ("comment", "code", "problem"),
    [
        ("", "x = 1", ""),
        ("not run: a reason", "x = 1", ""),
        ("needs: lightning", "x = 1", ""),
        ("not run", "x = 1", "neither run nor has a reason"),
        ("not run:", "x = 1", "neither run nor has a reason"),
        ("needs:", "x = 1", "neither run nor has a reason"),
        ("not run: a reason", "    x = 1", "does not compile"),
        ("not run: a reason", "from pmrl_kernels import pmrl_loss, gone", "there is no pmrl_kernels.gone"),
        ("", f"x = {'1' * 88}", "wider than 88"),
    ],
)
def test_a_problem_is_seen(comment, code, problem, tmp_path):
    page = Path(tmp_path) / "page.md"
    page.write_text((f"<!-- {comment} -->\n" if comment else "") + f"```python\n{code}\n```\n", encoding="utf-8")
    (block,) = pages.blocks(page)
    found = "; ".join(pages.problems(block))
    assert problem in found
    assert bool(problem) == bool(found)
