"""Encoders in chunks: the whole batch's values and gradients, what runs how often, and what it may be given."""

from __future__ import annotations

import collections
import collections.abc
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pmrl_kernels import Chunked, DominantSVLoss, PMRLLoss, in_chunks
from tests.native.test_memory import Allocations

D = 12
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-13}  # of the norm


@pytest.fixture(autouse=True)
def ordinary_memory() -> Iterator[None]:
    """Filling memory with NaN allocates nothing, but runs operators that a profile need not show."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


def close(found: Tensor | None, expected: Tensor | None) -> None:
    if found is None or expected is None:
        assert found is expected
        return
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).norm()) <= CLOSE[expected.dtype] * max(float(expected.norm()), 1e-3)


class Words(nn.Module):
    """Of a tokenizer's batch: ids and a mask (B, T), and places (T,) that all instances share."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, D), nn.Embedding(7, D)
        self.layer = nn.TransformerEncoderLayer(D, 3, 24, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> Tensor:
        hidden = self.layer(self.words(batch["ids"]) + self.places(batch["places"]))
        mask = batch["mask"].unsqueeze(2).to(hidden.dtype)
        return scale * (hidden * mask).sum(1) / mask.sum(1)


def words(B: int) -> dict[str, Tensor]:
    mask = torch.arange(7) <= torch.randint(7, (B, 1))
    return {"ids": torch.randint(40, (B, 7)), "mask": mask, "places": torch.arange(7)}


ENCODERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(9, 20), nn.GELU(), nn.Linear(20, D)), lambda B: torch.randn(B, 9)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, D)),
        lambda B: torch.randn(B, 2, 6, 6),
    ),
    "transformer": (Words, words),
}
SIZES = [(8, 3), (9, 3), (2, 5), (1, 1), (7, 1), (0, 4)]  # B, rows of a chunk


class Model(nn.Module):
    """Three encoders, or one for all three views, and the loss with learned temperatures."""

    def __init__(self, make: Callable[[], nn.Module], count: int = 3) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(make() for _ in range(count))
        self.loss = PMRLLoss(
            1.0, contrast="leave_one_out", learnable_temperature=True, learnable_instance_temperature=True
        )

    def forward(self, views: list[Any]) -> Tensor:
        encoders = [self.encoders[i % len(self.encoders)] for i in range(len(views))]
        return self.loss([encoder(view) for encoder, view in zip(encoders, views, strict=True)])


def of_chunks(model: Model, chunk_size: int) -> Model:
    """The same parameters, in chunks."""
    model = copy.deepcopy(model)
    model.encoders = nn.ModuleList(Chunked(encoder, chunk_size, shared=("places",)) for encoder in model.encoders)
    return model


def gradients(model: nn.Module, views: list[Any]) -> list[Tensor | None]:
    """The loss, and the gradients of all parameters and of the views that have one."""
    loss = model(views)
    tensors = [x for x in views if isinstance(x, Tensor) and x.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, [*parameters, *tensors], allow_unused=True)]


def alike(kind: str, B: int, dtype: torch.dtype) -> list[Any]:
    """Three views of the same: of three that have nothing in common a loss would make much of embeddings' roundings."""
    view = ENCODERS[kind][1](B)
    if not isinstance(view, dict):
        return [(view + 0.2 * torch.randn_like(view)).to(dtype).requires_grad_() for _ in range(3)]
    others = [torch.where(torch.rand(B, 7) < 0.5, torch.randint(40, (B, 7)), view["ids"]) for _ in range(3)]
    return [view | {"ids": ids} for ids in others]


