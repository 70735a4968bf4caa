"""Both terms in one call: what reaches the encoders, and what one batch may not do to another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmrl_kernels import pmrl_loss
from tests.tools.functions import MIXING, grads, leaves


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", MIXING)
def test_a_bad_row_is_not_swallowed_by_the_mixing_terms(backend, device, function, bad):
    xs = [torch.randn(5, 11) for _ in range(3)]
    xs[0][2, 3] = bad
    xs = leaves(xs, device, torch.float32)
    loss = MIXING[function](xs, backend=backend)
    assert loss.isnan()
    assert all(g.isnan().all() for g in grads(loss, xs))


def test_inputs_of_absent_modalities_reach_an_encoder(backend, device):
    """docs/recipes.md: the loss sends exact zeros back, but 0 · NaN is NaN in an encoder's weights."""
    encoder = torch.nn.Linear(5, 9).to(device)
    other, inputs = torch.randn(4, 9, device=device), torch.randn(4, 5, device=device)
    mask = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 1]], device=device).bool()
    absent = ~mask[:, :1]

    def step(given: Tensor) -> Tensor:
        loss = pmrl_loss(encoder(given), other, mask=mask, backend=backend)
        assert loss.isfinite()
        return grads(loss, [encoder.weight])[0]

    assert step(inputs.masked_fill(absent, torch.nan)).isnan().any()
    assert torch.equal(step(inputs.masked_fill(absent, 0.0)), step(inputs.masked_fill(absent, 1.0)))


def test_threads_do_not_disturb_one_another(backend, device):
    from concurrent.futures import ThreadPoolExecutor

    batches = [leaves([torch.randn(16, 24) for _ in range(3)], device, torch.float32) for _ in range(4)]

    def work(xs: list[Tensor]) -> list[Tensor]:
        loss = pmrl_loss(xs, contrast="modality", backend=backend)
        return [loss.detach(), *grads(loss, xs)]

    alone = [work(xs) for xs in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, batches * 4))
    for i, run in enumerate(together):
        assert all(torch.equal(a, b) for a, b in zip(alone[i % 4], run, strict=True))
