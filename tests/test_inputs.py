"""Inputs: every accepted form means the same thing, and every misuse is an error that says what to do.

An error names the argument, what came and what was wanted, and is raised before any kernel runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pmrl_kernels
from pmrl_kernels import (
    autograd,
    dominant_singular_triplet,
    dominant_singular_value,
    dominant_sv_loss,
    instance_contrastive_loss,
    ops,
    pmrl_loss,
    singular_values,
    warm_up,
)

B, K, D = 5, 3, 7

FUNCTIONS = {
    "dominant_sv_loss": dominant_sv_loss,
    "pmrl_loss": pmrl_loss,
    "singular_values": singular_values,
    "dominant_singular_value": dominant_singular_value,
    "dominant_singular_triplet": dominant_singular_triplet,
}
LOSSES = {name: FUNCTIONS[name] for name in ("dominant_sv_loss", "pmrl_loss")}

# Small problems are evaluated alike whatever the form, but a kernel may read a stack with other loads.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def modality_loss(*embeddings: Any, **options: Any) -> Tensor:
    return pmrl_loss(*embeddings, contrast="modality", **options)


ALL = {**FUNCTIONS, "pmrl_loss-modality": modality_loss}
each_function = pytest.mark.parametrize("function", ALL.values(), ids=ALL.keys())


def modalities(k: int = K, seed: int = 0) -> list[Tensor]:
    """k leaves (B, d) in float64: differences between forms would show."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(k)]


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


# ------------------------------------------------------------------------------------------------
# Accepted forms
# ------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[list[Tensor]], tuple[Any, ...]]] = {
    "list": lambda xs: (list(xs),),
    "tuple": lambda xs: (tuple(xs),),
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


# ------------------------------------------------------------------------------------------------
# Misuse
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch):
    """An argument error must come before any kernel: reaching one fails the test."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("a kernel was reached with a bad argument")

    for pair in ("spectral", "objective"):
        monkeypatch.setattr(autograd, pair, reached)


def rejects(error: type[Exception], call: Callable[[], Any], *parts: str) -> None:
    """``call`` raises exactly ``error``, with all ``parts`` in its message."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    for part in parts:
        assert part in str(caught.value)


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape or (B, D), dtype=dtype, device=device)


FLOATS = "wanted a floating-point one of torch.float32, torch.bfloat16, torch.float16, torch.float64"

