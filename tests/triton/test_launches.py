"""Launches, counted instead of made: which kernels, with which arguments, compiled when."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton has no packages for this system")

from pmrl_kernels import compilation
from pmrl_kernels.ops import contrast
from pmrl_kernels.ops import triton as backend
from pmrl_kernels.ops.contrast import triton as fused
from pmrl_kernels.ops.contrast.triton import launch as contrasts
from pmrl_kernels.ops.spectral import spec, triton
from pmrl_kernels.ops.spectral.triton import launch
from pmrl_kernels.ops.triton import arguments, record, runtime
from tests.tools import resources
from tests.tools.processes import run

if runtime.INTERPRETED:
    pytest.skip("this process interprets; these tests start such processes themselves", allow_module_level=True)

OUTPUTS = {
    "alignment": spec.ALIGNMENT_MEAN,
    "values": spec.SIGMA,
    "others": spec.ALIGNMENT_MEAN | spec.Z | spec.W,
    "everything": spec.ALIGNMENT_MEAN | spec.SIGMA | spec.U | spec.V | spec.Z | spec.W,
}


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[str]]:
    names: list[str] = []
    monkeypatch.setattr(runtime, "run", lambda one: names.append(one.kernel.fn.__name__))
    # Nothing is written or read, so that filling large batches would be all there is to do.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return names


@pytest.mark.parametrize(
    ("wanted", "B", "forward"),
    [
        ("alignment", 64, ["forward_kernel", "reduce_kernel"]),
        ("values", 64, ["forward_kernel"]),
        ("others", 64, ["forward_kernel", "reduce_kernel"]),
        ("everything", 64, ["forward_kernel", "reduce_kernel"]),
        ("alignment", 65536, ["gram_kernel", "solve_kernel"]),
        ("values", 65536, ["gram_kernel", "solve_kernel"]),
        ("others", 65536, ["gram_kernel", "solve_kernel", "vectors_kernel"]),
        ("everything", 65536, ["gram_kernel", "solve_kernel", "vectors_kernel"]),
        ("everything", 0, []),
    ],
)
def test_launches(launched, wanted, B, forward):
    """One or two for the alignment term forward, one backward whatever comes in."""
    xs = [torch.empty(B, 4) for _ in range(3)]
    options = (None, None, 0.05, True, True, OUTPUTS[wanted])
    outputs, state = launch.forward(xs, *options)
    assert launched == forward
    launch.backward(xs, *options, state, outputs, [True, False, True])
    assert launched == forward + (["backward_kernel"] if B else [])


def test_a_large_batch_is_summed_by_several_programs(monkeypatch):
    """Also for k > 8, where no solve_kernel does it on its way."""
    launched: dict[str, runtime.Launch] = {}
    monkeypatch.setattr(runtime, "run", lambda one: launched.update({one.kernel.fn.__name__: one}))
    for B, programs in ((launch.SHARE, 1), (launch.SHARE + 1, 2), (65536, 64)):
        launch.forward([torch.empty(B, 4) for _ in range(12)], None, None, 0.05, True, True, OUTPUTS["alignment"])
        one = launched["reduce_kernel"]
        (sums,) = (value for value in one.arguments if isinstance(value, arguments.Sums))
        assert one.programs == programs
        assert (sums.counter is None) == (sums.partial is None) == (programs == 1)


def contrast_arguments(name: str, B: int, everyone: int = 0, k: int = 3, d: int = 4) -> Any:
    kind = contrast.spec.kind(name, k)
    rows = [torch.empty(B, d) for _ in range(kind.vectors(k))]
    others = [torch.empty(everyone, d) for _ in rows] if everyone else []
    return rows, kind.pairs, kind.directions, None, others, None, 0, None, 0.1


def contrast_passes(arguments: Any) -> None:
    _, losses, state = contrasts.forward(*arguments)
    columns = arguments[4] or arguments[0]
    losses = losses.new_empty((*losses.shape[:2], len(columns[0])))
    contrasts.backward(*arguments, losses, state, torch.ones(()))


@pytest.mark.parametrize("name", contrast.spec.NAMES)
def test_launches_of_contrasts(launched, name):
    """Two each way, whatever the number of pairs; a third where a batch is large, or another process has rows too; and
    beyond the room for weights two for each strip of a way."""
    forward, backward = ["prepare_kernel", "similar_kernel"], ["weights_kernel", "product_kernel"]
    for B, everyone in ((1, 0), (1024, 0), (64, 256)):
        launched.clear()
        contrast_passes(contrast_arguments(name, B, everyone))
        assert launched == forward + ["finish_kernel"] * (everyone > 0) + backward, (B, everyone)
    launched.clear()
    contrast_passes(contrast_arguments(name, 4096, d=2048))
    assert launched == [*forward, "prepare_kernel", *backward]
    launched.clear()
    contrast_passes(contrast_arguments(name, 16384))
    ways = 1 if name == "leading" else 6
    assert launched.count("weights_kernel") == launched.count("product_kernel") == ways * 4
    assert launched.count("similar_kernel") == 1
    assert "finish_kernel" not in launched
    launched.clear()
    contrast_passes(contrast_arguments(name, 0, 64))
    assert launched == ["prepare_kernel", "finish_kernel"]
    contrast_passes(contrast_arguments(name, 0))
    assert len(launched) == 2


def test_what_contrasts_keep(launched):
    """O(N) numbers from one pass to the other, but for small batches, and fake tensors say so."""
    for name, B, everyone in itertools.product(contrast.spec.NAMES, (100, 70000), (0, 80000)):
        arguments = contrast_arguments(name, B, everyone)
        found, fake = contrasts.forward(*arguments), fused._forward_shapes(*arguments)
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in fake]
        numbers = (everyone or B) * len(arguments[0]) * 64
        assert (found[2].numel() == 2) == (numbers > fused.state.KEPT)
        assert found[2].numel() <= 1.2 * numbers + 1e4


class Compiled:
    """In place of a compiled kernel: whether what it is launched with is what it was compiled for."""

    def __init__(self, kernel: Any, compilation: runtime.Compilation) -> None:
        self.kernel, self.compilation, self.launches = kernel, compilation, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.check

    def check(self, *values: Any, stream: int) -> None:
        self.launches += 1
        kinds, parameters, multiples, *_ = self.compilation
        assert values[len(kinds) :] == parameters
        for name, value, kind, multiple in zip(self.kernel.arg_names, values, kinds, multiples, strict=False):
            self.check_one(name, value, kind, multiple)

    def check_one(self, name: str, value: Any, kind: Any, multiple: int) -> None:
        if isinstance(kind, tuple):
            assert type(value) is kind[0], name
            for part, one in zip(value, kind[1], strict=True):
                self.check_one(name, part, one, multiple)
        elif isinstance(value, torch.Tensor):
            assert (value.dtype, multiple > 1 and value.data_ptr() % 16) == (kind, 0), name
        elif value is None or kind is None:
            assert value is kind, name
        else:
            assert isinstance(value, kind), name
            assert value % multiple == 0, name


@pytest.fixture
def compiled_kernels(monkeypatch) -> Iterator[dict[Any, Compiled]]:
    """What is kept for later launches, of a backend that compiles and launches as on a GPU but for the kernels."""
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: resources.TARGETS["sm_90"]))
    monkeypatch.setattr(runtime.triton.runtime, "driver", driver)
    monkeypatch.setattr(runtime, "compile_for", lambda target, kernel, compilation: Compiled(kernel, compilation))
    monkeypatch.setattr(runtime, "_compiled", {})
    # Nothing is written or read here, so that filling outputs and states of large batches would be all there is to do.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return runtime._compiled


@pytest.mark.parametrize("sums", ["float64", "float32"])
def test_a_kernel_is_launched_with_what_it_was_compiled_for(compiled_kernels, monkeypatch, sums):
    """Kernels are kept by a key. Equal keys must mean equal sources, whatever was called before: once a width was left
    out of it, by which backward_kernel differs, and a second width got the kernel of the first."""
    monkeypatch.setattr(runtime, "SUMS", sums)
    for d, k, dtype, B, masked, learned, spectrum, name in itertools.product(
        (1, 16, 64, 100, 128, 256, 512, 1024),
        (2, 4, 12),
        (torch.float32, torch.bfloat16, torch.float64),
        (8, launch.LATENCY_BATCH + 8, launch.SPREAD_BATCH + 8),
        (False, True),
        (False, True),
        (False, True),
        OUTPUTS,
    ):
        xs = [torch.empty(1, d, dtype=dtype).expand(B, d) for _ in range(k)]
        mask = torch.ones(1, k, dtype=torch.bool).expand(B, k) if masked else None
        tau = torch.ones(()) if learned else None
        options = (mask, tau, 0.05, True, spectrum, OUTPUTS[name])
        outputs, state = launch.forward(xs, *options)
        grads = [None, *outputs[1:]] if name == "everything" and masked else outputs
        launch.backward(xs, *options, state, grads, [True] * (k - 1) + [not masked])
    made = [(one.kernel, one.compilation) for one in compiled_kernels.values()]
    sources = {(runtime._source(kernel, one).hash(), one.warps, one.registers, one.stages) for kernel, one in made}
    assert len(sources) == len(compiled_kernels) >= 300, "two keys for one source compile it twice"
    assert sum(one.launches for one in compiled_kernels.values()) > 3 * len(sources)


def test_kernels_of_contrasts_are_launched_with_what_they_were_compiled_for(compiled_kernels):
    """Theirs are kept by less than what they are compiled for, and that must do."""
    for name, k, d, B, everyone, masked, tau, grad, precision in itertools.product(
        contrast.spec.NAMES,
        (2, 3),
        (7, 64, 100, 128),
        (1, 600, 2000, 70000),
        (0, 71000),
        (None, torch.bool, torch.int8),
        (None, torch.float32, torch.float64),
        (torch.float32, torch.float64),
        ("highest", "high"),
    ):
        if (d, masked) not in ((7, None), (64, torch.bool), (100, torch.int8), (128, None)):
            continue
        kind = contrast.spec.kind(name, k)
        rows, others = ([torch.empty(1, d).expand(N, d) for _ in range(kind.vectors(k))] for N in (B, everyone))
        mask = torch.ones(1, k, dtype=masked).expand(B, k) if masked and kind.masked else None
        present = None if mask is None or not everyone else mask[:1].expand(everyone, k)
        temperature = None if tau is None else torch.ones((), dtype=tau)
        where = (others, present, B) if everyone else ([], None, 0)
        arguments = rows, kind.pairs, kind.directions, mask, *where, temperature, 0.1
        torch.set_float32_matmul_precision(precision)
        try:
            _, losses, state = contrasts.forward(*arguments)
            losses = losses[..., :1].expand(*losses.shape[:2], everyone or B)
            contrasts.backward(*arguments, losses, state, torch.ones((), dtype=grad))
        finally:
            torch.set_float32_matmul_precision("highest")
    made = [(one.kernel, one.compilation) for one in compiled_kernels.values()]
    sources = {(runtime._source(kernel, one).hash(), one.warps, one.registers, one.stages) for kernel, one in made}
    assert len(sources) == len(compiled_kernels) >= 200, "two keys for one source compile it twice"


def test_settings_of_a_kernel_are_compiled_apart(compiled_kernels, monkeypatch):
    """Whoever tunes changes one setting at a time, and would time one kernel under every name."""
    made, run = [], runtime.run
    monkeypatch.setattr(runtime, "run", lambda one: (made.append(one), run(one)))
    u = torch.empty(1, 64).expand(2000, 64)
    contrasts.forward([u], [0, 0], [True], None, [], None, 0, None, 0.1)
    launch.forward([u, u], None, None, 0.05, True, True, OUTPUTS["alignment"])
    assert {one.varies is None for one in made} == {True, False}
    for one in made:
        before = len(compiled_kernels)
        others = [{"warps": one.warps * 2}, {"registers": 64}, {"stages": (7, 1024)}]
        for change in ({}, *others):
            run(one._replace(**change))
        assert len(compiled_kernels) == before + len(others)


def test_a_first_call_while_a_graph_is_captured(compiled_kernels, monkeypatch):
    """To load a kernel would end the capture. What is there already runs."""
    xs = [torch.empty(8, 16) for _ in range(3)]
    options = (None, None, 0.05, True, True, OUTPUTS["alignment"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"forward_kernel is not compiled .* call pmrl_kernels\.warm_up"):
        launch.forward(xs, *options)
    assert not compiled_kernels
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch.forward(xs, *options)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch.forward(xs, *options)


def test_cards_with_slow_float64_sum_in_double_float(monkeypatch):
    """By the card, unless PMRL_KERNELS_SUMS says otherwise; embeddings in float64 and k > 8 never do."""
    slow = {name for name, target in resources.TARGETS.items() if runtime.slow_float64(target)}
    assert slow == {"sm_75", "sm_120", "gfx1100"}
    assert launch.plan(8, 64, launch.SMALL, 4, True).double_float
    assert not launch.plan(8, 64, launch.SMALL, 4, False).double_float
    assert not launch.plan(8, 64, launch.SMALL, 8, True).double_float
    assert not launch.plan(9, 64, launch.SMALL, 4, True).double_float
    assert runtime.double_float(0, "float32")
    assert not runtime.double_float(0, "float64")
    with pytest.raises(ValueError, match="PMRL_KERNELS_SUMS: got 'bf16'"):
        runtime.double_float(0, "bf16")
    for name, target in resources.TARGETS.items():
        driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda target=target: target))
        monkeypatch.setattr(runtime.triton.runtime, "driver", driver)
        runtime.double_float.cache_clear()
        assert runtime.double_float(0, None) == (name in slow)
    runtime.double_float.cache_clear()


def test_warm_up_compiles_all_that_is_needed_later():
    code = """
