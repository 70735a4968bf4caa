"""Joint scores by Triton's kernel: within its contract of the reference in float64, near copies and odd sizes included.

They need a GPU, Triton's interpreter or the interpreter of compiled kernels; processes that have one are started by
test_interpreted.py and test_ptx.py.
"""

from __future__ import annotations

import pytest
import torch

from pmrl_kernels import joint_scores, ops

if "triton" not in ops.available:
    pytest.skip("needs Triton, and a GPU or an interpreter", allow_module_level=True)

from pmrl_kernels.ops.joint import spec
from tests.tools.joints import SLOW_ROOTS, slow_root

if not torch.cuda.is_available() and ops.available["triton"].rejects(torch.device("cpu"), torch.float32, 3, 64):
    pytest.skip("needs a GPU or an interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 2.0**-23


def instances(Nq: int, Ng: int, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some queries are in the span of a candidate, or near it, and some candidates copies of one another."""
    t, C = torch.randn(Nq, d), torch.randn(Ng, n, d) + torch.randn(Ng, 1, d)
    t[0], t[1], t[2] = C[0, 0], C[1].sum(0), C[2].sum(0) + 1e-3 * torch.randn(d)
    C[3:5], C[5] = C[6], C[6, :1]
    return t, C, torch.rand(Ng, n) < 0.7


@pytest.mark.parametrize(("Nq", "Ng", "d"), [(70, 131, 40), (5, 64, 33), (64, 7, 1), (130, 9, 300)])
@pytest.mark.parametrize(
    ("score", "k"), [(score, k) for score in spec.SCORES for k in (2, 3, 4, 5, 8) if score != "area2" or k == 3]
)
def test_scores(score, k, Nq, Ng, d):
    t, C, mask = instances(Nq, Ng, k - 1, d)
    for present in (None,) if score == "area2" else (None, mask):
        wanted = joint_scores(t.double(), C.double(), score=score, mask=present, backend="reference")
        there = None if present is None else present.to(DEVICE)
        found = joint_scores(t.to(DEVICE), C.to(DEVICE), score=score, mask=there, backend="triton").double().cpu()
        # A root loses what r = score² (over det K) has lost, except near copies, which are in float64.
        slack = 16 * EPS / (2 * 2.0**-5) if score in ("volume", "sine") else 8 * EPS * k
        assert (found - wanted).abs().max() < slack
        if score in ("volume", "sine") and d > k:
            close = wanted < 2.0**-6
            assert close.any()
            assert (found - wanted)[close].abs().max() < 2 * EPS


@pytest.mark.parametrize("n", SLOW_ROOTS)
def test_roots_that_take_most_steps(n):
    t, C = slow_root(n)
    wanted = joint_scores(t.double(), C.double(), score="lambda", normalize=False, backend="reference")
    found = joint_scores(t.to(DEVICE), C.to(DEVICE), score="lambda", normalize=False, backend="triton").double().cpu()
    assert (found - wanted).abs() / wanted <= 4 * EPS


def test_gradients_are_the_references():
    t, C, mask = (x.to(DEVICE) for x in instances(40, 30, 3, 16))
    t, C = t.requires_grad_(), C.requires_grad_()
    W = torch.randn(40, 30, device=DEVICE)
    found, wanted = (
        torch.autograd.grad((joint_scores(t, C, mask=mask, backend=backend) * W).sum(), (t, C))
        for backend in ("triton", "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_nan_stays_within_its_pairs():
    t, C, _ = instances(40, 30, 3, 16)
    t[4, 3], C[7, 1, 2] = torch.nan, torch.inf
    for score in ("volume", "volume2", "sine", "sigma", "lambda", "gain"):
        found = joint_scores(t.to(DEVICE), C.to(DEVICE), score=score, backend="triton")
        wanted = torch.zeros(40, 30, dtype=torch.bool, device=DEVICE)
        wanted[4], wanted[:, 7] = True, True
        assert torch.equal(found.isnan(), wanted)


def test_what_it_leaves_to_the_reference():
    device, candidates = torch.device(DEVICE), [ops.available[name] for name in ("triton", "reference")]
    for dtype, k, reason in ((torch.float64, 3, "as exact as float32"), (torch.float32, 9, "k <= 8")):
        pair, passed_over = ops.choose("joint", candidates, None, device, dtype, k, 16, {})
        assert pair.backend == "reference"
        assert reason in passed_over
    pair, passed_over = ops.choose("joint_contrast", candidates, "triton", device, torch.float32, 3, 16, {})
    assert pair.backend == "reference"
    assert "triton: no kernels for joint_contrast" in passed_over
