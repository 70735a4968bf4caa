"""Single calls as pytest-benchmark records them, to be compared from commit to commit.

    python -m pytest benchmarks/test_record.py --benchmark-autosave
    python -m pytest benchmarks/test_record.py --benchmark-compare

Ratios between contenders are cpu.py's: here they do not take turns. Plain ``pytest`` does not collect this.
"""

from __future__ import annotations

from typing import Any

import pytest
from lib.cases import CONTENDERS, QUICK, Case, Contender, embeddings


@pytest.mark.benchmark(min_rounds=3, max_time=1.0, warmup=False)
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_forward_and_backward(benchmark: Any, case: Case, contender: Contender) -> None:
    reason = contender.declines(case)
    if reason is not None:
        pytest.skip(reason)
    xs = embeddings(case)
    contender.step(xs)  # warms up, and compiles where there is something to compile
    benchmark.group = str(case)
    gradients = benchmark(contender.step, xs)
    assert [x.shape for x in gradients] == [x.shape for x in xs]