class Looped(nn.Module):
    """Chunks, whose activations are all kept."""

    def __init__(self, encoder: nn.Module, chunk_size: int) -> None:
        super().__init__()
        self.encoder, self.chunk_size = encoder, chunk_size

    def forward(self, view: Any) -> Tensor:
        if isinstance(view, Tensor):
            return torch.cat([self.encoder(part) for part in view.split(self.chunk_size)])
        parts = zip(view["ids"].split(self.chunk_size), view["mask"].split(self.chunk_size), strict=True)
        return torch.cat([self.encoder({**view, "ids": ids, "mask": mask}) for ids, mask in parts])


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(("B", "chunk_size"), SIZES)
@pytest.mark.parametrize("count", [3, 1], ids=["apart", "one encoder"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_gradients_are_those_of_the_whole_batch(kind, B, chunk_size, count, dtype):
    """To the bit those of a loop; so what is left is how PyTorch rounds a product or a sum of fewer rows."""
    model = Model(ENCODERS[kind][0], count).to(dtype)
    for encoder in model.encoders:
        encoder.load_state_dict(model.encoders[0].state_dict())
    views, looped = alike(kind, B, dtype), copy.deepcopy(model)
    looped.encoders = nn.ModuleList(Looped(encoder, chunk_size) for encoder in looped.encoders)
    found = gradients(of_chunks(model, chunk_size), views)
    for chunks, loop in zip(found, gradients(looped, views), strict=True):
        assert torch.equal(chunks, loop)
    for chunks, whole in zip(found, gradients(model, views), strict=True):
        assert chunks.dtype == whole.dtype
        assert chunks.shape == whole.shape
    close(*(torch.cat([x.flatten() for x in some]) for some in (found, gradients(model, views))))


class Counted(nn.Module):
    """A perceptron that notes of how many rows it is called."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 20), nn.GELU(), nn.Dropout(dropout), nn.Linear(20, D))
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        embeddings: Tensor = self.layers(x)
        return embeddings


def test_chunks_run_once_more_when_their_gradients_come():
    """The last one first, one after the other, and every parameter gets its whole gradient at once."""
    encoder = Counted()
    complete: list[Tensor] = []
    for p in encoder.parameters():
        p.register_post_accumulate_grad_hook(complete.append)
    embeddings = Chunked(encoder, 4)(torch.randn(10, 9))
    assert encoder.rows == [4, 4, 2]
    embeddings.square().mean().backward()
    assert encoder.rows == [4, 4, 2, 2, 4, 4]
    assert len(complete) == len(list(encoder.parameters()))


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen", "one chunk"])
def test_nothing_runs_twice_where_nothing_is_gained(how):
    encoder, rows = Counted(), 4 if how == "one chunk" else 10
    x, head = torch.randn(rows, 9), nn.Linear(D, 2)
    if how == "frozen":
        encoder.requires_grad_(False)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    with context():
        embeddings = Chunked(encoder, 4)(x)
        loss = head(embeddings).square().mean()
        torch.testing.assert_close(embeddings, encoder.layers(x))
    if loss.requires_grad:
        loss.backward()
        assert head.weight.grad is not None
    assert encoder.rows == ([4] if how == "one chunk" else [4, 4, 2])


def test_dropout_drops_the_same_when_a_chunk_runs_again():
    """To the bit what a loop over chunks without checkpoints finds; and later random numbers are the same."""
    encoder, x = Counted(dropout=0.5), torch.randn(10, 9)

    def run(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        embeddings = call(x)
        later = torch.rand(3)
        found = torch.autograd.grad(embeddings.square().mean(), tuple(encoder.parameters()))
        return [embeddings, later, torch.rand(3), *found]

    expected = run(lambda x: torch.cat([encoder(part) for part in x.split(4)]))
    assert not torch.equal(expected[0], encoder(x))
    for found, wanted in zip(run(Chunked(encoder, 4)), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("chunk_size", [256, 64, 8])
def test_autocast(chunk_size):
    """bfloat16 costs no more in many chunks than in one: they are summed in the parameters' dtype."""
    model, views = Model(ENCODERS["perceptron"][0]), [torch.randn(256, 9) for _ in range(3)]
    expected = gradients(model, views)

    def error(model: nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, views)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))

    with torch.autocast("cpu", torch.bfloat16):
        assert of_chunks(model, chunk_size).encoders[0](views[0]).dtype == torch.bfloat16
    assert error(of_chunks(model, chunk_size)) <= 1.2 * error(model)


def test_what_is_frozen_gets_no_gradient():
    """Below a frozen part its inputs still get theirs, and so does what every chunk is given whole."""
    model = nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, D))
    model[0].requires_grad_(False)
    x, prompt = torch.randn(10, 9, requires_grad=True), torch.randn(1, 9, requires_grad=True)

    def found(call: Callable[..., Tensor]) -> list[Tensor | None]:
        loss = call(x, prompt=prompt).square().mean()
        return list(torch.autograd.grad(loss, [x, prompt, *model[2].parameters()]))

    def call(x: Tensor, prompt: Tensor) -> Tensor:
        return model(x + prompt)

    for a, b in zip(found(in_chunks(call, 4, shared=["prompt"])), found(call), strict=True):
        close(a, b)
    assert model[0].weight.grad is None


