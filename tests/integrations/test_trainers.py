"""Every example of examples/integrations/ runs to its end, without a network, and has learned. `make integrations`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests import ROOT
from tests.tools import pages

FOLDER = ROOT / "examples" / "integrations"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


class Found(NamedTuple):
    """What a run says of held-out rows."""

    loss_before: float
    loss_after: float
    recall_before: float
    recall_after: float

    def learned(self) -> bool:
        """Chance finds one in 256; and a loss without a gradient leaves both numbers as they were."""
        return self.recall_before < 0.05 and self.recall_after > 0.5 and self.loss_after < self.loss_before / 2


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(FOLDER)]),
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def run(*arguments: str) -> tuple[list[Found], str]:
    """What each process found, and all that was printed."""
    done = start(*arguments)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    number = r"(\d+\.\d+)"
    found = re.findall(rf"loss {number} -> {number}, R@1 {number} -> {number}", done.stdout)
    return [Found(*map(float, numbers)) for numbers in found], done.stdout + done.stderr


def example(name: str, *options: str, processes: int = 1) -> tuple[list[Found], str]:
    return run(*(TWO if processes == 2 else ()), str(FOLDER / f"{name}.py"), *options)


EVERY_WAY = {
    "plain": (),
    "accumulated, bf16": ("--accumulate", "2", "--bf16"),
}


@pytest.mark.parametrize("options", EVERY_WAY.values(), ids=EVERY_WAY.keys())
@pytest.mark.parametrize(
    "name",
    ["accelerate_loop", "hugging_face_trainer", "lightning_module", "sentence_transformers_trainer"],
)
def test_trainers(name, options):
    (found,), printed = example(name, *options)
    assert found.learned(), found
    assert "it/s" in printed  # its progress bar
    if name == "hugging_face_trainer":
        assert "'eval_loss'" in printed


def test_hugging_face_trainer_with_a_loss_function():
    (found,), _ = example("hugging_face_trainer", "--loss-function", "--accumulate", "2")
    assert found.learned(), found


def test_the_page(tmp_path, monkeypatch):
    """All that needs a trainer, which tests/programs/test_pages.py can but compile."""
    page = ROOT / "docs/trainers.md"
    monkeypatch.chdir(tmp_path)
    for _ in pages.run(page):
        pass
    assert all(block.runs() for block in pages.blocks(page) if block.needs)


def test_accelerate_on_two_processes():
    (found,), _ = example("accelerate_loop", processes=2)
    assert found.learned(), found


def test_lightning_on_two_processes():
    """It starts the other process itself; both have the same model."""
    found, _ = example("lightning_module", "--processes", "2")
    assert len(found) == 2
    assert found[0] == found[1]
    assert found[0].learned(), found


@pytest.mark.parametrize("options", [(), ("--bf16",)], ids=["plain", "bf16"])
def test_fsdp2(options):
    """One process holds the temperature, the other an empty shard, and both the same model."""
    found, printed = example("fsdp2", *options, processes=2)
    assert len(found) == 2
    assert found[0] == found[1]
    assert found[0].learned(), found
    assert sorted(re.findall(r"holds (\d) number", printed)) == ["0", "1"]


def test_chunks_fit_where_the_batch_does_not():
    (found,), _ = example("gradcache")
    assert found.learned(), found
    whole = start(str(FOLDER / "gradcache.py"), "--chunk", "1024")
    assert whole.returncode != 0
    assert "can't allocate memory" in whole.stderr or "out of memory" in whole.stderr


def test_a_loss_without_a_gradient_does_not_pass():
    """The bound above, held against a run whose loss is multiplied by 0."""
    program = (
        "import pmrl_kernels as p, accelerate_loop; loss = p.PMRLLoss.forward; "
        "p.PMRLLoss.forward = lambda *a, **o: 0.0 * loss(*a, **o); accelerate_loop.main([])"
    )
    (found,), _ = run("-c", program)
    assert not found.learned()
    assert found.loss_after == found.loss_before
