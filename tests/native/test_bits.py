"""Bits that depend neither on neighbours nor on threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pmrl_kernels import dominant_singular_triplet, dominant_sv_loss, pmrl_loss, singular_values
from tests.tools.native import DTYPES, awkward, everything, modalities, same_bits, some_mask


@pytest.mark.parametrize("spectrum", [True, False], ids=["softmax", "leading"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "raw"])
@pytest.mark.parametrize(
    ("k", "dtype"),
    [(2, torch.float32), (3, torch.float64), (4, torch.float16), (8, torch.bfloat16), (9, torch.float32)],
)
def test_an_instance_has_the_same_bits_in_any_batch(k, dtype, normalize, spectrum):
    """Alone, in batches of any size and at any position, whatever its neighbours are; forward and backward."""
    xs, mask = awkward(k, 100, 19, dtype), some_mask(100, k)
    weights = torch.linspace(-1.0, 2.0, 100)

    def rows(selection: Sequence[int]) -> list[Tensor]:
        chosen = list(selection)
        return everything([x[chosen] for x in xs], mask[chosen], normalize, spectrum, weights[chosen])

    whole = rows(range(100))
    generator = torch.Generator().manual_seed(0)
    selections = [[i] for i in range(26)]  # alone, each kind on both sides of the mask
    selections += [torch.randint(100, (n,), generator=generator).tolist() for n in (7, 8, 9) * 5]
    selections += [torch.randperm(100, generator=generator).tolist()]
    for chosen in selections:
        assert same_bits(rows(chosen), [x[chosen] for x in whole])


@pytest.mark.parametrize("spectrum", [True, False], ids=["softmax", "leading"])
@pytest.mark.parametrize(("k", "dtype"), [(3, torch.float32), (4, torch.float64), (9, torch.bfloat16)])
def test_what_absent_embeddings_hold_changes_no_bit(k, dtype, spectrum):
    """It is never read, not even to be multiplied by zero."""
    xs, mask = [x.detach() for x in modalities(k, 50, 19, dtype)], some_mask(50, k)
    weights = torch.linspace(-1.0, 2.0, 50)
    expected = everything(xs, mask, True, spectrum, weights)
    for rubbish in (torch.nan, torch.inf, 3e38):
        spoilt = [x.masked_fill(~mask[:, m, None], rubbish) for m, x in enumerate(xs)]
        assert same_bits(everything(spoilt, mask, True, spectrum, weights), expected)
    strided = mask.repeat_interleave(2, 1)[:, ::2]
    assert same_bits(everything(xs, strided, True, spectrum, weights), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_change_no_bit(dtype):
    """The gradient of a temperature, a sum over the batch, included."""
    xs = [x.detach() for x in modalities(4, 1003, 64, dtype)]
    mask = some_mask(1003, 4)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in xs]
            tau = torch.tensor(0.3, requires_grad=True)
            losses = dominant_sv_loss(leaves, temperature=tau, mask=mask, reduction="none", backend="native")
            u = dominant_singular_triplet(leaves, mask=mask, backend="native").u
            grads = torch.autograd.grad(losses.sum() + (u * torch.arange(64)).sum(), [*leaves, tau])
            results.append([losses, u, *grads])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert same_bits(result, results[0])


def test_python_threads_do_not_disturb_one_another():
    """Eight at once, on different inputs of different shapes and dtypes."""

    def work(seed: int) -> list[Tensor]:
        xs = modalities(2 + seed % 8, 50 + seed, 17 + seed, DTYPES[seed % 4], seed)
        loss = pmrl_loss(xs, backend="native")
        sigma = singular_values(xs, backend="native")
        return [loss, sigma, *torch.autograd.grad(loss + sigma.sum(), xs)]

    alone = [work(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(work, range(16)), alone, strict=True):
                assert same_bits(found, expected)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stack_is_its_modalities(dtype, k):
    """One (B, k, d) tensor, in any layout with contiguous rows, gives the bits of k tensors; its gradient is one."""
    xs = [x.detach() for x in modalities(k, 11, 13, dtype)]
    stacks = {
        "contiguous": torch.stack(xs, 1),
        "modalities first": torch.stack(xs).transpose(0, 1),
        "part of a larger one": torch.stack([x.clone() for x in [*xs, xs[0]]], 1)[:, :k],
    }
    for objective in ("softmax", "leading"):
        leaves = [x.clone().requires_grad_() for x in xs]
        expected = dominant_sv_loss(leaves, objective=objective, reduction="none", backend="native")
        gradients = torch.autograd.grad(expected.sum(), leaves)
        for stack in stacks.values():
            stack = stack.detach().requires_grad_()
            found = dominant_sv_loss(stack, objective=objective, reduction="none", backend="native")
            assert same_bits([found], [expected])
            (gradient,) = torch.autograd.grad(found.sum(), stack)
            assert gradient.is_contiguous()
            assert same_bits(gradient.unbind(1), gradients)