def test_encoders_that_checkpoint_themselves():
    make, batch = ENCODERS["perceptron"]
    model, views = Model(make), [batch(10) for _ in range(3)]

    class Inner(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.encoder, x, use_reentrant=False)

    inner = copy.deepcopy(model)
    inner.encoders = nn.ModuleList(Inner(encoder) for encoder in inner.encoders)
    for found, expected in zip(gradients(of_chunks(inner, 4), views), gradients(model, views), strict=True):
        close(found, expected)


@pytest.mark.parametrize("what", ["encoders", "model"])
def test_compiled(what):
    """Encoders that are compiled, in chunks of two sizes; and a model of chunks, compiled as a whole."""
    make, batch = ENCODERS["perceptron"]
    model, views = Model(make), [batch(10) for _ in range(3)]
    compiled = copy.deepcopy(model)
    if what == "encoders":
        for encoder in compiled.encoders:
            encoder.compile(backend="aot_eager")
    compiled = of_chunks(compiled, 4)
    if what == "model":
        compiled.compile(backend="aot_eager", fullgraph=True)
    try:
        for found, expected in zip(gradients(compiled, views), gradients(model, views), strict=True):
            close(found, expected)
    finally:
        torch.compiler.reset()


def test_memory_is_that_of_one_chunk():
    """The peak of forward and backward, in chunks of an eighth; and twice the rows add their embeddings alone."""
    encoders = nn.ModuleList(nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, D)) for _ in range(3))
    parameters, loss = list(encoders.parameters()), DominantSVLoss(1.0)  # which keeps next to nothing

    def peak(rows: int, chunk_size: int) -> int:
        views = [torch.randn(rows, 16) for _ in range(3)]
        calls = [in_chunks(encoder, chunk_size) for encoder in encoders]

        def step() -> Any:
            return torch.autograd.grad(loss([call(x) for call, x in zip(calls, views, strict=True)]), parameters)

        step()
        return Allocations(step).peak

    activations = 512 * 4 * 2  # bytes of a row: before and after the nonlinearity
    whole, chunks = peak(1024, 1024), peak(1024, 128)
    assert whole >= 3 * 1024 * activations
    assert chunks <= whole / 6
    assert peak(2048, 128) - chunks <= 1024 * activations / 4


def test_batch_norm_is_a_chunks():
    """As documented: its statistics differ from the whole batch's, and are updated when a chunk runs again too."""
    encoder, x = nn.Sequential(nn.Linear(9, D), nn.BatchNorm1d(D)), torch.randn(8, 9)
    embeddings = Chunked(encoder, 4)(x)
    torch.testing.assert_close(embeddings, torch.cat([encoder(x[:4]), encoder(x[4:])]))
    assert not torch.allclose(embeddings, encoder(x), atol=1e-2)
    counted = int(encoder[1].num_batches_tracked)
    embeddings.square().sum().backward()
    assert int(encoder[1].num_batches_tracked) == counted + 2


# ------------------------------------------------------------------------------------------------
# What it may be given, and what may come back
# ------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    y: Any


@dataclasses.dataclass
class Output:
    embedding: Tensor
    hidden: Any = None
    made: int = dataclasses.field(default=0, init=False)


