"""Every accepted form of input means the same thing."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pmrl_kernels import dominant_sv_loss, instance_contrastive_loss, pmrl_loss
from tests.tools.arguments import CLOSE, B, D, K, each_function, modalities


def some_mask() -> Tensor:
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[0, 1] = mask[2, 0] = mask[3, 1] = mask[3, 2] = False
    return mask


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def values_and_gradients(result: Any, leaves: list[Tensor]) -> list[Tensor]:
    """All outputs, and the gradients of a fixed combination of their elements."""
    tensors = outputs(result)
    generator = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in tensors)
    return [*tensors, *torch.autograd.grad(total, leaves)]


FORMS: dict[str, Callable[[list[Tensor]], tuple[Any, ...]]] = {
    "list": lambda xs: (list(xs),),
    "tuple": lambda xs: (tuple(xs),),
    "deque": lambda xs: (collections.deque(xs),),
    "dict": lambda xs: (dict(zip("abcdefgh", xs, strict=False)),),
    "stack": lambda xs: (torch.stack(xs, 1),),
    "stack in a list": lambda xs: ([torch.stack(xs, 1)],),
    "stack of the authors, transposed": lambda xs: (torch.stack(xs, 2).transpose(1, 2),),
    "strided modalities": lambda xs: tuple(torch.stack([x, -x], 2)[..., 0] for x in xs),
    "transposed modalities": lambda xs: tuple(x.T.contiguous().T for x in xs),
}


@each_function
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_means_the_same(function, form, masked):
    xs, mask = modalities(), some_mask() if masked else None
    expected = values_and_gradients(function(*xs, mask=mask), xs)
    found = values_and_gradients(function(*form(xs), mask=mask), xs)
    torch.testing.assert_close(found, expected, **CLOSE)


@each_function
@pytest.mark.parametrize("form", ["list", "tuple", "dict", "stack"])
def test_one_modality_as_one_matrix(function, form):
    (x,) = xs = modalities(1)
    expected = values_and_gradients(function(x), xs)
    torch.testing.assert_close(values_and_gradients(function(*FORMS[form](xs)), xs), expected, **CLOSE)


@each_function
def test_mask_by_name_follows_the_names_not_their_order(function):
    xs, mask = modalities(), some_mask()
    named = dict(zip("abc", xs, strict=True))
    by_name = {"c": mask[:, 2], "a": mask[:, 0], "b": mask[:, 1]}
    expected = values_and_gradients(function(*xs, mask=mask), xs)
    torch.testing.assert_close(values_and_gradients(function(named, mask=by_name), xs), expected, **CLOSE)
    torch.testing.assert_close(values_and_gradients(function(named, mask=mask), xs), expected, **CLOSE)
    assert not torch.equal(mask[:, 0], mask[:, 2])  # else the order could not matter


@each_function
def test_keys_need_not_be_strings(function):
    xs, mask = modalities(), some_mask()
    found = function(dict(enumerate(xs)), mask=dict(enumerate(mask.unbind(1))))
    torch.testing.assert_close(outputs(found), outputs(function(*xs, mask=mask)), **CLOSE)


@each_function
@pytest.mark.parametrize("stacked", [False, True], ids=["positional", "stack"])
def test_expanded_embeddings(function, stacked):
    """A modality whose rows are one vector (stride 0) in memory, such as a prompt shared by the batch."""
    shared, *rest = modalities()
    leaves = [shared, *rest]
    row = shared[:1]

    def call(first: Tensor) -> Any:
        return function(torch.stack([first, *rest], 1)) if stacked else function(first, *rest)

    found = values_and_gradients(call(row.expand(B, D)), leaves)
    expected = values_and_gradients(call(row.repeat(B, 1)), leaves)
    torch.testing.assert_close(found, expected, **CLOSE)


@each_function
def test_expanded_stack(function):
    """Every modality the same memory: full agreement, the gradient summed over the aliases."""
    (x,) = xs = modalities(1)
    found = values_and_gradients(function(x[:, None].expand(B, K, D)), xs)
    expected = values_and_gradients(function(x[:, None].repeat(1, K, 1)), xs)
    # at full agreement the gradient is rounding noise of order eps·(other terms)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@each_function
def test_same_tensor_for_two_modalities(function):
    x, y = modalities(2)
    found = values_and_gradients(function(x, x, y), [x, y])
    expected = values_and_gradients(function(x, x.clone(), y), [x, y])
    torch.testing.assert_close(found, expected, **CLOSE)


@each_function
def test_strided_mask(function):
    xs, mask = modalities(), some_mask()
    strided = torch.stack([mask, ~mask], 2)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(
        values_and_gradients(function(*xs, mask=strided), xs),
        values_and_gradients(function(*xs, mask=mask), xs),
        **CLOSE,
    )


@each_function
def test_full_mask_changes_nothing(function):
    xs = modalities()
    mask = torch.ones(B, K, dtype=torch.bool)
    torch.testing.assert_close(
        values_and_gradients(function(*xs, mask=mask), xs), values_and_gradients(function(*xs), xs), **CLOSE
    )


@each_function
@pytest.mark.parametrize("form", ["list", "tuple", "dict"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)], ids=str)
def test_dtypes_may_differ_in_every_form(function, form, dtypes):
    """The one beside the other, as embeddings of encoders in different precision are."""
    xs = [x.detach().to(dtypes[m % 2]).requires_grad_() for m, x in enumerate(modalities())]
    expected = values_and_gradients(function(*xs, mask=some_mask()), xs)
    found = values_and_gradients(function(*FORMS[form](xs), mask=some_mask()), xs)
    assert [x.dtype for x in found[-K:]] == [x.dtype for x in xs]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tau", [1, np.float32(0.5), np.float64(0.5)], ids=["int", "float32", "float64"])
def test_numbers_that_are_temperatures(tau):
    xs = modalities()
    assert dominant_sv_loss(*xs, temperature=tau) == dominant_sv_loss(*xs, temperature=float(tau))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_temperature_tensor_of_any_floating_dtype(dtype):
    """0.25 is exact in all of them, so the tensor and the number agree, and the gradient has the tensor's dtype."""
    xs = modalities()
    tau = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    loss = pmrl_loss(*xs, temperature=tau, instance_temperature=tau)
    torch.testing.assert_close(loss, pmrl_loss(*xs, temperature=0.25, instance_temperature=0.25), **CLOSE)
    loss.backward()
    assert tau.grad is not None
    assert tau.grad.dtype == dtype
    assert tau.grad.isfinite()


@pytest.mark.parametrize("normalize", [True, False])
def test_strided_rows(normalize):
    (u,) = xs = modalities(1)
    found = values_and_gradients(instance_contrastive_loss(u.T.contiguous().T, normalize=normalize), xs)
    expected = values_and_gradients(instance_contrastive_loss(u, normalize=normalize), xs)
    torch.testing.assert_close(found, expected, **CLOSE)