import json, torch
from functools import partial
from pmrl_kernels import compilation, dominant_singular_triplet, pmrl_loss, warm_up
from pmrl_kernels.ops.spectral.triton import launch
from pmrl_kernels.ops.triton import runtime

seen = set()
runtime.run = lambda one: seen.add((one.kernel.fn.__name__, one.compilation()))

runtime.INTERPRETED = False  # tiles are a GPU's
torch.utils.deterministic.fill_uninitialized_memory = False

def calls(B):
    xs = [torch.randn(B, 32, requires_grad=True) for _ in range(3)]
    mask = torch.ones(B, 3, dtype=torch.bool)
    for contrast in ("leading", "pairs"):
        pmrl_loss(dict(zip("abc", xs)), mask={name: mask[:, 0] for name in "abc"}, contrast=contrast).backward()
    dominant_singular_triplet(xs[0].detach(), *xs[1:]).sigma.sum().backward()

compilation._batches = lambda leaves: compilation._BATCHES  # as on a GPU
xs = [torch.randn(5, 32) for _ in range(3)]
mask = torch.ones(5, dtype=torch.bool)
for contrast in ("leading", "pairs"):
    warm_up(partial(pmrl_loss, contrast=contrast), dict(zip("abc", xs)), mask=dict.fromkeys("abc", mask))