class ModelOutput(collections.OrderedDict):
    """As those of transformers: keys are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.__dict__[key] = value


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "dict": lambda x: {"embedding": x, "nothing": None},
    "nested": lambda x: {"a": [x, {"b": (2 * x, "text", 3)}]},
    "tuple": lambda x: (x, x.sum(1)),
    "named tuple": lambda x: Pair(x, [x]),
    "dataclass": lambda x: Output(x, hidden=(x, x + 1)),
    "model output": lambda x: ModelOutput(embedding=x, hidden=(x,)),
    "user dict": lambda x: collections.UserDict(embedding=x),
}


def leaves(value: Any) -> list[Any]:
    if isinstance(value, collections.abc.Mapping):
        value = list(value.values())
    elif isinstance(value, Output):
        value = [value.embedding, value.hidden]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("grad", [True, False])
def test_containers(kind, grad):
    """In and out: the same classes, with rows cut and put together again."""
    given = CONTAINERS[kind](torch.randn(10, D, requires_grad=grad))
    seen = []

    def function(value: Any, *, factor: int) -> Any:
        seen.append(value)
        return value

    found = in_chunks(function, 4)(given, factor=2)
    assert type(found) is type(given)
    for value, size in zip(seen, (4, 4, 2), strict=True):
        assert type(value) is type(given)
        assert all(len(x) == size for x in leaves(value) if isinstance(x, Tensor))
    for a, b in zip(leaves(found), leaves(given), strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
    if kind == "model output":
        assert torch.equal(found.embedding, found["embedding"])


def to_add(batch: dict[str, Any]) -> None:
    batch["embedding"] = torch.zeros(())


def to_reorder(batch: dict[str, Any]) -> None:
    batch["x"] = batch.pop("x")


def to_write(batch: dict[str, Any]) -> None:
    batch["scales"][0] = 0.0


@pytest.mark.parametrize("change", [to_add, to_reorder, to_write, dict.clear], ids=lambda f: f.__name__)
def test_containers_may_change_once_they_were_given(change):
    """As to hold the result, before `backward()` runs the chunks again."""
    encoder, found = nn.Linear(5, 8), []

    def embed(batch: dict[str, Any]) -> Tensor:
        return encoder(batch["x"]) * batch["y"] * batch["scales"][0] + batch["places"]["first"]

    x, y, place = torch.randn(10, 5), torch.randn(10, 1), torch.randn(8, requires_grad=True)
    for function in (embed, in_chunks(embed, 4, shared=("places",))):
        batch = {"x": x, "y": y, "scales": [2.0], "places": {"first": place}}
        z = function(batch)
        change(batch)
        found.append(torch.autograd.grad(z.square().sum(), [encoder.weight, place]))
    for a, b in zip(*found, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["x", "scale", "place"])
def test_tensors_may_not(name):
    """Neither may they without chunks, where they are needed."""
    encoder = nn.Linear(5, 8)
    given = {"x": torch.randn(10, 5), "scale": torch.tensor(2.0), "place": torch.randn(8)}
    z = in_chunks(lambda x, scale, place: encoder(x) * scale * place, 4, shared=("place",))(**given)
    given[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_shared_containers_come_as_they_are():
    encoder, log = nn.Linear(5, 8), []

    def embed(x: Tensor, log: list[int]) -> Tensor:
        log.append(len(x))
        return encoder(x)

    in_chunks(embed, 4, shared=("log",))(torch.randn(10, 5), log=log)
    assert log == [4, 4, 2]


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, collections.UserDict])
def test_shared_tensors_may_not_be_written_to(kind):
    encoder, places = nn.Linear(5, 8), kind(first=torch.randn(8))
    z = in_chunks(lambda x, places: encoder(x) * places["first"], 4, shared=("places",))(
        torch.randn(10, 5), places=places
    )
    places["first"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@dataclasses.dataclass
class Scaled:
    x: Tensor
    scale: float

    def __post_init__(self) -> None:
        self.made = getattr(self, "made", 0) + 1


def test_a_dataclass_is_made_once_for_each_chunk():
    given, seen = Scaled(torch.randn(10, 5), 2.0), []
    in_chunks(lambda given: (seen.append(given.made), given.x * given.scale)[1], 4)(given)
    assert seen == [1, 1, 1]
    assert given.made == 1


class Shallow(collections.abc.MutableMapping):
    """Of which copy.copy has the same memory."""

    def __init__(self, **items: Any) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def test_a_mapping_that_cannot_be_copied_is_not_written_to():
    batch, x = Shallow(x=torch.randn(10, 4)), nn.Linear(4, 3)
    given = batch["x"]
    with pytest.raises(
        TypeError, match=r"^inputs and outputs: got Shallow, wanted a dict, or a mapping of which copy\.copy"
    ):
        in_chunks(lambda batch: x(batch["x"]), 4)(batch)
    assert batch["x"] is given


def test_what_is_shared_comes_whole():
    x, table, number = torch.randn(10, D), torch.randn(3, D), torch.tensor(2.0)
    seen = []

    def function(batch: dict[str, Any], table: Tensor, number: Tensor, names: list[str]) -> Tensor:
        assert batch["nested"]["table"] is table
        assert number.shape == ()
        assert names == ["one", "two"]
        seen.append(len(batch["x"]))
        return batch["x"]

    call = in_chunks(function, 4, shared={"table"})
    batch = {"x": x, "nested": {"table": table}}
    assert torch.equal(call(batch, table=table, number=number, names=["one", "two"]), x)
    assert seen == [4, 4, 2]


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: Chunked(torch.sum, 4), TypeError, "encoder: got builtin_function_or_method, wanted a torch.nn.Module"),
        (lambda: Chunked(nn.Identity(), 0), ValueError, "chunk_size: got 0, wanted an int of at least 1"),
        (lambda: Chunked(nn.Identity(), 2.0), TypeError, "chunk_size: got float, wanted an int"),
        (lambda: in_chunks(None, 4), TypeError, "function: got NoneType, wanted a callable"),
        (lambda: in_chunks(torch.sum, 4, shared="ids"), TypeError, "shared: got str, wanted a tuple of names"),
        (lambda: in_chunks(torch.sum, 4, shared=[1]), TypeError, "shared: got int in it, wanted names"),
        (lambda: in_chunks(torch.sum, 4)(torch.tensor(1.0), [2]), ValueError, "inputs: got no tensor with dimensions"),
        (
            lambda: in_chunks(torch.add, 4)(torch.ones(8, 2), other=torch.ones(1, 2)),
            ValueError,
            r"other: got 1 rows, wanted 8, as inputs\[0\] has",
        ),
        (
            lambda: in_chunks(lambda batch: batch, 4)({"x": torch.ones(8), "y": [torch.ones(7)]}),
            ValueError,
            r"inputs\[0\]\['y'\]\[0\]: got 7 rows, wanted 8, as inputs\[0\]\['x'\] has",
        ),
        (
            lambda: in_chunks(lambda x: {"loss": x.sum()}, 4)(torch.ones(8)),
            ValueError,
            r"output\['loss'\]: got the shape \(\) of 4 rows, wanted one row for each",
        ),
        (lambda: in_chunks(torch.t, 8)(torch.ones(8, 2)), ValueError, r"output: got the shape \(2, 8\) of 8 rows"),
        (lambda: in_chunks(len, 5)(torch.ones(8)), TypeError, "output: got int, wanted tensors, or what is equal"),
        (
            lambda: in_chunks(lambda x: (x, object()), 4)(torch.ones(8)),
            TypeError,
            r"output\[1\]: got object, wanted tensors",
        ),
    ],
)
def test_errors(call, error, told):
    with pytest.raises(error, match=told):
        call()


def test_outputs_are_joined_by_key():
    """Not by place: a dict may come in another order."""
    x = torch.arange(4.0)[:, None]
    found = in_chunks(lambda a: {"a": a, "b": [10 * a]} if a[0] == 0 else {"b": [10 * a], "a": a}, 2)(x)
    assert list(found) == ["a", "b"]
    assert torch.equal(found["a"], x)
    assert torch.equal(found["b"][0], 10 * x)


@pytest.mark.parametrize(
    ("first", "other", "told"),
    [
        (
            lambda x: {"video": x},
            lambda x: {"audio": x},
            r"output\['video'\]: got nothing of chunk 1, and of the first",
        ),
        (lambda x: {"a": x, "b": x}, lambda x: {"a": x}, r"output\['b'\]: got nothing of chunk 1, and of the first"),
        (
            lambda x: {"a": x},
            lambda x: {"a": x, "b": x},
            r"output\['b'\]: got Tensor of chunk 1, and of the first nothing, ",
        ),
        (lambda x: {"a": x}, lambda x: {"a": None}, r"output\['a'\]: got None of chunk 1, and of the first Tensor, "),
        (lambda x: (x,), lambda x: [x], "output: got list of chunk 1, and of the first tuple, wanted the same of all"),
        (
            lambda x: x,
            lambda x: {"a": x},
            "output: got dict of chunk 1, and of the first Tensor, wanted the same of all",
        ),
        (
            lambda x: [x],
            lambda x: [torch.cat([x, x], 1)],
            r"output\[0\]: got the shape \(2, 2\) of chunk 1, and of the first \(2, 1\), wanted the same but for rows",
        ),
        (lambda x: [x, 1], lambda x: [x, 2], r"output\[1\]: got int, wanted tensors, or what is equal in all chunks"),
    ],
)
def test_chunks_whose_outputs_are_of_different_kinds(first, other, told):
    """An encoder of what there is in a chunk, say: nothing may be put under another name."""
    with pytest.raises(TypeError, match=told):
        in_chunks(lambda x: (first if x[0] == 0 else other)(x), 2)(torch.arange(4.0)[:, None])


def test_the_module_travels():
    """Its encoder by name in a state, and equal after a copy."""
    module = Chunked(nn.Linear(9, D), 4, shared=["places"])
    assert list(module.state_dict()) == ["encoder.weight", "encoder.bias"]
    assert "chunk_size=4, shared=('places',)" in repr(module)
    x = torch.randn(10, 9)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
