"""Embeddings and masks that are refused.

An error names the argument, what came and what was wanted, and is raised before any kernel runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pmrl_kernels import dominant_sv_loss, instance_contrastive_loss, pmrl_loss, singular_values, warm_up
from tests.tools.arguments import FLOATS, FUNCTIONS, B, D, K, rejects, x

# ------------------------------------------------------------------------------------------------
# Embeddings and their masks
# ------------------------------------------------------------------------------------------------


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
    "numpy among tensors": (lambda: (x(), np.ones((B, D))), TypeError, ("embeddings[1]: got ndarray", "from_numpy")),
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


# ------------------------------------------------------------------------------------------------
# The rows of instance_contrastive_loss
# ------------------------------------------------------------------------------------------------


BAD_ROWS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "None": (lambda: None, TypeError, ("u: got NoneType", "tensor (B, d)")),
    "list": (lambda: [x()], TypeError, ("u: got list", "tensor (B, d)")),
    "numpy": (lambda: np.ones((B, D)), TypeError, ("u: got ndarray", "torch.from_numpy(x)")),
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

    rejects(TypeError, lambda: warm_up(3, x()), "function: got int, wanted a callable")
    arguments = make()
    rejects(error, lambda: warm_up(reached, *arguments.pop("xs"), **arguments), *parts)


# ------------------------------------------------------------------------------------------------
# All of them
# ------------------------------------------------------------------------------------------------


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
    with pytest.raises(TypeError, match=r"embeddings\[0\]: got list.*mask by keyword"):
        dominant_sv_loss([a, b], torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"embeddings: got ndarray.*torch\.from_numpy"):
        dominant_sv_loss(a.numpy())
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