xs[1].requires_grad_(), xs[2].requires_grad_()
warm_up(lambda *xs: dominant_singular_triplet(*xs).sigma, *xs)
assert all(x.grad is None for x in xs)
before = set(seen)
for B in (1, 3, 500, 700, launch.LATENCY_BATCH, launch.LATENCY_BATCH + 1, 1600, 3000, launch.SPREAD_BATCH + 1):
    calls(B)
print(len(before), len(seen))
"""
    done = run("-c", code, TRITON_INTERPRET="1", PMRL_KERNELS_BACKEND="triton")
    assert done.returncode == 0, done.stderr[-2000:]
    compiled_before, needed = map(int, done.stdout.split())
    assert compiled_before == needed >= 8


def test_what_is_kept_on_disk_is_found_in_whatever_order_kernels_come():
    """Triton 3.6 would give them other names, later ones do not."""
    code = """
import sys
from pmrl_kernels.ops.triton import runtime
from tests.tools import resources
launches = []
runtime.run = launches.append
resources.spectral_calls(resources.Case("sm_90", "pmrl", "fp32", 3), 64)
resources.contrast_calls(resources.Case("sm_90", "instances", "fp32", 1), 64)
runtime.triton.compile = lambda source, **_: print(source.fn.fn.__name__, source.fn.cache_key)
for one in launches if sys.argv[1] == "forwards" else reversed(launches):
    runtime.compile_for(resources.TARGETS["sm_90"], one.kernel, one.compilation())
