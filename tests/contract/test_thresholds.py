"""The numbers of ops/constants.py are those of docs/contract.md."""

from __future__ import annotations

import math

import pytest
import torch

from pmrl_kernels.ops import constants

each_precision = pytest.mark.parametrize("float64_input", [False, True], ids=["32 bits", "float64"])
each_k = pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16, 32])


def left_of_the_next(k: int, float64_input: bool, squarings: int) -> float:
    """log of (λ_j/λ₁)^(2^s) at the smallest gap that counts."""
    return 2.0**squarings * math.log1p(-constants.eigenvalue_gap(k, float64_input))


@each_precision
@each_k
def test_squarings_tell_ties_from_gaps(k, float64_input):
    """At the smallest gap that counts the second eigenvector still shows in P, at three times that no more."""
    steps = constants.squarings(k, float64_input)
    assert -20 <= left_of_the_next(k, float64_input, steps) <= -10
    assert 2 * math.exp(left_of_the_next(k, float64_input, steps)) > constants.RANK_ONE
    assert 2 * math.exp(3 * left_of_the_next(k, float64_input, steps)) < constants.RANK_ONE
    assert constants.RANK_ONE > 1000 * constants.EPS64


@pytest.mark.parametrize("k", [2, 3, 8, 32])
def test_squarings_down_to_rank_1_tell_the_gap(k):
    """Within a factor of 2.3, whether one eigenvalue is that near to the first or all the others are."""
    for near in (1, k - 1):
        for gap in (10.0**-e for e in range(1, 15)):
            n, excess = 0, 1.0
            while excess > constants.RANK_ONE:
                share = near * math.exp(2.0**n * math.log1p(-gap))
                excess = (2 * share + (1 - 1 / near) * share * share) / (1 + share) ** 2  # 1 - ‖P‖², P of trace 1
                n += excess > constants.RANK_ONE
            assert 28 <= -math.log1p(-gap) * 2.0**n <= 64
            noise, least = constants.zero_sum(k) / gap, constants.zero_sum(k) * max(1, 2.0**n / 64)
            assert least <= noise <= 3.3 * least


def test_squarings_of_the_docstring():
    assert constants.squarings(4, False) == 25
    assert constants.squarings(4, True) == 50


def test_epsilons_are_torch_s():
    assert torch.finfo(torch.float32).eps == constants.EPS32
    assert torch.finfo(torch.float64).eps == constants.EPS64


@each_precision
@each_k
def test_thresholds_are_those_of_the_contract(k, float64_input):
    eps32, eps64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    assert constants.singular_value_floor(k, float64_input) == (math.sqrt(k * eps64) if float64_input else eps32)
    assert constants.eigenvalue_gap(k, float64_input) == (16 * k * eps64 if float64_input else 4 * eps32)
    assert constants.zero_sum(k) == 16 * k * eps64
    assert constants.MAX_MODALITIES == 32
