"""by_id: rows of the same instances come together, as dictionaries would have it, and gradients go back, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from decimal import Decimal
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pmrl_kernels import by_id
from tests.contract.test_properties import lenient
from tests.tools.arguments import rejects, x
from tests.tools.functions import DTYPES, MIXING, grads

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
FORMS = ("numbers", "rows of 1", "rows of 2", "rows of 3", "strings", "tuples", "ints")

Ids = list[tuple[int, int, int]]  # as they are drawn; a form keeps all that tells them apart


def keys(ids: Ids, form: str) -> list[Hashable]:
    """What a dictionary holds them by: the form without tensors."""
    make: dict[str, Callable[[tuple[int, int, int]], Hashable]] = {
        "rows of 2": lambda id: (id[0], id[2]),
        "rows of 3": tuple,
        "strings": lambda id: f"{id[0]}/{id[2]:+}",
        "tuples": lambda id: (f"set {id[0]}", id[2]),
        "rows of 1": lambda id: (10 * id[2] + id[0],),
    }
    return [make.get(form, lambda id: 10 * id[2] + id[0])(id) for id in ids]


def given_as(ids: Ids, form: str, dtype: torch.dtype) -> Tensor | list[Hashable]:
    found = keys(ids, form)
    if form in ("strings", "tuples", "ints"):
        return found
    c = 0 if form == "numbers" else int(form[-1])
    return torch.tensor(found, dtype=dtype).reshape((len(ids), c) if c else (len(ids),))


def oracle(embeddings: dict[str, Tensor], ids: dict[str, list[Hashable]]) -> tuple[Any, Any, list[Hashable]]:
    """Row by row: embeddings, mask and ids of all instances."""
    union = list(dict.fromkeys(id for own in ids.values() for id in own))
    rows = {name: {id: x[i] for i, id in enumerate(ids[name])} for name, x in embeddings.items()}
    of = {
        name: torch.stack([rows[name].get(id, torch.zeros_like(x[:1].sum(0))) for id in union]) if union else x[:0]
        for name, x in embeddings.items()
    }
    return of, {name: torch.tensor([id in own for id in union], dtype=torch.bool) for name, own in rows.items()}, union


@st.composite
def overlaps(draw: st.DrawFn, forms: tuple[str, ...] = FORMS) -> tuple[dict[str, Ids], str]:
    """For each modality the ids of some instances, in any order, none of them and all of them included."""
    pool = [(0, 5, n) for n in range(-2, 4)] + [(1, 5, n) for n in range(3)]
    some = st.one_of(st.lists(st.sampled_from(pool), unique=True), st.permutations(pool))
    return {f"m{m}": draw(some) for m in range(draw(st.integers(1, 5)))}, draw(st.sampled_from(forms))


@lenient
@given(overlap=overlaps(), d=st.integers(1, 5), seed=st.integers(0, 2**31), data=st.data())
def test_rows_of_the_same_instance_come_together(overlap, d, seed, data):
    """Embeddings, mask and ids, their order, dtypes and gradients, to the bit."""
    drawn, form = overlap
    generator = torch.Generator().manual_seed(seed)
    xs = {}
    for name, own in drawn.items():
        row = torch.randn(len(own), 2 * d, generator=generator).to(data.draw(st.sampled_from(DTYPES)))
        xs[name] = (row[:, ::2] if data.draw(st.booleans()) else row[:, :d]).detach().requires_grad_()
    dtypes = {name: data.draw(st.sampled_from(INTEGERS)) for name in drawn}
    ids = {name: given_as(own, form, dtypes[name]) for name, own in drawn.items()}
    found = by_id(xs, dict(reversed(ids.items())))  # their keys come in any order
    embeddings, mask, union = oracle(xs, {name: keys(own, form) for name, own in drawn.items()})

    assert list(found.embeddings) == list(found.mask) == list(xs)
    for name, row in xs.items():
        assert found.embeddings[name].dtype == row.dtype
        assert torch.equal(found.embeddings[name], embeddings[name])
        assert found.mask[name].dtype == torch.bool
        assert torch.equal(found.mask[name], mask[name])
    if isinstance(found.ids, Tensor):
        assert found.ids.dtype == torch.cat(list(ids.values())).dtype
        assert found.ids.shape[1:] == ids["m0"].shape[1:]
        assert [tuple(id) if isinstance(id, list) else id for id in found.ids.tolist()] == union
    else:
        assert found.ids == union

    above = {name: torch.randn(y.shape, generator=generator).to(y.dtype) for name, y in found.embeddings.items()}
    total = sum((y.double() * above[name].double()).sum() for name, y in found.embeddings.items())
    for (name, own), gradient in zip(drawn.items(), grads(total, list(xs.values())), strict=True):
        expected = above[name][[union.index(id) for id in keys(own, form)]]
        assert torch.equal(gradient, expected.reshape(gradient.shape))


@pytest.mark.parametrize("function", MIXING)
@pytest.mark.parametrize("form", ["numbers", "rows of 2", "strings"])
def test_losses_are_those_of_a_mask_made_by_hand(backend, device, function, form):
    """The same bits, also of the gradients, which reach the rows as they came."""
    B, d = 9, 6
    whole = [torch.randn(B, d, device=device) for _ in range(3)]
    there = [torch.tensor([0, 1, 2, 3, 4, 5, 6]), torch.tensor([8, 3, 1, 0, 7]), torch.tensor([7, 5, 0, 6])]
    mask = torch.zeros(B, 3, dtype=torch.bool, device=device)
    for m, rows in enumerate(there):
        mask[rows.to(device), m] = True
    # In the order in which they appear: 0 to 6, then 8 and 7.
    order = [*range(7), 8, 7]
    by_hand = [z[order].requires_grad_() for z in whole]
    expected = MIXING[function](by_hand, mask=mask[order], backend=backend)

    xs = {f"m{m}": whole[m][rows.to(device)].requires_grad_() for m, rows in enumerate(there)}
    ids = {f"m{m}": given_as([(n % 3, 0, n) for n in rows.tolist()], form, torch.int64) for m, rows in enumerate(there)}
    if form != "strings":
        ids = {name: own.to(device) for name, own in ids.items()}
    found = by_id(xs, ids)
    loss = MIXING[function](found.embeddings, mask=found.mask, backend=backend)
    assert torch.equal(loss, expected)
    for rows, gradient, hand in zip(there, grads(loss, list(xs.values())), grads(expected, by_hand), strict=True):
        assert torch.equal(gradient, hand[[order.index(n) for n in rows.tolist()]])


@pytest.mark.parametrize("numbers", [[7, -3, 2**63 - 1, -(2**63), 0], ["a", "", "A", "a ", "é"]])
def test_all_rows_in_common(numbers):
    """The same ids in the same order: embeddings as they are, in memory of their own, and a mask of True."""
    xs = {name: torch.randn(5, 4) for name in ("text", "audio")}
    ids = {name: torch.tensor(numbers) if isinstance(numbers[0], int) else numbers for name in xs}
    found = by_id(xs, ids)
    for name in xs:
        assert torch.equal(found.embeddings[name], xs[name])
        assert found.embeddings[name].data_ptr() != xs[name].data_ptr()
        assert found.mask[name].all()
    assert (found.ids.tolist() if isinstance(found.ids, Tensor) else found.ids) == numbers


def test_nothing_in_common(backend, device):
    """Every instance has one modality: nothing aligns, and gradients are 0."""
    xs = {"text": x(2, 3, device=device).requires_grad_(), "audio": x(3, 3, device=device).requires_grad_()}
    found = by_id(xs, {"text": torch.arange(2), "audio": torch.arange(2, 5)})
    assert torch.stack(list(found.mask.values())).sum(0).tolist() == [1] * 5
    loss = MIXING["leave_one_out-softmax"](found.embeddings, mask=found.mask, backend=backend)
    assert loss == 0
    assert not any(g.any() for g in grads(loss, list(xs.values())))


@pytest.mark.parametrize("form", ["numbers", "rows of 2", "strings"])
def test_modalities_without_rows(backend, device, form):
    xs = {"text": x(0, 3, device=device).requires_grad_(), "audio": x(2, 3, device=device).requires_grad_()}
    ids = {"text": given_as([], form, torch.int32), "audio": given_as([(0, 0, 4), (0, 0, 2)], form, torch.int64)}
    found = by_id(xs, ids)
    assert not found.mask["text"].any()
    assert found.mask["audio"].tolist() == [True, True]
    assert torch.equal(found.embeddings["audio"], xs["audio"])
    loss = MIXING["pairs-softmax"](found.embeddings, mask=found.mask, backend=backend)
    assert loss == 0
    assert [g.shape for g in grads(loss, list(xs.values()))] == [(0, 3), (2, 3)]

    found = by_id({name: z[:0] for name, z in xs.items()}, {name: own[:0] for name, own in ids.items()})
    assert [y.shape for y in found.embeddings.values()] == [(0, 3)] * 2
    assert [y.shape for y in found.mask.values()] == [(0,)] * 2
    assert len(found.ids) == 0
    assert MIXING["pairs-softmax"](found.embeddings, mask=found.mask, backend=backend) == 0


def test_ids_of_another_device():
    """They are matched where they are, and never read from the embeddings' device: that of meta has nothing to read."""
    xs = {"text": x(2, 3, device="meta"), "audio": x(3, 3, dtype=torch.float64, device="meta")}
    found = by_id(xs, {"text": torch.tensor([5, 6]), "audio": torch.tensor([6, 7, 8])})
    assert [y.shape for y in found.embeddings.values()] == [(4, 3)] * 2
    assert {y.device.type for y in (*found.embeddings.values(), *found.mask.values())} == {"meta"}
    assert found.ids.tolist() == [5, 6, 7, 8]
    assert by_id(xs, {"text": ["a", "b"], "audio": ["b", "c", "d"]}).ids == ["a", "b", "c", "d"]
    with torch.device("meta"):  # a default device is of tensors that are made
        found = by_id({"text": torch.randn(2, 3, device="cpu")}, {"text": ["a", "b"]})
    assert found.embeddings["text"].device.type == "cpu"