"""
    found = []
    for order in ("forwards", "backwards"):
        done = run("-c", code, order)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(set(done.stdout.splitlines()))
    assert len({line.partition(" ")[0] for line in found[0]}) >= 8
    assert found[0] == found[1]


@pytest.mark.parametrize("stacked", [False, True])
def test_vectors_whose_gradient_nobody_has_count_as_zeros(stacked, monkeypatch):
    """Instead of a None among others: Triton 3.6 does not compile `is not None` of a tuple that has one in it."""
    taken: list[Any] = []

    def take(one: runtime.Launch) -> None:
        taken.append(one)
        for rows in one.arguments[7:9] if one.kernel.fn.__name__ == "backward_kernel" else ():
            for offset, stride in zip(rows.offsets, rows.strides, strict=True) if rows is not None else ():
                at = rows.pointer.data_ptr() + offset * rows.pointer.element_size()
                row = np.ctypeslib.as_array((ctypes.c_float * d).from_address(at))
                assert stride == d or not row.any(), "nobody holds it"

    monkeypatch.setattr(runtime, "run", take)
    B, k, d = 6, 3, 1 << 16  # such memory is another's, or nobody's, as soon as it is given back
    xs = [torch.randn(B, k, d)] if stacked else list(torch.randn(k, B, d).unbind(0))
    wanted = spec.ALIGNMENT_MEAN | spec.Z | spec.W
    outputs, state = launch.forward(xs, None, None, 0.05, True, True, wanted)
    given = list(torch.randn(2 * k, B, d).unbind(0))
    for absent in ([1], [k + 2], [0, 2, k, k + 1], range(k), range(2 * k)):
        grads = [None if i in absent else x for i, x in enumerate(given)]
        launch.backward(xs, None, None, 0.05, True, True, wanted, state, [outputs[0], *grads], [True] * len(xs))
        z, w = taken[-1].arguments[7:9]
        for rows, some in ((z, grads[:k]), (w, grads[k:])):
            if not any(x is not None for x in some):
                assert rows is None
                continue
            for x, offset, stride in zip(some, rows.offsets, rows.strides, strict=True):
                assert offset is not None
                at = rows.pointer.data_ptr() + offset * rows.pointer.element_size()
                if x is not None:
                    assert (at, stride) == (x.data_ptr(), d)
                else:
                    assert stride == 0


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("architecture", [*runtime.SHARED, "gfx942"])
def test_two_loads_at_least_fit_shared_memory(architecture, precision, monkeypatch):
    """On each card, of what a contrast loads for a product: Triton would refuse to launch what takes more."""
    monkeypatch.setattr(runtime, "architecture", lambda _: architecture)
    monkeypatch.setattr(contrasts, "exact", lambda: precision == "highest")
    for N in (100, 600, 2000):
        xs = [torch.empty(N, 512)]
        call = contrasts.geometry(contrasts.Problem(xs, (0, 0), (True,), None, [], None, 0, None, 0.1))
        _, each = contrasts._stages(call, call.plan.tile)
        assert 2 * each <= 1024 * runtime.SHARED.get(architecture, 64), N


def test_warm_up_takes_a_batch_of_each_kind():
    for k in range(2, 33):
        assert {launch.size_of(B, k) for B in compilation._BATCHES} == {launch.SMALL, launch.MEDIUM, launch.LARGE}
        sizes = [launch.size_of(B, k) for B in compilation._ON_CPUS]
        assert sizes == [launch.SMALL, launch.MEDIUM]
    assert compilation._ON_CPUS[0] <= launch.SHARE < compilation._ON_CPUS[1]
    # of each size of tiles the fewest and the most, or more than there is room for
    for itself, N in itertools.product((True, False), range(1, 10000)):
        tile = contrasts.plan(N, itself, 90).tile
        warmed = [-(-B // tile) for B in compilation._BATCHES if contrasts.plan(B, itself, 90).tile == tile]
        assert min(warmed) <= -(-N // tile) <= max(warmed) or (max(warmed) * tile) ** 2 > contrasts.ROOM, N


@pytest.mark.parametrize("itself", [True, False])
def test_warm_up_takes_what_processes_have_together(itself, monkeypatch):
    def tile(N: int) -> int:
        return contrasts.plan(N, itself, 90).tile

    on_a_gpu = [torch.empty(5, 4, device="meta")]
    monkeypatch.setattr(compilation.dist, "is_initialized", lambda: True)
    for processes in (1, 2, 3, 8, 16, 100, 512):
        monkeypatch.setattr(compilation.dist, "get_world_size", lambda processes=processes: processes)
        batches = compilation._batches(on_a_gpu)
        assert set(map(tile, batches)) == set(map(tile, range(1, 10000)))
        reached = {tile(processes * B) for B in range(2, 10000)}  # with two rows each, or more
        assert {tile(processes * B) for B in batches} == reached
        assert min(batches) >= 2


def test_shapes_without_running(launched):
    """Outputs are those of the reference, the state is as large as the fake one that torch.compile sees."""
    for stacked in (False, True):
        xs = [torch.empty(5, 3, 4)] if stacked else [torch.empty(5, 4) for _ in range(3)]
        for wanted in OUTPUTS.values():
            outputs, state = launch.forward(xs, None, None, 0.05, True, True, wanted)
            expected = spec.output_shapes(xs, True, wanted)
            assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in expected]
            kept = record.layout(3, True, True, wanted & spec.ANY_ALIGNMENT != 0, wanted & spec.W != 0)
            fake = triton._forward_shapes(xs, None, None, 0.05, True, True, wanted)[1]
            assert state[0].shape == fake[0].shape
            assert state[0].shape == (record.state_size(5, kept),)


@pytest.mark.parametrize("where", [(arguments.__package__, "record.py"), (fused.__name__, "state.py")], ids=str)
def test_operators_of_another_layout_have_another_name(where, monkeypatch):
    """torch.compile keeps compiled graphs on disk, states of a fixed size in them, by the names of operators."""
    name = backend.fingerprint(*where)
    assert re.fullmatch("[0-9a-f]{8}", name)
    assert any(name in registered for registered in torch._C._dispatch_get_all_op_names())
    monkeypatch.setattr(backend.pkgutil, "get_data", lambda package, file: b"another " + file.encode())
    assert backend.fingerprint(*where) != name
    monkeypatch.setattr(backend.pkgutil, "get_data", lambda package, file: None)
    assert re.fullmatch("[0-9a-f]{8}", backend.fingerprint(*where))


def test_a_record_has_room_for_its_fields():
    """Which lie side by side, but for the Gram matrix and what takes the place of another's."""
    for k, spectrum, normalize, alignment, others in itertools.product((1, 2, 4, 9, 32), *[(False, True)] * 4):
        half = k * (k + 1) // 2
        sizes = dict.fromkeys(record.Layout._fields, k)
        sizes |= {"gram": half, "eigenvectors": k * k, "through_alignment": half, "resolvent": half}
        sizes |= dict.fromkeys(("slope", "alignment", "undecided"), 1)
        kept = record.layout(k, spectrum, normalize, alignment, others)
        starts = {name: at for name, at in kept._asdict().items() if at is not None and name != "size"}
        assert starts.pop("gram") == 0
        assert spectrum or starts.pop("resolvent") == starts["eigenvectors"] == half
        assert list(starts.values()) == sorted(starts.values())
        ends = [at + sizes[name] for name, at in starts.items()]
        assert [0 if spectrum else half, *ends] == [*starts.values(), ends[-1]]
        assert kept.size in (ends[-1], ends[-1] + 1)
        assert (kept.inverse_norms is None, kept.undecided is None) == (not normalize, spectrum)
        assert (kept.others is None) == (not others)
        assert (kept.slope is None) == (kept.alignment is None) == (kept.through_alignment is None) == (not alignment)
