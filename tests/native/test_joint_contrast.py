"""The contrast of joint scores in the compiled library against its formulas, by autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pmrl_kernels import joint_scores
from pmrl_kernels.ops.joint import spec
from tests.tools.native import OPS, same_bits


def scores_of(score: int, t: Tensor, C: Tensor, mask: Tensor | None) -> Tensor:
    if score == spec.DOT:
        return t @ C[:, 0].T
    return joint_scores(t, C, score=spec.SCORES[score], mask=mask, normalize=False, backend="reference")


def plain(
    score: int, t: Tensor, C: Tensor, mask: Any, positives: Tensor, tau: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """The losses' means (rows, columns), and the losses without smoothing, 0 where there is none."""
    s = spec.SIGNS[score] * scores_of(score, t, C, mask) / tau
    Nq, Ng = s.shape
    there = torch.ones(Ng, dtype=torch.bool) if mask is None else mask.any(1)
    has = (positives >= 0) & (positives < Ng)
    p = positives.clamp(0, Ng - 1)
    counted, seen = has & there[p], ~has | there[p]
    is_positive = torch.zeros(Nq, Ng, dtype=torch.bool)
    is_positive[torch.arange(Nq)[counted], p[counted]] = True
    masked = s.masked_fill(~(there[None] & seen[:, None]), -torch.inf)
    rows, columns, row_total, column_total = torch.zeros(Nq).double(), torch.zeros(Ng).double(), 0.0, 0.0
    for i in torch.nonzero(counted)[:, 0]:
        own = s[i, p[i]]
        rows[i] = (masked[i].logsumexp(0) - own).detach()
        row_total = row_total + masked[i].logsumexp(0) - own + eps * (own - s[i, there].mean())
    of_columns = is_positive.any(0)
    for j in torch.nonzero(of_columns)[:, 0]:
        own = s[is_positive[:, j], j].logsumexp(0)
        columns[j] = (masked[:, j].logsumexp(0) - own).detach()
        column_total = column_total + masked[:, j].logsumexp(0) - own + eps * (own - s[seen, j].mean())
    return row_total / max(1, int(counted.sum())) / 2, column_total / max(1, int(of_columns.sum())) / 2, rows, columns


def problem(score: int, Nq: int, Ng: int, case: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    n = {spec.AREA2: 2, spec.DOT: 1}.get(score, 3)
    C = torch.randn(Ng, n, 20, dtype=torch.float64) + torch.randn(Ng, 1, 20, dtype=torch.float64)
    C = C / C.norm(dim=-1, keepdim=True)
    positives = torch.arange(Nq) % Ng
    if case != "plain":
        positives = torch.randint(-2, Ng + 2, (Nq,))
    t = C[positives.clamp(0, Ng - 1), 0] + 0.2 * torch.randn(Nq, 20, dtype=torch.float64)
    t = t / t.norm(dim=-1, keepdim=True)
    mask = None
    if case == "masks" and score != spec.AREA2:
        mask = torch.rand(Ng, n) < 0.6
        mask[1] = False
    return t, C, mask, positives


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("case", "Nq", "Ng"), [("plain", 40, 40), ("several", 300, 150), ("masks", 60, 45)])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("score", range(8))
def test_losses_and_gradients(score, eps, case, Nq, Ng, dtype):
    """By one process and by two."""
    t, C, mask, positives = problem(score, Nq, Ng, case)
    tau = torch.tensor(0.1, dtype=torch.float64)
    leaves = [x.to(dtype).double().requires_grad_() for x in (t, C)] + [tau.requires_grad_()]
    rows, columns, *losses = plain(score, leaves[0], leaves[1], mask, positives, leaves[2], eps)
    wanted = torch.autograd.grad(rows + columns, leaves)
    within = 1e-9 if dtype == torch.float64 else 2e-4
    t, C = t.to(dtype), C.to(dtype)
    whole = [0, Nq, 0, Ng]
    parts = [[0, Nq // 3, 0, Ng // 2], [Nq // 3, Nq, Ng // 2, Ng]]

    def arguments(own: list[int]) -> tuple[Any, ...]:
        return t, [C], mask, positives, own, score, False, eps, tau.detach(), 1.0

    for processes in ([whole], parts):
        found = [OPS.joint_contrast_forward(*arguments(own)) for own in processes]
        total, expected = (float(x.detach()) for x in (sum(x[0].double() for x in found), rows + columns))
        assert abs(total - expected) < (1e-11 if dtype == torch.float64 else 2e-6) * max(1.0, total)
        everyone = [torch.cat([x[at] for x in found]) for at in (1, 2)]
        for x, y in zip(everyone, losses, strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=within / 10, atol=within / 10)
        grad = torch.tensor(1.0, dtype=dtype)
        back = [
            OPS.joint_contrast_backward(*arguments(own), *everyone, x[3], grad, False, [True, True])
            for own, x in zip(processes, found, strict=True)
        ]
        gradients = torch.cat([g[0] for g in back]), torch.cat([g[1] for g in back]), sum(g[2] for g in back)
        for x, y in zip(gradients, wanted, strict=True):
            assert (x.double() - y).abs().max() <= within * y.abs().max()


@pytest.mark.parametrize("score", [spec.VOLUME, spec.GAIN])
def test_halves(score):
    t, C, mask, positives = problem(score, 50, 40, "masks")
    leaves = [x.requires_grad_() for x in (t, C)]
    rows, columns, *_ = plain(score, *leaves, mask, positives, torch.tensor(0.1, dtype=torch.float64), 0.1)
    wanted = [torch.autograd.grad(x, leaves[at], retain_graph=True)[0] for at, x in enumerate((rows, columns))]
    arguments = t.detach(), [C.detach()], mask, positives, [0, 50, 0, 40], score, False, 0.1, None, 0.1
    _, a, b, state = OPS.joint_contrast_forward(*arguments)
    one = torch.tensor(1.0, dtype=torch.float64)
    found = OPS.joint_contrast_backward(*arguments, a, b, state, one, True, [True, True])
    for x, y in zip(found, wanted, strict=False):
        assert (x - y).abs().max() <= 1e-9 * y.abs().max()


@pytest.mark.parametrize("score", [spec.VOLUME, spec.SIGMA])
def test_threads_change_no_bit(score):
    t, C, mask, positives = problem(score, 530, 300, "masks")
    arguments = t.float(), [C.float()], mask, positives, [0, 530, 0, 300], score, True, 0.1, torch.tensor(0.07), 1.0
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, a, b, state = OPS.joint_contrast_forward(*arguments)
            back = OPS.joint_contrast_backward(*arguments, a, b, state, torch.tensor(1.0), False, [True, True])
            found.append([loss, a, b, *back])
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])