@pytest.mark.parametrize("c", [0, 2])
def test_many_rows(device, c):
    """As the dictionary has it, with far more rows than anything is special for, and negative ids."""
    d, names = 3, ("text", "video", "audio")
    pool = torch.stack([torch.randint(-4, 4, (9000,)), torch.arange(-4500, 4500)], 1)[:, 2 - max(c, 1) :]
    ids = {name: pool[torch.randperm(9000)[:4096]] for name in names}
    ids = ids if c else {name: own[:, 0] for name, own in ids.items()}
    xs = {name: torch.randn(4096, d) for name in names}
    as_keys = {name: [tuple(id) if c else id for id in own.tolist()] for name, own in ids.items()}
    embeddings, mask, union = oracle(xs, as_keys)
    found = by_id({name: z.to(device) for name, z in xs.items()}, {name: own.to(device) for name, own in ids.items()})
    assert isinstance(found.ids, Tensor)
    assert [tuple(id) if c else id for id in found.ids.tolist()] == union
    for name in names:
        assert torch.equal(found.embeddings[name].cpu(), embeddings[name])
        assert torch.equal(found.mask[name].cpu(), mask[name])


class Watching(TorchDispatchMode):
    """Which operations look at values to know what shape comes out, or read one: where a host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags
        if func is torch.ops.aten.index.Tensor:  # tagged, though it waits for indices by bool alone
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if waits:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_wait(monkeypatch):
    """Number of instances and whether an id repeats are one read; nothing else depends on values."""
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: (reads.append(self.shape), tolist(self))[1])
    xs = {name: torch.randn(6, 3, requires_grad=True) for name in ("text", "audio")}
    ids = {"text": torch.tensor([[0, n] for n in range(6)]), "audio": torch.tensor([[n % 2, n] for n in range(6)])}
    with Watching() as watching:
        found = by_id(xs, ids)
        sum(y.sum() for y in found.embeddings.values()).backward()
    assert reads == [(2,)]
    assert watching.seen == []
    with Watching() as watching:  # it does see such an operation
        torch.arange(3).nonzero()
    assert watching.seen == ["aten.nonzero.default"]


def test_gradients_of_any_order():
    ids = {"text": torch.tensor([3, 1, 2]), "audio": torch.tensor([2, 5])}

    def total(text: Tensor, audio: Tensor) -> Tensor:
        found = by_id({"text": text, "audio": audio}, ids).embeddings
        return (found["text"].sin() * found["audio"].cos()).sum(1)

    xs = tuple(torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    assert torch.autograd.gradcheck(total, xs)
    assert torch.autograd.gradgradcheck(total, xs)
    plain = torch.autograd.grad(total(*xs).sum(), xs)
    transformed = torch.func.grad(lambda *z: total(*z).sum(), argnums=(0, 1))(*xs)
    assert all(torch.equal(a, b) for a, b in zip(plain, transformed, strict=True))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", ["numbers", "rows of 2", "strings"])
def test_compiled_code_calls_it(form):
    """Between compiled parts: the eager bits, for batches of any size and other ids, and the same refusals."""

    def step(xs: dict[str, Tensor], ids: dict[str, Any]) -> tuple[Tensor, Any]:
        found = by_id({name: 2 * z for name, z in xs.items()}, ids)
        return MIXING["leave_one_out-softmax"](found.embeddings, mask=found.mask, backend="reference"), found.ids

    compiled = torch.compile(step, backend="aot_eager")
    for sizes in ((4, 6), (5, 3), (9, 8), (7, 0)):
        xs = {name: torch.randn(n, 5, requires_grad=True) for name, n in zip(("text", "audio"), sizes, strict=True)}
        drawn = {name: [(n % 2, 0, n) for n in torch.randperm(9)[: len(z)].tolist()] for name, z in xs.items()}
        ids = {name: given_as(own, form, torch.int64) for name, own in drawn.items()}
        results = [call(xs, ids) for call in (step, compiled)]
        assert torch.equal(results[0][0], results[1][0])
        assert str(results[0][1]) == str(results[1][1])
        (one, other) = ([*grads(loss, list(xs.values()))] for loss, _ in results)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    ids["audio"] = given_as([(0, 0, 1)] * 2, form, torch.int64)
    xs["audio"] = torch.randn(2, 5)
    rejects(ValueError, lambda: compiled(xs, ids), "ids['audio']: got ", "twice")


def tensors(*sizes: int) -> dict[str, Tensor]:
    return {name: x(n, 3) for name, n in zip(("text", "audio"), sizes, strict=False)}


def numbers(*ids: Any) -> dict[str, Any]:
    return dict(zip(("text", "audio"), ids, strict=False))


INTS = "wanted an integer one of torch.int64"
BAD: dict[str, tuple[Any, Any, type[Exception], tuple[str, ...]]] = {
    "no dict": ([x(2, 3)], [torch.arange(2)], TypeError, ("embeddings", "got list", "wanted a dict of tensors (B, d)")),
    "ids are no dict": (tensors(2), torch.arange(2), TypeError, ("ids", "got Tensor", "wanted a dict")),
    "no modality": ({}, {}, ValueError, ("embeddings", "got none")),
    "a key is missing": (
        tensors(2, 2),
        numbers(torch.arange(2)),
        ValueError,
        ("ids", "got keys ['text']", "wanted those of embeddings, ['text', 'audio']"),
    ),
    "a key too many": (tensors(2), numbers(torch.arange(2), torch.arange(2)), ValueError, ("ids", "'audio', 'text'")),
    "no tensor": (numbers([1.0]), numbers([1]), TypeError, ("embeddings['text']", "got list", "floating-point tensor")),
    "integers for embeddings": (
        numbers(torch.ones(2, 3).long()),
        numbers(torch.arange(2)),
        TypeError,
        ("torch.int64",),
    ),
    "a stack": (
        numbers(x(2, 3, 4)),
        numbers(torch.arange(2)),
        ValueError,
        ("embeddings['text']", "got shape (2, 3, 4)", "wanted (B, d)"),
    ),
    "other d": (
        numbers(x(2, 3), x(2, 4)),
        numbers(torch.arange(2), torch.arange(2)),
        ValueError,
        ("embeddings['audio']", "got shape (2, 4)", "wanted (B, 3)", "embeddings['text']"),
    ),
    "d = 0": (numbers(x(2, 0)), numbers(torch.arange(2)), ValueError, ("embeddings", "d = 0")),
    "too many modalities": (
        {str(m): x(1, 3) for m in range(33)},
        {str(m): torch.arange(1) for m in range(33)},
        ValueError,
        ("embeddings", "k = 33", "at most 32"),
    ),
    "embeddings of two devices": (
        numbers(x(2, 3), x(2, 3, device="meta")),
        numbers(torch.arange(2), torch.arange(2)),
        ValueError,
        ("embeddings['audio']", "got device meta", "wanted cpu"),
    ),
    "float ids": (tensors(2), numbers(torch.ones(2)), TypeError, ("ids['text']", "got dtype torch.float32", INTS)),
    "bool ids": (tensors(2), numbers(torch.ones(2).bool()), TypeError, ("ids['text']", "got dtype torch.bool", INTS)),
    "float ids in the second": (
        tensors(2, 2),
        numbers(torch.arange(2), torch.arange(2.0)),
        TypeError,
        ("ids['audio']", "got dtype torch.float32", INTS),
    ),
    "sparse ids": (tensors(2), numbers(torch.arange(2).to_sparse()), TypeError, ("ids['text']", "torch.sparse_coo")),
    "ids without values": (tensors(2), numbers(torch.arange(2, device="meta")), ValueError, ("ids['text']", "meta")),
    "0-d ids": (tensors(1), numbers(torch.tensor(1)), ValueError, ("ids['text']", "got shape ()", "(1,) or (1, c)")),
    "fewer ids than rows": (
        tensors(4, 3),
        numbers(torch.arange(4), torch.arange(2)),
        ValueError,
        ("ids['audio']", "got shape (2,)", "wanted (3,) or (3, c), the ids of 3 rows"),
    ),
    "ids of no numbers": (
        tensors(2),
        numbers(torch.ones(2, 0).long()),
        ValueError,
        ("ids['text']", "got shape (2, 0)"),
    ),
    "rows and numbers": (
        tensors(2, 2),
        numbers(torch.arange(2), torch.arange(4).reshape(2, 2)),
        ValueError,
        ("ids['audio']", "got shape (2, 2)", "wanted (2,)", "ids['text']"),
    ),
    "rows of other lengths": (
        tensors(2, 2),
        numbers(torch.arange(4).reshape(2, 2), torch.arange(6).reshape(2, 3)),
        ValueError,
        ("ids['audio']", "got shape (2, 3)", "wanted (2, 2)", "ids['text']"),
    ),
    "tensor and list": (
        tensors(2, 2),
        numbers(torch.arange(2), [0, 1]),
        TypeError,
        ("ids['audio']", "got list", "wanted a tensor as ids['text'] is one"),
    ),
    "list and tensor": (
        tensors(2, 2),
        numbers([0, 1], torch.arange(2)),
        TypeError,
        ("ids['audio']", "got a tensor", "wanted a sequence as ids['text'] is one"),
    ),
    "one string": (tensors(2), numbers("ab"), TypeError, ("ids['text']", "got str", "sequence of 2 hashables")),
    "an array": (tensors(2), numbers(np.arange(2)), TypeError, ("ids['text']", "got ndarray", "torch.from_numpy(x)")),
    "a set": (tensors(2), numbers({1, 2}), TypeError, ("ids['text']", "got set", "a sequence of 2 hashables")),
    "fewer strings than rows": (tensors(3), numbers(["a"]), ValueError, ("ids['text']", "got 1 ids, wanted 3")),
    "strings and numbers": (
        tensors(2, 2),
        numbers(["1", "2"], [1, 2]),
        TypeError,
        ("ids['audio'][0]", "got int", "wanted str", "ids['text']"),
    ),
    "kinds mixed in one": (tensors(2), numbers(["1", 2]), TypeError, ("ids['text'][1]", "got int", "wanted str")),
    "floats": (tensors(2), numbers([1.0, 2.0]), TypeError, ("ids['text'][0]", "got float", "wanted a string, an int")),
    "floats of NumPy": (tensors(1), numbers([np.float32(1)]), TypeError, ("ids['text'][0]", "got float32", "floats")),
    "complex numbers": (tensors(1), numbers([0.3 + 0j]), TypeError, ("ids['text'][0]", "got complex", "floats")),
    "what is not equal to itself": (
        tensors(2),
        numbers([Decimal("0.3"), Decimal("nan")]),
        TypeError,
        ("ids['text'][1]", "got Decimal", "wanted what is equal to itself"),
    ),
    "no time": (
        tensors(1),
        numbers([np.datetime64("NaT")]),
        TypeError,
        ("ids['text'][0]", "got datetime64", "wanted what is equal to itself"),
    ),
    "floats in tuples": (tensors(1), numbers([("a", 1.0)]), TypeError, ("ids['text'][0][1]", "got float", "floats")),
    "tensors in tuples": (
        tensors(1, 1),
        numbers([("a", (2, torch.tensor(3)))], [("a", (2, torch.tensor(3)))]),
        TypeError,
        ("ids['text'][0][1][1]", "got Tensor", "wanted a hashable"),
    ),
    "tuples of strings and numbers": (
        tensors(1, 2),
        numbers([("a", 3)], [("a", None), ("a", "3")]),
        TypeError,
        ("ids['audio'][1][1]", "got str", "wanted int as ids['text'] has them"),
    ),
    "lists": (tensors(2), numbers([[1], [2]]), TypeError, ("ids['text'][0]", "got list", "wanted a hashable")),
    "tuples of lists": (
        tensors(2),
        numbers([(1, [0]), (1, [2])]),
        TypeError,
        ("ids['text'][0]", "got tuple", "wanted a hashable"),
    ),
    "tensors in a list": (tensors(2), numbers(list(torch.arange(2))), TypeError, ("ids['text'][0]", "one tensor")),
    "a number twice": (
        tensors(2, 4),
        numbers(torch.tensor([5, 6]), torch.tensor([6, 8, -9, 8])),
        ValueError,
        ("ids['audio']: got 8 twice, wanted every id at most once in a modality",),
    ),
    "a row twice": (
        tensors(3, 1),
        numbers(torch.tensor([[5, 6], [5, 7], [5, 6]]), torch.tensor([[5, 6]])),
        ValueError,
        ("ids['text']: got (5, 6) twice",),
    ),
    "a string twice": (
        tensors(1, 3),
        numbers(["a"], ["a", "b", "b"]),
        ValueError,
        ("ids['audio']: got 'b' twice",),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    embeddings, ids, error, told = BAD[case]
    rejects(error, lambda: by_id(embeddings, ids), *told)