BAD_EMBEDDINGS: dict[str, tuple[Callable[[], tuple[Any, ...]], type[Exception], tuple[str, ...]]] = {
    "none given": (lambda: (), ValueError, ("embeddings", "got none", "at least one tensor (B, d)")),
    "empty list": (lambda: ([],), ValueError, ("embeddings", "got none")),
    "empty tuple": (lambda: ((),), ValueError, ("embeddings", "got none")),
    "empty dict": (lambda: ({},), ValueError, ("embeddings", "got none")),
    "None": (lambda: (None,), TypeError, ("embeddings", "got NoneType", "(B, k, d)")),
    "None among tensors": (lambda: (x(), None), TypeError, ("embeddings[1]", "got NoneType", "(B, d)")),
    "string": (lambda: ("text",), TypeError, ("embeddings", "got str")),
    "strings": (lambda: (["text", "video"],), TypeError, ("embeddings[0]", "got str")),
    "number": (lambda: (1.0,), TypeError, ("embeddings", "got float")),
    "numpy": (lambda: (np.ones((B, D)),), TypeError, ("embeddings", "got ndarray")),
    "numpy among tensors": (lambda: (x(), np.ones((B, D))), TypeError, ("embeddings[1]", "got ndarray")),
    "generator": (lambda: ((y for y in [x()]),), TypeError, ("embeddings", "got generator")),
    "set": (lambda: ({x(), x()},), TypeError, ("embeddings", "got set")),
    "list beside tensor": (lambda: (x(), [x()]), TypeError, ("embeddings[1]", "got list")),
    "two lists": (lambda: ([x()], [x()]), TypeError, ("embeddings[0]", "got list")),
    "positional temperature": (lambda: (x(), x(), 0.05), TypeError, ("embeddings[2]", "got float")),
    "dict with a list": (lambda: ({"text": x(), "video": [x()]},), TypeError, ("embeddings['video']", "got list")),
    "0-d": (lambda: (torch.tensor(1.0),), ValueError, ("embeddings[0]", "got shape ()", "(B, d)")),
    "1-d": (lambda: (x(D),), ValueError, ("embeddings[0]", f"got shape ({D},)", "(B, d)", "(B, k, d)")),
    "4-d": (lambda: (x(1, 2, 3, 4),), ValueError, ("embeddings[0]", "got shape (1, 2, 3, 4)", "(B, k, d)")),
    "1-d among 2-d": (lambda: (x(), x(D)), ValueError, ("embeddings[1]", f"got shape ({D},)", "(B, d)")),
    "two stacks": (lambda: (x(2, 3, 4), x(2, 3, 4)), ValueError, ("embeddings[0]", "got shape (2, 3, 4)", "(B, d)")),
    "stack in a dict": (lambda: ({"all": x(2, 3, 4)},), ValueError, ("embeddings['all']", "got shape (2, 3, 4)")),
    "other B": (lambda: (x(4, 3), x(5, 3)), ValueError, ("embeddings[1]", "got shape (5, 3)", "wanted (4, 3)")),
    "other d": (lambda: (x(4, 3), x(4, 2)), ValueError, ("embeddings[1]", "got shape (4, 2)", "wanted (4, 3)")),
    "other d by name": (
        lambda: ({"text": x(4, 3), "audio": x(4, 2)},),
        ValueError,
        ("embeddings['audio']", "got shape (4, 2)", "wanted (4, 3)", "embeddings['text']"),
    ),
    "B of one does not broadcast": (
        lambda: (x(4, 3), x(1, 3)),
        ValueError,
        ("embeddings[1]", "got shape (1, 3)", "wanted (4, 3)"),
    ),
    "other device": (
        lambda: (x(), x(device="meta")),
        ValueError,
        ("embeddings[1]", "got device meta", "wanted cpu", "embeddings[0]"),
    ),
    "int64": (lambda: (x(dtype=torch.int64),), TypeError, ("embeddings[0]", "got dtype torch.int64", FLOATS)),
    "int8 stack": (lambda: (x(2, 3, 4, dtype=torch.int8),), TypeError, ("embeddings", "torch.int8", FLOATS)),
    "int among floats": (lambda: (x(), x(dtype=torch.int32)), TypeError, ("embeddings[1]", "torch.int32", FLOATS)),
    "complex among mixed floats": (
        lambda: (x(), x(dtype=torch.float64), x(dtype=torch.complex64)),
        TypeError,
        ("embeddings[2]", "got dtype torch.complex64", FLOATS),
    ),
    "float8 among mixed floats": (
        lambda: ({"text": x(dtype=torch.bfloat16), "audio": x(), "video": x().to(torch.float8_e5m2)},),
        TypeError,
        ("embeddings['video']", "got dtype torch.float8_e5m2", FLOATS),
    ),
    "complex": (lambda: (x(dtype=torch.complex64),), TypeError, ("embeddings[0]", "torch.complex64", FLOATS)),
    "bool": (lambda: (x(dtype=torch.bool),), TypeError, ("embeddings[0]", "got dtype torch.bool", FLOATS)),
    "float8": (
        lambda: (x().to(torch.float8_e4m3fn),),
        TypeError,
        ("embeddings[0]", "got dtype torch.float8_e4m3fn", FLOATS),
    ),
    "sparse": (lambda: (x().to_sparse(),), TypeError, ("embeddings[0]", "got a torch.sparse_coo", "dense")),
    "sparse csr": (lambda: (x(), x().to_sparse_csr()), TypeError, ("embeddings[1]", "torch.sparse_csr", "dense")),
    "nested": (
        lambda: (torch.nested.nested_tensor([x(2, 4), x(3, 4)], layout=torch.jagged),),
        TypeError,
        ("embeddings", "got a torch.jagged", "dense"),
    ),
    "nested strided": (
        lambda: (torch.nested.nested_tensor([x(2, 4), x(3, 4)]),),
        TypeError,
        ("embeddings", "nested", "dense"),
    ),
    "nested strided of vectors": (
        lambda: (torch.nested.nested_tensor([x(3), x(5)]),),
        TypeError,
        ("embeddings[0]", "got a nested tensor", "dense"),
    ),
    "nested strided among tensors": (
        lambda: (x(2, 4), torch.nested.nested_tensor([x(3), x(5)])),
        TypeError,
        ("embeddings[1]", "got a nested tensor", "dense"),
    ),
    "33 modalities": (lambda: tuple(x(2, 3) for _ in range(33)), ValueError, ("embeddings", "k = 33", "at most 32")),
    "33 in a stack": (lambda: (x(2, 33, 64),), ValueError, ("embeddings", "k = 33", "at most 32")),
    "d = 0": (lambda: (x(2, 0), x(2, 0)), ValueError, ("embeddings", "d = 0", "at least one dimension")),
    "d = 0 in a stack": (lambda: (x(2, 3, 0),), ValueError, ("embeddings", "d = 0")),
    "k = 0 in a stack": (lambda: (x(2, 0, 3),), ValueError, ("embeddings", "got shape (2, 0, 3)", "k of at least 1")),
    "the authors' layout": (
        lambda: (x(2, 512, 3),),
        ValueError,
        ("embeddings", "k = 512", "(B, d, k)", "transpose(1, 2)"),
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize(("make", "error", "parts"), BAD_EMBEDDINGS.values(), ids=BAD_EMBEDDINGS.keys())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_bad_embeddings(function, make, error, parts, no_kernels):
    rejects(error, lambda: function(*make()), *parts)


def test_large_stack_is_not_told_to_transpose(no_kernels):
    """Both of its last dimensions are too large for a k, so the shape gives nothing away."""
    with pytest.raises(ValueError, match="k = 33") as caught:
        dominant_sv_loss(x(2, 33, 64))
    assert "transpose" not in str(caught.value)


BAD_MASKS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "list": (lambda: [[True] * K] * B, TypeError, ("mask", "got list", f"bool tensor ({B}, {K})")),
    "numpy": (lambda: np.ones((B, K), bool), TypeError, ("mask", "got ndarray", f"({B}, {K})")),
    "True": (lambda: True, TypeError, ("mask", "got bool", f"({B}, {K})")),
    "float": (lambda: torch.ones(B, K), TypeError, ("mask", "got dtype torch.float32", "torch.bool")),
    "int64": (lambda: torch.ones(B, K, dtype=torch.int64), TypeError, ("mask", "torch.int64", "torch.bool")),
    "uint8": (lambda: torch.ones(B, K, dtype=torch.uint8), TypeError, ("mask", "torch.uint8", "torch.bool")),
    "transposed": (lambda: torch.ones(K, B).bool(), ValueError, ("mask", f"got shape ({K}, {B})", f"({B}, {K})")),
    "(B,)": (lambda: torch.ones(B).bool(), ValueError, ("mask", f"got shape ({B},)", f"wanted ({B}, {K})")),
    "(B, 1)": (lambda: torch.ones(B, 1).bool(), ValueError, ("mask", f"got shape ({B}, 1)", f"({B}, {K})")),
    "(B, k, d)": (lambda: torch.ones(B, K, D).bool(), ValueError, ("mask", f"({B}, {K}, {D})", f"({B}, {K})")),
    "device": (
        lambda: torch.ones(B, K, dtype=torch.bool, device="meta"),
        ValueError,
        ("mask", "got device meta", "wanted cpu"),
    ),
    "sparse": (lambda: torch.ones(B, K).bool().to_sparse(), TypeError, ("mask", "sparse", "dense")),
    "nested strided": (
        lambda: torch.nested.nested_tensor([torch.ones(K).bool(), torch.ones(1).bool()]),
        TypeError,
        ("mask: got a nested tensor", "dense"),
    ),
    "nested strided of floats": (
        lambda: torch.nested.nested_tensor([x(K), x(1)]),
        TypeError,
        ("mask: got dtype torch.float32", "torch.bool"),
    ),
    "dict without dict": (
        lambda: {name: torch.ones(B).bool() for name in "abc"},
        TypeError,
        ("mask", "got a dict", "embeddings are no dict"),
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize(("make", "error", "parts"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_bad_mask(function, make, error, parts, no_kernels):
    rejects(error, lambda: function(*(x() for _ in range(K)), mask=make()), *parts)


BAD_NAMED_MASKS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "missing key": (
        lambda: {"a": torch.ones(B).bool()},
        ValueError,
        ("mask", "got keys ['a']", "['a', 'b']"),
    ),
    "extra key": (
        lambda: {name: torch.ones(B).bool() for name in "abc"},
        ValueError,
        ("mask", "got keys ['a', 'b', 'c']", "['a', 'b']"),
    ),
    "other keys": (
        lambda: {name: torch.ones(B).bool() for name in "ac"},
        ValueError,
        ("mask", "got keys ['a', 'c']", "['a', 'b']"),
    ),
    "empty": (dict, ValueError, ("mask", "got keys []", "['a', 'b']")),
    "list inside": (
        lambda: {"a": torch.ones(B).bool(), "b": [True] * B},
        TypeError,
        ("mask['b']", "got list", f"({B},)"),
    ),
    "float inside": (
        lambda: {"a": torch.ones(B).bool(), "b": torch.ones(B)},
        TypeError,
        ("mask['b']", "got dtype torch.float32", "torch.bool"),
    ),
    "nested inside": (
        lambda: {"a": torch.nested.nested_tensor([torch.ones(2).bool()]), "b": torch.ones(B).bool()},
        TypeError,
        ("mask['a']: got a nested tensor", "dense"),
    ),
    "shape inside": (
        lambda: {"a": torch.ones(B, 1).bool(), "b": torch.ones(B).bool()},
        ValueError,
        ("mask['a']", f"got shape ({B}, 1)", f"wanted ({B},)"),
    ),
    "device inside": (
        lambda: {"a": torch.ones(B).bool(), "b": torch.ones(B, dtype=torch.bool, device="meta")},
        ValueError,
        ("mask['b']", "got device meta", "wanted cpu"),
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize(("make", "error", "parts"), BAD_NAMED_MASKS.values(), ids=BAD_NAMED_MASKS.keys())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_bad_mask_by_name(function, make, error, parts, no_kernels):
    rejects(error, lambda: function({"a": x(), "b": x()}, mask=make()), *parts)


TEMPERATURES: dict[str, tuple[Callable[..., Any], str]] = {
    "dominant_sv_loss": (lambda **options: dominant_sv_loss(x(), x(), **options), "temperature"),
    "pmrl_loss": (lambda **options: pmrl_loss(x(), x(), **options), "temperature"),
    "pmrl_loss, instance": (lambda **options: pmrl_loss(x(), x(), **options), "instance_temperature"),
    "instance_contrastive_loss": (lambda **options: instance_contrastive_loss(x(), **options), "temperature"),
}
each_temperature = pytest.mark.parametrize(("call", "name"), TEMPERATURES.values(), ids=TEMPERATURES.keys())

BAD_TEMPERATURES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "0": (lambda: 0.0, ValueError, ("got 0.0", "above 0")),
    "int 0": (lambda: 0, ValueError, ("got 0", "above 0")),
    "-0.0": (lambda: -0.0, ValueError, ("got -0.0", "above 0")),
    "negative": (lambda: -0.05, ValueError, ("got -0.05", "above 0")),
    "nan": (lambda: math.nan, ValueError, ("got nan", "finite number")),
    "inf": (lambda: math.inf, ValueError, ("got inf", "finite number")),
    "-inf": (lambda: -math.inf, ValueError, ("got -inf", "finite number")),
    "too large an int": (lambda: 10**400, ValueError, ("finite number",)),
    "True": (lambda: True, TypeError, ("got bool", "finite number")),
    "numpy bool": (lambda: np.True_, TypeError, ("got bool", "finite number")),
    "str": (lambda: "0.05", TypeError, ("got str", "finite number")),
    "None": (lambda: None, TypeError, ("got NoneType", "finite number")),
    "complex": (lambda: 0.05 + 0j, TypeError, ("got complex", "finite number")),
    "list": (lambda: [0.05], TypeError, ("got list", "finite number")),
    "int tensor": (lambda: torch.tensor(1), TypeError, ("dtype torch.int64", "floating-point")),
    "bool tensor": (lambda: torch.tensor(True), TypeError, ("dtype torch.bool", "floating-point")),
    "complex tensor": (lambda: torch.tensor(1j), TypeError, ("dtype torch.complex64", "floating-point")),
    "float8 tensor": (lambda: torch.tensor(0.5).to(torch.float8_e4m3fn), TypeError, ("dtype torch.float8_e4m3fn",)),
    "sparse tensor": (lambda: torch.tensor(0.5).to_sparse(), TypeError, ("sparse", "dense")),
    "(1,)": (lambda: torch.ones(1), ValueError, ("shape (1,)", "0-d tensor")),
    "(B,)": (lambda: torch.ones(B), ValueError, (f"shape ({B},)", "0-d tensor")),
    "device": (lambda: torch.ones((), device="meta"), ValueError, ("got device meta", "wanted cpu")),
}


@pytest.mark.parametrize("number", [1e39, 1e-38, 5e-324])
@pytest.mark.parametrize("which", ["pmrl_loss, instance", "instance_contrastive_loss"])
def test_contrasts_take_temperatures_that_float32_can_hold(which, number, no_kernels):
    call, name = TEMPERATURES[which]
    with pytest.raises(ValueError, match=f"^{name}: got {re.escape(str(number))}, wanted .* that float32 can hold"):
        call(**{name: number})


@each_temperature
@pytest.mark.parametrize(("make", "error", "parts"), BAD_TEMPERATURES.values(), ids=BAD_TEMPERATURES.keys())
def test_bad_temperature(call, name, make, error, parts, no_kernels):
    with pytest.raises(error) as caught:
        call(**{name: make()})
    assert caught.type is error
    assert str(caught.value).startswith(f"{name}: ")
    for part in parts:
        assert part in str(caught.value)


@each_temperature
@pytest.mark.parametrize("value", [0.0, -0.05, math.nan, math.inf, -math.inf], ids=str)
def test_bad_value_in_a_temperature_tensor_is_nan(call, name, value):
    """Reading it to raise would stall a GPU. Its gradient is NaN too, so that no optimiser goes on with it."""
    tau = torch.tensor(value, requires_grad=True)
    loss = call(**{name: tau})
    assert loss.isnan()
    loss.backward()
    assert tau.grad is not None
    assert tau.grad.isnan()


@pytest.mark.parametrize("value", [0.0, -0.05, math.nan, math.inf], ids=str)
def test_bad_value_in_a_temperature_tensor_is_nan_in_every_embedding(value):
    xs = modalities()
    tau = torch.tensor(value)
    for loss in (dominant_sv_loss(*xs, temperature=tau), pmrl_loss(*xs, instance_temperature=tau)):
        assert loss.isnan()
        for gradient in torch.autograd.grad(loss, xs):
            assert gradient.isnan().all()


def test_leading_objective_has_no_temperature():
    """So a bad one in a tensor cannot spoil it."""
    xs = modalities()
    loss = dominant_sv_loss(*xs, temperature=torch.tensor(math.nan), objective="leading")
    torch.testing.assert_close(loss, dominant_sv_loss(*xs, objective="leading"), **CLOSE)


# argument -> (value, error, parts); what each function takes is listed below
BAD_OPTIONS: dict[str, list[tuple[Any, type[Exception], tuple[str, ...]]]] = {
    "normalize": [
        (None, TypeError, ("got NoneType", "True or False")),
        (1, TypeError, ("got int", "True or False")),
        ("yes", TypeError, ("got str", "True or False")),
        (torch.tensor(True), TypeError, ("got Tensor", "True or False")),
    ],
    "return_components": [
        (1, TypeError, ("got int", "True or False")),
        (None, TypeError, ("got NoneType", "True or False")),
    ],
    "reduction": [
        ("average", ValueError, ("got 'average'", "'mean', 'sum', 'none'")),
        ("Mean", ValueError, ("got 'Mean'", "'mean'")),
        (None, ValueError, ("got None", "'none'")),
        (0, ValueError, ("got 0", "'mean'")),
    ],
    "objective": [
        ("svd", ValueError, ("got 'svd'", "'softmax', 'leading'")),
        (None, ValueError, ("got None", "'softmax'")),
        (True, ValueError, ("got True", "'softmax'")),
    ],
    "contrast": [
        ("pairs", ValueError, ("got 'pairs'", "'leading', 'modality'")),
        (None, ValueError, ("got None", "'leading'")),
    ],
    "backend": [
        ("cuda", ValueError, ("got 'cuda'", "None or one of", "'native'", "'triton'", "'reference'")),
        ("", ValueError, ("got ''", "'reference'")),
        ("Reference", ValueError, ("got 'Reference'", "'reference'")),
        (0, ValueError, ("got 0", "'reference'")),
        (["reference"], ValueError, ("got ['reference']", "'reference'")),
    ],
    "instance_weight": [
        (-1.0, ValueError, ("got -1.0", "at least 0")),
        (math.nan, ValueError, ("got nan", "finite")),
        (math.inf, ValueError, ("got inf", "finite")),
        (1e39, ValueError, ("got 1e+39", "float32")),
        ("1", TypeError, ("got str", "finite number")),
        (True, TypeError, ("got bool", "finite number")),
        (None, TypeError, ("got NoneType", "finite number")),
        (torch.tensor(1.0), TypeError, ("got Tensor", "finite number")),
    ],
    "group": [
        ("World", TypeError, ("got 'World'", 'wanted a torch.distributed.ProcessGroup, "world" or None')),
        ("world", ValueError, ('got "world" where no process group is initialised', "init_process_group")),
        (0, TypeError, ("got int", "or None")),
        (False, TypeError, ("got bool", "or None")),
    ],
}
OPTIONS = {
    "dominant_sv_loss": ("normalize", "reduction", "objective", "backend"),
    "pmrl_loss": (
        "normalize", "objective", "contrast", "backend", "instance_weight", "group", "return_components",
    ),
    "singular_values": ("normalize", "backend"),
    "dominant_singular_value": ("normalize", "backend"),
    "dominant_singular_triplet": ("normalize", "backend"),
    "instance_contrastive_loss": ("normalize", "backend", "group"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "option", "value", "error", "parts"),
    [
        pytest.param(function, option, value, error, parts, id=f"{function}-{option}={str(value)[:12]}")
        for function, options in OPTIONS.items()
        for option in options
        for value, error, parts in BAD_OPTIONS[option]
    ],
)
def test_bad_option(function, option, value, error, parts, no_kernels):
    embeddings = [x()] if function == "instance_contrastive_loss" else [x(), x()]
    call = getattr(pmrl_kernels, function)
    rejects(error, lambda: call(*embeddings, **{option: value}), f"{option}: got", *parts)


@pytest.mark.parametrize("function", OPTIONS)
@pytest.mark.parametrize("keyword", ["tau", "temperatur", "eps", "dim"])
def test_unknown_keyword(function, keyword, no_kernels):
    with pytest.raises(TypeError, match=rf"{function}\(\) got an unexpected keyword argument '{keyword}'"):
        getattr(pmrl_kernels, function)(x(), **{keyword: 1.0})


@pytest.mark.parametrize("function", ["singular_values", "dominant_singular_value", "dominant_singular_triplet"])
def test_primitives_have_no_temperature(function, no_kernels):
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        getattr(pmrl_kernels, function)(x(), x(), temperature=0.05)


@pytest.mark.parametrize("function", OPTIONS)
def test_known_backend_that_is_not_available(function, no_kernels, monkeypatch):
    monkeypatch.setattr(ops, "available", {})
    monkeypatch.setattr(ops, "unavailable_reasons", {"native": "no compiler was found"})
    with pytest.raises(RuntimeError, match="'native' is not available: no compiler was found"):
        getattr(pmrl_kernels, function)(x(), backend="native")


# ------------------------------------------------------------------------------------------------
# The rows of instance_contrastive_loss
# ------------------------------------------------------------------------------------------------

BAD_ROWS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "None": (lambda: None, TypeError, ("u: got NoneType", "tensor (B, d)")),
    "list": (lambda: [x()], TypeError, ("u: got list", "tensor (B, d)")),
    "numpy": (lambda: np.ones((B, D)), TypeError, ("u: got ndarray",)),
    "str": (lambda: "rows", TypeError, ("u: got str",)),
    "0-d": (lambda: torch.tensor(1.0), ValueError, ("u: got shape ()", "(B, d)")),
    "1-d": (lambda: x(D), ValueError, (f"u: got shape ({D},)", "(B, d)")),
    "3-d": (lambda: x(2, 3, 4), ValueError, ("u: got shape (2, 3, 4)", "(B, d)")),
    "d = 0": (lambda: x(2, 0), ValueError, ("u: got shape (2, 0)", "d of at least 1")),
    "int": (lambda: x(dtype=torch.int64), TypeError, ("u: got dtype torch.int64", FLOATS)),
    "complex": (lambda: x(dtype=torch.complex64), TypeError, ("u: got dtype torch.complex64", FLOATS)),
    "bool": (lambda: x(dtype=torch.bool), TypeError, ("u: got dtype torch.bool", FLOATS)),
    "float8": (lambda: x().to(torch.float8_e5m2), TypeError, ("u: got dtype torch.float8_e5m2", FLOATS)),
    "sparse": (lambda: x().to_sparse(), TypeError, ("u: got a torch.sparse_coo", "dense")),
    "nested": (lambda: torch.nested.nested_tensor([x(3), x(5)]), TypeError, ("u: got a nested tensor", "dense")),
}


@pytest.mark.parametrize(("make", "error", "parts"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_bad_rows(make, error, parts, no_kernels):
    rejects(error, lambda: instance_contrastive_loss(make()), *parts)


BAD_ROW_MASKS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "list": (lambda: [True] * B, TypeError, ("mask: got list", f"bool tensor ({B},)")),
    "dict": (lambda: {"a": torch.ones(B).bool()}, TypeError, ("mask: got dict", f"({B},)")),
    "float": (lambda: torch.ones(B), TypeError, ("mask: got dtype torch.float32", "torch.bool")),
    "(B, 1)": (lambda: torch.ones(B, 1).bool(), ValueError, (f"mask: got shape ({B}, 1)", f"wanted ({B},)")),
    "(d,)": (lambda: torch.ones(D).bool(), ValueError, (f"mask: got shape ({D},)", f"wanted ({B},)")),
    "device": (
        lambda: torch.ones(B, dtype=torch.bool, device="meta"),
        ValueError,
        ("mask: got device meta", "wanted cpu"),
    ),
}


@pytest.mark.parametrize(("make", "error", "parts"), BAD_ROW_MASKS.values(), ids=BAD_ROW_MASKS.keys())
def test_bad_row_mask(make, error, parts, no_kernels):
    rejects(error, lambda: instance_contrastive_loss(x(), mask=make()), *parts)


@pytest.mark.parametrize("normalize", [True, False])
def test_strided_rows(normalize):
    (u,) = xs = modalities(1)
    found = values_and_gradients(instance_contrastive_loss(u.T.contiguous().T, normalize=normalize), xs)
    expected = values_and_gradients(instance_contrastive_loss(u, normalize=normalize), xs)
    torch.testing.assert_close(found, expected, **CLOSE)


# ------------------------------------------------------------------------------------------------
# The examples that warm_up takes
# ------------------------------------------------------------------------------------------------

BAD_EXAMPLES: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], tuple[str, ...]]] = {
    "None": (lambda: {"xs": [None]}, TypeError, ("embeddings: got NoneType", "wanted floating-point tensors")),
    "numpy": (lambda: {"xs": [np.ones((B, D))]}, TypeError, ("embeddings: got ndarray", "trees of them")),
    "number": (lambda: {"xs": [x(), 0.05]}, TypeError, ("embeddings: got float", "wanted floating-point tensors")),
    "numpy in a dict": (lambda: {"xs": [{"a": x(), "b": np.ones(3)}]}, TypeError, ("embeddings: got ndarray",)),
    "int": (lambda: {"xs": [x(dtype=torch.int64)]}, TypeError, ("embeddings: got dtype torch.int64", FLOATS)),
    "bool": (lambda: {"xs": [x(), x(dtype=torch.bool)]}, TypeError, ("embeddings: got dtype torch.bool", "mask=...")),
    "sparse": (lambda: {"xs": [x().to_sparse()]}, TypeError, ("embeddings: got a torch.sparse_coo", "dense")),
    "nested": (
        lambda: {"xs": [torch.nested.nested_tensor([x(3), x(5)])]},
        TypeError,
        ("embeddings: got a nested tensor", "dense"),
    ),
    "meta": (lambda: {"xs": [x(), x(device="meta")]}, ValueError, ("embeddings: got device meta", "wanted one")),
    "mask of numpy": (
        lambda: {"xs": [x()], "mask": np.ones((B, 1), bool)},
        TypeError,
        ("mask: got ndarray", "wanted bool tensors"),
    ),
    "mask True": (lambda: {"xs": [x()], "mask": True}, TypeError, ("mask: got bool", "wanted bool tensors")),
    "None in a mask": (
        lambda: {"xs": [{"a": x()}], "mask": {"a": None}},
        TypeError,
        ("mask: got NoneType", "wanted bool tensors"),
    ),
}


@pytest.mark.parametrize(("make", "error", "parts"), BAD_EXAMPLES.values(), ids=BAD_EXAMPLES.keys())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_bad_examples(make, error, parts):
    """Before the function is called."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("the function was called with bad examples")

    arguments = make()
    rejects(error, lambda: warm_up(reached, *arguments.pop("xs"), **arguments), *parts)


def test_messages_are_one_line():
    """They end up in logs; the list above only looks at their parts."""
    with pytest.raises(ValueError, match=re.escape("embeddings[1]: got shape (5, 3), wanted (4, 3)")) as caught:
        dominant_sv_loss(x(4, 3), x(5, 3))
    assert "\n" not in str(caught.value)


def test_likely_slips_are_named():
    """Options by position, containers beside one another, a mask that fits the authors' (B, d, k) layout."""
    a, b = torch.ones(5, 4), torch.ones(5, 4)
    with pytest.raises(TypeError, match=r"embeddings\[2\]: got dtype torch.bool.*mask=\.\.\."):
        dominant_sv_loss(a, b, torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"embeddings\[2\]: got float.*by keyword"):
        dominant_sv_loss(a, b, 0.05)
    with pytest.raises(TypeError, match=r"embeddings\[0\]: got list.*passed alone"):
        dominant_sv_loss([a, b], torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: got shape \(5, 3\).*\(B, d, k\) stack must be transposed"):
        dominant_sv_loss(torch.ones(5, 8, 3), mask=torch.ones(5, 3, dtype=torch.bool))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_distributed_tensors_are_refused_with_a_hint():
    """Their rows are spread over processes, which is what group= is for. Kernels would see this process's alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        spread = DTensor.from_local(x(4, 3), init_device_mesh("cpu", (2,)), [Shard(0)])
        calls = {
            "embeddings[0]": lambda: dominant_sv_loss(spread, spread),
            "embeddings[1]": lambda: pmrl_loss(x(8, 3), spread),
            "embeddings": lambda: singular_values(spread[:, None]),
            "u": lambda: instance_contrastive_loss(spread),
            "temperature": lambda: dominant_sv_loss(x(8, 3), x(8, 3), temperature=spread.sum()),
            "mask": lambda: instance_contrastive_loss(x(8, 3), mask=spread[:, 0] > 0),
        }
        for name, call in calls.items():
            with pytest.raises(
                TypeError, match=re.escape(f"{name}: got a DTensor, wanted a plain tensor: x.to_local()")
            ):
                call()
    finally:
        torch.distributed.destroy_process_group()
