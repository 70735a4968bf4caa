"""Temperatures, options and keywords that are refused, with the same errors as embeddings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pmrl_kernels
from pmrl_kernels import dominant_sv_loss, instance_contrastive_loss, ops, pmrl_loss
from tests.tools.arguments import CLOSE, B, modalities, rejects, x

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
def test_contrasts_take_temperatures_that_float32_has(which, number, no_kernels):
    call, name = TEMPERATURES[which]
    with pytest.raises(
        ValueError, match=f"^{name}: got {re.escape(str(number))}, wanted one of float32's normal numbers"
    ):
        call(**{name: number})


@each_temperature
@pytest.mark.parametrize(("make", "error", "parts"), BAD_TEMPERATURES.values(), ids=BAD_TEMPERATURES.keys())
def test_bad_temperature(call, name, make, error, parts, no_kernels):
    if name == "instance_temperature" and make() is None:
        return  # the default
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
BAD_WEIGHTS: list[tuple[Any, type[Exception], tuple[str, ...]]] = [
    (-1.0, ValueError, ("got -1.0", "at least 0")),
    (math.nan, ValueError, ("got nan", "finite")),
    (math.inf, ValueError, ("got inf", "finite")),
    (1e39, ValueError, ("got 1e+39", "float32")),
    ("1", TypeError, ("got str", "finite number")),
    (True, TypeError, ("got bool", "finite number")),
    (None, TypeError, ("got NoneType", "finite number")),
    (torch.tensor(1.0), TypeError, ("got Tensor", "finite number")),
]
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
        ("triples", ValueError, ("got 'triples'", "'leading', 'modality', 'leave_one_out', 'pairs'")),
        (None, ValueError, ("got None", "'leading'")),
    ],
    "backend": [
        ("gpu", ValueError, ("got 'gpu'", "None or one of", "'native'", "'triton'", "'reference'")),
        ("", ValueError, ("got ''", "'reference'")),
        ("Reference", ValueError, ("got 'Reference'", "'reference'")),
        (0, ValueError, ("got 0", "'reference'")),
        (["reference"], ValueError, ("got ['reference']", "'reference'")),
    ],
    "instance_weight": BAD_WEIGHTS,
    "alignment_weight": BAD_WEIGHTS,
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
        "normalize", "objective", "contrast", "backend", "instance_weight", "alignment_weight", "group",
        "return_components",
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


def test_the_alignment_has_temperatures_that_contrasts_have_not():
    xs = modalities()
    for value in (1e-40, 1e39):
        found = pmrl_loss(xs, temperature=value, return_components=True).alignment
        tau = torch.tensor(value, dtype=torch.float64)
        assert torch.equal(found, pmrl_loss(xs, temperature=tau, return_components=True).alignment)


def test_ends_of_what_float32_has():
    x = torch.randn(4, 5)
    for value in (np.finfo(np.float32).tiny, np.finfo(np.float32).max):
        assert torch.equal(instance_contrastive_loss(x, np.float32(value)), instance_contrastive_loss(x, float(value)))
    assert pmrl_loss(x, x, instance_weight=torch.finfo(torch.float32).max, alignment_weight=0.0).isfinite()
